# SPDX-License-Identifier: GPL-3.0-or-later
"""vpc_routes and vpc_peering on Azure: what is written is held against the models of Azure's own client."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import azure.identity
import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc import azure as shell
from azure.mgmt.network import models
from module_runner import ModuleFailed, run_module
from vpc_azure import GROUP, NETWORK, SUBSCRIPTION, TOKEN, Azure, azure_on_loopback, problems
from vpc_modules import run


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Azure, Path]]:
    with azure_on_loopback(tmp_path_factory.mktemp("azure")) as found:
        yield found


@pytest.fixture
def cloud(loopback: tuple[Azure, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Azure]:
    """Two subnets: `a` with a route table and a security group of somebody else's, `b` with neither."""
    cloud, certificate = loopback
    cloud.reset()
    cloud.put("routeTables/theirs", {"routes": []})
    cloud.put("networkSecurityGroups/guard", {"securityRules": []})
    refer = {
        "routeTable": {"id": f"{NETWORK}/routeTables/theirs"},
        "networkSecurityGroup": {"id": f"{NETWORK}/networkSecurityGroups/guard"},
    }
    subnets = [
        cloud.subnet("lab", "a", addressPrefix="10.20.0.0/24", **refer),
        cloud.subnet("lab", "b", addressPrefix="10.20.1.0/24", serviceEndpoints=[{"service": "Microsoft.Storage"}]),
    ]
    cloud.put("virtualNetworks/lab", {"addressSpace": {"addressPrefixes": ["10.20.0.0/16"]}, "subnets": subnets})
    for name, address, subnet in (("one", "10.20.0.11", "a"), ("two", "10.20.1.12", "b"), ("three", "10.20.1.13", "b")):
        cloud.interface(name, address, f"virtualNetworks/lab/subnets/{subnet}")
    monkeypatch.setenv("AZURE_SUBSCRIPTION_ID", SUBSCRIPTION)
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{cloud.root}/identity")
    monkeypatch.setenv("IDENTITY_HEADER", "here")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    yield cloud
    assert cloud.wrong == []


OVERLAY = {"protocol": "udp", "port": 8472, "sources": ["10.20.0.0/16", "203.0.113.7"]}
BOTH = {"10.102.0.0/28": "10.20.0.11", "10.102.0.16/28": "10.20.1.12"}


def options(cloud: Azure, routes: dict[str, str], rules: Any = (), **more: Any) -> dict[str, Any]:
    return {
        "provider": "azure",
        "endpoint": cloud.root,
        "resource_group": GROUP,
        "network": "lab",
        "owner": "lab-cloud",
        "routes": [
            {"destination": destination, "via" if "." in hop else "gateway": hop} for destination, hop in routes.items()
        ],
        "rules": list(rules),
        **more,
    }


def routes(cloud: Azure, table: str) -> dict[str, str]:
    return {
        one["addressPrefix"]: one.get("nextHopIpAddress", one["nextHopType"])
        for one in cloud.listed(f"routeTables/{table}", "routes").values()
    }


