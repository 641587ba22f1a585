# SPDX-License-Identifier: GPL-3.0-or-later
"""How packets go between sites in the inventory: what each pair uses, in which steps it changes, what routers need."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import permutations, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isthmus_mesh import matrix, openings, stages
from isthmus_mesh.encryption import Stage, pair, pairs
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import RecordError, merge
from isthmus_mesh.routing import Routing
from isthmus_mesh.spec import NodeSpec
from unit.mesh.estates import NOW, VERSION, estate, hosts, model, planned

ON = {"routing": "native"}
SITES = {"cloud": "cloud", "onprem": "onprem"}


def changed(previous: Plan | None = None, more: Any = None, **keys: Any) -> Plan:
    """The plan of an inventory with other keys of the estate, `more` hosts, after `previous`."""
    return planned(model({**estate(), **keys}, {**hosts(), **(more or {})}), previous)


def after(found: Plan, number: int) -> Plan:
    """As the record stands when a step was begun: 0 is the plan's own."""
    return Plan(**{**found.__dict__, "record": found.record if number == 0 else found.steps[number - 1].record})


def native(specs: Any) -> dict[str, Any]:
    return {host: spec.get("native", {}).get("stages", {}) for host, spec in specs.items()}


def test_an_estate_that_asks_nothing_is_as_it_was() -> None:
    plain, said = planned(model()), changed(routing="tunnel", sites={"onprem": {"routing": "tunnel"}, "cloud": {}})
    assert (said.specs, said.record) == (plain.specs, plain.record)
    assert "routing" not in said.record["roster"]
    assert not any("native" in spec for spec in said.specs.values())
    assert (said.steps, said.native, said.routes) == ((), {}, ())


@pytest.mark.parametrize(
    ("one", "other", "inside_one", "between"),
    [
        ("tunnel", "tunnel", "tunnel", "tunnel"),
        ("native", "native", "native", "native"),
        ("hybrid", "hybrid", "native", "tunnel"),
        ("native", "hybrid", "native", "tunnel"),
        ("hybrid", "tunnel", "native", "tunnel"),
        ("native", "tunnel", "native", None),
        ("tunnel", "native", "tunnel", None),
    ],
)
def test_what_two_sites_use(one: str, other: str, inside_one: str, between: str | None) -> None:
    for routing in (Routing("tunnel", {"a": one, "b": other}), Routing(one, {"b": other})):
        assert routing.of(("a", "a")) == inside_one
        assert routing.of(("a", "b")) == between
    said = Routing("tunnel", {"a": one, "b": other}, {("a", "b"): "native", ("a", "a"): "tunnel"})
    assert (said.of(("a", "b")), said.of(("a", "a"))) == ("native", "tunnel")


def test_sides_that_differ_are_refused_until_the_pair_is_said() -> None:
    keys: dict[str, Any] = {"sites": {"onprem": {"routing": "native"}, "cloud": {}}}
    with pytest.raises(ModelError, match="the sides of cloud and onprem differ"):
        changed(**keys)
    found = changed(**keys, site_pairs=[{"sites": ["cloud", "onprem"], "routing": "tunnel"}])
    assert native(found.specs) == {"c1": {}, **{name: {"onprem": "demands"} for name in ("o1", "o2", "o3")}}


def test_hosts_that_cannot_be_reached_natively_are_named() -> None:
    more = {"x1": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.9", "isthmus_advertise": "192.0.2.7"}}
    with pytest.raises(ModelError, match="x1 would be reached natively and have another isthmus_advertise"):
        changed(more=more, **ON)
    assert changed(more=more).specs


KUBERNETES = {
    "api_server": "https://192.0.2.9:6443",
    "pod_ranges": ["10.244.0.0/16"],
    "service_range": "10.96.0.0/16",
}
NODES = {
    "c1": {**hosts()["c1"], "isthmus_kubernetes_node": False},
    "x1": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.9"},
    "x2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.10"},
}


def with_nodes(previous: Plan | None = None, more: Any = None, pods: Any = None, **keys: Any) -> Plan:
    """As `changed`, with cloud a Kubernetes cluster that has the nodes x1 and x2; `pods` are their ranges."""
    clusters = estate()["clusters"]
    clusters["cloud"]["kubernetes"] = KUBERNETES
    wanted = model({**estate(), "clusters": clusters, **keys}, {**hosts(), **NODES, **(more or {})})
    record = merge([{"cluster": "onprem", "documents": previous.record}] if previous else [])
    return plan(wanted, record, NOW, VERSION, pods=pods)


DEALT = {"x1": ["10.244.1.0/24"], "x2": ["10.244.2.0/24"]}


