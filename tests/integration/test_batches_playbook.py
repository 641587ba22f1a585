# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook `site` over the hosts of three clusters, in batches: its own plays, roles, filters and plan under a real
ansible-playbook; what modules do on a host is `fake_modules.py`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from playbook import Run, recaps

ROOT = Path(__file__).resolve().parents[2]
VERSION = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
FAKED = (
    *("bgp", "bundle", "estate_record", "etcd_access", "etcd_member", "ipsec", "node"),
    *("pki_install", "pki_replace", "pki_request", "pki_revoke", "pki_sign", "preflight", "verify", "wireguard_keys"),
)
CLUSTERS = {"a": (["a1", "a2", "a3"], []), "b": (["b1"], ["b2"]), "c": (["c1"], [])}
HOSTS = sorted(host for members, others in CLUSTERS.values() for host in [*members, *others])
BATCHES = [["a1", "b2", "c1"], ["a2", "b1"], ["a3"]]


def fake(collection: Path, name: str, source: str = "fake_modules.py") -> None:
    """Put what stands for the module `name` into a collection."""
    here = ROOT / "tests" / "integration"
    base = (here / "fake_module.py").read_text()
    text = (here / source).read_text().replace("from fake_module import Module\n", base)
    path = collection / "plugins" / "modules" / f"{name}.py"
    path.unlink(missing_ok=True)  # a link to the real one
    path.write_text(re.sub(r'^NAME = ".*"$', f'NAME = "{name}"', text, flags=re.MULTILINE))


class Site:
    """The inventory, the hosts' files, and what was called on them."""

    def __init__(self, place: Path, clusters: Mapping[str, tuple[list[str], list[str]]] = CLUSTERS) -> None:
        self.place = place
        self.clusters = clusters
        self.hosts = sorted(host for members, others in clusters.values() for host in [*members, *others])
        for name in ("locks", "fail", "silent", *(f"hosts/{host}" for host in self.hosts)):
            (place / name).mkdir(parents=True)
        self.here = place / "collections" / "ansible_collections" / "isthmus" / "mesh"
        self.collection(self.here)
        (place / "bundle").mkdir()
        (place / "bundle" / "bundle.json").write_text(
            json.dumps({"schema": 1, "version": VERSION, "platforms": [{"arch": "x", "python": "3", "archive": "x"}]})
        )
        self.estate: dict[str, Any] = {}
        self.labels: dict[str, str] = {}
        self.removed: tuple[str, ...] = ()
        self.environment: dict[str, str] = {}
        for host in self.hosts:
            interpreter = place / "hosts" / host / "python"
            interpreter.write_text(f'#!/bin/sh\nFAKE_HOST={host} FAKE_PLACE={place} exec {sys.executable} "$@"\n')
            interpreter.chmod(0o755)

    def collection(self, here: Path) -> None:
        """This checkout's, without the modules (and the actions in front of them) that would change a host."""
        (here / "plugins").mkdir(parents=True)
        for name in ("playbooks", "roles", "galaxy.yml", "meta"):
            (here / name).symlink_to(ROOT / name)
        for kind in (ROOT / "plugins").iterdir():
            if kind.name not in ("modules", "action"):
                (here / "plugins" / kind.name).symlink_to(kind)
                continue
            (here / "plugins" / kind.name).mkdir()
            for path in kind.glob("*.py"):
                if path.stem not in FAKED or (kind.name, path.stem) == ("action", "estate_record"):
                    (here / "plugins" / kind.name / path.name).symlink_to(path)
        for name in FAKED:
            fake(here, name)

    def inventory(self) -> Path:
        estate: dict[str, Any] = {"name": "e", **self.estate, "clusters": {}}
        groups: dict[str, Any] = {}
        for number, (cluster, (members, others)) in enumerate(self.clusters.items(), 1):
            estate["clusters"][cluster] = {
                "id": number,
                "workload_ranges": [f"10.10{number}.0.0/16"],
                "service_range": f"10.11{number}.0.0/16",
                "etcd": {"hosts": [host for host in members if host not in self.removed]},
            }
            # Not the order of the batches: nothing may depend on the inventory's.
            groups[f"group_{cluster}"] = {
                "vars": {"isthmus_cluster": cluster},
                "hosts": {
                    host: {
                        "isthmus_underlay": f"192.0.{number}.{1 + self.hosts.index(host)}",
                        "ansible_connection": f"{{{{ 'ssh' if '{self.place}/silent/{host}' is exists else 'local' }}}}",
                        "ansible_python_interpreter": str(self.place / "hosts" / host / "python"),
                        **({"isthmus_labels": self.labels} if self.labels else {}),
                        **({"isthmus_state": "absent"} if host in self.removed else {}),
                    }
                    for host in reversed([*members, *others])
                },
            }
        everywhere = {
            "isthmus_estate": estate,
            "isthmus_bundles": [str(self.place / "bundle")],
            "ansible_host": "127.0.0.1",
            "ansible_port": 1,
        }
        path = self.place / "hosts.yml"
        path.write_text(json.dumps({"all": {"children": groups, "vars": everywhere}}))
        return path

    def run(self, *options: str, name: str = "site") -> Run:
        (self.place / "calls").unlink(missing_ok=True)
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.place / "home"),
            "LANG": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
            **self.environment,
        }
        command = ["ansible-playbook", "-i", str(self.inventory()), f"isthmus.mesh.{name}", *options]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=240, cwd=self.place
        )
        return Run(done.returncode, done.stdout + done.stderr, recaps(done.stdout))

    def take_over(self, before: Site) -> None:
        """The record, and what each host of `before` was made to be."""
        for name in ("record", *(f"hosts/{host}/node.json" for host in before.hosts)):
            shutil.copy(before.place / name, self.place / name)

    def calls(self, module: str) -> list[dict[str, Any]]:
        path = self.place / "calls"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if call["module"] == module]

    def order(self, module: str) -> list[list[str]]:
        """The hosts on which it ran, cut where the batches should be."""
        hosts = [call["host"] for call in self.calls(module)]
        return [sorted(hosts[begin : begin + size]) for begin, size in ((0, 3), (3, 2), (5, 1)) if hosts[begin:]]

    def has_round(self, label: str) -> list[str]:
        """The hosts whose file says that they had their turn."""
        specs = {host: json.loads((self.place / "hosts" / host / "node.json").read_text()) for host in self.hosts}
        return [host for host, spec in specs.items() if spec["node"]["labels"].get("round") == label]

    @property
    def locks(self) -> list[str]:
        return sorted(path.name for path in (self.place / "locks").iterdir())


