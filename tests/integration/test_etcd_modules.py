# SPDX-License-Identifier: GPL-3.0-or-later
"""What the etcd modules stand on: programs started beside an open connection, and the text of etcd's units."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import previous_release
import pytest
from integration.etcd_fixture import EtcdServer
from integration.module_runner import collection, run_module

# As AnsibleModule.run_command does: a preexec_fn makes Python fork() instead of vfork().
_FORKS = """
import subprocess, sys
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module
kvstore = bundle_module(None, "isthmus_agent.kvstore")
for _ in range(30):
    with kvstore.SyncEtcd([sys.argv[1]], *sys.argv[2:5]) as client:
        client.status()
        for _ in range(4):
            done = subprocess.run(["/bin/true"], preexec_fn=lambda: None, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), done
"""


def test_programs_start_while_a_connection_to_etcd_is_open(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "a", name="a") as server, collection() as environment:
        crt, key = server.ca.issue("root")
        command = [sys.executable, "-c", _FORKS, server.endpoint, str(server.ca.crt), str(crt), str(key)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_access_is_predicted_without_the_bundle() -> None:
    spec = {"host": "onprem-1", "cluster": {"name": "onprem"}, "registrar": None}
    result = run_module("etcd_access", {"spec": spec, "record": {}}, check=True, bundle=False)
    assert result["changed"]


def test_users_follow_the_record(tmp_path: Path) -> None:
    """A host that went and a cluster that is absent lose theirs, an orphan keeps its own; an older plan deletes
    nobody, and a limited run sees to its own host only."""
    with EtcdServer(tmp_path / "etcd", name="onprem-1") as server:
        pki = tmp_path / "pki"
        (pki / "trust").mkdir(parents=True)
        (pki / "trust" / "onprem.crt").symlink_to(server.ca.crt)
        for suffix, path in zip(("crt", "key"), server.ca.issue("root"), strict=True):
            (pki / f"root.{suffix}").symlink_to(path)
        (tmp_path / "data" / "member").mkdir(parents=True)
        places = {"etcd_unit.PKI": str(pki), "etcd_unit.DATA": str(tmp_path / "data")}

        def record(revision: int, hosts: list[str], cloud: str, by: str = "alice") -> dict[str, Any]:
            present = {name: {"state": "present"} for name in hosts}
            return {
                "roster": {"revision": revision, "by": by},
                "clusters/onprem": {"name": "onprem", "state": "present", "revision": revision, "hosts": present},
                "clusters/cloud": {"name": "cloud", "state": cloud, "revision": revision},
            }

        def run(documents: dict[str, Any], peers: list[str], check: bool = False, **more: Any) -> dict[str, Any]:
            registrar = {"peers": [{"name": name} for name in peers]}
            etcd = {"endpoints": [server.endpoint]}
            spec = {"host": "onprem-1", "cluster": {"name": "onprem"}, "registrar": registrar, "etcd": etcd}
            return run_module("etcd_access", {"spec": spec, "record": documents, **more}, check=check, places=places)

        def users() -> set[str]:
            ours = ("isthmus-agent-", "remote-")
            return {name for name in server.etcdctl("user", "list").split() if name.startswith(ours)}

        first = record(1, ["onprem-1", "onprem-2", "orphan"], "present")
        run(first, ["cloud"])
        everybody = {"isthmus-agent-onprem-1", "isthmus-agent-onprem-2", "isthmus-agent-orphan", "remote-cloud"}
        assert users() == everybody
        server.etcdctl("put", "isthmus/v1/estate/roster", json.dumps({"revision": 2, "by": "bob"}))

        following = record(2, ["onprem-1", "orphan"], "absent")
        told = run(following, [])
        assert "no user was deleted from its etcd" in " ".join(map(str, told["warnings"]))
        assert "bob wrote it" in " ".join(map(str, told["warnings"]))
        assert users() == everybody
        assert run(following, [], only=["onprem-1"])["changes"] == []

        server.etcdctl("put", "isthmus/v1/estate/roster", json.dumps(first["roster"]))
        lines = [f"delete {what} {name}" for what in ("user", "role") for name in sorted(everybody)]
        lines = [line for line in lines if "onprem-2" in line or "cloud" in line]
        for check in (True, False):
            assert run(following, [], check)["changes"] == lines
        assert users() == {"isthmus-agent-onprem-1", "isthmus-agent-orphan"}
        for check in (True, False):
            assert run(following, [], check)["changed"] is False


@pytest.mark.parametrize("only", [None, ["onprem-4"]])
@pytest.mark.parametrize("check", [True, False])
def test_a_host_that_an_upgrade_has_not_reached_gives_no_rights_and_says_so(
    tmp_path: Path, check: bool, only: list[str] | None
) -> None:
    (tmp_path / "member").mkdir()
    arguments: dict[str, Any] = {
        "spec": {"host": "onprem-1", "cluster": {"name": "onprem"}, "registrar": None},
        "record": {},
        "only": only,
    }
    places = {"etcd_unit.DATA": str(tmp_path)}
    packages = previous_release.python_path()
    result = run_module("etcd_access", arguments, check=check, places=places, packages=packages)
    assert (result["changed"], result["changes"]) == (False, [])
    told = " ".join(map(str, result["warnings"]))
    assert "an older version of isthmus.mesh, and the rights in the etcd of cluster onprem stay as they are" in told


def test_etcd_admits_its_own_authority_and_its_own_peers_only() -> None:
    spec = {
        "cluster": {"name": "onprem"},
        "pki": {"certificates": [{"name": "etcd-peer", "cn": "isthmus-etcd-peer"}]},
        "member": {
            "name": "onprem-1",
            "client_url": "https://198.18.1.11:2379",
            "peer_url": "https://198.18.1.11:2380",
            "quota_bytes": 2147483648,
        },
    }
    script = (
        "import json, sys\n"
        "from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit\n"
        "print(etcd_unit.environment(json.load(sys.stdin)))"
    )
    with collection() as environment:
        command = [sys.executable, "-c", script]
        text = subprocess.run(
            command, input=json.dumps(spec), env=environment, capture_output=True, text=True, check=True
        ).stdout
    settings = dict(line.split("=", 1) for line in text.splitlines() if line.startswith("ETCD_"))
    assert (
        settings["ETCD_TRUSTED_CA_FILE"] == settings["ETCD_PEER_TRUSTED_CA_FILE"] == "/etc/isthmus/pki/trust/onprem.crt"
    )
    assert settings["ETCD_CLIENT_CERT_AUTH"] == settings["ETCD_PEER_CLIENT_CERT_AUTH"] == "true"
    assert settings["ETCD_PEER_CERT_ALLOWED_CN"] == "isthmus-etcd-peer"
    assert settings["ETCD_ENABLE_GRPC_GATEWAY"] == "false"
    # Nothing that would let an empty member begin a cluster by itself.
    assert not [name for name in settings if name.startswith("ETCD_INITIAL_CLUSTER")]
