# SPDX-License-Identifier: GPL-3.0-or-later
"""What a registrar writes into its Kubernetes: Services for machine services, and EndpointSlices of what serves
elsewhere in the mesh. Pure.

A machine service with `kubernetes: true` is a Service without a selector, so that pods use it by the cluster's own DNS.
Its backends, and for headless services and those with Cilium's annotation the backends on machines and in other
clusters, are EndpointSlices: they reach whoever does not go through the mesh's own translation, such as kube-proxy's
NodePort, ingress controllers and clients of headless services. Shapes: core/v1 Service, discovery.k8s.io/v1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from isthmus_mesh import ownership
from isthmus_mesh.documents import ServiceDefinition
from isthmus_mesh.wire import ClusterService, L4Addr, PortMap, WireError

from .catalog import Catalog
from .objects import (
    AFFINITY,
    GLOBAL,
    SERVICE_NAME,
    SERVICES,
    SHARED,
    SLICE_MANAGED_BY,
    SLICE_MANAGER,
    SLICES,
    ObjectKey,
    ServiceFacts,
    Written,
)

SOURCE_CLUSTER = "multicluster.kubernetes.io/source-cluster"
"""Label of a slice: whose backends it has (the Multi-Cluster Services API's name for that)."""
HEADLESS = "service.kubernetes.io/headless"
"""Label of a slice that kube-proxy has nothing to do with, as Kubernetes' own controller sets it."""
LABELS = "isthmus.io/labels"
"""Annotation of a Service of ours: which of its labels the definition gave it, so that they go with it."""
MAX_ENDPOINTS = 100
"""Of a slice, as Kubernetes' own controller has it; the API takes 1000."""

CREATE, PATCH, DELETE = "create", "patch", "delete"

_Ports = tuple[tuple[str, str, int], ...]  # name, protocol, port
_Group = tuple[str, _Ports]  # of slices: the cluster whose backends they have, and the ports


@dataclass(frozen=True, slots=True)
class Step:
    """One write: what is to be done (`verb`) to an object that is at `version` now (empty: that is not there)."""

    verb: str
    kind: str
    key: ObjectKey
    body: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True, slots=True)
