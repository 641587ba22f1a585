# SPDX-License-Identifier: GPL-3.0-or-later
"""Pods of a Kubernetes node in the mesh: addresses and identities are kept in both directions, beside a CNI that
masquerades and a kube-proxy that marks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from bpf.pods import CLUSTER_IP, HOST_PORT, NODE_PORT, OUTSIDE, REMOTE_NODE_PORT, KubernetesNode, kubernetes_nodes
from bpf.reaching import (
    Both,
    dial,
    every_way,
    identities,
    no_drops,
    on_one_node,
    outlives_reloads,
    serve,
    serve_in_pods,
)
from bpf.topology import PATIENCE, TCP, InsideError, wait_for
from isthmus_agent import netlink
from isthmus_agent.agent.kernel import HostKernel
from isthmus_agent.desired.datapath import Backend
from isthmus_mesh import documents, keys, wire


@pytest.fixture
def both() -> Iterator[Both]:
    with kubernetes_nodes() as found:
        yield found


@pytest.mark.parametrize("rp_filter", ["0", "1"])
def test_every_direction_keeps_source_and_identity(both: Both, rp_filter: str) -> None:
    left, right = both
    for each in both:
        for device in ("all", "default", "eth0", "isthmus0", "cni0"):
            each.node.sysctl(f"net.ipv4.conf.{device}.rp_filter", rp_filter)
    serve(both)
    for near, far in ((left, right), (right, left)):
        every_way(near, far)
    no_drops(both)


def test_on_one_node_host_workloads_and_pods_reach_each_other(both: Both) -> None:
    left, _ = both
    serve(both)
    on_one_node(left)
    no_drops(both)


def test_what_is_not_the_meshs_is_masqueraded_as_before(both: Both) -> None:
    left, right = both
    right.node.process().do(f"serve_tcp('outside', '{OUTSIDE}', 9000)")
    assert dial(left.process(left.pods[0]), OUTSIDE, 9000) == f"outside {left.node.underlay}"


def test_without_our_table_the_source_is_lost(both: Both) -> None:
    """The other tests can fail: the rules of this topology do masquerade."""
    left, right = both
    serve(both)
    for each in both:
        each.nft("delete table ip isthmus")
    assert dial(left.process(left.pods[0]), right.node.workload, 9000) == f"b-web {left.node.mesh}"
    assert dial(left.node.process("web"), right.pods[0].address, 8080) == f"b-pod0 {right.gateway}"


@pytest.mark.parametrize("rp_filter", ["0", "1"])
def test_a_node_port_is_masqueraded_as_before_from_the_mesh_and_from_elsewhere(both: Both, rp_filter: str) -> None:
    """Towards the node's underlay address nothing of the mesh is on the way, in no direction."""
    left, right = both
    serve(both)
    for device in ("all", "default", "eth0", "isthmus0"):
        right.node.sysctl(f"net.ipv4.conf.{device}.rp_filter", rp_filter)
    client = right.node.process()
    assert dial(client, left.node.mesh, NODE_PORT) == f"a-pod0 {left.gateway}"
    seen = identities(right)
    assert dial(client, left.node.underlay, NODE_PORT) == f"a-pod0 {left.gateway}"
    assert identities(right) == seen, "nothing came over the overlay"
    no_drops(both)


def test_a_node_port_with_a_remote_backend_sends_as_the_node(both: Both) -> None:
    """Ingress traffic, by an EndpointSlice with backends of the mesh: kube-proxy masquerades, with an address that the
    other side knows."""
    left, right = both
    serve(both)
    client = left.process(left.pods[1])
    for address in (left.gateway, left.node.underlay):
        assert dial(client, address, REMOTE_NODE_PORT) == f"b-pod0 {left.node.mesh}"
    assert (right.pods[0].address, 6) in identities(right)
    no_drops(both)


