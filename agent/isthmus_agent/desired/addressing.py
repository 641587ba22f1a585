# SPDX-License-Identifier: GPL-3.0-or-later
"""Who owns which address, and the way to it: ipcache, peers, local addresses, routes. Pure.

What a node object means follows Cilium (pkg/node/manager): its addresses are remote-node (6), its
ranges are world (2) behind its tunnel endpoint, its health and ingress addresses have their own
reserved identities. IPv6 entries are left out until the datapath carries IPv6.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, collapse_addresses, ip_address, ip_network
from typing import Any

from isthmus_mesh import identity
from isthmus_mesh.encryption import Stage
from isthmus_mesh.ipsec import MARK as STRONGSWAN
from isthmus_mesh.spec import (
    LEAST_MTU,
    OVERLAY_OVERHEAD,
    WIREGUARD_OVERHEAD,
    WIREGUARD_PORT,
    BootstrapPeer,
    IpsecSpec,
    NativeSpec,
    NodeSpec,
    WireGuardSpec,
    through_gateways,
)
from isthmus_mesh.wire import KUBERNETES_NODE, SITE, UNDERLAY_MTU, Node, NodeAddress, public_keys

from isthmus_agent.desired.datapath import (
    MASQUERADED,
    Address,
    BarePods,
    IpcacheEntry,
    KeepSource,
    Native,
    Network,
    Peer,
    Route,
    Rule,
)
from isthmus_agent.desired.pods import Pods, is_pod_range, own_cidrs, pod_ranges
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.state.model import MeshState

TABLE = 730
RULE_PRIORITY = 730
PODS_TABLE = 731
PODS_RULE_PRIORITY = 731
MASQUERADED_IPSEC_RULE_PRIORITY = 727
MASQUERADED_RULE_PRIORITY = 728
NATIVE_TABLE = 734
NATIVE_RULE_PRIORITY = 729
IPSEC_TABLE = 736
IPSEC_RULE_PRIORITY = 736
SIBLING_TABLE = 738
SIBLING_RULE_PRIORITY = 738
"""After that of strongSwan's routes (isthmus_mesh.ipsec.RULE_PRIORITY)."""
STRONGSWAN_RULE_PRIORITY = 734
NATIVE = 0x4E
"""Mark of what came without a tunnel (ISTHMUS_MARK_NATIVE)."""
MAIN = 254
EVERYWHERE = IPv4Network("0.0.0.0/0")
YIELDING = 730
"""Metric of a route that stands back for the one of somebody else to the same range."""
CLOSED = 1 << 16
"""Metric of the unreachable routes that are left when the device, and with it the routes over it, has gone."""

_NODE_TYPES = ("InternalIP", "ExternalIP")


@dataclass(frozen=True, slots=True)
class Remote:
    """Another node, with what is needed of it parsed once."""

    cluster: str
    name: str
    cluster_id: int
    endpoint: IPv4Address
    underlay: tuple[IPv4Address, ...]
    mesh: IPv4Address | None
    cidrs: tuple[IPv4Network, ...]
    health: IPv4Address | None
    ingress: IPv4Address | None
    mtu: int  # of its underlay, 0 when it does not say
    is_machine: bool  # it says that it is no Kubernetes node
    stage: Stage = Stage.PLAIN  # of encryption
    public_keys: Mapping[int, str] = field(default_factory=dict, hash=False)  # of WireGuard, by UDP port
    native: Stage = Stage.PLAIN  # of native routing; PLAIN: the tunnel
    gateways: Stage = Stage.PLAIN  # of the tunnel between the gateways of the two sites
    dials_in: bool = False  # it opens the sessions of WireGuard
    is_kept: bool = False  # this host opens them
    is_laid_down: bool = False  # by `site`, whatever etcd tells
    strays: tuple[IPv4Network, ...] = ()  # of a native node's pods outside of `cidrs`, from pools of its CNI

    @property
    def takes_native(self) -> bool:
        """Packets may come from it and go to it by the underlay, without a tunnel: never what must be encrypted."""
        return self.native > Stage.PLAIN and self.stage is not Stage.DEMANDS

    @property
    def sends_native(self) -> bool:
        """We send to it by the underlay, without a tunnel."""
        return self.native >= Stage.SENDS and self.stage <= Stage.ACCEPTS

    @property
    def takes_inside(self) -> bool:
        """Packets may come from it and go to it without a tunnel inside WireGuard."""
        return self.native > Stage.PLAIN and self.stage is Stage.DEMANDS

    @property
    def sends_inside(self) -> bool:
        """We send to it without a tunnel inside WireGuard."""
        return self.native >= Stage.SENDS and self.stage is Stage.DEMANDS

    @property
    def sends_bare(self) -> bool:
        """We send to it without a tunnel."""
        return self.sends_native or self.sends_inside

    @property
    def ranges(self) -> tuple[IPv4Network, ...]:
        """Where its workloads are, and its own addresses in the mesh that lie elsewhere; they may overlap."""
        special = (self.mesh, self.health, self.ingress)
        return (
            *self.cidrs,
            *self.strays,
            *(
                IPv4Network(address)
                for address in special
                if address is not None and not any(address in cidr for cidr in self.cidrs)
            ),
        )


