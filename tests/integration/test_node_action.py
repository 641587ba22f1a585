# SPDX-License-Identifier: GPL-3.0-or-later
"""isthmus.mesh.node under a real ansible-playbook: a change is confirmed over a new connection or taken back.

The host is a mount and network namespace with an /etc of its own; systemd, ssh and the agent are `fake_systemd.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playbook import Recap, recaps

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]
NAME = "web.shop.svc.clusterset.local"
PLAYBOOK = """\
- hosts: all
  gather_facts: false
  tasks:
    - isthmus.mesh.node:
        spec: "{{ spec }}"
        estate: {roster: {revision: 1}}
        bundle_digest: "0123"
        timeout: 20
"""
# A writable /etc that is thrown away, and nothing of this machine's where the mesh puts its things.
NAMESPACE = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs {place}/over
mkdir {place}/over/upper {place}/over/work
mount -t overlay overlay -o lowerdir=/etc,upperdir={place}/over/upper,workdir={place}/over/work /etc
mkdir -p /etc/systemd/system /opt /var/lib /run
for one in /etc/systemd/system /opt /var/lib /run /sys/fs/bpf; do mount -t tmpfs tmpfs $one; done
ip link set lo up
rm -f /etc/resolv.conf
echo 'nameserver 127.0.0.1' > /etc/resolv.conf
echo 'hosts: files' > /etc/nsswitch.conf
mkdir -p /opt/isthmus/1.0.0-0123/bin /run/isthmus/dns
ln -s {place}/bin/isthmus /opt/isthmus/1.0.0-0123/bin/isthmus
ln -s /opt/isthmus/1.0.0-0123 /opt/isthmus/current
echo '10.111.0.5 {name}' > /run/isthmus/dns/hosts
echo '10.111.0.5 {name}' >> /etc/hosts
echo ready
exec sleep 600
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    recap: Recap
    output: str


class Host:
    """The host, and the controller beside it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        collections = place / "collections" / "ansible_collections" / "isthmus"
        collections.mkdir(parents=True)
        (collections / "mesh").symlink_to(ROOT)
        (place / "bin").mkdir()
        (place / "over").mkdir()
        (place / "play.yml").write_text(PLAYBOOK)
        fake = ROOT / "tests" / "integration" / "fake_systemd.py"
        for name in ("systemctl", "systemd-run", "ssh"):
            self.program(name, f'exec {sys.executable} {fake} {name} "$@"')
        self.program("isthmus", f'PYTHONPATH={ROOT / "agent"} exec {sys.executable} -m isthmus_agent.cli.main "$@"')
        self.environment = {
            **os.environ,
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "ISTHMUS_TEST_HOST": str(place),
            "ANSIBLE_COLLECTIONS_PATH": str(place / "collections"),
            "ANSIBLE_HOME": str(place / "home"),
            "ANSIBLE_CONFIG": str(ROOT / "tests" / "lab" / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
        }
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--net", "sh", "-c", NAMESPACE.format(place=place, name=NAME)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def program(self, name: str, line: str) -> None:
        path = self.place / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def end(self) -> None:
        for file in (self.place / "pids").glob("*"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.read_text()), signal.SIGKILL)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--target={self.process.pid}", "--mount", "--net", *words]
        return subprocess.run(
            enter, capture_output=True, text=True, check=False, cwd="/", env=self.environment, timeout=300
        )

    def play(self, *arguments: str, connection: str = "ssh", **spec: Any) -> Run:
        variables = {
            "ansible_connection": connection,
            "ansible_ssh_executable": str(self.place / "bin" / "ssh"),
            "ansible_python_interpreter": sys.executable,
            "spec": {
                "host": "onprem-1",
                "node": {"mesh4": "10.101.0.1"},
                "dns": {"domain": "clusterset.local"},
                "registrar": None,
                "service_ranges4": ["10.111.0.0/16"],
                "mesh_ranges4": ["10.101.0.0/16"],
                "hash": "a" * 64,
                **spec,
            },
        }
        tool = str(Path(sys.executable).with_name("ansible-playbook"))
        words = [tool, "-i", "onprem-1,", str(self.place / "play.yml"), "-e", json.dumps(variables), *arguments]
        done = self.run(*words)
        found = recaps(done.stdout)
        assert set(found) == {"onprem-1"}, done.stdout + done.stderr
        return Run(found["onprem-1"], done.stdout + done.stderr)

    def hurry(self) -> None:
        """The next change is taken back after one try to confirm it."""
        (self.place / "hurry").write_text(str(self.lines("ssh").count("command") + 2))

    def read(self, path: str) -> str:
        return self.run("cat", path).stdout

    def files(self) -> str:
        """What makes a generation, as it is."""
        names = "isthmus/node.json isthmus/boot-routes isthmus/dnsmasq.conf resolv.conf systemd/system/*.*"
        script = f"cd /etc; sha256sum {names}"
        return self.run("sh", "-c", script).stdout

    def generations(self) -> dict[int, dict[str, Any]]:
        found = json.loads(self.run("isthmus", "generations", "-o", "json").stdout)["generations"]
        return {one["number"]: one for one in found}

    def states(self) -> dict[int, str]:
        return {number: one["state"] for number, one in self.generations().items()}

    def current(self) -> int:
        return next(number for number, one in self.generations().items() if one["current"])

    def lines(self, name: str) -> list[str]:
        path = self.place / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(tmp_path, ignore_errors=True)


