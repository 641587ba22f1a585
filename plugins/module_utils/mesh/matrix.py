# SPDX-License-Identifier: BSD-2-Clause
"""The matrix of sites: how packets go between each two, what must be open for that, and what a run changes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .encryption import CHANGING, STAGES, Keys, Pair, Stage, pairs
from .openings import Documents, between, wireguard_ports

UNDERLAY_MTU = 1500
OVERHEAD = 50
"""Bytes of VXLAN over IPv4."""
WIREGUARD_OVERHEAD = 80
"""Bytes that WireGuard adds at most, as Cilium counts."""

_MOST_LINES = 100

Ways = Mapping[Pair, Sequence[Any]]
"""`Plan.stages`."""


def inner_mtu(stage: Stage, underlay: int = UNDERLAY_MTU) -> int:
    """MTU in bytes of the overlay's routes."""
    return underlay - OVERHEAD - (WIREGUARD_OVERHEAD if stage is not Stage.PLAIN else 0)


def rows(
    documents: Documents, overlay_port: int, overlay_mtu: int | None, ways: Ways, keys: Sequence[Keys]
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
                for each in between(documents, one, overlay_port, stages, keys)
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


def _rotation(keys: Sequence[Keys]) -> str:
    """What a run does to the keys of WireGuard; `keys` as `Plan.keys`."""
    now, *following = keys
    (new,), (old,) = wireguard_ports([following[-1]]), wireguard_ports([Keys(now.number)])
    steps = {
        Stage.ACCEPTS: f"every host gets a second key, device and port (UDP {new}) beside the first (UDP {old}), and "
        "takes packets by both",
        Stage.SENDS: "when each host has proven that it reaches the others by the new key, packets go with it",
        Stage.PLAIN: f"the old key, its device and its port (UDP {old}) go",
    }
    begun = f", which was begun before ({now.stage.word})" if now.has_both else ""
    told = "; ".join(f"({number}) {steps[each.stage]}" for number, each in enumerate(following, 1))
    return (
        f"the keys of WireGuard are replaced on all hosts that encrypt{begun}, in steps of one run, of which each "
        f"begins when all of them have done the one before: {told}. Connections stay; both ports must be open meanwhile"
    )


def changes(found: Sequence[Mapping[str, Any]], keys: Sequence[Keys]) -> list[str]:
    """What a run does to pairs whose encryption is turned on or off, and to keys, a line each."""
    told = [_rotation(keys)] if keys[0] != keys[-1] else []
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
