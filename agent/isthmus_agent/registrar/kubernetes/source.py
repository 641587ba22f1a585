# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps a `Catalog` current: one list and watch for each kind of object, for ever.

A watch that ends goes on where it was; one whose version is gone lists again and then takes the difference. While the
API server is away nothing changes here: what was known stands, and so does what was published of it. Every registrar
follows the API, whether it leads or not, so that a new leader knows at once what the one before knew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from isthmus_mesh.documents import KubernetesStatus
from isthmus_mesh.identity import DEFAULT_FILTER, LabelFilter
from isthmus_mesh.spec import KubernetesApiSpec

from isthmus_agent.agent.log import fields
from isthmus_agent.kvstore.tasks import end

from .catalog import Catalog
from .client import Api, ApiError, Gone
from .objects import KINDS, NAMESPACES, ObjectError, key_of

logger = logging.getLogger(__name__)

MIN_DELAY, MAX_DELAY = 0.2, 10.0
PROBE_INTERVAL = 5.0
PROBE_MISSES = 3
"""After so many probes without an answer, watches that look open are begun anew."""

AT_ONCE = 1.0
"""A watch that ends within so many seconds without an event has failed, and one that stands for as long has not: what
is between here and the server may answer for it, and let no watch stand."""

PATIENCE = 3.0
"""Seconds that a server may refuse everybody: one that starts does not know its rules yet."""

CONNECTED, CONNECTING, ABSENT, REFUSED = "connected", "connecting", "absent", "refused"

_LIST_AGAIN = (400, 404, 504)
"""Answers to a watch that asks for a version which the server does not know (it was restored), or cannot be read."""


class Source:
    """The API server of `spec` as the source of `catalog`; `changed` is set when there is something to take, or when
    the server came or went."""

    def __init__(
        self,
        spec: KubernetesApiSpec,
        estate: str,
        cluster: str,
        changed: asyncio.Event,
        label_filter: LabelFilter = DEFAULT_FILTER,
        *,
        wall: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog = Catalog(cluster, estate, label_filter)
        self.lists = 0
        self._api = Api(spec)
        self._changed = changed
        self._wall = wall
        self._clock = clock
        self._versions: dict[str, str] = {}
        self._errors: dict[str, ApiError] = {}
        self._refused: dict[str, float] = {}  # since when
        self._state, self._since = CONNECTING, wall()
        self._error: str | None = None
        self._silent = asyncio.Event()  # the server does not answer: open watches are not to be believed

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._silent.clear()
                tasks: list[asyncio.Task[Any]] = [
                    asyncio.create_task(self._follow(kind), name=f"kubernetes {kind}") for kind in KINDS
                ]
                tasks.append(asyncio.create_task(self._probe(), name="kubernetes probe"))
                tasks.append(asyncio.create_task(self._silent.wait(), name="kubernetes silence"))
                try:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                finally:
                    await end(tasks)
        finally:
            await self._api.close()

    def status(self) -> KubernetesStatus:
        """How the source stands now."""
        return KubernetesStatus(
            server=self._api.server,
            state=self._state,
            since=self._since,
            error=self._error,
            objects=self.catalog.counts(),
        )

    # --- one kind

    async def _follow(self, kind: str) -> None:
        failures = 0
        while True:
            began = self._clock()
            try:
                if kind not in self._versions:
                    await self._list(kind)
                await self._watch(kind)
                failures = 0
                continue
            except Gone as error:
                logger.info("listing again", extra=fields(kind=kind, reason=str(error)))
                self._versions.pop(kind, None)
            except ApiError as error:
                if error.status in _LIST_AGAIN:
                    self._versions.pop(kind, None)
                self._failed(kind, error)
            if self._clock() - began > MAX_DELAY:
                failures = 0
            delay = min(MAX_DELAY, MIN_DELAY * 2 ** min(failures, 16))
            failures += 1
            await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 - jitter, no secret

    async def _list(self, kind: str) -> None:
        """Everything of `kind`: what is new is taken page by page, what is gone after the last one."""
        seen, more = set(), ""
        while True:
            page = await self._api.page(kind, more)
            for value in page.objects:
                key = self.catalog.put(kind, value)
                if key is not None:
                    seen.add(key)
            more = page.more
            if not more:
                break
        self.catalog.retain(kind, seen)
        self._versions[kind] = page.version
        self.lists += 1
        self._good(kind)
        self._changed.set()

    async def _watch(self, kind: str) -> None:
        began, heard = self._clock(), False
        async with contextlib.AsyncExitStack() as stack:
            watch = self._api.watch(kind, self._versions[kind])
            async for event in await stack.enter_async_context(contextlib.aclosing(watch)):
                if event.type == "OPEN":
                    began = self._clock()
                    self._refused.pop(kind, None)
                    stack.callback(asyncio.get_running_loop().call_later(AT_ONCE, self._good, kind).cancel)
                    continue
                heard = True
                if event.type == "DELETED":
                    with contextlib.suppress(ObjectError):
                        self.catalog.remove(kind, key_of(event.object))
                elif event.type in ("ADDED", "MODIFIED"):
                    self.catalog.put(kind, event.object)
                self._versions[kind] = event.version
                self._good(kind)
                if self.catalog.waiting():
                    self._changed.set()
        if not heard and self._clock() - began < AT_ONCE:
            raise ApiError(
                self._api.server,
                f"watch {kind}",
                "it ended at once and told nothing, so what changes is not seen. Next: see whether a proxy or balancer "
                "before the API server ends requests that last",
            )

    # --- how the server stands

    async def _probe(self) -> None:
        """Ask for next to nothing now and then: a server that hangs leaves its watches open and silent."""
        misses = 0
        while True:
            await asyncio.sleep(PROBE_INTERVAL)
            try:
                await self._api.page(NAMESPACES, limit=1, version="0")
                misses = 0
                self._good("probe")
            except ApiError as error:
                if error.status:  # it answers, and the lists tell what it does not like
                    misses = 0
                    self._good("probe")
                    continue
                misses += 1
                self._failed("probe", error)
                if misses >= PROBE_MISSES:
                    self._silent.set()

    def _good(self, what: str) -> None:
        self._refused.pop(what, None)
        if self._errors.pop(what, None) is not None or self._state == CONNECTING:
            self._judge()

    def _failed(self, what: str, error: ApiError) -> None:
        self._errors[what] = error
        if error.status in (401, 403):
            self._refused.setdefault(what, self._clock())
        else:
            self._refused.pop(what, None)
        self._judge()

    def _judge(self) -> None:
        refused = [self._errors[what] for what, since in self._refused.items() if self._clock() - since >= PATIENCE]
        if refused:
            state, reasons = REFUSED, sorted({str(error) for error in refused})
        elif self._errors:
            state, reasons = ABSENT, sorted({str(error) for error in self._errors.values()})[:1]
        else:
            state, reasons = (CONNECTED if self.catalog.synced else CONNECTING), []
        error = "; ".join(reasons) or None
        if (state, error) == (self._state, self._error):
            return
        if state == REFUSED and error != self._error:
            logger.warning("may not read the Kubernetes API", extra=fields(reason=error))
        elif state == ABSENT != self._state:
            logger.warning("the Kubernetes API is away; what was published stands", extra=fields(reason=error))
        elif state == CONNECTED:
            logger.info("following the Kubernetes API", extra=fields(objects=self.catalog.counts()))
        if state != self._state:
            self._since = self._wall()
        self._state, self._error = state, error
        self._changed.set()
