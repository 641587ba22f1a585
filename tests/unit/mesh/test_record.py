# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from isthmus_mesh.planner import plan
from isthmus_mesh.record import Record, RecordError, format_time, merge, parse_time
from unit.mesh.estates import NOW, VERSION, hosts, model, planned


def documents() -> dict[str, Any]:
    return copy.deepcopy(dict(planned(model()).record))


def test_a_record_survives_its_documents() -> None:
    record = merge([documents()])
    assert record.to_documents() == documents()
    assert merge([record.to_documents()]) == record
    assert merge([]) == Record()


def test_the_highest_revision_of_each_document_counts_wherever_it_comes_from() -> None:
    newer, older = documents(), documents()
    newer["clusters/cloud"].update(revision=5, ca_host="newer")
    older["clusters/onprem"].update(revision=4, ca_host="newer-too")
    for copies in ([newer, older], [older, newer]):
        record = merge(copies)
        assert record.clusters["cloud"]["ca_host"] == "newer"
        assert record.clusters["onprem"]["ca_host"] == "newer-too"
        assert record.warnings == ()


def test_of_two_with_one_revision_the_clusters_own_counts_and_it_is_said() -> None:
    own, other = documents(), documents()
    own["clusters/cloud"]["ca_host"] = "own"
    other["clusters/cloud"]["ca_host"] = "zzz"
    copies = [{"cluster": "cloud", "documents": own}, {"cluster": "onprem", "documents": other}]
    for order in (copies, copies[::-1]):
        record = merge(order)
        assert record.clusters["cloud"]["ca_host"] == "own"
        (warning,) = record.warnings
        assert warning.startswith("estate record clusters/cloud: two different documents have revision 1")
        assert warning in planned_warnings(record)


def test_two_with_one_revision_end_with_a_higher_one() -> None:
    """Etcd refuses another content under the same revision, so neither could be written where the other is."""
    own, other = documents(), documents()
    for name in ("clusters/cloud", "roster"):
        other[name] = {**other[name], "by": "another"}
    found = merge([{"cluster": "cloud", "documents": own}, {"cluster": "onprem", "documents": other}])
    assert found.conflicts == {"clusters/cloud", "roster"}
    later = plan(model(), found, NOW + timedelta(hours=1), VERSION, by="bob")
    assert {name: document["revision"] for name, document in later.record.items()} == {
        "clusters/cloud": 2,
        "clusters/onprem": 1,
        "roster": 2,
    }
    assert later.record["clusters/cloud"]["last_applied"]["by"] == later.record["roster"]["by"] == "bob"
    assert later.changes == ()
    for mixed in ([own, later.record], [later.record, other]):
        settled = merge([dict(one) for one in mixed])
        assert settled.conflicts == frozenset()
        assert plan(model(), settled, NOW + timedelta(hours=2), VERSION).record == later.record


def test_a_ca_certificate_that_one_copy_has_completes_the_others() -> None:
    without, having = documents(), documents()
    having["clusters/cloud"]["ca_certificate"] = "PEM"
    for copies in ([without, having], [having, without], [{"cluster": "cloud", "documents": without}, having]):
        record = merge(copies)
        assert record.clusters["cloud"] == having["clusters/cloud"]
        assert record.warnings == ()


def test_two_ca_certificates_are_said() -> None:
    one, other = documents(), documents()
    one["clusters/cloud"]["ca_certificate"] = "PEM 1"
    other["clusters/cloud"]["ca_certificate"] = "PEM 2"
    record = merge([{"cluster": "cloud", "documents": one}, other])
    assert record.clusters["cloud"]["ca_certificate"] == "PEM 1"
    assert record.warnings == (
        "estate record clusters/cloud: copies of revision 1 hold different CA certificates; compare them with "
        "/etc/isthmus/pki/ca.crt on the cluster's CA host",
    )


def pem(name: str) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n"


MOVES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "range": (
        lambda doc: doc["hosts"]["c1"].update(range4="10.102.7.0/28"),
        "10.102.0.0/28, the range of host c1, would be 10.102.7.0/28",
    ),
    "mesh address": (lambda doc: doc["hosts"]["c1"].update(mesh4="10.102.0.9"), "10.102.0.1, the address of host c1,"),
    "workload": (
        lambda doc: doc["hosts"]["c1"]["workloads"]["shop/web"].update(address4="10.102.0.9"),
        "10.102.0.2, the address of workload shop/web on c1, would be 10.102.0.9",
    ),
    "authority": (lambda doc: doc.update(ca_certificate=pem("other")), "its CA's certificate would be another"),
    "id": (lambda doc: doc.update(id=77), "id 2 would be 77"),
}


