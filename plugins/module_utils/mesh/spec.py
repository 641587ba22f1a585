# SPDX-License-Identifier: BSD-2-Clause
"""Typed view of the node spec, `/etc/isthmus/node.json` (docs/architecture.md, "Node spec").

The planner writes it, everything on the host reads it. It holds no secret: keys and certificates
are named by path. `NodeSpec.from_dict` raises `SpecError` that names the field.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from . import jsontext
from .encryption import CHANGING, STAGES, Stage
from .identity import LabelFilter
from .jsontext import UINT16, UINT64, Fields

SCHEMA = 1

OVERLAY_OVERHEAD = 50
"""Bytes of VXLAN over IPv4: outer IP 20, UDP 8, VXLAN 8, inner Ethernet 14."""
WIREGUARD_OVERHEAD = 80
"""Bytes: outer IP up to 40, UDP 8, header 16, tag 16. What Cilium counts, so both ends agree."""
LEAST_MTU = 576
"""Bytes that every host takes of an IPv4 packet (RFC 791)."""
IPSEC_OVERHEAD = 100
"""Bytes that a tunnel between gateways needs at most: outer IP 20, UDP 8, ESP with IV, padding and ICV up to 37; with
room for lines between the gateways that carry less than 1500."""
IPSEC_MTU = 1400
"""Bytes of a packet through the gateways, whatever the underlay carries: what kernel-libipsec's device takes."""
MOST_GATEWAYS = 2
"""Of a site."""
IPSEC_PORTS = (500, 4500)
"""UDP ports of IKE, and of IKE and ESP behind address translation, which is how ESP always goes here."""
CLUSTER_KIND = "cluster"
"""`kind` of a document that all pods of a cluster share; a host's spec has none."""

WIREGUARD_PORT = 51871
"""UDP port of WireGuard between nodes: Cilium's, which its nodes cannot change."""
WIREGUARD_PORTS = (WIREGUARD_PORT, WIREGUARD_PORT + 1)
"""By a key's number (encryption.Keys)."""
WIREGUARD_DEVICES = ("isthmus-wg0", "isthmus-wg1")
WIREGUARD_UNITS = ("isthmus-wireguard.service", "isthmus-wireguard-1.service")
"""Of wireguard-go, where the kernel has no WireGuard."""
WIREGUARD_KEYS = ("wireguard.key", "wireguard-1.key")

CGROUP_KINDS = ("unit", "slice", "path")

REMEDY = (
    "run the site playbook of the isthmus.mesh that was applied to the estate last; it brings programs and "
    "specification of one version"
)
"""What to do, on the controller, about a specification that a program on a host cannot read."""


class SpecError(ValueError):
    """A spec that this version cannot use; the text says which field and why."""


def spec_hash(document: Mapping[str, Any]) -> str:
    """sha256, in hex, of the canonical JSON of the document without its `hash`."""
    rest = {key: value for key, value in document.items() if key != "hash"}
    return hashlib.sha256(jsontext.canonical(rest).encode("ascii")).hexdigest()


@dataclass(frozen=True)
class KubernetesSpec:
    """The Kubernetes cluster that a cluster of the mesh is: ranges that Kubernetes and its CNI deal, never we.

    `identity_labels`: patterns of `identity.LabelFilter`."""

    pod_ranges4: tuple[IPv4Network, ...]
    service_range4: IPv4Network
    identity_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClusterSpec:
    """The host's own cluster; `max_clusters` (255 or 511) sets the layout of identity numbers.

    `kubernetes` is None where the cluster consists of machines only."""

    name: str
    id: int
    max_clusters: int
    site: str
    workload_ranges4: tuple[IPv4Network, ...]
    service_range4: IPv4Network
    kubernetes: KubernetesSpec | None = None


@dataclass(frozen=True)
class HostSpec:
    """`underlay4` is what the host has, `advertise4` what hosts of other sites dial, `mesh4` lies in `range4`.

    `kubernetes_node` is the name of the Kubernetes node that the host is, None where it is none. `masquerade`: packets
    from `range4` that leave the mesh get the host's address; else they do not leave. `site` is empty where it is the
    cluster's."""

    name: str
    underlay4: IPv4Address
    advertise4: IPv4Address
    range4: IPv4Network
    mesh4: IPv4Address
    labels: Mapping[str, str] = field(default_factory=dict)
    kubernetes_node: str | None = None
    masquerade: bool = False
    site: str = ""


