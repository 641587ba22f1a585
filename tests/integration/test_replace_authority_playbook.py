# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook `replace_authority` over the hosts of three clusters, as test_batches_playbook.py runs `site`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from integration.test_batches_playbook import HOSTS, Site, said

REPLACE = ("-e", "isthmus_replace_authority=a")


@pytest.fixture
def running(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    first = made.run()
    assert first.status == 0, first.output
    return made


def steps(site: Site) -> list[str]:
    return [call["step"] for call in site.calls("pki_replace")]


def authorities(site: Site) -> list[str]:
    record = json.loads((site.place / "record").read_text())
    return list(record["clusters/a"]["ca_certificate"].splitlines())


def test_every_host_goes_through_all_steps_and_has_the_new_authority(running: Site) -> None:
    old = authorities(running)
    run = running.run(*REPLACE, name="replace_authority")
    assert run.status == 0, run.output
    assert (steps(running), authorities(running)) == (["begin", "sign", "end"], ["NEW"])
    assert old != ["NEW"]
    for module in ("pki_request", "etcd_member"):
        hosts = [call["host"] for call in running.calls(module)]
        assert {hosts.count(host) for host in HOSTS if host in hosts} == {3}, module
    assert sorted(call["host"] for call in running.calls("node")) == HOSTS
    assert {call["bundle_digest"] for call in running.calls("node")} == {"0"}, "what the bundle role laid down"
    assert running.locks == []


@pytest.mark.slow
def test_the_old_authority_stays_while_a_host_lacks_a_certificate_of_the_new_one(running: Site) -> None:
    (running.place / "signs").touch()
    (running.place / "fail" / "pki_sign a1").touch()
    run = running.run(*REPLACE, name="replace_authority")
    assert run.status == 2, run.output
    assert (steps(running), authorities(running)[0]) == (["begin", "sign"], "NEW"), run.output
    assert len(authorities(running)) == 2, "both are trusted"
    for host in ("a1", "a2"):
        assert f"{host} has no certificate of the new authority of cluster a (a1: pki_sign fails on a1" in said(run), (
            run.output
        )
    assert "Pending: the authority of cluster a is not replaced yet. Why: a1" in said(run)
    (running.place / "fail" / "pki_sign a1").unlink()
    rest = running.run(*REPLACE, name="replace_authority")
    assert (rest.status, authorities(running)) == (0, ["NEW"]), rest.output


@pytest.mark.slow
def test_the_second_step_waits_for_a_host_that_is_silent(running: Site) -> None:
    (running.place / "silent" / "b2").touch()
    run = running.run(*REPLACE, name="replace_authority")
    assert run.status == 4, run.output
    assert (steps(running), authorities(running)[1:]) == (["begin"], ["NEW"])
    assert "Pending: the authority of cluster a is not replaced yet. Why: b2 could not be entered" in said(run)
    assert running.calls("node") == []
    (running.place / "silent" / "b2").unlink()
    rest = running.run(*REPLACE, name="replace_authority")
    assert (rest.status, steps(running), authorities(running)) == (0, ["begin", "sign", "end"], ["NEW"]), rest.output