def test_routers_are_told_of_pods_when_kubernetes_has_said_where_they_are() -> None:
    first = with_nodes(**ON)
    assert (first.routed, first.warnings) == (("x1", "x2"), ()), "Kubernetes was not asked yet"
    (words,) = with_nodes(**ON, pods={"x1": DEALT["x1"]}).warnings
    assert words.startswith("which of 10.244.0.0/16 are pods' ranges on x2 (cluster cloud) is not known, so that")
    found = with_nodes(**ON, pods=DEALT)
    assert found.warnings == ()
    assert found.record["clusters/cloud"]["hosts"]["x2"]["pod_cidrs"] == ["10.244.2.0/24"]
    told = {(one["site"], one["to"]): one for one in found.routes}
    assert told["cloud", "10.244.1.0/24"]["via"] == "198.18.2.9"
    assert (
        told["cloud", "10.244.2.0/24"]["why"] == "pods on x2, for packets from onprem, hosts of cloud on other subnets"
    )
    # All nodes are at one site: a node that comes is in the same range.
    assert told["onprem", "10.244.0.0/16"]["like"] == ["198.18.2.9", "198.18.2.10"]
    assert not any(one["to"].startswith("10.244") for one in first.routes if one["site"] == "cloud")
    assert told["onprem", "10.244.0.0/16"] in first.routes, "known from the inventory"
    # A firewall lets all pods in, whichever node they are on; routers know those of nodes.
    for dealt, ranges in ((False, {"10.244.0.0/16"}), (True, {"10.244.1.0/24", "10.244.2.0/24"})):
        sources = openings.native_sources(found.specs["o1"], found.record, outside=True, dealt=dealt)
        assert {text for text in sources if text.startswith("10.244")} == ranges
    # What was found stays, also where Kubernetes is not asked.
    again = with_nodes(found, **ON, pods={})
    assert (again.record, again.routes, again.warnings) == (found.record, found.routes, ())


def test_of_a_cluster_at_several_sites_routers_elsewhere_get_its_nodes_one_by_one() -> None:
    more = {"x2": {**NODES["x2"], "isthmus_site": "edge", "ansible_host": "198.18.3.9"}}
    found = with_nodes(**ON, more=more, pods=DEALT, sites={"onprem": {}, "cloud": {}, "edge": {}})
    like = {one["to"]: one["like"] for one in found.routes if one["site"] == "onprem" and one["via"] is None}
    assert (like["10.244.1.0/24"], like["10.244.2.0/24"]) == (["198.18.2.9"], ["198.18.3.9"])
    assert "10.244.0.0/16" not in like


def test_pods_of_nodes_that_no_network_leads_to_are_not_asked_for() -> None:
    for keys in ({}, INSIDE):
        found = with_nodes(**keys, pods={})
        assert (found.routed, found.warnings) == ((), ()), keys
        assert not any(one["to"].startswith("10.244") for one in found.routes)
    hybrid = with_nodes(routing="hybrid")
    assert hybrid.routed == ("x1", "x2"), "hosts of the site may be on several subnets"
    assert {one["site"] for one in with_nodes(routing="hybrid", pods=DEALT).routes if "10.244" in one["to"]} == {
        "cloud"
    }


def test_nodes_are_turned_to_native_in_clear_and_back_in_steps() -> None:
    found = with_nodes(with_nodes(), **ON, pods=DEALT)
    assert [bool(step.proven) for step in found.steps] == [True, True]
    assert found.specs["x1"]["native"]["stages"]["onprem"] == "accepts"
    back = with_nodes(after(found, 2))
    assert [step.specs["x1"].get("native", {}).get("stages", {}) for step in back.steps] == [
        {"cloud": "accepts", "onprem": "accepts"},
        {},
    ]
    assert back.routed == ("x1", "x2"), "until it is over"


@pytest.mark.parametrize("ranges", ["10.244.1.0/24", ["nonsense"], {"10.244.1.0/24": True}])
def test_a_record_with_other_ranges_of_pods_is_refused(ranges: Any) -> None:
    record = with_nodes(**ON, pods=DEALT).record
    record["clusters/cloud"]["hosts"]["x1"]["pod_cidrs"] = ranges
    with pytest.raises(RecordError, match="pod_cidrs"):
        merge([{"cluster": "onprem", "documents": record}])


def test_kubernetes_nodes_are_native_inside_wireguard_and_firewalls_let_their_pods_in() -> None:
    found = with_nodes(**INSIDE)
    stages = {"cloud": "demands", "onprem": "demands"}
    assert {host: one["native"]["stages"] for host, one in found.specs.items()} == dict.fromkeys(found.specs, stages)
    assert found.specs["x1"]["node"]["kubernetes_node"] == "x1"
    assert found.routes == ()
    for host in ("o1", "c1", "x1"):
        sources = openings.native_sources(found.specs[host], found.record)
        assert "10.244.0.0/16" in sources, host
        assert openings.native_sources(found.specs[host], found.record, outside=True) == []
    here = {"sites": ["cloud", "cloud"], "encryption": "none"}
    clear = with_nodes(**INSIDE, site_pairs=[here])
    assert (clear.specs["x1"]["native"]["stages"], clear.routed) == (stages, ("x1", "x2"))
    tunnel = with_nodes(**INSIDE, site_pairs=[{**here, "routing": "tunnel"}])
    assert tunnel.specs["x1"]["native"]["stages"] == {"onprem": "demands"}


def test_a_new_estate_is_native_from_the_first_packet() -> None:
    found = changed(**ON)
    assert found.steps == ()
    assert found.record["roster"]["routing"] == {"all": "demands", "pairs": {}}
    stages = {"cloud": "demands", "onprem": "demands"}
    assert [spec["native"] for spec in found.specs.values()] == [{"sites": SITES, "stages": stages}] * 4
    again = changed(found, **ON)
    assert (again.record, again.specs, again.steps) == (found.record, found.specs, ())


