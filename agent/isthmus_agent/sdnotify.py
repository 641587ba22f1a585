# SPDX-License-Identifier: GPL-3.0-or-later
"""systemd's service notification protocol (sd_notify(3)): readiness, status text, watchdog."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Send `state` (such as `READY=1`, `WATCHDOG=1`, `STATUS=...`) to systemd; False when nobody asked for it.

    Raises OSError when the socket that systemd named does not take it.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), address)
    return True


def watchdog_interval() -> float | None:
    """Seconds between two WATCHDOG=1 messages (half of what systemd allows), or None without a watchdog."""
    text = os.environ.get("WATCHDOG_USEC")
    pid = os.environ.get("WATCHDOG_PID")
    if not text or (pid and int(pid) != os.getpid()):
        return None
    return int(text) / 2_000_000
