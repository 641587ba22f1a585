# SPDX-License-Identifier: GPL-3.0-or-later
"""`isthmus.mesh.bgp` on a machine with a real FRR, and a router of another make of configuration beside it, FRR too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from frr_machines import Machine, linked, why_not
from integration.module_runner import ModuleFailed
from unit.mesh.estates import model, planned

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(why_not()), reason=why_not())]

ROUTER = "198.18.9.1"
SPEC: dict[str, Any] = {
    "host": "onprem-1",
    "node": {"underlay4": "198.18.9.11", "range4": "10.101.0.0/28"},
    "mesh_ranges4": ["10.101.0.0/16", "10.102.0.0/16"],
}
OWN: dict[str, Any] = {
    "as_number": 65101,
    "routers": [{"address": ROUTER, "as_number": 65000, "bfd": False}],
    "estate_routers": ["198.18.2.1", ROUTER],
}
PASSWORD = "not-to-be-seen"  # noqa: S105

# vtysh, which keeps the mode and the owner of files that it is to read.
WATCHED_VTYSH = """\
#!/bin/sh
for word; do [ ! -f "$word" ] || stat --format='%a %U' "$word" >> /run/modes; done
exec /usr/bin/vtysh.real "$@"
"""

# It sends everything that it has, as somebody might by mistake.
CONF = """\
router bgp 65000
 bgp router-id 198.18.9.1
 no bgp ebgp-requires-policy
 no bgp network import-check
 neighbor 198.18.9.11 remote-as 65101
 neighbor 198.18.9.11 timers connect 1
 address-family ipv4 unicast
  network 10.102.0.0/28
  network 192.0.2.0/24
  neighbor 198.18.9.11 default-originate
 exit-address-family
