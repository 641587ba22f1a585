# SPDX-License-Identifier: GPL-3.0-or-later
"""Forming, joining, taking turns and access rights on real etcd servers; etcdctl gives the second opinion."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from integration.etcd_fixture import Ca, EtcdServer
from isthmus_agent import etcd_admin
from isthmus_agent.kvstore import EtcdError, SyncEtcd
from isthmus_mesh.spec import MemberSpec


class Trio:
    """Three declared members on loopback, sharing one CA. Nothing runs until it is told to."""

    def __init__(self, root: Path) -> None:
        self.root, self.snapshots = root, 0
        self.ca = Ca(root / "pki", "onprem")
        (root / "pki/trust").mkdir()
        shutil.copy(self.ca.crt, root / "pki/trust/onprem.crt")
        self.ca.issue("root")
        self.connect = etcd_admin.EtcdConnector("onprem", directory=str(root / "pki"))
        self.servers = {name: EtcdServer(root / name, name=name, ca=self.ca) for name in ("a", "b", "c")}

    def spec(self, name: str) -> MemberSpec:
        server = self.servers[name]
        return MemberSpec(
            name=name,
            client_url=server.endpoint,
            peer_url=server.peer_url,
            members={name: server.peer_url for name, server in self.servers.items()},
            client_urls={name: server.endpoint for name, server in self.servers.items()},
            initial="a",
            token="test",  # noqa: S106 - etcd's cluster token
            source={"type": "package"},
            quota_bytes=1 << 30,
        )

    def start(self, name: str, peers: dict[str, str] | None = None, wait: bool = True) -> None:
        server = self.servers[name]
        server.initial_cluster = peers or {name: server.peer_url}
        server.start(state="existing" if peers else "new", wait=wait)

    def join(self, name: str, revision: int = 1) -> None:
        spec = self.spec(name)
        found = etcd_admin.survey(spec, self.connect)
        assert etcd_admin.decide_formation(spec, found, formed=False, former="a") == "join"
        self.start(name, etcd_admin.join(spec, self.connect, found.answering, revision, 30), wait=False)
        etcd_admin.promote(spec, self.connect, 30)
        etcd_admin.wait_healthy(spec, self.connect, 30)

    def form(self) -> None:
        """All three, one after the other."""
        self.start("a")
        self.join("b")
        self.join("c")

    def document(self, *members: str, revision: int = 2) -> dict[str, Any]:
        """The cluster's document of the record, with these members."""
        hosts = {name: {"underlay4": "127.0.0.1", "advertise4": "127.0.0.1", "state": "present"} for name in "abcd"}
        etcd = {"members": list(members), "initial": "a", "peer_port": 1}
        stamp = {"when": "2026-01-02T03:04:05Z", "by": "alice"}
        return {"name": "onprem", "revision": revision, "etcd": etcd, "hosts": hosts, "last_applied": stamp}

    def record(self, document: dict[str, Any]) -> None:
        """The document is in etcd."""
        self.servers["a"].etcdctl("put", "isthmus/v1/estate/clusters/onprem", json.dumps(document))

    def dismiss(self, document: dict[str, Any], apply: bool = True, only: str | None = None) -> list[str]:
        endpoints = [self.servers[name].endpoint for name in document["etcd"]["members"] if name in self.servers]
        return list(
            etcd_admin.dismiss(document, "a", self.connect, endpoints, self.snapshot, apply, timeout=10, only=only)
        )

    def snapshot(self, client: SyncEtcd) -> None:
        self.snapshots += 1
        client.snapshot(self.root / f"snapshot-{self.snapshots}.db")

    def members(self) -> list[str]:
        """Names of all members, by etcd's own tool."""
        return sorted(line.split(", ")[2] for line in self.servers["a"].etcdctl("member", "list").splitlines())


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Trio]:
    made = Trio(tmp_path)
    with contextlib.ExitStack() as stack:
        for server in made.servers.values():
            stack.callback(server.stop)
        yield made


def test_one_member_forms_and_two_join_as_learners(trio: Trio) -> None:
    nobody = etcd_admin.survey(trio.spec("a"), trio.connect)
    assert nobody.refusing == ("b", "c")
    assert etcd_admin.decide_formation(trio.spec("a"), nobody, formed=False, former="a") == "form"
    trio.form()
    health = etcd_admin.wait_healthy(trio.spec("c"), trio.connect, 10)
    assert health.members == ("a", "b", "c")
    assert health.learners == ()
    listed = trio.servers["a"].etcdctl("member", "list")
    assert listed.count("started") == 3
    assert "true" not in listed


