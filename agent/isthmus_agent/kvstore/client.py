# SPDX-License-Identifier: GPL-3.0-or-later
"""An etcd v3 client over `grpc.aio`, for one etcd cluster, with mutual TLS.

Wire format: etcd's `api/etcdserverpb/rpc.proto` (see `proto.py`). Keys are text (UTF-8; foreign bytes survive as
surrogate escapes), values are bytes. Times are seconds. One channel per endpoint is kept; calls go to one endpoint
until it fails, then to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio

from . import proto
from .errors import (
    EtcdChanged,
    EtcdCompacted,
    EtcdError,
    EtcdExists,
    EtcdNoSpace,
    EtcdNotFound,
    EtcdPermissionDenied,
    EtcdPrecondition,
    EtcdTooLarge,
    EtcdUnavailable,
)
from .tasks import within

MAX_RECEIVE = 64 * 1024 * 1024
CALL_TIMEOUT = 5.0
PAGE = 1000
PROGRESS_INTERVAL = 5.0
INACTIVITY_TIMEOUT = 15.0
_CERTIFICATE_CHECK = 5.0

_OPTIONS = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A mesh's control plane must not go through whatever proxy the environment names.
    ("grpc.enable_http_proxy", 0),
    # Two clients of one process with different certificates must not share a connection.
    ("grpc.use_local_subchannel_pool", 1),
]
# The server ends the stream when it loses the quorum, instead of leaving it silent.
_REQUIRE_LEADER = (("hasleader", "true"),)
# etcd's revisions are int64, and a watch asks for the one after the last that was seen.
_LAST_REVISION = 2**63 - 2


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as etcd holds it. Revisions are etcd's store revisions; `lease` 0 is none."""

    key: str
    value: bytes
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0

    @property
    def text(self) -> str:
        """The value as UTF-8 text; UnicodeDecodeError (a ValueError) when it is none."""
        return self.value.decode()


@dataclass(frozen=True, slots=True)
class Header:
    """What every answer says about the etcd that gave it."""

    cluster_id: int
    member_id: int
    revision: int
    raft_term: int


@dataclass(frozen=True, slots=True)
class RangeResult:
    """The keys of a prefix, ascending, all as of `revision`."""

    kvs: tuple[KeyValue, ...]
    revision: int
    cluster_id: int
    raft_term: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """A change: `deleted` says that the key went (then `kv` has no value)."""

    kv: KeyValue
    deleted: bool


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Complete changes up to `revision`, in order. Without events it is only a sign of life."""

    events: tuple[Event, ...]
    revision: int
    cluster_id: int


@dataclass(frozen=True, slots=True)
class Compare:
    """One condition of a transaction; `target` is `create`, `mod`, `version`, `value` or `lease`; `op` = != < >."""

    key: str
    target: str
    op: str
    operand: int | str | bytes


@dataclass(frozen=True, slots=True)
class Put:
    """Transaction operation: write a key."""

    key: str
    value: str | bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Transaction operation: delete a key, or with `prefix` everything below it."""

    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Get:
    """Transaction operation: read a key, or with `prefix` everything below it."""

    key: str
    prefix: bool = False


Operation = Put | Delete | Get


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`responses`: per operation the keys read (Get), the number deleted (Delete), or None (Put)."""

    succeeded: bool
    responses: tuple[tuple[KeyValue, ...] | int | None, ...]
    header: Header


@dataclass(frozen=True, slots=True)
class Lease:
    """`ttl` in seconds as granted or as left."""

    id: int
    ttl: int


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the etcd cluster; `name` is empty until it started."""

    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    learner: bool


@dataclass(frozen=True, slots=True)
class Status:
    """One member's own view; sizes in bytes; `leader` 0 means that it knows none."""

    endpoint: str
    version: str
    db_size: int
    db_size_in_use: int
    leader: int
    raft_term: int
    raft_index: int
    raft_applied_index: int
    errors: tuple[str, ...]
    learner: bool
    header: Header


@dataclass(frozen=True, slots=True)
class Permission:
    """Of a role: `kind` is `read`, `write` or `readwrite`; `prefix` widens the key to everything below it."""

    kind: str
    key: str
    prefix: bool


_TARGETS = {
    "version": (proto.TARGET_VERSION, "version"),
    "create": (proto.TARGET_CREATE, "create_revision"),
    "mod": (proto.TARGET_MOD, "mod_revision"),
    "value": (proto.TARGET_VALUE, "value"),
    "lease": (proto.TARGET_LEASE, "lease"),
}
_RESULTS = {"=": proto.EQUAL, "!=": proto.NOT_EQUAL, "<": proto.LESS, ">": proto.GREATER}
_PERMISSIONS = {"read": proto.PERM_READ, "write": proto.PERM_WRITE, "readwrite": proto.PERM_READWRITE}
_ALARMS = {1: "NOSPACE", 2: "CORRUPT"}


