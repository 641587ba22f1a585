# SPDX-License-Identifier: GPL-3.0-or-later
"""Plays a cloud's part: Services of the type LoadBalancer get addresses, which lead to a node of the cluster.

The address is routed to a node that is Ready; kube-proxy there does the rest, as behind a provider's balancer that does
not translate addresses. Runs as a process of the lab for each cluster (`Kubernetes.up` starts it).
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # namespace and name of a Service

INTERVAL = 0.5  # seconds


def pool(site: ipaddress.IPv4Network) -> list[ipaddress.IPv4Address]:
    """Addresses for a site's balancers: of a network of their own, a hundred sites further on."""
    network = ipaddress.IPv4Network((int(site.network_address) + (100 << 8), 28))
    return list(network.hosts())


def addresses(
    services: Iterable[Mapping[str, Any]], free: Iterable[ipaddress.IPv4Address]
) -> dict[Key, ipaddress.IPv4Address]:
    """The address of each Service of the type LoadBalancer: the one that it has, else the first that nobody has."""
    found: dict[Key, ipaddress.IPv4Address] = {}
    without: list[Key] = []
    for service in services:
        if service["spec"].get("type") != "LoadBalancer" or service["metadata"].get("deletionTimestamp"):
            continue
        key = service["metadata"]["namespace"], service["metadata"]["name"]
        ingress = (service.get("status", {}).get("loadBalancer") or {}).get("ingress") or ()
        if ingress:
            found[key] = ipaddress.IPv4Address(ingress[0]["ip"])
        else:
            without.append(key)
    left = [address for address in free if address not in found.values()]
    return {**found, **dict(zip(sorted(without), left, strict=False))}


def ready(nodes: Iterable[Mapping[str, Any]]) -> list[str]:
    """InternalIP of each node that is Ready, in the order of their names."""
    found = {}
    for node in nodes:
        conditions = {one["type"]: one["status"] for one in node["status"].get("conditions") or ()}
        internal = [one["address"] for one in node["status"].get("addresses") or () if one["type"] == "InternalIP"]
        if conditions.get("Ready") == "True" and internal:
            found[node["metadata"]["name"]] = internal[0]
    return [found[name] for name in sorted(found)]


class Balancer:
    """Of one cluster. `lead(address, node)` makes the way to an address; node "" takes it away."""

    def __init__(self, server: str, pki: Path, site: ipaddress.IPv4Network, lead: Callable[[str, str], None]) -> None:
        """`server`: host:port of the API; `pki`: directory with ca.crt, admin.crt, admin.key."""
        self.server, self.free, self.lead = server, pool(site), lead
        self.tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self.tls.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self.ways: dict[str, str] = {}

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPSConnection(self.server, timeout=10, context=self.tls)
        try:
            headers = {"Content-Type": "application/merge-patch+json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise OSError(f"{method} {path}: {answer.status} {content.decode(errors='replace')[:200]}")
        return json.loads(content)

    def step(self) -> None:
        """Look once, and do what is to be done. OSError when the API does not answer: ways stay as they are."""
        services = self.ask("GET", "/api/v1/services")["items"]
        nodes = ready(self.ask("GET", "/api/v1/nodes")["items"])
        wanted = addresses(services, self.free)
        if nodes:
            ways = {str(address): nodes[0] for address in wanted.values()}
            kept = {address: node for address, node in self.ways.items() if address in ways and node in nodes}
            for address in {**self.ways, **ways}:
                node = kept.get(address) or ways.get(address, "")
                if node != self.ways.get(address):
                    self.lead(address, node)
            self.ways = {**ways, **kept}
        for service in services:
            key = service["metadata"]["namespace"], service["metadata"]["name"]
            there = (service.get("status", {}).get("loadBalancer") or {}).get("ingress")
            if key in wanted and not there:
                status = {"loadBalancer": {"ingress": [{"ip": str(wanted[key])}]}}
                path = f"/api/v1/namespaces/{key[0]}/services/{key[1]}/status"
                self.ask("PATCH", path, {"status": status})

    def serve(self) -> None:
        while True:
            try:
                self.step()
            except (OSError, http.client.HTTPException) as error:
                print(f"balancer of {self.server}: {error}", flush=True)
            time.sleep(INTERVAL)
