# SPDX-License-Identifier: GPL-3.0-or-later
"""A Kubernetes cluster whose nodes nobody enters joins the running estate: everything of the mesh runs inside it."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import snapshot
import yaml
from demo import EDGE
from estate_tools import ETCD_HOSTS, PKI, Estate
from isthmus_lab import Lab
from kubernetes_lab import IN_CLUSTER, TWO_IN_CLUSTER, Kubernetes
from kubernetes_machine import TOOLS_IMAGE
from lab_system import LabError
from playbook import documented, play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

MESH = "isthmus-system"
NODES = ("managed-1", "managed-2", "managed-3")
MEMBERS = tuple(f"isthmus-etcd-{number}" for number in range(3))
SECRETS = ("isthmus-ca", "isthmus-etcd-tls", "isthmus-agent-tls", "isthmus-registrar-tls")
IN_PODS = 120  # seconds in which new certificates are in the pods
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
SERVED = "import ssl, sys; print(ssl.get_server_certificate((sys.argv[1], int(sys.argv[2])), timeout=5))"
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


def ours(kube: Kubernetes) -> list[str]:
    """What the mesh has in the cluster."""
    kinds = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,namespaces"
    found = kube.kubectl("get", kinds, "-A", "-l", "app.kubernetes.io/managed-by=isthmus", "--output=name")
    return found.stdout.split()


def make_pods(estate: Estate, kube: Kubernetes) -> None:
    """A web server on each node, ready."""
    kube.apply("".join(POD.format(node=node, image=TOOLS_IMAGE) for node in kube.cluster.nodes))

    def ready(node: str) -> bool:
        conditions = kube.get("pod", f"web-{node}")["status"].get("conditions", ())
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    estate.until("the pods are ready", lambda: all(ready(node) for node in kube.cluster.nodes), 120)


# What Kubernetes and the CNI keep of pods that were there, and what is in the volume of a class with the policy Retain.
KEPT = re.compile(r"[\w-]+: files: /var/lib/(cni|lab-volumes)/")


def differing(kube: Kubernetes, bare: Mapping[str, snapshot.Snapshot]) -> list[str]:
    """What is not as it was before anything of the mesh was on the nodes."""
    found = snapshot.differences(bare, snapshot.take(kube.lab, NODES))
    return [line for line in found if not KEPT.match(line)]


def objects(kube: Kubernetes) -> tuple[list[str], list[Any]]:
    """What the cluster has, but for what comes and goes by itself; and its nodes."""
    kinds = "namespaces,services,configmaps,secrets,serviceaccounts,resourcequotas,persistentvolumeclaims"
    kinds += ",deployments,daemonsets,statefulsets,jobs,cronjobs,poddisruptionbudgets,endpointslices"
    kinds += ",roles,rolebindings,clusterroles,clusterrolebindings,persistentvolumes"
    form = '{range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{"\\n"}{end}'
    found = kube.kubectl("get", kinds, "--all-namespaces", f"--output=jsonpath={form}").stdout.split()
    nodes = [(node["metadata"]["labels"], node["spec"]) for node in kube.get("nodes")["items"]]
    return sorted(found), nodes


@pytest.fixture(scope="module")
def cluster(estate: Estate) -> Iterator[Kubernetes]:
    """The cluster with pods, before anything of the mesh is there."""
    kube = Kubernetes(Lab(IN_CLUSTER), "managed")
    try:
        kube.up()
        make_pods(estate, kube)
        yield kube
    finally:
        kube.down()


@pytest.fixture(scope="module")
def bare(cluster: Kubernetes) -> tuple[dict[str, snapshot.Snapshot], tuple[list[str], list[Any]]]:
    return snapshot.take(cluster.lab, NODES), objects(cluster)


@pytest.fixture(scope="module")
def managed(cluster: Kubernetes, bare: object) -> Iterator[Kubernetes]:
    """The cluster in the running estate; out of it again in the end."""
    assert bare
    play("site", inventory=IN_CLUSTER)
    yield cluster
    play("site", "-e", "isthmus_prune=cluster/managed")


def address(kube: Kubernetes, node: str) -> str:
    return str(kube.get("pod", f"web-{node}")["status"]["podIP"])


def fetch(kube: Kubernetes, node: str, url: str) -> dict[str, Any]:
    """What the pod on the node is answered; empty when it is not."""
    text = kube.exec(f"web-{node}", ["python3", "-c", FETCH, url], check=False)
    answer: dict[str, Any] = json.loads(text or "{}")
    return answer


def balancer(kube: Kubernetes) -> str:
    """The address that the load balancer of etcd got."""
    (ingress,) = kube.get("service", "isthmus-etcd-mesh", f"--namespace={MESH}")["status"]["loadBalancer"]["ingress"]
    return str(ingress["ip"])


def peers_in(kube: Kubernetes) -> dict[str, dict[str, Any]]:
    """The machines' clusters as an agent in the cluster knows them."""
    ask = ["/opt/isthmus/current/bin/isthmus", "peers", "-o", "json"]
    peers = json.loads(kube.exec("daemonset/isthmus-agent", ask, MESH))["peers"]
    return {one["name"]: one for one in peers if one["name"] in ETCD_HOSTS}


