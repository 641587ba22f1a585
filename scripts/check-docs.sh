#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Every plugin and role of the collection in the current directory documents itself, and ansible-doc can read it.
set -eu
found=0
for kind in module filter lookup; do
    case $kind in module) directory=plugins/modules ;; *) directory=plugins/$kind ;; esac
    [ -d $directory ] || continue
    for file in "$directory"/*.py; do
        name=$(basename "$file" .py)
        [ "$name" != __init__ ] || continue
        # A filter's file may hold several filters; each has a page of its own.
        if [ "$kind" = filter ]; then
            for page in $(ansible-doc --type filter --list isthmus.mesh 2> /dev/null | awk '{ print $1 }'); do
                ansible-doc --type filter --snippet "$page" > /dev/null 2>&1 || ansible-doc --type filter "$page" > /dev/null
            done
        else
            ansible-doc --type $kind "isthmus.mesh.$name" > /dev/null
        fi
        found=$((found + 1))
    done
done
for role in roles/*/; do
    name=$(basename "$role")
    [ -f "roles/$name/README.md" ] || { echo "roles/$name has no README.md"; exit 1; }
    [ -f "roles/$name/meta/argument_specs.yml" ] || { echo "roles/$name has no meta/argument_specs.yml"; exit 1; }
    ansible-doc --type role "isthmus.mesh.$name" > /dev/null
    found=$((found + 1))
done
[ $found -gt 0 ] || { echo "nothing was found in $PWD"; exit 1; }
