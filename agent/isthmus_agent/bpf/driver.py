# SPDX-License-Identifier: GPL-3.0-or-later
"""The datapath of one host: loads the programs, attaches them, and makes the maps what is wanted.

All functions are synchronous and may take tens of milliseconds: call them in a thread. One object is
used by one thread at a time. Maps and links are pinned, so traffic goes on without this process and
the next one takes over what is there. Network namespace and mounts are the calling thread's.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path

from isthmus_mesh.strangers import HOOKS

from isthmus_agent.bpf import abi
from isthmus_agent.bpf.errors import BpfError, CapacityError
from isthmus_agent.bpf.libbpf import (
    HELPER_SET_RETVAL,
    PROG_TYPE_CGROUP_SOCK_ADDR,
    TC_EGRESS,
    TC_F_REPLACE,
    TC_INGRESS,
    CgroupLinkInfo,
    Libbpf,
    Object,
    ProgInfo,
    TcHook,
    TcOpts,
    error_name,
)
from isthmus_agent.bpf.maps import Map
from isthmus_agent.bpf.mounts import cgroup2_root, ensure_bpffs
from isthmus_agent.bpf.slots import Arena, ArenaFull
from isthmus_agent.desired.datapath import (
    Address,
    Backend,
    Datapath,
    Frontend,
    IpcacheEntry,
    Network,
    Peer,
    Service,
    WireGuard,
)

PIN_DIR = Path(f"/sys/fs/bpf/isthmus/v{abi.ABI_VERSION}")
OBJECTS_DIR = Path(__file__).parent / "objects"

CGROUP_PROGRAMS = (
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "sock_release",
)
MOST_AT_A_HOOK = 64
"""Programs that a hook of a cgroup can have: BPF_CGROUP_MAX_PROGS of kernel/bpf/cgroup.c."""
OVERLAY_PROGRAMS = {"overlay_ingress": TC_INGRESS, "overlay_egress": TC_EGRESS}
WIREGUARD_PROGRAMS = {"wireguard_ingress": TC_INGRESS, "wireguard_egress": TC_EGRESS}
UNDERLAY_PROGRAMS = {"underlay_ingress": TC_INGRESS, "underlay_egress": TC_EGRESS}

# Fixed, so that a new agent replaces the old one's filter in one step.
TC_HANDLE = 1
TC_PRIORITY = 73

# Maps that the agent alone fills, hence that can be full; the LRU maps evict instead.
FILLED_MAPS = ("svc", "backends", "ipcache_host", "ipcache_cidr", "local", "peers", "workloads", "untranslated")

# How long sockets_of() still knows a backend that apply() removed.
GONE_SECONDS = 600.0

NO_FRONTEND = Frontend(IPv4Address(0), 0, 0)

BackendKey = tuple[Address, int, int]  # address, port, protocol


@dataclass(frozen=True, slots=True)
class MapChange:
    """How many entries of one map were added, rewritten and removed."""

    added: int = 0
    changed: int = 0
    removed: int = 0

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What apply() did: only maps that changed are listed. False when nothing had to be done."""

    maps: dict[str, MapChange] = field(default_factory=dict)
    removed_backends: tuple[BackendKey, ...] = ()
    problems: tuple[str, ...] = ()  # what was left out because a map is too small

    def __bool__(self) -> bool:
        return bool(self.maps)


@dataclass(frozen=True, slots=True)
class BackendCount:
    """Connections and unconnected datagrams sent to a backend since its map entry was made."""

    connects: int
    datagrams: int


@dataclass(frozen=True, slots=True)
class IdentityCount:
    """What arrived over the overlay for `destination` from senders of one identity of one cluster."""

    destination: Address
    identity: int
    cluster_id: int
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Counters:
    """`drops` by reason name in lower case, all reasons always present, in packets."""

    backends: dict[BackendKey, BackendCount]
    drops: dict[str, int]
    identities: tuple[IdentityCount, ...]


@dataclass(frozen=True, slots=True)
class Capacity:
    """Entries in use and the most there can be."""

    used: int
    maximum: int


@dataclass(slots=True)
class _Plan:
    """Difference between one map and what it should hold."""

    name: str
    put: dict[bytes, bytes]
    delete: set[bytes]
    change: MapChange


@dataclass(frozen=True, slots=True)
class _Known:
    """What apply() left in the maps, and the whole image of `datapath`. The agent alone writes these maps."""

    datapath: Datapath
    image: dict[str, dict[bytes, bytes]]
    maps: dict[str, dict[bytes, bytes]]