def _remote(spec: NodeSpec, node: Node) -> Remote | None:
    endpoint = node.tunnel_endpoint(4, spec.site)
    if endpoint is None:
        return None
    mesh = node.mesh_address(4)
    said = node.annotations.get(UNDERLAY_MTU, "")
    site = _site(spec.wireguard, node)
    return Remote(
        cluster=node.cluster,
        name=node.name,
        cluster_id=node.cluster_id,
        endpoint=IPv4Address(endpoint),
        underlay=tuple(
            IPv4Address(entry.ip)
            for entry in node.addresses
            if entry.type in _NODE_TYPES and ip_address(entry.ip).version == 4
        ),
        mesh=IPv4Address(mesh) if mesh is not None else None,
        cidrs=tuple(cidr for cidr in node.cidrs() if isinstance(cidr, IPv4Network)),
        health=IPv4Address(node.ipv4_health_ip) if node.ipv4_health_ip else None,
        ingress=IPv4Address(node.ipv4_ingress_ip) if node.ipv4_ingress_ip else None,
        mtu=int(said) if said.isascii() and said.isdigit() and len(said) <= 5 else 0,
        is_machine=node.annotations.get(KUBERNETES_NODE) == "",
        stage=_stage(spec.wireguard, node),
        public_keys=public_keys(node, WIREGUARD_PORT),
        native=_stage(spec.native, node),
        gateways=_stage(spec.ipsec, node),
        dials_in=spec.wireguard is not None and site in spec.wireguard.opened_by,
        is_kept=spec.wireguard is not None and site in spec.wireguard.opens,
    )


def _stage(said: WireGuardSpec | NativeSpec | IpsecSpec | None, node: Node) -> Stage:
    """Of this host with the site of a node."""
    return Stage.PLAIN if said is None else said.stage(_site(said, node))


def _site(said: WireGuardSpec | NativeSpec | IpsecSpec | None, node: Node) -> str | None:
    """None: it is not known."""
    return None if said is None else node.annotations.get(SITE) or said.sites.get(node.cluster)


def _as_laid_down(spec: NodeSpec, peer: BootstrapPeer, known: Remote | None) -> Remote | None:
    """A node of which more than what is needed to reach it is `known` when etcd tells of it."""
    addresses = [NodeAddress("InternalIP", str(peer.advertise4))]
    if peer.underlay4 != peer.advertise4:
        addresses.append(NodeAddress("ExternalIP", str(peer.underlay4)))
    addresses.append(NodeAddress("CiliumInternalIP", str(peer.mesh4)))
    node = Node(
        peer.name,
        peer.cluster,
        peer.cluster_id,
        tuple(addresses),
        ipv4_alloc_cidr=peer.range4,
        annotations={SITE: peer.site},
    )
    found = _remote(spec, node)
    if found is None:
        return None
    found = replace(found, public_keys=peer.keys, is_laid_down=True)
    if known is None:
        return found
    return replace(
        found,
        cidrs=known.cidrs,
        health=known.health,
        ingress=known.ingress,
        mtu=known.mtu,
        is_machine=known.is_machine,
    )


def _nodes(spec: NodeSpec, state: MeshState) -> Iterator[tuple[tuple[str, str], Remote | None]]:
    """Of etcd, peers' before our own cluster's, then of the spec; None of one that has no underlay address."""
    laid_down = {(peer.cluster, peer.name): peer for peer in spec.wireguard.bootstrap} if spec.wireguard else {}
    order = sorted({*state.nodes, *laid_down}, key=lambda key: (key in laid_down, key[0] == spec.cluster.name, key))
    for key in order:
        known = _remote(spec, state.nodes[key]) if key in state.nodes else None
        yield key, _as_laid_down(spec, laid_down[key], known) if key in laid_down else known


