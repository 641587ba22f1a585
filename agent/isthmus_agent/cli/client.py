# SPDX-License-Identifier: GPL-3.0-or-later
"""The CLI's way to the agent: HTTP/1.1 over its unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

TIMEOUT = 10.0


class AgentSilent(RuntimeError):
    """The agent does not answer; the text says why and what to do."""


class AgentAbsent(AgentSilent):
    """Nobody listens on the agent's socket: it does not run."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(str(self._path))


def ask(path: Path, route: str, method: str = "GET") -> dict[str, Any]:
    """The document of a route. AgentSilent when there is no answer or the answer is an error, AgentAbsent when the
    agent does not run."""
    connection = _Connection(path)
    try:
        connection.request(method, route)
        response = connection.getresponse()
        body = response.read()
    except PermissionError as error:
        raise AgentSilent(f"{path}: {error.strerror}; run this as root") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        absent = isinstance(error, (FileNotFoundError, ConnectionRefusedError))
        raise (AgentAbsent if absent else AgentSilent)(
            f"the agent does not answer on {path} ({reason}); look at: systemctl status isthmusd; "
            "journalctl -u isthmusd"
        ) from error
    finally:
        connection.close()
    document: dict[str, Any] = json.loads(body)
    if response.status != 200:
        raise AgentSilent(f"the agent answered {route} with {response.status}: {document.get('error', '')}")
    return document
