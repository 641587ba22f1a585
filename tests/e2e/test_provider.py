# SPDX-License-Identifier: GPL-3.0-or-later
"""A managed cluster of a provider (EKS, GKE, AKS or another) joins an estate and leaves it. No machine that builds this
project has an account with one, so these tests are for whoever has:

    make collection image
    ISTHMUS_PROVIDER_INVENTORY=$PWD/inventory.yml make pytest ARGS=tests/e2e/test_provider.py

The inventory is that of an estate that runs, and of one cluster more with `control_plane: in_cluster`, prepared as
docs/kubernetes-managed.md says, which has not joined yet. It joins, is proven and leaves again. `kubectl` is in PATH,
and the current context of `isthmus_kubeconfig` is the cluster's.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playbook import environment, play

pytestmark = [pytest.mark.slow]

GIVEN = os.environ.get("ISTHMUS_PROVIDER_INVENTORY", "")
NONE = "no cluster of a provider: ISTHMUS_PROVIDER_INVENTORY does not name an inventory with one (test_provider.py)"
CONNECTION = "isthmus.mesh.etcd_pod"
ASKED = "dict(cluster=isthmus_cluster, kubeconfig=isthmus_kubeconfig, estate=isthmus_estate)"
LEFT = "namespaces,services,clusterroles,clusterrolebindings,endpointslices"
JOINING = 1800  # seconds: a provider's volumes and load balancers take their time


@dataclass(frozen=True, slots=True)
class Managed:
    """The cluster, as the inventory has it."""

    cluster: str
    kubeconfig: str
    estate: dict[str, Any]

    def get(self, *words: str) -> Any:
        command = ["kubectl", f"--kubeconfig={os.path.expanduser(self.kubeconfig)}", "get", *words, "--output=json"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def told(tool: str, *words: str) -> str:
    command = [str(Path(sys.executable).with_name(tool)), "-i", GIVEN, *words]
    how = {**environment(), "ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=how).stdout


@pytest.fixture(scope="module")
def managed() -> Iterator[Managed]:
    """The cluster in the estate; out of it again in the end, without a trace."""
    if not GIVEN:
        pytest.skip(NONE)
    hosts = json.loads(told("ansible-inventory", "--list"))["_meta"]["hostvars"]
    (entry,) = (name for name, known in hosts.items() if known.get("ansible_connection") == CONNECTION)
    shown = told("ansible", entry, "-m", "ansible.builtin.debug", "-a", f"msg={{{{ {ASKED} | to_json | b64encode }}}}")
    made = Managed(**json.loads(base64.b64decode(json.loads(shown.partition("=>")[2])["msg"])))
    try:
        play("site", inventory=Path(GIVEN), seconds=JOINING)
        yield made
    finally:
        made.estate["clusters"][made.cluster]["state"] = "absent"
        play("site", "-e", json.dumps({"isthmus_estate": made.estate}), inventory=Path(GIVEN), seconds=JOINING)
    ours = made.get(LEFT, "--all-namespaces", "--selector=app.kubernetes.io/managed-by=isthmus")["items"]
    assert [one["metadata"]["name"] for one in ours] == []


def test_a_second_run_changes_nothing(managed: Managed) -> None:
    assert managed.cluster
    assert play("site", inventory=Path(GIVEN)).changed == {}


def test_its_etcd_is_not_in_the_internet_unless_that_was_asked_for(managed: Managed) -> None:
    """What the provider made of the annotations for an internal load balancer."""
    expose = managed.estate["clusters"][managed.cluster].get("expose") or {}
    service = managed.get("service", "isthmus-etcd-mesh", "--namespace=isthmus-system")
    ingress = service["status"]["loadBalancer"].get("ingress") or []
    assert ingress or expose.get("type", "load_balancer") != "load_balancer"
    names = [one.get("ip") or one["hostname"] for one in ingress]
    found = {ipaddress.ip_address(entry[4][0]) for name in names for entry in socket.getaddrinfo(name, 2379)}
    internal = expose.get("scope", "internal") == "internal"
    assert {address.is_global for address in found} <= {not internal}, f"{expose}: {found}"


def test_machines_and_pods_reach_each_other(managed: Managed) -> None:
    """Packets from every host of the inventory to each node and to pods there, and the agents of all its nodes."""
    nodes = managed.get("nodes", "--selector=kubernetes.io/os=linux")["items"]
    agents = managed.get("daemonset", "isthmus-agent", "--namespace=isthmus-system")["status"]
    assert agents["numberReady"] == len(nodes)
    play("verify", inventory=Path(GIVEN))