@pytest.mark.parametrize("what", MOVES)
def test_another_clusters_etcd_cannot_move_what_the_own_one_knows(what: str) -> None:
    change, words = MOVES[what]
    own = documents()
    own["clusters/cloud"]["ca_certificate"] = pem("first")
    forged = copy.deepcopy(own)
    forged["clusters/cloud"]["revision"] = 2**60
    change(forged["clusters/cloud"])
    copies = [{"cluster": "cloud", "documents": own}, {"cluster": "onprem", "documents": forged}]
    for order in (copies, copies[::-1]):
        with pytest.raises(RecordError, match="the copy in the etcd of cluster onprem") as caught:
            merge(order)
        assert words in str(caught.value)
        assert "-e isthmus_distrust=onprem plans" in str(caught.value)
    # Without what that etcd says; and its own document is its own.
    assert merge(copies[:1]).clusters["cloud"] == own["clusters/cloud"]
    assert merge([{"cluster": "cloud", "documents": forged}, {"cluster": "onprem", "documents": own}]).clusters["cloud"]


def test_a_newer_copy_elsewhere_counts_when_the_own_etcd_was_away() -> None:
    """A run while a site was cut off: hosts joined and left, a range grew."""
    own = documents()
    newer = copy.deepcopy(own)
    document = newer["clusters/onprem"]
    own["clusters/onprem"]["ca_certificate"] = pem("first") + pem("second")  # it was being replaced
    document.update(revision=2, ca_certificate=pem("second"))
    document["hosts"]["o9"] = {**document["hosts"]["o1"], "range4": "10.101.9.0/28", "mesh4": "10.101.9.1"}
    document["hosts"]["o1"]["range4"] = "10.101.0.0/27"
    document["etcd"]["members"].remove("o3")
    del document["hosts"]["o3"]
    found = merge([{"cluster": "onprem", "documents": own}, {"cluster": "cloud", "documents": newer}])
    assert found.clusters["onprem"] == document


