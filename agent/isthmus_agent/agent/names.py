# SPDX-License-Identifier: GPL-3.0-or-later
"""Names for the local dnsmasq: a hosts file (`addn-hosts`, dnsmasq(8)).

`isthmus-dns-reload.path` sees the file change and has dnsmasq read it again, so the agent needs no right
over the name server.
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
    """Writes the hosts file when it differs."""

    def __init__(self, directory: Path) -> None:
        self._hosts = directory / "hosts"

    def write(self, names: Mapping[str, Address]) -> bool:
        """True when the file changed."""
        text = render(names)
        try:
            if self._hosts.read_text() == text:
                return False
        except FileNotFoundError:
            pass  # the first time after boot
        write_atomically(self._hosts, text.encode(), 0o644)
        return True
