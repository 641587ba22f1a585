# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which VPCs a run sets, and to what."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: vpc_due
short_description: The VPCs that a run sets
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - A VPC is its hosts'. It is set in a run that has one of them, a peering in a run that has one of each side. What
    goes altogether goes in any run, and so does what belongs to hosts that the inventory does not have.
options:
  _input:
    description: C(networks) or C(peerings) of RV(isthmus.mesh.plan#module:vpc).
    type: list
    elements: dict
    required: true
  run:
    description: Hosts of the run.
    type: list
    elements: str
    required: true
  known:
    description: Hosts of the inventory.
    type: list
    elements: str
    required: true
  moment:
    description:
      - V(before) hosts are changed a VPC holds what they need until all have been, V(after) it what they need then;
        those in which this makes no difference are left out. V(whole) gives all, with what they are to hold in the end.
    type: str
    choices: [before, after, whole]
    default: whole
"""

EXAMPLES = r"""
- name: Show what is set before the hosts are changed
  ansible.builtin.debug:
    msg: >-
      {{ isthmus_plan.vpc.networks
         | isthmus.mesh.vpc_due(run=ansible_play_hosts_all, known=groups['all'], moment='before') }}
"""

RETURN = r"""
_value:
  description: Those of the input, in its order.
  type: list
  elements: dict
"""


def vpc_due(calls, run, known, moment="whole"):
    """In the order of the calls."""
    found = [call for call in calls if all(_has(side, run, known) for side in _sides(call["hosts_of_site"]))]
    if moment == "after":
        return [call for call in found if call.get("meanwhile")]
    return [{**call, **(call.get("meanwhile") or {})} for call in found] if moment == "before" else found


def _sides(hosts):
    return hosts if hosts and isinstance(hosts[0], list) else [hosts]


def _has(hosts, run, known):
    here = [host for host in hosts if host in known]
    return not here or any(host in run for host in here)


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"vpc_due": vpc_due}
