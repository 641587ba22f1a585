# SPDX-License-Identifier: GPL-3.0-or-later
"""The overlay inside WireGuard, by the kernel's where it has one, else by wireguard-go: which packets the programs let
out and in. The whole agent is in tests/integration/test_agent_wireguard.py."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from bpf.test_native import RAW
from bpf.topology import Inside, InsideError, Node, capture, two_nodes, wait_for
from isthmus_agent import netlink
from isthmus_agent.desired.datapath import Datapath, Native, Route, Rule, WireGuard, WireGuardPeer
from isthmus_agent.desired.encryption import BACK, CLOSED, INSIDE_RULE_PRIORITY, RULE_PRIORITY, TABLE
from isthmus_agent.netlink import settings as device_settings
from isthmus_agent.netlink import wireguard

MTU = 1370  # 1500, less 50 of VXLAN and 80 of WireGuard
FIRST, _SECOND = BACK.values()
RULES = ((RULE_PRIORITY, TABLE), (FIRST.table, FIRST.table))
_numbers = itertools.count(1)


@dataclass
class Side:
    """A node with its WireGuard device; `process` is wireguard-go's, None with the kernel's own."""

    node: Node
    device: str
    wanted: WireGuard
    process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        """Device, program, peers, routes: in the agent's order."""
        index = self.node.call(netlink.overlay_index)
        self.node.call(device_settings.set_ipv4, index, device_settings.FORWARDING)
        if self.process is None and not _kernel_has_wireguard(self.node):
            self.process = self.node.call(_wireguard_go, self.device)
        device = wait_for(lambda: self._device(), f"{self.device} is there")
        self.node.call(self.node.bpf.attach_wireguard, (device.index, 0), 8472, self.wanted)
        wait_for(self._configure, f"{self.device} takes its settings")
        self.apply(self.node.datapath, device.index)

    def _device(self) -> wireguard.Device | None:
        try:
            return self.node.call(wireguard.ensure_device, self.wanted.mtu, self.device)
        except netlink.NetworkError:
            return None  # wireguard-go has not made it yet

    def _configure(self) -> bool:
        try:
            self.node.call(wireguard.configure, self.wanted, self.device)
        except netlink.NetworkError:
            if self.process is None:
                raise
            return False  # wireguard-go has made the device and not yet its control socket
        return True

    def apply(self, datapath: Datapath, index: int) -> None:
        self.node.datapath = datapath
        self.node.bpf.apply(datapath)
        self.node.call(netlink.apply_network, datapath, wireguard={self.device: index})

    def received(self) -> int:
        """Bytes that came through WireGuard."""
        return sum(peer.received for peer in self.node.call(wireguard.peer_states, self.device).values())

    def ip(self, *words: str) -> None:
        self.node.call(subprocess.run, ["ip", *words], check=True)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


def _kernel_has_wireguard(node: Node) -> bool:
    def trial() -> bool:
        made = subprocess.run(["ip", "link", "add", "isthmus-trial", "type", "wireguard"], capture_output=True)
        if made.returncode == 0:
            subprocess.run(["ip", "link", "delete", "isthmus-trial"], check=True)
        return made.returncode == 0

    return node.call(trial)


