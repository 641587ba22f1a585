# SPDX-License-Identifier: BSD-2-Clause
"""BGP: a session with each router, which knows this host's range."""

from __future__ import annotations

from ansible_collections.isthmus.mesh.plugins.module_utils import frr
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.bgp import announced, uncovered
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier

SESSION_SECONDS = 7  # within which FRR tries to connect, so that it is seen why it cannot


def check_bgp(verifier: Verifier) -> None:
    """A session with each router, which was told this host's range. What no router sends is told only: one may send
    its servers a default route, which is not taken."""
    own = verifier.module.params["bgp"]
    if not own or own.get("kept"):
        return
    lacking = frr.await_sessions(verifier.module, own, SESSION_SECONDS)
    ranges = announced(own, verifier.spec)
    received = []
    for address in (router["address"] for router in own["routers"]):
        if not verifier.check(
            "bgp",
            address not in lacking,
            f"there is no session with router {address}: {lacking.get(address)}; `bgp` of the plan has what to set "
            f"there, `vtysh -c 'show bgp neighbors {address}'` what FRR knows",
        ):
            continue
        sent = frr.routes(verifier.module, address, "advertised-routes")
        lacks = [network for network in ranges if network not in sent]
        verifier.check("bgp", not lacks, f"router {address} is not sent {', '.join(lacks)}, but {sent}; {SITE}")
        received += frr.routes(verifier.module, address, "routes")
    wanted = openings.native_sources(verifier.spec, verifier.record, outside=True, dealt=True)
    unknown = uncovered(wanted, received)
    if unknown and len(lacking) < len(own["routers"]):
        verifier.warnings.append(
            f"no router sends {verifier.spec['host']} a route to {', '.join(unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}: it may have none, or keep it to itself"
        )
