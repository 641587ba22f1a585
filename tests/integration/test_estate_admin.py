# SPDX-License-Identifier: GPL-3.0-or-later
"""The estate record and service definitions in a real etcd, written with the operator's own rights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.etcd_fixture import EtcdServer
from isthmus_agent import estate_admin, etcd_admin, facts
from isthmus_agent.kvstore import KeyValue, SyncEtcd
from isthmus_mesh import keys
from isthmus_mesh.documents import NodeAllocation, ServiceDefinition


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "a", name="a") as made:
        with made.sync_client() as client:
            wanted = etcd_admin.wanted_access("onprem", ["onprem-1"], ["cloud"])
            etcd_admin.ensure_access(client, wanted, apply=True, enable=True)
        yield made


@pytest.fixture
def operator(server: EtcdServer) -> Iterator[SyncEtcd]:
    with server.sync_client("isthmus-operator") as client:
        yield client


def service(name: str, **more: Any) -> dict[str, Any]:
    document = {
        "owner": "inventory",
        "revision": 1,
        "name": name,
        "namespace": "shop",
        "ports": [{"name": "http", "port": 80, "target_port": 8080, "protocol": "TCP"}],
        "backends": {"labels": {"app": name}},
        "health": None,
        "global": True,
    }
    return {**document, **more}


def keys_of(changes: list[estate_admin.Change]) -> list[str]:
    return [change.key.removeprefix("isthmus/v1/") for change in changes]


def test_the_record_is_written_once_and_the_roster_last(server: EtcdServer, operator: SyncEtcd) -> None:
    record = {"roster": {"revision": 1, "clusters": {}}, "clusters/onprem": {"revision": 1, "name": "onprem"}}
    predicted = estate_admin.write_documents(operator, record, apply=False)
    assert server.dump("isthmus/v1/estate/") == {}
    done = estate_admin.write_documents(operator, record, apply=True)
    assert done == predicted
    assert keys_of(done) == ["estate/clusters/onprem", "estate/roster"]
    assert json.loads(server.dump("isthmus/v1/estate/")["isthmus/v1/estate/roster"]) == record["roster"]
    assert estate_admin.write_documents(operator, record, apply=True) == []


def test_a_newer_record_is_never_overwritten(server: EtcdServer, operator: SyncEtcd) -> None:
    estate_admin.write_documents(operator, {"roster": {"revision": 5}}, apply=True)
    for apply in (False, True):
        with pytest.raises(estate_admin.EstateError, match="has revision 5 in etcd, and this run would write 4"):
            estate_admin.write_documents(operator, {"roster": {"revision": 4, "x": 1}}, apply)
    assert server.dump("isthmus/v1/estate/") == {"isthmus/v1/estate/roster": '{"revision":5}'}


def test_two_runs_planned_from_one_record_do_not_overwrite_each_other(server: EtcdServer, operator: SyncEtcd) -> None:
    """The second dealt the same range to another host; nothing of it is written, not even what does not collide."""

    def planned(host: str, by: str) -> dict[str, Any]:
        stamp = {"when": "2026-01-02T03:04:05Z", "by": by}
        cluster = {"revision": 7, "name": "onprem", "hosts": {host: {"range4": "10.101.0.16/28"}}}
        return {
            "clusters/cloud": {"revision": 3, "name": "cloud", "label": by},
            "clusters/onprem": {**cluster, "last_applied": stamp},
            "roster": {"revision": 2, **stamp},
        }

    first = planned("onprem-4", "alice")
    del first["clusters/cloud"]
    estate_admin.write_documents(operator, first, apply=True)
    before = server.dump("isthmus/v1/estate/")
    said = (
        r"clusters/onprem has revision 7 in etcd.*other content under that number.*"
        r"alice wrote it at 2026-01-02T03:04:05Z.*Next: run the playbook again; the plan is then made from it"
    )
    for apply in (False, True):
        with pytest.raises(estate_admin.EstateError, match=said):
            estate_admin.write_documents(operator, planned("onprem-5", "bob"), apply)
    second = planned("onprem-4", "bob")
    del second["clusters/onprem"]
    with pytest.raises(estate_admin.EstateError, match=r"estate/roster has revision 2 .*alice wrote it"):
        estate_admin.write_documents(operator, second, apply=True)
    assert server.dump("isthmus/v1/estate/") == before


def test_an_authority_gets_no_revision_and_is_never_taken_away(server: EtcdServer, operator: SyncEtcd) -> None:
    document = {"revision": 1, "name": "onprem", "ca_certificate": None}
    signed = {**document, "ca_certificate": "PEM"}
    for wanted, changed in ((document, True), (signed, True), (document, False), (signed, False)):
        done = estate_admin.write_documents(operator, {"clusters/onprem": wanted}, apply=True)
        assert bool(done) is changed
    assert json.loads(server.dump("isthmus/v1/estate/")["isthmus/v1/estate/clusters/onprem"]) == signed


def test_a_write_between_read_and_write_is_noticed(
    server: EtcdServer, operator: SyncEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = operator.get

    def get_and_be_late(key: str) -> Any:
        found = real(key)
        server.etcdctl("put", key, '{"revision":1,"by":"another"}')
        return found

    monkeypatch.setattr(operator, "get", get_and_be_late)
    with pytest.raises(estate_admin.EstateError, match="changed by somebody else during this run"):
        estate_admin.write_documents(operator, {"roster": {"revision": 1}}, apply=True)
    assert server.dump("isthmus/v1/estate/") == {"isthmus/v1/estate/roster": '{"revision":1,"by":"another"}'}


def test_a_run_confirms_the_roster_without_changing_it(server: EtcdServer, operator: SyncEtcd) -> None:
    estate_admin.confirm(operator)
    assert server.dump("isthmus/v1/estate/") == {}, "no roster, nothing to confirm"
    estate_admin.write_documents(operator, {"roster": {"revision": 5}}, apply=True)
    before = operator.get(keys.ROSTER)
    estate_admin.confirm(operator)
    after = operator.get(keys.ROSTER)
    assert before is not None
    assert after is not None
    assert after.value == before.value
    assert after.mod_revision > before.mod_revision


def test_a_roster_that_another_run_writes_is_not_put_back(
    server: EtcdServer, operator: SyncEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    estate_admin.write_documents(operator, {"roster": {"revision": 5}}, apply=True)
    read = operator.get

    def overtaken(key: str) -> KeyValue | None:
        found = read(key)
        server.etcdctl("put", key, '{"revision":6}')
        return found

    monkeypatch.setattr(operator, "get", overtaken)
    with pytest.raises(estate_admin.EstateError, match="was changed by somebody else"):
        estate_admin.confirm(operator)
    assert server.dump("isthmus/v1/estate/") == {"isthmus/v1/estate/roster": '{"revision":6}'}


def test_a_damaged_document_is_replaced(server: EtcdServer, operator: SyncEtcd) -> None:
    server.etcdctl("put", "isthmus/v1/estate/roster", "{broken")
    assert keys_of(estate_admin.write_documents(operator, {"roster": {"revision": 1}}, apply=True)) == ["estate/roster"]


def test_services_have_owners_and_revisions(server: EtcdServer, operator: SyncEtcd) -> None:
    def write(*present: dict[str, Any], absent: tuple[str, ...] = (), owner: str = "inventory") -> list[str]:
        predicted = estate_admin.write_services(operator, present, absent, owner, apply=False)
        done = estate_admin.write_services(operator, present, absent, owner, apply=True)
        assert predicted == done
        assert estate_admin.write_services(operator, present, absent, owner, apply=True) == []
        return keys_of(done)

    assert write(service("web")) == ["services/shop/web"]
    assert write(service("web", affinity="local")) == ["services/shop/web"]
    held = ServiceDefinition.from_json(server.dump("isthmus/v1/services/")["isthmus/v1/services/shop/web"])
    assert (held.owner, held.revision, held.affinity) == ("inventory", 2, "local")

    assert write(service("canary"), owner="module") == ["services/shop/canary"]
    with pytest.raises(estate_admin.EstateError, match="shop/web belongs to inventory, and module would define it too"):
        write(service("web"), owner="module")
    with pytest.raises(estate_admin.EstateError, match="shop/canary belongs to module, and inventory would"):
        write(service("canary"))
    # What the inventory removes is its own only; a run-time service survives.
    assert write(absent=("shop/web", "shop/canary", "shop/never")) == ["services/shop/web"]
    assert estate_admin.owner_of(operator, "shop/canary") == "module"
    assert write(absent=("shop/canary",), owner="module") == ["services/shop/canary"]
    assert server.dump("isthmus/v1/services/") == {}


def test_bad_definitions_are_refused_with_their_name(server: EtcdServer, operator: SyncEtcd) -> None:
    with pytest.raises(estate_admin.EstateError, match=r"shop/web.*ports"):
        estate_admin.write_services(operator, [service("web", ports=[])], [], "inventory", apply=True)
    server.etcdctl("put", "isthmus/v1/services/shop/web", "{broken")
    with pytest.raises(estate_admin.EstateError, match=r"services/shop/web in etcd is damaged .* delete it"):
        estate_admin.write_services(operator, [service("web")], [], "inventory", apply=True)


def reports(*hosts: str, workloads: int = 1) -> set[str]:
    return {
        f"isthmus/v1/{key}"
        for host in hosts
        for key in (f"nodes/{host}", f"alive/{host}", *(f"workloads/{host}/shop.web{n}" for n in range(workloads)))
    }


def test_reports_of_hosts_that_the_record_does_not_have_go(server: EtcdServer, operator: SyncEtcd) -> None:
    """An orphan is in the record. More keys than etcd takes in one transaction."""
    document = {"name": "onprem", "revision": 2, "hosts": {"onprem-1": {"state": "present"}, "o": {"state": "present"}}}
    kept, gone = reports("onprem-1", "o"), reports("onprem-11", "x", workloads=120)
    for key in kept | gone:
        operator.put(key, "{}")
    estate_admin.write_documents(operator, {"clusters/onprem": document}, apply=True)
    predicted = estate_admin.delete_reports(operator, document, apply=False)
    assert {change.key for change in predicted} == gone
    assert set(server.dump("isthmus/v1/nodes/")) == {key for key in kept | gone if "/nodes/" in key}
    assert estate_admin.delete_reports(operator, document, apply=True) == predicted
    found = {key for kind in ("nodes", "alive", "workloads") for key in server.dump(f"isthmus/v1/{kind}/")}
    assert found == kept
    assert estate_admin.delete_reports(operator, document, apply=True) == []


def test_reports_of_nodes_that_the_registrar_dealt_stay(server: EtcdServer, operator: SyncEtcd) -> None:
    """The record of a cluster whose control plane is in it has no hosts."""
    document = {"name": "managed", "revision": 2, "control_plane": "in_cluster", "hosts": {}}

    def dealt(number: int, released: str | None = None) -> str:
        network = f"10.106.0.{16 * number}"
        return NodeAllocation(f"{network}/28", f"{network[:-1]}1", f"192.0.2.{number}", "then", released).to_json()

    server.etcdctl("put", "isthmus/v1/alloc/nodes/n1", dealt(0))
    server.etcdctl("put", "isthmus/v1/alloc/nodes/n2", dealt(0, "2026-01-02T03:04:05Z"))
    server.etcdctl("put", "isthmus/v1/alloc/nodes/n3", "{damaged")
    kept, gone = reports("n1", workloads=0), reports("n2", "n3", "n4", workloads=0)
    for key in kept | gone:
        operator.put(key, "{}")
    estate_admin.write_documents(operator, {"clusters/managed": document}, apply=True)
    assert {change.key for change in estate_admin.delete_reports(operator, document, apply=True)} == gone
    assert {key for kind in ("nodes", "alive") for key in server.dump(f"isthmus/v1/{kind}/")} == kept
    assert estate_admin.dealt_nodes(operator) == {"n1": "10.106.0.1"}


def test_reports_of_a_host_that_another_run_adds_stay(
    server: EtcdServer, operator: SyncEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"name": "onprem", "revision": 2, "hosts": {}}
    estate_admin.write_documents(operator, {"clusters/onprem": document}, apply=True)
    newer = json.dumps({**document, "revision": 3, "hosts": {"n": {"state": "present"}}})
    real = operator.range

    def range_and_be_late(prefix: str) -> Any:
        """The other run writes its record, and its agent reports."""
        server.etcdctl("put", "isthmus/v1/estate/clusters/onprem", newer)
        server.etcdctl("put", "isthmus/v1/nodes/n", "{}")
        return real(prefix)

    monkeypatch.setattr(operator, "range", range_and_be_late)
    with pytest.raises(estate_admin.EstateError, match="clusters/onprem was changed by somebody else"):
        estate_admin.delete_reports(operator, document, apply=True)
    with pytest.raises(estate_admin.EstateError, match="clusters/onprem has revision 3 in etcd"):
        estate_admin.delete_reports(operator, document, apply=True)
    assert set(server.dump("isthmus/v1/nodes/")) == {"isthmus/v1/nodes/n"}


def test_facts_are_read_with_an_agents_rights(server: EtcdServer, operator: SyncEtcd) -> None:
    estate_admin.write_services(operator, [service("web")], [], "inventory", apply=True)
    server.etcdctl("put", "isthmus/v1/alloc/vips/shop/web", '{"ipv4":"10.111.0.2","ipv6":null,"released":null}')
    shape = '{"cluster":"%s","namespace":"shop","name":"web","backends":{"%s":{}},"shared":true}'
    server.etcdctl("put", "cilium/state/services/v1/onprem/shop/web", shape % ("onprem", "10.101.0.2"))
    server.etcdctl("put", "cilium/cache/services/v1/cloud/shop/web", shape % ("cloud", "10.102.0.2"))
    server.etcdctl("put", "isthmus/v1/nodes/onprem-1", '{"name":"onprem-1"}')
    server.etcdctl("put", "isthmus/v1/alloc/peers/cloud", '{"state":"connected"}')
    server.etcdctl("put", "isthmus/v1/leader", '{"holder":"x"}')
    server.etcdctl("put", "isthmus/v1/estate/roster", '{"revision":3}')
    with server.sync_client("isthmus-agent-onprem-1") as agent:
        (web,) = facts.services(agent, "onprem")
        mesh = facts.mesh(agent, "onprem")
    assert (web["namespace"], web["name"], web["address"], web["definition"]["owner"]) == (
        "shop",
        "web",
        "10.111.0.2",
        "inventory",
    )
    assert web["clusters"] == {
        "onprem": {"backends": ["10.101.0.2"], "shared": True},
        "cloud": {"backends": ["10.102.0.2"], "shared": True},
    }
    assert mesh == {
        "cluster": "onprem",
        "nodes": [{"name": "onprem-1", "alive": None}],
        "peers": {"cloud": {"state": "connected"}},
        "leader": {"holder": "x"},
        "estate": {"roster": 3},
    }
