# SPDX-License-Identifier: GPL-3.0-or-later
"""A host behind an address translation and one outside, two real `isthmusd` with `wireguard-go`: only the host inside
can open anything. There is no etcd, and nothing is known from before but what the specifications have laid down."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bpf.topology import Inside, Node, capture, wait_for
from integration.test_agent_kernel import CLIENT
from integration.test_agent_wireguard import PORT, SECRET, Host, make_host, new_key, public_of, udp_ports
from isthmus_agent.bpf.mounts import cgroup2_root
from isthmus_agent.cli import text
from isthmus_agent.cli.client import ask
from isthmus_agent.netlink.wireguard import KEEPALIVE
from isthmus_mesh.spec import WIREGUARD_DEVICES, WIREGUARD_KEYS, WIREGUARD_PORTS, spec_hash
from pyroute2 import IPRoute, NFCTSocket

pytestmark = pytest.mark.root

_numbers = itertools.count(1)
INSIDE, OUTSIDE, ROUTER = "192.0.2.11", "198.18.0.12", "198.18.0.1"
DEVICE = WIREGUARD_DEVICES[0]
# As vpn-lab has it: a port of its own for each flow, and nothing from outside but answers.
TRANSLATION = """
table ip translation {
  chain postrouting {
    type nat hook postrouting priority srcnat;
    oifname "out" masquerade random
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    iifname "in" accept
    ct state established,related accept
    counter name asked drop
  }
  counter asked { }
}
"""


def node_of(base: Path, run: str, number: int, name: str, underlay: str) -> Node:
    return Node(
        name=name,
        cluster_id=number,
        underlay=underlay,
        mesh=f"10.10{number}.0.1",
        workload=f"10.10{number}.0.2",
        prefix=f"10.10{number}.0.0/28",
        cgroup=base / name,
        pin_dir=Path(f"/sys/fs/bpf/{run}-{name}"),
    )


def wire(near: Node, address: str, router: Node, device: str, gateway: str) -> None:
    """The node's eth0 to a device of the router's."""

    def make() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname="eth0", kind="veth", peer={"ifname": device, "net_ns_fd": router.netns})

    def up(name: str, own: str) -> None:
        with IPRoute() as ipr:
            ipr.link("set", index=1, state="up")
            (index,) = ipr.link_lookup(ifname=name)
            ipr.addr("add", index=index, address=own, prefixlen=24)
            ipr.link("set", index=index, state="up")

    def lead() -> None:
        with IPRoute() as ipr:
            ipr.route("add", dst="default", gateway=gateway)

    near.call(make)
    router.call(up, device, gateway)
    near.call(up, "eth0", address)
    near.call(lead)


@contextlib.contextmanager
def translated() -> Iterator[tuple[Node, Node, Node]]:
    """The node inside, the one outside, and the router between them, which counts what comes in unasked."""
    run = f"isthmus-test-inbound-{os.getpid()}-{next(_numbers)}"
    base = cgroup2_root() / run
    base.mkdir()
    nodes = [
        node_of(base, run, 1, "a", INSIDE),
        node_of(base, run, 2, "b", OUTSIDE),
        node_of(base, run, 3, "router", ROUTER),
    ]
    inside, outside, router = nodes
    try:
        for node in nodes:
            node.start()
        wire(inside, INSIDE, router, "in", "192.0.2.1")
        wire(outside, OUTSIDE, router, "out", ROUTER)
        router.sysctl("net.ipv4.ip_forward", "1")
        subprocess.run(
            ["nsenter", f"--net=/proc/self/fd/{router.netns}", "nft", "-f", "-"],
            input=TRANSLATION,
            text=True,
            check=True,
            pass_fds=(router.netns,),
        )
        yield inside, outside, router
    finally:
        for node in nodes:
            node.stop()
        base.rmdir()


@dataclass
class Estate:
    """`inside` is onprem-1, `outside` cloud-1."""

    inside: Host
    outside: Host
    router: Node
    dialler: Inside
    answerer: Inside

    def reads(self, seconds: float = 2) -> list[str]:
        """Who answers the host inside at the other's etcd port, in the mesh."""
        return list(self.dialler.do(f"result = dial('10.102.0.1', 2379, {seconds})"))

    def is_read(self, seconds: float = 2) -> list[str]:
        return list(self.answerer.do(f"result = dial('10.101.0.1', 2379, {seconds})"))

    def both_ways(self) -> bool:
        try:
            return (self.reads(0.5), self.is_read(0.5)) == (["b", "10.101.0.1"], ["a", "10.102.0.1"])
        except OSError:
            return False

    def refused(self) -> int:
        """Packets that the router did not let in."""
        listed = self.on_router("nft", "-j", "list", "counter", "ip", "translation", "asked")
        return int(json.loads(listed)["nftables"][-1]["counter"]["packets"])

    def on_router(self, *words: str) -> str:
        fd = self.router.netns
        command = ["nsenter", f"--net=/proc/self/fd/{fd}", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, pass_fds=(fd,)).stdout

    def forget_flows(self) -> None:
        """As a router that was restarted: each flow gets another port when it sends next."""

        def flush() -> None:
            with NFCTSocket() as conntrack:
                conntrack.flush()

        self.router.call(flush)

    def endpoint(self, host: Host, device: str = DEVICE) -> str:
        """Where the other one is, as WireGuard of a host knows."""
        return host.run("wg", "show", device, "endpoints").split()[-1]


