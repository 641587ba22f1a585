#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: node
short_description: Make a host a member of the mesh
version_added: 1.0.0
description:
  - Writes the host's specification and its copy of the estate record, the systemd units of the agent, the registrar
    (on etcd hosts), the name server and, where packets are encrypted and the kernel has no WireGuard, C(wireguard-go).
  - At a boot addresses of the mesh are unreachable from before the network is up until the agent runs, by
    C(isthmus-boot-routes.service), so that nothing which is for them leaves by the default route. Where
    C(systemd-networkd) sets up the network, C(ManageForeignRoutes=no) keeps it from removing these routes then.
  - Joins the mesh's names to the host's own resolution.
  - Starts or restarts only what changed, and waits until it is ready. Renewed certificates need no restart.
  - The agent's datapath is pinned in the kernel, so a restart of the agent interrupts no connection.
  - A change of the specification, the units or the resolver is a numbered generation. What was there before is kept
    below C(/var/lib/isthmus/generations), and a timer on the host restores it 60 seconds after the change unless that
    is confirmed. The action plugin of the same name confirms it over a new connection, which also finds that the
    host's resolver still answers. When it does not come to that, the task fails for this host once the host is back.
  - What is found of the resolver is whether a name of the mesh leads to the mesh's address of it, when the mesh has
    any, and whether the first server of C(/etc/resolv.conf) answers for the root of all names, when it did before.
    Wrong answers for other names are not seen. The copy of the estate record never goes back.
  - The timer is of systemd's transient ones, so a boot within these seconds forgets it; C(isthmus rollback) on the
    host does the same by hand.
  - Needs nothing but Python on the host; the bundle is laid down before by M(isthmus.mesh.bundle).
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  estate:
    description:
      - The estate record that M(isthmus.mesh.plan) returns; every host keeps a copy.
    type: dict
    required: true
  bundle_digest:
    description:
      - Digest of the installed bundle, as M(isthmus.mesh.bundle) returns it; a new one restarts agent and registrar.
    type: str
    required: true
  timeout:
    description:
      - Seconds to wait until what was started is ready.
    type: int
    default: 120
  token:
    description:
      - Names the change. The action plugin fills it in; a playbook cannot set it.
    type: str
    default: ""
  confirm:
    description:
      - Confirms the change with this token and does nothing else. The action plugin fills it in; a playbook cannot set
        it.
    type: str
seealso:
  - module: isthmus.mesh.verify
"""

EXAMPLES = r"""
- name: The host is a member of the mesh
  isthmus.mesh.node:
    spec: "{{ __isthmus_plan.specs[inventory_hostname] }}"
    estate: "{{ __isthmus_plan.record }}"
    bundle_digest: "{{ __isthmus_bundle.digest }}"
"""

RETURN = r"""
units:
  description: State of each unit of the mesh on this host, after the run (before it, in check mode).
  returned: always
  type: dict
  sample:
    isthmusd.service: active
    isthmus-dns.service: active
resolver:
  description: How the mesh's names were joined to the host's resolution, V(resolved) or V(file).
  returned: always
  type: str
  sample: file
generation:
  description: Number of the generation that the change made; V(null) when it made none.
  returned: success
  type: int
  sample: 4
standing:
  description:
    - What worked on the host just before the change made a generation, for M(isthmus.mesh.verify); V(null) when it made
      none, or no agent answered.
  returned: success
  type: dict
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import bundle, resolver, standing, units, wireguard
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.generations import Generations, described
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.generations import SECONDS, SPEC, WAITING

AGENT = "isthmusd.service"
REGISTRAR = "isthmus-registrar.service"
DNS = "isthmus-dns.service"
DNS_PATH = "isthmus-dns-reload.path"
DNS_RELOAD = "isthmus-dns-reload.service"
BPFFS = "isthmus-bpffs.service"
RESOLVED = "isthmus-resolved.service"
DNSMASQ = "/etc/isthmus/dnsmasq.conf"

