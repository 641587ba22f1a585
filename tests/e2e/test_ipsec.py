# SPDX-License-Identifier: GPL-3.0-or-later
"""Two sites of the running estate by way of their gateways: on, a gateway whose strongSwan dies, off; and with two
gateways at one of them, of which the one that is used is lost. What is on the wire is looked at where the router passes
it from site to site."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo import ONPREM_CLIENT
from e2e.test_native import AT_ONCE
from e2e.test_wireguard import NAME, NETWORKS, capture, in_clear
from estate_tools import Estate
from installation import variant
from playbook import play
from router_capture import packets

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

GATEWAYS = {"onprem": "onprem-2", "cloud": "cloud-2"}
FAR = "cloud-1"
"""No gateway, as seen from `ONPREM_CLIENT`, which is none either."""
AGAIN = 10  # seconds until packets pass after a gateway's strongSwan died (docs/ipsec.md)
TAKEN_OVER = 10  # seconds until packets pass over the second gateway (docs/ipsec.md)
SECOND = "onprem-1"
"""Takes over from that of `GATEWAYS`; cloud has hosts for one gateway and `FAR`."""


def off(estate: dict[str, Any], _: Any) -> None:
    """Hosts are led back by way of what the gateways were made from."""
    for site, host in GATEWAYS.items():
        estate["sites"][site]["ipsec"] = {"networks": [NETWORKS[site]], "gateways": [{"host": host}]}


def off_with_two(estate: dict[str, Any], groups: Any) -> None:
    off(estate, groups)
    estate["sites"]["onprem"]["ipsec"]["gateways"].append({"host": SECOND})


def on(estate: dict[str, Any]) -> None:
    for pair in estate["site_pairs"]:
        if set(pair["sites"]) == set(GATEWAYS):
            pair["encryption"] = "ipsec-gateway"


def gateways(estate: dict[str, Any], groups: Any) -> None:
    off(estate, groups)
    on(estate)


def two_gateways(estate: dict[str, Any], groups: Any) -> None:
    off_with_two(estate, groups)
    on(estate)


def stages(estate: Estate, host: str) -> set[str]:
    spec = json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)
    return {entry["stage"] for entry in spec.get("ipsec", {"far": {}})["far"].values()}


def passes(estate: Estate) -> bool:
    """A packet to the other site's host and its answer, between hosts that are no gateways."""
    far = str(estate.lab.hosts[FAR].address)
    return estate.lab.exec(ONPREM_CLIENT, ["ping", "-q", "-c", "1", "-W", "1", far], check=False).returncode == 0


def reached(estate: Estate) -> bool:
    """The other site's hosts answer the agent of one that is no gateway, and its backends are used."""
    return others_up(estate) and estate.used(ONPREM_CLIENT) == estate.backends


@contextlib.contextmanager
def explained(estate: Estate) -> Iterator[None]:
    """When it fails, what the gateways say of their tunnel, before that is taken away."""
    try:
        yield
    except Exception:
        for host in (*GATEWAYS.values(), SECOND):
            look = (
                "swanctl --list-sas; ip -s link show ipsec0; ip rule; isthmus status; "
                "for table in 220 736 738; do ip route show table $table; done; "
                "nft list table ip isthmus-ipsec; journalctl -u strongswan.service -n 60 --no-pager -o cat"
            )
            print(f"--- {host}\n{estate.lab.exec(host, ['sh', '-c', f'({look}) 2>&1'], check=False).stdout}")
        raise


