# SPDX-License-Identifier: GPL-3.0-or-later
"""Registrars are let into a real kube-apiserver, whose certificates kube-controller-manager signs, and out again."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from integration.kubernetes_fixture import ApiServer, Refused, program
from integration.module_runner import ModuleFailed, run_module

RBAC = "/apis/rbac.authorization.k8s.io/v1"
ROLE, BINDING = f"{RBAC}/clusterroles/isthmus-registrar", f"{RBAC}/clusterrolebindings/isthmus-registrar"
REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
LABELS = {"app.kubernetes.io/managed-by": "isthmus", "isthmus.io/estate": "lab", "isthmus.io/cluster": "kube"}


class Cluster:
    """A Kubernetes cluster of two nodes and the way to it."""

    def __init__(self, api: ApiServer, place: Path) -> None:
        self.api, self.place = api, place
        self.kubeconfig = self.config("admin", organization="system:masters")
        for number in (1, 2):
            addresses = [{"type": "InternalIP", "address": f"198.18.4.1{number}"}]
            spec = {"podCIDR": f"10.244.{number}.0/24", "podCIDRs": [f"10.244.{number}.0/24"]}
            node = {"metadata": {"name": f"k{number}"}, "spec": spec, "status": {"addresses": addresses}}
            api.create("nodes", node)

    def config(self, user: str, organization: str = "") -> Path:
        """A kubeconfig for a user of Kubernetes."""
        crt, key = self.api.ca.issue(user, organization=organization)
        path = self.place / f"{user}.kubeconfig"
        entry = {"client-certificate": str(crt), "client-key": str(key)}
        server = {"server": self.api.url, "certificate-authority": str(self.api.ca.crt)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": server}],
            "users": [{"name": user, "user": entry}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": user}}],
            "current-context": "here",
        }
        path.write_text(json.dumps(content))
        return path

    def sign(self) -> subprocess.Popen[bytes]:
        """The part of kube-controller-manager that signs."""
        key = self.place / "ca.key"
        key.write_bytes(
            self.api.ca._key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        manager = program().with_name("kube-controller-manager")
        command = [
            *(str(manager), f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0"),
            "--controllers=certificatesigningrequest-signing-controller",
            *(f"--cluster-signing-cert-file={self.api.ca.crt}", f"--cluster-signing-key-file={key}"),
        ]
        with (self.place / "manager.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def there(self, path: str) -> Any:
        """The object, None when there is none."""
        try:
            return self.api.request("GET", path)
        except Refused as error:
            if error.status != 404:
                raise
            return None


class Hosts:
    """Directories that stand for etcd hosts of the cluster; does what roles/kubernetes does."""

    def __init__(self, cluster: Cluster, place: Path) -> None:
        self.cluster, self.place = cluster, place
        self.members = ["k1", "k2"]

    def pki(self, host: str) -> Path:
        return self.place / host / "pki"

    def record(self, **nodes: str) -> dict[str, Any]:
        hosts = {
            host: {"kubernetes_node": nodes.get(host, host), "underlay4": address, "advertise4": address}
            for host, address in (("k1", "198.18.4.11"), ("k2", "198.18.4.12"))
        }
        outer = {"pod_ranges": ["10.244.0.0/16"], "service_range": "10.96.0.0/16", "api_server": self.cluster.api.url}
        return {"name": "kube", "hosts": hosts, "kubernetes": outer, "etcd": {"members": self.members}}

    def credential(self, host: str, signed: Any = None, **how: Any) -> dict[str, Any]:
        self.pki(host).parent.mkdir(exist_ok=True)
        given = {"spec": {"host": host}, "directory": str(self.pki(host))}
        return run_module("kubernetes_credential", {**given, **({"signed": signed} if signed else {})}, **how)

    def access(self, registrars: list[Any], config: Path | None = None, **more: Any) -> dict[str, Any]:
        how = {name: more.pop(name) for name in ("check",) if name in more}
        given = {"estate": "lab", "cluster": "kube", "record": self.record(), "registrars": registrars}
        given |= {"kubeconfig": str(config or self.cluster.kubeconfig), **more}
        return run_module("kubernetes_access", given, bundle=False, **how)

    def probe(self, config: Path | None = None, joins: bool = True, **nodes: str) -> dict[str, Any]:
        seen = [{"host": "k1", "addresses": [], "credential": not joins}]
        given = {"record": self.record(**nodes), "seen": seen}
        return run_module(
            "kubernetes_probe", {**given, "kubeconfig": str(config or self.cluster.kubeconfig)}, bundle=False
        )

    def role(self, *hosts: str, **how: Any) -> dict[str, bool]:
        """Which modules changed something, as the recap would count it."""
        asked = {host: self.credential(host, **how) for host in hosts}
        changed = {f"request {host}": result["changed"] for host, result in asked.items()}
        credentials = [result["credential"] for result in asked.values()]
        answer = self.access(credentials, **how)
        changed["access"] = answer["changed"]
        for one in credentials:
            if one["host"] in answer["certificates"] or answer.get("ca", one["ca"]) != one["ca"]:
                changed[f"install {one['host']}"] = self.credential(one["host"], answer, **how)["changed"]
        return changed

    def may(self, host: str, path: str, place: Path | None = None) -> int:
        """What Kubernetes answers to the host's registrar: HTTP's status."""
        pki = place or self.pki(host)
        tls = ssl.create_default_context(cafile=str(self.pki("k1") / "kubernetes.ca"))
        tls.load_cert_chain(pki / "kubernetes.crt", pki / "kubernetes.key")
        connection = http.client.HTTPSConnection("127.0.0.1", self.cluster.api.port, timeout=30, context=tls)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("kubernetes")
    with ApiServer(place / "api") as api:
        found = Cluster(api, place)
        manager = found.sign()
        try:
            yield found
        finally:
            manager.kill()
            manager.wait(30)


@pytest.fixture
def hosts(cluster: Cluster, tmp_path: Path) -> Iterator[Hosts]:
    yield Hosts(cluster, tmp_path)
    for path in (BINDING, ROLE):
        if cluster.there(path) is not None:
            cluster.api.request("DELETE", path)


def test_registrars_are_let_in_and_may_read_only(hosts: Hosts) -> None:
    predicted = hosts.role("k1", "k2", check=True)
    assert all(predicted.values())
    assert hosts.cluster.there(ROLE) is None
    assert hosts.role("k1", "k2") == predicted
    assert (hosts.pki("k1") / "kubernetes.key").stat().st_mode & 0o777 == 0o600
    for path in ("/api/v1/pods", "/api/v1/nodes", "/apis/discovery.k8s.io/v1/endpointslices?watch=1&timeoutSeconds=1"):
        assert hosts.may("k1", path) == 200
    for path in ("/api/v1/secrets", "/api/v1/configmaps", f"{RBAC}/clusterroles"):
        assert hosts.may("k2", path) == 403
    selected = hosts.cluster.api.request(
        "GET", f"{RBAC}/clusterroles?labelSelector=app.kubernetes.io/managed-by=isthmus"
    )
    assert [one["metadata"]["name"] for one in selected["items"]] == ["isthmus-registrar"]
    assert hosts.cluster.api.request("GET", REQUESTS)["items"] == []


def test_a_second_run_changes_nothing(hosts: Hosts) -> None:
    hosts.role("k1", "k2")
    before = hosts.cluster.there(BINDING)["metadata"]["resourceVersion"]
    nothing = {"request k1": False, "request k2": False, "access": False}
    assert hosts.role("k1", "k2") == nothing
    assert hosts.role("k1", "k2", check=True) == nothing
    assert hosts.cluster.there(BINDING)["metadata"]["resourceVersion"] == before


def test_a_batch_takes_nothing_from_those_of_another(hosts: Hosts) -> None:
    assert hosts.role("k1")["access"]
    hosts.role("k2")
    assert hosts.may("k1", "/api/v1/pods") == hosts.may("k2", "/api/v1/pods") == 200


def test_what_a_lost_host_holds_is_good_for_nothing(hosts: Hosts) -> None:
    hosts.role("k1", "k2")
    stolen = hosts.place / "stolen"
    hosts.pki("k2").rename(stolen)
    hosts.members = ["k1"]
    assert hosts.role("k1") == {"request k1": False, "access": True}
    assert hosts.may("k2", "/api/v1/pods", stolen) == 403
    hosts.members = ["k1", "k2"]  # joined anew, under its name
    hosts.role("k2")
    assert hosts.may("k2", "/api/v1/pods") == 200
    assert hosts.may("k2", "/api/v1/pods", stolen) == 403


def test_others_additions_stay_and_ours_are_put_right(hosts: Hosts) -> None:
    hosts.role("k1")
    merge = "application/merge-patch+json"
    hosts.cluster.api.request("PATCH", ROLE, {"metadata": {"annotations": {"audit": "seen"}}}, merge)
    assert not hosts.role("k1")["access"]
    everything = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
    hosts.cluster.api.request("PATCH", ROLE, {"rules": everything}, merge)
    assert hosts.role("k1", check=True)["access"]
    answer = hosts.access([hosts.credential("k1")["credential"]])
    assert '"*"' in answer["diff"][0]["before"]
    assert hosts.cluster.there(ROLE)["metadata"]["annotations"] == {"audit": "seen"}
    assert hosts.may("k1", "/api/v1/secrets") == 403


def test_what_is_damaged_or_of_another_authority_is_signed_anew(hosts: Hosts) -> None:
    hosts.role("k1")
    (hosts.pki("k1") / "kubernetes.crt").write_text("rubbish")
    assert "no readable PEM" in hosts.credential("k1")["credential"]["reason"]
    hosts.role("k1")
    assert hosts.may("k1", "/api/v1/pods") == 200
    before = (hosts.pki("k1") / "kubernetes.crt").read_bytes()
    (hosts.pki("k1") / "kubernetes.ca").write_text("that of a cluster that was made anew since")
    assert hosts.role("k1")["install k1"]
    assert (hosts.pki("k1") / "kubernetes.crt").read_bytes() != before
    (hosts.pki("k1") / "kubernetes.key").write_text("rubbish")
    hosts.role("k1")
    assert hosts.may("k1", "/api/v1/pods") == 200


def test_a_host_gets_no_other_name(hosts: Hosts) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "isthmus:admins")]
    names.append(x509.NameAttribute(x509.NameOID.COMMON_NAME, "admin"))
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names)).sign(key, hashes.SHA256())
    csr = request.public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(ModuleFailed, match=r"k1 is for 'CN=admin,O=isthmus:admins'.*Nothing was signed"):
        hosts.access([{"host": "k1", "csr": csr, "reason": "there is none yet"}])
    assert hosts.cluster.there(ROLE) is None
    # Nor another host's.
    other = hosts.credential("k2")["credential"]
    with pytest.raises(ModuleFailed, match="Nothing was signed"):
        hosts.access([{**other, "host": "k1"}])


def test_another_clusters_api_is_refused(hosts: Hosts) -> None:
    credential = hosts.credential("k1")["credential"]
    record = hosts.record(k1="n1", k2="n2")
    words = "is not the API of cluster kube: its nodes are k1, k2, and the hosts of the inventory are the nodes n1, n2"
    with pytest.raises(ModuleFailed, match=words):
        hosts.access([credential], record=record)
    assert hosts.cluster.there(ROLE) is None
    with pytest.raises(ModuleFailed, match=words):
        hosts.probe(joins=False, k1="n1", k2="n2")


def test_objects_that_are_not_ours_are_left_alone(hosts: Hosts) -> None:
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "rules": []}
    body = {**role, "metadata": {"name": "isthmus-registrar"}}
    hosts.cluster.api.request("POST", f"{RBAC}/clusterroles", body)
    credential = hosts.credential("k1")["credential"]
    with pytest.raises(ModuleFailed, match="that is somebody else's"):
        hosts.access([credential])
    assert hosts.access([], state="absent")["removed"] == []
    labels = {**LABELS, "isthmus.io/cluster": "other"}
    change = {"metadata": {"labels": labels}}
    hosts.cluster.api.request("PATCH", ROLE, change, "application/merge-patch+json")
    with pytest.raises(ModuleFailed, match="that of cluster other of the estate lab"):
        hosts.access([credential])
    answer = hosts.access([], state="absent")
    assert answer["removed"] == []
    assert "that of cluster other of the estate lab and was left" in str(answer["warnings"])
    assert not hosts.cluster.there(ROLE)["rules"]


def test_everything_of_ours_goes(hosts: Hosts) -> None:
    hosts.role("k1")
    left = {"metadata": {"name": "isthmus-registrar-k9", "labels": LABELS}}
    spec = {"signerName": "example.com/none", "usages": ["client auth"]}
    csr = hosts.credential("k2")["credential"]["csr"]
    encoded = base64.b64encode(csr.encode()).decode()
    body = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", **left}
    hosts.cluster.api.request("POST", REQUESTS, {**body, "spec": {**spec, "request": encoded}})
    predicted = hosts.access([], state="absent", check=True)
    assert hosts.cluster.there(ROLE) is not None
    gone = hosts.access([], state="absent")
    assert gone["removed"] == predicted["removed"]
    assert gone["removed"] == [
        "clusterrolebinding/isthmus-registrar",
        "clusterrole/isthmus-registrar",
        "certificatesigningrequest/isthmus-registrar-k9",
    ]
    assert hosts.cluster.there(ROLE) is None
    assert hosts.may("k1", "/api/v1/pods") == 403
    assert not hosts.access([], state="absent")["changed"]


def test_rights_that_the_operator_lacks_are_named_at_once(hosts: Hosts) -> None:
    alice = hosts.cluster.config("alice")
    hosts.cluster.api.allow("alice", ("list",), "nodes")
    with pytest.raises(ModuleFailed) as caught:
        hosts.probe(alice)
    for right in (
        "create clusterroles.rbac.authorization.k8s.io",
        "patch clusterrolebindings.rbac.authorization.k8s.io isthmus-registrar",
        "update certificatesigningrequests.certificates.k8s.io/approval",
        "approve signers.certificates.k8s.io kubernetes.io/kube-apiserver-client",
        "watch endpointslices.discovery.k8s.io",
    ):
        assert right in caught.value.msg
    assert "list nodes;" not in caught.value.msg
    # In a mesh that runs nothing needs them.
    assert hosts.probe(alice, joins=False)["pending"] == ""
    hosts.role("k1")
    credential = hosts.credential("k1")["credential"]
    answer = hosts.access([credential], alice)
    assert 'User "alice" cannot get resource "clusterrolebindings"' in answer["pending"]
    assert not answer["changed"]
    with pytest.raises(ModuleFailed, match="k2 has no certificate for the Kubernetes API of cluster kube"):
        hosts.access([hosts.credential("k2")["credential"]], alice)
    nobody = hosts.cluster.config("nobody")
    with pytest.raises(ModuleFailed, match='User "nobody" cannot list resource "nodes"'):
        hosts.probe(nobody)


def test_what_the_inventory_says_otherwise_is_told(hosts: Hosts) -> None:
    assert hosts.probe()["nodes"] == ["k1", "k2"]
    with pytest.raises(ModuleFailed, match=r"Host k2 is to be the node worker of .* it is the node k2 by its address"):
        hosts.probe(k2="worker")
    told = str(hosts.probe(joins=False, k2="worker")["warnings"])
    assert "Host k2 is to be the node worker" in told
    assert "The inventory does not know k2" in told
    record = hosts.record()
    record["kubernetes"] |= {"pod_ranges": ["10.244.1.0/24"], "service_range": "10.97.0.0/16"}
    seen = [{"host": "k1", "credential": False}]
    given = {"record": record, "seen": seen, "kubeconfig": str(hosts.cluster.kubeconfig)}
    with pytest.raises(ModuleFailed) as caught:
        run_module("kubernetes_probe", given, bundle=False)
    assert "10.244.2.0/24 of k2" in caught.value.msg
    assert "Kubernetes' own service has the address 10.96.0.1" in caught.value.msg


def test_a_node_that_the_inventory_does_not_know_is_refused_until_the_cluster_has_joined(hosts: Hosts) -> None:
    words = r"cannot join .* nothing was changed.*The inventory does not know k3, which Kubernetes has as nodes of"
    hosts.cluster.api.create("nodes", {"metadata": {"name": "k3"}, "spec": {"podCIDR": "10.244.3.0/24"}})
    try:
        with pytest.raises(ModuleFailed, match=words) as caught:
            hosts.probe()
        assert "Add the machines to the inventory with isthmus_cluster: kube" in caught.value.msg
        # That somebody else has a role of the name says nothing.
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "rules": []}
        hosts.cluster.api.request("POST", f"{RBAC}/clusterroles", {**role, "metadata": {"name": "isthmus-registrar"}})
        with pytest.raises(ModuleFailed, match=words):
            hosts.probe()
        hosts.cluster.api.request("DELETE", ROLE)

        hosts.role("k1")
        for joins in (True, False):  # a registrar more, or a run that has nothing to do
            told = hosts.probe(joins=joins)
            assert told["nodes"] == ["k1", "k2", "k3"]
            assert "The inventory does not know k3" in str(told["warnings"])
    finally:
        hosts.cluster.api.delete("nodes", "", "k3")
    assert hosts.probe().get("warnings") is None


def test_an_api_that_is_away_is_pending(hosts: Hosts) -> None:
    hosts.role("k1")
    usable, without = hosts.credential("k1")["credential"], hosts.credential("k2")["credential"]
    content = json.loads(hosts.cluster.kubeconfig.read_text())
    content["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    away = hosts.place / "away.kubeconfig"
    away.write_text(json.dumps(content))
    answer = hosts.access([usable], away)
    assert "https://127.0.0.1:1 does not answer" in answer["pending"]
    assert not answer["changed"]
    with pytest.raises(ModuleFailed, match=r"k2 has no certificate .* does not answer"):
        hosts.access([usable, without], away)
    assert "does not answer" in hosts.probe(away, joins=False)["pending"]
    with pytest.raises(ModuleFailed, match="does not answer"):
        hosts.probe(away)
    assert hosts.access([], away, state="absent")["pending"] != ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No configuration found|No such file|cannot be used"),
        ("{", "cannot be used"),
        ('{"apiVersion": "v1", "kind": "Config"}', "cannot be used"),
    ],
)
def test_a_kubeconfig_that_is_none_is_named(hosts: Hosts, content: str | None, words: str) -> None:
    path = hosts.place / "config"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModuleFailed, match=words) as caught:
        hosts.probe(path)
    assert str(path) in caught.value.msg
    assert "isthmus_kubeconfig" in caught.value.msg


def test_the_way_that_awx_gives(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    crt, key = hosts.cluster.api.ca.issue("admin")
    variables = {"HOST": hosts.cluster.api.url, "CERT_FILE": crt, "KEY_FILE": key}
    for name, value in {**variables, "SSL_CA_CERT": hosts.cluster.api.ca.crt}.items():
        monkeypatch.setenv(f"K8S_AUTH_{name}", str(value))
    given = {"record": hosts.record(), "seen": [{"host": "k1", "credential": False}]}
    assert run_module("kubernetes_probe", given, bundle=False)["server"] == hosts.cluster.api.url
    monkeypatch.setenv("K8S_AUTH_API_KEY", "wrong")
    monkeypatch.delenv("K8S_AUTH_CERT_FILE")
    monkeypatch.delenv("K8S_AUTH_KEY_FILE")
    with pytest.raises(ModuleFailed, match="does not know who asks"):
        run_module("kubernetes_probe", given, bundle=False)


def test_the_bearer_token_of_an_awx_credential(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a ServiceAccount, as AWX's type *OpenShift or Kubernetes API Bearer Token* has it: with the authority, and
    with *Verify SSL* off."""
    api = hosts.cluster.api
    accounts = "/api/v1/namespaces/default/serviceaccounts"
    api.request("POST", accounts, {"metadata": {"name": "awx"}})
    api.allow("system:serviceaccount:default:awx", ("get", "list"), "nodes", "services")
    token = api.request("POST", f"{accounts}/awx/token", {"spec": {"audiences": []}})["status"]["token"]
    given = {"record": hosts.record(), "seen": [{"host": "k1", "credential": True}]}

    def probe(**more: str) -> dict[str, Any]:
        for name in ("VERIFY_SSL", "SSL_CA_CERT"):
            monkeypatch.delenv(f"K8S_AUTH_{name}", raising=False)
        for name, value in {"HOST": api.url, "API_KEY": token, **more}.items():
            monkeypatch.setenv(f"K8S_AUTH_{name}", value)
        found = run_module("kubernetes_probe", given, bundle=False)
        assert token not in json.dumps(found)
        return found

    assert "certificate verify failed" in probe()["pending"], "nobody says by which authority it is verified"
    for way in ({"SSL_CA_CERT": str(api.ca.crt), "VERIFY_SSL": "True"}, {"VERIFY_SSL": "False"}):
        told = probe(**way)
        assert (told["pending"], told["server"], told["nodes"]) == ("", api.url, ["k1", "k2"]), way
        assert told["pods"] == {"k1": ["10.244.1.0/24"], "k2": ["10.244.2.0/24"]}, way
    # A registrar is to trust the server by some authority.
    access = {"estate": "lab", "cluster": "kube", "record": hosts.record()}
    with pytest.raises(ModuleFailed, match="verifies no certificate, so that nobody knows by which authority"):
        run_module("kubernetes_access", {**access, "registrars": [hosts.credential("k1")["credential"]]}, bundle=False)


