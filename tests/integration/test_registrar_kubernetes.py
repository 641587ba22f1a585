# SPDX-License-Identifier: GPL-3.0-or-later
"""Registrars between a real kube-apiserver and a real etcd: what Kubernetes says is published, and what it stops saying
because it is away stays."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.kubernetes_fixture import ApiServer
from integration.registrar_cluster import Cluster, running, until
from isthmus_agent.registrar import service as registrar_service
from isthmus_agent.registrar.kubernetes import client, source
from isthmus_mesh import keys
from isthmus_mesh.documents import KubernetesStatus, ServiceDefinition, ServicePort
from kubernetes_objects import endpoint, endpoint_slice, namespace, node, pod, service

USER = "isthmus-registrar"
READ = ("get", "list", "watch")
RESOURCES = ("nodes", "namespaces", "pods", "services", "endpointslices")
WEB = keys.service_key("kube", "shop", "web")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("kubernetes")) as found:
        for number in (1, 2):
            found.create("nodes", node(f"kube-{number}", f"10.244.{number}.0/24", f"198.18.4.{10 + number}"))
        found.create("namespaces", namespace("shop", team="a"))
        yield found


@pytest.fixture
def api(server: ApiServer) -> Iterator[ApiServer]:
    """The API server, with two pods and a service of theirs in the namespace `shop` and nothing else."""
    server.allow(USER, READ, *RESOURCES)
    server.create("pods", pod("web-1", "10.244.1.2", "kube-1"))
    server.create("pods", pod("web-2", "10.244.2.2", "kube-2"))
    server.create("services", service("web", "10.96.0.10"))
    server.create("endpointslices", endpoint_slice("web", endpoint("10.244.1.2"), endpoint("10.244.2.2", "kube-2")))
    yield server
    if server.process is None:
        server.start()
    for resource in ("pods", "services", "endpointslices"):
        for entry in server.request("GET", server.path(resource, "shop"))["items"]:
            server.delete(resource, "shop", entry["metadata"]["name"])


class Kube(Cluster):
    """A cluster of the mesh that is a Kubernetes cluster: hosts h1 and h2 are its nodes kube-1 and kube-2."""

    def __init__(self, directory: Path, server: ApiServer) -> None:
        super().__init__(directory, "kube")
        self.ranges.append("10.244.0.0/16")
        self.api = server
        pki = directory / "kubernetes"
        pki.mkdir()
        self.files = tuple(str(pki / name) for name in ("ca.crt", "client.crt", "client.key"))
        shutil.copy(server.ca.crt, self.files[0])
        self.certify(server.ca.issue(USER))

    def certify(self, files: tuple[Path, Path]) -> None:
        """Give the registrar another certificate for the API server."""
        for source_file, target in zip(files, self.files[1:], strict=True):
            shutil.copy(source_file, target)

    def host(self, number: int) -> dict[str, Any]:
        return {**super().host(number), "kubernetes_node": f"kube-{number}", "workloads": {}}

    def spec_document(self, host: str, *peers: Cluster) -> dict[str, Any]:
        document = super().spec_document(host, *peers)
        document["cluster"]["kubernetes"] = {"pod_ranges4": ["10.244.0.0/16"], "service_range4": "10.96.0.0/16"}
        ca, cert, key = self.files
        document["registrar"]["kubernetes"] = {"server": self.api.url, "ca": ca, "cert": cert, "key": key}
        return document

    def put_hosts(self) -> None:
        self.put({**self.record(2), **self.node(1), **self.node(2)})

    def state(self) -> dict[str, str]:
        return self.server.dump("cilium/state/")

    def backends(self) -> set[str]:
        return set(json.loads(self.state().get(WEB, '{"backends":{}}'))["backends"])

    def told(self) -> KubernetesStatus:
        found = self.server.dump(keys.KUBERNETES_STATUS)
        if not found:
            raise RuntimeError("the registrar has not told of the API server yet")
        return KubernetesStatus.from_json(found[keys.KUBERNETES_STATUS])

    def revisions(self) -> dict[str, int]:
        """When each published key was written last."""
        found = json.loads(self.server.etcdctl("get", "--prefix", "cilium/state/", "-w", "json"))
        return {base64.b64decode(entry["key"]).decode(): entry["mod_revision"] for entry in found["kvs"]}

    def canaries(self) -> set[str]:
        return set(self.server.dump("cilium/synced/kube/"))


@pytest.fixture
def kube(tmp_path: Path, api: ApiServer) -> Iterator[Kube]:
    with Kube(tmp_path, api) as cluster:
        cluster.put_hosts()
        yield cluster


BOTH = {"10.244.1.2", "10.244.2.2"}
DB = ServiceDefinition("db", "shop", (ServicePort("sql", 5432, 5432),), {"app": "db"}, is_global=True)


def test_from_nothing_key_by_key(kube: Kube) -> None:
    async def run() -> None:
        async with running(kube.registrar()):
            await until(kube.canaries, "canaries")
            dump = kube.server.dump()
            assert {key for key in dump if key.startswith(("cilium/state/", "isthmus/v1/alloc/"))} == {
                "cilium/state/identities/v1/id/262145",
                "cilium/state/ip/v1/default/10.244.1.2",
                "cilium/state/ip/v1/default/10.244.2.2",
                "cilium/state/nodes/v1/kube/h1",
                "cilium/state/nodes/v1/kube/h2",
                WEB,
                "isthmus/v1/alloc/identities/262145",
                "isthmus/v1/alloc/vips/shop/web",
                "isthmus/v1/alloc/kubernetes",
            }
            assert "namespace.labels.team=a;" in dump["cilium/state/identities/v1/id/262145"]
            address = json.loads(dump["cilium/state/ip/v1/default/10.244.2.2"])
            assert (address["HostIP"], address["ID"], address["K8sPodName"]) == ("198.18.4.12", 262145, "web-2")
            assert address["NamedPorts"] == [{"Name": "http", "Port": 8080, "Protocol": "TCP"}]
            published = json.loads(dump["cilium/state/nodes/v1/kube/h1"])
            assert published["IPv4SecondaryAllocCIDRs"] == [{"IP": "10.244.1.0", "Mask": "////AA=="}]
            web = json.loads(dump[WEB])
            assert web["frontends"] == {"10.96.0.10": {"http": {"Protocol": "TCP", "Port": 80}}}
            assert set(web["backends"]) == BOTH
            assert json.loads(dump["isthmus/v1/alloc/vips/shop/web"])["ipv4"] == "10.96.0.10"
            told = await until(lambda: (one := kube.told()).state == "connected" and one, "the status says so")
            assert told.error is None
            assert (told.objects["nodes"], told.objects["pods"], told.objects["services"]) == (2, 2, 1)

    asyncio.run(run())


def test_changes(kube: Kube, api: ApiServer) -> None:
    async def run() -> None:
        async with running(kube.registrar()):
            await until(lambda: kube.backends() == BOTH, "published")
            # Readiness goes, the pod gets another address, another pod goes.
            notready = {"endpoints": [endpoint("10.244.1.2"), endpoint("10.244.2.2", "kube-2", ready=False)]}
            api.patch("endpointslices", "shop", "web-x", notready)
            await until(lambda: kube.backends() == {"10.244.1.2"}, "not ready", 5.0)
            api.status("pods", "shop", "web-2", {"podIPs": [{"ip": "10.244.2.3"}], "podIP": "10.244.2.3"})
            moved = keys.ip_key("10.244.2.3"), keys.ip_key("10.244.2.2")
            await until(lambda: moved[0] in (dump := kube.state()) and moved[1] not in dump, "renumbered", 5.0)
            api.patch("pods", "shop", "web-2", {"metadata": {"labels": {"app": "other"}}})
            await until(lambda: json.loads(kube.state()[moved[0]])["ID"] == 262146, "another identity", 5.0)
            # Left alone by its namespace, by itself, and not any more.
            alone = {keys.untranslated_key("10.244.1.2"), keys.untranslated_key("10.244.2.3")}

            def said(value: str | None) -> dict[str, Any]:
                return {"metadata": {"annotations": {"isthmus.io/socket-translation": value}}}

            def untranslated() -> set[str]:
                return set(kube.server.dump(keys.UNTRANSLATED_PREFIX))

            assert untranslated() == set()
            api.patch("namespaces", "", "shop", said("false"))
            await until(lambda: untranslated() == alone, "all pods of the namespace", 5.0)
            api.patch("pods", "shop", "web-1", said("true"))
            await until(
                lambda: untranslated() == {keys.untranslated_key("10.244.2.3")}, "the pod has the last word", 5.0
            )
            api.patch("namespaces", "", "shop", said(None))
            await until(lambda: not untranslated(), "translated again", 5.0)
            api.patch("pods", "shop", "web-2", said("false"))
            await until(lambda: untranslated() == {keys.untranslated_key("10.244.2.3")}, "one pod", 5.0)
            api.status("pods", "shop", "web-2", {"phase": "Succeeded"})
            api.delete("pods", "shop", "web-1")
            await until(lambda: not [key for key in kube.state() if "/ip/" in key], "all gone", 5.0)
            assert not untranslated()
            # Annotations.
            api.patch("services", "shop", "web", {"metadata": {"annotations": {"service.cilium.io/shared": "false"}}})
            await until(lambda: json.loads(kube.state()[WEB])["shared"] is False, "not shared", 5.0)
            api.patch("services", "shop", "web", {"metadata": {"annotations": {"service.cilium.io/global": None}}})
            await until(lambda: WEB not in kube.state(), "not global", 5.0)
            assert kube.server.dump(keys.VIPS_PREFIX) == {}

    asyncio.run(run())


def test_an_api_server_that_restarts_changes_nothing_and_is_followed_again(kube: Kube, api: ApiServer) -> None:
    async def run() -> None:
        async with running(registrar := kube.registrar()):
            await until(kube.canaries, "published")
            before = kube.revisions()
            api.stop()
            await until(lambda: kube.told().state == "absent", "its absence is told")
            assert "127.0.0.1" in str(kube.told().error)
            await asyncio.to_thread(api.start)
            await until(lambda: kube.told().state == "connected", "it is back", 30.0)
            assert kube.revisions() == before
            api.delete("pods", "shop", "web-1")
            await until(lambda: keys.ip_key("10.244.1.2") not in kube.state(), "a change is seen")
            assert registrar.kubernetes is not None
            assert {key: found for key, found in kube.revisions().items() if key in before} == {
                key: found for key, found in before.items() if key in kube.revisions()
            }

    asyncio.run(run())


def test_what_went_while_nobody_could_tell_is_found_by_a_new_list(
    kube: Kube, api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The server has forgotten the versions in between: 410 Gone."""
    caplog.set_level("INFO")

    async def run() -> None:
        async with running(registrar := kube.registrar()):
            await until(kube.canaries, "published")
            assert registrar.kubernetes is not None
            lists = registrar.kubernetes.lists
            api.stop()
            api.store.etcdctl("del", "/registry/pods/shop/web-1")
            await asyncio.to_thread(api.start)
            await until(lambda: keys.ip_key("10.244.1.2") not in kube.state(), "the lost deletion is seen", 40.0)
            assert registrar.kubernetes.lists > lists
            again = [record for record in caplog.records if record.getMessage() == "listing again"]
            assert any("too old resource version" in str(record.__dict__["fields"]) for record in again)
            assert keys.ip_key("10.244.2.2") in kube.state()

    asyncio.run(run())


