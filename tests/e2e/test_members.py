# SPDX-License-Identifier: GPL-3.0-or-later
"""What is taken out of the mesh is out of it, after its connections had time to end: members of an etcd, a host with
all its rights, a cluster. And it comes back."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from demo import URL
from estate_tools import ONPREM, PKI, Estate
from installation import variant
from playbook import changes, play, read_events

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

PRUNE = ("-e", "isthmus_prune=member/onprem/onprem-3,member/onprem/onprem-2")
FORMER = ("onprem-2", "onprem-3")
GONE = "cloud-2"


def members(estate: Estate) -> list[str]:
    """Voters of onprem's etcd."""
    listed = json.loads(estate.etcdctl("onprem-1", "member", "list", "-w", "json").stdout)["members"]
    return sorted(member["name"] for member in listed if not member.get("isLearner"))


def files(estate: Estate, host: str, pattern: str) -> set[str]:
    script = f"ls -d {pattern} 2>/dev/null || true"
    return set(estate.lab.exec(host, ["sh", "-c", script]).stdout.split())


def one_member(declared: dict[str, Any], _: Any) -> None:
    declared["clusters"]["onprem"]["etcd"]["hosts"] = ["onprem-1"]


def test_members_that_are_pruned_leave_and_come_back(estate: Estate, tmp_path: Path) -> None:
    """Two of three in one run; traffic goes on all the while."""
    estate.converged()
    inventory = variant(tmp_path / "inventory", one_member)
    aside = {host: files(estate, host, "/var/lib/isthmus/etcd.removed-*") for host in FORMER}
    play("site", "--check", *PRUNE, inventory=inventory, events=tmp_path / "check")
    assert members(estate) == [*ONPREM]
    try:
        with estate.unnoticed(estate.edge, estate.onprem):
            play("site", *PRUNE, inventory=inventory, events=tmp_path / "site")
        assert changes(read_events(tmp_path / "check")) == changes(read_events(tmp_path / "site"))
        assert members(estate) == ["onprem-1"]
        for host in FORMER:
            assert estate.unit_state(host, "isthmus-etcd") == "inactive"
            assert files(estate, host, "/etc/systemd/system/isthmus-etcd*") == set()
            assert files(estate, host, f"{PKI}/*.key") == {f"{PKI}/agent.key"}
            assert files(estate, host, f"{PKI}/trust/*") == {f"{PKI}/trust/onprem.crt"}
            assert files(estate, host, "/var/lib/isthmus/etcd") == set()
            assert len(files(estate, host, "/var/lib/isthmus/etcd.removed-*") - aside[host]) == 1
        assert files(estate, "onprem-1", "/var/lib/isthmus/snapshots/*-before-removal.db")
        estate.converged()
        assert play("site", inventory=inventory).changed == {}
        play("verify", inventory=inventory)
    finally:
        with estate.unnoticed(estate.edge, estate.onprem):
            play("site")
    assert members(estate) == [*ONPREM]
    estate.converged()
    assert play("site").changed == {}
    play("verify")


def absent(_: Any, groups: dict[str, Any]) -> None:
    groups["cloud"]["hosts"][GONE]["isthmus_state"] = "absent"


def traces(estate: Estate) -> set[str]:
    """What cloud's etcd has of the host: its own keys, what the registrar publishes, its user and role."""
    kinds = ("isthmus/v1/nodes/", "isthmus/v1/workloads/", "isthmus/v1/alive/", "cilium/state/nodes/")
    keys = estate.keys("cloud-1", *kinds)
    found = {name for name in keys if GONE in name.split("/")}
    for what in ("user", "role"):
        names = estate.etcdctl("cloud-1", what, "list").stdout.split()
        found |= {f"{what} {name}" for name in names if name.endswith(f"-{GONE}")}
    return found


def kept_connection(estate: Estate, server: str) -> str:
    """A request every 0.1 s from edge over one connection, which `server` answers; its name."""
    for number in range(100):
        name = f"kept-{uuid.uuid4().hex[:6]}-{number}"
        estate.edge.start(name, URL, interval=0.1, keep_alive=True)
        estate.until("it is answered", lambda name=name: estate.edge.result(name)["ok"] > 0)  # type: ignore[misc]
        if set(estate.edge.result(name)["answers"]) == {server}:
            return name
        estate.edge.result(name, stop=True)
    raise AssertionError(f"{server} answered none of 100 connections")


