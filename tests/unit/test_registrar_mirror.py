# SPDX-License-Identifier: GPL-3.0-or-later
"""What of a peer's keys enters our etcd, and as what."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.kvstore import EtcdTooLarge
from isthmus_agent.kvstore.client import EtcdClient, Event, Header, KeyValue, RangeResult, WatchBatch, decode_key
from isthmus_agent.registrar.leader import Writer
from isthmus_agent.registrar.mirror import Budget, Mirror, cache_key, state_key, translate
from isthmus_agent.registrar.publish import Change, apply_changes
from isthmus_mesh import keys
from isthmus_mesh.documents import DocumentError, PeerStatus
from isthmus_mesh.spec import EtcdSpec, PeerSpec
from isthmus_mesh.wire import ClusterConfig, WireError

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
        "underlay address is no machine's own",
    ),
    (
        "nodes",
        "cilium/state/nodes/v1/cloud/n1",
        node(IPAddresses=[{"Type": "InternalIP", "IP": "::ffff:198.18.1.11"}]),
        r"IPAddresses\[0\].IP is an IPv4 address in IPv6's form",
    ),
    (
        "ip",
        "cilium/state/ip/v1/default/10.102.0.2",
        pair(HostIP="::ffff:198.18.1.11"),
        "HostIP is an IPv4 address in IPv6's form",
    ),
    (
        "ip",
        "cilium/state/ip/v1/default/10.102.0.2",
        pair(HostIP=str(IPv4Address(0))),
        "underlay address is no machine's own",
    ),
    ("ip", "cilium/state/ip/v1/default/10.102.0.2", pair(HostIP="0:0::1"), "underlay address is no machine's own"),
    ("ip", "cilium/state/ip/v1/default/10.102.0.2", pair(HostIP="224.0.0.1"), "underlay address is no machine's own"),
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


def own_range(**more: Any) -> tuple[str, str]:
    reserved = (IPv4Network("10.101.0.0/16"), IPv4Network("10.102.0.0/16"))
    kind = "ip" if "HostIP" in more else "nodes"
    document = pair(**more) if kind == "ip" else node(**more)
    return translate(kind, PEER, 255, GOOD[kind][0], json.dumps(document).encode(), FOREIGN, reserved)


def test_a_machine_does_not_stand_in_a_range_of_the_mesh() -> None:
    """A node's address goes before a workload's in every reader: claiming 10.101.0.2 would take its packets."""
    assert own_range(IPv4HealthIP="10.102.0.9")
    for more in ({"IPAddresses": [{"Type": "ExternalIP", "IP": "10.101.0.2"}]}, {"HostIP": "10.101.0.2"}):
        with pytest.raises(WireError, match="underlay address is in a range of the mesh"):
            own_range(**more)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"IPv4HealthIP": "fd00::1"}, "IPv4HealthIP is not an IPv4 address"),
        ({"IPv6IngressIP": "10.102.0.9"}, "IPv6IngressIP is not an IPv6 address"),
        ({"IPv4HealthIP": "192.0.2.1"}, "health or ingress address is not in the cluster's ranges"),
        ({"IPv4IngressIP": "10.101.0.2"}, "health or ingress address is not in the cluster's ranges"),
    ],
)
def test_readers_route_health_and_ingress_addresses_too(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        take("nodes", GOOD["nodes"][0], node(**more))


class Written(Writer):
    """A writer that remembers; `before` runs at each write, as what happens while etcd is awaited."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.header = Header(0xA1, 1, 10, 1)
        self.changes: list[Change] = []
        self.before = before

    async def apply(self, changes: Sequence[Change]) -> None:
        self.before()
        await asyncio.sleep(0)
        self.changes += changes

    def puts(self) -> set[str]:
        return {change.key for change in self.changes if change.value is not None}


def a_mirror(writer: Writer | None = None, **more: Any) -> Mirror:
    client = EtcdClient(["https://127.0.0.1:1"], *more.pop("files", ("ca", "cert", "key")))
    return Mirror(
        PEER,
        255,
        client,
        writer or Written(),
        cache=more.pop("cache", {}),
        actual={},
        config="{}",
        actual_config=None,
        previous=more.pop("previous", None),
        foreign=more.pop("foreign", dict),
        started=lambda: None,
        wall=lambda: "2026-01-02T03:04:05Z",
        **more,
    )


