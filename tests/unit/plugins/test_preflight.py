# SPDX-License-Identifier: GPL-3.0-or-later
"""The preflight module as a host runs it: every problem in words, and packages by the distribution's own command."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import basic
from ansible_collections.isthmus.mesh.plugins.module_utils import bpfprobe, bundle, ports
from ansible_collections.isthmus.mesh.plugins.modules import preflight

HERE = {
    "arch": platform.machine(),
    "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    "version": "1.0.0",
}
SPEC: dict[str, Any] = {
    "host": "db-1",
    "node": {"underlay4": "127.0.0.1", "mesh4": "203.0.113.1"},
    "overlay": {"port": 8472},
    "mesh_ranges4": ["203.0.113.0/25"],
    "service_ranges4": ["203.0.113.128/25"],
    "member": None,
}


class Host:
    """A host that can join the mesh; tests take something away from it."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self.monkeypatch, self.capsys = place, monkeypatch, capsys
        self.log = place / "log"
        self.dnsmasq = place / "dnsmasq"
        self.dnsmasq.touch(mode=0o755)
        tools = place / "bin"
        tools.mkdir()
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        monkeypatch.setattr(preflight, "DNSMASQ", str(self.dnsmasq))
        monkeypatch.setattr(preflight, "system_problems", lambda _module: [])
        monkeypatch.setattr(preflight.os, "geteuid", lambda: 0)
        monkeypatch.setattr(bpfprobe, "missing_features", list)
        monkeypatch.setattr(bpfprobe, "cgroup2_mount", lambda: "/sys/fs/cgroup")
        monkeypatch.setattr(preflight.ports, "bound", lambda _protocol, _port: [])
        monkeypatch.setattr(bundle, "CURRENT", str(place / "current"))
        self.tool("apt-get", "exit 1")

    def tool(self, name: str, script: str) -> None:
        """A command of the host, which writes down how it is called."""
        path = self.place / "bin" / name
        path.write_text(f'#!/bin/sh\necho "$DEBIAN_FRONTEND {name} $*" >> {self.log}\n{script}\n')
        path.chmod(0o755)

    def run(self, check: bool = False, **arguments: Any) -> dict[str, Any]:
        """The module's answer."""
        given = {"spec": SPEC, "platforms": [HERE], "python": sys.executable, **arguments}
        request = {"ANSIBLE_MODULE_ARGS": {**given, "_ansible_check_mode": check, "_ansible_diff": True}}
        self.monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps(request).encode())
        self.monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy")
        with pytest.raises(SystemExit):
            preflight.main()
        answer: dict[str, Any] = json.loads(self.capsys.readouterr().out)
        return answer

    def problem(self, **arguments: Any) -> str:
        """The only problem of a run, which its message tells with the host's name."""
        answer = self.run(**arguments)
        assert answer["failed"]
        (words,) = answer["problems"]
        assert answer["msg"] == f"db-1 cannot join the mesh yet; nothing was changed on it. (1) {words}"
        return str(words)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Host:
    return Host(tmp_path, monkeypatch, capsys)


def test_a_host_that_can_join(host: Host) -> None:
    answer = host.run()
    assert (answer["changed"], answer["problems"], answer["packages"]) == (False, [], [])
    assert answer["python"] == {"version": HERE["python"], "path": sys.executable}


def test_the_wrong_architecture_is_named(host: Host) -> None:
    host.monkeypatch.setattr(preflight.platform, "machine", lambda: "riscv64")
    words = host.problem(platforms=[{**HERE, "arch": "riscv64"}])
    assert words == "The architecture riscv64 is not supported; the agent runs on x86_64 and aarch64."


def test_a_platform_without_a_bundle_is_named(host: Host) -> None:
    host.monkeypatch.setattr(preflight.platform, "machine", lambda: "aarch64")
    assert f"make bundle ARCH=aarch64 PYTHON={HERE['python']}" in host.problem(platforms=[{**HERE, "arch": "x86_64"}])


def test_a_host_that_an_upgrade_has_reached_is_told(host: Host) -> None:
    """Once, however many platforms there are bundles for; what is the same, older or unreadable is no problem."""
    manifest = host.place / "current" / "bundle.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"version": "1.0.1-rc.1", "python": HERE["python"], "digest": "d"}))
    words = host.problem(platforms=[HERE, {**HERE, "python": "3.99"}])
    assert words.startswith(f"db-1 runs isthmus.mesh 1.0.1-rc.1 ({manifest.parent}), which is newer than 1.0.0")
    assert "Next: `ansible-galaxy collection install isthmus.mesh:==1.0.1-rc.1` on the controller" in words
    assert words.endswith("and run again with isthmus_version=1.0.1-rc.1.")
    for content in ('{"version": "1.0.0"}', '{"version": "0.9.0"}', '{"version": "1"}', "{}", "{"):
        manifest.write_text(content)
        assert host.run()["problems"] == []


