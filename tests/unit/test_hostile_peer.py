# SPDX-License-Identifier: GPL-3.0-or-later
"""A hostile peer, from its etcd to this host's datapath: through the mirror, the agent's decoder and `desired`."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import Any

import agent_mesh as mesh
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isthmus_agent.desired.compute import Desired, HostFacts, desired
from isthmus_agent.desired.datapath import Route
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.kvstore.client import EtcdClient, Header, KeyValue, RangeResult, decode_key
from isthmus_agent.registrar.leader import NotLeader, Writer
from isthmus_agent.registrar.mirror import Mirror
from isthmus_agent.registrar.publish import Change
from isthmus_agent.registrar.service import Registrar
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


# Documents without a fault in their form: what each of them claims is the peer's own or somebody else's.
ADDRESSES = (
    *("10.102.0.1", "10.102.0.2", "10.102.0.18", "10.102.0.77", "198.18.2.11", "198.18.2.12", "203.0.113.9"),
    *("10.101.0.1", "10.101.0.2", "10.101.0.18", "10.103.0.2", "10.111.0.10", "198.18.1.11", "198.18.1.12"),
    *("198.18.3.11", "127.0.0.1", str(IPv4Address(0)), "224.0.0.1", "::1", "fd00::1"),
    *("::ffff:198.18.1.11", "::ffff:10.101.0.2", "::ffff:127.0.0.1"),
)
RANGES = ("10.102.0.0/16", "10.101.0.0/28", "10.101.0.16/28", "10.103.0.2/32", "10.0.0.0/8", "0.0.0.0/0", "fd00::/64")


PORTS = {"http": {"Protocol": "TCP", "Port": 8080}}


@st.composite
def claims(draw: st.DrawFn, kind: str) -> tuple[str, str]:
    """A key and a value of a kind that fit each other; one field of them may be what is not the peer's."""
    wrong = draw(st.sampled_from(("prefix", "name", "cluster", "id", "machine", "address", "range", "special", "none")))

    def pick(field: str, good: Any, others: Sequence[Any]) -> Any:
        return draw(st.sampled_from(others)) if field == wrong else good

    prefix = keys.state_prefix(kind, pick("prefix", "cloud", ("onprem", "edge")))
    cluster, number = pick("cluster", "cloud", ("onprem", "edge")), pick("id", 2, (0, 1, 3, 258))
    address, machine = pick("address", "10.102.0.2", ADDRESSES), pick("machine", "198.18.2.11", ADDRESSES)
    if kind == "nodes":
        name = pick("name", draw(st.sampled_from(("cloud-1", "cloud-9"))), ("onprem-1", "onprem-2"))
        special = pick("special", "", [each for each in ADDRESSES if ":" not in each])
        document: dict[str, Any] = {
            "Name": name,
            "Cluster": cluster,
            "ClusterID": number,
            "IPAddresses": [
                {"Type": "InternalIP", "IP": machine},
                {"Type": draw(st.sampled_from(("InternalIP", "ExternalIP", "CiliumInternalIP", "odd"))), "IP": address},
            ],
            "IPv4AllocCIDR": "10.102.0.0/28",
            "IPv4SecondaryAllocCIDRs": [pick("range", "10.102.1.0/28", RANGES)],
            draw(st.sampled_from(("IPv4HealthIP", "IPv4IngressIP"))): special,
        }
        if document["IPAddresses"][1]["Type"] != "CiliumInternalIP" and wrong != "address":
            del document["IPAddresses"][1]
        return prefix + name, json.dumps(document)
    if kind == "ip":
        identity = pick("special", (number << 16) + 1, (0, 1, 6, 300, (1 << 24) + (2 << 16) + 1))
        length = pick("range", "", ("/8", "/16", "/31"))
        masks = {"": None, "/8": "/wAAAA==", "/16": "//8AAA==", "/31": "/////g=="}
        ip = {"/8": "10.0.0.0", "/16": "10.102.0.0"}.get(length, address)
        return prefix + ip + length, json.dumps({"IP": ip, "HostIP": machine, "ID": identity, "Mask": masks[length]})
    if kind == "identities":
        return f"{prefix}{(number << 16) + 9}", mesh.labels("cloud").replace("cloud", cluster)
    name = pick("name", "web", ("db",))
    document = {
        "cluster": cluster,
        "namespace": "shop",
        "name": name,
        "clusterID": number,
        "backends": {address: PORTS},
        "frontends": {machine: PORTS},
        "shared": True,
    }
    return f"{prefix}shop/{name}", json.dumps(document)


@st.composite
def etcds(draw: st.DrawFn) -> dict[str, dict[str, bytes]]:
    """A peer's etcd: valid keys with valid and hostile values, and hostile keys with either."""
    found: dict[str, dict[str, bytes]] = {}
    for kind, good in GOOD.items():
        valid = {key: value if isinstance(value, str) else json.dumps(value) for key, value in good.items()}
        found[kind] = {key: value.encode() for key, value in valid.items() if draw(st.booleans())}
        for _ in range(draw(st.integers(0, 2))):
            like = draw(st.sampled_from(sorted(good)))
            key = draw(
                st.just(like) | SUFFIXES.map(lambda suffix, kind=kind: keys.state_prefix(kind, "cloud") + suffix)
            )
            found[kind][key] = draw(hostile(good[like]))
    return found


