# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes are reached through WireGuard, as which peers, and what is refused. Pure."""

from __future__ import annotations

import base64
from ipaddress import ip_address, ip_network
from typing import Any

import agent_mesh as mesh
import pytest
from isthmus_agent.desired.addressing import remotes
from isthmus_agent.desired.compute import Desired, HostFacts, desired
from isthmus_agent.desired.datapath import Route, WireGuardPeer
from isthmus_agent.desired.encryption import BACK, CLOSED, TABLE, encryption
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.desired.reports import node_report
from isthmus_agent.state.model import MeshState
from isthmus_mesh import keys, wire
from isthmus_mesh.encryption import STAGES, Stage
from isthmus_mesh.spec import NodeSpec, SpecError


def key(number: int) -> str:
    return base64.b64encode(bytes([number]) * 32).decode()


OWN_KEY = key(99)
WIREGUARD = {
    "key": "/etc/isthmus/pki/wireguard.key",
    "port": 51871,
    "plain_sites": ["onprem"],
    "sites": {"onprem": "onprem", "cloud": "cloud", "edge": "edge"},
}
SPEC = mesh.spec(wireguard=WIREGUARD)
FIRST, SECOND = BACK.values()
CLOUD, EDGE = ip_address("198.18.2.11"), ip_address("198.18.3.11")


def state(**nodes: wire.Node) -> MeshState:
    """cloud-1 with key 1, edge-1 with key 2 and onprem-2, or what is given under these names."""
    found = mesh.documents({}, sizes={"onprem": 2, "cloud": 1, "edge": 1})
    given = {
        "cloud_1": mesh.node("cloud", 1, wireguard_public_key=key(1)),
        "edge_1": mesh.node("edge", 1, wireguard_public_key=key(2)),
        **nodes,
    }
    for node in given.values():
        found[keys.node_key(node.cluster, node.name, node.cluster != "onprem")] = node.to_json().encode()
    return mesh.state(found)


def computed(found: MeshState, spec: Any = SPEC) -> Desired:
    return desired(spec, found, Reachability({}, frozenset()), HostFacts(public_keys={51871: OWN_KEY}))


def reasons(**nodes: wire.Node) -> dict[str, str]:
    """Why each node that is to be encrypted is no peer."""
    nodes_there, _ = remotes(SPEC, state(**nodes))
    return {name: why for (_, name), why in encryption(SPEC, nodes_there, {51871: OWN_KEY}).nodes.items()}


def test_nothing_is_encrypted_without_a_wireguard_of_the_spec() -> None:
    found = computed(state(), mesh.spec())
    assert (found.datapath.wireguard, found.encrypted) == ((), {})
    assert not [route for route in found.datapath.routes if route.table == TABLE]
    assert not any(entry.is_encrypted for entry in found.datapath.ipcache.values())
    assert {rule.table for rule in found.datapath.rules} == {730}


def test_nodes_of_other_sites_are_peers_with_exactly_their_underlay_addresses() -> None:
    found = computed(state())
    (tunnel,) = found.datapath.wireguard
    assert tunnel.peers == {
        key(1): WireGuardPeer(CLOUD, frozenset({CLOUD})),
        key(2): WireGuardPeer(EDGE, frozenset({EDGE})),
    }
    assert (tunnel.port, tunnel.mtu) == (51871, 1420)
    assert found.encrypted == {("cloud", "cloud-1"): "", ("edge", "edge-1"): ""}
    own, way = ip_address("198.18.1.11"), ip_network("198.18.2.11/32")
    assert Route(way, own, table=TABLE, wireguard="isthmus-wg0") in found.datapath.routes
    assert Route(way, table=TABLE, unreachable=True, metric=CLOSED) in found.datapath.routes
    assert Route(way, table=FIRST.table, wireguard="isthmus-wg0") in found.datapath.routes
    rules = {(rule.table, rule.destination_port, rule.mark) for rule in found.datapath.rules}
    assert rules == {(730, 0, 0), (TABLE, 8472, 0), (FIRST.table, 0, FIRST.mark)}
    for network, closed in (("10.102.0.2/32", True), ("10.102.0.0/28", True), ("10.101.0.18/32", False)):
        assert found.datapath.ipcache[ip_network(network)].is_encrypted is closed, network
    assert found.datapath.peers[CLOUD].is_encrypted
    assert not found.datapath.peers[ip_address("198.18.1.12")].is_encrypted


def test_a_path_through_wireguard_is_80_bytes_smaller() -> None:
    mtu = {str(route.prefix): route.mtu for route in computed(state()).datapath.routes if route.table == 254}
    assert mtu["10.102.0.0/28"] == 1370
    assert mtu["10.101.0.16/28"] == 1450


