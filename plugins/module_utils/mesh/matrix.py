# SPDX-License-Identifier: BSD-2-Clause
"""The matrix of sites: how packets go between each two, what must be open for that, and what a run changes. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, collapse_addresses
from itertools import groupby
from typing import Any

from .encryption import CHANGING, STAGES, Keys, Pair, Stage, pairs
from .ipsec import GATEWAY, Ipsec
from .openings import Documents, Opening, between, is_in_cluster, pods_at, wireguard_ports
from .routing import AUTO, NATIVE, TUNNEL
from .spec import (
    IPSEC_OVERHEAD,
    IPSEC_PORTS,
    OVERLAY_OVERHEAD,
    WIREGUARD_DEVICES,
    WIREGUARD_OVERHEAD,
    through_gateways,
)

UNDERLAY_MTU = 1500
"""Bytes; of an underlay that nobody has measured."""

_MOST_LINES = 100
_MOST_PAIRS = 300
"""As many as 24 sites have."""
_MOST_NAMES = 3

Ways = Mapping[Pair, Sequence[Any]]
"""`Plan.stages`, `Plan.native`."""


def inner_mtu(underlay: int, tunnel: bool, wireguard: bool, gateways: bool, most: int | None) -> int:
    """MTU in bytes of routes, by that of the underlay and what is around packets; `most` is what the inventory allows
    inside the tunnel."""
    underlay = through_gateways(underlay) if gateways else underlay
    inner = underlay - (WIREGUARD_OVERHEAD if wireguard else 0)
    if not tunnel:
        return inner
    inner -= OVERLAY_OVERHEAD
    return inner if most is None else min(inner, most)


def measured(found: Sequence[Mapping[str, Any]], underlays: Mapping[str, tuple[str, int]]) -> list[dict[str, Any]]:
    """Rows of `rows` with the MTU of what is really there: `underlays` has by site the host whose underlay carries
    least of those that were looked at, and how many bytes."""
    told = []
    for row in found:
        known = {site: underlays[site] for site in row["sites"] if site in underlays}
        if known:
            host, outer = min(known.values(), key=lambda one: one[1])
            row = {**row, "underlay": outer, "measured": sorted(known), "mtu": inner_mtu(outer, **row["around"])}
            row["least"] = host
        told.append(dict(row))
    return told


def rows(
    documents: Documents,
    overlay_port: int,
    overlay_mtu: int | None,
    ways: Ways,
    native_ways: Ways,
    ipsec_ways: Ways,
    keys: Sequence[Keys],
    ipsec: Ipsec,
    chosen: Mapping[Pair, tuple[bool, str]],
    closed: Collection[str],
) -> Iterator[dict[str, Any]]:
    """A row for each two sites that have hosts, and for each site that has several: where nodes are that only
    Kubernetes knows, there may be. And for two of which one has a gateway that is not ours and no hosts. `chosen`: of
    pairs that choose their way whether they are to try it, and words. `closed` are sites to which nobody outside opens
    anything."""
    sizes: dict[str, int] = {}
    with_nodes: set[str] = set()
    for document in documents.values():
        for entry in document["hosts"].values():
            sizes[entry["site"]] = sizes.get(entry["site"], 0) + 1
            with_nodes |= {entry["site"]} if "kubernetes_node" in entry else set()
        if is_in_cluster(document):
            sizes[document["site"]] = sizes.get(document["site"], 0) + 2
    of_others = {
        one for one in ipsec.pairs if [bool(ipsec.sites[site].peers) for site in one if site not in sizes] == [True]
    }
    for one in sorted({*pairs(sizes), *of_others}):
        if one[0] == one[1] and sizes[one[0]] == 1:
            continue
        if one in of_others:
            yield _of_networks(one, ipsec, overlay_mtu)
            continue
        now, following, stages = _taken(ways, one)
        native_now, native_following, native = _taken(native_ways, one)
        ipsec_now, ipsec_following, gateways = _taken(ipsec_ways, one)
        tried, words = chosen.get(one, (False, None))
        each = _together(stages, native)
        in_clear = [way if stage is not Stage.DEMANDS else Stage.PLAIN for stage, way in each]
        needed = [*in_clear, Stage.PLAIN] if words else in_clear  # the tunnel, to come back to
        encrypted = "wireguard" if following[-1] is Stage.DEMANDS else "none"
        # The most that is around packets on the way.
        around = min(
            (_around(stage, way, max(gateways)) for stage, way in each),
            key=lambda found: inner_mtu(UNDERLAY_MTU, **found, most=overlay_mtu),
        )
        yield {
            "sites": list(one),
            "routing": AUTO if tried else NATIVE if native_following[-1] is Stage.DEMANDS else TUNNEL,
            "auto": words,
            "routing_now": None if native_now is None else native_now.word,
            "routing_steps": _words(native_now, native_following),
            "kubernetes": [site for site in dict.fromkeys(one) if site in with_nodes],
            "encryption": GATEWAY if ipsec_following[-1] is Stage.DEMANDS else encrypted,
            "now": None if now is None else now.word,
            "steps": _words(now, following),
            "ipsec_now": None if ipsec_now is None else ipsec_now.word,
            "ipsec_steps": _words(ipsec_now, ipsec_following),
            "around": {**around, "most": overlay_mtu},
            "underlay": UNDERLAY_MTU,
            "measured": [],
            "mtu": inner_mtu(UNDERLAY_MTU, **around, most=overlay_mtu),
            "open": [
                _open(each)
                for each in (
                    *(_of_gateways(one, ipsec) if max(gateways) is not Stage.PLAIN else ()),
                    *_carried(between(documents, one, overlay_port, stages, needed, keys, closed), min(gateways)),
                )
            ],
        }


def _of_networks(pair: Pair, ipsec: Ipsec, overlay_mtu: int | None) -> dict[str, Any]:
    """The row of two sites of which one has no hosts: all between their networks is in the gateways' tunnel alone."""
    around = {"tunnel": False, "wireguard": False, "gateways": True}
    return {
        "sites": list(pair),
        "routing": NATIVE,
        "auto": None,
        "routing_now": None,
        "routing_steps": [],
        "kubernetes": [],
        "encryption": GATEWAY,
        "now": None,
        "steps": [],
        "ipsec_now": None,
        "ipsec_steps": [],
        "around": {**around, "most": overlay_mtu},
        "underlay": UNDERLAY_MTU,
        "measured": [],
        "mtu": inner_mtu(UNDERLAY_MTU, **around, most=overlay_mtu),
        "open": [_open(each) for each in _of_gateways(pair, ipsec)],
    }


