# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for systemd's `systemctl` on a directory that is a host in a test ($ISTHMUS_TEST_HOST): runs the etcd of
`units/isthmus-etcd.service` as that unit would, remembers what is enabled, and writes down what it was told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOST = Path(os.environ["ISTHMUS_TEST_HOST"])
UNITS, STARTED, ETCD = HOST / "units", HOST / "pids", "isthmus-etcd.service"


def pid(name):
    try:
        number = int((STARTED / name).read_text())
        running = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, ValueError):
        return 0
    return number if running else 0


def settings():
    lines = (HOST / "etcd.env").read_text().splitlines()
    for file in (UNITS / ETCD, HOST / "first-start.conf"):
        if file.exists():
            marked = [line for line in file.read_text().splitlines() if line.startswith("Environment=")]
            lines += [line.removeprefix("Environment=") for line in marked]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def stop(name):
    number = pid(name)
    if number:
        os.kill(number, signal.SIGTERM)
        while pid(name):
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


def show(name):
    there, enabled = (UNITS / name).exists(), (UNITS / "enabled" / name).exists()
    state = "active" if pid(name) else "inactive"
    print(f"Id={name}\nLoadState={'loaded' if there else 'not-found'}\nActiveState={state}\nMainPID={pid(name)}")
    print(f"UnitFileState={'' if not there else 'enabled' if enabled else 'disabled'}\nNeedDaemonReload=no\n")


def main():
    STARTED.mkdir(exist_ok=True)
    (UNITS / "enabled").mkdir(parents=True, exist_ok=True)
    verb, *names = [word for word in sys.argv[1:] if not word.startswith("-")]
    if verb != "show":
        with (HOST / "calls").open("a") as file:
            file.write(" ".join([verb, *names]) + "\n")
    for name in names:
        if verb == "show":
            show(name)
        elif verb == "restart":
            start(name)
        elif verb == "enable":
            (UNITS / "enabled" / name).touch()
        elif verb in ("stop", "disable"):
            stop(name)
            if verb == "disable":
                (UNITS / "enabled" / name).unlink(missing_ok=True)
        else:
            print("disabled" if verb == "is-enabled" else "inactive")


main()
