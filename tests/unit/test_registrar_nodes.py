# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes of a cluster whose control plane is in it: each has its range for good, nobody else gets it."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.registrar.kubernetes.catalog import Catalog
from isthmus_agent.registrar.kubernetes.objects import KINDS, NODES
from isthmus_agent.registrar.nodes import Dealt, deal_nodes
from isthmus_agent.registrar.publish import Inputs, Own, Publication, leaving, publish
from isthmus_mesh import keys
from isthmus_mesh.documents import DocumentError, NodeAllocation, NodeReport
from isthmus_mesh.wire import Node
from kubernetes_objects import namespace, node, pod

PODS, CLUSTER_IPS = IPv4Network("10.246.0.0/16"), IPv4Network("10.98.0.0/16")
OWN = Own("managed", 6, 255, IPv4Network("10.116.0.0/16"), (PODS,), CLUSTER_IPS, in_cluster=True)
RECORD: dict[str, Any] = {
    "name": "managed",
    "state": "present",
    "site": "managed",
    "workload_ranges": ["10.106.0.0/24", "10.107.0.0/24"],
    "node_prefix": 28,
    "hosts": {},
}
RESERVED = (IPv4Network("10.106.0.0/24"), PODS)
NOW, LATER, MUCH_LATER = "2026-01-02T03:04:05Z", "2026-01-03T03:04:05Z", "2026-03-02T03:04:05Z"


def catalog(*nodes: dict[str, Any], synced: bool = True, pods: tuple[dict[str, Any], ...] = ()) -> Catalog:
    found = Catalog("managed")
    for kind in KINDS if synced else ():
        content = {NODES: nodes, "namespaces": (namespace("shop"),), "pods": pods}.get(kind, ())
        found.retain(kind, [key for entry in content if (key := found.put(kind, entry)) is not None])
    return found


def n(number: int, address: str = "") -> dict[str, Any]:
    return node(f"n{number}", f"10.246.{number}.0/24", address or f"198.18.6.{10 + number}")


def deal(found: Catalog, previous: dict[str, str] | None = None, now: str = NOW, **record: Any) -> Dealt:
    return deal_nodes({**RECORD, **record}, found, previous or {}, now, RESERVED)


def ranges(found: Dealt) -> dict[str, str]:
    return {name: host["range4"] for name, host in found.hosts.items()}


def reports(found: Dealt, *names: str) -> dict[str, bytes]:
    return {
        keys.node_report_key(name): NodeReport(
            name, "managed", (), found.hosts[name]["range4"], None, found.hosts[name]["mesh4"], mtu=1460
        )
        .to_json()
        .encode()
        for name in names
    }


def published(found: Dealt, source: Catalog, heard: dict[str, bytes], **more: Any) -> Publication:
    record = {**RECORD, "hosts": found.hosts}
    given: dict[str, Any] = {"nodes": heard, "workloads": {}, "services": {}, "previous": {}, "now": NOW, **more}
    return publish(OWN, Inputs(record=record, kubernetes=source, dealt=found.keys, **given))


def test_each_node_has_a_range_of_its_own_for_good() -> None:
    first = deal(catalog(n(2), n(1)))
    assert ranges(first) == {"n1": "10.106.0.0/28", "n2": "10.106.0.16/28"}
    host = first.hosts["n1"]
    assert (host["mesh4"], host["underlay4"], host["advertise4"]) == ("10.106.0.1", "198.18.6.11", "198.18.6.11")
    assert (host["kubernetes_node"], host["site"]) == ("n1", "managed")
    second = deal(catalog(n(0), n(1), n(2)), dict(first.keys), LATER)
    assert ranges(second) == {"n0": "10.106.0.32/28", **ranges(first)}
    assert second.keys[keys.alloc_node_key("n1")] == first.keys[keys.alloc_node_key("n1")]


def test_a_node_that_went_has_its_range_kept_and_gets_it_back() -> None:
    first = deal(catalog(n(1), n(2)))
    gone = deal(catalog(n(2)), dict(first.keys), LATER)
    assert ranges(gone) == {"n2": "10.106.0.16/28"}
    assert json.loads(gone.keys[keys.alloc_node_key("n1")])["released"] == LATER
    back = deal(catalog(n(1), n(2), n(3)), dict(gone.keys), LATER)
    assert ranges(back) == {"n1": "10.106.0.0/28", "n2": "10.106.0.16/28", "n3": "10.106.0.32/28"}
    assert json.loads(back.keys[keys.alloc_node_key("n1")])["released"] is None


def test_a_released_range_goes_to_another_node_only_when_it_has_rested_and_no_other_is_free() -> None:
    few = {"workload_ranges": ["10.106.0.0/27"]}
    first = deal(catalog(n(1), n(2)), **few)
    gone = dict(deal(catalog(n(2)), dict(first.keys), NOW, **few).keys)
    early = deal(catalog(n(2), n(3)), gone, LATER, **few)
    assert ranges(early) == {"n2": "10.106.0.16/28"}
    assert any("no range for a node is left" in one.reason for one in early.problems)
    late = deal(catalog(n(2), n(3)), gone, MUCH_LATER, **few)
    assert ranges(late) == {"n2": "10.106.0.16/28", "n3": "10.106.0.0/28"}
    assert keys.alloc_node_key("n1") not in late.keys


def test_another_prefix_counts_for_new_nodes_only_and_overlaps_nothing() -> None:
    first = deal(catalog(n(1), n(2), n(3)))
    wider = deal(catalog(n(1), n(2), n(3), n(4)), dict(first.keys), node_prefix=27)
    assert ranges(wider) == {**ranges(first), "n4": "10.106.0.64/27"}


