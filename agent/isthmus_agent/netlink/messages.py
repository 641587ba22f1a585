# SPDX-License-Identifier: GPL-3.0-or-later
"""Netlink on the wire: messages and their attributes, for what is spoken without pyroute2 (netlink(7),
uapi/linux/netlink.h)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

REQUEST, ACK, DUMP, CREATE = 0x1, 0x4, 0x300, 0x400
DUMP_INTERRUPTED = 0x10
ERROR, DONE = 2, 3
NESTED = 0x8000

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")
_TYPE_MASK = 0x3FFF


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, payload) of the messages that came together."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size:
            return
        yield kind, flags, sequence, data[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def error_number(payload: bytes) -> int:
    """The errno in an ERROR message; 0 when it is an acknowledgement."""
    return -int(_ERRNO.unpack_from(payload)[0])


def attribute(kind: int, value: bytes) -> bytes:
    packed = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
    rest = -len(packed) % 4
    return packed + bytes(rest) if rest else packed


def attributes(data: bytes, position: int = 0) -> Iterator[tuple[int, bytes]]:
    """(type, value) of those from `position` on."""
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[position + _ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3
