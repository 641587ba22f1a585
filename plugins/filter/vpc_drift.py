# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""In what VPCs differ from the plan, in words."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: vpc_drift
short_description: In what VPCs differ from the plan, in words
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Reads what M(isthmus.mesh.vpc_routes) and M(isthmus.mesh.vpc_peering) returned in check mode, failures included.
options:
  _input:
    description: Results, one for each VPC or peering.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what is different
  ansible.builtin.debug:
    msg: "{{ asked.results | isthmus.mesh.vpc_drift }}"
"""

RETURN = r"""
_value:
  description: A sentence for each thing that is missing, different, leads nowhere, or is somebody else's.
  type: list
  elements: str
"""


def vpc_drift(results):
    """In the order of the results."""
    found = []
    for result in results:
        call = result["vpc_call"]
        where = f"site {call['site']}" if "site" in call else f"sites {' and '.join(call['sites'])}"
        if result.get("msg") and "diff" not in result:
            found.append(f"{where}: {result['msg']}")
        for change in result.get("diff") or []:
            before, after = (" ".join(change[side].split()) for side in ("before", "after"))
            if before:
                found.append(f"{where}: {change['before_header']} is {before}, and should be {after or 'gone'}.")
            else:
                found.append(f"{where}: {change['before_header']} is missing ({after}).")
        found += [
            f"{where}: route {route['destination']} in {route['table']} to {route['target']} leads nowhere: "
            f"{route['reason']}."
            for route in result.get("blackholes", [])
            if route["owned"]
        ]
    return found


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"vpc_drift": vpc_drift}
