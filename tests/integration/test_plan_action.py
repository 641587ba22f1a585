# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan action under a real ansible-playbook: what it collects, what it leaves alone, what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml
from isthmus_mesh.documents import ServiceDefinition
from isthmus_mesh.identity import identity_range
from isthmus_mesh.spec import NodeSpec, spec_hash

ROOT = Path(__file__).resolve().parents[2]
VERSION = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]

PLAYBOOK = """\
- hosts: all
  gather_facts: false
  tasks:
    - isthmus.mesh.plan:
        records: "{{ records | default([]) }}"
        prune: "{{ isthmus_prune | default([]) }}"
        version: "{{ isthmus_version | default(omit) }}"
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


OTHER_TEAM = (
    "$ANSIBLE_VAULT;1.2;AES256;other\n"
    "62313365396662343061393464336163383764373764613633653634306231386433626436623361\n"
    "6134333665353966363534333632666535333761666131620a663537646436643839616531643561\n"
    "63396265333963386166373862626632666265643566633732396439353133323631623164336166\n"
    "3438\n"
)
"""What nobody here has the key of."""


def vaulted(name: str, cipher: str = OTHER_TEAM) -> str:
    return f"{name}: !vault |\n" + "".join(f"  {line}\n" for line in cipher.splitlines())


def test_values_of_other_teams_that_nobody_can_decrypt_do_not_matter(site: Site) -> None:
    """On a host that has no part in the mesh, its connection's included, and in variables of a mesh host that are none
    of ours; without any vault secret. The host without a cluster leaves the play as in our playbooks."""
    leave = "    - ansible.builtin.meta: end_host\n      when: isthmus_cluster is not defined\n"
    (site.place / "play.yml").write_text(PLAYBOOK.replace("  tasks:\n", f"  tasks:\n{leave}", 1))
    before = site.plan()["specs"]
    site.write("more.yml", {"all": {"hosts": {"db9": {"ansible_host": "192.0.2.99"}}}})
    (site.inventory / "host_vars").mkdir()
    site.write("host_vars/db9.yml", vaulted("db_password") + vaulted("ansible_password"))
    site.write("host_vars/a1.yml", vaulted("app_token") + f"app: {{nested: [{json.dumps('x')}]}}\n")
    site.write("group_vars/b.yml", vaulted("group_token"))
    done = site.run("-vvv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "db9" in done.stdout, "it is a host of the play"
    assert json.loads((site.place / "out.json").read_text())["specs"] == before


def test_the_roles_look_past_what_nobody_can_decrypt_too(site: Site) -> None:
    """Where the first host lacks the estate, it is looked for in the variables of all hosts; and so are copies of the
    record."""
    role = ROOT / "roles" / "plan"
    play = [
        {
            "hosts": "all",
            "gather_facts": False,
            "vars_files": [str(role / "defaults" / "main.yml"), str(role / "vars" / "main.yml")],
            "tasks": [
                {"ansible.builtin.meta": "end_host", "when": "isthmus_cluster is not defined"},
                {
                    "ansible.builtin.copy": {
                        "content": "{{ {'estate': plan_estate, 'copies': __plan_copies} | to_json }}",
                        "dest": "{{ out }}",
                        "mode": "0600",
                    },
                    "run_once": True,
                    "delegate_to": "localhost",
                },
            ],
        }
    ]
    (site.place / "play.yml").write_text(json.dumps(play))
    site.write("group_vars/all.yml", {"ansible_python_interpreter": sys.executable})
    site.write("group_vars/b.yml", {"isthmus_estate": ESTATE})
    site.write("more.yml", {"all": {"hosts": {"db9": {"ansible_host": "192.0.2.99"}}}})
    (site.inventory / "host_vars").mkdir()
    for host in ("db9", "a1", "b1"):
        site.write(f"host_vars/{host}.yml", vaulted("db_password"))
    assert site.plan() == {"estate": ESTATE, "copies": []}


def test_a_value_of_ours_that_nobody_can_decrypt_is_named(site: Site) -> None:
    (site.inventory / "host_vars").mkdir()
    site.write("host_vars/a1.yml", vaulted("isthmus_site"))
    refusal = site.refusal()
    assert "host a1: isthmus_site: it cannot be evaluated" in refusal
    assert "Next: define what it refers to, in plain text" in refusal


def encrypted(site: Site, text: str) -> str:
    (site.place / "secret").write_text("a word\n")
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ansible-vault")), "encrypt_string", text),
            *("--vault-password-file", str(site.place / "secret")),
        ],
        env={"PATH": os.environ["PATH"], "HOME": str(site.place), "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return "".join(f"{line.strip()}\n" for line in done.stdout.splitlines() if "!vault" not in line)


def test_values_of_ours_may_be_vaulted(site: Site) -> None:
    """Of the estate and of a host; the plan holds what they say."""
    site.hosts(a1={"ansible_host": "192.0.2.1", "isthmus_underlay": "192.0.2.7"}, b1={"ansible_host": "192.0.2.2"})
    plain = site.plan()["specs"]
    site.hosts(a1={"ansible_host": "192.0.2.1"}, b1={"ansible_host": "192.0.2.2"})
    (site.inventory / "host_vars").mkdir()
    site.write("host_vars/a1.yml", vaulted("isthmus_underlay", encrypted(site, "192.0.2.7")))
    name = vaulted("name", encrypted(site, "e")).replace("\n", "\n  ").rstrip()
    estate = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in ESTATE.items() if key != "name")
    site.write(
        "group_vars/all.yml",
        f"ansible_python_interpreter: {sys.executable}\nisthmus_estate:\n  {name}\n{estate}",
    )
    found = site.plan("--vault-password-file", str(site.place / "secret"))
    assert found["specs"] == plain
    assert found["record"]["roster"]["estate"] == "e"


def test_no_key_material_is_printed(site: Site) -> None:
    """The plan needs no secret: with -vvv and --diff its output holds no key, though the hosts' variables have some."""
    pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIPsecretsecretsecret\n-----END PRIVATE KEY-----\n"
    site.hosts(
        a1={"ansible_host": "192.0.2.1", "ansible_password": "p4ssw0rd-a1", "tls_key": pem},
        b1={"ansible_host": "192.0.2.2", "ansible_become_password": "p4ssw0rd-b1"},
    )
    record = site.plan()["record"]
    record["clusters/a"]["ca_certificate"] = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    done = site.run("-vvv", "--diff", records=[record])
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert '"specs": {' in output, "the result is there"
    for secret in ("PRIVATE KEY", "secretsecret", "p4ssw0rd"):
        assert secret not in output
    assert "PRIVATE KEY" not in (site.place / "out.json").read_text()


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