@dataclass(frozen=True)
class Cgroup:
    """Which processes are the workload: `kind` is unit, slice or path (below the cgroup2 root)."""

    kind: str
    value: str


@dataclass(frozen=True)
class WorkloadSpec:
    name: str
    namespace: str
    service_account: str
    labels: Mapping[str, str]
    address4: IPv4Address
    cgroup: Cgroup


@dataclass(frozen=True)
class OverlaySpec:
    """`port` is UDP; `mtu` bytes inside the overlay, None: found out on the host."""

    port: int
    mtu: int | None = None


@dataclass(frozen=True)
class TunnelSpec:
    """A WireGuard device: `key` is the path of the host's private key, `port` is UDP and tells the device's name."""

    key: str
    port: int

    @property
    def device(self) -> str:
        return WIREGUARD_DEVICES[WIREGUARD_PORTS.index(self.port)]


@dataclass(frozen=True)
class BootstrapPeer:
    """A node that is a peer of WireGuard before any etcd tells of it, as `site` found it: `keys` are its public keys by
    UDP port. What etcd tells of these is older, or comes from somebody who would be it."""

    cluster: str
    cluster_id: int
    name: str
    site: str
    underlay4: IPv4Address
    advertise4: IPv4Address
    range4: IPv4Network
    mesh4: IPv4Address
    keys: Mapping[int, str]


@dataclass(frozen=True)
class WireGuardSpec:
    """Overlay packets to and from other nodes go through WireGuard, except those of `plain_sites`: by `tunnel`; what
    comes through the `second` one, which is there while keys are replaced, is taken as well.

    `sites` is the site of a cluster's nodes, for those that publish none of their own; a node whose site is not known
    is in no plain site. `changing` are those of the other sites with which encryption is being turned on or off.

    With hosts of the sites in `opens` this host opens the sessions, as they cannot reach it, and keeps them open; those
    of `opened_by` do the same with it. `bootstrap` are those of both that it must reach before etcd tells of them."""

    tunnel: TunnelSpec
    second: TunnelSpec | None
    plain_sites: frozenset[str]
    sites: Mapping[str, str]
    changing: Mapping[str, Stage] = field(default_factory=dict)
    opens: frozenset[str] = frozenset()
    opened_by: frozenset[str] = frozenset()
    bootstrap: tuple[BootstrapPeer, ...] = ()

    @property
    def tunnels(self) -> tuple[TunnelSpec, ...]:
        """The one that is sent through is the first."""
        return (self.tunnel,) if self.second is None else (self.tunnel, self.second)

    def stage(self, site: str | None) -> Stage:
        """Of this host with the nodes of a site; None: it is not known."""
        if site is None or site not in self.plain_sites:
            return self.changing.get(site or "", Stage.DEMANDS)
        return Stage.PLAIN


@dataclass(frozen=True)
class NativeSpec:
    """Packets to and from nodes of some sites go without a tunnel, as the network routes them: `stages` by site, where
    it is so, or is being turned on or off. `sites` is the site of a cluster's nodes, for those that publish none of
    their own."""

    sites: Mapping[str, str]
    stages: Mapping[str, Stage]

    def stage(self, site: str | None) -> Stage:
        """Of this host with the nodes of a site; None: it is not known."""
        return self.stages.get(site or "", Stage.PLAIN)

    @property
    def changing(self) -> bool:
        """With some sites it is being turned on or off."""
        return any(stage.word in CHANGING for stage in self.stages.values())


@dataclass(frozen=True)
class GatewaySpec:
    """A host that is a gateway of its site."""

    cluster: str
    host: str
    underlay: IPv4Address


