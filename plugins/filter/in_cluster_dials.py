# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Where a host whose registrar reads clusters with their control plane in them dials their etcd."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: in_cluster_dials
short_description: Where a host dials the etcd of clusters whose control plane is in them
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Gives the targets of M(isthmus.mesh.peer_probe), by which a host proves that it reaches what such a cluster exposes
    before its registrar is to read it. Only of clusters whose etcd has run in this run; of several addresses one must
    answer, as registrars use any of them.
options:
  _input:
    description: Variables of all hosts of the inventory, of which those that stand for such clusters are looked at.
    type: list
    elements: dict
    required: true
  spec:
    description: What the plan says of the host.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what this host has to reach
  ansible.builtin.debug:
    msg: "{{ groups['all'] | map('extract', hostvars) | isthmus.mesh.in_cluster_dials(isthmus_spec) }}"
"""

RETURN = r"""
_value:
  description: Dictionaries with C(cluster) and its C(targets).
  type: list
  elements: dict
"""

from urllib.parse import urlsplit


def in_cluster_dials(members, spec):
    """The targets; see above."""
    formed = {str(one["isthmus_cluster"]): one for one in members if one.get("__site_formed")}
    found = []
    for peer in (spec.get("registrar") or {"peers": []})["peers"]:
        entry = formed.get(peer["name"])
        if entry is None:
            continue
        places = [urlsplit(url) for url in peer["endpoints"]]
        common = {"host": str(entry["inventory_hostname"]), "protocol": "tcp", "answers": "etcd"}
        common |= {"authority": entry["__site_issued"]["ca"], "one_is_enough": True}
        targets = [{**common, "address": place.hostname, "port": place.port} for place in places]
        found.append({"cluster": peer["name"], "targets": targets})
    return found


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"in_cluster_dials": in_cluster_dials}