def test_a_range_that_leads_to_many_nodes_has_the_smallest_mtu_of_them() -> None:
    found = mesh.documents({}, sizes={"onprem": 2, "cloud": 1})
    stray = wire.IPIdentityPair("10.102.9.9", (2 << 16) + 1, str(CLOUD))
    found[keys.ip_key(stray.ip, "cloud")] = stray.to_json().encode()
    (mtu,) = {
        route.mtu
        for route in computed(mesh.state(found)).datapath.routes
        if route.prefix == ip_network("10.102.0.0/16") and route.table == 254
    }
    assert mtu == 1370


@pytest.mark.parametrize(
    ("site", "closed"),
    [("onprem", False), ("cloud", True), ("a-new-one", True), (None, True)],
)
def test_a_node_counts_to_the_site_that_it_publishes_or_else_its_clusters(site: str | None, closed: bool) -> None:
    annotations = {"isthmus.io/site": site} if site is not None else {}
    node = mesh.node("cloud", 1, wireguard_public_key=key(1), annotations=annotations)
    assert (("cloud", "cloud-1") in computed(state(cloud_1=node)).encrypted) is closed


def test_a_node_of_an_unknown_site_is_encrypted() -> None:
    spec = mesh.spec(wireguard={**WIREGUARD, "sites": {}})
    assert ("cloud", "cloud-1") in computed(state(), spec).encrypted


def test_own_nodes_of_another_site_are_encrypted_too() -> None:
    node = mesh.node("onprem", 2, wireguard_public_key=key(3), annotations={"isthmus.io/site": "hall-2"})
    found = computed(state(onprem_2=node))
    assert found.encrypted["onprem", "onprem-2"] == ""


def test_a_node_without_a_usable_key_is_closed_and_named() -> None:
    for public, why in (
        ("", "it publishes no WireGuard key"),
        (base64.b64encode(bytes(32)).decode(), "its WireGuard key is all zero"),
        (base64.b64encode(bytes(31)).decode(), "its WireGuard key has 31 bytes, not 32"),
        ("no key!", "its WireGuard key is not base64"),
        (key(1)[:-2] + "F=", "its WireGuard key is not canonical base64"),
        (OWN_KEY, "its WireGuard key is this host's own"),
    ):
        found = computed(state(cloud_1=mesh.node("cloud", 1, wireguard_public_key=public)))
        assert found.encrypted["cloud", "cloud-1"] == why
        (tunnel,) = found.datapath.wireguard
        assert set(tunnel.peers) == {key(2)}
        assert found.datapath.ipcache[ip_network("10.102.0.2/32")].is_encrypted
        ways = [route for route in found.datapath.routes if route.table == TABLE and CLOUD in route.prefix]
        assert ways == [Route(ip_network("198.18.2.11/32"), table=TABLE, unreachable=True, metric=CLOSED)]


def test_a_key_that_two_claim_is_neithers() -> None:
    assert reasons(edge_1=mesh.node("edge", 1, wireguard_public_key=key(1))) == {
        "cloud-1": "its WireGuard key is that of edge/edge-1 too",
        "edge-1": "its WireGuard key is that of cloud/cloud-1 too",
    }


def test_no_peer_takes_a_key_from_a_node_of_our_own_cluster() -> None:
    own = mesh.node("onprem", 2, wireguard_public_key=key(1), annotations={"isthmus.io/site": "hall-2"})
    assert reasons(onprem_2=own) == {
        "cloud-1": "its WireGuard key is that of onprem/onprem-2 too",
        "edge-1": "",
        "onprem-2": "",
    }


def in_cloud_1s_place() -> wire.Node:
    """A node of own cluster, at another site, with the address of cloud-1."""
    return mesh.node(
        "onprem",
        2,
        wireguard_public_key=key(3),
        annotations={"isthmus.io/site": "hall-2"},
        addresses=(
            wire.NodeAddress("InternalIP", "198.18.2.11"),
            wire.NodeAddress("CiliumInternalIP", "10.101.0.17"),
        ),
    )


def test_an_address_is_one_peers_and_closed_for_all() -> None:
    """Own cluster's counts, as everywhere. The other one is closed, not reached at the wrong place."""
    assert reasons(onprem_2=in_cloud_1s_place())["cloud-1"] == "its address 198.18.2.11 is that of onprem/onprem-2 too"
    found = computed(state(onprem_2=in_cloud_1s_place()))
    (tunnel,) = found.datapath.wireguard
    assert tunnel.peers[key(3)].addresses == {CLOUD}
    assert key(1) not in tunnel.peers


