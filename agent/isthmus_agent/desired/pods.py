# SPDX-License-Identifier: GPL-3.0-or-later
"""The pods of this host, when it is a Kubernetes node. Pure.

The agent never asks the Kubernetes API: what the registrar published of the node (its pod CIDRs) and of its pods
(address, identity, HostIP) in own etcd is all it knows. Addresses are IPv4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, collapse_addresses, ip_address

from isthmus_mesh import identity
from isthmus_mesh.spec import NodeSpec

from isthmus_agent.desired.datapath import Address
from isthmus_agent.state.model import MeshState

PodAddress = tuple[Address, str]
"""An address and the uid of the pod that has it."""


@dataclass(frozen=True, slots=True)
class Pods:
    """`identities`: address of each published pod of this node -> its identity. `ranges`: where the node's pods get
    their addresses: its pod CIDRs, and published addresses outside of them; they do not overlap. `untranslated`: the
    pods whose sockets are to be left alone, each address with the uid of the pod that has it. `problems` in words.
    """

    identities: Mapping[Address, int] = field(default_factory=dict)
    ranges: tuple[IPv4Network, ...] = ()
    untranslated: frozenset[PodAddress] = frozenset()
    problems: tuple[str, ...] = ()


def pod_ranges(spec: NodeSpec) -> tuple[IPv4Network, ...]:
    """The pod ranges of the host's own cluster, none where that is no Kubernetes cluster."""
    return spec.cluster.kubernetes.pod_ranges4 if spec.cluster.kubernetes is not None else ()


def is_pod_range(spec: NodeSpec, cidr: IPv4Network) -> bool:
    """Whether the CNI of the host's own cluster deals `cidr`."""
    return any(cidr.subnet_of(each) for each in pod_ranges(spec))


def own_cidrs(spec: NodeSpec, state: MeshState) -> tuple[IPv4Network, ...]:
    """The pod CIDRs of this node as published; none on a host that is no Kubernetes node."""
    node = state.nodes.get((spec.cluster.name, spec.host)) if spec.node.kubernetes_node is not None else None
    if node is None:
        return ()
    return tuple(cidr for cidr in node.cidrs() if isinstance(cidr, IPv4Network) and cidr != spec.node.range4)


def local_pods(spec: NodeSpec, state: MeshState) -> Pods:
    """What is published of this node's pods. A pod without an identity of this cluster's own range is left out: its
    packets are dropped and counted, as those of a workload without one."""
    if spec.node.kubernetes_node is None:
        return Pods()
    problems = []
    cidrs = []
    for cidr in own_cidrs(spec, state):
        if is_pod_range(spec, cidr):
            cidrs.append(cidr)
        else:
            problems.append(
                f"this node's pod CIDR {cidr} lies outside the cluster's pod ranges, so its pods are not in the mesh. "
                f"Next: name the CNI's ranges in isthmus_estate.clusters.{spec.cluster.name}.kubernetes.pod_ranges and "
                "run the site playbook"
            )
    first, last = identity.identity_range(spec.cluster.id, spec.cluster.max_clusters)
    here = {str(spec.node.advertise4), str(spec.node.underlay4)}
    found: dict[Address, int] = {}
    for (cluster, text), pair in state.ips.items():
        if pair.host_ip not in here or cluster != spec.cluster.name or not first <= pair.identity <= last:
            continue
        network = IPv4Network(text) if ":" not in text else None
        if network is not None and network.prefixlen == network.max_prefixlen and is_pod_range(spec, network):
            found[network.network_address] = pair.identity
    outside = [IPv4Network(str(each)) for each in found if not any(each in cidr for cidr in cidrs)]
    untranslated = frozenset(
        (address, uid) for text, uid in state.untranslated.items() if (address := ip_address(text)) in found
    )
    return Pods(found, tuple(collapse_addresses([*cidrs, *outside])), untranslated, tuple(problems))