def test_who_may_form_a_cluster(trio: Trio) -> None:
    def decide(name: str, formed: bool = False, former: str = "a", **found: tuple[str, ...]) -> str:
        states = {"answering": (), "running": (), "refusing": (), "silent": (), **found}
        return etcd_admin.decide_formation(trio.spec(name), etcd_admin.Survey(**states), formed, former)

    assert decide("a", refusing=("b", "c")) == "form"
    assert decide("a", silent=("b", "c")) == "form"
    assert decide("b", refusing=("a", "c")) == "wait"
    assert decide("b", refusing=("a", "c"), former="b") == "form"
    assert decide("b", answering=("c",), silent=("a",), former="b", formed=True) == "join"
    for found in ({"refusing": ("a",), "silent": ("c",)}, {"running": ("a",), "refusing": ("c",)}):
        with pytest.raises(etcd_admin.AdminError, match="cannot tell whether its cluster exists"):
            decide("b", former="b", **found)
    with pytest.raises(etcd_admin.AdminError, match="cannot tell"):
        decide("a", running=("b",), refusing=("c",))
    with pytest.raises(etcd_admin.AdminError, match="the estate record shows that the cluster existed"):
        decide("a", formed=True, refusing=("b", "c"))


def test_an_announced_member_that_never_started_is_used(trio: Trio) -> None:
    trio.start("a")
    spec = trio.spec("b")
    first = etcd_admin.join(spec, trio.connect, ("a",), 1, 10)
    assert etcd_admin.join(spec, trio.connect, ("a",), 1, 10) == first
    trio.join("b")
    assert trio.servers["a"].etcdctl("member", "list").count("\n") == 2


def test_a_member_that_lost_its_data_is_replaced(trio: Trio) -> None:
    trio.form()
    before = trio.servers["a"].etcdctl("member", "list")
    trio.servers["c"].stop()
    trio.servers["c"].wipe()
    trio.join("c")
    after = trio.servers["a"].etcdctl("member", "list")
    assert after.count("started") == 3
    old = next(line.split(",")[0] for line in before.splitlines() if ", c," in line)
    assert old not in after


def test_a_member_that_lost_its_data_stays_when_another_is_away(trio: Trio) -> None:
    trio.form()
    for name in ("b", "c"):
        trio.servers[name].stop()
    trio.servers["c"].wipe()
    found = etcd_admin.survey(trio.spec("c"), trio.connect)
    assert (found.running, found.refusing) == (("a",), ("b",))
    with pytest.raises(etcd_admin.AdminError, match="cannot tell whether"):
        etcd_admin.decide_formation(trio.spec("c"), found, formed=False, former="c")


def test_turns_come_one_at_a_time_and_hand_leadership_over(trio: Trio) -> None:
    trio.form()
    with etcd_admin.turn(trio.spec("a"), trio.connect, 10):
        assert etcd_admin.wait_healthy(trio.spec("b"), trio.connect, 10).leader in ("b", "c")
        with (
            pytest.raises(etcd_admin.AdminError, match=r'"holder": "a"'),
            etcd_admin.turn(trio.spec("b"), trio.connect, 0.5),
        ):
            pass
        trio.servers["a"].stop()
        trio.servers["a"].start(state="existing")
    with etcd_admin.turn(trio.spec("b"), trio.connect, 10):
        pass


def test_no_turn_while_another_member_is_down(trio: Trio) -> None:
    trio.form()
    trio.servers["c"].stop()
    with (
        pytest.raises(etcd_admin.AdminError, match="another one is not healthy: c"),
        etcd_admin.turn(trio.spec("b"), trio.connect, 10),
    ):
        pass


# --- members that leave


def test_members_that_the_record_does_not_list_leave_the_sick_one_first(trio: Trio) -> None:
    """The other way round the cluster would lose its quorum on the way."""
    trio.form()
    trio.record(trio.document("a", "b", "c", revision=1))
    trio.servers["c"].stop()
    wanted = trio.document("a")
    assert sorted(trio.dismiss(wanted, apply=False)) == ["b", "c"]
    assert (trio.members(), trio.snapshots) == (["a", "b", "c"], 0)
    assert trio.dismiss(wanted) == ["c", "b"]
    assert (trio.members(), trio.snapshots) == (["a"], 1)
    trio.servers["a"].etcdctl("put", "x", "1")
    for apply in (True, False):
        assert trio.dismiss(wanted, apply) == []
    with etcd_admin.turn(trio.spec("a"), trio.connect, 1) as nobody:
        assert nobody is None


