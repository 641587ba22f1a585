# SPDX-License-Identifier: GPL-3.0-or-later
"""What the API client makes of bytes; that it gets on with a real server is tested in tests/integration."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from isthmus_agent.registrar.kubernetes import client
from isthmus_agent.registrar.kubernetes.client import Api, ApiError, Event, Gone
from isthmus_agent.registrar.kubernetes.objects import ObjectError, parse
from isthmus_mesh.spec import KubernetesApiSpec


class Content:
    """A body that comes in these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


def lines(*pieces: bytes) -> list[bytes]:
    async def read() -> list[bytes]:
        return [line async for line in client._lines(Content(*pieces))]  # type: ignore[arg-type]

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        ((), []),
        ((b'{"a":1}\n{"b":2}\n',), [b'{"a":1}', b'{"b":2}']),
        ((b'{"a"', b":1}\n", b'{"b":2}', b"\n"), [b'{"a":1}', b'{"b":2}']),
        ((b'{"a":1}\n{"b"',), [b'{"a":1}']),
        ((b"\n\n",), []),
        ((b"x" * 300_000, b"x" * 300_000 + b"\n"), [b"x" * 600_000]),
    ],
)
def test_lines_however_they_come(pieces: tuple[bytes, ...], found: list[bytes]) -> None:
    assert lines(*pieces) == found


def test_a_line_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_EVENT", 1000)
    with pytest.raises(ObjectError, match="larger than 1000 bytes"):
        lines(*[b"x" * 100] * 11)


def test_text_that_nobody_could_write_again_is_not_taken_as_it_is() -> None:
    assert parse(b'{"a":"\\ud800"}') == {"a": "?"}
    assert parse(b'{"a":"\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}
    for data in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(ObjectError):
            parse(data)


def event(body: Any) -> Event:
    return Api(KubernetesApiSpec("https://127.0.0.1:6443/", "ca", "cert", "key"))._event("pods", body)


def test_events() -> None:
    pod = {"metadata": {"name": "web", "resourceVersion": "7"}}
    assert event({"type": "ADDED", "object": pod}) == Event("ADDED", pod, "7")
    at = {"kind": "Pod", "metadata": {"resourceVersion": "9", "creationTimestamp": None}}
    assert event({"type": "BOOKMARK", "object": at}).version == "9", "a watch goes on from there"
    gone = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old"}}
    with pytest.raises(Gone, match=r"https://127\.0\.0\.1:6443: watch pods: Expired: too old"):
        event(gone)
    with pytest.raises(ApiError) as caught:
        event({"type": "ERROR", "object": {"code": 504, "reason": "Timeout", "message": "Too large resource version"}})
    assert (caught.value.status, type(caught.value)) == (504, ApiError)


@pytest.mark.parametrize("missing", ["ca", "cert", "key"])
def test_files_that_lack_are_an_answer_that_did_not_come(tmp_path: Any, missing: str) -> None:
    async def ask() -> None:
        files = {name: str(tmp_path / name) for name in ("ca", "cert", "key")}
        for name in files.keys() - {missing}:
            (tmp_path / name).write_text(json.dumps({}))
        api = Api(KubernetesApiSpec("https://127.0.0.1:1", **files))
        try:
            await api.page("pods")
        finally:
            await api.close()

    with pytest.raises(ApiError, match=rf"list pods: .*No such file.*{missing}"):
        asyncio.run(ask())
