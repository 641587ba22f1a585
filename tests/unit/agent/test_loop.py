# SPDX-License-Identifier: GPL-3.0-or-later
"""The applier and the watcher when something fails; no etcd and no kernel."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import agent_mesh as mesh
import pytest
from isthmus_agent.agent import kernel as kernel_module
from isthmus_agent.agent import loop, status
from isthmus_agent.agent.kernel import Applied, HostKernel
from isthmus_agent.agent.loop import Agent, Paths
from isthmus_agent.agent.main import metrics_server
from isthmus_agent.agent.network_watch import ChainWatch, NetworkWatch
from isthmus_agent.bpf.errors import BpfError
from isthmus_agent.desired.compute import HostFacts, desired
from isthmus_agent.desired.datapath import Datapath, Native, Route, WireGuard, WireGuardPeer
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.kvstore.client import EtcdClient, KeyValue, RangeResult, WatchBatch
from isthmus_agent.netlink import NetworkError, messages
from isthmus_agent.netlink.routes import Way
from isthmus_agent.state.watch import StateWatcher
from isthmus_mesh import keys


class FakeKernel:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.failure: Exception | None = None
        self.problems: tuple[str, ...] = ()
        self.work: Callable[[], None] = lambda: None
        self.done = 0

    def is_fresh(self) -> bool:
        return True

    def steps(self) -> int:
        return self.done

    def start(self, datapath: Datapath) -> Applied:
        return self._do("start", datapath)

    def apply(self, datapath: Datapath) -> Applied:
        return self._do("apply", datapath)

    def _do(self, what: str, datapath: Datapath) -> Applied:
        self.calls.append((what, datapath.overlay_mtu))
        self.work()
        if self.failure is not None:
            raise self.failure
        return Applied(problems=self.problems)


async def until(condition: Callable[[], bool], words: str) -> None:
    deadline = asyncio.get_running_loop().time() + 10.0
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, words
        await asyncio.sleep(0.005)


def an_agent(tmp_path: Path, kernel: Any) -> Agent:
    client = EtcdClient(["https://127.0.0.1:1"], "ca", "cert", "key")
    agent = Agent(mesh.spec(), kernel, client, tmp_path, Paths(tmp_path / "state", tmp_path / "run"))
    agent._fresh = True
    return agent


@contextlib.asynccontextmanager
async def running(*jobs: Coroutine[Any, Any, None]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Jobs of an agent, until the block ends."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def fail_and_recover(agent: Agent, kernel: FakeKernel) -> None:
    async with running(agent._applier()) as (applier,):
        agent.wake()
        await until(lambda: agent.progress.applies == 1, "started")
        kernel.failure = KeyError("poison")
        agent.facts = replace(agent.facts, underlay_mtu=1400)
        agent.wake()
        await until(lambda: bool(agent.progress.error), "the failure is told")
        assert agent.progress.error == "KeyError: 'poison'"
        assert not applier.done()
        kernel.failure = None
        agent.facts = replace(agent.facts, underlay_mtu=1500)
        agent.wake()
        await until(lambda: not agent.progress.error, "it recovered")


def test_an_unexpected_failure_is_told_and_what_it_half_did_is_done_again(tmp_path, monkeypatch):
    """What is wanted again equals what was applied last; the kernel holds half of what came between."""
    monkeypatch.setattr(loop, "RETRY", (0.02, 0.02))
    kernel = FakeKernel()
    asyncio.run(fail_and_recover(an_agent(tmp_path, kernel), kernel))
    assert kernel.calls[:2] == [("start", 1450), ("apply", 1350)]
    assert kernel.calls[-1] == ("start", 1450)


def test_an_agent_that_is_started_anew_gives_nothing_to_who_did_not_answer(tmp_path: Path) -> None:
    """Before its own probes have found the same."""
    made: list[Datapath] = []
    silent = ("cloud", "cloud-1")

    def started_anew() -> Agent:
        kernel = FakeKernel()
        kernel.start = lambda datapath: made.append(datapath) or Applied()  # type: ignore[method-assign, func-returns-value]
        kernel.apply = kernel.start  # type: ignore[method-assign]
        agent = an_agent(tmp_path, kernel)
        for key, value in mesh.documents({"onprem": [1], "cloud": [1]}).items():
            agent.decoder.put(key, value)
        agent._doubt_down()
        return agent

    async def turn(agent: Agent) -> list[str]:
        async with running(agent._applier()):
            before = len(made)
            agent.wake()
            await until(lambda: len(made) > before, "it is applied")
        (service,) = made[-1].services.values()
        return [str(each.address) for each in service.backends]

    (tmp_path / "run").mkdir()
    first = started_anew()
    assert asyncio.run(turn(first)) == ["10.101.0.2", "10.102.0.2"]
    first.prober.table.doubt(silent, up=False)
    assert asyncio.run(turn(first)) == ["10.101.0.2"]
    second = started_anew()
    assert asyncio.run(turn(second)) == ["10.101.0.2"]
    second.prober.table.doubt(silent, up=True)
    assert asyncio.run(turn(second)) == ["10.101.0.2", "10.102.0.2"]
    assert asyncio.run(turn(started_anew())) == ["10.101.0.2", "10.102.0.2"]
    Paths(run=tmp_path / "run").down.write_text('[["cloud"')
    assert asyncio.run(turn(started_anew())) == ["10.101.0.2", "10.102.0.2"]


async def repair_and_change(agent: Agent, kernel: FakeKernel, decided: list[Any]) -> None:
    reads = threading.Event()

    def audit(_: Datapath) -> list[str]:
        reads.wait(10.0)
        return ["something is missing"]

    kernel.audit = audit  # type: ignore[attr-defined]
    async with running(agent._applier()):
        agent.wake()
        await until(lambda: agent.progress.applies == 1, "started")
        repairs = asyncio.create_task(agent.audit(repair=True))
        await asyncio.sleep(0)
        agent.facts = replace(agent.facts, underlay_mtu=1400)
        agent.wake()
        await until(lambda: len(decided) == 2, "the change is on its way")
        reads.set()
        await repairs
        await until(lambda: agent.progress.applies == 2, "the change came")


def test_a_repair_does_not_take_back_what_changed_while_the_kernel_was_read(tmp_path, monkeypatch):
    kernel = FakeKernel()
    decided: list[Any] = []

    def decide(*given: Any) -> Any:
        found = desired(*given)
        decided.append(found)
        return found

    monkeypatch.setattr(loop, "desired", decide)
    asyncio.run(repair_and_change(an_agent(tmp_path, kernel), kernel, decided))
    assert kernel.calls == [("start", 1450), ("start", 1450), ("apply", 1350)]


async def become_ready(agent: Agent, kernel: FakeKernel) -> None:
    ask = metrics_server(agent)._routes["GET /ready"]
    assert (await ask()).status == 503
    async with running(agent._applier()):
        kernel.failure = BpfError("no such hook")
        agent.wake()
        await until(lambda: bool(agent.progress.error), "it fails")
        answer = await ask()
        assert (answer.status, answer.body) == (503, b"the datapath is not there yet: no such hook\n")
        kernel.failure = None
        await until(lambda: not agent.progress.error, "it is there")
        assert (await ask()).status == 200
        kernel.failure = BpfError("again")
        agent.facts = replace(agent.facts, underlay_mtu=1400)
        agent.wake()
        await until(lambda: bool(agent.progress.error), "it fails again")
        assert (await ask()).status == 200, "what was made goes on"


def test_services_are_shown_as_the_kernel_has_them():
    """What is decided while the kernel's thread answers is made so after that, and not shown before."""
    agent: Any = SimpleNamespace(
        desired=SimpleNamespace(views=()),
        progress=SimpleNamespace(applied=Datapath(1)),
        kernel=SimpleNamespace(read=lambda: None),
    )

    async def kernel_call(function: Callable[[], None]) -> None:
        agent.desired = SimpleNamespace(views=("decided, and not made yet",))
        function()

    agent.kernel_call = kernel_call
    assert asyncio.run(status.services(agent)) == {"services": []}


