# SPDX-License-Identifier: GPL-3.0-or-later
"""Our table in netfilter, looked at with nft and not with our own code, in a namespace of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import netfilter
from ansible_collections.isthmus.mesh.plugins.modules import teardown
from bpf.topology import CLONE_NEWNET
from isthmus_agent import netlink
from isthmus_agent.desired.datapath import Datapath, KeepSource
from isthmus_agent.netlink import nftables
from isthmus_mesh import ipsec

Call = Callable[..., Any]

HOST = IPv4Network("10.104.0.16/28")
PODS = IPv4Network("10.244.1.0/24")
CLUSTER = IPv4Network("10.244.0.0/16")
# Next to each other, as hosts' addresses are.
MEMBERS = frozenset(IPv4Network(each) for each in ("198.18.1.13/32", "198.18.1.14/31", "198.18.2.11/32"))
WANTED = Datapath(4, keep_source=KeepSource(HOST, frozenset({HOST, PODS}), pods=frozenset({CLUSTER}), members=MEMBERS))
PRECAUTION = Datapath(4, keep_source=KeepSource(HOST, frozenset({HOST}), precaution=True))
FOREIGN = """
add table ip nat
add chain ip nat POSTROUTING { type nat hook postrouting priority srcnat; }
add rule ip nat POSTROUTING masquerade
add table ip kube-proxy
add set ip kube-proxy local { type ipv4_addr; }
add table inet isthmus
add chain inet isthmus postrouting { type filter hook postrouting priority 0; }
"""


@pytest.fixture
def call() -> Iterator[Call]:
    """Runs a function in a fresh namespace that has the overlay device."""

    def enter() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")

    with ThreadPoolExecutor(1, initializer=enter) as pool:

        def run(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            return pool.submit(function, *arguments, **named).result()

        run(netlink.ensure_overlay)
        yield run


def _nft(*words: str, text: str | None = None) -> str:
    return subprocess.run(["nft", *words], input=text, check=True, capture_output=True, text=True).stdout


def _elements(name: str = "local") -> list[str]:
    document = json.loads(_nft("-j", "list", "set", "ip", "isthmus", name))
    found = next(entry["set"] for entry in document["nftables"] if "set" in entry).get("elem", [])
    return sorted(f"{e['prefix']['addr']}/{e['prefix']['len']}" if isinstance(e, dict) else f"{e}/32" for e in found)


def test_the_table_is_made_once_and_shows_as_it_is_meant(call: Call) -> None:
    assert call(netlink.audit_network, WANTED) == ["isthmus0 is down", "nft table ip isthmus is missing"]
    assert call(netlink.apply_network, WANTED).changes == ("add nft table ip isthmus", "set isthmus0 up")
    text = call(_nft, "list", "table", "ip", "isthmus")
    for words in (
        "type nat hook postrouting priority -199; policy accept;",
        'oifname "isthmus0" meta mark & 0x00004000 == 0x00000000 ip saddr @local snat to ip saddr',
        'iifname "isthmus0" meta mark & 0x00004000 == 0x00000000 ip daddr @local snat to ip saddr',
        "ip saddr 10.104.0.16/28 meta mark & 0x00004000 == 0x00000000 ip daddr @local snat to ip saddr",
        "ip saddr @local meta mark & 0x00004000 == 0x00000000 ip daddr 10.244.0.0/16 ip daddr != @local snat to ip",
        "elements = { 10.104.0.16/28, 10.244.1.0/24 }",
        "type filter hook prerouting priority dstnat + 10; policy accept;",
        "ip daddr @members ct original ip saddr @local ct reply ip daddr != @local "
        "meta mark set meta mark & 0xffffff4b | 0x0000004b",
        "ip saddr @members ct original ip saddr @local ct reply ip daddr != @local "
        "meta mark set meta mark & 0xffffff4b | 0x0000004b",
    ):
        assert words in text, text
    assert call(netlink.audit_network, WANTED) == []
    handle = call(_nft, "-a", "list", "table", "ip", "isthmus")
    assert not call(netlink.apply_network, WANTED)
    assert call(_nft, "-a", "list", "table", "ip", "isthmus") == handle, "what is as wanted is not written again"


def test_what_leaves_the_mesh_is_masqueraded_before_anything_else_is_decided(call: Call) -> None:
    mesh = frozenset({IPv4Network("10.96.0.0/11"), IPv4Network("198.18.1.11/32")})
    wanted = replace(WANTED, keep_source=KeepSource(HOST, frozenset({HOST}), native=True, mesh=mesh))
    assert call(netlink.apply_network, WANTED).changes[0] == "add nft table ip isthmus"
    assert call(netlink.apply_network, wanted, made=WANTED).changes == ("change nft table ip isthmus",)
    text = call(_nft, "list", "chain", "ip", "isthmus", "postrouting")
    first, second, *_ = (line for line in text.splitlines() if "saddr 10.104.0.16/28" in line)
    assert 'ip saddr 10.104.0.16/28 oifname != "isthmus0" oifname != "lo" ip daddr != @mesh masquerade' in first
    assert "snat to ip saddr" in second
    assert call(_elements, "mesh") == ["10.96.0.0/11", "198.18.1.11/32"]
    assert call(netlink.audit_network, wanted) == []
    call(_nft, "delete element ip isthmus mesh { 198.18.1.11 }")
    assert call(netlink.audit_network, wanted) == [
        "nft table ip isthmus: set mesh begins intervals at 10.96.0.0; wanted: 10.96.0.0/11, 198.18.1.11/32"
    ]
    assert call(netlink.apply_network, WANTED, made=wanted).changes == ("change nft table ip isthmus",)
    assert "@mesh" not in call(_nft, "list", "table", "ip", "isthmus")


def test_nothing_of_others_is_touched_and_all_of_ours_goes(call: Call) -> None:
    call(_nft, "-f", "-", text=FOREIGN)
    before = call(_nft, "list", "ruleset")
    call(netlink.apply_network, WANTED)
    more = replace(WANTED, keep_source=KeepSource(HOST, frozenset({HOST})))
    assert call(netlink.apply_network, more, made=WANTED).changes == ("change nft table ip isthmus",)
    assert "nft table ip isthmus" in call(netlink.remove_network)
    assert call(_nft, "list", "ruleset") == before
    assert call(netlink.remove_network) == []


@pytest.mark.parametrize("wanted", [WANTED, PRECAUTION], ids=["always", "precaution"])
def test_the_collections_teardown_takes_it_away_without_the_agent(call: Call, wanted: Datapath) -> None:
    call(_nft, "-f", "-", text=FOREIGN)
    before = call(_nft, "list", "ruleset")
    assert not call(netfilter.has_table, teardown.TABLE)
    call(netlink.apply_network, wanted)
    assert call(netfilter.has_table, teardown.TABLE)
    call(netfilter.delete_table, teardown.TABLE)
    assert call(_nft, "list", "ruleset") == before
    with pytest.raises(FileNotFoundError):
        call(netfilter.delete_table, teardown.TABLE)


def test_a_host_that_is_a_node_no_more_has_no_table(call: Call) -> None:
    call(netlink.apply_network, WANTED)
    plain = replace(WANTED, keep_source=None)
    assert call(netlink.audit_network, plain) == ["nft table ip isthmus is not wanted"]
    assert call(netlink.apply_network, plain).changes == ("remove nft table ip isthmus",)
    assert call(_nft, "list", "ruleset") == ""


def test_the_set_follows_in_one_step_and_holds_thousands(call: Call) -> None:
    call(netlink.apply_network, WANTED)
    many = frozenset({HOST, *(IPv4Network((0x0AF40000 + 2 * number, 32)) for number in range(3000))})
    members = frozenset(IPv4Network((0xC6120000 + 2 * number, 32)) for number in range(3000))
    wanted = replace(WANTED, keep_source=KeepSource(HOST, many, members=members))
    assert call(netlink.apply_network, wanted, made=WANTED).changes == ("change nft table ip isthmus",)
    assert call(_elements) == sorted(str(each) for each in many)
    assert call(_elements, "members") == sorted(str(each) for each in members)
    assert call(netlink.audit_network, wanted) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("flush ruleset", "nft table ip isthmus is missing"),
        ("delete table ip isthmus", "nft table ip isthmus is missing"),
        ("flush chain ip isthmus postrouting", "nft table ip isthmus has other rules than wanted"),
        ("insert rule ip isthmus postrouting accept", "nft table ip isthmus has other rules than wanted"),
        ("add chain ip isthmus other", "nft table ip isthmus has other chains than wanted"),
        (
            "delete element ip isthmus local { 10.244.1.0/24 }",
            "nft table ip isthmus: set local begins intervals at 10.104.0.16; wanted: 10.104.0.16/28, 10.244.1.0/24",
        ),
        (
            "delete element ip isthmus members { 198.18.2.11 }",
            "nft table ip isthmus: set members begins intervals at 198.18.1.13, 198.18.1.14; "
            "wanted: 198.18.1.13/32, 198.18.1.14/31, 198.18.2.11/32",
        ),
        ("flush chain ip isthmus prerouting", "nft table ip isthmus has other rules than wanted"),
        (
            "add element ip isthmus local { 192.0.2.0/24 }",
            "nft table ip isthmus: set local begins intervals at 10.104.0.16, 10.244.1.0, 192.0.2.0; "
            "wanted: 10.104.0.16/28, 10.244.1.0/24",
        ),
    ],
)
def test_damage_is_named_and_repaired(call: Call, damage: str, words: str) -> None:
    call(netlink.apply_network, WANTED)
    before = call(_nft, "list", "table", "ip", "isthmus")
    call(_nft, damage)
    assert call(netlink.audit_network, WANTED) == [words]
    call(netlink.apply_network, WANTED)
    assert call(netlink.audit_network, WANTED) == []
    assert call(_nft, "list", "table", "ip", "isthmus") == before


def test_a_replaced_rule_is_found(call: Call) -> None:
    call(netlink.apply_network, WANTED)
    listed = json.loads(call(_nft, "-j", "-a", "list", "chain", "ip", "isthmus", "postrouting"))
    handle = next(entry["rule"]["handle"] for entry in listed["nftables"] if "rule" in entry)
    call(_nft, f"replace rule ip isthmus postrouting handle {handle} counter accept")
    assert call(netlink.audit_network, WANTED) == ["nft table ip isthmus has other rules than wanted"]


@pytest.mark.parametrize(
    "damage", ["flush ruleset", "flush chain ip isthmus postrouting", "flush set ip isthmus local"]
)
def test_what_another_program_took_is_put_back_without_an_audit(call: Call, damage: str) -> None:
    keep = WANTED.keep_source
    call(netlink.apply_network, WANTED)
    before = call(_nft, "list", "table", "ip", "isthmus")
    assert call(netlink.mend_keep_source, keep, netlink.OVERLAY) == ((), 0)
    call(_nft, damage)
    found, _ = call(netlink.mend_keep_source, keep, netlink.OVERLAY)
    assert len(found) == 1
    assert call(_nft, "list", "table", "ip", "isthmus") == before
    assert call(netlink.mend_keep_source, keep, netlink.OVERLAY) == ((), 0)


BEHIND = {
    "networks": ["198.18.1.0/24"],
    "far": {"cloud": {"stage": "demands", "networks": ["198.51.100.0/24"]}},
    "via": "198.18.1.1",
}
"""The `ipsec` of a host whose packets go through a gateway."""


def _send_beside(packets: int) -> None:
    """To what is behind a gateway, and not over it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(packets):
            with contextlib.suppress(PermissionError):  # what a rule says to who sends
                sender.sendto(b"beside", ("198.51.100.7", 9))


