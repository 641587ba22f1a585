# SPDX-License-Identifier: BSD-2-Clause
"""BGP of native sites: each host announces its range to routers of its site, by FRR. Pure.

What a host announces is its range, at its underlay address; what it takes are ranges of the mesh, and nothing of that
reaches its kernel: its way to the ranges of others is the agent's, and what routers send only shows what they know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from typing import Any

from .addressing import Claim
from .schema import INVALID

PORT = 179
BFD_PORT = 3784
"""UDP, single hop (RFC 5881, section 4)."""
MARK = "! Made by isthmus.mesh. What is changed here, or saved by `write`, is replaced by the next run of site."
ANNOUNCED, TAKEN = "isthmus-announced", "isthmus-taken"
"""Names of the prefix lists."""
LONGEST_PASSWORD = 80
"""TCP_MD5SIG_MAXKEYLEN of Linux."""
RETRY = 5
"""Seconds after which FRR tries again to connect to a router; 120 without."""

Complaint = Callable[[str, str, str, str], None]
"""Takes a problem: where, what, why, what to do next."""


@dataclass(frozen=True)
class Router:
    address: IPv4Address
    as_number: int
    bfd: bool = False


@dataclass(frozen=True)
class Settings:
    """What a site says of BGP, or one of its hosts for itself: `as_number` is that of the hosts. None and () where it
    says nothing."""

    as_number: int | None = None
    routers: tuple[Router, ...] = ()
    absent: bool = False


@dataclass(frozen=True)
class Planned:
    """`hosts` by name: what `isthmus.mesh.bgp` gets (without `estate_routers` there are or were some that the
    inventory does not name any more); {"kept": True} on hosts of sites of which only the record knows that they speak
    BGP: there it stays as it is. `routers` is what to set on each router: `site`, `address`, `as_number`, `bfd`, its
    `neighbours` (`host`, `address`, `as_number`, `announces`, of a Kubernetes node also the ranges of its `pods`), and
    what it `sends` them. `sites` is the roster's."""

    hosts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    routers: tuple[Mapping[str, Any], ...] = ()
    sites: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


# The inventory


def settings(given: Any) -> Settings | None:
    """Of a table as `schema.BGP` or `schema.HOST_BGP` read it; None when there is none, or a part of it is invalid."""
    if given is None or given is INVALID or INVALID in given.values():
        return None
    if any(INVALID in router.values() for router in given["routers"]):
        return None
    routers = tuple(Router(one["address"], one["as_number"], one["bfd"]) for one in given["routers"])
    return Settings(given["as_number"], routers, given.get("state") == "absent")


def speaker(site: Settings, host: Settings | None) -> Settings:
    """What counts for a host of a site."""
    if host is None:
        return site
    return Settings(host.as_number or site.as_number, host.routers or site.routers, site.absent)


def check(
    sites: Mapping[str, Settings], native: Iterable[str], hosts: Iterable[Any], claims: Iterable[Claim], say: Complaint
) -> None:
    """Problems. `native` are the sites to whose hosts somebody sends natively, in clear; `hosts` are `model.Host`;
    `claims` are the mesh's ranges."""
    present = {site: found for site, found in sites.items() if not found.absent}
    for site in sorted(set(present) - set(native)):
        say(
            f"isthmus_estate.sites.{site}.bgp",
            f"packets to the hosts of {site} go through the tunnel from everywhere, or inside WireGuard",
            "nobody would send what routers learn here",
            f"set routing: native, hybrid or auto for {site} with encryption: none, or bgp.state: absent",
        )
    here = [host for host in hosts if not host.absent]
    addresses = {address: host.name for host in here for address in host.addresses}
    ranges = list(claims)
    for host in here:
        where = f"host {host.name}.isthmus_bgp"
        if host.site not in present:
            if host.bgp is not None and host.site not in sites:
                say(
                    where,
                    f"site {host.site} has no bgp",
                    "it says in what a host differs from its site",
                    f"add isthmus_estate.sites.{host.site}.bgp, or remove it",
                )
            continue
        found = speaker(present[host.site], host.bgp)
        place = where if host.bgp is not None and host.bgp.routers else f"isthmus_estate.sites.{host.site}.bgp"
        if found.as_number is None:
            say(
                where,
                f"the host has no AS number: neither this nor isthmus_estate.sites.{host.site}.bgp says one",
                "a router takes routes only of the AS that it expects",
                "add as_number to one of them",
            )
        if not found.routers:
            say(
                where,
                f"the host has no router: neither this nor isthmus_estate.sites.{host.site}.bgp names one",
                "BGP is spoken with the routers that lead its range to it",
                "add routers to one of them",
            )
        seen = set()
        for router in found.routers:
            owner = addresses.get(router.address)
            if owner is not None:
                say(
                    f"{place}.routers",
                    f"{router.address} is the address of host {owner}",
                    "a router that leads packets to the hosts is none of them",
                    "name the router's own address on the hosts' subnet",
                )
            for claim in ranges:
                if router.address in claim.network:
                    say(
                        f"{place}.routers",
                        f"{router.address} lies in {claim.network} ({claim.where})",
                        "routers are reached without the mesh",
                        "name the router's own address on the hosts' subnet",
                    )
            if router.address in seen:
                say(f"{place}.routers", f"{router.address} is there twice", "it is one neighbour", "remove one")
            seen.add(router.address)