def test_a_removed_host_loses_its_rights_and_comes_back(estate: Estate, tmp_path: Path) -> None:
    """Its agent still runs, as when nobody can enter the host any more: etcd does not know it."""
    estate.converged()
    inventory = variant(tmp_path / "inventory", absent)
    before = traces(estate)
    address = str(estate.lab.hosts["cloud-1"].address)

    def ask_etcd() -> int:
        return estate.etcdctl(
            GONE, "get", "isthmus/v1/estate/roster", user="agent", endpoint=address, check=False
        ).returncode

    def used_anywhere() -> bool:
        others = [host for host in estate.lab.hosts if host != GONE]
        return any(GONE in {b["node"] for b in estate.service(host)["backends"]} for host in others)

    assert {f"isthmus/v1/nodes/{GONE}", f"isthmus/v1/alive/{GONE}", f"user isthmus-agent-{GONE}"} <= before
    assert ask_etcd() == 0
    planned = " ".join(play("plan", inventory=inventory).output.split())
    assert f"host/{GONE}: its certificate loses its rights. shop/web loses 1 of 4 backends, 3 left. New" in planned
    talk = kept_connection(estate, f"cloud/{GONE}")
    try:
        play("site", inventory=inventory)
        estate.until("no host knows a backend on the removed one", lambda: not used_anywhere())
        assert estate.keys("cloud-1", f"cilium/state/nodes/v1/cloud/{GONE}"), "the way to it went with the backend"
        before_end = estate.edge.result(talk)
        estate.until("the kept connection is used on", lambda: estate.edge.result(talk)["ok"] > before_end["ok"] + 20)
        assert estate.edge.result(talk, stop=True)["failed"] == 0
        estate.until("etcd has nothing of it", lambda: not traces(estate))
        assert ask_etcd() != 0
        assert play("site", inventory=inventory).changed == {}
        play("verify", inventory=inventory)
        assert traces(estate) == set()
    finally:
        play("site")
    estate.converged()
    estate.until("etcd has all of it again", lambda: traces(estate) == before)
    assert ask_etcd() == 0
    assert play("site").changed == {}
    play("verify")


def cloud_absent(declared: dict[str, Any], _: Any) -> None:
    declared["clusters"]["cloud"]["state"] = "absent"


def test_a_removed_cluster_is_forgotten_and_comes_back(estate: Estate, tmp_path: Path) -> None:
    """The others lose it and nothing else; its hosts keep what they have, and join again."""
    estate.converged()
    inventory = variant(tmp_path / "inventory", cloud_absent)
    others = ("onprem-1", "edge-1")

    def left_of_it() -> dict[str, list[str]]:
        prefixes = ("cilium/cache/", "cilium/cluster-config/", "cilium/synced/cloud/", "isthmus/v1/alloc/peers/")
        found = {host: [key for key in estate.keys(host, *prefixes) if "cloud" in key.split("/")] for host in others}
        return {host: keys for host, keys in found.items() if keys}

    assert set(left_of_it()) == set(others)
    planned = " ".join(play("plan", inventory=inventory).output.split())
    assert "cluster/cloud: the others forget its 2 hosts (cloud-1, cloud-2), and it them." in planned
    talk = kept_connection(estate, "cloud/cloud-2")
    try:
        play("site", inventory=inventory)
        estate.everywhere({"onprem-1", "onprem-2"}, (*ONPREM, "edge-1"))
        before_end = estate.edge.result(talk)
        estate.until("the kept connection is used on", lambda: estate.edge.result(talk)["ok"] > before_end["ok"] + 20)
        assert estate.edge.result(talk, stop=True)["failed"] == 0
        with estate.unnoticed(estate.edge, estate.onprem):
            estate.until("nothing is left of it", lambda: not left_of_it())
        names = estate.etcdctl("onprem-1", "user", "list").stdout.split()
        assert "remote-edge" in names
        assert "remote-cloud" not in names
        assert play("site", inventory=inventory).changed == {}
        play("verify", inventory=inventory)
    finally:
        play("site")
    estate.converged()
    assert play("site").changed == {}
    play("verify")
