# SPDX-License-Identifier: GPL-3.0-or-later
"""What the operator is told of a way back on which something failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ansible.plugins.action import ActionBase
from ansible_collections.isthmus.mesh.plugins.action import node as action
from isthmus_mesh.generations import ROLLED_BACK, WAITING, noted

FULL = "/etc/isthmus/node.json: No space left on device"


class Played(action.ActionModule):
    """The module makes a generation, and then tells what became of it; a call takes 10 s."""

    def __init__(self, state: str, note: str) -> None:
        self._task = SimpleNamespace(args={}, check_mode=False)
        self.made = {"number": 2, "previous": 1, "state": state, "note": note}
        self.calls = 0

    def _new_connection(self) -> None:
        pass

    def _execute_module(self, module_name: str, module_args: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        self.calls += 1
        return {"made": self.made, "problem": "no answer"} if "confirm" in module_args else {"generation": 2}


def told(played: Played, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ActionBase, "run", lambda self, tmp, task_vars: {})
    monkeypatch.setattr(action.time, "monotonic", lambda: 10.0 * played.calls)
    monkeypatch.setattr(action.time, "sleep", lambda seconds: None)
    result = played.run(task_vars={"inventory_hostname": "a1"})
    assert (result["failed"], "generation" in result) == (True, False)
    return str(result["msg"])


def test_what_could_not_be_restored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    words = told(Played(WAITING, noted("generation 1 could not be restored", [FULL, "another"])), monkeypatch)
    assert words.startswith("a1 could not take its change back: generation 2 was not confirmed, and generation 1 could")
    assert f"What failed: {FULL}; another. The host tries it again every 60 s, and at a boot. Next: " in words


def test_what_failed_when_the_files_were_back_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    words = told(Played(ROLLED_BACK, noted("nobody came", ["systemctl restart isthmusd.service: no"])), monkeypatch)
    assert "1 is restored, but on the way this failed: systemctl restart isthmusd.service: no. Why: it was not" in words
    words = told(Played(ROLLED_BACK, "nobody came"), monkeypatch)
    assert "1 is restored. Why: it was not confirmed over a new connection within 60 s: no answer. Other" in words


def test_one_that_only_waits_is_taken_back_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    words = told(Played(WAITING, ""), monkeypatch)
    assert words.startswith("a1 could not be asked whether its change stays, for 120 s: no answer.")
