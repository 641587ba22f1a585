# SPDX-License-Identifier: GPL-3.0-or-later
"""Bundles: which version the controller offers, and that a host never gets an older one than it has."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleError
from ansible.module_utils import basic
from ansible_collections.isthmus.mesh.plugins.filter.bundle_platforms import bundle_platforms
from ansible_collections.isthmus.mesh.plugins.module_utils import bundle
from ansible_collections.isthmus.mesh.plugins.modules import bundle as module
from ansible_collections.isthmus.mesh.plugins.plugin_utils import bundles

GALAXY = Path(__file__).resolve().parents[3] / "galaxy.yml"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str, check: bool) -> Any:
    """The module's answer when the collection offers `version`."""
    offered = {"arch": platform.machine(), "python": PYTHON, "version": version, "digest": "0123456789", "archive": "a"}
    arguments = {"paths": ["/unused"], "python": sys.executable, "platforms": [offered], "_ansible_check_mode": check}
    monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode())
    monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy")
    with pytest.raises(SystemExit):
        module.main()
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of environments on a host that runs 1.1.0."""
    home = tmp_path / "1.1.0-aaaaaaaa"
    home.mkdir()
    (home / "bundle.json").write_text(json.dumps({"version": "1.1.0", "python": PYTHON, "digest": "aaaaaaaaaa"}))
    (tmp_path / "current").symlink_to(home)
    monkeypatch.setattr(bundle, "ROOT", str(tmp_path))
    monkeypatch.setattr(bundle, "CURRENT", str(tmp_path / "current"))
    monkeypatch.setattr(bundle, "COMMAND", str(tmp_path / "isthmus"))
    return tmp_path


@pytest.mark.parametrize("check", [True, False])
def test_a_host_never_gets_an_older_version(
    host: Path, check: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What an upgrade left behind, complete: the way back would be one link.
    older = host / "1.0.0-01234567"
    older.mkdir()
    (older / "bundle.json").write_text(json.dumps({"version": "1.0.0", "python": PYTHON, "digest": "0123456789"}))
    before = sorted(os.listdir(host))
    answer = run(monkeypatch, capsys, "1.0.0", check)
    assert answer["failed"]
    assert f"runs isthmus.mesh 1.1.0 ({host}/current), which is newer than 1.0.0" in answer["msg"]
    assert "Next: `ansible-galaxy collection install isthmus.mesh:==1.1.0` on the controller" in answer["msg"]
    assert (host / "current").resolve().name == "1.1.0-aaaaaaaa"
    assert sorted(os.listdir(host)) == before


@pytest.mark.parametrize("version", ["1.1.0", "1.1.1-rc.1", "1.10.0"])
def test_a_host_gets_another_bundle_of_its_version_and_a_newer_one(
    host: Path, version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, capsys, version, check=True)["changed"]
    assert run(monkeypatch, capsys, version, check=False)["needed"] == "a"
    assert (host / "current").resolve().name == "1.1.0-aaaaaaaa"


def collection(place: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    monkeypatch.setattr(bundles, "COLLECTION", str(place))
    for name, content in files.items():
        (place / name.replace("_", ".")).write_text(content)


def test_the_version_is_the_artifacts_and_in_the_sources_that_of_galaxy_yml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bundles.collection_version() == yaml.safe_load(GALAXY.read_text())["version"]
    collection(tmp_path, monkeypatch, galaxy_yml="version: 1.2.3-rc.1\n")
    assert bundles.collection_version() == "1.2.3-rc.1"
    collection(tmp_path, monkeypatch, MANIFEST_json='{"collection_info": {"version": "1.2.3"}}')
    assert bundles.collection_version() == "1.2.3"


@pytest.mark.parametrize(
    "files",
    [{}, {"MANIFEST_json": "{"}, {"MANIFEST_json": "{}"}, {"MANIFEST_json": "[]"}, {"galaxy_yml": "version: 1"}],
)
def test_a_version_that_is_not_known_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    collection(tmp_path, monkeypatch, **files)
    with pytest.raises(AnsibleError, match=r"is not known: .*Next: install it anew"):
        bundles.collection_version()


def test_a_bundle_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for directory, version in ((own, "1.1.0"), (other, "1.0.0")):
        directory.mkdir()
        offered = [{"arch": "x86_64", "python": "3.11", "archive": "a"}]
        manifest = {"schema": 1, "version": version, "platforms": offered}
        (directory / "bundle.json").write_text(json.dumps(manifest))
    collection(tmp_path, monkeypatch, galaxy_yml="version: 1.1.0\n")
    assert bundle_platforms([str(own)]) == [{"arch": "x86_64", "python": "3.11", "version": "1.1.0"}]
    with pytest.raises(AnsibleError) as caught:
        bundle_platforms([str(own), str(other)])
    words = str(caught.value)
    assert f"{other}/bundle.json is a bundle of isthmus.mesh 1.0.0, and this collection is 1.1.0. Why: " in words
    assert (
        "Next: `make bundle` in the sources of 1.1.0, or `ansible-galaxy collection install isthmus.mesh:==1" in words
    )
