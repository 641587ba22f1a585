# SPDX-License-Identifier: GPL-3.0-or-later
"""Network configuration that the kernel refused."""

from __future__ import annotations


class NetworkError(Exception):
    """One or more changes failed; the others were made. `problems` and `changes` have a sentence each."""

    def __init__(self, problems: list[str] | str, changes: tuple[str, ...] = ()) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        self.changes = changes
        super().__init__("; ".join(self.problems))


class OverlayMissing(NetworkError):
    """The overlay device is not there, so nothing was done."""
