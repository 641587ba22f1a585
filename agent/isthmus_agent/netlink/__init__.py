# SPDX-License-Identifier: GPL-3.0-or-later
"""The overlay device, our addresses, routes and rules, our table of netfilter, and ending sockets.

All functions are synchronous and act in the calling thread's network namespace. pyroute2's
synchronous classes cannot run inside a running event loop: call these functions in a thread.
"""

from isthmus_agent.netlink import namespaces, settings, wireguard
from isthmus_agent.netlink.errors import NetworkError, OverlayMissing
from isthmus_agent.netlink.network import (
    OVERLAY,
    ROUTE_PROTOCOL,
    ROUTE_TABLE,
    RULE_PRIORITY,
    NetworkResult,
    apply_network,
    audit_network,
    ensure_overlay,
    other_devices,
    overlay_index,
    overlays_of_others,
    remove_network,
    routed_over,
    tunnel_routes,
    underlay_mtu,
    underlay_ways,
)
from isthmus_agent.netlink.nftables import guard_drops, mend_keep_source
from isthmus_agent.netlink.probe import missing_features
from isthmus_agent.netlink.sockets import destroy_pods_sockets, destroy_sockets

__all__ = [
    "OVERLAY",
    "ROUTE_PROTOCOL",
    "ROUTE_TABLE",
    "RULE_PRIORITY",
    "NetworkError",
    "NetworkResult",
    "OverlayMissing",
    "apply_network",
    "audit_network",
    "destroy_pods_sockets",
    "destroy_sockets",
    "ensure_overlay",
    "guard_drops",
    "mend_keep_source",
    "missing_features",
    "namespaces",
    "other_devices",
    "overlay_index",
    "overlays_of_others",
    "remove_network",
    "routed_over",
    "settings",
    "tunnel_routes",
    "underlay_mtu",
    "underlay_ways",
    "wireguard",
]
