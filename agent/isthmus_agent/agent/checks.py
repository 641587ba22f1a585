# SPDX-License-Identifier: GPL-3.0-or-later
"""Health checks of the workloads on this host: the shell around `desired.health`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from isthmus_mesh.documents import HealthCheck
from isthmus_mesh.spec import WorkloadSpec

from isthmus_agent.agent.log import fields
from isthmus_agent.desired import health
from isthmus_agent.desired.reports import CheckKey
from isthmus_agent.kvstore.tasks import end, within

logger = logging.getLogger(__name__)

# State in /proc/net of a socket that takes what comes from anyone (include/net/tcp_states.h): TCP_LISTEN, and
# TCP_CLOSE for a datagram socket that is bound and not connected.
_STATES = {"TCP": "0A", "UDP": "07"}


async def run_check(check: HealthCheck, address: str) -> str:
    """One check against a workload's own address; empty when it passed, else the reason for a person."""
    try:
        return await within(_attempt(check, address), check.timeout)
    except asyncio.TimeoutError:
        return f"no answer in {check.timeout:g} s"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a command or path that the kernel cannot take, such as one with a NUL
        return f"the check cannot be made: {error}"


async def _attempt(check: HealthCheck, address: str) -> str:
    if check.type == "exec":
        return await _exec(check)
    reader, writer = await asyncio.open_connection(address, check.port, limit=4096)
    try:
        if check.type == "tcp":
            return ""
        request = f"GET {check.path} HTTP/1.0\r\nHost: {address}:{check.port}\r\nUser-Agent: isthmus-health\r\n\r\n"
        writer.write(request.encode())
        try:
            line = (await reader.readline()).decode("latin-1").split()
        except ValueError:
            return "not an HTTP answer"  # longer than the limit without a line end
        if len(line) < 2 or not line[0].startswith("HTTP/") or not (line[1].isascii() and line[1].isdigit()):
            return "not an HTTP answer"
        return "" if 200 <= int(line[1]) < 400 else f"HTTP status {line[1]}"
    finally:
        writer.close()


async def _exec(check: HealthCheck) -> str:
    process = await asyncio.create_subprocess_exec(
        *check.command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
                os.killpg(process.pid, signal.SIGKILL)  # with what it started: a shell leaves its children behind
            await process.wait()
    return "" if status == 0 else f"exit status {status}"


@dataclass(slots=True)
class _Runner:
    address: str
    check: HealthCheck
    state: health.HealthState
    task: asyncio.Task[None] | None = field(default=None)


class Checks:
    """One task for each (workload, service) with a health check; `changed` is called when a verdict turns."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._runners: dict[CheckKey, _Runner] = {}

    def reconcile(
        self,
        wanted: Mapping[CheckKey, tuple[WorkloadSpec, HealthCheck | None]],
        reported: Callable[[CheckKey], bool | None],
    ) -> None:
        """Run exactly these. A new check starts from the verdict that was `reported` before, if any."""
        checked = {key: (str(spec.address4), check) for key, (spec, check) in wanted.items() if check is not None}
        for key in [key for key in self._runners if key not in checked]:
            self._stop(self._runners.pop(key))
        for key, (address, check) in checked.items():
            runner = self._runners.get(key)
            if runner is not None and (runner.address, runner.check) == (address, check):
                continue
            if runner is not None:
                self._stop(runner)
            known = runner.state.ready if runner is not None else reported(key)
            runner = self._runners[key] = _Runner(address, check, health.HealthState(ready=known))
            runner.task = asyncio.create_task(self._run(key, runner), name=f"check {key.service} {key.workload}")

    def verdicts(self) -> dict[CheckKey, bool | None]:
        return {key: runner.state.ready for key, runner in self._runners.items()}

    def states(self) -> dict[CheckKey, health.HealthState]:
        return {key: runner.state for key, runner in self._runners.items()}

    async def close(self) -> None:
        tasks = [runner.task for runner in self._runners.values() if runner.task is not None]
        await end(tasks)
        self._runners.clear()

    @staticmethod
    def _stop(runner: _Runner) -> None:
        if runner.task is not None:
            runner.task.cancel()

    async def _run(self, key: CheckKey, runner: _Runner) -> None:
        check = runner.check
        # Checks that start together must not stay together.
        await asyncio.sleep(random.uniform(0, min(check.interval, 0.5)))  # noqa: S311
        while True:
            reason = await run_check(check, runner.address)
            before = runner.state
            runner.state = health.step(before, not reason, check.rise, check.fall, reason)
            if runner.state.ready != before.ready:
                logger.warning(
                    "backend is ready" if runner.state.ready else "backend is not ready",
                    extra=fields(
                        service="/".join(key.service),
                        workload="/".join(key.workload),
                        reason=reason,
                        check=check.type,
                        address=f"{runner.address}:{check.port}",
                    ),
                )
                self._changed()
            await asyncio.sleep(check.interval)


def listeners(port: int, protocol: str = "TCP", proc: Path = Path("/proc/net")) -> frozenset[IPv4Address | IPv6Address]:
    """Addresses on which sockets of this host listen at `port` (proc_net_tcp(5)); `protocol` is TCP or UDP."""
    found: set[IPv4Address | IPv6Address] = set()
    for name in (protocol.lower(), f"{protocol.lower()}6"):
        try:
            lines = (proc / name).read_text().splitlines()[1:]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for line in lines:
            columns = line.split()
            address, _, number = columns[1].partition(":")
            if columns[3] == _STATES[protocol] and int(number, 16) == port:
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add(ip_address(b"".join(words)))
    return frozenset(found)


def misplaced(
    address: IPv4Address,
    listening: frozenset[IPv4Address | IPv6Address],
    others: Collection[IPv4Address] = (),
) -> tuple[str, ...]:
    """Where a daemon listens that cannot be reached at the workload's `address`; empty when it can, or when
    nothing listens at all. Who listens on an address of `others`, the host's other workloads, is one of them."""
    elsewhere = []
    for found in listening:
        plain = found.ipv4_mapped or found if isinstance(found, IPv6Address) else found
        if plain.is_unspecified or plain == address:
            return ()
        if plain not in others:
            elsewhere.append(str(plain))
    return tuple(sorted(elsewhere))
