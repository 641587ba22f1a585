# SPDX-License-Identifier: BSD-2-Clause
"""What the file system that will hold etcd's data gives: room, and how long it takes to make a write durable."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass

_MIB = 1024**2

# etcd appends entries of about this size to its log and waits for each (its own advice for measuring a disk with fio).
_ENTRY = 2048
_WRITES = 50

GUIDANCE = 0.010
"""Seconds of the 99th percentile below which etcd's documentation wants a disk."""

UNUSABLE = 0.5
"""Seconds of the median at which etcd could not keep a leader: four writes in its election timeout of 2 s."""


@dataclass(frozen=True)
class Syncs:
    """Durable writes in seconds: the middle one and the 99th percentile of `count`."""

    count: int
    median: float
    slow: float


def existing(path: str) -> str:
    """`path`, or the nearest directory above it that is there: its file system will hold it."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def free(path: str) -> int:
    """Bytes that can still be written below `path`, by an ordinary user."""
    found = os.statvfs(existing(path))
    return found.f_bavail * found.f_frsize


def measure(path: str, seconds: float = 1.0) -> Syncs:
    """Write and fdatasync below `path` as etcd does, for about `seconds`; nothing of it is left there."""
    taken = []
    with tempfile.TemporaryFile(dir=existing(path), buffering=0) as file:
        # etcd's log is allocated ahead too.
        os.posix_fallocate(file.fileno(), 0, _ENTRY * (_WRITES + 1))
        os.fsync(file.fileno())
        deadline = time.monotonic() + seconds
        for _number in range(_WRITES):
            began = time.monotonic()
            file.write(b"\0" * _ENTRY)
            os.fdatasync(file.fileno())
            taken.append(time.monotonic() - began)
            if time.monotonic() > deadline:
                break
    taken.sort()
    return Syncs(len(taken), taken[len(taken) // 2], taken[min(len(taken) - 1, len(taken) * 99 // 100)])


def etcd_room(quota: int) -> tuple[int, int]:
    """Bytes that etcd must have to begin, and those that it can come to need.

    The log takes two segments of 64 MiB at once and up to five in time, beside its snapshots; the data grows to the
    quota, and a snapshot of it (before a restart, of the operator) is as large again.
    """
    return min(quota, 512 * _MIB) + 512 * _MIB, 2 * quota + 512 * _MIB


def size(count: int) -> str:
    """In words."""
    return f"{count / 1024 / _MIB:.1f} GiB" if count >= 1024 * _MIB else f"{count / _MIB:.0f} MiB"
