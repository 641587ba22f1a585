# SPDX-License-Identifier: GPL-3.0-or-later
"""The previous version of agent and registrar, for tests that versions N and N-1 work side by side.

Nothing was released before 1.0.0, so the previous version is a commit of this repository's own history, built as a
lower one: the first on which the whole estate worked end to end, and so the oldest that has to read what `site` writes
today. It is from before generations, the run's lock, the registrar's memory on disk, the mark for changed names and
another layout of the map `peers`. Once there are releases, COMMIT is the tag of the one before and VERSION its version.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from rootfs import cache_directory

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "50cf6e749309fdb9a477a181038f5c40de8e0852"
VERSION = "0.9.0"
"""A host keeps a newer bundle, and `site` upgrades an older one: it must be lower than the present version."""
PYTHON = "3.11"  # of the lab's machines


@functools.cache
def sources() -> Path:
    """The previous version's sources with its bundle made, in the user's cache. Skips in a clone without history."""
    place = cache_directory() / "previous-release" / f"{VERSION}-{COMMIT[:12]}-{platform.machine()}-py{PYTHON}"
    if place.exists():
        return place
    here = subprocess.run(["git", "cat-file", "-e", f"{COMMIT}^{{commit}}"], cwd=ROOT, capture_output=True, check=False)
    if here.returncode != 0:
        pytest.skip(f"no history: this clone lacks commit {COMMIT[:12]}; next: git fetch --unshallow")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        tree = Path(temporary, "tree")
        tree.mkdir()
        archive = subprocess.run(["git", "archive", COMMIT], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
        for name, pattern in (("galaxy.yml", r"^version: .*$"), ("pyproject.toml", r'^version = ".*"$')):
            line = f"version: {VERSION}" if name == "galaxy.yml" else f'version = "{VERSION}"'
            text, count = re.subn(pattern, line, (tree / name).read_text(), count=1, flags=re.MULTILINE)
            assert count == 1, f"{name} of {COMMIT[:12]} has no version"
            (tree / name).write_text(text)
        subprocess.run([sys.executable, "scripts/bundle.py", "bundle", "--python", PYTHON], cwd=tree, check=True)
        with zipfile.ZipFile(tree / "build" / "wheel" / f"isthmus-{VERSION}-py3-none-any.whl") as wheel:
            wheel.extractall(tree / "build" / "unpacked")
        if not place.exists():  # another process of the same test run may have been first
            shutil.move(tree, place)
    return place


def bundle() -> Path:
    """The archive that `isthmus.mesh.bundle` of the previous version would install."""
    return sources() / "build" / "bundle" / f"isthmus-{VERSION}-{platform.machine()}-py{PYTHON}.tar.gz"


def python_path() -> Path:
    """PYTHONPATH of the previous version's programs, as its wheel has them."""
    return sources() / "build" / "unpacked"