def said(run: Run) -> str:
    """All of it, without the callback's line breaks."""
    return re.sub(r"\s+", " ", run.output)


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, Run]:
    """The clusters as the first run forms them, and that run."""
    made = Site(tmp_path_factory.mktemp("formed"))
    return made, made.run()


@pytest.fixture
def running(formed: tuple[Site, Run], tmp_path: Path) -> Site:
    """Clusters that run, and a change for every host."""
    made = Site(tmp_path)
    made.take_over(formed[0])
    made.labels = {"round": "next"}
    return made


def test_new_clusters_go_together_and_a_converged_run_is_small(formed: tuple[Site, Run]) -> None:
    site, first = formed
    assert (first.status, site.locks) == (0, []), first.output
    assert set(first.changed) == set(HOSTS)
    assert [sorted(call["host"] for call in site.calls(name)) for name in ("node", "verify")] == [HOSTS, HOSTS]
    assert "no hosts matched" in first.output, "nobody is left for the play of the batches"
    again = site.run()
    assert (again.status, again.changed) == (0, {})
    assert site.order("node") == BATCHES
    assert site.calls("verify") == [], "what changed nothing has nothing to prove"
    assert {name: recap.ok for name, recap in again.hosts.items() if recap.ok > 10} == {}


def test_a_change_goes_over_the_hosts_in_batches_each_proven_before_the_next(running: Site) -> None:
    shown = said(running.run(name="plan"))
    assert all(f"batch {number}: {', '.join(hosts)}" in shown for number, hosts in enumerate(BATCHES, 1))
    run = running.run()
    assert (run.status, set(run.changed)) == (0, set(HOSTS)), run.output
    assert running.order("node") == running.order("verify") == BATCHES
    turns = [
        call["module"] for call in [json.loads(line) for line in (running.place / "calls").read_text().splitlines()]
    ]
    kinds = [name for name, following in zip(turns, [*turns[1:], ""], strict=True) if name != following]
    assert [name for name in kinds if name in ("node", "verify")] == ["node", "verify"] * 3
    assert {call["scope"] for call in running.calls("verify")} == {"host"}
    assert running.calls("verify")[0]["before"] == {"services": ["shop/web"]}
    assert running.locks == []


