# SPDX-License-Identifier: GPL-3.0-or-later
"""What the agent says of itself, as JSON documents. Ages are seconds since the last proof, never a promise."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from isthmus_mesh.documents import PeerStatus
from isthmus_mesh.encryption import Stage
from isthmus_mesh.spec import GatewaySpec, TunnelSpec
from isthmus_mesh.wire import Node

from isthmus_agent.agent import certificates
from isthmus_agent.agent.checks import listeners, misplaced
from isthmus_agent.agent.kernel import Reading, Tunnel
from isthmus_agent.agent.loop import Agent
from isthmus_agent.desired.addressing import Led
from isthmus_agent.desired.drain import endpoint
from isthmus_agent.desired.pods import Pods
from isthmus_agent.desired.reports import CheckKey, backends_here
from isthmus_agent.desired.services import Placed, ServiceView
from isthmus_agent.state.model import MeshState, NodeKey

FILTERED_RECENTLY = 300.0  # seconds that a warning of dropped packets stands
PODS_TO_ASK = 3  # of another node: one that ends just now must not be the only one
HANDSHAKE_LIMIT = 180.0  # seconds; WireGuard drops a session that is older (REJECT_AFTER_TIME)
Tunnels = Mapping[str, Tunnel]
"""`Reading.tunnels`."""
HEARD_WITHIN = 3.0  # seconds; each node sends a request a second to those that it probes
SILENT_AFTER = 30.0  # seconds; the registrar writes a peer's status every 10


def parse_time(text: str | None) -> float | None:
    """RFC 3339 to seconds since the epoch, None for what is none."""
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()


def peer_state(said: str, proof_age: float | None, etcd_connected: bool) -> str:
    """What may honestly be said of a peer now: the registrar's word only while it is fresh."""
    if not etcd_connected:
        return "unknown"
    if said == "connected" and (proof_age is None or proof_age > SILENT_AFTER):
        return "silent"
    return said


def proof_age(said: PeerStatus, change: tuple[float, int], now: float, clock: float) -> float | None:
    """Seconds since the peer's etcd last answered the registrar; `change` is the decoder's of this document,
    `now` is wall clock, `clock` the decoder's.

    What the document said, and the time since it came: no clock of two machines is compared. It may have been old when
    we first saw it, and the first change may be the one from last-known-good to the first list, so until it changed
    twice before our eyes the clocks' difference counts too if that is more. It alone is what an older registrar gives.
    """
    proof = parse_time(said.last_proof)
    difference = None if proof is None else max(0.0, now - proof)
    if said.proof_age is None:
        return difference
    came, changes = change
    age = said.proof_age + max(0.0, clock - came)
    return age if changes >= 2 or difference is None else max(age, difference)


def _age(since: float | None, now: float) -> float | None:
    return None if since is None else round(max(0.0, now - since), 1)


def _etcd(agent: Agent) -> dict[str, Any]:
    sources = agent.watcher.sources()
    age = agent.watcher.age()
    return {
        "connected": agent.watcher.connected(),
        "age": None if age is None else round(age, 1),
        "endpoint": agent.client.endpoint,
        "complete": agent.watcher.trusted,
        "error": next((source.error for source in sources if source.error), None),
        "held_keys": sum(source.held for source in sources),
        "sources": [
            {
                "prefix": source.prefix,
                "connected": source.connected,
                "synced": source.synced,
                "complete": source.trusted,
                "held": source.held,
                "age": None if source.age is None else round(source.age, 1),
                "error": source.error,
            }
            for source in sources
        ],
    }


def _workloads(agent: Agent, state: MeshState) -> list[dict[str, Any]]:
    checks = agent.checks.states()
    here = backends_here(agent.spec, state)
    found = []
    for workload in agent.spec.workloads:
        own = (workload.namespace, workload.name)
        pair = state.ips.get((agent.spec.cluster.name, str(workload.address4)))
        services: dict[str, Any] = {}
        for key in sorted(here):
            if key.workload != own:
                continue
            services["/".join(key.service)] = _backend_here(agent, state, key, checks)
        found.append(
            {
                "namespace": workload.namespace,
                "name": workload.name,
                "address": str(workload.address4),
                "identity": pair.identity if pair is not None else None,
                "cgroup": {"kind": workload.cgroup.kind, "value": workload.cgroup.value},
                "running": own in agent.cgroups.ids,
                "services": services,
            }
        )
    return found


