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
  - Another pre-shared key for a tunnel that is there comes beside the former one, which is used until O(keys=used) and
    O(keys=only) have seen that the other gateway has the new one too.
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
  keys:
    description:
      - What becomes of a pre-shared key that is another than that of a tunnel that is there. V(taken), and everything
        else is made as well; then, when the other gateway has done the same, V(used), and V(only), which takes the
        former one away, has a tunnel made by the new one, and sees that the gateways take each other by certificates
        that were renewed. These two do nothing else.
      - The module fails where the other gateway does not take this one so. Then the tunnel that is there stays, and
        the former key is the only one again.
    type: str
    choices: [taken, used, only]
    default: taken
  before_agent:
    description:
      - Whether M(isthmus.mesh.node) has still to give the agent the specification, by which it leads packets to
        gateways from its first moment on. Then the module does something only on a gateway for which the specification
        has networks behind other gateways that its agent has not heard of, and to which nothing may go otherwise. It
        makes the tunnels there and loads the rules, so that nothing goes in clear. The rest comes after the agent.
      - The module fails where a gateway of the site is not on a network of the host.
    type: bool
    default: false
seealso:
  - module: isthmus.mesh.node
"""

EXAMPLES = r"""
- name: Packets to other sites go through the gateway
  isthmus.mesh.ipsec:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    secrets: "{{ isthmus_ipsec_secrets | default({}) }}"
  register: result

- name: Gateways have tunnels to new sites before agents lead packets there
  isthmus.mesh.ipsec:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    secrets: "{{ isthmus_ipsec_secrets | default({}) }}"
    before_agent: true

- name: The gateways use another pre-shared key when both have it
  isthmus.mesh.ipsec:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    secrets: "{{ isthmus_ipsec_secrets | default({}) }}"
    keys: "{{ item }}"
  loop: [used, only]
  when: result.unproven | length > 0
"""

RETURN = r"""
tunnels:
  description: Names of the tunnels of a gateway.
  returned: without O(before_agent)
  type: list
  elements: str
  sample: [isthmus-cloud]
esp:
  description: Who encrypts a gateway's packets, V(kernel) or, where it cannot, strongSwan in V(user space).
  returned: on a gateway
  type: str
  sample: kernel
unproven:
  description:
    - Names of the tunnels that were made by another pre-shared key, or before this gateway's certificate or the
      authorities that it trusts were renewed.
  returned: with O(keys=taken), without O(before_agent)
  type: list
  elements: str
  sample: [isthmus-cloud]
"""

import signal

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import gateway_proof, gateways
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes


def main():
    # Who ends a run in the middle ends the terminal of this process, and strongSwan would keep the keys of a trial.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "keys": {
                "type": "str",
                "choices": [gateway_proof.TAKEN, gateway_proof.USED, gateway_proof.ONLY],
                "default": gateway_proof.TAKEN,
                "no_log": False,
            },
            "before_agent": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    changes = Changes(module)
    section, secrets, keys = module.params["spec"].get("ipsec"), module.params["secrets"], module.params["keys"]
    if module.params["before_agent"]:
        gateways.before_agent(module, changes, section, secrets)
        module.exit_json(**changes.result())
    if keys != gateway_proof.TAKEN:
        module.exit_json(**changes.result(tunnels=gateway_proof.prove(module, changes, section, secrets, keys)))
    names, esp, unproven = gateways.apply(module, changes, section, secrets)
    module.exit_json(**changes.result(tunnels=names, unproven=unproven, **({"esp": esp} if esp else {})))


if __name__ == "__main__":
    main()
