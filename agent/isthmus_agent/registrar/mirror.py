# SPDX-License-Identifier: GPL-3.0-or-later
"""The mirror of one peer: its `cilium/state` into our `cilium/cache`, in the layout of Cilium's KVStoreMesh.

Everything of a peer is foreign: each key is validated against what the estate gives that peer (name, id, ranges)
before it enters, and written anew from what was understood, so that nothing rides along unread. A peer that cannot
be reached keeps its last state; a value that is refused leaves the one before it in place. What was mirrored goes,
whatever the peer says, when it claims an address that the record has given to another cluster since.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address

from isthmus_mesh import keys
from isthmus_mesh.documents import PeerStatus
from isthmus_mesh.spec import PeerSpec
from isthmus_mesh.wire import (
    ClusterConfig,
    ClusterService,
    IPIdentityPair,
    Node,
    WireError,
    labels_from_string,
    labels_to_string,
    validate_cluster_config,
    validate_identity,
    validate_ip,
    validate_node,
    validate_service,
)

from isthmus_agent.agent.log import fields
from isthmus_agent.kvstore import (
    EtcdClient,
    EtcdError,
    KeyValue,
    Limits,
    Listing,
    PrefixStore,
    canary_rule,
    canary_value,
)
from isthmus_agent.kvstore.tasks import end, wait_set

from .leader import Writer
from .publish import Change, apply_changes, seconds_between

logger = logging.getLogger(__name__)

CONFIG_INTERVAL = 30.0
CONFIG_RETRY = 1.0
STATUS_INTERVAL = 10.0
CANARY_INTERVAL = 60.0
AUDIT_INTERVAL = 60.0
DEBOUNCE = 0.05
TICK = 1.0

CONNECTED, CONNECTING, UNREACHABLE, REFUSED = "connected", "connecting", "unreachable", "refused"
FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one peer may take of our etcd and of this process: a peer over it is frozen, the others are not concerned.

    `keys` by kind; `bytes` of all its keys and values; `value`: bytes of one value, a longer one is refused by itself;
    `rate`: changed keys a second over a long time, after a burst of as many as a full list may have.
    """

    keys: Mapping[str, int]
    bytes: int = 64 * 1024 * 1024
    value: int = 64 * 1024
    rate: float = 500.0

    @property
    def burst(self) -> int:
        return sum(self.keys.values())


BUDGET = Budget({"nodes": 5_000, "ip": 100_000, "identities": 65_536, "services": 10_000})
FREEZE_RETRY = 60.0


# What a status document tells of refused keys is bounded: their text is the peer's.
_REASONS, _REASON_LENGTH, _KEY_LENGTH = 20, 200, 512
_REFUSED_KEYS = 1000
"""Refused keys that are remembered and logged one by one; those beyond are as little taken, but not counted."""

_NO_UNDERLAY = ("CiliumInternalIP", "Hostname", "InternalDNS", "ExternalDNS")


class Refused(WireError):
    """A key of a peer that must not be taken over; the text is the reason, short enough to count by."""


class Foreign(Refused):
    """It claims another cluster's machine."""


def cache_key(kind: str, peer: str, key: str) -> str:
    """Where the state key of a peer is mirrored to. Refused for a key that is not of that kind and peer."""
    if kind == "nodes":
        node = keys.parse_node_key(key)
        if node and node[0] == peer:
            return keys.node_key(peer, node[1], cached=True)
    elif kind == "services":
        service = keys.parse_service_key(key)
        if service and service[0] == peer:
            return keys.service_key(peer, service[1], service[2], cached=True)
    elif kind == "ip":
        address = keys.parse_ip_key(key)
        if address and address[0] is None:
            return keys.ip_key(address[1], peer)
    else:
        identity = keys.parse_identity_key(key)
        if identity and identity[0] is None:
            return keys.identity_key(identity[1], peer)
    raise Refused("key has not the form of its kind")


