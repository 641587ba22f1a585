# SPDX-License-Identifier: GPL-3.0-or-later
"""What can go wrong with etcd. Every text names the endpoint, what was asked (with the key) and the reason."""

from __future__ import annotations


class EtcdError(Exception):
    """Base of all. `endpoint` is the URL that answered (or did not), `what` the call with its key."""

    def __init__(self, endpoint: str, what: str, reason: str) -> None:
        super().__init__(f"etcd {endpoint}: {what}: {reason}")
        self.endpoint = endpoint
        self.what = what
        self.reason = reason


class EtcdUnavailable(EtcdError):
    """No answer, no leader, or a stream that broke: try again later or elsewhere."""


class EtcdPermissionDenied(EtcdError):
    """The certificate's name (CN) has no role for this key or call."""


class EtcdCompacted(EtcdError):
    """The asked revision is gone; list again. `compact_revision` is the oldest that is left (0: not told)."""

    def __init__(self, endpoint: str, what: str, reason: str, compact_revision: int = 0) -> None:
        super().__init__(endpoint, what, reason)
        self.compact_revision = compact_revision


class EtcdNotFound(EtcdError):
    """A lease, member, user or role that does not exist."""


class EtcdExists(EtcdError):
    """A user, role, member or lease that exists already."""


class EtcdPrecondition(EtcdError):
    """The server's state does not allow the call (auth not enabled, learner not ready, ...)."""


class EtcdNoSpace(EtcdError):
    """The backend quota is used up: compact, defragment, then disarm the alarm."""


class EtcdTooLarge(EtcdError):
    """A prefix holds more than the reader is ready to take."""


class EtcdChanged(EtcdError):
    """Another etcd answers than before: its cluster id changed or its revision went back. List again."""
