# SPDX-License-Identifier: GPL-3.0-or-later
"""What the way to a node carries, found by packets that must not be fragmented. Pure; sizes are bytes of IPv4 packets.

The kernel learns a smaller MTU only from a router that tells it, and many do not. Here a size is too large when packets
of it are lost while small ones pass (as RFC 8899 has it), and the largest that passes is searched for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SMALL = 36
"""Bytes of the echoes by which it is found out who answers at all."""
LOST_AFTER = 3  # misses in a row


@dataclass(frozen=True, slots=True)
class PathState:
    """`full` is the MTU of the routes to the node. `carried`: the largest size that was answered. `lost`: the smallest
    that is too large, 0: none. `asked`: the size of the probe that was judged last, `misses` of it in a row."""

    full: int
    carried: int = SMALL
    lost: int = 0
    asked: int = 0
    misses: int = 0

    @property
    def mtu(self) -> int | None:
        """What the way carries, at most `full`; None while that is not known."""
        if self.carried == self.full or (self.lost and self.lost - self.carried == 1):
            return self.carried
        return None

    @property
    def urgent(self) -> bool:
        """The next probe brings an answer nearer; else it only looks whether all is as it was."""
        return bool(self.misses) or (self.mtu is None and bool(self.lost))


def next_size(state: PathState) -> int:
    """Of the next probe."""
    if state.misses:
        return state.asked
    if not state.lost:
        return state.full
    if state.mtu is None:
        return (state.carried + state.lost) // 2
    # In turn: whether the way is mended, whether it carries more than it did, and whether still as much.
    if state.asked == state.carried:
        return state.full
    return state.lost if state.asked == state.full != state.lost else state.carried


def step(state: PathState, size: int, answered: bool) -> PathState:
    """The state after a probe of this size; one counts as not answered only when a small one was answered meanwhile."""
    if answered:
        lost = state.lost if size < state.lost else 0
        return replace(state, carried=max(state.carried, size), lost=lost, asked=size, misses=0)
    misses = state.misses + 1 if size == state.asked else 1
    if misses < LOST_AFTER:
        return replace(state, asked=size, misses=misses)
    lost = min(state.lost or size, size)
    return replace(state, carried=SMALL if lost <= state.carried else state.carried, lost=lost, asked=size, misses=0)