def remotes(spec: NodeSpec, state: MeshState) -> tuple[tuple[Remote, ...], tuple[str, ...]]:
    """The other nodes, peers' before our own cluster's, and what was refused of them in words. Those that the spec has
    laid down are there before etcd tells of them, and reached as it says.

    Later ones win where two claim one address, so nothing that a peer says overrides our own cluster, and nobody what
    `site` laid down.
    A claim on this host's own addresses is refused here, and one on addresses of our pods: of a peer on any that our
    cluster's CNI deals, of our own cluster on those that are dealt to this node.
    """
    own = (spec.cluster.name, spec.host)
    found: list[Remote] = []
    refused: list[str] = []
    mine = {spec.node.underlay4, spec.node.advertise4, spec.node.mesh4}
    cidrs_here = own_cidrs(spec, state)
    for key, node in _nodes(spec, state):
        if key == own:
            continue
        if node is None:
            refused.append(f"node {key[0]}/{key[1]} has no IPv4 underlay address")
            continue
        addresses = {node.endpoint, *node.underlay, node.mesh}
        if clash := sorted(str(address) for address in mine & addresses):
            refused.append(f"node {key[0]}/{key[1]} claims this host's address {clash[0]}")
            continue
        if bad := [
            cidr
            for cidr in node.cidrs
            if cidr.overlaps(spec.node.range4) or any(address in cidr for address in (*mine, node.endpoint))
        ]:
            refused.append(f"node {key[0]}/{key[1]} claims {bad[0]}, which holds an address of this host or its own")
            continue
        pods = cidrs_here if key[0] == spec.cluster.name else pod_ranges(spec)
        claims = (*node.cidrs, *(IPv4Network(address) for address in addresses if address is not None))
        if bad := [claim for claim in claims if any(claim.overlaps(each) for each in pods)]:
            refused.append(f"node {key[0]}/{key[1]} claims {bad[0]}, which holds addresses of our pods")
            continue
        found.append(node)
    return tuple(found), tuple(refused)


def only_encrypted(
    nodes: tuple[Remote, ...], demanded: frozenset[Address]
) -> tuple[tuple[Remote, ...], tuple[str, ...]]:
    """No node is native of which an address is reached through WireGuard or not at all (`demanded`), as another node
    claims it too; and those that were, in words."""
    found = []
    told = []
    for node in nodes:
        both = demanded.intersection((*node.underlay, node.endpoint)) if node.takes_native else frozenset()
        if both:
            told.append(
                f"node {node.cluster}/{node.name} is not reached natively: another node has its address {min(both)}, "
                "and packets to that are to be encrypted"
            )
        found.append(replace(node, native=Stage.PLAIN) if both else node)
    return (tuple(found), tuple(told)) if told else (nodes, ())


def with_strays(state: MeshState, nodes: tuple[Remote, ...]) -> tuple[Remote, ...]:
    """Native nodes with the addresses of theirs that lie in no node's range of their cluster, in clear also in another
    one's: where the CNI has pools of its own, routes and WireGuard, which takes no address from two nodes, have to know
    each of them."""
    holders = {
        (node.cluster, str(address)): number
        for number, node in enumerate(nodes)
        if node.native > Stage.PLAIN
        for address in (*node.underlay, node.endpoint)
    }
    if not holders:
        return nodes
    dealt = _dealt(nodes)
    own = {number: _dealt([nodes[number]]).get(nodes[number].cluster, {}) for number in set(holders.values())}
    found: dict[int, list[IPv4Network]] = {}
    for (cluster, text), pair in state.ips.items():
        number = holders.get((cluster, pair.host_ip))
        if number is None or "/" in text or ":" in text:
            continue
        address = IPv4Address(text)
        if not _is_dealt(address, own[number] if nodes[number].takes_native else dealt[cluster]):
            found.setdefault(number, []).append(IPv4Network(address))
    if not found:
        return nodes
    return tuple(
        replace(node, strays=tuple(collapse_addresses(found[number]))) if number in found else node
        for number, node in enumerate(nodes)
    )


