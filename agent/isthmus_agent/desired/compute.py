# SPDX-License-Identifier: GPL-3.0-or-later
"""Spec, state and reachability into everything this host should be. Pure, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus_mesh import identity
from isthmus_mesh.spec import NodeSpec

from isthmus_agent.desired import addressing
from isthmus_agent.desired.datapath import Address, Backend, Datapath
from isthmus_agent.desired.reach import NodeKey, Reachability
from isthmus_agent.desired.services import Services, ServiceView, services
from isthmus_agent.state.model import MeshState

WorkloadKey = tuple[str, str]  # (namespace, name)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What only the host knows. `cgroups`: cgroup ids of the workloads that run now."""

    underlay_mtu: int = 1500
    cgroups: Mapping[WorkloadKey, tuple[int, ...]] = field(default_factory=dict)
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class Desired:
    """The wanted datapath and what hangs on the same inputs.

    `names`: DNS name -> address. `holders`: nodes that hold backends. `mesh`: every node's mesh address.
    `dead`: backends whose established sockets should end. `refused`: claims that were not taken, in words.
    """

    datapath: Datapath
    names: Mapping[str, Address]
    views: tuple[ServiceView, ...]
    holders: frozenset[NodeKey]
    mesh: Mapping[NodeKey, Address]
    dead: frozenset[Backend]
    refused: tuple[str, ...]


def desired(spec: NodeSpec, state: MeshState, reach: Reachability, facts: HostFacts) -> Desired:
    """Everything this host should be, from what is known."""
    own = (spec.cluster.name, spec.host)
    nodes, refused = addressing.remotes(spec, state)
    found: Services = services(state, spec.cluster.name, spec.cluster.id, own, reach)
    mtu = addressing.path_mtu(facts.underlay_mtu, 0, spec.overlay.mtu)
    by_workload = {(workload.namespace, workload.name): workload.address4 for workload in spec.workloads}
    datapath = Datapath(
        cluster_id=spec.cluster.id,
        identity_shift=identity.identity_shift(spec.cluster.max_clusters),
        overlay_port=spec.overlay.port,
        overlay_mtu=mtu,
        addresses=addressing.own_addresses(spec),
        local=addressing.local_identities(spec, state),
        workloads={
            cgroup: by_workload[key]
            for key, cgroups in facts.cgroups.items()
            if key in by_workload
            for cgroup in cgroups
        },
        services=found.table,
        ipcache=addressing.ipcache(spec, state, nodes),
        peers=addressing.peers(nodes),
        routes=addressing.routes(spec, nodes, facts.underlay_mtu),
        rules=addressing.rules(spec),
    )
    return Desired(
        datapath=datapath,
        names=_names(found.views, spec.dns_domain),
        views=found.views,
        holders=frozenset(b.node for view in found.views for b in view.backends if b.node is not None),
        mesh={(node.cluster, node.name): node.mesh for node in nodes if node.mesh is not None},
        dead=found.dead,
        refused=refused,
    )


def _names(views: tuple[ServiceView, ...], domain: str) -> dict[str, Address]:
    return {f"{v.name}.{v.namespace}.svc.{domain}": v.address for v in views if v.address is not None}
