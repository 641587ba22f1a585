# SPDX-License-Identifier: GPL-3.0-or-later
"""What this cluster publishes, computed from its record and its agents' reports. Pure: no IO, no clock.

The record (operator's) says who exists and which range, address, labels and service account each has; the reports
(agents') say what is ready, and never more than that: an agent cannot claim another's range or address nor change an
identity. A document that is missing or does not parse withdraws nothing: what was published of that host, workload
or service before stays as long as the record (or the service definition's key) lists it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from isthmus_mesh import jsontext, keys
from isthmus_mesh.documents import DocumentError, NodeReport, ServiceDefinition, WorkloadReport
from isthmus_mesh.identity import identity_range, workload_labels
from isthmus_mesh.jsontext import Fields
from isthmus_mesh.wire import (
    ClusterConfig,
    ClusterService,
    IPIdentityPair,
    L4Addr,
    Node,
    NodeAddress,
    WireError,
    labels_to_string,
)

UNDERLAY_MTU_ANNOTATION = "isthmus.io/underlay-mtu"
QUARANTINE = timedelta(days=30)
"""How long a released number or address is not given to another owner."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """An input that could not be used as it is: which key, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Own:
    """The publishing cluster."""

    name: str
    id: int
    max_clusters: int
    service_range4: IPv4Network


@dataclass(frozen=True, slots=True)
class Inputs:
    """`record` is this cluster's document of the estate record; the others are etcd keys with their values.

    `previous`: what is published and allocated now, by key (see `owned_prefixes`). `now` is RFC 3339 in UTC.
    `draining`: hosts that the record lacks and whose node and addresses stay published all the same (see `leaving`).
    """

    record: Mapping[str, Any]
    nodes: Mapping[str, bytes]
    workloads: Mapping[str, bytes]
    services: Mapping[str, bytes]
    previous: Mapping[str, str]
    now: str
    draining: frozenset[str] = frozenset()


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
        keys.ALLOC_IDENTITIES_PREFIX,
        keys.VIPS_PREFIX,
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
    gone = [
        Change(key, None)
        for prefix in reversed(order)
        for key in sorted(actual)
        if key.startswith(prefix) and key not in wanted
    ]
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
    return _Publisher(own, inputs).run()


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


