# SPDX-License-Identifier: BSD-2-Clause
"""At which address a host is dialled: from where, and within one etcd. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from .openings import is_in_cluster


def announced(hosts: Mapping[str, Any], members: Iterable[str]) -> dict[str, str]:
    """The one address at which each member is known to all members: within one site its underlay address."""
    carrying = {member: hosts[member] for member in members}
    key = "underlay4" if len({host["site"] for host in carrying.values()}) == 1 else "advertise4"
    return {member: host[key] for member, host in carrying.items()}


def beside(entry: Mapping[str, Any], site: str) -> str:
    """Which address of a host those at a site dial without the mesh: within its own the one that it has, as what other
    sites dial may be an address translation's, which need not lead back in."""
    return "underlay4" if entry["site"] == site else "advertise4"


def dialled(entry: Mapping[str, Any], site: str, closed: Collection[str]) -> str:
    """The same with the mesh: the one inside it where only sessions of WireGuard lead from the one site to the other,
    as one of the two is `closed`."""
    apart = entry["site"] != site and {entry["site"], site}.intersection(closed)
    return "mesh4" if apart else beside(entry, site)


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
