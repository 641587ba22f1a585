# SPDX-License-Identifier: GPL-3.0-or-later
"""One health check against a workload that answers, answers nonsense, or does not end."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from isthmus_agent.agent.checks import run_check
from isthmus_mesh.documents import HealthCheck


async def against(answer: bytes) -> str:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await run_check(HealthCheck("http", port, "/", timeout=5.0), "127.0.0.1")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.0 204 No Content\r\n\r\n", ""),
        (b"HTTP/1.0 500 \r\n\r\n", "HTTP status 500"),
        (b"HTTP/1.0 \xb2 \r\n\r\n", "not an HTTP answer"),  # a superscript two: a digit that is no number
        (b"SSH-2.0-x\r\n", "not an HTTP answer"),
    ],
)
def test_no_answer_ends_the_check(answer, reason):
    assert asyncio.run(against(answer)) == reason


def test_a_command_that_cannot_be_run_is_a_failure():
    found = asyncio.run(run_check(HealthCheck("exec", command=("true\0",)), "127.0.0.1"))
    assert found.startswith("the check cannot be made")


def is_there(pid: int) -> bool:
    """A process that was killed and not reaped yet does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_check_that_takes_too_long_leaves_no_process(tmp_path):
    command = ("sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    assert asyncio.run(run_check(HealthCheck("exec", command=command, timeout=1.0), "127.0.0.1")) == "no answer in 1 s"
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10.0
    while is_there(pid):
        assert time.monotonic() < deadline, f"process {pid} of the check still runs"
        time.sleep(0.02)
