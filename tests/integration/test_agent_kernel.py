# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real `isthmusd` processes on two nodes in network namespaces, both started from last-known-good with no
etcd anywhere: what a mesh must do when every control plane is gone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import agent_mesh as mesh
import previous_release
import pytest
from bpf.topology import Inside, Node, bare_nodes, wait_for
from integration.etcd_fixture import Ca
from isthmus_agent.cli.client import AgentSilent, ask
from isthmus_agent.state.lastgood import LastGood
from isthmus_mesh import keys, wire

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]
VIP = "10.111.0.10"
METRICS = 9968
CLIENT = """
import socket
def dial(address="10.111.0.10", port=80, timeout=3):
    with socket.create_connection((address, port), timeout) as s:
        return s.makefile().readline().split()
"""


DIALLING = """
import threading
stop, told = threading.Event(), []
def dialling():
    while not stop.is_set():
        try:
            told.append(dial()[0])
        except OSError as error:
            told.append(repr(error))
thread = threading.Thread(target=dialling)
thread.start()
"""


@dataclass
class Daemon:
    """`isthmusd` in a node's namespace."""

    node: Node
    directory: Path
    version: Path = ROOT / "agent"
    """Where its code is."""
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "agent.sock"

    def entering(self) -> list[str]:
        """The command into whatever else than the network namespace it lives in."""
        return ["nsenter"]

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.entering(),
                    f"--net=/proc/self/fd/{self.node.netns}",
                    sys.executable,
                    "-m",
                    "isthmus_agent.agent.main",
                    f"--config={self.directory / 'node.json'}",
                    f"--state-dir={self.directory / 'state'}",
                    f"--run-dir={self.directory / 'run'}",
                    f"--pin-dir={self.node.pin_dir}",
                    f"--cgroup-root={self.node.cgroup}",
                    f"--metrics=127.0.0.1:{METRICS}",
                ],
                env={**os.environ, "PYTHONPATH": str(self.version)},
                stdout=log,
                stderr=log,
                pass_fds=(self.node.netns,),
            )
        wait_for(self.applied, f"isthmusd of {self.node.name} applied its datapath", 20)

    def applied(self) -> bool:
        try:
            return bool(self.status()["datapath"]["state"] == "applied")
        except AgentSilent:
            return False

    def status(self) -> dict[str, Any]:
        return ask(self.socket, "/v1/status")

    def services(self) -> dict[str, dict[str, Any]]:
        """Backends of shop/web by address."""
        (service,) = ask(self.socket, "/v1/services")["services"]
        return {backend["address"]: backend for backend in service["backends"]}

    def probe(self, name: str) -> str:
        return str(next(node["probe"] for node in self.status()["nodes"] if node["name"] == name))

    def metrics(self) -> dict[str, float]:
        """What a scrape says, by name with labels."""

        def scrape() -> str:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", METRICS, timeout=5)) as connection:
                connection.request("GET", "/metrics")
                return connection.getresponse().read().decode()

        samples = (line.rsplit(" ", 1) for line in self.node.call(scrape).splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(20)
            self.process = None


@dataclass
class Estate:
    a: Node
    b: Node
    daemon_a: Daemon
    daemon_b: Daemon
    client: Inside


def _documents(own: str, backends: dict[str, list[int]]) -> dict[str, bytes]:
    documents = mesh.documents(backends, own=own, sizes={"onprem": 1, "cloud": 1})
    for cluster, number in (("onprem", 1), ("cloud", 2)):
        underlay = f"198.18.0.1{number}"
        node = mesh.node(
            cluster,
            1,
            addresses=(
                wire.NodeAddress("InternalIP", underlay),
                wire.NodeAddress("CiliumInternalIP", f"10.10{number}.0.1"),
            ),
        )
        cached = cluster != own
        documents[keys.node_key(cluster, node.name, cached)] = node.to_json().encode()
        pair = wire.IPIdentityPair(f"10.10{number}.0.2", (number << 16) + 1, underlay)
        documents[keys.ip_key(pair.ip, cluster if cached else None)] = pair.to_json().encode()
    return documents


def make_daemon(node: Node, cluster: str, directory: Path, backends: dict[str, list[int]]) -> Daemon:
    (directory / "state").mkdir(parents=True)
    ca = Ca(directory / "pki", cluster)
    crt, key = ca.issue("agent")
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
        # Nothing listens there: no etcd in this test.
        etcd={"endpoints": ["https://127.0.0.1:1"], "ca": str(ca.crt), "cert": str(crt), "key": str(key)},
    )
    (directory / "node.json").write_text(json.dumps(spec))
    last = LastGood(cluster, "2026-01-02T03:04:05Z", _documents(cluster, backends))
    (directory / "state" / "last-known-good.json").write_text(last.to_json())
    return Daemon(node, directory)


