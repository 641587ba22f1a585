# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which hosts are copies of others, in words."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: copied_hosts
short_description: Which hosts are copies of others, in words
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Compares what M(isthmus.mesh.preflight) found of the mesh on each host. A copy of a machine has the specification of
    another host, or its private key of WireGuard.
  - A specification of a host that the record does not know is none of a copy, since such a host has left, or has
    another name now.
  - Of hosts that do not take part the public keys in the record count, which it has of hosts that others reach before
    any etcd tells them.
options:
  _input:
    description: Variables of the hosts that take part.
    type: list
    elements: dict
    required: true
  record:
    description: The estate record that M(isthmus.mesh.plan) returns; may be empty.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show which hosts are copies
  ansible.builtin.debug:
    msg: "{{ ansible_play_hosts | map('extract', hostvars) | list | isthmus.mesh.copied_hosts(isthmus_record) }}"
"""

RETURN = r"""
_value:
  description: A line for each copy, and for each key that several hosts have; empty when there is none.
  type: list
  elements: str
"""

NODE = "/etc/isthmus/node.json"
AGAIN = "`isthmus.mesh.teardown --limit {}`, and run again: it gets keys of its own"


def copied_hosts(members, record):
    """A key that is told with the specification beside it is not told again."""
    known = {
        name: (document["name"], entry)
        for key, document in sorted(record.items())
        if key.startswith("clusters/") and document["state"] != "absent"
        for name, entry in document["hosts"].items()
    }
    found = {
        variables["inventory_hostname"]: variables["__preflight_result"]
        for variables in members
        if "public_keys" in variables.get("__preflight_result", {})
    }
    copies = {
        name: result["installed"]
        for name, result in sorted(found.items())
        if result["installed"] != name and result["installed"] in known
    }
    lines = [_copy(name, original, known[original][0]) for name, original in copies.items()]
    holders = {}
    for name, result in found.items():
        for path, key in result["public_keys"].items():
            holders.setdefault(key, {})[name] = path
    for name, (_cluster, entry) in known.items():
        for key in entry.get("public_keys", {}).values() if name not in found else ():
            holders.setdefault(key, {})[name] = "by the estate record"
    for key, hosts in sorted(holders.items()):
        if len([name for name in hosts if copies.get(name) not in hosts]) > 1:
            lines.append(_one_key(key, hosts))
    return lines


def _copy(name, original, cluster):
    return (
        f"{name} cannot join the mesh yet; nothing was changed on it. Its {NODE} is that of {original}, a host of "
        f"cluster {cluster}: it is a copy of that machine and has its keys, by which all others would take the one for "
        f"the other, or ansible_host of {name} leads to {original}. Next: correct ansible_host, or take the mesh off "
        f"the copy, {AGAIN.format(name)}."
    )


def _one_key(key, hosts):
    holders = [f"{name} ({where})" for name, where in sorted(hosts.items())]
    return (
        f"{', '.join(holders[:-1])} and {holders[-1]} have one private key of WireGuard; nothing was changed on any of "
        f"them. Its public key is {key}. All others would cut off each of them, as their packets would go to whoever "
        f"has the key. Next: take the mesh off those that are copies of the other machine, {AGAIN.format('HOST')}."
    )


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"copied_hosts": copied_hosts}
