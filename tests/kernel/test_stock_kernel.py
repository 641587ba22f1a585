# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests again on the stock kernel of Debian, in a virtual machine: those of the datapath (tests/bpf), and those of the
tunnels that the kernel under the other tests may have in user space only, here with its WireGuard and its ESP.

The guest is emulated (TCG): no machine has to have KVM. Its root is the controller's own, shared by virtiofs and
read-only, so that it has the same Python environment, tools and compiled objects.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from bpf.topology import wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "isthmus")
PACKAGE = "linux-image-cloud-amd64"
QEMU = "/usr/bin/qemu-system-x86_64"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
TOOLS = (QEMU, VIRTIOFSD, "/bin/busybox", "/sbin/modprobe")
IPSEC, WIREGUARD = "tests/integration/test_ipsec.py", "tests/integration/test_agent_wireguard.py"


@dataclass(frozen=True)
class Suite:
    """Tests, and how long they take: `expected` is in seconds on two cores, measured while another run used them as
    well."""

    name: str
    tests: tuple[str, ...]
    expected: float


SUITES = (
    Suite("datapath", ("tests/bpf",), 260),
    Suite(
        "wireguard",
        (
            f"{WIREGUARD}::test_traffic_is_encrypted_also_at_full_size",
            f"{WIREGUARD}::test_status_says_who_is_encrypted_and_by_what",
            f"{WIREGUARD}::test_a_peers_overlay_packet_in_clear_is_dropped_and_counted",
            f"{WIREGUARD}::test_rules_that_somebody_removes_let_nothing_out_and_come_back",
        ),
        200,
    ),
    Suite(
        "ipsec",
        (
            f"{IPSEC}::test_a_pair_is_led_into_the_tunnel_with_certificates_and_nothing_goes_beside_it",
            f"{IPSEC}::test_each_host_reaches_each_of_the_other_site_over_two_gateways_each",
            f"{IPSEC}::test_when_a_gateway_is_lost_the_other_takes_over_and_nothing_goes_in_clear[o1]",
            f"{IPSEC}::test_a_gateway_without_strongswan_leads_over_the_other_and_none_goes_back_and_forth",
        ),
        900,
    ),
)


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


def make_initramfs(kernel: Kernel, directory: Path, tests: Sequence[str]) -> Path:
    """busybox, what mounts the shared root, and the words for init.sh."""
    tree = directory / "initramfs"
    for name in ("bin", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    shutil.copy(Path(__file__).with_name("init.sh"), tree / "init")
    (tree / "init").chmod(0o755)
    settings = {
        "ROOT": ROOT,
        "BIN": Path(sys.executable).parent,
        "MODULES": kernel.modules,
        "TESTS": " ".join(tests),
    }
    (tree / "settings").write_text("".join(f"{key}={shlex.quote(str(value))}\n" for key, value in settings.items()))
    needed = _run(
        "modprobe", "-a", "-d", str(kernel.tree), "-S", kernel.release, "-D", "virtio_pci", "virtiofs", "overlay"
    )
    for number, path in enumerate(dict.fromkeys(line.split()[1] for line in needed.splitlines())):
        shutil.copy(path, tree / "modules" / f"{number:02}.ko")
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = subprocess.run(
        ["/bin/busybox", "cpio", "-o", "-H", "newc"], cwd=tree, input=names.encode(), capture_output=True, check=True
    )
    initramfs = directory / "initramfs.gz"
    initramfs.write_bytes(gzip.compress(archive.stdout))
    return initramfs


def boot(kernel: Kernel, directory: Path, console: Path, tests: Sequence[str], seconds: float) -> None:
    """Until the guest turns itself off; AssertionError when that takes longer than `seconds`."""
    socket = directory / "virtiofs"
    memory = "1G"
    sharing = [VIRTIOFSD, f"--socket-path={socket}", "-o", "source=/,sandbox=chroot,cache=always,log_level=err"]
    machine = [
        *(QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", memory, "-no-reboot"),
        *("-nodefaults", "-display", "none", "-serial", f"file:{console}"),
        *("-object", f"memory-backend-memfd,id=memory,size={memory},share=on", "-machine", "memory-backend=memory"),
        *("-chardev", f"socket,id=root,path={socket}", "-device", "vhost-user-fs-pci,chardev=root,tag=host"),
        *("-kernel", str(kernel.tree / "boot" / f"vmlinuz-{kernel.release}")),
        # The kernel gives up when it misses interrupts of the timer in a moment in which this machine does other work.
        *("-initrd", str(make_initramfs(kernel, directory, tests))),
        *("-append", "console=ttyS0 quiet panic=-1 no_timer_check"),
    ]
    with subprocess.Popen(sharing) as server:
        try:
            wait_for(socket.exists, f"{VIRTIOFSD} listens")
            ended = subprocess.run(machine, capture_output=True, text=True, timeout=seconds)
            assert ended.returncode == 0, f"{QEMU} ended with {ended.returncode}: {ended.stderr}"
        except subprocess.TimeoutExpired:
            pytest.fail(f"the guest was not through after {seconds:.0f} s; how far it came: {console}")
        finally:
            server.kill()


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_on_debians_stock_kernel(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if platform.machine() != "x86_64":
        pytest.skip(f"no virtual machine: this is {platform.machine()}, the guest has the controller's own programs")
    missing = [tool for tool in TOOLS if not os.access(tool, os.X_OK)]
    if missing:
        refuse = pytest.fail if "ISTHMUS_FULL" in os.environ else pytest.skip
        refuse(f"no virtual machine: {', '.join(missing)} missing (requirements/apt-full.txt, Debian 12)")
    kernel = stock_kernel()
    console = ROOT / "build" / f"kernel-{kernel.release}-{suite.name}.log"
    console.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    boot(kernel, tmp_path, console, suite.tests, 3 * suite.expected)
    text = console.read_text(errors="replace").replace("\r", "")
    summary = re.search(r"^=+ (.* in [\d.]+s.*) =+$", text, re.MULTILINE)
    status = re.search(r"^guest: pytest ended with status (\d+)$", text, re.MULTILINE)
    tail = "\n".join(text.splitlines()[-40:])
    assert summary, f"the guest's pytest did not get to its end; the end of {console}:\n{tail}"
    with capsys.disabled():
        print(f"\nLinux {kernel.release}, {suite.name}: {summary[1]}, {time.monotonic() - began:.0f} s with its boot")
    assert status, tail
    assert status[1] == "0", f"{summary[1]}; the end of {console}:\n{tail}"
    assert re.search(r"\b[1-9]\d* passed", summary[1]), f"none ran: {summary[1]}"
    # The datapath's own say themselves what a kernel lacks; what tunnels need this one has.
    assert suite.name == "datapath" or "skipped" not in summary[1], summary[1]
