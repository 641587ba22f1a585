# SPDX-License-Identifier: BSD-2-Clause
"""The address plan: who has which range, which collide and what would put that right, what is free for a new cluster,
and how far ranges, identities and cluster ids reach.

Pure: (model, record) -> words and numbers, the same for the same input. It proposes; nothing here renumbers. Known is
what the inventory and the record name, so a proposal is as good as `reserved_ranges` and what sites say of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, collapse_addresses, summarize_address_range
from typing import Any

from . import jsontext, schema
from .addressing import (
    BESIDE,
    CLUSTER_IPS,
    HOST,
    PODS,
    RESERVED,
    SERVICES,
    VPC,
    VPN,
    WORKLOADS,
    Claim,
    astray,
    count_free,
    free_subnets,
    host_capacity,
    may_share,
    overlaps,
    shared,
)
from .identity import identity_range
from .model import Cluster, Model, ModelError
from .record import LARGEST_DOCUMENT, QUARANTINE, Record, parse_time
from .schema import INVALID, Problem, suggestion

SCHEMA = 1
"""Version of the form of what `address_plan` returns."""

PRIVATE = tuple(IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
"""RFC 1918: where proposals are taken from."""

SMALLEST_SERVICE_RANGE = 22
"""Prefix length of the smallest service range that is proposed: it can only grow, and only if its neighbour is free."""

GROWS = ("hosts", "workloads", "services", "identities")
"""What grows in a cluster; `clusters` grow in the estate."""

_HOST_BYTES, _WORKLOAD_BYTES = 200, 128  # of a typical one in a document of the record
_NAMED = 5  # names in a sentence before the rest is a number
_IN_RECORD = "estate record, cluster "
_IMMOVABLE = 1 << 30


@dataclass(frozen=True)
class Growth:
    """What comes beside what is there: `clusters` in the estate, `more` in each cluster by `GROWS` (workloads: on each
    host), `of` the same for single clusters, by (cluster, what)."""

    clusters: int = 0
    more: Mapping[str, int] = field(default_factory=dict)
    of: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def named(self, cluster: str, what: str) -> int | None:
        return self.of.get((cluster, what), self.more.get(what))

    def get(self, cluster: str, what: str) -> int:
        return self.named(cluster, what) or 0


@dataclass(frozen=True)
class NewCluster:
    name: str
    nodes: int


def read_growth(given: Any, clusters: Iterable[str]) -> Growth:
    """Growth as an operator names it: `hosts=40,services=100,onprem.hosts=200`, or a mapping of these.

    ModelError with all problems.
    """
    problems: list[Problem] = []
    known = set(clusters)
    amount = schema.Integer(0, 1_000_000, "it is a number of things that come beside those that are there")
    entries: list[tuple[str, Any]] = []
    if isinstance(given, Mapping):
        entries = [(str(key), value) for key, value in given.items()]
    else:
        for part in re.split(r"[,\s]+", str(given or "").strip()):
            if part:
                key, _equals, value = part.partition("=")
                entries.append((key, value))
    total, more, of = 0, {}, {}
    for key, value in entries:
        where = f"isthmus_growth: {key}"
        number = amount.read(value, where, problems)
        cluster, dot, what = key.rpartition(".")
        if what not in (GROWS if dot else ("clusters", *GROWS)):
            names = ", ".join(("clusters", *GROWS))
            problems.append(
                Problem(
                    where,
                    f"{schema.shown(key)} is nothing that grows",
                    "growth is checked against what it would use up",
                    f"write NUMBER more of {names}, of one cluster as CLUSTER.hosts=NUMBER",
                )
            )
        elif dot and cluster not in known:
            problems.append(
                Problem(
                    where,
                    f"{schema.shown(cluster)} is not a cluster of this estate",
                    "nothing could grow there",
                    suggestion(cluster, known),
                )
            )
        elif number is INVALID:
            continue
        elif dot:
            of[cluster, what] = number
        elif what == "clusters":
            total = number
        else:
            more[what] = number
    if problems:
        raise ModelError(problems)
    return Growth(total, more, of)


def read_new_cluster(name: Any, nodes: Any, model: Model, record: Record) -> NewCluster | None:
    """The cluster that is to come; None when none is named. ModelError with all problems."""
    if not name and not nodes:
        return None
    problems: list[Problem] = []
    read = schema.CLUSTER_NAME.read(name, "isthmus_new_cluster", problems) if name else INVALID
    count = schema.Integer(1, 5000, "ranges are proposed for so many hosts").read(
        nodes or 0, "isthmus_new_nodes", problems
    )
    if not name:
        problems.append(
            Problem("isthmus_new_cluster", "it is missing", "the proposal is for a cluster of that name", "name it")
        )
    known = {key for key, doc in record.clusters.items() if doc["state"] != "absent"}
    if read in {*model.clusters, *known}:
        problems.append(
            Problem(
                "isthmus_new_cluster",
                f"{read} is there already",
                "a cluster keeps its id and ranges",
                f"choose another name, or see how it can grow with isthmus_growth={read}.hosts=NUMBER",
            )
        )
    if problems:
        raise ModelError(problems)
    return NewCluster(read, count)


def address_plan(
    model: Model,
    record: Record,
    now: datetime,
    growth: Growth = Growth(),
    new: NewCluster | None = None,
    unread: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The plan as plain JSON values; `lines` has it for people.

    `now` (aware) is for what was released and is kept back. `unread` says why of clusters whose own etcd did not give
    its record. `problems` of the result, in words, are what collides and what the growth lacks; empty: all is well.
    """
    return _Plan(model, record, now, growth, new, dict(unread or {})).build()


