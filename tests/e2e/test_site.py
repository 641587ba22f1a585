# SPDX-License-Identifier: GPL-3.0-or-later
"""`site` from the installed artifact: from bare machines, for a part of the hosts, with inventories that lost
something, with bad input; and services that are registered at run time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import snapshot
from demo import EDGE, URL
from estate_tools import ETCD_HOSTS, Estate
from installation import Change, Installation, variant
from isthmus_lab import Lab
from playbook import INVENTORY, Run, changes, environment, play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

# Who leads, who is alive, how long ago a peer was seen: these come and go by themselves.
MOVING_KEYS = ("isthmus/v1/leader", "isthmus/v1/alive/", "isthmus/v1/alloc/peers/", "isthmus/v1/lock")


# --- from bare machines


def test_check_of_bare_machines_changes_nothing(installed: Installation) -> None:
    assert snapshot.differences(installed.bare, installed.checked) == []


def test_check_of_bare_machines_predicts_what_site_then_does(installed: Installation) -> None:
    assert changes(installed.predicted) == changes(installed.made)
    assert {host for host, _, _ in changes(installed.made)} == set(installed.bare)


def test_check_of_bare_machines_names_every_file_that_site_then_writes(installed: Installation) -> None:
    """Not what is in them: keys and digests are not known before they are made. What a CA signs for another host is
    told by the module's name only: whoever comes first finds the CA missing."""

    def written(events: list[dict[str, Any]]) -> set[tuple[str, str]]:
        changed = [event for event in events if event.get("changed") and event["action"] != "isthmus.mesh.pki_sign"]
        found = {(event["host"], header) for event in changed for header in event["diffs"]}
        return {(host, header) for host, header in found if header.startswith("/")}

    assert written(installed.made) - written(installed.predicted) == set()
    assert {(EDGE, "/etc/isthmus/node.json"), (EDGE, "/etc/isthmus/pki/agent.key")} <= written(installed.made)


def test_the_first_site_ends_with_a_mesh_that_verify_proves(installed: Installation, lab: Lab) -> None:
    assert {name: recap for name, recap in installed.run.hosts.items() if recap.failed or recap.unreachable} == {}
    run = play("verify")
    assert set(run.hosts) == set(lab.hosts)
    assert run.changed == {}


# --- a part of the hosts


def test_limit_repairs_its_host_and_touches_no_other(estate: Estate) -> None:
    """Three hosts are off their plan: only the one that is named is put right."""
    spoilt = "/etc/isthmus/dnsmasq.conf"
    named, other = (EDGE, "onprem-2"), "cloud-2"
    try:
        for host in (*named, other):
            estate.lab.exec(host, ["sh", "-c", f"echo '# spoilt' >> {spoilt}"])
        members, before = member_ids(estate), snapshot.take(estate.lab)
        for limit in named:
            run = play("site", "--limit", limit)
            after = snapshot.take(estate.lab)
            assert set(run.hosts) == {limit}
            assert {host: len(tasks) for host, tasks in run.changed.items()} == {limit: 1}
            seen = snapshot.differences(before, after)
            assert [line for line in seen if not line.startswith(f"{limit}: ")] == []
            assert [line for line in seen if line.startswith(f"{limit}: files: {spoilt}: ")]
            before = after
        assert member_ids(estate) == members
    finally:
        run = play("site")
    assert {host: len(tasks) for host, tasks in run.changed.items()} == {other: 1}


def member_ids(estate: Estate) -> dict[str, list[str]]:
    found = {}
    for cluster, (host, *_) in ETCD_HOSTS.items():
        listed = json.loads(estate.etcdctl(host, "member", "list", "-w", "json").stdout)["members"]
        found[cluster] = sorted(f"{m['ID']:x} {m['name']} {m.get('isLearner', False)}" for m in listed)
    return found


# --- absence is never removal


def dump(estate: Estate) -> dict[str, Any]:
    """Every key of every cluster that does not move by itself, by cluster."""
    return {
        cluster: {
            name: key
            for name, key in estate.keys(hosts[0], "cilium/", "isthmus/").items()
            if not name.startswith(MOVING_KEYS)
        }
        for cluster, hosts in ETCD_HOSTS.items()
    }


def backends(estate: Estate) -> dict[str, Any]:
    """What every host's agent has in its kernel: service -> address and backends."""
    return {
        host: {
            f"{service['namespace']}/{service['name']}": (
                service["address"],
                sorted(f"{b['address']} {b['node']}" for b in service["backends"]),
            )
            for service in estate.ask(host, "services")["services"]
        }
        for host in estate.lab.hosts
    }


