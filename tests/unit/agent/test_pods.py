# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that is a Kubernetes node: what it makes of the published node and pods, and what it leaves to the CNI.

onprem is a Kubernetes cluster here: onprem-1 (this host) and onprem-2 are nodes, onprem-3 is a machine.
"""

from __future__ import annotations

import base64
import random
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, collapse_addresses

import agent_mesh as mesh
import pytest
from isthmus_agent.desired.addressing import CLOSED
from isthmus_agent.desired.compute import Desired, HostFacts, Memory, desired
from isthmus_agent.desired.datapath import MASQUERADED, BarePods, Frontend, IpcacheEntry, KeepSource, Route, Rule
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.desired.reports import backends_here, workload_reports
from isthmus_agent.state.decoder import Decoder
from isthmus_mesh import keys, wire
from isthmus_mesh.documents import Untranslated
from isthmus_mesh.spec import NodeSpec

SOURCE = IPv4Address("10.101.0.1")
SPEC3 = IPv4Address("10.101.0.33")
FIRST = 1 << 16


def net(text: str) -> IPv4Network:
    return IPv4Network(text)


def addr(text: str) -> IPv4Address:
    return IPv4Address(text)


def kube_spec(host: str = "onprem-1", is_node: bool = True, **more: object) -> NodeSpec:
    plain = mesh.spec_document()
    cluster = {
        **plain["cluster"],
        "kubernetes": {"pod_ranges4": ["10.244.0.0/16"], "service_range4": "10.96.0.0/16"},
    }
    number = int(host[-1])
    node = {
        **plain["node"],
        "name": host,
        "underlay4": f"198.18.1.{10 + number}",
        "advertise4": f"198.18.1.{10 + number}",
        "range4": f"10.101.0.{16 * (number - 1)}/28",
        "mesh4": f"10.101.0.{16 * (number - 1) + 1}",
    }
    if is_node:
        node["kubernetes_node"] = f"{host}.kube.test"
    workloads = plain["workloads"] if number == 1 else []
    return mesh.spec(cluster=cluster, node=node, host=host, workloads=workloads, **more)


def kube_node(number: int, cidrs: tuple[str, ...], is_node: bool = True, **changes: object) -> wire.Node:
    said = f"onprem-{number}.kube.test" if is_node else ""
    return mesh.node(
        "onprem",
        number,
        ipv4_secondary_alloc_cidrs=tuple(net(cidr) for cidr in cidrs),
        annotations={"isthmus.io/underlay-mtu": "1500", "isthmus.io/kubernetes-node": said},
        **changes,
    )


def pod(address: str, number: int, identity: int = FIRST + 50) -> wire.IPIdentityPair:
    return wire.IPIdentityPair(address, identity, f"198.18.1.{10 + number}", namespace="shop", pod_name="api-0")


def put(items: dict[str, bytes], pair: wire.IPIdentityPair, cluster: str | None = None) -> None:
    items[keys.ip_key(pair.key_suffix(), cluster)] = pair.to_json().encode()


def documents() -> dict[str, bytes]:
    items = mesh.documents({}, sizes={"onprem": 3, "cloud": 1})
    for node in (
        kube_node(1, ("10.244.1.0/24",)),
        kube_node(2, ("10.244.2.0/24",)),
        kube_node(3, (), is_node=False),
    ):
        items[keys.node_key("onprem", node.name)] = node.to_json().encode()
    put(items, pod("10.244.1.5", 1))
    put(items, pod("10.244.2.7", 2, FIRST + 51))
    return items


def compute(items: dict[str, bytes], spec: NodeSpec | None = None) -> Desired:
    return desired(spec or kube_spec(), mesh.state(items), Reachability(), HostFacts())


def test_pods_of_this_node_are_local_with_their_identity() -> None:
    found = compute(documents())
    assert found.pods.identities == {addr("10.244.1.5"): FIRST + 50}
    datapath = found.datapath
    assert datapath.local[addr("10.244.1.5")] == FIRST + 50
    assert datapath.ipcache[net("10.244.1.5/32")] == IpcacheEntry(FIRST + 50, 1, None, is_cni=True)
    assert datapath.ipcache[net("10.244.2.7/32")] == IpcacheEntry(FIRST + 51, 1, addr("198.18.1.12"), is_cni=True)
    assert addr("10.244.2.7") not in datapath.local
    assert datapath.addresses == {SOURCE, addr("10.101.0.2")}, "pods' addresses are the CNI's"
    assert not found.refused


def test_pods_of_this_node_that_are_left_alone() -> None:
    items = documents()
    for address in ("10.244.1.5", "10.244.2.7", "10.244.1.6"):
        uid = f"uid-of-{address}"
        items[keys.untranslated_key(address)] = Untranslated("shop", "api-0", uid).to_json().encode()
    pod_here = (addr("10.244.1.5"), "uid-of-10.244.1.5")
    assert compute(items).pods.untranslated == {pod_here}, "not another node's, nor one that is not published"
    assert compute(items).datapath.untranslated == frozenset(), "it is not known where it is"
    later = (addr("10.244.1.5"), "uid-of-another-pod")
    for known, cookies in ({pod_here: 77}, {77}), ({later: 78}, set()):
        found = desired(kube_spec(), mesh.state(items), Reachability(), HostFacts(namespaces=known))
        assert found.datapath.untranslated == cookies


def test_what_is_no_address_is_not_left_alone() -> None:
    found = mesh.decoder("onprem")
    for suffix in ("10.244.1.5/24", "web", ""):
        found.put(keys.untranslated_key(suffix), Untranslated("shop", "api-0", "uid").to_json().encode())
    assert found.state().untranslated == {}
    assert list(found.bad) == [keys.untranslated_key("web")]


def test_routes_rules_and_what_is_not_masqueraded_on_a_node() -> None:
    found = compute(documents()).datapath

    def both(prefix: str) -> set[Route]:
        return {Route(net(prefix), SOURCE, 1450, table) for table in (254, 730)}

    assert found.routes == {
        *both("10.101.0.16/28"),
        *both("10.101.0.32/28"),
        *both("10.102.0.0/28"),
        # The way to pods of other nodes is the CNI's, but not for our mesh addresses.
        Route(net("10.244.2.0/24"), SOURCE, 1450, 730),
        Route(net("10.244.1.0/24"), table=730, throw=True),
        Route(net("198.18.1.12/32"), SOURCE, 1450, 730),
        Route(net("198.18.1.13/32"), SOURCE, 1450, 730),
        Route(net("198.18.2.11/32"), SOURCE, 1450, 730),
        # From pods: to machines of the cluster and to other clusters' nodes, not to the cluster's own nodes.
        Route(net("198.18.1.13/32"), SOURCE, 1450, 731),
        Route(net("198.18.2.11/32"), SOURCE, 1450, 731),
        *(Route(each, unreachable=True) for each in (*kube_spec().service_ranges4, *kube_spec().mesh_ranges4)),
        Route(net("0.0.0.0/0"), table=730, unreachable=True),
    }
    assert found.rules == {
        Rule(net("10.101.0.0/28"), 730, 730),
        Rule(net("10.244.1.0/24"), 731, 731),
        Rule(net("0.0.0.0/0"), 254, 728, mark=MASQUERADED),
    }
    assert found.keep_source == KeepSource(
        net("10.101.0.0/28"),
        frozenset({net("10.101.0.0/28"), net("10.244.1.0/24")}),
        pods=frozenset({net("10.244.0.0/16")}),
        # What was masqueraded to where packets from pods are led by table 731 goes on.
        members=frozenset({net("198.18.1.13/32"), net("198.18.2.11/32")}),
    )


WIREGUARD = {
    "key": "/etc/isthmus/pki/wireguard.key",
    "port": 51871,
    "plain_sites": [],
    "sites": {"onprem": "onprem", "cloud": "cloud"},
}
SITES = {"onprem": "onprem", "cloud": "cloud"}


def inside(stage: str, items: dict[str, bytes], spec: NodeSpec | None = None, **more: object) -> Desired:
    """All sites native inside WireGuard at a stage; nodes have keys."""
    native = {"sites": SITES, "stages": {"onprem": stage, "cloud": stage}}
    for number, key in enumerate(sorted(key for key in items if "/nodes/" in key), 1):
        public = base64.b64encode(bytes([number]) * 32).decode()
        items[key] = replace(wire.Node.from_json(items[key]), wireguard_public_key=public).to_json().encode()
    return compute(items, kube_spec(wireguard=WIREGUARD, native=native, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(("stage", "sends"), [("accepts", False), ("sends", True), ("demands", True)])
def test_a_node_that_is_native_inside_wireguard_leads_pods_there(stage: str, sends: bool) -> None:
    found = inside(stage, documents()).datapath
    way: dict[str, object] = {"mtu": 1420, "wireguard": "isthmus-wg0"} if sends else {"mtu": 1370}
    for prefix, tables in (
        ("10.102.0.0/28", {254, 730}),
        ("198.18.2.11/32", {730, 731}),
        ("198.18.1.13/32", {730, 731}),  # a machine of the cluster
        ("198.18.1.12/32", {730}),  # a node of it: the way of pods is the CNI's
        ("10.244.2.0/24", {730}),
    ):
        wanted = {Route(net(prefix), SOURCE, table=table, **way) for table in tables}  # type: ignore[arg-type]
        given = {one for one in found.routes if one.prefix == net(prefix) and one.table in (254, 730, 731)}
        # Without WireGuard's device nothing of a pod goes there in clear.
        closed = {Route(net(prefix), table=731, unreachable=True, metric=CLOSED)} if 731 in tables else set()
        assert given == wanted | closed, prefix
    cni = {str(network) for network, entry in found.ipcache.items() if entry.is_cni}
    assert cni == {
        "10.244.1.0/24",
        "10.244.1.5/32",
        "10.244.2.7/32",
        "10.244.2.0/24",
        "198.18.1.11/32",
        "198.18.1.12/32",
    }
    keep = found.keep_source
    assert keep is not None
    assert keep.bare == BarePods(("isthmus-wg0",), SOURCE, frozenset({addr("198.18.1.11")}))
    assert keep.members == frozenset(), "what was masqueraded ended with encryption"


def test_only_a_node_that_is_native_inside_wireguard_has_rules_for_pods_there() -> None:
    encrypted = compute(documents(), kube_spec(wireguard=WIREGUARD)).datapath.keep_source
    assert encrypted is not None
    assert encrypted.bare is None
    native = {"sites": SITES, "stages": {"cloud": "demands"}}
    machine = compute(documents(), kube_spec("onprem-3", False, wireguard=WIREGUARD, native=native)).datapath
    assert machine.keep_source is not None
    assert machine.keep_source.bare is None
    own = machine.ipcache[net("198.18.1.13/32")]
    assert (own.is_node, own.is_cni) == (True, False), "pods come to it by the mesh alone"


def in_clear(items: dict[str, bytes], spec: NodeSpec | None = None, **stages: str) -> Desired:
    return compute(
        items, replace(spec or kube_spec(), native=mesh.spec(native={"sites": SITES, "stages": stages}).native)
    )


@pytest.mark.parametrize(("stage", "sends"), [("accepts", False), ("sends", True), ("demands", True)])
def test_a_node_that_is_native_in_clear_leads_pods_by_the_underlay(stage: str, sends: bool) -> None:
    found = in_clear(documents(), onprem=stage, cloud=stage).datapath
    for prefix, tables, far in (
        ("10.102.0.0/28", {254, 730}, "198.18.2.11"),
        ("198.18.2.11/32", {730, 731}, "198.18.2.11"),
        ("198.18.1.13/32", {730, 731}, "198.18.1.13"),  # a machine of the cluster
        ("198.18.1.12/32", {730}, "198.18.1.12"),  # a node of it: the way of pods is the CNI's
        ("10.244.2.0/24", {730}, "198.18.1.12"),
    ):
        way: dict[str, object] = {"mtu": 1500, "toward": addr(far)} if sends else {"mtu": 1450}
        wanted = {Route(net(prefix), SOURCE, table=table, **way) for table in tables}  # type: ignore[arg-type]
        given = {one for one in found.routes if one.prefix == net(prefix) and one.table in (254, 730, 731)}
        assert given == wanted, prefix
    # What is not published of this node's pods neither sends nor receives.
    assert found.ipcache[net("10.244.1.0/24")] == IpcacheEntry(2, 1, None, is_fixed=True, is_cni=True)
    keep = found.keep_source
    assert keep is not None
    # All of the mesh but pods of the own Kubernetes cluster, whose source is the CNI's matter.
    ranges = frozenset(collapse_addresses(map(net, ("10.101.0.16/28", "10.101.0.32/28", "10.102.0.0/28"))))
    assert keep.bare == BarePods((), SOURCE, frozenset(), ranges)
    assert keep.members == {net("198.18.1.13/32"), net("198.18.2.11/32")}


def test_of_a_hybrid_site_only_its_own_hosts_have_rules_for_pods() -> None:
    keep = in_clear(documents(), onprem="demands").datapath.keep_source
    assert keep is not None
    assert keep.bare is not None
    assert keep.bare.networks == {net("10.101.0.16/28"), net("10.101.0.32/28")}


def test_pods_of_pools_have_routes_to_where_they_are_whoevers_range_they_are_in() -> None:
    items = documents()
    put(items, wire.IPIdentityPair("10.102.0.17", (2 << 16) + 1, "198.18.2.11"), "cloud")
    items[keys.node_key("cloud", "cloud-2", cached=True)] = mesh.node("cloud", 2).to_json().encode()
    assert mesh.node("cloud", 2).ipv4_alloc_cidr == net("10.102.0.16/28")
    found = in_clear(items, cloud="demands").datapath
    way = {"mtu": 1500, "table": 730}
    assert Route(net("10.102.0.16/28"), SOURCE, toward=addr("198.18.2.12"), **way) in found.routes  # type: ignore[arg-type]
    assert Route(net("10.102.0.17/32"), SOURCE, toward=addr("198.18.2.11"), **way) in found.routes  # type: ignore[arg-type]


def test_a_machine_reaches_pods_natively_in_clear() -> None:
    found = in_clear(documents(), kube_spec("onprem-3", is_node=False), onprem="demands").datapath
    for number in (1, 2):
        way = {"mtu": 1500, "toward": addr(f"198.18.1.1{number}")}
        assert Route(net(f"10.244.{number}.0/24"), SPEC3, table=730, **way) in found.routes  # type: ignore[arg-type]
        # A route of the operator's own goes before.
        assert Route(net(f"10.244.{number}.0/24"), SPEC3, metric=730, **way) in found.routes  # type: ignore[arg-type]
    assert found.keep_source is not None
    assert found.keep_source.bare is None


@pytest.mark.parametrize("stage", ["plain", "demands"])
def test_pods_of_pools_are_allowed_ips_and_routes_one_by_one(stage: str) -> None:
    items = _pools(documents())
    put(items, pod("10.244.9.4", 2))
    put(items, pod("10.244.9.5", 2))
    put(items, pod("10.244.1.77", 1))
    put(items, wire.IPIdentityPair("10.102.77.5", (2 << 16) + 1, "198.18.2.11"), "cloud")
    found = inside(stage, items).datapath
    (device,) = found.wireguard
    allowed = {str(one) for peer in device.peers.values() for one in (*peer.addresses, *peer.ranges)}
    strays = {"10.244.9.4/31", "10.244.2.7", "10.102.77.5"}
    assert (strays <= allowed) is (stage == "demands")
    assert "10.244.1.77" not in allowed
    over = {str(one.prefix) for one in found.routes if one.wireguard and one.table == 730}
    assert ({"10.244.9.4/31", "10.244.2.7/32", "10.102.77.5/32"} <= over) is (stage == "demands")
    assert Route(net("10.102.77.5/32"), SOURCE, 1420, 254, wireguard="isthmus-wg0") in found.routes or stage == "plain"


def test_what_was_masqueraded_ends_where_nothing_may_go_in_clear() -> None:
    wireguard = {
        "key": "/etc/isthmus/pki/wireguard.key",
        "port": 51871,
        "plain_sites": ["onprem"],
        "sites": {"onprem": "onprem", "cloud": "cloud"},
    }
    for stages, ends in (({}, True), ({"changing": {"cloud": "accepts"}}, False)):
        found = compute(documents(), kube_spec(wireguard={**wireguard, **stages})).datapath
        assert found.keep_source is not None
        assert (net("198.18.2.11/32") not in found.keep_source.members) is ends
        assert net("198.18.1.13/32") in found.keep_source.members
        assert Route(net("198.18.2.11/32"), SOURCE, 1370, 731) in found.routes


def test_what_was_masqueraded_goes_through_the_sites_gateway_as_everything_else() -> None:
    ipsec = {
        "sites": {"onprem": "onprem", "cloud": "cloud"},
        "networks": ["198.18.1.0/24"],
        "far": {"cloud": {"stage": "demands", "networks": ["198.18.2.0/24"]}},
        "via": "198.18.1.12",
    }
    found = compute(documents(), kube_spec(ipsec=ipsec)).datapath
    marked = sorted((rule.priority, rule.table) for rule in found.rules if rule.mark)
    assert marked == [(727, 736), (728, 254)]
    assert all(rule.mark == MASQUERADED for rule in found.rules if rule.mark)


def test_a_host_that_does_not_say_what_it_is_counts_as_a_node() -> None:
    items = documents()
    items[keys.node_key("onprem", "onprem-3")] = mesh.node("onprem", 3).to_json().encode()
    tables = {route.table for route in compute(items).datapath.routes if route.prefix == net("198.18.1.13/32")}
    assert tables == {730}


def test_a_machine_of_the_cluster_reaches_pods_over_the_overlay() -> None:
    found = compute(documents(), kube_spec("onprem-3", is_node=False)).datapath
    source = addr("10.101.0.33")
    for prefix in ("10.244.1.0/24", "10.244.2.0/24"):
        # An operator's own route to the pods of his cluster goes before.
        assert Route(net(prefix), source, 1450, 254, metric=730) in found.routes
        assert Route(net(prefix), source, 1450, 730) in found.routes
    assert Route(net("10.102.0.0/28"), source, 1450, 254) in found.routes
    assert not any(route.table == 731 or route.throw for route in found.routes)
    assert found.rules == {Rule(net("10.101.0.32/28"), 730, 730)}
    assert found.keep_source is not None
    assert found.keep_source.precaution
    assert addr("10.244.1.5") not in found.local


def test_another_cluster_reaches_pods_over_the_overlay() -> None:
    items = mesh.documents({}, own="cloud", sizes={"onprem": 3, "cloud": 1})
    items[keys.node_key("onprem", "onprem-1", cached=True)] = kube_node(1, ("10.244.1.0/24",)).to_json().encode()
    put(items, pod("10.244.1.5", 1), "onprem")
    plain = mesh.spec_document()
    spec = mesh.spec(
        host="cloud-1",
        cluster={**plain["cluster"], "name": "cloud", "id": 2, "workload_ranges4": ["10.102.0.0/16"]},
        node={
            **plain["node"],
            "name": "cloud-1",
            "underlay4": "198.18.2.11",
            "advertise4": "198.18.2.11",
            "range4": "10.102.0.0/28",
            "mesh4": "10.102.0.1",
        },
        workloads=[],
    )
    found = desired(spec, mesh.state(items, own="cloud"), Reachability(), HostFacts()).datapath
    assert found.ipcache[net("10.244.1.5/32")] == IpcacheEntry(FIRST + 50, 1, addr("198.18.1.11"))
    assert found.ipcache[net("10.244.1.0/24")] == IpcacheEntry(2, 1, addr("198.18.1.11"))
    for table in (254, 730):
        assert Route(net("10.244.1.0/24"), addr("10.102.0.1"), 1450, table) in found.routes


def test_pods_outside_the_nodes_cidrs_are_taken_as_well() -> None:
    """CNIs that deal addresses from pools of their own: Calico, those of clouds."""
    items = documents()
    items[keys.node_key("onprem", "onprem-1")] = kube_node(1, ()).to_json().encode()
    for last in (4, 5, 9):
        put(items, pod(f"10.244.77.{last}", 1))
    del items[keys.ip_key("10.244.1.5")]
    found = compute(items)
    wanted = {net("10.244.77.4/31"), net("10.244.77.9/32")}
    assert set(found.pods.ranges) == wanted
    assert {rule.source for rule in found.datapath.rules if rule.table == 731} == wanted
    assert {route.prefix for route in found.datapath.routes if route.throw} == wanted


def _pools(items: dict[str, bytes]) -> dict[str, bytes]:
    """The cluster's CNI deals addresses from pools of its own: the nodes have no pod CIDR."""
    for number in (1, 2):
        items[keys.node_key("onprem", f"onprem-{number}")] = kube_node(number, ()).to_json().encode()
    return items


