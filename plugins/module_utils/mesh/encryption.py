# SPDX-License-Identifier: BSD-2-Clause
"""Encryption of pairs of sites, and how a pair comes from one state to another without losing a packet. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Any

Pair = tuple[str, str]
"""Two sites in the order of the alphabet; twice the same: the hosts of one site among themselves."""


class Stage(IntEnum):
    """How the hosts of a pair of sites treat each other. Hosts at neighbouring stages understand each other, so a
    pair goes from stage to stage, and begins one when all of its hosts have the one before.

    PLAIN: in clear. ACCEPTS: sends in clear, takes both. SENDS: sends through WireGuard, takes both. DEMANDS: sends
    through WireGuard or not at all, and takes nothing else."""

    PLAIN = 0
    ACCEPTS = 1
    SENDS = 2
    DEMANDS = 3

    @property
    def word(self) -> str:
        """As documents have it."""
        return self.name.lower()


STAGES = {stage.word: stage for stage in Stage}
CHANGING = (Stage.ACCEPTS.word, Stage.SENDS.word)
"""Words of the stages at which a pair is on its way."""

WORDS = {
    Stage.PLAIN: "none: in clear",
    Stage.ACCEPTS: "WireGuard is there; packets go in clear, encrypted ones are taken too",
    Stage.SENDS: "packets go through WireGuard, those in clear are taken too",
    Stage.DEMANDS: "WireGuard, and nothing in clear",
}


def pair(one: str, other: str) -> Pair:
    return (one, other) if one <= other else (other, one)


def pairs(sites: Iterable[str]) -> Iterator[Pair]:
    """Every pair of some sites, each with itself too."""
    ordered = sorted(set(sites))
    return ((one, other) for number, one in enumerate(ordered) for other in ordered[number:])


def way(now: Stage | None, wanted: Stage) -> list[Stage]:
    """The stages that a pair goes through, `now` None: of one between whose hosts there is no traffic yet. The first is
    where a run begins: a stage at which a run was interrupted is completed before the next one."""
    if now is None or now is wanted:
        return [wanted]
    step = 1 if wanted > now else -1
    begun = now in (Stage.ACCEPTS, Stage.SENDS)
    return [Stage(number) for number in range(now if begun else now + step, wanted + step, step)]


def to_document(stages: Mapping[Pair, Stage]) -> dict[str, Any] | None:
    """The roster's `encryption`: the stage that most pairs have (`all`) and, by "one other", those of the rest. None
    when nothing is encrypted."""
    if not any(stages.values()):
        return None
    counted = Counter(stages.values())
    most = min(counted, key=lambda stage: (-counted[stage], stage))
    rest = {" ".join(one): stage.word for one, stage in sorted(stages.items()) if stage is not most}
    return {"all": most.word, "pairs": rest}


def from_document(document: Mapping[str, Any] | None, sites: Iterable[str]) -> dict[Pair, Stage]:
    """The stage of every pair of these sites; nothing where nothing is encrypted."""
    if document is None:
        return {}
    most, rest = STAGES[document["all"]], document["pairs"]
    return {one: STAGES[rest[" ".join(one)]] if " ".join(one) in rest else most for one in pairs(sites)}