def _open(each: Opening) -> dict[str, Any]:
    return {"protocol": each.protocol, "port": each.port, "on": each.to, "from": each.senders}


def _taken(ways: Ways, pair: Pair) -> tuple[Stage | None, list[Stage], list[Stage]]:
    """Where a pair is, what follows, and all stages at which it is meanwhile."""
    now, *following = ways.get(pair, (None, Stage.PLAIN))
    return now, following, [stage for stage in (now, *following) if stage is not None]


def _together(stages: Sequence[Stage], native: Sequence[Stage]) -> list[tuple[Stage, Stage]]:
    """Stages of encryption and of native routing that a pair is at together; the last ones stand."""
    number = max(len(stages), len(native))
    held = ([*some, *(some[-1] for _stage in range(len(some), number))] for some in (stages, native))
    return list(zip(*held))


def _around(stage: Stage, native: Stage, gateways: Stage) -> dict[str, bool]:
    """What is around packets between the two, as `inner_mtu` has it."""
    if native >= Stage.SENDS and stage is not Stage.SENDS:
        return {"tunnel": False, "wireguard": stage is Stage.DEMANDS, "gateways": False}
    return {"tunnel": True, "wireguard": stage is not Stage.PLAIN, "gateways": gateways is not Stage.PLAIN}


