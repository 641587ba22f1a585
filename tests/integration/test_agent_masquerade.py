# SPDX-License-Identifier: GPL-3.0-or-later
"""Masquerading of what leaves the mesh, turned on and off with real `isthmusd` processes behind a router that has a
server outside the mesh."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from bpf.topology import Inside, InsideError, wait_for
from integration.test_agent_kernel import CLIENT
from integration.test_agent_native import Host, Routed, masquerades_by_itself, routed
from isthmus_agent.cli.client import ask
from isthmus_mesh.spec import spec_hash

__all__ = ["routed"]
pytestmark = pytest.mark.root

OUTSIDE = "203.0.113.7"
SERVER = f"""
import socket
with socket.create_server(("{OUTSIDE}", 80)) as server:
    while True:
        connection, (address, _port) = server.accept()
        with connection:
            connection.sendall(address.encode())
"""
BOUND = """
def bound(address, port=80):
    # The first line that a server says, asked from the workload's own address.
    with socket.socket() as s:
        s.settimeout(3)
        s.bind(("10.101.0.2", 0))
        s.connect((address, port))
        return s.makefile().readline()
"""
NATIVE = pytest.mark.parametrize("routed", ["plain", "demands"], indirect=True, ids=["tunnel", "native"])


@pytest.fixture
def client(routed: Routed) -> Iterator[Inside]:
    """A program of the workload on node a; outside, a server that answers with the address that it sees."""
    routed.router("ip", "link", "set", "lo", "up")
    routed.router("ip", "address", "add", f"{OUTSIDE}/32", "dev", "lo")
    pid = int(routed.router("sh", "-c", f"{sys.executable} -c '{SERVER}' > /dev/null 2>&1 & echo $!"))
    try:
        routed.both.client.do(CLIENT + BOUND + "\nresult = 1")
        wait_for(lambda: _serves(routed.both.client), "the server outside answers the host", 10)
        yield routed.both.client
    finally:
        os.kill(pid, signal.SIGKILL)


def _serves(client: Inside) -> bool:
    with contextlib.suppress(InsideError):
        return bool(client.do(f"result = dial({OUTSIDE!r})"))
    return False


def masquerade(host: Host, on: bool) -> None:
    """As `site` brings it: another specification, and a restart of the agent."""
    path = host.daemon.directory / "node.json"
    spec = json.loads(path.read_text())
    spec["node"].pop("masquerade", None)
    if on:
        spec["node"]["masquerade"] = True
    spec["hash"] = spec_hash(spec)
    path.write_text(json.dumps(spec))
    host.daemon.stop()
    host.daemon.start()


def seen(client: Inside, address: str = OUTSIDE, port: int = 80) -> str:
    return str(client.do(f"result = bound({address!r}, {port})"))


@NATIVE
def test_what_leaves_the_mesh_has_its_hosts_address_while_that_is_wanted(routed: Routed, client: Inside) -> None:
    both = routed.both
    client.do(
        "held = socket.create_connection(('10.102.0.2', 8080), 3); lines = held.makefile(); result = lines.readline()"
    )
    with pytest.raises(InsideError, match="No route to host"):
        seen(client)
    masquerade(both.a, True)
    assert seen(client) == both.a.node.underlay
    assert client.do("held.sendall(b'abc?'); result = int(lines.readline()) > 0") is True, "nobody inside noticed"
    assert both.dial() == ["b", "10.101.0.2"]
    assert ask(both.a.daemon.socket, "/v1/audit")["problems"] == []
    masquerade(both.a, False)
    with pytest.raises(InsideError, match="No route to host"):
        seen(client)
    assert client.do("held.sendall(b'abc?'); result = int(lines.readline()) > 0") is True
    assert "@mesh" not in both.a.run("nft", "list", "ruleset")


@NATIVE
def test_nothing_is_masqueraded_inside_the_mesh_whatever_other_rules_there_are(routed: Routed, client: Inside) -> None:
    both = routed.both
    masquerade(both.a, True)
    both.b.node.process("web").do(f"serve_tcp('b', {both.b.node.underlay!r}, 8081); result = 1")
    masquerades_by_itself(both.a)
    assert seen(client, "10.102.0.2", 8080).split() == ["b", "10.101.0.2"]
    assert seen(client, both.b.node.underlay, 8081).split() == ["b", "10.101.0.2"], "a host of the mesh"
    assert seen(client) == both.a.node.underlay
    # An address of the mesh that nobody has is not looked for outside.
    with pytest.raises(InsideError, match="No route to host"):
        seen(client, "10.103.0.2")
