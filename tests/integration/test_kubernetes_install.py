# SPDX-License-Identifier: GPL-3.0-or-later
"""The mesh is put into a real kube-apiserver with the real controllers of Kubernetes, rolled out, and taken out again.

There is no scheduler and no kubelet: the test says of the pods that the controllers make how they are.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import in_cluster
from cryptography import x509
from installations import installation, node
from integration.kubernetes_fixture import ApiServer, Refused, program
from integration.module_runner import ModuleFailed, collection, run_module
from integration.test_kubernetes_access import Cluster
from isthmus_agent import pki

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "/api/v1/namespaces/isthmus-system"
APPS = "/apis/apps/v1/namespaces/isthmus-system"
OUT = {"estate": "lab", "cluster": "managed"}
CONTROLLERS = (
    *("daemonset", "deployment", "replicaset", "statefulset", "job", "namespace", "garbage-collector"),
    "persistentvolumeclaim-protection",
)


class Managed(Cluster):
    """A cluster of two nodes whose control plane is to be inside. Pods run as soon as they are made."""

    def __init__(self, api: ApiServer, place: Path) -> None:
        super().__init__(api, place)
        self.end, self.still = threading.Event(), threading.Event()
        self.told: list[str] = []  # what programs of pods said

    def install(self, phase: str = "run", check: bool = False, install: Any = None, **more: Any) -> dict[str, Any]:
        given = {"install": install or self.wanted(), "phase": phase, "kubeconfig": str(self.kubeconfig), "timeout": 60}
        return run_module("kubernetes_install", {**given, **more}, check=check, bundle=False)

    def wanted(self, **change: Any) -> dict[str, Any]:
        """Of a cluster that is new: the estate record has no authority of it."""
        made = installation()
        made["etcd"]["replicas"] = 1
        del made["trust"]["managed"]
        return {**made, **change}

    def pods(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.request("GET", f"{NAMESPACE}/pods")["items"]
        return found

    def run_pod(self, pod: dict[str, Any]) -> None:
        """What a kubelet would say of a pod that runs; one that is to end ends."""
        name = pod["metadata"]["name"]
        if pod["metadata"].get("deletionTimestamp"):
            self.api.delete("pods", "isthmus-system", name)
            return
        if pod["spec"]["serviceAccountName"] == "isthmus-pki":
            self.run_pki(pod)
            return
        conditions = [{"type": one, "status": "True"} for one in ("Ready", "ContainersReady", "PodScheduled")]
        status = {"phase": "Running", "conditions": conditions, "observedGeneration": pod["metadata"]["generation"]}
        self.api.status("pods", "isthmus-system", name, status)

    def run_pki(self, pod: dict[str, Any]) -> None:
        """The Job's pod for real: its program as its service account, with what is mounted there."""
        place = self.place / pod["metadata"]["name"]
        place.mkdir(exist_ok=True)
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
        account = f"{NAMESPACE}/serviceaccounts/isthmus-pki/token"
        (place / "token").write_text(self.api.request("POST", account, asked)["status"]["token"])
        (place / "ca.crt").write_bytes(self.api.ca.crt.read_bytes())
        (place / "namespace").write_text("isthmus-system")
        (container,) = pod["spec"]["containers"]
        (volume,) = pod["spec"]["volumes"]
        for name, text in self.there(f"{NAMESPACE}/configmaps/{volume['configMap']['name']}")["data"].items():
            (place / name).write_text(text)
        assert container["command"][1:] == ["--wanted", f"{container['volumeMounts'][0]['mountPath']}/wanted.json"]
        program = [sys.executable, "-m", "isthmus_agent.pki_job", f"--wanted={place}/wanted.json"]
        program += [f"--account={place}", f"--server=127.0.0.1:{self.api.port}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "agent")}
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        self.told.append(done.stdout + done.stderr)
        code = done.returncode
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "containerID": ""}
        state = {"name": "pki", "ready": False, "image": "", "imageID": "", "restartCount": 0}
        status = {
            "phase": "Succeeded" if code == 0 else "Failed",
            "containerStatuses": [{**state, "state": {"terminated": ended}}],
        }
        self.api.status("pods", "isthmus-system", pod["metadata"]["name"], status)

    def give_address(self) -> None:
        """What a provider's controller does with a Service of the type LoadBalancer."""
        there = self.there(f"{NAMESPACE}/services/isthmus-etcd-mesh")
        if there is None or there["spec"]["type"] != "LoadBalancer" or there["status"]["loadBalancer"]:
            return
        status = {"loadBalancer": {"ingress": [{"ip": "198.18.4.200"}]}}
        self.api.status("services", "isthmus-system", "isthmus-etcd-mesh", status)

    def work(self) -> None:
        while not self.end.wait(0.1):
            with contextlib.suppress(Refused):  # it went meanwhile
                for pod in self.pods() if not self.still.is_set() else ():
                    phase = (pod.get("status") or {}).get("phase")
                    if phase == "Pending" or pod["metadata"].get("deletionTimestamp"):
                        self.run_pod(pod)
                if not self.still.is_set():
                    self.give_address()

    @contextlib.contextmanager
    def without_others(self) -> Iterator[None]:
        """No kubelet and no provider does anything."""
        self.still.set()
        try:
            yield
        finally:
            self.still.clear()

    def versions(self) -> dict[str, str]:
        """resourceVersion by kind and name of what the mesh has there."""
        found = {}
        for path in (
            *(f"{NAMESPACE}/{kind}" for kind in ("services", "configmaps", "serviceaccounts", "resourcequotas")),
            *(f"{APPS}/{kind}" for kind in ("statefulsets", "daemonsets", "deployments")),
            "/apis/rbac.authorization.k8s.io/v1/clusterroles",
        ):
            query = "?labelSelector=app.kubernetes.io/managed-by=isthmus"
            for one in self.api.request("GET", path + query)["items"]:
                found[f"{path}/{one['metadata']['name']}"] = one["metadata"]["resourceVersion"]
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    place = tmp_path_factory.mktemp("managed")
    with ApiServer(place / "api") as api:
        cluster = Managed(api, place)
        for number in (1, 2):
            api.status("nodes", "", f"k{number}", node("", f"198.18.4.1{number}")["status"])
            # As kubelet and node controller have it.
            change = {"metadata": {"labels": {"kubernetes.io/os": "linux"}}, "spec": {"taints": None}}
            api.patch("nodes", "", f"k{number}", change)
        command = [str(program().with_name("kube-controller-manager")), f"--kubeconfig={cluster.kubeconfig}"]
        command += ["--leader-elect=false", "--secure-port=0", "--concurrent-gc-syncs=2"]
        command.append("--controllers=" + ",".join(f"{name}-controller" for name in CONTROLLERS))
        with (place / "manager.log").open("ab") as log:
            manager = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        others = threading.Thread(target=cluster.work, daemon=True)
        others.start()
        try:
            yield cluster
        finally:
            cluster.end.set()
            others.join(30)
            manager.kill()
            manager.wait(30)


