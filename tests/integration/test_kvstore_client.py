# SPDX-License-Identifier: GPL-3.0-or-later
"""The etcd client against real etcd servers; results are checked with etcdctl where it can tell."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.etcd_fixture import Ca, EtcdServer, free_port
from isthmus_agent.kvstore import (
    Compare,
    Delete,
    EtcdClient,
    EtcdCompacted,
    EtcdExists,
    EtcdNotFound,
    EtcdPermissionDenied,
    EtcdPrecondition,
    EtcdUnavailable,
    Get,
    Permission,
    Put,
    SyncEtcd,
    WatchBatch,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        server.enable_auth()
        yield server


@pytest.fixture
def keys(server: EtcdServer, request: pytest.FixtureRequest) -> str:
    """A key prefix of the test's own."""
    return f"test/{request.node.name}/"


async def next_batch(watch: object, *, events: bool = True) -> WatchBatch:
    while True:
        batch: WatchBatch = await asyncio.wait_for(watch.__anext__(), 10)  # type: ignore[attr-defined]
        if batch.events or not events:
            return batch


def test_put_get_range_delete(server: EtcdServer, keys: str) -> None:
    async def run() -> None:
        async with server.client() as client:
            for number in range(25):
                await client.put(f"{keys}{number:02}", f"v{number}")
            assert server.dump(keys)[f"{keys}07"] == "v7"
            listed = await client.range(keys, page=10)
            assert [kv.text for kv in listed.kvs] == [f"v{number}" for number in range(25)]
            status = json.loads(server.etcdctl("endpoint", "status", "-w", "json"))[0]["Status"]
            assert (listed.revision, listed.cluster_id) == (
                status["header"]["revision"],
                status["header"]["cluster_id"],
            )
            assert await client.get(f"{keys}99") is None
            assert await client.delete(f"{keys}00") is True
            assert await client.delete(f"{keys}00") is False
            old = await client.get(f"{keys}00", revision=listed.revision)
            assert old is not None
            assert old.text == "v0"
            assert await client.delete_prefix(keys) == 24
            assert server.dump(keys) == {}
            with pytest.raises(ValueError, match="name a prefix"):
                await client.delete_prefix("")

    asyncio.run(run())


def test_txn_compares_create_revision_zero(server: EtcdServer, keys: str) -> None:
    async def run() -> None:
        async with server.client() as client:
            absent = Compare(f"{keys}lock", "create", "=", 0)
            operations = [Put(f"{keys}lock", "me"), Get(keys, prefix=True)]
            first = await client.txn([absent], operations, [Get(f"{keys}lock")])
            assert first.succeeded
            second = await client.txn([absent], operations, [Get(f"{keys}lock")])
            assert not second.succeeded
            (found,) = second.responses
            assert isinstance(found, tuple)
            assert found[0].text == "me"
            third = await client.txn([Compare(f"{keys}lock", "value", "=", "me")], [Delete(keys, prefix=True)])
            assert third.responses == (1,)

    asyncio.run(run())


def test_lease_lives_while_kept_and_takes_its_keys(server: EtcdServer, keys: str) -> None:
    async def run() -> None:
        async with server.client() as client:
            lease = await client.lease_grant(5)
            await client.put(f"{keys}a", "x", lease.id)
            assert (await client.lease_keepalive(lease.id)).ttl == lease.ttl
            await client.lease_revoke(lease.id)
            assert await client.get(f"{keys}a") is None
            with pytest.raises(EtcdNotFound, match="lease"):
                await client.lease_keepalive(lease.id)
            with pytest.raises(EtcdNotFound):
                await client.lease_revoke(lease.id)

    asyncio.run(run())


def test_watch_tells_changes_and_signs_of_life(server: EtcdServer, keys: str) -> None:
    async def run() -> None:
        async with server.client() as client:
            await client.put(f"{keys}a", "0")
            revision = (await client.range(keys)).revision
            async with contextlib.aclosing(client.watch(keys, revision + 1, progress_interval=0.2)) as watch:
                assert (await next_batch(watch, events=False)).events == ()
                await client.put(f"{keys}a", "1")
                await client.delete(f"{keys}a")
                changes = []
                while len(changes) < 2:
                    changes += (await next_batch(watch)).events
                assert [(change.kv.key, change.kv.value, change.deleted) for change in changes] == [
                    (f"{keys}a", b"1", False),
                    (f"{keys}a", b"", True),
                ]
                sign = await next_batch(watch, events=False)
                assert sign.events == ()
                assert sign.revision >= revision + 2

    asyncio.run(run())


