# SPDX-License-Identifier: GPL-3.0-or-later
"""systemd's notification socket, by path and in the abstract namespace."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from isthmus_agent.sdnotify import notify, watchdog_interval


@pytest.mark.parametrize("abstract", [False, True])
def test_state_reaches_the_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    path = f"@isthmus-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + path[1:] if abstract else path)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        assert notify("READY=1") is True
        assert sock.recv(100) == b"READY=1"


def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert notify("READY=1") is False


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [(None, None, None), ("30000000", None, 15.0), ("30000000", str(os.getpid()), 15.0), ("30000000", "1", None)],
    ids=["none", "for any", "for this process", "for another"],
)
def test_watchdog_interval(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, interval: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert watchdog_interval() == interval
