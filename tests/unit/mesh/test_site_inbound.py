# SPDX-License-Identifier: GPL-3.0-or-later
"""Sites with `inbound: false`: which side opens sessions, what is dialled inside them, and what hosts need for that
before any etcd tells them anything."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from isthmus_mesh import matrix, openings
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import Record, RecordError, merge
from isthmus_mesh.spec import NodeSpec
from unit.mesh.estates import NOW, VERSION, estate, hosts, model

CLOSED = {"encryption": "wireguard", "sites": {"onprem": {}, "cloud": {"inbound": False}}}


def key(name: str) -> str:
    return base64.b64encode(name.encode().ljust(32, b".")).decode()


KEYS = {host: {"51871": key(host)} for host in ("c1", "o1", "o2", "o3", "o4")}
MORE = {"o4": {"isthmus_cluster": "onprem", "ansible_host": "198.18.1.4"}}


def found_of(
    previous: Plan | None = None, keys: Any = None, more: Any = None, rotate: bool = False, **said: Any
) -> Plan:
    record = Record() if previous is None else merge([dict(previous.record)])
    the_model = model({**estate(), **(said or CLOSED)}, {**hosts(), **(more or MORE)})
    return plan(the_model, record, NOW, VERSION, "alice", rotate=rotate, keys=keys)


def peers(found: Any, host: str) -> dict[str, dict[str, str]]:
    return {one["name"]: one["keys"] for one in found.specs[host]["wireguard"].get("bootstrap", ())}


def test_without_such_a_site_nothing_is_there() -> None:
    found = found_of(encryption="wireguard", sites={"onprem": {}, "cloud": {"inbound": True}})
    assert found.keyed == ()
    assert "closed" not in found.record["roster"]
    section = found.specs["c1"]["wireguard"]
    assert {"opens", "opened_by", "bootstrap"}.isdisjoint(section)


def test_hosts_inside_open_and_the_others_are_opened_by_them() -> None:
    found = found_of()
    assert found.keyed == ("c1", "o1", "o2", "o3"), "o4 carries no etcd: whoever needs its key has it from etcd"
    assert found.record["roster"]["closed"] == ["cloud"]
    inside, outside = found.specs["c1"]["wireguard"], found.specs["o4"]["wireguard"]
    assert (inside["opens"], inside.get("opened_by")) == (["onprem"], None)
    assert (outside.get("opens"), outside["opened_by"]) == (None, ["cloud"])
    assert "bootstrap" not in inside, "nobody's key is known yet"


def test_keys_that_were_found_are_laid_down_and_kept_in_the_record() -> None:
    found = found_of(found_of(), KEYS)
    assert peers(found, "c1") == {host: KEYS[host] for host in ("o1", "o2", "o3")}, "the etcd hosts of the others"
    for host in ("o1", "o2", "o3"):
        assert peers(found, host) == {"c1": KEYS["c1"]}
    assert peers(found, "o4") == {}
    spec = NodeSpec.from_dict(found.specs["o1"])
    assert spec.wireguard is not None
    (peer,) = spec.wireguard.bootstrap
    assert (peer.cluster, peer.cluster_id, peer.site) == ("cloud", 2, "cloud")
    assert str(peer.mesh4) == found.specs["c1"]["node"]["mesh4"]
    assert peer.keys == {51871: key("c1")}
    # A run that enters nobody lays down the same.
    again = found_of(found)
    assert (again.specs, again.record) == (found.specs, found.record)
    # A host that was made anew has another key.
    other = found_of(found, {"c1": {"51871": key("new")}})
    assert peers(other, "o1") == {"c1": {"51871": key("new")}}
    assert other.record["clusters/cloud"]["revision"] == found.record["clusters/cloud"]["revision"] + 1
    gone = found_of(found, encryption="wireguard")
    assert "public_keys" not in gone.record["clusters/cloud"]["hosts"]["c1"]


def test_each_etcd_is_read_by_its_address_inside_the_mesh_which_its_certificate_has() -> None:
    found = found_of()
    mesh = {host: spec["node"]["mesh4"] for host, spec in found.specs.items()}
    (peer,) = found.specs["o1"]["registrar"]["peers"]
    assert peer["endpoints"] == [f"https://{mesh['c1']}:2379"]
    (peer,) = found.specs["c1"]["registrar"]["peers"]
    assert peer["endpoints"] == [f"https://{mesh[host]}:2379" for host in ("o1", "o2", "o3")]
    for host in ("o1", "c1"):
        sans = {entry["name"]: entry["sans_ip"] for entry in found.specs[host]["pki"]["certificates"]}
        assert mesh[host] in sans["etcd-server"]
        assert mesh[host] not in sans["etcd-peer"]


def test_a_host_inside_of_a_cluster_whose_etcd_is_outside_reaches_it_through_the_mesh() -> None:
    more = {**MORE, "o9": {"isthmus_cluster": "onprem", "isthmus_site": "cloud", "ansible_host": "198.18.2.9"}}
    found = found_of(more=more)
    mesh = {host: spec["node"]["mesh4"] for host, spec in found.specs.items()}
    assert found.specs["o9"]["etcd"]["endpoints"] == [f"https://{mesh[host]}:2379" for host in ("o1", "o2", "o3")]
    assert found.specs["o4"]["etcd"]["endpoints"][0] == "https://198.18.1.1:2379", "within a site as before"
    keys = {**KEYS, "o9": {"51871": key("o9")}}
    known = found_of(found, keys, more=more)
    assert set(peers(known, "o1")) == {"c1", "o9"}
    assert set(peers(known, "o9")) == {"o1", "o2", "o3"}


def test_the_matrix_names_the_one_port_and_that_nothing_is_opened_inside() -> None:
    (row,) = [row for row in found_of().sites if row["sites"] == ["cloud", "onprem"]]
    assert row["open"] == [
        {
            "protocol": "UDP",
            "port": 51871,
            "on": "every host of onprem",
            "from": "hosts of cloud, from any address; nothing is opened at cloud",
        }
    ]
    assert any("from hosts of cloud, from any address" in line for line in matrix.lines(found_of().sites))


def test_firewalls_let_sessions_in_from_anywhere_outside_and_nothing_inside() -> None:
    found = found_of()

    def rules(host: str, outside: bool = False) -> list[tuple[str, int, str]]:
        return openings.rules(found.specs[host], found.record, outside)

    assert rules("c1") == [], "the only host of its site"
    # Within the site as before, of the other site nothing but WireGuard.
    assert [one for one in rules("o1") if one[:2] == ("udp", 51871)] == [("udp", 51871, "0.0.0.0/0")]
    assert {source for _protocol, _port, source in rules("o1")} == {
        "0.0.0.0/0",
        *(f"198.18.1.{number}" for number in (2, 3, 4)),
    }
    assert ("tcp", 2379, "198.18.2.1") not in rules("o1", outside=True)


def test_while_encryption_is_turned_on_the_ports_of_before_stay_open() -> None:
    plain = found_of(encryption="none")
    found = found_of(plain)
    assert len(found.steps) == 2
    (row,) = [row for row in found.sites if row["sites"] == ["cloud", "onprem"]]
    assert {(one["protocol"], one["port"]) for one in row["open"]} >= {("UDP", 8472), ("UDP", 51871)}
    first = openings.rules(found.specs["c1"], found.record)
    assert ("udp", 8472, "198.18.1.1") in first
    assert ("udp", 51871, "198.18.1.1") not in first
    last = found.steps[-1]
    assert openings.rules(last.specs["c1"], last.record) == []


def test_both_keys_are_laid_down_while_keys_are_replaced_and_the_old_one_goes() -> None:
    running = found_of(found_of(), KEYS)
    both = {host: {**keys, "51872": key(f"{host} new")} for host, keys in KEYS.items()}
    found = found_of(running, both, rotate=True)
    assert [peers(one, "o1")["c1"] for one in (found, *found.steps)] == [
        both["c1"],
        both["c1"],
        {"51872": key("c1 new")},
        {"51872": key("c1 new")},
    ]
    last = found.steps[-1].record
    assert last["clusters/cloud"]["hosts"]["c1"]["public_keys"] == {"51872": key("c1 new")}
    assert last["clusters/cloud"]["revision"] > found.record["clusters/cloud"]["revision"]
    recorded = Plan(**{**found.__dict__, "record": last})
    new = {host: {"51872": keys["51872"]} for host, keys in both.items()}
    again = found_of(recorded, new)
    assert (again.record, again.specs, again.steps) == (last, found.steps[-1].specs, ())


def found_without(cluster: str, previous: Plan, sites: Any, prune: tuple[str, ...] = ()) -> Plan:
    """With an inventory that lacks a cluster and its hosts."""
    the_estate = {**estate(), "encryption": "wireguard", "sites": sites}
    del the_estate["clusters"][cluster]
    known = {name: entry for name, entry in {**hosts(), **MORE}.items() if entry["isthmus_cluster"] != cluster}
    return plan(model(the_estate, known), merge([dict(previous.record)]), NOW, VERSION, "alice", prune)


def test_a_site_of_which_the_inventory_has_nothing_any_more_stays_so_while_its_hosts_run() -> None:
    running = found_of(found_of(), KEYS)
    found = found_without("cloud", running, {"onprem": {}})
    assert found.orphans == ("cluster/cloud",)
    assert found.record["roster"]["closed"] == ["cloud"]
    for host in ("o1", "o4"):
        assert found.specs[host] == running.specs[host]
    gone = found_without("cloud", found, {"onprem": {}}, ("cluster/cloud",))
    assert "closed" not in gone.record["roster"]
    assert "public_keys" not in gone.record["clusters/onprem"]["hosts"]["o1"]
    again = found_without("cloud", gone, {"onprem": {}})
    assert (again.record, again.specs) == (gone.record, gone.specs)


@pytest.mark.parametrize(
    ("lacks", "sites", "site", "orphan"),
    [
        ("cloud", {"onprem": {"inbound": False}}, "onprem", "c1"),
        ("onprem", {"onprem": {"inbound": False}, "cloud": {"inbound": False}}, "cloud", "o4"),
    ],
)
def test_a_site_where_only_orphans_are_and_another_one_cannot_both_be_so(
    lacks: str, sites: Any, site: str, orphan: str
) -> None:
    with pytest.raises(ModelError) as caught:
        found_without(lacks, found_of(found_of(), KEYS), sites)
    assert [str(problem) for problem in caught.value.problems] == [
        f"isthmus_estate.sites.{site}.inbound: false, as of {lacks}, where host {orphan} of cluster {lacks} is, which "
        "the record knows and the inventory lacks. Why: what is absent from the inventory still runs, and neither side "
        f"could open a session to the other. Next: take `inbound: false` from {site}, or remove that cluster with "
        f"isthmus_prune=cluster/{lacks}."
    ]


def test_a_key_that_is_none_is_refused_with_the_record() -> None:
    record: Any = found_of(found_of(), KEYS).record
    record["clusters/cloud"]["hosts"]["c1"]["public_keys"] = {"51871": "short"}
    with pytest.raises(RecordError, match=r"public_keys.51871 has 3 bytes|public_keys.51871 is not base64"):
        merge([dict(record)])
