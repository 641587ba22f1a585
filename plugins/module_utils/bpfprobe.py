# SPDX-License-Identifier: BSD-2-Clause
"""What the running kernel can do, found by asking it: no version numbers, because distributions move features back.

Every probe leaves nothing behind: programs and maps are closed at once, the VXLAN device is made in a network
namespace of its own that ends with the probing process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import strangers

_SYS_BPF = {"x86_64": 321, "aarch64": 280}

_MAP_CREATE, _PROG_LOAD, _BTF_LOAD, _LINK_CREATE = 0, 5, 18, 28
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 13, 15, 16
_SCHED_CLS, _CGROUP_SOCK_ADDR = 3, 18
_CLONE_NEWNET = 0x40000000

_HOOKS = dict(strangers.HOOKS)

# name: (enum bpf_map_type, key size, value size, entries, flags)
_MAPS = {
    "hash map": (1, 4, 4, 1, 0),
    "array map with mmap": (2, 4, 4, 1, 1 << 10),
    "LPM trie map": (11, 8, 4, 1, 1),
    "LRU hash map": (9, 4, 4, 1, 0),
    "per-CPU array map": (6, 4, 8, 1, 0),
}


class _Bpf:
    """bpf(2). A failed call gives a negative errno."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.number = _SYS_BPF[platform.machine()]

    def call(self, command: int, attributes: bytes) -> int:
        buffer = ctypes.create_string_buffer(attributes, len(attributes))
        result: int = self.libc.syscall(self.number, command, buffer, len(attributes))
        return result if result >= 0 else -ctypes.get_errno()

    def opens(self, command: int, attributes: bytes) -> int:
        """0 when the command gave a descriptor (which is closed), else the errno."""
        handle = self.call(command, attributes)
        if handle < 0:
            return -handle
        os.close(handle)
        return 0

    def program(self, kind: int, attach: int) -> int:
        # r0 = 1; exit
        code = ctypes.create_string_buffer(bytes.fromhex("b7000000010000009500000000000000"), 16)
        licence = ctypes.create_string_buffer(b"GPL")
        attributes = struct.pack(
            "=IIQQIIQII16sII", kind, 2, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0, 0, 0, b"", 0, attach
        )
        return self.opens(_PROG_LOAD, attributes)

    def attached(self, cgroup: int, attach: int) -> list[int]:
        """Ids of the programs at a hook of exactly the cgroup that is open as `cgroup`."""
        ids = ctypes.create_string_buffer(4 * 64)
        query = struct.pack("=IIIIQII", cgroup, attach, 0, 0, ctypes.addressof(ids), 64, 0)
        attributes = ctypes.create_string_buffer(query, len(query))
        if self.libc.syscall(self.number, _PROG_QUERY, attributes, len(attributes)) != 0:
            return []
        count = struct.unpack_from("=I", attributes, 24)[0]
        return list(struct.unpack_from(f"={count}I", ids))

    def program_name(self, number: int) -> str:
        """The name of a loaded program, at most 15 characters; empty when it is gone, or was loaded without one."""
        handle = self.call(_PROG_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))
        if handle < 0:
            return ""
        try:
            info = ctypes.create_string_buffer(80)  # struct bpf_prog_info up to its `name`
            self.call(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", handle, len(info), ctypes.addressof(info)))
            return info.raw[64:80].split(b"\0")[0].decode("ascii", errors="replace")
        finally:
            os.close(handle)

    def socket_storage(self) -> int:
        # The smallest BTF: one 32-bit integer type, which is key and value.
        types = struct.pack("=IIII", 1, 1 << 24, 4, 32)
        strings = b"\0int\0"
        blob = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings
        content = ctypes.create_string_buffer(blob, len(blob))
        handle = self.call(_BTF_LOAD, struct.pack("=QQIIII", ctypes.addressof(content), 0, len(blob), 0, 0, 0))
        if handle < 0:
            return -handle
        try:
            return self.opens(_MAP_CREATE, struct.pack("=IIIIIII16sIIII", 24, 4, 4, 0, 1, 0, 0, b"", 0, handle, 1, 1))
        finally:
            os.close(handle)


def missing_features() -> list[str]:
    """What the kernel lacks, each by name with the kernel's reason; empty when all is there.

    Needs root. The caller has checked the architecture.
    """
    bpf = _Bpf()
    lacking = []
    first = bpf.opens(_MAP_CREATE, struct.pack("=IIIII", *_MAPS["hash map"]))
    if first in (errno.EPERM, errno.EACCES):
        return [
            f"the bpf() system call ({os.strerror(first)}: kernel lockdown, a security module or a container's filter "
            "forbids it; see `cat /sys/kernel/security/lockdown`)"
        ]
    if first == errno.ENOSYS:
        return ["the bpf() system call (the kernel is built without CONFIG_BPF_SYSCALL)"]
    for name, layout in _MAPS.items():
        error = bpf.opens(_MAP_CREATE, struct.pack("=IIIII", *layout))
        if error:
            lacking.append(f"BPF {name} ({os.strerror(error)})")
    error = bpf.socket_storage()
    if error:
        lacking.append(f"BPF socket storage ({os.strerror(error)})")
    for name, attach in _HOOKS.items():
        error = bpf.program(_CGROUP_SOCK_ADDR, attach)
        if error:
            lacking.append(f"BPF cgroup hook {name} ({os.strerror(error)}; CONFIG_CGROUP_BPF)")
    error = bpf.program(_SCHED_CLS, 0)
    if error:
        lacking.append(f"BPF traffic control programs ({os.strerror(error)}; CONFIG_NET_CLS_BPF)")
    # No such descriptor is the answer of a kernel that knows the command.
    error = -bpf.call(_LINK_CREATE, struct.pack("=iiII", -1, -1, _HOOKS["connect4"], 0))
    if error != errno.EBADF:
        lacking.append(f"BPF links ({os.strerror(error)})")
    error = vxlan_error()
    if error:
        lacking.append(f"VXLAN devices in external mode ({os.strerror(error)}; CONFIG_VXLAN, module vxlan)")
    return lacking


def foreign_programs(cgroup: str) -> dict[str, list[str]]:
    """Programs of others at the mesh's hooks of a cgroup, by hook; ours are named like their hooks. Needs root.

    A program without a name is told by its number.
    """
    bpf = _Bpf()
    handle = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = {
            hook: [bpf.program_name(number) or f"number {number}" for number in bpf.attached(handle, attach)]
            for hook, attach in _HOOKS.items()
        }
    finally:
        os.close(handle)
    strangers = {hook: [name for name in names if name != hook] for hook, names in found.items()}
    return {hook: names for hook, names in strangers.items() if names}


def _attribute(kind: int, payload: bytes) -> bytes:
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + b"\0" * (-length % 4)


def _make_vxlan() -> int:
    """RTM_NEWLINK of a collect-metadata VXLAN device in the caller's namespace; 0 or the errno."""
    data = _attribute(25, b"\x01") + _attribute(15, struct.pack(">H", 8472))  # COLLECT_METADATA, PORT
    info = _attribute(1, b"vxlan\0") + _attribute(2, data)  # INFO_KIND, INFO_DATA
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _attribute(3, b"probe\0") + _attribute(18, info)  # IFNAME, LINKINFO
    # RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE
    message = struct.pack("=IHHII", 16 + len(body), 16, 0x1 | 0x4 | 0x200 | 0x400, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.settimeout(10)
        netlink.send(message)
        answer = netlink.recv(65536)
    return -int(struct.unpack_from("=i", answer, 16)[0])


def vxlan_error() -> int:
    """0 when the kernel makes VXLAN devices, else the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        code = errno.EIO
        try:
            code = ctypes.get_errno() if libc.unshare(_CLONE_NEWNET) != 0 else _make_vxlan()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cgroup2_mount() -> str | None:
    """Where cgroup2 is mounted: `/sys/fs/cgroup`, or elsewhere on hosts with the hybrid layout."""
    return _mount("cgroup2")


def bpffs_mount() -> str | None:
    """Where the BPF file system is mounted."""
    return _mount("bpf")


def _mount(kind: str) -> str | None:
    with open("/proc/mounts", encoding="utf-8") as file:
        for line in file:
            fields = line.split()
            if fields[2] == kind:
                return fields[1]
    return None


def known_filesystem(name: str) -> bool:
    """Whether the kernel knows the file system."""
    with open("/proc/filesystems", encoding="utf-8") as file:
        return any(line.split()[-1] == name for line in file)
