# SPDX-License-Identifier: GPL-3.0-or-later
"""What `verify` says of hosts that packets should go to without a tunnel, by what the agent says and by packets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import packets
from ansible_collections.isthmus.mesh.plugins.module_utils.verify import native, overlay, verifier
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import Verifier
from isthmus_agent.cli import client
from unit.mesh import estates

NATIVE = {"way": "native", "stage": "demands", "mtu": 1500}


class Host:
    """c1 of the estate, with an agent that says of each host of onprem what `said` has, else NATIVE. The ways that are
    in `carried` carry that many bytes, others 1500; an echo to one in `silent` is not answered, to one in `cut` only
    through the tunnel. Those in `deaf` are heard and do not hear c1."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, running: bool, encryption: str = "none") -> None:
        encrypted = {**estates.estate(), "encryption": encryption}
        before = estates.planned(estates.model(encrypted)) if running else None
        self.plan = estates.planned(estates.model({**encrypted, "routing": "native"}), before)
        self.said: dict[str, dict[str, Any]] = {}
        self.carried: dict[str, int] = {}
        self.silent: set[str] = set()
        self.cut: set[str] = set()
        self.deaf: set[str] = set()
        self.echoes: list[tuple[str, str, int, int]] = []
        (place / "node.json").write_text(json.dumps(self.plan.specs["c1"]))
        monkeypatch.setattr(Verifier, "NODE", str(place / "node.json"))
        answers = SimpleNamespace(ask=lambda _socket, _what: self.status(), AgentSilent=client.AgentSilent)
        monkeypatch.setattr(verifier, "bundle_module", lambda _module, _name: answers)
        monkeypatch.setattr(packets, "path_mtu", lambda _from, to, _mark=0: self.carried.get(to, 1500))
        monkeypatch.setattr(packets, "echo", self.echo)

    def echo(self, source: str, target: str, size: int, _timeout: float, mark: int = 0) -> None:
        self.echoes.append((source, target, size, mark))
        if target in self.silent or (mark == native.NATIVE_MARK and target in self.cut):
            raise packets.NoAnswer("no answer to 3 packets of 1500 bytes")

    def status(self) -> dict[str, Any]:
        nodes = [
            {
                "cluster": "onprem",
                "name": name,
                "routing": self.said.get(name, NATIVE),
                "deaf": name in self.deaf,
            }
            for name in ("o1", "o2", "o3")
        ]
        return {"nodes": nodes, "wireguard": None}

    def looked(self, check: Callable[..., None], asked: bool = True) -> Any:
        hosts = [{"name": f"o{n}", "cluster": "onprem", "mesh4": f"10.101.0.{16 * n - 15}"} for n in (1, 2, 3)]
        params = {
            "spec": self.plan.specs["c1"],
            "record": self.plan.record,
            "services": [],
            "hosts": hosts if asked else [],
            "timeout": 3,
        }
        found = Verifier(SimpleNamespace(params=params))
        found.look("routing", check)
        return found

    def problems(self, check: Callable[..., None]) -> list[str]:
        return list(self.looked(check, asked=check is native.check_native).problems)

    def unreached(self) -> Any:
        """Of hosts that it is asked for whether they are reached natively."""
        found = self.looked(native.check_native_way)
        assert found.problems == []
        return found.unreached


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch, running=False)


@pytest.fixture
def on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch, running=True)


def test_every_host_is_reached_natively(host: Host) -> None:
    assert host.problems(native.check_native) == []


def test_a_host_that_the_tunnel_leads_to_is_named(host: Host) -> None:
    host.said["o2"] = {"way": "tunnel", "stage": "plain", "mtu": 1450}
    (found,) = host.problems(native.check_native)
    assert found.startswith(
        "routing: packets to o2 of cluster onprem (site onprem) do not go natively as the inventory"
    )
    assert "it should be, and the way is tunnel (plain)" in found


def test_a_way_whose_mtu_was_cut_is_named(host: Host) -> None:
    host.carried["10.101.0.17"] = 1400
    (found,) = host.problems(native.check_native)
    assert (
        "the way to o2 of cluster onprem (site onprem) carries only 1400 bytes, and the devices at both ends 1500"
        in (found)
    )


