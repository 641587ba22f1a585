# SPDX-License-Identifier: GPL-3.0-or-later
"""Every way between sites at once: native by BGP and by static routes over the lab's router, the tunnel, two gateways,
WireGuard with the tunnel and natively inside it, and a site behind an address translation. Of new machines, by one run;
and of the running estate, some of whose hosts become sites of their own, there and back. What is on the wire is looked
at in the router's namespace."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from demo import EDGE
from e2e.test_inbound import asked, learnt, translation
from e2e.test_native import AT_ONCE, router, ways
from e2e.test_wireguard import NAME, states
from estate_tools import MESH_ADDRESSES, Estate
from installation import variant
from isthmus_lab import Lab
from lab_router import PASSWORD, ROUTER_AS, router_with_bgp
from playbook import play
from router_capture import packets, recorded

pytestmark = [pytest.mark.root, pytest.mark.lab]

SITES = {"onprem-1": "plant", "cloud-2": "depot"}
"""Hosts that are a site of their own here; the others are in those of the lab's inventory."""
AS = {"onprem-1": 65101, "cloud-2": 65102}
GATEWAYS = {"onprem": "onprem-2", "cloud": "cloud-1"}
STATIC = "cloud-1"
"""The router has a static route to its range; those of the hosts in `AS` it learns by BGP."""
PACE = 0.02
"""Seconds between a customer's requests: two processors encrypt everything in user space meanwhile."""
REBOOTED = ("onprem-3", "cloud-2")
"""One is behind a gateway, the other is native by BGP and masquerades."""
PAIRS: dict[tuple[str, str], dict[str, str]] = {
    ("onprem", "cloud"): {"encryption": "ipsec-gateway"},
    ("plant", "depot"): {"routing": "native"},
    ("plant", "cloud"): {"routing": "native"},
    ("onprem", "depot"): {"routing": "tunnel"},
    ("onprem", "plant"): {"encryption": "wireguard"},
    ("cloud", "depot"): {"routing": "native", "encryption": "wireguard"},
    **{(site, "edge"): {"encryption": "wireguard"} for site in ("onprem", "plant", "cloud", "depot")},
}
OUTER = {"VXLAN": "udp port 8472", "WireGuard": "udp port 51871 and not port 8472", "ESP": "udp port 4500"}
"""Filters. The source port of VXLAN is any above 32768."""
PAYLOAD = b"isthmus, unread!"
"""What pings carry, again and again."""


PRUNED = ("-e", "isthmus_prune=bgp/plant,bgp/depot")


def site_of(estate: Estate, host: str) -> str:
    return SITES.get(host, estate.lab.host(host).site)


def mixed(estate: dict[str, Any], groups: Any) -> None:
    bgp = {host: {"as_number": number} for host, number in AS.items()}
    for host, site in SITES.items():
        cluster = host.split("-")[0]
        gateway = "198.18.1.1" if cluster == "onprem" else "198.18.2.1"
        groups[cluster]["hosts"][host] |= {
            "isthmus_site": site,
            "isthmus_bgp_passwords": {gateway: PASSWORD},
        }
        bgp[host]["routers"] = [{"address": gateway, "as_number": ROUTER_AS}]
    estate["sites"] = {
        "onprem": {"ipsec": {"networks": ["198.18.1.12/31"], "gateways": [{"host": "onprem-2"}]}},
        "cloud": {"ipsec": {"networks": ["198.18.2.11/32"], "gateways": [{"host": "cloud-1"}]}},
        "plant": {"bgp": bgp["onprem-1"]},
        "depot": {"bgp": bgp["cloud-2"], "masquerade": True},
        "edge": {"inbound": False},
    }
    estate["site_pairs"] = [{"sites": list(sites), **choice} for sites, choice in PAIRS.items()]


def as_it_was(estate: dict[str, Any], groups: Any) -> None:
    """Every pair in clear through the tunnel; hosts are led back by way of what their sites and gateways are."""
    mixed(estate, groups)
    del estate["sites"]["plant"]["bgp"], estate["sites"]["depot"]["bgp"]
    estate["sites"]["edge"] = {}
    estate["site_pairs"] = []


