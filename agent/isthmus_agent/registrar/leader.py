# SPDX-License-Identifier: GPL-3.0-or-later
"""One leader per cluster by an etcd lease, and writes that only the leader can do.

The leader's key carries a lease of 3 s. Whoever creates it leads until it is gone; the revision at which it was
created identifies the term of office. Every write is a transaction that compares that revision, so a leader that was
paused beyond its lease cannot write any more, whatever it believes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus_mesh import keys

from isthmus_agent.agent.log import fields
from isthmus_agent.kvstore import Compare, Delete, EtcdClient, EtcdError, EtcdNotFound, Get, Header, Operation, Put

from .publish import Change

logger = logging.getLogger(__name__)

LEASE_TTL = 3
KEEPALIVE_INTERVAL = 0.8
POLL_INTERVAL = 0.5
MAX_OPERATIONS = 100
"""etcd's own limit is 128 operations in a transaction (`--max-txn-ops`)."""
MAX_BYTES = 512 * 1024
"""etcd's own limit is 1.5 MiB for a request (`--max-request-bytes`)."""


class NotLeader(Exception):
    """Another registrar leads, or nobody: stop writing."""


@dataclass(frozen=True, slots=True)
class Term:
    """A term of office: the lease behind the leader's key and the revision that created the key."""

    lease: int
    create_revision: int
    header: Header


class Election:
    """Campaigns for `isthmus/v1/leader` and keeps it."""

    def __init__(
        self, client: EtcdClient, host: str, holder: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.client = client
        self.host = host
        self.holder = holder
        self._clock = clock

    async def campaign(self, since: Callable[[], str]) -> Term:
        """Return when this registrar leads. `since` gives the present time as RFC 3339."""
        told = ""
        while True:
            try:
                term = await self._try(since())
            except (EtcdError, OSError) as error:  # OSError: certificate files that cannot be read
                if told != str(error):
                    told = str(error)
                    logger.warning("cannot campaign", extra=fields(error=told))
                term = None
            if term is not None:
                logger.info("leading", extra=fields(revision=term.create_revision, lease=f"{term.lease:016x}"))
                return term
            # Asking is as quick as watching, and a member that died silently costs one timeout instead of a hung watch.
            await asyncio.sleep(POLL_INTERVAL)

    async def _try(self, since: str) -> Term | None:
        if await self.client.get(keys.LEADER) is not None:
            return None
        lease = await self.client.lease_grant(LEASE_TTL)
        value = json.dumps({"holder": self.holder, "host": self.host, "since": since})
        absent = Compare(keys.LEADER, "create", "=", 0)
        result = await self.client.txn([absent], [Put(keys.LEADER, value, lease.id), Get(keys.LEADER)])
        created = result.responses[1] if result.succeeded else None
        if not isinstance(created, tuple):
            await self.client.lease_revoke(lease.id)
            return None
        return Term(lease.id, created[0].create_revision, result.header)

    async def keep(self, term: Term) -> None:
        """Renew the lease until it is lost (NotLeader): expired, or not renewed for as long as it lasts."""
        renewed = self._clock()
        while True:
            await asyncio.sleep(KEEPALIVE_INTERVAL)
            try:
                await self.client.lease_keepalive(term.lease)
                renewed = self._clock()
            except EtcdNotFound:
                raise NotLeader("the lease has expired") from None
            except (EtcdError, OSError) as error:
                if self._clock() - renewed >= LEASE_TTL:
                    raise NotLeader(f"the lease was not renewed for {LEASE_TTL} s: {error}") from None

    async def resign(self, term: Term) -> None:
        """Give the leadership back at once; what fails is left to the lease."""
        try:
            await self.client.lease_revoke(term.lease)
        except EtcdNotFound:
            return
        except (EtcdError, OSError) as error:
            logger.warning("cannot resign, the lease ends by itself", extra=fields(error=str(error)))


class Writer:
    """Writes of one term of office. `header` is that of the latest write."""

    def __init__(self, client: EtcdClient, term: Term) -> None:
        self.client = client
        self.term = term
        self.header = term.header
        self._turn = asyncio.Lock()  # one write at a time, so that revisions can only go up

    async def apply(self, changes: Sequence[Change]) -> None:
        """Write `changes` in order, in transactions of up to 100 keys; NotLeader when the term is over.

        After an EtcdError it is unknown which of them are written.
        """
        batch: list[Operation] = []
        size = 0
        for change in changes:
            length = len(change.key) + len(change.value or "")
            if batch and (len(batch) >= MAX_OPERATIONS or size + length > MAX_BYTES):
                await self._commit(batch)
                batch, size = [], 0
            batch.append(Delete(change.key) if change.value is None else Put(change.key, change.value))
            size += length
        if batch:
            await self._commit(batch)

    async def prove(self) -> None:
        """NotLeader when the term is over; EtcdError when nobody can tell."""
        await self._commit([Get(keys.LEADER)])

    async def _commit(self, batch: list[Operation]) -> None:
        fence = Compare(keys.LEADER, "create", "=", self.term.create_revision)
        async with self._turn:
            await self._send(fence, batch)

    async def _send(self, fence: Compare, batch: list[Operation]) -> None:
        result = await self.client.txn([fence], batch)
        if not result.succeeded:
            raise NotLeader("another registrar leads: a write was refused")
        if result.header.cluster_id != self.header.cluster_id or result.header.revision < self.header.revision:
            # A restored etcd may hold our lease and key: what it lacks must be read again before anything is written.
            raise NotLeader("another etcd answers: its cluster id changed or its revision went back")
        self.header = result.header
