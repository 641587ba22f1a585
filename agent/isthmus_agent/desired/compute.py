# SPDX-License-Identifier: GPL-3.0-or-later
"""Spec, state and reachability into everything this host should be. Pure, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

from isthmus_mesh import identity
from isthmus_mesh.encryption import Stage
from isthmus_mesh.spec import WIREGUARD_OVERHEAD, NodeSpec

from isthmus_agent.desired import addressing
from isthmus_agent.desired.datapath import Address, Backend, Datapath, WireGuard
from isthmus_agent.desired.encryption import Encryption, encryption
from isthmus_agent.desired.encryption import routes as wireguard_routes
from isthmus_agent.desired.encryption import rules as wireguard_rules
from isthmus_agent.desired.pods import PodAddress, Pods, local_pods
from isthmus_agent.desired.reach import NodeKey, Reachability
from isthmus_agent.desired.services import Placement, Services, ServiceView, services
from isthmus_agent.state.model import MeshState

WorkloadKey = tuple[str, str]  # (namespace, name)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What only the host knows. `cgroups`: cgroup ids of the workloads that run now. `public_keys`: of WireGuard, by
    UDP port. `namespaces`: cookies of pods' network namespaces, of the pods that are left alone. `passes`: on a site's
    gateway, the sites to which packets pass through its tunnels; None while that is not known."""

    underlay_mtu: int = 1500
    cgroups: Mapping[WorkloadKey, tuple[int, ...]] = field(default_factory=dict)
    boot_id: str = ""
    public_keys: Mapping[int, str] = field(default_factory=dict)
    namespaces: Mapping[PodAddress, int] = field(default_factory=dict)
    passes: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Desired:
    """The wanted datapath and what hangs on the same inputs.

    `names`: DNS name -> address. `holders`: nodes that hold backends. `mesh`: every node's mesh address.
    `dead`: backends whose established sockets should end. `refused`: claims that were not taken, in words.
    `pods`: those of this Kubernetes node.
    `encrypted`: nodes that are peers of WireGuard or are to be, with why one is none, else ""; `second` the same of the
    second device, while there is one. `stages`: their stages. `keys`: their public keys by UDP port.
    `native`: nodes that packets go to without a tunnel, or are to, with the stage of that. `mtus`: of the path to each
    node, in bytes. `led`: over whom packets go to sites behind gateways.
    """

    datapath: Datapath
    names: Mapping[str, Address]
    views: tuple[ServiceView, ...]
    holders: frozenset[NodeKey]
    mesh: Mapping[NodeKey, Address]
    dead: frozenset[Backend]
    refused: tuple[str, ...]
    pods: Pods
    encrypted: Mapping[NodeKey, str] = field(default_factory=dict)
    second: Mapping[NodeKey, str] = field(default_factory=dict)
    stages: Mapping[NodeKey, Stage] = field(default_factory=dict)
    keys: Mapping[NodeKey, Mapping[int, str]] = field(default_factory=dict)
    native: Mapping[NodeKey, Stage] = field(default_factory=dict)
    mtus: Mapping[NodeKey, int] = field(default_factory=dict)
    led: addressing.Led = field(default_factory=addressing.Led)