def _dealt(nodes: Iterable[Remote]) -> dict[str, dict[int, set[int]]]:
    """Ranges of nodes by cluster and mask."""
    found: dict[str, dict[int, set[int]]] = {}
    for node in nodes:
        of_cluster = found.setdefault(node.cluster, {})
        for cidr in node.cidrs:
            of_cluster.setdefault(int(cidr.netmask), set()).add(int(cidr.network_address))
    return found


def _is_dealt(address: IPv4Address, of_cluster: Mapping[int, set[int]]) -> bool:
    return any(int(address) & mask in networks for mask, networks in of_cluster.items())


def own_addresses(spec: NodeSpec) -> frozenset[Address]:
    """What the overlay device carries: the mesh address and every workload's."""
    return frozenset({spec.node.mesh4, *(workload.address4 for workload in spec.workloads)})


def local_identities(spec: NodeSpec, state: MeshState, pods: Pods) -> dict[Address, int]:
    """Which identity packets from our addresses carry.

    The mesh address and the underlay addresses are remote-node. A workload or pod has none until the
    registrar published one: its packets are then dropped at the overlay (and counted) rather than sent
    as remote-node, which policies of peers may allow where they would not allow the workload.
    """
    first, last = identity.identity_range(spec.cluster.id, spec.cluster.max_clusters)
    found: dict[Address, int] = {
        **pods.identities,
        spec.node.underlay4: identity.REMOTE_NODE,
        spec.node.advertise4: identity.REMOTE_NODE,
        spec.node.mesh4: identity.REMOTE_NODE,
    }
    for workload in spec.workloads:
        pair = state.ips.get((spec.cluster.name, str(workload.address4)))
        if pair is not None and (first <= pair.identity <= last or identity.is_fixed_identity(pair.identity)):
            found[workload.address4] = pair.identity
    return found


def _published(state: MeshState) -> Iterator[tuple[str, Network, int, Address]]:
    """(cluster, network, identity, tunnel) of every IPv4 address that a cluster published."""
    for (cluster, text), pair in state.ips.items():
        network = ip_network(text, strict=False)
        if network.version != 4 or not pair.host_ip:
            continue
        number = identity.REMOTE_NODE if pair.identity == identity.HOST else pair.identity
        yield cluster, network, number, ip_address(pair.host_ip)


def ipcache(
    spec: NodeSpec,
    state: MeshState,
    nodes: tuple[Remote, ...],
    local: Mapping[Address, int],
    encrypted: frozenset[Address] = frozenset(),
    pods: tuple[IPv4Network, ...] = (),
) -> dict[Network, IpcacheEntry]:
    """Address to identity and tunnel endpoint, for every address of the mesh but the underlay of strangers.

    `local`: what `local_identities` found. `encrypted`: underlay addresses that only WireGuard may lead to. `pods`: the
    ranges of this node's pods. Without a tunnel the programs have to know those that are not published as well."""
    endpoints: dict[tuple[str, Address], Address] = {
        (node.cluster, address): node.endpoint for node in nodes for address in node.underlay
    }
    native = {address for node in nodes if node.takes_native for address in (*node.underlay, node.endpoint)}
    inside = {address for node in nodes if node.takes_inside for address in (*node.underlay, node.endpoint)}
    mine = {spec.node.underlay4, spec.node.advertise4}
    ids = {cluster: config.id for cluster, config in state.configs.items()}
    ids[spec.cluster.name] = spec.cluster.id
    found: dict[Network, IpcacheEntry] = {}
    published = [entry for entry in _published(state) if entry[0] in ids]
    for ours in (False, True):  # later ones win: no peer's node takes an address of our own cluster
        dealt = () if ours else pod_ranges(spec)
        for cluster, network, number, host in published:
            tunnel = endpoints.get((cluster, host), host)
            if (cluster == spec.cluster.name) == ours and not any(network.overlaps(each) for each in dealt):
                found[network] = IpcacheEntry(
                    number,
                    ids[cluster],
                    None if tunnel in mine else tunnel,
                    is_encrypted=tunnel in encrypted,
                    is_native=tunnel in native,
                    is_inside=tunnel in inside,
                    is_cni=ours and isinstance(network, IPv4Network) and is_pod_range(spec, network),
                )
        some = [node for node in nodes if (node.cluster == spec.cluster.name) == ours]
        found.update(_of_nodes(spec, some, encrypted))
    # This host last: nothing published by anyone may move our own addresses elsewhere.
    for own_range in pods if spec.native is not None else ():
        found[own_range] = IpcacheEntry(identity.WORLD, spec.cluster.id, None, is_fixed=True, is_cni=True)
    for own_address, number in local.items():
        network = IPv4Network(str(own_address))
        is_node = own_address in mine
        is_cni = spec.node.kubernetes_node is not None if is_node else is_pod_range(spec, network)
        found[network] = IpcacheEntry(number, spec.cluster.id, None, is_node=is_node, is_cni=is_cni)
    return found


