# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs a module of the collection as Ansible would on a host, in a process of its own, under this Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_START = """
import runpy, sys
from ansible.module_utils import basic
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


def run_module(
    name: str, arguments: dict[str, Any], check: bool = False, bundle: bool = True, path: str | None = None
) -> dict[str, Any]:
    """The result of module ``name``. ``bundle=False``: a host without our agent; ``path`` goes before ``PATH``.

    Raises `ModuleFailed` when it fails and AssertionError with its stderr when it ends in any other way.
    """
    with tempfile.TemporaryDirectory(prefix="isthmus-module-") as directory:
        place = Path(directory, "ansible_collections", "isthmus")
        place.mkdir(parents=True)
        (place / "mesh").symlink_to(ROOT)
        search = [directory] + ([str(ROOT / "agent")] if bundle else [])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1"}
        if path is not None:
            environment["PATH"] = path + os.pathsep + environment["PATH"]
        request = {"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check, "_ansible_diff": True}}
        done = subprocess.run(
            [sys.executable, "-c", _START, name],
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


def check_apply(name: str, arguments: dict[str, Any], **how: Any) -> dict[str, Any]:
    """check -> apply -> apply -> check: the prediction holds and the second run changes nothing. Returns the first."""
    predicted = run_module(name, arguments, check=True, **how)
    applied = run_module(name, arguments, **how)
    assert predicted["changed"] == applied["changed"], f"{name}: check mode and run disagree"
    for check in (False, True):
        again = run_module(name, arguments, check=check, **how)
        assert not again["changed"], f"{name} changes something again: {again.get('diff')}"
    return applied
