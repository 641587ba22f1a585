# SPDX-License-Identifier: BSD-2-Clause
"""Pods of Kubernetes: those of other nodes answer, and those of this one are published and reach what they should."""

from __future__ import annotations

import functools
import ipaddress
import time
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.verify.echoes import unanswered
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import Verifier

if TYPE_CHECKING:
    from collections.abc import Mapping

PODS = "see `isthmus status` on both hosts, and whether a network policy forbids echoes"
PROBES = 3  # pods that are entered, one after the other, until everything was reached


def check_pods(verifier: Verifier) -> None:
    """Pods of every other node answer this host. On a node what is published of its pods is what is there, and one
    of them, whose network namespace is entered for it, reaches every host and the pods of other clusters. Nothing
    is made, so nothing is left behind."""
    agent = verifier.bundle("isthmus_agent.cli.client")
    told = agent.ask(verifier.SOCKET, "/v1/pods")
    asked = {(host["cluster"], host["name"]) for host in verifier.hosts}
    others = [one for one in told["others"] if (one["cluster"], one["node"]) in asked]
    targets = {f"a pod on {one['node']} ({', '.join(one['addresses'])})": one["addresses"] for one in others}
    silent = unanswered(verifier.spec["node"]["mesh4"], targets, verifier.timeout / 3)
    for target in targets:
        verifier.check(
            "pods", target not in silent, f"{target} does not answer this host: {silent.get(target)}; {PODS}"
        )
    if told["pods"] is None:
        return
    namespaces = verifier.bundle("isthmus_agent.netlink.namespaces")
    there = _check_pods_here(verifier, agent, namespaces, told)
    targets = {f"{host['name']} ({host['mesh4']})": [host["mesh4"]] for host in verifier.hosts}
    for one in others:
        if one["cluster"] != verifier.cluster:
            targets[f"a pod on {one['node']} ({', '.join(one['addresses'])})"] = one["addresses"]
    probes = [(one["address"], there[one["address"]]) for one in told["pods"] if one["address"] in there][:PROBES]
    if not probes:
        verifier.warnings.append(f"no pod runs on {verifier.spec['host']}, so none was asked what it reaches")
        return
    left = targets
    for address, path in probes:
        silent = namespaces.inside(path, functools.partial(unanswered, address, left, verifier.timeout / 3))
        # None: the pod has ended meanwhile.
        left = {target: left[target] for target in (left if silent is None else silent)}
    for target in targets:
        words = f"{target} does not answer pods of this node ({', '.join(address for address, _path in probes)})"
        verifier.check("pods", target not in left, f"{words}; {PODS}")


def _check_pods_here(verifier: Verifier, agent: Any, namespaces: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    """Where each pod's address is: address -> network namespace. Pods come and go, so that a difference counts when
    it is there twice."""
    differences = None
    while True:
        there = {
            address: path
            for path in namespaces.paths()
            for address in namespaces.inside(path, namespaces.addresses_here) or ()
        }
        ranges = [ipaddress.ip_network(text) for text in told["ranges"]]
        published = {one["address"]: one["name"] for one in told["pods"]}
        real = {address for address in there if any(ipaddress.ip_address(address) in each for each in ranges)}
        found = {
            address: f"{address} ({published[address]}) is published, and no pod of this node has it"
            for address in published.keys() - real
        }
        for address in real - published.keys():
            found[address] = f"{address} is a pod's on this node and is not published, so the pod is cut off"
        again = differences is not None
        differences = found if not again else {address: found[address] for address in found if address in differences}
        if again or not differences:
            break
        time.sleep(verifier.PAUSE)
        told = agent.ask(verifier.SOCKET, "/v1/pods")
    for address in sorted(published.keys() | differences.keys()):
        words = f"{differences.get(address)}; see `isthmus peers` here, and `journalctl -u isthmus-registrar` on "
        verifier.check("pods", address not in differences, f"{words}the etcd hosts of {verifier.cluster}")
    return there
