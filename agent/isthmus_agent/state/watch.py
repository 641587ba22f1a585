# SPDX-License-Identifier: GPL-3.0-or-later
"""The watch shell: own etcd's prefixes into the decoder. One `PrefixStore` a prefix; peers' prefixes come and go
with their `cilium/cluster-config/<peer>` key, so that removing a peer removes what was mirrored of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from isthmus_mesh import keys

from isthmus_agent.agent.log import fields
from isthmus_agent.kvstore.client import EtcdClient
from isthmus_agent.kvstore.store import PrefixStore, canary_rule
from isthmus_agent.kvstore.tasks import end
from isthmus_agent.state.decoder import Decoder
from isthmus_agent.state.lastgood import LastGood

logger = logging.getLogger(__name__)

# An agent only loses freshness by a silent watch, never traffic; signs of life may be rare.
PROGRESS_INTERVAL = 10.0
INACTIVITY_TIMEOUT = 30.0
_RESTART = 5.0
CHUNK = 200  # documents decoded before others get the event loop: some ten milliseconds


def own_prefixes(cluster: str) -> dict[str, str]:
    """Prefix -> canary key, for what this cluster's registrar and operator write.

    Documents without a canary of their own stand under that of the services: the registrar writes it
    only after it has read the estate record and published everything, so a wiped etcd has none.
    """
    found = {keys.state_prefix(kind, cluster): keys.canary_key(cluster, kind) for kind in keys.KINDS}
    published = keys.canary_key(cluster, "services")
    for prefix in (
        keys.CLUSTER_CONFIG_PREFIX,
        keys.SERVICE_DEFINITIONS_PREFIX,
        keys.VIPS_PREFIX,
        keys.LOCAL_SERVICES_PREFIX,
        keys.PEERS_PREFIX,
        keys.KUBERNETES_STATUS,
    ):
        found[prefix] = published
    return found


def peer_prefixes(peer: str) -> dict[str, str]:
    """Prefix -> canary key, for the mirror of a peer."""
    return {keys.cache_prefix(kind, peer): keys.canary_key(peer, kind, cached=True) for kind in keys.KINDS}


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """How one watched prefix stands; `age` in seconds since etcd last answered for it, None: never."""

    prefix: str
    connected: bool
    synced: bool
    trusted: bool
    held: int
    age: float | None
    error: str | None


class StateWatcher:
    """Keeps `decoder` current; calls `changed` when the state may have changed.

    `synced`: own cluster's prefixes were listed at least once since this process started. `trusted`: their lists are
    believed, so the registrar has published everything, and every peer's prefixes were listed. Both are said of what
    the decoder has, not of what is still on its way to it.
    """

    def __init__(self, client: EtcdClient, decoder: Decoder, changed: Callable[[], None]) -> None:
        self._client = client
        self._decoder = decoder
        self._notify = changed
        self._event = asyncio.Event()
        self._stores: dict[str, PrefixStore] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._peers: set[str] = set()
        self._believed: dict[str, tuple[int, int]] = {}
        self._base = own_prefixes(decoder.cluster)
        self.synced = False
        self.trusted = False

    def seed(self, last: LastGood) -> None:
        """Start from last-known-good, whose documents the decoder has already: they stay until a list that may be
        believed lacks them."""
        self._believed.update(last.believed)

    def last_good(self, written: str) -> LastGood:
        """What to write to disk now."""
        return LastGood(self._decoder.cluster, written, dict(self._decoder.documents()), dict(self._believed))

    def sources(self) -> list[SourceStatus]:
        return [
            SourceStatus(prefix, s.connected, s.synced, s.trusted, len(s.held), s.age(), s.error)
            for prefix, s in sorted(self._stores.items())
        ]

    def connected(self) -> bool:
        """Whether own etcd answers on every watched prefix."""
        return bool(self._stores) and all(store.connected for store in self._stores.values())

    def age(self) -> float | None:
        """Seconds since own etcd last answered for the prefix that waits longest; None: not all have yet."""
        ages = [store.age() for store in self._stores.values()]
        known = [age for age in ages if age is not None]
        return max(known) if ages and len(known) == len(ages) else None

    async def run(self) -> None:
        """Watch until cancelled. What the decoder holds is what this starts from, also when it failed before."""
        self._stores.clear()
        self._peers = set()
        self.synced = self.trusted = False
        try:
            self._start(self._base)
            self._follow_peers()
            while True:
                await self._event.wait()
                self._event.clear()
                await self._pump()
        finally:
            await end(self._tasks.values())
            self._tasks.clear()

    def _start(self, prefixes: Mapping[str, str]) -> None:
        for prefix, canary in prefixes.items():
            store = PrefixStore(
                self._client,
                prefix,
                rule=canary_rule,
                canary=canary,
                changed=self._event,
                progress_interval=PROGRESS_INTERVAL,
                inactivity_timeout=INACTIVITY_TIMEOUT,
            )
            documents = {k: v for k, v in self._decoder.documents().items() if k.startswith(prefix)}
            store.seed(documents, *self._believed.get(prefix, (0, 0)))
            self._stores[prefix] = store
            self._tasks[prefix] = asyncio.create_task(self._guard(store), name=f"watch {prefix}")

    async def _guard(self, store: PrefixStore) -> None:
        """A store ends only on what is no fault of etcd, such as certificate files that cannot be read."""
        while True:
            try:
                await store.run()
            except (OSError, ValueError) as error:
                store.connected = False
                store.error = str(error)
                logger.error("watch failed", extra=fields(prefix=store.prefix, error=str(error)))
                await asyncio.sleep(_RESTART)

    async def _pump(self) -> None:
        believed: dict[str, tuple[int, int]] = {}
        taken = []
        synced, trusted = set(), set()
        for prefix, store in self._stores.items():
            taken.append((store, store.take()))
            # As of what is taken: while it is decoded the stores go on.
            if store.synced:
                synced.add(prefix)
            if store.trusted:
                trusted.add(prefix)
                if store.cluster_id:
                    believed[prefix] = (store.cluster_id, store.revision)
        with self._decoder.batch():
            for store, changed in taken:
                for number, key in enumerate(changed, 1):
                    kv = store.items.get(key)
                    if kv is None:
                        self._decoder.delete(key)
                    else:
                        self._decoder.put(key, kv.value)
                    if number % CHUNK == 0:
                        await asyncio.sleep(0)
        self._believed.update(believed)
        for refusal in self._decoder.take_refusals():
            logger.warning("value refused", extra=fields(key=refusal.key, reason=refusal.reason))
        self._follow_peers()
        self.synced = synced >= self._base.keys()
        self.trusted = trusted >= self._base.keys() and synced >= self._stores.keys()
        # Also when no key changed: `synced` and `trusted` may have turned.
        self._notify()

    def _follow_peers(self) -> None:
        wanted = set(self._decoder.state().configs)
        for peer in wanted - self._peers:
            self._start(peer_prefixes(peer))
        for peer in self._peers - wanted:
            logger.warning("peer was removed", extra=fields(peer=peer))
            for prefix in peer_prefixes(peer):
                self._tasks.pop(prefix).cancel()
                del self._stores[prefix]
                self._believed.pop(prefix, None)
                for key in [key for key in self._decoder.documents() if key.startswith(prefix)]:
                    self._decoder.delete(key)
        self._peers = wanted
