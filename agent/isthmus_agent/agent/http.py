# SPDX-License-Identifier: GPL-3.0-or-later
"""A very small HTTP/1.1 server for local status and metrics: GET and POST without bodies, one request a connection."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from isthmus_agent.agent.log import fields

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT = 10.0


class Response:
    """Status, content type and body."""

    def __init__(self, body: bytes, content_type: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.body = body
        self.content_type = content_type
        self.status = status

    @classmethod
    def json(cls, document: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
        return cls(json.dumps(document, default=str).encode() + b"\n", "application/json", status)


Handler = Callable[[], Awaitable[Response]]


class LocalServer:
    """Serves fixed routes, `"GET /v1/status"` -> handler, on a unix socket or a loopback port."""

    def __init__(self, routes: dict[str, Handler]) -> None:
        self._routes = routes
        self._server: asyncio.Server | None = None

    async def listen_unix(self, path: Path, mode: int = 0o600) -> None:
        """Listen on a socket file of this mode; a stale one of an earlier process is replaced."""
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        before = os.umask(0o777 & ~mode)
        try:
            self._server = await asyncio.start_unix_server(self._serve, path=str(path), limit=8192)
        finally:
            os.umask(before)

    async def listen_tcp(self, host: str, port: int) -> None:
        self._server = await asyncio.start_server(self._serve, host, port, limit=8192)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            response = await asyncio.wait_for(self._answer(reader), REQUEST_TIMEOUT)
            head = (
                f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
                f"Content-Type: {response.content_type}\r\nContent-Length: {len(response.body)}\r\n"
                "Connection: close\r\n\r\n"
            )
            writer.write(head.encode() + response.body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.TimeoutError) as error:
            logger.debug("status request ended early", extra=fields(error=repr(error)))
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> Response:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, _, rest = head.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        handler = self._routes.get(f"{method} {path}")
        if handler is None:
            known = sorted(self._routes)
            return Response.json({"error": f"no route {method} {path}", "routes": known}, HTTPStatus.NOT_FOUND)
        try:
            return await handler()
        except Exception as error:
            # A status page that fails must say so and must not take the agent down.
            logger.exception("status handler failed", extra=fields(path=path))
            return Response.json({"error": f"{type(error).__name__}: {error}"}, HTTPStatus.INTERNAL_SERVER_ERROR)
