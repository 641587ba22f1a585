#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: verify
short_description: Prove that the mesh does on a host what the inventory says
version_added: 1.0.0
description:
  - Looks at the host from all sides, units, specification, certificates, etcd and its access rights, published state,
    BPF maps and routes against what the agent wants, names, and packets to the other hosts, to pods on every Kubernetes
    node and to every service, and fails with the list of all problems.
  - On a Kubernetes node it compares the pods that are published with those that are there, and sends packets from a
    pod's network namespace, which it enters for that; it makes no pod.
  - With O(scope=host) it looks only at what the host itself does, and at what worked there before a change, as the
    playbook site does before it goes on to other hosts.
  - Changes nothing.
extends_documentation_fragment:
  - isthmus.mesh.attributes.info
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  record:
    description:
      - The estate record that M(isthmus.mesh.plan) returns.
    type: dict
    required: true
  services:
    description:
      - Definitions of the services that the inventory has in the host's cluster.
    type: list
    elements: dict
    required: true
  absent_services:
    description:
      - Names, C(namespace/name), of services that the inventory takes away there.
    type: list
    elements: str
    default: []
  hosts:
    description:
      - Hosts that packets must reach; those that the run could not reach are left out.
      - With O(scope=step) those of sites with C(routing=auto) of which it is asked whether they are reached natively.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the host.
        type: str
        required: true
      cluster:
        description: Its cluster.
        type: str
        required: true
      mesh4:
        description: Its mesh address.
        type: str
        required: true
  bgp:
    description:
      - What the plan has of the host in C(bgp.hosts). There must be a session with each router, which must have been
        sent the host's range. What no router sends is told only.
    type: dict
  controller_time:
    description:
      - The controller's time, in UTC as C(YYYY-MM-DDTHH:MM:SSZ), to compare the host's clock with.
    type: str
  max_clock_skew:
    description:
      - Seconds by which the host's clock may differ from the controller's.
    type: int
    default: 120
  timeout:
    description:
      - Seconds to wait for each answer.
    type: int
    default: 3
  scope:
    description:
      - V(mesh) looks at everything.
      - V(host) looks at units, the own member of etcd, its list of revoked certificates as O(record) has it, and the
        agent with its datapath, by the specification that is on the host. What other hosts, peers and the rest of the
        record have a part in is left out, since a run may not have come to them yet.
      - V(step) proves, where encryption or native routing is being turned on or off or keys are replaced, that the host
        reaches every other of these sites the new way, as the agent on it runs now. Tunnels between gateways are proven
        on the gateways.
    type: str
    choices: [mesh, host, step]
    default: mesh
  before:
    description:
      - What worked before the change, C(standing) of M(isthmus.mesh.node). With O(scope=host) what worked then and does
        not now is a problem; what did not work then is none.
    type: dict
  wait:
    description:
      - Seconds within which everything must have become as it should be.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: The mesh does what the inventory says
  isthmus.mesh.verify:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    record: "{{ __plan_result.record }}"
    services: "{{ __plan_result.services[isthmus_cluster].present }}"
    absent_services: "{{ __plan_result.services[isthmus_cluster].absent }}"
    hosts:
      - name: cloud-1
        cluster: cloud
        mesh4: 10.102.0.1
"""

RETURN = r"""
problems:
  description: Everything that is not as the inventory says; the module fails when there is something.
  returned: always
  type: list
  elements: str
unreached:
  description:
    - With O(scope=step) those of O(hosts) that are not reached natively, the first of each C(site), with C(cluster),
      C(name), and C(why). They are no RV(problems). C(sure) is false where nothing is known, since the tunnel does not
      lead there either.
    - Null when it could not be found out.
  returned: always
  type: list
  elements: dict
warnings_of_agent:
  description: What the agent reports that is no contradiction to the inventory.
  returned: always
  type: list
  elements: str
loss:
  description:
    - With O(scope=mesh), how many packets of full size were C(sent) to the other hosts, one every 20 ms to each, and by
      name how many to a host were C(lost), where some were. What is lost on the way to a host that answers is no
      problem of the inventory, and told in a warning.
    - Null when it was not measured.
  returned: always
  type: dict
  sample: {"sent": 100, "lost": {"edge-1": 3}}
proofs:
  description: How many facts were proven, by kind.
  returned: always
  type: dict
  sample:
    certificates: 7
    packets: 15
