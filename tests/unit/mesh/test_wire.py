# SPDX-License-Identifier: GPL-3.0-or-later
"""Cilium's values: documented examples byte by byte, round trips, and what hostile peers may send."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_mesh import wire
from isthmus_mesh.wire import ClusterConfig, ClusterService, IPIdentityPair, L4Addr, NamedPort, Node, NodeAddress

NODE = (
    '{"Name":"vm1","Cluster":"vm-site",'
    '"IPAddresses":[{"Type":"InternalIP","IP":"192.0.2.21"},{"Type":"CiliumInternalIP","IP":"10.201.1.1"}],'
    '"IPv4AllocCIDR":{"IP":"10.201.1.0","Mask":"////AA=="},"IPv4SecondaryAllocCIDRs":null,'
    '"IPv6AllocCIDR":null,"IPv6SecondaryAllocCIDRs":null,'
    '"IPv4HealthIP":"10.201.1.2","IPv6HealthIP":"","IPv4IngressIP":"","IPv6IngressIP":"",'
    '"ClusterID":7,"Source":"custom-resource","EncryptionKey":0,"Labels":{"kubernetes.io/hostname":"vm1"},'
    '"Annotations":null,"NodeIdentity":0,"WireguardPubKey":"","BootID":""}'
)
PAIR = (
    '{"IP":"10.201.1.10","Mask":null,"HostIP":"192.0.2.21","ID":458753,"Key":0,"Metadata":"",'
    '"K8sNamespace":"default","K8sPodName":"vm1","K8sServiceAccount":"default",'
    '"NamedPorts":[{"Name":"http","Port":8080,"Protocol":"TCP"}]}'
)
SERVICE = (
    '{"cluster":"vm-site","namespace":"default","name":"db",'
    '"frontends":{"10.202.0.10":{"pg":{"Protocol":"TCP","Port":5432}}},'
    '"backends":{"10.201.1.10":{"pg":{"Protocol":"TCP","Port":5432}}},'
    '"labels":{},"selector":{},"includeExternal":true,"shared":true,"clusterID":7}'
)
# What a real clustermesh-apiserver 1.20.2 wrote.
CONFIG = (
    '{"id":9,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255,"serviceExportsEnabled":false,'
    '"endpointSlicesExportMode":"services-and-endpointslices"}}'
)
LABELS = (
    "k8s:app=web;k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=default;"
    "k8s:io.cilium.k8s.policy.cluster=vm-site;k8s:io.cilium.k8s.policy.serviceaccount=default;"
    "k8s:io.kubernetes.pod.namespace=default;"
)


@pytest.mark.parametrize(
    ("kind", "text"), [(Node, NODE), (IPIdentityPair, PAIR), (ClusterService, SERVICE), (ClusterConfig, CONFIG)]
)
def test_documented_examples_survive_byte_by_byte(kind: Any, text: str) -> None:
    assert kind.from_json(text).to_json() == text
    assert kind.from_json(text.encode()) == kind.from_json(text)


def test_node_fields() -> None:
    node = Node.from_json(NODE)
    assert node.tunnel_endpoint() == "192.0.2.21"
    assert node.tunnel_endpoint(6) is None
    assert node.mesh_address() == "10.201.1.1"
    assert node.cidrs() == (ipaddress.ip_network("10.201.1.0/24"),)


def test_the_tunnel_endpoint_is_never_the_mesh_address() -> None:
    addresses = (NodeAddress("CiliumInternalIP", "10.0.0.1"), NodeAddress("ExternalIP", "198.51.100.1"))
    assert Node("n", "c", 1, addresses).tunnel_endpoint() == "198.51.100.1"
    assert Node("n", "c", 1, addresses[:1]).tunnel_endpoint() is None
    assert Node("n", "c", 1, (NodeAddress("Hostname", "n"),)).tunnel_endpoint() is None


@pytest.mark.parametrize(
    ("mask", "length"),
    [
        ("/wAAAA==", 8),
        ("//8AAA==", 16),
        ("///wAA==", 20),
        ("////AA==", 24),
        ("////8A==", 28),
        ("/////A==", 30),
        ("/////w==", 32),
    ],
)
def test_masks_as_go_writes_them(mask: str, length: int) -> None:
    document = json.loads(NODE)
    document["IPv4AllocCIDR"] = {"IP": "10.0.0.0", "Mask": mask}
    node = Node.from_json(json.dumps(document))
    assert node.ipv4_alloc_cidr == ipaddress.ip_network(f"10.0.0.0/{length}")
    assert json.loads(node.to_json())["IPv4AllocCIDR"]["Mask"] == mask


def test_ipv6_masks() -> None:
    for mask, length in (("//////////8AAAAAAAAAAA==", 64), ("//////////////////8AAA==", 112)):
        node = Node("n", "c", 1, ipv6_alloc_cidr=ipaddress.ip_network(f"fd00::/{length}"))
        assert json.loads(node.to_json())["IPv6AllocCIDR"] == {"IP": "fd00::", "Mask": mask}
        assert Node.from_json(node.to_json()) == node


def test_a_cidr_may_be_a_string_and_is_written_as_an_object() -> None:
    document = json.loads(NODE)
    document["IPv4AllocCIDR"] = "10.201.1.0/24"
    assert Node.from_json(json.dumps(document)).to_json() == NODE


def test_strings_are_escaped_as_go_does() -> None:
    node = Node("n", "c", 1, labels={"k": "<&>\u2028é"})
    assert '"k":"\\u003c\\u0026\\u003e\\u2028é"' in node.to_json()
    assert Node.from_json(node.to_json()) == node


def test_labels_as_the_identity_value() -> None:
    found = wire.labels_from_string(LABELS)
    assert found["k8s:app"] == "web"
    assert wire.labels_to_string(found) == LABELS
    assert wire.labels_to_string({"b:a": "1", "a:b": "", "gen:io.x": "http.TCP.8080"}) == (
        "b:a=1;a:b=;gen:io.x=http.TCP.8080;"
    )


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"app": "web"}, "is not source:key"),
        ({"k8s:app": "a;b"}, "cannot carry"),
        ({"k8s:a=b": "c"}, "cannot carry"),
        ({"k8s:app": "1", "any:app": "2"}, "two sources"),
    ],
)
def test_labels_that_the_format_cannot_carry(labels: dict[str, str], reason: str) -> None:
    with pytest.raises(wire.WireError, match=reason):
        wire.labels_to_string(labels)


@pytest.mark.parametrize("text", ["", "k8s:app=web", "k8s:app;", "app=web;", "k8s:=web;", ";", "k8s:a=1;k8s:a=2;"])
def test_labels_that_are_not_that_format(text: str) -> None:
    with pytest.raises(wire.WireError):
        wire.labels_from_string(text)


def _with(text: str, **changes: Any) -> str:
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (Node, "", "not JSON"),
        (Node, b"\xff", "not UTF-8"),
        (Node, "[]", "not an object"),
        (Node, "[" * 100_000, "nested too deeply"),
        (Node, '{"ClusterID": NaN}', "not JSON"),
        (Node, '{"Name": "\\ud800"}', "not UTF-8"),
        (Node, '{"ClusterID": ' + "9" * 5000 + "}", "not JSON|out of range"),
        (Node, _with(NODE, ClusterID=-1), "ClusterID is out of range"),
        (Node, _with(NODE, ClusterID=True), "ClusterID is not an integer"),
        (Node, _with(NODE, EncryptionKey=256), "EncryptionKey is out of range"),
        (Node, _with(NODE, Name=3), "Name is not a string"),
        (Node, _with(NODE, IPAddresses={}), "IPAddresses is not a list"),
        (Node, _with(NODE, IPAddresses=[{"Type": "InternalIP", "IP": "x"}]), r"IPAddresses\[0\].IP is not an IP"),
        (Node, _with(NODE, IPAddresses=[{"Type": "InternalIP", "IP": "fe80::1%eth0"}]), "has a zone"),
        (Node, _with(NODE, IPv4AllocCIDR={"IP": "10.0.0.1", "Mask": "////AA=="}), "not a network address"),
        (Node, _with(NODE, IPv4AllocCIDR={"IP": "10.0.0.0", "Mask": "/w=="}), "wrong length"),
        (Node, _with(NODE, IPv4AllocCIDR={"IP": "10.0.0.0", "Mask": "/wD/AA=="}), "not a contiguous mask"),
        (Node, _with(NODE, IPv4AllocCIDR={"IP": "10.0.0.0", "Mask": "?"}), "not base64"),
        (Node, _with(NODE, IPv4AllocCIDR="10.0.0.0"), "not an IPv4 CIDR"),
        (Node, _with(NODE, IPv4AllocCIDR="fd00::/64"), "not an IPv4 CIDR"),
        (Node, _with(NODE, Labels={"a": 1}), "Labels is not an object of strings"),
        (IPIdentityPair, "{}", "IP is missing"),
        (IPIdentityPair, _with(PAIR, HostIP="host"), "HostIP is not an IP address"),
        (IPIdentityPair, _with(PAIR, ID=2**32), "ID is out of range"),
        (IPIdentityPair, _with(PAIR, NamedPorts=[{"Port": 65536}]), "Port is out of range"),
        (ClusterService, _with(SERVICE, backends={"x": {}}), "backends key is not an IP address"),
        (ClusterService, _with(SERVICE, backends={"10.0.0.1": []}), "is not an object"),
        (ClusterService, _with(SERVICE, backends={"10.0.0.1": {"a": {"Protocol": "ICMP", "Port": 1}}}), "Protocol is"),
        (ClusterService, _with(SERVICE, shared="yes"), "shared is not true or false"),
        (ClusterConfig, '{"id": "7"}', "id is not an integer"),
        (ClusterConfig, '{"id": 7, "capabilities": {"endpointSlicesExportMode": "x"}}', "is unknown"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(kind: Any, text: str, reason: str) -> None:
    with pytest.raises(wire.WireError, match=reason):
        kind.from_json(text)


def test_null_is_gos_zero_value() -> None:
    service = ClusterService.from_json(_with(SERVICE, backends={"10.0.0.1": None}, labels=None, frontends=None))
    assert service.backends == {"10.0.0.1": {}}
    assert service.labels == {}
    assert Node.from_json("{}") == Node("", "", 0, source="")


def test_a_host_mask_counts_as_none() -> None:
    assert IPIdentityPair.from_json(_with(PAIR, Mask="/////w==")).key_suffix() == "10.201.1.10"
    prefix = IPIdentityPair("10.0.0.0", 300, prefix_length=24)
    assert prefix.key_suffix() == "10.0.0.0/24"
    assert IPIdentityPair.from_json(prefix.to_json()) == prefix


RANGES = (ipaddress.ip_network("10.201.0.0/16"),)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({}, ("vm-site", "vm1", 7), None),
        ({}, ("other", "vm1", 7), "cluster differs from key"),
        ({}, ("vm-site", "vm2", 7), "name differs from key"),
        ({}, ("vm-site", "vm1", 8), "cluster id is not the cluster's"),
        ({"IPv4AllocCIDR": "10.0.0.0/24"}, ("vm-site", "vm1", 7), "range is not the cluster's"),
        ({"IPv4SecondaryAllocCIDRs": ["10.0.0.0/24"]}, ("vm-site", "vm1", 7), "range is not the cluster's"),
        ({"IPv6AllocCIDR": "fd00::/64"}, ("vm-site", "vm1", 7), "range is not the cluster's"),
        ({"IPAddresses": [{"Type": "CiliumInternalIP", "IP": "10.9.0.1"}]}, ("vm-site", "vm1", 7), "mesh address"),
    ],
)
def test_validate_node(changes: dict[str, Any], key: tuple[str, str, int], reason: str | None) -> None:
    node = Node.from_json(_with(NODE, **changes))
    if reason is None:
        wire.validate_node(node, *key, RANGES)
    else:
        with pytest.raises(wire.WireError, match=reason):
            wire.validate_node(node, *key, RANGES)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({}, "10.201.1.10", None),
        ({"ID": 6}, "10.201.1.10", None),
        ({"ID": 255}, "10.201.1.10", None),
        ({}, "10.201.1.11", "address differs from key"),
        ({}, "10.201.1.10/32", "address differs from key"),
        ({"ID": 256}, "10.201.1.10", "identity is not the cluster's"),
        ({"ID": 524288}, "10.201.1.10", "identity is not the cluster's"),
        ({"ID": 458753 + 0x1000000}, "10.201.1.10", "identity is not the cluster's"),
        ({"IP": "10.9.0.1"}, "10.9.0.1", "not in the cluster's ranges"),
        ({"IP": "10.201.1.1", "Mask": "////AA=="}, "10.201.1.1/24", "host bits"),
        ({"IP": "10.0.0.0", "Mask": "/wAAAA=="}, "10.0.0.0/8", "not in the cluster's ranges"),
    ],
)
def test_validate_ip(changes: dict[str, Any], key: str, reason: str | None) -> None:
    pair = IPIdentityPair.from_json(_with(PAIR, **changes))
    if reason is None:
        wire.validate_ip(pair, key, 7, 255, RANGES)
    else:
        with pytest.raises(wire.WireError, match=reason):
            wire.validate_ip(pair, key, 7, 255, RANGES)


def test_validate_identity() -> None:
    labels = wire.labels_from_string(LABELS)
    wire.validate_identity(458753, labels, "vm-site", 7, 255)
    wire.validate_identity(229377, labels, "vm-site", 7, 511)
    with pytest.raises(wire.WireError, match="identity is not the cluster's"):
        wire.validate_identity(458753, labels, "vm-site", 8, 255)
    with pytest.raises(wire.WireError, match="labels do not name the cluster"):
        wire.validate_identity(458753, labels, "other", 7, 255)
    with pytest.raises(wire.WireError, match="labels do not name the cluster"):
        wire.validate_identity(458753, {"any:io.cilium.k8s.policy.cluster": "vm-site"}, "vm-site", 7, 255)


@pytest.mark.parametrize(
    ("key", "ranges", "reason"),
    [
        (("vm-site", "default", "db", 7), RANGES, None),
        (("other", "default", "db", 7), None, "cluster differs from key"),
        (("vm-site", "shop", "db", 7), None, "namespace differs from key"),
        (("vm-site", "default", "web", 7), None, "name differs from key"),
        (("vm-site", "default", "db", 9), None, "cluster id is not the cluster's"),
        (("vm-site", "default", "db", 7), (ipaddress.ip_network("10.1.0.0/16"),), "backend is not in"),
    ],
)
def test_validate_service(key: tuple[str, str, str, int], ranges: Any, reason: str | None) -> None:
    service = ClusterService.from_json(SERVICE)
    if reason is None:
        wire.validate_service(service, *key, ranges)
    else:
        with pytest.raises(wire.WireError, match=reason):
            wire.validate_service(service, *key, ranges)


def test_validate_cluster_config() -> None:
    wire.validate_cluster_config(ClusterConfig(9), 9, 255)
    for config, expected, highest in (
        (ClusterConfig(300), 300, 255),
        (ClusterConfig(0), 0, 255),
        (ClusterConfig(8), 9, 255),
        (ClusterConfig(9), 9, 511),
    ):
        with pytest.raises(wire.WireError):
            wire.validate_cluster_config(config, expected, highest)


# Round trips of anything that the types allow.

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
V4 = st.ip_addresses(v=4).map(str)
ANY_IP = st.ip_addresses().filter(lambda found: getattr(found, "ipv4_mapped", None) is None).map(str)
CIDR4 = st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(
    lambda both: ipaddress.ip_network(f"{both[0]}/{both[1]}", strict=False)
)
# Without what is refused: an IPv4 address in IPv6's form.
CIDR6 = (
    st.tuples(st.ip_addresses(v=6), st.integers(0, 128))
    .map(lambda both: ipaddress.ip_network(f"{both[0]}/{both[1]}", strict=False))
    .filter(lambda network: network.network_address.ipv4_mapped is None)
)
MAPS = st.dictionaries(TEXT, TEXT, max_size=4)
PORTS = st.dictionaries(TEXT, st.builds(L4Addr, st.sampled_from(wire.PROTOCOLS), st.integers(0, 65535)), max_size=3)
UINT32 = st.integers(0, 2**32 - 1)

NODES = st.builds(
    Node,
    name=TEXT,
    cluster=TEXT,
    cluster_id=UINT32,
    addresses=st.lists(st.builds(NodeAddress, st.sampled_from(["InternalIP", "CiliumInternalIP"]), ANY_IP)).map(tuple),
    ipv4_alloc_cidr=st.none() | CIDR4,
    ipv4_secondary_alloc_cidrs=st.lists(CIDR4, max_size=2).map(tuple),
    ipv6_alloc_cidr=st.none() | CIDR6,
    ipv6_secondary_alloc_cidrs=st.lists(CIDR6, max_size=2).map(tuple),
    ipv4_health_ip=st.just("") | V4,
    source=TEXT,
    encryption_key=st.integers(0, 255),
    labels=MAPS,
    annotations=MAPS,
    boot_id=TEXT,
)
PAIRS = st.builds(
    IPIdentityPair,
    ip=ANY_IP,
    identity=UINT32,
    host_ip=st.just("") | ANY_IP,
    prefix_length=st.none() | st.integers(0, 31),
    key=st.integers(0, 255),
    namespace=TEXT,
    pod_name=TEXT,
    service_account=TEXT,
    named_ports=st.lists(st.builds(NamedPort, TEXT, st.integers(0, 65535), TEXT), max_size=2).map(tuple),
)
SERVICES = st.builds(
    ClusterService,
    cluster=TEXT,
    namespace=TEXT,
    name=TEXT,
    cluster_id=UINT32,
    frontends=st.dictionaries(ANY_IP, PORTS, max_size=2),
    backends=st.dictionaries(ANY_IP, PORTS, max_size=4),
    hostnames=st.dictionaries(ANY_IP, TEXT, max_size=2),
    labels=MAPS,
    selector=MAPS,
    include_external=st.booleans(),
    shared=st.booleans(),
)
CONFIGS = st.builds(
    ClusterConfig,
    id=UINT32,
    synced_canaries=st.booleans(),
    cached=st.booleans(),
    max_connected_clusters=UINT32,
    service_exports_enabled=st.none() | st.booleans(),
    endpoint_slices_export_mode=st.sampled_from(wire.SLICE_MODES),
)


@given(NODES | PAIRS | SERVICES | CONFIGS)
def test_round_trip(value: Node | IPIdentityPair | ClusterService | ClusterConfig) -> None:
    text = value.to_json()
    again = type(value).from_json(text)
    assert again == value
    assert again.to_json() == text
    json.loads(text)
    text.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from([(Node, NODE), (IPIdentityPair, PAIR), (ClusterService, SERVICE), (ClusterConfig, CONFIG)]),
    st.data(),
)
def test_a_hostile_field_gives_a_value_or_a_wire_error(kind_and_text: tuple[Any, str], data: st.DataObject) -> None:
    kind, text = kind_and_text
    document = json.loads(text)
    document[data.draw(st.sampled_from(sorted(document)))] = data.draw(JSON)
    try:
        value = kind.from_json(json.dumps(document))
    except wire.WireError:
        return
    value.to_json().encode()


@given(st.binary(max_size=40))
def test_any_bytes_give_a_value_or_a_wire_error(raw: bytes) -> None:
    for kind in (Node, IPIdentityPair, ClusterService, ClusterConfig):
        try:
            kind.from_json(raw).to_json()  # type: ignore[attr-defined]
        except wire.WireError:
            continue


@given(
    st.dictionaries(
        st.from_regex(r"[a-z0-9]{1,5}", fullmatch=True),
        st.tuples(st.sampled_from(["k8s", "gen", "reserved"]), st.from_regex(r"[a-z0-9.=:]{0,5}", fullmatch=True)),
    )
)
def test_labels_round_trip(entries: dict[str, tuple[str, str]]) -> None:
    labels = {f"{source}:{key}": value for key, (source, value) in entries.items()}
    text = wire.labels_to_string(labels)
    if labels:
        assert wire.labels_from_string(text) == labels
        assert [part.split("=")[0].split(":")[1] for part in text.split(";")[:-1]] == sorted(entries)
