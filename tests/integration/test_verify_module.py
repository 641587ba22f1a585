# SPDX-License-Identifier: GPL-3.0-or-later
"""verify on a host with damaged files and keys: each is a named problem, and none hides what else is wrong."""

from __future__ import annotations

import copy
import datetime
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_trouble, etcd_unit, packets
from ansible_collections.isthmus.mesh.plugins.module_utils.verify import agent as agent_checks
from ansible_collections.isthmus.mesh.plugins.module_utils.verify import host as host_checks
from ansible_collections.isthmus.mesh.plugins.module_utils.verify import native as native_checks
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier
from ansible_collections.isthmus.mesh.plugins.modules import verify
from integration.etcd_fixture import EtcdServer
from isthmus_agent import estate_admin, etcd_admin, pki, revocation
from isthmus_mesh.documents import ServiceDefinition, ServicePort
from unit.mesh import estates

HOST = "c1"  # the only etcd member of cluster cloud
KEYS = "isthmus/v1/estate/"


class Module:
    """What Verifier uses of an AnsibleModule."""

    check_mode = False

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params

    def fail_json(self, msg: str, **_more: Any) -> None:
        raise AssertionError(msg)

    def run_command(self, words: list[str]) -> tuple[int, str, str]:
        return 0, "\n\n".join("ActiveState=active\nUnitFileState=enabled" for word in words if "." in word), ""


class Host:
    """The files of an etcd host, with an etcd that holds what Ansible writes."""

    def __init__(self, server: EtcdServer, place: Path) -> None:
        self.server, self.place = server, place
        self.pki = place / "pki"
        (self.pki / "trust").mkdir(parents=True)
        self.node = place / "node.json"
        estate = estates.estate()
        estate["clusters"]["cloud"]["etcd"]["client_port"] = server.port
        self.plan = estates.planned(estates.model(estate))
        self.spec: dict[str, Any] = copy.deepcopy(dict(self.plan.specs[HOST]))
        for name in self.spec["pki"]["trust"]:
            (self.pki / "trust" / f"{name}.crt").write_bytes(server.ca.crt.read_bytes())
        for name, cn in (("root", "root"), ("agent", f"isthmus-agent-{HOST}")):
            for path in server.ca.issue(cn):
                (self.pki / f"{name}{path.suffix}").write_bytes(path.read_bytes())
        self.spec["etcd"] |= {
            "ca": str(self.pki / "trust" / "cloud.crt"),
            "cert": str(self.pki / "agent.crt"),
            "key": str(self.pki / "agent.key"),
        }
        self.node.write_text(json.dumps(self.spec))
        for name, document in self.plan.record.items():
            server.etcdctl("put", KEYS + name, json.dumps(document))

    def verifier(self) -> Verifier:
        record = dict(self.plan.record)
        hosts = [{"name": HOST, "cluster": "cloud", "mesh4": self.spec["node"]["mesh4"]}]
        params = {"spec": self.spec, "record": record, "services": [], "hosts": hosts, "timeout": 3, "scope": "mesh"}
        params["absent_services"] = []
        params |= {"controller_time": None, "max_clock_skew": 120}
        return Verifier(Module(params))

    def problems(self, *kinds: str) -> list[str]:
        """All that a whole run finds, of these kinds."""
        found = self.verifier()
        verify.run(found)
        return [words for words in found.problems if words.split(":")[0] in kinds]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd"), name=HOST) as running:
        wanted = etcd_admin.wanted_access("cloud", [HOST], ["onprem"])
        with running.sync_client() as client:
            etcd_admin.ensure_access(client, wanted, apply=True, enable=True)
        yield running


