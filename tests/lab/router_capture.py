# SPDX-License-Identifier: GPL-3.0-or-later
"""What is on the wire between the lab's machines: all of it goes through the router's namespace."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from isthmus_lab import ROUTER


@contextlib.contextmanager
def recorded(file: Path, what: str, device: str = "any") -> Iterator[None]:
    """Every packet in the router's namespace that a filter of tcpdump passes, whole, into `file`."""
    options = ["-U", "--immediate-mode", "-n", "-s", "0", "-p", "-i", device, "-w", str(file)]
    process = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{ROUTER}", "tcpdump", *options, what], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        assert any("listening on" in line for line in process.stderr), "tcpdump does not capture"
        yield
    finally:
        process.terminate()
        process.stderr.close()
        process.wait(10)


def packets(file: Path, what: str) -> int:
    done = subprocess.run(["tcpdump", "-n", "-r", str(file), what], capture_output=True, text=True, check=True)
    return len(done.stdout.splitlines())