def test_a_range_that_is_not_dealt_by_node_is_led_over_the_overlay_as_a_whole() -> None:
    pods = net("10.244.0.0/16")
    here = compute(_pools(documents())).datapath
    assert {route for route in here.routes if route.prefix == pods} == {Route(pods, SOURCE, 1450, 730)}, "the CNI's"
    assert Route(net("10.244.1.5/32"), table=730, throw=True) in here.routes
    machine = compute(_pools(documents()), kube_spec("onprem-3", is_node=False)).datapath
    assert {route for route in machine.routes if route.prefix == pods} == {
        Route(pods, addr("10.101.0.33"), 1450, 254, metric=730),
        Route(pods, addr("10.101.0.33"), 1450, 730),
    }


def test_a_peers_range_that_is_not_dealt_by_node_is_led_over_the_overlay_as_a_whole() -> None:
    items = documents()
    before = compute(items).datapath.routes
    wide = net("10.102.0.0/16")
    assert Route(wide, unreachable=True) in before
    put(items, wire.IPIdentityPair("10.102.77.5", (2 << 16) + 1, "198.18.2.11"), "cloud")
    after = compute(items).datapath.routes
    assert after == before - {Route(wide, unreachable=True)} | {
        Route(wide, SOURCE, 1450, 254),
        Route(wide, SOURCE, 1450, 730),
    }
    # Of a node that is not known nothing is made, and an address that moved within the cluster is no pool.
    del items[keys.ip_key("10.102.77.5", "cloud")]
    put(items, wire.IPIdentityPair("10.102.77.5", (2 << 16) + 1, "198.18.2.99"), "cloud")
    put(items, pod("10.101.0.40", 2))
    assert compute(items).datapath.routes == before


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        (pod("10.244.1.6", 2), "of another node"),
        (pod("10.99.0.6", 1), "in no pod range"),
        (pod("10.244.1.6", 1, 2), "world"),
        (wire.IPIdentityPair("10.244.1.16", FIRST + 1, "198.18.1.11", prefix_length=28), "a prefix"),
        (wire.IPIdentityPair("fd00:244::6", FIRST + 1, "198.18.1.11"), "IPv6"),
    ],
)
def test_what_is_no_pod_of_this_node(pair: wire.IPIdentityPair, why: str) -> None:
    items = documents()
    put(items, pair)
    found = compute(items)
    assert set(found.pods.identities) == {addr("10.244.1.5")}, why
    assert set(found.datapath.local) == {SOURCE, addr("10.101.0.2"), addr("198.18.1.11"), addr("10.244.1.5")}


