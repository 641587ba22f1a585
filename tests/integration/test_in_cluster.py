# SPDX-License-Identifier: GPL-3.0-or-later
"""A cluster whose control plane is in it, without containers: its registrar and its agents as their pods run them, with
the cluster's document, a service account's token and one certificate for all agents, over a real kube-apiserver and
real etcds."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from integration.kubernetes_fixture import ApiServer
from integration.registrar_cluster import Cluster, running
from integration.registrar_cluster import until as until_seconds
from integration.test_agent import FakeKernel
from isthmus_agent import netlink
from isthmus_agent.agent.loop import Paths
from isthmus_agent.agent.main import main as isthmusd
from isthmus_agent.agent.main import start_in_cluster
from isthmus_agent.bpf.driver import BpfDatapath
from isthmus_agent.etcd_admin import ensure_access, wanted_access
from isthmus_agent.kvstore import canary_value
from isthmus_agent.kvstore.errors import EtcdError
from isthmus_agent.registrar import service as registrar_service
from isthmus_agent.registrar.service import Registrar
from isthmus_mesh import keys
from isthmus_mesh.documents import NodeAllocation
from isthmus_mesh.spec import ClusterDocument
from isthmus_mesh.wire import Node
from kubernetes_objects import namespace, node, pod

ACCOUNT = "system:serviceaccount:isthmus-system:isthmus-registrar"
DEADLINE = 60.0
RESOURCES = ("nodes", "namespaces", "pods", "services", "endpointslices")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("kubernetes")) as found:
        for name in ("shop", "isthmus-system"):
            found.create("namespaces", namespace(name))
        path = "/api/v1/namespaces/isthmus-system/serviceaccounts"
        found.request("POST", path, {"metadata": {"name": "isthmus-registrar"}})
        found.allow(ACCOUNT, ("get", "list", "watch", "create", "patch", "delete"), *RESOURCES)
        yield found


@pytest.fixture
def api(server: ApiServer) -> Iterator[ApiServer]:
    """The API server with two nodes and a pod."""
    for number in (1, 2):
        server.create("nodes", node(f"n{number}", f"10.244.{number}.0/24", f"198.18.4.{10 + number}"))
    server.create("pods", pod("web-1", "10.244.1.2", "n1"))
    yield server
    server.delete("pods", "shop", "web-1")
    for entry in server.request("GET", server.path("nodes"))["items"]:
        server.delete("nodes", "", entry["metadata"]["name"])


class Managed(Cluster):
    def __init__(self, directory: Path, server: ApiServer) -> None:
        super().__init__(directory, "kube")
        self.ranges.append("10.244.0.0/16")
        self.api = server
        self.token = directory / "token"
        self.renew_token()

    def renew_token(self) -> None:
        path = "/api/v1/namespaces/isthmus-system/serviceaccounts/isthmus-registrar/token"
        self.token.write_text(self.api.request("POST", path, {"spec": {}})["status"]["token"])

    def prepare(self) -> None:
        with self.server.sync_client() as client:
            ensure_access(client, wanted_access("kube", [], ["onprem"], in_cluster=True), apply=True, enable=True)

    def record(self, hosts: int, revision: int = 1) -> dict[str, str]:
        found = super().record(0, revision)
        key = keys.estate_cluster_key("kube")
        document = json.loads(found[key]) | {"control_plane": "in_cluster", "ca_host": "", "node_prefix": 28}
        document["etcd"] |= {"members": [], "initial": "", "replicas": 1}
        return {**found, key: json.dumps(document)}

    def text(self, *peers: Cluster) -> str:
        """The cluster's document."""
        document = self.spec_document("", *peers)
        crt, key = self.server.ca.issue("isthmus-agents")
        document["etcd"] |= {"cert": str(crt), "key": str(key)}
        document["cluster"]["kubernetes"] = {"pod_ranges4": ["10.244.0.0/16"], "service_range4": "10.96.0.0/16"}
        api = {"server": self.api.url, "ca": str(self.api.ca.crt), "token": str(self.token)}
        document["registrar"]["kubernetes"] = api
        for name in ("host", "node", "workloads", "member", "pki"):
            del document[name]
        return json.dumps({"kind": "cluster", **document})

    def document(self) -> ClusterDocument:
        return ClusterDocument(self.text())

    def in_pod(self, pod_name: str, *peers: Cluster) -> Registrar:
        spec = ClusterDocument(self.text(*peers)).of_pod(pod_name)
        return Registrar(spec, estate_file=self.estate_file, state_directory=self.state_directory(pod_name))

    def allocation(self, name: str) -> NodeAllocation | None:
        found = self.server.dump(keys.alloc_node_key(name)).get(keys.alloc_node_key(name))
        return None if found is None else NodeAllocation.from_json(found)

    def node_of(self, name: str) -> Node | None:
        key = keys.node_key("kube", name)
        found = self.server.dump(key).get(key)
        return None if found is None else Node.from_json(found)


@pytest.fixture
def managed(tmp_path: Path, api: ApiServer) -> Iterator[Managed]:
    with Managed(tmp_path, api) as cluster:
        cluster.put(cluster.record(0))
        yield cluster


