# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real `isthmusd` on Kubernetes nodes of two clusters that are native, inside WireGuard, by `wireguard-go`, or in
clear, from last-known-good."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from bpf.pods import NAMES, KubernetesNode, kubernetes_nodes, spec_document
from bpf.reaching import dial, serve
from bpf.test_pods_native import MESH, listed, publish_keys
from bpf.topology import InsideError, capture, wait_for
from integration.etcd_fixture import Ca
from integration.test_agent_native import PING
from integration.test_agent_wireguard import FIRST, PORT, Host, hold, new_key
from isthmus_agent.cli.client import ask
from isthmus_mesh.spec import spec_hash

pytestmark = pytest.mark.root

SITES = {name: name for name in NAMES.values()}


@dataclass
class Estate:
    nodes: tuple[KubernetesNode, KubernetesNode]
    hosts: list[Host]


def make(each: KubernetesNode, directory: Path, private: str, publics: dict[str, str]) -> Host:
    """Without a `private` key packets go through the tunnel, in clear."""
    cluster = NAMES[each.node.cluster_id]
    (other,) = SITES.keys() - {cluster}
    (directory / "state").mkdir(parents=True)
    ca = Ca(directory / "pki", cluster)
    crt, etcd_key = ca.issue("agent")
    document = spec_document(each.node, each.range)
    if private:
        key = directory / "wireguard.key"
        key.touch(0o600)
        key.write_text(private + "\n")
        document["wireguard"] = {"key": str(key), "port": PORT, "plain_sites": [cluster], "sites": SITES}
        document["native"] = {"sites": SITES, "stages": {other: "demands"}}
        publish_keys(each, publics)
    # Nothing listens there: no etcd in this test.
    document["etcd"] = {
        "endpoints": ["https://127.0.0.1:1"],
        "ca": str(ca.crt),
        "cert": str(crt),
        "key": str(etcd_key),
    }
    # As the tests' cgroup of the workload is not below a unit.
    document["workloads"][0]["cgroup"] = {"path": "web"}
    document["hash"] = spec_hash(document)
    (directory / "node.json").write_text(json.dumps(document))
    host = hold(each.node, cluster, directory, private)
    host.publish(each.documents)
    return host


@contextlib.contextmanager
def made(tmp_path: Path, pairs: dict[str, tuple[str, str]]) -> Iterator[Estate]:
    """With the keys of each cluster's node, private and public."""
    hosts: list[Host] = []
    with kubernetes_nodes(load=False) as nodes:
        publics = {each.name: pairs[cluster][1] for each, cluster in zip(nodes, SITES, strict=True)}
        try:
            for each, cluster in zip(nodes, SITES, strict=True):
                hosts.append(make(each, tmp_path / cluster, pairs[cluster][0], publics))
                if pairs[cluster][0]:
                    hosts[-1].start_wireguard()
                hosts[-1].daemon.start()
            serve(nodes)
            yield Estate(nodes, hosts)
        finally:
            for host in hosts:
                host.close()


@pytest.fixture
def estate(tmp_path: Path) -> Iterator[Estate]:
    with made(tmp_path, {cluster: new_key() for cluster in SITES}) as found:
        yield found


@pytest.fixture
def clear(tmp_path: Path) -> Iterator[Estate]:
    with made(tmp_path, dict.fromkeys(SITES, ("", ""))) as found:
        yield found


def every_way(estate: Estate) -> None:
    """Pods and workloads of each node to those of the other, with their own addresses."""
    for near, far in (estate.nodes, estate.nodes[::-1]):
        client, pod, name = near.process(near.pods[0]), near.pods[0].address, far.node.name
        assert dial(client, far.pods[0].address, 8080) == f"{name}-pod0 {pod}"
        assert dial(client, far.node.workload, 9000) == f"{name}-web {pod}"
        assert dial(client, far.node.underlay, 9000) == f"{name}-underlay {pod}"
        assert dial(near.node.process("web"), far.pods[1].address, 8080) == f"{name}-pod1 {near.node.workload}"


