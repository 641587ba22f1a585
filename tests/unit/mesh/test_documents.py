# SPDX-License-Identifier: GPL-3.0-or-later
"""Documents under isthmus/v1/, and the examples of docs/architecture.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_mesh import identity
from isthmus_mesh.documents import (
    Alive,
    DocumentError,
    HealthCheck,
    NodeReport,
    PeerStatus,
    ServiceDefinition,
    ServicePort,
    WorkloadReport,
)
from isthmus_mesh.spec import NodeSpec, SpecError, spec_hash

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = [
    json.loads(re.sub(r"<[^>]*>", "x", block))
    for block in re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
]
DEFINITION = next(example for example in EXAMPLES if "ports" in example)
SPEC = next(example for example in EXAMPLES if "pki" in example)


def test_the_documented_definition_survives() -> None:
    found = ServiceDefinition.from_dict(DEFINITION)
    assert json.loads(found.to_json()) == DEFINITION
    assert ServiceDefinition.from_json(found.to_json()) == found


def test_the_documented_spec_reads() -> None:
    found = NodeSpec.from_dict(SPEC)
    assert found.member is not None
    assert found.registrar is not None
    assert found.registrar.peers[0].etcd.endpoints == ("https://198.18.2.11:2379",)
    assert found.workloads[0].cgroup.kind == "unit"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema 2 is newer than 1, the one that this version reads: a newer isthmus.mesh wrote it"),
        ({"schema": 0}, "schema 0 is older than 1, the one that this version reads: an older isthmus.mesh wrote it"),
        ({"workloads": [{"name": "a"}]}, r"workloads\[0\]"),
        ({"node": {}}, "node.name is missing"),
        ({"service_ranges4": ["x"]}, "service_ranges4 is not a list of IPv4 networks"),
        ({"pki": None}, "pki is not an object"),
    ],
)
def test_a_spec_that_cannot_be_used(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        NodeSpec.from_dict({**SPEC, **changes})


def test_the_hash_is_of_the_rest() -> None:
    assert spec_hash(SPEC) == spec_hash({**SPEC, "hash": "other"})
    assert spec_hash(SPEC) != spec_hash({**SPEC, "estate": "other"})


def test_which_workloads_a_service_selects() -> None:
    by_label = ServiceDefinition.from_dict(DEFINITION)
    assert by_label.selects("h", "shop", "anything", {"app": "web", "more": "x"})
    assert not by_label.selects("h", "other", "web", {"app": "web"})
    assert not by_label.selects("h", "shop", "web", {"app": "batch"})
    by_name = ServiceDefinition.from_dict({**DEFINITION, "backends": {"workloads": ["h/web"]}})
    assert by_name.selects("h", "shop", "web", {})
    assert not by_name.selects("i", "shop", "web", {"app": "web"})
    assert not by_name.selects("h", "other", "web", {})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ports": []}, "ports is empty"),
        ({"ports": [{"port": 0}]}, r"ports\[0\].port is out of range"),
        ({"ports": [{"port": 1, "protocol": "SCTP"}]}, "protocol is not one of TCP, UDP"),
        ({"backends": {}}, "backends needs labels or workloads"),
        ({"backends": {"labels": {}}}, "backends.labels is empty"),
        ({"backends": {"labels": {}, "workloads": []}}, "one of them only"),
        ({"affinity": "near"}, "affinity is not one of"),
        ({"health": {"type": "icmp"}}, "health.type is not one of"),
        ({"health": {"type": "tcp"}}, "health.port is missing"),
        ({"health": {"type": "http", "port": 1, "path": "x"}}, "health.path does not start with /"),
        ({"health": {"type": "exec"}}, "health.command is missing"),
        ({"health": {"type": "tcp", "port": 1, "interval": 0}}, "health.interval is out of range"),
        ({"name": ""}, "name is empty"),
        ({"name": "we b"}, "name is not an RFC 1123 label"),
        ({"namespace": "shop\n10.0.0.1 bank"}, "namespace is not an RFC 1123 label"),
        ({"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80}]}, "same port and protocol twice"),
        ({"owner": None}, "owner is missing"),
        ({"kubernetes": "yes"}, "kubernetes is not true or false"),
    ],
)
def test_a_definition_that_cannot_be_used(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        ServiceDefinition.from_dict({**DEFINITION, **changes})


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (NodeReport, '{"name":"n","cluster":"c","addresses":[{"Type":"InternalIP","IP":"x"}]}', "not an IP address"),
        (NodeReport, '{"name":"n","cluster":"c","range4":"fd00::/64"}', "range4 is not an IPv4 range"),
        (NodeReport, '{"name":"n","cluster":"c","range4":"10.0.0.1/24"}', "range4 is not a network address"),
        (NodeReport, '{"name":"n","cluster":"c","mesh6":"10.0.0.1"}', "mesh6 is not an IPv6 address"),
        (NodeReport, '{"name":"n","cluster":"c","mtu":-1}', "mtu is out of range"),
        (WorkloadReport, '{"name":"w","namespace":"n"}', "node is missing"),
        (WorkloadReport, '{"name":"w","namespace":"n","node":"h","host_ip":"10.0.0.1","addresses":["x"]}', "addresses"),
        (WorkloadReport, '{"name":"w","namespace":"n","node":"h","host_ip":"10.0.0.1","services":{"a/b":1}}', "a/b is"),
        (Alive, "[]", "not an object"),
        (PeerStatus, '{"state":"connected","keys":{"nodes":-1}}', "keys.nodes is out of range"),
        (PeerStatus, '{"state":"connected","cluster_id":"xyz"}', "cluster_id is not 16 hex digits"),
        (PeerStatus, '{"state":"connected","proof_age":-1}', "proof_age is not a number of seconds"),
        (PeerStatus, '{"state":"connected","proof_age":1e999}', "proof_age is not a number of seconds"),
    ],
)
def test_reports_that_cannot_be_used(kind: Any, text: str, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        kind.from_json(text)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
LABELS = st.from_regex("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)
MAPS = st.dictionaries(TEXT, TEXT, max_size=3)
V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).map(str)
PORT = st.integers(1, 65535)
SECONDS = st.floats(0.1, 3600)
COUNTS = st.integers(1, 100)
HEALTH = (
    st.builds(HealthCheck, st.just("tcp"), PORT, interval=SECONDS, timeout=SECONDS, rise=COUNTS, fall=COUNTS)
    | st.builds(HealthCheck, st.just("http"), PORT, TEXT.map(lambda text: "/" + text))
    | st.builds(HealthCheck, st.just("exec"), command=st.lists(TEXT, min_size=1, max_size=3).map(tuple))
)
DOCUMENTS = (
    st.builds(
        ServiceDefinition,
        name=LABELS,
        namespace=LABELS,
        ports=st.lists(
            st.builds(ServicePort, TEXT, PORT, PORT, st.sampled_from(["TCP", "UDP"])),
            min_size=1,
            max_size=3,
            unique_by=lambda port: (port.port, port.protocol),
        ).map(tuple),
        backend_labels=st.dictionaries(TEXT, TEXT, min_size=1, max_size=3),
        health=st.none() | HEALTH,
        is_global=st.booleans(),
        shared=st.booleans(),
        affinity=st.sampled_from(["none", "local", "remote"]),
        labels=MAPS,
        owner=TEXT,
        revision=st.integers(0, 2**64 - 1),
    )
    | st.builds(
        NodeReport,
        name=TEXT,
        cluster=TEXT,
        addresses=st.lists(st.tuples(TEXT, V4 | V6), max_size=2).map(tuple),
        range4=st.none() | V4.map(lambda ip: f"{ip}/32"),
        range6=st.none() | V6.map(lambda ip: f"{ip}/128"),
        mesh4=st.none() | V4,
        mesh6=st.none() | V6,
        labels=MAPS,
        mtu=st.integers(0, 65535),
        boot_id=TEXT,
    )
    | st.builds(
        WorkloadReport,
        name=TEXT,
        namespace=TEXT,
        node=TEXT,
        service_account=TEXT,
        labels=MAPS,
        addresses=st.lists(V4 | V6, max_size=2).map(tuple),
        host_ip=V4,
        services=st.dictionaries(TEXT, st.booleans(), max_size=3),
    )
    | st.builds(Alive, TEXT, TEXT, TEXT, TEXT)
    | st.builds(
        PeerStatus,
        state=TEXT,
        last_proof=st.none() | TEXT,
        last_change=st.none() | TEXT,
        endpoint=TEXT,
        cluster_id=st.from_regex(r"([0-9a-f]{16})?", fullmatch=True),
        revision=st.integers(0, 2**64 - 1),
        keys=st.dictionaries(TEXT, st.integers(0, 1000), max_size=3),
        refused=st.dictionaries(TEXT, st.integers(0, 1000), max_size=3),
        refused_last=st.none() | st.tuples(TEXT, TEXT),
        proof_age=st.none() | st.floats(0, 1e9),
    )
)


@given(DOCUMENTS)
def test_round_trip(value: Any) -> None:
    assert type(value).from_json(value.to_json()) == value
    assert type(value).from_json(value.to_json()).to_json() == value.to_json()


@pytest.mark.parametrize(
    ("highest", "cluster", "wanted"),
    [
        (255, 1, (65536, 131071)),
        (255, 7, (458752, 524287)),
        (255, 255, (16711680, 16777215)),
        (511, 1, (32768, 65535)),
        (511, 7, (229376, 262143)),
        (511, 300, (9830400, 9863167)),
        (511, 511, (16744448, 16777215)),
    ],
)
def test_identity_ranges_of_the_protocol(highest: int, cluster: int, wanted: tuple[int, int]) -> None:
    assert identity.identity_range(cluster, highest) == wanted
    assert identity.cluster_of(wanted[0], highest) == identity.cluster_of(wanted[1], highest) == cluster


def test_identities_out_of_range() -> None:
    for cluster, highest in ((0, 255), (256, 255), (512, 511), (1, 256)):
        with pytest.raises(ValueError, match=r"max_clusters|cluster id"):
            identity.identity_range(cluster, highest)
    assert identity.cluster_of(6, 255) == 0


def test_fixed_identities() -> None:
    fixed = {number for number in range(300) if identity.is_fixed_identity(number)}
    assert fixed == {2, 4, 6, 7, 8, *range(100, 115), *range(128, 256)}


def test_a_users_label_cannot_stand_in_for_who_a_workload_is() -> None:
    labels = {"app": "web", "io.cilium.k8s.policy.cluster": "other", "io.kubernetes.pod.namespace": "kube-system"}
    assert identity.workload_labels("shop", "default", "onprem", labels) == {
        "k8s:app": "web",
        "k8s:io.kubernetes.pod.namespace": "shop",
        "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": "shop",
        "k8s:io.cilium.k8s.policy.cluster": "onprem",
        "k8s:io.cilium.k8s.policy.serviceaccount": "default",
    }