def test_from_nothing_to_all_of_it_and_back(cloud: Azure) -> None:
    before = cloud.everything()
    predicted = run("vpc_routes", options(cloud, BOTH, [OVERLAY]), check=True)
    assert cloud.everything() == before
    made = run("vpc_routes", options(cloud, BOTH, [OVERLAY]))
    assert (made["changed"], made["diff"]) == (True, predicted["diff"])
    assert routes(cloud, "theirs") == BOTH
    assert routes(cloud, "isthmus-lab-cloud") == BOTH
    # The table is on the subnet only when it is full, and the rest of the subnet is as it was.
    first, second = cloud.get("virtualNetworks/lab")["properties"]["subnets"]
    assert first["properties"]["routeTable"]["id"].endswith("/theirs")
    assert second["properties"]["routeTable"]["id"].endswith("/isthmus-lab-cloud")
    assert second["properties"]["serviceEndpoints"] == [{"service": "Microsoft.Storage"}]
    assert cloud.calls.index("write virtualNetworks/subnets") > cloud.calls.index("write routeTables/routes")
    forwards = {name: cloud.get(f"networkInterfaces/{name}") for name in ("one", "two", "three")}
    assert [one["properties"]["enableIPForwarding"] for one in forwards.values()] == [True, True, False]
    assert forwards["one"]["tags"] == {"team": "shop", "isthmus:lab-cloud:forwards": "ip-forwarding"}
    rules = cloud.listed("networkSecurityGroups/guard", "securityRules")
    rule = rules["isthmus-lab-cloud-udp-8472"]
    assert (rule["protocol"], rule["destinationPortRange"], rule["priority"]) == ("Udp", "8472", 1000)
    assert rule["sourceAddressPrefixes"] == ["10.20.0.0/16", "203.0.113.7/32"]
    assert rule["destinationAddressPrefixes"] == ["10.20.0.11/32", "10.20.1.12/32"]
    again = run("vpc_routes", options(cloud, BOTH, [OVERLAY]))
    assert (again["changed"], again["diff"], again["warnings"]) == (False, [], [])
    assert run("vpc_routes", options(cloud, {}, state="absent"))["changed"] is True
    assert cloud.everything() == before
    assert run("vpc_routes", options(cloud, {}, state="absent"))["changed"] is False


def test_drift_is_repaired_and_what_is_no_longer_wanted_goes(cloud: Azure) -> None:
    run("vpc_routes", options(cloud, BOTH, [OVERLAY]))
    wanted = cloud.everything()
    table = cloud.get("routeTables/theirs")["properties"]["routes"]
    table[0]["properties"]["nextHopIpAddress"] = "10.20.1.13"
    del table[1]
    cloud.get("networkInterfaces/two")["properties"]["enableIPForwarding"] = False
    guard = cloud.get("networkSecurityGroups/guard")["properties"]["securityRules"]
    guard[0]["properties"]["sourceAddressPrefixes"] = ["0.0.0.0/0"]
    assert len(run("vpc_routes", options(cloud, BOTH, [OVERLAY]))["diff"]) == 4
    assert cloud.everything() == wanted
    run("vpc_routes", options(cloud, {"10.102.0.0/28": "10.20.0.11"}))
    assert routes(cloud, "theirs") == {"10.102.0.0/28": "10.20.0.11"}
    assert f"{NETWORK}/routeTables/isthmus-lab-cloud".lower() not in cloud.resources
    assert "routeTable" not in cloud.get("virtualNetworks/lab")["properties"]["subnets"][1]["properties"]
    assert cloud.get("networkInterfaces/two")["properties"]["enableIPForwarding"] is False
    assert cloud.listed("networkSecurityGroups/guard", "securityRules") == {}


def test_a_route_of_ours_whose_prefix_somebody_changed_is_put_right_by_one_run(cloud: Azure) -> None:
    run("vpc_routes", options(cloud, BOTH))
    wanted = cloud.everything()

    def change() -> None:
        cloud.get("routeTables/theirs")["properties"]["routes"][0]["properties"]["addressPrefix"] = "10.99.0.0/24"

    change()
    predicted = run("vpc_routes", options(cloud, BOTH), check=True)
    done = run("vpc_routes", options(cloud, BOTH))
    assert done["diff"] == predicted["diff"]
    (one,) = done["diff"]
    assert (one["before"].strip(), one["after"].strip()) == ("10.20.0.11 for 10.99.0.0/24", "10.20.0.11")
    assert cloud.everything() == wanted
    assert run("vpc_routes", options(cloud, BOTH))["changed"] is False
    change()
    run("vpc_routes", options(cloud, {"10.102.0.16/28": "10.20.1.12"}))
    assert routes(cloud, "theirs") == {}


