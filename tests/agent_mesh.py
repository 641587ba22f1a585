# SPDX-License-Identifier: GPL-3.0-or-later
"""Small meshes for the tables of the agent's tests."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from typing import Any

from isthmus_agent.state.decoder import Decoder
from isthmus_agent.state.model import MeshState
from isthmus_mesh import identity, keys, wire
from isthmus_mesh.documents import HealthCheck, PeerStatus, ServiceDefinition, ServicePort
from isthmus_mesh.spec import NodeSpec, spec_hash

CLUSTERS = {"onprem": 1, "cloud": 2, "edge": 3}


def spec_document(**changes: Any) -> dict[str, Any]:
    """The spec of onprem-1 with one workload `shop/web`; `changes` replace top-level keys."""
    document: dict[str, Any] = {
        "schema": 1,
        "estate": "lab",
        "host": "onprem-1",
        "cluster": {
            "name": "onprem",
            "id": 1,
            "max_clusters": 255,
            "site": "onprem",
            "workload_ranges4": ["10.101.0.0/16"],
            "service_range4": "10.111.0.0/16",
        },
        "node": {
            "name": "onprem-1",
            "underlay4": "198.18.1.11",
            "advertise4": "198.18.1.11",
            "range4": "10.101.0.0/28",
            "mesh4": "10.101.0.1",
            "labels": {},
        },
        "workloads": [
            {
                "name": "web",
                "namespace": "shop",
                "service_account": "default",
                "labels": {"app": "web"},
                "address4": "10.101.0.2",
                "cgroup": {"unit": "web.service"},
            }
        ],
        "overlay": {"port": 8472, "mtu": None},
        "dns": {"domain": "clusterset.local"},
        "service_ranges4": ["10.111.0.0/16", "10.112.0.0/16", "10.113.0.0/16"],
        "mesh_ranges4": ["10.101.0.0/16", "10.102.0.0/16", "10.103.0.0/16"],
        "etcd": {"endpoints": ["https://127.0.0.1:2379"], "ca": "ca", "cert": "cert", "key": "key"},
        "member": None,
        "registrar": None,
        "pki": {
            "ca": {"cluster": "onprem", "host": "onprem-1", "here": True},
            "certificates": [],
            "trust": ["onprem", "cloud", "edge"],
        },
    }
    document.update(changes)
    document["hash"] = spec_hash(document)
    return document


def spec(**changes: Any) -> NodeSpec:
    return NodeSpec.from_dict(spec_document(**changes))


def node(cluster: str, number: int, mtu: int | None = 1500, **changes: Any) -> wire.Node:
    """`<cluster>-<number>`: underlay 198.18.<id>.<10+n>, range 10.10<id>.0.<16(n-1)>/28, mesh address .1 of it."""
    cid = CLUSTERS[cluster]
    base = 16 * (number - 1)
    fields: dict[str, Any] = {
        "name": f"{cluster}-{number}",
        "cluster": cluster,
        "cluster_id": cid,
        "addresses": (
            wire.NodeAddress("InternalIP", f"198.18.{cid}.{10 + number}"),
            wire.NodeAddress("CiliumInternalIP", f"10.10{cid}.0.{base + 1}"),
        ),
        "ipv4_alloc_cidr": IPv4Network(f"10.10{cid}.0.{base}/28"),
        "annotations": {"isthmus.io/underlay-mtu": str(mtu)} if mtu is not None else {},
    }
    fields.update(changes)
    return wire.Node(**fields)


def workload_ip(cluster: str, number: int) -> str:
    """Address of the first workload of node `number`."""
    return f"10.10{CLUSTERS[cluster]}.0.{16 * (number - 1) + 2}"


def pair(cluster: str, number: int, local_identity: int = 1) -> wire.IPIdentityPair:
    cid = CLUSTERS[cluster]
    return wire.IPIdentityPair(
        ip=workload_ip(cluster, number),
        identity=(cid << 16) + local_identity,
        host_ip=f"198.18.{cid}.{10 + number}",
        namespace="shop",
        pod_name="web",
    )


def web_service(cluster: str, numbers: list[int], shared: bool = True, port: int = 8080) -> wire.ClusterService:
    return wire.ClusterService(
        cluster=cluster,
        namespace="shop",
        name="web",
        cluster_id=CLUSTERS[cluster],
        backends={workload_ip(cluster, n): {"http": wire.L4Addr("TCP", port)} for n in numbers},
        shared=shared,
    )


def web_definition(
    affinity: str = "none", is_global: bool = True, health: HealthCheck | None = None
) -> ServiceDefinition:
    return ServiceDefinition(
        name="web",
        namespace="shop",
        ports=(ServicePort("http", 80, 8080),),
        backend_labels={"app": "web"},
        health=health,
        is_global=is_global,
        affinity=affinity,
    )


def labels(cluster: str) -> str:
    return wire.labels_to_string(identity.workload_labels("shop", "default", cluster, {"app": "web"}))


def documents(
    backends: dict[str, list[int]],
    affinity: str = "none",
    is_global: bool = True,
    own: str = "onprem",
    sizes: dict[str, int] | None = None,
) -> dict[str, bytes]:
    """What the etcd of `own` holds: `sizes` nodes a cluster, `shop/web` with these backends."""
    found: dict[str, str] = {}
    for cluster, count in (sizes or {"onprem": 3, "cloud": 2, "edge": 1}).items():
        cached = cluster != own
        where = cluster if cached else None
        cid = CLUSTERS[cluster]
        if cached:
            found[keys.cluster_config_key(cluster)] = wire.ClusterConfig(id=cid, cached=True).to_json()
            found[keys.peer_status_key(cluster)] = PeerStatus("connected", last_proof="2026-01-01T00:00:00Z").to_json()
        found[keys.identity_key((cid << 16) + 1, where)] = labels(cluster)
        for number in range(1, count + 1):
            item = node(cluster, number)
            found[keys.node_key(cluster, item.name, cached)] = item.to_json()
            found[keys.ip_key(workload_ip(cluster, number), where)] = pair(cluster, number).to_json()
        if cluster in backends:
            service = web_service(cluster, backends[cluster])
            found[keys.service_key(cluster, "shop", "web", cached)] = service.to_json()
    found[keys.service_definition_key("shop", "web")] = web_definition(affinity, is_global).to_json()
    found[keys.vip_key("shop", "web")] = json.dumps({"ipv4": "10.111.0.10", "ipv6": None, "released": None})
    return {key: value.encode() for key, value in found.items()}


def decoder(own: str = "onprem") -> Decoder:
    return Decoder(own, CLUSTERS[own], 255)


def state(items: dict[str, bytes], own: str = "onprem") -> MeshState:
    found = decoder(own)
    for key, value in items.items():
        found.put(key, value)
    assert not found.bad, found.bad
    return found.state()
