# SPDX-License-Identifier: GPL-3.0-or-later
"""Where in the slot arena each service's run of backend ids lies. Pure: no IO, time is passed in."""

from __future__ import annotations

from collections.abc import Collection, Iterable


class ArenaFull(Exception):
    """No free run of the wanted length."""


class Arena:
    """Allocator of runs over [0, size): behind the last run while there is room there, then the first gap
    that fits. A freed run rests for `grace` seconds, because a program that read the old service value may
    still be reading the old slots."""

    def __init__(self, size: int, used: Iterable[tuple[int, int]] = (), grace: float = 1.0) -> None:
        """`used`: (base, count) of runs that are in use."""
        self.size = size
        self.grace = grace
        self._used: dict[int, int] = {base: count for base, count in used if count}
        self._resting: list[tuple[float, int, int]] = []
        self._end = max((base + count for base, count in self._used.items()), default=0)

    @property
    def used(self) -> int:
        """Slots that services hold."""
        return sum(self._used.values())

    def allocate(self, count: int, now: float) -> int:
        """Base of a new run of `count` slots (0 for none), or ArenaFull."""
        if count == 0:
            return 0
        base = self._end if self._end + count <= self.size else self._gap(count, now)
        self._used[base] = count
        self._end = max(self._end, base + count)
        return base

    def _gap(self, count: int, now: float) -> int:
        self._resting = [entry for entry in self._resting if entry[0] > now]
        position = 0
        for base, length in sorted([*self._used.items(), *((base, length) for _, base, length in self._resting)]):
            if base - position >= count:
                return position
            position = max(position, base + length)
        if position + count > self.size:
            raise ArenaFull
        return position

    def keep(self, bases: Collection[int], now: float) -> None:
        """Gives every run back but those that begin at `bases`."""
        for base in [base for base in self._used if base not in bases]:
            self.free(base, now)

    def free(self, base: int, now: float) -> None:
        """Gives a run back; it is dealt again after the grace time."""
        count = self._used.pop(base, 0)
        if count:
            self._resting.append((now + self.grace, base, count))
