# SPDX-License-Identifier: GPL-3.0-or-later
"""The second part of the demo: a Kubernetes cluster joins the running estate, pods and machines are one network.

Run by `make demo` after the machines' story, with the command that makes the cluster a part of the estate as its
arguments; the cluster is up already, and nothing of the mesh is on it. `tests/e2e` asserts the same steps one by one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import demo_pods
from demo import EDGE, NAME, ONPREM_CLIENT, URL, Finding, Story, speaker, tell
from isthmus_lab import Lab, LabError
from kubernetes_lab import HYBRID, Kubernetes, PodCustomer

NAMESPACE = demo_pods.NAMESPACE
SERVICE_NAME = f"web.{NAMESPACE}.svc.cluster.local"  # as the cluster's own DNS has it
SERVICE_URL = f"http://{SERVICE_NAME}/"
CLIENT = "client"  # the pod that asks
OTHER = ("shop", "echo")  # a service that nobody asks here: its backends may come and go


class HybridStory(Story):
    """The steps with the cluster in the estate; each leaves all as it found it."""

    def __init__(self, lab: Lab, kube: Kubernetes, say: Callable[[str], None]) -> None:
        super().__init__(lab, say)
        self.kube = kube
        self.nodes = tuple(kube.cluster.nodes)  # each is named as its machine
        self.client = PodCustomer(kube, CLIENT, NAMESPACE)

    # -- looking

    def pod(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.kube.get("pod", name, f"--namespace={NAMESPACE}")
        return found

    def pod_address(self, name: str) -> str:
        return str(self.pod(name)["status"]["podIP"])

    def ready(self, name: str) -> bool:
        conditions = self.pod(name)["status"].get("conditions", ())
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def workload_address(self, host: str, name: str) -> str:
        return str(next(w["address"] for w in self.ask(host, "status")["workloads"] if w["name"] == name))

    @property
    def members(self) -> set[str]:
        """Every host that has a backend: machines and nodes."""
        return self.backends | set(self.nodes)

    @property
    def servers(self) -> set[str]:
        """Who answers, as cluster/host: machines and pods."""
        machines = {f"{self.lab.hosts[name].cluster}/{name}" for name in self.backends}
        return machines | {f"{self.kube.name}/web-{node}" for node in self.nodes}

    def shares(self, result: dict[str, Any]) -> str:
        """How many answers came from which cluster, in words."""
        by_cluster: dict[str, int] = {}
        for who, answers in sorted(result["answers"].items()):
            by_cluster[who.split("/")[0]] = by_cluster.get(who.split("/")[0], 0) + answers
        return ", ".join(f"{cluster} {count}" for cluster, count in by_cluster.items())

    # -- before the cluster joins

    def make_pods(self) -> None:
        """The demo's pods, ready: older than everything of the mesh on their nodes."""
        there = self.kube.kubectl("get", "namespace", NAMESPACE, check=False).returncode == 0
        if not there:
            self.kube.kubectl("create", "namespace", NAMESPACE)
        account = ("get", "serviceaccount", "default", f"--namespace={NAMESPACE}")
        self.until("pods can be made", lambda: self.kube.kubectl(*account, check=False).returncode == 0)
        self.kube.apply(demo_pods.web(self.kube.name, self.nodes) + demo_pods.client(CLIENT, self.nodes[0]))
        names = (*(f"web-{node}" for node in self.nodes), CLIENT)
        self.until("the pods are ready", lambda: all(self.ready(name) for name in names))

    # -- the sentences

    def it_joins(self, site: Callable[[], object]) -> Iterator[Finding]:
        """`site` makes the cluster a part of the estate."""
        runs = [(customer, kind) for customer in (self.edge, self.onprem) for kind in ("new", "kept")]
        for customer, kind in runs:
            customer.start(f"join-{kind}", URL, interval=0.02, keep_alive=kind == "kept")
        try:
            site()
            took = self.everywhere(self.members, (EDGE, ONPREM_CLIENT, *self.nodes))
        finally:
            results = [customer.result(f"join-{kind}", stop=True) for customer, kind in runs]
        self.say(f"every agent uses the pods {took:.1f} s after the playbook's end")
        yield self.nobody_noticed("a Kubernetes cluster joins the running estate: its machines never notice", results)

    def pods_reach_machines(self) -> Iterator[Finding]:
        host, count = "onprem-1", 200
        address = self.workload_address(host, "web")
        own = self.pod_address(CLIENT)
        self.say(f"a pod asks the workload web on {host}, {address}")
        result = self.client.requests(f"http://{address}:8080/", count)
        yield Finding(
            "a pod reaches a machine's workload, which sees the pod's own address",
            f"{result['ok']} of {count} answered; seen {', '.join(result['peers'])}, the pod has {own}",
            result["answers"] == {f"onprem/{host}": count} and set(result["peers"]) == {own},
        )

    def machines_reach_pods(self) -> Iterator[Finding]:
        count = 200
        own = self.workload_address(EDGE, "client")
        self.say(f"{EDGE} asks a pod on each node by its address")
        results = {
            node: self.edge.requests(f"http://{self.pod_address(f'web-{node}')}:8080/", count) for node in self.nodes
        }
        seen = {peer for result in results.values() for peer in result["peers"]}
        answered = ", ".join(f"{result['ok']} of {count} on {node}" for node, result in results.items())
        right = all(r["answers"] == {f"{self.kube.name}/web-{node}": count} for node, r in results.items())
        yield Finding(
            "a machine reaches pods on every node, and they see its workload's own address",
            f"{answered}; seen {', '.join(seen)}, the workload has {own}",
            right and seen == {own},
        )

    def one_service(self) -> Iterator[Finding]:
        count, node = 400, self.nodes[0]
        self.say(f"a pod asks {SERVICE_NAME}, {EDGE} asks {NAME}")
        before = self.connects(node)
        result = self.client.requests(SERVICE_URL, count)
        after = self.connects(node)
        yield Finding(
            "pods use plain cluster DNS: pods and machines of both clusters answer",
            f"{result['ok']} of {count} answered: {self.shares(result)}",
            result["ok"] == count and set(result["answers"]) == self.servers,
        )
        rise = {backend: after[backend] - before.get(backend, 0) for backend in after}
        answered = {who.split("/")[1].removeprefix("web-"): n for who, n in result["answers"].items()}
        yield Finding(
            "the node's kernel chose, at connect(), before kube-proxy: its counters rose by what each answered",
            ", ".join(f"{backend} +{n}" for backend, n in sorted(rise.items())),
            rise == {backend: answered.get(backend, 0) for backend in rise},
        )
        result = self.edge.requests(URL, count)
        yield Finding(
            "machines use the mesh's name: pods and machines answer",
            f"{result['ok']} of {count} answered: {self.shares(result)}",
            result["ok"] == count and set(result["answers"]) == self.servers,
        )

    def a_pod_is_not_ready(self) -> Iterator[Finding]:
        node = self.nodes[-1]
        victim, count = f"web-{node}", 300
        everywhere = (EDGE, ONPREM_CLIENT, *self.nodes)
        well = "import os; os.unlink('/run/web.sick')"
        with self.undone(lambda: self.kube.exec(victim, ["python3", "-c", well], NAMESPACE)):
            self.say(f"the readiness probe of the pod {victim} fails")
            self.kube.exec(victim, ["python3", "-c", "open('/run/web.sick', 'w')"], NAMESPACE)
            took = self.everywhere(self.members - {node}, everywhere)
            results = [self.edge.requests(URL, count), self.client.requests(SERVICE_URL, count)]
            used = sum(n for result in results for who, n in result["answers"].items() if who.endswith(victim))
            failed = sum(result["failed"] for result in results)
            yield Finding(
                "a pod that is not ready is no backend anywhere",
                f"out after {took:.1f} s; then it answered {used} of {2 * count}, {failed} failed",
                used == failed == 0,
            )
        took = self.everywhere(self.members, everywhere)
        yield Finding("it is ready again and used again", f"in after {took:.1f} s", True)

    def the_api_server_stops(self) -> Iterator[Finding]:
        server, unit = self.kube.cluster.control_plane.name, "kube-apiserver.service"
        changed, node = "cloud-1", self.nodes[0]
        runs = [(customer, kind) for customer in (self.client, self.edge) for kind in ("new", "kept")]
        for customer, kind in runs:
            url = SERVICE_URL if customer is self.client else URL
            customer.start(f"api-{kind}", url, interval=0.02, keep_alive=kind == "kept")
        self.say(f"the API server is stopped, requests of a pod and of {EDGE} go on")
        with self.undone(lambda: self.lab.exec(server, ["systemctl", "start", unit])):
            # An orderly end waits up to a minute for those who watch.
            self.lab.exec(server, ["sh", "-c", f"systemctl kill --signal=KILL {unit} && systemctl stop {unit}"])
            self.until("the API server is away", lambda: not self.kube.api_ready())
            began = time.monotonic()
            self.say(f"the service {'/'.join(OTHER)} loses its backend on {changed} meanwhile, and gets it back")
            with self.undone(lambda: self.lab.exec(changed, ["systemctl", "start", "echo.service"])):
                self.lab.exec(changed, ["systemctl", "stop", "echo.service"])
                out = self.until(f"{node} hears of it", lambda: changed not in self.used(node, OTHER))
            back = self.until(f"{node} hears of it", lambda: changed in self.used(node, OTHER))
            self.hold(4)
            away = time.monotonic() - began
        self.until("the API server is back", self.kube.api_ready)
        self.say(f"the API server is back after {away:.0f} s")
        looks = [self.used(host) for _ in self.looking(6) for host in (EDGE, node)]
        results = [customer.result(f"api-{kind}", stop=True) for customer, kind in runs]
        yield Finding(
            "the API server is gone: changes elsewhere still reach its nodes",
            f"a backend on {changed}: out after {out:.1f} s, in after {back:.1f} s",
            True,
        )
        sentence = f"it is gone for {away:.0f} s and returns: connections of pods and machines go on"
        yield self.nobody_noticed(sentence, results)
        whole = sum(look == self.members for look in looks)
        yield Finding(
            "nothing that pods offer is withdrawn when it returns",
            f"all {len(self.members)} backends in {whole} of {len(looks)} looks on {EDGE} and {node}",
            whole == len(looks) > 0,
        )

    def looking(self, seconds: float) -> Iterator[None]:
        """Again and again for this long."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            yield

    STEPS = (
        "pods_reach_machines",
        "machines_reach_pods",
        "one_service",
        "a_pod_is_not_ready",
        "the_api_server_stops",
    )


def main(site: Sequence[str]) -> int:
    say = speaker()
    lab = Lab(HYBRID)
    kube = Kubernetes(lab, next(iter(lab.kubernetes)))
    story = HybridStory(lab, kube, say)

    def run_site() -> None:
        say("+ " + " ".join(site))
        if subprocess.run(site, check=False).returncode != 0:
            raise LabError("the playbook failed; its last words are above")

    def findings() -> Iterator[Finding]:
        say("pods are made, a web server on each node and a customer; nothing of the mesh is on the nodes")
        story.make_pods()
        yield from story.it_joins(run_site)
        for step in HybridStory.STEPS:
            yield from getattr(story, step)()

    if not tell(findings(), say):
        return 1
    print(f"demo:   tests/lab/lab kubectl {kube.name} get pods --all-namespaces --output=wide")
    print(f"demo:   make lab-exec HOST={story.nodes[0]} CMD='isthmus services'     (a node)")
    print("demo:   make lab-down                                      (removes it without a trace)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
