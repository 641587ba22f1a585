# SPDX-License-Identifier: GPL-3.0-or-later
"""Agents and registrars of this version and of the one before it, side by side on real etcd servers.

Specs, record, definitions and rights are those that this version's `site` writes. Two clusters, two hosts each: one
with the previous version's programs, one with the present one's. Agents have a kernel that only remembers.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import previous_release
import pytest
from integration.etcd_fixture import EtcdServer
from isthmus_agent.cli.client import AgentSilent, ask
from isthmus_agent.estate_admin import write_documents, write_services
from isthmus_agent.etcd_admin import ensure_access, wanted_access
from isthmus_mesh import keys
from isthmus_mesh.planner import Plan
from isthmus_mesh.wire import ClusterService
from unit.mesh import estates

ROOT = Path(__file__).parents[2]
PRESENT = ROOT / "agent"
CLUSTERS = {"onprem": ("o1", "o2"), "cloud": ("c1", "c2")}
HOSTS = {host: cluster for cluster, hosts in CLUSTERS.items() for host in hosts}
OLD_HOSTS = ("o1", "c1")


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Poll until true; an etcd or an agent that does not answer counts as not yet."""
    end = time.monotonic() + seconds
    last: object = None
    while True:
        try:
            found = condition()
        except (RuntimeError, AgentSilent) as error:
            found, last = None, error
        if found:
            return found
        assert time.monotonic() < end, f"not within {seconds} s: {what} ({last})"
        time.sleep(0.1)


@dataclass
class Program:
    """An agent or a registrar on a host, in a version that may be changed."""

    command: list[str]
    log: Path
    options: dict[Path, list[str]] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self, version: Path) -> None:
        """`version` is where its code is."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command, *self.options.get(version, [])],
                env={**os.environ, "PYTHONPATH": str(version)},
                stdout=log,
                stderr=log,
            )

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(20)
            self.process = None

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Estate:
    """Two clusters' etcd servers, and a registrar and an agent for each of the hosts; none runs yet."""

    def __init__(self, place: Path, servers: dict[str, EtcdServer]) -> None:
        self.servers = servers
        self.place = place
        self.plan = self._planned()
        self.agents: dict[str, Program] = {}
        self.registrars: dict[str, Program] = {}
        for host, cluster in HOSTS.items():
            directory = place / host
            (directory / "cgroup" / f"web-{host}").mkdir(parents=True)
            (directory / "node.json").write_text(json.dumps(self._spec(host)))
            estate_file = directory / "estate.json"
            estate_file.write_text(json.dumps({"cluster": cluster, "documents": dict(self.plan.record)}))
            config, log = str(directory / "node.json"), directory / "log"
            alone = str(Path(__file__).with_name("agent_alone.py"))
            self.agents[host] = Program([alone, config, str(directory / "cgroup"), str(directory)], log)
            command = ["-m", "isthmus_agent.registrar.main", "--config", config, "--estate", str(estate_file)]
            # The previous version keeps nothing on disk.
            options = {PRESENT: ["--state-dir", str(directory / "registrar")]}
            self.registrars[host] = Program(command, directory / "registrar.log", options)

    @staticmethod
    def _planned() -> Plan:
        """What this version's planner makes of an inventory."""
        estate, hosts = estates.estate(), {}
        for cluster, names in CLUSTERS.items():
            estate["clusters"][cluster]["etcd"]["hosts"] = list(names)
            for number, name in enumerate(names, 1):
                workload = {"name": "web", "namespace": "shop", "labels": {"app": "web"}, "path": f"web-{name}"}
                address = f"198.18.{estate['clusters'][cluster]['id']}.{number}"
                hosts[name] = {"isthmus_cluster": cluster, "ansible_host": address, "isthmus_workloads": [workload]}
        del estate["services"][0]["health"]  # ready while its cgroup is there
        found: Plan = estates.planned(estates.model(estate, hosts))
        return found

    def _spec(self, host: str) -> dict[str, Any]:
        """The planned spec with this test's etcd servers and certificates for those of the hosts."""
        spec = json.loads(json.dumps(self.plan.specs[host]))
        server = self.servers[HOSTS[host]]
        crt, key = server.ca.issue(f"isthmus-agent-{host}")
        tls = {"ca": str(server.ca.crt), "cert": str(crt), "key": str(key)}
        spec["etcd"] = {"endpoints": [server.endpoint], **tls}
        crt, key = server.ca.issue("isthmus-registrar")
        spec["registrar"] |= {"cert": str(crt), "key": str(key)}
        for peer in spec["registrar"]["peers"]:
            there = self.servers[peer["name"]]
            crt, key = there.ca.issue(f"remote-{HOSTS[host]}")
            tls = {"ca": str(there.ca.crt), "cert": str(crt), "key": str(key)}
            peer |= {"endpoints": [there.endpoint], **tls}
        return dict(spec)

    def site(self) -> None:
        """Rights, record and definitions, as this version writes them."""
        for cluster, server in self.servers.items():
            others = [name for name in CLUSTERS if name != cluster]
            with server.sync_client() as client:
                ensure_access(client, wanted_access(cluster, CLUSTERS[cluster], others), apply=True, enable=True)
            server.ca.issue("isthmus-operator")
            with server.sync_client("isthmus-operator") as client:
                write_documents(client, self.plan.record, apply=True)
                write_services(client, self.plan.services[cluster]["present"], [], "inventory", apply=True)

    def define(self, name: str) -> None:
        """A further service of the same backends, in every cluster."""
        for cluster, server in self.servers.items():
            # `kubernetes`: a key that the previous version does not know.
            document = {**self.plan.services[cluster]["present"][0], "name": name, "kubernetes": True}
            with server.sync_client("isthmus-operator") as client:
                write_services(client, [document], [], "operator", apply=True)

    def backends(self, host: str, service: str) -> set[str]:
        """Hosts whose backends of a service this host's agent uses."""
        for found in ask(self.place / host / "run" / "agent.sock", "/v1/services")["services"]:
            if found["name"] == service:
                return {backend["node"] for backend in found["backends"] if backend["used"]}
        return set()

    def everywhere(self, service: str, nodes: set[str]) -> None:
        for host in HOSTS:
            until(lambda host=host: self.backends(host, service) == nodes, f"{host} uses {nodes} of {service}")  # type: ignore[misc]

    def lead(self, host: str) -> None:
        def leads() -> bool:
            key = self.servers[HOSTS[host]].dump(keys.LEADER).get(keys.LEADER)
            return key is not None and bool(json.loads(key)["host"] == host)

        until(leads, f"{host} leads")

    def applied(self, host: str) -> list[dict[str, list[str]]]:
        """The services of every datapath that the agent of a host applied."""
        return [json.loads(line) for line in (self.place / host / "applied").read_text().splitlines()]


