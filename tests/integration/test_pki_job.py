# SPDX-License-Identifier: GPL-3.0-or-later
"""`isthmus-pki` as its Job runs it: a service account's token, the least RBAC, a real kube-apiserver."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from integration.kubernetes_fixture import ApiServer, Refused
from isthmus_agent import in_cluster_pki, pki
from isthmus_mesh import ownership
from kubernetes_objects import namespace

NAMESPACE = "isthmus-system"
ACCOUNT = "isthmus-pki"
GROUP = "rbac.authorization.k8s.io"
LABELS = {**ownership.labels("lab", "managed"), "isthmus.io/component": "pki"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("kubernetes")) as found:
        found.create("namespaces", namespace(NAMESPACE))
        found.request("POST", path("serviceaccounts"), {"metadata": {"name": ACCOUNT}})
        rules = [
            {"apiGroups": [""], "resources": ["secrets", "configmaps"], "verbs": ["create"]},
            {
                "apiGroups": [""],
                "resources": ["secrets"],
                "verbs": ["get", "update"],
                "resourceNames": list(in_cluster_pki.SECRETS),
            },
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "update"], "resourceNames": [ACCOUNT]},
        ]
        rbac = f"/apis/{GROUP}/v1/namespaces/{NAMESPACE}"
        found.request("POST", f"{rbac}/roles", {"metadata": {"name": ACCOUNT}, "rules": rules})
        subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}
        role = {"apiGroup": GROUP, "kind": "Role", "name": ACCOUNT}
        binding = {"metadata": {"name": ACCOUNT}, "roleRef": role, "subjects": [subject]}
        found.request("POST", f"{rbac}/rolebindings", binding)
        yield found


def path(resource: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{NAMESPACE}/{resource}" + (f"/{name}" if name else "")


def environment() -> dict[str, str]:
    """The agent is found by another process too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


