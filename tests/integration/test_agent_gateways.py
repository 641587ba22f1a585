# SPDX-License-Identifier: GPL-3.0-or-later
"""What a real `isthmusd` makes of the kernel's routes where another site is behind a gateway: there, put back, gone;
over the second one while the first does not answer; and on a gateway over the other one while nothing passes its
tunnels."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bpf.topology import bare_nodes, wait_for
from integration.test_agent_native import SITES, Host, Pair, pair
from isthmus_agent.cli import text
from isthmus_agent.desired.addressing import IPSEC_RULE_PRIORITY, IPSEC_TABLE, SIBLING_TABLE
from isthmus_mesh import ipsec
from isthmus_mesh.spec import spec_hash

pytestmark = pytest.mark.root
slow = pytest.mark.slow  # for the full run until it has passed

FAR = "198.51.100.0/24"
NEAR = "198.51.100.7/32"


SECOND = "198.18.0.77"
"""Of a gateway that only has an address on the network of both nodes."""
FAR_GATEWAY = "198.51.100.9"
TAKEN_OVER = 10  # seconds (docs/ipsec.md)
RETURNED = 15  # seconds: ten answers, one a second


FAR_PORT = 9000
WATCHING = """
import threading, time
told = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
told.bind((0, 0x40))  # RTMGRP_IPV4_ROUTE
told.setblocking(False)
stop, counted = threading.Event(), [0, 0]
def passing(address, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(3)
        while not stop.is_set():
            counted[0] += 1
            try:
                s.sendto(b'?', (address, port)); s.recv(100)
            except OSError:
                counted[1] += 1
            time.sleep(0.005)
def changes():
    # Of routes in tables with a number above 255, which are the agent's (RT_TABLE_COMPAT).
    found = 0
    while True:
        try:
            messages = told.recv(65536)
        except BlockingIOError:
            return found
        while messages:
            size, kind = struct.unpack_from('=IH', messages)
            found += kind in (24, 25) and messages[20] == 252
            messages = messages[(size + 3) & ~3:]
"""


@contextlib.contextmanager
def nothing_lost(both: Pair) -> Iterator[None]:
    """Packets of host a to behind the gateways, which node b answers, and no route of the agent's is touched."""
    watching = both.a.node.process()
    watching.do(
        f"{WATCHING}\nthread = threading.Thread(target=passing, args=({FAR_GATEWAY!r}, {FAR_PORT})); thread.start()\n"
        "result = 1"
    )
    yield
    sent, lost, changed = watching.do("stop.set(); thread.join(); result = [*counted, changes()]")
    assert sent > 20
    assert (lost, changed) == (0, 0), f"of {sent} packets"


def behind_gateway(host: Host, via: str | None, **more: Any) -> None:
    """Everything of the other site is behind the gateway `via`, None: behind none; as `site` brings it. Empty on a
    gateway."""
    path = host.daemon.directory / "node.json"
    spec = json.loads(path.read_text())
    spec.pop("ipsec", None)
    if via is not None:
        far = {host.other: {"stage": "demands", "networks": [FAR]}}
        spec["ipsec"] = {"sites": SITES, "networks": ["198.18.0.0/16"], "far": far, "via": via or None, **more}
    spec["hash"] = spec_hash(spec)
    path.write_text(json.dumps(spec))
    host.daemon.stop()
    host.daemon.start()


@slow
def test_what_is_behind_the_gateway_is_led_there_and_stays_so(tmp_path: Path) -> None:
    with bare_nodes() as nodes, pair(tmp_path, nodes, "plain") as both:
        gateway = str(both.b.node.underlay)

        def there() -> tuple[str, bool]:
            # A table without a route is none, which `ip` takes for an error.
            route = both.a.run("sh", "-c", f"ip route show table {IPSEC_TABLE} proto 73 2>&1; true")
            return route, f"{IPSEC_RULE_PRIORITY}:" in both.a.run("ip", "rule")

        def led() -> bool:
            route, rule = there()
            return f"{FAR} via {gateway} dev eth0" in route and "mtu 1400" in route and rule

        def gone() -> bool:
            route, rule = there()
            return FAR not in route and not rule

        def mtu() -> bool:
            return "mtu 1350" in both.a.run("ip", "route", "get", "10.102.0.2")

        behind_gateway(both.a, gateway)
        wait_for(led, "the route to the gateway", 30)
        wait_for(mtu, "a smaller MTU to the other site's hosts", 30)
        assert both.dial() != []
        both.a.run("ip", "route", "del", FAR, "table", str(IPSEC_TABLE))
        wait_for(led, "the route is back", 30)
        both.a.run("ip", "rule", "del", "priority", str(IPSEC_RULE_PRIORITY))
        wait_for(led, "the rule is back", 30)
        assert_no_program(both)
        behind_gateway(both.a, None)
        wait_for(gone, "route and rule are gone", 30)


def test_what_the_rules_of_gateways_drop_is_told(tmp_path: Path) -> None:
    with bare_nodes() as nodes, pair(tmp_path, nodes, "plain") as both:
        rules = tmp_path / "rules.nft"

        def dropped() -> int:
            return int(both.a.daemon.status()["gateways"]["dropped"])

        behind_gateway(both.a, str(both.b.node.underlay))
        rules.write_text(ipsec.guard(json.loads((both.a.daemon.directory / "node.json").read_text())["ipsec"]) or "")
        both.a.run("nft", "-f", str(rules))
        assert dropped() == 0
        assert "dropped" not in text.status(both.a.daemon.status())
        assert both.a.daemon.metrics()["isthmus_gateway_drops_total"] == 0
        # Beside the gateway, as somebody's own route would lead it.
        both.a.run("ip", "route", "add", NEAR, "dev", "eth0", "table", str(IPSEC_TABLE))
        both.a.node.process().do(
            "import contextlib\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for _ in range(3):\n"
            "    with contextlib.suppress(PermissionError): s.sendto(b'beside', ('198.51.100.7', 9))\n"
            "result = 1"
        )
        wait_for(lambda: dropped() == 3, "they are counted", 15)
        assert both.a.daemon.metrics()["isthmus_gateway_drops_total"] == 3
        assert "3 packets dropped that went beside them" in text.status(both.a.daemon.status())
        assert "isthmus_gateway_drops_total" not in both.b.daemon.metrics(), "it has no such rules"


def assert_no_program(both: Pair) -> None:
    """Those of native routing are for native routing only."""
    assert "underlay" not in both.a.filters()


def led(host: Host, table: int) -> str:
    """Over whom packets go to what is behind gateways, by a table; empty when it does not say."""
    found = re.search(rf"^{FAR} via (\S+) dev eth0", host.run("sh", "-c", f"ip route show table {table} 2>&1; true"))
    return found[1] if found else ""


def sent(host: Host, device: str) -> int:
    """Packets that left by a device."""
    (link,) = json.loads(host.run("ip", "-json", "-s", "link", "show", device))
    return int(link["stats64"]["tx"]["packets"])


def gateways(both: Pair) -> list[dict[str, str]]:
    """Node b, which answers probes, and one that nobody has heard of."""
    first = {"cluster": "cloud", "host": "cloud-1", "underlay": str(both.b.node.underlay)}
    return [first, {"cluster": "onprem", "host": "onprem-9", "underlay": SECOND}]


def states(host: Host) -> dict[str, str]:
    """Of the site's gateways, by host."""
    return {one["host"]: one["state"] for one in host.daemon.status()["gateways"]["gateways"]}


def answering(both: Pair) -> None:
    """Node b is also what is behind the gateways, and their second one."""
    both.b.run("ip", "addr", "add", f"{FAR_GATEWAY}/32", "dev", "lo")
    both.b.run("ip", "addr", "add", f"{SECOND}/32", "dev", "eth0")
    both.b.node.process().do(f"serve_udp('b', {FAR_GATEWAY!r}, {FAR_PORT}); result = 1")


def test_the_second_gateway_takes_over_and_the_first_gets_packets_back(tmp_path: Path) -> None:
    with bare_nodes() as nodes, pair(tmp_path, nodes, "plain") as both:
        first, second = (each["underlay"] for each in gateways(both))
        answering(both)
        behind_gateway(both.a, first, gateways=gateways(both))
        wait_for(lambda: led(both.a, IPSEC_TABLE) == first, "the first gateway is used", 30)
        assert states(both.a) == {"cloud-1": "used", "onprem-9": "up"}
        with nothing_lost(both):
            both.a.daemon.stop(signal.SIGKILL)
            both.a.daemon.start()
        # Nothing arrives there any more.
        both.a.run("ip", "neigh", "replace", first, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
        began = time.monotonic()
        wait_for(lambda: led(both.a, IPSEC_TABLE) == second, "the second one takes over", 3 * TAKEN_OVER)
        print(f"the second gateway is used {time.monotonic() - began:.1f} s after the first was lost")
        assert states(both.a) == {"cloud-1": "down", "onprem-9": "used"}
        assert any(
            "gateway cloud-1 of this site does not answer" in line for line in both.a.daemon.status()["warnings"]
        )
        with nothing_lost(both):
            both.a.daemon.stop()
            both.a.daemon.start()
            wait_for(lambda: states(both.a)["cloud-1"] == "down", "the new agent finds it lost as well", 15)
        both.a.run("ip", "neigh", "del", first, "dev", "eth0")
        wait_for(lambda: led(both.a, IPSEC_TABLE) == first, "the first one is used again", 3 * RETURNED)
        behind_gateway(both.a, None)
        wait_for(lambda: "736:" not in both.a.run("ip", "rule"), "the rule is gone", 30)


def test_an_agent_that_is_restarted_on_a_gateway_goes_on_around_tunnels_until_they_have_answered(
    tmp_path: Path,
) -> None:
    with bare_nodes() as nodes, pair(tmp_path, nodes, "plain") as both:
        own = str(both.a.node.underlay)
        two = [{"cluster": "onprem", "host": "onprem-1", "underlay": own}, gateways(both)[0]]
        over = two[1]["underlay"]
        answering(both)
        # As strongSwan has it.
        both.a.run("ip", "rule", "add", "priority", str(ipsec.RULE_PRIORITY), "lookup", str(ipsec.ROUTING_TABLE))
        ask = [{"site": both.a.other, "inside": FAR_GATEWAY}]
        behind_gateway(both.a, "", local=own, connections=ask, gateways=two)
        wait_for(lambda: led(both.a, IPSEC_TABLE) == led(both.a, SIBLING_TABLE) == over, "no tunnel is there", 30)
        with nothing_lost(both):
            both.a.daemon.stop()
            # A tunnel of which nobody knows yet whether it passes anything; it does not.
            both.a.run("ip", "link", "add", "ipsec0", "type", "veth", "peer", "name", "nobody")
            both.a.run("ip", "link", "set", "ipsec0", "arp", "off", "addrgenmode", "none", "up")
            both.a.run("ip", "link", "set", "nobody", "up")
            both.a.run("ip", "route", "add", FAR, "dev", "ipsec0", "proto", "static", "table", str(ipsec.ROUTING_TABLE))
            both.a.daemon.start()
            wait_for(lambda: sent(both.a, "ipsec0") > 0, "it is asked", 30)
        assert both.a.daemon.status()["gateways"]["tunnels"] == {both.a.other: False}


@slow
def test_a_gateway_leads_over_the_other_one_while_nothing_passes_its_tunnels(tmp_path: Path) -> None:
    with bare_nodes() as nodes, pair(tmp_path, nodes, "plain") as both:
        own = str(both.a.node.underlay)
        two = [{"cluster": "onprem", "host": "onprem-1", "underlay": own}, gateways(both)[0]]
        over = two[1]["underlay"]
        behind_gateway(both.a, "", local=own, connections=[], gateways=two)
        wait_for(lambda: led(both.a, SIBLING_TABLE) == over, "the way when there is no tunnel", 30)
        wait_for(lambda: led(both.a, IPSEC_TABLE) == over, "nothing passes without a tunnel", 30)
        rules = both.a.run("ip", "rule")
        assert "734:\tfrom all fwmark 0x53/0xff lookup main" in rules
        assert any("over the site's other gateway" in line for line in both.a.daemon.status()["warnings"])
        # As strongSwan has it.
        both.a.run("ip", "link", "add", "ipsec0", "type", "veth", "peer", "name", "nobody")
        both.a.run("ip", "link", "set", "ipsec0", "up")
        both.a.run("ip", "route", "add", FAR, "dev", "ipsec0", "proto", "static", "table", "220")
        wait_for(lambda: led(both.a, IPSEC_TABLE) == "", "packets go through the tunnel", 30)
        assert led(both.a, SIBLING_TABLE) == over
        assert both.a.daemon.status()["gateways"]["tunnels"] == {both.a.other: True}
        both.a.run("ip", "link", "del", "ipsec0")
        wait_for(lambda: led(both.a, IPSEC_TABLE) == over, "they go around it", 30)

        # The tunnel is there, and the other site's gateway does not answer in it, though it is asked by no other way.
        both.a.run("ip", "link", "add", "ipsec0", "type", "veth", "peer", "name", "nobody")
        both.a.run("ip", "link", "set", "ipsec0", "arp", "off", "addrgenmode", "none", "up")
        both.a.run("ip", "link", "set", "nobody", "up")
        both.a.run("ip", "route", "add", FAR, "dev", "ipsec0", "proto", "static", "table", "220")
        ask = [{"site": both.a.other, "inside": FAR_GATEWAY}]
        behind_gateway(both.a, "", local=own, connections=ask, gateways=two)
        wait_for(lambda: both.a.daemon.status()["gateways"]["tunnels"] == {both.a.other: False}, "nobody answers", 30)
        assert led(both.a, IPSEC_TABLE) == over
        before = sent(both.a, "ipsec0")
        wait_for(lambda: sent(both.a, "ipsec0") >= before + 3, "it is asked once a second, in the tunnel", 30)
        behind_gateway(both.a, None)
        wait_for(lambda: not re.search("^73[468]:", both.a.run("ip", "rule"), re.MULTILINE), "the rules are gone", 30)
