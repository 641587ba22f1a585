# SPDX-License-Identifier: BSD-2-Clause
"""First-fit dealing of ranges and addresses. Pure; the caller says what is taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network


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