class BpfDatapath:
    """Programs and maps of this host. Call open() (or open_pinned()) first."""

    def __init__(
        self,
        pin_dir: str | os.PathLike[str] = PIN_DIR,
        cgroup_root: str | os.PathLike[str] | None = None,
        objects_dir: str | os.PathLike[str] | None = None,
        libbpf: str | os.PathLike[str] | None = None,
        max_entries: Mapping[str, int] | None = None,
    ) -> None:
        """`cgroup_root` None: the cgroup2 mount of /proc/mounts. `libbpf` None: the bundle's
        library, else the system's.
        `max_entries` sets sizes of maps that are not pinned yet."""
        self.pin_dir = Path(pin_dir)
        self._cgroup_root = Path(cgroup_root) if cgroup_root is not None else None
        self.objects_dir = Path(objects_dir) if objects_dir is not None else OBJECTS_DIR
        self.lib = Libbpf(libbpf)
        self._max_entries = dict(max_entries or {})
        self._objects: dict[str, Object] = {}
        self._maps: dict[str, Map] = {}
        self._slots: mmap.mmap | None = None
        self._slot_view: memoryview | None = None
        self._arena = Arena(0)
        self._gone: dict[int, tuple[float, BackendKey]] = {}
        self._known: _Known | None = None

    @property
    def cgroup_root(self) -> Path:
        if self._cgroup_root is None:
            self._cgroup_root = cgroup2_root()
        return self._cgroup_root

    # Loading

    def open(self, cluster_id: int, identity_shift: int = 16, pin: bool = True) -> None:
        """Loads both objects against the pinned maps (made where missing). Attaches nothing.

        Without `pin` the maps are new ones of each object and go with close(): a trial."""
        self.close()
        if pin:
            ensure_bpffs(self.pin_dir)
            self.pin_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.pin_dir.chmod(0o700)
        flags = abi.CONFIG_SET_RETVAL if self.has_set_retval() else 0
        config = abi.CONFIG.pack(cluster_id, identity_shift, flags)
        for name in ("cgroup", "overlay"):
            path = self.objects_dir / f"{name}.bpf.o"
            if not path.is_file():
                raise BpfError(f"{path} is missing: install the agent's bundle again, or run `make -C bpf`")
            loaded = Object(self.lib, path)
            self._objects[name] = loaded
            loaded.set_config(config)
            for map_name, handle in loaded.maps.items():
                if pin:
                    self._set_pin(map_name, handle)
            loaded.load()
            for map_name, handle in loaded.maps.items():
                if map_name not in self._maps:
                    self._maps[map_name] = Map(self.lib, map_name, self.lib.bpf_map__fd(handle))
        self._map_slots()

    def open_pinned(self) -> None:
        """Opens the pinned maps only, for reading what a running or dead agent left there."""
        self.close()
        if not (self.pin_dir / "svc").exists():
            raise BpfError(f"nothing is pinned in {self.pin_dir}: the datapath was never loaded on this host")
        for path in sorted(self.pin_dir.iterdir()):
            if not path.is_dir():
                self._maps[path.name] = Map.pinned(self.lib, path)
        self._map_slots()

    def close(self) -> None:
        """Gives back this process's handles. Pinned maps and links, and filters, stay."""
        if self._slot_view is not None:
            self._slot_view.release()
            self._slot_view = None
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        self._known = None
        for each in self._maps.values():
            each.close()
        self._maps.clear()
        for loaded in self._objects.values():
            loaded.close()
        self._objects.clear()

    def has_set_retval(self) -> bool:
        """Whether programs can choose the error of a refused call (6.1 and later; else it is EPERM)."""
        with self.lib.log():
            return bool(self.lib.libbpf_probe_bpf_helper(PROG_TYPE_CGROUP_SOCK_ADDR, HELPER_SET_RETVAL, None) == 1)

    def _set_pin(self, name: str, handle: int) -> None:
        path = self.pin_dir / name
        # A pinned map keeps the size it was made with: asking for another one would make the load fail.
        size = self._max_entries.get(name)
        if path.exists():
            pinned = Map.pinned(self.lib, path)
            geometry = (pinned.type, pinned.key_size, pinned.value_size, pinned.flags)
            pinned_size = pinned.max_entries
            pinned.close()
            if geometry == self._geometry(handle):
                size = pinned_size
            else:
                # An older version's: its programs keep it until ours replace them, after apply() filled the new one.
                path.unlink()
        if size:
            self.lib.check(
                self.lib.bpf_map__set_max_entries(handle, size), f"cannot set the size of map {name} to {size}"
            )
        self.lib.check(self.lib.bpf_map__set_pin_path(handle, os.fsencode(path)), f"cannot set the pin path {path}")

    def _geometry(self, handle: int) -> tuple[int, int, int, int]:
        return (
            self.lib.bpf_map__type(handle),
            self.lib.bpf_map__key_size(handle),
            self.lib.bpf_map__value_size(handle),
            self.lib.bpf_map__map_flags(handle),
        )

    def _map_slots(self) -> None:
        slots = self._maps["slots"]
        # Elements are padded to 8 bytes.
        self._slots = mmap.mmap(slots.fd, _page_align(slots.max_entries * 8), mmap.MAP_SHARED)
        self._slot_view = memoryview(self._slots).cast("Q")
        used = []
        for value in self._maps["svc"].items().values():
            _, base, count, _ = abi.SVC_VALUE.unpack(value)
            used.append((base, count))
        self._arena = Arena(slots.max_entries, used)

    def unpinned(self) -> list[str]:
        """Names of maps whose pins are gone: the next process would start with others."""
        return [name for name in sorted(self._maps) if not (self.pin_dir / name).exists()]

    def _program(self, object_name: str, program: str) -> int:
        if object_name not in self._objects:
            raise BpfError(f"program {program} is not loaded: open() comes first")
        return self._objects[object_name].programs[program]

    # Attaching

    def attach_cgroup(self) -> None:
        """Attaches the socket hooks to the cgroup root by pinned links; links that are there are updated in
        place, so no call goes by without a program."""
        links = self.pin_dir / "links"
        links.mkdir(mode=0o700, parents=True, exist_ok=True)
        cgroup_id = self.cgroup_root.stat().st_ino
        cgroup_fd = os.open(self.cgroup_root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in CGROUP_PROGRAMS:
                self._attach_link(links / name, self._program("cgroup", name), cgroup_fd, cgroup_id)
        finally:
            os.close(cgroup_fd)

    def _attach_link(self, pin: Path, program: int, cgroup_fd: int, cgroup_id: int) -> None:
        if pin.exists():
            link = self.lib.pointer(self.lib.bpf_link__open(os.fsencode(pin)), f"cannot open {pin}")
            try:
                info = self._link_info(self.lib.bpf_link__fd(link), pin)
                if info.cgroup_id == cgroup_id:
                    self.lib.check(
                        self.lib.bpf_link__update_program(link, program), f"cannot update the program of {pin}"
                    )
                    return
            finally:
                self.lib.bpf_link__destroy(link)
            # It belongs to a cgroup that is gone, or to another root.
            pin.unlink()
        with self.lib.log() as lines:
            try:
                link = self.lib.pointer(
                    self.lib.bpf_program__attach_cgroup(program, cgroup_fd),
                    f"cannot attach {pin.name} to {self.cgroup_root}",
                )
            except BpfError as error:
                raise BpfError("\n  ".join([str(error), *lines]), error.errno) from None
        try:
            self.lib.check(self.lib.bpf_link__pin(link, os.fsencode(pin)), f"cannot pin {pin}")
        finally:
            self.lib.bpf_link__destroy(link)  # this process's handle; the pin keeps the link

    def try_cgroup_links(self) -> None:
        """Attaches every socket hook to the cgroup root and detaches it again; BpfError if one cannot be."""
        cgroup_fd = os.open(self.cgroup_root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in CGROUP_PROGRAMS:
                link = self.lib.pointer(
                    self.lib.bpf_program__attach_cgroup(self._program("cgroup", name), cgroup_fd),
                    f"cannot attach {name}",
                )
                self.lib.bpf_link__destroy(link)
        finally:
            os.close(cgroup_fd)

    def strangers(self) -> dict[str, list[str]]:
        """Programs of others at our hooks of the cgroup root, by hook; ours are named like their hooks. A program
        without a name is told by its number. Hooks that may not be looked at have none."""
        found: dict[str, list[str]] = {}
        cgroup_fd = os.open(self.cgroup_root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for hook, attach in HOOKS.items():
                names = [self._program_name(number) for number in self._at_hook(cgroup_fd, attach)]
                others = [name for name in names if name != hook]
                found |= {hook: others} if others else {}
        finally:
            os.close(cgroup_fd)
        return found

    def _at_hook(self, cgroup_fd: int, attach: int) -> list[int]:
        """Numbers of the programs at a hook of exactly this cgroup."""
        numbers = (ctypes.c_uint32 * MOST_AT_A_HOOK)()
        flags, count = ctypes.c_uint32(), ctypes.c_uint32(MOST_AT_A_HOOK)
        result = self.lib.bpf_prog_query(
            cgroup_fd, attach, 0, ctypes.byref(flags), ctypes.cast(numbers, ctypes.POINTER(ctypes.c_uint32)),
            ctypes.byref(count),
        )  # fmt: skip
        return [] if result else list(numbers[: count.value])

    def _program_name(self, number: int) -> str:
        handle = self.lib.bpf_prog_get_fd_by_id(number)
        if handle < 0:
            return f"number {number}"
        try:
            return self._program_info(handle).name.decode(errors="replace") or f"number {number}"
        finally:
            os.close(handle)

    def _link_info(self, fd: int, what: Path) -> CgroupLinkInfo:
        info = CgroupLinkInfo()
        length = ctypes.c_uint32(ctypes.sizeof(info))
        self.lib.check(
            self.lib.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(length)), f"cannot read {what}"
        )
        return info

    def attach_overlay(self, ifindex: int) -> None:
        """Puts the overlay programs on the device (clsact), replacing an earlier agent's in one step each."""
        self._attach_tc(OVERLAY_PROGRAMS, ifindex)

    def attach_wireguard(self, devices: Collection[int], port: int, wanted: WireGuard) -> None:
        """Puts the programs on the WireGuard devices, whose packets are for the overlay's UDP `port`, and lets the
        overlay's programs send through them: until then they drop what is to be encrypted. `devices` are the
        interface indexes of the first one and the second one, 0 for none."""
        for ifindex in filter(None, devices):
            self._attach_tc(WIREGUARD_PROGRAMS, ifindex)
        self._maps["wireguard"].put(abi.U32.pack(0), _wireguard_value(devices, port, wanted))

    def forget_wireguard(self) -> None:
        """There is no WireGuard device: what is to be encrypted is dropped."""
        self._maps["wireguard"].put(abi.U32.pack(0), bytes(abi.WIREGUARD.size))

    def use_underlay(self, overlay: int, underlay: IPv4Address) -> None:
        """Packets go natively to some nodes; tells the programs of this host: the overlay device's index and the
        underlay address. Those on the overlay keep such packets off the tunnel from then on."""
        self._maps["native"].put(abi.U32.pack(0), abi.NATIVE.pack(overlay, underlay.packed))

    def attach_underlay(self, ifindex: int) -> None:
        """Puts the programs on a device by which packets go natively."""
        self._attach_tc(UNDERLAY_PROGRAMS, ifindex)

    def forget_underlay(self) -> None:
        """Nothing goes natively: the programs, where they are, let everything go by."""
        self._maps["native"].put(abi.U32.pack(0), bytes(abi.NATIVE.size))

    def detach_underlay(self, devices: Iterable[int]) -> list[int]:
        """Takes the programs, also an earlier agent's, off those of these devices that have them; answers which."""
        found = [ifindex for ifindex in devices if self._has_underlay_program(ifindex)]
        for ifindex in found:
            self._detach_tc(UNDERLAY_PROGRAMS, ifindex)
        return found

    def _has_underlay_program(self, ifindex: int) -> bool:
        """By name: somebody else may have a filter of the same handle and priority there."""
        for name, point in UNDERLAY_PROGRAMS.items():
            number = self._query_tc(ifindex, point)[1]
            fd = self.lib.bpf_prog_get_fd_by_id(number) if number else -1
            if fd >= 0:
                try:
                    found = self._program_info(fd).name.decode()
                finally:
                    os.close(fd)
                if found and name.startswith(found):  # the kernel keeps 15 characters of a name
                    return True
        return False

    def audit_underlay(self, devices: Iterable[int], overlay: int, underlay: IPv4Address) -> list[str]:
        """What of the underlay devices' programs is missing, in words."""
        problems = [words for ifindex in devices for words in self._audit_tc(UNDERLAY_PROGRAMS, ifindex)]
        if self._maps["native"].get(abi.U32.pack(0)) != abi.NATIVE.pack(overlay, underlay.packed):
            problems.append(f"native: it holds other values than those of interface {overlay} and {underlay}")
        return problems

    def audit_wireguard(self, devices: Collection[int], port: int, wanted: WireGuard) -> list[str]:
        """What of the WireGuard devices' programs is missing, in words; arguments as of attach_wireguard()."""
        there = [each for each in devices if each]
        problems = [words for each in there for words in self._audit_tc(WIREGUARD_PROGRAMS, each)]
        if self._maps["wireguard"].get(abi.U32.pack(0)) != _wireguard_value(devices, port, wanted):
            problems.append(f"wireguard: it holds other values than those of interfaces {', '.join(map(str, there))}")
        return problems

    def _attach_tc(self, programs: Mapping[str, int], ifindex: int) -> None:
        hook = TcHook(ctypes.sizeof(TcHook), ifindex, TC_INGRESS | TC_EGRESS, 0)
        with self.lib.log() as lines:
            result = self.lib.bpf_tc_hook_create(ctypes.byref(hook))
            if result not in (0, -errno.EEXIST):
                raise BpfError(
                    "\n  ".join([f"cannot add clsact to interface {ifindex}: {error_name(-result)}", *lines]), -result
                )
            for name, point in programs.items():
                hook = TcHook(ctypes.sizeof(TcHook), ifindex, point, 0)
                options = TcOpts(sz=ctypes.sizeof(TcOpts))
                options.prog_fd = self.lib.bpf_program__fd(self._program("overlay", name))
                options.flags = TC_F_REPLACE
                options.handle = TC_HANDLE
                options.priority = TC_PRIORITY
                result = self.lib.bpf_tc_attach(ctypes.byref(hook), ctypes.byref(options))
                if result:
                    message = f"cannot attach {name} to interface {ifindex}: {error_name(-result)}"
                    raise BpfError("\n  ".join([message, *lines]), -result)

    def audit_attachments(self, ifindex: int) -> list[str]:
        """What of the attached programs is missing, in words; `ifindex` is the overlay device's."""
        problems = [f"map {name} is not pinned: {self.pin_dir / name} is missing" for name in self.unpinned()]
        cgroup_id = self.cgroup_root.stat().st_ino
        for name in CGROUP_PROGRAMS:
            pin = self.pin_dir / "links" / name
            if not pin.exists():
                problems.append(f"cgroup hook {name} is not attached: {pin} is missing")
                continue
            fd = self.lib.check(self.lib.bpf_obj_get(os.fsencode(pin)), f"cannot open {pin}")
            try:
                info = self._link_info(fd, pin)
            finally:
                os.close(fd)
            if info.cgroup_id != cgroup_id:
                problems.append(f"cgroup hook {name} is attached to another cgroup than {self.cgroup_root}")
        return problems + self._audit_tc(OVERLAY_PROGRAMS, ifindex)

    def _audit_tc(self, programs: Mapping[str, int], ifindex: int) -> list[str]:
        problems = []
        for name, point in programs.items():
            result, number = self._query_tc(ifindex, point)
            if result:
                problems.append(f"tc program {name} is not attached to interface {ifindex}: {error_name(-result)}")
                continue
            if "overlay" in self._objects:
                own = self._program_info(self.lib.bpf_program__fd(self._program("overlay", name))).id
                if own != number:
                    problems.append(f"tc program {name} on interface {ifindex} is not this agent's")
        return problems

    def _query_tc(self, ifindex: int, point: int) -> tuple[int, int]:
        """A negative errno or 0, and the id of the program of our handle and priority."""
        hook = TcHook(ctypes.sizeof(TcHook), ifindex, point, 0)
        options = TcOpts(sz=ctypes.sizeof(TcOpts), handle=TC_HANDLE, priority=TC_PRIORITY)
        with self.lib.log():
            result = self.lib.bpf_tc_query(ctypes.byref(hook), ctypes.byref(options))
        return int(result), 0 if result else int(options.prog_id)

    def _program_info(self, fd: int) -> ProgInfo:
        info = ProgInfo()
        length = ctypes.c_uint32(ctypes.sizeof(info))
        self.lib.check(
            self.lib.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(length)), "cannot read a program"
        )
        return info

    def detach_overlay(self, ifindex: int) -> None:
        """Takes our filters off the device; nothing happens if there are none."""
        self._detach_tc(OVERLAY_PROGRAMS, ifindex)

    def _detach_tc(self, programs: Mapping[str, int], ifindex: int) -> bool:
        """Whether there was one."""
        found = False
        for point in programs.values():
            hook = TcHook(ctypes.sizeof(TcHook), ifindex, point, 0)
            options = TcOpts(sz=ctypes.sizeof(TcOpts), handle=TC_HANDLE, priority=TC_PRIORITY)
            with self.lib.log():
                result = self.lib.bpf_tc_detach(ctypes.byref(hook), ctypes.byref(options))
            if result not in (0, -errno.ENOENT, -errno.EINVAL, -errno.ENODEV):
                raise BpfError(f"cannot detach from interface {ifindex}: {error_name(-result)}", -result)
            found = found or result == 0
        return found

    def remove_all(self) -> list[str]:
        """Detaches the socket hooks and unpins everything; answers what was removed. The overlay's filters go
        with their device."""
        self.close()
        removed = []
        for directory in (self.pin_dir / "links", self.pin_dir):
            if not directory.is_dir():
                continue
            for path in sorted(directory.iterdir()):
                if not path.is_dir():
                    path.unlink()
                    removed.append(str(path))
            directory.rmdir()
        ours = self.pin_dir.parent
        if ours.name == "isthmus" and ours.is_dir() and not any(ours.iterdir()):
            ours.rmdir()
        return removed

    # Applying

    def apply(self, datapath: Datapath, read: bool = True) -> ApplyResult:
        """Makes the maps hold exactly what is wanted, whatever they hold now.

        Without `read` the maps are taken to hold what the last call left there, if that did not fail.
        Addresses of peers that are too many are left out and told in `problems`.
        New entries first, then the services are flipped one by one (each in one step for the programs),
        then what is not wanted any more goes. CapacityError before anything is changed if a map is too
        small."""
        known, self._known = self._known, None
        image = _tables(datapath, known)
        real = known.maps if known is not None and not read else self._read()
        wanted, problems = self._fitting(datapath, image, real)
        self._check_capacity(datapath, wanted)
        removed: tuple[BackendKey, ...] = ()
        try:
            try:
                result = self._make(datapath, image, wanted, real)
            except CapacityError:
                # Old and new together are too many: a moment without what goes is better than being stuck.
                removed = self._make_room(datapath, wanted)
                result = self._make(datapath, image, wanted, self._read())
        except BaseException:
            self._keep_slots()
            raise
        return replace(result, removed_backends=removed + result.removed_backends, problems=problems)

    def _fitting(
        self, datapath: Datapath, image: dict[str, dict[bytes, bytes]], real: Mapping[str, Mapping[bytes, bytes]]
    ) -> tuple[dict[str, dict[bytes, bytes]], tuple[str, ...]]:
        """The image with as many addresses and prefixes as their maps can hold, and what was left out in words."""
        fitting = dict(image)
        problems: list[str] = []
        for name in ("ipcache_host", "ipcache_cidr"):
            fitting[name], words = self._without_excess(name, datapath, image[name], real[name])
            problems += words
        return fitting, tuple(problems)

    def _without_excess(
        self, table: str, datapath: Datapath, wanted: dict[bytes, bytes], real: Mapping[bytes, bytes]
    ) -> tuple[dict[bytes, bytes], list[str]]:
        """Of the largest peer is left out first, and of that what is in the map already last. No peer keeps another's
        addresses, or a withdrawal, from this host."""
        size = self._maps[table].max_entries
        excess = len(wanted) - size
        if excess <= 0:
            return wanted, []
        clusters: dict[int, list[bytes]] = {}
        for key, value in wanted.items():
            clusters.setdefault(abi.IPCACHE_VALUE.unpack(value)[2], []).append(key)
        clusters.pop(datapath.cluster_id, None)
        out: set[bytes] = set()
        problems = []
        for number, addresses in sorted(clusters.items(), key=lambda item: -len(item[1])):
            if excess <= 0:
                break
            going = sorted(addresses, key=lambda key: key in real)[:excess]
            out.update(going)
            excess -= len(going)
            name = datapath.clusters.get(number, f"with id {number}")
            problems.append(
                f"map {table} holds at most {size} entries, {len(wanted)} are wanted: {len(going)} addresses of "
                f"cluster {name}, which has {len(addresses)}, are left out and cannot be reached. Next: find out why "
                "it publishes so many, or remove it from this cluster's peers"
            )
        return {key: value for key, value in wanted.items() if key not in out}, problems

    def _make_room(self, datapath: Datapath, wanted: Mapping[str, Mapping[bytes, bytes]]) -> tuple[BackendKey, ...]:
        """Removes what is not wanted; answers the backends among it."""
        real = self._read()
        keep = {"svc": {_svc_key(frontend) for frontend in datapath.services}}
        for name in ("svc", *wanted):
            self._maps[name].delete_all(real[name].keys() - keep.get(name, wanted.get(name, {}).keys()))
        self._keep_slots()
        backends = {(each.address, each.port, each.protocol) for each in _backends(datapath)}
        gone = {key for key, value in real["backends"].items() if _backend_key(value) not in backends}
        removed = self._removed_backends(gone, real["backends"])
        self._maps["backends"].delete_all(gone)
        self._maps["backend_stats"].delete_all(real["backend_stats"].keys() - (real["backends"].keys() - gone))
        return removed

    def _keep_slots(self) -> None:
        """After a failure: runs that no service has are free, whoever held them when it failed."""
        values = [abi.SVC_VALUE.unpack(value) for value in self._maps["svc"].items().values()]
        self._arena.keep({base for _, base, count, _ in values if count}, time.monotonic())

    def _make(
        self,
        datapath: Datapath,
        image: dict[str, dict[bytes, bytes]],
        wanted: dict[str, dict[bytes, bytes]],
        real: dict[str, dict[bytes, bytes]],
    ) -> ApplyResult:
        ids, backends = self._plan_backends(datapath, real["backends"])
        tables = [self._plan(name, entries, real[name]) for name, entries in wanted.items()]

        self._write(backends)
        stats = {abi.U32.pack(number) for number in ids.values()}
        self._add_stats(stats - real["backend_stats"].keys())
        for plan in tables:
            self._write(plan)
        services, resting = self._flip_services(datapath, ids, real["svc"])

        self._erase(services)
        now = time.monotonic()
        for base in resting:
            self._arena.free(base, now)
        removed = self._removed_backends(backends.delete, real["backends"])
        self._erase(backends)
        self._maps["backend_stats"].delete_all(real["backend_stats"].keys() - stats)
        for plan in tables:
            self._erase(plan)
        left = {
            **wanted,
            "svc": {key: value for key, value in real["svc"].items() if key not in services.delete} | services.put,
            "backends": {key: value for key, value in real["backends"].items() if key not in backends.delete}
            | backends.put,
            "backend_stats": dict.fromkeys(stats, b""),
        }
        self._known = _Known(datapath, image, left)

        changes = {plan.name: plan.change for plan in (backends, services, *tables) if plan.change}
        return ApplyResult(maps=changes, removed_backends=removed)

    def _read(self) -> dict[str, dict[bytes, bytes]]:
        """What the maps hold that are made what is wanted; of `backend_stats` the keys."""
        real = {name: self._maps[name].items() for name in FILLED_MAPS}
        real["backend_stats"] = dict.fromkeys(self._maps["backend_stats"].walk(), b"")
        return real

    def _removed_backends(self, keys: Iterable[bytes], real: Mapping[bytes, bytes]) -> tuple[BackendKey, ...]:
        now = time.monotonic()
        self._gone = {number: gone for number, gone in self._gone.items() if gone[0] > now - GONE_SECONDS}
        removed = []
        for key in keys:
            backend = _backend_key(real[key])
            self._gone[abi.U32.unpack(key)[0]] = (now, backend)
            removed.append(backend)
        return tuple(removed)

    def _write(self, plan: _Plan) -> None:
        if plan.put:
            self._maps[plan.name].put_all(plan.put)

    def _erase(self, plan: _Plan) -> None:
        if plan.delete:
            self._maps[plan.name].delete_all(plan.delete)

    def _plan(self, name: str, wanted: dict[bytes, bytes], real: Mapping[bytes, bytes]) -> _Plan:
        if wanted is real:
            return _Plan(name, {}, set(), MapChange())
        put = {key: value for key, value in wanted.items() if real.get(key) != value}
        delete = {key for key in real if key not in wanted}
        added = sum(1 for key in put if key not in real)
        return _Plan(name, put, delete, MapChange(added, len(put) - added, len(delete)))

    def _plan_backends(self, datapath: Datapath, real: Mapping[bytes, bytes]) -> tuple[dict[BackendKey, int], _Plan]:
        """Ids of all wanted backends (those of entries that exist stay) and the change of the map."""
        known: dict[BackendKey, int] = {}
        for raw, value in real.items():
            known.setdefault(_backend_key(value), abi.U32.unpack(raw)[0])
        ids: dict[BackendKey, int] = {}
        wanted: dict[bytes, bytes] = {}
        fresh: list[Backend] = []
        seen: set[BackendKey] = set()
        for backend in _backends(datapath):
            key = (backend.address, backend.port, backend.protocol)
            if key in seen:
                continue
            seen.add(key)
            if key in known:
                ids[key] = known[key]
                wanted[abi.U32.pack(known[key])] = _backend_value(backend)
            else:
                fresh.append(backend)
        taken = {abi.U32.unpack(raw)[0] for raw in real}
        for number, backend in zip(self._deal(abi.Meta.BACKEND_ID, len(fresh), taken), fresh, strict=True):
            ids[(backend.address, backend.port, backend.protocol)] = number
            wanted[abi.U32.pack(number)] = _backend_value(backend)
        return ids, self._plan("backends", wanted, real)

    def _deal(self, what: abi.Meta, count: int, taken: Collection[int]) -> list[int]:
        """`count` new ids, never used since the map was made (up to 2^32 of them)."""
        if not count:
            return []
        meta, key = self._maps["meta"], abi.U32.pack(what)
        last = abi.U32.unpack(meta.get(key) or bytes(4))[0]
        dealt: list[int] = []
        while len(dealt) < count:
            last = last + 1 if last < 0xFFFFFFFF else 1
            if last not in taken:
                dealt.append(last)
        # Before their use: a crash loses numbers, it never deals one twice.
        meta.put(key, abi.U32.pack(last))
        return dealt

    def _add_stats(self, keys: Iterable[bytes]) -> None:
        table = self._maps["backend_stats"]
        table.put_all(dict.fromkeys(keys, bytes(table.stride * table.cpus)))

    def _flip_services(
        self, datapath: Datapath, ids: dict[BackendKey, int], real: Mapping[bytes, bytes]
    ) -> tuple[_Plan, list[int]]:
        """Writes what is new or changed of the services. What is left: entries to delete, slot runs to free."""
        table = self._maps["svc"]
        taken = {abi.SVC_VALUE.unpack(value)[0] for value in real.values()}
        fresh = [frontend for frontend in datapath.services if _svc_key(frontend) not in real]
        numbers = dict(zip(fresh, self._deal(abi.Meta.SERVICE_ID, len(fresh), taken), strict=True))
        free: list[int] = []
        put: dict[bytes, bytes] = {}
        added = changed = 0
        wanted: set[bytes] = set()
        for frontend, service in datapath.services.items():
            key = _svc_key(frontend)
            wanted.add(key)
            # In ascending order: so the programs find one among many.
            backends = sorted(ids[(each.address, each.port, each.protocol)] for each in service.backends)
            old = real.get(key)
            if old is None:
                number = numbers[frontend]
                added += 1
            else:
                number, base, count, affinity = abi.SVC_VALUE.unpack(old)
                if affinity == service.session_affinity and sorted(self._read_slots(base, count)) == backends:
                    continue
                if count:
                    free.append(base)
                changed += 1
            base = self._write_slots(backends)
            put[key] = abi.SVC_VALUE.pack(number, base, len(backends), service.session_affinity)
            table.put(key, put[key])
        delete = {key for key in real if key not in wanted}
        for key in delete:
            _, base, count, _ = abi.SVC_VALUE.unpack(real[key])
            if count:
                free.append(base)
        return _Plan("svc", put, delete, MapChange(added, changed, len(delete))), free

    def _read_slots(self, base: int, count: int) -> list[int]:
        if self._slot_view is None:
            raise BpfError("the slots are not mapped: open() comes first")
        return [int(value) & 0xFFFFFFFF for value in self._slot_view[base : base + count]]

    def _write_slots(self, backends: list[int]) -> int:
        if self._slot_view is None:
            raise BpfError("the slots are not mapped: open() comes first")
        try:
            base = self._arena.allocate(len(backends), time.monotonic())
        except ArenaFull:
            raise CapacityError("slots", self._arena.used + len(backends), self._arena.size) from None
        for index, backend in enumerate(backends):
            self._slot_view[base + index] = backend
        return base

    def _check_capacity(self, datapath: Datapath, tables: Mapping[str, Mapping[bytes, bytes]]) -> None:
        wanted = {name: len(entries) for name, entries in tables.items()}
        wanted["svc"] = len(datapath.services)
        wanted["backends"] = len({(each.address, each.port, each.protocol) for each in _backends(datapath)})
        wanted["slots"] = sum(len(service.backends) for service in datapath.services.values())
        for name, count in wanted.items():
            if count > self._maps[name].max_entries:
                raise CapacityError(name, count, self._maps[name].max_entries)

    # Reading

    def audit(self, datapath: Datapath) -> list[str]:
        """Differences between maps and what is wanted, in words. Changes nothing."""
        problems: list[str] = []
        image = _tables(datapath)
        real = {name: self._maps[name].items() for name in image}
        tables, _ = self._fitting(datapath, image, real)
        for name, wanted in tables.items():
            problems += _differences(name, wanted, real[name])
        backends = self._maps["backends"].items()
        by_id = {abi.U32.unpack(key)[0]: _backend_key(value) for key, value in backends.items()}
        wanted_backends = {(each.address, each.port, each.protocol): each for each in _backends(datapath)}
        for key in sorted(wanted_backends.keys() - set(by_id.values()), key=str):
            problems.append(f"backends: {_backend_words(key)} is missing")
        for number, key in sorted(by_id.items()):
            backend = wanted_backends.get(key)
            if backend is None:
                problems.append(f"backends: {_backend_words(key)} (id {number}) is not wanted")
            elif backends[abi.U32.pack(number)] != _backend_value(backend):
                problems.append(f"backends: {_backend_words(key)} (id {number}) has other values than wanted")
        services = self._maps["svc"].items()
        for frontend, service in sorted(datapath.services.items()):
            words = f"svc: {service.name} at {_backend_words((frontend.address, frontend.port, frontend.protocol))}"
            value = services.pop(_svc_key(frontend), None)
            if value is None:
                problems.append(f"{words} is missing")
                continue
            _, base, count, affinity = abi.SVC_VALUE.unpack(value)
            if affinity != service.session_affinity:
                problems.append(f"{words} has a session affinity of {affinity} s, wanted: {service.session_affinity} s")
            slots = [by_id.get(number) for number in self._read_slots(base, count)]
            have = sorted(_backend_words(key) if key else "an unknown id" for key in slots)
            want = sorted(_backend_words((each.address, each.port, each.protocol)) for each in service.backends)
            if have != want:
                problems.append(
                    f"{words} leads to {', '.join(have) or 'nothing'}; wanted: {', '.join(want) or 'nothing'}"
                )
        for raw in services:
            address, port, protocol, _ = abi.SVC_KEY.unpack(raw)
            words = _backend_words((abi.unpack_address(address), abi.unpack_port(port), protocol))
            problems.append(f"svc: {words} is not wanted")
        return problems

    def counters(self) -> Counters:
        """Sums over all CPUs."""
        by_id = {key: _backend_key(value) for key, value in self._maps["backends"].items().items()}
        counts: dict[BackendKey, BackendCount] = {}
        stats = self._maps["backend_stats"]
        for key, value in stats.items().items():
            if key in by_id:
                connects, datagrams = _sum(abi.BACKEND_STATS.unpack, stats.per_cpu(value))
                counts[by_id[key]] = BackendCount(connects, datagrams)
        drops: dict[str, int] = {}
        table = self._maps["drops"]
        for reason in abi.Drop:
            if reason is not abi.Drop.NONE:
                value = table.get(abi.U32.pack(reason)) or bytes(table.stride * table.cpus)
                drops[reason.name.lower()] = _sum(abi.COUNTER.unpack, table.per_cpu(value))[0]
        identities = []
        table = self._maps["identities"]
        for key, value in table.items().items():
            destination, identity, cluster_id, _ = abi.IDENT_KEY.unpack(key)
            packets, size = _sum(abi.COUNTER.unpack, table.per_cpu(value))
            identities.append(IdentityCount(abi.unpack_address(destination), identity, cluster_id, packets, size))
        identities.sort(key=lambda each: (str(each.destination), each.cluster_id, each.identity))
        return Counters(backends=counts, drops=drops, identities=tuple(identities))

    def capacity(self) -> dict[str, Capacity]:
        """Use of every map that can be full."""
        found = {name: Capacity(len(self._maps[name].items()), self._maps[name].max_entries) for name in FILLED_MAPS}
        used = sum(abi.SVC_VALUE.unpack(value)[2] for value in self._maps["svc"].items().values())
        found["slots"] = Capacity(used, self._maps["slots"].max_entries)
        return found

    def services(self) -> dict[Frontend, Service]:
        """What the maps say, without names and nodes. Backends that no service has any more (they drain) are those of
        `NO_FRONTEND`."""
        backends: dict[int, Backend] = {}
        for raw, value in self._maps["backends"].items().items():
            address, port, protocol, _, cluster_id = abi.BACKEND_VALUE.unpack(value)
            backends[abi.U32.unpack(raw)[0]] = Backend(
                abi.unpack_address(address), abi.unpack_port(port), protocol, cluster_id
            )
        found: dict[Frontend, Service] = {}
        used: set[int] = set()
        for raw, value in self._maps["svc"].items().items():
            address, port, protocol, _ = abi.SVC_KEY.unpack(raw)
            _, base, count, affinity = abi.SVC_VALUE.unpack(value)
            ids = [number for number in self._read_slots(base, count) if number in backends]
            used.update(ids)
            found[Frontend(abi.unpack_address(address), abi.unpack_port(port), protocol)] = Service(
                "", tuple(backends[number] for number in ids), session_affinity=affinity
            )
        left = tuple(backend for number, backend in backends.items() if number not in used)
        return {**found, NO_FRONTEND: Service("", (), left)} if left else found

    def sockets_of(self, backends: Iterable[Backend | BackendKey]) -> set[int]:
        """Cookies of open sockets that the connect hook gave to one of `backends`; these may be removed ones
        as long as this object removed them."""
        return set(self._sockets_of(backends))

    def left_sockets_of(self, backends: Iterable[Backend | BackendKey]) -> set[int]:
        """Those of `sockets_of` whose service gives the backend to nobody any more, or is gone. Another service may
        have no better one."""
        sockets = self._sockets_of(backends)
        services = {service for service, _ in sockets.values()}
        in_use: set[tuple[int, int]] = set()
        for value in self._maps["svc"].items().values() if sockets else ():
            service, base, count, _ = abi.SVC_VALUE.unpack(value)
            if service in services:
                in_use.update((service, number) for number in self._read_slots(base, count))
        return {cookie for cookie, given in sockets.items() if given not in in_use}

    def _sockets_of(self, backends: Iterable[Backend | BackendKey]) -> dict[int, tuple[int, int]]:
        """By cookie, the numbers of its service and of its backend."""
        wanted = {(each.address, each.port, each.protocol) if isinstance(each, Backend) else each for each in backends}
        ids = {number for number, (_, key) in self._gone.items() if key in wanted}
        for raw, value in self._maps["backends"].items().items():
            if _backend_key(value) in wanted:
                ids.add(abi.U32.unpack(raw)[0])
        sockets = {}
        for raw, value in self._maps["sock_backends"].items().items():
            service, number = abi.SOCK_BACKEND.unpack(value)
            if number in ids:
                sockets[abi.U64.unpack(raw)[0]] = (service, number)
        return sockets


def _page_align(size: int) -> int:
    return (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE


def _backends(datapath: Datapath) -> Iterable[Backend]:
    for service in datapath.services.values():
        yield from service.backends
        yield from service.draining
    yield from datapath.draining


def _svc_key(frontend: Frontend) -> bytes:
    return abi.SVC_KEY.pack(abi.pack_address(frontend.address), abi.pack_port(frontend.port), frontend.protocol, 0)


def _backend_value(backend: Backend) -> bytes:
    return abi.BACKEND_VALUE.pack(
        abi.pack_address(backend.address), abi.pack_port(backend.port), backend.protocol, 0, backend.cluster_id
    )


def _backend_key(value: bytes) -> BackendKey:
    address, port, protocol, _, _ = abi.BACKEND_VALUE.unpack(value)
    return abi.unpack_address(address), abi.unpack_port(port), protocol


def _backend_words(key: BackendKey) -> str:
    address, port, protocol = key
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"{host}:{port}/{ {6: 'tcp', 17: 'udp'}.get(protocol, str(protocol)) }"


def _ipcache_value(entry: IpcacheEntry) -> bytes:
    tunnel = abi.pack_address(entry.tunnel) if entry.tunnel is not None else abi.NO_ADDRESS
    flags = (
        (abi.IPCACHE_NODE if entry.is_node else 0)
        | (abi.IPCACHE_FIXED if entry.is_fixed else 0)
        | (abi.IPCACHE_ENCRYPTED if entry.is_encrypted else 0)
        | (abi.IPCACHE_NATIVE if entry.is_native else 0)
        | (abi.IPCACHE_INSIDE if entry.is_inside else 0)
        | (abi.IPCACHE_CNI if entry.is_cni else 0)
    )
    return abi.IPCACHE_VALUE.pack(tunnel, entry.identity, entry.cluster_id, flags)


def _peer_value(peer: Peer) -> bytes:
    flags = (abi.PEER_ENCRYPTED if peer.is_encrypted else 0) | (abi.PEER_NATIVE if peer.is_native else 0)
    return abi.PEER_VALUE.pack(abi.pack_address(peer.endpoint), peer.cluster_id, flags)


def _wireguard_value(devices: Collection[int], port: int, wanted: WireGuard) -> bytes:
    return abi.WIREGUARD.pack(*devices, abi.pack_port(port), 0, wanted.underlay.packed, wanted.advertised.packed)


def _workload_value(address: Address) -> bytes:
    packed = abi.pack_address(address)
    if address.version == 4:
        return abi.WORKLOAD_VALUE.pack(packed, abi.NO_ADDRESS)
    return abi.WORKLOAD_VALUE.pack(abi.NO_ADDRESS, packed)


def _tables(datapath: Datapath, known: _Known | None = None) -> dict[str, dict[bytes, bytes]]:
    """The maps that are a plain image of what is wanted; those of the same objects are `known`'s own."""
    before = known.datapath if known is not None else Datapath(0)
    made = known.image if known is not None else {}
    hosts, prefixes = (
        (made["ipcache_host"], made["ipcache_cidr"])
        if datapath.ipcache is before.ipcache
        else _ipcache_tables(datapath.ipcache)
    )
    local = (
        made["local"]
        if datapath.local is before.local
        else {
            abi.pack_address(address): abi.LOCAL_VALUE.pack(identity, 0) for address, identity in datapath.local.items()
        }
    )
    peers = (
        made["peers"]
        if datapath.peers is before.peers
        else {abi.pack_address(address): _peer_value(peer) for address, peer in datapath.peers.items()}
    )
    return {
        "ipcache_host": hosts,
        "ipcache_cidr": prefixes,
        "local": local,
        "peers": peers,
        "workloads": {abi.U64.pack(cgroup): _workload_value(address) for cgroup, address in datapath.workloads.items()},
        "untranslated": {abi.U64.pack(cookie): abi.U32.pack(1) for cookie in datapath.untranslated},
    }


def _ipcache_tables(ipcache: Mapping[Network, IpcacheEntry]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    hosts: dict[bytes, bytes] = {}
    prefixes: dict[bytes, bytes] = {}
    for network, entry in ipcache.items():
        if network.prefixlen == network.max_prefixlen:
            hosts[abi.pack_address(network.network_address)] = _ipcache_value(entry)
        else:
            prefixes[abi.pack_prefix(network)] = _ipcache_value(entry)
    return hosts, prefixes


def _key_words(name: str, key: bytes) -> str:
    if name == "ipcache_cidr":
        return abi.unpack_prefix(key)
    if name == "workloads":
        return f"cgroup {abi.U64.unpack(key)[0]}"
    if name == "untranslated":
        return f"network namespace {abi.U64.unpack(key)[0]}"
    return str(abi.unpack_address(key))


def _value_words(name: str, value: bytes) -> str:
    if name.startswith("ipcache"):
        tunnel, identity, cluster_id, flags = abi.IPCACHE_VALUE.unpack(value)
        via = f" via {abi.unpack_address(tunnel)}" if tunnel != abi.NO_ADDRESS else " local"
        kind = " node" if flags & abi.IPCACHE_NODE else " fixed" if flags & abi.IPCACHE_FIXED else ""
        closed = " encrypted" if flags & abi.IPCACHE_ENCRYPTED else ""
        native = " native" if flags & abi.IPCACHE_NATIVE else " inside" if flags & abi.IPCACHE_INSIDE else ""
        cni = " cni" if flags & abi.IPCACHE_CNI else ""
        return f"identity {identity} cluster {cluster_id}{via}{kind}{closed}{native}{cni}"
    if name == "workloads":
        addr4, addr6 = abi.WORKLOAD_VALUE.unpack(value)
        return str(abi.unpack_address(addr4 if addr4 != abi.NO_ADDRESS else addr6))
    if name == "peers":
        endpoint, cluster_id, flags = abi.PEER_VALUE.unpack(value)
        closed = " encrypted" if flags & abi.PEER_ENCRYPTED else ""
        native = " native" if flags & abi.PEER_NATIVE else ""
        return f"cluster {cluster_id} endpoint {abi.unpack_address(endpoint)}{closed}{native}"
    if name == "untranslated":
        return str(abi.U32.unpack(value)[0])
    return f"identity {abi.LOCAL_VALUE.unpack(value)[0]}"


def _differences(name: str, wanted: Mapping[bytes, bytes], real: Mapping[bytes, bytes]) -> list[str]:
    words = []
    for key, value in wanted.items():
        if key not in real:
            words.append(f"{name}: {_key_words(name, key)} ({_value_words(name, value)}) is missing")
        elif real[key] != value:
            words.append(
                f"{name}: {_key_words(name, key)} is {_value_words(name, real[key])}; "
                f"wanted: {_value_words(name, value)}"
            )
    for key, value in real.items():
        if key not in wanted:
            words.append(f"{name}: {_key_words(name, key)} ({_value_words(name, value)}) is not wanted")
    return words


def _sum(unpack: Callable[[bytes], tuple[int, ...]], values: Iterable[bytes]) -> tuple[int, int]:
    first = second = 0
    for value in values:
        one, two = unpack(value)
        first += one
        second += two
    return first, second
