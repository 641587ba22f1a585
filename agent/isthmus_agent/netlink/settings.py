# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of one device's IPv4, over netlink: the sysctls are read-only for the agent's unit (linux/if_link.h,
linux/ip.h)."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from pathlib import Path

from isthmus_agent.netlink import messages
from isthmus_agent.netlink.errors import NetworkError
from isthmus_agent.netlink.messages import attribute

FORWARDING, RP_FILTER, SRC_VALID_MARK = 1, 8, 24  # IPV4_DEVCONF_...
LOOSE = 2
"""Of RP_FILTER: a source is let in when any route leads back to it. The kernel takes the greater of this and of what
holds for all devices."""

_NAMES = {FORWARDING: "forwarding", RP_FILTER: "rp_filter", SRC_VALID_MARK: "src_valid_mark"}
_SETLINK = 19
_AF_SPEC, _INET_CONF = 26, 1


def is_strict(index: int) -> bool:
    """Whether the kernel lets in by this device only what it would answer by it (rp_filter)."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for name in ("all", socket.if_indextoname(index)):
            found.append(int(Path("/proc/sys/net/ipv4/conf", name, _NAMES[RP_FILTER]).read_text(encoding="ascii")))
    return max(found, default=0) == 1


def set_ipv4(index: int, setting: int, value: int = 1) -> None:
    """NetworkError when the kernel refuses. Nothing is done when it is so already: the kernel tells everybody of a
    device whose settings were written, and who listens would write them again."""
    with contextlib.suppress(OSError):
        place = Path("/proc/sys/net/ipv4/conf", socket.if_indextoname(index), _NAMES[setting])
        if place.read_text(encoding="ascii").strip() == str(value):
            return
    spec = attribute(setting, struct.pack("=I", value))
    for kind in (_INET_CONF, socket.AF_INET, _AF_SPEC):
        spec = attribute(kind | messages.NESTED, spec)
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, 0, 0) + spec
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.send(messages.message(_SETLINK, messages.REQUEST | messages.ACK, 1, body))
        kind, _, _, payload = next(messages.split(netlink.recv(4096)))
    number = messages.error_number(payload) if kind == messages.ERROR else 0
    if number:
        words = errno.errorcode.get(number, number)
        raise NetworkError(f"cannot set {_NAMES[setting]} of interface {index}: {words}")