def test_the_leader_leaves_without_a_gap(trio: Trio) -> None:
    trio.form()
    trio.record(trio.document("a", "c"))
    with trio.connect([trio.servers["a"].endpoint]) as client:
        leader = client.status().leader
        ids = {entry.name: entry.id for entry in client.member_list()}
        where = next(name for name, number in ids.items() if number == leader)
        if where != "b":
            client.move_leader(trio.servers[where].endpoint, ids["b"])
    assert trio.dismiss(trio.document("a", "c")) == ["b"]
    assert trio.members() == ["a", "c"]
    assert etcd_admin.wait_healthy(trio.spec("a"), trio.connect, 1).leader in ("a", "c")


def test_one_that_leaves_by_itself_leaves_alone(trio: Trio) -> None:
    trio.form()
    trio.record(trio.document("a"))
    assert trio.dismiss(trio.document("a"), only="c") == ["c"]
    assert trio.members() == ["a", "b"]
    assert trio.dismiss(trio.document("a"), only=trio.servers["b"].peer_url) == ["b"]
    assert trio.dismiss(trio.document("a"), only=trio.servers["b"].peer_url) == []


def test_nobody_leaves_while_one_that_stays_is_sick(trio: Trio) -> None:
    trio.form()
    trio.record(trio.document("a", "b"))
    trio.servers["b"].stop()
    for apply in (False, True):
        with pytest.raises(etcd_admin.AdminError, match=r"member c is to leave .* one that stays is not healthy: b"):
            trio.dismiss(trio.document("a", "b"), apply)
    assert (trio.members(), trio.snapshots) == (["a", "b", "c"], 0)


def test_one_does_not_leave_by_itself_when_the_rest_would_lose_its_quorum(trio: Trio) -> None:
    trio.form()
    trio.record(trio.document("a"))
    trio.servers["c"].stop()
    with pytest.raises(etcd_admin.AdminError, match=r"member b .* too few of the rest are healthy: c"):
        trio.dismiss(trio.document("a"), only="b")
    assert trio.members() == ["a", "b", "c"]


def test_nobody_leaves_before_one_that_stays_is_there(trio: Trio) -> None:
    trio.start("a")
    wanted = trio.document("d")
    trio.record(wanted)
    endpoints = [trio.servers["a"].endpoint]
    with pytest.raises(etcd_admin.AdminError, match=r"member a .* none of those that stay \(d\) votes in it yet"):
        list(etcd_admin.dismiss(wanted, "d", trio.connect, endpoints, trio.snapshot, True, 10))
    assert trio.members() == ["a"]


@pytest.mark.parametrize("revision", [2, 3])
def test_an_older_plan_takes_nobody_out(trio: Trio, revision: int) -> None:
    """Another run added a member and wrote it down, since this one was planned."""
    trio.form()
    trio.record({**trio.document("a", "b", "c", revision=revision), "ca_certificate": "PEM"})
    for apply in (False, True):
        with pytest.raises(etcd_admin.AdminError, match=r"member c .* was left.*alice wrote it.*playbook again"):
            trio.dismiss(trio.document("a", "b"), apply)
    assert trio.members() == ["a", "b", "c"]


def test_a_member_that_another_run_just_adds_is_left(trio: Trio) -> None:
    """It is in etcd before it is in the record."""
    trio.start("a")
    trio.record(trio.document("a"))
    trio.join("b", revision=3)
    for revision in (2, 3):
        with pytest.raises(etcd_admin.AdminError, match="another run is just adding it"):
            trio.dismiss(trio.document("a", revision=revision))
    assert trio.members() == ["a", "b"]
    assert trio.dismiss(trio.document("a", revision=4)) == ["b"]


def test_who_was_taken_out_is_told_from_who_is_away(trio: Trio) -> None:
    trio.form()
    trio.record(trio.document("a", "b"))
    trio.servers["c"].stop()
    assert not etcd_admin.is_expelled(trio.spec("c"), trio.connect)
    assert trio.dismiss(trio.document("a", "b")) == ["c"]
    assert etcd_admin.is_expelled(trio.spec("c"), trio.connect)
    trio.servers["b"].stop()  # now nobody can tell
    assert not etcd_admin.is_expelled(trio.spec("c"), trio.connect)


