# SPDX-License-Identifier: GPL-3.0-or-later
"""Python's view of `bpf/include/abi.h`: one layout per C struct, compared with BTF by a test.

Integers are in host order (little-endian, as the objects are) unless the C type is __be16 or
__be32; those stay bytes in network order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, IPv6Network

from isthmus_agent.desired.datapath import Address, Network

ABI_VERSION = 1

IPCACHE_NODE = 1 << 0
IPCACHE_FIXED = 1 << 1
IPCACHE_ENCRYPTED = 1 << 2
IPCACHE_NATIVE = 1 << 3
IPCACHE_INSIDE = 1 << 4
IPCACHE_CNI = 1 << 5
PEER_ENCRYPTED = 1 << 0
PEER_NATIVE = 1 << 1
CONFIG_SET_RETVAL = 1 << 0


@dataclass(frozen=True)
class Layout:
    """`format` for `struct`, one item per name in `fields`; padding is a field, never implicit."""

    format: str
    fields: tuple[str, ...]

    @property
    def struct(self) -> struct.Struct:
        return struct.Struct("<" + self.format)


LAYOUTS: dict[str, Layout] = {
    "isthmus_addr": Layout("16s", ("a",)),
    "isthmus_ipcache_value": Layout("16sIHH", ("tunnel", "identity", "cluster_id", "flags")),
    "isthmus_lpm_key": Layout("I16s", ("prefixlen", "addr")),
    "isthmus_peer_value": Layout("16sHH", ("endpoint", "cluster_id", "flags")),
    "isthmus_wireguard": Layout("II2sH4s4s", ("ifindex", "second", "port", "pad", "underlay4", "advertised4")),
    "isthmus_native": Layout("I4s", ("ifindex", "underlay4")),
    "isthmus_local_value": Layout("II", ("identity", "flags")),
    "isthmus_workload_value": Layout("16s16s", ("addr4", "addr6")),
    "isthmus_svc_key": Layout("16s2sBB", ("addr", "port", "proto", "scope")),
    "isthmus_svc_value": Layout("IIII", ("svc_id", "slot_base", "slot_count", "affinity")),
    "isthmus_backend_value": Layout("16s2sBBI", ("addr", "port", "proto", "state", "cluster_id")),
    "isthmus_backend_stats": Layout("QQ", ("connects", "datagrams")),
    "isthmus_sock_value": Layout("16s16s2s2sIII", ("vip", "backend", "vport", "bport", "backend_id", "svc_id", "pad")),
    "isthmus_sock_backend": Layout("II", ("svc_id", "backend_id")),
    "isthmus_affinity_key": Layout("QII", ("client", "svc_id", "pad")),
    "isthmus_affinity_value": Layout("QII", ("used", "backend_id", "pad")),
    "isthmus_rev_key": Layout("Q16s2s6s", ("cookie", "backend", "port", "pad")),
    "isthmus_rev_value": Layout("16s2sH", ("vip", "port", "pad")),
    "isthmus_ident_key": Layout("16sIHH", ("dst", "identity", "cluster_id", "pad")),
    "isthmus_counter": Layout("QQ", ("packets", "bytes")),
    "isthmus_config": Layout("III", ("cluster_id", "identity_shift", "flags")),
}

IPCACHE_VALUE = LAYOUTS["isthmus_ipcache_value"].struct
LPM_KEY = LAYOUTS["isthmus_lpm_key"].struct
PEER_VALUE = LAYOUTS["isthmus_peer_value"].struct
WIREGUARD = LAYOUTS["isthmus_wireguard"].struct
NATIVE = LAYOUTS["isthmus_native"].struct
LOCAL_VALUE = LAYOUTS["isthmus_local_value"].struct
WORKLOAD_VALUE = LAYOUTS["isthmus_workload_value"].struct
SVC_KEY = LAYOUTS["isthmus_svc_key"].struct
SVC_VALUE = LAYOUTS["isthmus_svc_value"].struct
BACKEND_VALUE = LAYOUTS["isthmus_backend_value"].struct
BACKEND_STATS = LAYOUTS["isthmus_backend_stats"].struct
SOCK_BACKEND = LAYOUTS["isthmus_sock_backend"].struct
IDENT_KEY = LAYOUTS["isthmus_ident_key"].struct
COUNTER = LAYOUTS["isthmus_counter"].struct
CONFIG = LAYOUTS["isthmus_config"].struct
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")

NO_ADDRESS = bytes(16)


class Drop(IntEnum):
    """enum isthmus_drop; the names, in lower case, are those of the metrics."""

    NONE = 0
    UNKNOWN_PEER = 1
    BAD_IDENTITY = 2
    BAD_SOURCE = 3
    NO_TUNNEL = 4
    NOT_LOCAL_SOURCE = 5
    MALFORMED = 6
    NOT_IP = 7
    TUNNEL_KEY = 8
    NOT_LOCAL_DEST = 9
    NOT_ENCRYPTED = 10
    NOT_OVERLAY = 11
    WRONG_WAY = 12


class Meta(IntEnum):
    """enum isthmus_meta: index of the `meta` map."""

    BACKEND_ID = 0
    SERVICE_ID = 1


_MAPPED = bytes(10) + b"\xff\xff"


def pack_address(address: Address) -> bytes:
    """16 bytes, network order, IPv4 in its v4-mapped form."""
    return _MAPPED + int(address).to_bytes(4, "big") if address.version == 4 else address.packed


def unpack_address(data: bytes) -> Address:
    """The address of 16 bytes; v4-mapped ones are IPv4."""
    return IPv4Address(data[12:]) if data[:12] == _MAPPED else IPv6Address(data)


def pack_port(port: int) -> bytes:
    return port.to_bytes(2, "big")


def unpack_port(data: bytes) -> int:
    return int.from_bytes(data, "big")


def pack_prefix(network: Network) -> bytes:
    """isthmus_lpm_key: the prefix length counts from the 128-bit form's start."""
    length = network.prefixlen + (96 if network.version == 4 else 0)
    return LPM_KEY.pack(length, pack_address(network.network_address))


def unpack_prefix(data: bytes) -> str:
    """The prefix of an isthmus_lpm_key, for words."""
    length, packed = LPM_KEY.unpack(data)
    address = unpack_address(packed)
    if isinstance(address, IPv4Address):
        return f"{address}/{length - 96}"
    return str(IPv6Network((packed, length)))