@dataclass
class Witness:
    """What was there at a moment, to be compared with what came after."""

    estate: Estate
    revisions: dict[str, int] = field(default_factory=dict)
    dealt: dict[str, dict[str, str]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for cluster, server in self.estate.servers.items():
            with server.sync_client() as client:
                self.revisions[cluster] = client.range(keys.LEADER).revision
            self.dealt[cluster] = numbers(server)
        for host in HOSTS:  # its status tells what is wanted, a moment before that is applied
            until(lambda host=host: self.whole(self.estate.applied(host)[-1]), f"{host} applied all backends")  # type: ignore[misc]
        self.steps = {host: len(self.estate.applied(host)) for host in HOSTS}

    def whole(self, datapath: dict[str, list[str]]) -> bool:
        """Whether a service has every workload as a backend."""
        backends = sorted(spec["workloads"][0]["address4"] for spec in self.estate.plan.specs.values())
        return backends in datapath.values()

    def nothing_was_withdrawn(self, service: str) -> None:
        """Of all changes since in both etcds none took a key or a backend away, not even for a moment; all numbers
        are as they were; no agent applied a datapath without one of the backends."""
        for cluster, server in self.estate.servers.items():
            for event in history(server, self.revisions[cluster] + 1):
                key = event["key"]
                assert not event["deleted"], f"{cluster}: {key} was deleted"
                if (keys.parse_service_key(key) or ())[1:] == ("shop", service):
                    written = ClusterService.from_json(event["value"])
                    assert len(written.backends) == 2, f"{cluster}: {key} lost backends: {written}"
            now = numbers(server)
            assert {key: now.get(key) for key in self.dealt[cluster]} == self.dealt[cluster]
        for host, step in self.steps.items():
            for datapath in self.estate.applied(host)[step:]:
                assert self.whole(datapath), f"{host} applied {datapath}"


def numbers(server: EtcdServer) -> dict[str, str]:
    """Identities, service addresses and what is published: everything but clocks, canaries and the state of peers."""
    kept = (keys.ALLOC_PREFIX, "cilium/state/", "cilium/cache/", "cilium/cluster-config/")
    found = server.dump()
    return {
        key: value for key, value in found.items() if key.startswith(kept) and not key.startswith(keys.PEERS_PREFIX)
    }


def history(server: EtcdServer, revision: int) -> list[dict[str, Any]]:
    """Every change of Cilium's keys from a revision on until now, told by etcd's own tool."""
    end = json.loads(server.etcdctl("put", "cilium/.end-of-watch", "", "-w", "json"))["header"]["revision"]
    crt, key = server.ca.issue("root")
    files = [f"--cacert={server.ca.crt}", f"--cert={crt}", f"--key={key}", f"--endpoints={server.endpoint}"]
    command = ["etcdctl", *files, "watch", "cilium/", "--prefix", f"--rev={revision}", "-w", "json"]
    found: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "ETCDCTL_API": "3"}) as watch:
        try:
            assert watch.stdout is not None
            for line in watch.stdout:
                for event in json.loads(line)["Events"]:
                    kv = event["kv"]
                    if kv["mod_revision"] >= end:
                        return found
                    text = [base64.b64decode(kv.get(part, "")).decode() for part in ("key", "value")]
                    found.append({"key": text[0], "value": text[1], "deleted": event.get("type") == 1})
        finally:
            watch.kill()
    raise AssertionError("etcdctl's watch ended")