def _of_nodes(spec: NodeSpec, nodes: Iterable[Remote], encrypted: frozenset[Address]) -> dict[Network, IpcacheEntry]:
    found: dict[Network, IpcacheEntry] = {}
    for node in nodes:
        way: dict[str, bool] = {
            "is_encrypted": node.endpoint in encrypted,
            "is_native": node.takes_native,
            "is_inside": node.takes_inside,
        }
        ours = node.cluster == spec.cluster.name
        is_kubernetes_node = ours and spec.cluster.kubernetes is not None and not node.is_machine
        for cidr in node.cidrs:
            is_cni = ours and is_pod_range(spec, cidr)
            found[cidr] = IpcacheEntry(identity.WORLD, node.cluster_id, node.endpoint, is_cni=is_cni, **way)
        special = (
            (node.health, identity.HEALTH),
            (node.ingress, identity.INGRESS),
            (node.mesh, identity.REMOTE_NODE),
        )
        for address, number in special:
            if address is not None:
                found[IPv4Network(address)] = IpcacheEntry(number, node.cluster_id, node.endpoint, is_fixed=True, **way)
        for address in (*node.underlay, node.endpoint):
            found[IPv4Network(address)] = IpcacheEntry(
                identity.REMOTE_NODE,
                node.cluster_id,
                node.endpoint,
                is_node=True,
                is_cni=is_kubernetes_node,
                **way,
            )
    return found


def peers(nodes: tuple[Remote, ...], encrypted: frozenset[Address] = frozenset()) -> dict[Address, Peer]:
    """Outer source addresses that may send us overlay packets, with whose they are. `encrypted`: those from which none
    are taken in clear."""
    return {
        address: Peer(
            node.cluster_id,
            node.endpoint,
            is_encrypted=address in encrypted,
            is_native=node.native is Stage.DEMANDS and node.sends_bare,
        )
        for node in nodes
        for address in (*node.underlay, node.endpoint)
    }


def path_mtu(
    own_underlay: int,
    other_underlay: int,
    configured: int | None,
    encrypted: bool = False,
    gateways: bool = False,
) -> int:
    """MTU in bytes of a route over the overlay; `other_underlay` 0 when the other node does not say. `gateways`: it
    goes through those of the two sites."""
    underlay = min(own_underlay, other_underlay) if other_underlay else own_underlay
    if gateways:
        underlay = through_gateways(underlay)
    inner = max(LEAST_MTU, underlay - OVERLAY_OVERHEAD - (WIREGUARD_OVERHEAD if encrypted else 0))
    return min(inner, configured) if configured is not None else inner


@dataclass(frozen=True, slots=True)
class Led:
    """Over whom packets go to sites behind gateways. On a host `via` is the gateway of its site, None with `lost`: both
    are. On a gateway `via` is the site's other one while that answers; `around` are sites to which it leads instead of
    this host's own tunnels, through which nothing passes."""

    via: IPv4Address | None = None
    lost: bool = False
    around: frozenset[str] = frozenset()


def led(spec: NodeSpec, reach: Reachability, passes: frozenset[str] | None) -> Led:
    """By what the probes say of the site's gateways and, on one of them, through whose tunnels packets pass (`passes`,
    None: it is not known yet). Of two that answer it is the first, which gets packets back when it has answered for a
    while: one that comes and goes must not take them along."""
    own = spec.ipsec
    if own is None or not own.gateways:
        return Led() if own is None else Led(own.via)
    alive = [one for one in own.others if (one.cluster, one.host) not in reach.down]
    if own.local is not None:
        around = frozenset() if passes is None else frozenset(own.stages) - passes
        return Led(alive[0].underlay, around=around) if alive else Led()
    steady = [one for one in alive if (one.cluster, one.host) not in reach.unsteady]
    chosen = [*steady, *alive][:1]
    return Led(chosen[0].underlay) if chosen else Led(lost=True)


