# SPDX-License-Identifier: GPL-3.0-or-later
"""What `verify` says of sessions with routers, and what `teardown` gives back of FRR, by what FRR and its files say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import frr
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.bgp import check_bgp
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import Verifier
from isthmus_mesh import bgp
from unit.mesh import estates

ROUTERS = [{"address": f"198.18.2.{number}", "as_number": 65000, "bfd": False} for number in (253, 254)]
OWN = {"as_number": 65102, "routers": ROUTERS}


class Host:
    """c1 of a native estate. `lacking`: routers without a session, and why; `sent` and `received` by router."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan = estates.planned(estates.model({**estates.estate(), "routing": "native"}))
        self.lacking: dict[str, str] = {}
        self.sent = {router["address"]: ["10.102.0.0/28"] for router in ROUTERS}
        self.received = {"198.18.2.254": ["10.101.0.0/28", "10.101.0.16/28", "10.101.0.32/28"]}
        monkeypatch.setattr(frr, "await_sessions", lambda _module, _own, _seconds: self.lacking)
        monkeypatch.setattr(frr, "routes", self.routes)

    def routes(self, _module: Any, router: str, kind: str) -> list[str]:
        return (self.sent if kind == "advertised-routes" else self.received).get(router, [])

    def checked(self, own: Any = OWN) -> Verifier:
        params = {
            **{"spec": self.plan.specs["c1"], "record": self.plan.record, "bgp": own},
            **{"services": [], "hosts": [], "timeout": 3},
        }
        found = Verifier(SimpleNamespace(params=params))
        check_bgp(found)
        return found


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_sessions_that_are_there_are_proven_and_a_host_without_bgp_is_not_asked(host: Host) -> None:
    found = host.checked()
    assert (found.problems, found.warnings, found.proofs["bgp"]) == ([], [], 4)
    host.lacking = {"198.18.2.254": "away"}
    assert not host.checked(None).problems


def test_a_router_without_a_session_and_one_that_was_not_told_are_named(host: Host) -> None:
    host.lacking = {"198.18.2.254": "the router has another password (state Connect)"}
    host.sent["198.18.2.253"] = []
    not_told, none = host.checked().problems
    assert not_told.startswith("bgp: router 198.18.2.253 is not sent 10.102.0.0/28, but []; run the playbook")
    assert "no session with router 198.18.2.254: the router has another password (state Connect)" in none


def test_what_no_router_sends_is_a_remark_only(host: Host) -> None:
    del host.received["198.18.2.254"][1]
    found = host.checked()
    assert found.problems == []
    (remark,) = found.warnings
    assert remark.startswith("no router sends c1 a route to ")
    host.received["198.18.2.253"] = ["10.101.0.0/16"]
    assert host.checked().warnings == []


class Systemd:
    def __init__(self, module: Any) -> None:
        self.module = module

    def run(self, *words: str) -> None:
        self.module.ran.append(" ".join(words))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FRR's files where the mesh has configured it."""
    for name in ("CONF", "DAEMONS", "SAVED"):
        monkeypatch.setattr(frr, name, str(tmp_path / name))
    monkeypatch.setattr(frr.units, "Systemd", Systemd)
    monkeypatch.setattr(Changes, "_ids", lambda *_given: (os.getuid(), os.getgid()))
    spec = estates.planned(estates.model()).specs["c1"]
    (tmp_path / "CONF").write_text(bgp.frr_conf(OWN, spec, {"198.18.2.254": "s3cret"}))
    (tmp_path / "DAEMONS").write_text("bgpd=yes\nospfd=no\nbfdd=yes\n")
    return tmp_path


def host_module(check: bool = False) -> Any:
    """`ran`: what was told to vtysh and systemctl."""
    ran: list[str] = []

    def run_command(words: list[str]) -> tuple[int, str, str]:
        ran.append(" ".join(words[1:]))
        return 0, "", ""

    return SimpleNamespace(check_mode=check, ran=ran, run_command=run_command)


@pytest.mark.parametrize(
    ("saved", "conf", "daemons", "ran"),
    [
        (None, frr.PACKAGED_CONF, "bgpd=no\nospfd=no\nbfdd=no\n", ["disable --now --quiet frr.service"]),
        (
            {"came_with_us": False, "conf": "log syslog\n", "daemons": {"bgpd": "no", "bfdd": "yes"}}
            | {"enabled": False, "active": True},
            "log syslog\n",
            "bgpd=no\nospfd=no\nbfdd=yes\n",
            ["disable --quiet frr.service", "reset-failed frr.service", "restart frr.service"],
        ),
    ],
    ids=["came with us", "was there"],
)
def test_frr_is_given_back_as_it_was(
    files: Path, saved: dict[str, Any] | None, conf: str, daemons: str, ran: list[str]
) -> None:
    if saved is not None:
        (files / "SAVED").write_text(json.dumps(saved))
    ours = (files / "CONF").read_text()
    predicted, real = host_module(check=True), host_module()
    changes = Changes(predicted)
    assert frr.absent(predicted, changes)
    assert (changes.changed, predicted.ran, (files / "CONF").read_text()) == (True, [], ours)
    changes = Changes(real)
    assert frr.absent(real, changes)
    assert "s3cret" not in str(changes.diff)
    assert real.ran == [
        "-c configure terminal -c router bgp 65102 -c address-family ipv4 unicast -c no network 10.102.0.0/28",
        "-d bgpd -c show bgp neighbors json",
        "-c configure terminal -c no router bgp 65102",
        *ran,
    ], "routers are told at once"
    assert [(files / name).read_text() for name in ("CONF", "DAEMONS")] == [conf, daemons]
    assert not (files / "SAVED").exists()
    again = host_module()
    assert frr.absent(again, Changes(again)) == []
    assert again.ran == []


def test_the_diff_shows_that_a_password_changed_and_no_password() -> None:
    one, other = " neighbor 198.18.2.254 password a1\n", " neighbor 198.18.2.254 password b2\n"
    assert frr.shown(one, other) == (
        " neighbor 198.18.2.254 password (secret)\n",
        " neighbor 198.18.2.254 password (another secret)\n",
    )
    assert frr.shown(one, one)[0] == frr.shown(one, one)[1]
