# SPDX-License-Identifier: GPL-3.0-or-later
"""Pods of a Kubernetes node in the mesh: addresses and identities are kept in both directions, beside a CNI that
masquerades and a kube-proxy that marks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bpf.pods import CLUSTER_IP, NODE_PORT, OUTSIDE, KubernetesNode, kubernetes_nodes
from bpf.topology import Inside

Both = tuple[KubernetesNode, KubernetesNode]


@pytest.fixture
def both() -> Iterator[Both]:
    with kubernetes_nodes() as found:
        yield found


def _ask(client: Inside, address: str, port: int, bound: str = "") -> str:
    """What the server says: its name and the client's address as it sees it."""
    source = f", ('{bound}', 0)" if bound else ""
    return str(client.do(f"s = socket.create_connection(('{address}', {port}), 5{source}); result = line(s)"))


def _serve(both: Both) -> None:
    for each in both:
        name = each.node.name
        for number, pod in enumerate(each.pods):
            inside = each.process(pod)
            inside.do(f"serve_tcp('{name}-pod{number}', '{pod.address}', 8080)")
            inside.do(f"serve_udp('{name}-pod{number}', '{pod.address}', 5353)")
        each.node.process().do(
            f"serve_tcp('{name}-mesh', '{each.node.mesh}', 9000); serve_tcp('{name}-underlay', '{each.node.underlay}', 9000)"
        )
        each.node.process("web").do(f"serve_tcp('{name}-web', '{each.node.workload}', 9000)")


def _identities(node: KubernetesNode) -> set[tuple[str, int]]:
    return {(str(each.destination), each.identity) for each in node.node.bpf.counters().identities}


def _no_drops(both: Both) -> None:
    for each in both:
        assert not any(each.node.drops().values()), (each.node.name, each.node.drops())


@pytest.mark.parametrize("rp_filter", ["0", "1"])
def test_every_direction_keeps_source_and_identity(both: Both, rp_filter: str) -> None:
    left, right = both
    for each in both:
        for device in ("all", "default", "eth0", "isthmus0", "cni0"):
            each.node.sysctl(f"net.ipv4.conf.{device}.rp_filter", rp_filter)
    _serve(both)
    for near, far in ((left, right), (right, left)):
        pod = near.pods[0]
        name = far.node.name
        client = near.process(pod)
        # pod -> pod, workload, host by mesh and by underlay address
        assert _ask(client, far.pods[0].address, 8080) == f"{name}-pod0 {pod.address}"
        assert _ask(client, far.node.workload, 9000) == f"{name}-web {pod.address}"
        assert _ask(client, far.node.mesh, 9000) == f"{name}-mesh {pod.address}"
        assert _ask(client, far.node.underlay, 9000) == f"{name}-underlay {pod.address}"
        assert {
            (destination, pod.identity)
            for destination in (far.pods[0].address, far.node.workload, far.node.mesh, far.node.underlay)
        } <= _identities(far)
        # host and workload -> pod
        target = far.pods[1]
        assert _ask(near.node.process(), target.address, 8080) == f"{name}-pod1 {near.node.mesh}"
        assert _ask(near.node.process(), target.address, 8080, near.node.underlay) == f"{name}-pod1 {near.node.underlay}"
        assert _ask(near.node.process("web"), target.address, 8080) == f"{name}-pod1 {near.node.workload}"
        assert {(target.address, 6), (target.address, near.node.identity)} <= _identities(far)
    _no_drops(both)


def test_on_one_node_host_workloads_and_pods_reach_each_other(both: Both) -> None:
    left, _ = both
    _serve(both)
    pod = left.pods[0]
    client = left.process(pod)
    assert _ask(client, left.pods[1].address, 8080) == f"a-pod1 {pod.address}"
    assert _ask(client, left.node.workload, 9000) == f"a-web {pod.address}"
    assert _ask(client, left.node.mesh, 9000) == f"a-mesh {pod.address}"
    assert _ask(client, left.node.underlay, 9000) == f"a-underlay {pod.address}"
    assert _ask(left.node.process("web"), pod.address, 8080) == f"a-pod0 {left.node.workload}"
    assert _ask(left.node.process(), pod.address, 8080) == f"a-pod0 {left.gateway}"
    _no_drops(both)


def test_what_is_not_the_meshs_is_masqueraded_as_before(both: Both) -> None:
    left, right = both
    right.node.process().do(f"serve_tcp('outside', '{OUTSIDE}', 9000)")
    assert _ask(left.process(left.pods[0]), OUTSIDE, 9000) == f"outside {left.node.underlay}"


def test_without_our_table_the_source_is_lost(both: Both) -> None:
    """The other tests can fail: the rules of this topology do masquerade."""
    left, right = both
    _serve(both)
    for each in both:
        each.nft("delete table ip isthmus")
    assert _ask(left.process(left.pods[0]), right.node.workload, 9000) == f"b-web {left.node.mesh}"
    assert _ask(left.node.process("web"), right.pods[0].address, 8080) == f"b-pod0 {right.gateway}"


@pytest.mark.parametrize("rp_filter", ["0", "1"])
def test_a_node_port_is_masqueraded_as_before_from_the_mesh_and_from_elsewhere(both: Both, rp_filter: str) -> None:
    """Towards the node's underlay address nothing of the mesh is on the way, in no direction."""
    left, right = both
    _serve(both)
    for device in ("all", "default", "eth0", "isthmus0"):
        right.node.sysctl(f"net.ipv4.conf.{device}.rp_filter", rp_filter)
    client = right.node.process()
    assert _ask(client, left.node.mesh, NODE_PORT) == f"a-pod0 {left.gateway}"
    seen = _identities(right)
    assert _ask(client, left.node.underlay, NODE_PORT) == f"a-pod0 {left.gateway}"
    assert _identities(right) == seen, "nothing came over the overlay"
    _no_drops(both)


def test_flows_and_new_connections_survive_reloads_of_the_others(both: Both) -> None:
    left, right = both
    _serve(both)
    client = left.process(left.pods[0])
    client.do(f"old = socket.create_connection(('{right.node.workload}', 9000), 5); result = line(old)")
    for _ in range(3):
        left.cni()
        assert client.do("old.sendall(b'x?'); result = line(old)")
        assert _ask(client, right.node.workload, 9000) == f"b-web {left.pods[0].address}"
    _no_drops(both)
