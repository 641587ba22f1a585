# SPDX-License-Identifier: BSD-2-Clause
"""IPsec between gateways of sites: what the inventory says of it, what hosts get of it, and what strongSwan is given.
Pure.

A tunnel carries everything between the networks of two sites: these are its traffic selectors, so that they stay what
they are when hosts come and go, and so that nothing between the sites depends on being known to us to be encrypted. A
running pair of sites comes to it, and back, in the stages of `encryption.Stage`: PLAIN is no tunnel; with ACCEPTS the
gateways have it, and packets of other hosts go as before; with SENDS hosts send to the gateway; with DEMANDS nothing
leaves for the other site by another way.
"""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Any

from .addressing import VPN, Claim
from .encryption import Pair, Stage, pairs
from .encryption import pair as sorted_pair
from .schema import INVALID, not_yet, suggestion
from .spec import IPSEC_MTU, IPSEC_PORTS, MOST_GATEWAYS, connection_name

if TYPE_CHECKING:
    from .model import Cluster, Host

GATEWAY = "ipsec-gateway"
CERTIFICATE, PSK = "certificate", "psk"
DEVICE = "ipsec0"
"""Leads into the tunnels: the TUN device of kernel-libipsec, or an interface of XFRM where the kernel does ESP."""
SECOND_DEVICE = "isthmus-ipsec1"
"""Another interface of XFRM, out of which packets of a site's second gateway come: the kernel takes packets from the
one tunnel only that its policy names, and knows one policy for the same networks on the same interface."""
IF_IDS = {DEVICE: 73, SECOND_DEVICE: 74}
"""XFRM's numbers of the interfaces, which tunnels name."""
MARK = 0x53
"""Of packets of strongSwan's own sockets, and of ESP of the kernel, which do not go through the tunnel. One byte, as
all marks of the mesh."""
ROUTING_TABLE = 220
"""strongSwan's own."""
RULE_PRIORITY = 737
"""Of the rule that leads into the tunnels by strongSwan's table of routes. After the agent's: what the host's own
workloads send to a host of another site is the mesh's first, and comes here inside it."""

IKE_PROPOSAL = "aes256gcm16-prfsha384-ecp384"
ESP_PROPOSAL = "aes256gcm16-ecp384"
DPD_DELAY = 2  # seconds
REKEY = 4 * 3600  # seconds, of IKE
REKEY_CHILD = 3600
REAUTHENTICATION = 24 * 3600

WORDS = {
    Stage.PLAIN: "no tunnel between the gateways",
    Stage.ACCEPTS: "the gateways have a tunnel; packets of other hosts go as before",
    Stage.SENDS: "packets go through the gateways",
    Stage.DEMANDS: "through the gateways, and nothing otherwise",
}

_IDENTITY = "isthmus-ipsec-"

Complaint = Callable[[str, str, str, str], None]
"""Takes a problem: where, what, why, what to do next."""


@dataclass(frozen=True)
class Gateway:
    """A host that is its site's gateway: its `underlay` address, and the `address` at which other sites reach it."""

    host: str
    cluster: str
    underlay: IPv4Address
    address: IPv4Address

    @property
    def identity(self) -> str:
        """In IKE, and in its certificate."""
        return f"{_IDENTITY}{self.host}"


@dataclass(frozen=True)
class Peer:
    """A gateway that is not ours."""

    address: IPv4Address
    identity: str


@dataclass(frozen=True)
class Side:
    """A site: what is behind its gateways. Either `gateways` or `peers` are there, one or two, first the one that is
    preferred. `lost`: all the gateways were forgotten, so nobody makes a tunnel with one, and what they led to stays
    closed."""

    networks: tuple[IPv4Network, ...]
    gateways: tuple[Gateway, ...] = ()
    peers: tuple[Peer, ...] = ()
    lost: bool = False

    def without(self, hosts: set[str]) -> Side:
        """When these hosts were forgotten."""
        left = tuple(one for one in self.gateways if one.host not in hosts)
        if left or not self.gateways:
            return replace(self, gateways=left)
        return replace(self, lost=True)


@dataclass(frozen=True)
class Ipsec:
    """`sites` that have gateways, and the `pairs` that go through them. `said` is how the gateways of a pair
    authenticate each other, where the inventory says it."""

    sites: Mapping[str, Side] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    said: Mapping[Pair, str] = field(default_factory=dict)

    def stage(self, pair: Pair) -> Stage:
        """Where a pair is in the end."""
        return Stage.DEMANDS if pair in self.pairs else Stage.PLAIN

    def recorded(self) -> dict[str, dict[str, list[str]]]:
        """Of sites whose packets go through gateways, for the estate record: these in words, and the networks."""
        found = {}
        for site in sorted({site for both in self.pairs for site in both} & self.sites.keys()):
            side = self.sites[site]
            places = [f"{one.host} ({one.address})" for one in side.gateways]
            places += [f"{one.identity} ({one.address})" for one in side.peers]
            found[site] = {"gateways": places, "networks": [str(one) for one in side.networks]}
        return found

    def without(self, hosts: Iterable[str]) -> Ipsec:
        """When these hosts were forgotten."""
        gone = set(hosts)
        return replace(self, sites={site: side.without(gone) for site, side in self.sites.items()})

    def authentication(self, pair: Pair) -> str:
        foreign = any(site in self.sites and self.sites[site].peers for site in pair)
        return self.said.get(pair) or (PSK if foreign else CERTIFICATE)


