# SPDX-License-Identifier: GPL-3.0-or-later
"""What Ansible keeps in a cluster's etcd: the estate record and service definitions.

Every write is a transaction that compares the revision that was read, so that two writers never overwrite each other
unseen. Nothing is removed that was not named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from isthmus_mesh import jsontext, keys
from isthmus_mesh.documents import DocumentError, ServiceDefinition

from .kvstore import Compare, Delete, KeyValue, Put, SyncEtcd


class EstateError(Exception):
    """A document in etcd stands in the way; the text says which, why and the next step."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key that had to change: JSON before and after, empty when there was or is none."""

    key: str
    before: str
    after: str


def write_documents(client: SyncEtcd, documents: Mapping[str, Any], apply: bool) -> list[Change]:
    """Make the record in etcd equal to ``documents``; others stay. `EstateError` for one that is newer in etcd.

    The roster comes last: it is what says that the record is complete.
    """
    changes = []
    for name in sorted(documents, key=lambda name: (keys.ESTATE_PREFIX + name == keys.ROSTER, name)):
        key = keys.ESTATE_PREFIX + name
        found = client.get(key)
        document = _json(key, found)
        if document == documents[name]:
            continue
        if document is not None and document.get("revision", 0) > documents[name]["revision"]:
            raise EstateError(
                f"{key} has revision {document['revision']} in etcd, and this run would write "
                f"{documents[name]['revision']}: another run was faster. Run the playbook again"
            )
        changes.append(_change(client, key, found, documents[name], apply))
    return changes


def write_services(
    client: SyncEtcd, present: Iterable[Mapping[str, Any]], absent: Iterable[str], owner: str, apply: bool
) -> list[Change]:
    """Make services of ``owner`` so; ``absent`` are ``<namespace>/<name>``.

    A definition of another owner is `EstateError` that names both when it is to be written, and stays when it is to
    be absent. `revision` counts up with each change.
    """
    changes = []
    for document in present:
        try:
            wanted = replace(ServiceDefinition.from_dict(document), owner=owner)
        except DocumentError as exc:
            raise EstateError(f"service {document.get('namespace')}/{document.get('name')}: {exc}") from exc
        key = keys.service_definition_key(wanted.namespace, wanted.name)
        found = client.get(key)
        held = _definition(key, found)
        if held is not None and held.owner != owner:
            raise EstateError(
                f"service {wanted.namespace}/{wanted.name} belongs to {held.owner}, and {owner} would define it too. "
                f"Remove one of the two: {_WHERE.get(held.owner, held.owner)}, or {_WHERE.get(owner, owner)}"
            )
        if held is not None and replace(held, revision=0) == replace(wanted, revision=0):
            continue
        revision = 1 if held is None else held.revision + 1
        changes.append(_change(client, key, found, replace(wanted, revision=revision).to_dict(), apply))
    for name in absent:
        key = keys.service_definition_key(*name.split("/", 1))
        found = client.get(key)
        held = _definition(key, found)
        if held is not None and held.owner == owner:
            changes.append(_change(client, key, found, None, apply))
    return changes


def owner_of(client: SyncEtcd, name: str) -> str | None:
    """Who owns the service ``<namespace>/<name>``; None when there is none."""
    key = keys.service_definition_key(*name.split("/", 1))
    held = _definition(key, client.get(key))
    return None if held is None else held.owner


_WHERE = {
    "inventory": "isthmus_estate.services in the inventory",
    "module": "the task with isthmus.mesh.global_service",
}


def _change(client: SyncEtcd, key: str, found: KeyValue | None, document: Any, apply: bool) -> Change:
    after = "" if document is None else jsontext.dumps(document)
    if apply:
        unchanged = Compare(key, "mod", "=", 0 if found is None else found.mod_revision)
        operation = Delete(key) if document is None else Put(key, after)
        if not client.txn([unchanged], [operation], []).succeeded:
            raise EstateError(f"{key} was changed by somebody else during this run. Run the playbook again")
    return Change(key, "" if found is None else found.value.decode(errors="replace"), after)


def _json(key: str, found: KeyValue | None) -> Any:
    """The document, None when there is none or it is damaged (then it is replaced)."""
    if found is None:
        return None
    try:
        document = json.loads(found.value)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _definition(key: str, found: KeyValue | None) -> ServiceDefinition | None:
    if found is None:
        return None
    try:
        return ServiceDefinition.from_json(found.value)
    except DocumentError as exc:
        raise EstateError(
            f"{key} in etcd is damaged ({exc}), so its owner is not known. Look at it with `etcdctl get {key}`, delete "
            "it when it is not needed, and run again"
        ) from exc
