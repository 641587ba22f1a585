# SPDX-License-Identifier: GPL-3.0-or-later
"""The estate with Kubernetes clusters in it, as the end-to-end tests use it."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import demo_pods
from demo import EDGE
from demo_hybrid import NAMESPACE, SERVICE_URL, HybridStory
from estate_tools import ETCD_HOSTS, Estate, served
from isthmus_lab import Customer
from kubernetes_lab import HYBRID, Kubernetes, PodCustomer
from playbook import play

MACHINE = "onprem-1"  # whose web server pods ask
HOST_CLIENT = "client-host"  # a customer in a pod on its node's network
MANY = "many"  # a Deployment of web servers, without any at first
LOAD = 100  # requests a second and customer, at least, new and kept connections together
OFFERED = 2 * LOAD  # requests a second and customer that are tried
TOGETHER = 3  # of each kind and customer at the same time: who waits for an answer asks nothing meanwhile
OLDER = 20  # requests over a connection that is older than the mesh, at least, once the mesh is there
NODE_IS_DOWN = 3  # seconds until a node that is off gets no new flows: three probes, one a second, miss


class Hybrid(HybridStory):
    """The estate with its Kubernetes cluster, and an operator's tools for every host of both."""

    def __init__(self, kube: Kubernetes) -> None:
        super().__init__(kube.lab, kube, print)
        self.estate = Estate(kube.lab)
        self.host_client = PodCustomer(kube, HOST_CLIENT, NAMESPACE)
        self.older: dict[str, Any] = {}
        """What came of a pod's connection to `MACHINE`'s own address that is older than the mesh on its node; empty
        when the nodes had been in the mesh before."""

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

    def underlay_url(self) -> str:
        """A machine's web server by the machine's own address, which everybody reaches without the mesh too."""
        return f"http://{self.lab.hosts[MACHINE].address}:8080/"

    def are_new(self) -> bool:
        """Whether no node has anything of the mesh."""
        look = ["test", "-e", "/etc/isthmus"]
        return all(self.lab.exec(node, look, check=False).returncode != 0 for node in self.nodes)

    @contextlib.contextmanager
    def customer_on(self, node: str, name: str) -> Iterator[PodCustomer]:
        """A customer in a pod of its own, which is in the mesh."""
        delete = ("delete", "pod", name, f"--namespace={NAMESPACE}", "--ignore-not-found", "--now")
        with self.undone(lambda: self.kube.kubectl(*delete)):
            self.kube.apply(demo_pods.client(name, node))
            self.until(f"the customer {name} runs", lambda: self.ready(name), 120)
            customer = PodCustomer(self.kube, name, NAMESPACE)
            machine = f"http://{self.estate.address(MACHINE, 'web')}:8080/"
            self.until(f"{name} reaches {MACHINE}", lambda: not customer.requests(machine, 1)["failed"])
            yield customer

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
        """Each customer makes requests over new connections and over kept ones all the while, half and half, together
        at least `LOAD` a second: two processors that carry the whole estate have not more for three customers. None
        may fail; a kept connection may be closed by its server between two requests."""
        name = f"load-{uuid.uuid4().hex[:6]}"
        jobs = [
            (customer, kind, f"{name}-{kind}-{number}")
            for customer in customers
            for kind in ("new", "kept")
            for number in range(TOGETHER)
        ]
        for customer, kind, job in jobs:
            address = (
                self.service_address if isinstance(customer, PodCustomer) else self.service(customer.host)["address"]
            )
            customer.start(
                job, f"http://{address}/", interval=2 * TOGETHER / OFFERED, timeout=5.0, keep_alive=kind == "kept"
            )
        try:
            yield
        finally:
            results = {(customer.host, kind, job): customer.result(job, stop=True) for customer, kind, job in jobs}
        rates: dict[str, float] = dict.fromkeys((customer.host for customer in customers), 0.0)
        for customer in customers:
            for kind in ("new", "kept"):
                found = [result for (host, what, _), result in results.items() if (host, what) == (customer.host, kind)]
                rate = sum(result["ok"] / result["seconds"] for result in found)
                rates[customer.host] += rate
                gap = max(result["longest_gap"] for result in found)
                print(f"{customer.host} {kind}: {rate:.0f}/s, longest gap {gap:.2f} s")
        failed = {who: (r["failed"], r["failures"], r["changes"][-4:]) for who, r in results.items() if r["failed"]}
        assert not failed, failed
        assert min(rates.values()) >= LOAD, rates


@contextlib.contextmanager
def joined(kubernetes: Kubernetes) -> Iterator[Hybrid]:
    """The cluster in the running estate, whose machines do not notice; out of it again in the end."""
    kubernetes.up()
    made = Hybrid(kubernetes)
    made.make_pods()
    made.make_more_pods()
    are_new = made.are_new()
    if are_new:
        made.client.start("older", made.underlay_url(), interval=0.05, keep_alive=True)
        made.until("it is answered", lambda: made.client.result("older")["ok"] > 0)
    told = list(made.it_joins(lambda: play("site", inventory=HYBRID)))
    if are_new:
        done = served(made.client.result("older")) + OLDER
        made.until("the older connection is used on", lambda: served(made.client.result("older")) >= done)
        made.older = made.client.result("older", stop=True)
    assert [finding.measured for finding in told if not finding.true] == []
    yield made
    play("site", "-e", f"isthmus_prune=cluster/{kubernetes.name}")


