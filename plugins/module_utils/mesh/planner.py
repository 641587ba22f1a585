# SPDX-License-Identifier: BSD-2-Clause
"""The planner: (model, record) -> specs, next record, service definitions, words.

A pure function: the same input gives the same output, whatever the order of the inventory. It
extends what the record says was dealt and never deals again or moves: what the inventory no longer
names is an orphan, stays in the record, and other hosts' specs still know it. Things go by
`state: absent`, or by being named in `prune`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from . import auto, encryption, ipsec, jsontext, matrix, openings, routing, spec, versions, vpc
from .address_plan import Space
from .addressing import free_addresses, free_subnets, host_capacity
from .bgp import Planned as Speaking
from .bgp import planned as plan_bgp
from .encryption import Keys, Pair, Stage
from .model import Cluster, Host, InCluster, Model, ModelError, Workload
from .record import (
    CLUSTERS,
    LARGEST_DOCUMENT,
    QUARANTINE,
    ROSTER,
    SCHEMA,
    Record,
    forgotten_hosts,
    format_time,
    parse_time,
)
from .removals import cuts
from .schema import Problem, nearest
from .stages import Stages, State, Ways, begun, changed, hosts_of, sites_of, state_of

PKI = "/etc/isthmus/pki"


@dataclass(frozen=True)
class Step:
    """One of several that a plan takes, as encryption or native routing of a pair of sites is turned on or off, or keys
    are replaced, in stages: `record` and `specs` as in `Plan`; `stages` of encryption and `native` ones are the pairs
    that change. `waits` are hosts that must have the step before, by name; those `proven` must also have proven that
    they reach the others the new way."""

    specs: Mapping[str, Mapping[str, Any]]
    record: Mapping[str, Any]
    stages: Mapping[Pair, Stage]
    native: Mapping[Pair, Stage]
    ipsec: Mapping[Pair, Stage]
    waits: tuple[str, ...]
    proven: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """`specs` by host; `record` by document name; `services` by cluster: `present` definitions and
    the `absent` ones' names, of what the inventory owns. `orphans` and `removed` are names as `prune`
    takes them; `cuts` says of each removed one what it takes away. `forgotten` are hosts that take no
    part, by name: `cluster`, `at`, `by`. `revocations` are the authorities that revoke what forgotten hosts
    and removed etcd hosts have: `cluster`, `ca_host`, `hosts`, of which the `departed` were removed, common
    `names`. `kubernetes_left` are clusters whose Kubernetes the record loses. `in_cluster` is what is installed
    into each cluster whose control plane is in it, by cluster. `before` and `after` are the record in a form for
    people. `sites` is the matrix of sites (matrix.py), `routes` what routers need of it. `steps` are those that
    follow `specs` and `record`. `stages` are those of encryption of each pair of sites where something is or was
    encrypted: what the record has (None: no traffic yet), and each that follows; `native` are those of native
    routing, `ipsec` those of the gateways' tunnels, `keys` those of WireGuard. `vpcs` is what VPCs get (vpc.py), `bgp`
    what hosts and routers do (bgp.py). `trials` are those of pairs with `routing: auto` (auto.py) by the number of the
    proof: `sites`, and `hosts` with `cluster`, `site` and `mesh4`; `told` is what the proofs of this run have decided,
    in words. `keyed` are hosts whose public keys of WireGuard others need before any etcd tells them."""

    specs: Mapping[str, Mapping[str, Any]]
    record: Mapping[str, Any]
    services: Mapping[str, Mapping[str, Any]]
    changes: tuple[str, ...]
    orphans: tuple[str, ...]
    removed: tuple[str, ...]
    cuts: tuple[str, ...]
    forgotten: Mapping[str, Mapping[str, str]]
    revocations: tuple[Mapping[str, Any], ...]
    kubernetes_left: tuple[str, ...]
    in_cluster: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...]
    before: str
    after: str
    sites: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[Step, ...] = ()
    stages: Mapping[Pair, tuple[Stage | None, ...]] = field(default_factory=dict)
    native: Mapping[Pair, tuple[Stage | None, ...]] = field(default_factory=dict)
    ipsec: Mapping[Pair, tuple[Stage | None, ...]] = field(default_factory=dict)
    keys: tuple[Keys, ...] = (Keys(), Keys())
    routes: tuple[Mapping[str, Any], ...] = ()
    vpcs: vpc.Planned = field(default_factory=vpc.Planned)
    bgp: Speaking = field(default_factory=Speaking)
    trials: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    told: tuple[str, ...] = ()
    keyed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forget:
    """`names` of hosts and clusters that are lost. `clean` are hosts that hold nothing of the mesh: what
    was forgotten of their name before is joined anew. `lists` are the CRLs that were made, by cluster."""

    names: Iterable[str] = ()
    clean: Iterable[str] = ()
    lists: Mapping[str, str] = field(default_factory=dict)


def plan(
    model: Model,
    record: Record,
    now: datetime,
    version: str,
    by: str = "",
    prune: Iterable[str] = (),
    forget: Forget = Forget(),
    rotate: bool = False,
    exposed: Mapping[str, Mapping[str, Any]] | None = None,
    try_native: bool = False,
    proofs: auto.Proofs = (),
    keys: Mapping[str, Mapping[str, str]] | None = None,
) -> Plan:
    """Plan the whole estate.

    `now` (aware) is only used for quarantines and time stamps, `version` is that of the collection,
    `by` is who runs it. Hosts that were forgotten are planned as if the inventory did not have them. `rotate`: every
    host gets another key of WireGuard. `exposed`: of clusters whose control plane is in them, where their etcd was
    found to be reachable now (`record`). `try_native`: pairs with `routing: auto` that came back to the tunnel are
    tried again. `proofs` are those of the run so far: a run plans again after each, from all that its first plan was
    made from and with its `now`, so that what it has done is planned as it was. `keys` are public keys of WireGuard by
    host and UDP port, as they were found on hosts now (`Plan.keyed`, `record`).
    Raises ModelError with all problems when model and record do not go together or space has run out.
    """
    return _Planner(
        model, record, now, version, by, prune, forget, rotate, exposed or {}, try_native, proofs, keys or {}
    ).run()


def refuse_other_version(record: Record, installed: str, wanted: str | None = None) -> None:
    """ModelError when the `installed` version of the collection is not the one to work on this estate with.

    `wanted` is what the operator pinned (`isthmus_version`). A record without a version says nothing about it.
    VersionError when `installed` is no version.
    """
    running = None if record.roster is None else record.roster.get("version")
    here = versions.order(installed)
    if wanted is not None and not versions.valid(wanted):
        problem = Problem(
            "isthmus_version",
            f"{wanted!r} is not a version such as 1.2.3",
            "it names the one version that `site` may install",
            f"write {installed}, or the version that is meant",
        )
    elif running is not None and versions.order(wanted or installed) < versions.order(running):
        get = "" if here == versions.order(running) else f"{versions.install(running)}, and run again"
        pin = f"set isthmus_version to {running}, or leave it out" if wanted else ""
        problem = Problem(
            "isthmus_version" if wanted else "isthmus.mesh",
            f"{wanted or installed} is older than {running}, which was applied to this estate last",
            "a downgrade is never made: what a newer version wrote, an older one may misread",
            "; ".join(part for part in (pin, get) if part),
        )
    elif wanted is not None and versions.order(wanted) != here:
        problem = Problem(
            "isthmus_version",
            f"{wanted} is wanted, and the controller has isthmus.mesh {installed}",
            "`site` installs the agent of its own version",
            f"{versions.install(wanted)}, and run again",
        )
    elif wanted is None and running is not None and versions.order(running) < here:
        problem = Problem(
            "isthmus.mesh",
            f"{installed} is newer than {running}, which was applied to this estate last",
            "a running estate is upgraded only when that is asked for",
            f"to upgrade it, `ansible-playbook isthmus.mesh.site -e isthmus_version={installed}`; to stay, "
            f"{versions.install(running)}",
        )
    else:
        return
    raise ModelError([problem])


def refuse_foreign_services(
    services: Mapping[str, Mapping[str, Any]], foreign: Mapping[str, Mapping[str, str]]
) -> None:
    """ModelError for every service that a plan defines where somebody else has defined it.

    `services` as in `Plan`; `foreign` by cluster: owners by `<namespace>/<name>`, of services in that cluster's etcd
    that the inventory does not own.
    """
    places: dict[tuple[str, str], list[str]] = {}
    for cluster, wanted in services.items():
        for service in wanted["present"]:
            name = f"{service['namespace']}/{service['name']}"
            owner = foreign.get(cluster, {}).get(name)
            if owner is not None:
                places.setdefault((name, owner), []).append(cluster)
    if places:
        raise ModelError(
            Problem(
                f"isthmus_estate.services: {name}",
                f"it belongs to {owner} in the etcd of {', '.join(sorted(clusters))}, and the inventory would define "
                "it too",
                "a service has one owner",
                "remove it here, or where it was registered"
                + (" (isthmus.mesh.global_service with state: absent)" if owner == "module" else ""),
            )
            for (name, owner), clusters in places.items()
        )


class _Planner:
    def __init__(
        self,
        model: Model,
        record: Record,
        now: datetime,
        version: str,
        by: str,
        prune: Iterable[str],
        forget: Forget,
        rotate: bool,
        exposed: Mapping[str, Mapping[str, Any]],
        try_native: bool,
        proofs: auto.Proofs,
        keys: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.record = record
        self.keys = keys
        self.exposed = exposed
        self.try_native = try_native
        self.proofs = proofs
        self.now = now
        self.version = version
        self.by = by
        self.rotate = rotate
        self.problems: list[Problem] = []
        self.warnings = [*model.warnings, *record.warnings]
        self.removed: list[str] = []
        self.orphans: list[str] = []
        self.digest = model.digest()
        self.known = {name: doc for name, doc in record.clusters.items() if doc["state"] != "absent"}
        self.lists = forget.lists
        self.forgotten = forgotten_hosts(record.clusters.values())
        lost = self.forget_names(forget.names)
        for name in set(forget.clean) & set(self.forgotten) & set(model.hosts):
            if f"host/{name}" not in lost and not model.hosts[name].absent:
                del self.forgotten[name]
        self.forget(lost)
        self.model = self.without_forgotten(model, lost)
        self.prune = self.prune_names(prune) | lost

    def problem(self, where: str, what: str, why: str, following: str) -> None:
        self.problems.append(Problem(where, what, why, following))

    def run(self) -> Plan:
        self.check_roster()
        self.check_orphans()
        documents = {}
        for name in sorted(set(self.model.clusters) | set(self.record.clusters)):
            document = self.cluster(name)
            if document is not None:
                documents[name] = document
        departed = self.departed(documents)
        for name, document in documents.items():
            old = self.record.clusters.get(name)
            entries = {**document, **_filled(departed=departed.get(name))}
            if entries != document:
                document = self.stamped(entries, old)
            documents[name] = self.settled(document, CLUSTERS + name, old)
        present = {name: doc for name, doc in documents.items() if doc["state"] != "absent"}
        staged = Stages(
            self.model, self.record.roster or {}, self.known, present, self.rotate, self.try_native, self.proofs
        )
        self.problems += staged.problems
        self.warnings += staged.warnings
        stages, native_stages, ipsec_stages = (
            {pair: (now, *rest) for pair, (now, rest) in found.items()} for found in staged.ways
        )
        self.check_in_cluster(present, *staged.ways)
        vpcs = self.vpcs(present, staged.running, [*staged.possible, *staged.states])
        speaking = self.speaking(present)
        roster = self.roster(documents, staged.states[0], vpcs, speaking)
        self.check_sizes(documents, roster)
        if self.problems:
            raise ModelError(self.problems)
        following = Record(roster, documents)
        forgotten = forgotten_hosts(documents.values())
        specs = self.specs(present, roster)
        revocations = tuple(self.revocations(documents, forgotten))
        doomed = {one["cluster"]: {"hosts": one["hosts"], "names": one["names"]} for one in revocations}
        before, after = _summary(self.record), _summary(following)
        return Plan(
            specs=specs,
            record=following.to_documents(),
            services=self.services(roster, present),
            changes=tuple(_changes(self.record, following)),
            orphans=tuple(sorted(self.orphans)),
            removed=tuple(sorted(self.removed)),
            cuts=tuple(cuts(self.model, self.record, following, self.removed, self.now)),
            forgotten=forgotten,
            revocations=tuple(one for one in revocations if one["ca_host"]),
            kubernetes_left=tuple(
                name
                for name, doc in self.known.items()
                if "kubernetes" in doc and "kubernetes" not in documents[name] and not openings.is_in_cluster(doc)
            ),
            in_cluster={
                name: {
                    **_in_cluster(self.model, present, cluster, cluster.in_cluster),
                    **_filled(revoked=doomed.get(name)),
                }
                for name, cluster in self.model.clusters.items()
                if cluster.in_cluster is not None and name in present
            },
            warnings=tuple(sorted(set(self.warnings))),
            before=before,
            after=after,
            sites=tuple(
                matrix.rows(
                    present,
                    self.model.overlay_port,
                    self.model.overlay_mtu,
                    stages,
                    native_stages,
                    ipsec_stages,
                    staged.keys,
                    self.model.ipsec,
                    staged.chosen,
                    self.model.closed,
                )
            ),
            steps=tuple(self.steps(following, present, staged.states)),
            stages=stages,
            native=native_stages,
            ipsec=ipsec_stages,
            keys=staged.keys,
            routes=tuple(
                sorted(
                    (
                        *matrix.routes(present, stages, native_stages),
                        *matrix.routes_to_gateways(self.model.ipsec, ipsec_stages),
                    ),
                    key=lambda route: str(route["site"]),
                )
            ),
            vpcs=vpcs,
            bgp=speaking,
            trials=staged.trials,
            told=tuple(auto.told(staged.courses, matrix.name)),
            keyed=tuple(sorted(self.keyed(present, specs))),
        )

    # Sites to which nobody outside opens anything

    def keyed(self, present: Mapping[str, Mapping[str, Any]], specs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
        """Hosts at such sites, and the etcd hosts of all others, that encrypt or begin to."""
        for document in present.values() if self.model.closed else ():
            for name, entry in document["hosts"].items():
                wanted = entry["site"] in self.model.closed or name in document["etcd"]["members"]
                if wanted and "wireguard" in specs.get(name, {}):
                    yield name

    def keys_of(self, host: str, old: Mapping[str, Any] | None) -> dict[str, str]:
        """The host's `public_keys` in the record."""
        if not self.model.closed:
            return {}
        return dict(self.keys.get(host) or (old or {}).get("public_keys", {}))

    def with_keys(self, clusters: Mapping[str, Mapping[str, Any]], keys: Keys) -> dict[str, Mapping[str, Any]]:
        """Documents of clusters without public keys that hosts do not have any more with these keys."""
        ports = {str(port) for port in openings.wireguard_ports([keys])}
        found: dict[str, Mapping[str, Any]] = {}
        for name, document in clusters.items():
            hosts = {
                host: {**entry, "public_keys": {port: key for port, key in known.items() if port in ports}}
                for host, entry in document.get("hosts", {}).items()
                if (known := entry.get("public_keys"))
            }
            changed = any(document["hosts"][host] != entry for host, entry in hosts.items())
            found[name] = (
                self.stamped({**document, "hosts": {**document["hosts"], **hosts}}, document) if changed else document
            )
        return found

    # BGP

    def speaking(self, present: Mapping[str, Mapping[str, Any]]) -> Speaking:
        old = (self.record.roster or {}).get("bgp", ())
        taken = [text for doc in present.values() for text in (*doc["workload_ranges"], *_pod_ranges(doc))]
        found = plan_bgp(self.model.bgp, self.model.hosts, present, taken, old, self.prune)
        self.orphans += found.orphans
        self.removed += found.removed
        return found

    # Clusters whose control plane is in them

    def check_in_cluster(
        self,
        present: Mapping[str, Mapping[str, Any]],
        ways: Ways,
        native: Ways,
        gateways: Ways,
    ) -> None:
        """What hosts of the inventory have and nodes that only Kubernetes knows cannot."""
        for name, document in present.items():
            if openings.is_in_cluster(document):
                self.check_encryption_of(name, document["site"], ways)
                self.check_native_of(name, document["site"], native)
                self.check_gateways_of(name, document["site"], gateways)
                self.tell_of_vpcs(name, document["site"])

    def check_native_of(self, name: str, site: str, ways: Ways) -> None:
        native = begun(site, ways)
        if native:
            self.problem(
                f"isthmus_estate.clusters.{name}.site",
                f"traffic of site {site} goes natively ({', '.join(matrix.name(pair) for pair in native)}), and the "
                "cluster's control plane is in it",
                "its nodes, which Kubernetes alone knows, take packets of the mesh through the tunnel only",
                "name each of these pairs under isthmus_estate.site_pairs with routing: tunnel, or give the cluster a "
                "site of its own",
            )

    def check_gateways_of(self, name: str, site: str, ways: Ways) -> None:
        led = begun(site, ways)
        if led:
            self.problem(
                f"isthmus_estate.clusters.{name}.site",
                f"traffic of site {site} goes through gateways ({', '.join(matrix.name(pair) for pair in led)}), and "
                "the cluster's control plane is in it",
                "its nodes, which Kubernetes alone knows, are not led to a gateway so far, and nothing keeps their "
                "packets from leaving in clear",
                "name each of these pairs under isthmus_estate.site_pairs with encryption: none, or give the cluster a "
                "site of its own",
            )

    def check_encryption_of(self, name: str, site: str, ways: Ways) -> None:
        encrypted = begun(site, ways)
        if not encrypted:
            return
        pairs = ", ".join(matrix.name(pair) for pair in encrypted)
        wanted = any(self.model.encryption.of(pair) == "wireguard" for pair in encrypted)
        self.problem(
            f"isthmus_estate.clusters.{name}.site",
            f"traffic of site {site} is encrypted ({pairs}), and the cluster's control plane is in it",
            "its nodes have no keys of WireGuard so far, and hosts that encrypt send them nothing in clear",
            "name each of these pairs under isthmus_estate.site_pairs with encryption: none, or give the cluster a "
            "site of its own and name that one's pairs"
            if wanted
            else "run isthmus.mesh.site without the cluster until encryption is turned off, or give it a site of its "
            "own",
        )

    def tell_of_vpcs(self, name: str, site: str) -> None:
        sites = [one.site for one in self.model.vpcs.sites.values() if not one.absent]
        if site in sites:
            held = f"what the VPC of site {site} lets in for these nodes and routes to them, and "
        elif any(vpc.FIREWALL in one.manage for one in self.model.vpcs.sites.values() if not one.absent):
            held = ""
        else:
            return
        self.warnings.append(
            f"cluster {name}: Kubernetes knows its nodes, the inventory does not, so VPCs (isthmus_estate.sites.*.vpc) "
            f"open no port for them. Next: see yourself to {held}that hosts with a VPC let in what docs/ports.md says "
            "from these nodes"
        )

    # VPCs

    def vpcs(self, present: Mapping[str, Mapping[str, Any]], running: State, following: Iterable[State]) -> vpc.Planned:
        old = (self.record.roster or {}).get("vpcs")
        if old is None and self.model.vpcs == vpc.Vpcs():
            return vpc.Planned()
        # To what is lost nothing stays open.
        states = [self.vpc_state({name: self.without_lost(doc) for name, doc in self.known.items()}, running)]
        states += [self.vpc_state(present, state) for state in following]
        found = vpc.planned(self.model.vpcs, self.model.name, old, self.prune, states)
        self.orphans += found.orphans
        self.removed += found.removed
        return found

    def without_lost(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """A cluster's document without forgotten hosts."""
        members = [host for host in document["etcd"]["members"] if host not in self.forgotten]
        hosts = {host: entry for host, entry in document["hosts"].items() if host not in self.forgotten}
        return {**document, "hosts": hosts, "etcd": {**document["etcd"], "members": members}}

    def vpc_state(self, documents: Mapping[str, Mapping[str, Any]], state: State) -> vpc.State:
        homes = {host: doc for doc in documents.values() for host in doc["hosts"]}
        return vpc.State(documents, lambda host: _Spec(self.model, documents, host, homes[host], state).build())

    # Steps

    def steps(
        self, record: Record, present: Mapping[str, Mapping[str, Any]], states: Sequence[State]
    ) -> Iterator[Step]:
        """Those after the first, which `record` has. Where a pair changes in several respects, all take each step
        together: what is sent natively in clear is sent so only while the other side takes it, and from WireGuard to
        gateways, or back, packets are encrypted by the one or the other at each step."""
        for last, state in zip(states, states[1:]):
            changing = [changed(before, now) for before, now in zip(last.staged, state.staged)]
            old = record.roster or {}
            roster = {**old, "revision": old["revision"] + 1, "when": format_time(self.now), "by": self.by}
            for key in (*encryption.STAGED, "auto"):
                roster.pop(key, None)
            roster.update(state.documents())
            record = Record(roster, self.with_keys(record.clusters, state.keys))
            present = {name: record.clusters[name] for name in present}
            replaced = {pair for pair, stage in state.encryption.items() if stage} if state.keys != last.keys else set()
            up = {pair for now, before in zip(changing, last.staged) for pair in now if now[pair] > before[pair]}
            yield Step(
                specs=self.specs(present, roster),
                record=record.to_documents(),
                stages=changing[0],
                native=changing[1],
                ipsec=changing[2],
                waits=tuple(hosts_of(present, replaced.union(*changing))),
                proven=tuple(hosts_of(present, replaced | up)),
            )

    def specs(self, present: Mapping[str, Mapping[str, Any]], roster: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        sites = {*sites_of(present), *self.model.sites}
        state = state_of(roster, sites)
        return {
            host.name: _Spec(self.model, present, host.name, present[host.cluster], state).build()
            for host in self.model.hosts.values()
            if not host.absent
        }

    # What goes

    def prune_names(self, prune: Iterable[str]) -> set[str]:
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

    def forget_names(self, given: Iterable[str]) -> set[str]:
        """Full names of what is lost, known or forgotten before. Unlike a name to prune it must be found: somebody
        relies on it."""
        candidates = {f"cluster/{name}" for name in self.record.clusters}
        candidates |= {f"host/{host}" for doc in self.known.values() for host in doc["hosts"]}
        candidates |= {f"host/{host}" for host in self.forgotten}
        found = set()
        for name in filter(None, map(str.strip, given)):
            meant = {name} & candidates or {one for one in candidates if one.partition("/")[2] == name}
            if len(meant) == 1:
                found |= meant
            elif meant:
                self.problem(
                    f"isthmus_forget={name}",
                    "it can mean " + " or ".join(sorted(meant)),
                    "what is forgotten cannot be brought back but by joining it anew",
                    "write the full name",
                )
            else:
                near = nearest(name, candidates)
                self.problem(
                    f"isthmus_forget={name}",
                    "the estate record has neither a host nor a cluster of that name",
                    "a machine under another name would keep its rights",
                    f"write its inventory name{f'; did you mean {near!r}?' if near else ''}",
                )
        return found

    def forget(self, lost: set[str]) -> None:
        """Put what is lost, a cluster with all its hosts, beside what was forgotten before."""
        for name, doc in self.known.items():
            for host in doc["hosts"]:
                if f"host/{host}" in lost or f"cluster/{name}" in lost:
                    self.forgotten[host] = {"cluster": name, "at": format_time(self.now), "by": self.by}
            if f"cluster/{name}" in lost and openings.is_in_cluster(doc):
                self.warnings.append(
                    f"cluster {name}: other clusters' etcd refuses what its registrars hold, as the user remote-{name} "
                    "is deleted there; the certificates are not revoked. Next: give no other cluster that name within "
                    "a year"
                )

    def without_forgotten(self, model: Model, lost: set[str]) -> Model:
        """The model as if the inventory lacked what is forgotten, and clusters that cannot begin without it."""

        def cannot_begin(cluster: Cluster) -> bool:
            return f"cluster/{cluster.name}" in lost or (
                cluster.name not in self.known
                and cluster.in_cluster is None
                and (cluster.ca_host in self.forgotten or not set(cluster.etcd.hosts) - set(self.forgotten))
            )

        dropped = {cluster.name for cluster in model.clusters.values() if cannot_begin(cluster)}
        for host in sorted(set(model.hosts) & set(self.forgotten)):
            entry = self.forgotten[host]
            if f"host/{host}" not in lost and f"cluster/{entry['cluster']}" not in lost:
                self.warnings.append(
                    f"host {host} was forgotten at {entry['at']} by {entry['by'] or 'somebody'} and takes no part. "
                    "Next: take the mesh off it with isthmus.mesh.teardown, or give it a new disk; isthmus.mesh.site "
                    "then joins it anew. If it is gone for good, take it out of the inventory"
                )
        clusters = {
            name: replace(
                cluster,
                etcd=replace(
                    cluster.etcd, hosts=tuple(host for host in cluster.etcd.hosts if host not in self.forgotten)
                ),
            )
            for name, cluster in model.clusters.items()
            if name not in dropped
        }
        hosts = {
            name: host
            for name, host in model.hosts.items()
            if name not in self.forgotten and host.cluster not in dropped
        }
        services = {
            key: replace(service, clusters=tuple(name for name in service.clusters if name not in dropped))
            for key, service in model.services.items()
        }
        return replace(
            model, clusters=clusters, hosts=hosts, services=services, ipsec=model.ipsec.without(self.forgotten)
        )

    def forgotten_of(self, cluster: str) -> dict[str, dict[str, str]]:
        """The entries of the cluster's document."""
        return {
            host: {"at": entry["at"], "by": entry["by"]}
            for host, entry in sorted(self.forgotten.items())
            if entry["cluster"] == cluster
        }

    def kept(self, name: str, old: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The document of a cluster that is not planned: what is forgotten and revoked changes all the same."""
        if old is None:
            return None
        rest = {key: value for key, value in old.items() if key not in ("forgotten", "crl", "departed")}
        lists = self.lists.get(name) or old.get("crl")
        return self.stamped({**rest, **_filled(forgotten=self.forgotten_of(name), crl=lists)}, old)

    def departed(self, documents: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
        """By authority, removed etcd hosts whose certificates it has still to revoke: others have some of these names
        too, so that no user can be deleted for them. Not of a cluster that goes as a whole, whose names are its own."""
        present = {name: doc for name, doc in documents.items() if doc["state"] != "absent"}
        hosts = {host for doc in present.values() for host in doc["hosts"]} | set(self.forgotten)
        carried = {host for name in set(present) & set(self.known) for host in self.known[name]["etcd"]["members"]}
        return {
            name: sorted((carried | set(self.known[name].get("departed", ()))) - hosts)
            for name, document in present.items()
            if document["ca_certificate"] is not None and name not in self.lists
        }

    def revocations(
        self, documents: Mapping[str, Mapping[str, Any]], forgotten: Mapping[str, Mapping[str, str]]
    ) -> Iterator[dict[str, Any]]:
        """By authority. All that is forgotten or departed, not only by this run: a run before may have reached a part
        of the authorities only."""
        gone = {entry["cluster"] for entry in forgotten.values()}
        for name, document in documents.items():
            departed = document.get("departed", [])
            if document["state"] == "absent" or document["ca_certificate"] is None or not (forgotten or departed):
                continue
            names = [f"remote-{other}" for other in sorted(gone) if documents[other]["state"] == "absent"]
            if openings.is_in_cluster(document):
                # Who is removed and comes back keeps its keys, and nothing would tell it that they are refused there.
                if departed:
                    self.warnings.append(
                        f"cluster {name}: its authority is in the cluster and revokes what forgotten hosts have, not "
                        f"what removed ones have: certificates of {', '.join(departed)} are good there until they end. "
                        "Next: take the mesh off them with isthmus.mesh.teardown, which deletes the keys"
                    )
                if forgotten:
                    yield {"cluster": name, "ca_host": "", "hosts": sorted(forgotten), "departed": [], "names": names}
                continue
            yield {
                "cluster": name,
                "ca_host": document["ca_host"],
                "hosts": sorted({*forgotten, *departed}),
                "departed": list(departed),
                "names": names,
            }

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

    # What is fixed

    def check_roster(self) -> None:
        roster = self.record.roster
        if roster is None:
            return
        if roster["estate"] != self.model.name:
            self.problem(
                "isthmus_estate.name",
                f"{self.model.name!r}, but the record found on the hosts is of estate {roster['estate']!r}",
                "two estates on the same hosts would undo each other",
                "use the inventory of that estate, or tear it down first",
            )
        if roster.get("max_clusters") not in (None, self.model.max_clusters):
            self.problem(
                "isthmus_estate.max_clusters",
                f"{self.model.max_clusters}, but the estate runs with {roster['max_clusters']}",
                "it sets the layout of every identity",
                f"put {roster['max_clusters']} back",
            )
        if roster.get("domain") not in (None, self.model.domain):
            self.change_not_yet(
                "isthmus_estate.domain",
                roster["domain"],
                self.model.domain,
                "until the last host has the new one, names of services would be found on a part of the hosts only",
                f"put {roster['domain']} back",
            )
        if roster.get("overlay_port") not in (None, self.model.overlay_port):
            self.change_not_yet(
                "isthmus_estate.overlay.port",
                roster["overlay_port"],
                self.model.overlay_port,
                "hosts that have the new one and hosts that do not could not reach each other's workloads",
                f"put {roster['overlay_port']} back",
            )

    def change_not_yet(self, where: str, old: Any, new: Any, why: str, following: str) -> None:
        """A change that a later version may make: refused now, as this one would leave it half done."""
        self.problem(where, f"a change from {old} to {new} is not yet supported", why, following)

    def check_orphans(self) -> None:
        """What the model has against what only the record knows: it still runs and keeps what it has."""
        orphaned = sorted(set(self.known) - set(self.model.clusters))
        for name in orphaned:
            if f"cluster/{name}" not in self.prune:
                self.check_orphaned_cluster(name, self.known[name])
        for cluster in self.model.clusters.values():
            if not cluster.absent and cluster.name in self.known:
                self.check_orphaned_kubernetes(cluster, self.known[cluster.name])
        hosts: dict[IPv4Address, tuple[str, str]] = {}
        for name, doc in self.known.items():
            if f"cluster/{name}" in self.prune or (name in self.model.clusters and self.model.clusters[name].absent):
                continue
            for host, entry in doc["hosts"].items():
                if host in self.model.hosts or f"host/{host}" in self.prune:
                    continue
                orphan = f"cluster/{name}" if name in orphaned else f"host/{host}"
                for key in ("underlay4", "advertise4"):
                    hosts[IPv4Address(entry[key])] = f"host {host} of cluster {name}", orphan
        for host in self.model.hosts.values():
            for address, variable in host.addresses.items():
                if address in hosts and not host.absent:
                    owner, orphan = hosts[address]
                    self.orphan_problem(
                        f"host {host.name}.{variable}", f"{address} is also an address of {owner}", orphan
                    )
        for cluster in self.model.clusters.values():
            for address, (owner, orphan) in hosts.items():
                for network in () if cluster.absent else cluster.ranges:
                    if address in network:
                        self.orphan_problem(
                            f"isthmus_estate.clusters.{cluster.name}",
                            f"{network} holds {address} of {owner}",
                            orphan,
                            self.such_as(cluster, network),
                        )

    def check_orphaned_cluster(self, name: str, doc: Mapping[str, Any]) -> None:
        orphan = f"cluster/{name}"
        outer = [*_pod_ranges(doc), *_cluster_ips(doc)]
        for cluster in self.model.clusters.values():
            if not cluster.absent and cluster.id == doc["id"]:
                self.orphan_problem(
                    f"isthmus_estate.clusters.{cluster.name}.id", f"{cluster.id} is the id of cluster {name}", orphan
                )
        for host in self.model.hosts.values():
            if host.name in doc["hosts"] and not host.absent:
                self.orphan_problem(
                    f"host {host.name}.isthmus_cluster", f"{host.cluster}, but the host runs in cluster {name}", orphan
                )
        for text in (*doc["workload_ranges"], doc["service_range"], *outer):
            self.check_orphaned_range(IPv4Network(text), f"of cluster {name}", orphan)

    def check_orphaned_kubernetes(self, cluster: Cluster, doc: Mapping[str, Any]) -> None:
        """Of a cluster that the inventory has: ranges of Kubernetes that it lacks."""
        whole, words = f"kubernetes/{cluster.name}", f"of Kubernetes in cluster {cluster.name}"
        if cluster.kubernetes is None:
            for text in () if whole in self.prune else (*_pod_ranges(doc), *_cluster_ips(doc)):
                self.check_orphaned_range(IPv4Network(text), words, whole)
            return
        for network in self.orphaned_pods(cluster, doc):
            self.check_orphaned_range(network, words, f"pods/{cluster.name}/{network}", cluster.kubernetes.pod_ranges)

    def orphaned_pods(self, cluster: Cluster, doc: Mapping[str, Any]) -> list[IPv4Network]:
        """Ranges of pods that the record has and the inventory lacks, and that are not to go."""
        wanted = () if cluster.kubernetes is None else cluster.kubernetes.pod_ranges
        return [
            IPv4Network(text)
            for text in _pod_ranges(doc)
            if f"pods/{cluster.name}/{text}" not in self.prune
            and not any(IPv4Network(text).subnet_of(network) for network in wanted)
        ]

    def check_orphaned_range(
        self, old: IPv4Network, owner: str, orphan: str, apart_from: Iterable[IPv4Network] = ()
    ) -> None:
        """No range of the model overlaps it but those that stand in its place, and no host is in it."""
        for cluster in self.model.clusters.values():
            for new in () if cluster.absent else cluster.ranges:
                if new.overlaps(old) and new not in apart_from:
                    self.orphan_problem(
                        f"isthmus_estate.clusters.{cluster.name}",
                        f"{new} overlaps {old} {owner}",
                        orphan,
                        self.such_as(cluster, new),
                    )
        for host in self.model.hosts.values():
            for address, variable in () if host.absent else host.addresses.items():
                if address in old:
                    self.orphan_problem(f"host {host.name}.{variable}", f"{address} lies in {old} {owner}", orphan)

    def such_as(self, cluster: Cluster, network: IPv4Network) -> str:
        """A free range that could stand in place of the cluster's."""
        kind = next(claim.kind for claim in cluster.claims if claim.network == network)
        found = Space.of(self.model, self.record).deal(network.prefixlen, kind)
        return "" if found is None else f", such as {found}"

    def orphan_problem(self, where: str, what: str, orphan: str, such_as: str = "") -> None:
        self.problem(
            where,
            f"{what}, which the record knows and the inventory lacks",
            "what is absent from the inventory still runs",
            f"choose another{such_as}, or remove that {orphan.partition('/')[0]} with isthmus_prune={orphan}",
        )

    def check_fixed(self, cluster: Cluster, doc: Mapping[str, Any]) -> None:
        where = f"isthmus_estate.clusters.{cluster.name}"
        if cluster.id != doc["id"]:
            self.problem(
                f"{where}.id",
                f"{cluster.id}, but the cluster runs with {doc['id']}",
                "every identity of its workloads carries the id",
                f"put {doc['id']} back; to renumber, remove the cluster and add it anew",
            )
        old = IPv4Network(doc["service_range"])
        if not old.subnet_of(cluster.service_range):
            self.problem(
                f"{where}.service_range",
                f"{cluster.service_range} does not hold {old}, the range in use",
                "addresses of services would move",
                f"use {old} or a range around it",
            )
        if cluster.kubernetes is not None:
            for text in _cluster_ips(doc):
                if not IPv4Network(text).subnet_of(cluster.kubernetes.service_range):
                    self.problem(
                        f"{where}.kubernetes.service_range",
                        f"{cluster.kubernetes.service_range} does not hold {text}, the range in use",
                        "addresses of services would move",
                        f"use {text} or a range around it; if Kubernetes was made anew with another one, take "
                        f"`kubernetes` out of the inventory with isthmus_prune=kubernetes/{cluster.name} first",
                    )
        places = [doc.get("control_plane", "hosts"), "hosts" if cluster.in_cluster is None else "in_cluster"]
        if places[0] != places[1]:
            self.change_not_yet(
                f"{where}.control_plane",
                places[0],
                places[1],
                "its etcd and its authority's key would have to move",
                f"put {places[0]} back; to move it, remove the cluster and add it anew",
            )
        if cluster.ca_host is not None and cluster.ca_host != doc["ca_host"]:
            self.problem(
                f"{where}.ca_host",
                f"{cluster.ca_host}, but the CA's key is on {doc['ca_host']}",
                "a private key never leaves its host",
                f"put {doc['ca_host']} back or leave ca_host out",
            )
        if doc.get("ca_certificate") is None:
            return  # its etcd has not run: a first run that failed can be put right
        for key, new, why in (
            ("client_port", cluster.etcd.client_port, "agents and peers would look for its members where none listens"),
            ("peer_port", cluster.etcd.peer_port, "its members know each other by the port that they joined with"),
        ):
            if new != doc["etcd"][key]:
                self.change_not_yet(f"{where}.etcd.{key}", doc["etcd"][key], new, why, f"put {doc['etcd'][key]} back")

    def check_members(
        self, cluster: Cluster, running: Mapping[str, Any], hosts: Mapping[str, Any], members: list[str]
    ) -> None:
        """Running members stay at the addresses by which the others know them."""
        if running.get("ca_certificate") is None:
            return
        before = _announced(running["hosts"], running["etcd"]["members"])
        after = _announced(hosts, [member for member in members if member in hosts])
        for member in sorted(set(before) & set(after)):
            for key, variable in (("underlay4", "isthmus_underlay"), ("advertise4", "isthmus_advertise")):
                old, new = running["hosts"][member][key], hosts[member][key]
                if old != new:
                    self.change_not_yet(
                        f"host {member}.{variable}",
                        old,
                        new,
                        f"the host carries a member of cluster {cluster.name}'s etcd, and the others know it by its "
                        "addresses",
                        f"put {old} back; to move the member, take the host out of etcd.hosts (another one in its "
                        f"place) with isthmus_prune=member/{cluster.name}/{member}, and list it again later",
                    )
                    break
            else:
                # Back to one site is no harm: what was announced can be dialled from there too.
                if before[member] != after[member] and before[member] == running["hosts"][member]["underlay4"]:
                    self.change_not_yet(
                        f"isthmus_estate.clusters.{cluster.name}.etcd.hosts",
                        before[member],
                        f"{after[member]} as the address of member {member}",
                        "members in several sites dial each other at isthmus_advertise, and the others know it by "
                        "isthmus_underlay",
                        "keep the members in one site",
                    )

    # One cluster

    def cluster(self, name: str) -> dict[str, Any] | None:
        cluster = self.model.clusters.get(name)
        old = self.record.clusters.get(name)
        running = old if old is not None and old["state"] != "absent" else None
        if f"cluster/{name}" in self.prune or (cluster is not None and cluster.absent):
            if running is not None:
                self.removed.append(f"cluster/{name}")
                if openings.is_in_cluster(running) and cluster is None:
                    self.warnings.append(
                        f"cluster {name}: its control plane is in it, and goes on there although nobody in the mesh "
                        "knows it any more. Next: put it back into the inventory with state: absent and run "
                        "isthmus.mesh.site, which takes everything of the mesh out of it"
                    )
                tombstone = {"schema": SCHEMA, "name": name, "id": running["id"], "state": "absent"}
                return self.stamped({**tombstone, **_filled(forgotten=self.forgotten_of(name))}, old)
            return self.kept(name, old)
        if cluster is None:
            if running is not None:
                self.orphans.append(f"cluster/{name}")
                for host in sorted(set(running["hosts"]) & set(self.forgotten)):
                    self.problem(
                        f"isthmus_forget={host}",
                        f"it is a part of cluster {name}, which the inventory lacks",
                        "what the inventory lacks goes as a whole",
                        f"write cluster/{name}, or put that back into the inventory",
                    )
            return self.kept(name, old)
        if running is not None:
            self.check_fixed(cluster, running)
        if cluster.in_cluster is not None:
            return self.stamped(self.in_cluster(cluster, cluster.in_cluster, running, old), old)
        hosts, released = self.hosts(cluster, running)
        members = self.members(cluster, running, hosts)
        if running is not None:
            self.check_members(cluster, running, hosts, members)
        initial = running["etcd"]["initial"] if running is not None else cluster.etcd.hosts[0]
        ca_host = running["ca_host"] if running is not None else cluster.ca_host or cluster.etcd.hosts[0]
        if members and initial not in members:
            initial = members[0]
        if ca_host in self.forgotten:
            self.problem(
                f"isthmus_forget={ca_host}",
                f"it keeps the key of cluster {name}'s certificate authority",
                "with that key anybody can sign any certificate of the cluster, and without it nobody can revoke one",
                f"forget the whole cluster (isthmus_forget=cluster/{name}), take the mesh off the hosts that are left "
                "with isthmus.mesh.teardown, and run isthmus.mesh.site, which joins them anew with a new authority",
            )
        elif ca_host not in hosts:
            self.problem(
                f"cluster {name}",
                f"host {ca_host} is being removed and keeps the cluster's CA",
                "nobody could sign certificates any more",
                "keep the host, or remove the whole cluster",
            )
        document = self.document(cluster, running, old)
        document["ca_host"] = ca_host
        document["etcd"] = {**document["etcd"], "initial": initial, "members": members}
        document["hosts"] = {host: hosts[host] for host in sorted(hosts)}
        document["released"] = released
        return self.stamped(document, old)

    def document(
        self, cluster: Cluster, running: Mapping[str, Any] | None, old: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """A cluster's document, without what hosts of the inventory make of it."""
        token = f"isthmus-{self.model.name}-{cluster.name}"
        if running is not None:
            token = running["etcd"]["token"]
        elif old is not None:
            token += f"-{old['revision']}"  # a new etcd under an old name must not be taken for the old one
        return {
            "schema": SCHEMA,
            "name": cluster.name,
            "id": cluster.id,
            "state": "present",
            "site": cluster.site,
            "workload_ranges": [str(network) for network in cluster.workload_ranges],
            "service_range": str(cluster.service_range),
            "node_prefix": cluster.node_prefix,
            "ca_host": "",
            "ca_certificate": running.get("ca_certificate") if running is not None else None,
            "etcd": {
                "initial": "",
                "token": token,
                "members": [],
                "client_port": cluster.etcd.client_port,
                "peer_port": cluster.etcd.peer_port,
                "source": dict(cluster.etcd.source),
                "quota_bytes": cluster.etcd.quota_bytes,
            },
            "hosts": {},
            "released": [],
            **_filled(
                forgotten=self.forgotten_of(cluster.name),
                crl=self.lists.get(cluster.name) or (running.get("crl") if running is not None else None),
                kubernetes=self.kubernetes(cluster, running),
            ),
        }

    def in_cluster(
        self,
        cluster: Cluster,
        wanted: InCluster,
        running: Mapping[str, Any] | None,
        old: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The document of a cluster whose control plane is in it: its nodes are its registrar's to know."""
        where, before = f"isthmus_estate.clusters.{cluster.name}", (running or {}).get("etcd", {}).get("replicas")
        if before not in (None, wanted.replicas):
            self.change_not_yet(
                f"{where}.etcd.replicas",
                before,
                wanted.replicas,
                "members of a running etcd come and go one by one",
                f"put {before} back",
            )
        document = self.document(cluster, running, old)
        document["control_plane"] = "in_cluster"
        document["etcd"]["replicas"] = wanted.replicas
        exposed = self.exposed.get(cluster.name) or (running or {}).get("exposed")
        for text in () if exposed is None else exposed["addresses"]:
            for other in self.model.clusters.values():
                for network in other.ranges:
                    if IPv4Address(text) in network:
                        self.problem(
                            f"{where}.expose",
                            f"its etcd got the address {text}, which lies in {network} of cluster {other.name}",
                            "what is known of the cluster makes the mesh, so its etcd must be reached without it",
                            "have it exposed at an address of the underlay",
                        )
        return {**document, **_filled(exposed=exposed)}

    def keeps_kubernetes(self, cluster: Cluster) -> bool:
        """Whether the inventory lacks a Kubernetes cluster that the record has, and that is not to go."""
        known = self.known.get(cluster.name, {})
        return cluster.kubernetes is None and "kubernetes" in known and f"kubernetes/{cluster.name}" not in self.prune

    def kubernetes(self, cluster: Cluster, running: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What the record says of the Kubernetes cluster that the cluster is."""
        old = (running or {}).get("kubernetes")
        if cluster.kubernetes is None:
            if old is not None:
                (self.orphans if self.keeps_kubernetes(cluster) else self.removed).append(f"kubernetes/{cluster.name}")
            return dict(old) if old is not None and self.keeps_kubernetes(cluster) else None
        wanted, orphaned = cluster.kubernetes.pod_ranges, self.orphaned_pods(cluster, running or {})
        self.orphans += [f"pods/{cluster.name}/{network}" for network in orphaned]
        kept = [network for network in wanted if not any(network.subnet_of(outer) for outer in orphaned)]
        self.removed += [
            f"pods/{cluster.name}/{text}"
            for text in _pod_ranges(running or {})
            if not any(IPv4Network(text).subnet_of(network) for network in (*wanted, *orphaned))
        ]
        return {
            "api_server": cluster.kubernetes.api_server,
            "pod_ranges": [str(network) for network in (*kept, *orphaned)],
            "service_range": str(cluster.kubernetes.service_range),
            **({"identity_labels": list(labels)} if (labels := cluster.kubernetes.identity_labels) else {}),
        }

    def members(self, cluster: Cluster, running: Mapping[str, Any] | None, hosts: Mapping[str, Any]) -> list[str]:
        wanted = set(cluster.etcd.hosts)
        for host in running["etcd"]["members"] if running is not None else ():
            if host in wanted:
                continue
            name = f"member/{cluster.name}/{host}"
            if name in self.prune or host not in hosts:
                self.removed.append(name)
                continue
            wanted.add(host)
            if host in self.model.hosts:
                self.orphans.append(name)
        if not wanted & set(hosts) and running is not None and set(running["etcd"]["members"]) & set(self.forgotten):
            self.problem(
                f"isthmus_forget={','.join(sorted(set(running['etcd']['members']) & set(self.forgotten)))}",
                f"the etcd of cluster {cluster.name} would have no member left",
                "the cluster's state lives in them",
                f"while a member serves, list another host under etcd.hosts of {cluster.name} and run isthmus.mesh.site"
                f"; else forget the whole cluster (isthmus_forget=cluster/{cluster.name})",
            )
        elif not wanted & set(hosts):
            self.problem(
                f"isthmus_estate.clusters.{cluster.name}.etcd.hosts",
                "no member would be left",
                "the cluster's state lives in them",
                "name another host first",
            )
        if len(wanted) > 7:
            self.problem(
                f"isthmus_estate.clusters.{cluster.name}.etcd.hosts",
                f"{len(wanted)} members with those that the record knows are more than 7",
                "absence from the list removes no member",
                f"remove one with isthmus_prune=member/{cluster.name}/HOST",
            )
        return sorted(wanted)

    def hosts(
        self, cluster: Cluster, running: Mapping[str, Any] | None
    ) -> tuple[dict[str, dict[str, Any]], list[dict[str, str]]]:
        """Entries of all hosts of the cluster, and what is released."""
        old_hosts: Mapping[str, Any] = running["hosts"] if running is not None else {}
        released = [dict(entry) for entry in running["released"]] if running is not None else []
        entries: dict[str, dict[str, Any]] = {}
        for name, entry in old_hosts.items():
            host = self.model.hosts.get(name)
            gone = host is not None and host.absent and host.cluster == cluster.name
            if gone or f"host/{name}" in self.prune:
                self.removed.append(f"host/{name}")
                released.append({"address": entry["range4"], "owner": name, "at": format_time(self.now)})
                continue
            entries[name] = copy.deepcopy(dict(entry))
            if host is None:
                self.orphans.append(f"host/{name}")
            elif host.cluster != cluster.name:
                self.problem(
                    f"host {name}.isthmus_cluster",
                    f"{host.cluster}, but the host runs in cluster {cluster.name}",
                    "its addresses and certificates are of that cluster",
                    f"put it back, or move it with isthmus_prune=host/{name}",
                )
        wanted = [host for host in self.model.hosts.values() if host.cluster == cluster.name and not host.absent]
        ranges = self.node_ranges(cluster, wanted, entries, released)
        for host in wanted:
            if host.name in ranges:
                old = entries.get(host.name)
                node = host.kubernetes_node
                if self.keeps_kubernetes(cluster) and old is not None:
                    node = old.get("kubernetes_node")
                entry = self.host(host, ranges[host.name], old, released)
                keys = self.keys_of(host.name, old)
                entries[host.name] = {**entry, **_filled(kubernetes_node=node, public_keys=keys)}
        return entries, released

    def node_ranges(
        self,
        cluster: Cluster,
        wanted: list[Host],
        entries: Mapping[str, Mapping[str, Any]],
        released: list[dict[str, str]],
    ) -> dict[str, IPv4Network]:
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
                    self.orphan_problem(where, f"{pinned} overlaps {other}, the range of host {name}", f"host/{name}")
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

    def quarantined(self, released: list[dict[str, str]]) -> list[IPv4Network]:
        return [IPv4Network(entry["address"]) for entry in released if self.now - parse_time(entry["at"]) < QUARANTINE]

    def host(
        self, host: Host, node_range: IPv4Network, old: Mapping[str, Any] | None, released: list[dict[str, str]]
    ) -> dict[str, Any]:
        mesh = IPv4Address(old["mesh4"]) if old is not None else node_range.network_address + 1
        workloads: dict[str, Any] = dict(old["workloads"]) if old is not None else {}
        declared = {workload.key: workload for workload in host.workloads}
        for key in sorted(workloads):
            name = f"workload/{host.name}/{key}"
            if name in self.prune or (key in declared and declared[key].absent):
                entry = workloads.pop(key)
                self.removed.append(name)
                released.append({"address": f"{entry['address4']}/32", "owner": name, "at": format_time(self.now)})
            elif key not in declared:
                self.orphans.append(name)
        present = [workload for workload in host.workloads if not workload.absent]
        processes = {tuple(workloads[key]["cgroup"].items()): key for key in workloads if key not in declared}
        for workload in present:
            orphan = processes.get(tuple(workload.cgroup.items()))
            if orphan is not None:
                self.orphan_problem(
                    f"host {host.name}.isthmus_workloads ({workload.key})",
                    f"{next(iter(workload.cgroup.values()))} is also the workload {orphan}",
                    f"workload/{host.name}/{orphan}",
                )
        addresses = self.addresses(host, node_range, mesh, present, workloads, released)
        for workload in present:
            if workload.key in addresses:
                workloads[workload.key] = {
                    "address4": str(addresses[workload.key]),
                    "service_account": workload.service_account,
                    "labels": dict(workload.labels),
                    "cgroup": dict(workload.cgroup),
                }
        return {
            "range4": str(node_range),
            "mesh4": str(mesh),
            "underlay4": str(host.underlay),
            "advertise4": str(host.advertise),
            "site": host.site,
            "labels": dict(host.labels),
            "state": "present",
            "workloads": {key: workloads[key] for key in sorted(workloads)},
        }

    def addresses(
        self,
        host: Host,
        node_range: IPv4Network,
        mesh: IPv4Address,
        present: list[Workload],
        old: Mapping[str, Any],
        released: list[dict[str, str]],
    ) -> dict[str, IPv4Address]:
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
                self.orphan_problem(
                    where, f"{workload.address} is the address of {owner}", f"workload/{host.name}/{owner}"
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

    # Documents

    def check_sizes(self, documents: Mapping[str, Mapping[str, Any]], roster: Mapping[str, Any]) -> None:
        for name, document in documents.items():
            if document["state"] == "absent":
                continue
            workloads = sum(len(entry["workloads"]) for entry in document["hosts"].values())
            self.check_size(
                f"cluster {name}",
                f"{len(document['hosts'])} hosts with {workloads} workloads",
                document,
                "spread its hosts over more clusters, shorten labels, or remove orphans",
            )
        self.check_size(
            "isthmus_estate",
            f"{len(roster['clusters'])} clusters and {len(roster['services'])} services",
            roster,
            "use fewer services",
        )

    def check_size(self, where: str, content: str, document: Mapping[str, Any], following: str) -> None:
        size = len(jsontext.dumps(document).encode())
        if size > LARGEST_DOCUMENT:
            self.problem(
                where,
                f"its document in the estate record would have {size / 2**20:.2f} MiB ({content}), more than "
                f"{LARGEST_DOCUMENT / 2**20:.2f} MiB",
                "etcd refuses what is larger than 1.5 MiB",
                following,
            )

    def stamped(self, document: dict[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
        """The old document when nothing changed, else the new one with the next revision."""
        if old is not None and all(
            old.get(key) == document.get(key) for key in (set(old) | set(document)) - {"revision", "last_applied"}
        ):
            return dict(old)
        if "released" in document:
            document["released"] = [
                entry for entry in document["released"] if self.now - parse_time(entry["at"]) < QUARANTINE
            ]
        document["revision"] = 1 if old is None else old["revision"] + 1
        document["last_applied"] = {"hash": self.digest, "when": format_time(self.now), "by": self.by}
        return document

    def settled(self, document: dict[str, Any], name: str, old: Mapping[str, Any] | None) -> dict[str, Any]:
        """The next revision also of a document that did not change, when copies of it are in conflict."""
        if old is None or name not in self.record.conflicts or document["revision"] > old["revision"]:
            return document
        applied = {"hash": self.digest, "when": format_time(self.now), "by": self.by}
        return {**document, "revision": old["revision"] + 1, "last_applied": applied}

    def roster(
        self, documents: Mapping[str, Mapping[str, Any]], state: State, vpcs: vpc.Planned, speaking: Speaking
    ) -> dict[str, Any]:
        old = self.record.roster
        orphaned = {name for name in self.known if f"cluster/{name}" in self.orphans}
        services: dict[str, Any] = {}
        for key, entry in (old["services"] if old is not None else {}).items():
            services[key] = dict(entry)
            if key in self.model.services or entry["state"] == "absent":
                continue
            if f"service/{key}" in self.prune:
                services[key] = {"state": "absent", "clusters": []}
                self.removed.append(f"service/{key}")
            else:
                self.orphans.append(f"service/{key}")
        for key, service in self.model.services.items():
            if not service.absent:
                # A cluster that the inventory lacks keeps what it had: it cannot be named there any more.
                had = set(services.get(key, {"clusters": ()})["clusters"])
                services[key] = {
                    "state": "present",
                    "clusters": sorted(set(service.clusters) | (had & orphaned)),
                }
            elif key in services and services[key]["state"] != "absent":
                services[key] = {"state": "absent", "clusters": []}
                self.removed.append(f"service/{key}")
        roster: dict[str, Any] = {
            "schema": SCHEMA,
            "estate": self.model.name,
            "domain": self.model.domain,
            "max_clusters": self.model.max_clusters,
            "overlay_port": self.model.overlay_port,
            "version": self.version,
            "clusters": {name: {"id": doc["id"], "state": doc["state"]} for name, doc in sorted(documents.items())},
            "services": {key: services[key] for key in sorted(services)},
            **state.documents(),
            **_filled(vpcs=vpcs.document, bgp=list(speaking.sites), closed=list(self.model.closed)),
            "hash": self.digest,
        }
        own = {"revision", "when", "by"}
        unchanged = old is not None and all(old.get(key) == roster.get(key) for key in (set(old) | set(roster)) - own)
        if old is not None and unchanged and ROSTER not in self.record.conflicts:
            return dict(old)
        roster["revision"] = 1 if old is None else old["revision"] + 1
        roster["when"] = format_time(self.now)
        roster["by"] = self.by
        return roster

    def services(self, roster: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """By cluster; `absent` follows from the record alone, so that an interrupted run is made good."""
        found = {}
        for cluster in sorted(present):
            found[cluster] = {
                "present": [
                    replace(
                        service.definition,
                        kubernetes=service.definition.kubernetes and "kubernetes" in present[cluster],
                    ).to_dict()
                    for service in self.model.services.values()
                    if not service.absent and cluster in roster["services"][service.key]["clusters"]
                ],
                "absent": [
                    key
                    for key, entry in roster["services"].items()
                    if entry["state"] == "absent" or (key in self.model.services and cluster not in entry["clusters"])
                ],
            }
        return found


class _Spec:
    """The spec of one host, out of the next record: so that it knows orphans too."""

    def __init__(
        self,
        model: Model,
        present: Mapping[str, Any],
        name: str,
        own: Mapping[str, Any],
        state: State,
    ) -> None:
        self.model = model
        self.present = present
        self.name = name
        self.own = own
        self.state = state
        self.shared = _Shared(model, present, own)
        self.host = own["hosts"][name]
        self.member = name in own["etcd"]["members"]
        site = self.host["site"]
        self.ipsec = ipsec.section(model.ipsec, name, site, self.mine(state.gateways), self.sites(), PKI)

    def build(self) -> dict[str, Any]:
        own, shared = self.own, self.shared.build(self.host.get("kubernetes_node") is not None)
        document: dict[str, Any] = {
            "schema": shared["schema"],
            "estate": shared["estate"],
            "host": self.name,
            "cluster": shared["cluster"],
            "node": {
                "name": self.name,
                **{key: self.host[key] for key in ("underlay4", "advertise4", "range4", "mesh4", "labels")},
                **_filled(
                    kubernetes_node=self.host.get("kubernetes_node"),
                    masquerade=self.host["site"] in self.model.masquerade,
                ),
            },
            "workloads": [self.workload(key, entry) for key, entry in self.host["workloads"].items()],
            **{key: shared[key] for key in ("overlay", "dns", "service_ranges4", "mesh_ranges4")},
            "etcd": _etcd_clients(own, self.endpoints()),
            "member": self.etcd_member() if self.member else None,
            "registrar": self.shared.registrar(self.api(), self.host["site"]) if self.member else None,
            "pki": {
                "ca": {"cluster": own["name"], "host": own["ca_host"], "here": own["ca_host"] == self.name},
                "certificates": list(self.certificates()),
                "trust": list(dict.fromkeys(self.trust())),
            },
            **_filled(wireguard=self.wireguard(), native=self.native(), ipsec=self.ipsec),
        }
        document["hash"] = spec.spec_hash(document)
        return document

    def trust(self) -> Iterator[str]:
        yield self.own["name"]
        yield from self.shared.peers() if self.member else ()
        yield from ipsec.trusted_by(self.ipsec)

    def wireguard(self) -> dict[str, Any] | None:
        """None where the host has no other to encrypt with."""
        mine = self.mine(self.state.encryption)
        if not any(mine.get(site) for site in sites_of(self.present)):
            return None
        changing = {site: stage.word for site, stage in sorted(mine.items()) if stage.word in encryption.CHANGING}
        return {
            **_tunnel(self.state.keys.sends),
            **_filled(second=_tunnel(1 - self.state.keys.sends) if self.state.keys.has_both else None),
            "plain_sites": sorted(site for site, stage in mine.items() if stage is Stage.PLAIN),
            "sites": self.sites(),
            **_filled(changing=changing, **self.sessions(mine)),
        }

    def sessions(self, stages: Mapping[str, Stage]) -> dict[str, Any]:
        """With hosts of which sites only one side can open sessions, and what hosts need for the first of them."""
        here, closed = self.host["site"], self.model.closed
        inside = here in closed
        far = sorted(site for site, stage in stages.items() if stage and site != here and (inside or site in closed))
        peers = [
            self.bootstrap_peer(document, name, entry)
            for _cluster, document in sorted(self.present.items())
            for name, entry in sorted(document["hosts"].items())
            if entry["site"] in far and (name in document["etcd"]["members"] if inside else self.member)
        ]
        return {
            "opens": far if inside else [],
            "opened_by": [] if inside else far,
            "bootstrap": [peer for peer in peers if peer["keys"]],
        }

    def bootstrap_peer(self, document: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        ports = {str(port) for port in openings.wireguard_ports([self.state.keys])}
        return {
            "cluster": document["name"],
            "id": document["id"],
            "name": name,
            **{key: entry[key] for key in ("site", "underlay4", "advertise4", "range4", "mesh4")},
            "keys": {port: key for port, key in entry.get("public_keys", {}).items() if port in ports},
        }

    def native(self) -> dict[str, Any] | None:
        """None where the tunnel leads from the host to all others."""
        mine = self.mine(self.state.native)
        if not any(mine.get(site) for site in sites_of(self.present)):
            return None
        return {"sites": self.sites(), "stages": {site: stage.word for site, stage in sorted(mine.items()) if stage}}

    def mine(self, stages: Mapping[Pair, Stage]) -> dict[str, Stage]:
        """Of the host's site with each other, and with itself."""
        here = self.host["site"]
        return {
            other: stage
            for pair, stage in stages.items()
            if here in pair
            for other in (pair[1] if pair[0] == here else pair[0],)
        }

    def sites(self) -> dict[str, str]:
        return {name: doc["site"] for name, doc in sorted(self.present.items())}

    def api(self) -> dict[str, str] | None:
        """How the registrar reaches its Kubernetes."""
        if "kubernetes" not in self.own:
            return None
        files = {key: f"{PKI}/kubernetes.{end}" for key, end in (("ca", "ca"), ("cert", "crt"), ("key", "key"))}
        return {"server": self.own["kubernetes"]["api_server"], **files}

    def workload(self, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        namespace, _slash, name = key.partition("/")
        return {
            "name": name,
            "namespace": namespace,
            "service_account": entry["service_account"],
            "labels": dict(entry["labels"]),
            "address4": entry["address4"],
            "cgroup": dict(entry["cgroup"]),
        }

    def endpoints(self) -> list[str]:
        """Of the own cluster: its own member first, then those of its own site."""
        hosts, port = self.own["hosts"], self.own["etcd"]["client_port"]

        def rank(member: str) -> tuple[bool, bool, str]:
            return member != self.name, hosts[member]["site"] != self.host["site"], member

        found = []
        for member in sorted(self.own["etcd"]["members"], key=rank):
            near = hosts[member]["site"] == self.host["site"]
            key = "underlay4" if near else _dialled(self.model, hosts[member], self.host["site"])
            found.append(f"https://{hosts[member][key]}:{port}")
        return found

    def member_urls(self, port: int) -> dict[str, str]:
        announced = _announced(self.own["hosts"], self.own["etcd"]["members"])
        return {member: f"https://{address}:{port}" for member, address in announced.items()}

    def etcd_member(self) -> dict[str, Any]:
        etcd = self.own["etcd"]
        members, clients = self.member_urls(etcd["peer_port"]), self.member_urls(etcd["client_port"])
        return {
            "name": self.name,
            "client_url": clients[self.name],
            "peer_url": members[self.name],
            "members": members,
            "client_urls": clients,
            "initial": etcd["initial"],
            "token": etcd["token"],
            "source": dict(etcd["source"]),
            "quota_bytes": etcd["quota_bytes"],
        }

    def certificates(self) -> Iterator[dict[str, Any]]:
        yield self.certificate("agent", f"isthmus-agent-{self.name}")
        identity = ipsec.certificate_of(self.ipsec)
        if identity is not None:
            entry = self.certificate("ipsec", identity)
            yield {**entry, "sans_dns": [identity], "usages": ["server", "client"]}
        if not self.member:
            return
        addresses = list(dict.fromkeys([self.host["underlay4"], self.host["advertise4"], "127.0.0.1"]))
        # Readers at sites from or to which nothing but the mesh leads dial that.
        far = any(_dialled(self.model, self.host, site) == "mesh4" for site in sites_of(self.present))
        for name, cn, usages, more in (
            ("etcd-server", self.name, ["server"], [self.host["mesh4"]] if far else []),
            ("etcd-peer", "isthmus-etcd-peer", ["server", "client"], []),
        ):
            yield {
                **self.certificate(name, cn),
                "sans_dns": [self.name, "localhost"],
                "sans_ip": [*addresses, *more],
                "usages": usages,
                "owner": "isthmus-etcd",
            }
        for name, cn in (
            ("root", "root"),
            ("operator", "isthmus-operator"),
            ("registrar", "isthmus-registrar"),
        ):
            yield self.certificate(name, cn)
        for peer in self.shared.peers():
            yield {
                **self.certificate(f"peer-{peer}", f"remote-{self.own['name']}"),
                "ca_cluster": peer,
                "ca_host": self.present[peer]["ca_host"],
            }

    def certificate(self, name: str, cn: str) -> dict[str, Any]:
        return {
            "name": name,
            "ca_cluster": self.own["name"],
            "ca_host": self.own["ca_host"],
            "cn": cn,
            "sans_dns": [],
            "sans_ip": [],
            "usages": ["client"],
            "owner": "root",
        }


class _Shared:
    """What the specs of all hosts of one cluster have in common."""

    def __init__(self, model: Model, present: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.model = model
        self.present = present
        self.own = own

    def build(self, on_node: bool) -> dict[str, Any]:
        """`on_node`: for a node of the Kubernetes cluster that the cluster is."""
        own = self.own
        return {
            "schema": spec.SCHEMA,
            "estate": self.model.name,
            "cluster": {
                "name": own["name"],
                "id": own["id"],
                "max_clusters": self.model.max_clusters,
                "site": own["site"],
                "workload_ranges4": list(own["workload_ranges"]),
                "service_range4": own["service_range"],
                **_filled(kubernetes=self.kubernetes()),
            },
            "overlay": {"port": self.model.overlay_port, "mtu": self.model.overlay_mtu},
            "dns": {"domain": self.model.domain},
            # ClusterIPs that only the mesh makes reachable; on a cluster's own nodes kube-proxy does.
            "service_ranges4": [
                text
                for name, doc in sorted(self.present.items())
                for text in (doc["service_range"], *(() if on_node and name == own["name"] else _cluster_ips(doc)))
            ],
            "mesh_ranges4": [
                text
                for name, doc in sorted(self.present.items())
                for text in (*doc["workload_ranges"], *(_pod_ranges(doc) if name != own["name"] else ()))
            ],
        }

    def kubernetes(self) -> dict[str, Any] | None:
        if "kubernetes" not in self.own:
            return None
        (cluster_ips,) = _cluster_ips(self.own)
        found = {"pod_ranges4": _pod_ranges(self.own), "service_range4": cluster_ips}
        if "identity_labels" in self.own["kubernetes"]:
            found["identity_labels"] = self.own["kubernetes"]["identity_labels"]
        return found

    def peers(self) -> list[str]:
        """Those whose etcd is somewhere already."""
        return [name for name, doc in sorted(self.present.items()) if name != self.own["name"] and _peer_urls(doc)]

    def registrar(self, api: Mapping[str, str] | None, site: str) -> dict[str, Any]:
        """Of one that runs at a site."""
        peers = []
        for name in self.peers():
            doc = self.present[name]
            peers.append(
                {
                    "name": name,
                    "id": doc["id"],
                    "workload_ranges4": [*doc["workload_ranges"], *_pod_ranges(doc)],
                    "service_range4": doc["service_range"],
                    "endpoints": _peer_urls(doc, lambda entry: _dialled(self.model, entry, site)),
                    "ca": _trust(name),
                    "cert": f"{PKI}/peer-{name}.crt",
                    "key": f"{PKI}/peer-{name}.key",
                }
            )
        return {
            "cert": f"{PKI}/registrar.crt",
            "key": f"{PKI}/registrar.key",
            "peers": peers,
            **_filled(kubernetes=api),
        }


def _in_cluster(model: Model, present: Mapping[str, Any], cluster: Cluster, wanted: InCluster) -> dict[str, Any]:
    """What is installed into a cluster whose control plane is in it. `document` is its cluster document
    (docs/architecture.md), `trust` are the certificates of authorities by cluster, as far as there are some."""
    own = present[cluster.name]
    shared = _Shared(model, present, own)
    account = "/var/run/secrets/kubernetes.io/serviceaccount"
    document = {
        "kind": spec.CLUSTER_KIND,
        **shared.build(on_node=True),
        "etcd": _etcd_clients(own, [f"https://{own['exposed']['cluster_ip']}:{own['etcd']['client_port']}"])
        if "exposed" in own
        else None,
        "registrar": shared.registrar(
            {
                "server": own["kubernetes"]["api_server"],
                "ca": f"{account}/ca.crt",
                "token": f"{account}/token",
            },
            own["site"],
        ),
    }
    document["hash"] = spec.spec_hash(document)
    expose = wanted.expose
    return {
        "estate": model.name,
        "cluster": cluster.name,
        "entry": model.entries.get(cluster.name),
        "etcd": {
            "replicas": wanted.replicas,
            "storage_class": wanted.storage_class,
            "storage": wanted.storage,
            "quota_bytes": own["etcd"]["quota_bytes"],
            "token": own["etcd"]["token"],
        },
        "expose": {
            "type": expose.type,
            "provider": expose.provider,
            "scope": expose.scope,
            "source_ranges": [str(network) for network in expose.source_ranges],
            "annotations": dict(expose.annotations),
            "node_port": expose.node_port,
            "hosts": list(expose.hosts),
        },
        "document": document,
        "trust": {
            name: doc["ca_certificate"]
            for name, doc in sorted(present.items())
            if doc["ca_certificate"] is not None and (name == cluster.name or name in shared.peers())
        },
    }


def _etcd_clients(own: Mapping[str, Any], endpoints: list[str]) -> dict[str, Any]:
    """How agents reach their etcd."""
    return {
        "endpoints": endpoints,
        "ca": _trust(own["name"]),
        "cert": f"{PKI}/agent.crt",
        "key": f"{PKI}/agent.key",
    }


def _dialled(model: Model, entry: Mapping[str, Any], site: str) -> str:
    """Which address of a host those at a site dial who do not do it within its own: the one inside the mesh where only
    sessions of WireGuard lead from the one site to the other."""
    apart = entry["site"] != site and {entry["site"], site}.intersection(model.closed)
    return "mesh4" if apart else "advertise4"


def _peer_urls(
    document: Mapping[str, Any], dialled: Callable[[Mapping[str, Any]], str] = lambda _entry: "advertise4"
) -> list[str]:
    """Where other clusters dial its etcd; nowhere while one that is in its cluster was not exposed yet. `dialled` names
    the address of a member's entry."""
    if openings.is_in_cluster(document):
        return list(document.get("exposed", {"endpoints": ()})["endpoints"])
    port = document["etcd"]["client_port"]
    members = [document["hosts"][member] for member in document["etcd"]["members"]]
    return [f"https://{entry[dialled(entry)]}:{port}" for entry in members]


def _filled(**entries: Any) -> dict[str, Any]:
    """Those that say anything: a document without them stays as it was written before there were such."""
    return {name: value for name, value in entries.items() if value}


def _tunnel(number: int) -> dict[str, Any]:
    return {"key": f"{PKI}/{spec.WIREGUARD_KEYS[number]}", "port": spec.WIREGUARD_PORTS[number]}


def _pod_ranges(document: Mapping[str, Any]) -> list[str]:
    """Ranges of pods in the document of a cluster; none where it is no Kubernetes cluster."""
    return list(document.get("kubernetes", {"pod_ranges": ()})["pod_ranges"])


def _cluster_ips(document: Mapping[str, Any]) -> list[str]:
    """The range of Kubernetes' ClusterIPs in the document of a cluster, if it is a Kubernetes cluster."""
    return [document["kubernetes"]["service_range"]] if "kubernetes" in document else []


def _announced(hosts: Mapping[str, Any], members: Iterable[str]) -> dict[str, str]:
    """The one address at which each member is known to all members: within one site its underlay address."""
    carrying = {member: hosts[member] for member in members}
    key = "underlay4" if len({host["site"] for host in carrying.values()}) == 1 else "advertise4"
    return {member: host[key] for member, host in carrying.items()}


def _trust(cluster: str) -> str:
    return f"{PKI}/trust/{cluster}.crt"


def _lines(record: Record) -> dict[str, str]:
    """Each thing in the record, by its name, in words."""
    found: dict[str, str] = {}
    for name, doc in sorted(record.clusters.items()):
        for host, entry in sorted(doc.get("forgotten", {}).items()):
            found[f"forgotten host {host}"] = f"of cluster {name}, at {entry['at']} by {entry['by'] or 'somebody'}"
        if doc["state"] == "absent":
            continue
        if "crl" in doc:
            digest = sha256(doc["crl"].encode()).hexdigest()
            found[f"revoked certificates of cluster {name}"] = f"list with sha256 {digest[:12]}"
        etcd = doc["etcd"]
        source = etcd["source"]["type"]
        found[f"cluster {name}"] = (
            f"id {doc['id']}, site {doc['site']}, workloads {', '.join(doc['workload_ranges'])}, "
            f"services {doc['service_range']}, CA " + (f"on {doc['ca_host']}" if doc["ca_host"] else "in the cluster")
        )
        found[f"etcd of cluster {name}"] = (
            f"members {', '.join(etcd['members'])}, ports {etcd['client_port']} and {etcd['peer_port']}, "
            f"from {source}, quota {etcd['quota_bytes']} bytes"
        )
        if openings.is_in_cluster(doc):
            found[f"etcd of cluster {name}"] = (
                f"{etcd['replicas']} members in the cluster, for peers at "
                f"{', '.join(_peer_urls(doc)) or 'an address that is not known yet'}, quota {etcd['quota_bytes']} bytes"
            )
        if "kubernetes" in doc:
            outer = doc["kubernetes"]
            found[f"Kubernetes of cluster {name}"] = (
                f"API {outer['api_server']}, pods {', '.join(outer['pod_ranges'])}, ClusterIPs {outer['service_range']}"
            )
        for host, entry in sorted(doc["hosts"].items()):
            labels = "".join(f", {key}={value}" for key, value in sorted(entry["labels"].items()))
            node = f", Kubernetes node {entry['kubernetes_node']}" if "kubernetes_node" in entry else ""
            advertise = "" if entry["advertise4"] == entry["underlay4"] else f", dialled at {entry['advertise4']}"
            known = "".join(f", {key} on UDP {port}" for port, key in sorted(entry.get("public_keys", {}).items()))
            found[f"host {host}"] = (
                f"cluster {name}, site {entry['site']}, underlay {entry['underlay4']}{advertise}, "
                f"range {entry['range4']}, mesh address {entry['mesh4']}{node}{labels}{known}"
            )
            for key, workload in sorted(entry["workloads"].items()):
                kind, target = next(iter(workload["cgroup"].items()))
                labels = "".join(f", {label}={value}" for label, value in sorted(workload["labels"].items()))
                found[f"workload {key} on {host}"] = (
                    f"{workload['address4']}, {kind} {target}, service account {workload['service_account']}{labels}"
                )
    if record.roster is not None:
        roster = record.roster
        found["estate"] = (
            f"{roster['estate']}, domain {roster.get('domain')}, overlay port {roster.get('overlay_port')}, "
            f"applied by isthmus.mesh {roster.get('version', 'of an unknown version')}"
        )
        for key, entry in sorted(roster["services"].items()):
            if entry["state"] != "absent":
                found[f"service {key}"] = "in " + ", ".join(entry["clusters"])
        sites = sites_of({name: doc for name, doc in record.clusters.items() if "hosts" in doc})
        for key, words in zip(encryption.STAGED, (encryption.WORDS, routing.WORDS, ipsec.WORDS)):
            for (one, other), stage in encryption.from_document(roster.get(key), sites).items():
                if stage is not Stage.PLAIN:
                    found[f"{key} {_where(one, other)}"] = words[stage]
        for name, (host, far) in roster.get("auto", {}).items():
            found[f"native routing {_where(*name.split(' '))}"] = f"not chosen, {host} did not reach {far} so"
        keys = encryption.keys_of(roster.get("encryption"))
        if keys != Keys():
            found["keys of WireGuard"] = encryption.key_words(keys)
        found.update(vpc.recorded(roster.get("vpcs")))
        found.update({f"site {site}": "its hosts open all sessions themselves" for site in roster.get("closed", ())})
        found.update({f"BGP of site {site}": "hosts announce their ranges" for site in roster.get("bgp", ())})
    return found


def _where(one: str, other: str) -> str:
    return f"within site {one}" if one == other else f"between sites {one} and {other}"


def _summary(record: Record) -> str:
    return "".join(f"{name}: {words}\n" for name, words in sorted(_lines(record).items()))


def _changes(before: Record, after: Record) -> Iterator[str]:
    old, new = _lines(before), _lines(after)
    for name in sorted(set(old) | set(new)):
        if name not in old:
            yield f"{name}: new, {new[name]}"
        elif name not in new:
            yield f"{name}: removed (was {old[name]})"
        elif old[name] != new[name]:
            yield f"{name}: {new[name]} (was {old[name]})"
            members = after.clusters.get(name.rpartition(" ")[2], {}).get("etcd", {}).get("members", ())
            if name.startswith("etcd of") and len(members) == 1:
                yield f"{name}: its only member restarts, so that nothing can be written to it for some seconds"
