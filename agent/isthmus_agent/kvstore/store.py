# SPDX-License-Identifier: GPL-3.0-or-later
"""List, then watch: one prefix of an etcd held in memory, with the deletion rule of docs/architecture.md.

An etcd can lose history: it is started empty, or a snapshot is restored. Watchers are then left silently stale and a
list lacks keys that nobody deleted. So a store remembers which etcd it saw (cluster id, highest revision, raft term).
When another one answers, everything that it already knows is *held*: it keeps missing keys and refuses values that
were written before that answer, until the deletion rule says that the list is complete again. A DELETE event of a
watch is always a real deletion, a PUT event always a real change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .client import INACTIVITY_TIMEOUT, PAGE, PROGRESS_INTERVAL, EtcdClient, KeyValue, RangeResult, WatchBatch
from .errors import EtcdChanged, EtcdError, EtcdTooLarge, EtcdUnavailable
from .tasks import end, within

log = logging.getLogger(__name__)

MIN_DELAY = 0.2
MAX_DELAY = 30.0
_HEALTHY = 60.0
_UNTRUSTED_INTERVAL = 1.0
_TOGETHER = 1.0

_CANARY_FIELD = re.compile(r"(?:^|\s)cluster_id=(\S*)")
_HEX = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Listing:
    """What a deletion rule decides on: a complete list of `prefix` at `revision` of the etcd `cluster_id`.

    `changed`: since the last list that was believed, another etcd began to answer (other id, or a revision or raft
    term that went back). `floor`: if it did so under the same cluster id, the revision at which that was seen, else
    0; what was written after it has a higher mod_revision. `canary` is the prefix's canary at `revision`. `noticed`:
    the revision at which another etcd was first seen to answer, whatever its cluster id, else 0.
    """

    prefix: str
    cluster_id: int
    revision: int
    changed: bool
    floor: int
    canary: KeyValue | None
    noticed: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a store takes of its prefix at most: keys, and bytes of keys and values together. None: whatever comes."""

    keys: int | None = None
    bytes: int | None = None


DeletionRule = Callable[[Listing], bool]


def canary_value(time_text: str, cluster_id: int) -> str:
    """What our registrar writes into a canary: `<RFC3339> cluster_id=<16 hex digits>`."""
    return f"{time_text} cluster_id={cluster_id:016x}"


def canary_cluster_id(value: bytes) -> int | None:
    """The etcd cluster id that a canary names; None when it names none (a real Cilium writes only the time).

    ValueError for a field that is there but is no cluster id.
    """
    found = _CANARY_FIELD.search(value.decode("utf-8", "replace"))
    if found is None:
        return None
    if not _HEX.fullmatch(found[1]):
        raise ValueError(f"canary names {found[1]!r}, which is no cluster id of 16 hex digits")
    return int(found[1], 16)


def canary_rule(listing: Listing) -> bool:
    """The deletion rule for published and mirrored state (docs/architecture.md, "etcd").

    The canary must be there and must not name another etcd than the answering one. After a rollback under the same
    cluster id it must have been written since. After a change of the cluster id the named id says just that; a canary
    without one is a real Cilium's, whose etcd starts empty each time.
    """
    if listing.canary is None:
        return False
    try:
        named = canary_cluster_id(listing.canary.value)
    except ValueError:
        return False
    if named is not None and named != listing.cluster_id:
        return False
    return not listing.floor or listing.canary.mod_revision > listing.floor


def same_history(listing: Listing) -> bool:
    """The deletion rule for documents without canary: believe lists as long as it is the same etcd."""
    return not listing.changed


def written_since(listing: Listing) -> bool:
    """The deletion rule for documents that somebody writes on purpose, with one of them as canary: believe lists as
    long as it is the same etcd, and those of another one once that document has been written there."""
    if same_history(listing):
        return True
    return listing.canary is not None and listing.canary.mod_revision > listing.noticed


