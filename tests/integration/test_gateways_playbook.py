# SPDX-License-Identifier: GPL-3.0-or-later
"""Tunnels between gateways of a running estate are turned on and off by `site`: in steps, each over all hosts before
the next. The playbook and its plan are real, modules on hosts are `fake_modules.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_batches_playbook import Site, said
from integration.test_encryption_playbook import CLUSTERS, HOSTS, proofs, turned, written

SITES = {
    "a": {"ipsec": {"networks": ["192.0.1.0/24"], "gateways": [{"host": "a1"}]}},
    "b": {"ipsec": {"networks": ["192.0.2.0/24"], "gateways": [{"host": "b1"}]}},
}
ON = {"sites": SITES, "site_pairs": [{"sites": ["a", "b"], "encryption": "ipsec-gateway"}]}
OFF = {"sites": SITES}


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The clusters as the first run forms them, without encryption."""
    made = Site(tmp_path_factory.mktemp("formed"), CLUSTERS)
    run = made.run()
    assert run.status == 0, run.output
    return made


@pytest.fixture
def running(formed: Site, tmp_path: Path) -> Site:
    made = Site(tmp_path, CLUSTERS)
    made.take_over(formed)
    return made


def stages(site: Site) -> dict[str, str]:
    found = {}
    for host in HOSTS:
        section = json.loads((site.place / "hosts" / host / "node.json").read_text()).get("ipsec", {"far": {}})
        (found[host],) = {entry["stage"] for entry in section["far"].values()} or {"plain"}
    return found


def recorded(site: Site) -> Any:
    return (json.loads((site.place / "record").read_text())["roster"].get("ipsec") or {"pairs": {}})["pairs"]


def tunnels(site: Site) -> list[dict[str, Any]]:
    """The module's runs but those before the agents."""
    return [call for call in site.calls("ipsec") if not call.get("before_agent")]


def made(site: Site) -> list[str]:
    """The hosts on which the module ran."""
    return [call["host"] for call in tunnels(site)]


def test_gateways_come_before_agents_that_are_told_of_them_whatever_tags_there_are(tmp_path: Path) -> None:
    site = Site(tmp_path, CLUSTERS)
    site.estate = ON
    assert site.run().status == 0
    assert set(stages(site).values()) == {"demands"}
    lines = (site.place / "calls").read_text().splitlines()
    calls = [call for call in map(json.loads, lines) if call["module"] in ("ipsec", "node")]
    for host in HOSTS:
        told = [(call["module"], call.get("before_agent", False)) for call in calls if call["host"] == host]
        assert told == [("ipsec", True), ("node", False), ("ipsec", False)], host
    assert turned(site, "--check").status == 0
    assert [call for call in site.calls("ipsec") if call.get("before_agent")] == []
    (site.place / "fail" / "ipsec a2").touch()
    refused = turned(site, "--tags", "agent")
    assert refused.status == 2, refused.output
    assert sorted(call["host"] for call in site.calls("node")) == ["a1", "b1"]


def test_on_and_off_go_in_one_run_each_and_a_second_run_changes_nothing(running: Site) -> None:
    running.estate = ON
    told = said(running.run(name="plan"))
    assert "encryption by gateways of a and b is turned on, in steps of one run" in told
    assert "UDP 4500 on b1 (192.0.2.3) from a1 (192.0.1.1)" in told
    assert recorded(running) == {}
    on = turned(running, "-e", json.dumps({"isthmus_ipsec_secrets": {"a b": "a key"}}))
    assert (on.status, running.locks) == (0, []), on.output
    assert written(running) == [HOSTS] * 3
    assert sorted(made(running)) == sorted(HOSTS * 3)
    assert {call["secrets"]["a b"] for call in tunnels(running)} == {"a key"}
    assert proofs(running) == sorted([*HOSTS, *HOSTS])
    assert (stages(running), recorded(running)) == (dict.fromkeys(HOSTS, "demands"), {"a b": "demands"})
    again = turned(running)
    assert (again.status, again.changed) == (0, {}), again.output
    assert sorted(made(running)) == HOSTS
    running.estate = OFF
    off = turned(running)
    assert off.status == 0, off.output
    assert written(running) == [HOSTS] * 3
    assert (stages(running), recorded(running)) == (dict.fromkeys(HOSTS, "plain"), {})


