# SPDX-License-Identifier: GPL-3.0-or-later
"""Says when something that WireGuard between nodes or native routing hangs on has changed in the kernel: WireGuard's
devices, the routing rules, the host's underlay address, the settings of devices; for native routing, and for routes to
a site's gateway, also every device, routes that others make, those of ours that somebody takes away, and filters
(rtnetlink(7)). And when chains of nf_tables have."""

from __future__ import annotations

import abc
import asyncio
import errno
import socket
from collections.abc import Callable, Iterable

from isthmus_agent.desired.datapath import Address
from isthmus_agent.netlink import ROUTE_PROTOCOL, messages
from isthmus_agent.netlink.nftables import NETLINK_NETFILTER, TABLE

# RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_RULE, and RTNLGRP_IPV4_NETCONF (24)
_GROUPS = 0x1 | 0x10 | 0x80 | 1 << 23
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _DELRULE, _NEWNETCONF = 16, 17, 20, 21, 33, 80
# RTMGRP_TC and RTMGRP_IPV4_ROUTE
_NATIVE_GROUPS = 0x8 | 0x40
_NEWROUTE, _DELROUTE, _DELQDISC, _DELFILTER = 24, 25, 37, 45
_PROTOCOL = 5  # place of the protocol in struct rtmsg
# Of netfilter: NFNLGRP_NFTABLES (7), and messages of nf_tables, whose subsystem is in the upper byte:
# NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_DELCHAIN; NFT_MSG_DELRULE.
_NFTABLES_GROUP = 1 << 6
_OF_CHAINS = (0xA02, 0xA03, 0xA05)
_RULE_GONE = 0xA08


class _Watch(abc.ABC):
    """Calls `changed` in the event loop; also when events were lost."""

    def __init__(self, protocol: int, groups: int, changed: Callable[[], None]) -> None:
        self._protocol = protocol
        self._groups = groups
        self._changed = changed

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, self._protocol) as netlink:
            netlink.setblocking(False)
            netlink.bind((0, self._groups))
            self._changed()  # what happened before
            while True:
                try:
                    data = await loop.sock_recv(netlink, 1 << 17)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    self._changed()
                    continue
                if any(self._matters(kind, payload) for kind, _, _, payload in messages.split(data)):
                    self._changed()

    @abc.abstractmethod
    def _matters(self, kind: int, payload: bytes) -> bool:
        """Whether a message is of something that `changed` is for."""


class ChainWatch(_Watch):
    """Chains of nf_tables come and go, and our own rule goes. What others do to rules and sets, as firewalls and
    container runtimes do all day, is nothing."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__(NETLINK_NETFILTER, _NFTABLES_GROUP, changed)

    def _matters(self, kind: int, payload: bytes) -> bool:
        return kind in _OF_CHAINS or (kind == _RULE_GONE and TABLE.encode() + b"\0" in payload)


class NetworkWatch(_Watch):
    """What the network hangs on."""

    def __init__(
        self, devices: Iterable[str], underlay: Address, changed: Callable[[], None], native: bool = False
    ) -> None:
        super().__init__(socket.NETLINK_ROUTE, _GROUPS | (_NATIVE_GROUPS if native else 0), changed)
        self._devices = [device.encode() + b"\0" for device in devices]
        self._underlay = underlay.packed
        self._native = native

    def _matters(self, kind: int, payload: bytes) -> bool:
        if kind in (_NEWLINK, _DELLINK):
            return self._native or any(device in payload for device in self._devices)
        if kind == _NEWROUTE:
            return payload[_PROTOCOL] != ROUTE_PROTOCOL
        if kind in (_NEWADDR, _DELADDR):
            return self._underlay in payload
        return kind in (_DELRULE, _NEWNETCONF, _DELROUTE, _DELQDISC, _DELFILTER)
