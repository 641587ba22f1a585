# SPDX-License-Identifier: GPL-3.0-or-later
"""global_service, service_info and mesh_info as Ansible runs them, against a real etcd with access control."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import previous_release
import pytest
from integration.etcd_fixture import EtcdServer
from integration.module_runner import ModuleFailed, run_module
from isthmus_agent import etcd_admin
from isthmus_mesh import keys

KEY = "isthmus/v1/services/shop/web"
WEB: dict[str, Any] = {
    "name": "web",
    "namespace": "shop",
    "ports": [{"name": "http", "port": 80, "target_port": 8080}],
    "backends": {"labels": {"app": "web"}},
    "health": {"type": "http", "path": "/healthz", "port": 8080},
}


class Host:
    """An etcd host of cluster onprem: its etcd, and the files that the modules read."""

    def __init__(self, server: EtcdServer, directory: Path) -> None:
        self.server = server
        pki = directory / "pki"
        (pki / "trust").mkdir(parents=True)
        (pki / "trust" / "onprem.crt").symlink_to(server.ca.crt)
        operator, agent = server.ca.issue("isthmus-operator"), server.ca.issue("isthmus-agent-onprem-1")
        for suffix, path in zip(("crt", "key"), operator, strict=True):
            (pki / f"operator.{suffix}").symlink_to(path)
        files = {"ca": str(server.ca.crt), "cert": str(agent[0]), "key": str(agent[1])}
        node = {"cluster": {"name": "onprem"}, "etcd": {"endpoints": [server.endpoint], **files}}
        (directory / "node.json").write_text(json.dumps(node))
        self.places = {"estate.NODE": str(directory / "node.json"), "estate.PKI": str(pki)}
        self.packages = Path(etcd_admin.__file__).parents[1]

    def run(self, module: str, check: bool = False, /, **arguments: Any) -> dict[str, Any]:
        return run_module(module, arguments, check=check, places=self.places, packages=self.packages)

    def changed(self, **arguments: Any) -> list[bool]:
        """check, apply, apply, check."""
        return [self.run("global_service", check, **arguments)["changed"] for check in (True, False, False, True)]

    def put(self, key: str, document: Any) -> None:
        self.server.etcdctl("put", key, document if isinstance(document, str) else json.dumps(document))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd"), name="onprem") as running:
        running.etcdctl("put", "isthmus/v1/before", "1")
        wanted = etcd_admin.wanted_access("onprem", ["onprem-1"], ["cloud"])
        with running.sync_client() as client:
            etcd_admin.ensure_access(client, wanted, apply=True, enable=True)
        yield running


@pytest.fixture
def host(server: EtcdServer, tmp_path: Path) -> Iterator[Host]:
    try:
        yield Host(server, tmp_path)
    finally:
        server.etcdctl("del", "--prefix", "isthmus/v1/")
        server.etcdctl("del", "--prefix", "cilium/")


@pytest.mark.parametrize("bundle", ["this version", "the version before"])
def test_a_service_is_registered_changed_and_removed(host: Host, bundle: str) -> None:
    if bundle == "the version before":
        host.packages = previous_release.python_path()
    assert host.changed(**WEB) == [True, True, False, False]
    written = json.loads(host.server.dump(KEY)[KEY])
    assert (written["owner"], written["revision"], written["ports"][0]["target_port"]) == ("module", 1, 8080)
    changed = {**WEB, "affinity": "local", "labels": {"tier": "front"}}
    predicted = host.run("global_service", True, **changed)
    assert '"affinity": "local"' in predicted["diff"][0]["after"]
    assert json.loads(host.server.dump(KEY)[KEY]) == written
    assert host.changed(**changed) == [True, True, False, False]
    assert json.loads(host.server.dump(KEY)[KEY])["revision"] == 2
    assert host.changed(name="web", namespace="shop", state="absent") == [True, True, False, False]
    assert host.server.dump(KEY) == {}


def test_a_service_for_pods_says_so_in_a_kubernetes_cluster_only(host: Host) -> None:
    host.run("global_service", **WEB, kubernetes=True)
    assert "kubernetes" not in json.loads(host.server.dump(KEY)[KEY])
    node = Path(host.places["estate.NODE"])
    document = json.loads(node.read_text())
    document["cluster"]["kubernetes"] = {"pod_ranges4": ["10.244.0.0/16"], "service_range4": "10.96.0.0/16"}
    node.write_text(json.dumps(document))
    assert host.changed(**WEB, kubernetes=True) == [True, True, False, False]
    assert json.loads(host.server.dump(KEY)[KEY])["kubernetes"] is True
    assert host.changed(**WEB) == [True, True, False, False]
    assert "kubernetes" not in json.loads(host.server.dump(KEY)[KEY])


def test_in_a_pod_of_etcd_they_find_it_by_what_the_pod_has(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inventory host of a cluster whose control plane is in it."""
    Path(host.places["estate.NODE"]).unlink()
    with pytest.raises(ModuleFailed, match="this host is no member of the mesh"):
        host.run("global_service", **WEB)
    pki = host.places["etcd_unit.PKI"] = host.places["estate.PKI"]
    host.places["etcd_unit.ENVIRONMENT"] = f"{pki}/there-is-none"
    monkeypatch.setenv("ETCD_ADVERTISE_CLIENT_URLS", f"https://isthmus-etcd-0.example:{host.server.port}")
    monkeypatch.setenv("ETCD_TRUSTED_CA_FILE", f"{pki}/trust/onprem.crt")
    assert host.changed(**WEB, kubernetes=True) == [True, True, False, False]
    assert json.loads(host.server.dump(KEY)[KEY])["kubernetes"] is True
    assert [found["name"] for found in host.run("service_info")["services"]] == ["web"]
    host.put(keys.node_report_key("worker-1"), {"boot": "b"})
    told = host.run("mesh_info")
    assert (told["mesh"]["cluster"], [node["name"] for node in told["mesh"]["nodes"]]) == ("onprem", ["worker-1"])
    assert (told["agent"], told.get("warnings", [])) == (None, [])


