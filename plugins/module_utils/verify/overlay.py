# SPDX-License-Identifier: BSD-2-Clause
"""Packets to each other host by its mesh address, whichever way they go: whether they pass, and how many are lost."""

from __future__ import annotations

import concurrent.futures
import contextlib
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import packets
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import Verifier

if TYPE_CHECKING:
    from collections.abc import Mapping

TCP_PORT = 9  # discard: hardly anybody listens there, and a refusal is an answer too
WHOLE_MARK = 0x4F  # the datapath lets nobody fragment the tunnel's packets around those with it
LOSS_PACKETS = 20  # to each host
LOSS_GAP = 0.02  # seconds between two of them
LOSS_MOST = 2000  # from a host; in a large mesh each other host gets fewer, but three at least


def check_packets(verifier: Verifier) -> None:
    source = verifier.spec["node"]["mesh4"]
    nodes: dict[tuple[str, str], Any] = {}
    silent: type[Exception] = verifier.bundle("isthmus_agent.cli.client").AgentSilent
    with contextlib.suppress(silent):  # an agent that does not answer is told by `check_agent`
        nodes = {(one["cluster"], one["name"]): one for one in verifier.ask()["nodes"]}
    with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
        asked = {host["name"]: pool.submit(_reach, verifier, source, host, nodes) for host in verifier.hosts}
        for host in verifier.hosts:
            target = f"{host['name']} ({host['mesh4']})"
            for words in asked[host["name"]].result():
                verifier.check("packets", not words, f"{target}: {words}; see `isthmus status` on both hosts")


def measure_loss(verifier: Verifier) -> None:
    source = verifier.spec["node"]["mesh4"]
    sizes = {}
    for host in verifier.hosts:
        with contextlib.suppress(OSError):  # no way there, which `check_packets` has told
            sizes[host["mesh4"]] = packets.path_mtu(source, host["mesh4"])
    if not sizes:
        return
    count = max(3, min(LOSS_PACKETS, LOSS_MOST // len(sizes)))
    lost = packets.lost(source, sizes, count, LOSS_GAP, verifier.timeout / 3)
    names = {host["mesh4"]: host["name"] for host in verifier.hosts}
    verifier.loss = {"sent": count * len(sizes), "lost": {names[each]: lost[each] for each in sizes if lost[each]}}
    some = [f"{name} {number} of {count}" for name, number in verifier.loss["lost"].items() if number < count]
    more = f" and {len(some) - 5} more" if len(some) > 5 else ""
    if some:
        verifier.remarks.append(
            f"packets of full size from {verifier.spec['host']} are lost on the way, or their answers are: to "
            f"{', '.join(some[:5])}{more}. The network between the hosts drops them, or one of these hosts is "
            "overloaded"
        )


def _reach(verifier: Verifier, source: str, host: Mapping[str, str], nodes: Mapping[tuple[str, str], Any]) -> list[str]:
    """Empty text for each thing that works: a small packet, one of full size, a packet of TCP. `nodes`: what the agent
    says of each, by cluster and name."""
    target, results = host["mesh4"], []
    known = nodes.get((host["cluster"], host["name"]), {})
    try:
        packets.echo(source, target, 84, verifier.timeout / 3)
        results.append("")
    except (packets.NoAnswer, OSError) as exc:
        words = f"an echo over the overlay: {exc}"
        if known.get("deaf"):
            words += (
                f". The way is cut in one direction: {host['name']} does not hear {verifier.spec['host']}, "
                f"{verifier.spec['host']} hears {host['name']}"
            )
        results.append(words)
    results.append(_reach_whole(verifier, source, target, known.get("routing") or {}))
    try:
        packets.knock(target, TCP_PORT, verifier.timeout)
        results.append("")
    except packets.NoAnswer as exc:
        results.append(f"TCP over the overlay: {exc}")
    return results


def _reach_whole(verifier: Verifier, source: str, target: str, way: Mapping[str, Any]) -> str:
    """Why a packet as large as the routes allow does not pass without being fragmented, empty when it does. `way`:
    what the agent says of it."""
    try:
        carried = packets.path_mtu(source, target)
        full = way.get("mtu") or carried
        if carried < full:
            return (
                f"the way carries only {carried} bytes, and routes {full}: a router in between has said so. Give "
                "its links the MTU of the hosts, or the hosts the link's"
            )
        packets.echo(source, target, full, verifier.timeout / 3, mark=WHOLE_MARK)
    except (packets.NoAnswer, OSError) as exc:
        found = way.get("path_mtu")
        more = f" (the agent found that the way carries {found})" if found is not None and way.get("lost") else ""
        return f"an echo of full size over the overlay, not to be fragmented: {exc}{more}"
    return ""
