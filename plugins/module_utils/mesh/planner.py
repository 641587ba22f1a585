# SPDX-License-Identifier: BSD-2-Clause
"""The planner: (model, record) -> specs, next record, service definitions, words.

A pure function: the same input gives the same output, whatever the order of the inventory. It
extends what the record says was dealt and never deals again or moves: what the inventory no longer
names is an orphan, stays in the record, and other hosts' specs still know it. Things go by
`state: absent`, or by being named in `prune`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from . import auto, encryption, immutable, jsontext, matrix, openings, orphans, vpc
from .bgp import Planned as Speaking
from .bgp import planned as plan_bgp
from .changes import changes, summary
from .cluster_document import ClusterDocuments
from .cluster_spec import in_cluster
from .encryption import Keys, Pair, Stage
from .forgetting import NOBODY, Forget, Forgetting
from .host_spec import HostSpec
from .jsontext import filled
from .model import Model, ModelError
from .pruning import Pruning
from .record import CLUSTERS, LARGEST_DOCUMENT, ROSTER, SCHEMA, Record, forgotten_hosts, format_time, pod_ranges
from .removals import cuts
from .revisions import Revisions
from .schema import Problem
from .stages import Stages, State, Ways, begun, changed, hosts_of, sites_of, state_of


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
    in words. `keyed` are hosts whose public keys of WireGuard others need before any etcd tells them, `routed`
    Kubernetes nodes of which the network has to know the ranges of pods."""

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
    routed: tuple[str, ...] = ()


