# SPDX-License-Identifier: GPL-3.0-or-later
"""Kubernetes clusters in the inventory, the plan, the record and the specs; estates without one stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from isthmus_mesh import jsontext
from isthmus_mesh.model import ModelError, read_model
from isthmus_mesh.planner import Plan
from isthmus_mesh.record import RecordError, merge
from isthmus_mesh.spec import NodeSpec
from unit.mesh.estates import estate, hosts, model, planned

Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def with_kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    """The small estate and a Kubernetes cluster of two nodes and a machine that is none."""
    the_estate, the_hosts = estate(), hosts()
    the_estate["clusters"]["kube"] = {
        "id": 4,
        "workload_ranges": ["10.104.0.0/16"],
        "service_range": "10.114.0.0/16",
        "kubernetes": {
            "api_server": "https://198.18.4.1:6443",
            "pod_ranges": ["10.244.0.0/16"],
            "service_range": "10.96.0.0/16",
        },
        "etcd": {"hosts": ["k1"]},
    }
    for number in (1, 2, 3):
        the_hosts[f"k{number}"] = {"isthmus_cluster": "kube", "ansible_host": f"198.18.4.{number}"}
    the_hosts["k2"]["isthmus_kubernetes_node"] = "worker-2.example"
    the_hosts["k3"]["isthmus_kubernetes_node"] = False
    return the_estate, the_hosts


def nothing(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
    """No edit."""


def replanned(edit: Edit = nothing, previous: Plan | None = None, prune: tuple[str, ...] = ()) -> Plan:
    the_estate, the_hosts = with_kubernetes()
    edit(the_estate, the_hosts)
    return planned(model(the_estate, the_hosts), previous, prune=prune)


def running() -> Plan:
    """What was planned, as it stands when every cluster's etcd has run."""
    found = replanned()
    documents = copy.deepcopy(dict(found.record))
    for name, document in documents.items():
        if name.startswith("clusters/"):
            document["ca_certificate"] = "PEM"
    return replace(found, record=documents)


def refused(edit: Edit, previous: Plan | None = None, prune: tuple[str, ...] = ()) -> str:
    with pytest.raises(ModelError) as caught:
        replanned(edit, previous, prune)
    return str(caught.value)


