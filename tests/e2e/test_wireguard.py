# SPDX-License-Identifier: GPL-3.0-or-later
"""Encryption of two pairs of sites of the running estate: on, things that restart meanwhile, new keys, off. What is on
the wire is looked at in the router's namespace, through which everything between machines goes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from demo import EDGE, ONPREM_CLIENT
from estate_tools import Estate, Wire
from installation import variant
from playbook import play
from router_capture import packets, recorded

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

PAIRS = (("onprem", "cloud"), ("onprem", "edge"))
NETWORKS = {site: f"198.18.{number}.0/24" for number, site in enumerate(("onprem", "cloud", "edge", "kube"), 1)}
NAME = b"web.shop.svc.clusterset.local"
"""In every request of a customer."""
OUTSIDE = f"{Wire.MARKERS}255.1"
"""In no range of the mesh, so it leaves by the default route; a `Wire` sees it, and takes it for no leak."""
SENDER = """\
import json, socket, sys
told = {}
for address in sys.argv[1:]:
    for _ in range(10):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            try:
                sender.sendto(b"early", (address, 9))
            except OSError as error:
                told.setdefault(address, []).append(error.errno)
            else:
                told.setdefault(address, []).append(0)
with open("/root/early.json", "w") as file:
    json.dump(told, file)
"""
SENDER_UNIT = """\
[Unit]
After=network.target
Before=isthmusd.service

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /root/early.py {addresses}

[Install]
WantedBy=multi-user.target
"""


def encrypted(estate: dict[str, Any], _: Any) -> None:
    for pair in estate["site_pairs"]:
        if tuple(pair["sites"]) in PAIRS:
            pair["encryption"] = "wireguard"


@contextlib.contextmanager
def capture(file: Path, sites: tuple[str, str], device: str = "any", also: str = "") -> Iterator[None]:
    """Every packet between two sites, and `also` others, whole, into `file`; by a site's bridge only what the router
    passes on, and not what hosts of the site send each other."""
    one, other = (NETWORKS[site] for site in sites)
    with recorded(file, f"net {one} and net {other}{f' or {also}' if also else ''}", device):
        yield


def in_clear(estate: Estate, hosts: tuple[str, ...]) -> list[bytes]:
    """What packets between workloads of these hosts look like in clear: their two addresses beside each other in the
    header, and a customer's request."""
    of_workloads = {
        IPv4Address(workload["address"]).packed
        for host in hosts
        for workload in estate.ask(host, "status")["workloads"]
        if workload["address"]
    }
    return [NAME, *(b"".join(two) for two in itertools.permutations(of_workloads, 2))]


def states(estate: Estate, host: str) -> dict[str, str]:
    """How packets of a host go to each other one, by name."""
    nodes = estate.ask(host, "status")["nodes"]
    return {node["name"]: node["encryption"]["state"] for node in nodes if node["probe"] != "this host"}


@contextlib.contextmanager
def early_sender(estate: Estate, host: str, *addresses: str) -> Iterator[None]:
    """At its next boot the host sends datagrams to addresses when the network is up and its agent is not: the agent's
    unit waits until they are sent. What became of them is in /root/early.json."""
    unit = "/etc/systemd/system/early.service"
    files = {"/root/early.py": SENDER, unit: SENDER_UNIT.format(addresses=" ".join(addresses))}
    try:
        for path, text in files.items():
            estate.lab.exec(host, ["sh", "-c", f"cat > {path}"], feed=text)
        estate.lab.exec(host, ["sh", "-c", "rm -f /root/early.json; systemctl enable early.service"])
        yield
    finally:
        gone = f"systemctl disable early.service; rm -f {' '.join(files)} /root/early.json; systemctl daemon-reload"
        estate.lab.exec(host, ["sh", "-c", gone])


