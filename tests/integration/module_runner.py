# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs a module of the collection as Ansible would on a host, in a process of its own, under this Python."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_START = """
import importlib, json, runpy, sys
from ansible.module_utils import basic
utils = "ansible_collections.isthmus.mesh.plugins.module_utils."
for name, value in json.loads(sys.argv[2]).items():
    where, constant = name.rsplit(".", 1)
    setattr(importlib.import_module(utils + where), constant, value)
if json.loads(sys.argv[3]):  # this Python is the bundle's
    importlib.import_module(utils + "respawn").has_respawned = lambda: True
basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = sys.stdin.buffer.read(), "legacy"
module = "ansible_collections.isthmus.mesh.plugins.modules." + sys.argv[1]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class ModuleFailed(AssertionError):
    """The module answered ``failed``; ``msg`` is its message and ``result`` the whole answer."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__(result["msg"])
        self.msg = str(result["msg"])
        self.result = result


@contextlib.contextmanager
def collection(bundle: bool = True, packages: Path = ROOT / "agent") -> Iterator[dict[str, str]]:
    """An environment in which Python finds the collection and, with ``bundle``, the agent's packages."""
    with tempfile.TemporaryDirectory(prefix="isthmus-module-") as directory:
        place = Path(directory, "ansible_collections", "isthmus")
        place.mkdir(parents=True)
        (place / "mesh").symlink_to(ROOT)
        search = [directory] + ([str(packages)] if bundle else [])
        yield {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1"}


def run_module(
    name: str,
    arguments: dict[str, Any],
    check: bool = False,
    bundle: bool = True,
    places: Mapping[str, str] | None = None,
    packages: Path = ROOT / "agent",
    inside: Sequence[str] = (),
) -> dict[str, Any]:
    """The result of module ``name``. ``bundle=False``: a host without our agent; ``packages``: where they are else.
    ``places``: constants of ``module_utils`` (``estate.NODE``) that are elsewhere on the test's host. ``inside``: a
    command that runs another in the namespaces that are the test's host.

    Raises `ModuleFailed` when it fails and AssertionError with its stderr when it ends in any other way.
    """
    with collection(bundle, packages) as environment:
        request = {"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check, "_ansible_diff": True}}
        done = subprocess.run(
            [*inside, sys.executable, "-c", _START, name, json.dumps(dict(places or {})), json.dumps(bundle)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            timeout=180,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, f"{name} ended with {done.returncode}: {done.stdout}\n{done.stderr}"
    result: dict[str, Any] = json.loads(lines[0])
    if result.get("failed"):
        raise ModuleFailed(result)
    return result