def _wireguard_go(device: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["wireguard-go", "-f", device], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _encrypted(datapath: Datapath, own: Node, other: Node, wanted: WireGuard) -> Datapath:
    far = ip_address(other.underlay)
    way = ip_network(f"{other.underlay}/32")
    return replace(
        datapath,
        ipcache={key: replace(one, is_encrypted=one.tunnel == far) for key, one in datapath.ipcache.items()},
        peers={address: replace(peer, is_encrypted=True) for address, peer in datapath.peers.items()},
        routes=frozenset(replace(route, mtu=MTU) if route.mtu else route for route in datapath.routes)
        | {
            Route(way, ip_address(own.underlay), table=TABLE, wireguard=wanted.device),
            Route(way, table=TABLE, unreachable=True, metric=CLOSED),
            Route(way, table=FIRST.table, wireguard=wanted.device),
        },
        rules=datapath.rules
        | {
            Rule(ip_network("0.0.0.0/0"), TABLE, RULE_PRIORITY, destination_port=8472),
            Rule(ip_network("0.0.0.0/0"), FIRST.table, FIRST.table, mark=FIRST.mark),
        },
        wireguard=(wanted,),
    )


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    made: list[Side] = []
    with two_nodes() as nodes:
        publics = {}
        for node in nodes:
            key = subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout
            (tmp_path / node.name).write_text(key)
            publics[node.name] = node.call(wireguard.public_key, str(tmp_path / node.name))
        try:
            for own, other in (nodes, nodes[::-1]):
                far = ip_address(other.underlay)
                peer = WireGuardPeer(far, frozenset({far}))
                here = IPv4Address(own.underlay)
                # One socket a name: wireguard-go's control sockets are files.
                name = f"wg{own.name}{next(_numbers)}-{os.getpid()}"
                wanted = WireGuard(name, str(tmp_path / own.name), 51871, 1420, here, here, {publics[other.name]: peer})
                side = Side(own, name, wanted)
                made.append(side)
                own.datapath = _encrypted(own.datapath, own, other, wanted)
                side.make()
            server = nodes[1].process("web")
            server.do(f"serve_tcp('b', {nodes[1].workload!r}, 8080); result = 1")
            yield made[0], made[1]
        finally:
            for side in made:
                side.close()


def _inside(side: Side, other: Node) -> None:
    """Natively inside WireGuard from now on: allowed IPs, maps, programs of the underlay, routes."""
    node, far = side.node, ip_address(other.underlay)
    (public,) = side.wanted.peers
    prefix = ip_network(other.prefix)
    peer = replace(side.wanted.peers[public], ranges=frozenset({prefix}))
    side.wanted = replace(side.wanted, peers={public: peer})
    ways = {prefix, ip_network(f"{other.underlay}/32")}
    datapath = node.datapath
    over = {"mtu": 1420, "wireguard": side.device}
    node.datapath = replace(
        datapath,
        ipcache={key: replace(one, is_inside=one.tunnel == far) for key, one in datapath.ipcache.items()},
        peers={address: replace(one, is_native=True) for address, one in datapath.peers.items()},
        routes=frozenset(
            replace(route, **over) if route.prefix in ways and route.table in (254, netlink.ROUTE_TABLE) else route
            for route in datapath.routes
        )
        | {
            Route(prefix, ip_address(node.mesh), table=netlink.ROUTE_TABLE, **over),
            Route(prefix, table=FIRST.table, wireguard=side.device),
        },
        rules=datapath.rules | {Rule(ip_network("0.0.0.0/0"), FIRST.table, INSIDE_RULE_PRIORITY, mark=FIRST.mark)},
        native=Native(IPv4Address(node.underlay), False, frozenset({far})),
    )
    side.make()
    ways_found, problems = node.call(netlink.underlay_ways, node.datapath.routes, others=node.datapath.native.inside)
    assert problems == []
    index = node.call(netlink.overlay_index)
    node.call(node.bpf.use_underlay, index, IPv4Address(node.underlay))
    for device in {way.oif for way in ways_found.values()}:
        node.call(node.bpf.attach_underlay, device)


@pytest.fixture
def within(sides: tuple[Side, Side]) -> tuple[Side, Side]:
    left, right = sides
    _inside(left, right.node)
    _inside(right, left.node)
    return sides


def _dial(client: Inside, node: Node, seconds: float = 3) -> str:
    return str(
        client.do(f"c = socket.create_connection(({node.workload!r}, 8080), {seconds}); result = line(c); c.close()")
    )


def test_what_is_as_wanted_is_not_said_again(sides: tuple[Side, Side]) -> None:
    """Who listens, as an agent does, would apply everything for each word of its own, for ever."""
    left, _ = sides

    def said() -> bytes:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as listener:
            listener.bind((0, 1))  # RTMGRP_LINK
            index = netlink.overlay_index()
            assert index is not None
            device_settings.set_ipv4(index, device_settings.FORWARDING)
            wireguard.ensure_device(left.wanted.mtu, left.device)
            wireguard.configure(left.wanted, left.device)
            try:
                return listener.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return b""

    assert left.node.call(said) == b""


def test_packets_go_through_wireguard_both_ways_and_nothing_is_dropped(sides: tuple[Side, Side]) -> None:
    left, right = sides
    assert _dial(left.node.process("web"), right.node) == "b 10.101.0.2"
    assert left.received() > 0
    assert right.received() > 0
    for side in sides:
        assert not any(side.node.drops().values())
        index = side.node.call(wireguard.find_index, side.device)
        assert side.node.call(netlink.audit_network, side.node.datapath, wireguard={side.device: index}) == []
        assert side.node.call(wireguard.audit, side.wanted, side.device) == []
        assert side.node.call(side.node.bpf.audit_wireguard, (index, 0), 8472, side.wanted) == []


@pytest.mark.parametrize("gone", ["rules", "route", "device", "forwarding"])
def test_what_would_leave_in_clear_is_dropped_and_counted(sides: tuple[Side, Side], gone: str) -> None:
    left, right = sides
    client = left.node.process("web")
    assert _dial(client, right.node) == "b 10.101.0.2"
    if gone == "rules":
        for priority, table in RULES:
            left.ip("rule", "del", "pref", str(priority), "table", str(table))
    elif gone == "route":
        left.ip("route", "flush", "table", str(TABLE))
    elif gone == "device":
        left.ip("link", "delete", left.device)
    else:
        left.node.sysctl("net.ipv4.conf.isthmus0.forwarding", "0")
    with pytest.raises(InsideError, match="timed out"):
        _dial(client, right.node, 0.5)
    assert left.node.drops()["not_encrypted"] > 0
    assert not any(count for name, count in right.node.drops().items() if name != "not_encrypted")
    assert right.node.drops()["not_encrypted"] == 0, "nothing reached the other side in clear"


def test_a_peer_that_sends_in_clear_is_dropped_and_counted(sides: tuple[Side, Side]) -> None:
    left, right = sides
    for priority, table in RULES:
        left.ip("rule", "del", "pref", str(priority), "table", str(table))
    datapath = left.node.datapath
    left.node.bpf.apply(
        replace(datapath, ipcache={key: replace(one, is_encrypted=False) for key, one in datapath.ipcache.items()})
    )
    with pytest.raises(InsideError, match="timed out"):
        _dial(left.node.process("web"), right.node, 0.5)
    assert right.node.drops()["not_encrypted"] > 0
    assert left.node.drops()["not_encrypted"] == 0


def _send(side: Side, to: object, port: int, what: str = "b'x'", device: str = "") -> None:
    """A datagram from the host's own address, by a device when that is said."""
    by = f"s.setsockopt(socket.SOL_SOCKET, 25, {device.encode()!r})\n" if device else ""
    side.node.process().do(
        f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(({side.node.underlay!r}, 0))\n"
        f"{by}s.sendto({what}, ({str(to)!r}, {port})); result = 1"
    )


def test_what_is_no_overlay_packet_does_not_come_through(sides: tuple[Side, Side]) -> None:
    left, right = sides
    _send(left, right.node.underlay, 9, device=left.device)
    wait_for(lambda: right.node.drops()["not_overlay"] == 1, "the drop is counted")


def test_an_overlay_packet_to_another_host_is_not_sent_on(sides: tuple[Side, Side]) -> None:
    left, right = sides
    right.node.sysctl("net.ipv4.ip_forward", "1")
    for side in sides:
        (public,) = side.wanted.peers
        side.wanted = replace(
            side.wanted,
            peers={public: replace(side.wanted.peers[public], addresses=frozenset({*_far(side), ADVERTISED}))},
        )
        side.node.call(wireguard.configure, side.wanted, side.device)
    _send(left, ADVERTISED, 8472, device=left.device)
    wait_for(lambda: right.node.drops()["not_local_dest"] == 1, "the drop is counted")


@pytest.mark.parametrize("checksum", [False, True])
def test_a_host_behind_a_nat_gets_what_is_sent_to_its_other_address(sides: tuple[Side, Side], checksum: bool) -> None:
    """Nothing on the way can translate what is inside WireGuard."""
    left, right = sides
    right.wanted = replace(right.wanted, advertised=ADVERTISED)
    right.make()
    (public,) = left.wanted.peers
    far = _far(left)
    peer = WireGuardPeer(next(iter(far)), frozenset({*far, ADVERTISED}))
    left.wanted = replace(left.wanted, peers={public: peer})
    datapath = left.node.datapath
    left.node.datapath = replace(
        datapath,
        ipcache={key: replace(one, tunnel=one.tunnel and ADVERTISED) for key, one in datapath.ipcache.items()},
        peers={address: replace(one, endpoint=ADVERTISED) for address, one in datapath.peers.items()},
        routes=datapath.routes
        | {Route(ip_network(f"{ADVERTISED}/32"), ip_address(left.node.underlay), table=TABLE, wireguard=left.device)},
    )
    left.make()
    if checksum:  # one that a sender may add: the kernel must find it right
        payload = f"vxlan(6, {left.node.mesh!r}, {right.node.mesh!r})"
        left.node.process().do(
            f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(({left.node.underlay!r}, 0))\n"
            f"s.sendto({payload}, ('{ADVERTISED}', 8472))"
        )
        wait_for(lambda: right.node.bpf.counters().identities, "the packet came out of the overlay")
    else:
        assert _dial(left.node.process("web"), right.node) == "b 10.101.0.2"
    assert not any(right.node.drops().values())


ADVERTISED = IPv4Address("203.0.113.9")


def _far(side: Side) -> frozenset[Any]:
    """Underlay address of the other side."""
    (peer,) = side.wanted.peers.values()
    return frozenset({peer.endpoint})


def test_peers_are_changed_without_a_new_port_or_session_of_others(sides: tuple[Side, Side]) -> None:
    left, right = sides
    assert _dial(left.node.process("web"), right.node) == "b 10.101.0.2"
    before = left.node.call(wireguard.peer_states, left.device)
    elsewhere = ip_address("198.18.0.77")
    public = subprocess.run(["wg", "pubkey"], input=_new_key(), check=True, capture_output=True, text=True).stdout
    more = replace(
        left.wanted,
        peers={**left.wanted.peers, public.strip(): WireGuardPeer(elsewhere, frozenset({elsewhere}))},
    )
    done = left.node.call(wireguard.configure, more, left.device)
    assert not done.fresh
    (changed,) = done.changes
    assert changed == f"set WireGuard peer {public.strip()} at {elsewhere}"
    after = left.node.call(wireguard.peer_states, left.device)
    (known,) = left.wanted.peers
    assert after[known].handshake == before[known].handshake > 0
    assert after[public.strip()].addresses == {elsewhere}
    assert left.node.call(wireguard.configure, more, left.device).changes == ()
    (removed,) = left.node.call(wireguard.configure, left.wanted, left.device).changes
    assert removed == f"remove WireGuard peer {public.strip()}"
    assert left.node.call(wireguard.audit, more, left.device) == [
        f"WireGuard peer {public.strip()} at {elsewhere} is missing"
    ]


def _new_key() -> str:
    return subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout


def test_a_device_of_another_kind_is_not_ours(sides: tuple[Side, Side]) -> None:
    left, _ = sides
    left.ip("link", "add", "wg-strange", "type", "veth", "peer", "name", "wg-other")
    with pytest.raises(netlink.NetworkError, match="is a device of kind veth"):
        left.node.call(wireguard.ensure_device, 1420, "wg-strange")
    assert left.node.call(wireguard.remove_device, "wg-strange") == []
    assert left.node.call(wireguard.find_index, "wg-strange") is not None


def _identities(node: Node) -> dict[tuple[str, int], int]:
    return {(str(one.destination), one.identity): one.packets for one in node.bpf.counters().identities}


def _sent(node: Node, device: str) -> int:
    def read() -> int:
        shown = subprocess.run(["ip", "-j", "-s", "link", "show", device], check=True, capture_output=True, text=True)
        return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["packets"])

    return node.call(read)