def test_ranges_that_overlap_are_refused_with_a_way_out(site: Site) -> None:
    """By what the record has in use: the new range gives way, also in a list of other problems."""
    record = site.plan()["record"]
    c = {"id": 3, "workload_ranges": ["10.101.0.0/17"], "service_range": "10.113.0.0/16", "etcd": {"hosts": ["c1"]}}
    reserved = [{"name": "office VPN", "range": "10.112.9.0/24"}]
    estate = {**ESTATE, "reserved_ranges": reserved, "clusters": {**ESTATE["clusters"], "c": c}}
    site.write("group_vars/all.yml", {"isthmus_estate": estate, "ansible_python_interpreter": sys.executable})
    site.hosts(a1={"ansible_host": "192.0.2.1"}, b1={"ansible_host": "192.0.2.1"}, c1={"ansible_host": "192.0.2.3"})
    refusal = site.refusal(records=[record])
    assert "The mesh cannot be planned: 3 problems. Nothing was changed on any host." in refusal
    assert "Next: write 10.103.0.0/17 instead of 10.101.0.0/17 in isthmus_estate.clusters.c.workload_ranges" in refusal
    assert "Next: cluster b would have to be removed and added anew with 10.114.0.0/16 in place of" in refusal
    assert "this changes 1 host (b1). Until then leave reserved range 10.112.9.0/24 (office VPN) out" in refusal
    assert "host b1.isthmus_underlay: 192.0.2.1 is also an address of host a1" in refusal


