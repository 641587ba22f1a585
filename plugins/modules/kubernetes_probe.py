#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kubernetes_probe
short_description: Compare a cluster's Kubernetes API with what the inventory says of it
version_added: 1.0.0
description:
  - Runs where the API is reached from (C(delegate_to)). Finds a kubeconfig that leads to another cluster, hosts that
    are no node, nodes that the inventory does not know, ranges of pods and of services that are not the declared ones,
    and, when a registrar is to be let in, what the operator lacks of the rights for it.
  - Before a registrar of O(seen) is let in for the first time, everything that would keep pods out of the mesh is a
    problem. In a mesh that runs it is a warning, and an API that does not answer is RV(pending) only.
  - Nodes that the inventory does not know are a problem until a registrar of the cluster was let in, and a warning
    afterwards, as Kubernetes adds nodes when it likes.
extends_documentation_fragment:
  - isthmus.mesh.attributes.info
  - isthmus.mesh.kubernetes
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  record:
    description: The cluster's document of the estate record, from M(isthmus.mesh.plan).
    type: dict
    required: true
seealso:
  - module: isthmus.mesh.kubernetes_access
"""

EXAMPLES = r"""
- name: The cluster's Kubernetes is what the inventory says
  isthmus.mesh.kubernetes_probe:
    record: "{{ isthmus_record['clusters/kube'] }}"
    kubeconfig: ~/.kube/kube
  delegate_to: localhost
"""

RETURN = r"""
problems:
  description: All that keeps the cluster from joining; the module fails when there is one.
  returned: always
  type: list
  elements: str
pending:
  description: Why nothing is known of the cluster now; empty when its API answered.
  returned: success
  type: str
  sample: ""
server:
  description: URL of the API server; empty when there is none to ask.
  returned: success
  type: str
  sample: https://198.18.4.11:6443
nodes:
  description: Names of the cluster's nodes.
  returned: success
  type: list
  elements: str
pods:
  description:
    - By host, the IPv4 ranges that Kubernetes deals the addresses of its node's pods from (C(podCIDRs)); none of a node
      where the CNI has pools of its own. Only those within the declared ranges.
  returned: success
  type: dict
  sample: {kube-2: [10.244.1.0/24]}
"""

import ipaddress

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_access as access
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_api as kubernetes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ownership


def declared_nodes(record):
    """The host that is to be each node, by the node's name."""
    return {entry["kubernetes_node"]: host for host, entry in record["hosts"].items() if "kubernetes_node" in entry}


def node_findings(nodes, record):
    """Hosts that are no node."""
    cluster, hosts = record["name"], record["hosts"]
    names = {node["metadata"]["name"]: kubernetes.node_addresses(node) for node in nodes}
    declared = declared_nodes(record)
    found = []
    for node, host in sorted(declared.items()):
        if node in names:
            continue
        entry = hosts[host]
        near = sorted(name for name, own in names.items() if {entry["underlay4"], entry["advertise4"]} & set(own))
        meant = f"it is the node {near[0]} by its address. Set" if near else "set"
        found.append(
            f"Host {host} is to be the node {node} of cluster {cluster}, and Kubernetes has no node of that name; "
            f"{meant} isthmus_kubernetes_node to the node's name, or to false for a machine that is none."
        )
    return found


def unknown_nodes(nodes, record):
    """Nodes that are no host."""
    strangers = {node["metadata"]["name"] for node in nodes} - set(declared_nodes(record))
    if not strangers:
        return []
    cluster = record["name"]
    return [
        f"The inventory does not know {kubernetes.some(strangers)}, which Kubernetes has as nodes of cluster "
        f"{cluster}. Pods there are not in the mesh: others do not reach them, nor they others. Add the machines "
        f"to the inventory with isthmus_cluster: {cluster}, or take these nodes out of Kubernetes; where nodes cannot "
        "be entered, use control_plane: in_cluster (docs/kubernetes-managed.md)."
    ]


def has_joined(api):
    """Whether a registrar of this cluster was let in before."""
    try:
        role = api.get(f"{access.RBAC}/clusterroles/{access.NAME}") or {"metadata": {}}
    except kubernetes.Forbidden:
        return False  # who may not look cannot let anybody in either
    return (role["metadata"].get("labels") or {}).get(ownership.MANAGED_BY) == ownership.MANAGER


