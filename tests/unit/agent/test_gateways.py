# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a host leads packets to sites that are behind gateways, and how large they are. Pure."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import agent_mesh as mesh
import pytest
from isthmus_agent.desired.compute import Desired, HostFacts, desired
from isthmus_agent.desired.datapath import Route, Rule
from isthmus_agent.desired.reach import Reachability

NETWORK = ip_network("198.18.2.0/24")
VIA = "198.18.1.12"


def computed(stage: str, underlay: int = 1500, **section: Any) -> Desired:
    """On a host of onprem, of whose site the gateway is another host, towards cloud at a stage."""
    spec = mesh.spec(
        ipsec={
            "sites": {"onprem": "onprem", "cloud": "cloud", "edge": "edge"},
            "networks": ["198.18.1.0/24"],
            "far": {"cloud": {"stage": stage, "networks": [str(NETWORK)]}},
            "via": VIA,
            **section,
        }
    )
    state = mesh.state(mesh.documents({}, sizes={"onprem": 2, "cloud": 1, "edge": 1}))
    return desired(spec, state, Reachability({}, frozenset()), HostFacts(underlay_mtu=underlay))


@pytest.mark.parametrize(("stage", "leads"), [("accepts", False), ("sends", True), ("demands", True)])
def test_from_the_second_step_on_the_other_sites_networks_are_behind_the_gateway(stage: str, leads: bool) -> None:
    datapath = computed(stage).datapath
    way = Route(NETWORK, mtu=1400, table=736, toward=ip_address(VIA))
    assert ({route for route in datapath.routes if route.table == 736} == {way}) is leads
    assert Rule(ip_network("0.0.0.0/0"), 736, 736) in datapath.rules


def test_on_the_gateway_itself_strongswan_leads_and_not_the_agent() -> None:
    datapath = computed("demands", via=None).datapath
    assert not [route for route in datapath.routes if route.table == 736]
    assert {rule.table for rule in datapath.rules} == {730}


@pytest.mark.parametrize(("underlay", "mtu"), [(1500, 1350), (9000, 1350), (1400, 1250)])
def test_packets_to_the_other_site_are_smaller_from_the_first_step_on(underlay: int, mtu: int) -> None:
    for stage in ("accepts", "demands"):
        sizes = {str(one.prefix): one.mtu for one in computed(stage, underlay).datapath.routes if one.table == 254}
        assert sizes["10.102.0.0/28"] == mtu
        assert sizes["10.103.0.0/28"] == min(underlay, 1500) - 50, "of a site without a tunnel"


def test_nothing_is_there_without_gateways() -> None:
    state = mesh.state(mesh.documents({}, sizes={"onprem": 2, "cloud": 1, "edge": 1}))
    found = desired(mesh.spec(), state, Reachability({}, frozenset()), HostFacts()).datapath
    assert {rule.table for rule in found.rules} == {730}
    assert not [route for route in found.routes if route.toward is not None]