def test_the_last_declared_member_waits_for_its_turn_while_others_vote(trio: Trio) -> None:
    trio.form()
    trio.servers["c"].stop()
    alone = replace(trio.spec("a"), members={"a": trio.servers["a"].peer_url}, client_urls={"a": "https://x:1"})
    with (
        pytest.raises(etcd_admin.AdminError, match="another one is not healthy: c"),
        etcd_admin.turn(alone, trio.connect, 5),
    ):
        pass


# --- access

NOTHING = etcd_admin.AccessResult((), ())


@pytest.fixture
def guarded(trio: Trio) -> EtcdServer:
    """One member with our access rights: cluster onprem, nodes n1 and n2, peer cloud."""
    trio.start("a")
    server = trio.servers["a"]
    wanted = etcd_admin.wanted_access("onprem", ["n1", "n2"], ["cloud"])
    with server.sync_client() as client:
        predicted = etcd_admin.ensure_access(client, wanted, apply=False, enable=True)
        assert client.user_list() == ()
        done = etcd_admin.ensure_access(client, wanted, apply=True, enable=True)
        assert done.changes[-1] == "authentication on"
        assert {line.split(":")[0] for line in predicted.changes} == {line.split(":")[0] for line in done.changes}
        for apply in (True, False):
            assert etcd_admin.ensure_access(client, wanted, apply=apply, enable=True) == NOTHING
    return server


def allowed(server: EtcdServer, cn: str, *arguments: str) -> bool:
    try:
        server.etcdctl(*arguments, cn=cn)
    except RuntimeError as exc:
        if "permission denied" not in str(exc):
            raise
        return False
    return True


# user -> (may write, may read but not write, may not even read)
RIGHTS = {
    "isthmus-agent-n1": (
        ["isthmus/v1/nodes/n1", "isthmus/v1/workloads/n1/shop.web", "isthmus/v1/alive/n1"],
        [
            "isthmus/v1/nodes/n2",
            "isthmus/v1/nodes/n12",
            "isthmus/v1/workloads/n2/shop.web",
            "isthmus/v1/alive/n10",
            "isthmus/v1/alloc/identities/1",
            "isthmus/v1/leader",
            "isthmus/v1/services/shop/web",
            "isthmus/v1/estate/roster",
            "cilium/state/nodes/v1/onprem/n1",
            "cilium/cache/nodes/v1/cloud/c1",
        ],
        ["other"],
    ),
    "isthmus-registrar": (
        [
            "cilium/state/nodes/v1/onprem/n1",
            "cilium/cache/ip/v1/cloud/10.0.0.1",
            "cilium/.heartbeat",
            "isthmus/v1/alloc/vips/shop/web",
            "isthmus/v1/leader",
        ],
        ["isthmus/v1/nodes/n1", "isthmus/v1/services/shop/web", "isthmus/v1/estate/roster", "isthmus/v1/leader2"],
        ["other"],
    ),
    "isthmus-operator": (
        ["isthmus/v1/estate/roster", "isthmus/v1/services/shop/web", "isthmus/v1/lock", "isthmus/v1/nodes/n1"],
        ["isthmus/v1/alloc/vips/shop/web", "isthmus/v1/leader", "cilium/state/nodes/v1/onprem/n1"],
        ["other"],
    ),
    "remote-cloud": (
        [],
        [
            "cilium/.heartbeat",
            "cilium/state/services/v1/onprem/shop/web",
            "cilium/cluster-config/onprem",
            "cilium/synced/onprem/cilium/state/nodes/v1",
            "cilium/cache/services/v1/cloud/shop/web",
            "cilium/cache/identities/v1/cloud/id/1",
        ],
        [
            "cilium/cluster-config/cloud",
            "cilium/cluster-config/onprem2",
            "cilium/synced/cloud/cilium/cache/nodes/v1",
            "cilium/cache/services/v1/edge/shop/web",
            "isthmus/v1/estate/roster",
            "isthmus/v1/nodes/n1",
        ],
    ),
    "remote": ([], ["cilium/state/nodes/v1/onprem/n1"], ["cilium/cache/nodes/v1/cloud/c1", "isthmus/v1/leader"]),
}


