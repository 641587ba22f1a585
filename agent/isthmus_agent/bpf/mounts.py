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


def ensure_bpffs(pin_dir: Path) -> None:
    """Mounts a BPF file system at /sys/fs/bpf (or at the top of `pin_dir`'s first missing part) if `pin_dir`
    would not lie on one."""
    for mount in parse_mounts(Path("/proc/mounts").read_text(), "bpf"):
        if pin_dir.is_relative_to(mount):
            return
    target = Path("/sys/fs/bpf")
    if not pin_dir.is_relative_to(target):
        raise BpfError(f"{pin_dir} is not on a BPF file system and not below {target}: mount one there first")
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
