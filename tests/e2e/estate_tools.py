# SPDX-License-Identifier: GPL-3.0-or-later
"""The converged estate of the lab as the failure tests use it: an operator's tools, none of our own code.

Keys are read with `etcdctl`, maps with `bpftool`, packets with `tcpdump`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from demo import EDGE, ONPREM_CLIENT, URL, Story
from isthmus_lab import ROUTER, Customer, Lab, LabError
from playbook import COLLECTIONS, INVENTORY, ROOT

PKI = "/etc/isthmus/pki"
ONPREM = ("onprem-1", "onprem-2", "onprem-3")
ETCD_HOSTS = {"onprem": ONPREM, "cloud": ("cloud-1",), "edge": ("edge-1",)}
CONFIGURED_MAPS = ("svc", "backends", "workloads", "local", "peers", "ipcache_host", "ipcache_cidr", "meta")
"""What agents write; the others are the kernel's counters and sockets. `slots` has a million entries; whenever they
change, the entry in `svc` is flipped to other ones, so that is seen without reading them."""
MESH_ADDRESSES = "net 10.96.0.0/11"
"""All workload and service ranges of the lab's inventory, and nothing of its underlay."""
COUNT = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A key in etcd: its value, and the revision that created it (a key that was away meanwhile has a new one)."""

    value: str
    created: int


def decoded(text: str) -> str:
    return base64.b64decode(text).decode()


class Estate(Story):
    """The demo's story-teller with an operator's tools."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab, print)

    # -- etcd

    def etcdctl(
        self,
        host: str,
        *words: str,
        user: str = "root",
        cluster: str | None = None,
        endpoint: str = "127.0.0.1",
        certificate: str | None = None,
        check: bool = True,
        feed: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """etcdctl on a machine, with the certificate of `user` in its PKI directory (or the pair `certificate`)."""
        pair = certificate or f"{PKI}/{user}"
        server = f"{PKI}/trust/{cluster or self.lab.hosts[host].cluster}.crt"
        tls = ("--cacert", server, "--cert", f"{pair}.crt", "--key", f"{pair}.key")
        # Some of its commands dial a server that refuses them for ever.
        argv = ["timeout", "10", "etcdctl", "--endpoints", f"https://{endpoint}:2379", *tls, *words]
        return self.lab.exec(host, argv, check=check, feed=feed)

    def keys(self, host: str, *prefixes: str) -> dict[str, Key]:
        """Keys below the prefixes in the etcd of this host's cluster."""
        found = {}
        for prefix in prefixes:
            answer = json.loads(self.etcdctl(host, "get", prefix, "--prefix", "-w", "json").stdout)
            for kv in answer.get("kvs", ()):
                found[decoded(kv["key"])] = Key(decoded(kv.get("value", "")), kv["create_revision"])
        return found

    def state(self, host: str) -> dict[str, Key]:
        """What this host's cluster publishes, mirrors and has dealt."""
        return self.keys(host, "cilium/state/", "cilium/cache/", "cilium/cluster-config/", "isthmus/v1/alloc/")

    def registrar_leader(self, host: str) -> tuple[str, int]:
        """The host whose registrar leads, and the revision of its term; ("", 0) while nobody leads."""
        key = self.keys(host, "isthmus/v1/leader").get("isthmus/v1/leader")
        return ("", 0) if key is None else (json.loads(key.value)["host"], key.created)

    def etcd_members(self, host: str) -> list[dict[str, Any]]:
        """`etcdctl endpoint status` of every member."""
        done = self.etcdctl(host, "endpoint", "status", "--cluster", "-w", "json", check=False)
        members: list[dict[str, Any]] = json.loads(done.stdout)
        return members

    def give_etcd_leadership(self, host: str) -> None:
        """Make the member on this host the leader of its cluster's etcd."""
        address = str(self.lab.hosts[host].address)
        members = {m["Endpoint"].split("/")[2].split(":")[0]: m["Status"] for m in self.etcd_members(host)}
        leader, own = members[address]["leader"], members[address]["header"]["member_id"]
        if leader == own:
            return
        there = next(place for place, status in members.items() if status["header"]["member_id"] == leader)
        self.etcdctl(host, "move-leader", f"{own:x}", endpoint=there)

    def etcd(self, cluster: str, verb: str) -> None:
        """Start or stop all members; not one after the other, a member alone does not become ready."""
        for host in ETCD_HOSTS[cluster]:
            self.lab.exec(host, ["systemctl", verb, "--no-block", "isthmus-etcd.service"])
        wanted = "active" if verb == "start" else "inactive"
        self.until(
            f"etcd of {cluster}: {verb}",
            lambda: all(self.unit_state(host, "isthmus-etcd") == wanted for host in ETCD_HOSTS[cluster]),
        )

    # -- machines

    def unit_state(self, host: str, unit: str) -> str:
        return self.lab.exec(host, ["systemctl", "is-active", f"{unit}.service"], check=False).stdout.strip()

    def kill_for_good(self, host: str, unit: str) -> None:
        """SIGKILL, and systemd starts it no more."""
        script = f"systemctl kill --signal=KILL {unit}.service && systemctl stop {unit}.service"
        self.lab.exec(host, ["sh", "-c", script])
        assert self.unit_state(host, unit) != "active"

    def maps(self, host: str) -> dict[str, list[str]]:
        """The maps that the agent writes, as the kernel holds them."""
        return {name: self.map(host, name) for name in CONFIGURED_MAPS}

    def map(self, host: str, name: str) -> list[str]:
        place = f"/proc/{self.lab.leader(self.lab.hosts[host])}/root/sys/fs/bpf/isthmus/v1/{name}"
        done = subprocess.run(["bpftool", "-j", "map", "dump", "pinned", place], capture_output=True, text=True)
        if done.returncode != 0:
            raise LabError(f"{host}: map {name} cannot be read: {done.stdout}{done.stderr}")
        # The order of a hash is of no meaning; the same entry is the same text.
        return sorted(json.dumps(entry.get("formatted", entry), sort_keys=True) for entry in json.loads(done.stdout))

    def address(self, host: str, workload: str) -> str:
        """A workload's own address."""
        return str(next(w["address"] for w in self.ask(host, "status")["workloads"] if w["name"] == workload))

    def service_named(self, host: str, name: str) -> dict[str, Any] | None:
        """A service as a host's agent has it in its kernel."""
        for service in self.ask(host, "services")["services"]:
            if f"{service['namespace']}/{service['name']}" == name:
                found: dict[str, Any] = service
                return found
        return None

    @contextlib.contextmanager
    def customer(self, host: str) -> Iterator[Customer]:
        """A customer on a machine that has none of its own: it has the host's address and identity."""
        self.lab.exec(host, ["systemctl", "start", "client.service"])
        try:
            self.until(
                f"{host}: client.service listens",
                lambda: self.lab.exec(host, ["test", "-S", "/run/client.sock"], check=False).returncode == 0,
                30,
            )
            yield Customer(self.lab, host)
        finally:
            with contextlib.suppress(LabError):  # the machine may be off; its client is gone with it
                self.lab.exec(host, ["systemctl", "stop", "client.service"])

    def module(self, hosts: str, name: str, arguments: Mapping[str, Any], inventory: Path = INVENTORY) -> None:
        """Run one of the artifact's modules on hosts (a pattern), as an operator's task does."""
        tool = Path(sys.executable).with_name("ansible")
        words = [str(tool), "-i", str(inventory), "-m", f"isthmus.mesh.{name}", "-a", json.dumps(arguments), hosts]
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "tests" / "lab" / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd="/", env=environment)
        assert done.returncode == 0, done.stdout + done.stderr

    @contextlib.contextmanager
    def service_of_operators(self, name: str, lost_in: str = "") -> Iterator[None]:
        """The web servers under another name, registered at run time in every cluster; gone everywhere afterwards.

        `lost_in`: a host whose etcd will have lost the definition. What is not there cannot be removed, so it is
        registered again first."""
        places = ",".join(hosts[0] for hosts in ETCD_HOSTS.values())
        service = {
            "namespace": "shop",
            "name": name,
            "ports": [{"port": 80, "target_port": 8080}],
            "backends": {"labels": {"app": "web"}},
        }
        self.module(places, "global_service", service)
        try:
            yield
        finally:
            if lost_in:
                self.module(lost_in, "global_service", service)
            self.module(places, "global_service", {"namespace": "shop", "name": name, "state": "absent"})
            self.until(
                f"shop/{name} is gone everywhere",
                lambda: not any(self.service_named(host, f"shop/{name}") for host in self.lab.hosts),
            )

    def known_everywhere(self, name: str) -> bool:
        """Whether every host has the service, with every backend in use."""
        for host in self.lab.hosts:
            service = self.service_named(host, f"shop/{name}")
            if service is None or {b["node"] for b in service["backends"] if b["used"]} != self.backends:
                return False
        return True

    # -- comparing

    def maps_changed(self, before: Mapping[str, Mapping[str, list[str]]]) -> dict[str, tuple[list[str], list[str]]]:
        """Maps that differ from what they were, by "host map": what is gone and what is new."""
        found = {}
        for host, maps in before.items():
            now = self.maps(host)
            for name in maps:
                if maps[name] != now[name]:
                    gone, new = set(maps[name]) - set(now[name]), set(now[name]) - set(maps[name])
                    found[f"{host} {name}"] = (sorted(gone), sorted(new))
        return found

    def withdrawn(self, before: Mapping[str, Mapping[str, Key]]) -> dict[str, list[str]]:
        """By host whose etcd is asked: keys that are gone, or were gone and came back."""
        found = {}
        for host, keys in before.items():
            now = self.state(host)
            lost = [name for name, key in keys.items() if name not in now or now[name].created != key.created]
            if lost:
                found[host] = sorted(lost)
        return found

    # -- measuring

    @contextlib.contextmanager
    def unnoticed(self, *customers: Customer, url: str = URL, interval: float = 0.005) -> Iterator[None]:
        """Every customer makes requests over new connections and over one kept connection all the while; none may
        fail, the kept one must stay the same, and there must be at least `COUNT` of each, however long that takes."""
        name = f"unnoticed-{uuid.uuid4().hex[:6]}"
        for customer in customers:
            for kind in ("new", "kept"):
                customer.start(f"{name}-{kind}", url, interval=interval, keep_alive=kind == "kept")
        try:
            yield
            for customer in customers:
                for kind in ("new", "kept"):
                    job = f"{name}-{kind}"
                    self.until(
                        f"{customer.host}: {COUNT} requests ({kind})",
                        lambda customer=customer, job=job: served(customer.result(job)) >= COUNT,  # type: ignore[misc]
                    )
        finally:
            results = {
                (c.host, kind): c.result(f"{name}-{kind}", stop=True) for c in customers for kind in ("new", "kept")
            }
        failed = {who: (r["failed"], r["failures"], r["changes"][-4:]) for who, r in results.items() if r["failed"]}
        assert not failed, failed
        assert {who: r["connections"] for who, r in results.items() if who[1] == "kept" and r["connections"] != 1} == {}
        for who, r in results.items():
            print(f"{' '.join(who)}: {r['ok']} ok, 0 failed, longest gap {r['longest_gap']:.2f} s")

    def timed(self, what: str, true: Callable[[], bool], figure: float, began: float) -> None:
        """Wait for a state until three times the promised seconds after `began` (this machine carries the whole
        estate); says how long it took."""
        self.until(what, true, began + 3 * figure - time.monotonic())
        print(f"{what}: {time.monotonic() - began:.1f} s (promised: {figure:g} s)")

    def converged(self) -> None:
        """Every agent has own etcd, every registrar its peers, every backend is used from everywhere."""
        hosts = tuple(self.lab.hosts)

        def all_connected() -> bool:
            return all(self.ask(host, "status")["etcd"]["connected"] for host in hosts)

        def all_peers() -> bool:
            peers = [peer for host in hosts for peer in self.ask(host, "peers")["peers"]]
            others = [p for p in peers if p["name"] in ETCD_HOSTS and p["registrar_says"] is not None]
            return len(others) >= 2 * len(hosts) and all(p["state"] == "connected" for p in others)

        self.until("every agent is connected to its etcd", all_connected)
        self.until("every peer is connected", all_peers)
        self.everywhere(self.backends, hosts)

    def put_right(self) -> None:
        """Start what a test may have left stopped."""
        for host in self.lab.hosts.values():
            self.lab.power_on(host.name)
            etcd = ["isthmus-etcd.service", "isthmus-registrar.service"]
            units = ["isthmusd.service", *host.units, *(etcd if host.name in ETCD_HOSTS[host.cluster] else ())]
            if host.name in (EDGE, ONPREM_CLIENT):
                units.append("client.service")
            self.lab.exec(host.name, ["systemctl", "start", "--no-block", *units])


