# SPDX-License-Identifier: GPL-3.0-or-later
"""The registrar's loop: hold the inputs, campaign, and while leading publish this cluster and mirror its peers.

All stores run in every registrar, leader or not, and so does what follows the Kubernetes API, so that a new leader
starts at once and so that any of them remembers what an etcd that was wiped or restored has forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus_mesh import jsontext, keys
from isthmus_mesh.documents import DocumentError, PeerStatus
from isthmus_mesh.identity import LabelFilter
from isthmus_mesh.record import RecordError, merge
from isthmus_mesh.spec import MeshSpec, PeerSpec
from isthmus_mesh.wire import ClusterConfig

from isthmus_agent.agent.log import fields
from isthmus_agent.desired.drain import GRACE
from isthmus_agent.kvstore import (
    DeletionRule,
    EtcdClient,
    EtcdError,
    Listing,
    PrefixStore,
    canary_cluster_id,
    canary_rule,
    canary_value,
    same_history,
    written_since,
)
from isthmus_agent.kvstore.tasks import end, wait_set
from isthmus_agent.sdnotify import notify, watchdog_interval

from . import recall
from .dealing import TIME
from .kubernetes.catalog import Changes
from .kubernetes.wanted import Mesh
from .leader import Election, NotLeader, Term, Writer
from .memory import Known, Memory
from .mirror import Mirror, read_mirrored
from .nodes import Dealt, deal_nodes
from .offered import Offered, Remote
from .publish import (
    Change,
    Inputs,
    Own,
    PeerServices,
    Problem,
    Publication,
    Publisher,
    apply_changes,
    cluster_config,
    difference,
    leaving,
    overlay,
    owned_prefixes,
)

if TYPE_CHECKING:
    from .kubernetes.sink import Sink
    from .kubernetes.source import Source

logger = logging.getLogger(__name__)

ESTATE_FILE = Path("/etc/isthmus/estate.json")
STATE_DIRECTORY = Path("/var/lib/isthmus/registrar")
HEARTBEAT_INTERVAL = 60.0
AUDIT_INTERVAL = 60.0
DEBOUNCE = 0.02
TICK = 1.0
OWN_TIMEOUT = 2.0
OWN_MAX_DELAY = 1.5
RETRY_DELAY = 0.5
MAX_RECEIVE = 8 * 1024 * 1024
"""Bytes of one answer of a peer: what a parsed answer takes of memory can be 25 times as much."""
DRAIN = GRACE + 5.0
"""Seconds from the moment in which what is taken out of the mesh is no backend any more until nobody knows a way to it:
a little more than agents leave the sockets of a backend that went."""
REPORT_GRACE = 60.0
"""How long canaries and withdrawals wait for the agents' reports after etcd lost what was published."""
SITE_SETTLE = 30.0
"""How long after the roster was written in an etcd that lost history its lists are believed: the definitions of
services are written after it."""
KUBERNETES_STATUS_INTERVAL = 10.0
TOLD_PROBLEMS = 20
SAVE_INTERVAL = 5.0
SAVE_RETRY = 60.0


def utc_now() -> str:
    """The present time as RFC 3339 in UTC, to the second."""
    return datetime.now(timezone.utc).strftime(TIME)