@contextlib.asynccontextmanager
async def agent(cluster: Managed, name: str, place: Path) -> AsyncIterator[tuple[FakeKernel, asyncio.Task[bool]]]:
    """The agent of a node, with a kernel that only remembers."""
    kernel = FakeKernel()
    root = place / "cgroup"
    root.mkdir(parents=True, exist_ok=True)
    paths = Paths(place / "state", place / "run")
    task = asyncio.create_task(start_in_cluster(cluster.document(), name, kernel, root, paths, None))
    try:
        yield kernel, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def told(caplog: pytest.LogCaptureFixture) -> str:
    """What was logged, with its fields."""
    return "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)


async def until(condition: Callable[[], Any], what: str) -> Any:
    return await until_seconds(condition, what, DEADLINE)


async def here(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.05)


def test_a_node_joins_by_itself_and_leaves_when_kubernetes_says_so(
    managed: Managed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrar_service, "DRAIN", 0.5)

    async def run() -> None:
        async with running(managed.in_pod("isthmus-registrar-a")), agent(managed, "n1", tmp_path / "n1") as (kernel, _):
            dealt = await until(lambda: managed.allocation("n1"), "a range for n1")
            assert (dealt.range4, dealt.underlay4) == ("10.104.0.0/28", "198.18.4.11")
            await until(lambda: managed.node_of("n1"), "n1 is published")
            found = managed.node_of("n1")
            assert found is not None
            assert [str(cidr) for cidr in found.cidrs()] == ["10.104.0.0/28", "10.244.1.0/24"]
            await until(lambda: "10.244.1.2" in str(managed.server.dump(keys.ip_key("10.244.1.2"))), "its pod too")
            alive = managed.server.dump(keys.ALIVE_PREFIX)
            assert list(alive) == [keys.alive_key("n1")]
            # n2 has its range already, but nobody sends there: its agent is not there.
            assert managed.allocation("n2") is not None
            assert managed.node_of("n2") is None
            async with agent(managed, "n2", tmp_path / "n2"):
                await until(lambda: managed.node_of("n2"), "n2 is published")
                # Each knows the way to the other.
                await here(
                    lambda: kernel.applied and IPv4Address("198.18.4.12") in kernel.now.peers, "n1 takes what n2 sends"
                )
            managed.api.delete("nodes", "", "n2")
            await until(lambda: managed.node_of("n2") is None, "n2 has left")
            gone = managed.allocation("n2")
            assert gone is not None
            assert gone.released is not None

    asyncio.run(run())