def test_without_everything_read_the_nodes_are_those_that_have_a_range() -> None:
    first = deal(catalog(n(1), n(2)))
    silent = deal(catalog(synced=False), dict(first.keys), LATER)
    assert silent.hosts == first.hosts
    assert silent.keys == first.keys


@pytest.mark.parametrize(
    ("nodes", "left", "words"),
    [
        ([n(1), n(2, "198.18.6.11")], {"n1"}, "its InternalIP 198.18.6.11 is also that of node n1"),
        ([n(1), n(2, "10.246.7.7")], {"n1"}, "lies in 10.246.0.0/16, a range of the mesh"),
        ([n(1), node("n2", None, "fd00::2")], {"n1"}, "has no InternalIP of IPv4"),
    ],
)
def test_a_node_that_cannot_be_reached_is_named(nodes: list[dict[str, Any]], left: set[str], words: str) -> None:
    found = deal(catalog(*nodes))
    assert found.hosts.keys() == left
    (problem,) = found.problems
    assert problem.key == "kubernetes nodes n2"
    assert words in problem.reason


def test_an_allocation_that_cannot_be_read_is_dealt_anew_apart_from_the_others() -> None:
    first = dict(deal(catalog(n(1), n(2))).keys)
    first[keys.alloc_node_key("n1")] = "{"
    first[keys.alloc_node_key("n3")] = first[keys.alloc_node_key("n2")]
    found = deal(catalog(n(1), n(2), n(3)), first)
    assert len(set(ranges(found).values())) == 3
    assert ranges(found)["n2"] == "10.106.0.16/28"
    assert len(found.problems) == 2


@given(st.lists(st.sets(st.integers(1, 20)), min_size=1, max_size=8))
def test_nothing_moves_and_nothing_is_shared_whatever_comes_and_goes(steps: list[set[int]]) -> None:
    kept: dict[str, str] = {}
    known: dict[str, str] = {}
    for step in steps:
        found = deal(catalog(*(n(number) for number in step)), kept, LATER)
        kept = dict(found.keys)
        assert found.hosts.keys() == {f"n{number}" for number in step}
        for name, network in ranges(found).items():
            assert known.setdefault(name, network) == network
        assert len(set(known.values())) == len(known)


def test_a_node_is_published_when_its_agent_is_there() -> None:
    source = catalog(n(1), n(2), pods=(pod("a", "10.246.1.2", "n1"), pod("b", "10.246.2.2", "n2")))
    dealt = deal(source)
    found = published(dealt, source, reports(dealt, "n1"))
    assert keys.alloc_node_key("n2") in found.keys  # its agent waits for it
    assert keys.node_key("managed", "n2") not in found.keys
    assert keys.ip_key("10.246.2.2") not in found.keys
    told = Node.from_json(found.keys[keys.node_key("managed", "n1")])
    assert (told.ipv4_alloc_cidr, told.ipv4_secondary_alloc_cidrs) == (
        IPv4Network("10.106.0.0/28"),
        (IPv4Network("10.246.1.0/24"),),
    )
    assert told.annotations["isthmus.io/underlay-mtu"] == "1460"
    assert json.loads(found.keys[keys.ip_key("10.246.1.2")])["HostIP"] == "198.18.6.11"


def test_a_report_proves_nothing_about_who_wrote_it() -> None:
    """All agents of the cluster have one certificate: a node must not take another's traffic by its report."""
    source = catalog(n(1))
    dealt = deal(source)
    key = "MCowBQYDK2VuAyEAaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa="
    report = NodeReport(
        "n1", "managed", (("InternalIP", "198.18.6.99"),), "10.106.0.0/28", None, "10.106.0.1", wireguard_public_key=key
    )
    found = published(dealt, source, {keys.node_report_key("n1"): report.to_json().encode()})
    told = Node.from_json(found.keys[keys.node_key("managed", "n1")])
    assert told.wireguard_public_key == ""
    assert {entry.ip for entry in told.addresses} == {"198.18.6.11", "10.106.0.1"}
    moved = replace(report, range4="10.106.0.16/28", mesh4="10.106.0.17")
    refused = published(dealt, source, {keys.node_report_key("n1"): moved.to_json().encode()})
    assert keys.node_key("managed", "n1") not in refused.keys


def test_a_node_that_went_drains_as_a_host_does() -> None:
    source = catalog(n(1), n(2))
    dealt = deal(source)
    before = published(dealt, source, reports(dealt, "n1", "n2"))
    less = catalog(n(2))
    after = deal(less, dict(before.keys), LATER)
    record = {**RECORD, "hosts": after.hosts}
    going = leaving(OWN, record, before.keys)
    assert going == {"n1"}
    draining = published(after, less, reports(dealt, "n1", "n2"), previous=dict(before.keys), draining=going)
    assert keys.node_key("managed", "n1") in draining.keys
    assert draining.problems == ()  # the report of a node that was there is nothing to be told of
    over = published(after, less, reports(dealt, "n1", "n2"), previous=dict(before.keys))
    assert keys.node_key("managed", "n1") not in over.keys


@pytest.mark.parametrize(
    "change", [{"mesh4": "10.106.0.17"}, {"range4": "10.106.0.1/28"}, {"underlay4": "n1"}, {"released": 3}]
)
def test_an_allocation_is_read_strictly(change: dict[str, Any]) -> None:
    good = NodeAllocation("10.106.0.0/28", "10.106.0.1", "198.18.6.11", NOW)
    assert NodeAllocation.from_json(good.to_json()) == good
    with pytest.raises(DocumentError):
        NodeAllocation.from_json(json.dumps({**json.loads(good.to_json()), **change}))
