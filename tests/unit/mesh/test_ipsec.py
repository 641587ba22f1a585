# SPDX-License-Identifier: GPL-3.0-or-later
"""IPsec between gateways of sites in the inventory: what is refused, who gets what, in which steps, and what strongSwan
and netfilter are given."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bpf.topology import wait_for
from isthmus_agent.desired import addressing
from isthmus_mesh import ipsec, matrix, openings
from isthmus_mesh.encryption import Stage
from isthmus_mesh.forgetting import Forget
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import Plan
from isthmus_mesh.record import RecordError, merge
from isthmus_mesh.spec import NodeSpec, SpecError
from unit.mesh.estates import estate, hosts, model, planned
from unit.mesh.test_inventory_docs import ROOT, inventory

SITES = {
    "onprem": {"ipsec": {"networks": ["198.18.1.0/24"], "gateways": [{"host": "o1"}]}},
    "cloud": {"ipsec": {"networks": ["198.18.2.0/24"], "gateways": [{"host": "c1"}]}},
}
ON = {"sites": SITES, "site_pairs": [{"sites": ["onprem", "cloud"], "encryption": "ipsec-gateway"}]}
PEER = {
    "sites": {**SITES, "cloud": {"ipsec": {"networks": ["198.18.2.0/24"], "peer": {"address": "203.0.113.9"}}}},
    "site_pairs": ON["site_pairs"],
}
WITH_TWO_OF_OTHERS = {
    "sites": {
        **PEER["sites"],
        "office": {"ipsec": {"networks": ["192.0.2.0/24"], "peer": {"address": "203.0.113.10"}}},
    },
    "site_pairs": [{**ON["site_pairs"][0], "sites": ["onprem", other]} for other in ("cloud", "office")],
}
CLUSTERS = estate()["clusters"]


def changed(previous: Plan | None = None, more: Any = None, **keys: Any) -> Plan:
    return planned(model({**estate(), **keys}, {**hosts(), **(more or {})}), previous)


def after(found: Plan, number: int) -> Plan:
    """As the record stands when a step was begun: 0 is the plan's own."""
    record = found.record if number == 0 else found.steps[number - 1].record
    return Plan(**{**found.__dict__, "record": record})


def site(name: str, **section: Any) -> dict[str, Any]:
    """ON with another `ipsec` of a site."""
    return {**ON, "sites": {**SITES, name: {"ipsec": {**SITES[name]["ipsec"], **section}}}}


SITES_WITH_ANOTHER = site("cloud", gateways=[{"host": "c1"}])

