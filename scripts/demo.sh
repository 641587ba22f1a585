#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# `make demo`: from a fresh clone to the table. Says what it will change before it changes anything.
# usage: scripts/demo.sh VENV   (from make, which knows the path)
# LAB=machines ends after the machines' story.
set -eu
cd "$(dirname "$0")/.."
venv=$1
began=$(date +%s)
state=${ISTHMUS_LAB_STATE:-/var/lib/isthmus-lab}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/isthmus

case ${LAB:=all} in
    all | machines) ;;
    *)
        echo "demo: LAB=$LAB: no such part; LAB=machines tells the machines' story only, without LAB all is told" >&2
        exit 2
        ;;
esac

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

About 6 minutes the first time, 2 after that on two cores.
TEXT
[ "$LAB" = machines ] || cat <<TEXT

Then Kubernetes joins (LAB=machines leaves it out):

  $cache
                    Kubernetes' programs (0.3 GB), built from source; Go, if there is none (0.3 GB)
  Go's caches       modules (2.3 GB) and what was compiled (up to 5 GB), where \`go env GOMODCACHE GOCACHE\` says
  $state
                    three more machines' disks, container images (up to 1 GB)
  sysctl            fs.inotify.max_user_instances is raised while the cluster is up

About 8 minutes more the first time, 3 after that.
TEXT
cat <<TEXT

'make lab-down' takes away the machines and the network without a trace; 'make clean' and removing $cache
takes away the rest.
TEXT

sh scripts/precheck.sh || { echo "demo: this machine lacks the above; nothing was changed" >&2; exit 1; }

step "Debian packages and the Python environment"
make --no-print-directory setup
tests/lab/lab check || { echo "demo: this machine cannot carry the lab" >&2; exit 1; }
if [ "$LAB" = all ] && ! tests/lab/lab kube check; then
    echo "demo: this machine cannot carry a Kubernetes cluster beside the lab: only the machines' story is told"
    LAB=machines
fi
step "The datapath, the agent's bundle, the collection"
make --no-print-directory collection
step "The lab: six systemd machines in three sites"
make --no-print-directory lab-up
# The story begins with the machines alone: what an earlier one left of Kubernetes goes first.
left=
for place in "$state"/kubernetes/*/pki; do
    [ ! -d "$place" ] || left="$left,cluster/$(basename "$(dirname "$place")")"
done
set --
[ -z "$left" ] || set -- -e "isthmus_prune=${left#,}"
step "ansible-playbook isthmus.mesh.site -i inventories/lab $*"
"$venv/bin/ansible-playbook" -i inventories/lab isthmus.mesh.site "$@"
[ -z "$left" ] || tests/lab/lab kube down
step "The product, with real requests"
/usr/bin/python3 tests/lab/demo.py
printf 'demo: %d s in all\n' $(($(date +%s) - began))
[ "$LAB" = all ] || exit 0

step "The programs of a Kubernetes cluster"
"$venv/bin/python" tests/lab/kubernetes_parts.py
step "The cluster: a control plane and two nodes"
tests/lab/lab kube up
step "It joins the running estate: pods and machines are one network"
/usr/bin/python3 tests/lab/demo_hybrid.py "$venv/bin/ansible-playbook" -i inventories/lab_hybrid isthmus.mesh.site
printf 'demo: %d s in all\n' $(($(date +%s) - began))