def peer_at(estate: Estate, host: str) -> dict[str, Any]:
    """The cluster as a peer knows it."""
    (peer,) = (one for one in estate.ask(host, "peers")["peers"] if one["name"] == "managed")
    return dict(peer)


def members(kube: Kubernetes) -> dict[str, dict[str, Any]]:
    """The pods of etcd, by name."""
    found = kube.get("pods", f"--namespace={MESH}", "--selector=isthmus.io/component=etcd")["items"]
    return {pod["metadata"]["name"]: pod for pod in found}


def ready_since(pod: Mapping[str, Any]) -> str:
    """Since when a pod is ready; empty when it is not, or is to end."""
    conditions = pod["status"].get("conditions", ()) if "deletionTimestamp" not in pod["metadata"] else ()
    return next(
        (one["lastTransitionTime"] for one in conditions if (one["type"], one["status"]) == ("Ready", "True")), ""
    )


def etcdctl(kube: Kubernetes, member: str, *words: str) -> str:
    """etcdctl in the pod of a member, which asks that member alone; what it prints, empty when it fails."""
    tls = (f"--cacert={PKI}/trust/managed.crt", f"--cert={PKI}/root.crt", f"--key={PKI}/root.key")
    argv = ["env", "ETCDCTL_API=3", "etcdctl", "--endpoints=https://127.0.0.1:2379", *tls, "--write-out=json", *words]
    done = kube.kubectl("exec", f"--namespace={MESH}", member, "--", *argv, check=False)
    return done.stdout if done.returncode == 0 else ""


def answering(kube: Kubernetes) -> dict[str, int]:
    """raft's id of each member that answers a read which the majority has to agree to."""
    found = {}
    for member in MEMBERS:
        status = json.loads(etcdctl(kube, member, "endpoint", "status") or "[]")
        if status and json.loads(etcdctl(kube, member, "get", "isthmus/v1/estate/roster") or "{}").get("kvs"):
            found[member] = int(status[0]["Status"]["header"]["member_id"])
    return found


def whole(kube: Kubernetes) -> bool:
    """Whether all members are ready, each on a node of its own, and answer as three."""
    pods = members(kube)
    there = [pod["spec"].get("nodeName") for pod in pods.values() if ready_since(pod)]
    return (*sorted(pods), *sorted(map(str, there))) == (*MEMBERS, *NODES) and len({*answering(kube).values()}) == 3


