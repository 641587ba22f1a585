# SPDX-License-Identifier: GPL-3.0-or-later
"""Which run has the lock, who is told so, and what a run leaves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.filter.run_outcome import run_outcome
from ansible_collections.isthmus.mesh.plugins.module_utils import run_lock
from ansible_collections.isthmus.mesh.plugins.plugin_utils import runs

FORK = multiprocessing.get_context("fork")  # as Ansible starts its workers
ALICE = {"by": "alice", "where": "ctl1", "process": "machine/1/2"}
BOB = {"by": "bob", "where": "AWX job 7", "process": "machine/3/4"}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "run.lock"
    monkeypatch.setattr(run_lock, "FILE", str(place))
    return place


def name(run: dict[str, str]) -> str:
    return str(run_lock.document(run, 0)["name"])


def test_a_file_is_held_until_it_ends_or_is_given_back(file: Path) -> None:
    run_lock.take_file(run_lock.document(ALICE, 60))
    with pytest.raises(run_lock.HeldError) as told:
        run_lock.take_file(run_lock.document(BOB, 60))
    assert told.value.holder["by"] == "alice"
    assert not run_lock.release_file(name(BOB))
    assert run_lock.release_file(name(ALICE))
    assert not file.exists()
    assert not run_lock.release_file(name(ALICE))
    run_lock.take_file(run_lock.document(BOB, -1))
    run_lock.take_file(run_lock.document(ALICE, 60))


def test_who_has_the_file_keeps_its_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_lock.document(ALICE, 60)
    run_lock.take_file({**first, "since": "2026-01-01T00:00:00Z"})
    run_lock.take_file(run_lock.document(ALICE, 600))
    with pytest.raises(run_lock.HeldError) as told:
        run_lock.take_file(run_lock.document(BOB, 60))
    assert told.value.holder["since"] == "2026-01-01T00:00:00Z"
    assert told.value.holder["until"] > first["until"]


def test_the_named_run_loses_the_file(file: Path) -> None:
    run_lock.take_file(run_lock.document(ALICE, 60))
    run_lock.take_file(run_lock.document(BOB, 60), breaking=name(ALICE))
    assert not run_lock.release_file(name(ALICE))
    assert run_lock.release_file(name(BOB))


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_file_is_nobodys_lock(file: Path, content: str) -> None:
    file.write_text(content)
    run_lock.take_file(run_lock.document(ALICE, 60))


def test_of_many_at_once_one_gets_the_file(file: Path) -> None:
    """Each gives it back at once, so the file comes and goes under those that wait for it."""
    inside: list[str] = []
    most = 0

    def worker(number: int) -> None:
        nonlocal most
        mine = run_lock.document({"by": str(number), "where": "here", "process": str(number)}, 60)
        for _turn in range(50):
            try:
                run_lock.take_file(mine)
            except run_lock.HeldError:
                continue
            inside.append(str(number))
            most = max(most, len(inside))
            inside.remove(str(number))
            assert run_lock.release_file(mine["name"])

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_the_words_say_who_since_when_and_how_to_go_on() -> None:
    holder = run_lock.document(ALICE, 60)
    words = run_lock.words("cloud", holder)
    for part in (
        "Cluster cloud",
        "alice on ctl1",
        holder["since"],
        holder["until"],
        f"isthmus_break_lock={name(ALICE)}",
    ):
        assert part in words


def test_a_run_is_the_parent_of_the_worker_that_asks() -> None:
    found = runs.this_run({"awx_user_name": "alice", "awx_job_id": 7})
    assert (found["by"], found["where"]) == ("alice", "AWX job 7")
    assert found["process"].split("/")[1] == str(os.getppid())
    assert not runs.has_ended(found["process"])


def test_a_run_of_this_controller_that_ended_is_known() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = f"{runs._machine()}/{child.pid}/{runs._started(child.pid)}"
        assert not runs.has_ended(process)
        assert runs.has_ended(process + "0"), "another process has the number now"
        child.kill()
    assert runs.has_ended(process)
    machine, rest = process.split("/", 1)
    assert not runs.has_ended(f"other{machine}/{rest}"), "nobody knows about another controller's"
    for unknown in ("", "x", f"{machine}/", f"{machine}/x/y"):
        assert not runs.has_ended(unknown)


def result(kind: str, cluster: str, **more: Any) -> dict[str, Any]:
    return {f"{kind}_place": {"cluster": cluster, "host": f"{cluster}-1"}, **more}


def test_what_a_run_leaves() -> None:
    members = [
        {
            "inventory_hostname": "a-1",
            "__plan_first": {"results": [result("plan", "a", locked=True), result("plan", "b", unreachable=True)]},
        },
        {
            "inventory_hostname": "c-1",
            "__plan_first": {"results": [result("plan", "a", locked=True)]},
            "__plan_others": {"skipped": True},
            "__services_result": {
                "results": [
                    result("services", "a", locked=True, record={}),
                    result("services", "c", locked=True, record={}),
                ]
            },
        },
    ]
    members += [{"inventory_hostname": "b-2"}, {"inventory_hostname": "b-1", "__agent_result": {"unreachable": True}}]
    found = run_outcome(members, gone=["b-2"], clusters=["a", "b", "c"])
    assert found["locked"] == [{"cluster": "a", "host": "a-1"}, {"cluster": "c", "host": "c-1"}]
    assert found["recorded"]
    assert not run_outcome(members[:1])["recorded"]
    assert "b-1, b-2" in found["pending"][0]
    assert "etcd of b did not" in found["pending"][1]
    assert found["silent"] == ["b-1", "b-2"]
    assert found["failure"] == []
    assert run_outcome(members[:2], clusters=["a", "c"])["pending"] == []
    assert run_outcome(members[:1], clusters=["a"])["pending"] == [], "a run that wrote nothing misses nothing"


def test_what_a_run_that_failed_has_done() -> None:
    def failure(msg: str, **more: Any) -> dict[str, Any]:
        return {"ansible_failed_task": {"name": "A task"}, "ansible_failed_result": {"msg": msg, **more}}

    laid = {"__bundle_result": {"changed": False}}
    members = [
        {"inventory_hostname": "broken", **laid, **failure("one\ntwo")},
        {"inventory_hostname": "looped", **failure("x", results=[{"msg": "good"}, {"failed": True, "msg": "bad"}])},
        {"inventory_hostname": "with-it", **laid},
        {"inventory_hostname": "changed", **laid, "__etcd_rights": {"changed": True}},
        {"inventory_hostname": "same", **laid, "__etcd_result": {"skipped": True}},
        {"inventory_hostname": "later", "__services_result": {"changed": True}},
        {"inventory_hostname": "silent", "__bundle_result": {"unreachable": True}},
    ]
    failed = ["broken", "looped", "with-it"]
    found = run_outcome(members, gone=["with-it"], failed=failed)
    assert found["failure"] == [
        "Stopped at the first failure: no further batch was begun.",
        "Failed: broken, in the task 'A task': one",
        "Failed: looped, in the task 'A task': bad",
        "Stopped with that: with-it.",
        "Changed: changed.",
        "Nothing to change: same.",
        "Not touched: later.",
        "Every host works on as it is. Next: put right what failed and run the playbook again: it does the rest.",
    ]
    assert (found["changed"], found["silent"]) == (["changed"], ["silent"])
    predicted = run_outcome(members, failed=failed, stopped=False)["failure"]
    assert predicted == found["failure"][1:4], "a run in check mode goes on"


@pytest.mark.parametrize(
    ("answer", "waiting"),
    [
        ({"unreachable": True, "msg": "no route"}, {"w1": ["o1"]}),
        ({"failed": False, "msg": "the private key of cluster onprem's authority is missing"}, {}),
    ],
    ids=["it is silent", "it refuses"],
)
def test_a_new_host_waits_for_an_authority_that_is_silent_not_for_a_sick_one(
    answer: dict[str, Any], waiting: dict[str, Any]
) -> None:
    group = {"ca_cluster": "onprem", "ca_host": "o1"}
    variables = {
        "inventory_hostname": "w1",
        "isthmus_cluster": "onprem",
        "__pki_signed": {"results": [{"pki_group": {**group, "ca_cluster": "edge"}}, {"pki_group": group, **answer}]},
        "__pki_installed": {"failed": True, "still_pending": ["agent"]},
    }
    found = run_outcome([variables])
    assert found["waiting"] == waiting
    words = "Pending: w1 could not be finished without the authority of cluster onprem: o1 could not be entered."
    assert (words in found["pending"]) == bool(waiting)
    damaged = {**variables, "__pki_installed": {"failed": True, "msg": "the pinned authority is another one"}}
    assert run_outcome([damaged])["waiting"] == {}


def test_an_authority_that_refuses_what_hosts_ask_for_is_named_and_counts_for_the_exit_status() -> None:
    def host(name: str, **answer: Any) -> dict[str, Any]:
        group = {"ca_cluster": "cloud", "ca_host": "c1"}
        signed = {"results": [{"pki_group": {**group, "ca_cluster": "edge"}, "certificates": []}]}
        signed["results"] += [{"pki_group": group, **answer}] if answer else []
        return {"inventory_hostname": name, "isthmus_cluster": "onprem", "__pki_signed": signed}

    sick = {"failed": False, "msg": "the private key of cluster cloud's certificate authority is missing.\n"}
    members = [host("o1", **sick), host("o2", **sick), host("o3"), host("o4", unreachable=True, msg="no route")]
    why = "signed nothing (c1: the private key of cluster cloud's certificate authority is missing)"
    found = run_outcome(members)
    assert found["pending"][:-1] == [f"Pending: o1, o2 got no new certificate of cluster cloud, whose authority {why}."]
    assert found["refused"] == dict.fromkeys(("o1", "o2"), f"the authority of cluster cloud {why}")
    assert run_outcome(members[2:3])["pending"] == []
    assert run_outcome(members, stopped=False)["refused"] == {}, "in check mode nobody signs"
    assert "o1" not in run_outcome(members, failed=["o1"])["refused"], "what failed is told as that"


def test_a_worker_that_outlives_its_run_is_of_that_run() -> None:
    """Its parent is another process by then, which never ends."""
    here, there = FORK.Pipe()

    def worker(run: int) -> None:
        end = time.monotonic() + 10
        while os.getppid() == run and time.monotonic() < end:
            time.sleep(0.01)
        there.send(runs.this_run({})["process"])

    def playbook() -> None:
        FORK.Process(target=worker, args=(os.getpid(),)).start()
        os.kill(os.getpid(), signal.SIGKILL)

    started = FORK.Process(target=playbook)
    started.start()
    started.join(10)
    assert here.poll(20), "the worker says nothing"
    process = here.recv()
    assert process.split("/")[1] == str(started.pid)
    assert runs.has_ended(process)
