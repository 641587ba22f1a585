# SPDX-License-Identifier: GPL-3.0-or-later
"""vpc_routes and vpc_peering on Google Cloud: every request is held against Google's own description of its API."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from module_runner import ModuleFailed, run_module
from vpc_google import PROJECT, ROOT, TOKEN, Google, Refused, google_on_loopback
from vpc_modules import run


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Google, Path]]:
    with google_on_loopback(tmp_path_factory.mktemp("google")) as found:
        yield found


@pytest.fixture
def google(loopback: tuple[Google, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    google, file = loopback
    google.reset()
    google.network("lab", "10.128.0.0/20", "10.4.0.0/14")
    google.instance("one", "10.128.0.11", "lab")
    google.instance("two", "10.128.0.12", "lab")
    google.instance("three", "10.128.0.13", "lab", forwards=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    yield google
    assert google.wrong == []


OVERLAY = {"protocol": "udp", "port": 8472, "sources": ["10.128.0.0/20", "203.0.113.7"]}


def options(google: Google, routes: dict[str, str], rules: Any = (), **more: Any) -> dict[str, Any]:
    return {
        "provider": "google",
        "endpoint": google.root,
        "network": "lab",
        "owner": "lab-cloud",
        "routes": [
            {"destination": destination, "gateway" if "/" in hop else "via": hop} for destination, hop in routes.items()
        ],
        "rules": list(rules),
        **more,
    }


def ours(google: Google) -> dict[str, str]:
    mark = "isthmus.mesh owner=lab-cloud"
    return {
        one["destRange"]: next(value for key, value in one.items() if key.startswith("nextHop")).removeprefix(ROOT)
        for one in google.routes.values()
        if one.get("description") == mark
    }


def state(google: Google) -> Any:
    return copy.deepcopy((google.routes, google.firewalls, google.networks))


BOTH = {"10.102.0.0/28": "10.128.0.11", "10.102.0.16/28": "10.128.0.12"}


def test_from_nothing_to_all_of_it_and_back(google: Google) -> None:
    before = state(google)
    predicted = run("vpc_routes", options(google, BOTH, [OVERLAY]), check=True)
    assert state(google) == before
    made = run("vpc_routes", options(google, BOTH, [OVERLAY]))
    assert (made["changed"], made["diff"]) == (True, predicted["diff"])
    assert ours(google) == BOTH
    rule = google.firewalls["isthmus-lab-cloud-udp-8472"]
    assert rule["allowed"] == [{"IPProtocol": "udp", "ports": ["8472"]}]
    assert rule["sourceRanges"] == ["10.128.0.0/20", "203.0.113.7/32"]
    assert rule["destinationRanges"] == ["10.128.0.11/32", "10.128.0.12/32"]
    again = run("vpc_routes", options(google, BOTH, [OVERLAY]))
    assert (again["changed"], again["diff"]) == (False, [])
    assert run("vpc_routes", options(google, {}, state="absent"))["changed"] is True
    assert state(google) == before
    assert run("vpc_routes", options(google, {}, state="absent"))["changed"] is False


def test_a_range_that_moves_has_a_way_all_the_time(google: Google) -> None:
    run("vpc_routes", options(google, {"10.102.0.0/28": "10.128.0.11"}))
    google.calls.clear()
    run("vpc_routes", options(google, {"10.102.0.0/28": "10.128.0.12"}))
    changes = [call for call in google.calls if call.endswith((".insert", ".delete"))]
    assert changes == ["compute.routes.insert", "compute.routes.delete"]
    assert ours(google) == {"10.102.0.0/28": "10.128.0.12"}

    # Cut short between the two: the next run removes what is left over.
    run("vpc_routes", options(google, {"10.102.0.0/28": "10.128.0.12"}))
    google.failing = {"compute.routes.delete": ("RESOURCE_IN_USE", "not now")}
    with pytest.raises(ModuleFailed) as failure:
        run("vpc_routes", options(google, {"10.102.0.0/28": "10.128.0.11"}))
    assert "compute.routes.delete: RESOURCE_IN_USE: not now" in failure.value.msg
    assert (failure.value.result["changed"], len(failure.value.result["done"])) == (True, 1)
    google.failing = {}
    assert run("vpc_routes", options(google, {"10.102.0.0/28": "10.128.0.11"}))["changed"] is True
    assert ours(google) == {"10.102.0.0/28": "10.128.0.11"}
    assert len(google.routes) == 3


def test_drift_is_repaired(google: Google) -> None:
    run("vpc_routes", options(google, BOTH, [OVERLAY]))
    wanted = state(google)
    del google.routes[next(name for name in google.routes if name.startswith("isthmus"))]
    google.firewalls["isthmus-lab-cloud-udp-8472"]["sourceRanges"] = ["0.0.0.0/0"]
    repaired = run("vpc_routes", options(google, BOTH, [OVERLAY]))
    assert len(repaired["diff"]) == 2
    assert state(google)[0].keys() == wanted[0].keys()
    assert google.firewalls["isthmus-lab-cloud-udp-8472"]["sourceRanges"] == ["10.128.0.0/20", "203.0.113.7/32"]


def test_what_somebody_else_made_is_left_and_its_prefix_refused(google: Google) -> None:
    link = google.networks["lab"]["selfLink"]
    instance = google.instances["two"]["selfLink"]
    for name, destination in (("theirs", "10.102.0.0/28"), ("same", "10.102.0.16/28")):
        google.routes[name] = {"name": name, "network": link, "destRange": destination, "nextHopInstance": instance}
    google.firewalls["isthmus-lab-cloud-tcp-2379"] = {"name": "isthmus-lab-cloud-tcp-2379", "network": link}
    before = state(google)
    with pytest.raises(
        ModuleFailed, match=r"10\.102\.0\.0/28 is somebody else's route to 10\.128\.0\.12 \(route theirs\)"
    ):
        run("vpc_routes", options(google, BOTH))
    with pytest.raises(ModuleFailed, match="isthmus-lab-cloud-tcp-2379 of lab is there with another description"):
        run("vpc_routes", options(google, {}, [{**OVERLAY, "protocol": "tcp", "port": 2379}], hosts=["10.128.0.11"]))
    used = run("vpc_routes", options(google, {"10.102.0.16/28": "10.128.0.12"}))
    assert (used["changed"], [one["destination"] for one in used["borrowed"]]) == (False, ["10.102.0.16/28"])
    run("vpc_routes", options(google, {}, state="absent"))
    assert state(google) == before


def test_a_blackhole_is_told(google: Google) -> None:
    run("vpc_routes", options(google, BOTH, [OVERLAY]))
    del google.instances["two"]
    seen = run("vpc_routes", options(google, BOTH, [OVERLAY]))
    assert seen["changed"] is False
    assert [(one["destination"], one["reason"]) for one in seen["blackholes"]] == [
        ("10.102.0.16/28", "NEXT_HOP_ADDRESS_NOT_ASSIGNED")
    ]
    assert "the host is gone" in seen["warnings"][0]


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ({"10.102.0.0/28": "10.128.0.77"}, r"no instance in lab has the address 10\.128\.0\.77"),
        ({"10.102.0.0/28": "10.128.0.13"}, r"instance three \(10\.128\.0\.13\) may not forward"),
        (
            {"10.5.0.0/16": "10.128.0.11"},
            r"10\.5\.0\.0/16 overlaps 10\.4\.0\.0/14, a secondary range of subnetwork lab-a",
        ),
        ({"10.102.0.0/28": "a/b"}, "'a/b' is no next hop of Google"),
    ],
)
def test_bad_input_changes_nothing(google: Google, routes: dict[str, str], words: str) -> None:
    before = state(google)
    with pytest.raises(ModuleFailed, match=words):
        run("vpc_routes", options(google, {**routes, "10.109.0.0/28": "10.128.0.11"}, [OVERLAY]))
    assert state(google) == before


TUNNEL = "regions/europe-west3/vpnTunnels/home"
INSTANCE = "zones/europe-west3-a/instances/one"


@pytest.mark.parametrize("start", ["", f"projects/{PROJECT}/", f"{ROOT}projects/{PROJECT}/"])
@pytest.mark.parametrize(("gateway", "hop"), [(TUNNEL, f"projects/{PROJECT}/{TUNNEL}"), (INSTANCE, "10.128.0.11")])
def test_a_gateway(google: Google, start: str, gateway: str, hop: str) -> None:
    wanted = options(google, {"10.101.0.0/16": f"{start}{gateway}"}, hosts=["10.128.0.12"])
    run("vpc_routes", wanted)
    assert ours(google) == {"10.101.0.0/16": hop}
    assert run("vpc_routes", wanted)["changed"] is False


def test_a_gateway_that_is_an_instance_is_one_as_others_are(google: Google) -> None:
    with pytest.raises(ModuleFailed, match=r"instance three \(10\.128\.0\.13\) may not forward"):
        run("vpc_routes", options(google, {"10.101.0.0/16": "zones/europe-west3-a/instances/three"}))
    wanted = options(google, {"10.101.0.0/16": INSTANCE}, hosts=["10.128.0.12"])
    # As it was made by its URL.
    name = "isthmus-lab-cloud-10-101-0-0-16-f"
    body = {"name": name, "network": google.networks["lab"]["selfLink"], "destRange": "10.101.0.0/16", "priority": 1000}
    hop = {"nextHopInstance": google.instances["one"]["selfLink"], "description": "isthmus.mesh owner=lab-cloud"}
    google.routes[name] = {**body, **hop}
    assert run("vpc_routes", wanted)["changed"] is False
    del google.instances["one"]
    seen = run("vpc_routes", wanted)
    assert (seen["changed"], "the host is gone" in seen["warnings"][0]) == (False, True)


def test_a_quota_is_told_before_it_is_met(google: Google) -> None:
    google.quota = 2
    before = state(google)
    routes = {f"10.102.{number}.0/28": "10.128.0.11" for number in range(4)}
    with pytest.raises(ModuleFailed) as refusal:
        run("vpc_routes", options(google, routes))
    words = (
        "network lab holds 2 routes, the plan needs 5 (1 of others). Aggregate like this: 10.102.0.0/22 to 10.128.0.11"
    )
    assert words in refusal.value.msg
    assert state(google) == before


def test_a_project_without_room_for_another_route_takes_other_routes(google: Google) -> None:
    google.quota = 3
    run("vpc_routes", options(google, BOTH))
    moved = {"10.102.0.0/28": "10.128.0.12", "10.103.0.0/28": "10.128.0.12"}
    seen = run("vpc_routes", options(google, moved))
    assert ours(google) == moved
    assert "10.102.0.0/28 go first, and nothing leads there until" in seen["warnings"][0]
    assert run("vpc_routes", options(google, moved))["changed"] is False


@pytest.mark.parametrize(
    "permission", ["compute.routes.create", "compute.networks.updatePolicy", "compute.networks.get"]
)
@pytest.mark.parametrize("check", [True, False])
def test_a_missing_permission_is_named_before_anything_changes(google: Google, permission: str, check: bool) -> None:
    before = state(google)
    google.denied = {permission}
    with pytest.raises(ModuleFailed, match=f"nothing was changed; permission missing: {permission}"):
        run("vpc_routes", options(google, BOTH, [OVERLAY]), check=check)
    assert state(google) == before


def test_a_missing_permission_that_cannot_be_asked_for_is_named_on_the_way(google: Google) -> None:
    google.may_ask = False
    google.denied = {"compute.routes.create"}
    with pytest.raises(ModuleFailed) as failure:
        run("vpc_routes", options(google, BOTH, [OVERLAY]))
    said = f"403: Required 'compute.routes.create' permission for 'projects/{PROJECT}'"
    assert f"permission missing: compute.routes.create (call compute.routes.insert: {said})" in failure.value.msg
    assert failure.value.result["done"] == ["firewall rule isthmus-lab-cloud-udp-8472 of lab"]


def test_an_api_that_is_off_or_too_busy_is_no_missing_permission(
    google: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    google.off = True
    with pytest.raises(ModuleFailed, match=r"refuses to be looked at: compute\.networks\.get: 403: Compute Engine API"):
        run("vpc_routes", options(google, BOTH))
    google.off = False
    monkeypatch.setattr(random, "random", lambda: 0.0)  # the client's waits are that long
    google.throttled = {"compute.networks.get": 100}
    with pytest.raises(ModuleFailed, match=r"refuses to be looked at: compute\.networks\.get: 403: Rate Limit"):
        run("vpc_routes", options(google, BOTH))


def test_throttled_calls_are_made_again(google: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.0)  # the client's waits are that long
    google.throttled = {"compute.routes.list": 2, "compute.routes.insert": 2}
    run("vpc_routes", options(google, BOTH))
    assert ours(google) == BOTH
    assert google.throttled["compute.routes.insert"] == 0


def test_everything_from_a_range_and_to_it(google: Google) -> None:
    every = {"protocol": "all", "sources": ["10.103.0.0/16"]}
    run("vpc_routes", options(google, BOTH, [every]))
    (rule,) = [one for one in google.firewalls.values() if one["name"].startswith("isthmus-")]
    assert (rule["name"], rule["allowed"]) == ("isthmus-lab-cloud-all", [{"IPProtocol": "all"}])
    assert set(BOTH) < set(rule["destinationRanges"])
    assert run("vpc_routes", options(google, BOTH, [every]))["changed"] is False


def test_of_a_network_that_is_gone_nothing_is_left(google: Google) -> None:
    seen = run("vpc_routes", options(google, {}, network="nowhere", state="absent"))
    assert (seen["changed"], "there is no such network any more" in seen["warnings"][0]) == (False, True)


def test_peering(google: Google) -> None:
    google.network("other", "10.130.0.0/20", "10.8.0.0/14")
    before = state(google)
    wanted = {
        "provider": "google",
        "endpoint": google.root,
        "owner": "lab",
        "sides": [{"network": "lab"}, {"network": "other"}],
    }
    assert run("vpc_peering", wanted, check=True)["changed"] is True
    assert state(google) == before
    assert run("vpc_peering", wanted)["peering"] == "isthmus-lab-lab"
    names = {name: [one["name"] for one in network["peerings"]] for name, network in google.networks.items()}
    assert names == {"lab": ["isthmus-lab-other"], "other": ["isthmus-lab-lab"]}
    assert run("vpc_peering", wanted)["changed"] is False
    google.networks["lab"]["peerings"][0]["exportCustomRoutes"] = False
    repaired = run("vpc_peering", wanted)
    assert [one["before"] for one in repaired["diff"]] == ["exportCustomRoutes off\n"]
    assert google.networks["lab"]["peerings"][0]["exportCustomRoutes"] is True
    assert run("vpc_peering", {**wanted, "owner": "else", "state": "absent"})["changed"] is False
    assert run("vpc_peering", {**wanted, "state": "absent"})["changed"] is True
    assert [network["peerings"] for network in google.networks.values()] == [[], []]
    google.network("third", "10.130.8.0/24", "10.12.0.0/14")
    with pytest.raises(ModuleFailed, match=r"10\.130\.0\.0/20 of other and 10\.130\.8\.0/24 of third overlap"):
        run("vpc_peering", {**wanted, "sides": [{"network": "other"}, {"network": "third"}]})


@pytest.mark.parametrize("lost", ["lab", "other"])
def test_a_peering_with_a_network_that_is_gone(google: Google, lost: str) -> None:
    google.network("other", "10.130.0.0/20", "10.8.0.0/14")
    sides = [{"network": "lab"}, {"network": "other"}]
    wanted = {"provider": "google", "endpoint": google.root, "owner": "lab", "sides": sides}
    run("vpc_peering", wanted)
    del google.networks[lost]
    with pytest.raises(ModuleFailed, match=r"refuses to be looked at: compute\.networks\.get: 404"):
        run("vpc_peering", wanted)
    absent = run("vpc_peering", {**wanted, "state": "absent"})
    assert "there is no such network any more" in absent["warnings"][0]
    assert [network["peerings"] for network in google.networks.values()] == [[]]
    assert run("vpc_peering", {**wanted, "state": "absent"})["changed"] is False


def test_as_ansible_runs_it(google: Google, loopback: tuple[Google, Path]) -> None:
    """In a process of its own, with a service account's file from the environment."""
    result = run_module("vpc_routes", options(google, BOTH), bundle=False)
    assert result["changed"] is True
    assert ours(google) == BOTH
    assert TOKEN not in str(result)
    assert "PRIVATE KEY" not in str(result)


