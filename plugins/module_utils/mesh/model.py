# SPDX-License-Identifier: BSD-2-Clause
"""The estate model: what the inventory says, typed and checked as a whole.

`read_model` takes plain variables and either returns a `Model` or raises `ModelError` with every
problem that there is. Nothing here knows the record: what was dealt is `record.py`, and `planner.py`
brings both together.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

from . import jsontext, schema, versions
from .addressing import (
    BESIDE,
    CLUSTER_IPS,
    HOST,
    PODS,
    RESERVED,
    SERVICES,
    VPN,
    WORKLOADS,
    Claim,
    astray,
    may_share,
    overlaps,
    shared,
)
from .bgp import BFD_PORT
from .bgp import Settings as Bgp
from .bgp import check as check_bgp
from .bgp import settings as read_bgp
from .documents import HealthCheck, ServiceDefinition, ServicePort
from .encryption import Pair
from .encryption import pair as sorted_pair
from .encryption import pairs as pairs_of
from .ipsec import GATEWAY, Ipsec
from .ipsec import claims as claims_of_ipsec
from .ipsec import read as read_ipsec
from .routing import AUTO, NATIVE, Routing
from .schema import INVALID, Problem, not_yet, suggestion
from .spec import IPSEC_PORTS, WIREGUARD_PORTS
from .vpc import Vpcs
from .vpc import claims as claims_of_vpcs
from .vpc import read as read_vpcs


@dataclass(frozen=True)
class Conflict:
    """Of the overlap that `problem` tells of, the two sides: `outer` holds `inner`."""

    problem: Problem
    outer: Claim
    inner: Claim


class ModelError(ValueError):
    """The inventory cannot be used. `problems` are all of them, `str()` is one message with a line each.

    `conflicts` are those of the problems that are overlaps. `draft` is what could be read, without what is wrong in
    itself and with the overlaps, to be looked at only; None when not even that much could be read."""

    def __init__(
        self, problems: Iterable[Problem], conflicts: Iterable[Conflict] = (), draft: Model | None = None
    ) -> None:
        self.problems = tuple(sorted(set(problems)))
        self.conflicts = tuple(conflicts)
        self.draft = draft
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = "\n".join(f"- {problem}" for problem in self.problems)
        super().__init__(f"The mesh cannot be planned: {head}. Nothing was changed on any host.\n{lines}")


@dataclass(frozen=True)
class Etcd:
    """`hosts` in the inventory's order: the first is the default place of the CA and the first member."""

    hosts: tuple[str, ...]
    client_port: int
    peer_port: int
    source: Mapping[str, str]
    quota_bytes: int


@dataclass(frozen=True)
class Kubernetes:
    """`service_range` is that of ClusterIPs. Kubernetes and its CNI deal both kinds of ranges."""

    api_server: str
    pod_ranges: tuple[IPv4Network, ...]
    service_range: IPv4Network
    identity_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expose:
    """How peers reach an etcd that runs in Kubernetes; see `schema.EXPOSE`."""

    type: str
    provider: str
    scope: str
    source_ranges: tuple[IPv4Network, ...]
    annotations: Mapping[str, str]
    node_port: int | None
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class InCluster:
    """A control plane of pods. `replicas` are etcd's; `storage_class` None: the cluster's default."""

    replicas: int
    storage_class: str | None
    storage: str
    expose: Expose


@dataclass(frozen=True)
class Cluster:
    """`in_cluster` is None where etcd and registrar run on hosts."""

    name: str
    id: int
    site: str
    workload_ranges: tuple[IPv4Network, ...]
    service_range: IPv4Network
    node_prefix: int
    etcd: Etcd
    ca_host: str | None
    kubernetes: Kubernetes | None = None
    in_cluster: InCluster | None = None
    absent: bool = False

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Every address of the mesh that is this cluster's lies in one of them."""
        where = f"isthmus_estate.clusters.{self.name}"
        own = [Claim(network, f"{where}.workload_ranges", WORKLOADS, self.name) for network in self.workload_ranges]
        own.append(Claim(self.service_range, f"{where}.service_range", SERVICES, self.name))
        if self.kubernetes is not None:
            where = f"{where}.kubernetes"
            site = (self.site,)
            own += [Claim(one, f"{where}.pod_ranges", PODS, self.name, site) for one in self.kubernetes.pod_ranges]
            own.append(Claim(self.kubernetes.service_range, f"{where}.service_range", CLUSTER_IPS, self.name, site))
        return tuple(own)

    @property
    def ranges(self) -> tuple[IPv4Network, ...]:
        """Those of `claims`."""
        return tuple(claim.network for claim in self.claims)


@dataclass(frozen=True)
class Workload:
    """`cgroup` is one of {"unit"}, {"slice"}, {"path"}; `address` is a pinned one."""

    name: str
    namespace: str
    service_account: str
    labels: Mapping[str, str]
    cgroup: Mapping[str, str]
    address: IPv4Address | None = None
    absent: bool = False

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


def processes(cgroup: Mapping[str, str]) -> tuple[str, str]:
    """Whom a workload's `cgroup` means; equal for a path with and without '/' in front."""
    ((kind, value),) = cgroup.items()
    return kind, value.lstrip("/")


@dataclass(frozen=True)
class Host:
    name: str
    cluster: str
    site: str
    underlay: IPv4Address
    advertise: IPv4Address
    node_range: IPv4Network | None
    labels: Mapping[str, str]
    workloads: tuple[Workload, ...]
    kubernetes_node: str | None = None
    absent: bool = False
    bgp: Bgp | None = None

    @property
    def addresses(self) -> dict[IPv4Address, str]:
        """The host's addresses outside the mesh, and the variable that each comes from."""
        return {self.advertise: "isthmus_advertise", self.underlay: "isthmus_underlay"}

    @property
    def claims(self) -> tuple[Claim, ...]:
        return tuple(
            Claim(IPv4Network(address), f"host {self.name}.{variable}", HOST, self.name, (self.site,))
            for address, variable in self.addresses.items()
        )


@dataclass(frozen=True)
class Service:
    """A definition and the clusters in which it exists."""

    definition: ServiceDefinition
    clusters: tuple[str, ...]
    absent: bool = False

    @property
    def key(self) -> str:
        return f"{self.definition.namespace}/{self.definition.name}"


@dataclass(frozen=True)
class Encryption:
    """`none`, `wireguard` or `ipsec-gateway`: of the estate, of those `sites` that say something of their own, and of
    `pairs`."""

    default: str = "none"
    pairs: Mapping[Pair, str] = field(default_factory=dict)
    sites: Mapping[str, str] = field(default_factory=dict)

    def of_site(self, site: str) -> str:
        return self.sites.get(site, self.default)

    def of(self, pair: Pair) -> str | None:
        """None where the two sides say different things."""
        if pair in self.pairs:
            return self.pairs[pair]
        one, other = self.of_site(pair[0]), self.of_site(pair[1])
        if pair[0] == pair[1]:
            # The hosts of a site reach each other without its gateway.
            return "none" if one == GATEWAY else one
        return one if one == other else None

    def wants_wireguard(self, pair: Pair) -> bool:
        """Where the sides differ, as those may of which one has orphans only, it does if either says so."""
        found = self.of(pair)
        return found == "wireguard" if found is not None else "wireguard" in map(self.of_site, pair)


