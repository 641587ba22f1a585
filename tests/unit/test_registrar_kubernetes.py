# SPDX-License-Identifier: GPL-3.0-or-later
"""What a Kubernetes cluster publishes: as Cilium would, one change for one change, and nothing withdrawn unread."""

from __future__ import annotations

import contextlib
import copy
import json
from ipaddress import IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.registrar.kubernetes.catalog import Catalog, Changes
from isthmus_agent.registrar.kubernetes.objects import (
    KINDS,
    NAMESPACES,
    NODES,
    PODS,
    SERVICES,
    SLICES,
    TRANSLATION,
    ObjectError,
    facts,
    key_of,
)
from isthmus_agent.registrar.publish import (
    Inputs,
    Own,
    PeerServices,
    Publication,
    Publisher,
    apply_changes,
    difference,
    owned_prefixes,
    publish,
)
from isthmus_mesh import keys, ownership
from isthmus_mesh.documents import NodeReport, ServiceDefinition, ServicePort, WorkloadReport
from isthmus_mesh.identity import LabelFilter, pod_labels
from kubernetes_objects import endpoint, endpoint_slice, namespace, node, pod, service
from unit.hostile import hostile

OWN = Own("kube", 4, 255, IPv4Network("10.114.0.0/24"), (IPv4Network("10.244.0.0/16"),), IPv4Network("10.96.0.0/16"))
NOW, LATER = "2026-01-02T03:04:05Z", "2026-01-03T03:04:05Z"


def host(number: int, **more: Any) -> dict[str, Any]:
    return {
        "range4": f"10.104.{number}.0/28",
        "mesh4": f"10.104.{number}.1",
        "underlay4": f"198.18.4.{10 + number}",
        "advertise4": f"198.18.4.{10 + number}",
        "state": "present",
        "labels": {},
        "workloads": {},
        "kubernetes_node": f"kube-{number}",
        **more,
    }


MACHINE = {"address4": "10.104.3.2", "labels": {"app": "web"}, "cgroup": {"unit": "web.service"}}
RECORD = {
    "hosts": {
        "kube-1": host(1),
        "kube-2": host(2),
        "vm": host(3, kubernetes_node=None, workloads={"shop/web": MACHINE}),
    }
}
NODE_REPORTS = {
    keys.node_report_key(name): NodeReport(name, "kube", (), entry["range4"], None, entry["mesh4"], mtu=1500)
    .to_json()
    .encode()
    for name, entry in RECORD["hosts"].items()
}
WORKLOADS = {
    keys.workload_key("vm", "shop", "web"): WorkloadReport(
        "web", "shop", "vm", addresses=("10.104.3.2",), host_ip="198.18.4.13", services={"shop/web": True}
    )
    .to_json()
    .encode()
}
DEFINITION = {
    keys.service_definition_key("shop", "web"): ServiceDefinition(
        "web", "shop", (ServicePort("http", 80, 9090),), {"app": "web"}, is_global=True, affinity="remote"
    )
    .to_json()
    .encode()
}


def objects() -> dict[str, list[dict[str, Any]]]:
    return {
        NODES: [node("kube-1", "10.244.1.0/24", "198.18.4.11"), node("kube-2", "10.244.2.0/24", "198.18.4.12")],
        NAMESPACES: [namespace("shop", team="a")],
        PODS: [pod("web-1", "10.244.1.2"), pod("web-2", "10.244.2.2", "kube-2")],
        SERVICES: [service("web", "10.96.0.10")],
        SLICES: [endpoint_slice("web", endpoint("10.244.1.2"), endpoint("10.244.2.2", "kube-2"))],
    }


def catalog_of(content: dict[str, list[dict[str, Any]]]) -> Catalog:
    catalog = Catalog("kube")
    for kind in KINDS:
        listed = [key for entry in content[kind] if (key := catalog.put(kind, entry)) is not None]
        catalog.retain(kind, listed)
    return catalog


def inputs(catalog: Catalog | None, previous: dict[str, str] | None = None, **more: Any) -> Inputs:
    given: dict[str, Any] = {"nodes": NODE_REPORTS, "workloads": WORKLOADS, "services": {}, "now": NOW, **more}
    return Inputs(record=RECORD, previous=previous or {}, kubernetes=catalog, **given)


def run(content: dict[str, list[dict[str, Any]]], previous: dict[str, str] | None = None, **more: Any) -> Publication:
    return publish(OWN, inputs(catalog_of(content), previous, **more))


def value(found: Publication, key: str) -> Any:
    return json.loads(found.keys[key])


WEB = keys.service_key("kube", "shop", "web")
VIP = keys.vip_key("shop", "web")


def test_a_host_says_whether_it_is_a_node() -> None:
    """What pods send to a machine's underlay address goes over the overlay, to a node's as the CNI has it."""
    found = run(objects())
    said = {
        name: value(found, keys.node_key("kube", name))["Annotations"]["isthmus.io/kubernetes-node"]
        for name in RECORD["hosts"]
    }
    assert said == {"kube-1": "kube-1", "kube-2": "kube-2", "vm": ""}


