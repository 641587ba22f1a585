# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which hosts to ask for a cluster's etcd, out of the inventory."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: etcd_hosts
short_description: The etcd hosts of every cluster
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Reads the clusters of C(isthmus_estate) and gives, for every cluster, hosts that carry its etcd and that the
    inventory knows.
  - An estate that is not well-formed gives an empty list; M(isthmus.mesh.plan) says what is wrong with it.
options:
  _input:
    description: The estate, C(isthmus_estate).
    type: dict
    required: true
  known:
    description: Hosts of the inventory; others are left out.
    type: list
    elements: str
    required: true
  without:
    description: Names of clusters to leave out; one text may hold several, with commas.
    type: list
    elements: str
    default: []
  first:
    description: Whether to give one host of each cluster, the first, instead of all but the first.
    type: bool
    default: true
  pods:
    description: Whether to give only hosts that stand for pods, of clusters with C(control_plane=in_cluster).
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Show one etcd host of each cluster
  ansible.builtin.debug:
    msg: "{{ isthmus_estate | isthmus.mesh.etcd_hosts(known=groups['all']) }}"
"""

RETURN = r"""
_value:
  description: Dictionaries with C(cluster) and C(host).
  type: list
  elements: dict
"""

from collections.abc import Mapping


def etcd_hosts(estate, known, without=(), first=True, pods=False):
    """Cluster and host, in the inventory's order."""
    texts = [without] if isinstance(without, str) else without
    left_out = {name.strip() for text in texts for name in text.split(",")}
    clusters = estate.get("clusters") if isinstance(estate, Mapping) else None
    found = []
    for name, cluster in clusters.items() if isinstance(clusters, Mapping) else ():
        if not isinstance(cluster, Mapping) or (pods and cluster.get("control_plane") != "in_cluster"):
            continue
        etcd = cluster.get("etcd")
        hosts = etcd.get("hosts") if isinstance(etcd, Mapping) else None
        present = [host for host in hosts if host in known] if isinstance(hosts, list) and name not in left_out else []
        found += [{"cluster": name, "host": host} for host in (present[:1] if first else present[1:])]
    return found


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"etcd_hosts": etcd_hosts}
