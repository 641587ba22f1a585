# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What goes from VPCs with their last hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: vpc_gone
short_description: What goes from VPCs with their last hosts
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Gives the VPCs all of whose hosts left the mesh, and the peerings of such, as C(state=absent); and the hosts for
    which a VPC of others that left stays.
options:
  _input:
    description: RV(isthmus.mesh.plan#module:vpc).
    type: dict
    required: true
  hosts:
    description: Hosts that left the mesh.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Show what is left of hosts that are gone
  ansible.builtin.debug:
    msg: "{{ isthmus_plan.vpc | isthmus.mesh.vpc_gone(hosts=['cloud-1', 'cloud-2']) }}"
"""

RETURN = r"""
_value:
  description:
    - C(networks) and C(peerings) that go; C(stays), from sites whose VPC stays to the hosts that did not leave.
  type: dict
"""


def vpc_gone(vpc, hosts):
    """Networks and peerings, each in its order."""

    def left(names):
        return bool(names) and set(names) <= set(hosts)

    return {
        "networks": [
            {key: call[key] for key in ("site", "owner", "place")} | {"state": "absent", "hosts_of_site": []}
            for call in vpc["networks"]
            if left(call["hosts_of_site"])
        ],
        "peerings": [
            {**call, "state": "absent", "hosts_of_site": []}
            for call in vpc["peerings"]
            if any(left(side) for side in call["hosts_of_site"])
        ],
        "stays": {
            call["site"]: sorted(set(call["hosts_of_site"]) - set(hosts))
            for call in vpc["networks"]
            if set(call["hosts_of_site"]) & set(hosts) and not left(call["hosts_of_site"])
        },
    }


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"vpc_gone": vpc_gone}
