# SPDX-License-Identifier: GPL-3.0-or-later
"""libbpf >= 1.0 through ctypes.

Error convention of libbpf 1.x: functions that return int answer `-errno`, functions that return a
pointer answer NULL and set errno. Every function used is declared in `FUNCTIONS`; a library that
lacks one is refused when it is loaded, not when the function is called.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from isthmus_agent.bpf.errors import BpfError

# uapi/linux/bpf.h
PROG_TYPE_SCHED_CLS = 3
PROG_TYPE_CGROUP_SOCK = 9
PROG_TYPE_CGROUP_SOCK_ADDR = 18

MAP_TYPE_HASH = 1
MAP_TYPE_ARRAY = 2
MAP_TYPE_PERCPU_HASH = 5
MAP_TYPE_PERCPU_ARRAY = 6
MAP_TYPE_LRU_HASH = 9
MAP_TYPE_LRU_PERCPU_HASH = 10
MAP_TYPE_LPM_TRIE = 11
MAP_TYPE_SK_STORAGE = 24

HELPER_BIND = 64
HELPER_SKB_GET_TUNNEL_KEY = 20
HELPER_SKB_SET_TUNNEL_KEY = 21
HELPER_SKB_CHANGE_TYPE = 32
HELPER_GET_SOCKET_COOKIE = 46
HELPER_FIB_LOOKUP = 69
HELPER_SK_STORAGE_GET = 107
HELPER_GET_CURRENT_ANCESTOR_CGROUP_ID = 123
HELPER_REDIRECT_NEIGH = 152
HELPER_SET_RETVAL = 187

TC_INGRESS = 1
TC_EGRESS = 2
TC_F_REPLACE = 1


class TcHook(ctypes.Structure):
    """struct bpf_tc_hook."""

    _fields_ = [("sz", c_size_t), ("ifindex", c_int), ("attach_point", c_int), ("parent", c_uint32)]


class TcOpts(ctypes.Structure):
    """struct bpf_tc_opts."""

    _fields_ = [
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
    ]


class MapInfo(ctypes.Structure):
    """The head of struct bpf_map_info, as far as it is used; the kernel fills what fits."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", ctypes.c_char * 16),
    ]


class ProgInfo(ctypes.Structure):
    """The head of struct bpf_prog_info; lengths and addresses of 0 ask for nothing else."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint64),
        ("lengths", c_uint64),
        ("instructions", c_uint64 * 2),
        ("load_time", c_uint64),
        ("uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", ctypes.c_char * 16),
    ]


class CgroupLinkInfo(ctypes.Structure):
    """struct bpf_link_info of a cgroup link."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("pad", c_uint32),
        ("cgroup_id", c_uint64),
        ("attach_type", c_uint32),
        ("pad2", c_uint32),
    ]


_PRINT = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)
_U32P = POINTER(c_uint32)

