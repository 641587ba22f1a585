# SPDX-License-Identifier: BSD-2-Clause
"""First-fit dealing of ranges and addresses, and who has which. Pure; the caller says what is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

WORKLOADS, SERVICES, PODS, CLUSTER_IPS = "workloads", "services", "pods", "ClusterIPs"
HOST, RESERVED, VPN, VPC = "host", "reserved", "VPN", "VPC"
BESIDE = (HOST, RESERVED, VPN, VPC)
"""Kinds of what is not the mesh's: hosts reach it without the mesh. VPN is what is behind the gateways of a site."""


@dataclass(frozen=True, order=True)
class Claim:
    """A range that somebody has. `where` is its key path in the inventory, or words for its place in the record;
    `kind` one of the above; `owner` the cluster, the host of an underlay address, the name of a reserved range, or the
    site of a VPN or VPC. `sites` are those that are known to be there, where that decides what it may share."""

    network: IPv4Network
    where: str
    kind: str
    owner: str
    sites: tuple[str, ...] = ()


def may_share(one: Claim, other: Claim) -> bool:
    """Whether two may overlap, because they may be words for one place.

    Ranges of the mesh share nothing but what a CNI deals to pods and services out of the VPC that it is in. What is
    behind the gateways of a site may hold hosts of that site, its VPC, and reserved ranges with a host of the site in
    them, and lie in any reserved range."""
    kinds = {one.kind, other.kind}
    at_one_site = not set(one.sites).isdisjoint(other.sites)
    if not kinds <= set(BESIDE):
        return at_one_site and VPC in kinds and not kinds.isdisjoint((PODS, CLUSTER_IPS))
    if VPN not in kinds or at_one_site:
        return True
    reserved, vpn = (one, other) if one.kind == RESERVED else (other, one)
    return reserved.kind == RESERVED and vpn.network.subnet_of(reserved.network)


def astray(own: Claim, networks: Iterable[Claim]) -> list[Claim]:
    """Those behind gateways of other sites that hold a host's own address. None where its own site has a network there:
    then the two networks overlap, which is said of them."""
    holding = [one for one in networks if one.kind == VPN and own.network.subnet_of(one.network)]
    return [] if any(may_share(one, own) for one in holding) else holding


def free_subnets(ranges: Iterable[IPv4Network], prefixlen: int, taken: Iterable[IPv4Network]) -> Iterator[IPv4Network]:
    """Subnets of that prefix length, lowest first in each range, that touch nothing taken."""
    blocked = sorted((int(one.network_address), int(one.broadcast_address)) for one in taken)
    size = 1 << (32 - prefixlen)
    for network in ranges:
        start, end = int(network.network_address), int(network.broadcast_address)
        inside = iter([one for one in blocked if one[0] <= end and one[1] >= start])
        block = next(inside, None)
        while start + size - 1 <= end:
            while block is not None and block[1] < start:
                block = next(inside, None)
            if block is not None and block[0] <= start + size - 1:
                start = (block[1] // size + 1) * size
                continue
            yield IPv4Network((start, prefixlen))
            start += size


def free_addresses(network: IPv4Network, taken: Iterable[IPv4Network]) -> Iterator[IPv4Address]:
    """Addresses between the network's first and last that lie in nothing taken, lowest first."""
    first, last = int(network.network_address) + 1, int(network.broadcast_address) - 1
    for one in free_subnets([network], 32, taken):
        if first <= int(one.network_address) <= last:
            yield one.network_address


def host_capacity(network: IPv4Network) -> int:
    """Workloads that a node range holds: all but network, broadcast and the host's own address."""
    return network.num_addresses - 3


def overlaps(claims: Iterable[Claim]) -> list[tuple[Claim, Claim]]:
    """Pairs that overlap, each pair once, ordered by place, the one that holds the other first. Networks overlap only
    when one holds the other, so a sorted walk with the stack of enclosing ones finds them all."""
    found = []
    stack: list[Claim] = []
    for claim in sorted(claims, key=lambda one: (int(one.network.network_address), one.network.prefixlen, one)):
        while stack and not claim.network.overlaps(stack[-1].network):
            stack.pop()
        found += [(outer, claim) for outer in stack]
        stack.append(claim)
    return found


def shared(one: IPv4Network, other: IPv4Network) -> str:
    """What two ranges that overlap share, in words."""
    inner = one if one.prefixlen >= other.prefixlen else other
    return f"{inner.num_addresses} address{'es' if inner.num_addresses > 1 else ''} ({inner})"


def count_free(ranges: Iterable[IPv4Network], prefixlen: int, taken: Iterable[IPv4Network]) -> int:
    """How many ranges `free_subnets` gives, without making them. `ranges` do not overlap."""
    blocked = sorted((int(one.network_address), int(one.broadcast_address)) for one in taken)
    size = 1 << (32 - prefixlen)
    count = 0
    for network in ranges:
        start, end = int(network.network_address), int(network.broadcast_address)
        for first, last in [*blocked, (end + 1, end + 1)]:
            if last < start or first > end + 1:
                continue
            count += max(0, first // size - -(-start // size))
            start = (last // size + 1) * size
    return count
