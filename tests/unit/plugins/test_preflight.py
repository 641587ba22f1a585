# SPDX-License-Identifier: GPL-3.0-or-later
"""The preflight module as a host runs it: every problem in words, and packages by the distribution's own command."""

from __future__ import annotations

import base64
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
from ansible_collections.isthmus.mesh.plugins.module_utils import (
    bpfprobe,
    bundle,
    estate,
    etcd_unit,
    firewall,
    ports,
    resolver,
    storage,
    wireguard,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.listener import UNIT
from ansible_collections.isthmus.mesh.plugins.modules import preflight
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

HERE = {
    "arch": platform.machine(),
    "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    "version": "1.0.0",
}
SPEC: dict[str, Any] = {
    "estate": "lab",
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
        monkeypatch.setattr(bpfprobe, "foreign_programs", lambda _root: {})
        monkeypatch.setattr(preflight, "SYSCTL", str(place / "ipv4"))
        monkeypatch.setattr(preflight.ports, "bound", lambda _protocol, _port: [])
        monkeypatch.setattr(bundle, "CURRENT", str(place / "current"))
        monkeypatch.setattr(bundle, "ROOT", str(place / "isthmus"))
        monkeypatch.setattr(etcd_unit, "DATA", str(place / "etcd"))
        monkeypatch.setattr(estate, "NODE", str(place / "node.json"))
        monkeypatch.setattr(firewall, "UFW_CONF", str(place / "ufw.conf"))
        monkeypatch.setattr(preflight, "SELINUX", str(place / "enforce"))
        monkeypatch.setattr(resolver, "RESOLV_CONF", str(place / "resolv.conf"))
        monkeypatch.setattr(resolver, "NSSWITCH", str(place / "nsswitch.conf"))
        monkeypatch.setattr(storage, "measure", lambda _path: storage.Syncs(50, 0.001, 0.002))
        (place / "resolv.conf").write_text("nameserver 192.0.2.53\n")
        self.tool("apt-get", "exit 1")
        for name in ("ip", "nft", "iptables", "firewall-cmd", "ufw", "systemctl"):
            self.tool(name, "exit 1", told=False)

    def tool(self, name: str, script: str, told: bool = True) -> None:
        """A command of the host, which writes down how it is called when that is to be `told`."""
        path = self.place / "bin" / name
        note = f'echo "$DEBIAN_FRONTEND {name} $*" >> {self.log}\n' if told else ""
        path.write_text(f"#!/bin/sh\n{note}{script}\n")
        path.chmod(0o755)

    def links(self, *found: dict[str, Any], addresses: tuple[dict[str, Any], ...] = ()) -> None:
        """What `ip` says of the host."""
        (self.place / "links").write_text(json.dumps(found))
        (self.place / "addresses").write_text(json.dumps(addresses))
        script = f'case "$*" in *address*) cat {self.place}/addresses;; *) cat {self.place}/links;; esac'
        self.tool("ip", script, told=False)

    def member_of(self, spec: dict[str, Any]) -> None:
        """The host is in a mesh already."""
        (self.place / "node.json").write_text(json.dumps(spec))

    def warning(self, **arguments: Any) -> str:
        """The only warning of a run that finds no problem."""
        answer = self.run(**arguments)
        assert answer["problems"] == []
        (words,) = answer["warnings"]
        assert words.startswith("db-1: ")
        return str(words)

    def run(self, check: bool = False, **arguments: Any) -> dict[str, Any]:
        """The module's answer."""
        given = {"spec": SPEC, "platforms": [HERE], "python": sys.executable, **arguments}
        request = {"ANSIBLE_MODULE_ARGS": {**given, "_ansible_check_mode": check, "_ansible_diff": True}}
        self.monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps(request).encode())
        self.monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy")
        warned: list[str] = []  # Ansible collects those of a process
        self.monkeypatch.setattr(basic.AnsibleModule, "warn", lambda _module, words: warned.append(words))
        with pytest.raises(SystemExit):
            preflight.main()
        answer: dict[str, Any] = json.loads(self.capsys.readouterr().out)
        return {**answer, "warnings": warned}

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
    assert answer["warnings"] == []
    assert (answer["joins"], answer["firewalls"], answer["fsync"]) == (True, [], None)


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
    return {**SPEC, "member": {**urls, "quota_bytes": 1024**2}}


def test_a_listener_on_any_address_is_in_etcds_way(host: Host, listener: socket.socket) -> None:
    """etcd listens on 0.0.0.0: a distribution's etcd on the loopback would make it fail."""
    port = listener.getsockname()[1]
    host.monkeypatch.undo()
    host.monkeypatch.setattr(preflight.os.path, "exists", lambda _path: True)  # our device is there
    (words,) = preflight.port_problems(member(port), [], resolver.LOCAL_SERVER)
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
    assert "TCP port 2379, etcd's client port, is used by etcd (pid 12) of etcd.service on 127.0.0.1: " in words
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
    assert problems[0].endswith("Here: `listen-on { 127.0.0.1; };` in its options.")
    held[:] = [ports.Socket("udp", "127.0.0.53", 53, 7)]
    assert host.run()["problems"] == []


@pytest.mark.parametrize(
    ("server", "needed"),
    [("192.0.2.53", resolver.LOCAL_SERVER), ("127.0.0.53", SPEC["node"]["mesh4"])],
    ids=["resolv.conf", "systemd-resolved"],
)
def test_a_name_server_on_each_address_is_in_the_way_only_of_the_one_that_is_used(
    host: Host, server: str, needed: str
) -> None:
    """BIND binds every address of the host on its own, that of the mesh too once it is there."""
    (host.place / "resolv.conf").write_text(f"nameserver {server}\n")
    host.tool("systemctl", '[ "$1" = is-active ]', told=False)
    addresses = ["127.0.0.1", "198.18.1.11", resolver.LOCAL_SERVER, SPEC["node"]["mesh4"]]
    held = [ports.Socket("udp", address, 53, 7) for address in addresses]
    host.monkeypatch.setattr(
        preflight.ports, "bound", lambda protocol, port: held if (protocol, port) == ("udp", 53) else []
    )
    host.monkeypatch.setattr(preflight.ports, "holder", lambda _socket: ("named (pid 3)", "named.service"))
    assert f"named (pid 3) of named.service on {needed}. " in host.problem()
    held[:] = [one for one in held if one.address != needed]
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


# --- what is there already


def vxlan(name: str, port: int, **data: Any) -> dict[str, Any]:
    return {"ifname": name, "linkinfo": {"info_kind": "vxlan", "info_data": {"port": port, **data}}}


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ({"ifname": "isthmus0", "linkinfo": {"info_kind": "bridge"}}, "a bridge link, not the mesh's"),
        ({"ifname": "isthmus0"}, "a physical link, not the mesh's"),
        (vxlan("isthmus0", 8472, id=7), "a vxlan link, not the mesh's"),
        (vxlan("isthmus0", 4789, external=True), "a VXLAN device on UDP port 4789, of another mesh"),
    ],
)
def test_a_foreign_link_of_our_name_is_told(host: Host, link: dict[str, Any], words: str) -> None:
    host.links(link)
    told = host.problem()
    assert words in told
    assert "`ip link set isthmus0 name OTHER`" in told


