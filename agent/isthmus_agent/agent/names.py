# SPDX-License-Identifier: GPL-3.0-or-later
"""Names for the local dnsmasq: a hosts file (`addn-hosts`, dnsmasq(8)) and a signal to read it."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from isthmus_agent.agent.files import write_atomically
from isthmus_agent.agent.log import fields
from isthmus_agent.desired.datapath import Address

logger = logging.getLogger(__name__)


def render(names: Mapping[str, Address]) -> str:
    """One line a name, sorted."""
    return "".join(f"{address} {name}\n" for name, address in sorted(names.items()))


class NamesFile:
    """Writes the hosts file when it differs and tells dnsmasq."""

    def __init__(self, directory: Path) -> None:
        self._hosts = directory / "hosts"
        self._pid_file = directory / "dnsmasq.pid"

    def write(self, names: Mapping[str, Address]) -> bool:
        """True when the file changed."""
        text = render(names)
        try:
            if self._hosts.read_text() == text:
                return False
        except FileNotFoundError:
            pass
        write_atomically(self._hosts, text.encode(), 0o644)
        self._reload()
        return True

    def _reload(self) -> None:
        """SIGHUP to dnsmasq; one that starts later reads the file by itself."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            return
        except ValueError:
            logger.error("dnsmasq's pid file holds no number", extra=fields(path=str(self._pid_file)))
            return
        if command != "dnsmasq":
            return  # an old pid file: the number belongs to another program now
        try:
            os.kill(pid, signal.SIGHUP)
        except ProcessLookupError:
            return
        except PermissionError as error:
            logger.error(
                "cannot tell dnsmasq to read the names; isthmusd.service needs CAP_KILL",
                extra=fields(pid=pid, error=str(error)),
            )
