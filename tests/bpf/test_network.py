# SPDX-License-Identifier: GPL-3.0-or-later
"""The overlay device, addresses, routes and rules in a namespace of the test's own."""

from __future__ import annotations

import ctypes
import errno
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import agent_mesh as mesh
import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import units
from bpf.topology import CLONE_NEWNET, PATIENCE
from isthmus_agent import netlink
from isthmus_agent.desired import addressing
from isthmus_agent.desired.datapath import Datapath, Route, Rule
from isthmus_agent.netlink import NetworkError
from pyroute2 import IPRoute

Call = Callable[..., Any]

WANTED = Datapath(
    1,
    addresses=frozenset({ip_address("10.101.0.1"), ip_address("10.101.0.2")}),
    routes=frozenset(
        {
            Route(ip_network("10.102.0.0/28"), ip_address("10.101.0.1"), 1450),
            Route(ip_network("198.18.2.11/32"), ip_address("10.101.0.1"), 1450, table=730),
            Route(ip_network("0.0.0.0/0"), table=730, unreachable=True),
            Route(ip_network("10.111.0.0/16"), unreachable=True),
        }
    ),
    rules=frozenset({Rule(ip_network("10.101.0.0/28"), 730, 730)}),
)


@pytest.fixture
def call() -> Iterator[Call]:
    """Runs a function in a fresh namespace."""

    def enter() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")

    with ThreadPoolExecutor(1, initializer=enter) as pool:
        yield lambda function, *arguments, **named: pool.submit(function, *arguments, **named).result()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def _everything() -> str:
    return _ip("route", "show", "table", "all") + _ip("rule", "show") + _ip("-br", "address")


def test_apply_makes_it_so_once(call: Call) -> None:
    index = call(netlink.ensure_overlay)
    assert call(netlink.ensure_overlay) == index
    assert "state DOWN" in call(_ip, "link", "show", "isthmus0"), "up only after its programs are there"
    assert len(call(netlink.audit_network, WANTED)) == 8
    assert len(call(netlink.apply_network, WANTED).changes) == 8
    assert call(netlink.audit_network, WANTED) == []
    assert not call(netlink.apply_network, WANTED)
    details = call(_ip, "-d", "link", "show", "isthmus0")
    for words in ("vxlan external", "nolearning", "dstport 8472", "NOARP", "mtu 1450", "addrgenmode none"):
        assert words in details, words
    assert "10.102.0.0/28 dev isthmus0 proto 73 scope link src 10.101.0.1 mtu 1450" in call(_ip, "route", "show")
    assert "730:\tfrom 10.101.0.0/28 lookup 730" in call(_ip, "rule", "show")
    assert "inet6" not in call(_ip, "address", "show", "isthmus0")


def test_what_blocks_is_there_before_the_device_is_up(call: Call) -> None:
    """A packet that comes in at once would be answered in clear, by the underlay's default route."""
    call(netlink.ensure_overlay)
    changes = call(netlink.apply_network, WANTED).changes
    before = changes[: changes.index("set isthmus0 up")]
    assert set(before) == {
        "add route unreachable 0.0.0.0/0 table 730",
        "add route unreachable 10.111.0.0/16",
        "add rule 730: from 10.101.0.0/28 lookup 730",
    }


def test_on_a_device_that_is_up_rules_come_after_their_routes(call: Call) -> None:
    call(netlink.ensure_overlay)
    call(netlink.apply_network, replace(WANTED, rules=frozenset()))
    table = frozenset({Route(ip_network("198.18.2.12/32"), ip_address("10.101.0.1"), 1450, table=730)})
    assert call(netlink.apply_network, replace(WANTED, routes=WANTED.routes | table)).changes == (
        "add route 198.18.2.12/32 table 730 src 10.101.0.1 mtu 1450",
        "add rule 730: from 10.101.0.0/28 lookup 730",
    )


