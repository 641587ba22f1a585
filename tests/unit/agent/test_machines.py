# SPDX-License-Identifier: GPL-3.0-or-later
"""The small state machines: probes, health, drain."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.desired import health, reach
from isthmus_agent.desired.datapath import Backend, Frontend, Service
from isthmus_agent.desired.drain import DrainTracker

A, B = ("cloud", "a"), ("cloud", "b")


def probe(pattern: str) -> list[bool]:
    """`x` is a miss, `.` an answer; the verdict after each."""
    state, found = reach.ProbeState(), []
    for second, mark in enumerate(pattern):
        state = reach.step(state, None if mark == "x" else 0.001, float(second))
        found.append(state.up)
    return found


@pytest.mark.parametrize(
    ("pattern", "verdicts"),
    [
        ("...", "uuu"),
        ("xx.", "uuu"),
        ("xxx", "uud"),
        ("xx.xx", "uuuuu"),
        ("xxx.", "uudd"),
        ("xxx..", "uuddu"),
        ("xxx.x.", "uudddd"),
        ("xxx.x..", "uuddddu"),
    ],
)
def test_probe_hysteresis(pattern, verdicts):
    assert "".join("u" if up else "d" for up in probe(pattern)) == verdicts


@given(st.text("x.", max_size=40))
def test_a_verdict_changes_only_on_enough_in_a_row(pattern):
    verdicts = [True, *probe(pattern)]
    for index in range(1, len(verdicts)):
        if verdicts[index - 1] and not verdicts[index]:
            assert pattern[max(0, index - 3) : index] == "xxx"
        if not verdicts[index - 1] and verdicts[index]:
            assert pattern[max(0, index - 2) : index] == ".."


def test_times_of_change_and_of_the_last_proof():
    table = reach.ProbeTable()
    table.retarget([A])
    assert table.record(A, 0.002, 1.0) is True, "the first proof is news"
    assert table.record(A, 0.002, 2.0) is False
    assert [table.record(A, None, t) for t in (3.0, 4.0, 5.0)] == [False, False, True]
    assert (table.states[A].since, table.states[A].last_answer) == (5.0, 2.0)


def test_a_cluster_is_down_when_all_its_probed_nodes_are():
    table = reach.ProbeTable()
    table.retarget([A, B])
    for t in range(3):
        table.record(A, None, float(t))
        table.record(B, 0.001, float(t))
    assert table.view().down_clusters == frozenset()
    assert not table.view().reachable(A)
    assert table.view().reachable(("cloud", "never probed"))
    for t in range(3):
        table.record(B, None, float(t))
    assert table.view().down_clusters == {"cloud"}
    assert not table.view().reachable(("cloud", "never probed"))
    assert table.view().reachable(("edge", "never probed"))


def test_an_unknown_node_is_reachable_and_not_proven():
    view = reach.ProbeTable().view()
    assert view.reachable(A)
    assert view.reachable(None)
    assert not view.proven(A)


def test_retarget_keeps_what_is_known():
    table = reach.ProbeTable()
    table.retarget([A])
    for t in range(3):
        table.record(A, None, float(t))
    table.retarget([A, B])
    assert table.view().down == {A}
    table.retarget([B])
    assert table.view().down == frozenset()


def test_targets_are_bounded_and_spread_over_clusters():
    nodes = [("big", f"n{i}") for i in range(200)] + [("small", "n0"), ("own", "me")]
    addresses = {node: IPv4Address(i + 1) for i, node in enumerate(nodes)}
    found = reach.choose_targets(("own", "me"), nodes, addresses, limit=64)
    assert len(found) == 64
    assert ("small", "n0") in {target.node for target in found}
    assert ("own", "me") not in {target.node for target in found}
    other = reach.choose_targets(("own", "other"), nodes, addresses, limit=64)
    assert {t.node for t in found} != {t.node for t in other}, "observers together cover more"
    assert reach.choose_targets(("own", "me"), nodes, addresses, limit=64) == found


def test_witnesses_are_probed_beside_the_holders():
    nodes = [("own", f"n{i}") for i in range(5)] + [("far", f"n{i}") for i in range(5)]
    addresses = {node: IPv4Address(i + 1) for i, node in enumerate(nodes)}
    found = [target.node for target in reach.choose_targets(("own", "n0"), [("far", "n1")], addresses)]
    assert ("far", "n1") in found
    assert sum(1 for node in found if node[0] == "own") == 2
    assert len(found) == 5
    assert reach.choose_targets(("own", "n0"), [("own", "n0")], {("own", "n0"): IPv4Address(1)}) == ()


@pytest.mark.parametrize(
    ("pattern", "verdicts"),
    [
        ("..", "?r"),
        ("ff", "?n"),
        (".f.", "???"),
        ("..f.", "?rrr"),
        ("..ff", "?rrn"),
        ("..ff.", "?rrnn"),
        ("..ff..", "?rrnnr"),
    ],
)
def test_health_rise_and_fall(pattern, verdicts):
    state, found = health.HealthState(), ""
    for mark in pattern:
        state = health.step(state, mark == ".", rise=2, fall=2, reason="refused")
        found += {None: "?", True: "r", False: "n"}[state.ready]
    assert found == verdicts


def test_health_starts_from_the_last_reported_verdict():
    state = health.step(health.HealthState(ready=True), False, 2, 2, "refused")
    assert state.ready is True
    assert state.reason == "refused"


FRONT = Frontend(IPv4Address("10.111.0.10"), 80, 6)


def backend(n: int, node: str | None = None) -> Backend:
    return Backend(IPv4Address(f"10.102.0.{n}"), 8080, 6, 2, IPv4Address(node) if node else None)


def services(*backends: Backend, draining: tuple[Backend, ...] = ()) -> dict[Frontend, Service]:
    return {FRONT: Service("shop/web", backends, draining)}


def test_a_removed_backend_drains_and_then_its_sockets_end():
    tracker = DrainTracker(grace=30)
    tracker.apply(services(backend(2), backend(3)), 0.0)
    found, gone, deadline = tracker.apply(services(backend(2)), 10.0)
    assert found[FRONT] == Service("shop/web", (backend(2),), (backend(3),))
    assert (gone, deadline) == ((), 40.0)
    found, gone, deadline = tracker.apply(services(backend(2)), 39.9)
    assert gone == ()
    found, gone, deadline = tracker.apply(services(backend(2)), 40.0)
    assert found[FRONT].draining == ()
    assert (gone, deadline) == ((backend(3),), None)
    assert tracker.apply(services(backend(2)), 50.0)[1] == (), "once"


def test_a_backend_that_returns_in_time_is_not_drained():
    tracker = DrainTracker(grace=30)
    tracker.apply(services(backend(2), backend(3)), 0.0)
    tracker.apply(services(backend(2)), 10.0)
    found, gone, deadline = tracker.apply(services(backend(2), backend(3)), 20.0)
    assert found[FRONT].draining == ()
    assert (gone, deadline) == ((), None)
    assert tracker.apply(services(backend(2), backend(3)), 60.0)[1] == ()


def test_a_backend_held_in_reserve_is_not_removed():
    tracker = DrainTracker(grace=30)
    tracker.apply(services(backend(2), backend(3)), 0.0)
    for now in (10.0, 50.0):
        found, gone, _ = tracker.apply(services(backend(2), draining=(backend(3),)), now)
        assert found[FRONT].draining == (backend(3),)
        assert gone == ()


def test_a_backend_whose_node_becomes_known_is_the_same_backend():
    tracker = DrainTracker(grace=30)
    tracker.apply(services(backend(2)), 0.0)
    found, _, deadline = tracker.apply(services(backend(2, "198.18.2.11")), 1.0)
    assert found[FRONT].draining == ()
    assert deadline is None


def test_sockets_of_a_removed_service_end_unless_another_service_uses_the_backend():
    other = Frontend(IPv4Address("10.111.0.11"), 80, 6)
    tracker = DrainTracker(grace=30)
    both = {**services(backend(2)), other: Service("shop/web2", (backend(2), backend(3)))}
    tracker.apply(both, 0.0)
    assert set(tracker.apply(services(backend(2)), 1.0)[0]) == {FRONT}
    assert tracker.orphans == (backend(3),), "the next agent hears of it"
    found, gone, _ = tracker.apply(services(backend(2)), 31.0)
    assert gone == (backend(3),)
    assert (set(found), tracker.orphans) == ({FRONT}, ())