def _backend_here(agent: Agent, state: MeshState, key: CheckKey, checks: dict[CheckKey, Any]) -> dict[str, Any]:
    definition = state.definitions[key.service]
    check = checks.get(key)
    if definition.health is None:
        ready: bool | None = key.workload in agent.cgroups.ids
        reason = "" if ready else "its cgroup does not exist"
    else:
        ready = check.ready if check is not None else None
        reason = check.reason if check is not None else "not checked yet"
    workload = next(w for w in agent.spec.workloads if (w.namespace, w.name) == key.workload)
    others = {each.address4 for each in agent.spec.workloads if each is not workload}
    elsewhere: set[str] = set()
    if key.workload in agent.cgroups.ids:  # else whoever listens there is not its daemon
        for port in definition.ports:
            found = misplaced(workload.address4, listeners(port.target_port, port.protocol), others)
            elsewhere.update(f"{address}:{port.target_port}" for address in found)
    return {"ready": ready, "reason": reason, "listens_elsewhere": sorted(elsewhere)}


def _wireguard(agent: Agent, tunnels: Tunnels) -> dict[str, Any] | None:
    """None where nothing is encrypted. `second` is there while keys are replaced: what comes through it is taken."""
    wanted = agent.spec.wireguard
    if wanted is None:
        return None
    first, *others = (_tunnel(agent, each, tunnels.get(each.device)) for each in wanted.tunnels)
    return {**first, "second": others[0] if others else None}


def _tunnel(agent: Agent, wanted: TunnelSpec, tunnel: Tunnel | None) -> dict[str, Any]:
    return {
        "implementation": tunnel.implementation if tunnel is not None else None,
        "device": wanted.device,
        "public_key": agent.facts.public_keys.get(wanted.port),
        "port": wanted.port,
        "peers": len(tunnel.peers) if tunnel is not None else 0,
        "key_age": key_age(wanted.key),
    }


def key_age(path: str) -> float | None:
    """Seconds since the key in this file was made, which is never written again; None when there is none."""
    try:
        return _age(Path(path).stat().st_mtime, time.time())
    except OSError:
        return None


def encryption_of(agent: Agent, key: NodeKey, tunnels: Tunnels, now: float) -> dict[str, Any]:
    """How packets to a node go; `now` is wall clock. `state` is plain, encrypted (a session is there), idle (there will
    be one when something is sent) or closed (nothing goes out, for `reason`). `stage` is the word of `Stage`; `reason`
    with another state than closed: why WireGuard cannot be used. `second`: the same of the second device, None while
    there is none."""
    if agent.desired is None or agent.spec.wireguard is None or key not in agent.desired.encrypted:
        return {"state": "plain", "stage": Stage.PLAIN.word, "reason": None, "handshake_age": None, "second": None}
    stage = agent.desired.stages[key]
    refused = (agent.desired.encrypted, agent.desired.second)
    first, *others = (
        _session(agent.desired.keys[key], each, why.get(key, ""), tunnels.get(each.device), now)
        for each, why in zip(agent.spec.wireguard.tunnels, refused)
    )
    # Where the device or the peer is missing nothing goes out either (desired.encryption.CLOSED).
    in_clear = stage is Stage.ACCEPTS or (stage is Stage.SENDS and agent.desired.encrypted[key] != "")
    age = first["handshake_age"]
    state = "closed" if first["reason"] else "encrypted" if age is not None and age < HANDSHAKE_LIMIT else "idle"
    return {
        "state": "plain" if in_clear else state,
        "stage": stage.word,
        **first,
        "second": others[0] if others else None,
    }


