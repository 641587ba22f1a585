# SPDX-License-Identifier: GPL-3.0-or-later
"""What of a peer's keys enters our etcd, and as what."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.registrar.mirror import cache_key, state_key, translate
from isthmus_mesh import keys
from isthmus_mesh.spec import EtcdSpec, PeerSpec
from isthmus_mesh.wire import WireError

PEER = PeerSpec(
    "cloud", 2, (IPv4Network("10.102.0.0/16"),), IPv4Network("10.112.0.0/16"), EtcdSpec(("https://a:1",), "", "", "")
)
FOREIGN = {"198.18.1.11": "onprem", "198.18.2.11": "cloud"}
LABELS = "k8s:app=web;k8s:io.cilium.k8s.policy.cluster=cloud;k8s:io.kubernetes.pod.namespace=shop;"


def node(**more: Any) -> dict[str, Any]:
    return {
        "Name": "n1",
        "Cluster": "cloud",
        "ClusterID": 2,
        "IPAddresses": [{"Type": "InternalIP", "IP": "198.18.2.11"}, {"Type": "CiliumInternalIP", "IP": "10.102.0.1"}],
        "IPv4AllocCIDR": {"IP": "10.102.0.0", "Mask": "////8A=="},
        **more,
    }


def pair(**more: Any) -> dict[str, Any]:
    return {"IP": "10.102.0.2", "Mask": None, "HostIP": "198.18.2.11", "ID": 131073, "Key": 0, "Metadata": "", **more}


def service(**more: Any) -> dict[str, Any]:
    backends = {"10.102.0.2": {"http": {"Protocol": "TCP", "Port": 8080}}}
    return {"cluster": "cloud", "namespace": "shop", "name": "web", "clusterID": 2, "backends": backends, **more}


def take(kind: str, key: str, value: object) -> tuple[str, str]:
    text = value if isinstance(value, (str, bytes)) else json.dumps(value)
    return translate(kind, PEER, 255, key, text if isinstance(text, bytes) else text.encode(), FOREIGN)


GOOD = {
    "nodes": ("cilium/state/nodes/v1/cloud/n1", node(), "cilium/cache/nodes/v1/cloud/n1"),
    "ip": ("cilium/state/ip/v1/default/10.102.0.2", pair(), "cilium/cache/ip/v1/cloud/10.102.0.2"),
    "identities": ("cilium/state/identities/v1/id/131073", LABELS, "cilium/cache/identities/v1/cloud/id/131073"),
    "services": ("cilium/state/services/v1/cloud/shop/web", service(), "cilium/cache/services/v1/cloud/shop/web"),
}


@pytest.mark.parametrize("kind", keys.KINDS)
def test_good_key_enters_in_the_layout_of_kvstoremesh(kind: str) -> None:
    key, value, expected = GOOD[kind]
    target, text = take(kind, key, value)
    assert target == expected
    assert state_key(kind, "cloud", target) == key
    if kind == "identities":
        assert text == LABELS
    else:
        assert value.items() <= json.loads(text).items()  # type: ignore[union-attr]
        assert take(kind, key, text) == (target, text)


def test_nothing_rides_along_unread() -> None:
    """A Cilium reader matches field names without case: a second spelling would pass us and count for it."""
    text = json.dumps(pair())[:-1] + ',"id":65540,"hostip":"198.18.1.11"}'
    _, written = take("ip", GOOD["ip"][0], text)
    assert "65540" not in written
    assert "198.18.1.11" not in written


BAD = [
    ("nodes", "cilium/state/nodes/v1/onprem/n1", node(), "key has not the form of its kind"),
    ("nodes", "cilium/state/nodes/v1/cloud/n1/x", node(), "key has not the form of its kind"),
    ("nodes", "cilium/state/nodes/v1/cloud/n2", node(), "name differs from key"),
    ("nodes", "cilium/state/nodes/v1/cloud/n1", node(Cluster="onprem"), "cluster differs from key"),
    ("nodes", "cilium/state/nodes/v1/cloud/n1", node(ClusterID=1), "cluster id is not the cluster's"),
    (
        "nodes",
        "cilium/state/nodes/v1/cloud/n1",
        node(IPv4SecondaryAllocCIDRs=[{"IP": "10.101.0.0", "Mask": "//8AAA=="}]),
        "range is not the cluster's",
    ),
    (
        "nodes",
        "cilium/state/nodes/v1/cloud/n1",
        node(IPAddresses=[{"Type": "ExternalIP", "IP": "198.18.1.11"}]),
        "address is another cluster's machine",
    ),
    (
        "nodes",
        "cilium/state/nodes/v1/cloud/n1",
        node(IPAddresses=[{"Type": "InternalIP", "IP": "127.0.0.1"}]),
        "address is a loopback address",
    ),
    ("ip", "cilium/state/ip/v1/default/10.102.0.3", pair(), "address differs from key"),
    ("ip", "cilium/state/ip/v1/default/10.101.0.2", pair(IP="10.101.0.2"), "address is not in the cluster's ranges"),
    ("ip", "cilium/state/ip/v1/default/10.102.0.2", pair(ID=65537), "identity is not the cluster's"),
    ("ip", "cilium/state/ip/v1/default/10.102.0.2", pair(HostIP="198.18.1.11"), "address is another cluster's machine"),
    ("ip", "cilium/state/ip/v1/default/10.102.0.2", "[]", "value is not an object"),
    ("identities", "cilium/state/identities/v1/id/65537", LABELS, "identity is not the cluster's"),
    ("identities", "cilium/state/identities/v1/id/131073", "k8s:a=b;", "labels do not name the cluster"),
    ("identities", "cilium/state/identities/v1/id/131073", b"\xff;", "not UTF-8"),
    ("identities", "cilium/state/identities/v1/id/0131073", LABELS, "key has not the form of its kind"),
    ("services", "cilium/state/services/v1/cloud/shop/db", service(), "name differs from key"),
    (
        "services",
        "cilium/state/services/v1/cloud/shop/web",
        service(backends={"10.101.0.2": {}}),
        "backend is not in the cluster's ranges",
    ),
]


@pytest.mark.parametrize(("kind", "key", "value", "reason"), BAD)
def test_bad_key_is_refused_with_its_reason(kind: str, key: str, value: object, reason: str) -> None:
    with pytest.raises(WireError, match=f"^{reason}$"):
        take(kind, key, value)


@given(kind=st.sampled_from(keys.KINDS), suffix=st.text(), value=st.binary())
def test_anything_is_taken_or_refused_and_stays_in_the_peers_part(kind: str, suffix: str, value: bytes) -> None:
    try:
        target = cache_key(kind, "cloud", keys.state_prefix(kind, "cloud") + suffix)
    except WireError:
        return
    assert target.startswith(keys.cache_prefix(kind, "cloud"))
    with pytest.raises(WireError):
        translate(kind, PEER, 255, keys.state_prefix(kind, "cloud") + suffix, value, FOREIGN)