def test_a_context_of_the_kubeconfig_is_used(hosts: Hosts) -> None:
    content = json.loads(hosts.cluster.kubeconfig.read_text())
    content["clusters"].append({"name": "away", "cluster": {"server": "https://127.0.0.1:1"}})
    content["contexts"].append({"name": "away", "context": {"cluster": "away", "user": "admin"}})
    content["current-context"] = "away"
    both = hosts.place / "both.kubeconfig"
    both.write_text(json.dumps(content))
    given = {"record": hosts.record(), "seen": [{"host": "k1", "credential": True}], "kubeconfig": str(both)}
    assert "https://127.0.0.1:1 does not answer" in run_module("kubernetes_probe", given, bundle=False)["pending"]
    told = run_module("kubernetes_probe", {**given, "context": "here"}, bundle=False)
    assert (told["pending"], told["server"]) == ("", hosts.cluster.api.url)
    missing = run_module("kubernetes_probe", {**given, "context": "elsewhere"}, bundle=False)["pending"]
    assert f"The kubeconfig {both}, context elsewhere, cannot be used" in missing


def test_no_client_is_a_reason(hosts: Hosts) -> None:
    shadow = hosts.place / "kubernetes"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("raise ImportError('not here')")
    given = {"record": hosts.record(), "seen": [{"host": "k1", "credential": False}]}
    with pytest.raises(ModuleFailed, match=f"`kubernetes` cannot be imported under {sys.executable}"):
        run_module("kubernetes_probe", given, packages=hosts.place)
