#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: global_service
short_description: Register, change or remove a service at run time
version_added: 1.0.0
description:
  - Writes the definition of one service of machines into the etcd of the host's cluster, with the owner V(module). The
    inventory's services and the C(site) playbook leave it alone.
  - A service that the inventory defines is not taken over; the module fails and names both owners.
  - Runs on an etcd host, once for every cluster that takes part in the service.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  state:
    description: Whether the service exists.
    type: str
    choices: [present, absent]
    default: present
  name:
    description: Name, an RFC 1123 label.
    type: str
    required: true
  namespace:
    description: Namespace, an RFC 1123 label.
    type: str
    default: default
  ports:
    description: Ports of the service address. Needed for O(state=present).
    type: list
    elements: dict
    suboptions:
      name:
        description: Name of the port; needed when there are several.
        type: str
        default: ""
      port:
        description: Port of the service address.
        type: int
        required: true
      target_port:
        description: Port of the workloads; the same as O(ports[].port) by default.
        type: int
      protocol:
        description: Transport protocol.
        type: str
        choices: [TCP, UDP]
        default: TCP
  backends:
    description: Which workloads of the namespace serve, by labels or by name. Needed for O(state=present).
    type: dict
    suboptions:
      labels:
        description: All of these labels.
        type: dict
      workloads:
        description: These workloads, C(host/name). An empty list makes a service without backends in this cluster.
        type: list
        elements: str
  health:
    description: Health check of the backends. Without one a backend is ready while it runs.
    type: dict
    suboptions:
      type:
        description: Kind of check.
        type: str
        choices: [tcp, http, exec]
        required: true
      port:
        description: Port to check, for V(tcp) and V(http).
        type: int
      path:
        description: Path to get, for V(http).
        type: str
      command:
        description: Command and arguments, for V(exec).
        type: list
        elements: str
      interval:
        description: Seconds between checks.
        type: float
        default: 1.0
      timeout:
        description: Seconds until a check counts as failed.
        type: float
        default: 1.0
      rise:
        description: Good results in a row that make a backend ready.
        type: int
        default: 2
      fall:
        description: Bad results in a row that take a backend out.
        type: int
        default: 2
  global:
    description: Whether other clusters use this service's backends and it theirs (C(service.cilium.io/global)).
    type: bool
    default: true
  shared:
    description: Whether this cluster offers its backends to others (C(service.cilium.io/shared)).
    type: bool
    default: true
  affinity:
    description: Which backends are preferred (C(service.cilium.io/affinity)).
    type: str
    choices: [none, local, remote]
    default: none
  labels:
    description: Labels of the service.
    type: dict
    default: {}
seealso:
  - module: isthmus.mesh.service_info
"""

EXAMPLES = r"""
- name: A service for the tests of today
  isthmus.mesh.global_service:
    name: canary
    namespace: shop
    ports:
      - port: 80
        target_port: 8080
    backends:
      labels:
        app: canary
    health:
      type: http
      path: /healthz
      port: 8080
  delegate_to: "{{ item }}"
  loop: [onprem-1, cloud-1, edge-1]

- name: It goes again
  isthmus.mesh.global_service:
    name: canary
    namespace: shop
    state: absent
"""

RETURN = r"""
service:
  description: Namespace and name.
  returned: success
  type: str
  sample: shop/canary
cluster:
  description: Cluster in whose etcd the service was written.
  returned: success
  type: str
  sample: onprem
"""

import re

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import estate
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module

OWNER = "module"
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def definition(module):
    """The service's document from the module's options; fails for names that are no labels and for missing parts."""
    params = module.params
    for option in ("name", "namespace"):
        if not LABEL.fullmatch(params[option]):
            module.fail_json(
                msg=f"{option} {params[option]!r} is not an RFC 1123 label: lower-case letters, digits and '-', at "
                "most 63, beginning and ending with a letter or digit"
            )
    if params["state"] == "absent":
        return None
    if len(params["ports"]) > 1 and len({port["name"] for port in params["ports"]}) < len(params["ports"]):
        module.fail_json(msg="ports: with several ports each needs a name of its own")
    backends = {key: value for key, value in params["backends"].items() if value is not None}
    health = params["health"]
    return {
        "owner": OWNER,
        "revision": 0,
        "name": params["name"],
        "namespace": params["namespace"],
        "ports": [{**port, "target_port": port["target_port"] or port["port"]} for port in params["ports"]],
        "backends": backends,
        "health": None if health is None else {key: value for key, value in health.items() if value is not None},
        "global": params["global"],
        "shared": params["shared"],
        "affinity": params["affinity"],
        "labels": params["labels"],
    }


def run(module, changes):
    """Write or remove; returns what exit_json is given."""
    document = definition(module)
    name = f"{module.params['namespace']}/{module.params['name']}"
    node = estate.own_node(module)
    cluster = node["cluster"]["name"]
    if not estate.has_operator(cluster):
        module.fail_json(
            msg=f"this host has no operator's certificate of cluster {cluster}. Delegate the task to one of the "
            "cluster's etcd hosts"
        )
    admin = bundle_module(module, "isthmus_agent.estate_admin")
    kvstore = bundle_module(module, "isthmus_agent.kvstore")
    try:
        with kvstore.SyncEtcd(node["etcd"]["endpoints"], *estate.operator_files(cluster)) as client:
            if document is None:
                if admin.owner_of(client, name) not in (None, OWNER):
                    module.fail_json(
                        msg=f"service {name} belongs to {admin.owner_of(client, name)} and this module removes its own "
                        "services only. Remove it where it is defined"
                    )
                made = admin.write_services(client, [], [name], OWNER, not module.check_mode)
            else:
                made = admin.write_services(client, [document], [], OWNER, not module.check_mode)
    except admin.EstateError as exc:
        module.fail_json(msg=str(exc))
    except (kvstore.EtcdError, OSError) as exc:
        module.fail_json(msg=f"service {name} cannot be written: {exc}")
    estate.show(changes, made)
    return changes.result(service=name, cluster=cluster)


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "name": {"type": "str", "required": True},
            "namespace": {"type": "str", "default": "default"},
            "ports": {
                "type": "list",
                "elements": "dict",
                "options": {
                    "name": {"type": "str", "default": ""},
                    "port": {"type": "int", "required": True},
                    "target_port": {"type": "int"},
                    "protocol": {"type": "str", "choices": ["TCP", "UDP"], "default": "TCP"},
                },
            },
            "backends": {
                "type": "dict",
                "options": {"labels": {"type": "dict"}, "workloads": {"type": "list", "elements": "str"}},
                "mutually_exclusive": [("labels", "workloads")],
                "required_one_of": [("labels", "workloads")],
            },
            "health": {
                "type": "dict",
                "options": {
                    "type": {"type": "str", "choices": ["tcp", "http", "exec"], "required": True},
                    "port": {"type": "int"},
                    "path": {"type": "str"},
                    "command": {"type": "list", "elements": "str"},
                    "interval": {"type": "float", "default": 1.0},
                    "timeout": {"type": "float", "default": 1.0},
                    "rise": {"type": "int", "default": 2},
                    "fall": {"type": "int", "default": 2},
                },
            },
            "global": {"type": "bool", "default": True},
            "shared": {"type": "bool", "default": True},
            "affinity": {"type": "str", "choices": ["none", "local", "remote"], "default": "none"},
            "labels": {"type": "dict", "default": {}},
        },
        required_if=[("state", "present", ["ports", "backends"])],
        supports_check_mode=True,
    )
    module.exit_json(**run(module, Changes(module)))


if __name__ == "__main__":
    main()
