#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# `make demo`: from a fresh clone to the table. Says what it will change before it changes anything.
# usage: scripts/demo.sh VENV   (from make, which knows the path)
set -eu
cd "$(dirname "$0")/.."
venv=$1
began=$(date +%s)
state=${ISTHMUS_LAB_STATE:-/var/lib/isthmus-lab}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/isthmus

step() { printf '\n== %s (%d s)\n' "$1" $(($(date +%s) - began)); }

cat <<TEXT
This is what the demo does on this machine:

  Debian packages   those of requirements/apt.txt that are missing (at most 0.9 GB); none of them starts a service
  $cache
                    a Python environment (0.4 GB), a root file system (0.4 GB), wheels (0.02 GB); kept for the next time
  $state
                    six machines' disks, the lab's SSH key (up to 0.5 GB)
  $(pwd)/build
                    the agent's bundle and the collection's artifact (0.1 GB)
  network           namespaces islab-*, link islab0, route 198.18.0.0/16; processes in the cgroup isthmus-lab

About 6 minutes the first time, less than 2 after that. 'make lab-down' takes away the machines and the network
without a trace; 'make clean' and removing $cache takes away the rest.
TEXT

sh scripts/precheck.sh || { echo "demo: this machine lacks the above; nothing was changed" >&2; exit 1; }

step "Debian packages and the Python environment"
make --no-print-directory setup
tests/lab/lab check || { echo "demo: this machine cannot carry the lab" >&2; exit 1; }
step "The datapath, the agent's bundle, the collection"
make --no-print-directory collection
step "The lab: six systemd machines in three sites"
make --no-print-directory lab-up
step "ansible-playbook isthmus.mesh.site -i inventories/lab"
"$venv/bin/ansible-playbook" -i inventories/lab isthmus.mesh.site
step "The product, with real requests"
/usr/bin/python3 tests/lab/demo.py
printf 'demo: %d s in all\n' $(($(date +%s) - began))
