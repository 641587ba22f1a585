# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the modules for VPCs in this process, and serves what stands for a provider on the loopback."""

from __future__ import annotations

import contextlib
import importlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

from ansible.module_utils import basic
from module_runner import ModuleFailed


class _Ended(BaseException):
    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__()
        self.result = result


def run(name: str, arguments: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """The result of module ``name`` with these options; raises `ModuleFailed` when it fails."""
    module = importlib.import_module(f"ansible_collections.isthmus.mesh.plugins.modules.{name}")
    warnings: list[str] = []

    def exit_json(_self: Any, **result: Any) -> None:
        raise _Ended({"warnings": warnings, **result})

    def fail_json(_self: Any, msg: str, **result: Any) -> None:
        raise _Ended({"failed": True, "msg": msg, "warnings": warnings, "changed": False, **result})

    request = {"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check, "_ansible_diff": True}}
    with (
        mock.patch.object(basic, "_ANSIBLE_ARGS", json.dumps(request).encode()),
        mock.patch.object(basic, "_ANSIBLE_PROFILE", "legacy"),
        mock.patch.object(basic.AnsibleModule, "exit_json", exit_json),
        mock.patch.object(basic.AnsibleModule, "fail_json", fail_json),
        mock.patch.object(basic.AnsibleModule, "warn", lambda _self, text: warnings.append(text)),
    ):
        try:
            module.main()
        except _Ended as end:
            if end.result.get("failed"):
                raise ModuleFailed(end.result) from None
            return end.result
    raise AssertionError(f"{name} ended without a result")


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """A server on a free port of the loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
