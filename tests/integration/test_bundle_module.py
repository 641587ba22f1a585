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
from typing import Any

import pytest
from integration.module_runner import run_module
from playbook import COLLECTIONS

FILES = COLLECTIONS / "ansible_collections" / "isthmus" / "mesh" / "roles" / "bundle" / "files"
PYTHON = "3.11"  # of the lab's machines


class Host:
    """A host on which the module has the place of environments, and the collection's bundle for it."""

    def __init__(self, place: Path) -> None:
        manifest = json.loads((FILES / "bundle.json").read_text())
        (self.offered,) = (
            item for item in manifest["platforms"] if (item["arch"], item["python"]) == (platform.machine(), PYTHON)
        )
        self.offered["version"] = manifest["version"]
        self.root, self.command = place / "opt", place / "isthmus"
        self.home = self.root / f"{manifest['version']}-{self.offered['digest'][:8]}"

    def run(self, archive: bool = True, check: bool = False) -> dict[str, Any]:
        """The module's answer; without ``archive`` it asks whether it needs one."""
        arguments = {
            "paths": ["/unused"],
            "python": f"/usr/bin/python{PYTHON}",
            "platforms": [self.offered],
            "archive": str(FILES / self.offered["archive"]) if archive else None,
        }
        places = {
            "bundle.ROOT": str(self.root),
            "bundle.CURRENT": str(self.root / "current"),
            "bundle.COMMAND": str(self.command),
        }
        return run_module("bundle", arguments, check, places=places)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_two_installations_at_once_make_one_whole_environment(host: Host) -> None:
    root, home = host.root, host.home
    packages = home / "lib" / f"python{PYTHON}" / "site-packages"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(host.run)
        while not (Path(f"{home}.new") / packages.relative_to(home) / "cryptography").exists():  # in the midst of work
            assert not first.done(), first.result()
            time.sleep(0.01)
        second = pool.submit(host.run)
        results = [first.result(), second.result()]
    assert [result["digest"] for result in results] == [host.offered["digest"]] * 2
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
    assert host.command.read_text().startswith(f"#!/opt/isthmus/{home.name}/bin/python\n")
    command = [str(home / "bin" / "python"), str(host.command), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "datapath" in done.stdout, done.stderr
    assert host.run()["changed"] is False
    assert str(home) + ".new" not in "".join(path.read_text(errors="ignore") for path in (home / "bin").iterdir())


def test_what_is_damaged_is_made_anew_and_the_environment_before_it_stays(host: Host) -> None:
    host.run()
    older = host.root / "0.9.0-aaaaaaaa"
    older.mkdir()
    packages = host.home / "lib" / f"python{PYTHON}" / "site-packages"
    library = host.home / "lib" / "libbpf.so.1"
    whole = library.read_bytes()
    places = (
        packages / "isthmus_mesh" / "keys.py",
        next((packages / "grpc").rglob("*.pyc")),
        host.home / "bin" / "python",
        host.home / "files.json",
        host.home / "bundle.json",
    )
    for place in places:
        place.rename(f"{place}.away")
        answer = host.run(check=True)
        assert answer["changed"]
        assert f"{place.relative_to(host.home)} is missing" in answer["diff"][0]["before"]
        Path(f"{place}.away").rename(place)
    assert host.run(archive=False)["changed"] is False
    library.write_bytes(whole[:-1] + b"?")
    assert "lib/libbpf.so.1 is not as it was installed" in host.run(check=True)["diff"][0]["before"]
    places[0].unlink()
    assert host.run(archive=False)["needed"] == host.offered["archive"]
    assert not places[0].exists()
    assert host.run()["changed"]
    assert library.read_bytes() == whole
    assert sorted(os.listdir(host.root)) == sorted([older.name, host.home.name, "current"])
    assert host.run(archive=False)["changed"] is False
