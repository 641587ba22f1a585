# SPDX-License-Identifier: GPL-3.0-or-later
"""Service addresses and who answers them. Pure.

A service is here when it has a definition, when this cluster publishes it (its Kubernetes has it), or when only peers
offer it and the registrar dealt it an address: then their ports are its ports.
Merging follows Cilium (pkg/loadbalancer selectbackends, service_merger): the local service supplies
the frontend, port names decide which backend serves which port, affinity prefers the local or the
remote ones. A backend that probes found unreachable counts as unhealthy: it gets no new flows while a
reachable one is there, and is never deleted for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, ip_address

from isthmus_mesh.wire import ClusterService, L4Addr

from isthmus_agent.desired.datapath import Address, Backend, Frontend, Service
from isthmus_agent.desired.reach import NodeKey, Reachability
from isthmus_agent.state.model import MeshState, ServiceName

PROTOCOLS = {"TCP": 6, "UDP": 17}


@dataclass(frozen=True, slots=True)
class Placed:
    """A backend with the node that carries it (None: not known) and whether that is reachable.

    `proven`: the node itself answered a probe, or it is this host and some other node did.
    """

    backend: Backend
    cluster: str
    node: NodeKey | None
    reachable: bool
    proven: bool


@dataclass(frozen=True, slots=True)
class ServiceView:
    """A service as this host sees it, for status and for the shells around it."""

    namespace: str
    name: str
    address: Address | None  # None: no address dealt yet
    affinity: str
    session_affinity: int  # seconds, 0: none
    is_global: bool
    ports: tuple[tuple[str, int, str], ...]  # name, port, protocol
    backends: tuple[Placed, ...]
    used: frozenset[Backend]  # those that get new flows
    is_headless: bool = False  # of Kubernetes, which gives it no address


@dataclass(frozen=True, slots=True)
class Services:
    """What `compute` finds. `dead`: unreachable backends whose sockets should end, because another
    backend of the same service in another cluster is proven to be reached."""

    table: dict[Frontend, Service] = field(default_factory=dict)
    views: tuple[ServiceView, ...] = ()
    dead: frozenset[Backend] = frozenset()


class Placement:
    """Finds the node of a backend: by its published address, else by the range it lies in.

    It hangs on the state's nodes and addresses and on the own `site` alone and remembers what it found."""

    def __init__(self, state: MeshState, site: str) -> None:
        self._state = state
        self._site = site
        self._found: dict[tuple[str, str], tuple[Address, NodeKey | None, Address | None]] = {}
        self._by_address: dict[tuple[str, str], NodeKey] = {}
        self._by_range: dict[tuple[str, IPv4Network], NodeKey] = {}
        self._lengths: dict[str, set[int]] = {}
        for key, node in state.nodes.items():
            for entry in node.addresses:
                if entry.type in ("InternalIP", "ExternalIP"):
                    self._by_address[key[0], entry.ip] = key
            for cidr in node.cidrs():
                if isinstance(cidr, IPv4Network):
                    self._by_range[key[0], cidr] = key
                    self._lengths.setdefault(key[0], set()).add(cidr.prefixlen)

    def of(self, cluster: str, ip: str) -> tuple[Address, NodeKey | None, Address | None]:
        """The address, the node that carries it and that node's tunnel endpoint."""
        found = self._found.get((cluster, ip))
        if found is None:
            address = ip_address(ip)
            node = self.node(cluster, address)
            found = self._found[cluster, ip] = (address, node, self.endpoint(node))
        return found

    def node(self, cluster: str, address: Address) -> NodeKey | None:
        """The node that carries `address` of `cluster`."""
        pair = self._state.ips.get((cluster, str(address)))
        if pair is not None and (found := self._by_address.get((cluster, pair.host_ip))) is not None:
            return found
        if isinstance(address, IPv4Address):
            for length in sorted(self._lengths.get(cluster, ()), reverse=True):
                key = (cluster, IPv4Network((address, length), strict=False))
                if (found := self._by_range.get(key)) is not None:
                    return found
        return None

    def has_way(self, cluster: str, ip: str) -> bool:
        """Whether anything says where `ip` of `cluster` is: services and nodes come from etcd in no order."""
        return self.of(cluster, ip)[1] is not None or (cluster, ip) in self._state.ips

    def endpoint(self, node: NodeKey | None) -> Address | None:
        """The node's tunnel endpoint."""
        found = self._state.nodes[node].tunnel_endpoint(4, self._site) if node is not None else None
        return ip_address(found) if found is not None else None


@dataclass(frozen=True, slots=True)
class _Local:
    """The own cluster's view of a service: where its addresses and rules come from."""

    namespace: str
    name: str
    fronts: tuple[tuple[Address, str, L4Addr], ...]
    address: Address | None
    backends: Mapping[str, Mapping[str, L4Addr]]
    is_global: bool
    affinity: str
    session_affinity: int
    is_headless: bool