def test_the_report_has_the_public_key() -> None:
    assert node_report(SPEC, HostFacts(public_keys={51871: OWN_KEY})).wireguard_public_key == OWN_KEY


def test_a_key_that_an_agent_could_not_read_yet_is_reported_as_it_was() -> None:
    """Nobody may take a moment's failure at its start for a host without a key, which is cut off."""
    before = mesh.node("onprem", 1, wireguard_public_key=OWN_KEY)
    assert node_report(SPEC, HostFacts(), before).wireguard_public_key == OWN_KEY
    assert node_report(SPEC, HostFacts(public_keys={51871: key(9)}), before).wireguard_public_key == key(9)
    assert node_report(mesh.spec(), HostFacts(), before).wireguard_public_key == ""
    both = node_report(BOTH, HostFacts(public_keys={51872: key(6)}), before)
    assert both.wireguard_keys == {"51871": OWN_KEY, "51872": key(6)}


@pytest.mark.parametrize("opened", [False, True])
def test_what_may_leave_by_other_ways_does_not_when_the_overlay_is_gone(opened: bool) -> None:
    """With masquerading the table of workloads' packets does not end in an unreachable route."""
    document = mesh.spec_document(wireguard=WIREGUARD)
    document["node"]["masquerade"] = opened
    found = computed(state(), NodeSpec.from_dict(document)).datapath.routes
    closed = {Route(ip_network(f"{each}/32"), table=730, unreachable=True, metric=CLOSED) for each in (CLOUD, EDGE)}
    assert {each for each in found if each.table == 730 and each.metric} == (closed if opened else set())


@pytest.mark.parametrize(("word", "sends"), [("accepts", False), ("sends", True)])
def test_while_it_is_turned_on_or_off_both_ways_are_taken(word: str, sends: bool) -> None:
    """At each stage the host is a peer of WireGuard, and the MTU is already or still the smaller one. Only routes lead
    into WireGuard: programs that dropped what goes elsewhere, before the routes are there, would drop everything."""
    found = computed(state(), mesh.spec(wireguard={**WIREGUARD, "changing": {"cloud": word}}))
    (tunnel,) = found.datapath.wireguard
    assert set(tunnel.peers) == {key(1), key(2)}
    assert found.stages == {("cloud", "cloud-1"): STAGES[word], ("edge", "edge-1"): Stage.DEMANDS}
    own, way = ip_address("198.18.1.11"), ip_network("198.18.2.11/32")
    assert (Route(way, own, table=TABLE, wireguard="isthmus-wg0") in found.datapath.routes) is sends
    assert (Route(way, table=TABLE, unreachable=True, metric=CLOSED) in found.datapath.routes) is sends
    assert Route(way, table=FIRST.table, wireguard="isthmus-wg0") in found.datapath.routes
    assert not found.datapath.ipcache[ip_network("10.102.0.2/32")].is_encrypted
    assert not found.datapath.peers[CLOUD].is_encrypted
    assert found.datapath.peers[EDGE].is_encrypted
    mtu = {str(route.prefix): route.mtu for route in found.datapath.routes if route.table == 254}
    assert mtu["10.102.0.0/28"] == 1370


def test_until_it_is_demanded_a_node_without_a_key_is_sent_to_in_clear() -> None:
    for word, closed in (("accepts", False), ("sends", False), ("", True)):
        spec = mesh.spec(wireguard={**WIREGUARD, **({"changing": {"cloud": word}} if word else {})})
        found = computed(state(cloud_1=mesh.node("cloud", 1)), spec)
        assert found.encrypted["cloud", "cloud-1"] == "it publishes no WireGuard key"
        assert found.datapath.ipcache[ip_network("10.102.0.2/32")].is_encrypted is closed
        assert any(route.table == TABLE and CLOUD in route.prefix for route in found.datapath.routes) is closed


def test_an_address_from_which_encryption_is_demanded_is_never_sent_to_in_clear() -> None:
    """Also when a node with which it is only being turned on claims it too."""
    found = computed(
        state(onprem_2=in_cloud_1s_place()), mesh.spec(wireguard={**WIREGUARD, "changing": {"hall-2": "accepts"}})
    )
    assert found.datapath.ipcache[ip_network("10.102.0.2/32")].is_encrypted
    assert found.datapath.peers[CLOUD].is_encrypted


def test_a_spec_with_an_unknown_stage_is_refused() -> None:
    with pytest.raises(SpecError, match=r"changing.cloud is not one of accepts, sends"):
        mesh.spec(wireguard={**WIREGUARD, "changing": {"cloud": "demands"}})


