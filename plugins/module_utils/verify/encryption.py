# SPDX-License-Identifier: BSD-2-Clause
"""Encryption by WireGuard: a session with each host that packets to are encrypted, or are about to be."""

from __future__ import annotations

import json
import time
from typing import Any

from ansible_collections.isthmus.mesh.plugins.module_utils import units
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.encryption import CHANGING, Stage
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier

SESSION = 180  # seconds after which a session of WireGuard is over


def check_encrypted(verifier: Verifier) -> None:
    """After packets to all hosts: each that is to be encrypted has a session, and none is on its way."""
    nodes, wireguard = _ask_encryption(verifier)
    wanted = openings.devices(verifier.spec)
    programs = " ".join(unit for unit, device in units.WIREGUARD.items() if device in wanted)
    words = f"WireGuard is not there; see `systemctl status {programs}`"
    verifier.check("encryption", wireguard and wireguard["implementation"], words)
    reached = {(host["cluster"], host["name"]) for host in verifier.hosts}
    for key, site in sorted(verifier.sites().items()):
        stage = openings.encrypts(verifier.spec, site)
        if stage is Stage.PLAIN or key not in reached:
            continue
        found = nodes.get(key, {}).get("encryption") or {"state": "not known", "reason": None}
        why = f": {found['reason']}" if found["reason"] else ""
        if found["state"] == "idle" and openings.is_one_sided(verifier.spec, site):
            why = f" ({openings.asked(verifier.spec, site, verifier.spec['wireguard']['port'])})"
        good = found["state"] == "encrypted" and stage is Stage.DEMANDS
        turned = f"it is being turned on or off ({stage.word})" if stage.word in CHANGING else "it should be"
        verifier.check(
            "encryption",
            good,
            f"traffic with {key[1]} of cluster {key[0]} (site {site}) is not encrypted as the inventory says: "
            f"{turned}, and is {found['state']}{why}; {SITE}, and see `isthmus status` on both hosts",
        )


def check_changing(verifier: Verifier) -> None:
    """A session with each host of the sites with which encryption is being turned on; while keys are replaced, with
    each host that packets to are encrypted, by both devices."""
    with open(verifier.NODE, encoding="utf-8") as file:
        installed = json.load(file)
    devices = openings.devices(installed)
    stages = (Stage.ACCEPTS, Stage.SENDS) if len(devices) == 1 else tuple(Stage)[1:]
    expected = {
        key: site for key, site in sorted(verifier.sites().items()) if openings.encrypts(installed, site) in stages
    }
    nodes, _wireguard = _ask_encryption(verifier)
    wireguard = verifier.bundle("isthmus_agent.netlink.wireguard")
    endpoints = [nodes[key]["endpoint"] for key in expected if nodes.get(key, {}).get("endpoint")]
    for device in devices:
        wireguard.greet(installed["node"]["underlay4"], endpoints, installed["overlay"]["port"], device)
    time.sleep(verifier.PAUSE / 4)  # for answers
    nodes, _wireguard = _ask_encryption(verifier)
    for (cluster, name), site in expected.items():
        found = nodes.get((cluster, name), {}).get("encryption") or {}
        for number, tunnel in enumerate(openings.tunnels(installed)):
            one = (found.get("second") if number else found) or {"reason": "its node is not published yet"}
            age = one.get("handshake_age")
            why = one["reason"] or f"WireGuard has no answer of it; {openings.asked(installed, site, tunnel['port'])}"
            verifier.check(
                "encryption",
                not one["reason"] and age is not None and age < SESSION,
                f"{name} of cluster {cluster} (site {site}) is not reached through WireGuard: {why}",
            )


def _ask_encryption(verifier: Verifier) -> tuple[dict[tuple[str, str], Any], Any]:
    """What the agent says of each node, by cluster and name."""
    status = verifier.ask()
    return {(one["cluster"], one["name"]): one for one in status["nodes"]}, status["wireguard"]
