# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for `systemctl`, `systemd-run`, `ssh` and the agent on a host that is a mount namespace in a test.

By the name it is called with. Units are read from /etc/systemd/system; $ISTHMUS_TEST_HOST holds what runs. A
specification with `"cut": true` makes the host refuse SSH while the agent runs with it.
A timer ends when so many connections have ended as the file `hurry` says, and never without it: how fast this machine
is decides nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fake_units import FakeUnits

HOST = Path(os.environ["ISTHMUS_TEST_HOST"])
UNITS, PIDS, CUT = Path("/etc/systemd/system"), HOST / "pids", HOST / "cut"
FAKE = FakeUnits(UNITS, PIDS, HOST / "enabled", HOST / "calls", silent=("show",))


def stop(name):
    if FAKE.pid(name):
        os.killpg(FAKE.pid(name), signal.SIGKILL)
        while FAKE.pid(name):
            time.sleep(0.02)
    (PIDS / name).unlink(missing_ok=True)
    if name == "isthmusd.service":
        CUT.unlink(missing_ok=True)


def start(name):
    stop(name)
    lines = (UNITS / name).read_text().splitlines()
    settings = dict(
        word.split("=", 1) for line in lines if line.startswith("Environment=") for word in line[12:].split()
    )
    run(name, ["sleep", "600"], {"PATH": os.environ["PATH"], **settings})
    if name == "isthmusd.service" and json.loads(Path("/etc/isthmus/node.json").read_text()).get("cut"):
        CUT.touch()


def run(name, command, environment):
    with (HOST / "journal").open("ab") as log:
        started = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, **started)
    (PIDS / name).write_text(str(process.pid))


def systemctl(words):
    FAKE.systemctl(words, start, stop)


def systemd_run(words):
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--on-active"))
    command = words[next(place for place, word in enumerate(words) if not word.startswith("--")) :]
    with (HOST / "calls").open("a") as file:
        file.write(f"timer {options['on-active']} {' '.join(command)}\n")
    # The service is no part of its timer: stopping the timer stops no rollback.
    awaited = (HOST / "hurry").read_text() if (HOST / "hurry").exists() else "1000"
    script = f"until [ $(grep -c command {HOST}/ssh) -ge {awaited} ]; do sleep 0.1; done; "
    back = " ".join(command)
    if "--property=Restart=on-failure" in words:  # as if the pause were over
        back = f"sh -c 'echo $$ > {PIDS}/isthmus-rollback.service; until {back}; do sleep 1; done'"
    script += f"exec setsid --fork {back}"
    run("isthmus-rollback.timer", ["sh", "-c", script], dict(os.environ))


def ssh(words):
    status = 255
    if "-O" in words or CUT.exists():
        print("ssh: connect to host: No route to host", file=sys.stderr)
    else:
        status = subprocess.run(["sh", "-c", words[-1]], check=False).returncode
        if (HOST / "break").exists():
            (HOST / "break").unlink()
            status = 255
    with (HOST / "ssh").open("a") as file:
        file.write(("control" if "-O" in words else "command") + "\n")
    return status


def main():
    PIDS.mkdir(exist_ok=True)
    tool = {"systemctl": systemctl, "systemd-run": systemd_run, "ssh": ssh}[sys.argv[1]]
    return tool(sys.argv[2:]) or 0


sys.exit(main())
