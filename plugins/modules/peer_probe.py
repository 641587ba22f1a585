#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: peer_probe
short_description: Prove that hosts reach each other's ports, before anything listens there
version_added: 1.0.0
description:
  - With O(state=listening) the host answers on the ports that it will have in the mesh (the overlay's, WireGuard's,
    those of IPsec on a gateway of its site, and etcd's where it is to have a member) for some seconds. Where something
    listens already nothing is put in its way.
  - With O(state=probed) the host asks others on theirs. A datagram must come back, a connection must be made to the
    host that is meant, and an etcd that runs already must have a certificate of its cluster's authority.
  - With O(state=stopped) the host answers no more.
  - What answers is the transient unit C(isthmus-preflight.service), which ends by itself. Nothing else of the host is
    changed, so check mode does the same.
extends_documentation_fragment:
  - isthmus.mesh.attributes.info
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  state:
    description:
      - What the host does.
    type: str
    choices: [listening, probed, stopped]
    required: true
  seconds:
    description:
      - Seconds after which the host stops to answer by itself.
    type: int
    default: 60
  targets:
    description:
      - What the host asks, from the P(isthmus.mesh.peer_probes#filter) filter.
    type: list
    elements: dict
    default: []
    suboptions:
      host:
        description: Name of the other host.
        type: str
        required: true
      address:
        description: Its address, as this host dials it.
        type: str
        required: true
      protocol:
        description: C(tcp) or C(udp).
        type: str
        choices: [tcp, udp]
        required: true
      port:
        description: Number of the port.
        type: int
        required: true
      answers:
        description: Who answers there, what was started for the question (V(listener)) or an V(etcd) that runs.
        type: str
        choices: [listener, etcd]
        required: true
      authority:
        description: Certificate of the authority of that etcd, in PEM; empty when it is not known.
        type: str
        default: ""
      one_is_enough:
        description: Whether it is no problem when another target that says so answers.
        type: bool
        default: false
  timeout:
    description:
      - Seconds to wait for each answer.
    type: int
    default: 3
  wait:
    description:
      - Seconds for which targets are asked again while one that is needed does not answer, for what needs a while to
        let connections through, as load balancers do.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Answer on the ports where nothing listens yet
  isthmus.mesh.peer_probe:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    state: listening

- name: The overlay's port of cloud-1 can be reached
  isthmus.mesh.peer_probe:
    spec: "{{ __plan_result.specs[inventory_hostname] }}"
    state: probed
    targets:
      - host: cloud-1
        address: 198.18.2.11
        protocol: udp
        port: 8472
        answers: listener
"""

RETURN = r"""
listening:
  description: Who answers on the host's ports, V(listener), V(etcd) or V(other), by protocol and port.
  returned: when O(state=listening)
  type: dict
  sample:
    udp/8472: listener
    tcp/2379: etcd
blocked:
  description: Those of O(targets) that do not answer, each with the reason as C(how).
  returned: when O(state=probed)
  type: list
  elements: dict
answered:
  description: How many answer.
  returned: when O(state=probed)
  type: int
"""

import concurrent.futures
import inspect
import json
import sys
import time
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit, listener, packets, ports
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings

AT_ONCE = 32
PAUSE = 1  # seconds until those who asked in vain ask again, as nobody tells when it would be answered


def listen(module):
    """Start what answers; returns who answers where."""
    spec = module.params["spec"]
    stop(module)
    datagrams = [port for protocol, port in openings.listens(spec) if protocol == "udp"]
    member = spec.get("member")
    answers = {f"udp/{port}": "listener" for port in datagrams}
    free = []
    for url in (member["client_url"], member["peer_url"]) if member else ():
        number = urlsplit(url).port
        held = ports.clashes(ports.bound("tcp", number), None)
        if not held:
            free.append(number)
        own = all(ports.holder(one)[1] == etcd_unit.SERVICE for one in held)
        answers[f"tcp/{number}"] = "other" if not own else "etcd" if held else "listener"
    wanted = {"host": spec["host"], "seconds": module.params["seconds"], "tcp": free, "udp": datagrams}
    command = [
        *("systemd-run", "--quiet", "--collect", f"--unit={listener.UNIT}", "--service-type=notify"),
        "--description=Ports of the Isthmus mesh, for a moment",
        "--property=CapabilityBoundingSet=CAP_NET_RAW CAP_NET_BIND_SERVICE",
        *(f"--property=RuntimeMaxSec={module.params['seconds'] + 10}", "--property=TimeoutStartSec=15", "--"),
        *(sys.executable, "-I", "-c", inspect.getsource(listener), json.dumps(wanted)),
    ]
    code, out, err = module.run_command(command)
    if code != 0:
        module.fail_json(
            msg=f"{spec['host']} cannot answer on its ports for the other hosts' question: {(err or out).strip()}; see "
            f"`journalctl -u {listener.UNIT}` there. Nothing was changed."
        )
    return answers


def stop(module):
    # Without the unit systemctl says so, which is what is wanted.
    module.run_command(["systemctl", "stop", listener.UNIT])


def ask(target, source, timeout):
    """Why one target does not answer; empty when it does."""
    address, port = target["address"], target["port"]
    try:
        if target["answers"] == "etcd":
            packets.served_by(address, port, target["authority"], timeout)
            return ""
        if target["protocol"] == "udp":
            name = packets.returned(source, address, port, timeout)
        else:
            name = packets.greeting(address, port, timeout)
    except packets.NoAnswer as exc:
        return str(exc)
    if name != target["host"]:
        return f"{name} answers there: the address leads to another host than the inventory says"
    return ""


def probe(targets, source, timeout, wait):
    deadline = time.monotonic() + wait
    while True:
        found = _probe(targets, source, timeout)
        if not found["blocked"] or time.monotonic() >= deadline:
            return found
        time.sleep(PAUSE)


def _probe(targets, source, timeout):
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        reasons = list(pool.map(lambda target: ask(target, source, timeout), targets))
    answered = [target for target, how in zip(targets, reasons) if not how]
    enough = any(target["one_is_enough"] for target in answered)
    blocked = [
        {**{key: target[key] for key in ("host", "address", "protocol", "port")}, "source": source, "how": how}
        for target, how in zip(targets, reasons)
        if how and not (enough and target["one_is_enough"])
    ]
    return {"blocked": blocked, "answered": len(answered)}


def main():
    target = {
        "host": {"type": "str", "required": True},
        "address": {"type": "str", "required": True},
        "protocol": {"type": "str", "choices": ["tcp", "udp"], "required": True},
        "port": {"type": "int", "required": True},
        "answers": {"type": "str", "choices": ["listener", "etcd"], "required": True},
        "authority": {"type": "str", "default": ""},
        "one_is_enough": {"type": "bool", "default": False},
    }
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "state": {"type": "str", "choices": ["listening", "probed", "stopped"], "required": True},
            "seconds": {"type": "int", "default": 60},
            "targets": {"type": "list", "elements": "dict", "default": [], "options": target},
            "timeout": {"type": "int", "default": 3},
            "wait": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    found = {}
    if parameters["state"] == "listening":
        found = {"listening": listen(module)}
    elif parameters["state"] == "stopped":
        stop(module)
    else:
        source = parameters["spec"]["node"]["underlay4"]
        found = probe(parameters["targets"], source, parameters["timeout"], parameters["wait"])
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
