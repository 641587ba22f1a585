# SPDX-License-Identifier: GPL-3.0-or-later
"""Which hosts ask which others for which ports, before a mesh is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ansible_collections.isthmus.mesh.plugins.filter.peer_probes import FROM_EACH_CLUSTER, peer_probes
from ansible_collections.isthmus.mesh.plugins.module_utils import listener

GATEWAYS = {"udp/500": "listener", "udp/4500": "listener"}
PORTS = {"udp/8472": "listener", "tcp/2379": "listener", "tcp/2380": "listener"}


def cluster(name: str, size: int, members: int, authority: str | None = None) -> dict[str, Any]:
    number = ord(name)
    hosts = {
        f"{name}{place}": {"site": name, "underlay4": f"10.{number}.0.{place}", "advertise4": f"192.0.{number}.{place}"}
        for place in range(1, size + 1)
    }
    etcd = {"client_port": 2379, "peer_port": 2380, "members": [f"{name}{place}" for place in range(1, members + 1)]}
    return {"name": name, "state": "present", "hosts": hosts, "etcd": etcd, "ca_certificate": authority}


def estate(*clusters: dict[str, Any]) -> dict[str, Any]:
    return {"roster": {"overlay_port": 8472}, **{f"clusters/{one['name']}": one for one in clusters}}


def hosts_of(record: dict[str, Any]) -> list[str]:
    return [name for key, document in record.items() if key != "roster" for name in document["hosts"]]


def entered(
    names: Iterable[str], joining: Iterable[str], listening: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    new = set(joining)
    return [
        {
            "inventory_hostname": name,
            "__preflight_listener": {"listening": dict(PORTS if listening is None else listening)},
            "__preflight_result": {"joins": name in new},
        }
        for name in names
    ]


def asked(found: dict[str, list[dict[str, Any]]]) -> set[tuple[str, str, str, int]]:
    return {(host, one["host"], one["protocol"], one["port"]) for host, targets in found.items() for one in targets}


def test_every_host_is_asked_from_every_site_and_by_few() -> None:
    record = estate(cluster("a", 40, 3), cluster("b", 7, 1), cluster("c", 20, 5))
    names = hosts_of(record)
    found = peer_probes(entered(names, names), record, names)
    questions = asked(found)
    for target in names:
        overlay = [host for host, other, protocol, _port in questions if (other, protocol) == (target, "udp")]
        assert sorted(host[0] for host in overlay) == ["a", "b", "c"], target
        assert target not in overlay
    for target in ("a1", "b1", "c3"):
        own = {host for host in names if host[0] == target[0]} - {target}
        clients = {host for host, other, _protocol, port in questions if (other, port) == (target, 2379)}
        assert own <= clients
        abroad = Counter(host[0] for host in clients - own)
        assert all(0 < number <= FROM_EACH_CLUSTER for number in abroad.values())
        assert set(abroad) == {"a", "b", "c"} - {target[0]}
    raft = {(host, other) for host, other, _protocol, port in questions if port == 2380}
    assert {pair for pair in raft if pair[0][0] == "a"} == {(x, y) for x in A for y in A if x != y}
    # As many questions as a run can wait for: the overlay's of the larger sites, and etcd's.
    assert max(len(targets) for targets in found.values()) < 40


A = ("a1", "a2", "a3")


def test_addresses_are_those_that_are_dialled() -> None:
    record = estate(cluster("a", 2, 1), cluster("b", 1, 1))
    found = peer_probes(entered(hosts_of(record), ["a1"]), record, hosts_of(record))
    assert {one["address"] for one in found["a2"]} == {"10.97.0.1"}
    assert {one["address"] for one in found["b1"]} == {"192.0.97.1"}


def test_of_two_hosts_one_is_new_and_both_were_entered() -> None:
    record = estate(cluster("a", 3, 3), cluster("b", 2, 1))
    names = [name for name in hosts_of(record) if name != "b1"]
    questions = asked(peer_probes(entered(names, ["a3"]), record, hosts_of(record)))
    assert questions
    assert [one for one in questions if "a3" not in one[:2] or "b1" in one[:2]] == []
    assert asked(peer_probes(entered(names, []), record, hosts_of(record))) == set()


def test_a_port_that_nobody_answers_on_is_not_asked_and_an_etcd_is_asked_whose_it_is() -> None:
    record = estate(cluster("a", 2, 1, "PEM"))
    members = entered(["a1", "a2"], ["a2"], {"udp/8472": "listener", "tcp/2379": "etcd", "tcp/2380": "other"})
    found = peer_probes(members, record, ["a1", "a2"])
    assert [(one["port"], one["answers"], one["authority"]) for one in found["a2"]] == [
        (8472, "listener", ""),
        (2379, "etcd", "PEM"),
    ]
    members[0]["__preflight_listener"] = {"msg": "it cannot listen"}
    assert peer_probes(members, record, ["a1", "a2"]) == {"a2": []}


def test_a_new_host_alone_asks_the_etcd_of_its_cluster_which_is_not_in_the_run() -> None:
    """One that is in the run and could not be entered is no question."""
    record = estate(cluster("a", 4, 3, "PEM"), cluster("b", 1, 1, "PEM"))
    found = peer_probes(entered(["a4"], ["a4"]), record, ["a4", "a1"])
    assert [(one["host"], one["port"], one["answers"], one["one_is_enough"]) for one in found["a4"]] == [
        ("a2", 2379, "etcd", True),
        ("a3", 2379, "etcd", True),
    ]
    record["clusters/a"]["ca_certificate"] = None  # it does not run yet
    assert peer_probes(entered(["a4"], ["a4"]), record, ["a4"]) == {"a4": []}


def test_the_listeners_text_survives_a_command_line_of_systemd() -> None:
    """systemd puts variables in for $ in the arguments of a command."""
    with open(listener.__file__, encoding="utf-8") as file:
        text = file.read()
    assert "$" not in text
    assert len(text) < 20_000


def test_sites_that_encrypt_ask_for_wireguards_port() -> None:
    """While it is turned on or off for both: packets in clear are needed too."""
    ports = {**PORTS, "udp/51871": "listener"}
    for stage, wanted in (("demands", {51871}), ("sends", {8472, 51871}), ("plain", {8472})):
        record = estate(cluster("a", 2, 1), cluster("b", 2, 1))
        record["roster"]["encryption"] = {"all": "plain", "pairs": {"a b": stage}}
        names = hosts_of(record)
        questions = asked(peer_probes(entered(names, names, ports), record, names))
        for target in ("b1", "b2"):
            found = {
                (host[0], port) for host, other, protocol, port in questions if (other, protocol) == (target, "udp")
            }
            assert {port for site, port in found if site == "a"} == wanted, stage
            assert {port for site, port in found if site == "b"} == {8472}


def test_nothing_is_asked_across_a_tunnel_that_is_not_there_yet() -> None:
    record = estate(cluster("a", 2, 1), cluster("b", 2, 1), cluster("c", 1, 1))
    record["roster"]["ipsec"] = {"all": "plain", "pairs": {"a b": "demands"}}
    names = hosts_of(record)
    questions = asked(peer_probes(entered(names, names), record, names))
    across = {(host[0], other[0]) for host, other, _protocol, _port in questions}
    assert {("a", "b"), ("b", "a")}.isdisjoint(across)
    assert {("a", "c"), ("c", "b"), ("a", "a")} <= across


def test_gateways_ask_each_other_for_ipsecs_ports_where_neither_has_had_a_tunnel_of_the_two_sites() -> None:
    """At the address that the tunnel will have. c's gateway is not ours; a3 has had a tunnel with b before."""
    record = estate(cluster("a", 3, 1), cluster("b", 2, 1), cluster("c", 1, 1))
    record["roster"]["ipsec"] = {"all": "plain", "pairs": {"a b": "demands", "a c": "demands"}}
    names = hosts_of(record)
    members = {one["inventory_hostname"]: one for one in entered(names, names, {**PORTS, **GATEWAYS})}
    for name, others in (("a2", {"b2": "203.0.113.2"}), ("b2", {"a2": "203.0.113.1", "a3": "203.0.113.3"})):
        tunnels = [{"host": other, "address": address} for other, address in others.items()]
        members[name]["__preflight_result"]["tunnels"] = tunnels

    def across() -> set[tuple[str, str, str, int]]:
        found = peer_probes(list(members.values()), record, names)
        between = {
            (host, one["host"], one["address"], one["port"])
            for host, targets in found.items()
            for one in targets
            if {host[0], one["host"][0]} in ({"a", "b"}, {"a", "c"})
        }
        assert all(port in (500, 4500) for *_place, port in between)
        return between

    assert across() == {
        *(("a2", "b2", "203.0.113.2", port) for port in (500, 4500)),
        *(("b2", "a2", "203.0.113.1", port) for port in (500, 4500)),
    }
    del members["a2"]["__preflight_listener"]["listening"]
    assert across() == set(), "it could not be entered"


def test_a_site_to_which_nobody_outside_opens_anything_asks_for_wireguard_and_is_asked_nothing() -> None:
    record = estate(cluster("a", 2, 1), cluster("b", 2, 1))
    record["roster"] |= {"encryption": {"all": "demands", "pairs": {}}, "closed": ["b"]}
    names = hosts_of(record)
    ports = {**PORTS, "udp/51871": "listener"}
    questions = asked(peer_probes(entered(names, names, ports), record, names))
    between = {one for one in questions if one[0][0] != one[1][0]}
    assert {(host[0], other[0], protocol, port) for host, other, protocol, port in between} == {
        ("b", "a", "udp", 51871),
    }
    assert {("a2", "a1", "tcp", 2379), ("b2", "b1", "tcp", 2379)} <= questions, "within a site as everywhere"
