# SPDX-License-Identifier: GPL-3.0-or-later
"""Dealing numbers and addresses that never move: each owner has the same as before. Pure.

What is released is not given to another owner for `QUARANTINE`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

QUARANTINE = timedelta(days=30)
"""How long a released number or address is not given to another owner."""
TIME = "%Y-%m-%dT%H:%M:%SZ"
"""Of times in allocations: in the order of their text."""
BY_KUBERNETES, BY_PEERS = "kubernetes", "peers"
"""Who asks for a service's address, in its allocation: a Service of Kubernetes, or peers alone; else a definition."""


@dataclass(frozen=True, slots=True)
class Allocation:
    owner: str
    created: str
    released: str | None
    by: str = ""


class Dealer:
    """Deals the numbers of `pool`, each owner the same as before if it had one. `taken`: all that were ever dealt.

    Fresh numbers come first; one that was released more than `QUARANTINE` ago is dealt anew only when no fresh one is
    left. Of what peers alone ask for (`BY_PEERS`) there are `most` at a time, released ones included.
    """

    def __init__(
        self,
        taken: dict[int, Allocation],
        pool: Iterable[int],
        prefix: str,
        what: str,
        now: str,
        problem: Callable[[str, str], None],
        most: int,
    ) -> None:
        self.taken = taken
        self.now = now
        self._prefix = prefix
        self._what = what
        self._problem = problem
        self._most = most
        self._fresh = iter(pool)
        self._of_owner = {entry.owner: number for number, entry in sorted(taken.items(), reverse=True)}
        self._of_peers = sum(entry.by == BY_PEERS for entry in taken.values())
        self._searched = ""  # the `now` of these two
        self._cutoff = ""
        self._old: list[int] = []

    def owners(self) -> Iterable[str]:
        return self._of_owner.keys()

    def number(self, owner: str) -> int | None:
        """That of `owner`, released or not."""
        return self._of_owner.get(owner)

    def of(self, owner: str) -> Allocation | None:
        number = self._of_owner.get(owner)
        return None if number is None else self.taken[number]

    def settle(self, wanted: Mapping[str, str]) -> dict[str, int]:
        """Give every wanted owner (with who asks for it) its number; mark the others released."""
        for number, entry in list(self.taken.items()):
            if (entry.owner not in wanted or self._of_owner[entry.owner] != number) and entry.released is None:
                self._set(number, replace(entry, released=self.now))
        dealt = {}
        over = []
        for owner, by in sorted(wanted.items()):
            if by == BY_PEERS and owner not in self._of_owner and self._of_peers >= self._most:
                over.append(owner)
            elif (found := self.deal(owner, by)) is not None:
                dealt[owner] = found
        if over:
            self._problem(
                self._prefix + over[0],
                f"{len(over)} services that only peers offer have no {self._what}: such services have all of "
                f"the {self._most} that are for them",
            )
        return dealt

    def deal(self, owner: str, by: str = "") -> int | None:
        """The number of `owner`; None, and a problem, when there is none left."""
        number = self._of_owner.get(owner)
        if number is not None:
            entry = self.taken[number]
            if entry.released is not None or entry.by != by:
                self._set(number, replace(entry, released=None, by=by))
            return number
        if by == BY_PEERS and self._of_peers >= self._most:
            return None
        free = next((candidate for candidate in self._fresh if candidate not in self.taken), None)
        if free is None:
            free = self._expired()
        if free is None:
            self._problem(self._prefix + owner, f"no {self._what} is left in this cluster's range")
            return None
        self._set(free, Allocation(owner, self.now, None, by))
        return free

    def release(self, owner: str) -> None:
        """Mark the number of `owner` released."""
        number = self._of_owner.get(owner)
        if number is not None and self.taken[number].released is None:
            self._set(number, replace(self.taken[number], released=self.now))

    def _set(self, number: int, entry: Allocation) -> None:
        before = self.taken.get(number)
        if before is not None:
            self._of_peers -= before.by == BY_PEERS
            if before.owner != entry.owner and self._of_owner.get(before.owner) == number:
                del self._of_owner[before.owner]
        self._of_peers += entry.by == BY_PEERS
        self.taken[number] = entry
        self._of_owner.setdefault(entry.owner, number)

    def _expired(self) -> int | None:
        """The lowest number that may be dealt anew. They are looked for once for each `now`: owners for whom there is
        none can be many, and the lease of who leads is short."""
        if self._searched != self.now:
            self._searched = self.now
            now = parse_time(self.now)
            self._cutoff = (now - QUARANTINE).strftime(TIME) if now is not None else ""
            self._old = sorted((number for number in self.taken if self._is_old(number)), reverse=True)
        while self._old:
            number = self._old.pop()
            # Its owner may have come back, and a time that cannot be read says nothing.
            if self._is_old(number) and parse_time(self.taken[number].released or "") is not None:
                return number
        return None

    def _is_old(self, number: int) -> bool:
        released = self.taken[number].released
        return released is not None and released < self._cutoff


def parse_time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, TIME)
    except ValueError:
        return None
