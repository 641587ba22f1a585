# SPDX-License-Identifier: BSD-2-Clause
"""Proofs by packets: an echo, a name, a connection. Standard library only."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import time

from ansible_collections.isthmus.mesh.plugins.module_utils import listener

_IP_MTU_DISCOVER, _IP_PMTUDISC_DO, _IP_MTU = 10, 2, 14
_A, _AAAA = 1, 28
_TIMEOUTS = (socket.timeout, TimeoutError)  # two until Python 3.10


class NoAnswer(Exception):
    """The proof failed; the text says how."""


def path_mtu(source: str, target: str, mark: int = 0) -> int:
    """What the route to `target` allows, in bytes, for packets with a mark."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        probe.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        probe.bind((source, 0))
        probe.connect((target, 9))
        return probe.getsockopt(socket.IPPROTO_IP, _IP_MTU)


def echo(source: str, target: str, size: int, timeout: float, attempts: int = 3, mark: int = 0) -> float:
    """Seconds until an ICMP echo of `size` bytes (with its IP header, not to be fragmented) comes back."""
    payload = size - 28
    number = struct.unpack("=H", os.urandom(2))[0]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as wire:
        wire.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        wire.bind((source, 0))
        for attempt in range(attempts):
            began = time.monotonic()
            try:
                wire.sendto(_echo_request(number, attempt, payload), (target, 0))
            except OSError as exc:
                raise NoAnswer(f"it cannot be sent: {exc.strerror}") from exc
            while True:
                left = began + timeout - time.monotonic()
                if left <= 0:
                    break
                wire.settimeout(left)
                try:
                    packet, address = wire.recvfrom(65536)
                except TimeoutError:
                    break
                header = (packet[0] & 15) * 4
                kind, _code, _sum, found, sequence = struct.unpack_from(">BBHHH", packet, header)
                if address[0] == target and kind == 0 and (found, sequence) == (number, attempt):
                    return time.monotonic() - began
    raise NoAnswer(f"no answer to {attempts} packets of {size} bytes")


def _echo_request(number: int, sequence: int, size: int) -> bytes:
    body = bytes(index % 256 for index in range(size))
    head = struct.pack(">BBHHH", 8, 0, 0, number, sequence)
    return struct.pack(">BBHHH", 8, 0, _checksum(head + body), number, sequence) + body


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def knock(target: str, port: int, timeout: float) -> None:
    """Send TCP to a host; that nobody listens on the port is an answer of its too. NoAnswer when nothing comes back."""
    try:
        with socket.create_connection((target, port), timeout):
            pass
    except ConnectionRefusedError:
        pass
    except OSError as exc:
        raise NoAnswer(f"no answer from TCP port {port}: {exc.strerror or exc}") from exc


def lost(source: str, sizes: dict[str, int], count: int, gap: float, timeout: float) -> dict[str, int]:
    """How many of `count` ICMP echoes to each target do not come back. `sizes` has the bytes of those to each (with
    their IP header, not to be fragmented); all targets get one every `gap` seconds, and have `timeout` seconds after
    the last. What cannot be sent is lost."""
    number = struct.unpack("=H", os.urandom(2))[0]
    answered: dict[str, set[int]] = {target: set() for target in sizes}
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as wire:
        wire.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        wire.bind((source, 0))
        for sequence in range(count):
            for target, size in sizes.items():
                with contextlib.suppress(OSError):
                    wire.sendto(_echo_request(number, sequence, size - 28), (target, 0))
            _answers(wire, number, answered, gap, count)
        _answers(wire, number, answered, timeout, count)
    return {target: count - len(found) for target, found in answered.items()}


