# SPDX-License-Identifier: GPL-3.0-or-later
"""Cgroups of workloads: where they are in the cgroup2 hierarchy and which id they have now.

The id that BPF sees (`bpf_get_current_cgroup_id`) is the inode number of the cgroup's directory. A unit
that restarts gets a new directory, so the ids are read again and again; that costs one `stat` each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from isthmus_mesh.spec import Cgroup, WorkloadSpec


def _slice_path(name: str) -> Path:
    """systemd nests slices by their dashes: `a-b.slice` lies in `a.slice/a-b.slice` (systemd.slice(5))."""
    stem = name.removesuffix(".slice")
    parts = stem.split("-")
    return Path(*(f"{'-'.join(parts[:n])}.slice" for n in range(1, len(parts) + 1)))


def _find(root: Path, name: str, depth: int = 6) -> Path | None:
    """A unit's directory: in `system.slice` as a rule, else in any slice."""
    usual = root / "system.slice" / name
    if usual.is_dir():
        return usual
    level = [root]
    for _ in range(depth):
        below: list[Path] = []
        for directory in level:
            try:
                entries = list(os.scandir(directory))
            except (FileNotFoundError, NotADirectoryError):
                continue  # it went while we looked
            for entry in entries:
                if entry.name == name and entry.is_dir(follow_symlinks=False):
                    return Path(entry.path)
                if entry.name.endswith(".slice") and entry.is_dir(follow_symlinks=False):
                    below.append(Path(entry.path))
        level = below
    return None


def locate(root: Path, cgroup: Cgroup) -> Path | None:
    """The directory of a workload's cgroup, or None while it does not exist."""
    if cgroup.kind == "path":
        path = root / cgroup.value.lstrip("/")
        return path if path.is_dir() else None
    if cgroup.kind == "slice":
        name = cgroup.value if cgroup.value.endswith(".slice") else f"{cgroup.value}.slice"
        path = root / _slice_path(name)
        return path if path.is_dir() else _find(root, name)
    name = cgroup.value if "." in cgroup.value else f"{cgroup.value}.service"
    return _find(root, name)


class CgroupTracker:
    """Follows the cgroups of this host's workloads."""

    def __init__(self, root: Path, workloads: Iterable[WorkloadSpec]) -> None:
        self.root = root
        self._cgroups: Mapping[tuple[str, str], Cgroup] = {(w.namespace, w.name): w.cgroup for w in workloads}
        self._paths: dict[tuple[str, str], Path] = {}
        self.ids: dict[tuple[str, str], tuple[int, ...]] = {}

    def poll(self, search: bool = True) -> bool:
        """Read the ids; True when one changed. With `search` False only known places are looked at."""
        found: dict[tuple[str, str], tuple[int, ...]] = {}
        for key, cgroup in self._cgroups.items():
            path = self._paths.get(key)
            number = _inode(path) if path is not None else None
            if number is None and (search or path is not None):
                path = locate(self.root, cgroup)
                number = _inode(path) if path is not None else None
            if path is not None and number is not None:
                self._paths[key] = path
                found[key] = (number,)
            else:
                self._paths.pop(key, None)
        changed = found != self.ids
        self.ids = found
        return changed


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
