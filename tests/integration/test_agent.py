# SPDX-License-Identifier: GPL-3.0-or-later
"""The agent against a real etcd (TLS, access by certificate name) with a kernel that only remembers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import agent_mesh as mesh
import pytest
from integration.etcd_fixture import EtcdServer
from isthmus_agent.agent import certificates, loop
from isthmus_agent.agent.kernel import Applied, Reading
from isthmus_agent.agent.loop import Agent, Paths
from isthmus_agent.agent.main import metrics_server, routes
from isthmus_agent.bpf.driver import Counters
from isthmus_agent.cli.main import main as cli
from isthmus_agent.desired.compute import desired
from isthmus_agent.desired.datapath import Address, Backend, Datapath, Frontend, Service
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.etcd_admin import ensure_access, wanted_access
from isthmus_agent.kvstore import canary_value
from isthmus_agent.state.watch import own_prefixes, peer_prefixes
from isthmus_mesh import keys, wire
from isthmus_mesh.documents import HealthCheck
from isthmus_mesh.spec import NodeSpec

VIP = Frontend(IPv4Address("10.111.0.10"), 80, 6)
WEB = keys.workload_key("onprem-1", "shop", "web")
NODE = keys.node_report_key("onprem-1")
ALIVE = keys.alive_key("onprem-1")
CLOUD1, CLOUD2 = ("cloud", "cloud-1"), ("cloud", "cloud-2")


class FakeKernel:
    """Remembers what it was told; `problems` is what its audit finds."""

    def __init__(self, fresh: bool = True) -> None:
        self.fresh = fresh
        self.starts = 0
        self.applied: list[Datapath] = []
        self.destroyed: list[Backend] = []
        self.problems: list[str] = []
        self.failure: Exception | None = None

    @property
    def now(self) -> Datapath:
        return self.applied[-1]

    def is_fresh(self) -> bool:
        return self.fresh

    def held(self) -> dict[Frontend, Service]:
        return {}

    def underlay_mtu(self, address: Address) -> int:
        return 1500

    def start(self, datapath: Datapath) -> Applied:
        self.starts += 1
        self.problems = []
        return self.apply(datapath)

    def apply(self, datapath: Datapath) -> Applied:
        if self.failure is not None:
            raise self.failure
        self.applied.append(datapath)
        return Applied(("map svc",))

    def audit(self, datapath: Datapath) -> list[str]:
        return list(self.problems)

    def steps(self) -> int:
        return len(self.applied)

    def read(self) -> Reading:
        return Reading(Counters({}, {"unknown_peer": 0}, ()))

    def mend_filters(self, settled: bool = True) -> tuple[tuple[str, ...], int]:
        return (), 0

    def destroy(self, backends: Collection[Backend]) -> int:
        self.destroyed.extend(backends)
        return len(backends)

    def close(self) -> None:
        pass


def used(kernel: FakeKernel) -> set[str]:
    service = kernel.now.services.get(VIP) if kernel.applied else None
    return {str(backend.address) for backend in service.backends} if service is not None else set()


def settled(found: Agent, kernel: FakeKernel) -> bool:
    """Everything that etcd has was read and applied: lists come one by one."""
    if not found.watcher.trusted or not kernel.applied:
        return False
    return kernel.now == desired(found.spec, found.decoder.state(), Reachability(), found.facts).datapath


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd"), name="onprem") as server:
        _access(server)
        yield server


@pytest.fixture
def server(shared: EtcdServer) -> EtcdServer:
    """An etcd with authentication and no keys."""
    shared.etcdctl("del", "", "--from-key")
    return shared


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd that the test may stop, wipe and restore."""
    with EtcdServer(tmp_path / "etcd", name="onprem") as server:
        _access(server)
        yield server


def _access(server: EtcdServer) -> None:
    with server.sync_client() as client:
        wanted = wanted_access("onprem", ["onprem-1"], ["cloud", "edge"])
        ensure_access(client, wanted, apply=True, enable=True)


