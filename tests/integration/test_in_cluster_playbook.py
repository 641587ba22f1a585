# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook `site` with a cluster whose control plane is in it: in which order it is exposed, gets its keys, etcd,
record and pods, and what others learn of it. Modules are `fake_modules.py` and `fake_in_cluster.py`; what they do with
a real API is test_kubernetes_install.py, test_pki_job.py and test_in_cluster.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from integration.test_batches_playbook import HOSTS, Site, fake, said

CA = "-----BEGIN CERTIFICATE-----"
FAKED = ("kubernetes_install", "peer_probe", "pki_install", "pki_request", "pki_sign")
ENTRY = "m-api"


class Managed(Site):
    """Cluster `m` beside the others; its API is reached from b1, so that it shows where modules run."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.leaves = False
        (self.here / "plugins" / "action" / "kubernetes_install.py").unlink()
        for name in FAKED:
            fake(self.here, name, "fake_in_cluster.py")
        (place / "hosts" / ENTRY).mkdir()
        interpreter = place / "hosts" / ENTRY / "python"
        interpreter.write_text(f'#!/bin/sh\nFAKE_HOST={ENTRY} FAKE_PLACE={place} exec {sys.executable} "$@"\n')
        interpreter.chmod(0o755)

    def inventory(self) -> Path:
        path = super().inventory()
        content = json.loads(path.read_text())
        content["all"]["vars"]["isthmus_estate"]["clusters"]["m"] = {
            "id": 9,
            "control_plane": "in_cluster",
            "workload_ranges": ["10.109.0.0/16"],
            "service_range": "10.119.0.0/16",
            "kubernetes": {"pod_ranges": ["10.246.0.0/16"], "service_range": "10.98.0.0/16"},
            "etcd": {"hosts": [ENTRY]},
            "state": "absent" if self.leaves else "present",
        }
        content["all"]["children"]["managed"] = {
            "vars": {"isthmus_cluster": "m", "isthmus_api_host": "b1", "isthmus_image": "registry.example/isthmus:1"},
            "hosts": {
                ENTRY: {
                    "ansible_connection": "local",
                    "ansible_python_interpreter": str(self.place / "hosts" / ENTRY / "python"),
                }
            },
        }
        path.write_text(json.dumps(content))
        return path

    @property
    def sequence(self) -> list[str]:
        """What was done for the cluster, in its order."""
        found = []
        for line in (self.place / "calls").read_text().splitlines():
            call = json.loads(line)
            if call["module"] == "kubernetes_install":
                phase = "absent" if call["state"] == "absent" else call["phase"]
                found.append(phase + (" (look)" if call["check"] else ""))
            elif call["host"] == ENTRY and call["module"] in ("etcd_access", "estate_record"):
                found.append(f"{call['module']} {call.get('state', '')}".strip())
        return found

    def without_certificate_of(self, peer: str) -> None:
        """The registrars in the cluster have still to be signed for by the authority of `peer`."""
        issued = json.loads((self.place / "issued").read_text())
        del issued["certificates"][peer]
        issued["requests"][peer] = {"csr": f"m asks {peer}", "reason": "there is none yet"}
        (self.place / "issued").write_text(json.dumps(issued))


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Managed:
    """An estate that runs, which the cluster has joined."""
    site = Managed(tmp_path_factory.mktemp("joined"))
    first = site.run()
    assert first.status == 0, first.output
    return site


@pytest.fixture
def lacking(joined: Managed, tmp_path: Path) -> Managed:
    """The same, where the registrars in the cluster lack what the authority of `a` signs."""
    site = Managed(tmp_path)
    shutil.copytree(joined.place / "hosts", tmp_path / "hosts", dirs_exist_ok=True, ignore=lambda *_: ["python"])
    for path in (joined.place / "record", joined.place / "issued", *joined.place.glob("phase-*")):
        shutil.copy(path, tmp_path)
    site.without_certificate_of("a")
    return site


def test_a_cluster_joins_in_one_run_and_the_next_changes_nothing(joined: Managed) -> None:
    found = joined.sequence
    assert found[: found.index("expose") + 1] == ["estate_record read", "expose"]
    rest = [step for step in found[found.index("expose") + 1 :] if step != "estate_record present"]
    assert rest == ["pki (look)", "pki", "pki", "etcd", "etcd_access", "run", "estate_record released"]
    after = found[found.index("etcd_access") :]
    assert after[:3] == ["etcd_access", "estate_record present", "run"]  # the record, before who reads it
    assert {call["host"] for call in joined.calls("kubernetes_install")} == {"b1"}

    # Everybody who carries an etcd reads it, with what it signed.
    for host in HOSTS:
        spec = json.loads((joined.place / "hosts" / host / "node.json").read_text())
        certificate = joined.place / "hosts" / host / "peer-m"
        assert certificate.exists() == (spec["member"] is not None)
        if spec["member"] is not None:
            assert certificate.read_text() == f"m signed {host} asks, {CA}"
            (peer,) = [one for one in spec["registrar"]["peers"] if one["name"] == "m"]
            assert peer["endpoints"] == ["https://192.0.9.200:2379"]
    record = json.loads((joined.place / "record").read_text())
    assert record["clusters/m"]["exposed"]["cluster_ip"] == "10.98.0.7"
    assert record["clusters/m"]["ca_certificate"]
    asked = joined.calls("kubernetes_install")[-1]["install"]
    assert asked["image"] == "registry.example/isthmus:1"
    assert asked["document"]["etcd"]["endpoints"] == ["https://10.98.0.7:2379"]
    assert asked["trust"] == dict.fromkeys("abcm", CA)
    (wanted,) = [call["wanted"] for call in joined.calls("kubernetes_install") if call["phase"] == "pki"][-1:]
    assert sorted(wanted["certificates"]) == ["a", "b", "c"]
    assert [one["host"] for one in wanted["requests"]] == sorted(
        host for host in HOSTS if (joined.place / "hosts" / host / "peer-m").exists()
    )
    second = joined.run()
    assert second.status == 0, second.output
    assert second.changed == {}, said(second)


def test_verify_names_what_differs_and_what_is_not_ready(joined: Managed) -> None:
    verified = joined.run(name="verify")
    assert verified.status == 0, verified.output
    assert joined.sequence == ["estate_record read", "run (look)"]
    told = joined.place / "unready"
    told.write_text("DaemonSet isthmus-system/isthmus-agent: 1 of 2 pods are ready")
    wrong = joined.run(name="verify")
    told.unlink()
    assert wrong.status == 2, wrong.output
    assert "Different from it: nothing. Not ready: DaemonSet isthmus-system/isthmus-agent: 1 of 2" in said(wrong)
    assert sorted(call["host"] for call in joined.calls("verify")) == HOSTS, "hosts were looked at all the same"


def test_the_plan_shows_what_would_change_in_it(joined: Managed) -> None:
    shown = joined.run(name="plan")
    assert shown.status == 0, shown.output
    assert "after the hosts, each in itself: m" in shown.output
    assert [step for step in joined.sequence if step.startswith("run")] == ["run (look)"]
    assert all(step.endswith("(look)") or step.startswith("e") for step in joined.sequence), joined.sequence


def test_nothing_secret_and_no_key_is_asked_for(joined: Managed) -> None:
    for call in joined.calls("kubernetes_install"):
        assert "PRIVATE KEY" not in json.dumps(call)


def test_a_failure_in_the_cluster_ends_the_run_with_words(joined: Managed, tmp_path: Path) -> None:
    site = Managed(tmp_path)
    (tmp_path / "fail" / "kubernetes_install etcd").touch()
    failed = site.run()
    assert failed.status != 0
    assert "kubernetes_install etcd fails" in failed.output
    assert "run" not in site.sequence
    assert site.locks == []  # the lock was given back


@pytest.mark.slow
def test_another_authority_that_does_not_sign_is_named_in_the_end(lacking: Managed) -> None:
    (lacking.place / "fail" / "pki_sign a1").touch()
    failed = lacking.run()
    assert failed.status == 2, failed.output
    words = "for the etcd of cluster a, whose authority signed nothing (a1: pki_sign fails on a1)."
    assert f"Pending: the registrars in cluster m have no new certificate {words}" in said(failed)
    assert {name for name, recap in failed.hosts.items() if recap.failed} == {ENTRY}
    assert lacking.sequence[-2:] == ["run", "estate_record released"], "all else was done"
    assert lacking.locks == []
    (lacking.place / "fail" / "pki_sign a1").unlink()
    second = lacking.run()
    assert second.status == 0, second.output
    assert "Pending" not in second.output
    assert lacking.run().changed == {}


@pytest.mark.slow
def test_an_authority_that_signs_nothing_for_a_host_of_another_cluster_is_named_in_the_end(lacking: Managed) -> None:
    (lacking.place / "hosts" / "a1" / "peer-b").unlink()
    (lacking.place / "fail" / "pki_sign b1").touch()
    failed = lacking.run()
    assert failed.status == 2, failed.output
    words = "a1 got no new certificate of cluster b, whose authority signed nothing (b1: pki_sign fails on b1)."
    assert f"Pending: {words}" in said(failed)
    assert {name for name, recap in failed.hosts.items() if recap.failed} == {"a1"}
    assert sorted(call["host"] for call in lacking.calls("node")) == HOSTS, "all else was done"
    assert lacking.locks == []
    (lacking.place / "fail" / "pki_sign b1").unlink()
    second = lacking.run()
    assert second.status == 0, second.output
    assert "Pending" not in second.output


def test_another_authority_that_cannot_be_entered_is_waited_for(lacking: Managed) -> None:
    (lacking.place / "silent" / "a1").touch()
    alone = lacking.run("--limit", ENTRY)
    assert alone.status == 4, alone.output
    words = "m-api could not be finished without the authority of cluster a: a1 could not be entered."
    assert f"Pending: {words}" in said(alone)
    assert "run" in lacking.sequence


@pytest.mark.slow
def test_a_host_that_lacks_the_clusters_certificate_is_named(lacking: Managed) -> None:
    (lacking.place / "hosts" / "a1" / "peer-m").unlink()
    without = lacking.run("--limit", "a1")
    assert without.status == 0, without.output
    words = (
        "no new certificate for the etcd of cluster m, whose authority signed nothing (it is in the cluster, and m-api"
    )
    assert f"Pending: the registrars on a1 have {words} is not in this run)." in said(without)
    assert "Pending: the registrars on" not in said(lacking.run())


def test_a_cluster_that_cannot_be_exposed_is_pending_and_stops_nobody(lacking: Managed) -> None:
    (lacking.place / "fail" / "kubernetes_install expose").touch()
    failed = lacking.run()
    assert failed.status == 2, failed.output
    assert "Pending: cluster m could not be done (m-api): kubernetes_install expose fails." in said(failed)
    assert sorted(call["host"] for call in lacking.calls("node")) == HOSTS
    assert "could not be entered" not in failed.output


@pytest.mark.slow
def test_who_reads_its_etcd_dials_it_and_what_is_closed_is_named(lacking: Managed) -> None:
    (lacking.place / "closed").write_text("a1 192.0.9.200\nb1 192.0.9.200\n")
    closed = lacking.run()
    dialled = {call["host"]: call["targets"] for call in lacking.calls("peer_probe")}
    readers = [host for host in HOSTS if (lacking.place / "hosts" / host / "peer-m").exists()]
    assert sorted(dialled) == readers
    target = {"host": ENTRY, "address": "192.0.9.200", "protocol": "tcp", "port": 2379, "answers": "etcd"}
    for targets in dialled.values():
        assert targets == [{**target, "authority": CA, "one_is_enough": True}]

    assert closed.status == 2, closed.output
    words = "does not reach the etcd of cluster m: TCP 2379 of 192.0.9.200 (no answer within 3 s)."
    assert f"Pending: a1 (192.0.1.1), b1 (192.0.2.4) {words} Let these hosts in there:" in said(closed)
    assert "or expose it otherwise (isthmus_estate.clusters.m.expose.type)." in said(closed)
    assert {name for name, recap in closed.hosts.items() if recap.failed} == {"a1", "b1"}
    assert "run" in lacking.sequence, "all else was done"
    assert lacking.locks == []

    (lacking.place / "closed").unlink()
    opened = lacking.run()
    assert opened.status == 0, opened.output
    assert opened.changed == {}, "the first run left nothing to do"
    (lacking.place / "closed").write_text("a1 192.0.9.200\n")
    assert lacking.run("--check").status == 0
    assert lacking.calls("peer_probe") == [], "a check applies nothing, so that there may be nothing to reach yet"


def test_a_run_of_one_cluster_leaves_the_others_alone(joined: Managed) -> None:
    alone = joined.run("--limit", ENTRY)
    assert alone.status == 0, alone.output
    assert joined.calls("node") == []
    assert "run" in joined.sequence


def test_it_leaves_with_everything_that_it_has(lacking: Managed) -> None:
    site, place = lacking, lacking.place
    site.leaves = True
    left = site.run()
    assert left.status == 0, left.output
    assert json.loads((place / "record").read_text())["clusters/m"]["state"] == "absent"
    assert site.sequence[-1] == "absent"
    (call,) = site.calls("kubernetes_install")
    assert (call["host"], call["install"]) == ("b1", {"estate": "e", "cluster": "m"})
    for host in HOSTS:
        spec = json.loads((place / "hosts" / host / "node.json").read_text())
        assert "m" not in [peer["name"] for peer in (spec["registrar"] or {"peers": []})["peers"]]


def test_what_a_forgotten_host_has_is_revoked_inside_by_the_same_run(lacking: Managed) -> None:
    def wanted() -> Any:
        return [one["wanted"] for one in lacking.calls("kubernetes_install") if one["phase"] == "pki"][-1]

    lost = lacking.run("-e", "isthmus_forget=host/a2", name="forget")
    assert lost.status == 0, lost.output
    assert "The authority of cluster m has revoked peer-m of a2." in said(lost)
    assert wanted()["revoked"] == {"hosts": ["a2"], "names": []}
    assert "a2" not in [one["host"] for one in wanted()["requests"]]
    assert "a2" not in [call["host"] for call in lacking.calls("pki_revoke")]
    # It stays so until the host is joined anew. A run that did not come to the cluster says what the next has to do.
    lacking.run("--limit", "all:!a2")
    assert wanted()["revoked"] == {"hosts": ["a2"], "names": []}
    issued = json.loads((lacking.place / "issued").read_text())
    del issued["revoked"]
    (lacking.place / "issued").write_text(json.dumps(issued))
    (lacking.place / "fail" / "kubernetes_install expose").touch()
    again = lacking.run("-e", "isthmus_forget=host/a2", name="forget")
    words = "the authority of cluster m, which is in it, has not revoked what a2 may hold of it"
    assert f"Pending: {words}: the run did not get that far on m-api." in said(again)


def test_teardown_takes_it_out(joined: Managed) -> None:
    done = joined.run("--check", "--limit", ENTRY, name="teardown")
    assert done.status == 0, done.output
    assert joined.sequence == ["absent (look)"]


def test_what_works_on_hosts_only_is_refused_in_words(joined: Managed) -> None:
    restored = joined.run("-e", "isthmus_restore=m", name="restore")
    assert restored.status != 0
    assert "the control plane of cluster m is in it" in said(restored)
    replaced = joined.run("-e", "isthmus_replace_authority=m", name="replace_authority")
    assert replaced.status != 0
    assert "the authority of cluster m is in it" in said(replaced)


def test_check_mode_of_a_new_one_changes_nothing(tmp_path: Path) -> None:
    site = Managed(tmp_path)
    checked = site.run("--check")
    assert checked.status == 0, checked.output
    assert all(call["check"] for call in site.calls("kubernetes_install"))
    assert not (tmp_path / "issued").exists()