def test_exact_keys_and_values() -> None:
    found = run(objects())
    assert found.problems == ()
    assert sorted(found.keys) == [
        "cilium/state/identities/v1/id/262145",
        "cilium/state/identities/v1/id/262146",
        "cilium/state/ip/v1/default/10.104.3.2",
        "cilium/state/ip/v1/default/10.244.1.2",
        "cilium/state/ip/v1/default/10.244.2.2",
        "cilium/state/nodes/v1/kube/kube-1",
        "cilium/state/nodes/v1/kube/kube-2",
        "cilium/state/nodes/v1/kube/vm",
        "cilium/state/services/v1/kube/shop/web",
        "isthmus/v1/alloc/identities/262145",
        "isthmus/v1/alloc/identities/262146",
        "isthmus/v1/alloc/vips/shop/web",
    ]
    assert found.keys["cilium/state/identities/v1/id/262145"] == (
        "k8s:app=web;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop;"
        "k8s:io.cilium.k8s.namespace.labels.team=a;k8s:io.cilium.k8s.policy.cluster=kube;"
        "k8s:io.cilium.k8s.policy.serviceaccount=default;k8s:io.kubernetes.pod.namespace=shop;"
    )
    assert value(found, "cilium/state/ip/v1/default/10.244.2.2") == {
        "IP": "10.244.2.2",
        "Mask": None,
        "HostIP": "198.18.4.12",
        "ID": 262145,
        "Key": 0,
        "Metadata": "",
        "K8sNamespace": "shop",
        "K8sPodName": "web-2",
        "K8sServiceAccount": "default",
        "NamedPorts": [{"Name": "http", "Port": 8080, "Protocol": "TCP"}],
    }
    published = value(found, "cilium/state/nodes/v1/kube/kube-1")
    assert published["IPv4AllocCIDR"] == {"IP": "10.104.1.0", "Mask": "////8A=="}
    assert published["IPv4SecondaryAllocCIDRs"] == [{"IP": "10.244.1.0", "Mask": "////AA=="}]
    assert value(found, "cilium/state/nodes/v1/kube/vm")["IPv4SecondaryAllocCIDRs"] is None
    assert value(found, WEB) == {
        "cluster": "kube",
        "namespace": "shop",
        "name": "web",
        "frontends": {"10.96.0.10": {"http": {"Protocol": "TCP", "Port": 80}}},
        "backends": {
            "10.244.1.2": {"http": {"Protocol": "TCP", "Port": 8080}},
            "10.244.2.2": {"http": {"Protocol": "TCP", "Port": 8080}},
        },
        "labels": {"team": "a"},
        "selector": {"app": "web"},
        "includeExternal": True,
        "shared": True,
        "clusterID": 4,
    }
    assert value(found, VIP) == {
        "ipv4": "10.96.0.10",
        "ipv6": None,
        "released": None,
        "by": "kubernetes",
        "affinity": "none",
        "kept": None,
    }


def test_second_run_changes_nothing() -> None:
    first = run(objects())
    assert run(objects(), first.keys, now=LATER) == first


LABELS = {
    "app": True,
    "app.kubernetes.io/name": True,
    "example.com/tier": True,
    "my.kubernetes.io/x": True,
    "kubernetes.io/hostname": False,
    "io.kubernetes.x": False,
    "io.cilium.k8s.policy.cluster": False,
    "io.cilium.k8s.namespace.labels.team": False,
    "k8s.io/x": False,
    "topology.kubernetes.io/zone": False,
    "beta.kubernetes.io/arch": False,
    "node.beta.kubernetes.io/x": False,
    "pod-template-hash": False,
    "pod-template-generation": False,
    "controller-revision-hash": False,
    "controller-uid": False,
    "batch.kubernetes.io/controller-uid": False,
    "batch.kubernetes.io/job-name": True,
    "statefulset.kubernetes.io/pod-name": False,
    "apps.kubernetes.io/pod-index": False,
    "etcd_node": False,
}


@pytest.mark.parametrize(("label", "counts"), LABELS.items())
def test_which_labels_make_an_identity(label: str, counts: bool) -> None:
    """protocol: pkg/labelsfilter/filter.go, the default filter."""
    found = pod_labels({label: "forged"}, "shop", {}, "default", "kube")
    assert ("forged" in found.values()) == counts
    assert found["k8s:io.cilium.k8s.policy.cluster"] == "kube"
    assert found["k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name"] == "shop"


FILTERS = {
    "!job-name": {
        "app": True,
        "job-name": False,
        "job-name-x": False,
        "app.kubernetes.io/name": True,
        "k8s.io/x": False,
    },
    "app": {"app": True, "app-x": True, "tier": False, "app.kubernetes.io/name": True, "k8s.io/x": False},
    "k8s:app$": {"app": True, "app-x": False, "tier": False},
    "k8s.io/x": {"app": False, "k8s.io/x": True, "k8s.io/y": False},
    "app !app-x": {"app": True, "app-x": False, "app-xy": False, "tier": False},
    "!app app-x": {"app": False, "app-x": True, "app-y": False, "tier": False},
    "!io\\.cilium\\.k8s\\.namespace\\.labels\\.team": {"app": True, "namespace team": False, "namespace other": True},
    "tier": {"namespace team": True, "io.cilium.k8s.policy.cluster": False},
}


