# SPDX-License-Identifier: GPL-3.0-or-later
"""Two Kubernetes nodes of two clusters, or of one: pods are network namespaces behind a bridge, as the standard bridge
CNI makes them, with its masquerading, kube-proxy's mark and a NodePort. What the datapath should be comes from the
agent's own `desired`, out of documents as a registrar publishes them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Any

import agent_mesh as mesh
from bpf.topology import CLONE_NEWNET, Inside, Node, _libc, _rmdir, bare_nodes, wait_for
from isthmus_agent import netlink
from isthmus_agent.desired.compute import Desired, HostFacts, desired
from isthmus_agent.desired.pods import PodAddress
from isthmus_agent.desired.reach import Reachability
from isthmus_mesh import keys, wire
from isthmus_mesh.spec import NodeSpec
from pyroute2 import IPRoute

CLUSTER_IP = "10.96.0.40"
HOST_PORT = 8090  # of the node's own first pod, once `host_port` was called
NODE_PORT = 30080  # of the node's own first pod
REMOTE_NODE_PORT = 30081  # of the other node's
NAMES = {1: "onprem", 2: "cloud"}
OUTSIDE = "192.0.2.80"  # an address that is in no mesh, behind node b

# The shapes of the bridge plugin's ipMasq, of flannel's rule for what comes from elsewhere, and of kube-proxy.
_CNI = """
add table ip nat
flush table ip nat
add chain ip nat CNI-bridge
add chain ip nat POSTROUTING {{ type nat hook postrouting priority srcnat; }}
add rule ip nat POSTROUTING ip saddr {pods} jump CNI-bridge
add rule ip nat CNI-bridge ip daddr {pods} accept
add rule ip nat CNI-bridge ip daddr != 224.0.0.0/4 masquerade
"""
_FLANNEL = "add rule ip nat POSTROUTING ip saddr != {pods} ip daddr {pods} masquerade\n"
# As the plugin portmap does it: what comes back to pods of this node, or from its loopback, is masqueraded.
_HOST_PORT = """
add table ip host-port
add chain ip host-port ports {{ }}
add rule ip host-port ports ip saddr {{ {pods}, 127.0.0.1 }} meta mark set meta mark | 0x2000
add rule ip host-port ports meta l4proto tcp dnat to {pod}:8080
add chain ip host-port prerouting {{ type nat hook prerouting priority dstnat; }}
add rule ip host-port prerouting fib daddr type local tcp dport {port} jump ports
add chain ip host-port output {{ type nat hook output priority -100; }}
add rule ip host-port output fib daddr type local tcp dport {port} jump ports
add chain ip host-port postrouting {{ type nat hook postrouting priority srcnat; }}
add rule ip host-port postrouting meta mark & 0x2000 == 0x2000 masquerade
"""
_KUBE_PROXY = """
add table ip kube-proxy
flush table ip kube-proxy
add chain ip kube-proxy postrouting {{ type nat hook postrouting priority srcnat; }}
add rule ip kube-proxy postrouting meta mark & 0x4000 == 0 return
add rule ip kube-proxy postrouting meta mark set meta mark ^ 0x4000
add rule ip kube-proxy postrouting masquerade fully-random
add chain ip kube-proxy prerouting {{ type nat hook prerouting priority dstnat; }}
add rule ip kube-proxy prerouting fib daddr type local tcp dport {port} meta mark set meta mark | 0x4000
add rule ip kube-proxy prerouting fib daddr type local tcp dport {port} dnat to {pod}:8080
add rule ip kube-proxy prerouting fib daddr type local tcp dport {remote_port} meta mark set meta mark | 0x4000
add rule ip kube-proxy prerouting fib daddr type local tcp dport {remote_port} dnat to {remote}:8080
"""


@dataclass
class Pod:
    """A network namespace behind the node's bridge."""

    address: str
    identity: int
    netns: int = -1

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)

        def namespace() -> int:
            if _libc.unshare(CLONE_NEWNET):
                raise OSError("unshare")
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

        self.netns = self.pool.submit(namespace).result()

    def stop(self) -> None:
        os.close(self.netns)
        self.pool.shutdown()


