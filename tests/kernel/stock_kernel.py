# SPDX-License-Identifier: GPL-3.0-or-later
"""Debian's stock kernel, and the virtual machine that it runs in.

The guest is emulated (TCG): no machine has to have KVM. Its root is a directory of the controller, shared by virtiofs.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "isthmus")
PACKAGE = "linux-image-cloud-amd64"
QEMU = "/usr/bin/qemu-system-x86_64"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
TOOLS = (QEMU, VIRTIOFSD, "/bin/busybox", "/sbin/modprobe")
MEMORY = "1G"
TAG = "host"
"""Of the shared directory, for the guest's mount."""


@dataclass(frozen=True)
class Kernel:
    """A kernel's package, unpacked or to be."""

    package: str
    release: str
    tree: Path

    @property
    def modules(self) -> Path:
        return self.tree / "lib" / "modules" / self.release

    def fetch(self) -> None:
        """Into the cache, whole or not at all."""
        with _scratch(self.tree) as scratch:
            _run("apt-get", "-o", "Acquire::Retries=3", "download", self.package, cwd=scratch)
            (archive,) = scratch.glob("*.deb")
            _run("dpkg-deb", "-x", str(archive), "tree", cwd=scratch)
            _run("depmod", "-b", "tree", self.release, cwd=scratch)
            (scratch / "tree").rename(self.tree)


@contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    scratch = beside.with_name(f"{beside.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _run(*words: str, cwd: Path | None = None) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def _candidate() -> Kernel | None:
    """What the package lists of this machine have, None when they lack it."""
    shown = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", PACKAGE], capture_output=True, text=True, check=False
    ).stdout
    match = re.search(r"^Depends: (linux-image-(\S+)) \(= (\S+)\)$", shown, re.MULTILINE)
    return Kernel(match[1], match[2], CACHE / f"kernel-{match[2]}-{match[3]}") if match else None


def stock_kernel() -> Kernel:
    """The newest that the package lists name, from the cache. The lists are updated only when it is not there."""
    kernel = _candidate()
    if kernel is None or not kernel.tree.exists():
        _run("apt-get", "-o", "Acquire::Retries=3", "update")
        kernel = _candidate()
        assert kernel is not None, f"no package {PACKAGE} in the lists of apt: this needs Debian 12 on x86-64"
        if not kernel.tree.exists():
            kernel.fetch()
    return kernel


def needed() -> Kernel:
    """The kernel, or the test is skipped, in a full run failed, where no guest can be."""
    if platform.machine() != "x86_64":
        pytest.skip(f"no virtual machine: this is {platform.machine()}, the guest has the controller's own programs")
    missing = [tool for tool in TOOLS if not os.access(tool, os.X_OK)]
    if missing:
        refuse = pytest.fail if "ISTHMUS_FULL" in os.environ else pytest.skip
        refuse(f"no virtual machine: {', '.join(missing)} missing (requirements/apt-full.txt, Debian 12)")
    return stock_kernel()


def make_initramfs(
    kernel: Kernel, directory: Path, init: Path, settings: Mapping[str, object], modules: Sequence[str]
) -> Path:
    """busybox, the modules that its `init` loads, and the words for that, in /settings."""
    tree = directory / "initramfs"
    for name in ("bin", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    shutil.copy(init, tree / "init")
    (tree / "init").chmod(0o755)
    (tree / "settings").write_text("".join(f"{key}={shlex.quote(str(value))}\n" for key, value in settings.items()))
    needs = _run("modprobe", "-a", "-d", str(kernel.tree), "-S", kernel.release, "-D", *modules)
    for number, path in enumerate(dict.fromkeys(line.split()[1] for line in needs.splitlines())):
        shutil.copy(path, tree / "modules" / f"{number:02}.ko")
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = subprocess.run(
        ["/bin/busybox", "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), capture_output=True, check=True
    )
    initramfs = directory / "initramfs.gz"
    initramfs.write_bytes(gzip.compress(archive.stdout))
    return initramfs


def sharing(socket: Path, source: Path) -> list[str]:
    """The command line of the program that shares a directory with the guest."""
    return [VIRTIOFSD, f"--socket-path={socket}", "-o", f"source={source},sandbox=chroot,cache=always,log_level=err"]


def guest(kernel: Kernel, socket: Path, console: Path, initramfs: Path, *devices: str) -> list[str]:
    """The command line of the guest, which ends when the guest turns itself off or reboots."""
    return [
        *(QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", MEMORY, "-no-reboot"),
        *("-nodefaults", "-display", "none", "-serial", f"file:{console}"),
        *("-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on", "-machine", "memory-backend=memory"),
        *("-chardev", f"socket,id=root,path={socket}", "-device", f"vhost-user-fs-pci,chardev=root,tag={TAG}"),
        *devices,
        *("-kernel", str(kernel.tree / "boot" / f"vmlinuz-{kernel.release}"), "-initrd", str(initramfs)),
        # The kernel gives up when it misses interrupts of the timer in a moment in which this machine does other work.
        *("-append", "console=ttyS0 quiet panic=-1 no_timer_check"),
    ]
