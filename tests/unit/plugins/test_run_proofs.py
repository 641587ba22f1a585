# SPDX-License-Identifier: GPL-3.0-or-later
"""What the proofs of hosts say of a pair of sites that chooses its way, and which step the hosts take after them."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.filter.run_batches import run_batches
from ansible_collections.isthmus.mesh.plugins.filter.run_proofs import run_proofs
from ansible_collections.isthmus.mesh.plugins.filter.tried_hosts import tried_hosts
from unit.mesh.estates import estate, hosts, model, planned

CLOUD, ONPREM = ["c1"], ["o1", "o2", "o3"]
NOBODY = ["!all"]


def plan_of(running: bool = True) -> dict[str, Any]:
    """As the action gives it to the playbook: cloud and onprem, and the hosts of onprem, are to be tried."""
    before = planned(model()) if running else None
    found = planned(model({**estate(), "routing": "auto"}, hosts()), before)
    return {
        "specs": found.specs,
        "steps": [],
        "trials": found.trials,
        "proofs": [],
        "in_cluster": {},
        "record": found.record,
        "clusters": {"new": [], "answering": ["cloud", "onprem"]},
        "serial": ["100%"],
    }


def unreached(name: str, site: str = "onprem", sure: bool = True) -> dict[str, Any]:
    return {"cluster": site, "name": name, "site": site, "why": "no answer", "sure": sure}


def members(plan: dict[str, Any], step: int = 1, **told: Any) -> list[dict[str, Any]]:
    """Hosts that did the step before and proved it; `told` has by host what it did not reach, or what was registered,
    None for a host that did not do that step."""
    found = []
    for name in [*CLOUD, *ONPREM]:
        one: dict[str, Any] = {"inventory_hostname": name, "__plan_result": plan, "group_names": []}
        answer = told.get(name, [])
        if answer is not None:
            one["group_names"] = [f"__site_done_{step - 1}"]
            one["__site_proof" if step else "__site_still"] = (
                answer if isinstance(answer, dict) else {"problems": [], "unreached": answer}
            )
        found.append(one)
    return found


def verdicts(given: list[dict[str, Any]], step: int = 1) -> dict[str, Any]:
    *before, last = run_proofs(given, step)
    assert len(before) == step
    return {name: (one["works"], one["hosts"], one["why"]) for name, one in last.items()}


def test_whom_each_host_tries_to_reach() -> None:
    plan = plan_of()
    assert [one["name"] for one in tried_hosts(plan, "c1", 1)] == ONPREM
    assert [one["name"] for one in tried_hosts(plan, "o1", 1)] == ["c1", "o2", "o3"]
    assert tried_hosts(plan, "o1", 1)[0] == {"name": "c1", "cluster": "cloud", "mesh4": "10.102.0.1"}
    assert tried_hosts(plan, "o1") == [] == tried_hosts(plan, "stranger", 1)


WORKS = (True, [], "")


@pytest.mark.parametrize(
    ("told", "between", "inside"),
    [
        ({}, WORKS, WORKS),
        ({"o1": [unreached("c1", "cloud")]}, (False, ["o1", "c1"], "no answer"), WORKS),
        ({"c1": [unreached("o2")]}, (False, ["c1", "o2"], "no answer"), WORKS),
        ({"o1": [unreached("o2")]}, WORKS, (False, ["o1", "o2"], "no answer")),
        (
            {"c1": [unreached("o2", sure=False)]},
            (None, [], "c1 reaches o2 neither natively nor through the tunnel: no answer"),
            WORKS,
        ),
        (
            {"c1": [unreached("o2", sure=False)], "o1": [unreached("c1", "cloud")]},
            (False, ["o1", "c1"], "no answer"),
            WORKS,
        ),
        ({"c1": {"unreachable": True}}, (None, [], "c1 did not take part in the proof"), WORKS),
        ({"c1": {"unreached": None}}, (None, [], "c1 did not take part in the proof"), WORKS),
        (
            {"o3": None, "o1": [unreached("o2")]},
            (None, [], "o3 did not take part in the proof"),
            (None, [], "o3 did not take part in the proof"),
        ),
    ],
    ids=[
        *("all reach all", "one does not", "the other way round", "within a site", "nobody knows", "one knows"),
        *("a silent host", "a host without an agent", "a host that is behind keeps its pairs"),
    ],
)
def test_what_a_proof_says_of_each_pair(told: Any, between: Any, inside: Any) -> None:
    assert verdicts(members(plan_of(), **told)) == {"cloud onprem": between, "onprem onprem": inside}


def test_before_the_first_step_pairs_with_hosts_that_are_not_in_the_run_are_left_alone() -> None:
    plan = {**plan_of(), "trials": (plan_of()["trials"][1], (), (), ())}
    assert set(verdicts(members(plan, 0), 0)) == {"cloud onprem", "onprem onprem"}
    here = members(plan, 0)
    del here[0]["__plan_result"]
    assert set(verdicts(here, 0)) == {"onprem onprem"}


def test_proofs_are_kept_in_their_order_also_when_one_was_not_made() -> None:
    plan = plan_of()
    first = run_proofs(members(plan), 1)
    assert first[0] == {}
    later = {**plan, "proofs": first, "trials": ((), (), plan["trials"][1], ())}
    found = run_proofs(members(later, 2), 2)
    assert (found[:2], len(found)) == (first, 3)


def test_hosts_prove_and_plan_again_when_they_have_done_the_step_before() -> None:
    plan = plan_of()
    found = run_batches(members(plan), step=1)
    assert (found["proving"], sorted(found["replanned"])) == ([*CLOUD, *ONPREM], [*CLOUD, *ONPREM])
    assert found["one_by_one"] == NOBODY, "the plan has no step yet"
    behind = run_batches(members(plan, c1=None), step=1)
    assert (behind["proving"], sorted(behind["replanned"])) == (ONPREM, [*CLOUD, *ONPREM])
    nobody = run_batches(members(plan, **dict.fromkeys([*CLOUD, *ONPREM])), step=1)
    assert (nobody["proving"], nobody["replanned"]) == (NOBODY, NOBODY), "as in a check"
    failed = members(plan)
    failed[0]["group_names"].append("__site_failed")
    assert (run_batches(failed, step=1)["proving"], run_batches(failed, step=1)["replanned"]) == (NOBODY, NOBODY)


def test_a_step_goes_by_the_newest_plan_and_waits_only_for_whom_it_concerns() -> None:
    old = plan_of()
    step = {"waits": ["o1", "o2", "o3"], "proven": ["o1", "o2", "o3"]}
    new = {**old, "proofs": [{}, {}], "steps": [step]}
    given = members(new, c1=None)
    given[0]["__plan_result"] = old  # it fell silent before the run planned again
    assert run_batches(given, step=1)["one_by_one"] == NOBODY
    for one in given[1:]:
        one["group_names"].append("__site_proven_1")
    assert sorted(run_batches(given, step=1)["one_by_one"]) == [*CLOUD, *ONPREM]
