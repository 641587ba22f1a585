# SPDX-License-Identifier: GPL-3.0-or-later
"""FRR in the namespace of the lab's router, as a neighbour of the hosts of two sites: what an engineer sets there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from frr_machines import Machine
from isthmus_lab import ROUTER, ROUTER_ADDRESS, Lab

ROUTER_AS = 65000
AS = {"onprem": 65101, "cloud": 65102}
PASSWORD = "of-the-lab"  # noqa: S105


def configuration(neighbours: Mapping[str, int]) -> str:
    """What the plan prints for the router: AS numbers of hosts by their addresses."""
    lines = [f"router bgp {ROUTER_AS}", f" bgp router-id {ROUTER_ADDRESS}", " no bgp default ipv4-unicast"]
    for address, number in neighbours.items():
        lines += [f" neighbor {address} {word}" for word in (f"remote-as {number}", f"password {PASSWORD}")]
    lines.append(" address-family ipv4 unicast")
    for address in neighbours:
        words = ("activate", "prefix-list ranges in", "prefix-list ranges out")
        lines += [f"  neighbor {address} {word}" for word in words]
    lines += [" exit-address-family", "exit", "ip prefix-list ranges seq 5 permit 10.96.0.0/11 le 32"]
    return "\n".join([*lines, ""])


@contextlib.contextmanager
def router_with_bgp(lab: Lab, numbers: Mapping[str, int] | None = None) -> Iterator[Machine]:
    """Its routes go with it. `numbers`: AS numbers of its neighbours by host; None: hosts of the sites of `AS`."""
    if numbers is None:
        numbers = {host.name: AS[host.site] for host in lab.hosts.values() if host.site in AS}
    neighbours = {str(lab.host(name).address): number for name, number in numbers.items()}
    machine = Machine("router", Path(tempfile.mkdtemp(prefix="frr-", dir=lab.state)), ROUTER)
    try:
        machine.frr(configuration(neighbours), "bgpd", "bfdd")
        yield machine
    finally:
        machine.end()