LEADERS = {"the same host": ("h1", False), "another host": ("h2", False), "its canaries are lost": ("h2", True)}


@pytest.mark.parametrize(("host", "lost"), LEADERS.values(), ids=LEADERS)
def test_a_new_leader_withdraws_nothing_while_the_api_server_is_away(
    kube: Kube, api: ApiServer, monkeypatch: pytest.MonkeyPatch, host: str, lost: bool
) -> None:
    monkeypatch.setattr(registrar_service, "REPORT_GRACE", 3.0)

    async def run() -> None:
        async with running(kube.registrar()):
            await until(kube.canaries, "published")
        before = kube.revisions()
        if lost:
            kube.server.etcdctl("del", "--prefix", "cilium/synced/")
        api.stop()
        async with running(kube.registrar(host=host)):
            await until(lambda: kube.told().state == "absent", "its absence is told")
            # A canary says that everything known is published, and that does not hang on the API server for ever.
            await until(kube.canaries, "canaries")
            # What is not Kubernetes' goes on.
            kube.put({keys.service_definition_key("shop", "db"): DB.to_json()})
            await until(lambda: keys.service_key("kube", "shop", "db") in kube.state(), "a definition is published")
            assert {key: at for key, at in kube.revisions().items() if not key.endswith("/db")} == before
            await asyncio.to_thread(api.start)
            await until(lambda: kube.told().state == "connected", "it is back", 30.0)
            assert {key: at for key, at in kube.revisions().items() if not key.endswith("/db")} == before
            api.delete("pods", "shop", "web-1")
            await until(lambda: keys.ip_key("10.244.1.2") not in kube.state(), "a change is seen")

    asyncio.run(run())


