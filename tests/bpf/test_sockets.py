# SPDX-License-Identifier: GPL-3.0-or-later
"""Service addresses and workload addresses on real sockets, over the overlay."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import ip_address

import pytest
from bpf.topology import TCP, UDP, VIP, VIP_EMPTY, InsideError, Node, backend, wait_for, with_service
from isthmus_agent import netlink
from isthmus_agent.bpf import abi
from isthmus_agent.bpf.maps import Map
from isthmus_agent.desired.datapath import Frontend, Service

Nodes = tuple[Node, Node]


@pytest.fixture
def served(nodes: Nodes) -> Nodes:
    """Node b's workload serves TCP 8080 and UDP 5353."""
    _, right = nodes
    server = right.process("web")
    server.do(f"serve_tcp('b', '{right.workload}', 8080)")
    server.do(f"serve_udp('b', '{right.workload}', 5353)")
    return nodes


@pytest.mark.parametrize("cgroup", ["host", "web", "web/inner"])
def test_tcp_reaches_the_backend_with_the_workloads_source(served: Nodes, cgroup: str) -> None:
    left, right = served
    client = left.process(cgroup)
    answer = client.do(f"s = socket.create_connection(('{VIP}', 80), 5); result = [line(s), s.getpeername()[:2]]")
    source = left.mesh if cgroup == "host" else left.workload
    assert answer == [f"b {source}", [VIP, 80]]
    counts = left.bpf.counters().backends
    assert counts[(backend(right, 8080, TCP).address, 8080, TCP)].connects == 1
    identity = 6 if cgroup == "host" else left.identity
    seen = right.bpf.counters().identities
    assert {(str(each.destination), each.identity, each.cluster_id) for each in seen} == {(right.workload, identity, 1)}
    assert right.bpf.counters().drops == dict.fromkeys(right.drops(), 0)


def test_a_mapped_ipv6_socket_is_served_the_same(served: Nodes) -> None:
    left, _ = served
    for cgroup, source in (("host", left.mesh), ("web", left.workload)):
        client = left.process(cgroup)
        answer = client.do(
            "s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM); s.settimeout(5); "
            f"s.connect(('::ffff:{VIP}', 80)); result = [line(s), s.getpeername()[:2], s.getsockname()[0]]"
        )
        assert answer == [f"b {source}", [f"::ffff:{VIP}", 80], f"::ffff:{source}"]


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("cgroup", ["host", "web"])
def test_udp_is_translated_both_ways(served: Nodes, family: str, connected: bool, cgroup: str) -> None:
    left, right = served
    client = left.process(cgroup)
    address = VIP if family == "AF_INET" else f"::ffff:{VIP}"
    client.do(f"s = socket.socket(socket.{family}, socket.SOCK_DGRAM); s.settimeout(5)")
    if connected:
        client.do(f"s.connect(('{address}', 53)); s.send(b'x')")
    else:
        client.do(f"s.sendto(b'x', ('{address}', 53))")
    text, peer = client.do("data, peer = s.recvfrom(100); result = [data.decode(), peer[:2]]")
    assert text == f"b {left.mesh if cgroup == 'host' else left.workload}"
    assert peer == [address, 53]
    count = left.bpf.counters().backends[(backend(right, 5353, UDP).address, 5353, UDP)]
    assert (count.connects, count.datagrams) == ((1, 0) if connected else (0, 1))
    if connected:
        assert client.do("result = s.getpeername()[:2]") == [address, 53]


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_no_backend_is_host_unreachable(nodes: Nodes, family: str) -> None:
    left, _ = nodes
    client = left.process()
    address = VIP_EMPTY if family == "AF_INET" else f"::ffff:{VIP_EMPTY}"
    expected = errno.EHOSTUNREACH if left.bpf.has_set_retval() else errno.EPERM
    for code in (
        f"socket.socket(socket.{family}).connect(('{address}', 80))",
        f"socket.socket(socket.{family}, socket.SOCK_DGRAM).connect(('{address}', 53))",
        f"socket.socket(socket.{family}, socket.SOCK_DGRAM).sendto(b'x', ('{address}', 53))",
    ):
        with pytest.raises(InsideError) as caught:
            client.do(code)
        assert caught.value.errno == expected, code


