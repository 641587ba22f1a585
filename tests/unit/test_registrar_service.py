# SPDX-License-Identifier: GPL-3.0-or-later
"""What a registrar gives its mirrors; the whole of it, on real etcds, is tested in tests/integration."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from isthmus_agent.kvstore import EtcdClient, KeyValue, PrefixStore
from isthmus_agent.kvstore.client import Header, RangeResult
from isthmus_agent.registrar import service
from isthmus_agent.registrar.leader import Term, Writer
from isthmus_agent.registrar.mirror import Mirror
from isthmus_agent.registrar.service import Registrar
from isthmus_mesh import keys
from isthmus_mesh.documents import NodeAllocation
from isthmus_mesh.spec import ClusterDocument

FILES = {"endpoints": ["https://127.0.0.1:1"], "ca": "ca", "cert": "cert", "key": "key"}
PEER = {"name": "cloud", "id": 2, "workload_ranges4": ["10.102.0.0/16"], "service_range4": "10.112.0.0/16", **FILES}
CLUSTER = {
    "name": "kube",
    "id": 4,
    "max_clusters": 255,
    "site": "kube",
    "workload_ranges4": ["10.104.0.0/16"],
    "service_range4": "10.114.0.0/16",
}
DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "kind": "cluster",
    "estate": "lab",
    "hash": "",
    "cluster": CLUSTER,
    "overlay": {"port": 8472, "mtu": None},
    "dns": {"domain": "clusterset.local"},
    "service_ranges4": [],
    "mesh_ranges4": [],
    "etcd": FILES,
    "registrar": {"cert": "cert", "key": "key", "peers": [PEER]},
}


class OwnEtcd(EtcdClient):
    """An etcd that answers and holds nothing."""

    def __init__(self) -> None:
        super().__init__(FILES["endpoints"], "", "", "")
        self.last_header = Header(0xA1, 1, 10, 1)

    async def range(self, prefix: str, **_: Any) -> RangeResult:
        return RangeResult((), 10, 0xA1, 1)

    async def get(self, key: str, **_: Any) -> KeyValue | None:
        return None


def a_registrar(
    place: Path, monkeypatch: pytest.MonkeyPatch, mirror: Callable[[Mirror], None], **more: Any
) -> Registrar:
    """One of a cluster whose record is there; its mirrors call `mirror` and end."""

    async def run(self: Mirror) -> None:
        mirror(self)

    async def refresh(_: PrefixStore) -> None:
        pass

    monkeypatch.setattr(Mirror, "run", run)
    monkeypatch.setattr(PrefixStore, "refresh", refresh)
    monkeypatch.setattr(Registrar, "_record", lambda _: ({}, ""))
    monkeypatch.setattr(service, "RETRY_DELAY", 0.01)
    document = {**DOCUMENT, "registrar": {**DOCUMENT["registrar"], **more}}
    spec = ClusterDocument(json.dumps(document)).of_pod("registrar-a")
    registrar = Registrar(spec, estate_file=place / "estate.json", state_directory=place)
    registrar.client = OwnEtcd()
    return registrar


async def mirrored(registrar: Registrar) -> None:
    writer = Writer(registrar.client, Term(1, 1, Header(0xA1, 1, 10, 1)))
    await registrar._mirror(writer, registrar.registrar.peers[0])


@pytest.mark.parametrize("read", [False, True])
def test_a_mirror_that_begins_anew_knows_a_peer_that_was_read_before(
    read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What of an unread peer is not known stays: its services' addresses here, its backends in Kubernetes."""
    known: list[bool] = []

    def mirror(one: Mirror) -> None:
        known.append(one.services_known)
        one.services_known = one.services_known or read

    registrar = a_registrar(tmp_path, monkeypatch, mirror)
    for _ in range(3):
        asyncio.run(mirrored(registrar))
    assert known == [False, read, read]


def test_mirrors_wait_until_it_is_known_which_addresses_are_own_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record does not have them, so a peer could claim one of them."""
    seen: list[Mapping[str, str]] = []
    api = {"server": "https://198.18.4.11:6443", "ca": "ca", "token": "token"}
    registrar = a_registrar(tmp_path, monkeypatch, lambda one: seen.append(one._foreign()), kubernetes=api)
    node = NodeAllocation("10.104.0.0/28", "10.104.0.1", "198.18.4.11", "2026-01-02T03:04:05Z")

    async def run() -> None:
        waiting = asyncio.create_task(mirrored(registrar))
        await asyncio.sleep(0.1)
        assert seen == []
        registrar._deal_nodes({"site": "kube"}, {keys.alloc_node_key("n1"): node.to_json()})
        await waiting
        assert seen == [{"198.18.4.11": "kube"}]

    asyncio.run(run())