# name -> (restype, argtypes)
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libbpf_major_version": (c_uint32, ()),
    "libbpf_minor_version": (c_uint32, ()),
    "libbpf_set_print": (c_void_p, (_PRINT,)),
    "libbpf_num_possible_cpus": (c_int, ()),
    "libbpf_probe_bpf_prog_type": (c_int, (c_int, c_void_p)),
    "libbpf_probe_bpf_map_type": (c_int, (c_int, c_void_p)),
    "libbpf_probe_bpf_helper": (c_int, (c_int, c_int, c_void_p)),
    "bpf_object__open_file": (c_void_p, (c_char_p, c_void_p)),
    "bpf_object__load": (c_int, (c_void_p,)),
    "bpf_object__close": (None, (c_void_p,)),
    "bpf_object__next_map": (c_void_p, (c_void_p, c_void_p)),
    "bpf_object__next_program": (c_void_p, (c_void_p, c_void_p)),
    "bpf_map__name": (c_char_p, (c_void_p,)),
    "bpf_map__fd": (c_int, (c_void_p,)),
    "bpf_map__type": (c_int, (c_void_p,)),
    "bpf_map__key_size": (c_uint32, (c_void_p,)),
    "bpf_map__value_size": (c_uint32, (c_void_p,)),
    "bpf_map__map_flags": (c_uint32, (c_void_p,)),
    "bpf_map__is_internal": (ctypes.c_bool, (c_void_p,)),
    "bpf_map__set_max_entries": (c_int, (c_void_p, c_uint32)),
    "bpf_map__set_pin_path": (c_int, (c_void_p, c_char_p)),
    "bpf_map__set_initial_value": (c_int, (c_void_p, c_char_p, c_size_t)),
    "bpf_program__name": (c_char_p, (c_void_p,)),
    "bpf_program__fd": (c_int, (c_void_p,)),
    "bpf_program__attach_cgroup": (c_void_p, (c_void_p, c_int)),
    "bpf_link__open": (c_void_p, (c_char_p,)),
    "bpf_link__fd": (c_int, (c_void_p,)),
    "bpf_link__pin": (c_int, (c_void_p, c_char_p)),
    "bpf_link__update_program": (c_int, (c_void_p, c_void_p)),
    "bpf_link__destroy": (c_int, (c_void_p,)),
    "bpf_obj_get": (c_int, (c_char_p,)),
    "bpf_obj_get_info_by_fd": (c_int, (c_int, c_void_p, _U32P)),
    "bpf_prog_get_fd_by_id": (c_int, (c_uint32,)),
    "bpf_prog_query": (c_int, (c_int, c_int, c_uint32, _U32P, _U32P, _U32P)),
    "bpf_map_lookup_elem": (c_int, (c_int, c_char_p, c_void_p)),
    "bpf_map_update_elem": (c_int, (c_int, c_char_p, c_char_p, c_uint64)),
    "bpf_map_delete_elem": (c_int, (c_int, c_char_p)),
    "bpf_map_get_next_key": (c_int, (c_int, c_char_p, c_void_p)),
    "bpf_map_lookup_batch": (c_int, (c_int, c_void_p, c_void_p, c_void_p, c_void_p, _U32P, c_void_p)),
    "bpf_map_update_batch": (c_int, (c_int, c_char_p, c_char_p, _U32P, c_void_p)),
    "bpf_tc_hook_create": (c_int, (POINTER(TcHook),)),
    "bpf_tc_hook_destroy": (c_int, (POINTER(TcHook),)),
    "bpf_tc_attach": (c_int, (POINTER(TcHook), POINTER(TcOpts))),
    "bpf_tc_detach": (c_int, (POINTER(TcHook), POINTER(TcOpts))),
    "bpf_tc_query": (c_int, (POINTER(TcHook), POINTER(TcOpts))),
}

_LOG_LINES = 40

# The lines collected by log() of the calling thread: libbpf has one print callback per process.
_LOG = threading.local()


def default_library() -> str:
    """The bundle's library, beside this interpreter's own; without one the system's."""
    bundled = Path(sys.prefix, "lib", "libbpf.so.1")
    return str(bundled) if bundled.is_file() else "libbpf.so.1"


