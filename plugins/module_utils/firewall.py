# SPDX-License-Identifier: BSD-2-Clause
"""Firewalls of a host, found by their own tools and files, and what would open the mesh's ports in them.

Reads only. Whether a packet passes is proven by packets of other hosts; this gives the words for one that does not.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.files import read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ansible.module_utils.basic import AnsibleModule

DEVICE = "isthmus0"
UFW_CONF = "/etc/ufw/ufw.conf"

Port = tuple[str, int]
"""Protocol (`tcp` or `udp`) and number."""


@dataclass(frozen=True)
class Firewall:
    """`words`: what is in the way. `commands`: by port, as `tcp/2379`, what opens one that its rules do not name."""

    name: str
    words: str
    commands: dict[str, str]
    device: str  # lets in what comes over the mesh's own device
    keep: str = ""  # how the commands outlive a reboot, when they do not do so by themselves


def find(module: AnsibleModule, ports: Iterable[Port], interface: str) -> list[Firewall]:
    """Those that are active here and do not let everybody in on all of `ports`; `interface` has the host's address."""
    wanted = list(ports)
    ufw = _ufw(module, wanted)
    firewalld = _firewalld(module, wanted, interface)
    found = [one for one in (ufw, firewalld) if one is not None]
    found += _nftables(module, wanted, _ufw_enabled(), firewalld is not None)
    return [one for one in found if one.commands]


def describe(found: Firewall) -> str:
    """What is there and what would open it, in a sentence or two."""
    commands = "; ".join(f"`{command}`" for command in [*found.commands.values(), found.device])
    return f"{found.words} Nothing of it was touched. To open what the mesh needs: {commands}.{found.keep}"


def _run(module: AnsibleModule, *command: str) -> str | None:
    """Output of a command that ended well; None without it."""
    if not module.get_bin_path(command[0], opt_dirs=["/usr/sbin", "/sbin"]):
        return None
    code, out, _err = module.run_command(list(command), environ_update={"LC_ALL": "C"})
    return str(out) if code == 0 else None


def _ufw_enabled() -> bool:
    # Its unit is active also where it is switched off.
    return re.search(rb"^ENABLED=yes\s*$", read_bytes(UFW_CONF) or b"", re.MULTILINE) is not None


def _ufw(module: AnsibleModule, ports: list[Port]) -> Firewall | None:
    status = _run(module, "ufw", "status") if _ufw_enabled() else None
    if status is None or "Status: active" not in status:
        return None
    verbose = _run(module, "ufw", "status", "verbose") or ""
    if re.search(r"^Default: allow \(incoming\)", verbose, re.MULTILINE):
        return None
    # "2379/tcp    ALLOW       Anywhere"
    rows = [re.split(r"\s{2,}", line.strip()) for line in status.splitlines()]
    open_to_all = {row[0] for row in rows if len(row) > 2 and row[1] in ("ALLOW", "ALLOW IN") and row[2] == "Anywhere"}
    return Firewall(
        "ufw",
        "ufw is active (`ufw status`).",
        {
            f"{protocol}/{port}": f"ufw allow {port}/{protocol}"
            for protocol, port in ports
            if not {f"{port}/{protocol}", str(port), "Anywhere"} & open_to_all
        },
        f"ufw allow in on {DEVICE}",
    )


def _firewalld(module: AnsibleModule, ports: list[Port], interface: str) -> Firewall | None:
    if (_run(module, "firewall-cmd", "--state") or "").strip() != "running":
        return None
    zone = _run(module, "firewall-cmd", f"--get-zone-of-interface={interface}") if interface else None
    zone = (zone or _run(module, "firewall-cmd", "--get-default-zone") or "public").strip()
    target = (_run(module, "firewall-cmd", "--permanent", f"--zone={zone}", "--get-target") or "").strip()
    closed = [
        (protocol, port)
        for protocol, port in ports
        if target != "ACCEPT"
        and _run(module, "firewall-cmd", f"--zone={zone}", f"--query-port={port}/{protocol}") is None
    ]
    return Firewall(
        "firewalld",
        f"firewalld is active; zone {zone} has {interface or 'the interfaces without a zone of their own'} "
        f"(`firewall-cmd --zone={zone} --list-all`).",
        {f"{protocol}/{port}": f"firewall-cmd --zone={zone} --add-port={port}/{protocol}" for protocol, port in closed},
        f"firewall-cmd --zone=trusted --add-interface={DEVICE}",
        " Then `firewall-cmd --runtime-to-permanent`.",
    )


def _nftables(module: AnsibleModule, ports: list[Port], ufw: bool, firewalld: bool) -> Iterator[Firewall]:
    """Base chains that drop what no rule of theirs accepts. Those of ufw and firewalld are told with these."""
    text = _run(module, "nft", "-j", "list", "chains")
    try:
        entries: list[dict[str, Any]] = json.loads(text or "{}").get("nftables", [])
    except ValueError:
        entries = []
    chains = [entry["chain"] for entry in entries if "chain" in entry]
    for chain in chains:
        if chain.get("hook") != "input" or chain.get("policy") != "drop" or chain["family"] not in ("ip", "inet"):
            continue
        table = f"{chain['family']} {chain['table']}"
        if (ufw and table == "ip filter") or (firewalld and chain["table"] == "firewalld"):
            continue
        where = f"{table} {chain['name']}"
        yield Firewall(
            "nftables",
            f"The nftables chain `{where}` drops what no rule in it accepts (`nft list chain {where}`).",
            {
                f"{protocol}/{port}": f"nft insert rule {where} {protocol} dport {port} accept"
                for protocol, port in ports
            },
            f"nft insert rule {where} iifname {DEVICE} accept",
            " Add the same to where your rules are kept (/etc/nftables.conf, or the tool that writes them).",
        )
    if chains:
        return  # iptables of today writes them
    rules = "" if ufw else _run(module, "iptables", "-S", "INPUT") or ""
    if "-P INPUT DROP" in rules.splitlines():
        yield Firewall(
            "iptables",
            "The policy of iptables' chain INPUT is DROP (`iptables -S INPUT`).",
            {
                f"{protocol}/{port}": f"iptables -I INPUT -p {protocol} --dport {port} -j ACCEPT"
                for protocol, port in ports
            },
            f"iptables -I INPUT -i {DEVICE} -j ACCEPT",
            " Add the same to where your rules are kept (netfilter-persistent, or the tool that writes them).",
        )
