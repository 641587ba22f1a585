# SPDX-License-Identifier: BSD-2-Clause
"""The documents under `isthmus/v1/` (docs/architecture.md, "etcd"), read strictly and written as JSON.

`from_json` raises `DocumentError`, with the field that is wrong, for a document that must not be used.
Times are RFC 3339 text, intervals are seconds, addresses are text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from . import jsontext
from .jsontext import UINT16, UINT64, Fields
from .schema import LABEL

PROTOCOLS = ("TCP", "UDP")
SESSION_AFFINITY_MOST = 86_400
"""Seconds for which a client may keep its backend: Kubernetes' bound (core/v1 ClientIPConfig)."""
AFFINITIES = ("none", "local", "remote")
HEALTH_TYPES = ("tcp", "http", "exec")


class DocumentError(ValueError):
    """A document that must not be used; the text is the reason."""


@dataclass(frozen=True)
class ServicePort:
    """`target_port` is the workload's, `port` the service address's."""

    name: str
    port: int
    target_port: int
    protocol: str = "TCP"


@dataclass(frozen=True)
class HealthCheck:
    """How an agent finds out that a workload can serve. `rise` good or `fall` bad results in a row
    turn it; `interval` and `timeout` are seconds. `path` is for http, `command` for exec."""

    type: str
    port: int | None = None
    path: str | None = None
    command: tuple[str, ...] = ()
    interval: float = 1.0
    timeout: float = 1.0
    rise: int = 2
    fall: int = 2

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {"type": self.type}
        if self.path is not None:
            document["path"] = self.path
        if self.command:
            document["command"] = list(self.command)
        if self.port is not None:
            document["port"] = self.port
        document.update({"interval": self.interval, "timeout": self.timeout, "rise": self.rise, "fall": self.fall})
        return document

    @classmethod
    def from_fields(cls, fields: Fields) -> HealthCheck:
        kind = fields.text("type", None)
        if kind not in HEALTH_TYPES:
            fields.fail("type", "is not one of tcp, http, exec")
        port = None if fields.value.get("port") is None else fields.integer("port", UINT16, minimum=1)
        path = fields.optional_text("path")
        command = fields.texts("command")
        if kind in ("tcp", "http") and port is None:
            fields.fail("port", "is missing")
        if kind == "http" and (path is None or not path.startswith("/")):
            fields.fail("path", "does not start with /")
        if kind == "exec" and not command:
            fields.fail("command", "is missing")
        interval, timeout = fields.number("interval", 1.0), fields.number("timeout", 1.0)
        for name, seconds in (("interval", interval), ("timeout", timeout)):
            if not 0.1 <= seconds <= 3600:
                fields.fail(name, "is out of range 0.1..3600")
        return cls(
            type=kind,
            port=port,
            path=path,
            command=command,
            interval=interval,
            timeout=timeout,
            rise=fields.integer("rise", 100, default=2, minimum=1),
            fall=fields.integer("fall", 100, default=2, minimum=1),
        )


