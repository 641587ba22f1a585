# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a run of forget has revoked, and what it could not."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: forget_outcome
short_description: What a run of forget has revoked, and what it could not
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Puts what M(isthmus.mesh.pki_revoke) returned at every authority into words, and names etcd hosts that have not got
    the list of revoked certificates.
options:
  _input:
    description: Variables of all hosts.
    type: list
    elements: dict
    required: true
  plan:
    description: The plan, as M(isthmus.mesh.plan) returned it.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what was revoked
  ansible.builtin.debug:
    msg: "{{ (groups['all'] | map('extract', hostvars) | isthmus.mesh.forget_outcome(plan=isthmus_plan)).done }}"
"""

RETURN = r"""
_value:
  description: C(done), C(pending) and C(problems), lines of text.
  type: dict
"""

from ansible_collections.isthmus.mesh.plugins.module_utils import in_cluster

_AGAIN = "Next: run isthmus.mesh.forget again with the same names when that is put right."


def forget_outcome(members, plan):
    """Lines about every authority and every etcd host."""
    revoked, listed, inside = {}, set(), {}
    for variables in members:
        host = variables["inventory_hostname"]
        if "__forget_revoked" in variables:
            revoked[host] = variables["__forget_revoked"]
        if "pending" in variables.get("__pki_requested", {}):
            listed.add(host)
        if variables.get("__site_issued"):
            inside[str(variables["isthmus_cluster"])] = variables["__site_issued"]
    done = [
        f"{host} of cluster {entry['cluster']} is forgotten since {entry['at']}, until it is joined anew."
        for host, entry in sorted(plan["forgotten"].items())
    ]
    pending, problems = [], []
    for one in plan["revocations"]:
        cluster, place, hosts = one["cluster"], one["ca_host"], ", ".join(one["hosts"])
        answer = revoked.get(place, {})
        if "crl" in answer:
            done += [f"The authority of cluster {cluster} revoked {words}." for words in answer["revoked"]]
            if not answer["revoked"]:
                done.append(f"The authority of cluster {cluster} had nothing more to revoke.")
            if "since" in answer:
                done.append(
                    f"NOT REVOKED: what the authority of cluster {cluster} signed before {answer['since']} and its "
                    "ledger lacks. It is complete since then only, and such certificates are valid for up to a year. "
                    f"If {hosts} carried an etcd member then, "
                    'give the cluster a new authority: docs/operating.md, "A machine is lost or stolen".'
                )
            continue
        reason = str(answer.get("msg") or "it could not be entered").rstrip(". \n")
        line = (
            f"The authority of cluster {cluster} on {place} has not revoked what {hosts} may hold of it: {reason}. "
            f"Users of agents are deleted, but certificates of an etcd host go on being accepted there. {_AGAIN}"
        )
        (problems if "msg" in answer and not answer.get("unreachable") else pending).append(line)
    for cluster, one in sorted(plan["in_cluster"].items()):
        doomed, issued = one.get("revoked"), inside.get(cluster, {})
        if doomed is None:
            continue
        lacking = in_cluster.not_revoked(doomed, issued)
        if lacking:
            pending.append(
                f"Pending: the authority of cluster {cluster}, which is in it, has not revoked what "
                f"{', '.join(lacking)} may hold of it: the run did not get that far on {one['entry']}. Its etcd goes "
                "on accepting that. Next: run isthmus.mesh.site when that is put right."
            )
            continue
        words = [each["words"] for each in issued["revoked"]["certificates"] if each["host"] in doomed["hosts"]]
        done += [f"The authority of cluster {cluster} has revoked {each}." for each in words]
        done += [] if words else [f"The authority of cluster {cluster} had nothing to revoke."]
    for name, document in sorted(plan["record"].items()):
        if name.startswith("clusters/") and document["state"] != "absent":
            late = sorted(set(document["etcd"]["members"]) - listed)
            if late:
                pending.append(
                    f"Pending: etcd of cluster {document['name']} on {', '.join(late)} did not get the list of revoked "
                    "certificates. Next: run isthmus.mesh.site when it can be entered; it brings the list."
                )
    return {"done": done, "pending": pending, "problems": problems}


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"forget_outcome": forget_outcome}
