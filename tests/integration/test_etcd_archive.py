# SPDX-License-Identifier: GPL-3.0-or-later
"""etcd out of a release archive: found by its sha256, unpacked once, refused in words."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.modules import bundle, etcd_member
from integration.etcd_fixture import require_etcd


class Refused(Exception):
    pass


class Module:
    """As much of AnsibleModule as the installation of a binary asks for."""

    def __init__(self, archive: Path | None, check: bool = False) -> None:
        self.params = {"archive": None if archive is None else str(archive)}
        self.check_mode = check

    def fail_json(self, msg: str) -> None:
        raise Refused(msg)

    def sha256(self, path: str) -> str:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def run_command(self, command: list[str]) -> tuple[int, str, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where releases are unpacked to, on this test's own host."""
    directory = tmp_path / "opt" / "etcd"
    monkeypatch.setattr(etcd_member, "ARCHIVES", str(directory))
    return directory


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive as etcd's project makes them, of this machine's programs."""
    require_etcd()
    directory = tmp_path_factory.mktemp("release")
    path = directory / "etcd-linux.tar.gz"
    # No compression: the programs are big and this is no test of gzip.
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        for name in ("etcd", "etcdctl"):
            tar.add(str(shutil.which(name)), f"etcd-linux/{name}")
    return path


def install(archive: Path | None, sha256: str, check: bool = False) -> tuple[str | None, bool]:
    """Path of the binary, and whether something had to change."""
    module: Any = Module(archive, check)
    changes = Changes(module)
    source = {"type": "archive", "path": "/srv/etcd.tar.gz", "sha256": sha256}
    return etcd_member.Install(module, changes, source).binary(), changes.changed


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_check_apply_apply_check(place: Path, release: Path) -> None:
    digest = digest_of(release)
    assert install(release, digest, check=True) == (None, True)
    assert not place.exists()
    old = os.umask(0o077)  # etcd's user must get in whatever the host's mask is
    try:
        binary, changed = install(release, digest.upper())
    finally:
        os.umask(old)
    assert binary is not None
    assert changed
    version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    assert Path(binary) == place / version / "etcd"
    for path in (place, Path(binary).parent, Path(binary), Path(binary).with_name("etcdctl")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755, path
    assert install(release, digest) == (binary, False)
    # The archive is not looked at any more.
    assert install(None, digest) == (binary, False)
    assert install(None, digest, check=True) == (binary, False)
    assert sorted(path.name for path in place.iterdir()) == [version]


def test_a_damaged_installation_is_made_anew(place: Path, release: Path) -> None:
    digest = digest_of(release)
    binary, _ = install(release, digest)
    assert binary is not None
    Path(binary).unlink()
    assert install(release, digest) == (binary, True)
    assert os.access(binary, os.X_OK)


def test_another_build_of_the_same_version_is_put_beside(place: Path, release: Path, tmp_path: Path) -> None:
    first, _ = install(release, digest_of(release))
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as tar:
        tar.add(str(shutil.which("etcd")), "etcd")
    second, changed = install(other, digest_of(other))
    assert changed
    assert second == f"{Path(str(first)).parent}-{digest_of(other)[:12]}/etcd"
    assert os.access(str(first), os.X_OK)


def test_a_wrong_sha256_is_refused(place: Path, release: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(Refused) as refused:
        install(release, wrong)
    assert str(refused.value) == (
        f"the etcd archive /srv/etcd.tar.gz has sha256 {digest_of(release)}, the inventory says {wrong}. "
        "Correct one of them"
    )
    assert not place.exists()


@pytest.mark.parametrize(
    ("members", "words"), [(None, "is no tar archive that can be read"), (("etcdctl",), "holds no file named etcd")]
)
def test_an_archive_without_etcd_is_refused(
    place: Path, tmp_path: Path, members: tuple[str, ...] | None, words: str
) -> None:
    path = tmp_path / "release"
    path.write_text("PK")
    if members is not None:
        with tarfile.open(path, "w") as tar:
            for name in members:
                tar.add(__file__, name)
    with pytest.raises(Refused, match=words):
        install(path, digest_of(path))
    assert list(place.iterdir()) == []


def test_a_new_bundle_keeps_what_etcd_runs_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "isthmus"
    for name in ("1.0.0-old", "1.0.0-before", "1.0.0-now", "etcd/3.5.9"):
        (root / name).mkdir(parents=True)
    monkeypatch.setattr(bundle.bundle, "ROOT", str(root))
    monkeypatch.setattr(bundle.bundle, "CURRENT", str(root / "current"))
    monkeypatch.setattr(bundle.bundle, "ETCD", str(root / "etcd"))
    bundle.switch(str(root / "1.0.0-now"))
    bundle.clean(str(root / "1.0.0-now"), str(root / "1.0.0-before"))
    assert sorted(path.name for path in root.iterdir()) == ["1.0.0-before", "1.0.0-now", "current", "etcd"]
    assert (root / "etcd" / "3.5.9").is_dir()
