# SPDX-License-Identifier: GPL-3.0-or-later
"""Throughput and round trip of each way between two sites, beside the same hosts without the mesh. Gates nothing.

Tunnel, native routing, WireGuard and the sites' gateways are turned on in turn by `site`; in each, the bare network, a
VXLAN device, a wireguard-go and a VXLAN device inside that, made by hand between the same two hosts, are measured in
the same rounds. All machines share this machine's cores, so the ratios mean something, and the figures only here. Run
by `make bench` and `make bench-paths` (STEPS="tunnel native" for some), on a lab with the estate.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "lab"), str(ROOT / "tests" / "e2e")]

from bench import PORT, ROUNDS, SECONDS, SEND, SINK, Bench, measure  # noqa: E402
from demo import ONPREM_CLIENT  # noqa: E402
from installation import variant  # noqa: E402
from isthmus_lab import ROUTER, Lab  # noqa: E402
from lab_system import in_namespace  # noqa: E402
from playbook import play  # noqa: E402

FROM, TO = ONPREM_CLIENT, "cloud-1"
GATEWAYS = {"onprem": ("onprem-2", "198.18.1.0/24"), "cloud": ("cloud-2", "198.18.2.0/24")}  # neither is FROM or TO
SECOND = "onprem-1"
"""The second gateway of onprem."""
TAKEN_OVER = 10.0  # seconds (docs/ipsec.md)
TURNS = 400  # a round, of one byte each way
ECHO_PORT = PORT + 1
# Devices by hand, their /24 and MTU. The second of VXLAN is inside WireGuard.
VXLAN, WIREGUARD, BOTH = ("bench-vx", "10.199.0", 1450), ("bench-wg", "10.198.0", 1420), ("bench-vw", "10.197.0", 1370)
VXLAN_PORT, WIREGUARD_PORT = 14789, 15000

# Turns one of the features of a device that Linux calls so on or off; its arguments are device, on or off, features.
FEATURES = """
import sys
from pyroute2.ethtool import Ethtool
device, state, *wanted = sys.argv[1:]
tool = Ethtool()
found = tool.get_features(device)
for name in wanted:
    found.features[name].enable = state == "on"
tool.set_features(device, found)
"""
BARE, PLAIN_WIREGUARD = ("bare", "the bare network"), ("wireguard", "plain wireguard-go")

ECHO = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
for _ in range(int(sys.argv[2])):
    connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := connection.recv(1):
        connection.sendall(data)
    connection.close()
"""

# Median microseconds of a byte there and back over one connection, a round for each address in turn.
TURN = """
import json, socket, statistics, sys, time
targets, port, turns, rounds = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
found = {name: [] for name in targets}
order = [*targets.items()]
for _ in range(rounds):
    for name, address in order:
        connection = socket.create_connection((address, port), 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(turns):
            began = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            found[name].append(time.perf_counter() - began)
        connection.close()
    order.append(order.pop(0))  # each round begins with another one
print(json.dumps({name: statistics.median(times) * 1e6 for name, times in found.items()}))
"""


def change(**words: str) -> Callable[[dict[str, Any], Any], None]:
    """The inventory with other words for the pair of sites that is measured."""

    def edit(estate: dict[str, Any], _: Any) -> None:
        for pair in estate["site_pairs"]:
            if set(pair["sites"]) == {"cloud", "onprem"}:
                pair.update(words)

    return edit


def with_gateways(estate: dict[str, Any], _: Any) -> None:
    """They are there, and nothing goes through them yet."""
    for site, (host, network) in GATEWAYS.items():
        estate["sites"][site]["ipsec"] = {"networks": [network], "gateways": [{"host": host}]}
    estate["sites"]["onprem"]["ipsec"]["gateways"].append({"host": SECOND})


