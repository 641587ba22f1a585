# SPDX-License-Identifier: GPL-3.0-or-later
"""Native routing between two real `isthmusd` processes on two nodes, on one subnet and behind a router, with no etcd
anywhere. What is on the wire is looked at with tcpdump."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bpf.topology import CLONE_NEWNET, Inside, InsideError, Node, bare_nodes, capture, meanwhile, wait_for
from integration.test_agent_kernel import CLIENT, Daemon, make_daemon
from isthmus_agent.cli import text
from isthmus_agent.cli.client import AgentSilent, ask
from isthmus_mesh.spec import spec_hash
from pyroute2 import IPRoute

pytestmark = pytest.mark.root

SITES = {"onprem": "onprem", "cloud": "cloud"}
PING = """
import select, time
def ping(source, target, size, mark=0, seconds=2.0):
    # Whether an echo of `size` bytes with DF is answered.
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    s.setsockopt(socket.IPPROTO_IP, 10, 2)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    s.bind((source, 0)); s.connect((target, 0)); s.settimeout(seconds)
    try:
        s.send(struct.pack('!BBHHH', 8, 0, 0, 0, 1) + bytes(size - 28)); s.recv(65536)
    except OSError as error:
        return repr(error)
    return True
"""


@dataclass
class Host:
    """A node with `isthmusd`; `other` is the site of the other."""

    node: Node
    daemon: Daemon
    other: str

    def run(self, *words: str) -> str:
        return self.node.call(subprocess.run, words, check=True, capture_output=True, text=True).stdout

    def specify(self, word: str) -> None:
        """A specification with a stage of native routing with the other node."""
        path = self.daemon.directory / "node.json"
        spec = json.loads(path.read_text())
        spec.pop("native", None)
        if word != "plain":
            spec["native"] = {"sites": SITES, "stages": {self.other: word}}
        spec["hash"] = spec_hash(spec)
        path.write_text(json.dumps(spec))

    def stage(self, word: str) -> None:
        """Another stage, as `site` brings it: with a restart of the agent."""
        self.specify(word)
        self.daemon.stop()
        self.daemon.start()

    def dropped(self) -> dict[str, int]:
        def ask_again() -> dict[str, Any] | None:
            with contextlib.suppress(AgentSilent):  # a busy machine
                return self.daemon.status()
            return None

        return dict(wait_for(ask_again, "the agent answers", 30)["datapath"]["drops"])

    def filters(self) -> str:
        return self.run("tc", "filter", "show", "dev", "eth0", "ingress")


@dataclass
class Pair:
    a: Host
    b: Host
    client: Inside

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.a, self.b

    def dial(self, seconds: float = 2) -> list[str]:
        return list(self.client.do(f"result = dial('10.102.0.2', 8080, {seconds})"))

    def ping(self, size: int, mark: int = 0) -> Any:
        return self.client.do(f"result = ping('10.101.0.1', '10.102.0.1', {size}, {mark})")


@contextlib.contextmanager
def pair(tmp_path: Path, nodes: tuple[Node, Node], stage: str) -> Iterator[Pair]:
    """Node a is onprem-1, node b is cloud-1, both at a stage."""
    hosts: list[Host] = []
    try:
        for node, cluster, other in zip(nodes, ("onprem", "cloud"), ("cloud", "onprem"), strict=True):
            host = Host(node, make_daemon(node, cluster, tmp_path / cluster, {"cloud": [1]}), other)
            hosts.append(host)
            host.specify(stage)
            host.daemon.start()
            node.process("web").do(f"serve_tcp({node.name!r}, {node.workload!r}, 8080); result = 1")
            node.sysctl("net.ipv4.ping_group_range", "0 2147483647")
        client = nodes[0].process("web")
        client.do(CLIENT + PING + "\nresult = 1")
        yield Pair(hosts[0], hosts[1], client)
    finally:
        for host in hosts:
            host.daemon.stop(signal.SIGKILL)


@pytest.fixture
def beside(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Both nodes on one subnet, at the stage that the test's parameter says."""
    with bare_nodes() as nodes, pair(tmp_path, nodes, getattr(request, "param", "demands")) as found:
        yield found


