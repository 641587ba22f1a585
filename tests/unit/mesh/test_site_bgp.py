# SPDX-License-Identifier: GPL-3.0-or-later
"""BGP of sites in the inventory: who announces what to whom, what is refused, and FRR's configuration of a host."""

from __future__ import annotations

from typing import Any

import pytest
from isthmus_mesh import bgp
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import Plan
from isthmus_mesh.record import RecordError, merge
from unit.mesh.estates import estate, hosts, model, planned
from unit.mesh.test_site_routing import DEALT, with_nodes

ROUTER = {"address": "198.18.1.254", "as_number": 65000}
BGP = {"as_number": 65101, "routers": [ROUTER]}
CLOUD_BGP: dict[str, Any] = {"as_number": 65102, "routers": [{"address": "198.18.2.254", "as_number": 65002}]}


def changed(previous: Plan | None = None, prune: tuple[str, ...] = (), more: Any = None, **sites: Any) -> Plan:
    """The plan of a native estate whose sites have these `bgp` sections, and hosts `more` variables."""
    keys = {**estate(), "routing": "native", "sites": {"cloud": {}, "onprem": {}}}
    for site, section in sites.items():
        keys["sites"][site] = {"bgp": section}
    merged = {name: {**hosts().get(name, {}), **(more or {}).get(name, {})} for name in {**hosts(), **(more or {})}}
    return planned(model(keys, merged), previous, prune=prune)


def refused(more: Any = None, **sites: Any) -> str:
    with pytest.raises(ModelError) as caught:
        changed(more=more, **sites)
    return str(caught.value)


def test_an_estate_without_it_is_as_it_was() -> None:
    found = changed()
    assert "bgp" not in found.record["roster"]
    assert (found.bgp.hosts, found.bgp.routers, bgp.lines(found.bgp.routers)) == ({}, (), [])
    assert found.record["roster"]["hash"] == planned(model({**estate(), "routing": "native"})).record["roster"]["hash"]


def test_each_host_of_the_site_announces_its_range_and_the_plan_says_what_to_set_on_the_router() -> None:
    found = changed(
        onprem={**BGP, "routers": [{**ROUTER, "bfd": True}]}, more={"o2": {"isthmus_bgp": {"as_number": 7}}}
    )
    assert {name: own["as_number"] for name, own in found.bgp.hosts.items()} == {"o1": 65101, "o2": 7, "o3": 65101}
    assert found.bgp.hosts["o1"]["routers"] == [{**ROUTER, "bfd": True}]
    assert found.record["roster"]["bgp"] == ["onprem"]
    assert "BGP of site onprem: new, hosts announce their ranges, with BFD" in found.changes
    (line,) = bgp.lines(found.bgp.routers)
    assert line.startswith(
        "router 198.18.1.254 of onprem, AS 65000: IPv4 unicast neighbours, each with BFD (single hop): "
        "198.18.1.1 (AS 65101, o1) with 10.101.0.0/28; 198.18.1.2 (AS 7, o2) with 10.101.0.16/28; "
    )
    assert "lies in 10.101.0.0/16, 10.102.0.0/16" in line
    assert line.endswith(
        ". Open: TCP 179 here from each of them, which connect; UDP 3784 here from each, and on each of them from "
        "198.18.1.254."
    )
    specs = planned(model({**estate(), "routing": "native"})).specs
    assert found.specs == specs, "the agent has no part in it"
    again = changed(
        found, onprem={**BGP, "routers": [{**ROUTER, "bfd": True}]}, more={"o2": {"isthmus_bgp": {"as_number": 7}}}
    )
    assert (again.record, again.changes) == (found.record, ())


def test_a_change_of_bfd_restarts_frr_which_is_told() -> None:
    with_bfd = {**BGP, "routers": [{**ROUTER, "bfd": True}]}
    plain, on = changed(onprem=BGP), changed(onprem=with_bfd)
    assert "bfd" not in plain.record["roster"]
    assert changed(plain, onprem=with_bfd).changes == (
        "BGP of site onprem: hosts announce their ranges, with BFD (was hosts announce their ranges)",
        "BGP of site onprem: FRR is restarted once on its hosts, and routers keep the hosts' ranges meanwhile",
    )
    assert changed(on, onprem=BGP).changes == (
        "BGP of site onprem: hosts announce their ranges (was hosts announce their ranges, with BFD)",
        "BGP of site onprem: FRR is restarted once on its hosts, of which BFD tells routers: they have the hosts' "
        "ranges again after some 6 s",
    )
    assert changed(on, onprem={**with_bfd, "as_number": 7}).changes == ()
    left_out = changed(on)
    assert (left_out.changes, left_out.record["roster"]["bfd"]) == ((), ["onprem"]), "it stays as it is"


