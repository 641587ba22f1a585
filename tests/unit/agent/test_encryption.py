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
from isthmus_agent.desired.encryption import BACK_TABLE, CLOSED, DECRYPTED, TABLE, encryption
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.desired.reports import node_report
from isthmus_agent.state.model import MeshState
from isthmus_mesh import keys, wire
from isthmus_mesh.encryption import STAGES, Stage
from isthmus_mesh.spec import SpecError


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
    return desired(spec, found, Reachability({}, frozenset()), HostFacts(public_key=OWN_KEY))


def reasons(**nodes: wire.Node) -> dict[str, str]:
    """Why each node that is to be encrypted is no peer."""
    nodes_there, _ = remotes(SPEC, state(**nodes))
    return {name: why for (_, name), why in encryption(SPEC, nodes_there, OWN_KEY).nodes.items()}


def test_nothing_is_encrypted_without_a_wireguard_of_the_spec() -> None:
    found = computed(state(), mesh.spec())
    assert (found.datapath.wireguard, found.encrypted) == (None, {})
    assert not [route for route in found.datapath.routes if route.table == TABLE]
    assert not any(entry.is_encrypted for entry in found.datapath.ipcache.values())
    assert {rule.table for rule in found.datapath.rules} == {730}


def test_nodes_of_other_sites_are_peers_with_exactly_their_underlay_addresses() -> None:
    found = computed(state())
    assert found.datapath.wireguard is not None
    assert found.datapath.wireguard.peers == {
        key(1): WireGuardPeer(CLOUD, frozenset({CLOUD})),
        key(2): WireGuardPeer(EDGE, frozenset({EDGE})),
    }
    assert (found.datapath.wireguard.port, found.datapath.wireguard.mtu) == (51871, 1420)
    assert found.encrypted == {("cloud", "cloud-1"): "", ("edge", "edge-1"): ""}
    own, way = ip_address("198.18.1.11"), ip_network("198.18.2.11/32")
    assert Route(way, own, table=TABLE, wireguard=True) in found.datapath.routes
    assert Route(way, table=TABLE, unreachable=True, metric=CLOSED) in found.datapath.routes
    assert Route(way, table=BACK_TABLE, wireguard=True) in found.datapath.routes
    rules = {(rule.table, rule.destination_port, rule.mark) for rule in found.datapath.rules}
    assert rules == {(730, 0, 0), (TABLE, 8472, 0), (BACK_TABLE, 0, DECRYPTED)}
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
        assert found.datapath.wireguard is not None
        assert set(found.datapath.wireguard.peers) == {key(2)}
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
    assert found.datapath.wireguard is not None
    assert found.datapath.wireguard.peers[key(3)].addresses == {CLOUD}
    assert key(1) not in found.datapath.wireguard.peers


def test_the_report_has_the_public_key() -> None:
    assert node_report(SPEC, HostFacts(public_key=OWN_KEY)).wireguard_public_key == OWN_KEY


@pytest.mark.parametrize(("word", "sends"), [("accepts", False), ("sends", True)])
def test_while_it_is_turned_on_or_off_both_ways_are_taken(word: str, sends: bool) -> None:
    """At each stage the host is a peer of WireGuard, and the MTU is already or still the smaller one."""
    found = computed(state(), mesh.spec(wireguard={**WIREGUARD, "changing": {"cloud": word}}))
    assert found.datapath.wireguard is not None
    assert set(found.datapath.wireguard.peers) == {key(1), key(2)}
    assert found.stages == {("cloud", "cloud-1"): STAGES[word], ("edge", "edge-1"): Stage.DEMANDS}
    own, way = ip_address("198.18.1.11"), ip_network("198.18.2.11/32")
    assert (Route(way, own, table=TABLE, wireguard=True) in found.datapath.routes) is sends
    assert (Route(way, table=TABLE, unreachable=True, metric=CLOSED) in found.datapath.routes) is sends
    assert Route(way, table=BACK_TABLE, wireguard=True) in found.datapath.routes
    assert found.datapath.ipcache[ip_network("10.102.0.2/32")].is_encrypted is sends
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