class Mesh:
    """What the mesh has, by service.

    `definitions`: those of this cluster (None: it cannot be read). `machines`: backends on machines of this cluster.
    `remote`: what peers offer, by cluster, as it is mirrored. `unknown`: peers of which not all is known: what was
    written of theirs stays as it is.
    """

    definitions: Mapping[ObjectKey, ServiceDefinition | None]
    machines: Mapping[ObjectKey, Mapping[str, PortMap]]
    remote: Mapping[ObjectKey, Mapping[str, str]]
    unknown: frozenset[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """`steps` in the order in which they are to be taken; `problems` by service: why it cannot be a Service."""

    steps: list[Step]
    problems: dict[ObjectKey, str]


class Planner:
    """Compares what is wanted with what is there. Remembers which services were as they should be, so that a change
    costs what changed."""

    def __init__(self, estate: str, cluster: str) -> None:
        self._cluster = cluster
        self._own = ownership.labels(estate, cluster)
        self._good: dict[ObjectKey, tuple[object, ...]] = {}

    def plan(self, catalog: Catalog, mesh: Mesh) -> Plan:
        """What is to be written; `catalog` must be complete (`Catalog.synced`)."""
        steps: list[Step] = []
        problems: dict[ObjectKey, str] = {}
        for key, definition in sorted(mesh.definitions.items()):
            if definition is not None and definition.kubernetes:
                problem = self._service(catalog, key, definition, steps)
                if problem:
                    problems[key] = problem
        gone = [
            Step(DELETE, SERVICES, key, version=there.version)
            for key, there in sorted(catalog.written(SERVICES).items())
            if not self._stays(mesh, key)
        ]
        self._slices(catalog, mesh, steps, gone)
        return Plan(steps + gone, problems)

    # --- Services

    def _stays(self, mesh: Mesh, key: ObjectKey) -> bool:
        """Whether our Service `key` is still wanted: while its definition cannot be read, nobody knows."""
        if key not in mesh.definitions:
            return False
        definition = mesh.definitions[key]
        return definition is None or definition.kubernetes

    def _service(self, catalog: Catalog, key: ObjectKey, definition: ServiceDefinition, steps: list[Step]) -> str:
        """Adds what makes the Service of a definition so; why that cannot be, or nothing."""
        there = catalog.written(SERVICES).get(key)
        if there is not None:
            change = service_change(there, definition, self._own)
            if change:
                steps.append(Step(PATCH, SERVICES, key, change, there.version))
            return ""
        if catalog.has_service(key):
            return (
                "there is a Service of that name that is not ours; it is left alone. Next: remove it, or annotate it "
                f"{GLOBAL[0]}=true and take `kubernetes: true` from the mesh's service"
            )
        if not catalog.has_namespace(key[0]):
            return f"there is no namespace {key[0]}, so it cannot be a Service. Next: make the namespace"
        steps.append(Step(CREATE, SERVICES, key, service_object(definition, self._own)))
        return ""

    # --- EndpointSlices

    def _slices(self, catalog: Catalog, mesh: Mesh, steps: list[Step], gone: list[Step]) -> None:
        there: dict[ObjectKey, dict[str, Written]] = {}
        for (namespace, name), found in sorted(catalog.written(SLICES).items()):
            there.setdefault((namespace, found.value["labels"].get(SERVICE_NAME, "")), {})[name] = found
        wanted = dict(self._wanted(catalog, mesh))
        for key in sorted({*there, *wanted}):
            facts, present = wanted.get(key), there.get(key, {})
            ours = key in catalog.written(SERVICES) or not catalog.has_service(key)
            if facts is None and self._stays(mesh, key) and ours:
                continue  # somebody deleted or changed it: it is put right, for the same slices
            made_of = (facts, mesh.machines.get(key), mesh.remote.get(key), mesh.unknown, tuple(present.items()))
            if self._good.get(key) == made_of:
                continue
            made = list(self._slices_of(key, mesh, facts, present))
            for step in made:
                (gone if step.verb == DELETE else steps).append(step)
            if made:
                self._good.pop(key, None)
            else:
                self._good[key] = made_of
        for key in [key for key in self._good if key not in wanted and key not in there]:
            del self._good[key]

    def _wanted(self, catalog: Catalog, mesh: Mesh) -> Iterator[tuple[ObjectKey, ServiceFacts]]:
        """The Services that get slices."""
        ours = catalog.written(SERVICES)
        for key, facts in catalog.services().items():
            if facts.synced if key not in ours else self._stays(mesh, key):
                yield key, facts

    def _slices_of(
        self, key: ObjectKey, mesh: Mesh, facts: ServiceFacts | None, present: Mapping[str, Written]
    ) -> Iterator[Step]:
        """What makes the slices of one service so; without `facts` none is wanted."""
        groups: dict[_Group, dict[str, str]] = {}  # host name (or nothing) by address
        frozen = mesh.unknown if facts is not None else frozenset()
        if facts is not None:
            frozen |= self._gather(key, mesh, facts, groups)
        slices: dict[_Group, dict[str, Written]] = {}
        for name, found in present.items():
            group = _group(found)
            if group[0] not in frozen:
                slices.setdefault(group, {})[name] = found
        for group in sorted({*groups, *slices}):
            yield from self._packed(key, facts, group, groups.get(group, {}), slices.get(group, {}))

    def _gather(
        self, key: ObjectKey, mesh: Mesh, facts: ServiceFacts, groups: dict[_Group, dict[str, str]]
    ) -> frozenset[str]:
        """Sorts the backends into groups; the clusters whose value cannot be read."""
        unread = set()
        self._sort(self._cluster, mesh.machines.get(key, {}), {}, facts, groups)
        for cluster, text in sorted(mesh.remote.get(key, {}).items()):
            try:
                service = ClusterService.from_json(text)
            except WireError:
                unread.add(cluster)
                continue
            if service.shared and cluster not in mesh.unknown:
                self._sort(cluster, service.backends, service.hostnames, facts, groups)
        return frozenset(unread)

    def _sort(
        self,
        cluster: str,
        backends: Mapping[str, PortMap],
        hostnames: Mapping[str, str],
        facts: ServiceFacts,
        groups: dict[_Group, dict[str, str]],
    ) -> None:
        for address, ports in backends.items():
            found = _serving(facts.ports, ports)
            if _usable(address) and (found or not facts.ports):
                groups.setdefault((cluster, found), {})[address] = _hostname(hostnames.get(address, ""))

    def _packed(
        self,
        key: ObjectKey,
        facts: ServiceFacts | None,
        group: _Group,
        endpoints: Mapping[str, str],
        present: Mapping[str, Written],
    ) -> Iterator[Step]:
        """Endpoints stay in the slice in which they are; new ones fill what has room, in the order of their numbers."""
        kept: dict[str, list[str]] = {}
        placed: set[str] = set()
        for name, found in present.items():
            here = [one for one in _addresses(found) if one in endpoints and one not in placed][:MAX_ENDPOINTS]
            placed.update(here)
            kept[name] = here
        rest = sorted(endpoints.keys() - placed, key=IPv4Address)
        for name in _names(key[1], group, kept):
            if not rest:
                break
            here = kept.setdefault(name, [])
            room = MAX_ENDPOINTS - len(here)
            here += rest[:room]
            del rest[:room]
        labels = self._labels(key[1], facts, group[0])
        for name, here in kept.items():
            there = present.get(name)
            where = (key[0], name)
            if not here:
                assert there is not None
                yield Step(DELETE, SLICES, where, version=there.version)
                continue
            content = _content(group[1], {one: endpoints[one] for one in sorted(here, key=IPv4Address)})
            if there is None:
                metadata = {"namespace": key[0], "name": name, "labels": labels}
                body = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4"}
                yield Step(CREATE, SLICES, where, {**body, "metadata": metadata, **content})
            elif not _has(there.value["labels"], labels) or any(
                there.value[part] != entries for part, entries in content.items()
            ):
                yield Step(PATCH, SLICES, where, {"metadata": {"labels": labels}, **content}, there.version)

    def _labels(self, service: str, facts: ServiceFacts | None, cluster: str) -> dict[str, str]:
        return {
            **self._own,
            SERVICE_NAME: service,
            SLICE_MANAGED_BY: SLICE_MANAGER,
            SOURCE_CLUSTER: cluster,
            **({HEADLESS: ""} if facts is not None and facts.headless else {}),
        }


def service_object(definition: ServiceDefinition, own: Mapping[str, str]) -> dict[str, Any]:
    """A new Service for a definition; Kubernetes gives it its address."""
    metadata = {"namespace": definition.namespace, "name": definition.name}
    spec = {"type": "ClusterIP", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**metadata, "labels": _service_labels(definition, own), "annotations": _annotations(definition)},
        "spec": {**spec, "ports": _service_ports(definition)},
    }


