# SPDX-License-Identifier: GPL-3.0-or-later
"""The Kubernetes API as the registrar needs it: paginated lists, watches and single writes of raw objects, over mutual
TLS.

Raw JSON, because the model classes of Kubernetes' own client cost more than all the rest for 10,000 pods
(docs/dependencies.md). Certificate files are read again when they were renewed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
from isthmus_mesh.ownership import MANAGER
from isthmus_mesh.spec import KubernetesApiSpec

from .objects import NAMESPACES, NODES, PODS, SERVICES, SLICES, ObjectError, ObjectKey, parse

PAGE = 500
CONNECT_TIMEOUT = 5.0
ANSWER_TIMEOUT = 20.0
"""Seconds that a page of a list, or a write, may take."""
WATCH_SECONDS = (240, 300)
"""After how many seconds the server shall end a watch, so that it goes on with present certificates elsewhere."""
SILENCE = 150.0
"""A watch without a word for so many seconds is dead: API servers send a bookmark each minute."""
MAX_EVENT = 8 * 1024 * 1024
"""Bytes of one event; an object has 1.5 MiB at most."""

PATHS = {
    NODES: "/api/v1/nodes",
    NAMESPACES: "/api/v1/namespaces",
    PODS: "/api/v1/pods",
    SERVICES: "/api/v1/services",
    SLICES: "/apis/discovery.k8s.io/v1/endpointslices",
}

MAX_REFUSAL = 65_536
"""Bytes that are read of an answer that refuses."""


class ApiError(Exception):
    """The API server did not do what it was asked for; the text says what and why. `status`: HTTP's, 0 without one."""

    def __init__(self, server: str, what: str, reason: str, status: int = 0) -> None:
        super().__init__(f"Kubernetes API {server}: {what}: {reason}")
        self.status = status


class Forbidden(ApiError):
    """RBAC does not allow `verb` on `resource`."""

    def __init__(self, server: str, verb: str, resource: str) -> None:
        reason = f"RBAC does not allow the verb {verb} on {resource}: the ClusterRole isthmus-registrar lacks it or is "
        reason += "not bound; run the site playbook, which applies it"
        super().__init__(server, f"{verb} {resource}", reason, 403)
        self.verb = verb
        self.resource = resource


class Conflict(ApiError):
    """The object is not the one that was to be changed, or there is one already."""


class Gone(ApiError):
    """The asked version is not there (any more): list again."""


@dataclass(frozen=True, slots=True)
class Page:
    """Objects of a list as it was at `version`; `more` asks for the rest, empty when this is all."""

    objects: list[Any]
    version: str
    more: str


@dataclass(frozen=True, slots=True)
class Event:
    """`type` is OPEN, ADDED, MODIFIED, DELETED or BOOKMARK; `version` is where a watch goes on after it."""

    type: str
    object: Any
    version: str


