#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# The tests, stage by stage, each with its seconds. A stage that fails does not keep the next from running. The slow
# gates run beside them and tell their result at the end.
# usage: scripts/test.sh [full [PART...]]   (from make, with the environment's tools in PATH)
# `full` runs the tests marked slow as well, or PARTs only, and writes each result to docs/test-full.md at once.
set -u
cd "$(dirname "$0")/.." || exit
select='not slow'
full=
only=
if [ "${1:-}" = full ]; then
    shift
    full=yes
    only=$*
    select='slow or not slow'
    # shellcheck disable=SC2086  # one word for each part
    python scripts/test_full.py known $only || exit
fi
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
    seconds=$(($(date +%s) - began))
    row "$name" "$code" "${line:-nothing ran}" $seconds
}

# What was asked for of a directory: all of it, or the parts that are there.
asked() {
    [ -n "$only" ] || { echo "$1"; return; }
    for part in $only; do
        case $part in "$1" | "$1"/*) printf '%s ' "$part" ;; esac
    done
}

# Status 5, no test was collected, is no success either.
suite() {
    name=$1
    places=$(asked "$2")
    shift 2
    [ -n "$places" ] || return 0
    results=build/test-$(echo "$name" | tr ' ' '-').xml
    rm -f "$results"
    # shellcheck disable=SC2086  # one word for each part
    stage "$name" python -m pytest -m "$select" -o console_output_style=count --durations=15 --durations-min=5 \
        --junit-xml="$results" "$@" $places
    [ -z "$full" ] || [ ! -s "$results" ] || python scripts/test_full.py pytest "$results" || status=1
}

scenarios() {
    for file in extensions/molecule/*/molecule.yml; do
        scenario=$(basename "$(dirname "$file")")
        case " $only " in "  " | *" molecule "* | *" molecule/$scenario "*) ;; *) continue ;; esac
        stage "molecule $scenario" make --no-print-directory molecule SCENARIO="$scenario"
        python scripts/test_full.py molecule "$scenario" "$code" "$seconds" || status=1
    done
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
[ -n "$only" ] || begin_gates
suite "units" tests/unit --numprocesses 2 --dist loadfile --cov --cov-report=
suite "eBPF" tests/bpf
[ -z "$full" ] || suite "other kernels" tests/kernel
suite "integration" tests/integration --numprocesses 2 --dist loadfile --no-loadscope-reorder --cov --cov-append --cov-report=
suite "end to end" tests/e2e
[ -z "$full" ] || scenarios
suite "lab" tests/lab
[ -n "$only" ] || end_gates

{
    echo "| Stage | Result | Tests | Time |"
    echo "| --- | --- | --- | --- |"
    cat "$summary"
    # In the tests' own process; what runs on the lab's machines, in etcd's or in the kernel is not counted.
    [ -n "$only" ] || printf '\n%s\n' "Coverage by units and integration: $(covered 'agent/*') % of agent/, $(covered 'plugins/module_utils/*') % of plugins/module_utils/."
} > build/test-summary.md
printf '\n'
cat build/test-summary.md
printf '\n%s in %s s\n' "$([ $status = 0 ] && echo 'all passed' || echo 'FAILED')" $(($(date +%s) - whole))

exit $status
