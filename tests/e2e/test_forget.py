# SPDX-License-Identifier: GPL-3.0-or-later
"""A machine is stolen, and comes back; another one has a new disk. Traffic among the others goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from estate_tools import ONPREM, PKI, Estate
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

LOST = "onprem-3"
THIEF = "cloud-2"
"""Where the stolen keys are used: no etcd is on it."""
STOLEN = {
    "agent": ("onprem-1", "onprem-2"),
    "root": ("onprem-1", "onprem-2"),
    "operator": ("onprem-1", "onprem-2"),
    "registrar": ("onprem-1", "onprem-2"),
    "peer-cloud": ("cloud-1",),
    "peer-edge": ("edge-1",),
}
"""Certificates of the lost machine, and the members whose etcd takes them."""
LOOT = "/root/stolen"


def members(estate: Estate) -> list[str]:
    """Voters of onprem's etcd."""
    listed = json.loads(estate.etcdctl("onprem-1", "member", "list", "-w", "json").stdout)["members"]
    return sorted(member["name"] for member in listed if not member.get("isLearner"))


def admitted(estate: Estate) -> set[tuple[str, str]]:
    """Stolen certificates that an etcd takes, with its host."""
    found = set()
    for name, places in STOLEN.items():
        for place in places:
            host = estate.lab.hosts[place]
            files = (
                f"--cacert={LOOT}/trust/{host.cluster}.crt",
                f"--cert={LOOT}/{name}.crt",
                f"--key={LOOT}/{name}.key",
            )
            # Some of etcdctl's versions dial a server that refuses them for ever.
            words = ["timeout", "10", "etcdctl", f"--endpoints=https://{host.address}:2379", *files]
            if estate.lab.exec(THIEF, [*words, "get", "cilium/.heartbeat"], check=False).returncode == 0:
                found.add((name, place))
    return found


def steal(estate: Estate) -> None:
    keys = estate.lab.exec(LOST, ["sh", "-c", f"tar -C {PKI} -c . | base64"]).stdout
    estate.lab.exec(THIEF, ["sh", "-c", f"mkdir -p {LOOT} && base64 -d | tar -C {LOOT} -x"], feed=keys)


def node(estate: Estate, host: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)
    return found


def unknown_peers(estate: Estate, host: str) -> int:
    """Packets that the host dropped because their sender is no node of the mesh."""
    return int(estate.ask(host, "status")["datapath"]["drops"].get("unknown_peer", 0))


def known_nowhere(estate: Estate) -> bool:
    """Neither its own cluster's etcd nor a mirror has the lost machine's node."""
    prefixes = ("cilium/state/nodes/", "cilium/cache/nodes/", "isthmus/v1/nodes/")
    return not any(
        LOST in name.split("/") for host in ("onprem-1", "cloud-1", "edge-1") for name in estate.keys(host, *prefixes)
    )


def power_on(estate: Estate) -> None:
    """Until its agent runs. Its etcd would keep systemd waiting for two minutes: all others refuse it."""
    host = estate.lab.hosts[LOST]
    if not estate.lab.running(host):
        with estate.lab.locked():
            estate.lab.start(host)

    def up() -> bool:
        if not estate.lab.running(host):
            return False
        estate.lab.exec(LOST, ["systemctl", "stop", "isthmus-etcd.service"])
        return estate.unit_state(LOST, "isthmusd") == "active"

    estate.until(f"the agent of {LOST} runs", up, 90)


def join_anew(estate: Estate) -> None:
    if not estate.lab.running(estate.lab.hosts[LOST]):
        power_on(estate)
    play("teardown", "--limit", LOST, "-e", "isthmus_confirm_teardown=lab")
    play("site")
    estate.converged()


def test_a_stolen_machine_is_forgotten_and_joins_anew(estate: Estate) -> None:
    estate.converged()
    steal(estate)
    whole = {(name, place) for name, places in STOLEN.items() for place in places}
    assert admitted(estate) == whole
    before = node(estate, LOST)["node"]
    estate.lab.power_off(LOST)
    done = False
    try:
        checked = play("forget", "--check", "-e", f"isthmus_forget={LOST}")
        assert f"host/{LOST}" in checked.output
        assert admitted(estate) == whole
        assert members(estate) == [*ONPREM]

        with estate.unnoticed(estate.edge):
            run = play("forget", "-e", f"isthmus_forget={LOST}")
        assert "revoked root of onprem-3 (CN=root" in " ".join(run.output.split())
        assert "Pending" not in run.output
        assert admitted(estate) == set()
        for place in ("onprem-1", "onprem-2", "cloud-1", "edge-1"):
            estate.etcdctl(place, "get", "cilium/.heartbeat", user="registrar")
        assert members(estate) == ["onprem-1", "onprem-2"]
        assert f"isthmus-agent-{LOST}" not in estate.etcdctl("onprem-1", "user", "list").stdout.split()
        estate.until("no etcd knows its node", lambda: known_nowhere(estate))
        for host in estate.lab.hosts:
            assert host == LOST or before["underlay4"] not in json.dumps(node(estate, host)), host

        # It comes back as it was: its agent restores what it knew, and nobody takes its packets.
        power_on(estate)
        target = node(estate, "onprem-1")["node"]["mesh4"]
        dropped = unknown_peers(estate, "onprem-1")

        def refused() -> bool:
            ping = estate.lab.exec(LOST, ["ping", "-q", "-c", "1", "-W", "0.5", target], check=False)
            assert ping.returncode != 0
            return unknown_peers(estate, "onprem-1") > dropped

        estate.until("onprem-1 drops its packets", refused, 60)
        assert admitted(estate) == set()
        run = play("site", check=False)
        said = " ".join(run.output.split())
        assert run.status == 2, run.output[-6000:]
        assert f"{LOST} was forgotten at" in said
        assert f"still holds keys of the mesh ({PKI}/agent.key" in said
        assert {name for name, recap in run.hosts.items() if recap.failed} == {LOST}
        assert run.changed == {}
        assert members(estate) == ["onprem-1", "onprem-2"]

        with estate.unnoticed(estate.edge):
            join_anew(estate)
        done = True
    finally:
        if not done:
            join_anew(estate)
    assert members(estate) == [*ONPREM]
    assert node(estate, LOST)["node"]["range4"] != before["range4"]
    assert admitted(estate) == set()
    estate.lab.exec(THIEF, ["rm", "-r", LOOT])
    assert play("site").changed == {}
    play("verify")


def test_a_machine_with_a_new_disk_joins_in_its_place(estate: Estate) -> None:
    """An etcd member of three that nobody forgot."""
    replaced = "onprem-2"
    estate.converged()
    before = node(estate, replaced)["node"]
    estate.lab.reimage(replaced)
    estate.everywhere(estate.backends - {replaced})
    with estate.unnoticed(estate.edge, estate.onprem):
        play("site")
    estate.converged()
    assert members(estate) == [*ONPREM]
    assert node(estate, replaced)["node"] == before
    assert play("site").changed == {}
    play("verify")