def plan(
    model: Model,
    record: Record,
    now: datetime,
    version: str,
    by: str = "",
    prune: Iterable[str] = (),
    forget: Forget = NOBODY,
    rotate: bool = False,
    exposed: Mapping[str, Mapping[str, Any]] | None = None,
    try_native: bool = False,
    proofs: auto.Proofs = (),
    keys: Mapping[str, Mapping[str, str]] | None = None,
    pods: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """Plan the whole estate.

    `now` (aware) is only used for quarantines and time stamps, `version` is that of the collection,
    `by` is who runs it. Hosts that were forgotten are planned as if the inventory did not have them. `rotate`: every
    host gets another key of WireGuard. `exposed`: of clusters whose control plane is in them, where their etcd was
    found to be reachable now (`record`). `try_native`: pairs with `routing: auto` that came back to the tunnel are
    tried again. `proofs` are those of the run so far: a run plans again after each, from all that its first plan was
    made from and with its `now`, so that what it has done is planned as it was. `keys` are public keys of WireGuard by
    host and UDP port, as they were found on hosts now (`Plan.keyed`, `record`). `pods` are the ranges that Kubernetes
    deals pods' addresses from on hosts that are its nodes, as it says now (`Plan.routed`, `record`); None: it was not
    asked, else of those that neither it nor the record knows is a warning.
    Raises ModelError with all problems when model and record do not go together or space has run out.
    """
    return _Planner(
        model,
        record,
        now,
        version,
        by,
        prune,
        forget,
        rotate,
        exposed or {},
        try_native,
        proofs,
        keys or {},
        pods,
    ).run()


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
        pods: Mapping[str, Sequence[str]] | None,
    ) -> None:
        self.record = record
        self.keys = keys
        self.pods = pods
        self.exposed = exposed
        self.try_native = try_native
        self.proofs = proofs
        self.now = now
        self.version = version
        self.by = by
        self.rotate = rotate
        self.digest = model.digest()
        self.revisions = Revisions(now, by, self.digest, record.conflicts)
        self.known = {name: doc for name, doc in record.clusters.items() if doc["state"] != "absent"}
        self.forgetting = Forgetting(forget, model, record, self.known, now, by)
        self.forgotten = self.forgetting.forgotten
        self.model = self.forgetting.model
        pruning = Pruning(prune, self.model, record, self.known)
        self.prune = pruning.names | self.forgetting.lost
        self.model = replace(self.model, closed=orphans.closed(self.model, record.roster or {}, self.known, self.prune))
        self.problems = [*self.forgetting.problems, *pruning.problems]
        self.warnings = [*model.warnings, *record.warnings, *pruning.warnings]
        self.removed: list[str] = []
        self.orphans: list[str] = []

    def problem(self, where: str, what: str, why: str, following: str) -> None:
        self.problems.append(Problem(where, what, why, following))

    def run(self) -> Plan:
        if self.record.roster is not None:
            self.problems += immutable.of_estate(self.model, self.record.roster)
        self.problems += orphans.check(self.model, self.record, self.known, self.prune)
        documents = self.documents()
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
        routed = tuple(self.routed(present, set(matrix.in_clear(stages, native_stages))))
        vpcs = self.vpcs(present, staged.running, [*staged.possible, *staged.states])
        speaking = self.speaking(present)
        roster = self.roster(documents, present, staged.states[0], vpcs, speaking)
        self.check_sizes(documents, roster)
        if self.problems:
            raise ModelError(self.problems)
        following = Record(roster, documents)
        forgotten = forgotten_hosts(documents.values())
        specs = self.specs(present, roster)
        revocations = tuple(self.forgetting.revocations(documents, forgotten))
        doomed = {one["cluster"]: {"hosts": one["hosts"], "names": one["names"]} for one in revocations}
        before, after = summary(self.record), summary(following)
        return Plan(
            specs=specs,
            record=following.to_documents(),
            services=self.services(roster, present),
            changes=tuple(changes(self.record, following)),
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
                    **in_cluster(self.model, present, cluster, cluster.in_cluster),
                    **filled(revoked=doomed.get(name)),
                }
                for name, cluster in self.model.clusters.items()
                if cluster.in_cluster is not None and name in present
            },
            warnings=tuple(sorted({*self.warnings, *self.forgetting.warnings})),
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
            routed=routed,
        )

    def documents(self) -> dict[str, dict[str, Any]]:
        """Those of all clusters, also of removed ones."""
        planned = ClusterDocuments(
            self.model,
            self.record,
            self.known,
            self.prune,
            self.forgetting,
            self.revisions,
            self.now,
            self.exposed,
            self.keys,
            self.pods or {},
        )
        documents = {}
        for name in sorted(set(self.model.clusters) | set(self.record.clusters)):
            document = planned.of(name)
            if document is not None:
                documents[name] = document
        self.problems += planned.problems
        self.warnings += planned.warnings
        self.orphans += planned.orphans
        self.removed += planned.removed
        departed = self.forgetting.departed(documents)
        for name, document in documents.items():
            old = self.record.clusters.get(name)
            entries = {**document, **filled(departed=departed.get(name))}
            if entries != document:
                document = self.revisions.stamped(entries, old)
            documents[name] = self.revisions.settled(document, CLUSTERS + name, old)
        return documents

    # Kubernetes nodes that are native in clear

    def routed(self, present: Mapping[str, Mapping[str, Any]], sites: Collection[str]) -> Iterator[str]:
        for cluster, document in sorted(present.items()):
            nodes = {
                host: entry
                for host, entry in sorted(document["hosts"].items())
                if "kubernetes_node" in entry and entry["site"] in sites
            }
            yield from nodes
            unknown = [host for host, entry in nodes.items() if "pod_cidrs" not in entry]
            if unknown and self.pods is not None:
                self.warnings.append(
                    f"which of {', '.join(pod_ranges(document))} are pods' ranges on {', '.join(unknown)} (cluster "
                    f"{cluster}) is not known, so that neither routers nor BGP nor a VPC get routes to pods there. "
                    "Next: if Kubernetes could not be asked (Pending says why), run again when it answers; if its "
                    "nodes have no podCIDRs, as the CNI has pools of its own, have the CNI tell the network, unless "
                    "all hosts are on one subnet"
                )

    # Sites to which nobody outside opens anything

    def keyed(self, present: Mapping[str, Mapping[str, Any]], specs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
        """Hosts at such sites, and the etcd hosts of all others, that encrypt or begin to."""
        for document in present.values() if self.model.closed else ():
            for name, entry in document["hosts"].items():
                wanted = entry["site"] in self.model.closed or name in document["etcd"]["members"]
                if wanted and "wireguard" in specs.get(name, {}):
                    yield name

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
                self.revisions.stamped({**document, "hosts": {**document["hosts"], **hosts}}, document)
                if changed
                else document
            )
        return found

    # BGP

    def speaking(self, present: Mapping[str, Mapping[str, Any]]) -> Speaking:
        old = (self.record.roster or {}).get("bgp", ())
        taken = [text for doc in present.values() for text in (*doc["workload_ranges"], *pod_ranges(doc))]
        found = plan_bgp(self.model.bgp, self.model.hosts, present, taken, old, self.prune)
        self.orphans += found.orphans
        self.removed += found.removed
        return found

    def with_bfd(self, speaking: Speaking) -> list[str]:
        """Sites some of whose routers have it; of those that are kept as the record has it."""
        kept = {site for site in (self.record.roster or {}).get("bfd", ()) if f"bgp/{site}" in speaking.orphans}
        return sorted(kept | {router["site"] for router in speaking.routers if router["bfd"]})

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
        return vpc.State(documents, lambda host: HostSpec(self.model, documents, host, homes[host], state).build())

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
            proving = replaced if last.keys.has_both else set()
            up = {pair for now, before in zip(changing, last.staged) for pair in now if now[pair] > before[pair]}
            yield Step(
                specs=self.specs(present, roster),
                record=record.to_documents(),
                stages=changing[0],
                native=changing[1],
                ipsec=changing[2],
                waits=tuple(hosts_of(present, replaced.union(*changing))),
                proven=tuple(hosts_of(present, proving | up)),
            )

    def specs(self, present: Mapping[str, Mapping[str, Any]], roster: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        sites = {*sites_of(present), *self.model.sites}
        state = state_of(roster, sites)
        return {
            host.name: HostSpec(self.model, present, host.name, present[host.cluster], state).build()
            for host in self.model.hosts.values()
            if not host.absent
        }

    # What goes

    # What is fixed

    # One cluster

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

    def roster(
        self,
        documents: Mapping[str, Mapping[str, Any]],
        present: Mapping[str, Mapping[str, Any]],
        state: State,
        vpcs: vpc.Planned,
        speaking: Speaking,
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
            **filled(
                empty=sorted({*self.model.sites} - sites_of(present)),
                vpcs=vpcs.document,
                bgp=list(speaking.sites),
                bfd=self.with_bfd(speaking),
                closed=list(self.model.closed),
                masquerade=list(self.model.masquerade),
                gateways=self.model.ipsec.recorded(),
            ),
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
