# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook `address_plan` under a real ansible-playbook: its own plays, role, filter and action; the module that
reads etcd on a host is a stand-in, and silent hosts are silent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

READS = """\
#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
import json, os
from ansible.module_utils.basic import AnsibleModule

options = {{name: {{"type": "raw"}} for name in ("state", "cluster", "run", "version")}}
module = AnsibleModule(options, supports_check_mode=True)
path = os.path.join({place!r}, module.params["cluster"])
if not os.path.exists(path):
    module.exit_json(changed=False)
with open(path) as file:
    text = file.read()
if text == "broken":
    module.fail_json(msg="password of alice is not hunter2")
module.exit_json(changed=False, record=json.loads(text))
"""

ESTATE: dict[str, Any] = {
    "name": "e",
    "reserved_ranges": [{"name": "office VPN", "range": "10.103.0.0/16"}],
    "clusters": {
        name: {
            "id": number,
            "workload_ranges": [f"10.10{number}.0.0/16"],
            "service_range": f"10.11{number}.0.0/16",
            "etcd": {"hosts": [f"{name}1"]},
        }
        for number, name in enumerate("ab", 1)
    },
}


class Site:
    def __init__(self, place: Path) -> None:
        self.place = place
        here = place / "collections" / "ansible_collections" / "isthmus" / "mesh"
        (here / "plugins" / "modules").mkdir(parents=True)
        for name in ("playbooks", "roles", "galaxy.yml", "meta"):
            (here / name).symlink_to(ROOT / name)
        for kind in (ROOT / "plugins").iterdir():
            if kind.name != "modules":
                (here / "plugins" / kind.name).symlink_to(kind)
        for path in (ROOT / "plugins" / "modules").glob("*.py"):
            if path.stem != "estate_record":
                (here / "plugins" / "modules" / path.name).symlink_to(path)
        self.records = place / "records"
        self.records.mkdir()
        (here / "plugins" / "modules" / "estate_record.py").write_text(READS.format(place=str(self.records)))
        self.estate = json.loads(json.dumps(ESTATE))
        self.hosts: dict[str, dict[str, Any]] = {
            "a1": {"isthmus_cluster": "a", "isthmus_underlay": "192.0.2.1"},
            "b1": {"isthmus_cluster": "b", "isthmus_underlay": "192.0.2.2"},
            "printer": {"ansible_connection": "ssh"},
        }

    def silence(self, host: str) -> None:
        self.hosts[host] |= {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}

    def run(self, *options: str) -> tuple[int, str]:
        inventory = {
            "all": {
                "hosts": self.hosts,
                "vars": {
                    "isthmus_estate": self.estate,
                    "ansible_connection": "local",
                    "ansible_python_interpreter": sys.executable,
                },
            }
        }
        (self.place / "hosts.yml").write_text(json.dumps(inventory))
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.place / "home"),
            "LANG": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(
            ["ansible-playbook", "-i", str(self.place / "hosts.yml"), "isthmus.mesh.address_plan", *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            cwd=self.place,
        )
        return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)

    def plan(self, *options: str, status: int = 0) -> tuple[dict[str, Any], str]:
        """The plan as a program gets it, and all that is shown."""
        code, output = self.run("-e", "isthmus_address_file=plan.json", *options)
        assert code == status, output
        found: dict[str, Any] = json.loads((self.place / "plan.json").read_text())
        return found, output


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def record(cluster: str, number: int, hosts: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "revision": 1,
        "name": cluster,
        "id": number,
        "state": "present",
        "site": cluster,
        "workload_ranges": [f"10.10{number}.0.0/16"],
        "service_range": f"10.11{number}.0.0/16",
        "node_prefix": 28,
        "ca_host": f"{cluster}1",
        "ca_certificate": None,
        "etcd": {
            "initial": f"{cluster}1",
            "token": cluster,
            "members": [f"{cluster}1"],
            "client_port": 2379,
            "peer_port": 2380,
            "source": {"type": "package"},
            "quota_bytes": 2147483648,
        },
        "hosts": {
            f"{cluster}{host}": {
                "range4": f"10.10{number}.0.{16 * (host - 1)}/28",
                "mesh4": f"10.10{number}.0.{16 * (host - 1) + 1}",
                "underlay4": f"192.0.{number}.{host}",
                "advertise4": f"192.0.{number}.{host}",
                "site": cluster,
                "labels": {},
                "state": "present",
                "workloads": {},
            }
            for host in range(1, hosts + 1)
        },
        "released": [],
    }


