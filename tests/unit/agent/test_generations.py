# SPDX-License-Identifier: GPL-3.0-or-later
"""Generations as the module keeps them and the agent's package restores them, on files of a test."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import bundle
from ansible_collections.isthmus.mesh.plugins.module_utils import generations as module_side
from isthmus_agent import generations
from isthmus_agent.cli import main as cli
from isthmus_mesh.generations import KEPT, Generation, doomed, what_failed

MARK = "# ours"


class Host:
    """A host's files, its systemd and the module that changes it."""

    check_mode = False

    def __init__(self, place: Path) -> None:
        self.etc, self.place = place / "etc", place / "generations"
        self.etc.mkdir()
        self.ran: list[list[str]] = []
        self.removed = 0
        self.spec, self.resolv = self.etc / "node.json", self.etc / "resolv.conf"
        self.unit, self.extra = self.etc / "isthmusd.service", self.etc / "extra.service"
        self.boot, self.wanted = self.etc / "boot.service", self.etc / "wants" / "boot.service"
        self.bundles = [place / "opt" / name for name in ("old", "new")]
        for home in self.bundles:
            (home / "bin").mkdir(parents=True)
            (home / "bin" / "isthmus").touch(mode=0o755)
        self.link = place / "opt" / "current"
        self.link.symlink_to(self.bundles[0])
        self.calls = place / "calls"
        tool = place / "bin" / "systemctl"
        tool.parent.mkdir()
        tool.write_text(f'#!/bin/sh\necho "$@" >> {self.calls}\n')
        tool.chmod(0o755)
        self.module = module_side.Generations(
            self,  # type: ignore[arg-type]
            {
                str(self.spec): (("isthmusd.service",), ""),
                str(self.unit): (("isthmusd.service",), ""),
                str(self.extra): (("extra.service",), ""),
                str(self.resolv): ((), MARK),
                str(self.link): (("isthmusd.service",), ""),
            },
        )

    # -- what a module has

    def run_command(self, words: list[str]) -> tuple[int, str, str]:
        self.ran.append(words)
        return 0, "", ""

    def fail_json(self, msg: str) -> None:
        raise AssertionError(msg)

    # -- what happens to a host

    def change(self, spec: str, confirmed: bool = True, **files: str) -> int:
        """A run of the playbook."""
        number = self.module.begin(f"{spec}{'0' * 60}", spec, True, 180)
        self.spec.write_text(spec)
        self.unit.write_text(f"of {spec}")
        for name, content in files.items():
            path: Path = getattr(self, name)
            path.write_text(content)
        self.module.finish(number)
        if confirmed:
            self.module.confirm(number)
        return number

    def back(self, number: int, unless: int | None = None) -> generations.Restored | None:
        def remove() -> list[str]:
            self.removed += 1
            return ["device isthmus0"]

        return generations.roll_back(self.place, number, "nobody came", remove, unless)

    def systemctl(self) -> list[str]:
        found = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return found

    def state(self, number: int) -> str:
        return generations.known(self.place)[number].state


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(module_side, "DIRECTORY", str(made.place))
    monkeypatch.setattr(module_side.fmt, "SPEC", str(made.spec))
    monkeypatch.setattr(bundle, "CURRENT", str(made.link))
    for name, path in {"BOOT": made.boot, "BOOT_WANTED": made.wanted}.items():
        monkeypatch.setattr(module_side.fmt, name, str(path))
        monkeypatch.setattr(generations, name, str(path))
    monkeypatch.setattr(generations, "PLACE", made.place)
    monkeypatch.setattr(generations, "SPEC", str(made.spec))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return made


def test_a_document_is_read_as_it_was_written(host: Host) -> None:
    host.change("a")
    for one in generations.known(host.place).values():
        assert Generation.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    for broken in ({}, {"schema": 2}, {"schema": 1, "number": 1}, [], None):
        with pytest.raises(ValueError, match="it is"):
            Generation.from_dict(broken)