# What the inventory says


def read(
    top: Mapping[str, Any],
    clusters: Mapping[str, Cluster],
    hosts: Mapping[str, Host],
    encryption: Callable[[Pair], str | None],
    problem: Complaint,
    known: Iterable[str],
) -> Ipsec:
    """Of the estate as `schema.ESTATE` read it. `encryption` is that of each pair, `known` are the names of hosts of
    the mesh, also of those that could not be read."""
    declared = {} if top["sites"] in (None, INVALID) else top["sites"]
    said: dict[Pair, str] = {}
    for index, entry in enumerate(top["site_pairs"] if top["site_pairs"] is not INVALID else ()):
        if entry["sites"] is INVALID or len(entry["sites"]) != 2:
            continue
        both = sorted_pair(*entry["sites"])
        where = f"isthmus_estate.site_pairs[{index}]"
        if entry["ipsec_authentication"] is not None:
            said[both] = entry["ipsec_authentication"]
        if both[0] == both[1] and entry["encryption"] == GATEWAY:
            problem(
                f"{where}.encryption",
                f"{GATEWAY} is between two sites, and {both[0]} is one",
                "packets among the hosts of a site do not pass its gateway",
                "use wireguard or none for the hosts of one site among themselves",
            )
    named = {*declared, *(host.site for host in hosts.values()), *(one.site for one in clusters.values())}
    through = [both for both in pairs(named) if both[0] != both[1] and encryption(both) == GATEWAY]
    used = sorted({site for both in through for site in both})
    sides: dict[str, Side] = {}
    for site in sorted({*used, *(site for site, entry in declared.items() if entry["ipsec"] is not None)}):
        side = _side(site, declared.get(site), clusters, hosts, problem, set(known), site in used)
        if side is not None:
            sides[site] = side
    for both in through:
        _check_pair(both, sides, said.get(both), problem)
    _check_identities(through, sides, problem)
    for site in used:
        if site in sides:
            _check_hosts(site, sides[site], hosts, problem)
    return Ipsec(sides, tuple(through), {both: said[both] for both in sorted(said)})


def claims(top: Mapping[str, Any]) -> Iterator[Claim]:
    """What is behind the gateways of sites, whether a pair of sites goes through them or not, and also where something
    else in that section cannot be read."""
    for site, entry in ({} if top["sites"] in (None, INVALID) else top["sites"]).items():
        given = entry["ipsec"]
        for network in () if given in (None, INVALID) or given["networks"] is INVALID else given["networks"]:
            yield Claim(network, f"isthmus_estate.sites.{site}.ipsec.networks", VPN, site, (site,))


def _side(
    site: str,
    entry: Mapping[str, Any] | None,
    clusters: Mapping[str, Cluster],
    hosts: Mapping[str, Host],
    problem: Complaint,
    known: set[str],
    used: bool,
) -> Side | None:
    where = f"isthmus_estate.sites.{site}.ipsec"
    given = None if entry is None else entry["ipsec"]
    if given is None:
        problem(
            where,
            f"it is missing, and a pair of {site} has encryption: {GATEWAY}",
            "packets between the two sites go from gateway to gateway",
            "name the site's gateways and the networks behind it, or use encryption: wireguard",
        )
        return None
    if given is INVALID or any(value is INVALID for value in given.values()):
        return None
    networks = tuple(sorted(given["networks"]))
    if bool(given["gateways"]) == (given["peer"] is not None):
        what = "it has both gateways and peer" if given["peer"] is not None else "it has neither gateways nor peer"
        why = "a site's gateway is a host of the mesh, or a device that is not ours"
        problem(where, what, why, "name the one that there is")
        return None
    if given["peer"] is not None:
        return _others(networks, given["peer"], f"{where}.peer", problem)
    if len(given["gateways"]) > MOST_GATEWAYS:
        problem(
            f"{where}.gateways",
            f"it names {len(given['gateways'])} gateways",
            "one carries the site, and a second one takes over from it",
            f"leave {MOST_GATEWAYS} of them, first the one that is preferred",
        )
        return None
    found = [
        _gateway(site, one, f"{where}.gateways[{index}].host", hosts, problem, known, used)
        for index, one in enumerate(given["gateways"])
    ]
    gateways = tuple(one for one in found if one is not None)
    if len(gateways) < len(found):
        return None
    if len({one.host for one in gateways}) < len(gateways):
        why = "the second takes over when the first is lost"
        problem(f"{where}.gateways", f"host {gateways[0].host} is named twice", why, "name two hosts, or one gateway")
        return None
    if len({one.address for one in gateways}) < len(gateways):
        problem(
            f"{where}.gateways",
            f"{' and '.join(one.host for one in gateways)} are both reached at {gateways[0].address}",
            "gateways of other sites have a tunnel with each of them",
            "give each an address of its own",
        )
        return None
    return Side(networks, gateways)


