# SPDX-License-Identifier: BSD-2-Clause
"""Who holds a port of this host, read from /proc."""

from __future__ import annotations

import ipaddress
import os
import struct
from dataclasses import dataclass

_LISTEN, _UNCONNECTED = "0A", "07"


@dataclass(frozen=True)
class Socket:
    """A bound socket that receives: `address` as text, `inode` 0 for one of the kernel's own."""

    protocol: str
    address: str
    port: int
    inode: int


def _address(text: str) -> str:
    # /proc prints the address as 32-bit words in host order.
    words = [struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    # An IPv6 socket on ::ffff:a.b.c.d holds the port of a.b.c.d.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def bound(protocol: str, port: int) -> list[Socket]:
    """Sockets of `protocol` (`tcp` or `udp`, both families) that listen on `port`."""
    state = _LISTEN if protocol == "tcp" else _UNCONNECTED
    found = []
    for suffix in ("", "6"):
        try:
            with open(f"/proc/net/{protocol}{suffix}", encoding="ascii") as file:
                lines = file.readlines()[1:]
        except FileNotFoundError:  # no IPv6
            continue
        for line in lines:
            fields = line.split()
            address, number = fields[1].rsplit(":", 1)
            if int(number, 16) == port and fields[3] == state:
                found.append(Socket(protocol, _address(address), port, int(fields[9])))
    return found


def clashes(sockets: list[Socket], address: str | None) -> list[Socket]:
    """Those that a new socket on the IPv4 `address` (None: all of them, 0.0.0.0) would collide with."""
    if address is None:
        return [one for one in sockets if "." in one.address or one.address == "::"]
    return [one for one in sockets if one.address in (address, "0.0.0.0", "::")]  # noqa: S104 - compared, not bound


def holder(sock: Socket) -> tuple[str, str]:
    """Process and unit that hold a socket, as words: ("etcd (pid 12)", "etcd.service"); "" for a process of no unit."""
    pid = _pid(sock)
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
            return f"{file.read().strip()} (pid {pid})", _unit(pid)
    except (FileNotFoundError, ProcessLookupError):
        return "the kernel", ""


def started_as(sock: Socket) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the process that holds a socket; empty for the kernel's own."""
    pid = _pid(sock)
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line, open(f"/proc/{pid}/environ", "rb") as variables:
            words, settings = line.read().decode(errors="replace"), variables.read().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return [], {}
    pairs = (item.partition("=") for item in settings.split("\0"))
    return words.split("\0")[:-1], {name: value for name, equals, value in pairs if equals}


def _pid(sock: Socket) -> str:
    """The process that has a socket open, "-" for none that is seen."""
    link = f"socket:[{sock.inode}]"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if any(os.readlink(f"/proc/{pid}/fd/{handle}") == link for handle in os.listdir(f"/proc/{pid}/fd")):
                return pid
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or a security module hides it
    return "-"


def _unit(pid: str) -> str:
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        for line in file:
            name = line.strip().rsplit("/", 1)[-1]
            if name.endswith((".service", ".scope")):
                return name
    return ""
