# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes are reached without a tunnel: routes, MTU, what the programs let by, stage by stage. Pure."""

from __future__ import annotations

import base64
from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import agent_mesh as mesh
import pytest
from isthmus_agent.desired.addressing import MAIN, NATIVE, NATIVE_RULE_PRIORITY, NATIVE_TABLE, TABLE
from isthmus_agent.desired.compute import Desired, HostFacts, desired
from isthmus_agent.desired.datapath import KeepSource, Native, Route, Rule
from isthmus_agent.desired.reach import Reachability
from isthmus_mesh import keys, wire
from isthmus_mesh.encryption import STAGES, Stage
from isthmus_mesh.spec import NodeSpec, SpecError

SITES = {"onprem": "onprem", "cloud": "cloud", "edge": "edge"}
CLOUD = ip_address("198.18.2.11")
SOURCE = ip_address("10.101.0.1")
WIREGUARD = {"key": "k", "port": 51871, "plain_sites": ["onprem", "edge"], "sites": SITES}
CLOUD_KEY = base64.b64encode(bytes([1]) * 32).decode()
EDGE_KEY = base64.b64encode(bytes([2]) * 32).decode()


def spec(stage: str | None, **more: Any) -> NodeSpec:
    """With the hosts of cloud at a stage."""
    return mesh.spec(**({} if stage is None else {"native": {"sites": SITES, "stages": {"cloud": stage}}}), **more)


def computed(own: NodeSpec, underlay: int = 1500, **node: Any) -> Desired:
    """onprem-2, cloud-1 and edge-1 around us; `node` are fields of cloud-1."""
    found = mesh.documents({}, sizes={"onprem": 2, "cloud": 1, "edge": 1})
    cloud = mesh.node("cloud", 1, **node)
    found[keys.node_key("cloud", cloud.name, True)] = cloud.to_json().encode()
    return desired(own, mesh.state(found), Reachability({}, frozenset()), HostFacts(underlay))


AT_EACH_STAGE = pytest.mark.parametrize(
    ("word", "sends", "takes", "refuses_the_tunnel"),
    [
        ("plain", False, False, False),
        ("accepts", False, True, False),
        ("sends", True, True, False),
        ("demands", True, True, True),
    ],
)


def routes(found: Desired, prefix: str, table: int) -> set[Route]:
    return {one for one in found.datapath.routes if one.prefix == ip_network(prefix) and one.table == table}


def test_without_native_in_the_spec_everything_is_as_it_was() -> None:
    plain, found = computed(mesh.spec()), computed(spec("plain"))
    assert plain.datapath.native is None
    assert (plain.datapath.routes, plain.datapath.rules) == (found.datapath.routes, found.datapath.rules)
    assert not any(one.is_native for one in plain.datapath.ipcache.values())
    assert not any(one.is_native for one in plain.datapath.peers.values())
    assert not any(one.toward for one in plain.datapath.routes)


def test_a_node_of_a_native_site_is_reached_as_its_underlay_address_is() -> None:
    found = computed(spec("demands"))
    assert found.datapath.native == Native(IPv4Address("198.18.1.11"), changing=False)
    for table in (MAIN, TABLE):
        assert routes(found, "10.102.0.0/28", table) == {
            Route(ip_network("10.102.0.0/28"), SOURCE, 1500, table, toward=CLOUD)
        }
    assert routes(found, "198.18.2.11/32", TABLE) == {
        Route(ip_network("198.18.2.11/32"), SOURCE, 1500, TABLE, toward=CLOUD)
    }
    assert routes(found, "10.101.0.16/28", MAIN) == {Route(ip_network("10.101.0.16/28"), SOURCE, 1450, MAIN)}
    assert not routes(found, "10.102.0.0/28", NATIVE_TABLE)
    assert {rule.table for rule in found.datapath.rules} == {TABLE}
    for network, native in (("10.102.0.2/32", True), ("10.102.0.0/28", True), ("198.18.2.11/32", True)):
        assert found.datapath.ipcache[ip_network(network)].is_native is native, network
    for network in ("10.101.0.18/32", "10.103.0.2/32", "10.101.0.2/32", "198.18.1.11/32"):
        assert not found.datapath.ipcache[ip_network(network)].is_native, network
    assert {str(address) for address, peer in found.datapath.peers.items() if peer.is_native} == {"198.18.2.11"}
    assert found.native == {("cloud", "cloud-1"): Stage.DEMANDS}