def _others(networks: tuple[IPv4Network, ...], given: Mapping[str, Any], where: str, problem: Complaint) -> Side | None:
    """A site whose gateways are not ours."""
    second = given["second"]
    both = [given] if second is None else [given, second]
    if second is INVALID or any(value is INVALID for one in both for value in one.values()):
        return None
    peers = tuple(Peer(one["address"], one["id"] or str(one["address"])) for one in both)
    if len({one.address for one in peers}) < len(peers):
        why = "each of the two has a tunnel of its own"
        problem(f"{where}.second.address", f"{peers[0].address} is the first one's", why, "name another, or leave it")
        return None
    return Side(networks, peers=peers)


def _gateway(
    site: str,
    one: Mapping[str, Any],
    here: str,
    hosts: Mapping[str, Host],
    problem: Complaint,
    known: set[str],
    used: bool,
) -> Gateway | None:
    if any(value is INVALID for value in one.values()):
        return None
    name = one["host"]
    host = hosts.get(name)
    why = "a gateway is a host of its own site"
    if host is None:
        if name not in known:
            problem(here, f"{name!r} is not a host of the mesh", why, suggestion(name, hosts))
    elif host.site != site:
        problem(here, f"host {name} is at site {host.site}", why, f"name a host of {site}")
    elif host.absent and used:
        problem(here, f"host {name} is being removed", "the tunnel would go with it", "name another host first")
    elif host.kubernetes_node is not None:
        why = "kube-proxy and the CNI rewrite what such a host forwards"
        problem(here, f"host {name} is a Kubernetes node", why, "name a host that is none")
    else:
        return Gateway(name, host.cluster, host.underlay, one["address"] or host.underlay)
    return None


def _check_pair(both: Pair, sides: Mapping[str, Side], said: str | None, problem: Complaint) -> None:
    where = "isthmus_estate.site_pairs"
    foreign = [site for site in both if site in sides and sides[site].peers]
    if len(foreign) == 2:
        problem(
            where,
            f"neither {both[0]} nor {both[1]} has a gateway that is ours",
            "a tunnel between two devices that are not ours is nothing that the mesh could set up",
            "set encryption: none for the pair",
        )
    elif foreign and said == CERTIFICATE:
        later = not_yet(
            f"{where} ({' and '.join(both)})",
            "authentication by certificate with a gateway that is not ours",
            f"the authority of {foreign[0]} is not known",
            "psk",
        )
        problem(later.where, later.what, later.why, later.next)


def _check_identities(through: Sequence[Pair], sides: Mapping[str, Side], problem: Complaint) -> None:
    """Of the gateways of other sites, for each site with gateways of ours."""
    refused = set()
    for site in sorted(name for name, side in sides.items() if side.gateways):
        known: dict[str, tuple[str, IPv4Address]] = {}
        others = sorted({name for both in through if site in both for name in both if name in sides} - {site})
        # Those of ours have the names of their hosts, so it is another one that is to have another identity.
        for other in sorted(others, key=lambda name: bool(sides[name].peers)):
            ends: Sequence[Gateway | Peer] = (*sides[other].gateways, *sides[other].peers)
            for there in ends:
                first, address = known.setdefault(there.identity, (other, there.address))
                if first == other or (first, other) in refused:
                    continue
                refused.add((first, other))
                problem(
                    f"isthmus_estate.sites.{other}.ipsec.peer",
                    f"the gateways of {first} ({address}) and {other} ({there.address}) have one identity, "
                    f"{there.identity}",
                    f"{site} has tunnels with both, and strongSwan finds their keys by the identity: the one would be "
                    "tried with the key of the other",
                    f"give that of {other} an identity of its own, there and here (peer.id)",
                )


def _check_hosts(site: str, side: Side, hosts: Mapping[str, Host], problem: Complaint) -> None:
    here = [host for _name, host in sorted(hosts.items()) if host.site == site and not host.absent]
    outside = [f"{host.name} ({host.underlay})" for host in here if not _within(host.underlay, side.networks)]
    if outside:
        problem(
            f"isthmus_estate.sites.{site}.ipsec.networks",
            f"{', '.join(outside[:5])} would be outside the tunnel",
            "only what lies in these networks goes through it, and the rest would go in clear",
            "add the network of the host's isthmus_underlay",
        )
    behind = [host.name for host in here if host.advertise != host.underlay]
    if behind:
        problem(
            f"isthmus_estate.sites.{site}.ipsec",
            f"{', '.join(behind[:5])} would be reached through gateways and have another isthmus_advertise than "
            "isthmus_underlay",
            "inside the tunnel hosts have their own addresses",
            "remove isthmus_advertise; where others reach the gateway goes into ipsec.gateways[].address",
        )


def _within(address: IPv4Address, networks: Iterable[IPv4Network]) -> bool:
    return any(address in network for network in networks)


# What hosts get


