# SPDX-License-Identifier: GPL-3.0-or-later
"""What is taken of what peers say about our own former numbers and addresses, and what is not."""

from __future__ import annotations

import json
from ipaddress import IPv4Network

from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.kvstore import KeyValue
from isthmus_agent.registrar.publish import Own
from isthmus_agent.registrar.recall import Claims, agreed, claims_of, label_sets
from isthmus_mesh import keys
from isthmus_mesh.identity import workload_labels
from isthmus_mesh.wire import ClusterService, labels_to_string

OWN = Own("onprem", 1, 255, IPv4Network("10.111.0.0/28"))
NOW = "2026-01-02T03:04:05Z"


def labels(app: str, cluster: str = "onprem") -> str:
    return labels_to_string(workload_labels("shop", "default", cluster, {"app": app}))


def service(name: str, *addresses: str, cluster: str = "onprem", number: int = 1) -> tuple[str, bytes]:
    value = ClusterService(cluster, "shop", name, number, frontends={address: {} for address in addresses})
    return keys.service_key("onprem", "shop", name, cached=True), value.to_json().encode()


def claims(*entries: tuple[str, bytes]) -> Claims:
    return claims_of(OWN, [KeyValue(key, value) for key, value in entries])


def test_only_own_numbers_and_addresses_are_claims() -> None:
    found = claims(
        (keys.identity_key(65540, "onprem"), labels("web").encode()),
        (keys.identity_key(65536, "onprem"), labels("first").encode()),
        (keys.identity_key(131072, "onprem"), labels("range").encode()),
        (keys.identity_key(65541, "onprem"), labels("foreign", "cloud").encode()),
        (keys.identity_key(65542, "cloud"), labels("elsewhere").encode()),
        (keys.identity_key(65543, "onprem"), b"\xff;"),
        service("web", "10.111.0.3"),
        service("two", "10.111.0.4", "10.111.0.5"),
        service("none"),
        service("other", "10.112.0.3"),
        service("broadcast", "10.111.0.15"),
        service("six", "fd00::1"),
        service("cloud", "10.111.0.6", cluster="cloud"),
        service("id", "10.111.0.7", number=2),
        (keys.service_key("onprem", "shop", "deep", cached=True), b"[" * 100_000),
        (keys.node_key("onprem", "h1", cached=True), b"{}"),
    )
    assert found.identities == {65540: labels("web")}
    assert {name: str(OWN.service_range4[address & 15]) for name, address in found.vips.items()} == {
        "shop/web": "10.111.0.3"
    }
    assert sum(found.refused.values()) == 14


@given(st.lists(st.tuples(st.text(max_size=60), st.binary(max_size=60)), max_size=20))
def test_no_answer_of_a_peer_ends_in_an_error(entries: list[tuple[str, bytes]]) -> None:
    found = claims(*entries)
    assert (found.identities, found.vips) == ({}, {})


def test_what_most_peers_say_counts_and_then_what_was_dealt_first() -> None:
    said = {
        "a": Claims({65540: labels("web"), 65542: labels("api")}, {"shop/web": 5, "shop/api": 6}),
        "b": Claims({65540: labels("web")}, {"shop/web": 5}),
        "c": Claims({65540: labels("evil"), 65537: labels("web"), 65539: labels("api")}, {"shop/evil": 5}),
    }
    found = agreed(OWN, said, (), (), NOW)
    assert {key: json.loads(value)["labels"] for key, value in found.items() if "identities" in key} == {
        keys.alloc_identity_key(65540): labels("web"),
        keys.alloc_identity_key(65539): labels("api"),
    }
    assert {key: json.loads(value)["ipv4"] for key, value in found.items() if "vips" in key} == {
        keys.vip_key("shop", "web"): "0.0.0.5",
        keys.vip_key("shop", "api"): "0.0.0.6",
    }


def test_one_peer_alone_cannot_use_up_a_range_nor_displace_what_is_asked_for() -> None:
    first = int(OWN.service_range4.network_address)
    invented = {f"shop/{number}": first + number for number in range(1, 14)}
    said = {"good": Claims({}, {"shop/web": first + 14}), "bad": Claims({}, invented), "worse": Claims({}, invented)}
    found = agreed(OWN, said, (), ("shop/web",), NOW)
    assert len(found) == OWN.service_range4.num_addresses // 2
    assert json.loads(found[keys.vip_key("shop", "web")])["ipv4"] == "10.111.0.14"
    numbers = {number: labels(str(number)) for number in range(65537, 131071)}
    assert len(agreed(OWN, {"bad": Claims(numbers)}, (), (), NOW)) == 32767


def test_labels_of_the_record_are_those_that_get_numbers() -> None:
    workloads = {"shop/web": {"labels": {"app": "web"}}, "shop/bad": {"labels": {"a;": "b"}}}
    assert label_sets(OWN, {"hosts": {"h1": {"workloads": workloads}}}) == {labels("web")}