def encode_key(key: str) -> bytes:
    """Text key -> etcd's bytes."""
    return key.encode("utf-8", "surrogateescape")


def decode_key(key: bytes) -> str:
    """etcd's bytes -> text key; what is not UTF-8 becomes surrogate escapes and so never equals a valid key."""
    return key.decode("utf-8", "surrogateescape")


def prefix_end(prefix: bytes) -> bytes:
    """First key after all keys that begin with `prefix` (etcd's range_end); `\\0` means: to the end of all keys."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\0"


def _bytes(value: str | bytes) -> bytes:
    """A value as etcd's bytes; what was read as surrogate escapes is written as it was."""
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _key_value(kv: Any) -> KeyValue:
    return KeyValue(decode_key(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def _header(header: Any) -> Header:
    return Header(header.cluster_id, header.member_id, header.revision, header.raft_term)


def _checked_header(endpoint: str, what: str, answer: Any) -> Header:
    """The header of an answer. EtcdUnavailable for an answer that no etcd gives: another cluster's server may send
    anything, and gRPC hands on None for bytes that are no such message."""
    if answer is None:
        raise EtcdUnavailable(endpoint, what, "its answer is not one of etcd's messages")
    header = _header(answer.header)
    if not 0 <= header.revision <= _LAST_REVISION:
        raise EtcdUnavailable(endpoint, what, f"its answer names revision {header.revision}, which none can have")
    return header


def _refuse_strange(endpoint: str, what: str, prefix: bytes, kvs: Iterable[Any]) -> None:
    """EtcdUnavailable for keys that were not asked for. Also a matter of memory: millions of empty ones fit into a
    message of a few MiB."""
    if any(not kv.key.startswith(prefix) for kv in kvs):
        raise EtcdUnavailable(endpoint, what, "its answer has keys that were not asked for")


def _member(member: Any) -> Member:
    return Member(member.ID, member.name, tuple(member.peerURLs), tuple(member.clientURLs), member.isLearner)


def _operation(op: Operation) -> Any:
    request = proto.message("RequestOp")()
    key = encode_key(op.key)
    if isinstance(op, Put):
        request.request_put.key = key
        request.request_put.value = _bytes(op.value)
        request.request_put.lease = op.lease
        return request
    body = request.request_range if isinstance(op, Get) else request.request_delete_range
    body.key = key
    if op.prefix:
        body.range_end = prefix_end(key)
    return request


def _compare(compare: Compare) -> Any:
    target, field = _TARGETS[compare.target]
    request = proto.message("Compare")(result=_RESULTS[compare.op], target=target, key=encode_key(compare.key))
    operand = compare.operand
    setattr(request, field, operand if isinstance(operand, int) else _bytes(operand))
    return request


def parse_endpoint(endpoint: str) -> str:
    """`https://host:port` -> gRPC target `host:port`; ValueError with words for anything else."""
    url = urlsplit(endpoint)
    if url.scheme != "https" or not url.hostname or url.port is None or url.path not in ("", "/"):
        raise ValueError(f"etcd endpoint {endpoint!r} must look like https://HOST:PORT")
    return f"[{url.hostname}]:{url.port}" if ":" in url.hostname else f"{url.hostname}:{url.port}"


# Of a call that was under way when its server ended: gRPC's words (seen with etcd 3.4), and etcd's own.
_SERVER_ENDS = (
    "Stream removed",
    "RST_STREAM",
    "No status received",
    "Internal error from Core",
    "server stopped",
    "request cancelled",
)

# gRPC's words for a server's certificate that we refuse, and for a server that refuses ours.
_REFUSED_TLS = ("CERTIFICATE_VERIFY_FAILED", "TSI_DATA_CORRUPTED", "andshake failed")


def error_of(endpoint: str, what: str, code: Any, details: str) -> EtcdError:
    """The exception for a gRPC status. etcd's texts: `api/v3rpc/rpctypes/error.go`."""
    status = grpc.StatusCode
    if code is status.PERMISSION_DENIED or (code is status.INVALID_ARGUMENT and "user name is empty" in details):
        return EtcdPermissionDenied(endpoint, what, f"permission denied ({details})")
    if code is status.OUT_OF_RANGE and "compacted" in details:
        return EtcdCompacted(endpoint, what, details)
    if code is status.OUT_OF_RANGE and "future revision" in details:
        return EtcdChanged(endpoint, what, details)
    if code is status.RESOURCE_EXHAUSTED and "space exceeded" in details:
        return EtcdNoSpace(endpoint, what, details)
    if code is status.RESOURCE_EXHAUSTED and "larger than max" in details:
        return EtcdTooLarge(endpoint, what, details)
    if code is status.NOT_FOUND or (code is status.FAILED_PRECONDITION and "not found" in details):
        return EtcdNotFound(endpoint, what, details)
    if "already exist" in details:
        return EtcdExists(endpoint, what, details)
    cut = code in (status.INTERNAL, status.UNKNOWN) and any(words in details for words in _SERVER_ENDS)
    if cut or code in (status.UNAVAILABLE, status.DEADLINE_EXCEEDED, status.CANCELLED) or "for learner" in details:
        if any(words in details for words in _REFUSED_TLS):
            details += "; a certificate is refused: it has ended, has not begun, or is another authority's"
        return EtcdUnavailable(endpoint, what, details or code.name)
    if code is status.FAILED_PRECONDITION:
        return EtcdPrecondition(endpoint, what, details)
    return EtcdError(endpoint, what, f"{code.name}: {details}")


_Stamp = tuple[tuple[int, int, int], ...]  # inode, time of change and size of each certificate file


class _Connection:
    """A channel to one endpoint, which certificate files it was made with, and the number of calls on it; a retired one
    closes when the last call ends."""

    def __init__(self, endpoint: str, channel: Any, stamp: _Stamp) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self.stamp = stamp
        self.calls = 0
        self.retired = False


class EtcdClient:
    """Asynchronous client of one etcd cluster.

    `endpoints` are `https://HOST:PORT`; `ca`, `cert` and `key` are PEM files, read again when they change. Every call
    takes up to `timeout` seconds per endpoint. Calls that may be repeated safely go once around all endpoints; a
    transaction, a member change and the like are tried once, because after a lost answer nobody knows whether it was
    done. Raises the errors of `kvstore.errors`, OSError for unreadable PEM files. `last_header` is that of the latest
    answer. `max_receive`: bytes of one answer; EtcdTooLarge for a larger one.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        ca: str | os.PathLike[str],
        cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
        *,
        timeout: float = CALL_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        max_receive: int = MAX_RECEIVE,
    ) -> None:
        if not endpoints:
            raise ValueError("an etcd client needs at least one endpoint")
        self.endpoints = tuple(endpoints)
        self._targets = {endpoint: parse_endpoint(endpoint) for endpoint in endpoints}
        self._files = (Path(ca), Path(cert), Path(key))
        self._timeout = timeout
        self._clock = clock
        self._options = [*_OPTIONS, ("grpc.max_receive_message_length", max_receive)]
        self._current = 0
        self._connections: dict[str, _Connection] = {}
        self._retired: set[_Connection] = set()
        self._stamp_checked = clock()
        self._answers = asyncio.Event()
        self.last_header: Header | None = None

    async def __aenter__(self) -> EtcdClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def endpoint(self) -> str:
        """The endpoint that the next call goes to first."""
        return self.endpoints[self._current % len(self.endpoints)]

    async def answered(self) -> None:
        """Return when etcd answers a call of this client: at once, unless the latest one found nobody."""
        await self._answers.wait()

    async def close(self) -> None:
        """Close all connections; calls under way end with an error."""
        connections = [*self._connections.values(), *self._retired]
        self._connections.clear()
        self._retired.clear()
        for connection in connections:
            await connection.channel.close()

    # --- connections

    def _read_stamp(self) -> _Stamp:
        stats = [file.stat() for file in self._files]
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)

    async def _retire_if_renewed(self) -> None:
        now = self._clock()
        if not self._connections or now - self._stamp_checked < _CERTIFICATE_CHECK:
            return
        self._stamp_checked = now
        try:
            stamp = self._read_stamp()
        except FileNotFoundError:
            return  # between the removal and the creation of a file that is being renewed: the open connection is good
        for connection in [each for each in self._connections.values() if each.stamp != stamp]:
            del self._connections[connection.endpoint]
            connection.retired = True
            if connection.calls:
                self._retired.add(connection)
            else:
                await connection.channel.close()

    def _connect(self, endpoint: str) -> _Connection:
        connection = self._connections.get(endpoint)
        if connection is None:
            stamp = self._read_stamp()
            ca, cert, key = (file.read_bytes() for file in self._files)
            credentials = grpc.ssl_channel_credentials(ca, key, cert)
            channel = grpc.aio.secure_channel(self._targets[endpoint], credentials, options=self._options)
            connection = self._connections[endpoint] = _Connection(endpoint, channel, stamp)
        return connection

    @contextlib.asynccontextmanager
    async def _use(self, endpoint: str) -> AsyncIterator[_Connection]:
        await self._retire_if_renewed()
        connection = self._connect(endpoint)
        connection.calls += 1
        try:
            yield connection
        finally:
            connection.calls -= 1
            if connection.retired and not connection.calls and connection in self._retired:
                self._retired.discard(connection)
                await connection.channel.close()

    def _failed(self, endpoint: str) -> None:
        if endpoint == self.endpoint:
            self._current = (self._current + 1) % len(self.endpoints)

    # --- calls

    async def _once(self, endpoint: str, method: str, request: Any, response: Any, what: str, timeout: float) -> Any:
        async with self._use(endpoint) as connection:
            call = connection.channel.unary_unary(
                f"/etcdserverpb.{method}",
                request_serializer=request.__class__.SerializeToString,
                response_deserializer=response.FromString,
            )
            try:
                # Not for maintenance and membership: those must work on a member that has no leader.
                metadata = _REQUIRE_LEADER if method.startswith(("KV/", "Lease/")) else None
                answer = await call(request, timeout=timeout, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                failure = error_of(endpoint, what, error.code(), error.details() or "")
                if isinstance(failure, EtcdUnavailable):
                    self._answers.clear()
                raise failure from None
        self.last_header = _checked_header(endpoint, what, answer)
        self._answers.set()
        return answer

    async def _call(
        self,
        method: str,
        what: str,
        *,
        repeat: bool = True,
        endpoint: str | None = None,
        timeout: float | None = None,
        message: str | None = None,
        **fields: Any,
    ) -> Any:
        name = message or method.rpartition("/")[2]
        request = proto.message(f"{name}Request")(**fields)
        response = proto.message(f"{name}Response")
        timeout = timeout or self._timeout
        if endpoint is not None:
            self._targets.setdefault(endpoint, parse_endpoint(endpoint))
            return await self._once(endpoint, method, request, response, what, timeout)
        failures: list[EtcdUnavailable] = []
        for _ in self.endpoints if repeat else (None,):
            chosen = self.endpoint
            try:
                return await self._once(chosen, method, request, response, what, timeout)
            except EtcdUnavailable as error:
                self._failed(chosen)
                failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        reasons = "; ".join(f"{error.endpoint}: {error.reason}" for error in failures)
        raise EtcdUnavailable(",".join(self.endpoints), what, f"no endpoint answered ({reasons})")

    # --- keys

    async def get(self, key: str, *, revision: int = 0) -> KeyValue | None:
        """One key (at `revision`, 0: now), or None."""
        answer = await self._call("KV/Range", f"get {key}", key=encode_key(key), revision=revision)
        return _key_value(answer.kvs[0]) if answer.kvs else None

    async def range(
        self,
        prefix: str,
        *,
        revision: int = 0,
        page: int = PAGE,
        keys_only: bool = False,
        max_keys: int | None = None,
        max_bytes: int | None = None,
    ) -> RangeResult:
        """All keys that begin with `prefix`, read in pages that are pinned to the first page's revision.

        Linearizable: what was acknowledged before is in it. A page that is too large for one answer is read in smaller
        ones. EtcdCompacted when the pinned revision went meanwhile, EtcdTooLarge for more than `max_keys`, or more than
        `max_bytes` of keys and values.
        """
        what = f"list {prefix}"
        start = encode_key(prefix)
        end = prefix_end(start)
        kvs: list[KeyValue] = []
        size = 0
        first: Header | None = None
        while True:
            try:
                answer = await self._call(
                    "KV/Range",
                    what,
                    key=start or b"\0",
                    range_end=end,
                    limit=page,
                    revision=revision,
                    sort_order=proto.SORT_ASCEND,
                    sort_target=proto.SORT_BY_KEY,
                    keys_only=keys_only,
                )
            except EtcdTooLarge:
                if page == 1:
                    raise
                page = max(1, page // 10)
                continue
            header = _header(answer.header)
            if first is None:
                first = header
                revision = revision or header.revision
            elif header.cluster_id != first.cluster_id:
                reason = f"cluster id changed from {first.cluster_id:016x} to {header.cluster_id:016x} between pages"
                raise EtcdChanged(self.endpoint, what, reason)
            _refuse_strange(self.endpoint, what, encode_key(prefix), answer.kvs)
            kvs.extend(_key_value(kv) for kv in answer.kvs)
            size += sum(len(kv.key) + len(kv.value) for kv in answer.kvs)
            if max_keys is not None and len(kvs) > max_keys:
                raise EtcdTooLarge(self.endpoint, what, f"more than {max_keys} keys")
            if max_bytes is not None and size > max_bytes:
                raise EtcdTooLarge(self.endpoint, what, f"more than {max_bytes} bytes")
            if not answer.more or not answer.kvs:
                return RangeResult(tuple(kvs), revision, first.cluster_id, first.raft_term)
            start = answer.kvs[-1].key + b"\0"

    async def put(self, key: str, value: str | bytes, lease: int = 0) -> Header:
        """Write a key."""
        answer = await self._call("KV/Put", f"put {key}", key=encode_key(key), value=_bytes(value), lease=lease)
        return _header(answer.header)

    async def delete(self, key: str) -> bool:
        """Delete a key; False when it was not there."""
        answer = await self._call("KV/DeleteRange", f"delete {key}", message="DeleteRange", key=encode_key(key))
        return bool(answer.deleted)

    async def delete_prefix(self, prefix: str) -> int:
        """Delete all keys that begin with `prefix`; how many there were. ValueError for the empty prefix."""
        if not prefix:
            raise ValueError("refusing to delete every key of etcd: name a prefix")
        start = encode_key(prefix)
        answer = await self._call("KV/DeleteRange", f"delete {prefix}*", key=start, range_end=prefix_end(start))
        return int(answer.deleted)

    async def txn(
        self, compare: Iterable[Compare], success: Iterable[Operation], failure: Iterable[Operation] = ()
    ) -> TxnResult:
        """One transaction, tried once: EtcdUnavailable leaves open whether it was done."""
        compares, operations, others = list(compare), list(success), list(failure)
        keys = sorted({item.key for item in (*compares, *operations, *others)})
        what = f"txn on {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more keys" if len(keys) > 3 else "")
        answer = await self._call(
            "KV/Txn",
            what,
            repeat=False,
            compare=[_compare(item) for item in compares],
            success=[_operation(item) for item in operations],
            failure=[_operation(item) for item in others],
        )
        responses: list[tuple[KeyValue, ...] | int | None] = []
        for response in answer.responses:
            if response.HasField("response_range"):
                responses.append(tuple(_key_value(kv) for kv in response.response_range.kvs))
            elif response.HasField("response_delete_range"):
                responses.append(response.response_delete_range.deleted)
            else:
                responses.append(None)
        return TxnResult(answer.succeeded, tuple(responses), _header(answer.header))

    async def compact(self, revision: int) -> None:
        """Forget history before `revision`."""
        await self._call("KV/Compact", f"compact to {revision}", message="Compaction", revision=revision)

    # --- leases

    async def lease_grant(self, ttl: int) -> Lease:
        """A new lease of `ttl` seconds (the server may grant more)."""
        answer = await self._call("Lease/LeaseGrant", f"grant a lease of {ttl} s", TTL=ttl)
        if answer.error:
            raise EtcdError(self.endpoint, f"grant a lease of {ttl} s", answer.error)
        return Lease(answer.ID, answer.TTL)

    async def lease_keepalive(self, lease: int) -> Lease:
        """Renew a lease once; EtcdNotFound when it has expired or was revoked."""
        what = f"keep lease {lease:016x} alive"
        failures: list[EtcdUnavailable] = []
        for _ in self.endpoints:
            endpoint = self.endpoint
            try:
                return await self._keepalive_once(endpoint, what, lease)
            except EtcdUnavailable as error:
                self._failed(endpoint)
                failures.append(error)
        raise failures[-1]

    async def _keepalive_once(self, endpoint: str, what: str, lease: int) -> Lease:
        async with self._use(endpoint) as connection:
            stream = connection.channel.stream_stream(
                "/etcdserverpb.Lease/LeaseKeepAlive",
                request_serializer=proto.message("LeaseKeepAliveRequest").SerializeToString,
                response_deserializer=proto.message("LeaseKeepAliveResponse").FromString,
            )(timeout=self._timeout, metadata=_REQUIRE_LEADER)
            try:
                await stream.write(proto.message("LeaseKeepAliveRequest")(ID=lease))
                answer = await stream.read()
            except grpc.aio.AioRpcError as error:
                raise error_of(endpoint, what, error.code(), error.details() or "") from None
            except asyncio.InvalidStateError:
                raise EtcdUnavailable(endpoint, what, "the stream ended") from None
            finally:
                stream.cancel()
        if answer is grpc.aio.EOF:
            raise EtcdUnavailable(endpoint, what, "the stream ended without an answer")
        self.last_header = _header(answer.header)
        if answer.TTL <= 0:
            raise EtcdNotFound(endpoint, what, "the lease has expired")
        return Lease(answer.ID, answer.TTL)

    async def lease_revoke(self, lease: int) -> None:
        """End a lease; its keys are deleted. EtcdNotFound when it is gone already."""
        await self._call("Lease/LeaseRevoke", f"revoke lease {lease:016x}", ID=lease)

    # --- watch

    async def watch(
        self,
        prefix: str,
        revision: int,
        *,
        exact: bool = False,
        progress_interval: float = PROGRESS_INTERVAL,
        inactivity_timeout: float = INACTIVITY_TIMEOUT,
        max_bytes: int | None = None,
    ) -> AsyncGenerator[WatchBatch, None]:
        """Changes of all keys that begin with `prefix` (of the one key when `exact`) from `revision` on (0: from now).

        The first batch is empty and says that the watch stands. After `progress_interval` seconds of silence the
        server is asked for a sign of life, after `inactivity_timeout` the watch counts as broken. A sign of life has
        no events, and its revision is no proof that all events before it were delivered (etcd before 3.4.25 and
        3.5.8 may send it too early, etcd issue 15220). The iterator never resumes by itself; it raises EtcdCompacted,
        EtcdPermissionDenied, EtcdChanged or EtcdUnavailable, after which the caller lists again, and EtcdTooLarge for a
        batch of more than `max_bytes` of keys and values.
        """
        what = f"watch {prefix}"
        endpoint = self.endpoint
        key = encode_key(prefix)
        create = proto.message("WatchCreateRequest")(
            key=key or b"\0", start_revision=revision, progress_notify=True, fragment=True
        )
        if not exact:
            create.range_end = prefix_end(key)
        request = proto.message("WatchRequest")
        async with self._use(endpoint) as connection:
            stream = connection.channel.stream_stream(
                "/etcdserverpb.Watch/Watch",
                request_serializer=request.SerializeToString,
                response_deserializer=proto.message("WatchResponse").FromString,
            )(metadata=_REQUIRE_LEADER)
            reader: asyncio.Future[Any] | None = None
            try:
                await within(stream.write(request(create_request=create)), inactivity_timeout)
                events: list[Event] = []
                size = 0
                cluster_id = 0
                heard = self._clock()
                while True:
                    reader = reader or asyncio.ensure_future(stream.read())
                    await asyncio.wait([reader], timeout=progress_interval)
                    if not reader.done():
                        await self._retire_if_renewed()
                        if connection.retired:
                            raise EtcdUnavailable(endpoint, what, "certificate files were renewed, connecting anew")
                        silence = self._clock() - heard
                        if silence >= inactivity_timeout:
                            raise EtcdUnavailable(endpoint, what, f"silent for {silence:.0f} s")
                        probe = request(progress_request=proto.message("WatchProgressRequest")())
                        await within(stream.write(probe), inactivity_timeout)
                        continue
                    answer = reader.result()
                    reader = None
                    heard = self._clock()
                    if answer is grpc.aio.EOF:
                        code, details = await stream.code(), await stream.details()
                        raise error_of(endpoint, what, code, details or "the server ended the stream")
                    header = _checked_header(endpoint, what, answer)
                    self._refuse_canceled(endpoint, what, answer)
                    if cluster_id and header.cluster_id != cluster_id:
                        raise EtcdChanged(endpoint, what, f"cluster id changed to {header.cluster_id:016x}")
                    cluster_id = header.cluster_id
                    _refuse_strange(endpoint, what, key, (event.kv for event in answer.events))
                    size += sum(len(event.kv.key) + len(event.kv.value) for event in answer.events)
                    if max_bytes is not None and size > max_bytes:
                        raise EtcdTooLarge(endpoint, what, f"more than {max_bytes} bytes in one change")
                    events.extend(Event(_key_value(e.kv), e.type == proto.EVENT_DELETE) for e in answer.events)
                    if answer.fragment:
                        continue  # a revision may be split: nothing of it is shown before its last part
                    yield WatchBatch(tuple(events), header.revision, cluster_id)
                    events, size = [], 0
            except grpc.aio.AioRpcError as error:
                self._failed(endpoint)
                raise error_of(endpoint, what, error.code(), error.details() or "") from None
            except EtcdUnavailable:
                self._failed(endpoint)
                raise
            except (asyncio.InvalidStateError, asyncio.TimeoutError) as error:
                self._failed(endpoint)
                raise EtcdUnavailable(endpoint, what, f"the stream broke ({error or 'timeout'})") from None
            finally:
                stream.cancel()
                if reader is not None:  # nobody reads its result any more: fetch it, else asyncio complains
                    reader.add_done_callback(lambda future: future.cancelled() or future.exception())

    @staticmethod
    def _refuse_canceled(endpoint: str, what: str, answer: Any) -> None:
        if not answer.canceled:
            return
        if answer.compact_revision:
            reason = f"compacted up to revision {answer.compact_revision}"
            raise EtcdCompacted(endpoint, what, reason, answer.compact_revision)
        reason = answer.cancel_reason.decode(errors="replace") or "the server cancelled the watch"
        # Seen with etcd 3.4: `created` and `canceled` in one answer, watch_id -1, "... PermissionDenied ...".
        if "permission denied" in reason.lower() or "permissiondenied" in reason.lower().replace(" ", ""):
            raise EtcdPermissionDenied(endpoint, what, reason)
        raise EtcdUnavailable(endpoint, what, reason)

    # --- maintenance

    async def status(self, endpoint: str | None = None, *, timeout: float | None = None) -> Status:
        """What the member behind `endpoint` (default: the current one) says about itself."""
        chosen = endpoint or self.endpoint
        answer = await self._call("Maintenance/Status", "status", endpoint=chosen, timeout=timeout)
        return Status(
            chosen,
            answer.version,
            answer.dbSize,
            answer.dbSizeInUse,
            answer.leader,
            answer.raftTerm,
            answer.raftIndex,
            answer.raftAppliedIndex,
            tuple(answer.errors),
            answer.isLearner,
            _header(answer.header),
        )

    async def defragment(self, endpoint: str, *, timeout: float = 300.0) -> None:
        """Defragment the one member behind `endpoint`; it does not answer meanwhile."""
        await self._call("Maintenance/Defragment", "defragment", endpoint=endpoint, timeout=timeout)

    async def move_leader(self, endpoint: str, target: int) -> None:
        """Ask the leader, which must be behind `endpoint`, to hand over to member `target`."""
        await self._call("Maintenance/MoveLeader", f"move leader to {target:x}", endpoint=endpoint, targetID=target)

    async def alarms(self) -> tuple[tuple[int, str], ...]:
        """Active alarms as (member id, name)."""
        answer = await self._call("Maintenance/Alarm", "list alarms", action=0)
        return tuple((item.memberID, _ALARMS.get(item.alarm, str(item.alarm))) for item in answer.alarms)

    async def alarm_disarm(self) -> None:
        """Disarm every active alarm."""
        for member, name in await self.alarms():
            number = next(key for key, value in _ALARMS.items() if value == name)
            await self._call("Maintenance/Alarm", f"disarm {name}", action=2, memberID=member, alarm=number)

    async def snapshot(
        self, path: str | os.PathLike[str], endpoint: str | None = None, *, timeout: float = 600.0
    ) -> int:
        """Write a snapshot (mode 0600) to `path`, under its name only when complete; its size in bytes.

        The file is what `etcdctl snapshot save` writes: the database followed by its SHA-256.
        """
        chosen = endpoint or self.endpoint
        self._targets.setdefault(chosen, parse_endpoint(chosen))
        part = Path(f"{os.fspath(path)}.part")
        size = 0
        async with self._use(chosen) as connection:
            stream = connection.channel.unary_stream(
                "/etcdserverpb.Maintenance/Snapshot",
                request_serializer=proto.message("SnapshotRequest").SerializeToString,
                response_deserializer=proto.message("SnapshotResponse").FromString,
            )(proto.message("SnapshotRequest")(), timeout=timeout)
            try:
                descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    async for answer in stream:
                        file.write(answer.blob)
                        size += len(answer.blob)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            except grpc.aio.AioRpcError as error:
                raise error_of(chosen, f"snapshot to {path}", error.code(), error.details() or "") from None
            finally:
                part.unlink(missing_ok=True)
        return size

    # --- members

    async def member_list(self) -> tuple[Member, ...]:
        """The members as this cluster knows them."""
        answer = await self._call("Cluster/MemberList", "list members", linearizable=True)
        return tuple(_member(item) for item in answer.members)

    async def member_add(self, peer_urls: Sequence[str], *, learner: bool = False) -> Member:
        """Add a member that will listen on `peer_urls`; tried once."""
        what = f"add member {','.join(peer_urls)}"
        answer = await self._call("Cluster/MemberAdd", what, repeat=False, peerURLs=list(peer_urls), isLearner=learner)
        return _member(answer.member)

    async def member_promote(self, member: int) -> None:
        """Make a learner a voting member; EtcdPrecondition while it has not caught up."""
        await self._call("Cluster/MemberPromote", f"promote member {member:x}", repeat=False, ID=member)

    async def member_update(self, member: int, peer_urls: Sequence[str]) -> None:
        """Change a member's peer URLs."""
        await self._call(
            "Cluster/MemberUpdate", f"update member {member:x}", repeat=False, ID=member, peerURLs=list(peer_urls)
        )

    async def member_remove(self, member: int) -> None:
        """Remove a member; tried once."""
        await self._call("Cluster/MemberRemove", f"remove member {member:x}", repeat=False, ID=member)

    # --- auth

    async def auth_enable(self) -> None:
        """Switch authentication on; needs user `root` with role `root`. No change when it is on already."""
        await self._call("Auth/AuthEnable", "enable auth", repeat=False)

    async def auth_status(self) -> bool:
        """Whether authentication is on. Any client may ask."""
        try:
            return bool((await self._call("Auth/AuthStatus", "auth status")).enabled)
        except EtcdPermissionDenied:
            return True
        except EtcdError as error:
            if "UNIMPLEMENTED" not in error.reason:
                raise
        # etcd 3.4 has no AuthStatus. Authenticate with an empty name fails either way, with different words.
        try:
            await self._call("Auth/Authenticate", "auth status", name="", password="")
        except EtcdPrecondition as error:
            if "not enabled" in error.reason:
                return False
            raise
        except EtcdError as error:
            if "authentication failed" in error.reason or "user name is empty" in error.reason:
                return True
            raise
        return True

    async def user_add(self, name: str) -> None:
        """Add a user without password: it is known by its certificate's CN only. EtcdExists when it is there."""
        options = proto.message("UserAddOptions")(no_password=True)
        await self._call("Auth/UserAdd", f"add user {name}", message="AuthUserAdd", name=name, options=options)

    async def user_list(self) -> tuple[str, ...]:
        """Names of all users."""
        return tuple((await self._call("Auth/UserList", "list users", message="AuthUserList")).users)

    async def user_get(self, name: str) -> tuple[str, ...]:
        """Roles of a user; EtcdNotFound when there is none."""
        return tuple((await self._call("Auth/UserGet", f"get user {name}", message="AuthUserGet", name=name)).roles)

    async def user_delete(self, name: str) -> None:
        """Delete a user."""
        await self._call("Auth/UserDelete", f"delete user {name}", message="AuthUserDelete", name=name)

    async def user_grant_role(self, user: str, role: str) -> None:
        """Give a user a role (again: no change)."""
        what = f"grant role {role} to user {user}"
        await self._call("Auth/UserGrantRole", what, message="AuthUserGrantRole", user=user, role=role)

    async def user_revoke_role(self, user: str, role: str) -> None:
        """Take a role from a user."""
        what = f"revoke role {role} from user {user}"
        await self._call("Auth/UserRevokeRole", what, message="AuthUserRevokeRole", name=user, role=role)

    async def role_add(self, name: str) -> None:
        """Add a role without permissions; EtcdExists when it is there."""
        await self._call("Auth/RoleAdd", f"add role {name}", message="AuthRoleAdd", name=name)

    async def role_list(self) -> tuple[str, ...]:
        """Names of all roles."""
        return tuple((await self._call("Auth/RoleList", "list roles", message="AuthRoleList")).roles)

    async def role_get(self, name: str) -> tuple[Permission, ...]:
        """Permissions of a role; EtcdNotFound when there is none. A range that is neither one key nor a prefix of
        its key is an error here: we never make one."""
        answer = await self._call("Auth/RoleGet", f"get role {name}", message="AuthRoleGet", role=name)
        kinds = {number: kind for kind, number in _PERMISSIONS.items()}
        permissions = []
        for perm in answer.perm:
            if perm.range_end and perm.range_end != prefix_end(perm.key):
                reason = f"permission on the range {perm.key!r}..{perm.range_end!r} is not a prefix"
                raise EtcdError(self.endpoint, f"get role {name}", reason)
            permissions.append(Permission(kinds[perm.permType], decode_key(perm.key), bool(perm.range_end)))
        return tuple(permissions)

    async def role_delete(self, name: str) -> None:
        """Delete a role."""
        await self._call("Auth/RoleDelete", f"delete role {name}", message="AuthRoleDelete", role=name)

    async def role_grant_permission(self, role: str, permission: Permission) -> None:
        """Give a role a permission (replaces the one on the same range)."""
        key = encode_key(permission.key)
        perm = proto.message("Permission")(
            permType=_PERMISSIONS[permission.kind], key=key, range_end=prefix_end(key) if permission.prefix else b""
        )
        what = f"grant role {role} {permission.kind} on {permission.key}{'*' if permission.prefix else ''}"
        await self._call("Auth/RoleGrantPermission", what, message="AuthRoleGrantPermission", name=role, perm=perm)

    async def role_revoke_permission(self, role: str, permission: Permission) -> None:
        """Take a permission from a role."""
        key = encode_key(permission.key)
        end = prefix_end(key) if permission.prefix else b""
        what = f"revoke role {role} on {permission.key}{'*' if permission.prefix else ''}"
        await self._call(
            "Auth/RoleRevokePermission", what, message="AuthRoleRevokePermission", role=role, key=key, range_end=end
        )
