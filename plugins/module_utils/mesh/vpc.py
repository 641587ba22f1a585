# SPDX-License-Identifier: BSD-2-Clause
"""VPCs of sites: what the inventory says of them, and what a plan makes each of them hold. Pure.

A place is where a VPC is: the options of `isthmus.mesh.vpc_routes` that say it, those that are set. What a VPC holds
follows from clusters' documents and hosts' specs, so orphans count; it is marked with an owner made of the names of
estate and site.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import IPv4Network
from typing import Any

from . import openings
from .addressing import VPC, Claim
from .encryption import Pair
from .encryption import pair as sorted_pair
from .schema import INVALID, suggestion

PLACE = ("provider", "network", "region", "profile", "project", "subscription", "resource_group", "endpoint")
_RECORDED = PLACE[:-1]
"""Not the endpoint: who writes into a record must not choose where the controller's credentials are shown."""
_IDENTITY = ("region", "project", "subscription", "resource_group")
"""What makes one network another beside provider and name, where both say it."""

_PROVIDERS = {
    "region": "aws",
    "profile": "aws",
    "route_tables": "aws",
    "project": "google",
    "subscription": "azure",
    "resource_group": "azure",
}
"""Keys that one provider alone has a use for."""

_OWNER = re.compile(r"[a-z]([a-z0-9-]{0,22}[a-z0-9])?")
ROUTES, FIREWALL = "routes", "firewall"

Complaint = Callable[[str, str, str, str], None]
"""Takes a problem: where, what, why, what to do next."""


@dataclass(frozen=True)
class Gateway:
    """Behind which, by the provider's name of it, `sites` are."""

    gateway: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Vpc:
    site: str
    place: Mapping[str, str]
    manage: tuple[str, ...]
    route_tables: tuple[str, ...] = ()
    route_limit: int | None = None
    gateways: tuple[Gateway, ...] = ()
    ranges: tuple[IPv4Network, ...] = ()
    absent: bool = False


@dataclass(frozen=True)
class Vpcs:
    """By site. `peerings`: pairs that say of themselves whether they are peered."""

    sites: Mapping[str, Vpc] = field(default_factory=dict)
    peerings: Mapping[Pair, bool] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether the inventory says anything of what is called so (`names`)."""
        kind, *sites = name.split("/")
        return tuple(sites) in self.peerings if kind == "peering" else sites[0] in self.sites


@dataclass(frozen=True)
class State:
    """Documents of clusters that are present, and the spec, as JSON, of each of their hosts by its name."""

    documents: Mapping[str, Mapping[str, Any]]
    spec_of: Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Planned:
    """`calls` and `peerings` are in the order in which they are made; each says what `isthmus.mesh.vpc_routes` and
    `vpc_peering` get, and of which `hosts_of_site` one must be in the run (of a peering of each site's, in lists; []:
    any run does it). `document` is the roster's."""

    document: dict[str, Any] | None = None
    calls: tuple[Mapping[str, Any], ...] = ()
    peerings: tuple[Mapping[str, Any], ...] = ()
    orphans: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def owner(estate: str, *sites: str) -> str:
    """The name under which things are made: at most 24 lower-case letters, digits and '-', a letter first."""
    whole = "-".join((estate, *sites))
    if _OWNER.fullmatch(whole):
        return whole
    short = whole if whole[0].isalpha() else f"i{whole}"
    return f"{short[:15].rstrip('-')}-{sha256(whole.encode('ascii')).hexdigest()[:8]}"


def read(top: Mapping[str, Any], problem: Complaint) -> Vpcs:
    """Of the estate as `schema.ESTATE` read it."""
    declared = {} if top["sites"] in (None, INVALID) else top["sites"]
    found = {}
    for site, entry in sorted(declared.items()):
        given = entry["vpc"]
        if given is None or given is INVALID:
            continue
        where = f"isthmus_estate.sites.{site}.vpc"
        if any(value is INVALID for value in given.values()):
            continue
        _check_keys(where, given, problem)
        _check_gateways(where, site, given, declared, problem)
        found[site] = Vpc(
            site=site,
            place={key: given[key] for key in PLACE if given[key] is not None},
            manage=tuple(sorted(set(given["manage"]))),
            route_tables=tuple(given["route_tables"]),
            route_limit=given["route_limit"],
            gateways=tuple(Gateway(one["gateway"], tuple(sorted(one["sites"]))) for one in given["gateways"]),
            ranges=tuple(sorted(set(given["ranges"]))),
            absent=given["state"] == "absent",
        )
    peerings = {}
    for index, pair in enumerate(top["site_pairs"] if top["site_pairs"] is not INVALID else ()):
        sites = pair["sites"]
        if pair["vpc_peering"] in (None, INVALID) or sites is INVALID or len(sites) != 2:
            continue
        both = sorted_pair(*sites)
        peerings[both] = pair["vpc_peering"]
        if pair["vpc_peering"]:
            _check_peering(f"isthmus_estate.site_pairs[{index}].vpc_peering", both, declared, found, problem)
    return Vpcs(found, {both: peerings[both] for both in sorted(peerings)})


