# SPDX-License-Identifier: GPL-3.0-or-later
"""Which of the peers' services get an address here."""

from __future__ import annotations

import json
from typing import Any

import pytest
from isthmus_agent.kvstore import KeyValue
from isthmus_agent.registrar import offered as module
from isthmus_agent.registrar.offered import Offered, Remote
from isthmus_agent.registrar.publish import PeerServices
from isthmus_mesh import keys
from isthmus_mesh.wire import ClusterService, L4Addr


class Mirrored:
    """A mirror as far as it is read."""

    def __init__(self, *services: str, known: bool = True, **more: Any) -> None:
        self.wanted = {keys.node_key("cloud", "n", cached=True): "{}"} | dict(offer(one, **more) for one in services)
        self.services_changes = 0
        self.services_known = known


def offer(name: str, cluster: str = "cloud", shared: bool = True, headless: bool = False) -> tuple[str, str]:
    frontends = {} if headless else {"10.96.0.10": {"http": L4Addr("TCP", 80)}}
    namespace, _, short = name.partition("/")
    service = ClusterService(cluster, namespace, short, 2, frontends, shared=shared)
    return keys.service_key(cluster, namespace, short, cached=True), service.to_json()


def roster(**states: str) -> KeyValue:
    services = {f"shop/{name}": {"state": state, "clusters": []} for name, state in states.items()}
    return KeyValue(keys.ROSTER, json.dumps({"services": services}).encode())


NOT_OFFERED = {
    "not shared": {"shared": False},
    "headless": {"headless": True},
}


@pytest.mark.parametrize("how", NOT_OFFERED.values(), ids=NOT_OFFERED)
def test_what_has_no_address_to_be_reached_by(how: dict[str, Any]) -> None:
    assert Offered().services([Mirrored("shop/web", **how)], 1, None).names == frozenset()


@pytest.mark.parametrize("name", ["Shop/web", "shop/web.x", f"shop/{'a' * 64}", "shop/web\n10.0.0.1 bank"])
def test_a_name_that_is_none_of_dns_is_not_taken(name: str) -> None:
    assert Offered().services([Mirrored(name, "shop/good")], 1, None).names == {"shop/good"}


def test_what_the_estate_declares_is_left_to_it() -> None:
    mirrors = [Mirrored("shop/web", "shop/old", "shop/far")]
    found = Offered().services(mirrors, 1, roster(web="present", old="absent"))
    assert found == PeerServices(frozenset(["shop/old", "shop/far"]), True)


@pytest.mark.parametrize(("mirrors", "peers", "complete"), [([], 0, True), ([], 1, False), ([Mirrored()], 2, False)])
def test_what_of_a_peer_is_not_known(mirrors: list[Mirrored], peers: int, complete: bool) -> None:
    assert Offered().services(mirrors, peers, None).complete == complete
    assert not Offered().services([Mirrored(), Mirrored(known=False)], 2, None).complete


def test_values_that_cannot_be_read_do_no_harm() -> None:
    mirror = Mirrored("shop/web")
    mirror.wanted[keys.service_key("cloud", "shop", "bad", cached=True)] = "[1e999]"
    for text in (b"[]", b"\xff", b'{"services":[]}', b'{"services":{"shop/web":7}}'):
        assert Offered().services([mirror], 1, KeyValue(keys.ROSTER, text)).names == {"shop/web"}


def test_only_what_changed_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(module, "_offer", lambda key, _: read.append(key) or None)
    mirror, found = Mirrored("shop/a", "shop/b"), Offered()
    first = found.services([mirror], 1, None)
    assert found.services([mirror], 1, None) is first
    assert len(read) == 2
    key, text = offer("shop/a")
    mirror.wanted[key] = text + " "
    mirror.services_changes += 1
    found.services([mirror], 1, None)
    assert read[2:] == [key]


def test_values_of_peers_by_service_and_the_same_object_for_what_is_the_same() -> None:
    cloud, edge, found = Mirrored("shop/web", "shop/db"), Mirrored("shop/web"), Remote()
    first = found.services({"cloud": cloud, "edge": edge})
    assert {name: sorted(there) for name, there in first.items()} == {
        ("shop", "web"): ["cloud", "edge"],
        ("shop", "db"): ["cloud"],
    }
    assert found.services({"cloud": cloud, "edge": edge}) is first
    key, text = offer("shop/db")
    cloud.wanted[key] = text + " "
    cloud.services_changes += 1
    second = found.services({"cloud": cloud, "edge": edge})
    assert second["shop", "web"] is first["shop", "web"]
    assert second["shop", "db"] == {"cloud": text + " "}
    assert list(found.services({"edge": edge})) == [("shop", "web")]
