# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for `systemctl` and, called by that name, `journalctl` in the namespaces that are a gateway in a test: runs
strongSwan and the unit of the rules as systemd would."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path("/run/fake-systemd")
STATE.mkdir(exist_ok=True)
CHARON, GUARD = "strongswan.service", "isthmus-ipsec.service"


def mark(name, what):
    return STATE / f"{name}.{what}"


def pid():
    """Of strongSwan, 0 when it does not run."""
    path = mark(CHARON, "pid")
    number = int(path.read_text()) if path.exists() else 0
    return number if number and Path(f"/proc/{number}/stat").exists() else 0


def charon(wanted):
    number = pid()
    if number:
        Path(f"/proc/{number}")
        subprocess.run(["kill", f"-{signal.SIGTERM}", str(number)], check=True)
        while pid():
            time.sleep(0.02)
    if not wanted:
        return
    process = subprocess.Popen(
        ["setsid", "-f", "sh", "-c", f"echo $$ > {mark(CHARON, 'pid')}; exec /usr/sbin/charon-systemd"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process.wait(10)
    deadline = time.monotonic() + 10
    while (
        not Path("/run/charon.vici").exists()
        or subprocess.run(["/usr/sbin/swanctl", "--stats"], capture_output=True, check=False).returncode
    ):
        assert time.monotonic() < deadline, "strongSwan does not start"
        time.sleep(0.05)
    subprocess.run(["/usr/sbin/swanctl", "--load-all", "--noprompt"], check=True, capture_output=True)


def guard(wanted):
    text = Path("/etc/systemd/system", GUARD).read_text()
    command = re.search(rf"^{'ExecStart' if wanted else 'ExecStop'}=-?(.*)$", text, re.MULTILINE)[1]
    subprocess.run(command.split(), check=wanted)
    mark(GUARD, "active").touch() if wanted else mark(GUARD, "active").unlink(missing_ok=True)


def active(name):
    return bool(pid()) if name == CHARON else mark(name, "active").exists()


def main(verb, *rest):
    names = [one for one in rest if not one.startswith("-")]
    if verb == "show":
        blocks = [
            f"Id={name}\nActiveState={'active' if active(name) else 'inactive'}\n"
            f"UnitFileState={'enabled' if mark(name, 'enabled').exists() else 'disabled'}"
            for name in names
        ]
        print("\n\n".join(blocks))
    for name in names if verb in ("enable", "disable", "restart", "start", "reload", "stop") else ():
        run = charon if name == CHARON else guard
        if verb == "enable":
            mark(name, "enabled").touch()
        elif verb == "disable":
            mark(name, "enabled").unlink(missing_ok=True)
            if "--now" in rest:
                run(False)
        else:
            run(verb != "stop")


if Path(sys.argv[0]).name == "journalctl":
    log = Path("/run/charon.log")
    print(log.read_text() if log.exists() else "")
else:
    main(*sys.argv[1:])