@pytest.fixture
def managed(server: Managed) -> Iterator[Managed]:
    """The cluster without the mesh, before and after."""
    yield server
    server.install(state="absent", install=OUT)


def test_from_nothing_to_rolled_out_and_a_second_run_changes_nothing(managed: Managed) -> None:
    predicted = managed.install("expose", check=True)
    assert predicted["changed"]
    assert predicted["exposed"] == {}
    assert managed.there(NAMESPACE) is None

    with managed.without_others():
        with pytest.raises(ModuleFailed, match="got no address within 1 s") as failed:
            managed.install("expose", timeout=1)
        assert "expose.type of the cluster to node_port or host" in failed.value.msg
    exposed = managed.install("expose")
    assert not exposed["changed"]
    assert exposed["exposed"]["endpoints"] == ["https://198.18.4.200:2379"]
    assert (
        exposed["exposed"]["cluster_ip"]
        == managed.there(f"{NAMESPACE}/services/isthmus-etcd-client")["spec"]["clusterIP"]
    )
    assert managed.there(f"{APPS}/statefulsets/isthmus-etcd") is None

    assert managed.install("etcd")["changed"]
    assert managed.there(f"{APPS}/daemonsets/isthmus-agent") is None
    assert managed.install("run")["changed"]
    names = sorted(pod["metadata"]["name"].rpartition("-")[0][:17] for pod in managed.pods())
    assert names == ["isthmus-agent", "isthmus-agent", "isthmus-etcd", "isthmus-registrar", "isthmus-registrar"]

    before = managed.versions()
    assert len(before) > 10
    for phase, check in (("etcd", False), ("run", True), ("run", False)):
        again = managed.install(phase, check)
        assert (again["changed"], again["diff"], again["removed"]) == (False, [], [])
    assert managed.versions() == before


