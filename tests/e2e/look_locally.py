# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on a lab machine as some user and prints what that user can do to what is ours there, as JSON; standard library
only. On stdin: `{}` for root, who finds what there is, and for others what root found. See `test_host_security.py`."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import socket
import sys

TREES = ("/etc/isthmus", "/opt/isthmus", "/var/lib/isthmus", "/run/isthmus")
KEPT = ("agent", "registrar", "etcd", "etcd.removed-*", "snapshots")  # below /var/lib/isthmus
AGENT = "/run/isthmus/agent.sock"
PINS = "/sys/fs/bpf/isthmus/v1"
BPF_OBJ_GET = 7
SYS_BPF = {"x86_64": 321, "aarch64": 280}[os.uname().machine]


class ObjGet(ctypes.Structure):
    """`union bpf_attr` of BPF_OBJ_GET (linux/bpf.h)."""

    _fields_ = (("pathname", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32))


def opens(pin):
    """Whether the map or link behind a pin can be had, to read and write."""
    name = ctypes.create_string_buffer(pin.encode())
    request = ObjGet(pathname=ctypes.addressof(name))
    fd = ctypes.CDLL(None).syscall(SYS_BPF, BPF_OBJ_GET, ctypes.byref(request), ctypes.sizeof(request))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def connects(path):
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        return True


def reads(path):
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


def below(top):
    return [os.path.join(where, name) for where, _, names in os.walk(top) for name in names]


def private(path):
    with open(path, "rb") as file:
        return b"PRIVATE KEY-----" in file.read()


def secrets():
    """What agent, registrar and etcd keep, and whatever has a private key in it."""
    kept = {path for pattern in KEPT for top in glob.glob(f"/var/lib/isthmus/{pattern}") for path in below(top)}
    others = {path for top in ("/etc/isthmus", "/var/lib/isthmus", "/run/isthmus") for path in below(top)} - kept
    return sorted({*kept, *(path for path in others if os.path.isfile(path) and private(path))})


given = json.load(sys.stdin) or {"secrets": secrets(), "pins": below(PINS)}
places = [*TREES, *(path for top in TREES for path in below(top)), *glob.glob("/etc/systemd/system/isthmus*")]
places += [where for top in TREES for where, _, _ in os.walk(top)]
print(
    json.dumps(
        {
            **given,
            "read": [path for path in given["secrets"] if reads(path)],
            "opened": [path for path in given["pins"] if opens(path)],
            "connected": connects(AGENT),
            "writable": sorted({path for path in places if not os.path.islink(path) and os.access(path, os.W_OK)}),
        }
    )
)