@pytest.mark.parametrize(
    ("sections", "least", "around"),
    [
        ({}, 626, "inside VXLAN."),
        ({"wireguard": {"key": "/none/wireguard.key", "port": 51871}}, 706, "inside VXLAN and WireGuard."),
        ({"ipsec": {"far": {}}}, 726, "inside VXLAN and the tunnel between gateways."),
    ],
    ids=["tunnel", "wireguard", "gateways"],
)
def test_a_link_that_carries_too_little_for_what_is_around_packets_is_told(
    host: Host, sections: dict[str, Any], least: int, around: str
) -> None:
    host.monkeypatch.setattr(preflight, "packages_missing", lambda *_arguments: [])
    spec = {**SPEC, **sections}

    def underlay(mtu: int) -> None:
        lo = {"ifname": "lo", "mtu": 65536, "addr_info": []}
        host.links(addresses=(lo, {"ifname": "eth7", "mtu": mtu, "addr_info": [{"local": "127.0.0.1"}]}))

    underlay(least)
    found = host.run(spec=spec)
    assert (found["problems"], found["underlay_mtu"]) == ([], least)
    underlay(least - 1)
    words = host.problem(spec=spec)
    assert words.startswith(f"The link eth7, which has the underlay address 127.0.0.1, carries {least - 1} bytes")
    assert f"at least {least} are needed" in words
    assert around in words
    host.member_of(spec)
    assert host.run(spec=spec)["problems"] == [], "a mesh that runs is not kept from its changes"


