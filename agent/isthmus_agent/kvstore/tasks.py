# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting and ending that survive a race of `asyncio.wait_for` before Python 3.12: it swallows a cancellation that
arrives together with the result, and whoever cancelled waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def within(coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
    """The coroutine's result; asyncio.TimeoutError after `seconds`."""
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()


async def wait_set(event: asyncio.Event, seconds: float) -> bool:
    """Wait up to `seconds` until `event` is set; whether it is."""
    try:
        await within(event.wait(), seconds)
    except asyncio.TimeoutError:
        return event.is_set()
    return True


async def end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel all and wait until they have ended; what they raise is dropped."""
    everything = list(tasks)
    pending = {task for task in everything if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)
    for task in everything:
        if not task.cancelled():
            task.exception()