def test_missing_rights_are_named_by_verb_and_resource(kube: Kube, api: ApiServer) -> None:
    async def run() -> None:
        api.allow(USER, READ, *RESOURCES[:-1])
        async with running(kube.registrar()):
            told = await until(lambda: (one := kube.told()).state == "refused" and one, "refused")
            assert "RBAC does not allow the verb list on endpointslices" in str(told.error)
            assert not [key for key in kube.state() if "/ip/" in key]
            api.allow(USER, READ, *RESOURCES)
            await until(lambda: kube.backends() == BOTH, "allowed", 30.0)
            await until(lambda: kube.told().state == "connected", "told")
        api.allow(USER, ("get", "list"), *RESOURCES)
        async with running(kube.registrar()):
            told = await until(lambda: (one := kube.told()).state == "refused" and one, "refused")
            assert "RBAC does not allow the verb watch on pods" in str(told.error)

    asyncio.run(run())


def test_a_renewed_certificate_is_read_again(kube: Kube, api: ApiServer) -> None:
    async def run() -> None:
        good = api.ca.issue(USER)
        api.ca.days, before = (-2, -1), api.ca.days
        try:
            kube.certify(api.ca.issue(USER, "ended"))
        finally:
            api.ca.days = before
        async with running(kube.registrar()):
            told = await until(lambda: (one := kube.told()).state in ("refused", "absent") and one, "refused")
            assert "client certificate" in str(told.error)
            kube.certify(good)
            await until(lambda: kube.backends() == BOTH, "the new one is used", 30.0)

    asyncio.run(run())