def test_what_somebody_else_made_is_left_and_its_prefix_refused(cloud: Azure) -> None:
    one = {"addressPrefix": "10.102.0.0/28", "nextHopType": "VirtualAppliance", "nextHopIpAddress": "10.20.1.13"}
    # Of another owner whose name begins like ours.
    cloud.get("routeTables/theirs")["properties"]["routes"] = [
        {"name": "isthmus-lab-cloud-two-10-102-0-0-28", "properties": one},
        {"name": "same", "properties": {**one, "addressPrefix": "10.102.0.16/28", "nextHopIpAddress": "10.20.1.12"}},
    ]
    deny = {"direction": "Inbound", "access": "Deny", "priority": 500, "protocol": "*", "destinationPortRange": "*"}
    allow = {**deny, "access": "Allow", "priority": 1000}
    cloud.get("networkSecurityGroups/guard")["properties"]["securityRules"] = [
        {"name": "deny", "properties": deny},
        {"name": "allow", "properties": allow},
    ]
    before = cloud.everything()
    with pytest.raises(ModuleFailed, match=r"10\.102\.0\.0/28 is somebody else's route to 10\.20\.1\.13"):
        run("vpc_routes", options(cloud, BOTH, [OVERLAY]))
    assert cloud.everything() == before
    one_host = {"hosts": ["10.20.0.11"]}
    used = run("vpc_routes", options(cloud, {"10.102.0.16/28": "10.20.1.12"}, [OVERLAY], **one_host))
    assert [one["destination"] for one in used["borrowed"]] == ["10.102.0.16/28"]
    assert used["warnings"] == [
        "guard: rule deny, which is somebody else's and comes before isthmus-lab-cloud-udp-8472, denies Udp 8472 to "
        "some or all."
    ]
    priorities = [one["priority"] for one in cloud.listed("networkSecurityGroups/guard", "securityRules").values()]
    assert priorities == [500, 1000, 1001]
    run("vpc_routes", options(cloud, {}, state="absent"))
    assert cloud.everything() == before


def test_a_blackhole_is_told(cloud: Azure) -> None:
    run("vpc_routes", options(cloud, BOTH, [OVERLAY]))
    del cloud.resources[f"{NETWORK}/networkInterfaces/two".lower()]
    seen = run("vpc_routes", options(cloud, BOTH, [OVERLAY]))
    assert seen["changed"] is False
    assert {(one["destination"], one["target"]) for one in seen["blackholes"]} == {("10.102.0.16/28", "10.20.1.12")}
    assert "the host is gone" in seen["warnings"][0]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"10.102.0.0/28": "10.20.0.77"}, r"no network interface in lab .* has the address 10\.20\.0\.77"),
        ({"10.20.9.0/28": "10.20.0.11"}, r"10\.20\.9\.0/28 overlaps 10\.20\.0\.0/16, a range of lab"),
        ({"10.102.0.0/28": "igw-1"}, "'igw-1' is no next hop of Azure"),
    ],
)
def test_bad_input_changes_nothing(cloud: Azure, wanted: dict[str, str], words: str) -> None:
    before = cloud.everything()
    with pytest.raises(ModuleFailed, match=words):
        run("vpc_routes", options(cloud, {**wanted, "10.109.0.0/28": "10.20.0.11"}, [OVERLAY]))
    assert cloud.everything() == before


def test_a_table_that_is_too_small(cloud: Azure) -> None:
    before = cloud.everything()
    wanted = {f"10.102.{number}.0/28": "10.20.0.11" for number in range(4)}
    with pytest.raises(ModuleFailed, match=r"route table theirs holds 3 routes, the plan needs 4.*10\.102\.0\.0/23 to"):
        run("vpc_routes", options(cloud, wanted, route_limit=3))
    assert cloud.everything() == before


def test_a_table_that_is_full_takes_other_routes(cloud: Azure) -> None:
    cloud.limit = 2
    run("vpc_routes", options(cloud, BOTH, route_limit=2))
    changed = {"10.102.0.0/24": "10.20.0.11", "10.102.0.16/28": "10.20.1.13"}
    seen = run("vpc_routes", options(cloud, changed, route_limit=2))
    assert routes(cloud, "theirs") == changed
    assert "10.102.0.0/28 go first, and nothing leads there until" in seen["warnings"][0]
    assert run("vpc_routes", options(cloud, changed, route_limit=2))["changed"] is False


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("granted", "named"),
    [
        ({"actions": ["*/read"], "notActions": []}, "Microsoft.Network/networkInterfaces/write"),
        (
            {"actions": ["Microsoft.Network/*"], "notActions": ["Microsoft.Network/routeTables/routes/write"]},
            "Microsoft.Network/routeTables/routes/write",
        ),
    ],
)
def test_a_missing_permission_is_named_before_anything_changes(
    cloud: Azure, granted: dict[str, list[str]], named: str, check: bool
) -> None:
    before = cloud.everything()
    cloud.granted = [granted]
    with pytest.raises(ModuleFailed, match=f"nothing was changed; permission missing: {named} on resource group"):
        run("vpc_routes", options(cloud, BOTH), check=check)
    assert cloud.everything() == before