@pytest.mark.parametrize(
    ("patterns", "label", "counts"),
    [(patterns, label, counts) for patterns, labels in FILTERS.items() for label, counts in labels.items()],
)
def test_a_filter_says_which_labels_make_an_identity(patterns: str, label: str, counts: bool) -> None:
    """As Cilium's setting `labels` (pkg/labelsfilter/filter.go)."""
    name = label.removeprefix("namespace ")
    own, of_namespace = ({}, {name: "said"}) if name != label else ({name: "said"}, {})
    found = pod_labels(own, "shop", of_namespace, "default", "kube", LabelFilter(patterns.split()))
    assert ("said" in found.values()) == counts
    assert found["k8s:io.cilium.k8s.policy.cluster"] == "kube"
    assert found["k8s:io.kubernetes.pod.namespace"] == "shop"
    assert found["k8s:io.cilium.k8s.policy.serviceaccount"] == "default"


def test_pods_that_differ_in_a_label_that_does_not_count_are_one_identity() -> None:
    catalog = Catalog("kube", label_filter=LabelFilter(["!app"]))
    for name in ("a", "b"):
        catalog.put(PODS, pod(name, "10.244.1.2", labels={"app": name, "tier": "x"}))
    assert catalog.labels(("shop", "a")) == catalog.labels(("shop", "b"))
    assert "tier=x" in catalog.labels(("shop", "a"))


NOT_PUBLISHED = {
    "host network": lambda p: p["spec"].update(hostNetwork=True),
    "done": lambda p: p["status"].update(phase="Succeeded"),
    "failed": lambda p: p["status"].update(phase="Failed"),
    "not scheduled": lambda p: p["spec"].pop("nodeName"),
    "no address yet": lambda p: p["status"].pop("podIPs"),
    "IPv6 only": lambda p: p["status"].update(podIPs=[{"ip": "fd00::1"}]),
}


@pytest.mark.parametrize("how", NOT_PUBLISHED.values(), ids=NOT_PUBLISHED)
def test_pods_without_an_address_of_their_own(how: Any) -> None:
    content = objects()
    how(content[PODS][0])
    found = run(content)
    assert keys.ip_key("10.244.1.2") not in found.keys
    assert keys.ip_key("10.244.2.2") in found.keys
    assert found.problems == ()


def test_pods_of_strange_nodes_and_of_strange_ranges_are_named() -> None:
    content = objects()
    content[PODS] += [pod("a", "10.244.9.2", "stranger"), pod("b", "10.244.9.3", "stranger"), pod("c", "172.16.0.1")]
    content[SLICES] = [endpoint_slice("web", endpoint("10.244.9.2", "stranger"), endpoint("10.244.1.2"))]
    content[NODES][1] = node("kube-2", "172.16.0.0/24", "198.18.4.12")
    found = run(content)
    assert [(problem.key, problem.reason) for problem in found.problems] == [
        (
            "kubernetes nodes kube-2",
            "its pod CIDR 172.16.0.0/24 is not in 10.244.0.0/16, the estate's kubernetes.pod_ranges",
        ),
        (
            "kubernetes nodes stranger",
            "addresses of 2 pods are not published: no host of the estate has this isthmus_kubernetes_node",
        ),
        (
            "kubernetes pods shop/c",
            "its address 172.16.0.1 is not in 10.244.0.0/16, the estate's kubernetes.pod_ranges",
        ),
        ("kubernetes services shop/web", "1 endpoints are on no host of the mesh, 10.244.9.2 for one"),
    ]
    assert {key for key in found.keys if "/ip/" in key} == {
        keys.ip_key(address) for address in ("10.104.3.2", "10.244.1.2", "10.244.2.2")
    }
    assert list(value(found, WEB)["backends"]) == ["10.244.1.2"]
    assert value(found, "cilium/state/nodes/v1/kube/kube-2")["IPv4SecondaryAllocCIDRs"] is None


def test_pods_of_a_host_that_is_not_published_wait_for_it() -> None:
    reports = {key: text for key, text in NODE_REPORTS.items() if not key.endswith("kube-2")}
    found = run(objects(), nodes=reports)
    assert keys.ip_key("10.244.2.2") not in found.keys
    assert any("its host kube-2 has not reported yet" in problem.reason for problem in found.problems)


