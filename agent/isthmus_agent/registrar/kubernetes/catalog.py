# SPDX-License-Identifier: GPL-3.0-or-later
"""A cluster's Kubernetes objects as the mesh sees them, with the indexes that make one object's change cheap.

Pure: the watches put objects in, the publisher asks what is where. What changed is collected by address and by
service, so that the change of one pod leads to one key and not to ten thousand.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from isthmus_mesh import ownership
from isthmus_mesh.identity import DEFAULT_FILTER, LabelFilter, pod_labels
from isthmus_mesh.wire import L4Addr, labels_to_string

from .objects import (
    KINDS,
    NAMESPACES,
    NODES,
    PODS,
    SERVICES,
    SLICES,
    Facts,
    NamespaceFacts,
    NodeFacts,
    ObjectError,
    ObjectKey,
    PodFacts,
    ServiceFacts,
    SliceFacts,
    Written,
    facts,
    key_of,
    written,
)


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed since the last `take`: addresses, services, or (`all`) what many of them hang on."""

    addresses: frozenset[str] = frozenset()
    services: frozenset[ObjectKey] = frozenset()
    all: bool = False

    def __bool__(self) -> bool:
        return self.all or bool(self.addresses) or bool(self.services)

    def __or__(self, other: Changes) -> Changes:
        return Changes(self.addresses | other.addresses, self.services | other.services, self.all or other.all)


@dataclass(slots=True)
class Rendered:
    """A value made of a pod, with what else it was made of."""

    pod: PodFacts
    number: int
    host_ip: str
    key_index: int
    text: str


