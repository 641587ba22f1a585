# SPDX-License-Identifier: GPL-3.0-or-later
"""A stolen host's keys against real etcds, by the modules in the order of playbooks/forget.yml and of `site` after it.

Hosts are directories; o1, o2 and o3 carry the etcd of onprem, c1 that of cloud, whose registrars read each other.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from integration.etcd_fixture import Ca, require_etcd
from integration.module_runner import ModuleFailed, run_module
from integration.test_etcd_members import FAKE, Host
from isthmus_agent.kvstore import EtcdError, SyncEtcd
from isthmus_mesh.forgetting import Forget
from isthmus_mesh.planner import Plan
from unit.mesh.estates import model, planned

CLUSTERS = {"o1": "onprem", "o2": "onprem", "o3": "onprem", "c1": "cloud"}
STOLEN = {"agent": "onprem", "root": "onprem", "operator": "onprem", "registrar": "onprem", "peer-cloud": "cloud"}
"""Its client certificates, by the cluster whose etcd takes them."""


class Estate:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.hosts = {name: Host(root / name, name, Ca(root / "unused", "unused")) for name in CLUSTERS}
        (root / "bin").mkdir()
        (root / "bin" / "systemctl").write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        (root / "bin" / "systemctl").chmod(0o755)
        self.path = f"{root / 'bin'}:{os.environ['PATH']}"
        self.plan = planned(model())

    def replanned(self, forget: Forget) -> Plan:
        return planned(model(), self.plan, forget=forget)

    def document(self, cluster: str) -> dict[str, Any]:
        document: dict[str, Any] = self.plan.record[f"clusters/{cluster}"]
        return document

    def spec(self, name: str) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(json.dumps(self.plan.specs[name]))
        members = self.document(CLUSTERS[name])["etcd"]["members"]
        clients = {member: f"https://127.0.0.1:{self.hosts[member].ports[0]}" for member in members}
        peers = {member: f"https://127.0.0.1:{self.hosts[member].ports[1]}" for member in members}
        spec["etcd"]["endpoints"] = list(clients.values())
        own = {"client_url": clients[name], "peer_url": peers[name]}
        spec["member"].update(members=peers, client_urls=clients, **own)
        for entry in spec["pki"]["certificates"]:
            entry["owner"] = "root"
        return spec

    def module(self, host: str, name: str, arguments: Mapping[str, Any], check: bool = False) -> dict[str, Any]:
        before = dict(os.environ)
        os.environ.update(PATH=self.path, ISTHMUS_TEST_HOST=str(self.hosts[host].place))
        try:
            return run_module(name, dict(arguments), check=check, places=self.hosts[host].places)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def pki(self, name: str) -> None:
        """roles/pki."""
        spec = self.spec(name)
        directory = {"directory": str(self.hosts[name].pki)}
        documents = [doc for key, doc in self.plan.record.items() if key.startswith("clusters/")]
        trust = {doc["name"]: doc["ca_certificate"] for doc in documents if doc.get("ca_certificate")}
        lists = {doc["name"]: doc["crl"] for doc in documents if doc.get("crl")}
        asked = {"spec": spec, "trust": trust, "lists": lists, **directory}
        signed = []
        for group in self.module(name, "pki_request", asked)["pending"]:
            arguments = {
                "cluster": group["ca_cluster"],
                "host": name,
                "certificates": spec["pki"]["certificates"],
                "requests": group["requests"],
                "directory": str(self.hosts[group["ca_host"]].pki),
            }
            signed.append(self.module(group["ca_host"], "pki_sign", arguments))
        if signed:
            self.module(name, "pki_install", {"spec": spec, "signed": signed, **directory})

    def member(self, name: str, acts: str = "o1", check: bool = False) -> dict[str, Any]:
        """roles/etcd, without the rights."""
        acts = acts if CLUSTERS[name] == "onprem" else name
        arguments = {"spec": self.spec(name), "record": self.document(CLUSTERS[name]), "former": acts, "timeout": 30}
        return self.module(name, "etcd_member", arguments, check=check)

    def rights(self, name: str) -> dict[str, Any]:
        return self.module(name, "etcd_access", {"spec": self.spec(name), "record": dict(self.plan.record)})

    def write_record(self) -> None:
        """roles/services, as far as it matters here."""
        for name in {"o1", "c1"} & set(self.plan.specs):
            with self.client(self.hosts[name].pki, "root", name, timeout=30.0) as client:
                for key, document in self.plan.record.items():
                    client.put(f"isthmus/v1/estate/{key}", json.dumps(document))

    def form(self) -> None:
        for name in CLUSTERS:
            self.pki(name)
        for name in CLUSTERS:
            self.member(name)
        for name in ("o1", "c1"):
            self.rights(name)
            document = self.document(CLUSTERS[name])
            document["ca_certificate"] = (self.hosts[name].pki / "ca.crt").read_text()
        self.write_record()

    def client(self, pki: Path, certificate: str, at: str, timeout: float = 3.0) -> SyncEtcd:
        """A new connection to the etcd on the host `at`, with a certificate out of the directory `pki`."""
        files = (
            self.hosts[at].pki / f"trust/{CLUSTERS[at]}.crt",
            pki / f"{certificate}.crt",
            pki / f"{certificate}.key",
        )
        return SyncEtcd([f"https://127.0.0.1:{self.hosts[at].ports[0]}"], *files, timeout=timeout)

    def admitted(self, pki: Path, certificate: str, at: str) -> bool:
        with self.client(pki, certificate, at) as client:
            try:
                client.status()
            except EtcdError:
                return False
            return True

    def speaks_raft(self, pki: Path, at: str) -> bool:
        """Whether the peer port answers who has the members' certificate."""
        context = ssl.create_default_context(cafile=self.hosts[at].pki / f"trust/{CLUSTERS[at]}.crt")
        context.load_cert_chain(pki / "etcd-peer.crt", pki / "etcd-peer.key")
        address = ("127.0.0.1", self.hosts[at].ports[1])
        with ExitStack() as stack:
            try:
                plain = stack.enter_context(socket.create_connection(address, timeout=5))
                wrapped = stack.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
                wrapped.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return wrapped.recv(100).startswith(b"HTTP/1.1 200")
            except OSError:
                return False

    def steal(self, name: str) -> Path:
        """A copy of the host's keys; the host itself is off."""
        stolen = self.root / f"stolen-{name}"
        shutil.copytree(self.hosts[name].pki, stolen)
        self.hosts[name].systemctl("stop", "isthmus-etcd.service")
        return stolen

    def forget(self, *names: str) -> list[str]:
        """As playbooks/forget.yml, until every etcd host has its list; what the authorities said."""
        forget = Forget(names=names)
        revoked: dict[str, dict[str, Any]] = {}
        for one in self.replanned(forget).revocations:
            document = self.document(one["cluster"])
            arguments = {
                "cluster": one["cluster"],
                "hosts": one["hosts"],
                "names": one["names"],
                "known_ca": document["ca_certificate"],
                "directory": str(self.hosts[one["ca_host"]].pki),
                **({"crl": document["crl"]} if "crl" in document else {}),
            }
            revoked[one["cluster"]] = self.module(one["ca_host"], "pki_revoke", arguments)
            assert (
                self.module(one["ca_host"], "pki_revoke", arguments, check=True)["revoked"]
                == (revoked[one["cluster"]]["revoked"])
            )
        lists = {cluster: answer["crl"] for cluster, answer in revoked.items()}
        self.plan = self.replanned(Forget(names=names, lists=lists))
        self.write_record()
        for name in self.plan.specs:
            self.pki(name)
        return [line for _cluster, answer in sorted(revoked.items()) for line in answer["revoked"]]

    def members(self) -> list[str]:
        with self.client(self.hosts["o1"].pki, "root", "o1") as client:
            return sorted(entry.name for entry in client.member_list())


