# SPDX-License-Identifier: GPL-3.0-or-later
"""The overlay device and what routes over it, the routes that lead its packets into WireGuard, and those that lead to
some nodes without it.

Ours are: the device, every address on it, routes of protocol 73, policy rules of protocol 73, and netfilter's table
`ip isthmus`. Nothing else is ever changed or removed.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from isthmus_agent.desired.datapath import Address, Datapath, KeepSource, Network, Route, Rule
from isthmus_agent.netlink import settings
from isthmus_agent.netlink.errors import NetworkError, OverlayMissing
from isthmus_agent.netlink.nftables import apply_keep_source, audit_keep_source, remove_keep_source
from isthmus_agent.netlink.routes import ADD, DELETE, REPLACE, Found, RouteSocket, Way, explain
from isthmus_agent.netlink.wireguard import DEVICES

OVERLAY = "isthmus0"
ROUTE_PROTOCOL = 73
ROUTE_TABLE = 730
RULE_PRIORITY = 730

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_IFF_UP = 0x1
_IFF_NOARP = 0x80
_GONE = (errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL)
_ADDR_GEN_MODE_NONE = 1
_IFA_F_NODAD = 0x02  # linux/if_addr.h
_TABLE_MAIN = 254
_STATIC = 4  # RTPROT_STATIC
_LOOPBACK = 1  # its index in every network namespace
_MARK_MASK = 0xFF  # of marks only the lowest byte is ours


@dataclass(frozen=True, slots=True)
class NetworkResult:
    """What apply_network() did, a phrase each. False when nothing had to be done."""

    changes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)


def _index(ipr: Any, name: str) -> int | None:
    found = ipr.link_lookup(ifname=name)
    return int(found[0]) if found else None


def overlay_index(name: str = OVERLAY) -> int | None:
    """Interface index of the overlay device, None if there is none."""
    with IPRoute() as ipr:
        return _index(ipr, name)


def other_devices(name: str = OVERLAY) -> list[int]:
    """Interface indexes of all devices that are not ours."""
    return [index for index, other in socket.if_nameindex() if other not in (name, *DEVICES, "lo")]


def overlays_of_others(port: int) -> list[str]:
    """Names of the VXLAN devices on the overlay's UDP port that are not ours."""
    found = []
    with IPRoute() as ipr:
        for link in ipr.get_links():
            name, info = link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_LINKINFO")
            if name == OVERLAY or info is None or info.get_attr("IFLA_INFO_KIND") != "vxlan":
                continue
            data = info.get_attr("IFLA_INFO_DATA")
            if data is not None and data.get_attr("IFLA_VXLAN_PORT") == port:
                found.append(str(name))
    return sorted(found)


