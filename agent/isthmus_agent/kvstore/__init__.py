# SPDX-License-Identifier: GPL-3.0-or-later
"""The etcd v3 client (asyncio), its synchronous face, and the list-then-watch store."""

from __future__ import annotations

import os

# Before grpc is imported. Its fork handlers start gRPC's threads again in every child, also in one that only runs
# a command (systemctl, an exec health check): the child then aborts now and then with "epoll_wait error: Bad file
# descriptor" (seen in 3 % of children of a process with an open channel). No child of ours uses gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

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
    EtcdTooLarge,
    EtcdUnavailable,
)
from .store import (
    DeletionRule,
    Limits,
    Listing,
    PrefixStore,
    canary_cluster_id,
    canary_rule,
    canary_value,
    same_history,
    written_since,
)
from .sync import SyncEtcd

__all__ = [
    "Compare",
    "Delete",
    "DeletionRule",
    "EtcdChanged",
    "EtcdClient",
    "EtcdCompacted",
    "EtcdError",
    "EtcdExists",
    "EtcdNoSpace",
    "EtcdNotFound",
    "EtcdPermissionDenied",
    "EtcdPrecondition",
    "EtcdTooLarge",
    "EtcdUnavailable",
    "Event",
    "Get",
    "Header",
    "KeyValue",
    "Lease",
    "Limits",
    "Listing",
    "Member",
    "Operation",
    "Permission",
    "PrefixStore",
    "Put",
    "RangeResult",
    "Status",
    "SyncEtcd",
    "TxnResult",
    "WatchBatch",
    "canary_cluster_id",
    "canary_rule",
    "canary_value",
    "same_history",
    "written_since",
]