def test_a_refusal_on_the_way_is_told_and_the_next_run_does_the_rest(cloud: Azure) -> None:
    cloud.may_ask = False
    cloud.denied = {"virtualNetworks/subnets/write"}
    with pytest.raises(ModuleFailed) as failure:
        run("vpc_routes", options(cloud, BOTH))
    assert "permission missing: Microsoft.Network/virtualNetworks/subnets/write" in failure.value.msg
    assert failure.value.result["changed"] is True
    assert failure.value.result["not_done"] == ["route table of subnet b"]
    cloud.denied = {"networkInterfaces/read"}
    with pytest.raises(ModuleFailed):
        run("vpc_routes", {**options(cloud, BOTH), "network": "nowhere"})
    cloud.denied = set()
    rest = run("vpc_routes", options(cloud, BOTH))
    assert [one["before_header"] for one in rest["diff"]] == ["route table of subnet b"]


def test_a_refusal_names_what_is_missing_and_not_what_is_there(cloud: Azure) -> None:
    cloud.denied = {"routeTables/join/action"}
    with pytest.raises(ModuleFailed) as failure:
        run("vpc_routes", options(cloud, BOTH))
    assert "permission missing: Microsoft.Network/routeTables/join/action (call subnets.begin_" in failure.value.msg
    assert "on the linked scope(s)" in failure.value.msg
    cloud.denied = set()
    cloud.forbidden = {"virtualNetworks/subnets/write"}
    with pytest.raises(ModuleFailed) as failure:
        run("vpc_routes", options(cloud, BOTH))
    assert "RequestDisallowedByPolicy: Resource 'b' was disallowed by policy. Next: " in failure.value.msg
    assert "permission" not in failure.value.msg


def test_two_subnets_without_a_table(cloud: Azure) -> None:
    vnet = cloud.get("virtualNetworks/lab")
    vnet["properties"]["subnets"].append(cloud.subnet("lab", "c", addressPrefix="10.20.2.0/24"))
    cloud.stamp(vnet)
    cloud.interface("four", "10.20.2.14", "virtualNetworks/lab/subnets/c")
    before = cloud.everything()
    wanted = options(cloud, {**BOTH, "10.102.0.32/28": "10.20.2.14"})
    run("vpc_routes", wanted)
    tables = [one["properties"]["routeTable"]["id"].rsplit("/", 1)[1] for one in vnet["properties"]["subnets"]]
    assert tables == ["theirs", "isthmus-lab-cloud", "isthmus-lab-cloud"]
    assert run("vpc_routes", wanted)["changed"] is False
    run("vpc_routes", {**wanted, "state": "absent"})
    assert cloud.everything() == before


