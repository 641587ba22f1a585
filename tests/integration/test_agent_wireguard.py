# SPDX-License-Identifier: GPL-3.0-or-later
"""WireGuard between two real `isthmusd` processes on two nodes, by `wireguard-go` or, on the stock kernel, by the
kernel, with no etcd anywhere. What is on the wire is looked at with tcpdump on the veth pair between the nodes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import agent_mesh as mesh
import pytest
from bpf.topology import Inside, Node, bare_nodes, capture, meanwhile, wait_for
from integration import kernel_devices
from integration.etcd_fixture import Ca
from integration.test_agent_kernel import CLIENT, Daemon
from integration.test_agent_native import PING
from integration.test_agent_path_mtu import FOUND_WITHIN, carries, metered, warned, way
from isthmus_agent.cli import text
from isthmus_agent.cli.client import ask
from isthmus_agent.netlink.wireguard import greet
from isthmus_agent.state.lastgood import LastGood
from isthmus_mesh import keys, openings, wire
from isthmus_mesh.encryption import Keys, Stage
from isthmus_mesh.spec import WIREGUARD_DEVICES, WIREGUARD_KEYS, WIREGUARD_PORTS, spec_hash

pytestmark = pytest.mark.root

PORT = 51871
FIRST = WIREGUARD_DEVICES[0]
PATH_MTU = 1370  # 1500, less 50 of VXLAN and 80 of WireGuard
NATIVE_MTU = 1420
DAY = 86400.0
SECRET = b"isthmus-secret-payload"


def new_key() -> tuple[str, str]:
    """A private and its public key, by `wg`."""
    private = subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout.strip()
    return private, public_of(private)


def public_of(private: str) -> str:
    return subprocess.run(["wg", "pubkey"], input=private, check=True, capture_output=True, text=True).stdout.strip()


@dataclass
class Host:
    """A node with `isthmusd` and `wireguard-go`, which share a mount namespace: wireguard-go's socket is a file."""

    node: Node
    cluster: str
    directory: Path
    private: str
    daemon: Daemon
    holder: subprocess.Popen[bytes]
    programs: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # wireguard-go by device

    def inside(self, *words: str) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", f"--net=/proc/self/fd/{self.node.netns}", *words]

    def run(self, *words: str) -> str:
        return subprocess.run(
            self.inside(*words), check=True, capture_output=True, text=True, pass_fds=(self.node.netns,)
        ).stdout

    def start_wireguard(self, device: str = FIRST) -> None:
        if kernel_devices.STOCK:
            return  # the agent makes it
        self.programs[device] = subprocess.Popen(
            self.inside("wireguard-go", "-f", device),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(self.node.netns,),
        )

    def kill_wireguard(self, device: str = FIRST) -> None:
        if device in self.programs:
            self.programs[device].kill()
            self.programs.pop(device).wait(10)

    def encryption(self) -> dict[str, Any]:
        """What status says of the other node."""
        (other,) = [one for one in self.daemon.status()["nodes"] if one["cluster"] != self.cluster]
        return dict(other["encryption"])

    def encrypted_nodes(self) -> dict[str, float]:
        """How many, by state, as a scrape says it."""
        found = self.daemon.metrics()
        states = ("encrypted", "idle", "closed")
        return {state: found[f'isthmus_encrypted_nodes{{state="{state}"}}'] for state in states}

    def key_ages(self) -> dict[str, float]:
        """In seconds, by port, as a scrape says it."""
        name = 'isthmus_wireguard_key_age_seconds{port="'
        found = self.daemon.metrics().items()
        return {each[len(name) :].removesuffix('"}'): age for each, age in found if each.startswith(name)}

    def probe(self) -> str:
        """What the agent's probes of the other node say."""
        (other,) = [one for one in self.daemon.status()["nodes"] if one["cluster"] != self.cluster]
        return str(other["probe"])

    def dropped(self, reason: str = "not_encrypted") -> int:
        return int(self.daemon.status()["datapath"]["drops"].get(reason, 0))

    def stage(self, word: str) -> None:
        """Another stage of encryption with the other node, as `site` brings it: a new specification, wireguard-go where
        it is needed and not there, and a restart of the agent."""
        path = self.directory / "node.json"
        spec = json.loads(path.read_text())
        other = {"onprem": "cloud", "cloud": "onprem"}[self.cluster]
        spec.pop("wireguard", None)
        if word != "plain":
            spec["wireguard"] = self.wireguard_spec(other, {other: word} if word != "demands" else {})
        spec["hash"] = spec_hash(spec)
        path.write_text(json.dumps(spec))
        if word != "plain" and (FIRST not in self.programs or self.programs[FIRST].poll() is not None):
            self.start_wireguard()
        self.daemon.stop()
        self.daemon.start()
        if word != "plain":
            wait_for(lambda: self.daemon.status()["wireguard"]["peers"] == 1, "the other node is a peer")

    def native(self, word: str) -> None:
        """Another stage of native routing with the other node, as `site` brings it."""
        path = self.directory / "node.json"
        spec = json.loads(path.read_text())
        other = {"onprem": "cloud", "cloud": "onprem"}[self.cluster]
        spec.pop("native", None)
        if word != "plain":
            spec["native"] = {"sites": {self.cluster: self.cluster, other: other}, "stages": {other: word}}
        spec["hash"] = spec_hash(spec)
        path.write_text(json.dumps(spec))
        self.daemon.stop()
        self.daemon.start()

    def use(self, keys: Keys, known: dict[str, bytes]) -> None:
        """Other keys, as `site` brings them: a specification, wireguard-go where it is needed, and a restart; `known`
        is what the agent knows then."""
        path = self.directory / "node.json"
        spec = json.loads(path.read_text())
        other = {"onprem": "cloud", "cloud": "onprem"}[self.cluster]
        first, *rest = (
            {"key": str(self.directory / WIREGUARD_KEYS[number]), "port": WIREGUARD_PORTS[number]}
            for number in ((keys.sends, 1 - keys.sends) if keys.has_both else (keys.number,))
        )
        spec["wireguard"] = {**self.wireguard_spec(other, {}), **first, **({"second": rest[0]} if rest else {})}
        spec["hash"] = spec_hash(spec)
        path.write_text(json.dumps(spec))
        devices = openings.devices(spec)
        for device in WIREGUARD_DEVICES:
            if device in devices and device not in self.programs:
                self.start_wireguard(device)
            elif device not in devices:
                self.kill_wireguard(device)
        self.daemon.stop()  # it writes down what it knew
        self.publish(known)
        self.daemon.start()

    def wireguard_spec(self, other: str, changing: dict[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "key": str(self.directory / "wireguard.key"),
            "port": PORT,
            "plain_sites": [self.cluster],
            "sites": {self.cluster: self.cluster, other: other},
        }
        return {**found, "changing": changing} if changing else found

    def publish(self, documents: dict[str, bytes]) -> None:
        """What the agent knows at its next start."""
        last = LastGood(self.cluster, "2026-01-02T03:04:05Z", documents)
        (self.directory / "state" / "last-known-good.json").write_text(last.to_json())

    def close(self) -> None:
        self.daemon.stop(signal.SIGKILL)
        for device in WIREGUARD_DEVICES:
            self.kill_wireguard(device)
        self.holder.kill()
        self.holder.wait(10)


def node_document(number: int, cluster: str, public: str, annotations: dict[str, str]) -> wire.Node:
    return mesh.node(
        cluster,
        1,
        addresses=(
            wire.NodeAddress("InternalIP", f"198.18.0.1{number}"),
            wire.NodeAddress("CiliumInternalIP", f"10.10{number}.0.1"),
        ),
        wireguard_public_key=public,
        encryption_key=255 if public else 0,
        annotations=annotations,
    )


def documents(own: str, publics: dict[str, str], by_port: dict[str, dict[int, str]] | None = None) -> dict[str, bytes]:
    """Of both nodes, with the public key of each cluster's, or with several by port."""
    found = mesh.documents({"cloud": [1]}, own=own, sizes={"onprem": 1, "cloud": 1})
    for number, cluster in ((1, "onprem"), (2, "cloud")):
        cached = cluster != own
        several = ",".join(f"{port}={public}" for port, public in (by_port or {}).get(cluster, {}).items())
        annotations = {wire.WIREGUARD_KEYS: several} if several else {}
        node = node_document(number, cluster, publics[cluster], annotations)
        found[keys.node_key(cluster, node.name, cached)] = node.to_json().encode()
        pair = wire.IPIdentityPair(f"10.10{number}.0.2", (number << 16) + 1, f"198.18.0.1{number}", key=255)
        found[keys.ip_key(pair.ip, cluster if cached else None)] = pair.to_json().encode()
    return found


class WireGuardDaemon(Daemon):
    """`isthmusd` in the mount namespace of its wireguard-go too."""

    holder: int = 0

    def entering(self) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self.holder}/ns/mnt"]


