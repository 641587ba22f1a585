# SPDX-License-Identifier: GPL-3.0-or-later
"""How often what fails is tried again, and from when on it is told; that it gets on with a real server is tested in
tests/integration."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from isthmus_agent.registrar.kubernetes import sink as module
from isthmus_agent.registrar.kubernetes.catalog import Catalog
from isthmus_agent.registrar.kubernetes.client import ApiError, Conflict, Forbidden
from isthmus_agent.registrar.kubernetes.objects import KINDS, NAMESPACES
from isthmus_agent.registrar.kubernetes.sink import Sink
from isthmus_agent.registrar.kubernetes.wanted import Mesh
from isthmus_mesh.documents import ServiceDefinition, ServicePort
from isthmus_mesh.spec import KubernetesApiSpec
from kubernetes_objects import namespace

NAMES = ("web", "db")
MESH = Mesh(
    {
        ("shop", name): ServiceDefinition(
            name, "shop", (ServicePort("http", 80, 80),), {"app": name}, is_global=True, kubernetes=True
        )
        for name in NAMES
    },
    {},
    {},
    frozenset(),
)


class Server:
    """An API that answers every write with the same error, or takes it. `tried`: when, of which object."""

    def __init__(self, error: ApiError | None) -> None:
        self.error = error
        self.now = 0.0
        self.tried: list[tuple[float, str]] = []

    async def create(self, _: str, __: str, body: Any) -> None:
        self.tried.append((self.now, body["metadata"]["name"]))
        if self.error is not None:
            raise self.error


def tried(error: ApiError | None, seconds: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Sink, list[float]]:
    """The server and the sink after a look each half a second; when there were problems to be told."""
    monkeypatch.setattr(module, "PACE", 0.0)
    catalog = Catalog("kube", "lab")
    for kind in KINDS:
        found = [catalog.put(kind, namespace("shop"))] if kind == NAMESPACES else []
        catalog.retain(kind, [key for key in found if key is not None])
    server = Server(error)
    spec = KubernetesApiSpec("https://127.0.0.1:1", "ca", "crt", "key")
    sink = Sink(spec, "lab", "kube", catalog, asyncio.Event(), clock=lambda: server.now)
    sink._api = server  # type: ignore[assignment]

    async def prove() -> None:
        """It leads."""

    told = []
    for step in range(2 * seconds):
        server.now = step / 2
        asyncio.run(sink._pass(MESH, prove))
        if sink.problems:
            told.append(server.now)
    return server, sink, told


def test_a_server_that_is_away_is_asked_for_one_thing_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    server, sink, told = tried(ApiError("s", "create services", "no answer"), 60, monkeypatch)
    assert [when for when, _ in server.tried[:5]] == [0.0, 0.5, 1.5, 3.5, 7.5]
    assert 12 <= len(server.tried) <= 16
    assert told == []  # the source tells of that
    assert sink.unwritable == {"shop/web", "shop/db"}
    server.error = None
    server.now += 10
    asyncio.run(sink._pass(MESH, _leads))
    assert sink.writes == 2
    assert sink.unwritable == frozenset()


async def _leads() -> None:
    """It leads."""


def test_a_right_that_lacks_is_asked_for_by_one_object_and_told_when_the_server_cannot_just_have_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, sink, told = tried(Forbidden("s", "create", "services"), 120, monkeypatch)
    assert len(server.tried) <= 10
    assert 3.0 <= told[0] <= 4.0
    assert [key for key, _ in sink.problems] == ["kubernetes services"]
    assert "RBAC does not allow the verb create on services" in sink.problems[0][1]


@pytest.mark.parametrize(
    ("error", "first"),
    [(ApiError("s", "create services", "invalid", 422), 0.0), (Conflict("s", "create services", "there", 409), 3.5)],
)
def test_an_object_that_is_refused_is_told_by_its_name(
    error: ApiError, first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, sink, told = tried(error, 120, monkeypatch)
    assert told[0] == first
    assert [key for key, _ in sink.problems] == ["kubernetes services shop/db", "kubernetes services shop/web"]
    assert len(server.tried) <= 20


def test_what_was_written_is_not_written_again_before_the_watch_had_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    server, _, _ = tried(None, 5, monkeypatch)
    assert sorted(name for _, name in server.tried) == ["db", "web"]
    again, _, _ = tried(None, 6, monkeypatch)
    assert len(again.tried) == 4
