# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan action under a real ansible-playbook: what it collects, what it leaves alone, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

PLAYBOOK = """\
- hosts: all
  gather_facts: false
  tasks:
    - isthmus.mesh.plan:
        records: "{{ records | default([]) }}"
        prune: "{{ isthmus_prune | default([]) }}"
      run_once: true
      register: found
    - ansible.builtin.copy:
        content: "{{ found | to_json }}"
        dest: "{{ out }}"
        mode: "0600"
      run_once: true
      delegate_to: localhost
"""

ESTATE = {
    "name": "e",
    "clusters": {
        "a": {
            "id": 1,
            "workload_ranges": ["10.101.0.0/16"],
            "service_range": "10.111.0.0/16",
            "etcd": {"hosts": ["a1"]},
        },
        "b": {
            "id": 2,
            "workload_ranges": ["10.102.0.0/16"],
            "service_range": "10.112.0.0/16",
            "etcd": {"hosts": ["b1"]},
        },
    },
}


class Site:
    """An inventory directory and the way to plan it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        collections = place / "collections" / "ansible_collections" / "isthmus"
        collections.mkdir(parents=True)
        (collections / "mesh").symlink_to(ROOT)
        self.inventory = place / "inventory"
        (self.inventory / "group_vars").mkdir(parents=True)
        (place / "play.yml").write_text(PLAYBOOK)
        self.write("group_vars/all.yml", {"isthmus_estate": ESTATE, "ansible_python_interpreter": sys.executable})
        self.hosts(a1={"ansible_host": "192.0.2.1"}, b1={"ansible_host": "192.0.2.2"})

    def write(self, name: str, content: Any) -> None:
        (self.inventory / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def hosts(self, **hosts: dict[str, Any]) -> None:
        groups: dict[str, Any] = {}
        for name, variables in hosts.items():
            groups.setdefault(name[0], {"hosts": {}, "vars": {"isthmus_cluster": name[0]}})["hosts"][name] = variables
        self.write("hosts.yml", {"all": {"children": groups}})

    def run(self, *options: str, **extra: Any) -> subprocess.CompletedProcess[str]:
        out = self.place / "out.json"
        out.unlink(missing_ok=True)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.place),
            "LANG": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCALHOST_WARNING": "false",
        }
        command = ["ansible-playbook", "-i", str(self.inventory), str(self.place / "play.yml"), *options]
        variables = json.dumps({"out": str(out), **extra})
        return subprocess.run(
            [*command, "-e", variables], env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    def plan(self, *options: str, **extra: Any) -> dict[str, Any]:
        done = self.run(*options, **extra)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads((self.place / "out.json").read_text())
        return found

    def refusal(self, *options: str, **extra: Any) -> str:
        done = self.run(*options, **extra)
        assert done.returncode != 0, done.stdout
        return done.stdout + done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_plan_and_plan_again(site: Site) -> None:
    first = site.plan()
    assert not first["changed"]
    assert sorted(first["specs"]) == ["a1", "b1"]
    assert first["diff"]["before"] == ""
    assert "host a1: cluster a" in first["diff"]["after"]
    again = site.plan(records=[{"cluster": "a", "documents": first["record"]}, first["record"]])
    assert again["record"] == first["record"]
    assert again["specs"] == first["specs"]
    assert again["changes"] == []


def test_a_limit_changes_nothing_about_the_plan(site: Site) -> None:
    assert site.plan("--limit", "b1")["specs"] == site.plan()["specs"]


def test_variables_are_templated_and_others_left_alone(site: Site) -> None:
    site.hosts(
        a1={
            "ansible_host": "name.example.com",
            "isthmus_underlay": "{{ base }}.7",
            "base": "192.0.2",
            "unrelated": "{{ nobody_defined_this }}",
        },
        b1={"ansible_host": "192.0.2.2"},
    )
    site.write(
        "group_vars/b.yml",
        "isthmus_labels: {zone: \"{{ 'z' ~ 1 }}\"}\n"
        "secret_of_another_team: !vault |\n"
        "  $ANSIBLE_VAULT;1.1;AES256\n"
        "  6162636465666768696a6b6c6d6e6f70\n",
    )
    found = site.plan()
    assert found["specs"]["a1"]["node"]["underlay4"] == "192.0.2.7"
    assert found["specs"]["b1"]["node"]["labels"] == {"zone": "z1"}
    assert "nobody_defined_this" not in json.dumps(found)


def test_hosts_without_a_cluster_have_no_part(site: Site) -> None:
    before = site.plan()["specs"]
    site.write("more.yml", {"all": {"hosts": {"Printer_1": {"ansible_connection": "local"}}}})
    assert site.plan()["specs"] == before


def test_a_variable_that_cannot_be_evaluated_is_named(site: Site) -> None:
    site.hosts(a1={"isthmus_underlay": "{{ nowhere }}"}, b1={"ansible_host": "192.0.2.2"})
    refusal = site.refusal()
    assert "host a1: isthmus_underlay: it cannot be evaluated" in refusal
    assert "Next: define what it refers to, in plain text" in refusal


def test_all_problems_in_one_message(site: Site) -> None:
    site.hosts(a1={"ansible_host": "192.0.2.1", "isthmus_label": {}}, b1={"ansible_host": "192.0.2.1"})
    refusal = site.refusal()
    assert "The mesh cannot be planned: 2 problems. Nothing was changed on any host." in refusal
    assert "host b1.isthmus_underlay: 192.0.2.1 is also an address of host a1" in refusal
    assert "did you mean 'isthmus_labels'? Change it" in refusal


def test_a_host_in_the_groups_of_two_clusters(site: Site) -> None:
    site.write("hosts.yml", {"all": {"children": {"x": {"hosts": {"a1": {}, "b1": {}}}, "y": {"hosts": {"a1": {}}}}}})
    site.write("group_vars/x.yml", {"isthmus_cluster": "a"})
    site.write("group_vars/y.yml", {"isthmus_cluster": "b"})
    assert "host a1.isthmus_cluster: the host is in two clusters: a, b" in site.refusal()


def test_a_group_below_another_may_say_otherwise(site: Site) -> None:
    children = {"y": {"hosts": {"b1": {"ansible_host": "192.0.2.2"}}, "vars": {"isthmus_cluster": "b"}}}
    above = {"vars": {"isthmus_cluster": "a"}, "hosts": {"a1": {"ansible_host": "192.0.2.1"}}, "children": children}
    site.write("hosts.yml", {"all": {"children": {"x": above}}})
    assert site.plan()["specs"]["b1"]["cluster"]["name"] == "b"


def test_two_estates_are_refused(site: Site) -> None:
    site.write("group_vars/b.yml", {"isthmus_estate": {**ESTATE, "name": "other"}})
    assert "isthmus_estate: host b1 and host a1 have different ones" in site.refusal()


@pytest.mark.parametrize(
    "variables",
    [
        {"awx_job_slice_count": 2},
        {"tower_job_slice_count": "3"},
        {"awx_workflow_job_name": "mesh", "awx_job_template_name": "mesh"},
    ],
)
def test_a_slice_is_refused(site: Site, variables: dict[str, Any]) -> None:
    refusal = site.refusal(**variables)
    assert "This is a slice of an AWX job. Nothing was changed on any host." in refusal
    assert "set job_slice_count of the job template to 1" in refusal


def test_a_job_in_a_workflow_is_no_slice(site: Site) -> None:
    variables = {"awx_workflow_job_name": "nightly", "awx_job_template_name": "mesh", "awx_job_slice_count": 1}
    assert site.plan(awx_user_name="alice", **variables)["record"]["roster"]["by"] == "alice"


def test_names_to_prune_may_be_one_string(site: Site) -> None:
    three = {"a1": {"ansible_host": "192.0.2.1"}, "b1": {"ansible_host": "192.0.2.2"}}
    site.hosts(**three, b2={"ansible_host": "192.0.2.3"}, b3={"ansible_host": "192.0.2.4"})
    record = site.plan()["record"]
    site.hosts(**three)
    assert site.plan(records=[record])["orphans"] == ["host/b2", "host/b3"]
    assert site.plan(records=[record], isthmus_prune="b2,host/b3")["removed"] == ["host/b2", "host/b3"]


def test_a_newer_record_is_refused_in_words(site: Site) -> None:
    record = site.plan()["record"]
    record["clusters/a"]["schema"] = 2
    refusal = site.refusal(records=[record])
    assert "record 1 (clusters/a): its schema 2 is newer than 1" in refusal
    assert "Next: run that version or later" in refusal