def claims(top: Mapping[str, Any]) -> Iterator[Claim]:
    """Ranges of VPCs, also where something else in that section cannot be read. At them are all sites in the same VPC,
    as far as they say so."""
    declared = {} if top["sites"] in (None, INVALID) else top["sites"]
    sections = {site: entry["vpc"] for site, entry in declared.items() if entry["vpc"] not in (None, INVALID)}
    places = {
        site: {key: given[key] for key in PLACE if given[key] not in (None, INVALID)}
        for site, given in sections.items()
    }
    for site, given in sections.items():
        there = {site, *(other for other in places if _same(places[site], places[other]))}
        for network in () if given["ranges"] is INVALID else given["ranges"]:
            yield Claim(network, f"isthmus_estate.sites.{site}.vpc.ranges", VPC, site, tuple(sorted(there)))


def _check_keys(where: str, given: Mapping[str, Any], problem: Complaint) -> None:
    provider = given["provider"]
    for key, only in _PROVIDERS.items():
        if given[key] and provider != only:
            problem(
                f"{where}.{key}",
                f"it goes with provider: {only} only",
                f"a network of {provider} has no such thing",
                "remove it",
            )
    if provider == "azure" and given["resource_group"] is None:
        problem(
            f"{where}.resource_group", "it is missing", "Azure finds a virtual network by it", "add the resource group"
        )


def _check_gateways(
    where: str, site: str, given: Mapping[str, Any], declared: Mapping[str, Any], problem: Complaint
) -> None:
    seen: dict[str, str] = {}
    for index, entry in enumerate(given["gateways"]):
        here = f"{where}.gateways[{index}]"
        if any(value is INVALID for value in entry.values()):
            continue
        for other in entry["sites"]:
            if other not in declared:
                what, why = f"{other!r} is not a site of this estate", "nothing could be reached"
                problem(f"{here}.sites", what, why, suggestion(other, set(declared) - {site}))
            elif other == site:
                why = "its hosts are in the VPC, and routes lead to them"
                problem(f"{here}.sites", f"{site} is the VPC's own site", why, "remove it")
            elif seen.setdefault(other, entry["gateway"]) != entry["gateway"]:
                what = f"{other} is behind {seen[other]} and {entry['gateway']}"
                problem(f"{here}.sites", what, "a destination has one way", "keep one")
    if given["gateways"] and ROUTES not in given["manage"]:
        why = "they are where routes lead"
        problem(
            f"{where}.gateways", "they go with routes in `manage` only", why, "add routes to manage, or remove them"
        )


def _check_peering(
    where: str, both: Pair, declared: Mapping[str, Any], vpcs: Mapping[str, Vpc], problem: Complaint
) -> None:
    if both[0] == both[1]:
        problem(where, f"{both[0]} is one site", "two VPCs are peered", "name two sites")
        return
    for site in both:
        if site in declared and declared[site]["vpc"] is None:
            why = "two VPCs are peered"
            problem(
                where, f"site {site} has no vpc", why, f"add isthmus_estate.sites.{site}.vpc, or remove vpc_peering"
            )
            return
        if site not in vpcs:
            return
        if vpcs[site].absent:
            why = "it would leave a half of the peering"
            problem(where, f"the vpc of site {site} is being removed", why, "set vpc_peering: false too")
    one, other = vpcs[both[0]], vpcs[both[1]]
    if one.place["provider"] != other.place["provider"]:
        problem(
            where,
            f"site {one.site} is in {one.place['provider']}, site {other.site} in {other.place['provider']}",
            "a peering joins two VPCs of one provider",
            "use gateways (a VPN between the providers), or leave it to the tunnel",
        )
    elif _same(one.place, other.place):
        problem(where, f"sites {one.site} and {other.site} are in one VPC", "there is nothing to peer", "remove it")
    elif one.place.get("endpoint") != other.place.get("endpoint"):
        why = "one conversation makes both sides"
        problem(where, "the two VPCs have different endpoints", why, "write the same endpoint, or none, for both")
    elif one.place["provider"] == "aws" and not all(ROUTES in vpc.manage for vpc in (one, other)):
        problem(
            where,
            "it goes with routes in `manage` of both sites",
            "AWS reaches a peered VPC by routes only",
            "add routes to manage",
        )
    common = [(a, b) for a in one.ranges for b in other.ranges if a.overlaps(b)]
    if common and not _same(one.place, other.place):
        problem(
            where,
            f"{common[0][0]} of the VPC of site {one.site} and {common[0][1]} of that of site {other.site} overlap",
            "no provider peers such networks",
            "remove vpc_peering, so that the tunnel carries everything between them, or renumber one of the two",
        )


