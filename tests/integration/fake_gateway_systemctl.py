# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for `systemctl` and, called by that name, `journalctl` in the namespaces that are a gateway in a test: runs
strongSwan, where the kernel does ESP also its interfaces and their routes, and the units of the rules as systemd would.
"""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STATE = Path("/run/fake-systemd")
STATE.mkdir(exist_ok=True)
CHARON, GUARD, ROUTES = "strongswan.service", "isthmus-ipsec.service", "isthmus-ipsec-routes.service"
KEEPER = "isthmus-ipsec-keeper.service"
PATIENCE = 10 if "QEMU TCG" in Path("/proc/cpuinfo").read_text() else 1


def mark(name, what):
    return STATE / f"{name}.{what}"


def pid(name=CHARON):
    """0 when it does not run."""
    path = mark(name, "pid")
    number = int(path.read_text()) if path.exists() else 0
    return number if number and Path(f"/proc/{number}/stat").exists() else 0


def stop(name):
    number = pid(name)
    if number:
        subprocess.run(["kill", f"-{signal.SIGTERM}", str(number)], check=True)
        while pid(name):
            time.sleep(0.02)


def start(name, command):
    process = subprocess.Popen(
        ["setsid", "-f", "sh", "-c", f"echo $$ > {mark(name, 'pid')}; exec {command}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process.wait(10)


def lines(path, key):
    """Commands of a unit's file, those that may fail without their sign."""
    file = Path("/etc/systemd/system", path)
    return re.findall(rf"^{key}=-?(.*)$", file.read_text(), re.MULTILINE) if file.exists() else []


def routes(wanted):
    stop(ROUTES)
    for command in lines(ROUTES, "ExecStart") if wanted else ():
        start(ROUTES, command)


def charon(wanted):
    more = f"{CHARON}.d/isthmus.conf"
    routes(False)
    stop(CHARON)
    if mark(CHARON, "pid").exists():
        for command in lines(more, "ExecStopPost"):
            subprocess.run(command.split(), check=True)
    if not wanted:
        return
    for command in lines(more, "ExecStartPre"):
        subprocess.run(command.split(), check=True)
    start(CHARON, " ".join(["env", *lines(more, "Environment"), "/usr/sbin/charon-systemd"]))
    deadline = time.monotonic() + 10 * PATIENCE
    while (
        not Path("/run/charon.vici").exists()
        or subprocess.run(["/usr/sbin/swanctl", "--stats"], capture_output=True, check=False).returncode
    ):
        assert time.monotonic() < deadline, "strongSwan does not start"
        time.sleep(0.05)
    subprocess.run(["/usr/sbin/swanctl", "--load-all", "--noprompt"], check=True, capture_output=True)
    for command in lines(more, "ExecStartPost"):
        subprocess.run(command.split(), check=True)
    routes(mark(ROUTES, "enabled").exists())


def guard(wanted):
    for command in lines(GUARD, "ExecStart" if wanted else "ExecStop"):
        subprocess.run(command.split(), check=wanted)
    mark(GUARD, "active").touch() if wanted else mark(GUARD, "active").unlink(missing_ok=True)


def keeper(wanted):
    stop(KEEPER)
    for command in lines(KEEPER, "ExecStart") if wanted else ():
        place = mark(KEEPER, "notify")
        place.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(place))
            told.settimeout(10 * PATIENCE)
            start(KEEPER, f"env NOTIFY_SOCKET={place} {command}")
            assert told.recv(100) == b"READY=1"


def active(name):
    return mark(name, "active").exists() if name == GUARD else bool(pid(name))


def main(verb, *rest):
    names = [one for one in rest if not one.startswith("-")]
    if verb == "show":
        blocks = [
            f"Id={name}\nActiveState={'active' if active(name) else 'inactive'}\n"
            f"UnitFileState={'enabled' if mark(name, 'enabled').exists() else 'disabled'}\nMainPID={pid(name)}"
            for name in names
        ]
        print("\n\n".join(blocks))
    for name in names if verb in ("enable", "disable", "restart", "start", "reload", "stop") else ():
        run = {CHARON: charon, GUARD: guard, ROUTES: routes, KEEPER: keeper}[name]
        if verb == "enable":
            mark(name, "enabled").touch()
        elif verb == "disable":
            mark(name, "enabled").unlink(missing_ok=True)
            if "--now" in rest:
                run(False)
        else:
            run(verb != "stop")


# What a unit runs is told nothing by whoever asks for it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if Path(sys.argv[0]).name == "journalctl":
    log = Path("/run/charon.log")
    print(log.read_text() if log.exists() else "")
else:
    main(*sys.argv[1:])
