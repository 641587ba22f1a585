# SPDX-License-Identifier: GPL-3.0-or-later
"""A site becomes one to which nobody outside opens anything, and a new one joins a running estate: `site` collects the
public keys that are needed before any etcd tells them, and lays them down. The playbook and its plan are real, modules
on hosts are `fake_modules.py`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_batches_playbook import Site, said

CLUSTERS = {"a": (["a1"], ["a2"]), "b": (["b1"], ["b2"])}
HOSTS = ["a1", "a2", "b1", "b2"]
ON = {"encryption": "wireguard"}
CLOSED = {**ON, "sites": {"a": {}, "b": {"inbound": False}}}


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The clusters as the first run forms them, encrypted, and open."""
    made = Site(tmp_path_factory.mktemp("formed"), CLUSTERS)
    made.estate = ON
    run = made.run()
    assert run.status == 0, run.output
    assert made.calls("wireguard_keys") == [], "etcd tells the keys"
    return made


@pytest.fixture
def running(formed: Site, tmp_path: Path) -> Site:
    made = Site(tmp_path, CLUSTERS)
    made.take_over(formed)
    made.estate = CLOSED
    return made


def spec(site: Site, host: str) -> Any:
    return json.loads((site.place / "hosts" / host / "node.json").read_text())


def laid_down(site: Site, host: str) -> dict[str, Any]:
    return {one["name"]: one["keys"] for one in spec(site, host)["wireguard"].get("bootstrap", ())}


def keys(site: Site, host: str) -> Any:
    return json.loads((site.place / "hosts" / host / "keys").read_text())


def test_a_running_site_is_closed_in_one_run_and_a_second_run_changes_nothing(running: Site) -> None:
    told = said(running.run(name="plan"))
    assert "UDP 51871 on every host of a from hosts of b, from any address; nothing is opened at b" in told
    assert not any((running.place / "hosts" / host / "keys").exists() for host in HOSTS), "a plan makes nothing"
    run = running.run()
    assert (run.status, running.locks) == (0, []), run.output
    assert sorted(call["host"] for call in running.calls("wireguard_keys")) == ["a1", "b1", "b2"]
    assert laid_down(running, "a1") == {host: keys(running, host) for host in ("b1", "b2")}
    assert laid_down(running, "b1") == laid_down(running, "b2") == {"a1": keys(running, "a1")}
    assert laid_down(running, "a2") == {}
    mesh = {host: spec(running, host)["node"]["mesh4"] for host in HOSTS}
    for host, other in (("a1", "b1"), ("b1", "a1")):
        (peer,) = spec(running, host)["registrar"]["peers"]
        assert peer["endpoints"] == [f"https://{mesh[other]}:2379"]
    again = running.run()
    assert (again.status, again.changed) == (0, {}), again.output
    assert laid_down(running, "b1") == {"a1": keys(running, "a1")}


@pytest.mark.slow
def test_a_run_for_some_hosts_lays_down_the_keys_that_the_record_has(running: Site) -> None:
    assert running.run().status == 0
    before = laid_down(running, "a1")
    run = running.run("--limit", "a1,a2")
    assert (run.status, run.changed) == (0, {}), run.output
    assert laid_down(running, "a1") == before
    # A host that was made anew.
    anew = {"51871": base64.b64encode(b"anew".ljust(32, b".")).decode()}
    (running.place / "hosts" / "b1" / "keys").write_text(json.dumps(anew))
    assert running.run().status == 0
    assert laid_down(running, "a1")["b1"] == anew


@pytest.mark.slow
def test_both_keys_are_laid_down_before_one_is_sent_with(running: Site) -> None:
    assert running.run().status == 0
    run = running.run("-e", "isthmus_serial=100%", name="rotate_wireguard_keys")
    assert (run.status, running.locks) == (0, []), run.output
    new = {host: {"51872": keys(running, host)["51872"]} for host in ("a1", "b1", "b2")}
    assert laid_down(running, "a1") == {host: new[host] for host in ("b1", "b2")}
    assert laid_down(running, "b1") == {"a1": new["a1"]}
    again = running.run()
    assert (again.status, again.changed) == (0, {}), again.output


@pytest.mark.slow
def test_a_site_is_encrypted_and_closed_in_the_same_run(tmp_path: Path) -> None:
    plain = Site(tmp_path, CLUSTERS)
    assert plain.run().status == 0
    plain.estate = CLOSED
    run = plain.run("-e", "isthmus_serial=100%")
    assert (run.status, plain.locks) == (0, []), run.output
    for host in HOSTS:
        assert "changing" not in spec(plain, host)["wireguard"]
    assert set(laid_down(plain, "a1")) == {"b1", "b2"}


def test_without_wireguard_the_run_says_so_before_anything_is_done(running: Site) -> None:
    running.estate = {"sites": CLOSED["sites"]}
    run = running.run()
    assert run.status != 0
    assert "isthmus_estate.sites.b.inbound: false, and traffic with a (none) is not encrypted by WireGuard" in said(run)
    assert running.calls("node") == []
