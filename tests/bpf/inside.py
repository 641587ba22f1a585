# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs inside a network namespace and a cgroup; obeys its parent over stdin and stdout.

Each line in is JSON {"code": ...}, run in one lasting set of globals; the line out is
{"result": <value of `result`>} or {"errno": n, "error": text}. It ends when its stdin does.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import threading


def join(cgroup: str, netns: int) -> None:
    with open(os.path.join(cgroup, "cgroup.procs"), "w") as procs:
        procs.write(str(os.getpid()))
    if ctypes.CDLL(None, use_errno=True).setns(netns, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


def serve_tcp(name: str, address: str, port: int) -> None:
    """Says "<name> <client address>" to each connection, then counts and echoes what it gets."""
    listener = socket.create_server((address, port), backlog=64)

    def serve(connection: socket.socket, peer: tuple[str, int]) -> None:
        with connection:
            connection.sendall(f"{name} {peer[0]}\n".encode())
            total = 0
            while True:
                try:
                    data = connection.recv(1 << 16)
                except OSError:
                    return
                if not data:
                    return
                total += len(data)
                if data.endswith(b"?"):
                    connection.sendall(f"{total}\n".encode())

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=listener.accept(), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def serve_udp(name: str, address: str, port: int) -> None:
    """Answers each datagram with "<name> <sender's address>"."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, port))

    def serve() -> None:
        while True:
            _, peer = server.recvfrom(65536)
            server.sendto(f"{name} {peer[0]}".encode(), peer)

    threading.Thread(target=serve, daemon=True).start()


def line(connection: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(1)
        if not more:
            break
        data += more
    return data.decode().strip()


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def vxlan(vni: int, source: str, destination: str, ethertype: int = 0x0800, version: int = 4) -> bytes:
    """A VXLAN payload: Ethernet, IPv4, UDP to port 9."""
    payload = b"spoofed " * 8
    udp = struct.pack("!HHHH", 4000, 9, 8 + len(payload), 0) + payload
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    header = struct.pack("!BBHHHBBH", version << 4 | 5, 0, 20 + len(udp), 1, 0, 64, 17, 0) + addresses
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    ethernet = bytes.fromhex("020000000001") + bytes.fromhex("020000000002") + struct.pack("!H", ethertype)
    return struct.pack("!II", 0x08000000, vni << 8) + ethernet + header + udp


def main() -> None:
    join(sys.argv[1], int(sys.argv[2]))
    scope = dict(globals())
    print(json.dumps({"result": os.getpid()}), flush=True)
    for text in sys.stdin:
        scope["result"] = None
        try:
            exec(json.loads(text)["code"], scope)  # noqa: S102 - our own test's words
            answer = {"result": scope["result"]}
        except OSError as error:
            answer = {"errno": error.errno, "error": repr(error)}
        except Exception as error:
            answer = {"errno": 0, "error": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
