# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the container image for Kubernetes clusters whose nodes nobody enters, of our bundle and Debian's packages.

An OCI archive (OCI image specification 1.0: image layout, manifest, configuration) that skopeo pushes and containerd
imports; no registry and no other image has a part in it. Two layers: Debian with Python, etcd and tools, made once by
mmdebstrap and kept in the user's cache, and what the bundle installs. The same inputs make the same bytes.

Runs as root under the controller's environment (`make image`).
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundle
from bundle import ARCHES, BUILD, BUNDLES, EPOCH, ROOT, BuildError, cache_directory, project_version, run, say

sys.path.insert(0, str(ROOT / "tests" / "lab"))
import rootfs  # Debian as this machine's apt knows it

PYTHON = "3.11"  # of rootfs.SUITE
NAME = "localhost/isthmus"
"""What an import calls it; a registry's copy has the name that the operator gives."""
USER = 10073  # plugins/module_utils/in_cluster.py

PACKAGES = (
    "ca-certificates",
    "etcd-client",
    "etcd-server",
    "iproute2",  # for people who look around, as is nft
    "libelf1",  # libbpf needs it
    "nftables",
    "python3",
    "wireguard-tools",
    "zlib1g",
)
LEFT_OUT = ("man", "doc", "locale", "info", "lintian", "bash-completion")

# What an installation leaves behind that is different each time, or that a container has no use for.
CUSTOMIZE = """\
set -eu
root="$1"
rm -f "$root/etc/hostname" "$root/etc/resolv.conf" "$root/etc/machine-id" "$root/var/lib/dbus/machine-id"
rm -rf "$root"/var/lib/etcd "$root"/var/log/* "$root"/var/cache/* "$root"/var/lib/apt/lists/* "$root"/var/backups/*
rm -f "$root"/etc/*- "$root"/etc/.pwd.lock "$root"/var/lib/dpkg/*-old "$root"/var/lib/dpkg/lock*
find "$root/usr" -name __pycache__ -prune -exec rm -rf {} +
printf 'isthmus:x:%s:%s::/var/lib/isthmus:/usr/sbin/nologin\\n' USER USER >> "$root/etc/passwd"
printf 'isthmus:x:%s:\\n' USER >> "$root/etc/group"
mkdir -p "$root/etc/isthmus/pki/trust" "$root/var/lib/isthmus" "$root/run/isthmus"
""".replace("USER", str(USER))