def section(model: Ipsec, host: str, site: str, stages: Mapping[str, Stage], sites: Mapping[str, str], pki: str) -> Any:
    """The spec's `ipsec` of a host of `site`, by the stage of that with each other site. None where the host has no
    part. `sites` is the site of each cluster's nodes, `pki` the directory of certificates."""
    side = model.sites.get(site)
    far = {
        other: {"stage": stage.word, "networks": [str(one) for one in model.sites[other].networks]}
        for other, stage in sorted(stages.items())
        if stage is not Stage.PLAIN and other in model.sites
    }
    if side is None or not far:
        return None
    found: dict[str, Any] = {"sites": dict(sites), "networks": [str(one) for one in side.networks], "far": far}
    own = next((one for one in side.gateways if one.host == host), None)
    if own is not None:
        found["local"] = str(own.underlay)
        found["connections"] = list(_connections_of(model, side, own, site, far, pki))
    elif side.gateways:
        found["via"] = str(side.gateways[0].underlay)
    if len(side.gateways) > 1:
        found["gateways"] = [
            {"cluster": one.cluster, "host": one.host, "underlay": str(one.underlay)} for one in side.gateways
        ]
    return found


def _connections_of(
    model: Ipsec, own: Side, gateway: Gateway, site: str, far: Iterable[str], pki: str
) -> Iterator[dict[str, Any]]:
    """Of a gateway with each of those of other sites. One end alone begins a tunnel: two would make two tunnels."""
    for other in far:
        both, side = sorted_pair(site, other), model.sites[other]
        ends: Sequence[Gateway | Peer] = () if side.lost else (*side.gateways, *side.peers)
        for number, there in enumerate(ends, 1):
            ours = isinstance(there, Gateway)
            certified = ours and model.authentication(both) == CERTIFICATE
            found = {
                "site": other,
                **({"number": number} if number > 1 else {}),
                "local": str(gateway.underlay),
                "local_id": gateway.identity,
                "remote": str(there.address),
                "remote_id": there.identity,
                "local_networks": [str(one) for one in own.networks],
                "remote_networks": [str(one) for one in side.networks],
                "authentication": CERTIFICATE if certified else PSK,
                "begins": not ours or site == both[0],
                "ours": ours,
            }
            if isinstance(there, Gateway):
                found["inside"] = str(there.underlay)
            if certified and isinstance(there, Gateway):
                yield {**found, "certificate": f"{pki}/ipsec.crt", "ca": f"{pki}/trust/{there.cluster}.crt"}
            else:
                yield {**found, "secret": " ".join(both)}


def gateways_of(own: Mapping[str, Any]) -> list[str]:
    """Underlay addresses of the site's gateways, by the spec's `ipsec` of one of its hosts, but that of the host
    itself; first the one that is preferred."""
    several = [str(one["underlay"]) for one in own.get("gateways", ())]
    return [one for one in several if one != own.get("local")] or ([own["via"]] if own.get("via") else [])


def certificate_of(own: Mapping[str, Any] | None) -> str | None:
    """The identity for which a gateway, by its spec's `ipsec`, needs a certificate."""
    certified = [one for one in _connections(own) if one["authentication"] == CERTIFICATE]
    return str(certified[0]["local_id"]) if certified else None


def trusted_by(own: Mapping[str, Any] | None) -> list[str]:
    """Clusters whose authorities signed for the gateways on the other side."""
    return sorted({cluster_of(one) for one in _connections(own) if "ca" in one})


def cluster_of(connection: Mapping[str, Any]) -> str:
    """Whose authority signed for the other gateway."""
    return str(connection["ca"].rpartition("/")[2][: -len(".crt")])