def test_keys_are_made_inside_by_who_may_write_these_secrets_only(managed: Managed) -> None:
    managed.install("expose")
    names = in_cluster.server_names(1)
    labels = in_cluster.labels(managed.wanted(), "pki")
    wanted = {"schema": 1, "cluster": "managed", "dns": names, "ip": ["127.0.0.1"], "labels": labels}
    wanted |= {"peers": {}, "certificates": {}, "requests": [], "known_ca": None}
    assert managed.install("pki", True, wanted=wanted)["issued"] == {}
    first = managed.install("pki", wanted=wanted)
    assert "BEGIN CERTIFICATE" in first["issued"]["ca"], managed.told
    secrets = managed.api.request("GET", f"{NAMESPACE}/secrets")["items"]
    assert {one["metadata"]["name"] for one in secrets} == {*in_cluster.SECRETS}
    keys = [value for one in secrets for name, value in one["data"].items() if name.endswith(".key")]
    assert len(keys) >= 7
    shown = json.dumps(first)
    assert "PRIVATE KEY" not in shown
    assert not [key for key in keys if key in shown]
    again = managed.install("pki", wanted=wanted)
    assert (again["changed"], again["issued"]) == (False, first["issued"])
    # Whatever etcd's pod mounts is there.
    (etcd,) = (one["data"] for one in secrets if one["metadata"]["name"] == "isthmus-etcd-tls")
    assert {"etcd-server.key", "etcd-server.crt", "etcd-peer.key", "etcd-peer.crt", "revoked.crl"} <= etcd.keys()

    # Of a Secret that is lost the keys are made anew, by a Job that ran before for the same.
    kept = managed.there(f"{NAMESPACE}/secrets/isthmus-ca")
    lost = managed.there(f"{NAMESPACE}/secrets/isthmus-agent-tls")
    managed.api.request("DELETE", f"{NAMESPACE}/secrets/isthmus-agent-tls")
    for check in (True, False):
        (change,) = managed.install("pki", check, wanted=wanted)["diff"]
        assert change["after"].strip() == "keys and certificates anew: Secret isthmus-agent-tls is not there"
    assert managed.there(f"{NAMESPACE}/secrets/isthmus-agent-tls")["data"]["agent.key"] != lost["data"]["agent.key"]
    assert managed.there(f"{NAMESPACE}/secrets/isthmus-ca")["data"]["ca.key"] == kept["data"]["ca.key"]
    assert not managed.install("pki", wanted=wanted)["changed"]

    # What the CronJob did not renew is renewed by a run.
    public = managed.there(f"{NAMESPACE}/configmaps/isthmus-pki")
    old = {**json.loads(public["data"]["issued.json"]), "renew": "2026-01-02T03:04:05Z"}
    change = {"data": {"issued.json": json.dumps(old)}}
    managed.api.request("PATCH", f"{NAMESPACE}/configmaps/isthmus-pki", change, "application/merge-patch+json")
    told = managed.install("run", True)["unready"]
    assert "CronJob isthmus-system/isthmus-pki: certificates are to be renewed since 2026-01-02T03:04:05Z" in told
    assert managed.install("pki", wanted=wanted)["issued"] == first["issued"]
    assert not managed.install("pki", wanted=wanted)["changed"]

    with pytest.raises(ModuleFailed, match="made no certificates: it failed") as failed:
        managed.install("pki", wanted={**wanted, "schema": 99}, timeout=120)
    assert "exit" in failed.value.msg or "ended with 1" in failed.value.msg
    assert managed.install("pki", wanted=wanted)["issued"] == first["issued"]


