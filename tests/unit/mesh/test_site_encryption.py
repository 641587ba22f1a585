# SPDX-License-Identifier: GPL-3.0-or-later
"""Encryption of pairs of sites in the inventory: who gets what, in which steps, and that no step cuts anybody off."""

from __future__ import annotations

import copy
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isthmus_agent.desired import addressing
from isthmus_mesh import ipsec, matrix, openings
from isthmus_mesh.encryption import STAGES, Keys, Stage, from_document, keys_of, pairs, rotation, to_document, way
from isthmus_mesh.model import Encryption, ModelError
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import Record, RecordError, merge
from isthmus_mesh.spec import NodeSpec
from unit.mesh.estates import NOW, VERSION, estate, hosts, model, planned

ON = {"encryption": "wireguard"}


def changed(
    previous: Plan | None = None, prune: tuple[str, ...] = (), more: Any = None, rotate: bool = False, **keys: Any
) -> Plan:
    """The plan of an inventory with other keys of the estate, `more` hosts, after `previous`."""
    the_hosts = {**hosts(), **(more or {})}
    record = Record() if previous is None else merge([dict(previous.record)])
    return plan(model({**estate(), **keys}, the_hosts), record, NOW, VERSION, "alice", prune=prune, rotate=rotate)


def after(found: Plan, number: int) -> Plan:
    """As the record stands when a step was begun: 0 is the plan's own."""
    record = found.record if number == 0 else found.steps[number - 1].record
    return Plan(**{**found.__dict__, "record": record})


def told_of(found: Plan) -> list[str]:
    return matrix.changes(found.sites, found.keys)


def wireguard(found: Plan) -> dict[str, Any]:
    return {host: spec.get("wireguard") for host, spec in found.specs.items()}


def test_an_estate_without_encryption_is_as_it_was() -> None:
    plain, said = planned(model()), changed(encryption="none", site_pairs=[{"sites": ["onprem", "cloud"]}])
    assert said.specs == plain.specs
    assert said.record == plain.record
    assert "encryption" not in said.record["roster"]
    assert not any("wireguard" in spec for spec in said.specs.values())
    assert (said.steps, said.stages) == ((), {})


@pytest.mark.parametrize(
    ("one", "other", "inside_one", "between"),
    [
        ("none", "none", "none", "none"),
        ("wireguard", "wireguard", "wireguard", "wireguard"),
        ("ipsec-gateway", "ipsec-gateway", "none", "ipsec-gateway"),
        ("none", "wireguard", "none", None),
        ("wireguard", "none", "wireguard", None),
        ("wireguard", "ipsec-gateway", "wireguard", None),
        ("ipsec-gateway", "none", "none", None),
    ],
)
def test_what_two_sites_use(one: str, other: str, inside_one: str, between: str | None) -> None:
    for said in (Encryption("none", {}, {"a": one, "b": other}), Encryption(one, {}, {"b": other})):
        assert said.of(("a", "a")) == inside_one
        assert said.of(("a", "b")) == between
    pairs_too = Encryption("none", {("a", "b"): "none", ("a", "a"): "wireguard"}, {"a": one, "b": other})
    assert (pairs_too.of(("a", "b")), pairs_too.of(("a", "a"))) == ("none", "wireguard")


@pytest.mark.parametrize("default", ["none", "wireguard"])
def test_sites_that_differ_are_refused_until_the_pair_is_said(default: str) -> None:
    said = {"none": "wireguard", "wireguard": "none"}[default]
    keys: dict[str, Any] = {"encryption": default, "sites": {"onprem": {"encryption": said}, "cloud": {}}}
    words = rf"isthmus_estate.encryption: the sides of cloud \(`{default}`\) and onprem \(`{said}`\) differ"
    with pytest.raises(ModelError, match=words):
        changed(**keys)
    for pair in ("none", "wireguard"):
        found = changed(**keys, site_pairs=[{"sites": ["cloud", "onprem"], "encryption": pair}])
        assert {tuple(row["sites"]): row["encryption"] for row in found.sites} == {
            ("cloud", "onprem"): pair,
            ("onprem", "onprem"): said,
        }
    # A pair that says how packets go says nothing of encryption.
    with pytest.raises(ModelError, match=words):
        changed(**keys, site_pairs=[{"sites": ["cloud", "onprem"], "routing": "tunnel"}])


