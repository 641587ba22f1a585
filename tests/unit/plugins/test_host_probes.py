# SPDX-License-Identifier: GPL-3.0-or-later
"""Ports, bundles and packets as the host modules see them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ansible_collections.isthmus.mesh.plugins.filter import etcd_hosts, mesh_hosts
from ansible_collections.isthmus.mesh.plugins.module_utils import bpfprobe, bundle, packets, ports
from foreign_programs import attached

PLATFORMS = [{"arch": "x86_64", "python": "3.11"}, {"arch": "aarch64", "python": "3.12"}]


def test_a_listener_is_found_and_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (found,) = ports.bound("tcp", port)
        assert (found.address, found.port) == ("127.0.0.1", port)
        assert f"(pid {os.getpid()})" in ports.holder(found)[0]
        assert ports.clashes([found], "127.0.0.1") == [found]
        assert ports.clashes([found], "192.0.2.1") == []
        assert ports.clashes([found], None) == [found]
    assert ports.bound("tcp", port) == []


@pytest.mark.parametrize(
    ("address", "clash"),
    [("0.0.0.0", True), ("127.0.0.1", True), ("::", True), ("::1", False)],  # noqa: S104 - compared, not bound
)
def test_a_socket_on_all_ipv4_addresses_collides(address: str, clash: bool) -> None:
    assert bool(ports.clashes([ports.Socket("tcp", address, 2379, 1)], None)) is clash


def test_an_ipv6_socket_on_an_ipv4_address_is_one_of_ipv4() -> None:
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::ffff:127.0.0.1", 0))
        listener.listen()
        (found,) = ports.bound("tcp", listener.getsockname()[1])
    assert found.address == "127.0.0.1"


def test_a_connection_is_no_listener() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        assert len(ports.bound("udp", port)) == 1
        one.connect(("127.0.0.1", 9))
        assert ports.bound("udp", port) == []


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ({"3.11": "/a", "3.9": "/b"}, ("3.11", "/a")),
        ({"3.12": "/a", "3.11": "/b"}, ("3.11", "/b")),
        ({"3.12": "/a"}, None),
        ({}, None),
    ],
)
def test_the_bundle_for_a_host(present: dict[str, str], chosen: tuple[str, str] | None) -> None:
    assert bundle.choose("x86_64", present, PLATFORMS) == chosen


def test_a_missing_bundle_names_the_command_that_makes_it() -> None:
    words = bundle.missing_words("db-1", "x86_64", {"3.9": "/a", "3.10": "/b", "3.12": "/c"}, PLATFORMS)
    assert "make bundle ARCH=x86_64 PYTHON=3.12" in words
    assert "db-1" in words
    assert "x86_64 with Python 3.11" in words
    assert "3.10" in bundle.missing_words("db-1", "x86_64", {"3.9": "/a"}, PLATFORMS)


ESTATE = {"clusters": {"a": {"etcd": {"hosts": ["a1", "a2", "gone"]}}, "b": {"etcd": {"hosts": ["b1"]}}, "c": {}}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("a", "a1"), ("b", "b1")]),
        ({"first": False}, [("a", "a2")]),
        ({"without": ["a"]}, [("b", "b1")]),
    ],
)
def test_etcd_hosts(options: dict[str, object], expected: list[tuple[str, str]]) -> None:
    found = etcd_hosts.etcd_hosts(ESTATE, ["a1", "a2", "b1"], **options)
    assert [(one["cluster"], one["host"]) for one in found] == expected


@pytest.mark.parametrize(
    "estate", [None, {}, [], {"clusters": []}, {"clusters": {"a": None}}, {"clusters": {"a": {"etcd": 1}}}]
)
def test_a_broken_estate_is_left_to_the_plan(estate: object) -> None:
    assert etcd_hosts.etcd_hosts(estate, ["a1"]) == []


def test_silent_hosts_are_left_out() -> None:
    specs = {name: {"cluster": {"name": "a"}, "node": {"mesh4": f"10.0.0.{at}"}} for at, name in enumerate(["x", "y"])}
    assert mesh_hosts.mesh_hosts(specs, ["x"]) == [{"name": "y", "cluster": "a", "mesh4": "10.0.0.1"}]


@contextlib.contextmanager
def serving(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """One TCP connection on the loopback is answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as wire:
                wire.sendall(answer(wire.recv(4096)))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            thread.join(5)


