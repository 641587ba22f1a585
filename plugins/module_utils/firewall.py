# SPDX-License-Identifier: BSD-2-Clause
"""Firewalls of a host, found by their own tools and files, what would open the mesh's ports in them, and, where the
operator asked for it, that.

Whether a packet passes is proven by packets of other hosts; `find` gives the words for one that does not. ufw and
firewalld can be managed (`isthmus_firewall: managed`): rules are added and taken away, the operator's own are never
touched, and neither is what the firewall does otherwise.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.files import atomic_write, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.openings import ANYWHERE
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.spec import WIREGUARD_DEVICES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

DEVICE = "isthmus0"
UFW_CONF = "/etc/ufw/ufw.conf"
STATE = "/var/lib/isthmus/firewalld.json"
"""Which of firewalld's rules are ours: `[zone, rule]` each. It has no place for a comment, as ufw has."""

_DEVICES = (DEVICE, *WIREGUARD_DEVICES)
_COMMENT = "isthmus.mesh"
_TRUSTED = "trusted"

Rule = tuple[str, int, str]
"""Protocol, port, and the address that may send to it."""

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
    return (
        f"{found.words} It was left alone. Unless it lets in the mesh's hosts already, this opens what the mesh needs: "
        f"{commands}.{found.keep}"
    )


def _run(module: AnsibleModule, *command: str) -> str | None:
    """Output of a command that ended well; None without it."""
    if not _has(module, command[0]):
        return None
    code, out, _err = module.run_command(list(command), environ_update={"LC_ALL": "C"})
    return str(out) if code == 0 else None


def _has(module: AnsibleModule, program: str) -> bool:
    return bool(module.get_bin_path(program, opt_dirs=["/usr/sbin", "/sbin"]))


def _firewalld_runs(module: AnsibleModule) -> bool:
    return (_run(module, "firewall-cmd", "--state") or "").strip() == "running"


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
    if not _firewalld_runs(module):
        return None
    zone = _zone(module, interface)
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


def _zone(module: AnsibleModule, interface: str) -> str:
    """firewalld's zone of an interface; "" is none."""
    zone = _run(module, "firewall-cmd", f"--get-zone-of-interface={interface}") if interface else None
    return (zone or _run(module, "firewall-cmd", "--get-default-zone") or "public").strip()


MANAGED = ("ufw", "firewalld")


def open_for(
    module: AnsibleModule,
    changes: Changes,
    rules: Iterable[Rule],
    interface: str,
    inner: int,
    tunnels: Iterable[str],
    native: tuple[str, Iterable[str]] = ("", ()),
) -> list[str]:
    """Let in what `rules` and the mesh's own devices need, by the firewalls that are active; returns their names.

    Rules of ours that are not wanted any more go. What comes over the devices was checked by the mesh's programs.
    `inner` is the UDP port of the overlay's packets inside WireGuard, whose devices are `tunnels`. `native` are the
    host's range and the ranges from which packets come to it without a tunnel.
    """
    wanted = list(rules)
    to, sources = native[0], list(native[1])
    active = []
    if _ufw_enabled() and "Status: active" in (_run(module, "ufw", "status") or ""):
        active.append("ufw")
        # As ufw shows it again.
        texts = [
            f"allow {port}/{protocol}"
            if source == ANYWHERE
            else f"allow from {source} to any port {port} proto {protocol}"
            for protocol, port, source in wanted
        ]
        through = [f"allow in on {tunnel} to any port {inner} proto udp" for tunnel in tunnels]
        texts += [f"allow from {source} to {to}" for source in sources]
        _ufw_rules(module, changes, [f"allow in on {DEVICE}", *through, *texts])
    if _firewalld_runs(module):
        active.append("firewalld")
        zone = _zone(module, interface)
        entries = [
            (
                zone,
                f'rule family="ipv4"{_source(source)} port port="{port}" protocol="{protocol}" accept',
            )
            for protocol, port, source in wanted
        ]
        entries += [
            (zone, f'rule family="ipv4" source address="{source}" destination address="{to}" accept')
            for source in sources
        ]
        _firewalld_rules(module, changes, [*((_TRUSTED, device) for device in (DEVICE, *tunnels)), *entries])
    return active


def _source(address: str) -> str:
    return "" if address == ANYWHERE else f' source address="{address}"'


