# SPDX-License-Identifier: GPL-3.0-or-later
"""The teardown's steps that need no mesh: what of the host's own it gives back, and what it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit, resolver, units
from ansible_collections.isthmus.mesh.plugins.modules import teardown


class Host:
    """A host's systemctl and ip, as AnsibleModule starts them; `ran` are the commands that change something."""

    def __init__(self, *, check: bool = False) -> None:
        self.check_mode = check
        self.ran: list[str] = []
        self.mask: Path | None = None
        self.enabled = True
        self.rules = ""

    def fail_json(self, msg: str, **_more: Any) -> None:
        raise AssertionError(msg)

    def run_command(self, words: list[str]) -> tuple[int, str, str]:
        line = " ".join(words)
        if words[:2] == ["systemctl", "show"]:
            return 0, f"Id={words[-1]}\nUnitFileState={'enabled' if self.enabled else 'disabled'}\n", ""
        if words[0] == "ip" and "show" in words:
            return 0, self.rules if "rule" in words else "", ""
        self.ran.append(line)
        if "unmask" in words:
            assert self.mask is not None
            self.mask.unlink()
        if "disable" in words:
            self.enabled = False
        return 0, "", ""


@pytest.fixture
def masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mask of the distribution's etcd unit."""
    monkeypatch.setattr(units, "UNIT_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(etcd_unit, "MASKED", str(tmp_path / "before"))
    path = tmp_path / etcd_unit.DISTRIBUTION
    path.symlink_to("/dev/null")
    return path


UNMASK, DISABLE = "systemctl unmask --quiet etcd.service", "systemctl disable --quiet etcd.service"


@pytest.mark.parametrize(("before", "ran"), [(None, []), ("enabled", [UNMASK]), ("absent", [UNMASK, DISABLE])], ids=str)
def test_the_distributions_unit_is_given_back(masked: Path, before: str | None, ran: list[str]) -> None:
    if before is not None:
        Path(etcd_unit.MASKED).write_text(before)
    predicted, first, again = Host(check=True), Host(), Host()
    first.mask = masked
    again.enabled = False
    changed = []
    for host in (predicted, first, again):
        step = teardown.Teardown(host)
        step.distribution_unit()
        changed.append(step.changes.changed)
    assert (predicted.ran, first.ran, again.ran) == ([], ran, [])
    assert changed == [bool(ran), bool(ran), False]
    assert masked.is_symlink() is (before is None)


def test_only_rules_of_our_table_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teardown, "DEVICE", "isthmus-none")
    host = Host()
    host.rules = (
        "0:\tfrom all lookup local\n"
        "730:\tfrom 10.1.0.0/28 lookup 730 proto 73\n"
        "800:\tfrom 10.9.0.0/16 lookup 7301\n"
        "32766:\tfrom all lookup main\n"
    )
    teardown.Teardown(host).device()
    assert {line for line in host.ran if line.startswith("ip -4")} == {"ip -4 rule delete priority 730 table 730"}


@pytest.mark.parametrize("copy", ["search old\n", None])
def test_resolv_conf_is_given_back_without_our_copy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: str | None
) -> None:
    for name, file in (("RESOLV_CONF", "resolv.conf"), ("ORIGINAL", "original"), ("ORIGINAL_LINK", "original-link")):
        monkeypatch.setattr(resolver, name, str(tmp_path / file))
    if copy is not None:
        (tmp_path / "original").write_text(copy)
    (tmp_path / "resolv.conf").write_text(resolver.joined_file("nameserver 192.0.2.1\n"))
    step = teardown.Teardown(Host())
    step.resolver()
    assert step.removed == [str(tmp_path / "resolv.conf")]
    assert (tmp_path / "resolv.conf").read_text() == "nameserver 192.0.2.1\n"
    again = teardown.Teardown(Host())
    again.resolver()
    assert again.changes.changed is False
