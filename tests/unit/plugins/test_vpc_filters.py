# SPDX-License-Identifier: GPL-3.0-or-later
"""Which VPCs a run sets and to what, what goes with the last hosts, and how drift is told."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.filter.vpc_drift import vpc_drift
from ansible_collections.isthmus.mesh.plugins.filter.vpc_due import vpc_due
from ansible_collections.isthmus.mesh.plugins.filter.vpc_gone import vpc_gone

KNOWN = ["a1", "b1", "b2", "c1"]
PLACE = {"provider": "aws", "network": "vpc-1"}
B: dict[str, Any] = {
    "site": "b",
    "owner": "e-b",
    "state": "present",
    "place": PLACE,
    "routes": [],
    "meanwhile": None,
    "hosts_of_site": ["b1", "b2"],
}
PEERING: dict[str, Any] = {"sites": ["b", "c"], "state": "present", "hosts_of_site": [["b1", "b2"], ["c1"]]}


@pytest.mark.parametrize(
    ("call", "run", "due"),
    [
        (B, ["b2"], True),
        (B, ["a1", "c1"], False),
        ({**B, "state": "absent", "hosts_of_site": []}, ["a1"], True),
        ({**B, "hosts_of_site": ["orphan"]}, ["a1"], True),
        ({**B, "hosts_of_site": ["orphan", "b1"]}, ["a1"], False),
        (PEERING, ["b1", "c1"], True),
        (PEERING, ["b1", "b2"], False),
        ({**PEERING, "hosts_of_site": []}, ["a1"], True),
    ],
)
def test_a_vpc_is_set_in_runs_that_have_its_hosts(call: dict[str, Any], run: list[str], due: bool) -> None:
    assert vpc_due([call], run, KNOWN) == ([call] if due else [])


def test_what_is_needed_meanwhile_is_there_before_and_gone_after() -> None:
    changing = {**B, "meanwhile": {"routes": ["old"]}}
    assert [call["routes"] for call in vpc_due([B, changing], KNOWN, KNOWN, moment="before")] == [[], ["old"]]
    assert vpc_due([B, changing], KNOWN, KNOWN, moment="after") == [changing]
    assert vpc_due([changing], KNOWN, KNOWN) == [changing]


def test_a_vpc_goes_with_its_last_host_and_a_peering_with_either_vpc() -> None:
    plan = {"networks": [B], "peerings": [PEERING]}
    assert vpc_gone(plan, ["b1", "a1"]) == {"networks": [], "peerings": [], "stays": {"b": ["b2"]}}
    gone = {"site": "b", "owner": "e-b", "place": PLACE, "state": "absent", "hosts_of_site": []}
    absent = {**PEERING, "state": "absent", "hosts_of_site": []}
    assert vpc_gone(plan, ["b1", "b2"]) == {"networks": [gone], "peerings": [absent], "stays": {}}
    assert vpc_gone(plan, ["c1"]) == {"networks": [], "peerings": [absent], "stays": {}}


def test_drift_is_told_by_what_it_is() -> None:
    def change(header: str, before: str, after: str) -> dict[str, str]:
        return {"before_header": header, "after_header": header, "before": before, "after": after}

    lost = {"table": "rtb-1", "destination": "10.1.0.0/28", "target": "eni-1", "reason": "blackhole"}
    result = {
        "vpc_call": B,
        "diff": [
            change("route 10.1.0.0/28 in rtb-1", "", "eni-1\n"),
            change("check of eni-1", "on\n", "off\n"),
            change("rule tcp/22 of isthmus-e-b", "0.0.0.0/0\n", ""),
        ],
        "blackholes": [{**lost, "owned": True}, {**lost, "destination": "10.9.0.0/16", "owned": False}],
    }
    refused = {"vpc_call": PEERING, "msg": "nothing was changed. It is somebody else's."}
    assert vpc_drift([{"vpc_call": B, "diff": [], "blackholes": []}]) == []
    assert vpc_drift([result, refused]) == [
        "site b: route 10.1.0.0/28 in rtb-1 is missing (eni-1).",
        "site b: check of eni-1 is on, and should be off.",
        "site b: rule tcp/22 of isthmus-e-b is 0.0.0.0/0, and should be gone.",
        "site b: route 10.1.0.0/28 in rtb-1 to eni-1 leads nowhere: blackhole.",
        "sites b and c: nothing was changed. It is somebody else's.",
    ]