def test_changes_are_minimal_and_removals_complete(call: Call) -> None:
    call(netlink.ensure_overlay)
    call(netlink.apply_network, WANTED)
    smaller = Datapath(
        1,
        addresses=frozenset({ip_address("10.101.0.1")}),
        routes=frozenset({Route(ip_network("10.102.0.0/28"), ip_address("10.101.0.1"), 1400)}),
    )
    assert set(call(netlink.apply_network, smaller).changes) == {
        "change to route 10.102.0.0/28 src 10.101.0.1 mtu 1400",
        "remove rule 730: from 10.101.0.0/28 lookup 730",
        "remove route unreachable 0.0.0.0/0 table 730",
        "remove route unreachable 10.111.0.0/16",
        "remove route 198.18.2.11/32 table 730 src 10.101.0.1 mtu 1450",
        "remove address 10.101.0.2/32",
    }
    assert call(netlink.audit_network, smaller) == []


def test_a_throw_route_leaves_the_decision_to_the_next_table(call: Call) -> None:
    wanted = replace(WANTED, routes=WANTED.routes | {Route(ip_network("10.244.1.0/24"), table=730, throw=True)})
    call(netlink.ensure_overlay)
    assert "add route throw 10.244.1.0/24 table 730" in call(netlink.apply_network, wanted).changes
    assert call(netlink.audit_network, wanted) == []
    assert not call(netlink.apply_network, wanted)
    assert "throw 10.244.1.0/24 proto 73" in call(_ip, "route", "show", "table", "730")
    assert call(netlink.apply_network, WANTED).changes == ("remove route throw 10.244.1.0/24 table 730",)


def test_a_setting_that_is_so_already_is_not_written(call: Call) -> None:
    """The kernel tells of each write, and agents that listen would write again."""
    index = call(netlink.ensure_overlay)

    def told() -> list[bool]:
        found = []
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as listener:
            listener.bind((0, 1))  # RTMGRP_LINK
            _ip("link", "set", "isthmus0", "up")
            _drain(listener)
            for value in (1, 1, 0):
                netlink.settings.set_ipv4(index, netlink.settings.FORWARDING, value)
                found.append(_drain(listener))
        return found

    assert call(told) == [True, False, True]


def _drain(listener: socket.socket) -> bool:
    """Whether there was a message; those of a write are there when it is done."""
    listener.setblocking(False)
    found = False
    while True:
        try:
            listener.recv(1 << 16)
        except BlockingIOError:
            return found
        found = True


def test_teardown_leaves_it_as_it_was(call: Call) -> None:
    before = call(_everything)
    call(netlink.ensure_overlay)
    call(netlink.apply_network, WANTED)
    assert call(_everything) != before
    removed = call(netlink.remove_network)
    assert "device isthmus0" in removed
    assert call(_everything) == before
    assert call(netlink.remove_network) == []


SPEC = mesh.spec()
FROM_THE_AGENT = Datapath(1, routes=addressing.routes(SPEC, (), 1500, ()))
"""When etcd has told it of no other node."""
MEMBER, OUTSIDE = "10.102.0.1", "10.200.0.1"


def _boot(place: Path) -> str:
    """What systemd runs before the network is up; answers what `ip` says."""
    file = place / "boot-routes"
    ranges = {name: [str(each) for each in getattr(SPEC, name)] for name in ("service_ranges4", "mesh_ranges4")}
    file.write_text(units.boot_routes(ranges))
    (line,) = [line for line in units.boot_routes_unit().splitlines() if line.startswith("ExecStart=")]
    command = line.removeprefix("ExecStart=-").replace(units.BOOT_ROUTES, str(file)).split()
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def _underlay() -> None:
    """A device with an address, and the default route over it."""
    _ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    _ip("link", "set", "eth1", "up")
    _ip("link", "set", "eth0", "up")
    _ip("address", "add", "192.0.2.1/24", "dev", "eth0")
    _ip("route", "add", "default", "via", "192.0.2.2")