def service_change(there: Written, definition: ServiceDefinition, own: Mapping[str, str]) -> dict[str, Any]:
    """What merged into a Service of ours (RFC 7396) makes it so; empty when it is. What others added stays: labels,
    annotations, another type of service with its ports' `nodePort`."""
    labels, annotations, ports = _service_labels(definition, own), _annotations(definition), _service_ports(definition)
    value = there.value
    same = len(ports) == len(value["ports"]) and all(map(_has, value["ports"], ports))
    if same and not value["selector"] and _has(value["labels"], labels) and _has(value["annotations"], annotations):
        return {}
    before = filter(None, value["annotations"].get(LABELS, "").split(","))
    dropped: dict[str, None] = dict.fromkeys(label for label in before if label not in labels)
    spec: dict[str, Any] = {} if same else {"ports": ports}
    if value["selector"]:
        spec["selector"] = None
    return {"metadata": {"labels": {**dropped, **labels}, "annotations": annotations}, "spec": spec}


def _service_labels(definition: ServiceDefinition, own: Mapping[str, str]) -> dict[str, str]:
    return {**definition.labels, **own}


def _annotations(definition: ServiceDefinition) -> dict[str, str]:
    return {
        GLOBAL[0]: "true",
        SHARED[0]: "true" if definition.shared else "false",
        AFFINITY[0]: definition.affinity,
        LABELS: ",".join(sorted(definition.labels)),
    }


def _service_ports(definition: ServiceDefinition) -> list[dict[str, Any]]:
    return [
        {
            **({"name": port.name} if port.name else {}),
            "protocol": port.protocol,
            "port": port.port,
            "targetPort": port.target_port,
        }
        for port in definition.ports
    ]


def _serving(fronts: Mapping[str, L4Addr], ports: PortMap) -> _Ports:
    """The ports on which a backend serves those of the Service: port names decide, as everywhere in the mesh."""
    return tuple(
        (name, front.protocol, found.port)
        for name, front in sorted(fronts.items())
        if (found := ports.get(name)) is not None and found.port and found.protocol in (front.protocol, "ANY")
    )


def _content(ports: _Ports, endpoints: Mapping[str, str]) -> dict[str, Any]:
    conditions = {"ready": True, "serving": True, "terminating": False}
    return {
        "ports": [{"name": name, "protocol": protocol, "port": port} for name, protocol, port in ports],
        "endpoints": [
            {"addresses": [address], "conditions": conditions, **({"hostname": hostname} if hostname else {})}
            for address, hostname in endpoints.items()
        ],
    }


def _group(slice_: Written) -> _Group:
    ports = tuple(
        (one.get("name") or "", one.get("protocol") or "", one.get("port") or 0) for one in slice_.value["ports"]
    )
    return slice_.value["labels"].get(SOURCE_CLUSTER, ""), ports


def _addresses(slice_: Written) -> Iterator[str]:
    for endpoint in slice_.value["endpoints"]:
        yield from endpoint.get("addresses") or ()


def _names(service: str, group: _Group, taken: Iterable[str]) -> Iterator[str]:
    """The slices of a group: those that are there, then new ones."""
    there = sorted(taken)
    yield from there
    digest = hashlib.sha256(repr(group).encode()).hexdigest()[:8]
    number = 0
    while True:
        name = f"{service}-{group[0]}-{digest}-{number}"
        if name not in there:
            yield name
        number += 1


def _usable(address: str) -> bool:
    """Whether the API takes it for an endpoint's address."""
    try:
        found = IPv4Address(address)
    except ValueError:
        return False
    return not (found.is_loopback or found.is_link_local or found.is_multicast or found.is_unspecified)


def _hostname(text: str) -> str:
    """A DNS label, or nothing: the API refuses anything else."""
    fits = 0 < len(text) <= 63 and text.isascii() and text == text.lower() and text.replace("-", "").isalnum()
    return text if fits and text[0] != "-" and text[-1] != "-" else ""


def _has(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(there.get(key) == value for key, value in wanted.items())
