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
from isthmus_lab import ROUTER
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

AS = {"onprem": 65101, "cloud": 65102}
PASSWORD = "of-the-lab"  # noqa: S105
# What the plan says in words, as an engineer may write it: hosts of these AS, whatever their address.
CONF = f"""\
router bgp 65000
 bgp router-id 198.18.0.1
 no bgp default ipv4-unicast
 neighbor hosts peer-group
 neighbor hosts remote-as external
 neighbor hosts password {PASSWORD}
 neighbor hosts bfd
 bgp listen range 198.18.1.0/24 peer-group hosts
 bgp listen range 198.18.2.0/24 peer-group hosts
 address-family ipv4 unicast
  neighbor hosts activate
  neighbor hosts prefix-list ranges in
  neighbor hosts prefix-list ranges out
 exit-address-family
exit
ip prefix-list ranges seq 5 permit 10.96.0.0/11 ge 28 le 28
"""


def inventory(place: Path, numbers: dict[str, int]) -> Path:
    """The lab's, with BGP in two sites; `numbers` are the AS numbers that the router is believed to have."""

    def change(estate: dict[str, Any], groups: Any) -> None:
        native(estate, groups)
        for number, site in enumerate(("onprem", "cloud"), 1):
            router = {"address": f"198.18.{number}.1", "as_number": numbers[site], "bfd": True}
            estate["sites"][site]["bgp"] = {"as_number": AS[site], "routers": [router]}

    variant(place, change)
    for number, site in enumerate(("onprem", "cloud"), 1):
        passwords = {"isthmus_bgp_passwords": {f"198.18.{number}.1": PASSWORD}}
        (place / "group_vars" / f"{site}.yml").write_text(json.dumps(passwords))
    return place


@pytest.fixture
def router(estate: Estate) -> Iterator[Machine]:
    """FRR of the router; its routes go with it."""
    machine = Machine("router", estate.lab.state / "frr", ROUTER)
    try:
        machine.frr(CONF, "bgpd", "bfdd")
        yield machine
    finally:
        machine.end()


def hosts(estate: Estate) -> list[str]:
    return [host for host in estate.lab.hosts if host.startswith(("onprem", "cloud"))]


def learnt(machine: Machine) -> dict[str, str]:
    """The router's routes by BGP."""
    return {
        one["dst"]: one["gateway"] for one in json.loads(machine.run("ip", "-j", "-4", "route", "show", "proto", "bgp"))
    }


def test_a_pair_of_sites_is_native_by_bgp(estate: Estate, router: Machine, tmp_path: Path) -> None:
    estate.converged()
    wrong = inventory(tmp_path / "wrong", {"onprem": 65009, "cloud": 65000})
    wanted = inventory(tmp_path / "wanted", {"onprem": 65000, "cloud": 65000})
    ranges = {}
    for host in hosts(estate):
        node = json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)["node"]
        ranges[node["range4"]] = node["underlay4"]
    try:
        with estate.unnoticed(estate.onprem):
            refused = play("site", *AT_ONCE, inventory=wrong, seconds=1200, check=False)
        assert refused.status == 2
        told = " ".join(refused.output.split())
        assert "router 198.18.1.1: the router has another AS number than 65009" in told
        assert set(ways(estate, ONPREM_CLIENT).values()) == {"tunnel"}
        with estate.unnoticed(estate.onprem):
            done = play("site", *AT_ONCE, inventory=wanted, seconds=1200)
        assert PASSWORD not in done.output + refused.output
        assert learnt(router) == ranges
        there = ways(estate, ONPREM_CLIENT)
        assert {there[host] for host in there if not host.startswith("edge")} == {"native"}
        for host in hosts(estate):
            assert estate.lab.exec(host, ["ip", "route", "show", "proto", "bgp"]).stdout == ""
        assert play("site", *AT_ONCE, inventory=wanted).changed == {}
        play("verify", inventory=wanted)

        estate.lab.exec("onprem-2", ["systemctl", "stop", "frr.service"])
        estate.until("the router has no way to onprem-2", lambda: len(learnt(router)) == len(ranges) - 1, 30)
        silent = play("verify", inventory=wanted, check=False)
        assert "no session with router 198.18.1.1: bgpd does not answer" in silent.problems("onprem-2"), silent.output
        play("site", *AT_ONCE, inventory=wanted, seconds=1200)
        assert learnt(router) == ranges

        off = play("site", *AT_ONCE, "-e", "isthmus_prune=bgp/onprem,bgp/cloud", seconds=1200)
        assert off.status == 0
        assert set(ways(estate, ONPREM_CLIENT).values()) == {"tunnel"}
        estate.until("the router has no way to any host", lambda: not learnt(router), 10)
        for host in hosts(estate):
            assert estate.unit_state(host, "frr") == "inactive"
        play("verify")
    finally:
        play("site", *AT_ONCE, "-e", "isthmus_prune=bgp/onprem,bgp/cloud", seconds=1200)
    estate.converged()