def _answers(wire: socket.socket, number: int, answered: dict[str, set[int]], seconds: float, count: int) -> None:
    """Notes what comes back within `seconds`, and ends when there is nothing more to come."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and any(len(found) < count for found in answered.values()):
        wire.settimeout(left)
        try:
            packet, address = wire.recvfrom(65536)
        except _TIMEOUTS:
            return
        kind, _code, _sum, found, sequence = struct.unpack_from(">BBHHH", packet, (packet[0] & 15) * 4)
        if kind == 0 and found == number and address[0] in answered:
            answered[address[0]].add(sequence)


def query(server: str, name: str, kind: str, timeout: float) -> tuple[int, list[str]]:
    """Ask one name server: (response code, addresses). `kind` is `A` or `AAAA`. RFC 1035."""
    number = struct.unpack(">H", os.urandom(2))[0]
    labels = b"".join(bytes([len(part)]) + part.encode("ascii") for part in name.rstrip(".").split("."))
    question = struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + b"\0"
    question += struct.pack(">HH", _A if kind == "A" else _AAAA, 1)
    try:
        answer = _exchange(server, question, timeout)
    except OSError as exc:
        raise NoAnswer(f"{server} does not answer: {exc.strerror or exc}") from exc
    if len(answer) < 12 or answer[:2] != question[:2]:
        raise NoAnswer(f"{server} answers something else")
    flags, _questions, records = struct.unpack_from(">HHH", answer, 2)
    at = len(question)
    found = []
    for _record in range(records):
        at = _skip_name(answer, at)
        kind_found, _class, _ttl, length = struct.unpack_from(">HHIH", answer, at)
        at += 10
        if kind_found == _A and length == 4:
            found.append(socket.inet_ntop(socket.AF_INET, answer[at : at + 4]))
        elif kind_found == _AAAA and length == 16:
            found.append(socket.inet_ntop(socket.AF_INET6, answer[at : at + 16]))
        at += length
    return flags & 15, found


def _skip_name(message: bytes, at: int) -> int:
    while message[at]:
        if message[at] & 0xC0:
            return at + 2
        at += message[at] + 1
    return at + 1


def _exchange(server: str, question: bytes, timeout: float) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.settimeout(timeout)
        wire.connect((server, 53))
        wire.send(question)
        return wire.recv(4096)


def request(address: str, port: int, timeout: float, http: tuple[str, str] | None = None) -> str:
    """Connect to a service; with `http` (host name, path) also ask and return the status line."""
    try:
        with socket.create_connection((address, port), timeout) as wire:
            if http is None:
                return "connected"
            wire.sendall(f"GET {http[1]} HTTP/1.0\r\nHost: {http[0]}\r\nConnection: close\r\n\r\n".encode("ascii"))
            line = wire.recv(4096).split(b"\r\n", 1)[0].decode("latin-1")
    except OSError as exc:
        raise NoAnswer(exc.strerror or str(exc)) from exc
    if not line.startswith("HTTP/"):
        raise NoAnswer("it does not answer HTTP")
    return line


def greeting(address: str, port: int, timeout: float) -> str:
    """The name that the listener of `listener` gives on TCP. NoAnswer when there is another one, or none."""
    try:
        with socket.create_connection((address, port), timeout) as wire:
            line = wire.recv(1024)
    except OSError as exc:
        raise NoAnswer(_reason(exc, timeout)) from exc
    if not line.startswith(listener.GREETING):
        raise NoAnswer("something else answers there than what was started for this question")
    return line[len(listener.GREETING) :].decode("utf-8", "replace").strip()


def returned(source: str, address: str, port: int, timeout: float, attempts: int = 3) -> str:
    """The name with which a datagram comes back from `listener`. `timeout` seconds each; NoAnswer after the last."""
    sent = listener.MARK + os.urandom(8).hex().encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.bind((source, 0))
        wire.settimeout(timeout)
        for _attempt in range(attempts):
            try:
                wire.connect((address, port))
                wire.send(sent)
                answer = wire.recv(1024)
            except _TIMEOUTS:
                continue
            except OSError as exc:
                raise NoAnswer(_reason(exc, timeout)) from exc
            if answer.startswith(sent + b" "):
                return answer[len(sent) + 1 :].decode("utf-8", "replace")
    raise NoAnswer(f"no answer to {attempts} datagrams")


# Of X509_verify_cert: signature failure, self-signed, issuer unknown. An expired certificate is not a foreign one.
_FOREIGN = (7, 18, 19, 20, 21)
_PARTIAL_CHAIN = 0x80000


def served_by(address: str, port: int, authority: str, timeout: float) -> None:
    """NoAnswer unless who listens has a certificate of this authority (PEM; "": whoever it is)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= _PARTIAL_CHAIN
    try:
        with socket.create_connection((address, port), timeout) as wire:
            if not authority:
                return
            context.load_verify_locations(cadata=authority)
            try:
                with context.wrap_socket(wire):
                    return
            except ssl.SSLCertVerificationError as exc:
                if exc.verify_code in _FOREIGN:
                    raise NoAnswer(
                        "another mesh's etcd, or no etcd, answers there: its certificate is not of this cluster's "
                        f"authority ({exc.verify_message})"
                    ) from exc
            except ssl.SSLError as exc:
                if exc.reason in ("WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING"):
                    raise NoAnswer("what answers there speaks no TLS, so it is no etcd of this mesh") from exc
                # It wants a certificate of ours, after its own was found good.
    except OSError as exc:
        raise NoAnswer(_reason(exc, timeout)) from exc


def _reason(exc: OSError, timeout: float) -> str:
    if isinstance(exc, _TIMEOUTS):
        return f"no answer within {timeout:g} s"
    if isinstance(exc, ConnectionRefusedError):
        return "refused"
    return (exc.strerror or str(exc)).lower()
