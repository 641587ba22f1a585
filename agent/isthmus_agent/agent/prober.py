# SPDX-License-Identifier: GPL-3.0-or-later
"""ICMP echo over the overlay: the shell around `desired.reach`.

Echo requests go from this host's mesh address to the mesh addresses of other nodes, through the same
programs, tunnel and encryption as the workloads' packets. The answer comes from the other kernel, so a
dead agent over there changes nothing. A site's gateway asks the gateways of other sites the same way, through its
tunnels. Format: RFC 792.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import time
from collections.abc import Callable

from isthmus_agent.agent.log import fields
from isthmus_agent.desired.datapath import Address
from isthmus_agent.desired.reach import NodeKey, ProbeTable, Reachability, Target

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds; an answer that needs longer is a miss
_ECHO_REPLY, _ECHO = 0, 8
_IP_FREEBIND = 15  # ip(7); the socket module does not name it before 3.14
_IP_PKTINFO = 8
_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: device, source, unused


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return ~total & 0xFFFF


def echo_request(identifier: int, sequence: int) -> bytes:
    """One ICMP echo request with 8 bytes of payload."""
    payload = b"isthmus\0"
    head = struct.pack("!BBHHH", _ECHO, 0, 0, identifier, sequence)
    return struct.pack("!BBHHH", _ECHO, 0, checksum(head + payload), identifier, sequence) + payload


def parse_reply(packet: bytes) -> tuple[int, int] | None:
    """(identifier, sequence) of an echo reply as a raw IPv4 socket delivers it (with its IP header), or None."""
    if len(packet) < 28:
        return None
    start = (packet[0] & 0x0F) * 4
    if len(packet) < start + 8:
        return None
    kind, code, _, identifier, sequence = struct.unpack_from("!BBHHH", packet, start)
    return (identifier, sequence) if (kind, code) == (_ECHO_REPLY, 0) else None


class Prober:
    """Probes the targets once a second and keeps the verdicts; `changed` is called when one turns. With `device` what
    is sent leaves by it, whatever routes there are; answers may come any way."""

    def __init__(self, source: Address, changed: Callable[[], None], device: str = "") -> None:
        self.table = ProbeTable()
        self._source = source
        self._device = device
        self._changed = changed
        self._targets: tuple[Target, ...] = ()
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._sequence = 0
        self._outstanding: dict[str, tuple[NodeKey, int, float]] = {}  # address -> node, sequence, sent
        self._send_errors: dict[NodeKey, str] = {}

    def view(self) -> Reachability:
        return self.table.view()

    def retarget(self, targets: tuple[Target, ...]) -> None:
        """Probe these from the next round on."""
        if targets == self._targets:
            return
        self._targets = targets
        self.table.retarget(target.node for target in targets)
        kept = {target.node for target in targets}
        self._outstanding = {a: entry for a, entry in self._outstanding.items() if entry[0] in kept}
        self._send_errors = {node: text for node, text in self._send_errors.items() if node in kept}

    async def run(self) -> None:
        """Probe until cancelled. PermissionError without CAP_NET_RAW."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
        loop = asyncio.get_running_loop()
        try:
            # With the mesh address as source a probe uses table 730: over the overlay or not at all.
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            sock.bind((str(self._source), 0))
            loop.add_reader(sock, self._read, sock)
            next_round = loop.time()
            while True:
                self._round(sock)
                # Not a fixed grid: after a stall one late round, not a burst of misses.
                next_round = max(next_round + INTERVAL, loop.time() + INTERVAL / 2)
                await asyncio.sleep(next_round - loop.time())
        finally:
            loop.remove_reader(sock)
            sock.close()

    def _round(self, sock: socket.socket) -> None:
        now = time.monotonic()
        news = False
        for node, _, _ in self._outstanding.values():
            news |= self._record(node, None, now)
        self._outstanding.clear()
        self._sequence = (self._sequence + 1) & 0xFFFF
        request = echo_request(self._identifier, self._sequence)
        for target in self._targets:
            address = str(target.address)
            self._outstanding[address] = (target.node, self._sequence, now)
            try:
                sock.sendmsg([request], self._way(), 0, (address, 0))
                self._send_errors.pop(target.node, None)
            except OSError as error:
                # No route or no buffer: it counts as a miss at the next round.
                if self._send_errors.get(target.node) != str(error):
                    self._send_errors[target.node] = str(error)
                    logger.warning("probe cannot be sent", extra=fields(node="/".join(target.node), error=str(error)))
        if news:
            self._changed()

    def _way(self) -> list[tuple[int, int, bytes]]:
        """The control message that names the device. OSError when it is not there."""
        if not self._device:
            return []
        index = socket.if_nametoindex(self._device)
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO.pack(index, self._source.packed, bytes(4)))]

    def _read(self, sock: socket.socket) -> None:
        news = False
        for _ in range(256):
            try:
                packet, (address, _) = sock.recvfrom(256)
            except BlockingIOError:
                break
            reply = parse_reply(packet)
            entry = self._outstanding.get(address)
            if entry is None or reply != (self._identifier, entry[1]):
                continue  # someone else's ping, or an answer that came too late
            del self._outstanding[address]
            now = time.monotonic()
            news |= self._record(entry[0], now - entry[2], now)
        if news:
            self._changed()

    def _record(self, node: NodeKey, rtt: float | None, now: float) -> bool:
        before = self.table.states.get(node)
        news = self.table.record(node, rtt, now)
        after = self.table.states.get(node)
        if before is not None and after is not None and before.up != after.up:
            logger.warning(
                "node is reachable again" if after.up else "node does not answer",
                extra=fields(node="/".join(node), misses=after.misses),
            )
        return news
