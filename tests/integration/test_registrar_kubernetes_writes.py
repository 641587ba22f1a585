# SPDX-License-Identifier: GPL-3.0-or-later
"""What a registrar writes into a real kube-apiserver: machine services as Services, backends elsewhere as
EndpointSlices; by the leader only, nothing of others, and nothing that is so already."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_access as access
from integration.kubernetes_fixture import ApiServer
from integration.module_runner import run_module
from integration.registrar_cluster import Cluster, running, until
from integration.test_registrar_kubernetes import READ, RESOURCES, USER, Kube
from isthmus_agent.registrar.kubernetes.client import Api, Conflict
from isthmus_agent.registrar.kubernetes.sink import Sink
from isthmus_agent.registrar.kubernetes.source import Source
from isthmus_agent.registrar.kubernetes.wanted import Mesh
from isthmus_agent.registrar.leader import NotLeader
from isthmus_mesh import keys
from isthmus_mesh.documents import ServiceDefinition, ServicePort
from isthmus_mesh.spec import KubernetesApiSpec
from isthmus_mesh.wire import ClusterService, L4Addr
from kubernetes_objects import endpoint, endpoint_slice, namespace, node, pod, service

OWN = access.labels("lab", "kube")
ROLE = {"rules": access.cluster_role(OWN)["rules"]}
WEB = ServiceDefinition(
    "web", "shop", (ServicePort("http", 80, 8080),), {"app": "web"}, is_global=True, kubernetes=True
)
KEY = keys.service_definition_key("shop", "web")
VIP = keys.vip_key("shop", "web")
MACHINE, ONPREM = "10.104.3.2", "10.101.1.2"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("kubernetes")) as found:
        for number in (1, 2):
            found.create("nodes", node(f"kube-{number}", f"10.244.{number}.0/24", f"198.18.4.{10 + number}"))
        found.create("namespaces", namespace("shop"))
        yield found


@pytest.fixture
def api(server: ApiServer) -> Iterator[ApiServer]:
    """The API server with nothing in the namespace `shop`, and the registrar let in as the product lets it in."""
    server.allow(USER, READ, *RESOURCES)
    server.patch("clusterroles", "", USER, ROLE)
    yield server
    if server.process is None:
        server.start()
    for resource in ("pods", "services", "endpointslices"):
        for entry in server.request("GET", server.path(resource, "shop"))["items"]:
            server.delete(resource, "shop", entry["metadata"]["name"])


class Hybrid(Kube):
    """The Kubernetes cluster with a machine, h3, that serves `shop/web`."""

    def host(self, number: int) -> dict[str, Any]:
        return super().host(number) if number < 3 else Cluster.host(self, number)

    def put_hosts(self) -> None:
        self.put({**self.record(3), **self.node(1), **self.node(2), **self.node(3), **self.web(3)})

    def define(self, **more: Any) -> None:
        given = {name: getattr(WEB, name) for name in WEB.__dataclass_fields__}
        self.put({KEY: ServiceDefinition(**{**given, **more}).to_json()})

    def undefine(self) -> None:
        self.server.etcdctl("del", KEY)

    def vip(self) -> dict[str, Any]:
        return dict(json.loads(self.server.dump(VIP).get(VIP, "{}")))

    def objects(self, resource: str) -> dict[str, dict[str, Any]]:
        """Those of the registrar, by name."""
        found = self.api.request("GET", self.api.path(resource, "shop"))["items"]
        return {
            one["metadata"]["name"]: one for one in found if OWN.items() <= one["metadata"].get("labels", {}).items()
        }

    def web_service(self) -> dict[str, Any]:
        return self.objects("services").get("web", {})

    def endpoints(self) -> dict[str, set[str]]:
        """Addresses by the cluster that they are of."""
        found: dict[str, set[str]] = {}
        for one in self.objects("endpointslices").values():
            source = one["metadata"]["labels"]["multicluster.kubernetes.io/source-cluster"]
            found.setdefault(source, set()).update(entry["addresses"][0] for entry in one["endpoints"])
        return found

    def versions(self) -> dict[str, str]:
        return {
            f"{resource}/{name}": one["metadata"]["resourceVersion"]
            for resource in ("services", "endpointslices")
            for name, one in self.objects(resource).items()
        }

    def told_of(self, words: str) -> bool:
        return any(words in problem for problem in self.told().problems)


@pytest.fixture
def kube(tmp_path: Path, api: ApiServer) -> Iterator[Hybrid]:
    with Hybrid(tmp_path, api) as cluster:
        cluster.put_hosts()
        yield cluster


def test_a_machine_service_is_a_service_from_its_definition_to_its_end(kube: Hybrid, api: ApiServer) -> None:
    async def run() -> None:
        async with running(kube.registrar()):
            await until(kube.canaries, "published")
            kube.define()
            made = await until(kube.web_service, "there is a Service")
            address = made["spec"]["clusterIP"]
            assert "selector" not in made["spec"]
            assert [(one["name"], one["port"]) for one in made["spec"]["ports"]] == [("http", 80)]
            vip = await until(
                lambda: (one := kube.vip()).get("by") == "kubernetes" and one, "its address is the VIP", 5.0
            )
            assert (vip["ipv4"], vip["kept"]) == (address, None)  # none of our range was dealt meanwhile
            await until(lambda: kube.endpoints() == {"kube": {MACHINE}}, "slices")
            published = json.loads(kube.state()[keys.service_key("kube", "shop", "web")])
            assert list(published["frontends"]) == [address]
            assert list(published["backends"]) == [MACHINE]
            assert (published["selector"], published["labels"]) == ({"app": "web"}, {})
            # Nothing of it comes back, nothing is written twice.
            before = kube.versions()
            kube.put(kube.web(3, ready=False))
            await until(lambda: kube.endpoints() == {}, "not ready")
            kube.put(kube.web(3))
            await until(lambda: kube.endpoints() == {"kube": {MACHINE}}, "ready")
            assert kube.versions().items() >= {one: at for one, at in before.items() if "services" in one}.items()
            kube.define(ports=(ServicePort("http", 81, 8080),), labels={"tier": "front"}, affinity="local")
            await until(lambda: kube.web_service()["spec"]["ports"][0]["port"] == 81, "another port")
            assert kube.web_service()["metadata"]["labels"]["tier"] == "front"
            await until(lambda: kube.vip().get("affinity") == "local", "affinity")
            kube.define(kubernetes=False)
            await until(lambda: not kube.objects("services") and not kube.endpoints(), "it is gone")
            await until(lambda: kube.vip().get("ipv4") == "10.114.0.1", "an address of our range")
            kube.define()
            made = await until(kube.web_service, "it is back")
            await until(lambda: kube.vip()["ipv4"] == made["spec"]["clusterIP"], "its address")
            kube.undefine()
            await until(lambda: not kube.objects("services") and not kube.endpoints(), "the definition went")
            await until(
                lambda: keys.service_key("kube", "shop", "web") not in kube.state(), "nothing is published", 5.0
            )

    asyncio.run(run())


def test_backends_of_a_peer_come_go_and_stay_while_it_is_silent(kube: Hybrid, tmp_path: Path) -> None:
    async def run() -> None:
        with Cluster(tmp_path, "onprem") as onprem:
            onprem.put_all(2)
            both = {ONPREM, "10.101.2.2"}
            kube.define()
            async with running(onprem.registrar(kube), kube.registrar(onprem)):
                await until(lambda: kube.endpoints() == {"kube": {MACHINE}, "onprem": both}, "slices")
                own = {one: at for one, at in kube.versions().items() if "onprem" not in one}
                onprem.put(onprem.web(2, ready=False))
                await until(lambda: kube.endpoints()["onprem"] == {ONPREM}, "one is not ready")
                onprem.put(onprem.web(2))
                await until(lambda: kube.endpoints()["onprem"] == both, "it is ready")
                assert kube.versions().items() >= own.items()
                published = json.loads(kube.state()[keys.service_key("kube", "shop", "web")])
                assert list(published["backends"]) == [MACHINE]
            before = kube.versions()
            onprem.server.stop()
            # A new leader that has never heard the peer.
            async with running(kube.registrar(onprem, host="h2")):
                kube.put(kube.web(3, ready=False))
                await until(lambda: "kube" not in kube.endpoints(), "own backends go")
                assert kube.endpoints() == {"onprem": both}
                assert before.items() >= kube.versions().items()

    asyncio.run(run())


def test_what_is_in_the_way_is_named_and_left_alone(kube: Hybrid, api: ApiServer) -> None:
    async def run() -> None:
        theirs = service("web", None, **{"global": "false"})
        api.create("services", theirs)
        before = api.request("GET", api.path("services", "shop", "web"))
        kube.define()
        async with running(registrar := kube.registrar()):
            await until(
                lambda: kube.told_of("services shop/web: there is a Service of that name that is not ours"), "told"
            )
            # Machines have the service all the same.
            await until(lambda: kube.vip().get("ipv4") == "10.114.0.1", "an address of our range")
            assert api.request("GET", api.path("services", "shop", "web")) == before
            api.delete("services", "shop", "web")
            made = await until(kube.web_service, "the way is free")
            await until(lambda: kube.vip()["ipv4"] == made["spec"]["clusterIP"], "its address")
            assert kube.vip()["kept"] == "10.114.0.1"
            await until(lambda: not kube.told().problems, "no problem")
            # A namespace that is not there.
            document = {**json.loads(WEB.to_json()), "namespace": "later"}
            kube.put({keys.service_definition_key("later", "web"): json.dumps(document)})
            await until(lambda: kube.told_of("services later/web: there is no namespace later"), "told")
            api.create("namespaces", namespace("later"))
            await until(lambda: api.request("GET", api.path("services", "later"))["items"], "it is made")
            await until(lambda: not kube.told().problems, "no problem")
            assert registrar.sink is not None
            api.delete("services", "later", "web")  # by somebody: it comes back
            await until(lambda: api.request("GET", api.path("services", "later"))["items"], "it is made anew")
            kube.server.etcdctl("del", keys.service_definition_key("later", "web"))
            await until(lambda: not api.request("GET", api.path("services", "later"))["items"], "it is gone")

    asyncio.run(run())


def test_missing_rights_to_write_are_named_by_verb_and_resource(kube: Hybrid, api: ApiServer) -> None:
    async def run() -> None:
        api.allow(USER, READ, *RESOURCES)
        kube.define()
        async with running(registrar := kube.registrar()):
            await until(lambda: kube.told_of("RBAC does not allow the verb create on services"), "told")
            await until(lambda: kube.vip().get("ipv4") == "10.114.0.1", "an address of our range")
            assert kube.told().state == "connected"
            api.patch("clusterroles", "", USER, ROLE)
            await until(kube.web_service, "allowed", 40.0)
            await until(lambda: not kube.told().problems, "no problem")
            rules = [{**rule, "verbs": [verb for verb in rule["verbs"] if verb != "delete"]} for rule in ROLE["rules"]]
            api.patch("clusterroles", "", USER, {"rules": rules})
            await until(lambda: kube.endpoints() == {"kube": {MACHINE}}, "slices")
            kube.undefine()
            await until(lambda: kube.told_of("RBAC does not allow the verb delete on services"), "told")
            assert registrar.sink is not None
            assert kube.web_service()

    asyncio.run(run())


def test_only_the_leader_writes_and_a_new_one_only_what_differs(kube: Hybrid) -> None:
    async def run() -> None:
        kube.define()
        first, second = kube.registrar(), kube.registrar(host="h2")
        async with running(second):
            async with running(first):
                await until(lambda: kube.endpoints() == {"kube": {MACHINE}}, "slices")
                leader, other = (first, second) if first.leading else (second, first)
                assert leader.sink is not None
                assert other.sink is not None
                assert (leader.sink.writes, other.sink.writes) == (2, 0)
            before = kube.versions()
            await until(lambda: second.leading, "the other one leads")
            kube.define(affinity="local")
            await until(lambda: kube.vip().get("affinity") == "local", "it writes")
            after = kube.versions()
            assert {one for one in after if after[one] != before[one]} == {"services/web"}

    asyncio.run(run())


def test_an_api_server_that_is_away_changes_nothing_and_gets_the_difference(kube: Hybrid, api: ApiServer) -> None:
    async def run() -> None:
        kube.define()
        other = {
            keys.service_definition_key("shop", "other"): json.dumps({**json.loads(WEB.to_json()), "name": "other"})
        }
        async with running(registrar := kube.registrar()):
            await until(lambda: kube.endpoints() == {"kube": {MACHINE}}, "slices")
            made, before = kube.web_service(), kube.versions()
            api.stop()
            await until(lambda: kube.told().state == "absent", "its absence is told")
            kube.put(other)
            # What cannot be a Service now is one for machines.
            vip = keys.vip_key("shop", "other")
            await until(lambda: json.loads(kube.server.dump(vip).get(vip, "{}")).get("ipv4") == "10.114.0.1", "served")
            assert kube.vip()["ipv4"] == made["spec"]["clusterIP"]
            await asyncio.to_thread(api.start)
            await until(lambda: "other" in kube.objects("services"), "it is back", 40.0)
            assert kube.versions().items() >= before.items()
            assert registrar.sink is not None
            await until(lambda: json.loads(kube.server.dump(vip)[vip]).get("by") == "kubernetes", "its address")

    asyncio.run(run())


def test_a_headless_service_of_pods_gets_what_is_elsewhere(kube: Hybrid, api: ApiServer, tmp_path: Path) -> None:
    async def run() -> None:
        headless = service("web", None)
        api.create("services", headless)
        api.create("pods", pod("web-1", "10.244.1.2"))
        api.create("endpointslices", endpoint_slice("web", endpoint("10.244.1.2")))
        theirs = api.request("GET", api.path("endpointslices", "shop", "web-x"))
        kube.define(kubernetes=False)
        with Cluster(tmp_path, "onprem") as onprem:
            onprem.put_all(1)
            async with running(onprem.registrar(kube), kube.registrar(onprem)):
                await until(lambda: kube.endpoints() == {"kube": {MACHINE}, "onprem": {ONPREM}}, "slices")
                await until(lambda: kube.backends() == {MACHINE, "10.244.1.2"}, "published: own pods and machines")
                labels = [one["metadata"]["labels"] for one in kube.objects("endpointslices").values()]
                assert all("service.kubernetes.io/headless" in one for one in labels)
                no = {"metadata": {"annotations": {"service.cilium.io/global-sync-endpoint-slices": "false"}}}
                api.patch("services", "shop", "web", no)
                await until(lambda: kube.endpoints() == {}, "not wanted")
                assert api.request("GET", api.path("endpointslices", "shop", "web-x")) == theirs
                assert api.request("GET", api.path("services", "shop", "web"))["spec"]["clusterIP"] == "None"
                yes = {"metadata": {"annotations": {"service.cilium.io/global-sync-endpoint-slices": "true"}}}
                api.patch("services", "shop", "web", yes)
                await until(lambda: kube.endpoints() == {"kube": {MACHINE}, "onprem": {ONPREM}}, "wanted")
                api.delete("services", "shop", "web")
                await until(lambda: kube.endpoints() == {}, "the Service is gone")

    asyncio.run(run())


# --- without etcd


@pytest.fixture
def spec(tmp_path: Path, api: ApiServer) -> KubernetesApiSpec:
    crt, key = api.ca.issue(USER)
    return KubernetesApiSpec(api.url, str(api.ca.crt), str(crt), str(key))


@contextlib.asynccontextmanager
async def sinking(spec: KubernetesApiSpec, leads: bool = True) -> AsyncIterator[tuple[Sink, asyncio.Task[None]]]:
    """A sink with its source; `leads`: whether the proof that it asks for is given."""
    changed = asyncio.Event()
    source = Source(spec, "lab", "kube", changed, wall=lambda: "")
    sink = Sink(spec, "lab", "kube", source.catalog, changed)

    async def prove() -> None:
        if not leads:
            raise NotLeader("another one leads")

    async def pass_on() -> None:
        while True:
            await changed.wait()
            changed.clear()
            source.catalog.take()
            sink.due.set()

    tasks = [asyncio.create_task(one) for one in (source.run(), pass_on())]
    task = asyncio.create_task(sink.run(prove))
    try:
        yield sink, task
    finally:
        for one in (*tasks, task):
            one.cancel()
        await asyncio.gather(*tasks, task, return_exceptions=True)


def mesh(number: int) -> Mesh:
    backends = {f"10.101.{one // 200}.{one % 200 + 1}": {"http": L4Addr("TCP", 8080)} for one in range(number)}
    text = ClusterService("onprem", "shop", "web", 1, backends=backends).to_json()
    return Mesh({("shop", "web"): WEB}, {}, {("shop", "web"): {"onprem": text}}, frozenset())


def slices(api: ApiServer) -> list[list[str]]:
    found = api.request("GET", api.path("endpointslices", "shop"))["items"]
    return [[entry["addresses"][0] for entry in one["endpoints"]] for one in found]


def test_many_endpoints_and_a_second_look_writes_nothing(spec: KubernetesApiSpec, api: ApiServer) -> None:
    async def run() -> None:
        async with sinking(spec) as (sink, _):
            sink.mesh = mesh(250)
            sink.due.set()
            await until(lambda: sorted(map(len, slices(api))) == [50, 100, 100], "slices")
            assert sink.writes == 4
            sink.mesh = mesh(249)
            sink.due.set()
            await until(lambda: sum(map(len, slices(api))) == 249, "one is gone")
            assert sink.writes == 5
        async with sinking(spec) as (sink, _):  # what the API gave back is what was written
            sink.mesh = mesh(249)
            sink.due.set()
            await until(lambda: sink.catalog.synced and not sink.due.is_set(), "it has looked")
            api.delete("services", "shop", "web")
            await until(lambda: api.request("GET", api.path("services", "shop"))["items"], "it was made anew")
            await until(lambda: sink.writes, "it knows")
            assert (sink.writes, sink.problems) == (1, ())

    asyncio.run(run())


def test_who_cannot_prove_that_he_leads_writes_nothing(spec: KubernetesApiSpec, api: ApiServer) -> None:
    async def run() -> None:
        async with sinking(spec, leads=False) as (sink, task):
            sink.mesh = mesh(1)
            sink.due.set()
            with pytest.raises(NotLeader):
                await asyncio.wait_for(task, 20)
            assert sink.writes == 0
            assert api.request("GET", api.path("services", "shop"))["items"] == []

    asyncio.run(run())


def test_a_write_to_what_was_changed_meanwhile_is_refused(spec: KubernetesApiSpec, api: ApiServer) -> None:
    async def run() -> None:
        client = Api(spec)
        try:
            api.create("services", service("web", None))
            old = api.request("GET", api.path("services", "shop", "web"))["metadata"]["resourceVersion"]
            api.patch("services", "shop", "web", {"metadata": {"labels": {"a": "b"}}})
            now = api.request("GET", api.path("services", "shop", "web"))
            for write in (
                client.patch("services", ("shop", "web"), {"metadata": {"labels": {"a": "c"}}}, old),
                client.delete("services", ("shop", "web"), old),
                client.create("services", "shop", {**service("web", None), "apiVersion": "v1", "kind": "Service"}),
            ):
                with pytest.raises(Conflict):
                    await write
            assert api.request("GET", api.path("services", "shop", "web")) == now
            await client.patch("services", ("shop", "web"), {}, now["metadata"]["resourceVersion"])
            await client.delete("services", ("shop", "web"), now["metadata"]["resourceVersion"])
            assert api.request("GET", api.path("services", "shop"))["items"] == []
        finally:
            await client.close()

    asyncio.run(run())


def test_what_the_api_refuses_for_another_reason_is_told_in_its_words(spec: KubernetesApiSpec, api: ApiServer) -> None:
    async def run() -> None:
        async with sinking(spec) as (sink, _):
            given = {name: getattr(WEB, name) for name in WEB.__dataclass_fields__}
            wrong = ServiceDefinition(**{**given, "labels": {"-": "no label"}})
            sink.mesh = Mesh({("shop", "web"): wrong}, {}, {}, frozenset())
            sink.due.set()
            await until(lambda: sink.problems, "told")
            ((key, reason),) = sink.problems
            assert key == "kubernetes services shop/web"
            assert "metadata.labels: Invalid value" in reason
            assert sink.unwritable == {"shop/web"}

    asyncio.run(run())


def test_what_was_written_goes_with_the_mesh(kube: Hybrid, api: ApiServer, tmp_path: Path) -> None:
    crt, key = api.ca.issue("admin", organization="system:masters")
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": {"server": api.url, "certificate-authority": str(api.ca.crt)}}],
        "users": [{"name": "admin", "user": {"client-certificate": str(crt), "client-key": str(key)}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
        "current-context": "here",
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    given = {"state": "absent", "estate": "lab", "cluster": "kube", "kubeconfig": str(tmp_path / "kubeconfig")}

    async def run() -> None:
        api.create("services", service("theirs", None))
        kube.define()
        async with running(kube.registrar()):
            await until(lambda: kube.endpoints() == {"kube": {MACHINE}}, "slices")
        (name,) = kube.objects("endpointslices")
        gone = ["service/shop/web", f"endpointslice/shop/{name}"]
        for check in (True, False):
            assert run_module("kubernetes_access", given, check, bundle=False)["removed"] == gone
        assert run_module("kubernetes_access", given, bundle=False)["removed"] == []
        left = api.request("GET", api.path("services", "shop"))["items"]
        assert [one["metadata"]["name"] for one in left] == ["theirs"]
        assert not kube.endpoints()

    asyncio.run(run())
