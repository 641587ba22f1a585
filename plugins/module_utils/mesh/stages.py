# SPDX-License-Identifier: BSD-2-Clause
"""What is turned on or off, replaced or tried in stages: encryption, native routing and the gateways' tunnels of pairs
of sites, and the keys of WireGuard. From where the record has them to what the inventory says, step by step. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple, Optional

from . import auto, encryption
from .encryption import Keys, Pair, Stage
from .ipsec import GATEWAY
from .model import Encryption, Model
from .openings import Documents
from .routing import AUTO, Routing
from .schema import Problem

Ways = Mapping[Pair, tuple[Optional[Stage], list[Stage]]]
"""Of each pair of sites the stage where it is, None where no traffic is yet, and those that it goes through, step by
step; the last one stands."""


@dataclass(frozen=True)
class State:
    """Stages of encryption, of native routing and of the gateways' tunnels of each pair of sites, and the keys of
    WireGuard. `failed`: pairs with `routing: auto` that are in the tunnel, as native failed between two hosts."""

    encryption: Mapping[Pair, Stage]
    native: Mapping[Pair, Stage]
    gateways: Mapping[Pair, Stage]
    keys: Keys
    failed: Mapping[Pair, tuple[str, ...]] = field(default_factory=dict)

    @property
    def staged(self) -> tuple[Mapping[Pair, Stage], ...]:
        """In the order of `encryption.STAGED`."""
        return self.encryption, self.native, self.gateways

    def documents(self) -> dict[str, Any]:
        """As the roster has them."""
        found = {key: encryption.to_document(stages) for key, stages in zip(encryption.STAGED, self.staged)}
        found["encryption"] = encryption.to_document(self.encryption, self.keys)
        found["auto"] = {" ".join(pair): list(hosts) for pair, hosts in sorted(self.failed.items())}
        return {key: value for key, value in found.items() if value}


_MOST_JUMPS = 3
"""Pairs of hosts that a warning names."""


class Stages:
    """Of an estate: `roster` and the `known` clusters are those of the record, the `present` ones are those of the
    next. `problems` and `warnings` are what was found to say.

    `heard` are the sites that hosts know from their specs, `origins` where hosts come from. `ways` are in the order of
    `encryption.STAGED`, nothing where nothing is staged and nothing was; `keys` are those of
    the record and of the steps. `states` are what is so after each step, `running` what is so before. `courses` are
    those of pairs that find out how packets go between them, `trials` what is to be proven for that, by the number of
    the proof, `chosen` what the matrix says of them: whether they are to be tried, and words."""

    def __init__(
        self,
        model: Model,
        roster: Mapping[str, Any],
        known: Documents,
        present: Documents,
        rotate: bool,
        try_native: bool,
        proofs: auto.Proofs,
    ) -> None:
        self.model = model
        self.roster = roster
        self.known = known
        self.present = present
        self.places, self.places_before = auto.places(present), auto.places(known)
        self.heard = sites_of(known).union(roster.get("empty", ()))
        self.origins = origins(known, present)
        self.jumps: dict[tuple[str, str], list[str]] = {}
        self.try_native = try_native
        self.proofs = proofs
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.courses: dict[Pair, auto.Course] = {}
        self.chosen: dict[Pair, tuple[bool, str]] = {}
        encrypted, routed, led = self.encryption_ways(), self.routing_ways(), self.gateway_ways()
        self.ways: tuple[Ways, ...] = _in_turn(encrypted, self.native_ways(encrypted, routed, led), led, self.courses)
        self.warnings += self.told_of_jumps()
        self.keys = self.key_ways(self.ways[0], rotate)
        states = _states(self.ways, self.keys[1:])
        self.states = [self.with_failed(number, state) for number, state in enumerate(states)]
        self.problems += self.bared()
        self.running = state_of(roster, sites_of(known))
        self.trials = tuple(tuple(self.trials_of(number)) for number in range(auto.LAST + 1))

    def encryption_ways(self) -> Ways:
        wanted = self.model.encryption
        return self.ways_of(
            "encryption",
            None
            if wanted == Encryption()
            else lambda pair: Stage.DEMANDS if wanted.wants_wireguard(pair) else Stage.PLAIN,
        )

    def routing_ways(self) -> Ways:
        """Of native routing, but for what pairs choose."""
        wanted = self.model.routing
        return self.ways_of("routing", None if wanted == Routing() else wanted.stage)

    def native_ways(self, encrypted: Ways, found: Ways, gateways: Ways) -> Ways:
        wanted = self.model.routing
        barred = {inside: auto.barred(self.present, inside) for inside in (False, True)}
        for pair, (now, _stages) in found.items():
            if wanted.of(pair) != AUTO:
                continue
            inside = self.model.encryption.wants_wireguard(pair)
            reasons = [barred[inside][site] for site in pair if site in barred[inside]]
            if self.model.encryption.of(pair) == GATEWAY:
                reasons = ["what goes from gateway to gateway has the tunnel inside it"]
            if reasons:
                self.chosen[pair] = False, f"tunnel, as {reasons[0]}"
                continue
            before = _before(encrypted, found, gateways, pair, inside)
            is_encrypted, stages = encrypted.get(pair, (None, []))
            turned = is_encrypted is not None and is_encrypted is not stages[-1]
            was = now or Stage.PLAIN if before else now
            self.courses[pair] = self.course(pair, was, before, inside, turned)
        self.chosen.update({pair: (one.tried, auto.words(one)) for pair, one in self.courses.items()})
        return {**found, **{pair: (one.now, list(one.stages)) for pair, one in self.courses.items()}}

    def gateway_ways(self) -> Ways:
        wanted = self.model.ipsec
        found = self.ways_of("ipsec", wanted.stage if wanted.pairs else None)
        for both, (now, _stages) in found.items():
            for site, other in (both, both[::-1]):
                if now and site not in wanted.sites and site in self.model.sites:
                    self.problems.append(
                        Problem(
                            f"isthmus_estate.sites.{site}.ipsec",
                            f"it is missing, and the tunnel between the gateways of {site} and {other} is there",
                            "gateways and hosts are led back in steps, which need what they were made from",
                            "put it back, and take it out after a run of site without encryption: ipsec-gateway for "
                            "the pair",
                        )
                    )
        return found

    def ways_of(self, key: str, wanted: Callable[[Pair], Stage] | None) -> Ways:
        """`key` of the roster has what is; `wanted` None: PLAIN everywhere."""
        old = self.roster.get(key)
        if old is None and wanted is None:
            return {}
        here, there = sites_of(self.known), sites_of(self.present)
        known = encryption.from_document(old, self.heard)
        found = {}
        for pair in encryption.pairs({*there, *self.model.sites}):
            now = None
            if there.issuperset(pair):
                now = known.get(pair, Stage.PLAIN) if here.issuperset(pair) else self.inherited(key, pair, known)
            stages = encryption.way(now, Stage.PLAIN if wanted is None else wanted(pair))
            found[pair] = now, stages
            for move in self.moves(pair):
                held = known.get(move.before, Stage.PLAIN)
                if key == "ipsec":  # hosts are told apart there by their addresses
                    jumps = move.before != pair and (held, stages[0] if now is None else now) != (Stage.PLAIN,) * 2
                else:
                    taken = {self.taken_for(key, known, sites) for sites in move.seen}
                    jumps = {held, *taken} != {stages[0] if now is None else now}
                if jumps:
                    self.jumps.setdefault(move.hosts, []).append(key)
        return found

    def moves(self, pair: Pair) -> Iterator[Move]:
        """Of hosts of a pair that were at other sites, or seem so, two for each two of those sites."""
        one, other = (self.origins.get(site, {}) for site in pair)
        two = combinations_with_replacement(one, 2) if pair[0] == pair[1] else product(one, other)
        for origin, another in two:
            hosts = one[origin][0], other[another][-1]
            seen = (origin.site, another.seen), (another.site, origin.seen)
            move = Move(hosts, encryption.pair(origin.site, another.site), seen)
            if hosts[0] != hosts[1] and {move.before, *(encryption.pair(*sites) for sites in seen)} != {pair}:
                yield move

    def inherited(self, key: str, pair: Pair, known: Mapping[Pair, Stage]) -> Stage | None:
        """Where a pair is that the record does not have, as its hosts were in other sites: where all of them are. What
        is made for a site, gateways and a proof of its hosts, does not come with hosts."""
        found = {known.get(move.before, Stage.PLAIN) for move in self.moves(pair)}
        if len(found) != 1:
            return None
        (stage,) = found
        stays = key == "ipsec" or (key == "routing" and self.model.routing.of(pair) == AUTO)
        return None if stays and stage is not Stage.PLAIN else stage

    def taken_for(self, key: str, known: Mapping[Pair, Stage], sites: tuple[str, str]) -> Stage:
        """The stage at which a host of the first of two sites is with one of the second until it has its turn, where
        the record has the stages `known`. A site of which it has not heard is one with the tunnel, and, where it has
        WireGuard at all, with that."""
        if sites[1] in self.heard:
            return known.get(encryption.pair(*sites), Stage.PLAIN)
        encrypts = key == "encryption" and any(stage for pair, stage in known.items() if sites[0] in pair)
        return Stage.DEMANDS if encrypts else Stage.PLAIN

    def bared(self) -> Iterator[Problem]:
        """Of hosts that move and whose packets are encrypted, and are to be, those that would be sent in clear until
        all hosts have had their turn."""
        encrypted, led = (encryption.from_document(self.roster.get(key), self.heard) for key in ("encryption", "ipsec"))
        found = []
        for pair in encryption.pairs(self.origins):
            if self.model.encryption.of(pair) != GATEWAY and not self.model.encryption.wants_wireguard(pair):
                continue
            stages = [max(ways.get(pair, Stage.PLAIN) for ways in state.staged[::2]) for state in self.states]
            for move in self.moves(pair):
                taken: list[Stage] = []
                if led.get(move.before) is not Stage.DEMANDS:
                    if encrypted.get(move.before) is not Stage.DEMANDS:
                        continue
                    taken = [self.taken_for("encryption", encrypted, sites) for sites in move.seen]
                if min([*stages, *taken]) < Stage.SENDS:
                    found.append(" and ".join(move.hosts))
        if found:
            yield Problem(
                "isthmus_site",
                f"packets between {_listed(sorted(found))} are and will be encrypted, and would go in clear meanwhile",
                "to hosts that had not their turn yet those that move are at once of the other site, and what there is "
                "with that, or is turned on in steps, is in clear",
                "set `encryption: wireguard` for all pairs of the sites that they leave and come to, run "
                "isthmus.mesh.site, and move the hosts by a run after that",
            )

    def told_of_jumps(self) -> Iterator[str]:
        if not self.jumps:
            return
        lines = [
            f"{' and '.join(hosts)} ({', '.join('gateways' if key == 'ipsec' else key for key in keys)})"
            for hosts, keys in sorted(self.jumps.items())
        ]
        yield (
            "hosts move to another site, and are at once what the pair of sites that they are of then is, not in "
            f"steps, so that connections may break while the run makes it so: {_listed(lines)}. "
            "Next: if they must not, give the pairs of the old and of the new site the same routing and encryption "
            "first, run isthmus.mesh.site, and move the hosts by a run after that"
        )

    def key_ways(self, ways: Ways, rotate: bool) -> tuple[Keys, ...]:
        """Which keys the record has, and those that this run goes through from there. They stay as they are while
        encryption of a pair is turned on or off."""
        now = encryption.keys_of(self.roster.get("encryption"))
        if not any(stages[-1] for _now, stages in ways.values()):
            if rotate:
                self.problems.append(
                    Problem(
                        "isthmus.mesh.rotate_wireguard_keys",
                        "no pair of sites of the inventory is encrypted by WireGuard",
                        "there are no keys to be replaced",
                        "say `encryption: wireguard` in the inventory first, if that is meant",
                    )
                )
            return now, now
        changing = any(now_of not in (None, stages[-1]) for now_of, stages in ways.values())
        if changing or all(now_of in (None, Stage.PLAIN) for now_of, _stages in ways.values()):
            if rotate or (changing and now.has_both):
                self.warnings.append(
                    "the keys of WireGuard are not replaced by this run, which turns encryption on or off. Next: run "
                    "isthmus.mesh.rotate_wireguard_keys when that is done"
                )
            return now, now
        return now, *encryption.rotation(now, rotate)

    # Pairs that find out how packets go between them

    def course(self, pair: Pair, now: Stage | None, before: Sequence[Stage], inside: bool, turned: bool) -> auto.Course:
        """`turned`: its encryption is, so that what failed before says nothing."""
        if not auto.provable(self.places, pair):
            return auto.resting(now, before, inside)
        again = self.try_native or turned
        failed = () if again else self.roster.get("auto", {}).get(" ".join(pair), ())
        changed = any(self.places.get(site) != self.places_before.get(site) for site in pair)
        return auto.course(now, failed, changed, self.proofs, pair, before, inside)

    def trials_of(self, number: int) -> Iterator[dict[str, Any]]:
        """Hosts that join have no part before the first step."""
        for pair, one in self.courses.items():
            if number in one.proofs:
                hosts = {
                    name: {key: host[key] for key in ("cluster", "site", "mesh4")}
                    for site in pair
                    for name, host in self.places[site].items()
                    if number or name in self.places_before.get(site, ())
                }
                yield {"sites": list(pair), "hosts": {name: hosts[name] for name in sorted(hosts)}}

    def with_failed(self, number: int, state: State) -> State:
        """After the step of a number."""
        failed = {pair: one.failed_at(number) for pair, one in self.courses.items() if one.failed_at(number)}
        return replace(state, failed=failed)

    @property
    def possible(self) -> list[State]:
        """Where the first step may have to lead on to, for what must be open before it: a host joins a pair that is
        native, and may not reach it so."""
        joined = {pair: Stage.ACCEPTS for pair, one in self.courses.items() if one.joined}
        return [replace(self.states[0], native={**self.states[0].native, **joined})] if joined else []


class Origin(NamedTuple):
    """The `site` where a host was, and the one at which those see it that have not had their turn in the run."""

    site: str
    seen: str


@dataclass(frozen=True)
class Move:
    """Two `hosts`, the pair of sites of which they were `before`, and what each of them sees until it has its turn: its
    own site, and that of the other."""

    hosts: tuple[str, str]
    before: Pair
    seen: tuple[tuple[str, str], tuple[str, str]]


def origins(known: Documents, present: Documents) -> dict[str, dict[Origin, list[str]]]:
    """By site from where its hosts come, and which do, without hosts that are new. Where a host is at another site than
    its cluster, or is behind an address translation, its site is published with the record, before any host has its
    turn; where not, each host has the site of the cluster from its spec."""
    came_from = {name: entry["site"] for document in known.values() for name, entry in document["hosts"].items()}
    found: dict[str, dict[Origin, list[str]]] = {}
    for cluster, document in present.items():
        for name, entry in sorted(document["hosts"].items()):
            if name in came_from:
                site = entry["site"]
                told = site != document["site"] or entry["underlay4"] != entry["advertise4"]
                seen = site if told else known.get(cluster, document)["site"]
                found.setdefault(site, {}).setdefault(Origin(came_from[name], seen), []).append(name)
    return found


def _listed(found: Sequence[str]) -> str:
    more = f" and {len(found) - _MOST_JUMPS} more" if len(found) > _MOST_JUMPS else ""
    return "; ".join(found[:_MOST_JUMPS]) + more


def _is_inside(encrypted: Ways, native: Ways, pair: Pair) -> bool:
    """Whether a pair is native inside WireGuard, or on the way to that or from it."""
    now = encrypted.get(pair, (None, []))[0]
    return now is Stage.DEMANDS and native.get(pair, (None, []))[0] not in (None, Stage.PLAIN)


def _before(encrypted: Ways, native: Ways, gateways: Ways, pair: Pair, inside: bool) -> list[Stage]:
    """The stages of native routing that lead a running pair to PLAIN before it may be turned on, `inside` WireGuard or
    not, so that at none of its stages inside anything goes in clear; none where it goes on from where it is. A pair of
    hosts that became a site may have brought its encryption alone."""
    is_encrypted, is_native = encrypted.get(pair, (None, []))[0], native[pair][0] or Stage.PLAIN
    if is_encrypted is None or _is_inside(encrypted, native, pair) is inside:
        return []
    back = encryption.way(is_native, Stage.PLAIN)
    if not inside:
        return back
    others = [ways[pair] for ways in (encrypted, gateways) if pair in ways]
    first = max(len(stages) if stages != [now] else 0 for now, stages in [*others, (is_native, back)])
    return [*back, *(Stage.PLAIN for _number in range(len(back), first))][:first]


def _in_turn(encrypted: Ways, native: Ways, gateways: Ways, courses: Collection[Pair]) -> tuple[Ways, ...]:
    """Native inside WireGuard is turned on and off while WireGuard is demanded and nothing else changes: other changes
    of such a pair come before, to the tunnel inside WireGuard, or after, from there. Pairs that have `courses` are led
    so by these."""
    found = dict(encrypted), dict(native), dict(gateways)
    for pair in encrypted.keys() & native.keys():
        is_native, stages = native[pair]
        chooses = pair in courses
        inside = encrypted[pair][1][-1] is Stage.DEMANDS and (chooses or stages[-1] is Stage.DEMANDS)
        before = _before(encrypted, native, gateways, pair, inside)
        if before and not chooses:
            after = encryption.way(Stage.PLAIN, stages[-1]) if stages[-1] else []
            found[1][pair] = is_native, [*before, *after]
        if not before or inside:
            continue
        for ways in (found[0], found[2]):
            now, following = ways.get(pair, (Stage.PLAIN, [Stage.PLAIN]))
            if following != [now]:
                ways[pair] = now, [*(now or Stage.PLAIN for _stage in before), *following]
    return found


def begun(site: str, ways: Ways) -> list[Pair]:
    """Pairs of a site for which something else than PLAIN is, or is being turned on or off."""
    return [pair for pair, (now, stages) in ways.items() if site in pair and any((now, *stages))]


def changed(last: Mapping[Pair, Stage], now: Mapping[Pair, Stage]) -> dict[Pair, Stage]:
    return {pair: stage for pair, stage in now.items() if stage is not last[pair]}


def state_of(roster: Mapping[str, Any], sites: Iterable[str]) -> State:
    encrypted, native, gateways = (encryption.from_document(roster.get(key), sites) for key in encryption.STAGED)
    return State(encrypted, native, gateways, encryption.keys_of(roster.get("encryption")))


def sites_of(documents: Documents) -> set[str]:
    """The sites that have hosts."""
    return {entry["site"] for doc in documents.values() for entry in doc["hosts"].values()}


def hosts_of(documents: Documents, pairs: Iterable[Pair]) -> list[str]:
    sites = {site for pair in pairs for site in pair}
    return sorted(name for doc in documents.values() for name, entry in doc["hosts"].items() if entry["site"] in sites)


def _states(ways: Iterable[Ways], keys: tuple[Keys, ...]) -> list[State]:
    """What is so after each step. What has come to its end before the others stands."""
    each = list(ways)

    def after(number: int, found: Ways) -> dict[Pair, Stage]:
        return {pair: stages[min(number, len(stages) - 1)] for pair, (_now, stages) in found.items()}

    lengths = [len(stages) for found in each for _now, stages in found.values()]
    states = []
    for number in range(max([*lengths, len(keys)])):
        encrypted, native, gateways = (after(number, found) for found in each)
        states.append(State(encrypted, native, gateways, keys[min(number, len(keys) - 1)]))
    return states
