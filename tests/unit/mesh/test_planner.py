# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan as tables: what is dealt, what stays, what goes, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from isthmus_mesh.documents import ServiceDefinition
from isthmus_mesh.forgetting import Forget
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import Record, merge
from isthmus_mesh.refusals import refuse_foreign_services
from isthmus_mesh.spec import NodeSpec, spec_hash
from unit.mesh.estates import NOW, VERSION, estate, hosts, model, planned, web

Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def replanned(
    edit: Edit, previous: Plan | None = None, later: timedelta = timedelta(), prune: tuple[str, ...] = ()
) -> Plan:
    the_estate, the_hosts = estate(), hosts()
    edit(the_estate, the_hosts)
    return planned(model(the_estate, the_hosts), previous or planned(model()), NOW + later, prune)


def refused(edit: Edit, previous: Plan | None = None, prune: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ModelError) as caught:
        replanned(edit, previous, prune=prune)
    return [str(problem) for problem in caught.value.problems]


def running(edit: Edit | None = None) -> Plan:
    """What was planned, as it stands when every cluster's etcd has run."""
    found = planned(model()) if edit is None else replanned(edit)
    documents = copy.deepcopy(dict(found.record))
    for name, document in documents.items():
        if name.startswith("clusters/"):
            document["ca_certificate"] = "PEM"
    return replace(found, record=documents)


