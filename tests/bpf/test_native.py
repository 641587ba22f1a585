# SPDX-License-Identifier: GPL-3.0-or-later
"""Packets between two nodes without a tunnel: which of them the underlay devices' programs let out and in. Whole agents
are in tests/integration/test_agent_native.py."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address, ip_network

import pytest
from bpf.topology import Inside, InsideError, Node, two_nodes, wait_for
from isthmus_agent import netlink
from isthmus_agent.desired.datapath import Datapath, Native, Route

RAW = """
def mac(text): return bytes.fromhex(text.replace(':', ''))
def ipv4(protocol, source, destination, payload, ident=1):
    head = struct.pack('!BBHHHBBH', 0x45, 0, 20 + len(payload), ident, 0, 64, protocol, 0)
    head += socket.inet_aton(source) + socket.inet_aton(destination)
    return head[:10] + struct.pack('!H', checksum(head)) + head[12:] + payload
def datagram(source, destination):
    return ipv4(17, source, destination, struct.pack('!HHHH', 4000, 9, 16, 0) + b'spoofed ')
def frame(to, sender, packet):
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); raw.bind(('eth0', 0))
    raw.send(mac(to) + mac(sender) + b'\\x08\\0' + packet)
"""


@dataclass
class Both:
    """Node a and b, native to each other; a server on b's workload."""

    a: Node
    b: Node
    client: Inside

    def dial(self, seconds: float = 3) -> str:
        return str(
            self.client.do(
                f"c = socket.create_connection(({self.b.workload!r}, 8080), {seconds}); result = line(c); c.close()"
            )
        )

    def sends(self, packet: str, sender: str | None = None) -> None:
        """Node a puts a packet (code of RAW) on the wire, with its own link-layer address or another."""
        self.client.do(RAW + f"frame({_mac(self.b)!r}, {sender or _mac(self.a)!r}, {packet}); result = 1")


def _mac(node: Node) -> str:
    def read() -> str:
        shown = subprocess.run(["ip", "-j", "link", "show", "eth0"], check=True, capture_output=True, text=True)
        return str(json.loads(shown.stdout)[0]["address"])

    return node.call(read)


def _ip(node: Node, *words: str) -> str:
    return node.call(subprocess.run, ["ip", *words], check=True, capture_output=True, text=True).stdout


def native(datapath: Datapath, own: Node, other: Node) -> Datapath:
    far = ip_address(other.underlay)
    ways = {ip_network(other.prefix), ip_network(f"{other.underlay}/32")}
    return replace(
        datapath,
        ipcache={key: replace(one, is_native=one.tunnel == far) for key, one in datapath.ipcache.items()},
        peers={address: replace(peer, is_native=True) for address, peer in datapath.peers.items()},
        routes=frozenset(
            replace(route, mtu=1500, toward=far) if route.prefix in ways else route for route in datapath.routes
        )
        | {Route(ip_network(other.prefix), ip_address(own.mesh), 1500, netlink.ROUTE_TABLE, toward=far)},
        native=Native(IPv4Address(own.underlay), changing=False),
    )


def make(node: Node, datapath: Datapath) -> None:
    """In the agent's order: maps, programs, routes."""
    node.datapath = datapath
    node.bpf.apply(datapath)
    index = node.call(netlink.overlay_index)
    node.call(netlink.settings.set_ipv4, index, netlink.settings.FORWARDING)
    ways, problems = node.call(netlink.underlay_ways, datapath.routes)
    assert problems == []
    node.call(node.bpf.use_underlay, index, IPv4Address(node.underlay))
    for device in {way.oif for way in ways.values()}:
        node.call(node.bpf.attach_underlay, device)
    node.call(netlink.apply_network, datapath, ways=ways)


@pytest.fixture(scope="module")
def pair() -> Iterator[Both]:
    with two_nodes() as (a, b):
        for own, other in ((a, b), (b, a)):
            make(own, native(own.datapath, own, other))
        server = b.process("web")
        server.do(f"serve_tcp('b', {b.workload!r}, 8080); serve_udp('b', {b.workload!r}, 5353); result = 1")
        yield Both(a, b, a.process("web"))


@pytest.fixture
def both(pair: Both) -> Iterator[Both]:
    """As `pair` was made, whatever tests did to it."""
    wanted = pair.a.datapath, pair.b.datapath
    yield pair
    for node, datapath in zip((pair.a, pair.b), wanted, strict=True):
        make(node, datapath)


def _drops(both: Both) -> list[dict[str, int]]:
    return [both.a.drops(), both.b.drops()]


def _identities(node: Node) -> dict[tuple[str, int], int]:
    return {(str(one.destination), one.identity): one.packets for one in node.bpf.counters().identities}


