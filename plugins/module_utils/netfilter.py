# SPDX-License-Identifier: BSD-2-Clause
"""Tables of nf_tables by netlink(7) (uapi/linux/netfilter/nf_tables.h), as a host need not have the program nft."""

from __future__ import annotations

import os
import socket
import struct

_NETLINK_NETFILTER = 12
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_SUBSYSTEM = 10  # nf_tables'
_BATCH_BEGIN, _BATCH_END = 16, 17
_GETTABLE, _DELTABLE = _SUBSYSTEM << 8 | 1, _SUBSYSTEM << 8 | 2
_REQUEST, _ACK = 0x1, 0x4
_ERROR = 2
_IPV4 = 2
_TABLE_NAME = 1
_BUFFER = 1 << 16  # bytes
_TIMEOUT = 10.0  # seconds; the kernel answers within the call


def has_table(name):
    """Whether there is a table `ip <name>`; a kernel without nf_tables has none."""
    try:
        return _ask([_message(_GETTABLE, 1, _IPV4, 0, _table(name))], 1) == 0
    except OSError:
        return False


def delete_table(name):
    """Removes the table `ip <name>` with all in it. OSError: the kernel refused it, or it is not there."""
    number = _ask(
        [
            _message(_BATCH_BEGIN, 1, 0, _SUBSYSTEM),
            _message(_DELTABLE, 2, _IPV4, 0, _table(name)),
            _message(_BATCH_END, 3, 0, _SUBSYSTEM),
        ],
        2,
    )
    if number:
        raise OSError(number, os.strerror(number), name)


def _table(name):
    value = name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(value), _TABLE_NAME) + value
    return attribute + bytes(-len(attribute) % 4)


def _message(kind, sequence, family, resource, attributes=b""):
    # Begin and end of a transaction have no answer of their own.
    flags = _REQUEST | (_ACK if attributes and kind != _GETTABLE else 0)
    body = struct.pack(">BBH", family, 0, resource) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def _ask(messages, number):
    """The errno that the kernel answers to the message with the number; 0 when that is what was asked for."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    try:
        sock.settimeout(_TIMEOUT)
        sock.bind((0, 0))
        sock.send(b"".join(messages))
        while True:
            data = sock.recv(_BUFFER)
            position = 0
            while position + _HEADER.size <= len(data):
                length, kind, _flags, sequence, _port = _HEADER.unpack_from(data, position)
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", data, position + _HEADER.size)[0]
                    if code or sequence == number:
                        return code
                elif sequence == number:
                    return 0
                position += (length + 3) & ~3
    finally:
        sock.close()
