#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# The tests, stage by stage, each with its seconds. A stage that fails does not keep the next from running. The slow
# gates run beside them and tell their result at the end.
# usage: scripts/test.sh [full]   (from make, with the environment's tools in PATH)
# `full` runs the tests marked slow as well and writes the result to docs/test-full.md.
set -u
cd "$(dirname "$0")/.." || exit
select='not slow'
[ "${1:-}" != full ] || select='slow or not slow'
summary=$(mktemp)
gates=
trap 'rm -f "$summary"; [ -z "$gates" ] || kill "$gates" 2> /dev/null' EXIT
trap 'exit 130' INT TERM
status=0

row() {
    [ "$2" = 0 ] || status=1
    printf '| %s | %s | %s | %s s |\n' "$1" "$([ "$2" = 0 ] && echo passed || echo FAILED)" "$3" "$4" >> "$summary"
}

stage() {
    name=$1
    shift
    printf '\n== %s\n' "$name"
    began=$(date +%s)
    log=build/test-$(echo "$name" | tr ' ' '-').log
    # The status of the command, not that of tee.
    { "$@"; echo $? > "$log.status"; } 2>&1 | tee "$log"
    code=$(cat "$log.status")
    rm -f "$log.status"
    line=$(sed -n -E 's/^=* ?([0-9]+ (passed|failed|skipped|error|deselected).*[^= ]) ?=*$/\1/p' "$log" | tail -n 1)
    # A line for each scenario of molecule's.
    line=${line:-$(sed -n -E 's/^([a-z]+) +: actions=.* failed=0.*/\1/p' "$log" | sort -u | xargs)}
    row "$name" "$code" "${line:-nothing ran}" $(($(date +%s) - began))
}

# Status 5, no test was collected, is no success either.
suite() {
    name=$1
    shift
    stage "$name" python -m pytest -m "$select" -o console_output_style=count --durations=15 --durations-min=5 "$@"
}

# With what the tests leave of the processors (SCHED_IDLE), so that no deadline of a test notices.
begin_gates() {
    gates_began=$(date +%s)
    chrt --idle 0 sh scripts/lint.sh slow > build/test-gates.log 2>&1 &
    gates=$!
}

end_gates() {
    printf '\n== slow gates\n'
    wait "$gates"
    code=$?
    gates=
    cat build/test-gates.log
    line=$(sed -n 's/^lint: failed:/failed:/p' build/test-gates.log)
    row "slow gates" "$code" "${line:-$(grep -c '^lint: .* ok ' build/test-gates.log) passed, beside the tests}" $(($(date +%s) - gates_began))
}

covered() { coverage report --format=total --include="$1" 2> /dev/null || echo '?'; }

mkdir -p build
whole=$(date +%s)
begin_gates
suite "units" tests/unit --numprocesses 2 --dist loadfile --cov --cov-report=
suite "eBPF" tests/bpf
if [ "${1:-}" = full ]; then suite "other kernels" tests/kernel; fi
suite "integration" tests/integration --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-append --cov-report=
suite "end to end" tests/e2e
if [ "${1:-}" = full ]; then stage "molecule" make --no-print-directory molecule; fi
suite "lab" tests/lab
end_gates

{
    echo "| Stage | Result | Tests | Time |"
    echo "| --- | --- | --- | --- |"
    cat "$summary"
    echo
    # In the tests' own process; what runs on the lab's machines, in etcd's or in the kernel is not counted.
    echo "Coverage by units and integration: $(covered 'agent/*') % of agent/, $(covered 'plugins/module_utils/*') % of plugins/module_utils/."
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