def test_a_host_that_is_no_node_has_no_pods() -> None:
    found = compute(documents(), kube_spec(is_node=False))
    assert not found.pods.identities
    assert not found.pods.ranges
    keep = found.datapath.keep_source
    assert keep is not None
    assert (keep.precaution, keep.pods, keep.members) == (True, frozenset(), frozenset())


def test_no_peer_takes_an_address_of_our_pods() -> None:
    items = documents()
    for claimed in ("10.244.1.5", "10.244.1.99", "10.244.200.1"):
        put(items, wire.IPIdentityPair(claimed, (2 << 16) + 1, "198.18.2.11"), "cloud")
    put(items, wire.IPIdentityPair("10.244.0.0", (2 << 16) + 1, "198.18.2.11", prefix_length=15), "cloud")
    found = compute(items).datapath
    assert found.ipcache[net("10.244.1.5/32")] == IpcacheEntry(FIRST + 50, 1, None, is_cni=True)
    assert {each for each in found.ipcache if each.overlaps(net("10.244.0.0/16"))} == {
        net("10.244.1.5/32"),
        net("10.244.2.7/32"),
        net("10.244.2.0/24"),
    }


@pytest.mark.parametrize(
    "claim",
    [
        {"ipv4_secondary_alloc_cidrs": (IPv4Network("10.244.1.128/25"),)},
        {"ipv4_secondary_alloc_cidrs": (IPv4Network("10.244.9.0/24"),)},
        {"ipv4_secondary_alloc_cidrs": (IPv4Network("10.244.0.0/15"),)},
        {"addresses": (wire.NodeAddress("InternalIP", "10.244.1.5"),)},
        {
            "addresses": (
                wire.NodeAddress("InternalIP", "198.18.2.11"),
                wire.NodeAddress("CiliumInternalIP", "10.244.9.9"),
            )
        },
    ],
)
def test_a_peers_node_that_claims_our_pods_is_refused_and_named(claim: dict[str, object]) -> None:
    items = documents()
    items[keys.node_key("cloud", "cloud-1", cached=True)] = mesh.node("cloud", 1, **claim).to_json().encode()
    found = compute(items)
    assert len(found.refused) == 1
    assert "node cloud/cloud-1 claims 10.24" in found.refused[0]
    assert "our pods" in found.refused[0]
    assert not any(route.prefix.overlaps(net("10.102.0.0/28")) and route.mtu for route in found.datapath.routes)


