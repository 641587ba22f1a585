# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts prove that they reach each other's ports before anything listens there: the role's own tasks under a real
ansible-playbook, on hosts that are network namespaces, with a real firewall, real datagrams and a real VXLAN device."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.isthmus.mesh.plugins.module_utils import listener, packets
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec
from etcd_fixture import Ca, EtcdServer
from module_runner import run_module
from playbook import recaps

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_transient.py")
OVERLAY, CLIENT, PEER = 8472, 2379, 2380

pytestmark = pytest.mark.root

NAMES = {"a1": ("a", "10.9.0.1"), "a2": ("a", "10.9.0.2"), "b1": ("b", "10.9.0.3")}
MEMBERS = {"a": ["a1"], "b": ["b1"]}


def record() -> dict[str, Any]:
    found: dict[str, Any] = {"roster": {"overlay_port": OVERLAY}}
    for cluster, members in MEMBERS.items():
        hosts = {
            name: {"site": place, "underlay4": address, "advertise4": address}
            for name, (place, address) in NAMES.items()
            if place == cluster
        }
        etcd = {"client_port": CLIENT, "peer_port": PEER, "members": members}
        found[f"clusters/{cluster}"] = {"name": cluster, "state": "present", "hosts": hosts, "etcd": etcd}
    return found


def spec(name: str) -> dict[str, Any]:
    cluster, address = NAMES[name]
    member = {"client_url": f"https://{address}:{CLIENT}", "peer_url": f"https://{address}:{PEER}"}
    return {
        "host": name,
        "node": {"underlay4": address},
        "overlay": {"port": OVERLAY},
        "member": member if name in MEMBERS[cluster] else None,
    }


