# SPDX-License-Identifier: GPL-3.0-or-later
"""A Kubernetes cluster whose nodes nobody enters joins the running estate: everything of the mesh runs inside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from demo import EDGE
from estate_tools import Estate
from isthmus_lab import Lab
from kubernetes_lab import IN_CLUSTER, Kubernetes
from kubernetes_machine import TOOLS_IMAGE
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

MESH = "isthmus-system"
NODES = ("managed-1", "managed-2")
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: web-{node}, namespace: default, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
    - name: web
      image: {image}
      imagePullPolicy: Never
      command: [/usr/local/lib/demo/http_server, web]
      env: [{{name: CLUSTER, value: managed}}, {{name: PORT, value: "8080"}}]
      readinessProbe: {{httpGet: {{path: /healthz, port: 8080}}, periodSeconds: 1, failureThreshold: 1}}
"""
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


def ours(kube: Kubernetes) -> list[str]:
    """What the mesh has in the cluster."""
    kinds = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,namespaces"
    found = kube.kubectl("get", kinds, "-A", "-l", "app.kubernetes.io/managed-by=isthmus", "--output=name")
    return found.stdout.split()


@pytest.fixture(scope="module")
def managed(estate: Estate) -> Iterator[Kubernetes]:
    """The cluster in the running estate; out of it again in the end."""
    kube = Kubernetes(Lab(IN_CLUSTER), "managed")
    try:
        kube.up()
        kube.apply("".join(POD.format(node=node, image=TOOLS_IMAGE) for node in NODES))
        play("site", inventory=IN_CLUSTER)
        yield kube
        play("site", "-e", "isthmus_prune=cluster/managed")
    finally:
        kube.down()


def address(kube: Kubernetes, node: str) -> str:
    return str(kube.get("pod", f"web-{node}")["status"]["podIP"])


def test_a_second_run_changes_nothing(managed: Kubernetes) -> None:
    assert play("site", inventory=IN_CLUSTER).changed == {}


def test_pods_and_machines_reach_each_other_by_their_own_addresses(estate: Estate, managed: Kubernetes) -> None:
    server = estate.address("onprem-1", "web")
    for node in NODES:
        pod = address(managed, node)
        estate.until(
            f"{EDGE} reaches the pod on {node}",
            lambda pod=pod, node=node: (
                estate.edge.requests(f"http://{pod}:8080/", 5)["answers"] == {f"managed/web-{node}": 5}
            ),
        )
        answer: dict[str, Any] = json.loads(
            managed.exec(f"web-{node}", ["python3", "-c", FETCH, f"http://{server}:8080/"])
        )
        assert (answer["host"], answer["peer"]) == ("onprem-1", pod)


def test_peers_reach_its_etcd_by_the_load_balancer(estate: Estate, managed: Kubernetes) -> None:
    service = managed.get("service", "isthmus-etcd-mesh", f"--namespace={MESH}")
    (ingress,) = service["status"]["loadBalancer"]["ingress"]
    (peer,) = (one for one in estate.ask("cloud-1", "peers")["peers"] if one["name"] == "managed")
    assert peer["endpoint"] == f"https://{ingress['ip']}:2379"


def test_no_private_key_is_where_it_can_be_read(managed: Kubernetes) -> None:
    for kind in ("configmaps", "events", "pods", "jobs"):
        assert "PRIVATE KEY" not in managed.kubectl("get", kind, f"--namespace={MESH}", "--output=json").stdout


def test_an_agent_that_dies_leaves_the_datapath(estate: Estate, managed: Kubernetes) -> None:
    pod = address(managed, "managed-2")
    with estate.unnoticed(estate.edge, url=f"http://{pod}:8080/"):
        managed.kubectl("delete", "pod", f"--namespace={MESH}", "-l", "isthmus.io/component=agent")
        managed.kubectl("rollout", "status", "daemonset/isthmus-agent", f"--namespace={MESH}", "--timeout=120s")


def test_teardown_leaves_nothing(managed: Kubernetes) -> None:
    before = {node: managed.lab.exec(node, ["ip", "-brief", "link"]).stdout for node in NODES}
    assert all("isthmus0" in text for text in before.values())
    play("teardown", "-e", "isthmus_confirm_teardown=lab", "--limit", "managed", inventory=IN_CLUSTER)
    assert ours(managed) == []
    for node in NODES:
        assert "isthmus" not in managed.lab.exec(node, ["ip", "-brief", "link"]).stdout
        assert "isthmus" not in managed.lab.exec(node, ["ls", "/sys/fs/bpf", "/var/lib", "/run"]).stdout