def test_pods_of_the_clusters_other_nodes_see_who_asks() -> None:
    """Over the CNI's own way, where the mesh is not. The other node has none of it here, and is of the same cluster."""
    with kubernetes_nodes(load=False) as (left, right):
        far, pod = left.range.replace(".1.0/24", ".2.7"), left.pods[0]
        left.node.datapath = left.wanted().datapath
        left.node.load()

        def routes() -> None:
            subprocess.run(["ip", "route", "add", f"{far}/32", "via", right.node.underlay], check=True)

        def other_node() -> None:
            subprocess.run(["ip", "address", "add", f"{far}/32", "dev", "lo"], check=True)
            subprocess.run(["ip", "route", "add", left.range, "via", left.node.underlay], check=True)

        left.node.call(routes)
        right.node.call(other_node)
        right.node.process().do(f"serve_tcp('far', '{far}', 8080); serve_tcp('far', '{far}', 8081)")
        client = left.process(pod)
        assert dial(client, far, 8080) == f"far {pod.address}"
        # What kube-proxy marked is its own.
        left.nft(
            "add table ip marks\nadd chain ip marks prerouting { type filter hook prerouting priority 0; }\n"
            "add rule ip marks prerouting tcp dport 8081 meta mark set meta mark | 0x4000"
        )
        assert dial(client, far, 8081) == f"far {left.node.underlay}"
        left.nft("delete table ip isthmus")
        assert dial(client, far, 8080) == f"far {left.node.underlay}", "the CNI of this test does masquerade"


@pytest.mark.parametrize("masquerades_all", [True, False], ids=["as flannel", "as bridge"])
def test_a_host_port_is_reached_from_the_mesh_and_from_elsewhere(both: Both, masquerades_all: bool) -> None:
    """From the mesh the pod sees who asks; from elsewhere what it sees without the mesh."""
    left, right = both
    serve(both)
    left.cni(masquerades_all)
    left.host_port()
    far, pod = right.node.process(), right.pods[0]
    assert dial(far, left.node.mesh, HOST_PORT) == f"a-pod0 {right.node.mesh}"
    assert dial(right.process(pod), left.node.mesh, HOST_PORT) == f"a-pod0 {pod.address}"
    assert dial(right.process(pod), left.node.underlay, HOST_PORT) == f"a-pod0 {pod.address}"
    # A pod of the node asks for it too, also the one that has it.
    for each in left.pods:
        for address in (left.node.mesh, left.node.underlay, left.gateway):
            assert dial(left.process(each), address, HOST_PORT) == f"a-pod0 {left.gateway}"
    # What comes in is counted before the node's own rules lead it to the pod.
    assert {(left.node.mesh, pod.identity), (left.node.underlay, pod.identity)} <= identities(left)
    seen = left.gateway if masquerades_all else right.node.underlay
    assert dial(far, left.node.underlay, HOST_PORT) == f"a-pod0 {seen}"
    no_drops(both)


def test_flows_and_new_connections_survive_reloads_of_the_others(both: Both) -> None:
    left, right = both
    serve(both)
    outlives_reloads(left, right)
    no_drops(both)


_SERVICE = "10.96.0.41"  # of the node's own cluster alone, with the other node's underlay address as its backend
_SERVICE_RULES = f"""
add table ip service
add chain ip service prerouting {{{{ type nat hook prerouting priority dstnat; }}}}
add rule ip service prerouting ip daddr {_SERVICE} meta l4proto {{{{ tcp, udp }}}} dnat to {{backend}}
"""


class _Flows:
    """Connections of a pod to the other node's underlay address, as itself and through a service."""

    def __init__(self, near: KubernetesNode, far: KubernetesNode) -> None:
        self.client = near.process(near.pods[0])
        self.targets = (far.node.underlay, _SERVICE)
        near.nft(_SERVICE_RULES.format(backend=far.node.underlay))
        far.node.process().do(
            f"serve_tcp('far', '{far.node.underlay}', 9000); serve_udp('far', '{far.node.underlay}', 9000)"
        )

    def begin(self, name: str) -> list[str]:
        """What the server says to each of the new ones."""
        return list(
            self.client.do(
                f"{name}, result = [], []\n"
                f"for target in {self.targets}:\n"
                "    t = socket.create_connection((target, 9000), 5); result.append(line(t))\n"
                "    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(5); u.connect((target, 9000))\n"
                "    u.send(b'x'); result.append(u.recv(100).decode())\n"
                f"    {name}.append((t, u))"
            )
        )

    def go_on(self, name: str) -> list[str]:
        """Data both ways: what the server of each UDP flow says. OSError when one is dead."""
        return list(
            self.client.do(
                "result = []\n"
                f"for t, u in {name}:\n"
                "    t.settimeout(5)\n"
                "    for _ in range(3):\n"
                "        t.sendall(b'?'); assert line(t), 'closed'\n"
                "    u.send(b'x'); result.append(u.recv(100).decode())"
            )
        )


