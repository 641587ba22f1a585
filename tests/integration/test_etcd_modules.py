# SPDX-License-Identifier: GPL-3.0-or-later
"""What the etcd modules stand on: programs started beside an open connection, and the text of etcd's units."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    result = run_module("etcd_access", {"spec": spec, "nodes": ["onprem-1"]}, check=True, bundle=False)
    assert result["changed"]


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
