# SPDX-License-Identifier: GPL-3.0-or-later
"""Who is reachable: the state machine of the probes. Pure; the time is passed in (seconds, monotonic).

One observer's finding. It orders backends and never deletes anything. A node that was never probed
counts as reachable, unless every probed node of its cluster is down (then the path to the cluster is).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from isthmus_agent.desired.datapath import Address

NodeKey = tuple[str, str]  # (cluster, node)

DOWN_AFTER = 3  # misses in a row
UP_AFTER = 2  # answers in a row
STEADY_AFTER = 10  # answers in a row
MAX_TARGETS = 64
WITNESSES = 2


@dataclass(frozen=True, slots=True)
class Target:
    """A node to probe at its mesh address."""

    node: NodeKey
    address: Address


@dataclass(frozen=True, slots=True)
class ProbeState:
    """What the probes of one node say. `since`: when `up` last changed; `last_answer`: the last proof. `steady`: it was
    never down, or has answered for a while since."""

    up: bool = True
    misses: int = 0
    answers: int = 0
    since: float = 0.0
    last_answer: float | None = None
    rtt: float | None = None  # seconds
    steady: bool = True


def step(state: ProbeState, rtt: float | None, now: float) -> ProbeState:
    """The state after one probe: `rtt` in seconds, or None when no answer came in time."""
    if rtt is None:
        misses = state.misses + 1
        down = state.up and misses >= DOWN_AFTER
        return replace(
            state,
            misses=misses,
            answers=0,
            up=state.up and not down,
            since=now if down else state.since,
            steady=state.steady and not down,
        )
    answers = state.answers + 1
    rises = not state.up and answers >= UP_AFTER
    return ProbeState(
        up=state.up or rises,
        misses=0,
        answers=answers,
        since=now if rises else state.since,
        last_answer=now,
        rtt=rtt,
        steady=state.steady or answers >= STEADY_AFTER,
    )


@dataclass(frozen=True, slots=True)
class Reachability:
    """One observer's view. Equal values mean: no backend has to be reordered.

    `up` holds the nodes that answered, `down` those that stopped answering, `down_clusters` the
    clusters of which every probed node is down. `unsteady` are those that were down a short time ago, or are.
    """

    up: frozenset[NodeKey] = frozenset()
    down: frozenset[NodeKey] = frozenset()
    down_clusters: frozenset[str] = frozenset()
    unsteady: frozenset[NodeKey] = frozenset()

    def reachable(self, node: NodeKey | None) -> bool:
        """False only on evidence; an unknown or unprobed node is taken as reachable."""
        if node is None or node in self.up:
            return True
        return node not in self.down and node[0] not in self.down_clusters

    def proven(self, node: NodeKey | None) -> bool:
        """True only when this node itself answered."""
        return node is not None and node in self.up


@dataclass(slots=True)
class ProbeTable:
    """The states of all targets; the shell sends echoes and calls `record`."""

    states: dict[NodeKey, ProbeState] = field(default_factory=dict)

    def retarget(self, nodes: Iterable[NodeKey]) -> None:
        """Probe exactly these nodes from now on; what is known of those that stay is kept."""
        self.states = {node: self.states.get(node, ProbeState()) for node in nodes}

    def doubt(self, node: NodeKey, up: bool) -> None:
        """Somebody found before that a node does not answer. Not `up`: it is down until it answers; else it only has to
        answer for a while until it is steady. To be called before the first `record`."""
        self.states[node] = ProbeState(up=up, steady=False)

    def record(self, node: NodeKey, rtt: float | None, now: float) -> bool:
        """Take one result; True when a node went up, down or steady, or answered for the first time."""
        before = self.states.get(node)
        if before is None:
            return False
        after = step(before, rtt, now)
        self.states[node] = after
        return (before.up, before.steady, before.last_answer is None) != (
            after.up,
            after.steady,
            after.last_answer is None,
        )

    def view(self) -> Reachability:
        """What `desired` needs to know."""
        down = frozenset(node for node, state in self.states.items() if not state.up)
        up = frozenset(node for node, state in self.states.items() if state.up and state.last_answer is not None)
        clusters = {node[0] for node in self.states}
        return Reachability(
            up=up,
            down=down,
            down_clusters=frozenset(
                cluster for cluster in clusters if all(n in down for n in self.states if n[0] == cluster)
            ),
            unsteady=frozenset(node for node, state in self.states.items() if not state.steady),
        )


def _rank(own: NodeKey, node: NodeKey) -> bytes:
    return hashlib.blake2b("\0".join((*own, *node)).encode(), digest_size=8).digest()


def choose_targets(
    own: NodeKey,
    holders: Iterable[NodeKey],
    addresses: Mapping[NodeKey, Address],
    limit: int = MAX_TARGETS,
    gateways: Iterable[NodeKey] = (),
) -> tuple[Target, ...]:
    """At most `limit` nodes: the site's `gateways`, of those that hold backends, spread evenly over their clusters, and
    a few witnesses.

    Which ones depends on the observer's own name, so that many observers together cover all nodes.
    Witnesses hold no backend; two of the own cluster and two others tell a host that is cut off from
    one that lost a peer.
    """
    chosen = [node for node in gateways if node != own and node in addresses]
    by_cluster: dict[str, list[NodeKey]] = {}
    for node in set(holders) - set(chosen):
        if node != own and node in addresses:
            by_cluster.setdefault(node[0], []).append(node)
    queues = [sorted(nodes, key=lambda node: _rank(own, node)) for _, nodes in sorted(by_cluster.items())]
    depth = 0
    while any(depth < len(queue) for queue in queues):
        chosen.extend(queue[depth] for queue in queues if depth < len(queue))
        depth += 1
    held = set(chosen)
    others = sorted((node for node in addresses if node != own and node not in held), key=lambda n: _rank(own, n))
    near = [node for node in others if node[0] == own[0]][:WITNESSES]
    far = [node for node in others if node[0] != own[0]][:WITNESSES]
    chosen = [*chosen[: limit - len(near) - len(far)], *near, *far]
    return tuple(Target(node, addresses[node]) for node in sorted(chosen))