class Api:
    """One API server, asked as the holder of a client certificate or of a token. Close it at the end."""

    def __init__(self, spec: KubernetesApiSpec) -> None:
        self.server = spec.server.rstrip("/")
        self._spec = spec
        self._session: aiohttp.ClientSession | None = None
        self._context: ssl.SSLContext | None = None
        self._stamp: tuple[tuple[int, int, int], ...] = ()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def page(self, kind: str, more: str = "", limit: int = PAGE, version: str | None = None) -> Page:
        """A part of the list of all objects of `kind`. ApiError; Gone when `more` has become too old."""
        query = {"limit": str(limit)} | ({"continue": more} if more else {})
        if version is not None:
            query["resourceVersion"] = version
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT, sock_connect=CONNECT_TIMEOUT)
        try:
            async with self._get(kind, query, timeout) as response:
                await self._check(response, "list", kind)
                body = parse(await response.read())
            items, metadata = body["items"] or [], body["metadata"]
            if not isinstance(items, list):
                raise ObjectError("items is no list")
            return Page(items, str(metadata["resourceVersion"]), str(metadata.get("continue") or ""))
        except (ObjectError, KeyError, TypeError, AttributeError) as error:
            raise ApiError(self.server, f"list {kind}", f"the answer is no list: {error}") from None
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise ApiError(self.server, f"list {kind}", _words(error)) from None

    async def watch(self, kind: str, version: str) -> AsyncGenerator[Event, None]:
        """What happens to objects of `kind` after `version`, until the server ends it. First an OPEN, when the server
        has agreed. ApiError; Gone."""
        query = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*WATCH_SECONDS)),  # noqa: S311 - jitter, no secret
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE)
        try:
            async with self._get(kind, query, timeout) as response:
                await self._check(response, "watch", kind)
                yield Event("OPEN", None, version)
                async for line in _lines(response.content):
                    yield self._event(kind, parse(line))
        except (ObjectError, KeyError, TypeError, AttributeError) as error:
            raise ApiError(self.server, f"watch {kind}", f"an event cannot be read: {error}", 400) from None
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise ApiError(self.server, f"watch {kind}", _words(error)) from None

    async def create(self, kind: str, namespace: str, body: Mapping[str, Any]) -> None:
        """Make an object. Conflict when there is one of its name; ApiError."""
        await self._write("POST", "create", kind, _path(kind, namespace), body, "application/json")

    async def patch(self, kind: str, key: ObjectKey, body: Mapping[str, Any], version: str) -> None:
        """Merge `body` into an object (RFC 7396). Conflict when it is not at `version` any more; ApiError."""
        fenced = {**body, "metadata": {**body.get("metadata", {}), "resourceVersion": version}}
        await self._write("PATCH", "patch", kind, _path(kind, *key), fenced, "application/merge-patch+json")

    async def delete(self, kind: str, key: ObjectKey, version: str) -> None:
        """Delete an object. Conflict when it is not at `version` any more; ApiError."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"resourceVersion": version}}
        await self._write("DELETE", "delete", kind, _path(kind, *key), body, "application/json")

    async def _write(self, method: str, verb: str, kind: str, path: str, body: Mapping[str, Any], form: str) -> None:
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT, sock_connect=CONNECT_TIMEOUT)
        query = {} if method == "DELETE" else {"fieldManager": MANAGER}
        try:
            async with self._request(
                method, path, query, timeout, data=json.dumps(body), headers={"Content-Type": form}
            ) as response:
                await self._check(response, verb, kind)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise ApiError(self.server, f"{verb} {kind}", _words(error)) from None

    def _event(self, kind: str, body: Any) -> Event:
        found = body["object"]
        if body["type"] == "ERROR":
            status, reason = found.get("code") or 0, f"{found.get('reason')}: {found.get('message')}"
            raise (Gone if status == 410 else ApiError)(self.server, f"watch {kind}", reason[:300], int(status))
        return Event(str(body["type"]), found, str(found["metadata"]["resourceVersion"]))

    def _get(self, kind: str, query: dict[str, str], timeout: aiohttp.ClientTimeout) -> Any:
        return self._request("GET", PATHS[kind], query, timeout)

    def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        timeout: aiohttp.ClientTimeout,
        headers: Mapping[str, str] = MappingProxyType({}),
        **more: Any,
    ) -> Any:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, socket_factory=_socket)
            # Bodies are large and the server is near: compressing them costs both more than it saves.
            usual = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "isthmus-registrar"}
            self._session = aiohttp.ClientSession(connector=connector, headers=usual)
        return self._session.request(
            method,
            self.server + path,
            params=query,
            timeout=timeout,
            ssl=self._tls(),
            allow_redirects=False,
            headers={**headers, **self._proof()},
            **more,
        )

    def _tls(self) -> ssl.SSLContext:
        """A context of the present certificate files: connections of another context are not used again."""
        files = tuple(filter(None, (self._spec.ca, self._spec.cert, self._spec.key)))
        stamp = tuple((found.st_ino, found.st_mtime_ns, found.st_size) for found in map(os.stat, files))
        if self._context is None or stamp != self._stamp:
            context = ssl.create_default_context(cafile=self._spec.ca)
            if not self._spec.token:
                context.load_cert_chain(self._spec.cert, self._spec.key)
            self._context, self._stamp = context, stamp
        return self._context

    def _proof(self) -> dict[str, str]:
        """Headers that say who asks, where no client certificate does. The kubelet renews the token's file."""
        return {"Authorization": f"Bearer {Path(self._spec.token).read_text().strip()}"} if self._spec.token else {}

    async def _check(self, response: aiohttp.ClientResponse, verb: str, kind: str) -> None:
        if 200 <= response.status < 300:
            return
        said = b""
        while len(said) < MAX_REFUSAL and (part := await response.content.read(MAX_REFUSAL)):
            said += part  # what has arrived, not the whole answer
        try:
            reason = str(json.loads(said)["message"])[:300]
        except (ValueError, KeyError, TypeError):
            reason = ""
        # Admission (a quota, a namespace that is being deleted) answers with 403 too.
        if response.status == 403 and (verb in ("list", "watch") or f" cannot {verb} resource " in reason):
            raise Forbidden(self.server, verb, kind)
        if response.status == 401:
            proof = "service account's token" if self._spec.token else "client certificate"
            reason = f"it does not accept the {proof}: it has ended, or is of another cluster's authority"
        words = reason or f"HTTP status {response.status}"
        error = {409: Conflict, 410: Gone}.get(response.status, ApiError)
        raise error(self.server, f"{verb} {kind}", words, response.status)


def _path(kind: str, namespace: str, name: str = "") -> str:
    """Of an object in a namespace, or of all of them there."""
    group, _, resource = PATHS[kind].rpartition("/")
    return f"{group}/namespaces/{namespace}/{resource}" + (f"/{name}" if name else "")


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length up to `MAX_EVENT`, without what an end in the middle of one leaves."""
    rest = bytearray()
    async for chunk in content.iter_any():
        rest += chunk
        if b"\n" in chunk:
            *whole, last = rest.split(b"\n")
            rest = bytearray(last)
            for line in whole:
                if line:
                    yield bytes(line)
        if len(rest) > MAX_EVENT:
            raise ObjectError(f"is larger than {MAX_EVENT} bytes")


def _socket(info: tuple[Any, ...]) -> socket.socket:
    """One whose peer's death is noticed within half a minute although nothing is sent."""
    found = socket.socket(info[0], info[1], info[2])
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        found.setsockopt(socket.IPPROTO_TCP, option, seconds)
    return found


def _words(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    text = str(error) or type(error).__name__
    if isinstance(error, ssl.SSLError) or "CERTIFICATE" in text:
        text += "; a certificate is refused: it has ended, has not begun, or is another authority's"
    return text
