# SPDX-License-Identifier: GPL-3.0-or-later
"""What is too long for every run: pods that come and go 300 times, kube-proxy's other mode, and nodes that leave the
mesh as they were."""

from __future__ import annotations

import ipaddress
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import snapshot
import yaml
from demo import EDGE, URL
from demo_hybrid import NAMESPACE, HybridStory
from estate_tools import Estate
from hybrid_tools import (
    Hybrid,
    a_deployment_scales_under_load,
    a_node_is_drained_under_load,
    joined,
    machine_service_in_pods_and_at_a_node_port,
    others_on_nodes_restart_under_load,
    tell,
)
from isthmus_lab import Customer
from kubernetes_lab import HYBRID, Kubernetes
from kubernetes_machine import PROXY_MODES, TOOLS_IMAGE
from playbook import INVENTORY, play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

RESTARTS, TOGETHER = 300, 10
# A pod of each round has labels of its own, so an identity of its own.
SHORT = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: short-{number}, namespace: shop, labels: {{app: short, round: "{round}"}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers: [{{name: sleep, image: {image}, imagePullPolicy: Never, command: [/bin/sleep, "86400"]}}]
"""


@pytest.fixture(scope="module")
def bare(estate: Estate, kubernetes: Kubernetes) -> dict[str, snapshot.Snapshot]:
    """The cluster's machines with the demo's pods, before anything of the mesh was there."""
    assert estate.lab.hosts.keys() < kubernetes.lab.hosts.keys()
    kubernetes.up()
    made = Hybrid(kubernetes)
    made.make_pods()
    made.make_more_pods()
    return snapshot.take(kubernetes.lab, [host.name for host in kubernetes.hosts])


@pytest.fixture(scope="module")
def hybrid(bare: dict[str, snapshot.Snapshot], kubernetes: Kubernetes) -> Iterator[Hybrid]:
    assert bare
    with joined(kubernetes) as made:
        yield made


def test_nodes_leave_the_mesh_as_they_were(bare: dict[str, snapshot.Snapshot], kubernetes: Kubernetes) -> None:
    """Also what Kubernetes has: no object of ours, and its nodes as they were."""
    ours = "clusterrole,clusterrolebinding,csr,service,endpointslice"
    mark = ("--all-namespaces", "--selector=app.kubernetes.io/managed-by=isthmus")

    def nodes() -> list[Any]:
        return [(node["metadata"]["labels"], node["spec"]) for node in kubernetes.get("nodes")["items"]]

    before = nodes()
    with joined(kubernetes) as made:
        assert kubernetes.get(ours, *mark)["items"]
        names = [host.name for host in kubernetes.hosts]
        assert snapshot.differences(bare, snapshot.take(kubernetes.lab, names))
        play("teardown", "--limit", kubernetes.name, "-e", "isthmus_confirm_teardown=lab", inventory=HYBRID)
        assert snapshot.differences(bare, snapshot.take(kubernetes.lab, names)) == []
        assert kubernetes.get(ours, *mark)["items"] == []
        assert nodes() == before
        # The cluster itself is whole: pods of both nodes answer by its own DNS.
        made.until("its pods alone answer", lambda: alone(made))


def alone(hybrid: Hybrid) -> bool:
    result = hybrid.client.requests("http://web.shop.svc.cluster.local/", 60)
    return not result["failed"] and set(result["answers"]) == {f"kube/web-{node}" for node in hybrid.nodes}


def without(place: Path, host: str) -> Path:
    """The lab's inventory with the cluster, but for one of its hosts."""
    (place / "lab").symlink_to(INVENTORY)
    copy = shutil.copytree(HYBRID, place / "hybrid")
    declared = yaml.safe_load((copy / "kube.yml").read_text())
    del declared["mesh"]["children"]["kube"]["hosts"][host]
    (copy / "kube.yml").write_text(yaml.safe_dump(declared))
    return copy


def kept_elsewhere(hybrid: Hybrid, customer: Customer, url: str, away: str) -> str:
    """The name of requests over one connection that whoever is not `away` answers (cluster/host)."""
    for number in range(100):
        name = f"elsewhere-{uuid.uuid4().hex[:6]}-{number}"
        customer.start(name, url, interval=0.02, keep_alive=True)
        hybrid.until("it is answered", lambda name=name: customer.result(name)["ok"] > 0)  # type: ignore[misc]
        if away not in customer.result(name)["answers"]:
            return name
        customer.result(name, stop=True)
    raise AssertionError(f"{away} answered all of 100 connections")


def test_a_node_leaves_the_running_cluster_and_comes_back(hybrid: Hybrid, tmp_path: Path) -> None:
    """Out of the mesh it is a node of Kubernetes as before: its pods answer pods. All the while requests of pods and
    machines go on at the others."""
    estate, leaving, stays = hybrid.estate, hybrid.nodes[-1], hybrid.nodes[0]
    pod, away = hybrid.pod_address(f"web-{leaving}"), f"{hybrid.kube.name}/web-{leaving}"
    inventory = without(tmp_path, leaving)
    rest, urls = hybrid.members - {leaving}, {EDGE: URL, hybrid.client.host: f"http://{hybrid.service_address}/"}
    customers = (estate.edge, hybrid.client)

    def known() -> list[str]:
        """What edge's cluster has of the node and its pod."""
        names = estate.keys(
            EDGE, f"cilium/cache/nodes/v1/{hybrid.kube.name}/", f"cilium/cache/ip/v1/{hybrid.kube.name}/"
        )
        return [name for name in names if name.rsplit("/", 1)[1] in (leaving, pod)]

    assert len(known()) == 2, known()
    kept = {customer: kept_elsewhere(hybrid, customer, urls[customer.host], away) for customer in customers}
    for customer in customers:
        customer.start("leaving-new", urls[customer.host], interval=0.02)
    try:
        play("site", "-e", f"isthmus_prune=host/{leaving}", inventory=inventory)
        hybrid.everywhere(rest, (EDGE, "cloud-1", stays))
        hybrid.until("edge knows neither the node nor its pod", lambda: known() == [])
        for customer in customers:
            result = customer.requests(urls[customer.host], 200)
            assert (result["ok"], away in result["answers"]) == (200, False), result
        play("teardown", "--limit", leaving, "-e", "isthmus_confirm_teardown=lab", inventory=HYBRID)
        hybrid.until(
            "its pod answers pods, as without the mesh",
            lambda: hybrid.client.requests(f"http://{pod}:8080/", 5)["answers"] == {away: 5},
        )
    finally:
        play("site", inventory=HYBRID)
        hybrid.everywhere(hybrid.members, (EDGE, "cloud-1", *hybrid.nodes))
        results = {
            (customer.host, kind): customer.result(name, stop=True)
            for customer in customers
            for kind, name in (("new", "leaving-new"), ("kept", kept[customer]))
        }
    assert {who: r["errors"] for who, r in results.items() if r["failed"]} == {}
    assert {who: r["connections"] for who, r in results.items() if who[1] == "kept" and r["connections"] != 1} == {}
    assert len(known()) == 2, known()
    result = estate.edge.requests(f"http://{pod}:8080/", 50)
    assert (result["answers"], set(result["peers"])) == ({away: 50}, {estate.address(EDGE, "client")}), result


def test_a_run_of_the_cluster_alone_mends_it_and_touches_no_machine(hybrid: Hybrid) -> None:
    """A node and a machine are off their plan: the node is put right, and then there is nothing more to do."""
    spoilt, node, machine = "/etc/isthmus/dnsmasq.conf", hybrid.nodes[-1], "cloud-2"
    own = {host.name for host in hybrid.kube.hosts}
    machines = sorted(hybrid.lab.hosts.keys() - own)
    limit = ("--limit", hybrid.kube.name)
    try:
        for host in (node, machine):
            hybrid.lab.exec(host, ["sh", "-c", f"echo '# spoilt' >> {spoilt}"])
        before = snapshot.take(hybrid.lab, machines)
        run = play("site", *limit, inventory=HYBRID)
        assert (set(run.hosts), set(run.changed)) == (own, {node})
        run = play("site", *limit, inventory=HYBRID)
        assert (set(run.hosts), run.changed) == (own, {})
        assert snapshot.differences(before, snapshot.take(hybrid.lab, machines)) == []
    finally:
        run = play("site", inventory=HYBRID)
    assert set(run.changed) == {machine}


def in_pods(hybrid: Hybrid) -> dict[str, str]:
    """Address -> the label `round`, of every pod that has an address of its own, as Kubernetes says."""
    pods = hybrid.kube.get("pods", "--all-namespaces")["items"]
    return {
        pod["status"]["podIP"]: pod["metadata"].get("labels", {}).get("round", "")
        for pod in pods
        if pod["status"].get("podIP") and not pod["spec"].get("hostNetwork") and pod["status"]["phase"] == "Running"
    }


def rounds(labels: str) -> str:
    """The label `round` among an identity's; "" when it has none."""
    return "".join(text.partition("=")[2] for text in labels.split(";") if text.startswith("k8s:round="))


def identities(hybrid: Hybrid) -> dict[str, dict[str, Any]]:
    """What the registrar has dealt, by number."""
    prefix = "isthmus/v1/alloc/identities/"
    dealt = hybrid.estate.keys("kube-1", prefix)
    return {key.removeprefix(prefix): json.loads(entry.value) for key, entry in dealt.items()}


def published(hybrid: Hybrid, host: str, prefix: str) -> dict[str, str]:
    """What the etcd of a host's cluster has of pods: address -> the label `round` of the published identity."""
    dealt = identities(hybrid)
    found = {}
    for key, entry in hybrid.estate.keys(host, prefix).items():
        document = json.loads(entry.value)
        if ipaddress.ip_address(document["IP"]) in hybrid.kube.cluster.pod_range:
            found[key.removeprefix(prefix)] = rounds(dealt[str(document["ID"])]["labels"])
    return found


def test_300_restarts_leave_no_address_and_no_identity_behind(hybrid: Hybrid) -> None:
    kube, last = hybrid.kube, str(RESTARTS // TOGETHER - 1)
    names = [f"short-{number}" for number in range(TOGETHER)]
    delete = ("delete", "pods", *names, f"--namespace={NAMESPACE}", "--ignore-not-found", "--now")

    def all_published(there: dict[str, str]) -> bool:
        own = published(hybrid, "kube-1", "cilium/state/ip/v1/default/")
        return own == there == published(hybrid, EDGE, f"cilium/cache/ip/v1/{kube.name}/")

    def in_use() -> set[str]:
        return {rounds(each["labels"]) for each in identities(hybrid).values() if each["released"] is None}

    try:
        for turn in range(RESTARTS // TOGETHER):
            kube.kubectl(*delete)
            nodes = [hybrid.nodes[number % len(hybrid.nodes)] for number in range(TOGETHER)]
            values = {"round": turn, "image": TOOLS_IMAGE}
            kube.apply("".join(SHORT.format(number=n, node=node, **values) for n, node in enumerate(nodes)))
        hybrid.until("the last pods run", lambda: [*in_pods(hybrid).values()].count(last) == TOGETHER)
        there = in_pods(hybrid)
        hybrid.until("own and peers' etcd have what is there, with its identity", lambda: all_published(there))
        hybrid.until("no identity of an earlier pod is in use", lambda: in_use() == {"", last})
        # Every host's kernel holds what its agent takes from there, and every node's pods are those that it has.
        play("verify", inventory=HYBRID)
    finally:
        kube.kubectl(*delete)
    hybrid.until("none of them is left", lambda: all_published(in_pods(hybrid)) and in_use() == {""})
    play("verify", inventory=HYBRID)


def test_a_node_reboots_from_last_known_good_while_api_server_and_etcd_are_away(hybrid: Hybrid) -> None:
    """The node, that is: its pods are Kubernetes' to bring back, which needs the API. Meanwhile the agent of the other
    node begins anew, and a pod there notices nothing."""
    estate, control, other, victim = hybrid.estate, "kube-1", hybrid.nodes[0], hybrid.nodes[-1]
    machine = f"http://{estate.address('onprem-1', 'web')}:8080/"
    pod = f"http://{hybrid.pod_address(f'web-{other}')}:8080/"
    known, fallen = hybrid.backends_of(victim), {hybrid.pod_address(f"web-{victim}")}

    def alone(host: str) -> bool:
        return not estate.ask(host, "status")["etcd"]["connected"] and hybrid.backends_of(host) >= known - fallen

    def etcd_back() -> None:
        hybrid.lab.exec(control, ["systemctl", "start", "--no-block", "isthmus-etcd.service"])

    with hybrid.undone(lambda: hybrid.lab.power_on(victim)), hybrid.undone(etcd_back):
        for kind in ("new", "kept"):
            hybrid.client.start(f"away-{kind}", machine, interval=0.02, keep_alive=kind == "kept")
        with hybrid.without_api_server():
            estate.kill_for_good(control, "isthmus-etcd")
            hybrid.lab.exec(other, ["systemctl", "restart", "isthmusd.service"])
            hybrid.lab.reboot(victim, hard=True)
            for host in (other, victim):
                hybrid.until(f"{host}'s agent works without both", lambda host=host: alone(host))  # type: ignore[misc]
            with estate.customer(victim) as customer:
                for url in (machine, pod):
                    result = customer.requests(url, 100)
                    assert (result["ok"], result["errors"]) == (100, {}), url
        results = [hybrid.client.result(f"away-{kind}", stop=True) for kind in ("new", "kept")]
        assert [(result["failed"], result["errors"]) for result in results] == [(0, {}), (0, {})]
        assert results[1]["connections"] == 1
    hybrid.until("its pods are back", lambda: hybrid.ready(f"web-{victim}"), 180)
    hybrid.everywhere(hybrid.members)


def test_what_else_runs_on_nodes_restarts_and_reloads_without_a_failed_request(hybrid: Hybrid) -> None:
    others_on_nodes_restart_under_load(hybrid)


def test_the_story_with_kube_proxy_in_iptables_mode(hybrid: Hybrid) -> None:
    """The mode changes while the mesh is there; what the other mode's rules did to packets is done in this one too."""
    with hybrid.undone(lambda: hybrid.kube.set_proxy_mode(PROXY_MODES[0])):
        hybrid.kube.set_proxy_mode("iptables")
        for node in hybrid.nodes:
            rules = ["iptables", "-t", "nat", "-S", "KUBE-SERVICES"]
            hybrid.until(
                f"kube-proxy on {node} has its rules",
                lambda node=node, rules=rules: "shop/web" in hybrid.lab.exec(node, rules, check=False).stdout,
            )
        for step in HybridStory.STEPS:
            tell(hybrid, step)
        machine_service_in_pods_and_at_a_node_port(hybrid)
        others_on_nodes_restart_under_load(hybrid)
        a_deployment_scales_under_load(hybrid)
        a_node_is_drained_under_load(hybrid)
