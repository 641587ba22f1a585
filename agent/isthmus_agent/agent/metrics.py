# SPDX-License-Identifier: GPL-3.0-or-later
"""Prometheus metrics, made from a snapshot at each scrape. Labels are bounded: no workload or client names."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from isthmus_mesh.spec import TunnelSpec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from isthmus_agent.agent.kernel import Reading
from isthmus_agent.agent.loop import Agent
from isthmus_agent.agent.status import certificates_of, encryption_of, key_age, proof_age, read_kernel
from isthmus_agent.bpf.driver import BackendCount, BackendKey
from isthmus_agent.desired.drain import endpoint
from isthmus_agent.desired.services import ServiceView


class Connects:
    """What was sent to services' backends since the first reading. The kernel's counts go with their backends; sums
    stay as long as the service does."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str], int] = {}
        self._last: dict[BackendKey, int] | None = None

    def counted(
        self, views: Iterable[ServiceView], counts: Mapping[BackendKey, BackendCount]
    ) -> dict[tuple[str, str, str], int]:
        """By namespace, service and cluster, with what came since the last reading."""
        now = {key: count.connects for key, count in counts.items()}
        last = now if self._last is None else self._last
        # What is less than before is of an entry that was made anew.
        new = {key: count - before if count >= (before := last.get(key, 0)) else count for key, count in now.items()}
        sums: dict[tuple[str, str, str], int] = {}
        names = set()
        for view in views:
            names.add((view.namespace, view.name))
            for placed in view.backends:
                series = (view.namespace, view.name, placed.cluster)
                sums[series] = sums.get(series, self._sums.get(series, 0)) + new.get(endpoint(placed.backend), 0)
        gone = {series: total for series, total in self._sums.items() if series not in sums and series[:2] in names}
        self._sums, self._last = {**sums, **gone}, now
        return self._sums


