# SPDX-License-Identifier: BSD-2-Clause
"""Ranges of hosts and addresses of their workloads: what was dealt stays, what is pinned is taken, the rest is dealt
out of what is free and was not released lately. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from .addressing import free_addresses, free_subnets, host_capacity
from .model import Cluster, Host, Model, Workload
from .orphans import problem as orphan_problem
from .record import QUARANTINE, parse_time
from .schema import Problem


class Ipam:
    """Of a run at `now`. What was found to say is added to `problems`."""

    def __init__(self, model: Model, now: datetime, problems: list[Problem]) -> None:
        self.model = model
        self.now = now
        self.problems = problems

    def problem(self, where: str, what: str, why: str, following: str) -> None:
        self.problems.append(Problem(where, what, why, following))

    def node_ranges(
        self,
        cluster: Cluster,
        wanted: list[Host],
        entries: Mapping[str, Mapping[str, Any]],
        released: list[dict[str, str]],
    ) -> dict[str, IPv4Network]:
        """By host, for those `wanted` of a cluster, as far as there are some; `entries` are the cluster's hosts in the
        record that stay, `released` what it has given back."""
        found: dict[str, IPv4Network] = {}
        taken = {name: IPv4Network(entry["range4"]) for name, entry in entries.items()}
        for name, network in sorted(taken.items()):
            if not any(network.subnet_of(outer) for outer in cluster.workload_ranges):
                self.problem(
                    f"isthmus_estate.clusters.{cluster.name}.workload_ranges",
                    f"none of them holds {network}, the range of host {name}",
                    "what was dealt never moves",
                    "put the range that holds it back, or remove the host first",
                )
        for host in wanted:
            pinned = host.node_range
            current = taken.get(host.name)
            if pinned is None:
                if current is not None:
                    found[host.name] = current
                continue
            where = f"host {host.name}.isthmus_node_range"
            if current is not None and not current.subnet_of(pinned):
                self.problem(
                    where,
                    f"{pinned} does not hold {current}, the range that the host has",
                    "what was dealt never moves",
                    f"use {current} or a range around it",
                )
                continue
            for name, other in sorted(taken.items()):
                if name != host.name and other.overlaps(pinned) and name not in self.model.hosts:
                    self.problems.append(
                        orphan_problem(where, f"{pinned} overlaps {other}, the range of host {name}", f"host/{name}")
                    )
                elif name != host.name and other.overlaps(pinned):
                    self.problem(
                        where,
                        f"{pinned} overlaps {other}, the range of host {name}",
                        "an address belongs to one host",
                        "choose another range",
                    )
            found[host.name] = pinned
        blocked = [*taken.values(), *found.values(), *self.quarantined(released)]
        supply = free_subnets(cluster.workload_ranges, cluster.node_prefix, blocked)
        for host in wanted:
            if host.name in found or host.node_range is not None:
                continue
            dealt = next(supply, None)
            if dealt is None:
                waiting = len(self.quarantined(released))
                self.problem(
                    f"host {host.name}",
                    f"cluster {cluster.name} has no free /{cluster.node_prefix} left in "
                    + ", ".join(str(network) for network in cluster.workload_ranges)
                    + (f" ({waiting} released in the last 30 days are kept back)" if waiting else ""),
                    "a host needs a range of its own",
                    f"add a range to isthmus_estate.clusters.{cluster.name}.workload_ranges; isthmus.mesh.address_plan "
                    "names a free one",
                )
                continue
            found[host.name] = dealt
        return found

    def addresses(
        self,
        host: Host,
        node_range: IPv4Network,
        mesh: IPv4Address,
        present: list[Workload],
        old: Mapping[str, Any],
        released: list[dict[str, str]],
    ) -> dict[str, IPv4Address]:
        """By workload, for those `present` on a host, as far as there are some; `old` are the entries of those that the
        record has and that stay, also of orphans."""
        found: dict[str, IPv4Address] = {}
        owners = {mesh: "the host itself"}
        owners.update({IPv4Address(entry["address4"]): key for key, entry in old.items()})
        orphans = set(old) - {workload.key for workload in present}
        pinned = {workload.address: workload.key for workload in present if workload.address is not None}
        for workload in present:
            where = f"host {host.name}.isthmus_workloads ({workload.key}).address"
            current = IPv4Address(old[workload.key]["address4"]) if workload.key in old else None
            if workload.address is None or workload.address == current:
                if current is not None:
                    found[workload.key] = current
                continue
            if current is not None:
                self.problem(
                    where,
                    f"{workload.address}, but the workload has {current}",
                    "what was dealt never moves",
                    f"put {current} back or leave address out",
                )
            elif workload.address not in node_range:
                self.problem(
                    where,
                    f"{workload.address} is not in the host's range {node_range}",
                    "other hosts find the workload by its host's range",
                    "choose an address inside it",
                )
            elif workload.address in (node_range.network_address, node_range.broadcast_address):
                self.problem(
                    where,
                    f"{workload.address} is the first or last address of the host's range {node_range}",
                    "in an IPv4 network they stand for the network and for all of its hosts",
                    "choose another inside it",
                )
            elif owners.get(workload.address) in orphans:
                owner = owners[workload.address]
                self.problems.append(
                    orphan_problem(
                        where, f"{workload.address} is the address of {owner}", f"workload/{host.name}/{owner}"
                    )
                )
            elif workload.address in owners:
                self.problem(
                    where,
                    f"{workload.address} is the address of {owners[workload.address]}",
                    "an address belongs to one workload",
                    "choose another",
                )
            else:
                found[workload.key] = workload.address
        blocked = [IPv4Network(address) for address in (*owners, *pinned)]
        supply = free_addresses(node_range, [*blocked, *self.quarantined(released)])
        for workload in present:
            if workload.key in found or workload.address is not None:
                continue
            dealt = next(supply, None)
            if dealt is None:
                self.problem(
                    f"host {host.name}.isthmus_workloads ({workload.key})",
                    f"the host's range {node_range} is full: it holds {host_capacity(node_range)} workloads",
                    "each workload has an address of its own, and released ones are kept back for 30 days",
                    f"set isthmus_node_range of the host to a larger range around {node_range}",
                )
                continue
            found[workload.key] = dealt
        return found

    def quarantined(self, released: list[dict[str, str]]) -> list[IPv4Network]:
        return [IPv4Network(entry["address"]) for entry in released if self.now - parse_time(entry["at"]) < QUARANTINE]
