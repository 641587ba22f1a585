# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json

import agent_mesh as mesh
import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.state.decoder import Decoder, Refusal
from isthmus_mesh import keys, wire
from isthmus_mesh.documents import PeerStatus


def test_state_of_all_clusters_has_one_shape():
    state = mesh.state(mesh.documents({"onprem": [1], "cloud": [1, 2]}))
    assert set(state.nodes) == {
        ("onprem", "onprem-1"),
        ("onprem", "onprem-2"),
        ("onprem", "onprem-3"),
        ("cloud", "cloud-1"),
        ("cloud", "cloud-2"),
        ("edge", "edge-1"),
    }
    assert state.ips["cloud", "10.102.0.2"].identity == (2 << 16) + 1
    assert set(state.services) == {("onprem", "shop", "web"), ("cloud", "shop", "web")}
    assert state.configs["edge"].id == 3
    assert str(state.vips["shop", "web"].ipv4) == "10.111.0.10"
    assert state.identities[(2 << 16) + 1]["k8s:app"] == "web"


@given(st.permutations(sorted(mesh.documents({"onprem": [1], "cloud": [1]}).items())))
def test_order_of_keys_does_not_matter(items):
    """A peer's values may come before the config that says which id they must have."""
    assert mesh.state(dict(items)) == mesh.state(mesh.documents({"onprem": [1], "cloud": [1]}))


def test_changes_of_a_peers_status_are_noted():
    now = [5.0]
    decoder = Decoder("onprem", 1, 255, clock=lambda: now[0])
    key = keys.peer_status_key("cloud")
    for age in (1.0, 2.0, 2.0, 3.0):
        now[0] += 10.0
        decoder.put(key, PeerStatus("connected", proof_age=age).to_json().encode())
    assert decoder.peer_changes == {"cloud": (45.0, 2)}
    decoder.put(key, b"{")
    assert decoder.peer_changes == {"cloud": (45.0, 2)}, "a refused value is no news"
    decoder.delete(key)
    assert decoder.peer_changes == {}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (keys.node_key("cloud", "cloud-1", cached=True), b"{", "not JSON"),
        (keys.node_key("cloud", "cloud-1", cached=True), b"\xff\xfe", "not UTF-8"),
        (
            keys.node_key("cloud", "cloud-1", cached=True),
            mesh.node("cloud", 1, cluster_id=9).to_json().encode(),
            "cluster id is not the cluster's",
        ),
        (
            keys.ip_key("10.102.0.2", "cloud"),
            wire.IPIdentityPair("10.102.0.2", 65537, "198.18.2.11").to_json().encode(),
            "identity is not the cluster's",
        ),
        (keys.vip_key("shop", "web"), b'{"ipv4": "10.111.0.999"}', "ipv4 or ipv6 is not an address"),
        (keys.service_definition_key("shop", "web"), b'{"name": "other"}', "ports is empty"),
        (keys.cluster_config_key("cloud"), b'{"id": 1}', "cluster id is our own"),
        (keys.cluster_config_key("cloud"), b'{"id": 3}', "cluster id is another peer's"),
    ],
)
def test_bad_value_is_refused_and_the_last_good_one_stays(key, value, reason):
    decoder = mesh.decoder()
    for known, good in mesh.documents({"onprem": [1], "cloud": [1]}).items():
        decoder.put(known, good)
    before = decoder.state()
    assert decoder.put(key, value) is False
    assert decoder.put(key, value) is False
    assert decoder.state() == before
    assert decoder.refused == {reason: 2}
    assert decoder.take_refusals() == [Refusal(key, reason)], "named once, counted every time"
    assert decoder.documents()[key] != value


def test_a_good_value_after_a_bad_one_heals():
    items = mesh.documents({"cloud": [1]})
    decoder = mesh.decoder()
    for key, value in items.items():
        decoder.put(key, value)
    key = keys.service_key("cloud", "shop", "web", cached=True)
    decoder.put(key, b"[]")
    assert key in decoder.bad
    assert decoder.put(key, mesh.web_service("cloud", [1, 2]).to_json().encode()) is True
    assert key not in decoder.bad
    assert len(decoder.state().services["cloud", "shop", "web"].backends) == 2


def test_sections_without_change_are_the_same_objects():
    items = mesh.documents({"cloud": [1]})
    decoder = mesh.decoder()
    for key, value in items.items():
        decoder.put(key, value)
    before = decoder.state()
    decoder.delete(keys.vip_key("shop", "web"))
    after = decoder.state()
    assert after.nodes is before.nodes
    assert after.vips == {}
    assert before.vips != {}, "a state that was handed out never changes"


def test_a_peers_new_id_refuses_what_carries_the_old_one():
    decoder = mesh.decoder()
    for key, value in mesh.documents({"cloud": [1]}).items():
        decoder.put(key, value)
    decoder.put(keys.cluster_config_key("cloud"), wire.ClusterConfig(id=77, cached=True).to_json().encode())
    assert not [key for key in decoder.state().nodes if key[0] == "cloud"]
    decoder.put(keys.cluster_config_key("cloud"), wire.ClusterConfig(id=2, cached=True).to_json().encode())
    assert not [key for key in decoder.state().nodes if key[0] == "cloud"]  # they come again with the next list


