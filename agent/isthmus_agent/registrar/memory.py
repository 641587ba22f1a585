# SPDX-License-Identifier: GPL-3.0-or-later
"""What this registrar knows of its cluster's own output, on its own disk.

A cluster of one member whose etcd lost its data while the registrar was not running has no other copy of which number
and address belongs to whom. Every registrar keeps one, leader or not. What etcd has is the truth as long as it is the
etcd that the file was written from, or one into which a registrar has published everything since; the file counts
only for what such an etcd cannot know: an etcd that is empty, or older than the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus_agent.agent.files import write_atomically
from isthmus_agent.agent.log import fields

logger = logging.getLogger(__name__)

SCHEMA = 1
FILE = "published.json"


@dataclass(frozen=True, slots=True)
class Known:
    """`keys`: own output by etcd key; `cluster_id`, `revision`: of the etcd that was last believed to hold all of it
    (0, 0: of none yet)."""

    keys: Mapping[str, str]
    cluster_id: int
    revision: int


class Memory:
    """The file `published.json` in `directory`, for one cluster of one estate. A disk that fails costs this copy."""

    def __init__(self, directory: Path, estate: str, cluster: str) -> None:
        self.path = directory / FILE
        self._estate = estate
        self._cluster = cluster
        self._told = ""

    def load(self) -> Known | None:
        """None when there is none that can be used; why not is logged."""
        try:
            document = json.loads(self.path.read_bytes())
            if document["schema"] != SCHEMA:
                raise ValueError(f"its schema is {document['schema']!r}, not {SCHEMA}")
            whose = (document["estate"], document["cluster"])
            if whose != (self._estate, self._cluster):
                raise ValueError(f"it is of cluster {whose[1]!r} of estate {whose[0]!r}")
            known = {str(key): value for key, value in document["keys"].items()}
            if not all(isinstance(value, str) for value in known.values()):
                raise ValueError("a value is not text")
            return Known(known, int(document["cluster_id"], 16), int(document["revision"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            logger.warning("own output of before is not used", extra=fields(path=str(self.path), reason=repr(error)))
            return None

    def save(self, known: Known) -> bool:
        """Write the file (mode 0600); False, and one line in the log, when the disk does not take it."""
        document = {
            "schema": SCHEMA,
            "estate": self._estate,
            "cluster": self._cluster,
            "cluster_id": f"{known.cluster_id:016x}",
            "revision": known.revision,
            "keys": dict(known.keys),
        }
        try:
            write_atomically(self.path, json.dumps(document, separators=(",", ":")).encode(), 0o600)
        except OSError as error:
            if self._told != str(error):
                logger.warning("own output is not kept on disk", extra=fields(path=str(self.path), error=str(error)))
            self._told = str(error)
            return False
        self._told = ""
        return True
