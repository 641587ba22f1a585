# SPDX-License-Identifier: GPL-3.0-or-later
"""Generated estates: whatever comes and goes, in any order, nothing is dealt twice or moved."""

from __future__ import annotations

import ipaddress
import random
from datetime import datetime, timedelta
from ipaddress import IPv4Network
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from isthmus_mesh.identity import identity_range
from isthmus_mesh.model import read_model
from isthmus_mesh.planner import Plan, plan
from isthmus_mesh.record import QUARANTINE, Record, merge
from isthmus_mesh.spec import NodeSpec
from unit.mesh.estates import NOW, VERSION

ODD_NAMES = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True).filter(lambda name: name != "default")
ODD_HOSTS = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,8}[a-z0-9])?(\.[a-z0-9]{1,6})?", fullmatch=True)


def addresses_of(found: Plan) -> dict[str, str]:
    """What was dealt: name -> range or address."""
    dealt = {}
    for key, document in found.record.items():
        for host, entry in document.get("hosts", {}).items():
            dealt[f"{key} {host}"] = entry["range4"]
            dealt[f"{key} {host} mesh"] = entry["mesh4"]
            for workload, one in entry["workloads"].items():
                dealt[f"{key} {host} {workload}"] = one["address4"]
    return dealt


def check_disjoint(found: Plan) -> None:
    ranges = sorted(
        (
            IPv4Network(entry["range4"])
            for document in found.record.values()
            for entry in document.get("hosts", {}).values()
        ),
        key=int_of,
    )
    assert not any(one.overlaps(other) for one, other in zip(ranges, ranges[1:], strict=False))
    for document in found.record.values():
        for entry in document.get("hosts", {}).values():
            inner = [entry["mesh4"], *(one["address4"] for one in entry["workloads"].values())]
            assert len(set(inner)) == len(inner)
            outer = IPv4Network(entry["range4"])
            assert all(
                ipaddress.IPv4Address(address) in outer
                and ipaddress.IPv4Address(address) not in (outer.network_address, outer.broadcast_address)
                for address in inner
            )
            assert any(outer.subnet_of(IPv4Network(network)) for network in document["workload_ranges"])


def int_of(network: IPv4Network) -> int:
    return int(network.network_address)