def test_a_server_that_hangs_is_noticed_and_followed_again(
    kube: Kube, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel goes on to answer for it, so only a question tells."""
    monkeypatch.setattr(client, "ANSWER_TIMEOUT", 1.0)
    monkeypatch.setattr(source, "PROBE_INTERVAL", 0.3)

    async def run() -> None:
        async with running(kube.registrar()):
            await until(kube.canaries, "published")
            before = kube.revisions()
            api.signal(signal.SIGSTOP)
            try:
                await until(lambda: kube.told().state == "absent", "its silence is told", 20.0)
                assert "no answer in time" in str(kube.told().error)
            finally:
                api.signal(signal.SIGCONT)
            await until(lambda: kube.told().state == "connected", "it is back", 60.0)
            assert kube.revisions() == before
            api.delete("pods", "shop", "web-1")
            await until(lambda: keys.ip_key("10.244.1.2") not in kube.state(), "a change is seen")

    asyncio.run(run())


def test_a_global_service_reaches_a_cluster_that_does_not_declare_it(kube: Kube, tmp_path: Path) -> None:
    """Machines of another cluster get an address of their own cluster for it, as long as it is there."""

    async def run() -> None:
        with Cluster(tmp_path, "onprem") as onprem:
            onprem.put({**onprem.record(1), **onprem.node(1)})
            async with running(onprem.registrar(kube), kube.registrar(onprem)):
                vip = await until(lambda: onprem.server.dump(keys.vip_key("shop", "web")), "an address is dealt")
                document = json.loads(vip[keys.vip_key("shop", "web")])
                assert (document["ipv4"], document["by"], document["released"]) == ("10.111.0.1", "peers", None)
                kube.api.delete("services", "shop", "web")
                await until(
                    lambda: json.loads(onprem.server.dump(keys.VIPS_PREFIX)[keys.vip_key("shop", "web")])["released"],
                    "it is released",
                )

    asyncio.run(run())
