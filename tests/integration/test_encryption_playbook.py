# SPDX-License-Identifier: GPL-3.0-or-later
"""Encryption and native routing of a running estate are turned on and off by `site`: in steps, each over all hosts
before the next. So is masquerading of a site, which has no steps. The playbook and its plan are real, modules on hosts
are `fake_modules.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_batches_playbook import Site, said
from isthmus_mesh import openings
from playbook import Run

CLUSTERS = {"a": (["a1"], ["a2"]), "b": (["b1"], [])}
HOSTS = ["a1", "a2", "b1"]
ON = {"encryption": "wireguard"}


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
    """By host, the stage with the hosts of other sites."""
    found = {}
    for host in HOSTS:
        section = json.loads((site.place / "hosts" / host / "node.json").read_text()).get("wireguard")
        others = set() if section is None else set(section.get("changing", {}).values()) or {"demands"}
        (found[host],) = others or {"plain"}
    return found


def turned(site: Site, *options: str) -> Run:
    """A run, in as few batches as there can be."""
    return site.run("-e", "isthmus_serial=100%", *options)


def recorded(site: Site) -> Any:
    found = json.loads((site.place / "record").read_text())["roster"].get("encryption")
    return found and found["all"]


def written(site: Site) -> list[list[str]]:
    """The hosts on which each step was made."""
    calls = [call["host"] for call in site.calls("node")]
    return [sorted(calls[begin : begin + len(HOSTS)]) for begin in range(0, len(calls), len(HOSTS))]


def proofs(site: Site) -> list[str]:
    return sorted(call["host"] for call in site.calls("verify") if call["scope"] == "step")


def test_on_and_off_go_in_one_run_each_and_a_second_run_changes_nothing(running: Site) -> None:
    running.estate = ON
    told = said(running.run(name="plan"))
    assert "encryption of a and b is turned on, in steps of one run" in told
    assert "UDP 51871 on every host of a and b from each other" in told
    assert recorded(running) is None
    on = turned(running)
    assert (on.status, running.locks) == (0, []), on.output
    assert written(running) == [HOSTS] * 3
    assert proofs(running) == sorted([*HOSTS, *HOSTS])
    assert (stages(running), recorded(running)) == (dict.fromkeys(HOSTS, "demands"), "demands")
    again = turned(running)
    assert (again.status, again.changed) == (0, {}), again.output
    assert (written(running), proofs(running)) == ([HOSTS], [])
    running.estate = {}
    off = turned(running)
    assert off.status == 0, off.output
    assert written(running) == [HOSTS] * 3
    assert proofs(running) == [], "to send in clear needs no proof"
    assert (stages(running), recorded(running)) == (dict.fromkeys(HOSTS, "plain"), None)


def specs(site: Site) -> dict[str, Any]:
    return {host: json.loads((site.place / "hosts" / host / "node.json").read_text()) for host in HOSTS}


def test_masquerade_of_a_site_is_its_hosts_and_the_plan_says_so_before(running: Site) -> None:
    before, record = specs(running), (running.place / "record").read_text()
    running.estate = {"sites": {"a": {"masquerade": True}, "b": {}}}
    words = "masquerade of site a: new, packets of workloads to the outside get their host's address"
    shown = running.run(name="plan")
    assert shown.status == 0, shown.output
    assert words in said(shown)
    assert set(shown.changed) == {"a1", "a2"}
    assert (specs(running), (running.place / "record").read_text()) == (before, record)
    on = turned(running)
    assert on.status == 0, on.output
    assert written(running) == [HOSTS], "there is one step only"
    assert set(on.changed) == {"a1", "a2"}
    assert {host: spec["node"].get("masquerade") for host, spec in specs(running).items()} == {
        "a1": True,
        "a2": True,
        "b1": None,
    }
    again = turned(running)
    assert (again.status, again.changed) == (0, {}), again.output


@pytest.mark.slow
def test_a_silent_host_keeps_all_at_the_step_that_it_can_understand(running: Site) -> None:
    running.estate = ON
    (running.place / "silent" / "a2").touch()
    first = turned(running)
    assert first.status == 4, first.output
    assert "how packets go is changed in 3 steps, and step 2 was not begun: a2 did not do the one before" in said(first)
    assert stages(running) == {**dict.fromkeys(HOSTS, "accepts"), "a2": "plain"}
    assert recorded(running) == "accepts"
    (running.place / "silent" / "a2").unlink()
    second = turned(running)
    assert second.status == 0, second.output
    assert stages(running) == dict.fromkeys(HOSTS, "demands")


def test_without_a_proof_nothing_goes_through_wireguard_and_the_run_says_so(running: Site) -> None:
    running.estate = ON
    (running.place / "fail" / "verify b1 step").touch()
    first = turned(running)
    assert first.status == 2, first.output
    assert "step 2 was not begun: b1 did not prove that they reach the others the new way: b1 has no way" in said(first)
    assert (stages(running), recorded(running)) == (dict.fromkeys(HOSTS, "accepts"), "accepts")
    assert running.locks == []


def test_agents_alone_are_recorded_and_a_step_that_is_not_is_the_last_one(running: Site) -> None:
    running.estate = ON
    unrecorded = turned(running, "--skip-tags", "services")
    assert (unrecorded.status, running.locks) == (0, []), unrecorded.output
    assert (stages(running), recorded(running)) == (dict.fromkeys(HOSTS, "accepts"), None)
    assert "step 2 was not begun: no etcd got the record of the one before" in said(unrecorded)
    alone = turned(running, "--tags", "agent")
    assert (alone.status, running.locks) == (0, []), alone.output
    assert (stages(running), recorded(running)) == (dict.fromkeys(HOSTS, "demands"), "demands")
    assert "Pending" not in said(alone)


@pytest.mark.slow
def test_a_failure_in_a_later_step_ends_the_run_and_the_next_one_goes_on_there(running: Site) -> None:
    running.estate = ON
    (running.place / "fail" / "node a2 sends").touch()
    first = turned(running)
    assert first.status == 2, first.output
    assert "Failed: a2" in said(first)
    assert recorded(running) == "sends"
    assert set(stages(running).values()) == {"accepts", "sends"}
    assert running.locks == []
    (running.place / "fail" / "node a2 sends").unlink()
    rest = turned(running)
    assert rest.status == 0, rest.output
    assert written(running) == [HOSTS] * 2, "the step that was begun, and the last one"
    assert stages(running) == dict.fromkeys(HOSTS, "demands")


def test_check_mode_predicts_the_first_step(running: Site) -> None:
    running.estate = ON
    run = turned(running, "--check")
    assert run.status == 0, run.output
    assert written(running) == [HOSTS]
    assert (stages(running), proofs(running)) == (dict.fromkeys(HOSTS, "plain"), [])


def test_a_copy_of_a_machine_is_refused_before_anything_is_changed(running: Site) -> None:
    """It has the other one's specification, or only its key; in a run for the copy alone the record tells of the
    other."""
    running.estate = ON
    record = (running.place / "record").read_bytes()
    places = {host: running.place / "hosts" / host for host in HOSTS}
    own = (places["b1"] / "node.json").read_bytes()
    (places["b1"] / "node.json").write_bytes((places["a2"] / "node.json").read_bytes())
    for options in (("--limit", "b1"), ("--check",), ()):
        run = turned(running, *options)
        assert (run.status, run.changed) == (2, {}), run.output
        assert "b1 cannot join the mesh yet; nothing was changed on it. Its /etc/isthmus/node.json is that of a2" in (
            said(run)
        )
        assert "`isthmus.mesh.teardown --limit b1`, and run again: it gets keys of its own." in said(run)
        assert [running.calls(name) for name in ("bundle", "pki_request", "node")] == [[], [], []]
    (places["b1"] / "node.json").unlink()
    for host in ("a2", "b1"):
        (places[host] / "keys").write_text(json.dumps({"51871": "KEY"}))
    run = turned(running)
    assert (run.status, run.changed) == (2, {}), run.output
    key = "/etc/isthmus/pki/wireguard.key"
    assert f"a2 ({key}) and b1 ({key}) have one private key of WireGuard; nothing was changed on any" in said(run)
    assert [running.calls(name) for name in ("bundle", "pki_request", "node")] == [[], [], []]
    assert (running.place / "record").read_bytes() == record
    (places["b1"] / "keys").unlink()
    (places["b1"] / "node.json").write_bytes(own)
    joined = turned(running)
    assert joined.status == 0, joined.output


def both_stages(site: Site) -> tuple[Any, Any]:
    """Of encryption and of native routing, as the record has them."""
    roster = json.loads((site.place / "record").read_text())["roster"]
    encryption, routing = (roster.get(key) for key in ("encryption", "routing"))
    return encryption and encryption["all"], routing and routing["all"]


@pytest.mark.slow
def test_native_inside_wireguard_is_turned_on_after_encryption_and_off_before_it_in_one_run_each(
    running: Site,
) -> None:
    running.estate = {**ON, "routing": "native"}
    on = turned(running)
    assert (on.status, running.locks) == (0, []), on.output
    assert written(running) == [HOSTS] * 6
    assert proofs(running) == sorted(HOSTS * 5), "before each step but the first"
    assert both_stages(running) == ("demands", "demands")
    assert "routers of" not in said(on), "the network sees WireGuard only"
    again = turned(running)
    assert (again.status, again.changed) == (0, {}), again.output
    running.estate = {}
    off = turned(running)
    assert off.status == 0, off.output
    assert written(running) == [HOSTS] * 6
    assert proofs(running) == []
    assert both_stages(running) == (None, None)


@pytest.mark.slow
def test_without_a_proof_of_the_native_way_all_stays_in_the_tunnel_inside_wireguard(running: Site) -> None:
    running.estate = ON
    assert turned(running).status == 0
    running.estate = {**ON, "routing": "native"}
    (running.place / "fail" / "verify b1 step").touch()
    first = turned(running)
    assert first.status == 2, first.output
    assert "step 2 was not begun: b1 did not prove that they reach the others the new way" in said(first)
    assert both_stages(running) == ("demands", "accepts")
    running.estate = ON
    back = turned(running)
    assert back.status == 0, back.output
    assert both_stages(running) == ("demands", None)


def test_keys_are_replaced_in_one_run_of_its_playbook(tmp_path: Path) -> None:
    encrypted = Site(tmp_path, CLUSTERS)
    encrypted.estate = ON
    first = encrypted.run()
    assert first.status == 0, first.output
    assert (proofs(encrypted), stages(encrypted)) == ([], dict.fromkeys(HOSTS, "demands"))
    run = encrypted.run("-e", "isthmus_serial=100%", name="rotate_wireguard_keys")
    assert (run.status, encrypted.locks) == (0, []), run.output
    assert written(encrypted) == [HOSTS] * 4
    assert proofs(encrypted) == sorted([*HOSTS, *HOSTS])
    specs = [json.loads((encrypted.place / "hosts" / host / "node.json").read_text()) for host in HOSTS]
    assert [openings.tunnels(spec) for spec in specs] == [[spec["wireguard"]] for spec in specs]
    assert {spec["wireguard"]["port"] for spec in specs} == {51872}
    assert json.loads((encrypted.place / "record").read_text())["roster"]["encryption"]["keys"] == {"number": 1}


def test_native_routing_goes_the_same_way_and_the_run_shows_what_routers_need(running: Site) -> None:
    running.estate = {"routing": "native"}
    on = turned(running)
    assert on.status == 0, on.output
    assert written(running) == [HOSTS] * 3
    assert proofs(running) == sorted([*HOSTS, *HOSTS])
    specs = {host: json.loads((running.place / "hosts" / host / "node.json").read_text()) for host in HOSTS}
    assert {tuple(spec["native"]["stages"].items()) for spec in specs.values()} == {
        (("a", "demands"), ("b", "demands")),
    }
    here = {host: (spec["node"]["range4"], spec["node"]["underlay4"]) for host, spec in specs.items()}
    (network, address), far = here["b1"], here["a1"][1]
    assert f"routers of b: {network} via {address} (workloads of b1, for packets from a)" in said(on)
    assert f"routers of a: {network} over the way to {address} (workloads of hosts of b)" in said(on)
    assert f"over the way to {far}, {here['a2'][1]} (workloads of hosts of a)" in said(on)
    again = turned(running)
    assert (again.status, again.changed) == (0, {}), again.output
    assert "routers of" not in said(again), "nothing was changed"
