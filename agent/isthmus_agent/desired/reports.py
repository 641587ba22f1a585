# SPDX-License-Identifier: GPL-3.0-or-later
"""What this agent says of its host in own etcd. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isthmus_mesh import keys
from isthmus_mesh.documents import HealthCheck, NodeReport, WorkloadReport
from isthmus_mesh.spec import WIREGUARD_PORT, NodeSpec, WorkloadSpec
from isthmus_mesh.wire import Node, public_keys

from isthmus_agent.desired.compute import HostFacts, WorkloadKey
from isthmus_agent.state.model import MeshState, ServiceName


@dataclass(frozen=True, slots=True, order=True)
class CheckKey:
    """One health check: this workload as a backend of that service."""

    workload: WorkloadKey
    service: ServiceName


def node_report(spec: NodeSpec, facts: HostFacts, published: Node | None = None) -> NodeReport:
    """The first InternalIP is what others, but those of its site, send tunnel packets to: the advertised address.

    `published`: this host as others know it. A public key that could not be read yet is as it is there: a host that is
    published without one is cut off."""
    node = spec.node
    tunnels = spec.wireguard.tunnels if spec.wireguard is not None else ()
    before = public_keys(published, WIREGUARD_PORT) if published is not None else {}
    known = {**{each.port: before[each.port] for each in tunnels if each.port in before}, **facts.public_keys}
    addresses = [("InternalIP", str(node.advertise4))]
    if node.underlay4 != node.advertise4:
        addresses.append(("ExternalIP", str(node.underlay4)))
    addresses.append(("CiliumInternalIP", str(node.mesh4)))
    return NodeReport(
        name=spec.host,
        cluster=spec.cluster.name,
        addresses=tuple(addresses),
        range4=str(node.range4),
        mesh4=str(node.mesh4),
        labels=node.labels,
        mtu=facts.underlay_mtu,
        boot_id=facts.boot_id,
        wireguard_public_key=known.get(spec.wireguard.tunnel.port, "") if spec.wireguard else "",
        wireguard_keys={} if known.keys() <= {WIREGUARD_PORT} else {str(port): key for port, key in known.items()},
    )


def backends_here(spec: NodeSpec, state: MeshState) -> dict[CheckKey, tuple[WorkloadSpec, HealthCheck | None]]:
    """Which workloads of this host are backends of which services, and how each is checked."""
    return {
        CheckKey((workload.namespace, workload.name), service): (workload, definition.health)
        for service, definition in state.definitions.items()
        for workload in spec.workloads
        if definition.selects(spec.host, workload.namespace, workload.name, workload.labels)
    }


def workload_reports(
    spec: NodeSpec,
    state: MeshState,
    facts: HostFacts,
    health: Mapping[CheckKey, bool | None],
    reported: Mapping[str, WorkloadReport],
) -> dict[str, WorkloadReport]:
    """etcd key -> report. `health` None: no verdict yet, the last `reported` one stands."""
    here = backends_here(spec, state)
    found: dict[str, WorkloadReport] = {}
    for workload in spec.workloads:
        own = (workload.namespace, workload.name)
        etcd_key = keys.workload_key(spec.host, *own)
        before = reported.get(etcd_key)
        ready: dict[str, bool] = {}
        for key, (_, check) in here.items():
            if key.workload != own:
                continue
            name = f"{key.service[0]}/{key.service[1]}"
            verdict = bool(facts.cgroups.get(own)) if check is None else health.get(key)
            if verdict is None:
                verdict = before.services.get(name, False) if before is not None else False
            ready[name] = verdict
        found[etcd_key] = WorkloadReport(
            name=workload.name,
            namespace=workload.namespace,
            node=spec.host,
            service_account=workload.service_account,
            labels=workload.labels,
            addresses=(str(workload.address4),),
            host_ip=str(spec.node.advertise4),
            services=ready,
        )
    return found
