# SPDX-License-Identifier: GPL-3.0-or-later
"""Pairs of sites with `routing: auto`: what a run tries, what the proofs of hosts decide, and what then stays."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isthmus_mesh import auto, matrix
from isthmus_mesh.auto import Verdict
from isthmus_mesh.encryption import Pair, Stage
from isthmus_mesh.openings import documents_of
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import Record, RecordError, merge
from isthmus_mesh.routing import Routing
from unit.mesh.estates import NOW, VERSION, estate, hosts, model, planned
from unit.mesh.test_ipsec import ON as GATEWAYS
from unit.mesh.test_site_routing import (
    DECRYPTING,
    ENCRYPTED,
    ENCRYPTING,
    INTO_WIREGUARD,
    ON,
    OUT_OF_IT,
    TUNNEL,
    after,
    at_each,
    changed,
    is_inside,
    native,
    understood,
)
from unit.mesh.test_site_routing import (
    INSIDE as NATIVE_INSIDE,
)

AUTO = {"routing": "auto"}
ENCRYPTED_BETWEEN = {"site_pairs": [{"sites": ["cloud", "onprem"], "encryption": "wireguard"}]}
BETWEEN, INSIDE = ("cloud", "onprem"), ("onprem", "onprem")
C1 = {"cluster": "cloud", "site": "cloud", "mesh4": "10.102.0.1"}
ONPREM = {f"o{n}": {"cluster": "onprem", "site": "onprem", "mesh4": f"10.101.0.{16 * n - 15}"} for n in (1, 2, 3)}
WORKS = Verdict(True)
FAILS = Verdict(False, ("c1", "o2"), "no answer to 3 packets of 1500 bytes")
OPEN = Verdict(None, (), "o3 did not answer")


def site(
    previous: Plan | None,
    *proofs: dict[Pair, Verdict],
    more: Any = None,
    again: bool = False,
    pods: dict[str, list[str]] | None = None,
    **keys: Any,
) -> Plan:
    """The plan of a run that has made these proofs so far."""
    wanted = model({**estate(), **AUTO, **keys}, {**hosts(), **(more or {})})
    record = Record() if previous is None else merge([dict(previous.record)])
    return plan(wanted, record, NOW, VERSION, "alice", try_native=again, proofs=proofs, pods=pods)


def to_the_end(found: Plan) -> Plan:
    return after(found, len(found.steps))


def stages(found: Plan) -> list[dict[str, str]]:
    """Of c1 and o1 after each step: with which sites they are at which stage."""
    specs = [native(one) for one in (found.specs, *(step.specs for step in found.steps))]
    return [{f"{host} {other}": one[host][other] for host in ("c1", "o1") for other in one[host]} for one in specs]


@pytest.fixture(scope="module")
def chosen() -> Plan:
    """An estate in which cloud and onprem came to native, and the hosts of onprem to the tunnel."""
    return to_the_end(site(None, {}, {BETWEEN: WORKS, INSIDE: FAILS}, {BETWEEN: WORKS}))


P, A, S, D = Stage


@pytest.mark.parametrize(
    ("now", "failed", "changed", "proofs", "wanted", "part"),
    [
        (None, (), True, [], [A], (1,)),
        (P, (), False, [], [A], (1,)),
        (P, (), False, [None, WORKS], [A, S], (1, 2)),
        (P, (), False, [None, WORKS, WORKS], [A, S, D], (1, 2)),
        (P, (), False, [None, WORKS, FAILS, FAILS], [A, S, A, P], (1, 2, 3)),
        (P, (), False, [None, WORKS, FAILS, WORKS], [A, S, A, S], (1, 2, 3)),
        (P, (), False, [None, FAILS], [A, P], (1,)),
        (P, (), False, [None, OPEN], [A], (1, 2)),
        (P, (), False, [None, OPEN, WORKS, WORKS], [A, A, S, D], (1, 2, 3)),
        (P, (), False, [None, OPEN, OPEN, FAILS], [A, A, A, P], (1, 2, 3)),
        (P, ("c1", "o2"), False, [], [P], ()),
        (P, ("c1", "o2"), True, [None, WORKS], [A, S], (1, 2)),
        (A, (), False, [None, WORKS, WORKS], [A, S, D], (1, 2)),
        (A, (), False, [None, FAILS], [A, P], (1,)),
        (S, (), False, [None, WORKS], [S, D], (1,)),
        (S, (), False, [None, FAILS, FAILS], [S, A, P], (1, 2)),
        (D, (), False, [], [D], (0,)),
        (D, (), False, [WORKS], [D], (0,)),
        (D, (), False, [OPEN], [D], (0,)),
        (D, (), False, [FAILS], [S], (0, 1)),
        (D, (), False, [FAILS, FAILS, FAILS], [S, A, P], (0, 1, 2)),
        (D, (), False, [FAILS, WORKS], [S, D], (0, 1)),
        (D, (), False, [FAILS, FAILS, OPEN], [S, A], (0, 1, 2, 3)),
        (D, (), True, [], [D], (0, 1)),
        (D, (), True, [WORKS, WORKS], [D], (0, 1)),
        (D, (), True, [WORKS, OPEN], [D], (0, 1, 2)),
        (D, (), True, [WORKS, OPEN, FAILS, FAILS], [D, D, S, A], (0, 1, 2, 3)),
        (D, (), True, [WORKS, FAILS, FAILS, FAILS], [D, S, A, P], (0, 1, 2, 3)),
    ],
)
def test_the_course_of_a_pair(
    now: Stage | None, failed: Any, changed: bool, proofs: Any, wanted: list[Stage], part: tuple[int, ...]
) -> None:
    made = [{} if one is None else {BETWEEN: one} for one in proofs]
    found = auto.course(now, failed, changed, made, BETWEEN)
    assert (list(found.stages), found.proofs) == (wanted, part)
    assert found.failed == (("c1", "o2") if wanted[-1] is P else ())


def test_what_two_sites_use() -> None:
    for other, between in (("auto", "auto"), ("native", "native"), ("hybrid", "tunnel"), ("tunnel", "tunnel")):
        for routing in (Routing("auto", {"b": other}), Routing(other, {"a": "auto"})):
            assert (routing.of(("a", "b")), routing.of(("a", "a"))) == (between, "auto")
    assert Routing("tunnel", {}, {("a", "b"): "auto"}).of(("a", "b")) == "auto"
    assert Routing("auto", {}, {("a", "b"): "tunnel"}).of(("a", "b")) == "tunnel"


def test_a_new_estate_begins_in_the_tunnel_and_is_proven_between_all_hosts() -> None:
    found = site(None)
    assert stages(found) == [{"c1 onprem": "accepts", "o1 cloud": "accepts", "o1 onprem": "accepts"}]
    assert found.trials[1] == (
        {"sites": ["cloud", "onprem"], "hosts": {"c1": C1, **ONPREM}},
        {"sites": ["onprem", "onprem"], "hosts": ONPREM},
    ), "within cloud there are no two hosts"
    assert (found.trials[0], found.trials[2], found.trials[3]) == ((), (), ())
    told = matrix.changes(found.sites, found.keys)
    assert [line.split(",")[0] for line in told] == [
        "native routing of cloud and onprem is tried (auto)",
        "native routing within onprem is tried (auto)",
    ]
    assert all(
        line.endswith(
            "larger than the tunnel's MTU is refused to its sender when packets come back to the tunnel from step 2"
        )
        for line in told
    )


def test_each_pair_goes_its_own_way_and_nothing_more_is_changed_then() -> None:
    """One that fails neither holds the other back nor is waited for."""
    first = site(None)
    second = site(None, {}, {BETWEEN: WORKS, INSIDE: FAILS})
    assert (second.record, second.specs) == (first.record, first.specs), "what was done is planned as it was"
    assert stages(second)[1] == {"c1 onprem": "sends", "o1 cloud": "sends"}
    assert [trial["sites"] for trial in second.trials[2]] == [["cloud", "onprem"]]
    third = site(None, {}, {BETWEEN: WORKS, INSIDE: FAILS}, {BETWEEN: WORKS})
    assert [step.record for step in third.steps[:1]] == [step.record for step in second.steps]
    assert stages(third)[2] == {"c1 onprem": "demands", "o1 cloud": "demands"}
    assert [bool(step.proven) for step in third.steps] == [True, True]
    assert third.steps[1].record["roster"]["auto"] == {"onprem onprem": ["c1", "o2"]}
    assert third.told == (
        "cloud and onprem: native (routing: auto), as every host has proven that it reaches the others so.",
        "within onprem: tunnel (routing: auto), as c1 does not reach o2 natively: no answer to 3 packets of 1500 "
        "bytes. Next: nothing; or put that right and run isthmus.mesh.site with -e isthmus_try_native=true.",
    )
    again = site(to_the_end(third))
    assert (again.record, again.steps, again.changes) == (to_the_end(third).record, (), ())
    assert stages(again) == [stages(third)[2]]
    assert [[trial["sites"] for trial in each] for each in again.trials] == [[["cloud", "onprem"]], *[[]] * 5]
    assert matrix.changes(again.sites, again.keys) == []


def test_the_matrix_says_what_was_chosen_and_what_comes(chosen: Plan) -> None:
    between, inside = matrix.lines(site(None).sites)
    assert between.startswith("cloud and onprem: path tunnel (VXLAN) (auto: the next run of isthmus.mesh.site tries na")
    between, inside = matrix.lines(site(chosen).sites)
    assert between.startswith(
        "cloud and onprem: path native (auto: native was proven, and each run of isthmus.mesh.site proves it again), "
        "encryption none, MTU 1500"
    )
    assert "UDP 8472 on every host of cloud and onprem" in between, "it may have to come back to the tunnel"
    assert inside.startswith(
        "within onprem: path tunnel (VXLAN) (auto: c1 did not reach o2 natively; tried again when the two have other "
        "hosts, or by isthmus.mesh.site with -e isthmus_try_native=true), encryption none, MTU 1450"
    )
    begun = matrix.lines(site(after(site(None, {}, {BETWEEN: WORKS}), 1)).sites)
    assert "(auto: the next run of isthmus.mesh.site tries native, which was begun before (sends))" in begun[0]


def test_the_tunnel_is_tried_again_when_somebody_asks_or_hosts_come_go_or_change(chosen: Plan) -> None:
    def tried(**given: Any) -> list[list[str]]:
        return [trial["sites"] for trial in site(chosen, **given).trials[1]]

    assert tried() == []
    assert tried(again=True) == [["onprem", "onprem"]]
    onprem = {"isthmus_cluster": "onprem"}
    assert ["onprem", "onprem"] in tried(more={"o4": {**onprem, "ansible_host": "198.18.1.4"}})
    assert ["onprem", "onprem"] in tried(more={"o3": {**onprem, "isthmus_underlay": "198.18.1.99"}}), "another address"
    assert tried(more={"o3": {**hosts()["o3"], "isthmus_labels": {"zone": "a"}}}) == []


def test_a_host_that_joins_a_native_pair_proves_it_before_anything_else_is_changed(chosen: Plan) -> None:
    joins = {"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}}
    first = site(chosen, {BETWEEN: WORKS}, more=joins)
    assert native(first.specs)["c2"]["onprem"] == "demands"
    assert native(first.specs)["o1"]["cloud"] == "demands"
    before, after_step = first.trials[0][0], first.trials[1]
    assert "c2" not in before["hosts"], "it is not there yet"
    assert [(trial["sites"], sorted(trial["hosts"])) for trial in after_step] == [
        (["cloud", "cloud"], ["c1", "c2"]),
        (["cloud", "onprem"], ["c1", "c2", "o1", "o2", "o3"]),
    ]
    proven = site(chosen, {BETWEEN: WORKS}, {BETWEEN: WORKS, ("cloud", "cloud"): WORKS}, more=joins)
    assert native(proven.steps[0].specs)["c2"] == {"cloud": "sends", "onprem": "demands"}
    assert proven.steps[0].waits == ("c1", "c2")
    failed = Verdict(False, ("c2", "o1"), "no answer")
    proofs = [{}, {BETWEEN: failed}, {BETWEEN: failed}, {BETWEEN: failed}]
    back = site(chosen, *proofs, more=joins)
    there = [one["c2"]["onprem"] for one in map(native, [back.specs, *(step.specs for step in back.steps[:2])])]
    assert there == ["demands", "sends", "accepts"]
    assert "onprem" not in native(back.steps[2].specs)["c2"]
    assert back.steps[2].record["roster"]["auto"]["cloud onprem"] == ["c2", "o1"]
    assert back.told[0].startswith("cloud and onprem: tunnel (routing: auto), as c2 does not reach o1 natively")


def test_while_a_host_joins_a_native_pair_vpcs_let_the_tunnel_in_too(chosen: Plan) -> None:
    """As the pair may have to go back to it in the same run."""
    vpcs = {
        "sites": {
            "cloud": {"vpc": {"provider": "aws", "network": "vpc-1", "region": "r", "manage": ["firewall"]}},
            "onprem": {},
        }
    }

    def overlay(found: Plan) -> tuple[bool, bool]:
        """Whether UDP 8472 is open meanwhile, and in the end."""
        (call,) = found.vpcs.calls
        return tuple(  # type: ignore[return-value]
            any(rule.get("port") == 8472 for rule in rules)
            for rules in ((call["meanwhile"] or call)["rules"], call["rules"])
        )

    settled = to_the_end(site(chosen, **vpcs))
    assert overlay(site(settled, **vpcs)) == (False, False)
    joins = {"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}}
    assert overlay(site(settled, more=joins, **vpcs))[0]


def test_a_native_pair_that_fails_is_led_back_before_anything_else(chosen: Plan) -> None:
    first = site(chosen, {BETWEEN: FAILS})
    assert stages(first) == [{"c1 onprem": "sends", "o1 cloud": "sends"}]
    last = site(chosen, {BETWEEN: FAILS}, {BETWEEN: FAILS}, {BETWEEN: FAILS})
    assert stages(last)[1:] == [{"c1 onprem": "accepts", "o1 cloud": "accepts"}, {}]
    assert [bool(step.proven) for step in last.steps] == [False, False], "to go back needs no proof"
    assert site(to_the_end(last)).changes == ()


def test_when_both_ways_fail_nothing_is_chosen_for_good(chosen: Plan) -> None:
    """The line between the sites is down: the pair ends where both are taken, and the next run finds native again."""
    outage = site(chosen, {BETWEEN: FAILS}, {BETWEEN: FAILS}, {BETWEEN: OPEN})
    assert stages(outage)[-1] == {"c1 onprem": "accepts", "o1 cloud": "accepts"}
    assert outage.told == (
        "Pending: cloud and onprem (routing: auto): native or the tunnel is not decided, as o3 did not answer. It is "
        "at the stage `accepts`; the next run goes on from there.",
    )
    rest = site(to_the_end(outage), {}, {BETWEEN: WORKS}, {BETWEEN: WORKS})
    assert stages(rest)[-1] == {"c1 onprem": "demands", "o1 cloud": "demands"}


def test_what_cannot_be_native_is_in_the_tunnel_and_the_matrix_says_why() -> None:
    more = {"c1": {**hosts()["c1"], "isthmus_advertise": "192.0.2.7"}}
    translated = site(None, more=more)
    assert "(auto: tunnel, as c1 has another isthmus_advertise" in matrix.lines(translated.sites)[0]
    assert [trial["sites"] for trial in translated.trials[1]] == [["onprem", "onprem"]]
    inside = site(None, more=more, **ENCRYPTED)
    assert [trial["sites"] for trial in inside.trials[1]] == [["cloud", "onprem"], ["onprem", "onprem"]]
    # Out of WireGuard it cannot be native any more.
    there = to_the_end(site(None, {}, {BETWEEN: WORKS}, {BETWEEN: WORKS}, more=more, **ENCRYPTED))
    assert at_each(there)[-1] == ("demands", "demands")
    back = site(there, more=more)
    assert at_each(back) == OUT_OF_IT + DECRYPTING
    assert [trial["sites"] for each in back.trials for trial in each if trial["sites"] == ["cloud", "onprem"]] == []


def test_what_goes_through_gateways_is_in_the_tunnel_and_the_matrix_says_why() -> None:
    found = site(None, **GATEWAYS)
    assert [trial["sites"] for trial in found.trials[1]] == [["onprem", "onprem"]]
    words = "(auto: tunnel, as what goes from gateway to gateway has the tunnel inside it), encryption ipsec-gateway"
    assert words in matrix.lines(found.sites)[0]
    # From there it is tried when WireGuard encrypts all, and led back to the tunnel before gateways do.
    there = to_the_end(site(to_the_end(found), {}, {INSIDE: WORKS}, {INSIDE: WORKS}, **GATEWAYS))
    on = site(there, sites=GATEWAYS["sites"], **ENCRYPTED_BETWEEN)
    assert at_each(on) == [*ENCRYPTING, INTO_WIREGUARD[0]]
    assert [on.steps[number].record["roster"].get("ipsec") is None for number in (0, 1, 2)] == [False, True, True]
    proofs: list[dict[Pair, Verdict]] = [{}, {}, {}, {}, {BETWEEN: WORKS}, {BETWEEN: WORKS}]
    inside = to_the_end(site(there, *proofs, sites=GATEWAYS["sites"], **ENCRYPTED_BETWEEN))
    assert at_each(inside)[-1] == ("demands", "demands")
    assert at_each(site(inside, **GATEWAYS)) == OUT_OF_IT + DECRYPTING


def test_kubernetes_nodes_prove_it_and_other_ranges_of_pods_are_another_try() -> None:
    outer = {"api_server": "https://192.0.2.9:6443", "pod_ranges": ["10.244.0.0/16"], "service_range": "10.96.0.0/16"}
    clusters = estate()["clusters"]
    clusters["cloud"]["kubernetes"] = outer
    first = site(None, clusters=clusters, pods={"c1": ["10.244.1.0/24"]})
    assert [trial["sites"] for trial in first.trials[1]] == [["cloud", "onprem"], ["onprem", "onprem"]]
    assert [one["to"] for one in first.routes if "pods on c1" in one["why"]] == ["10.244.1.0/24"]
    failed = to_the_end(
        site(None, {}, {BETWEEN: FAILS, INSIDE: FAILS}, clusters=clusters, pods={"c1": ["10.244.1.0/24"]})
    )
    assert stages(failed)[-1] == {}
    assert site(failed, clusters=clusters, pods={}).trials == ((),) * 6
    other = site(failed, clusters=clusters, pods={"c1": ["10.244.7.0/24"]})
    assert [trial["sites"] for trial in other.trials[1]] == [["cloud", "onprem"]]


def test_encryption_leads_a_native_pair_into_the_tunnel_and_it_is_tried_inside_that(chosen: Plan) -> None:
    found = site(chosen, {}, **ENCRYPTED_BETWEEN)
    assert [one.get("c1 onprem", "plain") for one in stages(found)] == ["sends", "accepts", "plain", "accepts"]
    assert found.steps[1].record["roster"]["encryption"]["pairs"] == {"cloud onprem": "demands"}
    assert [[trial["sites"] for trial in each] for each in found.trials] == [[], [], [], [], [["cloud", "onprem"]], []]
    assert (
        "(auto: the next run of isthmus.mesh.site tries native inside WireGuard, from step 4 on)"
        in (matrix.lines(found.sites)[0])
    )
    (told,) = [line for line in matrix.changes(found.sites, found.keys) if line.startswith("native routing")]
    assert told.startswith(
        "native routing of cloud and onprem is turned off and tried (auto), in steps of one run: (1) packets through "
        "the tunnel are taken again too; (2) packets go through the tunnel and are 50 bytes smaller, and native ones "
        "are still taken; (3) native packets are not taken any more; (4) every host of the two takes native packets too"
    )
    assert told.endswith(
        "is refused to its sender in the steps before and when packets come back to the tunnel from step 5"
    )
    last = to_the_end(site(chosen, {}, {}, {}, {}, {BETWEEN: WORKS}, {BETWEEN: WORKS}, **ENCRYPTED_BETWEEN))
    assert last.told == (
        "cloud and onprem: native inside WireGuard (routing: auto), as every host has proven that it reaches the "
        "others so.",
    )
    again = site(last, **ENCRYPTED_BETWEEN)
    assert (again.changes, again.steps) == ((), ())
    assert again.trials[0][0]["sites"] == ["cloud", "onprem"], "each run proves it again"
    line = matrix.lines(again.sites)[0]
    assert line.startswith("cloud and onprem: path native inside WireGuard (auto: native was proven, and each run")
    assert (", MTU 1420 inside" in line, "UDP 8472" in line, "IP on" in line) == (True, False, False)


def test_a_new_estate_that_encrypts_begins_in_the_tunnel_inside_wireguard_and_is_proven() -> None:
    first = site(None, **ENCRYPTED)
    assert at_each(first) == [("demands", "accepts")]
    assert first.trials == site(None).trials
    assert first.routes == (), "the network sees WireGuard only"
    line = matrix.lines(first.sites)[0]
    assert line.startswith(
        "cloud and onprem: path tunnel (VXLAN) (auto: the next run of isthmus.mesh.site tries native inside "
        "WireGuard), encryption wireguard, MTU 1370"
    )
    assert ("UDP 8472" in line, "IP on" in line) == (False, False)
    led = matrix.host_routes(first.sites, documents_of(first.record), model().ipsec, first.ipsec, first.keys[-1])
    assert "over isthmus0, or over isthmus-wg0 when that is proven, in tables main and 730" in led[0]
    last = site(None, {}, {BETWEEN: WORKS, INSIDE: FAILS}, {BETWEEN: WORKS}, **ENCRYPTED)
    assert at_each(last) == INTO_WIREGUARD
    assert at_each(last, "onprem onprem")[1:] == [("demands", "plain")] * 2
    assert last.told[1] == (
        "within onprem: tunnel inside WireGuard (routing: auto), as c1 does not reach o2 natively inside WireGuard: no "
        "answer to 3 packets of 1500 bytes. Next: nothing; or have the hosts' firewalls let packets between the ranges "
        "of workloads in on WireGuard's devices (docs/ports.md) and run isthmus.mesh.site with -e "
        "isthmus_try_native=true."
    )
    again = site(to_the_end(last), **ENCRYPTED)
    assert (again.changes, again.steps) == ((), ())
    assert to_the_end(last).record["roster"]["auto"] == {"onprem onprem": ["c1", "o2"]}
    # A host that joins has to prove it inside WireGuard too.
    joins = {"c2": {"isthmus_cluster": "cloud", "ansible_host": "198.18.2.2"}}
    joined = site(to_the_end(last), {BETWEEN: WORKS}, more=joins, **ENCRYPTED)
    assert native(joined.specs)["c2"]["onprem"] == "demands"
    assert ["cloud", "onprem"] in [trial["sites"] for trial in joined.trials[1]]


NATIVE_AGAIN = [("sends", "accepts"), ("accepts", "sends"), ("plain", "demands")]
LED_IN = [("accepts", "sends"), ("sends", "accepts"), ("demands", "plain")]


@pytest.mark.parametrize(
    ("before", "wanted", "proofs", "steps"),
    [
        (ENCRYPTED, ENCRYPTED, {1: WORKS, 2: WORKS}, INTO_WIREGUARD),
        (ENCRYPTED, ENCRYPTED, {1: WORKS, 2: FAILS, 3: FAILS}, [*INTO_WIREGUARD[:2], *OUT_OF_IT[1:]]),
        (ENCRYPTED, ENCRYPTED, {1: OPEN}, INTO_WIREGUARD[:1]),
        (NATIVE_INSIDE, ENCRYPTED, {0: WORKS}, [("demands", "demands")]),
        (NATIVE_INSIDE, ENCRYPTED, {0: FAILS, 1: FAILS, 2: FAILS}, OUT_OF_IT),
        (TUNNEL, ENCRYPTED, {4: WORKS, 5: WORKS}, ENCRYPTING + INTO_WIREGUARD),
        (TUNNEL, ENCRYPTED, {4: FAILS}, [*ENCRYPTING, INTO_WIREGUARD[0], ("demands", "plain")]),
        (TUNNEL, ENCRYPTED, {4: WORKS, 5: FAILS}, [*ENCRYPTING, *INTO_WIREGUARD[:2], INTO_WIREGUARD[0]]),
        (ON, ENCRYPTED, {4: WORKS, 5: WORKS}, LED_IN + INTO_WIREGUARD),
        (NATIVE_INSIDE, TUNNEL, {4: WORKS, 5: WORKS}, OUT_OF_IT + NATIVE_AGAIN),
        (NATIVE_INSIDE, TUNNEL, {4: FAILS}, [*OUT_OF_IT, NATIVE_AGAIN[0], *DECRYPTING[1:]]),
        (ENCRYPTED, TUNNEL, {1: WORKS, 2: WORKS}, NATIVE_AGAIN),
    ],
)
def test_native_is_tried_inside_wireguard_in_turn_with_encryption(
    before: dict[str, str], wanted: dict[str, str], proofs: dict[int, Verdict], steps: list[tuple[str, str]]
) -> None:
    """As what the inventory demands; what came out stands, and a run that goes on after any of the steps comes there
    as well."""
    old = changed(planned(model()), **before)
    old = to_the_end(old)
    made = [{BETWEEN: proofs[number]} if number in proofs else {} for number in range(6)]
    found = site(old, *made[: max(proofs) + 1], **wanted)
    assert at_each(found) == steps
    for number in range(1, max(proofs) + 1):
        sooner = site(old, *made[:number], **wanted)
        records = [one.record for one in (sooner, *sooner.steps)][:number]
        assert records == [one.record for one in (found, *found.steps)][: len(records)], "what was done stays planned"
    back = len(list(takewhile(lambda step: step[1] == "plain", reversed(steps))))
    for number, record in enumerate([found.record, *(step.record for step in found.steps)]):
        assert ("auto" in record["roster"]) is (number >= len(steps) - back), "not before it has failed"
    last = to_the_end(found)
    if steps[-1][1] in ("plain", "demands"):
        settled = site(last, **wanted)
        assert at_each(settled) == [steps[-1]]
        assert (last.record["roster"].get("auto") is None) is (steps[-1][1] == "demands")
    for number in range(len(steps)):
        every = [{BETWEEN: WORKS}] * 6
        assert at_each(site(after(found, number), *every, **wanted))[-1][1] != "plain" or number == len(steps) - 1


def test_hosts_that_become_a_site_bring_no_proof_and_are_tried_inside_wireguard_when_all_is_in_it(chosen: Plan) -> None:
    """They were native in clear by `auto`: nothing of that is so in the pair that encryption is turned on for."""
    moved = {"isthmus_cluster": "onprem", "isthmus_site": "plant", "ansible_host": "198.18.1.3"}
    keys = {
        "sites": {"cloud": {}, "onprem": {}, "plant": {}},
        "site_pairs": [{"sites": ["cloud", "plant"], "encryption": "wireguard"}],
    }
    found = site(chosen, more={"o3": moved}, **keys)
    assert at_each(found, "cloud plant") == [*ENCRYPTING, INTO_WIREGUARD[0]]
    assert ["cloud", "plant"] in [trial["sites"] for trial in found.trials[4]]
    assert any("c1 and o3 (routing)" in words for words in found.warnings)
    (told,) = [line for line in matrix.changes(found.sites, found.keys) if line.startswith("native routing of cloud")]
    assert "in steps of one run: (4) every host of the two takes native packets too" in told


def test_what_failed_in_clear_is_tried_anew_when_encryption_is_turned(chosen: Plan) -> None:
    """And the other way round: neither says anything of the other."""
    failed = to_the_end(site(None, {}, {BETWEEN: FAILS}))
    assert failed.record["roster"]["auto"]["cloud onprem"] == ["c1", "o2"]
    encrypting = site(failed, **ENCRYPTED_BETWEEN)
    assert "cloud onprem" not in encrypting.record["roster"].get("auto", {})
    assert at_each(encrypting) == [*ENCRYPTING, INTO_WIREGUARD[0]]
    inside = to_the_end(site(None, {}, {BETWEEN: FAILS}, **ENCRYPTED_BETWEEN))
    assert at_each(site(inside, {}, {BETWEEN: WORKS}, {BETWEEN: WORKS})) == NATIVE_AGAIN
    assert ["cloud", "onprem"] in [trial["sites"] for trial in site(inside).trials[1]]


def test_what_the_inventory_demands_counts_at_once(chosen: Plan) -> None:
    said = changed(chosen, routing="native")
    assert native(said.specs)["o1"] == {"cloud": "demands", "onprem": "accepts"}
    assert "auto" not in said.record["roster"]
    assert (said.trials, len(said.steps)) == (((),) * 6, 2)
    tunnel = changed(chosen, routing="tunnel")
    assert native(tunnel.specs)["o1"] == {"cloud": "sends"}
    assert not {"auto", "routing"} & to_the_end(tunnel).record["roster"].keys()


def test_the_changes_name_what_was_chosen(chosen: Plan) -> None:
    assert "native routing within site onprem: not chosen, c1 did not reach o2 so" in site(chosen).before
    changes = site(chosen, again=True).changes
    assert "native routing within site onprem: removed (was not chosen, c1 did not reach o2 so)" in changes
    assert "routing within site onprem: new, packets go through the tunnel, native ones are taken too" in changes


@pytest.mark.parametrize("value", [{"cloud": ["c1", "o1"]}, {"cloud onprem": ["c1"]}, {"cloud onprem": "c1 o1"}])
def test_a_record_that_is_damaged_there_is_refused(chosen: Plan, value: Any) -> None:
    documents = {name: dict(one) for name, one in chosen.record.items()}
    documents["roster"]["auto"] = value
    with pytest.raises(RecordError, match="auto"):
        merge([documents])


VERDICTS = st.sampled_from([WORKS, FAILS, OPEN])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["none", "wireguard"]), st.lists(VERDICTS, min_size=6, max_size=6), st.integers(0, 5)
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=60, deadline=None)
def test_no_proof_and_no_interruption_cuts_neighbouring_steps_off(runs: list[tuple[str, list[Verdict], int]]) -> None:
    """Runs with any outcome of their proofs, while encryption is turned on and off, each interrupted after a step."""
    found = planned(model())

    def at(record: Any) -> tuple[Stage, Stage]:
        documents = [record["roster"].get(key) for key in ("encryption", "routing")]
        words = [one["pairs"].get(" ".join(BETWEEN), one["all"]) if one else "plain" for one in documents]
        return Stage[words[0].upper()], Stage[words[1].upper()]

    before = at(found.record)
    for encryption, verdicts, stop in runs:
        made: list[dict[Pair, Verdict]] = []
        begun: list[Any] = []
        for number, verdict in enumerate(verdicts):
            # As a run does it: it proves what the plan asks for, plans again, and takes the next step.
            planned_so = site(found, *made, encryption=encryption)
            made.append(
                {BETWEEN: verdict} if any(t["sites"] == list(BETWEEN) for t in planned_so.trials[number]) else {}
            )
            again = site(found, *made, encryption=encryption)
            records = [again.record, *(step.record for step in again.steps)]
            assert records[:number] == begun[:number]
            if number > stop or number >= len(records):
                break
            begun.append(records[number])
            now = at(records[number])
            assert understood(before, now), (before, now)
            assert understood(now, before), (now, before)
            if is_inside(before) or is_inside(now):
                assert before[0] is now[0] is Stage.DEMANDS, "nothing in clear"
            before = now
        found = Plan(**{**found.__dict__, "record": begun[-1]})
