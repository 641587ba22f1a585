#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# The tests, stage by stage, each with its seconds. A stage that fails does not keep the next from running.
# usage: scripts/test.sh [full]   (from make, with the environment's tools in PATH)
# `full` runs the tests marked slow as well and writes the result to docs/test-full.md.
set -u
cd "$(dirname "$0")/.." || exit
select='not slow'
[ "${1:-}" != full ] || select='slow or not slow'
summary=$(mktemp)
trap 'rm -f "$summary"' EXIT
status=0

stage() {
    name=$1
    shift
    printf '\n== %s\n' "$name"
    began=$(date +%s)
    log=build/test-$(echo "$name" | tr ' ' '-').log
    # The status of pytest, not that of tee.
    { python -m pytest -m "$select" -o console_output_style=count "$@"; echo $? > "$log.status"; } 2>&1 | tee "$log"
    code=$(cat "$log.status")
    rm -f "$log.status"
    # 5: no test was collected, which is no success either.
    [ "$code" = 0 ] || status=1
    line=$(grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|error|deselected)' "$log" | tail -n 1 | tr -d '=' | sed 's/^ *//;s/ *$//')
    printf '| %s | %s | %s | %s s |\n' "$name" "$([ "$code" = 0 ] && echo passed || echo FAILED)" "${line:-nothing ran}" $(($(date +%s) - began)) >> "$summary"
}

mkdir -p build
whole=$(date +%s)
stage "units" tests/unit --cov --cov-report=term:skip-covered --cov-report=
stage "eBPF" tests/bpf
stage "integration" tests/integration
stage "end to end" tests/e2e
stage "lab" tests/lab

{
    echo "| Stage | Result | Tests | Time |"
    echo "| --- | --- | --- | --- |"
    cat "$summary"
} > build/test-summary.md
printf '\n'
cat build/test-summary.md
printf '\n%s in %s s\n' "$([ $status = 0 ] && echo 'all passed' || echo 'FAILED')" $(($(date +%s) - whole))

if [ "${1:-}" = full ]; then
    {
        echo "# The last full run of the tests"
        echo
        echo "Written by \`make test-full\` on $(date --utc +%Y-%m-%d), commit $(git rev-parse --short HEAD), kernel $(uname -r), $(nproc) cores."
        echo
        cat build/test-summary.md
    } > docs/test-full.md
fi
exit $status