def test_watch_of_silent_server_ends(server: EtcdServer, keys: str) -> None:
    async def run() -> None:
        async with server.client() as client:
            watch = client.watch(keys, 0, progress_interval=0.2, inactivity_timeout=1.0)
            async with contextlib.aclosing(watch):
                await next_batch(watch, events=False)
                server.signal(signal.SIGSTOP)
                try:
                    with pytest.raises(EtcdUnavailable, match="silent for 1 s"):
                        await next_batch(watch)
                finally:
                    server.signal(signal.SIGCONT)

    asyncio.run(run())


def test_compaction_is_reported_with_its_revision(server: EtcdServer, keys: str) -> None:
    async def run() -> None:
        async with server.client() as client:
            first = (await client.put(f"{keys}a", "0")).revision
            last = (await client.put(f"{keys}a", "1")).revision
            await client.compact(last)
            with pytest.raises(EtcdCompacted, match=f"compacted up to revision {last}") as caught:
                async with contextlib.aclosing(client.watch(keys, first)) as watch:
                    await next_batch(watch)
            assert caught.value.compact_revision == last
            with pytest.raises(EtcdCompacted, match="has been compacted"):
                await client.get(f"{keys}a", revision=first)

    asyncio.run(run())


def test_history_larger_than_a_message_comes_joined(server: EtcdServer, keys: str) -> None:
    """One transaction of several MiB is one revision: it must arrive as one batch, not as its fragments."""

    async def run() -> None:
        async with server.client() as client:
            start = (await client.put(f"{keys}start", "")).revision
            value = "x" * 20_000
            for turn in range(12):
                await client.txn([], [Put(f"{keys}{turn}/{number}", value) for number in range(50)])
            seen: Counter[int] = Counter()
            async with contextlib.aclosing(client.watch(keys, start + 1)) as watch:
                while sum(seen.values()) < 12 * 50:
                    batch = Counter(event.kv.mod_revision for event in (await next_batch(watch)).events)
                    assert not batch.keys() & seen.keys(), "a revision came in two batches"
                    seen.update(batch)
            assert list(seen.values()) == [50] * 12
            await client.delete_prefix(keys)

    asyncio.run(run())


def test_permission_denial_names_endpoint_key_and_reason(server: EtcdServer, keys: str) -> None:
    server.add_user("reader", Permission("read", f"{keys}in/", prefix=True))

    async def run() -> None:
        async with server.client("reader") as client:
            assert (await client.range(f"{keys}in/")).kvs == ()
            denied = f"etcd {server.endpoint}: put {keys}in/a: permission denied"
            with pytest.raises(EtcdPermissionDenied, match=denied):
                await client.put(f"{keys}in/a", "x")
            with pytest.raises(EtcdPermissionDenied, match=f"list {keys}out/"):
                await client.range(f"{keys}out/")
            with pytest.raises(EtcdPermissionDenied, match=f"watch {keys}out/"):
                async with contextlib.aclosing(client.watch(f"{keys}out/", 0)) as watch:
                    await next_batch(watch)
        async with server.client("nobody") as client:
            with pytest.raises(EtcdPermissionDenied):
                await client.get(f"{keys}in/a")

    asyncio.run(run())


def test_foreign_certificate_is_refused_in_both_directions(server: EtcdServer, tmp_path: Path) -> None:
    foreign = Ca(tmp_path / "foreign", "foreign")
    crt, key = foreign.issue("root")

    async def run() -> None:
        async with EtcdClient([server.endpoint], server.ca.crt, crt, key, timeout=3.0) as client:
            with pytest.raises(EtcdUnavailable):
                await client.get("a")
        own_crt, own_key = server.ca.issue("root")
        async with EtcdClient([server.endpoint], foreign.crt, own_crt, own_key, timeout=3.0) as client:
            with pytest.raises(EtcdUnavailable):
                await client.get("a")

    asyncio.run(run())


def test_renewed_certificate_files_are_taken_up(server: EtcdServer, tmp_path: Path) -> None:
    """The clock jumps over the interval at which files are looked at; then the new certificate's name counts."""
    now = 0.0
    server.add_user("renewed", Permission("read", "renewed/", prefix=True))
    crt, key = tmp_path / "c.crt", tmp_path / "c.key"

    def install(cn: str) -> None:
        for source, target in zip(server.ca.issue(cn), (crt, key), strict=True):
            part = target.with_suffix(".part")
            part.write_bytes(source.read_bytes())
            part.replace(target)

    async def run() -> None:
        nonlocal now
        install("nobody")
        async with EtcdClient([server.endpoint], server.ca.crt, crt, key, clock=lambda: now) as client:
            with pytest.raises(EtcdPermissionDenied):
                await client.range("renewed/")
            install("renewed")
            now = 100.0
            assert (await client.range("renewed/")).kvs == ()

    asyncio.run(run())


