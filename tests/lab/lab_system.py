# SPDX-License-Identifier: GPL-3.0-or-later
"""Processes, network namespaces and cgroups of this machine, as the lab uses them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

CGROUP = "isthmus-lab"


class LabError(Exception):
    """The lab cannot do what was asked; the message says what, why and what to do next."""


def run(*command: str, check: bool = True, feed: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, input=feed, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise LabError(f"`{shlex.join(command)}` failed ({done.returncode}): {done.stderr.strip()}")
    return done


def ip(*command: str, namespace: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("ip", *(("-n", namespace) if namespace else ()), *command, check=check)


def in_namespace(namespace: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("nsenter", f"--net=/run/netns/{namespace}", *command, check=check)


def namespace_exists(namespace: str) -> bool:
    return Path("/run/netns", namespace).exists()


def wait_for(what: str, seconds: float, ready: Callable[[], bool], step: float = 0.1) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {seconds:.0f} s")
        time.sleep(step)


def process_start(pid: int) -> str:
    """Start time of a process in clock ticks (proc(5), field 22); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


# --- cgroups -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Hierarchy:
    path: Path
    controllers: tuple[str, ...]  # empty: cgroup2

    @property
    def is_v2(self) -> bool:
        return not self.controllers


def hierarchies() -> list[Hierarchy]:
    """Every mounted cgroup hierarchy below /sys/fs/cgroup, cgroup2 last."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if not where.startswith("/sys/fs/cgroup"):
            continue
        if kind == "cgroup2":
            found.append(Hierarchy(Path(where), ()))
        elif kind == "cgroup":
            generic = {"rw", "ro", "relatime", "nosuid", "nodev", "noexec"}
            found.append(Hierarchy(Path(where), tuple(o for o in options.split(",") if o not in generic)))
    return sorted(found, key=lambda hierarchy: hierarchy.is_v2)


def make_cgroup(hierarchy: Hierarchy, name: str) -> Path:
    path = hierarchy.path
    for part in (CGROUP, name):
        parent, path = path, path / part
        path.mkdir(exist_ok=True)
        if "cpuset" in hierarchy.controllers:
            # A v1 cpuset group starts empty and refuses processes.
            for knob in ("cpuset.cpus", "cpuset.mems"):
                (path / knob).write_text((parent / knob).read_text())
            (path / "cgroup.clone_children").write_text("1")
    return path


def enter_cgroups(name: str) -> None:
    """Put the calling process into the lab's group `name` in every hierarchy."""
    for hierarchy in hierarchies():
        (make_cgroup(hierarchy, name) / "cgroup.procs").write_text(str(os.getpid()))


def cgroup_processes(path: Path) -> list[int]:
    pids = []
    for procs in path.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            pids += [int(pid) for pid in procs.read_text().split()]
    return pids


def remove_cgroups(name: str) -> None:
    """Remove the lab's group `name` ("": all of them) with what is below it, deepest first. They must be empty."""
    for hierarchy in hierarchies():
        top = hierarchy.path / CGROUP / name
        if not top.exists():
            continue
        below = sorted((p for p in top.rglob("*") if p.is_dir()), key=lambda p: len(p.parts), reverse=True)
        for path in (*below, top):
            wait_for(f"cgroup {path} is empty", 10, lambda path=path: remove_group(path))


def remove_group(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
