# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Name, cluster and mesh address of the planned hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: mesh_hosts
short_description: Name, cluster and mesh address of the planned hosts
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Takes what M(isthmus.mesh.verify) needs of the other hosts out of the plan.
options:
  _input:
    description: The C(specs) that M(isthmus.mesh.plan) returns.
    type: dict
    required: true
  silent:
    description: Hosts to leave out, because they cannot be reached now.
    type: list
    elements: str
    default: []
  records:
    description:
      - Copies of the estate record, as M(isthmus.mesh.estate_record) gives them, of which those of clusters with
        C(control_plane=in_cluster) have the nodes too.
    type: list
    elements: dict
    default: []
"""

EXAMPLES = r"""
- name: Show the mesh addresses
  ansible.builtin.debug:
    msg: "{{ __plan_result.specs | isthmus.mesh.mesh_hosts }}"
"""

RETURN = r"""
_value:
  description: Dictionaries with C(name), C(cluster) and C(mesh4).
  type: list
  elements: dict
"""


def mesh_hosts(specs, silent=(), records=()):
    """In the order of the names, hosts of the inventory first."""
    hosts = [
        {"name": name, "cluster": spec["cluster"]["name"], "mesh4": spec["node"]["mesh4"]}
        for name, spec in sorted(specs.items())
        if name not in silent
    ]
    return hosts + [
        {"name": name, "cluster": copy["cluster"], "mesh4": mesh4}
        for copy in records
        for name, mesh4 in sorted(copy.get("nodes", {}).items())
    ]


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"mesh_hosts": mesh_hosts}
