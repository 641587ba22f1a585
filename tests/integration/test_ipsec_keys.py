# SPDX-License-Identifier: GPL-3.0-or-later
"""Another pre-shared key, or another certificate, for a tunnel between gateways that carries packets, by real strongSwan
in the namespaces of `test_ipsec`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bpf.topology import wait_for
from integration.module_runner import ModuleFailed
from integration.test_ipsec import (
    ANEW,
    GATEWAYS,
    Machine,
    Net,
    authority,
    beside,
    certificates,
    established,
    in_clear,
    net,
    numbers,
    pytestmark,
    with_pair,
)
from isthmus_mesh.planner import Plan

__all__ = ["net", "pytestmark"]

OLD, NEW, WRONG = "the-former-key", "the-new-key", "a-wrong-key"
BOTH = ("c1", "o1")
"""The gateways; the first begins."""


def pair(key: str) -> dict[str, str]:
    return {"cloud onprem": key}


@pytest.fixture
def running(net: Net) -> Plan:
    """A pair of sites whose packets go through the tunnel, which was made by the former key."""
    found = with_pair(ipsec_authentication="psk")
    net.apply(found, secrets=pair(OLD))
    wait_for(lambda: established(net), "the tunnel", 15)
    net.lead("o2", "c2")
    wait_for(lambda: net["o2"].echo("c2", 1400) == "", "packets", 15)
    return found


def all_at_once(net: Net, names: Iterable[str], keys: dict[str, str], what: str) -> dict[str, Any]:
    """As a step of a run does it: what each answered, or the words with which it failed."""

    def one(name: str) -> Any:
        try:
            return net[name].apply(net[name].spec, secrets=pair(keys[name]), keys=what)
        except ModuleFailed as failed:
            return str(failed)

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def run(net: Net, keys: dict[str, str]) -> dict[str, str]:
    """What a run of `site` over the gateways of `keys` does with them, one after the other first, then all at once; the
    words of those that failed, which have no part in what comes then."""
    failed: dict[str, str] = {}
    for name in sorted(keys, reverse=True):
        told = net[name].apply(net[name].spec, secrets=pair(keys[name]))
        assert not any(key in str(told) for key in (OLD, *keys.values())), "no secret is told"
    for what in ("used", "only"):
        for name, told in all_at_once(net, [name for name in keys if name not in failed], keys, what).items():
            assert not any(key in str(told) for key in (OLD, *keys.values())), "no secret is told"
            if isinstance(told, str):
                failed[name] = told
    return failed


def kept(one: Machine) -> list[str]:
    """The keys that strongSwan has, first the one that it uses."""
    from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec

    (found,) = ipsec.keys_of(one.run("cat", "/etc/swanctl/conf.d/isthmus-secrets.conf").stdout).values()
    listed = one.run("swanctl", "--stats").stdout
    assert listed
    return found


def as_it_should(net: Net, key: str) -> None:
    """Both gateways have that key alone, there is one tunnel that passes packets, and it can be made anew."""
    assert [kept(net[name]) for name in BOTH] == [[key], [key]]
    for name in BOTH:
        listed = net[name].run("swanctl", "--list-sas").stdout
        assert re.findall(r"^(\S+): #", listed, re.MULTILINE) == [f"isthmus-{ {'c': 'onprem', 'o': 'cloud'}[name[0]] }"]
        assert not any("try-" in line for line in net[name].run("swanctl", "--list-conns").stdout.splitlines())
    assert net["o2"].echo("c2", 1400) == ""
    for name in BOTH:
        before = numbers(net["c1"])
        net[name].run("swanctl", "--terminate", "--ike", "*", check=False)
        net[name].run("systemctl", "restart", "strongswan.service")

        def again(before: list[str] = before) -> bool:
            net["c1"].ask_again()
            return established(net) and numbers(net["c1"]) != before and net["o2"].echo("c2", 1400) == ""

        wait_for(again, f"a tunnel when strongSwan of {name} was restarted", 30)


def test_the_same_new_key_on_both_gateways_replaces_the_tunnel_and_costs_no_more_than_that(
    net: Net, running: Plan
) -> None:
    del running
    before = numbers(net["c1"])
    with net.capture() as wire:
        with net["o2"].stream("c2") as counted:
            assert run(net, dict.fromkeys(BOTH, NEW)) == {}
        sent, lost = counted
        print(f"another key: {lost} of {sent} packets lost")
        assert sent > 100
        assert lost <= ANEW, f"of {sent} packets"
    assert (in_clear(wire), beside(wire)) == (0, [])
    assert len(numbers(net["c1"])) == 2, "the former tunnel is gone"
    assert numbers(net["c1"]) != before, "it was made by the new key"
    for name in BOTH:
        told = net[name].apply(net[name].spec, secrets=pair(NEW))
        assert (told["changed"], told["unproven"]) == (False, [])
    as_it_should(net, NEW)
