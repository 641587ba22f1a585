# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups are there complete or not at all, and what lacks is told."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.isthmus.mesh.plugins.filter.backup_outcome import backup_outcome
from ansible_collections.isthmus.mesh.plugins.plugin_utils import backups
from isthmus_agent.backup import BackupError, check_snapshot, seal


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 3_000_000, b"data" + hashlib.sha256(b"date").digest()])
def test_a_damaged_snapshot_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.db"
    path.write_bytes(content)
    with pytest.raises(BackupError, match="does not end with its own SHA-256"):
        check_snapshot(path)


def test_a_whole_snapshot_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.db"
    data = b"x" * 3_000_000
    path.write_bytes(data + hashlib.sha256(data).digest())
    check_snapshot(path)


def test_nothing_is_sealed_to_what_is_no_key() -> None:
    with pytest.raises(BackupError, match="Give an RSA key"):
        seal(b"secret", b"no key")


def test_an_interrupted_backup_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with backups.making(str(tmp_path), "t") as (place, _path):
            file = Path(place, "snapshot.db")
            file.write_bytes(b"half")
            backups.take_in(str(file), {"sha256": hashlib.sha256(b"whole").hexdigest()})

    with pytest.raises(AnsibleActionFail, match="did not arrive"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_backup_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "snapshot.db").write_bytes(b"the first")
    with pytest.raises(backups.RefusedError, match="not empty"), backups.making(str(tmp_path), "t") as (place, _path):
        Path(place, "snapshot.db").write_bytes(b"the second")
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"the first"]


def test_a_run_without_an_etcd_host_is_no_success() -> None:
    assert backup_outcome([])["problems"] != []


def test_a_record_that_does_not_know_the_authority_is_told() -> None:
    taken: dict[str, Any] = {"path": "/b/o/t", "files": ["snapshot.db"], "revision": 7, "ca_host": None}
    outcome = backup_outcome([{"cluster": "o", "etcd": [taken], "authority": []}])
    assert "unknown to the estate record" in outcome["problems"][0]
    assert "/b/o/t (snapshot.db)" in outcome["done"][0]
