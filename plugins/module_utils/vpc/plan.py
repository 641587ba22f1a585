# SPDX-License-Identifier: BSD-2-Clause
"""What a VPC should have and what it has: routes, rules, and the difference. Pure; knows no provider.

A destination is an IPv4 prefix as text (``10.1.0.0/24``). A target is where a route leads, in the provider's words
(an interface's or gateway's id, an address); two routes lead to the same place when their targets are equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

OWNER = re.compile(r"[a-z]([a-z0-9-]{0,22}[a-z0-9])?")
ALL = "all"
"""The protocol of a rule that lets everything in, port 0."""


@dataclass(frozen=True)
class Hop:
    """Where a route is asked to lead: a host by its `address` in the VPC, or a `gateway` by the provider's name."""

    address: str = ""
    gateway: str = ""

    def __str__(self) -> str:
        return self.address or self.gateway


@dataclass(frozen=True)
class Wish:
    """A route as it is asked for."""

    destination: str
    hop: Hop


@dataclass(frozen=True)
class Rule:
    """Lets `source` (a prefix) reach `port` of every host by `protocol`; everything at every host by ALL, and at what
    routes lead to it, where the provider looks at that."""

    protocol: str
    port: int
    source: str


@dataclass(frozen=True)
class Route:
    """A route as it should be."""

    destination: str
    target: str


@dataclass(frozen=True)
class Found:
    """A route of a table. `dead`: why it leads nowhere, as the provider says; `key`: the provider's name of it;
    `origin`: who made it, where that is known; `counts`: whether it takes a place of the table's quota."""

    destination: str
    target: str
    owned: bool
    key: str = ""
    dead: str = ""
    origin: str = ""
    counts: bool = True


@dataclass
class Table:
    """A route table, or what stands for one. `limit`: routes that it can hold, None when that is not known."""

    name: str
    routes: list[Found]
    limit: int | None = None


@dataclass
class Difference:
    """What makes a table right. `first`: of what goes, what goes before anything is added, for want of room;
    `borrowed`: somebody else's routes that lead where ours would."""

    add: list[Route] = field(default_factory=list)
    replace: list[tuple[Found, Route]] = field(default_factory=list)
    remove: list[Found] = field(default_factory=list)
    first: list[Found] = field(default_factory=list)
    borrowed: list[Found] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def owner_problem(owner: str) -> str:
    """A sentence when `owner` cannot be part of the provider's tags and names, else nothing."""
    if OWNER.fullmatch(owner):
        return ""
    return f"owner: {owner!r} is no name of 1 to 24 lower-case letters, digits and '-' that begins with a letter."


def read(params: Mapping[str, Any]) -> tuple[list[Wish], list[Rule], list[str], list[str]]:
    """Options of a module as wishes, rules, hosts (addresses) and problems, each a sentence."""
    problems: list[str] = []
    hops: dict[IPv4Network, tuple[str, Hop]] = {}
    for number, one in enumerate(params["routes"]):
        where = f"routes[{number}]"
        network = _network(one["destination"], f"{where}.destination", problems)
        hop = Hop(one.get("via") or "", one.get("gateway") or "")
        if hop.address:
            _address(hop.address, f"{where}.via", problems)
        if network is None:
            continue
        if network in hops and hops[network][1] != hop:
            problems.append(f"{where} and {hops[network][0]} send {network} to two places: {hop}, {hops[network][1]}.")
        hops[network] = (where, hop)
    rules = []
    for number, one in enumerate(params["rules"]):
        where = f"rules[{number}]"
        what = ALL if one["protocol"] == ALL else f"{one['protocol']} {one['port']}"
        port = one["port"] or 0
        if one["protocol"] != ALL and not 1 <= port <= 65535:
            problems.append(f"{where}.port: {port} is no port; 1 to 65535.")
        if one["protocol"] == ALL and one["port"] is not None:
            problems.append(f"{where}.port: {port} with protocol {ALL}, which opens every port. Next: leave one out.")
        for source in one["sources"]:
            network = _network(source, f"{where}.sources", problems)
            if network is not None:
                rules.append(Rule(one["protocol"], port, str(network)))
        if not one["sources"]:
            problems.append(f"{where}.sources: nobody; name the addresses that may reach {what}.")
    hosts = list(params["hosts"])
    for number, host in enumerate(hosts):
        _address(host, f"hosts[{number}]", problems)
    merged = aggregate({network: hop for network, (_where, hop) in hops.items()})
    wishes = [Wish(str(network), hop) for network, hop in merged.items()]
    if not hosts:
        hosts = sorted({wish.hop.address for wish in wishes if wish.hop.address})
    return wishes, sorted(set(rules), key=lambda rule: (rule.protocol, rule.port, rule.source)), hosts, problems