def routing_of(agent: Agent, node: Node) -> dict[str, Any]:
    """How packets to a node go: `way` is tunnel or native, `stage` the word of `Stage`, `mtu` in bytes that routes have
    (None: not known). `path_mtu`: what the way was found to carry without being fragmented (None: not probed, or not
    found yet); `lost`: the smallest size that is lost there (None: none is)."""
    key = node.cluster, node.name
    stage = agent.desired.native.get(key, Stage.PLAIN) if agent.desired is not None else Stage.PLAIN
    mtu = agent.desired.mtus.get(key) if agent.desired is not None else None
    path = agent.prober.paths.get(key)
    return {
        "way": "native" if stage >= Stage.SENDS else "tunnel",
        "stage": stage.word,
        "mtu": mtu,
        "path_mtu": path.mtu if path is not None else None,
        "lost": path.lost or None if path is not None else None,
    }


def gateways_of(agent: Agent) -> dict[str, Any] | None:
    """How packets go to sites that are behind gateways; None where none does. `gateways`: of a site that has two, the
    others than this host, with `state` used, up, down or waiting (up again, and not used before it has been for a
    while). `lost`: there are two, and neither answers. `tunnels`: on a gateway by site whether packets pass through its
    own, null before it is known; null on other hosts. `dropped`: packets that the rules of gateways dropped here."""
    own = agent.spec.ipsec
    if own is None:
        return None
    found = agent.desired.led if agent.desired is not None else Led()
    reach = agent.prober.view()

    def state(one: GatewaySpec) -> str:
        key = (one.cluster, one.host)
        if key in reach.down:
            return "down"
        if own.local is None and one.underlay == found.via:
            return "used"
        return "waiting" if key in reach.unsteady else "up"

    passes = agent.facts.passes
    return {
        "gateways": [
            {"cluster": one.cluster, "host": one.host, "address": str(one.underlay), "state": state(one)}
            for one in own.others
        ],
        "lost": found.lost,
        "tunnels": None
        if own.local is None
        else {site: None if passes is None else site in passes for site in sorted(own.stages)},
        "dropped": agent.progress.guard_drops,
    }


def _gateway_warnings(agent: Agent) -> list[str]:
    found = gateways_of(agent)
    own = agent.spec.ipsec
    if found is None or own is None:
        return []
    down = [one["host"] for one in found["gateways"] if one["state"] == "down"]
    sites = ", ".join(sorted(own.stages))
    told = []
    if found["lost"]:
        told.append(
            f"neither gateway of this site answers ({', '.join(down)}): packets to {sites} are dropped here, and "
            "counted in `nft list table ip isthmus-ipsec`. Next: see why these hosts are away"
        )
    elif down and own.local is None:
        told.append(f"gateway {down[0]} of this site does not answer; packets to {sites} go over the other one")
    elif down:
        told.append(f"gateway {down[0]} of this site does not answer; there is no other than this host")
    for site, passing in (found["tunnels"] or {}).items():
        if passing is False:
            over = agent.desired is not None and agent.desired.led.via is not None
            where = "packets go over the site's other gateway" if over else "packets to it are dropped"
            told.append(
                f"nothing passes through this gateway's tunnels to site {site}: {where} (look at: swanctl --list-sas; "
                "journalctl -u strongswan.service)"
            )
    return told


def _session(
    keys: Mapping[int, str], wanted: TunnelSpec, why: str, tunnel: Tunnel | None, now: float
) -> dict[str, Any]:
    """With a node, by its public keys, through one device."""
    peer = None
    if tunnel is not None:
        peer = tunnel.peers.get(keys.get(wanted.port, ""))
    if not why and peer is None:
        why = "WireGuard is not there" if tunnel is None else "WireGuard does not have its key yet"
    age = None if peer is None or not peer.handshake else _age(float(peer.handshake), now)
    return {"reason": why or None, "handshake_age": age}