@dataclass
class Routed:
    both: Pair
    router: Callable[..., str]
    """Runs a command in the router's namespace."""


@pytest.fixture
def routed(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Routed]:
    """Each node has an address of its own without a network, and a router that has routes to their ranges; at the stage
    that the test's parameter says."""

    def enter() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")

    def run(*words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def to_b(netns: int) -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname="to-b", kind="veth", peer={"ifname": "eth0", "net_ns_fd": netns})

    with ThreadPoolExecutor(1, initializer=enter) as pool, bare_nodes() as nodes:

        def router(*words: str) -> str:
            return pool.submit(run, *words).result()

        netns = pool.submit(os.open, "/proc/thread-self/ns/net", os.O_RDONLY).result()
        try:
            a, b = nodes
            a.call(run, "ip", "address", "flush", "dev", "eth0")
            b.call(run, "ip", "link", "set", "eth0", "netns", f"/proc/{os.getpid()}/fd/{netns}", "name", "to-a")
            pool.submit(to_b, b.netns).result()
            pool.submit(Path("/proc/sys/net/ipv4/ip_forward").write_text, "1").result()
            for device, node in (("to-a", a), ("to-b", b)):
                router("ip", "link", "set", device, "up")
                router("ip", "address", "add", "198.18.0.1/32", "dev", device)
                router("ip", "route", "add", node.underlay, "dev", device)
                router("ip", "route", "add", node.prefix, "via", node.underlay)
                node.call(run, "ip", "link", "set", "eth0", "up")
                node.call(run, "ip", "address", "add", f"{node.underlay}/32", "dev", "eth0")
                node.call(run, "ip", "route", "add", "default", "via", "198.18.0.1", "dev", "eth0", "onlink")
            with pair(tmp_path, nodes, getattr(request, "param", "demands")) as both:
                yield Routed(both, router)
        finally:
            os.close(netns)


def seen(file: Path, *expression: str) -> int:
    """How many packets of a capture match."""
    shown = subprocess.run(["tcpdump", "-nr", str(file), *expression], check=True, capture_output=True, text=True)
    return len(shown.stdout.splitlines())


TUNNEL, FROM_A, FROM_B = ("udp port 8472",), ("src net 10.101.0.0/16",), ("src net 10.102.0.0/16",)


def test_packets_go_natively_at_the_full_mtu_with_the_identity_of_their_source(beside: Pair, tmp_path: Path) -> None:
    file = tmp_path / "wire.pcap"
    with capture(beside.a.node, file):
        assert beside.dial() == ["b", "10.101.0.2"]
        assert beside.ping(1500) is True
        assert "Message too long" in beside.ping(1501)
    assert seen(file, *TUNNEL) == 0
    assert min(seen(file, *FROM_A), seen(file, *FROM_B)) > 3
    assert "10.102.0.0/28 via 198.18.0.12 dev eth0 proto 73" in beside.a.run("ip", "route")
    for host in beside.hosts:
        assert sum(host.dropped().values()) == 0
        assert ask(host.daemon.socket, "/v1/audit")["problems"] == []
    status = beside.b.daemon.status()
    (far,) = [one for one in status["nodes"] if one["name"] == "onprem-1"]
    assert {"way": "native", "stage": "demands", "mtu": 1500, "lost": None}.items() <= far["routing"].items()
    assert re.search(r"onprem/onprem-1 .* native", text.status(status))
    wait_for(lambda: beside.a.daemon.probe("cloud-1") == "up", "probes go natively too")


