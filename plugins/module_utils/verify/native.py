# SPDX-License-Identifier: BSD-2-Clause
"""Native routing: packets of full size reach each host without a tunnel, where they go so or are about to."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import packets
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.encryption import CHANGING, Stage
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.echoes import echoed, unanswered
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

NATIVE_MARK = 0x4E  # the agent's rules lead packets with it natively while that is turned on or off
BY_THE_NETWORK = (
    "The network between the hosts must route the ranges of workloads (`routers` of the plan has the routes), and let "
    "packets between them through"
)
THROUGH_WIREGUARD = (
    "It is to be reached so inside WireGuard: firewalls of the two hosts must let packets between the ranges of "
    "workloads in on its devices (docs/ports.md), and WireGuard must have a session between them"
)


def check_native(verifier: Verifier) -> None:
    """Each host that is to be reached natively is, and the way carries what the underlays on both sides do, with
    WireGuard less what that needs. Packets of full size that are answered were inside WireGuard where they have to
    be: the programs on both sides drop others."""
    source = verifier.spec["node"]["mesh4"]
    nodes = {(one["cluster"], one["name"]): one for one in verifier.ask()["nodes"]}
    reached = {(host["cluster"], host["name"]): host["mesh4"] for host in verifier.hosts}
    sites = {key: site for key, site in sorted(verifier.sites().items()) if key in reached}
    sites = {key: site for key, site in sites.items() if openings.native(verifier.spec, site) is not Stage.PLAIN}
    silent = unanswered(source, {key: [reached[key]] for key in sites}, verifier.timeout / 3)
    for key, site in sites.items():
        stage = openings.native(verifier.spec, site)
        name = f"{key[1]} of cluster {key[0]} (site {site})"
        found = nodes.get(key, {}).get("routing") or {"way": "not known", "stage": Stage.PLAIN.word, "mtu": 0}
        turned = f"it is being turned on or off ({stage.word})" if stage.word in CHANGING else "it should be"
        inside = openings.encrypts(verifier.spec, site) is Stage.DEMANDS
        shown = ", which `isthmus status` on both shows" if inside else ""
        if verifier.check(
            "routing",
            found["stage"] == stage.word == Stage.DEMANDS.word,
            f"packets to {name} do not go natively as the inventory says: {turned}, and the way is {found['way']} "
            f"({found['stage']}); {SITE}, and see `isthmus status` on both hosts",
        ):
            verifier.check(
                "routing",
                key not in silent,
                f"{name} is not reached natively: {silent.get(key)}. "
                f"{_needed(verifier.spec, site)}{shown}; where routing is auto, isthmus.mesh.site leads packets back "
                "into the tunnel",
            )
            carried = packets.path_mtu(source, reached[key])
            verifier.check(
                "routing",
                carried >= found["mtu"],
                f"the way to {name} carries only {carried} bytes, and the devices at both ends {found['mtu']}: a "
                "router in between has said so. Give its links the MTU of the hosts, or the hosts the link's",
            )


def check_native_way(verifier: Verifier) -> None:
    """A packet of full size that goes natively, to each host of the sites with which that is being turned on, or is
    asked for."""
    with open(verifier.NODE, encoding="utf-8") as file:
        installed = json.load(file)
    source = installed["node"]["mesh4"]
    entries = {
        (cluster, name): entry
        for cluster, document in openings.documents_of(verifier.record).items()
        for name, entry in document["hosts"].items()
    }
    tried = {(host["cluster"], host["name"]) for host in verifier.hosts}
    expected = {
        key: site
        for key, site in sorted(verifier.sites().items())
        if openings.native(installed, site) in (Stage.ACCEPTS, Stage.SENDS) or key in tried
    }
    unreached = []
    with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
        asked = {
            key: pool.submit(_try_natively, verifier, openings.native(installed, site), source, entries[key]["mesh4"])
            for key, site in expected.items()
        }
        for (cluster, name), site in expected.items():
            words, sure = asked[cluster, name].result()
            if (cluster, name) in tried:
                found = {"cluster": cluster, "name": name, "site": site, "why": words, "sure": sure}
                unreached += [found] if words else []
                continue
            verifier.check(
                "routing",
                not words,
                f"{name} of cluster {cluster} (site {site}) is not reached natively: {words}. "
                f"{_needed(installed, site)}",
            )
    nodes = {
        key
        for key, site in expected.items()
        if "kubernetes_node" in entries[key] and openings.native(installed, site) is Stage.ACCEPTS
    }
    for (cluster, name), addresses, words in _pods_reached(verifier, source, nodes):
        site = expected[cluster, name]
        if (cluster, name) not in tried:
            verifier.check(
                "routing",
                not words,
                f"pods on {name} of cluster {cluster} ({addresses}) are not reached natively, and through the tunnel "
                f"they are: {words}. {_needed(installed, site)}",
            )
        elif words:
            why = f"pods on it ({addresses}) do not answer, and through the tunnel they do: {words}"
            unreached.append({"cluster": cluster, "name": name, "site": site, "why": why, "sure": True})
    # One of each site tells enough, and rather one that tells something.
    unreached.sort(key=lambda one: (one["site"], not one["sure"]))
    verifier.unreached = [next(of_site) for _site, of_site in itertools.groupby(unreached, lambda one: one["site"])]


def _needed(installed: Mapping[str, Any], site: str) -> str:
    """What native packets to a site need."""
    return THROUGH_WIREGUARD if openings.encrypts(installed, site) is Stage.DEMANDS else BY_THE_NETWORK


def _pods_reached(
    verifier: Verifier, source: str, nodes: Collection[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], str, str]]:
    """Of each of these nodes with pods the addresses that were tried and, where none of these pods answers natively,
    why: the network may know the way to a node and not that to its pods, and what filters inside WireGuard may let in
    packets to the node alone. Pods that do not answer through the tunnel either prove nothing, as a network policy may
    forbid echoes."""
    if not nodes:
        return
    told = verifier.bundle("isthmus_agent.cli.client").ask(verifier.SOCKET, "/v1/pods")
    for one in told["others"]:
        if (one["cluster"], one["node"]) not in nodes:
            continue
        words = ""
        for address in one["addresses"]:
            # A pod's own device may carry less than the way to its node, which the first packet learns.
            words = _reach_natively(verifier, source, address) and _reach_natively(verifier, source, address)
            if not words:
                break
        if words and echoed(source, one["addresses"], verifier.timeout / 3):
            words = ""
        yield (one["cluster"], one["node"]), ", ".join(one["addresses"]), words


def _try_natively(verifier: Verifier, stage: Stage, source: str, target: str) -> tuple[str, bool]:
    """Why a host is not reached natively, empty when it is, and whether that is sure: while packets go through the
    tunnel it is known that something else than the host or the line to it is why."""
    if stage is Stage.PLAIN:
        return "packets to it are not led natively yet", False
    words = _reach_natively(verifier, source, target)
    return words, not words or stage is not Stage.ACCEPTS or not echoed(source, [target], verifier.timeout / 3)


def _reach_natively(verifier: Verifier, source: str, target: str) -> str:
    try:
        size = packets.path_mtu(source, target, NATIVE_MARK)
        packets.echo(source, target, size, verifier.timeout / 3, mark=NATIVE_MARK)
    except (packets.NoAnswer, OSError) as exc:
        return str(exc)
    return ""
