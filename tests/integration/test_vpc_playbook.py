# SPDX-License-Identifier: GPL-3.0-or-later
"""VPCs of the inventory under `site`, `plan`, `verify` and `teardown`: the playbooks, their plan, the role and its
modules are real, AWS is moto behind the proxy of vpc_aws.py, Google is vpc_google.py, modules on hosts are
`fake_modules.py`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from integration.test_batches_playbook import Site, fake, said
from vpc_aws import REGION, Aws, Network, aws_on_loopback
from vpc_google import TOKEN, Google, google_on_loopback

CLUSTERS: dict[str, tuple[list[str], list[str]]] = {"a": (["a1"], []), "b": (["b1"], ["b2"]), "c": (["c1"], [])}
ADDRESSES = {"b1": "172.31.0.11", "b2": "172.31.1.12", "c1": "172.30.0.11"}


@pytest.fixture(scope="module")
def loopback() -> Iterator[tuple[Aws, str]]:
    with aws_on_loopback() as found:
        yield found


class InVpcs(Site):
    """`addresses` are those of hosts that are in VPCs; `sites` are the inventory's."""

    addresses: Mapping[str, str]
    sites: dict[str, Any]

    def inventory(self) -> Path:
        self.estate = {**self.estate, "sites": self.sites}
        path = super().inventory()
        content = json.loads(path.read_text())
        for group in content["all"]["children"].values():
            for host in set(group["hosts"]) & set(self.addresses):
                group["hosts"][host]["isthmus_underlay"] = self.addresses[host]
        path.write_text(json.dumps(content))
        return path