def test_packets_go_natively_inside_wireguard_with_the_identity_of_their_source(within: tuple[Side, Side]) -> None:
    left, right = within
    for side in within:
        side.node.sysctl("net.ipv4.conf.all.rp_filter", "1")
    before = _sent(left.node, "isthmus0")
    assert _dial(left.node.process("web"), right.node) == "b 10.101.0.2"
    assert _sent(left.node, "isthmus0") == before
    assert _identities(right.node)[right.node.workload, left.node.identity] >= 3
    for side in within:
        assert not any(side.node.drops().values())
        index = side.node.call(wireguard.find_index, side.device)
        assert side.node.call(netlink.audit_network, side.node.datapath, wireguard={side.device: index}) == []
        assert side.node.call(wireguard.audit, side.wanted, side.device) == []


def test_packets_natively_inside_wireguard_are_whole_at_their_mtu(within: tuple[Side, Side]) -> None:
    left, right = within
    right.node.process("web").do(f"serve_udp('b', {right.node.workload!r}, 5353); result = 1")
    client = left.node.process("web")
    client.do(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)\n"
        "s.setsockopt(socket.IPPROTO_IP, 10, 2)\n"
        f"s.sendto(b'x' * {1420 - 28}, ('10.102.0.2', 5353)); result = s.recv(99).decode()"
    )
    with pytest.raises(InsideError, match="too long"):
        client.do(f"s.sendto(b'x' * {1421 - 28}, ('10.102.0.2', 5353))")


