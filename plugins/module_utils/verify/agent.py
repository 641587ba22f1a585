# SPDX-License-Identifier: BSD-2-Clause
"""What the agent says of itself and the kernel, of peers and of the API server."""

from __future__ import annotations

import time
from typing import Any

from ansible_collections.isthmus.mesh.plugins.module_utils import standing
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.services import (
    check_names,
    check_requests,
    name_server,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier

FRESH = 30  # seconds after which a peer's proof is too old
PROBED = 6  # seconds after its start within which an agent knows who answers and who does not


def check_agent(verifier: Verifier) -> dict[str, Any] | None:
    agent = verifier.bundle("isthmus_agent.cli.client")
    try:
        status = agent.ask(verifier.SOCKET, "/v1/status")
        audit = agent.ask(verifier.SOCKET, "/v1/audit")
    except agent.AgentSilent as exc:
        verifier.check("agent", False, f"{exc}")
        return None
    datapath = status["datapath"]
    verifier.check("agent", datapath["state"] == "applied", f"its datapath is {datapath['state']}: {datapath['error']}")
    same = status["spec_hash"] == verifier.spec["hash"]
    verifier.check("agent", same, f"it runs with another specification than planned; {SITE}")
    verifier.check("agent", status["etcd"]["connected"], f"it has no connection to etcd: {status['etcd']['error']}")
    verifier.check("agent", status["reports"]["error"] is None, f"it cannot report: {status['reports']['error']}")
    verifier.warnings = status["warnings"]
    if verifier.check("datapath", not audit["problems"], "the kernel is not as the agent wants it"):
        return status
    verifier.problems.pop()
    verifier.problems += [f"datapath: {words}" for words in audit["problems"]]
    return status


def check_own_agent(verifier: Verifier) -> None:
    agent = verifier.bundle("isthmus_agent.cli.client")
    before = verifier.module.params["before"]
    try:
        services = agent.ask(verifier.SOCKET, "/v1/services")
        end = time.monotonic() + PROBED
        while before and not standing.is_settled(before, services) and time.monotonic() < end:
            time.sleep(verifier.PAUSE)
            services = agent.ask(verifier.SOCKET, "/v1/services")
        status, audit = (agent.ask(verifier.SOCKET, f"/v1/{what}") for what in ("status", "audit"))
    except agent.AgentSilent as exc:
        verifier.check("agent", False, f"{exc}")
        return
    datapath = status["datapath"]
    verifier.check("agent", datapath["state"] == "applied", f"its datapath is {datapath['state']}: {datapath['error']}")
    words = f"it runs with another specification than {verifier.NODE}; see `journalctl -u isthmusd` there"
    verifier.check("agent", status["spec_hash"] == verifier.spec["hash"], words)
    if not before:
        return
    verifier.problems += standing.worse(before, status, services, audit)
    found = {f"{one['namespace']}/{one['name']}": one for one in services["services"]}
    server = name_server(verifier)
    for service in verifier.services:
        name = f"{service['namespace']}/{service['name']}"
        one = found.get(name)
        if name not in before["services"] or one is None or not one["address"]:
            continue
        check_names(verifier, one, server)
        # Without a health check nobody knows whether a backend listens at all.
        health = service.get("health") or {}
        ports = [port for port in service["ports"] if health and health.get("port") in (None, port["target_port"])]
        check_requests(verifier, {**service, "ports": ports}, one)


def check_peers(verifier: Verifier) -> None:
    agent = verifier.bundle("isthmus_agent.cli.client")
    for peer in agent.ask(verifier.SOCKET, "/v1/peers")["peers"]:
        if peer["name"] not in verifier.reached:
            continue
        good = peer["state"] == "connected" and peer["age"] is not None and peer["age"] <= FRESH
        words = f"{peer['name']} is {peer['state']}, the last proof is {peer['age']} s old"
        verifier.check(
            "peers", good, f"{words}; see `journalctl -u isthmus-registrar` on the etcd hosts of {verifier.cluster}"
        )


def check_kubernetes(verifier: Verifier) -> None:
    """The registrar follows the API server, and everything there has its place in the mesh."""
    agent = verifier.bundle("isthmus_agent.cli.client")
    api = agent.ask(verifier.SOCKET, "/v1/peers")["kubernetes"]
    journal = f"see `journalctl -u isthmus-registrar` on the etcd hosts of {verifier.cluster}"
    if not verifier.check("kubernetes", api is not None, f"no registrar has told of the API server yet; {journal}"):
        return
    verifier.check(
        "kubernetes",
        api["state"] == "connected",
        f"the API server {api['server']} is {api['state']} since {api['since']} ({api['error'] or 'no reason'}): "
        f"what was published stands, nothing newer comes; {journal}",
    )
    for words in api["problems"]:
        verifier.check("kubernetes", False, words)
