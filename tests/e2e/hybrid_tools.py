# SPDX-License-Identifier: GPL-3.0-or-later
"""The estate with Kubernetes clusters in it, as the end-to-end tests use it."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Sequence

import demo_pods
from demo_hybrid import NAMESPACE, HybridStory
from estate_tools import ETCD_HOSTS, Estate
from isthmus_lab import Customer
from kubernetes_lab import HYBRID, Kubernetes, PodCustomer
from playbook import play

HOST_CLIENT = "client-host"  # a customer in a pod on its node's network
MANY = "many"  # a Deployment of web servers, without any at first
LOAD = 100  # requests a second and customer, at least
NODE_IS_DOWN = 3  # seconds until a node that is off gets no new flows: three probes, one a second, miss


class Hybrid(HybridStory):
    """The estate with its Kubernetes cluster, and an operator's tools for every host of both."""

    def __init__(self, kube: Kubernetes) -> None:
        super().__init__(kube.lab, kube, print)
        self.estate = Estate(kube.lab)
        self.host_client = PodCustomer(kube, HOST_CLIENT, NAMESPACE)

    def make_more_pods(self) -> None:
        """What the demo has no use for: a customer on the first node's network, and the empty Deployment."""
        self.kube.apply(demo_pods.client(HOST_CLIENT, self.nodes[0], host_network=True))
        self.kube.apply(demo_pods.deployment(MANY, self.kube.name))
        self.until("the customer runs", lambda: self.ready(HOST_CLIENT))

    @contextlib.contextmanager
    def without_api_server(self) -> Iterator[None]:
        server = self.kube.cluster.control_plane.name
        with self.undone(lambda: self.lab.exec(server, ["systemctl", "start", "kube-apiserver"])):
            self.estate.kill_for_good(server, "kube-apiserver")
            yield
        self.until("the API server is back", self.kube.api_ready)

    def scale(self, replicas: int) -> None:
        """The Deployment has so many pods, all ready, and no other."""
        self.kube.kubectl("scale", f"deployment/{MANY}", f"--namespace={NAMESPACE}", f"--replicas={replicas}")
        chosen = ("pods", f"--namespace={NAMESPACE}", f"--selector=set={MANY}")

        def as_wanted() -> bool:
            conditions = [pod["status"].get("conditions", ()) for pod in self.kube.get(*chosen)["items"]]
            ready = [any(c["type"] == "Ready" and c["status"] == "True" for c in each) for each in conditions]
            return ready == [True] * replicas

        self.until(f"{replicas} pods are ready, and there is no other", as_wanted, 180)

    def backends_of(self, host: str) -> set[str]:
        """Addresses of the backends that get new flows of `shop/web` from a host."""
        return {b["address"] for b in self.service(host)["backends"] if b["used"] and b["reachable"]}

    @property
    def service_address(self) -> str:
        """The ClusterIP of `shop/web`: customers in pods that use it need no DNS."""
        return str(self.kube.get("service", "web", f"--namespace={NAMESPACE}")["spec"]["clusterIP"])

    @contextlib.contextmanager
    def under_load(self, customers: Sequence[Customer]) -> Iterator[None]:
        """Each customer makes requests over new connections and over kept ones all the while, together at least `LOAD`
        a second. None may fail; a kept connection may be closed by its server between two requests."""
        name = f"load-{uuid.uuid4().hex[:6]}"
        url = f"http://{self.service_address}/"
        for customer in customers:
            for kind in ("new", "kept"):
                where = (
                    url if isinstance(customer, PodCustomer) else f"http://{self.service(customer.host)['address']}/"
                )
                customer.start(f"{name}-{kind}", where, interval=0.012, timeout=5.0, keep_alive=kind == "kept")
        try:
            yield
        finally:
            results = {
                (customer.host, kind): customer.result(f"{name}-{kind}", stop=True)
                for customer in customers
                for kind in ("new", "kept")
            }
        for who, result in results.items():
            rate = result["ok"] / result["seconds"]
            print(f"{' '.join(who)}: {result['ok']} ok, {rate:.0f}/s, longest gap {result['longest_gap']:.2f} s")
        failed = {who: (r["failed"], r["errors"], r["changes"][-4:]) for who, r in results.items() if r["failed"]}
        assert not failed, failed
        rates = {
            c.host: sum(results[c.host, k]["ok"] / results[c.host, k]["seconds"] for k in ("new", "kept"))
            for c in customers
        }
        assert min(rates.values()) >= LOAD, rates


@contextlib.contextmanager
def joined(kubernetes: Kubernetes) -> Iterator[Hybrid]:
    """The cluster in the running estate, whose machines do not notice; out of it again in the end."""
    kubernetes.up()
    made = Hybrid(kubernetes)
    made.make_pods()
    made.make_more_pods()
    told = list(made.it_joins(lambda: play("site", inventory=HYBRID)))
    assert [finding.measured for finding in told if not finding.true] == []
    yield made
    play("site", "-e", f"isthmus_prune=cluster/{kubernetes.name}")


def tell(hybrid: HybridStory, step: str) -> None:
    """Tell one step of the story; every sentence is true."""
    findings = list(getattr(hybrid, step)())
    assert findings
    assert [f"{finding.sentence}: {finding.measured}" for finding in findings if not finding.true] == []


def machine_service_in_pods_and_at_a_node_port(hybrid: Hybrid) -> None:
    """By a name of the cluster's own DNS, and from outside through kube-proxy, which knows nothing of the mesh."""
    estate, kube = hybrid.estate, hybrid.kube
    places = ",".join([*(hosts[0] for hosts in ETCD_HOSTS.values()), "kube-1"])
    legacy = {"namespace": NAMESPACE, "name": "legacy"}
    ports = [{"name": "http", "port": 80, "target_port": 8080}]
    given = {**legacy, "ports": ports, "backends": {"labels": {"app": "web"}}, "kubernetes": True}
    where = ("service", "legacy", f"--namespace={NAMESPACE}")
    machines = {name for name in hybrid.servers if not name.startswith(f"{kube.name}/")}

    def all_answer(customer: Customer, url: str) -> bool:
        result = customer.requests(url, 60)
        return not result["failed"] and set(result["answers"]) == machines

    try:
        estate.module(places, "global_service", given, HYBRID)
        estate.until("it is a Service", lambda: not kube.kubectl("get", *where, check=False).returncode)
        inside = "http://legacy.shop.svc.cluster.local/"
        estate.until("machines answer pods", lambda: all_answer(hybrid.client, inside))
        kube.kubectl("patch", *where, "--patch", json.dumps({"spec": {"type": "NodePort"}}))
        port = kube.get(*where)["spec"]["ports"][0]["nodePort"]
        outside = f"http://{kube.cluster.nodes[hybrid.nodes[0]].address}:{port}/"
        estate.until("machines answer", lambda: all_answer(estate.edge, outside))
    finally:
        estate.module(places, "global_service", {**legacy, "state": "absent"}, HYBRID)
    estate.until("the Service is gone", lambda: bool(kube.kubectl("get", *where, check=False).returncode))
    slices = kube.get("endpointslices", f"--namespace={NAMESPACE}", "-l", "kubernetes.io/service-name=legacy")
    assert slices["items"] == []
