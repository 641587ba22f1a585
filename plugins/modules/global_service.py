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
  - Options mean what the keys of the same names mean in C(isthmus_estate.services), and are checked by the same rules.
  - Runs on an etcd host, once for every cluster that takes part in the service. Of a cluster with
    C(control_plane=in_cluster) that is the host that stands for its etcd.
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
        description: These workloads, C(host/name), of any cluster; each cluster uses its own.
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
        description:
          - Port to check, for V(tcp) and V(http); the target port of the first TCP port by default.
        type: int
      path:
        description: Path to get, for V(http); V(/) by default.
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
  kubernetes:
    description:
      - Whether it becomes a Service of the same name and namespace when the host's cluster is a Kubernetes cluster, so
        that pods use it by the cluster's DNS. Elsewhere it says nothing. Needs O(global=true).
    type: bool
    default: false
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

import dataclasses
import json

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import estate
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import model, schema
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module

OWNER = "module"
KEYS = ("name", "namespace", "ports", "backends", "health", "global", "shared", "affinity", "labels", "kubernetes")


def definition(module):
    """The service's document, None for one that is to go; fails for options that the inventory would not take."""
    params = module.params
    name = f"{params['namespace']}/{params['name']}"
    problems = []
    if params["state"] == "absent":
        for option in ("name", "namespace"):
            schema.LABEL.read(params[option], option, problems)
        found = None
    else:
        try:
            found = model.read_service({key: params[key] for key in KEYS}, f"service {name}")
        except model.ModelError as exc:
            problems = exc.problems
    if problems:
        words = " ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        module.fail_json(msg=f"service {name} cannot be used as it is written; nothing was changed. {words}")
    return None if found is None else dataclasses.replace(found, owner=OWNER, revision=0).to_dict()


def unknown(module, changes, name, document):
    """What check mode says where etcd cannot be asked, because the agent's bundle is missing."""
    module.warn("this host has no agent bundle, so whether the service is registered already is not known")
    if document is not None:
        changes.note(f"service {name}", "", json.dumps(document, indent=2, sort_keys=True))


def run(module, changes):
    """Write or remove; returns what exit_json is given."""
    document = definition(module)
    name = f"{module.params['namespace']}/{module.params['name']}"
    node = estate.own_node(module)
    cluster = node["cluster"]["name"]
    if document is not None and "kubernetes" not in node["cluster"]:
        document.pop("kubernetes", None)
    if not estate.has_operator(cluster):
        module.fail_json(
            msg=f"this host has no operator's certificate of cluster {cluster}. Delegate the task to one of the "
            "cluster's etcd hosts"
        )
    admin = bundle_module(module, "isthmus_agent.estate_admin")
    kvstore = bundle_module(module, "isthmus_agent.kvstore")
    if admin is None or kvstore is None:
        unknown(module, changes, name, document)
        return changes.result(service=name, cluster=cluster)
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
                    "name": {"type": "str"},
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
            "kubernetes": {"type": "bool", "default": False},
        },
        required_if=[("state", "present", ["ports", "backends"])],
        supports_check_mode=True,
    )
    module.exit_json(**run(module, Changes(module)))


if __name__ == "__main__":
    main()
