# SPDX-License-Identifier: BSD-2-Clause
"""What an operator takes out of the record: which things the names in `isthmus_prune` mean. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network
from typing import Any

from . import vpc
from .model import Model
from .record import Record
from .schema import Problem, nearest


class Pruning:
    """`names` are the full names of what is to go, out of those that were given; `known` are the clusters of the record
    that are there. `problems` and `warnings` are what was found to say."""

    def __init__(
        self, given: Iterable[str], model: Model, record: Record, known: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.model = model
        self.record = record
        self.known = known
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.names = self.find(given)

    def problem(self, where: str, what: str, why: str, following: str) -> None:
        self.problems.append(Problem(where, what, why, following))

    def find(self, prune: Iterable[str]) -> set[str]:
        """Full names of what is to go. A bare name is taken when it can mean one thing only."""
        candidates = {f"cluster/{name}" for name in self.known}
        for name, doc in self.known.items():
            candidates |= {f"member/{name}/{host}" for host in doc["etcd"]["members"]}
            if "kubernetes" in doc:
                candidates |= {f"kubernetes/{name}"}
                candidates |= {f"pods/{name}/{text}" for text in doc["kubernetes"]["pod_ranges"]}
            for host, entry in doc["hosts"].items():
                candidates.add(f"host/{host}")
                candidates |= {f"workload/{host}/{key}" for key in entry["workloads"]}
        roster = self.record.roster or {"services": {}}
        candidates |= vpc.names(roster.get("vpcs"))
        candidates |= {f"bgp/{site}" for site in roster.get("bgp", ())}
        candidates |= {f"service/{key}" for key, entry in roster["services"].items() if entry["state"] != "absent"}
        found = set()
        for given in prune:
            name = given.strip()
            if not name:
                continue
            meant = {name} & candidates or {one for one in candidates if one.partition("/")[2] == name}
            if len(meant) > 1:
                self.problem(
                    f"isthmus_prune={name}",
                    "it can mean " + " or ".join(sorted(meant)),
                    "what is removed must be certain",
                    "write the full name",
                )
            elif not meant or all(self.moved(one) for one in meant):
                near = nearest(name, candidates - meant)
                self.warnings.append(
                    f"isthmus_prune={name}: there is nothing of that name to remove; it has gone before"
                    + (f", or did you mean {near!r}?" if near else "")
                )
            else:
                found |= meant
        for name in sorted(found):
            if self.declared(name):
                self.problem(
                    f"isthmus_prune={name}",
                    "the inventory still has it",
                    "the next run would bring it back",
                    "take it out of the inventory, or use state: absent instead",
                )
            whole = self.orphan_of(name)
            if whole is not None and whole not in found:
                self.problem(
                    f"isthmus_prune={name}",
                    f"it is a part of {whole}, which the inventory lacks too",
                    "what the inventory lacks goes as a whole",
                    f"write {whole}, or put that back into the inventory",
                )
        return found

    def declared(self, name: str) -> bool:
        kind, _slash, rest = name.partition("/")
        if kind == "cluster":
            return rest in self.model.clusters
        if kind == "service":
            return rest in self.model.services
        if kind in ("vpc", "peering"):
            return self.model.vpcs.has(name)
        if kind == "bgp":
            return rest in self.model.bgp
        first, _slash, second = rest.partition("/")
        cluster = self.model.clusters.get(first)
        outer = None if cluster is None else cluster.kubernetes
        if kind == "kubernetes":
            return outer is not None
        if kind == "pods":
            return outer is not None and IPv4Network(second) in outer.pod_ranges
        if kind == "member":
            return cluster is not None and second in cluster.etcd.hosts
        host = self.model.hosts.get(first)
        if kind == "workload":
            return host is not None and any(workload.key == second for workload in host.workloads)
        # A host that is now in another cluster is pruned out of its old one.
        return host is not None and first in self.known.get(host.cluster, {"hosts": {}})["hosts"]

    def moved(self, name: str) -> bool:
        """Whether it is a host that was removed from one cluster and is in another now."""
        kind, _slash, host = name.partition("/")
        return (
            kind == "host"
            and self.declared(name)
            and any(
                entry.get("owner") == host
                for cluster, doc in self.known.items()
                for entry in doc["released"]
                if cluster != self.model.hosts[host].cluster
            )
        )

    def orphan_of(self, name: str) -> str | None:
        """The orphan that something of the record is a part of."""
        kind, _slash, rest = name.partition("/")
        first = rest.partition("/")[0]
        if kind not in ("member", "host", "workload", "kubernetes", "pods"):
            return None
        for cluster in sorted(set(self.known) - set(self.model.clusters)):
            if first in self.known[cluster]["hosts"] if kind in ("host", "workload") else first == cluster:
                return f"cluster/{cluster}"
        if kind == "pods" and first in self.model.clusters and self.model.clusters[first].kubernetes is None:
            return f"kubernetes/{first}"
        return f"host/{first}" if kind == "workload" and first not in self.model.hosts else None