@pytest.mark.parametrize("rp_filter", ["0", "1"])
def test_what_pods_have_with_underlay_addresses_before_the_agent_goes_on(rp_filter: str) -> None:
    with kubernetes_nodes(load=False) as both:
        left, right = both
        for device in ("all", "default", "eth0", "cni0"):
            left.node.sysctl(f"net.ipv4.conf.{device}.rp_filter", rp_filter)
        flows = _Flows(left, right)
        masqueraded, kept = f"far {left.node.underlay}", f"far {left.pods[0].address}"
        assert flows.begin("old") == [masqueraded] * 4, "the CNI of this test does masquerade"
        for each in both:
            each.node.datapath = each.wanted().datapath
            each.node.load()
        for _ in range(2):
            assert flows.go_on("old") == [masqueraded] * 2
            assert flows.begin("new") == [kept] * 4
            assert flows.go_on("new") == [kept] * 2
            left.cni()
            assert flows.go_on("new") == [kept] * 2
        # Marks of others stay what they are, and what is marked by others has the new way.
        left.nft(
            "add table ip marks\nadd chain ip marks prerouting { type filter hook prerouting priority mangle; }\n"
            "add rule ip marks prerouting meta mark set 0x12340100\n"
            "add chain ip marks postrouting { type filter hook postrouting priority 0; }\n"
            "add rule ip marks postrouting iifname cni0 meta mark & 0xffffff00 != 0x12340100 drop"
        )
        assert flows.go_on("old") == [masqueraded] * 2
        assert flows.begin("newer") == [kept] * 4
        no_drops(both)
        # Where nothing may go in clear, they end.
        keep = left.node.datapath.keep_source
        assert keep is not None
        left.node.apply(replace(left.node.datapath, keep_source=replace(keep, members=frozenset())))
        with pytest.raises(InsideError):
            flows.go_on("old")
        assert flows.go_on("newer") == [kept] * 2


def test_what_pods_have_with_a_host_that_joins_goes_on() -> None:
    with kubernetes_nodes(load=False) as both:
        left, right = both
        right.node.datapath = right.wanted().datapath
        right.node.load()
        flows = _Flows(left, right)
        joined = left.documents
        left.documents = {
            key: value for key, value in joined.items() if not key.startswith(keys.node_key("cloud", "cloud-1", True))
        }
        assert left.documents != joined
        kernel = HostKernel(left.node.pin_dir, left.node.cgroup)
        try:
            assert not left.node.call(kernel.start, left.wanted().datapath).problems
            masqueraded, kept = f"far {left.node.underlay}", f"far {left.pods[0].address}"
            assert flows.begin("old") == [masqueraded] * 4
            left.documents = joined
            datapath = left.wanted().datapath
            # Routes come first; whatever is sent before the rest is there goes on as well.
            left.node.call(kernel._add_ways, datapath)
            assert flows.go_on("old") == [masqueraded] * 2
            assert not left.node.call(kernel.apply, datapath).problems
            assert flows.go_on("old") == [masqueraded] * 2
            assert flows.begin("new") == [kept] * 4
        finally:
            left.node.call(kernel.close)


