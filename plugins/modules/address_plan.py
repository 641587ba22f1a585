#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: address_plan
short_description: Plan the ranges of the mesh from the inventory and the estate record
version_added: 1.0.0
description:
  - Computes, on the controller, who has which range, which ranges overlap and what would put that right, ranges for a
    new cluster, and whether ranges, identities and cluster ids have room for growth. It renumbers nothing.
  - Reads C(isthmus_estate) and the hosts' C(isthmus_*) variables of the B(whole) inventory. Unlike
    M(isthmus.mesh.plan) it takes an inventory whose ranges overlap.
attributes:
  check_mode:
    support: full
    description: Does not write the file in check mode.
  diff_mode:
    support: none
    description: Changes nothing on any host.
  action:
    support: full
    description: Runs on the controller.
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  answers:
    description:
      - By host of the inventory, what M(isthmus.mesh.estate_record) with C(state=read) returned there, failed or not.
    type: dict
    default: {}
  new_cluster:
    description: Name of a cluster that is to come, for which an id and ranges are proposed.
    type: str
    default: ""
  new_nodes:
    description: How many hosts it is to have.
    type: str
    default: ""
  growth:
    description:
      - What comes beside what is there, as C(hosts=40,services=100,onprem.hosts=200) or a mapping of these. C(clusters)
        of the estate; C(hosts), C(services) and C(identities) of each cluster; C(workloads) of each host. With a
        cluster's name and a dot before it, of that cluster.
    type: raw
    default: ""
  path:
    description: File on the controller that gets the plan, as JSON when its name ends with C(.json), else as tables.
    type: path
    default: ""
seealso:
  - module: isthmus.mesh.plan
  - module: isthmus.mesh.estate_record
"""

EXAMPLES = r"""
- name: Ranges for a cluster of 40 hosts
  isthmus.mesh.address_plan:
    new_cluster: paris
    new_nodes: 40
    growth: hosts=100,services=50
  run_once: true
  register: isthmus_addresses
"""

RETURN = r"""
lines:
  description: The plan for people, printable ASCII without any secret.
  returned: success
  type: list
  elements: str
plan:
  description: The plan for programs.
  returned: success
  type: dict
  contains:
    schema:
      description: Version of this form.
      type: int
      sample: 1
    estate:
      description: Name of the estate.
      type: str
    record:
      description: Clusters whose own etcd gave its record.
      type: list
      elements: str
    unread:
      description: Clusters whose own etcd did not, and why.
      type: dict
    ranges:
      description:
        - Ranges with C(range), C(kind) (C(workloads), C(services), C(pods), C(ClusterIPs), C(VPN) of what is behind the
          gateways of a site, C(VPC), or C(reserved)), C(owner), C(where) it is declared, number of C(addresses), and
          how many hosts, services or host addresses have it in use (C(used)).
      type: list
      elements: dict
    underlay:
      description: How many own addresses hosts have in each /24, and of which sites they are.
      type: list
      elements: dict
    overlaps:
      description:
        - The two C(ranges) that overlap, and the C(fix), with the C(range) that gives way, what to write C(instead),
          C(how), the C(hosts), C(services) and number of C(workloads) whose addresses would change, and all of it in
          C(words).
      type: list
      elements: dict
    clusters:
      description:
        - Of each cluster C(hosts), C(workloads), C(services), C(identities) and C(record_bytes), each with C(now),
          C(growth) and C(capacity).
      type: list
      elements: dict
    cluster_ids:
      description: Ids, with C(now), C(growth) and C(capacity).
      type: dict
    new_cluster:
      description: What is proposed for it, or V(none).
      type: dict
      sample: {"cluster": "paris", "nodes": 40, "id": 3, "workload_ranges": ["10.103.0.0/22"],
               "service_range": "10.113.0.0/22", "node_prefix": 28, "hosts": 64, "workloads_per_host": 13,
               "services": 1022}
    problems:
      description: What overlaps, what has no room, and what else is wrong with the inventory, a line each.
      type: list
      elements: str
"""