"""


def own(**router: Any) -> dict[str, Any]:
    """What the host is told, with other words about the router."""
    found = copy.deepcopy(OWN)
    found["routers"][0].update(router)
    return found


def told(machine: Machine, given: Any = OWN, check: bool = False, **more: Any) -> dict[str, Any]:
    arguments = {"spec": more.pop("spec", SPEC), "own": given, "timeout": 8, **more}
    return machine.module("bgp", arguments, check)


def failure(machine: Machine, given: Any = OWN, **more: Any) -> str:
    with pytest.raises(ModuleFailed) as caught:
        told(machine, given, **more)
    assert PASSWORD not in str(caught.value.result)
    return caught.value.msg


def session(machine: Machine, neighbour: str = ROUTER) -> dict[str, Any]:
    found: dict[str, Any] = machine.show("bgp neighbors").get(neighbour, {})
    return found


def ups(machine: Machine) -> int:
    """How often the session has come up, while it is up; 0 while it is down."""
    found = session(machine)
    return int(found["connectionsEstablished"]) if found.get("bgpState") == "Established" else 0


def received(machine: Machine) -> set[str]:
    return set(machine.show(f"bgp ipv4 unicast neighbors {ROUTER} routes").get("routes", ()))


def settings(router: Machine, *lines: str) -> None:
    words = ["conf t", "router bgp 65000", *lines]
    router.run("vtysh", *(word for line in words for word in ("-c", line)))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    """The host, which does not forward, and the router."""
    with linked(tmp_path, ("onprem-1", "198.18.9.11/24"), ("router", f"{ROUTER}/24")) as (host, router):
        router.frr(CONF, "bgpd", "bfdd")
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
        yield host, router


def test_from_nothing_to_a_session_that_changes_keep_and_back(pair: tuple[Machine, Machine]) -> None:
    host, router = pair
    before = {name: host.read(name) for name in ("/etc/frr/frr.conf", "/etc/frr/daemons")}
    ways = host.routes()
    predicted = told(host, check=True)
    assert predicted["changed"]
    assert {name: host.read(name) for name in before} == before
    made = told(host)
    assert (made["changed"], made["lacking"]) == (True, {})
    assert {one["before_header"] for one in predicted["diff"]} == {one["before_header"] for one in made["diff"]}
    router.until(
        lambda: router.routes().get("10.101.0.0/28") == "198.18.9.11", "the router leads the range to the host"
    )
    assert received(host) == {"10.101.0.0/28", "10.102.0.0/28"}, "only what is the mesh's"
    assert host.routes() == ways, "nothing of it reaches the kernel"
    assert host.calls() == ["restart", "enable"]
    assert {line for line in host.read("/etc/frr/daemons").splitlines() if line.endswith("=yes")} == {
        "bgpd=yes",
        "vtysh_enable=yes",
    }

    again = told(host)
    assert (again["changed"], again["diff"], host.calls()) == (False, [], [])

    # Another range of the mesh, and a larger one of the host: the session stays, and both sides know.
    up, spec = ups(host), copy.deepcopy(SPEC)
    spec["mesh_ranges4"].append("192.0.2.0/24")
    spec["node"]["range4"] = "10.101.0.0/27"
    assert told(host, spec=spec, check=True)["changed"]
    assert told(host, spec=spec)["changed"]
    router.until(lambda: "10.101.0.0/27" in router.routes(), "the router has the larger range")
    assert "10.101.0.0/28" not in router.routes()
    wanted = {"10.101.0.0/27", "10.102.0.0/28", "192.0.2.0/24"}
    host.until(lambda: received(host) == wanted, "the new range is taken")
    assert (ups(host), host.calls()) == (up, [])
    assert host.read("/proc/sys/net/ipv4/ip_forward").strip() == "0", "a reload must not make the host a router"
    assert not told(host, spec=spec)["changed"]

    # What a restart reads is what runs: nothing was only in the daemons.
    host.run("systemctl", "restart", "frr.service")
    known = ["10.101.0.0/27" in router.routes()]
    assert not ups(host), "the session is gone, and the router keeps the range meanwhile"
    host.until(lambda: known.append("10.101.0.0/27" in router.routes()) or ups(host), "the session is back")
    assert all(known)
    assert host.calls() == ["restart"]
    assert not told(host, spec=spec)["changed"]

    assert told(host, None, state="absent", check=True)["changed"]
    assert told(host, None, state="absent")["changed"]
    assert {name: host.read(name) for name in before} == before
    assert host.calls() == ["disable", "stop"]
    assert not told(host, None, state="absent")["changed"]
    router.until(lambda: "10.101.0.0/27" not in router.routes(), "the router has no way to the host any more", 5)


def test_a_kubernetes_node_announces_its_pods_as_well(pair: tuple[Machine, Machine]) -> None:
    host, router = pair
    told(host)
    host.until(lambda: ups(host), "there is a session")
    up, node = ups(host), {**OWN, "pods": ["10.99.9.0/24", "10.244.1.0/24"]}
    assert told(host, node)["changed"]
    ranges = {"10.99.9.0/24", "10.101.0.0/28", "10.244.1.0/24"}
    router.until(lambda: {to for to, via in router.routes().items() if via == "198.18.9.11"} == ranges, "all are there")
    assert (told(host, node)["changed"], ups(host)) == (False, up)
    assert told(host)["changed"]
    router.until(lambda: not {"10.99.9.0/24", "10.244.1.0/24"} & router.routes().keys(), "they are withdrawn")
    assert "10.101.0.0/28" in router.routes()


def test_what_is_wrong_is_named_and_a_session_that_was_there_comes_back(pair: tuple[Machine, Machine]) -> None:
    host, router = pair
    assert "there is no session with any router" in failure(host, {**OWN, "as_number": 65102})
    assert "expects another AS number of this host than 65102" in failure(
        host, {**OWN, "as_number": 65102, "routers": [{**OWN["routers"][0], "bfd": True}]}
    )
    assert "the router has another AS number than 65009" in failure(host, own(as_number=65009))
    assert told(host)["lacking"] == {}
    up, conf = ups(host), host.read("/etc/frr/frr.conf")

    # A password that the router does not have: the session would be lost, so what ran before runs again.
    lost = failure(host, passwords={ROUTER: PASSWORD})
    assert f"a session is lost: router {ROUTER}: " in lost
    assert f"its former configuration again, and the session with {ROUTER} is there again" in lost
    assert host.read("/etc/frr/frr.conf") == conf
    assert ups(host) > up
    assert not told(host)["changed"]

    settings(router, f"neighbor 198.18.9.11 password {PASSWORD}")
    host.until(lambda: not ups(host), "the session is down")
    host.run("mv", "/usr/bin/vtysh", "/usr/bin/vtysh.real")
    host.write("/usr/bin/vtysh", WATCHED_VTYSH, 0o755)
    signed = told(host, passwords={ROUTER: PASSWORD, "198.18.2.1": "of-another-site"})
    assert set(host.read("/run/modes").splitlines()) == {"600 root"}, "files of a reload have the password"
    assert signed["lacking"] == {}
    assert PASSWORD not in str(signed)
    assert f" neighbor {ROUTER} password {PASSWORD}" in host.read("/etc/frr/frr.conf").splitlines()
    assert PASSWORD not in "".join(path.read_text() for path in host.path("/var/log/frr").iterdir())
    assert not told(host, passwords={ROUTER: PASSWORD})["changed"]
    other = failure(host, passwords={ROUTER: "elsewhere"})
    assert "the router has another password" in other
    assert f"the session with {ROUTER} is there again" in other


def test_passwords_that_cannot_be_are_refused_before_anything_is_changed(pair: tuple[Machine, Machine]) -> None:
    host, _router = pair
    given = {"spec": planned(model()).specs["o1"], "platforms": [], "bgp": OWN, "firewall": "managed"}
    for passwords, words in (
        ({"198.18.9.3": PASSWORD}, "198.18.9.3 is no router of the estate (198.18.2.1, 198.18.9.1)"),
        ({ROUTER: f"{PASSWORD} x"}, "that of 198.18.9.1 has a blank"),
        ({ROUTER: PASSWORD}, ""),
    ):
        with pytest.raises(ModuleFailed) as caught:
            host.module("preflight", {**given, "passwords": passwords})
        assert ("isthmus_bgp_passwords: " + words in caught.value.msg) is bool(words)
        assert PASSWORD not in str(caught.value.result)
        if words:
            assert words in failure(host, passwords=passwords)


@pytest.mark.slow
def test_routers_of_which_none_answers_replace_none_that_does(pair: tuple[Machine, Machine]) -> None:
    host, router = pair
    assert told(host)["lacking"] == {}
    conf, elsewhere = host.read("/etc/frr/frr.conf"), "198.18.9.2"
    for given in (own(address=elsewhere), own(address=elsewhere), own(address=elsewhere, bfd=True)):
        lost = failure(host, given)
        assert f"with the new configuration there is no session with any router: router {elsewhere}: " in lost
        assert f"the session with {ROUTER} is there again" in lost
        assert host.read("/etc/frr/frr.conf") == conf
        router.until(lambda: "10.101.0.0/28" in router.routes(), "the router knows the range")
    assert not told(host)["changed"]

    # A router that goes later is told, and is no failure of a run that changes nothing.
    settings(router, "neighbor 198.18.9.11 shutdown")
    host.until(lambda: not ups(host), "the session is down")
    again = told(host)
    assert (again["changed"], set(again["lacking"])) == (False, {ROUTER})
    assert f"there is no session with router {ROUTER}: " in str(again["warnings"])


def test_without_a_session_a_second_run_fails_as_the_first_one_did(pair: tuple[Machine, Machine]) -> None:
    host, _router = pair
    host.run("touch", "/run/enabled")  # as the package leaves it
    wrong = own(as_number=65009)
    for _attempt in range(2):
        assert f"with any router: router {ROUTER}: the router has another AS number than 65009" in failure(host, wrong)


def back(pair: tuple[Machine, Machine], after: str) -> None:
    host, router = pair
    router.until(lambda: "10.101.0.0/28" in router.routes(), f"{after}: the range is back", 15)
    host.until(lambda: session(host)["peerBfdInfo"]["status"] == "Up", f"{after}: BFD is up")


def test_bfd_tells_both_sides_at_once(pair: tuple[Machine, Machine]) -> None:
    host, router = pair
    settings(router, "neighbor 198.18.9.11 bfd")
    assert told(host, own(bfd=True))["lacking"] == {}
    host.until(lambda: session(host)["peerBfdInfo"]["status"] == "Up", "BFD is up")
    router.until(lambda: "10.101.0.0/28" in router.routes(), "the router knows the range")
    # bfdd alone that dies: the router knows at once. FRR that restarts: what the router hears first, the end of BGP's
    # connection or BFD, decides whether it keeps the range (RFC 4724). After both it has the range again soon.
    before = session(host)["connectionsEstablished"]
    host.run("sh", "-c", "kill -9 $(cat /run/frr/bfdd.pid)")
    router.until(lambda: "10.101.0.0/28" not in router.routes(), "bfdd dies: the router is told", 5)
    host.until(lambda: ups(host) > before, "bfdd dies: the session is there again", 15)
    back(pair, "bfdd dies")
    host.run("systemctl", "restart", "frr.service")
    host.until(lambda: ups(host), "FRR restarts: the session is there again", 15)
    back(pair, "FRR restarts")
    # Silence, not a link that is down.
    chain = "type filter hook ingress device eth0 priority 0; policy drop;"
    host.run("nft", "add table netdev c; add chain netdev c in { " + chain + " }")
    router.until(lambda: "10.101.0.0/28" not in router.routes(), "the router knows that the host is gone", 5)


def test_frr_of_somebody_else_is_left_alone(pair: tuple[Machine, Machine]) -> None:
    host, _router = pair
    host.frr("router bgp 65101\n bgp router-id 198.18.9.11\n", "bgpd")
    host.calls()
    conf = host.read("/etc/frr/frr.conf")
    for check in (True, False):
        assert "is somebody else's: /etc/frr/frr.conf has 'router bgp 65101'" in failure(host, check=check)
    assert not told(host, None, state="absent")["changed"]
    assert (host.read("/etc/frr/frr.conf"), host.calls()) == (conf, [])


def test_a_router_behind_another_and_a_port_that_is_taken_are_named(pair: tuple[Machine, Machine]) -> None:
    host, _router = pair
    host.run("ip", "route", "add", "203.0.113.0/24", "via", ROUTER)
    assert "203.0.113.9 is not on a subnet of this host: the way there is over 198.18.9.1" in failure(
        host, own(address="203.0.113.9")
    )
    assert "192.0.2.9 is not on a subnet of this host: " in failure(host, own(address="192.0.2.9"))
    script = "import os, socket; s = socket.create_server(('', 179)); os.fork() or __import__('time').sleep(60)"
    host.run("sh", "-c", f'setsid python3 -c "{script}" > /dev/null 2>&1 &')
    host.until(lambda: host.run("ss", "-Hltn", "sport = :179"), "the port is taken")
    assert "TCP port 179, BGP's, is used by python3 (pid " in failure(host)
