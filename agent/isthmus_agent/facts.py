# SPDX-License-Identifier: GPL-3.0-or-later
"""Facts about the mesh as a cluster's own etcd holds them, as plain JSON values; for modules and tests. Reads only."""

from __future__ import annotations

import json
from typing import Any

from isthmus_mesh import keys

from .kvstore import SyncEtcd

Document = dict[str, Any]


def _documents(client: SyncEtcd, prefix: str) -> dict[str, Document]:
    """Key -> document for what is below ``prefix``; what is not a JSON object appears as ``{"damaged": reason}``."""
    found = {}
    for entry in client.range(prefix).kvs:
        try:
            document = json.loads(entry.value)
        except ValueError as exc:
            document = {"damaged": str(exc)}
        found[entry.key] = document if isinstance(document, dict) else {"damaged": "no JSON object"}
    return found


def services(client: SyncEtcd, cluster: str) -> list[Document]:
    """Every service this cluster knows: definition, address, and the ready backends by the cluster that offers them."""
    found: dict[tuple[str, str], Document] = {}

    def entry(name: tuple[str, str]) -> Document:
        empty: Document = {"namespace": name[0], "name": name[1], "definition": None, "address": None, "clusters": {}}
        return found.setdefault(name, empty)

    for key, document in _documents(client, keys.SERVICE_DEFINITIONS_PREFIX).items():
        name = keys.parse_service_definition_key(key)
        if name is not None:
            entry(name)["definition"] = document
    for key, document in _documents(client, keys.VIPS_PREFIX).items():
        name = keys.parse_vip_key(key)
        if name is not None and document.get("released") is None:
            entry(name)["address"] = document.get("ipv4")
    for key, document in _documents(client, keys.LOCAL_SERVICES_PREFIX).items():
        name = keys.parse_local_service_key(key)
        if name is not None:
            entry(name)["clusters"][cluster] = _offer(document)
    for prefix in (keys.state_prefix("services", cluster), f"{keys.CACHE_PREFIX}services/v1/"):
        for key, document in _documents(client, prefix).items():
            parsed = keys.parse_service_key(key)
            if parsed is not None:
                entry(parsed[1:])["clusters"][parsed[0]] = _offer(document)
    return [found[name] for name in sorted(found)]


def _offer(document: Document) -> Document:
    return {"backends": sorted(document.get("backends") or {}), "shared": document.get("shared", True)}


def mesh(client: SyncEtcd, cluster: str) -> Document:
    """The cluster's nodes and whether their agents are alive, its peers, its registrar, the record's revisions."""
    alive = {keys.parse_alive_key(key): document for key, document in _documents(client, keys.ALIVE_PREFIX).items()}
    nodes = []
    for key, document in sorted(_documents(client, keys.NODE_REPORTS_PREFIX).items()):
        name = keys.parse_node_report_key(key)
        nodes.append({**document, "name": name, "alive": alive.get(name)})
    peers = {
        keys.parse_peer_status_key(key): document for key, document in _documents(client, keys.PEERS_PREFIX).items()
    }
    estate = _documents(client, keys.ESTATE_PREFIX)
    return {
        "cluster": cluster,
        "nodes": nodes,
        "peers": peers,
        "leader": _documents(client, keys.LEADER).get(keys.LEADER),
        "estate": {key.removeprefix(keys.ESTATE_PREFIX): document.get("revision") for key, document in estate.items()},
    }