def pod_cidrs(nodes, record):
    """By host, the ranges of its node's pods."""
    hosts = declared_nodes(record)
    declared = [ipaddress.ip_network(text) for text in record["kubernetes"]["pod_ranges"]]
    found = {}
    for node in nodes:
        given = map(ipaddress.ip_network, (node.get("spec") or {}).get("podCIDRs") or ())
        own = [one for one in given if one.version == 4 and any(one.subnet_of(each) for each in declared)]
        if own and node["metadata"]["name"] in hosts:
            found[hosts[node["metadata"]["name"]]] = [str(one) for one in sorted(own)]
    return found


def range_findings(nodes, service, record):
    """What Kubernetes deals outside of the declared ranges."""
    outer = record["kubernetes"]
    declared = [ipaddress.ip_network(text) for text in outer["pod_ranges"]]
    outside = []
    for node in sorted(nodes, key=lambda one: one["metadata"]["name"]):
        for text in (node.get("spec") or {}).get("podCIDRs") or ():
            network = ipaddress.ip_network(text)
            if network.version == 4 and not any(network.subnet_of(one) for one in declared):
                outside.append(f"{text} of {node['metadata']['name']}")
    found = []
    where = f"isthmus_estate.clusters.{record['name']}.kubernetes"
    if outside:
        found.append(
            f"Nodes give their pods addresses outside of {where}.pod_ranges ({', '.join(outer['pod_ranges'])}): "
            f"{'; '.join(outside[:4])}{f' and {len(outside) - 4} more' if len(outside) > 4 else ''}. Peers refuse such "
            "addresses. Declare the ranges that the CNI deals from."
        )
    address = ((service or {}).get("spec") or {}).get("clusterIP") or ""
    services = ipaddress.ip_network(outer["service_range"])
    if "." in address and ipaddress.ip_address(address) not in services:
        found.append(
            f"Kubernetes' own service has the address {address}, which is not in {where}.service_range ({services}). "
            "Declare the range that the API server was started with (--service-cluster-ip-range)."
        )
    return found


def missing_rights(api):
    """What the operator lacks, in the words of `kubectl auth can-i`."""
    missing = [right for right in access.NEEDED if not api.allowed(*right)]
    given = [right for right in access.GIVEN if not api.allowed(*right)]
    if given and not all(api.allowed(*right) for right in access.ESCALATE):
        missing += given
    return [access.right_words(right) for right in missing]


def rights_problem(api, record):
    missing = missing_rights(api)
    if not missing:
        return []
    return [
        f"The user of that kubeconfig may not do all that lets the registrar into cluster {record['name']} "
        f"({api.server}). It lacks: {'; '.join(missing)}. Use one with these rights (docs/kubernetes.md), or grant "
        "them."
    ]


def ask(module, record, prepares):
    """(problems, warnings, server, nodes as Kubernetes has them); raises what kubernetes_api does."""
    api = kubernetes.connect(module)
    nodes = api.items("/api/v1/nodes")
    wrong = kubernetes.wrong_cluster(api.server, nodes, record, module.params["seen"])
    if wrong:
        return [wrong + "."], [], api.server, nodes
    doubts, strangers = node_findings(nodes, record), unknown_nodes(nodes, record)
    try:
        service = api.get("/api/v1/namespaces/default/services/kubernetes")
    except kubernetes.Forbidden:
        service = None  # nothing else needs that right
    doubts += range_findings(nodes, service, record)
    if not prepares:
        return [], doubts + strangers, api.server, nodes
    problems = doubts + rights_problem(api, record)
    if strangers and not has_joined(api):
        return problems + strangers, [], api.server, nodes
    return problems, strangers, api.server, nodes


def main():
    module = AnsibleModule(
        argument_spec={
            "record": {"type": "dict", "required": True},
            **kubernetes.ARGUMENTS,
        },
        supports_check_mode=True,
    )
    record = module.params["record"]
    prepares = any(one["credential"] is False for one in module.params["seen"])
    pending, server, nodes = "", "", []
    try:
        problems, doubts, server, nodes = ask(module, record, prepares)
    except kubernetes.ApiError as exc:
        problems, doubts, pending = [str(exc) + "."] if prepares else [], [], "" if prepares else str(exc)
    if problems:
        module.fail_json(
            msg=f"Cluster {record['name']} cannot join with its Kubernetes yet; nothing was changed. "
            + " ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1)),
            problems=problems,
        )
    for words in doubts:
        module.warn(words)
    module.exit_json(
        changed=False,
        problems=[],
        pending=pending,
        server=server,
        nodes=sorted(node["metadata"]["name"] for node in nodes),
        pods=pod_cidrs(nodes, record),
    )


if __name__ == "__main__":
    main()
