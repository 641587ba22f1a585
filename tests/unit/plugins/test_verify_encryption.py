# SPDX-License-Identifier: GPL-3.0-or-later
"""What `verify` says of hosts that traffic should be encrypted with, by what the agent there says of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils.verify import encryption, verifier
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import Verifier
from unit.mesh import estates

ON = {"encryption": "wireguard"}
GOOD = {"state": "encrypted", "stage": "demands", "reason": None, "handshake_age": 3.0}


class Host:
    """c1 of the estate, with an agent that says of each host of onprem what `said` has, else GOOD."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
        before = estates.planned(estates.model()) if running else None
        self.plan = estates.planned(estates.model({**estates.estate(), **ON}), before)
        self.said: dict[str, dict[str, Any]] = {}
        self.implementation: str | None = "kernel"
        self.greeted: list[Any] = []
        (place / "node.json").write_text(json.dumps(self.plan.specs["c1"]))
        monkeypatch.setattr(Verifier, "NODE", str(place / "node.json"))
        monkeypatch.setattr(Verifier, "PAUSE", 0)
        modules = {
            "isthmus_agent.cli.client": SimpleNamespace(ask=lambda _socket, _what: self.status()),
            "isthmus_agent.netlink.wireguard": SimpleNamespace(greet=lambda *words: self.greeted.append(words)),
        }
        monkeypatch.setattr(verifier, "bundle_module", lambda _module, name: modules[name])

    def status(self) -> dict[str, Any]:
        nodes = [
            {"cluster": "onprem", "name": name, "endpoint": f"198.18.1.{name[1]}", "encryption": found}
            for name in ("o1", "o2", "o3")
            if (found := self.said.get(name, GOOD))
        ]
        return {"nodes": nodes, "wireguard": {"implementation": self.implementation}}

    def verifier(self, silent: str = "") -> Verifier:
        hosts = [{"name": name, "cluster": "onprem"} for name in ("o1", "o2", "o3") if name != silent]
        params = {
            "spec": self.plan.specs["c1"],
            "record": self.plan.record,
            "services": [],
            "hosts": hosts,
            "timeout": 3,
        }
        return Verifier(SimpleNamespace(params=params))

    def encrypted(self, silent: str = "") -> list[str]:
        found = self.verifier(silent)
        encryption.check_encrypted(found)
        return list(found.problems)

    def changing(self) -> list[str]:
        found = self.verifier()
        encryption.check_changing(found)
        return list(found.problems)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch, running=False)


@pytest.fixture
def on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch, running=True)


def test_a_session_with_every_host_is_what_is_wanted(host: Host) -> None:
    assert host.encrypted() == []
    host.implementation = None
    assert host.encrypted() == ["encryption: WireGuard is not there; see `systemctl status isthmus-wireguard.service`"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({**GOOD, "state": "idle"}, "it should be, and is idle; "),
        (
            {**GOOD, "state": "closed", "reason": "it publishes no WireGuard key"},
            "is closed: it publishes no WireGuard key; ",
        ),
        ({**GOOD, "state": "plain"}, "it should be, and is plain; "),
        ({}, "is not known; "),
    ],
    ids=["no session", "no key", "in clear", "not known"],
)
def test_a_host_that_should_be_encrypted_and_is_not_is_named(host: Host, said: dict[str, Any], words: str) -> None:
    host.said["o2"] = said
    (found,) = host.encrypted()
    assert found.startswith(
        "encryption: traffic with o2 of cluster onprem (site onprem) is not encrypted as the inventory"
    )
    assert words in found
    assert host.encrypted(silent="o2") == [], "nothing was sent to a host that does not answer"


def test_a_pair_on_its_way_is_not_encrypted_yet(on_the_way: Host) -> None:
    assert len(on_the_way.encrypted()) == 3
    assert all("it is being turned on or off (accepts)" in words for words in on_the_way.encrypted())


def test_before_a_step_each_host_is_greeted_and_must_have_answered(on_the_way: Host) -> None:
    assert on_the_way.changing() == []
    assert on_the_way.greeted == [("198.18.2.1", ["198.18.1.1", "198.18.1.2", "198.18.1.3"], 8472, "isthmus-wg0")]
    on_the_way.said["o1"] = {**GOOD, "state": "plain", "handshake_age": None}
    on_the_way.said["o2"] = {**GOOD, "state": "plain", "handshake_age": None, "reason": "it publishes no WireGuard key"}
    on_the_way.said["o3"] = {}
    first, second, third = on_the_way.changing()
    assert "o1 of cluster onprem (site onprem) is not reached through WireGuard: WireGuard has no answer of it" in first
    assert "is UDP 51871 open both ways?" in first
    assert "it publishes no WireGuard key" in second
    assert "its node is not published yet" in third


def test_a_host_whose_pairs_do_not_change_has_nothing_to_prove(host: Host) -> None:
    assert host.changing() == []
    assert host.greeted == [("198.18.2.1", [], 8472, "isthmus-wg0")]


def test_where_one_side_opens_all_sessions_it_is_said_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Host(tmp_path, monkeypatch, running=False)
    found.said["o2"] = {**GOOD, "state": "idle"}
    for site, words in (
        ("cloud", "is UDP 51871 of onprem open to all, and may this host send there?"),
        ("onprem", "hosts of onprem open the session; is UDP 51871 open here to all, and may they send to it?"),
    ):
        sites = {name: {"inbound": name != site} for name in ("cloud", "onprem")}
        found.plan = estates.planned(estates.model({**estates.estate(), **ON, "sites": sites}))
        (told,) = found.encrypted()
        assert words in told