def make_host(node: Node, cluster: str, directory: Path, private: str) -> Host:
    (directory / "state").mkdir(parents=True)
    key = directory / "wireguard.key"
    key.touch(0o600)
    key.write_text(private + "\n")
    ca = Ca(directory / "pki", cluster)
    crt, etcd_key = ca.issue("agent")
    other = {"onprem": "cloud", "cloud": "onprem"}[cluster]
    spec = mesh.spec_document(
        host=f"{cluster}-1",
        cluster={
            "name": cluster,
            "id": node.cluster_id,
            "max_clusters": 255,
            "site": cluster,
            "workload_ranges4": [f"10.10{node.cluster_id}.0.0/16"],
            "service_range4": "10.111.0.0/16",
        },
        node={
            "name": f"{cluster}-1",
            "underlay4": node.underlay,
            "advertise4": node.underlay,
            "range4": node.prefix,
            "mesh4": node.mesh,
            "labels": {},
        },
        workloads=[
            {
                "name": "web",
                "namespace": "shop",
                "service_account": "default",
                "labels": {"app": "web"},
                "address4": node.workload,
                "cgroup": {"path": "web"},
            }
        ],
        wireguard={"key": str(key), "port": PORT, "plain_sites": [cluster], "sites": {cluster: cluster, other: other}},
        # Nothing listens there: no etcd in this test.
        etcd={"endpoints": ["https://127.0.0.1:1"], "ca": str(ca.crt), "cert": str(crt), "key": str(etcd_key)},
    )
    (directory / "node.json").write_text(json.dumps(spec))
    return hold(node, cluster, directory, private)


