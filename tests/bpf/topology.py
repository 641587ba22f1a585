# SPDX-License-Identifier: GPL-3.0-or-later
"""Two nodes on one machine: network namespaces joined by a veth pair, each with its own cgroup,
pin directory and datapath. Node a is cluster 1, node b is cluster 2."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

from isthmus_agent import netlink
from isthmus_agent.bpf.driver import BpfDatapath
from isthmus_agent.bpf.mounts import cgroup2_root
from isthmus_agent.desired.datapath import Backend, Datapath, Frontend, IpcacheEntry, Peer, Route, Rule, Service
from pyroute2 import IPRoute

T = TypeVar("T")

TCP, UDP = 6, 17
VIP = "10.111.0.10"
VIP_EMPTY = "10.111.0.11"
CLONE_NEWNET = 0x40000000
# Behind its addresses, with the type for local experiments (IEEE 802, 0x88b5): no test looks for such a frame.
LAST_FRAME = b"\x88\xb5" + b"the last frame of a capture"
# What limits of time are multiplied by: an emulated processor (tests/kernel) takes about ten times as long.
PATIENCE = 10 if "QEMU TCG" in Path("/proc/cpuinfo").read_text() else 1

_numbers = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


def wait_for(condition: Callable[[], T], what: str, seconds: float = 10.0) -> T:
    """The first true value of `condition`, or an assertion that names `what`. `seconds`: times PATIENCE."""
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def meanwhile(holds: Callable[[], bool], words: str, step: Callable[..., object], *wanted: object) -> None:
    """Takes a step, and asserts again and again, until it is taken, what holds at every moment."""
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(step, *wanted)
        while not taken.done():
            assert holds(), words
        taken.result()


class InsideError(OSError):
    """What an Inside process answered instead of a result."""


class Inside:
    """A process in a node's namespace and in one cgroup."""

    def __init__(self, cgroup: Path, netns: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("inside.py")), str(cgroup), str(netns)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(netns,),
        )
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, "the process inside the namespace died"
        answer = json.loads(text)
        if "error" in answer:
            raise InsideError(answer["errno"], answer["error"])
        return answer["result"]

    def do(self, code: str) -> Any:
        """Runs `code`; its variable `result` comes back."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"code": code}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)


@dataclass
class Node:
    """One node. `call` runs a function in its namespace."""

    name: str
    cluster_id: int
    underlay: str
    mesh: str
    workload: str
    prefix: str
    cgroup: Path
    pin_dir: Path
    netns: int = -1
    datapath: Datapath = field(default_factory=lambda: Datapath(0))
    inside: list[Inside] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    @property
    def identity(self) -> int:
        return (self.cluster_id << 16) + 300

    def start(self) -> None:
        def namespace() -> int:
            if _libc.unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

        self.netns = self._pool.submit(namespace).result()
        for each in (self.cgroup, self.cgroup / "host", self.cgroup / "web", self.cgroup / "web" / "inner"):
            each.mkdir()
        self.bpf = BpfDatapath(self.pin_dir, self.cgroup)

    def call(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        return self._pool.submit(function, *arguments, **named).result()

    def process(self, cgroup: str = "host") -> Inside:
        """A new process in the cgroup `cgroup` of this node."""
        inside = Inside(self.cgroup / cgroup, self.netns)
        self.inside.append(inside)
        return inside

    def load(self) -> None:
        """Loads, attaches and applies, as the agent does."""
        self.bpf.open(self.cluster_id, self.datapath.identity_shift)
        self.bpf.attach_cgroup()
        index = self.call(netlink.ensure_overlay, netlink.OVERLAY, 8472, self.datapath.overlay_mtu)
        self.call(self.bpf.attach_overlay, index)
        self.apply(self.datapath)

    def apply(self, datapath: Datapath) -> None:
        self.datapath = datapath
        self.bpf.apply(datapath)
        self.call(netlink.apply_network, datapath)

    def sysctl(self, key: str, value: str) -> None:
        path = Path("/proc/sys") / key.replace(".", "/")
        self.call(path.write_text, value)

    def counter(self, name: str) -> int:
        """An Ip counter of /proc/net/snmp, such as FragCreates."""

        def read() -> int:
            names, values = (
                line.split()
                for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
                if line.startswith("Ip: ")
            )
            return int(values[names.index(name)])

        return self.call(read)

    def drops(self) -> dict[str, int]:
        return self.bpf.counters().drops

    def stop(self) -> None:
        for each in self.inside:
            each.close()
        if hasattr(self, "bpf"):
            self.bpf.remove_all()
        if self.netns >= 0:
            os.close(self.netns)
        self._pool.shutdown()
        for each in (self.cgroup / "web" / "inner", self.cgroup / "web", self.cgroup / "host", self.cgroup):
            if each.exists():
                wait_for(lambda each=each: _rmdir(each), f"{each} has no process left")


def _rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


def _wanted(own: Node, other: Node, mtu: int) -> Datapath:
    cgroups = {(own.cgroup / "web").stat().st_ino: ip_address(own.workload)}
    tunnel = ip_address(other.underlay)
    return Datapath(
        cluster_id=own.cluster_id,
        overlay_mtu=mtu,
        addresses=frozenset({ip_address(own.mesh), ip_address(own.workload)}),
        local={ip_address(own.mesh): 6, ip_address(own.underlay): 6, ip_address(own.workload): own.identity},
        workloads=cgroups,
        services={
            Frontend(ip_address(VIP), 80, TCP): Service("shop/web", (backend(other, 8080, TCP),)),
            Frontend(ip_address(VIP), 53, UDP): Service("shop/web", (backend(other, 5353, UDP),)),
            Frontend(ip_address(VIP_EMPTY), 80, TCP): Service("shop/none", ()),
            Frontend(ip_address(VIP_EMPTY), 53, UDP): Service("shop/none", ()),
        },
        ipcache={
            ip_network(f"{other.mesh}/32"): IpcacheEntry(6, other.cluster_id, tunnel, is_fixed=True),
            ip_network(f"{other.workload}/32"): IpcacheEntry(other.identity, other.cluster_id, tunnel),
            ip_network(f"{other.underlay}/32"): IpcacheEntry(6, other.cluster_id, tunnel, is_node=True),
            ip_network(other.prefix): IpcacheEntry(2, other.cluster_id, tunnel),
            ip_network(f"{own.workload}/32"): IpcacheEntry(own.identity, own.cluster_id, None),
            ip_network(f"{own.mesh}/32"): IpcacheEntry(6, own.cluster_id, None),
            ip_network(f"{own.underlay}/32"): IpcacheEntry(6, own.cluster_id, None, is_node=True),
        },
        peers={tunnel: Peer(other.cluster_id, tunnel)},
        routes=frozenset(
            {
                Route(ip_network(other.prefix), ip_address(own.mesh), mtu),
                Route(ip_network(f"{other.underlay}/32"), ip_address(own.mesh), mtu, table=netlink.ROUTE_TABLE),
                Route(ip_network("10.111.0.0/16"), unreachable=True),
            }
        ),
        rules=frozenset({Rule(ip_network(own.prefix), netlink.ROUTE_TABLE, netlink.RULE_PRIORITY)}),
    )


def backend(node: Node, port: int, protocol: int, address: str | None = None) -> Backend:
    return Backend(IPv4Address(address or node.workload), port, protocol, node.cluster_id, IPv4Address(node.underlay))


def with_service(
    datapath: Datapath, port: int, protocol: int, *backends: Backend, session_affinity: int = 0
) -> Datapath:
    """The same with other backends for the service port."""
    services = dict(datapath.services)
    frontend = Frontend(ip_address(VIP), port, protocol)
    services[frontend] = Service(services[frontend].name, backends, session_affinity=session_affinity)
    return replace(datapath, services=services)


def _send_last_frame() -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind(("eth0", 0))
        sender.send(bytes(12) + LAST_FRAME)


@contextlib.contextmanager
def capture(node: Node, file: Path) -> Iterator[None]:
    """Every packet on the node's `eth0`, both ways and whole, into `file`."""
    tcpdump = ["tcpdump", "-ni", "eth0", "-U", "--immediate-mode", "-s", "0", "-w", str(file)]
    process = subprocess.Popen(
        ["nsenter", f"--net=/proc/self/fd/{node.netns}", *tcpdump],
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(node.netns,),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on" in line:
            break
    try:
        yield
        # What tcpdump has not read yet when it ends is lost, so it ends when it has written a last frame.
        node.call(_send_last_frame)
        wait_for(lambda: LAST_FRAME in file.read_bytes(), f"{file} holds the last frame that was sent")
    finally:
        process.terminate()
        process.wait(10)
        process.stderr.close()


def _wire(left: Node, right: Node, mtu: int) -> None:
    def make() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname="eth0", kind="veth", peer={"ifname": "eth0", "net_ns_fd": right.netns})

    def up(node: Node) -> None:
        with IPRoute() as ipr:
            ipr.link("set", index=1, state="up")
            (index,) = ipr.link_lookup(ifname="eth0")
            ipr.link("set", index=index, state="up", mtu=mtu)
            ipr.addr("add", index=index, address=node.underlay, prefixlen=24)

    left.call(make)
    for node in (left, right):
        node.call(up, node)


