# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the cgroup2 hierarchy and the BPF file system are."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from isthmus_agent.bpf.errors import BpfError


def parse_mounts(text: str, kind: str) -> list[Path]:
    """Mount points of file system type `kind` in the text of /proc/mounts, in its order."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[2] == kind:
            found.append(Path(fields[1].encode().decode("unicode_escape")))
    return found


def cgroup2_root() -> Path:
    """The first cgroup2 mount; on hybrid hosts that is not /sys/fs/cgroup."""
    mounts = parse_mounts(Path("/proc/mounts").read_text(), "cgroup2")
    if not mounts:
        raise BpfError(
            "no cgroup2 hierarchy is mounted on this host (/proc/mounts): boot with "
            "systemd.unified_cgroup_hierarchy=1 or mount one (mount -t cgroup2 none /sys/fs/cgroup/unified)"
        )
    return mounts[0]


def _in_the_hosts_mounts() -> bool:
    try:
        return os.readlink("/proc/self/ns/mnt") == os.readlink("/proc/1/ns/mnt")
    except PermissionError:  # a sandbox that may not even look
        return False


def ensure_bpffs(pin_dir: Path) -> None:
    """Mounts a BPF file system at /sys/fs/bpf if `pin_dir` would not lie on one. BpfError if it cannot, or if the
    mount would not stay."""
    for mount in parse_mounts(Path("/proc/mounts").read_text(), "bpf"):
        if pin_dir.is_relative_to(mount):
            return
    target = Path("/sys/fs/bpf")
    if not pin_dir.is_relative_to(target):
        raise BpfError(f"{pin_dir} is not on a BPF file system and not below {target}: mount one there first")
    if not _in_the_hosts_mounts():
        # It would go with this process's mount namespace, and the datapath with it.
        raise BpfError(
            f"no BPF file system is mounted at {target}, and this process has mounts of its own, where one would not "
            f"outlive it: run `systemctl start isthmus-bpffs.service`, or `mount -t bpf bpf {target}`"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_char_p,
    )
    if libc.mount(b"bpf", os.fsencode(target), b"bpf", 0, b"mode=0700"):
        number = ctypes.get_errno()
        raise BpfError(f"cannot mount a BPF file system at {target}: {os.strerror(number)}", number)
