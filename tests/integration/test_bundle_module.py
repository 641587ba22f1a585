# SPDX-License-Identifier: GPL-3.0-or-later
"""The module `bundle` installs for real, twice at once: a controller died, and the next run came before its process on
the host had ended."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import previous_release
from integration.module_runner import run_module


def test_two_installations_at_once_make_one_whole_environment(tmp_path: Path) -> None:
    archive = previous_release.bundle()
    (offered,) = json.loads((archive.parent / "bundle.json").read_text())["platforms"]
    arguments = {
        "paths": ["/unused"],
        "python": f"/usr/bin/python{previous_release.PYTHON}",
        "platforms": [{**offered, "version": previous_release.VERSION}],
        "archive": str(archive),
    }
    root = tmp_path / "opt"
    places = {
        "bundle.ROOT": str(root),
        "bundle.CURRENT": str(root / "current"),
        "bundle.COMMAND": str(tmp_path / "isthmus"),
    }
    home = root / f"{previous_release.VERSION}-{offered['digest'][:8]}"
    packages = home / "lib" / f"python{previous_release.PYTHON}" / "site-packages"
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
    check = [str(home / "bin" / "python"), "-m", "pip", "check"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    done = subprocess.run([str(tmp_path / "isthmus"), "--help"], capture_output=True, text=True, check=False)
    assert "datapath" in done.stdout, done.stderr
    assert offered["arch"] == platform.machine()
    assert run_module("bundle", arguments, places=places)["changed"] is False