# A plan


def planned(
    sites: Mapping[str, Settings],
    hosts: Mapping[str, Any],
    documents: Mapping[str, Mapping[str, Any]],
    taken: Iterable[str],
    old: Iterable[str],
    prune: Iterable[str],
) -> Planned:
    """`hosts` are `model.Host` by name; `documents` those of clusters that are present; `taken` the mesh's ranges;
    `old` the sites of the roster."""
    present = {site for site, found in sites.items() if not found.absent}
    orphaned = {site for site in old if site not in sites and f"bgp/{site}" not in prune}
    found: dict[str, dict[str, Any]] = {}
    routers: dict[tuple[str, IPv4Address, int, bool], list[dict[str, Any]]] = {}
    for document in documents.values():
        for name, entry in sorted(document["hosts"].items()):
            if entry["site"] in orphaned:
                found[name] = {"kept": True}
            if name not in hosts or hosts[name].absent or entry["site"] not in present:
                continue
            own = speaker(sites[entry["site"]], hosts[name].bgp)
            pods = {"pods": collapsed(entry["pod_cidrs"])} if entry.get("pod_cidrs") else {}
            found[name] = {
                "as_number": own.as_number,
                "routers": [
                    {"address": str(one.address), "as_number": one.as_number, "bfd": one.bfd} for one in own.routers
                ],
                **pods,
            }
            for one in own.routers:
                routers.setdefault((entry["site"], one.address, one.as_number, one.bfd), []).append(
                    {
                        "host": name,
                        "address": entry["underlay4"],
                        "as_number": own.as_number,
                        "announces": entry["range4"],
                        **pods,
                    }
                )
    said = [*sites.values(), *(host.bgp for host in hosts.values() if host.bgp is not None)]
    known = sorted({str(router.address) for each in said for router in each.routers})
    for spoken in found.values():
        if "routers" in spoken and {*old, *sites} <= present:
            spoken["estate_routers"] = known
    sends = collapsed(taken)
    return Planned(
        hosts=found,
        routers=tuple(
            {
                "site": site,
                "address": str(address),
                "as_number": number,
                "bfd": bfd,
                "neighbours": neighbours,
                "sends": sends,
            }
            for (site, address, number, bfd), neighbours in sorted(routers.items(), key=lambda one: one[0])
        ),
        sites=tuple(sorted(present | orphaned)),
        orphans=tuple(f"bgp/{site}" for site in sorted(orphaned)),
        removed=tuple(f"bgp/{site}" for site in sorted(set(old) - present - orphaned)),
    )


_MOST_LINES = 100


