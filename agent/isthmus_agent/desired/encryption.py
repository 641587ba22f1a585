# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes are reached through WireGuard, and as which peers. Pure.

The packets of the overlay go to these nodes through WireGuard (VXLAN first, then WireGuard over the outer packet, as
Cilium does in tunnel mode) or not at all: a node whose key is missing, refused or not published is cut off, never
sent to in clear. While encryption is being turned on or off (`Stage`) both ways work. With nodes that are native as
well the packets of workloads go into WireGuard as they are, so that their ranges are allowed IPs too; such a node is
always one from which encryption is demanded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, collapse_addresses

from isthmus_mesh.encryption import Stage
from isthmus_mesh.spec import WIREGUARD_DEVICES, NodeSpec
from isthmus_mesh.wire import public_key_problem

from isthmus_agent.desired.addressing import CLOSED, EVERYWHERE, Remote
from isthmus_agent.desired.datapath import Address, Route, Rule, WireGuardPeer
from isthmus_agent.state.model import NodeKey

TABLE = 732
RULE_PRIORITY = 732
INSIDE_RULE_PRIORITY = 726
"""Of rules for what came natively inside WireGuard: before those for what goes to its sender."""


@dataclass(frozen=True, slots=True)
class Back:
    """What leads the kernel's check of a source to a device. `mark` is that of what came through it
    (ISTHMUS_MARK_DECRYPTED, ISTHMUS_MARK_DECRYPTED_SECOND); a rule of priority `table` looks up `table`."""

    table: int
    mark: int


BACK = dict(zip(WIREGUARD_DEVICES, (Back(733, 0x49), Back(735, 0x4A))))


@dataclass(frozen=True, slots=True)
class Encryption:
    """`peers` by port and public key. `nodes`: those that are to be peers, with why one is none, else ""; `second` the
    same of the second device; `stages`: theirs; `keys`: their public keys by port. `sent`: underlay addresses that only
    WireGuard may lead to; `demanded`: those that nothing is taken from in clear, which are among them. `claims`: of
    ranges that are left out, in words."""

    peers: dict[int, dict[str, WireGuardPeer]] = field(default_factory=dict)
    nodes: dict[NodeKey, str] = field(default_factory=dict)
    second: dict[NodeKey, str] = field(default_factory=dict)
    stages: dict[NodeKey, Stage] = field(default_factory=dict)
    sent: frozenset[Address] = frozenset()
    demanded: frozenset[Address] = frozenset()
    keys: dict[NodeKey, Mapping[int, str]] = field(default_factory=dict)
    claims: tuple[str, ...] = ()


def encryption(spec: NodeSpec, nodes: Iterable[Remote], own_keys: Mapping[int, str]) -> Encryption:
    """`nodes` in order of precedence, later ones first: nothing that a peer says takes from our own cluster.

    A public key that two nodes claim is taken from neither (traffic would go to whoever has the private key), unless
    one of them is of our own cluster or laid down by `site`. `own_keys` are this host's public keys by UDP port."""
    encrypted = [node for node in nodes if node.stage > Stage.PLAIN]
    owner: dict[IPv4Address, Remote] = {}
    claims: dict[str, list[Remote]] = {}
    for node in encrypted:
        owner.update(dict.fromkeys((*node.underlay, node.endpoint), node))
        for public_key in node.public_keys.values():
            claims.setdefault(public_key, []).append(node)
    tunnels = spec.wireguard.tunnels if spec.wireguard is not None else ()
    peers: dict[int, dict[str, WireGuardPeer]] = {tunnel.port: {} for tunnel in tunnels}
    claimed = _claimed(encrypted)
    # Whoever is reached through the tunnel is not cut off as it is tried whether packets can go natively.
    spared = {(node.cluster, node.name) for node in encrypted if not node.sends_inside} & claimed.keys()
    refused: list[dict[NodeKey, str]] = [{}, {}]
    sent: set[Address] = set()
    demanded: set[Address] = set()
    for node in encrypted:
        addresses = frozenset(address for address, holder in owner.items() if holder is node)
        for number, tunnel in enumerate(tunnels):
            public_key = node.public_keys.get(tunnel.port, "")
            why = _refusal(spec, node, public_key, claims, own_keys)
            if not why and node.endpoint not in addresses:
                other = owner[node.endpoint]
                why = f"its address {node.endpoint} is that of {other.cluster}/{other.name} too"
            is_spared = (node.cluster, node.name) in spared
            why = why or ("" if is_spared else claimed.get((node.cluster, node.name), ""))
            if not why:
                peers[tunnel.port][public_key] = _peer(node, addresses, node.takes_inside and not is_spared)
            refused[number][node.cluster, node.name] = why
        if node.stage is Stage.DEMANDS:
            demanded.update((*node.underlay, node.endpoint))
        elif node.stage is Stage.SENDS and not refused[0][node.cluster, node.name]:
            sent |= addresses
    stages = {(node.cluster, node.name): node.stage for node in encrypted}
    keys = {(node.cluster, node.name): node.public_keys for node in encrypted}
    told = tuple(f"node {key[0]}/{key[1]} is not taken natively: {claimed[key]}" for key in sorted(spared))
    return Encryption(
        peers, refused[0], refused[1], stages, frozenset(sent | demanded), frozenset(demanded), keys, told
    )


