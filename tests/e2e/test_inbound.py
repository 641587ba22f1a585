# SPDX-License-Identifier: GPL-3.0-or-later
"""The edge site behind an address translation: the running estate is told so, the router translates what comes from
there and lets nothing in, and only hosts of the site open anything. What goes between sites is looked at in the
router's namespace."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import EDGE, ONPREM_CLIENT
from e2e.test_wireguard import NAME, capture, states
from estate_tools import Estate, Wire
from installation import variant
from isthmus_lab import CONTROLLER_IN_ROUTER, ROUTER
from playbook import play
from router_capture import packets

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

SITE, NETWORK = "edge", "198.18.3.0/24"
OTHERS = ("onprem", "cloud")
ROUTER_OF_SITE = {"onprem": "198.18.1.1", "cloud": "198.18.2.1"}
TABLE = "isthmus_translation"


def behind(estate: dict[str, Any], _: Any) -> None:
    estate["sites"] = {**(estate.get("sites") or {}), SITE: {"inbound": False}}
    estate["sites"] |= {site: estate["sites"].get(site, {}) for site in OTHERS}
    pairs = [pair for pair in estate["site_pairs"] if set(pair["sites"]) not in [{SITE, site} for site in OTHERS]]
    estate["site_pairs"] = pairs + [{"sites": [site, SITE], "encryption": "wireguard"} for site in OTHERS]


def in_router(*words: str, feed: str | None = None) -> str:
    command = ["nsenter", f"--net=/run/netns/{ROUTER}", *words]
    return subprocess.run(command, input=feed, text=True, check=True, capture_output=True).stdout


@contextlib.contextmanager
def translation(bridge: str) -> Iterator[None]:
    """Between the site's bridge and those of the others; the controller enters as before."""
    in_router(
        "nft",
        "-f",
        "-",
        feed=f"table ip {TABLE} {{\n"
        "  counter asked { }\n"
        "  chain postrouting {\n"
        "    type nat hook postrouting priority srcnat;\n"
        f'    ip saddr {NETWORK} oifname != "{bridge}" oifname != "{CONTROLLER_IN_ROUTER}" masquerade random\n'
        "  }\n"
        "  chain forward {\n"
        "    type filter hook forward priority filter;\n"
        f'    oifname != "{bridge}" accept\n'
        f'    iifname {{ "{bridge}", "{CONTROLLER_IN_ROUTER}" }} accept\n'
        "    ct state established,related accept\n"
        "    counter name asked drop\n"
        "  }\n"
        "}\n",
    )
    try:
        yield
    finally:
        in_router("nft", "delete", "table", "ip", TABLE)


def forget_flows() -> None:
    """As a router that was restarted: each flow gets another port when it sends next."""
    in_router(sys.executable, "-c", "from pyroute2 import NFCTSocket; NFCTSocket().flush()")


def asked() -> int:
    """Packets that somebody outside sent to a host inside unasked."""
    listed = json.loads(in_router("nft", "-j", "list", "counter", "ip", TABLE, "asked"))["nftables"]
    return int(listed[-1]["counter"]["packets"])


def learnt(estate: Estate, host: str) -> bool:
    """Whether a host outside knows where sessions of those inside come from."""
    known = estate.lab.exec(host, ["wg", "show", "all", "endpoints"]).stdout.split()
    return f"{ROUTER_OF_SITE[estate.lab.host(host).site]}:" in " ".join(known) and not any(
        one.startswith(NETWORK.removesuffix("0/24")) for one in known
    )


def contact(estate: Estate, host: str) -> dict[str, str]:
    """The state of each peer that is laid down on a host, by name."""
    return {one["name"]: one["encryption"]["state"] for one in estate.ask(host, "status")["first_contact"]}


def test_a_site_behind_a_translation_opens_everything_itself(estate: Estate, tmp_path: Path) -> None:
    estate.converged()
    wanted = variant(tmp_path / "wanted", behind)
    shown = " ".join(play("plan", inventory=wanted).output.split())
    assert "site edge: new, its hosts open all sessions themselves" in shown
    wire = Wire(estate, tmp_path)
    bridge = estate.lab.site(SITE).bridge

    def reached() -> bool:
        return (
            states(estate, ONPREM_CLIENT)[EDGE] == "encrypted"
            and estate.used(ONPREM_CLIENT) == estate.used(EDGE) == estate.backends
        )

    with contextlib.ExitStack() as stack:
        stack.callback(wire.stop)
        whole = stack.enter_context(contextlib.ExitStack())
        whole.callback(lambda: play("site", seconds=1800))
        with estate.unnoticed(estate.edge, estate.onprem):
            play("site", inventory=wanted, seconds=1800)
        shown = " ".join(play("plan", inventory=wanted).output.split())
        assert "from hosts of edge, from any address; nothing is opened at edge" in shown
        play("verify", inventory=wanted)
        assert set(contact(estate, EDGE)) >= {"onprem-1", "cloud-1"}
        assert EDGE in contact(estate, "onprem-1")

        with translation(bridge):
            # The sessions of before have an address that leads nowhere now.
            estate.until("every host is reached again", reached, 60)
            outside = [host for host in estate.lab.hosts if estate.lab.host(host).site in OTHERS]
            estate.until("hosts outside followed", lambda: all(learnt(estate, host) for host in outside), 60)
            before = asked()
            files = {site: tmp_path / f"{site}.pcap" for site in OTHERS}
            with contextlib.ExitStack() as captures:
                for site, file in files.items():
                    captures.enter_context(capture(file, (site, SITE)))
                with estate.unnoticed(estate.edge, estate.onprem):
                    pass
                play("verify", inventory=wanted)
                forget_flows()
                estate.until("the flows of the translation are others", reached, 30)
                # Nobody outside knows anything of the host inside: neither a session nor where it is.
                for host in ("onprem-1", "cloud-1"):
                    estate.lab.exec(host, ["systemctl", "kill", "--signal=KILL", "isthmus-wireguard.service"])
                estate.until("hosts outside are found again", reached, 60)
                estate.lab.exec(EDGE, ["systemctl", "kill", "--signal=KILL", "isthmus-wireguard.service"])
                estate.until("the host inside opens its sessions again", reached, 30)
                estate.lab.reboot(EDGE, hard=True)
                estate.until("the host inside comes back", reached, 120)
            for site, file in files.items():
                seen = file.read_bytes()
                assert packets(file, "udp port 51871") > 100, site
                assert packets(file, "udp port 8472 or tcp port 2379") == 0, f"{site}: etcd or VXLAN beside the tunnel"
                assert NAME not in seen, f"{site}: a request in clear"
            assert asked() == before, "nobody outside opens anything inside"
            with estate.unnoticed(estate.edge, estate.onprem):
                play("rotate_wireguard_keys", "-e", "isthmus_serial=100%", inventory=wanted, seconds=1800)
            play("verify", inventory=wanted)
        with estate.unnoticed(estate.edge, estate.onprem):
            play("site", "-e", "isthmus_serial=100%", seconds=1800)
        whole.pop_all()
        play("verify")
        assert wire.leaks() == []
    estate.converged()
