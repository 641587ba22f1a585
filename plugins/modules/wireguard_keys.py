#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: wireguard_keys
short_description: The host has its keys of WireGuard, and others can be told the public ones
version_added: 1.0.0
description:
  - Makes the private keys of WireGuard that the host's specification has, as M(isthmus.mesh.pki_request) does, and
    returns the public ones. A key that is there stays.
  - Hosts of a site with C(inbound=false), and those that they open sessions to, need each other's public keys before
    any etcd can tell them, so that C(isthmus.mesh.site) collects these and plans with them (M(isthmus.mesh.plan)).
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  directory:
    description: Where keys live.
    type: path
    default: /etc/isthmus/pki
"""

EXAMPLES = r"""
- name: The public keys of the host are known
  isthmus.mesh.wireguard_keys:
    spec: "{{ isthmus_spec }}"
  register: isthmus_keys
"""

RETURN = r"""
public_keys:
  description:
    - The public key in base64, by UDP port; in check mode without those that are to be made.
  returned: success
  type: dict
  sample: {"51871": "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="}
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import wireguard
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        supports_check_mode=True,
    )
    directory = module.params["directory"]
    changes = Changes(module)
    changes.directory(directory)
    found = {}
    for tunnel in openings.tunnels(module.params["spec"]):
        path = os.path.join(directory, os.path.basename(tunnel["key"]))
        wireguard.ensure_key(changes, path)
        public = wireguard.public_key(path)
        if public is not None:
            found[str(tunnel["port"])] = public
    module.exit_json(**changes.result(public_keys=found))


if __name__ == "__main__":
    main()