def test_a_node_of_our_own_cluster_takes_no_cidr_of_this_node() -> None:
    items = documents()
    items[keys.node_key("onprem", "onprem-2")] = kube_node(2, ("10.244.1.0/25",)).to_json().encode()
    assert compute(items).refused == ("node onprem/onprem-2 claims 10.244.1.0/25, which holds addresses of our pods",)


def test_a_cidr_outside_the_pod_ranges_is_named() -> None:
    items = documents()
    items[keys.node_key("onprem", "onprem-1")] = kube_node(1, ("10.55.1.0/24",)).to_json().encode()
    found = compute(items)
    assert set(found.pods.ranges) == {net("10.244.1.5/32")}
    assert "10.55.1.0/24 lies outside the cluster's pod ranges" in found.refused[0]
    assert "kubernetes.pod_ranges" in found.refused[0]


def test_nothing_is_reported_of_pods() -> None:
    """Whether a pod is ready is Kubernetes' to say."""
    items = documents()
    state = mesh.state(items)
    spec = kube_spec()
    assert {key.workload for key in backends_here(spec, state)} == {("shop", "web")}
    assert set(workload_reports(spec, state, HostFacts(), {}, {})) == {keys.workload_key("onprem-1", "shop", "web")}


def test_a_service_of_kubernetes_has_its_cluster_ip_and_local_and_remote_backends() -> None:
    items = documents()
    service = wire.ClusterService(
        cluster="onprem",
        namespace="shop",
        name="api",
        cluster_id=1,
        frontends={"10.96.0.40": {"http": wire.L4Addr("TCP", 80)}},
        backends={"10.244.1.5": {"http": wire.L4Addr("TCP", 8080)}},
    )
    items[keys.service_key("onprem", "shop", "api")] = service.to_json().encode()
    remote = wire.ClusterService(
        cluster="cloud",
        namespace="shop",
        name="api",
        cluster_id=2,
        backends={"10.102.0.2": {"http": wire.L4Addr("TCP", 8081)}},
    )
    items[keys.service_key("cloud", "shop", "api", cached=True)] = remote.to_json().encode()
    items[keys.vip_key("shop", "api")] = b'{"ipv4":"10.96.0.40","ipv6":null,"released":null,"by":"kubernetes"}'
    found = compute(items)
    service_here = found.datapath.services[Frontend(addr("10.96.0.40"), 80, 6)]
    assert [str(backend.address) for backend in service_here.backends] == ["10.244.1.5", "10.102.0.2"]
    assert found.names["api.shop.svc.clusterset.local"] == addr("10.96.0.40")