def test_a_running_estate_goes_there_in_three_steps_and_back() -> None:
    found = changed(planned(model()), **ON)
    assert [bool(step.proven) for step in found.steps] == [True, True]
    assert found.steps[0].waits == ("c1", "o1", "o2", "o3")
    records = [found.record, *(step.record for step in found.steps)]
    assert [record["roster"]["routing"]["all"] for record in records] == ["accepts", "sends", "demands"]
    assert native(found.steps[0].specs)["c1"] == {"cloud": "sends", "onprem": "sends"}
    NodeSpec.from_dict(found.steps[0].specs["c1"])
    assert found.steps[1].specs == changed(after(found, 2), **ON).specs
    back = changed(after(found, 2))
    assert [bool(step.proven) for step in back.steps] == [False, False]
    stages = [record["roster"].get("routing") for record in (back.record, *(step.record for step in back.steps))]
    assert stages == [{"all": "sends", "pairs": {}}, {"all": "accepts", "pairs": {}}, None]
    assert back.steps[1].specs == planned(model()).specs


def test_a_run_that_was_interrupted_completes_the_step_before_the_next() -> None:
    found = changed(planned(model()), **ON)
    again = changed(after(found, 0), **ON)
    assert (again.record, again.specs) == (found.record, found.specs)
    given_up = changed(after(found, 1))
    assert given_up.record["roster"]["routing"] == {"all": "sends", "pairs": {}}
    assert len(given_up.steps) == 2


def sent(at: tuple[Stage, Stage]) -> tuple[bool, bool]:
    """Whether what a host at stages of (encryption, native routing) sends is (encrypted, native), as the agent does."""
    return at[0] >= Stage.SENDS, at[1] >= Stage.SENDS and at[0] is not Stage.SENDS


def understood(sender: tuple[Stage, Stage], receiver: tuple[Stage, Stage]) -> bool:
    """Whether what a host at stages of (encryption, native routing) sends, another takes, as the agent does it."""
    encrypted, native_packets = sent(sender)
    if native_packets:
        return receiver[1] > Stage.PLAIN and (receiver[0] is Stage.DEMANDS) is encrypted
    receiver_native_only = receiver[1] is Stage.DEMANDS and receiver[0] is not Stage.SENDS
    taken = receiver[0] > Stage.PLAIN if encrypted else receiver[0] is not Stage.DEMANDS
    return taken and not receiver_native_only


def is_inside(at: tuple[Stage, Stage]) -> bool:
    return at[0] is Stage.DEMANDS and at[1] is not Stage.PLAIN


INSIDE = {"encryption": "wireguard", **ON}
WAYS = ({}, {"encryption": "wireguard"}, ON, INSIDE)