ANNOTATIONS = {
    "none": ({}, None),
    "global": ({"service.cilium.io/global": "true"}, (True, "none")),
    "older global": ({"io.cilium/global-service": "True"}, (True, "none")),
    "not global": ({"service.cilium.io/global": "false"}, None),
    "the newer name counts": ({"service.cilium.io/global": "false", "io.cilium/global-service": "true"}, None),
    "not shared": ({"service.cilium.io/global": "true", "service.cilium.io/shared": "false"}, (False, "none")),
    "older shared": ({"io.cilium/global-service": "true", "io.cilium/shared-service": "false"}, (False, "none")),
    "shared without global": ({"service.cilium.io/shared": "true"}, None),
    "affinity": ({"service.cilium.io/global": "true", "service.cilium.io/affinity": "Local"}, (True, "local")),
    "older affinity": ({"io.cilium/global-service": "true", "io.cilium/service-affinity": "remote"}, (True, "remote")),
    "unknown affinity": ({"service.cilium.io/global": "true", "service.cilium.io/affinity": "x"}, (True, "none")),
}


@pytest.mark.parametrize(("annotations", "means"), ANNOTATIONS.values(), ids=ANNOTATIONS)
def test_annotations(annotations: dict[str, str], means: tuple[bool, str] | None) -> None:
    content = objects()
    content[SERVICES][0]["metadata"]["annotations"] = annotations
    found = run(content)
    assert (WEB in found.keys) == (VIP in found.keys) == (means is not None)
    if means is not None:
        assert (value(found, WEB)["shared"], value(found, VIP)["affinity"]) == means