def test_a_variable_that_nobody_reads_is_warned_about(site: Site) -> None:
    """Also one that was given with -e; what the playbooks define for their own roles is nobody's mistake."""
    site.hosts(a1={"ansible_host": "192.0.2.1", "isthmus_hosst": "x"}, b1={"ansible_host": "192.0.2.2"})
    play = site.place / "play.yml"
    play.write_text(PLAYBOOK.replace("  tasks:", "  vars: {isthmus_spec: x}\n  tasks:", 1))
    assert site.plan(isthmus_prun="b2", isthmus_serial=1)["warnings"] == [
        "host a1 and 1 more: isthmus_prun is not a variable of Isthmus, which ignores it; did you mean "
        "'isthmus_prune'?",
        "host a1: isthmus_hosst is not a variable of Isthmus, which ignores it; did you mean 'isthmus_hosts'?",
    ]


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
    gone = site.plan(records=[record], isthmus_prune="b2,host/b3")
    assert gone["removed"] == ["host/b2", "host/b3"]
    again = site.plan(records=[gone["record"]], isthmus_prune="b2,host/b3")
    assert (again["removed"], again["record"]) == ([], gone["record"])
    assert [warning.partition(":")[0] for warning in again["warnings"]] == ["isthmus_prune=b2", "isthmus_prune=host/b3"]


def test_changes_that_a_running_estate_cannot_make_yet(site: Site) -> None:
    record = site.plan()["record"]
    for name in ("clusters/a", "clusters/b"):
        record[name]["ca_certificate"] = "PEM"
    a = {**ESTATE["clusters"]["a"], "etcd": {"hosts": ["a1"], "client_port": 2479}}
    changed = {**ESTATE, "overlay": {"port": 8473}, "clusters": {**ESTATE["clusters"], "a": a}}
    site.write("group_vars/all.yml", {"isthmus_estate": changed, "ansible_python_interpreter": sys.executable})
    site.hosts(a1={"ansible_host": "192.0.2.1"}, b1={"ansible_host": "192.0.2.22"})
    refusal = site.refusal(records=[record])
    assert "The mesh cannot be planned: 3 problems. Nothing was changed on any host." in refusal
    assert "host b1.isthmus_underlay: a change from 192.0.2.2 to 192.0.2.22 is not yet supported" in refusal
    assert "isthmus_estate.overlay.port: a change from 8472 to 8473 is not yet supported" in refusal
    assert "clusters.a.etcd.client_port: a change from 2379 to 2479 is not yet supported" in refusal


def test_a_newer_record_is_refused_in_words(site: Site) -> None:
    record = site.plan()["record"]
    record["clusters/a"]["schema"] = 2
    record["roster"]["version"] = "99.0.0"
    refusal = site.refusal("--check", records=[record])
    assert "Nothing was changed on any host. record 1 (clusters/a): its schema 2 is newer than 1" in refusal
    assert "Next: `ansible-galaxy collection install isthmus.mesh:==99.0.0` on the controller" in refusal


def test_a_pinned_version(site: Site) -> None:
    """From the inventory or the command line, on a new estate and on a running one."""
    site.write("group_vars/a.yml", {"isthmus_version": VERSION})
    record = site.plan("--limit", "a1")["record"]
    assert record["roster"]["version"] == VERSION
    assert site.plan(records=[record])["record"] == record
    site.write("group_vars/a.yml", {"isthmus_version": "99.0.0"})
    for records in ([], [record]):
        refusal = site.refusal(records=records)
        assert f"isthmus_version: 99.0.0 is wanted, and the controller has isthmus.mesh {VERSION}" in refusal
        assert "Nothing was changed on any host." in refusal
        assert "Next: `ansible-galaxy collection install isthmus.mesh:==99.0.0`" in refusal
    assert site.plan(records=[record], isthmus_version=VERSION)["record"] == record


def test_a_downgrade_is_refused_before_the_inventory_is_read(site: Site) -> None:
    """It may be written for the newer version."""
    record = site.plan()["record"]
    record["roster"]["version"] = "99.0.0"
    site.hosts(a1={"ansible_host": "192.0.2.1", "isthmus_labels": 1}, b1={"isthmus_underlay": "{{ nowhere }}"})
    for mode in ("--check", "--diff"):
        refusal = site.refusal(mode, records=[record])
        assert "The mesh cannot be planned: 1 problem. Nothing was changed on any host." in refusal
        assert f"isthmus.mesh: {VERSION} is older than 99.0.0, which was applied to this estate last" in refusal
        assert "Next: `ansible-galaxy collection install isthmus.mesh:==99.0.0`, and run again" in refusal