def test_after_300_quick_changes_nothing_stale_is_left() -> None:
    """Pods start, die, and their addresses go to other pods, in small steps; every step's result is checked against
    what is published then, and the memory of earlier steps must not matter."""
    chance = random.Random(20)  # noqa: S311
    items = documents()
    decoder: Decoder = mesh.decoder()
    for key, value in items.items():
        decoder.put(key, value)
    memory = Memory()
    spec = kube_spec()
    published = {"10.244.1.5": pod("10.244.1.5", 1), "10.244.2.7": pod("10.244.2.7", 2, FIRST + 51)}
    for _ in range(300):
        for _ in range(chance.randint(1, 4)):
            address = f"10.244.{chance.choice((1, 2, 77))}.{chance.randint(2, 9)}"
            if address in published and chance.random() < 0.5:
                del published[address]
                decoder.delete(keys.ip_key(address))
            else:
                published[address] = pod(address, chance.choice((1, 2)), FIRST + chance.randint(1, 9))
                decoder.put(keys.ip_key(address), published[address].to_json().encode())
        found = desired(spec, decoder.state(), Reachability(), HostFacts(), memory)
        again = desired(spec, decoder.state(), Reachability(), HostFacts())
        assert found.datapath == again.datapath
        here = {addr(ip): pair.identity for ip, pair in published.items() if pair.host_ip == "198.18.1.11"}
        known = {key: value for key, value in found.datapath.local.items() if key in net("10.244.0.0/16")}
        assert known == here
        cached = {
            str(network.network_address): (entry.identity, entry.tunnel)
            for network, entry in found.datapath.ipcache.items()
            if network.prefixlen == 32 and network.subnet_of(net("10.244.0.0/16"))
        }
        assert cached == {
            ip: (pair.identity, None if addr(ip) in here else addr(pair.host_ip)) for ip, pair in published.items()
        }
        outside = [net(str(ip)) for ip in here if ip not in net("10.244.1.0/24")]
        assert found.pods.ranges == tuple(collapse_addresses([net("10.244.1.0/24"), *outside]))


def test_what_hangs_on_the_pods_ranges_is_kept_while_they_are_the_same() -> None:
    """A pod's change must not cost the routes of a mesh of thousands of nodes."""
    memory = Memory()
    items = documents()
    decoder = mesh.decoder()
    for key, value in items.items():
        decoder.put(key, value)
    spec = kube_spec()
    before = desired(spec, decoder.state(), Reachability(), HostFacts(), memory)
    decoder.put(keys.ip_key("10.244.1.8"), pod("10.244.1.8", 1).to_json().encode())
    after = desired(spec, decoder.state(), Reachability(), HostFacts(), memory)
    assert addr("10.244.1.8") in after.datapath.local
    assert after.datapath.routes is before.datapath.routes
