# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes that are peers of WireGuard before any etcd tells of them, who opens sessions with whom, and when one is opened
anew. Pure."""

from __future__ import annotations

import base64
from ipaddress import ip_address, ip_network
from typing import Any

import agent_mesh as mesh
import pytest
from isthmus_agent.agent.kernel import Tunnel
from isthmus_agent.agent.sessions import REOPENED_AFTER, Silence
from isthmus_agent.desired.compute import Desired, HostFacts, desired
from isthmus_agent.desired.datapath import Datapath, WireGuard, WireGuardPeer
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.netlink.wireguard import PeerState
from isthmus_agent.state.model import MeshState
from isthmus_mesh import keys, wire
from isthmus_mesh.spec import SpecError


def key(number: int) -> str:
    return base64.b64encode(bytes([number]) * 32).decode()


CLOUD = {
    "cluster": "cloud",
    "id": 2,
    "name": "cloud-1",
    "site": "cloud",
    "underlay4": "198.18.2.11",
    "advertise4": "203.0.113.2",
    "range4": "10.102.0.0/28",
    "mesh4": "10.102.0.1",
    "keys": {"51871": key(1)},
}


def spec(**more: Any) -> Any:
    section = {
        "key": "/etc/isthmus/pki/wireguard.key",
        "port": 51871,
        "plain_sites": ["onprem"],
        "sites": {"onprem": "onprem", "cloud": "cloud", "edge": "edge"},
        **more,
    }
    return mesh.spec(wireguard=section)


INSIDE = spec(opens=["cloud", "edge"], bootstrap=[CLOUD])
OUTSIDE = spec(opened_by=["cloud"], bootstrap=[CLOUD])
NOTHING = MeshState()


def computed(the_spec: Any, state: MeshState = NOTHING) -> Desired:
    return desired(the_spec, state, Reachability({}, frozenset()), HostFacts(public_keys={51871: key(99)}))


def peers(found: Desired) -> dict[str, WireGuardPeer]:
    (tunnel,) = found.datapath.wireguard
    return tunnel.peers


def told(*nodes: wire.Node) -> MeshState:
    found = mesh.documents({}, sizes={"onprem": 1, **{node.cluster: 1 for node in nodes}})
    for node in nodes:
        found[keys.node_key(node.cluster, node.name, node.cluster != "onprem")] = node.to_json().encode()
    return mesh.state(found)


def test_an_empty_etcd_leaves_what_is_needed_to_reach_the_other_side() -> None:
    found = computed(INSIDE)
    endpoint, mesh4 = ip_address("203.0.113.2"), ip_address("10.102.0.1")
    addresses = frozenset({endpoint, ip_address("198.18.2.11")})
    assert peers(found) == {key(1): WireGuardPeer(endpoint, addresses, kept=mesh4)}
    assert found.datapath.ipcache[ip_network("10.102.0.1/32")].tunnel == endpoint
    assert found.datapath.ipcache[ip_network("10.102.0.1/32")].is_encrypted
    assert found.datapath.peers[endpoint].is_encrypted
    assert ip_network("10.102.0.0/28") in {route.prefix for route in found.datapath.routes if not route.unreachable}
    assert found.mesh == {("cloud", "cloud-1"): mesh4}


def test_hosts_outside_set_no_endpoint_and_keep_nothing() -> None:
    (peer,) = peers(computed(OUTSIDE)).values()
    assert (peer.dials_in, peer.kept) == (True, None)
    (other,) = peers(computed(spec(), told(mesh.node("cloud", 1, wireguard_public_key=key(1))))).values()
    assert (other.dials_in, other.kept) == (False, None), "between other sites as ever"


def test_those_that_only_etcd_tells_of_are_kept_as_well() -> None:
    found = peers(computed(INSIDE, told(mesh.node("edge", 1, wireguard_public_key=key(2)))))
    assert found[key(2)].kept == ip_address("10.103.0.1")


def test_what_was_laid_down_counts_for_more_than_what_a_mirror_has() -> None:
    """The host was made anew, with another key, and the mirror cannot be renewed but through a session with it."""
    old = mesh.node("cloud", 1, wireguard_public_key=key(7), annotations={wire.SITE: "onprem"})
    found = computed(INSIDE, told(old))
    assert set(peers(found)) == {key(1)}
    assert found.stages[("cloud", "cloud-1")].word == "demands", "not in clear, whatever site a mirror says"


@pytest.mark.parametrize("cluster", ["edge", "onprem"])
def test_nobody_takes_its_key_or_its_address(cluster: str) -> None:
    liar = mesh.node(
        cluster,
        2,
        addresses=(wire.NodeAddress("InternalIP", "203.0.113.2"), wire.NodeAddress("CiliumInternalIP", "10.103.0.17")),
        wireguard_public_key=key(1),
        annotations={wire.SITE: "edge"},
    )
    found = computed(INSIDE, told(liar))
    assert peers(found)[key(1)].kept == ip_address("10.102.0.1")
    assert found.encrypted[("cloud", "cloud-1")] == ""
    assert found.encrypted[(cluster, f"{cluster}-2")] == "its WireGuard key is that of cloud/cloud-1 too"


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match=r"bootstrap\[0\].keys.1 is not one of 51871, 51872"):
        spec(bootstrap=[{**CLOUD, "keys": {"1": key(1)}}])


FAR = ip_address("10.102.0.1")


def datapath(*devices: str) -> Datapath:
    peer = WireGuardPeer(ip_address("203.0.113.2"), frozenset(), kept=FAR)
    other = WireGuardPeer(ip_address("203.0.113.3"), frozenset())
    own: Any = ip_address("198.18.1.11")
    wanted = [
        WireGuard(device, "key", 51871 + number, 1420, own, own, {key(number): peer, key(9): other})
        for number, device in enumerate(devices)
    ]
    return Datapath(1, wireguard=tuple(wanted))


def tunnels(**received: int) -> dict[str, Tunnel]:
    return {
        device: Tunnel("kernel", {key(number): PeerState("", frozenset(), 0, count, 0, 25)})
        for number, (device, count) in enumerate(received.items())
    }


def test_a_node_is_silent_when_nothing_came_at_looks_in_a_row() -> None:
    silence, wanted = Silence(), datapath("wg0")
    assert [silence.look(wanted, tunnels(wg0=count))[FAR] for count in (0, 10, 10, 10, 12, 12)] == [0, 0, 1, 2, 0, 1]
    for _ in range(REOPENED_AFTER):
        looks = silence.look(wanted, tunnels(wg0=12))
    assert looks[FAR] > REOPENED_AFTER
    silence.begin_anew(FAR)
    assert silence.look(wanted, tunnels(wg0=0)) == {FAR: 0}, "a new session begins to count at nothing"
    assert silence.look(wanted, {}) == {}, "a device that is not there is not silent"


def test_by_either_key_is_not_silent() -> None:
    silence, wanted = Silence(), datapath("wg0", "wg1")
    looks = [silence.look(wanted, tunnels(wg0=5, wg1=count))[FAR] for count in (1, 2, 3, 3)]
    assert looks == [0, 0, 0, 1]
