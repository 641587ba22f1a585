# SPDX-License-Identifier: GPL-3.0-or-later
"""List-then-watch stores on real etcd servers that are compacted, restarted, wiped and restored under them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from integration.etcd_fixture import EtcdServer
from isthmus_agent.kvstore import EtcdClient, EtcdError, Limits, PrefixStore, canary_rule, canary_value, same_history
from isthmus_agent.kvstore.tasks import end

CANARY = "synced/p"


@pytest.fixture
def server(tmp_path: Path) -> EtcdServer:
    return EtcdServer(tmp_path / "etcd")


@contextlib.asynccontextmanager
async def running(
    client: EtcdClient, *, canary: str | None = CANARY, limits: Limits | None = None
) -> AsyncIterator[PrefixStore]:
    store = PrefixStore(
        client,
        "p/",
        rule=canary_rule if canary else same_history,
        canary=canary,
        max_delay=0.5,
        page=10,
        progress_interval=0.5,
        inactivity_timeout=2.0,
        limits=limits or Limits(),
    )
    task = asyncio.create_task(store.run())
    try:
        yield store
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


async def until(condition: Callable[[], bool], what: str, deadline: float = 10.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        await asyncio.sleep(0.02)


def texts(store: PrefixStore) -> dict[str, str]:
    return {key: kv.text for key, kv in store.items.items()}


async def put_canary(client: EtcdClient) -> None:
    header = await client.put("anything", "")
    await client.put(CANARY, canary_value("2026-01-02T03:04:05Z", header.cluster_id))


def test_lists_in_pages_then_follows_and_collapses_bursts(server: EtcdServer) -> None:
    async def run() -> None:
        async with server.client() as writer, running(server.client()) as store:
            for number in range(35):
                await writer.put(f"p/{number:02}", "0")
            await until(lambda: store.connected and len(store.items) == 35, "all listed")
            assert store.take() == frozenset(f"p/{number:02}" for number in range(35))
            store.changed.clear()
            for number in range(20):
                await writer.put("p/00", str(number))
            await writer.delete("p/01")
            await until(lambda: "p/01" not in store.items, "deletion seen")
            assert store.changed.is_set()
            assert store.take() == {"p/00", "p/01"}
            assert store.items["p/00"].text == "19"
            age = store.age()
            assert age is not None
            assert age < 5

    with server:
        asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "reason"), [(Limits(keys=12), "more than 12 keys"), (Limits(bytes=100), "more than 100 bytes")]
)
def test_a_prefix_that_holds_too_much_is_not_taken(server: EtcdServer, limits: Limits, reason: str) -> None:
    """Found by the watch, then by each list, until there is less again; what was known before stays."""

    async def run() -> None:
        async with server.client() as writer, running(server.client(), limits=limits) as store:
            await put_canary(writer)
            for number in range(12):
                await writer.put(f"p/{number:02}", "0")
            await until(lambda: store.connected and len(store.items) == 12, "all listed")
            assert (store.size, store.excess) == (12 * 5, None)
            await writer.put("p/12", "0" * 60)
            await until(lambda: store.excess == reason, "too much")
            lists = store.lists
            await asyncio.sleep(1.0)  # more than its delay: it has listed again, in vain
            assert (store.lists, store.excess, store.connected) == (lists, reason, False)
            await writer.delete("p/12")
            await until(lambda: store.connected and store.excess is None, "followed again")
            assert store.size == 12 * 5

    with server:
        asyncio.run(run())


def test_compaction_under_a_cut_off_store_leads_to_a_new_list(server: EtcdServer) -> None:
    """The server stands still; meanwhile nothing reaches the store. Afterwards history is compacted away."""

    async def run() -> None:
        async with server.client() as writer, running(server.client()) as store:
            await put_canary(writer)
            await writer.put("p/kept", "1")
            await writer.put("p/gone", "1")
            await until(lambda: store.trusted and len(store.items) == 2, "listed")
            lists = store.lists
            server.signal(signal.SIGSTOP)
            try:
                await until(lambda: not store.connected, "loss noticed")
                assert texts(store) == {"p/kept": "1", "p/gone": "1"}
                assert store.error is not None
                assert server.endpoint in store.error
            finally:
                server.signal(signal.SIGCONT)
            await writer.delete("p/gone")
            last = await writer.put("p/kept", "2")
            await writer.compact(last.revision)
            await until(lambda: texts(store) == {"p/kept": "2"}, "caught up")
            await until(lambda: store.connected, "connected again")
            assert store.lists > lists
            assert store.epoch == 0

    with server:
        asyncio.run(run())


def test_prefixes_are_found_again_together(server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that etcd answers after an outage ends the waiting of those that had drawn longer."""
    monkeypatch.setattr("isthmus_agent.kvstore.store.random.uniform", lambda _least, most: most)

    async def run() -> None:
        client = server.client()
        async with running(client) as often, contextlib.AsyncExitStack() as stack:
            rarely = PrefixStore(client, "q/", rule=same_history)
            task = asyncio.create_task(rarely.run())
            stack.push_async_callback(lambda: end([task]))
            await until(lambda: often.connected and rarely.connected, "watching")
            failures = 0
            lost = rarely._lost

            def count(error: EtcdError) -> None:
                nonlocal failures
                failures += 1
                lost(error)

            monkeypatch.setattr(rarely, "_lost", count)
            server.stop()
            await until(lambda: failures == 6, "six failures: the next delay is 6.4 s", 20)
            server.start()
            await until(lambda: often.connected, "the first is there again", 20)
            await until(lambda: rarely.connected, "the other one as well", 3.0)

    with server:
        asyncio.run(run())


