# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong between us and the kernel's BPF, in words."""

from __future__ import annotations


class BpfError(Exception):
    """A libbpf or bpf(2) call failed; `errno` is positive, 0 when there is none."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class CapacityError(BpfError):
    """A map is too small for what is wanted; nothing was removed from it."""

    def __init__(self, name: str, wanted: int, maximum: int) -> None:
        super().__init__(
            f"map {name} holds at most {maximum} entries, {wanted} are wanted: the datapath keeps what it has; "
            "remove services, workloads or clusters from this host's view"
        )
        self.map = name
        self.wanted = wanted
        self.maximum = maximum