def lines(routers: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each router: what somebody sets there, whatever its make."""
    told = []
    for router in routers:
        most = [
            f"{one['address']} (AS {one['as_number']}, {one['host']}) with "
            f"{' and '.join([one['announces'], *one.get('pods', ())])}"
            for one in router["neighbours"][:_MOST_LINES]
        ]
        if len(router["neighbours"]) > _MOST_LINES:
            most.append(f"and {len(router['neighbours']) - _MOST_LINES} more")
        bfd = ", each with BFD (single hop)" if router["bfd"] else ""
        opened = f"TCP {PORT} here from each of them, which connect"
        if router["bfd"]:
            opened += f"; UDP {BFD_PORT} here from each, and on each of them from {router['address']}"
        told.append(
            f"router {router['address']} of {router['site']}, AS {router['as_number']}: IPv4 unicast neighbours"
            f"{bfd}: {'; '.join(most)}. Take from each these ranges only, with the neighbour as next hop; send them "
            f"what lies in {', '.join(router['sends'])}; keep their routes while they restart (graceful restart, RFC "
            f"4724). Open: {opened}."
        )
    return told


# A host. `own`, where it is not kept, is an element of `Planned.hosts`, `spec` the host's node spec, both as JSON.


def collapsed(networks: Iterable[str]) -> list[str]:
    """The same ranges in as few as possible, in order."""
    return [str(network) for network in collapse_addresses(IPv4Network(text) for text in networks)]


def announced(own: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """The host's ranges, in order: its own and those of its pods."""
    return sorted([spec["node"]["range4"], *own.get("pods", ())], key=IPv4Network)


def openings(own: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """What the host must let in: protocol, port and source address."""
    found = [("tcp", PORT, router["address"]) for router in own["routers"]]
    return found + [("udp", BFD_PORT, router["address"]) for router in own["routers"] if router["bfd"]]


def daemons(own: Mapping[str, Any]) -> tuple[str, ...]:
    """Daemons of FRR beside zebra and staticd, which always run."""
    return ("bgpd", "bfdd") if any(router["bfd"] for router in own["routers"]) else ("bgpd",)


def frr_conf(own: Mapping[str, Any], spec: Mapping[str, Any], passwords: Mapping[str, str]) -> str:
    """`/etc/frr/frr.conf`. `passwords` by address of a router. In the order in which FRR shows what runs.

    `bgp no-rib`: nothing that is learnt goes to zebra, so nor into the kernel."""
    address, ranges = spec["node"]["underlay4"], announced(own, spec)
    taken = collapsed(spec["mesh_ranges4"])
    text = [MARK, "frr defaults traditional", "log syslog informational", "bgp no-rib", "!"]
    text += [
        f"router bgp {own['as_number']}",
        f" bgp router-id {address}",
        " no bgp default ipv4-unicast",
        # The way of packets does not depend on FRR, so routers may go on sending while it restarts.
        " bgp graceful-restart",
        " bgp graceful-restart preserve-fw-state",
        # The range is announced whether or not the kernel has a route like it.
        " no bgp network import-check",
    ]
    for router in own["routers"]:
        name = f" neighbor {router['address']}"
        text.append(f"{name} remote-as {router['as_number']}")
        if router["bfd"]:
            text.append(f"{name} bfd")
        if router["address"] in passwords:
            text.append(f"{name} password {passwords[router['address']]}")
        text.append(f"{name} update-source {address}")
        text.append(f"{name} timers connect {RETRY}")
    text += [" !", " address-family ipv4 unicast", *(f"  network {network}" for network in ranges)]
    for router in own["routers"]:
        name = f"  neighbor {router['address']}"
        text.append(f"{name} activate")
        # Hosts of other sites may have the same AS number. Nothing loops: what is taken is not passed on.
        text.append(f"{name} allowas-in 1")
        text.append(f"{name} prefix-list {TAKEN} in")
        text.append(f"{name} prefix-list {ANNOUNCED} out")
    text += [" exit-address-family", "exit", "!"]
    text += [
        f"ip prefix-list {ANNOUNCED} seq {5 * number} permit {network}" for number, network in enumerate(ranges, 1)
    ]
    text += [
        f"ip prefix-list {TAKEN} seq {5 * number} permit {network}{'' if network.endswith('/32') else ' le 32'}"
        for number, network in enumerate(taken, 1)
    ]
    return "\n".join([*text, "!", ""])


def of_conf(conf: str) -> dict[str, Any]:
    """What a frr.conf that we made has been made of, as far as `openings` needs it."""
    with_bfd = re.findall(r"^ neighbor (\S+) bfd$", conf, re.MULTILINE)
    return {
        "routers": [
            {"address": address, "bfd": address in with_bfd}
            for address in re.findall(r"^ neighbor (\S+) remote-as ", conf, re.MULTILINE)
        ]
    }


def is_ours(conf: str) -> bool:
    """Whether we made a frr.conf, or FRR saved what runs of one that we made."""
    return MARK in conf or f"prefix-list {ANNOUNCED} " in conf


_NOBODYS = (
    *("frr version ", "frr defaults ", "hostname ", "log ", "service integrated-vtysh-config"),
    *("no ip forwarding", "no ipv6 forwarding", "line vty", "end", "exit"),
)


def foreign_lines(conf: str) -> list[str]:
    """What a frr.conf says beyond what the package brings."""
    found = (line.strip() for line in conf.splitlines())
    return [line for line in found if line and not line.startswith(("!", "#", *_NOBODYS))]


def bad_passwords(own: Mapping[str, Any], passwords: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the passwords, in words, without one of them. One dictionary may serve the whole estate, also
    while BGP of a site is taken away."""
    known = own.get("estate_routers")
    for address, password in sorted(passwords.items()):
        if known is not None and address not in known:
            yield f"{address} is no router of the estate ({', '.join(known)})"
        elif not 1 <= len(password) <= LONGEST_PASSWORD or not password.isascii() or not password.isprintable():
            yield f"that of {address} is not 1 to {LONGEST_PASSWORD} printable ASCII characters, which TCP MD5 takes"
        elif " " in password:
            yield f"that of {address} has a blank, which ends a word of FRR's configuration"


# What runs


def state(found: Mapping[str, Any] | None) -> str:
    """Of a neighbour as `show bgp neighbors json` has it."""
    return "not configured" if found is None else str(found.get("bgpState", "not known"))


ESTABLISHED = "Established"


def why_not(
    router: Mapping[str, Any], own: Mapping[str, Any], found: Mapping[str, Any] | None, signatures: Mapping[str, int]
) -> str:
    """Why the session with a router is not established; empty when it is.

    `found` is the neighbour as `show bgp neighbors json` has it, None: FRR has no such neighbour. `signatures` are the
    kernel's counters of TCP MD5 (`TCPMD5NotFound`, `TCPMD5Unexpected`, `TCPMD5Failure` of TcpExt in /proc/net/netstat),
    by how much they rose while FRR tried."""
    now = state(found)
    if now == ESTABLISHED:
        return ""
    if found is None:
        return "FRR has no such neighbour"
    reason, reset = str(found.get("lastNotificationReason", "")), str(found.get("lastResetDueTo", ""))
    if "Bad Peer AS" in reason:
        if reset.endswith("received"):
            return f"the router expects another AS number of this host than {own['as_number']} (state {now})"
        return f"the router has another AS number than {router['as_number']} (state {now})"
    if signatures.get("TCPMD5Failure"):
        return f"the router has another password (state {now})"
    if signatures.get("TCPMD5NotFound"):
        return f"the router uses no password, and isthmus_bgp_passwords has one for it (state {now})"
    if signatures.get("TCPMD5Unexpected"):
        return f"the router uses a password, and isthmus_bgp_passwords has none for it (state {now})"
    if now in ("Connect", "Active", "Idle") and not reason:
        return (
            f"the router does not answer on TCP {PORT} (state {now}): does it have this host as a neighbour, with the "
            "same password or none, and is the port open"
        )
    return f"state {now}, the last time by: {reason or reset}"


def uncovered(wanted: Iterable[str], received: Iterable[str]) -> list[str]:
    """Those of some ranges that do not lie in ranges that were received."""
    outer = list(collapse_addresses(IPv4Network(text) for text in received))
    return [text for text in wanted if not any(IPv4Network(text).subnet_of(network) for network in outer)]
