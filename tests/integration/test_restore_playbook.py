# SPDX-License-Identifier: GPL-3.0-or-later
"""What comes before the etcd of a restore: which backup is taken, what is refused before anything is changed, and how
the authority's key comes back. How etcd begins from the snapshot is in test_etcd_members.py."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.plugin_utils import backups
from integration.module_runner import ModuleFailed, run_module
from isthmus_agent import pki, revocation
from isthmus_agent.backup import seal

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_systemctl.py")
ESTATE = {"name": "e", "clusters": {"cloud": {}, "onprem": {}, "gone": {"state": "absent"}}}

pytestmark = [pytest.mark.root]

# The one part of the playbook that needs neither a plan nor a machine.
AUTHORITY = """\
- hosts: all
  gather_facts: false
  tasks:
    - isthmus.mesh.restore: {part: look, cluster: onprem, path: "{{ path }}", key: "{{ key }}", authority: true,
                             known_ca: "{{ known }}", directory: "{{ directory }}"}
      register: looked
    - isthmus.mesh.restore: {part: authority, cluster: onprem, path: "{{ path }}", key: "{{ key }}",
                             known_ca: "{{ known }}", directory: "{{ directory }}"}
      when: looked.authority_lost
"""


def openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


class Site:
    """A controller with backups of one cluster, an operator with a pair of keys, and a host without its authority."""

    def __init__(self, place: Path) -> None:
        self.place, self.kept, self.directory = place, place / "backups", place / "host" / "etc" / "isthmus" / "pki"
        collections = place / "collections" / "ansible_collections" / "isthmus"
        collections.mkdir(parents=True)
        (collections / "mesh").symlink_to(ROOT)
        self.private, self.public = place / "operator.key", place / "operator.pem"
        openssl("genrsa", "-out", self.private, "2048")
        openssl("rsa", "-in", self.private, "-pubout", "-out", self.public)
        self.now = datetime.datetime.now(datetime.timezone.utc)
        self.key, self.certificate = pki.new_authority("onprem", self.now)
        signed = revocation.Issued("5f", "root", "o3", "root", f"{self.now + pki.LIFETIME:%Y-%m-%dT%H:%M:%SZ}")
        self.ledger = revocation.Ledger(None, (signed,))
        (place / "host" / "units").mkdir(parents=True)
        (place / "bin").mkdir()
        (place / "bin" / "systemctl").write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        (place / "bin" / "systemctl").chmod(0o755)
        (place / "authority.yml").write_text(AUTHORITY)
        self.environment = {
            "PATH": f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(place / "home"),
            "LANG": "C.UTF-8",
            "ISTHMUS_TEST_HOST": str(place / "host"),
            "ANSIBLE_COLLECTIONS_PATH": str(place / "collections"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOG_PATH": str(place / "log"),
        }

    def keep(self, time: str, estate: str = "e", cluster: str = "onprem", authority: bool = True) -> Path:
        """A backup as isthmus.mesh.backup leaves it."""
        place = self.kept / "onprem" / time
        place.mkdir(parents=True)
        content = b"snapshot of " + time.encode()
        files = {"snapshot.db": content + hashlib.sha256(content).digest(), "estate.json": b'{"roster": {}}'}
        if authority:
            files |= {"ca.crt": self.certificate, "ca.key.cms": seal(self.key, self.public.read_bytes())}
            files["issued.json"] = self.ledger.text(self.now).encode()
        for name, text in files.items():
            (place / name).write_bytes(text)
        manifest = {
            "schema": 1, "cluster": cluster, "estate": estate, "time": time, "etcd": {"revision": 7},
            "files": {name: {"sha256": hashlib.sha256(text).hexdigest()} for name, text in files.items()},
        }  # fmt: skip
        backups.write_manifest(str(place), manifest)
        return place

    def play(self, playbook: str, *options: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, "isthmus_estate": ESTATE}
        (self.place / "hosts.yml").write_text(json.dumps({"all": {"hosts": {"o1": host}}}))
        command = ["ansible-playbook", "-i", str(self.place / "hosts.yml"), playbook, "-e", json.dumps(variables)]
        return subprocess.run(
            [*command, *options],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd="/",
        )

    def authority(self, where: Path, *options: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        usual = {"key": str(self.private), "known": self.certificate.decode(), "directory": str(self.directory)}
        return self.play(str(self.place / "authority.yml"), *options, **{**usual, "path": str(where), **variables})

    def on_host(self, **arguments: Any) -> dict[str, Any]:
        """A part of the module on a host that is a directory."""
        before = dict(os.environ)
        os.environ.update(PATH=self.environment["PATH"], ISTHMUS_TEST_HOST=str(self.place / "host"))
        places = {"DATA": "lib/isthmus/etcd", "SNAPSHOTS": "lib/isthmus/snapshots"}
        constants = {f"etcd_unit.{name}": str(self.place / "host" / path) for name, path in places.items()}
        try:
            check = arguments.pop("check", False)
            return run_module("restore", {"cluster": "onprem", **arguments}, check=check, places=constants)
        finally:
            os.environ.clear()
            os.environ.update(before)


def said(done: subprocess.CompletedProcess[str]) -> str:
    return re.sub(r"\s+", " ", done.stdout + done.stderr)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_newest_backup_that_is_complete_is_taken_and_one_that_is_not_whole_is_refused(site: Site) -> None:
    directory = str(site.kept)
    with pytest.raises(backups.RefusedError, match=r"cannot be read: No such file.* Nothing was changed .*Next: "):
        backups.choose(directory, "onprem", "")
    older, newer = site.keep("20260101T000000Z"), site.keep("20260102T000000Z")
    (site.kept / "onprem" / ".making-x").mkdir()
    (site.kept / "onprem" / "20260103T000000Z").mkdir()  # no manifest: somebody copied a part of it
    assert backups.choose(directory, "onprem", "") == str(newer)
    assert backups.choose(directory, "onprem", "20260101T000000Z") == str(older)
    with pytest.raises(backups.RefusedError, match=r"no complete backup 2025.*choose one of 20260101T.*, 20260102T"):
        backups.choose(directory, "onprem", "2025")

    assert backups.whole(str(newer), "onprem", "e")["etcd"]["revision"] == 7
    for name in ("snapshot.db", "estate.json", "ca.key.cms"):
        good = (newer / name).read_bytes()
        (newer / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(backups.RefusedError, match=rf"^{re.escape(name)} of the backup .* is damaged: .*Next: "):
            backups.whole(str(newer), "onprem", "e")
        (newer / name).unlink()
        with pytest.raises(backups.RefusedError, match=rf"^{re.escape(name)} of the backup .* cannot be read"):
            backups.whole(str(newer), "onprem", "e")
        (newer / name).write_bytes(good)
    for manifest in (b"{", b"[]", b'{"schema": 2}', b'{"schema": 1, "cluster": "onprem"}'):
        (older / "manifest.json").write_bytes(manifest)
        with pytest.raises(backups.RefusedError, match=r"has no usable manifest.json: .*Nothing was changed"):
            backups.whole(str(older), "onprem", "e")
    manifest = json.loads((newer / "manifest.json").read_text())
    manifest["files"]["../x"] = manifest["files"]["snapshot.db"]
    (newer / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(backups.RefusedError, match=r"has no \.\./x in its manifest"):
        backups.whole(str(newer), "onprem", "e")


def test_the_playbook_refuses_before_it_looks_at_any_host(site: Site) -> None:
    usual = {"isthmus_restore": "onprem", "isthmus_backup_dir": str(site.kept)}
    place = site.keep("20260101T000000Z", estate="another")
    site.keep("20260102T000000Z", cluster="cloud")
    site.keep("20260103T000000Z")
    (site.kept / "onprem" / "20260103T000000Z" / "snapshot.db").write_bytes(b"")
    wrong: dict[str, dict[str, Any]] = {
        "isthmus_restore: it is not given": {"isthmus_restore": ""},
        "isthmus_restore: gone: which cluster": {"isthmus_restore": "gone"},
        "isthmus_backup_dir is not given": {"isthmus_backup_dir": ""},
        "isthmus_restore_only: ca: nothing but authority": {"isthmus_restore_only": "ca"},
        f"The backup {place} on the controller is of cluster onprem of estate another, not": {
            "isthmus_restore_from": "20260101T000000Z"
        },
        "is of cluster cloud of estate e, not of cluster onprem": {"isthmus_restore_from": "20260102T000000Z"},
        "snapshot.db of the backup": {},
    }
    for words, variables in wrong.items():
        done = site.play("isthmus.mesh.restore", **{**usual, **variables})
        assert done.returncode == 2, done.stdout + done.stderr
        assert words in said(done)
        assert "Nothing was changed on any host." in said(done)
        assert "Next: " in said(done)
        assert done.stdout.count("TASK [") == 2, "of the controller, no host was entered"


def test_the_key_comes_back_into_its_file_and_nowhere_else(site: Site) -> None:
    path = site.keep("20260101T000000Z")
    predicted = site.authority(path, "--check", "--diff")
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    assert "put back from the backup" in predicted.stdout
    assert not site.directory.exists()

    done = site.authority(path, "-vvvv", "--diff")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert (site.directory / "ca.key").read_bytes() == site.key
    assert (site.directory / "ca.crt").read_bytes() == site.certificate
    assert sorted(file.name for file in site.directory.iterdir()) == ["ca.crt", "ca.key", "issued.json"]
    assert stat.S_IMODE((site.directory / "ca.key").stat().st_mode) == 0o600
    assert {stat.S_IMODE(one.stat().st_mode) for one in (site.directory, site.directory.parent)} == {0o755}

    # What was signed after the backup is not in it, and nobody knows what that was.
    ledger = revocation.Ledger.read((site.directory / "issued.json").read_bytes(), "here", site.now)
    assert ledger.issued == site.ledger.issued
    assert ledger.lacks(site.now) is not None

    secret = site.key.decode().splitlines()[1:3]
    everything = done.stdout + done.stderr + predicted.stdout + (site.place / "log").read_text()
    for file in site.place.rglob("*"):
        if file.is_file() and file != site.directory / "ca.key" and not file.is_relative_to(site.place / "collections"):
            everything += file.read_text(errors="replace")
    assert "put back from the backup" in everything
    assert [line for line in secret if line in everything] == []

    for torn in (b"", site.key[: len(site.key) // 2]):
        (site.directory / "ca.key").write_bytes(torn)
        refused = site.authority(path, key="")
        assert "isthmus_restore_key is not given" in said(refused)
        assert site.authority(path).returncode == 0
        assert (site.directory / "ca.key").read_bytes() == site.key

    again = site.authority(path, key=str(site.place / "not needed any more"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "changed=0" in again.stdout


def test_a_key_with_a_passphrase_is_opened_by_the_runs_environment(site: Site) -> None:
    path, sealed = site.keep("20260101T000000Z"), site.place / "sealed.key"
    openssl("rsa", "-aes256", "-passout", "pass:correct", "-in", site.private, "-out", sealed)
    for passphrase in ({}, {backups.PASSPHRASE: "wrong"}):
        site.environment |= passphrase
        done = site.authority(path, key=str(sealed))
        assert done.returncode == 2
        assert "If it has a passphrase, export it as ISTHMUS_RESTORE_PASSPHRASE for this run" in said(done)
    site.environment[backups.PASSPHRASE] = "correct"
    assert site.authority(path, key=str(sealed)).returncode == 0
    assert (site.directory / "ca.key").read_bytes() == site.key


def test_what_cannot_put_the_authority_back_is_refused_before_anything_is_changed(site: Site) -> None:
    path = site.keep("20260101T000000Z")
    bare, other = site.keep("20260102T000000Z", authority=False), site.place / "other.key"
    openssl("genrsa", "-out", other, "2048")
    _key, foreign = pki.new_authority("onprem", datetime.datetime.now(datetime.timezone.utc))
    wrong: dict[str, dict[str, Any]] = {
        "isthmus_restore_key is not given": {"key": ""},
        "cannot be read": {"key": str(site.place / "nothing")},
        f"isthmus_restore_key: {other} does not open": {"key": str(other)},
        "does not hold the key of the authority that the estate trusts": {"known": foreign.decode()},
        "does not have it. Nothing was changed": {"path": str(bare)},
    }
    for words, variables in wrong.items():
        done = site.authority(path, **variables)
        assert done.returncode == 2, done.stdout + done.stderr
        assert words in said(done)
        assert "Next: " in said(done)
        assert not site.directory.exists()


@pytest.fixture
def running(site: Site) -> Iterator[subprocess.Popen[bytes]]:
    """Stands for etcd's process."""
    process = subprocess.Popen(["sleep", "300"])
    host = site.place / "host"
    (host / "pids").mkdir()
    (host / "pids" / "isthmus-etcd.service").write_text(str(process.pid))
    (host / "lib" / "isthmus" / "etcd" / "member").mkdir(parents=True)
    yield process
    process.kill()
    process.wait()


def test_an_etcd_that_runs_is_left_unless_that_is_confirmed(site: Site, running: subprocess.Popen[bytes]) -> None:
    lib = site.place / "host" / "lib" / "isthmus"
    with pytest.raises(ModuleFailed, match=r"onprem runs on this host.*Why: .*isthmus_confirm_restore=onprem"):
        site.on_host(part="look")
    assert site.on_host(part="look", replace=True)["authority_lost"] is False
    assert site.on_host(part="clear", check=True)["changed"] is True
    assert running.poll() is None
    assert [path.name for path in lib.iterdir()] == ["etcd"]

    shutil.rmtree(lib / "snapshots", ignore_errors=True)
    assert site.on_host(part="clear")["changed"] is True
    running.wait(10)
    aside, snapshots = sorted(lib.iterdir())
    assert re.fullmatch(r"etcd\.removed-\d{8}T\d{6}Z", aside.name)
    assert (aside / "member").is_dir()
    assert stat.S_IMODE(snapshots.stat().st_mode) == 0o700
    assert site.on_host(part="look")["authority_lost"] is False
    assert site.on_host(part="clear")["changed"] is False