def test_files_come_back_with_their_modes_and_only_what_differs_starts_anew(host: Host) -> None:
    host.change("a", extra="same")
    host.spec.chmod(0o640)
    assert host.change("b", extra="same") == 3, "a mode changed by hand is a generation of its own"
    assert generations.differing(generations.known(host.place)[2]) == [str(host.unit), str(host.spec)]
    restored = host.back(2)
    assert restored is not None
    assert restored.problems == ()
    assert (host.spec.read_text(), host.spec.stat().st_mode & 0o777, host.unit.read_text()) == ("a", 0o640, "of a")
    assert host.systemctl() == [
        "daemon-reload",
        "enable --quiet isthmusd.service",
        "restart isthmusd.service",
        "stop isthmus-rollback.timer",
    ]
    assert generations.current(host.place) == 2
    assert generations.differing(generations.known(host.place)[2]) == []
    assert host.removed == 0


def test_what_was_not_there_goes_and_what_is_gone_comes_back(host: Host) -> None:
    host.change("a")
    host.change("b", extra="new")
    assert host.back(1) is not None
    assert not host.extra.exists()
    assert "disable --now --quiet extra.service" in host.systemctl()
    assert host.back(2) is not None
    assert host.extra.read_text() == "new"
    assert "restart extra.service isthmusd.service" in host.systemctl()


def test_before_the_first_the_host_was_no_member(host: Host) -> None:
    host.change("a", confirmed=False)
    assert host.back(0, 1) == generations.Restored(
        (
            "stopped isthmusd.service",
            f"removed {host.unit}",
            f"removed {host.spec}",
            "removed device isthmus0",
        ),
        (),
    )
    assert not host.spec.exists()
    assert (host.state(0), host.state(1), host.removed) == ("confirmed", "rolled back", 1)


def test_an_operators_file_is_restored_only_for_our_part_in_it(host: Host) -> None:
    host.resolv.symlink_to("elsewhere")
    number = host.module.begin("", "a", True, 180)
    host.resolv.unlink()
    host.resolv.write_text(f"{MARK}\nnameserver 192.0.2.1\n")
    host.module.finish(number)
    host.module.confirm(number)
    host.change("b")
    host.resolv.write_text(f"{MARK}\nnameserver 192.0.2.2\n")
    host.back(1)
    assert host.resolv.read_text() == f"{MARK}\nnameserver 192.0.2.2\n", "a lease since then is no business of ours"
    host.back(0)
    assert host.resolv.is_symlink()
    assert str(host.resolv.readlink()) == "elsewhere"


def test_the_bundle_goes_back_while_it_is_there(host: Host) -> None:
    host.change("a")
    host.link.unlink()
    host.link.symlink_to(host.bundles[1])
    assert host.change("b", confirmed=False) == 2, "that the bundle's own module moved the link is no edit by hand"
    armed = host.ran[-1]
    assert armed[-5:] == [str(host.bundles[0] / "bin" / "isthmus"), "rollback", "1", "--unless-confirmed", "2"]
    host.back(1, 2)
    assert host.link.readlink() == host.bundles[0]
    (host.bundles[1] / "bin" / "isthmus").unlink()
    (host.bundles[1] / "bin").rmdir()
    host.bundles[1].rmdir()
    restored = host.back(2)
    assert restored is not None
    assert f"left {host.link} as it is: {host.bundles[1]} is there no more" in restored.done
    assert host.link.readlink() == host.bundles[0]


def test_only_what_waits_is_taken_back(host: Host) -> None:
    host.change("a")
    number = host.change("b")
    assert host.back(1, number) is None
    assert host.spec.read_text() == "b"
    waiting = host.change("c", confirmed=False)
    assert host.back(number, waiting) is not None
    assert host.spec.read_text() == "b"
    assert host.module.confirm(waiting).state == "rolled back"
    assert generations.known(host.place)[waiting].note == "nobody came"


def test_one_that_is_chosen_by_hand_stays(host: Host) -> None:
    host.change("a")
    waiting = host.change("b", confirmed=False)
    host.back(waiting)
    assert host.systemctl() == ["stop isthmus-rollback.timer"]
    assert (host.state(waiting), generations.current(host.place)) == ("confirmed", waiting)


