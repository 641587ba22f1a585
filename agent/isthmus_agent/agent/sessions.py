# SPDX-License-Identifier: GPL-3.0-or-later
"""Sessions of WireGuard that only this host can open, as it is behind an address translation, are kept open.

WireGuard itself sends a packet every 25 s, which keeps the translation or makes it anew, but does not notice for two
minutes that the other side has lost the session, as after a restart, when nothing else is sent. So who was silent is
asked, and with who does not answer the session is begun anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from isthmus_agent.agent.kernel import Kernel, Tunnel
from isthmus_agent.agent.log import fields
from isthmus_agent.agent.prober import IP_FREEBIND, echo_request
from isthmus_agent.desired.datapath import Address, Datapath
from isthmus_agent.netlink.errors import NetworkError

logger = logging.getLogger(__name__)

LOOK = 3.0  # seconds from one look to the next
ASKED_AFTER = 1  # looks in a row at which nothing had come
REOPENED_AFTER = 3


class Silence:
    """For how many looks nothing came from whom; pure."""

    def __init__(self) -> None:
        self._received: dict[str, int] = {}  # by public key
        self._looks: dict[Address, int] = {}

    def look(self, datapath: Datapath, tunnels: Mapping[str, Tunnel]) -> dict[Address, int]:
        """Looks at which nothing came of a node by any of its keys, by the address that answers for it; of the nodes
        whose sessions this host keeps."""
        received: dict[str, int] = {}
        heard: dict[Address, bool] = {}
        for wanted in datapath.wireguard:
            tunnel = tunnels.get(wanted.device)
            for public, peer in wanted.peers.items():
                if peer.kept is None or tunnel is None or public not in tunnel.peers:
                    continue
                received[public] = tunnel.peers[public].received
                news = received[public] != self._received.get(public, -1)
                heard[peer.kept] = heard.get(peer.kept, False) or news
        self._received = received
        self._looks = {address: 0 if news else self._looks.get(address, 0) + 1 for address, news in heard.items()}
        return self._looks

    def begin_anew(self, address: Address) -> None:
        """The session with a node was opened anew."""
        self._looks[address] = 0


class Sessions:
    """Looks at the sessions of the datapath that `applied` gives, in the kernel that `call` runs functions in."""

    def __init__(
        self,
        kernel: Kernel,
        call: Callable[..., Awaitable[Any]],
        applied: Callable[[], Datapath | None],
        source: Address,
    ) -> None:
        self._kernel = kernel
        self._call = call
        self._applied = applied
        self._source = source
        self._silence = Silence()

    async def run(self) -> None:
        """Until cancelled. PermissionError without CAP_NET_RAW."""
        while True:
            await asyncio.sleep(LOOK)
            datapath = self._applied()
            if datapath is not None:
                await self._look(datapath)

    async def _look(self, datapath: Datapath) -> None:
        looks = self._silence.look(datapath, await self._call(self._kernel.tunnels))
        _ask(self._source, (address for address, number in looks.items() if number >= ASKED_AFTER))
        lost = {address for address, number in looks.items() if number >= REOPENED_AFTER}
        for wanted in datapath.wireguard if lost else ():
            publics = [public for public, peer in wanted.peers.items() if peer.kept in lost]
            if not publics:
                continue
            logger.warning(
                "sessions of WireGuard are opened anew, as nothing comes through them",
                extra=fields(device=wanted.device, peers=sorted(str(wanted.peers[each].endpoint) for each in publics)),
            )
            try:
                await self._call(self._kernel.reopen, wanted, publics)
            except NetworkError as error:
                logger.error("sessions of WireGuard cannot be opened anew", extra=fields(error=str(error)))
        for address in lost:
            self._silence.begin_anew(address)


def _ask(source: Address, addresses: Iterable[Address]) -> None:
    """Echoes whose answers nobody reads: that they came is seen at the device."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP) as sock:
        # As the prober's: over the overlay or not at all.
        sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        sock.bind((str(source), 0))
        for address in addresses:
            with contextlib.suppress(OSError):  # no route, or no session yet
                sock.sendto(echo_request(0, 0), (str(address), 0))