def test_pods_come_to_native_in_clear_and_back_and_no_connection_is_lost(clear: Estate, tmp_path: Path) -> None:
    left, right = clear.nodes
    a, b = clear.hosts
    pod = left.process(left.pods[0])
    olds = [
        (pod, right.pods[0].address, 8080),
        (pod, right.node.underlay, 9000),
        (right.node.process("web"), left.pods[1].address, 8080),
    ]

    def go_on(when: object) -> None:
        for client, address, _port in olds:
            assert client.do("old.sendall(b'x' * 5000 + b'?'); result = line(old)"), (address, when)
        every_way(clear)

    def ways() -> list[tuple[str, int]]:
        return [
            (one["routing"]["way"], one["routing"]["mtu"])
            for host in clear.hosts
            for one in host.daemon.status()["nodes"]
            if one["cluster"] != host.cluster
        ]

    for client, address, port in olds:
        client.do(f"old = socket.create_connection(('{address}', {port}), 5); old.settimeout(10); result = line(old)")
    go_on("before")
    probe = left.node.process()
    left.node.sysctl("net.ipv4.ping_group_range", "0 2147483647")
    probe.do(PING + "\nresult = 1")
    for word in ("accepts", "sends", "demands"):
        for host in (a, b):
            host.native(word)
            go_on((word, host.cluster))
        if word == "accepts":
            file = tmp_path / "proof.pcap"
            with capture(left.node, file):
                # As verify proves the way before anything is sent by it.
                marked = f"ping('{left.node.mesh}', '{right.pods[0].address}', 1500, 0x4e)"
                assert probe.do(f"result = {marked}") is True
            assert len(listed(file, f"icmp and dst host {right.pods[0].address}")) == 1
    assert ways() == [("native", 1500)] * 2
    file = tmp_path / "wire.pcap"
    with capture(left.node, file):
        go_on("native")
        for how in (signal.SIGKILL, signal.SIGTERM):
            a.daemon.stop(how)
            go_on("no agent")
            a.daemon.start()
            go_on("an agent again")
        a.run("nft", "flush", "ruleset")
        left.cni()
        wait_for(lambda: "table ip isthmus" in a.run("nft", "list", "tables"), "our table is back", 5)
        for table in ("main", "730", "731"):
            a.run("ip", "route", "flush", "table", table, "proto", "73")
        wait_for(lambda: right.range in a.run("ip", "route"), "our routes are back", 5)
        go_on("what others took is back")
    assert listed(file, "udp port 8472") == []
    assert len(listed(file, f"net {left.range}")) > 50
    for host in clear.hosts:
        assert ask(host.daemon.socket, "/v1/audit")["problems"] == []
    for word in ("sends", "accepts", "plain"):
        for host in (b, a):
            host.native(word)
            go_on((word, host.cluster))
    assert {way for way, _mtu in ways()} == {"tunnel"}
    for host in clear.hosts:
        assert not any(host.daemon.status()["datapath"]["drops"].values()), host.cluster


def test_a_pod_is_proven_to_be_reached_inside_wireguard_before_packets_go_so(estate: Estate, tmp_path: Path) -> None:
    """What forwards to pods may let in less than what is for the node itself."""
    left, right = estate.nodes
    a, b = estate.hosts
    for host in (a, b):
        host.native("accepts")
    wait_for(lambda: a.encryption()["state"] == b.encryption()["state"] == "encrypted", "there are sessions")
    left.node.sysctl("net.ipv4.ping_group_range", "0 2147483647")
    probe = left.node.process()
    probe.do(PING + "\nresult = 1")
    pod = right.pods[0].address

    def reached(address: str, size: int, mark: int = 0) -> object:
        return probe.do(f"result = ping('{left.node.mesh}', '{address}', {size}, {mark})")

    file = tmp_path / "wire.pcap"
    with capture(left.node, file):
        assert reached(right.node.mesh, 1420, 0x4E) is True
        assert reached(pod, 1420, 0x4E) is True
        assert "too long" in str(reached(pod, 1420)), "packets still go through the tunnel"
        b.run("nft", "add table ip filter; add chain ip filter on { type filter hook forward priority 0; }")
        b.run("nft", f"add rule ip filter on iifname {FIRST} ip daddr {pod} drop")
        assert reached(right.node.mesh, 1420, 0x4E) is True
        assert "timed out" in str(reached(pod, 1420, 0x4E))
        assert reached(pod, 1370) is True
    assert listed(file, *MESH) == []


def test_pods_are_native_inside_wireguard_whatever_restarts(estate: Estate, tmp_path: Path) -> None:
    left, right = estate.nodes
    a, b = estate.hosts
    client, back = left.process(left.pods[0]), right.process(right.pods[0])

    def both_ways() -> None:
        pod, far = left.pods[0].address, right.pods[0].address
        assert dial(client, far, 8080) == f"b-pod0 {pod}"
        assert dial(client, right.node.workload, 9000) == f"b-web {pod}"
        assert dial(back, left.node.workload, 9000) == f"a-web {far}"
        assert dial(back, left.node.underlay, 9000) == f"a-underlay {far}"

    file = tmp_path / "wire.pcap"
    with capture(left.node, file):
        wait_for(lambda: a.encryption()["state"] == b.encryption()["state"] == "encrypted", "there are sessions")
        both_ways()
        for host in estate.hosts:
            (far,) = [one for one in host.daemon.status()["nodes"] if one["cluster"] != host.cluster]
            assert (far["routing"]["way"], far["routing"]["mtu"]) == ("native", 1420)
            assert ask(host.daemon.socket, "/v1/audit")["problems"] == []
        assert a.daemon.status()["kubernetes"]["pods"] == 2
        client.do(f"old = socket.create_connection(('{right.pods[0].address}', 8080), 5); result = line(old)")
        for how in (signal.SIGKILL, signal.SIGTERM):
            a.daemon.stop(how)
            both_ways()
            a.daemon.start()
            assert client.do("old.sendall(b'x?'); result = line(old)")
        a.run("nft", "flush", "ruleset")
        left.cni()
        wait_for(lambda: "table ip isthmus" in a.run("nft", "list", "tables"), "our table is back", 5)
        both_ways()
        a.kill_wireguard()
        for address, port in ((right.pods[0].address, 8080), (right.node.underlay, 9000)):
            with pytest.raises(InsideError):  # nor masqueraded by the CNI
                dial(client, address, port)
        a.start_wireguard(FIRST)
        wait_for(lambda: a.encryption()["state"] == "encrypted", "there is a session again")
        both_ways()
    assert listed(file, *MESH) == []
