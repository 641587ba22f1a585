# SPDX-License-Identifier: GPL-3.0-or-later
"""What `site` tells clusters whose control plane is in them of each other and of hosts."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.filter.etcd_hosts import etcd_hosts
from ansible_collections.isthmus.mesh.plugins.filter.in_cluster_dials import in_cluster_dials
from ansible_collections.isthmus.mesh.plugins.filter.in_cluster_given import in_cluster_given
from ansible_collections.isthmus.mesh.plugins.filter.in_cluster_wanted import in_cluster_wanted
from ansible_collections.isthmus.mesh.plugins.filter.mesh_hosts import mesh_hosts
from ansible_collections.isthmus.mesh.plugins.filter.run_batches import run_batches
from ansible_collections.isthmus.mesh.plugins.filter.run_outcome import run_outcome

EXPOSED = {"cluster_ip": "10.98.0.7", "addresses": ["198.18.6.200"], "names": ["etcd.example"]}
RECORD = {
    "clusters/a": {"state": "present", "hosts": {"a1": {}, "a2": {}}},
    "clusters/n": {"state": "present", "hosts": {}, "control_plane": "in_cluster"},
    "clusters/gone": {"state": "absent"},
}
NOBODY = ["!all"]


def install(cluster: str, *peers: str, trust: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "estate": "lab",
        "cluster": cluster,
        "etcd": {"replicas": 1},
        "trust": trust or {},
        "document": {"registrar": {"peers": [{"name": peer} for peer in peers]}},
    }


def entry(cluster: str, **issued: Any) -> dict[str, Any]:
    return {"inventory_hostname": f"{cluster}-api", "isthmus_cluster": cluster, "__site_issued": issued}


def host(name: str, asks: dict[str, str] | None = None, signed: dict[str, str] | None = None) -> dict[str, Any]:
    pending = [
        {"ca_cluster": cluster, "requests": [{"name": f"peer-{cluster}", "csr": csr}]}
        for cluster, csr in (asks or {}).items()
    ]
    results = [
        {"cluster": cluster, "ca_certificate": pem, "certificates": []} for cluster, pem in (signed or {}).items()
    ]
    variables = {"inventory_hostname": name, "isthmus_cluster": name[:-1]}
    return {**variables, "__pki_requested": {"pending": pending}, "__pki_signed": {"results": results}}


def test_the_certificate_has_every_name_by_which_its_etcd_is_dialled() -> None:
    found = in_cluster_wanted(install("m"), EXPOSED, RECORD, [])
    assert {"localhost", "etcd.example", "isthmus-etcd-client.isthmus-system.svc"} <= set(found["dns"])
    assert found["ip"] == ["127.0.0.1", "10.98.0.7", "198.18.6.200"]


def test_etcd_hosts_are_signed_for_and_their_authorities_known_before_the_record_has_them() -> None:
    members = [host("a1", {"m": "a1 asks"}, {"a": "CA of a"}), host("a2", {"b": "not of m"})]
    found = in_cluster_wanted(install("m", "a", "c"), EXPOSED, RECORD, members)
    assert found["requests"] == [{"cluster": "a", "host": "a1", "csr": "a1 asks"}]
    assert found["peers"] == {"a": "CA of a"}
    of_record = in_cluster_wanted(install("m", "a", trust={"a": "CA of a's record"}), EXPOSED, RECORD, members)
    assert of_record["peers"] == {"a": "CA of a's record"}
    issued = {"signed": [{**found["requests"][0], "certificate": "for a1"}], "ca": "CA of m"}
    # A run in which nobody asks wants the same again.
    assert in_cluster_wanted(install("m", "a"), EXPOSED, RECORD, [], issued)["requests"] == found["requests"]
    (given,) = in_cluster_given([*members, entry("m", **issued)], "a1")
    assert given["certificates"] == [{"name": "peer-m", "certificate": "for a1"}]
    assert in_cluster_given([*members, entry("m", **issued)], "a2") == []


def test_who_left_is_not_signed_for_anew() -> None:
    places = [("a", "a1"), ("a", "forgotten"), ("gone", "g1"), ("unknown", "u1"), ("n", "n-api")]
    issued = {"signed": [{"cluster": one, "host": host, "csr": host, "certificate": ""} for one, host in places]}
    found = in_cluster_wanted(install("m", "a"), EXPOSED, RECORD, [], issued)["requests"]
    assert [one["host"] for one in found] == ["a1", "n-api"]


def test_what_forgotten_hosts_have_is_to_be_revoked() -> None:
    doomed = {"hosts": ["a2"], "names": ["remote-gone"]}
    assert in_cluster_wanted({**install("m"), "revoked": doomed}, EXPOSED, RECORD, [])["revoked"] == doomed
    assert "revoked" not in in_cluster_wanted(install("m"), EXPOSED, RECORD, []), "a mesh without asks as before"


def test_two_of_the_kind_sign_for_each_other() -> None:
    asked = {"ca": "CA of n", "requests": {"m": {"csr": "n asks m"}}, "signed": []}
    wanted = in_cluster_wanted(install("m", "n"), EXPOSED, RECORD, [entry("m"), entry("n", **asked)], {"ca": "CA of m"})
    assert wanted["peers"] == {"n": "CA of n"}
    assert wanted["requests"] == [{"cluster": "n", "host": "n-api", "csr": "n asks m"}]
    signed = {"ca": "CA of m", "signed": [{**wanted["requests"][0], "certificate": "m signed"}]}
    following = in_cluster_wanted(
        install("n", "m"), EXPOSED, RECORD, [entry("m", **signed), entry("n", **asked)], asked
    )
    assert following["certificates"] == {"m": "m signed"}


def planned(ca: str | None, *, formed: bool) -> list[dict[str, Any]]:
    specs = {
        "a1": {"cluster": {"name": "a"}, "member": {"name": "a1"}},
        "a2": {"cluster": {"name": "a"}, "member": None},
    }
    plan = {
        "specs": specs,
        "clusters": {"new": [], "answering": ["a"]},
        "serial": [1, "100%"],
        "steps": [],
        "trials": [[], [], [], []],
        "in_cluster": {"m": {"entry": "m-api"}},
        "record": {"clusters/m": {"ca_certificate": ca}},
    }
    members = [*(host(name) for name in specs), entry("m")]
    for one in members:
        one.update(__plan_result=plan, group_names=[])
    members[-1].update({"__site_formed": True} if formed else {})
    return members


def test_who_reads_a_cluster_and_who_hears_of_its_authority() -> None:
    found = run_batches(planned("CA of m", formed=True))
    assert (found["in_cluster"], found["readers"], found["formed"]) == (["m-api"], ["a1"], False)
    assert sorted(found["one_by_one"]) == ["a1", "a2"]
    new = run_batches(planned(None, formed=True))
    assert (new["readers"], new["formed"]) == (["a1", "a2"], True)
    # Of a check, and of a run that failed there, the record stays as it is.
    assert run_batches(planned(None, formed=False))["readers"] == ["a1"]
    later = run_batches(planned(None, formed=True), step=1)
    assert (later["in_cluster"], later["readers"]) == (NOBODY, NOBODY)


def test_hosts_that_stand_for_pods() -> None:
    clusters = {
        "a": {"etcd": {"hosts": ["a1"]}},
        "m": {"control_plane": "in_cluster", "etcd": {"hosts": ["m-api"]}},
        "broken": "text",
    }
    assert etcd_hosts({"clusters": clusters}, ["a1", "m-api"], pods=True) == [{"cluster": "m", "host": "m-api"}]
    assert len(etcd_hosts({"clusters": clusters}, ["a1", "m-api"])) == 2


def test_nodes_that_only_kubernetes_knows_are_to_be_reached_too() -> None:
    specs = {"a1": {"cluster": {"name": "a"}, "node": {"mesh4": "10.101.0.1"}}}
    records = [{"cluster": "a", "documents": {}}, {"cluster": "m", "nodes": {"worker-1": "10.106.0.1"}}]
    assert mesh_hosts(specs, records=records) == [
        {"name": "a1", "cluster": "a", "mesh4": "10.101.0.1"},
        {"name": "worker-1", "cluster": "m", "mesh4": "10.106.0.1"},
    ]


def joined(answer: dict[str, Any] | None = None, *, to_sign: bool = True) -> dict[str, Any]:
    """What a run knows of cluster `m` in its end, whose registrars read `a` on hosts and `n`, which is as itself; and
    what the authority of `a` answered."""
    plan = {
        "in_cluster": {"m": {"entry": "m-api", **install("m", "a", "n")}, "n": {"entry": "n-api", **install("n", "m")}},
        "record": {"clusters/a": {"ca_host": "a1"}, "clusters/n": {"ca_host": ""}},
        "revocations": [],
        "steps": [],
    }
    requests = {"a": {"csr": "m asks a", "reason": "there is none yet"}} if to_sign else {}
    issued = {"ca": "CA of m", "requests": requests, "certificates": {"n": "n signed"}, "signed": []}
    found = {**entry("m", **issued), "__plan_result": plan}
    if not to_sign:
        issued["certificates"]["a"] = "a signed"
    if answer is not None:
        found["__site_signed"] = {"results": [{"site_peer": {"key": "a"}, **answer}]}
    return found


def test_a_cluster_that_lacks_nothing_has_nothing_pending() -> None:
    found = run_outcome([joined({"certificates": [{}]}, to_sign=False)])
    assert (found["pending"], found["refused"], found["waiting"]) == ([], {}, {})


@pytest.mark.parametrize(
    ("answer", "line", "refused", "waiting"),
    [
        (
            {"failed": False, "msg": "the private key is missing.\n"},
            "Pending: the registrars in cluster m have no new certificate for the etcd of cluster a, whose authority "
            "signed nothing (a1: the private key is missing).",
            {"m-api": "the authority of cluster a signed nothing (a1: the private key is missing)"},
            {},
        ),
        (
            {"unreachable": True, "msg": "no route"},
            "Pending: m-api could not be finished without the authority of cluster a: a1 could not be entered.",
            {},
            {"m-api": ["a1"]},
        ),
        (
            {"certificates": [{"name": "peer-a", "certificate": "of another key"}]},
            "Pending: the registrars in cluster m have no new certificate for the etcd of cluster a, whose authority "
            "signed one that cannot be installed: there is none yet.",
            {"m-api": "the authority of cluster a signed one that cannot be installed: there is none yet"},
            {},
        ),
        (
            None,
            "Pending: the registrars in cluster m have no new certificate for the etcd of cluster a, whose authority "
            "is not known yet.",
            {},
            {},
        ),
    ],
    ids=["it refuses", "it is silent", "it signs for another key", "it is not there"],
)
def test_another_authority_that_does_not_sign_is_named(
    answer: dict[str, Any] | None, line: str, refused: dict[str, str], waiting: dict[str, list[str]]
) -> None:
    found = run_outcome([joined(answer)])
    assert found["pending"][:-1] == [line]
    assert (found["refused"], found["waiting"]) == (refused, waiting)
    assert run_outcome([joined(answer)], failed=["m-api"])["pending"] == [], "what failed is told as that"
    assert run_outcome([joined(answer)], stopped=False)["refused"] == {}, "in check mode nobody signs"


def test_an_authority_in_another_cluster_that_has_no_turn_is_named() -> None:
    asks = joined()
    asks["__site_issued"].update(requests={"n": {"csr": "m asks n", "reason": "old"}}, certificates={"a": "", "n": ""})
    words = (
        "Pending: the registrars in cluster m have no new certificate for the etcd of cluster n, whose authority "
        "signed nothing (it is in the cluster, and {}).".format
    )
    assert run_outcome([asks])["pending"][0] == words("n-api is not in this run")
    other = {"inventory_hostname": "n-api", "isthmus_cluster": "n"}
    assert words("the run did not get that far on n-api") in run_outcome([asks, other], gone=["n-api"])["pending"]


def test_hosts_that_a_cluster_does_not_sign_for_are_named() -> None:
    def asking(csr: str) -> dict[str, Any]:
        group = {"ca_cluster": "m", "ca_host": "", "requests": [{"name": "peer-m", "csr": csr}]}
        return {**host("a1"), "__plan_result": joined()["__plan_result"], "__pki_requested": {"pending": [group]}}

    inside = joined({"certificates": [{}]}, to_sign=False)
    inside["__site_issued"]["signed"] = [{"cluster": "a", "host": "a1", "csr": "a1 asks", "certificate": "for a1"}]
    assert run_outcome([asking("a1 asks"), inside])["pending"] == []
    line = (
        "Pending: the registrars on a1 have no new certificate for the etcd of cluster m, whose authority "
        "signed nothing (it is in the cluster, and {}).".format
    )
    assert run_outcome([asking("anew"), inside])["pending"][0] == line("the run did not get that far on m-api")
    assert run_outcome([asking("anew")])["pending"][0] == line("m-api is not in this run")
    assert run_outcome([asking("anew")], stopped=False)["pending"] == []


def test_who_reads_a_cluster_dials_its_etcd_once_that_runs() -> None:
    reads = {"m": ["https://198.18.6.11:30379", "https://198.18.6.12:30379"], "n": ["https://etcd.example:2379"]}
    peers = [{"name": name, "endpoints": endpoints} for name, endpoints in reads.items()]
    spec = {"registrar": {"peers": [*peers, {"name": "a", "endpoints": ["https://198.18.1.11:2379"]}]}}
    members = [host("b1"), {**entry("m", ca="CA of m"), "__site_formed": True}, entry("n", ca="CA of n")]
    (found,) = in_cluster_dials(members, spec)
    assert found["cluster"] == "m"
    assert [(one["address"], one["port"]) for one in found["targets"]] == [
        ("198.18.6.11", 30379),
        ("198.18.6.12", 30379),
    ]
    common = {"host": "m-api", "protocol": "tcp", "answers": "etcd", "authority": "CA of m", "one_is_enough": True}
    assert all(common.items() <= one.items() for one in found["targets"])
    members[-1]["__site_formed"] = True
    named = in_cluster_dials(members, spec)[1]["targets"][0]
    assert (named["address"], named["port"]) == ("etcd.example", 2379)
    assert in_cluster_dials(members, {"registrar": None}) == []


def test_what_exposes_a_cluster_and_does_not_answer_is_named_with_both_ends() -> None:
    def dialled(name: str, source: str, *hows: str) -> dict[str, Any]:
        blocked = [
            {"host": "m-api", "address": f"198.18.6.1{number}", "protocol": "tcp", "port": 2379, "how": how}
            | {"source": source}
            for number, how in enumerate(hows)
        ]
        results = [{"site_dialled": {"cluster": "m", "targets": []}, "blocked": blocked}]
        return {**host(name), "__plan_result": joined()["__plan_result"], "__site_reached": {"results": results}}

    silent = "no answer within 3 s"
    members = [dialled("a1", "198.18.1.11", silent), dialled("b1", "198.18.2.11", silent), dialled("c1", "198.18.3.11")]
    found = run_outcome(members)
    where = "the etcd of cluster m: TCP 2379 of 198.18.6.10 (no answer within 3 s)"
    assert found["pending"][0].startswith(
        f"Pending: a1 (198.18.1.11), b1 (198.18.2.11) does not reach {where}. Let these hosts in there: "
    )
    assert found["unreached"] == {"a1": where, "b1": where}
    other = run_outcome([dialled("a1", "198.18.1.11", "another mesh's etcd, or no etcd, answers there: why")])
    assert "See what has that address, and correct isthmus_estate.clusters.m.expose" in other["pending"][0]
    assert run_outcome([dialled("a1", "198.18.1.11")])["unreached"] == {}


def test_a_cluster_that_could_not_be_exposed_is_told_with_the_reason() -> None:
    one = {
        "inventory_hostname": "m-api",
        "isthmus_cluster": "m",
        "__in_cluster_result": {"failed": True, "msg": "Kubernetes of cluster m: it does not answer."},
    }
    found = run_outcome([one], gone=["m-api"])
    assert found["pending"][0] == (
        "Pending: cluster m could not be done (m-api): Kubernetes of cluster m: it does not answer."
    )
    assert found["silent"] == []
    assert run_outcome([{**one, "__in_cluster_result": {"unreachable": True}}], gone=["m-api"])["silent"] == ["m-api"]
