# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Kubernetes cluster joins the running estate: pods and machines are one network.

The cluster's nodes have kubelet, containerd, the bridge CNI with `ipMasq: true` and kube-proxy; the demo's service
`shop/web` is there as a Service of pods that is annotated global. The story of the demo's second part is told sentence
by sentence, then what a demo has no room for. What is long is in `test_hybrid_long.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import demo_pods
import pytest
from demo import EDGE
from demo_hybrid import CLIENT, NAMESPACE, SERVICE_URL, HybridStory
from estate_tools import Estate
from hybrid_tools import NODE_IS_DOWN, Hybrid, joined, machine_service_in_pods_and_at_a_node_port, tell
from isthmus_lab import Lab
from kubernetes_lab import EVERY_CLUSTER, HYBRID, Kubernetes, PodCustomer
from kubernetes_machine import TOOLS_IMAGE
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Answers whatever a redirect leads to it, as the address to which it was on its way.
SIDECAR = """
import json, http.server, socket, struct
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        told = self.connection.getsockopt(socket.SOL_IP, 80, 16)  # SO_ORIGINAL_DST
        port, address = struct.unpack_from("!2xH4s", told)
        answer = {"cluster": "sidecar", "host": f"{socket.inet_ntoa(address)}:{port}", "peer": self.client_address[0]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
http.server.ThreadingHTTPServer(("127.0.0.1", 15001), Handler).serve_forever()
"""

# A Service that is global by its annotation alone: no inventory and no other cluster has one of its name.
ALONE = """\
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: shop
  annotations: {{service.cilium.io/global: "true"}}
spec:
  selector: {{app: {name}}}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
"""
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  initContainers: {before}
  containers:
    - {{{container}{more}}}
"""
# The first thing that a pod does: it asks a machine until that answers, and ends.
ASKS = """
import sys, time, urllib.request
end = time.monotonic() + 60
while True:
    try:
        print(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode())
        break
    except OSError:
        if time.monotonic() > end:
            raise
"""
HOST_PORT = 8090


@pytest.fixture(scope="module")
def hybrid(estate: Estate, kubernetes: Kubernetes) -> Iterator[Hybrid]:
    assert estate.lab.hosts.keys() < kubernetes.lab.hosts.keys()
    with joined(kubernetes) as made:
        yield made


def test_a_second_run_changes_nothing(hybrid: Hybrid) -> None:
    run = play("site", inventory=HYBRID)
    assert run.changed == {}


@pytest.mark.parametrize("step", HybridStory.STEPS)
def test_story(hybrid: Hybrid, step: str) -> None:
    tell(hybrid, step)


def test_a_pod_on_another_node_of_the_cluster_sees_who_asks(hybrid: Hybrid) -> None:
    """Worker to worker, though the bridge CNI masquerades what leaves the node."""
    for node in hybrid.nodes:
        result = hybrid.client.requests(f"http://{hybrid.pod_address(f'web-{node}')}:8080/", 50)
        seen = (result["answers"], set(result["peers"]))
        assert seen == ({f"{hybrid.kube.name}/web-{node}": 50}, {hybrid.pod_address(CLIENT)})


def test_pods_and_a_node_port_lead_to_a_service_of_machines(hybrid: Hybrid) -> None:
    machine_service_in_pods_and_at_a_node_port(hybrid)


def test_no_key_of_pods_comes_or_goes_with_the_api_server(hybrid: Hybrid) -> None:
    """What peers mirror of the cluster stays as it is; a flap would be seen by its new create revision."""
    estate = hybrid.estate
    kept = {key: value for key, value in estate.state(EDGE).items() if "/kube/" in key}
    assert kept

    def differing() -> list[str]:
        now = estate.state(EDGE)
        return [key for key, value in kept.items() if now.get(key) != value]

    with hybrid.without_api_server():
        before = estate.registrar_leader("kube-1")
        hybrid.kube.lab.exec("kube-1", ["systemctl", "restart", "isthmus-registrar.service"])
        estate.until(
            "a registrar leads that never heard the API server",
            lambda: estate.registrar_leader("kube-1") not in (before, ("", 0)),
        )
        assert differing() == []
    began = time.monotonic()
    while time.monotonic() - began < 5:
        assert differing() == []


def test_with_session_affinity_a_pod_stays_at_its_backend(hybrid: Hybrid) -> None:
    """Whoever that is: a pod or a machine."""
    where = ("service", "web", f"--namespace={NAMESPACE}")

    def answered() -> set[str]:
        return set(hybrid.client.requests(f"http://{hybrid.service_address}/", 60)["answers"])

    def session(kind: str) -> None:
        hybrid.kube.kubectl("patch", *where, "--patch", json.dumps({"spec": {"sessionAffinity": kind}}))

    with hybrid.undone(lambda: session("None")):
        session("ClientIP")
        hybrid.until("one backend answers the pod", lambda: len(answered()) == 1)
        assert answered() == answered()
    hybrid.until("all answer it", lambda: answered() == hybrid.servers)


def test_a_sidecar_sees_the_address_that_its_pod_dials(hybrid: Hybrid) -> None:
    """The redirect of a service mesh in the pod: without the annotation it sees the backend that was chosen."""
    node, pod, unit = hybrid.nodes[0], "beside", "sidecar"
    where = f"--namespace={NAMESPACE}"
    customer = PodCustomer(hybrid.kube, pod, NAMESPACE)

    def dialled() -> set[str]:
        result = customer.requests(f"http://{hybrid.service_address}/", 20)
        assert not result["failed"], result
        return {who.removeprefix("sidecar/") for who in result["answers"]}

    def left_alone() -> int:
        return int(hybrid.ask(node, "status")["kubernetes"]["untranslated"])

    def gone() -> None:
        hybrid.lab.exec(node, ["systemctl", "stop", unit], check=False)
        hybrid.kube.kubectl("delete", "pod", pod, where, "--ignore-not-found", "--now")

    with hybrid.undone(gone):
        hybrid.kube.apply(demo_pods.client(pod, node))
        hybrid.until("the customer runs", lambda: hybrid.ready(pod), 120)
        of_pod = f"nsenter --net=$ns ip -br -4 address | grep -qF ' {hybrid.pod_address(pod)}/'"
        found = hybrid.lab.exec(node, ["sh", "-c", f"for ns in /run/netns/*; do {of_pod} && echo $ns; done; true"])
        inside = ["nsenter", f"--net={found.stdout.strip()}"]
        redirect = ["iptables", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "REDIRECT", "--to-ports", "15001"]
        hybrid.lab.popen(node, [*inside, "python3", "-c", SIDECAR], unit=unit)
        hybrid.lab.exec(node, [*inside, *redirect])
        assert left_alone() == 0
        hybrid.until("it listens", lambda: not customer.requests("http://192.0.2.1/", 1)["failed"])
        assert all(each.endswith(":8080") for each in dialled())
        hybrid.kube.kubectl("annotate", "pod", pod, where, "isthmus.io/socket-translation=false")
        hybrid.until("the pod is left alone", lambda: left_alone() == 1)
        assert dialled() == {f"{hybrid.service_address}:80"}


@pytest.mark.slow
def test_machines_use_a_service_of_pods_that_no_inventory_declares(hybrid: Hybrid) -> None:
    """And `publishNotReadyAddresses` makes backends of pods that are not ready, as for kube-proxy."""
    estate, name, where = hybrid.estate, "early", f"--namespace={NAMESPACE}"
    url = f"http://{name}.{NAMESPACE}.svc.clusterset.local/"

    def used() -> set[str]:
        return hybrid.used(EDGE, (NAMESPACE, name))

    def answers() -> bool:
        return bool(estate.edge.requests(url, 20)["answers"] == {f"{hybrid.kube.name}/{name}": 20})

    def gone() -> None:
        hybrid.kube.kubectl("delete", "service,pod", name, where, "--ignore-not-found", "--now")

    container = demo_pods.web_container(hybrid.kube.name)
    pod = POD.format(name=name, node=hybrid.nodes[0], before="[]", container=container, more="")
    with hybrid.undone(gone):
        hybrid.kube.apply(ALONE.format(name=name) + pod)
        hybrid.until("a machine has an address for it", lambda: estate.service_named(EDGE, f"shop/{name}") is not None)
        hybrid.until("the pod answers machines", answers)
        hybrid.kube.exec(name, ["python3", "-c", "open('/run/web.sick', 'w')"], NAMESPACE)
        hybrid.until("a pod that is not ready is no backend", lambda: used() == set())
        unready = {"spec": {"publishNotReadyAddresses": True}}
        hybrid.kube.kubectl("patch", "service", name, where, "--patch", json.dumps(unready))
        hybrid.until("now it is", lambda: used() == {hybrid.nodes[0]})
        assert not hybrid.ready(name)
        hybrid.until("the pod answers machines", answers)
    hybrid.until("no host knows it any more", lambda: estate.service_named(EDGE, f"shop/{name}") is None)


@pytest.mark.slow
def test_an_init_container_has_its_pods_address_and_a_host_port_is_reached_over_the_mesh(hybrid: Hybrid) -> None:
    estate, name, node = hybrid.estate, "begun", hybrid.nodes[0]
    where = f"--namespace={NAMESPACE}"
    machine = f"http://{estate.address('onprem-1', 'web')}:8080/"
    command = ["python3", "-c", ASKS, machine]
    asks = {"name": "asks", "image": TOOLS_IMAGE, "imagePullPolicy": "Never", "command": command}
    ports = f", ports: [{{containerPort: 8080, hostPort: {HOST_PORT}}}]"
    container = demo_pods.web_container(hybrid.kube.name)
    text = POD.format(name=name, node=node, before=json.dumps([asks]), container=container, more=ports)
    with hybrid.undone(lambda: hybrid.kube.kubectl("delete", "pod", name, where, "--ignore-not-found", "--now")):
        hybrid.kube.apply(text)
        hybrid.until("the init container ended, and the pod is ready", lambda: hybrid.ready(name), 120)
        own = hybrid.pod_address(name)
        told = json.loads(hybrid.kube.kubectl("logs", name, "--container=asks", where).stdout)
        assert (told["host"], told["peer"]) == ("onprem-1", own)
        mesh = json.loads(hybrid.lab.exec(node, ["cat", "/etc/isthmus/node.json"]).stdout)["node"]["mesh4"]
        everything = {f"{hybrid.kube.name}/{name}": 50}
        result = estate.edge.requests(f"http://{mesh}:{HOST_PORT}/", 50)
        assert (result["answers"], set(result["peers"])) == (everything, {estate.address(EDGE, "client")}), result
        # From the underlay, and from a pod of the same node: as without the mesh.
        underlay = hybrid.kube.cluster.nodes[node].address
        outside = hybrid.lab.exec("cloud-2", ["curl", "-sf", "-m", "5", f"http://{underlay}:{HOST_PORT}/"]).stdout
        assert json.loads(outside)["host"] == name
        assert hybrid.client.requests(f"http://{underlay}:{HOST_PORT}/", 50)["answers"] == everything


@pytest.mark.slow
def test_a_deployment_scales_to_20_and_to_0_without_a_failed_request(hybrid: Hybrid) -> None:
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


@pytest.mark.slow
def test_a_node_is_drained_without_a_failed_request(hybrid: Hybrid) -> None:
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


def test_a_node_that_loses_its_power_gets_no_new_flows(hybrid: Hybrid) -> None:
    victim = hybrid.nodes[-1]
    others = (EDGE, "cloud-1", hybrid.nodes[0])
    with hybrid.undone(lambda: hybrid.lab.power_on(victim)):
        began = time.monotonic()
        hybrid.lab.power_off(victim)
        hybrid.estate.timed(
            f"{victim} is off, nobody uses its pods",
            lambda: all(hybrid.used(host) == hybrid.members - {victim} for host in others),
            NODE_IS_DOWN,
            began,
        )
        results = [hybrid.edge.requests(f"http://{hybrid.service(EDGE)['address']}/", 300)]
        results.append(hybrid.client.requests(f"http://{hybrid.service_address}/", 300))
        assert [(result["ok"], result["errors"]) for result in results] == [(300, {}), (300, {})]
    hybrid.everywhere(hybrid.members, others)


@pytest.mark.slow
def test_verify_proves_pods_and_names_what_differs(hybrid: Hybrid) -> None:
    victim = hybrid.nodes[-1]
    pod = f"web-{victim}"
    address = hybrid.pod_address(pod)
    hybrid.until("no pod is on its way", lambda: not play("verify", inventory=HYBRID, check=False).status, 120)

    def anew() -> None:
        hybrid.kube.kubectl("delete", "pod", pod, f"--namespace={NAMESPACE}", "--now")
        hybrid.make_pods()
        hybrid.everywhere(hybrid.members)

    with hybrid.undone(anew):
        loses = f'for ns in /run/netns/*; do nsenter --net="$ns" ip address delete {address}/24 dev eth0; done; true'
        hybrid.lab.exec(victim, ["sh", "-c", loses])
        told = play("verify", inventory=HYBRID, check=False).problems(victim)
    assert f"pods: {address} ({NAMESPACE}/{pod}) is published, and no pod of this node has it; " in told


@pytest.mark.slow
def test_pods_of_two_kubernetes_clusters_are_one_network(hybrid: Hybrid) -> None:
    second = Kubernetes(Lab(EVERY_CLUSTER), "kube2")
    try:
        second.up()
        other = HybridStory(second.lab, second, print)
        other.make_pods()
        play("site", inventory=EVERY_CLUSTER)
        everybody = hybrid.servers | other.servers
        nodes = hybrid.members | other.members
        hybrid.until(
            "all backends are known",
            lambda: all(other.used(host) == nodes for host in (EDGE, *nodes & {*other.nodes, *hybrid.nodes})),
        )
        for here, there in ((hybrid, other), (other, hybrid)):
            address = there.pod_address(f"web-{there.nodes[0]}")
            result = here.client.requests(f"http://{address}:8080/", 50)
            assert result["answers"] == {f"{there.kube.name}/web-{there.nodes[0]}": 50}, result
            assert set(result["peers"]) == {here.pod_address(CLIENT)}
            result = here.client.requests(SERVICE_URL, 300)
            assert (result["ok"], set(result["answers"])) == (300, everybody), result
        # An upgrade by a second cluster: the old one's API server is gone, its pods serve the new one's.
        address = hybrid.pod_address(f"web-{hybrid.nodes[0]}")
        with hybrid.without_api_server():
            results = [other.client.requests(url, 100) for url in (f"http://{address}:8080/", SERVICE_URL)]
            assert [(result["ok"], result["errors"]) for result in results] == [(100, {}), (100, {})]
    finally:
        play("site", "-e", "isthmus_prune=cluster/kube2", inventory=HYBRID)
        second.down()
    hybrid.everywhere(hybrid.members)