def lay_down(host: Host, other: Host, keys: dict[int, str], own: list[int] | None = None) -> None:
    """The specification of a site with `inbound: false` and of the other; `keys` are the other host's by port, `own`
    are numbers of the host's own, of which the first is sent with."""
    path = host.directory / "node.json"
    spec = json.loads(path.read_text())
    first, *rest = (
        {"key": str(host.directory / WIREGUARD_KEYS[number]), "port": WIREGUARD_PORTS[number]}
        for number in (own or [0])
    )
    node = json.loads((other.directory / "node.json").read_text())["node"]
    peer = {key: node[key] for key in ("name", "underlay4", "advertise4", "range4", "mesh4")}
    identity = {"cluster": other.cluster, "id": other.node.cluster_id, "site": other.cluster}
    spec["wireguard"] = {
        **host.wireguard_spec(other.cluster, {}),
        **first,
        **({"second": rest[0]} if rest else {}),
        ("opens" if host.cluster == "onprem" else "opened_by"): [other.cluster],
        "bootstrap": [{**peer, **identity, "keys": {str(port): key for port, key in keys.items()}}],
    }
    spec["hash"] = spec_hash(spec)
    path.write_text(json.dumps(spec))


@contextlib.contextmanager
def estate(tmp_path: Path) -> Iterator[Estate]:
    hosts: list[Host] = []
    with translated() as (inside, outside, router):
        try:
            for node, cluster in ((inside, "onprem"), (outside, "cloud")):
                hosts.append(make_host(node, cluster, tmp_path / cluster, new_key()[0]))
            a, b = hosts
            lay_down(a, b, {PORT: public_of(b.private)})
            lay_down(b, a, {PORT: public_of(a.private)})
            clients = []
            for host in (b, a):
                host.start_wireguard()
                host.daemon.start()
                server = host.node.process()
                server.do(f"serve_tcp({host.node.name!r}, '0.0.0.0', 2379); result = 1")
                client = host.node.process()
                client.do(CLIENT + "\nresult = 1")
                clients.append(client)
            yield Estate(a, b, router, clients[1], clients[0])
        finally:
            for host in hosts:
                host.close()


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Estate]:
    with estate(tmp_path_factory.mktemp("met")) as found:
        yield found


def contact(found: Estate, host: Host) -> dict[str, Any]:
    (peer,) = host.daemon.status()["first_contact"]
    return dict(peer)


def test_each_reads_the_others_etcd_before_any_etcd_told_a_thing(met: Estate, tmp_path: Path) -> None:
    file = tmp_path / "wire.pcap"
    with capture(met.outside.node, file):
        wait_for(met.both_ways, "each reaches the other inside the tunnel", 10)
        assert (
            met.dialler.do(
                "s = socket.create_connection(('10.102.0.1', 2379), 3); lines = s.makefile(); lines.readline()\n"
                f"s.sendall({SECRET!r} * 2000 + b'?'); result = int(lines.readline())"
            )
            == 2000 * len(SECRET) + 1
        )
    assert met.refused() == 0, "the one outside opens nothing"
    assert SECRET not in file.read_bytes()
    assert "8472" not in udp_ports(file)
    assert met.outside.daemon.status()["nodes"] == []
    inside, outside = contact(met, met.inside), contact(met, met.outside)
    assert (inside["opens"], inside["endpoint"], inside["told"]) == (True, OUTSIDE, False)
    assert (outside["opens"], outside["endpoint"], outside["told"]) == (False, None, False)
    assert [one["encryption"]["state"] for one in (inside, outside)] == ["encrypted", "encrypted"]
    shown = text.status(met.outside.daemon.status())
    assert "onprem/onprem-1  onprem  the other host  not yet        encrypted, handshake" in shown
    for host in (met.inside, met.outside):
        assert ask(host.daemon.socket, "/v1/audit")["problems"] == []


def test_only_the_one_inside_keeps_the_session_and_has_an_endpoint_that_was_said(met: Estate) -> None:
    wait_for(met.both_ways, "each reaches the other", 10)
    kept = [host.run("wg", "show", DEVICE, "persistent-keepalive").split()[-1] for host in (met.inside, met.outside)]
    assert kept == [str(KEEPALIVE), "off"]
    assert met.endpoint(met.inside) == f"{OUTSIDE}:{PORT}"
    assert met.endpoint(met.outside).startswith(f"{ROUTER}:"), "learnt from what came"