def spec_for(server: EtcdServer, **changes: object) -> NodeSpec:
    crt, key = server.ca.issue("isthmus-agent-onprem-1")
    etcd = {"endpoints": [server.endpoint], "ca": str(server.ca.crt), "cert": str(crt), "key": str(key)}
    return mesh.spec(etcd=etcd, **changes)


def fill(server: EtcdServer, documents: dict[str, bytes]) -> None:
    """Documents first, then the canaries, as a registrar does."""
    with server.sync_client() as client:
        for key, value in documents.items():
            client.put(key, value)
        cluster_id = client.put("isthmus/v1/lock", "").cluster_id
        canaries = {*own_prefixes("onprem").values()}
        for peer in ("cloud", "edge"):
            canaries |= {*peer_prefixes(peer).values()}
        for key in sorted(canaries):
            client.put(key, canary_value("2026-01-02T03:04:05Z", cluster_id))
        client.delete("isthmus/v1/lock")


@contextlib.asynccontextmanager
async def agent(
    spec: NodeSpec, kernel: FakeKernel, tmp_path: Path, cgroups: Path | None = None
) -> AsyncIterator[Agent]:
    from isthmus_agent.kvstore import EtcdClient

    root = cgroups or tmp_path / "cgroup"
    root.mkdir(exist_ok=True)
    client = EtcdClient(spec.etcd.endpoints, spec.etcd.ca, spec.etcd.cert, spec.etcd.key, timeout=1.0)
    found = Agent(spec, kernel, client, root, Paths(tmp_path / "state", tmp_path / "run"), boot_id="boot", probe=False)
    task = asyncio.create_task(found.run())
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