def test_our_own_device_is_none_of_them(host: Host) -> None:
    """Also when a hand replaced it on a host of the mesh, where the agent makes it anew."""
    host.links({}, vxlan("isthmus0", 8472, external=True))
    assert host.run()["problems"] == []
    host.links(vxlan("isthmus0", 8472))
    host.member_of(SPEC)
    assert host.run()["problems"] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flannel.1", "the VXLAN device flannel.1 (flannel's, of k3s or Kubernetes)"),
        ("cilium_vxlan", "the VXLAN device cilium_vxlan (Cilium's)"),
        ("vx9", "the VXLAN device vx9 ("),
    ],
)
def test_another_overlay_on_our_port_is_named(host: Host, name: str, words: str) -> None:
    host.monkeypatch.setattr(preflight, "DEVICE", "isthmus-none")
    held = [ports.Socket("udp", "0.0.0.0", 8472, 0)]  # noqa: S104 - compared, not bound
    host.monkeypatch.setattr(preflight.ports, "bound", lambda _protocol, port: held if port == 8472 else [])
    host.links(vxlan("elsewhere", 4789), vxlan(name, 8472))
    told = host.problem()
    assert told.startswith("UDP port 8472, the overlay's, is used by the kernel on 0.0.0.0: " + words)
    assert "isthmus_estate.overlay.port" in told


def test_an_etcd_of_something_else_is_told_by_its_name_token_and_data(host: Host) -> None:
    held = [ports.Socket("tcp", "0.0.0.0", 2379, 7)]  # noqa: S104 - compared, not bound
    host.monkeypatch.setattr(preflight.ports, "bound", lambda _protocol, port: held if port == 2379 else [])
    host.monkeypatch.setattr(preflight.ports, "holder", lambda _socket: ("etcd (pid 12)", "etcd.service"))
    line = ["etcd", "--name", "k8s-1", "--data-dir=/var/lib/etcd"]
    host.monkeypatch.setattr(
        preflight.ports, "started_as", lambda _socket: (line, {"ETCD_INITIAL_CLUSTER_TOKEN": "other", "ETCD_NAME": "x"})
    )
    told = host.problem(spec=member(2379))
    assert (
        "etcd.service on 0.0.0.0: the etcd of something else (name k8s-1, cluster token other, data /var/lib/etcd). "
        in told
    )


def test_how_a_process_was_started_is_found_by_its_socket(listener: socket.socket) -> None:
    (found,) = ports.bound("tcp", listener.getsockname()[1])
    words, environment = ports.started_as(found)
    assert words[0] == Path("/proc/self/cmdline").read_text().split("\0")[0]
    assert "PATH" in environment
    assert ports.started_as(ports.Socket("udp", "127.0.0.1", 1, 0)) == ([], {})


def test_what_answers_for_a_moment_is_in_nobodys_way(host: Host) -> None:
    """Of a run that was ended a moment ago."""
    held = [ports.Socket("tcp", "0.0.0.0", 2379, 7)]  # noqa: S104 - compared, not bound
    host.monkeypatch.setattr(preflight.ports, "bound", lambda _protocol, port: held if port == 2379 else [])
    host.monkeypatch.setattr(preflight.ports, "holder", lambda _socket: ("python3 (pid 12)", UNIT))
    assert host.run(spec=member(2379))["problems"] == []


def test_a_host_of_another_estate_is_told(host: Host) -> None:
    host.member_of({**SPEC, "estate": "other"})
    words = host.problem()
    assert "The host is in the mesh of the estate other" in words
    assert "this is the estate lab" in words
    assert "`isthmus.mesh.teardown --limit db-1`" in words