def _network(text: str, where: str, problems: list[str]) -> IPv4Network | None:
    try:
        return IPv4Network(text if "/" in text else f"{text}/32")
    except ValueError as exc:
        problems.append(f"{where}: {text!r} is no IPv4 prefix ({exc}).")
        return None


def _address(text: str, where: str, problems: list[str]) -> None:
    try:
        IPv4Address(text)
    except ValueError:
        problems.append(f"{where}: {text!r} is no IPv4 address.")


def aggregate(routes: Mapping[IPv4Network, Any]) -> dict[IPv4Network, Any]:
    """The fewest routes that lead every address where `routes` (prefix -> target, longest prefix wins) leads it.

    A prefix goes whose next shorter one leads to the same target; two halves with one target become one prefix.
    """
    best = dict(routes)
    for network in sorted(routes, key=lambda one: -one.prefixlen):
        while network in best and network.prefixlen > 0:
            parent = network.supernet()
            sibling = next(half for half in parent.subnets() if half != network)
            if best.get(sibling) != best[network] or sibling not in best:
                break
            # Both halves are spoken for, so whatever the parent said is never looked up.
            best[parent] = best.pop(network)
            del best[sibling]
            network = parent
    for network in sorted(best, key=lambda one: -one.prefixlen):
        shorter = (network.supernet(new_prefix=length) for length in range(network.prefixlen - 1, -1, -1))
        cover = next((one for one in shorter if one in best), None)
        if cover is not None and best[cover] == best[network]:
            del best[network]
    return dict(sorted(best.items()))


def coarser(routes: Mapping[IPv4Network, Any], others: Iterable[IPv4Network], count: int) -> dict[IPv4Network, Any]:
    """At most `count` routes, if that can be, that cover what `routes` cover, address by address to the same target.

    They cover addresses that `routes` do not, but none of `others` (prefixes that must keep their own way).
    """
    taken = list(others)
    best = dict(routes)
    while len(best) > count:
        ordered = sorted(best)
        joins = sorted(
            (-cover.prefixlen, cover, best[left])
            for left, right in zip(ordered, ordered[1:])
            if best[left] == best[right]
            for cover in (_cover(left, right),)
        )
        fits = next(
            (
                (cover, target)
                for _length, cover, target in joins
                if not any(cover.overlaps(one) for one in taken)
                and not any(where != target and cover.overlaps(one) for one, where in best.items())
            ),
            None,
        )
        if fits is None:
            break
        best = {one: where for one, where in best.items() if not one.subnet_of(fits[0])}
        best[fits[0]] = fits[1]
    return dict(sorted(best.items()))


def _cover(left: IPv4Network, right: IPv4Network) -> IPv4Network:
    """The longest prefix that holds both."""
    differ = (int(left.network_address) ^ int(right.broadcast_address)).bit_length()
    return left.supernet(new_prefix=min(32 - differ, left.prefixlen))


def overlaps(wishes: Iterable[Wish], ranges: Mapping[str, str]) -> list[str]:
    """Sentences for destinations that touch the VPC's own `ranges` (prefix -> what it is)."""
    return [
        f"{wish.destination} overlaps {prefix}, {what}: such addresses are delivered by the network itself, so the "
        "route would lead astray or be refused. Give the workloads a range outside of it."
        for wish in wishes
        for prefix, what in sorted(ranges.items())
        if IPv4Network(wish.destination).overlaps(IPv4Network(prefix))
    ]


def difference(table: Table, wanted: Iterable[Route], keep: Iterable[str] = (), beside: bool = False) -> Difference:
    """What makes `table` hold exactly `wanted` of ours. Destinations in `keep` stay as they are. `beside`: whether what
    replaces a route is another one beside it for a moment."""
    result = Difference()
    wanted = list(wanted)
    kept = set(keep)
    by_destination: dict[str, list[Found]] = {}
    for route in table.routes:
        by_destination.setdefault(route.destination, []).append(route)
    for route in wanted:
        there = by_destination.get(route.destination, [])
        ours = [one for one in there if one.owned]
        theirs = [one for one in there if not one.owned]
        other = [one for one in theirs if one.target != route.target]
        if other:
            origin = f" ({other[0].origin})" if other[0].origin else ""
            result.problems.append(
                f"{table.name}: {route.destination} is somebody else's route to {other[0].target}{origin} and should "
                f"lead to {route.target}. It was left as it is. Next: remove it, or take {route.destination} out of "
                "the mesh's ranges."
            )
        elif theirs:
            result.borrowed.append(theirs[0])
            result.remove.extend(ours)
        elif not ours:
            result.add.append(route)
        else:
            right = [one for one in ours if one.target == route.target]
            stay = (right or ours)[0]
            if not right:
                result.replace.append((stay, route))
            result.remove.extend(one for one in ours if one is not stay)
    destinations = {route.destination for route in wanted} | kept
    result.remove.extend(one for one in table.routes if one.owned and one.destination not in destinations)
    for route in wanted:
        network = IPv4Network(route.destination)
        for one in table.routes:
            inside = IPv4Network(one.destination)
            if not one.owned and inside != network and inside.subnet_of(network) and one.target != route.target:
                result.warnings.append(
                    f"{table.name}: somebody else's route {one.destination} to {one.target} takes a part of "
                    f"{route.destination}, which leads to {route.target}."
                )
    if not result.problems:
        _quota(table, result, wanted, beside)
    return result


