# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The hosts that a run of site changes, in batches."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: run_batches
short_description: The hosts that a run of site changes, in batches
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Cuts the hosts that were looked at and answered into batches, for C(hosts) and C(serial) of the plays of site.
  - Where nothing was planned, or a package could not be installed on a host, nothing is to be changed.
  - While encryption or native routing is turned on or off a plan has several steps. One begins when all hosts that it
    waits for have done the one before, as members of the group C(__site_done_NUMBER), those that it asks for that have
    proven that they reach each other the new way (C(__site_proven_NUMBER)), and no host failed.
options:
  _input:
    description: Variables of all hosts of the inventory.
    type: list
    elements: dict
    required: true
  step:
    description: Which step of the plan; V(0) is what it gives itself, V(1) the first of its C(steps).
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Show the batches
  ansible.builtin.debug:
    msg: "{{ groups['all'] | map('extract', hostvars) | isthmus.mesh.run_batches }}"
"""

RETURN = r"""
_value:
  description:
    - C(together) and C(one_by_one), patterns of hosts, the latter in the order of the batches, and C(serial), how many
      of them are in each; C(proving), a pattern of the hosts that have to prove something before the step, and
      C(replanned), of all hosts, where the step depends on it.
    - C(unproven), gateways that have to see that the other ones take their new keys or certificates.
    - C(in_cluster), hosts that stand for clusters whose control plane is in them, and C(readers), hosts that read the
      etcd of such a cluster; C(formed), whether the authority of one is new in this run, so that all hosts are readers
      of the record, which has it.
    - A play without hosts would be one of all hosts, so a pattern that no host matches is given instead of none.
  type: dict
"""

from ansible_collections.isthmus.mesh.plugins.plugin_utils.batches import Batches, newest_plan, split

_NOBODY = ["!all"]


def run_batches(members, step=0):
    """The patterns; see above."""
    looked_at = [variables for variables in members if "__plan_result" in variables]
    found, inside, readers, formed = Batches([], []), [], [], False
    proving, replanned = [], []
    if looked_at and not any(_is(one, "__preflight_installed", "failed") for one in looked_at):
        plan = newest_plan(looked_at)
        if step:
            proving, trying, begins = _begins(members, plan, step)
            replanned = [str(one["inventory_hostname"]) for one in looked_at] if trying else []
            looked_at = looked_at if begins else []
        hosts = [
            str(one["inventory_hostname"]) for one in looked_at if not _is(one, "__preflight_result", "unreachable")
        ]
        found = split(plan["specs"], hosts, plan["clusters"]["new"], plan["clusters"]["answering"], plan["serial"])
        if step:  # no cluster is formed any more
            found = Batches([], [batch for batch in [found.together, *found.batches] if batch])
        else:
            inside = sorted(entry["entry"] for entry in plan["in_cluster"].values() if entry["entry"] in hosts)
        if inside:
            formed = _formed(looked_at, plan["record"])
            specs = plan["specs"]
            readers = sorted(name for name in hosts if name in specs and (formed or specs[name].get("member")))
    return {
        "together": found.together or _NOBODY,
        "one_by_one": [name for batch in found.batches for name in batch] or _NOBODY,
        "serial": [len(batch) for batch in found.batches],
        "proving": proving or _NOBODY,
        "replanned": replanned or _NOBODY,
        "unproven": _unproven(members) or _NOBODY,
        "in_cluster": inside or _NOBODY,
        "readers": readers or _NOBODY,
        "formed": formed,
    }


def _formed(members, record):
    """Whether a cluster whose control plane is in it got its authority in this run."""
    clusters = {one["isthmus_cluster"] for one in members if one.get("__site_formed")}
    return any(not record[f"clusters/{cluster}"].get("ca_certificate") for cluster in clusters)


def _begins(members, plan, step):
    """The hosts that have to prove something before a step, whether the proof decides what the step is, and whether it
    may begin."""
    groups = {str(one["inventory_hostname"]): one["group_names"] for one in members}
    if any("__site_failed" in names for names in groups.values()):
        return [], False, False

    def among(group, names):
        return [name for name in names if group in groups.get(name, ())]

    done = f"__site_done_{step - 1}"
    tried = among(done, {name for trial in plan["trials"][step] for name in trial["hosts"]})
    wanted = plan["steps"][step - 1] if len(plan["steps"]) >= step else None
    ready = wanted is not None and len(among(done, wanted["waits"])) == len(wanted["waits"])
    proving = wanted["proven"] if ready else []
    begins = ready and len(among(f"__site_proven_{step}", proving)) == len(proving)
    return sorted({*proving, *tried}), bool(tried), begins


def _unproven(members):
    """The hosts on which the tunnels of gateways wait for a proof; none when a host failed, as others may lack the new
    keys then."""
    if any("__site_failed" in one.get("group_names", ()) for one in members):
        return []
    return sorted(
        str(one["inventory_hostname"]) for one in members if (one.get("__ipsec_result") or {}).get("unproven")
    )


def _is(variables, name, word):
    """Whether what the task registered under ``name`` is ``word``."""
    return bool(name in variables and variables[name].get(word))


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"run_batches": run_batches}
