# SPDX-License-Identifier: BSD-2-Clause
"""Gateways of sites: their tunnels are there and pass packets, and nothing goes beside them."""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import packets, strongswan
from ansible_collections.isthmus.mesh.plugins.module_utils.files import read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.encryption import CHANGING, Stage
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.spec import IPSEC_PORTS
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def check_gateways(verifier: Verifier) -> None:
    """A gateway has its tunnels, and on every host nothing goes beside them."""
    own = verifier.spec["ipsec"]
    _check_tunnels(verifier, own.get("connections", []))
    for site, entry in sorted(own["far"].items()):
        verifier.check(
            "gateways",
            entry["stage"] == Stage.DEMANDS.word,
            f"packets to site {site} do not all go through the gateways yet: it is being turned on or off "
            f"({entry['stage']}); {SITE}",
        )
    wanted = ipsec.guard(own)
    for table in (ipsec.GUARD, ipsec.KEPT):
        verifier.check(
            "gateways",
            wanted is None or strongswan.guard_in_kernel(verifier.module, table) == strongswan.guard_wanted(wanted),
            f"the rules that keep packets from other ways than the gateways' (`nft list table ip {table}`) are "
            f"not what the inventory gives; {SITE}",
        )
    verifier.check(
        "gateways",
        wanted is None or f"table ip {ipsec.KEPT} ".encode() not in (read_bytes(strongswan.OPERATORS) or b""),
        f"{strongswan.OPERATORS} has the mesh's table {ipsec.KEPT}, perhaps from `nft list ruleset`: the kernel "
        "refuses all of that file while the mesh's own table is there, so the next restart of nftables.service leaves "
        "this host without its own rules. Next: take that table out of the file",
    )


def check_led(verifier: Verifier, status: Mapping[str, Any]) -> None:
    """Of two gateways both are there; one whose tunnels pass nothing is of no use."""
    found = status.get("gateways") or {"gateways": [], "tunnels": None}
    for one in found["gateways"]:
        verifier.check(
            "gateways",
            one["state"] != "down",
            f"gateway {one['host']} ({one['address']}) of this site does not answer {verifier.spec['host']}, so "
            f"{'nothing reaches the sites behind gateways' if found['lost'] else 'there is no second one'}; see "
            f"`isthmus status` here, and whether {one['host']} runs",
        )
    for site, passing in sorted((found["tunnels"] or {}).items()):
        verifier.check(
            "gateways",
            passing is not False,
            f"nothing passes through the tunnels of this gateway to site {site}: no gateway there answers in them; "
            f"see `swanctl --list-sas` and `journalctl -u {strongswan.UNIT}`",
        )


def check_gateway_way(verifier: Verifier) -> None:
    """A gateway's tunnels to the sites with which they are being turned on, as it is configured now."""
    with open(verifier.NODE, encoding="utf-8") as file:
        own = json.load(file).get("ipsec") or {"far": {}}
    changing = {site for site, entry in own["far"].items() if entry["stage"] in CHANGING}
    _check_tunnels(verifier, [one for one in own.get("connections", []) if one["site"] in changing])


def _check_tunnels(verifier: Verifier, connections: Sequence[Mapping[str, Any]]) -> None:
    """They are there, and packets of full size pass to the other gateway, where that is one of ours."""
    missing = strongswan.missing(verifier.module, connections) if connections else {}
    for one in connections:
        why = missing.get(ipsec.name_of(one))
        name = f"the tunnel to the gateway of site {one['site']} ({one['remote']})"
        if not verifier.check(
            "gateways",
            why is None,
            f"{name} is not there: {why}. UDP {' and '.join(str(port) for port in IPSEC_PORTS)} must be open "
            f"between the two gateways both ways; see `journalctl -u {strongswan.UNIT}` on both",
        ):
            continue
        if "inside" in one and any(ipaddress.ip_address(one["inside"]) in network for network in _networks_of(one)):
            words = _reach_gateway(verifier, one["local"], one["inside"])
            verifier.check(
                "gateways", not words, f"{name} is there, and the other gateway does not answer in it: {words}"
            )


def _reach_gateway(verifier: Verifier, source: str, target: str) -> str:
    try:
        packets.echo(source, target, packets.path_mtu(source, target), verifier.timeout / 3)
    except (packets.NoAnswer, OSError) as exc:
        return str(exc)
    return ""


def _networks_of(connection: Mapping[str, Any]) -> list[ipaddress.IPv4Network]:
    """What lies behind the other gateway."""
    return [ipaddress.ip_network(text) for text in connection["remote_networks"]]