def test_renewed_files_count_for_every_open_connection(server: EtcdServer, tmp_path: Path) -> None:
    """Another endpoint that is opened with the new files does not make the old connection look new."""
    now = 0.0
    server.add_user("both", Permission("read", "both/", prefix=True))
    crt, key = tmp_path / "c.crt", tmp_path / "c.key"

    def install(cn: str) -> None:
        for source, target in zip(server.ca.issue(cn), (crt, key), strict=True):
            target.unlink(missing_ok=True)
            target.write_bytes(source.read_bytes())

    async def run() -> None:
        nonlocal now
        other = server.endpoint.replace("127.0.0.1", "localhost")
        install("nobody")
        async with EtcdClient([server.endpoint, other], server.ca.crt, crt, key, clock=lambda: now) as client:
            with pytest.raises(EtcdPermissionDenied):
                await client.range("both/")
            install("both")
            now = 3.0
            await client.status(other)
            now = 7.0
            assert (await client.range("both/")).kvs == ()

    asyncio.run(run())


def test_dead_endpoint_is_left_for_the_next(server: EtcdServer, keys: str) -> None:
    dead = f"https://127.0.0.1:{free_port()}"

    async def run() -> None:
        async with server.client(endpoints=[dead, server.endpoint]) as client:
            await client.put(f"{keys}a", "x")
            assert client.endpoint == server.endpoint
        async with server.client(endpoints=[dead]) as client:
            with pytest.raises(EtcdUnavailable, match=f"etcd {dead}: put {keys}a: "):
                await client.put(f"{keys}a", "x")

    asyncio.run(run())


def test_users_roles_and_permissions_round_trip(server: EtcdServer) -> None:
    with server.sync_client() as client:
        assert client.auth_status() is True
        client.role_add("cook")
        with pytest.raises(EtcdExists):
            client.role_add("cook")
        permissions = (Permission("read", "menu", prefix=False), Permission("readwrite", "pots/", prefix=True))
        for permission in permissions:
            client.role_grant_permission("cook", permission)
        client.user_add("anna")
        client.user_grant_role("anna", "cook")
        assert client.user_get("anna") == ("cook",)
        assert set(client.role_get("cook")) == set(permissions)
        shown = server.etcdctl("role", "get", "cook")
        assert "menu" in shown
        assert "[pots/, pots0) (prefix pots/)" in shown
        client.role_revoke_permission("cook", permissions[0])
        assert client.role_get("cook") == (permissions[1],)
        client.user_revoke_role("anna", "cook")
        client.user_delete("anna")
        client.role_delete("cook")
        assert "anna" not in client.user_list()
        assert "cook" not in client.role_list()
        with pytest.raises(EtcdNotFound):
            client.user_get("anna")


def test_maintenance_and_snapshot(server: EtcdServer, tmp_path: Path) -> None:
    with server.sync_client() as client:
        client.put("snapshot/a", "kept")
        status = client.status()
        assert status.leader == status.header.member_id
        assert status.version in server.etcdctl("version")
        assert client.alarms() == ()
        client.alarm_disarm()
        client.defragment(server.endpoint)
        path = tmp_path / "snap.db"
        assert client.snapshot(path) == path.stat().st_size
        assert path.stat().st_mode & 0o777 == 0o600
        shown = json.loads(server.etcdctl("snapshot", "status", str(path), "-w", "json"))
        assert shown["revision"] == status.header.revision


def test_learner_is_added_promoted_and_removed(tmp_path: Path) -> None:
    with EtcdServer(tmp_path / "a", name="a") as first, first.sync_client() as client:
        assert client.auth_status() is False
        mistake = client.member_add([f"https://127.0.0.1:{free_port()}"], learner=True)
        client.member_remove(mistake.id)
        assert [member.name for member in client.member_list()] == ["a"]
        peer_port = free_port()
        added = client.member_add([f"https://127.0.0.1:{peer_port}"], learner=True)
        assert added.learner
        cluster = {"a": first.peer_url, "b": f"https://127.0.0.1:{peer_port}"}
        second = EtcdServer(tmp_path / "b", name="b", ca=first.ca, initial_cluster=cluster, peer_port=peer_port)
        try:
            second.start(wait=False, state="existing")
            deadline = time.monotonic() + 15
            while not _promoted(client, added.id):
                assert time.monotonic() < deadline, "the learner never became ready to be promoted"
                time.sleep(0.1)
            assert {member.name: member.learner for member in client.member_list()} == {"a": False, "b": False}
            second.wait_ready()
        finally:
            second.__exit__(None, None, None)


def _promoted(client: SyncEtcd, member: int) -> bool:
    try:
        client.member_promote(member)
    except (EtcdPrecondition, EtcdUnavailable):
        return False
    return True


def test_sync_client_works_inside_a_running_loop_and_leaves_no_thread(server: EtcdServer) -> None:
    async def run() -> None:
        with server.sync_client() as client:
            client.put("sync/a", "x")
            assert client.get("sync/a") is not None

    asyncio.run(run())
    assert not any(thread.name == "etcd" for thread in threading.enumerate())