def _quota(table: Table, change: Difference, wanted: list[Route], beside: bool) -> None:
    """New routes are made before old ones go, but for those without which there is no room."""
    changed = change.replace if beside else []
    new = [*change.add, *(route for _found, route in changed)]
    if table.limit is None or not new:
        return
    going = [*change.remove, *(found for found, _route in changed)]
    most = sum(one.counts for one in table.routes) + len(new)
    if most - len(going) > table.limit:
        others = [one for one in table.routes if not one.owned and one.counts]
        change.problems.append(no_room(table, wanted, others, most - len(going)))
        return
    coming = [IPv4Network(route.destination) for route in new]

    def waits(one: Found) -> bool:
        return any(IPv4Network(one.destination).overlaps(network) for network in coming)

    change.first = sorted(going, key=waits)[: max(most - table.limit, 0)]
    waiting = [one.destination for one in change.first if waits(one)]
    if waiting:
        change.warnings.append(
            f"{table.name} holds {table.limit} routes, and new ones beside the old ones would be {most}: "
            f"{', '.join(waiting)} go first, and nothing leads there until the new ones are made."
        )


def no_room(table: Table, wanted: Iterable[Route], others: Iterable[Found], after: int) -> str:
    """The sentence for a table that cannot hold what is planned, with what would fit."""
    wanted, others = list(wanted), list(others)
    routes = {IPv4Network(one.destination): one.target for one in wanted}
    # A default route of others is there for what has no longer one.
    blocked = [network for network in (IPv4Network(one.destination) for one in others) if network.prefixlen > 0]
    holds = "no more routes" if table.limit is None else f"{table.limit} routes"
    words = f"{table.name} holds {holds}, the plan needs {after} ({len(others)} of others)."
    room = 0 if table.limit is None else max(table.limit - len(others), 0)
    fewer = coarser(routes, [one for one in blocked if one not in routes], room)
    if len(fewer) < len(routes):
        lines = [f"{network} to {target}" for network, target in fewer.items() if network not in routes]
        fits = "" if len(fewer) <= room else f", which is still {len(fewer) - room} too many"
        words += f" Aggregate like this{fits}: {', '.join(lines)}; or raise the quota."
    else:
        words += " No two of them can be one route: give each host one larger range, or raise the quota."
    return words


def destinations(hosts: Iterable[str], wishes: Iterable[Wish]) -> list[str]:
    """Prefixes of hosts, and of what routes lead to them, in order."""
    found = {f"{host}/32" for host in hosts} | {wish.destination for wish in wishes if wish.hop.address}
    return sorted(found)


def named(protocol: str, port: int, between: str) -> str:
    """What a rule is for, as a part of a name."""
    return ALL if protocol == ALL else f"{protocol}{between}{port}"


def by_port(rules: Iterable[Rule]) -> dict[tuple[str, int], list[str]]:
    """Rules as (protocol, port) -> sources, without sources that others contain."""
    sources: dict[tuple[str, int], list[IPv4Network]] = {}
    for rule in rules:
        sources.setdefault((rule.protocol, rule.port), []).append(IPv4Network(rule.source))
    return {key: [str(one) for one in collapse_addresses(found)] for key, found in sorted(sources.items())}


def dead_routes(table: Table) -> list[dict[str, Any]]:
    """Routes of a table that lead nowhere, for a module's result."""
    return [
        {
            "table": table.name,
            "destination": one.destination,
            "target": one.target,
            "reason": one.dead,
            "owned": one.owned,
        }
        for one in table.routes
        if one.dead
    ]


def clashes(names: list[str], ranges: list[list[str]]) -> list[str]:
    """Sentences for ranges that two networks, each with its name and prefixes, have in common."""
    return [
        f"{one} of {names[0]} and {other} of {names[1]} overlap; such networks cannot be peered. Next: renumber one."
        for one in ranges[0]
        for other in ranges[1]
        if IPv4Network(one).overlaps(IPv4Network(other))
    ]
