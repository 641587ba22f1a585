# SPDX-License-Identifier: GPL-3.0-or-later
"""etcd_member as Ansible runs it, on three directories that are hosts: members come, leave, and come back.

The etcds are real, what stands for systemd is `fake_systemctl.py`; etcdctl gives the second opinion.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import previous_release
import pytest
from bpf.topology import wait_for
from cryptography.hazmat.primitives import serialization
from integration.etcd_fixture import Ca, free_port, require_etcd
from integration.module_runner import ModuleFailed, run_module
from isthmus_agent.kvstore import EtcdUnavailable, SyncEtcd
from isthmus_mesh.planner import Plan
from playbook import documented
from unit.mesh.estates import estate, hosts, model, planned

FAKE = Path(__file__).with_name("fake_systemctl.py")
AGENT = Path(__file__).resolve().parents[2] / "agent"


class Host:
    """A host's directory; `ports` are etcd's for clients and peers."""

    def __init__(self, place: Path, name: str, ca: Ca) -> None:
        self.place, self.name = place, name
        self.ports = (free_port(), free_port())
        self.pki, self.data, self.snapshots = place / "pki", place / "data", place / "snapshots"
        (place / "units").mkdir(parents=True)
        (self.pki / "trust").mkdir(parents=True)
        self.ca = ca
        self.places = {
            "etcd_unit.DATA": str(self.data),
            "etcd_unit.ENVIRONMENT": str(place / "etcd.env"),
            "etcd_unit.FIRST_START": str(place / "first-start.conf"),
            "etcd_unit.PKI": str(self.pki),
            "etcd_unit.SNAPSHOTS": str(self.snapshots),
            "etcd_unit.USER": "root",
            "units.UNIT_DIRECTORY": str(place / "units"),
        }

    def give_keys(self, wanted: dict[str, Any]) -> None:
        """What the pki role does: what is there already stays."""
        copies = {self.pki / "trust" / f"{wanted['ca']['cluster']}.crt": self.ca.crt}
        for entry in wanted["certificates"]:
            for path, suffix in zip(self.ca.issue(entry["cn"]), ("crt", "key"), strict=True):
                copies[self.pki / f"{entry['name']}.{suffix}"] = path
        for target, path in copies.items():
            if not target.exists():
                shutil.copy(path, target)

    def keys(self) -> set[str]:
        return {path.stem for path in self.pki.iterdir() if path.is_file()}

    def systemctl(self, *words: str) -> None:
        environment = {**os.environ, "ISTHMUS_TEST_HOST": str(self.place)}
        subprocess.run([sys.executable, str(FAKE), *words], check=True, env=environment)

    def calls(self) -> list[str]:
        path = self.place / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def runs(self) -> bool:
        try:
            number = (self.place / "pids" / "isthmus-etcd.service").read_text()
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False


class Cluster:
    """The hosts o1, o2 and o3 of cluster onprem, planned by the planner; only the ports are the tests' own."""

    def __init__(self, root: Path) -> None:
        self.ca = Ca(root / "ca", "onprem")
        self.hosts = {name: Host(root / name, name, self.ca) for name in ("o1", "o2", "o3")}
        self.plan = self.planned(*self.hosts)
        (root / "bin").mkdir()
        (root / "bin" / "systemctl").write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        (root / "bin" / "systemctl").chmod(0o755)
        (root / "bin" / "journalctl").write_text('#!/bin/sh\ntail -n 300 "$ISTHMUS_TEST_HOST/etcd.log"\n')
        (root / "bin" / "journalctl").chmod(0o755)
        self.path = f"{root / 'bin'}:{os.environ['PATH']}"

    def planned(self, *members: str, gone: tuple[str, ...] = (), prune: tuple[str, ...] = ()) -> Plan:
        """The next plan of an inventory with these members; of hosts that are ``gone`` it says so."""
        the_estate, the_hosts = estate(), hosts()
        del the_estate["clusters"]["cloud"], the_hosts["c1"]
        the_estate["clusters"]["onprem"]["etcd"]["hosts"] = list(members)
        for name in gone:
            the_hosts[name]["isthmus_state"] = "absent"
        return planned(model(the_estate, the_hosts), getattr(self, "plan", None), prune=prune)

    def spec(self, name: str) -> dict[str, Any]:
        spec = json.loads(json.dumps(self.plan.specs[name]))
        members = self.plan.record["clusters/onprem"]["etcd"]["members"]
        clients = {member: f"https://127.0.0.1:{self.hosts[member].ports[0]}" for member in members}
        peers = {member: f"https://127.0.0.1:{self.hosts[member].ports[1]}" for member in members}
        spec["etcd"]["endpoints"] = list(clients.values())
        if spec["member"] is not None:
            own = {"client_url": clients[name], "peer_url": peers[name]}
            spec["member"].update(members=peers, client_urls=clients, **own)
        return spec

    def run(
        self, name: str, check: bool = False, acts: str = "o1", packages: Path = AGENT, **more: Any
    ) -> dict[str, Any]:
        host, spec = self.hosts[name], self.spec(name)
        if spec["member"] is not None:
            host.give_keys(spec["pki"])
        arguments = {"spec": spec, "record": self.plan.record["clusters/onprem"], "former": acts, "timeout": 30, **more}
        inside = ("env", f"PATH={self.path}", f"ISTHMUS_TEST_HOST={host.place}")
        return run_module("etcd_member", arguments, check=check, places=host.places, packages=packages, inside=inside)

    def record(self) -> None:
        """What the services role does after the members ran."""
        self.etcdctl("put", "isthmus/v1/estate/clusters/onprem", json.dumps(self.plan.record["clusters/onprem"]))

    def form(self) -> None:
        for name in self.hosts:
            self.run(name)
        self.record()
        assert self.members() == list(self.hosts)

    def etcdctl(self, *words: str, at: str = "o1") -> str:
        crt, key = self.ca.issue("root")
        files = [f"--cacert={self.ca.crt}", f"--cert={crt}", f"--key={key}"]
        endpoint = f"--endpoints=https://127.0.0.1:{self.hosts[at].ports[0]}"
        environment = {"ETCDCTL_API": "3", "PATH": os.environ["PATH"]}
        command = ["etcdctl", endpoint, *files, "--command-timeout=5s", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    def until_healthy(self, name: str) -> None:
        end = time.monotonic() + 30
        while True:
            try:
                self.etcdctl("endpoint", "health", at=name)
            except subprocess.CalledProcessError:
                assert time.monotonic() < end, f"{name} does not become healthy"
                time.sleep(0.1)
            else:
                return

    def members(self) -> list[str]:
        return sorted(line.split(", ")[2] for line in self.etcdctl("member", "list").splitlines())

    def cluster_id(self, at: str = "o2") -> int:
        """etcd's own."""
        return int(json.loads(self.etcdctl("member", "list", "-w", "json", at=at))["header"]["cluster_id"])

    def converge(self, name: str, action: str, acts: str = "o1") -> dict[str, Any]:
        """check -> apply -> apply -> check; the result of the run that changed something."""
        predicted = self.run(name, check=True, acts=acts)
        done = self.run(name, acts=acts)
        assert (predicted["changed"], done["changed"], done["action"]) == (True, True, action)
        headers = [sorted(entry["before_header"] for entry in result["diff"]) for result in (predicted, done)]
        assert headers[0] == headers[1]
        for check in (False, True):
            assert self.run(name, check=check, acts=acts)["changed"] is False
        return done


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    require_etcd()
    made = Cluster(tmp_path)
    yield made
    for host in made.hosts.values():
        host.systemctl("disable", "isthmus-etcd.service", "isthmus-etcd-defrag.timer")


def warnings_of(result: dict[str, Any]) -> str:
    return " ".join(map(str, result.get("warnings", ())))


def put_away(host: Host) -> None:
    """Nothing of the member is left on the host but its data, aside, and its snapshots."""
    assert not host.runs()
    assert not host.data.exists()
    assert not (host.place / "etcd.env").exists()
    assert list((host.place / "units").glob("isthmus-etcd*")) == []
    assert list((host.place / "units" / "enabled").iterdir()) == []
    (aside,) = host.place.glob("data.removed-*")
    assert (aside / "member" / "wal").is_dir()
    assert host.keys() == {"agent"}


def guard(cluster: Cluster) -> None:
    """Access control is on, as the role leaves it."""
    for words in (("user", "add", "--no-password", "root"), ("user", "grant-role", "root", "root"), ("auth", "enable")):
        cluster.etcdctl(*words)


def lose(host: Host) -> None:
    host.systemctl("stop", "isthmus-etcd.service")
    shutil.rmtree(host.data)


def test_members_that_are_pruned_leave_and_come_back(cluster: Cluster) -> None:
    """As in a run over all hosts: those that stay go first, and take the others out."""
    cluster.form()
    cluster.plan = cluster.planned("o1", prune=("member/onprem/o2", "member/onprem/o3"))
    done = cluster.converge("o1", "none")
    assert sorted(entry["before_header"] for entry in done["diff"]) == ["member o2", "member o3"]
    assert cluster.members() == ["o1"]
    assert len(list(cluster.hosts["o1"].snapshots.glob("*-before-removal.db"))) == 1
    for name in ("o2", "o3"):
        cluster.converge(name, "left")
        put_away(cluster.hosts[name])
    cluster.record()

    cluster.plan = cluster.planned("o1", "o2", "o3")
    cluster.run("o1")
    for name in ("o2", "o3"):
        assert cluster.run(name)["action"] == "joined"
    assert cluster.members() == ["o1", "o2", "o3"]
    assert len(list(cluster.hosts["o2"].place.glob("data.removed-*"))) == 1


def test_a_former_member_leaves_by_itself_when_no_other_runs(cluster: Cluster) -> None:
    """`--limit` to it alone."""
    cluster.form()
    cluster.plan = cluster.planned("o1", "o2", prune=("member/onprem/o3",))
    done = cluster.converge("o3", "left")
    assert "member o3" in [entry["before_header"] for entry in done["diff"]]
    assert cluster.members() == ["o1", "o2"]
    put_away(cluster.hosts["o3"])
    text = json.dumps(done)
    assert "PRIVATE KEY" not in text
    assert '"before_header": "' + str(cluster.hosts["o3"].pki / "root.key") in text
    assert cluster.run("o1")["changed"] is False


def test_a_former_member_goes_on_while_it_may_not_leave(cluster: Cluster) -> None:
    cluster.form()
    cluster.plan = cluster.planned("o1", "o2", prune=("member/onprem/o3",))
    cluster.hosts["o2"].systemctl("stop", "isthmus-etcd.service")
    host = cluster.hosts["o3"]
    calls, keys = host.calls(), host.keys()
    for check in (True, False):
        with pytest.raises(ModuleFailed, match=r"cannot yet: .*one that stays is not healthy: o2.* goes on running"):
            cluster.run("o3", check=check)
    assert (host.calls(), host.keys(), host.runs()) == (calls, keys, True)
    told = cluster.run("o1")
    assert (told["changed"], cluster.members()) == (False, ["o1", "o2", "o3"])
    assert "member o3 is to leave cluster onprem, but one that stays is not healthy: o2" in warnings_of(told)


def test_a_removed_host_that_is_back_without_a_member_is_put_away_though_it_is_refused(cluster: Cluster) -> None:
    """Its certificates were revoked when it was removed, so that it cannot ask whether it is out."""
    cluster.form()
    cluster.plan = cluster.planned("o1", "o2", prune=("member/onprem/o3",))
    for name in ("o1", "o2"):
        cluster.hosts[name].systemctl("stop", "isthmus-etcd.service")
    host, record = cluster.hosts["o3"], cluster.plan.record["clusters/onprem"]
    with pytest.raises(ModuleFailed, match="is to leave cluster onprem and cannot yet"):
        cluster.run("o3")
    assert host.runs()
    listed = cluster.ca.revoked(host.pki / "root.crt", encoding=serialization.Encoding.PEM).decode()
    assert cluster.run("o3", record={**record, "crl": listed})["action"] == "left"
    put_away(host)


def test_an_interrupted_departure_is_completed(cluster: Cluster) -> None:
    cluster.form()
    cluster.plan = cluster.planned("o1", "o2", prune=("member/onprem/o3",))
    host = cluster.hosts["o3"]
    cluster.run("o1")
    host.systemctl("disable", "isthmus-etcd.service", "isthmus-etcd-defrag.timer")
    for path in (host.place / "units").glob("isthmus-etcd*"):
        path.unlink()
    cluster.converge("o3", "left")
    put_away(host)


def test_a_member_whose_host_is_gone_does_not_stop_the_others_restart(cluster: Cluster) -> None:
    """It is taken out before the restart, also by one that does not act for all."""
    cluster.form()
    cluster.plan = cluster.planned("o1", "o2", gone=("o3",))
    cluster.hosts["o3"].systemctl("stop", "isthmus-etcd.service")
    assert cluster.run("o2")["changed"] is False
    assert cluster.members() == ["o1", "o2", "o3"]
    for name in ("o1", "o2"):
        unit = cluster.hosts[name].place / "units/isthmus-etcd.service"
        unit.write_text(unit.read_text().replace("ISTHMUS_CONFIG=", "ISTHMUS_CONFIG=0"))
        cluster.hosts[name].systemctl("restart", "isthmus-etcd.service")
    for name in ("o1", "o2"):  # one of two has no quorum while the other one starts
        cluster.until_healthy(name)
    done = cluster.run("o2", acts="o1")
    assert done["action"] == "restarted"
    assert cluster.members() == ["o1", "o2"]
    assert cluster.run("o1")["action"] == "restarted"


def test_a_host_that_was_away_when_it_was_taken_out_joins_anew(cluster: Cluster) -> None:
    """Its old data would never be admitted again; it is kept aside."""
    cluster.form()
    cluster.plan = cluster.planned("o1", "o2", gone=("o3",))
    cluster.hosts["o3"].systemctl("stop", "isthmus-etcd.service")
    cluster.run("o1")
    cluster.record()
    cluster.plan = cluster.planned("o1", "o2", "o3")
    assert "moved to" in json.dumps(cluster.run("o3", check=True)["diff"])
    assert cluster.hosts["o3"].data.exists()
    assert cluster.run("o3")["action"] == "joined"
    assert cluster.members() == ["o1", "o2", "o3"]
    assert len(list(cluster.hosts["o3"].place.glob("data.removed-*"))) == 1


@pytest.mark.parametrize("version", ["this", "the previous"])
def test_a_check_predicts_the_restart_for_a_list_that_the_host_gets_in_the_run(cluster: Cluster, version: str) -> None:
    """A member from before there were lists, also on a host that has the version of then."""
    packages = AGENT if version == "this" else previous_release.python_path()
    cluster.run("o1")
    assert cluster.run("o1", check=True, packages=packages)["changed"] is False
    predicted = cluster.run("o1", check=True, packages=packages, listed=True)
    assert predicted["action"] == "restarted"
    (cluster.hosts["o1"].pki / "revoked.crl").write_bytes(cluster.ca.revoked())
    done = cluster.run("o1")
    assert done["action"] == "restarted"
    headers = [sorted(entry["before_header"] for entry in result["diff"]) for result in (predicted, done)]
    assert headers[0] == headers[1]


@pytest.mark.root
def test_a_full_disk_leaves_a_member_that_is_to_restart_as_it_is_and_old_snapshots_make_room(cluster: Cluster) -> None:
    cluster.run("o1")
    host = cluster.hosts["o1"]
    (host.pki / "revoked.crl").write_bytes(cluster.ca.revoked())
    host.snapshots.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(host.snapshots)], check=True)
    try:
        settings, restart = (host.place / "etcd.env").read_text(), "restart isthmus-etcd.service"
        with pytest.raises(ModuleFailed, match=r"o1 is .* left as it is: .*No space left.*\. Next: .*run the playbook"):
            cluster.run("o1")
        assert (host.place / "etcd.env").read_text() == settings
        assert (host.calls().count(restart), host.runs()) == (1, True)
        assert list(host.snapshots.iterdir()) == []

        subprocess.run(["mount", "-o", "remount,size=1m", str(host.snapshots)], check=True)
        for year in range(2020, 2025):
            (host.snapshots / f"{year}0101T000000Z-before-restart.db").write_bytes(bytes(204 << 10))
        assert cluster.run("o1")["action"] == "restarted"
        assert [path.name[:4] for path in sorted(host.snapshots.iterdir())][:-1] == ["2021", "2022", "2023", "2024"]
    finally:
        subprocess.run(["umount", "--lazy", str(host.snapshots)], check=True)