class _Snapshot:
    """One scrape's values."""

    def __init__(self, agent: Agent, reading: Reading | None, connects: Connects) -> None:
        self._agent = agent
        self._reading = reading
        self._connects = connects

    def collect(self) -> Iterator[Metric]:
        agent, progress = self._agent, self._agent.progress
        yield _gauge("isthmus_datapath_applied", "1 when the wanted datapath is applied.", _ok(agent))
        yield _counter("isthmus_applies", "Times the datapath was applied.", progress.applies)
        yield _counter("isthmus_apply_errors", "Times it could not be applied.", progress.errors)
        yield _counter("isthmus_drift_repaired", "Differences repaired by audits.", progress.repaired)
        yield _counter("isthmus_sockets_ended", "Sockets ended because their backend was lost.", progress.sockets_ended)
        yield _counter("isthmus_job_restarts", "Failed jobs started again.", progress.restarts)
        yield _gauge(
            "isthmus_network_problems", "Parts of the network that the kernel refuses.", len(progress.problems)
        )
        yield _gauge(
            "isthmus_etcd_connected", "1 while own etcd answers all watches.", float(agent.watcher.connected())
        )
        if agent.spec.node.kubernetes_node is not None:
            yield _counter(
                "isthmus_forward_drops",
                "Packets between pods and the mesh that other filters of this host dropped.",
                progress.filtered,
            )
        if agent.spec.ipsec is not None:
            yield _counter(
                "isthmus_gateway_drops",
                "Packets that the rules of gateways of this host dropped: they would have gone beside the tunnel.",
                progress.guard_drops,
            )
        age = agent.watcher.age()
        if age is not None:
            yield _gauge("isthmus_etcd_age_seconds", "Since own etcd last answered.", age)
        refused = CounterMetricFamily("isthmus_refused", "Values refused, by reason.", labels=["reason"])
        for reason, count in agent.decoder.refused.items():
            refused.add_metric([reason], count)
        yield refused
        yield self._certificates()
        yield self._peers()
        yield self._nodes()
        yield from self._paths()
        if agent.spec.wireguard is not None:
            yield self._encryption()
            yield self._keys(agent.spec.wireguard.tunnels)
        yield from self._kernel()

    def _certificates(self) -> Metric:
        family = GaugeMetricFamily(
            "isthmus_certificate_expiry_seconds", "Until a certificate of this host ends.", labels=["name"]
        )
        for name, valid in certificates_of(self._agent).items():
            family.add_metric([name], valid.end - time.time())
        return family

    def _peers(self) -> Metric:
        family = GaugeMetricFamily("isthmus_peer_age_seconds", "Since a peer's etcd last answered.", labels=["peer"])
        changes = self._agent.decoder.peer_changes
        for name, peer in self._agent.decoder.state().peers.items():
            age = proof_age(peer, changes[name], time.time(), time.monotonic())
            if age is not None:
                family.add_metric([name], age)
        return family

    def _nodes(self) -> Metric:
        family = GaugeMetricFamily("isthmus_nodes_probed", "Nodes by probe result.", labels=["cluster", "result"])
        counts: dict[tuple[str, str], int] = {}
        for (cluster, _), state in self._agent.prober.table.states.items():
            key = (cluster, "up" if state.up else "down")
            counts[key] = counts.get(key, 0) + 1
        for (cluster, result), count in counts.items():
            family.add_metric([cluster, result], count)
        return family

    def _paths(self) -> Iterator[Metric]:
        """Of nodes that are probed, at most 64 (reach.MAX_TARGETS)."""
        labels = ["cluster", "node"]
        routes = GaugeMetricFamily("isthmus_route_mtu_bytes", "MTU of the routes to a node.", labels=labels)
        found = GaugeMetricFamily(
            "isthmus_path_mtu_bytes",
            "Largest packet that passes to a node without being fragmented; absent until it is found.",
            labels=labels,
        )
        for node, path in self._agent.prober.paths.items():
            routes.add_metric(list(node), path.full)
            if path.mtu is not None:
                found.add_metric(list(node), path.mtu)
        yield routes
        yield found

    def _encryption(self) -> Metric:
        family = GaugeMetricFamily(
            "isthmus_encrypted_nodes",
            "Nodes that are reached through WireGuard only, by state: encrypted, idle, closed.",
            labels=["state"],
        )
        tunnels = self._reading.tunnels if self._reading is not None else {}
        counts = dict.fromkeys(("encrypted", "idle", "closed"), 0)
        now = time.time()
        for key in self._agent.decoder.state().nodes:
            state = encryption_of(self._agent, key, tunnels, now)["state"]
            if state in counts:
                counts[state] += 1
        for state, count in counts.items():
            family.add_metric([state], count)
        return family

    def _keys(self, tunnels: Iterable[TunnelSpec]) -> Metric:
        family = GaugeMetricFamily(
            "isthmus_wireguard_key_age_seconds",
            "Since a key of WireGuard of this host was made, by the UDP port that it is used on.",
            labels=["port"],
        )
        for tunnel in tunnels:
            age = key_age(tunnel.key)
            if age is not None:
                family.add_metric([str(tunnel.port)], age)
        return family

    def _kernel(self) -> Iterator[Metric]:
        if self._reading is None:
            return
        drops = CounterMetricFamily("isthmus_drops", "Overlay packets dropped, by reason.", labels=["reason"])
        for reason, count in self._reading.counters.drops.items():
            drops.add_metric([reason], count)
        yield drops
        entries = GaugeMetricFamily("isthmus_map_entries", "Entries of a BPF map.", labels=["map"])
        limit = GaugeMetricFamily("isthmus_map_max_entries", "Most entries of a BPF map.", labels=["map"])
        for name, capacity in self._reading.capacity.items():
            entries.add_metric([name], capacity.used)
            limit.add_metric([name], capacity.maximum)
        yield entries
        yield limit
        if self._agent.desired is None:
            return
        connects = CounterMetricFamily(
            "isthmus_service_connects",
            "Connections sent to a service's backends since the first scrape, by cluster; to a backend of several "
            "services in each of them.",
            labels=["namespace", "service", "cluster"],
        )
        sums = self._connects.counted(self._agent.desired.views, self._reading.counters.backends)
        for series, total in sums.items():
            connects.add_metric(series, total)
        yield connects


def _ok(agent: Agent) -> float:
    return float(agent.progress.applied is not None and not agent.progress.error)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


async def render(agent: Agent, connects: Connects) -> bytes:
    """The text of one scrape; `connects` is the same for all of them."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(agent, await read_kernel(agent), connects))
    ProcessCollector(registry=registry)
    return generate_latest(registry)