def test_no_line_of_a_key_is_in_what_the_module_or_the_job_says(managed: Managed) -> None:
    """In the answers with their diffs, of every phase, in check mode too, while keys are made, lost and taken out; and
    in the log of the pod that makes them."""
    wanted = {"schema": 1, "cluster": "managed", "dns": in_cluster.server_names(1), "ip": ["127.0.0.1"], "peers": {}}
    labels = in_cluster.labels(managed.wanted(), "pki")
    wanted |= {"certificates": {}, "requests": [], "known_ca": None, "labels": labels}
    before = len(managed.told)
    said = [managed.install("expose")]
    said += [managed.install("pki", check, wanted=wanted) for check in (True, False)]
    keys: set[str] = set()

    def remember() -> None:
        for secret in managed.api.request("GET", f"{NAMESPACE}/secrets")["items"]:
            for name, encoded in secret["data"].items():
                if name.endswith(".key"):
                    text = base64.b64decode(encoded).decode()
                    keys.update([encoded, *(line for line in text.splitlines() if "-----" not in line)])

    remember()
    first = len(keys)
    assert first >= 3 * 7
    managed.api.request("DELETE", f"{NAMESPACE}/secrets/isthmus-agent-tls")
    said += [managed.install("pki", check, wanted=wanted) for check in (True, False)]
    remember()
    assert len(keys) > first
    said += [managed.install(phase, check) for phase in ("etcd", "run") for check in (True, False)]
    said += [managed.install(check=check, install=OUT, state="absent") for check in (True, False)]
    assert sum(bool(answer["diff"]) for answer in said) >= 8, "they show what they change"
    assert len(managed.told) >= before + 2
    shown = json.dumps([said, managed.told[before:]])
    assert "PRIVATE KEY" not in shown
    assert not [line for line in keys if len(line) >= 16 and line in shown]


def test_what_a_forgotten_host_was_given_is_refused_and_members_start_anew_for_it(managed: Managed) -> None:
    labels = in_cluster.labels(managed.wanted(), "pki")
    wanted = {"schema": 1, "cluster": "managed", "dns": in_cluster.server_names(1), "ip": ["127.0.0.1"], "peers": {}}
    wanted |= {"certificates": {}, "known_ca": None, "labels": labels}
    requests = [
        {"cluster": "onprem", "host": host, "csr": pki.new_request(pki.new_key(), host, host)} for host in ("o1", "o2")
    ]
    doomed = {"hosts": ["o2"], "names": []}

    def members() -> str:
        there = managed.there(f"{APPS}/statefulsets/isthmus-etcd")["spec"]["template"]["metadata"]
        return str(there["annotations"][in_cluster.DIGEST])

    def listed() -> set[int]:
        content = managed.there(f"{NAMESPACE}/secrets/isthmus-etcd-tls")["data"]["revoked.crl"]
        return {one.serial_number for one in x509.load_der_x509_crl(base64.b64decode(content))}

    managed.install("expose")
    given = managed.install("pki", wanted={**wanted, "requests": requests})["issued"]["signed"]
    managed.install("run")
    before = members()
    assert listed() == set()
    lost = managed.wanted(revoked=doomed)
    assert "certificates of o2: not revoked, run isthmus.mesh.site" in managed.install("run", True, lost)["unready"]

    asked = {**wanted, "requests": requests[:1], "revoked": doomed}
    told = managed.install("pki", wanted=asked)["issued"]["revoked"]
    assert [one["host"] for one in told["certificates"]] == ["o2"]
    assert listed() == {x509.load_pem_x509_certificate(given[1]["certificate"].encode()).serial_number}
    assert members() == before
    assert managed.install("etcd", install=lost)["changed"]
    assert members() != before
    after = managed.install("run", True, lost)
    assert (after["changed"], after["unready"]) == (False, [])
    assert not managed.install("pki", wanted=asked)["changed"]


