#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: vpc_routes
short_description: Make workload ranges routable in a VPC
version_added: 1.0.0
description:
  - Makes routes for workload ranges to the hosts or gateways behind which they are, lets these hosts forward (AWS
    source/destination check, Azure IP forwarding), and opens exactly the ports asked for on exactly the hosts.
  - O(routes) and O(rules) are all that O(owner) has in the network. What it has there beyond them is removed, what was
    changed is put right, what belongs to somebody else is left alone. A destination for which somebody else has a route
    elsewhere is refused, before anything is changed.
  - Ranges that lead to one host are made one route where that leads nothing astray.
extends_documentation_fragment:
  - isthmus.mesh.vpc
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  network:
    description: AWS - id of the VPC. Google - name of the VPC network. Azure - name of the virtual network.
    type: str
    required: true
  region:
    description: AWS region; that of the profile or the environment by default.
    type: str
  profile:
    description: AWS profile; that of the environment by default.
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
  hosts:
    description:
      - Addresses in the network of the hosts to which O(rules) apply, and whose subnets' route tables get the routes.
        By default every O(routes[].via).
    type: list
    elements: str
    default: []
  route_tables:
    description:
      - AWS - ids of the route tables that get the routes, instead of those of the hosts' subnets. Google and Azure have
        no use for it, routes there are the network's or the subnet's.
    type: list
    elements: str
    default: []
  routes:
    description: The routes. Needed for O(state=present), unless there are O(rules) or O(peers).
    type: list
    elements: dict
    default: []
    suboptions:
      destination:
        description: IPv4 prefix of workloads.
        type: str
        required: true
      via:
        description: Address in the network of the host behind which it is.
        type: str
      gateway:
        description:
          - Gateway behind which it is. AWS - an id (C(vgw-), C(tgw-), C(pcx-), C(eni-)...). Google - partial URL of a
            VPN tunnel, forwarding rule or instance, of O(project) when it names none. Azure - C(VirtualNetworkGateway).
        type: str
  peers:
    description:
      - Networks that are peered with it, or will be (M(isthmus.mesh.vpc_peering)). AWS - ids of VPCs, whose own ranges
        get routes to the peering. Azure - C(<resource group>/<virtual network>) of this subscription, in which a
        O(routes[].via) may be. Google has no use for it.
    type: list
    elements: str
    default: []
  rules:
    description: What may reach the hosts.
    type: list
    elements: dict
    default: []
    suboptions:
      protocol:
        description:
          - Transport protocol; V(all) lets everything in, to the hosts and, on Google and Azure where it counts, to the
            destinations of routes that lead to them.
        type: str
        choices: [tcp, udp, all]
        required: true
      port:
        description: Port of the hosts; there is none with V(all).
        type: int
      sources:
        description: IPv4 prefixes or addresses that may reach it.
        type: list
        elements: str
        required: true
  route_limit:
    description:
      - How many routes a table holds. By default AWS's Service Quotas and Google's project are asked, and Azure's
        default of 400 counts.
    type: int
seealso:
  - module: isthmus.mesh.vpc_peering
"""

EXAMPLES = r"""
- name: Routes to two hosts in AWS, the overlay's port open on them
  isthmus.mesh.vpc_routes:
    provider: aws
    region: eu-central-1
    network: vpc-0a1b2c3d
    owner: mine-cloud
    routes:
      - destination: 10.102.0.0/28
        via: 172.31.0.11
      - destination: 10.102.0.16/28
        via: 172.31.0.12
    rules:
      - protocol: udp
        port: 8472
        sources: [172.31.0.0/16, 203.0.113.0/24]
  delegate_to: localhost

- name: All of it goes again
  isthmus.mesh.vpc_routes:
    provider: aws
    region: eu-central-1
    network: vpc-0a1b2c3d
    owner: mine-cloud
    state: absent
  delegate_to: localhost
"""

RETURN = r"""
route_tables:
  description: Route tables that were looked at; on Google the network.
  returned: success
  type: list
  elements: str
  sample: [rtb-0a1b2c3d]
blackholes:
  description: Routes that lead nowhere, as they were found; those of others too.
  returned: success
  type: list
  elements: dict
  contains:
    table:
      description: Route table.
      type: str
    destination:
      description: Prefix.
      type: str
    target:
      description: Where it should lead.
      type: str
    reason:
      description: What the provider says.
      type: str
    owned:
      description: Whether it is one of O(owner).
      type: bool
borrowed:
  description: Destinations for which somebody else has the very same route; it is used, and left when ours go.
  returned: success
  type: list
  elements: dict
  contains:
    table:
      description: Route table.
      type: str
    destination:
      description: Prefix.
      type: str
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
            **providers.PLACE,
            "hosts": {"type": "list", "elements": "str", "default": []},
            "route_tables": {"type": "list", "elements": "str", "default": []},
            "routes": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "destination": {"type": "str", "required": True},
                    "via": {"type": "str"},
                    "gateway": {"type": "str"},
                },
                "mutually_exclusive": [("via", "gateway")],
                "required_one_of": [("via", "gateway")],
            },
            "peers": {"type": "list", "elements": "str", "default": []},
            "rules": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "protocol": {"type": "str", "choices": ["tcp", "udp", "all"], "required": True},
                    "port": {"type": "int"},
                    "sources": {"type": "list", "elements": "str", "required": True},
                },
            },
            "route_limit": {"type": "int"},
        },
        required_if=[("provider", "azure", ["resource_group"])],
        supports_check_mode=True,
    )
    wanted = [name for name in ("routes", "rules", "peers") if module.params[name]]
    if module.params["state"] == "present" and not wanted:
        module.fail_json(
            msg="neither routes nor rules nor peers: nothing would be left of what the owner has there. Next: name "
            "them, or say state: absent to remove all of it"
        )
    changes = Changes(module)
    provider = providers.load(module)
    plan = providers.planned(module, provider.plan_routes)
    carry_out(module, changes, plan)
    module.exit_json(**changes.result(**plan.result))


if __name__ == "__main__":
    main()