def _of_gateways(pair: Pair, ipsec: Ipsec) -> Iterator[Opening]:
    """What each gateway of the one site and each of the other need of each other."""
    places: dict[str, list[str]] = {}
    for site in pair:
        side = ipsec.sites.get(site)
        if side is not None:
            places[site] = [f"{one.host} ({one.address})" for one in side.gateways]
            places[site] += [f"the gateway of {site} ({one.address})" for one in side.peers]
    for site, other in (pair, pair[::-1]):
        for here in places.get(site, ()):
            for there in places.get(other, ()):
                yield from (Opening("UDP", port, there, here) for port in IPSEC_PORTS)


def _carried(found: Sequence[Opening], stage: Stage) -> Iterator[Opening]:
    """`stage`, the least of the pair's, tells whether others than hosts and gateways see what is carried."""
    for each in found:
        inside = " (inside the gateways' tunnel)" if stage is Stage.DEMANDS else ""
        yield replace(each, senders=each.senders + inside)


def _words(now: Stage | None, following: Sequence[Stage]) -> list[str]:
    return [stage.word for stage in following] if now is not None and {now} != {*following} else []


def routes(documents: Documents, ways: Ways, native_ways: Ways) -> Iterator[dict[str, Any]]:
    """What the routers of each `site` need so that packets go natively: the prefix `to` leads to a host's address,
    `via`, or, where that is None, to another site: over the next hop that the addresses `like` of hosts there have.
    `why` is in words. Packets inside WireGuard need nothing."""
    hosts: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for document in documents.values():
        for host, entry in document["hosts"].items():
            hosts.setdefault(entry["site"], []).append((host, entry))
    native = in_clear(ways, native_ways)
    for site in sorted(native.keys() & hosts.keys()):
        far = sorted((native[site] - {site}) & hosts.keys())
        senders = [*far, *([f"hosts of {site} on other subnets"] if site in native[site] and hosts[site][1:] else [])]
        for host, entry in hosts[site] if senders else ():
            for what, ranges in (("workloads of", [entry["range4"]]), ("pods on", entry.get("pod_cidrs", ()))):
                why = f"{what} {host}, for packets from {_listed(senders)}"
                for text in ranges:
                    yield {"site": site, "to": text, "via": entry["underlay4"], "like": [], "why": why}
        for other in far:
            like = [entry["underlay4"] for _host, entry in hosts[other]]
            ranges = (IPv4Network(entry["range4"]) for _host, entry in hosts[other])
            for network in collapse_addresses(ranges):
                why = f"workloads of hosts of {other}"
                yield {"site": site, "to": str(network), "via": None, "like": like, "why": why}
            for document in documents.values():
                nodes = [
                    entry["underlay4"]
                    for _host, entry in hosts[other]
                    if entry in document["hosts"].values() and "kubernetes_node" in entry
                ]
                for network in collapse_addresses(map(IPv4Network, pods_at(document, [other]))):
                    why = f"pods on nodes of {document['name']}"
                    yield {"site": site, "to": str(network), "via": None, "like": nodes, "why": why}


def in_clear(ways: Ways, native_ways: Ways) -> dict[str, set[str]]:
    """To which sites, by site, packets go natively in clear at some stage that follows."""
    found: dict[str, set[str]] = {}
    for one, other in native_ways:
        following = (_taken(each, (one, other))[1] for each in (ways, native_ways))
        if any(way is not Stage.PLAIN and stage is not Stage.DEMANDS for stage, way in _together(*following)):
            found.setdefault(one, set()).add(other)
            found.setdefault(other, set()).add(one)
    return found


