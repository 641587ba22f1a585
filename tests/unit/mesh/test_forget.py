# SPDX-License-Identifier: GPL-3.0-or-later
"""What the planner makes of machines that are lost: they go at once, and come back only when they hold nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from isthmus_mesh.forgetting import Forget
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import Plan
from isthmus_mesh.record import RecordError, merge
from unit.mesh.estates import NOW, estate, hosts, model, planned

Edit = Callable[[dict[str, Any], dict[str, Any]], object]
LATER = NOW + timedelta(hours=1)
ENTRY = {"at": "2026-01-02T04:04:05Z", "by": "alice"}


def running(**lists: str) -> Plan:
    """The estate as it stands when every cluster's etcd has run; `lists` are CRLs by cluster."""
    found = planned(model())
    documents = copy.deepcopy(dict(found.record))
    for name, document in documents.items():
        if name.startswith("clusters/"):
            document["ca_certificate"] = "PEM"
            if document["name"] in lists:
                document["crl"] = lists[document["name"]]
    return replace(found, record=documents)


def forget(*names: str, before: Plan | None = None, edit: Edit | None = None, **more: Any) -> Plan:
    the_estate, the_hosts = estate(), hosts()
    if edit is not None:
        edit(the_estate, the_hosts)
    return planned(model(the_estate, the_hosts), before or running(), LATER, forget=Forget(names=names, **more))


