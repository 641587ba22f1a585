# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure part of vpc_routes: aggregation, difference, quota, claims."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

from ansible_collections.isthmus.mesh.plugins.module_utils.vpc import aws, azure, google, plan
from hypothesis import given
from hypothesis import strategies as st

# Prefixes inside one /24, so that they touch each other often.
PREFIXES = st.builds(
    lambda number, length: IPv4Network((0x0A000000 | (number & 0xFF), length), strict=False),
    st.integers(0, 255),
    st.integers(26, 32),
)
TABLES = st.dictionaries(PREFIXES, st.sampled_from("abc"), max_size=24)


def way(routes: dict[IPv4Network, Any], address: IPv4Address) -> Any:
    """Where a router would send it: the longest prefix wins."""
    best = max((one for one in routes if address in one), key=lambda one: one.prefixlen, default=None)
    return routes.get(best) if best else None


ADDRESSES = [IPv4Address(0x0A000000 + number) for number in range(256)]


@given(TABLES)
def test_aggregation_leads_every_address_where_it_was_led(routes: dict[IPv4Network, str]) -> None:
    fewer = plan.aggregate(routes)
    assert len(fewer) <= len(routes)
    assert [way(fewer, one) for one in ADDRESSES] == [way(routes, one) for one in ADDRESSES]
    assert plan.aggregate(fewer) == fewer


@given(TABLES, st.lists(PREFIXES, max_size=4), st.integers(0, 8))
def test_coarser_routes_keep_every_way_and_take_nobody_elses(
    routes: dict[IPv4Network, str], others: list[IPv4Network], count: int
) -> None:
    routes = {one: where for one, where in routes.items() if not any(one.overlaps(other) for other in others)}
    coarse = plan.coarser(routes, others, count)
    for address in ADDRESSES:
        before = way(routes, address)
        if before is not None:
            assert way(coarse, address) == before
        if any(address in other for other in others):
            assert way(coarse, address) is None


def test_pods_of_a_host_are_one_route() -> None:
    pods = {IPv4Network(f"10.0.0.{number}"): "one" for number in range(16)}
    assert plan.aggregate(pods) == {IPv4Network("10.0.0.0/28"): "one"}
    # A pod that is elsewhere keeps its own.
    moved = {**pods, IPv4Network("10.0.0.0/28"): "one", IPv4Network("10.0.0.5"): "two"}
    assert plan.aggregate(moved) == {IPv4Network("10.0.0.0/28"): "one", IPv4Network("10.0.0.5"): "two"}


def table(*routes: plan.Found, limit: int | None = None) -> plan.Table:
    return plan.Table("rtb-1", list(routes), limit)


def found(destination: str, target: str, owned: bool = True, **more: Any) -> plan.Found:
    return plan.Found(destination, target, owned, more.pop("key", destination), **more)


def test_a_difference() -> None:
    there = table(
        found("10.1.0.0/24", "one"),
        found("10.1.1.0/24", "gone"),
        found("10.1.2.0/24", "two"),
        found("10.1.3.0/24", "lost"),
        found("10.9.0.0/16", "theirs", owned=False),
    )
    wanted = [plan.Route(f"10.1.{number}.0/24", "one") for number in (0, 1, 4)]
    change = plan.difference(there, wanted, keep=["10.1.3.0/24"])
    assert change.add == [plan.Route("10.1.4.0/24", "one")]
    assert [(one.target, route.target) for one, route in change.replace] == [("gone", "one")]
    assert [one.destination for one in change.remove] == ["10.1.2.0/24"]
    assert change.problems == change.warnings == []


def test_somebody_elses_route_is_refused_borrowed_or_told() -> None:
    there = table(
        found("10.1.0.0/24", "theirs", owned=False, origin="route blue"),
        found("10.1.1.0/24", "one", owned=False),
        found("10.1.2.128/25", "theirs", owned=False),
        found("0.0.0.0/0", "internet", owned=False),
    )
    change = plan.difference(there, [plan.Route("10.1.0.0/24", "one"), plan.Route("10.1.1.0/24", "one")])
    assert len(change.problems) == 1
    assert "10.1.0.0/24 is somebody else's route to theirs (route blue)" in change.problems[0]
    assert [one.destination for one in change.borrowed] == ["10.1.1.0/24"]
    change = plan.difference(there, [plan.Route("10.1.2.0/24", "one")])
    assert change.problems == []
    assert "somebody else's route 10.1.2.128/25 to theirs takes a part of 10.1.2.0/24" in change.warnings[0]
    assert change.add == [plan.Route("10.1.2.0/24", "one")]


def test_one_of_two_of_ours_is_left_over() -> None:
    there = table(found("10.1.0.0/24", "old", key="a"), found("10.1.0.0/24", "one", key="b"))
    change = plan.difference(there, [plan.Route("10.1.0.0/24", "one")])
    assert ([one.key for one in change.remove], change.replace, change.add) == (["a"], [], [])


def test_the_quota_counts_what_goes_and_not_what_is_propagated() -> None:
    there = table(
        found("10.1.0.0/24", "one"),
        found("10.8.0.0/16", "theirs", owned=False, counts=False),
        limit=2,
    )
    wanted = [plan.Route("10.1.1.0/24", "one"), plan.Route("10.1.2.0/24", "two")]
    assert plan.difference(there, wanted).problems == []
    (problem,) = plan.difference(there, [*wanted, plan.Route("10.1.3.0/24", "one")]).problems
    assert problem.startswith("rtb-1 holds 2 routes, the plan needs 3 (0 of others).")
    # 10.1.1.0/24 and 10.1.3.0/24 have 10.1.2.0/24, of another host, between them.
    assert "No two of them can be one route" in problem