def test_sites_that_agree_need_no_default() -> None:
    both = {"onprem": {"encryption": "wireguard"}, "cloud": {"encryption": "wireguard"}}
    assert changed(sites=both).specs == changed(**ON).specs


def test_a_site_of_orphans_only_is_not_weakened_by_the_default() -> None:
    """Its site is not in the inventory any more, so nobody can be asked to say what the pair uses."""
    other = {"x1": {"isthmus_cluster": "cloud", "ansible_host": "198.18.3.1", "isthmus_site": "branch"}}
    both = {"onprem": {"encryption": "wireguard"}, "cloud": {"encryption": "wireguard"}}
    found = changed(more=other, sites={**both, "branch": {"encryption": "wireguard"}})
    left = changed(found, sites=both)
    assert "host/x1" in left.orphans
    assert not any("branch" in spec["wireguard"]["plain_sites"] for spec in left.specs.values())


def test_a_new_estate_encrypts_from_the_first_packet() -> None:
    found = changed(**ON)
    assert found.steps == ()
    assert found.record["roster"]["encryption"] == {"all": "demands", "pairs": {}}
    sites = {"cloud": "cloud", "onprem": "onprem"}
    expected = {"key": "/etc/isthmus/pki/wireguard.key", "port": 51871, "plain_sites": [], "sites": sites}
    assert wireguard(found) == dict.fromkeys(("c1", "o1", "o2", "o3"), expected)
    again = changed(found, **ON)
    assert (again.record, again.specs, again.steps) == (found.record, found.specs, ())


def test_a_pair_says_otherwise_than_the_estate_and_a_site_may_be_a_pair() -> None:
    inside = changed(**ON, site_pairs=[{"sites": ["onprem", "onprem"], "encryption": "none"}])
    assert wireguard(inside)["o1"]["plain_sites"] == ["onprem"]
    assert wireguard(inside)["c1"]["plain_sites"] == []
    between = changed(site_pairs=[{"sites": ["onprem", "onprem"], "encryption": "wireguard"}])
    assert wireguard(between)["o1"]["plain_sites"] == ["cloud"]
    assert wireguard(between)["c1"] is None, "no pair of its site is encrypted"


def test_only_hosts_that_have_somebody_to_encrypt_with_get_wireguard() -> None:
    more = {"x1": {"isthmus_cluster": "onprem", "isthmus_site": "hall", "ansible_host": "198.18.9.1"}}
    found = changed(more=more, site_pairs=[{"sites": ["onprem", "cloud"], "encryption": "wireguard"}])
    assert {host for host, section in wireguard(found).items() if section} == {"c1", "o1", "o2", "o3"}
    assert wireguard(found)["c1"]["plain_sites"] == ["cloud", "hall"]


@pytest.mark.parametrize(
    ("now", "wanted", "stages"),
    [
        (None, 3, [3]),
        (None, 0, [0]),
        (0, 0, [0]),
        (3, 3, [3]),
        (0, 3, [1, 2, 3]),
        (1, 3, [1, 2, 3]),
        (2, 3, [2, 3]),
        (3, 0, [2, 1, 0]),
        (2, 0, [2, 1, 0]),
        (1, 0, [1, 0]),
    ],
)
def test_a_pair_goes_from_stage_to_stage(now: int | None, wanted: int, stages: list[int]) -> None:
    assert way(None if now is None else Stage(now), Stage(wanted)) == [Stage(number) for number in stages]