def half_of_the_hosts_a_cluster_and_a_service(estate: dict[str, Any], groups: dict[str, Any]) -> None:
    """Also members of an etcd, the file of a cluster and its group."""
    for cluster, host in (("onprem", "onprem-2"), ("onprem", "onprem-3"), ("cloud", "cloud-2")):
        del groups[cluster]["hosts"][host]
    estate["clusters"]["onprem"]["etcd"]["hosts"] = ["onprem-1"]
    del estate["clusters"]["edge"]
    del groups["edge"]
    estate["site_pairs"] = []
    estate["services"] = [service for service in estate["services"] if service["name"] != "batch"]


ORPHANS = {
    *("host/onprem-2", "host/onprem-3", "host/cloud-2"),
    *("cluster/edge", "service/shop/batch"),
}


def test_what_is_missing_from_the_inventory_is_listed_and_not_withdrawn(estate: Estate, tmp_path: Path) -> None:
    keys, used, members = dump(estate), backends(estate), member_ids(estate)
    inventory = variant(tmp_path / "inventory", half_of_the_hosts_a_cluster_and_a_service)
    shown = play("plan", inventory=inventory).output
    shown = shown[shown.index("Show the plan in words") :]
    assert {orphan for orphan in ORPHANS if f"- {orphan}\n" not in shown} == set()
    assert "removed: []" in shown
    try:
        play("site", inventory=inventory)
        after = dump(estate)
        withdrawn = [
            f"{cluster}: {name}"
            for cluster, held in keys.items()
            for name, key in held.items()
            if name not in after[cluster] or after[cluster][name].created != key.created
        ]
        assert withdrawn == []
        assert backends(estate) == used
        assert member_ids(estate) == members
    finally:
        play("site")


def test_with_no_etcd_at_all_nothing_is_dealt_anew(estate: Estate) -> None:
    """The hosts' own copies of the record are planned from; a host of which no etcd answers stays as it was."""
    with contextlib.ExitStack() as undo:
        for cluster in ETCD_HOSTS:
            undo.callback(estate.etcd, cluster, "start")
            estate.etcd(cluster, "stop")
        words = play("plan", "--limit", "cloud-2").output
        shown = words[words.index("Show the plan in words") :]
        assert "changes: []" in shown
        assert play("site", "--limit", "cloud-2", "--tags", "agent").changed == {}
    estate.converged()


def test_what_is_said_to_go_goes_and_comes_back(estate: Estate, tmp_path: Path) -> None:
    """`state: absent` and `isthmus_prune`, each with a preview."""

    def change(declared: dict[str, Any], _: Any) -> None:
        for service in declared["services"]:
            if service["name"] == "batch":
                service["state"] = "absent"
        declared["services"] = [service for service in declared["services"] if service["name"] != "echo"]

    inventory = variant(tmp_path / "inventory", change)
    prune = ("-e", "isthmus_prune=service/shop/echo")

    def there() -> set[str]:
        keys = estate.keys("cloud-1", "isthmus/v1/services/")
        return {name.removeprefix("isthmus/v1/services/shop/") for name in keys}

    assert there() == {"web", "echo", "batch"}
    try:
        words = play("plan", *prune, inventory=inventory).output
        shown = words[words.index("Show the plan in words") :]
        removed = shown[shown.index("removed:") :]
        assert "- service/shop/batch" in removed
        assert "- service/shop/echo" in removed
        assert there() == {"web", "echo", "batch"}
        play("site", *prune, inventory=inventory)
        assert there() == {"web"}
        estate.until(
            "no host has the services that went",
            lambda: all(set(found) == {"shop/web"} for found in backends(estate).values()),
        )
    finally:
        play("site")
    assert there() == {"web", "echo", "batch"}
    estate.until("edge has echo again", lambda: len(backends(estate)[EDGE]["shop/echo"][1]) == 2)


# --- bad input: one message, nothing changed


def overlapping(estate: dict[str, Any], _: Any) -> None:
    estate["clusters"]["edge"]["workload_ranges"] = ["10.102.128.0/17"]


def an_empty_group(_: Any, groups: dict[str, Any]) -> None:
    """With the etcd host that the estate still names."""
    groups["cloud"]["hosts"] = {}


def a_foreign_address(_: Any, groups: dict[str, Any]) -> None:
    groups["cloud"]["hosts"]["cloud-2"]["isthmus_underlay"] = "198.18.2.99"