def _local_services(
    state: MeshState, cluster: str, remote: Mapping[ServiceName, list[ClusterService]]
) -> Iterable[_Local]:
    published = {(ns, name): svc for (owner, ns, name), svc in state.services.items() if owner == cluster}
    offered = {name for name, vip in state.vips.items() if vip.by == "peers" and name in remote}
    names: set[ServiceName] = {*published, *state.local_services, *state.definitions, *offered}
    for service in sorted(names):
        definition = state.definitions.get(service)
        own: ClusterService | None = published.get(service) or state.local_services.get(service)
        vip = state.vips.get(service)
        address: Address | None = vip.ipv4 if vip is not None else None
        of_kubernetes = vip is not None and vip.by == "kubernetes"
        fronts: tuple[tuple[Address, str, L4Addr], ...] = ()
        if definition is not None and address is not None and not of_kubernetes:
            fronts = tuple((address, port.name, L4Addr(port.protocol, port.port)) for port in definition.ports)
        elif own is not None:
            fronts = tuple(
                (ip_address(ip), port_name, port)
                for ip, ports in own.frontends.items()
                for port_name, port in ports.items()
                if ip_address(ip).version == 4
            )
            address = fronts[0][0] if fronts else address
        elif address is not None:
            fronts = tuple((address, name, port) for name, port in _ports_of(remote.get(service, ())))
        affinity, session_affinity = definition.affinity if definition is not None else "none", 0
        if of_kubernetes and vip is not None:
            affinity, session_affinity = vip.affinity, vip.session_affinity
        yield _Local(
            namespace=service[0],
            name=service[1],
            fronts=fronts,
            address=address,
            backends=own.backends if own is not None else {},
            is_global=service in published or own is None
            if definition is None
            else definition.is_global or of_kubernetes,
            affinity=affinity,
            session_affinity=session_affinity,
            is_headless=of_kubernetes and address is None,
        )


def _ports_of(remote: Iterable[ClusterService]) -> list[tuple[str, L4Addr]]:
    """The ports that peers offer a service on; of two names for one port that of the first cluster."""
    found: dict[tuple[int, str], str] = {}
    for service in remote:
        for ports in service.frontends.values():
            for name, port in ports.items():
                found.setdefault((port.port, port.protocol), name)
    return [(name, L4Addr(protocol, port)) for (port, protocol), name in sorted(found.items())]


def choose(local: list[Placed], remote: list[Placed], affinity: str) -> tuple[list[Placed], list[Placed]]:
    """(those that get new flows, those that keep only their established ones)."""
    local_up = [b for b in local if b.reachable]
    remote_up = [b for b in remote if b.reachable]
    if affinity == "local":
        chosen = local + (remote if not local_up and remote_up else [])
    elif affinity == "remote":
        chosen = remote + (local if not remote_up and local_up else [])
    else:
        chosen = local + remote
    chosen = chosen or local + remote
    # None reachable: we are the isolated one, or all are gone. Either way trying is better than refusing.
    use = [b for b in chosen if b.reachable] or chosen
    used = {id(b) for b in use}
    return use, [b for b in local + remote if id(b) not in used]


def services(
    state: MeshState, cluster: str, cluster_id: int, own: NodeKey, reach: Reachability, placement: Placement
) -> Services:
    """Every service of the own cluster with its backends, merged and ordered."""
    remote_by_name: dict[ServiceName, list[ClusterService]] = {}
    for (owner, ns, name), service in sorted(state.services.items()):
        if owner != cluster and service.shared:
            remote_by_name.setdefault((ns, name), []).append(service)

    table: dict[Frontend, Service] = {}
    views: list[ServiceView] = []
    dead: set[Backend] = set()

    def placed(owner: str, owner_id: int, ip: str, port: int, protocol: str) -> Placed:
        address, node, endpoint = placement.of(owner, ip)
        return Placed(
            Backend(address, port, PROTOCOLS[protocol], owner_id, endpoint),
            owner,
            node,
            reachable=node == own or (placement.has_way(owner, ip) and reach.reachable(node)),
            # A backend of this very host is reached always; it is a proof only if we are not cut off.
            proven=bool(reach.up) if node == own else reach.proven(node),
        )

    def serving(
        backends: Mapping[str, Mapping[str, L4Addr]], owner: str, owner_id: int, port_name: str, protocol: str
    ) -> list[Placed]:
        return [
            placed(owner, owner_id, ip, port.port, protocol)
            for ip, ports in sorted(backends.items())
            if (port := ports.get(port_name)) is not None
            and port.protocol in (protocol, "ANY")
            and placement.of(owner, ip)[0].version == 4
        ]

    for local in _local_services(state, cluster, remote_by_name):
        everyone: dict[Backend, Placed] = {}
        used: set[Backend] = set()
        for address, port_name, front in local.fronts:
            if front.protocol not in PROTOCOLS:
                continue
            here = serving(local.backends, cluster, cluster_id, port_name, front.protocol)
            there = [
                found
                for service in (remote_by_name.get((local.namespace, local.name), []) if local.is_global else [])
                for found in serving(service.backends, service.cluster, service.cluster_id, port_name, front.protocol)
            ]
            use, rest = choose(here, there, local.affinity)
            # What affinity keeps in reserve may still hold flows of a time when it was used: it drains as well.
            table[Frontend(address, front.port, PROTOCOLS[front.protocol])] = Service(
                f"{local.namespace}/{local.name}",
                tuple(b.backend for b in use),
                tuple(b.backend for b in rest),
                local.session_affinity,
            )
            used.update(b.backend for b in use)
            everyone.update((b.backend, b) for b in (*here, *there))
            for lost in rest:
                if (
                    lost.node is not None
                    and not lost.reachable
                    and any(other.proven and other.cluster != lost.cluster for other in use)
                ):
                    dead.add(lost.backend)
        views.append(
            ServiceView(
                namespace=local.namespace,
                name=local.name,
                address=local.address,
                affinity=local.affinity,
                session_affinity=local.session_affinity,
                is_global=local.is_global,
                ports=tuple((name, port.port, port.protocol) for _, name, port in local.fronts),
                backends=tuple(everyone.values()),
                used=frozenset(used),
                is_headless=local.is_headless,
            )
        )
    return Services(table, tuple(views), frozenset(dead))