def connects_anew(peers: Callable[[], Mapping[str, Mapping[str, Any]]]) -> Callable[[], bool]:
    """Whether every one of the peers was proven to be connected after now."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return lambda: all(one["state"] == "connected" and (one["last_proof"] or "") > since for one in peers().values())


def reads(estate: Estate, host: str) -> Callable[[], bool]:
    """Whether the registrar of this host's cluster was proven to be connected to the cluster after now."""
    return connects_anew(lambda: {"managed": peer_at(estate, host)})


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
    assert peer_at(estate, "cloud-1")["endpoint"] == f"https://{balancer(managed)}:2379"


def key_lines(kube: Kubernetes) -> set[str]:
    """Every line inside a private key of the Secrets, as PEM and as the API has it, in base64; the last lines of keys
    may be short."""
    found: set[str] = set()
    for secret in kube.get("secrets", f"--namespace={MESH}")["items"]:
        for encoded in secret["data"].values():
            content = base64.b64decode(encoded)
            if b"PRIVATE KEY" in content:
                found |= {encoded, *(line for line in content.decode().splitlines() if "-----" not in line)}
    return {line for line in found if len(line) >= 16}


def test_no_private_key_is_where_it_can_be_read(managed: Kubernetes) -> None:
    lines = key_lines(managed)
    assert len(lines) >= 3 * len(SECRETS)
    for kind in ("configmaps", "events", "pods", "jobs"):
        text = managed.kubectl("get", kind, f"--namespace={MESH}", "--output=json").stdout
        assert "PRIVATE KEY" not in text
        assert not [line for line in lines if line in text]
    for pod in managed.get("pods", f"--namespace={MESH}")["items"]:
        name = pod["metadata"]["name"]
        said = managed.kubectl("logs", f"--namespace={MESH}", name, "--all-containers", "--tail=-1").stdout
        assert "PRIVATE KEY" not in said, name
        assert not [line for line in lines if line in said], name


def test_an_agent_that_dies_leaves_the_datapath(estate: Estate, managed: Kubernetes) -> None:
    pod = address(managed, "managed-2")
    with estate.unnoticed(estate.edge, url=f"http://{pod}:8080/"):
        managed.kubectl("delete", "pod", f"--namespace={MESH}", "-l", "isthmus.io/component=agent")
        managed.kubectl("rollout", "status", "daemonset/isthmus-agent", f"--namespace={MESH}", "--timeout=120s")


