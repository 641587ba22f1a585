# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the collection's playbooks as a user does: `ansible-playbook` and the installed artifact, on the lab."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    def changed(self) -> dict[str, list[str]]:
        """Hosts that changed, with the tasks that did."""
        found: dict[str, list[str]] = {name: [] for name, recap in self.hosts.items() if recap.changed}
        for task in re.split(r"^(?:TASK|RUNNING HANDLER) \[", self.output, flags=re.M)[1:]:
            for name in sorted(set(re.findall(r"^changed: \[(\S+?)(?: -> \S+)?\]", task, re.M)).intersection(found)):
                found[name].append(task.splitlines()[0].rstrip("* ").removesuffix("]"))
        return found

    def problems(self, host: str) -> str:
        """The message of a host's failed task, in one line; "" when none failed."""
        for part in self.output.split("fatal: ")[1:]:
            if part.startswith(f"[{host}]"):
                return " ".join(part.split("PLAY RECAP")[0].split())
        return ""


def command(name: str, *arguments: str, inventory: Path = INVENTORY) -> list[str]:
    """The command line that runs `isthmus.mesh.<name>`."""
    if not (COLLECTIONS / "ansible_collections" / "isthmus" / "mesh" / "MANIFEST.json").exists():
        raise AssertionError("the collection's artifact is not installed in build/collections; run: make collection")
    tool = Path(sys.executable).with_name("ansible-playbook")
    return [str(tool), "-i", str(inventory), f"isthmus.mesh.{name}", *arguments]


def environment(events: Path | None = None) -> dict[str, str]:
    """The environment that `command` runs in; what the run does is written to `events`, line by line."""
    found = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "tests" / "lab" / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
        "ANSIBLE_NOCOLOR": "1",
    }
    if events is not None:
        found |= {
            "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "tests" / "e2e" / "callbacks"),
            "ANSIBLE_CALLBACKS_ENABLED": "isthmus_events",
            "ISTHMUS_EVENTS": str(events),
        }
    return found


def documented(page: str, start: str) -> str:
    """The commands of the block in docs/`page` that begins with `start`."""
    blocks = re.findall(r"^```console\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    [block] = [block for block in blocks if block.startswith(start)]
    return str(block)


def recaps(output: str) -> dict[str, Recap]:
    """The recap at the end of a run's output, by host."""
    line = re.compile(r"^(\S+)\s*: " + r"\s+".join(rf"{field.name}=(\d+)" for field in dataclasses.fields(Recap)), re.M)
    return {match[1]: Recap(*(int(number) for number in match.groups()[1:])) for match in line.finditer(output)}


def read_events(path: Path) -> list[dict[str, Any]]:
    """What `tests/e2e/callbacks/isthmus_events.py` wrote; a line that is being written is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def changes(events: Sequence[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """Every change of a run: host, module, and the loop's item ("" outside of a loop)."""
    return {(event["host"], event["action"], event["item"]) for event in events if event.get("changed")}


def launch(
    name: str, *arguments: str, output: Path, inventory: Path = INVENTORY, events: Path | None = None
) -> subprocess.Popen[bytes]:
    """Begin to run `isthmus.mesh.<name>`; what it says goes to the file `output`."""
    with output.open("wb") as file:
        return subprocess.Popen(
            command(name, *arguments, inventory=inventory),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=environment(events),
        )


def kill_run(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to ansible-playbook and its workers: these have sessions of their own and may wait for it for ever."""
    workers = [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _parent(stat) == process.pid]
    for pid in (process.pid, *workers):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(30)


def _parent(stat: Path) -> int:
    """The parent of a process by its /proc/<pid>/stat (proc(5)); 0 when it is gone."""
    try:
        return int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def play(
    name: str,
    *arguments: str,
    inventory: Path = INVENTORY,
    check: bool = True,
    seconds: float = 900,
    events: Path | None = None,
) -> Run:
    """Run `isthmus.mesh.<name>`; `check`: anything but success raises, with the end of the output."""
    done = subprocess.run(
        command(name, *arguments, inventory=inventory),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd="/",  # not the checkout: nothing of it may be found by chance
        env=environment(events),
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"isthmus.mesh.{name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
        )
    return Run(done.returncode, done.stdout + done.stderr, recaps(done.stdout))