def test_a_host_without_a_member_needs_nothing(cluster: Cluster) -> None:
    cluster.plan = cluster.planned("o1", "o2", prune=("member/onprem/o3",))
    assert cluster.run("o3")["action"] == "none"
    assert cluster.hosts["o3"].calls() == []


def test_all_members_come_back_from_a_snapshot(cluster: Cluster, tmp_path: Path) -> None:
    """With its users and keys, under another cluster id, and without the locks of runs that were at work then."""
    cluster.form()
    guard(cluster)
    for key in ("isthmus/v1/services/shop/web", "isthmus/v1/lock/run"):
        cluster.etcdctl("put", key, "x")
    before = cluster.cluster_id()
    taken, sent = tmp_path / "taken.db", cluster.hosts["o2"].place / "sent.db"
    cluster.etcdctl("snapshot", "save", str(taken))
    for host in cluster.hosts.values():
        lose(host)
    restore = {"formed": True, "acts": "o2", "snapshot": str(sent)}
    with pytest.raises(ModuleFailed, match=r"sent.db is not on this host, .* Nothing was restored"):
        cluster.run("o2", **restore)
    assert not cluster.hosts["o2"].data.exists()

    sent.write_bytes(taken.read_bytes()[:-100])
    with pytest.raises(ModuleFailed, match=r"could not restore .*etcd was not started. Next: "):
        cluster.run("o2", **restore)
    assert (list(cluster.hosts["o2"].data.iterdir()), cluster.hosts["o2"].runs()) == ([], False)

    shutil.copy(taken, sent)
    assert cluster.run("o2", check=True, **restore)["changed"] is True
    assert cluster.run("o2", **restore)["action"] == "restored"
    assert not sent.exists()
    assert list(cluster.hosts["o2"].data.iterdir()) == [cluster.hosts["o2"].data / "member"]
    for name in ("o1", "o3"):
        assert cluster.run(name, **restore)["action"] == "joined"
    assert cluster.members() == ["o1", "o2", "o3"]
    assert cluster.cluster_id() != before
    keys = cluster.etcdctl("get", "--prefix", "--keys-only", "isthmus/", at="o3").split()
    assert [key for key in keys if "/etcd-joining/" not in key] == [
        "isthmus/v1/estate/clusters/onprem",
        "isthmus/v1/services/shop/web",
    ]
    assert cluster.etcdctl("user", "list").split() == ["root"]
    for name in cluster.hosts:
        assert cluster.run(name, formed=True)["changed"] is False


