# SPDX-License-Identifier: GPL-3.0-or-later
"""What a scrape makes of the kernel's counts, and how packets to a node go while encryption is turned on."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import agent_mesh as mesh
import pytest
from isthmus_agent.agent import metrics, status
from isthmus_agent.agent.kernel import Reading, Tunnel
from isthmus_agent.agent.loop import Agent, Paths
from isthmus_agent.bpf.driver import BackendCount, Counters
from isthmus_agent.desired.datapath import Backend, Datapath
from isthmus_agent.desired.services import Placed, ServiceView
from isthmus_agent.kvstore.client import EtcdClient
from isthmus_agent.netlink.wireguard import PeerState
from isthmus_mesh.encryption import Stage

A, B, C = (Backend(ip_address(f"10.102.0.{number}"), 8080, 6, 2) for number in (2, 3, 4))


def view(name: str, *backends: Backend) -> ServiceView:
    placed = tuple(Placed(backend, "cloud", None, reachable=True, proven=True) for backend in backends)
    return ServiceView("shop", name, None, "", 0, True, (), placed, frozenset(backends))


class Scraped:
    """An agent, and what each scrape says of its services."""

    def __init__(self, place: Path) -> None:
        client = EtcdClient(["https://127.0.0.1:1"], "ca", "cert", "key")
        kernel: Any = SimpleNamespace(read=lambda: self.reading)
        self.agent = Agent(mesh.spec(), kernel, client, place, Paths(place / "state", place / "run"))
        self.agent.progress.applied = Datapath(1)
        self._connects = metrics.Connects()

    def connects(self, counts: dict[Backend, int], *views: ServiceView) -> dict[str, float]:
        backends = {(one.address, one.port, one.protocol): BackendCount(count, 0) for one, count in counts.items()}
        self.reading = Reading(Counters(backends, {}, ()))
        desired: Any = SimpleNamespace(views=views)
        self.agent.desired = desired
        lines = asyncio.run(metrics.render(self.agent, self._connects)).decode().splitlines()
        found = [line for line in lines if line.startswith("isthmus_service_connects_total{")]
        return {line.split('service="')[1].split('"')[0]: float(line.split()[-1]) for line in found}


def test_connections_of_a_service_only_become_more(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path)
    assert scraped.connects({A: 100, B: 5}, view("web", A, B)) == {"web": 0}, "an agent before this one counted these"
    assert scraped.connects({A: 110, B: 6}, view("web", A, B)) == {"web": 11}
    assert scraped.connects({B: 7}, view("web", B)) == {"web": 12}, "a backend goes"
    assert scraped.connects({B: 7, C: 4}, view("web", B, C)) == {"web": 16}, "another one comes"
    assert scraped.connects({A: 2, B: 7, C: 1}, view("web", A, B, C)) == {"web": 19}, "two are made anew"
    assert scraped.connects({}, view("web")) == {"web": 19}, "the last one goes"
    assert scraped.connects({}) == {}, "the service goes"


def test_connections_to_a_backend_of_two_services_count_in_each_from_when_it_has_it(tmp_path: Path) -> None:
    scraped = Scraped(tmp_path)
    assert scraped.connects({A: 1}, view("web", A)) == {"web": 0}
    assert scraped.connects({A: 4}, view("web", A)) == {"web": 3}
    assert scraped.connects({A: 4}, view("web", A), view("api", A)) == {"web": 3, "api": 0}
    assert scraped.connects({A: 6}, view("web", A), view("api", A)) == {"web": 5, "api": 2}


KEY = "key of cloud-1"
PRESENT = {"isthmus-wg0": Tunnel("kernel", {KEY: PeerState("", frozenset(), 1000, 0, 0)})}


@pytest.mark.parametrize(
    ("stage", "refused", "tunnels", "state", "reason"),
    [
        (Stage.ACCEPTS, "", {}, "plain", "WireGuard is not there"),
        (Stage.SENDS, "", PRESENT, "encrypted", None),
        (Stage.SENDS, "", {}, "closed", "WireGuard is not there"),
        (Stage.SENDS, "", {"isthmus-wg0": Tunnel("kernel", {})}, "closed", "WireGuard does not have its key yet"),
        (Stage.SENDS, "it has no key", PRESENT, "plain", "it has no key"),
        (Stage.DEMANDS, "it has no key", PRESENT, "closed", "it has no key"),
    ],
)
def test_only_what_goes_out_in_clear_is_called_plain(
    stage: Stage, refused: str, tunnels: dict[str, Tunnel], state: str, reason: str | None
) -> None:
    node = ("cloud", "cloud-1")
    section = {"key": "/etc/isthmus/pki/wireguard.key", "port": 51871, "plain_sites": [], "sites": {"cloud": "cloud"}}
    agent: Any = SimpleNamespace(
        spec=mesh.spec(wireguard=section),
        desired=SimpleNamespace(encrypted={node: refused}, second={}, stages={node: stage}, keys={node: {51871: KEY}}),
    )
    found = status.encryption_of(agent, node, tunnels, 1060.0)
    assert (found["state"], found["reason"]) == (state, reason)
