# SPDX-License-Identifier: GPL-3.0-or-later
"""Native routing of the running estate, inside a site and between two over a router with static routes: on, off, a
router that lacks a route, and pairs of sites that find out by themselves. What is on the wire is looked at in the
router's namespace."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import ONPREM_CLIENT
from e2e.test_wireguard import capture, states
from estate_tools import Estate
from installation import variant
from isthmus_lab import ROUTER
from playbook import play
from router_capture import packets

AT_ONCE = ("-e", "isthmus_serial=100%")

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]


def native(estate: dict[str, Any], _: Any) -> None:
    for pair in estate["site_pairs"]:
        if set(pair["sites"]) == {"cloud", "onprem"}:
            pair["routing"] = "native"
    estate["site_pairs"].append({"sites": ["onprem", "onprem"], "routing": "native"})


def router(*words: str) -> None:
    subprocess.run(["nsenter", f"--net=/run/netns/{ROUTER}", "ip", "route", *words], check=True)


@pytest.fixture
def routes(estate: Estate) -> Iterator[list[tuple[str, str]]]:
    """Range and address of each host of the two sites, as the plan prints them for routers; nothing of it is left."""
    found = []
    for host in estate.lab.hosts:
        if host.startswith(("onprem", "cloud")):
            node = json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)["node"]
            found.append((node["range4"], node["underlay4"]))
    yield found
    for network, _ in found:
        subprocess.run(["nsenter", f"--net=/run/netns/{ROUTER}", "ip", "route", "del", network], capture_output=True)


def ways(estate: Estate, host: str) -> dict[str, str]:
    """How packets of a host go to each other one, by name."""
    nodes = estate.ask(host, "status")["nodes"]
    return {node["name"]: node["routing"]["way"] for node in nodes if node["probe"] != "this host"}


def test_native_goes_on_and_off_and_nobody_notices(
    estate: Estate, tmp_path: Path, routes: list[tuple[str, str]]
) -> None:
    estate.converged()
    wanted = variant(tmp_path / "wanted", native)
    shown = " ".join(play("plan", inventory=wanted).output.split())
    assert "native routing of cloud and onprem is turned on, in steps of one run" in shown
    for network, address in routes:
        assert f"{network} via {address}" in shown
    try:
        # The router does not know the ranges yet: nothing is sent there, and the run says why.
        with estate.unnoticed(estate.onprem):
            run = play("site", *AT_ONCE, inventory=wanted, seconds=1800, check=False)
        told = " ".join(run.output.split())
        assert "did not prove that they reach the others the new way" in told
        assert set(ways(estate, ONPREM_CLIENT).values()) == {"tunnel"}
        for network, address in routes:
            router("add", network, "via", address)
        with estate.unnoticed(estate.onprem):
            play("site", inventory=wanted, seconds=1800)
        assert play("site", inventory=wanted).changed == {}
        play("verify", inventory=wanted)
        there = ways(estate, ONPREM_CLIENT)
        assert {there[host] for host in there if not host.startswith("edge")} == {"native"}
        assert there["edge-1"] == "tunnel"
        file = tmp_path / "wire.pcap"
        with capture(file, ("onprem", "cloud")), estate.unnoticed(estate.onprem):
            pass
        assert packets(file, "udp port 8472") == 0
        with estate.unnoticed(estate.onprem):
            play("site", *AT_ONCE, seconds=1800)
        play("verify")
        assert set(ways(estate, ONPREM_CLIENT).values()) == {"tunnel"}
    finally:
        play("site", *AT_ONCE, seconds=1800)
    estate.converged()


def auto(estate: dict[str, Any], _: Any) -> None:
    """Two pairs: with routes of the router, and without."""
    for pair in estate["site_pairs"]:
        if "cloud" in pair["sites"]:
            pair["routing"] = "auto"


def auto_inside(estate: dict[str, Any], groups: Any) -> None:
    """The pair without routes is encrypted, so that it needs none."""
    auto(estate, groups)
    for pair in estate["site_pairs"]:
        if set(pair["sites"]) == {"cloud", "edge"}:
            pair["encryption"] = "wireguard"


def test_pairs_find_out_which_way_works_and_nobody_notices(
    estate: Estate, tmp_path: Path, routes: list[tuple[str, str]]
) -> None:
    """The router has routes to the ranges of onprem and cloud, and none to that of edge."""
    estate.converged()
    wanted = variant(tmp_path / "wanted", auto)
    shown = " ".join(play("plan", inventory=wanted).output.split())
    assert "(auto: the next run of isthmus.mesh.site tries native)" in shown
    for network, address in routes:
        router("add", network, "via", address)
    try:
        with estate.unnoticed(estate.onprem):
            run = play("site", *AT_ONCE, inventory=wanted, seconds=1800)
        told = " ".join(run.output.split())
        assert "cloud and onprem: native (routing: auto), as every host has proven" in told
        assert re.search(r"cloud and edge: tunnel \(routing: auto\), as [\w-]+ does not reach [\w-]+ natively", told)
        there = ways(estate, "cloud-1")
        assert {there[host] for host in there if host.startswith("onprem")} == {"native"}
        assert (there["edge-1"], ways(estate, "edge-1")["cloud-1"]) == ("tunnel", "tunnel")
        assert play("site", inventory=wanted).changed == {}
        play("verify", inventory=wanted)
        # A router forgets a range: verify names its host, and the next run of site does without.
        network, address = routes[0]
        router("del", network)
        assert "is not reached natively" in play("verify", inventory=wanted, check=False).output
        told = " ".join(play("site", *AT_ONCE, inventory=wanted, seconds=1800).output.split())
        assert "cloud and onprem: tunnel (routing: auto), as" in told
        assert set(ways(estate, "cloud-1").values()) == {"tunnel"}
        play("verify", inventory=wanted)
        router("add", network, "via", address)
        assert play("site", inventory=wanted).changed == {}, "nobody asked for another try"
        play("site", *AT_ONCE, "-e", "isthmus_try_native=true", inventory=wanted, seconds=1800)
        assert ways(estate, "onprem-1")["cloud-1"] == "native"
        # What failed for want of a route is tried inside WireGuard, in the run that turns that on.
        inside = variant(tmp_path / "inside", auto_inside)
        with estate.unnoticed(estate.onprem, estate.edge):
            told = " ".join(play("site", *AT_ONCE, inventory=inside, seconds=1800).output.split())
        assert "cloud and edge: native inside WireGuard (routing: auto), as every host has proven" in told
        assert (ways(estate, "edge-1")["cloud-1"], states(estate, "edge-1")["cloud-1"]) == ("native", "encrypted")
        assert play("site", inventory=inside).changed == {}
        play("verify", inventory=inside)
    finally:
        play("site", *AT_ONCE, seconds=1800)
    estate.converged()
