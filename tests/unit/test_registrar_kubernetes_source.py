# SPDX-License-Identifier: GPL-3.0-or-later
"""How a source goes on after a watch; that it follows a real server is tested in tests/integration."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from isthmus_agent.registrar.kubernetes import client, source
from isthmus_agent.registrar.kubernetes.client import Api, Event, Page
from isthmus_agent.registrar.kubernetes.objects import KINDS
from isthmus_agent.registrar.kubernetes.source import Source
from isthmus_mesh.spec import KubernetesApiSpec

SPEC = KubernetesApiSpec("https://127.0.0.1:6443", "ca", "cert", "key")


class Proxied(Api):
    """An API server without objects: each watch opens, gives `events` and ends, or stands while `stands`."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.watches: Counter[str] = Counter()
        self.events: tuple[Event, ...] = ()
        self.stands = False

    async def page(self, kind: str, more: str = "", limit: int = client.PAGE, version: str | None = None) -> Page:
        return Page([], "7", "")

    async def watch(self, kind: str, version: str) -> AsyncGenerator[Event, None]:
        self.watches[kind] += 1
        yield Event("OPEN", None, version)
        await asyncio.sleep(0.001)
        for event in self.events:
            yield event
        while self.stands:
            await asyncio.sleep(0.01)


def followed(check: Callable[[Source, Proxied], Any]) -> None:
    """Run `check` while a source follows a server."""

    async def run() -> None:
        found = Source(SPEC, "lab", "kube", asyncio.Event(), wall=lambda: "")
        found._api = api = Proxied()
        task = asyncio.create_task(found.run())
        try:
            await check(found, api)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():
            await asyncio.sleep(0.01)


def test_watches_that_end_at_once_are_asked_for_ever_more_rarely_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "AT_ONCE", 10.0)

    async def check(found: Source, api: Proxied) -> None:
        states: set[str] = set()
        await until(lambda: found.status().state == "absent")
        for _ in range(50):
            await asyncio.sleep(0.01)
            states.add(found.status().state)
        assert states == {"absent"}
        assert "ended at once" in str(found.status().error)
        assert set(api.watches) == set(KINDS)
        assert max(api.watches.values()) <= 6, "without waiting it would be hundreds"
        monkeypatch.setattr(source, "AT_ONCE", 0.1)
        api.stands = True
        await until(lambda: found.status().state == "connected")

    followed(check)


def test_watches_that_end_after_they_told_something_go_on() -> None:
    async def check(found: Source, api: Proxied) -> None:
        api.events = (Event("BOOKMARK", {}, "8"),)
        await until(lambda: min(api.watches[kind] for kind in KINDS) > 20)
        assert found.status().state == "connected"

    followed(check)