def test_a_pair_on_its_way_is_not_native_yet(on_the_way: Host) -> None:
    assert all("it is being turned on or off (accepts)" in words for words in on_the_way.problems(native.check_native))
    assert len(on_the_way.problems(native.check_native)) == 3


def test_before_a_step_each_host_is_reached_natively_by_packets_of_full_size(on_the_way: Host) -> None:
    assert on_the_way.problems(native.check_native_way) == []
    wanted = {("10.102.0.1", f"10.101.0.{16 * n - 15}", 1500, 0x4E) for n in (1, 2, 3)}
    assert set(on_the_way.echoes) == wanted
    on_the_way.silent.add("10.101.0.17")
    (found,) = on_the_way.problems(native.check_native_way)
    assert found.startswith(
        "routing: o2 of cluster onprem (site onprem) is not reached natively: no answer to 3 packets of 1500 bytes. "
        "The network between the hosts must route the ranges of workloads"
    )


def test_a_host_whose_pairs_do_not_change_has_nothing_to_prove(host: Host) -> None:
    assert host.problems(native.check_native_way) == []
    assert host.echoes == []


def test_a_host_that_packets_do_not_reach_natively_any_more_is_named(host: Host) -> None:
    host.silent.add("10.101.0.17")
    (found,) = host.problems(native.check_native)
    assert found.startswith(
        "routing: o2 of cluster onprem (site onprem) is not reached natively: no answer to 3 packets"
    )
    assert found.endswith("where routing is auto, isthmus.mesh.site leads packets back into the tunnel")


def test_of_a_host_that_is_to_be_reached_inside_wireguard_it_is_said_what_that_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, monkeypatch, running=False, encryption="wireguard")
    host.silent.add("10.101.0.17")
    (found,) = host.problems(native.check_native)
    assert "reached natively: no answer to 3 packets of 1500 bytes. It is to be reached so inside WireGuard" in found
    assert "routers" not in found
    way = Host(tmp_path, monkeypatch, running=True, encryption="wireguard")
    assert way.problems(native.check_native_way) == []
    assert {one[3] for one in way.echoes} == {0x4E}
    way.silent.add("10.101.0.17")
    (found,) = way.problems(native.check_native_way)
    assert "It is to be reached so inside WireGuard" in found


@pytest.mark.parametrize("fails", ["natively", "both ways"])
def test_of_a_host_that_is_only_asked_for_it_is_said_whether_native_is_why(on_the_way: Host, fails: str) -> None:
    assert on_the_way.unreached() == []
    (on_the_way.cut if fails == "natively" else on_the_way.silent).add("10.101.0.17")
    assert on_the_way.unreached() == [
        {
            "cluster": "onprem",
            "name": "o2",
            "site": "onprem",
            "why": "no answer to 3 packets of 1500 bytes",
            "sure": fails == "natively",
        }
    ]


def test_of_several_hosts_of_a_site_one_that_tells_something_is_named(on_the_way: Host) -> None:
    on_the_way.silent.add("10.101.0.1")
    on_the_way.cut.update(("10.101.0.17", "10.101.0.33"))
    assert [(one["name"], one["sure"]) for one in on_the_way.unreached()] == [("o2", True)]


def test_a_host_that_is_native_is_asked_for_natively_again(host: Host) -> None:
    host.silent.add("10.101.0.17")
    assert [(one["name"], one["sure"]) for one in host.unreached()] == [("o2", True)]


def test_a_host_that_was_left_behind_proves_nothing(host: Host, tmp_path: Path) -> None:
    """Through the tunnel everybody would answer."""
    (tmp_path / "node.json").write_text(json.dumps(estates.planned(estates.model()).specs["c1"]))
    (found,) = host.unreached()
    assert (found["why"], found["sure"]) == ("packets to it are not led natively yet", False)
    assert host.echoes == []
    (tmp_path / "node.json").unlink()
    assert host.looked(native.check_native_way).unreached is None


