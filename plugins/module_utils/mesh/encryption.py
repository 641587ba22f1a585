# SPDX-License-Identifier: BSD-2-Clause
"""Encryption of pairs of sites and its keys, and how both come from one state to another without losing a packet.
Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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


STAGED = ("encryption", "routing", "ipsec")
"""Keys of the roster that have stages of pairs of sites."""
STAGES = {stage.word: stage for stage in Stage}
CHANGING = (Stage.ACCEPTS.word, Stage.SENDS.word)
"""Words of the stages at which a pair is on its way."""
KEY_STAGES = (*CHANGING, Stage.DEMANDS.word)
"""Words of the stages at which keys are on their way."""

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


@dataclass(frozen=True)
class Keys:
    """Which keys every host has, one for the whole estate. A key is number 0 or 1, with a file, a device and a port of
    its own. `stage` is PLAIN but while the key `number` is replaced by the other one: at ACCEPTS hosts have both and
    send with the old one, at SENDS they have both and send with the new one, at DEMANDS they have the new one only, and
    PLAIN follows, with the new `number`, when all of them have: a host that still has the old one would keep it as the
    new one of the next time. Hosts at neighbouring stages understand each other."""

    number: int = 0
    stage: Stage = Stage.PLAIN

    @property
    def sends(self) -> int:
        """The number of the key that packets are sent with."""
        return 1 - self.number if self.stage >= Stage.SENDS else self.number

    @property
    def has_both(self) -> bool:
        return self.stage in (Stage.ACCEPTS, Stage.SENDS)


def key_words(keys: Keys) -> str:
    """For people; a port follows from a key's number (spec.WIREGUARD_PORTS)."""
    if keys.stage is Stage.PLAIN:
        return f"number {keys.number}"
    if keys.stage is Stage.DEMANDS:
        return f"number {keys.sends}; hosts may still have number {keys.number}, which goes"
    return f"number {keys.number} is replaced by number {1 - keys.number}; packets go with number {keys.sends}"


def rotation(now: Keys, wanted: bool) -> list[Keys]:
    """The stages from here to other keys; as `way`, one that was begun is completed first, `wanted` or not."""
    if now.stage is Stage.PLAIN and not wanted:
        return [now]
    ahead = [Keys(now.number, stage) for stage in (Stage.ACCEPTS, Stage.SENDS, Stage.DEMANDS)] + [Keys(1 - now.number)]
    return ahead[ahead.index(now) :] if now in ahead else ahead


def to_document(stages: Mapping[Pair, Stage], keys: Keys = Keys()) -> dict[str, Any] | None:
    """The roster's `encryption`: the stage that most pairs have (`all`), by "one other" those of the rest (`pairs`),
    and the `keys`, unless the first alone is there. None when nothing is encrypted."""
    if not any(stages.values()):
        return None
    counted = Counter(stages.values())
    most = min(counted, key=lambda stage: (-counted[stage], stage))
    rest = {" ".join(one): stage.word for one, stage in sorted(stages.items()) if stage is not most}
    document: dict[str, Any] = {"all": most.word, "pairs": rest}
    if keys != Keys():
        document["keys"] = {"number": keys.number, **({"stage": keys.stage.word} if keys.stage else {})}
    return document


def keys_of(document: Mapping[str, Any] | None) -> Keys:
    """Of the roster's `encryption`."""
    found = (document or {}).get("keys", {})
    return Keys(found.get("number", 0), STAGES[found.get("stage", Stage.PLAIN.word)])


def from_document(document: Mapping[str, Any] | None, sites: Iterable[str]) -> dict[Pair, Stage]:
    """The stage of every pair of these sites; nothing where nothing is encrypted."""
    if document is None:
        return {}
    most, rest = STAGES[document["all"]], document["pairs"]
    return {one: STAGES[rest[" ".join(one)]] if " ".join(one) in rest else most for one in pairs(sites)}
