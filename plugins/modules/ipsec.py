#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: ipsec
short_description: Tunnels between gateways of sites, and nothing beside them
version_added: 1.0.0
description:
  - On a gateway, gives strongSwan the tunnels that the specification names (C(/etc/swanctl/conf.d/isthmus.conf)), with
    key and certificate of M(isthmus.mesh.pki_request) or pre-shared keys, lets the kernel forward, and has strongSwan
    read what changed. Tunnels that did not change stay as they are.
  - On every host of a site whose packets go through gateways, and through nothing else any more, loads rules of
    netfilter (C(table ip isthmus-ipsec)) that drop what would leave by another way. They are there from boot on
    (C(isthmus-ipsec.service)), and once more in a table that stays when somebody flushes the ruleset
    (C(isthmus-ipsec-keeper.service), C(table ip isthmus-ipsec-kept)), which takes Linux 5.12 and nftables 1.0.
  - Takes away what the specification does not name any more. Connections, secrets and settings of strongSwan that are
    not the mesh's are not touched.
  - Does not wait for a tunnel, which needs the other side too; M(isthmus.mesh.verify) tells why one is not there.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  secrets:
    description:
      - Pre-shared keys by the names of the two sites, in the order of the alphabet with a blank between them. Those of
        other pairs are ignored.
    type: dict
    default: {}
seealso:
  - module: isthmus.mesh.node
"""

EXAMPLES = r"""
- name: Packets to other sites go through the gateway
  isthmus.mesh.ipsec:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    secrets: "{{ isthmus_ipsec_secrets | default({}) }}"
"""

RETURN = r"""
tunnels:
  description: Names of the tunnels of a gateway.
  returned: success
  type: list
  elements: str
  sample: [isthmus-cloud]
esp:
  description: Who encrypts a gateway's packets, V(kernel) or, where it cannot, strongSwan in V(user space).
  returned: on a gateway
  type: str
  sample: kernel
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import gateways
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
        },
        supports_check_mode=True,
    )
    changes = Changes(module)
    names, esp = gateways.apply(module, changes, module.params["spec"].get("ipsec"), module.params["secrets"])
    module.exit_json(**changes.result(tunnels=names, **({"esp": esp} if esp else {})))


if __name__ == "__main__":
    main()
