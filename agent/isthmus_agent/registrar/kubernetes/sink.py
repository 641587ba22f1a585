# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes into the Kubernetes API what the mesh wants there, as long as its registrar leads.

Each write names the version of the object that it changes, so it changes nothing that was changed meanwhile, and is
made only by a leader that has just proven that it is one. What the API refuses is tried again ever more rarely, and
told; while the API is away nothing is tried but now and then one write.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from isthmus_mesh.spec import KubernetesApiSpec

from isthmus_agent.agent.log import fields
from isthmus_agent.kvstore.tasks import wait_set

from .catalog import Catalog
from .client import Api, ApiError, Conflict, Forbidden
from .objects import SERVICES, ObjectKey
from .wanted import CREATE, DELETE, Mesh, Planner, Step

logger = logging.getLogger(__name__)

TICK = 1.0
DEBOUNCE = 0.02
PACE = 0.02
"""Seconds from one write to the next, at least."""
BATCH = 25
"""Writes after which all is looked at anew."""
PROOF = 0.5
"""Seconds for which a leader's proof counts."""
ECHO = 5.0
"""Seconds that a write has to come back by the watch before it is tried again."""
MIN_DELAY, MAX_DELAY, MAX_DELAY_OF_SERVER = 0.5, 30.0, 5.0
DOUBTS = 4
"""So many refusals in a row are told: of a conflict the watch should have shown by then what it is about, and a server
that starts, which refuses everybody, should know its rules."""

_AWAY = (0, 401, 429, 503, 504)
"""Answers (0: none) that say something of the server and not of the object."""


_Scope = tuple[str, str, ObjectKey]
"""What a failure is about: an object ("", kind, key), a right (verb, kind, nothing), or the server."""
_NOTHING: ObjectKey = ("", "")
_SERVER: _Scope = ("", "", _NOTHING)


def _scopes(step: Step) -> tuple[_Scope, _Scope, _Scope]:
    return _SERVER, (step.verb, step.kind, _NOTHING), ("", step.kind, step.key)


@dataclass
class _Wait:
    failures: int = 0
    until: float = 0.0
    reason: str = ""


class Sink:
    """The API server of `spec`, as a place to write to. `catalog` is what is there. `due` is to be set when `mesh` or
    the catalog changed, `changed` is set when `problems` or `unwritable` did.

    `mesh`: what is wanted; None while that is not known well enough to write anything. `problems`: by object, what
    cannot be written, and why. `unwritable`: services ("<ns>/<name>") that are to be Services, are not, and for now
    cannot become so.
    """

    def __init__(
        self,
        spec: KubernetesApiSpec,
        estate: str,
        cluster: str,
        catalog: Catalog,
        changed: asyncio.Event,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog = catalog
        self.due = asyncio.Event()
        self.mesh: Mesh | None = None
        self.problems: tuple[tuple[str, str], ...] = ()
        self.unwritable: frozenset[str] = frozenset()
        self.writes = 0
        self._api = Api(spec)
        self._planner = Planner(estate, cluster)
        self._changed = changed
        self._clock = clock
        self._waits: dict[_Scope, _Wait] = {}
        self._sent: dict[tuple[str, ObjectKey], tuple[str, float]] = {}
        self._proven = self._next = float("-inf")

    async def run(self, prove: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled, or until `prove`, which raises when this registrar does not lead any more, does so."""
        self._proven = float("-inf")
        try:
            while True:
                if await wait_set(self.due, TICK):
                    await asyncio.sleep(DEBOUNCE)
                self.due.clear()
                if self.mesh is not None and self.catalog.synced:
                    await self._pass(self.mesh, prove)
        finally:
            await self._api.close()

    async def _pass(self, mesh: Mesh, prove: Callable[[], Awaitable[None]]) -> None:
        plan = self._planner.plan(self.catalog, mesh)
        self._forget(plan.steps)
        written = 0
        for step in plan.steps:
            if self._waits_for(step):
                continue
            if written == BATCH:
                self.due.set()
                break
            written += 1
            await self._write(step, prove)
        creating = [step for step in plan.steps if (step.verb, step.kind) == (CREATE, SERVICES)]
        failed = {step.key for step in creating if any(scope in self._waits for scope in _scopes(step))}
        self._tell(plan.problems, failed)

    async def _write(self, step: Step, prove: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(max(0.0, self._next - self._clock()))
        if self._clock() - self._proven >= PROOF:
            await prove()
            self._proven = self._clock()
        self._next = self._clock() + PACE
        server, right, this = _scopes(step)
        try:
            if step.verb == CREATE:
                await self._api.create(step.kind, step.key[0], step.body)
            elif step.verb == DELETE:
                await self._api.delete(step.kind, step.key, step.version)
            else:
                await self._api.patch(step.kind, step.key, step.body, step.version)
        except ApiError as error:
            if isinstance(error, Forbidden):
                self._fails(right, str(error), DOUBTS)
            elif error.status in _AWAY:
                self._fails(server)  # the source tells of that
            else:
                self._fails(this, str(error), DOUBTS if isinstance(error, Conflict) else 1)
            return
        self.writes += 1
        for scope in (server, right, this):
            self._waits.pop(scope, None)
        self._sent[step.kind, step.key] = (step.version, self._clock() + ECHO)
        logger.info("wrote to Kubernetes", extra=fields(verb=step.verb, kind=step.kind, object="/".join(step.key)))

    def _fails(self, scope: _Scope, reason: str = "", times: int = 1) -> None:
        """Wait longer each time; `reason` is told from so many `times` on."""
        wait = self._waits.setdefault(scope, _Wait())
        longest = MAX_DELAY_OF_SERVER if scope == _SERVER else MAX_DELAY
        wait.until = self._clock() + min(longest, MIN_DELAY * 2 ** min(wait.failures, 16))
        wait.failures += 1
        wait.reason = reason if wait.failures >= times else ""

    def _waits_for(self, step: Step) -> bool:
        """Whether a step is not to be taken now: it failed a moment ago, or was taken and is not seen yet."""
        now = self._clock()
        if any(scope in self._waits and now < self._waits[scope].until for scope in _scopes(step)):
            return True
        sent = self._sent.get((step.kind, step.key))
        return sent is not None and sent[0] == step.version and now < sent[1]

    def _forget(self, steps: list[Step]) -> None:
        """What nothing is to be done about any more needs no memory."""
        needed = {scope for step in steps for scope in _scopes(step)}
        self._waits = {scope: wait for scope, wait in self._waits.items() if scope in needed}
        present = {(step.kind, step.key) for step in steps}
        self._sent = {one: sent for one, sent in self._sent.items() if one in present}

    def _tell(self, problems: dict[ObjectKey, str], failed: set[ObjectKey]) -> None:
        told = {f"kubernetes {SERVICES} {'/'.join(key)}": reason for key, reason in problems.items()}
        for (_, kind, where), wait in self._waits.items():
            if wait.reason:
                told[f"kubernetes {kind} {'/'.join(filter(None, where))}".rstrip()] = wait.reason
        found = tuple(sorted(told.items()))
        unwritable = frozenset("/".join(key) for key in {*problems, *failed})
        for key, reason in sorted(set(found) - set(self.problems)):
            logger.warning("cannot be written to Kubernetes", extra=fields(key=key, reason=reason))
        if (found, unwritable) != (self.problems, self.unwritable):
            self.problems, self.unwritable = found, unwritable
            self._changed.set()