def test_etcd_has_three_members_and_one_of_them_comes_back(estate: Estate, managed: Kubernetes) -> None:
    """First its pod is deleted, then its pod is deleted while the node that has its volume takes none."""
    assert whole(managed)
    pod, ids = address(managed, "managed-2"), answering(managed)
    kept = {EDGE: {name: found for name, found in estate.state(EDGE).items() if "/managed/" in name}}
    assert kept[EDGE]
    first = members(managed)[MEMBERS[0]]
    node = first["spec"]["nodeName"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": MEMBERS[1], "namespace": MESH}}
    path = f"/api/v1/namespaces/{MESH}/pods/{MEMBERS[1]}/eviction"

    def disruptions() -> int:
        return int(managed.get("pdb", "isthmus-etcd", f"--namespace={MESH}")["status"]["disruptionsAllowed"])

    with estate.unnoticed(estate.edge, url=f"http://{pod}:8080/", interval=0.05):
        managed.kubectl("delete", "pod", MEMBERS[0], f"--namespace={MESH}")
        estate.until("the member is back", lambda: whole(managed), 120)
        assert members(managed)[MEMBERS[0]]["metadata"]["uid"] != first["metadata"]["uid"]
        assert answering(managed) == ids, "it came back with its volume"

        with estate.undone(lambda: managed.kubectl("uncordon", node)):
            managed.kubectl("cordon", node)
            managed.kubectl("delete", "pod", MEMBERS[0], f"--namespace={MESH}")
            estate.until("no other may be away", lambda: disruptions() == 0)
            refused = managed.kubectl("create", "--raw", path, "--filename=-", feed=json.dumps(eviction), check=False)
            assert refused.returncode != 0
            assert "disruption budget" in refused.stderr
            rest = {name: ids[name] for name in MEMBERS[1:]}
            estate.until("the other two answer", lambda: answering(managed) == rest, 60)
            estate.until(f"{EDGE} reads the cluster", reads(estate, EDGE), 120)
            estate.until("its registrars read all others", connects_anew(lambda: peers_in(managed)), 120)
        estate.until("the member is back on its node", lambda: whole(managed), 120)
        assert members(managed)[MEMBERS[0]]["spec"]["nodeName"] == node
    assert answering(managed) == ids
    assert estate.withdrawn(kept) == {}
    for host in ("cloud-1", EDGE):
        estate.until(f"{host} reads the cluster", reads(estate, host), 120)
    assert play("site", inventory=IN_CLUSTER).changed == {}


def test_members_of_etcd_are_replaced_one_after_the_other(estate: Estate, managed: Kubernetes) -> None:
    before, ids = members(managed), answering(managed)
    kept = {EDGE: {name: found for name, found in estate.state(EDGE).items() if "/managed/" in name}}
    pod = address(managed, "managed-2")
    with estate.unnoticed(estate.edge, url=f"http://{pod}:8080/", interval=0.05):
        managed.kubectl("rollout", "restart", "statefulset/isthmus-etcd", f"--namespace={MESH}")
        managed.kubectl(
            *("rollout", "status", "statefulset/isthmus-etcd", f"--namespace={MESH}", "--timeout=280s"), seconds=300
        )
        estate.until("all members answer", lambda: whole(managed), 120)
        estate.until(f"{EDGE} reads the cluster", reads(estate, EDGE), 120)
    now = members(managed)
    assert all(now[name]["metadata"]["uid"] != before[name]["metadata"]["uid"] for name in MEMBERS)
    # Kubernetes goes from the last to the first. A pod is made when the one before it is ready.
    for earlier, later in ((MEMBERS[2], MEMBERS[1]), (MEMBERS[1], MEMBERS[0])):
        assert ready_since(now[earlier]) <= now[later]["metadata"]["creationTimestamp"]
    assert answering(managed) == ids
    assert estate.withdrawn(kept) == {}


def test_the_api_server_is_away_and_an_agent_dies_meanwhile(estate: Estate, managed: Kubernetes) -> None:
    """The kubelet starts it again without the API; nothing is withdrawn, then or when the server is back."""
    operator, node = Estate(managed.lab), "managed-2"
    server = managed.cluster.control_plane.name
    pod = address(managed, node)
    kept = {EDGE: {name: found for name, found in estate.state(EDGE).items() if "/managed/" in name}}
    assert kept[EDGE]

    def agent() -> str:
        return managed.lab.exec(node, ["pgrep", "-f", "[b]in/isthmusd "], check=False).stdout.strip()

    def ready() -> bool:
        ask = ["curl", "-sf", "-m", "2", "http://127.0.0.1:9968/ready"]
        return managed.lab.exec(node, ask, check=False).returncode == 0

    before = agent()
    assert before
    with (
        estate.unnoticed(estate.edge, url=f"http://{pod}:8080/"),
        estate.undone(lambda: managed.lab.exec(server, ["systemctl", "start", "kube-apiserver.service"])),
    ):
        operator.kill_for_good(server, "kube-apiserver")
        managed.lab.exec(node, ["kill", "-KILL", *before.split()])
        estate.until("the kubelet has started the agent again", lambda: agent() not in ("", before) and ready(), 120)
    estate.until("the API server is back", managed.api_ready)
    managed.kubectl("rollout", "status", "daemonset/isthmus-agent", f"--namespace={MESH}", "--timeout=120s")
    estate.until("its registrars read all others", connects_anew(lambda: peers_in(managed)), 120)
    assert estate.withdrawn(kept) == {}


def test_two_clusters_of_the_kind_read_each_other(estate: Estate, managed: Kubernetes) -> None:
    """Each authority is inside its cluster, and signs for the other's registrars in one run."""
    second = Kubernetes(Lab(TWO_IN_CLUSTER), "managed2")
    try:
        second.up()
        make_pods(estate, second)
        play("site", inventory=TWO_IN_CLUSTER)
        (there,) = second.cluster.nodes
        ends = ((managed, NODES[0], second, there), (second, there, managed, NODES[1]))

        def answers(here: Kubernetes, node: str, other: Kubernetes, target: str) -> bool:
            answer = fetch(here, node, f"http://{address(other, target)}:8080/")
            return (answer.get("host"), answer.get("peer")) == (f"web-{target}", address(here, node))

        for end in ends:
            estate.until(f"{end[1]} reaches {end[3]} with its own address", lambda end=end: answers(*end), 120)  # type: ignore[misc]
        assert play("site", inventory=TWO_IN_CLUSTER).changed == {}
        play("verify", inventory=TWO_IN_CLUSTER)
    finally:
        play("site", "-e", "isthmus_prune=cluster/managed2", inventory=IN_CLUSTER)
        second.down()


def test_verify_finds_nothing(managed: Kubernetes) -> None:
    play("verify", inventory=IN_CLUSTER)


def test_the_host_that_stands_for_it_registers_services(estate: Estate, managed: Kubernetes) -> None:
    places = ",".join([*(hosts[0] for hosts in ETCD_HOSTS.values()), "managed-api"])
    legacy = {"namespace": "shop", "name": "legacy"}
    ports = [{"name": "http", "port": 80, "target_port": 8080}]
    given = {**legacy, "ports": ports, "backends": {"labels": {"app": "web"}}, "kubernetes": True}
    where = ("service", "legacy", "--namespace=shop")
    managed.kubectl("create", "namespace", "shop")
    try:
        estate.module(places, "global_service", given, IN_CLUSTER)
        estate.until("it is a Service", lambda: not managed.kubectl("get", *where, check=False).returncode)
        inside = "http://legacy.shop.svc.cluster.local/"
        estate.until("a machine answers", lambda: fetch(managed, NODES[0], inside).get("cluster") in ETCD_HOSTS)
    finally:
        estate.module(places, "global_service", {**legacy, "state": "absent"}, IN_CLUSTER)
    estate.until("the Service is gone", lambda: bool(managed.kubectl("get", *where, check=False).returncode))
    managed.kubectl("delete", "namespace", "shop")


def test_new_keys_are_made_inside_and_nobody_notices(estate: Estate, managed: Kubernetes) -> None:
    """All keys but the authority's, as docs/kubernetes-managed.md has it; then everybody connects with them."""

    def served() -> dict[str, str]:
        ask = ["python3", "-c", SERVED, "127.0.0.1", "2379"]
        return {member: managed.exec(member, ask, MESH) for member in MEMBERS}

    def key_of_agents() -> str:
        return str(managed.get("secret", "isthmus-agent-tls", f"--namespace={MESH}")["data"]["agent.key"])

    before, key = served(), key_of_agents()
    kept = {EDGE: {name: found for name, found in estate.state(EDGE).items() if "/managed/" in name}}
    assert kept[EDGE]
    pod = address(managed, "managed-2")
    with estate.unnoticed(estate.edge, url=f"http://{pod}:8080/", interval=0.05):
        command = documented("kubernetes-managed.md", "kubectl -n isthmus-system delete secret").splitlines()[0]
        former = key_lines(managed)
        managed.kubectl(*command.split()[1:])
        told = play("site", "-vvv", "--diff", inventory=IN_CLUSTER).output
        assert key_of_agents() != key
        assert "keys and certificates anew: Secret" in told, "the run shows what it changes"
        lines = former | key_lines(managed)
        assert len(lines) > len(former)
        assert not [line for line in lines if line in told], "a line of a private key is in what the run said"
        estate.until(
            "every member of etcd has its new certificate",
            lambda: all(now != before[member] for member, now in served().items()),
            3 * IN_PODS,
        )
        assert estate.lab.exec(EDGE, ["python3", "-c", SERVED, balancer(managed), "2379"]).stdout in served().values()

        term = estate.registrar_leader(EDGE)
        estate.lab.exec(EDGE, ["systemctl", "restart", "isthmus-registrar.service"])
        estate.until("a registrar leads again", lambda: estate.registrar_leader(EDGE) not in (term, ("", 0)))
        estate.until("it reads the cluster", reads(estate, EDGE))

        managed.kubectl("delete", "pod", f"--namespace={MESH}", "-l", "isthmus.io/component=registrar")
        managed.kubectl("rollout", "status", "deployment/isthmus-registrar", f"--namespace={MESH}", "--timeout=120s")
        estate.until("its registrars read all others", connects_anew(lambda: peers_in(managed)), 120)
    assert estate.withdrawn(kept) == {}
    assert peers_in(managed).keys() == ETCD_HOSTS.keys()
    assert play("site", inventory=IN_CLUSTER).changed == {}


@pytest.mark.parametrize("how", ["node_port", "host"])
def test_peers_follow_when_etcd_is_exposed_by_nodes(estate: Estate, managed: Kubernetes, how: str) -> None:
    """By a port of theirs, then by etcd on their own addresses, to which its members move one after the other."""
    cluster = yaml.safe_load((IN_CLUSTER / "managed.yml").read_text())["all"]["vars"]["lab_cluster_managed"]
    option = ("-e", json.dumps({"lab_cluster_managed": {**cluster, "expose": {"type": how}}}))
    kept = {EDGE: {name: found for name, found in estate.state(EDGE).items() if "/managed/" in name}}
    play("site", *option, inventory=IN_CLUSTER)
    service = managed.get("service", "isthmus-etcd-mesh", f"--namespace={MESH}")["spec"]["ports"][0]
    addresses = {node: str(managed.cluster.nodes[node].address) for node in NODES}
    places = {f"https://{one}:{service.get('nodePort', 2379)}" for one in addresses.values()}
    assert whole(managed)
    for pod in members(managed).values():
        assert (pod["status"]["podIP"] == addresses[pod["spec"]["nodeName"]]) == (how == "host")
    for host in ("cloud-1", EDGE):
        estate.until(f"{host} reads the cluster", reads(estate, host), 3 * IN_PODS)
        assert peer_at(estate, host)["endpoint"] in places
    assert estate.withdrawn(kept) == {}
    assert play("site", *option, inventory=IN_CLUSTER).changed == {}


def test_teardown_leaves_the_cluster_and_its_nodes_as_they_were(
    estate: Estate, managed: Kubernetes, bare: tuple[dict[str, snapshot.Snapshot], tuple[list[str], list[Any]]]
) -> None:
    nodes, in_api = bare
    assert any("isthmus" in line for line in differing(managed, nodes))
    play("teardown", "-e", "isthmus_confirm_teardown=lab", "--limit", "managed", inventory=IN_CLUSTER)
    assert ours(managed) == []
    assert objects(managed) == in_api
    # kube-proxy drops rules of Services that are gone within its own time.
    with contextlib.suppress(LabError):
        estate.until("nodes are as they were", lambda: not differing(managed, nodes), 120)
    assert differing(managed, nodes) == []
    assert fetch(managed, NODES[0], f"http://{address(managed, NODES[1])}:8080/")["host"] == f"web-{NODES[1]}"


def test_a_cluster_without_the_mesh_that_others_know_is_refused(managed: Kubernetes) -> None:
    """As one that was made anew: new keys would be refused by everybody."""
    assert ours(managed) == []
    refused = play("site", inventory=IN_CLUSTER, check=False)
    assert refused.status == 2
    assert "Pending: cluster managed could not be done (managed-api)" in refused.output
    assert "has nothing of it: no Secret isthmus-system/isthmus-ca" in refused.output
    assert ours(managed) == []