@dataclass
class KubernetesNode:
    """A node with pods. `documents` are what its own etcd holds."""

    node: Node
    spec: NodeSpec
    documents: dict[str, bytes]
    pods: list[Pod]
    name: str
    prefix: str
    cgroups: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    namespaces: dict[PodAddress, int] = field(default_factory=dict)
    remote: Pod = field(init=False)

    @property
    def range(self) -> str:
        return f"{self.prefix}.0/24"

    @property
    def gateway(self) -> str:
        return f"{self.prefix}.1"

    def nft(self, text: str) -> str:
        return self.node.call(
            lambda: subprocess.run(["nft", "-f", "-"], input=text, check=True, capture_output=True, text=True).stdout
        )

    def cni(self, masquerades_all: bool = True) -> None:
        """The rules of CNI and kube-proxy, also again, as after a reload. `remote`: a backend that an EndpointSlice has
        of another cluster. `masquerades_all`: what comes from elsewhere as well, as flannel does it."""
        self.nft((_CNI + (_FLANNEL if masquerades_all else "")).format(pods=self.range))
        self.nft(
            _KUBE_PROXY.format(
                port=NODE_PORT, pod=self.pods[0].address, remote_port=REMOTE_NODE_PORT, remote=self.remote.address
            )
        )

    def host_port(self) -> None:
        """The first pod has a port of the node."""
        self.nft(_HOST_PORT.format(pods=self.range, pod=self.pods[0].address, port=HOST_PORT))

    def wire_pods(self) -> None:
        def bridge() -> None:
            with IPRoute() as ipr:
                ipr.link("add", ifname="cni0", kind="bridge")
                (index,) = ipr.link_lookup(ifname="cni0")
                ipr.link("set", index=index, state="up")
                ipr.addr("add", index=index, address=self.gateway, prefixlen=24)

        self.node.call(bridge)
        for number, pod in enumerate(self.pods):
            self.node.call(self._join, number, pod)
        self.node.sysctl("net.ipv4.ip_forward", "1")

    def _join(self, number: int, pod: Pod) -> None:
        with IPRoute() as ipr:
            name = f"veth{number}"
            ipr.link("add", ifname=name, kind="veth", peer={"ifname": "eth0", "net_ns_fd": pod.netns})
            (index,) = ipr.link_lookup(ifname=name)
            ipr.link("set", index=index, state="up", master=ipr.link_lookup(ifname="cni0")[0])
            # As CNIs set it: a pod may get what it sent back from its own node's port.
            ipr.brport("set", index=index, mode=1)

        def inside() -> None:
            with IPRoute() as ipr:
                ipr.link("set", index=1, state="up")
                (index,) = ipr.link_lookup(ifname="eth0")
                ipr.addr("add", index=index, address=pod.address, prefixlen=24)
                ipr.link("set", index=index, state="up")
                ipr.route("add", dst="default", gateway=self.gateway)

        pod.pool.submit(inside).result()

    def process(self, pod: Pod) -> Inside:
        """A new process in the pod, in a cgroup of the pod's own below the node's."""
        cgroup = self.node.cgroup / "host" / "kubepods" / f"pod{pod.address}"
        cgroup.mkdir(parents=True, exist_ok=True)
        inside = Inside(cgroup, pod.netns)
        self.node.inside.append(inside)
        return inside

    def wanted(self) -> Desired:
        own, facts = NAMES[self.node.cluster_id], HostFacts(cgroups=self.cgroups, namespaces=self.namespaces)
        return desired(self.spec, mesh.state(self.documents, own=own), Reachability(), facts)

    def apply(self) -> None:
        """As a running agent does: what differs from what was applied last."""
        made, self.node.datapath = self.node.datapath, self.wanted().datapath
        self.node.bpf.apply(self.node.datapath, read=False)
        self.node.call(netlink.apply_network, self.node.datapath, made=made)


def _pair(node: Node, address: str, number: int) -> wire.IPIdentityPair:
    return wire.IPIdentityPair(address, number, node.underlay, namespace="shop", pod_name="api")


def spec_document(node: Node, pods: str, host: str = "") -> dict[str, Any]:
    """The specification of a node whose pod CIDR is `pods`, the first of its cluster or `host`."""
    plain = mesh.spec_document()
    name = NAMES[node.cluster_id]
    host = host or f"{name}-1"
    return mesh.spec_document(
        host=host,
        cluster={
            **plain["cluster"],
            "name": name,
            "id": node.cluster_id,
            "site": name,
            "workload_ranges4": [str(IPv4Network(node.prefix).supernet(new_prefix=16))],
            "service_range4": f"10.11{node.cluster_id}.0.0/16",
            "kubernetes": {
                "pod_ranges4": [str(IPv4Network(pods).supernet(new_prefix=16))],
                "service_range4": "10.96.0.0/16",
            },
        },
        node={
            **plain["node"],
            "name": host,
            "underlay4": node.underlay,
            "advertise4": node.underlay,
            "range4": node.prefix,
            "mesh4": node.mesh,
            "kubernetes_node": host,
        },
        workloads=[{**plain["workloads"][0], "address4": node.workload}],
    )