def test_an_upgrade_is_made_when_it_is_asked_for(site: Site) -> None:
    record = site.plan()["record"]
    older = {**record, "roster": {**record["roster"], "version": "0.0.1"}}
    refusal = site.refusal("--check", records=[older])
    assert f"isthmus.mesh: {VERSION} is newer than 0.0.1, which was applied to this estate last" in refusal
    assert f"`ansible-playbook isthmus.mesh.site -e isthmus_version={VERSION}`" in refusal
    asked = site.plan(records=[older], isthmus_version=VERSION)
    assert asked["record"]["roster"]["version"] == VERSION
    assert site.plan(records=[asked["record"]])["record"] == asked["record"]


def test_a_record_of_before_versions_takes_this_one(site: Site) -> None:
    record = site.plan()["record"]
    unknown = {**record, "roster": {key: value for key, value in record["roster"].items() if key != "version"}}
    first = site.plan(records=[unknown])
    assert first["record"] == {**record, "roster": {**first["record"]["roster"], "version": VERSION, "revision": 2}}
    second = site.plan(records=[first["record"]])
    assert (second["record"], second["changes"]) == (first["record"], [])


# Names at the edges of what is accepted, and words that mean something to YAML, Python, Jinja or Ansible.
CLUSTERS = ("null", "true", "1e9", "all-1", "items", "0", "7" + "-" * 30 + "z")
MEMBERS = (1, 3, 5, 1, 3, 1, 5)
SITES = ("no", "9" * 63, "a--b")
LONG = "0" + "-" * 61 + "z"
HOSTS = ("keys", "false", "0x10", "1.2.example", "198.18.0.7", "localhost.localdomain", "h" * 48 + "-1")


def seven_clusters() -> tuple[dict[str, Any], dict[str, Any]]:
    """Estate and hosts (with the cluster as their variable): members and other hosts, dealt and pinned ranges, several
    sites, one of them behind address translation."""
    clusters: dict[str, Any] = {}
    hosts: dict[str, dict[str, Any]] = {}
    for index, (name, members) in enumerate(zip(CLUSTERS, MEMBERS, strict=True)):
        names = [HOSTS[index], *(f"{number}-{index}.all" for number in range(members + 1))]
        for number, host in enumerate(names):
            hosts[host] = {
                "isthmus_cluster": name,
                "isthmus_underlay": f"198.18.{index}.{number + 1}",
                "isthmus_site": SITES[(index + number % 2) % len(SITES)],
                "isthmus_workloads": [
                    {"name": LONG, "namespace": "null", "labels": {"app": "true"}, "slice": f"w{number}.slice"},
                    {"name": "1e9", "unit": "w@1.service", "service_account": "no"},
                ],
            }
            if number % 2:
                hosts[host]["isthmus_advertise"] = f"203.0.{index}.{number + 1}"
        pinned = hosts[names[-1]]
        pinned["isthmus_node_range"] = f"10.{index}.0.16/28"
        pinned["isthmus_workloads"][0]["address"] = f"10.{index}.0.18"
        clusters[name] = {
            "id": 255 - index,
            "site": SITES[index % len(SITES)],
            "workload_ranges": [f"10.{index}.0.0/26", f"10.{index}.128.0/20"],
            "service_range": f"10.{index}.64.0/20",
            "etcd": {"hosts": names[:members]},
        }
    service = {"ports": [{"port": 80}], "backends": {"labels": {"app": "true"}}, "namespace": "null", "global": True}
    services = [{"name": name, **service} for name in ("null", "1e9", LONG)]
    return {"name": "0", "sites": {site: {} for site in SITES}, "clusters": clusters, "services": services}, hosts