def without_o3(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
    the_estate["clusters"]["onprem"]["etcd"]["hosts"].remove("o3")
    del the_hosts["o3"]


def nothing(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
    """No edit."""


@pytest.mark.parametrize("edit", [nothing, without_o3], ids=["in the inventory", "not in it"])
@pytest.mark.parametrize("name", ["o3", "host/o3", " o3 "])
def test_a_lost_host_goes_with_all_it_had(edit: Edit, name: str) -> None:
    before = running()
    plan = forget(name, before=before, edit=edit)
    onprem = plan.record["clusters/onprem"]
    assert "o3" not in plan.specs
    assert "o3" not in onprem["hosts"]
    assert onprem["etcd"]["members"] == ["o1", "o2"]
    assert onprem["released"] == [
        {"address": before.record["clusters/onprem"]["hosts"]["o3"]["range4"], "owner": "o3", "at": ENTRY["at"]}
    ]
    assert onprem["forgotten"] == {"o3": ENTRY}
    assert onprem["revision"] == before.record["clusters/onprem"]["revision"] + 1
    assert plan.removed == ("host/o3", "member/onprem/o3")
    assert plan.forgotten == {"o3": {"cluster": "onprem", **ENTRY}}
    # Its certificates are those of its own authority, and those of peers for the registrar.
    assert plan.revocations == (
        {"cluster": "cloud", "ca_host": "c1", "hosts": ["o3"], "departed": [], "names": []},
        {"cluster": "onprem", "ca_host": "o1", "hosts": ["o3"], "departed": [], "names": []},
    )
    # Nobody dials it any more: it may answer with what it likes.
    assert "198.18.1.3" not in json.dumps(dict(plan.specs))
    assert plan.record["clusters/cloud"] == before.record["clusters/cloud"]


def test_what_is_forgotten_stays_so_while_the_inventory_has_it() -> None:
    first = forget("o3")
    again = planned(model(), first, LATER)
    assert again.record == first.record
    assert "o3" not in again.specs
    assert again.forgotten == first.forgotten
    assert any(
        "host o3 was forgotten at 2026-01-02T04:04:05Z by alice and takes no part" in line for line in again.warnings
    )
    assert planned(model(), first, LATER, forget=Forget(names=["o3"])).record == first.record


def test_the_lists_go_into_the_record_and_stay() -> None:
    plan = forget("o3", lists={"cloud": "CRL of cloud", "onprem": "CRL of onprem"})
    assert [plan.record[f"clusters/{name}"]["crl"] for name in ("cloud", "onprem")] == ["CRL of cloud", "CRL of onprem"]
    assert [plan.record[f"clusters/{name}"]["revision"] for name in ("cloud", "onprem")] == [2, 2]
    assert planned(model(), plan, LATER).record == plan.record
    assert any(line.startswith("revoked certificates of cluster cloud: new") for line in plan.changes)


def test_a_host_without_anything_is_joined_anew_elsewhere() -> None:
    """Its old addresses are still kept back."""
    first = forget("o3", lists={"onprem": "CRL"})
    plan = planned(model(), first, LATER, forget=Forget(clean=["o3"]))
    onprem = plan.record["clusters/onprem"]
    assert "forgotten" not in onprem
    assert onprem["crl"] == "CRL"
    assert onprem["etcd"]["members"] == ["o1", "o2", "o3"]
    assert onprem["hosts"]["o3"]["range4"] not in [entry["address"] for entry in onprem["released"]]
    assert plan.forgotten == {}
    assert plan.revocations == ()


def test_a_name_that_is_given_counts_more_than_what_was_seen() -> None:
    first = forget("o3")
    assert "o3" not in planned(model(), first, LATER, forget=Forget(names=["o3"], clean=["o3"])).specs


def test_a_host_that_is_clean_and_in_no_inventory_stays_forgotten() -> None:
    plan = forget(before=forget("o3"), edit=without_o3, clean=("o3", "o1"))
    assert plan.forgotten == {"o3": {"cluster": "onprem", **ENTRY}}


def test_a_lost_cluster_goes_with_its_hosts_and_rights() -> None:
    plan = forget("cluster/cloud", lists={"onprem": "CRL"})
    assert plan.record["clusters/cloud"] == {
        "schema": 1, "name": "cloud", "id": 2, "state": "absent", "forgotten": {"c1": ENTRY}, "revision": 2,
        "released": [{"address": "10.102.0.0/28", "owner": "c1", "at": ENTRY["at"]}],
        "last_applied": plan.record["clusters/cloud"]["last_applied"],
    }  # fmt: skip
    assert set(plan.specs) == {"o1", "o2", "o3"}
    assert plan.specs["o1"]["pki"]["trust"] == ["onprem"]
    assert plan.specs["o1"]["registrar"]["peers"] == []
    [revocation] = plan.revocations
    assert revocation == {
        "cluster": "onprem", "ca_host": "o1", "hosts": ["c1"], "departed": [], "names": ["remote-cloud"]
    }  # fmt: skip
    assert plan.record["roster"]["services"]["shop/web"]["clusters"] == ["onprem"]
    again = planned(model(), plan, LATER)
    assert again.record == plan.record


def test_what_a_cluster_takes_away_that_goes_is_told_also_when_it_has_lost_a_host_before() -> None:
    before = forget("o3")
    the_estate, the_hosts = estate(), hosts()
    the_estate["clusters"]["onprem"]["state"] = "absent"
    (cut, *_others) = planned(model(the_estate, the_hosts), before, LATER).cuts
    assert cut.startswith("cluster/onprem: the others forget its 2 hosts (o1, o2), and it them.")
    assert planned(model(the_estate, the_hosts), running(), LATER, forget=Forget(names=("cluster/onprem",))).cuts == ()


def test_a_lost_cluster_is_joined_anew_with_another_authority_and_etcd() -> None:
    before = running()
    plan = planned(model(), forget("cloud", before=before), LATER, forget=Forget(clean=["c1"]))
    cloud = plan.record["clusters/cloud"]
    assert (cloud["state"], cloud["ca_certificate"], cloud["ca_host"]) == ("present", None, "c1")
    assert cloud["etcd"]["token"] != before.record["clusters/cloud"]["etcd"]["token"]
    assert "forgotten" not in cloud


def test_the_rest_of_a_lost_cluster_begins_without_the_stolen_authority() -> None:
    first = forget("onprem")
    assert set(planned(model(), first, LATER, forget=Forget(clean=[])).specs) == {"c1"}
    plan = planned(model(), first, LATER, forget=Forget(clean=["o2", "o3"]))
    assert set(plan.specs) == {"c1", "o2", "o3"}
    onprem = plan.record["clusters/onprem"]
    assert (onprem["ca_host"], onprem["etcd"]["members"]) == ("o2", ["o2", "o3"])
    assert onprem["forgotten"] == {"o1": ENTRY}

    def pinned(the_estate: dict[str, Any], _: object) -> None:
        the_estate["clusters"]["onprem"]["ca_host"] = "o1"

    assert set(forget(before=first, edit=pinned, clean=("o2", "o3")).specs) == {"c1"}


def test_hosts_of_a_cluster_that_the_inventory_lacks_go_with_it() -> None:
    def without_cloud(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        del the_estate["clusters"]["cloud"], the_hosts["c1"]

    plan = forget("cloud", edit=without_cloud)
    assert plan.record["clusters/cloud"]["forgotten"] == {"c1": ENTRY}
    # The list of an authority that only the record knows is kept too.
    listed = forget("o3", edit=without_cloud, lists={"cloud": "CRL"})
    assert listed.record["clusters/cloud"]["crl"] == "CRL"
    assert listed.orphans == ("cluster/cloud",)


REFUSED: list[tuple[str, str]] = [
    ("o1", "isthmus_forget=o1: it keeps the key of cluster onprem's certificate authority"),
    ("c1", "isthmus_forget=c1: the etcd of cluster cloud would have no member left"),
    ("o9", "isthmus_forget=o9: the estate record has neither a host nor a cluster of that name"),
    ("member/onprem/o3", "neither a host nor a cluster of that name"),
]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_what_cannot_be_forgotten_is_refused_with_the_way_out(name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        forget(name)
    assert message in str(caught.value)
    assert "cluster/cloud" in str(caught.value) or name != "c1"


def test_a_host_and_a_cluster_of_one_name_are_told_apart() -> None:
    def twins(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_hosts["cloud"] = {"isthmus_cluster": "onprem", "ansible_host": "198.18.1.77"}

    the_estate, the_hosts = estate(), hosts()
    twins(the_estate, the_hosts)
    before = planned(model(the_estate, the_hosts))
    with pytest.raises(ModelError, match="it can mean cluster/cloud or host/cloud"):
        forget("cloud", before=before, edit=twins)
    assert forget("host/cloud", before=before, edit=twins).removed == ("host/cloud",)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda doc: doc.update(forgotten=["o3"]), "forgotten"),
        (lambda doc: doc.update(forgotten={"o3": {"at": "yesterday", "by": "alice"}}), "forgotten.o3.at"),
        (lambda doc: doc.update(crl=7), "crl"),
    ],
)
def test_a_damaged_record_is_not_built_on(edit: Callable[[dict[str, Any]], object], message: str) -> None:
    documents = copy.deepcopy(dict(forget("o3").record))
    edit(documents["clusters/onprem"])
    with pytest.raises(RecordError, match=message):
        merge([documents])


def without_member(host: str, state: str = "absent") -> Edit:
    def edit(the_estate: dict[str, Any], the_hosts: dict[str, Any]) -> None:
        the_estate["clusters"]["onprem"]["etcd"]["hosts"].remove(host)
        the_hosts[host]["isthmus_state"] = state

    return edit


def owed(plan: Plan) -> dict[str, list[str]]:
    """By cluster, whose certificates its authority has still to revoke."""
    found = {name: plan.record[f"clusters/{name}"].get("departed", []) for name in ("onprem", "cloud")}
    assert {one["cluster"]: one["departed"] for one in plan.revocations} == {
        name: hosts for name, hosts in found.items() if hosts
    }
    return found


def test_what_a_removed_etcd_host_holds_is_owed_until_each_authority_has_revoked_it() -> None:
    """It has certificates of names that other hosts have too. A host without etcd has none of these."""
    removed = forget(edit=without_member("o3"))
    assert owed(removed) == {"onprem": ["o3"], "cloud": ["o3"]}
    assert [one["hosts"] for one in removed.revocations] == [["o3"], ["o3"]]
    # Known to the next run, also when the inventory has lost it.
    again = forget(before=removed, edit=without_o3)
    assert owed(again) == owed(removed)
    assert again.record["clusters/onprem"]["revision"] == removed.record["clusters/onprem"]["revision"]
    done = forget(before=removed, edit=without_o3, lists={"cloud": "LIST"})
    assert owed(done) == {"onprem": ["o3"], "cloud": []}
    assert done.record["clusters/cloud"]["crl"] == "LIST"
    assert owed(forget(before=done, edit=without_o3)) == owed(done)


def test_nothing_is_owed_of_a_host_that_is_back_or_forgotten_or_stays_without_its_member() -> None:
    removed = forget(edit=without_member("o3"))
    assert owed(forget(before=removed)) == {"onprem": [], "cloud": []}
    lost = forget("o3", before=running())
    assert {name: doc.get("departed") for name, doc in lost.record.items()} == dict.fromkeys(lost.record)
    pruned = planned(model(*edited(without_member("o3", "present"))), running(), LATER, prune=("member/onprem/o3",))
    assert owed(pruned) == {"onprem": [], "cloud": []}


def edited(edit: Edit) -> tuple[dict[str, Any], dict[str, Any]]:
    the_estate, the_hosts = estate(), hosts()
    edit(the_estate, the_hosts)
    return the_estate, the_hosts


def test_nothing_is_owed_of_a_cluster_that_goes_as_a_whole() -> None:
    def absent(the_estate: dict[str, Any], _hosts: dict[str, Any]) -> None:
        the_estate["clusters"]["cloud"]["state"] = "absent"

    assert "departed" not in forget(edit=absent).record["clusters/onprem"]