def test_a_pod_is_ready_when_its_datapath_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RETRY", (0.02, 0.02))
    kernel = FakeKernel()
    asyncio.run(become_ready(an_agent(tmp_path, kernel), kernel))
    kept = an_agent(tmp_path, kernel)
    kept.progress.holding = "own etcd's state is not complete yet"
    assert kept.ready, "what an earlier agent made goes on"


async def follow_filters(agent: Agent, answers: list[Any]) -> None:
    async with running(agent._follow_filters()):
        await until(lambda: len(answers) == 1, "asked again and again")


def test_what_others_do_to_netfilter_is_mended_and_what_they_drop_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "FILTERS_INTERVAL", 0.001)
    monkeypatch.setattr(loop, "FILTERS_RETRY", 0.001)
    kernel = FakeKernel()
    answers: list[Any] = [((), 0), NetworkError("no"), (("the table is missing",), 0), ((), 3), ((), 3), ((), 3)]

    def mend() -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(kernel, "mend_filters", mend, raising=False)
    agent = an_agent(tmp_path, kernel)
    asyncio.run(follow_filters(agent, answers))
    assert agent.progress.repaired == 1
    assert agent.progress.filtered == 3
    assert agent.progress.filtered_at is not None


async def follow_chains(agent: Agent, answers: list[Any], looks: list[bool]) -> None:
    async with running(agent._follow_chains()):
        await until(lambda: len(looks) == 2, "looked at though nobody told of a change")
        agent._chains_changed.set()
        await until(lambda: False in looks, "looked at as chains were changed")
        answers.append(NetworkError("no NAT here"))
        await until(lambda: bool(agent.progress.masqueraded), "it is told that it cannot be made")
        assert agent.progress.masqueraded == "no NAT here"
        answers.pop()
        await until(lambda: not agent.progress.masqueraded, "it can be made now")


