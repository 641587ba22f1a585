# SPDX-License-Identifier: GPL-3.0-or-later
"""The overlay between two nodes: what is let in, what is dropped and counted, sizes, routes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from bpf.topology import TCP, VIP, Inside, Node, backend, two_nodes, wait_for
from isthmus_agent import netlink
from isthmus_agent.desired.datapath import IpcacheEntry, Peer, Route
from pyroute2 import IPRoute

Nodes = tuple[Node, Node]


def _send(
    attacker: Inside, node: Node, vni: int, source: str, destination: str, extra: str = "", outer: str = ""
) -> None:
    attacker.do(
        f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('{outer}', 0))\n"
        f"s.sendto(vxlan({vni}, '{source}', '{destination}'{extra}), ('{node.underlay}', 8472))"
    )


def _dropped(node: Node, reason: str) -> None:
    """Exactly one packet was dropped, for `reason`."""
    wait_for(lambda: any(node.drops().values()), f"a drop at node {node.name}")
    assert {name: count for name, count in node.drops().items() if count} == {reason: 1}


# Identities that a node of cluster 1 may assert, and some that it may not.
ALLOWED = [2, 4, 6, 7, 8, 100, 114, 128, 255, 1 << 16, (1 << 16) + 300, (2 << 16) - 1]
REFUSED = [0, 1, 3, 5, 9, 10, 99, 115, 127, 256, 0xFFFF, 2 << 16, (2 << 16) + 300, 255 << 16]


@pytest.fixture(scope="module")
def pair() -> Iterator[Nodes]:
    """Two nodes for many checks that only read counters."""
    with two_nodes() as both:
        yield both


def test_identities_are_let_in_or_dropped_by_the_sending_cluster(pair: Nodes) -> None:
    left, right = pair
    attacker = left.process()
    for identity in ALLOWED:
        _send(attacker, right, identity, left.mesh, right.mesh)
    wait_for(lambda: sum(each.packets for each in right.bpf.counters().identities) == len(ALLOWED), "all let in")
    assert {(each.identity, each.cluster_id, each.packets) for each in right.bpf.counters().identities} == {
        (identity, 1, 1) for identity in ALLOWED
    }
    assert not any(right.drops().values())
    for count, identity in enumerate(REFUSED, 1):
        _send(attacker, right, identity, left.mesh, right.mesh)
        wait_for(lambda count=count: right.drops()["bad_identity"] == count, f"identity {identity} dropped")


# The same with 511 clusters: 15 bits of identities each; the sender is cluster 1, then 300.
ALLOWED_511 = {1: [2, 255, 1 << 15, (1 << 15) + 300, (2 << 15) - 1], 300: [6, 300 << 15, (301 << 15) - 1]}
REFUSED_511 = {1: [256, 0x7FFF, 2 << 15, (1 << 16) + 300, 511 << 15], 300: [300, 1 << 15, (301 << 15), 255 << 16]}


@pytest.mark.parametrize("cluster_id", [1, 300])
def test_with_511_clusters_the_cluster_of_an_identity_starts_one_bit_lower(nodes: Nodes, cluster_id: int) -> None:
    left, right = nodes
    right.bpf.close()
    endpoint = ip_address(left.underlay)
    right.datapath = replace(right.datapath, identity_shift=15, peers={endpoint: Peer(cluster_id, endpoint)})
    right.load()
    attacker = left.process()
    for identity in ALLOWED_511[cluster_id]:
        _send(attacker, right, identity, left.mesh, right.mesh)
    wait_for(lambda: len(right.bpf.counters().identities) == len(ALLOWED_511[cluster_id]), "all let in")
    assert {(each.identity, each.cluster_id) for each in right.bpf.counters().identities} == {
        (identity, cluster_id) for identity in ALLOWED_511[cluster_id]
    }
    assert not any(right.drops().values())
    for count, identity in enumerate(REFUSED_511[cluster_id], 1):
        _send(attacker, right, identity, left.mesh, right.mesh)
        wait_for(lambda count=count: right.drops()["bad_identity"] == count, f"identity {identity} dropped")


@pytest.mark.parametrize(
    ("source", "destination", "reason"),
    [
        ("10.102.0.2", "10.102.0.1", "bad_source"),  # the receiver's own workload
        ("10.102.0.9", "10.102.0.1", "bad_source"),  # nobody's
        ("192.0.2.1", "10.102.0.1", "bad_source"),  # out of the mesh
        ("198.18.0.12", "10.102.0.1", "bad_source"),  # the receiver's underlay address
        ("10.101.0.1", "192.0.2.1", "not_local_dest"),  # would be forwarded
        ("10.101.0.1", "10.101.0.2", "not_local_dest"),  # back to the sender
    ],
)
def test_a_wrong_inner_address_is_dropped(nodes: Nodes, source: str, destination: str, reason: str) -> None:
    left, right = nodes
    _send(left.process(), right, 6, source, destination)
    _dropped(right, reason)


def test_an_address_of_the_senders_cluster_is_let_in_and_a_nodes_is_not(nodes: Nodes) -> None:
    left, right = nodes
    elsewhere = ip_address("198.18.0.77")
    right.apply(
        replace(
            right.datapath,
            ipcache={
                **right.datapath.ipcache,
                ip_network("10.101.0.16/28"): IpcacheEntry(2, 1, elsewhere),
                ip_network("198.18.0.77/32"): IpcacheEntry(6, 1, elsewhere, is_node=True),
                ip_network("10.101.0.17/32"): IpcacheEntry(6, 1, elsewhere, is_fixed=True),
            },
        )
    )
    attacker = left.process()
    _send(attacker, right, left.identity, "10.101.0.20", right.mesh)
    wait_for(lambda: right.bpf.counters().identities, "the moved workload's packet")
    assert not any(right.drops().values())
    for count, of_a_node in enumerate(("198.18.0.77", "10.101.0.17"), 1):
        _send(attacker, right, 6, of_a_node, right.mesh)
        wait_for(lambda count=count: right.drops()["bad_source"] == count, f"{of_a_node} dropped")


def test_a_node_of_the_same_cluster_cannot_send_as_us(nodes: Nodes) -> None:
    left, right = nodes
    # For the receiver the sender is now a neighbour in its own cluster, whose addresses it may send from.
    right.apply(
        replace(right.datapath, peers={ip_address(left.underlay): Peer(right.cluster_id, ip_address(left.underlay))})
    )
    _send(left.process(), right, right.identity, "10.102.0.9", right.mesh)
    wait_for(lambda: right.bpf.counters().identities or any(right.drops().values()), "a verdict")
    assert right.drops()["bad_source"] == 1, "nobody's address"
    _send(left.process(), right, right.identity, right.workload, right.mesh)
    wait_for(lambda: right.drops()["bad_source"] == 2, "our own address dropped")


def test_a_node_that_sends_from_another_address_than_it_advertises(nodes: Nodes) -> None:
    left, right = nodes
    advertised = ip_address("198.18.0.99")

    def second_address() -> None:
        with IPRoute() as ipr:
            (index,) = ipr.link_lookup(ifname="eth0")
            ipr.addr("add", index=index, address=str(advertised), prefixlen=24)

    left.call(second_address)
    left.apply(replace(left.datapath, local={**left.datapath.local, advertised: 6}))
    behind = {
        network: replace(entry, tunnel=advertised) if entry.tunnel is not None else entry
        for network, entry in right.datapath.ipcache.items()
    }
    behind[ip_network(f"{advertised}/32")] = IpcacheEntry(6, left.cluster_id, advertised, is_node=True)
    peer = Peer(left.cluster_id, advertised)
    back = Route(ip_network(f"{advertised}/32"), ip_address(right.mesh), 1450, table=netlink.ROUTE_TABLE)
    right.apply(
        replace(
            right.datapath,
            ipcache=behind,
            peers={ip_address(left.underlay): peer, advertised: peer},
            routes=right.datapath.routes | {back},
        )
    )
    right.process().do(f"serve_tcp('b', '{right.mesh}', 9000)")
    for bound in (left.underlay, str(advertised), left.mesh, left.workload):
        text = left.process().do(
            f"s = socket.create_connection(('{right.mesh}', 9000), 5, ('{bound}', 0)); result = line(s)"
        )
        assert text == f"b {bound}"
    assert not any(right.drops().values())
    # And it is still no other node.
    right.apply(
        replace(right.datapath, peers={ip_address(left.underlay): Peer(left.cluster_id, ip_address("198.18.0.98"))})
    )
    _send(left.process(), right, 6, left.mesh, right.mesh, outer=left.underlay)
    _dropped(right, "bad_source")


def test_what_is_for_an_address_that_a_nat_has_is_not_sent_on(nodes: Nodes) -> None:
    """Others know the host by it, and the host does not have it: what came through the overlay would leave in clear."""
    left, right = nodes
    advertised = ip_address("198.18.0.99")
    own = {ip_network(f"{advertised}/32"): IpcacheEntry(6, right.cluster_id, None, is_node=True)}
    local = {**right.datapath.local, advertised: 6}
    right.apply(replace(right.datapath, local=local, ipcache=right.datapath.ipcache | own))
    right.call(netlink.settings.set_ipv4, right.call(netlink.overlay_index), netlink.settings.FORWARDING)
    _send(left.process(), right, 6, left.mesh, str(advertised))
    _dropped(right, "not_local_dest")

    def has_it() -> None:
        with IPRoute() as ipr:
            (index,) = ipr.link_lookup(ifname="eth0")
            ipr.addr("add", index=index, address=str(advertised), prefixlen=32)

    right.call(has_it)
    _send(left.process(), right, 6, left.mesh, str(advertised))
    wait_for(lambda: [each.packets for each in right.bpf.counters().identities] == [1], "it is the host's own now")


def test_an_unknown_peer_is_dropped(nodes: Nodes) -> None:
    left, right = nodes

    def second_address() -> None:
        with IPRoute() as ipr:
            (index,) = ipr.link_lookup(ifname="eth0")
            ipr.addr("add", index=index, address="198.18.0.99", prefixlen=24)

    left.call(second_address)
    _send(left.process(), right, 6, left.mesh, right.mesh, outer="198.18.0.99")
    _dropped(right, "unknown_peer")


@pytest.mark.parametrize("ethertype", [0x0806, 0x86DD, 0x8100])
def test_what_is_not_ipv4_is_dropped(nodes: Nodes, ethertype: int) -> None:
    left, right = nodes
    _send(left.process(), right, 6, left.mesh, right.mesh, extra=f", ethertype={ethertype}")
    _dropped(right, "not_ip")


def test_an_ipv4_frame_with_another_version_is_malformed(nodes: Nodes) -> None:
    left, right = nodes
    _send(left.process(), right, 6, left.mesh, right.mesh, extra=", version=5")
    _dropped(right, "malformed")


@pytest.mark.parametrize(
    ("source", "destination", "reason"),
    [("10.101.0.1", "10.102.1.1", "no_tunnel"), ("192.0.2.7", "10.102.0.1", "not_local_source")],
)
def test_egress_drops_are_counted(nodes: Nodes, source: str, destination: str, reason: str) -> None:
    left, _ = nodes

    def prepare() -> None:
        with IPRoute() as ipr:
            index = ipr.link_lookup(ifname="isthmus0")[0]
            ipr.route("add", dst=f"{destination}/32", oif=index, table=254, scope=253)
            ipr.addr("add", index=1, address="192.0.2.7", prefixlen=32)

    left.call(prepare)
    left.process().do(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"s.bind(('{source}', 0)); s.sendto(b'x', ('{destination}', 9))"
    )
    _dropped(left, reason)


@pytest.mark.parametrize("underlay_mtu", [1500, 1460])
def test_a_bulk_transfer_makes_no_outer_fragments(underlay_mtu: int) -> None:
    with two_nodes(underlay_mtu) as (left, right):
        assert left.call(netlink.underlay_mtu, ip_address(left.underlay)) == underlay_mtu
        assert left.call(netlink.underlay_mtu, ip_address(right.underlay)) == underlay_mtu
        right.process("web").do(f"serve_tcp('b', '{right.workload}', 8080)")
        client = left.process("web")
        size = 32 << 20
        total = client.do(
            f"s = socket.create_connection(('{VIP}', 80), 20); line(s)\n"
            f"s.sendall(bytes({size} - 1) + b'?'); result = line(s)"
        )
        assert int(total) == size
        for node in (left, right):
            assert (node.counter("FragCreates"), node.counter("ReasmReqds")) == (0, 0), node.name
        assert client.do("result = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)") == underlay_mtu - 50 - 40 - 12
        # The test can fail: a device-sized datagram without the route's MTU would be fragmented.
        client.do(f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.sendto(bytes(1600), ('{right.mesh}', 9))")
        assert left.counter("FragCreates") > 0


@pytest.mark.parametrize("rp_filter", ["0", "1", "2"])
def test_every_direction_works_with_rp_filter(rp_filter: str) -> None:
    with two_nodes() as (left, right):
        for node in (left, right):
            for device in ("all", "default", "eth0", "isthmus0"):
                node.sysctl(f"net.ipv4.conf.{device}.rp_filter", rp_filter)
        for node in (left, right):
            node.process().do(f"serve_tcp('host', '{node.mesh}', 9000); serve_tcp('any', '{node.workload}', 9001)")
        for near, far in ((left, right), (right, left)):
            for bound in (near.mesh, near.workload, near.underlay):
                for address, port in ((far.mesh, 9000), (far.workload, 9001)):
                    text = near.process().do(
                        f"s = socket.create_connection(('{address}', {port}), 5, ('{bound}', 0)); result = line(s)"
                    )
                    assert text.split()[1] == bound
        assert not any(left.drops().values())
        assert not any(right.drops().values())


class Capture:
    """All packets of a node's underlay device."""

    def __init__(self, node: Node) -> None:
        self.node = node

        def start() -> socket.socket:
            # SOCK_RAW, ETH_P_ALL: both directions.
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            tap.bind(("eth0", 3))
            tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            tap.setblocking(False)
            return tap

        self.tap = node.call(start)

    def packets(self) -> list[bytes]:
        """IPv4 packets seen since the last call, from the outer IP header on."""
        found = []
        while True:
            try:
                frame = self.tap.recv(65536)
            except BlockingIOError:
                return found
            if struct.unpack_from("!H", frame, 12)[0] == 0x0800:
                found.append(frame[14:])

    def addresses(self) -> set[tuple[str, str]]:
        """(source, destination) of every IPv4 packet seen since the last call, outer headers only."""
        return {(socket.inet_ntoa(each[12:16]), socket.inet_ntoa(each[16:20])) for each in self.packets()}