def hold(node: Node, cluster: str, directory: Path, private: str) -> Host:
    """A host whose specification is written."""
    run = Path("/run/wireguard")
    run.mkdir(mode=0o755, exist_ok=True)
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs {run} && echo ready && exec sleep infinity"],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n"
    daemon = WireGuardDaemon(node, directory)
    daemon.holder = holder.pid
    return Host(node, cluster, directory, private, daemon, holder)


@dataclass
class Pair:
    a: Host
    b: Host
    client: Inside

    def dial(self, seconds: float = 2) -> list[str]:
        return list(self.client.do(f"result = dial('10.102.0.2', 8080, {seconds})"))


@contextlib.contextmanager
def pair(tmp_path: Path, publish: tuple[bool, bool] = (True, True)) -> Iterator[Pair]:
    """Node a is onprem-1, node b is cloud-1; both have a key, and `publish` says whose is known to the other."""
    pairs = {"onprem": new_key(), "cloud": new_key()}
    publics = {name: public if publish[i] else "" for i, (name, (_, public)) in enumerate(pairs.items())}
    hosts: list[Host] = []
    with bare_nodes() as nodes:
        try:
            for node, cluster in zip(nodes, ("onprem", "cloud"), strict=True):
                host = make_host(node, cluster, tmp_path / cluster, pairs[cluster][0])
                hosts.append(host)
                host.publish(documents(cluster, publics))
                host.start_wireguard()
                host.daemon.start()
                node.process("web").do(f"serve_tcp({node.name!r}, {node.workload!r}, 8080); result = 1")
            client = nodes[0].process("web")
            client.do(CLIENT + "\nresult = 1")
            yield Pair(hosts[0], hosts[1], client)
        finally:
            for host in hosts:
                host.close()


