# SPDX-License-Identifier: BSD-2-Clause
"""Pairs of sites that find out by themselves how packets go between them (`routing: auto`): natively where all of their
hosts have proven that they reach each other so, else through the tunnel. Pure.

A run of `site` leads such a pair through the stages of native routing (routing.py), one in each of its steps. Before
each step the hosts prove what they can: at ACCEPTS and SENDS, where both ways are taken, the verdict leads the pair one
stage on or one back; at PLAIN and DEMANDS it rests. At DEMANDS it is proven again by each run, before anything is
changed. A pair that came back to PLAIN stays there, as the roster says between which hosts it failed, until it has
other hosts or somebody asks for another try: a run that has nothing new to try changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .encryption import Pair, Stage, way
from .openings import Documents, is_in_cluster

LAST = 3
"""The number of a run's last step, and of the proof before it: from a new host that is not reached natively by all of
the old ones, and so from DEMANDS, it is three steps back to PLAIN."""

Places = Mapping[str, Mapping[str, Mapping[str, str]]]
"""By site and by name, what of a host decides whether packets go natively, and whose host it is."""

RESTING = (Stage.PLAIN, Stage.DEMANDS)

AGAIN = "isthmus.mesh.site with -e isthmus_try_native=true"


@dataclass(frozen=True)
class Verdict:
    """What a proof says of a pair: whether it `works` natively, None when nobody knows; else between which `hosts` it
    does not, or `why` nobody knows."""

    works: bool | None
    hosts: tuple[str, ...] = ()
    why: str = ""


Proofs = Sequence[Mapping[Pair, Verdict]]
"""The proofs that a run has made: number 0 before its first step, number 1 before the one after that, and so on."""


@dataclass(frozen=True)
class Course:
    """A pair in a run: the stage where it is (None: no traffic yet), those of the run's steps as far as its proofs have
    decided them, and which proofs it has a part in. `failed`: at PLAIN, between which hosts native packets did not
    come through. `verdict` is the last one."""

    now: Stage | None
    stages: tuple[Stage, ...]
    proofs: tuple[int, ...] = ()
    failed: tuple[str, ...] = ()
    verdict: Verdict | None = None

    @property
    def tried(self) -> bool:
        """Whether it is not known yet which way it goes."""
        return self.now is not Stage.DEMANDS and bool(self.proofs)

    @property
    def joined(self) -> bool:
        """Whether it is native, and hosts that have come have still to prove it."""
        return self.stages[0] is Stage.DEMANDS and 1 in self.proofs


def course(now: Stage | None, failed: Sequence[str], changed: bool, proofs: Proofs, pair: Pair) -> Course:
    """`failed` as the roster has it, empty when the pair is to be tried again; `changed`: it has other hosts than the
    record knows. Where nobody knows, the pair stays, and is proven again before a step that others take."""
    part: list[int] = []
    verdict: Verdict | None = None

    def proven(number: int) -> Verdict | None:
        part.append(number)
        return proofs[number].get(pair) if number < len(proofs) else None

    stage = now or Stage.PLAIN
    if now is Stage.DEMANDS:
        verdict = proven(0)
        if verdict is not None and verdict.works is False:
            stage = Stage.SENDS
    elif stage is Stage.PLAIN and (changed or not failed):
        stage = Stage.ACCEPTS
    stages, joined = [stage], stage is Stage.DEMANDS and changed
    for number in range(1, LAST + 1):
        if stage in RESTING and not joined:
            break
        found = proven(number)
        if found is None:
            break
        verdict = found
        if found.works is not None:
            stage = Stage(min(stage + 1, Stage.DEMANDS) if found.works else stage - 1)
            joined = False
        stages.append(stage)
    while len(stages) > 1 and stages[-1] is stages[-2]:
        stages.pop()
    between = () if stage is not Stage.PLAIN else failed if verdict is None else verdict.hosts
    return Course(now, tuple(stages), tuple(part), tuple(between), verdict)


def resting(now: Stage | None) -> Course:
    """Of a pair that has too few hosts to prove anything."""
    return Course(now, tuple(way(now, Stage.DEMANDS if now is Stage.DEMANDS else Stage.PLAIN)))


def places(documents: Documents) -> Places:
    found: dict[str, dict[str, dict[str, str]]] = {}
    keys = ("site", "mesh4", "underlay4", "advertise4", "range4")
    for cluster, document in documents.items():
        for name, entry in document["hosts"].items():
            place = {"cluster": cluster, **{key: entry[key] for key in keys}}
            if "pod_cidrs" in entry:
                place["pods"] = " ".join(entry["pod_cidrs"])
            found.setdefault(entry["site"], {})[name] = place
    return found


def provable(here: Places, pair: Pair) -> bool:
    """Whether there are two hosts between which packets of the pair go."""
    return len(here.get(pair[0], ())) > 1 if pair[0] == pair[1] else all(site in here for site in pair)


def barred(documents: Documents) -> dict[str, str]:
    """Sites of which no pair is native, and why."""
    found: dict[str, str] = {}
    for name, document in sorted(documents.items()):
        if is_in_cluster(document):
            found[document["site"]] = f"nodes of cluster {name}, which Kubernetes alone knows, take nothing else"
        for host, entry in sorted(document["hosts"].items()):
            if entry["advertise4"] != entry["underlay4"]:
                found.setdefault(entry["site"], f"{host} has another isthmus_advertise than isthmus_underlay")
    return found


def words(found: Course) -> str:
    """For the matrix: what was chosen, and when it is proven."""
    if found.now is Stage.DEMANDS:
        return "native was proven, and each run of isthmus.mesh.site proves it again"
    if found.tried:
        begun = f", which was begun before ({found.now.word})" if found.now else ""
        return f"the next run of isthmus.mesh.site tries native{begun}"
    if found.failed:
        return (
            f"{found.failed[0]} did not reach {found.failed[1]} natively; tried again when the two have other hosts, "
            f"or by {AGAIN}"
        )
    return "no two hosts that could prove native"


def told(courses: Mapping[Pair, Course], name: Callable[[Pair], str]) -> Iterator[str]:
    """A line for each pair of which the proofs of a run said something new; `name` of a pair for people."""
    for pair, found in sorted(courses.items()):
        verdict, stage = found.verdict, found.stages[-1]
        if verdict is None or (verdict.works and found.now is Stage.DEMANDS):
            continue
        rest = "" if stage in RESTING else f" It is at the stage `{stage.word}`; the next run goes on from there."
        if verdict.works:
            yield f"{name(pair)}: native (routing: auto), as every host has proven that it reaches the others so.{rest}"
        elif verdict.works is None:
            stays = "it stays native" if stage is Stage.DEMANDS else "native or the tunnel is not decided"
            yield f"Pending: {name(pair)} (routing: auto): {stays}, as {verdict.why}.{rest}"
        else:
            one, other = verdict.hosts
            yield (
                f"{name(pair)}: tunnel (routing: auto), as {one} does not reach {other} natively: {verdict.why}.{rest} "
                f"Next: nothing; or put that right and run {AGAIN}."
            )
