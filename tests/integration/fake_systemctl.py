# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for systemd's `systemctl` on a directory that is a host in a test ($ISTHMUS_TEST_HOST): runs the etcd of
`units/isthmus-etcd.service` as that unit would, remembers what is enabled, and writes down what it was told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fake_units import FakeUnits

HOST = Path(os.environ["ISTHMUS_TEST_HOST"])
UNITS, STARTED, ETCD = HOST / "units", HOST / "pids", "isthmus-etcd.service"
FAKE = FakeUnits(UNITS, STARTED, UNITS / "enabled", HOST / "calls", silent=("show",))


def settings():
    lines = (HOST / "etcd.env").read_text().splitlines()
    for file in (UNITS / ETCD, HOST / "first-start.conf"):
        if file.exists():
            marked = [line for line in file.read_text().splitlines() if line.startswith("Environment=")]
            lines += [line.removeprefix("Environment=") for line in marked]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def stop(name):
    number = FAKE.pid(name)
    if number:
        os.kill(number, signal.SIGTERM)
        while FAKE.pid(name):
            time.sleep(0.02)
    (STARTED / name).unlink(missing_ok=True)


def start(name):
    stop(name)
    command = ["sleep", "600"]
    if name == ETCD:
        if not (HOST / "data" / "member").exists() and not (HOST / "first-start.conf").exists():
            return  # the unit's condition
        command = ["etcd"]
    with (HOST / "etcd.log").open("ab") as log:
        environment = {"PATH": os.environ["PATH"], **settings()}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    (STARTED / name).write_text(str(process.pid))


FAKE.systemctl(sys.argv[1:], start, stop)