@dataclass(frozen=True)
class Model:
    """Everything is sorted by name: the order of the inventory does not show.

    `masquerade`: sites whose hosts give packets of workloads that leave the mesh their own address. `closed`: sites
    with `inbound: false`, to which nobody outside opens anything. `entries`: inventory hosts that stand for a cluster
    whose control plane is in it, by cluster: no part of the mesh. `networks`: what sites say of their own, behind their
    gateways and in their VPCs.
    """

    name: str
    domain: str
    max_clusters: int
    overlay_port: int
    overlay_mtu: int | None
    sites: tuple[str, ...]
    clusters: Mapping[str, Cluster]
    hosts: Mapping[str, Host]
    services: Mapping[str, Service]
    reserved: tuple[Claim, ...] = ()
    networks: tuple[Claim, ...] = ()
    encryption: Encryption = Encryption()
    vpcs: Vpcs = field(default_factory=Vpcs)
    routing: Routing = field(default_factory=Routing)
    ipsec: Ipsec = field(default_factory=Ipsec)
    bgp: Mapping[str, Bgp] = field(default_factory=dict)
    masquerade: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    entries: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def digest(self) -> str:
        """sha256 in hex of all that the model says; warnings and the ways to APIs do not count."""
        # What networks there are, `ipsec` and `vpcs` say.
        content = {key: value for key, value in asdict(self).items() if key not in ("warnings", "entries", "networks")}
        # An estate without Kubernetes has the digest that it had before there was such a thing.
        for part, key in (
            ("clusters", "kubernetes"),
            ("clusters", "in_cluster"),
            ("hosts", "kubernetes_node"),
            ("hosts", "bgp"),
        ):
            for entry in content[part].values():
                if entry[key] is None:
                    del entry[key]
        for claim in content["reserved"]:
            del claim["sites"]  # follows from the hosts
        if not content["reserved"]:
            del content["reserved"]
        for entry in content["services"].values():
            if not entry["definition"]["kubernetes"]:
                del entry["definition"]["kubernetes"]
        if self.encryption == Encryption():
            del content["encryption"]
        elif not self.encryption.sites:
            del content["encryption"]["sites"]
        for entry in content["vpcs"]["sites"].values():
            if not entry["ranges"]:
                del entry["ranges"]
        if self.vpcs == Vpcs():
            del content["vpcs"]
        if self.routing == Routing():
            del content["routing"]
        if self.ipsec == Ipsec():
            del content["ipsec"]
        if not self.bgp:
            del content["bgp"]
        if not self.masquerade:
            del content["masquerade"]
        if not self.closed:
            del content["closed"]
        return sha256(jsontext.canonical(_plain(content)).encode("ascii")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (IPv4Address, IPv4Network)):
        return str(value)
    return value


def read_model(estate: Any, hosts: Mapping[str, Mapping[str, Any]]) -> Model:
    """Read and check an inventory.

    `estate` is `isthmus_estate`; `hosts` maps each inventory host to its variables, of which only
    the names are looked at, and the values of `schema.HOST_VARIABLES`. Hosts without
    `isthmus_cluster` are not part of the mesh.
    Raises ModelError with all problems found.
    """
    return _Reader().read(estate, hosts)


def _closed(sites: Any) -> tuple[str, ...]:
    """Of the `sites` as they were read."""
    return tuple(sorted(site for site, entry in (sites or {}).items() if entry["inbound"] is False))