def test_a_precaution_follows_the_chains_of_others_and_a_refused_one_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHAINS_INTERVAL", 0.01)
    monkeypatch.setattr(loop, "CHAINS_PAUSE", 0.001)
    monkeypatch.setattr(loop, "CHAINS_SHARE", 1.0)
    kernel = FakeKernel()
    answers: list[Any] = [((), 0)]
    looks: list[bool] = []

    def mend(settled: bool) -> Any:
        looks.append(settled)
        if isinstance(answers[-1], Exception):
            raise answers[-1]
        return answers[-1]

    monkeypatch.setattr(kernel, "mend_filters", mend, raising=False)
    agent = an_agent(tmp_path, kernel)
    asyncio.run(follow_chains(agent, answers, looks))
    assert looks[:2] == [True, True]
    assert agent.progress.repaired == 0
    assert not agent.progress.problems, "the network is all there"
    agent.progress.masqueraded = "no NAT here"
    assert any(words.endswith("host's own: no NAT here") for words in status.warnings(agent, [], None))


def test_what_fills_sets_of_netfilter_wakes_nobody() -> None:
    """Nor what others do to rules; when ours is gone somebody is to know."""
    watch = ChainWatch(lambda: None)
    kinds = {0xA02: 1, 0xA03: 1, 0xA05: 1, 0xA08: 0, 0xA06: 0, 0xA0C: 0, 0xA0F: 0, 0x103: 0}
    assert {kind: watch._matters(kind, b"\2\0\0\0" + b"\x08\0\1\0nat\0") for kind in kinds} == kinds
    assert watch._matters(0xA08, b"\2\0\0\0" + b"\x0c\0\1\0isthmus\0")


async def follow_guard_drops(agent: Agent) -> None:
    async with running(agent._follow_guard_drops()):
        await until(lambda: agent.progress.guard_drops == 8, "asked again after a refusal")


def test_what_the_rules_of_gateways_drop_is_asked_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "FILTERS_INTERVAL", 0.001)
    monkeypatch.setattr(loop, "FILTERS_RETRY", 0.001)
    kernel = FakeKernel()
    answers: list[Any] = [7, NetworkError("no"), 8]

    def drops() -> int:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    monkeypatch.setattr(kernel, "guard_drops", drops, raising=False)
    asyncio.run(follow_guard_drops(an_agent(tmp_path, kernel)))


GATEWAYS = {"ipsec": {"sites": {}, "networks": [], "far": {}}}
NATIVELY = {"native": {"sites": {"onprem": "onprem", "cloud": "cloud"}, "stages": {"cloud": "demands"}}}


@pytest.mark.parametrize(
    ("spec", "always", "asks_for_drops"),
    [({}, False, False), (GATEWAYS, False, True), (NATIVELY, True, False), (NATIVELY | GATEWAYS, True, True)],
)
def test_a_host_looks_after_netfilter_as_it_needs_it(tmp_path, spec, always, asks_for_drops):
    agent = an_agent(tmp_path, FakeKernel())
    agent.spec = mesh.spec(**spec)
    jobs = agent._netfilter_jobs()
    assert jobs["filters"] == (agent._follow_filters if always else agent._follow_chains)
    assert ("chains" in jobs) is not always
    assert ("guard-drops" in jobs) is asks_for_drops


async def wait_for_an_apply(agent: Agent, looks: list[bool]) -> None:
    async with running(agent._follow_chains()):
        apply = asyncio.create_task(agent.kernel_call(time.sleep, 0.5))
        agent._chains_changed.set()
        await until(lambda: len(looks) == 1, "looked at after the apply")
        await apply
        agent._chains_changed.set()
        await until(lambda: len(looks) == 2, "and again soon")


def test_a_look_that_waited_for_an_apply_does_not_put_off_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHAINS_SHARE", 0.01)  # 50 s
    kernel = FakeKernel()
    looks: list[bool] = []

    def mend(settled: bool) -> Any:
        looks.append(settled)
        return (), 0

    monkeypatch.setattr(kernel, "mend_filters", mend, raising=False)
    asyncio.run(wait_for_an_apply(an_agent(tmp_path, kernel), looks))
    assert looks == [False, False]