def write_groups(site: Site, estate: dict[str, Any], hosts: dict[str, dict[str, Any]]) -> None:
    """Hosts in groups by their cluster, in the order given."""
    groups: dict[str, Any] = {}
    for name, variables in hosts.items():
        own = {key: value for key, value in variables.items() if key != "isthmus_cluster"}
        group = groups.setdefault(
            f"group_{CLUSTERS.index(variables['isthmus_cluster'])}",
            {"hosts": {}, "vars": {"isthmus_cluster": variables["isthmus_cluster"]}},
        )
        group["hosts"][name] = own
    site.write("hosts.yml", {"all": {"children": groups}})
    site.write("group_vars/all.yml", {"isthmus_estate": estate, "ansible_python_interpreter": sys.executable})


def test_seven_clusters_with_odd_names(site: Site) -> None:
    estate, hosts = seven_clusters()
    write_groups(site, estate, hosts)
    found = site.plan()
    specs = {name: NodeSpec.from_dict(document) for name, document in found["specs"].items()}
    assert sorted(specs) == sorted(hosts)
    assert all(spec.host == name and spec.hash == spec_hash(found["specs"][name]) for name, spec in specs.items())
    assert all(spec.cluster.name == hosts[name]["isthmus_cluster"] for name, spec in specs.items())

    ranges = [spec.node.range4 for spec in specs.values()]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(ranges, 2))
    addresses: list[IPv4Address] = []
    for name, spec in specs.items():
        assert str(spec.node.underlay4) == hosts[name]["isthmus_underlay"]
        assert any(spec.node.range4.subnet_of(outer) for outer in spec.cluster.workload_ranges4)
        inner = [spec.node.mesh4, *(workload.address4 for workload in spec.workloads)]
        assert len(inner) == 3
        assert all(address in spec.node.range4 for address in inner)
        addresses += [*inner, *{spec.node.underlay4, spec.node.advertise4}]
    assert len(set(addresses)) == len(addresses)
    pinned = {name: variables for name, variables in hosts.items() if "isthmus_node_range" in variables}
    assert len(pinned) == 7
    for name, variables in pinned.items():
        assert str(specs[name].node.range4) == variables["isthmus_node_range"]
        wanted = variables["isthmus_workloads"][0]["address"]
        assert wanted in {str(workload.address4) for workload in specs[name].workloads if workload.name == LONG}

    outer = [*specs["keys"].mesh_ranges4, *specs["keys"].service_ranges4]
    assert len(outer) == 21
    assert not any(one.overlaps(other) for one, other in itertools.combinations(outer, 2))
    assert not any(spec.node.underlay4 in network for spec in specs.values() for network in outer)
    identities = sorted({identity_range(spec.cluster.id, spec.cluster.max_clusters) for spec in specs.values()})
    assert len(identities) == 7
    assert all(one[1] < other[0] for one, other in itertools.pairwise(identities))

    for name, members in zip(CLUSTERS, MEMBERS, strict=True):
        own = [spec for spec in specs.values() if spec.cluster.name == name]
        carrying = [spec for spec in own if spec.member is not None and spec.registrar is not None]
        assert len(carrying) == members
        for spec in carrying:
            assert spec.member is not None
            assert sorted(spec.member.members) == sorted(one.host for one in carrying)
            assert spec.registrar is not None
            assert {peer.name for peer in spec.registrar.peers} == set(CLUSTERS) - {name}
            assert set(spec.pki.trust) == set(CLUSTERS)
        assert all(len(spec.etcd.endpoints) == members for spec in own)
        assert [spec.host for spec in own if spec.pki.ca.here] == estate["clusters"][name]["etcd"]["hosts"][:1]
        present = [ServiceDefinition.from_dict(one) for one in found["services"][name]["present"]]
        assert sorted(one.name for one in present) == sorted(["null", "1e9", LONG])


def test_seven_clusters_planned_again_and_in_another_order(site: Site) -> None:
    estate, hosts = seven_clusters()
    write_groups(site, estate, hosts)
    first = site.plan()
    turned = {**estate, "clusters": dict(reversed(estate["clusters"].items())), "services": estate["services"][::-1]}
    write_groups(site, turned, dict(reversed(hosts.items())))
    again = site.plan(records=[first["record"]])
    assert (again["specs"], again["record"], again["changes"]) == (first["specs"], first["record"], [])
    assert again["services"] == first["services"]
    assert site.plan()["specs"] == first["specs"]
