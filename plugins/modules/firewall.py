#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: firewall
short_description: Let the mesh through the firewall of a host
version_added: 1.0.0
description:
  - Opens the ports of the mesh in C(ufw) and C(firewalld), those of the two that are active, for the addresses of the
    estate's hosts that need them and for nobody else, and lets in what comes over the mesh's own device.
  - Adds rules and takes away its own, and touches no rule of anybody else. M(isthmus.mesh.teardown) takes them away.
  - Does nothing where neither is active.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  record:
    description:
      - The estate record that M(isthmus.mesh.plan) returns.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: The firewall lets the mesh in
  isthmus.mesh.firewall:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    record: "{{ __plan_result.record }}"
"""

RETURN = r"""
active:
  description: The firewalls that are active, V(ufw) or V(firewalld).
  returned: success
  type: list
  elements: str
  sample: [ufw]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import firewall, links
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes


def addresses(document, here, names):
    """From which hosts of a cluster's document packets come: within a site never by the address that others dial."""
    found = set()
    for name in names:
        entry = document["hosts"].get(name)
        if entry is not None:
            found |= (
                {entry["underlay4"]} if entry["site"] == here["site"] else {entry["underlay4"], entry["advertise4"]}
            )
    return found


def rules(spec, record):
    """What docs/ports.md says of this host: (protocol, port, source), in order."""
    clusters = [doc for key, doc in record.items() if key.startswith("clusters/") and doc["state"] != "absent"]
    own = record[f"clusters/{spec['cluster']['name']}"]
    here = own["hosts"][spec["host"]]
    wanted = [("udp", spec["overlay"]["port"], [(doc, doc["hosts"]) for doc in clusters])]
    if spec.get("member"):
        etcd = own["etcd"]
        readers = [(doc, doc["hosts"] if doc is own else doc["etcd"]["members"]) for doc in clusters]
        wanted += [("tcp", etcd["client_port"], readers), ("tcp", etcd["peer_port"], [(own, etcd["members"])])]
    return sorted(
        (protocol, port, source)
        for protocol, port, senders in wanted
        for source in set().union(*(addresses(doc, here, names) for doc, names in senders))
        if source not in (here["underlay4"], here["advertise4"])
    )


def main():
    module = AnsibleModule(
        argument_spec={"spec": {"type": "dict", "required": True}, "record": {"type": "dict", "required": True}},
        supports_check_mode=True,
    )
    spec = module.params["spec"]
    changes = Changes(module)
    interface = links.of_address(module, spec["node"]["underlay4"])
    active = firewall.open_for(module, changes, rules(spec, module.params["record"]), interface)
    module.exit_json(**changes.result(active=active))


if __name__ == "__main__":
    main()