class Libbpf:
    """One loaded libbpf. `path` None means the bundle's `libbpf.so.1`, else the system's."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.calls = 0  # of functions of the library: it grows while a caller gets on
        name = os.fspath(path) if path is not None else default_library()
        try:
            self._dll = ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            raise BpfError(
                f"cannot load {name}: {error}; install the agent's bundle again, or the distribution's libbpf 1.x "
                "with libelf and zlib"
            ) from error
        missing = [function for function in FUNCTIONS if not hasattr(self._dll, function)]
        if missing:
            raise BpfError(f"{name} is too old (libbpf 1.0 or later is needed): it lacks {', '.join(missing)}")
        for function, (restype, argtypes) in FUNCTIONS.items():
            entry = getattr(self._dll, function)
            entry.restype = restype
            entry.argtypes = argtypes
        self.version = (int(self._dll.libbpf_major_version()), int(self._dll.libbpf_minor_version()))
        if self.version[0] < 1:
            raise BpfError(f"{name} is libbpf {self.version[0]}.{self.version[1]}: 1.0 or later is needed")
        self._vsnprintf = ctypes.CDLL(None).vsnprintf
        self._vsnprintf.restype = c_int
        self._vsnprintf.argtypes = (c_char_p, c_size_t, c_void_p, c_void_p)
        # libbpf keeps the pointer: the callback object must live as long as the library.
        self._print = _PRINT(self._on_print)
        _KEEP.append(self._print)
        self._dll.libbpf_set_print(self._print)

    def _on_print(self, level: int, text: int, arguments: int) -> int:
        if level > 0:  # LIBBPF_WARN is 0; information and debugging are of no use in an error
            return 0
        lines = getattr(_LOG, "lines", None)
        if lines is None:
            return 0
        # The third argument is the C va_list, passed by pointer on x86-64 and arm64.
        buffer = ctypes.create_string_buffer(65536)
        self._vsnprintf(buffer, len(buffer), text, arguments)
        lines.extend(line for line in buffer.value.decode(errors="replace").splitlines() if line.strip())
        return 0

    @contextlib.contextmanager
    def log(self) -> Iterator[collections.deque[str]]:
        """Collects the last lines that libbpf writes in this thread, the verifier's among them."""
        lines: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        outer = getattr(_LOG, "lines", None)
        _LOG.lines = lines
        try:
            yield lines
        finally:
            _LOG.lines = outer

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            raise AttributeError(name)
        self.calls += 1
        return getattr(self._dll, name)

    def check(self, result: int, what: str) -> int:
        """`result` of a function that answers -errno, or BpfError saying `what` failed."""
        if result < 0:
            raise BpfError(f"{what}: {error_name(-result)}", -result)
        return result

    def pointer(self, result: int | None, what: str) -> int:
        """`result` of a function that answers a pointer, or BpfError."""
        if not result:
            number = ctypes.get_errno()
            raise BpfError(f"{what}: {error_name(number)}", number)
        return result


# Callbacks that C code may still call: collecting one would end the process with SIGSEGV.
_KEEP: list[Any] = []


def error_name(number: int) -> str:
    """Words for an errno; 524 is ENOTSUPP, which the kernel does not mean to show."""
    if number == 524:
        return "not supported by this kernel (ENOTSUPP)"
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"


class Object:
    """An opened BPF object file; close() gives back what is neither pinned nor attached by a pinned link."""

    def __init__(self, lib: Libbpf, path: Path) -> None:
        self.lib = lib
        self.path = path
        with lib.log() as lines:
            try:
                self._object: int | None = lib.pointer(
                    lib.bpf_object__open_file(os.fsencode(path), None), f"cannot open {path}"
                )
            except BpfError as error:
                raise _with_log(error, lines) from None
        self.maps: dict[str, int] = {}
        self.programs: dict[str, int] = {}
        self._rodata: int | None = None
        item = lib.bpf_object__next_map(self._object, None)
        while item:
            name = lib.bpf_map__name(item).decode()
            if lib.bpf_map__is_internal(item):
                if name.endswith(".rodata"):
                    self._rodata = item
            else:
                self.maps[name] = item
            item = lib.bpf_object__next_map(self._object, item)
        item = lib.bpf_object__next_program(self._object, None)
        while item:
            self.programs[lib.bpf_program__name(item).decode()] = item
            item = lib.bpf_object__next_program(self._object, item)

    def set_config(self, value: bytes) -> None:
        """Writes .rodata; `value` is the whole section. Only before load()."""
        if self._rodata is None:
            raise BpfError(f"{self.path} has no .rodata section: it was built from other sources than this agent")
        self.lib.check(
            self.lib.bpf_map__set_initial_value(self._rodata, value, len(value)),
            f"cannot write the configuration into {self.path} ({len(value)} bytes)",
        )

    def load(self) -> None:
        """Creates or reuses the maps and loads the programs; the error carries the end of the verifier's log."""
        with self.lib.log() as lines:
            try:
                self.lib.check(self.lib.bpf_object__load(self._object), f"the kernel refused {self.path}")
            except BpfError as error:
                raise _with_log(error, lines) from None

    def close(self) -> None:
        if self._object is not None:
            self.lib.bpf_object__close(self._object)
            self._object = None


def _with_log(error: BpfError, lines: collections.deque[str]) -> BpfError:
    return BpfError("\n  ".join([str(error), *lines]), error.errno)
