# SPDX-License-Identifier: GPL-3.0-or-later
"""The address plan: what it proposes overlaps nothing and can be planned from; its numbers are those of dealing."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from datetime import timedelta
from ipaddress import IPv4Network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isthmus_mesh.address_plan import (
    Growth,
    NewCluster,
    Space,
    address_plan,
    known_claims,
    lines,
    read_growth,
    read_new_cluster,
    with_fixes,
)
from isthmus_mesh.addressing import (
    HOST,
    RESERVED,
    SERVICES,
    VPC,
    VPN,
    WORKLOADS,
    Claim,
    count_free,
    free_subnets,
    overlaps,
)
from isthmus_mesh.model import Model, ModelError, read_model
from isthmus_mesh.planner import Plan
from isthmus_mesh.record import Record, merge
from unit.mesh.estates import NOW, estate, hosts, model, planned, web
from unit.mesh.test_kubernetes import with_kubernetes

Edit = Callable[[dict[str, Any], dict[str, Any]], object]
C = "isthmus_estate.clusters"


def recorded(plan: Plan | None = None) -> Record:
    return merge([copy.deepcopy(dict((plan or planned(model())).record))])


def refusal(edit: Edit, record: Record | None = None, base: Any = None) -> list[str]:
    """What is refused, with the fixes."""
    the_estate, the_hosts = base or (estate(), hosts())
    edit(the_estate, the_hosts)
    with pytest.raises(ModelError) as caught:
        read_model(the_estate, the_hosts)
    return [str(problem) for problem in with_fixes(caught.value, record or Record()).problems]


def reserve(text: str) -> Edit:
    return lambda e, h: e.update(reserved_ranges=[{"name": "office VPN", "range": text}])


# Overlaps and fixes


def test_a_new_range_gives_way_to_one_in_use() -> None:
    """Whichever of the two the refusal names."""

    def edit(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_estate["clusters"]["new"] = {
            "id": 3,
            "workload_ranges": ["10.100.0.0/15"],
            "service_range": "10.113.0.0/16",
            "etcd": {"hosts": ["n1"]},
        }
        the_hosts["n1"] = {"isthmus_cluster": "new", "ansible_host": "198.18.3.1"}

    [message] = refusal(edit, recorded())
    assert message.startswith(f"{C}.onprem.workload_ranges: 10.101.0.0/16 and 10.100.0.0/15 ({C}.new.workload_ranges)")
    assert message.endswith(
        f"Next: write 10.104.0.0/15 instead of 10.100.0.0/15 in {C}.new.workload_ranges; nothing that the estate "
        "record knows is in 10.100.0.0/15."
    )


def test_ranges_in_use_are_told_with_all_that_would_change() -> None:
    def grow(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        for number in range(4, 11):
            the_hosts[f"o{number}"] = {
                "isthmus_cluster": "onprem",
                "ansible_host": f"198.18.1.{number}",
                "isthmus_workloads": [web()],
            }
            the_hosts[f"o{number}"]["isthmus_node_range"] = f"10.101.128.{16 * number}/28"

    the_estate, the_hosts = estate(), hosts()
    grow(the_estate, the_hosts)
    the_estate["clusters"]["onprem"]["workload_ranges"] = ["10.101.0.0/17", "10.101.128.0/17"]
    base = the_estate, the_hosts
    record = recorded(planned(read_model(*base)))
    [message] = refusal(reserve("10.101.128.0/20"), record, copy.deepcopy(base))
    assert message.endswith(
        "Next: 7 hosts (o10, o4, o5, o6, o7 and 2 more) and 7 addresses of workloads in 10.101.128.0/17 would change. "
        f"Put 10.103.0.0/17 first in {C}.onprem.workload_ranges, then take each of these hosts out and in again "
        "(docs/addresses.md), and 10.101.128.0/17 out at last. Until then leave reserved range 10.101.128.0/20 (office "
        "VPN) out of the inventory."
    )
    [message] = refusal(reserve("10.101.0.0/20"), record, copy.deepcopy(base))
    assert "cluster onprem would have to be removed and added anew with 10.103.0.0/17 in place of" in message
    assert (
        "because host o1, which keeps the authority, never leaves alone; this changes 3 hosts (o1, o2, o3)" in message
    )
    [message] = refusal(reserve("10.112.7.0/24"), recorded())
    assert (
        "cluster cloud would have to be removed and added anew with 10.113.0.0/16 in place of 10.112.0.0/16" in message
    )
    assert "this changes 1 host (c1), 1 address of workloads and 1 service (shop/web)" in message


@pytest.mark.parametrize(
    ("edit", "following"),
    [
        (
            lambda e, h: e["clusters"]["cloud"].update(service_range="10.111.128.0/17"),
            f"Next: put 10.112.0.0/16 back into {C}.cloud.service_range instead of 10.111.128.0/17: the cluster runs "
            "with it.",
        ),
        (
            lambda e, h: e["clusters"]["onprem"].update(workload_ranges=["10.100.0.0/14"]),
            f"Next: put 10.101.0.0/16 back into {C}.onprem.workload_ranges instead of 10.100.0.0/14: the cluster runs "
            "with it.",
        ),
        (
            lambda e, h: e["clusters"]["onprem"]["workload_ranges"].append("10.101.4.0/24"),
            f"Next: leave 10.101.4.0/24 out of {C}.onprem.workload_ranges: 10.101.0.0/16 holds it.",
        ),
        (
            lambda e, h: h.update(o4={"isthmus_cluster": "onprem", "ansible_host": "10.102.9.9"}),
            "Next: give host o4 another address on its own network, or else: cluster cloud would have to be removed "
            "and added anew with 10.103.0.0/16 in place of 10.102.0.0/16 (docs/addresses.md), because host c1, which "
            "keeps the authority, never leaves alone; this changes 1 host (c1) and 1 address of workloads. Until then "
            "leave host o4 out of the inventory.",
        ),
    ],
)
def test_the_way_out_fits_the_cause(edit: Edit, following: str) -> None:
    [message] = refusal(edit, recorded())
    assert message.endswith(following)


def test_kubernetes_ranges_are_changed_in_kubernetes() -> None:
    [message] = refusal(reserve("10.244.7.0/24"), base=with_kubernetes())
    assert "give its CNI 10.245.0.0/16, add that to" in message
    assert "isthmus_prune=pods/kube/10.244.0.0/16 when no pod is in it (2 hosts (k1, k2))" in message
    [message] = refusal(reserve("10.96.7.0/24"), base=with_kubernetes())
    assert "make it anew with --service-cluster-ip-range=10.97.0.0/16" in message
    [message] = refusal(
        lambda e, h: e["clusters"]["cloud"].update(workload_ranges=["10.244.0.0/17"]), base=with_kubernetes()
    )
    assert "write 10.105.0.0/17 instead of 10.244.0.0/17" in message, "ours moves, whatever the refusal names"


def test_pins_change_with_their_range() -> None:
    def edit(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_hosts["c1"]["isthmus_node_range"] = "10.102.0.0/28"
        the_estate["reserved_ranges"] = [{"name": "x", "range": "10.102.0.0/24"}]

    [message] = refusal(edit)
    assert "but isthmus_node_range of 1 host (c1) (and what is pinned in it) must change with it" in message


def test_two_overlaps_of_one_range_have_one_fix_and_two_ranges_two() -> None:
    def edit(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_estate["reserved_ranges"] = [
            {"name": "one", "range": "10.102.0.0/24"},
            {"name": "two", "range": "10.102.1.0/24"},
            {"name": "three", "range": "10.101.0.0/24"},
        ]

    messages = refusal(edit)
    assert len(messages) == 3
    assert sum("write 10.104.0.0/16 instead of 10.102.0.0/16" in message for message in messages) == 2
    assert sum("write 10.103.0.0/16 instead of 10.101.0.0/16" in message for message in messages) == 1


def test_no_free_range_of_the_size_is_told() -> None:
    def edit(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_estate["reserved_ranges"] = [
            {"name": "all", "range": "10.0.0.0/8"},
            {"name": "more", "range": "172.16.0.0/12"},
        ]
        for cluster in the_estate["clusters"].values():
            cluster["service_range"] = {1: "192.168.0.0/17", 2: "192.168.128.0/18"}[cluster["id"]]
        the_estate["clusters"]["onprem"]["workload_ranges"] = ["198.51.100.0/24"]

    [message] = refusal(edit)
    assert "(no private /16 is free; the largest is 192.168.192.0/18) instead of 10.102.0.0/16" in message


def test_what_only_the_record_knows_overlaps_too() -> None:
    """An orphan cluster, its host and a reserved range that was named later; nothing of them is proposed anew."""
    the_estate, the_hosts = estate(), hosts()
    del the_estate["clusters"]["cloud"], the_hosts["c1"]
    the_estate["clusters"]["onprem"]["workload_ranges"].append("198.18.2.0/24")
    the_estate["reserved_ranges"] = [{"name": "office VPN", "range": "10.102.0.0/24"}]
    found = address_plan(read_model(the_estate, the_hosts), recorded(), NOW)
    assert [[side["owner"] for side in one["ranges"]] for one in found["overlaps"]] == [
        ["cloud", "office VPN"],
        ["onprem", "c1"],
    ]
    assert [one["fix"]["how"] for one in found["overlaps"]] == ["orphan", "replace"]
    assert len(found["problems"]) == 2


def test_a_good_estate_has_no_problem_and_order_does_not_show() -> None:
    found = address_plan(model(*with_kubernetes()), recorded(planned(model(*with_kubernetes()))), NOW)
    assert (found["problems"], found["overlaps"], found["new_cluster"]) == ([], [], None)
    assert {(one["range"], one["kind"], one["owner"], one["used"]) for one in found["ranges"]} == {
        ("10.101.0.0/16", "workloads", "onprem", 3),
        ("10.102.0.0/16", "workloads", "cloud", 1),
        ("10.104.0.0/16", "workloads", "kube", 3),
        ("10.111.0.0/16", "services", "onprem", 1),
        ("10.112.0.0/16", "services", "cloud", 1),
        ("10.114.0.0/16", "services", "kube", 1),
        ("10.244.0.0/16", "pods", "kube", None),
        ("10.96.0.0/16", "ClusterIPs", "kube", None),
    }
    assert found["underlay"][0] == {"range": "198.18.1.0/24", "sites": ["onprem"], "addresses": 3}
    the_estate, the_hosts = with_kubernetes()
    the_estate["clusters"] = dict(reversed(the_estate["clusters"].items()))
    turned = model(the_estate, dict(reversed(the_hosts.items())))
    assert json.dumps(address_plan(turned, recorded(planned(turned)), NOW)) == json.dumps(found)


# What is behind the gateways of sites


def gateway(host: str, *networks: str) -> dict[str, Any]:
    return {"ipsec": {"networks": list(networks), "gateways": [{"host": host}]}}


def appliance(*networks: str) -> dict[str, Any]:
    return {"ipsec": {"networks": list(networks), "peer": {"address": "203.0.113.9"}}}


def declare(**sites: Any) -> Edit:
    return lambda e, h: e.update(sites={"onprem": {}, "cloud": {}, **sites})


N = "isthmus_estate.sites.{}.ipsec.networks"
OVER = [
    (
        "a range in use, listed as if it belonged there",
        declare(onprem=gateway("o1", "198.18.1.0/24", "10.101.4.0/24")),
        f"{N.format('onprem')}: 10.101.4.0/24 and 10.101.0.0/16 ({C}.onprem.workload_ranges) overlap: they share 256 "
        "addresses (10.101.4.0/24). Why: packets to what is there would be sent into the mesh. Next: leave "
        f"10.101.4.0/24 out of {N.format('onprem')} if it is the mesh's: the tunnel carries that anyway; or else: "
        "cluster onprem would have to be removed and added anew with 10.103.0.0/16 in place of 10.101.0.0/16",
    ),
    (
        "a service range inside",
        declare(office=appliance("10.112.0.0/15")),
        f"{C}.cloud.service_range: 10.112.0.0/16 and 10.112.0.0/15 ({N.format('office')}) overlap: they share 65536 "
        "addresses (10.112.0.0/16). Why: packets to what is there would be sent into the mesh. Next: cluster cloud "
        "would have to be removed and added anew with 10.114.0.0/16 in place of 10.112.0.0/16",
    ),
    (
        "networks of two sites, the one inside the other",
        declare(onprem=gateway("o1", "198.18.0.0/22"), cloud=gateway("c1", "198.18.2.0/24")),
        f"{N.format('cloud')}: 198.18.2.0/24 and 198.18.0.0/22 ({N.format('onprem')}) overlap: they share 256 "
        "addresses (198.18.2.0/24). Why: a packet goes to one place. Next: write 198.18.0.0/23, 198.18.3.0/24 instead "
        f"of 198.18.0.0/22 in {N.format('onprem')}: then range 198.18.2.0/24 behind the gateways of site cloud is not "
        "behind the gateways of site onprem.",
    ),
    (
        "networks of two sites, the same",
        declare(onprem=gateway("o1", "198.18.1.0/24"), office=appliance("198.18.1.0/24")),
        "Next: renumber what is behind the gateways of site office: 10.0.0.0/24 instead of 198.18.1.0/24 in "
        f"{N.format('office')}; no host of the mesh is in it. Until then leave range 198.18.1.0/24 "
        "behind the gateways of site onprem out of the inventory.",
    ),
    (
        "one with hosts inside one with hosts",
        lambda e, h: (
            h["o1"].update(ansible_host="198.18.2.77"),
            declare(onprem=gateway("o1", "198.18.0.0/22"), cloud=gateway("c1", "198.18.2.0/24"))(e, h),
        ),
        "Next: renumber what is behind the gateways of site cloud: 10.0.0.0/24 instead of 198.18.2.0/24 in "
        f"{N.format('cloud')}, and isthmus_underlay of 1 host (c1) with it. Until then leave range 198.18.0.0/22 "
        "behind the gateways of site onprem out of the inventory.",
    ),
    (
        "a host of another site",
        declare(onprem=gateway("o1", "198.18.0.0/22")),
        f"host c1.isthmus_underlay: 198.18.2.1 lies in 198.18.0.0/22 ({N.format('onprem')}). Why: packets to it would "
        "go to the gateway of onprem, and the host is at cloud. Next: write 198.18.0.0/23, 198.18.3.0/24 instead "
        f"of 198.18.0.0/22 in {N.format('onprem')}: then the own address 198.18.2.1 of host c1 is not behind the "
        "gateways of site onprem. If it is behind them, set isthmus_site of the host to onprem.",
    ),
    (
        "a host of another site in a network without more",
        declare(office=appliance("198.18.2.1/32")),
        "Next: give host c1 another address, or set its isthmus_site to office if it is behind those gateways, or "
        "else: renumber what is behind the gateways of site office: 10.0.0.0/32 instead of 198.18.2.1/32 in "
        f"{N.format('office')}",
    ),
    (
        "a reserved range that none of the site's hosts is in",
        lambda e, h: (
            declare(office=appliance("10.8.0.0/22"))(e, h),
            e.update(reserved_ranges=[{"name": "VPC", "range": "10.8.3.0/24"}]),
        ),
        f"{N.format('office')}: 10.8.0.0/22 and 10.8.3.0/24 (isthmus_estate.reserved_ranges[0] (VPC)) overlap: they "
        "share 256 addresses (10.8.3.0/24). Why: a packet goes to one place. Next: write 10.8.0.0/23, 10.8.2.0/24 "
        f"instead of 10.8.0.0/22 in {N.format('office')}: then reserved range 10.8.3.0/24 (VPC) is not behind the "
        "gateways of site office. If it is behind them, take it out of reserved_ranges: what is there is kept free as "
        "it is.",
    ),
]


@pytest.mark.parametrize(("edit", "words"), [case[1:] for case in OVER], ids=[case[0] for case in OVER])
def test_what_is_behind_gateways_is_apart_from_all_else(edit: Edit, words: str) -> None:
    """Whether or not a pair of sites uses the gateways; `address_plan` has the same as the refusal."""
    messages = refusal(edit, recorded())
    assert [words in message for message in messages] == [True], messages
    the_estate, the_hosts = estate(), hosts()
    edit(the_estate, the_hosts)
    with pytest.raises(ModelError) as caught:
        read_model(the_estate, the_hosts)
    assert caught.value.draft is not None
    found = address_plan(caught.value.draft, recorded(), NOW)
    [overlap] = found["overlaps"]
    assert overlap["fix"]["words"] in messages[0]
    assert "VPN" in {side["kind"] for side in overlap["ranges"]}


def test_pods_and_cluster_ips_are_not_behind_gateways() -> None:
    messages = refusal(
        declare(office=appliance("10.244.7.0/24", "10.96.7.0/24"), kube={}),
        base=with_kubernetes(),
    )
    assert len(messages) == 2
    assert any("or else: pods are Kubernetes' own: give its CNI 10.245.0.0/16" in message for message in messages)
    assert any("make it anew with --service-cluster-ip-range=10.97.0.0/16" in message for message in messages)


def test_words_for_one_place_may_overlap() -> None:
    """Hosts of the site, networks of the site among each other, what was reserved around them or for them."""
    the_estate, the_hosts = estate(), hosts()
    declare(
        onprem=gateway("o1", "198.18.0.0/23", "198.18.1.0/24"),
        cloud=gateway("c1", "198.18.2.0/24"),
        office=appliance("10.8.4.0/24"),
    )(the_estate, the_hosts)
    the_estate["reserved_ranges"] = [
        {"name": "subnet of onprem", "range": "198.18.1.0/24"},
        {"name": "all subnets", "range": "198.18.0.0/15"},
        {"name": "offices", "range": "10.8.0.0/16"},
        {"name": "the office", "range": "10.8.4.0/24"},
    ]
    the_model = model(the_estate, the_hosts)
    found = address_plan(the_model, recorded(planned(the_model)), NOW)
    assert (found["problems"], found["overlaps"]) == ([], [])
    assert [
        (one["range"], one["owner"], one["where"], one["used"]) for one in found["ranges"] if one["kind"] == "VPN"
    ] == [
        ("10.8.4.0/24", "office", N.format("office"), 0),
        ("198.18.0.0/23", "onprem", N.format("onprem"), 3),
        ("198.18.1.0/24", "onprem", N.format("onprem"), 3),
        ("198.18.2.0/24", "cloud", N.format("cloud"), 1),
    ]
    table = [re.sub(" +", " ", line) for line in lines(found)]
    assert "10.8.4.0/24 256 VPN office 0 addresses of our hosts" in table
    assert "198.18.2.0/24 256 VPN cloud 1 address of our hosts" in table


def test_nothing_is_proposed_that_is_behind_a_gateway() -> None:
    """Nor where the section cannot be used for another reason."""
    the_estate, the_hosts = estate(), hosts()
    declare(office=appliance("10.103.0.0/16", "10.113.0.0/16"))(the_estate, the_hosts)
    fresh = NewCluster("fresh", 3)
    found = address_plan(model(the_estate, the_hosts), Record(), NOW, new=fresh)["new_cluster"]
    assert (found["workload_ranges"], found["service_range"]) == (["10.104.0.0/25"], "10.114.0.0/22")
    the_estate["sites"]["office"]["ipsec"]["gateways"] = [{"host": "o1"}]
    with pytest.raises(ModelError, match="it has both gateways and peer") as caught:
        model(the_estate, the_hosts)
    assert caught.value.draft is not None
    found = address_plan(caught.value.draft, Record(), NOW, new=fresh)["new_cluster"]
    assert (found["workload_ranges"], found["service_range"]) == (["10.104.0.0/25"], "10.114.0.0/22")


def test_what_only_the_record_knows_is_not_behind_a_gateway() -> None:
    before = planned(model())
    the_estate, the_hosts = estate(), hosts()
    del the_estate["clusters"]["cloud"], the_hosts["c1"]
    declare(office=appliance("10.102.3.0/24", "198.18.2.0/24"))(the_estate, the_hosts)
    the_model = model(the_estate, the_hosts)
    with pytest.raises(ModelError) as caught:
        planned(the_model, before)
    lacks = "which the record knows and the inventory lacks. Why: what is absent from the inventory still runs"
    assert [str(problem).partition(". Next")[0] for problem in caught.value.problems] == [
        f"{N.format('office')}: 10.102.3.0/24 overlaps 10.102.0.0/16 of cluster cloud, {lacks}",
        f"{N.format('office')}: 198.18.2.0/24 holds 198.18.2.1 of host c1 of cluster cloud, {lacks}",
    ]
    found = address_plan(the_model, recorded(before), NOW)["overlaps"]
    assert [(one["fix"]["how"], one["fix"]["range"]) for one in found] == [
        ("orphan", "10.102.0.0/16"),
        ("renumber", "198.18.2.0/24"),
    ]
    # At its own site the host is where it belongs.
    declare(cloud=appliance("198.18.2.0/24"))(the_estate, the_hosts)
    the_model = model(the_estate, the_hosts)
    assert address_plan(the_model, recorded(before), NOW)["overlaps"] == []
    planned(the_model, before)


# VPCs


def vpc(*ranges: str, network: str = "vpc-1", **more: Any) -> dict[str, Any]:
    return {"vpc": {"provider": "aws", "network": network, "manage": ["routes"], "ranges": list(ranges)}, **more}


IN_VPC = "isthmus_estate.sites.{}.vpc.ranges"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            declare(cloud=vpc("10.101.0.0/20")),
            f"{IN_VPC.format('cloud')}: 10.101.0.0/20 and 10.101.0.0/16 ({C}.onprem.workload_ranges) overlap: they "
            "share 4096 addresses (10.101.0.0/20). Why: packets to what is there would be sent into the mesh. Next: "
            "cluster onprem would have to be removed and added anew with 10.103.0.0/16 in place of 10.101.0.0/16",
        ),
        (
            declare(cloud=vpc("10.112.0.0/15")),
            "Until then leave range 10.112.0.0/15 of the VPC of site cloud out of the inventory.",
        ),
        (
            declare(cloud=vpc("172.31.0.0/16"), office=appliance("172.31.4.0/24")),
            f"{N.format('office')}: 172.31.4.0/24 and 172.31.0.0/16 ({IN_VPC.format('cloud')}) overlap: they share 256 "
            "addresses (172.31.4.0/24). Why: a packet goes to one place. Next: renumber what is behind the gateways of "
            f"site office: 172.16.0.0/24 instead of 172.31.4.0/24 in {N.format('office')}; no host of the mesh is in "
            "it. Until then leave range 172.31.0.0/16 of the VPC of site cloud out of the inventory.",
        ),
        (
            declare(cloud=vpc("172.31.0.0/16"), office=appliance("172.30.0.0/15")),
            f"Next: write 172.30.0.0/16 instead of 172.30.0.0/15 in {N.format('office')}: then range 172.31.0.0/16 of "
            "the VPC of site cloud is not behind the gateways of site office.",
        ),
    ],
)
def test_ranges_of_vpcs_are_apart_from_the_mesh_and_from_other_sites(edit: Edit, words: str) -> None:
    messages = refusal(edit, recorded())
    assert [words in message for message in messages] == [True], messages


def test_a_vpc_holds_its_hosts_its_vpn_and_what_a_cni_deals_from_it() -> None:
    the_estate, the_hosts = with_kubernetes()
    declare(
        cloud=vpc("198.18.0.0/15", **gateway("c1", "198.18.2.0/24")),
        hall=vpc(network="vpc-1", **appliance("198.19.0.0/24")),
        kube=vpc("10.244.0.0/15", "10.96.0.0/16", network="vpc-2"),
        other=vpc("198.19.128.0/17", network="vpc-3"),
    )(the_estate, the_hosts)
    the_estate["reserved_ranges"] = [{"name": "subnet", "range": "198.19.7.0/24"}]
    the_model = model(the_estate, the_hosts)
    found = address_plan(the_model, recorded(planned(the_model)), NOW, new=NewCluster("fresh", 3))
    assert (found["problems"], found["overlaps"]) == ([], [])
    assert ("198.18.0.0/15", "VPC", "cloud", 7) in {
        tuple(one[key] for key in ("range", "kind", "owner", "used")) for one in found["ranges"]
    }
    the_estate["sites"]["onprem"] = vpc("10.103.0.0/16", "10.105.0.0/16", "10.115.0.0/16", network="vpc-4")
    proposal = address_plan(model(the_estate, the_hosts), Record(), NOW, new=NewCluster("fresh", 3))["new_cluster"]
    assert (proposal["workload_ranges"], proposal["service_range"]) == (["10.106.0.0/25"], "10.116.0.0/22")
    # At another site's VPC pods are astray, and so is another site's VPN in a VPC that is not its own.
    the_estate["sites"]["kube"], the_estate["sites"]["hall"] = {}, vpc(network="vpc-9", **appliance("198.19.0.0/24"))
    the_estate["sites"]["other"] = vpc("10.244.0.0/15", network="vpc-3")
    with pytest.raises(ModelError) as caught:
        model(the_estate, the_hosts)
    assert [problem.where for problem in caught.value.problems] == [
        f"{C}.kube.kubernetes.pod_ranges",
        N.format("hall"),
    ]


# A new cluster

NETWORKS = st.integers(8, 28).flatmap(
    lambda length: st.sampled_from(["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "198.18.0.0/15"]).flatmap(
        lambda text: st.integers(0, 2**32 - 1).map(
            lambda number: IPv4Network(
                (
                    int(IPv4Network(text).network_address) + number % IPv4Network(text).num_addresses,
                    max(length, IPv4Network(text).prefixlen),
                ),
                strict=False,
            )
        )
    )
)
CLAIMS = st.lists(
    st.tuples(NETWORKS, st.sampled_from([WORKLOADS, SERVICES, RESERVED, VPN, VPC, HOST])), max_size=40
).map(
    lambda drawn: [
        Claim(IPv4Network(network.network_address) if kind == HOST else network, f"{number}", kind, f"owner {number}")
        for number, (network, kind) in enumerate(drawn)
    ]
)


@given(CLAIMS, st.lists(st.tuples(st.integers(8, 28), st.sampled_from([WORKLOADS, SERVICES])), max_size=12))
def test_what_is_dealt_touches_nothing(claims: list[Claim], wanted: list[tuple[int, str]]) -> None:
    space = Space(claims)
    dealt = [space.deal(length, kind) for length, kind in wanted]
    found = [one for one in dealt if one is not None]
    assert not any(one.overlaps(claim.network) for one in found for claim in claims)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(found, 2))
    assert [one.prefixlen for one in found] == [wanted[index][0] for index, one in enumerate(dealt) if one is not None]
    for (length, _kind), one in zip(wanted, dealt, strict=True):
        if one is None:  # nothing is left even when all that was dealt later is counted as taken
            taken = [*(claim.network for claim in claims), *found]
            blocks = [
                IPv4Network(text)
                for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
                if IPv4Network(text).prefixlen <= length
            ]
            assert next(free_subnets(blocks, length, taken), None) is None


@given(CLAIMS)
def test_pairs_that_overlap_are_all_found(claims: list[Claim]) -> None:
    found = {frozenset(pair) for pair in overlaps(claims)}
    assert found == {
        frozenset((one, other))
        for one, other in itertools.combinations(claims, 2)
        if one.network.overlaps(other.network)
    }
    assert all(inner.network.subnet_of(outer.network) for outer, inner in overlaps(claims))


@given(
    st.lists(NETWORKS.filter(lambda one: one.prefixlen >= 20), max_size=3),
    st.integers(24, 29),
    st.lists(NETWORKS.filter(lambda one: one.prefixlen >= 22), max_size=8),
)
def test_counting_is_dealing(outer: list[IPv4Network], length: int, taken: list[IPv4Network]) -> None:
    apart = [one for index, one in enumerate(outer) if not any(one.overlaps(other) for other in outer[:index])]
    inside = [IPv4Network((one.network_address, 29)) for one in apart]
    for blocked in (taken, [*taken, *inside]):
        assert count_free(apart, length, blocked) == len(list(free_subnets(apart, length, blocked)))


def with_new(proposal: dict[str, Any], base: tuple[dict[str, Any], dict[str, Any]], nodes: int) -> Model:
    the_estate, the_hosts = copy.deepcopy(base)
    names = [f"new-{number}" for number in range(nodes)]
    the_estate["clusters"][proposal["cluster"]] = {
        **{key: proposal[key] for key in ("id", "workload_ranges", "service_range", "node_prefix")},
        "etcd": {"hosts": names[:1]},
    }
    for number, name in enumerate(names):
        the_hosts[name] = {
            "isthmus_cluster": proposal["cluster"],
            "isthmus_underlay": f"203.0.{113 + number // 250}.{number % 250 + 1}",
        }
    return read_model(the_estate, the_hosts)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 300),
    st.lists(NETWORKS.filter(lambda one: one.prefixlen > 12), max_size=8),
    st.integers(0, 60),
    st.booleans(),
)
def test_a_proposal_can_be_planned_from(nodes: int, reserved: list[IPv4Network], each: int, known: bool) -> None:
    """Written into the inventory it is accepted, whatever is reserved, and all of its hosts get their ranges."""
    the_estate, the_hosts = with_kubernetes()
    everything = [claim.network for claim in known_claims(model(the_estate, the_hosts), Record()) if claim.kind != HOST]
    the_estate["reserved_ranges"] = [
        {"name": f"network {index}", "range": str(network)}
        for index, network in enumerate(reserved)
        if not any(network.overlaps(one) for one in everything)
    ]
    the_model = model(the_estate, the_hosts)
    before = planned(the_model)
    record = recorded(before) if known else Record()
    growth = Growth(more={"workloads": each})
    proposal = address_plan(the_model, record, NOW, growth, NewCluster("fresh", nodes))["new_cluster"]
    assert proposal["hosts"] >= nodes + nodes / 4
    assert proposal["workloads_per_host"] >= max(13, each)
    found = planned(with_new(proposal, (the_estate, the_hosts), nodes), before)
    document = found.record["clusters/fresh"]
    assert len(document["hosts"]) == nodes
    assert {IPv4Network(entry["range4"]).prefixlen for entry in document["hosts"].values()} == {proposal["node_prefix"]}


def all_but_one() -> list[dict[str, str]]:
    """All private space but what the small estate has and 10.103.0.0/16, as reserved ranges."""
    blocks = [IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
    for text in ("10.101.0.0/16", "10.102.0.0/16", "10.103.0.0/16", "10.111.0.0/16", "10.112.0.0/16"):
        hole = IPv4Network(text)
        blocks = [
            part for block in blocks for part in (block.address_exclude(hole) if hole.subnet_of(block) else [block])
        ]
    return [{"name": str(block), "range": str(block)} for block in blocks]


def test_a_proposal_keeps_away_from_the_networks_of_hosts() -> None:
    """As far as there is room: which network an address is in is not known."""
    the_hosts = hosts()
    the_hosts["o1"]["ansible_host"] = "10.103.200.7"
    found = address_plan(model(the_hosts=the_hosts), Record(), NOW, new=NewCluster("fresh", 3))["new_cluster"]
    assert found["workload_ranges"] == ["10.104.0.0/25"]
    the_estate = estate()
    the_estate["reserved_ranges"] = all_but_one() + [
        {"name": text, "range": text} for text in ("10.103.0.0/17", "10.103.128.0/18", "10.103.192.0/21")
    ]
    found = address_plan(model(the_estate, the_hosts), Record(), NOW, new=NewCluster("fresh", 3))["new_cluster"]
    assert found["workload_ranges"] == ["10.103.201.0/25"], "/24 of the host is left alone"


def test_ids_of_clusters_that_were_removed_come_last() -> None:
    the_estate = estate()
    the_estate["clusters"]["cloud"]["state"] = "absent"
    record = recorded(planned(model(the_estate), planned(model())))
    del the_estate["clusters"]["cloud"]
    the_hosts = hosts()
    del the_hosts["c1"]
    the_model = model(the_estate, the_hosts)
    assert address_plan(the_model, record, NOW, new=NewCluster("cloud", 1))["new_cluster"]["id"] == 3


# Capacity


def problems(growth: Growth, the_model: Model | None = None, record: Record | None = None) -> list[str]:
    found: list[str] = address_plan(the_model or model(), record or Record(), NOW, growth)["problems"]
    return found


def small(prefix: int = 26, services: int = 28, node_prefix: int = 28) -> Model:
    the_estate = estate()
    the_estate["clusters"]["cloud"].update(
        workload_ranges=[f"10.102.0.0/{prefix}"], service_range=f"10.112.0.0/{services}", node_prefix=node_prefix
    )
    return model(the_estate)


def test_hosts_have_room_until_they_have_none() -> None:
    assert problems(Growth(of={("cloud", "hosts"): 3}), small()) == []
    assert problems(Growth(of={("cloud", "hosts"): 4}), small()) == [
        f"{C}.cloud.workload_ranges: there is room for 3 more hosts, and 4 are to come. Why: each host needs a range "
        "of its own, a /28. Next: add 10.102.0.64/26, which is free and holds 4 hosts."
    ]


def test_released_ranges_are_kept_back_for_30_days() -> None:
    the_estate, the_hosts = estate(), hosts()
    the_estate["clusters"]["cloud"]["workload_ranges"] = ["10.102.0.0/26"]
    the_hosts["c2"] = {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}
    before = planned(model(the_estate, the_hosts))
    the_hosts["c2"]["isthmus_state"] = "absent"
    record = recorded(planned(model(the_estate, the_hosts), before))
    del the_hosts["c2"]
    growth, the_model = Growth(of={("cloud", "hosts"): 3}), model(the_estate, the_hosts)
    [message] = problems(growth, the_model, record)
    assert "there is room for 2 more hosts (1 ranges released in the last 30 days are kept back), and 3" in message
    later = address_plan(the_model, record, NOW + timedelta(days=30), growth)
    assert later["problems"] == []


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(22, 27), st.integers(26, 28), st.integers(0, 12), st.booleans())
def test_room_for_hosts_is_what_the_planner_deals(prefix: int, node_prefix: int, pinned: int, known: bool) -> None:
    the_estate, the_hosts = estate(), hosts()
    node_prefix = max(node_prefix, prefix)
    the_estate["clusters"]["cloud"].update(workload_ranges=[f"10.102.0.0/{prefix}"], node_prefix=node_prefix)
    outer = IPv4Network(f"10.102.0.0/{prefix}")
    place = IPv4Network((int(outer.network_address) + 8 * pinned % outer.num_addresses, 29), strict=False)
    the_hosts["c1"].update(isthmus_node_range=str(place), isthmus_workloads=[])
    before = planned(model(the_estate, the_hosts))
    record = recorded(before) if known else Record()
    room = address_plan(model(the_estate, the_hosts), record, NOW)["clusters"][0]["hosts"]["room"]

    def with_more(count: int) -> Plan:
        more = copy.deepcopy(the_hosts)
        for number in range(count):
            more[f"c{number + 2}"] = {"isthmus_cluster": "cloud", "isthmus_underlay": f"198.18.9.{number + 1}"}
        return planned(model(the_estate, more), before if known else None)

    assert len(with_more(room).record["clusters/cloud"]["hosts"]) == room + 1
    with pytest.raises(ModelError, match="no free"):
        with_more(room + 1)


def test_workloads_have_room_on_their_hosts() -> None:
    assert problems(Growth(more={"workloads": 12})) == []
    found = problems(Growth(more={"workloads": 13}))
    assert found == [
        "cluster cloud: 1 host (c1) cannot hold 13 more workloads. Why: each workload has an address of its own in its "
        "host's range. Next: put workloads on other hosts: the ranges beside theirs are dealt."
    ], "no range is dealt yet, so none can be said to grow"
    found = problems(Growth(more={"workloads": 13}), record=recorded())
    assert "Next: set isthmus_node_range to 10.102.0.0/27 for c1." in found[0]
    [message] = problems(Growth(of={("onprem", "workloads"): 20, ("onprem", "hosts"): 1}), record=recorded())[:1]
    assert "3 hosts (o1, o2, o3) cannot hold 20 more workloads" in message
    assert "put workloads on other hosts" in message
    assert any(
        "node_prefix: a new host's /28 holds 13 workloads, and 20 are to come on each" in one and "27" in one
        for one in problems(Growth(more={"workloads": 20, "hosts": 1}))
    )


def test_services_have_room_in_each_cluster() -> None:
    assert problems(Growth(more={"services": 13}), small()) == []
    assert problems(Growth(more={"services": 14}), small()) == [
        f"{C}.cloud.service_range: 10.112.0.0/28 has 14 addresses, and 15 services are to have one. Why: a service has "
        "an address in each cluster that uses it, and released ones are kept back for 30 days. Next: let it grow to "
        "10.112.0.0/27, which is free."
    ]
    the_estate = estate()
    the_estate["clusters"]["cloud"]["service_range"] = "10.112.0.0/28"
    the_estate["reserved_ranges"] = [{"name": "x", "range": "10.112.0.16/30"}]
    [message] = problems(Growth(more={"services": 14}), model(the_estate))
    assert "it can only grow, and the rest of the /27 around it is not free" in message


def test_global_services_of_others_need_an_address_too() -> None:
    the_estate = estate()
    local = {**copy.deepcopy(the_estate["services"][0]), "name": "local", "global": False, "clusters": ["cloud"]}
    the_estate["services"] += [local, {**local, "name": "offered", "global": True}]
    found = {
        one["cluster"]: one["services"]["now"] for one in address_plan(model(the_estate), Record(), NOW)["clusters"]
    }
    assert found == {"cloud": 3, "onprem": 2}


@pytest.mark.parametrize(("max_clusters", "capacity"), [(255, 65535), (511, 32767)])
def test_identities(max_clusters: int, capacity: int) -> None:
    """One is there: workloads with the same labels share it."""
    the_estate, the_hosts = estate(), hosts()
    the_estate["max_clusters"] = max_clusters
    the_hosts["c2"] = {**the_hosts["c1"], "ansible_host": "198.18.2.2"}
    the_model = model(the_estate, the_hosts)
    found = address_plan(the_model, Record(), NOW)["clusters"][0]["identities"]
    assert found == {"now": 1, "growth": 0, "capacity": capacity}
    assert problems(Growth(more={"identities": capacity - 1}), the_model) == []
    [message] = problems(Growth(of={("cloud", "identities"): capacity}), the_model)
    assert (
        f"it has {capacity} identities, and {capacity + 1} sets of labels are to come. Why: an identity has" in message
    )


def test_cluster_ids() -> None:
    found = address_plan(model(), Record(), NOW, Growth(clusters=9), NewCluster("x", 1))
    assert found["cluster_ids"] == {"now": 2, "growth": 10, "capacity": 255}
    assert found["problems"] == []
    [message] = [one for one in problems(Growth(clusters=254)) if "max_clusters" in one]
    assert "2 of 255 ids are in use, and 254 clusters are to come" in message
    the_estate = estate()
    the_estate["clusters"] = {
        f"c{number}": {
            "id": number,
            "workload_ranges": [f"10.{number // 100}.{number % 100}.0/24"],
            "service_range": f"10.{100 + number // 100}.{number % 100}.0/24",
            "etcd": {"hosts": [f"h{number}"]},
        }
        for number in range(1, 256)
    }
    the_hosts = {
        f"h{number}": {"isthmus_cluster": f"c{number}", "ansible_host": f"198.18.1.{number}"}
        for number in range(1, 256)
    }
    full = address_plan(model(the_estate, the_hosts), Record(), NOW, new=NewCluster("x", 1))
    assert full["new_cluster"] is None
    assert "new cluster x: all 255 ids are in use" in full["problems"][0]


def test_private_space_for_more_clusters() -> None:
    the_estate = estate()
    the_estate["reserved_ranges"] = all_but_one()
    # 64 ranges of services fit into what is left, or 56 and in 7 of the others 8 workload ranges each.
    found = problems(Growth(clusters=64), model(the_estate))
    assert len(found) == 1
    assert "private space has ranges for 56 more clusters of 3 hosts, and 64 are to come" in found[0]
    assert problems(Growth(clusters=56), model(the_estate)) == []


def test_a_record_that_etcd_would_refuse() -> None:
    found = problems(Growth(of={("cloud", "hosts"): 4000, ("cloud", "workloads"): 12}))
    assert any("cluster cloud: its document in the estate record would have about" in one for one in found)
    made = address_plan(model(), Record(), NOW, new=NewCluster("x", 5000))
    assert "new cluster x: its document in the estate record would have about 1.56 MiB" in made["problems"][0]


def test_the_size_of_a_record_is_about_what_the_planner_writes() -> None:
    the_hosts = hosts()
    for number in range(200):
        the_hosts[f"machine-{number}"] = {
            "isthmus_cluster": "onprem",
            "isthmus_underlay": f"198.18.9.{number + 1}",
            "isthmus_workloads": [web()],
        }
    the_model = model(the_hosts=the_hosts)
    guessed, exact = (
        address_plan(the_model, record, NOW)["clusters"][1]["record_bytes"]["now"]
        for record in (Record(), recorded(planned(the_model)))
    )
    assert abs(guessed - exact) < exact / 4


# What an operator writes


@pytest.mark.parametrize(
    "given_growth",
    [
        "hosts=40, services=100 clusters=2,cloud.hosts=7",
        {"hosts": 40, "services": "100", "clusters": 2, "cloud.hosts": 7},
    ],
)
def test_growth_is_read(given_growth: Any) -> None:
    growth = read_growth(given_growth, ["cloud", "onprem"])
    assert growth == Growth(2, {"hosts": 40, "services": 100}, {("cloud", "hosts"): 7})
    assert (growth.get("cloud", "hosts"), growth.get("onprem", "hosts"), growth.get("cloud", "workloads")) == (7, 40, 0)
    assert read_growth("", []) == read_growth(None, []) == Growth()


@pytest.mark.parametrize(
    ("given_growth", "words"),
    [
        ("host=3", "'host' is nothing that grows"),
        ("cloud.clusters=3", "'cloud.clusters' is nothing that grows"),
        (
            "clod.hosts=3",
            "'clod' is not a cluster of this estate. Why: nothing could grow there. Next: did you mean 'cloud'?",
        ),
        ("hosts=-1", "-1 is out of range 0..1000000"),
        ("hosts=many", "'many' is not a whole number"),
        ("hosts", "'' is not a whole number"),
        ({"hosts": None}, "None is not a whole number"),
    ],
)
def test_growth_that_cannot_be_read(given_growth: Any, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_growth(given_growth, ["cloud", "onprem"])
    assert words in str(caught.value.problems[0])


@pytest.mark.parametrize(
    ("name", "nodes", "words"),
    [
        ("Paris", 3, "'Paris' is not a cluster name"),
        ("cloud", 3, "cloud is there already"),
        ("paris", "", "0 is out of range 1..5000"),
        ("", 3, "isthmus_new_cluster: it is missing"),
    ],
)
def test_a_new_cluster_that_cannot_be_proposed(name: str, nodes: Any, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_new_cluster(name, nodes, model(), Record())
    assert any(words in str(problem) for problem in caught.value.problems)


def test_none_is_named() -> None:
    assert read_new_cluster("", "", model(), Record()) is None
    assert read_new_cluster("paris", "40", model(), Record()) == NewCluster("paris", 40)


# What it looks like


def test_the_tables() -> None:
    text = lines(
        address_plan(model(), recorded(), NOW, read_growth("hosts=40", []), NewCluster("paris", 40), {"edge": "silent"})
    )
    assert "NOT READ: cluster edge: silent." in text
    assert "10.101.0.0/16  65536      workloads  onprem  3 hosts" in text
    [line] = [line for line in text if line.startswith("cloud ")]
    assert re.sub(" +", " ", line) == "cloud 2 1 (+40) of 4096 1 of 53248 1 of 65534 1 of 65535 1 (+8) of 1280"
    assert text[text.index("  paris:") : text.index("  paris:") + 4] == [
        "  paris:",
        "    id: 3",
        "    workload_ranges: [10.103.0.0/22]",
        "    service_range: 10.113.0.0/22",
    ]


def test_names_of_a_hostile_record_are_printed_harmlessly() -> None:
    documents = copy.deepcopy(dict(planned(model()).record))
    hostile = "x\x1b[2J\n- y\u202e"
    documents["clusters/cloud"]["hosts"][hostile] = documents["clusters/cloud"]["hosts"].pop("c1")
    documents["clusters/cloud"]["etcd"]["members"] = [hostile]
    documents["clusters/cloud"]["ca_host"] = hostile
    the_estate = estate()
    the_estate["reserved_ranges"] = [{"name": "x", "range": "10.112.0.0/24"}, {"name": "y", "range": "10.102.0.0/24"}]
    with pytest.raises(ModelError) as caught:
        model(the_estate)
    assert caught.value.draft is not None
    text = lines(address_plan(caught.value.draft, merge([documents]), NOW))
    assert all(line.isascii() and line.isprintable() for line in text)
    assert any("x?[2J?- y?" in line for line in text)


# The steps of docs/addresses.md


def test_hosts_are_renumbered_into_the_range_that_stands_first() -> None:
    """Out and in again with the free range in front; then the old one can go and the other side come."""
    the_estate, the_hosts = estate(), hosts()
    cluster = the_estate["clusters"]["onprem"]
    cluster["workload_ranges"] = ["10.101.0.0/27", "10.101.1.0/24"]
    the_hosts["o4"] = {"isthmus_cluster": "onprem", "ansible_host": "198.18.1.4", "isthmus_workloads": [web()]}
    before = planned(model(the_estate, the_hosts))
    assert before.record["clusters/onprem"]["hosts"]["o4"]["range4"] == "10.101.1.16/28"
    reserved = reserve("10.101.1.0/24")
    [message] = refusal(
        lambda e, h: (e.update(copy.deepcopy(the_estate)), h.update(the_hosts), reserved(e, h)), recorded(before)
    )
    assert (
        "2 hosts (o3, o4) and 1 address of workloads in 10.101.1.0/24 would change. Put 10.103.0.0/24 first" in message
    )

    cluster["workload_ranges"].insert(0, "10.103.0.0/24")
    cluster["etcd"]["hosts"] = ["o1"]
    before = planned(model(the_estate, the_hosts), before, prune=("member/onprem/o2", "member/onprem/o3"))
    for host in ("o3", "o4"):
        the_hosts[host]["isthmus_state"] = "absent"
        before = planned(model(the_estate, the_hosts), before)
        del the_hosts[host]["isthmus_state"]
        before = planned(model(the_estate, the_hosts), before)
    cluster["workload_ranges"].remove("10.101.1.0/24")
    reserved(the_estate, the_hosts)
    found = planned(model(the_estate, the_hosts), before).record["clusters/onprem"]["hosts"]
    assert [found[host]["range4"] for host in ("o1", "o3", "o4")] == [
        "10.101.0.0/28",
        "10.103.0.0/28",
        "10.103.0.16/28",
    ]


def test_a_cluster_is_renumbered_by_its_removal() -> None:
    the_estate, the_hosts = estate(), hosts()
    before = planned(model(the_estate, the_hosts))
    cluster = the_estate["clusters"]["cloud"]
    cluster["state"] = "absent"
    before = planned(model(the_estate, the_hosts), before)
    del cluster["state"]
    cluster["service_range"] = "10.113.0.0/16"
    reserve("10.112.0.0/16")(the_estate, the_hosts)
    found = planned(model(the_estate, the_hosts), before).record["clusters/cloud"]
    assert (found["service_range"], sorted(found["hosts"])) == ("10.113.0.0/16", ["c1"])
