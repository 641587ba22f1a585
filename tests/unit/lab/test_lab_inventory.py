# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab reads the same inventories as Ansible does."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_machine
import pytest
from lab_inventory import read_inventory
from lab_system import LabError

INVENTORIES = Path(__file__).resolve().parents[3] / "inventories"
KUBE = """\
all:
  vars:
    lab_cluster_k:
      kubernetes:
        api_server: https://198.18.9.11:6443
        pod_ranges: [10.250.0.0/16]
        service_range: 10.99.0.0/16
k:
  vars: {isthmus_cluster: k}
  hosts:
    k-1: {ansible_host: 198.18.9.11, isthmus_kubernetes_node: first}
    k-2: {ansible_host: 198.18.9.12, isthmus_kubernetes_node: false}
    k-3: {ansible_host: 198.18.9.13}
"""


def seen_by_ansible(inventory: Path, host: str) -> Mapping[str, Any]:
    """The estate of an inventory, its templates rendered."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ansible")), host, "-i", str(inventory), "-m", "debug"),
            *("-a", "msg={{ isthmus_estate | to_json | b64encode }}"),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", "ANSIBLE_NOCOLOR": "1"},
    )
    encoded = json.loads(done.stdout.partition("=>")[2])["msg"]
    estate: Mapping[str, Any] = json.loads(base64.b64decode(encoded))
    return estate


def test_the_hybrid_estate_is_the_machines_estate_with_kubernetes() -> None:
    machines = seen_by_ansible(INVENTORIES / "lab", "localhost")
    hybrid = seen_by_ansible(INVENTORIES / "lab_hybrid", "localhost")
    two = seen_by_ansible(INVENTORIES / "lab_hybrid_two", "kube2-1")
    assert machines["clusters"].keys() == {"onprem", "cloud", "edge"}
    assert [*hybrid["clusters"]] == [*machines["clusters"], "kube"]
    assert {*two["clusters"]} == {*hybrid["clusters"], "kube2"}
    assert hybrid["clusters"].items() >= machines["clusters"].items()
    assert hybrid["sites"].keys() == {*machines["sites"], "kube"}
    assert {key: hybrid[key] for key in machines if key not in ("clusters", "sites")} == {
        key: machines[key] for key in machines if key not in ("clusters", "sites")
    }


def test_the_lab_sees_the_machines_of_each_inventory() -> None:
    machines, hybrid, two = (read_inventory(INVENTORIES / name) for name in ("lab", "lab_hybrid", "lab_hybrid_two"))
    assert not machines.kubernetes
    assert machines.hosts.items() < hybrid.hosts.items() < two.hosts.items()
    assert {name for name, host in hybrid.hosts.items() if host.kubernetes} == {"kube-1", "kube-2", "kube-3"}
    assert [*two.kubernetes] == ["kube", "kube2"]
    kube, small = two.kubernetes["kube"], two.kubernetes["kube2"]
    assert (kube.control_plane.name, [*kube.nodes]) == ("kube-1", ["kube-2", "kube-3"])
    assert small.hosts == (small.control_plane,)
    ranges = [*kube.pod_ranges().values(), *small.pod_ranges().values()]
    assert len(ranges) == 3
    assert not any(one.overlaps(other) for one in ranges for other in ranges if one is not other)


def test_machines_of_a_cluster_that_nobody_enters_are_none_of_the_mesh() -> None:
    lab = read_inventory(INVENTORIES / "lab_in_cluster")
    managed = lab.kubernetes["managed"]
    assert managed.in_cluster
    assert [host.name for host in managed.hosts] == [*managed.nodes] == [f"managed-{n}" for n in (1, 2, 3)]
    assert "managed-api" not in lab.hosts
    assert not read_inventory(INVENTORIES / "lab_hybrid").kubernetes["kube"].in_cluster
    names = {one["metadata"]["name"] for one in json.loads(kubernetes_machine.volumes(managed))["items"]}
    assert names == {"lab", "lab-managed-1", "lab-managed-2", "lab-managed-3"}
    two = read_inventory(INVENTORIES / "lab_in_cluster_two")
    assert [name for name, one in two.kubernetes.items() if one.in_cluster] == ["managed", "managed2"]
    assert lab.hosts.items() < two.hosts.items()
    second = two.kubernetes["managed2"]
    assert second.hosts == (second.control_plane,)
    assert not second.pod_range.overlaps(managed.pod_range)


def test_nodes_and_their_names_are_as_the_inventory_says(tmp_path: Path) -> None:
    (tmp_path / "k.yml").write_text(KUBE)
    cluster = read_inventory(tmp_path).kubernetes["k"]
    assert {name: host.name for name, host in cluster.nodes.items()} == {"first": "k-1", "k-3": "k-3"}
    assert [host.name for host in cluster.hosts] == ["k-1", "k-2", "k-3"]
    assert cluster.dns == ipaddress.IPv4Address("10.99.0.10")


def test_an_api_server_that_is_no_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "k.yml").write_text(KUBE.replace("https://198.18.9.11", "https://198.18.9.99"))
    with pytest.raises(
        LabError, match=r"cluster k: no host has the address of its api_server, https://198.18.9.99:6443"
    ):
        read_inventory(tmp_path)


def test_what_a_machine_of_a_cluster_gets() -> None:
    """Who runs what, who keeps which key, who has which routes."""
    cluster = read_inventory(INVENTORIES / "lab_hybrid").kubernetes["kube"]
    names = ["ca", *kubernetes_machine.certificates(cluster)]
    pki = {f"{name}.{kind}": f"{name}.{kind}" for name in names for kind in ("crt", "key")}
    control, first, second = (kubernetes_machine.files(cluster, host, pki, "iptables") for host in cluster.hosts)
    units = {"etc/systemd/system/kubelet.service", "etc/systemd/system/kube-proxy.service"}
    assert units <= first.keys()
    assert not units & control.keys()
    assert {"etc/kubernetes/ca.key", "etc/kubernetes/sa.key"} <= control.keys()
    assert not any(path.endswith(".key") for path in (*first, *second))
    assert json.loads(first["etc/kubernetes/kube-proxy.json"][0])["mode"] == "iptables"
    routes = {text for text, _ in (machine["etc/systemd/system/pod-routes.service"] for machine in (first, second))}
    assert sorted(text.count("ip route replace 10.244.") for text in routes) == [1, 1]
    assert control["etc/systemd/system/pod-routes.service"][0].count("ip route replace 10.244.") == 2
