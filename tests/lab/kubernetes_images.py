# SPDX-License-Identifier: GPL-3.0-or-later
"""The container images of the lab's clusters, made from what is here: nothing is pulled.

One archive as `docker save` writes it (a tar of manifest.json, configurations and layers), which
`ctr images import` reads: a sandbox, tools (busybox, Python, the demo's servers), CoreDNS.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from pathlib import Path

import demo_workloads
from kubernetes_machine import COREDNS_IMAGE, PAUSE_IMAGE, TOOLS_IMAGE

# PID 1 of a sandbox has to end when it is told to.
PAUSE = "trap 'exit 0' TERM INT; while :; do sleep 86400 & wait; done"
APPLETS = ("sh", "sleep", "cat", "ls", "nc", "ping", "ip", "nslookup", "env", "hostname", "true", "false", "kill")
# Parts of Python's library that nobody calls in a pod.
LEFT_OUT = ("test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "tkinter", "__pycache__")
PYTHON = "usr/bin/python3.11"  # of the root file system (rootfs.SUITE)
LIBRARY = "usr/lib/python3.11"
GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Layer:
    """A layer in the making; everything in it is root's and of no date, so that equal content is an equal file."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.tar = tarfile.TarFile(fileobj=self.buffer, mode="w", format=tarfile.GNU_FORMAT)

    def text(self, name: str, text: str, mode: int = 0o644) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(text.encode()), mode
        self.tar.addfile(info, io.BytesIO(text.encode()))

    def link(self, name: str, target: str) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
        self.tar.addfile(info)

    def directory(self, name: str, mode: int = 0o755) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.mode = tarfile.DIRTYPE, mode
        self.tar.addfile(info)

    def file(self, name: str, source: Path) -> None:
        info = tarfile.TarInfo(name)
        found = source.stat()
        info.size, info.mode = found.st_size, found.st_mode & 0o777
        with source.open("rb") as content:
            self.tar.addfile(info, content)

    def data(self) -> bytes:
        self.tar.close()
        return self.buffer.getvalue()


def base(root: Path) -> bytes:
    """busybox, and the directories that programs expect. `root`: the machines' root file system."""
    layer = Layer()
    for name in ("usr", "usr/bin", "usr/lib", "usr/lib64", "etc", "dev", "proc", "sys", "run", "var", "root"):
        layer.directory(name)
    layer.directory("tmp", 0o1777)
    for name in ("bin", "lib", "lib64"):
        layer.link(name, f"usr/{name}")
    layer.file("usr/bin/busybox", root / "bin" / "busybox")
    for applet in APPLETS:
        layer.link(f"usr/bin/{applet}", "busybox")
    layer.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
    layer.text("etc/group", "root:x:0:\n")
    return layer.data()


def python(root: Path) -> bytes:
    """Python with its library and what both link to, and the demo's programs."""
    layer = Layer()
    layer.file(PYTHON, root / PYTHON)
    layer.link("usr/bin/python3", Path(PYTHON).name)
    found = [path for path in sorted((root / LIBRARY).rglob("*")) if not path.is_symlink()]
    for path in (path for path in found if path.is_file()):
        if not any(part in LEFT_OUT for part in path.relative_to(root / LIBRARY).parts):
            layer.file(str(path.relative_to(root)), path)
    extensions = [f"/{path.relative_to(root)}" for path in found if path.suffix == ".so"]
    shown = subprocess.run(
        ["chroot", str(root), "ldd", f"/{PYTHON}", *extensions], check=True, capture_output=True, text=True
    ).stdout
    # "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x...)", and the loader as "/lib64/ld-... (0x...)"
    words = {word for line in shown.splitlines() for word in line.split() if word.startswith("/") and word[-1] != ":"}
    for word in sorted(words):
        layer.file(f"usr{word.removeprefix('/usr')}", root / f"usr{word.removeprefix('/usr')}")
    for name, (text, mode) in demo_workloads.files("").items():
        if name.startswith("usr/"):
            layer.text(name, text, mode)
    return layer.data()


def coredns(program: Path) -> bytes:
    layer = Layer()
    layer.file("usr/bin/coredns", program)
    return layer.data()


def write(target: Path, root: Path, coredns_program: Path) -> None:
    """Write the archive. `root`: the machines' root file system."""
    layers = {"base": base(root), "python": python(root), "coredns": coredns(coredns_program)}
    images = {
        PAUSE_IMAGE: (("base",), ["/bin/sh", "-c", PAUSE]),
        TOOLS_IMAGE: (("base", "python"), ["/bin/sh", "-c", PAUSE]),
        COREDNS_IMAGE: (("base", "coredns"), ["/usr/bin/coredns"]),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in layers.items()}
    part = target.with_name(f"{target.name}.part")
    with tarfile.open(part, "w") as archive:

        def put(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))

        manifest = []
        for name, data in layers.items():
            put(f"{digests[name]}.tar", data)
        for image, (names, command) in images.items():
            what = "Entrypoint" if image == COREDNS_IMAGE else "Cmd"
            config = {
                "architecture": GO_ARCHITECTURES[platform.machine()],
                "os": "linux",
                "config": {what: command, "Env": ["PATH=/usr/bin:/bin"]},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digests[name]}" for name in names]},
            }
            text = json.dumps(config).encode()
            config_name = f"{hashlib.sha256(text).hexdigest()}.json"
            put(config_name, text)
            manifest.append(
                {"Config": config_name, "RepoTags": [image], "Layers": [f"{digests[name]}.tar" for name in names]}
            )
        put("manifest.json", json.dumps(manifest).encode())
    part.rename(target)