def _send(address: str) -> int:
    """The errno of a datagram, 0 when it left."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"early", (address, 9))
        except OSError as error:
            return error.errno or -1
    return 0


def test_before_the_agent_runs_a_boot_has_its_routes(call: Call, tmp_path: Path) -> None:
    assert call(_boot, tmp_path) == ""
    call(_underlay)
    assert [call(_send, address) for address in (MEMBER, OUTSIDE)] == [errno.EHOSTUNREACH, 0]
    call(netlink.ensure_overlay)
    assert set(call(netlink.apply_network, FROM_THE_AGENT).changes) == {
        "add route unreachable 0.0.0.0/0 table 730",
        "set isthmus0 up",
    }, "all others are there, and are the agent's"
    assert call(netlink.audit_network, FROM_THE_AGENT) == []
    call(netlink.remove_network)
    assert "unreachable" not in call(_everything)
    assert call(_send, MEMBER) == 0, "this is what a host does without them"


def test_what_is_there_already_a_boot_leaves(call: Call, tmp_path: Path) -> None:
    """Also when the agent runs already, as on a host whose earlier version had no such unit."""
    call(_underlay)
    call(_ip, "route", "add", "10.101.0.0/16", "via", "192.0.2.2")  # the first of them
    assert "File exists" in call(_boot, tmp_path)
    routes = call(_ip, "route", "show")
    assert "10.101.0.0/16 via 192.0.2.2 dev eth0" in routes
    assert {line.split()[1] for line in routes.splitlines() if line.startswith("unreachable")} == {
        str(each) for each in {*SPEC.service_ranges4, *SPEC.mesh_ranges4} - {ip_network("10.101.0.0/16")}
    }
    assert call(_boot, tmp_path)
    assert call(_ip, "route", "show") == routes


def test_foreign_objects_are_not_touched(call: Call) -> None:
    call(netlink.ensure_overlay)
    call(netlink.apply_network, WANTED)
    call(_ip, "link", "set", "lo", "up")
    call(_ip, "route", "add", "192.0.2.0/24", "dev", "isthmus0", "proto", "static")
    call(_ip, "route", "add", "unreachable", "192.0.3.0/24", "table", "730")
    call(_ip, "rule", "add", "from", "10.101.0.0/28", "lookup", "731", "priority", "730")
    call(_ip, "rule", "add", "from", "10.101.9.0/28", "lookup", "730", "priority", "730")
    foreign = call(_everything)
    assert call(netlink.audit_network, WANTED) == []
    assert not call(netlink.apply_network, WANTED)
    assert call(_everything) == foreign
    call(netlink.remove_network)
    left = call(_everything)
    assert "unreachable 192.0.3.0/24 table 730" in left
    assert "lookup 731" in left
    assert "from 10.101.9.0/28 lookup 730" in left


def test_a_foreign_route_in_the_way_is_named_and_the_rest_is_done(call: Call) -> None:
    call(netlink.ensure_overlay)
    call(_ip, "route", "add", "blackhole", "10.102.0.0/28")
    with pytest.raises(NetworkError, match=r"cannot add route 10\.102\.0\.0/28 .*a route that is not ours") as caught:
        call(netlink.apply_network, WANTED)
    assert len(caught.value.problems) == 1
    assert call(netlink.audit_network, WANTED) == ["route 10.102.0.0/28 src 10.101.0.1 mtu 1450 is missing"]
    assert "blackhole 10.102.0.0/28" in call(_ip, "route", "show")


def test_a_route_that_yields_stands_beside_a_foreign_one(call: Call) -> None:
    prefix = ip_network("10.244.1.0/24")
    wanted = replace(WANTED, routes=WANTED.routes | {Route(prefix, ip_address("10.101.0.1"), 1450, metric=730)})
    call(netlink.ensure_overlay)
    call(_ip, "link", "set", "lo", "up")
    call(_ip, "route", "add", str(prefix), "dev", "lo")
    call(netlink.apply_network, wanted)
    assert call(netlink.audit_network, wanted) == []
    assert "dev lo" in call(_ip, "route", "get", "10.244.1.9")
    call(_ip, "route", "delete", str(prefix), "dev", "lo")
    assert "dev isthmus0" in call(_ip, "route", "get", "10.244.1.9")


def test_damage_is_named_and_repaired(call: Call) -> None:
    call(netlink.ensure_overlay)
    call(netlink.apply_network, WANTED)
    call(_ip, "address", "del", "10.101.0.2/32", "dev", "isthmus0")
    call(_ip, "address", "add", "10.101.0.7/24", "dev", "isthmus0", "noprefixroute")
    call(_ip, "route", "del", "10.102.0.0/28")
    call(_ip, "route", "add", "10.103.0.0/28", "dev", "isthmus0", "proto", "73")
    call(_ip, "rule", "del", "from", "10.101.0.0/28", "lookup", "730")
    assert sorted(call(netlink.audit_network, WANTED)) == [
        "address 10.101.0.2 is missing on isthmus0",
        "address 10.101.0.7/24 on isthmus0 is not wanted",
        "route 10.102.0.0/28 src 10.101.0.1 mtu 1450 is missing",
        "route 10.103.0.0/28 is not wanted",
        "rule 730: from 10.101.0.0/28 lookup 730 is missing",
    ]
    call(netlink.apply_network, WANTED)
    assert call(netlink.audit_network, WANTED) == []


def test_a_device_with_other_parameters_is_made_again(call: Call) -> None:
    first = call(netlink.ensure_overlay)
    call(netlink.apply_network, WANTED)
    assert call(netlink.ensure_overlay, mtu=1400) == first, "the MTU is changed in place"
    assert call(netlink.audit_network, WANTED) == ["isthmus0 has MTU 1400, wanted: 1450"]
    second = call(netlink.ensure_overlay, port=4789)
    assert second != first
    call(netlink.apply_network, WANTED)
    assert call(netlink.audit_network, WANTED) == ["isthmus0 uses UDP port 4789, wanted: 8472"]
    assert call(netlink.audit_network, replace(WANTED, overlay_port=4789)) == []
    call(_ip, "link", "del", "isthmus0")
    assert call(netlink.audit_network, WANTED) == ["the overlay device isthmus0 is missing"]
    with pytest.raises(NetworkError, match="ensure_overlay"):
        call(netlink.apply_network, WANTED)
    assert call(netlink.overlay_index) is None


def test_overlays_of_others_on_our_port_are_found(call: Call) -> None:
    call(netlink.ensure_overlay)
    for name, port in (("flannel.1", "8472"), ("vx9", "4789")):
        call(_ip, "link", "add", name, "type", "vxlan", "id", "1", "local", "127.0.0.1", "dstport", port)
    assert call(netlink.overlays_of_others, 8472) == ["flannel.1"]
    assert call(netlink.overlays_of_others, 4790) == []


def test_a_used_port_is_named(call: Call) -> None:
    call(_ip, "link", "add", "other", "type", "vxlan", "external", "dstport", "8472")
    call(_ip, "link", "set", "other", "up")
    with pytest.raises(NetworkError, match="8472"):
        call(netlink.ensure_overlay)


def test_underlay_mtu_of_own_addresses_and_paths(call: Call) -> None:
    def prepare() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname="eth0", kind="veth", peer="eth1", mtu=1460)
            for name in ("eth0", "eth1"):
                ipr.link("set", index=ipr.link_lookup(ifname=name)[0], state="up")
            index = ipr.link_lookup(ifname="eth0")[0]
            ipr.addr("add", index=index, address="198.18.0.1", prefixlen=24)
            ipr.route("add", dst="198.18.9.0/24", gateway="198.18.0.2", metrics={"mtu": 1300})

    call(prepare)
    assert call(netlink.underlay_mtu, ip_address("198.18.0.1")) == 1460
    assert call(netlink.underlay_mtu, ip_address("198.18.0.2")) == 1460
    assert call(netlink.underlay_mtu, ip_address("198.18.9.1")) == 1300
    with pytest.raises(NetworkError, match=r"no route to 192\.0\.2\.1"):
        call(netlink.underlay_mtu, ip_address("192.0.2.1"))


def test_the_hosts_own_address_is_the_first_of_the_device(call: Call) -> None:
    """kube-proxy masquerades what a NodePort sends into the mesh, with the first address of the device."""
    call(netlink.ensure_overlay)
    wanted = replace(
        WANTED, addresses=frozenset(ip_address(f"10.101.0.{last}") for last in (97, 98, 100)), routes=frozenset()
    )
    call(netlink.apply_network, wanted)
    assert call(_ip, "-br", "address", "show", "isthmus0").split()[2] == "10.101.0.97/32"


def test_ipv6_addresses_routes_and_rules(call: Call) -> None:
    wanted = Datapath(
        1,
        addresses=frozenset({ip_address("fd00:101::1")}),
        routes=frozenset(
            {
                Route(ip_network("fd00:102::/112"), ip_address("fd00:101::1"), 1430),
                Route(ip_network("fd00:111::/108"), unreachable=True),
            }
        ),
        rules=frozenset({Rule(ip_network("fd00:101::/112"), 730, 730)}),
    )
    call(netlink.ensure_overlay)
    call(netlink.apply_network, wanted)
    assert call(netlink.audit_network, wanted) == []
    assert not call(netlink.apply_network, wanted)
    assert "nodad" in call(_ip, "-6", "address", "show", "dev", "isthmus0", "to", "fd00:101::1")
    call(netlink.remove_network)
    assert "fd00" not in call(_ip, "-6", "route", "show", "table", "all")


def _many(count: int) -> frozenset[Route]:
    source = ip_address("10.101.0.1")
    return frozenset(
        Route(ip_network((0x0A800000 + number * 16, 28)), source, 1450, table)
        for number in range(count // 2)
        for table in (254, 730)
    )


def test_thousands_of_routes_are_made_read_and_removed_in_seconds(call: Call) -> None:
    call(netlink.ensure_overlay)
    steps: list[float] = []
    many = replace(WANTED, routes=_many(10_000))
    took = []
    for wanted in (many, many, replace(many, routes=frozenset())):
        began = time.monotonic()
        call(netlink.apply_network, wanted, step=lambda: steps.append(time.monotonic()))
        took.append(time.monotonic() - began)
        assert call(netlink.audit_network, wanted) == []
    print(f"10,000 routes: made {took[0]:.2f} s, read {took[1]:.2f} s, removed {took[2]:.2f} s")
    assert max(took) < 5 * PATIENCE
    assert len(steps) > 150, "it shows that it gets on"


def test_what_was_made_before_is_not_read_again(call: Call) -> None:
    call(netlink.ensure_overlay)
    call(netlink.apply_network, WANTED)
    fresh = Route(ip_network("10.103.0.0/28"), ip_address("10.101.0.1"), 1450)
    gone = Route(ip_network("10.102.0.0/28"), ip_address("10.101.0.1"), 1450)
    wanted = replace(WANTED, routes=WANTED.routes - {gone} | {fresh}, addresses=frozenset({ip_address("10.101.0.1")}))
    call(_ip, "route", "del", "198.18.2.11/32", "table", "730")
    call(_ip, "route", "del", "10.102.0.0/28")
    assert call(netlink.apply_network, wanted, made=WANTED).changes == (
        "add route 10.103.0.0/28 src 10.101.0.1 mtu 1450",
        "remove address 10.101.0.2/32",
    )
    missing = "route 198.18.2.11/32 table 730 src 10.101.0.1 mtu 1450"
    assert call(netlink.audit_network, wanted) == [f"{missing} is missing"]
    assert call(netlink.apply_network, wanted).changes == (f"add {missing}",)
    call(_ip, "link", "set", "isthmus0", "down")
    assert call(netlink.apply_network, wanted, made=wanted).changes, "a device that went down lost its routes"
    assert call(netlink.audit_network, wanted) == []