@dataclass
class Catalog:
    """Everything that is known of the estate's cluster `cluster`. `listed`: the kinds that were read in full once.

    `problems`: objects that are not what the API promises, by kind and key; what was known of one before stands.
    `rendered`: the publisher's values by address, so that it makes each only once.
    """

    cluster: str
    estate: str = ""
    label_filter: LabelFilter = DEFAULT_FILTER
    listed: set[str] = field(default_factory=set)
    problems: dict[tuple[str, ObjectKey], str] = field(default_factory=dict)
    rendered: dict[str, Rendered] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._objects: dict[str, dict[ObjectKey, Facts]] = {kind: {} for kind in KINDS}
        self._by_address: dict[str, set[ObjectKey]] = {}
        self._by_namespace: dict[str, set[ObjectKey]] = {}
        self._slices: dict[ObjectKey, set[ObjectKey]] = {}  # of a service
        self._own = ownership.labels(self.estate, self.cluster)
        self._written: dict[str, dict[ObjectKey, Written]] = {SERVICES: {}, SLICES: {}}
        self._names: set[ObjectKey] = set()  # of all services
        self._labels: dict[ObjectKey, str] = {}
        self._addresses: set[str] = set()
        self._services: set[ObjectKey] = set()
        self._all = False
        self._touched = False  # something that decides what is to be written changed

    # --- in

    def put(self, kind: str, value: Any) -> ObjectKey | None:
        """Take an object as it is now; its key, None when it has none."""
        try:
            key = key_of(value)
        except ObjectError as error:
            self.problems[kind, ("", "")] = str(error)
            return None
        try:
            found = facts(kind, value)
            ours = written(kind, value, self._own) if kind in self._written else None
        except ObjectError as error:
            self.problems[kind, key] = str(error)
            return key
        self.problems.pop((kind, key), None)
        self._set(kind, key, found)
        self._set_written(kind, key, ours)
        if kind == SERVICES and key not in self._names:
            self._names.add(key)
            self._touched = True
        return key

    def remove(self, kind: str, key: ObjectKey) -> None:
        """Forget an object that was deleted."""
        self.problems.pop((kind, key), None)
        self._forget(kind, key)

    def retain(self, kind: str, listed: Iterable[ObjectKey]) -> None:
        """Forget every object of `kind` that a complete list, which has been put, does not have."""
        there = set(listed)
        known = {*self._objects[kind], *self._written.get(kind, ()), *(self._names if kind == SERVICES else ())}
        for key in known - there:
            self._forget(kind, key)
        for where in [where for where in self.problems if where[0] == kind and where[1] not in there]:
            del self.problems[where]
        if kind not in self.listed:
            self.listed.add(kind)
            self._all = True

    def _forget(self, kind: str, key: ObjectKey) -> None:
        self._set(kind, key, None)
        self._set_written(kind, key, None)
        if kind == SERVICES and key in self._names:
            self._names.remove(key)
            self._touched = True

    def _set_written(self, kind: str, key: ObjectKey, after: Written | None) -> None:
        objects = self._written.get(kind, {})
        if objects.get(key) != after:
            self._touched = True
            if after is None:
                del objects[key]
            else:
                objects[key] = after

    def _set(self, kind: str, key: ObjectKey, after: Facts | None) -> None:
        objects = self._objects[kind]
        before = objects.get(key)
        if before == after:
            return
        if after is None:
            del objects[key]
        else:
            objects[key] = after
        if kind in (NAMESPACES, SERVICES):
            self._touched = True
        if kind == PODS:
            self._pod_changed(key, cast("PodFacts | None", before), cast("PodFacts | None", after))
        elif kind == NAMESPACES:
            for pod in self._by_namespace.get(key[1], ()):
                self._labels.pop(pod, None)
                self._addresses.update(cast("PodFacts", self._objects[PODS][pod]).addresses)
        elif kind == SERVICES:
            self._services.add(key)
        elif kind == SLICES:
            self._slice_changed(key, cast("SliceFacts | None", before), cast("SliceFacts | None", after))
        else:
            self._all = True

    def _pod_changed(self, key: ObjectKey, before: PodFacts | None, after: PodFacts | None) -> None:
        self._labels.pop(key, None)
        if before is not None:
            for address in before.addresses:
                _discard(self._by_address, address, key)
            self._addresses.update(before.addresses)
        if after is None:
            _discard(self._by_namespace, key[0], key)
            return
        self._by_namespace.setdefault(key[0], set()).add(key)
        for address in after.addresses:
            self._by_address.setdefault(address, set()).add(key)
        self._addresses.update(after.addresses)

    def _slice_changed(self, key: ObjectKey, before: SliceFacts | None, after: SliceFacts | None) -> None:
        for part in (before, after):
            if part is None:
                continue
            service = (key[0], part.service)
            if part is after:
                self._slices.setdefault(service, set()).add(key)
            elif after is None or after.service != part.service:
                _discard(self._slices, service, key)
            if service in self._objects[SERVICES]:
                self._services.add(service)

    # --- out

    @property
    def synced(self) -> bool:
        """Whether every kind was read in full: only then does what is not here not exist."""
        return len(self.listed) == len(KINDS)

    def take(self) -> Changes:
        """What changed since the last call."""
        taken = Changes(frozenset(self._addresses), frozenset(self._services), self._all)
        self._addresses.clear()
        self._services.clear()
        self._all = self._touched = False
        return taken

    def waiting(self) -> bool:
        """Whether there is something new since the last `take`, also if only for who writes."""
        return self._all or self._touched or bool(self._addresses) or bool(self._services)

    def counts(self) -> dict[str, int]:
        """Objects that the mesh has to do with, by kind."""
        return {kind: len(self._objects[kind]) for kind in KINDS}

    def node(self, name: str) -> NodeFacts | None:
        return cast("NodeFacts | None", self._objects[NODES].get(("", name)))

    def nodes(self) -> Mapping[str, NodeFacts]:
        return {key[1]: cast("NodeFacts", found) for key, found in self._objects[NODES].items()}

    def addresses(self) -> Iterable[str]:
        """Every address that a pod has."""
        return self._by_address.keys()

    def pod(self, address: str) -> tuple[ObjectKey, PodFacts] | None:
        """Who has `address`. Of two (one has ended and its end was not reported yet) the one that stays, then the
        newer one."""
        pods = cast("dict[ObjectKey, PodFacts]", self._objects[PODS])
        found = [(key, pods[key]) for key in self._by_address.get(address, ())]
        return max(found, key=lambda one: (not one[1].leaving, one[1].created, one[0]), default=None)

    def labels(self, key: ObjectKey) -> str:
        """The labels that make the identity of a pod, as an identity's value. WireError when they cannot be one."""
        found = self._labels.get(key)
        if found is None:
            pod = cast("PodFacts", self._objects[PODS][key])
            namespace = cast("NamespaceFacts | None", self._objects[NAMESPACES].get(("", key[0])))
            of_namespace = {} if namespace is None else namespace.labels
            labels = pod_labels(pod.labels, key[0], of_namespace, pod.service_account, self.cluster, self.label_filter)
            # Ten thousand pods of one Deployment share one text.
            found = self._labels[key] = sys.intern(labels_to_string(labels))
        return found

    def is_translated(self, key: ObjectKey) -> bool:
        """Whether service addresses are turned into backends' where a pod dials them."""
        pod = cast("PodFacts", self._objects[PODS][key])
        namespace = cast("NamespaceFacts | None", self._objects[NAMESPACES].get(("", key[0])))
        if pod.translated is not None:
            return pod.translated
        return namespace is None or namespace.translated

    def services(self) -> Mapping[ObjectKey, ServiceFacts]:
        """The global services."""
        return cast("Mapping[ObjectKey, ServiceFacts]", self._objects[SERVICES])

    def written(self, kind: str) -> Mapping[ObjectKey, Written]:
        """The Services or EndpointSlices that are ours."""
        return self._written[kind]

    def has_namespace(self, name: str) -> bool:
        return ("", name) in self._objects[NAMESPACES]

    def has_service(self, service: ObjectKey) -> bool:
        """Whether there is a Service of that name, of whatever kind and whosever."""
        return service in self._names

    def backends(self, service: ObjectKey) -> tuple[dict[str, tuple[str, dict[str, L4Addr]]], dict[str, str]]:
        """Address -> (its node, or nothing; ports), and address -> host name, of the endpoints that should get flows.

        Those that are ready; while there is none, those that still serve although they are on their way out, as
        kube-proxy and Cilium do for what is their own.
        """
        parts = [cast("SliceFacts", self._objects[SLICES][key]) for key in sorted(self._slices.get(service, ()))]
        everyone = [(part, endpoint) for part in parts for endpoint in part.endpoints]
        found: dict[str, tuple[str, dict[str, L4Addr]]] = {}
        names: dict[str, str] = {}
        for part, endpoint in [one for one in everyone if one[1].ready] or everyone:
            for address in endpoint.addresses:
                found.setdefault(address, (endpoint.node, {}))[1].update(part.ports)
                if endpoint.hostname:
                    names[address] = endpoint.hostname
        return found, names

    def told(self) -> list[tuple[str, str]]:
        """Objects that cannot be used as they are, with the reason; one line a kind and reason."""
        found = Counter((kind, reason) for (kind, _), reason in self.problems.items())
        first = {(kind, reason): key for (kind, key), reason in sorted(self.problems.items(), reverse=True)}
        lines = []
        for (kind, reason), number in sorted(found.items()):
            name = "/".join(filter(None, first[kind, reason])) or "(without a name)"
            lines.append((f"kubernetes {kind} {name}", reason + (f"; {number - 1} more" if number > 1 else "")))
        return lines


def _discard(index: dict[Any, set[ObjectKey]], key: Any, member: ObjectKey) -> None:
    members = index.get(key)
    if members is not None:
        members.discard(member)
        if not members:
            del index[key]