def test_a_change_is_confirmed_over_a_new_connection_and_a_converged_run_makes_none(host: Host) -> None:
    first = host.play()
    assert (first.recap.ok, first.recap.changed, first.recap.failed) == (1, 1, 0), first.output
    assert host.states() == {0: "confirmed", 1: "confirmed"}
    assert host.current() == 1
    assert "control" in host.lines("ssh"), "the connection was reset"
    assert [line.split()[1] for line in host.lines("calls") if line.startswith("timer")] == ["80s", "60s"]
    units = ("isthmus-rollback.timer", "isthmus-rollback.service", "isthmus-rollback-boot.service")
    assert host.lines("calls")[-3:] == [f"stop {name}" for name in units]
    (host.place / "ssh").unlink()
    again = host.play()
    assert (again.recap.ok, again.recap.changed) == (1, 0), again.output
    assert "control" not in host.lines("ssh")
    assert host.states() == {0: "confirmed", 1: "confirmed"}
    predicted = host.play("--check", hash="b" * 64)
    assert predicted.recap.changed == 1
    assert host.current() == 1


def test_the_next_run_gives_a_host_of_an_earlier_version_its_routes_of_the_boot(host: Host) -> None:
    host.play()
    unit, file = "/etc/systemd/system/isthmus-boot-routes.service", "/etc/isthmus/boot-routes"
    text = host.read(file)
    assert "unreachable 10.101.0.0/16" in text
    assert "isthmus-boot-routes.service" in {path.name for path in (host.place / "enabled").iterdir()}
    host.run("sh", "-c", f"systemctl disable --now isthmus-boot-routes.service; rm {unit} {file}")
    predicted = host.play("--check", "--diff")
    assert predicted.recap.changed == 1
    assert "+route add unreachable 10.101.0.0/16" in predicted.output
    assert host.read(file) == ""
    (host.place / "calls").unlink()
    assert host.play().recap.changed == 1
    assert host.read(file) == text
    enabled = "enable isthmus-boot-routes.service"
    assert [line for line in host.lines("calls") if line.startswith(("enable", "daemon-reload", "restart"))] == [
        enabled,
        "daemon-reload",
        "restart isthmus-boot-routes.service",
    ], "and no agent is started anew"
    assert host.play().recap.changed == 0
    wider = {"mesh_ranges4": ["10.101.0.0/16", "10.102.0.0/16"]}
    assert host.play(hash="b" * 64, **wider).recap.changed == 1
    assert "unreachable 10.102.0.0/16" in host.read(file)
    done = host.run("isthmus", "rollback", "1")
    assert done.stderr == ""
    assert host.read(file) == text


def test_networkd_leaves_our_routes_alone_where_it_sets_up_the_network(host: Host) -> None:
    file = "/etc/systemd/networkd.conf.d/isthmus.conf"
    host.play()
    assert host.read(file) == "", "nobody reads it"
    host.run("sh", "-c", "touch /etc/systemd/system/systemd-networkd.service")
    (host.place / "enabled" / "systemd-networkd.service").touch()
    assert host.play("--check").recap.changed == 1
    assert host.read(file) == ""
    assert host.play().recap.changed == 1
    assert "ManageForeignRoutes=no" in host.read(file)
    assert host.play().recap.changed == 0
    assert host.run("isthmus", "rollback", "1").stderr == ""
    assert host.read(file) == ""
    assert host.play().recap.changed == 1
    (host.place / "enabled" / "systemd-networkd.service").unlink()
    assert host.play().recap.changed == 1
    assert host.read(file) == ""


def test_a_connection_that_cannot_be_reset_confirms_at_once(host: Host) -> None:
    assert host.play(connection="local").recap.changed == 1
    assert host.states() == {0: "confirmed", 1: "confirmed"}


def test_a_change_that_cuts_the_host_off_is_taken_back(host: Host) -> None:
    host.play()
    before = host.files()
    host.hurry()
    run = host.play(cut=True, hash="b" * 64)
    assert (run.recap.failed, run.recap.unreachable, run.recap.changed) == (1, 0, 0), run.output
    assert "onprem-1 took its change back: generation 2 was given up, generation 1 is restored" in " ".join(
        run.output.split()
    )
    assert "no new connection could be made" in run.output
    assert "isthmus generations" in run.output
    assert host.files() == before
    assert host.states() == {0: "confirmed", 1: "confirmed", 2: "rolled back"}
    assert host.current() == 1
    (host.place / "hurry").unlink()
    assert host.play("--check").recap.changed == 0
    assert host.play().recap.changed == 0


