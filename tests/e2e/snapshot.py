# SPDX-License-Identifier: GPL-3.0-or-later
"""A machine as it is: everything that the collection may touch, to compare before and after.

Taken with the machine's own tools (`look.py`, which names what it leaves out and why).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from isthmus_lab import CGROUP, Lab, hierarchies

Snapshot = Mapping[str, Any]
"""Aspect (`files`, `routes`, ...) -> its entries (name -> what it is, or a list of lines)."""

LOOK = Path(__file__).with_name("look.py").read_text()


def attached(lab: Lab, host: str) -> list[str]:
    """BPF programs at the machine's root cgroup (nspawn calls it `payload`), as the kernel has them."""
    unified = next(hierarchy for hierarchy in hierarchies() if hierarchy.is_v2).path
    done = subprocess.run(
        ["bpftool", "-j", "cgroup", "show", str(unified / CGROUP / host / "payload")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"bpftool cgroup show: {done.stdout}{done.stderr}")
    shown = json.loads(done.stdout.strip() or "[]")
    return sorted(f"{p['attach_type']} {p['name']}" for p in shown if not str(p.get("name", "")).startswith("sd_"))


def take(lab: Lab, hosts: Sequence[str] = ()) -> dict[str, Snapshot]:
    """The snapshots of some machines, else of every machine, by host."""
    names = hosts or tuple(lab.hosts)

    def one(host: str) -> Snapshot:
        looked = json.loads(lab.exec(host, ["/usr/bin/python3", "-"], feed=LOOK).stdout)
        return {**looked, "programs": attached(lab, host)}

    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def differences(before: Mapping[str, Snapshot], after: Mapping[str, Snapshot]) -> list[str]:
    """What is not the same, a line each: host, aspect, entry, and what it was and is."""
    found = []
    for host, aspects in before.items():
        for aspect, was in aspects.items():
            now = after[host][aspect]
            if was == now:
                continue
            if isinstance(was, dict):
                for name in sorted({*was, *now}):
                    if was.get(name) != now.get(name):
                        found.append(f"{host}: {aspect}: {name}: {was.get(name)} -> {now.get(name)}")
            else:
                found += [f"{host}: {aspect}: gone: {line}" for line in was if line not in now]
                found += [f"{host}: {aspect}: new: {line}" for line in now if line not in was]
    return found
