# SPDX-License-Identifier: GPL-3.0-or-later
"""Routes by the thousand: rtnetlink spoken directly, many messages a call (rtnetlink(7), netlink(7)).

pyroute2 needs a third of a millisecond a route, which is a minute for the mesh of fifty clusters.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from types import TracebackType

from isthmus_agent.desired.datapath import Address, Network, Route
from isthmus_agent.netlink import messages
from isthmus_agent.netlink.errors import NetworkError
from isthmus_agent.netlink.messages import attribute, attributes

ADD, REPLACE, DELETE = "add", "replace", "del"

_ROUTE = struct.Struct("=BBBBBBBBI")  # family, lengths, tos, table, protocol, scope, type, flags
_U32 = struct.Struct("=I")

_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_FLAGS = {ADD: 0x600, REPLACE: 0x500, DELETE: 0}  # NLM_F_CREATE with NLM_F_EXCL or NLM_F_REPLACE
_DST, _OIF, _GATEWAY, _PRIORITY, _PREFSRC, _METRICS, _TABLE = 1, 4, 5, 6, 7, 8, 15
_DEFAULT_PRIORITY6 = 1024  # of IPv6, where 0 means this
_MTU = 2
_UNICAST, _UNREACHABLE, _THROW = 1, 7, 9
_SCOPE_LINK = 253
_ONLINK = 4  # RTNH_F_ONLINK: the gateway is asked for on the device, whatever other routes say

_SOL_NETLINK, _CAP_ACK, _GET_STRICT_CHK = 270, 10, 12
_SO_RCVBUFFORCE = 33
_BATCH = 128  # messages; their answers must fit into the socket's buffer
_BUFFER = 1 << 20
_TIMEOUT = 10.0  # seconds; the kernel answers within the call
_DUMPS = 5


@dataclass(frozen=True, slots=True)
class Way:
    """Where a route leads: the index of a device (0: none), and over whom on its link (None: nobody in between)."""

    oif: int = 0
    gateway: Address | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A route as it is in the kernel. `route` does not say towards whom it leads: `way` does."""

    route: Route
    way: Way = Way()