async def tell_at_the_start(agent: Agent) -> None:
    async with running(agent._follow_chains(), agent._applier()):
        await asyncio.sleep(0)
        agent.wake()
        await until(lambda: bool(agent.progress.masqueraded), "it is told")


def test_a_precaution_that_was_refused_at_the_start_is_told_at_once(tmp_path, monkeypatch):
    kernel = FakeKernel()

    def mend(settled: bool) -> Any:
        if kernel.calls:
            raise NetworkError("no NAT here")
        return (), 0

    monkeypatch.setattr(kernel, "mend_filters", mend, raising=False)
    asyncio.run(tell_at_the_start(an_agent(tmp_path, kernel)))


async def refuse_a_route(agent: Agent, kernel: FakeKernel) -> None:
    async with running(agent._applier()):
        agent.wake()
        await until(lambda: len(kernel.calls) >= 3, "it is tried again")
        assert agent.progress.problems == kernel.problems
        assert agent.progress.applied is not None
        assert agent.progress.error == ""
        assert agent._last_good_wake.is_set(), "what comes after the kernel is done as well"
        kernel.problems = ()
        await until(lambda: not agent.progress.problems, "the way is free again")
        assert agent._again is None


def test_a_route_that_the_kernel_refuses_stops_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RETRY", (0.02, 0.02))
    kernel = FakeKernel()
    kernel.problems = ("cannot add route 10.102.0.0/28",)
    agent = an_agent(tmp_path, kernel)
    agent.watcher.synced = True
    asyncio.run(refuse_a_route(agent, kernel))
    assert [call for call, _ in kernel.calls[:2]] == ["start", "apply"]


