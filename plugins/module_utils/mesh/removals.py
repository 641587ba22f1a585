# SPDX-License-Identifier: BSD-2-Clause
"""What a plan cuts, in words for the person who is about to apply it. Pure: no IO, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from .model import Model, Service
from .record import QUARANTINE, Record, forgotten_hosts

DRAINS = "New flows stop at once, established ones have 30 seconds."
"""The agents' `isthmus_agent.desired.drain.GRACE`."""

Backends = Mapping[str, frozenset[tuple[str, str]]]  # by service: (host, workload) of each


def cuts(model: Model, before: Record, after: Record, removed: Iterable[str], now: datetime) -> Iterator[str]:
    """A line for each of `removed` (full names as the plan gives them): what it takes away, and how to undo it.

    Not for what is forgotten as lost: that ends at once, and there is no way back but to join anew.
    """
    had, stay = _backends(model, before), _backends(model, after)
    date = (now + QUARANTINE).strftime("%Y-%m-%d")
    lost = forgotten_hosts(after.clusters.values())
    for name in sorted(removed):
        kind, _slash, rest = name.partition("/")
        if kind in ("vpc", "peering"):
            what = f"VPC of site {rest}" if kind == "vpc" else f"peering of the VPCs of {rest.replace('/', ' and ')}"
            yield (
                f"{name}: what the mesh has in the {what} goes before hosts are changed: packets that go by it end at "
                "once. Undo: put it back into the inventory and run site."
            )
        elif kind == "bgp":
            yield (
                f"{name}: when all hosts have been changed, those of site {rest} announce their ranges no more: native "
                "packets that routers lead by it end then. Undo: put it back into the inventory and run site."
            )
        elif rest in lost or (
            kind == "cluster" and before.clusters[rest]["hosts"] and lost.keys() >= set(before.clusters[rest]["hosts"])
        ):
            continue
        elif kind == "cluster":
            hosts = sorted(before.clusters[rest]["hosts"])
            yield (
                f"{name}: the others forget its {_count(len(hosts), 'host')} ({', '.join(hosts)}), and it them. "
                f"{_lost(had, stay, set(hosts))}{DRAINS} Undo: put it back into the inventory and run site (until "
                f"{date} its hosts get the ranges that they had), until isthmus.mesh.teardown has taken its hosts "
                "apart; that cannot be undone without a backup."
            )
        elif kind == "host":
            address = _host(before, rest)["range4"]
            yield (
                f"{name}: its certificate loses its rights. {_lost(had, stay, {rest})}{DRAINS} Its range {address} is "
                f"kept back until {date}. Undo: put it back into the inventory and run site (it gets another range), "
                "until isthmus.mesh.teardown has deleted its keys; it joins as a new host then."
            )
        elif kind == "workload":
            host, _slash, workload = rest.partition("/")
            address = _host(before, host)["workloads"][workload]["address4"]
            yield (
                f"{name}: its connections end, since its address {address} leaves the host; it is kept back until "
                f"{date}. {_lost(had, stay, {host}, workload)}Undo: put it back and run site (it gets another address)."
            )
        elif kind == "member":
            cluster, _slash, host = rest.partition("/")
            left = after.clusters[cluster]["etcd"]["members"]
            spare = (len(left) - 1) // 2
            yield (
                f"{name}: etcd of {cluster} has {', '.join(left)} left, of which {spare or 'none'} may fail. Its data "
                f"stays on {host} in a directory beside. Undo: list it again and run site; it joins as a new member."
            )
        elif kind == "kubernetes":
            nodes = [host for host, entry in _hosts(before.clusters[rest]).items() if "kubernetes_node" in entry]
            yield (
                f"{name}: its pods and its services leave the mesh; {_count(len(nodes), 'node')} "
                f"({', '.join(sorted(nodes)) or 'none'}) stay as machines. Kubernetes itself goes on. {DRAINS} "
                "Undo: put `kubernetes` back into the inventory and run site."
            )
        elif kind == "pods":
            cluster, _slash, network = rest.partition("/")
            yield (
                f"{name}: pods of {cluster} with addresses in {network} leave the mesh. Undo: put the range back into "
                "pod_ranges and run site."
            )
        elif kind == "service":
            backends = had.get(rest, frozenset())
            where = ", ".join((before.roster or {"services": {rest: {"clusters": []}}})["services"][rest]["clusters"])
            yield (
                f"{name}: its name and addresses go from {where}. "
                + (f"It has {_count(len(backends), 'backend')}. " if rest in had else "")
                + f"{DRAINS} Undo: declare it again and run site; until {date} it gets the same addresses."
            )


def _backends(model: Model, record: Record) -> Backends:
    """Of every service that the inventory declares or removes, what the record's hosts have for it."""
    return {key: frozenset(_selected(service, record)) for key, service in model.services.items()}


def _selected(service: Service, record: Record) -> Iterator[tuple[str, str]]:
    services = {} if record.roster is None else record.roster["services"]
    clusters = services.get(service.key, {"clusters": ()})["clusters"]
    for doc in record.clusters.values():
        for host, entry in _hosts(doc).items():
            for key, workload in entry["workloads"].items():
                namespace, _slash, name = key.partition("/")
                if doc["name"] in clusters and service.definition.selects(host, namespace, name, workload["labels"]):
                    yield host, key


def _lost(had: Backends, stay: Backends, hosts: set[str], workload: str | None = None) -> str:
    lines = []
    for service, backends in sorted(had.items()):
        gone = [one for one in backends if one[0] in hosts and workload in (None, one[1])]
        if gone:
            left = len(stay[service])
            lines.append(f"{service} loses {len(gone)} of {_count(len(backends), 'backend')}, {left or 'NONE'} left")
    return f"{'; '.join(lines)}. " if lines else ""


def _host(record: Record, name: str) -> Mapping[str, Any]:
    host: Mapping[str, Any] = next(_hosts(doc)[name] for doc in record.clusters.values() if name in _hosts(doc))
    return host


def _hosts(document: Mapping[str, Any]) -> Mapping[str, Any]:
    hosts: Mapping[str, Any] = document.get("hosts", {})
    return hosts


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
