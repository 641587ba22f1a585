# SPDX-License-Identifier: GPL-3.0-or-later
"""Unit files: what systemd says of them, what they may do, and when a process is out of date."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit, units
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from security_page import STATED, STATED_ON_A_NODE

FILES = {
    "isthmusd.service": units.agent_unit("0123"),
    "isthmus-registrar.service": units.registrar_unit("0123"),
    "isthmus-dns.service": units.dns_unit("0123"),
    "isthmus-dns-reload.path": units.dns_reload_path_unit(),
    "isthmus-dns-reload.service": units.dns_reload_unit(),
    "isthmus-bpffs.service": units.bpffs_unit(),
    "isthmus-boot-routes.service": units.boot_routes_unit(),
    "isthmus-wireguard.service": units.wireguard_unit("0123", "isthmus-wg0"),
    "isthmus-ipsec-keeper.service": units.keeper_unit("/bin/true", "/etc/isthmus/x", "isthmus-ipsec.service"),
    "isthmus-resolved.service": units.resolved_unit("10.0.0.1", "clusterset.local"),
}


def options(text: str, name: str) -> list[str]:
    return [line.split("=", 1)[1] for line in text.splitlines() if line.startswith(name + "=")]


def test_systemd_understands_every_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.fail("systemd-analyze is missing; it is part of Debian's systemd package")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "systemd-resolved.service").write_text("[Service]\nExecStart=/bin/true\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(tmp_path / name) for name in FILES)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    # Programs that are not installed on this machine are not the unit's fault.
    complaints = [
        line
        for line in done.stderr.splitlines()
        if line.split(":", 1)[0].split("/")[-1] in FILES and "is not" not in line
    ]
    assert complaints == []


def test_nobody_has_more_than_it_needs() -> None:
    assert options(FILES["isthmus-registrar.service"], "CapabilityBoundingSet") == [""]
    assert options(FILES["isthmus-dns.service"], "CapabilityBoundingSet") == ["CAP_NET_BIND_SERVICE"]
    assert options(FILES["isthmus-wireguard.service"], "CapabilityBoundingSet") == ["CAP_NET_ADMIN"]
    assert set(options(FILES["isthmusd.service"], "CapabilityBoundingSet")[0].split()) == {
        "CAP_BPF",
        "CAP_PERFMON",
        "CAP_NET_ADMIN",
        "CAP_NET_RAW",
    }
    on_a_node = units.agent_unit("0123", pods=True)
    assert set(options(on_a_node, "CapabilityBoundingSet")[0].split()) - {"CAP_SYS_ADMIN"} == set(
        options(FILES["isthmusd.service"], "CapabilityBoundingSet")[0].split()
    )
    assert options(on_a_node, "RestrictNamespaces") == ["net"]
    assert options(FILES["isthmusd.service"], "RestrictNamespaces") == ["yes"]
    for name in ("isthmusd.service", "isthmus-registrar.service", "isthmus-dns.service"):
        assert options(FILES[name], "ProtectSystem") == ["strict"]
        assert options(FILES[name], "NoNewPrivileges") == ["yes"]


DAEMONS = {
    **{
        name: FILES[name]
        for name in (
            "isthmusd.service",
            "isthmus-registrar.service",
            "isthmus-dns.service",
            "isthmus-wireguard.service",
            "isthmus-ipsec-keeper.service",
        )
    },
    etcd_unit.SERVICE: etcd_unit.service("/usr/bin/etcd", "0123"),
    etcd_unit.DEFRAG_SERVICE: etcd_unit.defrag_service(),
}


def test_a_score_is_stated_for_every_daemon() -> None:
    assert set(STATED) == set(DAEMONS)


@pytest.mark.parametrize(
    ("name", "text", "stated"),
    [
        *((name, DAEMONS[name], STATED[name]) for name in sorted(STATED)),
        ("isthmusd.service", units.agent_unit("0123", pods=True), STATED_ON_A_NODE),
    ],
)
def test_the_stated_score_is_kept(tmp_path: Path, name: str, text: str, stated: float) -> None:
    (tmp_path / name).write_text(text)
    threshold = round(stated * 10)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={threshold}", "--no-pager", tmp_path / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_no_unit_may_write_to_the_kernels_settings_or_devices() -> None:
    for name, text in DAEMONS.items():
        for option in ("ProtectControlGroups", "ProtectClock"):
            assert options(text, option) == ["yes"], f"{name}: {option}"
        if name == "isthmus-wireguard.service":
            assert options(text, "DevicePolicy") == ["closed"]
            assert options(text, "DeviceAllow") == ["/dev/net/tun rw"]
        else:
            assert options(text, "PrivateDevices") == ["yes"], name
        if name != "isthmusd.service":
            assert options(text, "ProtectKernelTunables") == ["yes"]
    assert {"-/proc/sys", "-/sys/kernel"} <= set(options(FILES["isthmusd.service"], "ReadOnlyPaths")[0].split())
    assert options(FILES["isthmusd.service"], "ReadWritePaths") == ["/sys/fs/bpf"]


@pytest.mark.parametrize(
    "text",
    [
        FILES["isthmusd.service"],
        FILES["isthmus-registrar.service"],
        etcd_unit.service("/usr/bin/etcd", "0123"),
        etcd_unit.defrag_service(),
        FILES["isthmus-wireguard.service"],
    ],
    ids=["agent", "registrar", "etcd", "defragmentation", "wireguard-go"],
)
def test_keys_do_not_reach_the_disk_in_a_core_dump(text: str) -> None:
    """These processes read private keys. systemd-coredump honours the limit."""
    assert options(text, "LimitCORE") == ["0"]


def test_stopping_the_agent_leaves_the_datapath() -> None:
    assert not options(FILES["isthmusd.service"], "ExecStop")
    assert options(FILES["isthmusd.service"], "RuntimeDirectoryPreserve") == ["yes"]


def test_the_boots_routes_come_before_the_network_and_the_agent() -> None:
    text = FILES["isthmus-boot-routes.service"]
    assert {"network-pre.target", "isthmusd.service"} <= set(options(text, "Before")[0].split())
    assert options(text, "Wants") == ["network-pre.target"], "nobody else may, and then it orders nothing"
    assert options(text, "DefaultDependencies") == ["no"], "else it waits for basic.target"
    assert options(text, "WantedBy") == ["sysinit.target"]
    assert not options(text, "ExecStop"), "the routes are the agent's, which runs"
    # Without it the unit would be started again with every other one: sysinit.target wants it.
    assert options(text, "RemainAfterExit") == ["yes"]
    assert units.BOOT_ROUTES in options(text, "ExecStart")[0].split()


def test_the_boots_routes_are_those_of_the_specification() -> None:
    spec = {"service_ranges4": ["10.111.0.0/16"], "mesh_ranges4": ["10.102.0.0/16", "10.101.0.0/16"]}
    lines = units.boot_routes(spec).splitlines()
    assert lines[0].startswith("# ")
    assert lines[1:] == [
        "route add unreachable 10.101.0.0/16 table 254 protocol 73",
        "route add unreachable 10.102.0.0/16 table 254 protocol 73",
        "route add unreachable 10.111.0.0/16 table 254 protocol 73",
    ]


@pytest.mark.parametrize(
    ("state", "sets_up"),
    [
        ({"UnitFileState": "enabled", "ActiveState": "inactive"}, True),
        ({"UnitFileState": "enabled-runtime", "ActiveState": "inactive"}, True),
        ({"UnitFileState": "disabled", "ActiveState": "active"}, True),
        ({"UnitFileState": "disabled", "ActiveState": "inactive"}, False),
        ({"UnitFileState": "masked", "ActiveState": "inactive"}, False),
        ({"LoadState": "not-found"}, False),
    ],
    ids=str,
)
def test_it_is_told_whether_networkd_sets_up_links(state: dict[str, str], sets_up: bool) -> None:
    assert units.has_networkd(state) is sets_up


def test_the_configuration_is_seen_in_the_process() -> None:
    digest = units.config_digest("a", "b")
    assert digest != units.config_digest("ab", "")
    command = ["/bin/sh", "-c", "echo started; read line"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={units.CONFIG_VARIABLE: digest}, **pipes) as process:
        try:
            assert process.stdout.readline() == b"started\n"  # before that it may still be this process's image
            assert units.process_environment(str(process.pid))[units.CONFIG_VARIABLE] == digest
        finally:
            process.kill()
    assert units.process_environment(str(process.pid)) == {}


@pytest.mark.parametrize(
    ("edited", "started", "anew"),
    [(100.0, 50.0, True), (50.0, 100.0, False)],
    ids=["started with the edited file", "edited since"],
)
def test_a_process_that_read_a_file_edited_by_hand_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: float, started: float, anew: bool
) -> None:
    """`edited` and `started`: seconds ago. The file is put right in both cases."""
    spec = tmp_path / "node.json"
    spec.write_text("edited by hand")
    os.utime(spec, (time.time() - edited,) * 2)
    module: Any = SimpleNamespace(check_mode=False)
    changes = Changes(module)
    assert changes.file(str(spec), "as planned")
    runner = units.Units(module, changes)
    state = {
        "ActiveState": "active",
        "UnitFileState": "enabled",
        "MainPID": "1",
        "ExecMainStartTimestampMonotonic": str(int((time.monotonic() - started) * 1e6)),
    }
    done: list[tuple[str, ...]] = []
    monkeypatch.setattr(runner.systemd, "show", lambda names: dict.fromkeys(names, state))
    monkeypatch.setattr(runner.systemd, "run", lambda *words: done.append(words))
    monkeypatch.setattr(units, "process_environment", lambda pid: {units.CONFIG_VARIABLE: "same"})
    assert runner.running("isthmusd.service", "same", str(spec)) is anew
    assert done == ([("restart", "--no-block", "isthmusd.service")] if anew else [])


@pytest.mark.parametrize("check", [True, False])
def test_systemd_reads_its_files_once_for_all_units_that_are_enabled(
    monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    module: Any = SimpleNamespace(check_mode=check)
    changes = Changes(module)
    runner = units.Units(module, changes)
    on = {"isthmus-dns.service"}
    done: list[tuple[str, ...]] = []

    def run(*words: str) -> None:
        done.append(words)
        if words[0] == "enable":
            on.update(words[3:])

    def show(names: Any) -> Any:
        return {name: {"ActiveState": "active", "UnitFileState": "enabled" if name in on else ""} for name in names}

    monkeypatch.setattr(runner.systemd, "show", show)
    monkeypatch.setattr(runner.systemd, "run", run)
    names = ["isthmus-dns.service", "isthmusd.service", "isthmus-dns-reload.path"]
    runner.daemon_reload([*names, "isthmus-bpffs.service"], names)
    assert [runner.running(name) for name in names] == [False, True, True]
    assert done == ([] if check else [("enable", "--quiet", "--no-reload", *names[1:]), ("daemon-reload",)])
    noted = [entry["after_header"] for entry in changes.result()["diff"]]
    assert len(noted) == len(set(noted)) == 2, noted


def test_resolved_asks_our_server_without_tls_and_signatures_from_the_first_question_on() -> None:
    commands = [line.split()[1] for line in options(FILES["isthmus-resolved.service"], "ExecStart")]
    assert sorted(commands[:2]) == ["dnsovertls", "dnssec"]
    assert commands[2:] == ["dns", "domain", "default-route"]
    lines = options(FILES["isthmus-resolved.service"], "ExecStart")[:2]
    assert [line.split()[2:] for line in lines] == [["isthmus0", "no"]] * 2


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({}, False),
        ({"dns": "Link 3 (isthmus0): 10.0.0.9\n"}, True),
        ({"dns": "Link 3 (isthmus0): 10.0.0.1 10.0.0.9\n"}, True),
        ({"dns": "Link 3 (isthmus0):\n", "domain": "Link 3 (isthmus0):\n"}, True),
        ({"domain": "Link 3 (isthmus0): clusterset.local\n"}, True),
        ({"dnsovertls": "Link 3 (isthmus0): yes\n"}, True),
        ({"dnssec": "Link 3 (isthmus0): allow-downgrade\n"}, True),
        ({"dns": None}, True),
    ],
    ids=["as wanted", "another address", "one more", "reverted", "a search domain", "TLS", "signatures", "no device"],
)
def test_what_resolved_has_for_the_device_is_compared(changed: dict[str, str | None], differs: bool) -> None:
    out = {
        "dns": "Link 3 (isthmus0): 10.0.0.1\n",
        "domain": "Link 3 (isthmus0): ~clusterset.local\n",
        "dnsovertls": "Link 3 (isthmus0): no\n",
        "dnssec": "Link 3 (isthmus0): no\n",
        **changed,
    }

    def run_command(arguments: list[str]) -> tuple[int, str, str]:
        answer = out[arguments[1]]
        return (1, "", "Failed to resolve interface") if answer is None else (0, answer, "")

    module: Any = SimpleNamespace(run_command=run_command)
    assert units.resolved_differs(module, "10.0.0.1", "clusterset.local") is differs
