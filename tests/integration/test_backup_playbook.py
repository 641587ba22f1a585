# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook `backup` under a real ansible-playbook, with real etcd: what it keeps, what openssl and etcdctl make of
it, and what it says when something is not there. Every host has an /etc of its own, in a mount namespace."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.etcd_fixture import EtcdServer
from isthmus_agent import etcd_admin, pki
from playbook import documented

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = {"cloud": ("c1",), "onprem": ("o1", "o2")}

pytestmark = [pytest.mark.root]

# A host of this machine: modules run under this interpreter, below its own /etc.
PYTHON = """\
#!/bin/sh
exec flock -o {place}/entered unshare --mount sh -c '
mount -t overlay -o lowerdir=/etc,upperdir={place}/etc,workdir={place}/work none /etc &&
exec env PYTHONPATH={agent} PYTHONDONTWRITEBYTECODE=1 {python} "$@"' sh "$@"
"""


class Cluster:
    """A cluster with one etcd; every host of it is one that carries it, the last one has its authority."""

    def __init__(self, place: Path, name: str) -> None:
        self.name, self.hosts = name, CLUSTERS[name]
        self.server = EtcdServer(place / "etcd" / name, name=name)
        self.key, self.certificate = pki.new_authority(name, datetime.datetime.now(datetime.timezone.utc))
        for host in self.hosts:
            etc = place / "hosts" / host / "etc" / "isthmus"
            (etc / "pki" / "trust").mkdir(parents=True)
            (etc.parent.parent / "work").mkdir()
            (etc / "pki" / "trust" / f"{name}.crt").write_bytes(self.server.ca.crt.read_bytes())
            for suffix, path in zip(("crt", "key"), self.server.ca.issue("root"), strict=True):
                (etc / "pki" / f"root.{suffix}").write_bytes(path.read_bytes())
            (etc / "etcd.env").write_text(
                f"ETCD_TRUSTED_CA_FILE=/etc/isthmus/pki/trust/{name}.crt\n"
                f"ETCD_ADVERTISE_CLIENT_URLS=https://192.0.2.1:{self.server.port}\n"
            )
            interpreter = etc.parent.parent / "python"
            interpreter.write_text(PYTHON.format(place=etc.parent.parent, agent=ROOT / "agent", python=sys.executable))
            interpreter.chmod(0o755)
        self.pki = place / "hosts" / self.hosts[-1] / "etc" / "isthmus" / "pki"
        (self.pki / "ca.key").write_bytes(self.key)
        (self.pki / "ca.crt").write_bytes(self.certificate)
        (self.pki / "issued.json").write_text('{"schema": 1, "since": null, "certificates": []}')

    @property
    def record(self) -> dict[str, Any]:
        document = {"name": self.name, "state": "present", "revision": 3, "ca_host": self.hosts[-1]}
        return {f"clusters/{self.name}": document, "roster": {"revision": 3, "estate": "e"}}

    def fill(self) -> None:
        with self.server.sync_client() as client:
            for name, document in self.record.items():
                client.put(f"isthmus/v1/estate/{name}", json.dumps(document))
            for number in range(50):
                client.put(f"isthmus/v1/services/shop/{self.name}-{number}", "x" * 1000)
            access = etcd_admin.wanted_access(self.name, list(self.hosts), [])
            etcd_admin.ensure_access(client, access, apply=True, enable=True)


class Site:
    """Two clusters, and an operator who has a pair of keys."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.kept = place / "backups"
        self.clusters = {name: Cluster(place, name) for name in CLUSTERS}
        collections = place / "collections" / "ansible_collections" / "isthmus"
        collections.mkdir(parents=True)
        (collections / "mesh").symlink_to(ROOT)
        self.private, self.public = place / "operator.key", place / "operator.pem"
        openssl("genrsa", "-out", self.private, "2048")
        openssl("rsa", "-in", self.private, "-pubout", "-out", self.public)

    def run(self, *options: str, unreachable: tuple[str, ...] = (), **more: Any) -> subprocess.CompletedProcess[str]:
        """The playbook with more variables; None leaves one of the usual ones out."""
        variables = {"isthmus_backup_dir": str(self.kept), "isthmus_backup_key": str(self.public), **more}
        hosts: dict[str, Any] = {}
        for name, cluster in self.clusters.items():
            for host in cluster.hosts:
                hosts[host] = {
                    "isthmus_cluster": name,
                    **(
                        {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
                        if host in unreachable
                        else {"ansible_connection": "local"}
                    ),
                    "ansible_python_interpreter": str(self.place / "hosts" / host / "python"),
                }
        estate = {"name": "e", "clusters": {name: {"etcd": {"hosts": list(CLUSTERS[name])}} for name in CLUSTERS}}
        inventory = {"all": {"hosts": hosts, "vars": {"isthmus_estate": estate}}}
        (self.place / "hosts.yml").write_text(json.dumps(inventory))
        given = json.dumps({name: value for name, value in variables.items() if value is not None})
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.place / "home"),
            "LANG": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOG_PATH": str(self.place / "log"),
        }
        command = ["ansible-playbook", "-i", str(self.place / "hosts.yml"), "isthmus.mesh.backup", "-e", given]
        return subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, check=False, timeout=240, cwd="/"
        )

    def backups(self, cluster: str) -> list[Path]:
        directory = self.kept / cluster
        return sorted(directory.iterdir()) if directory.exists() else []


def openssl(*words: object) -> bytes:
    return subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True).stdout


def said(done: subprocess.CompletedProcess[str]) -> str:
    """All of it, without the callback's line breaks and escapes."""
    return re.sub(r"\s+", " ", done.stdout + done.stderr)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    with made.clusters["cloud"].server, made.clusters["onprem"].server:
        for cluster in made.clusters.values():
            cluster.fill()
        yield made


