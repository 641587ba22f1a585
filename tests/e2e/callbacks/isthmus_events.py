# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes what a run of a playbook does, as it does it, a JSON object a line, into the file $ISTHMUS_EVENTS."""

from __future__ import annotations

import json
import os

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: isthmus_events
type: notification
short_description: a run's events as JSON lines
description: For tests that compare runs or act while one is on.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "isthmus_events"

    def __init__(self) -> None:
        super().__init__()
        self._file = open(os.environ["ISTHMUS_EVENTS"], "a", buffering=1)  # noqa: SIM115

    def _write(self, kind: str, **content: object) -> None:
        self._file.write(json.dumps({"event": kind, **content}) + "\n")

    def _result(self, kind: str, result) -> None:
        found = result._result
        if "results" in found and kind == "result":
            return  # a loop: its items were told one by one
        where = (found.get("_ansible_delegated_vars") or {}).get("ansible_delegated_host")
        self._write(
            kind,
            host=where or result._host.get_name(),
            action=result._task.action,
            task=result._task.get_name(),
            item=str(found.get("_ansible_item_label") or ""),
            changed=bool(found.get("changed")),
            diffs=[one.get("before_header", "") for one in _list(found.get("diff")) if isinstance(one, dict)],
        )

    def v2_playbook_on_task_start(self, task, is_conditional) -> None:
        self._write("task", action=task.action, task=task.get_name())

    def v2_runner_on_ok(self, result) -> None:
        self._result("result", result)

    def v2_runner_item_on_ok(self, result) -> None:
        self._result("item", result)

    def v2_runner_on_failed(self, result, ignore_errors=False) -> None:
        self._result("failed", result)


def _list(found):
    return found if isinstance(found, list) else [found] if found else []