def test_what_a_firewall_drops_while_it_is_forwarded_is_counted(both: Both) -> None:
    """An `accept` of ours would not help: in netfilter a drop anywhere wins. So it is told."""
    left, right = both
    serve(both)
    keep = left.node.datapath.keep_source
    client = left.process(left.pods[0])
    assert dial(client, right.node.workload, 9000) == f"b-web {left.pods[0].address}"
    assert left.node.call(netlink.mend_keep_source, keep, netlink.OVERLAY) == ((), 0)
    left.nft("add table ip filter\nadd chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
    client.do(f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.sendto(b'x', ('{right.node.workload}', 9000))")
    assert left.node.call(netlink.mend_keep_source, keep, netlink.OVERLAY) == ((), 1)
    right.node.process().do(
        f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.sendto(b'x', ('{left.pods[0].address}', 9000))"
    )
    wait_for(
        lambda: left.node.call(netlink.mend_keep_source, keep, netlink.OVERLAY) == ((), 2), "the other direction, too"
    )


def test_a_bulk_transfer_between_pods_finds_the_paths_mtu(both: Both) -> None:
    """Devices of pods have 1500 bytes, the way between nodes 1450: the node tells the pod, once."""
    left, right = both
    serve(both)
    client = left.process(left.pods[0])
    size = 16 << 20
    total = client.do(
        f"s = socket.create_connection(('{right.pods[0].address}', 8080), 20); line(s)\n"
        f"before = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)\n"
        f"s.sendall(bytes({size} - 1) + b'?'); result = [before, int(line(s))]"
    )
    assert total == [1500 - 40 - 12, size]
    assert client.do("result = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)") == 1450 - 40 - 12
    for each in both:
        assert (each.node.counter("FragCreates"), each.node.counter("ReasmReqds")) == (0, 0)
    no_drops(both)


CLIENTS = ("pod", "host network", "older than the agent")


def test_a_cluster_ip_leads_to_backends_of_both_clusters_from_everywhere() -> None:
    with kubernetes_nodes(load=False) as both:
        left, _ = both
        serve_in_pods(both)
        old = left.process(left.pods[1])
        for each in both:
            each.node.datapath = each.wanted().datapath
            each.node.load()
        clients = (left.process(left.pods[1]), left.node.process("host"), old)
        for name, client in zip(CLIENTS, clients, strict=True):
            tcp, udp, peers = set(), set(), set()
            for _ in range(40):
                answer = client.do(
                    f"s = socket.create_connection(('{CLUSTER_IP}', 80), 5)\n"
                    "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(5)\n"
                    f"u.sendto(b'x', ('{CLUSTER_IP}', 53)); data, peer = u.recvfrom(100)\n"
                    "result = [line(s), s.getpeername(), data.decode(), peer]; s.close(); u.close()"
                )
                tcp.add(answer[0].split()[0])
                udp.add(answer[2].split()[0])
                peers.update((tuple(answer[1]), tuple(answer[3])))
            assert tcp == udp == {"a-pod0", "b-pod0"}, name
            assert peers == {(CLUSTER_IP, 80), (CLUSTER_IP, 53)}, name
        no_drops(both)


@contextlib.contextmanager
def _namespaces_kept(node: KubernetesNode, place: Path) -> Iterator[None]:
    """As a container runtime keeps them, with one that is being made."""
    (place / "being-made").touch()
    for number, pod in enumerate(node.pods):
        kept = place / f"cni-{number}"
        kept.touch()
        subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/fd/{pod.netns}", kept], check=True)
    try:
        yield
    finally:
        for kept in place.glob("cni-*"):
            subprocess.run(["umount", kept], check=True)


def test_sockets_to_a_backend_that_is_gone_end_in_pods_too(both: Both, tmp_path: Path) -> None:
    left, right = both
    serve(both)
    with _namespaces_kept(left, tmp_path):
        own = keys.service_key("onprem", "shop", "api")
        left.documents[own] = json.dumps({**json.loads(left.documents[own]), "backends": {}}).encode()
        left.apply()
        clients = [left.process(left.pods[0]), left.process(left.pods[1]), left.node.process()]
        for client in clients:
            assert dial(client, CLUSTER_IP, 80).startswith("b-pod0")
            client.do(f"direct = socket.create_connection(('{right.pods[0].address}', 8080), 5); line(direct)")
        gone = Backend(ip_address(right.pods[0].address), 8080, TCP, 2, ip_address(right.node.underlay))
        cookies = left.node.bpf.sockets_of([gone])
        assert len(cookies) == 3
        destination = [(gone.address, 8080, TCP)]
        ended = left.node.call(netlink.destroy_sockets, destination, cookies)
        assert len(ended) == 1
        rest = cookies - ended
        assert left.node.call(netlink.destroy_pods_sockets, destination, rest, [tmp_path, tmp_path / "none"]) == rest
        for client in clients:
            with pytest.raises(InsideError) as caught:
                client.do("s.recv(1)")
            assert caught.value.errno == errno.ECONNABORTED
            assert client.do("direct.sendall(b'?'); result = line(direct)") == "1", "no socket of the service's"


# What a service mesh's sidecar does: the pod's own connections go to a listener in the pod, which asks for the address
# that was dialled.
_SIDECAR = f"""
add table ip sidecar
add chain ip sidecar output {{ type nat hook output priority -100; }}
add rule ip sidecar output ip daddr {CLUSTER_IP} meta l4proto {{ tcp, udp }} redirect to :15001
"""
_DIALLED = """
tcp = socket.create_server(('127.0.0.1', 15001))
def proxy():
    while True:
        connection, peer = tcp.accept()
        dialled = connection.getsockopt(socket.SOL_IP, 80, 16)  # SO_ORIGINAL_DST
        connection.sendall(f"{socket.inet_ntoa(dialled[4:8])} {int.from_bytes(dialled[2:4], 'big')}\\n".encode())
        connection.close()
threading.Thread(target=proxy, daemon=True).start()
serve_udp('sidecar', '127.0.0.1', 15001)
"""
_DIAL = f"""
s = socket.create_connection(('{CLUSTER_IP}', 80), 5)
m = socket.socket(socket.AF_INET6, socket.SOCK_STREAM); m.settimeout(5); m.connect(('::ffff:{CLUSTER_IP}', 80))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.settimeout(5); u.sendto(b'x', ('{CLUSTER_IP}', 53))
result = [line(s), line(m), u.recvfrom(100)[0].decode().split()[0]]
"""


def test_a_sidecar_sees_the_service_addresses_that_its_pod_dials(both: Both, tmp_path: Path) -> None:
    left, _ = both
    serve_in_pods(both)
    for pod in left.pods:
        left.process(pod).do(_DIALLED)
        pod.pool.submit(
            lambda: subprocess.run(["nft", "-f", "-"], input=_SIDECAR, check=True, capture_output=True, text=True)
        ).result()
    clients = [left.process(pod) for pod in left.pods]
    backends = {"a-pod0", "b-pod0"}
    for client in clients:
        assert {answer.split()[0] for answer in client.do(_DIAL)} <= backends, "translated before the sidecar sees it"
    alone = ip_address(left.pods[1].address)
    pod = (alone, "uid-of-pod1")
    left.documents[keys.untranslated_key(str(alone))] = documents.Untranslated("shop", "api", pod[1]).to_json().encode()
    assert left.wanted().pods.untranslated == {pod}
    with _namespaces_kept(left, tmp_path):
        found = left.node.call(netlink.namespaces.cookies, {alone, ip_address("10.244.1.99")}, [tmp_path])
    assert found.keys() == {alone}
    left.namespaces = {pod: found[alone]}
    left.apply()
    assert left.node.bpf.audit(left.node.datapath) == []
    for _ in range(20):
        assert clients[1].do(_DIAL) == [f"{CLUSTER_IP} 80", f"{CLUSTER_IP} 80", "sidecar"]
        assert {answer.split()[0] for answer in clients[0].do(_DIAL)} <= backends, "the other pod is as before"
    # What is no service address is dialled as ever, with the pod's own address.
    assert dial(clients[1], both[1].pods[0].address, 8080) == f"b-pod0 {alone}"
    del left.documents[keys.untranslated_key(str(alone))]
    left.apply()
    assert {answer.split()[0] for answer in clients[1].do(_DIAL)} <= backends


def test_after_300_quick_changes_the_kernel_holds_what_is_published(both: Both) -> None:
    left, right = both
    chance = random.Random(7)  # noqa: S311
    first = 1 << 16
    published: dict[str, int] = {pod.address: pod.identity for pod in left.pods}
    prefix = left.range.removesuffix("0/24")
    for number in range(300 // PATIENCE):
        address = f"{prefix}{chance.randint(5, 20)}"
        if address in published and chance.random() < 0.5:
            del published[address]
            left.documents.pop(keys.ip_key(address))
        else:
            published[address] = first + chance.randint(500, 503)
            pair = wire.IPIdentityPair(address, published[address], left.node.underlay)
            left.documents[keys.ip_key(address)] = pair.to_json().encode()
        left.apply()
        if number % 20 == 0:
            assert left.node.bpf.audit(left.node.datapath) == []
            found = left.node.datapath.local
            assert {str(key): value for key, value in found.items() if str(key).startswith(prefix)} == published
    assert left.node.bpf.audit(left.node.datapath) == []
    assert left.node.call(netlink.audit_network, left.node.datapath) == []
    # An address that nobody has any more neither sends nor receives.
    pod = left.pods[0]
    left.documents.pop(keys.ip_key(pod.address), None)
    left.apply()
    right.node.process().do(f"serve_udp('host', '{right.node.mesh}', 9000)")
    client = left.process(pod)
    client.do(f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.sendto(b'x', ('{right.node.mesh}', 9000))")
    wait_for(lambda: left.node.drops()["not_local_source"], "its packet is dropped at home")
    right.node.process().do(
        f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.sendto(b'x', ('{pod.address}', 9000))"
    )
    wait_for(lambda: left.node.drops()["not_local_dest"], "what comes for it is dropped")