@pytest.mark.parametrize("option", ["--syntax-check", "--list-hosts", "--list-tasks"])
def test_the_playbook_can_be_listed_before_anything_is_planned(running: Site, option: str) -> None:
    run = running.run(option)
    assert run.status == 0, run.output
    assert "WARNING" not in run.output


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "playbooks").glob("*.yml")))
def test_every_playbook_is_read_without_a_warning(tmp_path: Path, name: str) -> None:
    run = Site(tmp_path).run("--syntax-check", name=name)
    assert run.status == 0, run.output
    assert "WARNING" not in run.output, run.output


@pytest.mark.slow
def test_serial_of_the_operator(running: Site) -> None:
    run = running.run("-e", "isthmus_serial=100%")
    assert run.status == 0, run.output
    hosts = [call["host"] for call in running.calls("node")]
    assert (sorted(hosts[:4]), hosts[4:]) == (["a1", "b1", "b2", "c1"], ["a2", "a3"]), "members are apart all the same"
    refused = running.run("-e", "isthmus_serial=none")
    assert refused.status != 0
    assert "isthmus_serial: 'none' is no size of a batch. Nothing was changed on any host." in said(refused)
    assert running.calls("node") == []


@pytest.mark.parametrize(
    ("what", "module", "task"),
    [
        ("node a2", "node", "The host is a member of the mesh"),
        ("verify a2", "verify", "The hosts of the batch work as before"),
    ],
    ids=["a step", "the gate"],
)
def test_a_failure_ends_the_run_after_its_batch_and_says_what_was_done(
    running: Site, what: str, module: str, task: str
) -> None:
    (running.place / "fail" / what).touch()
    run = running.run()
    assert run.status == 2, run.output
    told = said(run)
    assert "Stopped at the first failure: no further batch was begun." in told
    assert f"Failed: a2, in the task '{task}': {module} fails on a2" in told
    assert "Changed: a1, b1, b2, c1." in told
    assert "Not touched: a3." in told
    assert running.has_round("next") == [
        host for host in HOSTS if host not in ({"a2", "a3"} if module == "node" else {"a3"})
    ]
    assert [call["host"] for call in running.calls("bundle")].count("a3") == 0
    assert running.locks == []
    assert {name for name, recap in run.hosts.items() if recap.failed} == {"a2"}


def test_a_failure_in_a_batch_of_one_gives_the_lock_back_and_the_next_run_does_the_rest(running: Site) -> None:
    (running.place / "fail" / "node a1").touch()
    run = running.run("--limit", "a1,a2")
    assert run.status == 2, run.output
    told = said(run)
    assert "Changed: none." in told
    assert "Nothing to change: none." in told
    assert "Not touched: a2." in told
    assert running.locks == []
    (running.place / "fail" / "node a1").unlink()
    rest = running.run()
    assert (rest.status, running.has_round("next")) == (0, HOSTS), rest.output


def test_what_is_done_once_for_all_fails_for_its_whole_batch(running: Site) -> None:
    (running.place / "fail" / "estate_record").touch()
    run = running.run()
    assert run.status == 2, run.output
    told = said(run)
    assert "in the task 'The estate record is in every cluster's etcd': One or more items failed" not in told
    assert "somebody else wrote the record" in told
    assert "Stopped with that: b2, c1." in told
    assert "Not touched: a2, a3, b1." in told
    assert running.has_round("next") == []
    assert running.locks == []


def test_a_failure_while_clusters_form_leaves_the_others_alone(running: Site) -> None:
    record = json.loads((running.place / "record").read_text())
    record["clusters/c"]["ca_certificate"] = None
    (running.place / "record").write_text(json.dumps(record))
    (running.place / "fail" / "node c1").touch()
    run = running.run()
    assert run.status == 2, run.output
    assert "Failed: c1, in the task 'The host is a member of the mesh'" in said(run)
    assert "Not touched: a1, a2, a3, b1, b2." in said(run)
    assert running.has_round("next") == []


def test_a_package_that_cannot_be_installed_stops_before_anything_is_changed(running: Site) -> None:
    (running.place / "fail" / "packages b2").touch()
    run = running.run()
    assert run.status == 2, run.output
    assert "Failed: b2, in the installation of packages" in said(run)
    assert "Not touched: a1, a2, a3, b1, c1." in said(run)
    assert running.locks == []


