# SPDX-License-Identifier: GPL-3.0-or-later
"""A controller dies at every task boundary of `site`, one after the other.

The estate runs and has customers. It is to be changed so that every role has something to do: a member of onprem's etcd
is bare, every host has a new label, one service is new and another one changed. Run k is killed (SIGKILL to
ansible-playbook and its workers) when its k-th task starts, and run k+1 begins at once where that left things. So at
boundary k the tasks before it have done their work and those from it on have not, as in a single run that dies there;
what the killed task had begun on the hosts goes on by itself while the next run comes. No run may fail for what the one
before left, its lock included. The first run that ends by itself ends the loop.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from estate_tools import ETCD_HOSTS, Estate, Key
from installation import variant
from playbook import kill_run, launch, play, read_events

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

BARE = "onprem-2"
LONGEST = 300.0  # seconds of one run
MOST = 200  # boundaries; a loop that does not end is a failure


def changed(declared: dict[str, Any], groups: dict[str, Any]) -> None:
    """Something to do for every host and for services."""
    for group in groups.values():
        group["vars"]["isthmus_labels"] = {"boundaries": "yes"}
    web = next(service for service in declared["services"] if service["name"] == "web")
    declared["services"].append({**web, "name": "boundaries"})
    web["health"]["fall"] = 3


def started(events: Path) -> list[str]:
    """The tasks that a run has begun; those that steer Ansible itself (meta) do nothing that could be cut short."""
    told = [event for event in read_events(events) if event["event"] == "task"]
    return [str(event["task"]) for event in told if event["action"] != "ansible.builtin.meta"]


def killed_at(number: int, inventory: Path, events: Path) -> int | None:
    """Run `site` until its task `number` starts; the status of a run that ended before."""
    process = launch("site", inventory=inventory, output=events.with_suffix(".out"), events=events)
    end = time.monotonic() + LONGEST
    try:
        while True:
            ended = process.poll()
            if len(started(events)) >= number:
                return None
            if ended is not None:
                return ended
            assert time.monotonic() < end, f"site stands still after {started(events)}"
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            kill_run(process)


def record(estate: Estate) -> dict[str, Any]:
    """The clusters' documents, each from its own etcd."""
    found = {}
    for cluster, hosts in ETCD_HOSTS.items():
        key = f"isthmus/v1/estate/clusters/{cluster}"
        found[cluster] = json.loads(estate.keys(hosts[0], key)[key].value)
    return found


def dealt_by_site(documents: dict[str, Any]) -> dict[str, str]:
    """What the planner gave to whom: a range by host, an address by host and workload."""
    found = {}
    for cluster, document in documents.items():
        for host, entry in document["hosts"].items():
            found[f"{host} range"] = entry["range4"]
            found[f"{host} mesh"] = entry["mesh4"]
            for name, workload in entry["workloads"].items():
                found[f"{cluster} {host} {name}"] = workload["address4"]
    return found


def dealt_by_registrars(estate: Estate) -> dict[str, dict[str, str]]:
    """By cluster: the address of each service, and the labels of each identity."""
    found: dict[str, dict[str, str]] = {}
    for cluster, hosts in ETCD_HOSTS.items():
        keys: dict[str, Key] = estate.keys(hosts[0], "isthmus/v1/alloc/vips/", "isthmus/v1/alloc/identities/")
        documents = {name: json.loads(key.value) for name, key in keys.items()}
        held = {name: document for name, document in documents.items() if document["released"] is None}
        found[cluster] = {name: document.get("ipv4") or document["labels"] for name, document in held.items()}
    return found


def twice(values: list[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1]


def test_the_next_run_converges_whatever_task_the_controller_died_at(estate: Estate, tmp_path: Path) -> None:
    estate.converged()
    documents, numbers = record(estate), dealt_by_registrars(estate)
    inventory = variant(tmp_path / "inventory", changed)
    rest = estate.backends - {BARE}

    def web(verb: str) -> None:
        estate.lab.exec(BARE, ["systemctl", verb, "web.service"])

    try:
        # Customers leave it before it goes: its coming back, again and again, is then nothing that they could notice.
        web("stop")
        estate.everywhere(rest, tuple(estate.lab.hosts))
        play("teardown", "--limit", BARE, "-e", "isthmus_confirm_teardown=lab")
        began, boundaries = time.monotonic(), list[str]()
        with estate.unnoticed(estate.edge, estate.onprem, interval=0.05):
            while len(boundaries) < MOST:
                number = len(boundaries) + 1
                events = tmp_path / f"events-{number}"
                status = killed_at(number, inventory, events)
                if status is not None:
                    break
                boundaries.append(started(events)[number - 1])
                print(f"{time.monotonic() - began:6.1f} s, killed at boundary {number}: {boundaries[-1]}", flush=True)
        words = events.with_suffix(".out").read_text()[-6000:]
        story = f"{len(boundaries)} runs were killed, the last one at {boundaries[-1:]}; then site ended {status}"
        assert status == 0, f"{story}\n{words}"
        print(f"{story}, {time.monotonic() - began:.0f} s in all")
        assert set(started(events)) <= set(boundaries), "a task of the whole run was no boundary"
        assert play("site", inventory=inventory).changed == {}
        web("start")
        estate.converged()
        play("verify", inventory=inventory)

        now = record(estate)
        given = dealt_by_site(now)
        assert {name: given.get(name) for name in dealt_by_site(documents)} == dealt_by_site(documents)
        assert twice(list(given.values())) == []
        for cluster, after in dealt_by_registrars(estate).items():
            assert twice(list(after.values())) == [], cluster
            assert {name: after.get(name) for name in numbers[cluster]} == numbers[cluster]
        assert len(estate.etcd_members("onprem-1")) == 3
        assert estate.keys("onprem-1", "isthmus/v1/lock/") == {}
    finally:
        web("start")
        play("site", "-e", "isthmus_prune=service/shop/boundaries")
