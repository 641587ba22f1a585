# SPDX-License-Identifier: GPL-3.0-or-later
"""What is ours in Kubernetes, whose a name is, and which API is a cluster's: the pure parts."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.filter.run_outcome import run_outcome
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_access as access
from ansible_collections.isthmus.mesh.plugins.module_utils.kubernetes_api import wrong_cluster
from ansible_collections.isthmus.mesh.plugins.modules import kubernetes_probe

OWN = access.labels("lab", "kube")


def record(**hosts: tuple[str, str]) -> dict[str, Any]:
    """A cluster's document: node and underlay address of each host."""
    return {
        "name": "kube",
        "hosts": {
            host: {"underlay4": address, "advertise4": address, **({"kubernetes_node": node} if node else {})}
            for host, (node, address) in hosts.items()
        },
        "kubernetes": {"pod_ranges": ["10.244.0.0/16"], "service_range": "10.96.0.0/16"},
    }


def node(name: str, address: str, pods: str = "10.244.0.0/24") -> dict[str, Any]:
    addresses = [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": address}]
    return {
        "metadata": {"name": name},
        "spec": {"podCIDR": pods, "podCIDRs": [pods]},
        "status": {"addresses": addresses},
    }


def test_the_name_of_a_registrar_goes_with_its_key() -> None:
    one, other = access.registrar_user("kube-1", b"key"), access.registrar_user("kube-1", b"another")
    assert one != other
    assert access.host_of(one) == access.host_of(other) == "kube-1"
    longest = "h" * 50  # what the inventory allows
    name = access.registrar_user(longest, b"key")
    assert len(name) == 64
    assert access.host_of(name) == longest
    for stranger in ("admin", "system:node:kube-1", "isthmus:kube-1", "isthmus-registrar"):
        assert access.host_of(stranger) == ""


def test_who_may_read_afterwards() -> None:
    users = {host: access.registrar_user(host, b"old") for host in ("k1", "k2", "lost")}
    binding = access.cluster_role_binding(OWN, [*users.values(), "somebody"])
    new = access.registrar_user("k1", b"new")
    # k1 has another key, k2 is in no batch of this run, `lost` is no member any more, and the rest was never ours.
    assert access.users_after(binding, ["k1", "k2"], {"k1": new}) == {new, users["k2"]}
    assert access.users_after(None, ["k1", "k2"], {"k1": new}) == {new}


def test_the_role_reads_and_writes_services_and_their_endpoints_and_nothing_else() -> None:
    read, write = {"get", "list", "watch"}, {"create", "patch", "delete"}
    rules = access.cluster_role(OWN)["rules"]
    allowed = {resource: set(rule["verbs"]) for rule in rules for resource in rule["resources"]}
    assert allowed == {
        "nodes": read,
        "namespaces": read,
        "pods": read,
        "services": read | write,
        "endpointslices": read | write,
    }
    # Kubernetes lets nobody give more than he has, so an operator is asked for the same.
    given = {(resource, verb) for verb, _group, resource, _name in access.GIVEN}
    assert given == {(resource, verb) for resource, verbs in allowed.items() for verb in verbs}


def test_where_an_object_of_a_list_is() -> None:
    one = {"metadata": {"name": "db", "namespace": "shop"}}
    assert access.place("/api/v1/services", one) == ("/api/v1/namespaces/shop/services/db", "shop/db")
    path = "/apis/discovery.k8s.io/v1/endpointslices"
    assert access.place(path, one)[0] == "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices/db"
    assert access.place("/c/clusterroles", {"metadata": {"name": "x"}}) == ("/c/clusterroles/x", "x")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (OWN, ""),
        ({**OWN, "more": "yes"}, ""),
        (None, "somebody else's"),
        ({"app.kubernetes.io/managed-by": "Helm"}, "somebody else's"),
        (access.labels("lab", "other"), "that of cluster other of the estate lab"),
        (access.labels("prod", "kube"), "that of cluster kube of the estate prod"),
    ],
)
def test_whose_an_object_is(labels: dict[str, str] | None, words: str) -> None:
    told = access.stranger({"metadata": {"labels": labels}}, OWN)
    assert told.startswith(words)
    assert bool(told) is bool(words)


KUBE = record(k1=("k1", "198.18.4.11"), k2=("worker-2", "198.18.4.12"), m1=("", "198.18.4.13"))


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("k1", "198.18.4.11"), node("other", "192.0.2.1")], ""),
        ([node("k1", "192.0.2.1"), node("worker-2", "198.18.4.12")], ""),  # one was made anew meanwhile
        ([node("x", "198.18.4.11")], "its nodes are x, and the hosts of the inventory are the nodes k1, worker-2"),
        ([], "its nodes are none"),
        ([node("k1", "192.0.2.1")], "node k1 has 192.0.2.1, host k1 198.18.4.11"),
    ],
)
def test_which_api_is_the_clusters(nodes: list[dict[str, Any]], words: str) -> None:
    told = wrong_cluster("https://api", nodes, KUBE, [])
    assert words in told
    assert bool(told) is bool(words)