def test_silent_hosts_stop_nobody_and_are_pending(running: Site) -> None:
    """One was silent from the beginning, the only host of the last batch falls silent when others had their turn."""
    (running.place / "silent" / "b2").touch()
    (running.place / "silence").write_text("node a1 a3")
    run = running.run()
    assert run.status == 4, run.output
    assert "Pending: 2 of the hosts (a3, b2) could not be entered." in said(run)
    assert "Stopped" not in run.output
    assert running.has_round("next") == ["a1", "a2", "b1", "c1"]
    assert {name for name, recap in run.hosts.items() if recap.unreachable} == {"a3", "b2"}
    assert running.locks == []


@pytest.mark.parametrize("step", ["bundle", "pki_request"], ids=["before pki", "before etcd"])
def test_a_batch_that_falls_silent_as_a_whole_inside_a_step_ends_no_run(running: Site, step: str) -> None:
    (running.place / "silence").write_text(f"{step} a2 a2\n{step} b1 b1\n")
    run = running.run()
    assert run.status == 4, run.output
    assert "Pending: 2 of the hosts (a2, b1) could not be entered." in said(run)
    assert "Next: run the playbook again when the reason above is gone" in said(run)
    assert running.has_round("next") == ["a1", "a3", "b2", "c1"]
    assert running.locks == ["b"], "that of a and c went back; b1 is silent, where that of b is given back"


def test_a_failure_in_the_batch_of_silent_hosts_still_ends_with_the_lists(running: Site) -> None:
    (running.place / "silence").write_text("bundle a2 a2\n")
    (running.place / "fail" / "node b1").touch()
    run = running.run()
    told = said(run)
    assert "Failed: b1, in the task 'The host is a member of the mesh'" in told, run.output
    assert "Changed: a1, b2, c1." in told
    assert "Not touched: a3." in told
    assert "Pending: 1 of the hosts (a2) could not be entered." in told
    assert running.locks == []


@pytest.mark.parametrize("limit", ["all", "b2"])
def test_a_host_whose_clusters_etcd_cannot_be_entered_is_pending_and_stops_nobody(running: Site, limit: str) -> None:
    (running.place / "silent" / "b1").touch()
    run = running.run("--limit", limit)
    assert run.status == 4, run.output
    told = said(run)
    assert (
        "Pending: b2 could not be finished without the etcd of cluster b, where its agent needs rights: b1 could not "
        "be entered." in told
    )
    assert "Stopped" not in told
    assert running.has_round("next") == (["a1", "a2", "a3", "c1"] if limit == "all" else [])
    assert {name for name, recap in run.hosts.items() if recap.failed} == set()


@pytest.mark.slow
def test_what_a_removed_etcd_host_holds_is_revoked_by_each_authority_once(running: Site) -> None:
    """b's cannot at first, and is asked again by the next run."""
    running.removed = ("a3",)
    (running.place / "fail" / "pki_revoke b1").touch()

    def revoked() -> dict[str, tuple[Any, Any]]:
        record = json.loads((running.place / "record").read_text())
        return {name: tuple(record[f"clusters/{name}"].get(key) for key in ("crl", "departed")) for name in CLUSTERS}

    first = running.run()
    assert first.status == 0, first.output
    assert sorted(call["host"] for call in running.calls("pki_revoke")) == ["a1", "b1", "c1"]
    assert revoked() == {"a": ("LIST", None), "b": (None, ["a3"]), "c": ("LIST", None)}
    assert (
        "Pending: the authority of cluster b on b1 has not revoked what a3 held as an etcd host: pki_revoke fails on b1"
        in said(first)
    )
    (running.place / "fail" / "pki_revoke b1").unlink()
    second = running.run()
    assert [call["host"] for call in running.calls("pki_revoke")] == ["b1"]
    assert revoked()["b"] == ("LIST", None)
    assert "Pending" not in said(second)
    third = running.run()
    assert (third.changed, running.calls("pki_revoke")) == ({}, [])


def test_check_mode_predicts_every_batch_also_after_a_failure(running: Site) -> None:
    (running.place / "fail" / "node a1").touch()
    run = running.run("--check")
    assert run.status == 2
    assert set(run.changed) >= set(HOSTS) - {"a1"}
    assert "Stopped" not in run.output
    assert "Failed: a1" in said(run)
    assert running.calls("verify") == []
    assert running.has_round("next") == []


def test_tags_and_limit(running: Site) -> None:
    run = running.run("--limit", "group_b", "--tags", "agent")
    assert run.status == 0, run.output
    assert [call["host"] for call in running.calls("node")] == ["b2", "b1"]
    assert [call["host"] for call in running.calls("verify")] == ["b2", "b1"]
    assert running.calls("etcd_member") == []
    assert running.has_round("next") == ["b1", "b2"]