def test_missing_keys_stay_until_the_canary_is_there(server: EtcdServer) -> None:
    async def run() -> None:
        async with server.client() as writer, running(server.client()) as store:
            await writer.put("p/same", "1")
            store.seed({"p/old": b"1", "p/same": b"1"}, 0, 0)
            await store.refresh()
            await until(lambda: store.connected, "watching")
            assert (texts(store), store.held, store.trusted) == ({"p/old": "1", "p/same": "1"}, {"p/old"}, False)
            await writer.put(CANARY, canary_value("2026-01-02T03:04:05Z", 1))
            await writer.put("p/new", "1")
            await until(lambda: "p/new" in store.items, "change seen")
            await asyncio.sleep(1.5)  # longer than it takes a store to ask for the canary: this one must not do
            assert "p/old" in store.items
            store.take()
            await put_canary(writer)
            await until(lambda: store.trusted, "canary believed")
            assert (texts(store), store.take()) == ({"p/same": "1", "p/new": "1"}, {"p/old"})

    with server:
        asyncio.run(run())


def test_restart_of_the_server_changes_nothing(server: EtcdServer) -> None:
    async def run() -> None:
        async with server.client() as writer, running(server.client()) as store:
            await put_canary(writer)
            await writer.put("p/a", "1")
            await until(lambda: store.trusted and len(store.items) == 1, "listed")
            store.take()
            server.stop(signal.SIGKILL)
            await until(lambda: not store.connected, "loss noticed")
            server.start()
            await until(lambda: store.connected, "back")
            assert (store.epoch, store.take(), texts(store)) == (0, frozenset(), {"p/a": "1"})
            await writer.put("p/a", "2")
            await until(lambda: texts(store) == {"p/a": "2"}, "follows")

    with server:
        asyncio.run(run())


@pytest.mark.parametrize("token", ["another", None], ids=["new-cluster-id", "same-cluster-id"])
def test_restored_snapshot_withdraws_nothing_and_leaves_nobody_stale(
    server: EtcdServer, tmp_path: Path, token: str | None
) -> None:
    async def run() -> None:
        async with server.client() as writer, running(server.client()) as store:
            await put_canary(writer)
            await writer.put("p/old", "old")
            await writer.put("p/deleted-since", "1")
            await writer.snapshot(tmp_path / "snap.db")
            await writer.put("p/old", "new")
            await writer.put("p/young", "1")
            await writer.delete("p/deleted-since")
            for _ in range(20):
                await writer.put("other", "")
            await until(lambda: store.trusted and texts(store) == {"p/old": "new", "p/young": "1"}, "listed")
            server.stop()
            server.restore(tmp_path / "snap.db", token=token)
            server.start()
            await until(lambda: store.connected and store.epoch == 1, "the change is noticed")
            # kept and not made older; what came back with the snapshot is there too
            assert texts(store) == {"p/old": "new", "p/young": "1", "p/deleted-since": "1"}
            assert not store.trusted
            # real changes are taken at once
            await writer.put("p/old", "newest")
            await writer.delete("p/deleted-since")
            await until(lambda: texts(store) == {"p/old": "newest", "p/young": "1"}, "changes taken")
            # the writer has published all again: now the list counts
            await put_canary(writer)
            await until(lambda: store.trusted, "canary believed")
            assert texts(store) == {"p/old": "newest"}

    with server:
        asyncio.run(run())


def test_empty_etcd_withdraws_nothing(server: EtcdServer) -> None:
    async def run() -> None:
        async with server.client() as writer, running(server.client(), canary=None) as store:
            await writer.put("p/a", "1")
            await until(lambda: store.trusted and len(store.items) == 1, "listed")
            server.stop()
            server.wipe()
            server.token = "new"  # noqa: S105 - makes another cluster id
            server.start()
            await until(lambda: store.connected and store.epoch == 1, "the change is noticed")
            assert texts(store) == {"p/a": "1"}
            await writer.put("p/a", "2")
            await until(lambda: texts(store) == {"p/a": "2"}, "change taken")
            assert store.held == set()

    with server:
        asyncio.run(run())