@pytest.fixture
def estate(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Estate]:
    """Node a is onprem-1, node b is cloud-1; which of them have a backend is the test's parameter."""
    backends = getattr(request, "param", {"cloud": [1]})
    with bare_nodes() as nodes:
        daemons: list[Daemon] = []
        try:
            for node, cluster in zip(nodes, ("onprem", "cloud"), strict=True):
                daemons.append(make_daemon(node, cluster, tmp_path / cluster, backends))
                daemons[-1].start()
            for node in nodes:
                server = node.process("web")
                server.do(f"serve_tcp({node.name!r}, {node.workload!r}, 8080); result = 1")
            client = nodes[0].process("web")
            client.do(CLIENT + "\nresult = 1")
            yield Estate(nodes[0], nodes[1], daemons[0], daemons[1], client)
        finally:
            for daemon in daemons:
                daemon.stop(signal.SIGKILL)


def test_a_service_works_from_last_known_good_without_any_etcd(estate: Estate) -> None:
    assert estate.client.do("result = dial()") == ["b", "10.101.0.2"], "b answers and sees the workload's own address"
    wait_for(lambda: estate.daemon_a.probe("cloud-1") == "up", "the echo over the overlay is answered")
    assert estate.daemon_a.services()["10.102.0.2"]["connects"] == 1
    (seen,) = [
        entry for entry in estate.daemon_b.status()["datapath"]["identities"] if entry["destination"] == "10.102.0.2"
    ]
    assert (seen["identity"], seen["cluster_id"]) == ((1 << 16) + 1, 1)
    assert seen["labels"]["k8s:app"] == "web"
    assert estate.daemon_a.status()["etcd"]["connected"] is False


def test_a_killed_and_restarted_agent_interrupts_nothing(estate: Estate) -> None:
    estate.client.do(
        "held = socket.create_connection(('10.111.0.10', 80), 3); lines = held.makefile(); result = lines.readline()"
    )
    for how in (signal.SIGKILL, signal.SIGTERM):
        estate.daemon_a.stop(how)
        for _ in range(20):
            assert estate.client.do("result = dial()")[0] == "b"
        estate.daemon_a.start()
        assert estate.client.do("held.sendall(b'abc?'); result = int(lines.readline()) > 0") is True
        assert ask(estate.daemon_a.socket, "/v1/audit")["problems"] == []
        assert estate.client.do("result = dial()")[0] == "b"


def test_the_previous_versions_datapath_and_this_ones_talk_and_an_upgrade_interrupts_nothing(tmp_path: Path) -> None:
    """Node a has the previous version, with maps of another layout; then it is upgraded over what that one left."""
    previous = previous_release.python_path()
    with bare_nodes() as nodes:
        daemons: list[Daemon] = []
        try:
            for node, cluster in zip(nodes, ("onprem", "cloud"), strict=True):
                daemons.append(make_daemon(node, cluster, tmp_path / cluster, {"onprem": [1], "cloud": [1]}))
                if cluster == "onprem":
                    daemons[0].version = previous
                daemons[-1].start()
                server = node.process("web")
                server.do(f"serve_tcp({node.name!r}, {node.workload!r}, 8080); result = 1")
            assert daemons[0].status()["version"] == previous_release.VERSION
            assert daemons[1].status()["version"] != previous_release.VERSION
            clients = [node.process("web") for node in nodes]
            for client in clients:
                client.do(CLIENT + "\nresult = 1")
            for daemon, peer in zip(daemons, ("cloud-1", "onprem-1"), strict=True):
                wait_for(lambda daemon=daemon, peer=peer: daemon.probe(peer) == "up", f"{peer} answers")  # type: ignore[misc]

            def both_answer() -> None:
                for client in clients:
                    assert {client.do("result = dial()")[0] for _ in range(40)} == {"a", "b"}

            both_answer()
            clients[0].do(
                f"held = socket.create_connection(({nodes[1].workload!r}, 8080), 3); lines = held.makefile(); "
                "result = lines.readline()"
            )
            for client in clients:
                client.do(DIALLING + "result = 1")
            daemons[0].stop()
            daemons[0].version = ROOT / "agent"
            daemons[0].start()
            both_answer()
            for client in clients:
                assert set(client.do("stop.set(); thread.join(); result = told")) == {"a", "b"}
            assert daemons[0].status()["version"] != previous_release.VERSION
            assert clients[0].do("held.sendall(b'abc?'); result = int(lines.readline()) > 0") is True
            assert ask(daemons[0].socket, "/v1/audit")["problems"] == []
        finally:
            for daemon in daemons:
                daemon.stop(signal.SIGKILL)


def test_audit_names_drift_and_repairs_it(estate: Estate) -> None:
    estate.a.call(subprocess.run, ["ip", "route", "del", "10.102.0.0/28"], check=True)
    (problem,) = ask(estate.daemon_a.socket, "/v1/audit")["problems"]
    assert "10.102.0.0/28" in problem
    assert "missing" in problem
    ask(estate.daemon_a.socket, "/v1/repair", "POST")
    assert ask(estate.daemon_a.socket, "/v1/audit")["problems"] == []
    assert estate.client.do("result = dial()")[0] == "b"