def outer(the_estate: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = the_estate["clusters"]["kube"]["kubernetes"]
    return found


def test_an_estate_of_machines_is_planned_as_before_there_was_kubernetes() -> None:
    # As the version before wrote it: another value here restarts every agent and rewrites every record.
    found = planned(model())
    assert model().digest() == "4dcc55a79665163e93bc899437da74f76ac210eb6ba08f8c43cf2c0459602361"
    content = {"specs": dict(found.specs), "record": dict(found.record), "before": found.before, "after": found.after}
    digest = sha256(jsontext.canonical(content).encode()).hexdigest()
    assert digest == "4a2ecc9c47d09ba0c80e9fdf954b90c52a969dd21fb13f04c607c78820637c26"


def test_false_says_nothing_about_a_machine() -> None:
    the_hosts = hosts()
    the_hosts["c1"]["isthmus_kubernetes_node"] = False
    assert model(the_hosts=the_hosts).digest() == model().digest()


def test_the_record_of_a_kubernetes_cluster() -> None:
    document = replanned().record["clusters/kube"]
    assert document["kubernetes"] == {
        "api_server": "https://198.18.4.1:6443",
        "pod_ranges": ["10.244.0.0/16"],
        "service_range": "10.96.0.0/16",
    }
    nodes = {host: entry.get("kubernetes_node") for host, entry in document["hosts"].items()}
    assert nodes == {"k1": "k1", "k2": "worker-2.example", "k3": None}
    assert "kubernetes" not in replanned().record["clusters/cloud"]


def test_the_specs_of_its_own_hosts() -> None:
    specs = replanned().specs
    assert specs["k2"]["cluster"]["kubernetes"] == {"pod_ranges4": ["10.244.0.0/16"], "service_range4": "10.96.0.0/16"}
    assert specs["k2"]["node"]["kubernetes_node"] == "worker-2.example"
    assert "kubernetes_node" not in specs["k3"]["node"]
    # Pods are the CNI's there, and ClusterIPs kube-proxy's, which a machine that is no node does not run.
    for host, cluster_ips in (("k1", False), ("k2", False), ("k3", True)):
        assert "10.244.0.0/16" not in specs[host]["mesh_ranges4"]
        assert ("10.96.0.0/16" in specs[host]["service_ranges4"]) is cluster_ips
        assert {"10.104.0.0/16", "10.101.0.0/16"} <= set(specs[host]["mesh_ranges4"])
    assert specs["k1"]["registrar"]["kubernetes"] == {
        "server": "https://198.18.4.1:6443",
        "ca": "/etc/isthmus/pki/kubernetes.ca",
        "cert": "/etc/isthmus/pki/kubernetes.crt",
        "key": "/etc/isthmus/pki/kubernetes.key",
    }
    read = NodeSpec.from_dict(specs["k1"])
    assert read.cluster.kubernetes is not None
    assert read.registrar is not None
    assert read.registrar.kubernetes is not None


def test_which_labels_make_identities_is_said_where_it_is_not_the_default() -> None:
    patterns = ["k8s:app", "!app-revision"]
    found = replanned(lambda e, _h: outer(e).update(identity_labels=patterns))
    assert found.record["clusters/kube"]["kubernetes"]["identity_labels"] == patterns
    spec = found.specs["k1"]
    assert spec["cluster"]["kubernetes"]["identity_labels"] == patterns
    read = NodeSpec.from_dict(spec).cluster.kubernetes
    assert read is not None
    assert read.identity_labels == tuple(patterns)


def test_the_specs_of_other_clusters_hosts() -> None:
    spec = replanned().specs["c1"]
    assert "kubernetes" not in spec["cluster"]
    assert "kubernetes_node" not in spec["node"]
    assert "kubernetes" not in spec["registrar"]
    assert "10.244.0.0/16" in spec["mesh_ranges4"]
    assert {"10.96.0.0/16", "10.114.0.0/16"} <= set(spec["service_ranges4"])
    (peer,) = [peer for peer in spec["registrar"]["peers"] if peer["name"] == "kube"]
    assert peer["workload_ranges4"] == ["10.104.0.0/16", "10.244.0.0/16"]
    assert peer["service_range4"] == "10.114.0.0/16"


def test_the_plan_says_what_is_kubernetes() -> None:
    after = replanned().after
    assert (
        "Kubernetes of cluster kube: API https://198.18.4.1:6443, pods 10.244.0.0/16, ClusterIPs 10.96.0.0/16" in after
    )
    assert "Kubernetes node worker-2.example" in after


def test_a_cluster_of_machines_becomes_a_kubernetes_cluster() -> None:
    def machines(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        del the_estate["clusters"]["kube"]["kubernetes"]
        the_hosts["k2"]["isthmus_kubernetes_node"] = False

    before = replanned(machines)
    after = replanned(previous=before)
    document = after.record["clusters/kube"]
    assert document["revision"] == before.record["clusters/kube"]["revision"] + 1
    assert [host for host, entry in document["hosts"].items() if "kubernetes_node" in entry] == ["k1", "k2"]
    assert any(line.startswith("Kubernetes of cluster kube: new") for line in after.changes)
    assert before.record["clusters/cloud"] == after.record["clusters/cloud"]


def test_planning_again_changes_nothing() -> None:
    again = replanned(previous=running())
    assert again.changes == ()
    assert again.orphans == ()
    assert again.kubernetes_left == ()


def test_a_cluster_that_goes_takes_its_kubernetes_along() -> None:
    found = replanned(lambda e, _h: e["clusters"]["kube"].update(state="absent"), running())
    assert found.removed == ("cluster/kube",)
    assert found.kubernetes_left == ("kube",)
    assert "kubernetes" not in found.record["clusters/kube"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda e, _h: outer(e).update(pod_ranges=["10.101.0.0/20"]),
            (
                "kube.kubernetes.pod_ranges: 10.101.0.0/20 and 10.101.0.0/16 "
                "(isthmus_estate.clusters.onprem.workload_ranges) overlap"
            ),
        ),
        (
            lambda e, _h: outer(e).update(service_range="10.112.0.0/16"),
            "10.112.0.0/16 and 10.112.0.0/16 (isthmus_estate.clusters.cloud.service_range) overlap",
        ),
        (
            lambda e, _h: outer(e).update(service_range="10.244.0.0/20"),
            "10.244.0.0/20 and 10.244.0.0/16 (isthmus_estate.clusters.kube.kubernetes.pod_ranges) overlap",
        ),
        (
            lambda e, _h: outer(e).update(pod_ranges=["198.18.1.0/24"]),
            "host o1.isthmus_underlay: 198.18.1.1 lies in 198.18.1.0/24 (isthmus_estate.clusters.kube.kubernetes.pod_",
        ),
        (
            lambda e, _h: e["clusters"]["cloud"].update(
                kubernetes={"api_server": "https://c", "pod_ranges": ["10.244.9.0/24"], "service_range": "10.97.0.0/16"}
            ),
            (
                "kube.kubernetes.pod_ranges) overlap",
                "10.244.9.0/24 and 10.244.0.0/16",
            ),
        ),
        (
            lambda e, _h: outer(e).update(api_server="https://10.244.0.9:6443"),
            "api_server: 10.244.0.9 lies in 10.244.0.0/16 (isthmus_estate.clusters.kube.kubernetes.pod_ranges)",
        ),
        (lambda e, _h: outer(e).update(api_server="http://198.18.4.1"), "is not an https URL"),
        (lambda e, _h: outer(e).update(api_server="https://198.18.4.1:70000"), "Port out of range"),
        (lambda e, _h: outer(e).pop("pod_ranges"), "kubernetes.pod_ranges: it is missing"),
        (
            lambda e, _h: outer(e).update(identity_labels=["app", "!(x"]),
            "identity_labels[1]: '(x' is no regular expression",
        ),
        (lambda e, _h: outer(e).update(identity_labels=["!"]), "identity_labels[0]: an empty pattern matches nothing"),
        (
            lambda _e, h: h["c1"].update(isthmus_kubernetes_node="c1"),
            "cluster cloud has no `kubernetes`",
        ),
        (lambda _e, h: h["k2"].update(isthmus_kubernetes_node="k1"), "'k1' is also the node that host k1 is"),
        (lambda _e, h: h["k2"].update(isthmus_kubernetes_node="K_2"), "is not a name of a Kubernetes node"),
        (lambda e, _h: outer(e).pop("api_server"), "kubernetes.api_server: it is missing"),
    ],
)
def test_what_the_inventory_must_not_say(edit: Edit, words: str | tuple[str, ...]) -> None:
    told = refused(edit)
    for part in (words,) if isinstance(words, str) else words:
        assert part in told


