# SPDX-License-Identifier: BSD-2-Clause
"""Where etcd is dialled: at which addresses the members of one cluster know each other, and where other clusters and
other sites dial them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .model import Model
from .openings import is_in_cluster


def announced(hosts: Mapping[str, Any], members: Iterable[str]) -> dict[str, str]:
    """The one address at which each member is known to all members: within one site its underlay address."""
    carrying = {member: hosts[member] for member in members}
    key = "underlay4" if len({host["site"] for host in carrying.values()}) == 1 else "advertise4"
    return {member: host[key] for member, host in carrying.items()}


def dialled(model: Model, entry: Mapping[str, Any], site: str) -> str:
    """Which address of a host those at a site dial who do not do it within its own: the one inside the mesh where only
    sessions of WireGuard lead from the one site to the other."""
    apart = entry["site"] != site and {entry["site"], site}.intersection(model.closed)
    return "mesh4" if apart else "advertise4"


def peer_urls(
    document: Mapping[str, Any], dialled: Callable[[Mapping[str, Any]], str] = lambda _entry: "advertise4"
) -> list[str]:
    """Where other clusters dial its etcd; nowhere while one that is in its cluster was not exposed yet. `dialled` names
    the address of a member's entry."""
    if is_in_cluster(document):
        return list(document.get("exposed", {"endpoints": ()})["endpoints"])
    port = document["etcd"]["client_port"]
    members = [document["hosts"][member] for member in document["etcd"]["members"]]
    return [f"https://{entry[dialled(entry)]}:{port}" for entry in members]
