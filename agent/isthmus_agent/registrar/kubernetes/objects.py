# SPDX-License-Identifier: GPL-3.0-or-later
"""What the mesh needs of Kubernetes' objects, taken out of their raw JSON. Pure.

An object of 10 KB becomes facts of some hundred bytes, and two versions of an object whose facts are equal are no
change: a node's heartbeat or a pod's progress costs nothing further. `facts` raises `ObjectError` for an object that
is not what the API promises, and gives None for one that the mesh has nothing to do with.
Shapes: core/v1 and discovery.k8s.io/v1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from typing import Any, Union

from isthmus_mesh.documents import SESSION_AFFINITY_MOST
from isthmus_mesh.jsontext import UINT16
from isthmus_mesh.ownership import COMPONENT, stranger
from isthmus_mesh.wire import PROTOCOLS, L4Addr, NamedPort

NODES, NAMESPACES, PODS, SERVICES, SLICES = "nodes", "namespaces", "pods", "services", "endpointslices"
KINDS = (NODES, NAMESPACES, PODS, SERVICES, SLICES)
"""The resources that are read, by their names in the API."""

GLOBAL = ("service.cilium.io/global", "io.cilium/global-service")
SHARED = ("service.cilium.io/shared", "io.cilium/shared-service")
AFFINITY = ("service.cilium.io/affinity", "io.cilium/service-affinity")
SYNC = ("service.cilium.io/global-sync-endpoint-slices",)
"""Annotations of Cilium (pkg/annotation/k8s.go); the first that is there counts."""
SESSION_DEFAULT = 10_800
"""Seconds of `sessionAffinity: ClientIP` where none are said (core/v1 ClientIPConfig)."""
TRANSLATION = "isthmus.io/socket-translation"
"""Annotation of a pod, or of a namespace for its pods that do not say: `false` leaves their sockets alone."""

SERVICE_NAME = "kubernetes.io/service-name"
SLICE_MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
SLICE_MANAGER = "isthmus-registrar"
"""Label and value of the EndpointSlices that a registrar writes."""

ObjectKey = tuple[str, str]
"""(namespace, name); the namespace is empty for nodes and namespaces."""


class ObjectError(ValueError):
    """An object that must not be used; the text says which field and why."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """`addresses`: its InternalIPs; `pod_cidrs`: empty where the CNI deals single addresses. IPv4 only."""

    pod_cidrs: tuple[IPv4Network, ...]
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamespaceFacts:
    labels: Mapping[str, str]
    translated: bool


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod that has addresses of its own. `created` is RFC 3339; `leaving`: it is being deleted; `translated` is None
    where its namespace decides."""

    node: str
    addresses: tuple[str, ...]
    labels: Mapping[str, str]
    service_account: str
    ports: tuple[NamedPort, ...]
    created: str
    leaving: bool
    uid: str
    translated: bool | None


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """A service that is annotated global. `address` is its ClusterIP, None when it is `headless` or of IPv6 only.

    `synced`: it is to have EndpointSlices of what the rest of the mesh has of it. `session_affinity`: for so many
    seconds a client keeps its backend; 0: not at all.
    """

    address: str | None
    ports: Mapping[str, L4Addr]
    shared: bool
    affinity: str
    labels: Mapping[str, str]
    selector: Mapping[str, str]
    headless: bool
    synced: bool
    session_affinity: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that is ready, or not but still serves: it is on its way out. `node` may be empty."""

    addresses: tuple[str, ...]
    ready: bool
    hostname: str
    node: str


@dataclass(frozen=True, slots=True)
class SliceFacts:
    """A part of the endpoints of `service`, all on the same `ports`."""

    service: str
    ports: Mapping[str, L4Addr] = field(default_factory=dict)
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """An object of ours: what counts of it (`value`, in the API's shape) at `version`."""

    version: str
    value: Mapping[str, Any]


Facts = Union[NodeFacts, NamespaceFacts, PodFacts, ServiceFacts, SliceFacts]


def parse(data: bytes) -> Any:
    """JSON from the API server. ObjectError when it is none."""
    try:
        value = json.loads(data)
        if b"\\ud" in data or b"\\uD" in data:
            # A lone surrogate parses, but breaks whoever writes the text later.
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise ObjectError(f"is no JSON: {error}"[:100]) from None
    return value


def key_of(value: Any) -> ObjectKey:
    """Namespace and name of any object. ObjectError when it has no name."""
    metadata = _object(value, "metadata")
    name = _text(metadata, "name")
    if not name or "/" in name:
        raise ObjectError("metadata.name is no name")
    namespace = _text(metadata, "namespace")
    if "/" in namespace:
        raise ObjectError("metadata.namespace is no name")
    return namespace, name


def facts(kind: str, value: Any) -> Facts | None:
    """What `value`, an object of the resource `kind`, says to the mesh; None: nothing."""
    return _READERS[kind](value)


def written(kind: str, value: Any, own: Mapping[str, str]) -> Written | None:
    """What of `value`, a Service or EndpointSlice, counts to its writer; None when it is not ours (labels `own`)."""
    metadata = _object(value, "metadata")
    labels = _mapping(metadata, "labels")
    if stranger(labels, own) or (kind == SLICES and labels.get(SLICE_MANAGED_BY) != SLICE_MANAGER):
        return None
    if labels.get(COMPONENT):
        return None  # of the mesh's own control plane in this cluster
    found: dict[str, Any] = {"labels": dict(labels), "annotations": dict(_mapping(metadata, "annotations"))}
    if kind == SERVICES:
        spec = _object(value, "spec")
        found |= {"ports": _objects(spec, "ports"), "selector": dict(_mapping(spec, "selector"))}
    else:
        found |= {"ports": _objects(value, "ports"), "endpoints": _objects(value, "endpoints")}
    return Written(_text(metadata, "resourceVersion"), found)


def _node(value: Any) -> NodeFacts:
    spec = _object(value, "spec")
    cidrs = _texts(spec, "podCIDRs") or tuple(filter(None, [_text(spec, "podCIDR")]))
    networks = []
    for text in cidrs:
        try:
            network = ip_network(text)
        except ValueError:
            raise ObjectError(f"spec.podCIDRs: {text[:50]!r} is no network") from None
        if isinstance(network, IPv4Network):
            networks.append(network)
    found = []
    for entry in _objects(_object(value, "status"), "addresses"):
        if _text(entry, "type") == "InternalIP":
            found += _address4(_text(entry, "address"), "status.addresses")
    return NodeFacts(tuple(networks), tuple(found))


def _namespace(value: Any) -> NamespaceFacts:
    metadata = _object(value, "metadata")
    return NamespaceFacts(_mapping(metadata, "labels"), _translated(metadata) is not False)


def _pod(value: Any) -> PodFacts | None:
    metadata, spec, status = _object(value, "metadata"), _object(value, "spec"), _object(value, "status")
    node = _text(spec, "nodeName")
    if not node or spec.get("hostNetwork") is True or _text(status, "phase") in ("Succeeded", "Failed"):
        return None
    addresses: list[str] = []
    for entry in _objects(status, "podIPs"):
        addresses += _address4(_text(entry, "ip"), "status.podIPs")
    if not addresses:
        return None
    ports = []
    for container in _objects(spec, "containers"):
        for port in _objects(container, "ports"):
            name = _text(port, "name")
            if name:
                ports.append(NamedPort(name, _port(port, "containerPort"), _protocol(port)))
    return PodFacts(
        node=node,
        addresses=tuple(dict.fromkeys(addresses)),
        labels=_mapping(metadata, "labels"),
        service_account=_text(spec, "serviceAccountName"),
        ports=tuple(ports),
        created=_text(metadata, "creationTimestamp"),
        leaving=metadata.get("deletionTimestamp") is not None,
        uid=_text(metadata, "uid"),
        translated=_translated(metadata),
    )


def _service(value: Any) -> ServiceFacts | None:
    metadata, spec = _object(value, "metadata"), _object(value, "spec")
    annotations = _mapping(metadata, "annotations")
    if not _true(annotations, GLOBAL, False) or _text(spec, "type") == "ExternalName":
        return None
    address = _text(spec, "clusterIP")
    addresses = () if address in ("", "None") else _texts(spec, "clusterIPs") or (address,)
    of_family4 = [one for text in addresses for one in _address4(text, "spec.clusterIPs")]
    affinity = _annotation(annotations, AFFINITY).lower()
    headless = address == "None"
    return ServiceFacts(
        address=of_family4[0] if of_family4 else None,
        ports=_ports(spec),
        shared=_true(annotations, SHARED, True),
        affinity=affinity if affinity in ("local", "remote") else "none",
        labels=_mapping(metadata, "labels"),
        selector=_mapping(spec, "selector"),
        headless=headless,
        synced=_true(annotations, SYNC, headless),
        session_affinity=_session_affinity(spec),
    )


def _session_affinity(spec: Mapping[str, Any]) -> int:
    if _text(spec, "sessionAffinity") != "ClientIP":
        return 0
    found = _object(_object(spec, "sessionAffinityConfig"), "clientIP").get("timeoutSeconds")
    return found if isinstance(found, int) and 0 < found <= SESSION_AFFINITY_MOST else SESSION_DEFAULT


def _slice(value: Any) -> SliceFacts | None:
    labels = _mapping(_object(value, "metadata"), "labels")
    service = labels.get(SERVICE_NAME)
    if not service or _text(value, "addressType") != "IPv4":
        return None
    if labels.get(SLICE_MANAGED_BY) == SLICE_MANAGER:
        return None  # what the mesh says would come back as what this cluster says
    endpoints = []
    for entry in _objects(value, "endpoints"):
        conditions = _object(entry, "conditions")
        # Unknown is ready, and serving follows ready where it is not said (discovery.k8s.io/v1 EndpointConditions).
        ready = conditions.get("ready") is not False
        serving = ready if conditions.get("serving") is None else conditions["serving"] is True
        addresses = tuple(
            address for text in _texts(entry, "addresses") for address in _address4(text, "endpoints.addresses")
        )
        if addresses and (ready or serving):
            endpoints.append(Endpoint(addresses, ready, _text(entry, "hostname"), _text(entry, "nodeName")))
    return SliceFacts(service, _ports(value), tuple(endpoints))


_READERS: Mapping[str, Callable[[Any], Facts | None]] = {
    NODES: _node,
    NAMESPACES: _namespace,
    PODS: _pod,
    SERVICES: _service,
    SLICES: _slice,
}


def _annotation(annotations: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((annotations[name] for name in names if name in annotations), "")


def _true(annotations: Mapping[str, str], names: tuple[str, ...], default: bool) -> bool:
    text = _annotation(annotations, names)
    return text.lower() == "true" if any(name in annotations for name in names) else default


def _translated(metadata: Mapping[str, Any]) -> bool | None:
    return {"true": True, "false": False}.get(_mapping(metadata, "annotations").get(TRANSLATION, "").lower())


def _ports(value: Any) -> dict[str, L4Addr]:
    found = {}
    for entry in _objects(value, "ports"):
        if entry.get("port") is not None:  # a slice may leave it out: any port
            found[_text(entry, "name")] = L4Addr(_protocol(entry), _port(entry, "port"))
    return found


def _protocol(value: Mapping[str, Any]) -> str:
    protocol = _text(value, "protocol") or "TCP"
    if protocol not in PROTOCOLS:
        raise ObjectError(f"protocol {protocol[:20]!r} is unknown")
    return protocol


def _port(value: Mapping[str, Any], name: str) -> int:
    port = value.get(name)
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= UINT16:
        raise ObjectError(f"{name} is no port")
    return port


def _address4(text: str, where: str) -> list[str]:
    """As one spelling; of IPv6 nothing."""
    try:
        address = ip_address(text)
    except ValueError:
        raise ObjectError(f"{where}: {text[:50]!r} is no address") from None
    return [str(address)] if isinstance(address, IPv4Address) else []


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ObjectError("is no object")
    found = value.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ObjectError(f"{name} is no object")
    return found


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    found = value.get(name) if isinstance(value, dict) else None
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ObjectError(f"{name} is no list of objects")
    return found


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise ObjectError(f"{name} is no text")
    return found


def _texts(value: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = value.get(name)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise ObjectError(f"{name} is no list of texts")
    return tuple(found)


def _mapping(value: Mapping[str, Any], name: str) -> Mapping[str, str]:
    found = _object(value, name)
    if not all(isinstance(key, str) and isinstance(text, str) for key, text in found.items()):
        raise ObjectError(f"{name} is no mapping of texts")
    return found