@pytest.mark.slow
def test_members_that_come_back_with_the_data_of_before_a_restore_are_told_and_join_once_they_are_stopped(
    cluster: Cluster,
) -> None:
    """They have a quorum, and the others that were asked first say that all is well."""
    cluster.form()
    older, restored = ("o1", "o2"), cluster.hosts["o3"]
    sent = restored.place / "sent.db"
    cluster.etcdctl("snapshot", "save", str(sent))
    for name in older:
        cluster.hosts[name].systemctl("stop", "isthmus-etcd.service")
    lose(restored)
    assert cluster.run("o3", acts="o3", formed=True, snapshot=str(sent))["action"] == "restored"
    for name in older:
        cluster.hosts[name].systemctl("restart", "isthmus-etcd.service")
    for name in older:
        cluster.until_healthy(name)

    words = r"{} was left as it is.* in different etcds: o1, o2 in .*{:x}; o3 in .*{:x}. .*Next: `systemctl stop"
    ids = [cluster.cluster_id(at=name) for name in ("o1", "o3")]
    for name, check in (("o1", False), ("o2", True), ("o3", False)):
        with pytest.raises(ModuleFailed, match=words.format(name, *ids)):
            cluster.run(name, check=check, acts="o3", formed=True)
    cluster.hosts["o1"].systemctl("stop", "isthmus-etcd.service")
    end = time.monotonic() + 30
    while json.loads(cluster.etcdctl("endpoint", "status", "-w", "json", at="o2"))[0]["Status"].get("leader"):
        assert time.monotonic() < end, "o2 alone goes on with a leader"
    with pytest.raises(ModuleFailed, match="in different etcds: o2 in "):
        cluster.run("o2", acts="o3", formed=True)
    assert cluster.run("o3", acts="o3", formed=True)["action"] == "none", "one without a quorum is no reason to wait"
    cluster.hosts["o2"].systemctl("stop", "isthmus-etcd.service")
    for name in older:
        assert cluster.run(name, acts="o3", formed=True)["action"] == "joined"
        assert len(list(cluster.hosts[name].place.glob("data.removed-*"))) == 1
        assert cluster.cluster_id(at=name) == ids[1]
    assert cluster.members() == ["o1", "o2", "o3"]