def test_a_tunnel_that_is_not_there_leaves_packets_on_their_way(running: Site) -> None:
    running.estate = ON
    (running.place / "fail" / "verify a1 step").touch()
    first = turned(running)
    assert first.status == 2, first.output
    assert "step 2 was not begun: a1 did not prove that they reach the others the new way" in said(first)
    assert (stages(running), recorded(running)) == (dict.fromkeys(HOSTS, "accepts"), {"a b": "accepts"})
    assert running.locks == []


@pytest.mark.slow
def test_a_second_gateway_comes_in_one_step_and_goes(running: Site) -> None:
    running.estate = ON
    assert turned(running).status == 0
    two = {**ON, "sites": {**SITES, "a": {"ipsec": {**SITES["a"]["ipsec"], "gateways": [
        {"host": "a1"}, {"host": "a2"}]}}}}  # fmt: skip
    running.estate = two
    told = said(running.run(name="plan"))
    assert "UDP 4500 on a2 (192.0.1.2) from b1 (192.0.2.3)" in told
    run = turned(running)
    assert run.status == 0, run.output
    assert written(running) == [HOSTS]
    assert set(stages(running).values()) == {"demands"}
    spec = json.loads((running.place / "hosts" / "a2" / "node.json").read_text())["ipsec"]
    assert [one["host"] for one in spec["gateways"]] == ["a1", "a2"]
    assert [one["remote_id"] for one in spec["connections"]] == ["isthmus-ipsec-b1"]
    running.estate = ON
    assert turned(running).status == 0
    spec = json.loads((running.place / "hosts" / "a2" / "node.json").read_text())["ipsec"]
    assert "connections" not in spec


@pytest.mark.slow
def test_a_gateway_that_is_not_ours_is_in_the_plan(running: Site) -> None:
    peer = {"networks": ["192.0.2.0/24"], "peer": {"address": "203.0.113.9"}}
    running.estate = {**ON, "sites": {**SITES, "b": {"ipsec": peer}}}
    told = said(running.run(name="plan"))
    assert "gateway of b (203.0.113.9): IKEv2 with 192.0.1.1, which begins" in told


def test_hosts_without_a_part_in_tunnels_are_not_asked(running: Site) -> None:
    assert turned(running).status == 0
    assert made(running) == []


def test_gateways_prove_new_keys_when_all_have_them(running: Site) -> None:
    """Whatever batches they are in; and where they do not take each other the run says so, and gives its lock back."""
    running.estate = ON
    assert turned(running).status == 0
    (running.place / "unproven").mkdir()
    for host in ("a1", "b1"):
        (running.place / "unproven" / host).touch()
    secrets = ("-e", json.dumps({"isthmus_ipsec_secrets": {"a b": "another key"}}))
    run = running.run("-e", "isthmus_serial=1", *secrets)
    assert run.status == 0, run.output
    told = [(call["host"], call.get("keys")) for call in tunnels(running)]
    assert sorted(told[:3]) == [(host, None) for host in HOSTS]
    assert [sorted(told[3:5]), sorted(told[5:])] == [
        [(host, what) for host in ("a1", "b1")] for what in ("used", "only")
    ]
    assert {call["secrets"]["a b"] for call in tunnels(running)} == {"another key"}
    check = turned(running, "--check", *secrets)
    assert check.status == 0, check.output
    assert {call.get("keys") for call in running.calls("ipsec")} == {None}, "nothing to be proven"

    (running.place / "fail" / "ipsec b1 used").touch()
    refused = turned(running, *secrets)
    assert refused.status == 2, refused.output
    words = "Failed: b1, in the task 'Gateways use new keys that the others have too': b1 has another pre-shared key"
    assert words in said(refused)
    assert [call["host"] for call in running.calls("ipsec") if call.get("keys") == "only"] == ["a1"]
    assert running.locks == []

    (running.place / "fail" / "ipsec b1 used").unlink()
    (running.place / "fail" / "node a2").touch()
    stopped = turned(running, *secrets)
    assert stopped.status == 2, stopped.output
    assert {call.get("keys") for call in running.calls("ipsec")} == {None}, "another host failed before"
