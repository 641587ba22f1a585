# SPDX-License-Identifier: BSD-2-Clause
"""What a host's agent says of its own work, before and after a change of the host."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

COMMAND = "/opt/isthmus/current/bin/isthmus"


def ask(run_command: Callable[..., tuple[int, str, str]]) -> dict[str, Any] | None:
    """`standing` now, by the agent's command line; None where no agent answers, or one of a version that says less."""
    try:
        found = [
            json.loads(run_command([COMMAND, word, "-o", "json"], handle_exceptions=False)[1])
            for word in ("status", "services", "audit")
        ]
        return standing(*found)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def standing(status: Mapping[str, Any], services: Mapping[str, Any], audit: Mapping[str, Any]) -> dict[str, Any]:
    """From the documents of the status API: what works, and what the audit finds wrong."""
    return {
        "etcd": bool(status["etcd"]["connected"]),
        "reports": status["reports"]["error"] is None,
        "audit": sorted(audit["problems"]),
        "backends": sorted(name for name, backend in _backends(status) if backend["ready"]),
        "services": sorted(_name(one) for one in services["services"] if _is_reached(one)),
    }


def worse(
    before: Mapping[str, Any], status: Mapping[str, Any], services: Mapping[str, Any], audit: Mapping[str, Any]
) -> list[str]:
    """What worked `before` (`standing`) and does not now, a line each. What the inventory has taken away meanwhile, a
    backend, a service or all backends of one, is nothing that does not work."""
    now = standing(status, services, audit)
    lines = []
    if before["etcd"] and not now["etcd"]:
        lines.append(f"agent: it has no connection to etcd any more: {status['etcd']['error']}")
    if before["reports"] and not now["reports"]:
        lines.append(f"agent: it cannot report any more: {status['reports']['error']}")
    lines += [f"datapath: {words}" for words in now["audit"] if words not in before["audit"]]
    lines += [
        f"backends: {name} was ready and is not any more: {backend['reason']}"
        for name, backend in _backends(status)
        if name in before["backends"] and not backend["ready"]
    ]
    lines += [
        f"services: {_name(one)} had a backend that could be reached from here, and has none any more"
        for one in services["services"]
        if _name(one) in before["services"] and one["backends"] and not _is_reached(one)
    ]
    return lines


def _backends(status: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (f"{workload['namespace']}/{workload['name']} as a backend of {service}", backend)
        for workload in status["workloads"]
        for service, backend in workload["services"].items()
    ]


def _name(service: Mapping[str, Any]) -> str:
    return f"{service['namespace']}/{service['name']}"


def _is_reached(service: Mapping[str, Any]) -> bool:
    """When no backend can be reached all of them are used."""
    return any(backend["used"] and backend["reachable"] for backend in service["backends"])


def is_settled(before: Mapping[str, Any], services: Mapping[str, Any]) -> bool:
    """Whether it is known of each service that had a backend `before` that it has one now. An agent that has just been
    started takes who was not probed yet as reachable."""
    return all(
        any(backend["used"] and backend["proven"] for backend in one["backends"])
        for one in services["services"]
        if _name(one) in before["services"] and one["backends"]
    )