def close(module: AnsibleModule, changes: Changes) -> list[str]:
    """Take away every rule of ours; returns the names of the firewalls that had one."""
    had = []
    if any(_COMMENT in line for line in _ufw_added(module)):
        had.append("ufw")
        _ufw_rules(module, changes, [])
    if os.path.exists(STATE):
        if _has(module, "firewall-cmd") and not _firewalld_runs(module):
            module.fail_json(
                msg=f"firewalld does not run on this host, and {STATE} names rules of the mesh in its permanent "
                "configuration, which would be in force when it starts again. They can be taken away only while it "
                "runs. Next: `systemctl start firewalld` and run again; if it is never to run again, delete that file "
                "and run again: the rules stay in its configuration"
            )
        had.append("firewalld")
        _firewalld_rules(module, changes, [])
    return had


def _must(module: AnsibleModule, *command: str) -> None:
    code, out, err = module.run_command(list(command), environ_update={"LC_ALL": "C"})
    if code != 0:
        module.fail_json(
            msg=f"`{' '.join(command)}` failed: {(err or out).strip()}. The firewall is as it was before that command. "
            "Next: solve that and run again, or set isthmus_firewall: unmanaged and open the ports by hand "
            "(docs/ports.md)."
        )


def _ufw_added(module: AnsibleModule) -> list[str]:
    """As `ufw allow from 192.0.2.1 to any port 2379 proto tcp comment 'isthmus.mesh'`, without the first word."""
    lines = (_run(module, "ufw", "show", "added") or "").splitlines()
    return [line[len("ufw ") :].strip() for line in lines if line.startswith("ufw ")]


def _ufw_rules(module: AnsibleModule, changes: Changes, wanted: list[str]) -> None:
    mark = f" comment '{_COMMENT}'"
    added = _ufw_added(module)
    ours = [line[: -len(mark)] for line in added if line.endswith(mark)]
    # One that the operator has too would become ours with our comment.
    theirs = {line.partition(" comment ")[0] for line in added if not line.endswith(mark)}
    for text in wanted:
        if text not in ours and text not in theirs:
            changes.note(f"ufw {text}", "", "added")
            if not module.check_mode:
                _must(module, "ufw", *text.split(), "comment", _COMMENT)
    for text in ours:
        if text not in wanted:
            changes.note(f"ufw {text}", "added", "")
            if not module.check_mode:
                _must(module, "ufw", "delete", *text.split())


def _firewalld_rules(module: AnsibleModule, changes: Changes, wanted: list[tuple[str, str]]) -> None:
    ours = [tuple(one) for one in json.loads(read_bytes(STATE) or b"[]")]
    zones = sorted({zone for zone, _rule in [*ours, *wanted]})
    present = {mode: set(_firewalld_present(module, zones, mode)) for mode in ((), ("--permanent",))}
    somewhere = set().union(*present.values())
    missing = [one for one in wanted if any(one not in found for found in present.values())]
    # One that the operator has too does not become ours.
    kept = [one for one in wanted if one in ours or one not in somewhere]
    doomed = [one for one in ours if one not in wanted]
    for one, before, after in [*((one, "", "added") for one in missing), *((one, "added", "") for one in doomed)]:
        changes.note(f"firewalld zone {one[0]}: {one[1]}", before, after)
    if not module.check_mode and (missing or doomed):
        _note_firewalld(sorted({*kept, *ours}))  # before they are there: what is cut short is still known
        for mode, found in present.items():
            lacking = [one for one in missing if one not in found]
            for verb, entries in (("add", lacking), ("remove", [one for one in doomed if one in found])):
                for zone in sorted({zone for zone, _rule in entries}):
                    # In one call: each takes a good part of a second.
                    options = [_option(verb, rule) for where, rule in entries if where == zone]
                    _must(module, "firewall-cmd", *mode, f"--zone={zone}", *options)
        _note_firewalld(sorted(kept))


def _firewalld_present(module: AnsibleModule, zones: list[str], mode: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for zone in zones:
        for line in (_run(module, "firewall-cmd", *mode, f"--zone={zone}", "--list-rich-rules") or "").splitlines():
            yield zone, line.strip()
        for device in _DEVICES:
            if _run(module, "firewall-cmd", *mode, f"--zone={zone}", f"--query-interface={device}") is not None:
                yield zone, device


def _option(verb: str, rule: str) -> str:
    return f"--{verb}-interface={rule}" if rule in _DEVICES else f"--{verb}-rich-rule={rule}"


def _note_firewalld(entries: list[tuple[str, str]]) -> None:
    if entries:
        os.makedirs(os.path.dirname(STATE), exist_ok=True)
        atomic_write(STATE, (json.dumps(entries, indent=1) + "\n").encode(), 0o644, 0, 0)
    elif os.path.exists(STATE):
        os.unlink(STATE)
