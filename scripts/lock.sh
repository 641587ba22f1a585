#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Resolves requirements/controller.in in a fresh environment and writes what was chosen to controller.txt.
set -eu
cd "$(dirname "$0")/../requirements"
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
/usr/bin/python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --upgrade pip
"$place/venv/bin/python" -m pip install --quiet --only-binary=:all: --requirement controller.in
{
    echo "# Made by \`make lock\` from controller.in: exact versions of everything in the controller's environment."
    "$place/venv/bin/python" -m pip freeze --all
} > controller.txt.part
mv controller.txt.part controller.txt
echo "lock: requirements/controller.txt is new; \`make setup\` makes the environment"