class PrefixStore:
    """All keys below `prefix`, kept current by `run` until it is cancelled.

    One consumer awaits `changed` (which several stores may share), clears it, and calls `take` for the set of keys
    that changed since: bursts collapse and nothing queues up. `changed` is also set when `synced`, `connected` or
    `held` change. `canary` is the key of the prefix's canary, read at the revision of each list. `clock` is
    monotonic, in seconds.

    `items`: key -> KeyValue. `held`: keys kept although the last list lacks them or has an older value; `absent`:
    those of them that it lacks. `synced`: at
    least one list was completed. `trusted`: the last list was believed, deletions included. `epoch`: counts how often
    another etcd was seen. `last_proof`: when etcd last answered. `error`: the last failure's text while not
    connected. `size`: bytes of all keys and values. `excess`: why the prefix is not followed, when it holds more than
    `limits`; what was known before stays.
    """

    def __init__(
        self,
        client: EtcdClient,
        prefix: str,
        *,
        rule: DeletionRule,
        canary: str | None = None,
        changed: asyncio.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_delay: float = MAX_DELAY,
        page: int = PAGE,
        progress_interval: float = PROGRESS_INTERVAL,
        inactivity_timeout: float = INACTIVITY_TIMEOUT,
        limits: Limits = Limits(),
    ) -> None:
        self.client = client
        self.prefix = prefix
        self.canary = canary
        self.changed = changed or asyncio.Event()
        self.items: dict[str, KeyValue] = {}
        self.held: set[str] = set()
        self.absent: set[str] = set()
        self.synced = False
        self.trusted = False
        self.connected = False
        self.cluster_id = 0
        self.revision = 0
        self.epoch = 0
        self.lists = 0
        self.last_proof: float | None = None
        self.error: str | None = None
        self.size = 0
        self.excess: str | None = None
        self._limits = limits
        self._rule = rule
        self._clock = clock
        self._max_delay = max_delay
        self._page = page
        self._progress_interval = progress_interval
        self._inactivity_timeout = inactivity_timeout
        self._raft_term = 0
        self._noticed = 0  # revision at which another etcd was first seen to answer; 0: lists are believed
        self._floor = 0
        self._again = asyncio.Event()
        self._waiters: list[asyncio.Future[None]] = []
        self._dirty: set[str] = set()
        self._asked = 0.0

    def seed(self, values: Mapping[str, bytes], cluster_id: int, revision: int) -> None:
        """Start from what an earlier process knew of the etcd `cluster_id` at `revision` (0, 0: not known).

        Seeded keys are kept until a list that the rule believes lacks them.
        """
        self.items.update((key, KeyValue(key, value)) for key, value in values.items())
        self._dirty.update(values)
        self.size = sum(_size(kv) for kv in self.items.values())
        self.cluster_id, self.revision = cluster_id, revision
        self.changed.set()

    def take(self) -> frozenset[str]:
        """Keys that changed (or went) since the last call."""
        taken = frozenset(self._dirty)
        self._dirty.clear()
        return taken

    def waiting(self) -> int:
        """How many keys the next `take` gives."""
        return len(self._dirty)

    def age(self) -> float | None:
        """Seconds since etcd last answered; None before the first answer."""
        return None if self.last_proof is None else self._clock() - self.last_proof

    async def refresh(self) -> None:
        """Make `run` list again now; returns when a list that was begun after the call is complete.

        Everything that was written before the call is then here.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._again.set()
        await waiter

    async def run(self) -> None:
        """List and watch for ever; after any error list again, after 0.2 s to `max_delay` with full jitter.

        When nobody answered, and etcd answers another call of the client meanwhile, within a second of that.
        """
        failures = 0
        while True:
            began = self._clock()
            try:
                await self._list()
                await self._watch_until_asked()
                failures = 0
                continue
            except EtcdError as error:
                self._lost(error)
                nobody = isinstance(error, EtcdUnavailable)
            if self._clock() - began >= _HEALTHY:
                failures = 0
            limit = min(self._max_delay, MIN_DELAY * 2 ** min(failures, 16))
            failures += 1
            delay = random.uniform(0, limit)  # noqa: S311 - jitter, no secret
            if nobody:
                delay = await self._until_answered(delay)
            await asyncio.sleep(delay)

    async def _until_answered(self, delay: float) -> float:
        """Wait up to `delay` seconds for etcd to answer the client; returns how long is left to wait.

        An agent follows some twenty prefixes: after an outage the unluckiest of them would hold up what all know for
        most of `max_delay`. The jitter that stays is for etcd, which all agents find again at the same time.
        """
        until = self._clock() + delay
        with contextlib.suppress(asyncio.TimeoutError):
            await within(self.client.answered(), delay)
        return min(max(until - self._clock(), 0.0), random.uniform(0, _TOGETHER))  # noqa: S311 - jitter, no secret

    def _lost(self, error: EtcdError) -> None:
        if self.error is None or self.connected:
            log.warning("lost %s: %s", self.prefix, error)
        self.connected = False
        self.error = str(error)
        if isinstance(error, EtcdTooLarge):
            self.excess = error.reason
        self.changed.set()

    async def _list(self) -> None:
        self._again.clear()
        waiters, self._waiters = self._waiters, []
        try:
            await self._list_once()
        except BaseException:
            self._waiters = waiters + self._waiters
            raise
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _list_once(self) -> None:
        result = await self.client.range(
            self.prefix, page=self._page, max_keys=self._limits.keys, max_bytes=self._limits.bytes
        )
        self._notice_history(result)
        canary = await self.client.get(self.canary, revision=result.revision) if self.canary else None
        believed = self._rule(self._listing(result.cluster_id, result.revision, canary))
        self._apply_list(result, believed)
        self.lists += 1
        self.last_proof = self._asked = self._clock()

    def _notice_history(self, result: RangeResult) -> None:
        if self.cluster_id:
            same = result.cluster_id == self.cluster_id
            back = same and (result.revision < self.revision or result.raft_term < self._raft_term)
            if back or not same:
                self._noticed = result.revision
                self._floor = result.revision if back else 0
                self.trusted = False
                self.epoch += 1
                log.warning(
                    "another etcd answers for %s: was cluster %016x revision %d, is cluster %016x revision %d; "
                    "keeping what is known until its canary is valid",
                    self.prefix,
                    self.cluster_id,
                    self.revision,
                    result.cluster_id,
                    result.revision,
                )
        self.cluster_id, self.revision, self._raft_term = result.cluster_id, result.revision, result.raft_term

    def _listing(self, cluster_id: int, revision: int, canary: KeyValue | None) -> Listing:
        return Listing(self.prefix, cluster_id, revision, self._noticed > 0, self._floor, canary, self._noticed)

    def _apply_list(self, result: RangeResult, believed: bool) -> None:
        listed = {kv.key: kv for kv in result.kvs}
        held: set[str] = set()
        for key, kv in listed.items():
            known = self.items.get(key)
            if known is not None and known.value == kv.value:
                self.items[key] = kv
            elif known is not None and self._noticed and not believed and kv.mod_revision <= self._noticed:
                held.add(key)
            else:
                self.items[key] = kv
                self._dirty.add(key)
        missing = self.items.keys() - listed.keys()
        if believed:
            for key in missing:
                del self.items[key]
            self._dirty |= missing
            self._noticed = self._floor = 0
            missing = set()
        held |= missing
        if held and held != self.held:
            log.warning("holding %d keys of %s that the list lacks or has older", len(held), self.prefix)
        self.held, self.absent = held, set(missing)
        self.size, self.excess = sum(_size(kv) for kv in self.items.values()), None
        self.trusted = believed
        self.synced = True
        self.changed.set()

    async def _watch_until_asked(self) -> None:
        watch = asyncio.ensure_future(self._watch())
        again = asyncio.ensure_future(self._again.wait())
        try:
            await asyncio.wait({watch, again}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
        finally:
            await end([watch, again])

    async def _watch(self) -> None:
        """Follow changes; returns when the list should be read again because it may be believed now."""
        untrusted = min(self._progress_interval, _UNTRUSTED_INTERVAL)
        watch = self.client.watch(
            self.prefix,
            self.revision + 1,
            progress_interval=self._progress_interval if self.trusted else untrusted,
            inactivity_timeout=self._inactivity_timeout,
            max_bytes=self._limits.bytes,
        )
        async with contextlib.aclosing(watch):
            async for batch in watch:
                self._check_history(batch)
                self._apply_batch(batch)
                if await self._believable():
                    return

    def _check_history(self, batch: WatchBatch) -> None:
        if batch.cluster_id != self.cluster_id or batch.revision < self.revision:
            reason = f"cluster {batch.cluster_id:016x} at revision {batch.revision} answers instead of "
            reason += f"{self.cluster_id:016x} at {self.revision}"
            raise EtcdChanged(self.client.endpoint, f"watch {self.prefix}", reason)

    def _apply_batch(self, batch: WatchBatch) -> None:
        self.revision = batch.revision
        self.last_proof = self._clock()
        if not self.connected:
            log.info("watching %s from revision %d, %d keys", self.prefix, batch.revision, len(self.items))
            self.connected, self.error = True, None
            self.changed.set()
        for event in batch.events:
            key = event.kv.key
            self.held.discard(key)
            self.absent.discard(key)
            before = self.items.pop(key, None)
            self.size -= 0 if before is None else _size(before)
            if not event.deleted:
                self.items[key] = event.kv
                self.size += _size(event.kv)
            self._dirty.add(key)
        if batch.events:
            self.changed.set()
            self._check_limits()

    def _check_limits(self) -> None:
        for what, found, limit in (
            ("keys", len(self.items), self._limits.keys),
            ("bytes", self.size, self._limits.bytes),
        ):
            if limit is not None and found > limit:
                raise EtcdTooLarge(self.client.endpoint, f"watch {self.prefix}", f"more than {limit} {what}")

    async def _believable(self) -> bool:
        """Whether a list that the rule did not believe would be believed now that its canary was written."""
        if self.trusted or self.canary is None or self._clock() - self._asked < _UNTRUSTED_INTERVAL:
            return False
        self._asked = self._clock()
        canary = await self.client.get(self.canary)
        return self._rule(self._listing(self.cluster_id, self.revision, canary))


def _size(kv: KeyValue) -> int:
    return len(kv.key) + len(kv.value)