def test_what_there_is_no_room_beside_goes_first() -> None:
    routes = [found("10.1.0.0/25", "one"), found("10.2.0.0/24", "two"), found("10.3.0.0/24", "three")]
    wanted = [plan.Route("10.1.0.0/24", "one"), plan.Route("10.3.0.0/24", "four")]
    for limit, beside, first in (
        (4, False, []),
        (3, False, ["10.2.0.0/24"]),
        (5, True, []),
        (4, True, ["10.2.0.0/24"]),
        (3, True, ["10.2.0.0/24", "10.1.0.0/25"]),
    ):
        change = plan.difference(table(*routes, limit=limit), wanted, beside=beside)
        assert ([one.destination for one in change.first], change.problems) == (first, [])
        # What nothing leads to any more is nobody's loss.
        assert [("10.1.0.0/25 go first" in text, "10.2.0.0/24" in text) for text in change.warnings] == (
            [(True, False)] if "10.1.0.0/25" in first else []
        )
    full = table(found("10.3.0.0/24", "three"), limit=1)
    change = plan.difference(full, wanted[1:], beside=True)
    assert [one.target for one in change.first] == ["three"]
    assert "rtb-1 holds 1 routes, and new ones beside the old ones would be 2: 10.3.0.0/24 go" in change.warnings[0]
    assert plan.difference(full, wanted[1:]).first == []


def test_a_large_plan_is_made_smaller() -> None:
    routes = [plan.Route(f"10.{number // 64}.{number % 64 * 4}.0/24", f"host-{number // 64}") for number in range(200)]
    (problem,) = plan.difference(table(found("0.0.0.0/0", "igw", owned=False), limit=50), routes).problems
    assert "holds 50 routes, the plan needs 201 (1 of others). Aggregate like this: " in problem
    assert "too many" not in problem


PARAMS: dict[str, Any] = {"owner": "lab", "routes": [], "rules": [], "hosts": []}


def test_options_are_read_with_all_that_is_wrong_with_them() -> None:
    _wishes, _rules, _hosts, problems = plan.read(
        {
            "owner": "lab",
            "hosts": ["here"],
            "routes": [
                {"destination": "10.0.0.1/24", "via": "192.0.2.1"},
                {"destination": "10.1.0.0/24", "via": "192.0.2.1"},
                {"destination": "10.1.0.0/24", "via": "192.0.2.2"},
                {"destination": "fd00::/64", "via": "192.0.2.x"},
            ],
            "rules": [
                {"protocol": "tcp", "port": 0, "sources": ["any"]},
                {"protocol": "tcp", "port": 22, "sources": []},
                {"protocol": "all", "port": 53, "sources": ["192.0.2.1"]},
                {"protocol": "all", "port": None, "sources": ["192.0.2.1"]},
            ],
        }
    )
    assert [problem.split(":")[0] for problem in problems] == [
        "routes[0].destination",
        "routes[2] and routes[1] send 10.1.0.0/24 to two places",
        "routes[3].destination",
        "routes[3].via",
        "rules[0].port",
        "rules[0].sources",
        "rules[1].sources",
        "rules[2].port",
        "hosts[0]",
    ]


def test_hosts_are_where_routes_lead_unless_they_are_named() -> None:
    routes = [{"destination": "10.1.0.0/24", "via": "192.0.2.2"}, {"destination": "10.2.0.0/24", "gateway": "vgw-1"}]
    wishes, _rules, hosts, problems = plan.read({**PARAMS, "routes": routes})
    assert (hosts, problems) == (["192.0.2.2"], [])
    assert [str(wish.hop) for wish in wishes] == ["192.0.2.2", "vgw-1"]
    assert plan.read({**PARAMS, "routes": routes, "hosts": ["192.0.2.9"]})[2] == ["192.0.2.9"]


def test_sources_of_a_port_are_told_once() -> None:
    rules = [plan.Rule("tcp", 2379, source) for source in ("192.0.2.0/25", "192.0.2.128/25", "192.0.2.7/32")]
    assert plan.by_port([*rules, plan.Rule("udp", 8472, "0.0.0.0/0")]) == {
        ("tcp", 2379): ["192.0.2.0/24"],
        ("udp", 8472): ["0.0.0.0/0"],
    }


def test_an_owner_is_a_label() -> None:
    assert plan.owner_problem("lab-cloud") == ""
    for bad in ("", "Lab", "-lab", "lab-", "1lab", "a" * 25, "lab cloud", "lab\n"):
        assert plan.owner_problem(bad) != ""


@given(st.sets(PREFIXES.map(str), max_size=200))
def test_claims_are_read_as_they_were_written(destinations: set[str]) -> None:
    tags = aws.claims("lab", destinations)
    assert aws.claimed("lab", {**tags, "Name": "x", "isthmus:lab-cloud:0": "10.9.0.0/16"}) == destinations
    assert all(len(value) <= 256 for value in tags.values())


def test_names_fit_and_belong_to_one_owner() -> None:
    longest = google.route_name("a" * 24, plan.Route("255.255.255.255/32", "192.0.2.1"))
    assert len(longest) <= 63
    assert azure._route_owned("lab", "isthmus-lab-10-1-0-0-24")
    assert not azure._route_owned("lab", "isthmus-lab-cloud-10-1-0-0-24")
    assert not azure._route_owned("lab", "isthmus-lab-1-10-1-0-0-24")