def _nodes(agent: Agent, state: MeshState, tunnels: Tunnels) -> list[dict[str, Any]]:
    now = time.monotonic()
    found = []
    for (cluster, name), node in sorted(state.nodes.items()):
        probe = agent.prober.table.states.get((cluster, name))
        if (cluster, name) == (agent.spec.cluster.name, agent.spec.host):
            verdict = "this host"
        elif probe is None:
            verdict = "not probed"
        elif not probe.up:
            verdict = "down"
        else:
            verdict = "up" if probe.last_answer is not None else "no answer yet"
        found.append(
            {
                "cluster": cluster,
                "name": name,
                "address": node.mesh_address(4),
                "endpoint": node.tunnel_endpoint(4, agent.spec.site),
                "probe": verdict,
                "answer_age": _age(probe.last_answer, now) if probe is not None else None,
                "heard_age": _age(agent.prober.heard.get((cluster, name)), now),
                "deaf": _is_deaf(agent, (cluster, name), now),
                "rtt_ms": round(probe.rtt * 1000, 2) if probe is not None and probe.rtt is not None else None,
                "encryption": encryption_of(agent, (cluster, name), tunnels, time.time()),
                "routing": routing_of(agent, node),
            }
        )
    return found


def _first_contact(agent: Agent, state: MeshState, tunnels: Tunnels) -> list[dict[str, Any]]:
    """Peers that the spec has laid down. `told`: own etcd tells of the node; `opens`: this host opens the session."""
    wanted = agent.spec.wireguard
    if wanted is None:
        return []
    return [
        {
            "cluster": peer.cluster,
            "name": peer.name,
            "site": peer.site,
            "endpoint": str(peer.advertise4) if peer.site in wanted.opens else None,
            "address": str(peer.mesh4),
            "opens": peer.site in wanted.opens,
            "told": (peer.cluster, peer.name) in state.nodes,
            "encryption": encryption_of(agent, (peer.cluster, peer.name), tunnels, time.time()),
        }
        for peer in wanted.bootstrap
    ]


def _kubernetes(agent: Agent) -> dict[str, Any] | None:
    """None on a host that is no Kubernetes node."""
    if agent.spec.node.kubernetes_node is None:
        return None
    pods = agent.desired.pods if agent.desired is not None else Pods()
    return {
        "node": agent.spec.node.kubernetes_node,
        "pods": len(pods.identities),
        "untranslated": len(pods.untranslated),
        "ranges": [str(each) for each in pods.ranges],
        "filtered": agent.progress.filtered,
    }


def _pod_warnings(agent: Agent) -> list[str]:
    found: list[str] = []
    if agent.spec.node.kubernetes_node is None:
        return found
    if agent.desired is not None and not agent.desired.pods.ranges:
        found.append(
            f"nothing is known of the pods of node {agent.spec.node.kubernetes_node}: neither a pod CIDR nor a pod is "
            "published; the registrar does that (look at: systemctl status isthmus-registrar on the etcd hosts)"
        )
    progress = agent.progress
    if progress.filtered_at is not None and time.time() - progress.filtered_at < FILTERED_RECENTLY:
        found.append(
            "packets between pods and the mesh were dropped by another filter of this host while they were forwarded "
            f"({progress.filtered}, the last a short time ago): a firewall whose policy for FORWARD is to drop, or a "
            "network policy (look at: nft list ruleset; iptables -S FORWARD)"
        )
    return found


def _is_deaf(agent: Agent, key: tuple[str, str], now: float) -> bool:
    """Whether a node is heard and does not hear us; `now` is monotonic. Who is not heard may as well be off: in that
    direction it is the other side that knows."""
    probe, heard = agent.prober.table.states.get(key), _age(agent.prober.heard.get(key), now)
    return probe is not None and not probe.up and heard is not None and heard <= HEARD_WITHIN


def _one_way_warnings(agent: Agent, state: MeshState) -> list[str]:
    now = time.monotonic()
    here = f"{agent.spec.cluster.name}/{agent.spec.host}"
    return [
        f"the way between this host and node {cluster}/{name} is cut in one direction: {cluster}/{name} does not hear "
        f"{here}, {here} hears {cluster}/{name}. Packets from here to {node.tunnel_endpoint(4, agent.spec.site)} are "
        "lost, those from there arrive: look at routes and filters of the network in that direction, and at the "
        f"firewall of {name}"
        for (cluster, name), node in sorted(state.nodes.items())
        if _is_deaf(agent, (cluster, name), now)
    ]