async def until(condition: Callable[[], object], what: str, deadline: float = 15.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        await asyncio.sleep(0.05)


async def never(condition: Callable[[], object], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert not condition(), what
        await asyncio.sleep(0.05)


async def dump(server: EtcdServer, prefix: str) -> dict[str, str]:
    return await asyncio.to_thread(server.dump, prefix)


async def in_etcd(server: EtcdServer, prefix: str, condition: Callable[[dict[str, str]], object], what: str) -> None:
    end = time.monotonic() + 15
    while not condition(found := await dump(server, prefix)):
        assert time.monotonic() < end, f"not within 15 s: {what}; there is {found}"
        await asyncio.sleep(0.1)


BACKENDS = {"onprem": [1, 2], "cloud": [1]}
ALL = {"10.101.0.2", "10.101.0.18", "10.102.0.2"}


def test_a_fresh_host_starts_without_etcd_and_follows_it(server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        kernel = FakeKernel()
        async with agent(spec_for(server), kernel, tmp_path) as found:
            await until(lambda: kernel.applied, "the spec alone is applied")
            await until(lambda: found.watcher.synced, "own etcd is listed")
            assert kernel.now.services == {}
            fill(server, mesh.documents(BACKENDS))
            await until(lambda: used(kernel) == ALL, "the service has its backends")
            await until(lambda: found.watcher.trusted, "canaries are believed")
            assert IPv4Address("10.101.0.2") in kernel.now.local
            hosts = (tmp_path / "run" / "dns" / "hosts").read_text()
            assert hosts == "10.111.0.10 web.shop.svc.clusterset.local\n"
            server.etcdctl("del", keys.service_key("cloud", "shop", "web", cached=True))
            await until(lambda: used(kernel) == ALL - {"10.102.0.2"}, "the peer's backend is withdrawn")
            draining = {str(backend.address) for backend in kernel.now.services[VIP].draining}
            assert draining == {"10.102.0.2"}, "its established connections go on"
            assert kernel.destroyed == []

    asyncio.run(story())


def test_it_reports_its_node_its_workloads_and_that_it_lives(server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        fill(server, mesh.documents(BACKENDS))
        cgroups = tmp_path / "cgroup"
        (cgroups / "system.slice" / "web.service").mkdir(parents=True)
        kernel = FakeKernel()
        async with agent(spec_for(server), kernel, tmp_path, cgroups):
            await in_etcd(server, WEB, lambda d: WEB in d, "the workload is reported")
            report = json.loads((await dump(server, WEB))[WEB])
            assert report["services"] == {"shop/web": {"ready": True}}, "no health check: it runs, so it is ready"
            assert report["addresses"] == ["10.101.0.2"]
            node = json.loads((await dump(server, NODE))[NODE])
            assert node["addresses"] == [
                {"Type": "InternalIP", "IP": "198.18.1.11"},
                {"Type": "CiliumInternalIP", "IP": "10.101.0.1"},
            ]
            assert (node["mtu"], node["boot_id"]) == (1500, "boot")
            inode = (cgroups / "system.slice" / "web.service").stat().st_ino
            assert kernel.now.workloads == {inode: IPv4Address("10.101.0.2")}
            await in_etcd(server, ALIVE, lambda d: ALIVE in d, "alive is there")
            lease = json.loads(server.etcdctl("get", ALIVE, "-w", "json"))["kvs"][0]["lease"]
            told = json.loads(server.etcdctl("lease", "timetolive", f"{lease:x}", "-w", "json"))
            assert told["granted-ttl"] == 10

            server.etcdctl("del", WEB)
            await in_etcd(server, WEB, lambda d: WEB in d, "a key that vanished is put again")
            (cgroups / "system.slice" / "web.service").rmdir()
            await until(lambda: kernel.now.workloads == {}, "the cgroup went")
            await in_etcd(
                server, WEB, lambda d: json.loads(d[WEB])["services"]["shop/web"] == {"ready": False}, "not ready"
            )
            (cgroups / "system.slice" / "web.service").mkdir()
            await until(lambda: kernel.now.workloads != {}, "the unit came back with another cgroup")
            await in_etcd(server, WEB, lambda d: json.loads(d[WEB])["services"]["shop/web"]["ready"], "ready again")

    asyncio.run(story())


def test_a_workload_that_is_no_longer_declared_is_withdrawn(server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        server.etcdctl("put", keys.workload_key("onprem-1", "shop", "old"), "{}")
        server.etcdctl("put", keys.workload_key("onprem-2", "shop", "old"), "{}")
        async with agent(spec_for(server), FakeKernel(), tmp_path):
            await in_etcd(
                server,
                keys.WORKLOADS_PREFIX,
                lambda d: set(d) == {WEB, keys.workload_key("onprem-2", "shop", "old")},
                "only this host's own stale key goes",
            )

    asyncio.run(story())


def test_a_start_with_etcd_down_is_made_from_last_known_good(own_server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        fill(own_server, mesh.documents(BACKENDS))
        first = FakeKernel()
        async with agent(spec_for(own_server), first, tmp_path):
            await until(lambda: used(first) == ALL, "applied from etcd")
            await until((tmp_path / "state" / "last-known-good.json").exists, "last-known-good is written")
            stat = (tmp_path / "state" / "last-known-good.json").stat()
            assert stat.st_mode & 0o777 == 0o600
        own_server.stop(signal.SIGKILL)
        second = FakeKernel(fresh=True)  # as after a reboot: no maps
        async with agent(spec_for(own_server), second, tmp_path) as found:
            await until(lambda: second.applied, "applied without etcd")
            assert second.applied[0] == first.now, "the very first apply is the whole datapath"
            assert found.progress.source == "last-known-good"
            await never(lambda: len(second.applied) > 1, "nothing changes while etcd is down", 1.5)
            own_server.start(wait=False)
            await until(lambda: found.watcher.trusted, "etcd is followed again", 30)
            assert second.now == first.now

    asyncio.run(story())


def test_a_stop_writes_the_last_changes_and_waits_for_no_disk(
    server: EtcdServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "LAST_GOOD_DELAY", 3600.0)
    file = tmp_path / "state" / "last-known-good.json"

    async def story(backends: dict[str, list[int]], expected: set[str]) -> None:
        fill(server, mesh.documents(backends))
        kernel = FakeKernel()
        async with agent(spec_for(server), kernel, tmp_path):
            await until(lambda: used(kernel) == expected, "applied from etcd")

    asyncio.run(story(BACKENDS, ALL))
    assert mesh.documents(BACKENDS).keys() <= json.loads(file.read_text())["documents"].keys()

    release, before = threading.Event(), file.read_bytes()

    def stuck(path: Path, last: object) -> None:
        release.wait(20)

    monkeypatch.setattr(loop, "_write", stuck)
    monkeypatch.setattr(loop, "LAST_GOOD_STOP", 0.1)
    watched = threading.Thread(target=asyncio.run, args=(story({**BACKENDS, "onprem": [1]}, ALL - {"10.101.0.18"}),))
    watched.start()
    try:
        deadline = time.monotonic() + 15
        while "the last changes are not in last-known-good" not in caplog.text:
            assert time.monotonic() < deadline, "the stop waits for the disk"
            time.sleep(0.05)
    finally:
        release.set()
        watched.join(30)
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}', '{"schema": 1, "documents": {"a": 1}}'])
def test_a_broken_last_known_good_leaves_the_pinned_maps_alone(
    server: EtcdServer, tmp_path: Path, content: str
) -> None:
    async def story() -> None:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "last-known-good.json").write_text(content)
        kernel = FakeKernel(fresh=False)
        async with agent(spec_for(server), kernel, tmp_path) as found:
            await until(lambda: found.watcher.synced, "own etcd, which is empty, is listed")
            await never(lambda: kernel.applied, "an empty etcd empties no map", 1.0)
            assert "no last-known-good" in found.progress.holding
            fill(server, mesh.documents(BACKENDS))
            await until(lambda: kernel.applied, "complete state is applied")
            assert used(kernel) == ALL
            assert len(kernel.now.peers) == 5, "at once and whole"

    asyncio.run(story())


def test_a_wiped_and_a_restored_etcd_withdraw_nothing(own_server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        server = own_server
        fill(server, mesh.documents({"onprem": [1]}))
        with server.sync_client() as client:
            snapshot = tmp_path / "snapshot.db"
            client.snapshot(snapshot)
        fill(server, mesh.documents(BACKENDS))
        kernel = FakeKernel()
        async with agent(spec_for(server), kernel, tmp_path) as found:
            await until(lambda: used(kernel) == ALL and settled(found, kernel), "applied")
            await in_etcd(server, WEB, lambda d: WEB in d, "reported")
            before = kernel.now

            server.stop(signal.SIGKILL)
            server.wipe()
            server.token = "another"  # noqa: S105 - tells etcd clusters apart
            server.start()
            _access(server)
            await in_etcd(server, WEB, lambda d: WEB in d, "the empty etcd gets our report again")
            await until(lambda: found.watcher.synced and found.watcher.connected(), "the empty etcd is followed")
            await never(lambda: kernel.now != before, "an empty etcd withdraws nothing", 2.0)

            server.stop(signal.SIGKILL)
            server.restore(snapshot, token="a third")  # noqa: S106
            server.start()
            await in_etcd(server, WEB, lambda d: WEB in d, "the old etcd gets our report again")
            await until(found.watcher.connected, "the old etcd is followed", 30)
            await never(lambda: kernel.now != before, "an old snapshot withdraws nothing", 2.0)

            fill(server, mesh.documents({"onprem": [1], "cloud": [2]}))
            await until(lambda: used(kernel) == {"10.101.0.2", "10.102.0.18"}, "new writes count, nobody stays stale")

    asyncio.run(story())


def test_bad_values_are_named_and_harm_nothing(server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        fill(server, mesh.documents(BACKENDS))
        kernel = FakeKernel()
        async with agent(spec_for(server), kernel, tmp_path) as found:
            await until(lambda: used(kernel) == ALL and settled(found, kernel), "applied")
            before = kernel.now
            node = keys.node_key("cloud", "cloud-1", cached=True)
            for key in (node, keys.service_key("cloud", "shop", "web", cached=True), keys.vip_key("shop", "web")):
                server.etcdctl("put", key, "{")
            await until(lambda: len(found.decoder.bad) == 3, "three keys are refused")
            assert kernel.now == before
            server.etcdctl("put", node, mesh.node("cloud", 1, mtu=1400).to_json())
            await until(lambda: kernel.now != before, "a good value is taken")
            assert node not in found.decoder.bad

    asyncio.run(story())


def test_a_node_that_is_withdrawn_is_no_peer_any_more(server: EtcdServer, tmp_path: Path) -> None:
    """As after `forget`: the programs drop packets from outer sources that are not in `peers` (unknown_peer)."""

    async def story() -> None:
        fill(server, mesh.documents(BACKENDS))
        kernel = FakeKernel()
        lost = {IPv4Address("198.18.1.12"), IPv4Address("198.18.2.11")}
        async with agent(spec_for(server), kernel, tmp_path):
            await until(lambda: used(kernel) == ALL, "applied")
            before = set(kernel.now.peers)
            assert lost < before
            server.etcdctl("del", keys.node_key("onprem", "onprem-2"))
            server.etcdctl("del", keys.node_key("cloud", "cloud-1", cached=True))
            await until(lambda: set(kernel.now.peers) == before - lost, "neither of them is a peer")

    asyncio.run(story())


def test_a_removed_peer_goes_and_its_keys_with_it(server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        fill(server, mesh.documents(BACKENDS))
        kernel = FakeKernel()
        async with agent(spec_for(server), kernel, tmp_path):
            await until(lambda: used(kernel) == ALL, "applied")
            server.etcdctl("del", keys.cluster_config_key("cloud"))
            await until(lambda: used(kernel) == {"10.101.0.2", "10.101.0.18"}, "its backends go")
            assert 2 not in {peer.cluster_id for peer in kernel.now.peers.values()}

    asyncio.run(story())


def test_health_decides_who_is_ready(server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        answers = {"status": b"200 OK"}

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b"HTTP/1.1 " + answers["status"] + b"\r\n\r\n")
            writer.close()

        listener = await asyncio.start_server(serve, "127.0.9.2", 0)
        port = listener.sockets[0].getsockname()[1]
        check = HealthCheck("http", port=port, path="/healthz", interval=0.1, timeout=0.5, rise=2, fall=2)
        documents = mesh.documents(BACKENDS)
        documents[keys.service_definition_key("shop", "web")] = mesh.web_definition(health=check).to_json().encode()
        fill(server, documents)
        workloads = mesh.spec_document()["workloads"]
        workloads[0]["address4"] = "127.0.9.2"
        spec = spec_for(server, workloads=workloads)

        def ready(value: bool) -> Callable[[dict[str, str]], object]:
            return lambda d: WEB in d and json.loads(d[WEB])["services"] == {"shop/web": {"ready": value}}

        async with agent(spec, FakeKernel(), tmp_path) as found:
            await in_etcd(server, WEB, ready(True), "ready")
            answers["status"] = b"503 Busy"
            await in_etcd(server, WEB, ready(False), "an error status takes it out")
            state = next(iter(found.checks.states().values()))
            assert state.reason == "HTTP status 503"
            answers["status"] = b"204 Fine"
            await in_etcd(server, WEB, ready(True), "back in")
            listener.close()
            await listener.wait_closed()
            await in_etcd(server, WEB, ready(False), "a stopped process takes it out")
        async with agent(spec, FakeKernel(), tmp_path):
            await asyncio.sleep(0.5)
            assert ready(False)(await dump(server, WEB)), "a restart of the agent reports nothing new by itself"

    asyncio.run(story())


def test_a_restart_does_not_withdraw_a_ready_backend(server: EtcdServer, tmp_path: Path) -> None:
    """The first verdict after a start needs as much proof as any other; until then the last one stands."""

    async def story() -> None:
        check = HealthCheck("tcp", port=9, interval=0.2, rise=2, fall=100)
        documents = mesh.documents(BACKENDS)
        documents[keys.service_definition_key("shop", "web")] = mesh.web_definition(health=check).to_json().encode()
        fill(server, documents)
        report = {"name": "web", "namespace": "shop", "node": "onprem-1", "host_ip": "198.18.1.11"}
        report["services"] = {"shop/web": {"ready": True}}
        server.etcdctl("put", WEB, json.dumps(report))
        workloads = mesh.spec_document()["workloads"]
        workloads[0]["address4"] = "127.0.9.3"
        async with agent(spec_for(server, workloads=workloads), FakeKernel(), tmp_path) as found:
            await until(lambda: found.reporter.writes > 0, "the report was completed")
            await until(lambda: any(s.fails >= 2 for s in found.checks.states().values()), "checks fail")
            services = json.loads((await dump(server, WEB))[WEB])["services"]
            assert services == {"shop/web": {"ready": True}}

    asyncio.run(story())


def test_reachability_orders_backends_and_ends_sockets_only_with_proof(server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        fill(server, mesh.documents({"cloud": [1, 2], "edge": [1]}))
        kernel = FakeKernel()
        async with agent(spec_for(server), kernel, tmp_path) as found:
            await until(lambda: used(kernel) == {"10.102.0.2", "10.102.0.18", "10.103.0.2"}, "applied")
            await until(lambda: CLOUD1 in found.prober.table.states, "holders of backends are probed")
            table, edge = found.prober.table, ("edge", "edge-1")
            for second in range(3):
                for node in (CLOUD1, CLOUD2, edge):
                    table.record(node, None, float(second))
            found.wake()
            await never(lambda: len(used(kernel)) != 3 or kernel.destroyed, "who reaches none changes nothing", 0.5)
            for second in range(2):
                table.record(edge, 0.001, float(second))
            found.wake()
            await until(lambda: used(kernel) == {"10.103.0.2"}, "the reachable one gets all new flows")
            await until(lambda: kernel.destroyed, "sockets to the others end")
            assert {str(backend.address) for backend in kernel.destroyed} == {"10.102.0.2", "10.102.0.18"}
            for second in range(2):
                table.record(CLOUD1, 0.001, float(second))
            found.wake()
            await until(lambda: used(kernel) == {"10.102.0.2", "10.103.0.2"}, "who answers again is used again")

    asyncio.run(story())


def test_a_kernel_that_refuses_is_tried_again_and_told(server: EtcdServer, tmp_path: Path) -> None:
    async def story() -> None:
        from isthmus_agent.bpf.errors import BpfError

        kernel = FakeKernel()
        kernel.failure = BpfError("map svc is full")
        async with agent(spec_for(server), kernel, tmp_path) as found:
            await until(lambda: found.progress.errors >= 2, "it tries again")
            assert found.progress.error == "map svc is full"
            kernel.failure = None
            await until(lambda: kernel.applied, "it heals")
            await until(lambda: not found.progress.error, "and says so")

    asyncio.run(story())


def test_status_services_peers_and_audit(
    server: EtcdServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        fill(server, mesh.documents(BACKENDS))
        kernel = FakeKernel()
        async with agent(spec_for(server), kernel, tmp_path) as found:
            await until(lambda: used(kernel) == ALL and settled(found, kernel), "applied")
            await until(found.watcher.connected, "all watches stand")
            api = routes(found)
            await api.listen_unix(found.paths.socket)
            scrape = metrics_server(found)
            await scrape.listen_tcp("127.0.0.1", 0)
            try:
                assert found.paths.socket.stat().st_mode & 0o777 == 0o600

                async def run(*arguments: str) -> tuple[int, str]:
                    code = await asyncio.to_thread(cli, ["--socket", str(found.paths.socket), *arguments])
                    return code, capsys.readouterr().out

                code, text = await run("status", "-o", "json")
                document = json.loads(text)
                assert code == 0
                assert document["datapath"]["state"] == "applied"
                assert document["etcd"]["connected"] is True
                assert document["workloads"][0]["identity"] == 65537
                assert any("shop/web does not run" in words for words in document["warnings"])

                found.progress.problems = ("cannot add route 10.102.0.0/28",)
                with monkeypatch.context() as patched:
                    ended = certificates.Validity(0.0, 1577923200.0)
                    patched.setattr(certificates, "read", lambda _: {"registrar": ended})
                    code, text = await run("status")
                found.progress.problems = ()
                assert "datapath   applied" in text
                assert "! the kernel refuses part of the network: cannot add route 10.102.0.0/28" in text
                assert "! certificate registrar ended at 2020-01-02 00:00 UTC" in text
                code, text = await run("services")
                assert code == 0
                assert "shop/web" in text
                assert "cloud/cloud-1" in text
                code, text = await run("peers", "-o", "json")
                cloud = json.loads(text)["peers"][0]
                # The registrar's last word is months old: whatever it says, that is no proof.
                assert (cloud["name"], cloud["registrar_says"], cloud["state"]) == ("cloud", "connected", "silent")
                assert cloud["age"] > 86400

                assert await run("audit") == (0, "the kernel holds what is wanted\n")
                kernel.problems = ["local: 10.9.9.9 (identity 6) is not wanted"]
                code, text = await run("audit", "-o", "json")
                assert code == 1
                assert json.loads(text) == {"problems": ["local: 10.9.9.9 (identity 6) is not wanted"]}
                starts = kernel.starts
                code, text = await run("audit", "--repair")
                assert code == 0
                assert kernel.starts == starts + 1
                assert found.progress.repaired == 1

                assert scrape._server is not None
                port = scrape._server.sockets[0].getsockname()[1]
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
                body = (await reader.read()).decode()
                writer.close()
                assert "isthmus_datapath_applied 1.0" in body
                assert "isthmus_etcd_connected 1.0" in body
                assert "isthmus_network_problems 0.0" in body
                assert 'isthmus_certificate_expiry_seconds{name="isthmus-agent-onprem-1"}' in body
                assert 'isthmus_service_connects_total{cluster="cloud"' in body
            finally:
                await api.close()
                await scrape.close()

    asyncio.run(story())


def test_300_quick_changes_of_pods_leave_nothing_stale(server: EtcdServer, tmp_path: Path) -> None:
    """Pods start and die and their addresses go to others, as fast as etcd takes it: no address ever goes back to an
    identity that it had before, and in the end the kernel has what is published."""
    plain = mesh.spec_document()
    ranges = {"pod_ranges4": ["10.244.0.0/16"], "service_range4": "10.96.0.0/16"}
    spec = spec_for(
        server,
        cluster={**plain["cluster"], "kubernetes": ranges},
        node={**plain["node"], "kubernetes_node": "worker-1"},
    )
    chance = random.Random(3)  # noqa: S311
    identities: dict[str, list[int]] = {}
    published: dict[str, int] = {}

    def restart_pods() -> None:
        with server.sync_client() as client:
            for number in range(300):
                address = f"10.244.1.{chance.randint(2, 12)}"
                if address in published and chance.random() < 0.4:
                    del published[address]
                    client.delete(keys.ip_key(address))
                else:
                    published[address] = (1 << 16) + 100 + number
                    identities.setdefault(address, []).append(published[address])
                    pair = wire.IPIdentityPair(address, published[address], "198.18.1.11", namespace="shop")
                    client.put(keys.ip_key(address), pair.to_json())

    def local(datapath: Datapath) -> dict[str, int]:
        return {str(key): value for key, value in datapath.local.items() if str(key).startswith("10.244.")}

    async def story() -> None:
        fill(server, mesh.documents(BACKENDS))
        kernel = FakeKernel()
        async with agent(spec, kernel, tmp_path) as found:
            await until(lambda: settled(found, kernel), "all is applied")
            await asyncio.to_thread(restart_pods)
            await until(lambda: local(kernel.now) == published, "the kernel has what is published")
            assert len(kernel.applied) > 10, "it followed, and did not only see the end"
            seen: dict[str, int] = {}
            for datapath in kernel.applied:
                for address, identity in local(datapath).items():
                    assert identity >= seen.get(address, 0), f"{address} went back"
                    assert identity in identities[address]
                    seen[address] = identity

    asyncio.run(story())


def test_the_cli_says_when_the_agent_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["--socket", str(tmp_path / "none.sock"), "status"]) == 2
    assert "systemctl status isthmusd" in capsys.readouterr().err
    assert cli(["--socket", str(tmp_path / "none.sock"), "peers", "-o", "json"]) == 2
    assert "does not answer" in json.loads(capsys.readouterr().out)["error"]