class Job:
    """Runs of the program; `said` is all that they ever wrote."""

    def __init__(self, server: ApiServer, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.said = ""
        self.document: dict[str, Any] = {
            "schema": 1,
            "cluster": "managed",
            "dns": ["isthmus-etcd-client.isthmus-system.svc"],
            "ip": ["127.0.0.1"],
            "peers": {},
            "certificates": {},
            "requests": [],
            "known_ca": None,
            "labels": LABELS,
        }
        (directory / "namespace").write_text(NAMESPACE)
        (directory / "ca.crt").write_text(server.ca.crt.read_text())
        token = server.request("POST", path("serviceaccounts", f"{ACCOUNT}/token"), {"spec": {}})["status"]["token"]
        (directory / "token").write_text(token)

    def run(self, **changes: Any) -> subprocess.CompletedProcess[str]:
        self.document.update(changes)
        wanted = self.directory / "wanted.json"
        wanted.write_text(json.dumps(self.document))
        server = f"127.0.0.1:{self.server.port}"
        command = [sys.executable, "-m", "isthmus_agent.pki_job", "--wanted", str(wanted), "--server", server]
        found = subprocess.run(
            [*command, "--account", str(self.directory)], capture_output=True, text=True, timeout=120, env=environment()
        )
        self.said += found.stdout + found.stderr
        return found

    def done(self, **changes: Any) -> list[str]:
        found = self.run(**changes)
        assert found.returncode == 0, found.stderr
        return found.stdout.splitlines()

    def secret(self, name: str) -> dict[str, str]:
        found = self.server.request("GET", path("secrets", name))["data"]
        return {key: base64.b64decode(value).decode("latin-1") for key, value in found.items()}

    def issued(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.server.request("GET", path("configmaps", ACCOUNT))["data"]["issued.json"]
        )
        return found

    def versions(self) -> list[str]:
        found = [self.server.request("GET", path("secrets", name)) for name in in_cluster_pki.SECRETS]
        found.append(self.server.request("GET", path("configmaps", ACCOUNT)))
        return [one["metadata"]["resourceVersion"] for one in found]


@pytest.fixture
def job(server: ApiServer, tmp_path: Path) -> Iterator[Job]:
    found = Job(server, tmp_path)
    yield found
    for resource, names in (("secrets", in_cluster_pki.SECRETS), ("configmaps", (ACCOUNT,))):
        for name in names:
            with contextlib.suppress(Refused):
                server.request("DELETE", path(resource, name))


def test_from_nothing_to_renewal_without_a_word_of_what_is_secret(job: Job) -> None:
    told = job.done()
    assert any("authority of cluster managed: made" in line for line in told)
    kept = {name: job.secret(name) for name in in_cluster_pki.SECRETS}
    assert kept["isthmus-agent-tls"].keys() == {"agent.crt", "agent.key"}
    assert job.server.request("GET", path("secrets", "isthmus-ca"))["metadata"]["labels"] == LABELS
    before = job.versions()
    assert job.done() == ["everything is as wanted"]
    assert job.versions() == before  # nothing was written
    told = job.done(ip=["127.0.0.1", "198.18.6.200"])
    assert [line.partition(":")[0] for line in told] == [
        "Secret isthmus-etcd-tls, etcd-server.crt",
        "Secret isthmus-etcd-tls, etcd-peer.crt",
    ]
    assert job.secret("isthmus-agent-tls") == kept["isthmus-agent-tls"]
    assert pki.same_authority(job.issued()["ca"], kept["isthmus-ca"]["ca.crt"])
    public = job.said + json.dumps(job.issued())
    for files in kept.values():
        for name, content in files.items():
            if name.endswith(".key"):
                assert content.splitlines()[1] not in public


def test_requests_and_certificates_of_peers(job: Job) -> None:
    now = datetime.now(timezone.utc)
    key, certificate = pki.new_authority("onprem", now)
    authority = pki.Authority("onprem", key, certificate, "there", now)
    csr = pki.new_request(pki.new_key(), "root", "there")
    job.done(peers={"onprem": authority.pem}, requests=[{"cluster": "onprem", "host": "o1", "csr": csr}])
    issued = job.issued()
    assert pki.describe(issued["signed"][0]["certificate"].encode())["cn"] == "remote-onprem"
    spec = in_cluster_pki._reader("peer-onprem", "onprem", "managed")
    given = authority.sign(spec, issued["requests"]["onprem"]["csr"], now)
    job.done(certificates={"onprem": given})
    assert job.issued()["requests"] == {}
    assert job.secret("isthmus-registrar-tls")["peer-onprem.crt"] == given


def test_a_lost_authority_is_not_made_again(job: Job) -> None:
    job.done()
    known = job.issued()["ca"]
    job.server.request("DELETE", path("secrets", "isthmus-ca"))
    found = job.run(known_ca=known)
    assert found.returncode == 1
    assert "the private key of cluster managed's certificate authority is missing" in found.stderr


def test_what_is_somebody_elses_is_left_alone(job: Job) -> None:
    job.server.request("POST", path("secrets"), {"metadata": {"name": "isthmus-agent-tls"}, "data": {"a": "Yg=="}})
    found = job.run()
    assert found.returncode == 1
    assert "Secret isthmus-system/isthmus-agent-tls is not ours: somebody else's" in found.stderr
    assert job.secret("isthmus-agent-tls") == {"a": "b"}
    with pytest.raises(Refused):
        job.secret("isthmus-ca")


def test_two_jobs_at_once_make_one_authority(job: Job) -> None:
    wanted = job.directory / "wanted.json"
    wanted.write_text(json.dumps(job.document))
    command = [
        sys.executable, "-m", "isthmus_agent.pki_job", "--wanted", str(wanted), "--account", str(job.directory),
        "--server", f"127.0.0.1:{job.server.port}",
    ]  # fmt: skip
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for _ in range(2)
    ]
    ends = [(one.communicate(timeout=120), one.returncode) for one in running]
    assert [code for _, code in ends] == [0, 0], ends
    ca = job.issued()["ca"]
    assert pki.same_authority(job.secret("isthmus-ca")["ca.crt"], ca)
    for secret, name in (("isthmus-agent-tls", "agent"), ("isthmus-etcd-tls", "etcd-server")):
        files = job.secret(secret)
        assert pki.describe(files[f"{name}.crt"].encode())["issuer"] == pki.describe(ca.encode())["issuer"]
        assert pki.public_der(files[f"{name}.key"].encode(), "it")


def test_rights_that_lack_are_named(job: Job) -> None:
    rbac = f"/apis/{GROUP}/v1/namespaces/{NAMESPACE}/rolebindings/{ACCOUNT}"
    binding = job.server.request("GET", rbac)
    job.server.request("DELETE", rbac)
    try:
        found = job.run()
        assert found.returncode == 1
        assert "RBAC does not allow the verb get on secrets" in found.stderr
    finally:
        del binding["metadata"]["resourceVersion"]
        job.server.request("POST", rbac.rpartition("/")[0], binding)
