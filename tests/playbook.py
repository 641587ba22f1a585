# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the collection's playbooks as a user does: `ansible-playbook` and the installed artifact, on the lab."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLLECTIONS = ROOT / "build" / "collections"
INVENTORY = ROOT / "inventories" / "lab"


@dataclasses.dataclass(frozen=True, slots=True)
class Recap:
    """One host's line of the recap."""

    ok: int
    changed: int
    unreachable: int
    failed: int
    skipped: int
    rescued: int
    ignored: int


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    status: int
    output: str
    hosts: dict[str, Recap]

    @property
    def changed(self) -> dict[str, int]:
        """Hosts that changed, with how many tasks did."""
        return {name: recap.changed for name, recap in self.hosts.items() if recap.changed}


def play(name: str, *arguments: str, inventory: Path = INVENTORY, check: bool = True, seconds: float = 900) -> Run:
    """Run `isthmus.mesh.<name>`; `check`: anything but success raises, with the end of the output."""
    if not (COLLECTIONS / "ansible_collections" / "isthmus" / "mesh" / "MANIFEST.json").exists():
        raise AssertionError("the collection's artifact is not installed in build/collections; run: make collection")
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            "-i",
            str(inventory),
            f"isthmus.mesh.{name}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd="/",  # not the checkout: nothing of it may be found by chance
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "tests" / "lab" / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
            "ANSIBLE_NOCOLOR": "1",
        },
    )
    line = re.compile(r"^(\S+)\s*: " + r"\s+".join(rf"{field.name}=(\d+)" for field in dataclasses.fields(Recap)), re.M)
    hosts = {match[1]: Recap(*(int(number) for number in match.groups()[1:])) for match in line.finditer(done.stdout)}
    if check and done.returncode != 0:
        raise AssertionError(
            f"isthmus.mesh.{name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
        )
    return Run(done.returncode, done.stdout + done.stderr, hosts)
