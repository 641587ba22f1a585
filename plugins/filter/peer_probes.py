# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which ports of other hosts a host asks before the mesh is changed."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: peer_probes
short_description: Which ports of which others the hosts ask
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Gives the targets of M(isthmus.mesh.peer_probe) for every host, so that every port of a host that joins, and every
    port that it needs, is asked from where it will be used, by few hosts each.
  - Of two hosts one at least is new; only hosts that were entered and answer are asked. When a run is for a part of the
    hosts, a new one also asks the running etcd of its cluster, of which one member must answer.
  - Gateways of two sites ask each other on the ports of IPsec when neither has had a part in a tunnel between the two
    sites so far. Later nothing but IKE gets through beside the tunnel, which proves itself.
options:
  _input:
    description:
      - Variables of the hosts that take part, with the results of M(isthmus.mesh.preflight) and
        M(isthmus.mesh.peer_probe).
    type: list
    elements: dict
    required: true
  record:
    description: The estate record that M(isthmus.mesh.plan) returns.
    type: dict
    required: true
  run:
    description: All hosts that the run is for, also those that could not be entered.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Show who would ask whom
  ansible.builtin.debug:
    msg: "{{ ansible_play_hosts | map('extract', hostvars) | list
      | isthmus.mesh.peer_probes(isthmus_record, ansible_play_hosts_all) }}"
"""

RETURN = r"""
_value:
  description: Targets of M(isthmus.mesh.peer_probe), by the host that asks them.
  type: dict
"""

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.encryption import Stage, from_document, keys_of, pair
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.endpoints import beside
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.openings import wireguard_ports
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.spec import IPSEC_PORTS

FROM_EACH_CLUSTER = 3


def peer_probes(members, record, run):
    """The overlay's port, or WireGuard's where the two sites encrypt, from one host of every site at least; etcd's
    client port from the cluster's hosts and from up to `FROM_EACH_CLUSTER` of a peering cluster's etcd hosts; its peer
    port from the other members. Between sites whose gateways have a tunnel, or are to have one, IPsec's from gateway to
    gateway, and nothing else. Hosts of a site to which nobody outside opens anything ask others for WireGuard's ports
    only, and are asked by none of them."""
    heard, joining, begun = {}, set(), {}
    for variables in members:
        name = variables["inventory_hostname"]
        if "listening" in variables.get("__preflight_listener", {}):
            heard[name] = variables["__preflight_listener"]["listening"]
        result = variables.get("__preflight_result", {})
        if result.get("joins"):
            joining.add(name)
        begun[name] = {one["host"]: one["address"] for one in result.get("tunnels", ())}
    questions = _Questions(record, heard, joining, begun, run)
    return {host: questions.of(host) for host in questions.places if host in heard}


class _Questions:
    """`heard`: what each host that answers has said of its ports; `begun`: by gateway, the addresses of those with
    which it is to have its first tunnels; `places`: cluster document and entry by host."""

    def __init__(self, record, heard, joining, begun, run):
        self.overlay = record["roster"]["overlay_port"]
        self.heard, self.joining, self.begun, self.run = heard, joining, begun, run
        self.places = {
            name: (document, entry)
            for key, document in sorted(record.items())
            if key.startswith("clusters/") and document["state"] != "absent"
            for name, entry in sorted(document["hosts"].items())
        }
        self.asked = [name for name in self.places if name in heard]
        places = {entry["site"] for _document, entry in self.places.values()}
        self.stages = from_document(record["roster"].get("encryption"), places)
        self.native = from_document(record["roster"].get("routing"), places)
        self.tunnels = [("udp", port) for port in wireguard_ports([keys_of(record["roster"].get("encryption"))])]
        self.gateways = from_document(record["roster"].get("ipsec"), places)
        self.closed = frozenset(record["roster"].get("closed", ()))
        self.sites = {}
        for name in self.asked:
            self.sites.setdefault(self.places[name][1]["site"], []).append(name)

    def of(self, host):
        """The targets of one host. Of two hosts one is new, so that a mesh that runs is not asked again."""
        own, here = self.places[host]
        found = []
        for number, name in enumerate(self.asked):
            if name == host or not {name, host} & self.joining:
                continue
            if self.gateways.get(pair(here["site"], self.places[name][1]["site"]), Stage.PLAIN) is not Stage.PLAIN:
                found += self.of_gateway(host, name)  # all else by the tunnel, which is not there yet
                continue
            if self.is_inside(self.places[name][1]["site"], here["site"]):
                continue
            document = self.places[name][0]
            etcd = document["etcd"]
            turn = _turn(self.sites[here["site"]], name, number) == host
            wanted = self.datagrams(here["site"], self.places[name][1]["site"]) if turn else []
            if name in etcd["members"] and not self.is_inside(here["site"], self.places[name][1]["site"]):
                if document is own:
                    wanted.append(("tcp", etcd["client_port"]))
                    wanted += [("tcp", etcd["peer_port"])] if host in etcd["members"] else []
                elif host in _askers([one for one in own["etcd"]["members"] if one in self.heard], number):
                    wanted.append(("tcp", etcd["client_port"]))
            for protocol, port in wanted:
                answers = self.heard[name].get(f"{protocol}/{port}")
                if answers in ("listener", "etcd"):
                    found.append(self.target(here, name, protocol, port, answers))
        if host in self.joining and own.get("ca_certificate"):
            port = own["etcd"]["client_port"]
            outside = [one for one in own["etcd"]["members"] if one in own["hosts"] and one not in self.run]
            outside = [one for one in outside if not self.is_inside(here["site"], own["hosts"][one]["site"])]
            found += [self.target(here, one, "tcp", port, "etcd", enough=True) for one in outside]
        return found

    def of_gateway(self, host, name):
        """What a gateway asks another one before there is a tunnel between their sites. When one of the two has a part
        in one already, its rules let only IKE through beside it."""
        if host not in self.begun.get(name, ()) or name not in self.begun.get(host, ()):
            return []
        here, address = self.places[host][1], self.begun[host][name]
        return [
            self.target(here, name, "udp", port, "listener", address=address)
            for port in IPSEC_PORTS
            if self.heard[name].get(f"udp/{port}") == "listener"
        ]

    def is_inside(self, site, other):
        """Whether hosts of a site open all sessions with those of another one, and all else goes through these."""
        return site != other and site in self.closed

    def datagrams(self, site, other):
        """While encryption is turned on or off both ports are needed; the overlay's not where all is native."""
        stage, native = (stages.get(pair(site, other), Stage.PLAIN) for stages in (self.stages, self.native))
        overlay = [] if Stage.DEMANDS in (stage, native) else [("udp", self.overlay)]
        return overlay + ([] if stage is Stage.PLAIN else self.tunnels)

    def target(self, here, name, protocol, port, answers, enough=False, address=None):
        document, entry = self.places[name]
        return {
            "host": name,
            "address": address or entry[beside(entry, here["site"])],
            "protocol": protocol,
            "port": port,
            "answers": answers,
            "authority": document.get("ca_certificate") or "" if answers == "etcd" else "",
            "one_is_enough": enough,
        }


def _turn(hosts, target, number):
    """Of the hosts of a site the one whose turn it is to ask a target, which does not ask itself."""
    place = number % len(hosts)
    chosen = hosts[place] if hosts[place] != target else hosts[(place + 1) % len(hosts)]
    return chosen if chosen != target else None


def _askers(hosts, number):
    return {hosts[(number + step) % len(hosts)] for step in range(min(FROM_EACH_CLUSTER, len(hosts)))}


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"peer_probes": peer_probes}
