#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: etcd_access
short_description: Rights of every certificate name in a cluster's etcd
version_added: 1.0.0
description:
  - Makes the users and roles of a cluster's etcd and switches authentication on. A user is the common name of a client
    certificate that this cluster's own authority signed; there are no passwords.
  - Agents write their own host's keys only, the registrar C(cilium/) and what it allots, the operator what Ansible
    writes. A peer's registrar reads what Cilium's role C(remote) may read and the mirror of that peer's own keys.
  - Runs on an etcd host of the cluster, with its C(root) certificate. Users of hosts or peers that the plan does not
    know are reported and left.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  nodes:
    description: All hosts of the cluster, by node name.
    type: list
    elements: str
    required: true
  only:
    description:
      - Make only the users of these nodes, for a run that is limited to them.
      - Everything else is neither changed nor reported.
    type: list
    elements: str
  prune:
    description: Users of agents or peers to delete, by full name, when the plan does not know them any more.
    type: list
    elements: str
    default: []
seealso:
  - module: isthmus.mesh.etcd_member
"""

EXAMPLES = r"""
- name: Give every certificate its rights
  isthmus.mesh.etcd_access:
    spec: "{{ isthmus_spec }}"
    nodes: "{{ isthmus_record['clusters/onprem'].hosts | list }}"
"""

RETURN = r"""
stale:
  description: Users of agents and peers that the plan does not know; they were left as they are.
  returned: success
  type: list
  elements: str
  sample: [isthmus-agent-onprem-9]
changes:
  description: What was changed, a line each.
  returned: success
  type: list
  elements: str
  sample: [user isthmus-agent-onprem-4]
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module


def ensure(module, admin, spec):
    """Compare and change the rights; an `AccessResult`."""
    cluster = spec["cluster"]["name"]
    registrar = spec["registrar"] or {"peers": []}
    peers = [peer["name"] for peer in registrar["peers"]]
    only = module.params["only"]
    everything = admin.wanted_access(cluster, module.params["nodes"], peers)
    wanted = everything if only is None else admin.wanted_for_nodes(only)
    connect = admin.EtcdConnector(cluster)
    with connect(spec["etcd"]["endpoints"]) as client:
        return admin.ensure_access(
            client, wanted, everything.users, module.params["prune"], apply=not module.check_mode, enable=only is None
        )


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "only": {"type": "list", "elements": "str"},
            "prune": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    spec = module.params["spec"]
    changes = Changes(module)
    what = f"rights in the etcd of cluster {spec['cluster']['name']}"
    admin = bundle_module(module, "isthmus_agent.etcd_admin")
    predicted = module.check_mode and not os.path.isdir(os.path.join(etcd_unit.DATA, "member"))
    if admin is None or predicted:
        changes.note(what, "", "users and roles made")
        module.exit_json(**changes.result(stale=[], changes=[]))
    kvstore = bundle_module(module, "isthmus_agent.kvstore")
    try:
        done = ensure(module, admin, spec)
    except (kvstore.EtcdError, OSError) as exc:
        if module.check_mode and isinstance(exc, kvstore.EtcdUnavailable):
            # The run would start it before.
            module.warn(f"{exc}. The rights cannot be compared now; they are taken to be right")
            module.exit_json(**changes.result(stale=[], changes=[]))
        module.fail_json(msg=f"{exc}. Run the etcd_member module first, or look at `journalctl -u isthmus-etcd`")
    if done.changes:
        changes.note(what, "", "\n".join(done.changes))
    if done.stale:
        module.warn(
            f"cluster {spec['cluster']['name']}: etcd users that the plan does not know were left: "
            f"{', '.join(done.stale)}. Name them in isthmus_prune to delete them"
        )
    module.exit_json(**changes.result(stale=list(done.stale), changes=list(done.changes)))


if __name__ == "__main__":
    main()