def test_a_running_estate_is_encrypted_in_three_steps_and_back() -> None:
    found = changed(planned(model()), **ON)
    assert [bool(step.proven) for step in found.steps] == [True, True]
    assert found.steps[0].waits == ("c1", "o1", "o2", "o3")
    records = [found.record, *(step.record for step in found.steps)]
    assert [record["roster"]["encryption"]["all"] for record in records] == ["accepts", "sends", "demands"]
    assert [record["roster"]["revision"] for record in records] == [2, 3, 4]
    assert wireguard(found)["c1"]["changing"] == {"cloud": "accepts", "onprem": "accepts"}
    assert found.steps[0].specs["c1"]["wireguard"]["changing"] == {"cloud": "sends", "onprem": "sends"}
    assert "changing" not in found.steps[1].specs["c1"]["wireguard"]
    assert found.steps[1].specs == changed(after(found, 2), **ON).specs
    NodeSpec.from_dict(found.specs["c1"])
    back = changed(after(found, 2))
    assert [bool(step.proven) for step in back.steps] == [False, False]
    stages = [record["roster"].get("encryption") for record in (back.record, *(step.record for step in back.steps))]
    assert stages == [{"all": "sends", "pairs": {}}, {"all": "accepts", "pairs": {}}, None]
    assert back.steps[1].specs == planned(model()).specs


def test_a_run_that_was_interrupted_completes_the_step_before_the_next() -> None:
    found = changed(planned(model()), **ON)
    again = changed(after(found, 0), **ON)
    assert (again.record, again.specs) == (found.record, found.specs)
    assert [step.record for step in again.steps] == [step.record for step in found.steps]
    given_up = changed(after(found, 1))
    assert given_up.record["roster"]["encryption"] == {"all": "sends", "pairs": {}}
    assert len(given_up.steps) == 2


def test_a_new_site_is_encrypted_at_once_and_the_others_are_not_changed() -> None:
    running = changed(**ON)
    more = {"x1": {"isthmus_cluster": "cloud", "isthmus_site": "hall", "ansible_host": "198.18.9.1"}}
    found = changed(running, more=more, **ON)
    assert found.steps == ()
    assert {host for host in running.specs if wireguard(found)[host] != wireguard(running)[host]} == set()


def test_an_orphan_keeps_its_sites_from_the_next_step() -> None:
    more = {"o9": {"isthmus_cluster": "onprem", "ansible_host": "198.18.1.9"}}
    found = changed(changed(more=more), **ON)
    assert "o9" not in found.specs
    assert "o9" in found.steps[0].waits


def test_the_roster_is_small_however_many_pairs_there_are() -> None:
    sites = [f"s{number}" for number in range(40)]
    stages = dict.fromkeys(pairs(sites), Stage.DEMANDS)
    assert to_document(stages) == {"all": "demands", "pairs": {}}
    stages[("s1", "s2")] = Stage.ACCEPTS
    document = to_document(stages)
    assert document == {"all": "demands", "pairs": {"s1 s2": "accepts"}}
    assert from_document(document, sites) == stages
    assert to_document(dict.fromkeys(pairs(sites), Stage.PLAIN)) is None


# --- keys are replaced

REPLACED = (Stage.ACCEPTS, Stage.SENDS, Stage.DEMANDS)


@pytest.mark.parametrize(
    ("now", "wanted", "following"),
    [
        (Keys(), False, [Keys()]),
        (Keys(1), False, [Keys(1)]),
        (Keys(), True, [*map(partial(Keys, 0), REPLACED), Keys(1)]),
        (Keys(1), True, [*map(partial(Keys, 1), REPLACED), Keys(0)]),
        (Keys(0, Stage.ACCEPTS), False, [*map(partial(Keys, 0), REPLACED), Keys(1)]),
        (Keys(1, Stage.SENDS), True, [*map(partial(Keys, 1), REPLACED[1:]), Keys(0)]),
        (Keys(1, Stage.DEMANDS), True, [Keys(1, Stage.DEMANDS), Keys(0)]),
    ],
)
def test_keys_go_from_stage_to_stage_and_are_completed(now: Keys, wanted: bool, following: list[Keys]) -> None:
    assert rotation(now, wanted) == following
    document = to_document({("a", "b"): Stage.DEMANDS}, now)
    assert keys_of(document) == now


def tunnels(section: dict[str, Any]) -> list[tuple[str, int]]:
    """Name of the key and port; the one that is sent through is the first."""
    return [(one["key"].rpartition("/")[2], one["port"]) for one in openings.tunnels({"wireguard": section})]