class ComingAndGoing(RuleBasedStateMachine):
    """Hosts, workloads and clusters appear, vanish from the inventory, come back, are removed for good."""

    def __init__(self) -> None:
        super().__init__()
        self.estate: dict[str, Any] = {"name": "e", "clusters": {}}
        self.hosts: dict[str, dict[str, Any]] = {}
        self.hidden: dict[str, dict[str, Any]] = {}
        self.now: datetime = NOW
        self.plan: Plan | None = None
        self.released: list[tuple[datetime, IPv4Network]] = []
        self.counter = 0

    def underlay(self) -> str:
        self.counter += 1
        return f"198.18.{self.counter // 250}.{self.counter % 250 + 1}"

    @initialize()
    def first_cluster(self) -> None:
        self.add_cluster()

    def add_cluster(self) -> None:
        number = len(self.estate["clusters"]) + 1
        name, host = f"c{number}", f"c{number}-etcd"
        self.estate["clusters"][name] = {
            "id": number,
            "workload_ranges": [f"10.{number}.0.0/25"],
            "service_range": f"10.{number + 100}.0.0/24",
            "etcd": {"hosts": [host]},
        }
        self.hosts[host] = {"isthmus_cluster": name, "isthmus_underlay": self.underlay()}
        self.replan()

    @precondition(lambda self: len(self.estate["clusters"]) < 3)
    @rule()
    def another_cluster(self) -> None:
        self.add_cluster()

    def room(self, cluster: str) -> bool:
        """Of eight ranges, what neither a host nor a quarantine holds (hidden hosts hold theirs)."""
        everything = {**self.hosts, **self.hidden}
        held = sum(variables["isthmus_cluster"] == cluster for variables in everything.values())
        outer = IPv4Network(self.estate["clusters"][cluster]["workload_ranges"][0])
        return held + sum(at + QUARANTINE > self.now and one.subnet_of(outer) for at, one in self.released) < 8

    @rule(data=st.data())
    def another_host(self, data: st.DataObject) -> None:
        cluster = data.draw(st.sampled_from(sorted(self.estate["clusters"])))
        name = data.draw(ODD_HOSTS)
        if name not in self.hosts and name not in self.hidden and self.room(cluster):
            self.hosts[name] = {"isthmus_cluster": cluster, "isthmus_underlay": self.underlay()}
            self.replan()

    @rule(data=st.data(), count=st.integers(1, 3))
    def more_workloads(self, data: st.DataObject, count: int) -> None:
        host = self.hosts[data.draw(st.sampled_from(sorted(self.hosts)))]
        workloads = host.setdefault("isthmus_workloads", [])
        if len(workloads) + count <= 8:
            for _ in range(count):
                self.counter += 1
                workloads.append({"name": f"w{self.counter}", "unit": f"w{self.counter}.service"})
            data.draw(st.randoms(use_true_random=False)).shuffle(workloads)
            self.replan()

    def spare(self) -> list[str]:
        return sorted(name for name in self.hosts if not name.endswith("-etcd"))

    @precondition(lambda self: self.spare())
    @rule(data=st.data())
    def a_host_is_forgotten(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.spare()))
        self.hidden[name] = self.hosts.pop(name)
        found = self.replan()
        assert f"host/{name}" in found.orphans
        assert found.removed == ()

    @precondition(lambda self: self.hidden)
    @rule(data=st.data())
    def a_host_is_remembered(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.hidden)))
        self.hosts[name] = self.hidden.pop(name)
        assert not any(change.startswith(f"host {name}:") for change in self.replan().changes)

    @precondition(lambda self: self.hidden or self.spare())
    @rule(data=st.data())
    def a_host_goes_for_good(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted([*self.hidden, *self.spare()])))
        assert self.plan is not None
        (held,) = (value for key, value in addresses_of(self.plan).items() if key.split()[1:] == [name])
        self.released.append((self.now, IPv4Network(held)))
        if name in self.hidden:
            del self.hidden[name]
            self.replan(prune=(name,), gone=name)
        else:
            self.hosts[name]["isthmus_state"] = "absent"
            self.replan(gone=name)
            del self.hosts[name]
            assert self.replan().orphans == tuple(sorted(f"host/{hidden}" for hidden in self.hidden))

    @rule(days=st.integers(1, 20))
    def time_passes(self, days: int) -> None:
        self.now += timedelta(days=days)
        assert self.replan().changes == ()

    def replan(self, prune: tuple[str, ...] = (), gone: str = "") -> Plan:
        names = list(self.hosts)
        random.Random(self.counter).shuffle(names)  # noqa: S311
        model = read_model(self.estate, {name: self.hosts[name] for name in names})
        record = merge([dict(self.plan.record)]) if self.plan is not None else Record()
        before = addresses_of(self.plan) if self.plan is not None else {}
        found = plan(model, record, self.now, VERSION, prune=prune)
        after = addresses_of(found)
        for key, value in before.items():
            if gone and key.split()[1] == gone:
                assert key not in after
            else:
                assert after[key] == value, "what was dealt never moves"
        for key, value in after.items():
            if key not in before:
                for at, one in self.released:
                    assert at + QUARANTINE <= self.now or not IPv4Network(value).overlaps(one), "dealt too early again"
        assert plan(model, merge([dict(found.record)]), self.now, VERSION).changes == ()
        self.plan = found
        return found

    @invariant()
    def nothing_is_dealt_twice(self) -> None:
        if self.plan is not None:
            check_disjoint(self.plan)