# What makes a generation: the units to start anew when a path is restored, and the mark of our part of an operator's
# file. Not the copy of the estate record: what the clusters wrote there since is no less true.
PARTS = {
    SPEC: ((AGENT,), ""),
    units.BOOT_ROUTES: ((), ""),
    units.NETWORKD_DROP_IN: ((), ""),
    DNSMASQ: ((DNS,), ""),
    resolver.RESOLV_CONF: ((DNS,), resolver.MARK),
    bundle.CURRENT: ((AGENT, REGISTRAR), ""),
    **{
        units.Units.path(name): ((name,), "")
        for name in (AGENT, REGISTRAR, DNS, DNS_PATH, RESOLVED, units.BOOT_ROUTES_UNIT, *units.WIREGUARD)
    },
    **{units.Units.path(name): ((), "") for name in (BPFFS, DNS_RELOAD)},
}

# What the registrar reads of the specification; a change elsewhere (a workload, a label) does not restart it.
REGISTRAR_PARTS = ("schema", "estate", "cluster", "dns", "etcd", "member", "registrar")


def document(value):
    """A JSON document as a person reads it in a diff, always with the same bytes for the same value."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "estate": {"type": "dict", "required": True},
            "bundle_digest": {"type": "str", "required": True, "no_log": False},
            "timeout": {"type": "int", "default": 120},
            "token": {"type": "str", "default": "", "no_log": False},
            "confirm": {"type": "str"},
        },
        supports_check_mode=True,
    )
    spec = module.params["spec"]
    changes = Changes(module)
    generations = Generations(module, PARTS)
    if module.params["confirm"] is not None:
        confirm(module, generations, spec)
    runner = units.Units(module, changes)

    theirs = runner.systemd.show(["systemd-resolved.service", units.NETWORKD])
    found = resolver.probe(theirs["systemd-resolved.service"].get("ActiveState") == "active")
    mesh_address, domain = spec["node"]["mesh4"], spec["dns"]["domain"]
    dnsmasq = resolver.dnsmasq_conf(mesh_address, domain, resolver.upstream(found))
    bundle = module.params["bundle_digest"]
    has_pods = bool(spec["node"].get("kubernetes_node"))
    agent_config = units.config_digest(units.agent_unit("", has_pods), bundle, document(spec))
    registrar_config = units.config_digest(
        units.registrar_unit(""), bundle, document({part: spec.get(part) for part in REGISTRAR_PARTS})
    )
    dns_config = units.config_digest(units.dns_unit(""), dnsmasq)
    has_registrar = spec.get("registrar") is not None
    devices = openings.devices(spec)
    in_user_space = bool(devices) and not wireguard.in_kernel(module)
    tunnels = {
        unit: units.config_digest(units.wireguard_unit("", device)) if in_user_space and device in devices else None
        for unit, device in units.WIREGUARD.items()
    }
    unit_files = {
        BPFFS: units.bpffs_unit(),
        units.BOOT_ROUTES_UNIT: units.boot_routes_unit(),
        AGENT: units.agent_unit(agent_config, has_pods),
        REGISTRAR: units.registrar_unit(registrar_config) if has_registrar else None,
        **{unit: config and units.wireguard_unit(config, units.WIREGUARD[unit]) for unit, config in tunnels.items()},
        DNS: units.dns_unit(dns_config),
        DNS_PATH: units.dns_reload_path_unit(),
        DNS_RELOAD: units.dns_reload_unit(),
        RESOLVED: units.resolved_unit(mesh_address, domain) if found.method == "resolved" else None,
    }
    wanted = {SPEC: document(spec), units.BOOT_ROUTES: units.boot_routes(spec), DNSMASQ: dnsmasq}
    wanted[units.NETWORKD_DROP_IN] = units.networkd_drop_in() if units.has_networkd(theirs[units.NETWORKD]) else None
    wanted.update({units.Units.path(name): text for name, text in unit_files.items()})
    if found.method == "file":
        wanted[resolver.RESOLV_CONF] = resolver.joined_file(found.original)
    differs = any(read_bytes(path) != (text and text.encode()) for path, text in wanted.items())
    number = before = None
    if (differs or generations.waiting() is not None) and not module.check_mode:
        before = standing.ask(module.run_command)
        seconds = module.params["timeout"] + SECONDS
        number = generations.begin(spec["hash"], module.params["token"], resolver.root_answers(), seconds)

    changes.directory("/etc/isthmus")
    changes.directory("/var/lib/isthmus")
    changes.directory(resolver.STATE_DIRECTORY)
    changes.file(SPEC, wanted[SPEC])
    changes.file("/etc/isthmus/estate.json", document(module.params["estate"]))
    changes.file(units.BOOT_ROUTES, wanted[units.BOOT_ROUTES])
    if wanted[units.NETWORKD_DROP_IN] is not None:
        changes.directory(os.path.dirname(units.NETWORKD_DROP_IN))
        changes.file(units.NETWORKD_DROP_IN, wanted[units.NETWORKD_DROP_IN])
    else:
        changes.absent(units.NETWORKD_DROP_IN)
    changes.file(DNSMASQ, dnsmasq)
    runner.write(unit_files)
    names = [units.BOOT_ROUTES_UNIT, DNS, DNS_PATH, AGENT] + ([REGISTRAR] if has_registrar else [])
    names += [unit for unit, config in tunnels.items() if config is not None]
    runner.daemon_reload([BPFFS, DNS_RELOAD, RESOLVED, *names], names)

    # Any start of another unit would start it too, once it is enabled.
    runner.running(units.BOOT_ROUTES_UNIT)
    runner.running(DNS, dns_config, DNSMASQ)
    runner.running(DNS_PATH)
    if has_registrar:
        runner.running(REGISTRAR, registrar_config, SPEC)
    for unit, config in tunnels.items():
        if config is not None:
            runner.running(unit, config)
    runner.running(AGENT, agent_config, SPEC)
    if not module.check_mode:
        wait(module, runner, names, generations, number)

    join_resolver(module, changes, runner, found, generations, number)
    if number is not None:
        generations.finish(number)
    module.exit_json(**changes.result(units=runner.states, resolver=found.method, generation=number, standing=before))


def confirm(module, generations, spec):
    """Ends the module with what became of the change; ``problem`` is why it is not confirmed, when it still waits."""
    made = generations.made_by(module.params["confirm"])
    problem = ""
    if made is not None and made.state == WAITING:
        if made.files is None:
            problem = "the change was not completed"
        elif made.note:
            problem = "it is being taken back"  # some of its files may be gone
        else:
            problem = resolver.problem(spec["dns"]["domain"], made.root_answered)
        if not problem:
            made = generations.confirm(made.number)
    module.exit_json(changed=False, made=described(made), problem=problem)


def wait(module, runner, names, generations, number):
    """Fails with the unit's own last words when something does not become ready in time."""
    failed = runner.wait(names, module.params["timeout"])
    if not failed:
        return
    spec = module.params["spec"]
    back = ""
    if number is not None:
        generations.give_up(number)
        back = f"Generation {number} is not confirmed, so the host goes back to what it was within {SECONDS} s. "
    words = [
        f"{name} is {state['state']}; its last lines:\n{state['journal']}" for name, state in sorted(failed.items())
    ]
    module.fail_json(
        msg=f"On {spec['host']} not everything became ready within {module.params['timeout']} s. "
        f"Nothing that worked before was stopped: the datapath in the kernel stays. {back}"
        "Read `journalctl -u <unit>` there and run the playbook again.\n" + "\n".join(words),
        units=runner.states,
    )


def join_resolver(module, changes, runner, found, generations, number):
    """The last step, when the name server already answers."""
    if found.method == "resolved":
        spec = module.params["spec"]
        differs = units.resolved_differs(module, spec["node"]["mesh4"], spec["dns"]["domain"])
        runner.running(RESOLVED, wrong="systemd-resolved has other settings for isthmus0" if differs else "")
        if not module.check_mode:
            wait(module, runner, [RESOLVED], generations, number)
        return
    if not found.joined:
        if found.link is not None:
            changes.file(resolver.ORIGINAL_LINK, found.link)
        else:
            changes.absent(resolver.ORIGINAL_LINK)
        if found.original is not None:
            changes.file(resolver.ORIGINAL, found.original)
        else:
            changes.absent(resolver.ORIGINAL)
    elif found.link is None and found.original is not None:
        changes.file(resolver.ORIGINAL, found.original)
    changes.file(resolver.RESOLV_CONF, resolver.joined_file(found.original))


if __name__ == "__main__":
    main()
