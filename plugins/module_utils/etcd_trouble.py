# SPDX-License-Identifier: BSD-2-Clause
"""Why an etcd member does not serve or cannot be written, and the way back: in words, from what its host shows. The
ways are docs/operating.md, "What can be lost"."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit

if TYPE_CHECKING:
    from collections.abc import Iterable

SEGMENT = 64_000_000
"""Bytes that etcd reserves for the next part of its log (server/wal/wal.go): with less it ends sooner or later."""
JOURNAL_LINES = 300
"""Of a Go program that panics: the reason is above the stacks of all its goroutines."""

_FULL = re.compile(r"no space left on device|disk quota exceeded")
# What etcd 3.4 to 3.6 say at a start with damaged files: bbolt, the log's records.
_DAMAGED = re.compile(
    r"crc mismatch|checksum error|invalid database|failed to open database|failed to recover v3 backend"
    r"|unexpected fault address|already freed|wal: file not found"
)


def of_host(cluster: str, alone: bool, journal: str) -> str:
    """What is wrong with the member's own files; empty when nothing shows. ``alone``: it has no other member."""
    place = etcd_unit.DATA
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    if free < SEGMENT:
        return (
            f"The file system of {etcd_unit.DATA} is full: {free >> 20} MiB are free, etcd reserves {SEGMENT >> 20} "
            "MiB for its log. Nothing is lost. Next: free space there (old files of /var/lib/isthmus/etcd.removed-*, "
            "journals) or enlarge it, then `systemctl restart isthmus-etcd` on this host"
        )
    said = _DAMAGED.search(journal)
    if said is not None:
        others = (
            f"run isthmus.mesh.restore -e isthmus_restore={cluster}"
            if alone
            else "while most of the other members serve `mv /var/lib/isthmus/etcd /var/lib/isthmus/etcd.damaged` and "
            f"run isthmus.mesh.site, and it joins them anew; else isthmus.mesh.restore -e isthmus_restore={cluster}"
        )
        return (
            f"Its data is damaged (its journal says: {said[0]}). Next: `systemctl stop isthmus-etcd` on this host; "
            f"{others}"
        )
    if _FULL.search(journal):
        return (
            f"etcd ended because its disk was full, and {free >> 20} MiB are free now. Next: `systemctl restart "
            "isthmus-etcd` on this host"
        )
    return ""


def of_others(cluster: str, told: str) -> str:
    """When nothing is wrong with the member itself; ``told`` is what the others do (`etcd_admin.Survey.describe`)."""
    return (
        f"Of the other members: {told}. With half of them or fewer etcd serves nobody, and the mesh goes on with what "
        "it knows. Next: start them (`systemctl start isthmus-etcd`; `journalctl -u isthmus-etcd`). When the data of "
        'most is lost for good, see "Most members are lost" in docs/operating.md: this member\'s data is newer than '
        f"any backup; without it isthmus.mesh.restore -e isthmus_restore={cluster}"
    )


def divided(admin: Any, errors: Any, member: Any, connect: Any) -> str:
    """When the member on this host and the other declared ones are not of one etcd: which are where, and the way back;
    else empty. `admin` is `isthmus_agent.etcd_admin`, `errors` has its client's; a member that is silent for 3 s or,
    on another host, has no leader serves nobody and does not count."""
    found: dict[int, list[str]] = {}
    for name, url in sorted({**admin.other_endpoints(member), member.name: admin.local_endpoint(member)}.items()):
        with contextlib.suppress(errors.EtcdError, OSError), connect([url], 3.0) as client:
            status = client.status()
            if status.leader or name == member.name:
                found.setdefault(status.header.cluster_id, []).append(name)
    if len(found) < 2:
        return ""
    told = "; ".join(f"{', '.join(names)} in that with cluster id {number:x}" for number, names in found.items())
    return (
        f"The members are in different etcds: {told}. Why: the cluster began anew (isthmus.mesh.restore does that) "
        "while some of its hosts were off, and these came back with the data of before. Next: `systemctl stop "
        "isthmus-etcd` on every host of the older one (after a restore: those that were not in its run), then run "
        "isthmus.mesh.site: it moves their data to /var/lib/isthmus/etcd.removed-TIME, and they join the other"
    )


def of_alarms(alarms: Iterable[str]) -> str:
    """What an alarm means; only known ones have words."""
    words = {
        "NOSPACE": "NOSPACE: its database has reached etcd.quota_bytes, and every write is refused; nothing is lost. "
        'Next: compact, defragment and disarm, as docs/operating.md ("etcd\'s database is full") says; then, if it '
        "is to hold more, raise etcd.quota_bytes of the cluster and run isthmus.mesh.site",
        "CORRUPT": "CORRUPT: the members' data differ. Next: on the member that differs from the others (`etcdctl "
        "endpoint hashkv --cluster`) `systemctl stop isthmus-etcd`, `mv /var/lib/isthmus/etcd "
        "/var/lib/isthmus/etcd.damaged`, run isthmus.mesh.site, then `etcdctl alarm disarm`",
    }
    return "; ".join(words.get(alarm, f"{alarm}. Next: `journalctl -u isthmus-etcd`") for alarm in sorted(set(alarms)))