class RouteSocket:
    """A netlink socket of the calling thread's namespace. OSError when the kernel does not answer."""

    def __init__(self, protocol: int, step: Callable[[], None] = lambda: None) -> None:
        """`protocol` of all routes; `step` is called after every batch."""
        self._protocol = protocol
        self._step = step
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(_TIMEOUT)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)  # the kernel filters by protocol
        self._socket.bind((0, 0))

    def __enter__(self) -> RouteSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._socket.close()

    def dump(self) -> list[Found]:
        """Routes of the protocol in any table, of both families."""
        return [*self._dump(socket.AF_INET), *self._dump(socket.AF_INET6)]

    def _dump(self, family: int) -> list[Found]:
        for _ in range(_DUMPS):
            self._sequence += 1
            body = _ROUTE.pack(family, 0, 0, 0, 0, self._protocol, 0, 0, 0)
            self._socket.send(messages.message(_GETROUTE, messages.REQUEST | messages.DUMP, self._sequence, body))
            found: list[Found] = []
            whole = True
            for kind, flags, _, payload in self._answers():
                whole = whole and not flags & messages.DUMP_INTERRUPTED
                if kind == messages.DONE:
                    break
                if kind == messages.ERROR:
                    raise NetworkError(f"cannot read the routes: {os.strerror(messages.error_number(payload))}")
                if kind == _NEWROUTE and (route := self._parse(payload)) is not None:
                    found.append(route)
            if whole:
                break
        return found

    def ways(self, targets: Sequence[Address]) -> dict[Address, Way | int]:
        """How the host's own packets go to each of these IPv4 addresses; an errno where they do not. One that is on a
        link of this host is its own gateway."""
        found: dict[Address, Way | int] = {}
        for start in range(0, len(targets), _BATCH):
            batch = targets[start : start + _BATCH]
            first = self._sequence + 1
            parts = []
            for target in batch:
                self._sequence += 1
                body = _ROUTE.pack(socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, 0) + attribute(_DST, target.packed)
                parts.append(messages.message(_GETROUTE, messages.REQUEST, self._sequence, body))
            self._socket.send(b"".join(parts))
            answered = 0
            for kind, _, sequence, payload in self._answers():
                if not first <= sequence < first + len(batch):
                    continue
                target = batch[sequence - first]
                if kind == messages.ERROR:
                    found[target] = messages.error_number(payload)
                elif kind == _NEWROUTE:
                    found[target] = _way_of(payload, target)
                answered += 1
                if answered == len(batch):
                    break
            self._step()
        return found

    def change(self, changes: Sequence[tuple[str, Found]]) -> list[int]:
        """Makes each (action, route with its way); answers an errno each, 0 when it was done."""
        results: list[int] = []
        for start in range(0, len(changes), _BATCH):
            batch = changes[start : start + _BATCH]
            first = self._sequence + 1
            parts = []
            for action, found in batch:
                self._sequence += 1
                kind = _DELROUTE if action == DELETE else _NEWROUTE
                flags = messages.REQUEST | messages.ACK | _FLAGS[action]
                parts.append(messages.message(kind, flags, self._sequence, self._body(found.route, found.way)))
            self._socket.send(b"".join(parts))
            answers: dict[int, int] = {}
            for kind, _, sequence, payload in self._answers():
                if kind == messages.ERROR and sequence >= first:
                    answers[sequence] = messages.error_number(payload)
                if len(answers) == len(batch):
                    break
            results += [answers[first + number] for number in range(len(batch))]
            self._step()
        return results

    def _answers(self) -> Iterator[tuple[int, int, int, bytes]]:
        """(type, flags, sequence, payload) of what comes, without end."""
        while True:
            data = self._socket.recv(_BUFFER)
            self._step()
            yield from messages.split(data)

    def _body(self, route: Route, way: Way) -> bytes:
        prefix = route.prefix
        family = socket.AF_INET if prefix.version == 4 else socket.AF_INET6
        kind, scope, flags = _UNICAST, _SCOPE_LINK, 0
        if not route.has_device:
            kind, scope = _UNREACHABLE if route.unreachable else _THROW, 0
        elif way.gateway is not None:
            scope, flags = 0, _ONLINK
        table = route.table if route.table < 256 else 0
        parts = [
            _ROUTE.pack(family, prefix.prefixlen, 0, 0, table, self._protocol, scope, kind, flags),
            attribute(_DST, prefix.network_address.packed),
            attribute(_TABLE, _U32.pack(route.table)),
        ]
        if route.metric:
            parts.append(attribute(_PRIORITY, _U32.pack(route.metric)))
        if route.has_device:
            parts.append(attribute(_OIF, _U32.pack(way.oif)))
            if way.gateway is not None:
                parts.append(attribute(_GATEWAY, way.gateway.packed))
            if route.source is not None:
                parts.append(attribute(_PREFSRC, route.source.packed))
            if route.mtu:
                parts.append(attribute(_METRICS, attribute(_MTU, _U32.pack(route.mtu))))
        return b"".join(parts)

    def _parse(self, payload: bytes) -> Found | None:
        family, length, _, _, table, protocol, _, kind, _ = _ROUTE.unpack_from(payload)
        if protocol != self._protocol:
            return None
        found = dict(attributes(payload, _ROUTE.size))
        source, metrics = found.get(_PREFSRC), found.get(_METRICS)
        mtu = dict(attributes(metrics)).get(_MTU) if metrics is not None else None
        metric = _U32.unpack(found[_PRIORITY])[0] if _PRIORITY in found else 0
        if family == socket.AF_INET6 and metric == _DEFAULT_PRIORITY6:
            metric = 0
        route = Route(
            prefix=_network(family, found.get(_DST), length),
            source=_address(source) if source is not None else None,
            mtu=_U32.unpack(mtu)[0] if mtu is not None else 0,
            table=_U32.unpack(found[_TABLE])[0] if _TABLE in found else table,
            unreachable=kind == _UNREACHABLE,
            throw=kind == _THROW,
            metric=metric,
        )
        return Found(route, _way(found) if route.has_device else Way())


def _way(found: dict[int, bytes]) -> Way:
    oif, gateway = found.get(_OIF), found.get(_GATEWAY)
    return Way(0 if oif is None else _U32.unpack(oif)[0], _address(gateway) if gateway is not None else None)


def _way_of(payload: bytes, target: Address) -> Way | int:
    """The answer to a look-up."""
    kind = _ROUTE.unpack_from(payload)[7]
    if kind != _UNICAST:  # such as local, or a route of ours that says that there is none
        return errno.ENETUNREACH
    way = _way(dict(attributes(payload, _ROUTE.size)))
    return Way(way.oif, way.gateway or target)


def _address(packed: bytes) -> Address:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _network(family: int, packed: bytes | None, length: int) -> Network:
    if family == socket.AF_INET:
        return IPv4Network((packed or bytes(4), length))
    return IPv6Network((packed or bytes(16), length))


def explain(number: int, action: str, protocol: int) -> str:
    """An errno of `change` in words."""
    text = os.strerror(number)
    if action == ADD and number == errno.EEXIST:
        return (
            f"{text}: a route that is not ours (another protocol than {protocol}) has this prefix already. "
            "Next: find its owner (ip route show) and have it leave the mesh's ranges alone"
        )
    return text
