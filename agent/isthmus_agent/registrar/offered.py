# SPDX-License-Identifier: GPL-3.0-or-later
"""Which services peers offer, and which of them the estate declares nowhere. Pure.

A service of another cluster's Kubernetes that is annotated global needs no line in the inventory: machines here can use
it once it has an address of this cluster. What the inventory does declare is left to it, which says where it is to be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from isthmus_mesh import jsontext, keys
from isthmus_mesh.schema import LABEL
from isthmus_mesh.wire import ClusterService, WireError

from isthmus_agent.kvstore import KeyValue

from .publish import PeerServices

_PREFIX = "cilium/cache/services/"


class Mirrored(Protocol):
    """What is read of a `Mirror`."""

    wanted: dict[str, str]
    services_changes: int
    services_known: bool


class Offered:
    """Remembers what it found of each value, so that a change costs what changed."""

    def __init__(self) -> None:
        self._seen: tuple[object, ...] = ()
        self._found = PeerServices(complete=False)
        self._names: dict[str, tuple[str, str | None]] = {}  # by cache key: the value, and the service that it offers
        self._roster: bytes | None = None
        self._declared: frozenset[str] = frozenset()

    def services(self, mirrors: Iterable[Mirrored], peers: int, roster: KeyValue | None) -> PeerServices:
        """What is offered now; the same object when nothing changed. `peers`: how many there are."""
        running = list(mirrors)
        value = None if roster is None else roster.value
        seen = (peers, value, *((one, one.services_changes, one.services_known) for one in running))
        if seen != self._seen:
            self._seen = seen
            if value != self._roster:
                self._roster, self._declared = value, _declared(value)
            complete = len(running) == peers and all(one.services_known for one in running)
            self._found = PeerServices(self._offers(running) - self._declared, complete)
        return self._found

    def _offers(self, running: list[Mirrored]) -> frozenset[str]:
        before, self._names = self._names, {}
        for mirror in running:
            for key, text in mirror.wanted.items():
                if not key.startswith(_PREFIX):
                    continue
                known = before.get(key)
                self._names[key] = known if known is not None and known[0] is text else (text, _offer(key, text))
        return frozenset(name for _, name in self._names.values() if name is not None)


class Remote:
    """What peers offer, by service, as it is mirrored."""

    def __init__(self) -> None:
        self._seen: tuple[object, ...] = ()
        self._found: dict[tuple[str, str], Mapping[str, str]] = {}

    def services(self, mirrors: Mapping[str, Mirrored]) -> Mapping[tuple[str, str], Mapping[str, str]]:
        """Service -> peer -> value; the same object when nothing changed. `mirrors` by peer."""
        seen = tuple((peer, one, one.services_changes) for peer, one in mirrors.items())
        if seen == self._seen:
            return self._found
        found: dict[tuple[str, str], dict[str, str]] = {}
        for peer, mirror in sorted(mirrors.items()):
            for key, text in mirror.wanted.items():
                named = keys.parse_service_key(key) if key.startswith(_PREFIX) else None
                if named is not None:
                    found.setdefault(named[1:], {})[peer] = text
        # Equal values stay the same objects, so that who compares them later has it cheap.
        before = self._found
        self._found = {key: before[key] if before.get(key) == value else value for key, value in found.items()}
        self._seen = seen
        return self._found


def _offer(key: str, text: str) -> str | None:
    """The service ("<ns>/<name>") that a mirrored value offers to everybody, by an address and ports."""
    named = keys.parse_service_key(key)
    if named is None or not all(_is_label(part) for part in named[1:]):
        return None  # it becomes part of a DNS name
    try:
        service = ClusterService.from_json(text)
    except WireError:
        return None
    return "/".join(named[1:]) if service.shared and any(service.frontends.values()) else None


def _is_label(text: str) -> bool:
    return len(text) <= LABEL.longest and re.fullmatch(LABEL.pattern, text) is not None


def _declared(roster: bytes | None) -> frozenset[str]:
    try:
        document = jsontext.loads(roster or b"{}", ValueError)
        services: Mapping[str, Mapping[str, object]] = document.get("services", {})
        return frozenset(name for name, entry in services.items() if entry.get("state") != "absent")
    except (ValueError, AttributeError):
        return frozenset()