def routes_to_gateways(ipsec: Ipsec, ipsec_ways: Ways) -> Iterator[dict[str, Any]]:
    """As `routes`: how machines of a site that are none of the mesh come to what is behind the gateway of another."""
    for pair, stages in sorted(ipsec_ways.items()):
        if not any(stages[1:]):
            continue
        for site, other in (pair, pair[::-1]):
            here, far = ipsec.sites.get(site), ipsec.sites.get(other)
            if here is None or not here.gateways or here.lost or far is None:
                continue
            first, *others = here.gateways
            for network in far.networks:
                why = f"networks of {other} behind the gateways, for machines of {site} that are none of the mesh"
                if others:
                    why += f"; when {first.host} is lost, via {others[0].underlay}"
                yield {"site": site, "to": str(network), "via": str(first.underlay), "like": [], "why": why}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def route_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each route, the first hundred of each site."""
    told = []
    for site, these in groupby(found, key=lambda route: route["site"]):
        those = list(these)
        for route in those[:_MOST_LINES]:
            hop = f"via {route['via']}" if route["via"] else f"over the way to {_listed(route['like'])}"
            told.append(f"routers of {site}: {route['to']} {hop} ({route['why']})")
        if len(those) > _MOST_LINES:
            told.append(f"routers of {site}: and {len(those) - _MOST_LINES} more, in `routes` of isthmus.mesh.plan")
    return told


def host_routes(
    found: Sequence[Mapping[str, Any]], documents: Documents, ipsec: Ipsec, ipsec_ways: Ways, keys: Keys
) -> list[str]:
    """A line for each site of `rows`, as many as `lines` has: what its hosts' agents set by themselves when all
    steps are done, with these keys, and one for what is behind the gateways of another site, which need not have hosts.
    Of ranges the workloads': pods of Kubernetes nodes are led as these."""
    told = []
    for row in found[:_MOST_PAIRS]:
        if (row["routing"], row["encryption"]) == (NATIVE, GATEWAY):
            continue  # of a site without hosts
        over = "isthmus0"
        if row["routing"] == NATIVE:
            over = "the way to each host's underlay address"
            if row["encryption"] == "wireguard":
                over = WIREGUARD_DEVICES[keys.number]
        elif row["routing"] == AUTO:
            natively = "as packets to the hosts go"
            if row["encryption"] == "wireguard":
                natively = f"over {WIREGUARD_DEVICES[keys.number]}"
            over += f", or {natively} when that is proven"
        one, other = row["sites"]
        for here, there in dict.fromkeys(((one, other), (other, one))):
            entries = (entry for document in documents.values() for entry in document["hosts"].values())
            ranges = collapse_addresses(IPv4Network(entry["range4"]) for entry in entries if entry["site"] == there)
            listed = _listed([str(network) for network in ranges])
            if listed:
                why = f"workloads of {'each other' if here == there else f'hosts of {there}'}"
                told.append(f"hosts of {here}: {listed} over {over}, in tables main and 730 ({why})")
    through = [pair for pair in sorted(ipsec_ways) if _taken(ipsec_ways, pair)[1][-1] is not Stage.PLAIN]
    for one, other in through[:_MOST_PAIRS]:
        for here, there in ((one, other), (other, one)):
            near, far = ipsec.sites.get(here), ipsec.sites.get(there)
            if near is None or far is None or not near.gateways:
                continue
            told.append(
                f"hosts of {here}: {_listed([str(network) for network in far.networks])} via "
                f"{near.gateways[0].underlay}, in table 736 (networks of {there} behind the gateways); on the gateway "
                "itself into the tunnel, in strongSwan's table 220"
            )
    if len(found) > _MOST_PAIRS:
        told.append(f"and those for {len(found) - _MOST_PAIRS} more pairs of sites")
    return told