def test_a_way_back_that_cannot_write_is_gone_again_and_the_operator_is_told(host: Host) -> None:
    """The file system of the units is full, or read-only, at the first try; the host can be entered again after it."""
    host.play()
    before = host.files()
    units, tried = "/etc/systemd/system", host.place / "tried"
    turn = f"if [ -e {tried} ]; then mount -o remount,rw {units}; else mount -o remount,ro {units}; fi; touch {tried}"
    program = f'PYTHONPATH={ROOT / "agent"} {sys.executable} -m isthmus_agent.cli.main "$@"'
    host.program("isthmus", f'if [ "$1" = rollback ]; then {turn}; fi\n{program}')
    host.hurry()
    run = host.play(cut=True, hash="b" * 64)
    assert run.recap.failed == 1, run.output
    journal = host.lines("journal")
    assert "isthmus: /etc/systemd/system/isthmusd.service: Read-only file system" in journal
    assert "this host is not generation 1 yet; it is tried again in 60 s" in journal
    assert "onprem-1 took its change back: generation 2 was given up" in " ".join(run.output.split())
    assert host.files() == before
    assert (host.states(), host.current()) == ({0: "confirmed", 1: "confirmed", 2: "rolled back"}, 1)


def test_a_change_that_breaks_the_resolver_is_taken_back(host: Host) -> None:
    host.play()
    before = host.files()
    host.hurry()
    host.run("sh", "-c", "grep -v clusterset /etc/hosts > /etc/hosts.new; cat /etc/hosts.new > /etc/hosts")
    run = host.play(hash="b" * 64)
    assert run.recap.failed == 1, run.output
    assert f"the host's resolver does not know {NAME}" in " ".join(run.output.split())
    assert host.files() == before
    assert host.current() == 1


def test_a_first_installation_leaves_nothing_when_it_is_taken_back(host: Host) -> None:
    before = host.read("/etc/resolv.conf")
    host.hurry()
    run = host.play(cut=True)
    assert run.recap.failed == 1, run.output
    assert "generation 0 is restored" in " ".join(run.output.split())
    assert host.read("/etc/resolv.conf") == before
    assert host.run("find", "/etc/systemd/system", "!", "-type", "d").stdout == ""
    assert host.run("sh", "-c", "ls /etc/isthmus/node.json /etc/isthmus/boot-routes 2>&1").stdout.count("No such") == 2
    assert list((host.place / "enabled").iterdir()) == []
    assert [line for line in host.lines("journal") if line.startswith("isthmus:")] == [], "nothing failed on the way"


def test_a_connection_that_ends_during_the_change_does_not_end_the_task(host: Host) -> None:
    host.play()
    (host.place / "break").touch()
    run = host.play(hash="b" * 64)
    assert (run.recap.changed, run.recap.failed, run.recap.unreachable) == (1, 0, 0), run.output
    assert host.states()[2] == "confirmed"
    assert not (host.place / "break").exists()


def test_what_an_interrupted_run_left_is_confirmed_by_the_next(host: Host) -> None:
    """The controller dies between the change and its confirmation, and is started again."""
    host.play()
    host.play(cut=True, hash="b" * 64, connection="local")  # confirmed: it is entered another way
    assert host.states()[2] == "confirmed"
    manifest = "/var/lib/isthmus/generations/2/manifest.json"
    host.run("sed", "-i", 's/"confirmed"/"waiting"/', manifest)
    assert host.states()[2] == "waiting"
    assert host.play(cut=True, hash="b" * 64, connection="local").recap.changed == 0
    assert host.states()[2] == "confirmed"
    assert host.current() == 2


def test_rollback_by_hand_and_the_next_run(host: Host) -> None:
    host.play()
    before = host.files()
    host.play(hash="b" * 64)
    assert host.generations()[1]["differs"] == [
        "/etc/isthmus/node.json",
        "/etc/systemd/system/isthmusd.service",
    ]
    done = host.run("isthmus", "rollback", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "restored /etc/isthmus/node.json" in done.stdout
    assert "restarted isthmusd.service" in done.stdout
    assert host.files() == before
    assert host.current() == 1
    assert host.play("--check", hash="b" * 64).recap.changed == 1
    assert host.play(hash="b" * 64).recap.changed == 1
    assert host.current() == 3
    refused = host.run("isthmus", "rollback", "77")
    assert refused.returncode == 1
    assert "there is no generation 77; there are: 0, 1, 2, 3" in refused.stderr
