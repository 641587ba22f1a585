# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a run of site leaves: locks to give back, and what is pending."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: run_outcome
short_description: What a run of site leaves
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Takes the places where the run holds a lock, and what it could not do, out of what M(isthmus.mesh.estate_record)
    returned to the tasks of the run.
options:
  _input:
    description: Variables of the hosts that took part to the end.
    type: list
    elements: dict
    required: true
  silent:
    description: Hosts that did not take part to the end.
    type: list
    elements: str
    default: []
  clusters:
    description: Clusters whose etcd is to have the record.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Show what is pending
  ansible.builtin.debug:
    msg: "{{ (ansible_play_hosts | map('extract', hostvars) | isthmus.mesh.run_outcome).pending }}"
"""

RETURN = r"""
_value:
  description: C(locked), dictionaries with C(cluster) and C(host), and C(pending), lines of text.
  type: dict
"""

_READS = ("__plan_first", "__plan_others")
_WRITES = ("__services_result", "__services_others")
_NEXT = (
    "Nothing was withdrawn because of that. Next: run the playbook again when the reason above is gone: it does the "
    "rest."
)


def run_outcome(members, silent=(), clusters=()):
    """`locked` places and `pending` lines."""
    locked, written, wrote = [], set(), False
    for variables in members:
        for name in (*_READS, *_WRITES):
            if name not in variables:
                continue
            wrote = wrote or name in _WRITES
            for result in variables[name].get("results", []):
                place = result.get("plan_place") or result.get("services_place")
                if result.get("locked") and place not in locked:
                    locked.append(place)
                if name in _WRITES and "record" in result:
                    written.add(place["cluster"])
    pending = []
    if silent:
        pending.append(
            f"Pending: {len(silent)} of the hosts ({', '.join(sorted(silent))}) could not be entered, or failed as is "
            "told above."
        )
    unwritten = sorted(set(clusters) - written) if wrote else []
    if unwritten:
        pending.append(f"Pending: the etcd of {', '.join(unwritten)} did not get the estate record of this run.")
    return {"locked": locked, "pending": [*pending, _NEXT] if pending else []}


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"run_outcome": run_outcome}