def test_each_name_may_do_what_architecture_says_and_nothing_else(guarded: EtcdServer) -> None:
    wrong = []
    for cn, (writes, reads, nothing) in RIGHTS.items():
        for key in writes + reads + nothing:
            if allowed(guarded, cn, "put", key, "x") != (key in writes):
                wrong.append(f"{cn} put {key}")
            if allowed(guarded, cn, "get", key) != (key not in nothing):
                wrong.append(f"{cn} get {key}")
    assert not wrong
    for arguments in (["user", "list"], ["member", "remove", "1"], ["snapshot", "save", str(guarded.directory / "x")]):
        assert not allowed(guarded, "isthmus-operator", *arguments)
    assert not allowed(guarded, "isthmus-agent-unknown", "get", "cilium/.heartbeat")


def test_another_authoritys_root_is_refused(guarded: EtcdServer, tmp_path: Path) -> None:
    foreign = Ca(tmp_path / "foreign", "cloud")
    crt, key = foreign.issue("root")
    done = subprocess.run(
        ["etcdctl", f"--endpoints={guarded.endpoint}", f"--cacert={guarded.ca.crt}", f"--cert={crt}", f"--key={key}",
         "--command-timeout=3s", "get", "cilium/.heartbeat"],
        env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "certificate signed by unknown authority" in (guarded.directory / "etcd.log").read_text()


def test_users_of_hosts_and_clusters_that_are_gone_go(guarded: EtcdServer) -> None:
    """With the role, so that nothing of the name is left; a peer that the record does not know is only told."""
    assert allowed(guarded, "isthmus-agent-n2", "put", "isthmus/v1/alive/n2", "x")
    wanted = etcd_admin.wanted_access("onprem", ["n1"], [])
    with guarded.sync_client() as client:
        told = etcd_admin.ensure_access(client, wanted, True, True, absent=[])
        assert told.stale == ("remote-cloud",)
        assert told.changes == ("delete user isthmus-agent-n2", "delete role isthmus-agent-n2")
        lines = ("delete user remote-cloud", "delete role remote-cloud")
        for apply in (False, True):
            gone = etcd_admin.ensure_access(client, wanted, apply, True, absent=["cloud"])
            assert gone == etcd_admin.AccessResult(lines, ())
        assert etcd_admin.ensure_access(client, wanted, True, True, absent=["cloud"]) == NOTHING
    assert guarded.etcdctl("user", "list").split() == ["isthmus-agent-n1", "isthmus-operator", "isthmus-registrar",
                                                       "remote", "root"]  # fmt: skip
    assert not set(guarded.etcdctl("role", "list").split()) & {"isthmus-agent-n2", "remote-cloud"}
    with pytest.raises(RuntimeError):
        guarded.etcdctl("put", "isthmus/v1/alive/n2", "x", cn="isthmus-agent-n2")


def test_a_role_that_an_interrupted_run_left_goes_too(guarded: EtcdServer) -> None:
    guarded.etcdctl("user", "delete", "isthmus-agent-n2")
    wanted = etcd_admin.wanted_access("onprem", ["n1"], ["cloud"])
    with guarded.sync_client() as client:
        done = etcd_admin.ensure_access(client, wanted, True, True, absent=[])
    assert done == etcd_admin.AccessResult(("delete role isthmus-agent-n2",), ())


def test_a_limited_run_looks_at_no_other_user(guarded: EtcdServer) -> None:
    with guarded.sync_client() as client:
        assert etcd_admin.ensure_access(client, etcd_admin.wanted_for_nodes(["n1"]), True, False) == NOTHING


def test_rights_added_by_hand_are_taken_back(guarded: EtcdServer) -> None:
    guarded.etcdctl("role", "grant-permission", "--prefix=true", "isthmus-agent-n1", "readwrite", "cilium/")
    guarded.etcdctl("user", "grant-role", "isthmus-agent-n1", "root")
    with guarded.sync_client() as client:
        wanted = etcd_admin.wanted_access("onprem", ["n1"], ["cloud"])
        done = etcd_admin.ensure_access(client, wanted, True, True)
    assert done.changes == (
        "role isthmus-agent-n1: revoke readwrite cilium/*",
        "user isthmus-agent-n1: take role root",
    )
    assert not allowed(guarded, "isthmus-agent-n1", "put", "cilium/x", "x")


def test_a_full_disk_or_an_error_is_not_hidden(trio: Trio) -> None:
    with pytest.raises(etcd_admin.AdminError, match="does not serve after"):
        etcd_admin.wait_healthy(trio.spec("a"), trio.connect, 0.5)
    with pytest.raises(EtcdError), trio.servers["a"].sync_client() as client:
        etcd_admin.ensure_access(client, etcd_admin.wanted_access("onprem", [], []), True, True)