def passed_over(own: IpsecSpec, used: Collection[Address]) -> list[tuple[str, str]]:
    """Gateways of the site, by cluster and host, that come before the one over which packets are led (`used`: by the
    routes that there are): whoever led them there had found that these do not answer."""
    found: list[tuple[str, str]] = []
    for one in own.others:
        if one.underlay in used:
            return found
        found.append((one.cluster, one.host))
    return []


def gateway_routes(spec: NodeSpec, found: Led, underlay_mtu: int) -> Iterator[Route]:
    """What is behind gateways of other sites: table 736 leads there before strongSwan's routes, 738 after them."""
    own = spec.ipsec
    if own is None or (found.via is None and not found.lost):
        return
    mtu = max(LEAST_MTU, through_gateways(underlay_mtu))
    for site, stage in own.stages.items():
        for network in own.networks[site] if stage >= Stage.SENDS else ():
            if own.local is None or site in found.around:
                yield Route(network, mtu=mtu, table=IPSEC_TABLE, toward=found.via, sunk=found.lost)
            if own.local is not None:
                yield Route(network, mtu=mtu, table=SIBLING_TABLE, toward=found.via)


def _mtu(spec: NodeSpec, node: Remote, own_underlay: int) -> int:
    """Of the path to a node, as packets are sent to it."""
    if node.sends_bare:
        return _native_mtu(node, own_underlay)
    return path_mtu(own_underlay, node.mtu, spec.overlay.mtu, node.stage > Stage.PLAIN, node.gateways > Stage.PLAIN)


def mtus(spec: NodeSpec, nodes: Iterable[Remote], own_underlay: int) -> dict[tuple[str, str], int]:
    """Of the path to each node, by cluster and name."""
    return {(node.cluster, node.name): _mtu(spec, node, own_underlay) for node in nodes}


def _native_mtu(node: Remote, own_underlay: int) -> int:
    underlay = min(own_underlay, node.mtu) if node.mtu else own_underlay
    return max(LEAST_MTU, underlay - (WIREGUARD_OVERHEAD if node.takes_inside else 0))


def loose_ranges(spec: NodeSpec, state: MeshState, nodes: tuple[Remote, ...]) -> tuple[IPv4Network, ...]:
    """Ranges of the mesh in which some address of another node lies in no node's range: a CNI has pools of its own
    there. All of such a range is led over the overlay, where the ipcache knows the node of each address."""
    endpoints: dict[str, set[str]] = {}
    for node in nodes:
        endpoints.setdefault(node.cluster, set()).update(str(each) for each in (node.endpoint, *node.underlay))
    dealt = _dealt(nodes)
    found: set[IPv4Network] = set()
    ranges = (*spec.mesh_ranges4, *pod_ranges(spec))
    for (cluster, text), pair in state.ips.items():
        if pair.host_ip not in endpoints.get(cluster, ()) or "/" in text or ":" in text:
            continue
        address = IPv4Address(text)
        if not _is_dealt(address, dealt[cluster]):
            found.update(each for each in ranges if address in each)
    return tuple(sorted(found))