def with_fixes(error: ModelError, record: Record) -> ModelError:
    """The same refusal, with a concrete way out for each overlap."""
    if error.draft is None or not error.conflicts:
        return error
    fixes = _Fixes(error.draft, record, Space.of(error.draft, record))
    replaced = {
        conflict.problem: replace(conflict.problem, next=fixes.fix(conflict.outer, conflict.inner)["words"])
        for conflict in error.conflicts
    }
    problems = [replaced.get(problem, problem) for problem in error.problems]
    return ModelError(problems, error.conflicts, error.draft)


def known_claims(model: Model, record: Record) -> list[Claim]:
    """All that has a place: the model's, and what only the record knows and still runs (the planner's orphans)."""
    found = [claim for cluster in model.clusters.values() for claim in cluster.claims]
    found += model.reserved
    found += model.networks
    found += [claim for host in model.hosts.values() for claim in host.claims]
    for name, doc in _running(record).items():
        cluster = model.clusters.get(name)
        for claim in _recorded(name, doc):
            if cluster is None or (claim.kind in (PODS, CLUSTER_IPS) and not _held(claim, cluster.claims)):
                found.append(claim)
        for host, entry in doc["hosts"].items():
            if host not in model.hosts:
                addresses = {IPv4Network(entry[key]) for key in ("underlay4", "advertise4")}
                where, site = f"{_IN_RECORD}{name}, host {host}", (entry["site"],)
                found += [Claim(address, where, HOST, host, site) for address in addresses]
    return sorted(set(found))


def clashes(claims: Iterable[Claim]) -> list[tuple[Claim, Claim]]:
    """Pairs that may not overlap and do, the one that holds the other first.

    What the inventory says of a Kubernetes cluster may take the place of what the record has. Two hosts with one
    address are no matter of ranges: the model refuses them."""
    everything = list(claims)
    vpns = [claim for claim in everything if claim.kind == VPN]
    return [
        (outer, inner)
        for outer, inner in overlaps(everything)
        if not may_share(outer, inner)
        and (outer.kind != VPN or inner.kind != HOST or outer in astray(inner, vpns))
        and not (outer.kind == inner.kind and outer.owner == inner.owner and _is_orphan(outer, inner))
    ]


class Space:
    """Private address space without what is somebody's."""

    def __init__(self, claims: Iterable[Claim]) -> None:
        everything = list(claims)
        self.taken = [claim.network for claim in everything if claim.kind != HOST]
        self.hosts = sorted({claim.network for claim in everything if claim.kind == HOST})
        self.around_hosts = [{one.supernet(new_prefix=margin) for one in self.hosts} for margin in (16, 24, 32)]
        self.by_kind: dict[str, list[IPv4Network]] = {}
        for claim in everything:
            self.by_kind.setdefault(claim.kind, []).append(claim.network)

    @classmethod
    def of(cls, model: Model, record: Record) -> Space:
        """Without all that model and record name, also ranges of the record that the inventory has changed by now."""
        recorded = [claim for name, doc in _running(record).items() for claim in _recorded(name, doc)]
        return cls([*known_claims(model, record), *recorded])

    def deal(self, prefixlen: int, kind: str) -> IPv4Network | None:
        """The next free range behind the highest of its kind, else the lowest; it is taken from now on.

        What network a host's own address is in is not known: as long as there is room, the whole /16 around it is left
        alone, then the /24, then the address.
        """
        for around in self.around_hosts:
            found = self._first(prefixlen, kind, {*self.taken, *around})
            if found is not None:
                self.taken.append(found)
                self.by_kind.setdefault(kind, []).append(found)
                return found
        return None

    def _first(self, prefixlen: int, kind: str, taken: Iterable[IPv4Network]) -> IPv4Network | None:
        private = [one for one in self.by_kind.get(kind, ()) if any(one.subnet_of(block) for block in PRIVATE)]
        last = max(private, key=lambda one: int(one.broadcast_address), default=None)
        blocks = sorted(PRIVATE, key=lambda block: last is None or not last.subnet_of(block))
        for block in blocks:
            if block.prefixlen > prefixlen:
                continue
            below: list[IPv4Network] = []
            if last is not None and last.subnet_of(block):
                below = list(summarize_address_range(block.network_address, last.broadcast_address))
            for skipped in (below, []):
                found = next(free_subnets([block], prefixlen, [*taken, *skipped]), None)
                if found is not None:
                    return found
        return None

    def largest(self, longer_than: int, kind: str) -> IPv4Network | None:
        """The largest free range that is smaller than a /`longer_than`, down to a /28."""
        return next(filter(None, (self.deal(length, kind) for length in range(longer_than + 1, 29))), None)

    def around(self, network: IPv4Network, prefixlen: int) -> IPv4Network | None:
        """The range of that prefix length that holds `network`, when nobody has the rest of it."""
        outer = network.supernet(new_prefix=prefixlen)
        others = [*self.taken, *self.hosts]
        return None if any(one.overlaps(outer) and one != network for one in others) else outer


