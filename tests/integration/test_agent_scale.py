# SPDX-License-Identifier: GPL-3.0-or-later
"""What a change costs on a host of a big mesh: from documents to kernel, in a namespace of the test's own."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import agent_mesh as mesh
import pytest
from bpf.topology import CLONE_NEWNET
from isthmus_agent.agent.kernel import HostKernel
from isthmus_agent.bpf.driver import BpfDatapath
from isthmus_agent.bpf.mounts import cgroup2_root
from isthmus_agent.desired.compute import Desired, HostFacts, Memory, desired
from isthmus_agent.desired.reach import Reachability
from isthmus_agent.state.decoder import Decoder
from isthmus_mesh import keys, wire

pytestmark = pytest.mark.root

A_CLUSTER = 100  # nodes
BACKENDS = 40  # of a service, on ten nodes
FIRST = int(IPv4Address("10.128.0.0"))
UNDERLAY = int(IPv4Address("172.16.0.0"))


def _documents(nodes: int) -> dict[str, bytes]:
    """Clusters of a hundred nodes, four workloads a node, a service for every ten nodes."""
    found: dict[str, str] = {}
    for number in range(nodes):
        cid = number // A_CLUSTER + 2
        cluster = f"c{cid}"
        base, underlay = FIRST + number * 16, str(IPv4Address(UNDERLAY + number))
        found[keys.cluster_config_key(cluster)] = wire.ClusterConfig(id=cid, cached=True).to_json()
        node = wire.Node(
            name=f"n{number}",
            cluster=cluster,
            cluster_id=cid,
            addresses=(
                wire.NodeAddress("InternalIP", underlay),
                wire.NodeAddress("CiliumInternalIP", str(IPv4Address(base + 1))),
            ),
            ipv4_alloc_cidr=IPv4Network((base, 28)),
        )
        found[keys.node_key(cluster, node.name, cached=True)] = node.to_json()
        for address in range(base + 2, base + 6):
            pair = wire.IPIdentityPair(str(IPv4Address(address)), (cid << 16) + 1, underlay)
            found[keys.ip_key(pair.ip, cluster)] = pair.to_json()
    for number in range(nodes // 10):
        name, cluster = f"s{number}", f"c{number * 10 // A_CLUSTER + 2}"
        found[keys.service_definition_key("shop", name)] = replace(mesh.web_definition(), name=name).to_json()
        vip = {"ipv4": str(IPv4Address("10.111.0.1") + number), "ipv6": None, "released": None}
        found[keys.vip_key("shop", name)] = json.dumps(vip)
        found[keys.service_key(cluster, "shop", name, cached=True)] = _service(number, BACKENDS)
    return {key: value.encode() for key, value in found.items()}


def _service(number: int, count: int) -> str:
    cid = number * 10 // A_CLUSTER + 2
    addresses = [
        str(IPv4Address(FIRST + node * 16 + 2 + each))
        for node in range(number * 10, number * 10 + 10)
        for each in range(4)
    ]
    return wire.ClusterService(
        cluster=f"c{cid}",
        namespace="shop",
        name=f"s{number}",
        cluster_id=cid,
        backends={address: {"http": wire.L4Addr("TCP", 8080)} for address in addresses[:count]},
        shared=True,
    ).to_json()


@pytest.fixture
def host() -> Iterator[tuple[HostKernel, Callable[..., Any]]]:
    """A kernel of its own network namespace, cgroup and pins, and how to call it."""
    run = f"isthmus-test-{os.getpid()}-scale"
    cgroup, pins = cgroup2_root() / run, Path("/sys/fs/bpf", run)
    cgroup.mkdir()

    def enter() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")

    kernel = HostKernel(pins, cgroup)
    with ThreadPoolExecutor(1, initializer=enter) as pool:
        try:
            yield kernel, lambda function, *arguments: pool.submit(function, *arguments).result()
        finally:
            kernel.close()
            BpfDatapath(pins, cgroup).remove_all()
            cgroup.rmdir()


@pytest.mark.parametrize("nodes", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_start_takes_seconds_and_a_change_of_one_service_less(
    host: tuple[HostKernel, Callable[..., Any]], nodes: int
) -> None:
    kernel, call = host
    decoder = Decoder("onprem", 1, 255)
    spec, memory = mesh.spec(), Memory()
    took: dict[str, float] = {}

    def wanted(reach: Reachability) -> Desired:
        return desired(spec, decoder.state(), reach, HostFacts(), memory)

    began = time.monotonic()
    for key, value in _documents(nodes).items():
        assert decoder.put(key, value)
    first = wanted(Reachability())
    assert len(first.datapath.services) == nodes // 10
    assert len(first.datapath.routes) > nodes * 3
    assert call(kernel.start, first.datapath).problems == ()
    took["start"] = time.monotonic() - began

    began = time.monotonic()
    decoder.put(keys.service_key("c2", "shop", "s0", cached=True), _service(0, BACKENDS - 1).encode())
    second = wanted(Reachability())
    assert call(kernel.apply, second.datapath).changes == ("map backends", "map svc")
    took["service"] = time.monotonic() - began

    began = time.monotonic()
    third = wanted(Reachability(up=frozenset({("c2", "n1")}), down=frozenset({("c2", "n0")})))
    assert call(kernel.apply, third.datapath).changes == ("map svc",)
    took["probe"] = time.monotonic() - began

    began = time.monotonic()
    decoder.delete(keys.node_key("c4", "n299", cached=True))
    fourth = wanted(Reachability())
    assert len([words for words in call(kernel.apply, fourth.datapath).changes if "remove route" in words]) == 3
    took["node"] = time.monotonic() - began

    began = time.monotonic()
    assert call(kernel.audit, fourth.datapath) == []
    took["audit"] = time.monotonic() - began
    print(f"{nodes} nodes: " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in took.items()))
    # Three times what is wanted of a machine that does nothing else.
    assert took["start"] < 45
    assert took["service"] < 3
    assert took["probe"] < 3
    assert took["node"] < 9