def hosts_of(estate: Estate, site: str) -> list[str]:
    return [host for host in estate.lab.hosts if site_of(estate, host) == site]


def between(estate: Estate, sites: tuple[str, str]) -> list[tuple[str, str]]:
    return list(itertools.product(*(hosts_of(estate, site) for site in sites)))


def from_to(estate: Estate, found: dict[str, dict[str, Any]], sites: tuple[str, str]) -> str:
    """A filter for packets between the hosts of two sites, by their own addresses or those of workloads."""
    one, other = (
        " or ".join(f"host {found[host]['underlay4']} or net {found[host]['range4']}" for host in hosts)
        for hosts in (hosts_of(estate, site) for site in sites)
    )
    return f"(({one}) and ({other}))"


def nodes(estate: Estate) -> dict[str, dict[str, Any]]:
    return {
        host: json.loads(estate.lab.exec(host, ["cat", "/etc/isthmus/node.json"]).stdout)["node"]
        for host in estate.lab.hosts
    }


@contextlib.contextmanager
def static_route(node: dict[str, Any]) -> Iterator[None]:
    """As the plan prints it."""
    route = (node["range4"], "via", node["underlay4"])
    router("replace", *route)
    try:
        yield
    finally:
        router("del", *route)


def unreached(estate: Estate, members: dict[str, str], hosts: Collection[str]) -> list[str]:
    """What of the hosts does not reach a host of another site, or is not reached, from and to their own addresses of
    the mesh, by ten packets."""
    found = []
    for one, other in itertools.chain.from_iterable(between(estate, sites) for sites in PAIRS):
        for source, target in ((one, other), (other, one)):
            words = ["ping", "-q", "-c", "10", "-i", "0.02", "-W", "2", "-p", PAYLOAD.hex()]
            if source in hosts or target in hosts:
                done = estate.lab.exec(source, [*words, "-I", members[source], members[target]], check=False)
                found += [f"{source} to {target}: {done.stdout}{done.stderr}"] if done.returncode else []
    return found


def clear(estate: Estate, members: dict[str, str], sites: tuple[str, str]) -> list[bytes]:
    """What packets between workloads of two sites look like in clear: their addresses beside each other in the header,
    a customer's request, what pings carry."""
    found = {
        host: {IPv4Address(members[host]).packed}
        | {IPv4Address(one["address"]).packed for one in estate.ask(host, "status")["workloads"] if one["address"]}
        for sites_host in between(estate, sites)
        for host in sites_host
    }
    both = [
        b"".join(two)
        for one, other in between(estate, sites)
        for a, b in itertools.product(found[one], found[other])
        for two in ((a, b), (b, a))
    ]
    return [NAME, PAYLOAD, *both]


def part(file: Path, what: str, name: str) -> Path:
    """The packets of a recording that a filter passes."""
    made = file.with_name(f"{name}.pcap")
    subprocess.run(["tcpdump", "-n", "-r", str(file), "-w", str(made), what], check=True, capture_output=True)
    return made