@st.composite
def claiming(draw: st.DrawFn) -> dict[str, dict[str, bytes]]:
    """A peer's etcd in which everything has its form."""
    found: dict[str, dict[str, bytes]] = {kind: {} for kind in keys.KINDS}
    for kind in draw(st.lists(st.sampled_from(keys.KINDS), min_size=1, max_size=3)):
        key, text = draw(claims(kind))
        found[kind][key] = text.encode()
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
    check_peer(items)


@settings(max_examples=5 * settings.default.max_examples)
@given(claiming())
def test_what_has_its_form_claims_nothing_of_others(items: dict[str, dict[str, bytes]]) -> None:
    check_peer(items)


def check_peer(items: dict[str, dict[str, bytes]]) -> None:
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
        check_content(kind, key, content[key])
    status = PeerStatus.from_json(content[keys.peer_status_key("cloud")])
    assert status.keys == {kind: taken[kind] for kind in keys.KINDS}
    assert sum(taken.values()) + len(mirror.refused) == sum(map(len, items.values()))
    assert sum(status.refused.values()) == len(mirror.refused)

    # Every agent understands what was taken.
    found, decoder = host_of(content)
    assert decoder.bad == {}
    check_claims(found)


def check_content(kind: str, key: str, text: str) -> None:
    """What another reader of our etcd, a Cilium agent, would take of this key."""
    if kind == "identities":
        assert int(key.rsplit("/", 1)[1]) >> 16 == 2
        assert ";k8s:io.cilium.k8s.policy.cluster=cloud;" in f";{text}"
        return
    document = json.loads(text)
    if kind == "ip":
        assert document["ID"] < 256 or document["ID"] >> 16 == 2
        assert ip_address(document["IP"]) in PEER.workload_ranges4[0]
        assert key.rsplit("/cloud/", 1)[1].partition("/")[0] == document["IP"]
        check_endpoint(ip_address(document["HostIP"]) if document["HostIP"] else None)
        return
    inside: list[str] = []
    if kind == "nodes":
        assert (document["Cluster"], document["ClusterID"]) == ("cloud", 2)
        assert key.endswith("/" + document["Name"])
        named = {"IPv4HealthIP", "IPv6HealthIP", "IPv4IngressIP", "IPv6IngressIP"}
        inside += [document[name] for name in named if document[name]]
        for cidr in (document["IPv4AllocCIDR"], *(document["IPv4SecondaryAllocCIDRs"] or ())):
            if cidr is not None:
                prefix = int.from_bytes(base64.b64decode(cidr["Mask"]), "big").bit_count()
                assert IPv4Network(f"{cidr['IP']}/{prefix}").subnet_of(PEER.workload_ranges4[0])
        assert document["IPv6AllocCIDR"] is document["IPv6SecondaryAllocCIDRs"] is None
        for entry in document["IPAddresses"] or ():
            if entry["Type"] == "CiliumInternalIP":
                inside.append(entry["IP"])
            elif entry["Type"] not in ("Hostname", "InternalDNS", "ExternalDNS"):
                check_endpoint(ip_address(entry["IP"]))
    else:
        assert (document["cluster"], document["clusterID"]) == ("cloud", 2)
        assert key.endswith(f"/cloud/{document['namespace']}/{document['name']}")
        inside += document["backends"]
    assert all(ip_address(address) in PEER.workload_ranges4[0] for address in inside)


def check_claims(found: Desired) -> None:
    """Of the datapath nothing but the peer's own part differs from that of a host that never heard of it."""
    now, before = found.datapath, ALONE.datapath
    for part in ("addresses", "local", "workloads", "rules", "cluster_id", "identity_shift", "overlay_port"):
        assert getattr(now, part) == getattr(before, part)
    assert found.names == ALONE.names
    assert now.ipcache.items() >= before.ipcache.items()
    assert now.peers.items() >= before.peers.items()
    # With an address that lies in no node's range, all of the peer's own range is led over the overlay.
    assert now.routes >= before.routes - {Route(PEER.workload_ranges4[0], unreachable=True)}
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
    assert not any((plain.is_loopback, plain.is_unspecified, plain.is_multicast))
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
    # Refused ones too: what another cluster's id was refused for is taken when that one goes.
    for key in [*decoder.documents(), *decoder.bad, *EVERYTHING]:
        decoder.delete(key)
    assert decoder.state() == mesh.decoder().state()


def test_a_defect_that_a_peers_data_finds_ends_neither_the_other_parts_nor_the_registrar() -> None:
    async def run() -> int:
        turns = 0
        again = asyncio.Event()

        async def part() -> None:
            nonlocal turns
            turns += 1
            if turns == 1:
                raise TypeError("unhashable type: 'list'")
            again.set()
            await asyncio.Event().wait()

        registrar = Registrar.__new__(Registrar)
        task = asyncio.create_task(registrar._again("mirror cloud", part))
        await asyncio.wait_for(again.wait(), 30)
        task.cancel()
        return turns

    assert asyncio.run(run()) == 2


def test_the_end_of_a_term_ends_every_part() -> None:
    async def part() -> None:
        raise NotLeader("another registrar leads")

    with pytest.raises(NotLeader):
        asyncio.run(Registrar.__new__(Registrar)._again("publish", part))