def udp_ports(file: Path) -> dict[str, int]:
    """How many packets of `file` have which UDP destination port."""
    text = subprocess.run(["tcpdump", "-nr", str(file), "udp"], check=True, capture_output=True, text=True).stdout
    found: dict[str, int] = {}
    for port in re.findall(r" > \S+\.(\d+): ", text):
        found[port] = found.get(port, 0) + 1
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both have their keys; the kernel checks sources strictly, as many distributions have it."""
    with pair(tmp_path_factory.mktemp("pair")) as found:
        for host in (found.a, found.b):
            host.node.sysctl("net.ipv4.conf.all.rp_filter", "1")
        yield found


def send_at_full_size(pair: Pair, mtu: int) -> None:
    """TCP segments as large as the path takes, and the largest datagram that may not be fragmented."""
    assert pair.dial() == ["b", "10.101.0.2"]
    assert pair.client.do(
        "s = socket.create_connection(('10.102.0.2', 8080), 3); lines = s.makefile(); lines.readline()\n"
        f"s.sendall({SECRET!r} * 20000 + b'?'); result = int(lines.readline())"
    ) > 20000 * len(SECRET)
    segment = pair.client.do("result = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)")
    assert segment == mtu - 52  # IP, TCP with timestamps
    pair.b.node.process("web").do("serve_udp('b', '10.102.0.2', 5353); result = 1")
    pair.client.do(
        "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.setsockopt(socket.IPPROTO_IP, 10, 2)\n"
        "u.bind(('10.101.0.2', 0)); u.settimeout(3)"
    )
    datagram = f"{SECRET!r}.ljust({mtu} - 28, b'.')"  # IP, UDP
    pair.client.do(f"u.sendto({datagram}, ('10.102.0.2', 5353)); result = u.recv(100).decode()")
    with pytest.raises(OSError, match="too long"):
        pair.client.do(f"u.sendto({datagram} + b'.', ('10.102.0.2', 5353))")


def assert_nothing_in_clear(file: Path) -> None:
    """Neither what was sent nor an address of the mesh."""
    seen = file.read_bytes()
    assert SECRET not in seen
    for address in ("10.101.0.2", "10.102.0.2", "10.101.0.1", "10.102.0.1"):
        assert bytes(int(part) for part in address.split(".")) not in seen, f"{address} in clear"


def test_traffic_is_encrypted_also_at_full_size(both: Pair, tmp_path: Path) -> None:
    file = tmp_path / "wire.pcap"
    with capture(both.a.node, file):
        send_at_full_size(both, PATH_MTU)
    assert set(udp_ports(file)) == {str(PORT)}, "no VXLAN header in clear"
    assert_nothing_in_clear(file)


def test_status_says_who_is_encrypted_and_by_what(both: Pair) -> None:
    both.dial()
    status = both.a.daemon.status()
    implementation = "kernel" if kernel_devices.STOCK and kernel_devices.makes("wireguard") else "wireguard-go"
    assert status["wireguard"] == {
        "implementation": implementation,
        "device": "isthmus-wg0",
        "public_key": public_of(both.a.private),
        "port": PORT,
        "peers": 1,
        "key_age": status["wireguard"]["key_age"],
        "second": None,
    }
    assert 0 <= status["wireguard"]["key_age"] < 600
    found = both.a.encryption()
    assert (found["state"], found["reason"]) == ("encrypted", None)
    assert found["handshake_age"] < 180
    assert both.a.encrypted_nodes() == {"encrypted": 1, "idle": 0, "closed": 0}
    (age,) = both.a.key_ages().items()
    assert age == (str(PORT), pytest.approx(status["wireguard"]["key_age"], abs=60))
    shown = text.status(status)
    assert f"wireguard  {implementation}, UDP {PORT}, public key {public_of(both.a.private)} made " in shown
    assert ", 1 peer" in shown
    assert "encrypted, handshake" in shown


def test_a_peers_overlay_packet_in_clear_is_dropped_and_counted(both: Pair) -> None:
    """It has everything right but its way: only somebody on the path can send it."""
    both.dial()
    before = both.b.dropped()
    # Else the kernel's own check of the source is quicker than ours, where it is on.
    both.b.node.sysctl("net.ipv4.conf.all.rp_filter", "0")
    mac = json.loads(both.b.run("ip", "-j", "link", "show", "eth0"))[0]["address"]
    both.a.node.process().do(
        "raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); raw.bind(('eth0', 0))\n"
        "payload = vxlan(6, '10.101.0.1', '10.102.0.1')\n"
        "udp = struct.pack('!HHHH', 40000, 8472, 8 + len(payload), 0) + payload\n"
        "head = struct.pack('!BBHHHBBH', 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)\n"
        "head += socket.inet_aton('198.18.0.11') + socket.inet_aton('198.18.0.12')\n"
        "head = head[:10] + struct.pack('!H', checksum(head)) + head[12:]\n"
        f"raw.send(bytes.fromhex({mac!r}.replace(':', '')) + bytes(5) + b'\\1' + b'\\x08\\0' + head + udp)"
    )
    wait_for(lambda: both.b.dropped() == before + 1, "the drop is counted")
    both.b.node.sysctl("net.ipv4.conf.all.rp_filter", "1")


def test_nothing_else_than_the_overlay_comes_through(both: Pair) -> None:
    before = both.b.dropped("not_overlay")
    both.a.node.process().do(
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('198.18.0.11', 0))\n"
        "s.setsockopt(socket.SOL_SOCKET, 25, b'isthmus-wg0'); s.sendto(b'x', ('198.18.0.12', 9))"
    )
    wait_for(lambda: both.b.dropped("not_overlay") == before + 1, "the drop is counted")


def test_without_wireguard_go_nothing_goes_out_and_a_new_one_heals_both_ways(both: Pair, tmp_path: Path) -> None:
    both.dial()
    back = both.b.node.process("web")
    back.do(CLIENT + "\nresult = dial('10.101.0.2', 8080)")
    file = tmp_path / "wire.pcap"
    with capture(both.a.node, file):
        before = both.a.dropped()
        both.a.kill_wireguard()
        with pytest.raises(OSError, match=r"timed out|unreachable"):
            both.dial(1)
        wait_for(lambda: both.a.dropped() > before, "the drop is counted")
        assert both.a.encryption()["state"] == "closed"
        assert both.a.encrypted_nodes() == {"encrypted": 0, "idle": 0, "closed": 1}
        assert any("isthmus-wg0 is missing" in words for words in both.a.daemon.status()["warnings"])
        both.a.start_wireguard()
        began = time.monotonic()
        # The other side only sends: it does not know that the session has ended.
        wait_for(lambda: _answers(back, "10.101.0.2"), "b reaches a again", 5)
        assert time.monotonic() - began < 5
        assert both.dial() == ["b", "10.101.0.2"]
    assert set(udp_ports(file)) <= {str(PORT)}, "no VXLAN header in clear"


def _answers(client: Inside, address: str) -> bool:
    try:
        return bool(client.do(f"result = dial({address!r}, 8080, 0.5)"))
    except OSError:
        return False


def test_a_link_that_is_cut_one_way_is_noticed_by_both_and_heals_with_nothing_in_clear(
    both: Pair, tmp_path: Path
) -> None:
    """What b sends does not arrive at a; what a sends does arrive at b."""
    both.dial()
    file = tmp_path / "wire.pcap"
    ours = "type filter hook prerouting priority -400; policy accept; ip saddr 198.18.0.12 counter drop;"
    with capture(both.a.node, file):
        both.a.run("nft", f"table ip cut {{ chain c {{ {ours} }}; }}")
        for host in (both.a, both.b):
            wait_for(lambda host=host: host.probe() == "down", f"{host.cluster} notices", 6)  # type: ignore[misc]
        with pytest.raises(OSError, match="timed out"):
            both.dial(1)
        both.a.run("nft", "delete table ip cut")
        for host in (both.a, both.b):
            wait_for(lambda host=host: host.probe() == "up", f"{host.cluster} is reached again", 6)  # type: ignore[misc]
        assert both.dial() == ["b", "10.101.0.2"]
    assert set(udp_ports(file)) == {str(PORT)}, "no VXLAN header in clear"


def test_rules_that_somebody_removes_let_nothing_out_and_come_back(both: Pair, tmp_path: Path) -> None:
    file = tmp_path / "wire.pcap"
    both.dial()
    with capture(both.a.node, file):
        both.a.daemon.stop(signal.SIGKILL)  # nobody repairs
        assert both.dial() == ["b", "10.101.0.2"], "an agent that is away changes nothing"
        for number in ("732", "733"):
            both.a.run("ip", "rule", "del", "pref", number)
        with pytest.raises(OSError, match=r"timed out|unreachable"):
            both.dial(1)
        both.a.daemon.start()
        assert both.a.dropped() > 0
        assert both.dial() == ["b", "10.101.0.2"]
        for number in ("732", "733"):
            both.a.run("ip", "rule", "del", "pref", number)
        wait_for(lambda: both.a.run("ip", "rule").count("lookup 73") == 3, "the agent makes the rules again", 3)
        assert both.dial() == ["b", "10.101.0.2"]
    assert set(udp_ports(file)) <= {str(PORT)}, "no VXLAN header in clear"
    assert ask(both.a.daemon.socket, "/v1/audit")["problems"] == []


def test_a_restart_of_the_agent_leaves_sessions_and_connections(both: Pair) -> None:
    both.client.do(
        "held = socket.create_connection(('10.102.0.2', 8080), 3); lines = held.makefile(); result = lines.readline()"
    )
    index = both.a.run("ip", "-o", "link", "show", "isthmus-wg0").partition(":")[0]
    shown = both.a.run("wg", "show", "isthmus-wg0", "latest-handshakes")
    for how in (signal.SIGKILL, signal.SIGTERM):
        both.a.daemon.stop(how)
        both.a.daemon.start()
        assert both.client.do("held.sendall(b'abc?'); result = int(lines.readline()) > 0") is True
    assert both.a.run("ip", "-o", "link", "show", "isthmus-wg0").partition(":")[0] == index
    assert both.a.run("wg", "show", "isthmus-wg0", "latest-handshakes") == shown
    assert ask(both.a.daemon.socket, "/v1/audit")["problems"] == []


def test_a_peer_without_a_key_is_never_sent_to_in_clear(tmp_path: Path) -> None:
    """Node b has no key that a knows: a is closed towards it; b encrypts towards a."""
    file = tmp_path / "wire.pcap"
    with pair(tmp_path, publish=(True, False)) as both:
        with capture(both.a.node, file):
            with pytest.raises(OSError, match=r"timed out|unreachable"):
                both.dial(1)
            wait_for(lambda: both.a.dropped() > 0, "the drop is counted")
            found = both.a.encryption()
            assert (found["state"], found["reason"]) == ("closed", "it publishes no WireGuard key")
            assert "unreachable 198.18.0.12" in both.a.run("ip", "route", "show", "table", "732")
        assert "8472" not in udp_ports(file)
        # The key comes: it is published, and the agent reads it.
        publics = {"onprem": public_of(both.a.private), "cloud": public_of(both.b.private)}
        both.a.daemon.stop()
        both.a.publish(documents("onprem", publics))
        both.a.daemon.start()
        wait_for(lambda: _answers(both.client, "10.102.0.2"), "a reaches b", 5)


def test_a_stream_outlives_turning_encryption_on_and_off(tmp_path: Path) -> None:
    """Host by host, stage by stage, and the kernel checks sources strictly. While a host takes a step and after it
    nothing is dropped for its way, and at the end of each direction nothing goes the other way any more."""
    with pair(tmp_path) as both:
        for host in (both.a, both.b):
            host.node.sysctl("net.ipv4.conf.all.rp_filter", "1")
            host.stage("plain")
        both.client.do(
            "held = socket.create_connection(('10.102.0.2', 8080), 3); lines = held.makefile(); lines.readline()\n"
            "held.settimeout(20); result = 1"
        )

        def alive() -> bool:
            return bool(both.client.do(f"held.sendall({SECRET!r} * 2000 + b'?'); result = int(lines.readline()) > 0"))

        up, down = ["accepts", "sends", "demands"], ["sends", "accepts", "plain"]
        for stages, order, shown in ((up, (both.a, both.b), str(PORT)), (down, (both.b, both.a), "8472")):
            assert alive()
            for word in stages:
                for host in order:
                    settled = [each.dropped() for each in (both.a, both.b)]
                    meanwhile(alive, f"{host.cluster} on its way to {word}", host.stage, word)
                    assert both.dial(10) == ["b", "10.101.0.2"], f"a new one, {host.cluster} at {word}"
                    assert [each.dropped() for each in (both.a, both.b)] == settled, f"{host.cluster} at {word}"
                    if word != "plain":
                        assert host.encryption()["stage"] == word
            file = tmp_path / f"{shown}.pcap"
            with capture(both.a.node, file):
                assert alive()
            assert set(udp_ports(file)) & {str(PORT), "8472"} == {shown}
            assert (SECRET in file.read_bytes()) is (shown == "8472")


@pytest.mark.parametrize(
    "native", [pytest.param(False, id="tunnel"), pytest.param(True, id="native", marks=pytest.mark.slow)]
)
def test_a_stream_outlives_new_keys(tmp_path: Path, native: bool) -> None:
    """Host by host, stage by stage, and the kernel checks sources strictly. What a registrar publishes meanwhile is
    known to a host at its next step, and to both before the next stage."""
    with pair(tmp_path) as both:
        hosts = (both.a, both.b)
        publics: dict[str, dict[int, str]] = {}
        for host in hosts:
            if native:
                host.native("demands")
            host.node.sysctl("net.ipv4.conf.all.rp_filter", "1")
            private, public = new_key()
            made = time.time() - DAY
            os.utime(host.directory / WIREGUARD_KEYS[0], (made, made))
            (host.directory / WIREGUARD_KEYS[1]).write_text(private + "\n")
            publics[host.cluster] = {PORT: public_of(host.private), WIREGUARD_PORTS[1]: public}
        published = {host.cluster: (PORT,) for host in hosts}

        def take(host: Host, wanted: Keys) -> None:
            known = {who: {port: publics[who][port] for port in ports} for who, ports in published.items()}
            first = {who: next(iter(found.values())) for who, found in known.items()}
            host.use(wanted, documents(host.cluster, first, known))

        both.client.do(
            "held = socket.create_connection(('10.102.0.2', 8080), 3); lines = held.makefile(); lines.readline()\n"
            "held.settimeout(20); result = 1"
        )

        def alive() -> bool:
            return bool(both.client.do(f"held.sendall({SECRET!r} * 2000 + b'?'); result = int(lines.readline()) > 0"))

        file = tmp_path / "wire.pcap"
        with capture(both.a.node, file):
            for keys_wanted in (Keys(0, Stage.ACCEPTS), Keys(0, Stage.SENDS), Keys(1)):
                for host in hosts:
                    settled = [each.dropped() for each in hosts]
                    meanwhile(alive, f"{host.cluster} on its way to {keys_wanted}", take, host, keys_wanted)
                    published[host.cluster] = WIREGUARD_PORTS if keys_wanted.has_both else WIREGUARD_PORTS[1:]
                    assert both.dial(10) == ["b", "10.101.0.2"], f"a new one, {host.cluster} at {keys_wanted}"
                    assert [each.dropped() for each in hosts] == settled, f"{host.cluster} at {keys_wanted}"
                for host in hosts:
                    take(host, keys_wanted)
                    if keys_wanted.has_both:
                        wait_for(
                            lambda host=host: host.daemon.status()["wireguard"]["second"]["peers"] == 1,
                            "the other node is a peer of the second device",
                        )
                        other = both.b if host is both.a else both.a
                        far = ip_address(other.node.underlay)
                        for device in WIREGUARD_DEVICES:
                            host.node.call(greet, ip_address(host.node.underlay), [far], 8472, device)
                        ages = host.key_ages()
                        assert set(ages) == {str(port) for port in WIREGUARD_PORTS}
                        assert DAY <= ages[str(PORT)] < DAY + 600
                        assert 0 <= ages[str(WIREGUARD_PORTS[1])] < 600
                        wait_for(
                            lambda host=host: has_both_sessions(host), f"{host.cluster} at {keys_wanted}: sessions", 10
                        )
                assert alive()
        assert set(udp_ports(file)) == {str(port) for port in WIREGUARD_PORTS}, "no VXLAN header in clear"
        assert SECRET not in file.read_bytes()
        last = tmp_path / "last.pcap"
        with capture(both.a.node, last):
            assert alive()
        assert set(udp_ports(last)) == {str(WIREGUARD_PORTS[1])}
        for host in hosts:
            assert host.run("wg", "show", "interfaces").split() == [WIREGUARD_DEVICES[1]]
            assert host.daemon.status()["wireguard"]["port"] == WIREGUARD_PORTS[1]
            assert set(host.key_ages()) == {str(WIREGUARD_PORTS[1])}, "the old key is gone"
            assert ask(host.daemon.socket, "/v1/audit")["problems"] == []


def has_both_sessions(host: Host) -> bool:
    found = host.encryption()
    return found["handshake_age"] is not None and found["second"]["handshake_age"] is not None


def test_a_session_is_made_before_anything_is_sent_through_it(tmp_path: Path) -> None:
    with pair(tmp_path) as both:
        for host in (both.a, both.b):
            host.stage("accepts")
        found = both.a.encryption()
        assert (found["state"], found["stage"], found["reason"]) == ("plain", "accepts", None)
        both.a.node.call(greet, ip_address("198.18.0.11"), [ip_address("198.18.0.12")], 8472)
        for host in (both.a, both.b):
            wait_for(lambda host=host: host.encryption()["handshake_age"] is not None, "there is a session", 5)
        assert text.status(both.a.daemon.status()).count("plain (accepts), handshake") == 1


def sizes_in_wireguard(file: Path) -> set[int]:
    """Of the packets of a capture that WireGuard sent, without IP and UDP."""
    shown = subprocess.run(
        ["tcpdump", "-nr", str(file), f"udp port {PORT}"], check=True, capture_output=True, text=True
    )
    return {int(length) for length in re.findall(r"length (\d+)$", shown.stdout, re.MULTILINE)}


@pytest.fixture(scope="module")
def natives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Native inside WireGuard; the kernel checks sources strictly."""
    with pair(tmp_path_factory.mktemp("natives")) as found:
        for host in (found.a, found.b):
            host.node.sysctl("net.ipv4.conf.all.rp_filter", "1")
            host.native("demands")
        yield found