def test_an_unknown_port_of_a_service_address_fails_at_once(nodes: Nodes) -> None:
    left, _ = nodes
    with pytest.raises(InsideError) as caught:
        left.process().do(f"socket.create_connection(('{VIP}', 81), 5)")
    assert caught.value.errno == errno.EHOSTUNREACH


def test_native_ipv6_passes_through(nodes: Nodes) -> None:
    left, _ = nodes
    answer = left.process("web").do(
        "l = socket.create_server(('::1', 7777), family=socket.AF_INET6); "
        "s = socket.create_connection(('::1', 7777), 5); result = s.getpeername()[:2]"
    )
    assert answer == ["::1", 7777]


def test_a_socket_bound_by_its_application_keeps_its_address(served: Nodes) -> None:
    left, _ = served
    client = left.process("web")
    answer = client.do(f"s = socket.create_connection(('{VIP}', 80), 5, ('{left.mesh}', 0)); result = line(s)")
    assert answer == f"b {left.mesh}"


@pytest.mark.parametrize("bound", ["mesh", "workload"])
def test_a_mapped_ipv6_socket_bound_by_its_application_keeps_its_address(served: Nodes, bound: str) -> None:
    left, _ = served
    source = getattr(left, bound)
    for cgroup in ("host", "web"):
        answers = left.process(cgroup).do(
            "s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM); s.settimeout(5); "
            f"s.bind(('::ffff:{source}', 0)); s.connect(('::ffff:{VIP}', 80))\n"
            "u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); u.settimeout(5); "
            f"u.bind(('::ffff:{source}', 0)); u.sendto(b'x', ('::ffff:{VIP}', 53))\n"
            "data, peer = u.recvfrom(100); result = [line(s), s.getpeername()[:2], data.decode(), peer[:2]]"
        )
        text = f"b {source}"
        assert answers == [text, [f"::ffff:{VIP}", 80], text, [f"::ffff:{VIP}", 53]]


def test_the_source_of_a_datagrams_packet_information_is_kept(served: Nodes) -> None:
    left, _ = served
    client = left.process("web")
    for source in (left.mesh, left.workload):
        text = client.do(
            "u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); u.settimeout(5)\n"
            f"info = socket.inet_pton(socket.AF_INET6, '::ffff:{source}') + bytes(4)\n"
            "u.sendmsg([b'x'], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)], 0, "
            f"('::ffff:{VIP}', 53)); result = u.recv(100).decode()"
        )
        assert text == f"b {source}"


# Python gives an AF_INET6 socket AF_INET6 addresses only; C programs and the JVM of old do this.
_AF_INET_ADDRESS = """
u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); u.settimeout(5)
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
def inet(address, port):
    return struct.pack("=HH", socket.AF_INET, socket.htons(port)) + socket.inet_aton(address) + bytes(8)
"""


@pytest.mark.parametrize("cgroup", ["host", "web"])
def test_an_ipv4_address_given_to_an_ipv6_datagram_socket(served: Nodes, cgroup: str) -> None:
    left, _ = served
    client = left.process(cgroup)
    source = left.mesh if cgroup == "host" else left.workload
    client.do(f"{_AF_INET_ADDRESS}\nchecked(libc.sendto(u.fileno(), b'x', 1, 0, inet('{VIP}', 53), 16))")
    answer = client.do("data, peer = u.recvfrom(100); result = [data.decode(), peer[:2]]")
    assert answer == [f"b {source}", [f"::ffff:{VIP}", 53]]
    client.do(f"{_AF_INET_ADDRESS}\nchecked(libc.connect(u.fileno(), inet('{VIP}', 53), 16)); u.send(b'x')")
    answer = client.do("data, peer = u.recvfrom(100); result = [data.decode(), peer[:2], u.getpeername()[:2]]")
    assert answer == [f"b {source}", [f"::ffff:{VIP}", 53], [f"::ffff:{VIP}", 53]]


