# SPDX-License-Identifier: GPL-3.0-or-later
"""Inventories of molecule's scenarios, as Ansible reads them: each has the lab's estate and what it is for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import lab_router
import pytest
from isthmus_mesh import bgp
from isthmus_mesh.model import read_model
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import Record
from unit.mesh.estates import NOW, VERSION
from unit.mesh.test_inventory_docs import ROOT, SCHEMA, inventory

AWS = {"endpoint": "http://127.0.0.1:1", "network": "vpc-1", "region": "eu-central-1", "pid": 1}


class Scenario:
    def __init__(self, name: str, place: Path) -> None:
        """A copy, beside which stands what tests/tools/beside_lab.py tells."""
        here = place / "extensions" / "molecule" / name / "inventory"
        shutil.copytree(ROOT / "extensions" / "molecule" / name / "inventory", here)
        (place / "build").mkdir()
        (place / "build" / "beside-aws.json").write_text(json.dumps(AWS))
        self.here = here
        estate = self.variable("isthmus_estate")
        _estate, hosts = inventory(ROOT / "inventories" / "lab")
        model = read_model(estate, hosts)
        assert model.warnings == ()
        jsonschema.validate({"isthmus_estate": estate, **hosts["onprem-1"]}, SCHEMA)
        self.plan: Plan = plan(model, Record(), NOW, VERSION)
        self.ways = {tuple(row["sites"]): (row["routing"], row["encryption"]) for row in self.plan.sites}

    def variable(self, name: str) -> Any:
        """Its value for a host."""
        done = subprocess.run(
            [
                Path(sys.executable).with_name("ansible"),
                "onprem-1",
                "-i",
                self.here,
                "-m",
                "debug",
                "-a",
                f"var={name}",
            ],
            env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", "ANSIBLE_NOCOLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.partition("=>")[2])[name]


def test_wireguard(tmp_path: Path) -> None:
    found = Scenario("wireguard", tmp_path)
    inside = {pair: way for pair, way in found.ways.items() if pair[0] == pair[1]}
    assert inside == {(site, site): ("native", "none") for site in ("cloud", "onprem")}
    assert {way for pair, way in found.ways.items() if pair not in inside} == {("tunnel", "wireguard")}


def test_gateways(tmp_path: Path) -> None:
    found = Scenario("gateways", tmp_path)
    assert [pair for pair, way in found.ways.items() if way == ("tunnel", "ipsec-gateway")] == [("cloud", "onprem")]
    assert {host for host, spec in found.plan.specs.items() if spec.get("ipsec", {}).get("connections")} == {
        "onprem-1",
        "cloud-1",
    }


def test_bgp(tmp_path: Path) -> None:
    """As the router is that tests/lab_router.py makes."""
    found = Scenario("bgp", tmp_path)
    assert found.ways[("cloud", "onprem")] == ("native", "none")
    routers = found.plan.bgp.routers
    assert {router["as_number"] for router in routers} == {lab_router.ROUTER_AS}
    told = {(router["site"], one["as_number"]) for router in routers for one in router["neighbours"]}
    assert told == set(lab_router.AS.items())
    passwords = found.variable("isthmus_bgp_passwords")
    assert passwords == {router["address"]: lab_router.PASSWORD for router in routers}
    assert [list(bgp.bad_passwords(own, passwords)) for own in found.plan.bgp.hosts.values()] == [[]] * 5


def test_vpc(tmp_path: Path) -> None:
    found = Scenario("vpc", tmp_path)
    (call,) = found.plan.vpcs.calls
    assert (call["site"], call["place"]["network"], call["hosts"]) == ("cloud", "vpc-1", ["198.18.2.11", "198.18.2.12"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "extensions" / "molecule").glob("*/molecule.yml")), ids=lambda path: path.parent.name
)
def test_every_scenario_is_converged_twice_and_taken_away(path: Path) -> None:
    steps = [line.strip() for line in path.read_text().splitlines()]
    assert [word for word in steps if word in ("- converge", "- idempotence", "- verify", "- cleanup")] == [
        "- converge",
        "- idempotence",
        "- verify",
        "- cleanup",
    ]
    for name in ("converge", "verify", "cleanup"):
        assert path.with_name(f"{name}.yml").exists()