def all_drops(host: Host) -> dict[str, int]:
    return dict(host.daemon.status()["datapath"]["drops"])


def test_native_packets_go_into_wireguard_as_they_are_at_their_full_size(natives: Pair, tmp_path: Path) -> None:
    file = tmp_path / "wire.pcap"
    # A probe may have been on its way when the first of the two was native and the other not yet.
    before = [all_drops(host) for host in (natives.a, natives.b)]
    with capture(natives.a.node, file):
        send_at_full_size(natives, NATIVE_MTU)
    assert set(udp_ports(file)) == {str(PORT)}, "nothing in clear"
    # WireGuard's header and tag, and the packet as it is, padded to 16 bytes: no VXLAN around it.
    assert max(sizes_in_wireguard(file)) == 32 + NATIVE_MTU
    assert_nothing_in_clear(file)
    assert [all_drops(host) for host in (natives.a, natives.b)] == before
    for host in (natives.a, natives.b):
        assert ask(host.daemon.socket, "/v1/audit")["problems"] == []


def test_what_native_inside_wireguard_is_made_of_and_what_status_says(natives: Pair) -> None:
    natives.dial()
    assert "10.102.0.0/28 dev isthmus-wg0 proto 73 scope link src 10.101.0.1 mtu 1420" in natives.a.run("ip", "route")
    (allowed,) = natives.a.run("wg", "show", "isthmus-wg0", "allowed-ips").splitlines()
    assert set(allowed.split("\t")[1].split()) == {"198.18.0.12/32", "10.102.0.0/28"}
    status = natives.a.daemon.status()
    (far,) = [one for one in status["nodes"] if one["name"] == "cloud-1"]
    assert {key: far["routing"][key] for key in ("way", "stage", "mtu")} == {
        "way": "native",
        "stage": "demands",
        "mtu": NATIVE_MTU,
    }
    assert far["encryption"]["state"] == "encrypted"
    assert re.search(r"cloud/cloud-1 .* native +encrypted, handshake", text.status(status))
    wait_for(lambda: natives.a.daemon.probe("cloud-1") == "up", "probes go so too")


