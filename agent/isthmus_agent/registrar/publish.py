# SPDX-License-Identifier: GPL-3.0-or-later
"""What this cluster publishes, computed from its record, its agents' reports and its Kubernetes objects. Pure: no IO,
no clock.

The record (operator's) says who exists and which range, address, labels and service account each has; the reports
(agents') say what is ready, and never more than that: an agent cannot claim another's range or address nor change an
identity. A document that is missing or does not parse withdraws nothing: what was published of that host, workload
or service before stays as long as the record (or the service definition's key) lists it. Likewise what was published
of Kubernetes stands as it is until every kind of its objects was read in full.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from isthmus_mesh import jsontext, keys
from isthmus_mesh.documents import DocumentError, NodeReport, ServiceDefinition, Untranslated, WorkloadReport
from isthmus_mesh.identity import identity_range, workload_labels
from isthmus_mesh.jsontext import Fields
from isthmus_mesh.wire import (
    KUBERNETES_NODE,
    SITE,
    UNDERLAY_MTU,
    WIREGUARD_KEY_INDEX,
    WIREGUARD_KEYS,
    ClusterConfig,
    ClusterService,
    IPIdentityPair,
    L4Addr,
    Node,
    NodeAddress,
    PortMap,
    WireError,
    labels_to_string,
    public_key_problem,
)

from .dealing import BY_KUBERNETES, BY_PEERS, Allocation, Dealer, parse_time
from .kubernetes.catalog import Catalog, Changes, Rendered
from .kubernetes.objects import SERVICES, PodFacts


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """An input that could not be used as it is: which key, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Own:
    """The publishing cluster. `pod_ranges4` and `cluster_ips4` are those of its Kubernetes cluster, if it is one.

    `in_cluster`: its agents share one certificate, so that a report proves nothing about who wrote it."""

    name: str
    id: int
    max_clusters: int
    service_range4: IPv4Network
    pod_ranges4: tuple[IPv4Network, ...] = ()
    cluster_ips4: IPv4Network | None = None
    in_cluster: bool = False


@dataclass(frozen=True, slots=True)
class PeerServices:
    """Services ("<ns>/<name>") that peers offer to everybody and that the estate does not declare. `complete`: of
    every peer is known what it offers; otherwise those that are not among `names` stay."""

    names: frozenset[str] = frozenset()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Inputs:
    """`record` is this cluster's document of the estate record; the others are etcd keys with their values.

    `previous`: what is published and allocated now, by key (see `owned_prefixes`). `now` is RFC 3339 in UTC.
    `draining`: hosts that the record lacks and whose node and addresses stay published all the same (see `leaving`).
    `kubernetes` is None where the cluster is no Kubernetes cluster. `unwritable`: definitions ("<ns>/<name>") that are
    to be Services of it and cannot become so for now. `dealt`: keys of the ranges of nodes, where the registrar deals
    these (`nodes`).
    """

    record: Mapping[str, Any]
    nodes: Mapping[str, bytes]
    workloads: Mapping[str, bytes]
    services: Mapping[str, bytes]
    previous: Mapping[str, str]
    now: str
    draining: frozenset[str] = frozenset()
    kubernetes: Catalog | None = None
    peers: PeerServices = PeerServices()
    unwritable: frozenset[str] = frozenset()
    dealt: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Publication:
    """`keys`: everything that should be below `owned_prefixes`, in the order in which it is to be written.

    `silent`: the reports that lack, or that say nothing about a service of their workload, by key.
    """

    keys: dict[str, str]
    problems: tuple[Problem, ...]
    silent: tuple[str, ...]


def owned_prefixes(cluster: str) -> tuple[str, ...]:
    """The prefixes whose content `publish` decides completely, in the order of writing; deleting goes backwards.

    An identity is there before the address that uses it, an address before the service that names it.
    """
    return (
        keys.ALLOC_NODES_PREFIX,
        keys.ALLOC_IDENTITIES_PREFIX,
        keys.VIPS_PREFIX,
        keys.UNTRANSLATED_PREFIX,
        keys.state_prefix("identities", cluster),
        keys.state_prefix("nodes", cluster),
        keys.state_prefix("ip", cluster),
        keys.state_prefix("services", cluster),
        keys.LOCAL_SERVICES_PREFIX,
    )


@dataclass(frozen=True, slots=True)
class Change:
    """One write; `value` None deletes the key."""

    key: str
    value: str | None


def difference(wanted: Mapping[str, str], actual: Mapping[str, str], prefixes: Iterable[str]) -> list[Change]:
    """The writes that make `actual` equal to `wanted` below `prefixes`: puts in their order, then deletes backwards."""
    order = list(prefixes)
    puts = [Change(key, value) for key, value in wanted.items() if actual.get(key) != value]
    lacking = sorted(key for key in actual if key not in wanted)
    gone = [Change(key, None) for prefix in reversed(order) for key in lacking if key.startswith(prefix)]
    return puts + gone