def state_key(kind: str, peer: str, key: str) -> str:
    """The reverse of `cache_key`, for keys below `cache_prefix(kind, peer)`."""
    return keys.state_prefix(kind, peer) + key[len(keys.cache_prefix(kind, peer)) :]


def translate(
    kind: str,
    peer: PeerSpec,
    max_clusters: int,
    key: str,
    value: bytes,
    foreign: Mapping[str, str],
    reserved: Sequence[IPv4Network] = (),
) -> tuple[str, str]:
    """A peer's key and value -> what is written here. WireError with a short reason when it is refused.

    `foreign`: underlay addresses that the record gives to hosts, with their cluster: a peer may not claim another
    cluster's machine as its own node or tunnel endpoint. `reserved`: the mesh's own ranges, in which no machine's
    underlay address lies: a node's address goes before a workload's, so it would take that one's packets.
    """
    target = cache_key(kind, peer.name, key)
    ranges = peer.workload_ranges4
    if kind == "nodes":
        node = Node.from_json(value)
        parsed = keys.parse_node_key(key)
        assert parsed is not None
        validate_node(node, parsed[0], parsed[1], peer.id, ranges)
        _own_addresses((entry.ip for entry in node.addresses), peer.name, foreign)
        _underlay_addresses((entry.ip for entry in node.addresses if entry.type not in _NO_UNDERLAY), reserved)
        return target, node.to_json()
    if kind == "ip":
        pair = IPIdentityPair.from_json(value)
        found = keys.parse_ip_key(key)
        assert found is not None
        validate_ip(pair, found[1], peer.id, max_clusters, ranges)
        _own_addresses([pair.host_ip], peer.name, foreign)
        _underlay_addresses([pair.host_ip], reserved)
        return target, pair.to_json()
    if kind == "services":
        service = ClusterService.from_json(value)
        named = keys.parse_service_key(key)
        assert named is not None
        validate_service(service, *named, peer.id, ranges)
        return target, service.to_json()
    number = keys.parse_identity_key(key)
    assert number is not None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise WireError("not UTF-8") from None
    labels = labels_from_string(text)
    validate_identity(number[1], labels, peer.name, peer.id, max_clusters)
    return target, labels_to_string(labels)


def _own_addresses(addresses: Iterable[str], peer: str, foreign: Mapping[str, str]) -> None:
    for address in addresses:
        if address and foreign.get(address, peer) != peer:
            raise Foreign("address is another cluster's machine")


def _underlay_addresses(addresses: Iterable[str], reserved: Sequence[IPv4Network]) -> None:
    for address in filter(None, addresses):
        found = ip_address(address)
        if found.is_loopback or found.is_unspecified or found.is_multicast:
            raise Refused("underlay address is no machine's own")
        if any(found in network for network in reserved):
            raise Refused("underlay address is in a range of the mesh")


def _audit_delay() -> float:
    """Seconds until the next audit, spread so that 50 peers are not read at once."""
    return AUDIT_INTERVAL * random.uniform(0.75, 1.25)  # noqa: S311 - jitter, no secret


def _speakable(text: str, limit: int) -> str:
    """Text of a peer for a document: UTF-8 (a key may be any bytes), and not longer than `limit` characters."""
    return text.encode("utf-8", "backslashreplace").decode()[:limit]


async def read_mirrored(client: EtcdClient, peer: str) -> tuple[dict[str, str], str | None]:
    """What our etcd holds of a peer: mirrored keys with their values, and the peer's cluster-config."""
    found: dict[str, str] = {}
    for kind in keys.KINDS:
        for kv in (await client.range(keys.cache_prefix(kind, peer))).kvs:
            found[kv.key] = kv.value.decode("utf-8", "surrogateescape")
    config = await client.get(keys.cluster_config_key(peer))
    return found, None if config is None else config.value.decode("utf-8", "replace")


