# SPDX-License-Identifier: GPL-3.0-or-later
"""Commands that are run beside an etcd client must not be aborted by gRPC's fork handlers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, os, subprocess, sys, threading
import isthmus_agent.kvstore  # before grpc, as every user of ours
import grpc.aio

async def client():
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    try:
        await asyncio.wait_for(channel.channel_ready(), 0.3)
    except asyncio.TimeoutError:
        pass
    await channel.close()

for _ in range(120):
    thread = threading.Thread(target=asyncio.run, args=(client(),))
    thread.start()
    # As Ansible's run_command does it: a child made by fork, pipes, a preexec_fn.
    done = subprocess.run(["/bin/true"], capture_output=True, preexec_fn=lambda: None)
    if done.returncode or done.stderr:
        print(f"the child ended with {done.returncode}: {done.stderr!r}", flush=True)
        os._exit(1)
os._exit(0)  # clients of this crowd still run
"""


def test_children_of_a_process_with_an_etcd_client_run_to_their_end() -> None:
    agent = Path(__file__).resolve().parents[2] / "agent"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={"PYTHONPATH": str(agent), "PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stdout or done.stderr[-400:]