def test_the_timer_gets_its_time_anew_when_the_change_is_complete(host: Host) -> None:
    host.change("a")
    timers = [word for words in host.ran for word in words if word.startswith("--on-active")]
    assert timers == ["--on-active=180s", "--on-active=60s"]
    stopped = [words[2] for words in host.ran[-3:]]
    assert stopped == ["isthmus-rollback.timer", "isthmus-rollback.service", "boot.service"]


def test_a_boot_before_it_was_confirmed_takes_it_back_too(host: Host) -> None:
    good = host.change("a")
    assert not host.boot.exists()
    waiting = host.change("b", confirmed=False)
    assert host.wanted.readlink() == host.boot
    command = f"ExecStart={host.bundles[0]}/bin/isthmus rollback {good} --unless-confirmed {waiting}"
    assert {command, "Restart=on-failure", "RestartSec=60s"} <= set(host.boot.read_text().splitlines())
    assert host.back(good, waiting) is not None
    assert not host.boot.exists()
    assert not host.wanted.is_symlink()
    host.change("c")
    assert not host.boot.exists()
    assert not host.wanted.is_symlink()


def test_the_way_back_leads_past_what_an_interrupted_run_left(host: Host) -> None:
    host.change("a")
    number = host.module.begin("", "killed", True, 180)
    host.spec.write_text("half")
    assert host.module.waiting() is not None
    assert host.change("c", confirmed=False) == number
    assert host.ran[-1][-4:] == ["rollback", "1", "--unless-confirmed", str(number)]
    host.back(1, number)
    assert host.spec.read_text() == "a"


def test_what_a_hand_changed_is_kept_before_it_is_replaced(host: Host) -> None:
    host.change("a")
    host.spec.write_text("by hand")
    assert host.change("b") == 3
    assert generations.known(host.place)[2].note == "changed by hand"
    host.back(2)
    assert host.spec.read_text() == "by hand"


def test_the_last_ten_are_kept_and_the_one_to_go_back_to(host: Host) -> None:
    for number in range(1, 15):
        assert host.change(f"v{number}") == number
    assert list(generations.known(host.place)) == list(range(15 - KEPT, 15))
    host.back(5)
    assert host.change("again") == 15
    assert 5 in generations.known(host.place)
    assert doomed(range(20), [2, None]) == [*range(2), *range(3, 20 - KEPT)]


