# SPDX-License-Identifier: GPL-3.0-or-later
"""`restore` of a cluster whose etcd and authority are lost on all its etcd hosts, while traffic goes on."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from demo import EDGE
from estate_tools import ONPREM, PKI, Estate
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

PEERS = ("cloud-1", EDGE)
KINDS = ("nodes", "ip", "identities", "services")


def revision(estate: Estate, host: str) -> int:
    return int(estate.etcd_members(host)[0]["Status"]["header"]["revision"])


def written_since(estate: Estate, host: str, since: int) -> list[tuple[str, str, bool]]:
    """Every change of what this host's cluster mirrors of onprem after a revision: key, value, whether it went.

    etcd keeps an hour of history, and `etcdctl watch` begins with it."""
    found = []
    for kind in KINDS:
        prefix = f"cilium/cache/{kind}/v1/onprem/"
        words = ("watch", prefix, "--prefix", "--rev", str(since + 1), "-w", "json")
        argv = ["timeout", "3", "etcdctl", "--endpoints", "https://127.0.0.1:2379"]
        argv += ["--cacert", f"{PKI}/trust/{estate.lab.hosts[host].cluster}.crt"]
        argv += ["--cert", f"{PKI}/root.crt", "--key", f"{PKI}/root.key", *words]
        for line in estate.lab.exec(host, argv, check=False).stdout.splitlines():
            for event in json.loads(line).get("Events") or ():
                kv = {name: base64.b64decode(event["kv"].get(name, "")).decode() for name in ("key", "value")}
                found.append((kv["key"], kv["value"], event.get("type") == 1))
    return found


def backends(services: dict[str, str]) -> dict[str, set[str]]:
    return {key: set(json.loads(value)["backends"]) for key, value in services.items()}


def lose(estate: Estate) -> None:
    """What newly imaged hosts do not have: etcd's data and settings, every key and certificate, the authority."""
    estate.etcd("onprem", "stop")
    for host in ONPREM:
        gone = f"rm -rf /var/lib/isthmus/etcd /etc/isthmus/etcd.env {PKI}"
        estate.lab.exec(host, ["sh", "-c", gone])


def test_the_only_etcd_of_three_hosts_and_their_authority_come_back(estate: Estate, tmp_path: Path) -> None:
    private, public, kept = tmp_path / "operator.key", tmp_path / "operator.pem", tmp_path / "backups"
    for words in (("genrsa", "-out", private, "3072"), ("rsa", "-in", private, "-pubout", "-out", public)):
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    where: dict[str, Any] = {"isthmus_restore": "onprem", "isthmus_backup_dir": str(kept)}
    estate.converged()
    play("backup", "-e", json.dumps({"isthmus_backup_dir": str(kept), "isthmus_backup_key": str(public)}))
    running = play("restore", "-e", json.dumps(where), check=False)
    assert running.status == 2
    assert "The etcd of cluster onprem runs on this host. Nothing was changed on any host." in running.output
    assert [estate.unit_state(host, "isthmus-etcd") for host in ONPREM] == ["active"] * 3

    authority = estate.lab.exec("onprem-1", ["cat", f"{PKI}/ca.crt"]).stdout
    secret = estate.lab.exec("onprem-1", ["cat", f"{PKI}/ca.key"]).stdout.splitlines()[1:3]
    cluster_id = estate.etcd_members("onprem-1")[0]["Status"]["header"]["cluster_id"]
    mirrors, since = {host: estate.state(host) for host in PEERS}, {host: revision(estate, host) for host in PEERS}
    own = estate.state("onprem-1")
    maps = {host: estate.maps(host) for host in estate.lab.hosts}
    with estate.unnoticed(estate.edge, estate.onprem), estate.customer("cloud-1") as cloud, estate.unnoticed(cloud):
        lose(estate)
        refused = play("restore", "-e", json.dumps(where), check=False)
        assert refused.status == 2
        assert "isthmus_restore_key is not given" in refused.output
        where["isthmus_restore_key"] = str(private)
        predicted = play("restore", "--check", "--diff", "-e", json.dumps(where))
        assert predicted.changed == {}
        assert "They join it anew: onprem-2, onprem-3." in predicted.output
        assert "The private key of its authority is put back on onprem-1." in predicted.output

        run = play("restore", "-vv", "--diff", "-e", json.dumps(where))
        assert [line for line in secret if line in run.output + predicted.output] == []
        estate.until("a registrar leads", lambda: estate.registrar_leader("onprem-1")[1] != 0)
        estate.converged()
    play("verify")
    assert play("site").changed == {}

    assert estate.lab.exec("onprem-1", ["cat", f"{PKI}/ca.crt"]).stdout == authority
    assert estate.lab.exec("onprem-1", ["stat", "-c", "%a %U", f"{PKI}/ca.key"]).stdout.split() == ["600", "root"]
    members = estate.etcd_members("onprem-1")
    assert len(members) == 3
    assert cluster_id not in {member["Status"]["header"]["cluster_id"] for member in members}
    left = estate.lab.exec("onprem-1", ["sh", "-c", "ls -A /var/lib/isthmus/snapshots | grep restore"], check=False)
    assert left.stdout == ""

    now = estate.state("onprem-1")
    dealt = {name: key.value for name, key in own.items() if not name.startswith("isthmus/v1/alloc/peers/")}
    assert {name: value for name, value in dealt.items() if name not in now or now[name].value != value} == {}
    assert estate.withdrawn(mirrors) == {}
    for host in PEERS:
        changed = written_since(estate, host, since[host])
        assert [key for key, _value, gone in changed if gone] == []
        prefix = "cilium/cache/services/v1/onprem/"
        before = backends({key: one.value for key, one in mirrors[host].items() if key.startswith(prefix)})
        after = [(key, backends({key: value})[key]) for key, value, _gone in changed if key.startswith(prefix)]
        assert [(key, left) for key, left in after if not left >= before[key]] == []
    assert estate.maps_changed(maps) == {}
