# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The matrix of sites with what preflight measured."""

from __future__ import annotations

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import matrix

DOCUMENTATION = r"""
---
name: measured_matrix
short_description: The matrix of sites with what preflight measured
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Takes from a plan the matrix of sites in words, with the MTU of the underlay that M(isthmus.mesh.preflight) found on
    the hosts instead of 1500 bytes.
options:
  _input:
    description: What M(isthmus.mesh.plan) returned.
    type: dict
    required: true
  hosts:
    description: Variables of the hosts of the run.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Show how sites connect
  ansible.builtin.debug:
    msg: "{{ __plan_result | isthmus.mesh.measured_matrix(ansible_play_hosts_all | map('extract', hostvars)) }}"
"""

RETURN = r"""
_value:
  description: A line for each two sites, as C(matrix) of M(isthmus.mesh.plan).
  type: list
  elements: str
"""


def measured_matrix(plan, hosts):
    """Of each site the host counts whose underlay carries least."""
    sites = {
        name: entry["site"]
        for key, document in plan["record"].items()
        if key.startswith("clusters/")
        for name, entry in document.get("hosts", {}).items()
    }
    underlays = {}
    for variables in hosts:
        name = variables["inventory_hostname"]
        mtu = (variables.get("__preflight_result") or {}).get("underlay_mtu")
        site = sites.get(name)
        if mtu and site is not None and mtu < underlays.get(site, ("", mtu + 1))[1]:
            underlays[site] = name, mtu
    return matrix.lines(matrix.measured(plan["sites"], underlays))


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"measured_matrix": measured_matrix}