def _path_warnings(agent: Agent, state: MeshState) -> list[str]:
    """Ways that carry less than their routes."""
    found = []
    for (cluster, name), path in sorted(agent.prober.paths.items()):
        node = state.nodes.get((cluster, name))
        if not path.lost or node is None:
            continue
        carried = f"it carries {path.mtu}" if path.mtu is not None else "what it carries is being found out"
        found.append(
            f"packets of {path.lost} bytes and more are lost on the way to node {cluster}/{name} or back when they "
            f"must not be fragmented, small ones are not; routes carry {path.full}, {carried}. A link on the way has a "
            f"smaller MTU than the hosts (look at: tracepath {node.tunnel_endpoint(4, agent.spec.site)}): give it "
            "theirs, or them its"
        )
    return found


def certificates_of(agent: Agent) -> dict[str, certificates.Validity]:
    """Those beside the agent's own."""
    return certificates.read(Path(agent.spec.etcd.cert).parent)


def warnings(agent: Agent, workloads: list[dict[str, Any]], reading: Reading | None) -> list[str]:
    """What a person should look at, in words that say what to do next."""
    found = []
    progress = agent.progress
    if progress.holding:
        found.append(progress.holding)
    if progress.error:
        found.append(f"the datapath cannot be applied: {progress.error}")
    found.extend(f"the kernel refuses part of the network: {problem}" for problem in progress.problems)
    if progress.masqueraded:
        found.append(
            "another program translates sources on this host (look at: nft list ruleset; iptables-legacy-save), "
            "and the rule that keeps those of packets into the mesh as they are cannot be made; what that program "
            f"masquerades there is dropped, or comes as the host's own: {progress.masqueraded}"
        )
    if not agent.watcher.connected():
        found.append(
            "own etcd does not answer; traffic goes on with what is known (look at: systemctl status "
            "isthmus-etcd on the cluster's etcd hosts)"
        )
    if agent.reporter.last_error:
        found.append(f"reports cannot be written: {agent.reporter.last_error}")
    if agent.desired is not None:
        found.extend(agent.desired.refused)
        found.extend(
            f"node {cluster}/{name} is cut off, because packets to it are to be encrypted and {why}"
            if agent.desired.stages[cluster, name] is Stage.DEMANDS
            else f"packets to node {cluster}/{name} cannot be encrypted yet: {why}"
            for (cluster, name), why in sorted(agent.desired.encrypted.items())
            if why
        )
        found.extend(
            f"service {view.namespace}/{view.name} has no address yet; the registrar deals it "
            "(look at: systemctl status isthmus-registrar on the cluster's etcd hosts)"
            for view in agent.desired.views
            if view.address is None and not view.is_headless
        )
    found.extend(_pod_warnings(agent))
    found.extend(_gateway_warnings(agent))
    found.extend(_one_way_warnings(agent, agent.decoder.state()))
    found.extend(_path_warnings(agent, agent.decoder.state()))
    for workload in workloads:
        name = f"{workload['namespace']}/{workload['name']}"
        if workload["identity"] is None:
            found.append(
                f"workload {name} has no identity yet, its packets to other hosts are dropped until the "
                "registrar publishes one"
            )
        if not workload["running"]:
            found.append(
                f"workload {name} does not run: no cgroup for {workload['cgroup']['kind']} "
                f"{workload['cgroup']['value']}"
            )
        for service, backend in workload["services"].items():
            if backend["listens_elsewhere"]:
                found.append(
                    f"the daemon of {name} (service {service}) listens on {', '.join(backend['listens_elsewhere'])} "
                    f"only; make it listen on {workload['address']} or on all addresses"
                )
    if reading is not None:
        for table, capacity in sorted(reading.capacity.items()):
            if capacity.used >= 0.9 * capacity.maximum:
                found.append(f"map {table} is {100 * capacity.used // capacity.maximum} % full")
    if progress.drift:
        found.append(f"the last audit found {len(progress.drift)} differences, the first: {progress.drift[0]}")
    found.extend(certificates.warnings(certificates_of(agent), time.time()))
    for key, reason in sorted(agent.decoder.bad.items())[:10]:
        found.append(f"etcd key {key} is refused: {reason}; its last good value is used")
    return found


