# SPDX-License-Identifier: GPL-3.0-or-later
"""estate_record as Ansible runs it: what a sick or a busy etcd means for a run."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import previous_release
import pytest
from integration.etcd_fixture import EtcdServer
from integration.module_runner import ModuleFailed, run_module
from isthmus_agent import estate_admin, etcd_admin, run_lock
from isthmus_agent.kvstore import EtcdNoSpace
from isthmus_mesh import jsontext
from isthmus_mesh.keys import RUN_LOCK
from isthmus_mesh.record import LARGEST_DOCUMENT

PACKAGES = Path(estate_admin.__file__).parents[1]


class Host:
    """An etcd host of cluster onprem."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.server = EtcdServer(directory / "etcd", name="onprem-1", arguments=arguments)
        self.directory = directory
        self.pki = directory / "pki"
        (self.pki / "trust").mkdir(parents=True)
        (self.pki / "trust" / "onprem.crt").symlink_to(self.server.ca.crt)
        for suffix, path in zip(("crt", "key"), self.server.ca.issue("isthmus-operator"), strict=True):
            (self.pki / f"operator.{suffix}").symlink_to(path)
        (directory / "data" / "member").mkdir(parents=True)
        self.places = {
            "estate.NODE": str(directory / "node.json"),
            "estate.ESTATE": str(directory / "estate.json"),
            "estate.PKI": str(self.pki),
            "etcd_unit.PKI": str(self.pki),
            "etcd_unit.DATA": str(directory / "data"),
            "etcd_unit.ENVIRONMENT": str(directory / "etcd.env"),
            "respawn.BUNDLE_PYTHON": sys.executable,
            "run_lock.FILE": str(directory / "run.lock"),
        }

    def give_rights(self) -> None:
        with self.server.sync_client() as client:
            wanted = etcd_admin.wanted_access("onprem", ["onprem-1"], [])
            etcd_admin.ensure_access(client, wanted, apply=True, enable=True)

    def record(self, *hosts: str, revision: int = 1, by: str = "alice") -> dict[str, Any]:
        stamp = {"when": "2026-01-02T03:04:05Z", "by": by}
        cluster = {
            "name": "onprem",
            "state": "present",
            "revision": revision,
            "ca_certificate": "PEM",
            "etcd": {"members": ["onprem-1"], "client_port": self.server.port},
            "hosts": {name: {"underlay4": "127.0.0.1", "state": "present"} for name in hosts},
            "last_applied": stamp,
        }
        return {"clusters/onprem": cluster, "roster": {"revision": revision, **stamp}}

    def write(self, record: dict[str, Any], check: bool = False) -> dict[str, Any]:
        return run_module("estate_record", {"cluster": "onprem", "record": record}, check=check, places=self.places)

    def node(self) -> None:
        """The host knows its etcd."""
        spec = {"cluster": {"name": "onprem"}, "etcd": {"endpoints": [f"https://127.0.0.1:{self.server.port}"]}}
        (self.directory / "node.json").write_text(json.dumps(spec))

    def by(
        self, operator: str, state: str, check: bool = False, packages: Path = PACKAGES, **more: Any
    ) -> dict[str, Any]:
        """The module as a task of this operator's run calls it."""
        run = {"by": operator, "where": f"{operator}s-laptop", "process": f"machine/{operator}"}
        lock = {"lock": True} if state == "read" else {}
        arguments = {"cluster": "onprem", "state": state, "run": run, **lock, **more}
        return run_module("estate_record", arguments, check=check, places=self.places, packages=packages)

    def held(self) -> Any:
        """The lock in etcd, empty when nobody has it."""
        return json.loads(self.server.dump(RUN_LOCK).get(RUN_LOCK, "{}"))

    def lock(self) -> Any:
        """Who has the lock in etcd."""
        return self.held().get("by")

    def read(self) -> Any:
        result = run_module("estate_record", {"cluster": "onprem", "state": "read"}, places=self.places)
        return result.get("record")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    with made.server:
        made.give_rights()
        yield made


def warnings_of(result: dict[str, Any]) -> str:
    return " ".join(map(str, result.get("warnings", ())))


def test_a_removed_hosts_reports_go_with_it(host: Host) -> None:
    reports = [f"isthmus/v1/{key}" for key in ("nodes/onprem-2", "alive/onprem-2", "workloads/onprem-2/shop.web")]
    host.write(host.record("onprem-1", "onprem-2"))
    for key in (*reports, "isthmus/v1/nodes/onprem-1"):
        host.server.etcdctl("put", key, "{}")
    following = host.record("onprem-1", revision=2)
    predicted = host.write(following, check=True)
    assert [entry["before_header"] for entry in predicted["diff"]][-3:] == [reports[0], reports[2], reports[1]]
    assert host.write(following)["diff"] == predicted["diff"]
    assert not set(reports) & set(host.server.dump("isthmus/v1/"))
    assert "isthmus/v1/nodes/onprem-1" in host.server.dump("isthmus/v1/")
    assert [host.write(following, check)["changed"] for check in (False, True)] == [False, False]