def test_a_member_that_lost_its_data_joins_anew_whoever_leads(cluster: Cluster) -> None:
    cluster.form()
    guard(cluster)
    before = cluster.cluster_id()
    lose(cluster.hosts["o1"])  # it led: the first of the others that is asked may not
    assert cluster.run("o1", formed=True)["action"] == "joined"
    assert cluster.members() == ["o1", "o2", "o3"]
    assert cluster.cluster_id() == before


def test_damaged_data_of_one_member_is_told_and_replaced(cluster: Cluster) -> None:
    cluster.form()
    host = cluster.hosts["o3"]
    host.systemctl("stop", "isthmus-etcd.service")
    with (host.data / "member" / "snap" / "db").open("r+b") as file:
        file.write(os.urandom(8192))
    with pytest.raises(ModuleFailed, match=r"member o3 does not serve .*Its data is damaged .*joins them anew") as told:
        cluster.run("o3", formed=True, timeout=5)
    for command in ("`systemctl stop isthmus-etcd`", "`mv /var/lib/isthmus/etcd /var/lib/isthmus/etcd.damaged`"):
        assert command in told.value.msg
    host.systemctl("stop", "isthmus-etcd.service")
    host.data.rename(host.place / "data.damaged")
    assert cluster.run("o3", formed=True)["action"] == "joined"
    assert cluster.members() == ["o1", "o2", "o3"]