def test_keys_are_replaced_in_steps_of_all_hosts_that_encrypt() -> None:
    running = changed(**ON)
    found = changed(running, rotate=True, **ON)
    first, second, everybody = ("wireguard.key", 51871), ("wireguard-1.key", 51872), ("c1", "o1", "o2", "o3")
    specs = [found.specs, *(step.specs for step in found.steps)]
    for host in everybody:
        sections = [one[host]["wireguard"] for one in specs]
        assert [tunnels(one) for one in sections] == [[first, second], [second, first], [second], [second]]
        rest = [{key: one[key] for key in ("plain_sites", "sites")} for one in sections]
        assert rest == [rest[0]] * 4
        assert not any("changing" in one for one in sections)
        for one in specs:
            NodeSpec.from_dict(one[host])
    everybody = ("c1", "o1", "o2", "o3")
    assert [(step.waits, step.stages) for step in found.steps] == [(everybody, {})] * 3
    assert [step.proven for step in found.steps] == [everybody, everybody, ()]
    records = [found.record, *(step.record for step in found.steps)]
    assert [record["roster"]["encryption"].get("keys") for record in records] == [
        {"number": 0, "stage": "accepts"},
        {"number": 0, "stage": "sends"},
        {"number": 0, "stage": "demands"},
        {"number": 1},
    ]
    rotated = after(found, 3)
    assert changed(rotated, **ON).specs == found.steps[2].specs
    assert changed(rotated, **ON).steps == ()
    back = changed(rotated, rotate=True, **ON)
    assert tunnels(back.steps[1].specs["c1"]["wireguard"]) == [first]
    assert "keys" not in back.steps[2].record["roster"]["encryption"]


def test_keys_that_are_being_replaced_are_completed_by_the_next_run() -> None:
    found = changed(changed(**ON), rotate=True, **ON)
    for number, rotate in product((0, 1, 2), (False, True)):
        again = changed(after(found, number), rotate=rotate, **ON)
        assert again.record == after(found, number).record
        assert again.steps[-1].record["roster"]["encryption"] == found.steps[-1].record["roster"]["encryption"]


def test_no_host_keeps_the_old_key_wherever_a_run_ended() -> None:
    """A host makes the keys that it lacks, and keeps those that it has until they go: as it does by its spec."""
    running = changed(**ON)
    start = {host: {"wireguard.key": f"old {host}"} for host in running.specs}
    for stopped, served in product(range(4), range(len(start) + 1)):
        found, made = changed(running, rotate=True, **ON), copy.deepcopy(start)
        for run in (1, 2):
            for number, step in enumerate((found, *found.steps)):
                is_cut = run == 1 and number == stopped
                for host in sorted(start)[: served if is_cut else None]:
                    names = [name for name, _port in tunnels(step.specs[host]["wireguard"])]
                    made[host] = {name: made[host].get(name, f"made by run {run}") for name in names}
                if is_cut:
                    found = changed(after(found, number), rotate=True, **ON)
                    break
        left = {key for keys in made.values() for key in keys.values() if key.startswith("old ")}
        assert not left, f"a run that ended at step {stopped + 1} on {served} hosts, and another one"


def test_both_ports_are_open_while_keys_are_replaced_and_the_plan_says_so() -> None:
    running = changed(**ON)
    found = changed(running, rotate=True, **ON)
    ports = [one["port"] for one in found.sites[0]["open"] if one["protocol"] == "UDP"]
    assert ports == [51871, 51872]
    (told,) = told_of(found)
    assert told.startswith("the keys of WireGuard are replaced on all hosts that encrypt, in steps of one run")
    assert "(1) every host gets a second key, device and port (UDP 51872) beside the first (UDP 51871)" in told
    assert "(3) the old key, its device and its port (UDP 51871) go; (4) when no host has the old key any more" in told
    (told,) = told_of(changed(after(found, 1), **ON))
    assert "which was begun before (sends)" in told
    assert "(2) the old key" in told
    (told,) = told_of(changed(after(found, 2), **ON))
    assert "which was begun before (demands)" in told
    assert "(1) the old key, its device and its port (UDP 51871) go; (2)" in told
    rotated = changed(after(found, 3), **ON)
    assert [one["port"] for one in rotated.sites[0]["open"] if one["protocol"] == "UDP"] == [51872]
    assert told_of(rotated) == []
    assert "keys of WireGuard: new, number 0 is replaced by number 1; packets go with number 0" in found.changes


