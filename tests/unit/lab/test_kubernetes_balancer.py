# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's cloud: which Service gets which address, and which node it leads to."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import kubernetes_balancer as balancer


def service(name: str, address: str = "", kind: str = "LoadBalancer") -> dict[str, Any]:
    status = {"loadBalancer": {"ingress": [{"ip": address}]} if address else {}}
    return {"metadata": {"namespace": "a", "name": name}, "spec": {"type": kind}, "status": status}


def test_addresses_are_of_no_site_and_stay() -> None:
    free = balancer.pool(IPv4Network("198.18.6.0/24"))
    assert free[0] == IPv4Address("198.18.106.1")
    found = balancer.addresses([service("new"), service("old", str(free[0])), service("x", kind="ClusterIP")], free)
    assert found == {("a", "old"): free[0], ("a", "new"): free[1]}


def test_an_address_leads_to_a_node_that_is_ready_and_changes_only_when_that_ends(monkeypatch: Any) -> None:
    ways: list[tuple[str, str]] = []
    patched: list[Any] = []
    there: dict[str, Any] = {"services": [service("web")], "nodes": []}

    class Played(balancer.Balancer):
        def __init__(self) -> None:
            self.free = balancer.pool(IPv4Network("198.18.6.0/24"))
            self.lead, self.ways = (lambda address, node: ways.append((address, node))), {}

        def ask(self, method: str, path: str, body: Any = None) -> Any:
            if method == "PATCH":
                patched.append(body)
            return {"items": there[path.rsplit("/", 1)[1]]} if method == "GET" else {}

    def node(name: str, ready: str) -> dict[str, Any]:
        addresses = [{"type": "InternalIP", "address": f"198.18.6.{name}"}]
        return {
            "metadata": {"name": name},
            "status": {"conditions": [{"type": "Ready", "status": ready}], "addresses": addresses},
        }

    cloud = Played()
    there["nodes"] = [node("11", "False"), node("12", "True")]
    cloud.step()
    assert patched == [{"status": {"loadBalancer": {"ingress": [{"ip": "198.18.106.1"}]}}}]
    assert ways == [("198.18.106.1", "198.18.6.12")]
    there["nodes"] = [node("11", "True"), node("12", "True")]
    there["services"] = [service("web", "198.18.106.1")]
    cloud.step()
    assert len(ways) == len(patched) == 1
    there["nodes"] = [node("11", "True"), node("12", "False")]
    cloud.step()
    assert ways[1:] == [("198.18.106.1", "198.18.6.11")]
    there["services"] = []
    cloud.step()
    assert ways[2:] == [("198.18.106.1", "")]