def test_a_backup_restores_and_the_operator_alone_opens_its_key(site: Site) -> None:
    predicted = site.run("--check", "--diff")
    assert predicted.returncode == 0, predicted.stdout
    assert "snapshot.db" in predicted.stdout
    assert not site.kept.exists()

    done = site.run("-vvvv", "--diff")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    for name, cluster in site.clusters.items():
        [place] = site.backups(name)
        assert {path.name for path in place.iterdir()} == {
            "ca.crt",
            "ca.key.cms",
            "estate.json",
            "issued.json",
            "manifest.json",
            "snapshot.db",
        }
        assert (place / "issued.json").read_bytes() == (cluster.pki / "issued.json").read_bytes()
        assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (place, place.parent)} == {0o700}
        opened = openssl("cms", "-decrypt", "-inform", "PEM", "-in", place / "ca.key.cms", "-inkey", site.private)
        assert opened == cluster.key
        assert (place / "ca.crt").read_bytes() == cluster.certificate
        assert json.loads((place / "estate.json").read_text()) == cluster.record

        manifest = json.loads((place / "manifest.json").read_text())
        assert (manifest["cluster"], manifest["estate"]) == (name, "e")
        assert manifest["authority"] == {
            "host": cluster.hosts[-1],
            "fingerprint": "sha256:" + hashlib.sha256(openssl_der(place / "ca.crt")).hexdigest(),
            "key": True,
            "ledger": True,
        }
        assert {
            file: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for file, content in ((path.name, path.read_bytes()) for path in place.iterdir())
            if file != "manifest.json"
        } == manifest["files"]
        restore_and_compare(cluster, place / "snapshot.db", manifest["etcd"])

    # The lines of the keys that hold their private numbers are nowhere but at the authorities.
    secret = [line for cluster in site.clusters.values() for line in cluster.key.decode().splitlines()[1:3]]
    everything = done.stdout + done.stderr + predicted.stdout + (site.place / "log").read_text()
    for directory in (site.kept, site.place / "home"):
        everything += "".join(path.read_text(errors="replace") for path in directory.rglob("*") if path.is_file())
    assert "snapshot.db" in everything
    assert not [line for line in secret if line in everything]

    again = site.run()
    assert again.returncode == 0, again.stdout
    assert [len(site.backups(name)) for name in CLUSTERS] == [2, 2]


def openssl_der(certificate: Path) -> bytes:
    return openssl("x509", "-in", certificate, "-outform", "DER")


def restore_and_compare(cluster: Cluster, snapshot: Path, told: dict[str, Any]) -> None:
    """The commands of docs/operating.md, with this server's places."""
    server = cluster.server
    before = server.dump()
    status = json.loads(server.etcdctl("snapshot", "status", str(snapshot), "-w", "json"))
    assert status["revision"] >= told["revision"]
    with server.sync_client() as client:
        assert f"{client.status().header.cluster_id:x}" == told["cluster_id"]
        client.put("after-the-backup", "x")
    server.stop()
    place = snapshot.parents[3] / "restore" / cluster.name
    place.mkdir(parents=True)
    (place / "etcd.env").write_text(f"ETCD_NAME={server.name}\nETCD_INITIAL_ADVERTISE_PEER_URLS={server.peer_url}\n")
    script = documented("operating.md", ". /etc/isthmus/etcd.env")
    for there, here in (
        ("/etc/isthmus/etcd.env", f"{place}/etcd.env"),
        (" snapshot.db", f" {snapshot}"),
        ("/root/restored", f"{place}/restored"),
        ("/var/lib/isthmus/etcd", str(server.data)),
        ("chown -R isthmus-etcd:", "chown -R root:"),
        ("systemctl start isthmus-etcd", "true"),
    ):
        assert there in script
        script = script.replace(there, here)
    subprocess.run(["sh", "-e", "-c", script], check=True, capture_output=True)
    server.start()
    assert server.dump() == before
    with server.sync_client() as client:
        assert {kv.key: kv.text for kv in client.range("").kvs} == before
        assert client.auth_status()
        assert client.status().header.revision >= told["revision"]
        assert f"{client.status().header.cluster_id:x}" != told["cluster_id"]