def name(sites: Sequence[str]) -> str:
    return f"within {sites[0]}" if sites[0] == sites[1] else f"{sites[0]} and {sites[1]}"


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row, the first ones of them."""
    told = []
    for row in found[:_MOST_PAIRS]:
        on = row["encryption"] != "none"
        changing = f" (now being turned {'on' if on else 'off'})" if row["steps"] or row["ipsec_steps"] else ""
        native = row["routing"] == NATIVE
        path = "native" if native else "tunnel (VXLAN)"
        if native and row["encryption"] == "wireguard":
            path += " inside WireGuard"
        if row["routing_steps"] and row["routing"] != AUTO:
            path += f" (now being turned {'on' if native else 'off'})"
        if row["auto"]:
            path += f" (auto: {row['auto']})"
        opened = "; ".join(_opened(one) for one in row["open"])
        told.append(
            f"{name(row['sites'])}: path {path}, encryption {row['encryption']}{changing}, MTU {row['mtu']} "
            f"inside{_underlay(row)}. Open: {opened}"
        )
    if len(found) > _MOST_PAIRS:
        told.append(f"and {len(found) - _MOST_PAIRS} more pairs of sites, in `sites` of isthmus.mesh.plan")
    return told


def _underlay(row: Mapping[str, Any]) -> str:
    if not row["measured"]:
        return f" where the underlay has {row['underlay']}"
    lacking = [site for site in dict.fromkeys(row["sites"]) if site not in row["measured"]]
    more = f"; not measured: {lacking[0]}" if lacking else ""
    return f", {row['underlay']} outside (the least that was measured, on {row['least']}{more})"


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
    Stage.ACCEPTS: "the gateways get strongSwan and make their tunnels; packets of other hosts go as before, and are "
    f"{IPSEC_OVERHEAD} bytes smaller from then on",
    Stage.SENDS: "when the gateways have proven that packets of the full size pass the tunnels, all hosts of the two "
    "send to their gateway",
    Stage.DEMANDS: "nothing leaves for the other site by another way any more",
}
_IPSEC_OFF = {
    Stage.SENDS: "other ways than the gateways' are not closed any more",
    Stage.ACCEPTS: "packets go in clear by the way that the network has, those between the gateways themselves through "
    "the tunnels",
    Stage.PLAIN: "the tunnels go",
}
_NATIVE_OFF = {
    Stage.SENDS: "packets through the tunnel are taken again too",
    Stage.ACCEPTS: f"packets go through the tunnel and are {OVERLAY_OVERHEAD} bytes smaller, and native ones are still "
    "taken",
    Stage.PLAIN: "native packets are not taken any more",
}


def _trial(row: Mapping[str, Any]) -> str:
    """What a run does to a pair that is to try whether packets go natively."""
    stages = [STAGES[word] for word in row["routing_steps"]]
    tried = zip(stages, stages[1:], range(1, len(stages)))
    begins = next((at for before, stage, at in tried if (before, stage) == (Stage.PLAIN, Stage.ACCEPTS)), 0)
    begun = f", which was begun before ({row['routing_now']})" if row["routing_now"] in CHANGING else ""
    led = row["routing_steps"][:begins]
    back = _done(row["routing_now"], led, (_NATIVE_ON, _NATIVE_OFF), False)[0] if led else []
    ahead = [f"({begins + stage}) {words}" for stage, words in _NATIVE_ON.items()]
    smaller = f"{'in the steps before and ' if back else ''}when packets come back to the tunnel from step {begins + 2}"
    return (
        f"native routing {_of(row)} is {'turned off and ' if back else ''}tried (auto){begun}, in steps of one run: "
        f"{'; '.join([*back, *ahead])}. When one does not reach another, packets stay in the tunnel, and the run says "
        "why. Connections stay; a datagram that must not be fragmented and is larger than the tunnel's MTU is refused "
        f"to its sender {smaller}{_node_ports(row, begins + 1)}"
    )


def _node_ports(row: Mapping[str, Any], step: int = 1) -> str:
    """What ends when native routing of a pair is turned on from a step on: netfilter drops what kube-proxy masqueraded
    for another device."""
    if not row["kubernetes"]:
        return ""
    return (
        f"; a connection by a NodePort of Kubernetes nodes at {' or '.join(row['kubernetes'])} to a backend in another "
        f"cluster, which began before step {step}, ends when packets go natively"
    )


def _rotation(keys: Sequence[Keys]) -> str:
    """What a run does to the keys of WireGuard; `keys` as `Plan.keys`."""
    now, *following = keys
    (new,), (old,) = wireguard_ports([following[-1]]), wireguard_ports([Keys(now.number)])
    steps = {
        Stage.ACCEPTS: f"every host gets a second key, device and port (UDP {new}) beside the first (UDP {old}), and "
        "takes packets by both",
        Stage.SENDS: "when each host has proven that it reaches the others by the new key, packets go with it",
        Stage.DEMANDS: f"the old key, its device and its port (UDP {old}) go",
        Stage.PLAIN: "when no host has the old key any more, the record says so",
    }
    begun = f", which was begun before ({now.stage.word})" if now.stage else ""
    told = "; ".join(f"({number}) {steps[each.stage]}" for number, each in enumerate(following, 1))
    return (
        f"the keys of WireGuard are replaced on all hosts that encrypt{begun}, in steps of one run, of which each "
        f"begins when all of them have done the one before: {told}. Connections stay; both ports must be open meanwhile"
    )


def changes(found: Sequence[Mapping[str, Any]], keys: Sequence[Keys]) -> list[str]:
    """What a run does to pairs whose encryption or native routing is turned on or off, and to keys, a line each."""
    told = [_rotation(keys)] if keys[0] != keys[-1] else []
    for row in found:
        if row["steps"]:
            on = row["encryption"] == "wireguard"
            told.append(_change("encryption", row, on, row["now"], row["steps"], (_ON, _OFF), shrinks=on))
        if row["ipsec_steps"]:
            on = row["encryption"] == GATEWAY
            now, steps = row["ipsec_now"], row["ipsec_steps"]
            told.append(_change("encryption by gateways", row, on, now, steps, (_IPSEC_ON, _IPSEC_OFF), shrinks=on))
        if row["routing"] == AUTO:
            told.append(_trial(row))
        elif row["routing_steps"]:
            on = row["routing"] == NATIVE
            now, steps = row["routing_now"], row["routing_steps"]
            shrinks = not on or Stage.PLAIN.word in steps
            words = _change("native routing", row, on, now, steps, (_NATIVE_ON, _NATIVE_OFF), shrinks)
            told.append(words + (_node_ports(row) if on else ""))
    return told


def _of(row: Mapping[str, Any]) -> str:
    one, other = row["sites"]
    return name((one, other)) if one == other else f"of {name((one, other))}"


def _change(
    what: str,
    row: Mapping[str, Any],
    on: bool,
    now: str,
    following: Sequence[str],
    words: tuple[Mapping[Stage, str], Mapping[Stage, str]],
    shrinks: bool,
) -> str:
    """`words` of stages on the way up and on the way down."""
    done, back = _done(now, following, words, on)
    begun = f", which was begun before ({now})" if now in CHANGING else ""
    turned = "off and on again" if on and back else "on" if on else "off"
    told = (
        f"{what} {_of(row)} is turned {turned}{begun}, in steps of one run, of which each "
        f"begins when all hosts of the two sites have done the one before: {'; '.join(done)}. Connections stay"
    )
    if shrinks:
        told += "; a datagram that must not be fragmented and is larger than the new MTU is refused to its sender"
    return told


def _done(
    now: str, following: Sequence[str], words: tuple[Mapping[Stage, str], Mapping[Stage, str]], on: bool
) -> tuple[list[str], bool]:
    """What is done in each step, and whether some lead back. In a step of the run in which another change has its turn
    nothing is done."""
    before, stages, done, back = STAGES[now], [STAGES[word] for word in following], [], False
    going_up = next((stage > before for stage in stages if stage is not before), on)
    for number, stage in enumerate(stages, 1):
        if stage is before and (number > 1 or now not in CHANGING):
            continue
        going_up = stage > before if stage is not before else going_up
        back = back or not going_up
        told_of = words[0] if going_up else words[1]
        done += [f"({number}) {told_of[stage]}"] if stage in told_of else []
        before = stage
    return done, back