def test_what_the_rules_of_gateways_drop_is_counted_in_both_of_their_tables(call: Call) -> None:
    assert call(netlink.guard_drops) == 0, "there are none"
    for words in (
        "link add wan type veth peer name lan",
        "link set wan up",
        "link set lan up",
        "addr add 198.18.1.13/24 dev wan",
        "route add 198.51.100.0/24 dev wan",
    ):
        call(subprocess.run, ["ip", *words.split()], check=True)
    rules = ipsec.guard(BEHIND)
    assert rules is not None
    call(_nft, "-f", "-", text=FOREIGN.replace("inet isthmus", f"inet {ipsec.GUARD}"))
    call(_nft, "add", "rule", "inet", ipsec.GUARD, "postrouting", "counter")
    call(_nft, "-f", "-", text=rules)
    assert call(netlink.guard_drops) == 0
    call(_send_beside, 3)
    assert call(netlink.guard_drops) == 3
    kept = rules.replace(f"table ip {ipsec.GUARD}", f"table ip {ipsec.KEPT}")
    kept = kept.replace("priority 300", "priority 301")
    call(_nft, "-f", "-", text=kept)
    call(_send_beside, 2)
    assert call(netlink.guard_drops) == 5, "the first drops it, the second never sees it"
    call(_nft, "delete", "table", "ip", ipsec.GUARD)
    call(_send_beside, 4)
    assert call(netlink.guard_drops) == 4, "of the one that is left"