def _same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two places are one network, as far as they say."""
    return all(key in one and one[key] == other.get(key) for key in ("provider", "network")) and all(
        one[key] == other[key] for key in _IDENTITY if key in one and key in other
    )


def names(document: Mapping[str, Any] | None) -> set[str]:
    """Of what the roster has, as `isthmus_prune` takes it."""
    if document is None:
        return set()
    peerings = {"peering/" + "/".join(_pair(name)) for name in document["peerings"]}
    return {f"vpc/{site}" for site in document["sites"]} | peerings


def recorded(document: Mapping[str, Any] | None) -> dict[str, str]:
    """Of what the roster has, each thing in words."""
    if document is None:
        return {}
    found = {
        f"VPC of site {site}": ", ".join(f"{key} {place[key]}" for key in _RECORDED if key in place)
        for site, place in document["sites"].items()
    }
    return {**found, **{f"peering of sites {' and '.join(_pair(name))}": "yes" for name in document["peerings"]}}


# What a VPC holds


@dataclass
class _Holding:
    """`routes`: destination to ("via" or "gateway", which). `rules`: protocol, port (0: all), source."""

    hosts: set[str] = field(default_factory=set)
    routes: dict[str, tuple[str, str]] = field(default_factory=dict)
    rules: set[tuple[str, int, str]] = field(default_factory=set)

    def add(self, other: _Holding) -> None:
        self.hosts |= other.hosts
        self.routes.update(other.routes)
        self.rules |= other.rules

    def options(self) -> dict[str, Any]:
        sources: dict[tuple[str, int], list[str]] = {}
        for protocol, port, source in sorted(self.rules):
            sources.setdefault((protocol, port), []).append(source)
        return {
            "hosts": sorted(self.hosts),
            "routes": [{"destination": one, kind: hop} for one, (kind, hop) in sorted(self.routes.items())],
            "rules": [
                {"protocol": one, **({"port": port} if port else {}), "sources": sources[one, port]}
                for one, port in sources
            ],
        }


def _at(
    documents: Mapping[str, Mapping[str, Any]], sites: Iterable[str]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Cluster, name and entry of the hosts at some sites."""
    wanted = set(sites)
    for cluster, document in sorted(documents.items()):
        for name, entry in sorted(document["hosts"].items()):
            if entry["site"] in wanted:
                yield cluster, name, entry


def _ranges(documents: Mapping[str, Mapping[str, Any]], sites: Iterable[str]) -> Iterator[str]:
    """What is at some sites: of a cluster with all of its hosts there its ranges, else those hosts'. Nodes that only
    Kubernetes knows are at their cluster's site."""
    wanted = set(sites)
    for _cluster, document in sorted(documents.items()):
        in_cluster = openings.is_in_cluster(document)
        at = {document["site"]} if in_cluster else {entry["site"] for entry in document["hosts"].values()}
        if at and at <= wanted:
            yield from document["workload_ranges"]
            yield from document.get("kubernetes", {"pod_ranges": ()})["pod_ranges"]
        else:
            yield from (entry["range4"] for entry in document["hosts"].values() if entry["site"] in wanted)
            yield from openings.pods_at(document, wanted)


def _holding(vpc: Vpc, state: State, far: Iterable[str]) -> _Holding:
    """`far`: other sites to whose hosts the VPC's own routes lead."""
    documents = state.documents
    found = _Holding({entry["underlay4"] for _cluster, _name, entry in _at(documents, [vpc.site])})
    if not found.hosts:
        return found
    if ROUTES in vpc.manage:
        for gateway in vpc.gateways:
            found.routes.update(dict.fromkeys(_ranges(documents, gateway.sites), ("gateway", gateway.gateway)))
        for _cluster, name, entry in _at(documents, [vpc.site, *far]):
            found.routes[entry["range4"]] = ("via", entry["underlay4"])
            if entry.get("pod_cidrs") and openings.needs_routes(state.spec_of(name)):
                found.routes.update(dict.fromkeys(entry["pod_cidrs"], ("via", entry["underlay4"])))
    if FIREWALL in vpc.manage:
        record = {f"clusters/{name}": document for name, document in documents.items()}
        for name in _who(documents, vpc.site):
            own = state.spec_of(name)
            found.rules.update(openings.rules(own, record, outside=True))
            found.rules.update(("all", 0, source) for source in openings.native_sources(own, record, outside=True))
    return found


