# SPDX-License-Identifier: BSD-2-Clause
"""Generations of a host: what is kept of each, so that the host finds its way back by itself.

`DIRECTORY/<number>/manifest.json` is a `Generation`; beside it, named by its sha256, lies the content of every file in
it. `DIRECTORY/current` is a link to the number that the host is. The module `node` writes generations,
`isthmus_agent.generations` restores them; both hold `DIRECTORY/lock` (flock) while they change anything here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DIRECTORY = "/var/lib/isthmus/generations"
SCHEMA = 1
KEPT = 10
SECONDS = 60
"""From the end of a change until the host takes it back, unless it is confirmed."""
UNIT = "isthmus-rollback"
"""The transient timer that takes it back, and its service."""
BOOT = "/etc/systemd/system/isthmus-rollback-boot.service"
BOOT_WANTED = "/etc/systemd/system/multi-user.target.wants/isthmus-rollback-boot.service"
"""The unit that takes it back when the host boots before it was confirmed, which forgets the timer, and its link."""
SPEC = "/etc/isthmus/node.json"
"""Where a generation lacks this file, the host was no member of the mesh."""

WAITING, CONFIRMED, ROLLED_BACK = "waiting", "confirmed", "rolled back"
_FAILED = "; what failed: "


@dataclass(frozen=True)
class Entry:
    """What was at a path: a link, a file, or (neither) nothing.

    `restarts` are units that start anew when it is restored. Where there is a `mark` the file is the operator's, with
    or without a part of ours (`marked`); it is restored only when that differs.
    """

    link: str | None = None
    sha256: str | None = None
    mode: int = 0
    uid: int = 0
    gid: int = 0
    restarts: tuple[str, ...] = ()
    mark: str = ""
    marked: bool = False

    @property
    def absent(self) -> bool:
        return self.link is None and self.sha256 is None

    def same(self, other: Entry) -> bool:
        """Whether there is nothing to restore between them."""
        if self.mark:
            return self.marked == other.marked
        ours = (self.link, self.sha256, self.mode, self.uid, self.gid)
        return ours == (other.link, other.sha256, other.mode, other.uid, other.gid)


@dataclass(frozen=True)
class Generation:
    """A state of the host. `files` is None while it is being made; `previous` is the one to go back to.

    `spec` is the hash of its specification, `token` the run's that made it, `note` why it was made or taken back. One
    that waits has a note when it could not be taken back: `what_failed` of it.
    `root_answered`: before it, the host's first name server answered for names outside of the mesh.
    """

    number: int
    time: str
    spec: str
    state: str
    previous: int | None
    token: str
    note: str
    root_answered: bool
    files: Mapping[str, Entry] | None

    def to_dict(self) -> dict[str, Any]:
        files = None
        if self.files is not None:
            files = {
                path: {**vars(entry), "restarts": list(entry.restarts)} for path, entry in sorted(self.files.items())
            }
        return {"schema": SCHEMA, **vars(self), "files": files}

    @classmethod
    def from_dict(cls, document: Any) -> Generation:
        """Raises ValueError for a document that this version cannot read."""
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"it is no manifest of schema {SCHEMA}")
        try:
            values = {name: document[name] for name in cls.__dataclass_fields__ if name != "files"}
            files = document["files"]
            entries = None
            if files is not None:
                entries = {
                    path: Entry(**{**entry, "restarts": tuple(entry["restarts"])}) for path, entry in files.items()
                }
            return cls(**values, files=entries)
        except (KeyError, TypeError, AttributeError) as exc:
            raise ValueError(f"it is not complete: {exc}") from exc


def noted(why: str, problems: Sequence[str]) -> str:
    """A note, with what failed on the way back."""
    return f"{why}{_FAILED}{'; '.join(problems)}" if problems else why


def what_failed(note: str) -> str:
    """On the way back, in words; empty when nothing did."""
    return note.partition(_FAILED)[2]


def doomed(numbers: Iterable[int], keep: Iterable[int | None]) -> list[int]:
    """Which generations go: all but the newest `KEPT` and those that are to be kept."""
    return sorted(set(numbers) - set(sorted(numbers)[-KEPT:]) - set(keep))
