# SPDX-License-Identifier: BSD-2-Clause
"""What the specs of all hosts of a cluster have in common, and what is installed into a cluster whose control plane is
in it; out of the next record, so that both know orphans too. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import spec
from .endpoints import dialled, peer_urls
from .jsontext import filled
from .model import Cluster, InCluster, Model
from .record import cluster_ips, pod_ranges

PKI = "/etc/isthmus/pki"


class ClusterSpec:
    """What the specs of all hosts of one cluster have in common."""

    def __init__(self, model: Model, present: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.model = model
        self.present = present
        self.own = own

    def build(self, on_node: bool) -> dict[str, Any]:
        """`on_node`: for a node of the Kubernetes cluster that the cluster is."""
        own = self.own
        return {
            "schema": spec.SCHEMA,
            "estate": self.model.name,
            "cluster": {
                "name": own["name"],
                "id": own["id"],
                "max_clusters": self.model.max_clusters,
                "site": own["site"],
                "workload_ranges4": list(own["workload_ranges"]),
                "service_range4": own["service_range"],
                **filled(kubernetes=self.kubernetes()),
            },
            "overlay": {"port": self.model.overlay_port, "mtu": self.model.overlay_mtu},
            "dns": {"domain": self.model.domain},
            # ClusterIPs that only the mesh makes reachable; on a cluster's own nodes kube-proxy does.
            "service_ranges4": [
                text
                for name, doc in sorted(self.present.items())
                for text in (doc["service_range"], *(() if on_node and name == own["name"] else cluster_ips(doc)))
            ],
            "mesh_ranges4": [
                text
                for name, doc in sorted(self.present.items())
                for text in (*doc["workload_ranges"], *(pod_ranges(doc) if name != own["name"] else ()))
            ],
        }

    def kubernetes(self) -> dict[str, Any] | None:
        if "kubernetes" not in self.own:
            return None
        (service_range,) = cluster_ips(self.own)
        found = {"pod_ranges4": pod_ranges(self.own), "service_range4": service_range}
        if "identity_labels" in self.own["kubernetes"]:
            found["identity_labels"] = self.own["kubernetes"]["identity_labels"]
        return found

    def peers(self) -> list[str]:
        """Those whose etcd is somewhere already."""
        return [name for name, doc in sorted(self.present.items()) if name != self.own["name"] and peer_urls(doc)]

    def registrar(self, api: Mapping[str, str] | None, site: str) -> dict[str, Any]:
        """Of one that runs at a site."""
        peers = []
        for name in self.peers():
            doc = self.present[name]
            peers.append(
                {
                    "name": name,
                    "id": doc["id"],
                    "workload_ranges4": [*doc["workload_ranges"], *pod_ranges(doc)],
                    "service_range4": doc["service_range"],
                    "endpoints": peer_urls(doc, lambda entry: dialled(entry, site, self.model.closed)),
                    "ca": trust_file(name),
                    "cert": f"{PKI}/peer-{name}.crt",
                    "key": f"{PKI}/peer-{name}.key",
                }
            )
        return {
            "cert": f"{PKI}/registrar.crt",
            "key": f"{PKI}/registrar.key",
            "peers": peers,
            **filled(kubernetes=api),
        }


def in_cluster(model: Model, present: Mapping[str, Any], cluster: Cluster, wanted: InCluster) -> dict[str, Any]:
    """What is installed into a cluster whose control plane is in it. `document` is its cluster document
    (docs/architecture.md), `trust` are the certificates of authorities by cluster, as far as there are some."""
    own = present[cluster.name]
    shared = ClusterSpec(model, present, own)
    account = "/var/run/secrets/kubernetes.io/serviceaccount"
    document = {
        "kind": spec.CLUSTER_KIND,
        **shared.build(on_node=True),
        "etcd": etcd_clients(own, [f"https://{own['exposed']['cluster_ip']}:{own['etcd']['client_port']}"])
        if "exposed" in own
        else None,
        "registrar": shared.registrar(
            {
                "server": own["kubernetes"]["api_server"],
                "ca": f"{account}/ca.crt",
                "token": f"{account}/token",
            },
            own["site"],
        ),
    }
    document["hash"] = spec.spec_hash(document)
    expose = wanted.expose
    return {
        "estate": model.name,
        "cluster": cluster.name,
        "entry": model.entries.get(cluster.name),
        "etcd": {
            "replicas": wanted.replicas,
            "storage_class": wanted.storage_class,
            "storage": wanted.storage,
            "quota_bytes": own["etcd"]["quota_bytes"],
            "token": own["etcd"]["token"],
        },
        "expose": {
            "type": expose.type,
            "provider": expose.provider,
            "scope": expose.scope,
            "source_ranges": [str(network) for network in expose.source_ranges],
            "annotations": dict(expose.annotations),
            "node_port": expose.node_port,
            "hosts": list(expose.hosts),
        },
        "document": document,
        "trust": {
            name: doc["ca_certificate"]
            for name, doc in sorted(present.items())
            if doc["ca_certificate"] is not None and (name == cluster.name or name in shared.peers())
        },
    }


def etcd_clients(own: Mapping[str, Any], endpoints: list[str]) -> dict[str, Any]:
    """How agents reach their etcd."""
    return {
        "endpoints": endpoints,
        "ca": trust_file(own["name"]),
        "cert": f"{PKI}/agent.crt",
        "key": f"{PKI}/agent.key",
    }


def trust_file(cluster: str) -> str:
    return f"{PKI}/trust/{cluster}.crt"