def test_a_certificate_does_as_well_as_a_public_key(site: Site) -> None:
    certificate = site.place / "operator.crt"
    openssl(
        *("req", "-x509", "-key", site.private, "-subj", "/CN=operator", "-days", "1", "-out", certificate),
    )
    done = site.run("--limit", "c1", isthmus_backup_key=str(certificate))
    assert done.returncode == 0, done.stdout
    assert site.backups("onprem") == []
    [place] = site.backups("cloud")
    sealed = ("cms", "-decrypt", "-inform", "PEM", "-in", place / "ca.key.cms")
    assert openssl(*sealed, "-recip", certificate, "-inkey", site.private) == site.clusters["cloud"].key


def test_without_a_key_the_authoritys_is_left_out_and_it_is_said(site: Site) -> None:
    (site.clusters["cloud"].pki / "issued.json").unlink()  # an authority from before there were ledgers
    done = site.run("--limit", "c1", isthmus_backup_key=None)
    assert done.returncode == 0, done.stdout
    assert "The private key of its certificate authority is NOT in it" in said(done)
    [place] = site.backups("cloud")
    assert sorted(path.name for path in place.iterdir()) == ["ca.crt", "estate.json", "manifest.json", "snapshot.db"]
    assert json.loads((place / "manifest.json").read_text())["authority"]["key"] is False


def test_a_damaged_ledger_is_told(site: Site) -> None:
    (site.clusters["cloud"].pki / "issued.json").write_text("{}")
    done = site.run("--limit", "c1")
    assert done.returncode == 2, done.stdout
    assert "The backup of cluster cloud has no certificate authority." in said(done)
    assert "/etc/isthmus/pki/issued.json, the ledger of signed certificates, is damaged" in said(done)


def test_one_clusters_silence_is_told_and_the_others_are_backed_up(site: Site) -> None:
    site.clusters["cloud"].server.stop()
    for check in (("--check",), ()):
        done = site.run(*check, unreachable=("o1",))
        assert done.returncode == 2, done.stdout
        assert "Cluster cloud was not backed up. c1: the etcd of cluster cloud gave no snapshot" in said(done)
        assert "Cluster onprem: " in said(done)
    assert site.backups("cloud") == []
    [place] = site.backups("onprem")
    assert json.loads((place / "manifest.json").read_text())["host"] == "o2"
    silent = site.run("--check", unreachable=("c1",))
    assert silent.returncode == 2, silent.stdout
    assert "Cluster cloud was not backed up. c1: " in said(silent)
    assert "Cluster onprem: " in said(silent)


def test_an_authority_that_is_not_there_is_told_and_the_snapshot_kept(site: Site) -> None:
    (site.clusters["onprem"].pki / "ca.key").unlink()
    done = site.run("--limit", "o1")
    assert done.returncode == 2, done.stdout
    assert "The backup of cluster onprem has no certificate authority. Its host is o2: the authority of" in said(done)
    [place] = site.backups("onprem")
    assert sorted(path.name for path in place.iterdir()) == ["estate.json", "manifest.json", "snapshot.db"]
    silent = site.run("--limit", "o1", unreachable=("o2",))
    assert silent.returncode == 2
    assert "Its host is o2: " in said(silent)


def test_a_directory_or_a_key_that_cannot_be_used_stops_the_run_at_once(site: Site) -> None:
    private, short, text = site.private, site.place / "short.pem", site.place / "text"
    openssl("genrsa", "-out", site.place / "short.key", "1024")
    openssl("rsa", "-in", site.place / "short.key", "-pubout", "-out", short)
    text.write_text("no key\n")
    wrong = {
        "holds a private key": {"isthmus_backup_key": str(private)},
        "is no RSA key of 2048 bits or more": {"isthmus_backup_key": str(short)},
        "holds no public key or certificate": {"isthmus_backup_key": str(text)},
        "cannot be read: No such file or directory": {"isthmus_backup_key": str(site.place / "nothing")},
        f"{text} is not a directory": {"isthmus_backup_dir": str(text / "below")},
        "isthmus_backup_dir is not given": {"isthmus_backup_dir": None},
    }
    for words, variables in wrong.items():
        done = site.run(**variables)
        assert done.returncode == 2, done.stdout
        assert words in said(done)
        assert "Next: " in said(done)
        assert done.stdout.count("TASK [An etcd host of the cluster gives a snapshot]") == 1
        assert "not backed up" not in said(done)
    assert not site.kept.exists()
