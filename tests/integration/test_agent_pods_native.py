# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real `isthmusd` on Kubernetes nodes of two clusters that are native inside WireGuard, by `wireguard-go`, from
last-known-good."""

from __future__ import annotations

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
    cluster = NAMES[each.node.cluster_id]
    (other,) = SITES.keys() - {cluster}
    (directory / "state").mkdir(parents=True)
    key = directory / "wireguard.key"
    key.touch(0o600)
    key.write_text(private + "\n")
    ca = Ca(directory / "pki", cluster)
    crt, etcd_key = ca.issue("agent")
    document = spec_document(each.node, each.range)
    document["wireguard"] = {"key": str(key), "port": PORT, "plain_sites": [cluster], "sites": SITES}
    document["native"] = {"sites": SITES, "stages": {other: "demands"}}
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
    publish_keys(each, publics)
    host = hold(each.node, cluster, directory, private)
    host.publish(each.documents)
    return host


@pytest.fixture
def estate(tmp_path: Path) -> Iterator[Estate]:
    pairs = {cluster: new_key() for cluster in SITES}
    hosts: list[Host] = []
    with kubernetes_nodes(load=False) as nodes:
        publics = {each.name: pairs[cluster][1] for each, cluster in zip(nodes, SITES, strict=True)}
        try:
            for each, cluster in zip(nodes, SITES, strict=True):
                hosts.append(make(each, tmp_path / cluster, pairs[cluster][0], publics))
                hosts[-1].start_wireguard()
                hosts[-1].daemon.start()
            serve(nodes)
            yield Estate(nodes, hosts)
        finally:
            for host in hosts:
                host.close()


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
        with pytest.raises(InsideError):
            dial(client, right.pods[0].address, 8080)
        a.start_wireguard(FIRST)
        wait_for(lambda: a.encryption()["state"] == "encrypted", "there is a session again")
        both_ways()
    assert listed(file, *MESH) == []