class _Publisher:
    def __init__(self, own: Own, inputs: Inputs) -> None:
        self.own = own
        self.inputs = inputs
        self.problems: set[Problem] = set()
        self.silent: set[str] = set()
        self.hosts = _hosts(inputs.record)

    def problem(self, key: str, reason: str) -> None:
        self.problems.add(Problem(key, reason))

    def run(self) -> Publication:
        nodes = self._nodes()
        workloads = self._workloads(nodes)
        draining = self._draining({workload.address for workload in workloads})
        numbers, allocations = self._identities(workloads, draining)
        definitions = self._definitions()
        vips, vip_documents = self._vips(definitions)
        wanted: dict[str, str] = {}
        wanted.update(allocations)
        wanted.update(vip_documents)
        for labels, number in sorted(numbers.items(), key=lambda item: item[1]):
            wanted[keys.identity_key(number)] = labels
        wanted.update(nodes)
        for workload in workloads:
            if (labels := self._labels(workload)) in numbers:
                wanted[keys.ip_key(workload.address)] = self._address(workload, numbers[labels])
        wanted.update(draining)
        wanted.update(self._services(definitions, vips, workloads))
        return Publication(wanted, tuple(sorted(self.problems)), tuple(sorted(self.silent)))

    # --- nodes

    def _nodes(self) -> dict[str, str]:
        for key in self.inputs.nodes:
            if keys.parse_node_report_key(key) not in self.hosts:
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
        for field, (claimed, recorded) in claims.items():
            if claimed != recorded:
                self.problem(key, f"{field} {claimed!r} is not {recorded!r}, which the estate record gives this host")
                return None
        known = {host["advertise4"], host["underlay4"], host["mesh4"]}
        for _, address in report.addresses:
            if address not in known:
                self.problem(key, f"address {address} is not the host's in the estate record; it is not published")
        annotations = {UNDERLAY_MTU_ANNOTATION: str(report.mtu)} if report.mtu else {}
        return Node(
            name=name,
            cluster=self.own.name,
            cluster_id=self.own.id,
            addresses=_addresses(host),
            ipv4_alloc_cidr=IPv4Network(host["range4"]),
            labels={"kubernetes.io/hostname": name, **host.get("labels", {})},
            annotations=annotations,
            boot_id=report.boot_id,
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
        fits = node.ipv4_alloc_cidr == IPv4Network(host["range4"]) and node.addresses == _addresses(host)
        return before if fits else None

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
        for key, value in self.inputs.previous.items():
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
        return IPIdentityPair(
            ip=workload.address,
            identity=number,
            host_ip=self.hosts[workload.node]["advertise4"],
            namespace=workload.namespace,
            pod_name=workload.name,
            service_account=workload.service_account,
        ).to_json()

    # --- allocations

    def _identities(
        self, workloads: list[_Workload], draining: Mapping[str, str]
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Label string -> number of those in use, and the documents of all allocations, tombstones included."""
        first, last = identity_range(self.own.id, self.own.max_clusters)
        taken: dict[int, _Allocation] = {}
        for key, value in self.inputs.previous.items():
            number = keys.parse_alloc_identity_key(key)
            if number is not None:
                taken[number] = self._allocation(key, value)
        # The published identity is a second witness: a number that peers may have seen is never dealt anew.
        for key, value in self.inputs.previous.items():
            parsed = keys.parse_identity_key(key)
            if parsed is not None and parsed[0] is None and parsed[1] not in taken:
                taken[parsed[1]] = _Allocation(value, self.inputs.now, None)
        wanted = sorted((set(map(self._labels, workloads)) | self._owners(draining, taken)) - {""})
        pool = iter(range(first + 1, last + 1))
        numbers = self._deal(taken, wanted, pool, keys.ALLOC_IDENTITIES_PREFIX, "identity number")
        documents = {
            keys.alloc_identity_key(number): json.dumps(
                {"labels": entry.owner, "created": entry.created, "released": entry.released}
            )
            for number, entry in sorted(taken.items())
        }
        return numbers, documents

    def _owners(self, addresses: Mapping[str, str], taken: Mapping[int, _Allocation]) -> set[str]:
        """Label strings of the identities that published `addresses` have."""
        found = set()
        for key, value in addresses.items():
            if keys.parse_ip_key(key) is None:
                continue
            try:
                number = IPIdentityPair.from_json(value).identity
            except WireError:
                continue
            if number in taken:
                found.add(taken[number].owner)
        return found

    def _vips(self, definitions: Mapping[tuple[str, str], _Definition]) -> tuple[dict[str, str], dict[str, str]]:
        """Service ("<ns>/<name>") -> address of those in use, and the documents of all, tombstones included."""
        taken: dict[int, _Allocation] = {}
        for key, value in self.inputs.previous.items():
            service = keys.parse_vip_key(key)
            if service is None:
                continue
            try:
                document = Fields(jsontext.loads(value, DocumentError), DocumentError)
                address, released = document.address4("ipv4"), document.optional_text("released")
            except DocumentError:
                self.problem(key, "is no allocation of an address; a new one is made")
                continue
            if address not in self.own.service_range4:
                self.problem(key, f"{address} is not in this cluster's service range {self.own.service_range4}")
                continue
            owner = _Allocation("/".join(service), "", released)
            if taken.setdefault(int(address), owner) is not owner:
                self.problem(key, f"{address} belongs to {taken[int(address)].owner} already; a new one is made")
        network = self.own.service_range4
        pool = iter(range(int(network.network_address) + 1, int(network.broadcast_address)))
        wanted = sorted("/".join(service) for service in definitions)
        numbers = self._deal(taken, wanted, pool, keys.VIPS_PREFIX, "service address")
        documents = {}
        for number, entry in sorted(taken.items()):
            namespace, _, name = entry.owner.partition("/")
            documents[keys.vip_key(namespace, name)] = json.dumps(
                {"ipv4": str(IPv4Address(number)), "ipv6": None, "released": entry.released}
            )
        return {owner: str(IPv4Address(number)) for owner, number in numbers.items()}, documents

    def _allocation(self, key: str, value: str) -> _Allocation:
        try:
            document = Fields(jsontext.loads(value, DocumentError), DocumentError)
            return _Allocation(
                document.text("labels", None), document.text("created"), document.optional_text("released")
            )
        except DocumentError:
            self.problem(key, "is no allocation of an identity; its number is not dealt")
            return _Allocation("", "", None)

    def _deal(
        self, taken: dict[int, _Allocation], wanted: list[str], pool: Iterable[int], prefix: str, what: str
    ) -> dict[str, int]:
        """Give every wanted owner its number, the same as before if it had one; mark the others released.

        Fresh numbers come first; one that was released more than `QUARANTINE` ago is dealt anew only when no fresh
        one is left.
        """
        of_owner = {entry.owner: number for number, entry in sorted(taken.items(), reverse=True)}
        owners = set(wanted)
        dealt: dict[str, int] = {}
        for number, entry in taken.items():
            if entry.owner in owners and of_owner[entry.owner] == number:
                dealt[entry.owner] = number
                taken[number] = _Allocation(entry.owner, entry.created, None)
            elif entry.released is None:
                taken[number] = _Allocation(entry.owner, entry.created, self.inputs.now)
        fresh = iter(pool)
        for owner in wanted:
            if owner in dealt:
                continue
            free = next((candidate for candidate in fresh if candidate not in taken), None)
            if free is None:
                free = self._expired(taken)
            if free is None:
                self.problem(prefix + owner, f"no {what} is left in this cluster's range")
                continue
            taken[free] = _Allocation(owner, self.inputs.now, None)
            dealt[owner] = free
        return dealt

    def _expired(self, taken: Mapping[int, _Allocation]) -> int | None:
        now = _time(self.inputs.now)
        for number, entry in sorted(taken.items()):
            if entry.released is not None and now is not None:
                released = _time(entry.released)
                if released is not None and now - released > QUARANTINE:
                    return number
        return None

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

    def _services(
        self,
        definitions: Mapping[tuple[str, str], _Definition],
        vips: Mapping[str, str],
        workloads: list[_Workload],
    ) -> dict[str, str]:
        found = {}
        for (namespace, name), entry in definitions.items():
            if entry.definition is None:
                if entry.before is not None:
                    found[entry.before[0]] = entry.before[1]
                continue
            vip = vips.get(f"{namespace}/{name}")
            service = self._service(entry.definition, vip, _backends(entry.before), workloads)
            if entry.definition.is_global:
                key = keys.service_key(self.own.name, namespace, name)
            else:
                key = keys.local_service_key(namespace, name)
            found[key] = service.to_json()
        return found

    def _service(
        self, definition: ServiceDefinition, vip: str | None, before: frozenset[str], workloads: list[_Workload]
    ) -> ClusterService:
        full = f"{definition.namespace}/{definition.name}"
        backends = {}
        for workload in workloads:
            if not definition.selects(workload.node, workload.namespace, workload.name, workload.labels):
                continue
            ready = None if workload.report is None else workload.report.services.get(full)
            if ready is None:  # the agent is silent about it: what was published stands
                self.silent.add(workload.key)
                ready = workload.address in before
            if ready:
                backends[workload.address] = {
                    port.name: L4Addr(port.protocol, port.target_port) for port in definition.ports
                }
        frontends = {vip: {port.name: L4Addr(port.protocol, port.port) for port in definition.ports}} if vip else {}
        return ClusterService(
            cluster=self.own.name,
            namespace=definition.namespace,
            name=definition.name,
            cluster_id=self.own.id,
            frontends=frontends,
            backends=backends,
            labels=definition.labels,
            selector=definition.backend_labels or {},
            include_external=definition.is_global,
            shared=definition.is_global and definition.shared,
        )


@dataclass(frozen=True, slots=True)
class _Allocation:
    owner: str
    created: str
    released: str | None


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
    """The first InternalIP is the tunnel endpoint: the address that others dial."""
    found = [NodeAddress("InternalIP", host["advertise4"])]
    if host["underlay4"] != host["advertise4"]:
        found.append(NodeAddress("ExternalIP", host["underlay4"]))
    return (*found, NodeAddress("CiliumInternalIP", host["mesh4"]))


def _backends(before: tuple[str, str] | None) -> frozenset[str]:
    if before is None:
        return frozenset()
    try:
        return frozenset(ClusterService.from_json(before[1]).backends)
    except WireError:
        return frozenset()


def seconds_between(earlier: str, later: str) -> float:
    """Seconds from one RFC 3339 time in UTC to another; 0 when one of them is none."""
    times = _time(earlier), _time(later)
    return 0.0 if times[0] is None or times[1] is None else (times[1] - times[0]).total_seconds()


def _time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return None
