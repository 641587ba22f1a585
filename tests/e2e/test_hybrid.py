# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Kubernetes cluster joins the running estate: pods and machines are one network.

The cluster's nodes have kubelet, containerd, the bridge CNI with `ipMasq: true` and kube-proxy; the demo's service
`shop/web` is there as a Service of pods that is annotated global.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from demo import EDGE, URL
from estate_tools import ETCD_HOSTS, Estate
from isthmus_lab import LabError
from kubernetes_lab import HYBRID, Kubernetes
from kubernetes_machine import TOOLS_IMAGE
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab]

NAMESPACE = "shop"
WORKERS = ("kube-2", "kube-3")
SERVICE_URL = "http://web.shop.svc.cluster.local/"  # by the cluster's own DNS

# One web server a node, and a customer in a pod and on a node's network.
MANIFEST = """\
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  annotations: {service.cilium.io/global: "true"}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
"""
WEB = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: web-{node}, namespace: shop, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: {image}
      imagePullPolicy: Never
      command: [/usr/local/lib/demo/http_server, web]
      env: [{{name: CLUSTER, value: kube}}, {{name: PORT, value: "8080"}}]
      readinessProbe: {{httpGet: {{path: /healthz, port: 8080}}, periodSeconds: 1, failureThreshold: 1}}
"""
CLIENT = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec:
  nodeName: kube-2
  hostNetwork: {host_network}
  dnsPolicy: ClusterFirstWithHostNet
  terminationGracePeriodSeconds: 1
  containers:
    - {{name: client, image: {image}, imagePullPolicy: Never, command: [/bin/sleep, "86400"]}}
"""
# A connection each; a line of JSON for each answer, or of text for what went wrong.
FETCH = """\
import sys, urllib.request
for _ in range(int(sys.argv[2])):
    try:
        print(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode().strip())
    except OSError as error:
        print(error)
"""