@dataclass(frozen=True)
class IpsecSpec:
    """Packets to and from some sites go through gateways: `stages` by site, where it is so, or is being turned on or
    off, `networks` what lies behind the gateways there. `via` is the own site's gateway, None on it and where it is not
    ours; `gateways` are both where there are two, also on them, first the one that is preferred. `local` is the
    underlay address of a host that is a gateway, `inside` has by site those of the gateways there that are ours, and
    `begins` names the connections that it begins.
    `sites` is the site of a cluster's nodes, for those that publish none of their own."""

    sites: Mapping[str, str]
    stages: Mapping[str, Stage]
    networks: Mapping[str, tuple[IPv4Network, ...]]
    via: IPv4Address | None = None
    gateways: tuple[GatewaySpec, ...] = ()
    local: IPv4Address | None = None
    inside: Mapping[str, tuple[IPv4Address, ...]] = field(default_factory=dict)
    begins: tuple[str, ...] = ()

    @property
    def others(self) -> tuple[GatewaySpec, ...]:
        """The site's gateways but the host itself."""
        return tuple(one for one in self.gateways if one.underlay != self.local)

    def stage(self, site: str | None) -> Stage:
        """Of this host with the nodes of a site; None: it is not known."""
        return self.stages.get(site or "", Stage.PLAIN)


def connection_name(site: str, number: int = 1) -> str:
    """In strongSwan, of the connection with a gateway of another site. No site's name has the second's underscore."""
    return f"isthmus-{site}" + (f"_{number}" if number > 1 else "")


def through_gateways(underlay: int) -> int:
    """MTU in bytes of the way through the gateways, of an underlay's."""
    return min(underlay - IPSEC_OVERHEAD, IPSEC_MTU)


@dataclass(frozen=True)
class EtcdSpec:
    """How this host reaches an etcd: URLs and paths of PEM files."""

    endpoints: tuple[str, ...]
    ca: str
    cert: str
    key: str


@dataclass(frozen=True)
class MemberSpec:
    """The etcd member on this host; `members` and `client_urls` are all of the cluster's, by name.

    `initial` is the member that starts the cluster; the others join it as learners."""

    name: str
    client_url: str
    peer_url: str
    members: Mapping[str, str]
    client_urls: Mapping[str, str]
    initial: str
    token: str
    source: Mapping[str, str]
    quota_bytes: int


@dataclass(frozen=True)
class PeerSpec:
    """A cluster that the registrar mirrors."""

    name: str
    id: int
    workload_ranges4: tuple[IPv4Network, ...]
    service_range4: IPv4Network
    etcd: EtcdSpec


@dataclass(frozen=True)
class KubernetesApiSpec:
    """How the registrar reaches the API server of its cluster: a URL and paths of PEM files, or with `token` the path
    of a service account's token, in the cluster itself."""

    server: str
    ca: str
    cert: str = ""
    key: str = ""
    token: str = ""


@dataclass(frozen=True)
class RegistrarSpec:
    """`kubernetes` is None where the cluster is no Kubernetes cluster."""

    cert: str
    key: str
    peers: tuple[PeerSpec, ...]
    kubernetes: KubernetesApiSpec | None = None


@dataclass(frozen=True)
class CaSpec:
    """The CA that signs for this host's cluster; `here` when its key lives on this host."""

    cluster: str
    host: str
    here: bool


@dataclass(frozen=True)
class CertificateSpec:
    """A key pair to be made on this host and signed by the CA of `ca_cluster` on `ca_host`.

    `usages` are of client, server; `owner` is the file owner."""

    name: str
    ca_cluster: str
    ca_host: str
    cn: str
    sans_dns: tuple[str, ...]
    sans_ip: tuple[str, ...]
    usages: tuple[str, ...]
    owner: str


@dataclass(frozen=True)
class PkiSpec:
    """`trust` names the clusters whose CA certificates are pinned on this host."""

    ca: CaSpec
    certificates: tuple[CertificateSpec, ...]
    trust: tuple[str, ...]


@dataclass(frozen=True)
class MeshSpec:
    """What a host, or a pod of the control plane (`host` is its name), knows of the mesh and of its cluster.

    `in_cluster`: the control plane runs in the Kubernetes cluster, whose nodes are in the mesh without the record."""

    estate: str
    host: str
    hash: str
    cluster: ClusterSpec
    overlay: OverlaySpec
    dns_domain: str
    service_ranges4: tuple[IPv4Network, ...]
    mesh_ranges4: tuple[IPv4Network, ...]
    etcd: EtcdSpec
    member: MemberSpec | None
    registrar: RegistrarSpec | None
    in_cluster: bool


