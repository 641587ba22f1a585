# SPDX-License-Identifier: GPL-3.0-or-later
"""The lock that a run of the playbook holds in the etcd of every cluster that it changes.

It has a name, a holder and an end of its own: a lease, put anew whenever the run comes by. Writes of the run compare
the lock's create revision, so that a run which lost it writes nothing more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from isthmus_mesh import keys

from .kvstore import Compare, Delete, KeyValue, Put, SyncEtcd


class LockedError(Exception):
    """Another run holds the lock: `holder` is its document, empty when what is there is none of ours."""

    def __init__(self, holder: Mapping[str, Any]) -> None:
        super().__init__(holder)
        self.holder = holder


def take(client: SyncEtcd, document: Mapping[str, Any], seconds: int, breaking: str = "") -> Compare:
    """Hold the lock for ``seconds`` from now on; returns what is true as long as the run has it.

    ``document`` is what is written with the lock; its `name` is the same whenever this run comes by, and keeps `since`.
    ``breaking`` is the name of the run that loses it, if it has it. `LockedError` when another run has it.
    """
    lease = client.lease_grant(seconds).id
    while True:
        found = client.get(keys.RUN_LOCK)
        holder = _holder(found)
        if found is None:
            condition = Compare(keys.RUN_LOCK, "create", "=", 0)
        elif holder.get("name") == document["name"]:
            document = {**document, "since": holder.get("since", document["since"])}
            condition = Compare(keys.RUN_LOCK, "mod", "=", found.mod_revision)
        elif breaking and holder.get("name") == breaking:
            # Gone first: the create revision that the loser's writes compare must not be the next one's.
            client.txn([Compare(keys.RUN_LOCK, "mod", "=", found.mod_revision)], [Delete(keys.RUN_LOCK)], [])
            continue
        else:
            client.lease_revoke(lease)
            raise LockedError(holder)
        if client.txn([condition], [Put(keys.RUN_LOCK, json.dumps(document, sort_keys=True), lease)], []).succeeded:
            held = client.get(keys.RUN_LOCK)
            if held is not None and held.lease == lease:
                return Compare(keys.RUN_LOCK, "create", "=", held.create_revision)


def release(client: SyncEtcd, name: str) -> bool:
    """Give the lock back if the run ``name`` has it; returns whether it had."""
    found = client.get(keys.RUN_LOCK)
    if found is None or _holder(found).get("name") != name:
        return False
    unchanged = Compare(keys.RUN_LOCK, "mod", "=", found.mod_revision)
    return client.txn([unchanged], [Delete(keys.RUN_LOCK)], []).succeeded


def _holder(found: KeyValue | None) -> dict[str, Any]:
    if found is None:
        return {}
    try:
        document = json.loads(found.value)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