def test_keys_are_not_replaced_while_encryption_is_turned_on_or_off_or_is_off() -> None:
    for found in (changed(planned(model()), rotate=True, **ON), changed(rotate=True, **ON)):
        assert found.keys == (Keys(), Keys())
        assert any("the keys of WireGuard are not replaced by this run" in words for words in found.warnings)
    with pytest.raises(ModelError, match="no pair of sites of the inventory is encrypted"):
        changed(rotate=True)


@pytest.mark.parametrize(
    "encryption",
    [
        {"all": "soon", "pairs": {}},
        {"all": "demands"},
        {"all": "demands", "pairs": {"a b": "x"}},
        {"all": "demands", "pairs": {}, "keys": {"number": 2}},
        {"all": "demands", "pairs": {}, "keys": {"number": 1, "stage": "plain"}},
        [],
    ],
)
def test_a_record_with_a_stage_that_is_none_is_refused(encryption: Any) -> None:
    documents = copy.deepcopy(dict(planned(model()).record))
    documents["roster"]["encryption"] = encryption
    with pytest.raises(RecordError, match="encryption"):
        merge([documents])


# --- nobody is cut off


def understood(sender: Stage, receiver: Stage) -> bool:
    """What the agent does at a stage: see isthmus_agent.desired.encryption."""
    through_wireguard = sender >= Stage.SENDS
    return receiver >= Stage.ACCEPTS if through_wireguard else receiver <= Stage.SENDS


def stage_of(specs: dict[str, dict[str, Any]], host: str, other: str) -> Stage:
    return openings.encrypts(specs[host], site_of(other))


def site_of(host: str) -> str:
    return {"o": "onprem", "c": "cloud", "e": "edge"}[host[0]]


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "encryption": st.sampled_from(["none", "wireguard"]),
        "site_pairs": st.lists(
            st.fixed_dictionaries(
                {
                    "sites": st.lists(st.sampled_from(["onprem", "cloud", "edge"]), min_size=2, max_size=2).map(sorted),
                    "encryption": st.sampled_from(["none", "wireguard"]),
                }
            ),
            unique_by=lambda pair: tuple(pair["sites"]),
            max_size=3,
        ),
    }
)


def three_sites(keys: dict[str, Any]) -> Any:
    the_estate, the_hosts = estate(), hosts()
    the_hosts["e1"] = {"isthmus_cluster": "cloud", "isthmus_site": "edge", "ansible_host": "198.18.3.1"}
    return model({**the_estate, **keys}, the_hosts)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_two_hosts_ever_misunderstand_each_other(data: st.DataObject) -> None:
    """Whatever is turned on and off, wherever a run ends, in whatever order hosts are changed."""
    first = plan(three_sites(data.draw(CONFIGURATIONS)), Record(), NOW, VERSION)
    assert first.steps == ()
    record, specs = first.record, {host: dict(spec) for host, spec in first.specs.items()}
    for _ in range(data.draw(st.integers(1, 4))):
        wanted_model = three_sites(data.draw(CONFIGURATIONS))
        found = plan(wanted_model, merge([dict(record)]), NOW, VERSION)
        if data.draw(st.booleans()) and any(stages[-1] for stages in found.stages.values()):
            found = plan(wanted_model, merge([dict(record)]), NOW, VERSION, rotate=True)
        steps = [(found.record, found.specs, ()), *((step.record, step.specs, step.waits) for step in found.steps)]
        done = dict.fromkeys(specs, -1)
        for number, (record_of_step, wanted, waits) in enumerate(steps):
            if any(done[host] < number - 1 for host in waits):
                break
            record = record_of_step
            order = data.draw(st.permutations(sorted(specs)))
            for host in order[: data.draw(st.integers(0, len(order)))]:
                specs[host], done[host] = wanted[host], number
                for one, other in permutations(specs, 2):
                    sends, takes = stage_of(specs, one, other), stage_of(specs, other, one)
                    assert understood(sends, takes), (one, other, sends, takes)
                    if sends >= Stage.SENDS:
                        (_name, port), *_rest = tunnels(specs[one]["wireguard"])
                        assert port in [there for _name, there in tunnels(specs[other]["wireguard"])], (one, other)
        else:
            if all(number == len(steps) - 1 for number in done.values()) and not found.keys[-1].has_both:
                again = plan(wanted_model, merge([dict(record)]), NOW, VERSION)
                assert (again.steps, again.specs, again.record) == ((), specs, record)


