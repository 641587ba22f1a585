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
    estate's hosts that need them and for nobody else, and lets in what comes over the mesh's own devices.
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
  bgp:
    description:
      - What the plan has of the host in C(bgp.hosts); its routers are let in too. With C(kept) they are those of FRR.
    type: dict
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
from ansible_collections.isthmus.mesh.plugins.module_utils import firewall, frr, links
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import bgp, openings


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "record": {"type": "dict", "required": True},
            "bgp": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    spec = module.params["spec"]
    changes = Changes(module)
    interface = links.of_address(module, spec["node"]["underlay4"])
    wanted = openings.rules(spec, module.params["record"])
    if module.params["bgp"]:
        kept = module.params["bgp"].get("kept")
        wanted += bgp.openings(bgp.of_conf(frr.text_of(frr.CONF) or "") if kept else module.params["bgp"])
    native = spec["node"]["range4"], openings.native_sources(spec, module.params["record"])
    inner, tunnels = spec["overlay"]["port"], openings.devices(spec)
    active = firewall.open_for(module, changes, wanted, interface, inner, tunnels, native)
    module.exit_json(**changes.result(active=active))


if __name__ == "__main__":
    main()