def listed(mirror: Mirror, kind: str, items: dict[str, object]) -> None:
    """As if a list of this kind had just been completed and believed."""
    store = mirror.stores[kind]
    kvs = tuple(KeyValue(key, text(value), mod_revision=5) for key, value in sorted(items.items()))
    store._apply_list(RangeResult(kvs, 5, 0xB2, 1), True)


def text(value: object) -> bytes:
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def test_a_list_that_completes_while_etcd_is_awaited_has_no_canary_yet() -> None:
    """Its keys are not written: a reader that believed the canary would delete what it holds of that kind."""

    async def run() -> None:
        writer = Written()
        mirror = a_mirror(writer)
        listed(mirror, "nodes", {GOOD["nodes"][0]: GOOD["nodes"][1]})
        writer.before = lambda: listed(mirror, "services", {GOOD["services"][0]: GOOD["services"][1]})
        await mirror._write()
        assert keys.canary_key("cloud", "nodes", cached=True) in writer.puts()
        assert keys.canary_key("cloud", "services", cached=True) not in writer.puts()
        await mirror._write()
        assert keys.canary_key("cloud", "services", cached=True) in writer.puts()
        order = [change.key for change in writer.changes]
        assert order.index(GOOD["services"][2]) < order.index(keys.canary_key("cloud", "services", cached=True))

    asyncio.run(run())


def judged(key: str, value: bytes) -> dict[str, Any]:
    """The status document after a peer's key was judged, as it goes into etcd."""
    mirror = a_mirror()
    mirror._judge("services", key, KeyValue(key, value), {})
    assert mirror.wanted == {}
    return json.loads(mirror.status().to_json().encode())


def test_a_key_that_is_no_text_is_refused_and_can_be_told() -> None:
    found = judged(decode_key(b"cilium/state/services/v1/cloud/shop/\xff"), json.dumps(service()).encode())
    assert found["refused"] == {"name differs from key": 1}
    assert found["refused_last"]["key"].endswith("shop/\\udcff")


def test_what_json_cannot_say_again_is_refused() -> None:
    text = json.dumps(service())[:-1] + ',"zones":{"a":1e999}}'
    assert judged(GOOD["services"][0], text.encode())["refused"] == {"cannot be written as JSON": 1}


def test_the_text_of_a_refusal_is_bounded() -> None:
    mirror = a_mirror()
    for number in range(100):
        mirror._refuse(f"k{number}" + "x" * 5000, f"{number} " + "y" * 5000)
    assert len(mirror.status().to_json()) < 8000


def test_what_is_mirrored_but_no_text_does_not_keep_a_mirror_from_starting() -> None:
    """Somebody wrote it behind our back; it is written as it is until the peer was read."""
    cached = GOOD["nodes"][2]
    mirror = a_mirror(cache={cached: "\udcff"})
    assert mirror.stores["nodes"].items[GOOD["nodes"][0]].value == b"\xff"


async def no_certificate() -> PeerStatus:
    mirror = a_mirror(files=("/nonexistent/ca", "/nonexistent/cert", "/nonexistent/key"))
    await mirror._check_config()
    return mirror.status()


def test_a_peer_whose_certificate_is_not_there_yet_is_unreachable() -> None:
    """The peer's CA signs it; while that site is cut off, this cluster must go on publishing."""
    assert asyncio.run(no_certificate()).state == "unreachable"


SMALL = Budget({"nodes": 3, "ip": 3, "identities": 3, "services": 3}, bytes=2000, value=600, rate=1.0)


def services(count: int, **more: Any) -> dict[str, object]:
    return {
        f"cilium/state/services/v1/cloud/shop/s{number}": service(name=f"s{number}", **more) for number in range(count)
    }