def test_a_rack_has_its_own_router() -> None:
    rack = {"isthmus_bgp": {"routers": [{"address": "198.18.9.1", "as_number": 65009}]}}
    found = changed(onprem=BGP, more={"o3": rack})
    assert [router["address"] for router in found.bgp.hosts["o3"]["routers"]] == ["198.18.9.1"]
    for name in ("o1", "o3"):
        of_all = found.bgp.hosts[name]["estate_routers"]
        assert of_all == ["198.18.1.254", "198.18.9.1"], "passwords of all may stand in one place"
    assert found.bgp.hosts["o3"]["as_number"] == 65101
    told = bgp.lines(found.bgp.routers)
    assert ["o3" in line for line in told] == [False, True]
    assert all(line.endswith(". Open: TCP 179 here from each of them, which connect.") for line in told), "without BFD"
    alone = {"o1": rack, "o2": rack, "o3": rack}
    assert len(bgp.lines(changed(onprem={"as_number": 65101}, more=alone).bgp.routers)) == 1


@pytest.mark.parametrize(
    ("cloud", "prune"),
    [
        ({"cloud": CLOUD_BGP}, ()),
        ({"cloud": {**CLOUD_BGP, "state": "absent"}}, ()),
        ({"cloud": {"state": "absent"}}, ()),
        ({}, ()),
        ({}, ("bgp/cloud",)),
    ],
    ids=["there", "absent", "absent without routers", "left out", "pruned"],
)
def test_passwords_of_a_site_that_goes_may_stay(cloud: Any, prune: tuple[str, ...]) -> None:
    running = changed(onprem=BGP, cloud=CLOUD_BGP)
    passwords = {router["address"]: "s3cret" for router in (ROUTER, *CLOUD_BGP["routers"])}
    found = changed(running, prune, onprem=BGP, **cloud)
    assert list(bgp.bad_passwords(found.bgp.hosts["o1"], passwords)) == []