def test_a_damaged_copy_is_refused_before_anything_is_changed(host: Host) -> None:
    host.change("a")
    host.change("b")
    kept = generations.known(host.place)[1].files
    assert kept is not None
    (host.place / "1" / str(kept[str(host.spec)].sha256)).write_text("other")
    with pytest.raises(generations.GenerationError, match="is damaged"):
        host.back(1)
    assert (host.spec.read_text(), host.unit.read_text()) == ("b", "of b")
    assert generations.current(host.place) == 2


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(list(words))
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_command_line(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _err = run(capsys, "generations")
    assert (status, out) == (0, "no generation: nothing that this host depends on was changed here yet\n")
    status, _out, err = run(capsys, "rollback", "1")
    assert status == 1
    assert "there are no generations" in err
    host.change("a")
    host.change("b")
    status, out, _err = run(capsys, "generations", "-o", "json")
    found: list[dict[str, Any]] = json.loads(out)["generations"]
    assert [(one["number"], one["current"], one["state"]) for one in found] == [
        (0, False, "confirmed"),
        (1, False, "confirmed"),
        (2, True, "confirmed"),
    ]
    assert [one["differs"] for one in found][1:] == [[str(host.unit), str(host.spec)], []]
    status, out, _err = run(capsys, "generations")
    assert [line.split()[:2] for line in out.splitlines()[1:4]][2] == ["2", "*"]
    status, out, err = run(capsys, "rollback", "9")
    assert (status, out) == (1, "")
    assert "there is no generation 9; there are: 0, 1, 2" in err
    status, out, err = run(capsys, "rollback", "1")
    assert (status, err) == (0, "")
    assert f"restored {host.spec}" in out
    assert host.spec.read_text() == "a"
    status, out, _err = run(capsys, "rollback", "1")
    assert (status, out.splitlines()[0]) == (0, "everything was as in that generation already")
    status, out, _err = run(capsys, "rollback", "0", "--unless-confirmed", "2")
    assert status == 0
    assert "waits for no confirmation" in out
    assert host.spec.read_text() == "a"


def test_what_fails_on_the_way_back_is_told_and_the_rest_is_done(
    host: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    host.change("a")
    host.change("b")
    tool = tmp_path / "bin" / "systemctl"
    tool.write_text('#!/bin/sh\ncase "$1" in restart) echo "it does not start" >&2; exit 1;; esac\n')
    status, _out, err = run(capsys, "rollback", "1")
    assert status == 1
    assert "systemctl restart isthmusd.service: it does not start" in err
    assert (host.spec.read_text(), generations.current(host.place)) == ("a", 1)
    assert host.back(2) is not None
    waiting = host.change("c", confirmed=False)
    assert run(capsys, "rollback", "2", "--unless-confirmed", str(waiting))[0] == 1
    assert host.state(waiting) == "rolled back", "its files are back"
    note = generations.known(host.place)[waiting].note
    assert what_failed(note) == "systemctl restart isthmusd.service: it does not start"


@pytest.mark.parametrize("by", ["the timer", "hand"])
def test_what_cannot_be_written_is_tried_again_and_stays_unconfirmed(
    host: Host, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    good = host.change("a")
    waiting = host.change("b", confirmed=False)
    assert {"--property=Restart=on-failure", "--property=RestartSec=60s"} <= set(host.ran[-1])
    host.systemctl()
    words = ["rollback", str(good), *(["--unless-confirmed", str(waiting)] if by == "the timer" else [])]
    host.unit.unlink()
    host.unit.mkdir()  # nothing can be put in its place
    status, out, err = run(capsys, *words)
    failed = f"{host.unit}: Is a directory"
    assert (status, err) == (1, f"isthmus: {failed}\n")
    assert f"this host is not generation {good} yet" in out
    assert host.spec.read_text() == "a", "the rest is restored"
    assert (host.state(waiting), generations.current(host.place)) == ("waiting", waiting)
    assert host.wanted.readlink() == host.boot
    assert "stop isthmus-rollback.timer" not in host.systemctl()
    note = generations.known(host.place)[waiting].note
    assert what_failed(note) == failed
    with pytest.raises(AssertionError, match=f"took too long: {note}"):
        host.module.finish(waiting)

    host.unit.rmdir()
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert (host.unit.read_text(), generations.current(host.place)) == ("of a", good)
    assert (host.state(waiting), host.boot.exists()) == ("rolled back", False)
    assert what_failed(generations.known(host.place)[waiting].note) == ""


def test_what_cannot_be_kept_of_the_way_back_is_tried_again(
    host: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = host.change("a")
    waiting = host.change("b", confirmed=False)

    def full(place: Path, *_rest: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)

    with monkeypatch.context() as patched:
        patched.setattr(generations, "_write", full)
        status, _out, err = run(capsys, "rollback", str(good), "--unless-confirmed", str(waiting))
    assert (status, err) == (1, f"isthmus: {host.place}: No space left on device\n")
    assert (host.spec.read_text(), host.state(waiting), host.boot.exists()) == ("a", "waiting", True)
    assert run(capsys, "rollback", str(good), "--unless-confirmed", str(waiting))[0] == 0
    assert (host.state(waiting), host.boot.exists()) == ("rolled back", False)


def test_restoring_needs_nothing_heavy() -> None:
    """What the timer runs imports neither etcd's client nor libbpf before it has restored the files."""
    script = "import sys, isthmus_agent.cli.main; print([m for m in ('grpc', 'pyroute2') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(generations.__file__).parents[1],
    )
    assert done.stdout == "[]\n"