def test_no_mesh_address_is_seen_on_the_underlay(nodes: Nodes) -> None:
    left, right = nodes
    capture = Capture(left)
    for node in (left, right):
        node.process().do(
            f"serve_tcp('mesh', '{node.mesh}', 9000); serve_tcp('web', '{node.workload}', 8080); "
            f"serve_tcp('under', '{node.underlay}', 9002); serve_udp('u', '{node.workload}', 5353)"
        )
    for cgroup in ("host", "web"):
        client = left.process(cgroup)
        # Service, mesh addresses, a socket bound to the underlay address towards the mesh, and a daemon
        # that listens on the underlay address only, dialled with any source.
        client.do(f"line(socket.create_connection(('{VIP}', 80), 5))")
        client.do(
            "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(5)\n"
            f"u.sendto(b'x', ('{VIP}', 53)); u.recv(9)"
        )
        client.do(f"line(socket.create_connection(('{right.mesh}', 9000), 5, ('{left.underlay}', 0)))")
        text = client.do(f"result = line(socket.create_connection(('{right.underlay}', 9002), 5))")
        assert text == f"under {left.underlay}"
        text = client.do(f"result = line(socket.create_connection(('{right.underlay}', 9002), 5, ('{left.mesh}', 0)))")
        assert text == f"under {left.mesh}"
    seen = capture.addresses()
    capture.tap.close()
    assert seen == {(left.underlay, right.underlay), (right.underlay, left.underlay)}


