# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a run of backup has kept, and what it could not."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: backup_outcome
short_description: What a run of backup has kept, and what it could not
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Puts what M(isthmus.mesh.backup) returned for every cluster into words.
options:
  _input:
    description:
      - Dictionaries with C(cluster), and the results of the loops over its etcd hosts (C(etcd)) and over the host of
        its authority (C(authority)).
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what was backed up
  ansible.builtin.debug:
    msg: "{{ (results | isthmus.mesh.backup_outcome).done }}"
"""

RETURN = r"""
_value:
  description: C(done) and C(problems), lines of text.
  type: dict
"""


def backup_outcome(results):
    """A line for each backup, and one for each cluster that has none or not all of it."""
    done, problems = [], []
    for result in results:
        cluster = result["cluster"]
        taken = [one for one in result["etcd"] if "path" in one]
        if not taken:
            why = "; ".join(f"{one['backup_place']['host']}: {_words(one)}" for one in result["etcd"])
            problems.append(f"Cluster {cluster} was not backed up. {why}.")
            continue
        kept = taken[0]
        added = [one for one in result["authority"] if "path" in one]
        files = [*kept["files"], *(name for one in added for name in one["files"])]
        line = f"Cluster {cluster}: {kept['path']} ({', '.join(files)}), up to revision {kept['revision']} of its etcd."
        if kept["ca_host"] == "":
            line += (
                " Its authority is a Secret of the cluster (isthmus-system/isthmus-ca) and NOT in it: back that up "
                "with the cluster's Secrets."
            )
        elif not added:
            host = kept["ca_host"] or "unknown to the estate record in its etcd"
            why = "".join(f": {_words(one)}" for one in result["authority"])
            problems.append(
                f"The backup of cluster {cluster} has no certificate authority. Its host is {host}{why}. "
                "Next: run again when that is put right."
            )
        elif "ca.key.cms" not in files:
            line += (
                " The private key of its certificate authority is NOT in it, for want of a public key to encrypt it "
                "to: -e isthmus_backup_key=FILE."
            )
        done.append(line)
    if not results:
        problems.append("No cluster was backed up: none of the hosts of this run is an etcd host of isthmus_estate.")
    return {"done": done, "problems": problems}


def _words(result):
    return str(result.get("msg") or "no answer").rstrip(". \n")


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"backup_outcome": backup_outcome}
