# SPDX-License-Identifier: GPL-3.0-or-later
"""Changes that cut a host off or break its resolver: it finds its way back by itself, and the run says so."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import EDGE
from estate_tools import Estate
from playbook import Run, command, environment, play, recaps

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

CUT, OTHER = "onprem-3", "cloud-2"
PLAYBOOK = """\
- hosts: {hosts}
  gather_facts: false
  tasks:
    - ansible.builtin.import_role:
        name: isthmus.mesh.plan
    - ansible.builtin.import_role:
        name: isthmus.mesh.bundle
    - isthmus.mesh.node:
        spec: "{{{{ __plan_result.specs[inventory_hostname] | combine(wrong[inventory_hostname], recursive=true,
          list_merge='append') }}}}"
        estate: "{{{{ __plan_result.record }}}}"
        bundle_digest: "{{{{ __bundle_result.digest }}}}"
"""
# The controller is in this network, and only the default route leads to it.
CUTTING = {"mesh_ranges4": ["198.18.0.0/16"]}
# systemd-resolved answers every name below localhost itself, with the loopback address.
RESOLVER_BREAKING = {"dns": {"domain": "mesh.localhost"}}


def change(place: Path, wrong: dict[str, Any]) -> Run:
    """Make hosts what their plan and a mistake make of them."""
    file = place / "wrong.yml"
    file.write_text(PLAYBOOK.format(hosts=":".join(wrong)))
    words = [str(file) if word == "isthmus.mesh.site" else word for word in command("site")]
    done = subprocess.run(
        [*words, "-e", json.dumps({"wrong": wrong})],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd="/",
        env=environment(),
    )
    return Run(done.returncode, done.stdout + done.stderr, recaps(done.stdout))


def files(estate: Estate, host: str) -> str:
    """What makes a generation, as it is on the disk."""
    script = (
        "cd /etc; sha256sum isthmus/node.json isthmus/dnsmasq.conf resolv.conf systemd/system/isthmus*; "
        "readlink resolv.conf /opt/isthmus/current"
    )
    return estate.lab.exec(host, ["sh", "-c", script], check=False).stdout


def generations(estate: Estate, host: str) -> dict[int, dict[str, Any]]:
    found = json.loads(estate.lab.exec(host, ["isthmus", "generations", "-o", "json"]).stdout)["generations"]
    return {one["number"]: one for one in found}


def current(estate: Estate, host: str) -> int:
    return next(number for number, one in generations(estate, host).items() if one["current"])


def timer(estate: Estate, host: str) -> str:
    return estate.lab.exec(host, ["systemctl", "is-active", "isthmus-rollback.timer"], check=False).stdout.strip()


@pytest.fixture
def whole(estate: Estate) -> Iterator[Estate]:
    """The estate, every host as planned, each with a generation; so again at the end."""
    estate.converged()
    yield estate
    play("site")
    estate.converged()


def test_hosts_that_a_change_breaks_come_back_and_the_run_says_so(whole: Estate, tmp_path: Path) -> None:
    """One is cut off, one has no names any more, one gets a harmless change in the same run."""
    hosts = (CUT, EDGE, OTHER)
    before = {host: files(whole, host) for host in hosts}
    harmless = {"node": {"labels": {"round": "harmless"}}}
    run = change(tmp_path, {CUT: CUTTING, EDGE: RESOLVER_BREAKING, OTHER: harmless})
    assert {name: (recap.failed, recap.unreachable) for name, recap in run.hosts.items()} == {
        CUT: (1, 0),
        EDGE: (1, 0),
        OTHER: (0, 0),
    }, run.output[-6000:]
    told = " ".join(run.output.split())
    for host in (CUT, EDGE):
        assert f"{host} took its change back: generation" in told
        assert files(whole, host) == before[host]
        assert timer(whole, host) != "active"
        found = generations(whole, host)
        assert found[max(found)]["state"] == "rolled back"
        assert current(whole, host) < max(found)
        assert found[current(whole, host)]["differs"] == []
    assert "the host's resolver says that" in told
    assert files(whole, OTHER) != before[OTHER]
    assert generations(whole, OTHER)[current(whole, OTHER)]["state"] == "confirmed"
    whole.converged()
    # Those that came back are what is planned; the other one is to be put right.
    assert set(play("site", "--check").changed) == {OTHER}
    assert set(play("site").changed) == {OTHER}
    assert files(whole, OTHER) == before[OTHER]
    assert play("site").changed == {}


def test_a_host_that_boots_in_between_takes_its_change_back(whole: Estate, tmp_path: Path) -> None:
    """Its timer is gone with the boot, and a change that cuts a host off makes people pull the plug."""
    before, good = files(whole, CUT), current(whole, CUT)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(change, tmp_path, {CUT: CUTTING})
        whole.until("it waits to be confirmed", lambda: timer(whole, CUT) == "active" and files(whole, CUT) != before)
        whole.lab.power_off(CUT)
        whole.lab.power_on(CUT)
        whole.until("the host is what it was", lambda: files(whole, CUT) == before)
        whole.until("and knows it", lambda: current(whole, CUT) == good)
        run = running.result()
    assert run.status != 0, run.output[-6000:]
    found = generations(whole, CUT)
    assert found[max(found)]["state"] == "rolled back"
    boot = ["sh", "-c", "ls /etc/systemd/system/*rollback* /etc/systemd/system/*.wants/*rollback* || true"]
    assert whole.lab.exec(CUT, boot).stdout == ""
    whole.converged()
    assert play("site").changed == {}


def test_a_host_goes_back_by_hand_without_controller_agent_and_etcd(whole: Estate, tmp_path: Path) -> None:
    before, good = files(whole, EDGE), current(whole, EDGE)
    run = change(tmp_path, {EDGE: {"node": {"labels": {"round": "other"}}}})
    assert run.status == 0, run.output[-6000:]
    made = current(whole, EDGE)
    assert generations(whole, EDGE)[made]["state"] == "confirmed"
    assert files(whole, EDGE) != before
    whole.lab.exec(EDGE, ["systemctl", "stop", "isthmusd", "isthmus-registrar", "isthmus-etcd"])
    done = whole.lab.exec(EDGE, ["isthmus", "rollback", str(good)])
    assert "restored /etc/isthmus/node.json" in done.stdout
    assert "restarted isthmusd.service" in done.stdout
    assert files(whole, EDGE) == before
    assert current(whole, EDGE) == good
    whole.put_right()
    whole.converged()
    refused = whole.lab.exec(EDGE, ["isthmus", "rollback", "999"], check=False)
    assert refused.returncode == 1
    assert "there is no generation 999" in refused.stderr
