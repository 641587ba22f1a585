# SPDX-License-Identifier: BSD-2-Clause
"""Cilium ClusterMesh values: the JSON under `cilium/`, read strictly and written as Cilium writes it.

Sources: pkg/node/types/{node,prefix}.go, pkg/identity/identity.go, pkg/clustermesh/store/store.go,
pkg/clustermesh/types/types.go and pkg/labels of Cilium 1.20. Unknown fields are ignored, a missing
field is Go's zero value, addresses are text.

`from_json` raises `WireError` with a short reason for a value that Cilium's decoder would refuse;
the `validate_*` functions raise it for one that belongs to another key, cluster or range.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import identity as _identity
from . import jsontext
from .jsontext import UINT8, UINT16, UINT32, Fields, Network

PROTOCOLS = ("TCP", "UDP", "SCTP", "ANY")
SLICE_MODES = ("", "services-and-endpointslices", "endpointslices-only")

# Annotations of a node that are ours: Cilium ignores them.
UNDERLAY_MTU = "isthmus.io/underlay-mtu"  # bytes
KUBERNETES_NODE = "isthmus.io/kubernetes-node"  # in a Kubernetes cluster: which node it is, empty when it is none
SITE = "isthmus.io/site"  # where it is not that of the node's cluster, or hosts of the site reach it elsewhere
WIREGUARD_KEYS = "isthmus.io/wireguard-keys"  # "port=key,port=key", where they are not the one that Cilium looks for


class WireError(ValueError):
    """A value that must not be used; the text is the reason, short enough to count by."""


@dataclass(frozen=True)
class NodeAddress:
    """`type` is InternalIP, ExternalIP, CiliumInternalIP, Hostname, InternalDNS or ExternalDNS."""

    type: str
    ip: str


@dataclass(frozen=True)
class Node:
    """A machine (`cilium/state/nodes/v1/<cluster>/<name>`); its ranges are its pod CIDRs."""

    name: str
    cluster: str
    cluster_id: int
    addresses: tuple[NodeAddress, ...] = ()
    ipv4_alloc_cidr: Network | None = None
    ipv4_secondary_alloc_cidrs: tuple[Network, ...] = ()
    ipv6_alloc_cidr: Network | None = None
    ipv6_secondary_alloc_cidrs: tuple[Network, ...] = ()
    ipv4_health_ip: str = ""
    ipv6_health_ip: str = ""
    ipv4_ingress_ip: str = ""
    ipv6_ingress_ip: str = ""
    source: str = "custom-resource"
    encryption_key: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    node_identity: int = 0
    wireguard_public_key: str = ""
    boot_id: str = ""

    def cidrs(self) -> tuple[Network, ...]:
        """Every range of the node, of both families, the primary ones first."""
        primary = (self.ipv4_alloc_cidr, self.ipv6_alloc_cidr)
        found = tuple(cidr for cidr in primary if cidr is not None)
        return found + self.ipv4_secondary_alloc_cidrs + self.ipv6_secondary_alloc_cidrs

    def tunnel_endpoint(self, version: int = 4, site: str = "") -> str | None:
        """The address that others send overlay packets to: the first InternalIP of the family, else
        ExternalIP, else any other that is no name and no mesh address (Cilium pkg/node/addressing).

        At the node's own `site`, where it says that it is there, ExternalIP comes first: of our nodes that is the
        address that the host has, where the InternalIP is an address translation's."""
        usable = [
            entry
            for entry in self.addresses
            if entry.type not in ("CiliumInternalIP", "Hostname", "InternalDNS", "ExternalDNS")
            and ipaddress.ip_address(entry.ip).version == version
        ]
        is_near = site and self.annotations.get(SITE) == site
        for wanted in ("ExternalIP", "InternalIP") if is_near else ("InternalIP", "ExternalIP"):
            for entry in usable:
                if entry.type == wanted:
                    return entry.ip
        return usable[0].ip if usable else None

    def mesh_address(self, version: int = 4) -> str | None:
        """The node's own address inside the mesh (CiliumInternalIP)."""
        for entry in self.addresses:
            if entry.type == "CiliumInternalIP" and ipaddress.ip_address(entry.ip).version == version:
                return entry.ip
        return None

    def to_json(self) -> str:
        return jsontext.dumps(
            {
                "Name": self.name,
                "Cluster": self.cluster,
                "IPAddresses": [{"Type": entry.type, "IP": entry.ip} for entry in self.addresses] or None,
                "IPv4AllocCIDR": _cidr_out(self.ipv4_alloc_cidr),
                "IPv4SecondaryAllocCIDRs": _cidrs_out(self.ipv4_secondary_alloc_cidrs),
                "IPv6AllocCIDR": _cidr_out(self.ipv6_alloc_cidr),
                "IPv6SecondaryAllocCIDRs": _cidrs_out(self.ipv6_secondary_alloc_cidrs),
                "IPv4HealthIP": self.ipv4_health_ip,
                "IPv6HealthIP": self.ipv6_health_ip,
                "IPv4IngressIP": self.ipv4_ingress_ip,
                "IPv6IngressIP": self.ipv6_ingress_ip,
                "ClusterID": self.cluster_id,
                "Source": self.source,
                "EncryptionKey": self.encryption_key,
                "Labels": jsontext.sorted_mapping(self.labels) or None,
                "Annotations": jsontext.sorted_mapping(self.annotations) or None,
                "NodeIdentity": self.node_identity,
                "WireguardPubKey": self.wireguard_public_key,
                "BootID": self.boot_id,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Node:
        fields = _object(text)
        addresses = []
        for entry in fields.objects("IPAddresses"):
            kind, ip = entry.text("Type"), entry.text("IP")
            if kind not in ("Hostname", "InternalDNS", "ExternalDNS"):
                _address(entry.path("IP"), ip)
            addresses.append(NodeAddress(kind, ip))
        return cls(
            name=fields.text("Name"),
            cluster=fields.text("Cluster"),
            cluster_id=fields.integer("ClusterID", UINT32),
            addresses=tuple(addresses),
            ipv4_alloc_cidr=_cidr_in(fields, "IPv4AllocCIDR", 4),
            ipv4_secondary_alloc_cidrs=_cidrs_in(fields, "IPv4SecondaryAllocCIDRs", 4),
            ipv6_alloc_cidr=_cidr_in(fields, "IPv6AllocCIDR", 6),
            ipv6_secondary_alloc_cidrs=_cidrs_in(fields, "IPv6SecondaryAllocCIDRs", 6),
            ipv4_health_ip=_optional_address(fields, "IPv4HealthIP", 4),
            ipv6_health_ip=_optional_address(fields, "IPv6HealthIP", 6),
            ipv4_ingress_ip=_optional_address(fields, "IPv4IngressIP", 4),
            ipv6_ingress_ip=_optional_address(fields, "IPv6IngressIP", 6),
            source=fields.text("Source"),
            encryption_key=fields.integer("EncryptionKey", UINT8),
            labels=fields.text_mapping("Labels"),
            annotations=fields.text_mapping("Annotations"),
            node_identity=fields.integer("NodeIdentity", UINT32),
            wireguard_public_key=fields.text("WireguardPubKey"),
            boot_id=fields.text("BootID"),
        )


@dataclass(frozen=True)
class NamedPort:
    name: str
    port: int
    protocol: str = "TCP"


@dataclass(frozen=True)
class IPIdentityPair:
    """An address and who it is (`cilium/state/ip/v1/default/<ip>`).

    `host_ip` is the tunnel endpoint; `prefix_length` is None for a single address.
    """

    ip: str
    identity: int
    host_ip: str = ""
    prefix_length: int | None = None
    key: int = 0
    metadata: str = ""
    namespace: str = ""
    pod_name: str = ""
    service_account: str = ""
    named_ports: tuple[NamedPort, ...] = ()

    def key_suffix(self) -> str:
        """What the key ends with: the address, or `<ip>/<len>` for a prefix."""
        return self.ip if self.prefix_length is None else f"{self.ip}/{self.prefix_length}"

    def to_json(self) -> str:
        document: dict[str, Any] = {
            "IP": self.ip,
            "Mask": None if self.prefix_length is None else _mask_out(self.ip, self.prefix_length),
            "HostIP": self.host_ip,
            "ID": self.identity,
            "Key": self.key,
            "Metadata": self.metadata,
        }
        optional = {
            "K8sNamespace": self.namespace,
            "K8sPodName": self.pod_name,
            "K8sServiceAccount": self.service_account,
            "NamedPorts": [
                {"Name": entry.name, "Port": entry.port, "Protocol": entry.protocol} for entry in self.named_ports
            ],
        }
        document.update((name, value) for name, value in optional.items() if value)
        return jsontext.dumps(document)

    @classmethod
    def from_json(cls, text: str | bytes) -> IPIdentityPair:
        fields = _object(text)
        ip = fields.text("IP", None)
        address = _address("IP", ip)
        mask = fields.text("Mask")
        length = _mask_in("Mask", mask, address.max_prefixlen) if mask else None
        if length == address.max_prefixlen:
            length = None
        return cls(
            ip=ip,
            identity=fields.integer("ID", UINT32),
            host_ip=_optional_address(fields, "HostIP"),
            prefix_length=length,
            key=fields.integer("Key", UINT8),
            metadata=fields.text("Metadata"),
            namespace=fields.text("K8sNamespace"),
            pod_name=fields.text("K8sPodName"),
            service_account=fields.text("K8sServiceAccount"),
            named_ports=tuple(
                NamedPort(entry.text("Name"), entry.integer("Port", UINT16), entry.text("Protocol"))
                for entry in fields.objects("NamedPorts")
            ),
        )


@dataclass(frozen=True)
class L4Addr:
    protocol: str
    port: int


PortMap = Mapping[str, L4Addr]
"""Port name (may be empty) -> port."""


@dataclass(frozen=True)
class ClusterService:
    """A service as one cluster offers it (`cilium/state/services/v1/<cluster>/<ns>/<name>`).

    `frontends` and `backends` map an address to its ports; only ready backends are in it.
    """

    cluster: str
    namespace: str
    name: str
    cluster_id: int
    frontends: Mapping[str, PortMap] = field(default_factory=dict)
    backends: Mapping[str, PortMap] = field(default_factory=dict)
    hostnames: Mapping[str, str] = field(default_factory=dict)
    zones: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    selector: Mapping[str, str] = field(default_factory=dict)
    include_external: bool = True
    shared: bool = True

    def to_json(self) -> str:
        document: dict[str, Any] = {
            "cluster": self.cluster,
            "namespace": self.namespace,
            "name": self.name,
            "frontends": _ports_out(self.frontends),
            "backends": _ports_out(self.backends),
        }
        if self.hostnames:
            document["hostnames"] = jsontext.sorted_mapping(self.hostnames)
        if self.zones:
            document["zones"] = jsontext.sorted_mapping(self.zones)
        document.update(
            {
                "labels": jsontext.sorted_mapping(self.labels),
                "selector": jsontext.sorted_mapping(self.selector),
                "includeExternal": self.include_external,
                "shared": self.shared,
                "clusterID": self.cluster_id,
            }
        )
        return jsontext.dumps(document)

    @classmethod
    def from_json(cls, text: str | bytes) -> ClusterService:
        fields = _object(text)
        return cls(
            cluster=fields.text("cluster"),
            namespace=fields.text("namespace"),
            name=fields.text("name"),
            cluster_id=fields.integer("clusterID", UINT32),
            frontends=_ports_in(fields, "frontends"),
            backends=_ports_in(fields, "backends"),
            hostnames=fields.text_mapping("hostnames"),
            zones=fields.mapping("zones"),
            labels=fields.text_mapping("labels"),
            selector=fields.text_mapping("selector"),
            include_external=fields.boolean("includeExternal"),
            shared=fields.boolean("shared"),
        )


@dataclass(frozen=True)
class ClusterConfig:
    """What a cluster says of itself (`cilium/cluster-config/<cluster>`).

    `service_exports_enabled` None means that the cluster does not know MCS-API at all: readers then
    wait for no canary of it.
    """

    id: int
    synced_canaries: bool = True
    cached: bool = False
    max_connected_clusters: int = 255
    service_exports_enabled: bool | None = None
    endpoint_slices_export_mode: str = ""

    def to_json(self) -> str:
        capabilities: dict[str, Any] = {}
        if self.synced_canaries:
            capabilities["syncedCanaries"] = True
        if self.cached:
            capabilities["cached"] = True
        if self.max_connected_clusters:
            capabilities["maxConnectedClusters"] = self.max_connected_clusters
        if self.service_exports_enabled is not None:
            capabilities["serviceExportsEnabled"] = self.service_exports_enabled
        if self.endpoint_slices_export_mode:
            capabilities["endpointSlicesExportMode"] = self.endpoint_slices_export_mode
        document: dict[str, Any] = {"id": self.id} if self.id else {}
        document["capabilities"] = capabilities
        return jsontext.dumps(document)

    @classmethod
    def from_json(cls, text: str | bytes) -> ClusterConfig:
        fields = _object(text)
        capabilities = Fields(fields.mapping("capabilities"), WireError, "capabilities")
        exports = capabilities.value.get("serviceExportsEnabled")
        mode = capabilities.text("endpointSlicesExportMode")
        if mode not in SLICE_MODES:
            capabilities.fail("endpointSlicesExportMode", "is unknown")
        return cls(
            id=fields.integer("id", UINT32),
            synced_canaries=capabilities.boolean("syncedCanaries"),
            cached=capabilities.boolean("cached"),
            max_connected_clusters=capabilities.integer("maxConnectedClusters", UINT32),
            service_exports_enabled=None if exports is None else capabilities.boolean("serviceExportsEnabled"),
            endpoint_slices_export_mode=mode,
        )


def labels_to_string(labels: Mapping[str, str]) -> str:
    """The value of an identity key: `source:key=value;` each, sorted by key alone, bytewise.

    `labels` are keyed `source:key`. WireError if one has no source, if two sources share a key, or
    if a name or value holds a character that the format cannot carry.
    """
    entries: dict[str, tuple[str, str]] = {}
    for full, value in labels.items():
        source, colon, key = full.partition(":")
        if not colon or not source or not key:
            raise WireError(f"label {full!r} is not source:key")
        if ";" in full or "=" in full or ";" in value:
            raise WireError(f"label {full!r} has a character that the format cannot carry")
        if key in entries:
            raise WireError(f"label {key!r} comes from two sources")
        entries[key] = (source, value)
    ordered = sorted(entries.items(), key=lambda item: item[0].encode("utf-8"))
    return "".join(f"{source}:{key}={value};" for key, (source, value) in ordered)


def labels_from_string(text: str) -> dict[str, str]:
    """The reverse of `labels_to_string`; unknown sources are kept. WireError if it is not that format."""
    found: dict[str, str] = {}
    if not text.endswith(";"):
        raise WireError("labels do not end with ;")
    for entry in text[:-1].split(";"):
        name, equals, value = entry.partition("=")
        source, colon, key = name.partition(":")
        if not equals or not colon or not source or not key:
            raise WireError("label is not source:key=value")
        if name in found:
            raise WireError("label is there twice")
        found[name] = value
    return found


WIREGUARD_KEY_INDEX = 255
"""`EncryptionKey` of a node and `Key` of an address whose packets are encrypted by WireGuard (Cilium pkg/wireguard)."""


def public_keys(node: Node, port: int) -> dict[int, str]:
    """A node's public keys of WireGuard by UDP port, not checked; `port` is that of the key in Cilium's own field."""
    found = {port: node.wireguard_public_key} if node.wireguard_public_key else {}
    if WIREGUARD_KEYS in node.annotations:
        found = {}
        for entry in node.annotations[WIREGUARD_KEYS].split(",")[:2]:
            number, _equals, key = entry.partition("=")
            if number.isascii() and number.isdigit() and len(number) <= 5:
                found[int(number)] = key
    return found


def public_key_problem(text: str) -> str:
    """Why `text` is no public key of WireGuard: base64 of 32 bytes that are not all zero. Empty when it is one."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return "is not base64"
    if len(raw) != 32:
        return f"has {len(raw)} bytes, not 32"
    if base64.b64encode(raw).decode() != text:  # one key must not have two spellings
        return "is not canonical base64"
    return "" if any(raw) else "is all zero"


def validate_cluster_config(config: ClusterConfig, expected_id: int, max_clusters: int) -> None:
    """What a reader checks before it reads anything else of a peer."""
    if not 1 <= config.id <= max_clusters:
        raise WireError("cluster id out of range")
    if config.id != expected_id:
        raise WireError("cluster id is not the peer's")
    if max_clusters == 511 and config.max_connected_clusters != 511:
        raise WireError("maxConnectedClusters differs")


def validate_node(
    node: Node, key_cluster: str, key_name: str, cluster_id: int, ranges: Iterable[Network] | None = None
) -> None:
    """The node is the one its key names, of the cluster it came from; with `ranges`, its own ranges
    and mesh, health and ingress addresses lie inside them: readers route all of these to it."""
    if node.cluster != key_cluster:
        raise WireError("cluster differs from key")
    if not node.name or node.name != key_name:
        raise WireError("name differs from key")
    if node.cluster_id != cluster_id:
        raise WireError("cluster id is not the cluster's")
    if ranges is not None:
        allowed = tuple(ranges)
        if not all(_inside(cidr, allowed) for cidr in node.cidrs()):
            raise WireError("range is not the cluster's")
        for entry in node.addresses:
            if entry.type == "CiliumInternalIP" and not _inside(ipaddress.ip_network(entry.ip), allowed):
                raise WireError("mesh address is not in the cluster's ranges")
        special = (node.ipv4_health_ip, node.ipv6_health_ip, node.ipv4_ingress_ip, node.ipv6_ingress_ip)
        if not all(_inside(ipaddress.ip_network(address), allowed) for address in special if address):
            raise WireError("health or ingress address is not in the cluster's ranges")


def validate_ip(
    pair: IPIdentityPair,
    key_ip: str,
    cluster_id: int,
    max_clusters: int,
    ranges: Iterable[Network] | None = None,
) -> None:
    """The address is its key's (`key_ip` with `/<len>` for a prefix), its identity is the cluster's
    own or one below 256; with `ranges`, it lies inside them."""
    if pair.key_suffix() != key_ip:
        raise WireError("address differs from key")
    first, last = _identity.identity_range(cluster_id, max_clusters)
    if not (first <= pair.identity <= last or pair.identity < _identity.FIRST_CLUSTER_IDENTITY):
        raise WireError("identity is not the cluster's")
    if ranges is not None:
        length = "" if pair.prefix_length is None else f"/{pair.prefix_length}"
        try:
            network = ipaddress.ip_network(pair.ip + length)
        except ValueError as exc:
            raise WireError("address has host bits set") from exc
        if not _inside(network, tuple(ranges)):
            raise WireError("address is not in the cluster's ranges")


def validate_identity(number: int, labels: Mapping[str, str], cluster: str, cluster_id: int, max_clusters: int) -> None:
    """The number lies in the cluster's range and its labels name that cluster."""
    first, last = _identity.identity_range(cluster_id, max_clusters)
    if not first <= number <= last:
        raise WireError("identity is not the cluster's")
    if labels.get(_identity.LABEL_CLUSTER) != cluster:
        raise WireError("labels do not name the cluster")


def validate_service(
    service: ClusterService,
    key_cluster: str,
    key_namespace: str,
    key_name: str,
    cluster_id: int,
    ranges: Iterable[Network] | None = None,
) -> None:
    """The service is its key's and of the cluster it came from; with `ranges`, so are its backends."""
    if service.cluster != key_cluster:
        raise WireError("cluster differs from key")
    if not service.namespace or service.namespace != key_namespace:
        raise WireError("namespace differs from key")
    if not service.name or service.name != key_name:
        raise WireError("name differs from key")
    if service.cluster_id != cluster_id:
        raise WireError("cluster id is not the cluster's")
    if ranges is not None:
        allowed = tuple(ranges)
        if not all(_inside(ipaddress.ip_network(address), allowed) for address in service.backends):
            raise WireError("backend is not in the cluster's ranges")


def _object(text: str | bytes) -> Fields:
    return Fields(jsontext.loads(text, WireError), WireError)


def _inside(network: Network, allowed: tuple[Network, ...]) -> bool:
    for outer in allowed:
        if isinstance(network, ipaddress.IPv4Network) and isinstance(outer, ipaddress.IPv4Network):
            if network.subnet_of(outer):
                return True
        elif (
            isinstance(network, ipaddress.IPv6Network)
            and isinstance(outer, ipaddress.IPv6Network)
            and network.subnet_of(outer)
        ):
            return True
    return False


def _address(name: str, text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as exc:
        raise WireError(f"{name} is not an IP address") from exc
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            raise WireError(f"{name} has a zone")
        if address.ipv4_mapped is not None:
            # To Go's net.IP and to the datapath it is the IPv4 address, which a check by family would not look at.
            raise WireError(f"{name} is an IPv4 address in IPv6's form")
    return address


def _optional_address(fields: Fields, name: str, version: int | None = None) -> str:
    text = fields.text(name)
    if text and _address(fields.path(name), text).version != (version or ipaddress.ip_address(text).version):
        fields.fail(name, f"is not an IPv{version} address")
    return text


def _mask_out(ip: str, length: int) -> str:
    width = ipaddress.ip_address(ip).max_prefixlen
    bits = (1 << width) - (1 << (width - length))
    return base64.b64encode(bits.to_bytes(width // 8, "big")).decode("ascii")


def _mask_in(name: str, text: str, width: int) -> int:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as exc:
        raise WireError(f"{name} is not base64") from exc
    if len(raw) * 8 != width:
        raise WireError(f"{name} has the wrong length")
    bits = bin(int.from_bytes(raw, "big"))[2:].zfill(width)
    length = bits.count("1")
    if bits != "1" * length + "0" * (width - length):
        raise WireError(f"{name} is not a contiguous mask")
    return length


def _cidr_out(cidr: Network | None) -> dict[str, str] | None:
    if cidr is None:
        return None
    ip = str(cidr.network_address)
    return {"IP": ip, "Mask": _mask_out(ip, cidr.prefixlen)}


def _cidrs_out(cidrs: tuple[Network, ...]) -> list[dict[str, str] | None] | None:
    return [_cidr_out(cidr) for cidr in cidrs] or None


def _cidr_value(value: Any, where: str, version: int) -> Network:
    if isinstance(value, str):
        text = value
    else:
        fields = Fields(value, WireError, where)
        ip = fields.text("IP", None)
        length = _mask_in(fields.path("Mask"), fields.text("Mask", None), _address(fields.path("IP"), ip).max_prefixlen)
        text = f"{ip}/{length}"
    try:
        network = ipaddress.ip_network(text)
    except ValueError as exc:
        raise WireError(f"{where} is not a network address with its mask") from exc
    if network.version != version or "/" not in text:
        raise WireError(f"{where} is not an IPv{version} CIDR")
    return network


def _cidr_in(fields: Fields, name: str, version: int) -> Network | None:
    value = fields.value.get(name)
    return None if value is None else _cidr_value(value, name, version)


def _cidrs_in(fields: Fields, name: str, version: int) -> tuple[Network, ...]:
    return tuple(_cidr_value(item, f"{name}[{index}]", version) for index, item in enumerate(fields.items(name)))


def _ports_out(addresses: Mapping[str, PortMap]) -> dict[str, Any]:
    return {
        address: {
            name: {"Protocol": port.protocol, "Port": port.port}
            for name, port in jsontext.sorted_mapping(ports).items()
        }
        for address, ports in jsontext.sorted_mapping(addresses).items()
    }


def _ports_in(fields: Fields, name: str) -> dict[str, dict[str, L4Addr]]:
    found: dict[str, dict[str, L4Addr]] = {}
    for address, ports in fields.mapping(name).items():
        _address(f"{name} key", address)
        entries: dict[str, L4Addr] = {}
        for port_name, value in Fields({name: ports}, WireError).mapping(name).items():
            port = Fields(value, WireError, f"{name} port")
            protocol = port.text("Protocol")
            if protocol not in PROTOCOLS:
                port.fail("Protocol", "is unknown")
            entries[port_name] = L4Addr(protocol, port.integer("Port", UINT16))
        found[address] = entries
    return found
