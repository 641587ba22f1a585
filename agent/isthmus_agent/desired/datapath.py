# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel should hold: the value that `desired` computes and that the appliers make true.

Addresses are `ipaddress` objects of either family; the appliers turn IPv4 into its v4-mapped form
for the maps (`bpf/include/abi.h`). Identities are numbers as on the wire. Nothing here does IO.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True, order=True)
class Frontend:
    """A service address: `protocol` is an IP protocol number (6 TCP, 17 UDP), `port` in host order."""

    address: Address
    port: int
    protocol: int


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """One endpoint of a service; `cluster_id` tells whose it is, `node` is its tunnel endpoint."""

    address: Address
    port: int
    protocol: int
    cluster_id: int
    node: Address | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """`backends` get new flows; `draining` keep their map entry and established flows, get no new ones.
    `session_affinity`: for so many seconds after its last flow a client gets the same backend again; 0: any."""

    name: str  # "<namespace>/<name>", for words and metrics only
    backends: tuple[Backend, ...]
    draining: tuple[Backend, ...] = ()
    session_affinity: int = 0


@dataclass(frozen=True, slots=True)
class IpcacheEntry:
    """`tunnel` None: local or not reachable by tunnel. `is_node`: an underlay address of a node. `is_fixed`: another
    address of a node itself, which no other node may send from. `is_encrypted`: the tunnel leads through WireGuard or
    nowhere. `is_native`: packets may come from it and go to it without a tunnel, by the underlay. `is_inside`: the same
    inside WireGuard. `is_cni`: a pod of this host's own Kubernetes cluster or, with `is_node`, one of its nodes: what
    goes between these is the CNI's; with `is_fixed` all that the CNI deals to pods of this node, published or not."""

    identity: int
    cluster_id: int
    tunnel: Address | None
    is_node: bool = False
    is_fixed: bool = False
    is_encrypted: bool = False
    is_native: bool = False
    is_inside: bool = False
    is_cni: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that may send to us; `endpoint` is the `tunnel` of what is behind it, whichever address it sends from.
    `is_encrypted`: what comes from it otherwise than through WireGuard is dropped. `is_native`: what comes from it
    through the tunnel is dropped."""

    cluster_id: int
    endpoint: Address
    is_encrypted: bool = False
    is_native: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Over the overlay device, one of WireGuard (its name is `wireguard`), the way that the underlay has to a node's
    address (`toward`), to where the kernel drops it after netfilter has seen it (`sunk`: the loopback device), or none:
    `unreachable`, or `throw` (the next rule decides). `mtu` in bytes (0: none); `table` 254 is main; of two routes with
    one prefix the one with the lower `metric` counts."""

    prefix: Network
    source: Address | None = None
    mtu: int = 0
    table: int = 254
    unreachable: bool = False
    throw: bool = False
    wireguard: str = ""
    metric: int = 0
    toward: Address | None = None
    sunk: bool = False

    @property
    def has_device(self) -> bool:
        return not (self.unreachable or self.throw)


@dataclass(frozen=True, slots=True)
class Rule:
    """Policy rule: packets from `source` look up `table`; with `destination_port` only those of UDP to that port, with
    `mark` only those whose mark has that lowest byte, with `own` only those that this host itself sends."""

    source: Network
    table: int
    priority: int
    destination_port: int = 0
    mark: int = 0
    own: bool = False


@dataclass(frozen=True, slots=True)
class WireGuardPeer:
    """A node: `addresses` are its allowed IPs, with `ranges`, of more than one address each; `endpoint` is where its
    WireGuard listens, on the port that is ours.

    `dials_in`: it opens the sessions, from wherever it is then, and its endpoint is never set. `kept`: this host opens
    them, keeps them open and asks this address of the node's own, inside the mesh, whether they are; None elsewhere."""

    endpoint: Address
    addresses: frozenset[Address]
    ranges: frozenset[Network] = frozenset()
    dials_in: bool = False
    kept: Address | None = None


@dataclass(frozen=True, slots=True)
class WireGuard:
    """A WireGuard device: `key` is the path of the private key, `port` is UDP, `mtu` is the device's in bytes; `peers`
    by public key. Others send to `advertised`, which is this host's `underlay` unless a NAT is on the way."""

    device: str
    key: str
    port: int
    mtu: int
    underlay: IPv4Address
    advertised: IPv4Address
    peers: dict[str, WireGuardPeer]