def test_fragments_come_natively_through_wireguard(within: tuple[Side, Side]) -> None:
    left, right = within
    right.node.process("web").do(f"serve_udp('b', {right.node.workload!r}, 5353); result = 1")
    assert (
        left.node.process("web").do(
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)\n"
            "s.sendto(b'x' * 4000, ('10.102.0.2', 5353)); result = s.recv(99).decode()"
        )
        == "b 10.101.0.2"
    )
    assert not any(right.node.drops().values())


def test_a_workload_and_the_underlay_address_of_the_other_host_reach_each_other(within: tuple[Side, Side]) -> None:
    """A program of the host dials from the underlay address, and is answered; all of it is encrypted."""
    left, right = within
    answer = left.node.process().do(
        f"s = socket.socket(); s.settimeout(3); s.bind(({left.node.underlay!r}, 0))\n"
        f"s.connect(({right.node.workload!r}, 8080)); result = line(s); s.close()"
    )
    assert answer == f"b {left.node.underlay}"
    for side in within:
        assert not any(side.node.drops().values())


@pytest.mark.parametrize("gone", ["routes", "device"])
@pytest.mark.parametrize("source", ["workload", "underlay"])
def test_what_would_leave_natively_in_clear_is_dropped_and_counted(
    within: tuple[Side, Side], gone: str, source: str, tmp_path: Path
) -> None:
    left, right = within
    client = left.node.process("web" if source == "workload" else "host")
    assert _dial(left.node.process("web"), right.node) == "b 10.101.0.2"
    file = tmp_path / "wire.pcap"
    with capture(left.node, file):
        if gone == "device":
            left.ip("link", "delete", left.device)
        left.ip("route", "flush", "proto", "73")
        left.ip("route", "flush", "table", str(netlink.ROUTE_TABLE), "proto", "73")
        left.ip("route", "add", right.node.prefix, "via", right.node.underlay)
        with pytest.raises(InsideError, match="timed out"):
            client.do(
                "s = socket.socket(); s.settimeout(0.5)\n"
                f"s.bind(({getattr(left.node, source)!r}, 0)); s.connect(({right.node.workload!r}, 8080))"
            )
        assert left.node.drops()["not_encrypted"] > 0
    shown = subprocess.run(["tcpdump", "-nr", str(file), "net", right.node.prefix], capture_output=True, text=True)
    assert shown.stdout == ""


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        ("datagram('10.101.0.2', '10.102.0.2')", "not_encrypted"),
        ("datagram('10.101.0.1', '10.102.0.1')", "not_encrypted"),
        ("datagram('198.18.0.11', '10.102.0.2')", "not_encrypted"),
        ("datagram('10.101.0.2', '198.18.0.12')", "not_encrypted"),
        ("datagram('192.0.2.1', '10.102.0.2')", "unknown_peer"),
    ],
)
def test_what_comes_in_clear_with_such_a_source_is_dropped_and_counted(
    within: tuple[Side, Side], packet: str, reason: str
) -> None:
    """Only somebody on the path can send it. What is between the hosts themselves goes by."""
    left, right = within
    left.node.bpf.forget_underlay()  # it would not let such a packet out

    def mac(node: Node) -> str:
        shown = node.call(subprocess.run, ["ip", "-j", "link", "show", "eth0"], capture_output=True, text=True)
        return str(json.loads(shown.stdout)[0]["address"])

    sender = left.node.process()
    sender.do(RAW + f"frame({mac(right.node)!r}, {mac(left.node)!r}, {packet}); result = 1")
    wait_for(lambda: right.node.drops()[reason] == 1, f"{reason} is counted")
    assert sum(right.node.drops().values()) == 1
    right.node.process().do("serve_udp('b', '198.18.0.12', 6000); result = 1")
    assert (
        sender.do(
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); s.bind(('198.18.0.11', 0))\n"
            "s.sendto(b'x', ('198.18.0.12', 6000)); result = s.recv(99).decode()"
        )
        == "b 198.18.0.11"
    )


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("10.101.0.2", "10.102.0.9", "not_local_dest"),
        ("10.101.0.2", "198.18.0.99", "not_local_dest"),
        ("198.18.0.11", "198.18.0.12", "not_local_dest"),
    ],
)
def test_what_comes_through_wireguard_for_others_is_not_sent_on(
    within: tuple[Side, Side], source: str, target: str, reason: str
) -> None:
    left, right = within
    right.node.sysctl("net.ipv4.ip_forward", "1")
    (public,) = left.wanted.peers
    peer = left.wanted.peers[public]
    more = replace(left.wanted, peers={public: replace(peer, addresses=peer.addresses | {ip_address(target)})})
    left.node.call(wireguard.configure, more, left.device)
    left.node.process().do(
        RAW + "raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)\n"
        f"raw.setsockopt(socket.SOL_SOCKET, 25, {left.device.encode()!r})\n"
        f"raw.sendto(datagram({source!r}, {target!r}), ({target!r}, 0)); result = 1"
    )
    wait_for(lambda: right.node.drops()[reason] == 1, "the drop is counted")


