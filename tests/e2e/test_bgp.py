# SPDX-License-Identifier: GPL-3.0-or-later
"""Native routing between two sites whose router knows the hosts' ranges by BGP only: FRR on the lab's machines, and a
real FRR in the namespace of the lab's router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import ONPREM_CLIENT
from e2e.test_native import AT_ONCE, native, ways
from estate_tools import Estate
from frr_machines import Machine
from installation import variant
from lab_router import AS, PASSWORD, ROUTER_AS, router_with_bgp
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

PRUNED = ("-e", "isthmus_prune=bgp/onprem,bgp/cloud")


def inventory(place: Path, onprem: int = ROUTER_AS, bfd: bool = False) -> Path:
    """The lab's, with BGP in two sites; `onprem` is the AS number that its router is said to have there, `bfd` whether
    its hosts watch the session."""

    def change(estate: dict[str, Any], groups: Any) -> None:
        native(estate, groups)
        for number, (site, as_number, watched) in enumerate((("onprem", onprem, bfd), ("cloud", ROUTER_AS, False)), 1):
            router = {"address": f"198.18.{number}.1", "as_number": as_number, "bfd": watched}
            estate["sites"][site]["bgp"] = {"as_number": AS[site], "routers": [router]}
            groups[site]["vars"]["isthmus_bgp_passwords"] = {router["address"]: PASSWORD}

    return variant(place, change)


@pytest.fixture
def router(estate: Estate) -> Iterator[Machine]:
    with router_with_bgp(estate.lab) as machine:
        yield machine


def learnt(machine: Machine) -> dict[str, str]:
    """The router's routes by BGP."""
    return {
        one["dst"]: one["gateway"] for one in json.loads(machine.run("ip", "-j", "-4", "route", "show", "proto", "bgp"))
    }


def sessions(machine: Machine) -> set[str]:
    """Neighbours of the router with which it has a session."""
    found = machine.show("bgp neighbors")
    return {address for address, one in found.items() if one.get("bgpState") == "Established"}


def test_a_pair_of_sites_is_native_by_bgp(estate: Estate, router: Machine, tmp_path: Path) -> None:
    hosts = [host.name for host in estate.lab.hosts.values() if host.site in AS]
    nodes = [json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)["node"] for host in hosts]
    ranges = {node["range4"]: node["underlay4"] for node in nodes}
    wanted = inventory(tmp_path / "wanted")
    estate.converged()
    try:
        # What the router is, is not what the inventory says: that ends the run before anything is sent natively.
        with estate.unnoticed(estate.onprem):
            refused = play("site", *AT_ONCE, inventory=inventory(tmp_path / "wrong", onprem=65009), check=False)
        told = " ".join(refused.output.split())
        assert refused.status == 2, refused.output
        assert "router 198.18.1.1: the router has another AS number than 65009" in told, refused.output
        assert set(ways(estate, ONPREM_CLIENT).values()) == {"tunnel"}

        with estate.unnoticed(estate.onprem):
            done = play("site", *AT_ONCE, inventory=wanted, seconds=1800)
        assert PASSWORD not in refused.output + done.output
        assert (learnt(router), sessions(router)) == (ranges, set(ranges.values()))
        there = ways(estate, ONPREM_CLIENT)
        assert {there[host] for host in hosts if host != ONPREM_CLIENT} == {"native"}
        for host in hosts:
            assert estate.lab.exec(host, ["ip", "route", "show", "proto", "bgp"]).stdout == "", host
        again = play("site", *AT_ONCE, inventory=wanted)
        assert again.changed == {}, again.output

        # Without BFD nothing tells a router that FRR restarts but FRR itself.
        with estate.unnoticed(estate.onprem):
            for host in hosts:
                estate.lab.exec(host, ["systemctl", "restart", "frr.service"])
            estate.until("every session is back", lambda: sessions(router) == set(ranges.values()), 60)
        assert learnt(router) == ranges

        estate.lab.exec("onprem-2", ["systemctl", "stop", "frr.service"])
        silent = play("verify", inventory=wanted, check=False)
        assert "no session with router 198.18.1.1: bgpd does not answer" in silent.problems("onprem-2"), silent.output
        assert {name for name, recap in silent.hosts.items() if recap.failed} == {"onprem-2"}, silent.output

        watched = [node["underlay4"] for node in nodes if node["underlay4"].startswith("198.18.1.")]
        words = ["conf t", f"router bgp {ROUTER_AS}", *(f"neighbor {address} bfd" for address in watched)]
        router.run("vtysh", *(word for line in words for word in ("-c", line)))
        play("site", *AT_ONCE, inventory=inventory(tmp_path / "watched", bfd=True))
        for address in watched:
            estate.until(
                f"BFD between the router and {address}",
                lambda address=address: (  # type: ignore[misc]
                    router.show("bgp neighbors")[address].get("peerBfdInfo", {}).get("status") == "Up"
                ),
                30,
            )
        estate.until("the router knows every range again", lambda: learnt(router) == ranges, 30)
    finally:
        play("site", *AT_ONCE, *PRUNED, seconds=1800)
    assert set(ways(estate, ONPREM_CLIENT).values()) == {"tunnel"}
    estate.until("the router has no way to any host", lambda: not learnt(router), 15)
    assert {host: estate.unit_state(host, "frr") for host in hosts} == dict.fromkeys(hosts, "inactive")
    estate.converged()