SESSIONS = {
    "none": ({"sessionAffinity": "None"}, None),
    "by default": ({"sessionAffinity": "ClientIP"}, 10_800),
    "said": ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}}, 5),
    "beyond what is allowed": (
        {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 90_000}}},
        10_800,
    ),
    "not asked for": ({"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}}, None),
}


@pytest.mark.parametrize(("spec", "seconds"), SESSIONS.values(), ids=SESSIONS)
def test_session_affinity(spec: dict[str, Any], seconds: int | None) -> None:
    content = objects()
    content[SERVICES][0]["spec"] |= spec
    assert value(run(content), VIP).get("session_affinity") == seconds


ENDPOINTS = {
    "ready": ([{"ready": True}, {"ready": False}], [0]),
    "unknown is ready": ([{}, {"ready": None}], [0, 1]),
    "terminating, and one ready": ([{"ready": True}, {"ready": False, "serving": True, "terminating": True}], [0]),
    "only terminating": (
        [{"ready": False, "serving": True, "terminating": True}, {"ready": False, "serving": False}],
        [0],
    ),
    "nothing serves": ([{"ready": False, "serving": False}, {"ready": False}], []),
    "not ready addresses are published": ([{"ready": True, "serving": False}], [0]),
}


@pytest.mark.parametrize(("conditions", "used"), ENDPOINTS.values(), ids=ENDPOINTS)
def test_which_endpoints_are_backends(conditions: list[dict[str, Any]], used: list[int]) -> None:
    content = objects()
    entries = [endpoint(f"10.244.1.{number}") for number in range(len(conditions))]
    for entry, condition in zip(entries, conditions, strict=True):
        entry["conditions"] = condition
    content[SLICES] = [endpoint_slice("web", *entries)]
    assert list(value(run(content), WEB)["backends"]) == [f"10.244.1.{number}" for number in used]


def test_headless_has_no_address_and_names_its_endpoints() -> None:
    content = objects()
    content[SERVICES] = [service("web", None)]
    content[SLICES][0]["endpoints"][0]["hostname"] = "web-0"
    found = run(content)
    assert value(found, WEB)["frontends"] == {}
    assert value(found, WEB)["hostnames"] == {"10.244.1.2": "web-0"}
    assert value(found, VIP)["ipv4"] is None


def test_several_ports_and_several_slices() -> None:
    content = objects()
    content[SERVICES][0]["spec"]["ports"].append({"name": "dns", "protocol": "UDP", "port": 53})
    more = endpoint_slice("web", endpoint("10.244.2.2", "kube-2"), name="web-y")
    more["ports"] = [{"name": "dns", "protocol": "UDP", "port": 5353}, {"name": "any", "port": None}]
    content[SLICES].append(more)
    found = value(run(content), WEB)
    assert found["frontends"]["10.96.0.10"] == {
        "dns": {"Protocol": "UDP", "Port": 53},
        "http": {"Protocol": "TCP", "Port": 80},
    }
    assert list(found["backends"]["10.244.1.2"]) == ["http"]
    assert found["backends"]["10.244.2.2"] == {
        "dns": {"Protocol": "UDP", "Port": 5353},
        "http": {"Protocol": "TCP", "Port": 8080},
    }


def test_a_backend_of_the_host_network_has_its_nodes_mesh_address() -> None:
    content = objects()
    content[SLICES] = [endpoint_slice("web", endpoint("198.18.4.12", "kube-2"), endpoint("198.18.9.9", None))]
    found = run(content)
    assert list(value(found, WEB)["backends"]) == ["10.104.2.1"]
    assert [problem.reason for problem in found.problems] == [
        "1 endpoints are on no host of the mesh, 198.18.9.9 for one"
    ]


def test_an_address_outside_the_clusters_own_range_is_not_taken() -> None:
    content = objects()
    content[SERVICES] = [service("web", "10.114.0.1")]
    found = run(content)
    assert value(found, WEB)["frontends"] == {}
    assert any("10.114.0.1 is not in 10.96.0.0/16" in problem.reason for problem in found.problems)


def test_of_two_pods_with_one_address_the_one_that_stays_has_it() -> None:
    content = objects()
    old, new = pod("old", "10.244.1.9"), pod("new", "10.244.1.9")
    old["metadata"]["creationTimestamp"] = "2026-01-02T04:00:00Z"
    old["metadata"]["deletionTimestamp"] = "2026-01-02T05:00:00Z"
    content[PODS] += [new, old]
    catalog = catalog_of(content)
    assert value(publish(OWN, inputs(catalog)), keys.ip_key("10.244.1.9"))["K8sPodName"] == "new"
    catalog.remove(PODS, ("shop", "new"))
    assert value(publish(OWN, inputs(catalog)), keys.ip_key("10.244.1.9"))["K8sPodName"] == "old"


def test_a_service_of_machines_and_pods_is_one() -> None:
    """The Service's address and ports, both worlds' backends, the Service's affinity."""
    found = run(objects(), services=DEFINITION)
    assert found.problems == ()
    assert list(value(found, WEB)["frontends"]) == ["10.96.0.10"]
    assert value(found, WEB)["backends"]["10.104.3.2"] == {"http": {"Protocol": "TCP", "Port": 9090}}
    assert len(value(found, WEB)["backends"]) == 3
    assert value(found, VIP)["ipv4"] == "10.96.0.10"


def test_an_address_of_ours_comes_back_when_the_kubernetes_service_goes() -> None:
    without = {**objects(), SERVICES: []}
    first = run(without, services=DEFINITION)
    assert value(first, VIP)["ipv4"] == "10.114.0.1"
    both = run(objects(), first.keys, services=DEFINITION)
    assert (value(both, VIP)["ipv4"], value(both, VIP)["kept"]) == ("10.96.0.10", "10.114.0.1")
    other = {
        keys.service_definition_key("shop", "a"): ServiceDefinition(
            "a", "shop", (ServicePort("http", 80, 80),), {"app": "a"}
        )
        .to_json()
        .encode()
    }
    third = run(objects(), both.keys, services={**DEFINITION, **other})
    assert value(third, keys.vip_key("shop", "a"))["ipv4"] == "10.114.0.2"
    assert value(run(without, third.keys, services=DEFINITION), VIP) == {
        "ipv4": "10.114.0.1",
        "ipv6": None,
        "released": None,
    }


FOR_PODS = {
    key: ServiceDefinition(
        "web",
        "shop",
        (ServicePort("http", 80, 9090),),
        {"app": "web"},
        is_global=True,
        labels={"tier": "front"},
        kubernetes=True,
    )
    .to_json()
    .encode()
    for key in DEFINITION
}


def ours() -> dict[str, list[dict[str, Any]]]:
    """A Service that the registrar made, with a slice of its own."""
    found = service("web", "10.96.0.10")
    found["metadata"]["labels"] = {"tier": "front", **ownership.labels("", "kube")}
    del found["spec"]["selector"]
    slice_ = endpoint_slice("web", endpoint("10.102.1.2", None), endpoint("10.104.3.2", None))
    slice_["metadata"]["labels"] |= {
        "endpointslice.kubernetes.io/managed-by": "isthmus-registrar",
        **ownership.labels("", "kube"),
    }
    return {**objects(), SERVICES: [found], SLICES: [slice_]}


def test_a_service_that_we_made_has_kubernetes_address_and_the_machines_backends() -> None:
    found = run(ours(), services=FOR_PODS)
    assert found.problems == ()
    assert value(found, WEB)["frontends"] == {"10.96.0.10": {"http": {"Protocol": "TCP", "Port": 80}}}
    assert list(value(found, WEB)["backends"]) == ["10.104.3.2"]  # and not what we wrote ourselves
    assert (value(found, WEB)["labels"], value(found, WEB)["selector"]) == ({"tier": "front"}, {"app": "web"})
    assert (value(found, VIP)["ipv4"], value(found, VIP)["kept"]) == ("10.96.0.10", None)


def test_no_address_of_ours_is_dealt_for_the_moment_until_it_is_a_service() -> None:
    without = {**objects(), SERVICES: []}
    found = run(without, services=FOR_PODS)
    assert VIP not in found.keys
    assert value(found, WEB)["frontends"] == {}
    # It cannot become one for now, or nobody knows: machines have it all the same.
    refused = run(without, found.keys, services=FOR_PODS, unwritable=frozenset(["shop/web"]))
    assert value(refused, VIP)["ipv4"] == "10.114.0.1"
    assert value(publish(OWN, inputs(Catalog("kube"), services=FOR_PODS)), VIP)["ipv4"] == "10.114.0.1"
    # What it has it keeps until there is another one.
    again = run(without, refused.keys, services=FOR_PODS)
    assert value(again, VIP)["ipv4"] == "10.114.0.1"
    assert value(run(ours(), again.keys, services=FOR_PODS), VIP)["ipv4"] == "10.96.0.10"


def test_a_service_that_we_made_ends_with_its_definition_though_the_api_still_has_it() -> None:
    first = run(ours(), services=FOR_PODS)
    gone = run(ours(), first.keys)
    assert WEB not in gone.keys
    assert VIP not in gone.keys
    assert value(run(ours(), first.keys, services=DEFINITION), VIP)["ipv4"] == "10.114.0.1"
    # A definition that cannot be read ends nothing.
    assert value(run(ours(), first.keys, services=dict.fromkeys(FOR_PODS, b"{")), VIP)["ipv4"] == "10.96.0.10"


def test_following_the_moment_in_which_it_becomes_a_service() -> None:
    catalog = catalog_of({**objects(), SERVICES: [], SLICES: []})
    publisher = Publisher(OWN, inputs(catalog, services=FOR_PODS))
    published = dict(publisher.run().keys)
    catalog.take()
    for kind in (SERVICES, SLICES):
        catalog.put(kind, ours()[kind][0])
    apply_changes(publisher.follow(catalog.take(), NOW), published)
    assert published == run(ours(), services=FOR_PODS).keys
    assert publisher.machines["shop", "web"].keys() == {"10.104.3.2"}


def test_ports_that_share_no_name_are_named() -> None:
    content = objects()
    content[SERVICES][0]["spec"]["ports"][0]["name"] = "web"
    found = run(content, services=DEFINITION)
    assert [problem.key for problem in found.problems] == [keys.service_definition_key("shop", "web")]


@pytest.mark.parametrize("listed", [0, 1, 4])
@pytest.mark.parametrize("services", [{}, DEFINITION], ids=["pods", "pods and machines"])
def test_nothing_is_withdrawn_before_everything_was_read(listed: int, services: dict[str, bytes]) -> None:
    """A new leader whose API server is away, or was read in part."""
    first = run(objects(), services=services)
    catalog = Catalog("kube")
    for kind in KINDS[:listed]:
        catalog.retain(kind, [])
    again = publish(OWN, inputs(catalog, first.keys, now=LATER, services=services))
    assert again.keys == first.keys
    assert again.silent == ("the Kubernetes API",)
    machines_gone = publish(OWN, inputs(catalog, first.keys, now=LATER, services=services, workloads={}))
    assert machines_gone.keys == first.keys
    for kind in KINDS:
        catalog.retain(kind, [])
    after = publish(OWN, inputs(catalog, first.keys, now=LATER))
    assert not [key for key in after.keys if "10.244" in key or "services" in key]


def test_machines_change_while_the_api_is_away() -> None:
    first = run(objects(), services=DEFINITION)
    unready = {
        key: WorkloadReport(
            "web", "shop", "vm", addresses=("10.104.3.2",), host_ip="198.18.4.13", services={"shop/web": False}
        )
        .to_json()
        .encode()
        for key in WORKLOADS
    }
    again = publish(OWN, inputs(Catalog("kube"), first.keys, services=DEFINITION, workloads=unready))
    assert set(value(again, WEB)["backends"]) == {"10.244.1.2", "10.244.2.2"}
    assert value(again, VIP) == value(first, VIP)


def test_a_cluster_that_is_no_kubernetes_cluster_any_more_withdraws_all_of_it() -> None:
    first = run(objects())
    after = publish(OWN, inputs(None, first.keys))
    assert not [key for key in after.keys if "10.244" in key or "shop/web" in key]


def test_services_that_only_peers_offer_get_addresses_of_half_the_range() -> None:
    names = [f"shop/p{number:03}" for number in range(200)]
    offered = PeerServices(frozenset(names))
    found = run({**objects(), SERVICES: []}, services=DEFINITION, peers=offered)
    given = [name for name in names if keys.vip_key(*name.split("/")) in found.keys]
    assert given == names[:127]
    assert [problem.reason.partition(":")[0] for problem in found.problems] == [
        "73 services that only peers offer have no service address"
    ]
    assert value(found, keys.vip_key("shop", "p000")) == {
        "ipv4": "10.114.0.1",
        "ipv6": None,
        "released": None,
        "by": "peers",
    }
    more = {
        keys.service_definition_key("shop", f"d{number}"): ServiceDefinition(
            f"d{number}", "shop", (ServicePort("http", 80, 80),), {"app": "a"}
        )
        .to_json()
        .encode()
        for number in range(126)
    }
    # A peer that gives its services ever new names gets none of the other half, and the oldest ones stay.
    churned = PeerServices(frozenset([*names[:100], *(f"shop/a{number:03}" for number in range(200))]))
    after = run({**objects(), SERVICES: []}, found.keys, services={**DEFINITION, **more}, peers=churned, now=LATER)
    assert all(value(after, keys.vip_key("shop", f"d{number}"))["released"] is None for number in range(126))
    assert all(
        value(after, keys.vip_key(*name.split("/")))["released"] == (None if number < 100 else LATER)
        for number, name in enumerate(names[:127])
    )


def test_what_peers_offered_stays_while_not_all_of_it_is_known() -> None:
    first = run(objects(), peers=PeerServices(frozenset(["shop/far"])))
    far = keys.vip_key("shop", "far")
    held = run(objects(), first.keys, now=LATER, peers=PeerServices(complete=False))
    assert held.keys[far] == first.keys[far]
    assert value(run(objects(), first.keys, now=LATER, peers=PeerServices()), far)["released"] == LATER


def test_a_service_that_is_here_needs_no_address_for_the_peers() -> None:
    offered = PeerServices(frozenset(["shop/web", "shop/db"]))
    found = run(objects(), peers=offered)
    assert value(found, VIP)["by"] == "kubernetes"
    assert run({**objects(), SERVICES: []}, services=DEFINITION, peers=offered).keys[VIP].find("by") < 0


# --- following


def everything(publisher: Publisher, catalog: Catalog, published: dict[str, str]) -> None:
    """Follow what changed, and find that a whole run would not have said otherwise."""
    changes = catalog.take()
    assert not changes.all
    writes = publisher.follow(changes, NOW)
    prefixes = owned_prefixes("kube")
    places = [next(i for i, prefix in enumerate(prefixes) if write.key.startswith(prefix)) for write in writes]
    puts = [place for place, write in zip(places, writes, strict=True) if write.value is not None]
    gone = [place for place, write in zip(places, writes, strict=True) if write.value is None]
    assert puts == sorted(puts)
    assert gone == sorted(gone, reverse=True)
    assert [write.value is None for write in writes] == sorted(write.value is None for write in writes)
    apply_changes(writes, published)
    again = publish(OWN, inputs(catalog, published, services=DEFINITION))
    left = {change.key for change in difference(again.keys, published, prefixes)}
    # An identity that nobody has any more is left to the next whole run.
    assert not [key for key in left if "identities" not in key]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["pod", "gone", "done", "relabel", "alone", "service", "plain", "no service", "slice", "no slice", "ns"]
        ),
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    max_size=8,
)


