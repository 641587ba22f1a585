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
  - Users of agents whose host is not in the record, and of clusters that the record calls absent, are deleted. What the
    inventory lacks only is in the record, and keeps its rights.
  - Runs on an etcd host of the cluster, with its C(root) certificate.
  - A host with the bundle of an older version, which an upgrade has not reached yet, changes nothing and warns.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  record:
    description: Documents of the estate record by name, as M(isthmus.mesh.plan) returns them.
    type: dict
    required: true
  only:
    description:
      - Make only the users of these nodes, for a run that is limited to them.
      - Everything else is neither changed nor reported.
    type: list
    elements: str
seealso:
  - module: isthmus.mesh.etcd_member
"""

EXAMPLES = r"""
- name: Give every certificate its rights
  isthmus.mesh.etcd_access:
    spec: "{{ isthmus_spec }}"
    record: "{{ isthmus_record }}"
"""

RETURN = r"""
stale:
  description: Users of peers that the record does not know; they were left as they are.
  returned: success
  type: list
  elements: str
  sample: [remote-old]
changes:
  description: What was changed, a line each.
  returned: success
  type: list
  elements: str
  sample: [user isthmus-agent-onprem-4]
"""

import inspect
import platform

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import estate, etcd_unit
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module

PREFIX = "isthmus/v1/estate/"


def ensure(module, admin, estate_admin, spec):
    """Compare and change the rights; an `AccessResult`."""
    cluster = spec["cluster"]["name"]
    record = module.params["record"]
    apply = not module.check_mode
    with admin.EtcdConnector(cluster, directory=etcd_unit.PKI)(spec["etcd"]["endpoints"]) as client:
        only = module.params["only"]
        if only is not None:
            return admin.ensure_access(client, admin.wanted_for_nodes(only), apply=apply, enable=False)
        hosts = record["clusters/" + cluster]["hosts"]
        nodes = [name for name, entry in hosts.items() if entry["state"] != "absent"]
        peers = [peer["name"] for peer in (spec["registrar"] or {"peers": []})["peers"]]
        absent = [
            document["name"]
            for name, document in record.items()
            if name.startswith("clusters/") and document["state"] == "absent"
        ]
        for name in ("roster", "clusters/" + cluster):
            newer = estate_admin.superseded(PREFIX + name, client.get(PREFIX + name), record[name])
            if newer:
                module.warn(f"cluster {cluster}: no user was deleted from its etcd: {newer}")
                absent = None
                break
        in_cluster = record["clusters/" + cluster].get("control_plane") == "in_cluster"
        wanted = admin.wanted_access(cluster, nodes, peers, **({"in_cluster": True} if in_cluster else {}))
        return admin.ensure_access(client, wanted, apply=apply, enable=True, absent=absent)


def is_older(admin):
    """Whether the bundle on this host is of a version whose rights are made in another way."""
    try:
        inspect.signature(admin.ensure_access).bind(None, None, apply=True, enable=True, absent=None)
    except TypeError:
        return True
    return False


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "record": {"type": "dict", "required": True},
            "only": {"type": "list", "elements": "str"},
        },
        supports_check_mode=True,
    )
    spec = module.params["spec"]
    changes = Changes(module)
    what = f"rights in the etcd of cluster {spec['cluster']['name']}"
    admin = bundle_module(module, "isthmus_agent.etcd_admin")
    predicted = module.check_mode and not estate.has_etcd_data()
    if admin is None or predicted:
        changes.note(what, "", "users and roles made")
        module.exit_json(**changes.result(stale=[], changes=[]))
    if is_older(admin):
        # A run that upgrades comes to hosts without etcd first, and predicts with what is there.
        module.warn(
            f"{platform.node()} still has an older version of isthmus.mesh, and the rights in the etcd of cluster "
            f"{spec['cluster']['name']} stay as they are. Next: nothing, when this run comes to the cluster's etcd "
            "hosts too, which makes them; else run isthmus.mesh.site on those"
        )
        module.exit_json(**changes.result(stale=[], changes=[]))
    kvstore = bundle_module(module, "isthmus_agent.kvstore")
    estate_admin = bundle_module(module, "isthmus_agent.estate_admin")
    try:
        done = ensure(module, admin, estate_admin, spec)
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
            f"cluster {spec['cluster']['name']}: etcd has users of clusters that the record does not know: "
            f"{', '.join(done.stale)}. They were left. Next: `etcdctl user delete` those that nobody needs"
        )
    module.exit_json(**changes.result(stale=list(done.stale), changes=list(done.changes)))


if __name__ == "__main__":
    main()