@dataclass(frozen=True, slots=True)
class Native:
    """Some nodes are reached without a tunnel, from this host's `underlay` address. `changing`: with some it is being
    turned on or off, so that packets come another way than replies go. `inside`: where WireGuard of those is that are
    reached inside it; by the underlay's ways to these nothing of the mesh may go in clear."""

    underlay: IPv4Address
    changing: bool
    inside: frozenset[Address] = frozenset()


MASQUERADED = 0x4B
"""Mark (lowest byte) of packets of connections that a CNI masqueraded before this host led them over the overlay. The
other marks that are ours are in bpf/include/abi.h."""


@dataclass(frozen=True, slots=True)
class BarePods:
    """Packets of this host's pods and its own range come and go without a tunnel by `devices` of WireGuard, as they do
    over the overlay, and to and from `networks`, which do not overlap, by the underlay. What kube-proxy masquerades
    there has the host's address in the mesh, `mesh`: WireGuard's devices have none, and what goes by the underlay now
    may go over the overlay later. Replies to what was sent to one of `underlay`, the host's own addresses there, and
    led to a pod or a backend elsewhere (a NodePort), leave as the underlay does, by the mark MASQUERADED: the overlay's
    program, which sees to that, is not on their way, and what came out of WireGuard would go back there by its mark."""

    devices: tuple[str, ...]
    mesh: IPv4Address
    underlay: frozenset[IPv4Address]
    networks: frozenset[IPv4Network] = frozenset()


@dataclass(frozen=True, slots=True)
class KeepSource:
    """What nobody on this host may masquerade: packets between `local` and the overlay, packets from `host` to `local`,
    and from `local` to pods of the cluster's other nodes, in `pods`; with `native` all packets from `host`, which leave
    for the mesh or not at all, and with `bare` what of pods goes without a tunnel. And what of `local` was masqueraded
    to `members` already: it gets the mark MASQUERADED.

    `host` is the range of the host's own mesh addresses; `local` holds it and the node's pods, without overlaps; `pods`
    are the ranges of the cluster's pods; `members` hold, without overlaps, underlay addresses to which pods' packets go
    over the overlay, but for those to which nothing may go in clear. `mesh`: packets from `host` to elsewhere than
    these networks, which do not overlap, get the host's address where they leave; None: none do.

    `precaution`: nothing but packets from `host`, and only where another program translates sources: without that there
    is no table, which would have the kernel follow all connections of the host."""

    host: IPv4Network
    local: frozenset[IPv4Network]
    native: bool = False
    pods: frozenset[IPv4Network] = frozenset()
    members: frozenset[IPv4Network] = frozenset()
    mesh: frozenset[IPv4Network] | None = None
    bare: BarePods | None = None
    precaution: bool = False


@dataclass(frozen=True, slots=True)
class Datapath:
    """The whole wanted state of one host. Equal values mean: nothing to do."""

    cluster_id: int
    identity_shift: int = 16
    overlay_port: int = 8472
    overlay_mtu: int = 1450
    addresses: frozenset[Address] = frozenset()  # on the overlay device, /32 or /128
    local: dict[Address, int] = field(default_factory=dict)  # own address -> identity
    workloads: dict[int, Address] = field(default_factory=dict)  # cgroup id -> address
    untranslated: frozenset[int] = frozenset()  # cookies of the network namespaces whose sockets are left alone
    services: dict[Frontend, Service] = field(default_factory=dict)
    draining: tuple[Backend, ...] = ()  # of services that are gone altogether
    ipcache: dict[Network, IpcacheEntry] = field(default_factory=dict)  # /32 and /128 go to the hash map
    peers: dict[Address, Peer] = field(default_factory=dict)  # by outer source
    routes: frozenset[Route] = frozenset()
    rules: frozenset[Rule] = frozenset()
    keep_source: KeepSource | None = None  # None: no table of ours in netfilter
    wireguard: tuple[WireGuard, ...] = ()  # the one that is sent through is the first
    native: Native | None = None
    clusters: dict[int, str] = field(default_factory=dict)  # cluster id -> name, for words only
