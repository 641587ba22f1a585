# SPDX-License-Identifier: GPL-3.0-or-later
"""Rise and fall of a health check. Pure: results in, readiness out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HealthState:
    """`ready` None: nothing known yet (agent just started, no earlier report)."""

    ready: bool | None = None
    passes: int = 0
    fails: int = 0
    reason: str = ""  # of the last failure, for a person


def step(state: HealthState, passed: bool, rise: int, fall: int, reason: str = "") -> HealthState:
    """The state after one check.

    A backend becomes ready after `rise` passes in a row and not ready after `fall` failures in a row.
    While nothing is known the same counts decide the first verdict, so that a restart of the agent
    reports nothing new before it has as much proof as any change needs.
    """
    if passed:
        passes = state.passes + 1
        ready = True if passes >= max(1, rise) else state.ready
        return HealthState(ready=ready, passes=passes, fails=0)
    fails = state.fails + 1
    ready = False if fails >= max(1, fall) else state.ready
    return HealthState(ready=ready, passes=0, fails=fails, reason=reason)
