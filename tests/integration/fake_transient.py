# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for `systemd-run` and `systemctl stop` on a host that is a network namespace in a test: by the name it is
called with, and with the unit's process noted in $ISTHMUS_TEST_HOST."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PIDS = Path(os.environ["ISTHMUS_TEST_HOST"])


def stop(name):
    noted = PIDS / name
    if not noted.exists():
        print(f"Failed to stop {name}: Unit {name} not loaded.", file=sys.stderr)
        return 5
    number = int(noted.read_text())
    noted.unlink()
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGTERM)
    end = time.monotonic() + 10
    while Path(f"/proc/{number}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return 0


def run(words):
    [name] = [word.partition("=")[2] for word in words[: words.index("--")] if word.startswith("--unit=")]
    place = str(PIDS / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, (PIDS / "journal").open("ab") as log:
        Path(place).unlink(missing_ok=True)
        notify.bind(place)
        notify.settimeout(20)
        process = subprocess.Popen(
            words[words.index("--") + 1 :],
            env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": place},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        (PIDS / name).write_text(str(process.pid))
        if notify.recv(100) != b"READY=1":
            return 1
    return 0


sys.exit(stop(sys.argv[-1]) if "stop" in sys.argv[1:] else run(sys.argv[1:]))
