# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which ports of which hosts do not answer from which others, in words."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: blocked_ports
short_description: Which ports do not answer from which hosts, in words
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Takes what M(isthmus.mesh.peer_probe) found on every host, and the firewalls that M(isthmus.mesh.preflight) found on
    those that do not answer.
options:
  _input:
    description: Variables of the hosts that take part.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what does not answer
  ansible.builtin.debug:
    msg: "{{ ansible_play_hosts | map('extract', hostvars) | list | isthmus.mesh.blocked_ports }}"
"""

RETURN = r"""
_value:
  description: A line for each port of a host that does not answer; empty when all do.
  type: list
  elements: str
"""

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.spec import IPSEC_PORTS


def blocked_ports(members):
    """Grouped by what does not answer, with the hosts that asked. What the run itself will open is none of them."""
    results = {variables["inventory_hostname"]: variables for variables in members}
    askers = {}
    for name, variables in results.items():
        for one in variables.get("__preflight_reached", {}).get("blocked") or []:
            key = (one["host"], one["address"], one["protocol"], one["port"], one["how"])
            askers.setdefault(key, []).append(f"{name} ({one['source']})")
    lines = []
    for (host, address, protocol, port, how), names in sorted(askers.items()):
        result = results.get(host, {}).get("__preflight_result")
        remedy = _remedy(result, host, f"{protocol}/{port}", how)
        if remedy is not None:
            what = f"{protocol.upper()} {port} of {host} ({address}) does not answer from {', '.join(names)}: {how}."
            lines.append(f"{what} {remedy}")
    return lines


def _remedy(result, host, port, how):
    is_gateways = port in [f"udp/{number}" for number in IPSEC_PORTS]
    told_by = ("isthmus_underlay", "ipsec.gateways[].address" if is_gateways else "isthmus_advertise")
    if " answers there" in how:
        return f"Next: correct {' or '.join(told_by)} of {host}, or what forwards the address to it."
    if result is None:
        return (
            f"{host} is not in this run, so its firewalls were not looked at: see there (`ufw status`, `firewall-cmd "
            "--state`, `nft list ruleset`), and between the two."
        )
    for wall in result.get("firewalls") or []:
        if port in wall["commands"]:
            if wall["managed"]:
                return None
            return f"On {host}: {wall['words']}"
    return (
        f"No firewall was found on {host} that would be in the way: look between the two (a router, a cloud's security "
        f"group, a rule in another table: `nft list ruleset` on {host}), and whether the address is {host}'s "
        f"({', '.join(told_by)}). docs/ports.md lists who must reach what."
    )


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"blocked_ports": blocked_ports}