def apply_changes(changes: Iterable[Change], actual: dict[str, str]) -> None:
    """What `actual` is after `changes` were written."""
    for change in changes:
        if change.value is None:
            actual.pop(change.key, None)
        else:
            actual[change.key] = change.value


def overlay(*layers: Mapping[str, str]) -> dict[str, str]:
    """All keys of `layers`; the first layer that has a key counts, and its keys come first.

    Of two keys that claim one address, `publish` gives it to the one that comes first.
    """
    found: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.items():
            found.setdefault(key, value)
    return found


def leaving(own: Own, record: Mapping[str, Any], published: Iterable[str]) -> frozenset[str]:
    """Hosts whose node key is `published` and that the record does not have any more, and has not forgotten as lost.

    Without their node key the other hosts know no way to them and drop what they send. So for a while they are given
    as `Inputs.draining`: their workloads are backends of nothing at once, and what is established comes to its end.
    """
    prefix = keys.state_prefix("nodes", own.name)
    names = {key[len(prefix) :] for key in published if key.startswith(prefix)}
    return frozenset(names - _hosts(record).keys() - record.get("forgotten", {}).keys())


def publish(own: Own, inputs: Inputs) -> Publication:
    """Everything that this cluster should have published and allocated."""
    return Publisher(own, inputs).run()