@contextlib.contextmanager
def cut_to(host: Host, length: int) -> Iterator[None]:
    """IPv4 packets that are longer do not arrive at a host, and nobody says so."""
    chain = f"type filter hook ingress device eth0 priority 0; ip length > {length} drop;"
    host.run("nft", "table netdev cut { chain c { " + chain + " }; }")
    try:
        yield
    finally:
        host.run("nft", "delete table netdev cut")


def test_a_way_that_is_cut_without_a_word_is_named_inside_wireguard_too(natives: Pair) -> None:
    wait_for(lambda: carries(natives.a, NATIVE_MTU), "the way carries what routes say", FOUND_WITHIN)
    assert warned(natives.a) == []
    with cut_to(natives.b, 1308):
        (words,) = wait_for(lambda: warned(natives.a), "it is named at once", 15)
        assert re.search(r"packets of \d+ bytes and more are lost on the way to node cloud/cloud-1 or back", words)
        assert metered(natives.a, "route") == NATIVE_MTU
        assert metered(natives.a, "path") != NATIVE_MTU
        assert (natives.a.probe(), natives.a.encryption()["state"]) == ("up", "encrypted")
        assert natives.dial() == ["b", "10.101.0.2"], "small packets pass"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixture", "full", "inside"), [("natives", NATIVE_MTU, 0), ("both", PATH_MTU, 50)], ids=["native", "tunnel"]
)
def test_what_a_way_that_is_cut_carries_is_found_inside_wireguard_too(
    request: pytest.FixtureRequest, fixture: str, full: int, inside: int
) -> None:
    """`inside` bytes are around a packet within WireGuard, which pads to 16 bytes: beside its header and tag, UDP and
    IP 1308 have place for 1248."""
    pair: Pair = request.getfixturevalue(fixture)
    wait_for(lambda: carries(pair.a, full), "the way carries what routes say", FOUND_WITHIN)
    with cut_to(pair.b, 1308):
        wait_for(lambda: carries(pair.a, 1248 - inside), "what it carries is found", FOUND_WITHIN)
        assert way(pair.a)["lost"] == 1249 - inside
        assert (metered(pair.a, "route"), metered(pair.a, "path")) == (full, 1248 - inside)
    wait_for(lambda: carries(pair.a, full), "it is mended", FOUND_WITHIN)
    assert warned(pair.a) == []


