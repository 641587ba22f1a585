# SPDX-License-Identifier: GPL-3.0-or-later
"""Small inventories for tests, as plain variables."""

from __future__ import annotations

import copy
from datetime import datetime, timezone
from typing import Any

from isthmus_mesh.forgetting import Forget
from isthmus_mesh.model import Model, read_model
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import Record, merge

VERSION = "1.0.0"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)

_ESTATE: dict[str, Any] = {
    "name": "lab",
    "clusters": {
        "onprem": {
            "id": 1,
            "workload_ranges": ["10.101.0.0/16"],
            "service_range": "10.111.0.0/16",
            "etcd": {"hosts": ["o1", "o2", "o3"]},
        },
        "cloud": {
            "id": 2,
            "workload_ranges": ["10.102.0.0/16"],
            "service_range": "10.112.0.0/16",
            "etcd": {"hosts": ["c1"]},
        },
    },
    "services": [
        {
            "name": "web",
            "namespace": "shop",
            "ports": [{"name": "http", "port": 80, "target_port": 8080}],
            "backends": {"labels": {"app": "web"}},
            "health": {"type": "http", "path": "/healthz"},
            "global": True,
        }
    ],
}


def web() -> dict[str, Any]:
    return {"name": "web", "namespace": "shop", "labels": {"app": "web"}, "unit": "web.service"}


def estate() -> dict[str, Any]:
    return copy.deepcopy(_ESTATE)


def hosts() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        f"o{number}": {"isthmus_cluster": "onprem", "ansible_host": f"198.18.1.{number}"} for number in (1, 2, 3)
    }
    found["c1"] = {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.1", "isthmus_workloads": [web()]}
    return found


def model(the_estate: dict[str, Any] | None = None, the_hosts: dict[str, dict[str, Any]] | None = None) -> Model:
    return read_model(the_estate or estate(), the_hosts or hosts())


def planned(
    the_model: Model,
    previous: Plan | None = None,
    now: datetime = NOW,
    prune: tuple[str, ...] = (),
    forget: Forget | None = None,
) -> Plan:
    record = merge([dict(previous.record)]) if previous is not None else Record()
    return plan(the_model, record, now, VERSION, "alice", prune, forget or Forget())