def test_a_datagram_socket_keeps_its_mesh_source_when_it_dials_outside_later(served: Nodes) -> None:
    """A known limit (docs/architecture.md): to the kernel, what a hook bound is the application's own choice."""
    left, right = served
    client = left.process("web")
    client.do(
        f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.connect(('{right.mesh}', 9))\n"
        "checked = ctypes.CDLL(None).connect(u.fileno(), bytes(16), 16)\n"  # AF_UNSPEC: no longer connected
        f"u.connect(('{right.underlay}', 9))"
    )
    assert client.do("result = [checked, u.getsockname()[0]]") == [0, left.workload]
    fresh = client.do(
        f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.connect(('{right.underlay}', 9)); "
        "result = u.getsockname()[0]"
    )
    assert fresh == left.underlay


def test_a_nodes_underlay_address_is_reached_with_the_underlay_address(nodes: Nodes) -> None:
    left, right = nodes
    right.process().do(f"serve_tcp('b', '{right.underlay}', 8081)")
    answer = left.process("web").do(f"s = socket.create_connection(('{right.underlay}', 8081), 5); result = line(s)")
    assert answer == f"b {left.underlay}"


def test_a_workloads_missing_address_is_refused_not_replaced(served: Nodes) -> None:
    left, _ = served
    lost = replace(left.datapath, workloads=dict.fromkeys(left.datapath.workloads, ip_address("10.101.0.9")))
    left.bpf.apply(lost)
    with pytest.raises(InsideError) as caught:
        left.process("web").do(f"socket.create_connection(('{VIP}', 80), 5)")
    assert caught.value.errno == (errno.EADDRNOTAVAIL if left.bpf.has_set_retval() else errno.EPERM)


def test_two_backends_share_connections_and_one_socket_keeps_its_backend(nodes: Nodes) -> None:
    left, right = nodes
    server = right.process("web")
    for name, port in (("one", 8080), ("two", 8090)):
        server.do(f"serve_tcp('{name}', '{right.workload}', {port}); serve_udp('{name}', '{right.workload}', {port})")
    wanted = with_service(left.datapath, 80, TCP, backend(right, 8080, TCP), backend(right, 8090, TCP))
    left.apply(with_service(wanted, 53, UDP, backend(right, 8080, UDP), backend(right, 8090, UDP)))
    client = left.process()
    names = client.do(f"result = [line(socket.create_connection(('{VIP}', 80), 5)).split()[0] for _ in range(60)]")
    assert 10 < names.count("one") < 50
    per_socket = client.do(
        f"""
result = []
for _ in range(40):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(5)
    names = set()
    for _ in range(5):
        s.sendto(b'x', ('{VIP}', 53))
        names.add(s.recvfrom(100)[0].decode().split()[0])
    result.append(sorted(names))
"""
    )
    assert {tuple(each) for each in per_socket} == {("one",), ("two",)}