def _listed(names: list[str]) -> str:
    """The first five of some names."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def read_service(given: Any, where: str) -> ServiceDefinition:
    """Read one service outside an inventory by the inventory's rules; whether its workloads exist is not looked at.

    `where` names it in problems. Raises ModelError with all problems found.
    """
    reader = _Reader()
    entry = schema.SERVICE.read(given, where, reader.problems)
    service = None if entry is INVALID else reader.service(where, entry, {"clusters": {}}, {}, None)
    if service is None or reader.problems:
        raise ModelError(reader.problems)
    return service.definition


class _Reader:
    """One pass over an inventory; `problems` grows, and what is invalid is left out of later checks."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.conflicts: list[Conflict] = []
        self.warnings: list[str] = []
        self.broken_hosts: set[str] = set()  # in the mesh, but not readable: no use to complain twice
        self.entries: dict[str, str] = {}

    def problem(self, where: str, what: str, why: str, following: str) -> None:
        self.problems.append(Problem(where, what, why, following))

    def conflict(self, problem: Problem, outer: Claim, inner: Claim) -> None:
        self.problems.append(problem)
        self.conflicts.append(Conflict(problem, outer, inner))

    def read(self, estate: Any, hosts: Mapping[str, Mapping[str, Any]]) -> Model:
        if estate is None:
            self.problem(
                "isthmus_estate",
                "it is not defined for any host",
                "it is the mesh",
                "put it into group_vars/all, or pass the inventory that has it with -i",
            )
            raise ModelError(self.problems)
        version = estate.get("schema") if isinstance(estate, dict) else None
        if isinstance(version, int) and version > schema.VERSION:
            self.problem(
                "isthmus_estate.schema",
                f"{version} is newer than {schema.VERSION}, the newest that this collection reads",
                "a newer key could be misread",
                versions.LATEST,
            )
            raise ModelError(self.problems)
        top = schema.ESTATE.read(estate, "isthmus_estate", self.problems)
        if top is INVALID:
            raise ModelError(self.problems)
        clusters = self.clusters(top)
        read_hosts = self.hosts(top, clusters, hosts)
        self.cluster_hosts(clusters, read_hosts, hosts)
        encryption, routing, speaking = self.sites(top, clusters, read_hosts)
        known = {*read_hosts, *self.broken_hosts}
        self.closed(top, clusters, read_hosts, encryption)
        self.overlay_port(top, encryption, speaking)
        ipsec = read_ipsec(top, clusters, read_hosts, encryption.of, self.problem, known)
        vpcs = read_vpcs(top, self.problem)
        reserved = self.reserved(top["reserved_ranges"], read_hosts)
        networks = tuple(sorted({*claims_of_ipsec(top), *claims_of_vpcs(top)}))
        self.ranges(clusters, read_hosts, reserved, networks)
        services = self.services(top, clusters, read_hosts)
        if self.problems:
            readable = {key: schema.ESTATE.keys[key].default if top[key] is INVALID else top[key] for key in top}
            named = {**readable, "name": str(top["name"])}
            draft = self.model(
                named, clusters, read_hosts, reserved, networks, services, encryption, routing, vpcs, ipsec, speaking
            )
            raise ModelError(self.problems, self.conflicts, draft)
        return self.model(
            top, clusters, read_hosts, reserved, networks, services, encryption, routing, vpcs, ipsec, speaking
        )

    def model(
        self,
        top: dict[str, Any],
        clusters: Mapping[str, Cluster],
        hosts: Mapping[str, Host],
        reserved: tuple[Claim, ...],
        networks: tuple[Claim, ...],
        services: Mapping[str, Service],
        encryption: Encryption,
        routing: Routing,
        vpcs: Vpcs,
        ipsec: Ipsec,
        speaking: Mapping[str, Bgp],
    ) -> Model:
        overlay = top["overlay"] or {"port": 8472, "mtu": None}
        sites = {cluster.site for cluster in clusters.values()} | {host.site for host in hosts.values()}
        return Model(
            name=top["name"],
            domain=top["domain"],
            max_clusters=top["max_clusters"],
            overlay_port=overlay["port"],
            overlay_mtu=overlay["mtu"],
            sites=tuple(sorted(sites | set(top["sites"] or ()))),
            clusters={name: clusters[name] for name in sorted(clusters)},
            hosts={name: hosts[name] for name in sorted(hosts)},
            services={name: services[name] for name in sorted(services)},
            reserved=reserved,
            networks=networks,
            encryption=encryption,
            vpcs=vpcs,
            routing=routing,
            ipsec=ipsec,
            bgp=speaking,
            masquerade=tuple(sorted(site for site, entry in (top["sites"] or {}).items() if entry["masquerade"])),
            closed=_closed(top["sites"]),
            entries={name: self.entries[name] for name in sorted(self.entries)},
            warnings=tuple(sorted(self.warnings)),
        )

    def clusters(self, top: dict[str, Any]) -> dict[str, Cluster]:
        """Clusters that could be read; one with a bad part is left out, its problems are noted."""
        found: dict[str, Cluster] = {}
        if top["clusters"] is INVALID:
            return found
        if not top["clusters"]:
            self.problem("isthmus_estate.clusters", "there is no cluster", "a mesh joins clusters", "add at least one")
        ids: dict[int, str] = {}
        highest = top["max_clusters"]
        for name in sorted(top["clusters"]):
            where = f"isthmus_estate.clusters.{name}"
            entry = top["clusters"][name]
            number = entry["id"]
            if number is not INVALID and highest is not INVALID and number > highest:
                self.problem(
                    f"{where}.id",
                    f"{number} is out of range 1..{highest}",
                    "identities carry the cluster's id in 8 bits",
                    "choose another id, or set max_clusters: 511 before the first run of every member",
                )
            elif number is not INVALID and number in ids:
                self.problem(
                    f"{where}.id",
                    f"{number} is also the id of cluster {ids[number]}",
                    "identities of the two could not be told apart",
                    "give each cluster an id of its own",
                )
            elif number is not INVALID:
                ids[number] = name
            self.cluster_peers(where, name, entry, top["clusters"])
            etcd = self.etcd(where, entry)
            kubernetes = self.kubernetes(where, entry["kubernetes"], entry["control_plane"])
            in_cluster = self.in_cluster(where, entry)
            needed = (number, entry["workload_ranges"], entry["service_range"], entry["node_prefix"], entry["site"])
            if etcd is None or any(
                value is INVALID
                for value in (*needed, entry["ca_host"], entry["state"], entry["control_plane"], kubernetes, in_cluster)
            ):
                continue
            prefix = entry["node_prefix"]
            for network in entry["workload_ranges"]:
                if network.prefixlen > prefix:
                    self.problem(
                        f"{where}.workload_ranges",
                        f"{network} is smaller than a node range (/{prefix})",
                        "not even one host fits",
                        "use a larger range",
                    )
            found[name] = Cluster(
                name=name,
                id=number,
                site=entry["site"] or name,
                workload_ranges=tuple(entry["workload_ranges"]),
                service_range=entry["service_range"],
                node_prefix=prefix,
                etcd=etcd,
                ca_host=entry["ca_host"],
                kubernetes=kubernetes,
                in_cluster=in_cluster,
                absent=entry["state"] == "absent",
            )
        return found

    def in_cluster(self, where: str, entry: dict[str, Any]) -> Any:
        """InCluster, None, or INVALID after adding a problem."""
        given, etcd, before = entry["expose"], entry["etcd"], len(self.problems)
        own = ("replicas", "storage_class", "storage")
        if entry["control_plane"] == "hosts":
            stray = [f"etcd.{key}" for key in own if etcd not in (None, INVALID) and etcd[key] is not None]
            for key in [*stray, *(["expose"] if given is not None else [])]:
                self.problem(
                    f"{where}.{key}",
                    "it goes with control_plane: in_cluster only",
                    "it is about an etcd in pods",
                    "remove it, or set control_plane: in_cluster",
                )
            return INVALID if len(self.problems) > before else None
        if INVALID in (entry["control_plane"], given, etcd):
            return INVALID
        etcd = etcd or {key: schema.ETCD.keys[key].default for key in schema.ETCD.keys}
        if entry["kubernetes"] is None:
            self.problem(
                f"{where}.kubernetes",
                "it is missing",
                "with control_plane: in_cluster the cluster is the Kubernetes cluster that carries it",
                "add kubernetes: {pod_ranges: [...], service_range: ...}, or set control_plane: hosts",
            )
        on_hosts = ("source", "client_port", "peer_port")
        strange = [f"etcd.{key}" for key in on_hosts if etcd[key] != schema.ETCD.keys[key].default]
        for key in [*strange, *(["ca_host"] if entry["ca_host"] is not None else [])]:
            self.problem(
                f"{where}.{key}",
                "it goes with control_plane: hosts only",
                "etcd and the certificate authority are pods and Secrets of the cluster",
                "remove it, or set control_plane: hosts",
            )
        if INVALID not in (etcd["hosts"], entry["state"]) and len(etcd["hosts"]) != 1 and entry["state"] != "absent":
            self.problem(
                f"{where}.etcd.hosts",
                f"it names {len(etcd['hosts'])} hosts",
                "with control_plane: in_cluster one host of the inventory stands for the pods of etcd",
                "name the one host of the inventory that has isthmus_cluster: " + where.rpartition(".")[2],
            )
        expose = self.expose(f"{where}.expose", given or {k: key.default for k, key in schema.EXPOSE.keys.items()})
        if len(self.problems) > before or any(etcd[key] is INVALID for key in own):
            return INVALID
        return InCluster(etcd["replicas"] or 3, etcd["storage_class"], etcd["storage"] or "8Gi", expose)

    def expose(self, where: str, given: dict[str, Any]) -> Any:
        if any(value is INVALID for value in given.values()):
            return INVALID
        kind = given["type"]
        balanced = ("source_ranges", "annotations") if kind != "load_balancer" else ()
        alone = () if kind == "node_port" else ("node_port",)
        for key in (*balanced, *alone, *(("hosts",) if kind == "load_balancer" else ())):
            if given[key]:
                self.problem(f"{where}.{key}", f"it does not go with type: {kind}", "it would be ignored", "remove it")
        if given["scope"] == "external":
            if kind == "load_balancer" and not given["source_ranges"]:
                self.problem(
                    f"{where}.source_ranges",
                    "it is missing",
                    "with scope: external everybody could dial the etcd",
                    "list the ranges that peers dial from, or set scope: internal",
                )
            self.warnings.append(f"{where}.scope: the etcd gets a public address; one of `internal` does not")
        return Expose(
            type=kind,
            provider=given["provider"],
            scope=given["scope"],
            source_ranges=tuple(given["source_ranges"]),
            annotations=given["annotations"],
            node_port=given["node_port"],
            hosts=tuple(given["hosts"]),
        )

    def kubernetes(self, where: str, given: Any, control_plane: Any) -> Any:
        """Kubernetes, None, or INVALID after adding a problem."""
        if given is None or given is INVALID or any(value is INVALID for value in given.values()):
            return INVALID if given is not None else None
        if given["api_server"] is None and control_plane == "hosts":
            self.problem(
                f"{where}.kubernetes.api_server",
                "it is missing",
                "the registrar on the etcd hosts watches Kubernetes there",
                "add the URL of the API server as these hosts reach it",
            )
            return INVALID
        url = (given["api_server"] or schema.IN_CLUSTER_API).rstrip("/")
        try:
            urlsplit(url).port  # noqa: B018
        except ValueError as exc:
            self.problem(f"{where}.kubernetes.api_server", f"{url}: {exc}", "it is dialled", "correct the URL")
            return INVALID
        return Kubernetes(url, tuple(given["pod_ranges"]), given["service_range"], tuple(given["identity_labels"]))

    def cluster_peers(self, where: str, name: str, entry: dict[str, Any], all_clusters: Mapping[str, Any]) -> None:
        peers = entry["peers"]
        if peers is INVALID or peers == "all":
            return
        for peer in peers:
            if peer not in all_clusters:
                self.problem(
                    f"{where}.peers",
                    f"{peer!r} is not a cluster of this estate",
                    "only clusters of one estate can peer",
                    suggestion(peer, set(all_clusters) - {name}),
                )
        missing = sorted(set(all_clusters) - set(peers) - {name})
        if missing:
            self.problems.append(
                not_yet(
                    f"{where}.peers",
                    f"a part of the clusters (without {', '.join(missing)})",
                    "every cluster exchanges state with every other so far",
                    "all",
                )
            )

    def etcd(self, where: str, entry: dict[str, Any]) -> Etcd | None:
        given = entry["etcd"]
        if given is INVALID:
            return None
        if given is not None and any(value is INVALID for value in given.values()):
            return None
        where_hosts = f"{where}.etcd.hosts"
        if given is None or not given["hosts"]:
            if entry["control_plane"] == "hosts" and entry["state"] != "absent":
                self.problem(
                    where_hosts,
                    "there is no etcd host",
                    "with control_plane: hosts the cluster's state lives in etcd on its own hosts",
                    "name 1, 3 or 5 hosts of this cluster",
                )
            ports = given or {key: schema.ETCD.keys[key].default for key in ("client_port", "peer_port", "quota_bytes")}
            return Etcd((), ports["client_port"], ports["peer_port"], {"type": "package"}, ports["quota_bytes"])
        hosts = tuple(given["hosts"])
        for host in sorted({host for host in hosts if hosts.count(host) > 1}):
            self.problem(where_hosts, f"{host} is there twice", "a host carries one member", "remove one of them")
        if len(hosts) > 7:
            self.problem(
                where_hosts,
                f"{len(hosts)} members are more than 7",
                "every write waits for a majority, so that more members only make it slower",
                "keep 3, 5 or 7",
            )
        elif len(hosts) % 2 == 0:
            self.warnings.append(
                f"{where_hosts}: {len(hosts)} members tolerate no more failures than {len(hosts) - 1}; "
                "use an odd number"
            )
        if given["client_port"] == given["peer_port"]:
            self.problem(
                f"{where}.etcd.peer_port",
                f"{given['peer_port']} is also client_port",
                "two listeners cannot share a port",
                "choose another",
            )
        return Etcd(
            hosts, given["client_port"], given["peer_port"], self.etcd_source(where, given), given["quota_bytes"]
        )

    def etcd_source(self, where: str, given: dict[str, Any]) -> dict[str, str]:
        source = {key: value for key, value in (given["source"] or {"type": "package"}).items() if value is not None}
        where = f"{where}.etcd.source"
        if any(value is INVALID for value in source.values()):
            return {}
        extra = sorted(set(source) & {"path", "url", "sha256"})
        if source["type"] == "package" and extra:
            self.problem(
                where,
                f"{extra[0]} goes with type: archive only",
                "a package comes from the distribution",
                f"remove {', '.join(extra)} or set type: archive",
            )
        if source["type"] == "archive":
            if ("path" in source) == ("url" in source):
                self.problem(where, "an archive needs path or url", "it must come from one place", "give one of them")
            if "sha256" not in source:
                self.problem(
                    where,
                    "sha256 is missing",
                    "what is fetched is checked before it is run",
                    "add the archive's sha256",
                )
        return source

    def hosts(
        self, top: dict[str, Any], clusters: Mapping[str, Cluster], hosts: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Host]:
        found: dict[str, Host] = {}
        declared = set(top["clusters"]) if top["clusters"] is not INVALID else set()
        in_cluster = {name for name in declared if top["clusters"][name]["control_plane"] == "in_cluster"}
        unknown: dict[str, list[str]] = {}
        for name in sorted(hosts):
            for variable in sorted(hosts[name]):
                meant = schema.misspelt_variable(variable)
                if meant is None and schema.unknown_variable(variable) is not None:
                    unknown.setdefault(variable, []).append(name)
                if meant is not None:
                    self.problem(
                        f"host {name}.{variable}",
                        "it is not a variable of Isthmus",
                        "an unknown variable would be ignored in silence",
                        f"did you mean {meant!r}? Change it",
                    )
            variables = {key: value for key, value in hosts[name].items() if key in schema.HOST_VARIABLES}
            if variables.get("isthmus_cluster") is None:
                continue
            where = f"host {name}"
            if isinstance(variables["isthmus_cluster"], (list, tuple)):
                several = ", ".join(str(entry) for entry in variables["isthmus_cluster"])
                self.problem(
                    f"{where}.isthmus_cluster",
                    f"the host is in two clusters: {several}",
                    "its address and identity belong to one",
                    "keep one",
                )
                self.broken_hosts.add(name)
                continue
            if isinstance(variables["isthmus_cluster"], str) and variables["isthmus_cluster"] in in_cluster:
                self.entry(
                    where,
                    name,
                    variables,
                    [one for one in clusters.values() if one.name == variables["isthmus_cluster"]],
                )
                continue
            before = len(self.problems)
            schema.HOST_NAME.read(name, where, self.problems)
            ansible_host = variables.pop("ansible_host", None)
            entry = schema.HOST.read(variables, where, self.problems)
            underlay = entry["isthmus_underlay"]
            if underlay is None:
                underlay = self.default_underlay(where, name, ansible_host)
            cluster = entry["isthmus_cluster"]
            if cluster is not INVALID and cluster not in declared:
                self.problem(
                    f"{where}.isthmus_cluster",
                    f"{cluster!r} is not a cluster of this estate",
                    "the host would belong to nothing",
                    suggestion(cluster, declared),
                )
            workloads = self.workloads(where, entry["isthmus_workloads"])
            node = self.kubernetes_node(where, name, entry["isthmus_kubernetes_node"], clusters.get(cluster))
            if len(self.problems) > before or cluster not in clusters:
                self.broken_hosts.add(name)
                continue
            found[name] = Host(
                name=name,
                cluster=cluster,
                site=entry["isthmus_site"] or clusters[cluster].site,
                underlay=underlay,
                advertise=entry["isthmus_advertise"] or underlay,
                node_range=entry["isthmus_node_range"],
                labels=entry["isthmus_labels"],
                workloads=workloads,
                kubernetes_node=node,
                absent=entry["isthmus_state"] == "absent" or clusters[cluster].absent,
                bgp=read_bgp(entry["isthmus_bgp"]),
            )
        for variable, places in sorted(unknown.items()):
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            self.warnings.append(
                f"host {places[0]}{more}: {variable} is not a variable of Isthmus, which ignores it; "
                f"{schema.unknown_variable(variable)}"
            )
        self.unique_addresses(found)
        self.unique_nodes(found)
        self.pins(found)
        return found

    def entry(self, where: str, name: str, variables: Mapping[str, Any], clusters: list[Cluster]) -> None:
        """A host that stands for the etcd of a cluster whose control plane is in it. `clusters`: that one, if it could
        be read."""
        cluster = variables["isthmus_cluster"]
        for variable in sorted(set(variables) & set(schema.HOST.keys) - {"isthmus_cluster"}):
            self.problem(
                f"{where}.{variable}",
                f"the host stands for cluster {cluster}, whose control plane is in it, and is no machine of the mesh",
                "it would be ignored",
                "remove it",
            )
        self.entries[cluster] = name
        if clusters and clusters[0].etcd.hosts and name not in clusters[0].etcd.hosts:
            self.problem(
                f"{where}.isthmus_cluster",
                f"the nodes of cluster {cluster} are in the mesh without the inventory, and host "
                f"{clusters[0].etcd.hosts[0]} stands for its etcd",
                "it would be no part of anything",
                "remove it from the inventory, or name it in etcd.hosts of the cluster instead",
            )

    def kubernetes_node(self, where: str, name: str, given: Any, cluster: Cluster | None) -> str | None:
        if given is INVALID or cluster is None:
            return None
        if cluster.kubernetes is not None:
            return name if given is None else given or None
        if given:
            self.problem(
                f"{where}.isthmus_kubernetes_node",
                f"the host is no node {given!r} of Kubernetes: cluster {cluster.name} has no `kubernetes`",
                "a node belongs to the Kubernetes cluster that its cluster is",
                f"add isthmus_estate.clusters.{cluster.name}.kubernetes, or remove the variable",
            )
        return None

    def unique_nodes(self, hosts: Mapping[str, Host]) -> None:
        seen: dict[tuple[str, str], str] = {}
        for host in hosts.values():
            if host.kubernetes_node is None:
                continue
            owner = seen.setdefault((host.cluster, host.kubernetes_node), host.name)
            if owner != host.name:
                self.problem(
                    f"host {host.name}.isthmus_kubernetes_node",
                    f"{host.kubernetes_node!r} is also the node that host {owner} is",
                    "its pods are on one host",
                    "give each host the name of its own node, or `false`",
                )

    def default_underlay(self, where: str, name: str, ansible_host: Any) -> Any:
        """The literal address that Ansible uses; a name could resolve to anything."""
        for candidate in (ansible_host, name):
            try:
                ipaddress.ip_address(candidate if isinstance(candidate, str) else "")
            except ValueError:
                continue
            return schema.Address().read(candidate, f"{where}.isthmus_underlay", self.problems)
        self.problem(
            f"{where}.isthmus_underlay",
            "it is missing, and ansible_host is not a literal address",
            "other hosts send their packets to it, and gathered facts are absent under --limit",
            "set isthmus_underlay to the host's address",
        )
        return INVALID

    def workloads(self, where: str, given: Any) -> tuple[Workload, ...]:
        if given is INVALID:
            return ()
        found: dict[str, Workload] = {}
        cgroups: dict[tuple[str, str], str] = {}
        for index, entry in enumerate(given):
            here = f"{where}.isthmus_workloads[{index}]"
            cgroup = {kind: entry[kind] for kind in ("unit", "slice", "path") if entry[kind] not in (None, INVALID)}
            if len(cgroup) != 1 and INVALID not in (entry["unit"], entry["slice"], entry["path"]):
                self.problem(
                    here,
                    "it names no unit, slice or path" if not cgroup else f"it names {' and '.join(cgroup)}",
                    "exactly one cgroup is the workload",
                    "give one of unit, slice, path",
                )
            if any(value is INVALID for value in entry.values()) or len(cgroup) != 1:
                continue
            workload = Workload(
                name=entry["name"],
                namespace=entry["namespace"],
                service_account=entry["service_account"],
                labels=entry["labels"],
                cgroup=cgroup,
                address=entry["address"],
                absent=entry["state"] == "absent",
            )
            if workload.key in found:
                self.problem(here, f"{workload.key} is there twice", "its name is its key", "rename or remove one")
                continue
            target = processes(cgroup)
            if target in cgroups and not workload.absent:
                self.problem(
                    here,
                    f"{next(iter(cgroup.values()))} is also the workload {cgroups[target]}",
                    "a process has one address and identity",
                    "name another cgroup",
                )
            if not workload.absent:
                cgroups[target] = workload.key
            found[workload.key] = workload
        return tuple(found[key] for key in sorted(found))

    def unique_addresses(self, hosts: Mapping[str, Host]) -> None:
        seen: dict[IPv4Address, str] = {}
        for host in hosts.values():
            for address, variable in host.addresses.items():
                owner = seen.setdefault(address, host.name)
                if owner != host.name:
                    self.problem(
                        f"host {host.name}.{variable}",
                        f"{address} is also an address of host {owner}",
                        "packets of the two could not be told apart",
                        "give each host an address of its own; behind address translation set isthmus_advertise",
                    )

    def pins(self, hosts: Mapping[str, Host]) -> None:
        """Pinned node ranges and workload addresses against each other."""
        pinned = [
            Claim(host.node_range, f"host {host.name}.isthmus_node_range", WORKLOADS, host.name)
            for host in hosts.values()
            if host.node_range is not None
        ]
        for outer, inner in overlaps(pinned):
            self.problem(
                inner.where,
                f"{inner.network} and {outer.network} of host {outer.owner} share "
                f"{shared(outer.network, inner.network)}",
                "an address belongs to one host",
                "choose another range",
            )
        owners: dict[IPv4Address, str] = {}
        for host in hosts.values():
            for workload in host.workloads:
                if workload.address is None:
                    continue
                who = f"{host.name}/{workload.key}"
                where = f"host {host.name}.isthmus_workloads ({workload.key}).address"
                if owners.setdefault(workload.address, who) != who:
                    self.problem(
                        where,
                        f"{workload.address} is also the address of {owners[workload.address]}",
                        "an address belongs to one workload",
                        "choose another",
                    )
                if host.node_range is not None and workload.address not in host.node_range:
                    self.problem(
                        where,
                        f"{workload.address} is not in the node range {host.node_range}",
                        "other hosts find the workload by its host's range",
                        "choose an address inside it",
                    )

    def cluster_hosts(
        self,
        clusters: Mapping[str, Cluster],
        hosts: Mapping[str, Host],
        given: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Members and the CA are hosts of their own cluster."""
        bearer: dict[str, str] = {}
        for cluster in clusters.values():
            where = f"isthmus_estate.clusters.{cluster.name}"
            wanted = [(f"{where}.etcd.hosts", host) for host in dict.fromkeys(cluster.etcd.hosts)]
            if cluster.ca_host is not None:
                wanted.append((f"{where}.ca_host", cluster.ca_host))
            for key, name in wanted:
                if name not in given:
                    self.problem(
                        key,
                        f"{name!r} is not a host of the inventory",
                        "nobody could carry it",
                        suggestion(name, given),
                    )
                elif given[name].get("isthmus_cluster") is None:
                    self.problem(
                        key,
                        f"host {name} has no isthmus_cluster",
                        "a member is a host of its cluster",
                        f"set isthmus_cluster: {cluster.name} for it",
                    )
                elif name in hosts and hosts[name].cluster != cluster.name:
                    self.problem(
                        key,
                        f"host {name} is in two clusters: it carries {cluster.name}'s etcd or CA, "
                        f"and its isthmus_cluster is {hosts[name].cluster}",
                        "an etcd trusts only its own cluster's CA",
                        "choose a host of this cluster",
                    )
                elif name in hosts and hosts[name].absent and not cluster.absent:
                    self.problem(
                        key, f"host {name} is being removed", "it would leave with the host", "name another host first"
                    )
                if key.endswith("etcd.hosts") and bearer.setdefault(name, cluster.name) != cluster.name:
                    self.problem(
                        key,
                        f"host {name} is in two clusters: {bearer[name]} lists it too",
                        "a host carries one member",
                        "keep it in one",
                    )

    def sites(
        self, top: dict[str, Any], clusters: Mapping[str, Cluster], hosts: Mapping[str, Host]
    ) -> tuple[Encryption, Routing, dict[str, Bgp]]:
        """Sites and pairs of them are what the estate has; answers how packets between them are encrypted and go, and
        which sites speak BGP."""
        declared = top["sites"]
        if declared is INVALID:
            return Encryption(), Routing(), {}
        named = [(f"isthmus_estate.clusters.{cluster.name}.site", cluster.site) for cluster in clusters.values()]
        named += [(f"host {host.name}.isthmus_site", host.site) for host in hosts.values()]
        known = set(declared) if declared is not None else {site for _where, site in named}
        inherited = {cluster.site for cluster in clusters.values()} - known
        for where, site in named:
            if site not in known and not (where.startswith("host ") and site in inherited):
                self.problem(
                    where,
                    f"{site!r} is not a site of this estate",
                    "its routing would be unknown",
                    suggestion(site, known),
                )
        named_pairs: set[Pair] = set()
        pairs: dict[Pair, str] = {}
        ways: dict[Pair, str] = {}
        for index, pair in enumerate(top["site_pairs"] if top["site_pairs"] is not INVALID else ()):
            where = f"isthmus_estate.site_pairs[{index}].sites"
            if pair["sites"] is INVALID:
                continue
            if len(pair["sites"]) != 2:
                self.problem(
                    where,
                    f"{', '.join(pair['sites'])} are not two sites",
                    "it is a pair",
                    "name two sites; for the hosts of one among themselves, the same twice",
                )
                continue
            both = sorted_pair(*pair["sites"])
            for site in dict.fromkeys(both):
                if site not in known:
                    self.problem(
                        where,
                        f"{site!r} is not a site of this estate",
                        "the pair joins nothing",
                        suggestion(site, known),
                    )
            if both in named_pairs:
                self.problem(where, f"the pair {' and '.join(both)} is there twice", "one would win", "remove one")
            named_pairs.add(both)
            if pair["encryption"] is not None:
                pairs[both] = pair["encryption"]
            if pair["routing"] is not None:
                ways[both] = pair["routing"]
        default = top["encryption"]
        encrypting = {
            site: entry["encryption"]
            for site, entry in sorted((declared or {}).items())
            if entry["encryption"] not in (None, default)
        }
        differing = {both: pairs[both] for both in sorted(pairs) if encrypting or pairs[both] != default}
        encryption = Encryption(default, differing, encrypting)
        own = {
            site: entry["routing"]
            for site, entry in sorted((declared or {}).items())
            if entry["routing"] not in (None, top["routing"])
        }
        routing = Routing(top["routing"], own, {both: ways[both] for both in sorted(ways)})
        said = [top["routing"], default, *own.values(), *ways.values(), *encrypting.values(), *pairs.values()]
        given = {site: read_bgp(entry["bgp"]) for site, entry in sorted((declared or {}).items()) if entry["bgp"]}
        speaking = {site: found for site, found in given.items() if found is not None}
        if not any(value is INVALID for value in said):
            everywhere = {site for _where, site in named} | known
            self.encrypted(encryption, everywhere)
            self.native(routing, encryption, everywhere, hosts)
            if len(speaking) == len(given):
                native = [
                    pair
                    for pair in pairs_of(everywhere)
                    if routing.of(pair) in (NATIVE, AUTO) and encryption.of(pair) != "wireguard"
                ]
                claims = [claim for cluster in clusters.values() for claim in cluster.claims]
                check_bgp(speaking, chain(*native), hosts.values(), claims, self.problem)
        return encryption, routing, speaking

    def encrypted(self, encryption: Encryption, sites: set[str]) -> None:
        """Pairs of sites whose two sides say different things."""
        split = [
            f"{one} (`{encryption.of_site(one)}`) and {other} (`{encryption.of_site(other)}`)"
            for one, other in pairs_of(sites)
            if encryption.of((one, other)) is None
        ]
        if split:
            self.problem(
                "isthmus_estate.encryption",
                f"the sides of {_listed(split)} differ",
                "one would send what the other does not take, and neither is to be weakened without a word",
                "say in site_pairs what they use, or the same for both sites",
            )

    def overlay_port(self, top: dict[str, Any], encryption: Encryption, speaking: Mapping[str, Bgp]) -> None:
        """VXLAN takes its UDP port on all addresses of a host."""
        ways = {encryption.default, *encryption.sites.values(), *encryption.pairs.values()}
        taken = {53: "of DNS, at which dnsmasq answers on every host"}
        if "wireguard" in ways:
            taken.update(dict.fromkeys(WIREGUARD_PORTS, "of WireGuard (encryption: wireguard)"))
        if GATEWAY in ways:
            taken.update(dict.fromkeys(IPSEC_PORTS, f"of IKE (encryption: {GATEWAY})"))
        if any(router.bfd for settings in speaking.values() for router in settings.routers):
            taken[BFD_PORT] = "of BFD (bgp.routers)"
        port = top["overlay"]["port"] if top["overlay"] not in (None, INVALID) else None
        if port in taken:
            self.problem(
                "isthmus_estate.overlay.port",
                f"{port} is also the UDP port {taken[port]}",
                "a host can have one program there, and the other one would not start",
                "leave it out (8472), or set a port that no program of the hosts has",
            )

    def closed(
        self,
        top: dict[str, Any],
        clusters: Mapping[str, Cluster],
        hosts: Mapping[str, Host],
        encryption: Encryption,
    ) -> None:
        """What a site needs to which nobody outside opens anything."""
        closed = () if top["sites"] is INVALID else _closed(top["sites"])
        there = sorted({cluster.site for cluster in clusters.values()} | {host.site for host in hosts.values()})
        for site in closed:
            where = f"isthmus_estate.sites.{site}.inbound"
            others = [other for other in there if other != site]
            deaf = [other for other in others if other in closed]
            if deaf and site == min(site, *deaf):
                self.problem(
                    where,
                    f"false, as of {_listed(deaf)}",
                    "neither side could open a session to the other, and no host of a third site relays",
                    "take `inbound: false` from one of them: UDP 51871 and 51872, forwarded to a host's own address by "
                    "the address translation there, are enough (isthmus_advertise)",
                )
            if top["encryption"] is INVALID or top["site_pairs"] is INVALID:
                continue
            bare = [
                f"{other} ({way})"
                for other in others
                if (way := encryption.of(sorted_pair(site, other))) not in ("wireguard", None)
            ]
            if bare:
                self.problem(
                    where,
                    f"false, and traffic with {_listed(bare)} is not encrypted by WireGuard",
                    "only inside sessions of WireGuard, which the site's hosts open, do others reach them",
                    f"set `encryption: wireguard` for the pairs of {site} with other sites",
                )
        for cluster in clusters.values():
            members = {name: hosts[name].site for name in cluster.etcd.hosts if name in hosts}
            inside = [name for name, site in members.items() if site in closed]
            if inside and len(set(members.values())) > 1:
                self.problem(
                    f"isthmus_estate.clusters.{cluster.name}.etcd.hosts",
                    f"{_listed(inside)} is at a site with `inbound: false`, and other members are at other sites",
                    "members of one etcd open connections to each other before there is a mesh",
                    "list hosts of one site",
                )

    def native(self, routing: Routing, encryption: Encryption, sites: set[str], hosts: Mapping[str, Host]) -> None:
        """Pairs of sites that cannot be native as they are said to be."""
        split: list[str] = []
        encrypted: list[str] = []
        in_clear: set[str] = set()
        for pair in pairs_of(sites):
            way = routing.of(pair)
            name = pair[0] if pair[0] == pair[1] else " and ".join(pair)
            if way is None:
                split.append(name)
            elif way == NATIVE:
                if encryption.of(pair) == GATEWAY:
                    encrypted.append(name)
                elif encryption.of(pair) == "none":
                    in_clear.update(pair)
        where = "isthmus_estate.routing"
        if split:
            self.problem(
                where,
                f"the sides of {_listed(split)} differ: one is `native`, the other `tunnel`",
                "each would send what the other does not take",
                "say in site_pairs which of the two they use, or set the native side to `hybrid`, which has the tunnel "
                "to other sites",
            )
        if encrypted:
            self.problem(
                where,
                f"{_listed(encrypted)} would be native and go through gateways",
                "what goes from gateway to gateway has the tunnel inside it so far",
                "set `routing: tunnel`, `encryption: wireguard` or `encryption: none` for these pairs in site_pairs",
            )
        here = {name: host for name, host in sorted(hosts.items()) if host.site in in_clear and not host.absent}
        behind = [name for name, host in here.items() if host.advertise != host.underlay]
        if behind:
            self.problem(
                where,
                f"{_listed(behind)} would be reached natively and have another isthmus_advertise than isthmus_underlay",
                "behind an address translation no network routes the ranges of workloads",
                "set `routing: tunnel` for their sites, or `encryption: wireguard`, inside which they can be native",
            )

    def reserved(self, given: Any, hosts: Mapping[str, Host]) -> tuple[Claim, ...]:
        found: dict[str, Claim] = {}
        for index, entry in enumerate(() if given is INVALID else given):
            where = f"isthmus_estate.reserved_ranges[{index}]"
            if any(value is INVALID for value in entry.values()):
                continue
            name = entry["name"]
            if name in found:
                self.problem(f"{where}.name", f"{name!r} is there twice", "messages name ranges by it", "rename one")
            inside = {host.site for host in hosts.values() if host.underlay in entry["range"]}
            found[name] = Claim(entry["range"], f"{where} ({name})", RESERVED, name, tuple(sorted(inside)))
        return tuple(sorted(found.values()))

    def ranges(
        self,
        clusters: Mapping[str, Cluster],
        hosts: Mapping[str, Host],
        reserved: tuple[Claim, ...],
        networks: tuple[Claim, ...],
    ) -> None:
        """No two ranges of the mesh overlap, none holds what is somebody else's (a host's underlay address, a reserved
        range, a network of a site) or lies in it, what is behind gateways of two sites is apart, pins lie in theirs."""
        named = [claim for cluster in clusters.values() for claim in cluster.claims]
        for outer, inner in overlaps([*named, *reserved, *networks]):
            if may_share(outer, inner):
                continue
            first, second = (outer, inner) if inner.kind != RESERVED else (inner, outer)
            count = sum(one.kind in BESIDE for one in (outer, inner))
            problem = Problem(
                second.where,
                f"{second.network} and {first.network} ({first.where}) overlap: they share "
                f"{shared(first.network, second.network)}",
                (
                    "an address of the mesh belongs to one place",
                    "packets to what is there would be sent into the mesh",
                    "a packet goes to one place",
                )[count],
                "choose ranges that are apart",
            )
            self.conflict(problem, outer, inner)
        for cluster in clusters.values():
            self.api_server(cluster, named)
        for host in hosts.values():
            for own in host.claims:
                address = own.network.network_address
                for claim in (*named, *astray(own, networks)):
                    if address in claim.network:
                        problem = Problem(
                            own.where,
                            f"{address} lies in {claim.network} ({claim.where})",
                            f"packets to it would go to the gateway of {claim.owner}, and the host is at {host.site}"
                            if claim.kind == VPN
                            else "packets between hosts would be sent into the mesh that they carry",
                            "choose a range that holds no host's own address",
                        )
                        self.conflict(problem, claim, own)
            cluster_ranges = clusters[host.cluster].workload_ranges
            if host.node_range is not None and not any(host.node_range.subnet_of(one) for one in cluster_ranges):
                self.problem(
                    f"host {host.name}.isthmus_node_range",
                    f"{host.node_range} is not in a workload range of cluster {host.cluster}",
                    "peers refuse addresses outside their owner's ranges",
                    "choose one inside " + ", ".join(str(network) for network in cluster_ranges),
                )

    def api_server(self, cluster: Cluster, named: Iterable[Claim]) -> None:
        """The API is reached without the mesh. The ClusterIP of its own service will do: kube-proxy is there."""
        if cluster.kubernetes is None:
            return
        try:
            address = IPv4Address(urlsplit(cluster.kubernetes.api_server).hostname or "")
        except ValueError:
            return
        for claim in named:
            if address in claim.network and claim.network != cluster.kubernetes.service_range:
                self.problem(
                    f"isthmus_estate.clusters.{cluster.name}.kubernetes.api_server",
                    f"{address} lies in {claim.network} ({claim.where})",
                    "what is known of Kubernetes makes the mesh, so its API must be reached without it",
                    "use an address of the underlay, or a name for one",
                )

    def services(
        self, top: dict[str, Any], clusters: Mapping[str, Cluster], hosts: Mapping[str, Host]
    ) -> dict[str, Service]:
        found: dict[str, Service] = {}
        if top["services"] is INVALID:
            return found
        for index, entry in enumerate(top["services"]):
            where = f"isthmus_estate.services[{index}]"
            if entry["name"] is not INVALID and entry["namespace"] is not INVALID:
                where += f" ({entry['namespace']}/{entry['name']})"
            service = self.service(where, entry, top, clusters, hosts)
            if service is None:
                continue
            if service.key in found:
                self.problem(where, f"{service.key} is there twice", "its name is its key", "rename or remove one")
            found[service.key] = service
        return found

    def service(
        self,
        where: str,
        entry: dict[str, Any],
        top: dict[str, Any],
        clusters: Mapping[str, Cluster],
        hosts: Mapping[str, Host] | None,
    ) -> Service | None:
        """`hosts` are those that backends must be on; None: they are not known here."""
        before = len(self.problems)
        names = entry["clusters"]
        if names != "all" and names is not INVALID:
            declared = top["clusters"] if top["clusters"] is not INVALID else {}
            for name in names:
                if name not in declared:
                    self.problem(
                        f"{where}.clusters",
                        f"{name!r} is not a cluster of this estate",
                        "the service could exist nowhere",
                        suggestion(name, declared),
                    )
        ports = self.service_ports(where, entry["ports"])
        health = self.health(where, entry["health"], ports)
        labels, workloads = self.backends(where, entry, hosts)
        if len(self.problems) > before or any(value is INVALID for value in entry.values()):
            return None
        present = tuple(sorted(name for name, cluster in clusters.items() if not cluster.absent))
        exists = present if names == "all" else tuple(sorted(set(names) & set(present)))
        self.service_kubernetes(where, entry, None if hosts is None else [clusters[name] for name in exists])
        return Service(
            definition=ServiceDefinition(
                name=entry["name"],
                namespace=entry["namespace"],
                ports=ports,
                backend_labels=labels,
                backend_workloads=workloads,
                health=health,
                is_global=entry["global"],
                shared=entry["shared"],
                affinity=entry["affinity"],
                labels=entry["labels"],
                kubernetes=entry["kubernetes"],
            ),
            clusters=exists,
            absent=entry["state"] == "absent",
        )

    def service_kubernetes(self, where: str, entry: Mapping[str, Any], exists: list[Cluster] | None) -> None:
        """`exists`: the clusters in which the service is; None: they are not known here."""
        if not entry["kubernetes"]:
            return
        where = f"{where}.kubernetes"
        if not entry["global"]:
            self.problem(
                where,
                "it goes with `global: true` only",
                "pods use it by Cilium's annotation for global services",
                "add global: true, or remove it",
            )
        if exists is not None and entry["state"] != "absent" and all(one.kubernetes is None for one in exists):
            self.problem(
                where,
                f"none of its clusters ({', '.join(one.name for one in exists) or 'none'}) is a Kubernetes cluster",
                "there is nowhere to make it a Service",
                "add a cluster that has `kubernetes` to its clusters, or remove it",
            )

    def service_ports(self, where: str, given: Any) -> tuple[ServicePort, ...]:
        if given is INVALID:
            return ()
        found: list[ServicePort] = []
        for index, entry in enumerate(given):
            here = f"{where}.ports[{index}]"
            if any(value is INVALID for value in entry.values()):
                continue
            port = ServicePort(entry["name"], entry["port"], entry["target_port"] or entry["port"], entry["protocol"])
            if not port.name and len(given) > 1:
                self.problem(
                    f"{here}.name", "it is missing", "with several ports the name says which is which", "add a name"
                )
            if any(other.name == port.name for other in found) and port.name:
                self.problem(f"{here}.name", f"{port.name!r} is there twice", "the name is its key", "rename one")
            if any((other.port, other.protocol) == (port.port, port.protocol) for other in found):
                self.problem(
                    f"{here}.port",
                    f"{port.port}/{port.protocol} is there twice",
                    "one address and port leads to one set of backends",
                    "remove one",
                )
            found.append(port)
        return tuple(found)

    def health(self, where: str, given: Any, ports: tuple[ServicePort, ...]) -> HealthCheck | None:
        if given is None or given is INVALID or any(value is INVALID for value in given.values()):
            return None
        where = f"{where}.health"
        kind, port = given["type"], given["port"]
        if kind != "exec" and port is None:
            port = next((entry.target_port for entry in ports if entry.protocol == "TCP"), None)
            if port is None:
                self.problem(
                    f"{where}.port",
                    f"it is missing, and the service has no TCP port for a {kind} check",
                    "the check needs a TCP port",
                    "add port, or use type: exec",
                )
        for key, owner in (("path", "http"), ("command", "exec")):
            if given[key] is not None and kind != owner:
                self.problem(
                    f"{where}.{key}", f"it goes with type: {owner} only", f"a {kind} check has none", "remove it"
                )
        if kind == "exec" and not given["command"]:
            self.problem(f"{where}.command", "it is missing", "an exec check runs it", "add the command as a list")
        if given["timeout"] > 10 * given["interval"]:
            self.problem(
                f"{where}.timeout",
                f"{given['timeout']:g} s is more than ten times the interval",
                "checks of one backend would pile up",
                "shorten it",
            )
        return HealthCheck(
            type=kind,
            port=port,
            path=(given["path"] or "/") if kind == "http" else None,
            command=tuple(given["command"] or ()),
            interval=given["interval"],
            timeout=given["timeout"],
            rise=given["rise"],
            fall=given["fall"],
        )

    def backends(
        self, where: str, entry: dict[str, Any], hosts: Mapping[str, Host] | None
    ) -> tuple[Mapping[str, str] | None, tuple[str, ...]]:
        given = entry["backends"]
        where = f"{where}.backends"
        if given is INVALID or any(value is INVALID for value in given.values()):
            return None, ()
        labels, workloads = given["labels"], given["workloads"]
        if (labels is None) == (workloads is None):
            self.problem(
                where, "it needs labels or workloads, and one of them only", "backends are chosen one way", "fix it"
            )
            return None, ()
        if labels is not None:
            if not labels:
                self.problem(
                    f"{where}.labels", "it is empty", "every workload of the namespace would match", "add a label"
                )
            elif (
                hosts is not None
                and entry["state"] != "absent"
                and not self.broken_hosts
                and not any(
                    workload.namespace == entry["namespace"]
                    and not workload.absent
                    and all(workload.labels.get(key) == value for key, value in labels.items())
                    for host in hosts.values()
                    for workload in host.workloads
                )
            ):
                self.warnings.append(
                    f"{where}.labels: no workload of namespace {entry['namespace']} in the inventory has these labels; "
                    "the service has no backend until one does"
                )
            return labels, ()
        for reference in workloads:
            host, _slash, name = reference.partition("/")
            # Of a service that goes its backends may have gone before.
            if hosts is None or host in self.broken_hosts or entry["state"] == "absent":
                continue
            if host not in hosts:
                self.problem(
                    f"{where}.workloads",
                    f"{host!r} of {reference!r} is not a host of the mesh",
                    "the backend could not exist",
                    suggestion(host, hosts),
                )
            elif not any(
                workload.name == name and workload.namespace == entry["namespace"] for workload in hosts[host].workloads
            ):
                known = [one.name for one in hosts[host].workloads if one.namespace == entry["namespace"]]
                self.problem(
                    f"{where}.workloads",
                    f"host {host} has no workload {entry['namespace']}/{name}",
                    "a backend is a workload of the service's namespace",
                    suggestion(name, known) if known else f"add it to isthmus_workloads of host {host}",
                )
        return None, tuple(sorted(workloads))