def test_an_agent_waits_with_words_and_follows_what_it_is_dealt(
    managed: Managed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with agent(managed, "n1", tmp_path) as (kernel, task):
            await here(
                lambda: "has dealt node n1 no range of the mesh yet" in told(caplog), "it says what it waits for"
            )
            assert not kernel.applied
            managed.put(
                {keys.alloc_node_key("n1"): NodeAllocation("10.104.0.0/28", "10.104.0.1", "198.18.4.11", "").to_json()}
            )
            await here(lambda: kernel.applied, "it starts")
            moved = NodeAllocation("10.104.0.0/28", "10.104.0.1", "198.18.4.99", "")
            managed.put({keys.alloc_node_key("n1"): moved.to_json()})
            async with asyncio.timeout(DEADLINE):
                assert await task  # to begin anew with it
        managed.server.stop()
        async with agent(managed, "n1", tmp_path) as (kernel, _):
            await here(lambda: kernel.applied, "it starts without etcd, from what it kept")
        async with agent(managed, "n2", tmp_path) as (kernel, _):
            await here(lambda: "what was dealt before is not used" in caplog.text, "another node's is not taken")
            assert not kernel.applied
        managed.server.start()

    asyncio.run(run())


def test_an_agent_follows_an_etcd_that_began_anew_once_a_registrar_has_filled_it(
    managed: Managed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, snapshot = keys.alloc_node_key("n1"), tmp_path / "snapshot.db"
    managed.put({key: NodeAllocation("10.104.0.16/28", "10.104.0.17", "198.18.4.11", "").to_json()})
    managed.server.etcdctl("snapshot", "save", str(snapshot))
    managed.put({key: NodeAllocation("10.104.0.0/28", "10.104.0.1", "198.18.4.11", "").to_json()})

    async def run() -> None:
        async with agent(managed, "n1", tmp_path) as (kernel, task):
            await here(lambda: kernel.applied, "it starts")
            managed.server.stop()
            managed.server.restore(snapshot, token="anew")  # noqa: S106 - no secret
            managed.server.start()
            await here(lambda: f"holding 1 keys of {key}" in caplog.text, "it keeps what it has")
            assert not task.done()
            with managed.server.sync_client() as client:
                now = canary_value("2026-01-02T03:04:05Z", client.status().header.cluster_id)
                client.put(keys.canary_key("kube", "services"), now)
            async with asyncio.timeout(DEADLINE):
                assert await task

    asyncio.run(run())


def test_a_released_range_does_not_stop_a_running_agent(managed: Managed, tmp_path: Path) -> None:
    async def run() -> None:
        dealt = NodeAllocation("10.104.0.0/28", "10.104.0.1", "198.18.4.11", "")
        managed.put({keys.alloc_node_key("n1"): dealt.to_json()})
        async with agent(managed, "n1", tmp_path) as (kernel, task):
            await here(lambda: kernel.applied, "it starts")
            gone = NodeAllocation(dealt.range4, dealt.mesh4, dealt.underlay4, "", "2026-01-02T03:04:05Z")
            managed.put({keys.alloc_node_key("n1"): gone.to_json()})
            await until(lambda: managed.server.dump(keys.alive_key("n1")), "it reports")
            await asyncio.sleep(1.5)  # longer than it takes to notice
            assert not task.done()

    asyncio.run(run())


def test_agents_of_one_certificate_write_reports_and_nothing_else(managed: Managed) -> None:
    with managed.server.sync_client("isthmus-agents") as client:
        client.put(keys.node_report_key("n1"), "{}")
        client.put(keys.alive_key("n2"), "{}")
        for forbidden in (
            keys.alloc_node_key("n1"),
            keys.node_key("kube", "n1"),
            keys.workload_key("n1", "shop", "web"),
            keys.ROSTER,
        ):
            with pytest.raises(EtcdError):
                client.put(forbidden, "{}")


def test_the_api_is_absent_and_what_is_there_stays(managed: Managed, tmp_path: Path) -> None:
    async def run() -> None:
        async with agent(managed, "n1", tmp_path / "n1"):
            async with running(managed.in_pod("isthmus-registrar-a")):
                await until(lambda: managed.node_of("n1"), "n1 is published")
            before = managed.server.dump("cilium/state/")
            managed.api.stop()
            try:
                async with running(managed.in_pod("isthmus-registrar-b")):  # knows nothing but what etcd has
                    leads = keys.LEADER
                    await until(lambda: "isthmus-registrar-b" in str(managed.server.dump(leads)), "b leads")
                    await until(
                        lambda: '"absent"' in str(managed.server.dump(keys.KUBERNETES_STATUS)), "it says what is away"
                    )
                    assert managed.server.dump("cilium/state/") == before
                    assert managed.allocation("n2") is not None
            finally:
                managed.api.start()

    asyncio.run(run())


def test_a_token_is_read_again_when_it_was_renewed(managed: Managed) -> None:
    async def run() -> None:
        managed.token.write_text("not a token")
        async with running(managed.in_pod("isthmus-registrar-a")):
            status = keys.KUBERNETES_STATUS
            await until(
                lambda: "it does not accept the service account" in str(managed.server.dump(status)), "it is refused"
            )
            managed.renew_token()
            await until(lambda: managed.allocation("n1"), "nodes are dealt")

    asyncio.run(run())


def test_peers_take_its_nodes_for_senders(managed: Managed, tmp_path: Path) -> None:
    async def run() -> None:
        with Cluster(tmp_path, "onprem") as onprem:
            onprem.put_all(1)
            async with (
                running(managed.in_pod("isthmus-registrar-a", onprem), onprem.registrar(managed)),
                agent(managed, "n1", tmp_path / "n1"),
            ):
                key = keys.node_key("kube", "n1", cached=True)
                await until(lambda: onprem.server.dump(key), "n1 is mirrored")
                found = Node.from_json(onprem.server.dump(key)[key])
                assert found.tunnel_endpoint(4) == "198.18.4.11"
                await until(lambda: onprem.server.dump(keys.ip_key("10.244.1.2", "kube")), "its pod is mirrored")
                await until(
                    lambda: managed.server.dump(keys.node_key("onprem", "h1", cached=True)), "and the other way round"
                )

    asyncio.run(run())


def test_a_node_that_another_network_has_is_refused_with_words(
    managed: Managed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ansible does not enter it, so its agent looks, before it changes anything there."""
    monkeypatch.setenv("ISTHMUS_NODE", "n1")
    monkeypatch.setattr(BpfDatapath, "strangers", lambda _self: {"connect4": ["cil_sock4_conne"]})
    monkeypatch.setattr(netlink, "overlays_of_others", lambda _port: ["flannel.1"])
    file, pins = tmp_path / "cluster.json", tmp_path / "pins"
    file.write_text(managed.text())
    assert isthmusd(["--config", str(file), "--metrics", "none", "--pin-dir", str(pins)]) == 78
    told = capsys.readouterr().err
    assert "at the mesh's hooks connect4: cil_sock4_conne, Cilium's" in told
    assert "is used by the VXLAN device flannel.1 (flannel's, of k3s or Kubernetes)" in told
    assert not pins.exists()


def test_a_pod_that_does_not_know_its_node_says_so(
    managed: Managed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ISTHMUS_NODE", raising=False)
    file = tmp_path / "cluster.json"
    file.write_text(managed.text())
    assert isthmusd(["--config", str(file), "--metrics", "none"]) == 78
    assert "ISTHMUS_NODE does not say on which node this is" in capsys.readouterr().err
