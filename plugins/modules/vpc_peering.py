#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vpc_peering
short_description: Peer two VPCs of one provider
version_added: 1.0.0
description:
  - Peers two VPCs, on both sides. On Google and Azure their ranges are then routed by the networks themselves, and
    Google's carries routes of M(isthmus.mesh.vpc_routes) over as well; on AWS the peer's ranges need routes
    (O(isthmus.mesh.vpc_routes#module:peers)).
  - A peering that somebody else made between the two is used and left as it is.
extends_documentation_fragment:
  - isthmus.mesh.vpc
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  sides:
    description: The two networks. On AWS the first asks and the second accepts.
    type: list
    elements: dict
    required: true
    suboptions:
      network:
        description: AWS - id of the VPC. Google - name of the VPC network. Azure - name of the virtual network.
        type: str
        required: true
      region:
        description: AWS region; that of the profile or the environment by default.
        type: str
      profile:
        description: AWS profile, for a side in another account; that of the environment by default.
        type: str
      project:
        description: Google project; that of the credentials by default.
        type: str
      subscription:
        description: Azure subscription; C(AZURE_SUBSCRIPTION_ID) by default.
        type: str
      resource_group:
        description: Resource group of the Azure virtual network.
        type: str
seealso:
  - module: isthmus.mesh.vpc_routes
"""

EXAMPLES = r"""
- name: Two VPCs of two accounts
  isthmus.mesh.vpc_peering:
    provider: aws
    owner: mine
    sides:
      - network: vpc-0a1b2c3d
        region: eu-central-1
      - network: vpc-0f0e0d0c
        region: eu-west-1
        profile: second
  delegate_to: localhost

- name: The way to the second VPC's own range
  isthmus.mesh.vpc_routes:
    provider: aws
    region: eu-central-1
    network: vpc-0a1b2c3d
    owner: mine-peer
    hosts: [172.31.0.11]
    peers: [vpc-0f0e0d0c]
  delegate_to: localhost
"""

RETURN = r"""
peering:
  description:
    - On AWS the id of the peering connection, empty when there is none (in check mode also when it would be made). On
      Google and Azure the name of it.
  returned: success
  type: str
  sample: pcx-0a1b2c3d
done:
  description: When a change failed, those before it.
  returned: failure in the middle
  type: list
  elements: str
not_done:
  description: When a change failed, it and those after it.
  returned: failure in the middle
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc import providers
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc.steps import carry_out


def main():
    module = AnsibleModule(
        argument_spec={
            **providers.ARGUMENTS,
            "sides": {"type": "list", "elements": "dict", "required": True, "options": providers.PLACE},
        },
        supports_check_mode=True,
    )
    params = module.params
    if len(params["sides"]) != 2:
        module.fail_json(msg=f"sides: a peering has two, not {len(params['sides'])}")
    if params["provider"] == "azure" and not all(side["resource_group"] for side in params["sides"]):
        module.fail_json(msg="sides: on Azure each needs its resource_group")
    changes = Changes(module)
    provider = providers.load(module)
    plan = providers.planned(module, provider.plan_peering)
    carry_out(module, changes, plan)
    module.exit_json(**changes.result(**plan.result))


if __name__ == "__main__":
    main()