class Cloud(InVpcs):
    """Site b has a VPC, and so has c when it is told; a is somewhere else."""

    addresses: Mapping[str, str] = MappingProxyType(ADDRESSES)

    def __init__(self, place: Path, aws: Aws, url: str) -> None:
        super().__init__(place, CLUSTERS)
        aws.reset()
        self.aws = aws
        self.b, self.c = Network(aws), Network(aws, "172.30.0.0/16")
        self.interfaces = {
            "b1": self.b.interface(ADDRESSES["b1"]),
            "b2": self.b.interface(ADDRESSES["b2"], 1),
            "c1": self.c.interface(ADDRESSES["c1"]),
        }
        self.environment = {
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-sees",
            "AWS_ENDPOINT_URL": url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.sites = {"a": {}, "b": {"vpc": self.vpc(self.b)}, "c": {}}
        fake(self.here, "teardown")

    def vpc(self, network: Network) -> dict[str, Any]:
        return {"provider": "aws", "network": network.vpc, "region": REGION, "manage": ["routes", "firewall"]}

    def opened(self, network: Network) -> dict[int, set[str]]:
        """By port, who may reach it."""
        groups = [one for one in network.everything()[2] if one["GroupName"].startswith("isthmus-")]
        return {
            rule["FromPort"]: {source["CidrIp"] for source in rule["IpRanges"]}
            for group in groups
            for rule in group["IpPermissions"]
        }

    def destinations(self, network: Network) -> set[str]:
        return set(network.routes(network.table))


@pytest.fixture
def cloud(loopback: tuple[Aws, str], tmp_path: Path) -> Cloud:
    return Cloud(tmp_path, *loopback)


@pytest.mark.slow
def test_a_vpc_from_nothing_over_drift_to_nothing(cloud: Cloud) -> None:
    network, before = cloud.b, cloud.b.everything()
    shown = said(cloud.run(name="plan"))
    assert f"site b: aws {network.vpc}, as e-b: routes 10.102.0.0/28 to 172.31.0.11" in shown
    assert network.everything() == before

    first = cloud.run()
    assert first.status == 0, first.output
    assert "a-secret-that-nobody-sees" not in first.output
    assert network.routes(network.table) == {
        "10.102.0.0/28": cloud.interfaces["b1"],
        "10.102.0.16/28": cloud.interfaces["b2"],
    }
    readers = {"192.0.1.1/32", "172.30.0.11/32", "172.31.1.12/32"}
    assert cloud.opened(network) == {2379: readers, 8472: readers | {"172.31.0.11/32"}}
    assert not network.look(cloud.interfaces["b1"])["SourceDestCheck"]
    set_up = network.everything()

    again = cloud.run()
    assert (again.status, again.changed) == (0, {}), again.output
    assert {name: recap.ok for name, recap in again.hosts.items() if recap.ok > 11} == {}
    assert network.everything() == set_up

    one = cloud.interfaces["b1"]
    network.ec2.delete_route(RouteTableId=network.table, DestinationCidrBlock="10.102.0.16/28")
    network.ec2.modify_network_interface_attribute(NetworkInterfaceId=one, SourceDestCheck={"Value": True})
    network.ec2.create_route(RouteTableId=network.table, DestinationCidrBlock="10.9.0.0/16", NetworkInterfaceId=one)
    drift = cloud.run(name="verify")
    assert drift.status == 2, drift.output
    assert f"site b: route 10.102.0.16/28 in {network.table} is missing ({cloud.interfaces['b2']})." in said(drift)
    assert f"site b: source/destination check of {one} is on, and should be off." in said(drift)
    assert "10.9.0.0/16" not in said(drift), "it is somebody else's"
    cloud.aws.calls.clear()
    elsewhere = cloud.run("--limit", "a1,c1")
    assert (elsewhere.status, elsewhere.changed, cloud.aws.calls) == (0, {}, []), "no host of the VPC is in the run"
    repaired = cloud.run("--limit", "b2", "--tags", "vpc")
    assert repaired.status == 0, repaired.output
    assert cloud.destinations(network) == {"10.102.0.0/28", "10.102.0.16/28", "10.9.0.0/16"}
    network.ec2.delete_route(RouteTableId=network.table, DestinationCidrBlock="10.9.0.0/16")
    assert network.everything() == set_up

    cloud.sites["b"] = {}
    gone = cloud.run("-e", "isthmus_prune=vpc/b")
    assert gone.status == 0, gone.output
    assert network.everything() == before


def test_what_one_vpc_refuses_leaves_the_other_and_all_hosts_as_they_are(cloud: Cloud) -> None:
    cloud.sites["c"] = {"vpc": cloud.vpc(cloud.c)}
    foreign = cloud.c.interface("172.30.0.99")
    cloud.c.ec2.create_route(
        RouteTableId=cloud.c.table, DestinationCidrBlock="10.103.0.0/28", NetworkInterfaceId=foreign
    )
    before = cloud.b.everything(), cloud.c.everything()
    refused = cloud.run()
    assert refused.status == 2, refused.output
    assert f"{cloud.c.table}: 10.103.0.0/28 is somebody else's route to {foreign}" in said(refused)
    cloud.c.ec2.delete_route(RouteTableId=cloud.c.table, DestinationCidrBlock="10.103.0.0/28")
    cloud.aws.denied = {"CreateRoute"}
    denied = cloud.run()
    assert denied.status == 2, denied.output
    assert "nothing was changed; permission missing: ec2:CreateRoute (call CreateRoute" in said(denied)
    cloud.c.ec2.create_route(
        RouteTableId=cloud.c.table, DestinationCidrBlock="10.103.0.0/28", NetworkInterfaceId=foreign
    )
    assert (cloud.b.everything(), cloud.c.everything()) == before
    assert [cloud.calls(name) for name in ("preflight", "node")] == [[], []]


@pytest.mark.slow
def test_what_a_removed_host_needed_goes_when_the_others_were_changed(cloud: Cloud) -> None:
    assert cloud.run().status == 0
    cloud.removed = ("b2",)
    (cloud.place / "fail" / "node a1").touch()
    failed = cloud.run()
    assert failed.status == 2, failed.output
    assert "10.102.0.16/28" in cloud.destinations(cloud.b), "the hosts have not been changed yet"
    (cloud.place / "fail" / "node a1").unlink()
    done = cloud.run()
    assert done.status == 0, done.output
    assert cloud.destinations(cloud.b) == {"10.102.0.0/28"}
    assert "172.31.1.12/32" not in cloud.opened(cloud.b)[8472]


@pytest.mark.slow
def test_ports_close_when_the_last_step_of_encryption_is_done(cloud: Cloud) -> None:
    assert cloud.run().status == 0
    cloud.estate = {"encryption": "wireguard"}
    (cloud.place / "fail" / "verify c1 step").touch()
    halfway = cloud.run("-e", "isthmus_serial=100%")
    assert halfway.status == 2, halfway.output
    assert set(cloud.opened(cloud.b)) == {2379, 8472, 51871}
    (cloud.place / "fail" / "verify c1 step").unlink()
    done = cloud.run("-e", "isthmus_serial=100%")
    assert done.status == 0, done.output
    assert set(cloud.opened(cloud.b)) == {2379, 51871}
    again = cloud.run()
    assert (again.status, again.changed) == (0, {}), again.output


def test_a_vpc_that_stays_for_hosts_of_no_teardown_is_named(cloud: Cloud) -> None:
    confirmed = ("-e", "isthmus_confirm_teardown=e")
    some = cloud.run(*confirmed, "--limit", "a1,b1", name="teardown")
    assert some.status == 0, some.output
    assert "The VPC of site b keeps its routes and open ports, for hosts of the site that are not of this run: b2." in (
        said(some)
    )
    rest = cloud.run(*confirmed, "--limit", "b1,b2", name="teardown")
    assert rest.status == 0, rest.output
    assert "The VPC of site" not in said(rest)
    cloud.sites["b"] = {}
    none = cloud.run(*confirmed, "--limit", "b1", name="teardown")
    assert none.status == 0, none.output


@pytest.mark.slow
def test_two_vpcs_are_peered_put_right_and_torn_down(cloud: Cloud) -> None:
    before = cloud.b.everything(), cloud.c.everything()
    cloud.sites["c"] = {"vpc": cloud.vpc(cloud.c)}
    cloud.estate = {"site_pairs": [{"sites": ["b", "c"], "vpc_peering": True}]}
    made = cloud.run()
    assert made.status == 0, made.output
    (peering,) = cloud.b.ec2.describe_vpc_peering_connections()["VpcPeeringConnections"]
    assert peering["Status"]["Code"] == "active"
    name = peering["VpcPeeringConnectionId"]
    assert cloud.b.routes(cloud.b.table)["172.30.0.0/16"] == name
    assert cloud.c.routes(cloud.c.table)["172.31.0.0/16"] == name
    again = cloud.run()
    assert (again.status, again.changed) == (0, {}), again.output

    # What a hand changed is named, and put right by the run that takes away what a removed host needed.
    one, two = cloud.interfaces["b1"], cloud.interfaces["b2"]
    cloud.b.ec2.delete_route(RouteTableId=cloud.b.table, DestinationCidrBlock="10.102.0.0/28")
    cloud.b.ec2.modify_network_interface_attribute(NetworkInterfaceId=one, SourceDestCheck={"Value": True})
    cloud.b.ec2.create_route(RouteTableId=cloud.b.table, DestinationCidrBlock="10.9.0.0/16", NetworkInterfaceId=one)
    drift = cloud.run("--tags", "vpc", name="verify")
    assert drift.status == 2, drift.output
    assert f"site b: route 10.102.0.0/28 in {cloud.b.table} is missing ({one})." in said(drift)
    assert f"site b: source/destination check of {one} is on, and should be off." in said(drift)
    assert "10.9.0.0/16" not in said(drift), "it is somebody else's"
    assert cloud.destinations(cloud.b) == {"10.9.0.0/16", "10.102.0.16/28", "172.30.0.0/16"}
    cloud.removed = ("b2",)
    less = cloud.run()
    assert less.status == 0, less.output
    assert cloud.destinations(cloud.b) == {"10.9.0.0/16", "10.102.0.0/28", "172.30.0.0/16"}
    assert [cloud.b.look(each)["SourceDestCheck"] for each in (one, two)] == [False, True]
    assert "172.31.1.12/32" not in cloud.opened(cloud.b)[8472]
    cloud.b.ec2.delete_route(RouteTableId=cloud.b.table, DestinationCidrBlock="10.9.0.0/16")

    down = cloud.run("-e", "isthmus_confirm_teardown=e", name="teardown")
    assert down.status == 0, down.output
    assert (cloud.b.everything(), cloud.c.everything()) == before
    states = [one["Status"]["Code"] for one in cloud.b.ec2.describe_vpc_peering_connections()["VpcPeeringConnections"]]
    assert set(states) <= {"deleted"}


class Project(InVpcs):
    """Site b is in a network of a project of Google's; a is somewhere else."""

    addresses: Mapping[str, str] = MappingProxyType({"b1": "10.128.0.11"})

    def __init__(self, place: Path, google: Google, account: Path) -> None:
        super().__init__(place, {"a": (["a1"], []), "b": (["b1"], [])})
        google.reset()
        google.network("lab", "10.128.0.0/20", "10.4.0.0/14")
        google.instance("one", "10.128.0.11", "lab")
        self.environment = {"GOOGLE_APPLICATION_CREDENTIALS": str(account)}
        vpc = {"provider": "google", "network": "lab", "endpoint": google.root, "manage": ["routes", "firewall"]}
        self.sites = {"a": {}, "b": {"vpc": vpc}}
        fake(self.here, "teardown")


def test_google_from_nothing_over_drift_to_nothing(tmp_path: Path) -> None:
    with google_on_loopback(tmp_path) as (google, account):
        site = Project(tmp_path / "site", google, account)

        def state() -> Any:
            return copy.deepcopy((google.routes, google.firewalls))

        before = state()
        first = site.run()
        assert first.status == 0, first.output
        ours = "isthmus.mesh owner=e-b"
        assert [
            (one["destRange"], one["nextHopIp"]) for one in google.routes.values() if one.get("description") == ours
        ] == [("10.102.0.0/28", "10.128.0.11")]
        assert {
            rule["allowed"][0]["ports"][0]: (rule["description"], rule["sourceRanges"], rule["destinationRanges"])
            for rule in google.firewalls.values()
        } == {port: (ours, ["192.0.1.1/32"], ["10.128.0.11/32"]) for port in ("2379", "8472")}

        (name,) = [name for name, one in google.routes.items() if one.get("description") == ours]
        del google.routes[name]
        google.firewalls["isthmus-e-b-udp-8472"]["sourceRanges"] = ["0.0.0.0/0"]
        drift = site.run("--tags", "vpc", name="verify")
        assert drift.status == 2, drift.output
        words = said(drift).partition("VPCs are not as the plan says: ")[2].partition(" Next: ")[0]
        assert words.count("site b: ") == 2, "all else is as the plan says"
        assert f"site b: route {name} of lab is missing (10.102.0.0/28 to 10.128.0.11)." in words
        assert "site b: firewall rule isthmus-e-b-udp-8472 of lab is INGRESS udp/8472" in words

        down = site.run("-e", "isthmus_confirm_teardown=e", name="teardown")
        assert down.status == 0, down.output
        assert state() == before
        assert google.wrong == []
        for run in (first, drift, down):
            assert TOKEN not in run.output
            assert "PRIVATE KEY" not in run.output