@pytest.mark.parametrize("beside", ["plain"], indirect=True)
def test_a_stream_outlives_turning_it_on_and_off(beside: Pair, tmp_path: Path) -> None:
    """Host by host, stage by stage, and the kernel checks sources strictly. While a host takes a step and after it
    nothing is dropped, and at the end of each direction nothing goes the other way any more."""
    for host in beside.hosts:
        host.node.sysctl("net.ipv4.conf.all.rp_filter", "1")
    beside.client.do(
        "held = socket.create_connection(('10.102.0.2', 8080), 3); lines = held.makefile(); lines.readline()\n"
        "held.settimeout(20); result = 1"
    )

    def alive() -> bool:
        return bool(beside.client.do("held.sendall(b'x' * 200000 + b'?'); result = int(lines.readline()) > 0"))

    up, down = ["accepts", "sends", "demands"], ["sends", "accepts", "plain"]
    for stages, order, ways in (
        (up, (beside.a, beside.b), (FROM_A, TUNNEL)),
        (down, (beside.b, beside.a), (TUNNEL, FROM_A)),
    ):
        assert alive()
        for word in stages:
            for host in order:
                settled = [each.dropped() for each in beside.hosts]
                meanwhile(alive, f"{host.node.name} on its way to {word}", host.stage, word)
                assert beside.dial(10) == ["b", "10.101.0.2"], f"a new one, {host.node.name} at {word}"
                assert [each.dropped() for each in beside.hosts] == settled, f"{host.node.name} at {word}"
        file = tmp_path / f"{len(ways[0][0])}.pcap"
        with capture(beside.a.node, file):
            assert alive()
        assert (seen(file, *ways[0]) > 0, seen(file, *ways[1])) == (True, 0)
    for host in beside.hosts:
        assert "underlay" not in host.filters(), "the programs have gone"
        assert host.run("ip", "rule").count("lookup 73") == 1


def test_nothing_leaves_by_the_wrong_door_when_the_two_sides_differ(beside: Pair, tmp_path: Path) -> None:
    """One side is told to go natively and the other to use the tunnel: each sends as it was told, takes nothing that
    comes otherwise, and counts it."""
    beside.b.stage("plain")
    file = tmp_path / "wire.pcap"
    with capture(beside.a.node, file):
        with pytest.raises(InsideError, match="timed out"):
            beside.dial(1)
        back = beside.b.node.process("web")
        back.do(CLIENT + "\nresult = 1")
        with pytest.raises(InsideError, match="timed out"):
            back.do("result = dial('10.101.0.2', 8080, 1)")
    assert seen(file, "src host 198.18.0.11 and udp port 8472") == 0
    assert seen(file, *FROM_B) == 0
    assert seen(file, *FROM_A) > 0
    assert beside.a.dropped()["wrong_way"] > 0
    beside.b.stage("accepts")
    beside.a.stage("sends")
    assert beside.dial() == ["b", "10.101.0.2"], "neighbouring stages understand each other"


@pytest.mark.parametrize("beside", ["accepts"], indirect=True)
def test_the_native_way_is_proven_before_it_is_used(beside: Pair, tmp_path: Path) -> None:
    """A packet with the mark goes natively while everything else is tunnelled."""
    file = tmp_path / "wire.pcap"
    with capture(beside.a.node, file):
        assert beside.ping(1500, 0x4E) is True
        assert "Message too long" in beside.ping(1500)
    assert seen(file, "icmp and src net 10.101.0.0/16") == 1
    assert beside.dial() == ["b", "10.101.0.2"]


def test_what_others_take_away_comes_back(beside: Pair) -> None:
    beside.dial()
    for words in (
        ("ip", "route", "flush", "proto", "73"),
        ("tc", "qdisc", "del", "dev", "eth0", "clsact"),
        ("tc", "qdisc", "del", "dev", "isthmus0", "clsact"),
        ("ip", "rule", "del", "pref", "730"),
    ):
        beside.a.run(*words)
        wait_for(lambda: not ask(beside.a.daemon.socket, "/v1/audit")["problems"], f"mended after {words}", 5)
        assert beside.dial() == ["b", "10.101.0.2"]
    beside.a.run("ip", "link", "set", "eth0", "down")
    beside.a.run("ip", "link", "set", "eth0", "up")
    wait_for(lambda: "10.102.0.0/28 via 198.18.0.12" in beside.a.run("ip", "route"), "the routes are back", 5)
    assert beside.dial() == ["b", "10.101.0.2"]


