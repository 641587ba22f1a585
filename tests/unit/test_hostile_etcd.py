# SPDX-License-Identifier: GPL-3.0-or-later
"""What the etcd client makes of a server that answers anything: errors of its own kind, and bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isthmus_agent.kvstore import EtcdClient, EtcdError, EtcdTooLarge, EtcdUnavailable, Limits, PrefixStore, canary_rule
from isthmus_agent.kvstore import client as client_module
from isthmus_agent.kvstore.proto import message

PREFIX = "cilium/state/nodes/v1/cloud/"
MIB = 1024 * 1024


def answer(revision: int = 7, **more: Any) -> dict[str, Any]:
    return {"header": {"cluster_id": 0xB2, "revision": revision, "raft_term": 1}, **more}


def listing(*kvs: tuple[str, bytes], revision: int = 7, more: bool = False) -> bytes:
    found = [{"key": key.encode(), "value": value, "mod_revision": 5} for key, value in kvs]
    raw: bytes = message("RangeResponse")(**answer(revision), kvs=found, more=more).SerializeToString()
    return raw


def change(*keys: str, fragment: bool = False, **more: Any) -> bytes:
    events = [{"type": 0, "kv": {"key": key.encode(), "value": b"v" * 1000}} for key in keys]
    raw: bytes = message("WatchResponse")(**answer(8), events=events, fragment=fragment, **more).SerializeToString()
    return raw


class Server(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers `KV/Range` with `listed` (the last one again and again) and a watch with `watched`."""

    def __init__(self, listed: Sequence[bytes], watched: Sequence[bytes] = (), endless: bool = False) -> None:
        self.listed = list(listed)
        self.watched = watched
        self.endless = endless
        self.sent = 0

    def service(self, details: Any) -> Any:
        if details.method.endswith("/Watch"):
            return grpc.stream_stream_rpc_method_handler(self.watch)
        return grpc.unary_unary_rpc_method_handler(self.range)

    async def range(self, request: bytes, context: object) -> bytes:
        return self.listed.pop(0) if len(self.listed) > 1 else self.listed[0]

    async def watch(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        await requests.__anext__()  # a stream that ends while the client still writes is another failure
        while True:
            for raw in self.watched:
                self.sent += 1
                yield raw
            if not self.endless:
                return


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A PEM file that exists; connections are made without TLS."""
    file = tmp_path_factory.mktemp("pki") / "pem"
    file.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module.grpc, "ssl_channel_credentials", lambda *_: None)
        patch.setattr(
            client_module.grpc.aio,
            "secure_channel",
            lambda target, _, options: grpc.aio.insecure_channel(target, options=options),
        )
        yield file


async def serve(
    server: Server, pem: Path, use: Callable[[EtcdClient], Awaitable[Any]], max_receive: int = 8 * MIB
) -> Any:
    listener = grpc.aio.server(options=[("grpc.max_send_message_length", 64 * MIB)])
    listener.add_generic_rpc_handlers((server,))
    port = listener.add_insecure_port("127.0.0.1:0")
    await listener.start()
    try:
        async with EtcdClient([f"https://127.0.0.1:{port}"], pem, pem, pem, max_receive=max_receive) as client:
            return await use(client)
    finally:
        await listener.stop(None)


def listed(server: Server, pem: Path, **more: Any) -> Any:
    return asyncio.run(serve(server, pem, lambda client: client.range(PREFIX, **more)))


def watched(server: Server, pem: Path, **more: Any) -> list[Any]:
    async def use(client: EtcdClient) -> list[Any]:
        return [batch async for batch in client.watch(PREFIX, 1, **more)]

    found: list[Any] = asyncio.run(serve(server, pem, use))
    return found


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"\xff\xff", "is not one of etcd's messages"),
        (listing(revision=2**63 - 1), "names revision 9223372036854775807"),
        (listing(revision=-1), "names revision -1"),
        (listing((f"{PREFIX}a", b""), ("cilium/state/nodes/v1/onprem/b", b"")), "keys that were not asked for"),
        (b"\x12\x00" * 1000, "keys that were not asked for"),
    ],
)
def test_a_list_that_no_etcd_gives_is_refused(plain: Path, raw: bytes, error: str) -> None:
    with pytest.raises(EtcdUnavailable, match=error):
        listed(Server([raw]), plain)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"\xff\xff", "is not one of etcd's messages"),
        (change("cilium/state/nodes/v1/onprem/b"), "keys that were not asked for"),
        (b"\x5a\x00" * 1000, "keys that were not asked for"),
        (change(canceled=True, cancel_reason=b"\xff no"), "\ufffd no"),
    ],
)
def test_a_change_that_no_etcd_tells_is_refused(plain: Path, raw: bytes, error: str) -> None:
    with pytest.raises(EtcdUnavailable, match=error):
        watched(Server([], [raw]), plain)


def test_a_change_whose_parts_never_end_is_too_large(plain: Path) -> None:
    server = Server([], [change(f"{PREFIX}a", fragment=True)], endless=True)
    with pytest.raises(EtcdTooLarge, match="more than 20000 bytes in one change"):
        watched(server, plain, max_bytes=20_000)
    assert server.sent >= 20


def test_a_list_that_never_ends_is_too_large(plain: Path) -> None:
    page = listing((f"{PREFIX}a", b"v"), (f"{PREFIX}b", b"v"), more=True)
    with pytest.raises(EtcdTooLarge, match="more than 50 keys"):
        listed(Server([page]), plain, max_keys=50)
    with pytest.raises(EtcdTooLarge, match="more than 1000 bytes"):
        listed(Server([page]), plain, max_bytes=1000)


def test_a_page_that_is_too_large_for_one_answer_is_read_in_smaller_ones(plain: Path) -> None:
    large = listing(*((f"{PREFIX}{number}", b"v" * MIB) for number in range(9)))
    small = listing((f"{PREFIX}0", b"v" * MIB))
    assert len(listed(Server([large, small]), plain).kvs) == 1
    with pytest.raises(EtcdTooLarge, match="larger than max"):
        listed(Server([large]), plain)


@given(st.lists(st.binary(max_size=60) | st.just(change(f"{PREFIX}a")), max_size=3), st.binary(max_size=60))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_answer_ends_a_store(plain: Path, changes: list[bytes], page: bytes) -> None:
    """List and watch raise nothing but errors of etcd, which the store waits out."""

    async def use(client: EtcdClient) -> None:
        store = PrefixStore(client, PREFIX, rule=canary_rule, canary="cilium/synced/x", limits=Limits(10, 10_000))
        for step in (store._list, store._watch):
            try:
                await step()
            except EtcdError:
                continue

    asyncio.run(serve(Server([page], changes), plain, use))