@dataclass(frozen=True)
class ServiceDefinition:
    """A service of machines (`isthmus/v1/services/<ns>/<name>`).

    Its backends are the workloads of the same namespace that carry all of `backend_labels`, or the
    named ones (`"<host>/<name>"`) when that is None. `owner` is who may change it: `inventory`,
    `module`, `kubernetes` or `rollout`. `kubernetes`: the registrar makes it a Service of the cluster's
    Kubernetes; in a cluster that is none it says nothing.
    """

    name: str
    namespace: str
    ports: tuple[ServicePort, ...]
    backend_labels: Mapping[str, str] | None = None
    backend_workloads: tuple[str, ...] = ()
    health: HealthCheck | None = None
    is_global: bool = False
    shared: bool = True
    affinity: str = "none"
    labels: Mapping[str, str] = field(default_factory=dict)
    owner: str = "inventory"
    revision: int = 1
    kubernetes: bool = False

    def selects(self, node: str, namespace: str, name: str, labels: Mapping[str, str]) -> bool:
        """Whether a workload is a backend of this service."""
        if namespace != self.namespace:
            return False
        if self.backend_labels is None:
            return f"{node}/{name}" in self.backend_workloads
        return all(labels.get(key) == value for key, value in self.backend_labels.items())

    def to_dict(self) -> dict[str, Any]:
        if self.backend_labels is None:
            backends: dict[str, Any] = {"workloads": list(self.backend_workloads)}
        else:
            backends = {"labels": jsontext.sorted_mapping(self.backend_labels)}
        return {
            "owner": self.owner,
            "revision": self.revision,
            "name": self.name,
            "namespace": self.namespace,
            "ports": [
                {"name": port.name, "port": port.port, "target_port": port.target_port, "protocol": port.protocol}
                for port in self.ports
            ],
            "backends": backends,
            "health": None if self.health is None else self.health.to_dict(),
            "global": self.is_global,
            "shared": self.shared,
            "affinity": self.affinity,
            "labels": jsontext.sorted_mapping(self.labels),
            # Left out where it is false, so that a definition without it is what it was before there was the key.
            **({"kubernetes": True} if self.kubernetes else {}),
        }

    def to_json(self) -> str:
        return jsontext.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, value: Any) -> ServiceDefinition:
        fields = Fields(value, DocumentError)
        ports = tuple(_service_port(entry) for entry in fields.objects("ports"))
        if not ports:
            fields.fail("ports", "is empty")
        if len({(port.port, port.protocol) for port in ports}) < len(ports):
            fields.fail("ports", "has the same port and protocol twice")
        backends = fields.object("backends")
        if ("labels" in backends.value) == ("workloads" in backends.value):
            fields.fail("backends", "needs labels or workloads, and one of them only")
        labels = backends.text_mapping("labels") if "labels" in backends.value else None
        if labels is not None and not labels:
            fields.fail("backends.labels", "is empty")
        affinity = fields.text("affinity", "none")
        if affinity not in AFFINITIES:
            fields.fail("affinity", "is not one of none, local, remote")
        return cls(
            name=_label(fields, "name"),
            namespace=_label(fields, "namespace"),
            ports=ports,
            backend_labels=labels,
            backend_workloads=backends.texts("workloads"),
            health=None if fields.value.get("health") is None else HealthCheck.from_fields(fields.object("health")),
            is_global=fields.boolean("global"),
            shared=fields.boolean("shared", True),
            affinity=affinity,
            labels=fields.text_mapping("labels"),
            owner=_filled(fields, "owner"),
            revision=fields.integer("revision", UINT64),
            kubernetes=fields.boolean("kubernetes"),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> ServiceDefinition:
        return cls.from_dict(jsontext.loads(text, DocumentError))


@dataclass(frozen=True)
class NodeReport:
    """What an agent says of its machine (`isthmus/v1/nodes/<node>`).

    `addresses` are (type, ip) with the types of a Cilium node; ranges are CIDR text; `mtu` is bytes
    of the overlay; `wireguard_public_key` is base64, empty where nothing is encrypted; `wireguard_keys` are all of its
    public keys by UDP port as text, where they are others than that one on Cilium's port.
    """

    name: str
    cluster: str
    addresses: tuple[tuple[str, str], ...]
    range4: str | None = None
    range6: str | None = None
    mesh4: str | None = None
    mesh6: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    mtu: int = 0
    boot_id: str = ""
    wireguard_public_key: str = ""
    wireguard_keys: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return jsontext.dumps(
            {
                "name": self.name,
                "cluster": self.cluster,
                "addresses": [{"Type": kind, "IP": ip} for kind, ip in self.addresses],
                "range4": self.range4,
                "range6": self.range6,
                "mesh4": self.mesh4,
                "mesh6": self.mesh6,
                "labels": jsontext.sorted_mapping(self.labels),
                "mtu": self.mtu,
                "boot_id": self.boot_id,
                "wireguard_public_key": self.wireguard_public_key,
                **({"wireguard_keys": jsontext.sorted_mapping(self.wireguard_keys)} if self.wireguard_keys else {}),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> NodeReport:
        fields = _object(text)
        return cls(
            name=_filled(fields, "name"),
            cluster=_filled(fields, "cluster"),
            addresses=tuple(
                (entry.text("Type", None), _address(entry, "IP", None) or "") for entry in fields.objects("addresses")
            ),
            range4=_range(fields, "range4", 4),
            range6=_range(fields, "range6", 6),
            mesh4=_optional_address(fields, "mesh4", 4),
            mesh6=_optional_address(fields, "mesh6", 6),
            labels=fields.text_mapping("labels"),
            mtu=fields.integer("mtu", UINT16),
            boot_id=fields.text("boot_id"),
            wireguard_public_key=fields.text("wireguard_public_key"),
            wireguard_keys=fields.text_mapping("wireguard_keys"),
        )


@dataclass(frozen=True)
class WorkloadReport:
    """What an agent says of one workload (`isthmus/v1/workloads/<node>/<ns>.<name>`).

    `services` maps `"<ns>/<service>"` to whether the workload is ready to serve it.
    """

    name: str
    namespace: str
    node: str
    service_account: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()
    host_ip: str = ""
    services: Mapping[str, bool] = field(default_factory=dict)

    def to_json(self) -> str:
        return jsontext.dumps(
            {
                "name": self.name,
                "namespace": self.namespace,
                "service_account": self.service_account,
                "node": self.node,
                "labels": jsontext.sorted_mapping(self.labels),
                "addresses": list(self.addresses),
                "host_ip": self.host_ip,
                "services": {name: {"ready": ready} for name, ready in jsontext.sorted_mapping(self.services).items()},
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkloadReport:
        fields = _object(text)
        addresses = fields.texts("addresses")
        for address in addresses:
            _parse_address(fields, "addresses", address)
        services = fields.mapping("services")
        return cls(
            name=_filled(fields, "name"),
            namespace=_filled(fields, "namespace"),
            node=_filled(fields, "node"),
            service_account=fields.text("service_account", "default"),
            labels=fields.text_mapping("labels"),
            addresses=addresses,
            host_ip=_address(fields, "host_ip", None) or "",
            services={
                name: Fields(value, DocumentError, f"services.{name}").boolean("ready")
                for name, value in services.items()
            },
        )


@dataclass(frozen=True)
class Alive:
    """An agent runs (`isthmus/v1/alive/<node>`, with a lease)."""

    node: str
    version: str = ""
    boot_id: str = ""
    since: str = ""

    def to_json(self) -> str:
        return jsontext.dumps(
            {"node": self.node, "version": self.version, "boot_id": self.boot_id, "since": self.since}
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Alive:
        fields = _object(text)
        return cls(_filled(fields, "node"), fields.text("version"), fields.text("boot_id"), fields.text("since"))


@dataclass(frozen=True)
class NodeAllocation:
    """What a node has of the mesh in a cluster whose control plane is in it (`isthmus/v1/alloc/nodes/<node>`).

    `range4` and `mesh4` as a host of the record has them, `underlay4` its InternalIP. `released`: since when Kubernetes
    does not have the node; None: it has it.
    """

    range4: str
    mesh4: str
    underlay4: str
    created: str
    released: str | None = None

    def to_json(self) -> str:
        return jsontext.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> NodeAllocation:
        fields = _object(text)
        network, mesh = fields.network4("range4"), fields.address4("mesh4")
        if mesh not in network:
            fields.fail("mesh4", "is not in range4")
        underlay = fields.address4("underlay4")
        return cls(str(network), str(mesh), str(underlay), fields.text("created"), fields.optional_text("released"))


@dataclass(frozen=True)
class PeerStatus:
    """How the mirror of one peer stands (`isthmus/v1/alloc/peers/<peer>`).

    `last_proof` is the time of the last answer of the peer's etcd, `proof_age` how many seconds old
    that was when this was written (by one clock; None: not known), `last_change` the time of the last
    key taken over; `keys` counts mirrored keys by kind, `refused` refusals by reason. `cluster_id`
    (16 hex digits, as in a canary) and `revision` tell which state of the peer's etcd was believed last.
    """

    state: str
    last_proof: str | None = None
    last_change: str | None = None
    endpoint: str = ""
    cluster_id: str = ""
    revision: int = 0
    keys: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    refused_last: tuple[str, str] | None = None  # (key, reason)
    proof_age: float | None = None

    def to_json(self) -> str:
        last = None if self.refused_last is None else {"key": self.refused_last[0], "reason": self.refused_last[1]}
        return jsontext.dumps(
            {
                "state": self.state,
                "last_proof": self.last_proof,
                "proof_age": self.proof_age,
                "last_change": self.last_change,
                "endpoint": self.endpoint,
                "cluster_id": self.cluster_id,
                "revision": self.revision,
                "keys": jsontext.sorted_mapping(self.keys),
                "refused": jsontext.sorted_mapping(self.refused),
                "refused_last": last,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> PeerStatus:
        fields = _object(text)
        age = None if fields.value.get("proof_age") is None else fields.number("proof_age", 0.0)
        if age is not None and not 0 <= age < float("inf"):
            fields.fail("proof_age", "is not a number of seconds")
        cluster_id = fields.text("cluster_id")
        if cluster_id and not re.fullmatch("[0-9a-f]{16}", cluster_id):
            fields.fail("cluster_id", "is not 16 hex digits")
        last = None
        if fields.value.get("refused_last") is not None:
            entry = fields.object("refused_last")
            last = (entry.text("key"), entry.text("reason"))
        return cls(
            state=_filled(fields, "state"),
            last_proof=fields.optional_text("last_proof"),
            last_change=fields.optional_text("last_change"),
            endpoint=fields.text("endpoint"),
            cluster_id=cluster_id,
            revision=fields.integer("revision", UINT64),
            keys=_counts(fields, "keys"),
            refused=_counts(fields, "refused"),
            refused_last=last,
            proof_age=age,
        )


@dataclass(frozen=True)
class KubernetesStatus:
    """How the registrar stands with the API server of its Kubernetes cluster (`isthmus/v1/alloc/kubernetes`).

    `state` is connected, connecting (not everything was read yet), absent or refused (with `error`, in words), since
    `since`; `objects` counts by kind those that the mesh has to do with; `problems` says what of them is not published.
    """

    server: str
    state: str
    since: str
    error: str | None = None
    objects: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def to_json(self) -> str:
        return jsontext.dumps(
            {
                "server": self.server,
                "state": self.state,
                "since": self.since,
                "error": self.error,
                "objects": jsontext.sorted_mapping(self.objects),
                "problems": list(self.problems),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> KubernetesStatus:
        fields = _object(text)
        return cls(
            server=_filled(fields, "server"),
            state=_filled(fields, "state"),
            since=fields.text("since"),
            error=fields.optional_text("error"),
            objects=_counts(fields, "objects"),
            problems=fields.texts("problems"),
        )


@dataclass(frozen=True)
class Untranslated:
    """A pod whose sockets are left alone (`isthmus/v1/alloc/kubernetes/untranslated/<address>`). The uid tells a pod
    from a later one that has its address."""

    namespace: str
    pod: str
    uid: str

    def to_json(self) -> str:
        return jsontext.dumps({"namespace": self.namespace, "pod": self.pod, "uid": self.uid})

    @classmethod
    def from_json(cls, text: str | bytes) -> Untranslated:
        fields = _object(text)
        return cls(_filled(fields, "namespace"), _filled(fields, "pod"), _filled(fields, "uid"))


def _object(text: str | bytes) -> Fields:
    return Fields(jsontext.loads(text, DocumentError), DocumentError)


def _filled(fields: Fields, name: str) -> str:
    text = fields.text(name, None)
    if not text:
        fields.fail(name, "is empty")
    return text


def _label(fields: Fields, name: str) -> str:
    """A name that becomes part of DNS names: an RFC 1123 label."""
    text = _filled(fields, name)
    if len(text) > LABEL.longest or not re.fullmatch(LABEL.pattern, text):
        fields.fail(name, f"is not {LABEL.rule}")
    return text


def _service_port(fields: Fields) -> ServicePort:
    protocol = fields.text("protocol", "TCP")
    if protocol not in PROTOCOLS:
        fields.fail("protocol", "is not one of TCP, UDP")
    port = fields.integer("port", UINT16, default=None, minimum=1)
    target = fields.integer("target_port", UINT16, default=port, minimum=1)
    return ServicePort(fields.text("name"), port, target, protocol)


def _parse_address(fields: Fields, name: str, text: str) -> int:
    try:
        return ipaddress.ip_address(text).version
    except ValueError as exc:
        raise DocumentError(f"{fields.path(name)} is not an IP address") from exc


def _address(fields: Fields, name: str, version: int | None) -> str | None:
    text = fields.text(name, None)
    found = _parse_address(fields, name, text)
    if version is not None and found != version:
        fields.fail(name, f"is not an IPv{version} address")
    return text


def _optional_address(fields: Fields, name: str, version: int) -> str | None:
    return None if fields.value.get(name) is None else _address(fields, name, version)


def _range(fields: Fields, name: str, version: int) -> str | None:
    text = fields.optional_text(name)
    if text is None:
        return None
    try:
        network = ipaddress.ip_network(text)
    except ValueError as exc:
        raise DocumentError(f"{fields.path(name)} is not a network address with its length") from exc
    if network.version != version:
        fields.fail(name, f"is not an IPv{version} range")
    return text


def _counts(fields: Fields, name: str) -> dict[str, int]:
    inner = Fields(fields.mapping(name), DocumentError, name)
    return {key: inner.integer(key, UINT64) for key in inner.value}
