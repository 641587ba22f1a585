# SPDX-License-Identifier: GPL-3.0-or-later
"""VPCs of sites in the inventory: what each gets, when what is no longer needed goes, what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from isthmus_mesh import vpc
from isthmus_mesh.forgetting import Forget
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import Record, RecordError, merge
from unit.mesh.estates import NOW, VERSION, estate, hosts, model, planned
from unit.mesh.test_inventory_docs import ROOT, inventory
from unit.mesh.test_site_routing import DEALT, NODES, with_nodes

AWS = {"provider": "aws", "network": "vpc-1", "region": "eu-central-1", "manage": ["routes", "firewall"]}
GATEWAYS = [{"gateway": "tgw-1", "sites": ["onprem"]}]


def changed(
    previous: Plan | None = None,
    *,
    cloud: Any = None,
    sites: Any = None,
    more: Any = None,
    prune: tuple[str, ...] = (),
    **keys: Any,
) -> Plan:
    """The plan of the estate whose site cloud has the VPC `cloud`, with other `sites`, `more` hosts and keys."""
    declared = {"onprem": {}, "cloud": {"vpc": cloud} if cloud else {}, **(sites or {})}
    given = {**hosts(), **(more or {})}
    the_hosts = {name: variables for name, variables in given.items() if variables}
    return planned(model({**estate(), "sites": declared, **keys}, the_hosts), previous, prune=prune)


def test_an_estate_without_vpcs_is_as_it_was() -> None:
    plain, said = planned(model()), changed()
    assert said.record["roster"] == plain.record["roster"]
    assert said.vpcs == vpc.Planned()


def test_a_vpc_gets_routes_to_hosts_and_gateways_and_the_matrix_s_ports() -> None:
    found = changed(
        cloud={**AWS, "gateways": GATEWAYS, "route_tables": ["rtb-1"], "route_limit": 60},
        more={"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}},
    )
    (call,) = found.vpcs.calls
    every = sorted(f"198.18.1.{number}" for number in (1, 2, 3))
    assert call == {
        "site": "cloud",
        "state": "present",
        "owner": "lab-cloud",
        "place": {"provider": "aws", "network": "vpc-1", "region": "eu-central-1"},
        "route_tables": ["rtb-1"],
        "route_limit": 60,
        "peers": [],
        "hosts": ["198.18.2.1", "198.18.2.2"],
        "routes": [
            {"destination": "10.101.0.0/16", "gateway": "tgw-1"},
            {"destination": "10.102.0.0/28", "via": "198.18.2.1"},
            {"destination": "10.102.0.16/28", "via": "198.18.2.2"},
        ],
        "rules": [
            # etcd's readers are the peer's etcd hosts and c2; only c1 is a member.
            {"protocol": "tcp", "port": 2379, "sources": [*every, "198.18.2.2"]},
            {"protocol": "udp", "port": 8472, "sources": [*every, "198.18.2.1", "198.18.2.2"]},
        ],
        "meanwhile": None,
        "hosts_of_site": ["c1", "c2"],
    }
    assert vpc.lines(found.vpcs.calls, found.vpcs.peerings) == [
        "site cloud: aws vpc-1, as lab-cloud: routes 10.101.0.0/16 to tgw-1, 10.102.0.0/28 to 198.18.2.1, "
        "10.102.0.16/28 to 198.18.2.2; opens TCP 2379 for 4 addresses, UDP 8472 for 5 addresses on 2 hosts"
    ]
    place = {"provider": "aws", "network": "vpc-1", "region": "eu-central-1"}
    assert found.record["roster"]["vpcs"] == {"sites": {"cloud": place}, "peerings": []}
    assert "VPC of site cloud: new, provider aws, network vpc-1, region eu-central-1" in found.changes
    again = changed(
        found,
        cloud={**AWS, "gateways": GATEWAYS, "route_tables": ["rtb-1"], "route_limit": 60},
        more={"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}},
    )
    assert (again.record, again.vpcs.calls) == (found.record, found.vpcs.calls)


def test_only_what_is_managed_is_set() -> None:
    (routes,) = changed(cloud={**AWS, "manage": ["routes"]}).vpcs.calls
    assert (len(routes["routes"]), routes["rules"]) == (1, [])
    (firewall,) = changed(cloud={**AWS, "manage": ["firewall"]}).vpcs.calls
    assert (firewall["routes"], [rule["port"] for rule in firewall["rules"]]) == ([], [2379, 8472])


def test_behind_a_gateway_are_the_ranges_of_clusters_that_are_there_as_a_whole() -> None:
    kubernetes = {
        "api_server": "https://198.18.1.1:6443",
        "pod_ranges": ["10.244.0.0/16"],
        "service_range": "10.96.0.0/16",
    }
    clusters = estate()["clusters"]
    clusters["onprem"]["kubernetes"] = kubernetes
    (call,) = changed(cloud={**AWS, "gateways": GATEWAYS}, clusters=clusters).vpcs.calls
    behind = [one["destination"] for one in call["routes"] if "gateway" in one]
    assert behind == ["10.101.0.0/16", "10.244.0.0/16"]
    # A host of the same cluster is in the VPC: nobody knows whose the rest of the range will be.
    more = {"o4": {"isthmus_cluster": "onprem", "isthmus_site": "cloud", "ansible_host": "198.18.2.4"}}
    (call,) = changed(cloud={**AWS, "gateways": GATEWAYS}, more=more).vpcs.calls
    assert [(one["destination"], one.get("via")) for one in call["routes"]] == [
        ("10.101.0.0/28", None),
        ("10.101.0.16/28", None),
        ("10.101.0.32/28", None),
        ("10.101.0.48/28", "198.18.2.4"),
        ("10.102.0.0/28", "198.18.2.1"),
    ]


def test_an_orphan_host_keeps_its_route_and_its_ports() -> None:
    before = changed(cloud=AWS, more={"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}})
    after = changed(before, cloud=AWS)
    assert after.orphans == ("host/c2",)
    assert after.vpcs.calls == before.vpcs.calls


def test_what_goes_with_a_host_goes_after_the_hosts_were_changed() -> None:
    more = {"o4": {"isthmus_cluster": "onprem", "ansible_host": "198.18.1.4"}}
    before = changed(cloud={**AWS, "manage": ["firewall"]}, more=more)
    (call,) = changed(before, cloud={**AWS, "manage": ["firewall"]}, prune=("o4",)).vpcs.calls
    overlay, meanwhile = call["rules"][-1], call["meanwhile"]["rules"][-1]
    assert "198.18.1.4" not in overlay["sources"]
    assert "198.18.1.4" in meanwhile["sources"]
    assert "goes when the hosts have been changed" in vpc.lines([call], [])[0]


def test_to_what_is_lost_nothing_stays_open() -> None:
    declared = {**estate(), "sites": {"onprem": {}, "cloud": {"vpc": {**AWS, "manage": ["firewall"]}}}}
    before = planned(model(declared))
    (call,) = planned(model(declared), before, forget=Forget(["o3"])).vpcs.calls
    assert call["meanwhile"] is None
    assert "198.18.1.2" in call["rules"][0]["sources"]
    assert not any("198.18.1.3" in rule["sources"] for rule in call["rules"])


def test_ports_stay_open_while_encryption_is_turned_on() -> None:
    firewall = {**AWS, "manage": ["firewall"]}
    (call,) = changed(changed(cloud=firewall), cloud=firewall, encryption="wireguard").vpcs.calls
    assert [rule["port"] for rule in call["rules"]] == [2379, 51871]
    assert [rule["port"] for rule in call["meanwhile"]["rules"]] == [2379, 8472, 51871]


def test_both_ports_of_wireguard_are_open_while_keys_are_replaced() -> None:
    firewall = {**AWS, "manage": ["firewall"]}
    before = changed(cloud=firewall, encryption="wireguard")
    the_estate = {**estate(), "sites": {"onprem": {}, "cloud": {"vpc": firewall}}, "encryption": "wireguard"}
    record = merge([dict(before.record)])
    (call,) = plan(model(the_estate), record, NOW, VERSION, "alice", rotate=True).vpcs.calls
    assert [rule["port"] for rule in call["rules"]] == [2379, 51872]
    assert [rule["port"] for rule in call["meanwhile"]["rules"]] == [2379, 51871, 51872]


def test_native_packets_are_let_in_by_the_ranges_they_come_from() -> None:
    (before,) = changed(cloud=AWS).vpcs.calls
    (call,) = changed(cloud=AWS, routing="native").vpcs.calls
    ranges = ["10.101.0.0/27", "10.101.0.32/28"]
    assert call["rules"] == [{"protocol": "all", "sources": ranges}, before["rules"][0]]
    assert "opens everything from 2 ranges, TCP 2379 for 3 addresses" in vpc.lines([call], ())[0]
    # A running estate lets both in until the last step is done.
    (call,) = changed(changed(cloud=AWS), cloud=AWS, routing="native").vpcs.calls
    assert [rule.get("port") for rule in call["meanwhile"]["rules"]] == [None, 2379, 8472]


def test_a_port_that_is_open_to_all_is_told_so() -> None:
    (call,) = changed(cloud=AWS, sites={"onprem": {"inbound": False}}, encryption="wireguard").vpcs.calls
    assert call["rules"] == [{"protocol": "udp", "port": 51871, "sources": ["0.0.0.0/0"]}]
    assert "opens UDP 51871 for everybody on 1 hosts" in vpc.lines([call], ())[0]


def test_pods_have_routes_to_their_nodes_while_packets_go_natively_in_clear() -> None:
    def ways(found: Plan, when: str = "") -> dict[str, str | None]:
        (call,) = found.vpcs.calls
        held = call[when] if when else call
        return {one["destination"]: one.get("via") for one in held["routes"] if one["destination"].startswith("10.244")}

    sites: dict[str, Any] = {"onprem": {}, "cloud": {"vpc": AWS}}
    pods = {"10.244.1.0/24": "198.18.2.9", "10.244.2.0/24": "198.18.2.10"}
    before = with_nodes(sites=sites)
    found = with_nodes(before, sites=sites, routing="native", pods=DEALT)
    assert (ways(found), ways(found, "meanwhile")) == (pods, pods), "before packets go so"
    # Back in the tunnel they are the CNI's, who may lead them elsewhere.
    back = with_nodes(with_nodes(sites=sites, routing="native", pods=DEALT), sites=sites)
    assert (ways(back), ways(back, "meanwhile")) == ({}, pods)
    assert ways(with_nodes(sites=sites, pods=DEALT)) == {}
    # A gateway to several sites leads to all pods there, as far as they are known.
    gateways = [{"gateway": "tgw-1", "sites": ["cloud"]}]
    sites = {"onprem": {"vpc": {**AWS, "gateways": gateways}}, "cloud": {}, "edge": {}}
    more = {"x2": {**NODES["x2"], "isthmus_site": "edge", "ansible_host": "198.18.3.9"}}
    assert ways(with_nodes(sites=sites, more=more, pods=DEALT, routing="native")) == {"10.244.1.0/24": None}


def test_a_vpc_leaves_by_state_or_by_name_and_else_is_an_orphan() -> None:
    before = changed(cloud=AWS)
    orphan = changed(before)
    assert (orphan.orphans, orphan.vpcs.calls) == (("vpc/cloud",), ())
    assert orphan.record["roster"]["vpcs"] == before.record["roster"]["vpcs"]
    place = before.record["roster"]["vpcs"]["sites"]["cloud"]
    gone = {"site": "cloud", "owner": "lab-cloud", "state": "absent", "place": place, "hosts_of_site": []}
    for after in (changed(before, prune=("vpc/cloud",)), changed(before, cloud={**AWS, "state": "absent"})):
        assert (after.removed, after.vpcs.calls) == (("vpc/cloud",), (gone,))
        assert "vpcs" not in after.record["roster"]
        assert "what the mesh has in the VPC of site cloud goes before hosts" in after.cuts[0]
        assert vpc.lines(after.vpcs.calls, ()) == [
            "site cloud: aws vpc-1, as lab-cloud: everything of it goes, before hosts are changed"
        ]
    with pytest.raises(ModelError, match="isthmus_prune=vpc/cloud: the inventory still has it"):
        changed(before, cloud=AWS, prune=("vpc/cloud",))


def test_another_vpc_takes_the_place_of_the_one_before() -> None:
    before = changed(cloud=AWS)
    old, new = changed(before, cloud={**AWS, "network": "vpc-2"}).vpcs.calls
    assert (old["state"], old["place"]["network"]) == ("absent", "vpc-1")
    assert (new["state"], new["place"]["network"], new["meanwhile"]) == ("present", "vpc-2", None)
    # To say more of the same one is not to move.
    (call,) = changed(before, cloud={**AWS, "profile": "p"}).vpcs.calls
    assert call["state"] == "present"


def test_a_site_that_has_no_host_any_more_has_nothing_in_its_vpc() -> None:
    second = {"hall": {"vpc": {**AWS, "network": "vpc-2"}}}
    more = {"x1": {"isthmus_cluster": "cloud", "isthmus_site": "hall", "ansible_host": "198.18.9.1"}}
    before = changed(sites=second, more=more)
    after = changed(before, sites=second, more={"x1": {**more["x1"], "isthmus_state": "absent"}})
    assert [(call["site"], call["state"]) for call in after.vpcs.calls] == [("hall", "absent")]
    assert changed(after, sites=second).vpcs.calls == ()


def test_the_record_never_chooses_where_credentials_are_shown() -> None:
    before = changed(cloud={**AWS, "endpoint": "https://own.example.com"})
    assert "endpoint" not in before.record["roster"]["vpcs"]["sites"]["cloud"]
    before.record["roster"]["vpcs"]["sites"]["cloud"]["endpoint"] = "https://evil.example.com"
    (gone,) = changed(before, prune=("vpc/cloud",)).vpcs.calls
    assert "endpoint" not in gone["place"]
    (gone,) = changed(before, cloud={**AWS, "endpoint": "https://own.example.com", "state": "absent"}).vpcs.calls
    assert gone["place"]["endpoint"] == "https://own.example.com"


HALL = {"x1": {"isthmus_cluster": "cloud", "isthmus_site": "hall", "ansible_host": "198.18.9.1"}}


def pair(peered: Any = True, **keys: Any) -> dict[str, Any]:
    """Sites cloud and hall, each with a VPC with these keys, and their pair."""
    base = {**AWS, **keys}
    sites = {"hall": {"vpc": {**base, "network": "vpc-2"}}}
    pairs = [{"sites": ["hall", "cloud"], "vpc_peering": peered}] if peered is not None else []
    return {"cloud": base, "sites": sites, "more": HALL, "site_pairs": pairs}


def test_ranges_of_vpcs_are_for_the_address_plan_only() -> None:
    """Those of two that are not peered may be the same."""
    plain, said = changed(**pair(False)), changed(**pair(False, ranges=["172.31.0.0/16"]))
    assert (said.vpcs, said.specs) == (plain.vpcs, plain.specs)
    given = {**estate(), "sites": {"onprem": {}, "cloud": {"vpc": AWS}}}
    plain_digest = model(given).digest()
    given["sites"] = {"onprem": {}, "cloud": {"vpc": {**AWS, "ranges": ["172.31.0.0/16"]}}}
    assert model(given).digest() != plain_digest


def test_a_peering_is_made_and_its_ways_with_it() -> None:
    found = changed(**pair())
    (peering,) = found.vpcs.peerings
    assert peering == {
        "sites": ["cloud", "hall"],
        "state": "present",
        "owner": "lab-cloud-hall",
        "provider": "aws",
        "endpoint": None,
        "sides": [{"network": "vpc-1", "region": "eu-central-1"}, {"network": "vpc-2", "region": "eu-central-1"}],
        "hosts_of_site": [["c1"], ["x1"]],
    }
    assert [call["peers"] for call in found.vpcs.calls] == [["vpc-2"], ["vpc-1"]]
    # AWS carries nothing but the VPCs' own ranges over a peering.
    assert [one["destination"] for one in found.vpcs.calls[0]["routes"]] == ["10.102.0.0/28"]
    assert found.record["roster"]["vpcs"]["peerings"] == ["cloud hall"]
    assert "aws vpc-1 (site cloud) is peered with vpc-2 (site hall), as lab-cloud-hall" in vpc.lines(
        found.vpcs.calls, found.vpcs.peerings
    )
    orphan = changed(found, **pair(None))
    assert (orphan.orphans, orphan.vpcs.peerings) == (("peering/cloud/hall",), ())
    assert orphan.record["roster"]["vpcs"]["peerings"] == ["cloud hall"]
    for after in (changed(found, **pair(False)), changed(found, **pair(None), prune=("peering/cloud/hall",))):
        assert after.removed == ("peering/cloud/hall",)
        assert [(one["state"], one["sides"]) for one in after.vpcs.peerings] == [("absent", peering["sides"])]
        assert [call["peers"] for call in after.vpcs.calls] == [[], []]
    # With a VPC its peerings go.
    gone = changed(found, cloud=AWS, sites={"hall": {}}, more=HALL, prune=("vpc/hall",))
    assert gone.removed == ("peering/cloud/hall", "vpc/hall")
    assert [one["state"] for one in gone.vpcs.peerings] == ["absent"]
    assert gone.record["roster"]["vpcs"]["peerings"] == []


def test_on_google_routes_come_with_a_peering_and_on_azure_they_lead_to_the_peers_hosts() -> None:
    google = changed(**pair(provider="google", region=None)).vpcs.calls
    assert [(call["peers"], len(call["routes"])) for call in google] == [([], 1), ([], 1)]
    azure = changed(**pair(provider="azure", region=None, resource_group="g")).vpcs.calls
    assert [(call["peers"], len(call["routes"])) for call in azure] == [(["g/vpc-2"], 2), (["g/vpc-1"], 2)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"cloud": {**AWS, "project": "p"}}, "sites.cloud.vpc.project: it goes with provider: google only"),
        ({"cloud": {**AWS, "provider": "azure", "region": None}}, "vpc.resource_group: it is missing. Why: Azure"),
        ({"cloud": {**AWS, "manage": []}}, "vpc.manage: the list is empty"),
        ({"cloud": {**AWS, "manage": ["nat"]}}, "vpc.manage[0]: 'nat'"),
        ({"cloud": {**AWS, "gateways": [{"gateway": "tgw-1", "sites": ["onpren"]}]}}, "did you mean 'onprem'"),
        ({"cloud": {**AWS, "gateways": [{"gateway": "tgw-1", "sites": ["cloud"]}]}}, "cloud is the VPC's own site"),
        (
            {"cloud": {**AWS, "gateways": [*GATEWAYS, {"gateway": "vgw-1", "sites": ["onprem"]}]}},
            "onprem is behind tgw-1 and vgw-1",
        ),
        ({"cloud": {**AWS, "gateways": GATEWAYS, "manage": ["firewall"]}}, "they go with routes in `manage` only"),
        ({"site_pairs": [{"sites": ["cloud", "onprem"], "vpc_peering": True}]}, "site cloud has no vpc"),
        ({"cloud": AWS, "site_pairs": [{"sites": ["cloud", "cloud"], "vpc_peering": True}]}, "cloud is one site"),
        ({**pair(), "cloud": {**AWS, "network": "vpc-2"}}, "sites cloud and hall are in one VPC"),
        (
            {**pair(), "cloud": {**AWS, "provider": "google", "region": None}},
            "site cloud is in google, site hall in aws",
        ),
        ({**pair(), "cloud": {**AWS, "endpoint": "https://x"}}, "the two VPCs have different endpoints"),
        ({**pair(), "cloud": {**AWS, "state": "absent"}}, "the vpc of site cloud is being removed"),
        (pair(manage=["firewall"]), "it goes with routes in `manage` of both sites"),
        (
            pair(ranges=["10.9.0.0/24", "172.31.0.0/16"]),
            "10.9.0.0/24 of the VPC of site cloud and 10.9.0.0/24 of that of site hall overlap. Why: no provider peers",
        ),
    ],
)
def test_what_cannot_be_is_named(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=re.escape(words)):
        changed(**keys)


@pytest.mark.parametrize(
    ("estate_name", "sites", "name"),
    [
        ("lab", ("cloud",), "lab-cloud"),
        ("retail-of-the-north", ("frankfurt",), "retail-of-the-n-"),
        ("7eleven", ("a",), "i7eleven-a-"),
    ],
)
def test_an_owner_fits_what_providers_take(estate_name: str, sites: tuple[str, ...], name: str) -> None:
    found = vpc.owner(estate_name, *sites)
    assert found.startswith(name[:15])
    assert re.fullmatch("[a-z][a-z0-9-]{0,22}[a-z0-9]", found)
    assert found == vpc.owner(estate_name, *sites)
    assert found != vpc.owner(estate_name, *sites, "b")


def test_the_example_s_vpcs_are_set_as_its_words_say() -> None:
    the_estate, the_hosts = inventory(ROOT / "inventories" / "hybrid_example")
    central, west = planned(model(the_estate, the_hosts)).vpcs.calls
    assert (central["owner"], west["owner"]) == ("retail-central", "retail-west")
    tunnels = "projects/retail-mesh/regions/us-central1/vpnTunnels"
    assert [(one["destination"], one.get("via") or one["gateway"]) for one in central["routes"]] == [
        ("10.128.0.0/14", f"{tunnels}/frankfurt"),
        ("10.64.0.0/16", f"{tunnels}/frankfurt"),
        ("10.66.0.0/16", f"{tunnels}/dublin"),
        ("10.71.0.0/20", f"{tunnels}/frankfurt"),
        ("10.72.0.0/28", "10.8.0.11"),
        ("10.72.0.16/28", "10.8.0.12"),
    ]
    # Everything is encrypted but in Frankfurt, so the overlay's own port stays closed here.
    assert [(rule["protocol"], rule["port"]) for rule in central["rules"]] == [("tcp", 2379), ("udp", 51871)]
    assert [(rule["protocol"], rule["port"]) for rule in west["rules"]] == [("tcp", 12379), ("udp", 51871)]
    # Nobody knows from where the packets of the till behind the address translation come.
    tcp, udp = west["rules"]
    assert the_hosts["paris-till"]["ansible_host"] in tcp["sources"], tcp
    assert udp["sources"] == ["0.0.0.0/0"], udp


@pytest.mark.parametrize(
    "document",
    [
        {"sites": {}},
        {"peerings": []},
        {"sites": {"a": {"provider": "aws"}}, "peerings": []},
        {"sites": {"a": {"provider": "aws", "network": 1}}, "peerings": []},
        {"sites": {"a": {"provider": "aws", "network": "x"}}, "peerings": ["a b"]},
        {"sites": {"a": {"provider": "aws", "network": "x"}}, "peerings": ["a"]},
    ],
)
def test_a_record_with_another_form_is_refused(document: Any) -> None:
    given = dict(planned(model()).record)
    assert isinstance(merge([given]), Record)
    given["roster"] = {**given["roster"], "vpcs": document}
    with pytest.raises(RecordError):
        merge([given])
