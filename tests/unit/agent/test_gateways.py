# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a host leads packets to sites that are behind gateways, and how large they are. Pure."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address, ip_network
from typing import Any

import agent_mesh as mesh
import pytest
from isthmus_agent.agent.tunnels import Tunnels, given_up, passing
from isthmus_agent.desired.addressing import passed_over
from isthmus_agent.desired.compute import Desired, HostFacts, desired
from isthmus_agent.desired.datapath import Network, Route, Rule
from isthmus_agent.desired.reach import ProbeTable, Reachability, choose_targets
from isthmus_mesh.spec import ipsec_of

NETWORK = ip_network("198.18.2.0/24")
VIA = "198.18.1.12"


def section_of(stage: str = "demands", **section: Any) -> dict[str, Any]:
    return {
        "sites": {"onprem": "onprem", "cloud": "cloud", "edge": "edge"},
        "networks": ["198.18.1.0/24"],
        "far": {"cloud": {"stage": stage, "networks": [str(NETWORK)]}},
        "via": VIA,
        **section,
    }


def computed(
    stage: str,
    underlay: int = 1500,
    reach: Reachability = Reachability(),  # noqa: B008 - it is frozen
    passes: frozenset[str] | None = None,
    **section: Any,
) -> Desired:
    """On a host of onprem, of whose site the gateway is another host, towards cloud at a stage."""
    spec = mesh.spec(ipsec=section_of(stage, **section))
    state = mesh.state(mesh.documents({}, sizes={"onprem": 2, "cloud": 1, "edge": 1}))
    return desired(spec, state, reach, HostFacts(underlay_mtu=underlay, passes=passes))


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


FIRST, SECOND = ("onprem", "onprem-2"), ("onprem", "onprem-3")
ADDRESSES = {FIRST: "198.18.1.12", SECOND: "198.18.1.13"}
BOTH = [{"cluster": cluster, "host": host, "underlay": ADDRESSES[cluster, host]} for cluster, host in ADDRESSES]


def led(reach: Reachability, passes: frozenset[str] | None = None, **section: Any) -> dict[int, str]:
    """Where the other site's network leads to, by table, with two gateways."""
    found = computed("demands", reach=reach, passes=passes, gateways=BOTH, **section).datapath
    tables = {route.table: route for route in found.routes if route.prefix == NETWORK}
    return {table: "nowhere" if route.sunk else str(route.toward) for table, route in tables.items()}


def test_of_two_gateways_the_first_that_answers_is_used_and_with_neither_nothing_leaves() -> None:
    assert led(Reachability()) == {736: "198.18.1.12"}, "nothing is known yet"
    assert led(Reachability(down=frozenset({FIRST}), unsteady=frozenset({FIRST}))) == {736: "198.18.1.13"}
    assert led(Reachability(up=frozenset({FIRST}), unsteady=frozenset({FIRST}))) == {736: "198.18.1.13"}, "just back"
    assert led(Reachability(unsteady=frozenset({FIRST, SECOND}))) == {736: "198.18.1.12"}
    both = frozenset({FIRST, SECOND})
    assert led(Reachability(down=both, unsteady=both)) == {736: "nowhere"}
    alone = computed("demands", reach=Reachability(down=both)).datapath
    assert [str(route.toward) for route in alone.routes if route.table == 736] == [VIA], "there is no other"


@pytest.mark.parametrize(("local", "other", "own"), [(FIRST, SECOND, False), (SECOND, FIRST, True)])
def test_a_gateway_leads_over_the_other_where_nothing_passes_its_own_tunnels(
    local: tuple[str, str], other: tuple[str, str], own: bool
) -> None:
    gateway = {"via": None, "local": ADDRESSES[local], "connections": []}
    passing, over = frozenset({"cloud"}), ADDRESSES[other]
    assert led(Reachability(), passing, **gateway) == {738: over}, "only when strongSwan has no route"
    assert led(Reachability(), None, **gateway) == {738: over}
    assert led(Reachability(), frozenset(), **gateway) == {736: over, 738: over}
    assert led(Reachability(down=frozenset({other})), frozenset(), **gateway) == {}, "netfilter drops and counts it"
    everywhere = ip_network("0.0.0.0/0")
    rules = computed("demands", gateways=BOTH, **gateway).datapath.rules
    assert rules - computed("demands", via=None).datapath.rules == {
        Rule(everywhere, 254, 734, mark=0x53),
        Rule(everywhere, 736, 736, own=own),
        Rule(everywhere, 738, 738, own=own),
    }, "the second one passes nothing on: it would go back and forth"


