# SPDX-License-Identifier: GPL-3.0-or-later
"""The search for what a way carries, and what the agent says of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.desired import path_mtu
from isthmus_agent.desired.path_mtu import SMALL, PathState

FULL = 1450


def probe(state: PathState, carried: int, rounds: int) -> tuple[PathState, list[int]]:
    """What is known after so many probes on a way that carries this, and their sizes."""
    sizes = []
    for _ in range(rounds):
        size = path_mtu.next_size(state)
        sizes.append(size)
        state = path_mtu.step(state, size, size <= carried)
    return state, sizes


def test_a_way_that_carries_all_is_only_looked_at() -> None:
    state = PathState(FULL)
    assert (state.mtu, state.urgent) == (None, False)
    state, sizes = probe(state, FULL, 3)
    assert sizes == [FULL] * 3
    assert (state.mtu, state.lost, state.urgent) == (FULL, 0, False)


def test_one_size_is_lost_only_after_three_in_a_row() -> None:
    state, _ = probe(PathState(FULL), FULL, 1)
    for answered in (False, False, True, False, False):
        state = path_mtu.step(state, FULL, answered)
        assert (state.mtu, state.lost) == (FULL, 0)
    assert state.urgent
    assert path_mtu.step(state, FULL, False).lost == FULL


@given(st.integers(SMALL, FULL - 1), st.integers(SMALL, FULL - 1))
def test_what_a_way_carries_is_found_to_the_byte_however_it_changes(first: int, second: int) -> None:
    state, _ = probe(PathState(FULL), FULL, 1)
    for carried in (first, second):
        state, _ = probe(state, carried, 80)
        assert (state.mtu, state.lost) == (carried, carried + 1)
    state, _ = probe(state, FULL, 7)
    assert (state.mtu, state.lost) == (FULL, 0), "a way that is mended is found by the next packet of full size"