def test_a_missing_cgroup2_is_named_with_the_way_to_it(host: Host) -> None:
    host.monkeypatch.setattr(bpfprobe, "cgroup2_mount", lambda: None)
    words = host.problem()
    assert words.startswith("No cgroup2 hierarchy is mounted (/proc/mounts). ")
    assert "systemd.unified_cgroup_hierarchy=1" in words


def test_each_missing_kernel_feature_is_named(host: Host) -> None:
    lacking = ["BPF links (Invalid argument)", "VXLAN devices in external mode (Operation not supported)"]
    host.monkeypatch.setattr(bpfprobe, "missing_features", lambda: lacking)
    answer = host.run()
    assert [feature for feature in lacking if f" lacks {feature}. Boot a kernel with it" not in answer["msg"]] == []
    assert len(answer["problems"]) == 2


@pytest.mark.parametrize(("skew", "way"), [(300, "ahead of"), (-300, "behind")])
def test_a_clock_that_is_off_is_told(host: Host, skew: int, way: str) -> None:
    told = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - skew))
    words = host.problem(controller_time=told)
    assert words.startswith("The clock is ")
    assert f" s {way} the controller's; certificates would not be valid" in words
    assert host.run(controller_time=told, max_clock_skew=400)["changed"] is False


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def member(port: int) -> dict[str, Any]:
    """A specification with an etcd whose clients dial another address than the listener's."""
    urls = {"client_url": f"https://198.18.1.11:{port}", "peer_url": "https://198.18.1.11:1"}
    return {**SPEC, "member": urls}


def test_a_listener_on_any_address_is_in_etcds_way(host: Host, listener: socket.socket) -> None:
    """etcd listens on 0.0.0.0: a distribution's etcd on the loopback would make it fail."""
    port = listener.getsockname()[1]
    host.monkeypatch.undo()
    host.monkeypatch.setattr(preflight.os.path, "exists", lambda _path: True)  # our device is there
    (words,) = preflight.port_problems(member(port))
    with open("/proc/self/comm", encoding="ascii") as file:
        command = file.read().strip()
    assert words.startswith(f"TCP port {port}, etcd's client port, is used by {command} (pid {os.getpid()})")
    assert " on 127.0.0.1. " in words
    assert "etcd.client_port" in words


def test_the_holder_is_named_by_command_and_unit(host: Host) -> None:
    held = [ports.Socket("tcp", "127.0.0.1", 2379, 7)]
    host.monkeypatch.setattr(preflight.ports, "bound", lambda _protocol, port: held if port == 2379 else [])
    host.monkeypatch.setattr(preflight.ports, "holder", lambda _socket: ("etcd (pid 12)", "etcd.service"))
    words = host.problem(spec=member(2379))
    assert "TCP port 2379, etcd's client port, is used by etcd (pid 12) of etcd.service on 127.0.0.1. " in words
    # The mesh's own is no problem.
    host.monkeypatch.setattr(preflight.ports, "holder", lambda _socket: ("etcd (pid 12)", "isthmus-etcd.service"))
    assert host.run(spec=member(2379))["problems"] == []


def test_a_name_server_on_all_addresses_is_told_once_for_each_protocol(host: Host) -> None:
    held = [ports.Socket("udp", "0.0.0.0", 53, 7)]  # noqa: S104 - compared, not bound
    host.monkeypatch.setattr(preflight.ports, "bound", lambda protocol, port: held if port == 53 else [])
    host.monkeypatch.setattr(preflight.ports, "holder", lambda _socket: ("named (pid 3)", "named.service"))
    problems = host.run()["problems"]
    assert [words.split(", is used")[0] for words in problems] == [
        "UDP port 53, the name server's port",
        "TCP port 53, the name server's port",
    ]
    assert "named (pid 3) of named.service on 0.0.0.0" in problems[0]
    held[:] = [ports.Socket("udp", "127.0.0.53", 53, 7)]
    assert host.run()["problems"] == []


def test_the_overlays_port_and_metrics_port(host: Host) -> None:
    held = {8472: "0.0.0.0", 9968: "127.0.0.1"}  # noqa: S104 - compared, not bound
    host.monkeypatch.setattr(
        preflight.ports,
        "bound",
        lambda protocol, port: [ports.Socket(protocol, held[port], port, 0)] if port in held else [],
    )
    host.monkeypatch.setattr(preflight, "DEVICE", "isthmus-none")
    problems = host.run()["problems"]
    assert [words.split(", ")[0] for words in problems] == ["UDP port 8472", "TCP port 9968"]
    assert "is used by the kernel on 0.0.0.0" in problems[0]