class Frozen:
    """A mirror with a small budget and a clock of its own that has mirrored one service."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.writer = Written()
        self.mirror = a_mirror(self.writer, budget=SMALL, clock=lambda: self.now)
        self.mirror._config = ClusterConfig(id=2, synced_canaries=True)
        listed(self.mirror, "services", services(1))
        self.write()
        assert self.mirror.status().state != "frozen"
        self.writer.changes.clear()

    def write(self, after: float = 0.0) -> None:
        self.now += after
        asyncio.run(self.mirror._write())

    def mirrored(self) -> int:
        return sum(change.key.startswith("cilium/cache/") for change in self.writer.changes)

    def says(self) -> tuple[str, str]:
        status = self.mirror.status()
        assert status.refused_last is not None
        return status.state, status.refused_last[1]


def event(key: str, value: object) -> WatchBatch:
    return WatchBatch((Event(KeyValue(key, text(value)), False),), 6, 0xB2)


def test_a_peer_with_too_many_keys_is_frozen_and_comes_back() -> None:
    frozen = Frozen()
    store = frozen.mirror.stores["services"]
    *fitting, last = [event(key, value) for key, value in services(4).items()]
    for batch in fitting:
        store._apply_batch(batch)
    with pytest.raises(EtcdTooLarge) as raised:
        store._apply_batch(last)
    store._lost(raised.value)
    frozen.write(1.0)
    assert frozen.mirrored() == 0
    assert frozen.says() == ("frozen", "more than 3 keys, which is this peer's budget")
    listed(frozen.mirror, "services", services(2))
    frozen.write(1.0)
    assert frozen.mirrored() == 0, "it is tried again after a minute"
    frozen.write(60.0)
    assert frozen.mirrored() == 1
    assert frozen.mirror.status().state != "frozen"


def test_a_peer_with_too_many_bytes_is_frozen() -> None:
    frozen = Frozen()
    listed(frozen.mirror, "services", services(3, labels={"a": "x" * 400}))
    listed(frozen.mirror, "nodes", {GOOD["nodes"][0]: node(Labels={"a": "x" * 400})})
    frozen.write(1.0)
    assert frozen.mirrored() == 0
    assert frozen.says() == ("frozen", "more than 2000 bytes, which is this peer's budget")


def test_a_peer_that_changes_too_much_is_frozen_until_it_has_calmed_down() -> None:
    frozen = Frozen()
    for turn in range(6):  # 12 keys in a burst, of which one is used up; three changed keys each second
        listed(frozen.mirror, "services", services(3, labels={"turn": str(turn)}))
        frozen.write(1.0)
    assert frozen.says() == ("frozen", "more than 1 changed keys a second, which is this peer's budget")
    before = frozen.mirrored()
    frozen.write(60.0)
    assert frozen.mirrored() == before + 3


def test_a_value_that_is_too_large_is_refused_alone() -> None:
    frozen = Frozen()
    listed(frozen.mirror, "services", {**services(2), **services(1, labels={"a": "x" * 600})})
    frozen.write(1.0)
    assert frozen.mirrored() == 1
    assert frozen.says()[1] == "value is larger than 600 bytes"
    assert frozen.mirror.status().state != "frozen"


class Moved:
    """A mirror that has mirrored a node, its workload and its service, and the record's addresses as they come to be.
    The peer says nothing more."""

    def __init__(self, **more: Any) -> None:
        self.foreign: dict[str, str] = {"198.18.2.11": "cloud"}
        self.writer = Written()
        self.mirror = a_mirror(self.writer, foreign=lambda: self.foreign, **more)
        for kind, (key, value, _) in GOOD.items():
            listed(self.mirror, kind, {key: value})
        self.given(self.foreign)

    def given(self, foreign: dict[str, str]) -> set[str]:
        """The kinds that are mirrored after the record gives these addresses to these clusters."""
        self.foreign = foreign
        asyncio.run(self.mirror._write())
        here: dict[str, str] = {}
        apply_changes(self.writer.changes, here)
        counts = self.mirror.status().keys
        assert counts == {kind: int(GOOD[kind][2] in here) for kind in keys.KINDS}
        return {kind for kind in keys.KINDS if counts[kind]}


def test_an_address_that_the_record_gives_to_another_cluster_is_withdrawn_from_a_silent_peer() -> None:
    moved = Moved()
    assert moved.given({"198.18.9.11": "edge"}) == set(keys.KINDS)
    assert moved.given({"198.18.2.11": "onprem"}) == {"identities", "services"}
    assert moved.mirror.status().refused == {"address is another cluster's machine": 2}
    assert moved.given({"198.18.2.11": "cloud"}) == set(keys.KINDS), "it is the peer's again"
    assert moved.mirror.status().refused == {}


def test_a_restart_withdraws_what_was_given_to_another_cluster_before() -> None:
    writer = Written()
    cached = {target: text(value).decode() for _, value, target in GOOD.values()}
    mirror = a_mirror(writer, cache=cached, foreign=lambda: {"198.18.2.11": "onprem"})
    asyncio.run(mirror._write())
    assert mirror.wanted.keys() == {GOOD["identities"][2], GOOD["services"][2]}


def test_being_frozen_keeps_no_address_that_was_given_to_another_cluster() -> None:
    now = 1000.0
    moved = Moved(budget=Budget(SMALL.keys, bytes=2000, rate=0.0), clock=lambda: now)
    listed(moved.mirror, "services", services(3, labels={"a": "x" * 600}))
    assert moved.given({"198.18.2.11": "onprem"}) == {"identities", "services"}
    assert moved.mirror.status().state == "frozen"
    listed(moved.mirror, "services", {GOOD["services"][0]: GOOD["services"][1]})
    now += 60.0
    assert moved.given({"198.18.2.11": "onprem"}) == {"identities", "services"}
    assert moved.mirror.status().refused == {"address is another cluster's machine": 2}


@pytest.mark.parametrize(
    "bad", [node(IPAddresses=[{"Type": "InternalIP", "IP": "198.18.1.11"}]), "[]"], ids=["foreign", "malformed"]
)
def test_a_bad_value_leaves_the_one_before_until_its_address_is_anothers(bad: object) -> None:
    moved = Moved()
    key = GOOD["nodes"][0]
    moved.given({"198.18.1.11": "onprem"})
    moved.mirror.stores["nodes"]._apply_batch(event(key, bad))
    for other in ({"198.18.1.11": "onprem"}, {"198.18.1.11": "onprem", "198.18.9.11": "edge"}):
        assert "nodes" in moved.given(other)
    assert key in moved.mirror.refused
    assert "nodes" not in moved.given({"198.18.1.11": "onprem", "198.18.2.11": "edge"})


def test_refused_keys_are_remembered_up_to_a_bound() -> None:
    mirror = a_mirror()
    for number in range(3000):
        mirror._refuse(f"cilium/state/x{number}", "not JSON")
    mirror._refuse(keys.cluster_config_key("cloud"), "cluster id is not the cluster's")
    assert len(mirror.refused) == 1001
    assert mirror.status().state == "refused"


def test_the_age_of_a_proof_is_by_one_clock() -> None:
    now = 1000.0
    mirror = a_mirror(clock=lambda: now)
    assert mirror.status().proof_age is None
    mirror._proved()
    now += 12.5
    assert mirror.status().proof_age == 12.5
    mirror.stores["ip"].last_proof = now - 2.0
    assert PeerStatus.from_json(mirror.status().to_json()).proof_age == 2.0


@pytest.mark.parametrize(
    ("proof", "age", "expected"),
    [("2026-01-02T03:03:05Z", 4.0, 60.0), ("2026-01-02T03:05:05Z", 4.0, 4.0), ("2026-01-02T03:04:00Z", None, 5.0)],
)
def test_the_age_of_an_earlier_terms_proof_is_not_forgotten(proof: str, age: float | None, expected: float) -> None:
    mirror = a_mirror(previous=PeerStatus("connected", last_proof=proof, proof_age=age))
    assert mirror.status().proof_age == expected


def test_a_status_without_the_age_of_the_proof_is_accepted() -> None:
    document = json.loads(PeerStatus("connected", last_proof="2026-01-02T03:04:05Z").to_json())
    del document["proof_age"]
    assert PeerStatus.from_json(json.dumps(document)).proof_age is None
    with pytest.raises(DocumentError, match="proof_age"):
        PeerStatus.from_json(json.dumps({**document, "proof_age": -1}))