@pytest.mark.parametrize(("own", "other", "mtu"), [(1500, 1500, 1500), (9000, 1500, 1500), (1400, 9000, 1400)])
def test_the_mtu_of_a_native_path_is_that_of_the_smaller_underlay(own: int, other: int, mtu: int) -> None:
    found = computed(spec("demands"), own, mtu=other)
    assert {one.mtu for one in routes(found, "10.102.0.0/28", MAIN)} == {mtu}


@AT_EACH_STAGE
def test_neighbouring_stages_understand_each_other(
    word: str, sends: bool, takes: bool, refuses_the_tunnel: bool
) -> None:
    """Of two hosts at stages beside each other, what one sends the other takes."""
    found = computed(spec(word)).datapath
    (route,) = {one for one in found.routes if one.prefix == ip_network("10.102.0.0/28") and one.table == MAIN}
    assert (route.toward is not None) is sends
    assert found.ipcache[ip_network("10.102.0.2/32")].is_native is takes
    assert found.peers[CLOUD].is_native is refuses_the_tunnel
    for neighbour in (Stage(max(0, STAGES[word] - 1)), Stage(min(3, STAGES[word] + 1))):
        there = computed(spec(neighbour.word)).datapath
        if sends:
            assert there.ipcache[ip_network("10.102.0.2/32")].is_native
        else:
            assert not there.peers[CLOUD].is_native


def test_while_it_is_turned_on_the_mark_leads_the_way_back_and_a_proof_out() -> None:
    found = computed(spec("accepts"))
    way = Route(ip_network("10.102.0.0/28"), SOURCE, 1500, NATIVE_TABLE, toward=CLOUD)
    assert routes(found, "10.102.0.0/28", NATIVE_TABLE) == {way}
    assert Rule(ip_network("0.0.0.0/0"), NATIVE_TABLE, NATIVE_RULE_PRIORITY, mark=NATIVE) in found.datapath.rules
    assert found.datapath.native is not None
    assert found.datapath.native.changing


@pytest.mark.parametrize("site", ["onprem", "elsewhere"])
def test_a_node_that_publishes_another_site_is_of_that(site: str) -> None:
    found = computed(spec("demands"), annotations={"isthmus.io/site": site})
    assert found.native == {}


@pytest.mark.parametrize(
    ("encryption", "native", "sends", "takes"),
    [
        ("demands", "demands", False, False),
        ("sends", "demands", False, True),
        ("accepts", "demands", True, True),
        ("accepts", "accepts", False, True),
    ],
)
def test_what_is_to_be_encrypted_is_never_sent_natively_in_clear(
    encryption: str, native: str, sends: bool, takes: bool
) -> None:
    found = inside(native, encryption).datapath
    (route,) = {one for one in found.routes if one.prefix == ip_network("10.102.0.0/28") and one.table == MAIN}
    assert (route.toward is not None) is sends
    assert found.ipcache[ip_network("10.102.0.2/32")].is_native is takes
    assert found.ipcache[ip_network("10.102.0.2/32")].is_inside is (encryption == "demands")
    assert bool(route.wireguard) is (encryption == "demands")
    assert not found.peers[CLOUD].is_native or sends or route.wireguard


def inside(stage: str | None, encryption: str = "demands", **node: Any) -> Desired:
    """With the hosts of cloud at stages of native routing and of encryption."""
    changing = {} if encryption == "demands" else {"changing": {"cloud": encryption}}
    own = spec(stage, wireguard={**WIREGUARD, **changing})
    return computed(own, wireguard_public_key=CLOUD_KEY, **node)