class Mirror:
    """Mirrors one peer as long as `run` runs, writing through a term's `Writer`.

    `cache`: what was mirrored last, by cache key; `actual`: what is in our etcd of it; `config` and `actual_config`
    likewise for our copy of the peer's cluster-config, which stands until the peer was read; `previous`: the status
    document that stands; for `foreign` and `reserved` see `translate`; `started` is called when our etcd has the
    peer's cluster-config, `offered` when the peer's services changed.

    `services_changes` counts those changes; `services_known`: what the peer offers is known in full, from itself or
    (given as `complete`) from before.
    """

    def __init__(
        self,
        peer: PeerSpec,
        max_clusters: int,
        client: EtcdClient,
        writer: Writer,
        *,
        cache: Mapping[str, str],
        actual: Mapping[str, str],
        config: str,
        actual_config: str | None,
        previous: PeerStatus | None,
        foreign: Callable[[], Mapping[str, str]],
        reserved: Sequence[IPv4Network] = (),
        started: Callable[[], object],
        wall: Callable[[], str],
        offered: Callable[[], object] = lambda: None,
        complete: bool = False,
        clock: Callable[[], float] = time.monotonic,
        max_delay: float = 30.0,
        budget: Budget = BUDGET,
    ) -> None:
        self.peer = peer
        self.client = client
        self.writer = writer
        self.wanted: dict[str, str] = dict(cache)
        self.actual: dict[str, str] = dict(actual)
        self._counts = Counter(key.split("/")[2] for key in self.wanted)
        self._pending = self._differences()
        self.refused: dict[str, str] = {}
        self.refused_last: tuple[str, str] | None = previous.refused_last if previous else None
        self._previous = previous
        self._max_clusters = max_clusters
        self._foreign = foreign
        self._reserved = reserved
        self._wall = wall
        self._clock = clock
        self._changed = asyncio.Event()
        self._config: ClusterConfig | None = None
        self._config_reason: str | None = None
        self._last_proof = previous.last_proof if previous else None
        self._proved_at: float | None = None  # by `clock`; `last_proof` is by `wall`
        self._last_change = previous.last_change if previous else None
        self.config_text = config
        self._actual_config = actual_config
        self._started = started
        self._offered = offered
        self.services_changes = 0
        self.services_known = complete
        self._canaries: dict[str, float] = {}
        self._budget = budget
        self._tokens, self._tokens_at = float(budget.burst), clock()
        self._frozen: tuple[str, str] | None = None  # (prefix, why)
        self._frozen_until = float("-inf")
        self._audit_at = clock() + _audit_delay()
        self._status_text = ""
        self._status_time = float("-inf")
        self._foreign_seen: Mapping[str, str] = {}
        self._again = False  # everything is to be judged anew
        self._believed = (previous.cluster_id, previous.revision) if previous else ("", 0)
        seen = (int(self._believed[0] or "0", 16), self._believed[1])
        self.stores: dict[str, PrefixStore] = {}
        for kind in keys.KINDS:
            store = PrefixStore(
                client,
                keys.state_prefix(kind, peer.name),
                rule=self._rule,
                canary=keys.canary_key(peer.name, kind),
                changed=self._changed,
                clock=clock,
                max_delay=max_delay,
                limits=Limits(budget.keys[kind], budget.bytes),
            )
            prefix = keys.cache_prefix(kind, peer.name)
            store.seed(
                {
                    state_key(kind, peer.name, key): text.encode("utf-8", "surrogateescape")
                    for key, text in cache.items()
                    if key.startswith(prefix)
                },
                *seen,
            )
            self.stores[kind] = store

    def _rule(self, listing: Listing) -> bool:
        if self._config is not None and not self._config.synced_canaries:
            return not listing.changed  # a peer that writes no canaries at all
        return canary_rule(listing)

    async def run(self) -> None:
        """Mirror until cancelled. NotLeader and EtcdError of our own etcd go to the caller."""
        reader = asyncio.create_task(self._read())
        try:
            await self._write_config()
            self._started()
            await self._write()
            while True:
                if await wait_set(self._changed, TICK):
                    await asyncio.sleep(DEBOUNCE)
                if reader.done():
                    reader.result()
                self._changed.clear()
                if self._clock() >= self._audit_at:
                    await self._audit()
                await self._write()
        finally:
            await end([reader])

    # --- reading the peer

    async def _read(self) -> None:
        """Check the peer's configuration, then follow its state; stop following while it is refused."""
        following: list[asyncio.Task[None]] = []
        try:
            while True:
                await self._check_config()
                if self._config is not None and not following:
                    following = [asyncio.create_task(store.run()) for store in self.stores.values()]
                elif self._config is None and following:
                    await end(following)
                    following = []
                for task in following:
                    if task.done():
                        task.result()
                await asyncio.sleep(CONFIG_RETRY if self._config is None else CONFIG_INTERVAL)
        finally:
            await end(following)

    async def _check_config(self) -> None:
        key = keys.cluster_config_key(self.peer.name)
        try:
            found = await self.client.get(key)
        except (EtcdError, OSError) as error:  # OSError: its certificate is not there yet
            if self._config_reason is None and self._config is None:
                logger.warning("cannot reach peer", extra=fields(peer=self.peer.name, error=str(error)))
            self._config_reason = self._config_reason or str(error)
            return
        self._proved()
        if found is None:
            self._config_reason = "the peer has not published its cluster-config yet"
            return
        try:
            config = ClusterConfig.from_json(found.value)
            validate_cluster_config(config, self.peer.id, self._max_clusters)
            if config.cached:
                raise WireError("cluster config is a mirror's, not the cluster's own")
        except WireError as error:
            self._config = None
            self._refuse(key, str(error))
            self._config_reason = str(error)
            self._changed.set()
            return
        self.refused.pop(key, None)
        if self._config is None:
            self._changed.set()
        self._config, self._config_reason = config, None

    def _proved(self) -> None:
        self._last_proof = self._wall()
        self._proved_at = self._clock()

    # --- writing here

    def _refuse(self, key: str, reason: str) -> None:
        reason = _speakable(reason, _REASON_LENGTH)
        whole = key == keys.cluster_config_key(self.peer.name)
        if key not in self.refused and len(self.refused) >= _REFUSED_KEYS and not whole:
            return
        if self.refused.get(key) != reason:
            self.refused_last = (_speakable(key, _KEY_LENGTH), reason)
            logger.warning(
                "refused a peer's key", extra=fields(peer=self.peer.name, key=self.refused_last[0], reason=reason)
            )
        self.refused[key] = reason

    def _excess(self) -> tuple[str, str] | None:
        """What of the peer is over its budget (prefix, why); takes what is within it off the changes that are left."""
        for store in self.stores.values():
            if store.excess is not None:
                return store.prefix, f"{store.excess}, which is this peer's budget"
        size = sum(store.size for store in self.stores.values())
        if size > self._budget.bytes:
            return keys.STATE_PREFIX, f"more than {self._budget.bytes} bytes, which is this peer's budget"
        changed = sum(store.waiting() for store in self.stores.values())
        if changed > self._tokens:
            return (
                keys.STATE_PREFIX,
                f"more than {self._budget.rate:g} changed keys a second, which is this peer's budget",
            )
        self._tokens -= changed
        return None

    def _within_budget(self) -> bool:
        """Whether the peer's changes are taken over now. One that is over its budget is looked at again a minute later;
        until then what is mirrored of it stays as it is."""
        now = self._clock()
        self._tokens = min(float(self._budget.burst), self._tokens + (now - self._tokens_at) * self._budget.rate)
        self._tokens_at = now
        if now < self._frozen_until:
            return False
        excess = self._excess()
        if excess is not None:
            if self._frozen is None:
                logger.warning("froze a peer", extra=fields(peer=self.peer.name, key=excess[0], reason=excess[1]))
            self._frozen, self._frozen_until = excess, now + FREEZE_RETRY
            return False
        if self._frozen is not None:
            logger.info("a peer is within its budget again", extra=fields(peer=self.peer.name))
            self._frozen = None
        return True

    def _take(self) -> frozenset[str]:
        """Judge what changed, and everything again when the record's addresses changed; the kinds complete by now.

        A peer that is over its budget keeps what is mirrored of it, but for addresses that were given to others.
        """
        foreign = self._foreign()
        given = foreign is not self._foreign_seen and foreign != self._foreign_seen
        self._foreign_seen, self._again = foreign, self._again or given
        if not self._within_budget():
            if given:
                for target in list(self.wanted):
                    kind = target.split("/")[2]
                    self._give_up(kind, state_key(kind, self.peer.name, target), foreign)
            return frozenset()
        again, self._again = self._again, False
        for kind, store in self.stores.items():
            changed = store.take()
            for key in {*changed, *store.items} if again else changed:
                self._judge(kind, key, store.items.get(key), foreign)
        return frozenset(kind for kind, store in self.stores.items() if store.trusted)

    def _judge(self, kind: str, key: str, kv: KeyValue | None, foreign: Mapping[str, str]) -> None:
        if kv is None:
            self.refused.pop(key, None)
            try:
                target = cache_key(kind, self.peer.name, key)
            except Refused:
                return  # a key of that form was never taken over
            self._withdraw(kind, target)
            return
        try:
            if len(kv.value) > self._budget.value:
                raise Refused(f"value is larger than {self._budget.value} bytes")
            target, text = translate(kind, self.peer, self._max_clusters, key, kv.value, foreign, self._reserved)
        except (ValueError, RecursionError) as error:
            # No WireError: parsed, but JSON cannot say it: 1e999, or nested very deeply.
            self._refuse(key, str(error) if isinstance(error, WireError) else "cannot be written as JSON")
            self._give_up(kind, key, foreign)
            return
        self.refused.pop(key, None)
        if target not in self.wanted:
            self._counts[kind] += 1
        if self.wanted.get(target) != text:
            self.wanted[target] = text
            self._change(kind, target)

    def _give_up(self, kind: str, key: str, foreign: Mapping[str, str]) -> None:
        """Withdraw what is mirrored of a key when another cluster has its address by now: readers know one node at an
        address, and could take that cluster's packets for this peer's."""
        try:
            target = cache_key(kind, self.peer.name, key)
            if target in self.wanted:
                value = self.wanted[target].encode("utf-8", "surrogateescape")
                translate(kind, self.peer, self._max_clusters, key, value, foreign)
        except Foreign as error:
            logger.warning("withdrew a peer's key", extra=fields(peer=self.peer.name, key=target, reason=str(error)))
            self._withdraw(kind, target)
        except (ValueError, RecursionError):
            return  # nobody else's for all that is known of it

    def _withdraw(self, kind: str, target: str) -> None:
        if self.wanted.pop(target, None) is not None:
            self._counts[kind] -= 1
            self._change(kind, target)

    def _change(self, kind: str, target: str) -> None:
        self._pending.add(target)
        if kind == "services":
            self.services_changes += 1

    def _differences(self) -> set[str]:
        return {key for key in self.wanted.keys() | self.actual.keys() if self.wanted.get(key) != self.actual.get(key)}

    async def _audit(self) -> None:
        """Read what our etcd has of the peer anew: what was changed there behind our back is written again."""
        self.actual, self._actual_config = await read_mirrored(self.writer.client, self.peer.name)
        self._pending = self._differences()
        if self._pending:
            logger.warning(
                "the mirror was changed by somebody", extra=fields(peer=self.peer.name, keys=len(self._pending))
            )
        self._audit_at = self._clock() + _audit_delay()

    async def _write_config(self) -> None:
        if self._config is not None:
            self.config_text = ClusterConfig(
                id=self._config.id,
                synced_canaries=True,
                cached=True,
                max_connected_clusters=self._config.max_connected_clusters,
            ).to_json()
        if self.config_text != self._actual_config:
            await self.writer.apply([Change(keys.cluster_config_key(self.peer.name), self.config_text)])
            self._actual_config = self.config_text

    async def _write(self) -> None:
        before = (self.services_changes, self.services_known)
        complete = self._take()
        self.services_known = self.services_known or "services" in complete
        if before != (self.services_changes, self.services_known):
            self._offered()
        changes = [
            Change(key, self.wanted.get(key))
            for key in sorted(self._pending)
            if self.wanted.get(key) != self.actual.get(key)
        ]

        def place(change: Change) -> int:
            """An identity comes before the address that uses it, and goes after it."""
            number = ("identities", "nodes", "ip", "services").index(change.key.split("/")[2])
            return -number if change.value is None else number

        changes.sort(key=lambda change: (change.value is None, place(change)))
        await self._write_config()
        if changes:
            await self.writer.apply(changes)
            apply_changes(changes, self.actual)
            self._last_change = self._wall()
        self._pending.clear()
        await self._write_canaries(complete)
        await self._write_status()

    async def _write_canaries(self, complete: frozenset[str]) -> None:
        """A kind is complete here once a list of the peer was believed and written. Written again now and then: a
        reader that saw our etcd go back to an older state believes only a canary that is younger than that.

        `complete` was judged together with what is written by now: a list may have become complete since.
        """
        now = self._clock()
        due = [
            kind
            for kind in keys.KINDS
            if kind in complete and now - self._canaries.get(kind, float("-inf")) >= CANARY_INTERVAL
        ]
        if not due:
            return
        value = canary_value(self._wall(), self.writer.header.cluster_id)
        await self.writer.apply([Change(keys.canary_key(self.peer.name, kind, cached=True), value) for kind in due])
        self._canaries.update(dict.fromkeys(due, now))

    def _proof_age(self) -> float | None:
        """Seconds since the peer's etcd last answered; of a proof of an earlier term at least what wall clocks say."""
        if self._proved_at is not None:
            return max(0.0, self._clock() - self._proved_at)
        if self._previous is None or self._last_proof is None:
            return None
        return max(self._previous.proof_age or 0.0, seconds_between(self._last_proof, self._wall()))

    def status(self) -> PeerStatus:
        """How this mirror stands now."""
        for store in self.stores.values():
            if store.last_proof is not None and (self._proved_at is None or store.last_proof > self._proved_at):
                self._last_proof = self._wall()
                self._proved_at = store.last_proof
        if self._frozen is not None:
            state = FROZEN
        elif self._config is None:
            refused = keys.cluster_config_key(self.peer.name) in self.refused
            state = REFUSED if refused else (UNREACHABLE if self._config_reason else CONNECTING)
        elif all(store.connected for store in self.stores.values()):
            state = CONNECTED
        elif any(store.error for store in self.stores.values()):
            state = UNREACHABLE
        else:
            state = CONNECTING
        if all(store.trusted for store in self.stores.values()):
            # While a list is not believed the old values stay, so that a restart of ours does not forget the doubt.
            store = max(self.stores.values(), key=lambda store: store.revision)
            self._believed = (f"{store.cluster_id:016x}", store.revision)
        return PeerStatus(
            state=state,
            last_proof=self._last_proof,
            last_change=self._last_change,
            endpoint=self.client.endpoint,
            cluster_id=self._believed[0],
            revision=self._believed[1],
            keys={kind: self._counts[kind] for kind in keys.KINDS},
            refused=dict(Counter(self.refused.values()).most_common(_REASONS)),
            refused_last=self._frozen or self.refused_last,
            proof_age=None if (age := self._proof_age()) is None else round(age, 1),
        )

    async def _write_status(self) -> None:
        status = self.status()
        shape = repr((status.state, status.endpoint, status.keys, status.refused, status.refused_last))
        now = self._clock()
        if shape == self._status_text and now - self._status_time < STATUS_INTERVAL:
            return
        await self.writer.apply([Change(keys.peer_status_key(self.peer.name), status.to_json())])
        self._status_text, self._status_time = shape, now