# --- the matrix


def test_the_routes_that_hosts_set_are_told_with_their_tables() -> None:
    def told(**keys: Any) -> list[str]:
        the_model = model({**estate(), **keys})
        found = planned(the_model)
        documents = openings.documents_of(found.record)
        return matrix.host_routes(found.sites, documents, the_model.ipsec, found.ipsec, found.keys[-1])

    tables = f"in tables main and {addressing.TABLE}"
    onprem = "10.101.0.0/27, 10.101.0.32/28"
    assert told() == [
        f"hosts of cloud: {onprem} over isthmus0, {tables} (workloads of hosts of onprem)",
        f"hosts of onprem: 10.102.0.0/28 over isthmus0, {tables} (workloads of hosts of cloud)",
        f"hosts of onprem: {onprem} over isthmus0, {tables} (workloads of each other)",
    ]
    assert told(routing="native")[0].startswith(f"hosts of cloud: {onprem} over the way to each host's underlay")
    assert told(routing="native", encryption="wireguard")[0].startswith(f"hosts of cloud: {onprem} over isthmus-wg0,")
    gateways = {
        "sites": {
            "onprem": {"ipsec": {"networks": ["198.18.1.0/24"], "gateways": [{"host": "o1"}]}},
            "cloud": {"ipsec": {"networks": ["198.18.2.0/24"], "peer": {"address": "203.0.113.9"}}},
        },
        "site_pairs": [{"sites": ["onprem", "cloud"], "encryption": "ipsec-gateway"}],
    }
    assert [line for line in told(**gateways) if "behind the gateways" in line] == [
        f"hosts of onprem: 198.18.2.0/24 via 198.18.1.1, in table {addressing.IPSEC_TABLE} (networks of cloud behind "
        f"the gateways); on the gateway itself into the tunnel, in strongSwan's table {ipsec.ROUTING_TABLE}"
    ]
    # A site behind a gateway that is not ours need not have hosts.
    gateways["sites"] = {
        **gateways["sites"],
        "cloud": {},
        "office": {"ipsec": {"networks": ["198.18.9.0/24"], "peer": {"address": "203.0.113.9"}}},
    }
    gateways["site_pairs"] = [{"sites": ["onprem", "office"], "encryption": "ipsec-gateway"}]
    (line,) = [line for line in told(**gateways) if "behind the gateways" in line]
    assert line.startswith("hosts of onprem: 198.18.9.0/24 via 198.18.1.1, in table 736 (networks of office behind")


def test_twenty_sites_are_told_as_a_whole_and_of_many_more_where_the_rest_is() -> None:
    def told(count: int) -> tuple[list[str], list[str]]:
        more = {
            f"s{number}": {
                "isthmus_cluster": "onprem",
                "isthmus_site": f"site-{number}",
                "ansible_host": f"198.18.3.{number}",
            }
            for number in range(1, count + 1)
        }
        found, documents = changed(more=more), openings.documents_of(changed(more=more).record)
        led = matrix.host_routes(found.sites, documents, model().ipsec, found.ipsec, found.keys[-1])
        assert len(found.sites) == (count + 2) * (count + 1) // 2 + 1  # each two sites, and within onprem
        return matrix.lines(found.sites), led

    lines, led = told(18)
    assert (len(lines), len(led)) == (191, 381)
    lines, led = told(24)
    assert (len(lines), lines[-1]) == (301, "and 26 more pairs of sites, in `sites` of isthmus.mesh.plan")
    assert led[-1] == "and those for 26 more pairs of sites"


