# SPDX-License-Identifier: GPL-3.0-or-later
"""What a cluster publishes: silence withdraws nothing, nothing is dealt twice, nobody claims what is another's."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.registrar import dealing
from isthmus_agent.registrar.publish import (
    Change,
    Inputs,
    Own,
    Publication,
    cluster_config,
    difference,
    leaving,
    overlay,
    owned_prefixes,
    publish,
)
from isthmus_mesh import keys, wire
from isthmus_mesh.documents import NodeReport, ServiceDefinition, ServicePort, WorkloadReport

OWN = Own("onprem", 1, 255, IPv4Network("10.111.0.0/16"))
NOW, LATER, MUCH_LATER = "2026-01-02T03:04:05Z", "2026-01-03T03:04:05Z", "2026-03-02T03:04:05Z"


def host(number: int, workloads: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "range4": f"10.101.{number}.0/28",
        "mesh4": f"10.101.{number}.1",
        "underlay4": f"198.18.1.{10 + number}",
        "advertise4": f"198.18.1.{10 + number}",
        "site": "onprem",
        "labels": {"zone": "a"},
        "state": "present",
        "workloads": workloads or {},
        **more,
    }


def workload(address: str, **labels: str) -> dict[str, Any]:
    return {"address4": address, "service_account": "default", "labels": labels, "cgroup": {"unit": "x.service"}}


def node_report(number: int, **more: Any) -> tuple[str, bytes]:
    name = f"h{number}"
    values: dict[str, Any] = {
        "name": name,
        "cluster": "onprem",
        "addresses": (("InternalIP", f"198.18.1.{10 + number}"), ("CiliumInternalIP", f"10.101.{number}.1")),
        "range4": f"10.101.{number}.0/28",
        "mesh4": f"10.101.{number}.1",
        "mtu": 1500,
        "boot_id": "b",
        **more,
    }
    return keys.node_report_key(name), NodeReport(**values).to_json().encode()


def report(node: str, name: str, address: str, ready: bool | None, **more: Any) -> tuple[str, bytes]:
    services = {} if ready is None else {"shop/web": ready}
    values: dict[str, Any] = {
        "name": name,
        "namespace": "shop",
        "node": node,
        "addresses": (address,),
        "host_ip": "198.18.1.10",
        "services": services,
        **more,
    }
    return keys.workload_key(node, "shop", name), WorkloadReport(**values).to_json().encode()


def definition(name: str = "web", **more: Any) -> tuple[str, bytes]:
    values: dict[str, Any] = {
        "name": name,
        "namespace": "shop",
        "ports": (ServicePort("http", 80, 8080),),
        "backend_labels": {"app": "web"},
        "is_global": True,
        **more,
    }
    return keys.service_definition_key("shop", name), ServiceDefinition(**values).to_json().encode()


RECORD = {
    "hosts": {
        "h0": host(0, {"shop/web": workload("10.101.0.2", app="web"), "shop/db": workload("10.101.0.3", app="db")}),
        "h1": host(1, {"shop/web": workload("10.101.1.2", app="web")}),
    }
}
NODES = dict([node_report(0), node_report(1)])
WORKLOADS = dict(
    [
        report("h0", "web", "10.101.0.2", True),
        report("h0", "db", "10.101.0.3", None),
        report("h1", "web", "10.101.1.2", True),
    ]
)
SERVICES = dict([definition()])


def run(
    record: dict[str, Any] = RECORD,
    nodes: dict[str, bytes] = NODES,
    workloads: dict[str, bytes] = WORKLOADS,
    services: dict[str, bytes] = SERVICES,
    previous: dict[str, str] | None = None,
    now: str = NOW,
    own: Own = OWN,
    draining: frozenset[str] = frozenset(),
) -> Publication:
    return publish(own, Inputs(record, nodes, workloads, services, previous or {}, now, draining))


def backends(found: Publication, name: str = "web") -> set[str]:
    return set(json.loads(found.keys[keys.service_key("onprem", "shop", name)])["backends"])


def test_exact_keys_and_values() -> None:
    found = run()
    assert found.problems == ()
    assert sorted(found.keys) == [
        "cilium/state/identities/v1/id/65537",
        "cilium/state/identities/v1/id/65538",
        "cilium/state/ip/v1/default/10.101.0.2",
        "cilium/state/ip/v1/default/10.101.0.3",
        "cilium/state/ip/v1/default/10.101.1.2",
        "cilium/state/nodes/v1/onprem/h0",
        "cilium/state/nodes/v1/onprem/h1",
        "cilium/state/services/v1/onprem/shop/web",
        "isthmus/v1/alloc/identities/65537",
        "isthmus/v1/alloc/identities/65538",
        "isthmus/v1/alloc/vips/shop/web",
    ]
    assert found.keys["cilium/state/identities/v1/id/65538"] == (
        "k8s:app=web;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop;"
        "k8s:io.cilium.k8s.policy.cluster=onprem;k8s:io.cilium.k8s.policy.serviceaccount=default;"
        "k8s:io.kubernetes.pod.namespace=shop;"
    )
    assert json.loads(found.keys["cilium/state/ip/v1/default/10.101.1.2"]) == {
        "IP": "10.101.1.2",
        "Mask": None,
        "HostIP": "198.18.1.11",
        "ID": 65538,
        "Key": 0,
        "Metadata": "",
        "K8sNamespace": "shop",
        "K8sPodName": "web",
        "K8sServiceAccount": "default",
    }
    node = json.loads(found.keys["cilium/state/nodes/v1/onprem/h0"])
    assert node["IPAddresses"] == [
        {"Type": "InternalIP", "IP": "198.18.1.10"},
        {"Type": "CiliumInternalIP", "IP": "10.101.0.1"},
    ]
    assert node["IPv4AllocCIDR"] == {"IP": "10.101.0.0", "Mask": "////8A=="}
    assert node["Annotations"] == {"isthmus.io/underlay-mtu": "1500"}
    assert node["Labels"] == {"kubernetes.io/hostname": "h0", "zone": "a"}
    assert (node["ClusterID"], node["BootID"]) == (1, "b")
    assert json.loads(found.keys["cilium/state/services/v1/onprem/shop/web"]) == {
        "cluster": "onprem",
        "namespace": "shop",
        "name": "web",
        "frontends": {"10.111.0.1": {"http": {"Protocol": "TCP", "Port": 80}}},
        "backends": {
            "10.101.0.2": {"http": {"Protocol": "TCP", "Port": 8080}},
            "10.101.1.2": {"http": {"Protocol": "TCP", "Port": 8080}},
        },
        "labels": {},
        "selector": {"app": "web"},
        "includeExternal": True,
        "shared": True,
        "clusterID": 1,
    }
    assert cluster_config(OWN) == '{"id":1,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255}}'


def test_order_of_writes_and_of_deletes() -> None:
    """An identity is written before the address that uses it and goes after it; so with addresses and services."""
    prefixes = owned_prefixes("onprem")
    found = run()
    puts = difference(found.keys, {}, prefixes)
    places = [next(i for i, prefix in enumerate(prefixes) if change.key.startswith(prefix)) for change in puts]
    assert places == sorted(places)
    gone = difference({}, found.keys, prefixes)
    places = [next(i for i, prefix in enumerate(prefixes) if change.key.startswith(prefix)) for change in gone]
    assert places == sorted(places, reverse=True)
    assert all(change.value is None for change in gone)
    assert difference(found.keys, found.keys, prefixes) == []
    assert difference({}, {"cilium/cluster-config/onprem": "x"}, prefixes) == []
    assert difference({"a/b": "2"}, {"a/b": "1"}, ["a/"]) == [Change("a/b", "2")]


def test_second_run_changes_nothing() -> None:
    first = run()
    assert run(previous=first.keys, now=LATER) == first


SILENCES = {
    "no node report": {"nodes": dict([node_report(1)])},
    "no node reports at all": {"nodes": {}},
    "broken node report": {"nodes": {**NODES, keys.node_report_key("h0"): b"{"}},
    "no workload report": {"workloads": {k: v for k, v in WORKLOADS.items() if "/h0/" not in k}},
    "no workload reports at all": {"workloads": {}},
    "broken workload report": {"workloads": {**WORKLOADS, keys.workload_key("h0", "shop", "web"): b"[]"}},
    "service not judged yet": {"workloads": {**WORKLOADS, **dict([report("h0", "web", "10.101.0.2", None)])}},
    "broken definition": {"services": {keys.service_definition_key("shop", "web"): b"nonsense"}},
    "no reports at all": {"nodes": {}, "workloads": {}},
}


@pytest.mark.parametrize("silence", SILENCES.values(), ids=SILENCES)
def test_silence_withdraws_nothing(silence: dict[str, Any]) -> None:
    first = run()
    assert run(**silence, previous=first.keys, now=LATER).keys == first.keys


def test_what_never_was_reported_is_not_published() -> None:
    found = run(nodes={}, workloads={})
    assert [key for key in found.keys if key.startswith("cilium/")] == ["cilium/state/services/v1/onprem/shop/web"]
    assert backends(found) == set()


SAYS = {
    "all said": ({}, []),
    "no node report": ({"nodes": dict([node_report(1)])}, [keys.node_report_key("h0")]),
    "no workload report": (
        {"workloads": {k: v for k, v in WORKLOADS.items() if not k.endswith("h0/shop.db")}},
        [keys.workload_key("h0", "shop", "db")],
    ),
    "service not judged yet": (
        {"workloads": {**WORKLOADS, **dict([report("h0", "web", "10.101.0.2", None)])}},
        [keys.workload_key("h0", "shop", "web")],
    ),
    "no host": ({"record": {"state": "absent"}, "nodes": {}, "workloads": {}}, []),
}


@pytest.mark.parametrize(("inputs", "silent"), SAYS.values(), ids=SAYS)
def test_who_is_silent_is_named(inputs: dict[str, Any], silent: list[str]) -> None:
    assert list(run(**inputs).silent) == silent
    assert list(run(**inputs, previous=run().keys).silent) == silent


def test_what_is_remembered_keeps_its_address_over_what_was_dealt_since() -> None:
    before = run()
    since = run(services=dict([definition("api")]))
    vip = {name: keys.vip_key("shop", name) for name in ("api", "web")}
    assert since.keys[vip["api"]] == before.keys[vip["web"]]
    both = dict([definition("api"), definition()])
    found = run(services=both, previous=overlay(before.keys, since.keys))
    assert found.keys[vip["web"]] == before.keys[vip["web"]]
    assert found.keys[vip["api"]] != before.keys[vip["web"]]


def test_not_ready_leaves_the_service_and_nothing_else() -> None:
    first = run()
    found = run(workloads={**WORKLOADS, **dict([report("h0", "web", "10.101.0.2", False)])}, previous=first.keys)
    assert backends(found) == {"10.101.1.2"}
    assert found.keys.keys() == first.keys.keys()


def without(record: dict[str, Any], node: str, workload: str | None = None) -> dict[str, Any]:
    hosts = dict(record["hosts"])
    if workload is None:
        del hosts[node]
    else:
        hosts[node] = {**hosts[node], "workloads": {k: v for k, v in hosts[node]["workloads"].items() if k != workload}}
    return {"hosts": hosts}


def test_record_removes_a_workload_although_its_report_stands() -> None:
    first = run()
    found = run(record=without(RECORD, "h0", "shop/web"), previous=first.keys, now=LATER)
    assert backends(found) == {"10.101.1.2"}
    assert keys.ip_key("10.101.0.2") not in found.keys
    assert [problem.key for problem in found.problems] == [keys.workload_key("h0", "shop", "web")]


@pytest.mark.parametrize("how", ["missing", "absent"])
def test_record_removes_a_host(how: str) -> None:
    first = run()
    record = without(RECORD, "h0")
    if how == "absent":
        record["hosts"]["h0"] = {**RECORD["hosts"]["h0"], "state": "absent"}
    found = run(record=record, previous=first.keys, now=LATER)
    assert keys.node_key("onprem", "h0") not in found.keys
    assert backends(found) == {"10.101.1.2"}
    # nobody uses the labels of shop/db now: the identity goes, its number stays dealt
    assert keys.identity_key(65537) not in found.keys
    assert json.loads(found.keys[keys.alloc_identity_key(65537)])["released"] == LATER
    back = run(previous=found.keys, now=MUCH_LATER)
    assert back.keys[keys.identity_key(65537)] == first.keys[keys.identity_key(65537)]
    assert json.loads(back.keys[keys.alloc_identity_key(65537)])["released"] is None


def test_a_host_that_drains_is_a_backend_of_nothing_and_can_still_be_reached() -> None:
    first = run()
    record = without(RECORD, "h0")
    assert leaving(OWN, RECORD, first.keys) == frozenset()
    assert leaving(OWN, record, first.keys) == {"h0"}
    lost = {**record, "forgotten": {"h0": {"at": NOW, "by": "alice"}}}
    assert leaving(OWN, lost, first.keys) == frozenset()
    # Its rights and reports go with the record.
    nodes, workloads = dict([node_report(1)]), dict([report("h1", "web", "10.101.1.2", True)])
    found = run(record, nodes, workloads, previous=first.keys, now=LATER, draining=frozenset({"h0"}))
    assert backends(found) == {"10.101.1.2"}
    cilium = {key: value for key, value in first.keys.items() if key.startswith("cilium/") and "/services/" not in key}
    assert {key: found.keys.get(key) for key in cilium} == cilium
    assert json.loads(found.keys[keys.alloc_identity_key(65537)])["released"] is None
    after = run(record, nodes, workloads, previous=found.keys, now=LATER)
    assert after.keys == run(record, nodes, workloads, previous=first.keys, now=LATER).keys
    assert leaving(OWN, record, after.keys) == frozenset()


def test_a_host_does_not_drain_behind_the_address_of_another() -> None:
    first = run()
    record = without(RECORD, "h0")
    record["hosts"]["h9"] = host(9, advertise4="198.18.1.10", underlay4="198.18.1.10")
    found = run(record, previous=first.keys, draining=frozenset({"h0"}))
    assert keys.node_key("onprem", "h0") not in found.keys
    assert keys.ip_key("10.101.0.2") not in found.keys


def test_removed_cluster_publishes_nothing() -> None:
    first = run()
    found = run(record={"state": "absent"}, services={}, nodes={}, workloads={}, previous=first.keys, now=LATER)
    assert [key for key in found.keys if key.startswith("cilium/")] == []


CLAIMS = {
    "range": ({"range4": "10.101.1.0/28"}, "range4"),
    "mesh address": ({"mesh4": "10.101.1.1"}, "mesh4"),
    "name": ({"name": "h1"}, "name"),
    "cluster": ({"cluster": "cloud"}, "cluster"),
}


@pytest.mark.parametrize(("claim", "field"), CLAIMS.values(), ids=CLAIMS)
def test_node_cannot_claim_anothers(claim: dict[str, Any], field: str) -> None:
    key, value = node_report(0, **claim)
    found = run(nodes={**NODES, key: value})
    assert keys.node_key("onprem", "h0") not in found.keys
    assert [(problem.key, problem.reason.split()[0]) for problem in found.problems] == [(key, field)]


def test_strange_address_of_a_node_is_named_and_not_published() -> None:
    key, value = node_report(0, addresses=(("InternalIP", "198.18.1.11"),))
    found = run(nodes={**NODES, key: value})
    assert "198.18.1.11" not in found.keys[keys.node_key("onprem", "h0")]
    assert "198.18.1.11 is not the host's" in found.problems[0].reason


def test_workload_cannot_claim_anothers_address_nor_another_identity() -> None:
    key, value = report("h0", "db", "10.101.0.2", None)
    found = run(workloads={**WORKLOADS, key: value})
    assert keys.ip_key("10.101.0.3") not in found.keys
    assert "10.101.0.2 is not 10.101.0.3" in found.problems[0].reason
    key, value = report("h0", "db", "10.101.0.3", True, labels={"app": "web"}, service_account="admin")
    found = run(workloads={**WORKLOADS, key: value})
    assert json.loads(found.keys[keys.ip_key("10.101.0.3")])["ID"] == 65537
    assert "10.101.0.3" not in backends(found)


@pytest.mark.parametrize("strange", [keys.node_report_key("h9"), "isthmus/v1/nodes/a/b"])
def test_report_of_a_host_that_the_record_lacks(strange: str) -> None:
    found = run(nodes={**NODES, strange: NODES[keys.node_report_key("h0")]})
    assert found.keys == run().keys
    assert found.problems[0].key == strange


def test_host_with_another_advertised_address() -> None:
    record = {"hosts": {"h0": {**RECORD["hosts"]["h0"], "advertise4": "203.0.113.9"}}}
    node = json.loads(run(record=record).keys[keys.node_key("onprem", "h0")])
    assert [(entry["Type"], entry["IP"]) for entry in node["IPAddresses"]] == [
        ("InternalIP", "203.0.113.9"),
        ("ExternalIP", "198.18.1.10"),
        ("CiliumInternalIP", "10.101.0.1"),
    ]
    # By it hosts of that site know that they reach the node at the other one.
    assert node["Annotations"]["isthmus.io/site"] == RECORD["hosts"]["h0"]["site"]


def test_moved_host_that_is_silent_is_not_published_with_its_old_range() -> None:
    first = run()
    record = {"hosts": {"h0": {**RECORD["hosts"]["h0"], "range4": "10.101.7.0/28", "mesh4": "10.101.7.1"}}}
    found = run(record=record, nodes={}, previous=first.keys)
    assert keys.node_key("onprem", "h0") not in found.keys


def test_local_service_is_not_published_to_peers() -> None:
    services = dict([definition(is_global=False)])
    found = run(services=services)
    assert keys.service_key("onprem", "shop", "web") not in found.keys
    local = json.loads(found.keys[keys.local_service_key("shop", "web")])
    assert (set(local["backends"]), local["shared"], local["includeExternal"]) == (
        {"10.101.0.2", "10.101.1.2"},
        False,
        False,
    )
    # becoming global moves it and keeps its address, also when no agent says a word
    moved = run(workloads={}, previous=found.keys)
    assert keys.local_service_key("shop", "web") not in moved.keys
    assert backends(moved) == {"10.101.0.2", "10.101.1.2"}
    assert moved.keys[keys.vip_key("shop", "web")] == found.keys[keys.vip_key("shop", "web")]


def test_service_without_backends_here_still_gets_an_address() -> None:
    found = run(services=dict([definition("other", backend_labels={"app": "none"})]))
    assert json.loads(found.keys[keys.vip_key("shop", "other")])["ipv4"] == "10.111.0.1"
    assert backends(found, "other") == set()


def test_removed_definition_goes_and_its_address_is_not_dealt_again() -> None:
    first = run()
    found = run(services=dict([definition("new")]), previous=first.keys, now=LATER)
    assert keys.service_key("onprem", "shop", "web") not in found.keys
    assert json.loads(found.keys[keys.vip_key("shop", "web")]) == {
        "ipv4": "10.111.0.1",
        "ipv6": None,
        "released": LATER,
    }
    assert json.loads(found.keys[keys.vip_key("shop", "new")])["ipv4"] == "10.111.0.2"


def test_full_range_is_named_and_released_ones_come_back_after_the_quarantine() -> None:
    own = Own("onprem", 1, 255, IPv4Network("10.111.0.0/30"))
    first = run(own=own, services=dict([definition("a"), definition("b"), definition("c")]))
    assert [problem.reason for problem in first.problems] == ["no service address is left in this cluster's range"]
    changed = dict([definition("b"), definition("c")])
    soon = run(own=own, services=changed, previous=first.keys, now=LATER)
    assert soon.problems
    late = run(own=own, services=changed, previous=soon.keys, now=MUCH_LATER)
    assert late.problems == ()
    assert json.loads(late.keys[keys.vip_key("shop", "c")])["ipv4"] == "10.111.0.1"
    assert keys.vip_key("shop", "a") not in late.keys


def test_what_may_be_dealt_anew_is_looked_for_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look takes half a second in a full range, and the lease of who leads is of three."""
    looked: list[str] = []
    parse = dealing.parse_time

    def parse_time(text: str) -> Any:
        looked.append(text)
        return parse(text)

    monkeypatch.setattr(dealing, "parse_time", parse_time)
    old, young, torn = "2026-01-01T00:00:00Z", "2026-03-01T00:00:00Z", "2026-01"
    times = {1: young, 2: old, 3: torn, 4: old, 5: old, **dict.fromkeys(range(6, 1000), young)}
    taken = {number: dealing.Allocation(f"o{number}", old, at) for number, at in times.items()}
    said: list[str] = []
    dealer = dealing.Dealer(
        taken, range(1, 1000), "p/", "number", "2026-03-02T00:00:00Z", lambda *it: said.append(it[0]), 0
    )
    assert dealer.deal("o4") == 4, "its owner is back"
    assert [dealer.deal(f"new{number}") for number in range(20)] == [2, 5, *[None] * 18]
    assert len(said) == 18
    assert len(looked) < 10
    dealer.now = "2026-05-01T00:00:00Z"
    assert dealer.deal("late") == 1


