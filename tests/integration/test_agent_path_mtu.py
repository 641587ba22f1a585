# SPDX-License-Identifier: GPL-3.0-or-later
"""Two real `isthmusd` processes behind a router: the MTU of the way between them is cut under them, with and without a
word from the router, and the way is cut in one direction only."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
from bpf.topology import wait_for
from integration.test_agent_kernel import Daemon
from integration.test_agent_native import Host, Routed, routed
from isthmus_agent.cli import text

__all__ = ["routed"]
pytestmark = pytest.mark.root

FOUND_WITHIN = 45  # seconds: a look each 5 s, then a size a second or, of one that is lost, in 3
EVERY_WAY = pytest.mark.parametrize(
    "routed",
    [pytest.param("plain", id="tunnel"), pytest.param("demands", id="native", marks=pytest.mark.slow)],
    indirect=True,
)


class Speaks(Protocol):
    """A host of any of the tests of the agent."""

    daemon: Daemon


def way(host: Speaks) -> dict[str, Any]:
    """From a host to the other one."""
    (far,) = [node for node in host.daemon.status()["nodes"] if node["probe"] != "this host"]
    return dict(far["routing"])


def carries(host: Speaks, size: int) -> bool:
    return bool(way(host)["path_mtu"] == size)


def metered(host: Speaks, kind: str) -> float | None:
    """The MTU of the routes to the other one (`route`) or of the way there (`path`), as a scrape has it."""
    (far,) = [node for node in host.daemon.status()["nodes"] if node["probe"] != "this host"]
    return host.daemon.metrics().get(f'isthmus_{kind}_mtu_bytes{{cluster="{far["cluster"]}",node="{far["name"]}"}}')


def warned(host: Speaks) -> list[str]:
    return [words for words in host.daemon.status()["warnings"] if "must not be fragmented" in words]


@EVERY_WAY
def test_a_way_that_is_cut_without_a_word_is_found_and_named_until_it_is_mended(routed: Routed) -> None:
    a, b = routed.both.hosts
    full = way(a)["mtu"]
    around = 1500 - full  # of the tunnel
    for host in (a, b):
        wait_for(lambda host=host: carries(host, full), "the way carries what routes say", FOUND_WITHIN)  # type: ignore[misc]
        assert warned(host) == []
        assert (metered(host, "route"), metered(host, "path")) == (full, full)
    routed.router("nft", "table ip cut { chain c { type filter hook forward priority 0; ip length > 1300 drop; }; }")
    wait_for(lambda: warned(a), "it is named at once", 15)
    wait_for(lambda: carries(a, 1300 - around), "what it carries is found", FOUND_WITHIN)
    found = way(a)
    assert (found["mtu"], found["lost"]) == (full, 1301 - around)
    assert (metered(a, "route"), metered(a, "path")) == (full, 1300 - around)
    (words,) = warned(a)
    assert f"packets of {1301 - around} bytes and more are lost on the way to node cloud/cloud-1 or back" in words
    assert f"routes carry {full}, it carries {1300 - around}" in words
    assert words in text.status(a.daemon.status())
    assert a.daemon.probe("cloud-1") == "up", "small packets pass"
    assert routed.both.dial() == ["b", "10.101.0.2"]
    routed.router("nft", "delete table ip cut")
    wait_for(lambda: carries(a, full), "it is mended", FOUND_WITHIN)
    assert way(a)["lost"] is None
    assert warned(a) == []
    assert metered(a, "path") == full


@pytest.mark.slow
@EVERY_WAY
def test_a_link_with_a_smaller_mtu_is_found_though_its_router_could_have_cut_packets_in_pieces(routed: Routed) -> None:
    a = routed.both.a
    full = way(a)["mtu"]
    wait_for(lambda: carries(a, full), "the way carries what routes say", FOUND_WITHIN)
    routed.router("ip", "link", "set", "to-b", "mtu", "1300")
    wait_for(lambda: carries(a, full - 200), "what it carries is found", FOUND_WITHIN)
    assert len(warned(a)) == 1
    assert a.daemon.probe("cloud-1") == "up"


@pytest.mark.parametrize("routed", ["plain"], indirect=True, ids=["tunnel"])
def test_a_way_that_is_cut_in_one_direction_is_named_by_the_side_that_is_not_heard(routed: Routed) -> None:
    a, b = routed.both.hosts

    def told(host: Host) -> list[str]:
        return [words for words in host.daemon.status()["warnings"] if "is cut in one direction" in words]

    for host, far in ((a, "cloud-1"), (b, "onprem-1")):
        wait_for(lambda host=host, far=far: host.daemon.probe(far) == "up", "both hear each other", 15)  # type: ignore[misc]
        assert told(host) == []
    routed.router(
        "nft", "table ip cut { chain c { type filter hook forward priority 0; ip saddr 198.18.0.12 drop; }; }"
    )
    (words,) = wait_for(lambda: told(b), "b is not heard", 15)
    assert "cloud/cloud-1 hears onprem/onprem-1" in words
    assert "onprem/onprem-1 does not hear cloud/cloud-1" in words
    shown = text.status(b.daemon.status())
    assert "down one way" in shown
    assert words in shown
    wait_for(lambda: a.daemon.probe("cloud-1") == "down", "a notices as well", 15)
    assert told(a) == [], "to a it is as if b were off"
    routed.router("nft", "delete table ip cut")
    wait_for(lambda: b.daemon.probe("onprem-1") == "up", "it is mended", 15)
    assert told(b) == []
    # Both ways: nobody can tell.
    routed.router("nft", "table ip cut { chain c { type filter hook forward priority 0; drop; }; }")
    for host, far in ((a, "cloud-1"), (b, "onprem-1")):
        wait_for(lambda host=host, far=far: host.daemon.probe(far) == "down", "nobody hears", 15)  # type: ignore[misc]
        wait_for(lambda host=host: not told(host), "it is not one way", 15)  # type: ignore[misc]
