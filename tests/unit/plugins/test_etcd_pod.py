# SPDX-License-Identifier: GPL-3.0-or-later
"""The connection into a pod of etcd, with the shell of this machine in the place of the pod's. What it says to the API
of Kubernetes is end-to-end (tests/e2e/test_in_cluster.py)."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ansible.playbook.play_context import PlayContext
from ansible_collections.isthmus.mesh.plugins.connection.etcd_pod import REMOTE_TMP, Connection


class Local(Connection):
    """Whatever is written to a command has no end, as in the stream of the API."""

    def _connect(self) -> Any:
        return self

    def _run(self, command: str, given: bytes = b"") -> tuple[int, bytes, bytes]:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=out, stderr=err)
            assert process.stdin is not None
            process.stdin.write(given)
            process.stdin.flush()
            status = process.wait(timeout=10)
            process.stdin.close()
            out.seek(0)
            err.seek(0)
            return status, out.read(), err.read()


@pytest.fixture
def connection() -> Local:
    return Local(PlayContext())


def test_a_command_reads_what_it_is_given_and_ends(connection: Local) -> None:
    assert connection.exec_command("echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
    assert connection.exec_command("cat; echo ready", in_data=b"a b\n") == (0, b"a b\nready\n", b"")


@pytest.mark.parametrize("content", [b"", b"text\n", bytes(range(256)) * 1000], ids=["empty", "text", "binary"])
def test_files_come_and_go_as_they_are(connection: Local, tmp_path: Path, content: bytes) -> None:
    here, there, back = (tmp_path / name for name in ("here", "it's there", "back"))
    here.write_bytes(content)
    connection.put_file(str(here), str(there))
    assert there.read_bytes() == content
    connection.fetch_file(str(there), str(back))
    assert back.read_bytes() == content


def test_what_the_inventory_says_of_machines_does_not_count(connection: Local) -> None:
    connection._shell.set_options(var_options={"ansible_remote_tmp": "/home/admin/tmp"})
    assert connection._shell.get_option("remote_tmp") == REMOTE_TMP
    connection.set_become_plugin(object())
    assert connection.become is None