def test_a_peer_cannot_send_in_another_nodes_name(within: tuple[Side, Side]) -> None:
    """WireGuard takes from a peer what its allowed IPs have and nothing else."""
    left, right = within
    before = right.received(), sum(right.node.drops().values())
    client = left.node.process()
    # Its own programs would not let it out.
    datapath = left.node.datapath
    left.node.bpf.apply(replace(datapath, local={**datapath.local, ip_address("10.103.0.2"): 6}))

    def send(source: str) -> None:
        client.do(
            RAW + "raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)\n"
            f"raw.setsockopt(socket.SOL_SOCKET, 25, {left.device.encode()!r})\n"
            f"raw.sendto(datagram({source!r}, '10.102.0.2'), ('10.102.0.2', 0)); result = 1"
        )

    send("10.103.0.2")
    wait_for(lambda: right.received() > before[0], "it has come")
    send("10.101.0.2")
    wait_for(lambda: right.node.bpf.counters().identities, "the one in its own name is counted")
    assert {one.identity for one in right.node.bpf.counters().identities} == {left.node.identity}
    assert sum(right.node.drops().values()) == before[1]


def test_a_tunnelled_packet_of_a_node_that_is_native_inside_wireguard_is_dropped(within: tuple[Side, Side]) -> None:
    left, right = within
    _send(left, right.node.underlay, 8472, f"vxlan(6, {left.node.mesh!r}, {right.node.mesh!r})")
    wait_for(lambda: right.node.drops()["wrong_way"] == 1, "the drop is counted")


def test_a_host_that_others_reach_elsewhere_keeps_that_address_for_itself(within: tuple[Side, Side]) -> None:
    """Where a host has the address that others send to beside its own, what is not of the mesh goes by."""
    left, right = within
    for node in (left.node, right.node):
        node.call(subprocess.run, ["ip", "address", "add", f"198.18.0.{200 + node.cluster_id}/24", "dev", "eth0"])
    datapath = right.node.datapath
    own = ip_address("198.18.0.202")
    entry = datapath.ipcache[ip_network("198.18.0.12/32")]
    right.node.bpf.apply(
        replace(
            datapath,
            local={**datapath.local, own: datapath.local[ip_address("198.18.0.12")]},
            ipcache={**datapath.ipcache, ip_network("198.18.0.202/32"): entry},
        )
    )
    right.node.process().do("serve_udp('b', '198.18.0.202', 6000); result = 1")
    assert (
        left.node.process().do(
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); s.bind(('198.18.0.201', 0))\n"
            "s.sendto(b'x', ('198.18.0.202', 6000)); result = s.recv(99).decode()"
        )
        == "b 198.18.0.201"
    )
    assert not any(right.node.drops().values())