def test_a_host_that_no_other_is_native_with_lacks_nothing(beside: Pair) -> None:
    """As the only one of its site."""
    beside.a.other = "onprem"
    beside.a.stage("demands")
    wait_for(lambda: ask(beside.a.daemon.socket, "/v1/audit")["problems"] == [], "nothing is missing", 10)


def test_agents_that_have_nothing_to_do_tell_the_kernel_nothing(beside: Pair) -> None:
    """What they write would be told to them as a change, and they would write it again."""
    beside.dial()
    listener = beside.a.node.process()
    told = listener.do(
        "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\n"
        "s.bind((0, 0x1 | 0x8 | 0x40 | 0x80)); s.settimeout(2)\n"
        "def kinds():\n"
        "    try:\n"
        "        return [int.from_bytes(s.recv(65536)[4:6], 'little'), *kinds()]\n"
        "    except TimeoutError:\n"
        "        return []\n"
        "result = kinds()"
    )
    assert told == []


def test_a_link_that_is_cut_one_way_is_named_and_packets_are_back_natively(beside: Pair, tmp_path: Path) -> None:
    """What b sends does not arrive at a; what a sends does arrive at b."""
    a, b = beside.hosts

    def told() -> list[str]:
        return [words for words in b.daemon.status()["warnings"] if "is cut in one direction" in words]

    assert beside.dial() == ["b", "10.101.0.2"]
    for host, far in ((a, "cloud-1"), (b, "onprem-1")):
        wait_for(lambda host=host, far=far: host.daemon.probe(far) == "up", "both hear each other", 15)  # type: ignore[misc]
    assert told() == []
    file = tmp_path / "wire.pcap"
    chain = "type filter hook prerouting priority -400; ip saddr { 198.18.0.12, 10.102.0.0/16 } counter drop;"
    with capture(a.node, file):
        a.run("nft", f"table ip cut {{ chain c {{ {chain} }}; }}")
        (words,) = wait_for(told, "b is not heard", 15)
        assert "cloud/cloud-1 hears onprem/onprem-1" in words
        assert words in text.status(b.daemon.status())
        wait_for(lambda: a.daemon.probe("cloud-1") == "down", "a hears nothing", 15)
        with pytest.raises(InsideError, match="timed out"):
            beside.dial(0.5)
        a.run("nft", "delete table ip cut")
        assert beside.dial() == ["b", "10.101.0.2"]
        for host, far in ((a, "cloud-1"), (b, "onprem-1")):
            wait_for(lambda host=host, far=far: host.daemon.probe(far) == "up", "it is mended", 15)  # type: ignore[misc]
        assert told() == []
    assert seen(file, *TUNNEL) == 0, "no other way was taken"


def masquerades_by_itself(host: Host, what: str = "") -> None:
    """The host's own rules are loaded anew and masquerade, before all others'; the agent's are back."""
    for words in (
        "flush ruleset",
        "add table ip nat",
        "add chain ip nat post { type nat hook postrouting priority -150; }",
        f"add rule ip nat post {what} masquerade",
    ):
        host.run("nft", words)
    wait_for(lambda: "table ip isthmus" in host.run("nft", "list", "tables"), "our table is back", 5)


def test_no_rule_of_the_host_masquerades_workloads(beside: Pair) -> None:
    """Also after a reload of the host's own rules, which takes ours away."""
    masquerades_by_itself(beside.a, "oifname eth0")
    assert beside.dial() == ["b", "10.101.0.2"]


