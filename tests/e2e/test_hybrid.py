# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Kubernetes cluster joins the running estate: pods and machines are one network.

The cluster's nodes have kubelet, containerd, the bridge CNI with `ipMasq: true` and kube-proxy; the demo's service
`shop/web` is there as a Service of pods that is annotated global. The story of the demo's second part is told sentence
by sentence, then what a demo has no room for. What is long is in `test_hybrid_long.py`.
"""

from __future__ import annotations

import json
import time

import demo_pods
import pytest
from demo import EDGE
from demo_hybrid import CLIENT, NAMESPACE, SERVICE_URL, HybridStory
from estate_tools import ETCD_HOSTS
from hybrid_tools import (
    MACHINE,
    NODE_IS_DOWN,
    Hybrid,
    a_deployment_scales_under_load,
    a_node_is_drained_under_load,
    machine_service_in_pods_and_at_a_node_port,
    tell,
)
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
# The kubelet starts it anew when the file is there, which is gone with the container's own files. It is not ready for
# some seconds then, so that whoever looks sees it.
DIES = "/run/web.dead"
LIVING = """\
name: web, image: {image}, imagePullPolicy: Never, command: [{programs}/http_server, web],
      env: [{{name: CLUSTER, value: {cluster}}}, {{name: PORT, value: "8080"}}],
      readinessProbe: {{httpGet: {{path: /healthz, port: 8080}}, initialDelaySeconds: 5, periodSeconds: 1}},
      livenessProbe: {{exec: {{command: [sh, -c, "[ ! -e {dies} ]"]}}, periodSeconds: 1, timeoutSeconds: 10,
                      failureThreshold: 1}}"""
# Pods and machines behind one name that has no address of its own: who serves it is said by DNS alone.
HEADLESS = """\
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: shop
  annotations: {{service.cilium.io/global: "true"}}
spec:
  clusterIP: None
  selector: {{app: web}}
  ports: [{{name: http, port: 8080}}]
"""
LOOK_UP = "import socket, sys; print(*{one[4][0] for one in socket.getaddrinfo(sys.argv[1], 80, socket.AF_INET)})"


def test_a_second_run_changes_nothing(hybrid: Hybrid) -> None:
    run = play("site", inventory=HYBRID)
    assert run.changed == {}


def test_what_a_pod_had_with_a_machine_before_the_mesh_came_goes_on(hybrid: Hybrid) -> None:
    """By the machine's own address: masqueraded by the CNI when it began, so to its end. What begins now is not."""
    assert hybrid.older, "the nodes were in the mesh before; the fixture `mesh` lets none of them stay"
    underlay, machine = hybrid.kube.cluster.nodes[hybrid.nodes[0]].address, f"onprem/{MACHINE}"
    kept = (hybrid.older["failed"], hybrid.older["errors"], hybrid.older["connections"])
    assert kept == (0, {}, 1), hybrid.older
    assert (hybrid.older["answers"].keys(), hybrid.older["peers"].keys()) == ({machine}, {str(underlay)})
    result = hybrid.client.requests(hybrid.underlay_url(), 50)
    assert (result["answers"], set(result["peers"])) == ({machine: 50}, {hybrid.pod_address(CLIENT)}), result


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
def test_a_pod_that_is_left_alone_uses_a_global_service_by_plain_dns(hybrid: Hybrid) -> None:
    """Its sockets are not translated, so kube-proxy chooses, which has backends elsewhere from EndpointSlices."""
    node, pod, sync = hybrid.nodes[0], "plain", "service.cilium.io/global-sync-endpoint-slices"
    where = f"--namespace={NAMESPACE}"
    marks = "kubernetes.io/service-name=web,endpointslice.kubernetes.io/managed-by=isthmus-registrar"

    def left_alone() -> int:
        return int(hybrid.ask(node, "status")["kubernetes"]["untranslated"])

    def answering(customer: PodCustomer) -> set[str]:
        """Who answers it; nobody when a request failed."""
        result = customer.requests(SERVICE_URL, 60)
        return set() if result["failed"] else set(result["answers"])

    with hybrid.customer_on(node, pod) as customer:
        hybrid.kube.kubectl("annotate", "pod", pod, where, "isthmus.io/socket-translation=false")
        hybrid.until("the pod is left alone", lambda: left_alone() == 1)
        pods = {f"{hybrid.kube.name}/web-{each}" for each in hybrid.nodes}
        assert answering(customer) == pods, "kube-proxy knows the pods of its cluster only"
        with hybrid.undone(lambda: hybrid.kube.kubectl("annotate", "service", "web", where, f"{sync}-")):
            hybrid.kube.kubectl("annotate", "service", "web", where, f"{sync}=true")
            hybrid.until("pods and machines answer", lambda: answering(customer) == hybrid.servers)
            before = hybrid.connects(node)
            result = customer.requests(SERVICE_URL, 200)
            assert (result["ok"], set(result["answers"])) == (200, hybrid.servers), result
            assert set(result["peers"]) == {hybrid.pod_address(pod)}
            assert hybrid.connects(node) == before
        chosen = ("endpointslices", where, f"--selector={marks}")
        hybrid.until("no slice of ours is left", lambda: hybrid.kube.get(*chosen)["items"] == [])
    hybrid.until("no pod is left alone", lambda: left_alone() == 0)