TestComingAndGoing = ComingAndGoing.TestCase
TestComingAndGoing.settings = settings(max_examples=settings.default.max_examples // 4, stateful_step_count=25)


@st.composite
def estates(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Up to 50 clusters with odd names and ids, each with one to four hosts with workloads."""
    names = draw(st.lists(ODD_NAMES, min_size=1, max_size=50, unique=True))
    ids = draw(st.lists(st.integers(1, 255), min_size=len(names), max_size=len(names), unique=True))
    clusters: dict[str, Any] = {}
    hosts: dict[str, dict[str, Any]] = {}
    for index, (name, number) in enumerate(zip(names, ids, strict=True)):
        members = [f"h{index}-{host}.{name}"[:50].rstrip("-.") for host in range(draw(st.integers(1, 4)))]
        clusters[name] = {
            "id": number,
            "workload_ranges": [f"10.{index}.0.0/20", f"10.{index}.32.0/22"],
            "service_range": f"10.{index}.64.0/20",
            "node_prefix": draw(st.integers(26, 28)),
            "etcd": {"hosts": members[: draw(st.sampled_from([1, len(members)]))]},
        }
        for host, member in enumerate(members):
            hosts[member] = {
                "isthmus_cluster": name,
                "isthmus_underlay": f"198.18.{index}.{host + 1}",
                "isthmus_workloads": [
                    {"name": f"w{one}", "namespace": name, "unit": f"w{one}.service", "labels": {"app": f"a{one}"}}
                    for one in range(draw(st.integers(0, 3)))
                ],
            }
    return {"name": "big", "clusters": clusters}, hosts


@settings(
    max_examples=settings.default.max_examples // 3,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(estates(), st.randoms(use_true_random=False))
def test_generated_estates(both: tuple[dict[str, Any], dict[str, dict[str, Any]]], shuffler: random.Random) -> None:
    estate, hosts = both
    found = plan(read_model(estate, hosts), Record(), NOW, VERSION)
    check_disjoint(found)
    names = list(hosts)
    shuffler.shuffle(names)
    turned = {**estate, "clusters": dict(reversed(estate["clusters"].items()))}
    assert plan(read_model(turned, {name: hosts[name] for name in names}), Record(), NOW, VERSION) == found
    assert sorted(found.specs) == sorted(hosts)
    ranges = []
    for document in found.specs.values():
        spec = NodeSpec.from_dict(document)
        assert len(spec.service_ranges4) == len(estate["clusters"])
        if spec.registrar is not None:
            assert len(spec.registrar.peers) == len(estate["clusters"]) - 1
            assert len(spec.pki.trust) == len(estate["clusters"])
        ranges.append(identity_range(spec.cluster.id, spec.cluster.max_clusters))
    ordered = sorted(set(ranges))
    assert all(one[1] < other[0] for one, other in zip(ordered, ordered[1:], strict=False))


def test_a_fifty_by_forty_estate_is_planned_in_seconds() -> None:
    """The budget is generous; what it catches is work that grows with the square of the hosts."""
    clusters = {
        f"c{number}": {
            "id": number,
            "workload_ranges": [f"10.{number}.0.0/17"],
            "service_range": f"10.{number}.128.0/18",
            "etcd": {"hosts": [f"c{number}-h0"]},
        }
        for number in range(1, 51)
    }
    hosts = {
        f"c{number}-h{host}": {
            "isthmus_cluster": f"c{number}",
            "isthmus_underlay": f"172.16.{number}.{host + 1}",
            "isthmus_workloads": [{"name": "w", "unit": "w.service"}],
        }
        for number in range(1, 51)
        for host in range(40)
    }
    start = datetime.now()
    found = plan(read_model({"name": "big", "clusters": clusters}, hosts), Record(), NOW, VERSION)
    assert len(found.specs) == 2000
    assert datetime.now() - start < timedelta(seconds=30)
