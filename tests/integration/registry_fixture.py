# SPDX-License-Identifier: GPL-3.0-or-later
"""A container registry on loopback for tests: of the Distribution API (OCI distribution specification 1.0) what a push
and a look need, over TLS, with a user and a password."""

from __future__ import annotations

import base64
import hashlib
import re
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from integration.etcd_fixture import Ca

USER, PASSWORD = "pusher", "a secret of the registry"


class Registry:
    """A context manager. `name`: host:port; `certificates`: a directory with ca.crt."""

    def __init__(self, directory: Path) -> None:
        authority = Ca(directory / "pki", "registry")
        crt, key = authority.issue("registry")
        self.certificates = directory / "certificates"
        self.certificates.mkdir()
        (self.certificates / "ca.crt").write_bytes(authority.crt.read_bytes())
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}  # by tag and by digest: type, content
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"registry": self}))
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(crt, key)
        self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.name = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Registry:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    registry: Registry
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: pytest's output is not for it."""

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _serve(self) -> None:
        registry, body = self.registry, self._body()
        path, _mark, query = self.path.partition("?")
        registry.requests.append(f"{self.command} {path}")
        known = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {known}":
            self._answer(401, b'{"errors":[{"code":"UNAUTHORIZED"}]}', WWW_Authenticate='Basic realm="test"')
        elif path == "/v2/":
            self._answer(200)
        elif self.command == "POST":
            self._answer(202, Location=f"{path}1", Range="0-0")
        elif self.command == "PATCH":
            registry.blobs[path] = registry.blobs.get(path, b"") + body
            self._answer(202, Location=path, Range=f"0-{len(registry.blobs[path]) - 1}")
        elif self.command == "PUT" and "/blobs/" in path:
            content = registry.blobs.pop(path, b"") + body
            registry.blobs[f"sha256:{hashlib.sha256(content).hexdigest()}"] = content
            self._answer(201, Location=query)
        elif self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            for name in (path.rsplit("/", 1)[1], digest):
                registry.manifests[name] = (self.headers["Content-Type"], body)
            self._answer(201, Docker_Content_Digest=digest)
        elif match := re.search(r"/manifests/(.+)$", path):
            self._manifest(match.group(1))
        else:
            content = registry.blobs.get(path.rsplit("/", 1)[1])
            self._answer(404) if content is None else self._answer(200, content)

    def _manifest(self, name: str) -> None:
        if name not in self.registry.manifests:
            self._answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
            return
        kind, content = self.registry.manifests[name]
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self._answer(200, content, Content_Type=kind, Docker_Content_Digest=digest)

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = _serve
