# SPDX-License-Identifier: GPL-3.0-or-later
"""The teardown's steps that need no mesh: what of the host's own it gives back, and what it asks for."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit, listener, resolver, units
from ansible_collections.isthmus.mesh.plugins.modules import teardown
from isthmus_agent.netlink import network, nftables


class Host:
    """A host's systemctl and ip, as AnsibleModule starts them; `ran` are the commands that change something."""

    def __init__(self, *, check: bool = False) -> None:
        self.check_mode = check
        self.ran: list[str] = []
        self.mask: Path | None = None
        self.enabled = True
        self.rules = ""
        self.timer = "inactive"
        self.filters = ""

    def fail_json(self, msg: str, **_more: Any) -> None:
        raise AssertionError(msg)

    def run_command(self, words: list[str]) -> tuple[int, str, str]:
        line = " ".join(words)
        if words[:2] == ["systemctl", "show"] and "isthmus-rollback.timer" in words:
            return 0, f"Id=isthmus-rollback.timer\nActiveState={self.timer}\n\nActiveState=inactive\n", ""
        if words[:2] == ["systemctl", "show"]:
            return 0, f"Id={words[-1]}\nUnitFileState={'enabled' if self.enabled else 'disabled'}\n", ""
        if words[0] == "ip" and "show" in words:
            return 0, self.rules if "rule" in words else "", ""
        if line == "tc qdisc show":
            return 0, "qdisc noqueue 0: dev lo root\nqdisc clsact ffff: dev eth0 parent ffff:fff1 \n", ""
        if words[:3] == ["tc", "filter", "show"]:
            return 0, self.filters, ""
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


@pytest.mark.parametrize(("state", "ran"), [("active", ["systemctl stop isthmus-rollback.timer"]), ("inactive", [])])
def test_no_timer_brings_back_what_is_taken_away(state: str, ran: list[str]) -> None:
    for check in (True, False):
        host = Host(check=check)
        host.timer = state
        step = teardown.Teardown(host)
        step.timer()
        assert host.ran == ([] if check else ran)
        assert step.removed == (["unit isthmus-rollback.timer"] if ran else [])


@pytest.mark.parametrize("others", [True, False])
def test_networkd_has_its_own_settings_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool) -> None:
    place = tmp_path / "networkd.conf.d"
    place.mkdir()
    (place / "isthmus.conf").write_text(units.networkd_drop_in())
    if others:
        (place / "10-speed.conf").touch()
    monkeypatch.setattr(units, "NETWORKD_DROP_IN", str(place / "isthmus.conf"))
    for check, removed in ((True, True), (False, True), (False, False)):
        step = teardown.Teardown(Host(check=check))
        step.networkd()
        assert step.changes.changed is bool(step.removed) is removed
        assert (place / "isthmus.conf").exists() is check
    assert place.exists() is others


def test_only_rules_of_our_protocol_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teardown, "DEVICES", ("isthmus-none",))
    host = Host()
    host.rules = (
        "0:\tfrom all lookup local\n"
        "730:\tfrom 10.1.0.0/28 lookup 730 proto 73\n"
        "732:\tfrom all ipproto udp dport 8472 lookup 732 proto 73\n"
        "733:\tfrom all fwmark 0x49/0xff lookup 733 proto 73\n"
        "729:\tfrom all fwmark 0x4e/0xff lookup 734 proto 73\n"
        "734:\tfrom all fwmark 0x53/0xff lookup main proto 73\n"
        "738:\tfrom all iif lo lookup 738 proto 73\n"
        "728:\tfrom all fwmark 0x4b/0xff lookup main proto 73\n"
        "810:\tfrom all fwmark 0x4b lookup main\n"
        "800:\tfrom 10.9.0.0/16 lookup 7301\n"
        "32766:\tfrom all lookup main\n"
    )
    teardown.Teardown(host).device()
    assert {line for line in host.ran if line.startswith("ip -4")} == {
        "ip -4 rule delete priority 728 table main protocol 73",
        "ip -4 rule delete priority 729 table 734 protocol 73",
        "ip -4 rule delete priority 730 table 730 protocol 73",
        "ip -4 rule delete priority 732 table 732 protocol 73",
        "ip -4 rule delete priority 733 table 733 protocol 73",
        "ip -4 rule delete priority 734 table main protocol 73",
        "ip -4 rule delete priority 738 table 738 protocol 73",
    }


def test_only_our_program_goes_from_a_device_of_the_underlay() -> None:
    host = Host()
    host.filters = (
        "filter protocol all pref 73 bpf chain 0 \n"
        "filter protocol all pref 73 bpf chain 0 handle 0x1 underlay_ingres:[9] direct-action not_in_hw id 9 "
        "name underlay_ingres tag 4a05cbb3fc4e1b1c jited \n"
    )
    step = teardown.Teardown(host)
    step.filters()
    assert host.ran == ["tc filter del dev eth0 ingress pref 73"]
    assert step.removed == ["program underlay_ingress on eth0"]
    foreign = Host()
    foreign.filters = "filter protocol all pref 73 bpf chain 0 handle 0x1 somebody_elses direct-action id 9 \n"
    teardown.Teardown(foreign).filters()
    assert foreign.ran == []


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