@given(st.lists(st.tuples(st.sampled_from(WAYS), st.integers(0, 5)), min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_no_run_and_no_interruption_cuts_neighbouring_steps_off(runs: list[tuple[dict[str, str], int]]) -> None:
    """Runs of changing inventories, each interrupted after a step: hosts of one step and of the next understand each
    other in both respects."""
    found = planned(model())
    pair = ("cloud", "onprem")

    def at(record: Any) -> tuple[Stage, Stage]:
        documents = [record["roster"].get(key) for key in ("encryption", "routing")]
        words = [one["pairs"].get(" ".join(pair), one["all"]) if one else "plain" for one in documents]
        return Stage[words[0].upper()], Stage[words[1].upper()]

    before = at(found.record)
    for keys, stop in runs:
        found = changed(found, **keys)
        records = [found.record, *(step.record for step in found.steps)][: stop + 1]
        for record in records:
            now = at(record)
            assert understood(before, now), (before, now)
            assert understood(now, before), (now, before)
            if is_inside(before) or is_inside(now):
                assert before[0] is now[0] is Stage.DEMANDS, "nothing in clear"
            before = now
        found = after(found, len(records) - 1)


def at_each(found: Plan, pair: str = "cloud onprem") -> list[tuple[str, str]]:
    """Stages of (encryption, native routing) of a pair at each step of a run."""

    def word(roster: Any, key: str) -> str:
        document = roster.get(key)
        return str(document["pairs"].get(pair, document["all"])) if document else "plain"

    rosters = [record["roster"] for record in (found.record, *(step.record for step in found.steps))]
    return [(word(roster, "encryption"), word(roster, "routing")) for roster in rosters]


TUNNEL: dict[str, str] = {}
ENCRYPTED = {"encryption": "wireguard"}
INTO_WIREGUARD = [("demands", "accepts"), ("demands", "sends"), ("demands", "demands")]
OUT_OF_IT = [("demands", "sends"), ("demands", "accepts"), ("demands", "plain")]
ENCRYPTING = [("accepts", "plain"), ("sends", "plain"), ("demands", "plain")]
DECRYPTING = [("sends", "plain"), ("accepts", "plain"), ("plain", "plain")]


@pytest.mark.parametrize(
    ("before", "wanted", "steps"),
    [
        (TUNNEL, INSIDE, ENCRYPTING + INTO_WIREGUARD),
        (ENCRYPTED, INSIDE, INTO_WIREGUARD),
        (ON, INSIDE, [("accepts", "sends"), ("sends", "accepts"), ("demands", "plain"), *INTO_WIREGUARD]),
        (INSIDE, ENCRYPTED, OUT_OF_IT),
        (INSIDE, TUNNEL, OUT_OF_IT + DECRYPTING),
        (INSIDE, ON, [*OUT_OF_IT, ("sends", "accepts"), ("accepts", "sends"), ("plain", "demands")]),
    ],
)
def test_native_inside_wireguard_is_turned_on_and_off_in_turn_with_encryption(
    before: dict[str, str], wanted: dict[str, str], steps: list[tuple[str, str]]
) -> None:
    """Never in the same step, and who has not proven that WireGuard or the native way leads to the others stops it."""
    old = changed(planned(model()), **before)
    found = changed(after(old, len(old.steps)), **wanted)
    assert at_each(found) == steps
    assert found.steps[-1].waits == ("c1", "o1", "o2", "o3")
    ups = [
        Stage[now[0].upper()] > Stage[then[0].upper()] or Stage[now[1].upper()] > Stage[then[1].upper()]
        for then, now in zip(steps, steps[1:])
    ]
    assert [bool(step.proven) for step in found.steps] == ups
    for number, step in enumerate(steps):  # interrupted after any of them, and run again, or turned back
        rests = not {"accepts", "sends"}.intersection(step)
        again = changed(after(found, number), **wanted)
        assert at_each(again) == (steps[number + 1 if rests else number :] or [step])
        assert at_each(changed(after(found, number), **before))[-1] == at_each(old)[-1]


def test_a_new_estate_is_native_inside_wireguard_from_the_first_packet() -> None:
    found = changed(**INSIDE)
    assert found.steps == ()
    assert at_each(found) == [("demands", "demands")]
    assert found.specs["c1"]["native"]["stages"] == {"cloud": "demands", "onprem": "demands"}
    assert found.specs["c1"]["wireguard"]["plain_sites"] == []
    NodeSpec.from_dict(found.specs["c1"])
    again = changed(found, **INSIDE)
    assert (again.record, again.specs, again.steps) == (found.record, found.specs, ())


def test_native_inside_wireguard_asks_the_network_for_nothing_but_its_port() -> None:
    """Neither routes of routers nor anything of workloads in a firewall or a VPC."""
    found = changed(**INSIDE)
    (row,) = [one for one in found.sites if one["sites"] == ["cloud", "onprem"]]
    assert (row["routing"], row["encryption"], row["mtu"]) == ("native", "wireguard", 1420)
    assert {(one["protocol"], one["port"]) for one in row["open"] if one["protocol"] != "TCP"} == {("UDP", 51871)}
    assert found.routes == ()
    (told,) = [line for line in matrix.lines(found.sites) if line.startswith("cloud and onprem")]
    assert told.startswith("cloud and onprem: path native inside WireGuard, encryption wireguard, MTU 1420 inside")
    for host in ("c1", "o1"):
        assert openings.native_sources(found.specs[host], found.record, outside=True) == []
        assert openings.native_sources(found.specs[host], found.record)
        assert not [rule for rule in openings.rules(found.specs[host], found.record, outside=True) if rule[1] == 8472]


def test_routes_of_routers_stay_until_packets_are_inside_wireguard() -> None:
    found = changed(changed(**ON), **INSIDE)
    assert found.routes == changed(**ON).routes
    (row,) = [one for one in found.sites if one["sites"] == ["cloud", "onprem"]]
    assert (row["mtu"], row["steps"]) == (1370, ["accepts", "sends", "demands"])
    assert {(one["protocol"], one["port"]) for one in row["open"]} >= {("IP", None), ("UDP", 8472), ("UDP", 51871)}
    last = after(found, len(found.steps))
    assert changed(last, **INSIDE).routes == ()
    back = changed(last, **ON)
    assert back.routes == found.routes


def test_what_a_run_does_is_told_with_the_steps_of_both() -> None:
    on = changed(changed(**ON), **INSIDE)
    told = matrix.changes(on.sites, on.keys)
    (encryption,) = [line for line in told if line.startswith("encryption of cloud and onprem")]
    assert "is turned on, in steps of one run" in encryption
    assert "(3) nothing is sent or taken in clear any more. Connections stay" in encryption
    (native_told,) = [line for line in told if line.startswith("native routing of cloud and onprem")]
    assert "is turned off and on again, in steps of one run" in native_told
    for words in (
        "(1) packets through the tunnel are taken again",
        "(4) every host of the two takes native packets",
        "(6) nothing is taken through the tunnel any more",
    ):
        assert words in native_told
    assert "is larger than the new MTU is refused" in native_told
    off = changed(changed(**INSIDE))
    told = matrix.changes(off.sites, off.keys)
    (encryption,) = [line for line in told if line.startswith("encryption of cloud and onprem")]
    assert "is turned off, in steps of one run" in encryption
    assert "(4) packets in clear are taken again too; (5)" in encryption
    begun = changed(after(off, 1))
    told = matrix.changes(begun.sites, begun.keys)
    (native_told,) = [line for line in told if line.startswith("native routing of cloud and onprem")]
    assert "is turned off, which was begun before (accepts), in steps of one run" in native_told
    assert "(1) packets go through the tunnel and are 50 bytes smaller" in native_told


def test_hosts_behind_an_address_translation_can_be_native_inside_wireguard() -> None:
    more = {"x1": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.9", "isthmus_advertise": "192.0.2.7"}}
    assert changed(more=more, **INSIDE).specs["x1"]["native"]["stages"]["onprem"] == "demands"
    with pytest.raises(ModelError, match="another isthmus_advertise than isthmus_underlay"):
        changed(more=more, **INSIDE, site_pairs=[{"sites": ["cloud", "cloud"], "encryption": "none"}])


def test_the_matrix_says_the_way_the_ports_and_the_mtu_and_the_routers_their_routes() -> None:
    pairs_said = [{"sites": ["onprem", "onprem"], "routing": "tunnel"}]
    found = changed(site_pairs=pairs_said, **ON)
    inside, between = sorted(found.sites, key=lambda row: row["sites"] != ["onprem", "onprem"])
    assert (inside["routing"], inside["mtu"]) == ("tunnel", 1450)
    assert (between["routing"], between["mtu"], between["routing_steps"]) == ("native", 1500, [])
    assert [one["port"] for one in between["open"] if one["protocol"] == "IP"] == [None]
    assert not [one for one in between["open"] if one["port"] == 8472]
    assert found.routes[0] == {
        "site": "cloud",
        "to": "10.102.0.0/28",
        "via": "198.18.2.1",
        "like": [],
        "why": "workloads of c1, for packets from onprem",
    }
    far = "198.18.1.1, 198.18.1.2, 198.18.1.3 (workloads of hosts of onprem)"
    assert matrix.route_lines(found.routes) == [
        "routers of cloud: 10.102.0.0/28 via 198.18.2.1 (workloads of c1, for packets from onprem)",
        f"routers of cloud: 10.101.0.0/27 over the way to {far}",
        f"routers of cloud: 10.101.0.32/28 over the way to {far}",
        "routers of onprem: 10.101.0.0/28 via 198.18.1.1 (workloads of o1, for packets from cloud)",
        "routers of onprem: 10.101.0.16/28 via 198.18.1.2 (workloads of o2, for packets from cloud)",
        "routers of onprem: 10.101.0.32/28 via 198.18.1.3 (workloads of o3, for packets from cloud)",
        "routers of onprem: 10.102.0.0/28 over the way to 198.18.2.1 (workloads of hosts of cloud)",
    ]
    (told,) = [line for line in matrix.lines(found.sites) if line.startswith("cloud and onprem")]
    assert told.startswith(
        "cloud and onprem: path native, encryption none, MTU 1500 inside where the underlay has 1500. Open: IP on "
        "the ranges of workloads at every host of cloud and onprem from the same ranges; TCP 2379"
    )


def test_routers_of_hybrid_sites_need_something_only_where_a_site_has_several_hosts() -> None:
    found = changed(routing="hybrid")
    others = "for packets from hosts of onprem on other subnets"
    assert matrix.route_lines(found.routes) == [
        f"routers of onprem: 10.101.0.0/28 via 198.18.1.1 (workloads of o1, {others})",
        f"routers of onprem: 10.101.0.16/28 via 198.18.1.2 (workloads of o2, {others})",
        f"routers of onprem: 10.101.0.32/28 via 198.18.1.3 (workloads of o3, {others})",
    ]


def test_of_many_routes_of_a_site_the_first_are_told() -> None:
    many = [
        {"site": "a", "to": f"10.0.{number}.0/24", "via": f"192.0.2.{number}", "like": [], "why": "w"}
        for number in range(103)
    ]
    told = matrix.route_lines(many)
    assert (len(told), told[-1]) == (101, "routers of a: and 3 more, in `routes` of isthmus.mesh.plan")
    assert told[0] == "routers of a: 10.0.0.0/24 via 192.0.2.0 (w)"


def test_while_it_is_turned_on_the_tunnel_stays_open_and_the_smaller_mtu_counts() -> None:
    found = changed(planned(model()), **ON)
    (row,) = [one for one in found.sites if one["sites"] == ["cloud", "onprem"]]
    assert (row["mtu"], row["routing_steps"]) == (1450, ["accepts", "sends", "demands"])
    assert {one["port"] for one in row["open"]} >= {None, 8472}
    told = matrix.changes(found.sites, found.keys)
    assert any(one.startswith("native routing of cloud and onprem is turned on, in steps of one run") for one in told)
    again = changed(after(found, 2))
    back = matrix.changes(again.sites, again.keys)
    assert any("packets go through the tunnel and are 50 bytes smaller" in one and "refused" in one for one in back)


def test_a_firewall_lets_in_the_ranges_of_native_hosts() -> None:
    found = changed(site_pairs=[{"sites": ["onprem", "onprem"], "routing": "tunnel"}], **ON)
    assert openings.native_sources(found.specs["c1"], found.record) == ["10.101.0.0/27", "10.101.0.32/28"]
    assert openings.native_sources(found.specs["o1"], found.record) == ["10.102.0.0/28"]
    assert openings.native_sources(planned(model()).specs["o1"], found.record) == []


def test_the_changes_name_pairs() -> None:
    found = changed(planned(model()), **ON)
    assert "routing between sites cloud and onprem: new, packets go through the tunnel, native ones are taken too" in (
        found.changes
    )


def test_a_record_with_a_stage_that_does_not_exist_is_refused() -> None:
    documents = {name: dict(one) for name, one in changed(**ON).record.items()}
    documents["roster"]["routing"] = {"all": "half", "pairs": {}}
    with pytest.raises(RecordError, match=r"routing.*has a stage that is not one of"):
        merge([documents])


def test_hybrid_is_native_inside_every_site_and_nowhere_else() -> None:
    sites = [f"s{number}" for number in range(30)]
    routing = Routing("hybrid")
    assert {routing.stage(pair) for pair in pairs(sites) if pair[0] == pair[1]} == {Stage.DEMANDS}
    assert {routing.stage(pair) for pair in product(sites, sites) if pair[0] < pair[1]} == {Stage.PLAIN}


def test_keys_are_replaced_while_another_pair_becomes_native() -> None:
    """Each of the two takes its own steps beside the other, and the last of one stands while the other goes on."""
    pairs_said = [{"sites": ["onprem", "onprem"], "encryption": "none"}]
    before = changed(encryption="wireguard", site_pairs=pairs_said)
    wanted = model({**estate(), "encryption": "wireguard", "site_pairs": [{**pairs_said[0], "routing": "native"}]})
    record = merge([dict(before.record)])
    found = plan(wanted, record, NOW, VERSION, "alice", rotate=True)
    specs = [found.specs, *(step.specs for step in found.steps)]
    assert [one["o1"]["native"]["stages"] for one in specs] == [
        {"onprem": "accepts"},
        {"onprem": "sends"},
        {"onprem": "demands"},
        {"onprem": "demands"},
    ]
    ports = [(one["o1"]["wireguard"]["port"], one["o1"]["wireguard"].get("second", {}).get("port")) for one in specs]
    assert ports == [(51871, 51872), (51872, 51871), (51872, None), (51872, None)]
    assert [bool(step.proven) for step in found.steps] == [True, True, False]
    assert [step.waits for step in found.steps] == [("c1", "o1", "o2", "o3")] * 3
    lines = matrix.changes(found.sites, found.keys)
    assert lines[0].startswith("the keys of WireGuard are replaced")
    assert lines[1].startswith("native routing within onprem is turned on")


def test_a_node_port_s_connections_that_end_are_told_where_there_are_nodes() -> None:
    ends = (
        "; a connection by a NodePort of Kubernetes nodes at cloud to a backend in another cluster, which began before "
        "step 1, ends when packets go natively"
    )

    def told(found: Plan) -> dict[str, bool]:
        lines = matrix.changes(found.sites, found.keys)
        return {matrix.name(row["sites"]): line.endswith(ends) for row, line in zip(found.sites, lines, strict=True)}

    before = with_nodes()
    assert told(with_nodes(before, **ON)) == {"within cloud": True, "cloud and onprem": True, "within onprem": False}
    assert told(with_nodes(before, routing="auto")) == told(with_nodes(before, **ON))
    assert not any(told(with_nodes(with_nodes(**ON))).values()), "nothing ends on the way back"
    assert not any(told(changed(planned(model()), more={"c2": NODES["x1"]}, **ON)).values())


def test_masquerade_is_of_a_sites_hosts_and_nothing_else_changes() -> None:
    plain = planned(model())
    assert changed(plain, sites={"onprem": {}, "cloud": {"masquerade": False}}).specs == plain.specs
    found = changed(plain, sites={"onprem": {"masquerade": True}, "cloud": {}})
    said = {name: NodeSpec.from_dict(spec).node.masquerade for name, spec in found.specs.items()}
    assert said == {"o1": True, "o2": True, "o3": True, "c1": False}
    assert found.specs["c1"] == plain.specs["c1"]
    assert found.steps == ()
    for name in ("o1", "o2", "o3"):
        now, before = found.specs[name], plain.specs[name]
        assert {**now, "node": before["node"], "hash": ""} == {**before, "hash": ""}
        assert {key for key in now["node"] if now["node"][key] != before["node"].get(key)} == {"masquerade"}
    words = "packets of workloads to the outside get their host's address"
    assert found.changes == (f"masquerade of site onprem: new, {words}",)
    assert changed(found, sites={"onprem": {"masquerade": True}, "cloud": {}}).changes == ()
    assert changed(found).changes == (
        f"masquerade of site onprem: removed (was {words})",
        "masquerade of site onprem: connections from workloads' addresses to the outside end",
    )


# --- hosts that move to another site


def moved(site: str, *names: str) -> dict[str, dict[str, Any]]:
    return {name: {**hosts()[name], "isthmus_site": site} for name in names}


def three(name: str) -> dict[str, Any]:
    return {site: {} for site in (*SITES, name)}


def roster_stages(record: Any, key: str, pair: str) -> str:
    found = record["roster"].get(key)
    return "plain" if found is None else str(found["pairs"].get(pair, found["all"]))


@pytest.mark.parametrize(("key", "keys"), [("routing", ON), ("encryption", {"encryption": "wireguard"})])
def test_hosts_that_become_a_site_of_their_own_go_on_from_where_they_were(key: str, keys: dict[str, Any]) -> None:
    """Not at once to what the new pairs are to be: their traffic is there already."""
    choice = {"site_pairs": [{"sites": ["cloud", "plant"], **keys}], "sites": three("plant")}
    found = changed(planned(model()), more=moved("plant", "o2", "o3"), **choice)
    records = [found.record, *(step.record for step in found.steps)]
    assert [roster_stages(record, key, "cloud plant") for record in records] == ["accepts", "sends", "demands"]
    assert {roster_stages(record, key, "onprem plant") for record in records} == {"plain"}
    assert not any("hosts move" in words for words in found.warnings)


def test_hosts_that_were_native_are_so_in_their_new_site_once_others_have_heard_of_it() -> None:
    """Who has not heard of a site sends through the tunnel to it, and is told of the move by etcd before its turn."""
    found = changed(changed(**ON), more=moved("plant", "o3"), **ON)
    assert found.steps == ()
    assert set(native(found.specs)["o3"].values()) == {"demands"}
    (told,) = [words for words in found.warnings if "hosts move" in words]
    assert "c1 and o3 (routing)" in told
    heard = changed(**ON, sites=three("plant"))
    assert heard.record["roster"]["empty"] == ["plant"]
    found = changed(heard, more=moved("plant", "o3"), **ON, sites=three("plant"))
    assert set(native(found.specs)["o3"].values()) == {"demands"}
    assert not any("hosts move" in words for words in found.warnings)
    assert "empty" not in found.record["roster"]


@pytest.mark.parametrize("keys", [ON, {"encryption": "wireguard"}])
def test_a_cluster_s_site_with_another_name_is_a_new_one_to_nobody(keys: dict[str, Any]) -> None:
    """Hosts have the site of a whole cluster from their specs, not from etcd."""
    clusters = estate()["clusters"]
    clusters["onprem"]["site"] = "plant"
    found = changed(changed(**keys), **keys, clusters=clusters)
    assert found.steps == ()
    assert not any("hosts move" in words for words in found.warnings)


def test_what_a_host_that_moves_loses_at_once_is_told_in_the_plan() -> None:
    """Its new site is there, and is something else with a third one."""
    cloud_only = {"site_pairs": [{"sites": ["cloud", "onprem"], **ON}], "sites": three("hall")}
    more = {"x1": {"isthmus_cluster": "cloud", "isthmus_site": "hall", "ansible_host": "198.18.9.1"}}
    running = changed(more=more, **cloud_only)
    found = changed(running, more={**more, **moved("hall", "o3")}, **cloud_only)
    (told,) = [words for words in found.warnings if "hosts move" in words]
    assert "c1 and o3 (routing)" in told
    assert "give the pairs of the old and of the new site the same routing and encryption first" in told


def test_with_encryption_a_site_of_which_nobody_has_heard_is_told_in_the_plan() -> None:
    """Until their own step is done hosts that encrypt anything demand it of hosts of a site that they do not know."""
    choice: dict[str, Any] = {"encryption": "wireguard", "sites": three("plant")}
    inside = [{"sites": ["onprem", "onprem"], "encryption": "none"}]
    running = changed(**choice, site_pairs=inside)
    pairs_of_plant = [{"sites": ["onprem", "plant"], "encryption": "none"}]
    found = changed(running, more=moved("plant", "o3"), **choice, site_pairs=[*inside, *pairs_of_plant])
    (told,) = [words for words in found.warnings if "hosts move" in words]
    assert "o1 and o3 (encryption)" in told


def test_a_pair_of_hosts_that_were_not_alike_begins_as_it_is_to_be() -> None:
    """Never below what one of them had."""
    more = {"x1": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.9"}}
    encrypted = {"encryption": "wireguard"}
    running = changed(more=more, site_pairs=[{"sites": ["cloud", "onprem"], **encrypted}])
    more = {"x1": {**more["x1"], "isthmus_site": "plant"}, **moved("plant", "o3")}
    found = changed(running, more=more, site_pairs=[{"sites": ["cloud", "plant"], **encrypted}], sites=three("plant"))
    assert roster_stages(found.record, "encryption", "cloud plant") == "demands"
    (told,) = [words for words in found.warnings if "hosts move" in words]
    assert "c1 and x1 (encryption)" in told


def test_hosts_are_not_moved_when_what_is_and_will_be_encrypted_would_go_in_clear_meanwhile() -> None:
    between = [{"sites": ["cloud", "onprem"], "encryption": "wireguard"}]
    after_all = [*between, {"sites": ["cloud", "plant"], "encryption": "wireguard"}]
    plain = changed(site_pairs=between, sites=three("plant"))
    refused = "packets between c1 and o3 are and will be encrypted, and would go in clear meanwhile"
    with pytest.raises(ModelError, match=refused):
        # c1 knows plant as a site in clear until it has its turn.
        changed(plain, more=moved("plant", "o3"), site_pairs=after_all, sites=three("plant"))
    ready = changed(plain, site_pairs=after_all, sites=three("plant"))
    found = changed(ready, more=moved("plant", "o3"), site_pairs=after_all, sites=three("plant"))
    assert roster_stages(found.record, "encryption", "cloud plant") == "demands"


def test_no_host_moves_from_gateways_to_a_pair_that_is_only_being_encrypted() -> None:
    def led(*onprem: str) -> dict[str, Any]:
        behind = {"onprem": ("o1", [f"{hosts()[name]['ansible_host']}/32" for name in onprem])}
        behind["cloud"] = ("c1", ["198.18.2.0/24"])
        sites = {
            site: {"ipsec": {"networks": networks, "gateways": [{"host": gateway}]}}
            for site, (gateway, networks) in behind.items()
        }
        return {"sites": {**sites, "plant": {}}}

    between = {"sites": ["cloud", "onprem"], "encryption": "ipsec-gateway"}
    running = changed(site_pairs=[between], **led("o1", "o2", "o3"))
    keys = {"more": moved("plant", "o3"), **led("o1", "o2")}
    plant = {"sites": ["cloud", "plant"]}
    with pytest.raises(ModelError, match="packets between c1 and o3 are and will be encrypted"):
        changed(running, site_pairs=[between, {**plant, "encryption": "wireguard"}], **keys)
    (told,) = [words for words in changed(running, site_pairs=[between], **keys).warnings if "hosts move" in words]
    assert "c1 and o3 (gateways)" in told


@pytest.mark.parametrize(("address", "told"), [("198.18.2.9", ["x1 and o3 (encryption)"]), ("192.0.2.7", [])])
def test_a_cluster_s_other_site_makes_hosts_seem_to_be_elsewhere(address: str, told: list[str]) -> None:
    """Where a host is at its cluster's site only the specs say so, and those of before have another one there; unless
    the host is behind an address translation, so that it says so itself."""
    between = [{"sites": ["cloud", "onprem"], "encryption": "wireguard"}]
    hall = {"x1": {"isthmus_cluster": "cloud", "isthmus_site": "hall", "ansible_host": "198.18.2.9"}}
    hall["x1"]["isthmus_advertise"] = address
    running = changed(more={**hall, "c1": {**hosts()["c1"], "isthmus_site": "cloud"}}, site_pairs=between)
    clusters = estate()["clusters"]
    clusters["cloud"]["site"] = "hall"
    more = {**hall, "c1": {**hosts()["c1"], "isthmus_site": "cloud"}}
    found = changed(running, more=more, site_pairs=between, clusters=clusters)
    words = [words for words in found.warnings if "hosts move" in words]
    assert [pair for pair in ("x1 and o3 (encryption)",) if any(pair in each for each in words)] == told


def test_a_site_that_all_hosts_have_left_is_nothing_any_more() -> None:
    """A second run has nothing to do."""
    more = {"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}}
    keys: dict[str, Any] = {"sites": three("hall"), "site_pairs": [{"sites": ["cloud", "onprem"], **ON}]}
    running = changed(more=more, **keys)
    auto: dict[str, Any] = {**keys, "site_pairs": [{"sites": ["cloud", "onprem"], "routing": "auto"}]}
    left = {name: {**variables, "isthmus_site": "hall"} for name, variables in {**more, "c1": hosts()["c1"]}.items()}
    found = changed(running, more=left, **auto)
    last = after(found, len(found.steps))
    again = changed(last, more=left, **auto)
    assert (again.record, again.steps) == (last.record, ())


EVERY = ("cloud", "hall", "onprem")
NAMES = ("cloud", "onprem", "c1", "c2", "o1", "o2", "o3")
"""Clusters and hosts, each of which has a site."""


def seen(spec: NodeSpec, record: Any, host: str) -> tuple[Stage, Stage]:
    """Stages of (encryption, native routing) at which a host with this spec is with another, whose site its registrar
    publishes as the record has it, where it is not that of the cluster."""
    document = record["clusters/onprem" if host.startswith("o") else "clusters/cloud"]
    site = document["hosts"][host]["site"]
    published = site if site != document["site"] else None
    return tuple(  # type: ignore[return-value]
        said.stage(published or said.sites[document["name"]]) if said else Stage.PLAIN
        for said in (spec.wireguard, spec.native)
    )


def of_sites(sites: dict[str, str], ways: dict[Any, Any], declared: set[str], previous: Plan | None = None) -> Plan:
    """The plan where clusters and hosts are at these sites."""
    clusters = estate()["clusters"]
    for name, cluster in clusters.items():
        cluster["site"] = sites[name]
    more = {"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}}
    everybody = {name: {**one, "isthmus_site": sites[name]} for name, one in {**hosts(), **more}.items()}
    known = declared | {*sites.values()}
    said = [{"sites": list(both), **way} for both, way in ways.items() if known.issuperset(both)]
    keys = {"clusters": clusters, "sites": {site: {} for site in known}, "site_pairs": said}
    return changed(previous, more=everybody, **keys)


def test_of_hosts_that_move_what_is_cut_off_is_told_and_what_is_encrypted_stays_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While hosts have still the specs of before, and others have those of the first step."""
    monkeypatch.setattr(stages, "_MOST_JUMPS", 100)
    draw = random.Random(73)  # noqa: S311
    counted: Counter[str] = Counter()
    for _number in range(60):
        sites = {name: draw.choice(EVERY) for name in NAMES}
        ways = {both: draw.choice(WAYS) for both in pairs(EVERY)}
        declared = {site for site in EVERY if draw.random() < 0.5}
        running = of_sites(sites, ways, declared)
        moving = {name: draw.choice(EVERY) for name in draw.sample(NAMES, draw.randint(1, 2))}
        after_all = {**ways, **{both: draw.choice(WAYS) for both in draw.sample(sorted(ways), draw.randint(0, 2))}}
        there = {**sites, **moving}
        refused = ""
        try:
            found = of_sites(there, after_all, declared, running)
        except ModelError as error:
            refused = str(error)
        if refused:
            assert "would go in clear meanwhile" in refused
            counted["refused"] += 1
            continue
        told = [
            line
            for words in found.warnings
            if "hosts move" in words
            for line in re.findall(r"(\S+) and (\S+) \(", words)
        ]
        specs = [{name: NodeSpec.from_dict(own) for name, own in each.specs.items()} for each in (running, found)]
        between = {(pair(sites[one], sites[other]), pair(there[one], there[other])) for one, other in told}
        for one, other in permutations(running.specs, 2):
            before, now = pair(sites[one], sites[other]), pair(there[one], there[other])
            encrypted = {"encryption": "wireguard"}.items() <= ways[before].items() & after_all[now].items()
            for own, others in product(specs, repeat=2):
                sends, takes = seen(own[one], found.record, other), seen(others[other], found.record, one)
                assert sent(sends)[0] or not encrypted, (one, other, before, now)
                assert understood(sends, takes) or (before, now) in between, (one, other, before, now, sends, takes)
            counted["told"] += (before, now) in between
        settled = of_sites(there, after_all, declared, after(found, len(found.steps)))
        assert settled.record == after(found, len(found.steps)).record
        counted["planned"] += 1
    assert min(counted["refused"], counted["told"], counted["planned"]) > 5, counted