@pytest.mark.parametrize("cgroup", ["host", "web"])
def test_the_wire_format_is_cilium_s(nodes: Nodes, cgroup: str) -> None:
    left, right = nodes
    capture = Capture(left)
    client = left.process(cgroup)
    client.do(f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{right.mesh}', 9))")
    (packet,) = wait_for(
        lambda: [
            each for each in capture.packets() if each[9] == 17 and each[12:16] == socket.inet_aton(left.underlay)
        ],
        "the outer packet",
    )
    capture.tap.close()
    assert packet[0] == 0x45
    assert packet[8] == 64, "TTL"
    _, port, _, checksum = struct.unpack_from("!HHHH", packet, 20)
    assert (port, checksum) == (8472, 0)
    flags, vni = struct.unpack_from("!II", packet, 28)
    assert flags == 0x08000000
    assert vni >> 8 == (6 if cgroup == "host" else left.identity)
    assert struct.unpack_from("!H", packet, 48)[0] == 0x0800
    assert socket.inet_ntoa(packet[62:66]) == (left.mesh if cgroup == "host" else left.workload)


def test_a_new_agent_replaces_the_programs_under_traffic(nodes: Nodes) -> None:
    left, right = nodes
    right.process("web").do(f"serve_tcp('b', '{right.workload}', 8080)")
    client = left.process("web")
    client.do(
        f"""
s = socket.create_connection(('{VIP}', 80), 5)
line(s)
failed, done, stop = [], [0], threading.Event()
def work():
    while not stop.is_set():
        try:
            with socket.create_connection(('{VIP}', 80), 2) as c:
                line(c)
            done[0] += 1
        except OSError as error:
            failed.append(repr(error))
thread = threading.Thread(target=work)
thread.start()
"""
    )
    for _ in range(5):
        left.bpf.close()
        left.load()
        index = left.call(netlink.overlay_index)
        assert left.call(left.bpf.audit_attachments, index) == []
        before = client.do("result = done[0]")
        wait_for(lambda before=before: client.do("result = done[0]") > before + 5, "connections with the new programs")
    client.do("stop.set(); thread.join()")
    assert client.do("result = failed") == []
    assert client.do("s.sendall(b'?'); result = line(s)") == "1"
    counts = left.bpf.counters().backends[(backend(right, 8080, TCP).address, 8080, TCP)]
    assert counts.connects == client.do("result = done[0] + 1")


def test_a_removed_filter_is_named(nodes: Nodes) -> None:
    left, _ = nodes
    index = left.call(netlink.overlay_index)
    left.call(left.bpf.detach_overlay, index)
    problems = left.call(left.bpf.audit_attachments, index)
    assert [each.split(" to ")[0] for each in problems] == [
        "tc program overlay_ingress is not attached",
        "tc program overlay_egress is not attached",
    ]
