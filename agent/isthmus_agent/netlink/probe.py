# SPDX-License-Identifier: GPL-3.0-or-later
"""What this kernel lacks of the network side, by trial in a scratch namespace. Leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import threading
from ipaddress import IPv4Address, IPv4Network

from isthmus_agent.desired.datapath import Datapath, Route, Rule
from isthmus_agent.netlink.errors import NetworkError
from isthmus_agent.netlink.network import OVERLAY, ROUTE_TABLE, RULE_PRIORITY, apply_network, ensure_overlay
from isthmus_agent.netlink.sockets import can_destroy

_CLONE_NEWNET = 0x40000000

# Documentation addresses (RFC 5737); one of each kind of object that we make.
_TRIAL = Datapath(
    cluster_id=1,
    addresses=frozenset({IPv4Address("192.0.2.1")}),
    routes=frozenset(
        {
            Route(IPv4Network("198.51.100.0/24"), IPv4Address("192.0.2.1"), 1400),
            Route(IPv4Network("203.0.113.0/24"), unreachable=True),
        }
    ),
    rules=frozenset({Rule(IPv4Network("192.0.2.0/28"), ROUTE_TABLE, RULE_PRIORITY)}),
)


def missing_features() -> list[str]:
    """Names of what is missing, empty if overlay, routes and rules work here. Needs root."""
    missing: list[str] = []

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET):
            missing.append(f"network namespaces: {os.strerror(ctypes.get_errno())}")
            return
        try:
            ensure_overlay(OVERLAY, 8472, 1450)
        except NetworkError as error:
            missing.append(f"VXLAN devices in collect-metadata mode (CONFIG_VXLAN): {error}")
            return
        try:
            apply_network(_TRIAL)
        except NetworkError as error:
            missing.append(f"policy rules and routes (CONFIG_IP_MULTIPLE_TABLES): {error}")
        if not can_destroy():
            missing.append("ending sockets by netlink (CONFIG_INET_DIAG_DESTROY)")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return missing
