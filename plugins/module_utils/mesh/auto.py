# SPDX-License-Identifier: BSD-2-Clause
"""Pairs of sites that find out by themselves how packets go between them (`routing: auto`): natively where all of their
hosts have proven that they reach each other so, else through the tunnel. Pure.

A run of `site` leads such a pair through the stages of native routing (routing.py), one in each of its steps. Before
each step the hosts prove what they can: at ACCEPTS and SENDS, where both ways are taken, the verdict leads the pair one
stage on or one back; at PLAIN and DEMANDS it rests. At DEMANDS it is proven again by each run, before anything is
changed. A pair that came back to PLAIN stays there, as the roster says between which hosts it failed, until it has
other hosts, its encryption changes or somebody asks for another try: a run that has nothing new to try changes nothing.

Where WireGuard encrypts all of that is inside it: what is proven then is not the network, which sees WireGuard only,
but that WireGuard, and what filters on its devices, lets native packets through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .encryption import Pair, Stage, way
from .openings import Documents, is_in_cluster

TRIAL = 3
"""The most steps that a pair is tried in after the first of them, each with its proof: from a new host that is not
reached natively by all of the old ones, and so from DEMANDS, it is three steps back to PLAIN."""

LAST = 5
"""The number of a run's last step, and of the proof before it: from native in clear it is three to the tunnel inside
WireGuard, and three more to native inside WireGuard."""

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
    come through. `verdict` is the last one. `begins` is the number of the first step that the pair chooses, after those
    that lead it to where it may; native packets are `inside` WireGuard or in clear."""

    now: Stage | None
    stages: tuple[Stage, ...]
    proofs: tuple[int, ...] = ()
    failed: tuple[str, ...] = ()
    verdict: Verdict | None = None
    begins: int = 0
    inside: bool = False

    @property
    def stands(self) -> bool:
        """Whether it is native, and stays so while no proof says otherwise."""
        return self.now is Stage.DEMANDS and not self.begins

    @property
    def tried(self) -> bool:
        """Whether it is not known yet which way it goes."""
        return not self.stands and bool(self.proofs)

    def failed_at(self, number: int) -> tuple[str, ...]:
        """`failed`, as it is known when a step is taken."""
        return self.failed if number >= len(self.stages) - 1 else ()

    @property
    def joined(self) -> bool:
        """Whether it is native, and hosts that have come have still to prove it."""
        return self.stages[0] is Stage.DEMANDS and 1 in self.proofs


def course(
    now: Stage | None,
    failed: Sequence[str],
    changed: bool,
    proofs: Proofs,
    pair: Pair,
    before: Sequence[Stage] = (),
    inside: bool = False,
) -> Course:
    """`failed` as the roster has it, empty when the pair is to be tried again; `changed`: it has other hosts than the
    record knows; `before`: the stages that lead it to PLAIN, from where it is tried anew. Where nobody knows, the pair
    stays, and is proven again before a step that others take."""
    part: list[int] = []
    verdict: Verdict | None = None

    def proven(number: int) -> Verdict | None:
        part.append(number)
        return proofs[number].get(pair) if number < len(proofs) else None

    begins = len(before)
    stage = Stage.PLAIN if before else now or Stage.PLAIN
    if stage is Stage.DEMANDS:
        verdict = proven(0)
        if verdict is not None and verdict.works is False:
            stage = Stage.SENDS
    elif stage is Stage.PLAIN and (changed or not failed):
        stage = Stage.ACCEPTS
    stages, joined = [*before, stage], stage is Stage.DEMANDS and changed
    for number in range(begins + 1, min(begins + TRIAL, LAST) + 1):
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
    return Course(now, tuple(stages), tuple(part), tuple(between), verdict, begins, inside)


def resting(now: Stage | None, before: Sequence[Stage] = (), inside: bool = False) -> Course:
    """Of a pair that has too few hosts to prove anything; `before` and `inside` as of `course`."""
    stages = before or way(now, Stage.DEMANDS if now is Stage.DEMANDS else Stage.PLAIN)
    return Course(now, tuple(stages), begins=len(before), inside=inside)


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


def barred(documents: Documents, inside: bool) -> dict[str, str]:
    """Sites of which no pair is native, `inside` WireGuard or in clear, and why."""
    found: dict[str, str] = {}
    for name, document in sorted(documents.items()):
        if is_in_cluster(document):
            found[document["site"]] = f"nodes of cluster {name}, which Kubernetes alone knows, take nothing else"
        for host, entry in sorted(document["hosts"].items()):
            if entry["advertise4"] != entry["underlay4"] and not inside:
                found.setdefault(entry["site"], f"{host} has another isthmus_advertise than isthmus_underlay")
    return found


def words(found: Course) -> str:
    """For the matrix: what was chosen, and when it is proven."""
    if found.stands:
        return "native was proven, and each run of isthmus.mesh.site proves it again"
    if found.tried:
        begun = f", which was begun before ({found.now.word})" if found.now and not found.begins else ""
        later = f", from step {found.begins + 1} on" if found.begins else ""
        return f"the next run of isthmus.mesh.site tries native{_inside(found)}{begun}{later}"
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
        if verdict is None or (verdict.works and found.stands):
            continue
        inside = _inside(found)
        rest = "" if stage in RESTING else f" It is at the stage `{stage.word}`; the next run goes on from there."
        if verdict.works:
            yield (
                f"{name(pair)}: native{inside} (routing: auto), as every host has proven that it reaches the others "
                f"so.{rest}"
            )
        elif verdict.works is None:
            stays = "it stays native" if stage is Stage.DEMANDS else "native or the tunnel is not decided"
            yield f"Pending: {name(pair)} (routing: auto): {stays}, as {verdict.why}.{rest}"
        else:
            one, other = verdict.hosts
            right = "put that right"
            if found.inside:
                right = (
                    "have the hosts' firewalls let packets between the ranges of workloads in on WireGuard's devices "
                    "(docs/ports.md)"
                )
            yield (
                f"{name(pair)}: tunnel{inside} (routing: auto), as {one} does not reach {other} natively{inside}: "
                f"{verdict.why}.{rest} Next: nothing; or {right} and run {AGAIN}."
            )


def _inside(found: Course) -> str:
    return " inside WireGuard" if found.inside else ""