@given(STEPS)
def test_following_is_the_same_as_computing_everything(steps: list[tuple[str, int, int]]) -> None:
    catalog = catalog_of(objects())
    catalog.take()
    publisher = Publisher(OWN, inputs(catalog, services=DEFINITION))
    published = dict(publisher.run().keys)
    names = ["web", "db", "api", "x"]
    for what, which, detail in steps:
        address = f"10.244.{1 + which % 2}.{2 + detail}"
        here = f"kube-{1 + which % 2}"
        if what == "pod":
            catalog.put(PODS, pod(f"p{which}", address, here))
        elif what == "gone":
            catalog.remove(PODS, ("shop", f"p{which}"))
        elif what == "done":
            catalog.put(PODS, {**pod(f"p{which}", address, here), "status": {"phase": "Succeeded"}})
        elif what == "relabel":
            catalog.put(PODS, pod(f"p{which}", address, here, labels={"app": names[detail]}))
        elif what == "alone":
            catalog.put(PODS, pod(f"p{which}", address, here, annotations={TRANSLATION: str(bool(detail % 2)).lower()}))
        elif what == "service":
            catalog.put(SERVICES, service(names[which], f"10.96.0.{10 + detail}" if detail else None))
        elif what == "plain":
            catalog.put(SERVICES, service(names[which], "10.96.0.10", **{"global": "false"}))
        elif what == "no service":
            catalog.remove(SERVICES, ("shop", names[which]))
        elif what == "slice":
            catalog.put(SLICES, endpoint_slice(names[which], endpoint(address, here), name=f"s{detail}"))
        elif what == "no slice":
            catalog.remove(SLICES, ("shop", f"s{detail}"))
        else:
            changed = namespace("shop", team=names[detail])
            changed["metadata"]["annotations"] = {TRANSLATION: "false"} if which % 2 else {}
            catalog.put(NAMESPACES, changed)
        everything(publisher, catalog, published)


