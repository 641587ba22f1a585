# SPDX-License-Identifier: GPL-3.0-or-later
"""What a real `isthmusd` makes of the kernel's routes where another site is behind a gateway: there, put back, gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bpf.topology import bare_nodes, wait_for
from integration.test_agent_native import SITES, Host, Pair, pair
from isthmus_agent.desired.addressing import IPSEC_RULE_PRIORITY, IPSEC_TABLE
from isthmus_mesh.spec import spec_hash

# For the full run until it has passed.
pytestmark = [pytest.mark.root, pytest.mark.slow]

FAR = "198.51.100.0/24"


def behind_gateway(host: Host, via: str | None) -> None:
    """Everything of the other site is behind the gateway `via`, None: behind none; as `site` brings it."""
    path = host.daemon.directory / "node.json"
    spec = json.loads(path.read_text())
    spec.pop("ipsec", None)
    if via is not None:
        far = {host.other: {"stage": "demands", "networks": [FAR]}}
        spec["ipsec"] = {"sites": SITES, "networks": ["198.18.0.0/16"], "far": far, "via": via}
    spec["hash"] = spec_hash(spec)
    path.write_text(json.dumps(spec))
    host.daemon.stop()
    host.daemon.start()


def test_what_is_behind_the_gateway_is_led_there_and_stays_so(tmp_path: Path) -> None:
    with bare_nodes() as nodes, pair(tmp_path, nodes, "plain") as both:
        gateway = str(both.b.node.underlay)

        def there() -> tuple[str, bool]:
            # A table without a route is none, which `ip` takes for an error.
            route = both.a.run("sh", "-c", f"ip route show table {IPSEC_TABLE} proto 73 2>&1; true")
            return route, f"{IPSEC_RULE_PRIORITY}:" in both.a.run("ip", "rule")

        def led() -> bool:
            route, rule = there()
            return f"{FAR} via {gateway} dev eth0" in route and "mtu 1400" in route and rule

        def gone() -> bool:
            route, rule = there()
            return FAR not in route and not rule

        def mtu() -> bool:
            return "mtu 1350" in both.a.run("ip", "route", "get", "10.102.0.2")

        behind_gateway(both.a, gateway)
        wait_for(led, "the route to the gateway", 30)
        wait_for(mtu, "a smaller MTU to the other site's hosts", 30)
        assert both.dial() != []
        both.a.run("ip", "route", "del", FAR, "table", str(IPSEC_TABLE))
        wait_for(led, "the route is back", 30)
        both.a.run("ip", "rule", "del", "priority", str(IPSEC_RULE_PRIORITY))
        wait_for(led, "the rule is back", 30)
        assert_no_program(both)
        behind_gateway(both.a, None)
        wait_for(gone, "route and rule are gone", 30)


def assert_no_program(both: Pair) -> None:
    """Those of native routing are for native routing only."""
    assert "underlay" not in both.a.filters()