class _Fixes:
    """Which side of an overlap gives way, to what, and what that takes. Of one range there is one fix."""

    def __init__(self, model: Model, record: Record, space: Space) -> None:
        self.model = model
        self.record = record
        self.running = _running(record)
        self.space = space
        self.instead: dict[Claim, IPv4Network | None] = {}

    def fix(self, outer: Claim, inner: Claim) -> dict[str, Any]:
        if outer.owner == inner.owner and outer.kind == inner.kind and outer.kind in (WORKLOADS, PODS):
            words = f"leave {inner.network} out of {inner.where}: {outer.network} holds it"
            return self._result(inner, "drop", None, words, hosts=[], workloads=0, services=[])
        if {outer.kind, inner.kind} <= set(BESIDE):
            return self._behind_gateways(outer, inner)
        # The inner one is that which the refusal names.
        moving, other = min(((inner, outer), (outer, inner)), key=lambda pair: self._cost(*pair))
        if _is_orphan(moving):
            words = f"choose another range for {other.where}, or remove what the inventory lacks with isthmus_prune"
            return self._result(moving, "orphan", None, words, **self._used(moving))
        back = self._back(moving, other)
        if back:
            names = ", ".join(map(str, back))
            words = f"put {names} back into {moving.where} instead of {moving.network}: the cluster runs with it"
            return self._result(moving, "restore", back[0], words, hosts=[], workloads=0, services=[])
        used = self._used(moving)
        instead = self._instead(moving)
        how = self._how(moving, used)
        words = self._words(moving, other, how, self._free(moving, instead), used)
        return self._result(moving, how, instead, words, **used)

    def _instead(self, moving: Claim) -> IPv4Network | None:
        """The free range that it gets, of its size."""
        if moving not in self.instead:
            if len(self.space.by_kind[moving.kind]) > 1:
                self.space.by_kind[moving.kind].remove(moving.network)  # a mistake is nothing to be beside of
            self.instead[moving] = self.space.deal(moving.network.prefixlen, moving.kind)
        return self.instead[moving]

    def _behind_gateways(self, outer: Claim, inner: Claim) -> dict[str, Any]:
        """Where none is the mesh's, one is behind the gateways of a site: it does without the other, as long as none of
        that site's hosts is there, else its machines get other addresses."""
        rest = self._without(outer, inner) if outer.kind == VPN else None
        if rest:
            names = ", ".join(map(str, rest))
            words = (
                f"write {names} instead of {outer.network} in {outer.where}: then {_thing(inner)} is not behind the "
                f"gateways of site {outer.owner}"
            )
            if inner.kind == RESERVED:
                words += ". If it is behind them, take it out of reserved_ranges: what is there is kept free as it is"
            elif inner.kind == HOST and not _is_orphan(inner):
                words += f". If it is behind them, set isthmus_site of the host to {outer.owner}"
            return self._result(outer, "narrow", None, words, hosts=[], workloads=0, services=[])
        both = [one for one in (inner, outer) if one.kind == VPN]
        moving = min(both, key=lambda one: len(self._used(one)["hosts"]))
        other = inner if moving is outer else outer
        used, instead = self._used(moving), self._instead(moving)
        hosts = _names(used["hosts"], "host")
        words = ""
        if other.kind == HOST and not _is_orphan(other):
            words = (
                f"give host {other.owner} another address, or set its isthmus_site to {moving.owner} if it is behind "
                "those gateways, or else: "
            )
        words += (
            f"renumber what is behind the gateways of site {moving.owner}: {self._free(moving, instead)} instead of "
            f"{moving.network} in {moving.where}"
        )
        words += f", and isthmus_underlay of {hosts} with it" if hosts else "; no host of the mesh is in it"
        words += f". Until then leave {_thing(other)} out of the inventory"
        return self._result(moving, "renumber", instead, words, **used)

    def _without(self, vpn: Claim, other: Claim) -> list[IPv4Network]:
        """What is left of it when the other is taken out; nothing where hosts of its own are there."""
        # What network a host's own address is in is not known.
        out = other.network.supernet(new_prefix=24) if other.kind == HOST else other.network
        if out.prefixlen <= vpn.network.prefixlen or self._hosts_of_site(vpn.owner, out):
            return []
        return sorted(vpn.network.address_exclude(out))

    def _hosts_of_site(self, site: str, network: IPv4Network) -> list[str]:
        """Those with an own address in it."""
        found = {name for name, host in self.model.hosts.items() if host.site == site and host.underlay in network}
        for doc in self.running.values():
            found |= {
                name
                for name, entry in doc["hosts"].items()
                if name not in self.model.hosts and entry["site"] == site and IPv4Address(entry["underlay4"]) in network
            }
        return sorted(found)

    @staticmethod
    def _result(moving: Claim, how: str, instead: IPv4Network | None, words: str, **used: Any) -> dict[str, Any]:
        return {
            "where": moving.where,
            "range": str(moving.network),
            "instead": None if instead is None else str(instead),
            "how": how,
            **used,
            "words": words,
        }

    def _back(self, claim: Claim, other: Claim) -> list[IPv4Network]:
        """What the cluster runs with, where the inventory has changed it into something that overlaps."""
        if claim.kind in BESIDE or _is_orphan(claim) or claim.owner not in self.running:
            return []
        doc = [one for one in _recorded(claim.owner, self.running[claim.owner]) if one.kind == claim.kind]
        declared = self.model.clusters[claim.owner].claims
        found = [one.network for one in doc if one.network.subnet_of(claim.network) or not _held(one, declared)]
        stands = any(one.network == claim.network for one in doc)
        return [] if stands or any(one.overlaps(other.network) for one in found) else found

    def _cost(self, claim: Claim, other: Claim) -> int:
        """How much would change; Kubernetes' own ranges and what is not ours come last."""
        if claim.kind in BESIDE:
            return _IMMOVABLE
        if self._back(claim, other):
            return 0
        used = self._used(claim)
        count = len(used["hosts"]) + int(used["workloads"]) + len(used["services"])
        if _is_orphan(claim):
            return _IMMOVABLE // 2
        return count + (_IMMOVABLE // 4 if claim.kind in (PODS, CLUSTER_IPS) else 0)

    def _used(self, claim: Claim) -> dict[str, Any]:
        """Of what would get another address: hosts, the number of workloads, services."""
        if claim.kind == VPN:
            return {"hosts": self._hosts_of_site(claim.owner, claim.network), "workloads": 0, "services": []}
        doc = self.running.get(claim.owner, {"hosts": {}})
        cluster = self.model.clusters.get(claim.owner)
        if claim.kind == WORKLOADS:
            inside = {
                host: len(entry["workloads"])
                for host, entry in doc["hosts"].items()
                if IPv4Network(entry["range4"]).overlaps(claim.network)
            }
            for host in self.model.hosts.values():
                pinned = host.cluster == claim.owner and host.node_range is not None
                if pinned and host.name not in inside and host.node_range.overlaps(claim.network):  # type: ignore[union-attr]
                    inside[host.name] = sum(workload.address is not None for workload in host.workloads)
            return {"hosts": sorted(inside), "workloads": sum(inside.values()), "services": []}
        if claim.kind == SERVICES and claim.owner in self.running:
            return {
                "hosts": sorted(doc["hosts"]),
                "workloads": sum(len(entry["workloads"]) for entry in doc["hosts"].values()),
                "services": _services(self.model, self.record, claim.owner),
            }
        if claim.kind in (PODS, CLUSTER_IPS) and cluster is not None:
            nodes = [
                host.name for host in self.model.hosts.values() if host.kubernetes_node and host.cluster == cluster.name
            ]
            return {"hosts": sorted(nodes), "workloads": 0, "services": []}
        return {"hosts": [], "workloads": 0, "services": []}

    def _how(self, moving: Claim, used: Mapping[str, Any]) -> str:
        doc = self.running.get(moving.owner)
        if moving.kind in (PODS, CLUSTER_IPS):
            return "kubernetes"
        if doc is None or (moving.kind == WORKLOADS and not set(used["hosts"]) & set(doc["hosts"])):
            return "replace"
        return "cluster" if moving.kind == SERVICES or doc["ca_host"] in used["hosts"] else "hosts"

    def _free(self, moving: Claim, instead: IPv4Network | None) -> str:
        if instead is not None:
            return str(instead)
        largest = self.space.largest(moving.network.prefixlen, moving.kind)
        return f"a range of your own (no private /{moving.network.prefixlen} is free; the largest is {largest})"

    def _words(self, moving: Claim, other: Claim, how: str, free: str, used: Mapping[str, Any]) -> str:
        old, hosts = moving.network, _names(used["hosts"], "host")
        workloads = f"{used['workloads']} address{'' if used['workloads'] == 1 else 'es'} of workloads"
        left_out = f"host {other.owner}" if other.kind == HOST else _thing(other)
        meanwhile = f"Until then leave {left_out} out of the inventory"
        first, address = "", ""
        if other.kind == HOST and not _is_orphan(other):
            first = f"give host {other.owner} another address on its own network, or else: "
            address = ", or give the host another address on its own network"
        elif _is_orphan(other):
            address = ", or remove what the inventory lacks with isthmus_prune"
        elif other.kind == VPN and other.network.subnet_of(old):
            needless = f"leave {other.network} out of {other.where} if it is the mesh's: the tunnel carries that anyway"
            first, address = f"{needless}; or else: ", f", or {needless}"
        if how == "replace":
            words = f"write {free} instead of {old} in {moving.where}; nothing that the estate record knows is in {old}"
            if used["hosts"]:
                words += f", but isthmus_node_range of {hosts} (and what is pinned in it) must change with it"
            return words + address
        if how == "kubernetes":
            if moving.kind == PODS:
                return (
                    f"{first}pods are Kubernetes' own: give its CNI {free}, add that to {moving.where}, and take {old} "
                    f"out with isthmus_prune=pods/{moving.owner}/{old} when no pod is in it "
                    f"({hosts or 'no host known'}). {meanwhile}"
                )
            return (
                f"{first}a running Kubernetes keeps its ClusterIPs: make it anew with --service-cluster-ip-range="
                f"{free}. {meanwhile}"
            )
        if how == "hosts":
            return (
                f"{first}{hosts} and {workloads} in {old} would change. Put {free} first in {moving.where}, then "
                f"take each of these hosts out and in again (docs/addresses.md), and {old} out at last. {meanwhile}"
            )
        services = _names(used["services"], "service")
        why = (
            "addresses of services never move"
            if moving.kind == SERVICES
            else f"host {self.running[moving.owner]['ca_host']}, which keeps the authority, never leaves alone"
        )
        parts = [part for part in (hosts, workloads if used["workloads"] else "", services) if part]
        return (
            f"{first}cluster {moving.owner} would have to be removed and added anew with {free} in place of {old} "
            f"(docs/addresses.md), because {why}; this changes {_and(parts)}. "
            f"{meanwhile}"
        )


class _Plan:
    def __init__(
        self,
        model: Model,
        record: Record,
        now: datetime,
        growth: Growth,
        new: NewCluster | None,
        unread: dict[str, str],
    ) -> None:
        self.model = model
        self.record = record
        self.now = now
        self.growth = growth
        self.new = new
        self.unread = unread
        self.running = _running(record)
        self.claims = known_claims(model, record)
        self.space = Space.of(model, record)
        self.problems: list[Problem] = []

    def problem(self, where: str, what: str, why: str, following: str) -> None:
        self.problems.append(Problem(where, what, why, following))

    def build(self) -> dict[str, Any]:
        fixes = _Fixes(self.model, self.record, self.space)
        found = []
        for outer, inner in clashes(self.claims):
            fix = fixes.fix(outer, inner)
            what = f"{_thing(inner)} and {_thing(outer)} overlap: they share {shared(outer.network, inner.network)}"
            self.problem(inner.where, what, "an address belongs to one place", fix["words"])
            found.append({"ranges": [_side(outer), _side(inner)], "fix": fix})
        clusters = [self.cluster(cluster) for cluster in self.model.clusters.values() if not cluster.absent]
        proposal = None if self.new is None else self.propose(self.new)
        ids = self.cluster_ids(proposal)
        return {
            "schema": SCHEMA,
            "estate": self.model.name,
            "record": sorted(set(self.running) - set(self.unread)),
            "unread": dict(sorted(self.unread.items())),
            "ranges": [self.row(claim) for claim in self.rows()],
            "underlay": list(self.underlay()),
            "overlaps": found,
            "clusters": clusters,
            "cluster_ids": ids,
            "new_cluster": proposal,
            "problems": [str(problem) for problem in sorted(set(self.problems))],
        }

    # Ranges

    def rows(self) -> list[Claim]:
        claims = [claim for claim in self.claims if claim.kind != HOST]
        return sorted(claims, key=lambda claim: (int(claim.network.network_address), claim.network.prefixlen, claim))

    def row(self, claim: Claim) -> dict[str, Any]:
        used: int | None = None
        if claim.kind == WORKLOADS:
            used = sum(one.overlaps(claim.network) for one in self.node_ranges(claim.owner).values())
        elif claim.kind == SERVICES:
            used = len(_services(self.model, self.record, claim.owner))
        elif claim.kind in BESIDE:
            used = sum(one.subnet_of(claim.network) for one in self.space.hosts)
        return {**_side(claim), "addresses": claim.network.num_addresses, "used": used}

    def underlay(self) -> Iterator[dict[str, Any]]:
        """How many own addresses hosts have in each /24, which need not be the network that they are in."""
        found: dict[IPv4Network, tuple[set[str], set[IPv4Network]]] = {}
        sites = {name: host.site for name, host in self.model.hosts.items()}
        for doc in self.running.values():
            sites.update({name: entry["site"] for name, entry in doc["hosts"].items() if name not in sites})
        for claim in self.claims:
            if claim.kind == HOST:
                names, addresses = found.setdefault(claim.network.supernet(new_prefix=24), (set(), set()))
                names.add(sites[claim.owner])
                addresses.add(claim.network)
        for network in sorted(found):
            names, addresses = found[network]
            yield {"range": str(network), "sites": sorted(names), "addresses": len(addresses)}

    def node_ranges(self, cluster: str) -> dict[str, IPv4Network]:
        """Of the hosts of a cluster, dealt and pinned."""
        doc = self.running.get(cluster, {"hosts": {}})
        found = {host: IPv4Network(entry["range4"]) for host, entry in doc["hosts"].items()}
        for host in self.model.hosts.values():
            if host.cluster == cluster and host.node_range is not None and not host.absent:
                found[host.name] = host.node_range
        return found

    # Capacity

    def cluster(self, cluster: Cluster) -> dict[str, Any]:
        doc = self.running.get(cluster.name)
        workloads = self.workloads(cluster)
        hosts = self.hosts(cluster, workloads)
        return {
            "cluster": cluster.name,
            "id": cluster.id,
            "kubernetes": cluster.kubernetes is not None,
            "hosts": hosts,
            "workloads": self.workload_capacity(cluster, workloads, hosts),
            "services": self.service_capacity(cluster),
            "identities": self.identities(cluster, workloads, hosts["growth"]),
            "record_bytes": self.record_bytes(cluster, doc, workloads, hosts["growth"]),
        }

    def workloads(self, cluster: Cluster) -> dict[str, set[str]]:
        """Names of workloads by host, those of the record and of the inventory."""
        doc = self.running.get(cluster.name, {"hosts": {}})
        found = {host: set(entry["workloads"]) for host, entry in doc["hosts"].items()}
        for host in self.model.hosts.values():
            if host.cluster == cluster.name and not host.absent:
                found.setdefault(host.name, set()).update(one.key for one in host.workloads if not one.absent)
        return found

    def hosts(self, cluster: Cluster, workloads: Mapping[str, Any]) -> dict[str, int]:
        ranges = self.node_ranges(cluster.name)
        released = self.running.get(cluster.name, {"released": ()})["released"]
        kept = [IPv4Network(one["address"]) for one in released if self.now - parse_time(one["at"]) < QUARANTINE]
        taken = [*ranges.values(), *kept]
        outer = list(collapse_addresses(cluster.workload_ranges))
        free = count_free(outer, cluster.node_prefix, taken)
        room = free - len(set(workloads) - set(ranges))
        growth = self.growth.get(cluster.name, "hosts")
        kept_back = count_free(outer, cluster.node_prefix, ranges.values()) - free
        if room < growth or room < 0:
            more = self.space.deal(_outer_prefix(_with_spare(growth - room), cluster.node_prefix), WORKLOADS)
            self.problem(
                f"isthmus_estate.clusters.{cluster.name}.workload_ranges",
                f"there is room for {max(room, 0)} more hosts"
                + (f" ({kept_back} ranges released in the last 30 days are kept back)" if kept_back else "")
                + (f", and {growth} are to come" if growth else f", and {-room} of the inventory have none"),
                f"each host needs a range of its own, a /{cluster.node_prefix}",
                f"add {more}, which is free and holds {count_free([more], cluster.node_prefix, ())} hosts"
                if more is not None
                else "no private range of that size is free: use a longer node_prefix, or another cluster",
            )
        return {"now": len(workloads), "growth": growth, "room": room, "capacity": len(workloads) + room}

    def workload_capacity(
        self, cluster: Cluster, workloads: Mapping[str, set[str]], hosts: Mapping[str, int]
    ) -> dict[str, Any]:
        growth = self.growth.get(cluster.name, "workloads")
        each = _host_capacity(cluster.node_prefix)
        ranges = self.node_ranges(cluster.name)
        sizes = {host: host_capacity(ranges[host]) if host in ranges else each for host in workloads}
        full = sorted(host for host in workloads if len(workloads[host]) + growth > sizes[host])
        if full:
            grown = self.grown(cluster, {host: len(workloads[host]) + growth for host in full}, ranges)
            named = ", ".join(f"{outer} for {host}" for host, outer in list(grown.items())[:_NAMED])
            self.problem(
                f"cluster {cluster.name}",
                f"{_names(full, 'host')} cannot hold {growth} more workloads",
                "each workload has an address of its own in its host's range",
                (f"set isthmus_node_range to {named}" + ("; " if len(grown) < len(full) else "") if grown else "")
                + (
                    "put workloads on other hosts: the ranges beside theirs are dealt" if len(grown) < len(full) else ""
                ),
            )
        if hosts["growth"] and growth > each:
            fitting = _node_prefix(growth)
            self.problem(
                f"isthmus_estate.clusters.{cluster.name}.node_prefix",
                f"a new host's /{cluster.node_prefix} holds {each} workloads, and {growth} are to come on each",
                "each workload has an address of its own in its host's range",
                f"set it to {fitting}, for hosts that are new" if fitting else "spread them: a /24 holds 253",
            )
        return {
            "now": sum(map(len, workloads.values())),
            "growth": growth * (len(workloads) + hosts["growth"]),
            "capacity": sum(sizes.values()) + each * max(0, hosts["room"]),
            "full": full,
        }

    def grown(
        self, cluster: Cluster, wanted: Mapping[str, int], ranges: Mapping[str, IPv4Network]
    ) -> dict[str, IPv4Network]:
        """Larger ranges around those that hosts have, where nothing else is in the way."""
        found: dict[str, IPv4Network] = {}
        for host, number in wanted.items():
            prefix = _node_prefix(number, shortest=20)
            if host not in ranges or prefix is None:
                continue
            outer = ranges[host].supernet(new_prefix=min(prefix, ranges[host].prefixlen))
            others = [*(one for name, one in ranges.items() if name != host), *found.values()]
            inside = any(outer.subnet_of(one) for one in cluster.workload_ranges)
            if inside and not any(outer.overlaps(one) for one in others):
                found[host] = outer
        return found

    def service_capacity(self, cluster: Cluster) -> dict[str, int]:
        now, growth = (
            len(_services(self.model, self.record, cluster.name)),
            self.growth.get(cluster.name, "services"),
        )
        capacity = cluster.service_range.num_addresses - 2
        if now + growth > capacity:
            prefix = _service_prefix(now + growth)
            outer = self.space.around(cluster.service_range, min(prefix, cluster.service_range.prefixlen))
            self.problem(
                f"isthmus_estate.clusters.{cluster.name}.service_range",
                f"{cluster.service_range} has {capacity} addresses, and {now + growth} services are to have one",
                "a service has an address in each cluster that uses it, and released ones are kept back for 30 days",
                f"let it grow to {outer}, which is free"
                if outer is not None
                else f"it can only grow, and the rest of the /{prefix} around it is not free: define services in fewer "
                "clusters (`clusters`), or use another cluster",
            )
        return {"now": now, "growth": growth, "capacity": capacity}

    def identities(self, cluster: Cluster, workloads: Mapping[str, set[str]], more_hosts: int) -> dict[str, int]:
        """One for each set of labels. What grows without a number has labels of its own in the worst case."""
        first, last = identity_range(cluster.id, self.model.max_clusters)
        labels: set[Any] = set()
        for entry in self.running.get(cluster.name, {"hosts": {}})["hosts"].values():
            for key, one in entry["workloads"].items():
                labels.add((key.partition("/")[0], one["service_account"], frozenset(one["labels"].items())))
        for host in self.model.hosts.values():
            if host.cluster == cluster.name and not host.absent:
                labels |= {
                    (one.namespace, one.service_account, frozenset(one.labels.items()))
                    for one in host.workloads
                    if not one.absent
                }
        named = self.growth.named(cluster.name, "identities")
        worst = self.growth.get(cluster.name, "workloads") * (len(workloads) + more_hosts)
        growth, capacity = worst if named is None else named, last - first  # the first number is never dealt
        if len(labels) + growth > capacity:
            self.problem(
                f"cluster {cluster.name}",
                f"it has {capacity} identities, and {len(labels) + growth} sets of labels are to come"
                + ("" if named is not None else " if every workload has labels of its own"),
                f"an identity has {capacity.bit_length()} bits beside the cluster's id",
                "give workloads that are alike the same labels (isthmus_growth=identities=NUMBER then says how many "
                "there will be), or spread them over more clusters",
            )
        return {"now": len(labels), "growth": growth, "capacity": capacity}

    def record_bytes(
        self, cluster: Cluster, doc: Mapping[str, Any] | None, workloads: Mapping[str, set[str]], more_hosts: int
    ) -> dict[str, int]:
        now = sum(_HOST_BYTES + _WORKLOAD_BYTES * len(names) for names in workloads.values())
        if doc is not None:
            now = len(jsontext.dumps(doc).encode())
        more_workloads = self.growth.get(cluster.name, "workloads") * (len(workloads) + more_hosts)
        growth = _HOST_BYTES * more_hosts + _WORKLOAD_BYTES * more_workloads
        if now + growth > LARGEST_DOCUMENT:
            self.too_large(f"cluster {cluster.name}", now + growth)
        return {"now": now, "growth": growth, "capacity": LARGEST_DOCUMENT}

    def too_large(self, where: str, size: int) -> None:
        self.problem(
            where,
            f"its document in the estate record would have about {size / 2**20:.2f} MiB, more than "
            f"{LARGEST_DOCUMENT / 2**20:.2f} MiB",
            "etcd refuses what is larger than 1.5 MiB",
            "spread its hosts over more clusters",
        )

    def cluster_ids(self, proposal: Mapping[str, Any] | None) -> dict[str, int]:
        used, capacity = len(self.used_ids()), self.model.max_clusters
        growth = self.growth.clusters + (proposal is not None)
        if used + growth > capacity:
            self.problem(
                "isthmus_estate.max_clusters",
                f"{used} of {capacity} ids are in use, and {growth} clusters are to come",
                "identities carry the cluster's id",
                "put more hosts into each cluster"
                + (
                    "; an estate that begins with max_clusters: 511 has room for more, one that runs never changes it"
                    if capacity == 255
                    else ""
                ),
            )
        nodes = self.new.nodes if self.new is not None else self.largest_cluster()
        for dealt in range(min(self.growth.clusters, capacity)):
            if None in self.deal(nodes, 28):
                self.problem(
                    "isthmus_growth: clusters",
                    f"private space has ranges for {dealt} more clusters of {nodes} hosts, and "
                    f"{self.growth.clusters} are to come",
                    "each cluster has a workload range and a service range of its own",
                    "use smaller ranges, shrink reserved_ranges to what is in use, or use space that is not private",
                )
                break
        return {"now": used, "growth": growth, "capacity": capacity}

    def largest_cluster(self) -> int:
        sizes = [
            len(self.workloads(cluster)) + self.growth.get(cluster.name, "hosts")
            for cluster in self.model.clusters.values()
        ]
        return max([1, *sizes])

    def used_ids(self) -> set[int]:
        return {cluster.id for cluster in self.model.clusters.values()} | {doc["id"] for doc in self.running.values()}

    # A new cluster

    def deal(self, nodes: int, node_prefix: int) -> tuple[IPv4Network | None, IPv4Network | None]:
        """A workload range and a service range for a cluster of so many hosts."""
        services = len(_services(self.model, self.record, None)) + self.growth.more.get("services", 0)
        return (
            self.space.deal(_outer_prefix(_with_spare(nodes), node_prefix), WORKLOADS),
            self.space.deal(min(SMALLEST_SERVICE_RANGE, _service_prefix(2 * services)), SERVICES),
        )

    def propose(self, new: NewCluster) -> dict[str, Any] | None:
        where = f"new cluster {new.name}"
        each = self.growth.more.get("workloads", 0)
        node_prefix = 28 if each <= _host_capacity(28) else _node_prefix(each)
        if node_prefix is None:
            self.problem(where, f"no range of a host holds {each} workloads", "a /24 holds 253", "use more hosts")
            return None
        used = self.used_ids()
        before = {doc["id"] for doc in self.record.clusters.values()}  # a removed cluster's may still be remembered
        free = [number for number in range(1, self.model.max_clusters + 1) if number not in used]
        fresh = [number for number in free if number not in before]
        workload_range, service_range = self.deal(new.nodes, node_prefix)
        if not free:
            self.problem(
                where,
                f"all {self.model.max_clusters} ids are in use",
                "identities carry the cluster's id",
                "put its hosts into a cluster that is there",
            )
        if workload_range is None or service_range is None:
            self.problem(
                where,
                f"no private range is free that holds {new.nodes} hosts, or none for its services",
                "each cluster has a workload range and a service range of its own",
                "use fewer hosts, or a range of your own that is not private",
            )
        size = new.nodes * (_HOST_BYTES + _WORKLOAD_BYTES * max(1, each))
        if size > LARGEST_DOCUMENT:
            self.too_large(where, size)
        if not free or workload_range is None or service_range is None:
            return None
        return {
            "cluster": new.name,
            "nodes": new.nodes,
            "id": [*fresh, *free][0],
            "workload_ranges": [str(workload_range)],
            "service_range": str(service_range),
            "node_prefix": node_prefix,
            "hosts": count_free([workload_range], node_prefix, ()),
            "workloads_per_host": _host_capacity(node_prefix),
            "services": service_range.num_addresses - 2,
        }


def _running(record: Record) -> dict[str, Mapping[str, Any]]:
    return {name: doc for name, doc in record.clusters.items() if doc["state"] != "absent"}


def _recorded(name: str, doc: Mapping[str, Any]) -> Iterator[Claim]:
    """Ranges in the document of a cluster that was not removed."""
    where = _IN_RECORD + name
    for text in doc["workload_ranges"]:
        yield Claim(IPv4Network(text), where, WORKLOADS, name)
    yield Claim(IPv4Network(doc["service_range"]), where, SERVICES, name)
    if "kubernetes" in doc:
        site = (doc["site"],)
        for text in doc["kubernetes"]["pod_ranges"]:
            yield Claim(IPv4Network(text), where, PODS, name, site)
        yield Claim(IPv4Network(doc["kubernetes"]["service_range"]), where, CLUSTER_IPS, name, site)


def _held(claim: Claim, by: Iterable[Claim]) -> bool:
    return any(claim.kind == one.kind and claim.network.subnet_of(one.network) for one in by)


def _is_orphan(*claims: Claim) -> bool:
    """Whether one of them is known from the record only."""
    return any(claim.where.startswith(_IN_RECORD) for claim in claims)


def _services(model: Model, record: Record, cluster: str | None) -> list[str]:
    """Those that need an address in a cluster (None: in any): defined there, or global and so offered by a peer."""
    roster = record.roster or {"services": {}}
    found = {
        key
        for key, entry in roster["services"].items()
        if entry["state"] != "absent" and key not in model.services and cluster in (None, *entry["clusters"])
    }
    for key, service in model.services.items():
        if not service.absent and (cluster is None or cluster in service.clusters or service.definition.is_global):
            found.add(key)
    return sorted(found)


def _host_capacity(prefix: int) -> int:
    return host_capacity(IPv4Network((0, prefix)))


def _node_prefix(workloads: int, shortest: int = 24) -> int | None:
    """The longest prefix whose range holds a host and so many workloads; None: none does."""
    return next((prefix for prefix in range(29, shortest - 1, -1) if _host_capacity(prefix) >= workloads), None)


def _with_spare(hosts: int) -> int:
    """With a quarter more, at least two: ranges of hosts that were removed are kept back for 30 days."""
    return hosts + max(2, -(-hosts // 4))


def _outer_prefix(hosts: int, node_prefix: int) -> int:
    """Of the smallest range, at most a /28, that holds so many ranges of hosts."""
    return max(0, min(28, node_prefix - (hosts - 1).bit_length()))


def _service_prefix(services: int) -> int:
    return max(0, 32 - (services + 1).bit_length())


_KIND_WORDS = {
    WORKLOADS: "workload range {} of cluster {}",
    SERVICES: "service range {} of cluster {}",
    PODS: "pod range {} of cluster {}",
    CLUSTER_IPS: "range of ClusterIPs {} of cluster {}",
    RESERVED: "reserved range {} ({})",
    VPN: "range {} behind the gateways of site {}",
    VPC: "range {} of the VPC of site {}",
    HOST: "the own address {} of host {}",
}


def _thing(claim: Claim) -> str:
    text = str(claim.network.network_address) if claim.kind == HOST else str(claim.network)
    return _KIND_WORDS[claim.kind].format(text, claim.owner)


def _side(claim: Claim) -> dict[str, Any]:
    return {"range": str(claim.network), "kind": claim.kind, "owner": claim.owner, "where": claim.where}


def _names(names: list[str], what: str) -> str:
    """`3 hosts (a, b, c)`; empty for none."""
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'} ({', '.join(names[:_NAMED])}{more})"


def _and(parts: list[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part) or "nothing that is dealt"


# For people


def lines(plan: Mapping[str, Any]) -> list[str]:
    """The plan as lines of plain printable text, for a terminal or a ticket."""
    return [_printable(line) for line in _lines(plan)]


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    yield f"Address plan of estate {plan['estate']}"
    if plan["record"]:
        yield f"From the inventory and the estate record ({', '.join(plan['record'])})."
    else:
        yield "From the inventory alone: no estate record was read."
    for cluster, why in plan["unread"].items():
        yield f"NOT READ: cluster {cluster}: {why}."
    yield ""
    yield from _table(
        ("RANGE", "ADDRESSES", "WHAT", "OF", "IN USE"),
        [
            (entry["range"], str(entry["addresses"]), entry["kind"], entry["owner"], _in_use(entry))
            for entry in plan["ranges"]
        ],
    )
    yield ""
    yield from _table(
        ("HOSTS' OWN ADDRESSES", "SITE", "COUNT"),
        [(f"in {one['range']}", ", ".join(one["sites"]), str(one["addresses"])) for one in plan["underlay"]],
    )
    yield ""
    yield from _table(
        ("CLUSTER", "ID", *(what.upper() for what in GROWS), "RECORD (KiB)"),
        [
            (
                entry["cluster"],
                str(entry["id"]),
                *(_cell(entry[what]) for what in GROWS),
                _cell({key: -(-value // 1024) for key, value in entry["record_bytes"].items()}),
            )
            for entry in plan["clusters"]
        ],
    )
    yield f"Cluster ids: {_cell(plan['cluster_ids'])}"
    if any(entry["kubernetes"] for entry in plan["clusters"]):
        yield "Not counted: identities of Kubernetes' pods, and addresses of its services; its API alone knows them."
    if plan["new_cluster"]:
        yield ""
        yield from _proposal(plan["new_cluster"])
    yield ""
    if plan["problems"]:
        yield f"{len(plan['problems'])} problem{'s' if len(plan['problems']) > 1 else ''}:"
        yield from (f"- {problem}" for problem in plan["problems"])
    else:
        yield "Nothing overlaps, and the growth named has room."
    yield (
        "Known is what inventory and record name. Other networks (offices, VPNs and VPCs that no site has) belong into "
        "isthmus_estate.reserved_ranges."
    )


def _proposal(new: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"New cluster {new['cluster']} of {new['nodes']} hosts: room for {new['hosts']} hosts with "
        f"{new['workloads_per_host']} workloads each, and {new['services']} services. In isthmus_estate.clusters:"
    )
    yield f"  {new['cluster']}:"
    yield f"    id: {new['id']}"
    yield f"    workload_ranges: [{', '.join(new['workload_ranges'])}]"
    yield f"    service_range: {new['service_range']}"
    if new["node_prefix"] != 28:
        yield f"    node_prefix: {new['node_prefix']}"
    yield "    etcd: {hosts: []}  # name 1, 3 or 5 of its hosts"


def _in_use(entry: Mapping[str, Any]) -> str:
    if entry["used"] is None:
        return "dealt by Kubernetes"
    unit = {WORKLOADS: "host", SERVICES: "service"}.get(entry["kind"], "address of our hosts")
    count = entry["used"]
    plural = unit if count == 1 else unit.replace("address", "addresses") if " " in unit else f"{unit}s"
    return f"{count} {plural}"


def _cell(entry: Mapping[str, int]) -> str:
    growth = f" (+{entry['growth']})" if entry["growth"] else ""
    return f"{entry['now']}{growth} of {entry['capacity']}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    everything = [head, *rows]
    widths = [max(len(_printable(row[column])) for row in everything) for column in range(len(head))]
    for row in everything:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _printable(text: str) -> str:
    """Names in a record are whatever somebody wrote there."""
    return "".join(one if " " <= one <= "~" else "?" for one in text)
