# SPDX-License-Identifier: GPL-3.0-or-later
"""Which host does what in roles/etcd, under a real ansible-playbook: hosts of this machine, and some that nobody
reaches. In check mode, so that no etcd is needed: the modules predict."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playbook import Recap, recaps
from unit.mesh.estates import estate, hosts, model, planned

FAKE = Path(__file__).with_name("fake_systemctl.py")
ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = """\
- hosts: all
  gather_facts: false
  roles:
    - role: isthmus.mesh.etcd
      vars:
        etcd_spec: "{{ specs[inventory_hostname] }}"
        etcd_record: "{{ record }}"
"""


class Site:
    """Hosts o1, o2 and o3 of cluster onprem, of which the first ``members`` carry its etcd, and the worker w1."""

    def __init__(self, place: Path, members: int = 3) -> None:
        self.place = place
        collections = place / "collections" / "ansible_collections" / "isthmus"
        collections.mkdir(parents=True)
        (collections / "mesh").symlink_to(ROOT)
        (place / "play.yml").write_text(PLAYBOOK)
        (place / "bin").mkdir()
        (place / "bin" / "systemctl").write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        (place / "bin" / "systemctl").chmod(0o755)
        the_estate, the_hosts = estate(), hosts()
        del the_estate["clusters"]["cloud"], the_hosts["c1"]
        the_hosts["w1"] = {"isthmus_cluster": "onprem", "ansible_host": "198.18.1.9"}
        first = planned(model(the_estate, the_hosts))
        the_estate["clusters"]["onprem"]["etcd"]["hosts"] = ["o1", "o2", "o3"][:members]
        prune = tuple(f"member/onprem/{name}" for name in ("o1", "o2", "o3")[members:])
        plan = planned(model(the_estate, the_hosts), first, prune=prune)
        (place / "variables.json").write_text(json.dumps({"specs": plan.specs, "record": plan.record}))

    def run(self, limit: str, unreachable: tuple[str, ...]) -> tuple[dict[str, Recap], str]:
        inventory = {
            name: {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
            if name in unreachable
            else {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
            for name in ("o1", "o2", "o3", "w1")
        }
        (self.place / "hosts.yml").write_text(json.dumps({"all": {"hosts": inventory}}))
        environment: dict[str, Any] = {
            "PATH": f"{self.place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ISTHMUS_TEST_HOST": str(self.place),
            "HOME": str(self.place),
            "LANG": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_NOCOLOR": "1",
        }
        command = ["ansible-playbook", "--check", "--limit", limit, "-i", str(self.place / "hosts.yml")]
        done = subprocess.run(
            [*command, "-e", f"@{self.place / 'variables.json'}", str(self.place / "play.yml")],
            env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return recaps(done.stdout), done.stdout + done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize("down", [(), ("o1",), ("o1", "o2")])
def test_a_limited_hosts_rights_are_made_on_the_first_member_that_is_reached(site: Site, down: tuple[str, ...]) -> None:
    recap, output = site.run("w1", unreachable=down)
    assert (recap["w1"].failed, recap["w1"].unreachable, recap["w1"].changed) == (0, 0, 1), output
    asked = [name for name in ("o1", "o2", "o3") if f"[w1 -> {name}" in output]
    assert asked == ["o1", "o2", "o3"][: len(down) + 1], output


def test_a_limited_host_is_told_when_no_member_is_reached(site: Site) -> None:
    recap, output = site.run("w1", unreachable=("o1", "o2", "o3"))
    assert recap["w1"].failed == 1
    said = " ".join(output.split())
    assert "can be entered to give the agent of w1 its rights: o1, o2, o3 were tried. Next: make one of them" in said


def done_by(output: str, task: str) -> list[str]:
    """Hosts that did something in a task, in order."""
    part = output[output.index(f"TASK [isthmus.mesh.etcd : {task}]") :].split("\nTASK [")[0].split("\nPLAY RECAP")[0]
    return sorted(re.findall(r"^(?:ok|changed): \[(\w+)", part, re.MULTILINE))


@pytest.mark.parametrize(("down", "actor"), [((), "o1"), (("o1",), "o2")])
def test_one_member_acts_for_the_cluster_and_former_ones_come_last(
    tmp_path: Path, down: tuple[str, ...], actor: str
) -> None:
    _recap, output = Site(tmp_path, members=2).run("all", unreachable=down)
    assert done_by(output, "The member runs") == [name for name in ("o1", "o2") if name not in down]
    assert done_by(output, "A member that the plan does not have any more is put away") == ["o3", "w1"]
    assert done_by(output, "Every certificate has its rights") == [actor]
    assert output.index("The member runs") < output.index("is put away") < output.index("Every certificate")
    assert done_by(output, "The agent's certificate has its rights") == []
