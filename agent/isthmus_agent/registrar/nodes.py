# SPDX-License-Identifier: GPL-3.0-or-later
"""The nodes of a cluster whose control plane is in it: Kubernetes says which there are, the registrar gives each its
range of the mesh. Pure: no IO, no clock.

Elsewhere the record lists the hosts. Nodes of a managed cluster come and go without a run of Ansible, so there hosts
are made of Node objects, in the record's shape; all else is published as everywhere. A node that Kubernetes does not
have any more leaves as a host does that the record lost, and its range is kept back for `QUARANTINE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from isthmus_mesh import keys
from isthmus_mesh.addressing import free_subnets
from isthmus_mesh.documents import DocumentError, NodeAllocation

from .dealing import Allocation, Dealer
from .kubernetes.catalog import Catalog
from .publish import Problem


@dataclass(frozen=True, slots=True)
class Dealt:
    """`hosts` as a cluster's document of the record has them; `keys` are all that `keys.ALLOC_NODES_PREFIX` holds."""

    hosts: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, str]
    problems: tuple[Problem, ...]


def deal_nodes(
    record: Mapping[str, Any],
    catalog: Catalog,
    previous: Mapping[str, str],
    now: str,
    reserved: Sequence[IPv4Network],
) -> Dealt:
    """`record` is the cluster's document, `previous` what is published and allocated now, by key. `reserved` are the
    ranges of the mesh, in which no machine's own address lies. While not everything was read of Kubernetes the nodes
    are those that have a range."""
    problems: list[Problem] = []

    def problem(key: str, reason: str) -> None:
        problems.append(Problem(key, reason))

    known = _allocations(previous, problem)
    if not catalog.synced:
        there = {name: entry for name, entry in known.items() if entry.released is None}
        return Dealt(
            {name: _host(name, entry, record) for name, entry in sorted(there.items())},
            {key: value for key, value in previous.items() if key.startswith(keys.ALLOC_NODES_PREFIX)},
            tuple(problems),
        )
    taken: dict[int, Allocation] = {}
    networks: dict[int, IPv4Network] = {}
    for name, entry in sorted(known.items(), key=lambda one: (one[1].released is not None, one[0])):
        network = IPv4Network(entry.range4)
        if clash := next((other for other in networks.values() if other.overlaps(network)), None):
            problem(keys.alloc_node_key(name), f"{network} overlaps {clash}, another node's; a new range is dealt")
            continue
        number = int(network.network_address)
        networks[number] = network
        taken[number] = Allocation(name, entry.created, entry.released)
    supply = free_subnets(map(IPv4Network, record["workload_ranges"]), record["node_prefix"], networks.values())
    pool = (int(network.network_address) for network in supply)
    dealer = Dealer(taken, pool, keys.ALLOC_NODES_PREFIX, "range for a node", now, problem, 0)
    addresses = _addresses(catalog, reserved, problem)
    dealer.settle(dict.fromkeys(addresses, ""))
    found: dict[str, NodeAllocation] = {}
    for number, allocation in dealer.taken.items():
        network = networks.get(number) or IPv4Network((number, record["node_prefix"]))
        before = known.get(allocation.owner)
        found[allocation.owner] = NodeAllocation(
            range4=str(network),
            mesh4=str(network.network_address + 1),
            underlay4=addresses.get(allocation.owner, "" if before is None else before.underlay4),
            created=allocation.created,
            released=allocation.released,
        )
    return Dealt(
        {name: _host(name, found[name], record) for name in sorted(addresses.keys() & found.keys())},
        {keys.alloc_node_key(name): entry.to_json() for name, entry in sorted(found.items())},
        tuple(problems),
    )


def _allocations(previous: Mapping[str, str], problem: Any) -> dict[str, NodeAllocation]:
    found = {}
    for key, value in previous.items():
        name = keys.parse_alloc_node_key(key)
        if name is None:
            continue
        try:
            found[name] = NodeAllocation.from_json(value)
        except DocumentError as error:
            problem(key, f"{error}; a new range is dealt")
    return found


def _addresses(catalog: Catalog, reserved: Sequence[IPv4Network], problem: Any) -> dict[str, str]:
    """The underlay address of each node that can be in the mesh."""
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, facts in sorted(catalog.nodes().items()):
        where = f"kubernetes nodes {name}"
        address = next(iter(facts.addresses), None)
        if address is None:
            problem(where, "it has no InternalIP of IPv4, so nobody can reach it")
        elif owners.setdefault(address, name) != name:
            problem(where, f"its InternalIP {address} is also that of node {owners[address]}")
        elif inside := next((network for network in reserved if IPv4Address(address) in network), None):
            problem(where, f"its InternalIP {address} lies in {inside}, a range of the mesh")
        else:
            found[name] = address
    return found


def _host(name: str, entry: NodeAllocation, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "range4": entry.range4,
        "mesh4": entry.mesh4,
        "underlay4": entry.underlay4,
        "advertise4": entry.underlay4,
        "site": record["site"],
        "labels": {},
        "state": "present",
        "workloads": {},
        "kubernetes_node": name,
    }