def test_the_same_revision_with_other_content_is_a_failure(host: Host) -> None:
    host.write(host.record("onprem-1", "onprem-2"))
    before = host.server.dump("isthmus/v1/estate/")
    for check in (True, False):
        with pytest.raises(
            ModuleFailed, match=r"other content under that number.*alice wrote it.*run the playbook again"
        ):
            host.write(host.record("onprem-1", "onprem-3", by="bob"), check)
    assert host.server.dump("isthmus/v1/estate/") == before


def test_a_host_that_an_upgrade_has_not_reached_takes_no_record_and_ends_no_run(host: Host) -> None:
    """As with --limit or isthmus_serial: the run looks, writes and gives the lock back also on hosts of the version
    before."""
    host.node()
    host.write(host.record("onprem-1"))
    host.places["bundle.CURRENT"] = str(host.directory)
    (host.directory / "bundle.json").write_text(json.dumps({"version": previous_release.VERSION}))
    upgrade = {"packages": previous_release.python_path(), "version": "1.0.0"}
    following = host.record("onprem-1", revision=2)
    before = host.server.dump("isthmus/v1/estate/")

    found = host.by("alice", "read", **upgrade)
    assert found["record"]["documents"] == host.record("onprem-1")
    assert found["locked"], "in the file: that bundle knows no lock in etcd"
    assert host.by("alice", "present", check=True, record=following, **upgrade)["changed"]
    refused = host.by("alice", "present", record=following, **upgrade)
    assert "record" not in refused
    assert f"still has isthmus.mesh {previous_release.VERSION}, and this run is 1.0.0" in warnings_of(refused)
    assert host.server.dump("isthmus/v1/estate/") == before
    host.by("alice", "released", **upgrade)
    assert not Path(host.places["run_lock.FILE"]).exists()

    (host.directory / "bundle.json").write_text(json.dumps({"version": "1.0.0"}))
    assert "record" in host.by("alice", "present", record=following, version="1.0.0")
    assert host.read()["documents"] == following


def test_what_a_newer_version_wrote_is_not_replaced(host: Host) -> None:
    """Whatever its revision: of what is newer only the schema can be read."""
    record = host.record("onprem-1", revision=3)
    newer = {**host.record("onprem-1")["clusters/onprem"], "schema": 2}
    host.server.etcdctl("put", "isthmus/v1/estate/clusters/onprem", json.dumps(newer))
    before = host.server.dump("isthmus/v1/")
    for check in (True, False):
        with pytest.raises(
            ModuleFailed,
            match=r"clusters/onprem in etcd: its schema 2 is newer than 1.*Next: `ansible-galaxy collection install",
        ):
            host.write(record, check)
    assert host.server.dump("isthmus/v1/") == before


def test_etcd_takes_the_largest_document_that_is_planned(host: Host) -> None:
    record = host.record("onprem-1")
    cluster = record["clusters/onprem"]
    cluster["filling"] = "x" * (LARGEST_DOCUMENT - len(jsontext.dumps(cluster)) - len(',"filling":""'))
    assert len(jsontext.dumps(cluster)) == LARGEST_DOCUMENT
    cluster["ca_certificate"] = "P" * 4096
    assert host.write(record)["record"]["documents"] == record
    assert host.server.dump("isthmus/v1/estate/clusters/onprem")


def test_an_etcd_without_space_is_told_and_stops_nobody(tmp_path: Path) -> None:
    host = Host(tmp_path, "--quota-backend-bytes=8388608")
    with host.server, host.server.sync_client() as client:
        host.give_rights()
        with contextlib.suppress(EtcdNoSpace):
            for number in range(30):
                client.put(f"fill{number}", b"x" * 1_000_000)
        result = host.write(host.record("onprem-1"))
    assert "record" not in result
    said = warnings_of(result)
    assert "the etcd of cluster onprem did not take the estate record" in said
    assert "space exceeded" in said
    assert "Next: free space there" in said


def test_an_etcd_that_denies_the_operator_is_told_and_stops_nobody(host: Host) -> None:
    host.server.etcdctl("user", "revoke-role", "isthmus-operator", "isthmus-operator")
    host.server.etcdctl("user", "revoke-role", "isthmus-operator", "isthmus-reader")
    for check in (True, False):
        result = host.write(host.record("onprem-1"), check)
        assert (result["changed"], "record" in result) == (False, False)
        assert "permission denied" in warnings_of(result)
        assert "Next: run the playbook with --tags etcd on that cluster" in warnings_of(result)


