# SPDX-License-Identifier: GPL-3.0-or-later
"""Last-known-good: the documents a datapath was last made of, on disk.

It holds inputs (etcd keys and their values), not the result: a newer agent computes the datapath anew,
from the same checked values as if etcd had just given them. Values are UTF-8 text; others are never
accepted by the decoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

SCHEMA = 1


class LastGoodError(ValueError):
    """The file cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class LastGood:
    """`cluster` is the one whose etcd the documents came from; `written` is RFC 3339.

    `believed`: watched prefix -> (etcd cluster id, revision) of the last list whose absences were believed.
    An agent that starts on another etcd than that keeps what it knows (`kvstore.store`).
    """

    cluster: str
    written: str
    documents: Mapping[str, bytes]
    believed: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(
            {
                "schema": SCHEMA,
                "cluster": self.cluster,
                "written": self.written,
                "believed": {prefix: [f"{cid:016x}", revision] for prefix, (cid, revision) in self.believed.items()},
                "documents": {key: value.decode() for key, value in self.documents.items()},
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> LastGood:
        """LastGoodError when it is malformed or of another schema."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise LastGoodError(f"not JSON: {exc}") from exc
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise LastGoodError(f"not of schema {SCHEMA}")
        documents, cluster, written = value.get("documents"), value.get("cluster"), value.get("written")
        if not isinstance(documents, dict) or not isinstance(cluster, str) or not isinstance(written, str):
            raise LastGoodError("documents, cluster or written is missing")
        if not all(isinstance(item, str) for item in documents.values()):
            raise LastGoodError("a document is not text")
        try:
            believed = {str(key): (int(cid, 16), int(revision)) for key, (cid, revision) in value["believed"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise LastGoodError("believed is malformed") from exc
        try:
            return cls(cluster, written, {key: item.encode() for key, item in documents.items()}, believed)
        except UnicodeEncodeError as exc:
            raise LastGoodError("a document is not UTF-8") from exc