def write_records(site: Site, *clusters: str) -> None:
    """What the etcd of each of these holds: the record of both, and of an orphan."""
    three = {"a": record("a", 1, 2), "b": record("b", 2, 1), "old": record("old", 4, 1)}
    roster = {
        "schema": 1,
        "revision": 1,
        "estate": "e",
        "clusters": {name: {"id": document["id"], "state": "present"} for name, document in three.items()},
        "services": {},
    }
    documents = {"roster": roster, **{f"clusters/{name}": document for name, document in three.items()}}
    for cluster in clusters:
        (site.records / cluster).write_text(json.dumps({"cluster": cluster, "documents": documents}))


def test_a_new_cluster_beside_all_that_the_record_knows(site: Site) -> None:
    """Also beside a cluster that the inventory lacks, and with one whose etcd host is silent."""
    write_records(site, "a")
    site.silence("b1")
    found, output = site.plan("-e", "isthmus_new_cluster=paris", "-e", "isthmus_new_nodes=40")
    assert found["record"] == ["a"]
    assert found["unread"] == {
        "b": "b1 cannot be entered; what others hold of it is used",
        "old": "the inventory lacks it; what others hold of it is used",
    }
    assert found["new_cluster"] == {
        "cluster": "paris",
        "nodes": 40,
        "id": 3,
        "workload_ranges": ["10.105.0.0/22"],
        "service_range": "10.115.0.0/22",
        "node_prefix": 28,
        "hosts": 64,
        "workloads_per_host": 13,
        "services": 1022,
    }
    assert {one["cluster"]: one["hosts"]["now"] for one in found["clusters"]} == {"a": 2, "b": 1}
    for part in ("NOT READ: cluster b: b1 cannot be entered", "workload_ranges: [10.105.0.0/22]", "office VPN"):
        assert part in output
    assert "UNREACHABLE" not in output
    assert "port 1" not in json.dumps(found), "what the connection says may be anything"


def test_without_reaching_any_host(site: Site) -> None:
    """Nothing is dialled, and the inventory alone is planned."""
    for host in ("a1", "b1"):
        site.silence(host)
    found, output = site.plan("-e", "isthmus_hosts=localhost", "-e", "isthmus_growth=hosts=3000", "-vvv")
    assert "From the inventory alone: no estate record was read." in output
    assert set(found["unread"].values()) == {"its etcd hosts are not in this run; only the inventory is known"}
    assert [one["hosts"] for one in found["clusters"]] == [
        {"now": 1, "growth": 3000, "room": 4095, "capacity": 4096},
    ] * 2
    assert "SSH: EXEC" not in output
    (site.place / "plan.json").unlink()
    code, _output = site.run("-e", "isthmus_hosts=localhost", "-e", "isthmus_address_file=plan.json", "--check")
    assert code == 0
    assert not (site.place / "plan.json").exists()


def test_an_inventory_that_is_refused_is_shown_with_a_way_out(site: Site) -> None:
    """Overlaps and other problems are told, and what a failing host said is nobody's business in a ticket."""
    write_records(site, "a")
    (site.records / "b").write_text("broken")
    site.estate["clusters"]["b"]["workload_ranges"] = ["10.101.128.0/17"]
    site.estate["clusters"]["b"]["service_range"] = "10.103.8.0/21"
    site.hosts["b1"]["isthmus_sit"] = "x"
    site.hosts["a1"]["isthmus_labels"] = {"secret": 7}
    found, output = site.plan(status=2)
    fixes = {one["fix"]["range"]: one["fix"]["instead"] for one in found["overlaps"]}
    assert fixes == {"10.101.128.0/17": "10.102.0.0/16", "10.103.8.0/21": "10.112.0.0/16"}
    assert [one["fix"]["how"] for one in found["overlaps"]] == ["restore", "restore"]
    assert "put 10.112.0.0/16 back into isthmus_estate.clusters.b.service_range instead of 10.103.8.0/21" in output
    assert "did you mean 'isthmus_site'?" in output
    assert "NOT READ: cluster b: b1 cannot be asked" in output
    assert f"{len(found['problems'])} problems in the address plan" in output
    assert "hunter2" not in output


def test_growth_that_has_no_room_and_growth_that_is_no_growth(site: Site) -> None:
    found, output = site.plan("-e", json.dumps({"isthmus_growth": {"a.hosts": 5000, "clusters": 2}}), status=2)
    assert found["unread"] == {}, "both are new"
    assert (
        "isthmus_estate.clusters.a.workload_ranges: there is room for 4095 more hosts, and 5000 are to come" in output
    )
    code, output = site.run("-e", "isthmus_growth=host=3", "-e", "isthmus_new_cluster=a")
    assert code == 2
    assert "isthmus_growth: host: 'host' is nothing that grows" in output