def routes(
    spec: NodeSpec,
    nodes: tuple[Remote, ...],
    underlay_mtu: int,
    pods: tuple[IPv4Network, ...],
    loose: tuple[IPv4Network, ...] = (),
    gateways: Led | None = None,
    encrypted: Collection[Address] = (),
) -> frozenset[Route]:
    """Routes of the main table, of table 730 (packets from our own range) and of table 731 (from our pods).

    Table 730 is closed by an unreachable default: a packet with a mesh source leaves over the overlay or not at all,
    but to `pods`, the ranges of this node's pods, it goes as the CNI has it. Ranges of services and of every cluster
    are unreachable where nothing longer matches, so that neither an untranslated service address nor an address nobody
    has goes out on the underlay. On a Kubernetes node the way to pods of other nodes of its cluster is the CNI's,
    except from our own range; and from a pod to another node's underlay address it is the overlay, so that the source
    is the pod's, unless that node belongs to the same Kubernetes cluster. On a machine of such a cluster that is no
    node, as a control plane often is, the operator's own route to those pods goes before ours. `loose`: of
    `loose_ranges`. To a node that is sent to natively all these lead as the underlay does, or over WireGuard's device.
    Table 734 has that way for nodes that may send natively and are not sent to so yet. With masquerading table 730 is
    open: what has no route in it goes as the host's own packets do, but for the ranges above. To an underlay address in
    `encrypted`, to which only WireGuard may lead, nothing goes without its route from there or from table 731. Table
    736 leads what is behind gateways of other sites to the own site's, as `gateways` says; where both of these are
    lost, to nowhere, past the rules of netfilter that count it. On one of two gateways it leads to the other one where
    the own tunnels do not pass, and table 738 while there is no tunnel.
    """
    source = spec.node.mesh4
    is_node = spec.node.kubernetes_node is not None
    is_open = spec.node.masquerade
    device = spec.wireguard.tunnel.device if spec.wireguard is not None else ""
    found: set[Route] = set()
    for node in nodes:
        ours = node.cluster == spec.cluster.name
        mtu = _mtu(spec, node, underlay_mtu)
        natively: dict[str, Any] = {"wireguard": device} if node.takes_inside else {"toward": node.endpoint}
        way = natively if node.sends_bare else {}
        for target in set(node.ranges):
            pods_of_ours = ours and is_pod_range(spec, target)
            if not (is_node and pods_of_ours):
                found.add(Route(target, source, mtu, MAIN, metric=YIELDING if pods_of_ours else 0, **way))
            found.add(Route(target, source, mtu, TABLE, **way))
            if (node.takes_native or node.takes_inside) and not node.sends_bare:
                found.add(Route(target, source, _native_mtu(node, underlay_mtu), NATIVE_TABLE, **natively))
        for address in {*node.underlay, node.endpoint}:
            for table in (TABLE, PODS_TABLE) if _is_led_from_pods(spec, node) else (TABLE,):
                found.add(Route(IPv4Network(address), source, mtu, table, **way))
                if address in encrypted and (table == PODS_TABLE or is_open):
                    found.add(Route(IPv4Network(address), table=table, unreachable=True, metric=CLOSED))
    narrowest = min((_mtu(spec, node, underlay_mtu) for node in nodes), default=0)
    for wide in loose:
        pods_of_ours = is_pod_range(spec, wide)
        if not (is_node and pods_of_ours):
            found.add(Route(wide, source, narrowest, MAIN, metric=YIELDING if pods_of_ours else 0))
        found.add(Route(wide, source, narrowest, TABLE))
    for blocked in {*spec.service_ranges4, *spec.mesh_ranges4} - set(loose):
        found.add(Route(blocked, unreachable=True))
    found.update(Route(each, table=TABLE, throw=True) for each in pods)
    found.add(Route(EVERYWHERE, table=TABLE, throw=is_open, unreachable=not is_open))
    found.update(gateway_routes(spec, gateways or Led(), underlay_mtu))
    return frozenset(found)


def _is_led_from_pods(spec: NodeSpec, node: Remote) -> bool:
    """Whether packets of pods of this host to the node's underlay addresses go over the overlay."""
    return spec.node.kubernetes_node is not None and (node.is_machine or node.cluster != spec.cluster.name)


def rules(spec: NodeSpec, pods: tuple[IPv4Network, ...]) -> frozenset[Rule]:
    """Packets from our own range look up table 730, those from our pods table 731.

    What was masqueraded already goes as it did before table 731 was there: netfilter would drop it on another device
    than that for which it was translated. Through the site's gateway, where there is one, it goes like everything else.

    While native routing is turned on or off, what has the mark of packets that came natively looks up table 734: so
    does the kernel's check of their source (rp_filter), and who proves that way before it is used.

    The second of two gateways leads only its own packets to the first, so that none goes back and forth between them
    when neither has a tunnel. strongSwan's packets never go to the other gateway."""
    found = {
        Rule(spec.node.range4, TABLE, RULE_PRIORITY),
        *(Rule(each, PODS_TABLE, PODS_RULE_PRIORITY) for each in pods),
    }
    if pods:
        found.add(Rule(EVERYWHERE, MAIN, MASQUERADED_RULE_PRIORITY, mark=MASQUERADED))
    if spec.ipsec is not None and spec.ipsec.via is not None:
        found.add(Rule(EVERYWHERE, IPSEC_TABLE, IPSEC_RULE_PRIORITY))
        if pods:
            found.add(Rule(EVERYWHERE, IPSEC_TABLE, MASQUERADED_IPSEC_RULE_PRIORITY, mark=MASQUERADED))
    elif spec.ipsec is not None and spec.ipsec.gateways:
        second = spec.ipsec.gateways[0].underlay != spec.ipsec.local
        found |= {
            Rule(EVERYWHERE, MAIN, STRONGSWAN_RULE_PRIORITY, mark=STRONGSWAN),
            Rule(EVERYWHERE, IPSEC_TABLE, IPSEC_RULE_PRIORITY, own=second),
            Rule(EVERYWHERE, SIBLING_TABLE, SIBLING_RULE_PRIORITY, own=second),
        }
    if spec.native is not None and spec.native.changing:
        found.add(Rule(EVERYWHERE, NATIVE_TABLE, NATIVE_RULE_PRIORITY, mark=NATIVE))
    return frozenset(found)


