# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs of others at hooks of a cgroup, for tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from ansible_collections.isthmus.mesh.plugins.module_utils import bpfprobe

_PROG_LOAD, _PROG_ATTACH, _ALLOW_MULTI = 5, 8, 2  # bpf(2), include/uapi/linux/bpf.h


@contextlib.contextmanager
def attached(cgroup: Path, programs: Mapping[str, bytes]) -> Iterator[None]:
    """A program at each hook by its name there, which lets everything through; it stays until the cgroup goes."""
    bpf = bpfprobe._Bpf()
    opened = [os.open(cgroup, os.O_RDONLY)]
    try:
        code = ctypes.create_string_buffer(bytes.fromhex("b7000000010000009500000000000000"), 16)
        licence = ctypes.create_string_buffer(b"GPL")
        for hook, name in programs.items():
            attach = bpfprobe._HOOKS[hook]
            places = ctypes.addressof(code), ctypes.addressof(licence)
            program = bpf.call(
                _PROG_LOAD, struct.pack("=IIQQIIQII16sII", 18, 2, *places, 0, 0, 0, 0, 0, name, 0, attach)
            )
            assert program > 0, f"{hook}: {os.strerror(-program)}"
            opened.append(program)
            assert bpf.call(_PROG_ATTACH, struct.pack("=IIIII", opened[0], program, attach, _ALLOW_MULTI, 0)) == 0
        yield
    finally:
        for handle in opened:
            os.close(handle)
