# SPDX-License-Identifier: GPL-3.0-or-later
"""What this kernel lacks for the datapath, by trial: kernels of distributions carry backports, so a
version number says little. Leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

from isthmus_agent.bpf import libbpf
from isthmus_agent.bpf.driver import BpfDatapath
from isthmus_agent.bpf.errors import BpfError
from isthmus_agent.bpf.mounts import cgroup2_root

_CLONE_NEWNET = 0x40000000

_PROGRAMS = {
    "socket address programs (CONFIG_CGROUP_BPF)": libbpf.PROG_TYPE_CGROUP_SOCK_ADDR,
    "cgroup socket programs (CONFIG_CGROUP_BPF)": libbpf.PROG_TYPE_CGROUP_SOCK,
    "tc programs (CONFIG_NET_CLS_BPF)": libbpf.PROG_TYPE_SCHED_CLS,
}
_MAPS = {
    "hash maps": libbpf.MAP_TYPE_HASH,
    "per-CPU hash maps": libbpf.MAP_TYPE_PERCPU_HASH,
    "LRU hash maps": libbpf.MAP_TYPE_LRU_HASH,
    "per-CPU LRU hash maps": libbpf.MAP_TYPE_LRU_PERCPU_HASH,
    "longest-prefix-match maps": libbpf.MAP_TYPE_LPM_TRIE,
    "socket storage maps": libbpf.MAP_TYPE_SK_STORAGE,
}
_HELPERS = {
    "bpf_bind in connect hooks": (libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, libbpf.HELPER_BIND),
    "bpf_get_socket_cookie in socket hooks": (libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, libbpf.HELPER_GET_SOCKET_COOKIE),
    "bpf_sk_storage_get in socket hooks": (libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, libbpf.HELPER_SK_STORAGE_GET),
    "bpf_get_current_ancestor_cgroup_id in socket hooks": (
        libbpf.PROG_TYPE_CGROUP_SOCK_ADDR,
        libbpf.HELPER_GET_CURRENT_ANCESTOR_CGROUP_ID,
    ),
    "bpf_skb_set_tunnel_key": (libbpf.PROG_TYPE_SCHED_CLS, libbpf.HELPER_SKB_SET_TUNNEL_KEY),
    "bpf_skb_get_tunnel_key": (libbpf.PROG_TYPE_SCHED_CLS, libbpf.HELPER_SKB_GET_TUNNEL_KEY),
    "bpf_skb_change_type": (libbpf.PROG_TYPE_SCHED_CLS, libbpf.HELPER_SKB_CHANGE_TYPE),
    "bpf_fib_lookup": (libbpf.PROG_TYPE_SCHED_CLS, libbpf.HELPER_FIB_LOOKUP),
    "bpf_redirect_neigh": (libbpf.PROG_TYPE_SCHED_CLS, libbpf.HELPER_REDIRECT_NEIGH),
}


def missing_features(
    library: str | os.PathLike[str] | None = None, objects_dir: str | os.PathLike[str] | None = None
) -> list[str]:
    """Names of what is missing, empty if the datapath can run here. Needs root.

    First single features, which have names; if they are all there, our own programs are loaded without
    pins and attached to a scratch cgroup and to a scratch network namespace."""
    try:
        lib = libbpf.Libbpf(library)
        root = cgroup2_root()
    except BpfError as error:
        return [str(error)]
    missing = []
    if "\tbpf\n" not in Path("/proc/filesystems").read_text():
        missing.append("the BPF file system (CONFIG_BPF_SYSCALL)")
    with lib.log():
        missing += [name for name, kind in _PROGRAMS.items() if lib.libbpf_probe_bpf_prog_type(kind, None) != 1]
        missing += [name for name, kind in _MAPS.items() if lib.libbpf_probe_bpf_map_type(kind, None) != 1]
        missing += [
            name for name, (kind, helper) in _HELPERS.items() if lib.libbpf_probe_bpf_helper(kind, helper, None) != 1
        ]
    return missing or _trial(root, library, objects_dir)


def _trial(root: Path, library: str | os.PathLike[str] | None, objects_dir: str | os.PathLike[str] | None) -> list[str]:
    missing = []
    scratch = root / f"isthmus-probe-{os.getpid()}"
    datapath = BpfDatapath(cgroup_root=scratch, objects_dir=objects_dir, libbpf=library)
    try:
        datapath.open(1, pin=False)
    except BpfError as error:
        return [f"loading our programs: {error}"]
    try:
        scratch.mkdir()
        try:
            datapath.try_cgroup_links()
        except BpfError as error:
            missing.append(f"cgroup links: {error}")
        finally:
            scratch.rmdir()
        try:
            _in_new_namespace(lambda: datapath.attach_overlay(1))
        except BpfError as error:
            missing.append(f"tc clsact with BPF (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF): {error}")
    finally:
        datapath.close()
    return missing


def _in_new_namespace(function: Callable[[], None]) -> None:
    """Runs `function` in a thread with a network namespace of its own, which goes with the thread."""
    failures: list[BpfError] = []

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if libc.unshare(_CLONE_NEWNET):
                number = ctypes.get_errno()
                raise BpfError(f"cannot make a network namespace: {os.strerror(number)}", number)
            function()
        except BpfError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