@pytest.mark.slow
def test_a_headless_service_of_pods_and_machines_is_resolved_in_a_pod(hybrid: Hybrid) -> None:
    estate, name, victim = hybrid.estate, "flat", "onprem-1"
    places, service = ",".join(hosts[0] for hosts in ETCD_HOSTS.values()), {"namespace": NAMESPACE, "name": "flat"}
    ports = [{"name": "http", "port": 8080, "target_port": 8080}]
    machines = {host: estate.address(host, "web") for host in hybrid.backends}
    everybody = {*machines.values(), *(hybrid.pod_address(f"web-{node}") for node in hybrid.nodes)}

    def found() -> set[str]:
        look = ["python3", "-c", LOOK_UP, f"{name}.{NAMESPACE}.svc.cluster.local"]
        return set(hybrid.kube.exec(CLIENT, look, NAMESPACE).split())

    def gone() -> None:
        hybrid.kube.kubectl("delete", "service", name, f"--namespace={NAMESPACE}", "--ignore-not-found")
        estate.module(places, "global_service", {**service, "state": "absent"})

    with hybrid.undone(gone):
        hybrid.kube.apply(HEADLESS.format(name=name))
        estate.module(places, "global_service", {**service, "ports": ports, "backends": {"labels": {"app": "web"}}})
        hybrid.until("DNS has the addresses of pods and machines", lambda: found() == everybody)
        result = hybrid.client.requests(f"http://{name}.{NAMESPACE}.svc.cluster.local:8080/", 50)
        assert (result["ok"], set(result["peers"])) == (50, {hybrid.pod_address(CLIENT)}), result
        with hybrid.undone(lambda: hybrid.lab.exec(victim, ["systemctl", "start", "web.service"])):
            hybrid.lab.exec(victim, ["systemctl", "stop", "web.service"])
            hybrid.until(
                "a machine that serves no more is not found", lambda: found() == everybody - {machines[victim]}
            )
        hybrid.until("it is found again", lambda: found() == everybody)
    chosen = ("endpointslices", f"--namespace={NAMESPACE}", f"--selector=kubernetes.io/service-name={name}")
    hybrid.until("no slice is left", lambda: hybrid.kube.get(*chosen)["items"] == [])
    hybrid.until("no host knows it", lambda: not any(estate.service_named(h, f"shop/{name}") for h in estate.lab.hosts))
    hybrid.everywhere(hybrid.members)


@pytest.mark.slow
def test_a_container_that_its_liveness_probe_ends_is_no_backend_until_it_serves_again(hybrid: Hybrid) -> None:
    estate, name, node = hybrid.estate, "living", hybrid.nodes[0]
    container = LIVING.format(image=TOOLS_IMAGE, programs=demo_pods.PROGRAMS, cluster=hybrid.kube.name, dies=DIES)
    pod = POD.format(name=name, node=node, before="[]", container=container, more="")

    def used() -> set[str]:
        return hybrid.used(EDGE, (NAMESPACE, name))

    def answers() -> bool:
        url = f"http://{name}.{NAMESPACE}.svc.clusterset.local/"
        return bool(estate.edge.requests(url, 20)["answers"] == {f"{hybrid.kube.name}/{name}": 20})

    def restarts() -> int:
        return int(hybrid.pod(name)["status"]["containerStatuses"][0]["restartCount"])

    def gone() -> None:
        where = f"--namespace={NAMESPACE}"
        hybrid.kube.kubectl("delete", "service,pod", name, where, "--ignore-not-found", "--now")

    with hybrid.undone(gone):
        hybrid.kube.apply(ALONE.format(name=name) + pod)
        hybrid.until("machines use the pod", lambda: used() == {node}, 120)
        hybrid.until("it answers them", answers)
        assert restarts() == 0
        hybrid.kube.exec(name, ["python3", "-c", f"open('{DIES}', 'w')"], NAMESPACE)
        hybrid.until("it is no backend", lambda: used() == set())
        hybrid.until("it is one again", lambda: used() == {node})
        assert restarts() == 1
        hybrid.until("it answers machines", answers)
    hybrid.until("no host knows it any more", lambda: estate.service_named(EDGE, f"shop/{name}") is None)


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
    a_deployment_scales_under_load(hybrid)


@pytest.mark.slow
def test_a_node_is_drained_without_a_failed_request(hybrid: Hybrid) -> None:
    a_node_is_drained_under_load(hybrid)


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
