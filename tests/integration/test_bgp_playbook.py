# SPDX-License-Identifier: GPL-3.0-or-later
"""BGP of sites under `site`, `plan` and `verify`: in which order with native routing, on whom, and what of passwords is
seen. The playbooks and their plan are real, modules on hosts are `fake_modules.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_batches_playbook import Site, said

CLUSTERS: dict[str, tuple[list[str], list[str]]] = {"a": (["a1"], ["a2"]), "b": (["b1"], [])}
ROUTER = {"address": "192.0.1.254", "as_number": 65000}
PASSWORD = "not-to-be-seen"  # noqa: S105
ON = {"routing": "native", "sites": {"a": {"bgp": {"as_number": 65101, "routers": [ROUTER]}}, "b": {}}}


class Speaking(Site):
    """All hosts have a password for the router of site a."""

    def inventory(self) -> Path:
        path = super().inventory()
        content = json.loads(path.read_text())
        content["all"]["children"]["group_a"]["vars"]["isthmus_bgp_passwords"] = {ROUTER["address"]: PASSWORD}
        path.write_text(json.dumps(content))
        return path

    def frr(self) -> dict[str, Any]:
        """What each host that announces its range was told."""
        found = {host: self.place / "hosts" / host / "frr" for host in self.hosts}
        return {host: json.loads(path.read_text()) for host, path in found.items() if path.exists()}

    def modules(self) -> list[str]:
        """The modules that changed something on host a1, in order; proofs by their scope."""
        calls = [json.loads(line) for line in (self.place / "calls").read_text().splitlines()]
        mine = [call for call in calls if call["host"] == "a1"]
        names = [call.get("scope", call["module"]) for call in mine if call["module"] in ("bgp", "node", "verify")]
        return [name for name in names if name != "host"]

    def turned(self, *options: str, name: str = "site") -> Any:
        return self.run("-e", "isthmus_serial=100%", *options, name=name)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Speaking:
    """A running estate, so that native routing is turned on in steps."""
    made = Speaking(tmp_path_factory.mktemp("running"), CLUSTERS)
    run = made.run()
    assert run.status == 0, run.output
    return made


def test_it_comes_before_native_goes_after_it_and_is_told_without_passwords(running: Speaking) -> None:
    running.estate = ON
    shown = running.turned(name="plan")
    assert shown.status == 0, shown.output
    assert "router 192.0.1.254 of a, AS 65000: IPv4 unicast neighbours: 192.0.1.1 (AS 65101, a1) with" in said(shown)
    assert running.frr() == {}

    on = running.turned()
    assert on.status == 0, on.output
    assert "router 192.0.1.254 of a, AS 65000" in said(on)
    own = {"as_number": 65101, "routers": [{**ROUTER, "bfd": False}], "estate_routers": [ROUTER["address"]]}
    assert running.frr() == {host: [own, {ROUTER["address"]: PASSWORD}] for host in ("a1", "a2")}
    assert running.modules() == ["bgp", "node", "step", "node", "step", "node"]
    again = running.turned("-v")
    assert (again.status, again.changed) == (0, {}), again.output
    checked = running.turned(name="verify")
    assert checked.status == 0, checked.output
    for run in (shown, on, again, checked):
        assert PASSWORD not in run.output

    # Left out of the inventory it stays; by its name it goes, after the last step of turning native off.
    running.estate = {"routing": "native"}
    left_out = running.turned()
    assert left_out.status == 0, left_out.output
    assert set(running.frr()) == {"a1", "a2"}
    running.estate = {}
    off = running.turned("-e", "isthmus_prune=bgp/a")
    assert off.status == 0, off.output
    assert running.frr() == {}
    assert running.modules() == ["node", "node", "node", "bgp"]
    assert (running.turned().changed, running.modules()) == ({}, ["node"])


def test_a_host_without_a_session_ends_the_run_before_native_is_used(tmp_path: Path) -> None:
    site = Speaking(tmp_path, CLUSTERS)
    assert site.run().status == 0
    site.estate = ON
    (site.place / "fail" / "bgp a1").touch()
    run = site.run()
    assert run.status == 2, run.output
    assert "Failed: a1, in the task 'Routers know where the host's range is': bgp fails on a1" in said(run)
    assert set(site.frr()) <= {"a2"}
    assert "step" not in site.modules()
