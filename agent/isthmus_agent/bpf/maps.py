# SPDX-License-Identifier: GPL-3.0-or-later
"""One BPF map by file descriptor: bytes in, bytes out, sizes checked."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from isthmus_agent.bpf import libbpf
from isthmus_agent.bpf.errors import CapacityError
from isthmus_agent.bpf.libbpf import Libbpf, MapInfo

_PER_CPU = (libbpf.MAP_TYPE_PERCPU_HASH, libbpf.MAP_TYPE_PERCPU_ARRAY, libbpf.MAP_TYPE_LRU_PERCPU_HASH)
_HASH = (
    libbpf.MAP_TYPE_HASH,
    libbpf.MAP_TYPE_PERCPU_HASH,
    libbpf.MAP_TYPE_LRU_HASH,
    libbpf.MAP_TYPE_LRU_PERCPU_HASH,
)
_BATCHED = (*_HASH, libbpf.MAP_TYPE_LPM_TRIE)
_BATCH = 1024
_FULL = (errno.E2BIG, errno.ENOSPC, errno.ENOMEM)


class Map:
    """A map of this process; `close()` closes the descriptor only when `owned`."""

    def __init__(self, lib: Libbpf, name: str, fd: int, owned: bool = False) -> None:
        info = MapInfo()
        length = ctypes.c_uint32(ctypes.sizeof(info))
        lib.check(lib.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(length)), f"cannot read map {name}")
        self.lib = lib
        self.name = name
        self.fd = fd
        self.type = int(info.type)
        self.key_size = int(info.key_size)
        self.value_size = int(info.value_size)
        self.max_entries = int(info.max_entries)
        self.flags = int(info.map_flags)
        self._owned = owned
        self.cpus = 1
        self.stride = self.value_size  # bytes of one CPU's value as the kernel copies it
        if self.type in _PER_CPU:
            self.cpus = lib.check(lib.libbpf_num_possible_cpus(), "cannot count the CPUs")
            self.stride = (self.value_size + 7) & ~7

    @classmethod
    def pinned(cls, lib: Libbpf, path: Path) -> Map:
        """The map pinned at `path`."""
        fd = lib.check(lib.bpf_obj_get(os.fsencode(path)), f"cannot open the pinned map {path}")
        return cls(lib, path.name, fd, owned=True)

    def close(self) -> None:
        if self._owned:
            os.close(self.fd)
            self._owned = False

    def _key(self, key: bytes) -> bytes:
        # libbpf and the kernel read key_size bytes whatever the object's length is.
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name}: key of {len(key)} bytes, {self.key_size} expected")
        return key

    def _value(self, value: bytes) -> bytes:
        if len(value) != self.stride * self.cpus:
            raise ValueError(f"map {self.name}: value of {len(value)} bytes, {self.stride * self.cpus} expected")
        return value

    def get(self, key: bytes) -> bytes | None:
        """The value (all CPUs' one after another in a per-CPU map), or None."""
        value = ctypes.create_string_buffer(self.stride * self.cpus)
        result = self.lib.bpf_map_lookup_elem(self.fd, self._key(key), value)
        if result == -errno.ENOENT:
            return None
        self.lib.check(result, f"cannot read map {self.name}")
        return value.raw

    def put(self, key: bytes, value: bytes) -> None:
        result = self.lib.bpf_map_update_elem(self.fd, self._key(key), self._value(value), 0)
        if -result in _FULL:
            raise CapacityError(self.name, self.max_entries + 1, self.max_entries)
        self.lib.check(result, f"cannot write map {self.name}")

    def put_all(self, entries: Mapping[bytes, bytes]) -> None:
        """All of `entries`, in batches; CapacityError when the map is full."""
        items = list(entries.items())
        for start in range(0, len(items), _BATCH):
            chunk = items[start : start + _BATCH]
            if len(chunk) == 1:
                self.put(*chunk[0])
                continue
            count = ctypes.c_uint32(len(chunk))
            keys = b"".join(self._key(key) for key, _ in chunk)
            values = b"".join(self._value(value) for _, value in chunk)
            result = self.lib.bpf_map_update_batch(self.fd, keys, values, ctypes.byref(count), None)
            if result == 0:
                continue
            # Which one failed is not said for every map type: do them singly, the error is then exact.
            for key, value in chunk:
                self.put(key, value)

    def delete(self, key: bytes) -> bool:
        """False if there was none."""
        result = self.lib.bpf_map_delete_elem(self.fd, self._key(key))
        if result == -errno.ENOENT:
            return False
        self.lib.check(result, f"cannot remove an entry of map {self.name}")
        return True

    def delete_all(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self.delete(key)

    def walk(self) -> Iterator[bytes]:
        """All keys."""
        following = ctypes.create_string_buffer(self.key_size)
        key: bytes | None = None
        while True:
            result = self.lib.bpf_map_get_next_key(self.fd, key, following)
            if result == -errno.ENOENT:
                return
            self.lib.check(result, f"cannot walk map {self.name}")
            key = following.raw
            yield key

    def items(self) -> dict[bytes, bytes]:
        """The whole map. Entries that programs change meanwhile are seen before or after the change."""
        if self.type in _BATCHED:
            return self._items_by_batch()
        found: dict[bytes, bytes] = {}
        for key in self.walk():
            value = self.get(key)
            if value is not None:
                found[key] = value
        return found

    def _items_by_batch(self) -> dict[bytes, bytes]:
        size = self.stride * self.cpus
        batch = min(_BATCH, self.max_entries)
        found: dict[bytes, bytes] = {}
        position = ctypes.create_string_buffer(max(4, self.key_size))
        start: ctypes.Array[ctypes.c_char] | None = None
        while True:
            keys = ctypes.create_string_buffer(batch * self.key_size)
            values = ctypes.create_string_buffer(batch * size)
            count = ctypes.c_uint32(batch)
            result = self.lib.bpf_map_lookup_batch(self.fd, start, position, keys, values, ctypes.byref(count), None)
            if result == -errno.ENOSPC:
                # One bucket holds more than fits: same place again with more room.
                batch *= 2
                continue
            if result not in (0, -errno.ENOENT):
                self.lib.check(result, f"cannot read map {self.name}")
            done, raw_keys, raw_values = count.value, keys.raw, values.raw
            for index in range(done):
                key = raw_keys[index * self.key_size : (index + 1) * self.key_size]
                found[key] = raw_values[index * size : (index + 1) * size]
            if result == -errno.ENOENT:
                return found
            start = ctypes.create_string_buffer(position.raw, len(position))

    def per_cpu(self, value: bytes) -> Iterator[bytes]:
        """One value per CPU out of what get() or items() gave."""
        for cpu in range(self.cpus):
            yield value[cpu * self.stride : cpu * self.stride + self.value_size]
