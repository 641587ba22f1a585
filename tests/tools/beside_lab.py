# SPDX-License-Identifier: GPL-3.0-or-later
"""What scenarios of molecule (extensions/molecule) need beside the lab's machines: `router`, FRR in the namespace of
the lab's router, or `aws`, a VPC that holds the hosts of the lab's site `cloud`, played on the loopback.

usage: beside_lab.py start|stop router|aws

`start` returns when it is there, and it stays until `stop`; what it tells is in build/beside-<what>.json, and what it
says in build/beside-<what>.log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "lab"), str(ROOT / "tests" / "integration")]
SECONDS = 60


@contextlib.contextmanager
def router() -> Iterator[dict[str, Any]]:
    from isthmus_lab import Lab
    from lab_router import router_with_bgp

    with router_with_bgp(Lab()):
        yield {}


@contextlib.contextmanager
def aws() -> Iterator[dict[str, Any]]:
    from isthmus_lab import Lab
    from vpc_aws import REGION, Network, aws_on_loopback

    with aws_on_loopback() as (played, url):
        network = Network(played, "198.18.2.0/23")
        for host in Lab().hosts.values():
            if host.site == "cloud":
                network.interface(str(host.address))
        yield {"endpoint": url, "network": network.vpc, "region": REGION}


PLAYED = {"router": router, "aws": aws}


def told(what: str) -> Path:
    return ROOT / "build" / f"beside-{what}.json"


def run(what: str) -> None:
    def ended(*_signal: object) -> None:
        sys.exit()

    signal.signal(signal.SIGTERM, ended)
    with PLAYED[what]() as found:
        part = told(what).with_suffix(".part")
        part.write_text(json.dumps({**found, "pid": os.getpid()}))
        part.rename(told(what))
        try:
            while True:
                signal.pause()
        finally:
            told(what).unlink(missing_ok=True)


def running(what: str) -> int | None:
    """Its process."""
    if not told(what).exists():
        return None
    pid = int(json.loads(told(what).read_text())["pid"])
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except FileNotFoundError:
        return None
    return pid if what.encode() in words and Path(__file__).name.encode() in b" ".join(words) else None


def start(what: str) -> None:
    if running(what) is not None:
        return
    told(what).unlink(missing_ok=True)  # of one that was killed
    log = told(what).with_suffix(".log")
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file:
        words = [sys.executable, str(Path(__file__).resolve()), "run", what]
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd="/"
        )
    end = time.monotonic() + SECONDS
    while not told(what).exists():
        if child.poll() is not None or time.monotonic() > end:
            child.terminate()
            sys.exit(f"beside_lab: {what} is not there after {SECONDS} s or has ended:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def stop(what: str) -> None:
    pid = running(what)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + SECONDS
    while running(what) is not None:
        if time.monotonic() > end:
            sys.exit(f"beside_lab: process {pid} ({what}) does not end; see {told(what).with_suffix('.log')}")
        time.sleep(0.2)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop", "run") or sys.argv[2] not in PLAYED:
        sys.exit(__doc__)
    {"start": start, "stop": stop, "run": run}[sys.argv[1]](sys.argv[2])