def test_a_host_with_several_addresses_is_known_by_each() -> None:
    nodes = [node("k1", "192.0.2.1")]
    assert wrong_cluster("https://api", nodes, KUBE, [{"host": "k1", "addresses": ["192.0.2.1", "10.0.0.1"]}]) == ""
    assert wrong_cluster("https://api", nodes, KUBE, [{"host": "k2", "addresses": ["192.0.2.1"]}]) != ""


def test_a_cluster_of_which_no_host_is_a_node_cannot_be_told() -> None:
    assert wrong_cluster("https://api", [node("x", "192.0.2.1")], record(m1=("", "198.18.4.13")), []) == ""


def test_hosts_that_are_no_nodes_and_nodes_that_are_no_hosts() -> None:
    nodes = [node("k1", "198.18.4.11"), node("two", "198.18.4.12")]
    (found,) = kubernetes_probe.node_findings(nodes, KUBE)
    assert "Host k2 is to be the node worker-2" in found
    assert "it is the node two by its address. Set isthmus_kubernetes_node" in found
    (stranger,) = kubernetes_probe.unknown_nodes(nodes, KUBE)
    assert "The inventory does not know two, " in stranger
    known = [node("k1", "198.18.4.11"), node("worker-2", "192.0.2.9")]
    assert kubernetes_probe.node_findings(known, KUBE) == kubernetes_probe.unknown_nodes(known, KUBE) == []


def test_ranges_that_are_not_the_declared_ones() -> None:
    nodes = [node("k1", "198.18.4.11"), node("k2", "198.18.4.12", "10.245.0.0/24"), node("k3", "x", "fd00:1::/64")]
    (pods,) = kubernetes_probe.range_findings(nodes, {"spec": {"clusterIP": "10.96.0.1"}}, KUBE)
    assert "10.245.0.0/24 of k2" in pods
    assert "isthmus_estate.clusters.kube.kubernetes.pod_ranges (10.244.0.0/16)" in pods
    (service,) = kubernetes_probe.range_findings(nodes[:1], {"spec": {"clusterIP": "10.43.0.1"}}, KUBE)
    assert "10.43.0.1, which is not in" in service
    for unknown in (None, {"spec": {"clusterIP": "fd00::1"}}):
        assert kubernetes_probe.range_findings(nodes[:1], unknown, KUBE) == []
    without = {"metadata": {"name": "new"}, "spec": {}}  # a node that got no range yet
    assert kubernetes_probe.range_findings([without], None, KUBE) == []


def test_what_is_pending_is_told() -> None:
    members = [
        {
            "inventory_hostname": "k1",
            "isthmus_cluster": "kube",
            "__preflight_kubernetes": {"pending": ""},
            "__kubernetes_access": {"pending": "https://api does not answer"},
            "__site_left": {
                "results": [
                    {"site_place": {"cluster": "gone"}, "removed": ["clusterrole/x"], "pending": ""},
                    {"site_place": {"cluster": "away"}, "removed": [], "pending": "https://away does not answer"},
                    {"site_place": {"cluster": "wrong"}, "msg": "no right"},
                ]
            },
        }
    ]
    told = run_outcome(members, left=["away", "gone", "wrong", "lost"])["pending"]
    assert "Pending: Kubernetes of cluster kube was not asked" in told[0]
    assert "https://api does not answer" in told[0]
    assert [line.split()[4] for line in told[1:-1]] == ["away", "lost", "wrong"]
    assert "the inventory has none of its etcd hosts" in told[2]
    assert "kubectl delete clusterrolebinding,clusterrole,csr,service,endpointslice -A -l app" in told[3]
    assert run_outcome([{**members[0], "__kubernetes_access": {"pending": ""}, "__site_left": {}}])["pending"] == []


def test_what_was_heard_last_of_kubernetes_counts() -> None:
    silent, answered = {"pending": "https://api does not answer"}, {"pending": ""}
    one = {"inventory_hostname": "k1", "isthmus_cluster": "kube", "__preflight_kubernetes": silent}
    assert run_outcome([one])["pending"] != []
    assert run_outcome([one, {**one, "inventory_hostname": "k2", "__kubernetes_access": answered}])["pending"] == []


def test_a_host_is_not_silent_because_the_one_is_from_which_kubernetes_is_asked() -> None:
    one = {"inventory_hostname": "k1", "isthmus_cluster": "kube", "__kubernetes_access": {"unreachable": True}}
    told = run_outcome([one])
    assert told["silent"] == []
    assert "its isthmus_api_host cannot be entered" in told["pending"][0]
    assert run_outcome([{**one, "__kubernetes_credential": {"unreachable": True}}])["silent"] == ["k1"]
