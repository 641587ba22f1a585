# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's Kubernetes cluster is one: nodes, pods across nodes, ClusterIPs, DNS, a node that reboots."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from isthmus_lab import Lab, LabError
from kubernetes_lab import Kubernetes
from kubernetes_machine import PROXY_MODES, TOOLS_IMAGE

pytestmark = [pytest.mark.root, pytest.mark.lab]

NAMESPACE = "lab-test"
# Python's `urllib` in a pod: busybox' own wget does not work when it is linked statically.
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode(), end='')"
POD = """\
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: {image}
      imagePullPolicy: Never
      command: [/usr/local/lib/demo/http_server, web]
      env: [{{name: CLUSTER, value: {cluster}}}, {{name: PORT, value: "8080"}}]
      readinessProbe: {{httpGet: {{path: /healthz, port: 8080}}, periodSeconds: 1}}
---
"""
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: {namespace}}}
spec:
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: 8080}}]
"""


def eventually(what: str, seconds: float, true: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def fetch(kube: Kubernetes, pod: str, url: str) -> str:
    """What a pod gets from a URL; "" when it gets nothing."""
    try:
        return kube.exec(pod, ["python3", "-c", FETCH, url], namespace=NAMESPACE)
    except LabError:
        return ""


def pods(kube: Kubernetes) -> dict[str, str]:
    """Addresses of the test's pods that are ready."""
    found = {}
    for pod in kube.get("pods", f"--namespace={NAMESPACE}")["items"]:
        ready = {c["type"] for c in pod["status"].get("conditions", ()) if c["status"] == "True"}
        if "Ready" in ready:
            found[pod["metadata"]["name"]] = pod["status"]["podIP"]
    return found


@pytest.fixture(scope="module")
def web(kube: Kubernetes) -> Iterator[Kubernetes]:
    """A web server in a pod on each node, named as the node is, behind a Service."""
    kube.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    kube.kubectl("create", "namespace", NAMESPACE)
    wait = f"--namespace={NAMESPACE}"
    eventually("pods can be made", 30, lambda: not kube.kubectl("get", "sa", "default", wait, check=False).returncode)
    values = {"namespace": NAMESPACE, "image": TOOLS_IMAGE, "cluster": kube.name}
    kube.apply("".join(POD.format(name=node, node=node, **values) for node in kube.cluster.nodes))
    kube.apply(SERVICE.format(**values))
    eventually("a pod on each node is ready", 60, lambda: pods(kube).keys() == kube.cluster.nodes.keys())
    yield kube
    kube.kubectl("delete", "namespace", NAMESPACE)


def test_every_node_is_ready_and_has_its_range(kube: Kubernetes) -> None:
    nodes = {node["metadata"]["name"]: node for node in kube.get("nodes")["items"]}
    assert kube.ready_nodes() == nodes.keys() == {"kube-2", "kube-3"}
    ranges = {name: node["spec"]["podCIDR"] for name, node in nodes.items()}
    assert ranges == {name: str(network) for name, network in kube.cluster.pod_ranges().items()}


def test_pods_reach_each_other_on_their_node_and_across_nodes(web: Kubernetes) -> None:
    for source in web.cluster.nodes:
        for target, address in pods(web).items():
            answer = json.loads(fetch(web, source, f"http://{address}:8080/") or "{}")
            assert (answer.get("host"), answer.get("cluster")) == (target, "kube"), (source, target)


def all_answer(kube: Kubernetes, source: str, url: str) -> bool:
    """Whether every backend of the Service answers a pod at the URL in the end."""
    seen: set[str] = set()
    for _ in range(40):
        seen.add(json.loads(fetch(kube, source, url) or "{}").get("host", ""))
        if seen >= kube.cluster.nodes.keys():
            return True
    return False


@pytest.mark.parametrize("mode", [*reversed(PROXY_MODES)])
def test_a_cluster_ip_reaches_pods_of_all_nodes_by_name(web: Kubernetes, mode: str) -> None:
    web.set_proxy_mode(mode)
    for source in web.cluster.nodes:
        eventually(
            f"the Service answers {source} in mode {mode}",
            30,
            lambda source=source: all_answer(web, source, f"http://web.{NAMESPACE}.svc.cluster.local/"),
        )
    rules = {"nftables": ["nft", "list", "table", "ip", "kube-proxy"], "iptables": ["iptables", "-t", "nat", "-S"]}
    other = next(name for name in PROXY_MODES if name != mode)
    for host in web.cluster.nodes.values():
        assert NAMESPACE in web.lab.exec(host.name, rules[mode]).stdout
        assert NAMESPACE not in web.lab.exec(host.name, rules[other], check=False).stdout


def test_a_node_that_reboots_comes_back_with_its_pods(web: Kubernetes) -> None:
    before = pods(web)
    web.lab.reboot("kube-3", hard=True)
    eventually("kube-3 is Ready", 60, lambda: web.ready_nodes() == {*web.cluster.nodes})
    # The pod is the same object, its sandbox a new one; whether the address is the same is the CNI's affair.
    eventually(
        "the pod on kube-3 answers",
        60,
        lambda: (
            json.loads(fetch(web, "kube-2", f"http://{pods(web).get('kube-3')}:8080/") or "{}").get("host") == "kube-3"
        ),
    )
    eventually("the Service answers again", 60, lambda: all_answer(web, "kube-2", f"http://web.{NAMESPACE}/"))
    assert pods(web)["kube-2"] == before["kube-2"]


def test_the_machines_are_not_touched(kube: Kubernetes, lab: Lab) -> None:
    """`lab up` knows nothing of the cluster, and finds its own machines."""
    assert not {*lab.hosts} & {host.name for host in kube.hosts}
    assert all(lab.running(host) for host in lab.hosts.values())
    assert all(kube.lab.running(host) for host in kube.hosts)
