# SPDX-License-Identifier: GPL-3.0-or-later
"""Ending sockets whose peer is gone: NETLINK_SOCK_DIAG, SOCK_DESTROY (what `ss -K` does).

Wire format: uapi/linux/inet_diag.h and sock_diag.h. The application sees ECONNABORTED. The kernel answers for one
network namespace at a time, so those of pods are entered one after the other, each by a thread that ends with it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from isthmus_agent.desired.datapath import Address
from isthmus_agent.netlink import messages, namespaces
from isthmus_agent.netlink.errors import NetworkError

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_SOCK_DESTROY = 21
_BUFFER = 1 << 18

_REQUEST = struct.Struct("=BBBxI48s")  # inet_diag_req_v2, the socket id as bytes
_MESSAGE = struct.Struct("=BBBB48s20s")  # inet_diag_msg
_SOCKET_ID = struct.Struct("=2s2s16s16sIQ")  # inet_diag_sockid; the cookie is two u32, low first
_HOST_CONDITION = struct.Struct("=BBxxi")  # inet_diag_hostcond, then the address
_OPERATION = struct.Struct("=BBH")  # inet_diag_bc_op

_REQ_BYTECODE = 1
_BC_DESTINATION = 8

# Every state with a peer; not TIME_WAIT, LISTEN, CLOSE (UDP: unconnected) and half-open requests.
_STATES = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11))

# From here on one dump of everything is cheaper than one per destination.
_MANY = 16

Destination = tuple[Address, int, int]  # address, port, protocol (6 or 17)


@dataclass(frozen=True, slots=True)
class _Socket:
    family: int
    protocol: int
    identifier: bytes  # inet_diag_sockid as the kernel gave it
    cookie: int
    destination: Destination


def destroy_sockets(destinations: Collection[Destination], cookies: Collection[int]) -> set[int]:
    """Ends those sockets of this network namespace that have one of `cookies` and are connected to one of
    `destinations`. Answers their cookies.

    IPv4 destinations match AF_INET6 sockets with a v4-mapped peer too. NetworkError if the kernel cannot
    end sockets (CONFIG_INET_DIAG_DESTROY)."""
    wanted, keep = set(destinations), frozenset(cookies)
    if not wanted or not keep:
        return set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.bind((0, 0))
        return {each.cookie for each in _matching(netlink, wanted) if each.cookie in keep and _destroy(netlink, each)}


def destroy_pods_sockets(
    destinations: Collection[Destination],
    cookies: Collection[int],
    places: Collection[Path] = namespaces.PLACES,
    step: Callable[[], None] = lambda: None,
) -> set[int]:
    """The same in every network namespace below `places`, until all `cookies` are found; `step` is called after each.

    A namespace that goes meanwhile is passed over. NetworkError when one cannot be entered."""
    left = set(cookies)
    for path in namespaces.paths(places):
        if not left:
            break
        left -= namespaces.inside(path, partial(destroy_sockets, destinations, left)) or set()
        step()
    return set(cookies) - left


def can_destroy() -> bool:
    """Whether this kernel can end sockets: asks for one that cannot exist."""
    probe = _Socket(socket.AF_INET, socket.IPPROTO_TCP, bytes(40) + struct.pack("=Q", 1), 1, (IPv4Address(0), 0, 6))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.bind((0, 0))
        try:
            _destroy(netlink, probe)
        except NetworkError:
            return False
    return True


def _matching(netlink: socket.socket, wanted: set[Destination]) -> list[_Socket]:
    found: list[_Socket] = []
    for protocol in sorted({each[2] for each in wanted}):
        of_protocol = [each for each in wanted if each[2] == protocol]
        filters: list[Destination | None] = [None] if len(of_protocol) > _MANY else list(of_protocol)
        for one in filters:
            families = (
                [socket.AF_INET6] if one is not None and one[0].version == 6 else [socket.AF_INET, socket.AF_INET6]
            )
            for family in families:
                found += [each for each in _dump(netlink, family, protocol, one) if each.destination in wanted]
    return found


def _dump(netlink: socket.socket, family: int, protocol: int, one: Destination | None) -> Iterator[_Socket]:
    body = _REQUEST.pack(family, protocol, 0, _STATES, bytes(48))
    if one is not None:
        address, port, _ = one
        condition = (
            _HOST_CONDITION.pack(
                socket.AF_INET if address.version == 4 else socket.AF_INET6, address.max_prefixlen, port
            )
            + address.packed
        )
        length = _OPERATION.size + len(condition)
        # yes: to the end, which accepts; no: beyond the end, which refuses.
        code = _OPERATION.pack(_BC_DESTINATION, length, length + 4) + condition
        body += messages.attribute(_REQ_BYTECODE, code)
    sequence = _send(netlink, _SOCK_DIAG_BY_FAMILY, messages.REQUEST | messages.DUMP, body)
    found: list[bytes] = []
    done = False
    while not done:
        for kind, _, answered, payload in messages.split(netlink.recv(_BUFFER)):
            if answered != sequence:
                continue
            if kind == messages.DONE:
                done = True
            elif kind == messages.ERROR:
                number = messages.error_number(payload)
                if number == errno.ENOENT:  # no handler: this kernel has no such protocol, so no such socket
                    return
                raise NetworkError(f"cannot list sockets: {os.strerror(number)}; is the inet_diag module there?")
            else:
                found.append(payload)
    for payload in found:
        found_family, _, _, _, identifier, _ = _MESSAGE.unpack_from(payload)
        _, port, _, packed, _, cookie = _SOCKET_ID.unpack(identifier)
        yield _Socket(
            found_family,
            protocol,
            identifier,
            cookie,
            (_peer(found_family, packed), int.from_bytes(port, "big"), protocol),
        )


def _peer(family: int, packed: bytes) -> Address:
    if family == socket.AF_INET:
        return IPv4Address(packed[:4])
    address = IPv6Address(packed)
    return address.ipv4_mapped or address


def _destroy(netlink: socket.socket, each: _Socket) -> bool:
    """False if the socket is gone already."""
    body = _REQUEST.pack(each.family, each.protocol, 0, _STATES, each.identifier)
    sequence = _send(netlink, _SOCK_DESTROY, messages.REQUEST | messages.ACK, body)
    while True:
        for kind, _, answered, payload in messages.split(netlink.recv(_BUFFER)):
            if answered != sequence or kind != messages.ERROR:
                continue
            number = messages.error_number(payload)
            if number == 0:
                return True
            if number in (errno.ENOENT, errno.ESTALE):
                return False
            if number == errno.EOPNOTSUPP:
                raise NetworkError("this kernel cannot end sockets: it is built without CONFIG_INET_DIAG_DESTROY")
            raise NetworkError(f"cannot end the socket to {each.destination[0]}: {os.strerror(number)}")


def _send(netlink: socket.socket, kind: int, flags: int, body: bytes) -> int:
    sequence = int.from_bytes(os.urandom(3), "big") + 1
    netlink.send(messages.message(kind, flags, sequence, body))
    return sequence