def test_what_is_lost_on_the_way_is_measured_and_told_and_no_problem(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def lost(_source: str, sizes: dict[str, int], count: int, gap: float, _timeout: float) -> dict[str, int]:
        asked.append((sizes, count, gap))
        return dict(zip(sizes, (3, 0, count), strict=True))

    monkeypatch.setattr(packets, "lost", lost)
    host.carried["10.101.0.17"] = 1400
    found = host.looked(overlay.measure_loss)
    assert asked == [({"10.101.0.1": 1500, "10.101.0.17": 1400, "10.101.0.33": 1500}, 20, 0.02)]
    assert (found.problems, found.loss) == ([], {"sent": 60, "lost": {"o1": 3, "o3": 20}})
    (words,) = found.remarks
    assert "packets of full size from c1 are lost on the way, or their answers are: to o1 3 of 20." in words
    monkeypatch.setattr(packets, "lost", lambda _source, sizes, *_more: dict.fromkeys(sizes, 0))
    found = host.looked(overlay.measure_loss)
    assert (found.loss, found.remarks) == ({"sent": 60, "lost": {}}, [])
    monkeypatch.setattr(overlay, "LOSS_MOST", 15)
    monkeypatch.setattr(packets, "lost", lost)
    host.looked(overlay.measure_loss)
    assert asked[-1][1] == 5, "fewer to each in a large mesh"


@pytest.fixture
def packets_only(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(packets, "knock", lambda *_arguments: None)
    return host


def test_packets_of_full_size_are_those_of_the_routes_and_nobody_may_fragment_them(packets_only: Host) -> None:
    packets_only.said["o2"] = {"way": "tunnel", "stage": "plain", "mtu": 1450}
    assert packets_only.looked(overlay.check_packets).problems == []
    sent = {(to, size, mark) for _from, to, size, mark in packets_only.echoes if size != 84}
    whole = overlay.WHOLE_MARK
    assert sent == {("10.101.0.1", 1500, whole), ("10.101.0.17", 1450, whole), ("10.101.0.33", 1500, whole)}


def test_packets_are_looked_at_with_an_agent_that_is_silent_and_an_answer_that_is_none_is_told(
    packets_only: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent() -> dict[str, Any]:
        raise client.AgentSilent("the agent does not answer")

    packets_only.silent.add("10.101.0.17")
    monkeypatch.setattr(packets_only, "status", silent)
    found = packets_only.looked(overlay.check_packets).problems
    assert found
    assert all("o2 (10.101.0.17)" in words for words in found)
    monkeypatch.setattr(packets_only, "status", dict)
    (words,) = packets_only.looked(overlay.check_packets).problems
    assert "this could not be looked at to the end: KeyError: 'nodes'" in words


def test_a_way_that_loses_packets_of_full_size_is_named_with_what_it_carries(
    packets_only: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    packets_only.said["o2"] = {**NATIVE, "path_mtu": 1300, "lost": 1301}
    echo = packets_only.echo

    def cut(source: str, target: str, size: int, timeout: float, mark: int = 0) -> None:
        echo(source, target, size, timeout, mark)
        if size > 1300 and target == "10.101.0.17":
            raise packets.NoAnswer(f"no answer to 3 packets of {size} bytes")

    monkeypatch.setattr(packets, "echo", cut)
    (found,) = packets_only.looked(overlay.check_packets).problems
    assert found.startswith(
        "packets: o2 (10.101.0.17): an echo of full size over the overlay, not to be fragmented: no "
    )
    assert "the agent found that the way carries 1300" in found


def test_a_tunnel_whose_smaller_mtu_is_known_is_named(packets_only: Host) -> None:
    packets_only.said["o2"] = {"way": "tunnel", "stage": "plain", "mtu": 1450}
    packets_only.carried["10.101.0.17"] = 1400
    (found,) = packets_only.looked(overlay.check_packets).problems
    assert "the way carries only 1400 bytes, and routes 1450: a router in between has said so" in found


def test_the_side_that_is_not_heard_names_the_direction_that_is_cut(packets_only: Host) -> None:
    packets_only.silent.add("10.101.0.17")
    assert not any("one direction" in words for words in packets_only.looked(overlay.check_packets).problems)
    packets_only.deaf.add("o2")
    told = [words for words in packets_only.looked(overlay.check_packets).problems if "cut in one direction" in words]
    assert len(told) == 1
    assert "o2 does not hear c1, c1 hears o2" in told[0]
