# SPDX-License-Identifier: BSD-2-Clause
"""Revisions of clusters' documents in the estate record: the next one with each change, and who made it when. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .record import QUARANTINE, format_time, parse_time


@dataclass(frozen=True)
class Revisions:
    """Of a run at `now` by somebody. `digest` is the model's, `conflicts` are those of the record."""

    now: datetime
    by: str
    digest: str
    conflicts: AbstractSet[str]

    def stamped(self, document: dict[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
        """The old document when nothing changed, else the new one with the next revision."""
        if old is not None and all(
            old.get(key) == document.get(key) for key in (set(old) | set(document)) - {"revision", "last_applied"}
        ):
            return dict(old)
        if "released" in document:
            document["released"] = [
                entry for entry in document["released"] if self.now - parse_time(entry["at"]) < QUARANTINE
            ]
        document["revision"] = 1 if old is None else old["revision"] + 1
        document["last_applied"] = {"hash": self.digest, "when": format_time(self.now), "by": self.by}
        return document

    def settled(self, document: dict[str, Any], name: str, old: Mapping[str, Any] | None) -> dict[str, Any]:
        """The next revision also of a document that did not change, when copies of it are in conflict."""
        if old is None or name not in self.conflicts or document["revision"] > old["revision"]:
            return document
        applied = {"hash": self.digest, "when": format_time(self.now), "by": self.by}
        return {**document, "revision": old["revision"] + 1, "last_applied": applied}
