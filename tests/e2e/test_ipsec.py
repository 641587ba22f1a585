# SPDX-License-Identifier: GPL-3.0-or-later
"""Two sites of the running estate by way of their gateways: on, a gateway that dies, off. What is on the wire is looked
at where the router passes it from site to site."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import ONPREM_CLIENT
from e2e.test_wireguard import NETWORKS, in_clear, packets
from estate_tools import Estate
from installation import variant
from isthmus_lab import ROUTER
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

GATEWAYS = {"onprem": "onprem-2", "cloud": "cloud-2"}
AGAIN = 10  # seconds until packets pass after a gateway's strongSwan died


def gateways(estate: dict[str, Any], _: Any) -> None:
    for site, host in GATEWAYS.items():
        estate["sites"][site]["ipsec"] = {"networks": [NETWORKS[site]], "gateways": [{"host": host}]}
    for pair in estate["site_pairs"]:
        if set(pair["sites"]) == set(GATEWAYS):
            pair["encryption"] = "ipsec-gateway"


@contextlib.contextmanager
def capture(estate: Estate, file: Path) -> Iterator[None]:
    """Every packet between the two sites as the router passes it on, whole; not what hosts of a site send to their
    gateway."""
    one, other = (NETWORKS[site] for site in GATEWAYS)
    options = ["-U", "--immediate-mode", "-n", "-s", "0", "-p", "-i", estate.lab.sites["cloud"].bridge, "-w", str(file)]
    process = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{ROUTER}", "tcpdump", *options, f"net {one} and net {other}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        assert any("listening on" in line for line in process.stderr), "tcpdump does not capture"
        yield
    finally:
        process.terminate()
        process.stderr.close()
        process.wait(10)


def stages(estate: Estate, host: str) -> set[str]:
    spec = json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)
    return {entry["stage"] for entry in spec.get("ipsec", {"far": {}})["far"].values()}


def test_gateways_go_on_and_off_and_nobody_notices(estate: Estate, tmp_path: Path) -> None:
    estate.converged()
    wanted = variant(tmp_path / "wanted", gateways)
    shown = " ".join(play("plan", inventory=wanted).output.split())
    assert "encryption by gateways of cloud and onprem is turned on, in steps of one run" in shown
    assert "UDP 4500 on onprem-2 (198.18.1.12) from cloud-2 (198.18.2.12)" in shown
    hosts = [host for host in estate.lab.hosts if host.startswith(tuple(GATEWAYS))]
    try:
        with estate.unnoticed(estate.onprem):
            play("site", inventory=wanted, seconds=1800)
        assert play("site", inventory=wanted).changed == {}
        play("verify", inventory=wanted)
        assert [stages(estate, host) for host in hosts] == [{"demands"}] * len(hosts)

        file = tmp_path / "wire.pcap"
        with capture(estate, file):
            with estate.unnoticed(estate.onprem):
                pass
            # Its tunnel ends with it: what is sent until it is back is lost, and nothing of it goes in clear.
            began = time.monotonic()
            estate.lab.exec(GATEWAYS["onprem"], ["systemctl", "kill", "--signal=KILL", "strongswan.service"])
            estate.timed(
                "packets pass a gateway whose strongSwan died",
                lambda: estate.used(ONPREM_CLIENT) == estate.backends and reached(estate),
                AGAIN,
                began,
            )
        assert packets(file, "udp port 8472") == 0, "a VXLAN header in clear"
        assert packets(file, "udp port 4500") > 100
        others = f"not (udp port 500 or udp port 4500) and not host {estate.lab.sites['cloud'].gateway}"
        assert packets(file, others) == 0, "something beside the tunnel"
        seen = file.read_bytes()
        assert [words for words in in_clear(estate, tuple(hosts)) if words in seen] == [], "addresses or a request"

        with estate.unnoticed(estate.onprem):
            play("site", seconds=1800)
        play("verify")
        for host in hosts:
            assert stages(estate, host) == set()
            left = "nft list table ip isthmus-ipsec || ls /etc/swanctl/*/isthmus* || ip route show table 736 | grep ."
            assert estate.lab.exec(host, ["sh", "-c", left], check=False).returncode != 0, host
    finally:
        play("site", seconds=1800)
    estate.converged()


def reached(estate: Estate) -> bool:
    """The other site's hosts answer the agent of one that is no gateway."""
    nodes = estate.ask(ONPREM_CLIENT, "status")["nodes"]
    return all(node["probe"] == "up" for node in nodes if node["name"].startswith("cloud"))