def served(result: Mapping[str, Any]) -> int:
    return int(result["ok"]) + int(result["failed"])


def counters(snmp: str) -> dict[str, int]:
    """The IP counters of a kernel's /proc/net/snmp."""
    names, values = (line.split() for line in snmp.splitlines() if line.startswith("Ip:"))
    return dict(zip(names[1:], map(int, values[1:]), strict=True))


class Wire:
    """Packets on the underlay (in the router's namespace: all that goes between machines, also within a site) that
    have a mesh address outside of the tunnel. A marker after each look makes sure that nothing is still on its way
    from the kernel to the file, and that such packets are seen at all."""

    MARKERS = "10.120."  # in the captured network, and in no range of the lab: the default route takes it

    def __init__(self, estate: Estate, place: Path) -> None:
        self._estate = estate
        self._file = place / "leaks.pcap"
        self._looks = 0
        self._process = subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/{ROUTER}", "tcpdump", "-U", "-n", "-s", "128", "-i", "any"),
                *("-w", str(self._file), f"{MESH_ADDRESSES} or (arp and {MESH_ADDRESSES})"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        if not any("listening on" in line for line in self._process.stderr):
            raise AssertionError("tcpdump does not capture")

    def leaks(self) -> list[str]:
        """Every such packet until now, a line each."""
        self._looks += 1
        marker = f"{self.MARKERS}{self._looks // 250}.{self._looks % 250 + 1}"
        end = time.monotonic() + 30
        while True:
            self._estate.lab.exec(EDGE, ["ping", "-q", "-c", "1", "-W", "0.1", marker], check=False)
            lines = self._read()
            if any(marker in line for line in lines):
                return [line for line in lines if self.MARKERS not in line]
            assert time.monotonic() < end, "the capture does not show what is sent past the tunnel"

    def shows(self, address: str) -> bool:
        """Whether a packet from or to an address was seen until the last look."""
        return any(f"{address}." in line or f"{address}:" in line for line in self._read())

    def _read(self) -> list[str]:
        done = subprocess.run(["tcpdump", "-n", "-r", str(self._file)], capture_output=True, text=True, check=False)
        return done.stdout.splitlines()  # it complains of a packet that is being written; those before it are good

    def stop(self) -> None:
        self._process.terminate()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._process.wait(10)