class Hybrid:
    """The estate with its Kubernetes cluster, and what pods see of it."""

    def __init__(self, estate: Estate, kube: Kubernetes) -> None:
        self.estate = estate
        self.kube = kube

    def pod(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.kube.get("pod", name, f"--namespace={NAMESPACE}")
        return found

    def address(self, pod: str) -> str:
        return str(self.pod(pod)["status"]["podIP"])

    def ready(self, pod: str) -> bool:
        conditions = self.pod(pod)["status"].get("conditions", ())
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def fetch(self, pod: str, url: str, count: int = 1) -> list[dict[str, Any]]:
        """What a pod gets from a URL; one that fails is {"error": ...}."""
        lines = self.kube.exec(pod, ["python3", "-c", FETCH, url, str(count)], namespace=NAMESPACE).splitlines()
        assert len(lines) == count
        return [json.loads(line) if line.startswith("{") else {"error": line} for line in lines]

    def servers(self, pod: str, url: str, count: int = 40) -> set[str]:
        """Who answers a pod, as cluster/host; LabError when something does not."""
        answers = self.fetch(pod, url, count)
        if errors := {answer["error"] for answer in answers if "error" in answer}:
            raise LabError(f"{pod}: {url}: {'; '.join(errors)}")
        return {f"{answer['cluster']}/{answer['host']}" for answer in answers}

    def everybody(self) -> set[str]:
        machines = {f"{self.estate.lab.hosts[name].cluster}/{name}" for name in self.estate.backends}
        return machines | {f"kube/web-{node}" for node in WORKERS}


@pytest.fixture(scope="module")
def hybrid(estate: Estate, kubernetes: Kubernetes) -> Iterator[Hybrid]:
    """The Kubernetes cluster in the running estate; out of it again in the end."""
    kubernetes.up()
    made = Hybrid(estate, kubernetes)
    kubernetes.kubectl("create", "namespace", NAMESPACE)
    estate.until(
        "pods can be made",
        lambda: not kubernetes.kubectl("get", "sa", "default", f"--namespace={NAMESPACE}", check=False).returncode,
    )
    pods = "".join(WEB.format(node=node, image=TOOLS_IMAGE) for node in WORKERS)
    pods += CLIENT.format(name="client", host_network="false", image=TOOLS_IMAGE)
    # Pods that are older than the agent: nobody starts them anew for it.
    kubernetes.apply(MANIFEST + pods)
    names = (*(f"web-{node}" for node in WORKERS), "client")
    estate.until("pods are ready", lambda: all(made.ready(name) for name in names))
    play("site", inventory=HYBRID)
    estate.until("all of the service's backends are known", lambda: estate.used(EDGE) >= set(WORKERS))
    yield made
    play("site", "-e", "isthmus_prune=cluster/kube")


def test_a_second_run_changes_nothing(hybrid: Hybrid) -> None:
    run = play("site", inventory=HYBRID)
    assert run.changed == {}


def test_a_pod_reaches_a_workload_of_a_machine_and_is_seen_by_its_own_address(hybrid: Hybrid) -> None:
    address = hybrid.estate.address("onprem-1", "web")
    (answer,) = hybrid.fetch("client", f"http://{address}:8080/")
    assert (answer.get("host"), answer.get("peer")) == ("onprem-1", hybrid.address("client"))


def test_a_machine_reaches_a_pod_and_is_seen_by_its_workloads_address(hybrid: Hybrid) -> None:
    for node in WORKERS:
        result = hybrid.estate.edge.requests(f"http://{hybrid.address(f'web-{node}')}:8080/", 5)
        assert result["answers"] == {f"kube/web-{node}": 5}, result
        assert list(result["peers"]) == [hybrid.estate.address(EDGE, "client")]


def test_pods_of_both_nodes_and_machines_answer_a_pod_by_the_clusters_own_dns(hybrid: Hybrid) -> None:
    assert hybrid.servers("client", SERVICE_URL, 100) == hybrid.everybody()


def test_pods_and_machines_answer_a_machine_by_the_meshs_name(hybrid: Hybrid) -> None:
    result = hybrid.estate.edge.requests(URL, 200)
    assert result["ok"] == 200
    assert set(result["answers"]) == hybrid.everybody()


def test_pods_and_a_node_port_lead_to_a_service_of_machines(hybrid: Hybrid) -> None:
    """By a name of the cluster's own DNS, and from outside through kube-proxy, which knows nothing of the mesh."""
    estate, kube = hybrid.estate, hybrid.kube
    places = ",".join([*(hosts[0] for hosts in ETCD_HOSTS.values()), "kube-1"])
    legacy = {"namespace": NAMESPACE, "name": "legacy"}
    ports = [{"name": "http", "port": 80, "target_port": 8080}]
    given = {**legacy, "ports": ports, "backends": {"labels": {"app": "web"}}, "kubernetes": True}
    where = ("service", "legacy", f"--namespace={NAMESPACE}")
    machines = hybrid.everybody() - {f"kube/web-{node}" for node in WORKERS}
    url = "http://legacy.shop.svc.cluster.local/"
    try:
        estate.module(places, "global_service", given, HYBRID)
        estate.until("it is a Service", lambda: not kube.kubectl("get", *where, check=False).returncode)
        estate.until("machines answer pods", lambda: hybrid.servers("client", url) == machines)
        kube.kubectl("patch", *where, "--patch", json.dumps({"spec": {"type": "NodePort"}}))
        port = kube.get(*where)["spec"]["ports"][0]["nodePort"]
        outside = f"http://{kube.lab.hosts['kube-2'].address}:{port}/"
        estate.until("machines answer", lambda: set(estate.edge.requests(outside, 60)["answers"]) == machines)
        result = estate.edge.requests(outside, 60)
        assert result["ok"] == 60, result
    finally:
        estate.module(places, "global_service", {**legacy, "state": "absent"}, HYBRID)
    estate.until("the Service is gone", lambda: bool(kube.kubectl("get", *where, check=False).returncode))
    slices = kube.get("endpointslices", f"--namespace={NAMESPACE}", "-l", "kubernetes.io/service-name=legacy")
    assert slices["items"] == []


def test_a_pod_that_is_not_ready_is_no_backend_anywhere(hybrid: Hybrid) -> None:
    estate, victim = hybrid.estate, "web-kube-3"
    sick = "open('/run/web.sick', 'w')"
    well = "import os; os.unlink('/run/web.sick')"
    with estate.undone(lambda: hybrid.kube.exec(victim, ["python3", "-c", well], namespace=NAMESPACE)):
        hybrid.kube.exec(victim, ["python3", "-c", sick], namespace=NAMESPACE)
        estate.until(f"{victim} is not used by {EDGE}", lambda: "kube-3" not in estate.used(EDGE))
        estate.until("nor by pods", lambda: f"kube/{victim}" not in hybrid.servers("client", SERVICE_URL))
    estate.until(f"{victim} is used again", lambda: "kube-3" in estate.used(EDGE))


def test_the_api_server_may_vanish(hybrid: Hybrid) -> None:
    """New connections both ways, changes of others, and no flap when it is back."""
    estate, lab = hybrid.estate, hybrid.estate.lab
    pod = hybrid.address("web-kube-2")
    before = estate.state(EDGE)
    with estate.undone(lambda: hybrid.kube.lab.exec("kube-1", ["systemctl", "start", "kube-apiserver"])):
        hybrid.kube.lab.exec("kube-1", ["systemctl", "stop", "kube-apiserver"])
        result = estate.edge.requests(f"http://{pod}:8080/", 20)
        assert result["ok"] == 20, result
        with estate.undone(lambda: lab.exec("cloud-2", ["systemctl", "start", "web.service"])):
            lab.exec("cloud-2", ["systemctl", "stop", "web.service"])
            estate.until("the node hears of it", lambda: not node_knows(hybrid, "cloud-2"))
        estate.until("the node hears of it", lambda: node_knows(hybrid, "cloud-2"))
        kept = [key for key in before if "/kube/" in key]
        assert kept
        assert [key for key in kept if estate.state(EDGE).get(key) != before[key]] == []
    estate.until("the API is back", lambda: hybrid.kube.api_ready())
    began = time.monotonic()
    while time.monotonic() - began < 5:  # a flap would be seen by its new create revision
        now = estate.state(EDGE)
        assert [key for key in kept if now.get(key) != before[key]] == []
    assert hybrid.servers("client", SERVICE_URL, 100) == hybrid.everybody()


def node_knows(hybrid: Hybrid, backend: str) -> bool:
    """Whether a Kubernetes node gives new flows of the service to this machine."""
    answer = json.loads(hybrid.kube.lab.exec("kube-2", ["isthmus", "services", "-o", "json"]).stdout)
    (service,) = (each for each in answer["services"] if (each["namespace"], each["name"]) == ("shop", "web"))
    return backend in {each["node"] for each in service["backends"] if each["used"] and each["reachable"]}
