# SPDX-License-Identifier: GPL-3.0-or-later
"""The agent's loop: watch -> state -> desired -> diff -> apply.

One applier owns the kernel. Everything else (watches, probes, health checks, cgroups) only says that
something changed. Nothing is ever emptied because a source is missing: the start is made from
last-known-good, and a host whose maps an earlier agent filled is left as it is until there is
something at least as good to put there.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from isthmus_mesh import keys
from isthmus_mesh.documents import Alive
from isthmus_mesh.spec import IpsecSpec, NodeSpec

from isthmus_agent import sdnotify
from isthmus_agent.agent import memory
from isthmus_agent.agent.cgroups import CgroupTracker
from isthmus_agent.agent.checks import Checks
from isthmus_agent.agent.files import write_atomically
from isthmus_agent.agent.kernel import Kernel
from isthmus_agent.agent.log import fields
from isthmus_agent.agent.names import NamesFile
from isthmus_agent.agent.network_watch import ChainWatch, NetworkWatch
from isthmus_agent.agent.prober import Prober
from isthmus_agent.agent.reporter import Reporter
from isthmus_agent.agent.sessions import Sessions
from isthmus_agent.agent.tunnels import Tunnels
from isthmus_agent.bpf.errors import BpfError
from isthmus_agent.desired.addressing import IPSEC_TABLE, keeps_source_always, passed_over
from isthmus_agent.desired.compute import Desired, HostFacts, Memory, desired
from isthmus_agent.desired.datapath import Backend, Datapath, Network
from isthmus_agent.desired.drain import DrainTracker
from isthmus_agent.desired.pods import PodAddress
from isthmus_agent.desired.reach import Reachability, choose_targets
from isthmus_agent.desired.reports import CheckKey, backends_here, node_report, workload_reports
from isthmus_agent.kvstore.client import EtcdClient
from isthmus_agent.kvstore.tasks import end, wait_set, within
from isthmus_agent.netlink.errors import NetworkError
from isthmus_agent.netlink.namespaces import PLACES
from isthmus_agent.netlink.wireguard import DEVICES
from isthmus_agent.state.decoder import Decoder
from isthmus_agent.state.lastgood import LastGood, LastGoodError
from isthmus_agent.state.model import MeshState, NodeKey
from isthmus_agent.state.watch import CHUNK, StateWatcher

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEBOUNCE = 0.01
CGROUP_POLL = 0.2
CGROUP_SEARCH_EVERY = 5  # polls; a search walks the slices, a poll only looks at known places
AUDIT_INTERVAL = 300.0
MTU_INTERVAL = KEY_INTERVAL = 30.0
FILTERS_INTERVAL = 2.0
FILTERS_RETRY = 30.0
CHAINS_INTERVAL = 30.0
CHAINS_PAUSE = 0.05  # between two looks
CHAINS_SHARE = 0.05  # of one CPU may go for looks, however often chains change
RETRY = (0.5, 30.0)
LAST_GOOD_DELAY = 1.0
LAST_GOOD_STOP = 5.0  # what a stop waits for a slow disk
DESTROY_AGAIN = 5.0
IDLE = 5.0  # the applier's longest sleep
BEATS = 4  # in the time that the watchdog allows; one that is missed is no harm
RESTART_DELAY = 5.0


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the agent keeps what it writes."""

    state: Path = Path("/var/lib/isthmus/agent")
    run: Path = Path("/run/isthmus")

    @property
    def last_good(self) -> Path:
        return self.state / "last-known-good.json"

    @property
    def socket(self) -> Path:
        return self.run / "agent.sock"

    @property
    def names(self) -> Path:
        return self.run / "dns"

    @property
    def down(self) -> Path:
        """Nodes that do not answer, for an agent that is started anew: a list of cluster and name each."""
        return self.run / "down.json"