def test_another_port_of_the_translation_is_followed_within_seconds(met: Estate) -> None:
    wait_for(met.both_ways, "each reaches the other", 10)
    held = met.dialler.do(
        "held = socket.create_connection(('10.102.0.1', 2379), 3); held.settimeout(20)\n"
        "back = held.makefile(); result = back.readline()"
    )
    assert held
    for _ in range(4):  # a port may be dealt twice in a row
        before = met.endpoint(met.outside)
        met.forget_flows()
        # The other side sends into the void until something comes from inside.
        wait_for(lambda: _is_read(met), "the host inside is reached again", 10)
        if met.endpoint(met.outside) != before:
            break
    else:
        raise AssertionError("the translation never gave another port")
    assert met.dialler.do("held.sendall(b'abc?'); result = back.readline()") == "4\n", "the connection goes on"


def _is_read(found: Estate) -> bool:
    try:
        return found.is_read(0.5) == ["a", "10.102.0.1"]
    except OSError:
        return False


def test_a_new_wireguard_outside_is_reached_from_inside_which_nobody_told(met: Estate) -> None:
    """It has no session and knows no endpoint; nothing but keepalives goes on."""
    wait_for(met.both_ways, "each reaches the other", 10)
    met.outside.kill_wireguard()
    met.outside.start_wireguard()
    wait_for(lambda: met.outside.daemon.status()["wireguard"]["peers"] == 1, "it has its peer again", 10)
    began = time.monotonic()
    wait_for(lambda: _is_read(met), "the host inside is reached again", 25)
    assert time.monotonic() - began < 25
    assert met.refused() == 0
    assert ask(met.inside.daemon.socket, "/v1/audit")["problems"] == []


def test_a_new_wireguard_inside_opens_the_session_at_once(met: Estate) -> None:
    wait_for(met.both_ways, "each reaches the other", 10)
    met.inside.kill_wireguard()
    met.inside.start_wireguard()
    wait_for(lambda: _is_read(met), "the host inside is reached again", 10)
    assert met.refused() == 0


def test_a_restart_of_either_agent_leaves_sessions(met: Estate) -> None:
    wait_for(met.both_ways, "each reaches the other", 10)
    for host in (met.inside, met.outside):
        shown = host.run("wg", "show", DEVICE, "latest-handshakes")
        where = met.endpoint(met.outside)
        host.daemon.stop()
        assert met.both_ways()
        host.daemon.start()
        assert met.both_ways()
        assert host.run("wg", "show", DEVICE, "latest-handshakes") == shown
        assert met.endpoint(met.outside) == where, "what was learnt is not set back"


def test_who_comes_first_does_not_matter(tmp_path: Path) -> None:
    """The host inside is there for long before the other one."""
    with estate(tmp_path) as found:
        wait_for(found.both_ways, "each reaches the other", 10)
        found.outside.daemon.stop()
        found.outside.kill_wireguard()
        with pytest.raises(OSError, match=r"timed out|unreachable"):
            found.reads(1)
        found.outside.start_wireguard()
        found.outside.daemon.start()
        wait_for(found.both_ways, "each reaches the other", 25)


@pytest.mark.slow
def test_keys_are_replaced_while_there_is_no_etcd(tmp_path: Path) -> None:
    """Both keys are laid down before one of them is sent with, host by host, and a connection stays."""
    with estate(tmp_path) as found:
        wait_for(found.both_ways, "each reaches the other", 10)
        hosts = (found.inside, found.outside)
        publics: dict[str, dict[int, str]] = {}
        for host in hosts:
            private, public = new_key()
            (host.directory / WIREGUARD_KEYS[1]).write_text(private + "\n")
            publics[host.cluster] = {PORT: public_of(host.private), WIREGUARD_PORTS[1]: public}
        found.dialler.do(
            "held = socket.create_connection(('10.102.0.1', 2379), 3); held.settimeout(30)\n"
            "back = held.makefile(); result = back.readline()"
        )
        for own in ([0, 1], [1, 0], [1]):
            for host, other in (hosts, hosts[::-1]):
                keys = {WIREGUARD_PORTS[number]: publics[other.cluster][WIREGUARD_PORTS[number]] for number in own}
                lay_down(host, other, keys, own)
                for number, device in enumerate(WIREGUARD_DEVICES):
                    if number in own and device not in host.programs:
                        host.start_wireguard(device)
                    elif number not in own:
                        host.kill_wireguard(device)
                host.daemon.stop()
                host.daemon.start()
                assert found.dialler.do("held.sendall(b'abc?'); result = back.readline()").strip().isdigit(), own
            if len(own) == 2:
                for host in hosts:
                    wait_for(
                        lambda host=host: all(
                            session["handshake_age"] is not None
                            for one in [contact(found, host)["encryption"]]
                            for session in (one, one["second"])
                        ),
                        "a session by each key",
                        20,
                    )
            wait_for(found.both_ways, f"each reaches the other with {own}", 20)
        assert found.endpoint(found.inside, WIREGUARD_DEVICES[1]) == f"{OUTSIDE}:{WIREGUARD_PORTS[1]}"
        assert found.refused() == 0