def test_unreadable_allocation_keeps_its_number_from_others() -> None:
    found = run(previous={keys.alloc_identity_key(65537): "nonsense"})
    assert sorted(key for key in found.keys if key.startswith("cilium/state/identities")) == [
        keys.identity_key(65538),
        keys.identity_key(65539),
    ]
    assert keys.alloc_identity_key(65537) in found.keys


@pytest.mark.parametrize("labels", [["k8s:a=b;"], 7, None])
def test_an_allocation_whose_labels_are_no_text_keeps_its_number_too(labels: object) -> None:
    found = run(previous={keys.alloc_identity_key(65537): json.dumps({"labels": labels})})
    assert keys.identity_key(65537) not in found.keys
    assert keys.alloc_identity_key(65537) in found.keys


def test_lost_allocations_are_recovered_from_what_is_published() -> None:
    first = run()
    published = {key: value for key, value in first.keys.items() if key.startswith("cilium/")}
    found = run(previous=published)
    for number in (65537, 65538):
        assert found.keys[keys.identity_key(number)] == first.keys[keys.identity_key(number)]


@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 5)), st.sets(st.sampled_from("abcdef"))),
        min_size=1,
        max_size=8,
    )
)
def test_numbers_and_addresses_never_change_owner(steps: list[tuple[set[int], set[str]]]) -> None:
    """Whatever comes and goes within the quarantine: an owner keeps its number and a number its owner."""
    previous: dict[str, str] = {}
    identities: dict[str, str] = {}
    vips: dict[str, str] = {}
    for present, services in steps:
        record = {"hosts": {"h0": host(0, {f"shop/w{n}": workload(f"10.101.0.{n + 2}", app=str(n)) for n in present})}}
        reports = dict(report("h0", f"w{n}", f"10.101.0.{n + 2}", None) for n in present)
        found = run(record, NODES, reports, dict(definition(name) for name in services), previous)
        previous = found.keys
        for key, value in found.keys.items():
            if (parsed := keys.parse_identity_key(key)) is not None:
                assert identities.setdefault(key, value) == value
                assert 65536 < parsed[1] < 131072
            if keys.parse_vip_key(key) is not None:
                address = json.loads(value)["ipv4"]
                assert vips.setdefault(address, key) == key
                assert IPv4Address(address) in OWN.service_range4
        in_use = [value for key, value in found.keys.items() if keys.parse_identity_key(key)]
        assert len(in_use) == len(set(in_use)) == len(present)