def test_packets_go_without_a_tunnel_and_the_identity_is_that_of_the_source(both: Both) -> None:
    assert "via 198.18.0.12 dev eth0 proto 73 src 10.101.0.1 onlink mtu 1500" in _ip(both.a, "route")
    before = both.a.call(_sent, "isthmus0")
    assert both.dial() == f"b {both.a.workload}"
    assert both.a.call(_sent, "isthmus0") == before
    assert _identities(both.b)[both.b.workload, both.a.identity] >= 3
    assert not any(value for one in _drops(both) for value in one.values())


def _sent(device: str) -> int:
    shown = subprocess.run(["ip", "-j", "-s", "link", "show", device], check=True, capture_output=True, text=True)
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["packets"])


def test_a_service_leads_there_natively(both: Both) -> None:
    assert both.client.do("c = socket.create_connection(('10.111.0.10', 80), 3); result = line(c)") == (
        f"b {both.a.workload}"
    )


def test_strict_filtering_of_sources_lets_it_in(both: Both) -> None:
    for value in ("1", "0"):
        for node in (both.a, both.b):
            node.sysctl("net.ipv4.conf.all.rp_filter", value)
        assert both.dial() == f"b {both.a.workload}"


@pytest.mark.parametrize(
    ("reason", "packet", "sender"),
    [
        ("bad_source", "datagram('10.101.0.2', '10.102.0.2')", "02:00:00:00:00:77"),
        ("bad_source", "datagram('10.101.0.1', '10.102.0.1')", "02:00:00:00:00:77"),
        ("bad_source", "datagram('198.18.0.11', '10.102.0.2')", "02:00:00:00:00:77"),
        ("bad_source", "datagram('10.102.0.2', '10.102.0.1')", None),
        ("unknown_peer", "datagram('192.0.2.1', '10.102.0.2')", None),
        ("wrong_way", "datagram('10.103.0.2', '10.102.0.2')", None),
    ],
)
def test_what_may_not_come_is_dropped_and_counted(both: Both, reason: str, packet: str, sender: str | None) -> None:
    """Another node's link-layer address, one's own address, a stranger, a node that the tunnel leads to."""
    both.dial()
    tunnelled = replace(both.b.datapath.ipcache[ip_network("10.101.0.2/32")], tunnel=ip_address("198.18.0.13"))
    ipcache = {**both.b.datapath.ipcache, ip_network("10.103.0.2/32"): replace(tunnelled, is_native=False)}
    make(both.b, replace(both.b.datapath, ipcache=ipcache))
    both.a.bpf.forget_underlay()  # it would not let such a packet out
    before = both.b.drops()[reason]
    both.sends(packet, sender)
    wait_for(lambda: both.b.drops()[reason] == before + 1, f"{reason} is counted")
    assert both.dial() == f"b {both.a.workload}", "nobody else is affected"


def test_what_is_not_of_the_mesh_goes_by(both: Both) -> None:
    """Packets to the host's own address from anybody, and what the host sends itself."""
    server = both.b.process()
    server.do("serve_udp('b', '198.18.0.12', 6000); result = 1")
    host = both.a.process()
    asking = "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); s.bind(({source!r}, 0)); "
    asking += "s.sendto(b'x', ('198.18.0.12', 6000)); result = s.recv(99).decode()"
    assert host.do(asking.format(source="198.18.0.11")) == "b 198.18.0.11"
    _ip(both.a, "address", "add", "198.18.0.99/24", "dev", "eth0")
    assert host.do(asking.format(source="198.18.0.99")) == "b 198.18.0.99"
    _ip(both.a, "address", "del", "198.18.0.99/24", "dev", "eth0")


def test_a_tunnelled_packet_of_a_native_node_is_dropped(both: Both) -> None:
    before = both.b.drops()["wrong_way"]
    sender = both.a.process()
    sender.do(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('198.18.0.11', 0))\n"
        "s.sendto(vxlan(6, '10.101.0.1', '10.102.0.1'), ('198.18.0.12', 8472)); result = 1"
    )
    wait_for(lambda: both.b.drops()["wrong_way"] == before + 1, "the drop is counted")


def test_nothing_leaves_natively_for_where_the_tunnel_leads(both: Both) -> None:
    """Whoever removes or changes routes and rules: the program on the way out stops it."""
    before = both.a.drops()["wrong_way"]
    ipcache = {key: replace(one, is_native=False) for key, one in both.a.datapath.ipcache.items()}
    both.a.bpf.apply(replace(both.a.datapath, ipcache=ipcache))
    with pytest.raises(InsideError, match="timed out"):
        both.dial(0.5)
    assert both.a.drops()["wrong_way"] > before