@pytest.mark.parametrize(
    ("of_namespace", "of_pod", "alone"),
    [
        (None, None, False),
        (None, "false", True),
        (None, "False", True),
        (None, "true", False),
        (None, "no", False),
        ("false", None, True),
        ("false", "true", False),
        ("true", "false", True),
        ("false", "?", True),
    ],
)
def test_pods_whose_sockets_are_left_alone(of_namespace: str | None, of_pod: str | None, alone: bool) -> None:
    content = objects()
    content[PODS] = [pod("web-1", "10.244.1.2", annotations={TRANSLATION: of_pod} if of_pod else None)]
    content[NAMESPACES][0]["metadata"]["annotations"] = {TRANSLATION: of_namespace} if of_namespace else {}
    found = run(content).keys
    said = {key: json.loads(text) for key, text in found.items() if key.startswith(keys.UNTRANSLATED_PREFIX)}
    wanted = {"namespace": "shop", "pod": "web-1", "uid": "uid-of-web-1"}
    assert said == ({keys.untranslated_key("10.244.1.2"): wanted} if alone else {})
    assert keys.ip_key("10.244.1.2") in found, "it is published all the same"
    # While it is not known which pods there are it stays, and then goes with the pod.
    assert not [
        change
        for change in difference(publish(OWN, inputs(Catalog("kube"), found)).keys, found, owned_prefixes("kube"))
        if "untranslated" in change.key
    ]
    content[PODS] = []
    assert not [key for key in run(content, found).keys if "untranslated" in key]


