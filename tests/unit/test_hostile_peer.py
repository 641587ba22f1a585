# SPDX-License-Identifier: GPL-3.0-or-later
"""A hostile peer, from its etcd to this host's datapath: through the mirror, the agent's decoder and `desired`."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, ip_address
from typing import Any

import agent_mesh as mesh
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.desired.compute import Desired, HostFacts, desired
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.kvstore.client import EtcdClient, Header, KeyValue, RangeResult, decode_key
from isthmus_agent.registrar.leader import Writer
from isthmus_agent.registrar.mirror import Mirror
from isthmus_agent.registrar.publish import Change
from isthmus_agent.state.decoder import Decoder
from isthmus_mesh import keys
from isthmus_mesh.documents import PeerStatus
from isthmus_mesh.spec import EtcdSpec, PeerSpec
from unit.hostile import WORDS, hostile

SPEC = mesh.spec()
PEER = PeerSpec(
    "cloud", 2, (IPv4Network("10.102.0.0/16"),), IPv4Network("10.112.0.0/16"), EtcdSpec(("https://a:1",), "", "", "")
)
RESERVED = (*SPEC.mesh_ranges4, *SPEC.service_ranges4)
EVERYTHING = mesh.documents({"onprem": [1, 2], "cloud": [1, 2], "edge": [1]})
OWN = {key: value for key, value in EVERYTHING.items() if "cloud" not in key}
UNDERLAYS = {
    entry.ip: node.cluster
    for node in mesh.state(EVERYTHING).nodes.values()
    for entry in node.addresses
    if entry.type == "InternalIP"
}


def cached_to_state(kind: str, key: str) -> str:
    return keys.state_prefix(kind, "cloud") + key[len(keys.cache_prefix(kind, "cloud")) :]


GOOD: dict[str, dict[str, Any]] = {
    kind: {
        cached_to_state(kind, key): value.decode() if kind == "identities" else json.loads(value)
        for key, value in EVERYTHING.items()
        if key.startswith(keys.cache_prefix(kind, "cloud"))
    }
    for kind in keys.KINDS
}
GOOD["services"]["cilium/state/services/v1/cloud/shop/web"]["zones"] = {"10.102.0.2": {"zone": "a"}}
# Keys that a hostile writer would try: names and addresses of others, and what is no key of the kind at all.
SUFFIXES = st.sampled_from(WORDS) | st.text(max_size=12) | st.binary(max_size=8).map(decode_key)


class Written(Writer):
    def __init__(self) -> None:
        self.header = Header(0xA1, 1, 10, 1)
        self.content: dict[str, str] = {}

    async def apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            change.key.encode()
            if change.value is None:
                self.content.pop(change.key, None)
            else:
                change.value.encode()
                self.content[change.key] = change.value


def a_mirror(writer: Writer) -> Mirror:
    return Mirror(
        PEER,
        255,
        EtcdClient(["https://127.0.0.1:1"], "ca", "cert", "key"),
        writer,
        cache={},
        actual={},
        config=EVERYTHING[keys.cluster_config_key("cloud")].decode(),
        actual_config=None,
        previous=None,
        foreign=lambda: UNDERLAYS,
        reserved=RESERVED,
        started=lambda: None,
        wall=lambda: "2026-01-02T03:04:05Z",
    )


def mirrored(items: dict[str, dict[str, bytes]]) -> tuple[dict[str, str], Mirror]:
    """What is written of a peer whose lists of each kind are `items`."""
    writer = Written()
    mirror = a_mirror(writer)
    for kind, values in items.items():
        kvs = tuple(KeyValue(key, value, mod_revision=5) for key, value in sorted(values.items()))
        mirror.stores[kind]._apply_list(RangeResult(kvs, 5, 0xB2, 1), True)
    asyncio.run(mirror._write())
    return writer.content, mirror


def host_of(items: dict[str, str]) -> tuple[Desired, Decoder]:
    decoder = mesh.decoder()
    for key, value in OWN.items():
        decoder.put(key, value)
    for key, text in items.items():
        decoder.put(key, text.encode())
    reach = Reachability(up=frozenset(decoder.state().nodes))
    return desired(SPEC, decoder.state(), reach, HostFacts(cgroups={("shop", "web"): (7,)})), decoder


ALONE, _ = host_of({})


@st.composite
def etcds(draw: st.DrawFn) -> dict[str, dict[str, bytes]]:
    """A peer's etcd: valid keys with valid and hostile values, and hostile keys with either."""
    found: dict[str, dict[str, bytes]] = {}
    for kind, good in GOOD.items():
        valid = {key: value if isinstance(value, str) else json.dumps(value) for key, value in good.items()}
        found[kind] = {key: value.encode() for key, value in valid.items() if draw(st.booleans())}
        for _ in range(draw(st.integers(0, 2))):
            like = draw(st.sampled_from(sorted(good)))
            key = draw(st.just(like) | SUFFIXES.map(lambda suffix, kind=kind: keys.state_prefix(kind, "cloud") + suffix))
            found[kind][key] = draw(hostile(good[like]))
    return found


def test_a_good_peer_is_there() -> None:
    """The tests below say something only if this one's parts arrive."""
    valid = {
        kind: {key: (value if isinstance(value, str) else json.dumps(value)).encode() for key, value in good.items()}
        for kind, good in GOOD.items()
    }
    content, mirror = mirrored(valid)
    found, decoder = host_of(content)
    assert mirror.refused == {}
    assert decoder.bad == {}
    assert {backend.cluster_id for service in found.datapath.services.values() for backend in service.backends} == {
        *(1, 2, 3)
    }
    assert IPv4Network("10.102.0.2/32") in found.datapath.ipcache
    assert ip_address("198.18.2.11") in found.datapath.peers


