# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes are reached through WireGuard, and as which peers. Pure.

The packets of the overlay go to these nodes through WireGuard (VXLAN first, then WireGuard over the outer packet, as
Cilium does in tunnel mode) or not at all: a node whose key is missing, refused or not published is cut off, never
sent to in clear. While encryption is being turned on or off (`Stage`) both ways work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from isthmus_mesh.encryption import Stage
from isthmus_mesh.spec import NodeSpec
from isthmus_mesh.wire import public_key_problem

from isthmus_agent.desired.addressing import Remote
from isthmus_agent.desired.datapath import Address, Route, Rule, WireGuardPeer
from isthmus_agent.state.model import NodeKey

TABLE = 732
RULE_PRIORITY = 732
BACK_TABLE = 733
BACK_RULE_PRIORITY = 733
DECRYPTED = 0x49
"""Mark of what came through WireGuard (ISTHMUS_MARK_DECRYPTED)."""
CLOSED = 1 << 16
"""Metric of the unreachable routes that are left when the device, and with it the routes over it, has gone."""


@dataclass(frozen=True, slots=True)
class Encryption:
    """`peers` by public key. `nodes`: those that are to be peers, with why one is none, else ""; `stages`: theirs.
    `sent`: underlay addresses that only WireGuard may lead to; `demanded`: those that nothing is taken from in clear,
    which are among them."""

    peers: dict[str, WireGuardPeer] = field(default_factory=dict)
    nodes: dict[NodeKey, str] = field(default_factory=dict)
    stages: dict[NodeKey, Stage] = field(default_factory=dict)
    sent: frozenset[Address] = frozenset()
    demanded: frozenset[Address] = frozenset()


def encryption(spec: NodeSpec, nodes: Iterable[Remote], own_key: str) -> Encryption:
    """`nodes` in order of precedence, later ones first: nothing that a peer says takes from our own cluster.

    A public key that two nodes claim is taken from neither (traffic would go to whoever has the private key), unless
    one of them is of our own cluster. `own_key` is this host's public key."""
    encrypted = [node for node in nodes if node.stage > Stage.PLAIN]
    owner: dict[IPv4Address, Remote] = {}
    claims: dict[str, list[Remote]] = {}
    for node in encrypted:
        owner.update(dict.fromkeys((*node.underlay, node.endpoint), node))
        claims.setdefault(node.public_key, []).append(node)
    peers: dict[str, WireGuardPeer] = {}
    found: dict[NodeKey, str] = {}
    sent: set[Address] = set()
    demanded: set[Address] = set()
    for node in encrypted:
        addresses = frozenset(address for address, holder in owner.items() if holder is node)
        why = _refusal(spec, node, claims[node.public_key], own_key)
        if not why and node.endpoint not in addresses:
            other = owner[node.endpoint]
            why = f"its address {node.endpoint} is that of {other.cluster}/{other.name} too"
        if not why:
            peers[node.public_key] = WireGuardPeer(node.endpoint, addresses)
        found[node.cluster, node.name] = why
        if node.stage is Stage.DEMANDS:
            demanded.update((*node.underlay, node.endpoint))
        elif node.stage is Stage.SENDS and not why:
            sent |= addresses
    stages = {(node.cluster, node.name): node.stage for node in encrypted}
    return Encryption(peers, found, stages, frozenset(sent | demanded), frozenset(demanded))


def _refusal(spec: NodeSpec, node: Remote, claims: list[Remote], own_key: str) -> str:
    if not node.public_key:
        return "it publishes no WireGuard key"
    if wrong := public_key_problem(node.public_key):
        return f"its WireGuard key {wrong}"
    if node.public_key == own_key:
        return "its WireGuard key is this host's own"
    if node.cluster == spec.cluster.name:
        rivals = [other for other in claims if other is not node and other.cluster == node.cluster]
    else:
        rivals = [other for other in claims if other is not node]
    if rivals:
        return f"its WireGuard key is that of {rivals[0].cluster}/{rivals[0].name} too"
    return ""


def routes(spec: NodeSpec, found: Encryption) -> frozenset[Route]:
    """Of table 732: the addresses that are sent to over WireGuard, and unreachable ones that are left when that is
    gone. Of table 733: all addresses that may send to us by it."""
    source = spec.node.underlay4
    peers = {address for peer in found.peers.values() for address in peer.addresses}
    ways = {Route(IPv4Network(str(each)), source, table=TABLE, wireguard=True) for each in peers & found.sent}
    closed = {Route(IPv4Network(str(each)), table=TABLE, unreachable=True, metric=CLOSED) for each in found.sent}
    back = {Route(IPv4Network(str(each)), table=BACK_TABLE, wireguard=True) for each in peers}
    return frozenset(ways | closed | back)


def rules(spec: NodeSpec) -> frozenset[Rule]:
    """Packets to the overlay's port look up table 732. Table 733 is for the kernel's check of the source of a received
    packet (rp_filter), which looks up the way back: that of what came through WireGuard is WireGuard, whose device has
    no address of its own, and that of what came in clear is the underlay, so that strict filtering lets both in."""
    if spec.wireguard is None:
        return frozenset()
    everywhere = IPv4Network("0.0.0.0/0")
    return frozenset(
        {
            Rule(everywhere, TABLE, RULE_PRIORITY, destination_port=spec.overlay.port),
            Rule(everywhere, BACK_TABLE, BACK_RULE_PRIORITY, mark=DECRYPTED),
        }
    )