class Paths(Bench):
    """Each step leaves the estate as the inventory has it."""

    def measure(self, what: str, *baselines: tuple[str, str]) -> None:
        """Rows of the mesh's way beside the baselines: which of those made by hand, and its name in the table."""
        targets = {
            "mesh": self.target(),
            "bare": str(self.lab.hosts[TO].address),
            "vxlan": f"{VXLAN[1]}.2",
            "wireguard": f"{WIREGUARD[1]}.2",
            "both": f"{BOTH[1]}.2",
        }
        bulk, turns = self.figures(targets)
        for baseline, of in baselines:
            self.row(f"{what}, bulk", bulk["mesh"], bulk[baseline], "Mbit/s", of)
            self.row(f"{what}, there and back", turns["mesh"], turns[baseline], "us", of)

    def target(self) -> str:
        """The address of a workload."""
        return str(next(w["address"] for w in self.ask(TO, "status")["workloads"] if w["name"] == "web"))

    def figures(self, targets: dict[str, str]) -> tuple[dict[str, float], dict[str, float]]:
        """Mbit/s and microseconds there and back to each target."""
        words = json.dumps(targets)
        with self.serving(TO, "bench-sink", SINK, PORT, len(targets) * ROUNDS):
            bulk = self.python(FROM, SEND, words, str(PORT), str(SECONDS), str(ROUNDS))
        with self.serving(TO, "bench-echo", ECHO, ECHO_PORT, len(targets) * ROUNDS):
            turns = self.python(FROM, TURN, words, str(ECHO_PORT), str(TURNS), str(ROUNDS))
        return bulk, turns

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Devices of VXLAN and WireGuard on both hosts, without the mesh."""
        ends = ((FROM, TO, 1), (TO, FROM, 2))
        with self.as_network_cards():
            try:
                for host, other, number in ends:
                    self.vxlan_by_hand(host, VXLAN, 4242, number, str(self.lab.hosts[other].address))
                    self.wireguard_by_hand(host, number)
                for host, other, number in ends:
                    device, network, _mtu = WIREGUARD
                    key = self.lab.exec(other, ["sh", "-c", f"wg pubkey < /run/{device}.key"]).stdout.strip()
                    endpoint = ["endpoint", f"{self.lab.hosts[other].address}:{WIREGUARD_PORT}"]
                    allowed = ["allowed-ips", f"{network}.{3 - number}/32"]
                    self.lab.exec(host, ["wg", "set", device, "peer", key, *endpoint, *allowed])
                    self.vxlan_by_hand(host, BOTH, 4243, number, f"{network}.{3 - number}")
                yield
            finally:
                for host, _, _ in ends:
                    self.lab.exec(host, ["systemctl", "stop", f"{WIREGUARD[0]}.service"], check=False)
                    for device, *_ in (VXLAN, BOTH):
                        self.lab.exec(host, ["ip", "link", "delete", device], check=False)
                    self.lab.exec(host, ["rm", "-f", f"/run/{WIREGUARD[0]}.key"])

    @contextlib.contextmanager
    def as_network_cards(self) -> Iterator[None]:
        """What reaches the hosts are packets of the network's size, and their devices put those of one flow together
        (GRO), as the drivers of network cards do. A pair of virtual devices would hand over 64 KiB at once, but never
        what is in a tunnel where a bridge is on the way: a difference that no real network has."""

        def features(namespace: str, device: str, state: str, *names: str) -> None:
            in_namespace(namespace, sys.executable, "-c", FEATURES, device, state, *names)

        segmentation = ("tx-tcp-segmentation", "tx-tcp-ecn-segmentation", "tx-tcp-mangleid-segmentation")
        hosts = [self.lab.hosts[name] for name in (FROM, TO)]
        try:
            for host in hosts:
                features(ROUTER, host.port, "off", *segmentation, "tx-tcp6-segmentation")
                features(host.namespace, "eth0", "on", "rx-gro")
            yield
        finally:
            for host in hosts:
                features(host.namespace, "eth0", "off", "rx-gro")
                features(ROUTER, host.port, "on", *segmentation, "tx-tcp6-segmentation")

    def vxlan_by_hand(self, host: str, which: tuple[str, str, int], vni: int, number: int, remote: str) -> None:
        device, network, mtu = which
        tunnel = ["type", "vxlan", "id", str(vni), "remote", remote, "dstport", str(VXLAN_PORT)]
        self.ip(host, "link", "add", device, *tunnel)
        self.ip(host, "address", "add", f"{network}.{number}/24", "dev", device)
        self.ip(host, "link", "set", device, "mtu", str(mtu), "up")

    def wireguard_by_hand(self, host: str, number: int) -> None:
        device, network, mtu = WIREGUARD
        # A unit of its own: what a command of the lab leaves behind ends with the command.
        run = ["systemd-run", "--quiet", "--collect", f"--unit={device}"]
        self.lab.exec(host, [*run, "/usr/bin/wireguard-go", "--foreground", device])
        socket = ["test", "-S", f"/run/wireguard/{device}.sock"]
        self.until(
            f"wireguard-go of {host} listens",
            lambda: self.lab.exec(host, socket, check=False).returncode == 0,
            10,
        )
        self.lab.exec(host, ["sh", "-c", f"umask 077; wg genkey > /run/{device}.key"])
        port = ["listen-port", str(WIREGUARD_PORT), "private-key", f"/run/{device}.key"]
        self.lab.exec(host, ["wg", "set", device, *port])
        self.ip(host, "address", "add", f"{network}.{number}/24", "dev", device)
        self.ip(host, "link", "set", device, "mtu", str(mtu), "up")

    def ip(self, host: str, *words: str) -> None:
        self.lab.exec(host, ["ip", *words])

    @contextlib.contextmanager
    def estate_with(self, **words: str) -> Iterator[None]:
        with tempfile.TemporaryDirectory() as directory:
            wanted = variant(Path(directory) / "wanted", change(**words))
            told = ", ".join(f"{key}: {value}" for key, value in words.items())
            self.say(f"site turns {told} on between onprem and cloud")
            with self.undone(lambda: play("site", seconds=1800)):
                play("site", inventory=wanted, seconds=1800)
                yield

    @contextlib.contextmanager
    def router_knows(self) -> Iterator[None]:
        """The router leads the hosts' ranges to them, as `plan` prints it."""
        ip = ["nsenter", f"--net=/run/netns/{ROUTER}", "ip", "route"]
        nodes = [
            json.loads(self.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)["node"]
            for host in self.lab.hosts
            if host.startswith(("onprem", "cloud"))
        ]
        try:
            for node in nodes:
                subprocess.run([*ip, "replace", node["range4"], "via", node["underlay4"]], check=True)
            yield
        finally:
            for node in nodes:
                subprocess.run([*ip, "delete", node["range4"]], check=False, stderr=subprocess.DEVNULL)

    def tunnel(self) -> None:
        self.measure("tunnel", ("vxlan", "plain VXLAN"), BARE)

    def wireguard(self) -> None:
        with self.estate_with(encryption="wireguard"):
            self.measure("tunnel inside WireGuard", ("both", "plain VXLAN in wireguard-go"), PLAIN_WIREGUARD)

    def native_in_wireguard(self) -> None:
        with self.estate_with(encryption="wireguard", routing="native"):
            self.measure("native inside WireGuard", PLAIN_WIREGUARD, BARE)

    def native(self) -> None:
        with self.router_knows(), self.estate_with(routing="native"):
            self.measure("native", BARE)

    def gateways(self) -> None:
        """The tunnel carries all between the two hosts, so that the bare network is measured before it."""
        bulk, turns = self.figures({"bare": str(self.lab.hosts[TO].address)})
        with tempfile.TemporaryDirectory() as directory:
            on, off = (Path(directory) / name for name in ("on", "off"))
            variant(off, with_gateways)

            def encrypted(estate: dict[str, Any], groups: Any) -> None:
                with_gateways(estate, groups)
                change(encryption="ipsec-gateway")(estate, groups)

            variant(on, encrypted)
            self.say("site leads onprem and cloud to their gateways")
            with (
                self.undone(lambda: play("site", seconds=1800)),
                self.undone(lambda: play("site", inventory=off, seconds=1800)),
            ):
                play("site", inventory=on, seconds=1800)
                found = self.figures({"mesh": self.target()})
                took = self.take_over()
        self.row("gateways, take-over when the first is off", took, TAKEN_OVER, "s", "the promised figure")
        self.row("gateways, bulk", found[0]["mesh"], bulk["bare"], "Mbit/s", "the bare network")
        self.row("gateways, there and back", found[1]["mesh"], turns["bare"], "us", "the bare network")

    def take_over(self) -> float:
        """Seconds until packets pass again after the plug of the gateway that is used was pulled."""
        first = GATEWAYS["onprem"][0]
        ping = ["ping", "-q", "-c", "1", "-W", "1", str(self.lab.hosts[TO].address)]
        with self.undone(lambda: self.lab.power_on(first)):
            began = time.monotonic()
            self.lab.power_off(first)
            self.until("the second gateway is used", lambda: self.uses(SECOND))
            self.until("packets pass", lambda: self.lab.exec(FROM, ping, check=False).returncode == 0, 3 * TAKEN_OVER)
            took = time.monotonic() - began
        self.until("the first gateway is used again", lambda: self.uses(first))
        return took

    def uses(self, gateway: str) -> bool:
        """Whether packets go over this gateway of the site."""
        told = self.ask(FROM, "status")["gateways"]["gateways"]
        return any((one["host"], one["state"]) == (gateway, "used") for one in told)

    STEPS = ("tunnel", "native", "wireguard", "native_in_wireguard", "gateways")


if __name__ == "__main__":
    sys.exit(measure(Paths(Lab())))