def test_a_cluster_that_was_made_anew_is_refused_before_anything_is_changed(managed: Managed) -> None:
    """The estate record has an authority of the former one."""
    known = managed.wanted(trust={"managed": "the former authority\n"})
    words = "has nothing of it: no Secret isthmus-system/isthmus-ca"
    for phase, check in (("expose", True), ("expose", False), ("run", True)):
        with pytest.raises(ModuleFailed, match=words) as failed:
            managed.install(phase, check, install=known)
        assert "write `state: absent` into isthmus_estate.clusters.managed" in failed.value.msg
    assert managed.there(NAMESPACE) is None

    managed.install("expose")
    before = managed.versions()
    with pytest.raises(ModuleFailed, match=words):
        managed.install("expose", install=known)
    public = {"metadata": {"name": "isthmus-pki"}, "data": {"issued.json": json.dumps({"ca": "another authority"})}}
    managed.api.request("POST", f"{NAMESPACE}/configmaps", public)
    with pytest.raises(ModuleFailed, match="has another certificate authority than the estate record has for cluster"):
        managed.install("expose", install=known)
    managed.api.request("DELETE", f"{NAMESPACE}/configmaps/isthmus-pki")
    assert managed.versions() == before

    # Secrets that were put back from a backup are what the record knows.
    managed.api.request("POST", f"{NAMESPACE}/secrets", {"metadata": {"name": "isthmus-ca"}, "data": {}})
    assert not managed.install("expose", install=known)["changed"]


def test_rights_that_the_operator_lacks_are_named_before_anything_is_changed(managed: Managed) -> None:
    alice = managed.config("alice")
    managed.api.allow("alice", ("list",), "nodes")
    with pytest.raises(ModuleFailed, match=r"Nothing was changed there\. It lacks: ") as failed:
        managed.install("expose", kubeconfig=str(alice))
    lacking = failed.value.msg.partition("It lacks: ")[2].partition(". Next: ")[0].split("; ")
    for right in (
        "get, create, patch, list, watch namespaces",
        "get, list, create, patch, delete statefulsets.apps in isthmus-system",
        "get, list, create, patch, delete clusterroles.rbac.authorization.k8s.io",
        "create pods/exec in isthmus-system",
        "create, get, update secrets in isthmus-system",
        "get, list, watch, create, patch, delete endpointslices.discovery.k8s.io",
    ):
        assert right in lacking
    assert "list nodes" not in lacking
    assert managed.there(NAMESPACE) is None


def test_a_kubelet_that_lacks_what_agents_need_is_refused_before_anything_is_changed(managed: Managed) -> None:
    before = managed.api.request("GET", "/api/v1/nodes/k2")["status"]

    def kubelet(version: str) -> None:
        managed.api.status("nodes", "", "k2", {**before, "nodeInfo": {**before["nodeInfo"], "kubeletVersion": version}})

    try:
        kubelet("v1.29.3-gke.100")
        with pytest.raises(ModuleFailed, match=r"the kubelet is older than 1\.30 on k2 \(v1\.29\.3-gke\.100\)"):
            managed.install("expose")
        assert managed.there(NAMESPACE) is None
    finally:
        kubelet("v1.34.0")
    managed.install("expose")
    try:
        kubelet("v1.29.3")
        assert "older than 1.30 on k2" in str(managed.install("expose").get("warnings"))
    finally:
        kubelet(before["nodeInfo"].get("kubeletVersion", ""))


def test_the_role_goes_through_its_phases_and_a_second_run_changes_nothing(managed: Managed, tmp_path: Path) -> None:
    common = {
        "in_cluster_install": {key: value for key, value in managed.wanted().items() if key != "image"},
        "in_cluster_image": "isthmus:1.0.0",
        "in_cluster_kubeconfig": str(managed.kubeconfig),
        "in_cluster_timeout": 60,
    }
    tasks = [
        {
            "ansible.builtin.include_role": {"name": "isthmus.mesh.in_cluster"},
            "vars": {**common, "in_cluster_phase": one},
        }
        for one in ("image", "expose", "etcd", "run")
    ]
    wanted = "https://198.18.4.200:2379"
    tasks.insert(2, {"ansible.builtin.assert": {"that": f"__in_cluster_result.exposed.endpoints == ['{wanted}']"}})
    play = [{"hosts": "localhost", "gather_facts": False, "connection": "local", "tasks": tasks}]
    (tmp_path / "play.yml").write_text(json.dumps(play))

    def run() -> str:
        with collection() as environment:
            place = {"ANSIBLE_COLLECTIONS_PATH": environment["PYTHONPATH"].split(os.pathsep)[0], "ANSIBLE_NOCOLOR": "1"}
            done = subprocess.run(
                [
                    str(Path(sys.executable).with_name("ansible-playbook")),
                    "-i",
                    "localhost,",
                    str(tmp_path / "play.yml"),
                ],
                env={**environment, **place, "ANSIBLE_PYTHON_INTERPRETER": sys.executable},
                capture_output=True,
                text=True,
                check=False,
                timeout=900,
            )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "changed=3 " in run()
    assert managed.there(f"{APPS}/daemonsets/isthmus-agent") is not None
    assert "changed=0 " in run()