def _connections(own: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = (own or {}).get("connections", ())
    return found


def senders(own: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """What a host, by its spec as JSON, lets in for IKE and ESP: protocol, port, source address."""
    found = _connections(own.get("ipsec"))
    return sorted(("udp", port, str(one["remote"])) for one in found for port in IPSEC_PORTS)


def begun(own: Mapping[str, Any], before: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Connections of a gateway, by its spec as JSON, with sites of which it had no tunnel `before` (another spec, or
    nothing), neither of its own nor over another gateway of its site. With others the rules of netfilter let nothing
    but IKE through beside the tunnel."""
    known = (before.get("ipsec") or {}).get("far", ())
    return [one for one in _connections(own.get("ipsec")) if one["site"] not in known]


def other_end(connection: Mapping[str, Any]) -> dict[str, str]:
    """The gateway of ours on the other side: its `host`, and the `address` at which it is reached."""
    return {"host": connection["remote_id"][len(_IDENTITY) :], "address": connection["remote"]}


# What strongSwan and netfilter get

_HEADER = "# Written by isthmus.mesh; changes made here by hand are replaced by the next run of the playbook.\n"


def name_of(connection: Mapping[str, Any]) -> str:
    """Of a connection in strongSwan."""
    return connection_name(connection["site"], connection.get("number", 1))


def _block(name: str, lines: Iterable[str]) -> list[str]:
    return [f"{name} {{", *(f"  {line}" for line in lines), "}"]


CERTIFICATE_FILE = "isthmus.pem"
"""In /etc/swanctl/x509; its key has the same name in private."""


def authority_files(cluster: str, count: int = 1) -> list[str]:
    """In /etc/swanctl/x509ca, a file for each certificate; two while an authority is being replaced."""
    return [f"isthmus-{cluster}{f'.{number}' if number else ''}.pem" for number in range(count)]


def swanctl_conf(
    connections: Sequence[Mapping[str, Any]], authorities: Mapping[str, int] | None = None, kernel: bool = False
) -> str:
    """A fragment for /etc/swanctl/conf.d, without secrets. `authorities`: how many certificates each cluster's has, 1
    where it does not say. `kernel`: it does ESP."""
    known = authorities or {}
    lines = _block("connections", [line for one in connections for line in _of_connection(one, known, kernel)])
    return _HEADER + "\n".join(lines) + "\n"


def _of_connection(one: Mapping[str, Any], authorities: Mapping[str, int], kernel: bool) -> list[str]:
    child = [
        "mode = tunnel",
        f"local_ts = {','.join(one['local_networks'])}",
        f"remote_ts = {','.join(one['remote_networks'])}",
        f"esp_proposals = {ESP_PROPOSAL}",
        f"rekey_time = {REKEY_CHILD}s",
        "start_action = none",
        f"dpd_action = {'restart' if one['begins'] else 'clear'}",
        f"close_action = {'start' if one['begins'] else 'none'}",
        *(_of_interfaces(one) if kernel else []),
    ]
    return _block(
        name_of(one),
        [
            *_ends(one),
            f"keyingtries = {0 if one['begins'] else 1}",
            f"dpd_delay = {DPD_DELAY}s",
            f"rekey_time = {REKEY}s",
            *([f"reauth_time = {REAUTHENTICATION}s"] if one["ours"] and one["begins"] else []),
            *_authentication(one, authorities),
            *_block("children", _block("net", child)),
        ],
    )


def _ends(one: Mapping[str, Any]) -> list[str]:
    return [
        "version = 2",
        f"local_addrs = {one['local']}",
        f"remote_addrs = {one['remote']}",
        f"proposals = {IKE_PROPOSAL}",
        "encap = yes",
        "mobike = no",
    ]


def _authentication(one: Mapping[str, Any], authorities: Mapping[str, int]) -> list[str]:
    method = "auth = psk"
    local, remote = [f"id = {one['local_id']}"], [f"id = {one['remote_id']}"]
    if one["authentication"] == CERTIFICATE:
        method, cluster = "auth = pubkey", cluster_of(one)
        local.append(f"certs = {CERTIFICATE_FILE}")
        remote.append(f"cacerts = {','.join(authority_files(cluster, authorities.get(cluster, 1)))}")
    return [*_block("local", [method, *local]), *_block("remote", [method, *remote])]


def _of_interfaces(one: Mapping[str, Any]) -> list[str]:
    """Out of which interface of XFRM packets of the tunnel come, and into which they go. Those that carry them have the
    mark of strongSwan's own: the route to the other gateway would lead into the tunnel too."""
    comes = SECOND_DEVICE if one.get("number", 1) > 1 else DEVICE
    return [f"if_id_in = {IF_IDS[comes]}", f"if_id_out = {IF_IDS[DEVICE]}", f"set_mark_out = {MARK:#x}"]


def begin_script(connections: Iterable[Mapping[str, Any]]) -> str:
    """What asks for the tunnels when strongSwan begins, and waits for none. Not strongSwan by `start_action`: of a
    connection with that it ends the tunnels before it takes others of its certificates."""
    lines = [
        f"swanctl --initiate --child net --ike {name_of(one)} --timeout -1" for one in connections if one["begins"]
    ]
    return "\n".join(["#!/bin/sh", f"{_HEADER}PATH=/usr/sbin:/usr/bin:/sbin:/bin", *lines]) + "\n"


def pre_shared(connections: Sequence[Mapping[str, Any]], secrets: Mapping[str, str]) -> dict[str, str]:
    """By connection its pre-shared key, where it has one, and is the first of those that share it (`sharing`). KeyError
    with the name of one that is missing."""
    firsts = [
        one for one in connections if one["authentication"] == PSK and sharing(connections, one)[0] == name_of(one)
    ]
    return {name_of(one): secrets[one["secret"]] for one in firsts}


def sharing(connections: Sequence[Mapping[str, Any]], one: Mapping[str, Any]) -> list[str]:
    """Names of the connections that have the pre-shared key of this one: those with the same gateway at another
    address. strongSwan finds keys by the identities of both ends, so that each would be one of the other too."""

    def of(each: Mapping[str, Any]) -> tuple[Any, ...]:
        return each["local_id"], each["remote_id"], each.get("secret")

    return [name_of(each) for each in connections if of(each) == of(one)]


def secrets_conf(connections: Sequence[Mapping[str, Any]], keys: Mapping[str, Sequence[str]]) -> str | None:
    """The fragment with pre-shared keys, by connection one or more of them, None where there are none. strongSwan takes
    each of them, and proves itself by the one that it read last: that is the first one here."""
    lines: list[str] = []
    for one in connections:
        for number, key in reversed(list(enumerate(keys.get(name_of(one), ()), 1))):
            encoded = base64.b64encode(key.encode()).decode("ascii")
            entries = [f"id-1 = {one['local_id']}", f"id-2 = {one['remote_id']}", f"secret = 0s{encoded}"]
            lines += _block(f"ike{number if number > 1 else ''}-{name_of(one)}", entries)
    return _HEADER + "\n".join(_block("secrets", lines)) + "\n" if lines else None


def keys_of(text: str) -> dict[str, list[str]]:
    """What a fragment of `secrets_conf` has; of one that somebody changed what can be read."""
    found: dict[str, list[str]] = {}
    told = re.findall(r"^  ike(\d*)-(\S+) \{\n(?:    .*\n)*?    secret = 0s(\S+)\n", text, re.MULTILINE)
    for _number, name, encoded in sorted(told, key=lambda one: int(one[0] or 1)):
        with contextlib.suppress(ValueError):
            found.setdefault(name, []).append(base64.b64decode(encoded, validate=True).decode())
    return found


def trial_of(connection: Mapping[str, Any]) -> str:
    """Name of the connection in strongSwan by which it is seen whether the other gateway takes this one."""
    return f"try-{name_of(connection)}"


def trial_conf(
    connection: Mapping[str, Any], authorities: Mapping[str, int], keys: Sequence[str], main: str, known: int = 0
) -> str:
    """All that strongSwan's file `main` has, with these pre-shared keys for the connection instead of the `known` ones
    that it has there, and a connection beside it that makes no tunnel (RFC 6023): whether the gateways take each other
    is seen without a packet being lost."""
    lines = [*_ends(connection), "childless = force", "keyingtries = 1", *_authentication(connection, authorities)]
    found = _block("connections", _block(trial_of(connection), lines))
    # A section that is there twice has the values that come last, so a further key that is not to be is the first one.
    given = [*keys, *list(keys[:1]) * (known - len(keys))]
    secrets = secrets_conf([connection], {name_of(connection): given}) or ""
    return f"include {main}\n" + "\n".join(found) + f"\n{secrets}"


def strongswan_conf(kernel: bool = False) -> str:
    """A fragment for /etc/strongswan.d: ESP in the kernel or in user space, whose device also leads to the other
    gateway's own address (its sockets have a mark that keeps them out); a gateway that falls silent is noticed within
    6 s: DPD_DELAY, and four packets a second apart."""
    plugins = [
        *_block("kernel-libipsec", ["load = no"] if kernel else ["load = yes", "allow_peer_ts = yes"]),
        *_block("kernel-netlink", [f"fwmark = !{MARK:#x}"]),
        *_block("socket-default", [f"fwmark = {MARK:#x}"]),
    ]
    settings = [
        "make_before_break = yes",
        "retransmit_timeout = 1",
        "retransmit_base = 1",
        "retransmit_tries = 3",
        f"routing_table_prio = {RULE_PRIORITY}",
        *_block("plugins", plugins),
    ]
    return _HEADER + "\n".join([*_block("charon", settings), *_block("charon-systemd", settings)]) + "\n"


_INTERFACES = """\
#!/bin/bash
{header}#
# The kernel does ESP, and these are the ways into it and out of it. strongSwan makes no routes to an interface of XFRM:
# here they come and go with its policies, as they do with its tunnels in user space.
# usage: {name} begin | end | follow
set -u

begin() {{
    end
{make}
}}

# Also of what a strongSwan that died left in the kernel: no other one ends it.
end() {{
    for device in {devices}; do
        ip -d link show dev "$device" type xfrm 2>/dev/null | grep -q . && ip link delete dev "$device"
    done
    ip xfrm policy list | awk '
        /^src / {{ what = $1 " " $2 " " $3 " " $4 }}
        $1 == "dir" {{ what = what " dir " $2 }}
        $1 == "if_id" && ({ours}) {{ print "xfrm policy delete " what " if_id " $2 }}' | ip -force -batch -
    ip xfrm state list | awk '
        /^src / {{ what = $1 " " $2 " " $3 " " $4 }}
        $1 == "proto" {{ what = what " proto " $2 " spi " $4 }}
        $1 == "if_id" && ({ours}) {{ print "xfrm state delete " what }}' | ip -force -batch -
    return 0
}}

# Networks that the tunnels lead to, and those that there are routes to.
tunnels() {{
    ip xfrm policy list dir out |
        awk '/^src / {{ network = $4 }} $1 == "if_id" && $2 == "{way_out:#x}" {{ print network }}' | sort -u
}}
routes() {{
    ip route show table {table} dev {device} proto static 2>/dev/null |
        awk '{{ print $1 ~ "/" ? $1 : $1 "/32" }}' | sort -u
}}

level() {{
    local seen wanted now network
    seen=$(ip xfrm policy list dir out; ip route show table {table} dev {device} 2>/dev/null)
    [ "$seen" != "$known" ] || return
    wanted=$(tunnels) && now=$(routes) || return
    known=$seen
    while read -r network; do
        [ -z "$network" ] || ip route replace "$network" dev {device} proto static src {local} table {table} || known=
    done < <(comm -23 <(echo "$wanted") <(echo "$now"))
    while read -r network; do
        [ -z "$network" ] || ip route delete "$network" dev {device} proto static table {table} || known=
    done < <(comm -13 <(echo "$wanted") <(echo "$now"))
}}

follow() {{
    known=  # what there was when they were made level
    exec 3< <(exec ip xfrm monitor policy)
    # Long enough for it to listen: what was before that is found without it.
    local patience=0.2 status
    while true; do
        read -r -t "$patience" -u 3 _
        status=$?
        # More than 128: nothing in that time. Then it is looked at all the same, as the kernel may drop events.
        [ "$status" -eq 0 ] || [ "$status" -gt 128 ] || return 1
        while read -r -t 0.02 -u 3 _; do :; done
        level
        patience=5
    done
}}

"$1"
"""


def interfaces_script(own: Mapping[str, Any], path: str) -> str:
    """What makes a gateway's interfaces of XFRM and the routes into them, by its spec's `ipsec`; `path` is where it is.
    Packets that a site sends by the one tunnel may come by the other one, so their sources are checked loosely."""
    make = []
    for device, number in IF_IDS.items():
        make += [
            f"ip link add {device} type xfrm dev lo if_id {number}",
            f"ip link set {device} mtu {IPSEC_MTU} addrgenmode none",
            f"echo 2 > /proc/sys/net/ipv4/conf/{device}/rp_filter",
            f"ip link set {device} up",
        ]
    return _INTERFACES.format(
        header=_HEADER,
        name=path,
        make="\n".join(f"    {line}" for line in make),
        devices=" ".join(IF_IDS),
        ours=" || ".join(f'$2 == "{number:#x}"' for number in IF_IDS.values()),
        way_out=IF_IDS[DEVICE],
        table=ROUTING_TABLE,
        device=DEVICE,
        local=own["local"],
    )


GUARD = "isthmus-ipsec"
"""netfilter's table that lets nothing leave in clear."""
KEPT = "isthmus-ipsec-kept"
"""Another one with the same rules, which belongs to a process: `nft flush ruleset` leaves it where it is."""


def guard(own: Mapping[str, Any]) -> str | None:
    """netfilter's rules of a host, by its spec's `ipsec`, as the program nft reads them; None where there are none.

    On a gateway nothing between the networks goes but through the tunnel, neither out nor in; what carries the tunnel
    is from the gateway to the gateway on IKE's ports. On the site's other hosts nothing goes to the other site's
    networks but over a gateway, whatever routes there are. One of two gateways may send over the other one too, and
    takes what is for itself from it, as any host of the site does: which of the tunnels a packet comes by is the other
    site's choice."""
    far = [
        network
        for entry in own["far"].values()
        if entry["stage"] == Stage.DEMANDS.word
        for network in entry["networks"]
    ]
    connections = _connections(own)
    local = own.get("local")
    near_gateways = gateways_of(own)
    if not far or not (local or near_gateways):
        return None
    hops = _listed(near_gateways)
    near_set, far_set = ", ".join(own["networks"]), ", ".join(far)
    if local:
        ways = [DEVICE, SECOND_DEVICE] if any("number" in one for one in connections) else [DEVICE]
        ports = ", ".join(str(port) for port in IPSEC_PORTS)
        gateways = _listed({one["remote"] for one in connections})
        out = f"ip saddr {local} ip daddr {{ {gateways} }} udp sport {{ {ports} }} accept"
        back = f"ip saddr {{ {gateways} }} ip daddr {local} udp dport {{ {ports} }} accept"
        chains = [
            *_block(
                "chain leaves",
                [
                    "type filter hook postrouting priority 300; policy accept;",
                    f'oifname "{DEVICE}" accept',
                    *([out] if gateways else []),
                    *([f"ip daddr @far rt ip nexthop {hops} accept"] if hops else []),
                    f"ip daddr @far icmp type {{ {_TOLD} }} counter drop",
                    "ip saddr @near ip daddr @far counter drop",
                ],
            ),
            *_block(
                "chain comes",
                [
                    "type filter hook prerouting priority -300; policy accept;",
                    *(f'iifname "{device}" accept' for device in ways),
                    *([back] if gateways else []),
                    *([f"ip saddr @far ip daddr {local} accept"] if hops else []),
                    "ip saddr @far ip daddr @near counter drop",
                ],
            ),
        ]
    else:
        chains = _block(
            "chain leaves",
            [
                "type filter hook postrouting priority 300; policy accept;",
                f"ip daddr @far rt ip nexthop != {{ {hops} }} counter drop"
                if len(near_gateways) > 1
                else f"ip daddr @far rt ip nexthop != {hops} counter drop",
            ],
        )
    sets = [
        *_block("set far", ["type ipv4_addr", "flags interval", "auto-merge", f"elements = {{ {far_set} }}"]),
        *(
            _block("set near", ["type ipv4_addr", "flags interval", "auto-merge", f"elements = {{ {near_set} }}"])
            if local
            else []
        ),
    ]
    # One transaction: at no moment the table is not there.
    lines = [f"table ip {GUARD}", f"delete table ip {GUARD}", *_block(f"table ip {GUARD}", [*sets, *chains])]
    return _HEADER + "\n".join(lines) + "\n"


_TOLD = "3, 11, 12"
"""ICMP's numbers of what is said of a packet (destination unreachable, time exceeded, parameter problem): it has the
packet in it, and a gateway may say it by an address that is in none of its site's networks."""


ENCRYPTED = "rt ipsec exists accept"
"""The kernel shows a packet to the rules once more before it encrypts it, and then by the device that carries the
tunnel."""


def guard_of_kernel() -> str:
    """What is added to `guard` where the kernel does ESP. In a file of its own, as a kernel without IPsec refuses it:
    there the table stays as `guard` has it, and nothing leaves."""
    return _HEADER + f"insert rule ip {GUARD} leaves {ENCRYPTED}\n"


def kept(text: str, kernel: bool) -> str:
    """`guard`'s text for the table `KEPT`. A packet comes to it after the other one, which counts what it drops.
    `kernel`: it does ESP."""
    rules = text.replace(f"table ip {GUARD}", f"table ip {KEPT}")
    rules = rules.replace(f"table ip {KEPT} {{\n", f"table ip {KEPT} {{\n  flags owner;\n")
    rules = re.sub(r"priority (-?\d+);", lambda found: f"priority {int(found[1]) + 1};", rules)
    return rules + (f"insert rule ip {KEPT} leaves {ENCRYPTED}\n" if kernel else "")


_KEEPER = """\
#!/usr/bin/python3
{header}#
# Makes the table of rules that is in a file, and has it as long as it runs: a table with the flag `owner` can be
# changed and flushed by the socket that made it only, which libnftables keeps with its context, and goes with that.
# usage: {name} FILE
import ctypes
import os
import signal
import socket
import sys

library = ctypes.CDLL("libnftables.so.1")
library.nft_ctx_new.argtypes = [ctypes.c_uint32]
library.nft_ctx_new.restype = ctypes.c_void_p
library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
context = library.nft_ctx_new(0)

with open(sys.argv[1], encoding="ascii") as file:
    lines = file.readlines()
# A kernel without IPsec refuses the rule that is inserted: then the others are there, and nothing leaves.
for wanted in (lines, [line for line in lines if not line.startswith("insert ")]):
    if library.nft_run_cmd_from_buffer(context, "".join(wanted).encode()) == 0:
        break
else:
    sys.exit("The table was refused. It takes Linux 5.12 and nftables 1.0 or newer.")

with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    address = os.environ["NOTIFY_SOCKET"]
    notify.connect("\\0" + address[1:] if address.startswith("@") else address)
    notify.send(b"READY=1")
while True:
    signal.pause()
"""


def keeper_program(path: str) -> str:
    """What has the table `KEPT`; `path` is where it is."""
    return _KEEPER.format(header=_HEADER, name=path)


def _listed(addresses: Iterable[str]) -> str:
    """As the program nft lists a set, so that what it says can be compared with what it was given."""
    return ", ".join(sorted(addresses, key=IPv4Address))


# What somebody else sets


def other_sides(model: Ipsec) -> list[str]:
    """For each gateway that is not ours, what its engineer sets, in the words of the field."""
    told = []
    for both in model.pairs:
        for site in both:
            side, other = model.sites.get(site), model.sites.get(both[1] if both[0] == site else both[0])
            if side is None or other is None:
                continue
            for peer in side.peers:
                told += [_other_side(site, peer, one, " ".join(both), side, other) for one in other.gateways]
    return told


def _other_side(site: str, peer: Peer, gateway: Gateway, secret: str, side: Side, other: Side) -> str:
    more = ""
    if len(side.peers) * len(other.gateways) > 1:
        more = (
            f". This is one of {len(side.peers) * len(other.gateways)} tunnels for the same networks, all of which are "
            "up: packets may come by each of them, and are to be sent by one that is up"
        )
        if len(other.gateways) > 1:
            more += f", first of all one with {other.gateways[0].address}"
    return (
        f"gateway of {site} ({peer.address}): IKEv2 with {gateway.address}, which begins; identity "
        f"{peer.identity} here, {gateway.identity} (FQDN) there; pre-shared key (what "
        f"isthmus_ipsec_secrets has for '{secret}'). IKE: AES-256-GCM with 16 bytes ICV, PRF "
        f"HMAC-SHA-384, Diffie-Hellman group 20 (ECP 384), lifetime more than {REKEY} s. ESP: tunnel mode, "
        "AES-256-GCM with 16 bytes ICV, perfect forward secrecy with group 20, lifetime more than "
        f"{REKEY_CHILD} s, NAT traversal (ESP in UDP) on. Open: UDP "
        f"{' and '.join(str(port) for port in IPSEC_PORTS)} to and from {gateway.address}. Traffic selectors "
        f"(one child): here {', '.join(str(one) for one in side.networks)}; there "
        f"{', '.join(str(one) for one in other.networks)}. Routes to those networks lead into the tunnel, and "
        f"packets between them go nowhere else. MTU {IPSEC_MTU} inside, TCP MSS {IPSEC_MTU - 40}. Dead peer "
        f"detection on{more}"
    )
