# SPDX-License-Identifier: GPL-3.0-or-later
"""A real `isthmusd` on a Kubernetes node, in namespaces, from last-known-good: neither etcd nor the Kubernetes API is
anywhere, and pods reach the mesh with their own addresses."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from bpf.pods import CLUSTER_IP, KubernetesNode, kubernetes_nodes, spec_document
from bpf.topology import Inside, wait_for
from integration.etcd_fixture import Ca
from integration.test_agent_kernel import Daemon
from isthmus_agent.state.lastgood import LastGood

pytestmark = pytest.mark.root


@dataclass
class Estate:
    left: KubernetesNode
    right: KubernetesNode
    daemon: Daemon
    client: Inside  # in the first pod of left

    def asks(self, address: str, port: int) -> str:
        return str(
            self.client.do(f"s = socket.create_connection(('{address}', {port}), 5); result = line(s); s.close()")
        )


@pytest.fixture
def estate(tmp_path: Path) -> Iterator[Estate]:
    with kubernetes_nodes(load=False) as (left, right):
        right.node.datapath = right.wanted().datapath
        right.node.load()
        right.process(right.pods[0]).do(f"serve_tcp('b-pod', '{right.pods[0].address}', 8080)")
        left.process(left.pods[0]).do(f"serve_tcp('a-pod', '{left.pods[0].address}', 8080)")
        right.node.process("web").do(f"serve_tcp('b-web', '{right.node.workload}', 9000)")
        directory = tmp_path / "a"
        (directory / "state").mkdir(parents=True)
        (directory / "run").mkdir()
        ca = Ca(tmp_path / "pki", "onprem")
        crt, key = ca.issue("agent")
        document = spec_document(left.node, left.range)
        # Nothing listens there: no etcd in this test.
        endpoints = ["https://127.0.0.1:1"]
        document["etcd"] = {"endpoints": endpoints, "ca": str(ca.crt), "cert": str(crt), "key": str(key)}
        # As the tests' cgroup of the workload is not below a unit.
        document["workloads"][0]["cgroup"] = {"path": "web"}
        (directory / "node.json").write_text(json.dumps(document))
        last = LastGood("onprem", "2026-01-01T00:00:00Z", left.documents)
        (directory / "state" / "last-known-good.json").write_text(last.to_json())
        daemon = Daemon(left.node, directory)
        try:
            daemon.start()
            yield Estate(left, right, daemon, left.process(left.pods[0]))
        finally:
            daemon.stop()


def test_pods_are_in_the_mesh_without_etcd_and_kubernetes(estate: Estate) -> None:
    left, right = estate.left, estate.right
    document = estate.daemon.status()
    assert document["kubernetes"] == {
        "node": "onprem-1",
        "pods": 2,
        "untranslated": 0,
        "ranges": [left.range],
        "filtered": 0,
    }
    pod = left.pods[0].address
    assert estate.asks(right.node.workload, 9000) == f"b-web {pod}"
    assert {estate.asks(CLUSTER_IP, 80).split()[0] for _ in range(30)} == {"a-pod", "b-pod"}
    # And while the agent is dead, and after it came back.
    estate.daemon.stop(signal.SIGKILL)
    assert estate.asks(right.node.workload, 9000) == f"b-web {pod}"
    estate.daemon.start()
    assert estate.asks(right.node.workload, 9000) == f"b-web {pod}"


def test_a_firewall_that_flushes_or_drops_is_mended_or_named(estate: Estate) -> None:
    left, right = estate.left, estate.right
    pod = left.pods[0].address
    left.nft("flush ruleset")
    left.cni()
    wait_for(lambda: estate.asks(right.node.workload, 9000) == f"b-web {pod}", "the source is kept again")
    assert estate.daemon.status()["datapath"]["repaired"] == 1

    left.nft("add table ip filter\nadd chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
    estate.client.do(
        f"u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.sendto(b'x', ('{right.node.workload}', 9000))"
    )

    def told() -> list[str]:
        return [words for words in estate.daemon.status()["warnings"] if "dropped by another filter" in words]

    assert "(1, the last a short time ago)" in wait_for(told, "the drop is told")[0]
    left.nft("delete table ip filter")
    assert estate.asks(right.node.workload, 9000) == f"b-web {pod}"


def test_all_of_ours_goes_and_what_others_have_stays(estate: Estate) -> None:
    left = estate.left
    estate.daemon.stop()
    from isthmus_agent import netlink

    def ruleset() -> str:
        return subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True).stdout

    assert "table ip isthmus" in left.node.call(ruleset)
    removed = left.node.call(netlink.remove_network)
    assert "nft table ip isthmus" in removed
    assert f"rule 731: from {left.range} lookup 731" in removed
    assert f"route throw {left.range} table 730" in removed
    assert left.node.call(ruleset).split("\n") == ["table ip nat", "table ip kube-proxy", ""]
