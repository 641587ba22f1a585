# SPDX-License-Identifier: GPL-3.0-or-later
"""Where in the slot arena each service's run of backend ids lies. Pure: no IO, time is passed in."""

from __future__ import annotations

from collections.abc import Iterable


class ArenaFull(Exception):
    """No free run of the wanted length."""


class Arena:
    """First-fit allocator over [0, size). A freed run rests for `grace` seconds, because a program
    that read the old service value may still be reading the old slots."""

    def __init__(self, size: int, used: Iterable[tuple[int, int]] = (), grace: float = 1.0) -> None:
        self.size = size
        self.grace = grace
        self._used: dict[int, int] = {base: count for base, count in used if count}
        self._resting: list[tuple[float, int, int]] = []

    @property
    def used(self) -> int:
        """Slots that services hold."""
        return sum(self._used.values())

    def allocate(self, count: int, now: float) -> int:
        """Base of a new run of `count` slots (0 for none), or ArenaFull."""
        if count == 0:
            return 0
        self._resting = [entry for entry in self._resting if entry[0] > now]
        taken = sorted([*self._used.items(), *((base, length) for _, base, length in self._resting)])
        position = 0
        for base, length in taken:
            if base - position >= count:
                break
            position = max(position, base + length)
        if position + count > self.size:
            raise ArenaFull
        self._used[position] = count
        return position

    def free(self, base: int, now: float) -> None:
        """Gives a run back; it is dealt again after the grace time."""
        count = self._used.pop(base, 0)
        if count:
            self._resting.append((now + self.grace, base, count))
