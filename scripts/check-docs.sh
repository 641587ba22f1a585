#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Every module, filter and role of the collection in the current directory documents itself, and ansible-doc reads it.
set -eu

names() { for file in "$1"/*.py; do basename "$file" .py; done | grep -v '^__init__$' | sed 's/^/isthmus.mesh./'; }

# shellcheck disable=SC2046 # a list of names
ansible-doc --type module $(names plugins/modules) > /dev/null

if [ -d plugins/filter ]; then
    filters=$(ansible-doc --type filter --list isthmus.mesh | awk '{ print $1 }')
    [ -n "$filters" ] || { echo "plugins/filter: ansible-doc finds no filter"; exit 1; }
    # shellcheck disable=SC2086
    ansible-doc --type filter $filters > /dev/null
fi

roles=
for role in roles/*/; do
    name=$(basename "$role")
    [ -f "$role/README.md" ] || { echo "roles/$name has no README.md"; exit 1; }
    [ -f "$role/meta/argument_specs.yml" ] || { echo "roles/$name has no meta/argument_specs.yml"; exit 1; }
    roles="$roles isthmus.mesh.$name"
done
# shellcheck disable=SC2086
ansible-doc --type role $roles > /dev/null
