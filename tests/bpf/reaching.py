# SPDX-License-Identifier: GPL-3.0-or-later
"""Who reaches whom of two Kubernetes nodes, and as whom it is seen there: what is the same however packets go."""

from __future__ import annotations

from bpf.pods import KubernetesNode
from bpf.topology import Inside

Both = tuple[KubernetesNode, KubernetesNode]


def dial(client: Inside, address: str, port: int, bound: str = "") -> str:
    """What the server says: its name and the client's address as it sees it."""
    source = f", ('{bound}', 0)" if bound else ""
    return str(client.do(f"s = socket.create_connection(('{address}', {port}), 5{source}); result = line(s)"))


def serve_in_pods(both: Both) -> None:
    for each in both:
        for number, pod in enumerate(each.pods):
            name = f"{each.node.name}-pod{number}"
            each.process(pod).do(
                f"serve_tcp('{name}', '{pod.address}', 8080); serve_udp('{name}', '{pod.address}', 5353)"
            )


def serve(both: Both) -> None:
    """In pods, on the host's mesh and underlay address, and as the workload `web`."""
    serve_in_pods(both)
    for each in both:
        name, node = each.node.name, each.node
        node.process().do(
            f"serve_tcp('{name}-mesh', '{node.mesh}', 9000); serve_tcp('{name}-underlay', '{node.underlay}', 9000)"
        )
        node.process("web").do(f"serve_tcp('{name}-web', '{node.workload}', 9000)")


def identities(node: KubernetesNode) -> set[tuple[str, int]]:
    return {(str(each.destination), each.identity) for each in node.node.bpf.counters().identities}


def no_drops(both: Both) -> None:
    for each in both:
        assert not any(each.node.drops().values()), (each.node.name, each.node.drops())


def every_way(near: KubernetesNode, far: KubernetesNode) -> None:
    """From one node to the other, with the source's own address and identity."""
    pod, target, host, name = near.pods[0], far.pods[1], near.node, far.node.name
    client = near.process(pod)
    assert dial(client, far.pods[0].address, 8080) == f"{name}-pod0 {pod.address}"
    assert dial(client, far.node.workload, 9000) == f"{name}-web {pod.address}"
    assert dial(client, far.node.mesh, 9000) == f"{name}-mesh {pod.address}"
    assert dial(client, far.node.underlay, 9000) == f"{name}-underlay {pod.address}"
    assert {
        (destination, pod.identity)
        for destination in (far.pods[0].address, far.node.workload, far.node.mesh, far.node.underlay)
    } <= identities(far)
    assert dial(host.process(), target.address, 8080) == f"{name}-pod1 {host.mesh}"
    assert dial(host.process(), target.address, 8080, host.underlay) == f"{name}-pod1 {host.underlay}"
    assert dial(host.process("web"), target.address, 8080) == f"{name}-pod1 {host.workload}"
    assert {(target.address, 6), (target.address, host.identity)} <= identities(far)


def on_one_node(here: KubernetesNode) -> None:
    """Its pods, the host and its workload, each other."""
    pod, name = here.pods[0], here.node.name
    client = here.process(pod)
    assert dial(client, here.pods[1].address, 8080) == f"{name}-pod1 {pod.address}"
    assert dial(client, here.node.workload, 9000) == f"{name}-web {pod.address}"
    assert dial(client, here.node.mesh, 9000) == f"{name}-mesh {pod.address}"
    assert dial(client, here.node.underlay, 9000) == f"{name}-underlay {pod.address}"
    assert dial(here.node.process("web"), pod.address, 8080) == f"{name}-pod0 {here.node.workload}"
    assert dial(here.node.process(), pod.address, 8080) == f"{name}-pod0 {here.gateway}"


def outlives_reloads(near: KubernetesNode, far: KubernetesNode) -> None:
    """A pod's connection to a workload, and new ones, while the CNI writes its rules anew."""
    client = near.process(near.pods[0])
    client.do(f"old = socket.create_connection(('{far.node.workload}', 9000), 5); result = line(old)")
    for _ in range(3):
        near.cni()
        assert client.do("old.sendall(b'x?'); result = line(old)")
        assert dial(client, far.node.workload, 9000) == f"{far.node.name}-web {near.pods[0].address}"