def _who(documents: Mapping[str, Mapping[str, Any]], site: str) -> Iterator[str]:
    """Hosts of a site that let in, together, all that its hosts do: those of one cluster that carry an etcd member, or
    do not, differ only in that none lets itself in."""
    seen: dict[tuple[str, bool], int] = {}
    for cluster, name, _entry in _at(documents, [site]):
        kind = cluster, name in documents[cluster]["etcd"]["members"]
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            yield name


# A plan


def planned(
    vpcs: Vpcs, estate: str, old: Mapping[str, Any] | None, prune: Iterable[str], states: Sequence[State]
) -> Planned:
    """`old` is what the roster has; `states` are those that the estate goes through in the run, from the one that it is
    in. What goes by the plan goes before hosts are changed, what no host needs any more when they have been."""
    return _Planner(vpcs, estate, old or {"sites": {}, "peerings": []}, set(prune), states).run()


class _Planner:
    def __init__(
        self, vpcs: Vpcs, estate: str, old: Mapping[str, Any], prune: set[str], states: Sequence[State]
    ) -> None:
        self.vpcs = vpcs
        self.estate = estate
        self.old = old
        self.prune = prune
        self.states = states
        self.orphans: list[str] = []
        self.removed: list[str] = []

    def run(self) -> Planned:
        places: dict[str, Mapping[str, str]] = {}
        calls: list[dict[str, Any]] = []
        for site in sorted({*self.vpcs.sites, *self.old["sites"]}):
            place = self.place(site)
            if place is not None:
                places[site] = place
            calls += self.site(site, place)
        peered: list[str] = []
        peerings: list[dict[str, Any]] = []
        for both in sorted({*self.vpcs.peerings, *(_pair(name) for name in self.old["peerings"])}):
            if self.peered(both, places):
                peered.append(" ".join(both))
            peerings += self.peering(both, places, peered)
        return Planned(
            document={"sites": {site: _kept(one) for site, one in places.items()}, "peerings": peered}
            if places
            else None,
            calls=tuple(calls),
            peerings=tuple(peerings),
            orphans=tuple(self.orphans),
            removed=tuple(self.removed),
        )

    def place(self, site: str) -> dict[str, str] | None:
        """Where the record has the site's VPC after the run; None: it has none."""
        vpc, old = self.vpcs.sites.get(site), self.old["sites"].get(site)
        if vpc is not None and not vpc.absent:
            here = any(True for _host in _at(self.states[-1].documents, [site]))
            return dict(vpc.place) if here else None
        if old is not None and vpc is None and f"vpc/{site}" not in self.prune:
            self.orphans.append(f"vpc/{site}")
            return dict(old)
        if old is not None:
            self.removed.append(f"vpc/{site}")
        return None

    def site(self, site: str, place: Mapping[str, str] | None) -> Iterator[dict[str, Any]]:
        vpc, old = self.vpcs.sites.get(site), self.old["sites"].get(site)
        call = {"site": site, "owner": owner(self.estate, site)}
        gone = {**call, "state": "absent", "place": self.left(site), "hosts_of_site": []}
        here = old is not None and place is not None and _same(old, place)
        if old is not None and not here:
            yield gone
        if vpc is None or place is None:
            return
        peers = self.peers(site)
        far = [
            other
            for other in peers
            if vpc.place["provider"] == "azure"
            and self.vpcs.sites[other].place.get("subscription") == vpc.place.get("subscription")
        ]
        held = [_holding(vpc, state, far) for state in self.states]
        meanwhile = _Holding()
        # What the estate is in counts only where the VPC holds something of ours.
        for one in held if here else held[1:]:
            meanwhile.add(one)
        options, before = held[-1].options(), meanwhile.options()
        named = [_peer(self.vpcs.sites[other].place) for other in peers if place["provider"] != "google"]
        if not (options["routes"] or options["rules"] or named):
            if here:
                yield gone
            return
        yield {
            **call,
            "state": "present",
            "place": place,
            "route_tables": list(vpc.route_tables),
            "route_limit": vpc.route_limit,
            "peers": named,
            **options,
            "meanwhile": None if before == options else before,
            "hosts_of_site": self.names(site),
        }

    def names(self, site: str) -> list[str]:
        return sorted({name for state in self.states for _cluster, name, _entry in _at(state.documents, [site])})

    def peers(self, site: str) -> list[str]:
        pairs = [both for both, peered in self.vpcs.peerings.items() if peered and site in both]
        return [both[1] if both[0] == site else both[0] for both in pairs]

    def left(self, site: str) -> dict[str, str]:
        """The place of the record, where something may be ours."""
        vpc, old = self.vpcs.sites.get(site), _kept(self.old["sites"].get(site, {}))
        same = vpc is not None and bool(old) and _same(old, vpc.place)
        return {**old, **(vpc.place if vpc is not None and same else {})}

    def stays(self, both: Pair, places: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether the VPCs of a recorded peering are where they were."""
        old = self.old["sites"]
        return all(site in old and site in places and _same(old[site], places[site]) for site in both)

    def peered(self, both: Pair, places: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether the record has the peering after the run."""
        name, said = "peering/" + "/".join(both), self.vpcs.peerings.get(both)
        was = " ".join(both) in self.old["peerings"]
        if said:
            return all(site in places for site in both)
        if was and said is None and name not in self.prune and self.stays(both, places):
            self.orphans.append(name)
            return True
        if was:
            self.removed.append(name)
        return False

    def peering(
        self, both: Pair, places: Mapping[str, Mapping[str, str]], peered: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        name = " ".join(both)
        if name in self.old["peerings"] and not (name in peered and self.stays(both, places)):
            yield self.call(both, "absent", [self.left(site) for site in both])
        if self.vpcs.peerings.get(both) and name in peered:
            yield self.call(both, "present", [places[site] for site in both])

    def call(self, both: Pair, state: str, places: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        return {
            "sites": list(both),
            "state": state,
            "owner": owner(self.estate, *both),
            "provider": places[0]["provider"],
            "endpoint": places[0].get("endpoint"),
            "sides": [{key: one[key] for key in one if key not in ("provider", "endpoint")} for one in places],
            "hosts_of_site": [self.names(site) for site in both] if state == "present" else [],
        }


def _pair(name: str) -> Pair:
    one, other = name.split(" ")
    return one, other


def _kept(place: Mapping[str, str]) -> dict[str, str]:
    return {key: place[key] for key in _RECORDED if key in place}


def _peer(place: Mapping[str, str]) -> str:
    """A VPC as the option `peers` of `isthmus.mesh.vpc_routes` names it."""
    return f"{place['resource_group']}/{place['network']}" if place["provider"] == "azure" else place["network"]


# In words

_MOST = 12


def _senders(sources: Sequence[str]) -> str:
    return "everybody" if openings.ANYWHERE in sources else f"{len(sources)} addresses"


def lines(calls: Iterable[Mapping[str, Any]], peerings: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each VPC and each peering: what is set there."""
    found = []
    for call in calls:
        where = f"site {call['site']}: {call['place']['provider']} {call['place']['network']}, as {call['owner']}"
        if call["state"] == "absent":
            found.append(f"{where}: everything of it goes, before hosts are changed")
            continue
        parts = []
        if call["routes"]:
            told = [f"{one['destination']} to {one.get('via') or one['gateway']}" for one in call["routes"]]
            more = f" and {len(told) - _MOST} more" if len(told) > _MOST else ""
            parts.append(f"routes {', '.join(told[:_MOST])}{more}")
        if call["peers"]:
            parts.append(f"ways to {', '.join(call['peers'])}")
        if call["rules"]:
            told = [
                f"{one['protocol'].upper()} {one['port']} for {_senders(one['sources'])}"
                if "port" in one
                else f"everything from {len(one['sources'])} ranges"
                for one in call["rules"]
            ]
            parts.append(f"opens {', '.join(told)} on {len(call['hosts'])} hosts")
        later = "; what goes with this plan goes when the hosts have been changed" if call["meanwhile"] else ""
        found.append(f"{where}: {'; '.join(parts)}{later}")
    for call in peerings:
        what = "is peered with" if call["state"] == "present" else "is no longer peered with"
        one, other = (f"{side['network']} (site {site})" for side, site in zip(call["sides"], call["sites"]))
        found.append(f"{call['provider']} {one} {what} {other}, as {call['owner']}")
    return found