def test_gateways_go_on_and_off_and_nobody_notices(estate: Estate, tmp_path: Path) -> None:
    for host in GATEWAYS.values():
        assert estate.lab.exec(host, ["test", "-x", "/usr/sbin/charon-systemd"], check=False).returncode == 0, (
            f"{host} has no strongSwan: this lab is from before its root file system had it; make it anew"
        )
    estate.converged()
    wanted, back = variant(tmp_path / "wanted", gateways), variant(tmp_path / "back", off)
    shown = " ".join(play("plan", inventory=wanted).output.split())
    assert "encryption by gateways of cloud and onprem is turned on, in steps of one run" in shown
    assert "UDP 4500 on onprem-2 (198.18.1.12) from cloud-2 (198.18.2.12)" in shown
    hosts = [host for host in estate.lab.hosts if host.startswith(tuple(GATEWAYS))]
    sites, passed_on = ("onprem", "cloud"), estate.lab.sites["cloud"].bridge

    before = tmp_path / "before.pcap"
    with capture(before, sites, passed_on), estate.unnoticed(estate.onprem):
        pass
    clear, seen = in_clear(estate, tuple(hosts)), before.read_bytes()
    assert packets(before, "udp port 8472") > 100
    assert {NAME} < {words for words in clear if words in seen}, "this is how requests and addresses look in clear"

    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(contextlib.ExitStack())
        whole.callback(lambda: play("site", *AT_ONCE, seconds=1800))
        whole.callback(lambda: play("site", *AT_ONCE, inventory=back, seconds=1800))
        stack.enter_context(explained(estate))
        with estate.unnoticed(estate.onprem):
            play("site", *AT_ONCE, inventory=wanted, seconds=1800)
        assert {host: stages(estate, host) for host in hosts} == {host: {"demands"} for host in hosts}
        assert play("site", *AT_ONCE, inventory=wanted).changed == {}
        play("verify", inventory=wanted)

        file = tmp_path / "wire.pcap"
        with capture(file, sites, passed_on):
            with estate.unnoticed(estate.onprem):
                pass
            # Its tunnel ends with it: what is sent until it is back is lost, and nothing of it goes in clear.
            began = time.monotonic()
            estate.lab.exec(GATEWAYS["onprem"], ["systemctl", "kill", "--signal=KILL", "strongswan.service"])
            assert not passes(estate), "the tunnel is there although its end was killed"
            estate.timed("packets pass after a gateway's strongSwan died", lambda: passes(estate), AGAIN, began)
            estate.until(f"{ONPREM_CLIENT} reaches the other site again", lambda: reached(estate))
        assert packets(file, "udp port 8472") == 0, "a VXLAN header in clear"
        assert packets(file, "udp port 4500") > 100
        assert packets(file, beside(estate)) == 0, "something beside the tunnel"
        seen = file.read_bytes()
        assert [words for words in clear if words in seen] == [], "addresses or a request in clear"

        with estate.unnoticed(estate.onprem):
            play("site", *AT_ONCE, inventory=back, seconds=1800)
        play("verify", inventory=back)
        play("site", *AT_ONCE)
        whole.pop_all()
        play("verify")
        for host in hosts:
            assert stages(estate, host) == set(), host
            left = (
                "nft list table ip isthmus-ipsec || nft list table ip isthmus-ipsec-kept || "
                "ls /etc/swanctl/*/isthmus* || ip rule | grep 736: || "
                "ip route show table 736 | grep . || systemctl is-active strongswan.service"
            )
            done = estate.lab.exec(host, ["sh", "-c", left], check=False)
            assert done.returncode != 0, f"{host}: {done.stdout}"
    estate.converged()


def led(estate: Estate) -> dict[str, str]:
    """What a host that is no gateway says of those of its site, by name."""
    found = estate.ask(ONPREM_CLIENT, "status")["gateways"]
    return {one["host"]: one["state"] for one in found["gateways"]}


def told(estate: Estate, host: str, words: str) -> bool:
    return any(words in line for line in estate.ask(host, "status")["warnings"])


def dropped(estate: Estate, host: str) -> int:
    """Packets that the rules kept from leaving."""
    chain = estate.lab.exec(host, ["nft", "list", "chain", "ip", "isthmus-ipsec", "leaves"]).stdout
    return sum(map(int, re.findall(r"counter packets (\d+) bytes \d+ drop", chain)))


