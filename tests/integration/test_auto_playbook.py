# SPDX-License-Identifier: GPL-3.0-or-later
"""Pairs of sites with `routing: auto` in runs of `site`: each is tried and goes its own way, by proofs of its hosts.
The playbook and its plan are real, modules on hosts are `fake_modules.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_batches_playbook import Site, said
from integration.test_encryption_playbook import turned

CLUSTERS: dict[str, tuple[list[str], list[str]]] = {"a": (["a1"], ["a2"]), "b": (["b1"], []), "c": (["c1"], [])}
HOSTS = ["a1", "a2", "b1", "c1"]
AUTO = {"routing": "auto"}


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The clusters as the first run forms them, with tunnels."""
    made = Site(tmp_path_factory.mktemp("formed"), CLUSTERS)
    run = made.run()
    assert run.status == 0, run.output
    return made


@pytest.fixture(scope="module")
def settled(formed: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """After a run that tried all pairs, while a1 did not reach c1 natively."""
    made = taken_over(formed, tmp_path_factory.mktemp("settled"))
    cut(made, "a1 c1")
    run = turned(made)
    assert run.status == 0, run.output
    return made


def taken_over(before: Site, place: Path, more: dict[str, list[str]] | None = None) -> Site:
    """The estate as another left it, all pairs with `routing: auto`, `more` hosts by cluster."""
    clusters = {name: (members, others + (more or {}).get(name, [])) for name, (members, others) in CLUSTERS.items()}
    made = Site(place, clusters)
    made.take_over(before)
    made.estate = AUTO
    return made


def cut(site: Site, *ways: str) -> None:
    (site.place / "cut").write_text("".join(f"{way}\n" for way in ways))


def ways(site: Site) -> dict[str, dict[str, str]]:
    """By host, the stages with other sites."""
    found = {}
    for host in site.hosts:
        path = site.place / "hosts" / host / "node.json"
        section = json.loads(path.read_text()).get("native") if path.exists() else None
        found[host] = section["stages"] if section else {}
    return found


def recorded(site: Site) -> Any:
    return json.loads((site.place / "record").read_text())["roster"].get("auto")


def proofs(site: Site) -> list[tuple[str, list[str]]]:
    """Who proved whom to be reached natively, in order."""
    calls = [call for call in site.calls("verify") if call["scope"] == "step"]
    return [(call["host"], [one["name"] for one in call["hosts"]]) for call in calls]


NATIVE = {
    "a1": {"a": "demands", "b": "demands"},
    "a2": {"a": "demands", "b": "demands"},
    "b1": {"a": "demands", "c": "demands"},
    "c1": {"b": "demands"},
}
"""Everywhere but between a and c."""


def test_each_pair_takes_the_way_that_works_and_a_second_run_changes_nothing(formed: Site, tmp_path: Path) -> None:
    site = taken_over(formed, tmp_path)
    cut(site, "a1 c1")
    told = said(site.run(name="plan"))
    assert "a and c: path tunnel (VXLAN) (auto: the next run of isthmus.mesh.site tries native)" in told
    assert "native routing of a and c is tried (auto), in steps of one run" in told
    assert set(map(str, ways(site).values())) == {"{}"}
    run = turned(site)
    assert (run.status, site.locks) == (0, []), run.output
    assert (ways(site), recorded(site)) == (NATIVE, {"a c": ["a1", "c1"]})
    assert "a and c: tunnel (routing: auto), as a1 does not reach c1 natively: no answer." in said(run)
    assert "a and b: native (routing: auto), as every host has proven that it reaches the others so." in said(run)
    assert "routers of c:" in said(run), "what is needed is told before it is tried"
    assert len(site.calls("node")) == 3 * len(HOSTS)
    assert len([host for host, _asked in proofs(site) if host == "a1"]) == 2
    again = turned(site)
    assert (again.status, again.changed) == (0, {}), again.output
    assert ("a1", ["a2", "b1"]) in proofs(site), "what is native is proven by each run"
    assert not [asked for _host, asked in proofs(site) if _host == "a1" and "c1" in asked]
    assert len(site.calls("node")) == len(HOSTS)
    assert "routing: auto)," not in said(again)
    shown = said(site.run(name="plan"))
    assert "a and c: path tunnel (VXLAN) (auto: a1 did not reach c1 natively; tried again when" in shown
    assert "a and b: path native (auto: native was proven" in shown


@pytest.mark.slow
def test_encryption_comes_first_and_what_works_inside_it_is_found_in_the_same_run(formed: Site, tmp_path: Path) -> None:
    site = taken_over(formed, tmp_path)
    site.estate = {**AUTO, "encryption": "wireguard"}
    cut(site, "a1 c1")
    told = said(site.run(name="plan"))
    assert "(auto: the next run of isthmus.mesh.site tries native inside WireGuard, from step 4 on)" in told
    run = turned(site)
    assert (run.status, site.locks) == (0, []), run.output
    assert (ways(site), recorded(site)) == (NATIVE, {"a c": ["a1", "c1"]})
    assert len(site.calls("node")) == 6 * len(HOSTS)
    assert "a and c: tunnel inside WireGuard (routing: auto), as a1 does not reach c1 natively inside" in said(run)
    assert "a and b: native inside WireGuard (routing: auto), as every host has proven" in said(run)
    assert "routers of" not in said(run), "the network sees WireGuard only"
    again = turned(site)
    assert (again.status, again.changed) == (0, {}), again.output
    assert ("a1", ["a2", "b1"]) in proofs(site), "what is native is proven by each run"


@pytest.mark.slow
def test_a_native_way_that_fails_is_left_in_the_next_run_and_nobody_else_is_touched(
    settled: Site, tmp_path: Path
) -> None:
    site = taken_over(settled, tmp_path)
    cut(site, "b1 a2")
    run = turned(site)
    assert (run.status, site.locks) == (0, []), run.output
    assert "a and b: tunnel (routing: auto), as b1 does not reach a2 natively: no answer." in said(run)
    assert ways(site) == {
        "a1": {"a": "demands"},
        "a2": {"a": "demands"},
        "b1": {"c": "demands"},
        "c1": {"b": "demands"},
    }
    assert recorded(site) == {"a b": ["b1", "a2"], "a c": ["a1", "c1"]}
    assert len(site.calls("node")) == 3 * len(HOSTS), "before the first step it is known that there will be one"
    again = turned(site)
    assert (again.status, again.changed) == (0, {}), again.output


@pytest.mark.slow
def test_it_is_tried_again_when_somebody_asks(settled: Site, tmp_path: Path) -> None:
    site = taken_over(settled, tmp_path)
    run = turned(site, "-e", "isthmus_try_native=true")
    assert run.status == 0, run.output
    assert recorded(site) is None
    assert {**ways(site)["a1"], **ways(site)["b1"]} == dict.fromkeys("abc", "demands")


@pytest.mark.slow
def test_a_host_that_is_behind_keeps_its_pairs_and_no_others(formed: Site, tmp_path: Path) -> None:
    site = taken_over(formed, tmp_path)
    (site.place / "silent" / "c1").touch()
    first = turned(site)
    assert first.status == 4, first.output
    told = said(first)
    for pair in ("a and c", "b and c"):
        assert (
            f"Pending: {pair} (routing: auto): native or the tunnel is not decided, as c1 did not take part in the "
            "proof. It is at the stage `accepts`; the next run goes on from there." in told
        )
    assert ways(site) == {
        "a1": {"a": "demands", "b": "demands", "c": "accepts"},
        "a2": {"a": "demands", "b": "demands", "c": "accepts"},
        "b1": {"a": "demands", "c": "accepts"},
        "c1": {},
    }
    (site.place / "silent" / "c1").unlink()
    second = turned(site)
    assert second.status == 0, second.output
    assert ways(site)["c1"] == {"a": "demands", "b": "demands"}
    assert recorded(site) is None


@pytest.mark.slow
def test_a_run_of_a_part_of_the_hosts_decides_nothing(settled: Site, tmp_path: Path) -> None:
    site = taken_over(settled, tmp_path)
    cut(site, "b1 a2")
    run = turned(site, "--limit", "b1,c1")
    assert (run.status, run.changed, ways(site)) == (0, {}, NATIVE), run.output
    assert {host for host, _asked in proofs(site)} == {"b1", "c1"}
    asked = turned(site, "--limit", "a1,a2", "-e", "isthmus_try_native=true")
    assert asked.status == 0, asked.output
    assert "Pending: a and c (routing: auto)" in said(asked)
    assert (ways(site)["a1"]["c"], ways(site)["c1"]) == ("accepts", {"b": "demands"})


@pytest.mark.slow
def test_when_neither_way_leads_there_nothing_is_chosen(formed: Site, tmp_path: Path) -> None:
    site = taken_over(formed, tmp_path)
    cut(site, "a1 c1 unsure")
    run = turned(site)
    assert run.status == 0, run.output
    assert "a1 reaches c1 neither natively nor through the tunnel: no answer." in said(run)
    assert (ways(site)["a1"]["c"], ways(site)["a1"]["b"], recorded(site)) == ("accepts", "demands", None)
    cut(site)
    assert turned(site).status == 0
    assert ways(site)["a1"]["c"] == "demands"


@pytest.mark.slow
def test_a_new_host_that_is_not_reached_natively_leads_its_pair_back_to_the_tunnel(
    settled: Site, tmp_path: Path
) -> None:
    site = taken_over(settled, tmp_path, {"b": ["z2"]})
    cut(site, "a1 c1", "z2 a1")
    run = turned(site)
    assert (run.status, site.locks) == (0, []), run.output
    assert "a and b: tunnel (routing: auto), as z2 does not reach a1 natively: no answer." in said(run)
    assert ways(site)["z2"] == {"b": "demands", "c": "demands"}, "within b and to c it is native as the others"
    assert ways(site)["a1"] == {"a": "demands"}
    assert recorded(site) == {"a b": ["z2", "a1"], "a c": ["a1", "c1"]}
    again = turned(site)
    assert (again.status, again.changed) == (0, {}), again.output


@pytest.mark.slow
def test_a_new_estate_finds_its_ways_in_its_first_run(tmp_path: Path) -> None:
    site = Site(tmp_path, CLUSTERS)
    site.estate = AUTO
    cut(site, "c1 a1")
    run = turned(site)
    assert (run.status, ways(site)) == (0, NATIVE), run.output
    record = json.loads((site.place / "record").read_text())
    assert all(record[f"clusters/{name}"]["ca_certificate"] for name in CLUSTERS)
    again = turned(site)
    assert (again.status, again.changed) == (0, {}), again.output


@pytest.mark.slow
def test_a_failure_ends_the_run_and_the_next_one_goes_on_there(formed: Site, tmp_path: Path) -> None:
    site = taken_over(formed, tmp_path)
    (site.place / "fail" / "node a2").touch()
    first = turned(site)
    assert first.status == 2, first.output
    assert proofs(site) == [], "nothing is decided after a failure"
    (site.place / "fail" / "node a2").unlink()
    cut(site, "a1 c1")
    second = turned(site)
    assert (second.status, ways(site)) == (0, NATIVE), second.output


def test_a_check_tries_nothing_and_says_what_a_run_would_try(formed: Site, tmp_path: Path) -> None:
    site = taken_over(formed, tmp_path)
    run = turned(site, "--check")
    assert run.status == 0, run.output
    assert (proofs(site), set(map(str, ways(site).values())), recorded(site)) == ([], {"{}"}, None)
    assert set(run.changed) == set(HOSTS)
    assert "Pending" not in said(run)


@pytest.mark.slow
def test_what_the_inventory_demands_and_is_not_proven_fails_the_run_beside_pairs_that_choose(
    formed: Site, tmp_path: Path
) -> None:
    site = taken_over(formed, tmp_path)
    site.estate = {**AUTO, "site_pairs": [{"sites": ["b", "c"], "routing": "native"}]}
    (site.place / "fail" / "verify c1 step").touch()
    first = turned(site)
    assert first.status == 2, first.output
    assert "step 2 was not begun: c1 did not prove that they reach the others the new way" in said(first)
    assert {stage for stages in ways(site).values() for stage in stages.values()} == {"accepts"}
    (site.place / "fail" / "verify c1 step").unlink()
    cut(site, "a1 c1")
    second = turned(site)
    assert (second.status, ways(site)) == (0, NATIVE), second.output