def proven(estate: Estate, wanted: Path, place: Path) -> None:
    """Everybody reaches everybody by the way that is theirs, and nothing is in clear where that was not said."""
    found = nodes(estate)
    members = {host: node["mesh4"] for host, node in found.items()}
    outside = [host for host in estate.lab.hosts if host != EDGE]
    estate.until("hosts outside know where the host inside is", lambda: all(learnt(estate, one) for one in outside), 60)
    estate.converged()
    before = asked()
    file, passed_on = place / "all.pcap", place / "passed-on.pcap"
    with contextlib.ExitStack() as captures:
        captures.enter_context(recorded(file, f"(net 198.18.0.0/16 and not tcp port 22) or {MESH_ADDRESSES}"))
        captures.enter_context(
            recorded(passed_on, from_to(estate, found, ("onprem", "cloud")), bridge(estate, "cloud"))
        )
        with estate.unnoticed(estate.edge, estate.onprem, interval=PACE):
            assert unreached(estate, members, estate.lab.hosts) == []
        for host in REBOOTED:
            estate.lab.reboot(host, hard=True)
        estate.until("hosts that were reset reach all others", lambda: not unreached(estate, members, REBOOTED), 90)
        estate.converged()
        play("verify", inventory=wanted)
    assert asked() == before, "nobody outside opens anything inside"
    for sites, choice in PAIRS.items():
        way, encryption = choice.get("routing", "tunnel"), choice.get("encryption", "none")
        for one, other in between(estate, sites):
            assert ways(estate, one)[other] == way, f"{one} to {other}"
            state = "encrypted" if encryption == "wireguard" else "plain"
            assert states(estate, one)[other] == state, f"{one} to {other}"
        by_gateway = encryption == "ipsec-gateway"
        seen = passed_on if by_gateway else part(file, from_to(estate, found, sites), "-".join(sites))
        content = seen.read_bytes()
        in_clear = [words for words in clear(estate, members, sites) if words in content]
        counted = {name: packets(seen, what) for name, what in OUTER.items()}
        used = {"wireguard": {"WireGuard"}, "ipsec-gateway": {"ESP"}, "none": {"VXLAN"} if way == "tunnel" else set()}
        assert {name for name, count in counted.items() if count} == used[encryption], f"{sites}: {counted}"
        assert bool(in_clear) is (encryption == "none"), f"{sites}: {in_clear}"
    outside_address = str(estate.lab.site("cloud").gateway)
    for host, answered in (("cloud-2", True), ("cloud-1", False)):
        words = ["ping", "-q", "-c", "1", "-W", "2", "-I", members[host], outside_address]
        done = estate.lab.exec(host, words, check=False)
        assert (done.returncode == 0) is answered, f"{host}, masquerade {answered}: {done.stdout}{done.stderr}"


def bridge(estate: Estate, site: str) -> str:
    return estate.lab.site(site).bridge


def test_new_machines_have_every_way_at_once(lab: Lab, tmp_path: Path) -> None:
    wanted = variant(tmp_path / "wanted", mixed)
    estate = Estate(lab)
    lab.down()
    lab.up()
    with contextlib.ExitStack() as stack:
        stack.callback(lab.up)
        stack.callback(lab.down)
        stack.enter_context(router_with_bgp(lab, AS))
        stack.enter_context(translation(bridge(estate, "edge")))
        play("site", *AT_ONCE, inventory=wanted)
        stack.enter_context(static_route(nodes(estate)[STATIC]))
        proven(estate, wanted, tmp_path)
        assert play("site", inventory=wanted).changed == {}


@pytest.mark.slow
def test_a_running_estate_gets_every_way_and_nobody_notices(estate: Estate, tmp_path: Path) -> None:
    wanted, back = variant(tmp_path / "wanted", mixed), variant(tmp_path / "back", as_it_was)
    estate.converged()
    with contextlib.ExitStack() as stack:
        stack.enter_context(router_with_bgp(estate.lab, AS))
        stack.enter_context(static_route(nodes(estate)[STATIC]))
        whole = stack.enter_context(contextlib.ExitStack())
        whole.callback(lambda: play("site", *AT_ONCE, seconds=1800))
        whole.callback(lambda: play("site", *AT_ONCE, *PRUNED, inventory=back, seconds=1800))
        with estate.unnoticed(estate.edge, estate.onprem, interval=PACE):
            run = play("site", *AT_ONCE, inventory=wanted, seconds=1800)
        assert "hosts move" not in run.output, "all pairs begin where their hosts were"
        with translation(bridge(estate, "edge")):
            proven(estate, wanted, tmp_path)
        with estate.unnoticed(estate.edge, estate.onprem, interval=PACE):
            play("site", *AT_ONCE, *PRUNED, inventory=back, seconds=1800)
        play("site", *AT_ONCE)
        whole.pop_all()
    play("verify")
    estate.converged()
