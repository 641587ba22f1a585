# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_mesh import keys

LABEL = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (keys.node_key("c1", "n1"), "cilium/state/nodes/v1/c1/n1"),
        (keys.node_key("c1", "n1", cached=True), "cilium/cache/nodes/v1/c1/n1"),
        (keys.ip_key("10.0.0.1"), "cilium/state/ip/v1/default/10.0.0.1"),
        (keys.ip_key("10.0.0.1", "c1"), "cilium/cache/ip/v1/c1/10.0.0.1"),
        (keys.identity_key(65537), "cilium/state/identities/v1/id/65537"),
        (keys.identity_key(65537, "c1"), "cilium/cache/identities/v1/c1/id/65537"),
        (keys.service_key("c1", "ns", "web"), "cilium/state/services/v1/c1/ns/web"),
        (keys.service_key("c1", "ns", "web", cached=True), "cilium/cache/services/v1/c1/ns/web"),
        (keys.cluster_config_key("c1"), "cilium/cluster-config/c1"),
        (keys.canary_key("c1", "ip"), "cilium/synced/c1/cilium/state/ip/v1"),
        (keys.canary_key("c1", "identities", cached=True), "cilium/synced/c1/cilium/cache/identities/v1"),
        (keys.HEARTBEAT, "cilium/.heartbeat"),
        (keys.service_definition_key("ns", "web"), "isthmus/v1/services/ns/web"),
        (keys.node_report_key("n1"), "isthmus/v1/nodes/n1"),
        (keys.workload_key("n1", "ns", "web"), "isthmus/v1/workloads/n1/ns.web"),
        (keys.alive_key("n1"), "isthmus/v1/alive/n1"),
        (keys.alloc_identity_key(7), "isthmus/v1/alloc/identities/7"),
        (keys.vip_key("ns", "web"), "isthmus/v1/alloc/vips/ns/web"),
        (keys.local_service_key("ns", "web"), "isthmus/v1/alloc/services/ns/web"),
        (keys.peer_status_key("c2"), "isthmus/v1/alloc/peers/c2"),
        (keys.estate_cluster_key("c2"), "isthmus/v1/estate/clusters/c2"),
    ],
)
def test_layout(made: str, wanted: str) -> None:
    assert made == wanted


@given(LABEL, LABEL, LABEL, st.booleans())
def test_round_trip(cluster: str, namespace: str, name: str, cached: bool) -> None:
    assert keys.parse_node_key(keys.node_key(cluster, name, cached)) == (cluster, name)
    assert keys.parse_service_key(keys.service_key(cluster, namespace, name, cached)) == (cluster, namespace, name)
    assert keys.parse_workload_key(keys.workload_key(f"{name}.example", namespace, name)) == (
        f"{name}.example",
        namespace,
        name,
    )
    for kind in keys.KINDS:
        assert keys.parse_canary_key(keys.canary_key(cluster, kind, cached)) == (cluster, kind, cached)
    owner = cluster if cached else None
    assert keys.parse_ip_key(keys.ip_key("10.0.0.1", owner)) == (owner, "10.0.0.1")
    assert keys.parse_identity_key(keys.identity_key(70000, owner)) == (owner, 70000)
    assert keys.parse_vip_key(keys.vip_key(namespace, name)) == (namespace, name)
    assert keys.parse_local_service_key(keys.local_service_key(namespace, name)) == (namespace, name)
    assert keys.parse_service_definition_key(keys.service_definition_key(namespace, name)) == (namespace, name)
    assert keys.parse_cluster_config_key(keys.cluster_config_key(cluster)) == cluster
    assert keys.parse_estate_cluster_key(keys.estate_cluster_key(cluster)) == cluster
    assert keys.parse_peer_status_key(keys.peer_status_key(cluster)) == cluster
    assert keys.parse_node_report_key(keys.node_report_key(name)) == name
    assert keys.parse_alive_key(keys.alive_key(name)) == name


def test_every_key_lies_below_its_prefix() -> None:
    for cached, prefix, owner in ((False, keys.state_prefix, None), (True, keys.cache_prefix, "c1")):
        assert keys.node_key("c1", "n", cached).startswith(prefix("nodes", "c1"))
        assert keys.service_key("c1", "ns", "n", cached).startswith(prefix("services", "c1"))
        assert keys.ip_key("10.0.0.1", owner).startswith(prefix("ip", "c1"))
        assert keys.identity_key(300, owner).startswith(prefix("identities", "c1"))


@pytest.mark.parametrize(
    ("parse", "key"),
    [
        (keys.parse_node_key, "cilium/state/nodes/v1/c1"),
        (keys.parse_node_key, "cilium/state/nodes/v1/c1/"),
        (keys.parse_node_key, "cilium/state/nodes/v1/c1/n/x"),
        (keys.parse_node_key, "cilium/state/nodes/v2/c1/n"),
        (keys.parse_ip_key, "cilium/state/ip/v1/default/"),
        (keys.parse_ip_key, "cilium/state/ip/v1/other/10.0.0.1"),
        (keys.parse_identity_key, "cilium/state/identities/v1/id/0x10"),
        (keys.parse_identity_key, "cilium/state/identities/v1/id/007"),
        (keys.parse_identity_key, "cilium/state/identities/v1/id/4294967296"),
        (keys.parse_identity_key, "cilium/state/identities/v1/id/\u0663"),
        (keys.parse_identity_key, "cilium/cache/identities/v1/c1/value/3"),
        (keys.parse_service_key, "cilium/state/services/v1/c1/ns"),
        (keys.parse_workload_key, "isthmus/v1/workloads/n1/web"),
        (keys.parse_workload_key, "isthmus/v1/workloads/n1/.web"),
        (keys.parse_canary_key, "cilium/synced/c1/cilium/state/endpointslices/v1"),
        (keys.parse_canary_key, "cilium/synced/c1/other/state/nodes/v1"),
    ],
)
def test_other_keys_are_not_taken_for_ours(parse: object, key: str) -> None:
    assert callable(parse)
    assert parse(key) is None


def test_an_unknown_kind_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="unknown kind of state 'node'"):
        keys.state_prefix("node", "c1")
