# SPDX-License-Identifier: BSD-2-Clause
"""Answers on the mesh's ports of a host where nothing listens yet, so that other hosts can prove that they reach them.

Run as a program of its own, with a JSON document as its only argument: `host`, a name; `seconds`, after which it ends;
`tcp` and `udp`, lists of ports. Standard library only and without a module of ours: its text is all that is needed.

TCP: who connects is told `GREETING` and the host's name. UDP: a datagram that begins with `MARK` comes back with the
host's name behind it, from the port that it was sent to. Datagrams are read from a raw socket, which sees what the
host's firewall has let in whoever has the port: also where the kernel's VXLAN device, WireGuard or strongSwan, which do
not answer such a one, have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import socket
import struct
import sys
import time

# For a VXLAN device: without the flag of a valid network identifier (RFC 7348), so that it drops the datagram. Of
# WireGuard's messages none has type 0. Of IKE's none has an initiator's SPI of 0 (RFC 7296, section 3.1), which on port
# 4500 comes after four bytes of 0 (RFC 3948).
MARK = b"\0\0\0\0\0\0\0\0\0\0\0\0isthmus-preflight "
GREETING = b"isthmus-preflight "

UNIT = "isthmus-preflight.service"
"""The transient unit that it runs as."""

_UDP_HEADER = 8
_IP_PKTINFO = 8
_SO_ATTACH_FILTER = 26


def main(argument: str) -> None:
    """Listen, say so to systemd, and answer until the time is over."""
    wanted = json.loads(argument)
    deadline = time.monotonic() + wanted["seconds"]
    name = wanted["host"].encode()
    with contextlib.ExitStack() as stack:
        servers = []
        for port in wanted["tcp"]:
            server = stack.enter_context(socket.create_server(("", port), backlog=128))
            server.setblocking(False)
            servers.append(server)
        raw = None
        if wanted["udp"]:
            raw = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP))
            raw.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            _only(raw, wanted["udp"])
            raw.setblocking(False)
            # So that the kernel does not say that nobody is there; when somebody has the port it does not either.
            for port in wanted["udp"]:
                holder = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                with contextlib.suppress(OSError):
                    holder.bind(("", port))
        _ready()
        while time.monotonic() < deadline:
            found, _w, _x = select.select([*servers, *([raw] if raw else [])], [], [], 1)
            for one in found:
                with contextlib.suppress(OSError):
                    if one is raw:
                        _answer(raw, wanted["udp"], name)
                    else:
                        with one.accept()[0] as connection:
                            connection.send(GREETING + name + b"\n")


def _only(raw: socket.socket, ports: list[int]) -> None:
    """The kernel keeps every other datagram of the host to itself: struct sock_fprog of linux/filter.h."""
    code = [(0xB1, 0, 0, 0), (0x48, 0, 0, 2)]
    code += [(0x15, len(ports) - number, 0, port) for number, port in enumerate(ports)]
    code += [(0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(code), ctypes.addressof(program)))


def _answer(raw: socket.socket, ports: list[int], name: bytes) -> None:
    packet, ancillary, _flags, sender = raw.recvmsg(65535, 256)
    start = (packet[0] & 15) * 4
    source, target = struct.unpack_from(">HH", packet, start)
    body = packet[start + _UDP_HEADER :]
    if target not in ports or not body.startswith(MARK):
        return
    body += b" " + name
    # From the address that was dialled; a UDP checksum of 0 is none (RFC 768).
    answer = struct.pack(">HHHH", target, source, _UDP_HEADER + len(body), 0) + body
    here = next(data for level, kind, data in ancillary if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO))
    info = struct.pack("=i4s4s", 0, here[4:8], bytes(4))
    raw.sendmsg([answer], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, (sender[0], 0))


def _ready() -> None:
    """sd_notify(3), when systemd wants to know."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(b"READY=1")


if __name__ == "__main__":
    main(sys.argv[1])