def test_the_id_of_a_removed_peer_can_be_anothers():
    decoder = mesh.decoder()
    items = mesh.documents({"cloud": [1]})
    for key, value in items.items():
        decoder.put(key, value)
    decoder.delete(keys.cluster_config_key("cloud"))
    assert not [key for key in decoder.documents() if key.startswith("cilium/") and "/cloud" in key]
    new = {key.replace("/cloud", "/other"): value.replace(b"cloud", b"other") for key, value in items.items()}
    for key in sorted(new):
        decoder.put(key, new[key])
    for key in items.keys() - new.keys():
        decoder.delete(key)
    assert decoder.state().identities[(2 << 16) + 1]["k8s:io.cilium.k8s.policy.cluster"] == "other"


def renamed(items: dict[str, bytes]) -> dict[str, bytes]:
    """Documents of `cloud` as those of a cluster that has its id, config last."""
    named = {key.replace("/cloud", "/other"): value.replace(b"cloud", b"other") for key, value in items.items()}
    return dict(sorted(((key, named[key]) for key in named.keys() - items.keys()), reverse=True))


@pytest.mark.parametrize("how", ["gone", "another id"])
def test_a_peer_whose_id_is_taken_comes_when_it_is_free(how):
    """The config of a cluster that is removed stays while it drains, beside that of the one that has its id next."""
    decoder = mesh.decoder()
    items = mesh.documents({"cloud": [1]})
    cloud, other = keys.cluster_config_key("cloud"), keys.cluster_config_key("other")
    for key, value in {**items, **renamed(items)}.items():
        decoder.put(key, value)
    assert decoder.bad == {other: "cluster id is another peer's"}
    assert "other" not in decoder.state().configs
    with decoder.batch():
        if how == "gone":
            decoder.delete(cloud)
        else:
            decoder.put(cloud, wire.ClusterConfig(id=77, cached=True).to_json().encode())
    state = decoder.state()
    assert state.configs["other"].id == 2
    assert {name for name in state.nodes if name[0] in ("cloud", "other")} == {
        ("other", "other-1"),
        ("other", "other-2"),
    }
    assert other not in decoder.bad


def test_a_config_that_is_no_more_does_not_come_when_its_id_is_free():
    other = keys.cluster_config_key("other")
    for last in (None, b'{"id": 1}', wire.ClusterConfig(id=9).to_json().encode()):
        decoder = mesh.decoder()
        for key, value in mesh.documents({"cloud": [1]}).items():
            decoder.put(key, value)
        decoder.put(other, wire.ClusterConfig(id=2).to_json().encode())
        if last is None:
            decoder.delete(other)
        else:
            decoder.put(other, last)
        decoder.delete(keys.cluster_config_key("cloud"))
        config = decoder.state().configs.get("other")
        assert config is None or config.id == 9


def test_own_addresses_are_not_read_from_a_mirror():
    decoder = mesh.decoder()
    items = mesh.documents({})
    mirrored = {key.replace("state/ip/v1/default", "cache/ip/v1/onprem"): value for key, value in items.items()}
    mirrored = {key.replace("state/identities/v1", "cache/identities/v1/onprem"): v for key, v in mirrored.items()}
    for key, value in mirrored.items():
        decoder.put(key, value)
    assert not [key for key in decoder.state().ips if key[0] == "onprem"]
    assert not [number for number in decoder.state().identities if number >> 16 == 1]


def test_foreign_clusters_under_cilium_state_are_not_read():
    decoder = mesh.decoder()
    decoder.put(keys.cluster_config_key("cloud"), wire.ClusterConfig(id=2).to_json().encode())
    assert decoder.put(keys.node_key("cloud", "cloud-1"), mesh.node("cloud", 1).to_json().encode()) is False
    assert decoder.put(keys.node_key("onprem", "x", cached=True), mesh.node("onprem", 1).to_json().encode()) is False
    assert decoder.state().nodes == {}


@given(st.sampled_from(sorted(mesh.documents({"onprem": [1], "cloud": [1]}))), st.binary(max_size=80))
def test_no_bytes_can_raise(key, value):
    decoder = mesh.decoder()
    decoder.put(keys.cluster_config_key("cloud"), wire.ClusterConfig(id=2).to_json().encode())
    decoder.put(key, value)
    decoder.state()


@given(
    st.sampled_from(sorted(mesh.documents({"onprem": [1], "cloud": [1]}))),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["IPAddresses", "IPv4AllocCIDR", "ports", "backends", "HostIP", "ID", "ipv4", "id", "Annotations"]),
)
def test_no_json_can_raise(key, junk, field):
    items = mesh.documents({"onprem": [1], "cloud": [1]})
    decoder = mesh.decoder()
    decoder.put(keys.cluster_config_key("cloud"), wire.ClusterConfig(id=2).to_json().encode())
    value = items[key]
    document = json.loads(value) if value.startswith(b"{") else {}
    document[field] = junk
    decoder.put(key, json.dumps(document).encode())
    decoder.state()


def test_nobody_sees_a_half_of_a_batch():
    decoder = mesh.decoder()
    before = decoder.state()
    with decoder.batch():
        for key, value in mesh.documents({"cloud": [1]}).items():
            decoder.put(key, value)
            assert decoder.state() is before
    assert len(decoder.state().nodes) == 6