def native(spec: NodeSpec, nodes: tuple[Remote, ...]) -> Native | None:
    """None where no site is reached without a tunnel."""
    if spec.native is None:
        return None
    inside = frozenset(node.endpoint for node in nodes if node.takes_inside)
    return Native(spec.node.underlay4, spec.native.changing, inside)


def keeps_source_always(spec: NodeSpec) -> bool:
    """Whether the host needs the table of netfilter whatever the rules of others are."""
    return spec.node.kubernetes_node is not None or spec.native is not None or spec.node.masquerade


def keep_source(
    spec: NodeSpec, pods: tuple[IPv4Network, ...], nodes: tuple[Remote, ...], encrypted: frozenset[Address]
) -> KeepSource:
    """What CNI and kube-proxy, or a host's own rules, must not masquerade here, and what we do; a precaution on a host
    that is no Kubernetes node, sends nothing natively and does not masquerade. `encrypted`: underlay addresses that
    only WireGuard may lead to, so that what was masqueraded, and goes in clear, ends."""
    if not keeps_source_always(spec):
        return KeepSource(spec.node.range4, frozenset({spec.node.range4}), precaution=True)
    local = frozenset(collapse_addresses([spec.node.range4, *pods]))
    elsewhere = frozenset(collapse_addresses(pod_ranges(spec)) if pods else ())
    members = collapse_addresses(
        IPv4Network(address)
        for node in nodes
        if pods and _is_led_from_pods(spec, node)
        for address in {*node.underlay, node.endpoint} - encrypted
    )
    mesh = _unmasqueraded(spec, nodes, pods) if spec.node.masquerade else None
    bare = _bare_pods(spec, nodes) if pods else None
    return KeepSource(spec.node.range4, local, spec.native is not None, elsewhere, frozenset(members), mesh, bare)


def _bare_pods(spec: NodeSpec, nodes: tuple[Remote, ...]) -> BarePods | None:
    """What goes between pods of the own Kubernetes cluster is the CNI's."""
    if spec.native is None:
        return None
    devices = tuple(tunnel.device for tunnel in spec.wireguard.tunnels) if spec.wireguard is not None else ()
    underlay = frozenset({spec.node.underlay4, spec.node.advertise4}) if devices else frozenset()
    networks = collapse_addresses(
        each
        for node in nodes
        for each in (node.ranges if node.takes_native else ())
        if node.cluster != spec.cluster.name or not is_pod_range(spec, each)
    )
    found = BarePods(devices, spec.node.mesh4, underlay, frozenset(networks))
    return found if found.devices or found.networks else None


def _unmasqueraded(spec: NodeSpec, nodes: tuple[Remote, ...], pods: tuple[IPv4Network, ...]) -> frozenset[IPv4Network]:
    """Where addresses of workloads mean something: all ranges of the mesh, its hosts, and what is behind gateways."""
    found = [*spec.mesh_ranges4, *spec.service_ranges4, *pod_ranges(spec), *pods, spec.node.range4]
    if spec.cluster.kubernetes is not None:
        found.append(spec.cluster.kubernetes.service_range4)
    for node in nodes:
        found += node.cidrs
        found += [IPv4Network(address) for address in (*node.underlay, node.endpoint)]
    found += [IPv4Network(address) for address in (spec.node.underlay4, spec.node.advertise4)]
    if spec.ipsec is not None:
        found += [network for networks in spec.ipsec.networks.values() for network in networks]
    return frozenset(collapse_addresses(found))
