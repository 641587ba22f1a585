# SPDX-License-Identifier: GPL-3.0-or-later
"""What surrounds the loop and can be tested without it: last-known-good, cgroups, listeners, echoes, words."""

from __future__ import annotations

import json
import os
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import agent_mesh as mesh
import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.agent import checks, prober, status
from isthmus_agent.agent.cgroups import CgroupTracker, locate
from isthmus_agent.agent.files import write_atomically
from isthmus_agent.agent.names import NamesFile
from isthmus_agent.cli import main, text
from isthmus_agent.cli.client import AgentAbsent, AgentSilent, ask
from isthmus_agent.desired import path_mtu
from isthmus_agent.state.lastgood import LastGood, LastGoodError
from isthmus_mesh.documents import PeerStatus
from isthmus_mesh.spec import Cgroup


@given(
    st.dictionaries(st.text(max_size=20), st.text(max_size=40).map(str.encode), max_size=5),
    st.dictionaries(st.text(max_size=9), st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1)), max_size=3),
)
def test_last_good_round_trip(documents, believed):
    last = LastGood("onprem", "2026-01-02T03:04:05Z", documents, believed)
    assert LastGood.from_json(last.to_json()) == last


def test_last_good_makes_the_same_state_again():
    decoder = mesh.decoder()
    for key, value in mesh.documents({"onprem": [1], "cloud": [1, 2]}).items():
        decoder.put(key, value)
    last = LastGood("onprem", "2026-01-02T03:04:05Z", decoder.documents())
    assert mesh.state(dict(LastGood.from_json(last.to_json()).documents)) == decoder.state()


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 2},
        {"schema": None},
        {"documents": None},
        {"documents": {"a": 1}},
        {"cluster": 1},
        {"believed": None},
        {"believed": {"p": [1]}},
        {"believed": {"p": ["xyz", 1]}},
        {"believed": {"p": ["a", float("inf")]}},
        {"documents": {"a": "\ud800"}},
    ],
)
def test_a_damaged_last_good_is_refused(damage):
    good = json.loads(LastGood("onprem", "2026-01-02T03:04:05Z", {"a": b"b"}, {"p": (1, 2)}).to_json())
    with pytest.raises(LastGoodError):
        LastGood.from_json(json.dumps({**good, **damage}))


@given(st.binary(max_size=60))
def test_no_bytes_are_taken_for_a_last_good(junk):
    with pytest.raises(LastGoodError):
        LastGood.from_json(junk)


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"two", 0o600)
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_names_are_written_only_when_they_differ(tmp_path):
    names = NamesFile(tmp_path)
    wanted = {"b.shop.svc.x": IPv4Address("10.0.0.2"), "a.shop.svc.x": IPv4Address("10.0.0.1")}
    assert names.write(wanted) is True
    assert (tmp_path / "hosts").read_text() == "10.0.0.1 a.shop.svc.x\n10.0.0.2 b.shop.svc.x\n"
    inode = (tmp_path / "hosts").stat().st_ino
    assert names.write(dict(reversed(wanted.items()))) is False
    assert (tmp_path / "hosts").stat().st_ino == inode


def test_every_change_of_names_is_marked_and_so_is_a_start(tmp_path):
    """The mark is taken away by the service that has dnsmasq read the names."""
    names, mark = NamesFile(tmp_path), tmp_path / "changed"
    first, second = {"a.shop.svc.x": IPv4Address("10.0.0.1")}, {"a.shop.svc.x": IPv4Address("10.0.0.2")}
    names.write(first)
    mark.unlink()
    names.write(first)
    assert not mark.exists()
    names.write(second)
    mark.unlink()
    assert NamesFile(tmp_path).write(second) is False
    assert mark.exists(), "the agent before may have died between the file and its mark"


@pytest.mark.parametrize(
    ("directory", "cgroup"),
    [
        ("system.slice/web.service", Cgroup("unit", "web.service")),
        ("system.slice/web.service", Cgroup("unit", "web")),
        ("machine.slice/machine-lab.slice/web.service", Cgroup("unit", "web.service")),
        ("system.slice/system-web.slice/web@1.service", Cgroup("unit", "web@1.service")),
        ("shop.slice/shop-web.slice", Cgroup("slice", "shop-web.slice")),
        ("shop.slice", Cgroup("slice", "shop")),
        ("pods/one", Cgroup("path", "/pods/one")),
    ],
)
def test_where_a_cgroup_is(tmp_path, directory, cgroup):
    assert locate(tmp_path, cgroup) is None
    (tmp_path / directory).mkdir(parents=True)
    assert locate(tmp_path, cgroup) == tmp_path / directory


