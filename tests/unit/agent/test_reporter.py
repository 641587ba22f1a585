# SPDX-License-Identifier: GPL-3.0-or-later
"""What an agent writes to own etcd, and when it writes it again."""

from __future__ import annotations

import asyncio

from isthmus_agent.agent.reporter import Reporter
from isthmus_agent.kvstore.client import Header, KeyValue, RangeResult
from isthmus_agent.kvstore.errors import EtcdError
from isthmus_mesh import keys
from isthmus_mesh.documents import NodeReport

NODE = keys.node_report_key("onprem-1")
REPORT = NodeReport("onprem-1", "onprem", ()).to_json()


class FakeEtcd:
    """Keys in memory; `writes` are the keys put, in order."""

    def __init__(self) -> None:
        self.items: dict[str, bytes] = {}
        self.writes: list[str] = []
        self.cluster_id, self.revision, self.raft_term = 7, 100, 4

    async def get(self, key: str) -> KeyValue | None:
        return KeyValue(key, self.items[key]) if key in self.items else None

    async def range(self, prefix: str) -> RangeResult:
        kvs = tuple(KeyValue(key, value) for key, value in self.items.items() if key.startswith(prefix))
        return RangeResult(kvs, self.revision, self.cluster_id, self.raft_term)

    async def put(self, key: str, value: str, lease: int = 0) -> Header:
        self.items[key] = value.encode()
        self.writes.append(key)
        self.revision += 1
        return Header(self.cluster_id, 1, self.revision, self.raft_term)


def looks(change: dict[str, int]) -> list[int]:
    """Writes after each look: two quiet ones, one after `change`, then one every 5 s for a minute."""
    etcd, now, found = FakeEtcd(), [0.0], []
    reporter = Reporter(etcd, "onprem-1", lambda: {NODE: REPORT}, clock=lambda: now[0])  # type: ignore[arg-type]

    async def run() -> None:
        for number in range(14):
            if number == 2:
                for name, value in change.items():
                    setattr(etcd, name, value)
            await reporter._look()
            found.append(len(etcd.writes))
            now[0] += 5.0

    asyncio.run(run())
    return found


def test_what_stands_is_not_written_again():
    assert looks({"revision": 5000, "raft_term": 9}) == [1] * 14


def test_after_an_etcd_went_back_reports_are_written_again_ever_more_rarely():
    """A registrar that was away holds its old value of a key against a list, but not against an event that it sees."""
    for change in ({"cluster_id": 8}, {"revision": 50}, {"raft_term": 2}):
        assert looks(change) == [1, 1, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5]


def test_a_job_that_works_does_not_hide_that_another_fails():
    reporter = Reporter(FakeEtcd(), "onprem-1", dict)  # type: ignore[arg-type]
    reporter._note("reports", EtcdError("https://a:1", "put x", "permission denied"))
    reporter._note("alive", None)
    assert "permission denied" in reporter.last_error
    reporter._note("reports", None)
    assert reporter.last_error == ""