def test_one_pods_change_is_one_key() -> None:
    content = objects()
    content[PODS] += [pod(f"p{number}", f"10.244.1.{10 + number}") for number in range(100)]
    catalog = catalog_of(content)
    publisher = Publisher(OWN, inputs(catalog))
    publisher.run()
    catalog.take()
    catalog.put(PODS, pod("new", "10.244.2.9", "kube-2"))
    changes = catalog.take()
    assert changes == Changes(frozenset(["10.244.2.9"]))
    writes = [write for write in publisher.follow(changes, NOW) if write.value is not None]
    assert [write.key.split("/")[1] for write in writes] == ["v1", "state", "state"]


def test_what_says_nothing_new_is_no_change() -> None:
    catalog = catalog_of(objects())
    catalog.take()
    beat = node("kube-1", "10.244.1.0/24", "198.18.4.11")
    beat["status"]["conditions"] = [{"type": "Ready", "status": "True", "lastHeartbeatTime": NOW}]
    catalog.put(NODES, beat)
    progress = pod("web-1", "10.244.1.2")
    progress["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    catalog.put(PODS, progress)
    catalog.put(SERVICES, service("plain", "10.96.0.77", **{"global": "false"}))
    assert not catalog.take()
    assert not catalog.waiting()


def test_an_object_that_cannot_be_read_keeps_what_was_known_of_it() -> None:
    catalog = catalog_of(objects())
    catalog.take()
    catalog.put(PODS, {**pod("web-1", "10.244.1.2"), "spec": []})
    catalog.put(PODS, {**pod("web-2", "10.244.2.2"), "status": {"podIPs": [{"ip": "nonsense"}]}})
    assert not catalog.take()
    assert catalog.told() == [
        ("kubernetes pods shop/web-1", "spec is no object"),
        ("kubernetes pods shop/web-2", "status.podIPs: 'nonsense' is no address"),
    ]
    catalog.put(PODS, pod("web-1", "10.244.1.2"))
    catalog.remove(PODS, ("shop", "web-2"))
    assert catalog.told() == []
    assert catalog.take() == Changes(frozenset(["10.244.2.2"]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, entry in inside for place in places_in(entry, (*path, key))]


@given(st.sampled_from(KINDS), st.data(), JSON)
def test_no_object_however_odd_does_harm(kind: str, data: st.DataObject, junk: Any) -> None:
    """Anything in any place of an object: it is refused or understood, and what is published can be written."""
    content = objects()
    odd = copy.deepcopy(content[kind][0])
    path = data.draw(st.sampled_from(places_in(odd)))
    if path:
        inner = odd
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = junk
    else:
        odd = junk
    catalog = catalog_of(content)
    publisher = Publisher(OWN, inputs(catalog))
    published = dict(publisher.run().keys)
    catalog.take()
    catalog.put(kind, odd)
    changes = catalog.take()
    apply_changes(publisher.follow(changes, NOW), published)
    for text in (*published.values(), *publish(OWN, inputs(catalog)).keys.values()):
        text.encode()
    for key, reason in catalog.told():
        assert key.startswith("kubernetes ")
        assert len(reason) < 200


BEFORE = run(objects(), services=DEFINITION, peers=PeerServices(frozenset(["shop/far"]))).keys


@given(st.data(), st.booleans())
def test_nothing_that_was_published_can_do_harm(data: st.DataObject, read: bool) -> None:
    """Whatever stands in etcd, with the API server away or not: something is published, and it can be written."""
    previous = dict(BEFORE)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(BEFORE)))
        like = json.loads(BEFORE[key]) if BEFORE[key].startswith("{") else BEFORE[key]
        previous[key] = data.draw(hostile(like)).decode("utf-8", "surrogateescape")
    catalog = catalog_of(objects()) if read else Catalog("kube")
    found = publish(OWN, inputs(catalog, previous, services=DEFINITION))
    assert keys.node_key("kube", "kube-1") in found.keys
    for key, text in found.keys.items():
        (key + text).encode("utf-8", "surrogateescape")


@given(st.sampled_from(KINDS), JSON)
def test_readers_raise_nothing_but_their_error(kind: str, junk: Any) -> None:
    for read in (lambda: key_of(junk), lambda: facts(kind, junk)):
        with contextlib.suppress(ObjectError):
            read()
