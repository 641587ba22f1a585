# SPDX-License-Identifier: GPL-3.0-or-later
"""How an agent in a pod gets its spec: the cluster's document, and what the registrar dealt to its node.

Ansible does not enter the nodes of such a cluster. The registrar deals each Node its range of the mesh; the agent waits
for that, keeps it in its state directory, so that it can start when no etcd answers, and begins anew when it changes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from isthmus_mesh import keys
from isthmus_mesh.documents import DocumentError, NodeAllocation
from isthmus_mesh.spec import ClusterDocument, HostSpec

from isthmus_agent.agent.files import write_atomically
from isthmus_agent.agent.log import fields
from isthmus_agent.kvstore.client import EtcdClient
from isthmus_agent.kvstore.store import PrefixStore, canary_rule
from isthmus_agent.kvstore.tasks import end, wait_set

logger = logging.getLogger(__name__)

FILE = "node.json"
NODE = "ISTHMUS_NODE"
"""Name of the environment variable that a pod has the name of its node from."""
TICK = 1.0


class Enrolment:
    """What the node `name` has of the mesh. `node` is that, once it is known; `waiting` says in words for what it is
    waited, empty when for nothing."""

    def __init__(self, document: ClusterDocument, name: str, client: EtcdClient, directory: Path) -> None:
        self.node: HostSpec | None = None
        self.waiting = ""
        self._document = document
        self._name = name
        self._key = keys.alloc_node_key(name)
        self._path = directory / FILE
        # One key: the store's prefix may be that of other nodes too. What another etcd says counts once a registrar has
        # said that all it dealt is there.
        canary = keys.canary_key(document.cluster.name, "services")
        self._store = PrefixStore(client, self._key, rule=canary_rule, canary=canary)
        self._recall()

    async def run(self) -> None:
        """Follow etcd; returns when the node has something else than `node`, which is saved then. With `node` None that
        is when it has something at all."""
        following = asyncio.create_task(self._follow())
        try:
            while True:
                found = self._dealt()
                if found is not None and found != self.node:
                    self._save(found)
                    logger.info("this node's part of the mesh", extra=fields(node=self._name, range4=str(found.range4)))
                    self.node = found
                    return
                await wait_set(self._store.changed, TICK)
                self._store.changed.clear()
        finally:
            await end([following])

    async def _follow(self) -> None:
        """For ever: certificate files that cannot be read come back with their Secret."""
        while True:
            try:
                await self._store.run()
            except OSError as error:
                self._store.connected, self._store.error = False, str(error)
            await asyncio.sleep(TICK)

    def _dealt(self) -> HostSpec | None:
        """What etcd has of the node now; None: nothing that can be used."""
        found, words = None, ""
        kv = self._store.items.get(self._key)
        if not self._store.synced:
            words = f"the cluster's etcd does not answer: {self._store.error or 'not yet'}"
        elif kv is None:
            words = f"the registrar has dealt node {self._name} no range of the mesh yet ({self._key})"
        else:
            try:
                allocation = NodeAllocation.from_json(kv.value)
                if allocation.released is None:
                    found = _host(self._name, allocation)
                else:
                    words = f"Kubernetes has no node {self._name} since {allocation.released}"
            except DocumentError as error:
                words = f"{self._key} cannot be used: {error}"
        if words and words != self.waiting:
            logger.warning("waiting", extra=fields(reason=words, started=self.node is not None))
        self.waiting = words
        return found

    def _recall(self) -> None:
        try:
            saved = json.loads(self._path.read_bytes())
            if saved["place"] != self._place():
                raise ValueError(f"it is of {saved['place']}")
            self.node = _host(self._name, NodeAllocation.from_json(json.dumps(saved["allocation"])))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("what was dealt before is not used", extra=fields(path=str(self._path), reason=repr(error)))

    def _save(self, node: HostSpec) -> None:
        """A disk that does not take it costs the start without etcd."""
        allocation = NodeAllocation(str(node.range4), str(node.mesh4), str(node.underlay4), "")
        text = json.dumps({"place": self._place(), "allocation": json.loads(allocation.to_json())})
        try:
            write_atomically(self._path, text.encode(), 0o600)
        except OSError as error:
            logger.warning("cannot be kept for a start without etcd", extra=fields(error=str(error)))

    def _place(self) -> dict[str, str]:
        return {"estate": self._document.estate, "cluster": self._document.cluster.name, "node": self._name}


def _host(name: str, allocation: NodeAllocation) -> HostSpec:
    underlay = IPv4Address(allocation.underlay4)
    return HostSpec(
        name=name,
        underlay4=underlay,
        advertise4=underlay,
        range4=IPv4Network(allocation.range4),
        mesh4=IPv4Address(allocation.mesh4),
        kubernetes_node=name,
    )
