# SPDX-License-Identifier: GPL-3.0-or-later
"""ICMP echo over the overlay: the shell around `desired.reach`.

Echo requests go from this host's mesh address to the mesh addresses of other nodes, through the same
programs, tunnel and encryption as the workloads' packets. The answer comes from the other kernel, so a
dead agent over there changes nothing. A site's gateway asks the gateways of other sites the same way, through its
tunnels. Format: RFC 792.

Beside the small ones there are some as large as the routes allow, which nobody on the way may fragment. And the other
nodes' own requests are heard: who is heard and does not answer does not hear us.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping

from isthmus_agent.agent.log import fields
from isthmus_agent.desired import path_mtu
from isthmus_agent.desired.datapath import Address
from isthmus_agent.desired.path_mtu import PathState
from isthmus_agent.desired.reach import NodeKey, ProbeTable, Reachability, Target

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds; an answer that needs longer is a miss
FULL_INTERVAL = 5  # rounds between two packets of full size that only look whether all is as it was
WHOLE = 0x4F
"""Mark of packets that the tunnel, too, must not let be fragmented (ISTHMUS_MARK_WHOLE)."""
_ECHO_REPLY, _ECHO = 0, 8
_HEADERS = 28  # bytes of IP and ICMP
IP_FREEBIND = 15  # ip(7); the socket module does not name it before 3.14
_IP_PKTINFO = 8
_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: device, source, unused
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE = 10, 3  # ip(7): not to be fragmented, whatever the kernel has learnt of the way


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return ~total & 0xFFFF


def echo_request(identifier: int, sequence: int, size: int = path_mtu.SMALL) -> bytes:
    """One ICMP echo request; `size` in bytes with the IP header that the kernel adds."""
    payload = b"isthmus\0".ljust(size - _HEADERS, b"\0")
    head = struct.pack("!BBHHH", _ECHO, 0, 0, identifier, sequence)
    return struct.pack("!BBHHH", _ECHO, 0, checksum(head + payload), identifier, sequence) + payload


def parse_reply(packet: bytes) -> tuple[int, int] | None:
    """(identifier, sequence) of an echo reply as a raw IPv4 socket delivers it (with its IP header), or None."""
    return _parse(packet, _ECHO_REPLY)


def is_request(packet: bytes) -> bool:
    """Whether it is an echo request, as a raw IPv4 socket delivers it."""
    return _parse(packet, _ECHO) is not None


def _parse(packet: bytes, wanted: int) -> tuple[int, int] | None:
    if len(packet) < _HEADERS:
        return None
    start = (packet[0] & 0x0F) * 4
    if len(packet) < start + 8:
        return None
    kind, code, _, identifier, sequence = struct.unpack_from("!BBHHH", packet, start)
    return (identifier, sequence) if (kind, code) == (wanted, 0) else None


class Prober:
    """Probes the targets once a second and keeps the verdicts; `changed` is called when one turns. With `device` what
    is sent leaves by it, whatever routes there are; answers may come any way."""

    def __init__(self, source: Address, changed: Callable[[], None], device: str = "") -> None:
        self.table = ProbeTable()
        self.paths: dict[NodeKey, PathState] = {}
        self.heard: dict[NodeKey, float] = {}  # when a request of a node came last, monotonic
        self._source = source
        self._device = device
        self._changed = changed
        self._targets: tuple[Target, ...] = ()
        self._nodes: dict[str, NodeKey] = {}  # by address
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._full_identifier = self._identifier ^ 1
        self._sequence = 0
        self._outstanding: dict[str, tuple[NodeKey, int, float]] = {}  # address -> node, sequence, sent
        self._full: dict[str, tuple[NodeKey, int]] = {}  # address -> node, size; of this round
        self._send_errors: dict[NodeKey, str] = {}

    def view(self) -> Reachability:
        return self.table.view()

    def retarget(self, targets: tuple[Target, ...], mtus: Mapping[NodeKey, int]) -> None:
        """Probe these from the next round on; `mtus`: of the routes to nodes, in bytes."""
        self._follow_mtus({target.node: mtus[target.node] for target in targets if target.node in mtus})
        if targets == self._targets:
            return
        self._targets = targets
        self._nodes = {str(target.address): target.node for target in targets}
        self.heard = {node: when for node, when in self.heard.items() if node in self._nodes.values()}
        self.table.retarget(target.node for target in targets)
        kept = {target.node for target in targets}
        self._outstanding = {a: entry for a, entry in self._outstanding.items() if entry[0] in kept}
        self._send_errors = {node: text for node, text in self._send_errors.items() if node in kept}

    def _follow_mtus(self, mtus: Mapping[NodeKey, int]) -> None:
        if mtus == {node: path.full for node, path in self.paths.items()}:
            return
        known, self.paths = self.paths, {}
        for node, mtu in mtus.items():
            path = known.get(node)
            self.paths[node] = path if path is not None and path.full == mtu else PathState(mtu)
        self._full = {a: entry for a, entry in self._full.items() if known.get(entry[0]) is self.paths.get(entry[0])}

    async def run(self) -> None:
        """Probe until cancelled. PermissionError without CAP_NET_RAW and CAP_NET_ADMIN."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
        loop = asyncio.get_running_loop()
        try:
            # With the mesh address as source a probe uses table 730: over the overlay or not at all.
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, WHOLE)
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
        for address, (node, size) in self._full.items():
            if address not in self._outstanding:  # else nothing comes back, of whatever size
                self._record_path(node, size, answered=False)
        self._full.clear()
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
        self._send_full(sock)
        if news:
            self._changed()

    def _way(self) -> list[tuple[int, int, bytes]]:
        """The control message that names the device. OSError when it is not there."""
        if not self._device:
            return []
        index = socket.if_nametoindex(self._device)
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO.pack(index, self._source.packed, bytes(4)))]

    def _send_full(self, sock: socket.socket) -> None:
        """To each node that answers, in turn."""
        for number, target in enumerate(self._targets):
            path, state = self.paths.get(target.node), self.table.states.get(target.node)
            if path is None or state is None or state.misses or state.last_answer is None:
                continue
            if not path.urgent and path.mtu is not None and (self._sequence + number) % FULL_INTERVAL:
                continue
            address, size = str(target.address), path_mtu.next_size(path)
            self._full[address] = target.node, size
            # What cannot be sent, as the device takes less than the routes, is lost.
            with contextlib.suppress(OSError):
                sock.sendto(echo_request(self._full_identifier, self._sequence, size), (address, 0))

    def _read(self, sock: socket.socket) -> None:
        news = False
        for _ in range(256):
            try:
                packet, (address, _) = sock.recvfrom(256)
            except BlockingIOError:
                break
            reply = parse_reply(packet)
            if reply is None:
                if address in self._nodes and is_request(packet):
                    self.heard[self._nodes[address]] = time.monotonic()
                continue
            if reply == (self._full_identifier, self._sequence):
                if address in self._full:
                    self._record_path(*self._full.pop(address), answered=True)
                continue
            entry = self._outstanding.get(address)
            if entry is None or reply != (self._identifier, entry[1]):
                continue  # someone else's ping, or an answer that came too late
            del self._outstanding[address]
            now = time.monotonic()
            news |= self._record(entry[0], now - entry[2], now)
        if news:
            self._changed()

    def _record_path(self, node: NodeKey, size: int, *, answered: bool) -> None:
        before = self.paths.get(node)
        if before is None:
            return
        after = self.paths[node] = path_mtu.step(before, size, answered)
        name = "/".join(node)
        if bool(after.lost) != bool(before.lost):
            words = "packets of full size do not pass to node" if after.lost else "packets of full size pass again"
            logger.warning(words, extra=fields(node=name, size=size))
        elif after.lost and after.mtu is not None and before.mtu is None:
            logger.warning("the way to node carries less than its routes", extra=fields(node=name, mtu=after.mtu))

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
