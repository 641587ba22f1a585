# SPDX-License-Identifier: GPL-3.0-or-later
"""Run at any time by anyone: a site that is cut off, and two operators at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo import EDGE
from estate_tools import ETCD_HOSTS, ONPREM, PKI, Estate
from installation import variant
from playbook import INVENTORY, kill_run, launch, play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

LOCK = "isthmus/v1/lock/run"
NEW = "cloud-2"
UNREACHABLE = 4
"""What ansible-playbook ends with when hosts could not be entered and nothing failed."""


def trusted(estate: Estate, host: str) -> list[str]:
    return sorted(estate.lab.exec(host, ["ls", f"{PKI}/trust"]).stdout.split())


def node(estate: Estate, host: str) -> Any:
    return json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)


def locks(estate: Estate) -> dict[str, str]:
    """Who has the lock, by cluster."""
    held = {cluster: estate.keys(hosts[0], LOCK) for cluster, hosts in ETCD_HOSTS.items()}
    return {cluster: json.loads(found[LOCK].value)["by"] for cluster, found in held.items() if found}


def test_a_site_that_is_cut_off_gets_its_part_later(estate: Estate, tmp_path: Path) -> None:
    """A host and a service are added in cloud meanwhile; traffic among those that are left goes on."""

    def without(_: Any, groups: dict[str, Any]) -> None:
        groups["cloud"]["hosts"][NEW]["isthmus_state"] = "absent"

    def with_copy(declared: dict[str, Any], _: Any) -> None:
        web = next(service for service in declared["services"] if service["name"] == "web")
        declared["services"].append({**web, "name": "copy"})

    estate.converged()
    wanted = variant(tmp_path / "wanted", with_copy)
    play("site", inventory=variant(tmp_path / "without", without))
    before = {host: (trusted(estate, host), node(estate, host)) for host in estate.lab.hosts if host != NEW}
    estate.lab.cut("onprem", controller=True)
    try:
        estate.everywhere({"cloud-1"}, ("cloud-1", EDGE))
        with estate.unnoticed(estate.edge):
            run = play("site", inventory=wanted, check=False)
        assert run.status == UNREACHABLE, run.output[-6000:]
        assert "Pending: 3 of the hosts (onprem-1, onprem-2, onprem-3)" in run.output
        assert "Pending: the etcd of onprem did not get the estate record" in run.output
        assert {name for name, recap in run.hosts.items() if recap.unreachable} == set(ONPREM)
        assert locks(estate) == {}
        for host in ("cloud-1", EDGE):
            trust, spec = before[host]
            assert trusted(estate, host) == trust
            assert node(estate, host)["registrar"]["peers"] == spec["registrar"]["peers"]
        estate.until(
            "edge uses the new service on the new host",
            lambda: _used(estate, EDGE, "shop/copy") >= {"cloud-1", NEW},
        )
        for host in ONPREM:
            assert node(estate, host) == before[host][1], f"{host} was cut off"
            assert trusted(estate, host) == before[host][0]
        estate.lab.restore("onprem")
        rest = play("site", inventory=wanted)
        assert "Pending" not in rest.output
        assert set(rest.changed) >= {"onprem-1"}
        assert play("site", inventory=wanted).changed == {}
        play("verify", inventory=wanted)
        estate.until(
            "onprem uses the new service everywhere",
            lambda: _used(estate, "onprem-3", "shop/copy") >= {"onprem-1", "onprem-2", "cloud-1", NEW},
        )
    finally:
        estate.lab.restore("onprem")
        play("site", "-e", "isthmus_prune=service/shop/copy")
    estate.converged()


def _used(estate: Estate, host: str, service: str) -> set[str]:
    found = estate.service_named(host, service)
    return set() if found is None else {backend["node"] for backend in found["backends"] if backend["used"]}


def labelled(label: str) -> Callable[[Any, dict[str, Any]], None]:
    """Each host has something to do and each cluster's record changes."""

    def change(_: Any, groups: dict[str, Any]) -> None:
        for group in groups.values():
            group["vars"]["isthmus_labels"] = {"round": label}

    return change


def test_of_two_runs_at_once_one_is_told_to_wait(estate: Estate, tmp_path: Path) -> None:
    estate.converged()
    first = variant(tmp_path / "first", labelled("first"))
    second = variant(tmp_path / "second", labelled("second"))
    with launch("site", "--limit", "onprem", inventory=first, output=tmp_path / "first.out") as running:
        try:
            estate.until("the first run has the lock of every cluster", lambda: len(locks(estate)) == len(ETCD_HOSTS))
            told = play("site", "--limit", "cloud,edge", inventory=second, check=False)
            assert running.poll() is None, "the first run ended too early to be in the way"
            assert told.status not in (0, UNREACHABLE)
            assert "is being changed by another run" in told.output
            assert "isthmus_break_lock=" in told.output
            assert told.changed == {}
            assert "round" not in node(estate, EDGE)["node"]["labels"]
        finally:
            status = running.wait(300)
    assert status == 0, (tmp_path / "first.out").read_text()[-6000:]
    assert locks(estate) == {}
    assert node(estate, "onprem-1")["node"]["labels"]["round"] == "first"
    play("site", inventory=second)
    assert node(estate, "onprem-1")["node"]["labels"]["round"] == "second"
    play("verify", inventory=second)
    play("site", inventory=INVENTORY)
    estate.converged()


def test_a_run_that_died_is_no_hindrance_to_the_next(estate: Estate, tmp_path: Path) -> None:
    """Its controller knows that it is dead; another one is told how to go on."""
    estate.converged()
    with launch("site", output=tmp_path / "killed.out") as running:
        estate.until("the run has a lock", lambda: bool(locks(estate)))
        kill_run(running)
    assert locks(estate), "it gave nothing back"
    assert play("site").status == 0
    assert locks(estate) == {}