@pytest.mark.slow
def test_two_of_three_that_lost_their_data_join_the_one_that_is_left(cluster: Cluster) -> None:
    """By the commands of the docs: nothing that was written is lost, and the cluster is the same one to its readers."""
    cluster.form()
    guard(cluster)
    cluster.etcdctl("put", "isthmus/v1/services/shop/web", "latest")
    before = cluster.cluster_id()
    for name in ("o2", "o3"):
        lose(cluster.hosts[name])
    with pytest.raises(ModuleFailed, match=r"has no data and no other member .*\(o1 run but cannot serve; .*restore"):
        cluster.run("o2", formed=True)
    host = cluster.hosts["o1"]
    host.systemctl("restart", "isthmus-etcd.service")
    with pytest.raises(
        ModuleFailed, match=r"o1 does not serve .*Of the other members: o2, o3 refuse connections.*Next:"
    ):
        cluster.run("o1", formed=True, timeout=5)

    script = documented("operating.md", "systemctl stop isthmus-etcd\nset -a")
    for there, here in (
        ("systemctl stop isthmus-etcd", "systemctl stop isthmus-etcd.service"),
        ("systemctl start isthmus-etcd", "true"),
        ("/etc/isthmus/etcd.env", str(host.place / "etcd.env")),
        ("runuser -u isthmus-etcd -- timeout 20", "env timeout 6"),
        ("/etc/systemd/system/", f"{host.place / 'units'}/"),
    ):
        assert there in script
        script = script.replace(there, here)
    environment = {**os.environ, "PATH": cluster.path, "ISTHMUS_TEST_HOST": str(host.place)}
    subprocess.run(["sh", "-e", "-c", script], check=True, capture_output=True, env=environment)
    assert cluster.run("o1", formed=True)["action"] == "started"
    for name in ("o2", "o3"):
        assert cluster.run(name, formed=True)["action"] == "joined"
    assert cluster.members() == ["o1", "o2", "o3"]
    assert cluster.cluster_id() == before
    assert cluster.etcdctl("get", "isthmus/v1/services/shop/web", at="o3").split()[-1] == "latest"