class Memory:
    """What `desired` found before. Sections of the state that did not change are the same objects, so what hangs on
    them alone is not computed again: the change of a service must not cost what a mesh of thousands of nodes does."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[tuple[object, ...], object]] = {}

    def of(self, what: str, inputs: tuple[object, ...], compute: Callable[[], T]) -> T:
        """What `compute` made of the same `inputs` (by identity; numbers by value), else what it makes of them now."""
        before, found = self._found.get(what, ((), None))
        if len(before) == len(inputs) and all(
            a is b or (isinstance(a, int) and a == b) for a, b in zip(before, inputs, strict=True)
        ):
            return cast("T", found)
        made = compute()
        if made == found:
            made = found  # what hangs on this one stays as well
        self._found[what] = (inputs, made)
        return made


def desired(
    spec: NodeSpec, state: MeshState, reach: Reachability, facts: HostFacts, memory: Memory | None = None
) -> Desired:
    """Everything this host should be, from what is known."""
    memory = memory or Memory()
    own = (spec.cluster.name, spec.host)
    nodes, refused = memory.of("remotes", (spec, state.nodes), lambda: addressing.remotes(spec, state))
    pods = memory.of("pods", (spec, state.nodes, state.ips, state.untranslated), lambda: local_pods(spec, state))
    ranges = memory.of("pod ranges", (pods,), lambda: pods.ranges)
    loose = memory.of("loose", (spec, nodes, state.ips), lambda: addressing.loose_ranges(spec, state, nodes))
    local = memory.of("local", (spec, state.ips, pods), lambda: addressing.local_identities(spec, state, pods))
    nodes = memory.of("strays", (nodes, state.ips), lambda: addressing.with_strays(state, nodes))
    encrypted = memory.of(
        "encryption", (spec, nodes, facts.public_keys), lambda: encryption(spec, nodes, facts.public_keys)
    )
    nodes, clear = memory.of(
        "natively", (nodes, encrypted), lambda: addressing.only_encrypted(nodes, encrypted.demanded)
    )
    led = memory.of("led", (spec, reach, facts.passes), lambda: addressing.led(spec, reach, facts.passes))
    placement = memory.of("placement", (spec, state.nodes, state.ips), lambda: Placement(state, spec.site))
    found: Services = services(state, spec.cluster.name, spec.cluster.id, own, reach, placement)
    mtu = addressing.path_mtu(facts.underlay_mtu, 0, spec.overlay.mtu)
    by_workload = {(workload.namespace, workload.name): workload.address4 for workload in spec.workloads}
    datapath = Datapath(
        cluster_id=spec.cluster.id,
        identity_shift=identity.identity_shift(spec.cluster.max_clusters),
        overlay_port=spec.overlay.port,
        overlay_mtu=mtu,
        addresses=addressing.own_addresses(spec),
        local=local,
        workloads={
            cgroup: by_workload[key]
            for key, cgroups in facts.cgroups.items()
            if key in by_workload
            for cgroup in cgroups
        },
        untranslated=frozenset(facts.namespaces[pod] for pod in pods.untranslated if pod in facts.namespaces),
        services=found.table,
        ipcache=memory.of(
            "ipcache",
            (spec, nodes, state.ips, state.configs, local, encrypted, ranges),
            lambda: addressing.ipcache(spec, state, nodes, local, encrypted.demanded, ranges),
        ),
        peers=memory.of("peers", (nodes, encrypted), lambda: addressing.peers(nodes, encrypted.demanded)),
        routes=memory.of(
            "routes",
            (spec, nodes, facts.underlay_mtu, ranges, loose, encrypted, led),
            lambda: (
                addressing.routes(spec, nodes, facts.underlay_mtu, ranges, loose, led, encrypted.sent)
                | wireguard_routes(spec, encrypted)
            ),
        ),
        rules=addressing.rules(spec, ranges) | wireguard_rules(spec),
        keep_source=memory.of(
            "keep source",
            (spec, ranges, nodes, encrypted),
            lambda: addressing.keep_source(spec, ranges, nodes, encrypted.sent),
        ),
        wireguard=_wireguard(spec, encrypted, facts.underlay_mtu),
        native=memory.of("native", (spec, nodes), lambda: addressing.native(spec, nodes)),
        clusters={config.id: cluster for cluster, config in state.configs.items()},
    )
    return Desired(
        datapath=datapath,
        names=_names(found.views, spec.dns_domain),
        views=found.views,
        holders=frozenset(b.node for view in found.views for b in view.backends if b.node is not None),
        mesh=memory.of(
            "mesh",
            (nodes,),
            lambda: {(node.cluster, node.name): node.mesh for node in nodes if node.mesh is not None},
        ),
        dead=found.dead,
        refused=(*refused, *clear, *encrypted.claims, *pods.problems),
        pods=pods,
        encrypted=encrypted.nodes,
        second=encrypted.second,
        stages=encrypted.stages,
        keys=encrypted.keys,
        native={(node.cluster, node.name): node.native for node in nodes if node.native > Stage.PLAIN},
        mtus=memory.of(
            "mtus", (spec, nodes, facts.underlay_mtu), lambda: addressing.mtus(spec, nodes, facts.underlay_mtu)
        ),
        led=led,
    )


def _wireguard(spec: NodeSpec, found: Encryption, underlay_mtu: int) -> tuple[WireGuard, ...]:
    if spec.wireguard is None:
        return ()
    mtu = underlay_mtu - WIREGUARD_OVERHEAD
    node = spec.node
    return tuple(
        WireGuard(each.device, each.key, each.port, mtu, node.underlay4, node.advertise4, found.peers[each.port])
        for each in spec.wireguard.tunnels
    )


def _names(views: tuple[ServiceView, ...], domain: str) -> dict[str, Address]:
    return {f"{v.name}.{v.namespace}.svc.{domain}": v.address for v in views if v.address is not None}
