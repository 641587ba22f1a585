#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# The gates. Each says its name, its seconds, and when it fails what it said.
# usage: scripts/lint.sh quick|slow|all   (from make and scripts/test.sh, with the environment's tools in PATH)
set -u
cd "$(dirname "$0")/.." || exit
mode=$1
failed=
log=$(mktemp)
export NO_COLOR=1 ANSIBLE_NOCOLOR=1
trap 'rm -f "$log"' EXIT

gate() {
    name=$1
    shift
    began=$(date +%s)
    if "$@" > "$log" 2>&1; then
        printf 'lint: %-28s ok    %3d s\n' "$name" $(($(date +%s) - began))
    else
        printf 'lint: %-28s FAIL  %3d s\n' "$name" $(($(date +%s) - began))
        sed 's/^/    /' "$log"
        failed="$failed $name"
    fi
}

in_stage() { (cd build/stage/ansible_collections/isthmus/mesh && "$@"); }

ours() { git ls-files --cached --others --exclude-standard -- "$@"; }

spdx() {
    # Every source file names its licence in its first lines.
    bad=$(ours '*.py' '*.sh' '*.c' '*.h' '*.yml' '*.yaml' Makefile bpf/Makefile tests/lab/lab .ci/run |
        grep -v -e '^changelogs/' -e '^galaxy.yml$' -e '/files/' |
        xargs awk 'FNR == 1 { if (file) print file; file = FILENAME }
            FNR <= 5 && /SPDX-License-Identifier:/ { file = "" }
            END { if (file) print file }')
    [ -z "$bad" ] || { echo "no SPDX-License-Identifier in the first five lines:"; echo "$bad"; return 1; }
}

shell_scripts() {
    # shellcheck disable=SC2046 # a list of files without blanks
    shellcheck $(ours '*.sh') tests/lab/lab .ci/run
}

sanity() {
    # ansible-test fetches a pip bootstrap from a host that an isolated network does not have; the interpreter
    # carries one. Its environments are kept in the user's cache.
    home=${XDG_CACHE_HOME:-$HOME/.cache}/isthmus/ansible-test
    mkdir -p "$home/.ansible/test/cache"
    cat > "$home/.ansible/test/cache/get_pip_24_2.py" <<'PIP'
import ensurepip, subprocess, sys
ensurepip.bootstrap()
subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip==24.2"])
PIP
    in_stage env -u ANSIBLE_CONFIG -u ANSIBLE_HOME HOME="$home" PATH="/usr/bin:$PATH" \
        ansible-test sanity --venv --python 3.11 --color no > build/sanity.log 2>&1 && return 0
    # The log is mostly pip's.
    grep -E '^(ERROR|FATAL|WARNING: (Rev|Skip))' build/sanity.log
    return 1
}

if [ "$mode" != slow ]; then
    gate "ruff check" ruff check --quiet .
    gate "ruff format" ruff format --check --quiet .
    gate "mypy" mypy
    gate "shellcheck" shell_scripts
    gate "licence headers" spdx
    gate "yamllint" yamllint --strict .
    if [ -f tests/tools/generate_inventory_docs.py ]; then
        gate "inventory docs" python tests/tools/generate_inventory_docs.py --check
    fi
fi

if [ "$mode" != quick ]; then
    python scripts/bundle.py stage || exit 1
    # ansible-test asks git which files there are, and would find the outer repository, which ignores build/.
    in_stage sh -c 'git init --quiet && echo /tests/output/ > .git/info/exclude && git add --all' || exit 1
    export ANSIBLE_COLLECTIONS_PATH="$PWD/build/stage"
    gate "ansible-lint" in_stage ansible-lint --offline --strict --profile production -c "$PWD/.ansible-lint"
    gate "ansible-doc" in_stage sh "$PWD/scripts/check-docs.sh"
    gate "antsibull-docs" in_stage antsibull-docs lint-collection-docs --plugin-docs --validate-collection-refs=all .
    if [ -d changelogs ]; then gate "changelog" in_stage antsibull-changelog lint; fi
    gate "ansible-test sanity" sanity
fi

if [ -n "$failed" ]; then
    echo "lint: failed:$failed"
    exit 1
fi
