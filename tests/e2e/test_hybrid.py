# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Kubernetes cluster joins the running estate: pods and machines are one network.

The cluster's nodes have kubelet, containerd, the bridge CNI with `ipMasq: true` and kube-proxy; the demo's service
`shop/web` is there as a Service of pods that is annotated global. The story of the demo's second part is told sentence
by sentence, then what a demo has no room for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from demo import EDGE
from demo_hybrid import NAMESPACE, HybridStory
from estate_tools import ETCD_HOSTS, Estate
from kubernetes_lab import HYBRID, Kubernetes
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab]


class Hybrid(HybridStory):
    """The estate with its Kubernetes cluster, and an operator's tools for every host of both."""

    def __init__(self, kube: Kubernetes) -> None:
        super().__init__(kube.lab, kube, print)
        self.estate = Estate(kube.lab)


@pytest.fixture(scope="module")
def hybrid(estate: Estate, kubernetes: Kubernetes) -> Iterator[Hybrid]:
    """The Kubernetes cluster in the running estate; out of it again in the end."""
    kubernetes.up()
    made = Hybrid(kubernetes)
    made.make_pods()
    told = list(made.it_joins(lambda: play("site", inventory=HYBRID)))
    assert [finding.measured for finding in told if not finding.true] == []
    yield made
    play("site", "-e", "isthmus_prune=cluster/kube")


def test_a_second_run_changes_nothing(hybrid: Hybrid) -> None:
    run = play("site", inventory=HYBRID)
    assert run.changed == {}


@pytest.mark.parametrize("step", HybridStory.STEPS)
def test_story(hybrid: Hybrid, step: str) -> None:
    findings = list(getattr(hybrid, step)())
    assert findings
    assert [f"{finding.sentence}: {finding.measured}" for finding in findings if not finding.true] == []


def test_pods_and_a_node_port_lead_to_a_service_of_machines(hybrid: Hybrid) -> None:
    """By a name of the cluster's own DNS, and from outside through kube-proxy, which knows nothing of the mesh."""
    estate, kube = hybrid.estate, hybrid.kube
    places = ",".join([*(hosts[0] for hosts in ETCD_HOSTS.values()), "kube-1"])
    legacy = {"namespace": NAMESPACE, "name": "legacy"}
    ports = [{"name": "http", "port": 80, "target_port": 8080}]
    given = {**legacy, "ports": ports, "backends": {"labels": {"app": "web"}}, "kubernetes": True}
    where = ("service", "legacy", f"--namespace={NAMESPACE}")
    machines = {name for name in hybrid.servers if not name.startswith("kube/")}
    url = "http://legacy.shop.svc.cluster.local/"

    def answer(result: dict[str, object]) -> bool:
        return result["failed"] == 0 and set(result["answers"]) == machines  # type: ignore[call-overload]

    try:
        estate.module(places, "global_service", given, HYBRID)
        estate.until("it is a Service", lambda: not kube.kubectl("get", *where, check=False).returncode)
        estate.until("machines answer pods", lambda: answer(hybrid.client.requests(url, 40)))
        kube.kubectl("patch", *where, "--patch", json.dumps({"spec": {"type": "NodePort"}}))
        port = kube.get(*where)["spec"]["ports"][0]["nodePort"]
        outside = f"http://{kube.lab.hosts['kube-2'].address}:{port}/"
        estate.until("machines answer", lambda: answer(estate.edge.requests(outside, 60)))
    finally:
        estate.module(places, "global_service", {**legacy, "state": "absent"}, HYBRID)
    estate.until("the Service is gone", lambda: bool(kube.kubectl("get", *where, check=False).returncode))
    slices = kube.get("endpointslices", f"--namespace={NAMESPACE}", "-l", "kubernetes.io/service-name=legacy")
    assert slices["items"] == []


def test_no_key_of_pods_comes_or_goes_with_the_api_server(hybrid: Hybrid) -> None:
    """What peers mirror of the cluster stays as it is; a flap would be seen by its new create revision."""
    estate = hybrid.estate
    kept = {key: value for key, value in estate.state(EDGE).items() if "/kube/" in key}
    assert kept

    def differing() -> list[str]:
        now = estate.state(EDGE)
        return [key for key, value in kept.items() if now.get(key) != value]

    with estate.undone(lambda: hybrid.kube.lab.exec("kube-1", ["systemctl", "start", "kube-apiserver"])):
        hybrid.kube.lab.exec("kube-1", ["systemctl", "stop", "kube-apiserver"])
        before = estate.registrar_leader("kube-1")
        hybrid.kube.lab.exec("kube-1", ["systemctl", "restart", "isthmus-registrar.service"])
        estate.until(
            "a registrar leads that never heard the API server",
            lambda: estate.registrar_leader("kube-1") not in (before, ("", 0)),
        )
        assert differing() == []
    estate.until("the API is back", hybrid.kube.api_ready)
    began = time.monotonic()
    while time.monotonic() - began < 5:
        assert differing() == []
