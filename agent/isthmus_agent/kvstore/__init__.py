# SPDX-License-Identifier: GPL-3.0-or-later
"""The etcd v3 client (asyncio), its synchronous face, and the list-then-watch store."""

from __future__ import annotations

from .client import (
    Compare,
    Delete,
    EtcdClient,
    Event,
    Get,
    Header,
    KeyValue,
    Lease,
    Member,
    Operation,
    Permission,
    Put,
    RangeResult,
    Status,
    TxnResult,
    WatchBatch,
)
from .errors import (
    EtcdChanged,
    EtcdCompacted,
    EtcdError,
    EtcdExists,
    EtcdNoSpace,
    EtcdNotFound,
    EtcdPermissionDenied,
    EtcdPrecondition,
    EtcdUnavailable,
)
from .sync import SyncEtcd

__all__ = [
    "Compare",
    "Delete",
    "EtcdChanged",
    "EtcdClient",
    "EtcdCompacted",
    "EtcdError",
    "EtcdExists",
    "EtcdNoSpace",
    "EtcdNotFound",
    "EtcdPermissionDenied",
    "EtcdPrecondition",
    "EtcdUnavailable",
    "Event",
    "Get",
    "Header",
    "KeyValue",
    "Lease",
    "Member",
    "Operation",
    "Permission",
    "Put",
    "RangeResult",
    "Status",
    "SyncEtcd",
    "TxnResult",
    "WatchBatch",
]
