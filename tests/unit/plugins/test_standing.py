# SPDX-License-Identifier: GPL-3.0-or-later
"""What works on a host, compared with what worked before a change of it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils.standing import ask, is_settled, standing, worse

STATUS: dict[str, Any] = {
    "etcd": {"connected": True, "error": None},
    "reports": {"error": None},
    "workloads": [
        {
            "namespace": "shop",
            "name": "web",
            "services": {"shop/web": {"ready": True, "reason": ""}, "shop/old": {"ready": False, "reason": "refused"}},
        }
    ],
}


def backend(used: bool = True, reachable: bool = True, proven: bool = True) -> dict[str, bool]:
    """As the agent tells of one: when none is reachable all are used."""
    return {"used": used, "reachable": reachable, "proven": proven}


SERVICES: dict[str, Any] = {
    "services": [
        {"namespace": "shop", "name": "web", "backends": [backend(used=False), backend()]},
        {"namespace": "shop", "name": "old", "backends": [backend(reachable=False)]},
    ]
}
AUDIT: dict[str, Any] = {"problems": ["a foreign route"]}
BEFORE = standing(STATUS, SERVICES, AUDIT)


def changed(*path: str | int, value: Any) -> list[str]:
    """What is worse when one thing is another one than before."""
    documents: Any = copy.deepcopy({"status": STATUS, "services": SERVICES, "audit": AUDIT})
    place = documents
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return worse(BEFORE, documents["status"], documents["services"], documents["audit"])


def test_what_was_wrong_before_is_not_worse() -> None:
    assert worse(BEFORE, STATUS, SERVICES, AUDIT) == []
    assert BEFORE["backends"] == ["shop/web as a backend of shop/web"]
    assert BEFORE["services"] == ["shop/web"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("status", "etcd"), {"connected": False, "error": "refused"}, "agent: it has no connection to etcd any more"),
        (("status", "reports", "error"), "no space", "agent: it cannot report any more: no space"),
        (("audit", "problems"), ["a foreign route", "a map"], "datapath: a map"),
        (
            ("status", "workloads", 0, "services", "shop/web"),
            {"ready": False, "reason": "timeout"},
            "backends: shop/web as a backend of shop/web was ready and is not any more: timeout",
        ),
        (
            ("services", "services", 0, "backends"),
            [backend(used=False), backend(reachable=False)],
            "services: shop/web had a backend that could be",
        ),
    ],
)
def test_what_works_no_more_is_told(path: tuple[str | int, ...], value: Any, words: str) -> None:
    (found,) = changed(*path, value=value)
    assert found.startswith(words)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("status", "workloads"), []),
        (("services", "services"), []),
        (("services", "services", 0, "backends"), []),
        (("audit", "problems"), []),
    ],
)
def test_what_the_inventory_took_away_is_no_finding(path: tuple[str | int, ...], value: Any) -> None:
    assert changed(*path, value=value) == []


def test_only_a_backend_that_answered_settles_it() -> None:
    def settled(*backends: dict[str, bool]) -> bool:
        return is_settled(BEFORE, {"services": [{"namespace": "shop", "name": "web", "backends": list(backends)}]})

    assert settled(backend(proven=False), backend())
    assert not settled(backend(proven=False))
    assert not settled(backend(reachable=False, proven=False))
    assert settled(), "the inventory took them away"
    assert is_settled(BEFORE, {"services": [{"namespace": "shop", "name": "old", "backends": [backend(proven=False)]}]})


def test_the_agent_is_asked_by_its_command_line() -> None:
    documents = {"status": STATUS, "services": SERVICES, "audit": AUDIT}

    def run_command(words: list[str], handle_exceptions: bool) -> tuple[int, str, str]:
        return 1, json.dumps(documents[words[1]]), ""  # `audit` ends with 1 when it finds something

    assert ask(run_command) == BEFORE
    for silent in ("no JSON", '{"error": "the agent does not answer", "kernel": {}}', "[]"):
        assert ask(lambda words, handle_exceptions, silent=silent: (2, silent, "")) is None

    def missing(words: list[str], handle_exceptions: bool) -> tuple[int, str, str]:
        raise FileNotFoundError(words[0])

    assert ask(missing) is None