def test_of_two_gateways_the_second_takes_over_and_the_first_gets_packets_back(estate: Estate, tmp_path: Path) -> None:
    first = GATEWAYS["onprem"]
    wanted, back = variant(tmp_path / "wanted", two_gateways), variant(tmp_path / "back", off_with_two)
    estate.converged()
    shown = " ".join(play("plan", inventory=wanted).output.split())
    for host, address in ((first, "198.18.1.12"), (SECOND, "198.18.1.11")):
        assert f"UDP 4500 on {host} ({address}) from cloud-2 (198.18.2.12)" in shown
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(contextlib.ExitStack())
        whole.callback(lambda: play("site", *AT_ONCE, seconds=1800))
        whole.callback(lambda: play("site", *AT_ONCE, inventory=back, seconds=1800))
        whole.callback(estate.put_right)
        stack.enter_context(explained(estate))
        with estate.unnoticed(estate.onprem):
            play("site", *AT_ONCE, inventory=wanted, seconds=1800)
        assert play("site", *AT_ONCE, inventory=wanted).changed == {}
        play("verify", inventory=wanted)
        assert led(estate) == {first: "used", SECOND: "up"}

        # What a gateway's own workloads send to a host of the other site goes over the overlay, as everybody's does.
        mesh = json.loads(estate.lab.exec(first, ["cat", "/etc/isthmus/node.json"]).stdout)["node"]["mesh4"]
        far = str(estate.lab.hosts[FAR].address)
        estate.lab.exec(first, ["ping", "-q", "-c", "3", "-W", "2", "-I", mesh, far])

        file = tmp_path / "wire.pcap"
        with capture(file, ("onprem", "cloud"), estate.lab.sites["cloud"].bridge):
            began = time.monotonic()
            estate.lab.power_off(first)
            assert not passes(estate), "a gateway is off, and nobody misses it"
            estate.timed("packets pass after a gateway was lost", lambda: passes(estate), TAKEN_OVER, began)
            estate.until("the hosts say so", lambda: led(estate) == {first: "down", SECOND: "used"})
            assert told(estate, ONPREM_CLIENT, f"gateway {first} of this site does not answer")
            estate.until(f"{ONPREM_CLIENT} reaches the other site again", lambda: passes(estate) and others_up(estate))

            estate.lab.power_on(first)
            with estate.unnoticed(estate.onprem):
                estate.until("the first gateway is used again", lambda: led(estate) == {first: "used", SECOND: "up"})
            estate.until("all is as before", lambda: reached(estate))

            # Hosts go on sending to it, and it sends over the other one.
            began = time.monotonic()
            estate.lab.exec(first, ["systemctl", "stop", "strongswan.service"])
            estate.timed("packets pass after strongSwan was stopped", lambda: passes(estate), TAKEN_OVER, began)
            estate.until(f"{first} says so", lambda: told(estate, first, "packets go over the site's other gateway"))
            assert led(estate)[first] == "used"

            estate.lab.exec(SECOND, ["systemctl", "stop", "strongswan.service"])
            before = dropped(estate, first) + dropped(estate, SECOND)
            assert not passes(estate), "both are without a tunnel"
            estate.until(
                "what is sent is dropped and counted",
                lambda: not passes(estate) and dropped(estate, first) + dropped(estate, SECOND) > before,
            )
            verdict = " ".join(play("verify", inventory=wanted, check=False).output.split())
            assert "nothing passes through the tunnels of this gateway to site cloud" in verdict
            for host in (first, SECOND):
                estate.lab.exec(host, ["systemctl", "start", "strongswan.service"])
            estate.until(f"{ONPREM_CLIENT} reaches the other site again", lambda: reached(estate))
        assert packets(file, "udp port 8472") == 0, "a VXLAN header in clear"
        assert packets(file, "udp port 4500") > 100
        assert packets(file, beside(estate)) == 0, "something beside the tunnels"

        play("verify", inventory=wanted)
        with estate.unnoticed(estate.onprem):
            play("site", *AT_ONCE, inventory=back, seconds=1800)
        play("site", *AT_ONCE)
        whole.pop_all()
        play("verify")
        for host in (first, SECOND):
            left = "ip rule | grep -E '^73[4678]:' || ip route show table 738 | grep ."
            done = estate.lab.exec(host, ["sh", "-c", left], check=False)
            assert done.returncode != 0, f"{host}: {done.stdout}"
    estate.converged()


def beside(estate: Estate) -> str:
    """A filter for what must not be on the wire: all but IKE, ESP in UDP and what the site's router says itself. A host
    without strongSwan answers IKE with "port unreachable", which quotes what it answers and nothing else."""
    ours = "udp port 500 or udp port 4500"
    refusal = "icmp[0:2] == 0x0303 and (icmp[30:2] == 500 or icmp[30:2] == 4500)"
    return f"not ({ours}) and not ({refusal}) and not host {estate.lab.sites['cloud'].gateway}"


def others_up(estate: Estate) -> bool:
    """The other site's hosts answer the agent of a host that is no gateway."""
    nodes = estate.ask(ONPREM_CLIENT, "status")["nodes"]
    return all(node["probe"] == "up" for node in nodes if node["name"].startswith("cloud"))
