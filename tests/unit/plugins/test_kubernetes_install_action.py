# SPDX-License-Identifier: GPL-3.0-or-later
"""How far a roll-out is reaches the operator while it goes on, and what was changed is counted once for all calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ansible.plugins.action import ActionBase
from ansible_collections.isthmus.mesh.plugins.action import kubernetes_install as action


class Played(action.ActionModule):
    """Modules answer in turn; a call takes as long as the clock is moved by it."""

    def __init__(self, answers: list[dict[str, Any]], **arguments: Any) -> None:
        self._task = SimpleNamespace(args=arguments)
        self.answers, self.calls, self.now = answers, [], 0.0

    def _execute_module(self, module_name: str, module_args: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        self.calls.append(module_args)
        self.now += 15
        return self.answers[len(self.calls) - 1]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    words: list[str] = []
    monkeypatch.setattr(ActionBase, "run", lambda self, tmp, task_vars: {})
    monkeypatch.setattr(action, "Display", lambda: SimpleNamespace(display=words.append))
    return words


def run(played: Played, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(action.time, "monotonic", lambda: played.now)
    result: dict[str, Any] = played.run()
    return result


def test_progress_is_told_and_waiting_counts_until_it_gets_on(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"unfinished": words, "changed": first, "diff": []} for words, first in (("1", True), ("1", False))]
    answers += [{"unfinished": "2", "changed": False, "diff": []}, {"unfinished": "", "changed": False, "diff": []}]
    played = Played(answers, phase="run")
    assert run(played, monkeypatch)["changed"] is True
    assert said == ["  1", "  2"]
    assert [call["waited"] for call in played.calls] == [0, 0, 15, 0]


def test_a_failure_ends_it_with_what_was_changed_before(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"unfinished": "1", "changed": True, "diff": ["a"]}, {"failed": True, "msg": "why", "changed": False}]
    result = run(Played(answers), monkeypatch)
    assert (result["failed"], result["msg"], result["changed"], result["diff"]) == (True, "why", True, ["a"])


def test_nothing_is_asked_again_without_patience(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played([{"unfinished": "1", "changed": True, "diff": []}], patience=0)
    run(played, monkeypatch)
    assert (len(played.calls), said) == (1, [])