def test_nobody_elses_change_is_lost(cloud: Azure) -> None:
    """A subnet that was changed between look and write is not written over."""
    taken, answered = cloud.take, cloud.answer
    vnet = cloud.get("virtualNetworks/lab")

    def meanwhile(kind: str, path: str, body: Any, place: Any) -> None:
        if kind == "routes":
            vnet["properties"]["subnets"][1]["properties"]["routeTable"] = {"id": f"{NETWORK}/routeTables/theirs"}
            cloud.stamp(vnet)
        taken(kind, path, body, place)

    with (
        mock.patch.object(cloud, "take", meanwhile),
        pytest.raises(
            ModuleFailed, match=r"it had none when it was looked at and has .*/routeTables/theirs now\. Next"
        ),
    ):
        run("vpc_routes", options(cloud, BOTH))
    del vnet["properties"]["subnets"][1]["properties"]["routeTable"]

    def at_once(method: str, url: str, *rest: Any) -> Any:
        found = copy.deepcopy(answered(method, url, *rest))
        if method == "GET" and "/subnets/b" in url:
            cloud.stamp(vnet)
        return found

    with (
        mock.patch.object(cloud, "answer", at_once),
        pytest.raises(ModuleFailed, match="PreconditionFailed"),
    ):
        run("vpc_routes", options(cloud, BOTH))

    def endpoints(kind: str, path: str, body: Any, place: Any) -> None:
        if kind == "networkInterfaces":
            vnet["properties"]["subnets"][1]["properties"]["serviceEndpoints"] = [{"service": "Microsoft.Sql"}]
            cloud.stamp(vnet)
        taken(kind, path, body, place)

    cloud.get("networkInterfaces/two")["properties"]["enableIPForwarding"] = False
    with mock.patch.object(cloud, "take", endpoints):
        assert run("vpc_routes", options(cloud, BOTH))["changed"] is True
    assert vnet["properties"]["subnets"][1]["properties"] == {
        "addressPrefix": "10.20.1.0/24",
        "serviceEndpoints": [{"service": "Microsoft.Sql"}],
        "routeTable": {"id": f"{NETWORK}/routeTables/isthmus-lab-cloud"},
    }


def test_throttled_calls_are_made_again(cloud: Azure) -> None:
    cloud.throttled = 3
    run("vpc_routes", options(cloud, {"10.101.0.0/16": "VirtualNetworkGateway"}, hosts=["10.20.0.11"]))
    assert routes(cloud, "theirs") == {"10.101.0.0/16": "VirtualNetworkGateway"}
    assert cloud.throttled == 0


def test_a_host_in_a_peered_network_may_be_where_a_route_leads(cloud: Azure) -> None:
    cloud.interface("far", "10.30.0.11", "virtualNetworks/other/subnets/a")
    wanted = options(cloud, {"10.103.0.0/28": "10.30.0.11"}, hosts=["10.20.0.11"])
    with pytest.raises(ModuleFailed, match=r"or a network peered with it has the address 10\.30\.0\.11"):
        run("vpc_routes", wanted)
    with pytest.raises(ModuleFailed, match="peers: 'other' is not <resource group>/<virtual network>"):
        run("vpc_routes", {**wanted, "peers": ["other"]})
    run("vpc_routes", {**wanted, "peers": [f"{GROUP}/other"]})
    assert routes(cloud, "theirs") == {"10.103.0.0/28": "10.30.0.11"}


def test_everything_from_a_range_and_to_it(cloud: Azure) -> None:
    every = {"protocol": "all", "sources": ["10.103.0.0/16"]}
    run("vpc_routes", options(cloud, BOTH, [every]))
    (rule,) = cloud.listed("networkSecurityGroups/guard", "securityRules").values()
    assert (rule["protocol"], rule["destinationPortRange"], rule["sourceAddressPrefixes"]) == (
        "*",
        "*",
        ["10.103.0.0/16"],
    )
    assert set(rule["destinationAddressPrefixes"]) == {*BOTH, "10.20.0.11/32", "10.20.1.12/32"}
    assert run("vpc_routes", options(cloud, BOTH, [every]))["changed"] is False
    run("vpc_routes", options(cloud, BOTH))
    assert cloud.listed("networkSecurityGroups/guard", "securityRules") == {}


def test_of_a_network_that_is_gone_nothing_is_left(cloud: Azure) -> None:
    missing = options(cloud, {}, network="nowhere", state="absent")
    seen = run("vpc_routes", missing)
    assert (seen["changed"], "there is no such network any more" in seen["warnings"][0]) == (False, True)