@pytest.fixture
def estate(tmp_path: Path) -> Iterator[Estate]:
    require_etcd()
    made = Estate(tmp_path)
    yield made
    for host in made.hosts.values():
        host.systemctl("disable", "isthmus-etcd.service", "isthmus-etcd-defrag.timer")


def place_of(cluster: str) -> list[str]:
    return ["o1", "o2"] if cluster == "onprem" else ["c1"]


def test_a_stolen_hosts_keys_are_refused_at_once_and_for_ever(estate: Estate) -> None:
    estate.form()
    stolen = estate.steal("o3")
    for name, cluster in STOLEN.items():
        assert [estate.admitted(stolen, name, at) for at in place_of(cluster)] == [True] * len(place_of(cluster)), name
    assert estate.speaks_raft(stolen, "o1")
    with estate.client(stolen, "root", "o1") as opened:
        opened.status()
        lines = estate.forget("o3")
        assert sorted(line.split(" (")[0] for line in lines) == [
            f"{name} of o3" for name in sorted([*STOLEN, "etcd-peer", "etcd-server"])
        ]
        assert [line for line in lines if "CN=remote-onprem" in line] != []

        # No process was started anew; others of the same names go on.
        for name, cluster in STOLEN.items():
            for at in place_of(cluster):
                assert not estate.admitted(stolen, name, at), (name, at)
                assert estate.admitted(estate.hosts["o2"].pki, name, at), (name, at)
        for at in ("o1", "o2"):
            assert not estate.speaks_raft(stolen, at)
            assert estate.speaks_raft(estate.hosts["o2"].pki, at)
        opened.status()  # what was open is still

        assert estate.member("o1", check=True)["action"] == "restarted"
        for name in ("o1", "o2", "c1"):
            assert estate.member(name)["action"] == "restarted"
            assert estate.member(name)["changed"] is False
        with pytest.raises(EtcdError):
            opened.status()
    assert estate.members() == ["o1", "o2"]
    assert "delete user isthmus-agent-o3" in estate.rights("o1")["changes"]
    assert estate.forget("o3") == []  # nothing is left to do
    assert estate.member("o1")["changed"] is False

    # It comes back with a new disk, and joins anew.
    host = estate.hosts["o3"]
    for place in (host.pki, host.data):
        shutil.rmtree(place)
    (host.place / "etcd.env").unlink()
    estate.plan = estate.replanned(Forget(clean=["o3"]))
    estate.rights("o1")
    estate.pki("o3")
    assert estate.member("o3")["action"] == "joined"
    assert estate.members() == ["o1", "o2", "o3"]
    assert estate.rights("o1")["stale"] == []
    for name, cluster in STOLEN.items():
        for at in [*place_of(cluster), *(["o3"] if cluster == "onprem" else [])]:
            assert estate.admitted(host.pki, name, at), (name, at)
            assert not estate.admitted(stolen, name, at), (name, at)


