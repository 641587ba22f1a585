# SPDX-License-Identifier: GPL-3.0-or-later
"""Loading, applying, auditing and removing, on real maps without any traffic."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from foreign_programs import attached
from isthmus_agent.bpf import abi
from isthmus_agent.bpf.driver import CGROUP_PROGRAMS, BpfDatapath
from isthmus_agent.bpf.errors import BpfError, CapacityError
from isthmus_agent.bpf.libbpf import Libbpf
from isthmus_agent.bpf.maps import Map
from isthmus_agent.bpf.mounts import cgroup2_root, parse_mounts
from isthmus_agent.bpf.slots import Arena, ArenaFull
from isthmus_agent.desired.datapath import Backend, Datapath, Frontend, IpcacheEntry, Peer, Service
from isthmus_agent.desired.drain import DrainTracker

_numbers = itertools.count(1)


def _backend(number: int, port: int = 80) -> Backend:
    return Backend(ip_address(f"10.101.0.{number}"), port, 6, 1)


def _service(*backends: Backend, draining: tuple[Backend, ...] = ()) -> Datapath:
    return Datapath(1, services={Frontend(ip_address("10.111.0.1"), 80, 6): Service("shop/web", backends, draining)})


FULL = replace(
    _service(_backend(1), _backend(2)),
    local={ip_address("10.101.0.1"): 6},
    workloads={4711: ip_address("10.101.0.2")},
    ipcache={
        ip_network("10.102.0.0/28"): IpcacheEntry(2, 2, ip_address("198.18.2.11")),
        ip_network("10.102.0.2/32"): IpcacheEntry(131100, 2, ip_address("198.18.2.11")),
        ip_network("198.18.2.11/32"): IpcacheEntry(6, 2, ip_address("198.18.2.11"), is_node=True),
    },
    peers={ip_address("198.18.2.11"): Peer(2, ip_address("198.18.2.11"))},
)


@pytest.fixture
def datapath() -> Iterator[BpfDatapath]:
    """Loaded, with small maps; attached to nothing."""
    run = f"isthmus-test-{os.getpid()}-driver-{next(_numbers)}"
    cgroup = cgroup2_root() / run
    cgroup.mkdir()
    driver = BpfDatapath(
        f"/sys/fs/bpf/{run}", cgroup, max_entries={"svc": 8, "backends": 8, "slots": 512, "ipcache_host": 8}
    )
    try:
        driver.open(1)
        yield driver
    finally:
        driver.remove_all()
        cgroup.rmdir()


def _pin(driver: BpfDatapath, name: str) -> Map:
    return Map.pinned(driver.lib, driver.pin_dir / name)


def test_apply_makes_it_so_and_then_has_nothing_to_do(datapath: BpfDatapath) -> None:
    assert len(datapath.audit(FULL)) == 9
    result = datapath.apply(FULL)
    assert {name: change.added for name, change in result.maps.items()} == {
        "backends": 2,
        "svc": 1,
        "ipcache_host": 2,
        "ipcache_cidr": 1,
        "local": 1,
        "peers": 1,
        "workloads": 1,
    }
    assert datapath.audit(FULL) == []
    assert not datapath.apply(FULL)
    emptied = datapath.apply(Datapath(1))
    assert set(emptied.removed_backends) == {(ip_address("10.101.0.1"), 80, 6), (ip_address("10.101.0.2"), 80, 6)}
    assert datapath.audit(Datapath(1)) == []
    assert all(each.used == 0 for each in datapath.capacity().values())


@pytest.mark.parametrize("seed", range(5))
def test_without_reading_the_maps_become_the_same(datapath: BpfDatapath, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a seeded test

    def some(count: int) -> list[Backend]:
        return chance.sample([_backend(each) for each in range(1, 5)], chance.randint(0, count))

    before = FULL
    datapath.apply(FULL)
    for _ in range(40):
        services = {
            Frontend(ip_address("10.111.0.1"), port, 6): Service("shop/web", tuple(some(4)), tuple(some(2)))
            for port in chance.sample(range(1, 9), chance.randint(0, 8))
        }
        numbers = chance.sample(range(8), chance.randint(0, 8))
        ipcache = {
            ip_network(f"10.102.{each}.{chance.choice(('0/28', '7/32'))}"): IpcacheEntry(chance.randint(1, 2), 2, None)
            for each in numbers
        }
        before = replace(before, services=services, ipcache=before.ipcache if chance.random() < 0.3 else ipcache)
        datapath.apply(before, read=False)
        assert datapath.audit(before) == []
        assert not datapath.apply(before, read=False)
        assert {abi.U32.unpack(key)[0] for key in _pin(datapath, "backend_stats").walk()} == {
            abi.U32.unpack(key)[0] for key in _pin(datapath, "backends").walk()
        }


def test_what_others_took_is_seen_by_an_audit_and_by_the_next_read(datapath: BpfDatapath) -> None:
    datapath.apply(FULL)
    host = _pin(datapath, "ipcache_host")
    host.delete(abi.pack_address(ip_address("10.102.0.2")))
    assert not datapath.apply(FULL, read=False)
    assert len(datapath.audit(FULL)) == 1
    assert datapath.apply(FULL).maps["ipcache_host"].added == 1
    host.delete(abi.pack_address(ip_address("10.102.0.2")))
    with pytest.raises(CapacityError):
        datapath.apply(_service(*(_backend(each) for each in range(1, 10))), read=False)
    assert datapath.apply(FULL, read=False), "after a failure nothing is taken for granted"
    assert datapath.audit(FULL) == []
    host.close()


def test_stray_and_damaged_entries_are_named_and_repaired(datapath: BpfDatapath) -> None:
    datapath.apply(FULL)
    host, svc, backends = (_pin(datapath, name) for name in ("ipcache_host", "svc", "backends"))
    host.put(abi.pack_address(ip_address("10.9.9.9")), abi.IPCACHE_VALUE.pack(abi.NO_ADDRESS, 7, 3, 0))
    host.delete(abi.pack_address(ip_address("10.102.0.2")))
    key = next(iter(svc.items()))
    number, base, count, affinity = abi.SVC_VALUE.unpack(svc.get(key) or b"")
    svc.put(key, abi.SVC_VALUE.pack(number, base, count - 1, affinity))
    svc.put(abi.SVC_KEY.pack(abi.pack_address(ip_address("10.111.9.9")), abi.pack_port(1), 6, 0), bytes(16))
    first = next(iter(backends.items()))
    backends.delete(first)
    problems = datapath.audit(FULL)
    for words in (
        "ipcache_host: 10.9.9.9 (identity 7 cluster 3 local) is not wanted",
        "ipcache_host: 10.102.0.2 (identity 131100 cluster 2 via 198.18.2.11) is missing",
        "svc: 10.111.9.9:1/tcp is not wanted",
    ):
        assert words in problems
    assert any(each.startswith("svc: shop/web at 10.111.0.1:80/tcp leads to") for each in problems)
    assert any(each.startswith("backends: ") and each.endswith("is missing") for each in problems)
    assert datapath.apply(FULL)
    assert datapath.audit(FULL) == []
    for each in (host, svc, backends):
        each.close()


def test_backend_ids_are_stable_and_not_dealt_again(datapath: BpfDatapath) -> None:
    def ids() -> dict[bytes, int]:
        return {value: abi.U32.unpack(key)[0] for key, value in _pin(datapath, "backends").items().items()}

    datapath.apply(_service(_backend(1), _backend(2)))
    before = ids()
    datapath.apply(_service(_backend(2), _backend(3)))
    after = ids()
    assert {key: after[key] for key in before if key in after} == {key: before[key] for key in before if key in after}
    assert max(after.values()) == 3
    # Another process does not start from one again, even with every backend gone.
    datapath.apply(Datapath(1))
    datapath.open(1)
    datapath.apply(_service(_backend(1)))
    assert set(ids().values()) == {4}


def test_draining_keeps_the_entry_and_loses_the_slot(datapath: BpfDatapath) -> None:
    datapath.apply(_service(_backend(1), _backend(2)))
    result = datapath.apply(_service(_backend(1), draining=(_backend(2),)))
    assert result.removed_backends == ()
    assert datapath.capacity()["slots"].used == 1
    assert datapath.capacity()["backends"].used == 2
    assert (ip_address("10.101.0.2"), 80, 6) in datapath.counters().backends


def test_what_an_earlier_agent_left_is_told_and_drains(datapath: BpfDatapath) -> None:
    earlier = _service(_backend(1), _backend(2), draining=(_backend(3),))
    datapath.apply(earlier)
    reader = BpfDatapath(datapath.pin_dir, datapath.cgroup_root)
    reader.open_pinned()
    tracker = DrainTracker()
    tracker.seed(reader.services())
    reader.close()
    services, ended, deadline = tracker.apply(_service(_backend(1)).services, 100.0)
    (service,) = services.values()
    assert [each.address for each in service.draining] == [ip_address("10.101.0.2")]
    assert (ended, deadline) == ((), 130.0)
    _, ended, _ = tracker.apply(_service(_backend(1)).services, 130.0)
    assert {each.address for each in ended} == {ip_address("10.101.0.2"), ip_address("10.101.0.3")}


def test_a_service_that_is_gone_drains_past_the_agent_that_took_it_away(datapath: BpfDatapath) -> None:
    datapath.apply(_service(_backend(1)))
    tracker = DrainTracker()
    tracker.seed(datapath.services())
    tracker.apply({}, 100.0)
    assert datapath.apply(Datapath(1, draining=tracker.orphans)).removed_backends == ()
    assert datapath.capacity()["svc"].used == 0
    later = DrainTracker()
    later.seed(datapath.services())
    assert later.apply({}, 110.0)[1:] == ((), 140.0)
    assert [each.address for each in later.orphans] == [ip_address("10.101.0.1")]
    _, ended, _ = later.apply({}, 140.0)
    assert datapath.apply(Datapath(1, draining=later.orphans)).removed_backends == ((ip_address("10.101.0.1"), 80, 6),)
    assert [each.address for each in ended] == [ip_address("10.101.0.1")]


def test_a_changed_service_moves_to_other_slots(datapath: BpfDatapath) -> None:
    def place() -> tuple[int, int]:
        (value,) = _pin(datapath, "svc").items().values()
        _, base, count, _ = abi.SVC_VALUE.unpack(value)
        return base, count

    datapath.apply(_service(_backend(1), _backend(2)))
    old = place()
    datapath.apply(_service(_backend(1)))
    new = place()
    assert new[1] == 1
    assert new[0] >= old[0] + old[1], "a reader of the old value would see the new slots"
    datapath.apply(_service(_backend(1)))
    assert place() == new


def test_a_restart_changes_nothing(datapath: BpfDatapath) -> None:
    datapath.apply(FULL)
    datapath.attach_cgroup()
    sizes = {name: each.maximum for name, each in datapath.capacity().items()}
    other = BpfDatapath(datapath.pin_dir, datapath.cgroup_root)
    try:
        other.open(1)
        other.attach_cgroup()
        assert not other.apply(FULL)
        # It was made with small maps: the pins decide, not the new agent's defaults.
        assert {name: each.maximum for name, each in other.capacity().items()} == sizes
    finally:
        other.close()


def test_a_pinned_map_of_another_layout_is_made_again_and_the_rest_stays(datapath: BpfDatapath) -> None:
    datapath.apply(FULL)
    datapath.attach_cgroup()
    kept = _pin(datapath, "backends").items()
    datapath.close()
    path = datapath.pin_dir / "peers"
    path.unlink()
    # As an earlier layout had it: a value of four bytes.
    words = ["type", "hash", "key", "16", "value", "4", "entries", "65536", "name", "peers", "flags", "1"]
    subprocess.run(["bpftool", "map", "create", str(path), *words], check=True)
    other = BpfDatapath(datapath.pin_dir, datapath.cgroup_root)
    try:
        other.open(1)
        other.attach_cgroup()
        assert {name: change.added for name, change in other.apply(FULL).maps.items()} == {"peers": 1}
        assert other.audit(FULL) == []
        assert _pin(other, "backends").items() == kept
        assert _pin(other, "peers").value_size == abi.PEER_VALUE.size
    finally:
        other.close()


# What ProtectKernelTunables and ProtectControlGroups of the agent's unit make of its mounts.
_SANDBOX = """
mount -o remount,bind,ro /sys && mount -o remount,bind,ro "$1" && mount --bind /proc/sys /proc/sys &&
mount -o remount,bind,ro /proc/sys && ! mkdir "$1/x" 2>/dev/null && shift && exec "$@"
"""
_OPEN = """
import sys
from isthmus_agent.bpf.driver import BpfDatapath
from isthmus_agent import netlink
datapath = BpfDatapath(sys.argv[1], sys.argv[2])
datapath.open(1)
datapath.attach_cgroup()
index = netlink.ensure_overlay()
datapath.attach_overlay(index)
assert datapath.audit_attachments(index) == []
"""


def test_the_sandbox_of_the_unit_is_no_obstacle(datapath: BpfDatapath) -> None:
    command = ["unshare", "--mount", "--net", "sh", "-c", _SANDBOX, "sh", str(cgroup2_root())]
    inner = [sys.executable, "-c", _OPEN, str(datapath.pin_dir), str(datapath.cgroup_root)]
    subprocess.run([*command, *inner], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_pinned_maps_are_readable_without_loading(datapath: BpfDatapath) -> None:
    datapath.apply(FULL)
    reader = BpfDatapath(datapath.pin_dir, datapath.cgroup_root)
    reader.open_pinned()
    try:
        assert reader.audit(FULL) == []
        assert reader.counters().drops["bad_identity"] == 0
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (_service(*(_backend(each) for each in range(1, 10))), "backends"),
        (
            Datapath(
                1,
                services={
                    Frontend(ip_address("10.111.0.1"), port, 6): Service("shop/web", ()) for port in range(1, 10)
                },
            ),
            "svc",
        ),
        (
            Datapath(
                1,
                ipcache={ip_network(f"10.102.0.{each}/32"): IpcacheEntry(6, 1, None) for each in range(9)},
            ),
            "ipcache_host",
        ),
    ],
)
def test_a_full_map_is_an_error_that_names_it_and_changes_nothing(
    datapath: BpfDatapath, wanted: Datapath, name: str
) -> None:
    datapath.apply(FULL)
    with pytest.raises(CapacityError, match=f"map {name} holds at most 8 entries, 9 are wanted"):
        datapath.apply(wanted)
    assert datapath.audit(FULL) == []


def _ports(first: int, backend: Backend) -> Datapath:
    """Eight services, which fill the map."""
    services = {
        Frontend(ip_address("10.111.0.1"), port, 6): Service("shop/web", (backend,)) for port in range(first, first + 8)
    }
    return Datapath(1, services=services)


def test_what_fits_alone_replaces_what_is_there_also_when_both_do_not_fit(datapath: BpfDatapath) -> None:
    for wanted in (
        _service(*(_backend(each) for each in range(1, 9))),
        _service(*(_backend(each) for each in range(11, 19))),
        _ports(1, _backend(1)),
        _ports(11, _backend(2)),
        Datapath(1, ipcache={ip_network(f"10.102.0.{each}/32"): IpcacheEntry(6, 2, None) for each in range(8)}),
        Datapath(1, ipcache={ip_network(f"10.102.1.{each}/32"): IpcacheEntry(6, 2, None) for each in range(8)}),
    ):
        assert datapath.apply(wanted, read=False)
        assert datapath.audit(wanted) == []
        assert not datapath.apply(wanted, read=False)


def test_removed_backends_are_known_also_when_room_was_made_for_others(datapath: BpfDatapath) -> None:
    datapath.apply(_service(*(_backend(each) for each in range(1, 9))))
    removed = datapath.apply(_service(*(_backend(each) for each in range(11, 19)))).removed_backends
    assert {key[0] for key in removed} == {ip_address(f"10.101.0.{each}") for each in range(1, 9)}


def test_a_failed_apply_loses_no_slots(datapath: BpfDatapath, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Map.put
    writes = 0

    def fail(table: Map, key: bytes, value: bytes) -> None:
        nonlocal writes
        writes += table.name == "svc"
        if table.name == "svc" and writes % 3 == 0:
            raise BpfError("cannot write map svc: EIO", 5)
        put(table, key, value)

    datapath._arena.grace = 0.0
    datapath.apply(_ports(1, _backend(1)))
    with monkeypatch.context() as patch:
        patch.setattr(Map, "put", fail)
        for number in range(200):
            with pytest.raises(BpfError, match="EIO"):
                datapath.apply(_ports(1, _backend(number % 7 + 2)))
            assert datapath._arena.used == 8
    datapath.apply(_ports(1, _backend(1)))
    assert datapath.audit(_ports(1, _backend(1))) == []


def test_a_peer_with_too_many_addresses_harms_itself_alone(datapath: BpfDatapath) -> None:
    def wanted(flood: int, others: int, first: int = 0) -> Datapath:
        ipcache = {ip_network(f"10.102.0.{each}/32"): IpcacheEntry(7, 2, None) for each in range(first, first + flood)}
        ipcache |= {ip_network(f"10.103.0.{each}/32"): IpcacheEntry(7, 3, None) for each in range(others)}
        ipcache[ip_network("10.101.0.1/32")] = IpcacheEntry(7, 1, None)
        return replace(_service(_backend(flood)), ipcache=ipcache, clusters={2: "cloud", 3: "edge"})

    def held() -> set[str]:
        return {str(abi.unpack_address(key)) for key in _pin(datapath, "ipcache_host").walk()}

    assert datapath.apply(wanted(4, 1)).problems == ()
    for read in (True, False):
        result = datapath.apply(wanted(20, 2), read=read)
        (problem,) = result.problems
        assert "15 addresses of cluster cloud, which has 20, are left out" in problem
        assert {"10.101.0.1", "10.103.0.0", "10.103.0.1"} <= held(), "all others' are there"
        assert {f"10.102.0.{each}" for each in range(4)} <= held(), "what it had it keeps"
        assert len(held()) == 8
        assert datapath.audit(wanted(20, 2)) == []
    datapath.apply(wanted(20, 2, first=100), read=False)
    assert not held() & {f"10.102.0.{each}" for each in range(20)}, "what it withdraws goes"
    assert datapath.apply(wanted(5, 2), read=False).problems == ()
    assert datapath.audit(wanted(5, 2)) == []


def test_removing_leaves_nothing(datapath: BpfDatapath) -> None:
    datapath.attach_cgroup()
    removed = datapath.remove_all()
    assert {Path(each).name for each in removed} >= set(CGROUP_PROGRAMS) | {"svc", "slots", "drops"}
    assert not datapath.pin_dir.exists()
    attached = subprocess.run(
        ["bpftool", "cgroup", "show", str(datapath.cgroup_root)], check=True, capture_output=True, text=True
    ).stdout
    assert attached.strip() == ""


def test_attachments_are_audited_and_repaired(datapath: BpfDatapath) -> None:
    datapath.attach_cgroup()
    (datapath.pin_dir / "links" / "connect4").unlink()
    problems = [each for each in datapath.audit_attachments(1) if "cgroup" in each]
    assert problems == [f"cgroup hook connect4 is not attached: {datapath.pin_dir}/links/connect4 is missing"]
    datapath.attach_cgroup()
    assert [each for each in datapath.audit_attachments(1) if "cgroup" in each] == []


def test_programs_of_others_at_our_hooks_are_found(datapath: BpfDatapath) -> None:
    datapath.attach_cgroup()
    assert datapath.strangers() == {}, "they are ours"
    with attached(datapath.cgroup_root, {"connect4": b"cil_sock4_conne", "sendmsg4": b""}):
        found = datapath.strangers()
    assert found.pop("connect4") == ["cil_sock4_conne"]
    (nameless,) = found.pop("sendmsg4")
    assert nameless.startswith("number ")
    assert found == {}


def test_links_of_another_cgroup_move(datapath: BpfDatapath) -> None:
    datapath.attach_cgroup()
    inner = datapath.cgroup_root / "inner"
    inner.mkdir()
    moved = BpfDatapath(datapath.pin_dir, inner)
    try:
        moved.open(1)
        moved.attach_cgroup()
        shown = subprocess.run(
            ["bpftool", "cgroup", "show", str(inner)], check=True, capture_output=True, text=True
        ).stdout
        assert all(name in shown for name in CGROUP_PROGRAMS)
        outer = [each for each in datapath.audit_attachments(1) if "cgroup hook" in each]
        assert len(outer) == len(CGROUP_PROGRAMS)
        assert "is attached to another cgroup" in outer[0]
    finally:
        moved.remove_all()
        inner.rmdir()


def test_a_program_the_verifier_refuses_shows_its_words(datapath: BpfDatapath, tmp_path: Path) -> None:
    source = tmp_path / "cgroup.bpf.c"
    source.write_text(
        """
        #include <linux/bpf.h>
        #include <bpf/bpf_helpers.h>
        const volatile struct { __u32 a[3]; } config = {};
        SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx)
        { return *(volatile int *)(long)(ctx->user_ip4 + config.a[0]); }
        char _license[] SEC("license") = "GPL";
        """
    )
    include = f"/usr/include/{os.uname().machine}-linux-gnu"
    clang = os.environ.get("CLANG", "clang-14")
    subprocess.run(
        [clang, "-O2", "-g", "-target", "bpf", f"-I{include}", "-c", str(source), "-o", str(tmp_path / "cgroup.bpf.o")],
        check=True,
    )
    broken = BpfDatapath(f"{datapath.pin_dir}-broken", datapath.cgroup_root, tmp_path)
    try:
        with pytest.raises(BpfError, match=r"(?s)refused .*cgroup\.bpf\.o: .*invalid mem access"):
            broken.open(1)
    finally:
        broken.remove_all()


def test_missing_objects_and_libraries_are_named(datapath: BpfDatapath, tmp_path: Path) -> None:
    with pytest.raises(BpfError, match=r"cgroup\.bpf\.o is missing: install the agent's bundle again"):
        BpfDatapath(datapath.pin_dir, datapath.cgroup_root, tmp_path).open(1)
    with pytest.raises(BpfError, match=r"cannot load /nowhere/libbpf\.so\.1"):
        Libbpf("/nowhere/libbpf.so.1")
    with pytest.raises(BpfError, match="too old"):
        Libbpf("libc.so.6")
    with pytest.raises(BpfError, match="nothing is pinned"):
        BpfDatapath(tmp_path, datapath.cgroup_root).open_pinned()


def test_wrong_sizes_never_reach_the_kernel(datapath: BpfDatapath) -> None:
    table = _pin(datapath, "svc")
    with pytest.raises(ValueError, match="key of 3 bytes, 20 expected"):
        table.get(b"abc")
    with pytest.raises(ValueError, match="value of 3 bytes, 16 expected"):
        table.put(bytes(20), b"abc")
    table.close()


def test_a_map_of_many_entries_is_read_whole(datapath: BpfDatapath) -> None:
    table = _pin(datapath, "rev")
    entries = {
        abi.LAYOUTS["isthmus_rev_key"].struct.pack(each, bytes(16), b"\x00\x00", bytes(6)): bytes(20)
        for each in range(5000)
    }
    table.put_all(entries)
    assert table.items() == entries
    table.close()


def test_mounts_are_parsed() -> None:
    text = """\
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
none /odd\\040place cgroup2 rw 0 0
bpf /sys/fs/bpf bpf rw 0 0
"""
    assert parse_mounts(text, "cgroup2") == [Path("/sys/fs/cgroup/unified"), Path("/odd place")]
    assert parse_mounts(text, "bpf") == [Path("/sys/fs/bpf")]


def test_the_arena_rests_freed_runs_and_refuses_when_full() -> None:
    arena = Arena(10, [(2, 3)], grace=1.0)
    assert arena.allocate(4, 0.0) == 5, "behind what is used"
    assert arena.allocate(2, 0.0) == 0, "the first gap, as there is no room behind"
    arena.free(5, 0.0)
    with pytest.raises(ArenaFull):
        arena.allocate(4, 0.5)
    assert arena.allocate(4, 1.5) == 5
    assert arena.allocate(1, 1.5) == 9
    assert arena.used == 10
    assert arena.allocate(0, 1.5) == 0
    with pytest.raises(ArenaFull):
        arena.allocate(1, 9.0)


@pytest.mark.parametrize("seed", range(5))
def test_runs_in_use_or_at_rest_never_overlap(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a seeded test
    arena = Arena(200, grace=1.0)
    used: dict[int, int] = {}
    resting: list[tuple[float, int, int]] = []
    for step in range(2000):
        now = step * 0.3
        if used and chance.random() < 0.5:
            base = chance.choice(sorted(used))
            arena.free(base, now)
            resting.append((now + 1.0, base, used.pop(base)))
            continue
        count = chance.randint(1, 12)
        blocked = {slot for base, length in used.items() for slot in range(base, base + length)}
        blocked |= {slot for until, base, length in resting if until > now for slot in range(base, base + length)}
        try:
            base = arena.allocate(count, now)
        except ArenaFull:
            free = "".join("x" if slot in blocked else "." for slot in range(200))
            assert "." * count not in free, f"seed {seed}, step {step}"
            continue
        assert not blocked & set(range(base, base + count)), f"seed {seed}, step {step}"
        assert base + count <= 200
        used[base] = count


def test_a_mount_that_would_not_stay_is_refused() -> None:
    script = """
import sys
from isthmus_agent.bpf.driver import BpfDatapath
from isthmus_agent.bpf.errors import BpfError
try:
    BpfDatapath("/sys/fs/bpf/isthmus-test-mounts").open(1)
except BpfError as error:
    sys.exit(str(error))
"""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'umount /sys/fs/bpf; exec "$0" -c "$1"', sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "agent")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "run `systemctl start isthmus-bpffs.service`" in done.stderr