def test_a_unit_inside_another_unit_is_not_taken_for_it(tmp_path):
    """A container's inner systemd has units of the same names; they are below a service or scope, not a slice."""
    (tmp_path / "system.slice" / "container.service" / "system.slice" / "web.service").mkdir(parents=True)
    assert locate(tmp_path, Cgroup("unit", "web.service")) is None


def test_a_cgroup_is_followed_when_it_is_made_anew(tmp_path):
    tracker = CgroupTracker(tmp_path, mesh.spec().workloads)
    assert tracker.poll() is False
    unit = tmp_path / "system.slice" / "web.service"
    unit.mkdir(parents=True)
    assert tracker.poll(search=False) is False, "not looked for in every poll"
    assert tracker.poll() is True
    assert tracker.ids == {("shop", "web"): (unit.stat().st_ino,)}
    assert tracker.poll(search=False) is False
    unit.rename(tmp_path / "old")
    unit.mkdir()
    assert tracker.poll(search=False) is True
    assert tracker.ids == {("shop", "web"): (unit.stat().st_ino,)}
    unit.rmdir()
    assert tracker.poll(search=False) is True
    assert tracker.ids == {}


PROC_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0B0112C6:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0B0112C6:1F91 0100007F:0016 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
"""
PROC_TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue
   0: 00000000000000000000000000000000:1F92 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 0000000000000000FFFF00000B0112C6:1F93 00000000000000000000000000000000:0000 0A 00000000:00000000
"""
PROC_UDP = """\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  100: 0B0112C6:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0
  101: 0200650A:0036 0100007F:0016 01 00000000:00000000 00:00000000 00000000     0        0 2 2 0 0
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "tcp").write_text(PROC_TCP)
    (tmp_path / "tcp6").write_text(PROC_TCP6)
    (tmp_path / "udp").write_text(PROC_UDP)
    return tmp_path  # without udp6, as with a kernel that has no IPv6


@pytest.mark.parametrize(
    ("port", "address", "elsewhere"),
    [
        (8080, "10.101.0.2", ("198.18.1.11",)),
        (8080, "198.18.1.11", ()),
        (22, "10.101.0.2", ()),  # on all addresses
        (8081, "10.101.0.2", ()),  # a connection, not a listener
        (8082, "10.101.0.2", ()),  # on all addresses of both families
        (8083, "10.101.0.2", ("198.18.1.11",)),  # a JVM on one address
        (9999, "10.101.0.2", ()),
    ],
)
def test_daemons_that_listen_elsewhere_are_found(proc, port, address, elsewhere):
    found = checks.misplaced(IPv4Address(address), checks.listeners(port, proc=proc))
    assert {ip_address(each) for each in found} == {ip_address(each) for each in elsewhere}


def test_datagram_sockets_that_are_elsewhere_are_found(proc):
    own = IPv4Address("10.101.0.2")
    assert checks.misplaced(own, checks.listeners(53, "UDP", proc)) == ("198.18.1.11",)
    assert checks.misplaced(own, checks.listeners(54, "UDP", proc)) == (), "connected: a client"
    assert checks.misplaced(own, checks.listeners(53, "TCP", proc)) == ()


def test_another_workloads_daemon_is_not_taken_for_ours(proc):
    listening = checks.listeners(8080, proc=proc) | checks.listeners(8083, proc=proc)
    assert checks.misplaced(IPv4Address("10.101.0.2"), listening, {IPv4Address("198.18.1.11")}) == ()


def test_echo_request_and_reply():
    request = prober.echo_request(0xABCD, 7)
    assert prober.checksum(request) == 0, "a right checksum sums up to nothing"
    header = bytes([0x45]) + bytes(19)
    assert prober.parse_reply(header + bytes([0, 0]) + request[2:]) == (0xABCD, 7)
    assert prober.parse_reply(header + request) is None, "our own request is no reply"
    assert prober.is_request(header + request)
    assert not prober.is_request(header + bytes([0, 0]) + request[2:])
    assert len(header + request) == path_mtu.SMALL
    assert len(header + prober.echo_request(0xABCD, 7, 1450)) == 1450


@given(st.binary(max_size=80))
def test_no_packet_can_raise(packet):
    prober.parse_reply(packet)
    prober.is_request(packet)


@pytest.mark.parametrize(
    ("said", "age", "etcd", "shown"),
    [
        ("connected", 3.0, True, "connected"),
        ("connected", 300.0, True, "silent"),
        ("connected", None, True, "silent"),
        ("connected", 3.0, False, "unknown"),
        ("unreachable", 300.0, True, "unreachable"),
        ("refused", 1.0, True, "refused"),
    ],
)
def test_a_peer_is_connected_only_with_a_proof(said, age, etcd, shown):
    assert status.peer_state(said, age, etcd) == shown


@pytest.mark.parametrize(
    ("said_age", "change", "age"),
    [
        (2.0, (1000.0, 2), 7.0),  # the clocks' difference, 300 s, does not matter
        (2.0, (1000.0, 1), 300.0),  # perhaps an old document: the worse of both
        (400.0, (1000.0, 0), 405.0),
        (None, (1000.0, 9), 300.0),  # an older registrar
    ],
)
def test_the_age_of_a_peer_is_of_one_clock(said_age, change, age):
    said = PeerStatus("connected", last_proof="1970-01-01T00:01:00Z", proof_age=said_age)
    assert status.proof_age(said, change, 360.0, 1005.0) == age


@pytest.mark.parametrize(
    ("words", "seconds"), [("1970-01-01T00:01:00Z", 60.0), ("1970-01-01T01:00:00+01:00", 0.0), ("soon", None)]
)
def test_times(words, seconds):
    assert status.parse_time(words) == seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "never"), (0, "0s"), (59.4, "59s"), (61, "1m1s"), (3600, "1h0m"), (90061, "1d1h")],
)
def test_ages(seconds, words):
    assert text.age(seconds) == words


def test_services_and_peers_in_words():
    backend = {
        "address": "10.102.0.2",
        "port": 8080,
        "cluster": "cloud",
        "node": None,
        "reachable": False,
        "used": False,
        "connects": 3,
        "datagrams": 0,
    }
    service = {
        "namespace": "shop",
        "name": "web",
        "address": None,
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        "headless": False,
        "global": True,
        "affinity": "local",
        "session_affinity": 0,
        "backends": [backend],
    }
    lines = text.services({"services": [service]}).splitlines()
    assert lines[1].split() == [
        *("shop/web", "none", "yet", "80/TCP", "global,", "local", "cloud/?", "10.102.0.2:8080", "unreachable", "3")
    ]
    assert "global, local, clients stay 3h0m" in text.services({"services": [{**service, "session_affinity": 10800}]})
    assert "shop/web  headless " in text.services({"services": [{**service, "headless": True}]})
    empty = text.services({"services": [{**service, "backends": []}]})
    assert "no backend" in empty
    peer = {
        "name": "cloud",
        "id": 2,
        "state": "unknown",
        "age": 125.0,
        "nodes_up": 0,
        "nodes_probed": 1,
        "nodes": 2,
        "keys": {"services": 1},
        "refused": {"not JSON": 2},
        "refused_last": ["cilium/state/x", "not JSON"],
        "endpoint": None,
    }
    api = {
        "server": "https://198.18.4.11:6443",
        "state": "absent",
        "since": "2026-01-02T03:04:05Z",
        "error": "no answer in time",
        "objects": {"nodes": 3, "pods": 10},
        "problems": ["nodes kube-9: addresses of 2 pods are not published"],
    }
    words = text.peers({"own_etcd": {"connected": False, "age": 125.0}, "peers": [peer], "kubernetes": api})
    assert words.endswith(
        "Kubernetes API https://198.18.4.11:6443: absent since 2026-01-02T03:04:05Z; 3 nodes, 10 pods\n"
        "! no answer in time\n! nodes kube-9: addresses of 2 pods are not published"
    )
    words = text.peers({"own_etcd": {"connected": False, "age": 125.0}, "peers": [peer], "kubernetes": None})
    assert "2m5s ago" in words
    assert "own etcd does not answer (last proof 2m5s ago)" in words
    assert "cilium/state/x was refused: not JSON" in words


def test_what_a_peer_wrote_cannot_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    main._print({"name": "web\x1b]0;owned\x07"}, "text", lambda document: str(document["name"]) + "\nnext")
    assert capsys.readouterr().out == "web\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}\nnext\n"


def test_the_datapath_is_not_removed_under_an_agent_that_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*_: object) -> None:
        raise AgentSilent("the agent does not answer (timed out)")

    monkeypatch.setattr(main, "ask", slow)
    assert main.main(["datapath", "remove", "--yes"]) == main.DIFFERENT
    assert "systemctl stop isthmusd" in capsys.readouterr().err


def test_nobody_on_the_socket_is_told_apart_from_silence(tmp_path: Path) -> None:
    with pytest.raises(AgentAbsent, match="does not answer"):
        ask(tmp_path / "agent.sock", "/v1/peers")