@pytest.fixture
def host(server: EtcdServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    found = Host(server, tmp_path)
    monkeypatch.setattr(Verifier, "PKI", str(found.pki))
    monkeypatch.setattr(Verifier, "NODE", str(found.node))
    monkeypatch.setattr(Verifier, "SOCKET", tmp_path / "agent.sock")
    try:
        yield found
    finally:
        server.etcdctl("del", "--prefix", "isthmus/v1/")


def test_what_is_right_is_no_problem(host: Host) -> None:
    assert host.problems("spec", "units") == []
    assert [
        words for words in host.problems("etcd") if "its members are" not in words and "published" not in words
    ] == []


@pytest.mark.parametrize("damage", [b"no certificate", b"\xff\xfe\0", b""], ids=["text", "bytes", "nothing"])
def test_a_damaged_authority_is_named_with_what_stands_on_it(host: Host, damage: bytes) -> None:
    path = host.pki / "trust" / "cloud.crt"
    path.write_bytes(damage)
    found = host.problems("certificates")
    assert [words for words in found if words.startswith(f"certificates: {path} holds no readable PEM certificate")]
    (agent,) = [words for words in found if words.startswith(f"certificates: {host.pki}/agent.crt: ")]
    assert f"it cannot be compared with its authority {path}" in agent
    # The rest was looked at all the same.
    assert [words for words in found if words.startswith(f"certificates: {host.pki}/registrar.crt: there is none yet")]
    assert host.problems("agent") != []


@pytest.mark.parametrize("name", ["agent.crt", "agent.key"])
def test_a_missing_certificate_of_the_agent_is_named(host: Host, name: str) -> None:
    (host.pki / name).unlink()
    found = host.problems("etcd")
    (words,) = [words for words in found if words.startswith("etcd: the agent's certificate is not usable: ")]
    assert str(host.pki / name) in words
    assert "run the playbook isthmus.mesh.site" in words


def test_a_service_that_is_not_the_inventorys_is_named(host: Host) -> None:
    """Also one that was to go: a run that was cut off after the record leaves both."""
    port = ServicePort("http", 80, 8080)
    web, old = (ServiceDefinition(name, "shop", (port,), {"app": name}).to_dict() for name in ("web", "old"))

    def found() -> list[str]:
        verifier = host.verifier()
        verifier.services = [web]
        verifier.module.params["absent_services"] = ["shop/old"]
        verify.run(verifier)
        return [words.split(";")[0] for words in verifier.problems if "isthmus/v1/services/" in words]

    assert found() == ["etcd: isthmus/v1/services/shop/web, a service of the inventory, is missing"]
    with host.server.sync_client() as client:
        estate_admin.write_services(client, [{**web, "affinity": "local"}, old], [], "inventory", apply=True)
        assert found() == [
            "etcd: isthmus/v1/services/shop/web, a service, is not the inventory's",
            "etcd: isthmus/v1/services/shop/old, a service that the inventory takes away, is still there",
        ]
        estate_admin.write_services(client, [web], ["shop/old"], "inventory", apply=True)
        assert found() == []


@pytest.mark.parametrize("value", ["no JSON", "[1]", '"text"', "null", "{}"])
def test_a_damaged_document_of_the_estate_is_named(host: Host, value: str) -> None:
    host.server.etcdctl("put", KEYS + "roster", value)
    found = host.problems("etcd")
    assert [words for words in found if words.startswith(f"etcd: {KEYS}roster is damaged: ")]
    # Others are read all the same, and so are the rights after them.
    host.server.etcdctl("del", KEYS + "clusters/onprem")
    found = host.problems("etcd")
    assert [words for words in found if words.startswith(f"etcd: {KEYS}clusters/onprem has revision None, not ")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "is no specification: it holds a list; "),
        ("null", "is no specification: it holds a NoneType; "),
        ("{", "cannot be read: "),
        ("{}", "is not what the inventory gives (cluster, "),
    ],
)
def test_a_damaged_specification_is_named(host: Host, text: str, words: str) -> None:
    host.node.write_text(text)
    (found,) = host.problems("spec")
    assert found.startswith(f"spec: {host.node} {words}")


