# SPDX-License-Identifier: GPL-3.0-or-later
"""What this agent writes to own etcd: its node, its workloads, and that it is alive.

It reads back what is there and writes what differs, so keys that an etcd lost come back by themselves. After the etcd
went back (a snapshot was restored) it also writes what does not differ, ever more rarely: a registrar that was not
connected meanwhile keeps what it knew of a key until the next write that it sees (`kvstore.store`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol

from isthmus_mesh import keys
from isthmus_mesh.documents import Alive, DocumentError, WorkloadReport

from isthmus_agent.agent.log import fields
from isthmus_agent.kvstore.client import Header, KeyValue, Lease, RangeResult
from isthmus_agent.kvstore.errors import EtcdError, EtcdNotFound
from isthmus_agent.kvstore.tasks import wait_set

logger = logging.getLogger(__name__)

ALIVE_TTL = 10  # seconds
KEEPALIVE = 3.0
LOOK = 5.0  # how often the keys are compared without a reason
BACKOFF = (0.2, 10.0)


class Etcd(Protocol):
    """What the reporter needs of `EtcdClient`."""

    async def get(self, key: str) -> KeyValue | None: ...
    async def range(self, prefix: str) -> RangeResult: ...
    async def put(self, key: str, value: str | bytes, lease: int = 0) -> Header: ...
    async def delete(self, key: str) -> bool: ...
    async def lease_grant(self, ttl: int) -> Lease: ...
    async def lease_keepalive(self, lease: int) -> Lease: ...


class Reporter:
    """Keeps this node's keys as `wanted` says; `wanted` returns None while it is not known yet."""

    def __init__(
        self,
        etcd: Etcd,
        node: str,
        wanted: Callable[[], Mapping[str, str] | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._etcd = etcd
        self._node = node
        self._wanted = wanted
        self._wake = asyncio.Event()
        self.reported: dict[str, WorkloadReport] = {}
        self.known = asyncio.Event()  # set when what was reported before is known
        self.writes = 0
        self._errors: dict[str, str] = {}  # of each job that fails now
        self._seen: RangeResult | None = None
        self._again_at = float("inf")
        self._again_delay = LOOK
        self.last_success: float | None = None  # wall clock

    def wake(self) -> None:
        """Something changed: compare now."""
        self._wake.set()

    @property
    def last_error(self) -> str:
        """Why something cannot be reported now; empty when all is."""
        return "; ".join(text for _, text in sorted(self._errors.items()))

    async def run(self) -> None:
        """Report until cancelled."""
        await _forever(self._look, LOOK, partial(self._note, "reports"), self._wake)

    async def run_alive(self, document: Alive) -> None:
        """Keep `alive/<node>` there until cancelled; it ends by its lease when this process does."""
        lease: Lease | None = None

        async def keep() -> None:
            nonlocal lease
            if lease is not None:
                try:
                    await self._etcd.lease_keepalive(lease.id)
                except EtcdNotFound:
                    lease = None
            if lease is None:
                granted = await self._etcd.lease_grant(ALIVE_TTL)
                await self._etcd.put(keys.alive_key(self._node), document.to_json(), granted.id)
                lease = granted

        await _forever(keep, KEEPALIVE, partial(self._note, "alive"), asyncio.Event())

    def _note(self, job: str, error: EtcdError | None) -> None:
        if error is None:
            self.last_success = time.time()
            self._errors.pop(job, None)
        elif self._errors.get(job) != str(error):
            self._errors[job] = str(error)
            logger.warning("cannot report to etcd", extra=fields(error=str(error)))

    async def _look(self) -> None:
        node_key = keys.node_report_key(self._node)
        prefix = keys.workloads_prefix(self._node)
        found = await self._etcd.range(prefix)
        self._notice_history(found)
        present: dict[str, bytes] = {kv.key: kv.value for kv in found.kvs}
        node = await self._etcd.get(node_key)
        if node is not None:
            present[node_key] = node.value
        self.reported = _workloads(present)
        self.known.set()
        wanted = self._wanted()
        if wanted is None:
            return
        again = self._clock() >= self._again_at
        for key, text in wanted.items():
            if again or present.get(key) != text.encode():
                await self._etcd.put(key, text)
                self.writes += 1
        for key in present:
            if key not in wanted:
                logger.info("workload is no longer declared", extra=fields(key=key))
                await self._etcd.delete(key)
                self.writes += 1
        self.reported = _workloads({key: text.encode() for key, text in wanted.items()})
        if again:
            self._again_at = self._clock() + self._again_delay
            self._again_delay *= 2

    def _notice_history(self, found: RangeResult) -> None:
        before, self._seen = self._seen, found
        if before is None or (
            found.cluster_id == before.cluster_id
            and found.revision >= before.revision
            and found.raft_term >= before.raft_term
        ):
            return
        logger.warning("another etcd answers, reports are written again", extra=fields(revision=found.revision))
        self._again_at, self._again_delay = self._clock(), LOOK


def _workloads(documents: Mapping[str, bytes]) -> dict[str, WorkloadReport]:
    found = {}
    for key, value in documents.items():
        if keys.parse_workload_key(key) is not None:
            try:
                found[key] = WorkloadReport.from_json(value)
            except DocumentError as error:
                logger.warning("own report does not parse, it is written anew", extra=fields(key=key, error=str(error)))
    return found


async def _forever(
    work: Callable[[], Awaitable[None]], interval: float, note: Callable[[EtcdError | None], None], wake: asyncio.Event
) -> None:
    """Do `work` every `interval` seconds and when woken; after an error again with growing delay."""
    delay = BACKOFF[0]
    while True:
        wake.clear()
        try:
            await work()
        except (EtcdError, OSError) as error:
            note(error if isinstance(error, EtcdError) else EtcdError("", "read certificates", str(error)))
            await asyncio.sleep(delay)
            delay = min(delay * 2, BACKOFF[1])
            continue
        delay = BACKOFF[0]
        note(None)
        await wait_set(wake, interval)
