# SPDX-License-Identifier: GPL-3.0-or-later
"""What the plan says of a cluster whose control plane runs inside Kubernetes, and its nodes, for tests."""

from __future__ import annotations

from typing import Any


def installation(**expose: Any) -> dict[str, Any]:
    """Of cluster `managed`; `expose` replaces a part of how peers reach it."""
    given = {"type": "load_balancer", "provider": "none", "scope": "internal", "source_ranges": [], "annotations": {}}
    return {
        "estate": "lab",
        "cluster": "managed",
        "image": "isthmus:1.0.0",
        "etcd": {
            "replicas": 3,
            "storage_class": None,
            "storage": "1Gi",
            "quota_bytes": 2147483648,
            "token": "isthmus-lab-managed",
        },
        "expose": {**given, "node_port": None, "hosts": [], **expose},
        "document": {
            "kind": "cluster",
            "cluster": {"kubernetes": {"pod_ranges4": ["10.244.0.0/16"], "service_range4": "10.96.0.0/16"}},
        },
        "trust": {"managed": "its authority\n", "onprem": "onprem's authority\n"},
    }


def node(name: str, address: str, external: str = "", created: int = 0) -> dict[str, Any]:
    """A Node that is ready. `created`: seconds of its first minute."""
    addresses = [{"type": "InternalIP", "address": address}]
    addresses += [{"type": "ExternalIP", "address": external}] if external else []
    return {
        "metadata": {"name": name, "creationTimestamp": f"2026-01-01T00:00:{created:02}Z"},
        "spec": {},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
    }
