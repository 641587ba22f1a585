# SPDX-License-Identifier: BSD-2-Clause
"""The matrix of sites: how packets go between each two, what must be open for that, and what a run changes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .encryption import CHANGING, STAGES, Pair, Stage, pairs
from .ipsec import GATEWAY, Ipsec
from .openings import Documents, Opening, between
from .routing import NATIVE, TUNNEL
from .spec import IPSEC_OVERHEAD, IPSEC_PORTS, OVERLAY_OVERHEAD, WIREGUARD_OVERHEAD, through_gateways

UNDERLAY_MTU = 1500

_MOST_LINES = 100

Ways = Mapping[Pair, Sequence[Any]]
"""`Plan.stages`, `Plan.native`."""


def inner_mtu(
    stage: Stage, overlay_mtu: int | None, underlay: int = UNDERLAY_MTU, gateways: Stage = Stage.PLAIN
) -> int:
    """MTU in bytes of the overlay's routes, at a stage of encryption and one of a tunnel between gateways."""
    underlay = underlay if gateways is Stage.PLAIN else through_gateways(underlay)
    inner = underlay - OVERLAY_OVERHEAD - (WIREGUARD_OVERHEAD if stage is not Stage.PLAIN else 0)
    return inner if overlay_mtu is None else min(inner, overlay_mtu)


def rows(
    documents: Documents,
    overlay_port: int,
    overlay_mtu: int | None,
    ways: Ways,
    native_ways: Ways,
    ipsec_ways: Ways,
    ipsec: Ipsec,
) -> Iterator[dict[str, Any]]:
    """A row for each two sites that have hosts, and for each site that has several."""
    sizes: dict[str, int] = {}
    for document in documents.values():
        for entry in document["hosts"].values():
            sizes[entry["site"]] = sizes.get(entry["site"], 0) + 1
    for one in pairs(sizes):
        if one[0] == one[1] and sizes[one[0]] == 1:
            continue
        now, *following = ways.get(one, (None, Stage.PLAIN))
        stages = [stage for stage in (now, *following) if stage is not None]
        native_now, *native_following = native_ways.get(one, (None, Stage.PLAIN))
        native = [stage for stage in (native_now, *native_following) if stage is not None]
        ipsec_now, *ipsec_following = ipsec_ways.get(one, (None, Stage.PLAIN))
        gateways = [stage for stage in (ipsec_now, *ipsec_following) if stage is not None]
        encrypted = "wireguard" if following[-1] is Stage.DEMANDS else "none"
        yield {
            "sites": list(one),
            "routing": NATIVE if native_following[-1] is Stage.DEMANDS else TUNNEL,
            "routing_now": None if native_now is None else native_now.word,
            "routing_steps": _words(native_now, native_following),
            "encryption": GATEWAY if ipsec_following[-1] is Stage.DEMANDS else encrypted,
            "now": None if now is None else now.word,
            "steps": _words(now, following),
            "ipsec_now": None if ipsec_now is None else ipsec_now.word,
            "ipsec_steps": _words(ipsec_now, ipsec_following),
            # The smallest on the way.
            "mtu": UNDERLAY_MTU
            if min(native) >= Stage.SENDS
            else inner_mtu(max(stages), overlay_mtu, gateways=max(gateways)),
            "open": [
                {"protocol": each.protocol, "port": each.port, "on": each.to, "from": each.senders}
                for each in (
                    *(_of_gateways(one, ipsec) if max(gateways) is not Stage.PLAIN else ()),
                    *_carried(between(documents, one, overlay_port, stages, native), min(gateways)),
                )
            ],
        }


def _of_gateways(pair: Pair, ipsec: Ipsec) -> Iterator[Opening]:
    """What the two gateways need of each other."""
    places = {}
    for site in pair:
        side = ipsec.sites.get(site)
        if side is not None:
            far = side.gateway or side.peer
            name = side.gateway.host if side.gateway else f"the gateway of {site}"
            places[site] = f"{name} ({far.address})" if far else name
    for site, other in (pair, pair[::-1]):
        if site in places and other in places:
            yield from (Opening("UDP", port, places[other], places[site]) for port in IPSEC_PORTS)


def _carried(found: Sequence[Opening], stage: Stage) -> Iterator[Opening]:
    """`stage`, the least of the pair's, tells whether others than hosts and gateways see what is carried."""
    for each in found:
        inside = " (inside the gateways' tunnel)" if stage is Stage.DEMANDS else ""
        yield replace(each, senders=each.senders + inside)


def _words(now: Stage | None, following: Sequence[Stage]) -> list[str]:
    return [stage.word for stage in following] if now not in (None, following[-1]) else []


def routes(documents: Documents, native_ways: Ways) -> Iterator[dict[str, Any]]:
    """What routers need so that packets go natively: on those of each `site` the range of each of its hosts, `to`,
    leads to the host's address, `via`; `from` are the sites from which packets to these ranges come."""
    senders: dict[str, set[str]] = {}
    for (one, other), stages in native_ways.items():
        if any(stage is not None and stage is not Stage.PLAIN for stage in stages[1:]):
            senders.setdefault(one, set()).add(other)
            senders.setdefault(other, set()).add(one)
    for document in documents.values():
        for host, entry in document["hosts"].items():
            if entry["site"] in senders:
                yield {
                    "site": entry["site"],
                    "host": host,
                    "to": entry["range4"],
                    "via": entry["underlay4"],
                    "from": sorted(senders[entry["site"]]),
                }