def test_an_http_answer_is_a_proof_and_anything_else_is_none() -> None:
    with serving(lambda asked: b"HTTP/1.0 200 OK\r\n\r\n" + asked) as port:
        assert packets.request("127.0.0.1", port, 2, ("web.shop", "/")) == "HTTP/1.0 200 OK"
    with serving(lambda _asked: b"SSH-2.0\r\n") as port, pytest.raises(packets.NoAnswer, match="does not answer HTTP"):
        packets.request("127.0.0.1", port, 2, ("web.shop", "/"))


def test_a_closed_port_is_told() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(packets.NoAnswer, match="Connection refused"):
        packets.request("127.0.0.1", port, 2)


@pytest.mark.root
def test_an_echo_on_the_loopback() -> None:
    assert packets.echo("127.0.0.1", "127.0.0.1", 1000, 2) < 2


DROPPING = """
table ip t {
    chain c {
        type filter hook input priority 0; policy accept;
        ip daddr 127.0.0.2 icmp type echo-request icmp sequence { 1, 4, 9 } drop
        ip daddr 127.0.0.3 drop
    }
}
"""
COUNTING = """
import json, time
from ansible_collections.isthmus.mesh.plugins.module_utils import packets
began = time.monotonic()
sizes = {"127.0.0.1": 1400, "127.0.0.2": 1400, "127.0.0.3": 84, "127.0.0.4": 65000}
print(json.dumps([packets.lost("127.0.0.1", sizes, 10, 0.01, 0.2), time.monotonic() - began]))
"""


@pytest.mark.root
def test_lost_packets_are_counted_for_each_target() -> None:
    """In a network of its own whose firewall drops some, and whose MTU is too small for one."""
    setup = 'ip link set lo up mtu 1500 && nft -f - && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--net", "sh", "-ec", setup, sys.executable, COUNTING],
        input=DROPPING,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lost, seconds = json.loads(done.stdout)
    assert lost == {"127.0.0.1": 0, "127.0.0.2": 3, "127.0.0.3": 10, "127.0.0.4": 10}
    assert 0.3 <= seconds < 3, "ten rounds of 10 ms, and what is asked for after the last"


@pytest.mark.root
def test_this_kernel_has_what_the_datapath_needs() -> None:
    assert bpfprobe.missing_features() == []
    assert bpfprobe.cgroup2_mount() is not None


@pytest.mark.root
def test_a_missing_feature_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bpfprobe._HOOKS, "connect4", 9999)
    (words,) = [one for one in bpfprobe.missing_features() if "hook" in one]
    assert "connect4" in words


@pytest.mark.root
def test_programs_of_others_at_our_hooks_are_found() -> None:
    root = bpfprobe.cgroup2_mount()
    assert root is not None
    cgroup = Path(root, f"isthmus-test-{os.getpid()}")
    cgroup.mkdir()
    try:
        assert bpfprobe.foreign_programs(str(cgroup)) == {}
        with attached(cgroup, {"connect4": b"cil_sock4_connec"[:15], "connect6": b"connect6", "sendmsg4": b""}):
            found = bpfprobe.foreign_programs(str(cgroup))
        assert found["connect4"] == ["cil_sock4_conne"]
        assert "connect6" not in found  # called like the hook: ours
        assert found["sendmsg4"][0].startswith("number ")
    finally:
        cgroup.rmdir()  # its programs go with it