def test_all_problems_are_in_one_message(host: Host) -> None:
    host.monkeypatch.setattr(bpfprobe, "cgroup2_mount", lambda: None)
    host.monkeypatch.setattr(preflight.platform, "machine", lambda: "riscv64")
    told = "2020-01-01T00:00:00Z"
    answer = host.run(controller_time=told, spec={**SPEC, "node": {**SPEC["node"], "underlay4": "192.0.2.77"}})
    assert "(1) " in answer["msg"]
    assert "(4) " in answer["msg"]
    for words in ("riscv64", "192.0.2.77 is not an address of this host", "The clock is"):
        assert words in answer["msg"]


# --- packages


def test_missing_packages_are_named_and_not_installed_unasked(host: Host) -> None:
    host.dnsmasq.unlink()
    answer = host.run()
    assert (answer["changed"], answer["packages"]) == (False, ["dnsmasq-base"])
    assert host.calls() == []


def test_check_mode_predicts_the_packages_and_runs_nothing(host: Host) -> None:
    """Also where apt has no Python bindings: nothing of the host is used for it."""
    host.dnsmasq.unlink()
    answer = host.run(check=True, install=True)
    assert (answer["changed"], answer["packages"]) == (True, ["dnsmasq-base"])
    assert [(one["before_header"], one["before"], one["after"]) for one in answer["diff"]] == [
        ("package dnsmasq-base", "", "installed\n")
    ]
    assert host.calls() == []


INSTALL = "noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends dnsmasq-base"
UPDATE = "noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 update"


def test_packages_are_installed_by_apt_get(host: Host) -> None:
    host.dnsmasq.unlink()
    host.tool("apt-get", f"touch {host.dnsmasq}; chmod 0755 {host.dnsmasq}")
    predicted = host.run(check=True, install=True)
    answer = host.run(install=True)
    assert host.calls() == [INSTALL]
    assert (answer["changed"], answer["diff"]) == (predicted["changed"], predicted["diff"]) == (True, answer["diff"])
    again = host.run(install=True)
    assert (again["changed"], again["packages"], host.calls()) == (False, [], [INSTALL])


def test_package_lists_are_fetched_when_the_first_try_fails(host: Host) -> None:
    host.dnsmasq.unlink()
    fetched = host.place / "lists"
    script = f'case "$*" in *update) touch {fetched};; *) [ -e {fetched} ] || exit 100;; esac\ntouch {host.dnsmasq}\n'
    host.tool("apt-get", f"{script}chmod 0755 {host.dnsmasq}")
    assert host.run(install=True)["changed"]
    assert host.calls() == [INSTALL, UPDATE, INSTALL]


def test_packages_are_installed_by_dnf(host: Host) -> None:
    host.monkeypatch.setattr(preflight.packages, "manager", lambda _module: "dnf")
    host.dnsmasq.unlink()
    host.tool("dnf", f'case "$*" in *--refresh*) touch {host.dnsmasq}; chmod 0755 {host.dnsmasq};; *) exit 1;; esac')
    assert host.run(install=True)["changed"]
    first, second = host.calls()
    assert first.endswith(" dnf -q -y --setopt=install_weak_deps=False install dnsmasq")
    assert second.endswith(" --refresh install dnsmasq")


def test_packages_that_cannot_be_installed_are_told_with_aptgets_words(host: Host) -> None:
    host.dnsmasq.unlink()
    host.tool("apt-get", "echo 'E: Unable to locate package dnsmasq-base' >&2; exit 100")
    answer = host.run(install=True)
    assert answer["failed"]
    assert "dnsmasq-base cannot be installed: E: Unable to locate package dnsmasq-base" in answer["msg"]
    assert "Next: repair the package sources of this host" in answer["msg"]


def test_a_package_that_brings_nothing_is_told(host: Host) -> None:
    host.dnsmasq.unlink()
    host.tool("apt-get", "exit 0")
    answer = host.run(install=True)
    assert "dnsmasq-base was installed, but what is needed of it is not there" in answer["msg"]


def test_a_host_that_nothing_can_be_installed_on_is_told_before_anything_is_changed(host: Host) -> None:
    host.dnsmasq.unlink()
    host.monkeypatch.setattr(preflight.packages, "manager", lambda _module: None)
    assert "lacks dnsmasq (by Fedora's names), and it has neither apt-get nor dnf" in host.problem()
