# SPDX-License-Identifier: GPL-3.0-or-later
"""Names for the local dnsmasq: a hosts file (`addn-hosts`, dnsmasq(8)).

`isthmus-dns-reload.path` sees the file `changed` beside it, whose service takes it away and then has dnsmasq read the
hosts again, so the agent needs no right over the name server. A mark, because systemd does not see what changes while
the service of a path runs: a second write just after the first one would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from isthmus_agent.agent.files import write_atomically
from isthmus_agent.desired.datapath import Address


def render(names: Mapping[str, Address]) -> str:
    """One line a name, sorted."""
    return "".join(f"{address} {name}\n" for name, address in sorted(names.items()))


class NamesFile:
    """Writes the hosts file when it differs, and marks it as changed; once more at each start of the agent, since an
    earlier one may have died in between."""

    def __init__(self, directory: Path) -> None:
        self._hosts = directory / "hosts"
        self._mark = directory / "changed"
        self._marked = False

    def write(self, names: Mapping[str, Address]) -> bool:
        """True when the file changed."""
        text = render(names)
        try:
            differs = self._hosts.read_text() != text
        except FileNotFoundError:
            differs = True  # the first time after boot
        if differs:
            self._marked = False
            write_atomically(self._hosts, text.encode(), 0o644)
        if not self._marked:
            self._mark.touch()
            self._marked = True
        return differs
