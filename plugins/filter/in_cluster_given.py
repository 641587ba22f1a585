# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What authorities inside clusters signed for a host."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: in_cluster_given
short_description: Certificates that authorities inside clusters gave to a host
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Of certificates that the host asked for in this run, those that clusters with C(control_plane=in_cluster) signed, in
    the form of M(isthmus.mesh.pki_install).
options:
  _input:
    description: Variables of all hosts of the inventory.
    type: list
    elements: dict
    required: true
  host:
    description: Name of the host.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show what a host was given
  ansible.builtin.debug:
    msg: "{{ groups['all'] | map('extract', hostvars) | isthmus.mesh.in_cluster_given(inventory_hostname) }}"
"""

RETURN = r"""
_value:
  description: Answers, one for each cluster.
  type: list
  elements: dict
"""


def in_cluster_given(members, host):
    """The answers; see above."""
    asked = {
        (group["ca_cluster"], request["csr"])
        for variables in members
        if variables["inventory_hostname"] == host
        for group in (variables.get("__pki_requested") or {}).get("pending") or ()
        for request in group["requests"]
    }
    found = []
    for variables in members:
        issued, cluster = variables.get("__site_issued") or {}, str(variables.get("isthmus_cluster"))
        given = [
            {"name": f"peer-{cluster}", "certificate": one["certificate"]}
            for one in issued.get("signed", ())
            if one["host"] == host and (cluster, one["csr"]) in asked
        ]
        if given:
            found.append({"cluster": cluster, "ca_certificate": issued["ca"], "certificates": given})
    return found


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"in_cluster_given": in_cluster_given}