def test_peering(cloud: Azure) -> None:
    cloud.put("virtualNetworks/other", {"addressSpace": {"addressPrefixes": ["10.30.0.0/16"]}, "subnets": []})
    sides = [{"network": name, "resource_group": GROUP} for name in ("lab", "other")]
    wanted = {"provider": "azure", "endpoint": cloud.root, "owner": "lab", "sides": sides}
    before = copy.deepcopy(cloud.everything())
    assert run("vpc_peering", wanted, check=True)["changed"] is True
    assert cloud.everything() == before
    assert run("vpc_peering", wanted)["peering"] == "isthmus-lab-lab"
    assert run("vpc_peering", wanted)["changed"] is False
    peering = cloud.get("virtualNetworks/lab")["properties"]["virtualNetworkPeerings"][0]
    peering["properties"]["allowForwardedTraffic"] = False
    assert [one["before"] for one in run("vpc_peering", wanted)["diff"]] == ["allowForwardedTraffic off\n"]
    assert run("vpc_peering", {**wanted, "owner": "else", "state": "absent"})["changed"] is False
    assert run("vpc_peering", {**wanted, "state": "absent"})["changed"] is True
    left = [cloud.listed(f"virtualNetworks/{name}", "virtualNetworkPeerings") for name in ("lab", "other")]
    assert left == [{}, {}]


@pytest.mark.parametrize("lost", ["lab", "other"])
def test_half_of_a_peering(cloud: Azure, lost: str) -> None:
    cloud.put("virtualNetworks/other", {"addressSpace": {"addressPrefixes": ["10.30.0.0/16"]}, "subnets": []})
    sides = [{"network": name, "resource_group": GROUP} for name in ("lab", "other")]
    wanted = {"provider": "azure", "endpoint": cloud.root, "owner": "lab", "sides": sides}
    run("vpc_peering", wanted)
    (kept,) = {"lab", "other"} - {lost}
    half = f"{NETWORK}/virtualNetworks/{lost}/virtualNetworkPeerings/isthmus-lab-{kept}"
    cloud.answer("DELETE", half, {}, None)  # somebody's
    repaired = run("vpc_peering", wanted)
    assert [one["before"].strip() for one in repaired["diff"]] == ["Disconnected", ""]
    for one in ("lab", "other"):
        (found,) = cloud.listed(f"virtualNetworks/{one}", "virtualNetworkPeerings").values()
        assert found["peeringState"] == "Connected"
    assert run("vpc_peering", wanted)["changed"] is False

    # One network is gone: the other one keeps nothing of it.
    del cloud.resources[f"{NETWORK}/virtualNetworks/{lost}".lower()]
    with pytest.raises(ModuleFailed, match=r"refuses to be looked at: virtual_networks\.get: ResourceNotFound"):
        run("vpc_peering", wanted)
    absent = run("vpc_peering", {**wanted, "state": "absent"})
    assert "there is no such network any more" in absent["warnings"][0]
    assert cloud.listed(f"virtualNetworks/{kept}", "virtualNetworkPeerings") == {}
    assert run("vpc_peering", {**wanted, "state": "absent"})["changed"] is False


def test_as_ansible_runs_it(cloud: Azure) -> None:
    """In a process of its own, with the instance's identity."""
    result = run_module("vpc_routes", options(cloud, BOTH), bundle=False)
    assert result["changed"] is True
    assert routes(cloud, "theirs") == BOTH
    assert TOKEN not in str(result)


def test_the_names_of_awx_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TENANT", "CLIENT_ID", "SECRET"):
        monkeypatch.setenv(f"AZURE_{name}", name.lower())
    with mock.patch.object(azure.identity, "ClientSecretCredential") as made:
        shell.credential("AZURE_CHINA_CLOUD")
    made.assert_called_once_with("tenant", "client_id", "secret", authority="login.chinacloudapi.cn")


def test_the_double_takes_nothing_that_the_models_do_not_have() -> None:
    good = {"properties": {"addressPrefix": "10.1.0.0/24", "nextHopType": "VnetLocal"}}
    assert list(problems(models.Route, good, "routes")) == []
    for field, value in (("addresPrefix", "10.1.0.0/24"), ("addressPrefix", 7), ("nextHopType", "VirtualApliance")):
        bad = {"properties": {**good["properties"], field: value}}
        assert len(list(problems(models.Route, bad, "routes"))) == 1