@given(etcds())
def test_a_peer_writes_and_claims_nothing_but_its_own(items: dict[str, dict[str, bytes]]) -> None:
    content, mirror = mirrored(items)

    # What enters our etcd is the peer's part of it, and everything else is counted.
    own_keys = {
        keys.cluster_config_key("cloud"),
        keys.peer_status_key("cloud"),
        *(keys.canary_key("cloud", kind, cached=True) for kind in keys.KINDS),
    }
    taken: Counter[str] = Counter()
    for key in content.keys() - own_keys:
        (kind,) = [kind for kind in keys.KINDS if key.startswith(keys.cache_prefix(kind, "cloud"))]
        taken[kind] += 1
        assert cached_to_state(kind, key) in items[kind]
    status = PeerStatus.from_json(content[keys.peer_status_key("cloud")])
    assert status.keys == {kind: taken[kind] for kind in keys.KINDS}
    assert sum(taken.values()) + len(mirror.refused) == sum(map(len, items.values()))
    assert sum(status.refused.values()) == len(mirror.refused)

    # Every agent understands what was taken.
    found, decoder = host_of(content)
    assert decoder.bad == {}
    check_claims(found)


def check_claims(found: Desired) -> None:
    """Of the datapath nothing but the peer's own part differs from that of a host that never heard of it."""
    now, before = found.datapath, ALONE.datapath
    for part in ("addresses", "local", "workloads", "rules", "cluster_id", "identity_shift", "overlay_port"):
        assert getattr(now, part) == getattr(before, part)
    assert found.names == ALONE.names
    assert now.ipcache.items() >= before.ipcache.items()
    assert now.peers.items() >= before.peers.items()
    assert now.routes >= before.routes
    underlays = set()
    for network in now.ipcache.keys() - before.ipcache.keys():
        entry = now.ipcache[network]
        assert entry.cluster_id == 2
        if entry.is_node:
            underlays.add(network)
            assert not any(network.overlaps(reserved) for reserved in RESERVED)
            assert UNDERLAYS.get(str(network.network_address), "cloud") == "cloud"
        else:
            assert network.subnet_of(PEER.workload_ranges4[0])
            assert entry.identity < 256 or entry.identity >> 16 == 2
        check_endpoint(entry.tunnel)
    for address in now.peers.keys() - before.peers.keys():
        assert now.peers[address].cluster_id == 2
        assert IPv4Network(str(address)) in underlays
        check_endpoint(now.peers[address].endpoint)
    for route in now.routes - before.routes:
        assert route.prefix in underlays or route.prefix.subnet_of(PEER.workload_ranges4[0])
        assert route.source == SPEC.node.mesh4
    assert now.services.keys() == before.services.keys()
    for service in now.services.values():
        for backend in (*service.backends, *service.draining):
            if backend.cluster_id == 2:
                assert backend.address in PEER.workload_ranges4[0]
                check_endpoint(backend.node)
    own = {b for s in before.services.values() for b in s.backends}
    assert own <= {b for s in now.services.values() for b in (*s.backends, *s.draining)}


def check_endpoint(address: Any) -> None:
    """No other cluster's machine, in whatever form the address is written, and a machine at all."""
    if address is None:
        return
    plain = address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
    assert UNDERLAYS.get(str(plain), "cloud") == "cloud"
    assert not (plain.is_loopback or plain.is_unspecified or plain.is_multicast)
    assert not any(plain in network for network in RESERVED)


@given(etcds(), st.permutations(list(keys.KINDS)))
def test_a_peer_that_goes_leaves_nothing(items: dict[str, dict[str, bytes]], order: list[str]) -> None:
    """Also under another name with the same id, and with keys that come while its config is away."""
    content, _ = mirrored(items)
    _, decoder = host_of(content)
    config = keys.cluster_config_key("cloud")
    decoder.delete(config)
    assert not [key for key in decoder.documents() if key.startswith("cilium/") and "cloud" in key]
    renamed = {
        key.replace("/cloud", "/other"): value.replace("cloud", "other")
        for kind in order
        for key, value in content.items()
        if key.startswith(f"cilium/cache/{kind}/")
    }
    for key, text in {keys.cluster_config_key("other"): content[config], **renamed}.items():
        decoder.put(key, text.encode())
    for key in [*content, *renamed, keys.cluster_config_key("other")]:
        decoder.delete(key)
    assert decoder.state() == host_of({})[1].state()


KEYS = st.tuples(st.sampled_from([*EVERYTHING, "cilium/cache/ip/v1/onprem/", "cilium/state/ip/v1/default/"]), SUFFIXES)


@given(st.lists(st.tuples(KEYS, st.booleans(), st.data()), max_size=6))
def test_an_agent_survives_whatever_its_etcd_holds(steps: list[Any]) -> None:
    """Documents of its own etcd with hostile keys and values come and go in any order."""
    decoder = mesh.decoder()
    for key, value in EVERYTHING.items():
        decoder.put(key, value)
    for (like, suffix), is_like, data in steps:
        key = like if is_like else like.rsplit("/", 1)[0] + "/" + suffix
        if data.draw(st.booleans()):
            decoder.delete(key)
        else:
            value = EVERYTHING.get(like, b"{}")
            good = json.loads(value) if value.startswith(b"{") else value.decode()
            decoder.put(key, data.draw(hostile(good)))
        desired(SPEC, decoder.state(), Reachability(), HostFacts())
    for key in [*decoder.documents(), *EVERYTHING]:
        decoder.delete(key)
    assert decoder.state() == mesh.decoder().state()