async def read_kernel(agent: Agent) -> Reading | None:
    """Counters, or None before anything was applied."""
    return await agent.kernel_call(agent.kernel.read) if agent.progress.applied is not None else None


async def status(agent: Agent) -> dict[str, Any]:
    """The document of `GET /v1/status`."""
    now = time.time()
    state = agent.decoder.state()
    reading = await read_kernel(agent)
    tunnels: Tunnels = reading.tunnels if reading is not None else {}
    workloads = _workloads(agent, state)
    progress = agent.progress
    if progress.applied is None:
        verdict = "holding" if progress.holding else "failed" if progress.error else "starting"
    else:
        verdict = "failed" if progress.error else "applied"
    return {
        "estate": agent.spec.estate,
        "cluster": agent.spec.cluster.name,
        "host": agent.spec.host,
        "spec_hash": agent.spec.hash,
        "version": agent.version,
        "pid": os.getpid(),
        "uptime": round(now - agent.started, 1),
        "datapath": {
            "state": verdict,
            "source": progress.source,
            "age": _age(progress.last_apply, now),
            "applies": progress.applies,
            "errors": progress.errors,
            "error": progress.error or None,
            "underlay_mtu": agent.facts.underlay_mtu,
            "audit_age": _age(progress.last_audit, now),
            "drift": list(progress.drift),
            "repaired": progress.repaired,
            "sockets_ended": progress.sockets_ended,
            "drops": {k: v for k, v in reading.counters.drops.items() if v} if reading is not None else {},
            "capacity": {
                name: {"used": entry.used, "maximum": entry.maximum}
                for name, entry in (reading.capacity if reading is not None else {}).items()
            },
            "identities": [
                {
                    "destination": str(entry.destination),
                    "identity": entry.identity,
                    "cluster_id": entry.cluster_id,
                    "labels": dict(state.identities.get(entry.identity, {})),
                    "packets": entry.packets,
                    "bytes": entry.bytes,
                }
                for entry in (reading.counters.identities if reading is not None else ())
            ],
        },
        "etcd": _etcd(agent),
        "last_known_good": {
            "loaded": agent.progress.last_good_loaded or None,
            "age": _age(agent.progress.last_good_written, now),
        },
        "reports": {
            "writes": agent.reporter.writes,
            "age": _age(agent.reporter.last_success, now),
            "error": agent.reporter.last_error or None,
        },
        "refused": {"total": sum(agent.decoder.refused.values()), "now": dict(agent.decoder.bad)},
        "restarted_jobs": progress.restarts,
        "kubernetes": _kubernetes(agent),
        "workloads": workloads,
        "wireguard": _wireguard(agent, tunnels),
        "gateways": gateways_of(agent),
        "nodes": _nodes(agent, state, tunnels),
        "first_contact": _first_contact(agent, state, tunnels),
        "warnings": warnings(agent, workloads, reading),
    }


def _backend(placed: Placed, view: ServiceView, reading: Reading | None) -> dict[str, Any]:
    counts = reading.counters.backends.get(endpoint(placed.backend)) if reading is not None else None
    return {
        "address": str(placed.backend.address),
        "port": placed.backend.port,
        "cluster": placed.cluster,
        "node": placed.node[1] if placed.node is not None else None,
        "reachable": placed.reachable,
        "proven": placed.proven,
        "used": placed.backend in view.used,
        "connects": counts.connects if counts is not None else 0,
        "datagrams": counts.datagrams if counts is not None else 0,
    }


async def services(agent: Agent) -> dict[str, Any]:
    """The document of `GET /v1/services`. Counts are since the backend's map entry was made."""
    views = agent.desired.views if agent.desired is not None else ()
    # After what is shown was decided: the kernel's thread has made it so before it reads.
    reading = await read_kernel(agent)
    return {
        "services": [
            {
                "namespace": view.namespace,
                "name": view.name,
                "dns": f"{view.name}.{view.namespace}.svc.{agent.spec.dns_domain}",
                "address": str(view.address) if view.address is not None else None,
                "headless": view.is_headless,
                "global": view.is_global,
                "affinity": view.affinity,
                "session_affinity": view.session_affinity,
                "ports": [{"name": n, "port": p, "protocol": protocol} for n, p, protocol in view.ports],
                "backends": [_backend(placed, view, reading) for placed in view.backends],
            }
            for view in views
        ]
    }


