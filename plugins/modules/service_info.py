#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: service_info
short_description: Facts about the services of the mesh
version_added: 1.0.0
description:
  - Reads what the cluster of this host knows of services, with definition, address and the ready backends by cluster.
  - Runs on any host of the mesh, with its agent's certificate. Changes nothing.
extends_documentation_fragment:
  - isthmus.mesh.attributes.info
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  name:
    description: Only services with this name.
    type: str
  namespace:
    description: Only services of this namespace.
    type: str
"""

EXAMPLES = r"""
- name: The service has backends in both clusters
  isthmus.mesh.service_info:
    name: web
    namespace: shop
  register: web

- name: Both clusters offer it
  ansible.builtin.assert:
    that: "{{ web.services[0].clusters.keys() | list == ['cloud', 'onprem'] }}"
"""

RETURN = r"""
services:
  description: Services by namespace and name.
  returned: success
  type: list
  elements: dict
  contains:
    namespace:
      description: Namespace.
      type: str
      sample: shop
    name:
      description: Name.
      type: str
      sample: web
    definition:
      description: The definition in this cluster, with C(owner) and C(revision); V(none) when only peers have it.
      type: dict
    address:
      description: Address of the service in this cluster.
      type: str
      sample: 10.111.0.2
    clusters:
      description: What each cluster offers, C(backends) (addresses that are ready) and C(shared).
      type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import estate
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module


def main():
    module = AnsibleModule(
        argument_spec={"name": {"type": "str"}, "namespace": {"type": "str"}}, supports_check_mode=True
    )
    node = estate.own_node(module)
    facts = bundle_module(module, "isthmus_agent.facts")
    if facts is None:
        module.exit_json(changed=False, services=[])
    kvstore = bundle_module(module, "isthmus_agent.kvstore")
    etcd = node["etcd"]
    try:
        with kvstore.SyncEtcd(etcd["endpoints"], etcd["ca"], etcd["cert"], etcd["key"]) as client:
            found = facts.services(client, node["cluster"]["name"])
    except (kvstore.EtcdError, OSError) as exc:
        module.fail_json(msg=f"services cannot be read: {exc}")
    wanted = {option: value for option, value in module.params.items() if value is not None}
    services = [entry for entry in found if all(entry[option] == value for option, value in wanted.items())]
    module.exit_json(changed=False, services=services)


if __name__ == "__main__":
    main()