"""

import json
import pathlib
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module
from ansible_collections.isthmus.mesh.plugins.module_utils.verify import (
    agent,
    bgp,
    encryption,
    etcd,
    gateways,
    host,
    native,
    overlay,
    pods,
    services,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import Verifier


def run(verifier):
    if verifier.module.params["scope"] == "host":
        run_host(verifier)
        return
    if verifier.module.params["scope"] == "step":
        verifier.look("encryption", encryption.check_changing)
        verifier.look("routing", native.check_native_way)
        verifier.look("gateways", gateways.check_gateway_way)
        if verifier.problems:  # a session may be why; one of several routers that is away is no reason to wait
            verifier.look("bgp", bgp.check_bgp)
        return
    verifier.look("clock", host.check_clock)
    verifier.look("units", host.check_units)
    verifier.look("spec", host.check_spec)
    verifier.look("certificates", host.check_certificates)
    if verifier.spec.get("member"):
        verifier.look("etcd", etcd.check_etcd)
        verifier.look("etcd", etcd.check_revoked)
    status = verifier.look("agent", agent.check_agent)
    if status is not None:
        verifier.look("services", services.check_services, status)
        verifier.look("peers", agent.check_peers)
        if (verifier.spec.get("registrar") or {}).get("kubernetes"):
            verifier.look("kubernetes", agent.check_kubernetes)
        verifier.look("pods", pods.check_pods)
    verifier.look("packets", overlay.check_packets)
    if status is not None and verifier.spec.get("wireguard"):
        verifier.look("encryption", encryption.check_encrypted)
    if status is not None and verifier.spec.get("native"):
        verifier.look("routing", native.check_native)
    if verifier.spec.get("ipsec"):
        verifier.look("gateways", gateways.check_gateways)
        if status is not None:
            verifier.look("gateways", gateways.check_led, status)
    verifier.look("bgp", bgp.check_bgp)
    verifier.look("packets", overlay.measure_loss)


def run_host(verifier):
    """By the specification on the host: a run with tags may have brought no newer one."""
    try:
        installed = json.loads(pathlib.Path(verifier.NODE).read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return  # such a run on a new host: nothing works here that could be looked at
    if not verifier.spec.get("member"):
        installed["member"] = None
    verifier.spec = installed
    verifier.look("units", host.check_units)
    if verifier.spec.get("member"):
        verifier.look("etcd", etcd.check_own_member)
        verifier.look("etcd", etcd.check_revoked)
    verifier.look("agent", agent.check_own_agent)


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "record": {"type": "dict", "required": True},
            "services": {"type": "list", "elements": "dict", "required": True},
            "absent_services": {"type": "list", "elements": "str", "default": []},
            "hosts": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "cluster": {"type": "str", "required": True},
                    "mesh4": {"type": "str", "required": True},
                },
            },
            "bgp": {"type": "dict"},
            "controller_time": {"type": "str"},
            "max_clock_skew": {"type": "int", "default": 120},
            "timeout": {"type": "int", "default": 3},
            "scope": {"type": "str", "choices": ["mesh", "host", "step"], "default": "mesh"},
            "before": {"type": "dict"},
            "wait": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    if bundle_module(module, "isthmus_agent") is None:
        words = ["no bundle yet, nothing to verify"]
        module.exit_json(changed=False, problems=[], unreached=None, warnings_of_agent=words, loss=None, proofs={})
    deadline = time.monotonic() + module.params["wait"]
    while True:
        verifier = Verifier(module)
        run(verifier)
        if not (verifier.problems or verifier.unreached) or time.monotonic() > deadline:
            break
        time.sleep(verifier.PAUSE)
    for words in verifier.remarks:
        module.warn(words)
    facts = {
        "problems": verifier.problems,
        "unreached": verifier.unreached,
        "warnings_of_agent": verifier.warnings,
        "loss": verifier.loss,
        "proofs": dict(verifier.proofs),
    }
    if verifier.problems:
        scope, waited = module.params["scope"], module.params["wait"]
        wrong = {
            "mesh": "the mesh is not what the inventory says",
            "host": "not everything works after the change",
            "step": "packets cannot go the new way",
        }[scope]
        module.fail_json(
            msg=f"On {verifier.spec['host']} {wrong}{f', for {waited} s' if waited else ''}: "
            + " ".join(f"({number}) {words}" for number, words in enumerate(verifier.problems, 1)),
            **facts,
        )
    module.exit_json(changed=False, **facts)


if __name__ == "__main__":
    main()