def test_with_session_affinity_a_client_stays_at_its_backend(nodes: Nodes) -> None:
    """A workload and its host are two clients. One whose backend serves no more, or that was away for too long, gets
    another."""
    left, right = nodes
    ports = [*range(8080, 8093)]
    server = right.process("web")
    for port in ports:
        server.do(f"serve_tcp('{port}', '{right.workload}', {port}); serve_udp('{port}', '{right.workload}', {port})")

    def apply(tcp: list[int], seconds: int) -> None:
        there = with_service(left.datapath, 80, TCP, *(backend(right, port, TCP) for port in tcp))
        left.apply(there)
        there = with_service(there, 80, TCP, *(backend(right, port, TCP) for port in tcp), session_affinity=seconds)
        left.apply(
            with_service(there, 53, UDP, *(backend(right, port, UDP) for port in ports), session_affinity=seconds)
        )
        assert left.bpf.audit(left.datapath) == []

    def reached(count: int = 20) -> set[str]:
        dial = f"line(socket.create_connection(('{VIP}', 80), 5)).split()[0]"
        return set(client.do(f"result = [{dial} for _ in range({count})]"))

    apply(ports, 10_800)
    stays = {}
    for cgroup in ("host", "web"):
        client = left.process(cgroup)
        (stays[cgroup],) = reached()
        names = client.do(
            f"""
result = []
for _ in range(20):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(5)
    s.sendto(b'x', ('{VIP}', 53))
    result.append(s.recvfrom(100)[0].decode().split()[0])
"""
        )
        assert len(set(names)) == 1
    # Others come and go: it stays. Its own goes: it stays at another one, also when its own is back.
    (had,) = reached()
    apply([port for port in ports if str(port) == had or port % 3 == 0], 10_800)
    assert reached() == {had}
    apply([port for port in ports if str(port) != had], 10_800)
    (other,) = reached()
    apply(ports, 10_800)
    assert reached() == {other} != {had}

    # Times are since the boot, which may be not long ago.
    apply(ports, 20)
    assert reached() == {other}
    table = Map.pinned(left.bpf.lib, left.bpf.pin_dir / "affinity")
    entry = abi.LAYOUTS["isthmus_affinity_value"].struct
    found = set()
    for _ in range(40):
        for key, value in table.items().items():
            used, number, _ = entry.unpack(value)
            table.put(key, entry.pack(used - 21 * 10**9, number, 0))
        found |= reached(1)
    assert len(found) > 1, "it was away for too long each time"
    table.close()
    apply(ports, 0)
    assert len(reached(60)) > 1