@pytest.mark.parametrize(
    ("file", "project"), [("GCP_SERVICE_ACCOUNT_FILE", "GCP_PROJECT"), ("GCE_CREDENTIALS_FILE_PATH", "GCE_PROJECT")]
)
def test_the_names_of_awx_are_taken(
    google: Google,
    loopback: tuple[Google, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    project: str,
) -> None:
    """Each of the two generations of names alone, with an account that names no project."""
    account = json.loads(loopback[1].read_text())
    del account["project_id"]
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv(file, str(tmp_path / "account.json"))
    with pytest.raises(ModuleFailed, match="neither the option project nor the credentials name a project"):
        run("vpc_routes", options(google, BOTH))
    monkeypatch.setenv(project, PROJECT)
    assert run("vpc_routes", options(google, BOTH))["changed"] is True
    assert ours(google) == BOTH
    (tmp_path / "account.json").write_text('{"type": "authorized_user"}')
    with pytest.raises(ModuleFailed, match=r"nothing was changed.*google\.auth: .*client_email"):
        run("vpc_routes", options(google, BOTH))


def test_credentials_that_are_missing_are_told(google: Google, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent/account.json")
    with pytest.raises(ModuleFailed, match=r"nothing was changed.*google\.auth: .*/nonexistent/account\.json"):
        run("vpc_routes", options(google, BOTH))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"destRnge": "10.1.0.0/24"}, "destRnge"),
        ({"priority": "high"}, "'high' is not of type 'integer'"),
        ({"name": "Capital"}, "does not match"),
        ({"destRange": None}, "None is not of type 'string'"),
    ],
)
def test_the_double_takes_nothing_that_the_description_does_not_have(
    google: Google, change: dict[str, Any], words: str
) -> None:
    body = {"name": "good", "network": "n", "destRange": "10.1.0.0/24", "priority": 1000, "nextHopIp": "10.128.0.11"}
    url = f"/compute/v1/projects/{PROJECT}/global/routes"
    assert google.answer("POST", url, {**body, "network": google.networks["lab"]["selfLink"]})["status"] == "PENDING"
    with pytest.raises(Refused, match=words):
        google.answer("POST", url, {**body, **change})
    with pytest.raises(Refused, match="priority is required"):
        google.answer("POST", url, {key: value for key, value in body.items() if key != "priority"})
    assert len(google.wrong) == 2
    google.wrong.clear()
