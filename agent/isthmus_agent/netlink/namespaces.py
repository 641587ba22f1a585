# SPDX-License-Identifier: GPL-3.0-or-later
"""The network namespaces of pods: entering one, finding that of an address, and the addresses of one."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute

from isthmus_agent.desired.datapath import Address
from isthmus_agent.netlink.errors import NetworkError

# Where container runtimes keep the network namespaces of pods: containerd and CRI-O, Docker. Processes' own entries
# in /proc would do as well, but reading those of others takes a right (ptrace) that an agent should not have.
PLACES = (Path("/run/netns"), Path("/run/docker/netns"))
_CLONE_NEWNET = 0x40000000
_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, since Linux 5.14

T = TypeVar("T")


def paths(places: Collection[Path] = PLACES) -> Iterator[Path]:
    """Every namespace below `places`, and whatever else is there."""
    return (path for place in places if place.is_dir() for path in sorted(place.iterdir()))


def inside(path: Path, function: Callable[[], T]) -> T | None:
    """What `function` answers inside the namespace, in a thread of its own that ends with it; threads that it starts
    are there too. None when `path` is none (any more). NetworkError when it cannot be entered, and what `function`
    raises."""
    answers: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
                number = ctypes.get_errno()
                if number != errno.EINVAL:  # the file that a namespace is mounted over, before it is and after
                    failures.append(NetworkError(f"cannot enter the network namespace {path}: {os.strerror(number)}"))
                return
            answers.append(function())
        except BaseException as error:
            failures.append(error)
        finally:
            os.close(namespace)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return answers[0] if answers else None


def addresses_here() -> set[str]:
    """The IPv4 addresses of this network namespace, but for its loopback's."""
    with IPRoute() as ipr:
        found = (message.get_attr("IFA_LOCAL") for message in ipr.get_addr(family=socket.AF_INET))
        return {address for address in found if address and not address.startswith("127.")}


def cookies(
    addresses: Collection[Address], places: Collection[Path] = PLACES, step: Callable[[], None] = lambda: None
) -> dict[Address, int]:
    """The cookies of the namespaces that have `addresses`, of those that are found; `step` is called after each
    namespace. NetworkError when one cannot be entered or the kernel gives no cookies."""
    found: dict[Address, int] = {}
    for path in paths(places):
        left = [address for address in addresses if address not in found]
        if not left:
            break
        found.update(inside(path, lambda left=left: _here(left)) or {})  # type: ignore[misc]
        step()
    return found


def _here(addresses: Collection[Address]) -> dict[Address, int]:
    found = {}
    for address in addresses:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            try:
                probe.bind((str(address), 0))
            except OSError:
                continue  # not an address of this namespace
            try:
                cookie = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
            except OSError as error:
                raise NetworkError(
                    f"this kernel does not tell the cookies of network namespaces ({error.strerror}): pods cannot be "
                    "left out of socket translation. Next: Linux 5.14 or later"
                ) from error
        found[address] = struct.unpack("=Q", cookie)[0]
    return found