class Registrar:
    """One registrar process. `run` returns after `stop` is set, with the leadership given back.

    `estate_file`: this host's copy of the estate record; a record in etcd that is older than it is not published.
    `state_directory`: where own output is remembered for an etcd that lost it (`memory`).
    """

    def __init__(
        self,
        spec: MeshSpec,
        *,
        holder: str | None = None,
        estate_file: Path = ESTATE_FILE,
        state_directory: Path = STATE_DIRECTORY,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], str] = utc_now,
    ) -> None:
        if spec.registrar is None:
            raise ValueError(f"host {spec.host} has no registrar in its spec: the service must not run here")
        self.spec = spec
        self.registrar = spec.registrar
        kubernetes = spec.cluster.kubernetes
        self.own = Own(
            spec.cluster.name,
            spec.cluster.id,
            spec.cluster.max_clusters,
            spec.cluster.service_range4,
            () if kubernetes is None else kubernetes.pod_ranges4,
            None if kubernetes is None else kubernetes.service_range4,
            spec.in_cluster,
        )
        endpoints = list(spec.etcd.endpoints)
        if spec.member is not None and spec.member.client_url in endpoints:
            # The member on this machine first: while this process runs, that one is likely to.
            endpoints.sort(key=lambda endpoint: endpoint != spec.member.client_url)  # type: ignore[union-attr]
        self.client = EtcdClient(
            endpoints, spec.etcd.ca, self.registrar.cert, self.registrar.key, timeout=OWN_TIMEOUT, clock=clock
        )
        self.changed = asyncio.Event()
        self._site_seen: dict[str, tuple[tuple[int, int, int], float]] = {}  # by prefix: which run of `site`, since
        self.kubernetes: Source | None = None
        self.sink: Sink | None = None
        if self.registrar.kubernetes is not None:
            from .kubernetes.sink import Sink
            from .kubernetes.source import Source  # aiohttp: 12 MiB that registrars of machines do without

            place = (self.registrar.kubernetes, spec.estate, self.own.name)
            labels = () if kubernetes is None else kubernetes.identity_labels
            self.kubernetes = Source(*place, self.changed, LabelFilter(labels), wall=wall, clock=clock)
            self.sink = Sink(*place, self.kubernetes.catalog, self.changed, clock=clock)
        self._kubernetes_told: tuple[float, str] = (float("-inf"), "")  # when its status was written, and which
        self._offered = Offered()
        self._remote = Remote()
        self.election = Election(self.client, spec.host, holder or f"{spec.host}/{os.getpid()}", clock=clock)
        self.leading = False
        self.estate = self._store(keys.ESTATE_PREFIX, self._site_has_run, keys.ROSTER)
        self.services = self._store(keys.SERVICE_DEFINITIONS_PREFIX, self._site_has_run, keys.ROSTER)
        self.nodes = self._store(keys.NODE_REPORTS_PREFIX, self._site_has_run, keys.ROSTER)
        self.workloads = self._store(keys.WORKLOADS_PREFIX, self._site_has_run, keys.ROSTER)
        # Own output is complete in an etcd when a registrar has said so there: until then what is known beside it
        # counts for more.
        own_canary = keys.canary_key(self.own.name, "services")
        self.allocations = self._store(keys.ALLOC_PREFIX, canary_rule, own_canary)
        self.state = self._store(keys.STATE_PREFIX, canary_rule, own_canary)
        self._memory = Memory(state_directory, spec.estate, self.own.name)
        self._saved: Known | None = self._memory.load()
        if self._saved is not None:
            for store in (self.allocations, self.state):
                mine = {k: v for k, v in self._saved.keys.items() if k.startswith(store.prefix)}
                values = {key: value.encode("utf-8", "surrogateescape") for key, value in mine.items()}
                store.seed(values, self._saved.cluster_id, self._saved.revision)
        self._doubted: float | None = None  # since when own output is known to be incomplete in etcd
        self._estate_file = estate_file
        self._clock = clock
        self._wall = wall
        self._leaving: dict[str, float] = {}  # hosts that the record lost, since when
        self._leaving_clusters: dict[str, float] = {}  # absent clusters without services here, since when
        self._problems: frozenset[Problem] = frozenset()
        self._told = ""
        # Every mirror asks each second, and a record of 50 clusters is large: parsed once per change.
        self._underlays_of: frozenset[tuple[str, int]] | None = None
        self._underlays_found: Mapping[str, str] = {}
        # Of nodes that are not in the record; None: they are not known yet.
        self._own_underlays: Mapping[str, str] | None = None if spec.in_cluster and self.kubernetes else {}
        self._record_of: tuple[object, ...] = ()
        self._record_found: tuple[Mapping[str, Any] | None, str] = (None, "")
        self._peers = tuple(peer.name for peer in self.registrar.peers)
        self._forgotten: dict[str, bytes] = {}  # absent clusters of which nothing is left, by their tombstone
        self._mirrored: dict[str, _Remembered] = {}
        self._running: dict[str, Mirror] = {}  # by peer, while leading
        self._mirroring: set[str] = set()  # peers whose cluster-config was seen to in this term

    def _site_has_run(self, listing: Listing) -> bool:
        """The deletion rule for inputs: what an etcd that lost history lacks is held until `site` has run there."""
        if same_history(listing):
            return True
        if not written_since(listing):
            return False
        assert listing.canary is not None
        run, now = (listing.cluster_id, listing.noticed, listing.canary.mod_revision), self._clock()
        seen, since = self._site_seen.get(listing.prefix, (None, now))
        if seen != run:
            self._site_seen[listing.prefix] = (run, now)
        return seen == run and now - since >= SITE_SETTLE

    def _store(self, prefix: str, rule: DeletionRule, canary: str) -> PrefixStore:
        return PrefixStore(
            self.client,
            prefix,
            rule=rule,
            canary=canary,
            changed=self.changed,
            max_delay=OWN_MAX_DELAY,
            progress_interval=2.0,
            inactivity_timeout=6.0,
        )

    @property
    def stores(self) -> tuple[PrefixStore, ...]:
        return (self.estate, self.services, self.nodes, self.workloads, self.allocations, self.state)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`: hold the stores, campaign, lead."""
        watching = [asyncio.create_task(self._follow(store), name=f"store {store.prefix}") for store in self.stores]
        leading = asyncio.create_task(self._campaign_for_ever(), name="leadership")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        beating = asyncio.create_task(self._watchdog(), name="watchdog")
        saving = asyncio.create_task(self._save_for_ever(), name="memory")
        tasks = [*watching, leading, stopping, beating, saving]
        if self.kubernetes is not None:
            tasks.append(asyncio.create_task(self._again("kubernetes", self.kubernetes.run), name="kubernetes"))
        notify("READY=1")
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is not stopping:
                    task.result()  # an eternal task that ended: its error ends the process, systemd starts it anew
                    raise RuntimeError(f"{task.get_name()} ended")
        finally:
            notify("STOPPING=1")
            await end(tasks)
            await self._save()
            await self.client.close()

    async def _follow(self, store: PrefixStore) -> None:
        """For ever: certificate files that cannot be read, of a host that lost them, come back by `site`."""
        while True:
            try:
                await store.run()
            except OSError as error:
                store.connected, store.error = False, str(error)
                logger.warning("cannot read certificates", extra=fields(prefix=store.prefix, error=str(error)))
            await asyncio.sleep(RETRY_DELAY)

    async def _watchdog(self) -> None:
        """Tells systemd that the event loop turns; a store or a term that ends with an error ends the process."""
        interval = watchdog_interval()
        while True:
            await asyncio.sleep(interval or 3600.0)
            notify("WATCHDOG=1")

    # --- memory

    async def _save_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SAVE_INTERVAL if await self._save() else SAVE_RETRY)

    async def _save(self) -> bool:
        """Remember own output on disk when it differs from what was; whether that is not to be tried again soon."""
        stores = (self.allocations, self.state)
        if not all(store.synced for store in stores):
            return True
        prefixes = owned_prefixes(self.own.name)
        found = {
            key: kv.value.decode("utf-8", "surrogateescape")
            for store in stores
            for key, kv in store.items.items()
            if key.startswith(prefixes)
        }
        # While the list of an etcd is not believed the one before stays, so that a restart does not forget the doubt.
        cluster_id, revision = (self._saved.cluster_id, self._saved.revision) if self._saved else (0, 0)
        if all(store.trusted for store in stores) and stores[0].cluster_id == stores[1].cluster_id:
            cluster_id, revision = stores[0].cluster_id, min(store.revision for store in stores)
        if not found or (self._saved and (self._saved.keys, self._saved.cluster_id) == (found, cluster_id)):
            return True
        known = Known(found, cluster_id, revision)
        if not await asyncio.to_thread(self._memory.save, known):
            return False
        self._saved = known
        return True

    # --- leadership

    async def _campaign_for_ever(self) -> None:
        while True:
            term = await self.election.campaign(self._wall)
            try:
                self.leading = True
                notify("STATUS=leading")
                await self._serve(term)
            except NotLeader as reason:
                logger.warning("no longer leading", extra=fields(reason=str(reason)))
            finally:
                self.leading = False
                notify("STATUS=waiting")
                await asyncio.shield(self.election.resign(term))

    async def _serve(self, term: Term) -> None:
        """Publish and mirror until the term ends; an error of one part is logged and that part starts again."""
        writer = Writer(self.client, term)
        self._mirroring.clear()
        self._forgotten.clear()
        parts: list[tuple[str, Callable[[], Awaitable[None]]]] = [("publish", lambda: self._publish(writer))]
        if self.sink is not None:
            sink = self.sink
            sink.mesh = None  # what an earlier term knew
            parts.append(("write to kubernetes", lambda: sink.run(writer.prove)))
        for peer in self.registrar.peers:
            parts.append((f"mirror {peer.name}", lambda peer=peer: self._mirror(writer, peer)))  # type: ignore[misc]
        tasks = [asyncio.create_task(self._again(name, part), name=name) for name, part in parts]
        tasks.append(asyncio.create_task(self.election.keep(term), name="lease"))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end(tasks)

    async def _again(self, name: str, part: Callable[[], Awaitable[None]]) -> None:
        told = ""
        while True:
            try:
                await part()
            except (EtcdError, OSError) as error:  # OSError: certificate files that cannot be read
                if told != str(error):
                    told = str(error)
                    logger.warning("trying again", extra=fields(part=name, error=told))
            except NotLeader:
                raise
            except Exception as error:  # a defect of ours that one peer's data found is not to end the other parts
                if told != repr(error):
                    told = repr(error)
                    logger.exception("a part failed", extra=fields(part=name))
            await asyncio.sleep(RETRY_DELAY)

    # --- publishing

    async def _publish(self, writer: Writer) -> None:
        actual: dict[str, str] | None = None
        previous: dict[str, str] = {}
        recalled: Mapping[str, str] = {}
        audited = heartbeat = canaries = float("-inf")
        complete_before = False
        refreshed = False
        dirty = True
        published: Mapping[str, Any] | None = None  # the record that was published last
        drained: frozenset[str] = frozenset()  # hosts that it kept beside those of the record
        publisher: Publisher | None = None
        base: Mapping[str, Any] | None = None  # the record of which `nodes` was made
        nodes: Dealt | None = None
        full: Mapping[str, Any] = {}
        pending = Changes()  # of Kubernetes' objects
        offered: PeerServices | None = None
        unwritable: frozenset[str] = frozenset()
        epoch = 0
        while True:
            if await wait_set(self.changed, TICK):
                await asyncio.sleep(DEBOUNCE)
            self.changed.clear()
            dirty = self._take() or dirty
            if self.kubernetes is not None:
                pending |= self.kubernetes.catalog.take()
            if refreshed and self._epoch() != epoch:
                raise NotLeader("another etcd answers: all is to be read again")
            now = self._clock()
            ready = all(store.synced and store.connected for store in self.stores)
            record, waiting = self._record()
            if not ready:
                waiting = "waiting for own etcd: " + "; ".join(store.error or store.prefix for store in self._absent())
            if record is None or not ready:
                self._say(waiting)
                continue
            if not refreshed:
                # The leader before may have acted on inputs that have not reached these stores yet.
                await asyncio.gather(*(store.refresh() for store in self.stores))
                refreshed, epoch = True, self._epoch()
                recalled = await self._recall(record)
                continue
            if actual is None or now - audited >= AUDIT_INTERVAL:
                actual, audited, dirty = await self._read_actual(), now, True
                previous = overlay(previous, self._remembered(), actual, recalled)
            if self.spec.in_cluster and self.kubernetes is not None:
                if nodes is None or dirty or pending.all or record is not base:
                    base, nodes = record, self._deal_nodes(record, previous)
                    full = {**record, "hosts": nodes.hosts}
                record = full
            draining = self._draining(record, previous)
            changes: list[Change] = []
            # Who waited looks each second: what it waited for may be the clock.
            if (
                dirty
                or self._told
                or record is not published
                or draining != drained
                or pending.all
                or self._peer_services() != offered
                or self._unwritable() != unwritable
            ):
                offered, unwritable = self._peer_services(), self._unwritable()
                given = self._inputs(record, previous, draining, offered)
                publisher = Publisher(self.own, given if nodes is None else replace(given, dealt=nodes.keys))
                found = publisher.run()
                self._tell((*found.problems, *(() if nodes is None else nodes.problems)))
                changes = difference(found.keys, actual, owned_prefixes(self.own.name))
                unreported = self._unreported(found)
                waiting = waiting or unreported
                self._say(waiting)
                if waiting:  # the record in etcd is known to be old, or reports lack: withdraw nothing
                    changes = [change for change in changes if change.value is not None]
                if unreported:
                    changes = self._without_new_services(changes, actual)
                config_key, config = keys.cluster_config_key(self.own.name), cluster_config(self.own)
                if actual.get(config_key) != config:
                    changes.insert(0, Change(config_key, config))
                previous, published, drained, dirty = dict(found.keys), record, draining, False
                pending = Changes()
            elif pending and publisher is not None and publisher.follows:
                followed = publisher.follow(pending, self._wall())
                self._tell((*publisher.problems, *(() if nodes is None else nodes.problems)))
                changes = [change for change in followed if actual.get(change.key) != change.value]
                apply_changes(changes, previous)
                pending = Changes()
            await writer.apply(changes)
            apply_changes(changes, actual)
            if self.sink is not None and publisher is not None:
                self.sink.mesh = self._mesh(publisher) if not waiting else None
                self.sink.due.set()
            await self._write_kubernetes_status(writer)
            if now - heartbeat >= HEARTBEAT_INTERVAL:
                await writer.apply([Change(keys.HEARTBEAT, self._wall())])
                heartbeat = now
            if waiting:
                complete_before = False
                continue
            await self._forget(writer)
            if not self._mirroring.issuperset(self._peers):
                continue  # our canary also says that every peer's cluster-config is here
            if not complete_before or now - canaries >= HEARTBEAT_INTERVAL:
                value = canary_value(self._wall(), writer.header.cluster_id)
                await writer.apply([Change(keys.canary_key(self.own.name, kind), value) for kind in keys.KINDS])
                canaries, complete_before = now, True

    def _take(self) -> bool:
        """Whether an input changed since the last call. Own output is read anew by the audit."""
        inputs = [store.take() for store in (self.estate, self.services, self.nodes, self.workloads)]
        for store in (self.allocations, self.state):
            store.take()
        return any(inputs)

    def _unreported(self, found: Publication) -> str:
        """Why what was published cannot be complete yet although the record is here; empty: it is, or it was waited
        for as long as makes sense. Only an etcd without a valid canary of ours is in question: one that is new, was
        wiped or was restored."""
        if self.allocations.trusted and self.state.trusted:
            self._doubted = None
            return ""
        now = self._clock()
        if self._doubted is None:
            self._doubted = now
        if not found.silent or now - self._doubted >= REPORT_GRACE:
            return ""
        named = ", ".join(found.silent[:3]) + (" and others" if len(found.silent) > 3 else "")
        return (
            f"this etcd lacks what was published before, and not all was heard yet ({named}): withdrawing "
            f"nothing and writing no canary for up to {REPORT_GRACE:.0f} s"
        )

    async def _recall(self, record: Mapping[str, Any]) -> Mapping[str, str]:
        """What peers know of the numbers and addresses that were dealt here, when neither etcd nor this registrar can
        know all of them: an etcd that lost history, and nothing remembered beside it."""
        if (self.allocations.trusted and self.state.trusted) or self._remembered():
            return {}
        claims = await recall.ask(self.own, self.registrar.peers, self._client_of, recall.WAIT)
        services = ["/".join(name) for key in self.services.items if (name := keys.parse_service_definition_key(key))]
        found = recall.agreed(self.own, claims, recall.label_sets(self.own, record), services, self._wall())
        if found:
            told = {peer: len(one.identities) + len(one.vips) for peer, one in claims.items()}
            logger.warning("numbers and addresses read back from peers", extra=fields(taken=len(found), told=told))
        return found

    def _client_of(self, peer: PeerSpec) -> EtcdClient:
        return EtcdClient(
            peer.etcd.endpoints,
            peer.etcd.ca,
            peer.etcd.cert,
            peer.etcd.key,
            clock=self._clock,
            max_receive=MAX_RECEIVE,
        )

    def _without_new_services(self, changes: list[Change], actual: Mapping[str, str]) -> list[Change]:
        """A watch takes a service without its backends as a change, whatever the canary says: so none is written of
        which nothing is known from before."""
        prefixes = (keys.state_prefix("services", self.own.name), keys.LOCAL_SERVICES_PREFIX)
        known = actual.keys() | self._remembered().keys()
        return [change for change in changes if not change.key.startswith(prefixes) or change.key in known]

    async def _forget(self, writer: Writer) -> None:
        """Remove what is mirrored of clusters that the record calls absent: first its services, so that nothing new
        goes there, and after `DRAIN` the rest; the config before all else then, as readers follow it. One that was
        forgotten as lost goes at once."""
        for key, kv in list(self.estate.items.items()):
            cluster = keys.parse_estate_cluster_key(key)
            if cluster is None or cluster in (*self._peers, self.own.name) or self._forgotten.get(cluster) == kv.value:
                continue
            document = _document(kv.value)
            if document.get("state") != "absent":
                continue
            if "forgotten" not in document and cluster not in self._leaving_clusters:
                services = await self.client.range(keys.cache_prefix("services", cluster), keys_only=True)
                await writer.apply([Change(one.key, None) for one in services.kvs])
                self._leaving_clusters[cluster] = self._clock()
            if self._clock() - self._leaving_clusters.get(cluster, float("-inf")) < DRAIN:
                continue
            self._leaving_clusters.pop(cluster, None)
            found = []
            for one in (keys.cluster_config_key(cluster), keys.peer_status_key(cluster)):
                found += [one] if await self.client.get(one) is not None else []
            for prefix in (keys.canary_prefix(cluster), *(keys.cache_prefix(kind, cluster) for kind in keys.KINDS)):
                found += [kv.key for kv in (await self.client.range(prefix, keys_only=True)).kvs]
            if found:
                logger.info("forgetting an absent cluster", extra=fields(peer=cluster, keys=len(found)))
                await writer.apply([Change(one, None) for one in found])
            self._forgotten[cluster] = kv.value

    def _deal_nodes(self, record: Mapping[str, Any], previous: Mapping[str, str]) -> Dealt:
        """The nodes of a cluster whose control plane is in it, as hosts."""
        assert self.kubernetes is not None
        cluster_ips = () if self.own.cluster_ips4 is None else (self.own.cluster_ips4,)
        ranges = (*self.spec.mesh_ranges4, *self.spec.service_ranges4, *self.own.pod_ranges4, *cluster_ips)
        found = deal_nodes(record, self.kubernetes.catalog, previous, self._wall(), ranges)
        self._own_underlays = {host["underlay4"]: self.own.name for host in found.hosts.values()}
        self._underlays_of = None
        return found

    def _epoch(self) -> int:
        return sum(store.epoch for store in self.stores)

    def _absent(self) -> list[PrefixStore]:
        return [store for store in self.stores if not (store.synced and store.connected)]

    def _draining(self, record: Mapping[str, Any], previous: Mapping[str, str]) -> frozenset[str]:
        """Hosts that were taken out less than `DRAIN` ago; a new leader counts from its own beginning."""
        now = self._clock()
        self._leaving = {host: self._leaving.get(host, now) for host in leaving(self.own, record, previous)}
        return frozenset(host for host, since in self._leaving.items() if now - since < DRAIN)

    def _peer_services(self) -> PeerServices:
        """What only peers offer: neither here nor in another cluster the estate declares it."""
        return self._offered.services(self._running.values(), len(self._peers), self.estate.items.get(keys.ROSTER))

    async def _write_kubernetes_status(self, writer: Writer) -> None:
        """How this registrar stands with the API server, for `isthmus peers`: at once when that changes, numbers now
        and then."""
        if self.kubernetes is None:
            if keys.KUBERNETES_STATUS in self.allocations.items:
                await writer.apply([Change(keys.KUBERNETES_STATUS, None)])
            return
        found = {(one.key, one.reason) for one in self._problems if _of_api(one)}
        found.update(() if self.sink is None else self.sink.problems)
        told = [f"{key[len('kubernetes ') :]}: {reason}" for key, reason in sorted(found)]
        if len(told) > TOLD_PROBLEMS:
            told = [*told[:TOLD_PROBLEMS], f"{len(told) - TOLD_PROBLEMS} more"]
        status = replace(self.kubernetes.status(), problems=tuple(told))
        shape, now = repr(replace(status, objects={})), self._clock()
        if shape == self._kubernetes_told[1] and now - self._kubernetes_told[0] < KUBERNETES_STATUS_INTERVAL:
            return
        known = self.allocations.items.get(keys.KUBERNETES_STATUS)
        if known is None or known.value != status.to_json().encode():
            await writer.apply([Change(keys.KUBERNETES_STATUS, status.to_json())])
        self._kubernetes_told = (now, shape)

    def _inputs(
        self,
        record: Mapping[str, Any],
        previous: Mapping[str, str],
        draining: frozenset[str],
        offered: PeerServices,
    ) -> Inputs:
        return Inputs(
            record=record,
            nodes=_values(self.nodes),
            workloads=_values(self.workloads),
            services=_values(self.services),
            previous=previous,
            now=self._wall(),
            draining=draining,
            kubernetes=None if self.kubernetes is None else self.kubernetes.catalog,
            peers=offered,
            unwritable=self._unwritable(),
        )

    def _unwritable(self) -> frozenset[str]:
        return frozenset() if self.sink is None else self.sink.unwritable

    def _mesh(self, publisher: Publisher) -> Mesh:
        """What is to be seen in Kubernetes."""
        running = self._running
        unknown = [name for name in self._peers if name not in running or not running[name].services_known]
        return Mesh(publisher.definitions(), publisher.machines, self._remote.services(running), frozenset(unknown))

    async def _read_actual(self) -> dict[str, str]:
        """What etcd holds of our own output, read anew."""
        found: dict[str, str] = {}
        for prefix in owned_prefixes(self.own.name):
            for kv in (await self.client.range(prefix)).kvs:
                found[kv.key] = kv.value.decode("utf-8", "surrogateescape")
        config = await self.client.get(keys.cluster_config_key(self.own.name))
        if config is not None:
            found[config.key] = config.value.decode("utf-8", "surrogateescape")
        return found

    def _remembered(self) -> dict[str, str]:
        """Own output that etcd has lost or has older than it was: an etcd that was wiped or restored."""
        prefixes = owned_prefixes(self.own.name)
        return {
            key: store.items[key].value.decode("utf-8", "surrogateescape")
            for store in (self.allocations, self.state)
            for key in store.held
            if key.startswith(prefixes)
        }

    def _record(self) -> tuple[Mapping[str, Any] | None, str]:
        """`_read_record`, read anew when something of it changed: a record of 1,000 hosts takes long to parse."""
        own = self.estate.items.get(keys.estate_cluster_key(self.own.name))
        roster = keys.ROSTER in self.estate.items and keys.ROSTER not in self.estate.absent
        try:
            file = self._estate_file.stat()
            copy = (file.st_ino, file.st_size, file.st_mtime_ns)
        except OSError:
            copy = None
        seen = (own and own.value, roster, copy)
        if seen != self._record_of:
            self._record_of, self._record_found = seen, self._read_record()
        return self._record_found

    def _read_record(self) -> tuple[Mapping[str, Any] | None, str]:
        """This cluster's document of the estate record, and what publishing (without a document) or withdrawing and
        canaries (with one) wait for; empty: nothing. Of etcd's document and the host's copy the newer one counts."""
        own = keys.estate_cluster_key(self.own.name)
        if keys.ROSTER not in self.estate.items or keys.ROSTER in self.estate.absent:
            return None, f"waiting for {keys.ROSTER}: run the site playbook"
        if own not in self.estate.items:
            return None, f"waiting for {own}: run the site playbook"
        name = own[len(keys.ESTATE_PREFIX) :]
        try:
            document = jsontext.loads(self.estate.items[own].value, RecordError)
            record = merge([{name: document}]).clusters[self.own.name]
        except RecordError as error:
            return None, f"{own} cannot be used: {error}"
        newer = self._copy_of_host(name)
        if newer is not None and newer["revision"] > record["revision"]:
            return newer, (
                f"{own} has revision {record['revision']}, this host's copy {self._estate_file} has "
                f"{newer['revision']}: etcd holds an older estate than was applied; withdrawing nothing until the site "
                "playbook has run"
            )
        return record, ""

    def _copy_of_host(self, name: str) -> Mapping[str, Any] | None:
        try:
            text = self._estate_file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return merge([{name: jsontext.loads(text, RecordError)[name]}]).clusters[self.own.name]
        except (KeyError, TypeError, RecordError) as error:
            self._say(f"{self._estate_file} cannot be used: {error!r}")
            return None

    def _say(self, text: str) -> None:
        if text and text != self._told:
            logger.warning("holding back", extra=fields(reason=text))
        self._told = text

    def _tell(self, problems: tuple[Problem, ...]) -> None:
        present = frozenset(problems)
        for problem in sorted(present - self._problems):
            logger.warning("input not used", extra=fields(key=problem.key, reason=problem.reason))
        for problem in sorted(self._problems - present):
            logger.info("input is good again", extra=fields(key=problem.key))
        self._problems = present

    # --- mirroring

    async def _mirror(self, writer: Writer, peer: PeerSpec) -> None:
        await self.estate.refresh()
        # Who else is in the estate, and that there is one, or which addresses are own nodes', is not known yet.
        while self._record()[0] is None or self._own_underlays is None:
            await asyncio.sleep(RETRY_DELAY)
        actual, stands = await read_mirrored(self.client, peer.name)
        header = self.client.last_header
        assert header is not None
        cache = dict(actual)
        wanted = stands
        remembered = self._mirrored.get(peer.name)
        if remembered and (remembered.cluster_id != header.cluster_id or remembered.revision > header.revision):
            cache = {**actual, **remembered.keys}  # our own etcd lost what it held of this peer
            wanted = remembered.config
        # A reader drops all that it holds of a cluster without a config, so a peer that was never read has one too.
        wanted = (
            wanted
            or ClusterConfig(
                id=peer.id, synced_canaries=True, cached=True, max_connected_clusters=self.own.max_clusters
            ).to_json()
        )
        client = self._client_of(peer)
        mirror = Mirror(
            peer,
            self.own.max_clusters,
            client,
            writer,
            cache=cache,
            actual=actual,
            config=wanted,
            actual_config=stands,
            previous=await self._peer_status(peer.name),
            foreign=self._underlays,
            reserved=(*self.spec.mesh_ranges4, *self.spec.service_ranges4),
            started=lambda: self._mirroring.add(peer.name),
            offered=self.changed.set,
            complete=(remembered is not None and remembered.complete) or await self._was_complete(peer.name),
            wall=self._wall,
            clock=self._clock,
        )
        self._running[peer.name] = mirror
        self.changed.set()
        try:
            await mirror.run()
        finally:
            del self._running[peer.name]
            self._mirrored[peer.name] = _Remembered(
                writer.header.cluster_id,
                writer.header.revision,
                dict(mirror.wanted),
                mirror.config_text,
                mirror.services_known,
            )
            await client.close()

    async def _was_complete(self, peer: str) -> bool:
        """Whether all services of the peer were mirrored into this very etcd."""
        canary = await self.client.get(keys.canary_key(peer, "services", cached=True))
        header = self.client.last_header
        assert header is not None
        try:
            return canary is not None and canary_cluster_id(canary.value) == header.cluster_id
        except ValueError:
            return False

    async def _peer_status(self, peer: str) -> PeerStatus | None:
        found = await self.client.get(keys.peer_status_key(peer))
        if found is None:
            return None
        try:
            return PeerStatus.from_json(found.value)
        except DocumentError as error:
            logger.warning("own status of a peer is written anew", extra=fields(key=found.key, reason=str(error)))
            return None

    def _underlays(self) -> Mapping[str, str]:
        """Underlay addresses of hosts of the record, and of own nodes -> their cluster."""
        seen = frozenset((key, kv.mod_revision) for key, kv in self.estate.items.items())
        if seen == self._underlays_of:
            return self._underlays_found
        found: dict[str, str] = dict(self._own_underlays or {})
        for key, kv in self.estate.items.items():
            cluster = keys.parse_estate_cluster_key(key)
            if cluster is None:
                continue
            try:
                for host in _document(kv.value).get("hosts", {}).values():
                    found[host["underlay4"]] = found[host["advertise4"]] = cluster
            except (KeyError, TypeError, AttributeError) as error:
                self._say(f"{key} cannot be read: {error!r}")
        self._underlays_of, self._underlays_found = seen, found
        return found


@dataclass(frozen=True, slots=True)
class _Remembered:
    """What was mirrored of a peer when our own etcd `cluster_id` was at `revision`; `complete`: all its services."""

    cluster_id: int
    revision: int
    keys: dict[str, str]
    config: str | None
    complete: bool


def _document(value: bytes) -> dict[str, Any]:
    """A JSON object; an empty one when it is none."""
    try:
        document = jsontext.loads(value, ValueError)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _of_api(problem: Problem) -> bool:
    return problem.key.startswith("kubernetes ")


def _values(store: PrefixStore) -> dict[str, bytes]:
    return {key: kv.value for key, kv in store.items.items()}