class Hosts:
    """Network namespaces on a bridge, and an inventory of them."""

    def __init__(self, place: Path) -> None:
        self.place, self.tag = place, uuid.uuid4().hex[:6]
        self.record, self.joins = record(), set(NAMES)
        self.firewalls: dict[str, Any] = {}
        self.specs = {name: spec(name) for name in NAMES}
        self.tunnels: dict[str, Any] = {}
        collections = place / "collections" / "ansible_collections" / "isthmus"
        collections.mkdir(parents=True)
        (collections / "mesh").symlink_to(ROOT)
        self.command("ip", "netns", "add", self.space("switch"))
        self.inside("switch", "ip", "link", "add", "bridge", "up", "type", "bridge")
        for name, (_cluster, address) in NAMES.items():
            self.command("ip", "netns", "add", self.space(name))
            veth = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", f"to-{name}"]
            self.inside(name, *veth, "netns", self.space("switch"))
            self.inside("switch", "ip", "link", "set", f"to-{name}", "master", "bridge", "up")
            self.inside(name, "ip", "link", "set", "lo", "up")
            self.inside(name, "ip", "link", "set", "eth0", "up")
            self.inside(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            self.tools(name)

    def tools(self, name: str) -> None:
        """The host's Python, inside of its namespace and with its own systemd."""
        tools = self.place / name / "bin"
        tools.mkdir(parents=True)
        for tool in ("systemd-run", "systemctl"):
            (tools / tool).write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} {tool} "$@"\n')
        (tools / "python").write_text(
            f"#!/bin/sh\nexport ISTHMUS_TEST_HOST={self.place / name} PATH={tools}:$PATH\n"
            f'exec ip netns exec {self.space(name)} {sys.executable} "$@"\n'
        )
        for path in tools.iterdir():
            path.chmod(0o755)

    def space(self, name: str) -> str:
        return f"isthmus-{self.tag}-{name}"

    def command(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def inside(self, name: str, *words: str) -> str:
        return self.command("ip", "netns", "exec", self.space(name), *words)

    def gateways(self, *names: str) -> None:
        """These two hosts, of two sites, are to have the first tunnel between these."""
        for name, other in (names, names[::-1]):
            connection = {"remote": NAMES[other][1], "remote_id": f"isthmus-ipsec-{other}", "site": NAMES[other][0]}
            self.specs[name]["ipsec"] = {"connections": [connection]}
            self.tunnels[name] = [ipsec.other_end(one) for one in ipsec.begun(self.specs[name], {})]
        self.record["roster"]["ipsec"] = {
            "all": "plain",
            "pairs": {" ".join(sorted(NAMES[name][0] for name in names)): "accepts"},
        }

    def drop(self, name: str, *rule: str) -> None:
        self.inside(name, "nft", "add table inet test")
        self.inside(name, "nft", "add chain inet test input { type filter hook input priority 0; }")
        self.inside(name, "nft", "add", "rule", "inet", "test", "input", *rule)

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """The role's tasks from the question on; what it found of the host itself is given."""
        role = ROOT / "roles" / "preflight"
        tasks = yaml.safe_load((role / "tasks" / "main.yml").read_text())
        first = next(number for number, task in enumerate(tasks) if task.get("register") == "__preflight_asking")
        last = next(number for number, task in enumerate(tasks) if "reached where" in task["name"])
        given = {
            "ansible.builtin.set_fact": {"__preflight_result": "{{ found }}", "cacheable": False},
        }
        told = (
            "{{ dict(ansible_play_hosts | zip(ansible_play_hosts | map('extract', hostvars, '__preflight_reached'))) }}"
        )
        written = {
            "ansible.builtin.copy": {"content": told, "dest": str(self.place / "asked.json"), "mode": "0600"},
            "run_once": True,
        }
        play = {
            "hosts": "all",
            "gather_facts": False,
            "vars_files": [str(role / "vars" / "main.yml")],
            "vars": {"preflight_spec": "{{ spec }}", "preflight_record": self.record},
            "tasks": [given, *tasks[first:last], written, tasks[last]],
        }
        (self.place / "play.yml").write_text(json.dumps([play]))
        hosts = {
            name: {
                "ansible_connection": "local",
                "ansible_python_interpreter": str(self.place / name / "bin" / "python"),
                "spec": self.specs[name],
                "found": {
                    "joins": name in self.joins,
                    "firewalls": self.firewalls.get(name, []),
                    "tunnels": self.tunnels.get(name, []),
                },
            }
            for name in NAMES
        }
        (self.place / "hosts.yml").write_text(json.dumps({"all": {"hosts": hosts}}))
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.place),
            "LANG": "C.UTF-8",
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_NOCOLOR": "1",
        }
        command = [
            "ansible-playbook",
            "-i",
            str(self.place / "hosts.yml"),
            str(self.place / "play.yml"),
            "-v",
            *options,
        ]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)

    def listeners(self) -> list[str]:
        """Hosts on which something that was started for the question still runs."""
        return [name for name in NAMES if (self.place / name / listener.UNIT).exists()]

    def asked(self, *options: str) -> dict[str, Any]:
        """What every host found, by host, in a run that was refused nothing."""
        done = self.run(*options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FAILED" not in done.stdout
        assert self.listeners() == []
        found: dict[str, Any] = json.loads((self.place / "asked.json").read_text())
        return found

    def refused(self, *options: str) -> str:
        """The message of a run that was refused."""
        done = self.run(*options)
        assert done.returncode == 2, done.stdout + done.stderr
        assert self.listeners() == []
        # Ansible prints it twice.
        message = " ".join(done.stdout.split("The hosts cannot be a mesh yet")[1].replace("\\n", " ").split())
        assert message.startswith("; nothing was changed on any of them.")
        assert "Next: open what is closed and run again. `--skip-tags preflight` runs without this proof." in message
        return message

    def close(self) -> None:
        for name in NAMES:
            noted = self.place / name / listener.UNIT
            if noted.exists():
                os.kill(int(noted.read_text()), signal.SIGKILL)
        for name in (*NAMES, "switch"):
            self.command("ip", "netns", "delete", self.space(name), check=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_new_hosts_reach_each_other_and_nothing_stays(hosts: Hosts) -> None:
    found = hosts.asked()
    assert {name: one["blocked"] for name, one in found.items()} == {name: [] for name in NAMES}
    # Every overlay's port from both sites (but b1's, which is alone there, from one), a's etcd from a2 and b1, b's
    # from a1.
    assert sum(one["answered"] for one in found.values()) == 5 + 3


def test_what_does_not_answer_is_named_with_the_direction_and_who_is_in_the_way(hosts: Hosts) -> None:
    """A firewall that is known, one that is not, and is in the way of one host only, and an address of another host."""
    hosts.drop("a2", "udp", "dport", str(OVERLAY), "drop")
    hosts.firewalls["a2"] = [
        {"name": "ufw", "commands": {"udp/8472": "ufw allow 8472/udp"}, "words": "ufw is active.", "managed": False}
    ]
    hosts.drop("a1", "ip", "saddr", "10.9.0.2", "tcp", "dport", str(CLIENT), "reject", "with", "tcp", "reset")
    hosts.record["clusters/b"]["hosts"]["b1"]["advertise4"] = "10.9.0.1"
    message = hosts.refused("--check")
    assert (
        "UDP 8472 of a2 (10.9.0.2) does not answer from a1 (10.9.0.1), b1 (10.9.0.3): no answer to 3 datagrams. "
        "On a2: ufw is active." in message
    )
    words = "TCP 2379 of a1 (10.9.0.1) does not answer from a2 (10.9.0.2): refused. No firewall was found on a1"
    assert words in message
    assert (
        "TCP 2379 of b1 (10.9.0.1) does not answer from a1 (10.9.0.1): a1 answers there: the address leads" in message
    )
    assert "Next: correct isthmus_underlay or isthmus_advertise of b1" in message
    wrong = [part.split(" does not")[0][-22:] for part in message.split(" from ")[:-1] if " does not answer" in part]
    assert len(wrong) == 4, wrong


def test_a_host_joins_hosts_whose_overlay_runs(hosts: Hosts) -> None:
    """The kernel's VXLAN device has the port there and answers nobody; what came in is seen all the same."""
    for name in ("a1", "b1"):
        hosts.inside(name, "ip", "link", "add", "isthmus0", "up", "type", "vxlan", "external", "dstport", str(OVERLAY))
    hosts.joins = {"a2"}
    found = hosts.asked()
    # a1 asks a2; a2 asks a1's etcd, and a1's or b1's overlay; b1 asks a2. Not a1 and b1 each other.
    assert {name: one["blocked"] for name, one in found.items()} == {name: [] for name in NAMES}
    assert sum(one["answered"] for one in found.values()) in (4, 5)
    hosts.drop("b1", "udp", "dport", str(OVERLAY), "drop")
    hosts.drop("a1", "udp", "dport", str(OVERLAY), "drop")
    assert "UDP 8472 of a1 (10.9.0.1) does not answer from a2" in hosts.refused()


def test_gateways_are_asked_on_ipsecs_ports_by_those_of_the_other_site_before_their_tunnel(hosts: Hosts) -> None:
    hosts.gateways("a1", "b1")
    found = hosts.asked()
    assert {name: one["blocked"] for name, one in found.items()} == {name: [] for name in NAMES}
    # Two ports each way, and nothing else between the sites; a2 and a1 each other's overlay, and a2 a1's etcd.
    assert {name: one["answered"] for name, one in found.items()} == {"a1": 2 + 1, "a2": 2, "b1": 2}
    hosts.drop("b1", "ip", "saddr", NAMES["a1"][1], "udp", "dport", "4500", "drop")
    hosts.drop("a1", "udp", "dport", "{ 500, 4500 }", "drop")
    hosts.firewalls["a1"] = [
        {"name": "ufw", "commands": {"udp/500": "ufw allow 500/udp"}, "words": "ufw is active.", "managed": True}
    ]
    message = hosts.refused("--check")
    words = "UDP 4500 of {} does not answer from {}: no answer to 3 datagrams. No firewall was found on {} that"
    assert words.format("b1 (10.9.0.3)", "a1 (10.9.0.1)", "b1") in message
    assert words.format("a1 (10.9.0.1)", "b1 (10.9.0.3)", "a1") in message
    assert message.count(" does not answer") == 2, "the run opens UDP 500 of a1 itself"


def test_nothing_is_asked_of_a_mesh_that_nobody_joins(hosts: Hosts) -> None:
    hosts.joins = set()
    done = hosts.run()
    assert done.returncode == 0, done.stdout + done.stderr
    # What is given, and what the first host writes down: nothing of the role counts.
    assert {name: recap.ok for name, recap in recaps(done.stdout).items()} == {"a1": 2, "a2": 1, "b1": 1}


# --- an etcd that runs


def test_an_etcd_is_asked_whose_it_is(tmp_path: Path) -> None:
    """Without a client certificate: a host that joins has none yet."""
    foreign = Ca(tmp_path / "foreign", "foreign").crt.read_text()
    with EtcdServer(tmp_path / "etcd") as server:
        for port in (server.port, server.peer_port):
            packets.served_by("127.0.0.1", port, server.ca.crt.read_text(), 5)
            packets.served_by("127.0.0.1", port, "", 5)
            with pytest.raises(packets.NoAnswer, match="another mesh's etcd, or no etcd, answers there"):
                packets.served_by("127.0.0.1", port, foreign, 5)
        port = server.port
    with pytest.raises(packets.NoAnswer, match="refused"):
        packets.served_by("127.0.0.1", port, foreign, 5)


def test_what_is_no_etcd_is_told(tmp_path: Path) -> None:
    authority = Ca(tmp_path, "a").crt.read_text()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as wire:
                wire.recv(1)
                wire.sendall(b"SSH-2.0-something\r\n" * 10)

        serving = threading.Thread(target=answer)
        serving.start()
        with pytest.raises(packets.NoAnswer, match="speaks no TLS"):
            packets.served_by("127.0.0.1", server.getsockname()[1], authority, 5)
        serving.join()
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(packets.NoAnswer, match="no answer within"),
    ):
        packets.served_by("127.0.0.1", silent.getsockname()[1], authority, 0.2)


def test_what_needs_a_while_is_asked_again(tmp_path: Path) -> None:
    """As a load balancer that does not know yet that its targets are healthy."""
    spec = {"host": "a9", "node": {"underlay4": "127.0.0.1"}, "overlay": {"port": OVERLAY}, "member": None}
    server = EtcdServer(tmp_path / "etcd")
    target = {"host": "m-api", "address": "127.0.0.1", "protocol": "tcp", "port": server.port, "answers": "etcd"}
    target |= {"authority": server.ca.crt.read_text()}
    asked = {"spec": spec, "state": "probed", "targets": [target]}
    assert run_module("peer_probe", asked)["blocked"][0]["how"] == "refused"
    later = threading.Timer(2, server.start)
    later.start()
    try:
        assert run_module("peer_probe", {**asked, "wait": 60})["blocked"] == []
    finally:
        later.join()
        server.stop()


def test_one_member_of_the_own_cluster_is_enough(tmp_path: Path) -> None:
    """Those that are not in the run: one may be down."""
    spec = {"host": "a9", "node": {"underlay4": "127.0.0.1"}, "overlay": {"port": OVERLAY}, "member": None}
    one = {"host": "a1", "address": "127.0.0.1", "protocol": "tcp", "answers": "etcd", "one_is_enough": True}
    with EtcdServer(tmp_path / "etcd") as server, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        up = {**one, "port": server.port, "authority": server.ca.crt.read_text()}
        down = {**one, "host": "a2", "port": nobody.getsockname()[1]}
        asked = {"spec": spec, "state": "probed", "targets": [up, down]}
        assert run_module("peer_probe", asked)["blocked"] == []
        [blocked] = run_module("peer_probe", {**asked, "targets": [down]})["blocked"]
        assert (blocked["host"], blocked["how"], blocked["source"]) == ("a2", "refused", "127.0.0.1")
        strict = [{**target, "one_is_enough": False} for target in (up, down)]
        assert len(run_module("peer_probe", {**asked, "targets": strict})["blocked"]) == 1