def sign_anew(cluster: Cluster, host: Host, ca: Ca) -> None:
    for entry in cluster.spec(host.name)["pki"]["certificates"]:
        for path, suffix in zip(ca.issue(entry["cn"]), ("crt", "key"), strict=True):
            shutil.copy(path, host.pki / f"{entry['name']}.{suffix}")


@pytest.mark.slow
def test_members_go_over_to_another_authority_one_at_a_time(cluster: Cluster, tmp_path: Path) -> None:
    """As replace_authority does it: both are trusted, then all certificates are new, then the old one is refused."""
    cluster.form()
    guard(cluster)
    successor, hosts = Ca(tmp_path / "successor", "onprem"), list(cluster.hosts.values())
    old, new = cluster.ca.crt.read_text(), successor.crt.read_text()

    def trust(text: str) -> None:
        for host in hosts:
            (host.pki / "trust" / "onprem.crt").write_text(text)

    def served(ca: Ca) -> bool:
        """A client with this authority's certificate, trusting what the hosts trust."""
        crt, key = ca.issue("root")
        pinned = hosts[0].pki / "trust" / "onprem.crt"
        found = []
        for host in hosts:
            with SyncEtcd([f"https://127.0.0.1:{host.ports[0]}"], pinned, crt, key) as client:
                try:
                    found.append(client.get("isthmus/v1/estate/clusters/onprem") is not None)
                except EtcdUnavailable:
                    found.append(False)
        assert len(set(found)) == 1
        return found[0]

    def restart() -> None:
        for host in hosts:
            assert cluster.run(host.name, formed=True)["action"] == "restarted"

    trust(old + new)
    restart()
    assert served(cluster.ca)
    assert served(successor)
    for host in hosts:
        sign_anew(cluster, host, successor)
        assert served(cluster.ca), "while some certificates are old and some new"
        assert served(successor)
    trust(new + old)
    restart()
    assert served(cluster.ca)
    assert served(successor)
    trust(new)
    restart()
    assert served(successor)
    assert not served(cluster.ca)
    for host in hosts:
        assert cluster.run(host.name, formed=True)["changed"] is False