def test_a_restart_with_pins_keeps_connections_and_names(served: Nodes) -> None:
    left, right = served
    client = left.process("web")
    client.do(f"s = socket.create_connection(('{VIP}', 80), 5); result = line(s)")
    client.do(f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(5); u.sendto(b'x', ('{VIP}', 53))")
    left.bpf.close()
    # No agent: new and old connections work.
    assert client.do(f"n = socket.create_connection(('{VIP}', 80), 5); result = line(n)") == f"b {left.workload}"
    left.load()
    assert not left.bpf.apply(left.datapath)
    assert client.do("s.sendall(b'abc?'); result = [line(s), s.getpeername()[:2]]") == ["4", [VIP, 80]]
    assert client.do("data, peer = u.recvfrom(100); result = peer") == [VIP, 53]
    assert left.bpf.counters().backends[(backend(right, 8080, TCP).address, 8080, TCP)].connects == 2


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_exactly_the_sockets_of_a_removed_backend_end(nodes: Nodes, family: str) -> None:
    left, right = nodes
    prefix = "" if family == "AF_INET" else "::ffff:"
    server = right.process("web")
    for name, port in (("one", 8080), ("two", 8090)):
        server.do(f"serve_tcp('{name}', '{right.workload}', {port}); serve_udp('{name}', '{right.workload}', {port})")
    one, two = backend(right, 8080, TCP), backend(right, 8090, TCP)
    udp_one, udp_two = backend(right, 8080, UDP), backend(right, 8090, UDP)
    client = left.process()
    client.do("tcp, udp = {}, {}")
    for name, of_tcp, of_udp in (("one", one, udp_one), ("two", two, udp_two)):
        left.apply(with_service(with_service(left.datapath, 80, TCP, of_tcp), 53, UDP, of_udp))
        client.do(
            f"s = tcp['{name}'] = socket.socket(socket.{family}); s.settimeout(5)\n"
            f"s.connect(('{prefix}{VIP}', 80)); line(s)\n"
            f"s = udp['{name}'] = socket.socket(socket.{family}, socket.SOCK_DGRAM); s.settimeout(5); "
            f"s.connect(('{prefix}{VIP}', 53)); s.send(b'x'); s.recv(100)"
        )
        if name == "one":
            # Dialled without the service: same backend, another socket.
            client.do(f"direct = socket.create_connection(('{right.workload}', 8080), 5); line(direct)")
    # Backend one is gone from the maps by now: its sockets are still known.
    cookies = left.bpf.sockets_of([one, udp_one])
    assert len(cookies) == 2
    gone = [(each.address, each.port, each.protocol) for each in (one, udp_one)]
    assert left.call(netlink.destroy_sockets, gone, cookies) == cookies
    for kind in ("tcp", "udp"):
        with pytest.raises(InsideError) as caught:
            client.do(f"{kind}['one'].recv(1)")
        assert caught.value.errno == errno.ECONNABORTED
    assert client.do("tcp['two'].sendall(b'?'); result = line(tcp['two'])") == "1"
    assert client.do("direct.sendall(b'?'); result = line(direct)") == "1"
    assert client.do("udp['two'].send(b'x'); result = udp['two'].recv(100).decode()").startswith("two")
    assert left.call(netlink.destroy_sockets, gone, cookies) == set()
    # Closed sockets are forgotten at once, so the map holds live ones only.
    client.do("[s.close() for s in (*tcp.values(), *udp.values(), direct)]")
    wait_for(lambda: not left.bpf.sockets_of([two, udp_two]), "no socket of backend two is left in the map")


def test_sockets_of_a_service_that_has_no_better_backend_stay(served: Nodes) -> None:
    """Of a lost backend those end whose service has another one; the backend itself may be both's."""
    left, right = served
    lost, other = backend(right, 8080, TCP), backend(right, 8090, TCP)
    services = {Frontend(ip_address(VIP), port, TCP): Service("shop/web", (lost,)) for port in (80, 53)}
    left.apply(replace(left.datapath, services=services))
    client = left.process()
    client.do(f"a = socket.create_connection(('{VIP}', 80), 5); b = socket.create_connection(('{VIP}', 53), 5)")
    client.do("line(a); line(b)")
    assert (len(left.bpf.sockets_of([lost])), left.bpf.left_sockets_of([lost])) == (2, set())
    services[Frontend(ip_address(VIP), 80, TCP)] = Service("shop/web", (other,), (lost,))
    left.apply(replace(left.datapath, services=services))
    (cookie,) = left.bpf.left_sockets_of([lost])
    assert left.call(netlink.destroy_sockets, [(lost.address, lost.port, TCP)], {cookie}) == {cookie}
    with pytest.raises(InsideError):
        client.do("a.recv(1)")
    assert client.do("b.sendall(b'?'); result = line(b)") == "1"


def test_a_socket_that_dials_elsewhere_forgets_its_service(served: Nodes) -> None:
    left, right = served
    client = left.process()
    # The very backend, dialled without the service: its own name must come back now.
    client.do(
        f"s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); s.connect(('{VIP}', 53))\n"
        f"s.connect(('{right.workload}', 5353)); s.send(b'x')"
    )
    assert client.do("result = s.recvfrom(100)[1]") == [right.workload, 5353]
    assert client.do("result = s.getpeername()") == [right.workload, 5353]
    assert left.bpf.sockets_of([backend(right, 5353, UDP)]) == set()


def test_no_backend_any_more_stops_new_flows_and_keeps_open_ones(served: Nodes) -> None:
    left, right = served
    client = left.process()
    client.do(f"s = socket.create_connection(('{VIP}', 80), 5); line(s)")
    services = dict(left.datapath.services)
    services[Frontend(ip_address(VIP), 80, TCP)] = Service("shop/web", (), (backend(right, 8080, TCP),))
    left.apply(replace(left.datapath, services=services))
    with pytest.raises(InsideError):
        client.do(f"socket.create_connection(('{VIP}', 80), 5)")
    assert client.do("s.sendall(b'?'); result = line(s)") == "1"
    assert left.bpf.sockets_of([backend(right, 8080, TCP)])