@contextlib.contextmanager
def bare_nodes(underlay_mtu: int = 1500) -> Iterator[tuple[Node, Node]]:
    """Both nodes, joined, with nothing loaded; removed whatever happens, with what was loaded meanwhile."""
    run = f"isthmus-test-{os.getpid()}-{next(_numbers)}"
    base = cgroup2_root() / run
    base.mkdir()
    nodes = [
        Node(
            name=name,
            cluster_id=number,
            underlay=f"198.18.0.1{number}",
            mesh=f"10.10{number}.0.1",
            workload=f"10.10{number}.0.2",
            prefix=f"10.10{number}.0.0/28",
            cgroup=base / name,
            pin_dir=Path(f"/sys/fs/bpf/{run}-{name}"),
        )
        for number, name in ((1, "a"), (2, "b"))
    ]
    left, right = nodes
    try:
        for node in nodes:
            node.start()
        _wire(left, right, underlay_mtu)
        yield left, right
    finally:
        for node in nodes:
            node.stop()
        base.rmdir()


@contextlib.contextmanager
def two_nodes(underlay_mtu: int = 1500) -> Iterator[tuple[Node, Node]]:
    """Both nodes with everything loaded and applied; removed whatever happens."""
    with bare_nodes(underlay_mtu) as (left, right):
        left.datapath = _wanted(left, right, underlay_mtu - 50)
        right.datapath = _wanted(right, left, underlay_mtu - 50)
        left.load()
        right.load()
        yield left, right
