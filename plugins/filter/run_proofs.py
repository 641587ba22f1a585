# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a proof of a run of site says of pairs of sites with `routing: auto`."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: run_proofs
short_description: What a proof of a run of site says of pairs of sites that choose their way
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Takes from what the hosts of a run registered, whether all of the two sites of a pair reach each other natively, for
    O(isthmus.mesh.plan#module:proofs).
options:
  _input:
    description: Variables of all hosts of the inventory.
    type: list
    elements: dict
    required: true
  step:
    description: Before which step of the plan the proof was made; V(0) before the first.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Show what was proven
  ansible.builtin.debug:
    msg: "{{ groups['all'] | map('extract', hostvars) | isthmus.mesh.run_proofs(step=1) }}"
"""

RETURN = r"""
_value:
  description:
    - The proofs of the run so far. The last is that of O(step), by the names of the two sites. C(works) is true where
      all hosts reached all others, false where one did not reach another, C(hosts), and null where nobody knows.
      C(why) is in words.
  type: list
  elements: dict
"""

from ansible_collections.isthmus.mesh.plugins.plugin_utils.batches import newest_plan


def run_proofs(members, step=0):
    """See above."""
    hosts = {str(variables["inventory_hostname"]): variables for variables in members}
    plan = newest_plan(hosts.values())
    found = {}
    for trial in plan["trials"][step]:
        verdict = _verdict(set(trial["sites"]), trial["hosts"], hosts, step)
        if verdict is not None:
            found[" ".join(trial["sites"])] = verdict
    before = [*plan["proofs"], *({} for _number in range(step))][:step]
    return [*before, found]


def _verdict(sites, part, hosts, step):
    """None where nothing is to be said: before the first step, of hosts that are not in the run. A pair waits for a
    host that did not do the step before."""
    if step:
        away = [name for name in part if f"__site_done_{step - 1}" not in hosts.get(name, {}).get("group_names", ())]
    elif any("__plan_result" not in hosts.get(name, {}) for name in part):
        return None
    else:
        away = []
    answers = {name: hosts.get(name, {}).get("__site_proof" if step else "__site_still", {}) for name in part}
    mute = away or [name for name, answer in answers.items() if answer.get("unreached") is None]
    missed = [
        (name, one)
        for name in part
        for one in answers[name].get("unreached") or ()
        if {part[name]["site"], one["site"]} == sites
    ]
    missed.sort(key=lambda found: not found[1]["sure"])
    if missed and missed[0][1]["sure"] and not away:
        name, one = missed[0]
        return {"works": False, "hosts": [name, one["name"]], "why": one["why"]}
    if mute:
        return {"works": None, "hosts": [], "why": f"{', '.join(sorted(mute))} did not take part in the proof"}
    if missed:
        name, one = missed[0]
        why = f"{name} reaches {one['name']} neither natively nor through the tunnel: {one['why']}"
        return {"works": None, "hosts": [], "why": why}
    return {"works": True, "hosts": [], "why": ""}


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"run_proofs": run_proofs}
