# SPDX-License-Identifier: GPL-3.0-or-later
"""A real `isthmusd` on a Kubernetes node, in namespaces, from last-known-good: neither etcd nor the Kubernetes API is
anywhere, and pods reach the mesh with their own addresses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.pods import check_pods
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import Verifier
from bpf.pods import CLUSTER_IP, KubernetesNode, Pod, kubernetes_nodes, spec_document
from bpf.topology import Inside, wait_for
from integration.etcd_fixture import Ca
from integration.test_agent_kernel import Daemon
from isthmus_agent.netlink import namespaces
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


class Module:
    """What the verifier uses of an AnsibleModule here."""

    check_mode = False

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params


@pytest.fixture
def namespaces_of_pods(estate: Estate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The left node's, where its container runtime would have them; one file is none yet."""
    place = tmp_path / "netns"
    place.mkdir()
    (place / "being-made").touch()
    for number, pod in enumerate(estate.left.pods):
        (place / f"cni-{number}").touch()
        source = f"/proc/{os.getpid()}/fd/{pod.netns}"
        subprocess.run(["mount", "--bind", source, place / f"cni-{number}"], check=True)
    monkeypatch.setattr(namespaces, "paths", lambda: sorted(place.iterdir()))
    monkeypatch.setattr(Verifier, "SOCKET", estate.daemon.socket)
    monkeypatch.setattr(Verifier, "PAUSE", 0.1)
    yield
    for mounted in place.glob("cni-*"):
        subprocess.run(["umount", mounted], check=True)


def in_pod(pod: Pod, *words: str) -> None:
    pod.pool.submit(subprocess.run, words, check=True).result()


def found_by_verify(estate: Estate) -> tuple[list[str], int]:
    """What it finds wrong of pods on the left node, and how many facts it proves."""
    left, right = estate.left, estate.right
    hosts = [{"name": "cloud-1", "cluster": "cloud", "mesh4": right.node.mesh}]
    spec = spec_document(left.node, left.range)
    verifier = Verifier(Module({"spec": spec, "record": {}, "services": [], "hosts": hosts, "timeout": 1}))
    left.node.call(check_pods, verifier)
    return verifier.problems, verifier.proofs["pods"]


@pytest.mark.usefixtures("namespaces_of_pods")
def test_verify_proves_what_pods_reach_and_names_what_differs(estate: Estate) -> None:
    left = estate.left
    # A pod of the other node for this host; two pods published and there; from one of them the other node and its pods.
    assert found_by_verify(estate) == ([], 5)

    old, new = left.pods[1].address, left.range.replace("0/24", "77")
    in_pod(left.pods[1], "ip", "address", "add", f"{new}/32", "dev", "eth0")
    in_pod(left.pods[1], "ip", "address", "delete", f"{old}/24", "dev", "eth0")
    (stale, unknown), proven = found_by_verify(estate)
    assert stale.startswith(f"pods: {old} (shop/api) is published, and no pod of this node has it; ")
    assert unknown.startswith(f"pods: {new} is a pod's on this node and is not published, so the pod is cut off; ")
    assert proven == 4


@pytest.mark.usefixtures("namespaces_of_pods")
@pytest.mark.parametrize("away", ["the other node's pods", "this node's pods"])
def test_verify_names_pods_that_do_not_answer_and_what_pods_do_not_reach(estate: Estate, away: str) -> None:
    left, right = estate.left, estate.right
    others = ", ".join(pod.address for pod in right.pods)
    both = ", ".join(pod.address for pod in left.pods)
    drop = "add table ip f\nadd chain ip f FORWARD { type filter hook forward priority 0; policy drop; }"
    if away == "the other node's pods":
        right.nft(drop)
        (from_host, from_pods), proven = found_by_verify(estate)
        assert from_host.startswith(f"pods: a pod on cloud-1 ({others}) does not answer this host: no answer to 3 ")
        assert from_pods.startswith(f"pods: a pod on cloud-1 ({others}) does not answer pods of this node ({both}); ")
        assert proven == 3
    else:
        left.nft(drop)
        (host, pod), proven = found_by_verify(estate)
        assert host.startswith(f"pods: cloud-1 ({right.node.mesh}) does not answer pods of this node ({both}); ")
        assert pod.startswith(f"pods: a pod on cloud-1 ({others}) does not answer pods of this node ({both}); ")
        assert proven == 3


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