def tell(hybrid: HybridStory, step: str) -> None:
    """Tell one step of the story; every sentence is true."""
    findings = list(getattr(hybrid, step)())
    assert findings
    wrong = [f"{finding.sentence}: {finding.measured}" for finding in findings if not finding.true]
    assert not wrong, wrong


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


def a_deployment_scales_under_load(hybrid: Hybrid) -> None:
    """0 -> 20 -> 0 pods, which every host uses and forgets; no request fails."""
    hosts = (EDGE, *hybrid.nodes)
    before = hybrid.backends_of(EDGE)
    with hybrid.under_load([hybrid.client, hybrid.host_client, hybrid.edge]):
        hybrid.scale(20)
        hybrid.until(
            "every host uses all of them",
            lambda: {len(hybrid.backends_of(host)) for host in hosts} == {len(before) + 20},
        )
        hybrid.scale(0)
        hybrid.until("no host uses any", lambda: all(hybrid.backends_of(host) == before for host in hosts))


def a_node_is_drained_under_load(hybrid: Hybrid) -> None:
    """The last node, with `kubectl drain`; no request fails. Its pods are back afterwards."""
    victim = hybrid.nodes[-1]

    def back() -> None:
        hybrid.kube.kubectl("uncordon", victim)
        hybrid.make_pods()
        hybrid.scale(0)

    with hybrid.undone(back):
        hybrid.scale(4)
        with hybrid.under_load([hybrid.client, hybrid.host_client, hybrid.edge]):
            hybrid.kube.kubectl("drain", victim, "--ignore-daemonsets", "--force", "--timeout=120s")
            hybrid.until(
                "nobody uses a pod there",
                lambda: all(victim not in hybrid.used(host) for host in (EDGE, *hybrid.nodes)),
            )
            hybrid.scale(4)
    hybrid.everywhere(hybrid.members)


# iptables of the lab's nodes is that of nf_tables, and has the CNI's rules whatever kube-proxy's mode is. The other
# tables in nf_tables are nobody's business there.
RELOAD = """\
set -e
iptables-save > /run/rules
grep -q MASQUERADE /run/rules
iptables-restore < /run/rules
if nft list table ip kube-proxy > /run/rules 2> /dev/null; then
    { echo 'delete table ip kube-proxy'; cat /run/rules; } | nft -f -
fi
rm /run/rules
"""


def others_on_nodes_restart_under_load(hybrid: Hybrid) -> None:
    """kube-proxy, containerd and the kubelet of each node in turn, and all their rules are written anew. No request
    fails, and afterwards pods that were there and pods that are made then are seen by their own addresses."""
    for node in hybrid.nodes:
        with hybrid.customer_on(node, f"before-{node}") as before:
            with hybrid.under_load([before, hybrid.host_client, hybrid.edge]):
                for unit in ("kube-proxy", "containerd", "kubelet"):
                    hybrid.lab.exec(node, ["systemctl", "restart", f"{unit}.service"])
                hybrid.until(f"pods on {node} can be entered", lambda before=before: works(before), 120)  # type: ignore[misc]
                hybrid.lab.exec(node, ["sh", "-c", RELOAD])
                hybrid.until("its rules work", lambda before=before: works(before))  # type: ignore[misc]
                hybrid.everywhere(hybrid.members, (EDGE, *hybrid.nodes))
            with hybrid.customer_on(node, f"after-{node}") as after:
                for customer in (before, after):
                    seen_by_its_own_address(hybrid, customer, node)


def works(customer: PodCustomer) -> bool:
    """Whether the pod can be entered, and a name of its cluster's DNS answers it, which is kube-proxy's to serve."""
    return not customer.requests(SERVICE_URL, 10)["failed"]


def seen_by_its_own_address(hybrid: Hybrid, customer: PodCustomer, node: str) -> None:
    """By a machine and by a pod of another node, and it sees the machine that asks."""
    own = hybrid.pod_address(customer.host)
    other = next(each for each in hybrid.nodes if each != node)
    servers = {
        f"onprem/{MACHINE}": hybrid.estate.address(MACHINE, "web"),
        f"{hybrid.kube.name}/web-{other}": hybrid.pod_address(f"web-{other}"),
    }
    for server, address in servers.items():
        url = f"http://{address}:8080/"
        # A pod is published to each host by itself.
        hybrid.until(f"{server} answers", lambda url=url: not customer.requests(url, 1)["failed"])  # type: ignore[misc]
        result = customer.requests(url, 50)
        assert (result["answers"], set(result["peers"])) == ({server: 50}, {own}), result
    result = hybrid.edge.requests(f"http://{hybrid.pod_address(f'web-{node}')}:8080/", 50)
    seen = (result["answers"], set(result["peers"]))
    assert seen == ({f"{hybrid.kube.name}/web-{node}": 50}, {hybrid.estate.address(EDGE, "client")}), result