@pytest.mark.parametrize("url", ["https://10.96.0.1", "https://api.example:6443/", "https://[2001:db8::1]:6443"])
def test_where_the_api_server_may_be(url: str) -> None:
    found = replanned(lambda e, _h: outer(e).update(api_server=url))
    assert found.specs["k1"]["registrar"]["kubernetes"]["server"] == url.rstrip("/")


def test_ranges_of_pods_grow() -> None:
    added = replanned(lambda e, _h: outer(e).update(pod_ranges=["10.244.0.0/16", "10.245.0.0/16"]), running())
    assert added.record["clusters/kube"]["kubernetes"]["pod_ranges"] == ["10.244.0.0/16", "10.245.0.0/16"]
    wider = replanned(lambda e, _h: outer(e).update(pod_ranges=["10.244.0.0/15"]), running())
    assert wider.record["clusters/kube"]["kubernetes"]["pod_ranges"] == ["10.244.0.0/15"]
    assert added.orphans == wider.orphans == ()


@pytest.mark.parametrize(
    ("wanted", "kept", "after"),
    [
        (["10.245.0.0/16"], ["10.245.0.0/16", "10.244.0.0/16"], ["10.245.0.0/16"]),
        (["10.244.0.0/17"], ["10.244.0.0/16"], ["10.244.0.0/17"]),
    ],
)
def test_a_range_of_pods_that_is_left_out_stays_until_it_is_pruned(
    wanted: list[str], kept: list[str], after: list[str]
) -> None:
    def edit(the_estate: dict[str, Any], _hosts: dict[str, Any]) -> None:
        outer(the_estate).update(pod_ranges=wanted)

    orphaned = replanned(edit, running())
    assert orphaned.orphans == ("pods/kube/10.244.0.0/16",)
    assert orphaned.record["clusters/kube"]["kubernetes"]["pod_ranges"] == kept
    pruned = replanned(edit, orphaned, ("pods/kube/10.244.0.0/16",))
    assert pruned.record["clusters/kube"]["kubernetes"]["pod_ranges"] == after
    assert pruned.removed == ("pods/kube/10.244.0.0/16",)
    assert "10.244.0.0/16" in pruned.cuts[0]