# --- encryption

PUBLIC_KEY = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="


def test_a_key_that_the_host_reports_is_published_with_its_node_and_addresses() -> None:
    nodes = dict([node_report(0, wireguard_public_key=PUBLIC_KEY), node_report(1)])
    found = run(nodes=nodes)
    node = wire.Node.from_json(found.keys[keys.node_key("onprem", "h0")])
    assert (node.wireguard_public_key, node.encryption_key) == (PUBLIC_KEY, 255)
    indexes = {
        pair.host_ip: pair.key
        for key, value in found.keys.items()
        if keys.parse_ip_key(key) and (pair := wire.IPIdentityPair.from_json(value))
    }
    assert indexes == {"198.18.1.10": 255, "198.18.1.11": 0}
    # A silent host keeps what is published of it.
    again = run(nodes=dict([node_report(1)]), previous=found.keys)
    assert again.keys == found.keys


def test_a_second_key_travels_beside_ciliums_field() -> None:
    second = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="
    by_port = {"51872": second, "51871": PUBLIC_KEY, "51873": "no key"}
    nodes = dict([node_report(0, wireguard_public_key=PUBLIC_KEY, wireguard_keys=by_port)])
    node = wire.Node.from_json(run(nodes=nodes).keys[keys.node_key("onprem", "h0")])
    assert node.wireguard_public_key == PUBLIC_KEY
    assert node.annotations[wire.WIREGUARD_KEYS] == f"51871={PUBLIC_KEY},51872={second}"
    assert wire.public_keys(node, 51871) == {51871: PUBLIC_KEY, 51872: second}


@pytest.mark.parametrize("public", ["AAAA", "no key", "A" * 43 + "="])
def test_what_is_no_key_is_named_and_not_published(public: str) -> None:
    nodes = dict([node_report(0, wireguard_public_key=public), node_report(1)])
    found = run(nodes=nodes)
    node = wire.Node.from_json(found.keys[keys.node_key("onprem", "h0")])
    assert (node.wireguard_public_key, node.encryption_key) == ("", 0)
    (problem,) = found.problems
    assert problem.key == keys.node_report_key("h0")
    assert f"the WireGuard public key {public!r}" in problem.reason


@pytest.mark.parametrize(("site", "published"), [("onprem", None), ("hall-2", "hall-2")])
def test_a_host_of_another_site_than_its_cluster_says_so(site: str, published: str | None) -> None:
    record = {**RECORD, "site": "onprem", "hosts": {**RECORD["hosts"], "h0": {**RECORD["hosts"]["h0"], "site": site}}}
    found = run(record=record)
    node = wire.Node.from_json(found.keys[keys.node_key("onprem", "h0")])
    assert node.annotations.get("isthmus.io/site") == published