def test_sockets_to_a_backend_that_went_while_the_agent_was_away_end(estate: Estate) -> None:
    estate.client.do("held = socket.create_connection(('10.111.0.10', 80), 3); result = len(held.recv(100))")
    estate.daemon_a.stop(signal.SIGKILL)
    last = LastGood("onprem", "2026-01-02T03:04:05Z", _documents("onprem", {"cloud": []}))
    (estate.daemon_a.directory / "state" / "last-known-good.json").write_text(last.to_json())
    estate.daemon_a.start()
    assert estate.client.do("held.sendall(b'abc?'); result = len(held.recv(100))") > 0, "it drains first"
    wait_for(lambda: estate.daemon_a.status()["datapath"]["sockets_ended"] == 1, "the socket is ended", 45)


def test_sockets_to_a_service_that_is_gone_end_though_the_agent_starts_anew_meanwhile(estate: Estate) -> None:
    estate.client.do("held = socket.create_connection(('10.111.0.10', 80), 3); result = len(held.recv(100))")
    documents = {key: value for key, value in _documents("onprem", {}).items() if "/services/" not in key}
    last = LastGood("onprem", "2026-01-02T03:04:05Z", documents)
    for _ in range(2):
        estate.daemon_a.stop(signal.SIGKILL)
        (estate.daemon_a.directory / "state" / "last-known-good.json").write_text(last.to_json())
        estate.daemon_a.start()
        assert ask(estate.daemon_a.socket, "/v1/services")["services"] == []
        assert ask(estate.daemon_a.socket, "/v1/audit")["problems"] == []
    assert estate.client.do("held.sendall(b'abc?'); result = len(held.recv(100))") > 0, "it drains first"
    wait_for(lambda: estate.daemon_a.status()["datapath"]["sockets_ended"] == 1, "the socket is ended", 45)


def test_pins_that_were_removed_are_made_again(estate: Estate) -> None:
    shutil.rmtree(estate.a.pin_dir)
    problems = ask(estate.daemon_a.socket, "/v1/audit")["problems"]
    assert any("map svc is not pinned" in words for words in problems)
    assert any("cgroup hook connect4 is not attached" in words for words in problems)
    ask(estate.daemon_a.socket, "/v1/repair", "POST")
    assert ask(estate.daemon_a.socket, "/v1/audit")["problems"] == []
    assert estate.client.do("result = dial()")[0] == "b"
    estate.daemon_a.stop(signal.SIGKILL)
    assert estate.client.do("result = dial()")[0] == "b", "it outlives the agent again"


@pytest.mark.parametrize("estate", [{"onprem": [1], "cloud": [1]}], indirect=True)
def test_an_unreachable_backend_gets_no_new_flows_until_it_answers_again(estate: Estate) -> None:
    wait_for(lambda: estate.daemon_a.probe("cloud-1") == "up", "cloud-1 answers")
    answers = {estate.client.do("result = dial()")[0] for _ in range(40)}
    assert answers == {"a", "b"}

    def link(state: str) -> None:
        estate.b.call(subprocess.run, ["ip", "link", "set", "eth0", state], check=True)

    link("down")
    began = time.monotonic()
    wait_for(lambda: not estate.daemon_a.services()["10.102.0.2"]["used"], "cloud-1 is out", 10)
    assert time.monotonic() - began < 6
    for _ in range(20):
        assert estate.client.do("result = dial()")[0] == "a"
    assert estate.daemon_a.status()["datapath"]["sockets_ended"] == 0, "nobody else answers: no proof, no harm"
    link("up")
    wait_for(lambda: estate.daemon_a.services()["10.102.0.2"]["used"], "cloud-1 is used again", 15)


def test_a_foreign_route_in_the_way_is_told_and_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there before the first start: the hooks are attached all the same, and systemd hears READY."""
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notices.bind(str(tmp_path / "notify"))
    notices.settimeout(20)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with notices, bare_nodes() as (node, _):
        route = ["ip", "route", "add", "blackhole", "10.102.0.0/28"]
        node.call(subprocess.run, route, check=True)
        daemon = make_daemon(node, "onprem", tmp_path / "onprem", {"onprem": [1]})
        try:
            daemon.start()
            assert notices.recv(1000).startswith(b"READY=1")
            assert (node.pin_dir / "links" / "connect4").exists()
            server = node.process("web")
            server.do(f"serve_tcp('a', {node.workload!r}, 8080); result = 1")
            client = node.process("web")
            assert client.do(CLIENT + "\nresult = dial()")[0] == "a"
            route[2] = "del"
            node.call(subprocess.run, route, check=True)
            wait_for(lambda: not ask(daemon.socket, "/v1/audit")["problems"], "the route is added when it can be", 40)
        finally:
            daemon.stop(signal.SIGKILL)


def test_the_agent_is_small_and_quiet(estate: Estate) -> None:
    process = estate.daemon_a.process
    assert process is not None

    def cpu() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = cpu()
    time.sleep(5)  # a measurement needs an interval
    share = (cpu() - before) / 5
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    print(f"isthmusd: {resident / 1024:.0f} MiB resident, {share * 100:.1f} % of one CPU")
    assert resident < 100 * 1024
    assert share < 0.05