@dataclass(frozen=True)
class NodeSpec(MeshSpec):
    node: HostSpec
    workloads: tuple[WorkloadSpec, ...]
    pki: PkiSpec | None
    """None on a node whose keys are its cluster's to make: Ansible does not enter it."""
    wireguard: WireGuardSpec | None = None
    """None: nothing is encrypted, and the host has no key."""
    native: NativeSpec | None = None
    """None: the tunnel leads to all nodes."""
    ipsec: IpsecSpec | None = None
    """None: no packets of this host go through gateways."""

    @property
    def site(self) -> str:
        return self.node.site or self.cluster.site

    @classmethod
    def from_dict(cls, document: Any) -> NodeSpec:
        """Read a spec. SpecError when it is malformed or of another schema.

        The hash is not checked: `spec_hash` tells whether the content is still what was planned.
        """
        top = Fields(document, SpecError)
        return cls(
            **_mesh(top),
            host=top.text("host", None),
            node=_host(top.object("node")),
            workloads=tuple(_workload(entry) for entry in top.objects("workloads")),
            member=None if top.value.get("member") is None else _member(top.object("member")),
            in_cluster=False,
            pki=_pki(top.object("pki")),
            wireguard=None if top.value.get("wireguard") is None else _wireguard(top.object("wireguard")),
            native=None if top.value.get("native") is None else _native(top.object("native")),
            ipsec=None if top.value.get("ipsec") is None else _ipsec(top.object("ipsec")),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> NodeSpec:
        return cls.from_dict(jsontext.loads(text, SpecError))


class ClusterDocument:
    """What all pods of a cluster share whose control plane is in it: a spec without what is one host's.

    SpecError when it is malformed or of another schema."""

    def __init__(self, text: str | bytes) -> None:
        document = jsontext.loads(text, SpecError)
        self._shared = _mesh(Fields(document, SpecError))
        self._shared["hash"] = spec_hash(document)  # of what is really there
        self.estate: str = self._shared["estate"]
        self.cluster: ClusterSpec = self._shared["cluster"]
        self.overlay: OverlaySpec = self._shared["overlay"]
        self.etcd: EtcdSpec = self._shared["etcd"]

    def of_pod(self, name: str) -> MeshSpec:
        """The spec of a pod of the control plane."""
        return MeshSpec(**self._shared, host=name, member=None, in_cluster=True)

    def of_node(self, node: HostSpec) -> NodeSpec:
        """The spec of the agent on a node; its hash counts what is the node's too."""
        content = {"document": self._shared["hash"], "node": _text_of(node)}
        return NodeSpec(
            **{**self._shared, "registrar": None, "hash": spec_hash(content)},
            host=node.name,
            member=None,
            in_cluster=True,
            node=node,
            workloads=(),
            pki=None,
        )


def is_cluster_document(text: str | bytes) -> bool:
    """Whether it is a cluster's document and not a host's spec. SpecError when it is no JSON object."""
    return Fields(jsontext.loads(text, SpecError), SpecError).value.get("kind") == CLUSTER_KIND


def _mesh(top: Fields) -> dict[str, Any]:
    """Fields of `MeshSpec` that do not depend on who reads them."""
    schema = top.integer("schema", UINT16, default=None)
    if schema != SCHEMA:
        other, writer = ("newer", "a newer") if schema > SCHEMA else ("older", "an older")
        raise SpecError(
            f"schema {schema} is {other} than {SCHEMA}, the one that this version reads: {writer} isthmus.mesh wrote it"
        )
    return {
        "estate": top.text("estate", None),
        "hash": top.text("hash", None),
        "cluster": _cluster(top.object("cluster")),
        "overlay": _overlay(top.object("overlay")),
        "dns_domain": top.object("dns").text("domain", None),
        "service_ranges4": top.networks4("service_ranges4"),
        "mesh_ranges4": top.networks4("mesh_ranges4"),
        "etcd": _etcd(top.object("etcd")),
        "registrar": None if top.value.get("registrar") is None else _registrar(top.object("registrar")),
    }


def _text_of(node: HostSpec) -> dict[str, str]:
    return {key: str(getattr(node, key)) for key in ("name", "underlay4", "advertise4", "range4", "mesh4")}


def _cluster(fields: Fields) -> ClusterSpec:
    return ClusterSpec(
        name=fields.text("name", None),
        id=fields.integer("id", 511, default=None, minimum=1),
        max_clusters=fields.integer("max_clusters", 511, default=None, minimum=255),
        site=fields.text("site", None),
        workload_ranges4=fields.networks4("workload_ranges4"),
        service_range4=fields.network4("service_range4"),
        kubernetes=None if fields.value.get("kubernetes") is None else _kubernetes(fields.object("kubernetes")),
    )


def _kubernetes(fields: Fields) -> KubernetesSpec:
    labels = fields.texts("identity_labels")
    try:
        LabelFilter(labels)
    except ValueError as exc:
        fields.fail("identity_labels", str(exc))
    return KubernetesSpec(fields.networks4("pod_ranges4"), fields.network4("service_range4"), labels)


def _host(fields: Fields) -> HostSpec:
    return HostSpec(
        name=fields.text("name", None),
        underlay4=fields.address4("underlay4"),
        advertise4=fields.address4("advertise4"),
        range4=fields.network4("range4"),
        mesh4=fields.address4("mesh4"),
        labels=fields.text_mapping("labels"),
        kubernetes_node=fields.optional_text("kubernetes_node"),
        masquerade=fields.boolean("masquerade"),
        site=fields.text("site"),
    )


def _workload(fields: Fields) -> WorkloadSpec:
    cgroup = fields.text_mapping("cgroup")
    if len(cgroup) != 1 or next(iter(cgroup)) not in CGROUP_KINDS:
        fields.fail("cgroup", "is not one of unit, slice, path")
    kind, value = next(iter(cgroup.items()))
    return WorkloadSpec(
        name=fields.text("name", None),
        namespace=fields.text("namespace", None),
        service_account=fields.text("service_account", "default"),
        labels=fields.text_mapping("labels"),
        address4=fields.address4("address4"),
        cgroup=Cgroup(kind, value),
    )


def _overlay(fields: Fields) -> OverlaySpec:
    mtu = None if fields.value.get("mtu") is None else fields.integer("mtu", UINT16, minimum=LEAST_MTU)
    return OverlaySpec(port=fields.integer("port", UINT16, default=None, minimum=1), mtu=mtu)


def wireguard_of(document: Any) -> WireGuardSpec:
    """The spec's `wireguard`. SpecError when it is malformed."""
    return _wireguard(Fields(document, SpecError, "wireguard"))


def _wireguard(fields: Fields) -> WireGuardSpec:
    return WireGuardSpec(
        tunnel=_tunnel(fields),
        second=None if fields.value.get("second") is None else _tunnel(fields.object("second")),
        plain_sites=frozenset(fields.texts("plain_sites")),
        sites=fields.text_mapping("sites"),
        changing=_stages(fields, "changing", CHANGING),
        opens=frozenset(fields.texts("opens")),
        opened_by=frozenset(fields.texts("opened_by")),
        bootstrap=tuple(_bootstrap_peer(entry) for entry in fields.objects("bootstrap")),
    )


def _bootstrap_peer(fields: Fields) -> BootstrapPeer:
    keys = {}
    for port, key in fields.text_mapping("keys").items():
        if port not in map(str, WIREGUARD_PORTS):
            fields.fail(f"keys.{port}", f"is not one of {', '.join(map(str, WIREGUARD_PORTS))}")
        keys[int(port)] = key
    return BootstrapPeer(
        cluster=fields.text("cluster", None),
        cluster_id=fields.integer("id", 511, default=None, minimum=1),
        name=fields.text("name", None),
        site=fields.text("site", None),
        underlay4=fields.address4("underlay4"),
        advertise4=fields.address4("advertise4"),
        range4=fields.network4("range4"),
        mesh4=fields.address4("mesh4"),
        keys=keys,
    )


def native_of(document: Any) -> NativeSpec:
    """The spec's `native`. SpecError when it is malformed."""
    return _native(Fields(document, SpecError, "native"))


def _native(fields: Fields) -> NativeSpec:
    return NativeSpec(sites=fields.text_mapping("sites"), stages=_stages(fields, "stages", STAGES))


def _stages(fields: Fields, name: str, words: Collection[str]) -> dict[str, Stage]:
    """The stage of each site, one of `words`."""
    found = fields.text_mapping(name)
    for site, word in found.items():
        if word not in words:
            fields.fail(f"{name}.{site}", f"is not one of {', '.join(words)}")
    return {site: STAGES[word] for site, word in found.items()}


def _tunnel(fields: Fields) -> TunnelSpec:
    port = fields.integer("port", UINT16, default=None, minimum=1)
    if port not in WIREGUARD_PORTS:
        fields.fail("port", f"is not one of {', '.join(map(str, WIREGUARD_PORTS))}")
    return TunnelSpec(fields.text("key", None), port)


def ipsec_of(document: Any) -> IpsecSpec:
    """The spec's `ipsec`. SpecError when it is malformed."""
    return _ipsec(Fields(document, SpecError, "ipsec"))


def _ipsec(fields: Fields) -> IpsecSpec:
    far = fields.object("far")
    stages, networks = {}, {}
    for site in far.value:
        entry = far.object(site)
        word = entry.text("stage", None)
        if word not in STAGES:
            entry.fail("stage", f"is not one of {', '.join(STAGES)}")
        stages[site], networks[site] = STAGES[word], entry.networks4("networks")
    via, local = (None if fields.value.get(name) is None else fields.address4(name) for name in ("via", "local"))
    inside: dict[str, tuple[IPv4Address, ...]] = {}
    begins: list[str] = []
    for one in fields.objects("connections") if "connections" in fields.value else ():
        site = one.text("site", None)
        if one.boolean("begins"):
            begins.append(connection_name(site, one.integer("number", MOST_GATEWAYS, default=1, minimum=1)))
        if "inside" in one.value:
            inside[site] = (*inside.get(site, ()), one.address4("inside"))
    gateways = tuple(
        GatewaySpec(one.text("cluster", None), one.text("host", None), one.address4("underlay"))
        for one in (fields.objects("gateways") if "gateways" in fields.value else ())
    )
    return IpsecSpec(fields.text_mapping("sites"), stages, networks, via, gateways, local, inside, tuple(begins))


def _etcd(fields: Fields) -> EtcdSpec:
    return EtcdSpec(
        endpoints=fields.texts("endpoints"),
        ca=fields.text("ca", None),
        cert=fields.text("cert", None),
        key=fields.text("key", None),
    )


def _member(fields: Fields) -> MemberSpec:
    return MemberSpec(
        name=fields.text("name", None),
        client_url=fields.text("client_url", None),
        peer_url=fields.text("peer_url", None),
        members=fields.text_mapping("members"),
        client_urls=fields.text_mapping("client_urls"),
        initial=fields.text("initial", None),
        token=fields.text("token", None),
        source=fields.text_mapping("source"),
        quota_bytes=fields.integer("quota_bytes", UINT64, default=None, minimum=1),
    )


def _registrar(fields: Fields) -> RegistrarSpec:
    return RegistrarSpec(
        cert=fields.text("cert", None),
        key=fields.text("key", None),
        peers=tuple(
            PeerSpec(
                name=peer.text("name", None),
                id=peer.integer("id", 511, default=None, minimum=1),
                workload_ranges4=peer.networks4("workload_ranges4"),
                service_range4=peer.network4("service_range4"),
                etcd=_etcd(peer),
            )
            for peer in fields.objects("peers")
        ),
        kubernetes=None if fields.value.get("kubernetes") is None else _api(fields.object("kubernetes")),
    )


def _api(fields: Fields) -> KubernetesApiSpec:
    proof = {name: fields.text(name) for name in ("cert", "key", "token")}
    if not (proof["token"] or (proof["cert"] and proof["key"])):
        fields.fail("cert", "is missing")
    return KubernetesApiSpec(fields.text("server", None), fields.text("ca", None), **proof)


def _pki(fields: Fields) -> PkiSpec:
    ca = fields.object("ca")
    return PkiSpec(
        ca=CaSpec(ca.text("cluster", None), ca.text("host", None), ca.boolean("here")),
        certificates=tuple(
            CertificateSpec(
                name=entry.text("name", None),
                ca_cluster=entry.text("ca_cluster", None),
                ca_host=entry.text("ca_host", None),
                cn=entry.text("cn", None),
                sans_dns=entry.texts("sans_dns"),
                sans_ip=entry.texts("sans_ip"),
                usages=entry.texts("usages"),
                owner=entry.text("owner", "root"),
            )
            for entry in fields.objects("certificates")
        ),
        trust=fields.texts("trust"),
    )
