# SPDX-License-Identifier: GPL-3.0-or-later
"""The copy of own output on the registrar's disk."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from isthmus_agent.registrar.memory import Known, Memory

KNOWN = Known({"isthmus/v1/alloc/vips/shop/web": '{"ipv4":"10.111.0.1"}', "cilium/state/x": "\udcff"}, 0xA1, 7)


def test_what_was_saved_is_loaded_again(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "registrar", "lab", "onprem")
    assert memory.load() is None
    assert memory.save(KNOWN)
    assert Memory(tmp_path / "registrar", "lab", "onprem").load() == KNOWN
    assert stat.S_IMODE(memory.path.stat().st_mode) == 0o600


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another schema": lambda document: {**document, "schema": 2},
    "another estate": lambda document: {**document, "estate": "other"},
    "another cluster": lambda document: {**document, "cluster": "cloud"},
    "keys lack": lambda document: {k: v for k, v in document.items() if k != "keys"},
    "keys are no object": lambda document: {**document, "keys": []},
    "a value is no text": lambda document: {**document, "keys": {"a": 1}},
    "the cluster id is none": lambda document: {**document, "cluster_id": "x"},
    "the revision is no number": lambda document: {**document, "revision": float("inf")},
    "no object": lambda document: [],
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_ours_is_ignored_with_a_line(
    broken: Callable[[dict[str, Any]], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory(tmp_path, "lab", "onprem")
    memory.save(KNOWN)
    memory.path.write_text(json.dumps(broken(json.loads(memory.path.read_text()))))
    with caplog.at_level(logging.WARNING):
        assert memory.load() is None
    assert [record.message for record in caplog.records] == ["own output of before is not used"]


def test_half_a_file_is_ignored(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "lab", "onprem")
    memory.save(KNOWN)
    memory.path.write_bytes(memory.path.read_bytes()[:-20])
    assert memory.load() is None


def test_a_directory_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    memory = Memory(tmp_path / "file" / "registrar", "lab", "onprem")
    with caplog.at_level(logging.WARNING):
        assert memory.load() is None
        caplog.clear()
        assert not memory.save(KNOWN)
        assert not memory.save(KNOWN)
    assert [record.message for record in caplog.records] == ["own output is not kept on disk"]