def nothing(_: Any, __: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "words", "arguments"),
    [
        (overlapping, ("isthmus_estate", "edge", "cloud", "10.102.128.0/17", "overlap", "Next: "), ()),
        (an_empty_group, ("clusters.cloud.etcd.hosts", "'cloud-1' is not a host of the inventory"), ()),
        (a_foreign_address, ("cloud-2", "198.18.2.99 is not an address of this host", "Correct isthmus_underlay"), ()),
        (
            nothing,
            (
                "a slice of an AWX job",
                "Why: slicing cuts the inventory",
                "set job_slice_count of the job template to 1",
            ),
            ("-e", "awx_job_slice_count=3"),
        ),
    ],
    ids=["ranges that overlap", "an empty group", "an address of another host", "a sliced job"],
)
def test_bad_input_ends_with_one_message_and_changes_nothing(
    estate: Estate, tmp_path: Path, change: Change, words: tuple[str, ...], arguments: tuple[str, ...]
) -> None:
    inventory = variant(tmp_path / "inventory", change)
    before = snapshot.take(estate.lab)
    run = play("site", *arguments, inventory=inventory, check=False)
    assert run.status != 0
    assert run.changed == {}
    assert snapshot.differences(before, snapshot.take(estate.lab)) == []
    assert run.output.count("fatal: ") == 1
    message = " ".join(run.output[run.output.index("fatal: ") : run.output.index("PLAY RECAP")].split())
    assert [word for word in words if word not in message] == []
    assert "othing was changed" in message


# --- services at run time

LATE = {
    "name": "late",
    "namespace": "shop",
    "ports": [{"name": "http", "port": 80, "target_port": 8080}],
    "backends": {"labels": {"app": "web"}},
    "health": {"type": "http", "path": "/healthz", "port": 8080},
}
LATE_URL = URL.replace("web.", "late.", 1)


def module(name: str, arguments: Mapping[str, Any], *hosts: str) -> Run:
    """One of the artifact's modules, on hosts, as an operator's task does it."""
    tool = Path(sys.executable).with_name("ansible")
    words = [str(tool), "-i", str(INVENTORY), "-m", f"isthmus.mesh.{name}", "-a", json.dumps(arguments)]
    done = subprocess.run(
        [*words, ",".join(hosts)], capture_output=True, text=True, timeout=120, check=False, cwd="/", env=environment()
    )
    return Run(done.returncode, done.stdout + done.stderr, {})


def test_a_service_registered_at_run_time_lives_until_it_is_removed(estate: Estate, tmp_path: Path) -> None:
    places = tuple(hosts[0] for hosts in ETCD_HOSTS.values())

    def register(**more: Any) -> Run:
        return module("global_service", {**LATE, **more}, *places)

    def in_use() -> bool:
        found = estate.service_named(EDGE, "shop/late")
        return found is not None and {b["node"] for b in found["backends"] if b["used"]} == estate.backends

    try:
        run = register()
        assert run.status == 0, run.output
        assert run.output.count("CHANGED") == len(places)
        estate.until("edge has the new service", in_use)
        result = estate.edge.requests(LATE_URL, 100)
        assert (result["ok"], result["errors"]) == (100, {})
        assert {who.split("/")[0] for who in result["answers"]} == {"onprem", "cloud"}
        assert register().output.count("CHANGED") == 0

        assert play("site").changed == {}, "the playbook leaves alone what it does not own"
        assert in_use()

        def declared(wanted: dict[str, Any], _: Any) -> None:
            wanted["services"].append({**LATE, "global": True})

        before = [estate.keys(place, "isthmus/v1/estate/", "isthmus/v1/services/") for place in places]
        refused = play("site", inventory=variant(tmp_path / "inventory", declared), check=False)
        assert (refused.status != 0, refused.changed) == (True, {})
        said = "it belongs to module in the etcd of cloud, edge, onprem, and the inventory would define it too"
        assert said in " ".join(refused.output.split())
        assert [estate.keys(place, "isthmus/v1/estate/", "isthmus/v1/services/") for place in places] == before
    finally:
        gone = register(state="absent")
    assert gone.status == 0, gone.output
    estate.until("edge has it no more", lambda: estate.service_named(EDGE, "shop/late") is None)
    looked = estate.lab.exec(EDGE, ["getent", "ahostsv4", LATE_URL.split("/")[2]], check=False)
    assert (looked.returncode, looked.stdout) == (2, "")
    assert play("site").changed == {}


@pytest.mark.parametrize("state", ["present", "absent"])
def test_a_service_of_the_inventory_is_not_taken_over(estate: Estate, state: str) -> None:
    before = estate.keys("cloud-1", "isthmus/v1/services/")
    run = module("global_service", {**LATE, "name": "web", "state": state}, "cloud-1")
    assert run.status != 0
    assert "service shop/web belongs to inventory" in run.output
    assert "module" in run.output
    assert estate.keys("cloud-1", "isthmus/v1/services/") == before