@dataclass(frozen=True, slots=True)
class _Workload:
    node: str
    namespace: str
    name: str
    address: str
    service_account: str
    labels: Mapping[str, str]
    report: WorkloadReport | None  # None: silent, what was published stands

    @property
    def key(self) -> str:
        return keys.workload_key(self.node, self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class _Pod:
    namespace: str
    name: str
    pod: PodFacts
    host: Mapping[str, Any]
    labels: str
    translated: bool

    def untranslated(self) -> str | None:
        """What its node's agent is to know, when its sockets are to be left alone."""
        return None if self.translated else Untranslated(self.namespace, self.name, self.pod.uid).to_json()


@dataclass(frozen=True, slots=True)
class _Offer:
    """A global service of Kubernetes. `address` is None when it is headless (or its address is not to be used).

    `ours`: the registrar made it of a definition."""

    address: str | None
    ports: PortMap
    backends: Mapping[str, PortMap]
    hostnames: Mapping[str, str]
    labels: Mapping[str, str]
    selector: Mapping[str, str]
    shared: bool
    affinity: str
    session_affinity: int
    ours: bool = False


class Publisher:
    """What should be published: `run` computes all of it, `follow` afterwards what some changed Kubernetes objects
    make different, without looking at the others.

    `machines`: by service, its backends on machines of this cluster."""

    def __init__(self, own: Own, inputs: Inputs) -> None:
        self.own = own
        self.inputs = inputs
        self.machines: dict[tuple[str, str], Mapping[str, PortMap]] = {}
        self.problems: set[Problem] = set()
        self.silent: set[str] = set()
        self._encrypted: set[str] = set()  # addresses of hosts that are published with a WireGuard key
        self.hosts = _hosts(inputs.record)
        catalog = inputs.kubernetes
        self._catalog = catalog if catalog is not None and catalog.synced else None
        self._holding = catalog is not None and not catalog.synced
        self._pod_ranges = [(int(r.network_address), int(r.broadcast_address)) for r in own.pod_ranges4]
        self._strangers: Counter[str] = Counter()  # pods by node that is none of ours
        self._places: dict[str, Mapping[str, Any]] = {}  # hosts that are published, by name of the Kubernetes node
        self._mesh_of: dict[str, str] = {}  # address of such a host -> its mesh address
        self._workloads_found: list[_Workload] = []
        self._definitions_found: dict[tuple[str, str], _Definition] = {}
        self._numbers = self._dealt_numbers()
        self._vips = self._dealt_vips()

    @property
    def follows(self) -> bool:
        """Whether `follow` makes sense: everything of Kubernetes had been read when `run` ran."""
        return self._catalog is not None

    def definitions(self) -> dict[tuple[str, str], ServiceDefinition | None]:
        """Every definition; None: it cannot be read."""
        return {service: entry.definition for service, entry in self._definitions_found.items()}

    def problem(self, key: str, reason: str) -> None:
        self.problems.add(Problem(key, reason))

    def run(self) -> Publication:
        nodes = self._nodes()
        self._place(nodes)
        workloads = self._workloads_found = self._workloads(nodes)
        pods = {address: pod for address in self._addresses() if (pod := self._pod(address)) is not None}
        held = self._held_addresses()
        draining = self._draining({workload.address for workload in workloads} | pods.keys())
        owned = self._owners({**held, **draining})
        labels = set(map(self._labels, workloads)) | {pod.labels for pod in pods.values()} | owned
        numbers = self._numbers.settle(dict.fromkeys(labels - {""}, ""))
        definitions = self._definitions_found = self._definitions()
        offers = {service: offer for service in self._offered() if (offer := self._offer(service)) is not None}
        vips = self._vips.settle(self._wanted_vips(definitions, offers))
        wanted: dict[str, str] = dict(self.inputs.dealt)
        wanted.update(self._allocations())
        for service in sorted({*map(_pair, self._vips.owners()), *offers}):
            wanted[keys.vip_key(*service)] = self._vip("/".join(service), offers.get(service))
        for label, number in sorted(numbers.items(), key=lambda item: item[1]):
            wanted[keys.identity_key(number)] = label
        wanted.update(nodes)
        for workload in workloads:
            if (label := self._labels(workload)) in numbers:
                wanted[keys.ip_key(workload.address)] = self._address(workload, numbers[label])
        for address, pod in sorted(pods.items()):
            if pod.labels in numbers:
                wanted[keys.ip_key(address)] = self._pod_address(address, pod, numbers[pod.labels])
                if (alone := pod.untranslated()) is not None:
                    wanted[keys.untranslated_key(address)] = alone
        wanted.update(held)
        wanted.update(draining)
        for service in sorted({*definitions, *offers}):
            found = self._service(service, definitions.get(service), offers.get(service), vips.get("/".join(service)))
            if found is not None:
                wanted[found[0]] = found[1]
        self._tell_of_kubernetes()
        return Publication(wanted, tuple(sorted(self.problems)), tuple(sorted(self.silent)))

    # --- nodes

    def _nodes(self) -> dict[str, str]:
        for key in self.inputs.nodes:
            name = keys.parse_node_report_key(key)
            if name not in self.hosts and keys.alloc_node_key(str(name)) not in self.inputs.dealt:
                self.problem(key, "the estate record of this cluster has no such host")
        found = {}
        for name, host in self.hosts.items():
            key = keys.node_key(self.own.name, name)
            value = self._node(name, host)
            if value is None:
                value = self._previous_node(key, host)
            if value is not None:
                found[key] = value
        return found

    def _node(self, name: str, host: Mapping[str, Any]) -> str | None:
        key = keys.node_report_key(name)
        if key not in self.inputs.nodes:
            self.silent.add(key)
            return None
        try:
            report = NodeReport.from_json(self.inputs.nodes[key])
        except DocumentError as error:
            self.problem(key, str(error))
            return None
        claims = {
            "name": (report.name, name),
            "cluster": (report.cluster, self.own.name),
            "range4": (report.range4, host["range4"]),
            "mesh4": (report.mesh4, host["mesh4"]),
        }
        for what, (claimed, recorded) in claims.items():
            if claimed != recorded:
                self.problem(key, f"{what} {claimed!r} is not {recorded!r}, which the estate record gives this host")
                return None
        known = {host["advertise4"], host["underlay4"], host["mesh4"]}
        for _, address in report.addresses:
            if address not in known:
                self.problem(key, f"address {address} is not the host's in the estate record; it is not published")
        public_key = "" if self.own.in_cluster else report.wireguard_public_key
        if public_key and (wrong := public_key_problem(public_key)):
            self.problem(key, f"the WireGuard public key {public_key!r} {wrong}; it is not published")
            public_key = ""
        others = {port: text for port, text in report.wireguard_keys.items() if not public_key_problem(text)}
        annotations = {UNDERLAY_MTU: str(report.mtu)} if report.mtu else {}
        if public_key and others:
            annotations[WIREGUARD_KEYS] = ",".join(f"{port}={text}" for port, text in sorted(others.items()))
        if self.own.pod_ranges4:
            annotations[KUBERNETES_NODE] = host.get("kubernetes_node") or ""
        site: str = host.get("site", "")
        if site != self.inputs.record.get("site", site) or host["underlay4"] != host["advertise4"]:
            annotations[SITE] = site
        if public_key:
            self._encrypted.add(host["advertise4"])
        return Node(
            name=name,
            cluster=self.own.name,
            cluster_id=self.own.id,
            addresses=_addresses(host),
            ipv4_alloc_cidr=IPv4Network(host["range4"]),
            ipv4_secondary_alloc_cidrs=self._pod_cidrs(keys.node_key(self.own.name, name), host),
            labels={"kubernetes.io/hostname": name, **host.get("labels", {})},
            annotations=annotations,
            boot_id=report.boot_id,
            encryption_key=WIREGUARD_KEY_INDEX if public_key else 0,
            wireguard_public_key=public_key,
        ).to_json()

    def _previous_node(self, key: str, host: Mapping[str, Any]) -> str | None:
        """What was published before, unless the record has since given the host another range or address."""
        before = self.inputs.previous.get(key)
        if before is None:
            return None
        try:
            node = Node.from_json(before)
        except WireError:
            return None
        if node.ipv4_alloc_cidr != IPv4Network(host["range4"]) or node.addresses != _addresses(host):
            return None
        if node.encryption_key:
            self._encrypted.add(host["advertise4"])
        cidrs = self._pod_cidrs(key, host)
        return (
            before
            if cidrs == node.ipv4_secondary_alloc_cidrs
            else replace(node, ipv4_secondary_alloc_cidrs=cidrs).to_json()
        )

    def _pod_cidrs(self, key: str, host: Mapping[str, Any]) -> tuple[IPv4Network, ...]:
        """The ranges that the pods of the host `key` have, besides its own."""
        name = host.get("kubernetes_node")
        if not name:
            return ()
        if self._catalog is None:
            try:
                before = Node.from_json(self.inputs.previous[key])
            except (KeyError, WireError):
                return ()
            return tuple(cidr for cidr in before.ipv4_secondary_alloc_cidrs if isinstance(cidr, IPv4Network))
        node = self._catalog.node(name)
        found = []
        for cidr in () if node is None else node.pod_cidrs:
            if any(cidr.subnet_of(network) for network in self.own.pod_ranges4):
                found.append(cidr)
            else:
                self.problem(f"kubernetes nodes {name}", f"its pod CIDR {cidr} is not in {_ranges(self.own)}")
        return tuple(found)

    def _place(self, nodes: Mapping[str, str]) -> None:
        """Which published host is which Kubernetes node."""
        for name, host in self.hosts.items():
            node = host.get("kubernetes_node")
            if not node or keys.node_key(self.own.name, name) not in nodes:
                continue
            self._places[node] = host
            facts = self._catalog.node(node) if self._catalog is not None else None
            for address in (host["underlay4"], host["advertise4"], *(facts.addresses if facts else ())):
                self._mesh_of[address] = host["mesh4"]

    def _draining(self, taken: set[str]) -> dict[str, str]:
        """Node and address keys of `Inputs.draining`, as they were published. A host whose address another one has
        now is not among them: two nodes behind one address would be refused by everybody."""
        used = {host[key] for host in self.hosts.values() for key in ("advertise4", "underlay4", "mesh4")}
        found: dict[str, str] = {}
        ranges: list[IPv4Network] = []
        for name in sorted(self.inputs.draining):
            key = keys.node_key(self.own.name, name)
            try:
                node = Node.from_json(self.inputs.previous[key])
            except (KeyError, WireError):
                continue
            if used.isdisjoint(address.ip for address in node.addresses):
                found[key] = self.inputs.previous[key]
                ranges += [cidr for cidr in node.cidrs() if isinstance(cidr, IPv4Network)]
        for key, value in self.inputs.previous.items() if ranges else ():
            parsed = keys.parse_ip_key(key)
            if parsed is None or parsed[0] is not None or parsed[1] in taken:
                continue
            try:
                address = IPv4Address(parsed[1])
            except ValueError:
                continue
            if any(address in network for network in ranges):
                found[key] = value
        return found

    # --- workloads

    def _workloads(self, nodes: Mapping[str, str]) -> list[_Workload]:
        found = []
        listed = set()
        for node, host in self.hosts.items():
            published = keys.node_key(self.own.name, node) in nodes
            for full, entry in sorted(host.get("workloads", {}).items()):
                namespace, _, name = full.partition("/")
                workload = _Workload(
                    node,
                    namespace,
                    name,
                    entry["address4"],
                    entry.get("service_account") or "default",
                    entry.get("labels", {}),
                    self._report(node, namespace, name, entry),
                )
                listed.add(workload.key)
                known = workload.report is not None or keys.ip_key(workload.address) in self.inputs.previous
                if published and known:
                    found.append(workload)
        for key in self.inputs.workloads:
            if key not in listed:
                self.problem(key, "the estate record of this cluster has no such workload on that host")
        return found

    def _report(self, node: str, namespace: str, name: str, entry: Mapping[str, Any]) -> WorkloadReport | None:
        key = keys.workload_key(node, namespace, name)
        if key not in self.inputs.workloads:
            self.silent.add(key)
            return None
        try:
            report = WorkloadReport.from_json(self.inputs.workloads[key])
        except DocumentError as error:
            self.problem(key, str(error))
            return None
        if (report.node, report.namespace, report.name) != (node, namespace, name):
            self.problem(key, "the report is not the one that its key says")
            return None
        strange = sorted(set(report.addresses) - {entry["address4"]})
        if strange:
            self.problem(
                key, f"address {strange[0]} is not {entry['address4']}, which the estate record gives this workload"
            )
            return None
        return report

    def _labels(self, workload: _Workload) -> str:
        labels = workload_labels(workload.namespace, workload.service_account, self.own.name, workload.labels)
        try:
            return labels_to_string(labels)
        except WireError as error:
            self.problem(workload.key, str(error))
            return ""

    def _address(self, workload: _Workload, number: int) -> str:
        host_ip = self.hosts[workload.node]["advertise4"]
        return IPIdentityPair(
            ip=workload.address,
            identity=number,
            host_ip=host_ip,
            key=self._key_index(host_ip),
            namespace=workload.namespace,
            pod_name=workload.name,
            service_account=workload.service_account,
        ).to_json()

    def _key_index(self, host_ip: str) -> int:
        return WIREGUARD_KEY_INDEX if host_ip in self._encrypted else 0

    # --- pods

    def _addresses(self) -> Iterable[str]:
        return () if self._catalog is None else self._catalog.addresses()

    def _is_pods(self, address: str) -> bool:
        number = _number(address)
        return any(first <= number <= last for first, last in self._pod_ranges)

    def _pod(self, address: str) -> _Pod | None:
        """The pod to publish at `address`."""
        found = self._catalog.pod(address) if self._catalog is not None else None
        if found is None:
            return None
        assert self._catalog is not None
        key, pod = found
        host = self._places.get(pod.node)
        if host is None:
            self._strangers[pod.node] += 1
            return None
        if not self._is_pods(address):
            self.problem(f"kubernetes pods {'/'.join(key)}", f"its address {address} is not in {_ranges(self.own)}")
            return None
        try:
            return _Pod(*key, pod, host, self._catalog.labels(key), self._catalog.is_translated(key))
        except WireError as error:
            self.problem(f"kubernetes pods {'/'.join(key)}", str(error))
            return None

    def _pod_address(self, address: str, pod: _Pod, number: int) -> str:
        assert self._catalog is not None
        rendered, host_ip = self._catalog.rendered, pod.host["advertise4"]
        known, index = rendered.get(address), self._key_index(host_ip)
        made_of = (number, host_ip, index)
        if known is not None and known.pod is pod.pod and (known.number, known.host_ip, known.key_index) == made_of:
            return known.text
        text = IPIdentityPair(
            ip=address,
            identity=number,
            host_ip=host_ip,
            key=index,
            namespace=pod.namespace,
            pod_name=pod.name,
            service_account=pod.pod.service_account,
            named_ports=pod.pod.ports,
        ).to_json()
        rendered[address] = Rendered(pod.pod, number, host_ip, index, text)
        return text

    def _held_addresses(self) -> dict[str, str]:
        """What is published at the addresses of pods, while it is not known which pods there are."""
        if not self._holding:
            return {}
        found = {}
        for key, value in self.inputs.previous.items():
            parsed = keys.parse_ip_key(key)
            is_pods = parsed is not None and parsed[0] is None and self._is_pods(parsed[1])
            if is_pods or keys.parse_untranslated_key(key) is not None:
                found[key] = value
        return found

    def _tell_of_kubernetes(self) -> None:
        if self._holding:
            self.silent.add("the Kubernetes API")
        if self._catalog is None:
            return
        for key, reason in self._catalog.told():
            self.problem(key, reason)
        named = {host.get("kubernetes_node"): name for name, host in self.hosts.items()}
        for node, number in self._strangers.items():
            why = (
                f"its host {named[node]} has not reported yet"
                if node in named
                else "no host of the estate has this isthmus_kubernetes_node"
            )
            self.problem(f"kubernetes nodes {node}", f"addresses of {number} pods are not published: {why}")

    # --- allocations

    def _dealt_numbers(self) -> Dealer:
        """The identity numbers that were dealt, tombstones included."""
        first, last = identity_range(self.own.id, self.own.max_clusters)
        taken: dict[int, Allocation] = {}
        for key, value in self.inputs.previous.items():
            number = keys.parse_alloc_identity_key(key)
            if number is not None:
                taken[number] = self._allocation(key, value)
        # The published identity is a second witness: a number that peers may have seen is never dealt anew.
        for key, value in self.inputs.previous.items():
            parsed = keys.parse_identity_key(key)
            if parsed is not None and parsed[0] is None and parsed[1] not in taken:
                taken[parsed[1]] = Allocation(value, self.inputs.now, None)
        pool = range(first + 1, last + 1)
        return Dealer(
            taken, pool, keys.ALLOC_IDENTITIES_PREFIX, "identity number", self.inputs.now, self.problem, len(pool)
        )

    def _allocations(self) -> dict[str, str]:
        return {keys.alloc_identity_key(number): self._allocated(number) for number in sorted(self._numbers.taken)}

    def _allocated(self, number: int) -> str:
        entry = self._numbers.taken[number]
        return json.dumps({"labels": entry.owner, "created": entry.created, "released": entry.released})

    def _owners(self, addresses: Mapping[str, str]) -> set[str]:
        """Label strings of the identities that published `addresses` have."""
        found = set()
        for key, value in addresses.items():
            if keys.parse_ip_key(key) is None:
                continue
            try:
                number = IPIdentityPair.from_json(value).identity
            except WireError:
                continue
            if number in self._numbers.taken:
                found.add(self._numbers.taken[number].owner)
        return found

    def _dealt_vips(self) -> Dealer:
        """The addresses of our own range that services have or had. A service's key is its owner's."""
        network = self.own.service_range4
        taken: dict[int, Allocation] = {}
        for key, value in self.inputs.previous.items():
            service = keys.parse_vip_key(key)
            if service is None:
                continue
            try:
                document = Fields(jsontext.loads(value, DocumentError), DocumentError)
                by = document.text("by")
                # That of Kubernetes is not ours to deal; ours is kept beside it.
                name = "kept" if by == BY_KUBERNETES else "ipv4"
                if document.optional_text(name) is None:
                    continue
                address, released = document.address4(name), document.optional_text("released")
            except DocumentError:
                self.problem(key, "is no allocation of an address; a new one is made")
                continue
            if address not in network:
                self.problem(key, f"{address} is not in this cluster's service range {network}")
                continue
            owner = Allocation("/".join(service), "", released, "" if by == BY_KUBERNETES else by)
            if taken.setdefault(int(address), owner) is not owner:
                self.problem(key, f"{address} belongs to {taken[int(address)].owner} already; a new one is made")
        pool = range(int(network.network_address) + 1, int(network.broadcast_address))
        # What peers alone ask for is theirs to invent: it must not use up what our own services need.
        return Dealer(taken, pool, keys.VIPS_PREFIX, "service address", self.inputs.now, self.problem, len(pool) // 2)

    def _wanted_vip(self, service: str, entry: _Definition | None, offer: _Offer | None) -> str | None:
        """For whom `service` needs an address of ours (see `BY_PEERS`); None: for nobody."""
        if entry is not None:
            if offer is not None and offer.address is not None:
                return None
            held = self._vips.of(service)
            if self._becomes_service(service, entry) and (held is None or held.released is not None):
                return None  # in a moment it has Kubernetes' address
            return ""
        if offer is not None:
            return None
        if service in self.inputs.peers.names:
            return BY_PEERS
        dealt = self._vips.of(service)
        stays = dealt is not None and dealt.by == BY_PEERS and dealt.released is None and not self.inputs.peers.complete
        return BY_PEERS if stays else None

    def _becomes_service(self, service: str, entry: _Definition) -> bool:
        """Whether the registrar is about to make a definition a Service of Kubernetes."""
        wanted = entry.definition is not None and entry.definition.kubernetes
        return wanted and self._catalog is not None and service not in self.inputs.unwritable

    def _wanted_vips(
        self, definitions: Mapping[tuple[str, str], _Definition], offers: Mapping[tuple[str, str], _Offer]
    ) -> dict[str, str]:
        found = {}
        services = {*definitions, *offers}
        services.update(_pair(name) for name in {*self.inputs.peers.names, *self._vips.owners()})
        for service in services:
            name = "/".join(service)
            by = self._wanted_vip(name, definitions.get(service), offers.get(service))
            if by is not None:
                found[name] = by
        return found

    def _vip(self, service: str, offer: _Offer | None) -> str:
        """The document of a service's address."""
        number, entry = self._vips.number(service), self._vips.of(service)
        ours = None if number is None else str(IPv4Address(number))
        document: dict[str, str | int | None] = {"ipv4": ours, "ipv6": None}
        if offer is not None:
            document["ipv4"] = offer.address or (ours if entry is not None and entry.released is None else None)
            document |= {"released": None, "by": BY_KUBERNETES, "affinity": offer.affinity, "kept": ours}
            if offer.session_affinity:
                document["session_affinity"] = offer.session_affinity
        elif entry is not None:
            document["released"] = entry.released
            if entry.by:
                document["by"] = entry.by
        return json.dumps(document)

    def _allocation(self, key: str, value: str) -> Allocation:
        found = _identity_allocation(value)
        if found is None:
            self.problem(key, "is no allocation of an identity; its number is not dealt")
            return Allocation("", "", None)
        return found

    # --- services

    def _definitions(self) -> dict[tuple[str, str], _Definition]:
        found = {}
        for key, value in sorted(self.inputs.services.items()):
            service = keys.parse_service_definition_key(key)
            if service is None:
                self.problem(key, "is not <namespace>/<name>")
                continue
            definition: ServiceDefinition | None
            try:
                definition = ServiceDefinition.from_json(value)
                if (definition.namespace, definition.name) != service:
                    raise DocumentError("namespace or name differs from key")
            except DocumentError as error:
                self.problem(key, str(error))
                definition = None
            found[service] = _Definition(definition, self._before(*service))
        return found

    def _before(self, namespace: str, name: str) -> tuple[str, str] | None:
        for key in (keys.service_key(self.own.name, namespace, name), keys.local_service_key(namespace, name)):
            if key in self.inputs.previous:
                return key, self.inputs.previous[key]
        return None

    def _offered(self) -> Iterator[tuple[str, str]]:
        """The global services of Kubernetes, as far as they are known."""
        if self._catalog is not None:
            yield from self._catalog.services()
        for key, value in self.inputs.previous.items() if self._holding else ():
            service = keys.parse_vip_key(key)
            if service is not None and _fields(value).get("by") == BY_KUBERNETES:
                yield service

    def _offer(self, service: tuple[str, str]) -> _Offer | None:
        if self._catalog is None:
            return self._held_offer(service)
        facts = self._catalog.services().get(service)
        if facts is None:
            return None
        definition = None
        ours = service in self._catalog.written(SERVICES)
        if ours:
            entry = self._definitions_found.get(service)
            definition = None if entry is None else entry.definition
            if entry is None or not (definition is None or definition.kubernetes):
                return None  # on its way out: the definition is the truth
        where = f"kubernetes services {'/'.join(service)}"
        address, range4 = facts.address, self.own.cluster_ips4
        if address is not None and (range4 is None or IPv4Address(address) not in range4):
            self.problem(where, f"its address {address} is not in {range4}, the estate's kubernetes.service_range")
            address = None
        ports, names = self._catalog.backends(service)
        backends: dict[str, dict[str, L4Addr]] = {}
        hostnames = {}
        strange = []
        for endpoint, (node, entries) in sorted(ports.items()):
            if self._is_pods(endpoint):
                target = endpoint if not node or node in self._places else None
            else:
                # Of the host network: the mesh knows the machine by its mesh address.
                target = self._mesh_of.get(endpoint)
            if target is None:
                strange.append(endpoint)
                continue
            backends.setdefault(target, {}).update(entries)
            if endpoint in names:
                hostnames[target] = names[endpoint]
        if strange:
            self.problem(where, f"{len(strange)} endpoints are on no host of the mesh, {strange[0]} for one")
        return _Offer(
            address,
            facts.ports,
            backends,
            hostnames,
            facts.labels if definition is None else definition.labels,
            facts.selector if definition is None else definition.backend_labels or {},
            facts.shared,
            facts.affinity,
            facts.session_affinity,
            ours,
        )

    def _held_offer(self, service: tuple[str, str]) -> _Offer | None:
        """As it was published, without what machines add to it."""
        vip = _fields(self.inputs.previous.get(keys.vip_key(*service), ""))
        if not self._holding or vip.get("by") != BY_KUBERNETES:
            return None
        try:
            before = ClusterService.from_json(self.inputs.previous[keys.service_key(self.own.name, *service)])
        except (KeyError, WireError):
            return None
        address = vip.get("ipv4") if vip.get("ipv4") != vip.get("kept") else None
        if not isinstance(address, str) or _number(address) < 0:
            address = None
        nodes = {host["mesh4"] for host in self.hosts.values()}
        return _Offer(
            address,
            {} if address is None else before.frontends.get(address, {}),
            {one: ports for one, ports in before.backends.items() if one in nodes or self._is_pods(one)},
            before.hostnames,
            before.labels,
            before.selector,
            before.shared,
            "local" if vip.get("affinity") == "local" else "remote" if vip.get("affinity") == "remote" else "none",
            session_affinity if isinstance(session_affinity := vip.get("session_affinity"), int) else 0,
        )

    def _service(
        self, service: tuple[str, str], entry: _Definition | None, offer: _Offer | None, number: int | None
    ) -> tuple[str, str] | None:
        """Key and value of a service."""
        definition = entry.definition if entry is not None else None
        if offer is None and definition is None:
            return entry.before if entry is not None else None
        before = _backends(entry.before if entry is not None else None)
        frontends: dict[str, PortMap] = {}
        backends: dict[str, PortMap] = {}
        if definition is not None:
            if number is not None:
                frontends[str(IPv4Address(number))] = {
                    port.name: L4Addr(port.protocol, port.port) for port in definition.ports
                }
            backends.update(self._ready_machines(definition, before.keys()))
        elif entry is not None:  # it cannot be read: what machines gave stands
            machines = {workload.address for workload in self._workloads_found}
            backends.update((address, ports) for address, ports in before.items() if address in machines)
        self.machines[service] = dict(backends)
        if offer is not None:
            if offer.address is not None:
                frontends = {offer.address: offer.ports}
                if (
                    definition is not None
                    and not offer.ours
                    and offer.ports.keys().isdisjoint(port.name for port in definition.ports)
                ):
                    self.problem(
                        keys.service_definition_key(*service),
                        "no port has the name of one of the Kubernetes Service's ports: no backend of one serves the "
                        "other",
                    )
            backends.update(offer.backends)
        is_global = offer is not None or (definition is not None and definition.is_global)
        if offer is not None:
            labels, selector, shared = offer.labels, offer.selector, offer.shared
        else:
            assert definition is not None
            labels, selector = definition.labels, definition.backend_labels or {}
            shared = is_global and definition.shared
        key = keys.service_key(self.own.name, *service) if is_global else keys.local_service_key(*service)
        value = ClusterService(
            cluster=self.own.name,
            namespace=service[0],
            name=service[1],
            cluster_id=self.own.id,
            frontends=frontends,
            backends=backends,
            hostnames={} if offer is None else offer.hostnames,
            labels=labels,
            selector=selector,
            include_external=is_global,
            shared=shared,
        )
        return key, value.to_json()

    def _ready_machines(self, definition: ServiceDefinition, before: Container[str]) -> dict[str, PortMap]:
        full = f"{definition.namespace}/{definition.name}"
        found: dict[str, PortMap] = {}
        for workload in self._workloads_found:
            if not definition.selects(workload.node, workload.namespace, workload.name, workload.labels):
                continue
            ready = None if workload.report is None else workload.report.services.get(full)
            if ready is None:  # the agent is silent about it: what was published stands
                self.silent.add(workload.key)
                ready = workload.address in before
            if ready:
                found[workload.address] = {
                    port.name: L4Addr(port.protocol, port.target_port) for port in definition.ports
                }
        return found

    # --- what changed since

    def follow(self, changes: Changes, now: str) -> list[Change]:
        """What the changed Kubernetes objects make of the keys that hang on them, in the order of writing. An identity
        that nobody has any more goes with the next `run`."""
        self._numbers.now = self._vips.now = now
        found: dict[str, str | None] = {}
        for address in sorted(changes.addresses):
            pod = self._pod(address)
            number = None if pod is None else self._numbers.deal(pod.labels)
            value = None
            if pod is not None and number is not None:
                found[keys.alloc_identity_key(number)] = self._allocated(number)
                found[keys.identity_key(number)] = pod.labels
                value = self._pod_address(address, pod, number)
            elif self._catalog is not None:
                self._catalog.rendered.pop(address, None)
            found[keys.ip_key(address)] = value
            found[keys.untranslated_key(address)] = None if value is None or pod is None else pod.untranslated()
        for service in sorted(changes.services):
            self._follow_service(service, found)
        places = {prefix: place for place, prefix in enumerate(owned_prefixes(self.own.name))}

        def place(change: Change) -> int:
            number = next(places[prefix] for prefix in places if change.key.startswith(prefix))
            return -number if change.value is None else number

        ordered = [Change(key, value) for key, value in found.items()]
        return sorted(ordered, key=lambda change: (change.value is None, place(change)))

    def _follow_service(self, service: tuple[str, str], found: dict[str, str | None]) -> None:
        name, entry, offer = "/".join(service), self._definitions_found.get(service), self._offer(service)
        by = self._wanted_vip(name, entry, offer)
        number = None
        if by is None:
            self._vips.release(name)
        else:
            number = self._vips.deal(name, by)
        known = offer is not None or self._vips.of(name) is not None
        found[keys.vip_key(*service)] = self._vip(name, offer) if known else None
        found[keys.service_key(self.own.name, *service)] = found[keys.local_service_key(*service)] = None
        value = self._service(service, entry, offer, number)
        if value is not None:
            found[value[0]] = value[1]


@functools.lru_cache(maxsize=131_072)
def _identity_allocation(value: str) -> Allocation | None:
    """An identity's allocation, None when it is none. Jobs leave thousands of released ones behind."""
    try:
        document = Fields(jsontext.loads(value, DocumentError), DocumentError)
        return Allocation(document.text("labels", None), document.text("created"), document.optional_text("released"))
    except DocumentError:
        return None


@dataclass(frozen=True, slots=True)
class _Definition:
    definition: ServiceDefinition | None  # None: the document cannot be read
    before: tuple[str, str] | None  # key and value that are published now


def cluster_config(own: Own) -> str:
    """The value of `cilium/cluster-config/<own>`."""
    return ClusterConfig(id=own.id, synced_canaries=True, max_connected_clusters=own.max_clusters).to_json()


def _hosts(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The hosts that this cluster's document has, by name."""
    present = record.get("state") != "absent"
    return {
        name: host
        for name, host in sorted(record.get("hosts", {}).items())
        if present and host.get("state") != "absent"
    }


def _addresses(host: Mapping[str, Any]) -> tuple[NodeAddress, ...]:
    """The first InternalIP is the tunnel endpoint: the address that others dial, but those of the host's own site."""
    found = [NodeAddress("InternalIP", host["advertise4"])]
    if host["underlay4"] != host["advertise4"]:
        found.append(NodeAddress("ExternalIP", host["underlay4"]))
    return (*found, NodeAddress("CiliumInternalIP", host["mesh4"]))


def _backends(before: tuple[str, str] | None) -> Mapping[str, PortMap]:
    if before is None:
        return {}
    try:
        return ClusterService.from_json(before[1]).backends
    except WireError:
        return {}


def _fields(value: str) -> dict[str, Any]:
    """A document's fields; none when it is no JSON object."""
    try:
        found = jsontext.loads(value, DocumentError)
    except DocumentError:
        return {}
    return found if isinstance(found, dict) else {}


def _pair(service: str) -> tuple[str, str]:
    namespace, _, name = service.partition("/")
    return namespace, name


def _ranges(own: Own) -> str:
    return f"{', '.join(map(str, own.pod_ranges4))}, the estate's kubernetes.pod_ranges"


@functools.lru_cache(maxsize=131_072)
def _number(address: str) -> int:
    """An IPv4 address as a number; -1 for anything else."""
    try:
        return int(IPv4Address(address))
    except ValueError:
        return -1


def seconds_between(earlier: str, later: str) -> float:
    """Seconds from one RFC 3339 time in UTC to another; 0 when one of them is none."""
    times = parse_time(earlier), parse_time(later)
    return 0.0 if times[0] is None or times[1] is None else (times[1] - times[0]).total_seconds()