def two_keys(name: str, number: int, **annotations: str) -> wire.Node:
    """A node that publishes key `number` for the first port and `number` + 10 for the second."""
    several = f"51871={key(number)},51872={key(number + 10)}"
    annotations = {wire.WIREGUARD_KEYS: several, **annotations}
    return mesh.node(name, 1, wireguard_public_key=key(number), annotations=annotations)


SECOND_KEY = {"key": "/etc/isthmus/pki/wireguard-1.key", "port": 51872}
BOTH = mesh.spec(wireguard={**WIREGUARD, "second": SECOND_KEY})


def test_while_keys_are_replaced_packets_go_by_one_device_and_are_taken_by_both() -> None:
    found = computed(state(cloud_1=two_keys("cloud", 1)), BOTH)
    first, second = found.datapath.wireguard
    assert [(each.device, each.port) for each in (first, second)] == [("isthmus-wg0", 51871), ("isthmus-wg1", 51872)]
    assert set(first.peers) == {key(1), key(2)}
    assert second.peers == {key(11): WireGuardPeer(CLOUD, frozenset({CLOUD}))}
    ways = {
        (route.table, route.wireguard) for route in found.datapath.routes if CLOUD in route.prefix and route.table > 731
    }
    assert ways == {(TABLE, "isthmus-wg0"), (TABLE, ""), (FIRST.table, "isthmus-wg0"), (SECOND.table, "isthmus-wg1")}
    marks = {(rule.table, rule.mark) for rule in found.datapath.rules if rule.mark}
    assert marks == {(FIRST.table, FIRST.mark), (SECOND.table, SECOND.mark)}
    assert set(found.encrypted.values()) == {""}, "one that has not its second key yet is not cut off"
    assert found.second == {("cloud", "cloud-1"): "", ("edge", "edge-1"): "it publishes no WireGuard key"}


def test_the_other_device_is_sent_through_when_the_specification_says_so() -> None:
    swapped = mesh.spec(wireguard={**WIREGUARD, **SECOND_KEY, "second": {"key": WIREGUARD["key"], "port": 51871}})
    found = computed(state(cloud_1=two_keys("cloud", 1), edge_1=two_keys("edge", 2)), swapped)
    first, second = found.datapath.wireguard
    assert (first.device, set(first.peers)) == ("isthmus-wg1", {key(11), key(12)})
    assert (second.device, set(second.peers)) == ("isthmus-wg0", {key(1), key(2)})
    sent = {route.wireguard for route in found.datapath.routes if route.table == TABLE and not route.unreachable}
    assert sent == {"isthmus-wg1"}


def test_a_second_key_of_another_node_is_neithers_either() -> None:
    stolen = mesh.node("edge", 1, wireguard_public_key=key(11))
    found = computed(state(cloud_1=two_keys("cloud", 1), edge_1=stolen), BOTH)
    assert found.second["cloud", "cloud-1"] == "its WireGuard key is that of edge/edge-1 too"
    assert found.encrypted["edge", "edge-1"] == "its WireGuard key is that of cloud/cloud-1 too"
    assert found.encrypted["cloud", "cloud-1"] == ""


def test_the_report_has_all_keys_by_port_where_one_is_not_on_ciliums() -> None:
    both = {51871: key(5), 51872: key(6)}
    report = node_report(BOTH, HostFacts(public_keys=both))
    assert (report.wireguard_public_key, report.wireguard_keys) == (key(5), {"51871": key(5), "51872": key(6)})
    after = node_report(mesh.spec(wireguard={**WIREGUARD, **SECOND_KEY}), HostFacts(public_keys={51872: key(6)}))
    assert (after.wireguard_public_key, after.wireguard_keys) == (key(6), {"51872": key(6)})
    assert node_report(SPEC, HostFacts(public_keys={51871: key(5)})).wireguard_keys == {}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (None, {51871: key(1)}),
        (f"51872={key(2)}", {51872: key(2)}),
        (f"51871={key(1)},51872={key(2)},51873={key(3)}", {51871: key(1), 51872: key(2)}),
        (f"x={key(2)},51872", {51872: ""}),
        ("", {}),
    ],
)
def test_a_nodes_keys_by_port_are_read_without_trust(said: str | None, found: dict[int, str]) -> None:
    annotations = {} if said is None else {wire.WIREGUARD_KEYS: said}
    node = mesh.node("cloud", 1, wireguard_public_key=key(1), annotations=annotations)
    assert wire.public_keys(node, 51871) == found


def test_a_spec_with_another_port_is_refused() -> None:
    with pytest.raises(SpecError, match=r"port is not one of 51871, 51872"):
        mesh.spec(wireguard={**WIREGUARD, "port": 51820})
