# SPDX-License-Identifier: GPL-3.0-or-later
"""The module `bundle` installs for real, twice at once: a controller died, and the next run came before its process on
the host had ended."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from integration.module_runner import run_module
from playbook import COLLECTIONS

FILES = COLLECTIONS / "ansible_collections" / "isthmus" / "mesh" / "roles" / "bundle" / "files"
PYTHON = "3.11"  # of the lab's machines


def test_two_installations_at_once_make_one_whole_environment(tmp_path: Path) -> None:
    manifest = json.loads((FILES / "bundle.json").read_text())
    (offered,) = (
        item for item in manifest["platforms"] if (item["arch"], item["python"]) == (platform.machine(), PYTHON)
    )
    arguments = {
        "paths": ["/unused"],
        "python": f"/usr/bin/python{PYTHON}",
        "platforms": [{**offered, "version": manifest["version"]}],
        "archive": str(FILES / offered["archive"]),
    }
    root = tmp_path / "opt"
    places = {
        "bundle.ROOT": str(root),
        "bundle.CURRENT": str(root / "current"),
        "bundle.COMMAND": str(tmp_path / "isthmus"),
    }
    home = root / f"{manifest['version']}-{offered['digest'][:8]}"
    packages = home / "lib" / f"python{PYTHON}" / "site-packages"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run_module, "bundle", arguments, places=places)
        while not (packages / "cryptography").exists():  # it is in the midst of its work
            assert not first.done(), first.result()
            time.sleep(0.01)
        second = pool.submit(run_module, "bundle", arguments, places=places)
        results = [first.result(), second.result()]
    assert [result["digest"] for result in results] == [offered["digest"]] * 2
    assert sorted(os.listdir(root)) == [home.name, "current"]
    assert (root / "current").resolve() == home
    assert not (packages / "pip").exists()
    check = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "check"]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    # Compiled where it lies: nothing is left for an agent that may not write there.
    modules = {path.relative_to(packages) for path in packages.rglob("*.py")}
    compiled = {path.parent.parent / f"{path.name.split('.')[0]}.py" for path in packages.rglob("*.pyc")}
    assert {packages / path for path in modules} == compiled
    assert (tmp_path / "isthmus").read_text().startswith(f"#!/opt/isthmus/{home.name}/bin/python\n")
    command = [str(home / "bin" / "python"), str(tmp_path / "isthmus"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "datapath" in done.stdout, done.stderr
    assert run_module("bundle", arguments, places=places)["changed"] is False