def nothing(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
    """No edit."""


def test_the_spec_of_an_etcd_host() -> None:
    spec = planned(model()).specs["c1"]
    assert spec == {
        "schema": 1,
        "estate": "lab",
        "host": "c1",
        "hash": spec_hash(spec),
        "cluster": {
            "name": "cloud",
            "id": 2,
            "max_clusters": 255,
            "site": "cloud",
            "workload_ranges4": ["10.102.0.0/16"],
            "service_range4": "10.112.0.0/16",
        },
        "node": {
            "name": "c1",
            "underlay4": "198.18.2.1",
            "advertise4": "198.18.2.1",
            "range4": "10.102.0.0/28",
            "mesh4": "10.102.0.1",
            "labels": {},
        },
        "workloads": [
            {
                "name": "web",
                "namespace": "shop",
                "service_account": "default",
                "labels": {"app": "web"},
                "address4": "10.102.0.2",
                "cgroup": {"unit": "web.service"},
            }
        ],
        "overlay": {"port": 8472, "mtu": None},
        "dns": {"domain": "clusterset.local"},
        "service_ranges4": ["10.112.0.0/16", "10.111.0.0/16"],
        "mesh_ranges4": ["10.102.0.0/16", "10.101.0.0/16"],
        "etcd": {
            "endpoints": ["https://198.18.2.1:2379"],
            "ca": "/etc/isthmus/pki/trust/cloud.crt",
            "cert": "/etc/isthmus/pki/agent.crt",
            "key": "/etc/isthmus/pki/agent.key",
        },
        "member": {
            "name": "c1",
            "client_url": "https://198.18.2.1:2379",
            "peer_url": "https://198.18.2.1:2380",
            "members": {"c1": "https://198.18.2.1:2380"},
            "client_urls": {"c1": "https://198.18.2.1:2379"},
            "initial": "c1",
            "token": "isthmus-lab-cloud",
            "source": {"type": "package"},
            "quota_bytes": 2147483648,
        },
        "registrar": {
            "cert": "/etc/isthmus/pki/registrar.crt",
            "key": "/etc/isthmus/pki/registrar.key",
            "peers": [
                {
                    "name": "onprem",
                    "id": 1,
                    "workload_ranges4": ["10.101.0.0/16"],
                    "service_range4": "10.111.0.0/16",
                    "endpoints": [f"https://198.18.1.{number}:2379" for number in (1, 2, 3)],
                    "ca": "/etc/isthmus/pki/trust/onprem.crt",
                    "cert": "/etc/isthmus/pki/peer-onprem.crt",
                    "key": "/etc/isthmus/pki/peer-onprem.key",
                }
            ],
        },
        "pki": spec["pki"],
    }
    assert spec["pki"]["ca"] == {"cluster": "cloud", "host": "c1", "here": True}
    assert spec["pki"]["trust"] == ["cloud", "onprem"]
    certificates = {entry["name"]: entry for entry in spec["pki"]["certificates"]}
    assert {
        name: (one["cn"], one["ca_cluster"], one["ca_host"], one["usages"]) for name, one in certificates.items()
    } == {
        "agent": ("isthmus-agent-c1", "cloud", "c1", ["client"]),
        "etcd-server": ("c1", "cloud", "c1", ["server"]),
        "etcd-peer": ("isthmus-etcd-peer", "cloud", "c1", ["server", "client"]),
        "root": ("root", "cloud", "c1", ["client"]),
        "operator": ("isthmus-operator", "cloud", "c1", ["client"]),
        "registrar": ("isthmus-registrar", "cloud", "c1", ["client"]),
        "peer-onprem": ("remote-cloud", "onprem", "o1", ["client"]),
    }
    assert certificates["etcd-server"]["sans_ip"] == ["198.18.2.1", "127.0.0.1"]
    assert certificates["etcd-server"]["sans_dns"] == ["c1", "localhost"]


def test_every_spec_reads_back_typed() -> None:
    for name, document in planned(model()).specs.items():
        typed = NodeSpec.from_json(json.dumps(document))
        assert typed.host == name
        assert typed.hash == spec_hash(document)
        assert typed.node.mesh4 in typed.node.range4


def test_a_host_without_member_holds_one_certificate_and_one_trust() -> None:
    found = replanned(lambda e, h: h.update(c2={"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}))
    spec = found.specs["c2"]
    assert spec["member"] is None
    assert spec["registrar"] is None
    assert [entry["name"] for entry in spec["pki"]["certificates"]] == ["agent"]
    assert spec["pki"]["trust"] == ["cloud"]
    assert spec["etcd"]["endpoints"] == ["https://198.18.2.1:2379"]


def test_addresses_behind_translation() -> None:
    """Inside a site the underlay address is dialled, from elsewhere what the host advertises."""

    def edit(e: dict[str, Any], h: dict[str, Any]) -> None:
        h["c1"].update(isthmus_underlay="172.16.0.1", isthmus_advertise="203.0.113.1")
        h["c2"] = {"isthmus_cluster": "cloud", "isthmus_underlay": "172.16.0.2", "isthmus_advertise": "203.0.113.2"}
        h["c3"] = {"isthmus_cluster": "cloud", "isthmus_underlay": "192.0.2.3", "isthmus_site": "far"}

    specs = replanned(edit).specs
    assert specs["c1"]["member"]["client_url"] == "https://172.16.0.1:2379"
    assert specs["c2"]["etcd"]["endpoints"] == ["https://172.16.0.1:2379"]
    assert specs["c3"]["etcd"]["endpoints"] == ["https://203.0.113.1:2379"]
    assert specs["o1"]["registrar"]["peers"][0]["endpoints"] == ["https://203.0.113.1:2379"]
    server = next(one for one in specs["c1"]["pki"]["certificates"] if one["name"] == "etcd-server")
    assert server["sans_ip"] == ["172.16.0.1", "203.0.113.1", "127.0.0.1"]


def test_registrars_dial_an_etcd_at_their_own_site_as_its_hosts_do() -> None:
    """The address that other sites dial may be that of an address translation, which need not lead back in."""

    def edit(e: dict[str, Any], h: dict[str, Any]) -> None:
        e["clusters"]["cloud"]["site"] = "onprem"
        h["c1"].update(isthmus_underlay="198.18.1.9", isthmus_advertise="203.0.113.1")
        h["o3"].update(isthmus_site="far")

    specs = replanned(edit).specs
    assert {host: NodeSpec.from_dict(spec).site for host, spec in specs.items()} == {
        **dict.fromkeys(("c1", "o1", "o2"), "onprem"),
        "o3": "far",
    }
    endpoints = {host: specs[host]["registrar"]["peers"][0]["endpoints"] for host in ("o1", "o3")}
    assert endpoints == {"o1": ["https://198.18.1.9:2379"], "o3": ["https://203.0.113.1:2379"]}


def test_a_member_prefers_itself() -> None:
    endpoints = planned(model()).specs["o2"]["etcd"]["endpoints"]
    assert endpoints == [f"https://198.18.1.{number}:2379" for number in (2, 1, 3)]


def test_the_same_again_changes_nothing() -> None:
    first = planned(model())
    again = planned(model(), first, NOW + timedelta(days=400))
    assert again.record == first.record
    assert again.specs == first.specs
    assert again.services == first.services
    assert again.changes == again.orphans == again.removed == ()
    assert again.before == again.after == first.after


def test_the_order_of_the_inventory_does_not_show() -> None:
    turned = estate()
    turned["clusters"] = dict(reversed(turned["clusters"].items()))
    assert planned(model(turned, dict(reversed(hosts().items())))) == planned(model())


def test_the_input_is_not_changed() -> None:
    record = merge([dict(planned(model()).record)])
    before = copy.deepcopy(record)
    the_hosts = hosts()
    the_hosts["c1"]["isthmus_workloads"].append({"name": "x", "unit": "x.service"})
    plan(model(the_hosts=the_hosts), record, NOW, VERSION)
    assert record == before


def test_a_service_of_another_owner_is_refused_where_it_would_be_written() -> None:
    services = planned(model()).services
    refuse_foreign_services(services, {"onprem": {"shop/other": "module"}, "elsewhere": {"shop/web": "module"}})
    with pytest.raises(ModelError) as caught:
        refuse_foreign_services(services, {"onprem": {"shop/web": "module"}, "cloud": {"shop/web": "rollout"}})
    assert [str(problem) for problem in caught.value.problems] == [
        "isthmus_estate.services: shop/web: it belongs to module in the etcd of onprem, and the inventory would define "
        "it too. Why: a service has one owner. Next: remove it here, or where it was registered "
        "(isthmus.mesh.global_service with state: absent).",
        "isthmus_estate.services: shop/web: it belongs to rollout in the etcd of cloud, and the inventory would define "
        "it too. Why: a service has one owner. Next: remove it here, or where it was registered.",
    ]


def test_services_by_cluster() -> None:
    services = planned(model()).services
    assert sorted(services) == ["cloud", "onprem"]
    (definition,) = services["onprem"]["present"]
    assert ServiceDefinition.from_dict(definition).is_global
    assert definition["owner"] == "inventory"
    narrowed = replanned(lambda e, h: e["services"][0].update(clusters=["cloud"]))
    assert narrowed.services["onprem"] == {"present": [], "absent": ["shop/web"]}
    assert [one["name"] for one in narrowed.services["cloud"]["present"]] == ["web"]


def test_what_a_new_estate_changes_in_words() -> None:
    changes = planned(model()).changes
    assert (
        "host c1: new, cluster cloud, site cloud, underlay 198.18.2.1, range 10.102.0.0/28, mesh address 10.102.0.1"
        in changes
    )
    assert "workload shop/web on c1: new, 10.102.0.2, unit web.service, service account default, app=web" in changes
    assert "service shop/web: new, in cloud, onprem" in changes
    assert "cluster cloud: new, id 2, site cloud, workloads 10.102.0.0/16, services 10.112.0.0/16, CA on c1" in changes


def test_a_new_underlay_address_is_a_change_of_its_host_and_moves_nothing() -> None:
    found = replanned(lambda e, h: h["o2"].update(ansible_host="198.18.1.22"))
    (change,) = found.changes
    assert change == (
        "host o2: cluster onprem, site onprem, underlay 198.18.1.22, range 10.101.0.16/28, mesh address 10.101.0.17 "
        "(was cluster onprem, site onprem, underlay 198.18.1.2, range 10.101.0.16/28, mesh address 10.101.0.17)"
    )
    assert found.record["clusters/onprem"]["revision"] == 2
    assert found.record["clusters/cloud"]["revision"] == 1


def test_an_only_member_restarts_in_words() -> None:
    found = replanned(lambda e, h: e["clusters"]["cloud"]["etcd"].update(quota_bytes=2**32))
    assert "etcd of cluster cloud: its only member restarts, so that nothing can be written to it for some seconds" in (
        found.changes
    )
    found = replanned(lambda e, h: e["clusters"]["onprem"]["etcd"].update(quota_bytes=2**32))
    assert not any("only member" in change for change in found.changes)


# Absence is never removal


def test_a_host_that_is_not_in_the_inventory_any_more_stays() -> None:
    first = planned(model())
    found = replanned(lambda e, h: (h.pop("o3"), e["clusters"]["onprem"]["etcd"].update(hosts=["o1"])), first)
    assert found.orphans == ("host/o3", "member/onprem/o2")
    assert found.record["clusters/onprem"] == first.record["clusters/onprem"]
    assert found.removed == ()
    assert found.specs["o1"]["member"]["members"] == first.specs["o1"]["member"]["members"]
    assert "o3" not in found.specs


def test_a_cluster_that_is_not_in_the_inventory_any_more_stays() -> None:
    first = planned(model())
    found = replanned(lambda e, h: (e["clusters"].pop("onprem"), [h.pop(f"o{n}") for n in (1, 2, 3)]), first)
    assert found.orphans == ("cluster/onprem",)
    assert found.record["clusters/onprem"] == first.record["clusters/onprem"]
    assert found.specs["c1"] == first.specs["c1"]
    assert found.services == first.services


def test_workloads_and_services_that_are_not_in_the_inventory_any_more_stay() -> None:
    first = planned(model())
    found = replanned(lambda e, h: (h["c1"].pop("isthmus_workloads"), e.pop("services")), first)
    assert found.orphans == ("service/shop/web", "workload/c1/shop/web")
    assert found.specs["c1"] == first.specs["c1"]
    assert found.services["cloud"] == {"present": [], "absent": []}


def test_an_empty_inventory_removes_nothing() -> None:
    first = planned(model())
    found = replanned(
        lambda e, h: (
            h.clear(),
            e.update(
                services=[],
                clusters={
                    "new": {
                        "id": 9,
                        "workload_ranges": ["10.109.0.0/16"],
                        "service_range": "10.119.0.0/16",
                        "etcd": {"hosts": ["n1"]},
                    }
                },
            ),
            h.update(n1={"isthmus_cluster": "new", "ansible_host": "198.18.9.1"}),
        ),
        first,
    )
    assert found.orphans == ("cluster/cloud", "cluster/onprem", "service/shop/web")
    assert found.removed == ()
    for name in ("clusters/cloud", "clusters/onprem"):
        assert found.record[name] == first.record[name]
    assert [peer["name"] for peer in found.specs["n1"]["registrar"]["peers"]] == ["cloud", "onprem"]


# How things go


def test_a_cluster_that_is_put_back_has_its_ranges_and_what_it_had_released_stays_kept_back() -> None:
    def edit(e: dict[str, Any], h: dict[str, Any], gone: str = "") -> None:
        h.update(
            {f"c{number}": {"isthmus_cluster": "cloud", "ansible_host": f"198.18.2.{number}"} for number in (2, 3)}
        )
        h.pop(gone, None)

    def removed(e: dict[str, Any], h: dict[str, Any]) -> None:
        e["clusters"]["cloud"]["state"] = "absent"

    def ranges(found: Plan) -> dict[str, str]:
        return {name: entry["range4"] for name, entry in found.record["clusters/cloud"]["hosts"].items()}

    first = replanned(edit)
    before = ranges(first)
    assert before == {"c1": "10.102.0.0/28", "c2": "10.102.0.16/28", "c3": "10.102.0.32/28"}
    running = replanned(lambda e, h: edit(e, h, "c2"), first, prune=("host/c2",))
    gone = replanned(removed, running)
    assert [(one["owner"], one["address"]) for one in gone.record["clusters/cloud"]["released"]] == [
        ("c2", before["c2"]),
        ("c1", before["c1"]),
        ("c3", before["c3"]),
    ]
    assert merge([dict(gone.record)]).clusters["cloud"]["state"] == "absent"
    assert replanned(removed, gone, timedelta(days=60)).record == gone.record

    def others(e: dict[str, Any], h: dict[str, Any]) -> None:
        edit(e, h, "c2")
        h["b1"] = {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.9"}

    back = replanned(others, gone, timedelta(days=29))
    assert ranges(back) == {"b1": "10.102.0.48/28", "c1": before["c1"], "c3": before["c3"]}
    assert [one["owner"] for one in back.record["clusters/cloud"]["released"]] == ["c2"]
    assert replanned(others, back, timedelta(days=29)).record == back.record
    late = replanned(others, gone, timedelta(days=31))
    assert ranges(late)["b1"] == before["c1"], "as in a cluster that has not been there before"


def test_ranges_of_a_removed_cluster_are_not_given_back_where_the_inventory_has_other_ones() -> None:
    def back(e: dict[str, Any], h: dict[str, Any]) -> None:
        h["b1"] = {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.9", "isthmus_node_range": "10.102.0.0/28"}

    gone = replanned(lambda e, h: e["clusters"]["cloud"].update(state="absent"))
    hosts = replanned(back, gone).record["clusters/cloud"]["hosts"]
    assert {name: entry["range4"] for name, entry in hosts.items()} == {"b1": "10.102.0.0/28", "c1": "10.102.0.16/28"}
    lost = planned(model(), forget=Forget(names=("cluster/cloud",)), previous=planned(model()))
    anew = planned(model(), lost, forget=Forget(clean=("c1",))).record["clusters/cloud"]
    assert anew["hosts"]["c1"]["range4"] == "10.102.0.16/28", "as a host that was forgotten alone"


def test_a_host_goes_by_state_absent() -> None:
    first = replanned(lambda e, h: h.update(c2={"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}))
    found = replanned(
        lambda e, h: h.update(c2={"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2", "isthmus_state": "absent"}),
        first,
    )
    assert found.removed == ("host/c2",)
    assert "c2" not in found.record["clusters/cloud"]["hosts"]
    assert found.record["clusters/cloud"]["released"] == [
        {"address": "10.102.0.16/28", "owner": "c2", "at": "2026-01-02T03:04:05Z"}
    ]
    assert any(change.startswith("host c2: removed (was cluster cloud") for change in found.changes)


def test_a_released_range_is_kept_back_for_thirty_days() -> None:
    def with_host(name: str, **more: Any) -> Edit:
        return lambda e, h: h.update({name: {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.9", **more}})

    first = replanned(with_host("c2"))
    gone = replanned(with_host("c2", isthmus_state="absent"), first)
    soon = replanned(with_host("c3"), gone, timedelta(days=29))
    late = replanned(with_host("c3"), gone, timedelta(days=31))
    assert first.specs["c2"]["node"]["range4"] == "10.102.0.16/28"
    assert soon.specs["c3"]["node"]["range4"] == "10.102.0.32/28"
    assert late.specs["c3"]["node"]["range4"] == "10.102.0.16/28"
    assert late.record["clusters/cloud"]["released"] == []
    pinned = replanned(with_host("c3", isthmus_node_range="10.102.0.16/28"), gone)
    assert pinned.specs["c3"]["node"]["range4"] == "10.102.0.16/28", "the operator may say so"


def test_a_workload_goes_by_state_absent_and_its_address_is_kept_back() -> None:
    gone = replanned(lambda e, h: h["c1"]["isthmus_workloads"][0].update(state="absent"))
    assert gone.removed == ("workload/c1/shop/web",)
    assert gone.specs["c1"]["workloads"] == []
    other = {"name": "other", "unit": "other.service"}
    soon = replanned(lambda e, h: h["c1"].update(isthmus_workloads=[other]), gone, timedelta(days=1))
    assert soon.specs["c1"]["workloads"][0]["address4"] == "10.102.0.3"
    late = replanned(lambda e, h: h["c1"].update(isthmus_workloads=[other]), gone, timedelta(days=30))
    assert late.specs["c1"]["workloads"][0]["address4"] == "10.102.0.2"


def test_a_service_goes_and_is_named_absent_from_then_on() -> None:
    gone = replanned(lambda e, h: e["services"][0].update(state="absent"))
    assert gone.removed == ("service/shop/web",)
    again = replanned(lambda e, h: e.pop("services"), gone)
    assert again.removed == again.orphans == ()
    for found in (gone, again):
        assert found.services == {
            "cloud": {"present": [], "absent": ["shop/web"]},
            "onprem": {"present": [], "absent": ["shop/web"]},
        }
    back = replanned(nothing, again)
    assert back.services["cloud"]["absent"] == []
    assert "service shop/web: new, in cloud, onprem" in back.changes


def test_a_cluster_goes_and_leaves_a_tombstone() -> None:
    first = planned(model())
    gone = replanned(lambda e, h: e["clusters"]["cloud"].update(state="absent"), first)
    assert gone.removed == ("cluster/cloud",)
    tombstone = gone.record["clusters/cloud"]
    assert tombstone["state"] == "absent"
    assert tombstone["revision"] == 2
    assert "c1" not in gone.specs
    assert gone.specs["o1"]["registrar"]["peers"] == []
    assert gone.specs["o1"]["pki"]["trust"] == ["onprem"]
    stale = merge([dict(gone.record), dict(first.record)])
    assert stale.clusters["cloud"] == tombstone, "an old copy does not bring it back"
    back = plan(model(), stale, NOW, VERSION)
    assert back.record["clusters/cloud"]["etcd"]["token"].endswith("-cloud-2")
    assert back.record["clusters/cloud"]["revision"] == 3


def test_what_is_cut_is_told_with_what_is_left_and_the_way_back() -> None:
    def c2(e: Any, h: Any) -> None:
        workloads = [{"name": "web", "namespace": "shop", "unit": "web.service", "labels": {"app": "web"}}]
        h.update(c2={"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2", "isthmus_workloads": workloads})

    def absent(e: Any, h: Any) -> None:
        c2(e, h)
        h["c2"]["isthmus_state"] = "absent"

    first = replanned(c2)
    assert first.cuts == ()
    [host] = replanned(absent, first).cuts
    assert host.startswith("host/c2: its certificate loses its rights. shop/web loses 1 of 2 backends, 1 left. New ")
    assert "10.102.0.16/28 is kept back until 2026-02-01" in host
    [workload] = replanned(lambda e, h: h["c1"]["isthmus_workloads"][0].update(state="absent")).cuts
    assert "workload/c1/shop/web: its connections end, since its address 10.102.0.2 leaves" in workload
    assert "shop/web loses 1 of 1 backend, NONE left. " in workload
    [cluster] = replanned(lambda e, h: e["clusters"].pop("cloud") and h.pop("c1"), prune=("cluster/cloud",)).cuts
    assert cluster.startswith("cluster/cloud: the others forget its 1 host (c1), and it them. shop/web loses 1 of 1")
    [service] = replanned(lambda e, h: e["services"][0].update(state="absent")).cuts
    assert service.startswith("service/shop/web: its name and addresses go from cloud, onprem. It has 1 backend. New")
    edit: Edit = lambda e, h: (h.pop("o3"), e["clusters"]["onprem"]["etcd"].update(hosts=["o1", "o2"]))  # noqa: E731
    host, member = replanned(edit, prune=("o3",)).cuts
    assert host.startswith("host/o3: its certificate loses its rights. New flows stop at once")
    assert member.startswith("member/onprem/o3: etcd of onprem has o1, o2 left, of which none may fail. Its data stays")


@pytest.mark.parametrize("name", ["host/o3", "o3"])
def test_an_orphan_goes_by_its_name(name: str) -> None:
    edit: Edit = lambda e, h: (h.pop("o3"), e["clusters"]["onprem"]["etcd"].update(hosts=["o1", "o2"]))  # noqa: E731
    first = planned(model())
    found = replanned(edit, first, prune=(name,))
    assert found.removed == ("host/o3", "member/onprem/o3")
    assert found.orphans == ()
    assert sorted(found.specs["o1"]["member"]["members"]) == ["o1", "o2"]


def test_a_member_goes_by_its_name_and_its_host_stays() -> None:
    found = replanned(
        lambda e, h: e["clusters"]["onprem"]["etcd"].update(hosts=["o2"]),
        prune=("member/onprem/o1", "member/onprem/o3"),
    )
    assert found.removed == ("member/onprem/o1", "member/onprem/o3")
    assert found.specs["o1"]["member"] is None
    assert found.specs["o2"]["member"]["initial"] == "o2"
    assert found.specs["o1"]["pki"]["ca"] == {"cluster": "onprem", "host": "o1", "here": True}


def test_a_host_moves_by_being_pruned_from_its_old_cluster() -> None:
    add: Edit = lambda e, h: h.update(x={"isthmus_cluster": "cloud", "ansible_host": "198.18.2.7"})  # noqa: E731
    move: Edit = lambda e, h: h.update(x={"isthmus_cluster": "onprem", "ansible_host": "198.18.2.7"})  # noqa: E731
    first = replanned(add)
    assert refused(move, first) == [
        "host x.isthmus_cluster: onprem, but the host runs in cluster cloud. Why: its addresses and certificates are "
        "of that cluster. Next: put it back, or move it with isthmus_prune=host/x."
    ]
    found = replanned(move, first, prune=("x",))
    assert found.specs["x"]["node"]["range4"] == "10.101.0.48/28"
    assert found.removed == ("host/x",)
    assert "x" not in found.record["clusters/cloud"]["hosts"]


# What is refused


def _grown(prefix: str) -> Edit:
    return lambda e, h: h["c1"].update(isthmus_node_range=prefix)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda e, h: e.update(name="other"),
            "isthmus_estate.name: 'other', but the record found on the hosts is of estate 'lab'. Why: two estates on "
            "the same hosts would undo each other. Next: use the inventory of that estate, or tear it down first.",
        ),
        (
            lambda e, h: e.update(max_clusters=511),
            "isthmus_estate.max_clusters: 511, but the estate runs with 255. Why: it sets the layout of every "
            "identity. Next: put 255 back.",
        ),
        (
            lambda e, h: e["clusters"]["cloud"].update(id=3),
            "isthmus_estate.clusters.cloud.id: 3, but the cluster runs with 2. Why: every identity of its workloads "
            "carries the id. Next: put 2 back; to renumber, remove the cluster and add it anew.",
        ),
        (
            lambda e, h: e["clusters"]["cloud"].update(service_range="10.113.0.0/16"),
            "isthmus_estate.clusters.cloud.service_range: 10.113.0.0/16 does not hold 10.112.0.0/16, the range in use. "
            "Why: addresses of services would move. Next: use 10.112.0.0/16 or a range around it.",
        ),
        (
            lambda e, h: e["clusters"]["cloud"].update(workload_ranges=["10.104.0.0/16"]),
            "isthmus_estate.clusters.cloud.workload_ranges: none of them holds 10.102.0.0/28, the range of host c1. "
            "Why: what was dealt never moves. Next: put the range that holds it back, or remove the host first.",
        ),
        (
            lambda e, h: e["clusters"]["onprem"].update(ca_host="o2"),
            "isthmus_estate.clusters.onprem.ca_host: o2, but the CA's key is on o1. Why: a private key never leaves "
            "its host. Next: put o1 back or leave ca_host out.",
        ),
        (
            _grown("10.102.0.16/28"),
            "host c1.isthmus_node_range: 10.102.0.16/28 does not hold 10.102.0.0/28, the range that the host has. Why: "
            "what was dealt never moves. Next: use 10.102.0.0/28 or a range around it.",
        ),
        (
            lambda e, h: h["c1"]["isthmus_workloads"][0].update(address="10.102.0.9"),
            "host c1.isthmus_workloads (shop/web).address: 10.102.0.9, but the workload has 10.102.0.2. Why: what was "
            "dealt never moves. Next: put 10.102.0.2 back or leave address out.",
        ),
        (
            lambda e, h: h["c1"]["isthmus_workloads"].append(
                {"name": "b", "unit": "b.service", "address": "10.102.0.2"}
            ),
            "host c1.isthmus_workloads (default/b).address: 10.102.0.2 is the address of shop/web. Why: an address "
            "belongs to one workload. Next: choose another.",
        ),
        (
            lambda e, h: h["c1"]["isthmus_workloads"].append(
                {"name": "b", "unit": "b.service", "address": "10.102.0.1"}
            ),
            "host c1.isthmus_workloads (default/b).address: 10.102.0.1 is the address of the host itself. Why: an "
            "address belongs to one workload. Next: choose another.",
        ),
        (
            lambda e, h: h["c1"]["isthmus_workloads"].append(
                {"name": "b", "unit": "b.service", "address": "10.102.1.2"}
            ),
            "host c1.isthmus_workloads (default/b).address: 10.102.1.2 is not in the host's range 10.102.0.0/28. Why: "
            "other hosts find the workload by its host's range. Next: choose an address inside it.",
        ),
        (
            lambda e, h: h["c1"]["isthmus_workloads"].append(
                {"name": "b", "unit": "b.service", "address": "10.102.0.15"}
            ),
            "host c1.isthmus_workloads (default/b).address: 10.102.0.15 is the first or last address of the host's "
            "range 10.102.0.0/28. Why: in an IPv4 network they stand for the network and for all of its hosts. Next: "
            "choose another inside it.",
        ),
        (
            lambda e, h: h.update(
                c2={
                    "isthmus_cluster": "cloud",
                    "ansible_host": "198.18.2.2",
                    "isthmus_node_range": "10.102.4.0/28",
                    "isthmus_workloads": [{"name": "b", "unit": "b.service", "address": "10.102.4.0"}],
                }
            ),
            "host c2.isthmus_workloads (default/b).address: 10.102.4.0 is the first or last address of the host's "
            "range 10.102.4.0/28. Why: in an IPv4 network they stand for the network and for all of its hosts. Next: "
            "choose another inside it.",
        ),
        (
            lambda e, h: h["c1"].update(
                isthmus_workloads=[{"name": f"w{n}", "unit": f"w{n}.service"} for n in range(13)] + [web()]
            ),
            "host c1.isthmus_workloads (default/w9): the host's range 10.102.0.0/28 is full: it holds 13 workloads. "
            "Why: each workload has an address of its own, and released ones are kept back for 30 days. Next: set "
            "isthmus_node_range of the host to a larger range around 10.102.0.0/28.",
        ),
        (
            lambda e, h: (
                e["clusters"]["onprem"]["etcd"].update(hosts=["o2", "o3"]),
                h["o1"].update(isthmus_state="absent"),
            ),
            "cluster onprem: host o1 is being removed and keeps the cluster's CA. Why: nobody could sign certificates "
            "any more. Next: keep the host, or remove the whole cluster.",
        ),
    ],
)
def test_what_does_not_go_with_the_record_is_refused(edit: Edit, message: str) -> None:
    assert message in refused(edit)


MEMBER_STAYS = (
    "Why: the host carries a member of cluster onprem's etcd, and the others know it by its addresses. Next: put {0} "
    "back; to move the member, take the host out of etcd.hosts (another one in its place) with "
    "isthmus_prune=member/onprem/o2, and list it again later."
)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda e, h: e.update(domain="example.org"),
            "isthmus_estate.domain: a change from clusterset.local to example.org is not yet supported. Why: until the "
            "last host has the new one, names of services would be found on a part of the hosts only. Next: put "
            "clusterset.local back.",
        ),
        (
            lambda e, h: e.update(overlay={"port": 8473}),
            "isthmus_estate.overlay.port: a change from 8472 to 8473 is not yet supported. Why: hosts that have the "
            "new one and hosts that do not could not reach each other's workloads. Next: put 8472 back.",
        ),
        (
            lambda e, h: e["clusters"]["onprem"]["etcd"].update(client_port=2479),
            "isthmus_estate.clusters.onprem.etcd.client_port: a change from 2379 to 2479 is not yet supported. Why: "
            "agents and peers would look for its members where none listens. Next: put 2379 back.",
        ),
        (
            lambda e, h: e["clusters"]["onprem"]["etcd"].update(peer_port=2480),
            "isthmus_estate.clusters.onprem.etcd.peer_port: a change from 2380 to 2480 is not yet supported. Why: its "
            "members know each other by the port that they joined with. Next: put 2380 back.",
        ),
        (
            lambda e, h: h["o2"].update(ansible_host="198.18.1.22"),
            "host o2.isthmus_underlay: a change from 198.18.1.2 to 198.18.1.22 is not yet supported. "
            + MEMBER_STAYS.format("198.18.1.2"),
        ),
        (
            lambda e, h: h["o2"].update(isthmus_advertise="203.0.113.2"),
            "host o2.isthmus_advertise: a change from 198.18.1.2 to 203.0.113.2 is not yet supported. "
            + MEMBER_STAYS.format("198.18.1.2"),
        ),
    ],
)
def test_a_change_that_a_running_estate_cannot_make_yet_is_refused(edit: Edit, message: str) -> None:
    assert refused(edit, running()) == [message]


def test_what_has_not_run_can_be_put_right() -> None:
    """A first run that reached one cluster only leaves the others in the record as they were planned."""

    def edit(e: dict[str, Any], h: dict[str, Any]) -> None:
        e["clusters"]["onprem"]["etcd"].update(client_port=2479, peer_port=2480)
        h["o2"].update(ansible_host="198.18.1.22")

    urls = replanned(edit).specs["o1"]["member"]["members"]
    assert urls["o2"] == "https://198.18.1.22:2480"


def test_a_member_that_goes_and_a_host_that_carries_none_may_have_new_addresses() -> None:
    def without_o2(e: dict[str, Any], h: dict[str, Any]) -> None:
        e["clusters"]["onprem"]["etcd"].update(hosts=["o1", "o3"])
        h["o2"].update(ansible_host="198.18.1.22")

    assert len(refused(without_o2, running())) == 1, "absence from the list removes no member"
    found = replanned(without_o2, running(), prune=("member/onprem/o2",))
    assert found.specs["o2"]["node"]["underlay4"] == "198.18.1.22"

    def with_o4(address: str) -> Edit:
        return lambda e, h: h.update(o4={"isthmus_cluster": "onprem", "ansible_host": address})

    moved = replanned(with_o4("198.18.1.44"), running(with_o4("198.18.1.4")))
    assert moved.specs["o4"]["node"]["underlay4"] == "198.18.1.44"


def test_members_do_not_leave_the_one_site_by_whose_addresses_they_know_each_other() -> None:
    def behind(e: dict[str, Any], h: dict[str, Any]) -> None:
        for number in (1, 2, 3):
            h[f"o{number}"].update(isthmus_advertise=f"203.0.113.{number}")
        h["o4"] = {"isthmus_cluster": "onprem", "ansible_host": "198.18.3.4", "isthmus_site": "far"}

    def far(e: dict[str, Any], h: dict[str, Any]) -> None:
        behind(e, h)
        e["clusters"]["onprem"]["etcd"]["hosts"].append("o4")

    messages = refused(far, running(behind))
    assert len(messages) == 3
    assert messages[0] == (
        "isthmus_estate.clusters.onprem.etcd.hosts: a change from 198.18.1.1 to 203.0.113.1 as the address of member "
        "o1 is not yet supported. Why: members in several sites dial each other at isthmus_advertise, and the others "
        "know it by isthmus_underlay. Next: keep the members in one site."
    )
    back = replanned(behind, running(far), prune=("member/onprem/o4",))
    assert back.removed == ("member/onprem/o4",), "the way back loses nobody"


def test_a_new_cluster_against_one_that_only_the_record_knows() -> None:
    def edit(e: dict[str, Any], h: dict[str, Any]) -> None:
        e["clusters"]["fresh"] = {**e["clusters"].pop("cloud"), "workload_ranges": ["10.102.64.0/18"]}
        h["c1"].update(isthmus_cluster="fresh")

    messages = refused(edit)
    assert (
        "isthmus_estate.clusters.fresh.id: 2 is the id of cluster cloud, which the record knows and the inventory "
        "lacks. Why: what is absent from the inventory still runs. Next: choose another, or remove that cluster with "
        "isthmus_prune=cluster/cloud." in messages
    )
    assert any("10.102.64.0/18 overlaps 10.102.0.0/16 of cluster cloud" in message for message in messages)


LACKS = (
    "which the record knows and the inventory lacks. Why: what is absent from the inventory still runs. Next: choose"
)


def _without_c2(*edits: Edit) -> Edit:
    """The inventory of `_with_c2` without its host and workload, and with something else."""

    def edit(e: dict[str, Any], h: dict[str, Any]) -> None:
        h["c1"]["isthmus_workloads"] = []
        for one in edits:
            one(e, h)

    return edit


def _with_c2(e: dict[str, Any], h: dict[str, Any]) -> None:
    h["c2"] = {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2", "isthmus_advertise": "203.0.113.2"}


def _new_host(**variables: Any) -> Edit:
    return lambda e, h: h.update(new={"isthmus_cluster": "cloud", "isthmus_underlay": "198.18.2.9", **variables})


@pytest.mark.parametrize(
    ("edit", "message", "prune"),
    [
        (
            _new_host(isthmus_underlay="198.18.2.2"),
            f"host new.isthmus_underlay: 198.18.2.2 is also an address of host c2 of cluster cloud, {LACKS} another, "
            "or remove that host with isthmus_prune=host/c2.",
            "host/c2",
        ),
        (
            _new_host(isthmus_advertise="203.0.113.2"),
            "host new.isthmus_advertise: 203.0.113.2 is also an address of host c2 of cluster cloud, "
            f"{LACKS} another, or remove that host with isthmus_prune=host/c2.",
            "host/c2",
        ),
        (
            _new_host(isthmus_node_range="10.102.0.16/28"),
            "host new.isthmus_node_range: 10.102.0.16/28 overlaps 10.102.0.16/28, the range of host c2, "
            f"{LACKS} another, or remove that host with isthmus_prune=host/c2.",
            "host/c2",
        ),
        (
            lambda e, h: e["clusters"]["onprem"]["workload_ranges"].append("203.0.113.0/28"),
            "isthmus_estate.clusters.onprem: 203.0.113.0/28 holds 203.0.113.2 of host c2 of cluster cloud, "
            f"{LACKS} another, such as 10.103.0.0/28, or remove that host with isthmus_prune=host/c2.",
            "host/c2",
        ),
        (
            lambda e, h: h["c1"].update(
                isthmus_workloads=[{"name": "b", "unit": "b.service", "address": "10.102.0.2"}]
            ),
            "host c1.isthmus_workloads (default/b).address: 10.102.0.2 is the address of shop/web, "
            f"{LACKS} another, or remove that workload with isthmus_prune=workload/c1/shop/web.",
            "workload/c1/shop/web",
        ),
        (
            lambda e, h: h["c1"].update(isthmus_workloads=[{"name": "renamed", "unit": "web.service"}]),
            "host c1.isthmus_workloads (default/renamed): web.service is also the workload shop/web, "
            f"{LACKS} another, or remove that workload with isthmus_prune=workload/c1/shop/web.",
            "workload/c1/shop/web",
        ),
    ],
)
def test_what_only_the_record_knows_keeps_its_own(edit: Edit, message: str, prune: str) -> None:
    first = replanned(_with_c2)
    assert refused(_without_c2(edit), first) == [message]
    assert prune in replanned(_without_c2(edit), first, prune=(prune,)).removed


def test_a_cgroup_path_is_the_same_with_and_without_a_slash_in_front() -> None:
    def named(name: str, path: str) -> Edit:
        return lambda e, h: h["c1"].update(isthmus_workloads=[{"name": name, "path": path}])

    first = replanned(named("a", "x/y"))
    (words,) = refused(named("b", "/x/y"), first)
    assert "(default/b): /x/y is also the workload default/a, " in words


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda e, h: e["clusters"]["onprem"]["workload_ranges"].append("10.112.4.0/24"),
            f"isthmus_estate.clusters.onprem: 10.112.4.0/24 overlaps 10.112.0.0/16 of cluster cloud, {LACKS} another, "
            "such as 10.113.0.0/24, or remove that cluster with isthmus_prune=cluster/cloud.",
        ),
        (
            lambda e, h: h.update(o4={"isthmus_cluster": "onprem", "ansible_host": "198.18.2.1"}),
            f"host o4.isthmus_underlay: 198.18.2.1 is also an address of host c1 of cluster cloud, {LACKS} another, or "
            "remove that cluster with isthmus_prune=cluster/cloud.",
        ),
        (
            lambda e, h: h.update(o4={"isthmus_cluster": "onprem", "ansible_host": "10.102.9.9"}),
            f"host o4.isthmus_underlay: 10.102.9.9 lies in 10.102.0.0/16 of cluster cloud, {LACKS} another, or remove "
            "that cluster with isthmus_prune=cluster/cloud.",
        ),
        (
            lambda e, h: h.update(c1={"isthmus_cluster": "onprem", "ansible_host": "198.18.1.9"}),
            f"host c1.isthmus_cluster: onprem, but the host runs in cluster cloud, {LACKS} another, or remove that "
            "cluster with isthmus_prune=cluster/cloud.",
        ),
    ],
)
def test_a_cluster_that_only_the_record_knows_keeps_its_own(edit: Edit, message: str) -> None:
    def without_cloud(e: dict[str, Any], h: dict[str, Any]) -> None:
        del e["clusters"]["cloud"], h["c1"]
        edit(e, h)

    assert refused(without_cloud, planned(model())) == [message]
    assert replanned(without_cloud, prune=("cluster/cloud",)).removed == ("cluster/cloud",)


def test_a_part_of_an_orphan_does_not_go_alone() -> None:
    def edit(e: dict[str, Any], h: dict[str, Any]) -> None:
        del e["clusters"]["cloud"], h["c1"]

    for name in ("host/c1", "member/cloud/c1", "workload/c1/shop/web"):
        assert refused(edit, prune=(name,)) == [
            f"isthmus_prune={name}: it is a part of cluster/cloud, which the inventory lacks too. Why: what the "
            "inventory lacks goes as a whole. Next: write cluster/cloud, or put that back into the inventory."
        ]
        assert replanned(edit, prune=(name, "cluster/cloud")).removed == ("cluster/cloud",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "c1",
            "isthmus_prune=host/c1: the inventory still has it. Why: the next run would bring it back. Next: take it "
            "out of the inventory, or use state: absent instead.",
        ),
    ],
)
def test_names_to_prune_that_are_refused(name: str, message: str) -> None:
    assert refused(nothing, prune=(name,)) == [message]


def _without_what_went(e: dict[str, Any], h: dict[str, Any]) -> None:
    """Of each kind something is gone from the inventory."""
    del e["services"]
    e["clusters"]["onprem"]["etcd"]["hosts"] = ["o1"]
    h.pop("o3")


@pytest.mark.parametrize(
    ("edit", "prune"),
    [
        (_without_what_went, ("host/o3", "member/onprem/o2", "service/shop/web")),
        (_without_what_went, ("o3", "onprem/o2", "shop/web")),
        (lambda e, h: h["c1"].pop("isthmus_workloads"), ("workload/c1/shop/web",)),
        (lambda e, h: (e["clusters"].pop("cloud"), h.pop("c1")), ("cluster/cloud",)),
    ],
)
def test_what_is_pruned_twice_is_gone_once(edit: Edit, prune: tuple[str, ...]) -> None:
    gone = replanned(edit, prune=prune)
    assert len(gone.removed) >= len(prune)
    again = replanned(edit, gone, timedelta(days=40), prune=prune)
    assert again.record == gone.record
    assert (again.specs, again.services) == (gone.specs, gone.services)
    assert again.changes == again.removed == again.orphans == ()
    for name in prune:
        assert any(
            warning.startswith(f"isthmus_prune={name}: there is nothing of that name to remove; it has gone before")
            for warning in again.warnings
        )


def test_a_host_that_moves_is_pruned_twice() -> None:
    def into(cluster: str) -> Edit:
        return lambda e, h: h.update(x={"isthmus_cluster": cluster, "ansible_host": "198.18.2.7"})

    moved = replanned(into("onprem"), replanned(into("cloud")), prune=("host/x",))
    again = replanned(into("onprem"), moved, prune=("host/x",))
    assert again.record == moved.record
    assert again.removed == ()


def test_a_misspelt_name_to_prune_is_said() -> None:
    (warning,) = replanned(nothing, prune=("host/o9",)).warnings
    assert warning == (
        "isthmus_prune=host/o9: there is nothing of that name to remove; it has gone before, or did you mean 'host/o3'?"
    )


def test_a_name_to_prune_that_can_mean_two_things() -> None:
    first = replanned(lambda e, h: h.update(cloud={"isthmus_cluster": "cloud", "ansible_host": "198.18.2.8"}))
    (message,) = refused(nothing, first, prune=("cloud",))
    assert message == (
        "isthmus_prune=cloud: it can mean cluster/cloud or host/cloud. Why: what is removed must be certain. Next: "
        "write the full name."
    )


def test_a_full_cluster_names_the_way_out() -> None:
    the_estate, the_hosts = estate(), hosts()
    the_estate["clusters"]["cloud"]["workload_ranges"] = ["10.102.0.0/28"]
    first = planned(model(the_estate, the_hosts))
    the_hosts["c2"] = {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}
    with pytest.raises(ModelError) as caught:
        planned(model(the_estate, the_hosts), first)
    assert [str(problem) for problem in caught.value.problems] == [
        "host c2: cluster cloud has no free /28 left in 10.102.0.0/28. Why: a host needs a range of its own. Next: add "
        "a range to isthmus_estate.clusters.cloud.workload_ranges; isthmus.mesh.address_plan names a free one."
    ]
    the_estate["clusters"]["cloud"]["workload_ranges"] = ["10.102.0.0/28", "10.102.1.0/24"]
    found = planned(model(the_estate, the_hosts), first)
    assert found.specs["c2"]["node"]["range4"] == "10.102.1.0/28"


def test_a_full_host_grows_around_what_it_has() -> None:
    units = [{"name": f"w{n}", "unit": f"w{n}.service"} for n in range(20)]
    found = replanned(
        lambda e, h: h["c1"].update(isthmus_workloads=[web(), *units], isthmus_node_range="10.102.0.0/27")
    )
    spec = found.specs["c1"]
    assert spec["node"]["mesh4"] == "10.102.0.1"
    by_name = {workload["name"]: workload["address4"] for workload in spec["workloads"]}
    assert by_name["web"] == "10.102.0.2"
    assert len(set(by_name.values())) == 21
    assert all(IPv4Address(address) in IPv4Network("10.102.0.0/27") for address in by_name.values())


def test_pins_are_kept_clear_when_others_are_dealt() -> None:
    def edit(e: dict[str, Any], h: dict[str, Any]) -> None:
        h["a"] = {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.8"}
        h["z"] = {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.9", "isthmus_node_range": "10.102.0.16/28"}
        h["c1"]["isthmus_workloads"].append({"name": "z", "unit": "z.service", "address": "10.102.0.3"})
        h["c1"]["isthmus_workloads"].append({"name": "a", "unit": "a.service"})

    specs = replanned(edit).specs
    assert specs["a"]["node"]["range4"] == "10.102.0.32/28"
    assert {one["name"]: one["address4"] for one in specs["c1"]["workloads"]} == {
        "web": "10.102.0.2",
        "z": "10.102.0.3",
        "a": "10.102.0.4",
    }


def test_a_document_that_etcd_would_refuse_is_refused_before() -> None:
    labels = {f"label-{number}": "v" * 63 for number in range(20)}

    def edit(count: int) -> Edit:
        workloads = [{"name": f"w{one}", "unit": f"w{one}.service", "labels": labels} for one in range(13)]
        return lambda e, h: h.update(
            {
                f"h{number}": {
                    "isthmus_cluster": "onprem",
                    "ansible_host": f"198.18.3.{number}",
                    "isthmus_workloads": workloads,
                }
                for number in range(1, count + 1)
            }
        )

    (message,) = refused(edit(70))
    assert message == (
        "cluster onprem: its document in the estate record would have 1.44 MiB (73 hosts with 910 workloads), more "
        "than 1.25 MiB. Why: etcd refuses what is larger than 1.5 MiB. Next: spread its hosts over more clusters, "
        "shorten labels, or remove orphans."
    )
    document = replanned(edit(60)).record["clusters/onprem"]
    assert 1.1 * 2**20 < len(json.dumps(document, separators=(",", ":"))) <= 1.25 * 2**20


def test_a_roster_that_etcd_would_refuse_is_refused_before() -> None:
    def edit(e: dict[str, Any], h: dict[str, Any]) -> None:
        service = e["services"][0]
        e["services"] = [{**service, "name": f"{number:063}"} for number in range(11000)]

    (message,) = refused(edit)
    assert message.startswith("isthmus_estate: its document in the estate record would have ")
    assert "(2 clusters and 11001 services), more than 1.25 MiB" in message


def test_plan_of_nothing_yet() -> None:
    found = plan(model(), Record(), NOW, VERSION, "alice")
    assert found.record["roster"]["by"] == "alice"
    assert found.record["roster"]["when"] == "2026-01-02T03:04:05Z"
    assert found.record["roster"]["hash"] == model().digest()
    assert found.before == ""


def test_a_known_ca_certificate_is_kept() -> None:
    documents = copy.deepcopy(dict(planned(model()).record))
    documents["clusters/cloud"].update(ca_certificate="-----BEGIN CERTIFICATE-----", revision=2)
    found = plan(model(), merge([documents]), NOW, VERSION)
    assert found.record["clusters/cloud"] == documents["clusters/cloud"]