def test_the_matrix_says_what_is_open_and_how_large_packets_are() -> None:
    plain = planned(model()).sites
    assert [matrix.name(row["sites"]) for row in plain] == ["cloud and onprem", "within onprem"]
    assert matrix.lines(plain)[0] == (
        "cloud and onprem: path tunnel (VXLAN), encryption none, MTU 1450 inside where the underlay has 1500. Open: "
        "UDP 8472 on every host of cloud and onprem from each other; TCP 2379 on c1 (etcd of cloud) from etcd hosts of "
        "onprem; TCP 2379 on o1, o2, o3 (etcd of onprem) from etcd hosts of cloud"
    )
    assert "TCP 2379 on o1, o2, o3 (etcd of onprem) from hosts of onprem" in matrix.lines(plain)[1], "all are members"
    encrypted = changed(**ON).sites[0]
    assert (encrypted["encryption"], encrypted["mtu"], encrypted["steps"]) == ("wireguard", 1370, [])
    assert [(one["protocol"], one["port"]) for one in encrypted["open"]] == [
        ("UDP", 51871),
        ("TCP", 2379),
        ("TCP", 2379),
    ]
    assert matrix.lines(changed(**ON, overlay={"mtu": 1300}).sites)[0].count("MTU 1300") == 1


@pytest.mark.parametrize(
    ("keys", "inside"),
    [
        ({}, 1350),
        (ON, 1270),
        ({"routing": "native"}, 1400),
        ({**ON, "overlay": {"mtu": 1200}}, 1200),
    ],
    ids=["tunnel", "wireguard", "native", "overlay.mtu"],
)
def test_the_matrix_has_the_mtu_of_the_underlay_that_was_measured(keys: dict[str, Any], inside: int) -> None:
    rows = changed(**keys).sites
    found = matrix.measured(rows, {"onprem": ("o2", 1400), "cloud": ("c1", 9000)})
    assert {tuple(row["sites"]): (row["underlay"], row["mtu"]) for row in found} == {
        ("cloud", "onprem"): (1400, inside),
        ("onprem", "onprem"): (1400, inside),
    }
    (between, _within) = matrix.lines(found)
    assert f"MTU {inside} inside, 1400 outside (the least that was measured, on o2). Open" in between
    (between, within) = matrix.lines(matrix.measured(rows, {"cloud": ("c1", 9000)}))
    assert "9000 outside (the least that was measured, on c1; not measured: onprem)" in between
    assert "where the underlay has 1500" in within


def test_the_plan_says_what_turning_on_and_off_does() -> None:
    on = changed(planned(model()), **ON)
    assert {(one["protocol"], one["port"]) for one in on.sites[0]["open"]} >= {("UDP", 8472), ("UDP", 51871)}
    assert on.sites[0]["steps"] == ["accepts", "sends", "demands"]
    told = told_of(on)
    assert len(told) == 2
    assert told[0].startswith("encryption of cloud and onprem is turned on, in steps of one run, of which each begins")
    assert all(f"({number}) " in told[0] for number in (1, 2, 3))
    assert "larger than the new MTU" in told[0]
    begun = told_of(changed(after(on, 0), **ON))
    assert "turned on, which was begun before (accepts)" in begun[0]
    off = told_of(changed(after(on, 2)))
    assert "is turned off" in off[0]
    assert "MTU" not in off[0]
    assert told_of(planned(model())) == []


def test_the_changes_of_the_record_name_the_pairs() -> None:
    found = changed(planned(model()), **ON)
    assert [words for words in found.changes if "encryption" in words] == [
        "encryption between sites cloud and onprem: new, WireGuard is there; packets go in clear, encrypted ones are "
        "taken too",
        "encryption within site cloud: new, WireGuard is there; packets go in clear, encrypted ones are taken too",
        "encryption within site onprem: new, WireGuard is there; packets go in clear, encrypted ones are taken too",
    ]


def test_words_of_stages_are_all_known() -> None:
    assert set(STAGES) == {"plain", "accepts", "sends", "demands"}


def test_the_table_of_ports_in_the_docs_is_the_one_of_the_plan() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "ports.md").read_text()
    rows = [f"| {row.port} | {row.senders} | {row.to} | {row.why} |" for row in openings.TABLE]
    assert "\n".join(rows) in text