async def fill_the_disk(agent: Agent, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(names: object) -> bool:
        raise OSError(28, "No space left on device")

    async with running(agent._applier()):
        with monkeypatch.context() as patch:
            patch.setattr(agent.names, "write", full)
            agent.wake()
            await until(lambda: bool(agent.progress.problems), "it is told")
            assert "No space left" in agent.progress.problems[0]
            agent.facts = replace(agent.facts, underlay_mtu=1400)
            agent.wake()
            await until(lambda: kernel.calls[-1:] == [("apply", 1350)], "the datapath goes on")
            assert agent.progress.error == ""
        await until(lambda: not agent.progress.problems, "the names are written when there is room")


def test_a_full_run_directory_does_not_stop_the_datapath(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RETRY", (0.02, 0.02))
    kernel = FakeKernel()
    agent = an_agent(tmp_path, kernel)
    (tmp_path / "run" / "dns").mkdir(parents=True)
    asyncio.run(fill_the_disk(agent, kernel, monkeypatch))
    assert [call for call, _ in kernel.calls] == ["start", "apply"]
    assert (tmp_path / "run" / "dns" / "hosts").exists()


async def beats_in(agent: Agent, seconds: float, monkeypatch: pytest.MonkeyPatch) -> int:
    beats: list[str] = []
    monkeypatch.setattr(loop.sdnotify, "notify", beats.append)
    monkeypatch.setenv("WATCHDOG_USEC", "80000")
    jobs = [asyncio.create_task(agent._applier()), asyncio.create_task(agent._feed_watchdog(0.04))]
    try:
        agent.wake()
        await asyncio.sleep(0.1)  # until the kernel is in it
        beats.clear()
        await asyncio.sleep(seconds)
        return len([text for text in beats if text.startswith("WATCHDOG=1")])
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)


def test_the_watchdog_is_fed_while_a_long_turn_gets_on(tmp_path, monkeypatch):
    kernel = FakeKernel()

    def work() -> None:
        for _ in range(60):
            time.sleep(0.01)
            kernel.done += 1

    kernel.work = work
    assert asyncio.run(beats_in(an_agent(tmp_path, kernel), 0.3, monkeypatch)) >= 5


def test_the_watchdog_is_fed_by_an_idle_agent(tmp_path, monkeypatch):
    assert asyncio.run(beats_in(an_agent(tmp_path, FakeKernel()), 0.3, monkeypatch)) >= 5


@pytest.mark.parametrize("status_asks", [False, True])
def test_a_kernel_call_that_hangs_is_left_to_the_watchdog(tmp_path, monkeypatch, status_asks):
    """Also one that somebody else than the applier made."""
    kernel = FakeKernel()
    release = threading.Event()
    agent = an_agent(tmp_path, kernel)

    async def story() -> int:
        asked = asyncio.create_task(agent.kernel_call(release.wait)) if status_asks else None
        try:
            return await beats_in(agent, 0.3, monkeypatch)
        finally:
            release.set()
            if asked is not None:
                await asked

    if not status_asks:
        kernel.work = release.wait  # type: ignore[assignment]
    assert asyncio.run(story()) == 0


def test_where_the_pods_are_that_are_left_alone(tmp_path, monkeypatch):
    """It is asked once a pod, known before anything is applied, and told as long as one is not found."""
    monkeypatch.setattr(loop, "RETRY", (0.02, 0.02))
    kernel = FakeKernel()
    first, second = (ip_address("10.244.1.5"), "uid-1"), (ip_address("10.244.1.6"), "uid-2")
    asked: list[set[Any]] = []
    there: dict[Any, int] = {first[0]: 77}

    def namespaces(addresses: Any) -> dict[Any, int]:
        asked.append(set(addresses))
        return {address: there[address] for address in addresses if address in there}

    monkeypatch.setattr(kernel, "namespaces", namespaces, raising=False)
    agent = an_agent(tmp_path, kernel)
    pods: frozenset[Any] = frozenset({first, second})

    def computed(spec: object, state: object, reach: object, facts: HostFacts, memory: object) -> Any:
        found = desired(spec, state, reach, facts, memory)  # type: ignore[arg-type]
        cookies = frozenset(facts.namespaces[pod] for pod in pods if pod in facts.namespaces)
        datapath = replace(found.datapath, untranslated=cookies)
        return replace(found, pods=replace(found.pods, untranslated=pods), datapath=datapath)

    monkeypatch.setattr(loop, "desired", computed)

    async def story() -> None:
        nonlocal pods
        applier = asyncio.create_task(agent._applier())
        try:
            agent.wake()
            await until(lambda: bool(agent.progress.problems), "one is not found")
            assert agent.progress.applied is not None
            assert agent.progress.applied.untranslated == {77}
            assert "10.244.1.6" in agent.progress.problems[0]
            there[second[0]] = 78
            await until(lambda: not agent.progress.problems, "it is found later")
            assert agent.progress.applied.untranslated == {77, 78}
            assert first[0] not in set().union(*asked[1:])
            pods = frozenset({second})
            agent._inputs = None
            agent.wake()
            await until(lambda: agent.progress.applied.untranslated == {78}, "what is gone is forgotten")
            assert agent.facts.namespaces == {second: 78}
        finally:
            applier.cancel()
            await asyncio.wait([applier])

    asyncio.run(story())
    assert kernel.calls[0][0] == "start"


async def lose_last_good(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, last: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "LAST_GOOD_DELAY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_write", full)
        agent.decoder.put(keys.vip_key("shop", "web"), b'{"ipv4": "10.111.0.10"}')
        agent._last_good_wake.set()
        with pytest.raises(OSError, match="No space left"):
            await agent._keep_last_good()
    async with running(agent._keep_last_good()):
        await until(agent.paths.last_good.exists, "written without another change")


def test_last_good_is_written_when_there_is_room_again(tmp_path, monkeypatch):
    asyncio.run(lose_last_good(an_agent(tmp_path, FakeKernel()), monkeypatch))


def test_a_service_without_an_address_is_warned_about_but_for_a_headless_one(tmp_path: Path) -> None:
    found = mesh.documents({"onprem": [1]})
    vip = b'{"ipv4":null,"released":null,"by":"kubernetes","affinity":"none","session_affinity":0,"kept":null}'
    agent = an_agent(tmp_path, FakeKernel())

    def warned() -> list[str]:
        agent.desired = desired(agent.spec, mesh.state(found), Reachability({}, frozenset()), agent.facts)
        return [words for words in status.warnings(agent, [], None) if "has no address yet" in words]

    del found[keys.vip_key("shop", "web")]
    assert len(warned()) == 1
    found[keys.vip_key("shop", "web")] = vip
    assert warned() == []


class FakeBpf:
    """The maps of a kernel: `said` has what was done to them."""

    said: list[str]

    def __init__(self, **_: object) -> None: ...
    def open(self, *_: object) -> None: ...
    def unpinned(self) -> list[str]:
        return []

    def attach_overlay(self, _: int) -> None: ...
    def attach_cgroup(self) -> None: ...
    def attach_wireguard(self, *_: object) -> None: ...
    def forget_wireguard(self) -> None: ...
    def use_underlay(self, *_: object) -> None: ...
    def attach_underlay(self, device: int) -> None:
        self.said.append(f"programs on {device}")

    def forget_underlay(self) -> None: ...
    def detach_underlay(self, _: list[int]) -> None: ...
    def apply(self, _: Datapath, read: bool = True) -> Any:
        self.said.append("maps")
        return type("Result", (), {"maps": {}, "problems": ()})


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> tuple[HostKernel, list[str]]:
    """A kernel of which nothing is real, and what is done to it, in order."""
    from isthmus_agent import netlink

    said: list[str] = []

    def network(datapath: Datapath, **_: object) -> Any:
        said.append(f"routes {' '.join(sorted(str(each.prefix) for each in datapath.routes))}".strip())
        return type("Result", (), {"changes": ()})

    monkeypatch.setattr(FakeBpf, "said", said, raising=False)
    monkeypatch.setattr(kernel_module, "BpfDatapath", FakeBpf)
    monkeypatch.setattr(netlink, "ensure_overlay", lambda port, mtu: said.append(f"device {mtu}") or 7)
    monkeypatch.setattr(netlink, "apply_network", network)
    monkeypatch.setattr(netlink.wireguard, "remove_device", lambda _: [])
    return HostKernel(), said


def test_the_device_follows_its_mtu(host: tuple[HostKernel, list[str]]) -> None:
    kernel, said = host
    kernel.start(Datapath(1, overlay_mtu=1450))
    kernel.apply(Datapath(1, overlay_mtu=1450))
    assert said == ["maps", "device 1450", "routes", "maps", "routes"]
    kernel.apply(Datapath(1, overlay_mtu=8950))
    assert said[5:] == ["maps", "device 8950", "routes"]


def test_a_route_is_there_before_a_service_leads_to_it_and_until_none_does(
    host: tuple[HostKernel, list[str]],
) -> None:
    kernel, said = host
    old, new = (Route(ip_network(text)) for text in ("10.102.0.0/28", "10.244.1.0/24"))
    kernel.start(Datapath(1, routes=frozenset({old})))
    said.clear()
    kernel.apply(Datapath(1, routes=frozenset({new})))
    assert said == ["routes 10.102.0.0/28 10.244.1.0/24", "maps", "routes 10.244.1.0/24"]
    said.clear()
    closed = Route(new.prefix, unreachable=True)
    kernel.apply(Datapath(1, routes=frozenset({closed})))
    assert said == ["maps", "routes 10.244.1.0/24"]


def test_a_native_route_too_but_by_a_device_that_has_the_programs(
    host: tuple[HostKernel, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another one it comes when that has them; until then nothing is said to be there that is not."""
    from isthmus_agent import netlink

    kernel, said = host
    ways = {ip_address(f"198.18.{number}.11"): Way(1 + number // 3) for number in (1, 2, 3)}
    monkeypatch.setattr(
        netlink, "underlay_ways", lambda routes, *_: ({each.toward: ways[each.toward] for each in routes}, [])
    )
    monkeypatch.setattr(netlink, "other_devices", list)
    monkeypatch.setattr(netlink.settings, "set_ipv4", lambda *_: None)
    first, second, third = (
        Route(ip_network(f"10.10{number}.0.0/28"), toward=ip_address(f"198.18.{number}.11")) for number in (1, 2, 3)
    )

    def datapath(*routes: Route) -> Datapath:
        return Datapath(1, routes=frozenset(routes), native=Native(ip_address("198.18.0.1"), changing=False))

    kernel.start(datapath(first))
    said.clear()
    kernel.apply(datapath(first, second))
    both = "routes 10.101.0.0/28 10.102.0.0/28"
    assert said == [both, "maps", "programs on 1", both]
    said.clear()
    kernel.apply(datapath(first, second, third))
    assert said == ["maps", "programs on 1", "programs on 2", f"{both} 10.103.0.0/28"]


def test_a_node_that_is_new_behind_wireguard_is_reached_by_it_at_once(
    host: tuple[HostKernel, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes there in clear is dropped: its peer comes first, then the routes, and only then what leads to it."""
    from isthmus_agent.netlink import settings, wireguard

    kernel, said = host
    own, first, second = (IPv4Address(f"198.18.{number}.11") for number in (0, 1, 2))

    def configure(wanted: WireGuard, _: str) -> Any:
        said.append(f"peers {' '.join(sorted(wanted.peers))}")
        return wireguard.Configured((), fresh=False)

    monkeypatch.setattr(settings, "set_ipv4", lambda *_: None)
    monkeypatch.setattr(wireguard, "ensure_device", lambda _mtu, name: wireguard.Device(8, wireguard.KERNEL))
    monkeypatch.setattr(wireguard, "configure", configure)

    def datapath(*nodes: IPv4Address) -> Datapath:
        peers = {str(each): WireGuardPeer(each, frozenset({each})) for each in nodes}
        device = WireGuard("isthmus_wg0", "/key", 51871, 1420, own, own, peers)
        routes = {Route(ip_network(each), own, table=732, wireguard=device.device) for each in nodes}
        return Datapath(1, routes=frozenset(routes), wireguard=(device,))

    kernel.start(datapath(first))
    said.clear()
    kernel.apply(datapath(second))
    assert said == [
        f"peers {first} {second}",
        f"routes {first}/32 {second}/32",
        "maps",
        f"peers {second}",
        f"routes {second}/32",
    ]


def test_a_session_is_begun_anew_only_with_who_is_a_peer_still(
    host: tuple[HostKernel, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus_agent.netlink import settings, wireguard

    kernel, said = host
    own = IPv4Address("198.18.0.11")
    monkeypatch.setattr(settings, "set_ipv4", lambda *_: None)
    monkeypatch.setattr(wireguard, "ensure_device", lambda _mtu, name: wireguard.Device(8, wireguard.KERNEL))
    monkeypatch.setattr(wireguard, "configure", lambda *_: wireguard.Configured((), fresh=False))
    monkeypatch.setattr(wireguard, "reopen", lambda _, publics: said.append(f"anew {' '.join(publics)}"))
    before, after = (
        WireGuard(
            "isthmus-wg0", "/key", 51871, 1420, own, own, {name: WireGuardPeer(own, frozenset()) for name in names}
        )
        for names in ("ab", "b")
    )
    kernel.start(Datapath(1, wireguard=(before,)))
    kernel.apply(Datapath(1, wireguard=(after,)))
    said.clear()
    kernel.reopen(before, ["a", "b"])
    kernel.reopen(before, ["a"])
    assert said == ["anew b"]


class FakeEtcd:
    """Lists `items`; its watches stand and say nothing. A canary is always there."""

    endpoint = "https://fake:1"

    def __init__(self, items: dict[str, bytes]) -> None:
        self.items = items
        self.revision = 10
        self.slow = ""  # lists of prefixes that begin with it wait for `answer`
        self.answer = asyncio.Event()

    async def range(self, prefix: str, **_: object) -> RangeResult:
        if self.slow and prefix.startswith(self.slow):
            await self.answer.wait()
        kvs = tuple(KeyValue(key, value) for key, value in self.items.items() if key.startswith(prefix))
        return RangeResult(kvs, self.revision, 7, 1)

    async def get(self, key: str, **_: object) -> KeyValue:
        return KeyValue(key, b"2026-01-02T03:04:05Z", mod_revision=self.revision)

    async def watch(self, *_: object, **__: object) -> AsyncGenerator[WatchBatch, None]:
        yield WatchBatch((), self.revision, 7)
        await asyncio.Event().wait()


async def watch_twice(items: dict[str, bytes], gone: str) -> tuple[set[str], set[str]]:
    decoder = mesh.decoder()
    etcd = FakeEtcd(items)
    watcher = StateWatcher(etcd, decoder, lambda: None)  # type: ignore[arg-type]
    found = []
    for _ in range(2):
        job = asyncio.create_task(watcher.run())
        try:
            await until(lambda: watcher.trusted and all(s.trusted for s in watcher.sources()), "all is listed")
            await until(lambda: set(decoder.documents()) == set(etcd.items), "all is decoded")
            found.append({source.prefix for source in watcher.sources()})
        finally:
            job.cancel()
            await asyncio.wait([job])
        etcd.items.pop(gone, None)
        etcd.revision += 1
    return found[0], found[1]


def test_a_watcher_that_failed_starts_from_what_is_known():
    """Peers are followed again, and what went meanwhile goes."""
    first, second = asyncio.run(
        watch_twice(mesh.documents({"cloud": [1]}), keys.node_key("cloud", "cloud-2", cached=True))
    )
    assert keys.cache_prefix("nodes", "cloud") in first
    assert first == second


async def decode_much(items: dict[str, bytes]) -> int:
    turns = 0
    decoder = mesh.decoder()
    watcher = StateWatcher(FakeEtcd(items), decoder, lambda: None)  # type: ignore[arg-type]
    async with running(watcher.run()):
        while not decoder.documents():
            await asyncio.sleep(0)
        while len(decoder.documents()) < len(items):
            assert not decoder.state().vips, "not a half"
            turns += 1
            await asyncio.sleep(0)
        await until(lambda: watcher.synced, "all is listed")
        assert len(decoder.state().vips) == len(items)
    return turns


def test_others_get_their_turn_while_much_is_decoded():
    items = {keys.vip_key("shop", f"s{number}"): b'{"ipv4": "10.111.0.10"}' for number in range(2000)}
    assert asyncio.run(decode_much(items)) >= 5


async def own_lists_come_first(items: dict[str, bytes]) -> None:
    decoder = mesh.decoder()
    etcd = FakeEtcd(items)
    etcd.slow = keys.CACHE_PREFIX
    said: list[tuple[bool, int]] = []
    watcher = StateWatcher(etcd, decoder, lambda: said.append((watcher.trusted, len(decoder.documents()))))  # type: ignore[arg-type]
    async with running(watcher.run()):
        await until(lambda: watcher.synced, "own lists are there")
        await until(lambda: keys.cache_prefix("ip", "edge") in {s.prefix for s in watcher.sources()}, "peers are known")
        etcd.answer.set()
        await until(lambda: watcher.trusted, "all lists are there")
    assert {count for trusted, count in said if trusted} == {len(items)}


def test_what_an_earlier_agent_left_is_kept_until_peers_are_listed_too():
    """Else an agent without last-known-good would take out every backend of every peer at its start."""
    asyncio.run(own_lists_come_first(mesh.documents({"onprem": [1], "cloud": [1]})))


# --- WireGuard


def an_encrypting_agent(tmp_path: Path, kernel: Any) -> Agent:
    agent = an_agent(tmp_path, kernel)
    wireguard = {"key": "/etc/isthmus/pki/wireguard.key", "port": 51871, "plain_sites": ["onprem"], "sites": {}}
    agent.spec = mesh.spec(wireguard=wireguard)
    return agent


async def change_the_network(agent: Agent, kernel: FakeKernel) -> None:
    async with running(agent._applier()):
        agent.wake()
        await until(lambda: agent.progress.applies == 1, "started")
        agent.wake()
        agent._note_network()
        await until(lambda: agent.progress.applies == 2, "applied again")


def test_what_others_do_to_devices_and_rules_is_looked_at_although_nothing_else_is_wanted(tmp_path):
    kernel = FakeKernel()
    kernel.network_changed = lambda: kernel.calls.append(("changed", 0))  # type: ignore[attr-defined]
    asyncio.run(change_the_network(an_encrypting_agent(tmp_path, kernel), kernel))
    assert kernel.calls == [("start", 1450), ("changed", 0), ("apply", 1450)]


def test_a_key_that_cannot_be_read_is_told_and_the_host_is_not_reported_without_one(tmp_path):
    kernel = FakeKernel()
    answers: list[Any] = [NetworkError("no key"), "A" * 43 + "=", NetworkError("gone"), "A" * 43 + "="]

    def public_key(path: str) -> str:
        assert path == "/etc/isthmus/pki/wireguard.key"
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    kernel.public_key = public_key  # type: ignore[attr-defined]
    agent = an_encrypting_agent(tmp_path, kernel)

    async def read() -> list[tuple[bool, Mapping[int, str], tuple[str, ...]]]:
        return [(await agent._read_key(), agent.facts.public_keys, agent._key_problems) for _ in range(4)]

    known = {51871: "A" * 43 + "="}
    assert asyncio.run(read()) == [
        (False, {}, ("no key",)),
        (True, known, ()),
        (False, known, ("gone",)),
        (False, known, ()),
    ]


def test_only_what_wireguard_hangs_on_is_a_change(monkeypatch):
    """Messages as the kernel sends them: header, then the body with the attributes."""
    told: list[str] = []
    watch = NetworkWatch(["isthmus-wg0", "isthmus-wg1"], ip_address("198.18.1.11"), lambda: told.append("changed"))

    def message(kind: int, body: bytes) -> bytes:
        return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body

    ours, others = b"\0" * 16 + b"isthmus-wg0\0", b"\0" * 16 + b"veth12\0\0\0\0\0\0"
    second = ours.replace(b"wg0", b"wg1")
    cases = [
        (16, ours, True),
        (17, ours, True),
        (17, second, True),
        (16, others, False),
        (20, ip_address("198.18.1.11").packed, True),
        (21, ip_address("198.18.1.12").packed, False),
        (32, b"\0" * 12, False),  # a new rule
        (33, b"\0" * 12, True),
        (80, b"\0" * 4, True),
    ]
    for kind, body, matters in cases:
        data = message(16, others) + message(kind, body)
        assert any(watch._matters(its, payload) for its, _, _, payload in messages.split(data)) is matters, (kind, body)


def test_native_routing_hangs_on_devices_filters_and_routes_of_others() -> None:
    watch = NetworkWatch("isthmus-wg0", ip_address("198.18.1.11"), lambda: None, native=True)
    ours, others = b"\2\x18\0\0\xfe\x49\0\1", b"\2\0\0\0\xfe\3\0\1"  # struct rtmsg, by its protocol
    cases = [
        (16, b"\0" * 16 + b"eth0\0", True),
        (24, ours, False),
        (24, others, True),
        (25, ours, True),
        (37, b"\0" * 20, True),
        (44, b"\0" * 20, False),  # a new filter
        (45, b"\0" * 20, True),
    ]
    for kind, body, matters in cases:
        assert watch._matters(kind, body) is matters, (kind, body)
