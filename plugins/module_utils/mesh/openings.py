# SPDX-License-Identifier: BSD-2-Clause
"""Which ports of a mesh must be open, for whom: docs/ports.md has its table from here. Pure.

Documents are those of the estate record; only clusters that are present count."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, collapse_addresses
from typing import Any
from urllib.parse import urlsplit

from . import ipsec, spec
from .encryption import Keys, Pair, Stage
from .record import pod_ranges

Documents = Mapping[str, Mapping[str, Any]]
"""Clusters' documents by cluster."""


@dataclass(frozen=True)
class Opening:
    """One port (None: all of the protocol), on `to`, for `senders`, as words."""

    protocol: str
    port: int | None
    senders: str
    to: str


@dataclass(frozen=True)
class Row:
    """A row of the table in docs/ports.md."""

    port: str
    senders: str
    to: str
    why: str


TABLE = (
    Row(
        "UDP 8472 (`overlay.port`, one for the whole mesh)",
        "every host of every cluster",
        "every host of the clusters it peers with",
        "the VXLAN overlay, and the probes inside it; not between sites that encrypt or are native, but while that is "
        "turned on or off there",
    ),
    Row(
        "all of IP",
        "ranges of workloads (`range4` of each host in the plan) of sites that are native to each other, and of pods "
        "where Kubernetes nodes are",
        "those ranges, at their hosts",
        "native packets, where they are not inside WireGuard ([routing.md](routing.md))",
    ),
    Row(
        f"UDP {spec.WIREGUARD_PORTS[0]} or {spec.WIREGUARD_PORTS[1]}, both while keys are replaced",
        "hosts of sites that encrypt",
        "hosts of the sites they encrypt with",
        "WireGuard with the overlay or native packets inside ([encryption.md](encryption.md)). Of a site with "
        "`inbound: false` the hosts only send: nothing is opened there, and at the other sites the port is open to "
        "all, as the address that they come from is not known",
    ),
    Row(
        f"UDP {' and '.join(str(port) for port in spec.IPSEC_PORTS)}",
        "gateways of sites with `encryption: ipsec-gateway`",
        "the gateways of the other sites",
        "IKE, and ESP in UDP with all else between the sites inside ([ipsec.md](ipsec.md))",
    ),
    Row(
        "TCP 2379 (`etcd.client_port`)",
        "hosts of the same cluster; etcd hosts of every peering cluster, nodes of those with `control_plane: "
        "in_cluster`",
        "the cluster's etcd hosts",
        "agents read their own cluster; registrars mirror peers, read-only",
    ),
    Row(
        "TCP 2379, or as `expose` says",
        "etcd hosts of every peering cluster; nodes of those with `control_plane: in_cluster`",
        "what exposes the etcd of a cluster with `control_plane: in_cluster`",
        "registrars mirror peers, read-only ([kubernetes-managed.md](kubernetes-managed.md))",
    ),
    Row(
        "TCP 2380 (`etcd.peer_port`)",
        "the cluster's etcd hosts",
        "the cluster's etcd hosts",
        "etcd members among themselves",
    ),
    Row(
        "TCP 6443, or as `kubernetes.api_server` says",
        "etcd hosts of a Kubernetes cluster; the controller, or `isthmus_api_host`",
        "its API server",
        "registrars watch Kubernetes; `site` lets them in",
    ),
    Row(
        "TCP 179, with BFD also UDP 3784",
        "hosts and routers of sites with `bgp`",
        "each other",
        "hosts announce their ranges ([bgp.md](bgp.md)); hosts connect, so that TCP need not be open on them",
    ),
    Row("TCP 22", "the controller", "every host", "Ansible"),
)