@pytest.mark.slow
def test_a_restart_waits_for_the_others_and_a_lost_cluster_loses_its_access(estate: Estate) -> None:
    estate.form()
    stolen = estate.root / "stolen"
    shutil.copytree(estate.hosts["o3"].pki, stolen)
    estate.hosts["o2"].systemctl("stop", "isthmus-etcd.service")
    estate.forget("o3")
    process = estate.hosts["o1"].place / "pids" / "isthmus-etcd.service"
    before = process.read_text()
    with pytest.raises(ModuleFailed, match="another one is not healthy: o2"):
        estate.member("o1")
    assert process.read_text() == before
    assert not estate.admitted(stolen, "root", "o1")
    assert estate.members() == ["o1", "o2", "o3"]

    estate.hosts["o2"].systemctl("restart", "isthmus-etcd.service")
    deadline = time.monotonic() + 60
    while not estate.admitted(estate.hosts["o2"].pki, "root", "o2"):
        assert time.monotonic() < deadline, "o2 does not serve"
    for name in ("o1", "o2"):
        assert estate.member(name)["action"] == "restarted"
    assert estate.members() == ["o1", "o2"]

    # Then a whole cluster is lost: what the registrar of its host holds of onprem's authority is refused there.
    stolen = estate.steal("c1")
    assert estate.admitted(stolen, "peer-onprem", "o1")
    lines = estate.forget("cluster/cloud")
    assert [line.split(", serial")[0] for line in lines] == ["peer-onprem of c1 (CN=remote-cloud"]
    assert not estate.admitted(stolen, "peer-onprem", "o1")
    # The pin and the keys for the lost peer are gone.
    pki = estate.hosts["o1"].pki
    assert [path for path in pki.rglob("*") if "cloud" in path.name] == []
    for name in ("o1", "o2"):
        estate.member(name)
    assert "delete user remote-cloud" in estate.rights("o1")["changes"]


def test_a_host_with_a_new_disk_that_nobody_forgot_joins_cleanly(estate: Estate) -> None:
    """One etcd member of three, known to the record: it is replaced when the others serve."""
    estate.form()
    host = estate.hosts["o3"]
    host.systemctl("disable", "isthmus-etcd.service", "isthmus-etcd-defrag.timer")
    for place in (host.pki, host.data, host.place / "units"):
        shutil.rmtree(place)
    (host.place / "units").mkdir()
    (host.place / "etcd.env").unlink()
    with estate.client(estate.hosts["o1"].pki, "root", "o1") as client:
        before = {entry.name: entry.id for entry in client.member_list()}
    estate.pki("o3")
    assert estate.member("o3")["action"] == "joined"
    with estate.client(estate.hosts["o1"].pki, "root", "o1") as client:
        after = {entry.name: entry.id for entry in client.member_list()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"o3"}
    assert estate.admitted(host.pki, "root", "o1")
    for name in ("o1", "o2", "o3"):
        assert estate.member(name)["changed"] is False


def openssl(*words: object) -> str:
    return subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, text=True).stdout


def test_openssl_reads_the_list_and_refuses_what_is_in_it(estate: Estate, tmp_path: Path) -> None:
    for name in CLUSTERS:
        estate.pki(name)
    for name in ("o1", "c1"):
        estate.document(CLUSTERS[name])["ca_certificate"] = (estate.hosts[name].pki / "ca.crt").read_text()
    estate.write_record = lambda: None  # type: ignore[method-assign] # no etcd is needed
    estate.forget("o3")
    pki = estate.hosts["o1"].pki
    openssl("crl", "-inform", "DER", "-in", pki / "revoked.crl", "-out", tmp_path / "crl.pem")
    verify = ("verify", "-crl_check", "-CAfile", pki / "ca.crt", "-CRLfile", tmp_path / "crl.pem")
    openssl(*verify, pki / "root.crt")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        openssl(*verify, estate.hosts["o3"].pki / "root.crt")
    assert "certificate revoked" in refused.value.stderr
