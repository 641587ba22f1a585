# SPDX-License-Identifier: GPL-3.0-or-later
"""What Ansible keeps in a cluster's etcd: the estate record and service definitions.

Every write is a transaction that compares the revision that was read, so that two writers never overwrite each other
unseen. Nothing is removed that was not named, or that belongs to a host which the record does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isthmus_mesh import jsontext, keys, openings
from isthmus_mesh.documents import DocumentError, NodeAllocation, ServiceDefinition
from isthmus_mesh.record import newer_schema

from .kvstore import Compare, Delete, KeyValue, Put, SyncEtcd

TXN_OPERATIONS = 100
"""etcd takes 128 in one transaction."""
_CHANGED = (
    "{key} was changed by somebody else during this run, or the run's lock was broken or ran out. "
    "Next: run the playbook again"
)


class EstateError(Exception):
    """A document in etcd stands in the way; the text says which, why and the next step."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key that had to change: JSON before and after, empty when there was or is none."""

    key: str
    before: str
    after: str


def write_documents(
    client: SyncEtcd, documents: Mapping[str, Any], apply: bool, fence: Sequence[Compare] = ()
) -> list[Change]:
    """Make the record in etcd equal to ``documents``; others stay. ``fence`` must be true whenever it is written.

    `EstateError`, before anything is written, when somebody else wrote one of them since they were planned. The
    roster comes last: it is what says that the record is complete.
    """
    differing = []
    for name in sorted(documents, key=lambda name: (keys.ESTATE_PREFIX + name == keys.ROSTER, name)):
        key = keys.ESTATE_PREFIX + name
        found = client.get(key)
        words = superseded(key, found, documents[name])
        if words:
            raise EstateError(words)
        held, document = _json(key, found) or {}, documents[name]
        if document.get("ca_certificate") is None and _unsigned(held) == _unsigned(document):
            continue  # a certificate that this run does not know stays
        if held != document:
            differing.append((key, found, document))
    return [_change(client, key, found, document, apply, fence) for key, found, document in differing]


def superseded(key: str, found: KeyValue | None, document: Mapping[str, Any]) -> str:
    """Why what was planned as ``document`` of the record must not be done: somebody wrote another one since.

    Empty when it may be. Two runs that were planned from one record deal the same numbers and addresses, so what has
    the same revision must be the same.
    """
    held = _json(key, found)
    if words := newer_schema(f"{key} in etcd", held):
        return words
    if held is None or held.get("revision", 0) < document["revision"] or _unsigned(held) == _unsigned(document):
        return ""
    stamp = held.get("last_applied", held)
    who = f"{stamp.get('by') or 'somebody'} wrote it at {stamp.get('when') or 'an unknown time'}"
    following = "Next: run the playbook again; the plan is then made from it"
    if held["revision"] > document["revision"]:
        return (
            f"{key} has revision {held['revision']} in etcd, and this run would write {document['revision']}: "
            f"another run was faster ({who}). {following}"
        )
    return (
        f"{key} has revision {held['revision']} in etcd, and this run would write other content under that number: "
        f"another run was planned from the same record ({who}). {following}"
    )


def _unsigned(document: Mapping[str, Any]) -> dict[str, Any]:
    """Without the authority's certificate, which is added without a new revision."""
    return {name: value for name, value in document.items() if name != "ca_certificate"}


def delete_reports(
    client: SyncEtcd, document: Mapping[str, Any], apply: bool, fence: Sequence[Compare] = ()
) -> list[Change]:
    """Delete what agents said of hosts that the cluster's ``document``, as it is in etcd, does not have.

    An orphan is in the record, so its reports stay. `EstateError` when the record changes meanwhile: agents report
    after the record has their host. The nodes of a cluster whose control plane is in it are those that its registrar
    has dealt a range, after which their agents report.
    """
    known = {name for name, entry in document["hosts"].items() if entry["state"] != "absent"}
    record = keys.estate_cluster_key(document["name"])
    found = client.get(record)
    reports = [
        (kv.key[len(prefix) :].split("/")[0], kv)
        for prefix in (keys.NODE_REPORTS_PREFIX, keys.WORKLOADS_PREFIX, keys.ALIVE_PREFIX)
        for kv in client.range(prefix).kvs
    ]
    if openings.is_in_cluster(document):
        known |= dealt_nodes(client).keys()
    changes = [Change(kv.key, kv.value.decode(errors="replace"), "") for node, kv in reports if node not in known]
    words = superseded(record, found, document)
    if words:
        raise EstateError(words)
    unchanged = Compare(record, "mod", "=", 0 if found is None else found.mod_revision)
    for first in range(0, len(changes) if apply else 0, TXN_OPERATIONS):
        batch = [Delete(change.key) for change in changes[first : first + TXN_OPERATIONS]]
        if not client.txn([*fence, unchanged], batch, []).succeeded:
            raise EstateError(_CHANGED.format(key=record))
    return changes


def dealt_nodes(client: SyncEtcd) -> dict[str, str]:
    """Nodes of a cluster whose control plane is in it, with their addresses in the mesh: those that Kubernetes has."""
    found = {}
    for kv in client.range(keys.ALLOC_NODES_PREFIX).kvs:
        name = keys.parse_alloc_node_key(kv.key)
        try:
            allocation = NodeAllocation.from_json(kv.value)
        except DocumentError:
            continue  # the registrar deals it anew
        if name is not None and allocation.released is None:
            found[name] = allocation.mesh4
    return found


def write_services(
    client: SyncEtcd,
    present: Iterable[Mapping[str, Any]],
    absent: Iterable[str],
    owner: str,
    apply: bool,
    fence: Sequence[Compare] = (),
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
        changes.append(_change(client, key, found, replace(wanted, revision=revision).to_dict(), apply, fence))
    for name in absent:
        key = keys.service_definition_key(*name.split("/", 1))
        found = client.get(key)
        held = _definition(key, found)
        if held is not None and held.owner == owner:
            changes.append(_change(client, key, found, None, apply, fence))
    return changes


def confirm(client: SyncEtcd, fence: Sequence[Compare] = ()) -> None:
    """Put the roster again as it is: what is in this etcd now is what the inventory wants.

    A registrar whose etcd lost history believes its lists again after this (docs/architecture.md, "etcd").
    `EstateError` when somebody else writes it meanwhile.
    """
    found = client.get(keys.ROSTER)
    if found is not None:
        unchanged = Compare(keys.ROSTER, "mod", "=", found.mod_revision)
        if not client.txn([*fence, unchanged], [Put(keys.ROSTER, found.value.decode())], []).succeeded:
            raise EstateError(_CHANGED.format(key=keys.ROSTER))


def owner_of(client: SyncEtcd, name: str) -> str | None:
    """Who owns the service ``<namespace>/<name>``; None when there is none."""
    key = keys.service_definition_key(*name.split("/", 1))
    held = _definition(key, client.get(key))
    return None if held is None else held.owner


_WHERE = {
    "inventory": "isthmus_estate.services in the inventory",
    "module": "the task with isthmus.mesh.global_service",
}


def _change(
    client: SyncEtcd, key: str, found: KeyValue | None, document: Any, apply: bool, fence: Sequence[Compare]
) -> Change:
    after = "" if document is None else jsontext.dumps(document)
    if apply:
        unchanged = Compare(key, "mod", "=", 0 if found is None else found.mod_revision)
        operation = Delete(key) if document is None else Put(key, after)
        if not client.txn([*fence, unchanged], [operation], []).succeeded:
            raise EstateError(_CHANGED.format(key=key))
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