def documents_of(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of the record's documents those of clusters that are present."""
    return {
        key[len("clusters/") :]: document
        for key, document in sorted(record.items())
        if key.startswith("clusters/") and document["state"] != "absent"
    }


def encrypts(own: Mapping[str, Any], site: str) -> Stage:
    """The stage of a host, by its spec as JSON, with the hosts of a site."""
    if own.get("wireguard") is None:
        return Stage.PLAIN
    return spec.wireguard_of(own["wireguard"]).stage(site)


def native(own: Mapping[str, Any], site: str) -> Stage:
    """The stage of native routing of a host, by its spec as JSON, with the hosts of a site."""
    if own.get("native") is None:
        return Stage.PLAIN
    return spec.native_of(own["native"]).stage(site)


def wireguard_ports(keys: Iterable[Keys]) -> list[int]:
    """UDP ports of WireGuard of hosts that have these keys, one after the other."""
    numbers = {number for each in keys for number in ((0, 1) if each.has_both else (each.sends,))}
    return [spec.WIREGUARD_PORTS[number] for number in sorted(numbers)]


def tunnels(own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of a host, by its spec as JSON: `key` and `port` of each."""
    first = own.get("wireguard")
    if not first:
        return []
    return [first, first["second"]] if first.get("second") else [first]


def devices(own: Mapping[str, Any]) -> list[str]:
    """Names of the WireGuard devices of a host, by its spec as JSON."""
    return [spec.WIREGUARD_DEVICES[spec.WIREGUARD_PORTS.index(tunnel["port"])] for tunnel in tunnels(own)]


def listens(own: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Protocols and ports on which a host, by its spec as JSON, listens for others."""
    found = [("udp", own["overlay"]["port"])]
    found += [("udp", tunnel["port"]) for tunnel in tunnels(own)]
    found += sorted({(protocol, port) for protocol, port, _source in ipsec.senders(own)})
    member = own.get("member")
    if member:
        found += [("tcp", urlsplit(member[url]).port or 0) for url in ("client_url", "peer_url")]
    return found


ANYWHERE = "0.0.0.0/0"
"""Source of a session that is opened behind an address translation."""


def rules(own: Mapping[str, Any], record: Mapping[str, Any], outside: bool = False) -> list[tuple[str, int, str]]:
    """What a host, by its spec as JSON, must let in: protocol, port and source address, in order. A firewall `outside`
    the host does not see the overlay where it is inside WireGuard. Where one side opens all sessions the other lets
    WireGuard in from anywhere, and nothing else is let in."""
    documents = documents_of(record)
    cluster = documents[own["cluster"]["name"]]
    here = cluster["hosts"][own["host"]]
    opens, opened_by = _sessions(own)
    apart = {site for site in opens | opened_by if _hidden(own, site)}

    def near(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [entry for entry in entries if entry["site"] not in apart]

    everybody = near(entry for document in documents.values() for entry in document["hosts"].values())
    plain = [entry for entry in everybody if not (outside and _hidden(own, entry["site"]))]
    wanted = [("udp", own["overlay"]["port"], plain)]
    encrypted = [
        entry for entry in everybody if encrypts(own, entry["site"]) and entry["site"] not in opens | opened_by
    ]
    wanted += [("udp", tunnel["port"], encrypted) for tunnel in tunnels(own)]
    if own.get("member"):
        etcd = cluster["etcd"]
        readers = [entry for one in documents.values() if one is not cluster for entry in _members(one)]
        readers += cluster["hosts"].values()
        wanted += [("tcp", etcd["client_port"], near(readers)), ("tcp", etcd["peer_port"], list(_members(cluster)))]
    found = {
        (protocol, port, source)
        for protocol, port, senders in wanted
        for source in set().union(*(_sources(entry, here) for entry in senders))
        if source not in (here["underlay4"], here["advertise4"])
    }
    if opened_by:
        found = {one for one in found if one[:2] not in [("udp", tunnel["port"]) for tunnel in tunnels(own)]}
        found.update(("udp", tunnel["port"], ANYWHERE) for tunnel in tunnels(own))
    return sorted(found.union(ipsec.senders(own)))


def is_one_sided(own: Mapping[str, Any], site: str) -> bool:
    """Whether only one of a host, by its spec as JSON, and the hosts of a site can open sessions."""
    return any(site in sites for sites in _sessions(own))


def asked(own: Mapping[str, Any], site: str, port: int) -> str:
    """What to look at when a host has no session of WireGuard with one of a site."""
    opens, opened_by = _sessions(own)
    if site in opens:
        return f"is UDP {port} of {site} open to all, and may this host send there?"
    if site in opened_by:
        return f"hosts of {site} open the session; is UDP {port} open here to all, and may they send to it?"
    return f"is UDP {port} open both ways?"


def _sessions(own: Mapping[str, Any]) -> tuple[frozenset[str], frozenset[str]]:
    """Sites with whose hosts a host, by its spec as JSON, opens all sessions, and those whose hosts do so with it."""
    if own.get("wireguard") is None:
        return frozenset(), frozenset()
    found = spec.wireguard_of(own["wireguard"])
    return found.opens, found.opened_by


def _hidden(own: Mapping[str, Any], site: str) -> bool:
    """Whether no packet of the overlay to or from a site is seen outside the host."""
    return Stage.DEMANDS in (encrypts(own, site), native(own, site))


def native_sources(
    own: Mapping[str, Any], record: Mapping[str, Any], outside: bool = False, dealt: bool = False
) -> list[str]:
    """Ranges from which native packets come to a host's range, by its spec as JSON, collapsed, in order: those of
    hosts and, where some are Kubernetes nodes, of their cluster's pods, which only Kubernetes deals to nodes, with
    `dealt` those of them that it is known to have dealt. What is `outside` the host does not see those inside
    WireGuard."""
    here = own["node"]["range4"]
    found: list[str] = []
    for document in documents_of(record).values():
        entries = [
            entry
            for entry in document["hosts"].values()
            if entry["range4"] != here
            and native(own, entry["site"]) is not Stage.PLAIN
            and not (outside and encrypts(own, entry["site"]) is Stage.DEMANDS)
        ]
        found += [entry["range4"] for entry in entries]
        nodes = [entry for entry in entries if entry.get("kubernetes_node")]
        if dealt:
            found += [text for entry in nodes for text in entry.get("pod_cidrs", ())]
        elif nodes:
            found += pod_ranges(document)
    return [str(network) for network in collapse_addresses(map(IPv4Network, found))]


def needs_routes(own: Mapping[str, Any]) -> bool:
    """Whether packets come to a host, by its spec as JSON, natively in clear, so that the network has to lead them."""
    sites = own["native"]["sites"].values() if own.get("native") else ()
    return any(native(own, site) is not Stage.PLAIN and encrypts(own, site) is not Stage.DEMANDS for site in sites)


def pods_at(document: Mapping[str, Any], sites: Collection[str]) -> list[str]:
    """Ranges of a cluster's pods that lie behind its hosts at some sites: all of them where all of its nodes are there,
    so that a node that comes is in them as well, else what is known of these nodes (`pod_cidrs`)."""
    nodes = [entry for entry in document["hosts"].values() if "kubernetes_node" in entry]
    here = [entry for entry in nodes if entry["site"] in sites]
    if here and len(here) == len(nodes):
        return pod_ranges(document)
    return [text for entry in here for text in entry.get("pod_cidrs", ())]


def _members(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (document["hosts"][name] for name in document["etcd"]["members"] if name in document["hosts"])


def _sources(entry: Mapping[str, Any], here: Mapping[str, Any]) -> set[str]:
    """From where a host's packets come: within a site never by the address that others dial."""
    return {entry["underlay4"]} if entry["site"] == here["site"] else {entry["underlay4"], entry["advertise4"]}


def between(
    documents: Documents,
    pair: Pair,
    overlay_port: int,
    stages: Iterable[Stage],
    native: Iterable[Stage],
    keys: Iterable[Keys],
    closed: Collection[str] = (),
) -> list[Opening]:
    """What two sites need of each other while the pair is at these stages of encryption, with these keys, and of native
    routing in clear. `closed` are sites to which nobody outside opens anything."""
    at, native_at = set(stages), set(native)
    inside = sorted(set(pair).intersection(closed)) if pair[0] != pair[1] else []
    if inside and at == {Stage.DEMANDS}:
        (other,) = set(pair) - set(inside)
        senders = f"hosts of {inside[0]}, from any address; nothing is opened at {inside[0]}"
        return [Opening("UDP", port, senders, f"every host of {other}") for port in wireguard_ports(keys)]
    both = sorted(set(pair))
    found = []
    everywhere = ("each other", f"every host of {' and '.join(both)}")
    if native_at - {Stage.PLAIN}:
        found.append(Opening("IP", None, "the same ranges", f"the ranges of workloads at {everywhere[1]}"))
    if at - {Stage.DEMANDS} and native_at - {Stage.DEMANDS}:
        found.append(Opening("UDP", overlay_port, *everywhere))
    if at - {Stage.PLAIN}:
        found += [Opening("UDP", port, *everywhere) for port in wireguard_ports(keys)]
    for here in both:
        there = pair[1] if pair[0] == here else pair[0]
        for name, document in sorted(documents.items()):
            members = [host for host in document["etcd"]["members"] if document["hosts"][host]["site"] == here]
            if not members:
                continue
            to = f"{', '.join(members)} (etcd of {name})"
            # Members ask each other, too.
            readers = _readers(documents, name, there, members if len(members) == 1 else [])
            etcd = document["etcd"]
            if readers:
                found.append(Opening("TCP", etcd["client_port"], ", ".join(readers), to))
            others = [host for host in etcd["members"] if document["hosts"][host]["site"] == there]
            if others and (here != there or len(members) > 1):
                found.append(Opening("TCP", etcd["peer_port"], ", ".join(others), to))
        found += _exposed(documents, here, there)
    return found


def is_in_cluster(document: Mapping[str, Any]) -> bool:
    """Whether a cluster's control plane is in it, so that only Kubernetes knows its nodes."""
    return document.get("control_plane") == "in_cluster"


def _exposed(documents: Documents, here: str, there: str) -> Iterator[Opening]:
    """Of clusters at a site whose control plane is in them: where registrars of another site dial their etcd."""
    for name, document in sorted(documents.items()):
        if not is_in_cluster(document) or document["site"] != here:
            continue
        readers = _readers(documents, name, there, [])
        urls = [urlsplit(url) for url in document.get("exposed", {"endpoints": ()})["endpoints"]]
        port = next((url.port for url in urls if url.port), document["etcd"]["client_port"])
        places = ", ".join(url.hostname or "" for url in urls) or "an address that is not known yet"
        if readers:
            yield Opening("TCP", port, ", ".join(readers), f"{places} (etcd of {name})")


def _readers(documents: Documents, cluster: str, site: str, members: list[str]) -> list[str]:
    """Who in a site asks the etcd members of a cluster, in words."""
    found = []
    own = [name for name, entry in documents[cluster]["hosts"].items() if entry["site"] == site and name not in members]
    if own:
        found.append(f"hosts of {cluster}")
    for name, document in sorted(documents.items()):
        if name != cluster and any(entry["site"] == site for entry in _members(document)):
            found.append(f"etcd hosts of {name}")
        if name != cluster and is_in_cluster(document) and document["site"] == site:
            found.append(f"nodes of {name}")
    return found
