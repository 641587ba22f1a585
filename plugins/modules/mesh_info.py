#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: mesh_info
short_description: Facts about the mesh as one host sees it
version_added: 1.0.0
description:
  - Reads nodes, peers and the registrar from the etcd of this host's cluster, and the status of the host's own agent.
  - Runs on any host of the mesh, with its agent's certificate, and on a host that stands for the etcd of a cluster with
    C(control_plane=in_cluster), where no agent is. Changes nothing.
extends_documentation_fragment:
  - isthmus.mesh.attributes.info
author:
  - Isthmus contributors (@isthmus-mesh)
options: {}
"""

EXAMPLES = r"""
- name: Ask the mesh
  isthmus.mesh.mesh_info:
  register: isthmus_info
"""

RETURN = r"""
mesh:
  description: What the etcd of the cluster holds.
  returned: success
  type: dict
  contains:
    cluster:
      description: The cluster.
      type: str
      sample: onprem
    nodes:
      description: Reports of the nodes; C(alive) is V(none) when the agent does not report.
      type: list
      elements: dict
    peers:
      description: How the mirror of each peer stands, by name.
      type: dict
    leader:
      description: The registrar that leads; V(none) when none does.
      type: dict
    estate:
      description: Revisions of the documents of the estate record.
      type: dict
agent:
  description: The status of the agent on this host; V(none) when it does not answer.
  returned: success
  type: dict
"""

import pathlib

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import estate
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module

SOCKET = "/run/isthmus/agent.sock"


def agent_status(module):
    """The agent's own status document, None when it does not answer, of which a host is warned."""
    cli = bundle_module(module, "isthmus_agent.cli.client")
    try:
        return cli.ask(pathlib.Path(SOCKET), "/v1/status")
    except cli.AgentSilent as exc:
        if not estate.in_pod():
            module.warn(str(exc))
        return None


def main():
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    node = estate.own_node(module)
    facts = bundle_module(module, "isthmus_agent.facts")
    if facts is None:
        module.exit_json(changed=False, mesh={}, agent=None)
    kvstore = bundle_module(module, "isthmus_agent.kvstore")
    etcd = node["etcd"]
    try:
        with kvstore.SyncEtcd(etcd["endpoints"], etcd["ca"], etcd["cert"], etcd["key"]) as client:
            found = facts.mesh(client, node["cluster"]["name"])
    except (kvstore.EtcdError, OSError) as exc:
        module.fail_json(msg=f"the mesh cannot be read: {exc}")
    module.exit_json(changed=False, mesh=found, agent=agent_status(module))


if __name__ == "__main__":
    main()