@pytest.mark.parametrize("beside", ["plain"], indirect=True)
def test_no_rule_of_the_host_masquerades_workloads_in_the_tunnel(beside: Pair) -> None:
    """Where nobody translates sources there is no table of ours, and the kernel follows no connections for it."""
    assert beside.a.run("nft", "list", "ruleset") == ""
    masquerades_by_itself(beside.a)
    assert beside.dial() == ["b", "10.101.0.2"]
    assert sum(beside.b.dropped().values()) == 0
    assert ask(beside.a.daemon.socket, "/v1/audit")["problems"] == []
    beside.a.daemon.stop()
    beside.a.run("nft", "delete", "table", "ip", "isthmus")
    with contextlib.suppress(InsideError):  # an address that may not send this is dropped
        assert beside.dial(1) != ["b", "10.101.0.2"]
    beside.a.daemon.start()
    assert beside.dial() == ["b", "10.101.0.2"], "made before the first packet"


def test_traffic_goes_on_without_agents_and_a_restart_changes_nothing(beside: Pair) -> None:
    beside.client.do(
        "held = socket.create_connection(('10.102.0.2', 8080), 3); lines = held.makefile(); result = lines.readline()"
    )
    before = beside.a.run("ip", "-4", "-d", "route", "show", "table", "all")
    for how in (signal.SIGKILL, signal.SIGTERM):
        beside.a.daemon.stop(how)
        assert beside.dial() == ["b", "10.101.0.2"]
        beside.a.daemon.start()
        assert beside.client.do("held.sendall(b'abc?'); result = int(lines.readline()) > 0") is True
    assert beside.a.run("ip", "-4", "-d", "route", "show", "table", "all") == before


def test_behind_a_router_packets_go_as_the_underlay_does(routed: Routed) -> None:
    both = routed.both
    assert both.dial() == ["b", "10.101.0.2"]
    assert "10.102.0.0/28 via 198.18.0.1 dev eth0 proto 73" in both.a.run("ip", "route")
    assert both.ping(1500) is True
    for host in both.hosts:
        assert sum(host.dropped().values()) == 0
        assert ask(host.daemon.socket, "/v1/audit")["problems"] == []


def test_a_smaller_mtu_on_the_way_is_learnt_from_the_router(routed: Routed) -> None:
    both = routed.both
    both.client.do(
        "held = socket.create_connection(('10.102.0.2', 8080), 3); lines = held.makefile(); lines.readline()\n"
        "held.settimeout(10); held.sendall(b'x' * 100000 + b'?'); result = lines.readline()"
    )
    routed.router("ip", "link", "set", "to-b", "mtu", "1300")
    answer = both.client.do("held.sendall(b'x' * 100000 + b'?'); result = int(lines.readline())")
    assert answer == 200002, "TCP goes on in smaller packets"
    assert both.client.do("result = held.getsockopt(socket.IPPROTO_IP, 14)") == 1300
    assert sum(both.a.dropped().values()) == 0


def test_another_router_is_followed(routed: Routed) -> None:
    both = routed.both
    routed.router("ip", "address", "add", "198.18.0.2/32", "dev", "to-a")
    both.a.run("ip", "route", "replace", "default", "via", "198.18.0.2", "dev", "eth0", "onlink")
    wait_for(lambda: "10.102.0.0/28 via 198.18.0.2" in both.a.run("ip", "route"), "the routes follow", 5)
    assert both.dial() == ["b", "10.101.0.2"]
    both.a.run("ip", "route", "del", "default")
    wait_for(lambda: any("no route to 198.18.0.12" in words for words in both.a.daemon.status()["warnings"]), "told", 5)
    both.a.run("ip", "route", "add", "default", "via", "198.18.0.1", "dev", "eth0", "onlink")
    wait_for(lambda: "10.102.0.0/28 via 198.18.0.1" in both.a.run("ip", "route"), "the routes are back", 5)
    assert both.dial() == ["b", "10.101.0.2"]
