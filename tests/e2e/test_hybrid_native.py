# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's Kubernetes cluster native inside WireGuard with every other site, and in clear with one of them over a
router with static routes, and among its own hosts: on, pods and machines both ways, what is on the wire, and off again,
while customers on machines and in a pod notice nothing."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import yaml
from demo import EDGE, ONPREM_CLIENT
from demo_hybrid import CLIENT
from e2e.test_native import AT_ONCE, router, ways
from e2e.test_wireguard import capture, states
from hybrid_tools import MACHINE, Hybrid, machine_service_in_pods_and_at_a_node_port
from isthmus_lab import ROUTER
from kubernetes_lab import HYBRID
from playbook import INVENTORY, play
from router_capture import packets

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

COUNT = 50  # requests of each kind
MTU = 1420  # 1500, less 80 of WireGuard


def inside(place: Path) -> Path:
    """The lab's inventory with the cluster, whose pairs are native inside WireGuard; the machines' are as they were."""
    return _with_pairs(place, lambda sites: ("kube", *sites), {"routing": "native", "encryption": "wireguard"})


def in_clear_with_onprem(place: Path, routing: str = "native") -> Path:
    """The same, native in clear with onprem and among the cluster's own hosts, and in the tunnel with the others."""
    return _with_pairs(place, lambda _sites: ("kube", "onprem"), {"routing": routing})


def _with_pairs(place: Path, chosen: Callable[[Iterable[str]], Iterable[str]], how: dict[str, str]) -> Path:
    shutil.copytree(INVENTORY, place / "lab")
    file = place / "lab" / "group_vars" / "all.yml"
    variables = yaml.safe_load(file.read_text())
    estate = variables["isthmus_estate"]
    for site in chosen(estate["sites"]):
        estate["site_pairs"].append({"sites": ["kube", site], **how})
    file.write_text(yaml.safe_dump(variables))
    return Path(shutil.copytree(HYBRID, place / "hybrid"))


@contextlib.contextmanager
def nobody_notices(hybrid: Hybrid) -> Iterator[None]:
    """Machines that ask the service by its name, and a pod that asks it by its ClusterIP."""
    estate = hybrid.estate
    with (
        estate.unnoticed(estate.edge, estate.onprem, interval=0.02),
        estate.unnoticed(hybrid.client, url=f"http://{hybrid.service_address}/", interval=0.02),
    ):
        yield


def both_ways(hybrid: Hybrid) -> None:
    """Pods and machines reach each other, and each is seen by its own address."""
    estate = hybrid.estate
    pod, machine = hybrid.pod_address(CLIENT), estate.address(MACHINE, "web")
    for url in (f"http://{machine}:8080/", hybrid.underlay_url()):
        result = hybrid.client.requests(url, COUNT)
        assert (result["answers"], set(result["peers"])) == ({f"onprem/{MACHINE}": COUNT}, {pod}), (url, result)
    for node in hybrid.nodes:
        server, url = f"{hybrid.kube.name}/web-{node}", f"http://{hybrid.pod_address(f'web-{node}')}:8080/"
        for customer, own in (
            (estate.onprem, estate.address(ONPREM_CLIENT, "client")),
            (estate.edge, estate.address(EDGE, "client")),
            (hybrid.client, pod),  # of its own node, and of the other one over the CNI's way
        ):
            result = customer.requests(url, COUNT)
            assert (result["answers"], set(result["peers"])) == ({server: COUNT}, {own}), (url, own, result)


def agents_start_anew_and_all_go_back(hybrid: Hybrid) -> None:
    """Neither the one nor the other, which is the tunnel as the lab has it, changes anything for anybody."""
    with nobody_notices(hybrid):
        for host in (hybrid.nodes[0], ONPREM_CLIENT):
            hybrid.estate.lab.exec(host, ["systemctl", "restart", "isthmusd.service"])
    with nobody_notices(hybrid):
        play("site", *AT_ONCE, inventory=HYBRID, seconds=1800)
    play("verify", inventory=HYBRID)
    for node in hybrid.nodes:
        assert set(ways(hybrid.estate, node).values()) == {"tunnel"}, node
    both_ways(hybrid)


def in_clear(hybrid: Hybrid) -> list[bytes]:
    """What headers of packets between pods and the machines that are asked look like in clear."""
    estate = hybrid.estate
    pods = [hybrid.pod_address(name) for name in (CLIENT, *(f"web-{node}" for node in hybrid.nodes))]
    machines = [
        estate.address(MACHINE, "web"),
        estate.address(ONPREM_CLIENT, "client"),
        str(estate.lab.hosts[MACHINE].address),
    ]
    return [
        b"".join(IPv4Address(str(address)).packed for address in order)
        for pair in itertools.product(pods, machines)
        for order in (pair, pair[::-1])
    ]