def route_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each site, and what the others' routers need of it."""
    sites: dict[str, list[Mapping[str, Any]]] = {}
    for route in found:
        sites.setdefault(route["site"], []).append(route)
    told = []
    for site, those in sorted(sites.items()):
        each = "; ".join(f"{one['to']} via {one['via']} ({one['host']})" for one in those[:_MOST_LINES])
        if len(those) > _MOST_LINES:
            each += f"; and {len(those) - _MOST_LINES} more"
        far = [other for other in those[0]["from"] if other != site]
        words = f"routers of {site}: {each}."
        if site in those[0]["from"]:
            words += " Hosts on one subnet set these routes to each other themselves."
        if far:
            words += f" Routers of {', '.join(far)} lead these ranges to {site}."
        told.append(words)
    return told


def name(sites: Sequence[str]) -> str:
    return f"within {sites[0]}" if sites[0] == sites[1] else f"{sites[0]} and {sites[1]}"


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row, the first hundred of them."""
    told = []
    for row in found[:_MOST_LINES]:
        on = row["encryption"] != "none"
        changing = f" (now being turned {'on' if on else 'off'})" if row["steps"] or row["ipsec_steps"] else ""
        native = row["routing"] == NATIVE
        path = "native" if native else "tunnel (VXLAN)"
        if row["routing_steps"]:
            path += f" (now being turned {'on' if native else 'off'})"
        opened = "; ".join(_opened(one) for one in row["open"])
        told.append(
            f"{name(row['sites'])}: path {path}, encryption {row['encryption']}{changing}, MTU {row['mtu']} "
            f"inside where the underlay has {UNDERLAY_MTU}. Open: {opened}"
        )
    if len(found) > _MOST_LINES:
        told.append(f"and {len(found) - _MOST_LINES} more pairs of sites")
    return told


def _opened(one: Mapping[str, Any]) -> str:
    port = f" {one['port']}" if one["port"] is not None else ""
    return f"{one['protocol']}{port} on {one['on']} from {one['from']}"


_ON = {
    Stage.ACCEPTS: "every host of the two gets WireGuard and a key of its own, and takes encrypted packets too; "
    f"packets are {WIREGUARD_OVERHEAD} bytes smaller from then on and still go in clear",
    Stage.SENDS: "when each host has proven that it reaches the others through WireGuard, packets go through it",
    Stage.DEMANDS: "nothing is sent or taken in clear any more",
}
_OFF = {
    Stage.SENDS: "packets in clear are taken again too",
    Stage.ACCEPTS: "packets go in clear, and encrypted ones are still taken",
    Stage.PLAIN: "WireGuard and its keys go, where no other pair needs them",
}


_NATIVE_ON = {
    Stage.ACCEPTS: "every host of the two takes native packets too; packets still go through the tunnel",
    Stage.SENDS: "when each host has proven by packets of the full size that it reaches the others natively, all go so",
    Stage.DEMANDS: "nothing is taken through the tunnel any more",
}
_IPSEC_ON = {
    Stage.ACCEPTS: "the two gateways get strongSwan and make a tunnel; packets of other hosts go as before, and are "
    f"{IPSEC_OVERHEAD} bytes smaller from then on",
    Stage.SENDS: "when the gateways have proven that packets of the full size pass the tunnel, all hosts of the two "
    "send to their gateway",
    Stage.DEMANDS: "nothing leaves for the other site by another way any more",
}
_IPSEC_OFF = {
    Stage.SENDS: "other ways than the gateways' are not closed any more",
    Stage.ACCEPTS: "packets go in clear by the way that the network has, those between the gateways themselves through "
    "the tunnel",
    Stage.PLAIN: "the tunnel goes",
}
_NATIVE_OFF = {
    Stage.SENDS: "packets through the tunnel are taken again too",
    Stage.ACCEPTS: f"packets go through the tunnel and are {OVERLAY_OVERHEAD} bytes smaller, and native ones are still "
    "taken",
    Stage.PLAIN: "native packets are not taken any more",
}


def changes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a run does to pairs whose encryption or native routing is turned on or off, a line each."""
    told = []
    for row in found:
        if row["steps"]:
            on = row["encryption"] == "wireguard"
            told.append(_change("encryption", row, on, row["now"], row["steps"], _ON if on else _OFF, shrinks=on))
        if row["ipsec_steps"]:
            on = row["encryption"] == GATEWAY
            words = _IPSEC_ON if on else _IPSEC_OFF
            now, steps = row["ipsec_now"], row["ipsec_steps"]
            told.append(_change("encryption by gateways", row, on, now, steps, words, shrinks=on))
        if row["routing_steps"]:
            on = row["routing"] == NATIVE
            words = _NATIVE_ON if on else _NATIVE_OFF
            now, steps = row["routing_now"], row["routing_steps"]
            told.append(_change("native routing", row, on, now, steps, words, shrinks=not on))
    return told


def _change(
    what: str,
    row: Mapping[str, Any],
    on: bool,
    now: str,
    following: Sequence[str],
    words: Mapping[Stage, str],
    shrinks: bool,
) -> str:
    stages = [STAGES[word] for word in following]
    begun = f", which was begun before ({now})" if now in CHANGING else ""
    steps = "; ".join(f"({number}) {words[stage]}" for number, stage in enumerate(stages, 1) if stage in words)
    told = (
        f"{what} of {name(row['sites'])} is turned {'on' if on else 'off'}{begun}, in steps of one run, of which each "
        f"begins when all hosts of the two sites have done the one before: {steps}. Connections stay"
    )
    if shrinks:
        told += "; a datagram that must not be fragmented and is larger than the new MTU is refused to its sender"
    return told