@dataclass(slots=True)
class Progress:
    """What the applier has done; times are wall clock seconds."""

    applied: Datapath | None = None
    source: str = ""  # spec, last-known-good, etcd
    applies: int = 0
    last_apply: float | None = None
    last_change: float | None = None
    error: str = ""
    errors: int = 0
    problems: tuple[str, ...] = ()  # what is refused or has no room; the rest is applied and this tried again
    holding: str = ""
    last_audit: float | None = None
    drift: tuple[str, ...] = ()  # what the last audit found
    repaired: int = 0
    sockets_ended: int = 0
    filtered: int = 0  # packets between pods and the mesh that other filters of this host dropped
    filtered_at: float | None = None  # when they last became more
    masqueraded: str = ""  # why other programs' rules may change the source of packets into the mesh
    guard_drops: int = 0  # packets that the rules of gateways of this host dropped
    last_good_written: float | None = None
    last_good_loaded: str = ""  # when what we started from was written
    restarts: int = 0  # of failed tasks


class Agent:
    """One host's agent. `run` ends when it is cancelled; the datapath stays."""

    def __init__(
        self,
        spec: NodeSpec,
        kernel: Kernel,
        client: EtcdClient,
        cgroup_root: Path,
        paths: Paths | None = None,
        boot_id: str = "",
        version: str = "",
        probe: bool = True,
    ) -> None:
        self.spec = spec
        self.paths = paths or Paths()
        self.version = version
        self.started = time.time()
        self.progress = Progress()
        self.decoder = Decoder(spec.cluster.name, spec.cluster.id, spec.cluster.max_clusters)
        self.watcher = StateWatcher(client, self.decoder, self.wake)
        self.client = client
        self.prober = Prober(spec.node.mesh4, self.wake)
        self.checks = Checks(self._report)
        self.cgroups = CgroupTracker(cgroup_root, spec.workloads)
        self.reporter = Reporter(client, spec.host, self._reports)
        self.names = NamesFile(self.paths.names)
        self.tunnels: Tunnels | None = None  # on a gateway
        if spec.ipsec is not None and spec.ipsec.local is not None:
            self.tunnels = Tunnels(spec.ipsec, spec.ipsec.local, self._tunnel_routes, self._note_tunnels)
        self.facts = HostFacts(boot_id=boot_id)
        self.desired: Desired | None = None
        self.kernel = kernel
        self._memory = Memory()
        self._probe = probe
        self._executor = ThreadPoolExecutor(1, "kernel")
        self._wake = asyncio.Event()
        self._drain = DrainTracker()
        self._deadline: float | None = None
        self._again: float | None = None  # when to try again what the kernel refused
        self._again_delay = RETRY[0]
        self._kernel_problems: tuple[str, ...] = ()
        self._names_problems: tuple[str, ...] = ()
        self._key_problems: tuple[str, ...] = ()
        self._namespace_problems: tuple[str, ...] = ()
        self._network_changed = False  # not by us
        self._chains_changed = asyncio.Event()
        self._inputs: tuple[MeshState, Reachability, HostFacts] | None = None
        self._has_last_good = False
        self._fresh = False
        self._started = False
        self._synced = False
        self._down_kept: frozenset[NodeKey] | None = None  # None: what an earlier agent kept
        self._dead: frozenset[Backend] = frozenset()
        self._dead_ended = 0.0
        self._expired: list[Backend] = []
        self._last_good_wake = asyncio.Event()
        self._last_good_written: dict[str, bytes] | None = {}  # None: not even that nothing is known
        # Held while the kernel is made as `progress.applied` then says, or compared with it.
        self._kernel_turn = asyncio.Lock()
        self._turns = 0
        self._kernel_calls = 0  # asked and not yet answered
        self._kernel_answers = 0

    def wake(self) -> None:
        """Some input changed."""
        self._wake.set()

    async def kernel_call(self, function: Callable[..., T], *args: object) -> T:
        """Run a kernel function in its thread, after those asked before."""
        self._kernel_calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        finally:
            self._kernel_calls -= 1
            self._kernel_answers += 1

    async def run(self) -> None:
        """Start from last-known-good, then follow own etcd, until cancelled."""
        await self._load_last_good()
        self._fresh = await self.kernel_call(self.kernel.is_fresh)
        if not self._fresh:
            try:
                self._drain.seed(await self.kernel_call(self.kernel.held))
            except BpfError as error:
                logger.warning("what an earlier agent left cannot be read", extra=fields(error=str(error)))
        self.cgroups.poll()
        self.facts = replace(self.facts, cgroups=dict(self.cgroups.ids))
        await self._read_mtu()
        await self._read_key()
        if self.spec.ipsec is not None and self.spec.ipsec.gateways:
            await self._doubt_gateways(self.spec.ipsec)
        self._doubt_down()
        if self.tunnels is not None:
            await self.tunnels.look()
        alive = Alive(self.spec.host, self.version, self.facts.boot_id, _rfc3339(self.started))
        jobs: dict[str, Callable[[], Awaitable[None]]] = {
            "applier": self._applier,
            "watcher": self.watcher.run,
            "cgroups": self._follow_cgroups,
            "mtu": self._follow_mtu,
            "reporter": self.reporter.run,
            "alive": lambda: self.reporter.run_alive(alive),
            "audit": self._audits,
            "last-good": self._keep_last_good,
        }
        native = self.spec.native is not None
        ways = native or self.spec.ipsec is not None
        if ways or self.spec.wireguard is not None:
            jobs["network"] = NetworkWatch(DEVICES, self.spec.node.underlay4, self._note_network, ways).run
        if self.spec.wireguard is not None:
            jobs["wireguard-key"] = self._follow_key
            if self.spec.wireguard.opens:
                sessions = Sessions(self.kernel, self.kernel_call, lambda: self.progress.applied, self.spec.node.mesh4)
                jobs["sessions"] = sessions.run
        if (watchdog := sdnotify.watchdog_interval()) is not None:
            jobs["watchdog"] = lambda: self._feed_watchdog(watchdog)
        jobs |= self._netfilter_jobs()
        if self._probe:
            jobs["prober"] = self.prober.run
        if self.tunnels is not None:
            jobs["tunnels"] = self.tunnels.run
            jobs["tunnel-prober"] = self.tunnels.prober.run
            if self.spec.ipsec is not None and self.spec.ipsec.begins:
                jobs["tunnels-again"] = self.tunnels.ask_again
        self.wake()
        tasks = [asyncio.create_task(self._guard(name, job), name=name) for name, job in jobs.items()]
        try:
            await asyncio.gather(*tasks)
        finally:
            await end(tasks)
            await self._leave_last_good()
            await self.checks.close()
            await self.kernel_call(self.kernel.close)
            self._executor.shutdown()

    async def _guard(self, name: str, job: Callable[[], Awaitable[None]]) -> None:
        """A job that fails is logged, counted and started again; the others go on."""
        while True:
            try:
                await job()
                logger.error("job ended", extra=fields(job=name))
            except Exception:
                logger.exception("job failed", extra=fields(job=name))
            self.progress.restarts += 1
            await asyncio.sleep(RESTART_DELAY)

    # --- inputs

    async def _load_last_good(self) -> None:
        path = self.paths.last_good
        try:
            last = LastGood.from_json(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, LastGoodError) as error:
            logger.error(
                "last-known-good cannot be used; waiting for etcd",
                extra=fields(path=str(path), error=str(error)),
            )
            return
        if last.cluster != self.spec.cluster.name:
            logger.error(
                "last-known-good is another cluster's and is not used",
                extra=fields(path=str(path), cluster=last.cluster),
            )
            return
        for number, (key, value) in enumerate(last.documents.items(), 1):
            self.decoder.put(key, value)
            if number % CHUNK == 0:
                await asyncio.sleep(0)
        self.watcher.seed(last)
        self._has_last_good = True
        self.progress.last_good_loaded = last.written
        logger.info("last-known-good loaded", extra=fields(written=last.written, documents=len(last.documents)))

    async def _read_mtu(self) -> bool:
        try:
            mtu = await self.kernel_call(self.kernel.underlay_mtu, self.spec.node.underlay4)
        except NetworkError as error:
            logger.error("underlay MTU cannot be read", extra=fields(error=str(error), used=self.facts.underlay_mtu))
            return False
        if mtu == self.facts.underlay_mtu:
            return False
        self.facts = replace(self.facts, underlay_mtu=mtu)
        return True

    async def _doubt_gateways(self, own: IpsecSpec) -> None:
        """Of gateways and tunnels that an earlier agent went around nothing is expected until they have answered:
        otherwise packets would be sent there, and lost, until this one has found the same."""
        try:
            led = await self.kernel_call(self.kernel.routed_over, IPSEC_TABLE)
        except NetworkError as error:
            logger.error("which gateway is used cannot be read", extra=fields(error=str(error)))
            return
        if self.tunnels is not None:
            self.tunnels.doubt(led)
            return
        for node in passed_over(own, led.values()):
            self.prober.table.doubt(node, up=True)

    def _doubt_down(self) -> None:
        """Nodes that did not answer an earlier agent are down until they answer this one: new connections would go to
        their backends until it has found the same."""
        try:
            found = json.loads(self.paths.down.read_bytes())
            nodes = [(str(cluster), str(name)) for cluster, name in found]
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError) as error:
            logger.error(
                "who did not answer before cannot be read", extra=fields(path=str(self.paths.down), error=str(error))
            )
            return
        for node in nodes:
            self.prober.table.doubt(node, up=False)

    def _keep_down(self, down: frozenset[NodeKey]) -> None:
        if down == self._down_kept:
            return
        try:
            write_atomically(self.paths.down, json.dumps(sorted(down)).encode(), 0o600)
        except OSError as error:
            logger.error("who does not answer cannot be kept", extra=fields(error=str(error)))
            return
        self._down_kept = down

    async def _follow_mtu(self) -> None:
        while True:
            await asyncio.sleep(MTU_INTERVAL)
            if await self._read_mtu():
                self.wake()
                self.reporter.wake()

    async def _read_key(self) -> bool:
        """The public keys that others need; whether they are others than before."""
        if self.spec.wireguard is None:
            return False
        found: dict[int, str] = {}
        problems: list[str] = []
        for tunnel in self.spec.wireguard.tunnels:
            try:
                found[tunnel.port] = await self.kernel_call(self.kernel.public_key, tunnel.key)
            except NetworkError as error:
                # What was reported stands: nobody may take a moment's failure for a host without a key.
                problems += error.problems
                if tunnel.port in self.facts.public_keys:
                    found[tunnel.port] = self.facts.public_keys[tunnel.port]
        self._key_problems = tuple(problems)
        if found == self.facts.public_keys:
            return False
        self.facts = replace(self.facts, public_keys=found)
        return True

    async def _follow_key(self) -> None:
        while True:
            await asyncio.sleep(KEY_INTERVAL)
            if await self._read_key():
                self._note_network()
                self.reporter.wake()

    def _note_network(self) -> None:
        self._network_changed = True
        self.wake()
        if self.tunnels is not None:
            self.tunnels.wake()

    async def _tunnel_routes(self) -> frozenset[Network]:
        return await self.kernel_call(self.kernel.tunnel_routes)

    def _note_tunnels(self) -> None:
        if self.tunnels is not None:
            self.facts = replace(self.facts, passes=self.tunnels.passes)
            self.wake()

    async def _follow_cgroups(self) -> None:
        polls = 0
        while True:
            await asyncio.sleep(CGROUP_POLL)
            polls += 1
            if self.cgroups.poll(search=polls % CGROUP_SEARCH_EVERY == 0):
                self.facts = replace(self.facts, cgroups=dict(self.cgroups.ids))
                logger.info(
                    "workloads' cgroups changed",
                    extra=fields(running=sorted("/".join(key) for key in self.cgroups.ids)),
                )
                self.wake()
                self._report()

    # --- reports

    def _report(self) -> None:
        self.reporter.wake()

    def _reports(self) -> dict[str, str] | None:
        """None until own etcd was listed: without the definitions a report would withdraw backends."""
        if not self.watcher.synced:
            return None
        state = self.decoder.state()
        self._reconcile_checks(state)
        found = {
            key: report.to_json()
            for key, report in workload_reports(
                self.spec, state, self.facts, self.checks.verdicts(), self.reporter.reported
            ).items()
        }
        published = state.nodes.get((self.spec.cluster.name, self.spec.host))
        found[keys.node_report_key(self.spec.host)] = node_report(self.spec, self.facts, published).to_json()
        return found

    def _reconcile_checks(self, state: MeshState) -> None:
        self.checks.reconcile(backends_here(self.spec, state), self._reported)

    def _reported(self, key: CheckKey) -> bool | None:
        report = self.reporter.reported.get(keys.workload_key(self.spec.host, *key.workload))
        return report.services.get("/".join(key.service)) if report is not None else None

    # --- the applier

    async def _applier(self) -> None:
        watchdog = sdnotify.watchdog_interval()
        longest = min(IDLE, watchdog / BEATS) if watchdog else IDLE
        retry = RETRY[0]
        while True:
            timeout = longest
            for due in (self._deadline, self._again):
                if due is not None:
                    timeout = min(timeout, max(0.0, due - time.monotonic()))
            if self.progress.error:
                timeout = min(timeout, retry)
            if await wait_set(self._wake, timeout):  # else a deadline, a retry, or a proof that it turns
                await asyncio.sleep(DEBOUNCE)
            self._wake.clear()
            try:
                await self._turn()
                retry = RETRY[0]
            except Exception as error:
                # Also what nobody expects: what is in the kernel stands, status tells it, other jobs go on.
                known = isinstance(error, (BpfError, NetworkError, OSError))
                words = str(error) if known else f"{type(error).__name__}: {error}"
                self.progress.errors += 1
                if self.progress.error != words:
                    logger.error("datapath cannot be applied", extra=fields(error=words), exc_info=not known)
                self.progress.error = words
                self._inputs = None
                retry = min(retry * 2, RETRY[1])
            self._turns += 1

    @property
    def ready(self) -> bool:
        """Whether the datapath is there: made by this agent, or kept as an earlier one left it."""
        return self._started or bool(self.progress.holding)

    async def _feed_watchdog(self, interval: float) -> None:
        """Feed systemd's watchdog while everything gets on: the event loop (or nobody would run this), the applier,
        and the kernel's thread, whose turn may take longer than the watchdog allows but must not stand still."""
        applier = kernel = (-1, -1)
        while True:
            applier_before, applier = applier, (self._turns, self.kernel.steps())
            kernel_before, kernel = kernel, (self._kernel_answers, self.kernel.steps())
            if applier != applier_before and (kernel != kernel_before or not self._kernel_calls):
                # Before READY=1 it is the start's timeout that runs.
                allowed = round(interval * 2 * 1_000_000)
                sdnotify.notify("WATCHDOG=1" if self._started else f"WATCHDOG=1\nEXTEND_TIMEOUT_USEC={allowed}")
            await asyncio.sleep(interval * 2 / BEATS)

    def _hold(self) -> str:
        """Why nothing may be applied yet; empty when something may."""
        if self._has_last_good or self._fresh or self._started or self.watcher.trusted:
            return ""
        return (
            "the datapath of an earlier agent is kept as it is: there is no last-known-good, and own etcd's "
            "state is not complete yet"
        )

    async def _turn(self) -> None:
        holding = self._hold()
        if holding:
            if holding != self.progress.holding:
                logger.warning("holding", extra=fields(reason=holding))
                sdnotify.notify(f"READY=1\nSTATUS={holding}")
            self.progress.holding = holding
            return
        self.progress.holding = ""
        now = time.monotonic()
        if self.watcher.synced and not self._synced:
            self._synced = True
            self.reporter.wake()
        # A peer's age changes every few seconds and changes nothing that is wanted.
        inputs = (replace(self.decoder.state(), peers={}), self.prober.view(), self.facts)
        due = self._network_changed or any(each is not None and now >= each for each in (self._deadline, self._again))
        if inputs != self._inputs or due:
            self._deadline = self._again = None  # a time that is past would not let the applier wait
            await self._apply(inputs, now)
        if self._dead and now - self._dead_ended >= DESTROY_AGAIN:
            # A connect() that chose the backend just before it was taken out may finish after the first round.
            await self._end_sockets(self._dead)
            self._dead_ended = now

    async def _apply(self, inputs: tuple[MeshState, Reachability, HostFacts], now: float) -> None:
        state, reach, facts = inputs
        # In a thread, as it takes a second when much changed in a big mesh.
        found = await asyncio.to_thread(desired, self.spec, state, reach, facts, self._memory)
        if await self._find_namespaces(found.pods.untranslated):
            inputs = (state, reach, self.facts)
            found = await asyncio.to_thread(desired, self.spec, *inputs, self._memory)
        services, expired, self._deadline = self._drain.apply(found.datapath.services, now)
        self._expired.extend(expired)
        datapath = replace(found.datapath, services=services, draining=self._drain.orphans)
        self._log_refused(found)
        async with self._kernel_turn:
            await self._make(found, datapath)
        self._write_names(found)
        self._note_problems()
        self._inputs = inputs
        self._keep_down(reach.down)
        self.progress.error = ""
        # After the routes: a probe that cannot be sent would count as a miss.
        own = (self.spec.cluster.name, self.spec.host)
        gateways = [(one.cluster, one.host) for one in self.spec.ipsec.gateways] if self.spec.ipsec is not None else []
        targets = choose_targets(own, found.holders, found.mesh, gateways=gateways)
        self.prober.retarget(targets, found.mtus)
        if self.watcher.synced:
            self._last_good_wake.set()
            self._reconcile_checks(state)
            self.reporter.wake()
        fresh_dead = found.dead - self._dead
        self._dead = found.dead
        if fresh_dead or self._expired:
            ended, self._expired = self._expired, []
            await self._end_sockets({*fresh_dead, *ended})

    async def _make(self, found: Desired, datapath: Datapath) -> None:
        began = time.monotonic()
        changed, self._network_changed = self._network_changed, False
        if changed:
            await self.kernel_call(self.kernel.network_changed)
        self.desired = found  # whoever asks the kernel's thread from here on is answered after it
        if not self._started or self.progress.error:
            # Whoever failed may have done half of it, or lacks what only a start makes, such as the device.
            done = await self.kernel_call(self.kernel.start, datapath)
        elif changed or datapath != self.progress.applied or self._kernel_problems:
            done = await self.kernel_call(self.kernel.apply, datapath)
        else:
            return
        self._note_applied(datapath, done.changes, time.monotonic() - began)
        self._kernel_problems = done.problems

    async def _find_namespaces(self, pods: frozenset[PodAddress]) -> bool:
        """Where the pods are whose sockets are left alone; whether that is another answer than before."""
        known = {pod: cookie for pod, cookie in self.facts.namespaces.items() if pod in pods}
        missing = pods - known.keys()
        self._namespace_problems = ()
        if missing:
            try:
                cookies = await self.kernel_call(self.kernel.namespaces, {address for address, _ in missing})
            except NetworkError as error:
                cookies, self._namespace_problems = {}, tuple(error.problems)
            known |= {pod: cookies[pod[0]] for pod in missing if pod[0] in cookies}
            lost = sorted(str(address) for address, _ in missing - known.keys())
            if lost and not self._namespace_problems:
                self._namespace_problems = (
                    f"no network namespace has the address of {len(lost)} pods that are not to be translated "
                    f"({', '.join(lost[:3])}): their sockets are. Next: see whether the container runtime keeps its "
                    f"namespaces in one of {', '.join(map(str, PLACES))}",
                )
        changed = known != self.facts.namespaces
        self.facts = replace(self.facts, namespaces=known)
        return changed

    def _log_refused(self, found: Desired) -> None:
        before = self.desired.refused if self.desired is not None else ()
        for words in found.refused:
            if words not in before:
                logger.warning("claim refused", extra=fields(reason=words))

    def _note_applied(self, datapath: Datapath, changes: tuple[str, ...], seconds: float) -> None:
        first = not self._started
        self._started = True
        progress = self.progress
        progress.applied = datapath
        progress.applies += 1
        progress.last_apply = time.time()
        progress.source = "etcd" if self.watcher.synced else "last-known-good" if self._has_last_good else "spec"
        if changes:
            progress.last_change = progress.last_apply
            shown = list(changes[:20])
            logger.info(
                "datapath applied",
                extra=fields(source=progress.source, ms=round(seconds * 1000), changes=len(changes), first=shown),
            )
        wireguard = self.spec.wireguard
        if first and self._fresh and wireguard is not None and wireguard.opens | wireguard.opened_by:
            # Own etcd may be reached by what another specification lays down only, and the next agent must not keep
            # this one's maps for want of a last-known-good.
            self._last_good_written = None
            self._last_good_wake.set()
        if first:
            self._chains_changed.set()  # a precaution that was refused is told
            gc.collect()
            gc.freeze()
            memory.give_back()
            sdnotify.notify(f"READY=1\nSTATUS=datapath applied from {progress.source}")
            logger.info("ready", extra=fields(source=progress.source))

    def _write_names(self, found: Desired) -> None:
        """After the kernel: a full /run must not keep traffic where it was."""
        try:
            self.names.write(found.names)
        except OSError as error:
            self._names_problems = (
                f"names cannot be written below {self.paths.names}: {error}. "
                f"Next: make room there (df {self.paths.run})",
            )
        else:
            self._names_problems = ()

    def _note_problems(self) -> None:
        problems = (
            *self._kernel_problems,
            *self._key_problems,
            *self._namespace_problems,
            *self._names_problems,
        )
        for words in problems:
            if words not in self.progress.problems:
                logger.warning("datapath is not all as wanted; tried again", extra=fields(problem=words))
        self.progress.problems = problems
        if problems:
            self._again = time.monotonic() + self._again_delay
            self._again_delay = min(self._again_delay * 2, RETRY[1])
        else:
            self._again, self._again_delay = None, RETRY[0]

    async def _end_sockets(self, backends: frozenset[Backend] | set[Backend]) -> None:
        try:
            ended = await self.kernel_call(self.kernel.destroy, backends)
        except (NetworkError, BpfError) as error:
            logger.error("sockets cannot be ended", extra=fields(error=str(error)))
            return
        if ended:
            self.progress.sockets_ended += ended
            logger.warning(
                "sockets to lost backends ended",
                extra=fields(sockets=ended, backends=sorted(f"{b.address}:{b.port}" for b in backends)),
            )

    # --- audit and last-known-good

    async def audit(self, repair: bool = False) -> list[str]:
        """What of the datapath differs from what is wanted, in words; with `repair` it is made so."""
        async with self._kernel_turn:
            datapath = self.progress.applied
            if datapath is None:
                return [self.progress.holding or self.progress.error or "nothing was applied yet"]
            found = await self.kernel_call(self.kernel.audit, datapath)
            self.progress.last_audit = time.time()
            self.progress.drift = tuple(found)
            if found and repair:
                logger.warning("drift repaired", extra=fields(count=len(found), first=found[:20]))
                done = await self.kernel_call(self.kernel.start, datapath)
                self._kernel_problems = done.problems
                self._note_problems()
                self.progress.repaired += max(0, len(found) - len(done.problems))
        return found

    async def _audits(self) -> None:
        while True:
            await asyncio.sleep(AUDIT_INTERVAL * random.uniform(0.8, 1.2))  # noqa: S311
            if self.progress.applied is not None:
                await self.audit(repair=True)

    def _netfilter_jobs(self) -> dict[str, Callable[[], Awaitable[None]]]:
        jobs: dict[str, Callable[[], Awaitable[None]]] = {}
        if keeps_source_always(self.spec):
            jobs["filters"] = self._follow_filters
        else:
            jobs["chains"] = ChainWatch(self._chains_changed.set).run
            jobs["filters"] = self._follow_chains
        if self.spec.ipsec is not None:
            jobs["guard-drops"] = self._follow_guard_drops
        return jobs

    async def _follow_filters(self) -> None:
        """An `nft flush ruleset`, as a reload of a firewall does it, must not cost pods their addresses until the next
        audit."""
        while True:
            await asyncio.sleep(FILTERS_INTERVAL)
            try:
                found, filtered = await self.kernel_call(self.kernel.mend_filters)
            except NetworkError as error:
                logger.error("netfilter cannot be mended", extra=fields(error=str(error)))
                await asyncio.sleep(FILTERS_RETRY)
                continue
            if found:
                self.progress.repaired += len(found)
                logger.warning("another program changed our part of netfilter; repaired", extra=fields(found=found))
            if filtered > self.progress.filtered:
                self.progress.filtered_at = time.time()
            self.progress.filtered = filtered

    async def _follow_guard_drops(self) -> None:
        while True:
            await asyncio.sleep(FILTERS_INTERVAL)
            try:
                self.progress.guard_drops = await self.kernel_call(self.kernel.guard_drops)
            except NetworkError as error:
                logger.error("what the rules of gateways drop cannot be read", extra=fields(error=str(error)))
                await asyncio.sleep(FILTERS_RETRY)

    async def _follow_chains(self) -> None:
        """Where our part of netfilter is a precaution it comes as soon as another program has a chain that translates
        sources, and goes when there was none for a while. Of iptables that is not nf_tables' nobody tells."""
        while True:
            changed = await wait_set(self._chains_changed, CHAINS_INTERVAL)
            self._chains_changed.clear()
            done, words, seconds = await self.kernel_call(self._mend_precaution, not changed)
            if done:
                logger.info("our part of netfilter follows that of others", extra=fields(changes=done))
            if words and words != self.progress.masqueraded:
                logger.warning("sources of packets cannot be kept", extra=fields(error=words))
            self.progress.masqueraded = words
            await asyncio.sleep(max(CHAINS_PAUSE, seconds / CHAINS_SHARE))

    def _mend_precaution(self, settled: bool) -> tuple[tuple[str, ...], str, float]:
        """In the kernel's thread: what was done, why it cannot be, and seconds of CPU."""
        began = time.thread_time()
        done: tuple[str, ...] = ()
        words = ""
        try:
            done, _ = self.kernel.mend_filters(settled)
        except NetworkError as error:
            words = str(error)
        return done, words, time.thread_time() - began

    async def _keep_last_good(self) -> None:
        while True:
            await self._last_good_wake.wait()
            await asyncio.sleep(LAST_GOOD_DELAY)
            await self._write_last_good()
            memory.give_back()

    async def _write_last_good(self) -> None:
        """What changed since the last time is on disk. OSError: it is not, and is still to be written."""
        self._last_good_wake.clear()
        last = self.watcher.last_good(_rfc3339(time.time()))
        if last.documents == self._last_good_written:
            return
        try:
            await asyncio.to_thread(_write, self.paths.last_good, last)
        except BaseException:
            self._last_good_wake.set()  # must not wait for the next change
            raise
        self._last_good_written = dict(last.documents)
        self._has_last_good = True
        self.progress.last_good_written = time.time()

    async def _leave_last_good(self) -> None:
        """At a stop: the next start may come before etcd does, and must not begin with what was true a change ago."""
        if not self._last_good_wake.is_set():
            return
        try:
            await within(self._write_last_good(), LAST_GOOD_STOP)
        except (OSError, asyncio.TimeoutError) as error:
            logger.error(
                "the last changes are not in last-known-good; the next start learns of them from etcd",
                extra=fields(path=str(self.paths.last_good), error=str(error) or f"not within {LAST_GOOD_STOP:.0f} s"),
            )


_WRITING = threading.Lock()  # a write that was cancelled goes on in its thread


def _write(path: Path, last: LastGood) -> None:
    with _WRITING:
        write_atomically(path, last.to_json().encode(), 0o600)


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
