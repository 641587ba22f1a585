# SPDX-License-Identifier: GPL-3.0-or-later
"""The container image: it holds what it says, its programs run from a read-only root, it is pushed and imported."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.module_runner import ModuleFailed, run_module
from integration.registry_fixture import PASSWORD, USER, Registry

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    import bundle
    import image
finally:
    sys.path.pop(0)

CURRENT = "/opt/isthmus/current"


def blobs_of(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


def opened(blobs: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, Any], list[bytes]]:
    """Manifest, configuration and layers, found as a registry's client would, by their digests."""

    def blob(descriptor: dict[str, Any]) -> bytes:
        content = blobs[f"blobs/{descriptor['digest'].replace(':', '/')}"]
        assert hashlib.sha256(content).hexdigest() == descriptor["digest"].partition(":")[2]
        assert len(content) == descriptor["size"]
        return content

    assert json.loads(blobs["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads(blobs["index.json"])["manifests"]
    manifest = json.loads(blob(entry))
    config = json.loads(blob(manifest["config"]))
    layers = [gzip.decompress(blob(one)) for one in manifest["layers"]]
    found = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
    assert config["rootfs"]["diff_ids"] == found
    return manifest, config, layers


@pytest.fixture(scope="module")
def archive() -> Path:
    path = ROOT / "build" / f"isthmus-{bundle.project_version()}.oci.tar"
    assert path.exists(), "there is no image; make it: make image"
    return path


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("image") / "root"
    root.mkdir()
    for layer in opened(blobs_of(archive))[2]:
        command = ["tar", "--extract", "--numeric-owner", "--preserve-permissions", f"--directory={root}"]
        subprocess.run(command, input=layer, check=True)
    yield root
    shutil.rmtree(root)


def test_the_archive_is_an_image_of_the_bundle_that_machines_get(archive: Path) -> None:
    manifest, config, layers = opened(blobs_of(archive))
    entry = image.offered()
    assert config["config"]["Labels"]["isthmus.io/bundle"] == manifest["annotations"]["isthmus.io/bundle"]
    assert manifest["annotations"]["isthmus.io/bundle"] == entry["digest"], "the image is older than the bundle"
    assert config["os"] == "linux"
    assert len(layers) == 2
    with tarfile.open(fileobj=io.BytesIO(layers[1])) as tar:
        members = tar.getmembers()
    assert {(one.uid, one.gid, one.mtime) for one in members} == {(0, 0, bundle.EPOCH)}
    assert not [one.name for one in members if one.name.startswith(("payload", "tmp"))]


@pytest.mark.root
def test_programs_run_as_any_user_from_a_root_that_nobody_can_write(unpacked: Path) -> None:
    def run(*command: str, user: int = image.USER) -> str:
        script = (
            'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec chroot --userspec="$1:$1" "$0" "${@:2}"'
        )
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", script, str(unpacked), str(user), *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    for name in ("isthmus", "isthmusd", "isthmus-registrar"):
        assert "usage: " in run(f"{CURRENT}/bin/{name}", "--help")
    assert "etcd Version: 3." in run("/usr/bin/etcd", "--version")
    assert "etcdctl version: 3." in run("/usr/bin/etcdctl", "version")
    for name in ("ip", "nft", "wg", "sleep", "rm"):
        assert f"/{name}" in run("/usr/bin/env", "PATH=/usr/sbin:/usr/bin", "which", name)
    libbpf = (
        "from isthmus_agent.agent.kernel import bundled_libbpf as b; import ctypes; ctypes.CDLL(str(b())); print(b())"
    )
    assert run(f"{CURRENT}/bin/python", "-c", libbpf).strip().endswith("/lib/libbpf.so.1")
    # Everything is compiled already: a start reads no source.
    lines = run(f"{CURRENT}/bin/python", "-v", "-c", "import isthmus_agent.registrar.main").splitlines()
    assert any("isthmus_agent" in line and "matches" in line for line in lines)
    assert not [line for line in lines if "could not create" in line or "# wrote" in line]


@pytest.mark.slow
def test_the_same_inputs_make_the_same_image(archive: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    _manifest, _config, layers = opened(blobs_of(archive))
    command = ["tar", "--extract", "--numeric-owner", "--preserve-permissions", f"--directory={root}"]
    subprocess.run(command, input=layers[0], check=True)
    image.install(root, image.offered(), bundle.project_version())
    assert image.layer(root) == layers[1]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An archive as `make image` makes it, with next to nothing in it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        info = tarfile.TarInfo("etc")
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(info)
    target = tmp_path / "small.oci.tar"
    image.write(target, [content.getvalue()], "1.0.0", "a digest")
    return target


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed; make setup installs it")
def test_a_push_happens_once_and_shows_no_password(small: Path, tmp_path: Path) -> None:
    with Registry(tmp_path) as registry:
        name = f"{registry.name}/mesh/isthmus:1.0.0"
        given = {"archive": str(small), "image": name, "ca_certificates": str(registry.certificates)}
        with pytest.raises(ModuleFailed, match="cannot be asked"):
            run_module("image_push", {**given, "username": USER, "password": "wrong"}, bundle=False)
        given |= {"username": USER, "password": PASSWORD}
        assert run_module("image_push", given, check=True, bundle=False)["changed"]
        assert not registry.manifests
        first = run_module("image_push", given, bundle=False)
        assert first["changed"]
        assert PASSWORD not in json.dumps(first["diff"])
        _kind, manifest = registry.manifests["1.0.0"]
        assert f"sha256:{hashlib.sha256(manifest).hexdigest()}" == first["digest"]
        assert all(layer["digest"] in registry.blobs for layer in json.loads(manifest)["layers"])
        registry.requests.clear()
        assert not run_module("image_push", given, bundle=False)["changed"]
        assert not [one for one in registry.requests if one.split()[0] in ("POST", "PUT", "PATCH")]


def test_an_image_without_a_registry_is_not_pushed(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModuleFailed, match="names no registry"):
        run_module("image_push", {"archive": str(small), "image": "isthmus:1.0.0"}, bundle=False)
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w"):
        pass
    with pytest.raises(ModuleFailed, match="is no OCI archive with one image"):
        run_module("image_push", {"archive": str(other), "image": "registry.example/isthmus:1.0.0"}, bundle=False)


@pytest.fixture
def containerd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """containerd of the lab's nodes, with a directory of its own; `ctr` in PATH asks it."""
    sys.path.insert(0, str(ROOT / "tests" / "lab"))
    try:
        import kubernetes_parts
    finally:
        sys.path.pop(0)
    try:
        program = kubernetes_parts.binary("containerd")
    except kubernetes_parts.PartsError as error:
        pytest.skip(str(error))
    config = tmp_path / "containerd.toml"
    config.write_text(
        "version = 3\ndisabled_plugins = ['io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime']\n"
    )
    address = tmp_path / "containerd.sock"
    command = [str(program), f"--config={config}", f"--address={address}", f"--root={tmp_path}/root"]
    with (tmp_path / "containerd.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--state={tmp_path}/state"], stdout=log, stderr=log)
    monkeypatch.setenv("CONTAINERD_ADDRESS", str(address))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(["ctr", "version"], capture_output=True, check=False).returncode != 0:
            assert time.monotonic() < deadline, (tmp_path / "containerd.log").read_text()[-2000:]
            time.sleep(0.1)
        yield tmp_path
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.root
@pytest.mark.parametrize("name", ["localhost/isthmus:1.0.0", "registry.example/mesh/isthmus:1.0.0"])
def test_a_node_imports_the_image_once(small: Path, containerd: Path, name: str) -> None:
    with tarfile.open(small) as tar:
        digest = json.load(tar.extractfile("index.json"))["manifests"][0]["digest"]  # type: ignore[arg-type]
    asked = run_module("image_import", {"image": name, "digest": digest}, bundle=False)
    assert (asked["changed"], asked["needed"]) == (False, True)
    given = {"image": name, "digest": digest, "archive": str(small)}
    assert run_module("image_import", given, check=True, bundle=False)["changed"]
    assert run_module("image_import", given, bundle=False)["changed"]
    again = run_module("image_import", {"image": name, "digest": digest}, bundle=False)
    assert (again["changed"], again["needed"]) == (False, False)