@AT_EACH_STAGE
def test_a_node_of_a_native_site_with_encryption_is_reached_inside_wireguard(
    word: str, sends: bool, takes: bool, refuses_the_tunnel: bool
) -> None:
    """At no stage may anything come or go in clear, and what it has are allowed IPs where it may send so."""
    found = inside(word).datapath
    prefix = ip_network("10.102.0.0/28")
    way: dict[str, Any] = {"mtu": 1420, "wireguard": "isthmus-wg0"} if sends else {"mtu": 1370}
    for table in (MAIN, TABLE):
        assert {one for one in found.routes if one.prefix == prefix and one.table == table} == {
            Route(prefix, SOURCE, table=table, **way)
        }
    back = {one for one in found.routes if one.prefix == prefix and one.table == 733}
    assert back == ({Route(prefix, table=733, wireguard="isthmus-wg0")} if takes else set())
    proven = {one for one in found.routes if one.prefix == prefix and one.table == NATIVE_TABLE}
    assert proven == (
        {Route(prefix, SOURCE, 1420, NATIVE_TABLE, wireguard="isthmus-wg0")} if takes and not sends else set()
    )
    for network in ("10.102.0.2/32", "10.102.0.0/28", "198.18.2.11/32"):
        entry = found.ipcache[ip_network(network)]
        assert (entry.is_encrypted, entry.is_native, entry.is_inside) == (True, False, takes)
    assert not found.ipcache[ip_network("10.101.0.18/32")].is_inside
    assert (found.peers[CLOUD].is_encrypted, found.peers[CLOUD].is_native) == (True, refuses_the_tunnel)
    (device,) = found.wireguard
    assert device.peers[CLOUD_KEY].addresses == {CLOUD}
    assert device.peers[CLOUD_KEY].ranges == ({prefix} if takes else set())
    assert Rule(ip_network("0.0.0.0/0"), 733, 726, mark=0x49) in found.rules or not takes
    assert found.native is None or found.native.inside == ({CLOUD} if takes else set())
    assert not any(one.toward for one in found.routes)


def test_rules_for_what_comes_natively_inside_wireguard_are_there_only_with_it() -> None:
    assert not [one for one in inside(None).datapath.rules if one.priority == 726]
    own = spec("demands", wireguard={**WIREGUARD, "plain_sites": ["onprem", "edge", "cloud"]})
    assert not [one for one in computed(own).datapath.rules if one.priority == 726]


def with_claim(more: str, stages: dict[str, str]) -> Desired:
    """cloud-1 and edge-1 at stages inside WireGuard, of which edge-1 says that it has a range `more`."""
    found = mesh.documents({}, sizes={"onprem": 1, "cloud": 1, "edge": 1})
    for cluster, key in (("cloud", CLOUD_KEY), ("edge", EDGE_KEY)):
        node = mesh.node(cluster, 1, wireguard_public_key=key)
        if cluster == "edge":
            node = replace(node, ipv4_secondary_alloc_cidrs=(ip_network(more),))
        found[keys.node_key(cluster, node.name, True)] = node.to_json().encode()
    own = mesh.spec(
        native={"sites": SITES, "stages": stages},
        wireguard={**WIREGUARD, "plain_sites": ["onprem"]},
    )
    return desired(own, mesh.state(found), Reachability({}, frozenset()), HostFacts(1500))


@pytest.mark.parametrize("more", ["10.102.0.0/28", "10.102.0.8/29", "10.102.0.0/24"])
def test_a_range_that_two_nodes_claim_is_the_later_ones(more: str) -> None:
    """Of the peers' nodes cloud comes before edge, whatever each says."""
    wanted = with_claim(more, {"cloud": "demands", "edge": "demands"})
    assert wanted.encrypted[("edge", "edge-1")] == ""
    assert "holds addresses of edge/edge-1 too" in wanted.encrypted[("cloud", "cloud-1")]
    (device,) = wanted.datapath.wireguard
    assert set(device.peers) == {EDGE_KEY}
    assert wanted.refused == ()