def test_an_etcd_that_does_not_serve_is_told_with_the_way_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_unit, "DATA", str(host.server.data))
    host.server.stop()
    try:
        (words,) = host.problems("etcd")
        assert words.startswith("etcd: member c1 does not serve: ")
        assert words.endswith("Next: see `journalctl -u isthmus-etcd` there")
        monkeypatch.setattr(etcd_trouble, "SEGMENT", 1 << 62)
        (words,) = host.problems("etcd")
        assert "The file system of" in words
    finally:
        host.server.start()


def test_an_alarm_is_told_with_the_way_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus_agent.kvstore.sync.SyncEtcd.alarms", lambda _client: ((1, "NOSPACE"),))
    (words,) = [words for words in host.problems("etcd") if words.startswith("etcd: alarm ")]
    assert words.startswith("etcd: alarm NOSPACE: its database has reached etcd.quota_bytes")


@pytest.mark.parametrize("scope", ["mesh", "host"])
def test_a_member_that_is_of_another_etcd_than_the_others_is_told(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    monkeypatch.setattr(agent_checks, "check_own_agent", lambda _verifier: None)
    with EtcdServer(tmp_path / "other", name="c2", ca=host.server.ca, token="other") as other:  # noqa: S106
        host.spec["member"]["client_urls"] = {HOST: host.server.endpoint, "c2": other.endpoint}
        host.node.write_text(json.dumps(host.spec))
        verifier = host.verifier()
        verifier.module.params |= {"scope": scope, "before": None}
        verify.run(verifier)
    (words,) = [words for words in verifier.problems if "different etcds" in words]
    assert words.startswith(f"etcd: The members are in different etcds: {HOST} in that with cluster id ")
    assert "; c2 in that with cluster id " in words


def test_a_clock_that_is_a_day_off_is_told(host: Host) -> None:
    found = host.verifier()
    found.module.params["controller_time"] = "2020-01-01T00:00:00Z"
    host_checks.check_clock(found)
    (words,) = found.problems
    assert words.startswith("clock: The clock is ")
    assert " s ahead of the controller's" in words


def test_what_nobody_thought_of_hides_nothing_else(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(_verifier: Verifier) -> None:
        raise RuntimeError("a surprise")

    monkeypatch.setattr(host_checks, "check_certificates", surprise)
    host.node.write_text("[]")
    (found,) = host.problems("certificates")
    assert found.startswith("certificates: this could not be looked at to the end: RuntimeError: a surprise; ")
    assert len(host.problems("spec")) == 1
    assert len(host.problems("agent")) == 1


def test_another_specification_is_not_called_older(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent tells the digest of what it really read: that may be newer than the plan, or edited by hand."""
    status = {
        "spec_hash": "0" * 64,
        "datapath": {"state": "applied", "error": None},
        "etcd": {"connected": True, "error": None},
        "reports": {"error": None},
        "warnings": [],
        "workloads": [],
    }
    answers = {"/v1/status": status, "/v1/audit": {"problems": []}, "/v1/services": {"services": []}}
    monkeypatch.setattr("isthmus_agent.cli.client.ask", lambda _path, route: answers.get(route, {"peers": []}))
    (found,) = host.problems("agent")
    assert found.startswith("agent: it runs with another specification than planned; ")


@pytest.mark.parametrize(
    ("api", "words"),
    [
        (None, ["kubernetes: no registrar has told of the API server yet; "]),
        ({"state": "connected", "error": None, "problems": []}, []),
        (
            {"state": "absent", "error": "no answer", "problems": []},
            ["kubernetes: the API server https://k:6443 is absent since 2026-01-01T00:00:00Z (no answer): "],
        ),
        (
            {"state": "connected", "error": None, "problems": ["pods on n9, which is no host of the mesh"]},
            ["kubernetes: pods on n9, which is no host of the mesh"],
        ),
    ],
    ids=["never told", "all is well", "absent", "what has no place"],
)
def test_how_the_registrar_stands_with_kubernetes_is_told(
    host: Host, monkeypatch: pytest.MonkeyPatch, api: dict[str, Any] | None, words: list[str]
) -> None:
    known = {"server": "https://k:6443", "since": "2026-01-01T00:00:00Z"}
    document = {"peers": [], "kubernetes": None if api is None else {**known, **api}}
    monkeypatch.setattr("isthmus_agent.cli.client.ask", lambda _path, _route: document)
    verifier = host.verifier()
    agent_checks.check_kubernetes(verifier)
    assert [found.startswith(begin) for found, begin in zip(verifier.problems, words, strict=True)] == [True] * len(
        words
    )


def test_before_packets_go_natively_a_pod_of_each_node_has_to_be_reached_so(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network may know the way to a node and not the one to its pods. Of one that nothing reaches nobody knows."""
    by_stage = {"sites": {"onprem": "onprem", "cloud": "cloud"}, "stages": {"onprem": "accepts"}}
    host.node.write_text(json.dumps({**host.spec, "native": by_stage}))
    others = [
        {"cluster": "onprem", "node": "o1", "addresses": ["10.244.1.5", "10.244.1.6"]},
        {"cluster": "onprem", "node": "o2", "addresses": ["10.244.2.5"]},
        {"cluster": "cloud", "node": "c2", "addresses": ["10.244.3.5"]},  # its site is not native
    ]
    monkeypatch.setattr("isthmus_agent.cli.client.ask", lambda _path, _route: {"others": others, "pods": None})
    natively: set[str] = set()
    through: set[str] = set()
    entries = host.plan.record["clusters/onprem"]["hosts"]
    mesh = {entry["mesh4"] for entry in entries.values()}

    def reach(_verifier: Verifier, _source: str, target: str) -> str:
        return "" if target in natively | mesh else "no answer"

    def echoed(_source: str, addresses: list[str], _timeout: float) -> str:
        return "" if through & set(addresses) else "no answer"

    monkeypatch.setattr(native_checks, "_reach_natively", reach)
    monkeypatch.setattr(native_checks, "echoed", echoed)

    def found() -> list[str]:
        verifier = host.verifier()
        native_checks.check_native_way(verifier)
        return verifier.problems

    through |= {"10.244.2.5"}
    assert found() == [], "machines have no pods"
    for name, entry in entries.items():
        entry["kubernetes_node"] = name
    through.clear()
    assert found() == [], "neither way: a network policy may forbid it"
    through |= {"10.244.1.6", "10.244.2.5", "10.244.3.5"}
    natively |= {"10.244.1.5"}
    (words,) = found()
    assert words.startswith("routing: pods on o2 of cluster onprem (10.244.2.5) are not reached natively, and through")
    verifier = host.verifier()
    verifier.hosts = [{"cluster": "onprem", "name": name, "mesh4": entry["mesh4"]} for name, entry in entries.items()]
    native_checks.check_native_way(verifier)
    assert verifier.problems == [], "with routing: auto it is no problem: it decides"
    why = "pods on it (10.244.2.5) do not answer, and through the tunnel they do: no answer"
    assert verifier.unreached == [
        {"cluster": "onprem", "name": "o2", "site": "onprem", "why": why, "sure": True},
    ]
    natively |= {"10.244.2.5"}
    assert found() == []
    native_checks.check_native_way(verifier)
    assert verifier.unreached == []
    natively.clear()
    natively |= {"10.244.1.5"}
    keys = {"key": "k", "port": 51871, "plain_sites": ["cloud"], "sites": by_stage["sites"]}
    host.node.write_text(json.dumps({**host.spec, "native": by_stage, "wireguard": keys}))
    (words,) = found()
    assert "It is to be reached so inside WireGuard: firewalls of the two hosts must let packets" in words
    natively.clear()
    by_stage["stages"]["onprem"] = "sends"
    host.node.write_text(json.dumps({**host.spec, "native": by_stage}))
    assert found() == [], "packets go natively"


def test_between_batches_only_the_host_itself_is_looked_at(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the record nor other members nor what was wrong before the change is a finding; what got worse is."""
    status: dict[str, Any] = {
        "spec_hash": host.spec["hash"],
        "datapath": {"state": "applied", "error": None},
        "etcd": {"connected": False, "error": "refused"},
        "reports": {"error": None},
        "workloads": [],
    }
    answers = {"/v1/status": status, "/v1/audit": {"problems": []}, "/v1/services": {"services": []}}
    monkeypatch.setattr("isthmus_agent.cli.client.ask", lambda _path, route: answers[route])
    before = {"etcd": False, "reports": True, "audit": [], "backends": [], "services": []}

    def found(**more: Any) -> list[str]:
        verifier = host.verifier()
        verifier.module.params |= {"scope": "host", "before": before, **more}
        verify.run(verifier)
        return verifier.problems

    host.server.etcdctl("del", "--prefix", KEYS)
    assert found() == []
    assert found(before={}) == []
    (worse,) = found(before={**before, "etcd": True})
    assert worse == "agent: it has no connection to etcd any more: refused"
    status["spec_hash"] = "0" * 64
    (other,) = found()
    assert other.startswith(f"agent: it runs with another specification than {host.node}; ")
    # A run with tags may have left the specification as it was; a new host may have none.
    status["spec_hash"] = "1" * 64
    host.node.write_text(json.dumps({**host.spec, "hash": "1" * 64}))
    assert found() == []
    host.node.unlink()
    assert found() == []


def test_between_batches_a_member_that_does_not_serve_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(_verifier: Verifier) -> None:
        """Not what this is about."""

    monkeypatch.setattr(agent_checks, "check_own_agent", dead)
    member = {**host.spec["member"], "client_url": "https://127.0.0.1:1", "client_urls": {HOST: "https://127.0.0.1:1"}}
    host.node.write_text(json.dumps({**host.spec, "member": member}))
    verifier = host.verifier()
    verifier.module.params |= {"scope": "host", "before": None}
    verify.run(verifier)
    (words,) = verifier.problems
    assert words.startswith(f"etcd: member {HOST} does not serve: ")


@pytest.mark.parametrize("scope", ["mesh", "host"])
def test_a_list_of_revoked_certificates_that_is_older_than_the_records_is_named(
    host: Host, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    authority = pki.Authority("cloud", *pki.new_authority("cloud", now), "here", now)
    older, newer = (authority.sign_list(dict.fromkeys(serials, now), 1, now) for serials in ([1], [1, 2]))
    file, environment = host.pki / "revoked.crl", host.place / "etcd.env"
    monkeypatch.setattr(etcd_unit, "ENVIRONMENT", str(environment))
    environment.write_text(f"ETCD_CLIENT_CRL_FILE={file}\nETCD_PEER_CRL_FILE={file}\n")

    def found(crl: str | None) -> list[str]:
        verifier = host.verifier()
        document = {**verifier.record["clusters/cloud"], **({"crl": crl} if crl else {})}
        verifier.record = {**verifier.record, "clusters/cloud": document}
        verifier.module.params |= {"scope": scope, "before": None}
        verify.run(verifier)
        return [words for words in verifier.problems if "revoked.crl" in words]

    assert found(None) == []
    (missing,) = found(newer)
    assert missing.startswith(f"etcd: {file}: it is missing; ")
    file.write_bytes(revocation.to_der(older, authority.pem, "here"))
    (words,) = found(newer)
    assert words.startswith(
        f"etcd: {file}: it is older than the estate record's list: 1 of 2 revoked certificates are accepted here; run"
    )
    assert found(older) == []
    file.write_bytes(revocation.to_der(newer, authority.pem, "here"))
    assert found(older) == found(newer) == []
    environment.write_text("")
    assert found(newer) == [f"etcd: {environment} does not tell etcd to read {file}; {SITE}"]
    file.write_bytes(b"no list")
    assert len(found(newer)) == 2


def test_tcp_is_proven_by_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        packets.knock("127.0.0.1", port, 2)
    packets.knock("127.0.0.1", port, 2)  # refused now

    def silence(*_arguments: Any) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(packets.socket, "create_connection", silence)
    with pytest.raises(packets.NoAnswer, match=f"no answer from TCP port {port}: timed out"):
        packets.knock("127.0.0.1", port, 2)