REFUSED = {
    "no gateway": ({**ON, "sites": {**SITES, "cloud": {}}}, "sites.cloud.ipsec: it is missing, and a pair of cloud"),
    "not a host": (site("cloud", gateways=[{"host": "c2"}]), "'c2' is not a host of the mesh. Why: a gateway is"),
    "of another site": (site("cloud", gateways=[{"host": "o1"}]), "host o1 is at site onprem"),
    "a third gateway": (
        site("onprem", gateways=[{"host": "o1"}, {"host": "o2"}, {"host": "o3"}]),
        "sites.onprem.ipsec.gateways: it names 3 gateways. Why: one carries the site, and a second one takes over",
    ),
    "a gateway twice": (
        site("onprem", gateways=[{"host": "o1"}, {"host": "o1"}]),
        "sites.onprem.ipsec.gateways: host o1 is named twice",
    ),
    "two at one address": (
        site("onprem", gateways=[{"host": "o1", "address": "203.0.113.1"}, {"host": "o2", "address": "203.0.113.1"}]),
        "sites.onprem.ipsec.gateways: o1 and o2 are both reached at 203.0.113.1",
    ),
    "a second of another site": (
        site("onprem", gateways=[{"host": "o1"}, {"host": "c1"}]),
        "sites.onprem.ipsec.gateways[1].host: host c1 is at site cloud",
    ),
    "another's second at the first's": (
        {**PEER, "sites": {**SITES, "cloud": {"ipsec": {"networks": ["198.18.2.0/24"], "peer": {
            "address": "203.0.113.9", "second": {"address": "203.0.113.9"}}}}}},
        "sites.cloud.ipsec.peer.second.address: 203.0.113.9 is the first one's",
    ),
    "ours and not ours": (site("cloud", peer={"address": "203.0.113.9"}), "it has both gateways and peer"),
    "neither": (site("cloud", gateways=[]), "it has neither gateways nor peer"),
    "host outside": (
        site("onprem", networks=["198.18.1.2/31", "198.18.3.0/24"]),
        "sites.onprem.ipsec.networks: o1 (198.18.1.1) would be outside the tunnel",
    ),
    "host of a third site inside": (
        {**PEER, "sites": {**PEER["sites"], "edge": {}}, "clusters": {**CLUSTERS, "cloud": {
            **CLUSTERS["cloud"], "site": "edge"}}},
        "host c1.isthmus_underlay: 198.18.2.1 lies in 198.18.2.0/24 (isthmus_estate.sites.cloud.ipsec.networks). Why: "
        "packets to it would go to the gateway of cloud, and the host is at edge",
    ),
    "overlap": (
        site("onprem", networks=["198.18.0.0/16"]),
        "sites.cloud.ipsec.networks: 198.18.2.0/24 and 198.18.0.0/16 (isthmus_estate.sites.onprem.ipsec.networks)",
    ),
    "the mesh's own": (
        site("onprem", networks=["198.18.1.0/24", "10.101.4.0/24"]),
        "10.101.4.0/24 and 10.101.0.0/16 (isthmus_estate.clusters.onprem.workload_ranges) overlap",
    ),
    "inside a site": (
        {**ON, "site_pairs": [{"sites": ["cloud", "cloud"], "encryption": "ipsec-gateway"}]},
        "ipsec-gateway is between two sites, and cloud is one",
    ),
    "native": ({**ON, "routing": "native"}, "cloud and onprem would be native and go through gateways"),
    "certificate with another's": (
        {**PEER, "site_pairs": [{**ON["site_pairs"][0], "ipsec_authentication": "certificate"}]},
        "authentication by certificate with a gateway that is not ours is not yet supported",
    ),
    "two of others": (
        {**PEER, "sites": dict.fromkeys(("cloud", "onprem"), PEER["sites"]["cloud"])},
        "neither cloud nor onprem has a gateway that is ours",
    ),
    "one identity": (
        {**WITH_TWO_OF_OTHERS, "sites": {**WITH_TWO_OF_OTHERS["sites"], "office": {"ipsec": {
            "networks": ["192.0.2.0/24"], "peer": {"address": "203.0.113.10", "id": "203.0.113.9"}}}}},
        "sites.office.ipsec.peer: the gateways of cloud (203.0.113.9) and office (203.0.113.10) have one identity, "
        "203.0.113.9. Why: onprem has tunnels with both, and strongSwan finds their keys by the identity: the one "
        "would be tried with the key of the other. Next: give that of office an identity of its own",
    ),
    "the identity of ours": (
        {"sites": {**SITES, "a": {"ipsec": {"networks": ["192.0.2.0/24"], "peer": {
            "address": "203.0.113.10", "id": "isthmus-ipsec-c1"}}}}, "site_pairs": [
            {**ON["site_pairs"][0], "sites": ["onprem", other]} for other in ("cloud", "a")]},
        "sites.a.ipsec.peer: the gateways of cloud (198.18.2.1) and a (203.0.113.10) have one identity, "
        "isthmus-ipsec-c1",
    ),
    "identity": (
        {**PEER, "sites": {**SITES, "cloud": {"ipsec": {"networks": ["198.18.2.0/24"], "peer": {
            "address": "203.0.113.9", "id": "a } secrets {"}}}}},
        "sites.cloud.ipsec.peer.id: 'a } secrets {' is not an identity of IKE",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_in_words(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        model({**estate(), **keys})
    assert any(words in str(problem) for problem in caught.value.problems), caught.value


def test_a_host_that_is_dialled_elsewhere_cannot_be_behind_a_gateway() -> None:
    the_hosts = hosts()
    the_hosts["o2"]["isthmus_advertise"] = "203.0.113.2"
    with pytest.raises(ModelError, match="o2 would be reached through gateways and have another isthmus_advertise"):
        model({**estate(), **ON}, the_hosts)


def test_an_estate_without_gateways_is_as_it_was() -> None:
    plain = planned(model())
    assert not any("ipsec" in found for found in plain.specs.values())
    assert "ipsec" not in plain.record["roster"]
    assert plain.ipsec == {}
    declared = changed(sites=SITES)
    assert declared.specs == plain.specs, "a gateway that no pair uses does nothing"


def test_hosts_get_the_gateway_and_gateways_a_connection_with_a_certificate() -> None:
    found = changed(**ON)
    assert found.steps == ()
    host, gateway = found.specs["o2"], found.specs["o1"]
    far = {"cloud": {"stage": "demands", "networks": ["198.18.2.0/24"]}}
    sites = {"cloud": "cloud", "onprem": "onprem"}
    assert host["ipsec"] == {"sites": sites, "networks": ["198.18.1.0/24"], "far": far, "via": "198.18.1.1"}
    assert gateway["ipsec"]["connections"] == [
        {
            "site": "cloud",
            "local": "198.18.1.1",
            "local_id": "isthmus-ipsec-o1",
            "remote": "198.18.2.1",
            "remote_id": "isthmus-ipsec-c1",
            "local_networks": ["198.18.1.0/24"],
            "remote_networks": ["198.18.2.0/24"],
            "authentication": "certificate",
            "begins": False,
            "ours": True,
            "inside": "198.18.2.1",
            "certificate": "/etc/isthmus/pki/ipsec.crt",
            "ca": "/etc/isthmus/pki/trust/cloud.crt",
        }
    ]
    assert "via" not in gateway["ipsec"]
    assert found.specs["c1"]["ipsec"]["connections"][0]["begins"], "one end alone begins"
    (certificate,) = [one for one in gateway["pki"]["certificates"] if one["name"] == "ipsec"]
    assert (certificate["cn"], certificate["sans_dns"]) == ("isthmus-ipsec-o1", ["isthmus-ipsec-o1"])
    assert "cloud" in gateway["pki"]["trust"]
    assert not any(one["name"] == "ipsec" for one in host["pki"]["certificates"])
    read = NodeSpec.from_dict(host).ipsec
    assert read is not None
    assert (str(read.via), read.stage("cloud"), read.stage("onprem")) == ("198.18.1.1", Stage.DEMANDS, Stage.PLAIN)
    with pytest.raises(SpecError, match="stage"):
        NodeSpec.from_dict({**host, "ipsec": {**host["ipsec"], "far": {"cloud": {"stage": "x", "networks": []}}}})


TWO = {
    **ON,
    "sites": {
        "onprem": {"ipsec": {"networks": ["198.18.1.0/24"], "gateways": [{"host": "o2"}, {"host": "o1"}]}},
        "cloud": {"ipsec": {"networks": ["198.18.2.0/24"], "gateways": [{"host": "c1"}, {"host": "c2"}]}},
    },
}
MORE = {"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}}


def test_of_two_gateways_each_has_a_tunnel_with_each_and_hosts_know_both() -> None:
    found = changed(more=MORE, **TWO)
    both = [
        {"cluster": "onprem", "host": "o2", "underlay": "198.18.1.2"},
        {"cluster": "onprem", "host": "o1", "underlay": "198.18.1.1"},
    ]
    host = found.specs["o3"]["ipsec"]
    assert (host["via"], host["gateways"]) == ("198.18.1.2", both), "first the one that the inventory names first"
    for name in ("o1", "o2"):
        gateway = found.specs[name]["ipsec"]
        assert gateway["gateways"] == both
        assert "via" not in gateway
        assert [(ipsec.name_of(one), one["remote"], one["begins"]) for one in gateway["connections"]] == [
            ("isthmus-cloud", "198.18.2.1", False),
            ("isthmus-cloud_2", "198.18.2.2", False),
        ]
    text = ipsec.swanctl_conf(found.specs["c2"]["ipsec"]["connections"])
    assert "  isthmus-onprem {\n" in text
    assert "  isthmus-onprem_2 {\n" in text
    (row,) = [one for one in found.sites if one["sites"] == ["cloud", "onprem"]]
    pairs = {(one["on"][:2], one["from"][:2]) for one in row["open"] if one["port"] == 4500}
    assert len(pairs) == 8, "both ways between all of them"
    assert ("udp", 500, "198.18.2.2") in openings.rules(found.specs["o1"], found.record)
    read = NodeSpec.from_dict(found.specs["o1"]).ipsec
    assert read is not None
    assert [one.host for one in read.gateways] == ["o2", "o1"]
    assert [one.host for one in read.others] == ["o2"]
    assert {site: [str(one) for one in there] for site, there in read.inside.items()} == {
        "cloud": ["198.18.2.1", "198.18.2.2"]
    }
    assert (str(read.local), read.via) == ("198.18.1.1", None)
    (route,) = [one for one in found.routes if one["site"] == "onprem"]
    assert route["via"] == "198.18.1.2"
    assert route["why"].endswith("; when o2 is lost, via 198.18.1.1")


def test_with_two_gateways_nothing_leaves_but_into_a_tunnel_or_to_one_of_them() -> None:
    found = changed(more=MORE, **TWO)
    host = ipsec.guard(found.specs["o3"]["ipsec"]) or ""
    assert "ip daddr @far rt ip nexthop != { 198.18.1.1, 198.18.1.2 } counter drop" in host, "as nft lists it"
    gateway = (ipsec.guard(found.specs["o1"]["ipsec"]) or "").splitlines()
    leaves = [line.strip() for line in gateway[gateway.index("  chain leaves {") :]]
    assert leaves.index("ip daddr @far rt ip nexthop 198.18.1.2 accept") < leaves.index(
        "ip daddr @far icmp type { 3, 11, 12 } counter drop"
    )
    assert leaves.index("ip daddr @far rt ip nexthop 198.18.1.2 accept") < leaves.index(
        "ip saddr @near ip daddr @far counter drop"
    )
    assert "ip saddr @far ip daddr 198.18.1.1 accept" in leaves, "what the other one passes on to it"
    alone = ipsec.guard(changed(**ON).specs["o1"]["ipsec"]) or ""
    assert "nexthop" not in alone
    assert "ip saddr @far ip daddr 198.18.1.1 accept" not in alone


def test_a_second_gateway_comes_and_goes_without_a_change_of_the_first_s_tunnel() -> None:
    one = {**TWO, "sites": {**TWO["sites"], "onprem": {"ipsec": {**TWO["sites"]["onprem"]["ipsec"], "gateways": [
        {"host": "o2"}]}}}}  # fmt: skip
    running = changed(more=MORE, **one)
    found = changed(running, more=MORE, **TWO)
    assert found.steps == ()
    before, after_it = (each.specs["c1"]["ipsec"]["connections"] for each in (running, found))
    assert after_it[: len(before)] == before
    assert [ipsec.name_of(each) for each in after_it] == ["isthmus-onprem", "isthmus-onprem_2"]


def test_a_change_that_interrupts_a_running_pair_is_told() -> None:
    interrupted = (
        "gateways of site onprem: nothing passes its tunnels from when the first gateway at the ends of each has the "
        "change until the second one has it"
    )
    running = changed(**ON)
    assert "gateways of site onprem: new, o1 (198.18.1.1), for 198.18.1.0/24" in running.changes
    assert changed(running, **ON).changes == ()
    wider = changed(running, **site("onprem", networks=["198.18.1.0/24", "198.18.7.0/24"]))
    assert wider.changes == (
        "gateways of site onprem: o1 (198.18.1.1), for 198.18.1.0/24, 198.18.7.0/24 "
        "(was o1 (198.18.1.1), for 198.18.1.0/24)",
        interrupted,
    )
    another = changed(running, **site("onprem", gateways=[{"host": "o2"}]))
    assert another.changes[1:] == (interrupted,)
    second = changed(running, **site("onprem", gateways=[{"host": "o1"}, {"host": "o2"}]))
    assert second.changes == (
        "gateways of site onprem: o1 (198.18.1.1), o2 (198.18.1.2), for 198.18.1.0/24 "
        "(was o1 (198.18.1.1), for 198.18.1.0/24)",
    ), "that interrupts nothing"
    swapped = changed(second, **site("onprem", gateways=[{"host": "o2"}, {"host": "o1"}]))
    assert swapped.changes[1:] == (interrupted,)
    off = changed(running, sites=SITES)
    assert "gateways of site onprem: removed (was o1 (198.18.1.1), for 198.18.1.0/24)" in off.changes
    assert changed(after(off, len(off.steps)), sites=SITES).changes == ()


@pytest.mark.parametrize(
    ("gateways", "words"),
    [
        ({"onprem": {"gateways": ["o1 (198.18.1.1)"]}}, r"gateways\.onprem\.networks is missing"),
        ({"onprem": {"gateways": [1], "networks": []}}, r"gateways\.onprem\.gateways is not a list of strings"),
        (["onprem"], r"gateways is not an object"),
    ],
)
def test_a_record_whose_gateways_are_damaged_is_refused(gateways: Any, words: str) -> None:
    record = dict(changed(**ON).record)
    record["roster"] = {**record["roster"], "gateways": gateways}
    with pytest.raises(RecordError, match=words):
        merge([record])


def test_one_of_two_gateways_that_is_forgotten_leaves_the_other() -> None:
    running = changed(more=MORE, **TWO)
    the_model = model({**estate(), **TWO}, {**hosts(), **MORE})
    found = planned(the_model, running, forget=Forget(["c2"]))
    gateway = found.specs["o1"]["ipsec"]
    assert [one["remote"] for one in gateway["connections"]] == ["198.18.2.1"]
    assert "198.18.2.2" not in (ipsec.guard(gateway) or "")
    assert "gateways" not in found.specs["c1"]["ipsec"]


def test_a_gateway_that_carries_no_etcd_trusts_the_other_sides_authority() -> None:
    more = {"c7": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.7"}}
    found = changed(more=more, **site("cloud", gateways=[{"host": "c7", "address": "203.0.113.7"}]))
    assert found.specs["c7"]["pki"]["trust"] == ["cloud", "onprem"]
    assert found.specs["c7"]["ipsec"]["connections"][0]["local"] == "198.18.2.7"
    assert found.specs["o1"]["ipsec"]["connections"][0]["remote"] == "203.0.113.7"


def test_a_running_pair_is_led_to_the_gateways_in_three_steps_and_back() -> None:
    found = changed(planned(model()), **ON)
    records = [found.record, *(step.record for step in found.steps)]
    pairs = [record["roster"]["ipsec"]["pairs"]["cloud onprem"] for record in records]
    assert pairs == ["accepts", "sends", "demands"]
    assert found.steps[0].waits == ("c1", "o1", "o2", "o3")
    assert [bool(step.proven) for step in found.steps] == [True, True]
    assert found.specs["o2"]["ipsec"]["far"]["cloud"]["stage"] == "accepts"
    (words,) = matrix.changes(found.sites, found.keys)
    assert "encryption by gateways of cloud and onprem is turned on, in steps of one run" in words
    back = changed(after(found, 2), sites=SITES)
    stages = [record["roster"].get("ipsec") for record in (back.record, *(step.record for step in back.steps))]
    assert [one and one["pairs"] for one in stages] == [{"cloud onprem": "sends"}, {"cloud onprem": "accepts"}, None]
    assert back.specs["o1"]["ipsec"]["connections"] == found.specs["o1"]["ipsec"]["connections"]
    assert "ipsec" not in back.steps[1].specs["o1"]


def test_gateways_are_known_until_the_last_step_of_turning_off() -> None:
    running = changed(**ON)
    with pytest.raises(ModelError, match=r"sites.cloud.ipsec: it is missing, and the tunnel between the gateways"):
        changed(running, sites={"onprem": SITES["onprem"], "cloud": {}})


def test_from_wireguard_to_gateways_each_step_is_encrypted() -> None:
    wireguard = {"sites": SITES, "site_pairs": [{"sites": ["onprem", "cloud"], "encryption": "wireguard"}]}
    found = changed(changed(**wireguard), **ON)
    stages = [found.specs["o1"], *(step.specs["o1"] for step in found.steps)]
    told = [
        (one.get("wireguard", {}).get("changing", {}).get("cloud", "plain"), one["ipsec"]["far"]["cloud"]["stage"])
        for one in stages
    ]
    assert told == [("sends", "accepts"), ("accepts", "sends"), ("plain", "demands")]


def test_the_matrix_has_the_smaller_mtu_and_the_gateways_ports() -> None:
    (_inside, row) = sorted(changed(**ON).sites, key=lambda one: one["sites"] != ["onprem", "onprem"])
    assert (row["encryption"], row["mtu"]) == ("ipsec-gateway", 1350)
    opened = [(one["protocol"], one["port"], one["on"], one["from"]) for one in row["open"]]
    assert ("UDP", 4500, "o1 (198.18.1.1)", "c1 (198.18.2.1)") in opened
    assert ("UDP", 500, "c1 (198.18.2.1)", "o1 (198.18.1.1)") in opened
    assert ("UDP", 8472, "every host of cloud and onprem", "each other (inside the gateways' tunnel)") in opened
    found = changed(**ON)
    assert ("udp", 4500, "198.18.2.1") in openings.rules(found.specs["o1"], found.record)
    assert not any(port == 4500 for _protocol, port, _source in openings.rules(found.specs["o2"], found.record))


def test_gateways_begin_with_sites_of_which_they_had_no_tunnel_before() -> None:
    before = changed()
    found = changed(before, **ON)
    gateway, other = found.specs["c1"], found.specs["o1"]
    (connection,) = ipsec.begun(gateway, before.specs["c1"])
    assert ipsec.begun(gateway, {}) == [connection]
    assert ipsec.other_end(connection) == {"host": "o1", "address": "198.18.1.1"}
    assert [ipsec.other_end(one)["host"] for one in ipsec.begun(other, before.specs["o1"])] == ["c1"]
    assert ipsec.begun(gateway, gateway) == []
    assert {("udp", 500), ("udp", 4500)} <= set(openings.listens(gateway))
    assert not {("udp", 500), ("udp", 4500)} & set(openings.listens(before.specs["c1"]))
    # A second gateway of a site that has a tunnel: what it sends goes over the first one.
    two = changed(after(found, 2), **site("onprem", gateways=[{"host": "o1"}, {"host": "o2"}]))
    assert two.specs["o2"]["ipsec"]["connections"]
    assert ipsec.begun(two.specs["o2"], found.steps[-1].specs["o2"]) == []
    assert ipsec.begun(two.specs["c1"], found.steps[-1].specs["c1"]) == []


def test_a_gateway_that_is_not_ours_is_told_to_its_engineer() -> None:
    found = model({**estate(), **PEER}, {**hosts()})
    (words,) = ipsec.other_sides(found.ipsec)
    for part in (
        "gateway of cloud (203.0.113.9): IKEv2 with 198.18.1.1",
        "identity 203.0.113.9 here, isthmus-ipsec-o1 (FQDN) there",
        "isthmus_ipsec_secrets has for 'cloud onprem'",
        "group 20",
        "here 198.18.2.0/24; there 198.18.1.0/24",
    ):
        assert part in words
    specs = changed(**PEER).specs
    (connection,) = specs["o1"]["ipsec"]["connections"]
    assert (connection["authentication"], connection["secret"], connection["begins"]) == ("psk", "cloud onprem", True)
    assert "via" not in specs["c1"]["ipsec"], "there the network leads to the gateway"
    assert ipsec.guard(specs["c1"]["ipsec"]) is None
    assert not any(one["name"] == "ipsec" for one in specs["o1"]["pki"]["certificates"])


def test_two_gateways_of_others_have_a_tunnel_each_with_each_of_ours() -> None:
    peer = {"address": "203.0.113.9", "id": "vpn.example.com", "second": {"address": "203.0.113.10"}}
    keys = {**TWO, "sites": {**TWO["sites"], "cloud": {"ipsec": {"networks": ["198.18.2.0/24"], "peer": peer}}}}
    told = ipsec.other_sides(model({**estate(), **keys}, hosts()).ipsec)
    assert [words[: words.index(", which begins")] for words in told] == [
        "gateway of cloud (203.0.113.9): IKEv2 with 198.18.1.2",
        "gateway of cloud (203.0.113.9): IKEv2 with 198.18.1.1",
        "gateway of cloud (203.0.113.10): IKEv2 with 198.18.1.2",
        "gateway of cloud (203.0.113.10): IKEv2 with 198.18.1.1",
    ]
    assert all("one of 4 tunnels" in words and "first of all one with 198.18.1.2" in words for words in told)
    connections = changed(**keys).specs["o1"]["ipsec"]["connections"]
    assert [(one["remote"], one["remote_id"]) for one in connections] == [
        ("203.0.113.9", "vpn.example.com"),
        ("203.0.113.10", "203.0.113.10"),
    ]
    assert not any("inside" in one for one in connections)
    keys = ipsec.pre_shared(connections, {"cloud onprem": "one key"})
    secrets = ipsec.secrets_conf(connections, {name: [key] for name, key in keys.items()}) or ""
    assert "ike-isthmus-cloud {" in secrets
    assert "ike-isthmus-cloud_2 {" in secrets
    # Of one identity at two addresses each key would be one of the other tunnel too.
    same = [{**one, "remote_id": "vpn.example.com"} for one in connections]
    assert ipsec.pre_shared(same, {"cloud onprem": "one key"}) == {"isthmus-cloud": "one key"}
    assert ipsec.sharing(same, same[1]) == ["isthmus-cloud", "isthmus-cloud_2"]


def test_strongswan_s_routes_come_after_the_mesh_s_own() -> None:
    """What a gateway's workloads send to a host of another site is the mesh's before it is the tunnel's."""
    assert f"routing_table_prio = {ipsec.RULE_PRIORITY}" in ipsec.strongswan_conf()
    assert addressing.RULE_PRIORITY < addressing.IPSEC_RULE_PRIORITY < ipsec.RULE_PRIORITY
    assert ipsec.RULE_PRIORITY < addressing.SIBLING_RULE_PRIORITY
    assert addressing.STRONGSWAN_RULE_PRIORITY < addressing.IPSEC_RULE_PRIORITY


def test_strongswan_is_given_the_pair_and_secrets_stay_apart() -> None:
    connections = changed(**PEER).specs["o1"]["ipsec"]["connections"]
    text = ipsec.swanctl_conf(connections)
    for line in (
        "  isthmus-cloud {",
        "    proposals = aes256gcm16-prfsha384-ecp384",
        "        local_ts = 198.18.1.0/24",
        "        remote_ts = 198.18.2.0/24",
        "        start_action = none",
        "        close_action = start",
        "    keyingtries = 0",
    ):
        assert line in text.splitlines()
    assert text.count("{") == text.count("}")
    with pytest.raises(KeyError, match="cloud onprem"):
        ipsec.pre_shared(connections, {})
    key = 'a "b" }\n'
    secrets = ipsec.secrets_conf(connections, {"isthmus-cloud": [key]})
    assert secrets is not None
    assert "secret = 0sYSAiYiIgfQo=" in secrets, "whatever is in it"
    assert ipsec.keys_of(secrets) == {"isthmus-cloud": [key]}
    both = ipsec.secrets_conf(connections, {"isthmus-cloud": [key, "another"]}) or ""
    assert both.index("ike2-isthmus-cloud {") < both.index("ike-isthmus-cloud {"), "what is read last is used"
    assert ipsec.keys_of(both) == {"isthmus-cloud": [key, "another"]}
    assert ipsec.keys_of(both.replace("0sYSAi", "0s?")) == {"isthmus-cloud": ["another"]}, "somebody changed it"
    certified = changed(**ON).specs["o1"]["ipsec"]["connections"]
    assert ipsec.secrets_conf(certified, {}) is None
    trial = ipsec.trial_conf(connections[0], {}, [key], "/etc/swanctl/swanctl.conf", 2)
    assert trial.startswith("include /etc/swanctl/swanctl.conf\nconnections {\n  try-isthmus-cloud {\n")
    assert (trial.count("secret = 0sYSAiYiIgfQo="), "children" in trial) == (2, False), "no other key, and no tunnel"
    several = ipsec.secrets_conf(connections, {"isthmus-cloud": [key, "another", "a third"]}) or ""
    assert ipsec.keys_of(several) == {"isthmus-cloud": [key, "another", "a third"]}
    trial = ipsec.trial_conf(connections[0], {}, [key], "/etc/swanctl/swanctl.conf", 3)
    assert ipsec.keys_of(trial) == {"isthmus-cloud": [key] * 3}, "none of those that are known"
    assert "secrets {" not in ipsec.trial_conf(certified[0], {}, [], "/etc/swanctl/swanctl.conf")
    passive = ipsec.swanctl_conf(certified)
    assert "cacerts = isthmus-cloud.pem\n" in passive
    assert "cacerts = isthmus-cloud.pem,isthmus-cloud.1.pem\n" in ipsec.swanctl_conf(certified, {"cloud": 2})
    assert "close_action = none" in passive


def test_the_end_that_begins_asks_for_its_tunnels_when_strongswan_begins() -> None:
    found = changed(**ON).specs
    assert "swanctl" not in ipsec.begin_script(found["o1"]["ipsec"]["connections"])
    assert ipsec.begin_script(found["c1"]["ipsec"]["connections"]).splitlines()[-1] == (
        "swanctl --initiate --child net --ike isthmus-onprem --timeout -1"
    )


def test_with_esp_in_the_kernel_each_of_two_tunnels_has_its_own_way_in() -> None:
    """As the kernel has one policy for the same networks and interface, and it names one of the gateways."""
    gateway = changed(more=MORE, **TWO).specs["o1"]["ipsec"]
    text = ipsec.swanctl_conf(gateway["connections"], kernel=True)
    assert re.findall(r"if_id_in = (\d+)", text) == ["73", "74"]
    assert re.findall(r"if_id_out = (\d+)", text) == ["73", "73"], "what is sent goes by the newest of them"
    assert text.count("set_mark_out = 0x53") == 2
    assert "if_id" not in ipsec.swanctl_conf(gateway["connections"])
    assert "load = no" in ipsec.strongswan_conf(kernel=True)
    assert "allow_peer_ts" not in ipsec.strongswan_conf(kernel=True)
    rules = ipsec.guard(gateway) or ""
    assert 'iifname "ipsec0" accept' in rules
    assert 'iifname "isthmus-ipsec1" accept' in rules
    alone = ipsec.guard(changed(**ON).specs["o1"]["ipsec"]) or ""
    assert "isthmus-ipsec1" not in alone


def test_the_table_that_is_kept_has_the_same_rules_and_comes_second() -> None:
    found = changed(more=MORE, **TWO)
    for host, kernel in (("o1", False), ("o1", True), ("o3", False)):
        text = ipsec.guard(found.specs[host]["ipsec"]) or ""
        kept = ipsec.kept(text, kernel)
        assert kept.count("  flags owner;\n") == 1
        assert f"table ip {ipsec.KEPT} {{\n  flags owner;\n" in kept
        assert not re.search(rf"\b{ipsec.GUARD}(?!-kept)\b", kept)
        assert [int(number) for number in re.findall(r"priority (\S+);", kept)] == [
            int(number) + 1 for number in re.findall(r"priority (\S+);", text)
        ]
        rules = [line for line in kept.splitlines() if line.endswith((" drop", " accept"))]
        wanted = [line for line in text.splitlines() if line.endswith((" drop", " accept"))]
        assert rules == wanted + [f"insert rule ip {ipsec.KEPT} leaves {ipsec.ENCRYPTED}"] * kernel


def test_the_program_that_keeps_it_is_one_that_python_reads() -> None:
    text = ipsec.keeper_program("/etc/isthmus/x")
    compile(text, "x", "exec")
    assert "# usage: /etc/isthmus/x FILE\n" in text


def test_the_interfaces_script_is_one_that_bash_reads() -> None:
    text = ipsec.interfaces_script(changed(more=MORE, **TWO).specs["o1"]["ipsec"], "/etc/isthmus/x")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "# usage: /etc/isthmus/x begin | end | follow\n" in text
    for line in (
        "ip link add ipsec0 type xfrm dev lo if_id 73",
        "ip link add isthmus-ipsec1 type xfrm dev lo if_id 74",
        "ip link set ipsec0 mtu 1400 addrgenmode none",
    ):
        assert f"    {line}\n" in text
    assert "dev ipsec0 proto static src 198.18.1.1 table 220 ||" in text
    assert '($2 == "0x49" || $2 == "0x4a")' in text


_IP = """\
#!/bin/bash
# Stands for `ip` of a kernel that does ESP. What there is is in files.
cd "{place}"
case "$*" in
    "xfrm policy list dir out") cat policies ;;
    "xfrm monitor policy") exec tail -n 0 -f --pid "$PPID" events ;;
    "route show table 220 dev ipsec0"*) cat routes ;;
    "route replace "*)
        [ ! -e refused ] || {{ echo refused >> said; exit 2; }}
        echo "${{3%/32}} scope link src 198.18.1.1" >> routes ;;
    "route delete "*) sed -i "\\|^${{3%/32}} |d" routes ;;
    *) echo "not known: $*" >> said; exit 1 ;;
esac
"""
_POLICY = "src 198.18.1.0/24 dst {} \n\tdir out priority 375423 ptype main \n\tif_id {}\n"


def test_routes_come_and_go_with_the_policies_of_the_kernel(tmp_path: Path) -> None:
    """Those of other tunnels of strongSwan are not ours, and what failed is tried again."""
    text = ipsec.interfaces_script(changed(more=MORE, **TWO).specs["o1"]["ipsec"], "x")
    for name, content in (("x", text), ("ip", _IP.format(place=tmp_path))):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    for name in ("policies", "events", "routes", "said"):
        (tmp_path / name).touch()
    (tmp_path / "refused").touch()

    def has(*networks: str) -> bool:
        return sorted(line.split()[0] for line in (tmp_path / "routes").read_text().splitlines()) == sorted(networks)

    def happens(policies: str) -> None:
        (tmp_path / "policies").write_text(policies)
        with (tmp_path / "events").open("a") as events:
            events.write("an event\n")

    path = f"{tmp_path}:{os.environ['PATH']}"
    follower = subprocess.Popen([tmp_path / "x", "follow"], env={**os.environ, "PATH": path}, start_new_session=True)
    try:
        both = _POLICY.format("198.18.2.0/24", "0x49") + _POLICY.format("203.0.113.7/32", "0x49")
        all_of_them = both + _POLICY.format("192.0.2.0/24", "0x7")
        happens(all_of_them)
        wait_for(lambda: "refused" in (tmp_path / "said").read_text(), "the first routes are tried", 15)
        (tmp_path / "refused").unlink()
        happens(all_of_them)
        wait_for(lambda: has("198.18.2.0/24", "203.0.113.7"), "a route for each network of ours", 15)
        happens(_POLICY.format("198.18.2.0/24", "0x49"))
        wait_for(lambda: has("198.18.2.0/24"), "the other one's goes", 15)
        (tmp_path / "routes").write_text("")
        wait_for(lambda: has("198.18.2.0/24"), "one that somebody took away comes again, without an event", 15)
        happens("")
        wait_for(has, "and the last one goes", 15)
        assert "not known" not in (tmp_path / "said").read_text()
    finally:
        os.killpg(follower.pid, signal.SIGKILL)
        follower.wait(10)


def test_a_gateway_that_was_stolen_is_trusted_no_more_and_what_it_led_to_stays_closed() -> None:
    more = {"c7": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.7"}}
    keys = site("cloud", gateways=[{"host": "c7"}])
    running = changed(more=more, **keys)
    found = planned(model({**estate(), **keys}, {**hosts(), **more}), running, forget=Forget(["c7"]))
    assert "c7" not in found.specs
    gateway = found.specs["o1"]["ipsec"]
    assert (gateway["local"], gateway["connections"]) == ("198.18.1.1", [])
    assert "ip saddr @near ip daddr @far counter drop" in (ipsec.guard(gateway) or "")
    assert "udp" not in (ipsec.guard(gateway) or "")
    assert "198.18.2.7" in (ipsec.guard(found.specs["c1"]["ipsec"]) or ""), "nor by another way from its own site"
    other = changed(found, **SITES_WITH_ANOTHER)
    assert other.specs["o1"]["ipsec"]["connections"][0]["remote"] == "198.18.2.1"


def test_only_with_the_last_step_something_is_closed() -> None:
    found = changed(planned(model()), **ON)
    steps = [found.specs, *(step.specs for step in found.steps)]
    closed = [[ipsec.guard(specs[host]["ipsec"]) is not None for host in ("o1", "o2")] for specs in steps]
    assert closed == [[False, False], [False, False], [True, True]]
    gateway = ipsec.guard(steps[2]["o1"]["ipsec"]) or ""
    assert 'oifname "ipsec0" accept' in gateway
    assert "ip saddr @far ip daddr @near counter drop" in gateway
    host = ipsec.guard(steps[2]["o2"]["ipsec"]) or ""
    assert "ip daddr @far rt ip nexthop != 198.18.1.1 counter drop" in host


def test_machines_that_are_none_of_the_mesh_are_told_the_way_over_the_gateways() -> None:
    found = planned(model())
    assert matrix.route_lines(found.routes) == []
    on = changed(found, **ON)
    assert matrix.route_lines(on.routes) == [
        "routers of cloud: 198.18.1.0/24 via 198.18.2.1 (networks of onprem behind the gateways, for machines of cloud "
        "that are none of the mesh)",
        "routers of onprem: 198.18.2.0/24 via 198.18.1.1 (networks of cloud behind the gateways, for machines of "
        "onprem that are none of the mesh)",
    ]
    (theirs,) = changed(**PEER).routes
    assert (theirs["site"], theirs["to"]) == ("onprem", "198.18.2.0/24"), "what is not ours is others' to lead to"
    gone = changed(after(on, 2), sites=SITES).routes
    assert {route["via"] for route in gone} == {"198.18.1.1", "198.18.2.1"}, "while it is turned off"


def test_a_site_of_others_without_hosts_is_in_the_matrix() -> None:
    found = changed(**WITH_TWO_OF_OTHERS)
    assert [row["sites"] for row in found.sites if "office" in row["sites"]] == [["office", "onprem"]]
    (line,) = [line for line in matrix.lines(found.sites) if "office" in line]
    assert line == (
        "office and onprem: path native, encryption ipsec-gateway, MTU 1400 inside where the underlay has 1500. Open: "
        + "; ".join(
            f"UDP {port} on {to} from {sender}"
            for to, sender in (
                ("the gateway of office (203.0.113.10)", "o1 (198.18.1.1)"),
                ("o1 (198.18.1.1)", "the gateway of office (203.0.113.10)"),
            )
            for port in (500, 4500)
        )
    )
    (row,) = [row for row in matrix.measured(found.sites, {"onprem": ("o1", 1450)}) if "office" in row["sites"]]
    assert (row["mtu"], row["measured"]) == (1350, ["onprem"])
    the_model, documents = model({**estate(), **WITH_TWO_OF_OTHERS}), openings.documents_of(found.record)
    routes = matrix.host_routes(found.sites, documents, the_model.ipsec, found.ipsec, found.keys[-1])
    assert [line.partition(" via ")[0] for line in routes if "office" in line] == ["hosts of onprem: 192.0.2.0/24"]


def test_the_example_s_data_centres_send_each_other_all_through_their_gateways() -> None:
    """And nothing else of it does: the internet is passed inside WireGuard, networks of its own in clear."""
    found = planned(model(*inventory(ROOT / "inventories" / "hybrid_example")))
    ways = {tuple(row["sites"]): (row["routing"], row["encryption"]) for row in found.sites}
    assert ways.pop(("dub1", "fra1")) == ("tunnel", "ipsec-gateway")
    assert {sites for sites, way in ways.items() if way == ("native", "none")} == {("dub1", "dub1"), ("fra1", "fra1")}
    assert {sites for sites, way in ways.items() if way == ("tunnel", "none")} == {("fra1", "fra2"), ("fra2", "fra2")}
    assert {way for sites, way in ways.items() if not {"fra1", "fra2", "dub1"}.issuperset(sites)} == {
        ("tunnel", "wireguard")
    }
    for host, gateway, far in (("fra-web-1", "192.0.2.5", "dub1"), ("dub-1", "198.51.100.5", "fra1")):
        assert found.specs[host]["ipsec"]["via"] == gateway
        assert set(found.specs[host]["ipsec"]["far"]) == {far}
        assert len(found.specs[host]["ipsec"]["gateways"]) == 2
    for gateway in ("fra-gw-1", "fra-gw-2"):
        connections = found.specs[gateway]["ipsec"]["connections"]
        assert [(one["remote"], one["authentication"]) for one in connections] == [
            ("198.51.100.5", "certificate"),
            ("198.51.100.6", "certificate"),
        ]
    assert "wireguard" in found.specs["fra-gw-1"], "to the other sites"
