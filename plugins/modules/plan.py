#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: plan
short_description: Plan the whole mesh from the inventory and the estate record
version_added: 1.0.0
description:
  - Computes, on the controller, a complete specification for every host of the mesh, the next estate record and the
    definitions of services. It changes nothing, anywhere.
  - Reads C(isthmus_estate) and the hosts' C(isthmus_*) variables of the B(whole) inventory, never of the hosts in the
    play, so that C(--limit), C(serial) and unreachable hosts do not change the plan.
  - What the record has dealt is kept. What the inventory no longer names is reported as an orphan and left running.
  - All that is wrong with the inventory is reported in one message.
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
  diff_mode:
    support: full
    description: Returns the record before and after the run, in words.
  action:
    support: full
    description: Runs on the controller.
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  records:
    description:
      - Copies of the estate record, read from members and hosts.
      - Each is a mapping of document names, such as V(roster) and V(clusters/onprem), to documents, or a mapping with
        C(documents), C(cluster) for the cluster whose etcd it was read from, and C(foreign_services) for the owners of
        services there that the inventory does not own. A service that the inventory would define too is refused.
      - Of each document the highest revision counts.
    type: list
    elements: dict
    default: []
  prune:
    description:
      - Names of orphans to remove, as C(orphans) returns them. A name without its kind will do when it can mean one
        thing only.
    type: list
    elements: str
    default: []
  forget:
    description:
      - Names of lost hosts and clusters, in the inventory or not, in the forms of O(prune). They are removed, and the
        record says that they are forgotten; from then on they are planned as if the inventory did not have them.
    type: list
    elements: str
    default: []
  rotate:
    description:
      - Whether every host that encrypts gets another key of WireGuard, as the playbook
        C(isthmus.mesh.rotate_wireguard_keys) asks.
    type: bool
    default: false
  clean:
    description: Forgotten hosts that hold nothing of the mesh any more, and are joined anew.
    type: list
    elements: str
    default: []
  lists:
    description: Lists of revoked certificates in PEM for the record, by cluster, as M(isthmus.mesh.pki_revoke) gave.
    type: dict
    default: {}
  exposed:
    description:
      - Where the etcd of clusters with C(control_plane=in_cluster) is reached, by cluster, as
        M(isthmus.mesh.kubernetes_install) found it.
    type: dict
    default: {}
  try_native:
    description: Whether pairs of sites with C(routing=auto) that came back to the tunnel are tried again.
    type: bool
    default: false
  keys:
    description:
      - Public keys of WireGuard of the hosts in RV(keyed), by host and UDP port, as M(isthmus.mesh.wireguard_keys)
        found them. Of others those of the record count.
    type: dict
    default: {}
  pods:
    description:
      - Ranges that Kubernetes deals pods' addresses from on the hosts in RV(routed), lists by host, as
        M(isthmus.mesh.kubernetes_probe) found them. Of others those of the record count. When it is given, hosts are
        warned of whose ranges nobody knows.
    type: dict
  proofs:
    description:
      - The proofs of the run so far of which way packets can go between sites with C(routing=auto), as the filter
        P(isthmus.mesh.run_proofs#filter) gives them; the first was made before anything was changed, each of the others
        after one more step.
    type: list
    elements: dict
    default: []
  basis:
    description:
      - RV(basis) of the first plan of the run, of which this one is made too, but for O(proofs). It counts for all
        other options.
    type: dict
  version:
    description:
      - The version of this collection that is wanted. Another one is refused.
      - An older version than the estate record's is refused always; a newer one unless it is named here, which asks for
        the upgrade.
    type: str
  serial:
    description:
      - How many hosts of each cluster are changed in one batch, as C(serial) of a play has it, a number, a percentage
        or a list of these; a text may have commas.
      - V([1, "20%", "100%"]) by default.
    type: raw
  by:
    description:
      - Who runs this, for the record. The user of AWX or of the controller by default.
    type: str
seealso:
  - module: isthmus.mesh.node
  - module: isthmus.mesh.pki_revoke
"""

EXAMPLES = r"""
- name: The mesh is planned
  isthmus.mesh.plan:
    records: "{{ isthmus_records }}"
    prune: "{{ isthmus_prune | default([]) }}"
    version: "{{ isthmus_version | default(omit) }}"
  run_once: true
  register: isthmus_plan
"""

RETURN = r"""
keyed:
  description: Hosts whose public keys of WireGuard others need before any etcd tells them.
  returned: success
  type: list
  elements: str
routed:
  description: Hosts that are Kubernetes nodes and native in clear, so that the network has to know their pods' ranges.
  returned: success
  type: list
  elements: str
specs:
  description: The specification of each host, by name. It holds no secret.
  returned: success
  type: dict
record:
  description: The documents of the next estate record, by name.
  returned: success
  type: dict
services:
  description: By cluster, the definitions that must be C(present), and the names of those that must be C(absent).
  returned: success
  type: dict
  sample: {"onprem": {"present": [], "absent": ["shop/old"]}}
changes:
  description: What the record gains, loses or changes, a line each.
  returned: success
  type: list
  elements: str
  sample: ["host onprem-4: new, cluster onprem, site onprem, underlay 198.18.1.14, range 10.101.0.48/28"]
orphans:
  description: What the record knows and the inventory lacks, as O(prune) takes it.
  returned: success
  type: list
  elements: str
  sample: ["host/onprem-9", "workload/onprem-1/shop/web", "service/shop/web", "member/onprem/onprem-2", "cluster/edge"]
removed:
  description: What goes with this plan, named like the orphans.
  returned: success
  type: list
  elements: str
cuts:
  description: A line for each of RV(removed), with what it takes away, what is left, and how to undo it.
  returned: success
  type: list
  elements: str
forgotten:
  description: Hosts that were forgotten and take no part, with their C(cluster), and when (C(at)) and by whom (C(by)).
  returned: success
  type: dict
  sample: {"onprem-3": {"cluster": "onprem", "at": "2026-01-02T03:04:05Z", "by": "alice"}}
revocations:
  description:
    - What revokes the certificates of forgotten hosts and of removed etcd hosts (C(departed)), dictionaries with
      C(cluster), C(ca_host), and the C(hosts) and common C(names) whose certificates are revoked.
  returned: success
  type: list
  elements: dict
kubernetes_left:
  description: Clusters that are no Kubernetes clusters of the mesh any more with this plan.
  returned: success
  type: list
  elements: str
  sample: ["kube"]
sites:
  description:
    - The matrix of sites, a dictionary for each two that have hosts, for each that has several, and for two whose
      packets go through gateways and of which one has no hosts (there C(routing) is V(native), as nothing between the
      two is in the overlay). Their C(sites),
      C(routing) and C(encryption), the C(mtu) inside the overlay in bytes where the C(underlay) has 1500 and C(around)
      packets is what it says (the filter P(isthmus.mesh.measured_matrix#filter) has what was measured), and the ports
      that must be C(open), each with C(protocol), C(port) (none where it is all of the protocol), and in words C(on)
      whom and C(from) whom.
    - C(auto) says in words what a pair with C(routing=auto) does, and is null of others. While it has still to try
      native packets its C(routing) is V(auto).
    - C(now) and C(steps) say where the encryption of the two is, and through which stages it goes while it is turned on
      or off, a stage for each step of the run, C(routing_now) and C(routing_steps) the same of native routing.
    - C(kubernetes) are those of the two sites that have Kubernetes nodes.
  returned: success
  type: list
  elements: dict
matrix:
  description: RV(sites) in words, a line each.
  returned: success
  type: list
  elements: str
routes:
  description:
    - What routers need so that packets go natively, and so that machines that are none of the mesh reach what is behind
      the gateway of another site. On those of each C(site) the prefix C(to) leads to the address of a host there,
      C(via). Where that is null it leads to another site, over the next hop that the addresses C(like) of hosts there
      have. C(why) says what for.
  returned: success
  type: list
  elements: dict
  sample:
    - {site: dc, to: 10.101.0.0/28, via: 198.51.100.11, like: [], why: "workloads of dc-1, for packets from hall"}
    - {site: dc, to: 10.102.0.0/27, via: null, like: [198.51.100.21], why: workloads of hosts of hall}
routers:
  description: RV(routes) in words, a line each.
  returned: success
  type: list
  elements: str
host_routes:
  description:
    - The routes of protocol 73 that the agents set on hosts by themselves when all steps are done, a line for each site
      and what it has with another one, ranges in as few as possible.
  returned: success
  type: list
  elements: str
gateways:
  description: For each gateway of a site that is not ours, what its engineer sets for the tunnel, a line each.
  returned: success
  type: list
  elements: str
turned:
  description: What happens to pairs of sites whose encryption or native routing is turned on or off, a line each.
  returned: success
  type: list
  elements: str
vpc:
  description:
    - What VPCs get, C(networks) for M(isthmus.mesh.vpc_routes) and C(peerings) for M(isthmus.mesh.vpc_peering), and in
      words (C(lines)). C(hosts_of_site) are those whose VPC it is; C(meanwhile) is what it holds until all hosts have
      been changed, where that is more than what it holds then.
  returned: success
  type: dict
  contains:
    networks:
      description: One for each site with a VPC.
      type: list
      elements: dict
    peerings:
      description: One for each peering.
      type: list
      elements: dict
    lines:
      description: A line for each of them.
      type: list
      elements: str
bgp:
  description:
    - What hosts of sites with C(bgp) are told (C(hosts), for M(isthmus.mesh.bgp), by name). Those of which only the
      record has the C(bgp) of their site have C(kept) there, and are left as they are.
    - What somebody sets on each of the routers, as C(routers) and in words (C(lines)). A router has C(address),
      C(as_number), C(bfd), C(site), its C(neighbours) with what each C(announces) and, of a Kubernetes node, the ranges
      of its C(pods), and the ranges of which it C(sends) them what it knows. Passwords are in neither.
  returned: success
  type: dict
  contains:
    hosts:
      description: What each host is told.
      type: dict
    routers:
      description: One for each router.
      type: list
      elements: dict
    lines:
      description: A line for each of them.
      type: list
      elements: str
steps:
  description:
    - What follows RV(specs) and RV(record) while encryption or native routing is turned on or off or keys are replaced,
      each with its own C(specs) and C(record), the hosts that must have done the step before (C(waits)), and those that
      must have proven that they reach the others the new way (C(proven)).
  returned: success
  type: list
  elements: dict
trials:
  description:
    - What is proven in the run, a list for before its first step, one for after it, and so on. Each has dictionaries
      with two C(sites) and all C(hosts) of the two that have to prove that they reach each other natively, by name
      with C(cluster), C(site) and C(mesh4).
  returned: success
  type: list
  elements: list
told:
  description: What became of pairs of sites with C(routing=auto) by O(proofs), a line each.
  returned: success
  type: list
  elements: str
basis:
  description: All that the plan was made of besides the inventory and O(proofs).
  returned: success
  type: dict
proofs:
  description: O(proofs).
  returned: success
  type: list
  elements: dict
in_cluster:
  description:
    - What is to be installed into each cluster with C(control_plane=in_cluster), for
      M(isthmus.mesh.kubernetes_install), and in C(entry) the inventory host that stands for it.
  returned: success
  type: dict
serial:
  description: O(serial), as a list.
  returned: success
  type: list
  elements: raw
  sample: [1, "20%", "100%"]
clusters:
  description:
    - The clusters that are C(new), since no member of their etcd ever ran, and those of which a member's record is
      among O(records), C(answering).
  returned: success
  type: dict
  sample: {"new": ["edge"], "answering": ["cloud", "onprem"]}
batches:
  description: In which order the hosts of the play are changed, a line for each batch.
  returned: success
  type: list
  elements: str
  sample: ["batch 1: cloud-2, edge-1, onprem-1", "batch 2: cloud-1, onprem-2", "batch 3: onprem-3"]
problems:
  description: All that is wrong, a line each.
  returned: failure
  type: list
  elements: str
"""