# --- places that are partly the operator's


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A directory like /var/lib/isthmus."""
    place = tmp_path / "lib" / "isthmus"
    (place / "etcd" / "member").mkdir(parents=True)
    (place / "etcd" / "member" / "db").write_text("keys")
    (place / "resolver").mkdir()
    (place / "resolver" / "original").write_text("nameserver 192.0.2.1\n")
    return place


def trees(*paths: Path) -> tuple[list[str], list[str]]:
    """Removed and noted: predicted, done, and nothing left to do afterwards."""
    predicted, done, again = (teardown.Teardown(Host(check=check)) for check in (True, False, False))
    for step in (predicted, done, again):
        for path in paths:
            step.tree(str(path))
    assert (predicted.removed, predicted.notes, predicted.changes.diff) == (done.removed, done.notes, done.changes.diff)
    assert (again.removed, again.notes, again.changes.changed) == ([], [], False)
    return done.removed, done.notes


def test_a_directory_of_ours_goes_whole(state: Path) -> None:
    assert trees(state) == ([str(state)], [])
    assert not state.exists()


def test_a_link_of_the_operators_stays_and_its_directory_is_emptied(state: Path, tmp_path: Path) -> None:
    target = tmp_path / "data"
    state.rename(target)
    state.symlink_to(target)
    removed, notes = trees(state)
    assert removed == [f"content of {state}"]
    assert notes == [f"{target} is emptied and stays, because {state} is a link to it"]
    assert state.is_symlink()
    assert list(target.iterdir()) == []


def test_a_link_to_nothing_stops_nothing(state: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert trees(link, state) == ([str(state)], [])
    assert link.is_symlink()


def test_a_parent_that_is_a_link_is_no_reason_to_keep_ours(state: Path, tmp_path: Path) -> None:
    (tmp_path / "var").symlink_to(tmp_path / "lib")
    assert trees(tmp_path / "var" / "isthmus") == ([str(tmp_path / "var" / "isthmus")], [])
    assert not state.exists()


def test_mount_points_are_read_with_their_blanks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "36 35 98:0 / /data/a\\040b rw - ext4 /dev/x rw\n37 35 98:0 /x /bound rw master:1 - ext4 /dev/x rw\n"
    )
    monkeypatch.setattr(teardown, "MOUNTS", str(table))
    assert teardown.mount_points() == {"/data/a b", "/bound"}


@pytest.mark.root
@pytest.mark.parametrize("where", [".", "etcd"])
def test_a_mount_point_is_emptied_and_stays(state: Path, tmp_path: Path, where: str) -> None:
    """Bound from the same file system, which os.path.ismount would not see."""
    place = state / where
    disk = tmp_path / "disk"
    place.rename(disk)
    place.mkdir()
    (disk / "lost+found").mkdir()
    subprocess.run(["mount", "--bind", str(disk), str(place)], check=True)
    try:
        removed, notes = trees(state)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert removed == [f"content of {state}"]
    assert notes == [f"{place} is emptied and stays, because something is mounted there"]
    assert [path.name for path in disk.iterdir()] == ["lost+found"]
    left = {str(path.relative_to(state)) for path in state.rglob("*")}
    assert left == (set() if where == "." else {where})


# --- units


def test_only_units_of_ours_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(etcd_unit, "FIRST_START", str(tmp_path / "run" / "first-start.conf"))
    theirs = ["isthmus-backup.timer", "isthmus-backup.service", "isthmus.mount"]
    for name in ("isthmusd.service", "isthmus-etcd.service", *theirs):
        (tmp_path / name).write_text("[Unit]\n")
    (tmp_path / "isthmusd.service.d").mkdir()
    host = Host()
    step = teardown.Teardown(host)
    step.units()
    assert step.removed == ["unit isthmusd.service", "unit isthmus-etcd.service"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "isthmusd.service.d"])
    assert host.ran[0] == "systemctl disable --now --quiet isthmusd.service isthmus-etcd.service"


def test_every_unit_that_a_module_writes_is_known_to_the_teardown() -> None:
    """Every text in the modules that ends like a unit's name and begins like one of ours."""
    root = Path(teardown.__file__).parents[1]
    files = [*root.glob("modules/*.py"), *root.glob("module_utils/**/*.py")]
    texts = {
        node.value
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = {text for text in texts if text.startswith("isthmus") and text.endswith((".service", ".timer", ".path"))}
    # The first is transient and in no file; of the last the format of generations has the whole path.
    assert named - {listener.UNIT} | {Path(teardown.BOOT).name} == set(teardown.UNITS)


def test_what_the_agent_marks_as_its_own_is_what_goes() -> None:
    assert str(network.ROUTE_PROTOCOL) == teardown.PROTOCOL == units.ROUTE_PROTOCOL
    assert nftables.TABLE == teardown.TABLE
