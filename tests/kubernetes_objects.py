# SPDX-License-Identifier: GPL-3.0-or-later
"""Kubernetes objects for tests, as the API server gives them (only the fields that somebody reads)."""

from __future__ import annotations

from typing import Any


def node(name: str, cidr: str | None, address: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]} if cidr else {},
        "status": {"addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}]},
    }


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name, **labels}}}


def pod(
    name: str,
    address: str | None,
    on: str = "kube-1",
    namespace: str = "shop",
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-of-{name}",
            "labels": labels or {"app": "web"},
            "annotations": annotations or {},
            "creationTimestamp": "2026-01-02T03:04:05Z",
        },
        "spec": {
            "nodeName": on,
            "serviceAccountName": "default",
            "containers": [{"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 8080}]}],
        },
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}] if address else None},
    }


def service(name: str, cluster_ip: str | None, namespace: str = "shop", **annotations: str) -> dict[str, Any]:
    """`annotations`: of `service.cilium.io/`, e.g. `shared="false"`; it is global unless they say otherwise."""
    found = {f"service.cilium.io/{key}": value for key, value in {"global": "true", **annotations}.items()}
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": {"team": "a"}, "annotations": found},
        "spec": {
            "clusterIP": cluster_ip or "None",
            "clusterIPs": [cluster_ip or "None"],
            "selector": {"app": name},
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}],
        },
    }


def endpoint(address: str, on: str | None = "kube-1", **conditions: bool | None) -> dict[str, Any]:
    found: dict[str, Any] = {"addresses": [address], "conditions": conditions or {"ready": True}}
    return found | ({"nodeName": on} if on else {})


def endpoint_slice(
    of: str, *endpoints: dict[str, Any], name: str = "", namespace: str = "shop", port: int = 8080
) -> dict[str, Any]:
    return {
        "metadata": {"name": name or f"{of}-x", "namespace": namespace, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": port}],
        "endpoints": list(endpoints),
    }