def base_recipe() -> str:
    recipe = json.dumps([rootfs.SUITE, platform.machine(), PACKAGES, LEFT_OUT, CUSTOMIZE])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def base() -> Path:
    """Debian's part as a tar, made once; a changed recipe makes a new one."""
    target = cache_directory() / f"image-base-{rootfs.SUITE}-{platform.machine()}-{base_recipe()}.tar"
    if target.exists():
        return target
    if shutil.which("mmdebstrap") is None:
        raise BuildError("mmdebstrap is not installed; `make setup` installs it")
    say(f"image: making Debian's part, {target} (once; about 300 MB, 1 to 2 minutes)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="image-base-", dir=target.parent) as place:
        script, part = Path(place, "customize.sh"), Path(place, "base.tar")
        script.write_text(CUSTOMIZE)
        done = subprocess.run(
            [
                *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar", f"--include={','.join(PACKAGES)}"),
                "--dpkgopt=force-unsafe-io",  # what is interrupted is made anew
                *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in LEFT_OUT),
                *rootfs.apt_options(),
                *(f'--customize-hook=sh {script} "$1"', rootfs.SUITE, str(part), "-"),
            ],
            input="\n".join(rootfs.apt_sources()) + "\n",
            env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            tail = "\n  ".join(done.stderr.strip().splitlines()[-12:])
            raise BuildError(f"mmdebstrap failed ({done.returncode}):\n  {tail}")
        part.rename(target)
    return target


def offered() -> dict[str, Any]:
    """This machine's bundle for the image's Python, as bundle.json names it."""
    for entry in bundle.read_platforms():
        if (entry["arch"], entry["python"]) == (platform.machine(), PYTHON):
            return dict(entry)
    raise BuildError(f"there is no bundle for Python {PYTHON} in build/bundle; make it: make bundle")


def install(root: Path, entry: dict[str, Any], version: str) -> str:
    """Install the bundle below `root`, Debian's part unpacked, as `isthmus.mesh.bundle` does on a machine; where."""
    home = f"{bundle.HOME}/{version}-{entry['digest'][:8]}"
    chroot = ("chroot", str(root), "/usr/bin/env", "-i", "PATH=/usr/bin:/bin", "PYTHONHASHSEED=0", "LC_ALL=C.UTF-8")
    run(*chroot, f"/usr/bin/python{PYTHON}", "-m", "venv", "--without-pip", home)
    python = f"{home}/bin/python"
    with tarfile.open(BUNDLES / entry["archive"]) as archive:
        archive.extractall(root / home.lstrip("/"))  # noqa: S202 - we made it
    # The root file system of a container is read-only: what is not compiled here is compiled at every start. By hash,
    # because in the image all files are of one date.
    compileall = ("-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash")
    run(*chroot, python, *compileall, home, f"/usr/lib/python{PYTHON}")
    run(*chroot, python, "-c", "import isthmus_agent, isthmus_mesh, grpc, cryptography")
    (root / bundle.HOME.lstrip("/") / "current").symlink_to(home)
    return home


def paths_below(top: Path) -> Iterator[Path]:
    """Everything below a directory in a fixed order."""
    for directory, names, files in os.walk(top):
        names.sort()
        yield Path(directory)
        yield from (
            Path(directory, name) for name in sorted([*files, *(n for n in names if Path(directory, n).is_symlink())])
        )


def layer(root: Path) -> bytes:
    """What the bundle installed, as a tar: everything root's and of one date."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:

        def put(path: Path) -> None:
            info = archive.gettarinfo(str(path), str(path.relative_to(root)))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = EPOCH
            if info.isreg():
                with path.open("rb") as content:
                    archive.addfile(info, content)
            else:
                archive.addfile(info)

        for path in paths_below(root / bundle.HOME.lstrip("/")):
            put(path)
        library = root / "usr" / "lib" / f"python{PYTHON}"
        for path in paths_below(library):
            if path.name == "__pycache__" or path.suffix == ".pyc":
                put(path)
        command = tarfile.TarInfo("usr/local/bin/isthmus")
        command.type, command.linkname, command.mode, command.mtime = (
            tarfile.SYMTYPE,
            f"{bundle.HOME}/current/bin/isthmus",
            0o777,
            EPOCH,
        )
        archive.addfile(command)
    return buffer.getvalue()


class Layout:
    """An OCI image layout in the making, as a tar."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._tar = archive
        self.put("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')

    def put(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(content), 0o644, EPOCH
        self._tar.addfile(info, io.BytesIO(content))

    def blob(self, kind: str, content: bytes) -> dict[str, Any]:
        """Put a blob in; its descriptor."""
        digest = hashlib.sha256(content).hexdigest()
        self.put(f"blobs/sha256/{digest}", content)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    def json(self, kind: str, document: dict[str, Any]) -> dict[str, Any]:
        return self.blob(kind, json.dumps(document, sort_keys=True).encode())


def write(target: Path, layers: list[bytes], version: str, digest: str) -> None:
    """Write the archive with these layers (tar)."""
    created = "2000-01-01T00:00:00Z"  # EPOCH
    part = target.with_name(target.name + ".part")
    with tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as archive:
        layout = Layout(archive)
        # Fast: what is compressed harder is not worth the minutes.
        packed = [gzip.compress(content, 3, mtime=EPOCH) for content in layers]
        descriptors = [layout.blob("layer.v1.tar+gzip", content) for content in packed]
        labels = {"org.opencontainers.image.version": version, "isthmus.io/bundle": digest}
        config = layout.json(
            "config.v1+json",
            {
                "architecture": ARCHES[platform.machine()],
                "os": "linux",
                "created": created,
                "config": {
                    "Env": [
                        f"PATH={bundle.HOME}/current/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
                    ],
                    "Cmd": [f"{bundle.HOME}/current/bin/isthmus", "--help"],
                    "Labels": labels,
                },
                "rootfs": {
                    "type": "layers",
                    "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}" for content in layers],
                },
                "history": [
                    {"created": created, "created_by": f"mmdebstrap {rootfs.SUITE}"},
                    {"created": created, "created_by": f"isthmus {version}"},
                ],
            },
        )
        manifest = layout.json(
            "manifest.v1+json",
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": config,
                "layers": descriptors,
                "annotations": labels,
            },
        )
        manifest["annotations"] = {
            "org.opencontainers.image.ref.name": version,
            "io.containerd.image.name": f"{NAME}:{version}",
        }
        index = {"schemaVersion": 2, "manifests": [manifest]}
        layout.put("index.json", json.dumps(index, sort_keys=True).encode())
    part.rename(target)


def make() -> Path:
    """build/isthmus-<version>.oci.tar; nothing is done when it is there from the same inputs."""
    version = project_version()
    entry = offered()
    target = BUILD / f"isthmus-{version}.oci.tar"
    marker = BUILD / "image-inputs"
    inputs = f"{base_recipe()} {entry['digest']} {bundle.sha256(Path(__file__))}\n"
    if target.exists() and marker.exists() and marker.read_text() == inputs:
        say(f"{target.name}: up to date")
        return target
    if os.geteuid() != 0:
        raise BuildError("an image holds files of root: run `make image` as root")
    debian = base()
    with tempfile.TemporaryDirectory(prefix="image-", dir=BUILD) as place:
        root = Path(place, "root")
        root.mkdir()
        run(
            "tar",
            "--extract",
            "--numeric-owner",
            "--preserve-permissions",
            "--directory",
            str(root),
            "--file",
            str(debian),
        )
        install(root, entry, version)
        marker.unlink(missing_ok=True)
        write(target, [debian.read_bytes(), layer(root)], version, str(entry["digest"]))
    marker.write_text(inputs)
    say(f"{target.name}: {target.stat().st_size / 1e6:.0f} MB")
    return target


def main() -> int:
    try:
        with (BUILD / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            make()
    except (BuildError, rootfs.RootfsError) as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