def test_passwords_of_a_host_that_goes_may_stay_and_what_nobody_names_is_refused() -> None:
    rack = {"isthmus_bgp": {"routers": [{"address": "198.18.9.1", "as_number": 65009}]}}
    there = {"isthmus_cluster": "onprem", "ansible_host": "198.18.1.9", **rack}
    running = changed(onprem=BGP, more={"o9": there})
    gone = changed(running, onprem=BGP, more={"o9": {**there, "isthmus_state": "absent"}})
    assert ("o9" in running.bgp.hosts, "o9" in gone.bgp.hosts) == (True, False)
    assert list(bgp.bad_passwords(gone.bgp.hosts["o1"], {"198.18.9.1": "s3cret"})) == []
    assert [*bgp.bad_passwords(changed(onprem=BGP).bgp.hosts["o1"], {"198.18.9.1": "s3cret"})] == [
        "198.18.9.1 is no router of the estate (198.18.1.254)"
    ]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({**BGP, "as_number": 0}, "0 is out of range 1..4294967294"),
        ({**BGP, "as_number": 23456}, "23456 is reserved (RFC 6793)"),
        ({**BGP, "as_number": "65000.1"}, "'65000.1' is not a whole number"),
        ({**BGP, "routers": [{**ROUTER, "as_number": 4294967295}]}, "4294967295 is out of range"),
        ({**BGP, "routers": [{"address": "198.18.1.254"}]}, "bgp.routers[0].as_number: it is missing"),
        ({**BGP, "routers": [{**ROUTER, "password": "x"}]}, "'password' is not a key of a router"),
        ({**BGP, "routers": [{**ROUTER, "address": "198.18.2.1"}]}, "198.18.2.1 is the address of host c1"),
        ({**BGP, "routers": [{**ROUTER, "address": "10.102.9.9"}]}, "10.102.9.9 lies in 10.102.0.0/16"),
        ({**BGP, "routers": [ROUTER, ROUTER]}, "bgp.routers: 198.18.1.254 is there twice"),
        ({"routers": [ROUTER]}, "host o1.isthmus_bgp: the host has no AS number"),
        ({"as_number": 65101}, "host o1.isthmus_bgp: the host has no router"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_by_name(section: dict[str, Any], words: str) -> None:
    assert words in refused(onprem=section)


def test_bgp_without_native_and_a_host_whose_site_has_none_are_refused() -> None:
    keys = {**estate(), "sites": {"cloud": {}, "onprem": {"bgp": BGP}}}
    with pytest.raises(ModelError, match="packets to the hosts of onprem go through the tunnel from everywhere"):
        model(keys, hosts())
    keys["sites"]["onprem"]["routing"] = "hybrid"
    assert planned(model(keys, hosts())).bgp.hosts.keys() == {"o1", "o2", "o3"}
    assert "site cloud has no bgp" in refused(onprem=BGP, more={"c1": {"isthmus_bgp": {"as_number": 65001}}})


def test_it_goes_by_state_absent_or_by_its_name_and_stays_when_it_is_left_out() -> None:
    first = changed(onprem=BGP)
    left_out = changed(first)
    assert (left_out.orphans, left_out.bgp.routers) == (("bgp/onprem",), ())
    assert left_out.bgp.hosts == dict.fromkeys(("o1", "o2", "o3"), left_out.bgp.hosts["o1"])
    assert left_out.bgp.hosts["o1"] == {"kept": True}
    assert left_out.record["roster"]["bgp"] == ["onprem"]
    for gone in (changed(first, prune=("bgp/onprem",)), changed(first, onprem={"state": "absent"})):
        assert (gone.removed, gone.orphans, gone.bgp.hosts) == (("bgp/onprem",), (), {})
        assert "bgp" not in gone.record["roster"]
        (cut,) = gone.cuts
        assert "those of site onprem announce their ranges no more" in cut
    with pytest.raises(ModelError, match="the inventory still has it"):
        changed(first, prune=("bgp/onprem",), onprem=BGP)


def test_a_record_that_is_damaged_there_is_refused() -> None:
    record = dict(changed(onprem=BGP).record)
    record["roster"] = {**record["roster"], "bgp": [1]}
    with pytest.raises(RecordError, match=r"bgp is not a list of strings"):
        merge([record])


def test_only_the_hosts_range_leaves_and_only_the_meshs_ranges_enter() -> None:
    found = changed(onprem=BGP)
    conf = bgp.frr_conf(found.bgp.hosts["o1"], found.specs["o1"], {ROUTER["address"]: "s3cret"})  # type: ignore[dict-item]
    lines = [line.strip() for line in conf.splitlines()]
    assert [line for line in lines if line.startswith(("network", "ip prefix-list", "bgp no-rib", "router bgp"))] == [
        "bgp no-rib",
        "router bgp 65101",
        "network 10.101.0.0/28",
        "ip prefix-list isthmus-announced seq 5 permit 10.101.0.0/28",
        "ip prefix-list isthmus-taken seq 5 permit 10.101.0.0/16 le 32",
        "ip prefix-list isthmus-taken seq 10 permit 10.102.0.0/16 le 32",
    ]
    assert "neighbor 198.18.1.254 password s3cret" in lines
    assert "neighbor 198.18.1.254 bfd" not in lines
    assert {"neighbor 198.18.1.254 prefix-list isthmus-taken in", "neighbor 198.18.1.254 activate"} <= set(lines)
    assert bgp.is_ours(conf)
    assert bgp.is_ours(conf.replace(bgp.MARK, "!")), "FRR saves no comments"
    assert bgp.daemons(found.bgp.hosts["o1"]) == ("bgpd",)
    assert bgp.openings(found.bgp.hosts["o1"]) == [("tcp", 179, "198.18.1.254")]
    assert bgp.openings(bgp.of_conf(conf)) == bgp.openings(found.bgp.hosts["o1"])
    watched = {"as_number": 1, "routers": [{**ROUTER, "bfd": True}]}
    assert bgp.openings(watched) == [("tcp", 179, "198.18.1.254"), ("udp", 3784, "198.18.1.254")]
    assert bgp.openings(bgp.of_conf(bgp.frr_conf(watched, found.specs["o1"], {}))) == bgp.openings(watched)


def test_kubernetes_nodes_announce_their_pods_as_soon_as_the_record_knows_them() -> None:
    keys: dict[str, Any] = {"routing": "native", "sites": {"onprem": {}, "cloud": {"bgp": BGP}}}
    first = with_nodes(**keys)
    assert "pods" not in first.bgp.hosts["x1"]
    found = with_nodes(first, **keys, pods=DEALT)
    assert (found.bgp.hosts["x1"]["pods"], "pods" in found.bgp.hosts["c1"]) == (["10.244.1.0/24"], False)
    (line,) = bgp.lines(found.bgp.routers)
    assert "198.18.2.9 (AS 65101, x1) with 10.102.0.16/28 and 10.244.1.0/24" in line
    own = {**found.bgp.hosts["x1"], "pods": ["10.244.1.0/24", "9.9.9.0/24"]}
    conf = bgp.frr_conf(own, found.specs["x1"], {})
    shown = [line.strip() for line in conf.splitlines() if "network " in line or "isthmus-announced seq" in line]
    assert shown == [
        "no bgp network import-check",
        "network 9.9.9.0/24",
        "network 10.102.0.16/28",
        "network 10.244.1.0/24",
        "ip prefix-list isthmus-announced seq 5 permit 9.9.9.0/24",
        "ip prefix-list isthmus-announced seq 10 permit 10.102.0.16/28",
        "ip prefix-list isthmus-announced seq 15 permit 10.244.1.0/24",
    ]


@pytest.mark.parametrize(
    ("conf", "lines"),
    [
        ("# default to using syslog\nlog syslog informational\n", []),
        ("frr version 8.4\nfrr defaults traditional\nhostname x\nno ipv6 forwarding\n!\nend\n", []),
        (
            "log syslog informational\nrouter ospf\n network 10.0.0.0/8 area 0\n",
            ["router ospf", "network 10.0.0.0/8 area 0"],
        ),
    ],
    ids=["package", "saved", "foreign"],
)
def test_what_is_somebody_elses(conf: str, lines: list[str]) -> None:
    assert (bgp.foreign_lines(conf), bgp.is_ours(conf)) == (lines, False)


@pytest.mark.parametrize(
    ("passwords", "words"),
    [
        ({"198.18.1.254": "good"}, None),
        ({"198.18.1.254": "good", "198.18.2.254": "of-another-site"}, None),
        ({"198.18.1.9": "x"}, "198.18.1.9 is no router of the estate (198.18.1.254, 198.18.2.254)"),
        ({"198.18.1.254": "q w"}, "has a blank"),
        ({"198.18.1.254": ""}, "is not 1 to 80 printable ASCII"),
        ({"198.18.1.254": "x" * 81}, "is not 1 to 80 printable ASCII"),
        ({"198.18.1.254": "new\nline"}, "is not 1 to 80 printable ASCII"),
    ],
)
def test_passwords_that_cannot_be_are_told_without_them(passwords: dict[str, str], words: str | None) -> None:
    own = {"as_number": 1, "routers": [ROUTER], "estate_routers": [ROUTER["address"], "198.18.2.254"]}
    told = list(bgp.bad_passwords(own, passwords))
    assert [words in one if words else False for one in told] == ([True] if words else [])
    assert not any("q w" in one for one in told)


def neighbour(**more: Any) -> dict[str, Any]:
    return {"bgpState": "Connect", **more}


@pytest.mark.parametrize(
    ("found", "signatures", "words"),
    [
        ({"bgpState": "Established", "lastNotificationReason": "OPEN Message Error/Bad Peer AS"}, {}, None),
        (None, {}, "FRR has no such neighbour"),
        (
            neighbour(lastNotificationReason="OPEN Message Error/Bad Peer AS", lastResetDueTo="BGP Notification send"),
            {},
            "the router has another AS number than 65000",
        ),
        (
            neighbour(
                lastNotificationReason="OPEN Message Error/Bad Peer AS", lastResetDueTo="BGP Notification received"
            ),
            {},
            "the router expects another AS number of this host than 65101",
        ),
        (neighbour(), {"TCPMD5Failure": 2}, "the router has another password"),
        (neighbour(), {"TCPMD5NotFound": 2}, "the router uses no password"),
        (neighbour(), {"TCPMD5Unexpected": 2}, "the router uses a password"),
        (neighbour(lastResetDueTo="Waiting for peer OPEN"), {"TCPMD5Failure": 0}, "does not answer on TCP 179"),
        (neighbour(lastNotificationReason="Cease/Administrative Shutdown"), {}, "the last time by: Cease/Admin"),
    ],
)
def test_why_a_session_is_not_established(
    found: dict[str, Any] | None, signatures: dict[str, int], words: str | None
) -> None:
    told = bgp.why_not(ROUTER, {"as_number": 65101, "routers": [ROUTER]}, found, signatures)
    assert words in told if words else told == ""


def test_ranges_that_a_router_did_not_send() -> None:
    wanted = ["10.101.0.0/28", "10.102.0.0/27"]
    assert bgp.uncovered(wanted, []) == wanted
    assert bgp.uncovered(wanted, ["10.102.0.0/28", "10.102.0.16/28"]) == ["10.101.0.0/28"], "two halves are the whole"
    assert bgp.uncovered(wanted, ["10.101.0.0/16", "10.102.0.0/16"]) == []
