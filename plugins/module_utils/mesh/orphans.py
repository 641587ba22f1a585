# SPDX-License-Identifier: BSD-2-Clause
"""Orphans: what the record has and the inventory lacks. It still runs and keeps what it has, so that nothing of the
inventory may stand in its way. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from .address_plan import Space
from .addressing import HOST, PODS, WORKLOADS, Claim, astray, may_share
from .model import Cluster, Model
from .record import Record, cluster_ips, pod_ranges
from .schema import Problem


def check(
    model: Model, record: Record, known: Mapping[str, Mapping[str, Any]], prune: AbstractSet[str]
) -> list[Problem]:
    """What of the model overlaps orphans, or has their names. `known` are the clusters of the record that are there,
    `prune` are the full names of what is to go."""
    found = _Check(model, record, known, prune)
    found.check()
    return found.problems


def hosts(
    model: Model, known: Mapping[str, Mapping[str, Any]], prune: AbstractSet[str]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Those that the record has and the inventory lacks, and that are not to go: the full name by which each goes, its
    own with its cluster's in words, and its entry."""
    for name, doc in known.items():
        if f"cluster/{name}" in prune or (name in model.clusters and model.clusters[name].absent):
            continue
        for host, entry in doc["hosts"].items():
            if host not in model.hosts and f"host/{host}" not in prune:
                orphan = f"host/{host}" if name in model.clusters else f"cluster/{name}"
                yield orphan, f"host {host} of cluster {name}", entry


def closed(
    model: Model, roster: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], prune: AbstractSet[str]
) -> tuple[str, ...]:
    """Sites to which nobody outside opens anything, with those that the inventory lacks and of which hosts still run:
    only sessions that these open lead to them."""
    here = {entry["site"] for _orphan, _words, entry in hosts(model, known, prune)}
    return tuple(sorted({*model.closed, *here.intersection(roster.get("closed", ())).difference(model.sites)}))


def pods(cluster: Cluster, doc: Mapping[str, Any], prune: AbstractSet[str]) -> list[IPv4Network]:
    """Ranges of pods that the record has and the inventory lacks, and that are not to go."""
    wanted = () if cluster.kubernetes is None else cluster.kubernetes.pod_ranges
    return [
        IPv4Network(text)
        for text in pod_ranges(doc)
        if f"pods/{cluster.name}/{text}" not in prune
        and not any(IPv4Network(text).subnet_of(network) for network in wanted)
    ]


def problem(where: str, what: str, orphan: str, such_as: str = "") -> Problem:
    """Of something of the model that stands in the way of an orphan."""
    return Problem(
        where,
        f"{what}, which the record knows and the inventory lacks",
        "what is absent from the inventory still runs",
        f"choose another{such_as}, or remove that {orphan.partition('/')[0]} with isthmus_prune={orphan}",
    )


