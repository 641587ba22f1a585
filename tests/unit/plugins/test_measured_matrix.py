# SPDX-License-Identifier: GPL-3.0-or-later
"""What `preflight` measured, in the matrix of sites."""

from __future__ import annotations

from typing import Any

from ansible_collections.isthmus.mesh.plugins.filter.measured_matrix import measured_matrix
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import matrix
from unit.mesh import estates


def host(name: str, **found: Any) -> dict[str, Any]:
    return {"inventory_hostname": name, "__preflight_result": found}


def test_of_each_site_the_host_counts_that_carries_least() -> None:
    found = estates.planned(estates.model())
    plan = {"sites": found.sites, "record": found.record}
    seen = [
        host("o1", underlay_mtu=1500),
        host("o2", underlay_mtu=1420),
        host("o3", underlay_mtu=None),
        host("c1", underlay_mtu=9000),
        host("stranger", underlay_mtu=600),
        {"inventory_hostname": "silent"},
    ]
    between, within = measured_matrix(plan, seen)
    assert "MTU 1370 inside, 1420 outside (the least that was measured, on o2). Open" in between
    assert "MTU 1370 inside, 1420 outside (the least that was measured, on o2). Open" in within
    assert measured_matrix(plan, [{"inventory_hostname": "o1"}]) == matrix.lines(found.sites)