def test_an_orphaned_range_of_pods_is_not_given_to_anybody() -> None:
    def edit(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        outer(the_estate).update(pod_ranges=["10.245.0.0/16"])
        the_estate["clusters"]["cloud"]["workload_ranges"].append("10.244.8.0/24")

    told = refused(edit, running())
    assert "cloud: 10.244.8.0/24 overlaps 10.244.0.0/16 of Kubernetes in cluster kube" in told
    assert "isthmus_prune=pods/kube/10.244.0.0/16" in told


def test_the_range_of_cluster_ips_never_moves() -> None:
    told = refused(lambda e, _h: outer(e).update(service_range="10.97.0.0/16"), running())
    assert "10.97.0.0/16 does not hold 10.96.0.0/16, the range in use" in told
    wider = replanned(lambda e, _h: outer(e).update(service_range="10.96.0.0/14"), running())
    assert wider.record["clusters/kube"]["kubernetes"]["service_range"] == "10.96.0.0/14"


def without(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
    del the_estate["clusters"]["kube"]["kubernetes"]
    the_hosts["k2"].pop("isthmus_kubernetes_node")


def test_kubernetes_that_the_inventory_lacks_goes_on() -> None:
    before = running()
    found = replanned(without, before)
    assert found.orphans == ("kubernetes/kube",)
    assert found.record["clusters/kube"]["kubernetes"] == before.record["clusters/kube"]["kubernetes"]
    assert found.specs == before.specs


def test_kubernetes_goes_by_its_name() -> None:
    found = replanned(without, running(), ("kubernetes/kube",))
    document = found.record["clusters/kube"]
    assert "kubernetes" not in document
    assert not [host for host, entry in document["hosts"].items() if "kubernetes_node" in entry]
    assert found.removed == ("kubernetes/kube",)
    assert "2 nodes (k1, k2) stay as machines" in found.cuts[0]
    assert "10.244.0.0/16" not in found.specs["c1"]["mesh_ranges4"]
    assert found.kubernetes_left == ("kube",)
    assert "the inventory still has it" in refused(nothing, running(), ("kubernetes/kube",))


def test_ranges_of_orphans_are_kept_free() -> None:
    def cluster(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        del the_estate["clusters"]["kube"]
        for name in ("k1", "k2", "k3"):
            del the_hosts[name]
        the_estate["clusters"]["cloud"]["workload_ranges"].append("10.96.8.0/24")

    assert "10.96.8.0/24 overlaps 10.96.0.0/16 of cluster kube" in refused(cluster, running())

    def kubernetes(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        without(the_estate, the_hosts)
        the_hosts["c1"]["ansible_host"] = "10.244.0.7"

    told = refused(kubernetes, running())
    assert "host c1.isthmus_underlay: 10.244.0.7 lies in 10.244.0.0/16 of Kubernetes in cluster kube" in told


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document["kubernetes"].pop("pod_ranges"),
        lambda document: document["kubernetes"].update(pod_ranges=["10.244.0.0/40"]),
        lambda document: document["kubernetes"].update(service_range=7),
        lambda document: document["kubernetes"].pop("api_server"),
        lambda document: document["kubernetes"].update(identity_labels="app"),
        lambda document: document.update(kubernetes=[]),
        lambda document: document["hosts"]["k1"].update(kubernetes_node=1),
    ],
)
def test_a_record_with_something_else_is_refused(edit: Callable[[Any], object]) -> None:
    documents = copy.deepcopy(dict(replanned().record))
    edit(documents["clusters/kube"])
    with pytest.raises(RecordError, match="kube"):
        merge([documents])


def test_a_model_says_which_host_is_which_node() -> None:
    found = read_model(*with_kubernetes())
    assert {name: host.kubernetes_node for name, host in found.hosts.items() if host.cluster == "kube"} == {
        "k1": "k1",
        "k2": "worker-2.example",
        "k3": None,
    }
    assert found.hosts["c1"].kubernetes_node is None


def declared(**more: Any) -> Edit:
    def edit(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_estate["services"][0].update({"kubernetes": True, **more})

    return edit


def test_a_service_for_pods_says_so_where_there_are_pods() -> None:
    before, found = replanned(), replanned(declared())
    for cluster in ("cloud", "onprem"):
        assert found.services[cluster] == before.services[cluster]
    (web,) = found.services["kube"]["present"]
    assert web == {**before.services["kube"]["present"][0], "kubernetes": True}
    assert found.specs == before.specs
    # Without it everything is as it was before there was the key.
    assert replanned(declared(kubernetes=False)) == before
    assert "kubernetes" not in before.services["kube"]["present"][0]


def test_a_service_for_pods_needs_a_kubernetes_cluster_and_to_be_global() -> None:
    where = "isthmus_estate.services[0] (shop/web).kubernetes"
    told = refused(declared(clusters=["cloud", "onprem"]))
    assert f"{where}: none of its clusters (cloud, onprem) is a Kubernetes cluster" in told
    assert f"{where}: it goes with `global: true` only" in refused(declared(**{"global": False}))
    assert replanned(declared(clusters=["kube"])).services["kube"]["present"][0]["kubernetes"] is True
    replanned(declared(clusters=["cloud"], state="absent"))