def test_nothing_leaves_through_the_tunnel_for_where_only_native_is_agreed(both: Both) -> None:
    """Whoever leads it there."""
    before = both.a.drops()["wrong_way"]
    there = both.a.call(_sent, "isthmus0")
    for table in ("main", str(netlink.ROUTE_TABLE)):
        _ip(both.a, "route", "replace", "10.102.0.2/32", "dev", "isthmus0", "src", both.a.mesh, "table", table)
    try:
        with pytest.raises(InsideError, match="timed out"):
            both.dial(0.5)
        assert both.a.drops()["wrong_way"] > before
        assert both.a.call(_sent, "isthmus0") == there
    finally:
        for table in ("main", str(netlink.ROUTE_TABLE)):
            _ip(both.a, "route", "del", "10.102.0.2/32", "table", table)


def test_nobody_sends_in_another_nodes_name(both: Both) -> None:
    before = both.a.drops()["not_local_source"]
    both.a.process().do(
        RAW + "raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)\n"
        "raw.sendto(datagram('10.102.0.5', '10.102.0.2'), ('10.102.0.2', 0)); result = 1"
    )
    wait_for(lambda: both.a.drops()["not_local_source"] == before + 1, "the drop is counted")


def test_an_icmp_error_of_a_router_on_the_way_teaches_the_mtu(both: Both) -> None:
    before = _drops(both)
    port = both.client.do(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)\n"
        "s.connect(('10.102.0.2', 5353)); s.send(b'x'); s.recv(99); result = s.getsockname()[1]"
    )
    router = both.b.process()
    router.do(
        RAW + f"inner = ipv4(17, '10.101.0.2', '10.102.0.2', struct.pack('!HHHH', {port}, 5353, 1408, 0))\n"
        "body = struct.pack('!BBHHH', 3, 4, 0, 0, 1300) + inner\n"
        "body = body[:2] + struct.pack('!H', checksum(body)) + body[4:]\n"
        f"frame({_mac(both.a)!r}, {_mac(both.b)!r}, ipv4(1, '192.0.2.254', '10.101.0.2', body)); result = 1"
    )
    # IP_MTU
    wait_for(lambda: both.client.do("result = s.getsockopt(socket.IPPROTO_IP, 14)") == 1300, "it has learnt")
    assert _drops(both) == before
    _ip(both.a, "route", "flush", "cache")


def test_packets_are_whole_at_the_full_mtu(both: Both) -> None:
    before = both.a.counter("FragCreates")
    both.client.do(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)\n"
        "s.setsockopt(socket.IPPROTO_IP, 10, 2)\n"
        "s.sendto(b'x' * 1472, ('10.102.0.2', 5353)); result = s.recv(99).decode()"
    )
    with pytest.raises(InsideError, match="too long"):
        both.client.do("s.sendto(b'x' * 1473, ('10.102.0.2', 5353))")
    assert both.a.counter("FragCreates") == before


def test_a_programs_removal_leaves_nothing_and_is_told(both: Both) -> None:
    index = both.a.call(netlink.overlay_index)
    devices = both.a.call(netlink.other_devices)
    own = IPv4Address(both.a.underlay)
    assert both.a.call(both.a.bpf.audit_underlay, devices, index, own) == []
    assert both.a.call(both.a.bpf.detach_underlay, devices) == devices
    assert len(both.a.call(both.a.bpf.audit_underlay, devices, index, own)) == 2
    assert both.a.call(both.a.bpf.detach_underlay, devices) == []


def test_a_filter_of_somebody_else_stays(both: Both) -> None:
    """One with our handle and priority, by a program of another name."""
    index = both.a.call(netlink.overlay_index)
    assert both.a.call(both.a.bpf.detach_underlay, [index]) == []
    assert both.a.call(both.a.bpf.audit_attachments, index) == []


def test_routes_are_found_again_and_changed_in_place(both: Both) -> None:
    ways, _ = both.a.call(netlink.underlay_ways, both.a.datapath.routes)
    assert both.a.call(netlink.audit_network, both.a.datapath, ways=ways) == []
    assert not both.a.call(netlink.apply_network, both.a.datapath, ways=ways)
    _ip(both.a, "route", "del", "10.102.0.0/28")
    (told,) = both.a.call(netlink.audit_network, both.a.datapath, ways=ways)
    assert told == "route 10.102.0.0/28 as 198.18.0.12 src 10.101.0.1 mtu 1500 is missing"
    assert len(both.a.call(netlink.apply_network, both.a.datapath, ways=ways).changes) == 1
    assert both.dial() == f"b {both.a.workload}"
    # By a router from now on.
    _ip(both.a, "route", "add", "198.18.0.12/32", "via", "198.18.0.1")
    ways, _ = both.a.call(netlink.underlay_ways, both.a.datapath.routes)
    assert len(both.a.call(netlink.apply_network, both.a.datapath, ways=ways).changes) == 3
    assert "10.102.0.0/28 via 198.18.0.1 dev eth0" in _ip(both.a, "route")
    _ip(both.a, "route", "del", "198.18.0.12/32")