def _peer(node: Remote, addresses: frozenset[Address], is_native: bool) -> WireGuardPeer:
    ranges = list(collapse_addresses(node.ranges)) if is_native else []
    return WireGuardPeer(
        node.endpoint,
        addresses.union(each.network_address for each in ranges if each.num_addresses == 1),
        frozenset(each for each in ranges if each.num_addresses > 1),
        node.dials_in,
        (node.mesh or node.endpoint) if node.is_kept else None,
    )


def _claimed(nodes: list[Remote]) -> dict[NodeKey, str]:
    """Nodes that are native inside WireGuard and claim what a later one has, with words: WireGuard would take packets
    with one source from either."""
    claims = sorted(
        (int(each.network_address), each.prefixlen, number, each)
        for number, node in enumerate(nodes)
        if node.takes_inside
        for each in node.ranges
    )
    refused: dict[NodeKey, str] = {}
    around: list[tuple[int, IPv4Network]] = []  # those that hold the one that is looked at, the widest first
    for _start, _length, number, network in claims:
        while around and not network.subnet_of(around[-1][1]):
            around.pop()
        for other, wide in around:
            if other != number:
                loser, winner = sorted((other, number))
                one, by = nodes[loser], nodes[winner]
                mine = network if loser == number else wide
                why = f"its range {mine} holds addresses of {by.cluster}/{by.name} too"
                refused.setdefault((one.cluster, one.name), why)
        around.append((number, network))
    return refused


def _refusal(
    spec: NodeSpec, node: Remote, public_key: str, claims: Mapping[str, list[Remote]], own_keys: Mapping[int, str]
) -> str:
    if not public_key:
        return "it publishes no WireGuard key"
    if wrong := public_key_problem(public_key):
        return f"its WireGuard key {wrong}"
    if public_key in own_keys.values():
        return "its WireGuard key is this host's own"
    rivals = [other for other in claims[public_key] if other is not node]
    if node.is_laid_down:
        rivals = [other for other in rivals if other.is_laid_down]
    elif node.cluster == spec.cluster.name and not any(other.is_laid_down for other in rivals):
        rivals = [other for other in rivals if other.cluster == node.cluster]
    if rivals:
        return f"its WireGuard key is that of {rivals[0].cluster}/{rivals[0].name} too"
    return ""


def routes(spec: NodeSpec, found: Encryption) -> frozenset[Route]:
    """Of table 732: the addresses that are sent to over WireGuard, and unreachable ones that are left when that is
    gone. Of tables 733 and 735: all addresses and ranges that may send to us by a device."""
    if spec.wireguard is None:
        return frozenset()
    source = spec.node.underlay4
    ways: set[Route] = set()
    for tunnel in spec.wireguard.tunnels:
        peers = {address for peer in found.peers[tunnel.port].values() for address in peer.addresses}
        if tunnel is spec.wireguard.tunnel:
            for each in peers & found.sent:
                ways.add(Route(IPv4Network(str(each)), source, table=TABLE, wireguard=tunnel.device))
        back = BACK[tunnel.device].table
        ranges = {each for peer in found.peers[tunnel.port].values() for each in peer.ranges}
        behind = {*ranges, *(IPv4Network(str(each)) for each in peers)}
        ways |= {Route(each, table=back, wireguard=tunnel.device) for each in behind}
    closed = {Route(IPv4Network(str(each)), table=TABLE, unreachable=True, metric=CLOSED) for each in found.sent}
    return frozenset(ways | closed)


def rules(spec: NodeSpec) -> frozenset[Rule]:
    """Packets to the overlay's port look up table 732. The other tables are for the kernel's check of the source of a
    received packet (rp_filter), which looks up the way back: that of what came through WireGuard is WireGuard, whose
    device has no address of its own, and that of what came in clear is the underlay, so that strict filtering lets all
    in. Of what came natively it is looked up before the way to the sender, which may still be the tunnel."""
    if spec.wireguard is None:
        return frozenset()
    backs = [BACK[tunnel.device] for tunnel in spec.wireguard.tunnels]
    found = {
        Rule(EVERYWHERE, TABLE, RULE_PRIORITY, destination_port=spec.overlay.port),
        *(Rule(EVERYWHERE, back.table, back.table, mark=back.mark) for back in backs),
    }
    if spec.native is not None and any(spec.wireguard.stage(site) is Stage.DEMANDS for site in spec.native.stages):
        found.update(Rule(EVERYWHERE, back.table, INSIDE_RULE_PRIORITY, mark=back.mark) for back in backs)
    return frozenset(found)
