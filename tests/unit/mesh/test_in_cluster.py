# SPDX-License-Identifier: GPL-3.0-or-later
"""Clusters whose control plane is in them: inventory, record, what is installed, and what others know of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from isthmus_mesh.forgetting import Forget
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import Record, RecordError, merge
from isthmus_mesh.spec import ClusterDocument, HostSpec, NodeSpec, SpecError, is_cluster_document, spec_hash
from unit.mesh.estates import NOW, VERSION, estate, hosts, model

Edit = Callable[[dict[str, Any], dict[str, Any]], object]

EXPOSED = {
    "managed": {
        "endpoints": ["https://198.18.6.200:2379"],
        "cluster_ip": "10.98.0.7",
        "names": [],
        "addresses": ["198.18.6.200"],
        "nodes": [],
    }
}


def with_managed() -> tuple[dict[str, Any], dict[str, Any]]:
    the_estate, the_hosts = estate(), hosts()
    the_estate["clusters"]["managed"] = {
        "id": 6,
        "control_plane": "in_cluster",
        "workload_ranges": ["10.106.0.0/16"],
        "service_range": "10.116.0.0/16",
        "kubernetes": {"pod_ranges": ["10.246.0.0/16"], "service_range": "10.98.0.0/16"},
        "etcd": {"hosts": ["managed-api"]},
        "expose": {"provider": "aws"},
    }
    the_hosts["managed-api"] = {"isthmus_cluster": "managed", "ansible_host": "localhost"}
    return the_estate, the_hosts


def nothing(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
    """No edit."""


def replanned(
    edit: Edit = nothing,
    previous: Plan | None = None,
    exposed: dict[str, Any] | None = None,
    prune: tuple[str, ...] = (),
) -> Plan:
    the_estate, the_hosts = with_managed()
    edit(the_estate, the_hosts)
    record = merge([copy.deepcopy(dict(previous.record))]) if previous is not None else Record()
    return plan(model(the_estate, the_hosts), record, NOW, VERSION, "alice", prune, exposed=exposed or {})


def refused(edit: Edit, **more: Any) -> str:
    with pytest.raises(ModelError) as caught:
        replanned(edit, **more)
    return str(caught.value)


def of(the_estate: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = the_estate["clusters"]["managed"]
    return found


def test_its_host_is_no_machine_of_the_mesh() -> None:
    found = replanned()
    assert "managed-api" not in found.specs
    assert found.in_cluster["managed"]["entry"] == "managed-api"
    document = found.record["clusters/managed"]
    assert (document["control_plane"], document["hosts"], document["ca_host"]) == ("in_cluster", {}, "")
    assert document["etcd"]["members"] == []
    assert document["kubernetes"]["api_server"] == "https://kubernetes.default.svc"
    assert "CA in the cluster" in found.after


def test_what_is_installed() -> None:
    found = replanned(exposed=EXPOSED).in_cluster["managed"]
    assert found["etcd"] == {
        "replicas": 3,
        "storage_class": None,
        "storage": "8Gi",
        "quota_bytes": 2 * 1024**3,
        "token": "isthmus-lab-managed",
    }
    assert (found["expose"]["type"], found["expose"]["scope"], found["expose"]["provider"]) == (
        "load_balancer",
        "internal",
        "aws",
    )
    document = found["document"]
    assert document["etcd"]["endpoints"] == ["https://10.98.0.7:2379"]
    assert document["cluster"]["kubernetes"] == {"pod_ranges4": ["10.246.0.0/16"], "service_range4": "10.98.0.0/16"}
    assert "10.98.0.0/16" not in document["service_ranges4"]  # its nodes have kube-proxy
    assert "10.246.0.0/16" not in document["mesh_ranges4"]
    assert [peer["name"] for peer in document["registrar"]["peers"]] == ["cloud", "onprem"]
    assert document["registrar"]["kubernetes"]["token"].endswith("/token")
    assert document["hash"] == spec_hash(document)


def wireguard(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
    the_estate["encryption"] = "wireguard"


def plain(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
    """The pairs of its site are not encrypted, all others are."""
    wireguard(the_estate, the_hosts)
    sites = sorted({*(cluster.get("site", name) for name, cluster in the_estate["clusters"].items()), "edge"})
    the_estate["sites"] = {site: {} for site in sites}
    the_estate["site_pairs"] = [{"sites": ["managed", site], "encryption": "none"} for site in sites]


def test_its_nodes_have_no_keys_of_wireguard() -> None:
    words = refused(wireguard)
    assert "isthmus_estate.clusters.managed.site" in words
    assert "within managed" in words
    assert "encryption: none" in words
    found = replanned(plain, exposed=EXPOSED)
    assert "wireguard" not in found.in_cluster["managed"]["document"]
    assert "managed" in found.specs["c1"]["wireguard"]["plain_sites"]


def test_its_nodes_take_nothing_natively() -> None:
    def native(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_estate["routing"] = "hybrid"

    words = refused(native)
    assert "traffic of site managed goes natively (within managed)" in words
    assert "routing: tunnel" in words


def test_its_nodes_are_not_led_to_gateways() -> None:
    def through_gateways(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        pair = {"sites": ["cloud", "onprem"], "encryption": "ipsec-gateway"}
        the_estate.update(site_pairs=[pair], sites={
            "cloud": {"ipsec": {"networks": ["198.18.2.0/24"], "gateways": [{"host": "c1"}]}},
            "onprem": {"ipsec": {"networks": ["198.18.1.0/24"], "gateways": [{"host": "o1"}]}},
            "managed": {},
        })  # fmt: skip

    def beside(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        through_gateways(the_estate, the_hosts)
        the_estate["clusters"]["managed"]["site"] = "cloud"

    words = refused(beside)
    assert "traffic of site cloud goes through gateways (cloud and onprem)" in words
    assert "encryption: none" in words
    assert "ipsec" not in replanned(through_gateways).in_cluster["managed"]["document"]


def test_it_does_not_join_where_encryption_is_only_being_turned_off() -> None:
    def without(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        wireguard(the_estate, the_hosts)
        del the_estate["clusters"]["managed"], the_hosts["managed-api"]

    def beside(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_estate["clusters"]["managed"]["site"] = "cloud"

    words = refused(beside, previous=replanned(without))
    assert "run isthmus.mesh.site without the cluster until encryption is turned off" in words


def test_the_matrix_of_sites_has_its_nodes() -> None:
    rows = {tuple(row["sites"]): row for row in replanned(exposed=EXPOSED).sites}
    opened = [(one["port"], one["on"], one["from"]) for one in rows["cloud", "managed"]["open"]]
    assert (8472, "every host of cloud and managed", "each other") in opened
    assert (2379, "198.18.6.200 (etcd of managed)", "etcd hosts of cloud") in opened
    assert any(
        port == 2379 and to.endswith("(etcd of cloud)") and who == "nodes of managed" for port, to, who in opened
    )
    assert ("managed", "managed") in rows


def test_vpcs_do_not_know_its_nodes() -> None:
    def edit(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        sites = {cluster.get("site", name) for name, cluster in the_estate["clusters"].items()} | {"edge"}
        the_estate["sites"] = {site: {} for site in sorted(sites)}
        vpc = {"provider": "aws", "network": "vpc-1", "region": "x", "manage": ["routes", "firewall"]}
        the_estate["sites"]["cloud"] = {"vpc": {**vpc, "gateways": [{"gateway": "tgw-1", "sites": ["managed"]}]}}

    found = replanned(edit, exposed=EXPOSED)
    assert any("cluster managed" in words and "VPC" in words for words in found.warnings)
    (call,) = found.vpcs.calls
    behind = {one["destination"] for one in call["routes"] if one.get("gateway") == "tgw-1"}
    assert behind == {"10.106.0.0/16", "10.246.0.0/16"}


def test_others_learn_of_it_when_it_can_be_dialled() -> None:
    first = replanned()
    assert [peer["name"] for peer in first.specs["c1"]["registrar"]["peers"]] == ["onprem"]
    assert "10.246.0.0/16" in first.specs["c1"]["mesh_ranges4"]
    second = replanned(previous=first, exposed=EXPOSED)
    (peer,) = [peer for peer in second.specs["c1"]["registrar"]["peers"] if peer["name"] == "managed"]
    assert peer["endpoints"] == ["https://198.18.6.200:2379"]
    assert peer["workload_ranges4"] == ["10.106.0.0/16", "10.246.0.0/16"]
    assert "managed" in second.specs["c1"]["pki"]["trust"]
    assert second.record["clusters/managed"]["revision"] == 2
    third = replanned(previous=second)  # a run that did not ask again
    assert third.record["clusters/managed"] == second.record["clusters/managed"]


def test_trust_is_what_is_known_of_itself_and_its_peers() -> None:
    found = replanned(exposed=EXPOSED)
    documents = copy.deepcopy(dict(found.record))
    documents["clusters/cloud"]["ca_certificate"] = "PEM"
    again = plan(model(*with_managed()), merge([documents]), NOW, VERSION)
    assert again.in_cluster["managed"]["trust"] == {"cloud": "PEM"}


def test_an_estate_without_one_plans_as_before() -> None:
    found = replanned(lambda e, h: (e["clusters"].pop("managed"), h.pop("managed-api")))
    assert found.in_cluster == {}
    assert not {"control_plane", "exposed"} & found.record["clusters/cloud"].keys()
    assert "in_cluster" not in json.dumps(found.specs)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda e, h: h.pop("managed-api"), "managed.etcd.hosts: 'managed-api' is not a host of the inventory"),
        (lambda e, h: h["managed-api"].pop("isthmus_cluster"), "host managed-api has no isthmus_cluster"),
        (lambda e, h: h.update(more={"isthmus_cluster": "managed"}), "host managed-api stands for its etcd"),
        (lambda e, h: of(e).pop("etcd"), "managed.etcd.hosts: it names 0 hosts"),
        (
            lambda e, h: h["managed-api"].update(isthmus_underlay="198.18.6.1"),
            "host managed-api.isthmus_underlay: the host stands for cluster managed",
        ),
        (lambda e, h: of(e).pop("kubernetes"), "managed.kubernetes: it is missing"),
        (lambda e, h: of(e).update(ca_host="c1"), "managed.ca_host: it goes with control_plane: hosts only"),
        (lambda e, h: of(e).update(etcd={"hosts": ["c1"]}), "managed.etcd.hosts: host c1 is in two clusters"),
        (
            lambda e, h: of(e).update(etcd={"hosts": ["managed-api"], "replicas": 2}),
            "managed.etcd.replicas: 2 is not one of",
        ),
        (lambda e, h: of(e).update(etcd={"hosts": ["managed-api"], "storage": "8 GB"}), "'8 GB' is not an amount"),
        (
            lambda e, h: e["clusters"]["cloud"].update(expose={}),
            "cloud.expose: it goes with control_plane: in_cluster only",
        ),
        (lambda e, h: e["clusters"]["cloud"]["etcd"].update(replicas=3), "cloud.etcd.replicas: it goes with"),
        (
            lambda e, h: of(e).update(expose={"scope": "external"}),
            "expose.source_ranges: it is missing. Why: with scope: external everybody could dial the etcd",
        ),
        (
            lambda e, h: of(e).update(etcd={"hosts": ["managed-api"], "client_port": 2479}),
            "managed.etcd.client_port: it goes with",
        ),
        (lambda e, h: of(e).update(expose={"hosts": ["n1"]}), "expose.hosts: it does not go with type: load_balancer"),
        (lambda e, h: of(e).update(expose={"node_port": 30379}), "expose.node_port: it does not go with type"),
    ],
)
def test_what_the_inventory_must_not_say(edit: Edit, words: str) -> None:
    assert words in refused(edit)


def test_a_public_address_is_warned_of() -> None:
    found = replanned(lambda e, h: of(e).update(expose={"scope": "external", "source_ranges": ["203.0.113.0/24"]}))
    assert any("the etcd gets a public address" in warning for warning in found.warnings)


def test_what_a_running_one_cannot_change() -> None:
    first = replanned(exposed=EXPOSED)
    told = refused(lambda e, h: of(e).update(etcd={"hosts": ["managed-api"], "replicas": 1}), previous=first)
    assert "etcd.replicas: a change from 3 to 1 is not yet supported" in told

    def to_hosts(e: dict[str, Any], h: dict[str, Any]) -> None:
        of(e).update(control_plane="hosts", etcd={"hosts": ["m1"]})
        of(e).pop("expose")
        of(e)["kubernetes"]["api_server"] = "https://198.18.6.1:6443"
        del h["managed-api"]
        h["m1"] = {"isthmus_cluster": "managed", "ansible_host": "198.18.6.1"}

    assert "control_plane: a change from in_cluster to hosts is not yet supported" in refused(to_hosts, previous=first)


def test_its_etcd_is_reached_without_the_mesh() -> None:
    exposed = {"managed": {**EXPOSED["managed"], "addresses": ["10.246.0.9"]}}
    assert "its etcd got the address 10.246.0.9, which lies in 10.246.0.0/16" in refused(nothing, exposed=exposed)


def test_it_leaves_as_every_cluster_does() -> None:
    first = replanned(exposed=EXPOSED)
    gone = replanned(lambda e, h: (e["clusters"].pop("managed"), h.pop("managed-api")), first)
    assert gone.orphans == ("cluster/managed",)
    assert "managed" in [peer["name"] for peer in gone.specs["c1"]["registrar"]["peers"]]
    removed = replanned(
        lambda e, h: (e["clusters"].pop("managed"), h.pop("managed-api")), first, prune=("cluster/managed",)
    )
    assert removed.record["clusters/managed"]["state"] == "absent"
    assert removed.kubernetes_left == ()  # that is about registrars on hosts
    assert any("its control plane is in it, and goes on there" in words for words in removed.warnings)
    absent = replanned(lambda e, h: of(e).update(state="absent"), first)
    assert absent.record["clusters/managed"]["state"] == "absent"
    assert not any("goes on there" in words for words in absent.warnings)


def test_a_lost_one_is_refused_by_its_name() -> None:
    the_estate, the_hosts = with_managed()
    record = merge([copy.deepcopy(dict(replanned(exposed=EXPOSED).record))])
    lost = plan(model(the_estate, the_hosts), record, NOW, VERSION, "alice", forget=Forget(names=["cluster/managed"]))
    assert lost.record["clusters/managed"]["state"] == "absent"
    assert any("user remote-managed is deleted" in words for words in lost.warnings)


def test_its_authority_revokes_what_forgotten_hosts_have() -> None:
    the_estate, the_hosts = with_managed()
    first = dict(replanned(exposed=EXPOSED).record)
    for name, document in first.items():
        if name.startswith("clusters/"):
            document["ca_certificate"] = f"CA of {name}"
    record = merge([copy.deepcopy(first)])

    def forgetting(*names: str) -> Plan:
        return plan(model(the_estate, the_hosts), record, NOW, VERSION, "alice", forget=Forget(names=names))

    lost = forgetting("host/o3")
    assert lost.in_cluster["managed"]["revoked"] == {"hosts": ["o3"], "names": []}
    assert "managed" not in [one["cluster"] for one in lost.revocations], "nobody enters a host for that"
    cluster = forgetting("cluster/cloud").in_cluster["managed"]["revoked"]
    assert ("c1" in cluster["hosts"], cluster["names"]) == (True, ["remote-cloud"])
    assert "revoked" not in forgetting().in_cluster["managed"]


def test_a_record_that_lacks_what_is_read_of_it_is_refused() -> None:
    found = copy.deepcopy(dict(replanned(exposed=EXPOSED).record))
    for damage in (
        lambda doc: doc["etcd"].pop("replicas"),
        lambda doc: doc["exposed"].pop("endpoints"),
        lambda doc: doc["exposed"].update(cluster_ip="none"),
    ):
        documents = copy.deepcopy(found)
        damage(documents["clusters/managed"])
        with pytest.raises(RecordError):
            merge([documents])


# The cluster document


def text() -> str:
    return json.dumps(replanned(exposed=EXPOSED).in_cluster["managed"]["document"])


def node(name: str = "n1", underlay: str = "198.18.6.11") -> HostSpec:
    address = IPv4Address(underlay)
    return HostSpec(name, address, address, IPv4Network("10.106.0.0/28"), IPv4Address("10.106.0.1"), {}, name)


def test_a_cluster_document_is_told_from_a_hosts_spec() -> None:
    assert is_cluster_document(text())
    assert not is_cluster_document(json.dumps(replanned().specs["c1"]))
    assert not replanned().specs["c1"].get("kind")


def test_specs_of_the_control_plane_and_of_nodes() -> None:
    document = ClusterDocument(text())
    registrar = document.of_pod("isthmus-registrar-x")
    assert (registrar.host, registrar.member, registrar.in_cluster) == ("isthmus-registrar-x", None, True)
    assert registrar.registrar is not None
    assert registrar.registrar.kubernetes is not None
    assert registrar.registrar.kubernetes.server == "https://kubernetes.default.svc"
    assert registrar.registrar.kubernetes.token.endswith("/token")
    agent = document.of_node(node())
    assert isinstance(agent, NodeSpec)
    assert (agent.host, agent.node.kubernetes_node, agent.registrar, agent.workloads) == ("n1", "n1", None, ())
    assert agent.etcd.cert == "/etc/isthmus/pki/agent.crt"
    assert document.of_node(node()).hash == agent.hash
    assert document.of_node(node(underlay="198.18.6.12")).hash != agent.hash


def test_a_document_that_no_etcd_is_known_for_is_refused() -> None:
    document = replanned().in_cluster["managed"]["document"]
    with pytest.raises(SpecError, match="etcd"):
        ClusterDocument(json.dumps(document))