@pytest.mark.parametrize("members", [("o1",), ("o1", "o2", "o3")])
def test_members_whose_authority_has_ended_go_over_to_another_at_once(
    cluster: Cluster, tmp_path: Path, members: tuple[str, ...]
) -> None:
    """They take nobody's certificate until they start anew: none can be asked for its turn, nor waits for another."""
    cluster.hosts = {name: cluster.hosts[name] for name in members}
    vars(cluster).pop("plan")
    cluster.plan = cluster.planned(*members)
    cluster.form()
    cluster.ca.days = (-3, -1)
    successor, ended, hosts = Ca(tmp_path / "successor", "onprem"), cluster.ca.certificate(), cluster.hosts.values()

    def trust(text: str) -> None:
        for host in hosts:
            (host.pki / "trust" / "onprem.crt").write_text(text)

    trust(ended)
    # Without the others a member serves no clients.
    serving = f"serving {'client' if len(members) == 1 else 'peer'} traffic"
    for host in hosts:
        log = host.place / "etcd.log"
        log.unlink()
        host.systemctl("restart", "isthmus-etcd.service")
        wait_for(lambda log=log: serving in log.read_text(), f"{host.name} has read whom it trusts", 30)
    trust(ended + successor.crt.read_text())
    for host in hosts:
        sign_anew(cluster, host, successor)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # as a play's hosts
        done = list(pool.map(lambda name: cluster.run(name, formed=True), members))
    assert [one["action"] for one in done] == ["restarted"] * len(members)
    assert all("an authority of cluster onprem has ended" in warnings_of(one) for one in done)

    cluster.ca = successor
    assert cluster.members() == list(members)
    assert "isthmus/v1/estate/clusters/onprem" in cluster.etcdctl("get", "--prefix", "--keys-only", "isthmus/")
    trust(successor.crt.read_text() + ended)
    for name in members:
        told = cluster.run(name, formed=True)
        assert (told["action"], "has ended" in warnings_of(told)) == ("restarted", False), "each in its turn again"
    for check in (True, False):
        assert not cluster.run("o1", formed=True, check=check)["changed"]