def test_whose_range_another_claims_stays_in_the_tunnel_while_native_is_tried() -> None:
    """WireGuard takes no native packet to or from it, so that who proves the native way sees that it fails."""
    wanted = with_claim("10.102.0.0/24", {"cloud": "accepts", "edge": "demands"})
    assert wanted.encrypted == {("cloud", "cloud-1"): "", ("edge", "edge-1"): ""}
    (device,) = wanted.datapath.wireguard
    assert (device.peers[CLOUD_KEY].addresses, device.peers[CLOUD_KEY].ranges) == ({CLOUD}, set())
    (words,) = wanted.refused
    assert words.startswith("node cloud/cloud-1 is not taken natively: its range 10.102.0.0/28 holds addresses of edge")
    assert {one.wireguard for one in routes(wanted, "10.102.0.0/28", NATIVE_TABLE)} == {"isthmus-wg0"}
    assert {one.wireguard for one in routes(wanted, "10.102.0.0/28", MAIN)} == {""}


@pytest.mark.parametrize("stage", ["accepts", "demands"])
def test_an_address_from_which_encryption_is_demanded_is_never_native(stage: str) -> None:
    """Also when a node of a native site claims it too."""
    found = mesh.documents({}, sizes={"onprem": 2, "cloud": 1})
    rival = mesh.node(
        "onprem",
        2,
        wireguard_public_key=CLOUD_KEY,
        annotations={"isthmus.io/site": "hall"},
        addresses=(
            wire.NodeAddress("InternalIP", str(CLOUD)),
            wire.NodeAddress("CiliumInternalIP", "10.101.0.17"),
        ),
    )
    found[keys.node_key("onprem", rival.name)] = rival.to_json().encode()
    own = spec(stage, wireguard={**WIREGUARD, "plain_sites": ["cloud", "edge", "onprem"]})
    wanted = desired(own, mesh.state(found), Reachability({}, frozenset()), HostFacts(1500))
    assert not any(one.toward for one in wanted.datapath.routes)
    assert not any(one.is_native for one in wanted.datapath.ipcache.values())
    assert not any(one.is_native for one in wanted.datapath.peers.values())
    assert wanted.datapath.ipcache[ip_network("10.102.0.2/32")].is_encrypted
    (told,) = [words for words in wanted.refused if "natively" in words]
    assert told.startswith(f"node cloud/cloud-1 is not reached natively: another node has its address {CLOUD}, and ")


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SpecError, match=r"native.stages.cloud.*is not one of plain, accepts, sends, demands"):
        spec("half")


def test_a_wide_range_has_the_smallest_mtu_of_its_nodes() -> None:
    found = mesh.documents({}, sizes={"onprem": 2, "cloud": 1})
    stray = wire.IPIdentityPair("10.102.9.9", (2 << 16) + 1, str(CLOUD))
    found[keys.ip_key(stray.ip, "cloud")] = stray.to_json().encode()
    wanted = desired(spec("demands"), mesh.state(found), Reachability({}, frozenset()), HostFacts(1500))
    assert {one.mtu for one in routes(wanted, "10.102.0.0/16", MAIN)} == {1450}


def test_with_masquerading_what_is_outside_the_mesh_leaves_and_nothing_else_changes() -> None:
    plain = computed(mesh.spec())
    document = mesh.spec_document()
    document["node"]["masquerade"] = True
    found = computed(NodeSpec.from_dict(document))
    closed, opened = (Route(ip_network("0.0.0.0/0"), table=TABLE, **{how: True}) for how in ("unreachable", "throw"))
    assert plain.datapath.routes - found.datapath.routes == {closed}
    assert found.datapath.routes - plain.datapath.routes == {opened}
    for each in (*mesh.spec().mesh_ranges4, *mesh.spec().service_ranges4):
        assert Route(each, unreachable=True) in found.datapath.routes, "not to be looked for outside"
    host = ip_network("10.101.0.0/28")
    assert plain.datapath.keep_source == KeepSource(host, frozenset({host}), precaution=True)
    keep = found.datapath.keep_source
    assert keep is not None
    assert (keep.host, keep.native, keep.precaution) == (host, False, False)
    assert keep.mesh is not None
    inside = ("10.101.0.9", "10.103.200.1", "10.112.0.1", "198.18.1.11", "198.18.1.12", "198.18.2.11", "198.18.3.11")
    for text in inside:
        assert any(ip_address(text) in each for each in keep.mesh), text
    for text in ("192.0.2.1", "198.18.1.200", "10.1.0.1"):
        assert not any(ip_address(text) in each for each in keep.mesh), text
