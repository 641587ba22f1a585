# SPDX-License-Identifier: GPL-3.0-or-later
"""`isthmusd` of the version in PYTHONPATH with a kernel that only remembers: a process of its own, so that it may be
of another version than the test's. Arguments: the spec, the root of the cgroups, the directory for all that it writes.

Each datapath that is applied is a line in `applied` there: the backends' addresses by service address, as JSON.
"""

import asyncio
import json
import sys
from pathlib import Path

from isthmus_agent.agent.kernel import Applied, Reading
from isthmus_agent.agent.loop import Agent, Paths
from isthmus_agent.agent.main import installed_version, serve
from isthmus_agent.bpf.driver import Counters
from isthmus_agent.kvstore.client import EtcdClient
from isthmus_mesh.spec import NodeSpec


class Kernel:
    def __init__(self, log: Path) -> None:
        self.log = log

    def is_fresh(self) -> bool:
        return not self.log.exists()

    def held(self):
        return {}

    def underlay_mtu(self, address) -> int:
        return 1500

    def start(self, datapath) -> Applied:
        return self.apply(datapath)

    def apply(self, datapath) -> Applied:
        services = {
            f"{frontend.address}:{frontend.port}": sorted(str(backend.address) for backend in service.backends)
            for frontend, service in datapath.services.items()
        }
        with self.log.open("a") as file:
            file.write(json.dumps(services) + "\n")
        return Applied(("map svc",))

    def audit(self, datapath) -> list[str]:
        return []

    def steps(self) -> int:
        return 0

    def read(self) -> Reading:
        return Reading(Counters({}, {}, ()))

    def mend_filters(self, settled=True):
        return (), 0

    def destroy(self, backends) -> int:
        return len(backends)

    def close(self) -> None:
        pass


async def run(spec: NodeSpec, cgroups: Path, place: Path) -> None:
    client = EtcdClient(spec.etcd.endpoints, spec.etcd.ca, spec.etcd.cert, spec.etcd.key)
    paths = Paths(place / "state", place / "run")
    kernel = Kernel(place / "applied")
    agent = Agent(spec, kernel, client, cgroups, paths, boot_id="boot", version=installed_version(), probe=False)
    await serve(agent, None)


asyncio.run(run(NodeSpec.from_json(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), Path(sys.argv[3])))
