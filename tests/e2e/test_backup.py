# SPDX-License-Identifier: GPL-3.0-or-later
"""`backup` of the running estate: openssl opens the authorities' keys, etcdctl reads the snapshots."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from demo import EDGE
from estate_tools import ETCD_HOSTS, PKI, Estate
from playbook import documented, play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

FILES = {"ca.crt", "ca.key.cms", "estate.json", "issued.json", "snapshot.db"}


def openssl(*words: object, feed: str | None = None) -> str:
    done = subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, text=True, input=feed)
    return done.stdout


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An operator's private and public key."""
    place = tmp_path_factory.mktemp("operator")
    private, public = place / "operator.key", place / "operator.pem"
    openssl("genrsa", "-out", private, "3072")
    openssl("rsa", "-in", private, "-pubout", "-out", public)
    return private, public


def test_every_cluster_is_backed_up(estate: Estate, operator: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = operator
    estate.converged()
    kept = tmp_path / "backups"
    variables = ("-e", json.dumps({"isthmus_backup_dir": str(kept), "isthmus_backup_key": str(public)}))
    predicted = play("backup", "--check", "--diff", *variables)
    assert not kept.exists()
    run = play("backup", "-vv", "--diff", *variables)
    assert sum(predicted.changed.values()) == sum(run.changed.values()) == 2 * len(ETCD_HOSTS)
    assert sorted(path.name for path in kept.iterdir()) == sorted(ETCD_HOSTS)

    secret = []
    for cluster, hosts in ETCD_HOSTS.items():
        [place] = (kept / cluster).iterdir()
        assert {path.name for path in place.iterdir()} == FILES | {"manifest.json"}
        assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (place, place.parent)} == {0o700}

        manifest = json.loads((place / "manifest.json").read_text())
        assert manifest["cluster"] == cluster
        assert manifest["host"] in hosts
        [member, *_] = estate.etcd_members(hosts[0])
        assert manifest["etcd"]["cluster_id"] == f"{member['Status']['header']['cluster_id']:x}"
        digests = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in FILES}
        assert {name: file["sha256"] for name, file in manifest["files"].items()} == digests
        status = subprocess.run(
            ["etcdctl", "snapshot", "status", str(place / "snapshot.db"), "-w", "json"],
            env={"ETCDCTL_API": "3", "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(status.stdout)["revision"] >= manifest["etcd"]["revision"]
        record = json.loads((place / "estate.json").read_text())
        # Of a cluster that was removed there is a document that says so.
        present = {name for name, document in record.items() if document.get("state") != "absent"}
        assert present == {"roster", *(f"clusters/{name}" for name in ETCD_HOSTS)}
        assert manifest["authority"]["host"] == record[f"clusters/{cluster}"]["ca_host"]

        key = openssl("cms", "-decrypt", "-inform", "PEM", "-in", place / "ca.key.cms", "-inkey", private)
        there = estate.lab.exec(manifest["authority"]["host"], ["cat", f"{PKI}/ca.crt"]).stdout
        assert (place / "ca.crt").read_text() == there
        assert openssl("pkey", "-pubout", feed=key) == openssl("x509", "-noout", "-pubkey", feed=there)
        fingerprint = openssl("x509", "-noout", "-fingerprint", "-sha256", feed=there).split("=")[1]
        assert manifest["authority"]["fingerprint"] == "sha256:" + fingerprint.strip().replace(":", "").lower()
        secret += key.splitlines()[1:3]

    assert not [line for line in secret if line in predicted.output + run.output]
    for host in estate.lab.hosts:
        left = estate.lab.exec(host, ["find", "/root/.ansible", "-name", "snapshot.db*"], check=False)
        assert left.stdout == ""

    play("backup", *variables)
    assert [len(list((kept / cluster).iterdir())) for cluster in ETCD_HOSTS] == [2, 2, 2]
    play("verify")


def test_a_cluster_whose_etcd_is_stopped_is_told(estate: Estate, operator: tuple[Path, Path], tmp_path: Path) -> None:
    kept = tmp_path / "backups"
    estate.etcd("edge", "stop")
    try:
        run = play("backup", "-e", json.dumps({"isthmus_backup_dir": str(kept)}), check=False)
    finally:
        estate.etcd("edge", "start")
    assert run.status == 2, run.output[-6000:]
    assert "Cluster edge was not backed up. edge-1: " in run.output
    assert "is NOT in it" in run.output
    assert sorted(path.name for path in kept.iterdir()) == ["cloud", "onprem"]
    estate.converged()


def test_a_lost_etcd_and_authority_come_back_by_the_commands_of_the_docs(
    estate: Estate, operator: tuple[Path, Path], tmp_path: Path
) -> None:
    """cloud has one member and its authority on the same host; traffic goes on meanwhile."""
    private, public = operator
    host = "cloud-1"
    estate.converged()
    variables = {"isthmus_backup_dir": str(tmp_path / "backups"), "isthmus_backup_key": str(public)}
    play("backup", "--limit", "cloud", "-e", json.dumps(variables))
    [place] = (tmp_path / "backups" / "cloud").iterdir()
    authority = estate.lab.exec(host, ["cat", f"{PKI}/ca.crt"]).stdout
    term = estate.registrar_leader(host)
    mirrors = {other: estate.state(other) for other in ("onprem-1", EDGE)}
    with estate.unnoticed(estate.edge):
        lost = f"/var/lib/isthmus/etcd/member {PKI}/ca.key {PKI}/ca.crt {PKI}/issued.json"
        lose = f"systemctl stop isthmus-etcd && rm -rf {lost}"
        estate.lab.exec(host, ["sh", "-c", lose])
        refused = play("site", "--limit", "cloud", check=False)
        assert refused.status == 2, refused.output[-6000:]
        assert "Restore ca.key (mode 0600, owner root) from a backup" in refused.output

        key = openssl("cms", "-decrypt", "-inform", "PEM", "-in", place / "ca.key.cms", "-inkey", private)
        estate.lab.exec(host, ["sh", "-c", f"umask 077; cat > {PKI}/ca.key"], feed=key)
        estate.lab.exec(host, ["sh", "-c", f"cat > {PKI}/ca.crt"], feed=(place / "ca.crt").read_text())
        commands = documented("operating.md", "ssh root@CA_HOST").splitlines()
        [ledger] = [line for line in commands if "issued.json" in line]
        text = subprocess.run(
            ["sh", "-c", ledger.split(" | ssh ")[0]], cwd=place, capture_output=True, text=True, check=True
        ).stdout
        assert json.loads(text)["since"] is not None
        estate.lab.exec(host, ["sh", "-c", f"cat > {PKI}/issued.json"], feed=text)
        snapshot = base64.b64encode((place / "snapshot.db").read_bytes()).decode()
        estate.lab.exec(host, ["sh", "-c", "base64 -d > /root/snapshot.db"], feed=snapshot)
        commands = documented("operating.md", ". /etc/isthmus/etcd.env")
        estate.lab.exec(host, ["sh", "-e", "-c", f"cd /root\n{commands}\nrm /root/snapshot.db"])

        play("site")
        estate.until(
            "a registrar leads with the restored etcd", lambda: estate.registrar_leader(host)[1] not in (0, term[1])
        )
        estate.converged()
    assert estate.withdrawn(mirrors) == {}
    assert estate.lab.exec(host, ["cat", f"{PKI}/ca.crt"]).stdout == authority
    assert estate.lab.exec(host, ["stat", "-c", "%a %U", f"{PKI}/ca.key"]).stdout.split() == ["600", "root"]
    assert play("site").changed == {}
    play("verify")
