# SPDX-License-Identifier: GPL-3.0-or-later
"""The synchronous face of the etcd client, for Ansible modules and the command line."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from .client import CALL_TIMEOUT, EtcdClient, Header

P = ParamSpec("P")
R = TypeVar("R")


def _sync(method: Callable[Concatenate[EtcdClient, P], Awaitable[R]]) -> Callable[Concatenate[SyncEtcd, P], R]:
    def call(self: SyncEtcd, /, *args: P.args, **kwargs: P.kwargs) -> R:
        async def run() -> R:
            return await method(self.client, *args, **kwargs)

        return self.run(run())

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


class SyncEtcd:
    """`EtcdClient` without `await`: the same arguments, results and errors. No watches.

    Runs an event loop in a thread of its own, so that it works with or without a loop in the caller's thread. Use it
    as a context manager, or call `close`.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        ca: str | os.PathLike[str],
        cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
        *,
        timeout: float = CALL_TIMEOUT,
    ) -> None:
        self.client = EtcdClient(endpoints, ca, cert, key, timeout=timeout)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="etcd", daemon=True)
        self._thread.start()

    def __enter__(self) -> SyncEtcd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine on the client's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """Close the connections and end the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        self.run(self.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def last_header(self) -> Header | None:
        """Header of the latest answer."""
        return self.client.last_header

    get = _sync(EtcdClient.get)
    range = _sync(EtcdClient.range)
    put = _sync(EtcdClient.put)
    delete = _sync(EtcdClient.delete)
    delete_prefix = _sync(EtcdClient.delete_prefix)
    txn = _sync(EtcdClient.txn)
    compact = _sync(EtcdClient.compact)
    lease_grant = _sync(EtcdClient.lease_grant)
    lease_keepalive = _sync(EtcdClient.lease_keepalive)
    lease_revoke = _sync(EtcdClient.lease_revoke)
    status = _sync(EtcdClient.status)
    defragment = _sync(EtcdClient.defragment)
    move_leader = _sync(EtcdClient.move_leader)
    alarms = _sync(EtcdClient.alarms)
    alarm_disarm = _sync(EtcdClient.alarm_disarm)
    snapshot = _sync(EtcdClient.snapshot)
    member_list = _sync(EtcdClient.member_list)
    member_add = _sync(EtcdClient.member_add)
    member_promote = _sync(EtcdClient.member_promote)
    member_update = _sync(EtcdClient.member_update)
    member_remove = _sync(EtcdClient.member_remove)
    auth_enable = _sync(EtcdClient.auth_enable)
    auth_status = _sync(EtcdClient.auth_status)
    user_add = _sync(EtcdClient.user_add)
    user_list = _sync(EtcdClient.user_list)
    user_get = _sync(EtcdClient.user_get)
    user_delete = _sync(EtcdClient.user_delete)
    user_grant_role = _sync(EtcdClient.user_grant_role)
    user_revoke_role = _sync(EtcdClient.user_revoke_role)
    role_add = _sync(EtcdClient.role_add)
    role_list = _sync(EtcdClient.role_list)
    role_get = _sync(EtcdClient.role_get)
    role_delete = _sync(EtcdClient.role_delete)
    role_grant_permission = _sync(EtcdClient.role_grant_permission)
    role_revoke_permission = _sync(EtcdClient.role_revoke_permission)
