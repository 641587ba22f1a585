# SPDX-License-Identifier: GPL-3.0-or-later
"""vpc_routes and vpc_peering on AWS: moto behind a proxy that is as strict as AWS (vpc_aws.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from unittest import mock

import botocore.loaders
import botocore.session
import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc import aws as shell
from module_runner import ModuleFailed, run_module
from vpc_aws import REGION, Aws, Network, aws_on_loopback
from vpc_modules import run, serving


@pytest.fixture(scope="module")
def loopback() -> Iterator[tuple[Aws, str]]:
    with aws_on_loopback() as found:
        yield found


# EC2's description is large, and each session would read it anew.
LOADER = botocore.loaders.create_loader()


@pytest.fixture
def aws(loopback: tuple[Aws, str], monkeypatch: pytest.MonkeyPatch) -> Aws:
    aws, url = loopback
    aws.reset()
    monkeypatch.setattr(botocore.session, "create_loader", lambda *_arguments: LOADER)
    # As AWX's credential type sets them.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-nobody-sees")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(shell, "PAUSE", 0.01)
    return aws


@pytest.fixture
def vpc(aws: Aws) -> Network:
    return Network(aws)


def options(vpc: Network, routes: dict[str, str], rules: Any = (), **more: Any) -> dict[str, Any]:
    return {
        "provider": "aws",
        "region": REGION,
        "network": vpc.vpc,
        "owner": "lab-cloud",
        "routes": [
            {"destination": destination, "gateway" if "-" in hop else "via": hop} for destination, hop in routes.items()
        ],
        "rules": list(rules),
        **more,
    }


OVERLAY = {"protocol": "udp", "port": 8472, "sources": ["172.31.0.0/16", "203.0.113.7"]}
ETCD = {"protocol": "tcp", "port": 2379, "sources": ["203.0.113.7"]}


def test_from_nothing_to_all_of_it_and_back(vpc: Network) -> None:
    one, two = vpc.interface("172.31.0.11"), vpc.interface("172.31.1.12", 1)
    bystander = vpc.interface("172.31.0.99")
    before = vpc.everything()
    wanted = options(vpc, {"10.102.0.0/28": "172.31.0.11", "10.102.0.16/28": "172.31.1.12"}, [OVERLAY, ETCD])

    predicted = run("vpc_routes", wanted, check=True)
    assert predicted["changed"] is True
    assert vpc.everything() == before

    made = run("vpc_routes", wanted)
    assert made["diff"] == predicted["diff"]
    assert sorted(made["route_tables"]) == sorted([vpc.table, vpc.main])
    for table in (vpc.table, vpc.main):
        assert vpc.routes(table) == {"10.102.0.0/28": one, "10.102.0.16/28": two}
        assert vpc.tags(table) == {"isthmus:lab-cloud:0": "10.102.0.0/28 10.102.0.16/28"}
    assert [vpc.look(interface)["SourceDestCheck"] for interface in (one, two, bystander)] == [False, False, True]
    (group,) = [one for one in vpc.everything()[2] if one["GroupName"] == "isthmus-lab-cloud"]
    rules = {
        (rule["IpProtocol"], rule["FromPort"], rule["ToPort"], source["CidrIp"])
        for rule in group["IpPermissions"]
        for source in rule["IpRanges"]
    }
    assert rules == {
        ("udp", 8472, 8472, "172.31.0.0/16"),
        ("udp", 8472, 8472, "203.0.113.7/32"),
        ("tcp", 2379, 2379, "203.0.113.7/32"),
    }
    groups = {name: [one["GroupId"] for one in vpc.look(name)["Groups"]] for name in (one, two, bystander)}
    assert group["GroupId"] in groups[one]
    assert len(groups[one]) == 2
    assert group["GroupId"] not in groups[bystander]

    again = run("vpc_routes", wanted)
    assert (again["changed"], again["diff"], again["warnings"]) == (False, [], [])

    gone = run("vpc_routes", {**wanted, "state": "absent"})
    assert gone["changed"] is True
    assert vpc.everything() == before
    assert run("vpc_routes", {**wanted, "state": "absent"})["changed"] is False


def test_drift_is_repaired_and_what_is_no_longer_wanted_goes(vpc: Network) -> None:
    one, two = vpc.interface("172.31.0.11"), vpc.interface("172.31.0.12")
    both = {"10.102.0.0/28": "172.31.0.11", "10.102.0.16/28": "172.31.0.12"}
    run("vpc_routes", options(vpc, both, [OVERLAY]))
    vpc.ec2.delete_route(RouteTableId=vpc.table, DestinationCidrBlock="10.102.0.0/28")
    vpc.ec2.replace_route(RouteTableId=vpc.table, DestinationCidrBlock="10.102.0.16/28", NetworkInterfaceId=one)
    vpc.ec2.modify_network_interface_attribute(NetworkInterfaceId=two, SourceDestCheck={"Value": True})
    (group,) = [one for one in vpc.everything()[2] if one["GroupName"] == "isthmus-lab-cloud"]
    open_to_all = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    vpc.ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[open_to_all])

    repaired = run("vpc_routes", options(vpc, both, [OVERLAY]))
    assert [change["before_header"] for change in repaired["diff"]] == [
        f"source/destination check of {two}",
        f"route 10.102.0.0/28 in {vpc.table}",
        f"route 10.102.0.16/28 in {vpc.table}",
        "rule tcp/22 of isthmus-lab-cloud",
    ]
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one, "10.102.0.16/28": two}
    assert vpc.look(two)["SourceDestCheck"] is False

    less = run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11"}))
    assert less["changed"] is True
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one}
    assert vpc.tags(vpc.table) == {"isthmus:lab-cloud:0": "10.102.0.0/28"}
    assert vpc.look(two)["SourceDestCheck"] is True
    assert [one["GroupName"] for one in vpc.everything()[2]] == ["default"]


def test_rules_made_by_hand_in_our_group_go_whatever_they_are(vpc: Network) -> None:
    vpc.interface("172.31.0.11")
    wanted = options(vpc, {"10.102.0.0/28": "172.31.0.11"}, [ETCD])
    run("vpc_routes", wanted)
    other = vpc.ec2.create_security_group(GroupName="other", Description="other", VpcId=vpc.vpc)["GroupId"]
    groups = {one["GroupName"]: one["GroupId"] for one in vpc.everything()[2]}
    sources = {"UserIdGroupPairs": [{"GroupId": groups["default"]}, {"GroupId": other}]}
    anyone = {"IpRanges": [{"CidrIp": "203.0.113.7/32"}]}
    for first, last, source in ((30000, 32767, anyone), (80, 80, anyone), (443, 443, sources)):
        by_hand = {"IpProtocol": "tcp", "FromPort": first, "ToPort": last, **source}
        vpc.ec2.authorize_security_group_ingress(GroupId=groups["isthmus-lab-cloud"], IpPermissions=[by_hand])

    repaired = run("vpc_routes", wanted)
    gone = sorted((one["before_header"], one["before"].strip()) for one in repaired["diff"])
    assert gone == [
        ("rule tcp/30000-32767 of isthmus-lab-cloud", "203.0.113.7/32"),
        *(("rule tcp/443 of isthmus-lab-cloud", one) for one in sorted((groups["default"], other))),
        ("rule tcp/80 of isthmus-lab-cloud", "203.0.113.7/32"),
    ]
    (group,) = [one for one in vpc.everything()[2] if one["GroupName"] == "isthmus-lab-cloud"]
    assert [(rule["FromPort"], rule["UserIdGroupPairs"]) for rule in group["IpPermissions"]] == [(2379, [])]
    assert run("vpc_routes", wanted)["changed"] is False


def test_ranges_of_one_host_are_one_route(vpc: Network) -> None:
    one, two = vpc.interface("172.31.0.11"), vpc.interface("172.31.0.12")
    pods = {f"10.102.0.{number}/32": "172.31.0.11" for number in range(16)}
    other = {"10.102.0.16/28": "172.31.0.12", "10.102.0.20/32": "172.31.0.11"}
    run("vpc_routes", options(vpc, {**pods, **other}))
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one, "10.102.0.16/28": two, "10.102.0.20/32": one}


def test_what_somebody_else_made_is_left_and_its_prefix_refused(vpc: Network) -> None:
    one, two = vpc.interface("172.31.0.11"), vpc.interface("172.31.0.12")
    vpc.ec2.modify_network_interface_attribute(NetworkInterfaceId=two, SourceDestCheck={"Value": False})
    for destination, target in (("10.9.0.0/16", two), ("10.102.0.0/28", two), ("10.102.0.16/28", one)):
        vpc.ec2.create_route(RouteTableId=vpc.table, DestinationCidrBlock=destination, NetworkInterfaceId=target)
    before = vpc.everything()
    with pytest.raises(ModuleFailed) as refusal:
        run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11", "10.103.0.0/28": "172.31.0.11"}, [OVERLAY]))
    assert f"{vpc.table}: 10.102.0.0/28 is somebody else's route to {two} and should lead to {one}" in refusal.value.msg
    assert vpc.everything() == before

    # The same route is no conflict, but it does not become ours.
    used = run("vpc_routes", options(vpc, {"10.102.0.16/28": "172.31.0.11", "10.103.0.0/28": "172.31.0.11"}))
    assert used["borrowed"] == [{"table": vpc.table, "destination": "10.102.0.16/28"}]
    assert vpc.tags(vpc.table) == {"isthmus:lab-cloud:0": "10.103.0.0/28"}
    run("vpc_routes", options(vpc, {}, state="absent"))
    assert vpc.everything() == before


def test_everything_from_a_range(vpc: Network) -> None:
    vpc.interface("172.31.0.11")
    every = {"protocol": "all", "sources": ["10.102.0.0/16"]}
    wanted = options(vpc, {"10.102.0.0/28": "172.31.0.11"}, [every, ETCD])
    run("vpc_routes", wanted)
    (group,) = [one for one in vpc.everything()[2] if one["GroupName"] == "isthmus-lab-cloud"]
    sources = {rule["IpProtocol"]: [one["CidrIp"] for one in rule["IpRanges"]] for rule in group["IpPermissions"]}
    assert sources == {"-1": ["10.102.0.0/16"], "tcp": ["203.0.113.7/32"]}
    assert run("vpc_routes", wanted)["changed"] is False
    less = run("vpc_routes", {**wanted, "rules": [ETCD]})
    assert [one["before_header"] for one in less["diff"]] == ["rule all of isthmus-lab-cloud"]


def test_a_host_that_is_away_keeps_no_other_closed(vpc: Network) -> None:
    one, two = vpc.interface("172.31.0.11"), vpc.interface("172.31.0.12")
    wanted = options(vpc, {}, [OVERLAY], hosts=["172.31.0.11", "172.31.0.12"])
    run("vpc_routes", wanted)
    vpc.ec2.delete_network_interface(NetworkInterfaceId=two)
    seen = run("vpc_routes", {**wanted, "rules": [OVERLAY, ETCD]})
    assert "172.31.0.12 (the host is gone); nothing is opened on it" in seen["warnings"][0]
    (group,) = [one for one in vpc.everything()[2] if one["GroupName"] == "isthmus-lab-cloud"]
    assert {rule["FromPort"] for rule in group["IpPermissions"]} == {8472, 2379}
    vpc.ec2.delete_network_interface(NetworkInterfaceId=one)
    with pytest.raises(ModuleFailed, match=r"172.31.0.11. Next: correct hosts, or start the host. .2. no network"):
        run("vpc_routes", wanted)


def test_of_a_network_that_is_gone_nothing_is_left(vpc: Network) -> None:
    missing = {**options(vpc, {}), "network": "vpc-0"}
    seen = run("vpc_routes", {**missing, "state": "absent"})
    assert (seen["changed"], "there is no such network any more" in seen["warnings"][0]) == (False, True)
    with pytest.raises(ModuleFailed, match=r"InvalidVpcID\.NotFound"):
        run("vpc_routes", {**missing, "rules": [OVERLAY]})


def test_two_owners_of_one_network_do_not_see_each_other(vpc: Network) -> None:
    one = vpc.interface("172.31.0.11")
    run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11"}, [OVERLAY], owner="lab"))
    run("vpc_routes", options(vpc, {"10.102.1.0/28": "172.31.0.11"}, [ETCD]))
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one, "10.102.1.0/28": one}
    run("vpc_routes", options(vpc, {}, owner="lab", state="absent"))
    assert vpc.routes(vpc.table) == {"10.102.1.0/28": one}
    # "lab" turned the check off, and what is left needs it off.
    assert vpc.look(one)["SourceDestCheck"] is False
    assert run("vpc_routes", options(vpc, {"10.102.1.0/28": "172.31.0.11"}, [ETCD]))["changed"] is False


def test_a_blackhole_is_told_and_follows_the_host(vpc: Network) -> None:
    old = vpc.interface("172.31.0.11")
    wanted = options(vpc, {"10.102.0.0/28": "172.31.0.11"})
    run("vpc_routes", wanted)
    vpc.ec2.delete_network_interface(NetworkInterfaceId=old)
    seen = run("vpc_routes", wanted)
    assert seen["changed"] is False
    assert [(one["destination"], one["target"], one["owned"]) for one in seen["blackholes"]] == [
        ("10.102.0.0/28", old, True)
    ]
    assert "the host is gone" in seen["warnings"][0]

    new = vpc.interface("172.31.0.11")
    followed = run("vpc_routes", wanted)
    assert followed["changed"] is True
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": new}


def test_routes_leave_the_table_of_a_subnet_that_no_host_is_in(vpc: Network) -> None:
    one, two = vpc.interface("172.31.0.11"), vpc.interface("172.31.1.12", 1)
    run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11", "10.102.0.16/28": "172.31.1.12"}))
    assert vpc.routes(vpc.main) == {"10.102.0.0/28": one, "10.102.0.16/28": two}
    run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11"}))
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one}
    assert (vpc.routes(vpc.main), vpc.tags(vpc.main)) == ({}, {})


def test_a_host_that_is_away_takes_no_route_from_its_subnet(vpc: Network) -> None:
    vpc.interface("172.31.0.11")
    two = vpc.interface("172.31.1.12", 1)
    wanted = options(vpc, {"10.102.0.0/28": "172.31.0.11", "10.102.0.16/28": "172.31.1.12"})
    run("vpc_routes", wanted)
    before = vpc.routes(vpc.main)
    vpc.ec2.delete_network_interface(NetworkInterfaceId=two)
    assert run("vpc_routes", wanted)["changed"] is False
    assert vpc.routes(vpc.main) == before


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ({"10.102.0.0/28": "172.31.0.77"}, "no network interface in .* has the address 172.31.0.77"),
        ({"10.102.0.1/28": "172.31.0.11"}, "routes.0..destination: '10.102.0.1/28' is no IPv4 prefix"),
        ({"172.31.8.0/24": "172.31.0.11"}, "172.31.8.0/24 overlaps 172.31.0.0/16, a range of vpc-"),
        ({"10.102.0.0/28": "foo-1"}, "'foo-1' is no target of AWS"),
        ({"10.102.0.0/28": "host"}, "routes.0..via: 'host' is no IPv4 address"),
    ],
)
def test_bad_input_changes_nothing(vpc: Network, aws: Aws, routes: dict[str, str], words: str) -> None:
    vpc.interface("172.31.0.11")
    with pytest.raises(ModuleFailed, match=words):
        run("vpc_routes", options(vpc, {**routes, "10.109.0.0/28": "172.31.0.11"}, [OVERLAY]))
    assert {call.rstrip("?") for call in aws.calls if not call.startswith("Describe")} <= set()


def test_a_table_that_is_too_small(vpc: Network, aws: Aws) -> None:
    one, two = vpc.interface("172.31.0.11"), vpc.interface("172.31.0.12")
    routes = {f"10.102.{number}.0/28": f"172.31.0.1{1 + number % 2}" for number in range(6)}
    for number in range(2):
        vpc.ec2.create_route(RouteTableId=vpc.table, DestinationCidrBlock=f"10.8.{number}.0/24", NetworkInterfaceId=one)
    aws.quota = 6
    before = vpc.everything()
    with pytest.raises(ModuleFailed) as refusal:
        run("vpc_routes", options(vpc, routes))
    assert f"{vpc.table} holds 6 routes, the plan needs 8 (2 of others). No two of them can be one" in refusal.value.msg
    with pytest.raises(ModuleFailed) as refusal:
        run("vpc_routes", options(vpc, {**{f"10.102.{n}.0/28": "172.31.0.11" for n in range(6)}}))
    assert (
        f"Aggregate like this: 10.102.0.0/23 to {one}, 10.102.2.0/23 to {one}; or raise the quota" in refusal.value.msg
    )
    assert vpc.everything() == before
    assert run("vpc_routes", options(vpc, routes, route_limit=8), check=True)["changed"] is True

    # Nobody may ask for the quota: it is met on the way, and the next run does the rest.
    aws.quota_denied = True
    with pytest.raises(ModuleFailed) as refusal:
        run("vpc_routes", options(vpc, routes))
    assert "permission servicequotas:GetServiceQuota" in refusal.value.result["warnings"][0]
    assert "CreateRoute: RouteLimitExceeded" in refusal.value.msg
    assert refusal.value.result["changed"] is True
    assert len(refusal.value.result["done"]) == len(refusal.value.result["diff"])
    assert refusal.value.result["not_done"][0] == f"route 10.102.4.0/28 in {vpc.table}"
    assert len(vpc.routes(vpc.table)) == 6
    aws.quota = 50
    rest = run("vpc_routes", options(vpc, routes))
    assert [change["before_header"] for change in rest["diff"]] == [
        f"route 10.102.{number}.0/28 in {vpc.table}" for number in (4, 5)
    ]
    run("vpc_routes", options(vpc, routes, state="absent"))
    assert set(vpc.routes(vpc.table)) == {"10.8.0.0/24", "10.8.1.0/24"}
    assert two not in vpc.routes(vpc.table).values()


def test_a_table_that_is_full_takes_other_routes(vpc: Network, aws: Aws) -> None:
    one, two = vpc.interface("172.31.0.11"), vpc.interface("172.31.0.12")
    aws.quota = 2
    run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11", "10.103.0.0/28": "172.31.0.12"}))
    changed = options(vpc, {"10.102.0.0/24": "172.31.0.11", "10.104.0.0/28": "172.31.0.12"})
    seen = run("vpc_routes", changed)
    assert vpc.routes(vpc.table) == {"10.102.0.0/24": one, "10.104.0.0/28": two}
    assert vpc.tags(vpc.table) == {"isthmus:lab-cloud:0": "10.102.0.0/24 10.104.0.0/28"}
    assert f"{vpc.table} holds 2 routes" in seen["warnings"][0]
    assert run("vpc_routes", changed)["changed"] is False


def test_a_group_that_is_too_small(vpc: Network, aws: Aws) -> None:
    vpc.interface("172.31.0.11")
    many = {**OVERLAY, "sources": [f"198.18.{number}.1" for number in range(61)]}
    wanted = options(vpc, {"10.102.0.0/28": "172.31.0.11"}, [many])
    before = vpc.everything()
    with pytest.raises(ModuleFailed, match="security group isthmus-lab-cloud holds 60 rules, the plan needs 61"):
        run("vpc_routes", wanted)
    assert vpc.everything() == before
    aws.rules = 100  # moto itself has never more than 60
    assert run("vpc_routes", wanted, check=True)["changed"] is True


@pytest.mark.parametrize(
    "action",
    ["CreateRoute", "CreateTags", "ModifyNetworkInterfaceAttribute", "CreateSecurityGroup", "DescribeRouteTables"],
)
@pytest.mark.parametrize("check", [True, False])
def test_a_missing_permission_is_named_before_anything_changes(
    vpc: Network, aws: Aws, action: str, check: bool
) -> None:
    vpc.interface("172.31.0.11")
    before = vpc.everything()
    aws.denied = {action}
    with pytest.raises(ModuleFailed) as refusal:
        run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11"}, [OVERLAY]), check=check)
    assert f"nothing was changed; permission missing: ec2:{action} (call {action}" in refusal.value.msg
    assert vpc.everything() == before


def test_throttled_calls_are_made_again(vpc: Network, aws: Aws) -> None:
    one = vpc.interface("172.31.0.11")
    aws.throttled = {"DescribeNetworkInterfaces": 2, "CreateRoute": 2, "DeleteRoute": 1}
    run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11"}))
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one}
    assert aws.throttled["CreateRoute"] == 0


def test_more_destinations_than_one_tag_holds(vpc: Network) -> None:
    for number in range(2):
        vpc.interface(f"172.31.0.1{number}")
    routes = {f"10.102.{number}.0/28": f"172.31.0.1{number % 2}" for number in range(40)}
    run("vpc_routes", options(vpc, routes))
    tags = vpc.tags(vpc.table)
    assert len(tags) > 1
    assert max(map(len, tags.values())) <= 256
    assert run("vpc_routes", options(vpc, routes))["changed"] is False
    few = dict(list(routes.items())[30:])
    run("vpc_routes", options(vpc, few))
    assert set(vpc.routes(vpc.table)) == set(few)
    assert len(vpc.tags(vpc.table)) < len(tags)
    assert run("vpc_routes", options(vpc, few))["changed"] is False


def test_peering(aws: Aws) -> None:
    first, second = Network(aws), Network(aws, "172.30.0.0/16")
    first.interface("172.31.0.11")
    sides = [{"network": one.vpc, "region": REGION} for one in (first, second)]
    wanted = {"provider": "aws", "owner": "lab", "sides": sides}
    assert run("vpc_peering", wanted, check=True)["changed"] is True
    made = run("vpc_peering", wanted)
    (found,) = first.ec2.describe_vpc_peering_connections()["VpcPeeringConnections"]
    assert (made["peering"], found["Status"]["Code"]) == (found["VpcPeeringConnectionId"], "active")
    again = run("vpc_peering", wanted)
    assert (again["changed"], again["peering"]) == (False, made["peering"])
    hosts = {"hosts": ["172.31.0.11"]}
    run("vpc_routes", options(first, {"172.30.0.0/16": made["peering"]}, **hosts))
    assert first.routes(first.table) == {"172.30.0.0/16": made["peering"]}
    with pytest.raises(ModuleFailed, match="a VPC peering delivers to the ranges of its two VPCs only"):
        run("vpc_routes", options(first, {"10.103.0.0/16": made["peering"]}, **hosts))
    # Or the peer is named, and its ranges are asked for.
    peered = options(first, {}, peers=[second.vpc, "vpc-0"], **hosts)
    seen = run("vpc_routes", peered)
    assert (seen["changed"], first.routes(first.table)) == (False, {"172.30.0.0/16": made["peering"]})
    assert f"{first.vpc} and vpc-0 are not peered" in seen["warnings"][0]
    run("vpc_routes", options(first, {}, state="absent"))
    run("vpc_routes", peered)
    assert first.routes(first.table) == {"172.30.0.0/16": made["peering"]}
    # Another owner uses it and leaves it.
    assert run("vpc_peering", {**wanted, "owner": "other"})["changed"] is False
    assert run("vpc_peering", {**wanted, "owner": "other", "state": "absent"})["changed"] is False
    assert run("vpc_peering", {**wanted, "state": "absent"})["changed"] is True
    assert run("vpc_peering", {**wanted, "state": "absent"})["changed"] is False


def test_a_peering_takes_its_time(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Network(aws), Network(aws, "172.30.0.0/16")
    first.interface("172.31.0.11")
    sides = [{"network": one.vpc, "region": REGION} for one in (first, second)]
    wanted = {"provider": "aws", "owner": "lab", "sides": sides}
    with monkeypatch.context() as hurried:
        hurried.setattr(shell, "PATIENCE", 0)
        with pytest.raises(ModuleFailed, match=f"is not to be seen in {REGION}, not pending-acceptance") as failure:
            run("vpc_peering", wanted)
    name = failure.value.result["peering"]
    # The next run goes on from there, and one after it from where it was accepted.
    assert [one["after"].strip() for one in run("vpc_peering", wanted)["diff"]] == ["active"]
    aws.ahead[name] = ["provisioning", "provisioning"]
    aws.calls.clear()
    assert run("vpc_peering", wanted)["peering"] == name
    assert set(aws.calls) == {"DescribeVpcPeeringConnections", "DescribeVpcs"}

    peered = options(first, {}, peers=[second.vpc], hosts=["172.31.0.11"])
    aws.ahead[name] = ["provisioning"]
    seen = run("vpc_routes", peered)
    assert (seen["changed"], first.routes(first.table)) == (False, {})
    assert f"{name} of {first.vpc} and {second.vpc} is provisioning and names no ranges" in seen["warnings"][0]
    seen = run("vpc_routes", peered)
    assert (seen["warnings"], first.routes(first.table)) == ([], {"172.30.0.0/16": name})

    first.ec2.delete_vpc_peering_connection(VpcPeeringConnectionId=name)
    made = run("vpc_peering", wanted)["peering"]
    assert made != name
    second.ec2.delete_vpc_peering_connection(VpcPeeringConnectionId=made)
    aws.ahead[made] = ["provisioning"]
    with pytest.raises(ModuleFailed, match=f"{made} is deleted in {REGION}, not pending-acceptance"):
        run("vpc_peering", wanted)


def test_a_group_that_does_not_appear_is_told(vpc: Network, aws: Aws) -> None:
    refusal = aws.refusal

    def unseen(action: str, query: dict[str, str]) -> tuple[int, str, str] | None:
        if action == "DescribeSecurityGroups" and "GroupId.1" in query:
            return 403, "UnauthorizedOperation", "You are not authorized to perform this operation."
        return refusal(action, query)

    vpc.interface("172.31.0.11")
    with (
        mock.patch.object(aws, "refusal", unseen),
        pytest.raises(ModuleFailed, match="security_group_exists: Waiter SecurityGroupExists failed") as failure,
    ):
        run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11"}, [ETCD]))
    assert failure.value.result["not_done"][0] == "security group isthmus-lab-cloud"
    assert run("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11"}, [ETCD]))["changed"] is True


def test_networks_that_overlap_are_not_peered(aws: Aws) -> None:
    sides = [{"network": Network(aws).vpc, "region": REGION} for _number in range(2)]
    with pytest.raises(ModuleFailed, match=r"172.31.0.0/16 of vpc-.* overlap; such networks cannot be peered"):
        run("vpc_peering", {"provider": "aws", "owner": "lab", "sides": sides})


def test_as_ansible_runs_it(vpc: Network) -> None:
    """In a process of its own, with the credentials in the environment and nowhere in what it says."""
    one = vpc.interface("172.31.0.11")
    result = run_module("vpc_routes", options(vpc, {"10.102.0.0/28": "172.31.0.11"}), bundle=False)
    assert result["changed"] is True
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one}
    assert "a-secret-that-nobody-sees" not in str(result)
    assert "AKIDEXAMPLE" not in str(result)


class Metadata(BaseHTTPRequestHandler):
    """What an instance asks for the credentials of its role: only who has a token of IMDSv2 is told."""

    ROLES = "/latest/meta-data/iam/security-credentials/"

    def log_message(self, *_arguments: Any) -> None:
        pass

    def answer(self, found: str | None) -> None:
        self.send_response(200 if found is not None else 404)
        self.end_headers()
        self.wfile.write((found or "").encode())

    def do_PUT(self) -> None:
        self.answer("a-session" if self.path == "/latest/api/token" else None)

    def do_GET(self) -> None:
        keys = {"AccessKeyId": "AKIDROLE", "SecretAccessKey": "a-role-s-secret", "Token": "a-role-s-token"}
        role = {"Code": "Success", "Type": "AWS-HMAC", "Expiration": "2999-01-01T00:00:00Z", **keys}
        known = {self.ROLES: "isthmus", f"{self.ROLES}isthmus": json.dumps(role)}
        self.answer(known.get(self.path) if self.headers.get("X-aws-ec2-metadata-token") == "a-session" else None)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the client looks for profiles; there is none yet."""
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def test_a_profile_is_taken_rather_than_the_environment_s_keys(vpc: Network, aws: Aws, files: Path) -> None:
    (files / "aws_config_file").write_text(f"[profile lab]\nregion = {REGION}\n")
    (files / "aws_shared_credentials_file").write_text(
        "[lab]\naws_access_key_id = AKIDPROFILE\naws_secret_access_key = a-profile-s-secret\n"
    )
    one = vpc.interface("172.31.0.11")
    wanted = {**options(vpc, {"10.102.0.0/28": "172.31.0.11"}), "region": None}
    made = run("vpc_routes", {**wanted, "profile": "lab"})
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one}
    assert aws.signed == {("AKIDPROFILE", REGION, "")}
    assert "a-profile-s-secret" not in str(made)
    with pytest.raises(ModuleFailed, match=r"nothing was changed.*boto3: The config profile \(elsewhere\) could not"):
        run("vpc_routes", {**wanted, "profile": "elsewhere"})


def test_a_machine_s_own_role_is_taken_where_there_are_no_other_credentials(
    vpc: Network, aws: Aws, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    one = vpc.interface("172.31.0.11")
    wanted = options(vpc, {"10.102.0.0/28": "172.31.0.11"})
    with pytest.raises(ModuleFailed, match=r"nothing was changed.*Unable to locate credentials"):
        run("vpc_routes", wanted)  # off, and no profile
    with serving(Metadata) as server:
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        made = run("vpc_routes", wanted)
    assert vpc.routes(vpc.table) == {"10.102.0.0/28": one}
    assert aws.signed == {("AKIDROLE", REGION, "a-role-s-token")}
    assert "a-role-s-secret" not in str(made)
