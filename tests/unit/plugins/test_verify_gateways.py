# SPDX-License-Identifier: GPL-3.0-or-later
"""What `verify` says of tunnels between gateways and of the rules that close other ways, by what strongSwan and nft
answer and by packets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import packets, strongswan
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec
from ansible_collections.isthmus.mesh.plugins.module_utils.verify import gateways
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import Verifier
from unit.mesh import estates
from unit.mesh.test_ipsec import ON

TUNNEL = "isthmus-cloud: #1, ESTABLISHED, IKEv2, 1_i 2_r*\n  net: #1, reqid 1, INSTALLED, TUNNEL-in-UDP\n"


class Host:
    """o1, the gateway of onprem. `answers` are those of commands, by their first two words, and of nft by the table
    that it lists; `refused` is why the other gateway does not answer a packet, "" when it does."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
        before = estates.planned(estates.model()) if running else None
        self.plan = estates.planned(estates.model({**estates.estate(), **ON}), before)
        self.spec = self.plan.specs["o1"]
        self.answers = {
            "/bin/sh --list-sas": TUNNEL,
            **{table: ipsec.guard(self.spec["ipsec"]) or "" for table in (ipsec.GUARD, ipsec.KEPT)},
            "journalctl -u": "",
        }
        self.refused = ""
        (place / "node.json").write_text(json.dumps(self.spec))
        monkeypatch.setattr(Verifier, "NODE", str(place / "node.json"))
        monkeypatch.setattr(strongswan, "SWANCTL", "/bin/sh")
        monkeypatch.setattr(strongswan, "OPERATORS", str(place / "nftables.conf"))
        monkeypatch.setattr(packets, "path_mtu", lambda *_: 1400)
        monkeypatch.setattr(packets, "echo", self.echo)

    def echo(self, source: str, target: str, size: int, _timeout: float) -> None:
        assert (source, target, size) == ("198.18.1.1", "198.18.2.1", 1400)
        if self.refused:
            raise packets.NoAnswer(self.refused)

    def run_command(self, command: list[str]) -> tuple[int, str, str]:
        return 0, self.answers[command[-1] if command[0] == strongswan.NFT else " ".join(command[:2])], ""

    def problems(self, check: str, *arguments: object) -> list[str]:
        params = {"spec": self.spec, "record": self.plan.record, "services": [], "hosts": [], "timeout": 3}
        found = Verifier(SimpleNamespace(params=params, run_command=self.run_command))
        getattr(gateways, check)(found, *arguments)
        return list(found.problems)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch, running=False)


def test_a_tunnel_with_all_closed_beside_it_is_good(host: Host) -> None:
    assert host.problems("check_gateways") == []


def test_a_tunnel_that_is_not_there_is_named_with_strongswans_reason(host: Host) -> None:
    host.answers["/bin/sh --list-sas"] = ""
    host.answers["journalctl -u"] = "05[IKE] received AUTHENTICATION_FAILED notify error\n"
    (found,) = host.problems("check_gateways")
    assert found.startswith(
        "gateways: the tunnel to the gateway of site cloud (198.18.2.1) is not there: authentication failed"
    )
    assert "UDP 500 and 4500 must be open" in found


def test_a_tunnel_in_which_nobody_answers_is_named(host: Host) -> None:
    host.refused = "no answer to 3 packets of 1400 bytes"
    (found,) = host.problems("check_gateways")
    assert "the other gateway does not answer in it: no answer to 3 packets of 1400 bytes" in found


@pytest.mark.parametrize("table", [ipsec.GUARD, ipsec.KEPT])
def test_rules_that_somebody_took_away_are_named(host: Host, table: str) -> None:
    host.answers[table] = ""
    (found,) = host.problems("check_gateways")
    assert found.startswith("gateways: the rules that keep packets from other ways")
    assert f"`nft list table ip {table}`" in found


def test_a_file_of_the_operator_that_the_kernel_would_refuse_is_named(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "nftables.conf"
    file.write_text(f"flush ruleset\ntable ip {ipsec.GUARD} {{\n}}\n")
    assert host.problems("check_gateways") == [], "what replaces and is replaced"
    file.write_text(f"flush ruleset\ntable ip {ipsec.KEPT} {{ # progname python3\n\tflags owner\n}}\n")
    (found,) = host.problems("check_gateways")
    assert found.startswith(f"gateways: {file} has the mesh's table {ipsec.KEPT}")


def test_before_the_next_step_only_gateways_prove_their_tunnels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, monkeypatch, running=True)
    assert host.problems("check_gateway_way") == []
    host.answers["/bin/sh --list-sas"] = ""
    (found,) = host.problems("check_gateway_way")
    assert "strongSwan has not said why" in found
    (tmp_path / "node.json").write_text(json.dumps(host.plan.specs["o2"]))
    assert host.problems("check_gateway_way") == []
    assert strongswan.UNIT in found


def test_a_gateway_that_does_not_answer_and_tunnels_that_pass_nothing_are_named(host: Host) -> None:
    there = {"host": "o2", "cluster": "onprem", "address": "198.18.1.2", "state": "up"}
    good = {"gateways": [there], "lost": False, "tunnels": {"cloud": True}}
    assert host.problems("check_led", {"gateways": good}) == []
    assert host.problems("check_led", {"gateways": None}) == []
    away = {**good, "gateways": [{**there, "state": "down"}], "tunnels": {"cloud": False}}
    first, second = host.problems("check_led", {"gateways": away})
    assert first.startswith("gateways: gateway o2 (198.18.1.2) of this site does not answer o1, so there is no second")
    assert second.startswith("gateways: nothing passes through the tunnels of this gateway to site cloud")
    (lost,) = host.problems("check_led", {"gateways": {**away, "lost": True, "tunnels": None}})
    assert "so nothing reaches the sites behind gateways" in lost
