# SPDX-License-Identifier: GPL-3.0-or-later
"""A cluster for tests of the registrar: a real etcd with the users that the product makes, and registrars on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from integration.etcd_fixture import EtcdServer
from isthmus_agent.kvstore import Permission
from isthmus_agent.registrar.service import Registrar
from isthmus_mesh import keys
from isthmus_mesh.documents import NodeReport, ServiceDefinition, ServicePort, WorkloadReport
from isthmus_mesh.spec import NodeSpec

IDS = {"onprem": 1, "cloud": 2, "kube": 4}


class Cluster:
    """An etcd with the users that the product makes, and the documents that Ansible and the agents write."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name, self.number = name, IDS[name]
        self.ranges = [f"10.10{self.number}.0.0/16"]
        self.server = EtcdServer(directory / name, name=f"{name}-1")
        self.directory = directory
        self.estate_file = directory / f"{name}-estate.json"

    def __enter__(self) -> Cluster:
        self.server.__enter__()
        self.prepare()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.__exit__(None, None, None)

    def prepare(self) -> None:
        """Users and roles as docs/architecture.md gives them."""
        self.server.add_user(
            "isthmus-registrar",
            Permission("readwrite", "cilium/", prefix=True),
            Permission("read", "isthmus/v1/", prefix=True),
            Permission("readwrite", "isthmus/v1/alloc/", prefix=True),
            Permission("readwrite", "isthmus/v1/leader", prefix=False),
        )
        for peer in IDS:
            if peer != self.name:
                self.server.add_user(
                    f"remote-{peer}",
                    Permission("read", "cilium/.heartbeat", prefix=True),
                    Permission("read", "cilium/state/", prefix=True),
                    Permission("read", f"cilium/cluster-config/{self.name}", prefix=False),
                    Permission("read", f"cilium/synced/{self.name}/", prefix=True),
                    *(Permission("read", keys.cache_prefix(kind, peer), prefix=True) for kind in keys.KINDS),
                )
        self.server.enable_auth()

    def host(self, number: int) -> dict[str, Any]:
        n = self.number
        return {
            "range4": f"10.10{n}.{number}.0/28",
            "mesh4": f"10.10{n}.{number}.1",
            "underlay4": f"198.18.{n}.{10 + number}",
            "advertise4": f"198.18.{n}.{10 + number}",
            "site": self.name,
            "labels": {},
            "state": "present",
            "workloads": {
                "shop/web": {
                    "address4": f"10.10{n}.{number}.2",
                    "service_account": "default",
                    "labels": {"app": "web"},
                    "cgroup": {"unit": "web.service"},
                }
            },
        }

    def record(self, hosts: int, revision: int = 1) -> dict[str, str]:
        document = {
            "schema": 1,
            "revision": revision,
            "name": self.name,
            "id": self.number,
            "state": "present",
            "site": self.name,
            "workload_ranges": [f"10.10{self.number}.0.0/16"],
            "service_range": f"10.11{self.number}.0.0/16",
            "ca_host": "h1",
            "etcd": {
                "initial": "h1",
                "token": "t",
                "members": ["h1"],
                "client_port": 2379,
                "peer_port": 2380,
                "source": {"type": "package"},
                "quota_bytes": 2147483648,
            },
            "hosts": {f"h{number}": self.host(number) for number in range(1, hosts + 1)},
            "released": [],
        }
        roster = {
            "schema": 1,
            "revision": revision,
            "estate": "lab",
            "clusters": {self.name: {"id": self.number, "state": "present"}},
            "services": {},
        }
        return {keys.estate_cluster_key(self.name): json.dumps(document), keys.ROSTER: json.dumps(roster)}

    def node(self, number: int) -> dict[str, str]:
        host = self.host(number)
        report = NodeReport(
            f"h{number}",
            self.name,
            (("InternalIP", host["advertise4"]), ("CiliumInternalIP", host["mesh4"])),
            host["range4"],
            None,
            host["mesh4"],
            mtu=1500,
        )
        return {keys.node_report_key(f"h{number}"): report.to_json()}

    def web(self, number: int, ready: bool = True) -> dict[str, str]:
        host = self.host(number)
        address = host["workloads"]["shop/web"]["address4"]
        report = WorkloadReport(
            "web",
            "shop",
            f"h{number}",
            labels={"app": "web"},
            addresses=(address,),
            host_ip=host["advertise4"],
            services={"shop/web": ready},
        )
        return {keys.workload_key(f"h{number}", "shop", "web"): report.to_json()}

    def service(self, name: str = "web") -> dict[str, str]:
        ports = (ServicePort("http", 80, 8080),)
        definition = ServiceDefinition(name, "shop", ports, {"app": name}, is_global=True)
        return {keys.service_definition_key("shop", name): definition.to_json()}

    def put(self, *documents: dict[str, str]) -> None:
        with self.server.sync_client() as client:
            for document in documents:
                for key, value in document.items():
                    client.put(key, value)

    def put_all(self, hosts: int = 2) -> None:
        reports = [document for n in range(1, hosts + 1) for document in (self.node(n), self.web(n))]
        self.put(self.service(), *reports, self.record(hosts))

    def spec(self, host: str, *peers: Cluster) -> NodeSpec:
        return NodeSpec.from_dict(self.spec_document(host, *peers))

    def spec_document(self, host: str, *peers: Cluster) -> dict[str, Any]:
        n = self.number
        crt, key = self.server.ca.issue("isthmus-registrar")
        ca = str(self.server.ca.crt)
        listed = []
        for peer in peers:
            peer_crt, peer_key = peer.server.ca.issue(f"remote-{self.name}")
            listed.append(
                {
                    "name": peer.name,
                    "id": peer.number,
                    "workload_ranges4": peer.ranges,
                    "service_range4": f"10.11{peer.number}.0.0/16",
                    "endpoints": [peer.server.endpoint],
                    "ca": str(peer.server.ca.crt),
                    "cert": str(peer_crt),
                    "key": str(peer_key),
                }
            )
        return {
            "schema": 1,
            "estate": "lab",
            "host": host,
            "hash": "",
            "cluster": {
                "name": self.name,
                "id": n,
                "max_clusters": 255,
                "site": self.name,
                "workload_ranges4": [f"10.10{n}.0.0/16"],
                "service_range4": f"10.11{n}.0.0/16",
            },
            "node": {
                "name": host,
                "underlay4": f"198.18.{n}.11",
                "advertise4": f"198.18.{n}.11",
                "range4": f"10.10{n}.1.0/28",
                "mesh4": f"10.10{n}.1.1",
            },
            "workloads": [],
            "overlay": {"port": 8472, "mtu": None},
            "dns": {"domain": "clusterset.local"},
            "service_ranges4": [],
            "mesh_ranges4": [],
            "etcd": {"endpoints": [self.server.endpoint], "ca": ca, "cert": str(crt), "key": str(key)},
            "member": None,
            "registrar": {"cert": str(crt), "key": str(key), "peers": listed},
            "pki": {"ca": {"cluster": self.name, "host": "h1", "here": False}, "certificates": [], "trust": []},
        }

    def registrar(self, *peers: Cluster, host: str = "h1") -> Registrar:
        state = self.state_directory(host)
        return Registrar(self.spec(host, *peers), estate_file=self.estate_file, state_directory=state)

    def state_directory(self, host: str) -> Path:
        return self.directory / f"{self.name}-{host}-state"

    def lose_everything(self, token: str) -> None:
        """The machine lost its disk: an etcd without data, with `token` that may be the one of before."""
        self.server.stop()
        self.server.wipe()
        self.server.token = token
        self.server.start()
        self.prepare()


@contextlib.asynccontextmanager
async def running(*registrars: Registrar) -> AsyncIterator[None]:
    stop = asyncio.Event()
    tasks = [asyncio.create_task(registrar.run(stop)) for registrar in registrars]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        stop.set()
        await asyncio.wait(tasks, timeout=15)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], Any], what: str, deadline: float = 20.0) -> Any:
    """Poll in a thread (etcdctl blocks) until true; an error of etcdctl counts as not yet."""
    end = time.monotonic() + deadline
    last: Any = None
    while True:
        try:
            found = await asyncio.to_thread(condition)
        except RuntimeError as error:
            found, last = None, error
        if found:
            return found
        assert time.monotonic() < end, f"not within {deadline} s: {what} ({last})"
        await asyncio.sleep(0.1)