def test_what_the_copy_of_a_machine_would_have_is_told_without_the_private_key(host: Host) -> None:
    """Also beside a problem, so that the run can tell all in one message."""
    host.monkeypatch.setattr(preflight, "packages_missing", lambda *_arguments: [])
    path = host.place / "wireguard.key"
    spec = {**SPEC, "wireguard": {**SECTION, "key": str(path)}}
    host.member_of({**SPEC, "host": "db-2"})
    assert [host.run(spec=spec)[key] for key in ("installed", "public_keys")] == ["db-2", {}]
    secret = base64.b64encode(bytes(range(1, 33))).decode()
    path.write_text(secret + "\n")
    public = X25519PrivateKey.from_private_bytes(bytes(range(1, 33))).public_key()
    found = {str(path): base64.b64encode(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()}
    for lacking in ([], ["bpf_link"]):
        host.monkeypatch.setattr(bpfprobe, "missing_features", lambda found=lacking: found)
        answer = host.run(spec=spec)
        assert (bool(answer["problems"]), answer["installed"], answer["public_keys"]) == (bool(lacking), "db-2", found)
        assert secret not in json.dumps(answer)
    host.monkeypatch.setattr(bpfprobe, "missing_features", list)
    assert host.run()["public_keys"] == {}, "a key that nothing is encrypted with goes"


@pytest.mark.parametrize("content", [None, "{", "[]", '{"estate": "lab"}', '{"estate": "lab", "host": ["db-2"]}'])
def test_without_a_specification_a_host_is_no_copy(host: Host, content: str | None) -> None:
    if content is not None:
        (host.place / "node.json").write_text(content)
    assert host.run()["installed"] is None


@pytest.mark.parametrize(
    ("before", "joins"),
    [
        (SPEC, False),
        ({**SPEC, "service_ranges4": []}, False),
        ({**SPEC, "node": {**SPEC["node"], "underlay4": "127.0.0.2"}}, True),
        ({**SPEC, "member": {"client_url": "https://127.0.0.1:2379", "peer_url": "https://127.0.0.1:2380"}}, True),
    ],
)
def test_a_host_joins_when_others_reach_it_elsewhere_than_before(
    host: Host, before: dict[str, Any], joins: bool
) -> None:
    host.member_of(before)
    assert host.run()["joins"] is joins
    (host.place / "node.json").write_text("{")
    assert host.run()["joins"] is True


# --- the disk


def test_room_for_the_agent(host: Host) -> None:
    host.monkeypatch.setattr(storage, "free", lambda _path: 200 * 1024**2)
    assert host.problem() == f"200 MiB are free for {bundle.ROOT}, and the agent takes 256 MiB. Make room."
    (host.place / "current").mkdir()
    assert host.run()["problems"] == []


def test_room_for_etcd(host: Host) -> None:
    spec = member(2379)
    spec["member"]["quota_bytes"] = 2 * 1024**3
    host.monkeypatch.setattr(storage, "free", lambda _path: 900 * 1024**2)
    words = host.problem(spec=spec)
    assert words.startswith(
        f"900 MiB are free at {host.place} (for {etcd_unit.DATA}), and etcd needs 1.0 GiB to begin."
    )
    host.monkeypatch.setattr(storage, "free", lambda _path: 3 * 1024**3)
    assert "3.0 GiB are free" in host.warning(spec=spec)
    assert "etcd can come to need 4.5 GiB" in host.warning(spec=spec)
    host.monkeypatch.setattr(storage, "free", lambda _path: 5 * 1024**3)
    assert host.run(spec=spec)["warnings"] == []


def test_slow_durable_writes_are_told_with_the_figure_and_refused_when_no_leader_could_stay(host: Host) -> None:
    spec = member(2379)
    assert host.run(spec=spec)["fsync"] == {"count": 50, "median": 1.0, "slow": 2.0}
    host.monkeypatch.setattr(storage, "measure", lambda _path: storage.Syncs(50, 0.004, 0.0251))
    words = host.warning(spec=spec)
    assert "The 99th percentile of 50 durable writes (fdatasync of 2 KiB)" in words
    assert "is 25.1 ms, the median 4.0 ms; etcd wants less than 10 ms." in words
    host.monkeypatch.setattr(storage, "measure", lambda _path: storage.Syncs(2, 0.6, 0.7))
    assert "elects a new leader when the old one is silent for 2 s" in host.problem(spec=spec)


def test_a_member_that_has_data_is_not_measured(host: Host) -> None:
    (host.place / "etcd" / "member").mkdir(parents=True)
    host.monkeypatch.setattr(storage, "measure", lambda _path: pytest.fail("measured"))
    assert host.run(spec=member(2379))["fsync"] is None


def test_a_disk_that_cannot_be_written_is_told(host: Host) -> None:
    def full(_path: str) -> storage.Syncs:
        raise OSError(28, "No space left on device")

    host.monkeypatch.setattr(storage, "measure", full)
    assert "Nothing can be written at" in host.problem(spec=member(2379))


def test_durable_writes_are_measured_where_the_data_will_be_and_nothing_is_left(tmp_path: Path) -> None:
    found = storage.measure(str(tmp_path / "not" / "there" / "yet"), seconds=0.2)
    assert 1 <= found.count <= 50
    assert 0 < found.median <= found.slow
    assert list(tmp_path.iterdir()) == []
    assert storage.free(str(tmp_path / "not" / "there")) > 0


# --- firewalls


UFW = """Status: active

To                         Action      From
--                         ------      ----
22/tcp                     ALLOW       Anywhere
2379/tcp                   ALLOW       Anywhere
8472/udp                   ALLOW       10.0.0.0/8
8472/udp (v6)              ALLOW       Anywhere (v6)
"""


def test_ufw_is_told_with_what_would_open_it(host: Host) -> None:
    (host.place / "ufw").write_text(UFW)
    host.tool("ufw", f"cat {host.place}/ufw; [ $# -gt 1 ] && echo 'Default: deny (incoming), allow (outgoing)'; true")
    assert host.run(spec=member(2379))["firewalls"] == []  # it is installed, and switched off
    (host.place / "ufw.conf").write_text("# comment\nENABLED=yes\nLOGLEVEL=low\n")
    answer = host.run(spec=member(2379))
    (wall,) = answer["firewalls"]
    assert wall["commands"] == {"udp/8472": "ufw allow 8472/udp", "tcp/1": "ufw allow 1/tcp"}
    assert answer["warnings"] == ["db-1: " + wall["words"]]
    assert wall["words"] == (
        "ufw is active (`ufw status`). It was left alone. Unless it lets in the mesh's hosts already, this opens what "
        "the mesh needs: `ufw allow 8472/udp`; `ufw allow 1/tcp`; `ufw allow in on isthmus0`."
    )
    assert not [call for call in host.calls() if "ufw" in call and " ufw status" not in call]
    managed = host.run(spec=member(2379), firewall="managed")
    assert (managed["warnings"], [one["managed"] for one in managed["firewalls"]]) == ([], [True])
    host.member_of(member(2379))
    assert host.run(spec=member(2379))["warnings"] == []


def test_ufw_that_lets_everybody_in_is_in_nobodys_way(host: Host) -> None:
    (host.place / "ufw.conf").write_text("ENABLED=yes\n")
    host.tool("ufw", "echo 'Status: active'; echo 'Default: allow (incoming), allow (outgoing)'")
    assert host.run()["firewalls"] == []


FIREWALLD = """case "$*" in
--state) echo running;;
--get-zone-of-interface=eth1) echo internal;;
"--permanent --zone=internal --get-target") echo default;;
"--zone=internal --query-port=2379/tcp") ;;
*) exit 1;;
esac"""


def test_firewalld_is_told_with_the_zone_of_the_underlays_interface(host: Host) -> None:
    host.links(addresses=({"ifname": "eth1", "addr_info": [{"local": "127.0.0.1"}]},))
    host.tool("firewall-cmd", FIREWALLD)
    (wall,) = host.run(spec=member(2379))["firewalls"]
    assert wall["commands"] == {
        "udp/8472": "firewall-cmd --zone=internal --add-port=8472/udp",
        "tcp/1": "firewall-cmd --zone=internal --add-port=1/tcp",
    }
    assert "zone internal has eth1" in wall["words"]
    assert wall["words"].endswith("Then `firewall-cmd --runtime-to-permanent`.")
    host.tool("firewall-cmd", FIREWALLD.replace("echo default", "echo ACCEPT"))
    assert host.run(spec=member(2379))["firewalls"] == []


def chain(table: str, policy: str, family: str = "inet") -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": "in", "hook": "input", "policy": policy}}


def test_a_chain_of_nftables_that_drops_is_told(host: Host) -> None:
    found = [{"metainfo": {}}, chain("mine", "accept"), chain("filter", "drop"), chain("six", "drop", "ip6")]
    (host.place / "nft").write_text(json.dumps({"nftables": found}))
    host.tool("nft", f"cat {host.place}/nft")
    (wall,) = host.run()["firewalls"]
    assert wall["commands"] == {"udp/8472": "nft insert rule inet filter in udp dport 8472 accept"}
    assert "`nft insert rule inet filter in iifname isthmus0 accept`" in wall["words"]
    assert "/etc/nftables.conf" in wall["words"]


def test_iptables_of_old_is_told(host: Host) -> None:
    host.tool("iptables", "echo '-P INPUT DROP'")
    (wall,) = host.run()["firewalls"]
    assert wall["commands"] == {"udp/8472": "iptables -I INPUT -p udp --dport 8472 -j ACCEPT"}


def test_selinux_is_named_and_left_alone(host: Host) -> None:
    (host.place / "enforce").write_text("1")
    assert "SELinux is enforcing. It was left alone" in host.warning()
    (host.place / "enforce").write_text("0")
    assert host.run()["warnings"] == []


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


SECTION = {"key": "/etc/isthmus/pki/wireguard.key", "port": 51871, "plain_sites": ["a"], "sites": {"lab": "a"}}
ENCRYPTING = {**SPEC, "wireguard": SECTION}


def test_wireguards_port_is_needed_until_it_is_ours(host: Host) -> None:
    held = [ports.Socket("udp", "0.0.0.0", 51871, 0)]  # noqa: S104 - compared, not bound
    host.monkeypatch.setattr(preflight.ports, "bound", lambda _protocol, port: held if port == 51871 else [])
    told = host.problem(spec=ENCRYPTING)
    assert told.startswith("UDP port 51871, WireGuard's, is used by the kernel on 0.0.0.0: by another WireGuard")
    host.monkeypatch.setattr(preflight.openings, "devices", lambda _spec: ["lo"])
    host.run(spec=ENCRYPTING)


def test_hosts_are_asked_again_when_encryption_is_turned_on_or_off() -> None:
    on = {**ENCRYPTING, "wireguard": {**SECTION, "changing": {"b": "accepts"}}}
    further = {**ENCRYPTING, "wireguard": {**SECTION, "changing": {"b": "sends"}}}
    found = [preflight.ways(spec) for spec in (SPEC, on, further, ENCRYPTING)]
    assert found[0] != found[1]
    assert found[1] == found[2], "both ports are asked for already"
    assert found[2] != found[3]
    assert preflight.openings.listens(SPEC)[:1] == [("udp", 8472)]
    assert preflight.openings.listens(ENCRYPTING)[:2] == [("udp", 8472), ("udp", 51871)]


TUNNEL = {"site": "b", "remote": "192.0.2.9", "remote_id": "isthmus-ipsec-b1", "ours": True}
FOREIGN = {"site": "c", "remote": "192.0.2.8", "remote_id": "192.0.2.8", "ours": False}


def with_tunnels(*connections: dict[str, Any]) -> dict[str, Any]:
    far = {one["site"]: {"stage": "accepts", "networks": []} for one in connections}
    return {**SPEC, "ipsec": {"far": far, "connections": list(connections)}}


def test_a_gateway_is_asked_on_ipsecs_ports_before_its_first_tunnel_with_a_site(host: Host) -> None:
    """One that is not ours answers no question."""
    spec = with_tunnels(TUNNEL, FOREIGN)
    for installed, joins, tunnels in (
        (SPEC, True, [{"host": "b1", "address": "192.0.2.9"}]),
        (with_tunnels(FOREIGN), True, [{"host": "b1", "address": "192.0.2.9"}]),
        (with_tunnels(TUNNEL), True, []),
        (spec, False, []),
    ):
        host.member_of(installed)
        found = host.run(spec=spec)
        assert (found["joins"], found["tunnels"]) == (joins, tunnels), installed.get("ipsec")


@pytest.mark.parametrize(
    ("spec", "kernel_has_it", "missing"),
    [
        (SPEC, False, []),
        (ENCRYPTING, True, ["wireguard-tools"]),
        (ENCRYPTING, False, ["wireguard-tools", "wireguard-go"]),
    ],
    ids=["nothing encrypted", "in the kernel", "not in the kernel"],
)
def test_wireguard_is_missing_where_packets_are_encrypted(
    host: Host, spec: dict[str, Any], kernel_has_it: bool, missing: list[str]
) -> None:
    host.monkeypatch.setattr(wireguard, "TOOL", str(host.place / "wg"))
    host.monkeypatch.setattr(wireguard, "USER_SPACE", str(host.place / "wireguard-go"))
    host.tool("ip", f'echo "$*" >> {host.place}/trials\nexit {0 if kernel_has_it else 2}', told=False)
    assert host.run(spec=spec)["packages"] == missing
    if spec is ENCRYPTING:
        trials = [line for line in (host.place / "trials").read_text().splitlines() if "isthmus-trial" in line]
        made = ["link add name isthmus-trial type wireguard"]
        assert trials == made + (["link delete isthmus-trial"] if kernel_has_it else [])
    for name in ("wg", "wireguard-go"):
        (host.place / name).touch(mode=0o755)
    assert host.run(spec=spec)["packages"] == []


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


NODE = {**SPEC, "cluster": {"kubernetes": {}}, "node": {**SPEC["node"], "kubernetes_node": "worker-1"}}


def sysctl(host: Host, **values: str) -> None:
    """Files below /proc/sys/net/ipv4; a double underscore is a slash."""
    for name, value in values.items():
        path = host.place / "ipv4" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def test_other_programs_at_our_hooks_are_named(host: Host) -> None:
    found = {"connect4": ["cil_sock4_connect"], "sendmsg4": ["cil_sock4_sendm"]}
    host.monkeypatch.setattr(bpfprobe, "foreign_programs", lambda _root: found)
    words = host.problem()
    assert "at the mesh's hooks connect4, sendmsg4: cil_sock4_connect, cil_sock4_sendm, Cilium's" in words
    assert "`bpftool cgroup show /sys/fs/cgroup`" in words
    # In a mesh that runs one host must not stop the others.
    host.member_of(SPEC)
    assert "cil_sock4_connect" in host.warning()


def test_a_node_that_passes_nothing_on_is_refused(host: Host) -> None:
    sysctl(host, ip_forward="0")
    assert "net.ipv4.ip_forward is 0" in host.problem(spec=NODE)
    assert not host.run().get("failed")  # a machine forwards nothing


@pytest.mark.parametrize("name", ["conf__all__rp_filter", "conf__default__rp_filter"])
def test_a_strict_reverse_path_filter_is_told_on_a_node(host: Host, name: str) -> None:
    sysctl(host, ip_forward="1", **{name: "1"})
    assert f"net.ipv4.{name.replace('__', '.')} is 1 (strict)" in host.warning(spec=NODE)
    sysctl(host, **{name: "2"})
    assert host.run(spec=NODE)["warnings"] == []


def test_what_kubernetes_is_compared_with(host: Host) -> None:
    assert host.run()["kubernetes"] is None
    local = {"family": "inet", "local": "127.0.0.1", "scope": "host"}
    own = [{"family": "inet", "local": f"198.18.4.1{number}", "scope": "global"} for number in (1, 2)]
    host.links(addresses=({"ifname": "lo", "addr_info": [local]}, {"ifname": "eth0", "addr_info": own}))
    addresses = ["198.18.4.11", "198.18.4.12"]
    assert host.run(spec=NODE)["kubernetes"] == {"host": "db-1", "addresses": addresses, "credential": None}
    certificate = host.place / "kubernetes.crt"
    registrar = {**NODE, "registrar": {"kubernetes": {"cert": str(certificate)}}}
    assert host.run(spec=registrar)["kubernetes"]["credential"] is False
    certificate.touch()
    assert host.run(spec=registrar)["kubernetes"]["credential"] is True