class _Check:
    def __init__(
        self, model: Model, record: Record, known: Mapping[str, Mapping[str, Any]], prune: AbstractSet[str]
    ) -> None:
        self.model = model
        self.record = record
        self.known = known
        self.prune = prune
        self.problems: list[Problem] = []

    def problem(self, where: str, what: str, orphan: str, such_as: str = "") -> None:
        self.problems.append(problem(where, what, orphan, such_as))

    def check(self) -> None:
        """What the model has against what only the record knows: it still runs and keeps what it has."""
        orphaned = sorted(set(self.known) - set(self.model.clusters))
        for name in orphaned:
            if f"cluster/{name}" not in self.prune:
                self.check_cluster(name, self.known[name])
        for cluster in self.model.clusters.values():
            if not cluster.absent and cluster.name in self.known:
                self.check_kubernetes(cluster, self.known[cluster.name])
        addresses: dict[IPv4Address, tuple[str, str]] = {}
        sites: dict[str, tuple[str, str]] = {}
        for orphan, words, entry in hosts(self.model, self.known, self.prune):
            sites[entry["site"]] = words, orphan
            for key in ("underlay4", "advertise4"):
                addresses[IPv4Address(entry[key])] = words, orphan
                self.check_networks(Claim(IPv4Network(entry[key]), words, HOST, words, (entry["site"],)), orphan)
        self.check_closed(sites)
        for host in self.model.hosts.values():
            for address, variable in host.addresses.items():
                if address in addresses and not host.absent:
                    owner, orphan = addresses[address]
                    self.problem(f"host {host.name}.{variable}", f"{address} is also an address of {owner}", orphan)
        for cluster in self.model.clusters.values():
            for address, (owner, orphan) in addresses.items():
                for network in () if cluster.absent else cluster.ranges:
                    if address in network:
                        self.problem(
                            f"isthmus_estate.clusters.{cluster.name}",
                            f"{network} holds {address} of {owner}",
                            orphan,
                            self.such_as(cluster, network),
                        )

    def check_closed(self, orphaned: Mapping[str, tuple[str, str]]) -> None:
        """Of a site that only orphans are at and another one the hosts of one open sessions. `orphaned`: by site one,
        in words, and the full name by which it goes."""
        clusters, inhabitants = self.model.clusters.values(), self.model.hosts.values()
        there = {cluster.site for cluster in clusters} | {host.site for host in inhabitants}
        closed = set(self.model.closed)
        for site in sorted(closed.intersection(self.model.sites)):
            for other in sorted(closed.intersection(orphaned) - there - {site}):
                words, orphan = orphaned[other]
                self.problems.append(
                    Problem(
                        f"isthmus_estate.sites.{site}.inbound",
                        f"false, as of {other}, where {words} is, which the record knows and the inventory lacks",
                        "what is absent from the inventory still runs, and neither side could open a session to the "
                        "other",
                        f"take `inbound: false` from {site}, or remove that {orphan.partition('/')[0]} with "
                        f"isthmus_prune={orphan}",
                    )
                )

    def check_cluster(self, name: str, doc: Mapping[str, Any]) -> None:
        orphan = f"cluster/{name}"
        outer = [*pod_ranges(doc), *cluster_ips(doc)]
        for cluster in self.model.clusters.values():
            if not cluster.absent and cluster.id == doc["id"]:
                self.problem(
                    f"isthmus_estate.clusters.{cluster.name}.id", f"{cluster.id} is the id of cluster {name}", orphan
                )
        for host in self.model.hosts.values():
            if host.name in doc["hosts"] and not host.absent:
                self.problem(
                    f"host {host.name}.isthmus_cluster", f"{host.cluster}, but the host runs in cluster {name}", orphan
                )
        for text in (*doc["workload_ranges"], doc["service_range"]):
            self.check_range(Claim(IPv4Network(text), f"of cluster {name}", WORKLOADS, name), orphan)
        for text in outer:
            self.check_range(Claim(IPv4Network(text), f"of cluster {name}", PODS, name, (doc["site"],)), orphan)

    def check_kubernetes(self, cluster: Cluster, doc: Mapping[str, Any]) -> None:
        """Of a cluster that the inventory has: ranges of Kubernetes that it lacks."""
        whole, words = f"kubernetes/{cluster.name}", f"of Kubernetes in cluster {cluster.name}"

        def claim(network: IPv4Network) -> Claim:
            return Claim(network, words, PODS, cluster.name, (cluster.site,))

        if cluster.kubernetes is None:
            for text in () if whole in self.prune else (*pod_ranges(doc), *cluster_ips(doc)):
                self.check_range(claim(IPv4Network(text)), whole)
            return
        for network in pods(cluster, doc, self.prune):
            self.check_range(claim(network), f"pods/{cluster.name}/{network}", cluster.kubernetes.pod_ranges)

    def check_range(self, claim: Claim, orphan: str, apart_from: Iterable[IPv4Network] = ()) -> None:
        """No range of the model overlaps it but those that stand in its place, and no host is in it. `where` of the
        claim says whose it is."""
        old, owner = claim.network, claim.where
        self.check_networks(claim, orphan)
        for cluster in self.model.clusters.values():
            for new in () if cluster.absent else cluster.ranges:
                if new.overlaps(old) and new not in apart_from:
                    self.problem(
                        f"isthmus_estate.clusters.{cluster.name}",
                        f"{new} overlaps {old} {owner}",
                        orphan,
                        self.such_as(cluster, new),
                    )
        for host in self.model.hosts.values():
            for address, variable in () if host.absent else host.addresses.items():
                if address in old:
                    self.problem(f"host {host.name}.{variable}", f"{address} lies in {old} {owner}", orphan)

    def check_networks(self, old: Claim, orphan: str) -> None:
        """Nothing that sites say of their networks overlaps it."""
        if old.kind == HOST:
            for claim in astray(old, self.model.networks):
                what = f"{claim.network} holds {old.network.network_address} of {old.where}"
                self.problem(claim.where, what, orphan)
            return
        for claim in self.model.networks:
            if claim.network.overlaps(old.network) and not may_share(claim, old):
                self.problem(claim.where, f"{claim.network} overlaps {old.network} {old.where}", orphan)

    def such_as(self, cluster: Cluster, network: IPv4Network) -> str:
        """A free range that could stand in place of the cluster's."""
        kind = next(claim.kind for claim in cluster.claims if claim.network == network)
        found = Space.of(self.model, self.record).deal(network.prefixlen, kind)
        return "" if found is None else f", such as {found}"