@pytest.mark.parametrize("gone", ["wireguard-go", "routes and rules"])
def test_native_packets_never_leave_in_clear_and_all_heals(natives: Pair, tmp_path: Path, gone: str) -> None:
    """Nobody repairs first, and somebody else's route leads to the other host beside WireGuard."""
    natives.dial()
    file = tmp_path / "wire.pcap"
    with capture(natives.a.node, file):
        natives.a.daemon.stop(signal.SIGKILL)
        before = natives.a.run("nft", "list", "tables")
        if gone == "wireguard-go":
            natives.a.kill_wireguard()
        else:
            natives.a.run("ip", "route", "flush", "table", "all", "proto", "73")
        for number in ("726", "730"):
            natives.a.run("ip", "rule", "del", "pref", number)
        natives.a.run("ip", "route", "add", "10.102.0.0/24", "via", "198.18.0.12")
        with pytest.raises(OSError, match=r"timed out|unreachable"):
            natives.dial(1)
        natives.a.run("ip", "route", "del", "10.102.0.0/24")
        assert before == natives.a.run("nft", "list", "tables")
        if gone == "wireguard-go":
            natives.a.start_wireguard()
        natives.a.daemon.start()
        wait_for(lambda: _answers(natives.client, "10.102.0.2"), "a reaches b again", 5)
        assert natives.a.dropped() > 0
    assert set(udp_ports(file)) <= {str(PORT)}
    assert packets_of(file, "ip", "and", "(net 10.101.0.0/16 or net 10.102.0.0/16)") == 0
    assert ask(natives.a.daemon.socket, "/v1/audit")["problems"] == []