async def pods(agent: Agent) -> dict[str, Any]:
    """The document of `GET /v1/pods`: what is published of this node's pods (null on a host that is no Kubernetes
    node), and of each other node some addresses of pods, as many as one can ask. A Cilium node's pods, whose addresses
    are of its own range as a machine's workloads' are, are not among them."""
    state = agent.decoder.state()
    here = agent.desired.pods if agent.desired is not None else Pods()
    nodes = {}
    for (cluster, name), node in state.nodes.items():
        endpoint_of_node = node.tunnel_endpoint(4)
        if endpoint_of_node is not None and (cluster, name) != (agent.spec.cluster.name, agent.spec.host):
            nodes[cluster, endpoint_of_node] = node
    others: dict[tuple[str, str], list[str]] = {}
    for (cluster, text), pair in sorted(state.ips.items()):
        node_of_pod = nodes.get((cluster, pair.host_ip))
        if node_of_pod is None or not pair.pod_name or ":" in text or "/" in text:
            continue
        own = node_of_pod.ipv4_alloc_cidr
        found = others.setdefault((cluster, node_of_pod.name), [])
        if (own is None or IPv4Address(text) not in own) and len(found) < PODS_TO_ASK:
            found.append(text)
    local = []
    for address in sorted(here.identities):
        of_pod = state.ips.get((agent.spec.cluster.name, str(address)))
        name = f"{of_pod.namespace}/{of_pod.pod_name}" if of_pod is not None else ""
        local.append({"address": str(address), "name": name})
    return {
        "node": agent.spec.node.kubernetes_node,
        "ranges": [str(each) for each in here.ranges],
        "pods": None if agent.spec.node.kubernetes_node is None else local,
        "others": [
            {"cluster": cluster, "node": name, "addresses": addresses}
            for (cluster, name), addresses in sorted(others.items())
            if addresses
        ],
    }


async def peers(agent: Agent) -> dict[str, Any]:
    """The document of `GET /v1/peers`: the registrar's word about each peer's etcd and about the API server of its
    Kubernetes cluster (null where there is none), and our own about the peers' nodes."""
    now, clock = time.time(), time.monotonic()
    state = agent.decoder.state()
    etcd = _etcd(agent)
    found = []
    for name in sorted({*state.peers, *state.configs}):
        said = state.peers.get(name)
        config = state.configs.get(name)
        age = proof_age(said, agent.decoder.peer_changes[name], now, clock) if said is not None else None
        probes = [probe for (cluster, _), probe in agent.prober.table.states.items() if cluster == name]
        found.append(
            {
                "name": name,
                "id": config.id if config is not None else None,
                "state": peer_state(said.state if said is not None else "unknown", age, etcd["connected"]),
                "registrar_says": said.state if said is not None else None,
                "last_proof": said.last_proof if said is not None else None,
                "age": None if age is None else round(age, 1),
                "endpoint": said.endpoint if said is not None else None,
                "keys": dict(said.keys) if said is not None else {},
                "refused": dict(said.refused) if said is not None else {},
                "refused_last": list(said.refused_last) if said is not None and said.refused_last else None,
                "nodes": sum(1 for cluster, _ in state.nodes if cluster == name),
                "nodes_probed": len(probes),
                "nodes_up": sum(1 for probe in probes if probe.up and probe.last_answer is not None),
            }
        )
    api = state.kubernetes.get(agent.spec.cluster.name)
    return {
        "own_etcd": {"connected": etcd["connected"], "age": etcd["age"]},
        "peers": found,
        "kubernetes": None
        if api is None
        else {
            "server": api.server,
            "state": api.state if etcd["connected"] else "unknown",
            "since": api.since,
            "error": api.error,
            "objects": dict(api.objects),
            "problems": list(api.problems),
        },
    }