def test_a_new_agent_doubts_gateways_and_tunnels_that_an_earlier_one_went_around() -> None:
    spec = mesh.spec(ipsec=section_of(gateways=BOTH)).ipsec
    assert spec is not None
    first, second = (ip_address(one) for one in ADDRESSES.values())
    for used, doubted in (([second], [FIRST]), ([first], []), ([], []), ([ip_address("198.18.1.99")], [])):
        assert passed_over(spec, used) == doubted
    table = ProbeTable()
    table.doubt(FIRST, up=True)
    table.retarget([FIRST, SECOND])
    assert (table.view().unsteady, table.view().down) == ({FIRST}, frozenset())
    assert led(table.view()) == {736: str(second)}
    for number in range(10):
        assert led(table.view()) == {736: str(second)}
        table.record(FIRST, 0.001, float(number))
    assert led(table.view()) == {736: str(first)}, "it has answered for a while"

    connections = [{"site": "cloud", "inside": "198.18.2.11"}]
    gateway = section_of(gateways=BOTH, via=None, local=ADDRESSES[FIRST], connections=connections)
    own = mesh.spec(ipsec=gateway).ipsec
    assert own is not None
    for around, there in (([NETWORK], frozenset()), ([], {"cloud"})):
        tunnels = Tunnels(own, first, routed_there, lambda: None)
        tunnels.doubt(around)
        asyncio.run(tunnels.look())
        assert tunnels.passes == there
    tunnels.doubt([NETWORK])
    turned = []
    for number in range(2):
        tunnels.prober.table.record(("cloud", "198.18.2.11"), 0.001, float(number))
        asyncio.run(tunnels.look())
        turned.append(tunnels.passes)
    assert turned == [frozenset(), {"cloud"}]


async def routed_there() -> frozenset[Network]:
    return frozenset({NETWORK})


def test_before_hosts_send_through_gateways_one_does_not_lead_over_the_other() -> None:
    gateway = {"via": None, "local": ADDRESSES[FIRST], "connections": [], "gateways": BOTH}
    found = computed("accepts", passes=frozenset(), **gateway).datapath
    assert not [route for route in found.routes if route.table in (736, 738)]


def test_gateways_are_probed_before_others() -> None:
    own = ("onprem", "onprem-1")
    addresses = {("onprem", f"onprem-{number}"): ip_address(f"10.101.0.{number}") for number in range(1, 100)}
    targets = choose_targets(own, addresses, addresses, limit=8, gateways=[SECOND, FIRST, own])
    assert {FIRST, SECOND} <= {target.node for target in targets}
    assert len(targets) == 8
    assert own not in {target.node for target in targets}


def test_a_node_that_was_down_is_steady_after_it_has_answered_for_a_while() -> None:
    table = ProbeTable()
    table.retarget([FIRST])
    for _ in range(3):
        table.record(FIRST, None, 1.0)
    assert table.view().down == table.view().unsteady == {FIRST}
    turned = [table.record(FIRST, 0.001, float(number)) for number in range(10)]
    assert [number for number, news in enumerate(turned, 1) if news] == [1, 2, 10]
    assert table.view().unsteady == frozenset()
    table.record(FIRST, None, 20.0)
    assert table.view().unsteady == frozenset(), "one miss says nothing"


SAS = """\
isthmus-cloud: #1, ESTABLISHED, IKEv2, 6fc8cad4fa3dd771_i 68a0fe899f38d738_r*
  net: #1, reqid 1, INSTALLED, TUNNEL-in-UDP, ESP:AES_GCM_16-256
isthmus-cloud_2: #4, ESTABLISHED, IKEv2, 2d3560e7ed90a17d_i* 02c2c67b897ce6d5_r
isthmus-hall: #5, CONNECTING, IKEv2, 2d3560e7ed90a17e_i* 0000000000000000_r
"""


def test_a_tunnel_that_strongswan_gave_up_is_asked_for_again_and_one_that_it_is_making_is_not() -> None:
    names = ["isthmus-cloud", "isthmus-cloud_2", "isthmus-hall", "isthmus-edge"]
    assert given_up(SAS, names) == ["isthmus-cloud_2", "isthmus-edge"]
    assert given_up("", names) == names
    assert given_up(SAS, []) == []


def test_packets_pass_where_strongswan_leads_and_one_of_our_gateways_answers() -> None:
    document = {
        "sites": {}, "networks": ["198.18.1.0/24"], "local": "198.18.1.12",
        "far": {
            "cloud": {"stage": "demands", "networks": ["198.18.2.0/24", "198.18.5.0/24"]},
            "office": {"stage": "demands", "networks": ["198.18.3.0/24"]},
        },
        "connections": [
            {"site": "cloud", "inside": "198.18.2.11", "begins": False},
            {"site": "cloud", "inside": "198.18.2.12", "begins": True, "number": 2},
            {"site": "office", "begins": True},
        ],
    }  # fmt: skip
    own = ipsec_of(document)
    assert own.begins == ("isthmus-cloud_2", "isthmus-office")
    routed = frozenset(map(ip_network, ("198.18.2.0/24", "198.18.5.0/24", "198.18.3.0/24")))
    table = ProbeTable()
    first, second = (("cloud", f"198.18.2.{last}") for last in (11, 12))
    table.retarget([first, second])
    assert passing(own, routed, table) == {"cloud", "office"}
    assert passing(own, routed - {ip_network("198.18.5.0/24")}, table) == {"office"}
    for _ in range(3):
        table.record(first, None, 1.0)
    assert passing(own, routed, table) == {"cloud", "office"}
    for _ in range(3):
        table.record(second, None, 1.0)
    assert passing(own, routed, table) == {"office"}, "the tunnel is there, and its other end is not"