def test_an_etcd_that_does_not_answer_is_told_and_stops_nobody(host: Host) -> None:
    host.server.stop()
    assert "Next: look at `journalctl -u isthmus-etcd`" in warnings_of(host.write(host.record("onprem-1")))


def test_the_record_of_a_run_that_ended_early_is_found(host: Host) -> None:
    """It was written, but the host's specification was not: without it the same would be dealt again."""
    host.write(host.record("onprem-1"))
    assert host.read() is None
    settings = {
        "ETCD_ADVERTISE_CLIENT_URLS": f"https://192.0.2.1:{host.server.port}",
        "ETCD_TRUSTED_CA_FILE": f"{host.pki}/trust/onprem.crt",
    }
    environment = host.directory / "etcd.env"
    environment.write_text("# by us\n" + "".join(f"{name}={value}\n" for name, value in settings.items()))
    found = host.read()
    assert (found["cluster"], found["documents"]) == ("onprem", host.record("onprem-1"))
    environment.write_text(environment.read_text().replace("onprem.crt", "cloud.crt"))
    assert host.read() is None
    (host.directory / "estate.json").write_text(json.dumps(host.record("onprem-1")))
    assert host.read()["cluster"] is None


def test_one_run_at_a_time_has_the_lock(host: Host) -> None:
    host.node()
    assert host.by("alice", "read")["locked"]
    for state in ("read", "present"):
        more = {"record": host.record("onprem-1")} if state == "present" else {}
        with pytest.raises(
            ModuleFailed, match=r"onprem is being changed by another run: alice on alices-laptop"
        ) as told:
            host.by("bob", state, **more)
        assert told.value.result["locked_by"]["process"] == "machine/alice"
        assert f"isthmus_break_lock={told.value.result['locked_by']['name']}" in told.value.msg
    assert host.server.dump("isthmus/v1/estate/") == {}
    assert host.by("alice", "present", record=host.record("onprem-1"))["locked"]
    host.by("bob", "released")
    assert host.lock() == "alice", "bob has nothing to give back"
    host.by("alice", "released")
    assert host.lock() is None
    assert host.by("bob", "read")["locked"]
    assert host.lock() == "bob"


def test_a_run_keeps_the_lock_it_has_for_longer(host: Host) -> None:
    host.node()
    host.by("alice", "read")
    before = host.held()
    host.by("alice", "present", record=host.record("onprem-1"))
    after = host.held()
    assert after["since"] == before["since"]
    assert after["until"] > before["until"]


def test_a_lock_ends_by_itself(host: Host) -> None:
    host.node()
    host.places["run_lock.LOOKING"] = 1
    host.by("alice", "read")
    deadline = time.monotonic() + 30
    while host.lock() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert host.by("bob", "read")["locked"]


def test_what_check_mode_and_a_plan_read_takes_no_lock(host: Host) -> None:
    host.node()
    host.by("alice", "read", check=True)
    host.by("alice", "read", lock=False)
    assert host.lock() is None
    host.by("bob", "read")
    assert not host.by("alice", "read", check=True)["locked"]
    assert host.lock() == "bob"


def test_a_broken_lock_lets_its_run_write_nothing_more(host: Host) -> None:
    host.node()
    host.by("alice", "read")
    with host.server.sync_client("isthmus-operator") as client:
        fence = run_lock.take(client, {"name": "carol", "since": ""}, 60, breaking=host.held()["name"])
        assert host.held()["name"] == "carol"
        with pytest.raises(ModuleFailed, match="being changed by another run"):
            host.by("alice", "present", record=host.record("onprem-1"))
        # Broken between its look at the lock and its write.
        run_lock.take(client, {"name": "dave", "since": ""}, 60, breaking="carol")
        with pytest.raises(estate_admin.EstateError, match="lock was broken or ran out"):
            estate_admin.write_documents(client, host.record("onprem-1"), True, [fence])
    assert host.server.dump("isthmus/v1/estate/") == {}


def test_only_the_named_run_loses_its_lock(host: Host) -> None:
    host.node()
    host.by("alice", "read")
    name = host.held()["name"]
    with pytest.raises(ModuleFailed, match="another run: alice"):
        host.by("bob", "read", break_lock="0badcafe")
    assert host.by("bob", "read", break_lock=name)["locked"]
    assert host.lock() == "bob"


def test_before_there_is_an_etcd_the_host_has_the_lock(host: Host) -> None:
    """No specification on the host, so no etcd to ask: a new estate."""
    file = Path(host.places["run_lock.FILE"])
    assert host.by("alice", "read")["locked"]
    assert host.lock() is None
    with pytest.raises(ModuleFailed, match="another run: alice on alices-laptop"):
        host.by("bob", "read")
    host.by("bob", "released")
    assert file.exists()
    host.by("alice", "released")
    assert not file.exists()