def _published(both: list[KubernetesNode], own: int) -> dict[str, bytes]:
    """What the etcd of cluster `own` holds of two nodes with their pods, and the global service shop/api."""
    found: dict[str, str] = {}
    for each in both:
        node, name = each.node, NAMES[each.node.cluster_id]
        cached = node.cluster_id != own
        where = name if cached else None
        if cached:
            found[keys.cluster_config_key(name)] = wire.ClusterConfig(id=node.cluster_id, cached=True).to_json()
        said = wire.Node(
            name=each.name,
            cluster=name,
            cluster_id=node.cluster_id,
            addresses=(
                wire.NodeAddress("InternalIP", node.underlay),
                wire.NodeAddress("CiliumInternalIP", node.mesh),
            ),
            ipv4_alloc_cidr=IPv4Network(node.prefix),
            ipv4_secondary_alloc_cidrs=(IPv4Network(each.range),),
            annotations={"isthmus.io/kubernetes-node": each.name},
        )
        found[keys.node_key(name, said.name, cached)] = said.to_json()
        addresses = {node.workload: node.identity, **{pod.address: pod.identity for pod in each.pods}}
        for address, number in addresses.items():
            found[keys.ip_key(address, where)] = _pair(node, address, number).to_json()
        service = wire.ClusterService(
            cluster=name,
            namespace="shop",
            name="api",
            cluster_id=node.cluster_id,
            frontends={CLUSTER_IP: {"http": wire.L4Addr("TCP", 80), "dns": wire.L4Addr("UDP", 53)}},
            backends={
                pod.address: {"http": wire.L4Addr("TCP", 8080), "dns": wire.L4Addr("UDP", 5353)}
                for pod in each.pods[:1]
            },
        )
        found[keys.service_key(name, "shop", "api", cached)] = service.to_json()
    found[keys.vip_key("shop", "api")] = json.dumps(
        {"ipv4": CLUSTER_IP, "ipv6": None, "released": None, "by": "kubernetes"}
    )
    return {key: value.encode() for key, value in found.items()}


@contextlib.contextmanager
def kubernetes_nodes(load: bool = True, one_cluster: bool = False) -> Iterator[tuple[KubernetesNode, KubernetesNode]]:
    """Two nodes with two pods each, everything applied; removed whatever happens. In `one_cluster` the CNI has routes
    between the nodes' pods."""
    with bare_nodes() as nodes, contextlib.ExitStack() as stack:
        both = []
        for node in nodes:
            prefix, name = f"10.24{3 + node.cluster_id}.1", f"{NAMES[node.cluster_id]}-1"
            if one_cluster and both:
                prefix, name, node.cluster_id = "10.244.2", "onprem-2", both[0].node.cluster_id
            first = (node.cluster_id << 16) + 400 + 10 * len(both)
            pods = [Pod(f"{prefix}.{5 + number}", first + number) for number in (0, 1)]
            for pod in pods:
                stack.callback(pod.stop)
            both.append(
                KubernetesNode(
                    node,
                    NodeSpec.from_dict(spec_document(node, f"{prefix}.0/24", name)),
                    {},
                    pods,
                    name,
                    prefix,
                    {("shop", "web"): ((node.cgroup / "web").stat().st_ino,)},
                )
            )
            stack.callback(_leave, node)
        for each, other in zip(both, reversed(both), strict=True):
            each.remote = other.pods[0]
            each.documents = _published(both, each.node.cluster_id)
            each.wire_pods()
            each.cni()
        left, right = both
        for each, other in ((left, right), (right, left)) if one_cluster else ():
            each.node.call(_route, other.range, other.node.underlay)

        def outside(index: int, node: Node) -> None:
            with IPRoute() as ipr:
                if index:
                    ipr.addr("add", index=1, address=OUTSIDE, prefixlen=32)
                else:
                    ipr.route("add", dst=f"{OUTSIDE}/32", gateway=right.node.underlay)

        for index, each in enumerate(both):
            each.node.call(outside, index, each.node)
            if load:
                each.node.datapath = each.wanted().datapath
                each.node.load()
        yield left, right


def _route(prefix: str, gateway: str) -> None:
    with IPRoute() as ipr:
        ipr.route("add", dst=prefix, gateway=gateway)


def _leave(node: Node) -> None:
    """The pods' cgroups go before the node's."""
    for inside in node.inside:
        inside.close()
    node.inside.clear()
    place = node.cgroup / "host" / "kubepods"
    for each in [*place.glob("pod*"), place]:
        if each.exists():
            wait_for(lambda each=each: _rmdir(each), f"{each} has no process left")
