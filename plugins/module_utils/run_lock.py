# SPDX-License-Identifier: BSD-2-Clause
"""The lock of a run where no etcd can hold it yet, a file; and what is said of a lock in either place."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import time
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Gone with the machine's next boot, and no change of the host that a refused inventory would leave behind.
FILE = "/run/isthmus-run.lock"

# Between two looks of a run at its locks: from the plan to the first write, and from one write to the next.
LOOKING = 120
CHANGING = 600


class HeldError(Exception):
    """Another run has the lock of the file; `holder` is its document."""

    def __init__(self, holder: Mapping[str, Any]) -> None:
        super().__init__(holder)
        self.holder = holder


def document(run: Mapping[str, str], seconds: int) -> dict[str, Any]:
    """What is written with the lock; times are this host's. `name` is the run in a word that can be typed."""
    now = time.time()
    name = hashlib.sha256(run["process"].encode()).hexdigest()[:8]
    return {**run, "name": name, "since": _utc(now), "until": _utc(now + seconds)}


def words(cluster: str, holder: Mapping[str, Any]) -> str:
    """For the one who finds it locked."""
    return (
        f"Cluster {cluster} is being changed by another run: {holder.get('by', 'somebody')} on "
        f"{holder.get('where', 'an unknown controller')} since {holder.get('since', 'an unknown time')}. This run "
        "stopped here. Why: two at once would deal the same addresses. Next: run the playbook again when that run has "
        f"ended; if it goes on no more, its lock ends at {holder.get('until', 'an unknown time')}. To take the lock "
        f"away before, when you know that it is dead: -e isthmus_break_lock={holder.get('name')}; what it would still "
        "write into the record is refused then"
    )


def take_file(wanted: Mapping[str, Any], breaking: str = "") -> None:
    """Hold the lock in `FILE` until ``wanted`` ends (`document`); `HeldError` when another run does.

    ``breaking`` is the name of the run that loses it, if it has it.
    """
    while True:
        with open(FILE, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_current(file):
                continue
            holder = _read(file)
            ours = holder.get("name") == wanted["name"]
            if not ours and holder.get("name") != breaking and str(holder.get("until", "")) >= _utc(time.time()):
                raise HeldError(holder)
            file.truncate(0)
            json.dump({**wanted, "since": holder["since"]} if ours else wanted, file)
            return


def release_file(name: str) -> bool:
    """Give the lock in `FILE` back if the run ``name`` has it; returns whether it had."""
    try:
        with open(FILE, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_current(file) or _read(file).get("name") != name:
                return False
            os.unlink(FILE)
            return True
    except FileNotFoundError:
        return False


def _is_current(file: IO[str]) -> bool:
    """Whether the file was not given back while its lock was waited for."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(FILE))
    except FileNotFoundError:
        return False


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.load(file)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