def test_drift_is_put_right_and_what_others_added_stays(managed: Managed) -> None:
    managed.install("expose")
    place = f"{NAMESPACE}/services/isthmus-etcd-mesh"
    managed.api.patch(
        "services",
        "isthmus-system",
        "isthmus-etcd-mesh",
        {"metadata": {"annotations": {"theirs": "1"}, "labels": {"isthmus.io/component": "other"}}},
    )
    assert managed.install("expose", check=True)["changed"]
    assert managed.there(place)["metadata"]["labels"]["isthmus.io/component"] == "other"
    result = managed.install("expose")
    assert result["changed"]
    assert '"isthmus.io/component": "other"' in result["diff"][0]["before"]
    metadata = managed.there(place)["metadata"]
    assert metadata["labels"]["isthmus.io/component"] == "etcd"
    assert metadata["annotations"]["theirs"] == "1"
    assert not managed.install("expose")["changed"]


def test_only_what_is_ours_is_pruned(managed: Managed) -> None:
    managed.install("expose")
    own = managed.there(NAMESPACE)["metadata"]["labels"]
    own.pop("kubernetes.io/metadata.name")
    other = {**own, "isthmus.io/cluster": "other"}
    written = {key: value for key, value in own.items() if key != "isthmus.io/component"}
    for name, labels in (
        ("left", own),
        ("theirs", {"app.kubernetes.io/managed-by": "somebody"}),
        ("another", other),
        ("pki", {**own, "isthmus.io/component": "pki"}),
    ):
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}}
        managed.api.request("POST", f"{NAMESPACE}/configmaps", body)
    ports = {"ports": [{"port": 80}]}
    managed.api.create(
        "services",
        {"metadata": {"name": "by-registrar", "namespace": "isthmus-system", "labels": written}, "spec": ports},
    )
    result = managed.install("run")
    assert result["removed"] == ["configmap/isthmus-system/left"]
    for name in ("theirs", "another", "pki"):
        assert managed.there(f"{NAMESPACE}/configmaps/{name}") is not None
    assert managed.there(f"{NAMESPACE}/services/by-registrar") is not None


def test_an_object_of_somebody_else_is_refused_and_left(managed: Managed) -> None:
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "isthmus-registrar"},
    }
    path = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
    managed.api.request("POST", path, role)
    try:
        with pytest.raises(ModuleFailed, match="ClusterRole isthmus-registrar that is somebody else's"):
            managed.install("expose", timeout=1)
        assert managed.there(f"{path}/isthmus-registrar")["metadata"].get("labels") is None
    finally:
        managed.api.request("DELETE", f"{path}/isthmus-registrar")


def test_a_roll_out_that_gets_stuck_says_which_pod_and_why(managed: Managed) -> None:
    managed.install("run")
    broken = managed.wanted(image="isthmus:broken")
    with managed.without_others():
        told = managed.install("etcd", install=broken, patience=1)
        assert told["unfinished"] == "StatefulSet isthmus-system/isthmus-etcd: 0 of 1 pods are ready"
        pause = threading.Event()
        while True:
            there = {pod["metadata"]["name"]: pod for pod in managed.pods()}
            etcd = there.get("isthmus-etcd-0") or {"metadata": {}}
            if etcd["metadata"].get("deletionTimestamp"):
                managed.run_pod(etcd)
            elif etcd.get("spec", {}).get("containers", [{}])[0].get("image") == "isthmus:broken":
                break
            pause.wait(0.2)
        waiting = {"reason": "ErrImagePull", "message": "isthmus:broken: not found"}
        container = {"name": "etcd", "ready": False, "image": "", "imageID": "", "restartCount": 0}
        status = {"phase": "Pending", "containerStatuses": [{**container, "state": {"waiting": waiting}}]}
        managed.api.status("pods", "isthmus-system", "isthmus-etcd-0", status)
        with pytest.raises(ModuleFailed, match="pod isthmus-etcd-0, container etcd: ErrImagePull") as failed:
            managed.install("run", install=broken, timeout=2)
        assert "kubectl -n isthmus-system get pods -l isthmus.io/component=etcd" in failed.value.msg
    # The others were not touched: what etcd cannot do they would not either.
    agent = managed.there(f"{APPS}/daemonsets/isthmus-agent")
    assert agent["spec"]["template"]["spec"]["containers"][0]["image"] == "isthmus:1.0.0"