def test_encryption_goes_on_and_off_and_nobody_notices(estate: Estate, tmp_path: Path) -> None:
    estate.converged()
    wanted = variant(tmp_path / "wanted", encrypted)
    shown = " ".join(play("plan", inventory=wanted).output.split())
    assert "encryption of edge and onprem is turned on, in steps of one run" in shown
    assert "cloud and edge: path tunnel (VXLAN), encryption none, MTU 1450" in shown
    wire = Wire(estate, tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(wire.stop)
        whole = stack.enter_context(contextlib.ExitStack())
        whole.callback(lambda: play("site", seconds=1800))
        with estate.unnoticed(estate.edge, estate.onprem):
            play("site", inventory=wanted, seconds=1800)
        play("verify", inventory=wanted)
        there = states(estate, ONPREM_CLIENT)
        assert {there[host] for host in ("cloud-1", "cloud-2", "edge-1")} == {"encrypted"}
        assert {there[host] for host in estate.lab.hosts if host.startswith("onprem") and host in there} == {"plain"}
        assert states(estate, EDGE)["cloud-1"] == "plain"

        files = {sites: tmp_path / f"{'-'.join(sites)}.pcap" for sites in (*PAIRS, ("edge", "cloud"))}
        with contextlib.ExitStack() as captures:
            for sites, file in files.items():
                captures.enter_context(capture(file, sites))
            with estate.unnoticed(estate.edge, estate.onprem):
                estate.lab.exec(EDGE, ["systemctl", "restart", "isthmusd.service"])
                estate.lab.exec(ONPREM_CLIENT, ["systemctl", "restart", "isthmusd.service"])
            # Its sessions end with it: what is sent meanwhile is lost, and nothing of it goes in clear.
            for host in (EDGE, ONPREM_CLIENT):
                estate.lab.exec(host, ["systemctl", "kill", "--signal=KILL", "isthmus-wireguard.service"])
            estate.until(
                "every host is reached again",
                lambda: (
                    all(states(estate, ONPREM_CLIENT)[host] == "encrypted" for host in ("cloud-1", "edge-1"))
                    and estate.used(ONPREM_CLIENT) == estate.used(EDGE) == estate.backends
                ),
                30,
            )
            with estate.unnoticed(estate.edge, estate.onprem):
                pass
            # When it comes up it has routes and neighbours before it has a session, and an underlay before an agent.
            spec = json.loads(estate.lab.exec(ONPREM_CLIENT, ["cat", "/etc/isthmus/node.json"]).stdout)
            member = spec["node"]["mesh4"]
            with early_sender(estate, "cloud-2", OUTSIDE, member):
                estate.lab.reboot("cloud-2", hard=True)
                estate.until(
                    "a host that was reset reaches the others again",
                    lambda: (
                        states(estate, "cloud-2").get(ONPREM_CLIENT) == "encrypted"
                        and estate.used("cloud-2") == estate.used(ONPREM_CLIENT) == estate.backends
                    ),
                )
                told = json.loads(estate.lab.exec("cloud-2", ["cat", "/root/early.json"]).stdout)
            assert told == {OUTSIDE: [0] * 10, member: [errno.EHOSTUNREACH] * 10}
            assert wire.leaks() == []
            assert wire.shows(OUTSIDE), "this is how it would have left"
        clear = in_clear(estate, tuple(estate.lab.hosts))
        for sites in PAIRS:
            assert packets(files[sites], "udp port 8472") == 0, f"{sites}: a VXLAN header in clear"
            assert packets(files[sites], "udp port 51871") > 100
            seen = files[sites].read_bytes()
            assert [words for words in clear if words in seen] == [], f"{sites}: addresses or a request in clear"
        seen = files["edge", "cloud"].read_bytes()
        assert NAME in seen, "this is how a request in clear looks"
        assert len([words for words in clear if words in seen]) > 2, "and these are addresses"

        with capture(tmp_path / "rotation.pcap", PAIRS[0]), estate.unnoticed(estate.edge, estate.onprem):
            play("rotate_wireguard_keys", "-e", "isthmus_serial=100%", inventory=wanted, seconds=1800)
        assert packets(tmp_path / "rotation.pcap", "udp port 8472") == 0
        assert packets(tmp_path / "rotation.pcap", "udp port 51872") > 100
        for host in estate.lab.hosts:
            left = "ip link show isthmus-wg0 || test -e /etc/isthmus/pki/wireguard.key"
            assert estate.lab.exec(host, ["sh", "-c", left], check=False).returncode != 0, host
        assert {states(estate, ONPREM_CLIENT)[host] for host in ("cloud-1", "cloud-2", "edge-1")} == {"encrypted"}

        with estate.unnoticed(estate.edge, estate.onprem):
            play("site", "-e", "isthmus_serial=100%", seconds=1800)
        whole.pop_all()
        play("verify")
        assert set(states(estate, ONPREM_CLIENT).values()) == {"plain"}
        for host in estate.lab.hosts:
            left = "ip -br link | grep isthmus-wg || ls /etc/isthmus/pki | grep wireguard"
            assert estate.lab.exec(host, ["sh", "-c", left], check=False).returncode != 0, host
        assert wire.leaks() == []
    estate.converged()
