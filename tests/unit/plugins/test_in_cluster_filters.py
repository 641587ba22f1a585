# SPDX-License-Identifier: GPL-3.0-or-later
"""What `site` tells clusters whose control plane is in them of each other and of hosts."""

from __future__ import annotations

from typing import Any

from ansible_collections.isthmus.mesh.plugins.filter.etcd_hosts import etcd_hosts
from ansible_collections.isthmus.mesh.plugins.filter.in_cluster_given import in_cluster_given
from ansible_collections.isthmus.mesh.plugins.filter.in_cluster_wanted import in_cluster_wanted
from ansible_collections.isthmus.mesh.plugins.filter.mesh_hosts import mesh_hosts
from ansible_collections.isthmus.mesh.plugins.filter.run_batches import run_batches

EXPOSED = {"cluster_ip": "10.98.0.7", "addresses": ["198.18.6.200"], "names": ["etcd.example"]}
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
    found = in_cluster_wanted(install("m"), EXPOSED, [])
    assert {"localhost", "etcd.example", "isthmus-etcd-client.isthmus-system.svc"} <= set(found["dns"])
    assert found["ip"] == ["127.0.0.1", "10.98.0.7", "198.18.6.200"]


def test_etcd_hosts_are_signed_for_and_their_authorities_known_before_the_record_has_them() -> None:
    members = [host("a1", {"m": "a1 asks"}, {"a": "CA of a"}), host("a2", {"b": "not of m"})]
    found = in_cluster_wanted(install("m", "a", "c"), EXPOSED, members)
    assert found["requests"] == [{"cluster": "a", "host": "a1", "csr": "a1 asks"}]
    assert found["peers"] == {"a": "CA of a"}
    of_record = in_cluster_wanted(install("m", "a", trust={"a": "CA of a's record"}), EXPOSED, members)
    assert of_record["peers"] == {"a": "CA of a's record"}
    issued = {"signed": [{**found["requests"][0], "certificate": "for a1"}], "ca": "CA of m"}
    # A run in which nobody asks wants the same again.
    assert in_cluster_wanted(install("m", "a"), EXPOSED, [], issued)["requests"] == found["requests"]
    (given,) = in_cluster_given([*members, entry("m", **issued)], "a1")
    assert given["certificates"] == [{"name": "peer-m", "certificate": "for a1"}]
    assert in_cluster_given([*members, entry("m", **issued)], "a2") == []


def test_two_of_the_kind_sign_for_each_other() -> None:
    asked = {"ca": "CA of n", "requests": {"m": {"csr": "n asks m"}}, "signed": []}
    wanted = in_cluster_wanted(install("m", "n"), EXPOSED, [entry("m"), entry("n", **asked)], {"ca": "CA of m"})
    assert wanted["peers"] == {"n": "CA of n"}
    assert wanted["requests"] == [{"cluster": "n", "host": "n-api", "csr": "n asks m"}]
    signed = {"ca": "CA of m", "signed": [{**wanted["requests"][0], "certificate": "m signed"}]}
    following = in_cluster_wanted(install("n", "m"), EXPOSED, [entry("m", **signed), entry("n", **asked)], asked)
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