def test_what_the_kernel_refuses_is_told_and_the_table_stays(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    call(netlink.apply_network, WANTED)
    before = call(_nft, "list", "table", "ip", "isthmus")
    monkeypatch.setattr(nftables, "_keep", lambda: nftables._expression("no-such-expression"))
    more = replace(WANTED, keep_source=KeepSource(HOST, frozenset({HOST})))
    with pytest.raises(netlink.NetworkError, match="cannot write nft table ip isthmus: No such file or directory"):
        call(netlink.apply_network, more)
    assert call(_nft, "list", "table", "ip", "isthmus") == before


def _tables() -> str:
    return _nft("list", "tables")


@pytest.mark.parametrize(
    "rules",
    [
        "add table ip filter; add chain ip filter input { type filter hook input priority 0; }",
        "add table ip nat; add chain ip nat docker { type nat hook prerouting priority dstnat; }",
        "add table inet isthmus; add chain inet isthmus postrouting { type filter hook postrouting priority 0; }",
    ],
)
def test_a_precaution_is_not_made_where_nobody_translates_sources(call: Call, rules: str) -> None:
    """It would have the kernel follow every connection of the host."""
    call(_nft, rules)
    before = call(_nft, "list", "ruleset")
    assert call(netlink.apply_network, PRECAUTION).changes == ("set isthmus0 up",)
    assert call(netlink.mend_keep_source, PRECAUTION.keep_source, netlink.OVERLAY) == ((), 0)
    assert call(netlink.audit_network, PRECAUTION) == []
    assert call(_nft, "list", "ruleset") == before


NAT = [
    ("nft", "add table ip nat; add chain ip nat POSTROUTING { type nat hook postrouting priority srcnat; }"),
    ("nft", "add table inet isthmus; add chain inet isthmus a { type nat hook postrouting priority 200; }"),
    ("iptables-legacy", "-t nat -A POSTROUTING -j MASQUERADE"),
]


@pytest.mark.parametrize(("program", "rules"), NAT)
def test_a_precaution_is_one_rule_and_comes_with_the_first_who_translates(call: Call, program: str, rules: str) -> None:
    words = [rules] if program == "nft" else rules.split()
    call(netlink.apply_network, PRECAUTION)
    call(subprocess.run, [program, *words], check=True)
    assert call(netlink.audit_network, PRECAUTION) == []
    assert call(netlink.mend_keep_source, PRECAUTION.keep_source, netlink.OVERLAY, False) == (
        ("add nft table ip isthmus",),
        0,
    )
    text = call(_nft, "list", "table", "ip", "isthmus")
    assert "type nat hook postrouting priority -199; policy accept;" in text
    assert "ip saddr 10.104.0.16/28 snat to ip saddr" in text
    assert (text.count("hook"), text.count("comment"), text.count("set ")) == (1, 1, 0), text
    assert call(netlink.audit_network, PRECAUTION) == []
    assert call(netlink.mend_keep_source, PRECAUTION.keep_source, netlink.OVERLAY) == ((), 0)
    call(_nft, "flush chain ip isthmus postrouting")
    assert call(netlink.audit_network, PRECAUTION) == ["nft table ip isthmus has other rules than wanted"]
    assert call(netlink.mend_keep_source, PRECAUTION.keep_source, netlink.OVERLAY) == (
        ("change nft table ip isthmus",),
        0,
    )
    assert call(_nft, "list", "table", "ip", "isthmus") == text


def test_a_precaution_goes_with_all_that_is_ours(call: Call) -> None:
    call(_nft, NAT[0][1])
    before = call(_nft, "list", "ruleset")
    call(netlink.apply_network, PRECAUTION)
    assert "nft table ip isthmus" in call(netlink.remove_network)
    assert call(_nft, "list", "ruleset") == before


def test_a_precaution_goes_when_nobody_has_translated_for_a_while(call: Call) -> None:
    """Not while others load their rules anew: it would be missing when they are back."""
    keep = PRECAUTION.keep_source
    call(_nft, NAT[0][1])
    assert call(netlink.apply_network, PRECAUTION).changes[0] == "add nft table ip isthmus"
    call(_nft, "delete table ip nat")
    assert call(netlink.mend_keep_source, keep, netlink.OVERLAY, False) == ((), 0)
    assert "table ip isthmus" in call(_tables)
    assert call(netlink.mend_keep_source, keep, netlink.OVERLAY) == (("remove nft table ip isthmus",), 0)
    assert call(_tables) == ""


def test_what_a_host_had_to_have_becomes_a_precaution_and_back(call: Call) -> None:
    call(_nft, NAT[0][1])
    call(netlink.apply_network, WANTED)
    whole = call(_nft, "list", "table", "ip", "isthmus")
    assert call(netlink.apply_network, PRECAUTION, made=WANTED).changes == ("change nft table ip isthmus",)
    assert call(netlink.audit_network, PRECAUTION) == []
    assert call(netlink.apply_network, WANTED, made=PRECAUTION).changes == ("change nft table ip isthmus",)
    assert call(_nft, "list", "table", "ip", "isthmus") == whole


def test_a_precaution_that_the_kernel_refuses_stops_nothing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nftables, "_keep", lambda: nftables._expression("no-such-expression"))
    call(_nft, NAT[0][1])
    assert call(netlink.apply_network, PRECAUTION).changes == ("set isthmus0 up",)
    assert call(netlink.audit_network, PRECAUTION) == []
    with pytest.raises(netlink.NetworkError, match="cannot write nft table ip isthmus: No such file or directory"):
        call(netlink.mend_keep_source, PRECAUTION.keep_source, netlink.OVERLAY)


def test_a_kernel_without_nf_tables_needs_no_precaution_before_its_other_iptables_translates(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nftables, "_SUBSYSTEM", 63)  # nobody's: the kernel answers as for one that is not there
    keep = PRECAUTION.keep_source
    assert call(netlink.apply_network, PRECAUTION).changes == ("set isthmus0 up",)
    assert call(netlink.mend_keep_source, keep, netlink.OVERLAY) == ((), 0)
    call(subprocess.run, [NAT[2][0], *NAT[2][1].split()], check=True)
    assert not call(netlink.apply_network, PRECAUTION)
    assert call(netlink.audit_network, PRECAUTION) == []
    for settled in (False, True):
        with pytest.raises(netlink.NetworkError, match=r"cannot write nft table ip isthmus: .*CONFIG_NF_TABLES"):
            call(netlink.mend_keep_source, keep, netlink.OVERLAY, settled)
    assert "nft table ip isthmus" not in call(netlink.remove_network)