def ensure_overlay(name: str = OVERLAY, port: int = 8472, mtu: int = 1450) -> int:
    """Makes the VXLAN device in collect-metadata mode (no learning, NOARP, no IPv6 addresses of its own)
    and answers its index. One with another kind or port is removed and made again, with a new index.

    A new device is down: apply_network() brings it up, which is after attach_overlay(), so that no packet
    comes in unchecked. `mtu` in bytes is the device's; routes carry their own."""
    with IPRoute() as ipr:
        index = _index(ipr, name)
        if index is not None:
            (link,) = ipr.get_links(index)
            if _link_differences(link, port):
                ipr.link("del", index=index)
                index = None
            elif link.get_attr("IFLA_MTU") != mtu:
                ipr.link("set", index=index, mtu=mtu)
        if index is None:
            try:
                ipr.link(
                    "add",
                    ifname=name,
                    kind="vxlan",
                    vxlan_collect_metadata=1,
                    vxlan_learning=0,
                    vxlan_port=port,
                    mtu=mtu,
                )
            except NetlinkError as error:
                raise NetworkError(
                    f"cannot make the VXLAN device {name} on UDP port {port}: {error}; is the vxlan module there "
                    "(modprobe vxlan), and does another VXLAN device use this port (ip -d link show type vxlan)?"
                ) from error
            index = _index(ipr, name)
            if index is None:
                raise NetworkError(f"the VXLAN device {name} went away while it was being set up")
            ipr.link("set", index=index, arp=False)
            # A link-local address would send router solicitations into the overlay.
            ipr.link(
                "set",
                index=index,
                IFLA_AF_SPEC={"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_MODE_NONE)]})]},
            )
        return index


def _link_differences(link: Any, port: int) -> list[str]:
    info = link.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
    if kind != "vxlan":
        return [f"is a device of kind {kind}, not vxlan"]
    data = info.get_attr("IFLA_INFO_DATA")
    differences = []
    if not data.get_attr("IFLA_VXLAN_COLLECT_METADATA"):
        differences.append("is not in collect-metadata (external) mode")
    if data.get_attr("IFLA_VXLAN_LEARNING"):
        differences.append("learns addresses")
    if data.get_attr("IFLA_VXLAN_PORT") != port:
        differences.append(f"uses UDP port {data.get_attr('IFLA_VXLAN_PORT')}, wanted: {port}")
    if not link["flags"] & _IFF_NOARP:
        differences.append("is not NOARP")
    return differences


def _addresses(ipr: Any, index: int) -> Iterator[Any]:
    """ip_interface objects on the device, without link-local ones."""
    for family in _FAMILIES:
        for message in ipr.get_addr(family=family, index=index):
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            interface = ip_interface(f"{text}/{message['prefixlen']}")
            if not interface.ip.is_link_local:
                yield interface


def _rules(ipr: Any) -> set[Rule]:
    """Policy rules of our protocol."""
    found = set()
    for family in _FAMILIES:
        for message in ipr.get_rules(family=family):
            if message.get_attr("FRA_PROTOCOL") != ROUTE_PROTOCOL:
                continue
            if message.get_attr("FRA_IP_PROTO") not in (None, 0, socket.IPPROTO_UDP):
                continue
            default = "0.0.0.0" if family == socket.AF_INET else "::"  # noqa: S104 - a prefix, not a listener
            found.add(
                Rule(
                    source=ip_network(f"{message.get_attr('FRA_SRC') or default}/{message['src_len']}"),
                    table=message.get_attr("FRA_TABLE") or message["table"],
                    priority=message.get_attr("FRA_PRIORITY") or 0,
                    destination_port=_port(message.get_attr("FRA_DPORT_RANGE")),
                    mark=message.get_attr("FRA_FWMARK") or 0,
                    own=message.get_attr("FRA_IIFNAME") == "lo",
                )
            )
    return found


def _port(ports: str | None) -> int:
    """The first of a range, which is all of it in our rules."""
    return int(ports.partition(":")[0]) if ports else 0


def _family(network: Network) -> int:
    return int(socket.AF_INET if network.version == 4 else socket.AF_INET6)


def _route_words(route: Route) -> str:
    kind = "unreachable " if route.unreachable else "throw " if route.throw else ""
    words = [f"{kind}{route.prefix}"]
    if route.table != _TABLE_MAIN:
        words.append(f"table {route.table}")
    if route.wireguard:
        words.append(f"over {route.wireguard}")
    if route.toward is not None:
        words.append(f"as {route.toward}")
    if route.sunk:
        words.append("to nowhere")
    if route.source is not None:
        words.append(f"src {route.source}")
    if route.mtu:
        words.append(f"mtu {route.mtu}")
    return "route " + " ".join(words)


def _rule_words(rule: Rule) -> str:
    only = f" udp dport {rule.destination_port}" if rule.destination_port else ""
    only += f" fwmark {rule.mark:#x}" if rule.mark else ""
    only += " iif lo" if rule.own else ""
    return f"rule {rule.priority}: from {rule.source}{only} lookup {rule.table}"


_RouteKey = tuple[Network, int, int]  # prefix, table, metric


@dataclass(frozen=True, slots=True)
class _Devices:
    """Interface indexes that routes lead to, those of WireGuard's devices by name, and the ways of the underlay: no
    route is made over a device that is not there, or towards an address that `ways` does not have."""

    overlay: int
    wireguard: Mapping[str, int] = field(default_factory=dict)
    ways: Mapping[Address, Way] = field(default_factory=dict)

    def of(self, route: Route) -> Way:
        if not route.has_device:
            return Way()
        if route.sunk:
            return Way(_LOOPBACK)
        if route.toward is not None:
            return self.ways[route.toward]
        return Way(self.wireguard[route.wireguard] if route.wireguard else self.overlay)

    def has(self, route: Route) -> bool:
        if route.toward is not None:
            return route.toward in self.ways
        return not route.wireguard or route.wireguard in self.wireguard


@dataclass(frozen=True, slots=True)
class _Real:
    """What the kernel has of ours."""

    addresses: set[Any]
    routes: dict[_RouteKey, Found]
    rules: Set[Rule]


@dataclass(slots=True)
class _Difference:
    """What stands between the kernel and what is wanted."""

    up: bool
    add_addresses: list[Address]
    remove_addresses: list[Any]
    add_routes: list[Route]
    replace_routes: list[tuple[Route, Route]]  # (real, wanted) of the same prefix and table
    remove_routes: list[Found]
    add_rules: list[Rule]
    remove_rules: list[Rule]


def _read(ipr: Any, routes: RouteSocket, devices: _Devices) -> _Real:
    found = {}
    names = {index: name for name, index in devices.wireguard.items()}
    for each in routes.dump():
        if each.way.oif in names:
            each = Found(replace(each.route, wireguard=names[each.way.oif]), each.way)
        found[_key(each.route)] = each
    return _Real(set(_addresses(ipr, devices.overlay)), found, _rules(ipr))


def _key(route: Route) -> _RouteKey:
    return route.prefix, route.table, route.metric


def _possible(routes: Iterable[Route], devices: _Devices) -> dict[_RouteKey, Route]:
    """Those whose device is there."""
    return {_key(each): each for each in routes if devices.has(each)}


def _interfaces(datapath: Datapath) -> dict[Any, Address]:
    return {ip_interface(f"{each}/{each.max_prefixlen}"): each for each in datapath.addresses}


def _as_made(datapath: Datapath, devices: _Devices) -> _Real:
    """What the kernel has after `datapath` was applied without a problem."""
    return _Real(
        set(_interfaces(datapath)),
        {key: _found(route, devices) for key, route in _possible(datapath.routes, devices).items()},
        datapath.rules,
    )


def _found(route: Route, devices: _Devices) -> Found:
    """As the kernel shows it."""
    return Found(replace(route, toward=None, sunk=False), devices.of(route))


def _difference(real: _Real, datapath: Datapath, devices: _Devices, up: bool) -> _Difference:
    wanted_addresses = _interfaces(datapath)
    wanted_routes = _possible(datapath.routes, devices)
    add, replace = [], []
    for key, route in wanted_routes.items():
        found = real.routes.get(key)
        if found is None:
            add.append(route)
        elif found != _found(route, devices):
            replace.append((found.route, route))
    return _Difference(
        up=up,
        # The host's own comes first, as the lowest of its range: the first is what `masquerade` takes.
        add_addresses=[wanted_addresses[each] for each in sorted(wanted_addresses.keys() - real.addresses, key=_rank)],
        remove_addresses=sorted(real.addresses - wanted_addresses.keys(), key=str),
        add_routes=sorted(add, key=_order),
        replace_routes=sorted(replace, key=lambda pair: _order(pair[1])),
        remove_routes=sorted(
            (found for key, found in real.routes.items() if key not in wanted_routes),
            key=lambda found: _order(found.route),
        ),
        add_rules=sorted(datapath.rules - real.rules, key=_rule_order),
        remove_rules=sorted(real.rules - datapath.rules, key=_rule_order, reverse=True),
    )


def _rank(interface: Any) -> tuple[int, int]:
    return interface.version, int(interface.ip)


def _order(route: Route) -> tuple[int, int, int, int, int]:
    prefix = route.prefix
    return route.table, prefix.version, int(prefix.network_address), prefix.prefixlen, route.metric


def _rule_order(rule: Rule) -> tuple[int, str]:
    """What goes before others is there before them."""
    return rule.priority, str(rule)


def _is_up(ipr: Any, index: int) -> bool:
    (link,) = ipr.get_links(index)
    return bool(link["flags"] & _IFF_UP)


def apply_network(
    datapath: Datapath,
    name: str = OVERLAY,
    step: Callable[[], None] = lambda: None,
    made: Datapath | None = None,
    wireguard: Mapping[str, int] | None = None,
    ways: Mapping[Address, Way] | None = None,
) -> NetworkResult:
    """Brings the device up and makes addresses, routes, rules and netfilter what is wanted: what blocks first, then
    the other additions.

    `step` is called whenever a part is done. `made` is what the last call made without a problem, on the same devices:
    only what differs from that is done then, and the kernel is not read. What others took away meanwhile is for
    audit_network() to find. `wireguard` are indexes of such devices by name; routes over others are left out, as are
    those towards addresses that `ways`, of underlay_ways(), does not have.
    NetworkError after everything that could be done was done."""
    changes: list[str] = []
    problems: list[str] = []
    with IPRoute() as ipr, RouteSocket(ROUTE_PROTOCOL, step) as routes:
        index = _index(ipr, name)
        if index is None:
            raise OverlayMissing(f"the overlay device {name} is missing: ensure_overlay() comes first")
        up = _is_up(ipr, index)
        # A device that went down lost its routes.
        devices = _Devices(index, wireguard or {}, ways or {})
        real = _as_made(made, devices) if made is not None and up else _read(ipr, routes, devices)
        difference = _difference(real, datapath, devices, up)

        def attempt(words: str, kind: str, action: str, **arguments: Any) -> None:
            step()
            try:
                getattr(ipr, kind)(action, **arguments)
            except NetlinkError as error:
                # What is to go may have gone with its address or device.
                if action == "del" and error.code in _GONE:
                    return
                problems.append(f"cannot {words}: {_explain(error, kind)}")
            else:
                changes.append(words)

        def attempt_routes(action: str, verb: str, wanted: Sequence[tuple[Route, Found]]) -> None:
            results = routes.change([(action, found) for _, found in wanted])
            for (route, _), number in zip(wanted, results, strict=True):
                if number == 0:
                    changes.append(f"{verb} {_route_words(route)}")
                elif action != DELETE or number not in _GONE:
                    problems.append(f"cannot {verb} {_route_words(route)}: {explain(number, action, ROUTE_PROTOCOL)}")

        def attempt_rules() -> None:
            for rule in difference.add_rules:
                attempt(f"add {_rule_words(rule)}", "rule", "add", **_rule_arguments(rule))

        # What is closed is so before it is not masqueraded any more; what is opened is masqueraded before that.
        closing = [(route, _found(route, devices)) for _, route in difference.replace_routes if route.unreachable]
        attempt_routes(REPLACE, "change to", closing)
        if made is None or made.keep_source != datapath.keep_source:
            # Before the routes: what they lead over the overlay is not masqueraded once.
            step()
            try:
                changes += apply_keep_source(datapath.keep_source, name)
                _show_marks(datapath.keep_source, routes)
            except NetworkError as error:
                # A precaution that cannot be made is told by who looks whether it is needed, and stops nothing.
                if datapath.keep_source is None or not datapath.keep_source.precaution:
                    problems += error.problems
        attempt_routes(
            ADD, "add", [(each, _found(each, devices)) for each in difference.add_routes if not each.has_device]
        )
        if not difference.up:
            # Nothing has come in yet. From now on what has no route over the device is blocked, and not answered
            # around it; on a device that is up already, rules wait for the routes that they lead to.
            attempt_rules()
            attempt(f"set {name} up", "link", "set", index=index, state="up")
        for address in difference.add_addresses:
            attempt(
                f"add address {address}",
                "addr",
                "add",
                index=index,
                address=str(address),
                prefixlen=address.max_prefixlen,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                # Until its duplicate address detection is over, the kernel takes no route with an address as source.
                flags=0 if address.version == 4 else _IFA_F_NODAD,
            )
        attempt_routes(ADD, "add", [(each, _found(each, devices)) for each in difference.add_routes if each.has_device])
        others = [(route, _found(route, devices)) for _, route in difference.replace_routes if not route.unreachable]
        attempt_routes(REPLACE, "change to", others)
        if difference.up:
            attempt_rules()
        for rule in difference.remove_rules:
            attempt(f"remove {_rule_words(rule)}", "rule", "del", **_rule_arguments(rule))
        attempt_routes(DELETE, "remove", [(found.route, found) for found in difference.remove_routes])
        for interface in difference.remove_addresses:
            attempt(
                f"remove address {interface}",
                "addr",
                "del",
                index=index,
                address=str(interface.ip),
                prefixlen=interface.network.prefixlen,
                family=socket.AF_INET if interface.version == 4 else socket.AF_INET6,
            )
    if problems:
        raise NetworkError(problems, tuple(changes))
    return NetworkResult(tuple(changes))


def _show_marks(wanted: KeepSource | None, routes: RouteSocket) -> None:
    """Where members' packets come in and the kernel's check of sources is strict, it goes by the mark of what was
    masqueraded, whose way back is the underlay's."""
    members = [address for network in wanted.members for address in network] if wanted is not None else []
    for index in sorted({way.oif for way in routes.ways(members).values() if isinstance(way, Way)}):
        if settings.is_strict(index):
            settings.set_ipv4(index, settings.SRC_VALID_MARK)


def _rule_arguments(rule: Rule) -> dict[str, Any]:
    only: dict[str, Any] = {}
    if rule.destination_port:
        only = {"dport_range": f"{rule.destination_port}:{rule.destination_port}", "ip_proto": socket.IPPROTO_UDP}
    if rule.mark:
        only |= {"fwmark": rule.mark, "fwmask": _MARK_MASK}
    if rule.own:
        only["iifname"] = "lo"
    return {
        **only,
        "family": _family(rule.source),
        "src": str(rule.source.network_address),
        "src_len": rule.source.prefixlen,
        "table": rule.table,
        "priority": rule.priority,
        "protocol": ROUTE_PROTOCOL,
    }


def _explain(error: Any, kind: str) -> str:
    text = str(error.args[1] if len(error.args) > 1 else error)
    if kind == "link" and error.code in (errno.EADDRINUSE, errno.EEXIST):
        return f"{text}: its UDP port is in use (ss -ulnp; ip -d link show type vxlan)"
    return text


def underlay_ways(
    routes: Iterable[Route], step: Callable[[], None] = lambda: None, others: Iterable[Address] = ()
) -> tuple[dict[Address, Way], list[str]]:
    """How the underlay leads to the addresses that `routes` lead towards, and to `others`, and what is wrong with those
    that it does not lead to, in words."""
    targets = sorted({*others, *(each.toward for each in routes if each.toward is not None)}, key=int)
    found: dict[Address, Way] = {}
    problems = []
    with RouteSocket(ROUTE_PROTOCOL, step) as netlink:
        for target, way in netlink.ways(targets).items():
            if isinstance(way, Way):
                found[target] = way
            else:
                problems.append(
                    f"this host has no route to {target} ({os.strerror(way)}), so what is behind it is not reached: "
                    "check the host's routes (ip route get)"
                )
    return found, problems


def tunnel_routes(device: str) -> frozenset[Network]:
    """Prefixes that strongSwan leads out by `device`, which are static routes; none when it is not there.
    NetworkError."""
    try:
        index = socket.if_nametoindex(device)
    except OSError:
        return frozenset()
    with RouteSocket(_STATIC) as routes:
        return frozenset(each.route.prefix for each in routes.dump() if each.way.oif == index)


def routed_over(table: int) -> dict[Network, Address]:
    """Over whom an earlier agent, or this one, led packets by its routes in `table`. NetworkError."""
    with RouteSocket(ROUTE_PROTOCOL) as routes:
        return {
            each.route.prefix: each.way.gateway
            for each in routes.dump()
            if each.route.table == table and each.way.gateway is not None
        }


def audit_network(
    datapath: Datapath,
    name: str = OVERLAY,
    step: Callable[[], None] = lambda: None,
    wireguard: Mapping[str, int] | None = None,
    ways: Mapping[Address, Way] | None = None,
) -> list[str]:
    """What differs from what is wanted, in words. Changes nothing. `step` is called whenever a part is read.
    `wireguard` are the indexes of such devices by name, `ways` are of underlay_ways()."""
    with IPRoute() as ipr, RouteSocket(ROUTE_PROTOCOL, step) as routes:
        index = _index(ipr, name)
        if index is None:
            return [f"the overlay device {name} is missing"]
        (link,) = ipr.get_links(index)
        problems = [f"{name} {words}" for words in _link_differences(link, datapath.overlay_port)]
        if link.get_attr("IFLA_MTU") != datapath.overlay_mtu:
            problems.append(f"{name} has MTU {link.get_attr('IFLA_MTU')}, wanted: {datapath.overlay_mtu}")
        devices = _Devices(index, wireguard or {}, ways or {})
        difference = _difference(_read(ipr, routes, devices), datapath, devices, bool(link["flags"] & _IFF_UP))
    if not difference.up:
        problems.append(f"{name} is down")
    problems += [f"address {each} is missing on {name}" for each in difference.add_addresses]
    problems += [f"address {each} on {name} is not wanted" for each in difference.remove_addresses]
    problems += [f"{_route_words(each)} is missing" for each in difference.add_routes]
    problems += [
        f"{_route_words(real)} is not what is wanted: {_route_words(wanted)}"
        + ("" if wanted.wireguard or wanted.unreachable or wanted.toward or wanted.sunk else f" over {name}")
        for real, wanted in difference.replace_routes
    ]
    problems += [f"{_route_words(each.route)} is not wanted" for each in difference.remove_routes]
    problems += [f"{_rule_words(each)} is missing" for each in difference.add_rules]
    problems += [f"{_rule_words(each)} is not wanted" for each in difference.remove_rules]
    return problems + audit_keep_source(datapath.keep_source, name)


def remove_network(name: str = OVERLAY) -> list[str]:
    """Removes our rules, routes, the device and our table of netfilter; answers what was removed."""
    removed = []
    with IPRoute() as ipr, RouteSocket(ROUTE_PROTOCOL) as routes:
        for rule in sorted(_rules(ipr), key=_rule_order, reverse=True):
            ipr.rule("del", **_rule_arguments(rule))
            removed.append(_rule_words(rule))
        real = routes.dump()
        for found, number in zip(real, routes.change([(DELETE, each) for each in real]), strict=True):
            if number and number not in _GONE:
                raise NetworkError(f"cannot remove {_route_words(found.route)}: {explain(number, DELETE, 0)}")
            removed.append(_route_words(found.route))
        index = _index(ipr, name)
        if index is not None:
            ipr.link("del", index=index)
            removed.append(f"device {name}")
    return removed + remove_keep_source()


def underlay_mtu(address: Address) -> int:
    """MTU in bytes of the path to `address`: of its device if it is this host's own, else of the route to it
    (with what path MTU discovery has learnt)."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with IPRoute() as ipr:
        for message in ipr.get_addr(family=family):
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if ip_address(text) == address:
                return _link_mtu(ipr, message["index"])
        try:
            (route,) = ipr.route("get", dst=str(address), family=family)
        except NetlinkError as error:
            raise NetworkError(
                f"this host has no route to {address} ({error}): check the underlay address in the inventory and "
                "the host's routes (ip route get)"
            ) from error
        mtu = _link_mtu(ipr, route.get_attr("RTA_OIF"))
        metrics = route.get_attr("RTA_METRICS")
        learnt = metrics.get_attr("RTAX_MTU") if metrics is not None else None
        return min(mtu, int(learnt)) if learnt else mtu


def _link_mtu(ipr: Any, index: int) -> int:
    (link,) = ipr.get_links(index)
    return int(link.get_attr("IFLA_MTU"))