@pytest.fixture
def estate(tmp_path: Path) -> Iterator[Estate]:
    previous_release.sources()
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(EtcdServer(tmp_path / name, name=name)) for name in CLUSTERS}
        made = Estate(tmp_path, servers)
        made.site()
        try:
            yield made
        finally:
            for program in (*made.agents.values(), *made.registrars.values()):
                program.stop(signal.SIGKILL)


def version_of(estate: Estate, host: str) -> str:
    alive = estate.servers[HOSTS[host]].dump(keys.alive_key(host))
    return str(json.loads(alive[keys.alive_key(host)])["version"]) if alive else ""


def remembered(estate: Estate, host: str) -> set[str]:
    """Hosts whose backends of `web` are in the last-known-good of a host's agent."""
    addresses = {spec["workloads"][0]["address4"]: name for name, spec in estate.plan.specs.items()}
    documents = json.loads((estate.place / host / "state" / "last-known-good.json").read_text())["documents"]
    found = [value for key, value in documents.items() if (keys.parse_service_key(key) or ())[1:] == ("shop", "web")]
    return {addresses[address] for value in found for address in ClusterService.from_json(value).backends}


def test_both_versions_lead_answer_and_read_each_other_and_an_upgrade_goes_unnoticed(estate: Estate) -> None:
    previous, everyone = previous_release.python_path(), set(HOSTS)
    for host in HOSTS:
        estate.agents[host].start(previous if host in OLD_HOSTS else PRESENT)
    # A registrar of the previous version fills onprem's etcd, one of this version cloud's; the others stand by.
    for host, version in (("o1", previous), ("c2", PRESENT)):
        estate.registrars[host].start(version)
        estate.lead(host)
    estate.registrars["o2"].start(PRESENT)
    estate.registrars["c1"].start(previous)
    estate.everywhere("web", everyone)
    assert {version_of(estate, host) for host in OLD_HOSTS} == {previous_release.VERSION}
    assert previous_release.VERSION not in {version_of(estate, host) for host in ("o2", "c2")}

    # From the previous to this version in onprem, the other way in cloud; then both back again.
    for number, followers in enumerate((("o2", "c1"), ("o1", "c2"))):
        witness = Witness(estate)
        for host in followers:
            (leader,) = set(CLUSTERS[HOSTS[host]]) - {host}
            estate.registrars[leader].stop(signal.SIGKILL if number == 0 else signal.SIGTERM)
            estate.lead(host)
        estate.define(f"later-{number}")
        estate.everywhere(f"later-{number}", everyone)
        witness.nothing_was_withdrawn("web")
        for cluster, hosts in CLUSTERS.items():
            (waiting,) = set(hosts) - set(followers)
            estate.registrars[waiting].start(previous if waiting in OLD_HOSTS else PRESENT)
            assert cluster == HOSTS[waiting]

    # A withdrawal that is meant comes through all four kinds of programs.
    for gone, rest in (("o1", everyone - {"o1"}), ("o2", everyone - {"o2"})):
        cgroup = estate.place / gone / "cgroup" / f"web-{gone}"
        cgroup.rmdir()
        estate.everywhere("web", rest)
        cgroup.mkdir()
        estate.everywhere("web", everyone)

    # The upgrade, as `site` does it: host by host, agent and registrar start anew over what the old ones left.
    for host in OLD_HOSTS:  # an agent writes last-known-good at most a second late
        until(lambda host=host: remembered(estate, host) == everyone, f"{host} has it on disk")  # type: ignore[misc]
    witness = Witness(estate)
    for host in OLD_HOSTS:
        for program in (estate.agents[host], estate.registrars[host]):
            program.stop()
            program.start(PRESENT)
        until(lambda host=host: version_of(estate, host) not in ("", previous_release.VERSION), f"{host} is new")  # type: ignore[misc]
    estate.define("after")
    estate.everywhere("after", everyone)
    witness.nothing_was_withdrawn("web")
    assert all(program.runs() for program in (*estate.agents.values(), *estate.registrars.values()))
