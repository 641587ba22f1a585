# SPDX-License-Identifier: BSD-2-Clause
"""The matrix of sites: how packets go between each two, what must be open for that, and what a run changes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .encryption import CHANGING, STAGES, Pair, Stage, pairs
from .openings import Documents, between, is_in_cluster
from .spec import OVERLAY_OVERHEAD, WIREGUARD_OVERHEAD

UNDERLAY_MTU = 1500

_MOST_LINES = 100

Ways = Mapping[Pair, Sequence[Any]]
"""`Plan.stages`."""


def inner_mtu(stage: Stage, underlay: int = UNDERLAY_MTU) -> int:
    """MTU in bytes of the overlay's routes."""
    return underlay - OVERLAY_OVERHEAD - (WIREGUARD_OVERHEAD if stage is not Stage.PLAIN else 0)


def rows(documents: Documents, overlay_port: int, overlay_mtu: int | None, ways: Ways) -> Iterator[dict[str, Any]]:
    """A row for each two sites that have hosts, and for each site that has several: where nodes are that only
    Kubernetes knows, there may be."""
    sizes: dict[str, int] = {}
    for document in documents.values():
        for entry in document["hosts"].values():
            sizes[entry["site"]] = sizes.get(entry["site"], 0) + 1
        if is_in_cluster(document):
            sizes[document["site"]] = sizes.get(document["site"], 0) + 2
    for one in pairs(sizes):
        if one[0] == one[1] and sizes[one[0]] == 1:
            continue
        now, *following = ways.get(one, (None, Stage.PLAIN))
        stages = [stage for stage in (now, *following) if stage is not None]
        mtu = inner_mtu(max(stages))
        yield {
            "sites": list(one),
            "routing": "tunnel",
            "encryption": "wireguard" if following[-1] is Stage.DEMANDS else "none",
            "now": None if now is None else now.word,
            "steps": [stage.word for stage in following] if now not in (None, following[-1]) else [],
            "mtu": mtu if overlay_mtu is None else min(mtu, overlay_mtu),
            "open": [
                {"protocol": each.protocol, "port": each.port, "on": each.to, "from": each.senders}
                for each in between(documents, one, overlay_port, stages)
            ],
        }


def name(sites: Sequence[str]) -> str:
    return f"within {sites[0]}" if sites[0] == sites[1] else f"{sites[0]} and {sites[1]}"


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each row, the first hundred of them."""
    told = []
    for row in found[:_MOST_LINES]:
        changing = f" (now being turned {'on' if row['encryption'] == 'wireguard' else 'off'})" if row["steps"] else ""
        opened = "; ".join(f"{one['protocol']} {one['port']} on {one['on']} from {one['from']}" for one in row["open"])
        told.append(
            f"{name(row['sites'])}: path tunnel (VXLAN), encryption {row['encryption']}{changing}, MTU {row['mtu']} "
            f"inside where the underlay has {UNDERLAY_MTU}. Open: {opened}"
        )
    if len(found) > _MOST_LINES:
        told.append(f"and {len(found) - _MOST_LINES} more pairs of sites")
    return told


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


def changes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a run does to pairs whose encryption is turned on or off, a line each."""
    told = []
    for row in found:
        if not row["steps"]:
            continue
        on = row["encryption"] == "wireguard"
        stages = [STAGES[word] for word in row["steps"]]
        begun = f", which was begun before ({row['now']})" if row["now"] in CHANGING else ""
        words = _ON if on else _OFF
        steps = "; ".join(f"({number}) {words[stage]}" for number, stage in enumerate(stages, 1) if stage in words)
        told.append(
            f"encryption of {name(row['sites'])} is turned {'on' if on else 'off'}{begun}, in steps of one run, of "
            f"which each begins when all hosts of the two sites have done the one before: {steps}. Connections stay"
            + (
                "; a datagram that must not be fragmented and is larger than the new MTU is refused to its sender"
                if on
                else ""
            )
        )
    return told
