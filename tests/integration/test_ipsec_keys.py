# SPDX-License-Identifier: GPL-3.0-or-later
"""Another pre-shared key, or another certificate, for a tunnel between gateways that carries packets, by real
strongSwan in the namespaces of `test_ipsec`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bpf.topology import wait_for
from integration.module_runner import ModuleFailed
from integration.test_ipsec import (
    ANEW,
    SITES,
    TWO,
    Machine,
    Net,
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

OLD, NEW, THIRD, WRONG = "the-former-key", "the-new-key", "yet-another-key", "a-wrong-key"
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
    """The keys that strongSwan is given, first the one that it uses."""
    from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec

    (found,) = ipsec.keys_of(one.run("cat", "/etc/swanctl/conf.d/isthmus-secrets.conf").stdout).values()
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
        before = ike(net)
        net[name].run("systemctl", "restart", "strongswan.service")

        def again(before: str = before) -> bool:
            net["c1"].ask_again()
            return established(net) and ike(net) != before and net["o2"].echo("c2", 1400) == ""

        wait_for(again, f"a tunnel when strongSwan of {name} was restarted", 30)


def ike(net: Net) -> str:
    """What only one IKE SA has; numbers begin anew with strongSwan."""
    return net["c1"].run("swanctl", "--list-sas").stdout.partition("IKEv2, ")[2].partition("\n")[0]


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


def test_where_the_gateways_have_other_keys_packets_pass_as_before_and_each_says_so(net: Net, running: Plan) -> None:
    """Of both, of one that the run does not come to, and of one whose new key is wrong on one side only."""
    del running
    for keys in ({"c1": NEW, "o1": WRONG}, {"o1": NEW}, {"c1": NEW}):
        before = numbers(net["c1"])
        with net["o2"].stream("c2") as counted:
            failed = run(net, keys)
        sent, lost = counted
        assert sent > 100
        assert lost == 0, f"of {sent} packets"
        assert numbers(net["c1"]) == before, "the tunnel is the same"
        assert [kept(net[name]) for name in BOTH] == [[OLD], [OLD]]
        assert set(failed) == set(keys)
        for name, words in failed.items():
            other = {"c1": "isthmus-ipsec-o1 of site onprem (198.18.1.1)"}.get(
                name, "isthmus-ipsec-c1 of site cloud (198.18.2.1)"
            )
            for told in (
                f"the gateway {other} has another pre-shared key than this gateway (isthmus-ipsec-{name}) has for "
                "'cloud onprem' in isthmus_ipsec_secrets",
                "received AUTHENTICATION_FAILED notify error",
                "is there as before, by the former key",
                f"(a --limit has to name {other[14:16]} too)",
            ):
                assert told in words, words
    # The next run, by what was there before, has nothing to change.
    for name in BOTH:
        told = net[name].apply(net[name].spec, secrets=pair(OLD))
        assert (told["changed"], told["unproven"]) == (False, [])
    as_it_should(net, OLD)


def lost_and_made(net: Net) -> None:
    before = numbers(net["c1"])
    net["c1"].run("swanctl", "--terminate", "--ike", "isthmus-onprem")

    def again() -> bool:
        net["c1"].ask_again()
        return established(net) and numbers(net["c1"]) != before and net["o2"].echo("c2") == ""

    wait_for(again, f"a tunnel with {[kept(net[name]) for name in BOTH]}", 30)


def test_a_run_that_ends_half_way_leaves_gateways_that_can_make_a_tunnel(net: Net, running: Plan) -> None:
    """At each step a tunnel that is lost is made anew, and the next run does the rest."""
    del running
    keys = dict.fromkeys(BOTH, NEW)
    predicted = net["c1"].apply(net["c1"].spec, check=True, secrets=pair(NEW))
    assert predicted["changed"]
    assert "used when the other gateway is seen to have it too" in str(predicted["diff"])
    assert kept(net["c1"]) == [OLD]
    for no_key, why in ((31415926, "it is of the type int, not text"), ("", "it is empty"), (None, "it is empty")):
        with pytest.raises(ModuleFailed, match=f"for 'cloud onprem' what is no pre-shared key: {why}") as refused:
            net["c1"].apply(net["c1"].spec, secrets={"cloud onprem": no_key})
        assert "31415926" not in str(refused.value.result)
    for name in BOTH:
        told = net[name].apply(net[name].spec, secrets=pair(NEW))
        assert (len(told["unproven"]), kept(net[name])) == (1, [OLD, NEW])
        lost_and_made(net)
        assert not net[name].apply(net[name].spec, secrets=pair(NEW))["changed"]
        predicted = net[name].apply(net[name].spec, check=True, secrets=pair(NEW))
        assert "the one of isthmus_ipsec_secrets" in str(predicted["diff"])
    for what, wanted in (("used", [NEW, OLD]), ("only", [NEW])):
        for name in BOTH:
            all_at_once(net, [name], keys, what)
            assert kept(net[name]) == wanted
            lost_and_made(net)
    as_it_should(net, NEW)


def test_yet_another_key_before_both_use_the_first_one_leaves_gateways_that_can_make_a_tunnel(
    net: Net, running: Plan
) -> None:
    del running
    for name in BOTH:
        net[name].apply(net[name].spec, secrets=pair(NEW))
    all_at_once(net, ["c1"], dict.fromkeys(BOTH, NEW), "used")
    assert [kept(net[name]) for name in BOTH] == [[NEW, OLD], [OLD, NEW]]
    assert set(run(net, {"c1": THIRD, "o1": WRONG})) == set(BOTH)
    assert [kept(net[name]) for name in BOTH] == [[NEW, OLD], [OLD, NEW]]
    lost_and_made(net)
    for name, wanted in (("c1", [NEW, OLD, THIRD]), ("o1", [OLD, NEW, THIRD])):
        assert net[name].apply(net[name].spec, secrets=pair(THIRD))["unproven"]
        assert kept(net[name]) == wanted
        lost_and_made(net)
    assert run(net, dict.fromkeys(BOTH, THIRD)) == {}
    as_it_should(net, THIRD)


def not_ours(found: Plan) -> dict[str, Any]:
    """The spec of `c1` for which the gateway of the other site is one that somebody else set up."""
    mine = dict(found.specs["c1"])
    mine["ipsec"] = {
        **mine["ipsec"],
        "connections": [
            {key: value for key, value in {**one, "ours": False}.items() if key != "inside"}
            for one in mine["ipsec"]["connections"]
        ],
    }
    return mine


def test_a_gateway_that_is_not_ours_and_has_not_the_new_key_keeps_its_tunnel(net: Net) -> None:
    """Here strongSwan that somebody else set up stands for it."""
    theirs = with_pair(ipsec_authentication="psk")
    net["o1"].apply(dict(theirs.specs["o1"]), secrets=pair(OLD))
    net["c1"].apply(not_ours(theirs), secrets=pair(OLD))
    wait_for(lambda: established(net), "the tunnel", 15)
    before = numbers(net["c1"])
    with net["c1"].stream("o1") as counted:
        (words,) = run(net, {"c1": NEW}).values()
    sent, lost = counted
    assert (lost, numbers(net["c1"]), kept(net["c1"])) == (0, before, [OLD]), f"of {sent} packets"
    assert "isthmus-ipsec-o1 of site onprem (198.18.1.1) did not take the new pre-shared key of 'cloud onprem'" in words
    assert "AUTHENTICATION_FAILED" in words

    # Its engineer sets it, and the tunnel that is there stays.
    secrets = "/etc/swanctl/conf.d/isthmus-secrets.conf"
    net["o1"].run("sh", "-c", f"sed -i 's/0s.*/{NEW}/' {secrets} && swanctl --load-creds --clear --noprompt")
    with net["c1"].stream("o1") as counted:
        assert run(net, {"c1": NEW}) == {}
    sent, lost = counted
    assert lost <= ANEW, f"of {sent} packets"
    assert kept(net["c1"]) == [NEW]
    now = numbers(net["c1"])
    assert (len(now), now != before) == (2, True)


def module_of(one: Machine) -> int:
    """The process, begun by this one, in which the module runs there."""
    begun = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    (found,) = [
        pid for pid in begun if f"{one.place}/lib/ipsec-before.json" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    return int(found)


def test_the_former_key_is_put_back_for_a_gateway_that_is_not_ours_after_a_run_that_ended_half_way(net: Net) -> None:
    """Also where that one makes no IKE SA without a tunnel, as many devices do not."""
    theirs = with_pair(ipsec_authentication="psk")
    net["o1"].apply(dict(theirs.specs["o1"]), secrets=pair(OLD))
    conf = "/etc/swanctl/conf.d/isthmus.conf"
    net["o1"].run("sh", "-c", f"sed -i 's/version = 2/&\\n    childless = never/' {conf} && swanctl --load-conns")
    net["c1"].apply(not_ours(theirs), secrets=pair(OLD))
    wait_for(lambda: established(net), "the tunnel", 15)
    before = numbers(net["c1"])
    net["c1"].apply(net["c1"].spec, secrets=pair(NEW))
    assert kept(net["c1"]) == [OLD, NEW]
    net["c1"].run("sh", "-c", f"echo {NEW} > /etc/swanctl/isthmus-trial-1234abcd.conf")  # of a trial that was killed
    assert run(net, {"c1": OLD}) == {}
    assert (kept(net["c1"]), numbers(net["c1"])) == ([OLD], before)
    assert "isthmus" not in net["c1"].run("ls", "/etc/swanctl").stdout


def test_a_run_that_is_hung_up_while_it_tries_a_key_leaves_nothing_of_it(net: Net, running: Plan) -> None:
    """Ctrl-C at the controller ends the terminal that a module has there."""
    del running
    gateway = net["c1"]
    gateway.apply(gateway.spec, secrets=pair(NEW))

    def tries() -> bool:
        return "try-isthmus-onprem:" in gateway.run("swanctl", "--list-conns").stdout

    with ThreadPoolExecutor() as pool:
        done = pool.submit(all_at_once, net, ["c1"], {"c1": NEW}, "used")
        wait_for(tries, "a trial", 10)
        os.kill(module_of(gateway), signal.SIGHUP)
        done.exception(60)
    assert not tries()
    assert "try-" not in gateway.run("swanctl", "--list-sas").stdout
    as_it_should(net, OLD)


@contextlib.contextmanager
def killed(one: Machine, at: str) -> Iterator[None]:
    """The module is killed there when it asks strongSwan for this."""
    (one.place / "real-swanctl").write_bytes(Path("/usr/sbin/swanctl").read_bytes())
    (one.place / "real-swanctl").chmod(0o755)
    kills = one.place / "kills-swanctl"
    kills.write_text(f'#!/bin/sh\n[ "$1" != {at} ] || exec kill -KILL $PPID\nexec {one.place}/real-swanctl "$@"\n')
    kills.chmod(0o755)
    one.run("mount", "--bind", str(kills), "/usr/sbin/swanctl")
    with pytest.raises(AssertionError, match=r"ended with (-9|137)"):
        yield
    one.run("umount", "/usr/sbin/swanctl")


def test_what_a_killed_run_wrote_is_read_by_strongswan_in_the_next_one(net: Net, running: Plan) -> None:
    del running
    gateway, keys = net["c1"], dict.fromkeys(BOTH, NEW)

    def read(key: str) -> bool:
        return f"'{key}-isthmus-onprem'" in gateway.log()

    def next_run() -> None:
        predicted = gateway.apply(gateway.spec, check=True, secrets=pair(NEW))
        assert "a run was ended before that" in str(predicted["diff"])
        told = gateway.apply(gateway.spec, secrets=pair(NEW))
        assert (told["changed"], numbers(gateway)) == (True, before)
        assert not gateway.apply(gateway.spec, secrets=pair(NEW))["changed"]

    before = numbers(gateway)
    with killed(gateway, "--load-creds"):
        gateway.apply(gateway.spec, secrets=pair(NEW))
    assert (kept(gateway), read("ike2")) == ([OLD, NEW], False)
    next_run()
    assert read("ike2")

    net["o1"].apply(net["o1"].spec, secrets=pair(NEW))
    with killed(gateway, "--initiate"):
        gateway.apply(gateway.spec, secrets=pair(NEW), keys="used")
    assert "try-isthmus-onprem:" in gateway.run("swanctl", "--list-conns").stdout, "a trial's"
    next_run()
    assert "try-isthmus-onprem:" not in gateway.run("swanctl", "--list-conns").stdout
    assert run(net, keys) == {}
    as_it_should(net, NEW)

    # What changed is made anew.
    sites = {**SITES, "cloud": {"ipsec": {**SITES["cloud"]["ipsec"], "networks": ["198.18.2.0/23"]}}}
    wider = with_pair(sites=sites, ipsec_authentication="psk")
    net["o1"].apply(dict(wider.specs["o1"]), secrets=pair(NEW))
    with killed(gateway, "--load-creds"):
        gateway.apply(dict(wider.specs["c1"]), secrets=pair(NEW))
    gateway.apply(gateway.spec, secrets=pair(NEW))
    wait_for(lambda: "198.18.2.0/23" in gateway.run("swanctl", "--list-sas").stdout, "the new network", 20)


def test_a_renewed_certificate_that_the_other_gateway_does_not_take_gets_words(net: Net) -> None:
    found = with_pair()
    certificates(net, found)
    net.apply(found)
    wait_for(lambda: established(net), "the tunnel", 15)
    net.lead("o2", "c2")
    wait_for(lambda: net["o2"].echo("c2", 1400) == "", "packets", 15)
    before = numbers(net["c1"])

    def aged() -> bool:
        told = net["o1"].run("swanctl", "--list-sas").stdout
        return int(re.findall(r"established (\d+)s ago", told)[0]) >= 4

    wait_for(aged, "files that are newer than the tunnel", 15)
    certificates(net, found, stranger="c1")
    for name in BOTH:
        told = net[name].apply(net[name].spec)
        assert told["unproven"] == [f"isthmus-{ {'c': 'onprem', 'o': 'cloud'}[name[0]] }"]
    failed = all_at_once(net, BOTH, dict.fromkeys(BOTH, ""), "only")
    for name in BOTH:
        assert "do not take each other's certificates any more: authentication failed" in failed[name], failed
    assert numbers(net["c1"]) == before
    assert net["o2"].echo("c2", 1400) == ""

    # How old the tunnel is strongSwan tells only until IKE has a new key, as it has every few hours.
    net["c1"].run("swanctl", "--rekey", "--ike", "isthmus-onprem")
    wait_for(lambda: len(numbers(net["c1"])) == 2 and numbers(net["c1"]) != before, "a new key of IKE", 15)
    for name in BOTH:
        assert len(net[name].apply(net[name].spec)["unproven"]) == 1
    before = numbers(net["c1"])

    certificates(net, found)
    for name in BOTH:
        net[name].apply(net[name].spec)
    told = all_at_once(net, BOTH, dict.fromkeys(BOTH, ""), "only")
    assert not any(isinstance(one, str) for one in told.values()), told
    wait_for(lambda: len(numbers(net["c1"])) == 2 and numbers(net["c1"]) != before, "a tunnel made anew", 15)
    assert net["o2"].echo("c2", 1400) == ""
    # With both renewed it is the one that begins that makes it anew.
    assert net["c1"].apply(net["c1"].spec)["unproven"] == []

    # Of the gateway that answers alone it is proven at once, and used when the other one authenticates anew.
    before = numbers(net["c1"])
    net["o1"].run("sh", "-c", "echo >> /etc/isthmus/pki/ipsec.crt")
    assert net["o1"].apply(net["o1"].spec)["unproven"] == ["isthmus-cloud"]
    told = all_at_once(net, ["o1"], dict.fromkeys(BOTH, ""), "only")
    assert not any(isinstance(one, str) for one in told.values()), told
    assert numbers(net["c1"]) == before


@pytest.mark.slow
def test_a_gateway_that_is_not_ours_has_one_key_for_both_of_its_addresses(net: Net) -> None:
    """One identity at two addresses: strongSwan takes a key for both of them."""
    name, network = "vpn.example.com", "198.18.1.0/24"
    theirs = with_pair(sites={**TWO, "cloud": SITES["cloud"]}, ipsec_authentication="psk")
    for one in ("o1", "o2"):
        net[one].apply(dict(theirs.specs[one]), secrets=pair(OLD))
        files = "/etc/swanctl/conf.d/isthmus*.conf"
        net[one].run("sh", "-c", f"sed -i 's/isthmus-ipsec-o[12]/{name}/' {files} && swanctl --load-all --noprompt")
    peer = {"address": "198.18.1.1", "id": name, "second": {"address": "198.18.1.2", "id": name}}
    sites = {"cloud": SITES["cloud"], "onprem": {"ipsec": {"networks": [network], "peer": peer}}}
    net["c1"].apply(dict(with_pair(sites=sites).specs["c1"]), secrets=pair(OLD))
    wait_for(lambda: net["c1"].children() == 2, "both tunnels", 15)
    for tunnels in (2, 1):
        if tunnels == 1:
            net["o2"].run("systemctl", "stop", "strongswan.service")
            wait_for(lambda: net["c1"].children() == 1, "one tunnel", 30)
        (words,) = run(net, {"c1": NEW}).values()
        assert "did not take the new pre-shared key of 'cloud onprem'" in words
        assert kept(net["c1"]) == [OLD]
        before = numbers(net["c1"])
        net["c1"].run("swanctl", "--terminate", "--ike", "isthmus-onprem")

        def again(before: list[str] = before, tunnels: int = tunnels) -> bool:
            net["c1"].ask_again()
            return net["c1"].children() == tunnels and numbers(net["c1"]) != before

        wait_for(again, "the tunnel by the former key", 30)