@pytest.mark.parametrize("device", ["isthmus-wg0", "isthmus0"])
def test_programs_that_somebody_takes_away_come_back(natives: Pair, device: str) -> None:
    natives.a.run("tc", "qdisc", "del", "dev", device, "clsact")
    wait_for(lambda: ask(natives.a.daemon.socket, "/v1/audit")["problems"] == [], "they are back", 5)
    assert natives.dial() == ["b", "10.101.0.2"]


def packets_of(file: Path, *expression: str) -> int:
    shown = subprocess.run(["tcpdump", "-nr", str(file), *expression], check=True, capture_output=True, text=True)
    return len(shown.stdout.splitlines())


def test_a_stream_outlives_turning_native_on_and_off_inside_wireguard(tmp_path: Path) -> None:
    """Host by host, stage by stage, and the kernel checks sources strictly. Nothing is dropped while a host takes a
    step and after it, and at no moment anything is in clear."""
    with pair(tmp_path) as both:
        hosts = (both.a, both.b)
        for host in hosts:
            host.node.sysctl("net.ipv4.conf.all.rp_filter", "1")
        both.client.do(
            "held = socket.create_connection(('10.102.0.2', 8080), 3); lines = held.makefile(); lines.readline()\n"
            "held.settimeout(20); result = 1"
        )

        def alive() -> bool:
            return bool(both.client.do(f"held.sendall({SECRET!r} * 2000 + b'?'); result = int(lines.readline()) > 0"))

        whole = tmp_path / "whole.pcap"
        up, down = ["accepts", "sends", "demands"], ["sends", "accepts", "plain"]
        with capture(both.a.node, whole):
            for stages, order, native in ((up, hosts, True), (down, hosts[::-1], False)):
                assert alive()
                for word in stages:
                    for host in order:
                        settled = [sum(each.daemon.status()["datapath"]["drops"].values()) for each in hosts]
                        meanwhile(alive, f"{host.cluster} on its way to {word}", host.native, word)
                        assert both.dial(10) == ["b", "10.101.0.2"], f"a new one, {host.cluster} at {word}"
                        now = [sum(each.daemon.status()["datapath"]["drops"].values()) for each in hosts]
                        assert now == settled, f"{host.cluster} at {word}"
                before = [sent_by(host, "isthmus0") for host in hosts]
                assert alive()
                assert ([sent_by(host, "isthmus0") for host in hosts] == before) is native
        assert set(udp_ports(whole)) == {str(PORT)}
        assert SECRET not in whole.read_bytes()
        for host in hosts:
            assert host.run("ip", "rule").count("lookup 73") == 3
            assert "underlay" not in host.run("tc", "filter", "show", "dev", "eth0", "ingress")


def sent_by(host: Host, device: str) -> int:
    shown = json.loads(host.run("ip", "-j", "-s", "link", "show", device))
    return int(shown[0]["stats64"]["tx"]["packets"])


def test_native_inside_wireguard_is_proven_before_it_is_used(tmp_path: Path) -> None:
    """A packet with the mark goes so while everything else is in the tunnel."""
    with pair(tmp_path) as both:
        for host in (both.a, both.b):
            host.native("accepts")
            host.node.sysctl("net.ipv4.ping_group_range", "0 2147483647")
        both.client.do(PING + "\nresult = 1")
        assert both.client.do(f"result = ping('10.101.0.1', '10.102.0.1', {NATIVE_MTU}, 0x4E)") is True
        told = both.client.do(f"result = ping('10.101.0.1', '10.102.0.1', {NATIVE_MTU})")
        assert "Message too long" in told
        assert both.client.do(f"result = ping('10.101.0.1', '10.102.0.1', {PATH_MTU})") is True
        assert both.dial() == ["b", "10.101.0.2"]
        # The other host's own firewall is what the network is in clear: it may let the tunnel in alone.
        both.b.run("nft", "add table ip filter; add chain ip filter in { type filter hook input priority 0; }")
        both.b.run("nft", "add rule ip filter in iifname isthmus-wg0 ip saddr 10.101.0.0/16 drop")
        native = f"ping('10.101.0.1', '10.102.0.1', {NATIVE_MTU}, 0x4E)"
        assert "timed out" in both.client.do(f"result = {native}")
        assert both.client.do(f"result = ping('10.101.0.1', '10.102.0.1', {PATH_MTU})") is True
        assert both.dial() == ["b", "10.101.0.2"]
        both.b.run("nft", "delete", "table", "ip", "filter")
        assert both.client.do(f"result = {native}") is True