def test_an_etcd_keeps_its_size(managed: Managed) -> None:
    managed.install("etcd")
    larger = copy.deepcopy(managed.wanted())
    larger["etcd"]["replicas"] = 3
    with pytest.raises(ModuleFailed, match="has 1 members and is to have 3"):
        managed.install("etcd", install=larger)


def test_how_peers_reach_etcd_can_be_changed_while_it_runs(managed: Managed) -> None:
    managed.install("etcd")
    for kind, more, endpoint, service in (
        ("node_port", {"node_port": 30379, "hosts": ["k2"]}, "https://198.18.4.12:30379", "NodePort"),
        ("host", {"hosts": ["k2"]}, "https://198.18.4.12:2379", "ClusterIP"),
        ("load_balancer", {}, "https://198.18.4.200:2379", "LoadBalancer"),
        ("node_port", {"hosts": ["k1"]}, "https://198.18.4.11:{}", "NodePort"),
    ):
        wanted = managed.wanted(expose=installation(type=kind, **more)["expose"])
        changed = managed.install("etcd", install=wanted)
        there = managed.there(f"{NAMESPACE}/services/isthmus-etcd-mesh")["spec"]
        number = there["ports"][0].get("nodePort", 0)
        assert changed["changed"]
        assert changed["exposed"]["endpoints"] == [endpoint.format(number)]
        assert (there["type"], bool(number)) == (service, service != "ClusterIP")
        pods = managed.there(f"{APPS}/statefulsets/isthmus-etcd")["spec"]["template"]["spec"]
        ports = [port.get("hostPort", 0) for port in pods["containers"][0]["ports"]]
        assert (pods.get("hostNetwork", False), ports) == ((True, [2379, 2380]) if kind == "host" else (False, [0, 0]))
        again = managed.install("etcd", install=wanted)
        assert (again["changed"], again["diff"]) == (False, []), kind


def test_addresses_of_nodes_are_read_back(managed: Managed) -> None:
    wanted = managed.wanted(expose=installation(type="node_port")["expose"])
    result = managed.install("expose", install=wanted)
    port = managed.there(f"{NAMESPACE}/services/isthmus-etcd-mesh")["spec"]["ports"][0]["nodePort"]
    assert result["exposed"]["endpoints"] == [f"https://198.18.4.11:{port}"]
    assert result["exposed"]["nodes"] == ["k1"]
    assert not managed.install("expose", install=wanted)["changed"]


def test_nothing_is_left_when_it_is_taken_out(managed: Managed) -> None:
    before = managed.versions()
    absent = {"install": OUT, "state": "absent"}
    managed.install("run")
    secret = {"name": "isthmus-ca", "labels": managed.there(NAMESPACE)["metadata"]["labels"]}
    secret["labels"].pop("kubernetes.io/metadata.name")
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": secret, "stringData": {"ca.key": "the key itself"}}
    managed.api.request("POST", f"{NAMESPACE}/secrets", body)
    labels = {key: value for key, value in secret["labels"].items() if key != "isthmus.io/component"}
    labels["endpointslice.kubernetes.io/managed-by"] = "isthmus-registrar"
    slice_ = {"metadata": {"name": "by-registrar", "namespace": "default", "labels": labels}}
    managed.api.create("endpointslices", {**slice_, "addressType": "IPv4", "endpoints": []})

    predicted = managed.install(check=True, **absent)
    assert predicted["changed"]
    assert managed.there(f"{APPS}/daemonsets/isthmus-agent") is not None
    result = managed.install(**absent)
    assert "secret/isthmus-system/isthmus-ca" in result["removed"]
    assert "the key itself" not in json.dumps([predicted, result])
    assert managed.there(NAMESPACE) is None
    assert managed.there("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/by-registrar") is None
    assert managed.versions() == before == {}
    assert not managed.install(**absent)["changed"]
