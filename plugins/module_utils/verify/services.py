# SPDX-License-Identifier: BSD-2-Clause
"""Services as a host has them: backends, names, and a request to each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import packets, resolver, units
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier

if TYPE_CHECKING:
    from collections.abc import Mapping

RESOLVED = "systemd-resolved.service"


def check_services(verifier: Verifier, status: Mapping[str, Any]) -> None:
    agent = verifier.bundle("isthmus_agent.cli.client")
    found = {(one["namespace"], one["name"]): one for one in agent.ask(verifier.SOCKET, "/v1/services")["services"]}
    for workload in status["workloads"]:
        for service, backend in workload["services"].items():
            verifier.check(
                "backends",
                backend["ready"],
                f"{workload['namespace']}/{workload['name']} on {verifier.spec['host']} is no backend of {service}: "
                f"{backend['reason']}",
            )
    server = name_server(verifier)
    for service in verifier.services:
        name = f"{service['namespace']}/{service['name']}"
        one = found.get((service["namespace"], service["name"]))
        if not verifier.check("services", one is not None, f"{name} is not known here; is the registrar running?"):
            continue
        if verifier.check("services", one["address"], f"{name} has no address yet; is the registrar running?"):
            check_names(verifier, one, server)
            check_requests(verifier, service, one)


def name_server(verifier: Verifier) -> str:
    """Where this host's dnsmasq answers."""
    resolved = units.Systemd(verifier.module).show([RESOLVED])[RESOLVED].get("ActiveState") == "active"
    return resolver.server(resolver.probe(resolved), verifier.spec["node"]["mesh4"])


def check_names(verifier: Verifier, service: Mapping[str, Any], server: str) -> None:
    name, address = service["dns"], service["address"]
    try:
        code, found = packets.query(server, name, "A", verifier.timeout)
        verifier.check("names", found == [address], f"{name} is {found or 'unknown'} at {server}, not {address}")
        code, found = packets.query(server, name, "AAAA", verifier.timeout)
        verifier.check("names", (code, found) == (0, []), f"{name} has AAAA {found} (code {code}) at {server}")
    except packets.NoAnswer as exc:
        verifier.check("names", False, f"{name}: {exc}; see `journalctl -u isthmus-dns`")
    code, out, _err = verifier.module.run_command(["getent", "ahostsv4", name])
    found = sorted({line.split()[0] for line in out.splitlines() if line.split()})
    words = f"the host's own resolver says {found or 'nothing'} for {name}, not {address}; {SITE}"
    verifier.check("names", found == [address], words)


def check_requests(verifier: Verifier, service: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """One request to every TCP port of a service that has a backend."""
    usable = [one for one in found["backends"] if one["used"]]
    name = f"{service['namespace']}/{service['name']}"
    if not usable:
        verifier.warnings.append(f"service {name} has no backend that could answer, so no request was made")
        return
    health = service.get("health") or {}
    for port in service["ports"]:
        if port["protocol"] != "TCP":
            continue
        asked = (found["dns"], health.get("path") or "/") if health.get("type") == "http" else None
        if asked and health.get("port") not in (None, port["target_port"]):
            asked = None
        try:
            packets.request(found["address"], port["port"], verifier.timeout, asked)
        except packets.NoAnswer as exc:
            words = f"{name} at {found['address']}:{port['port']} does not answer: {exc} ({len(usable)} backends)"
            verifier.check("services", False, words)
        else:
            verifier.proofs["services"] += 1
