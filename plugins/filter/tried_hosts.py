# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hosts that a host tries to reach natively."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: tried_hosts
short_description: The hosts that a host tries to reach natively
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Takes from a plan those hosts of pairs of sites with C(routing=auto) that a host has to reach natively, as proof,
    for O(isthmus.mesh.verify#module:hosts).
options:
  _input:
    description: What M(isthmus.mesh.plan) returned.
    type: dict
    required: true
  host:
    description: Name of the host.
    type: str
    required: true
  step:
    description: Before which step of the plan the proof is made; V(0) before the first.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Show whom this host tries to reach natively
  ansible.builtin.debug:
    msg: "{{ __plan_result | isthmus.mesh.tried_hosts(host=inventory_hostname, step=1) }}"
"""

RETURN = r"""
_value:
  description: Dictionaries with C(name), C(cluster) and C(mesh4).
  type: list
  elements: dict
"""


def tried_hosts(plan, host, step=0):
    """In the order of the names."""
    found = {}
    for trial in plan["trials"][step]:
        hosts = trial["hosts"]
        if host not in hosts:
            continue
        here = hosts[host]["site"]
        (there,) = {*trial["sites"]} - {here} or {here}
        found.update({name: one for name, one in hosts.items() if name != host and one["site"] == there})
    return [{"name": name, "cluster": one["cluster"], "mesh4": one["mesh4"]} for name, one in sorted(found.items())]


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"tried_hosts": tried_hosts}