@pytest.mark.parametrize("module", ["global_service", "service_info", "mesh_info"])
def test_a_host_of_a_newer_version_is_left_alone(host: Host, module: str) -> None:
    node = Path(host.places["estate.NODE"])
    node.write_text(json.dumps({**json.loads(node.read_text()), "schema": 2}))
    before = host.server.dump("isthmus/v1/")
    with pytest.raises(ModuleFailed, match=r"node.json has schema 2, newer than 1.*Next: `ansible-galaxy collection"):
        host.run(module, **(WEB if module == "global_service" else {}))
    assert host.server.dump("isthmus/v1/") == before


@pytest.mark.parametrize("more", [{}, {"state": "absent"}], ids=["present", "absent"])
def test_what_the_inventory_owns_is_refused(host: Host, more: dict[str, Any]) -> None:
    host.run("global_service", **WEB)
    document = {**json.loads(host.server.dump(KEY)[KEY]), "owner": "inventory"}
    host.put(KEY, document)
    for check in (True, False):
        with pytest.raises(ModuleFailed, match="belongs to inventory"):
            host.run("global_service", check, **{**WEB, **more})
    assert json.loads(host.server.dump(KEY)[KEY]) == document


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"name": "Web_1"}, "not an RFC 1123 label"),
        ({"ports": [{"port": 80}, {"port": 443}]}, "with several ports the name says which is which"),
        ({"ports": [{"port": 70000}]}, "out of range 1..65535"),
        ({"ports": []}, r"ports: the list is empty.*Next: add"),
        ({"ports": [{"port": 80}, {"name": "b", "port": 80}]}, "80/TCP is there twice"),
        ({"ports": [{"name": "HTTP", "port": 80}]}, "'HTTP' is not a port name"),
        ({"backends": {"labels": {"app": "a"}, "workloads": ["h/w"]}}, "mutually exclusive"),
        ({"backends": {"labels": {"app": "a;b=c"}}}, "'a;b=c' is not a Kubernetes label value"),
        ({"backends": {"labels": {}}}, "every workload of the namespace would match"),
        ({"backends": {"workloads": ["x"]}}, "'x' is not '<host>/<workload>'"),
        ({"backends": {"workloads": []}}, "backends.workloads: the list is empty"),
        ({"kubernetes": True, "global": False}, "it goes with `global: true` only"),
        ({"labels": {"tier": "a;b"}}, "'a;b' is not a Kubernetes label value"),
        ({"health": {"type": "exec"}}, "command"),
        ({"health": {"type": "tcp", "path": "/"}}, "it goes with type: http only"),
        ({"health": {"type": "http", "path": "healthz"}}, "is not a path that begins with '/'"),
        ({"health": {"type": "tcp", "interval": 0}}, "is not a number 0.1..3600"),
        ({"health": {"type": "tcp", "fall": 0}}, "0 is out of range 1..100"),
        ({"health": {"type": "tcp"}, "ports": [{"port": 53, "protocol": "UDP"}]}, "the service has no TCP port"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_words_and_writes_nothing(host: Host, more: dict[str, Any], words: str) -> None:
    for check in (True, False):
        with pytest.raises(ModuleFailed, match=words):
            host.run("global_service", check, **{**WEB, **more})
    assert host.server.dump("isthmus/v1/services/") == {}


def test_a_name_that_is_none_is_refused_also_when_it_is_to_go(host: Host) -> None:
    with pytest.raises(ModuleFailed, match="'We;b' is not an RFC 1123 label"):
        host.run("global_service", name="We;b", state="absent")


def test_all_problems_are_told_at_once(host: Host) -> None:
    with pytest.raises(ModuleFailed, match=r"service shop/web .*nothing was changed\. \(1\) .* \(2\) "):
        host.run("global_service", **{**WEB, "labels": {"a": "b;c"}, "backends": {"workloads": ["x"]}})


def test_a_check_has_the_port_and_path_that_the_inventory_would_give(host: Host) -> None:
    for health, expected in (({"type": "tcp"}, ("tcp", 8080, None)), ({"type": "http"}, ("http", 8080, "/"))):
        assert host.changed(**{**WEB, "health": health}) == [True, True, False, False]
        written = json.loads(host.server.dump(KEY)[KEY])["health"]
        assert (written["type"], written["port"], written.get("path")) == expected


def test_check_mode_says_what_it_cannot_know_on_a_host_whose_bundle_is_gone(host: Host) -> None:
    found = run_module("global_service", WEB, check=True, bundle=False, places=host.places)
    assert found["changed"]
    assert '"owner": "module"' in found["diff"][0]["after"]
    assert "no agent bundle" in str(found["warnings"])
    gone = {"name": "web", "namespace": "shop", "state": "absent"}
    assert run_module("global_service", gone, check=True, bundle=False, places=host.places)["changed"] is False
    with pytest.raises(ModuleFailed, match="needs the agent bundle"):
        run_module("global_service", WEB, bundle=False, places=host.places)
    for name in ("service_info", "mesh_info"):
        assert run_module(name, {}, check=True, bundle=False, places=host.places)["changed"] is False


def test_a_host_that_may_not_write_says_so(host: Host, tmp_path: Path) -> None:
    (tmp_path / "pki" / "operator.key").unlink()
    with pytest.raises(ModuleFailed, match="Delegate the task to one of the cluster's etcd hosts"):
        host.run("global_service", **WEB)
    (tmp_path / "node.json").unlink()
    for name in ("service_info", "mesh_info"):
        with pytest.raises(ModuleFailed, match="no member of the mesh"):
            host.run(name)


def test_services_with_their_backends_by_cluster(host: Host) -> None:
    host.run("global_service", **WEB)
    host.put("isthmus/v1/alloc/vips/shop/web", {"ipv4": "10.111.0.1", "ipv6": None, "released": None})
    own = {"cluster": "onprem", "backends": {"10.101.0.2": {"http": {}}}, "shared": True}
    host.put("cilium/state/services/v1/onprem/shop/web", own)
    host.put("cilium/cache/services/v1/cloud/shop/web", {"backends": {"10.102.0.2": {}, "10.102.0.3": {}}})
    host.put("cilium/cache/services/v1/cloud/shop/odd", "no JSON")
    for check in (True, False):
        found = host.run("service_info", check, namespace="shop", name="web")
        assert found["changed"] is False
        (web,) = found["services"]
        assert (web["address"], web["definition"]["owner"]) == ("10.111.0.1", "module")
        assert {name: offer["backends"] for name, offer in web["clusters"].items()} == {
            "onprem": ["10.101.0.2"],
            "cloud": ["10.102.0.2", "10.102.0.3"],
        }
    assert [entry["name"] for entry in host.run("service_info")["services"]] == ["odd", "web"]
    assert host.run("service_info", namespace="none")["services"] == []


def test_the_mesh_and_a_silent_agent(host: Host) -> None:
    host.put("isthmus/v1/nodes/onprem-1", {"name": "onprem-1", "cluster": "onprem", "mtu": 1500})
    host.put("isthmus/v1/nodes/onprem-2", {"name": "onprem-2", "cluster": "onprem", "mtu": 1500})
    host.put("isthmus/v1/alive/onprem-1", {"node": "onprem-1", "version": "1.0.0"})
    host.put("isthmus/v1/leader", {"holder": "x", "host": "onprem-1"})
    host.put("isthmus/v1/alloc/peers/cloud", {"state": "connected"})
    host.put("isthmus/v1/estate/roster", {"revision": 3})
    found = host.run("mesh_info")
    mesh = found["mesh"]
    assert found["changed"] is False
    assert {node["name"]: node["alive"] is not None for node in mesh["nodes"]} == {"onprem-1": True, "onprem-2": False}
    assert (mesh["leader"]["host"], mesh["peers"], mesh["estate"]) == (
        "onprem-1",
        {"cloud": {"state": "connected"}},
        {"roster": 3},
    )
    assert found["agent"] is None
    assert found["warnings"]


def test_an_etcd_that_is_away_is_told_in_words(host: Host) -> None:
    node = json.loads(Path(host.places["estate.NODE"]).read_text())
    node["etcd"]["endpoints"] = ["https://127.0.0.1:9"]
    Path(host.places["estate.NODE"]).write_text(json.dumps(node))
    for name, arguments in (("global_service", WEB), ("service_info", {}), ("mesh_info", {})):
        with pytest.raises(ModuleFailed, match=r"cannot be (read|written): .*127\.0\.0\.1:9"):
            host.run(name, **arguments)