def test_hosts_that_only_an_older_copy_of_the_own_etcd_has_do_not_vanish_without_a_word() -> None:
    """A run that could not write elsewhere gave the cluster a host, others could not ask its etcd and went on."""
    added = planned(model(the_hosts={**hosts(), "c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}}))
    newer = documents()
    own = {**newer, "clusters/cloud": added.record["clusters/cloud"]}
    newer["clusters/cloud"]["revision"] = 3
    copies = [{"cluster": "cloud", "documents": own}, {"cluster": "onprem", "documents": newer}]
    for order in (copies, copies[::-1]):
        record = merge(order)
        assert "c2" not in record.clusters["cloud"]["hosts"]
        (warning,) = record.warnings
        assert warning.startswith(
            "estate record clusters/cloud: the cluster's own etcd has c2, which the newer copy that counts (revision "
            "3) has neither as a part of the cluster nor as removed in the last 30 days."
        )
        assert warning in planned_warnings(record)
    newer["clusters/cloud"]["released"] = [{"address": "10.102.0.16/28", "owner": "c2", "at": "2026-01-02T03:04:05Z"}]
    assert merge(copies).warnings == (), "a run removed it that could not write to that etcd"
    assert merge([own, newer]).warnings == (), "copies on hosts are old when these were away"


def test_an_older_copy_completes_it_too_but_only_of_the_same_etcd() -> None:
    newer, older = documents(), documents()
    newer["clusters/cloud"].update(revision=2)
    older["clusters/cloud"].update(ca_certificate="PEM")
    assert merge([older, newer]).clusters["cloud"] == {**newer["clusters/cloud"], "ca_certificate": "PEM"}
    newer["clusters/cloud"]["etcd"]["token"] = "isthmus-lab-cloud-7"  # noqa: S105
    assert merge([older, newer]).clusters["cloud"]["ca_certificate"] is None


def planned_warnings(record: Record) -> tuple[str, ...]:
    fixed = {name: {**doc, "ca_host": doc["etcd"]["initial"]} for name, doc in record.clusters.items()}
    return plan(model(), Record(record.roster, fixed, record.warnings), NOW, VERSION).warnings


def test_a_missing_cluster_document_is_refused() -> None:
    found = documents()
    del found["clusters/cloud"]
    with pytest.raises(RecordError) as caught:
        merge([found])
    assert str(caught.value) == (
        "estate record: the roster names cloud, but no copy of clusters/cloud was found. Without it addresses would be "
        "dealt twice. Next: make a member of that cluster, or a host with /etc/isthmus/estate.json, reachable and run "
        "again"
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda d: d["roster"].update(schema=2),
            "record 1 (roster): its schema 2 is newer than 1, the newest that is known here; a newer isthmus.mesh has "
            "been used on this estate. Next: `ansible-galaxy collection install isthmus.mesh:==1.0.0` "
            "on the controller, and run the playbook again",
        ),
        (
            lambda d: (d["roster"].pop("version"), d["clusters/cloud"].update(schema=2)),
            "record 1 (clusters/cloud): its schema 2 is newer than 1, the newest that is known here; a newer "
            "isthmus.mesh has been used on this estate. Next: `ansible-galaxy collection install "
            "isthmus.mesh --upgrade` on the controller, and run the playbook again",
        ),
        (
            lambda d: d["roster"].update(version="1.0.0 && echo"),
            "record 1 (roster).version is not a version such as 1.2.3",
        ),
        (lambda d: d["roster"].update(schema=0), "record 1 (roster).schema is not a known schema"),
        (lambda d: d["roster"].pop("revision"), "record 1 (roster).revision is missing"),
        (lambda d: d["roster"].update(clusters=[]), "record 1 (roster).clusters is not an object"),
        (lambda d: d.update({"clusters/x": d["clusters/cloud"]}), "the document is not the one that its name says"),
        (
            lambda d: d.update(other={"schema": 1, "revision": 1}),
            "record 1 (other): the document is not the one that its name says",
        ),
        (lambda d: d.update({"clusters/cloud": "x"}), "record 1 (clusters/cloud) is not an object"),
        (
            lambda d: d["clusters/cloud"]["hosts"]["c1"].update(range4="x"),
            "record 1 (clusters/cloud).hosts.c1.range4 is not an IPv4 network",
        ),
        (
            lambda d: d["clusters/cloud"]["hosts"]["c1"]["workloads"]["shop/web"].pop("address4"),
            "record 1 (clusters/cloud).hosts.c1.workloads.shop/web.address4 is missing",
        ),
        (
            lambda d: d["clusters/cloud"].update(released=[{"address": "10.0.0.0/28", "at": "yesterday"}]),
            "record 1 (clusters/cloud).released[0].at is not a time like 2026-01-02T03:04:05Z",
        ),
    ],
)
def test_a_record_that_must_not_be_built_on(edit: Callable[[dict[str, Any]], object], message: str) -> None:
    found = documents()
    edit(found)
    with pytest.raises(RecordError) as caught:
        merge([found])
    assert message in str(caught.value)


def test_times() -> None:
    there = timezone(timedelta(hours=2))
    when = datetime(2026, 1, 2, 5, 4, 5, tzinfo=there)
    assert format_time(when) == "2026-01-02T03:04:05Z"
    assert parse_time(format_time(when)) == when


def nested(levels: int) -> list[Any]:
    return [nested(levels - 1)] if levels else []


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("roster", "clusters"), None, r"clusters is missing"),
        (("roster", "services"), None, r"services is missing"),
        (("clusters/cloud", "workload_ranges"), None, r"workload_ranges is missing"),
        (("clusters/cloud", "released"), None, r"released is missing"),
        (("clusters/cloud", "state"), "gone", r"state is not present or absent"),
        (("clusters/cloud", "ca_certificate"), ["PEM"], r"ca_certificate is not a string"),
        (("clusters/cloud", "etcd", "source"), None, r"source is not an object"),
        (("clusters/cloud", "etcd", "quota_bytes"), None, r"quota_bytes is missing"),
        (("clusters/cloud", "etcd", "members"), ["c9"], r"members names a host that the document lacks"),
        (("clusters/cloud", "hosts", "c1", "labels"), None, r"labels is missing"),
        (("clusters/cloud", "hosts", "c1", "workloads", "shop/web", "cgroup"), {}, r"cgroup is not one of"),
        (("clusters/cloud", "hosts", "c1", "workloads", "shop/web", "service_account"), None, r"is missing"),
        (("clusters/cloud", "more"), nested(50), r"nested too deeply"),
        (("clusters/cloud", "more"), float("inf"), r"a number that JSON cannot say"),
    ],
)
def test_what_the_planner_reads_must_be_there(where: tuple[str, ...], value: Any, reason: str) -> None:
    """A copy is read from every cluster's etcd; one that is damaged is named and never a traceback."""
    damaged = documents()
    place = damaged
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    with pytest.raises(RecordError, match=reason):
        merge([documents(), damaged])