def test_pods_are_native_inside_wireguard_and_nobody_notices(hybrid: Hybrid, tmp_path: Path) -> None:
    estate = hybrid.estate
    wanted = inside(tmp_path / "wanted")
    shown = " ".join(play("plan", inventory=wanted).output.split())
    assert "kube and onprem: path native inside WireGuard (now being turned on), encryption wireguard" in shown
    clear, before = in_clear(hybrid), tmp_path / "before.pcap"
    with capture(before, ("kube", "onprem")):
        both_ways(hybrid)
    assert packets(before, "udp port 8472") > COUNT
    seen = before.read_bytes()
    assert len([words for words in clear if words in seen]) > 2, "this is how addresses in clear look"
    try:
        with nobody_notices(hybrid):
            play("site", *AT_ONCE, inventory=wanted, seconds=1800)
        assert play("site", inventory=wanted).changed == {}
        play("verify", inventory=wanted)
        for node in hybrid.nodes:
            assert set(ways(estate, node).values()) == {"native"}, node
            assert set(states(estate, node).values()) <= {"encrypted", "idle"}, node
            route = estate.lab.exec(node, ["ip", "route", "get", str(estate.address(MACHINE, "web"))]).stdout
            assert "dev isthmus-wg0" in route, route
            assert f"mtu {MTU}" in route, route
        there = ways(estate, EDGE)
        assert {way for host, way in there.items() if host.startswith("kube")} == {"native"}
        assert {way for host, way in there.items() if not host.startswith("kube")} == {"tunnel"}
        file = tmp_path / "wire.pcap"
        with capture(file, ("kube", "onprem")):
            both_ways(hybrid)
        assert packets(file, "udp port 8472") == 0, "nothing through the tunnel"
        assert packets(file, "udp port 51871") > COUNT
        seen = file.read_bytes()
        assert [words for words in clear if words in seen] == [], "addresses of pods and machines in clear"
        machine_service_in_pods_and_at_a_node_port(hybrid)
        agents_start_anew_and_all_go_back(hybrid)
        for node in hybrid.nodes:
            assert set(states(estate, node).values()) == {"plain"}, node
    finally:
        play("site", *AT_ONCE, inventory=HYBRID, seconds=1800)
    hybrid.everywhere(hybrid.members, (EDGE, *hybrid.nodes))


@contextlib.contextmanager
def routes_of(shown: str) -> Iterator[Callable[[str], None]]:
    """Adds to the router those routes of a plan whose words have a text in them; nothing of it is left."""
    told = re.findall(r"routers of \w+: (\S+) via (\S+) \(([^)]*)", shown)
    added: list[str] = []

    def add(words: str) -> None:
        for network, address, why in told:
            if words in why:
                router("add", network, "via", address)
                added.append(network)
        assert added, told

    try:
        yield add
    finally:
        for network in added:
            subprocess.run(
                ["nsenter", f"--net=/run/netns/{ROUTER}", "ip", "route", "del", network], capture_output=True
            )


def test_pods_are_native_in_clear_over_a_router_and_nobody_notices(hybrid: Hybrid, tmp_path: Path) -> None:
    estate = hybrid.estate
    wanted = in_clear_with_onprem(tmp_path / "wanted")
    shown = " ".join(play("plan", inventory=wanted).output.split())
    assert "kube and onprem: path native (now being turned on), encryption none" in shown
    for node in hybrid.nodes:
        pods = ".".join(hybrid.pod_address(f"web-{node}").split(".")[:3])
        assert f"routers of kube: {pods}.0/24 via {estate.lab.hosts[node].address} (pods on {node}" in shown
    assert "routers of onprem: 10.244.0.0/16 over the way to" in shown
    tunnel = "udp port 8472 and net 198.18.1.0/24 and net 198.18.4.0/24"
    natively = "(net 10.244.0.0/16 and net 10.101.0.0/16)"
    with routes_of(shown) as add:
        try:
            # The router knows the hosts' ranges and not the pods': nothing is sent there, and the run says why.
            add("workloads of")
            with nobody_notices(hybrid):
                run = play("site", *AT_ONCE, inventory=wanted, seconds=1800, check=False)
            told = " ".join(run.output.split())
            assert re.search(r"pods on kube-\d of cluster kube \([0-9., ]+\) are not reached natively", told)
            assert "tunnel" in ways(estate, ONPREM_CLIENT).values()
            # Hosts that are to find out stay in the tunnel then, and are native when the router knows all.
            tried = in_clear_with_onprem(tmp_path / "tried", "auto")
            told = " ".join(play("site", *AT_ONCE, inventory=tried, seconds=1800).output.split())
            assert re.search(
                r"kube and onprem: tunnel \(routing: auto\), as \S+ does not reach kube-\d natively: pods on it", told
            )
            assert set(ways(estate, ONPREM_CLIENT).values()) == {"tunnel"}
            add("pods on")
            with nobody_notices(hybrid):
                play("site", *AT_ONCE, "-e", "isthmus_try_native=true", inventory=tried, seconds=1800)
            # What was found is demanded now: only the hash of the inventory in the record differs.
            assert "being turned" not in play("plan", inventory=wanted).output
            play("site", inventory=wanted)
            assert play("site", inventory=wanted).changed == {}
            play("verify", inventory=wanted)
            for node in hybrid.nodes:
                there = ways(estate, node)
                assert {way for host, way in there.items() if host.startswith(("kube", "onprem"))} == {"native"}, node
                assert {way for host, way in there.items() if not host.startswith(("kube", "onprem"))} == {"tunnel"}
            file = tmp_path / "wire.pcap"
            with capture(file, ("kube", "onprem"), also=natively):
                both_ways(hybrid)
            assert packets(file, tunnel) == 0, "nothing through the tunnel"
            assert packets(file, natively) > COUNT
            machine_service_in_pods_and_at_a_node_port(hybrid)
            agents_start_anew_and_all_go_back(hybrid)
        finally:
            play("site", *AT_ONCE, inventory=HYBRID, seconds=1800)
    hybrid.everywhere(hybrid.members, (EDGE, *hybrid.nodes))
