# SPDX-License-Identifier: GPL-3.0-or-later
"""The feature probes: silent on a kernel that has everything, exact about what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from isthmus_agent import netlink
from isthmus_agent.bpf import probe
from isthmus_agent.bpf.mounts import cgroup2_root


def _state() -> tuple[list[str], list[str]]:
    return (
        sorted(each.name for each in cgroup2_root().iterdir() if each.name.startswith("isthmus-probe")),
        sorted(str(each) for each in Path("/sys/fs/bpf").iterdir()),
    )


def test_this_kernel_has_everything_and_keeps_nothing() -> None:
    before = _state()
    assert probe.missing_features() == []
    assert netlink.missing_features() == []
    assert _state() == before


def test_a_missing_helper_and_map_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # A number that no kernel has stands for what an old kernel lacks.
    monkeypatch.setitem(probe._HELPERS, "bpf_new_thing", (probe.libbpf.PROG_TYPE_SCHED_CLS, 100_000))
    monkeypatch.setitem(probe._MAPS, "new maps", 100_000)
    assert probe.missing_features() == ["new maps", "bpf_new_thing"]


def test_missing_objects_and_library_are_named(tmp_path: Path) -> None:
    (words,) = probe.missing_features(objects_dir=tmp_path)
    assert "cgroup.bpf.o is missing" in words
    (words,) = probe.missing_features(library="/nowhere/libbpf.so.1")
    assert "cannot load /nowhere/libbpf.so.1" in words
