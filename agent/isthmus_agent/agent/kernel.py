# SPDX-License-Identifier: GPL-3.0-or-later
"""The one door to the kernel: BPF maps and programs, overlay device, addresses, routes, sockets.

`Kernel` is what the loop needs (tests give it a fake); `HostKernel` is the real one. All calls are
synchronous and run in one thread, one at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from isthmus_mesh import strangers
from isthmus_mesh.ipsec import DEVICE

from isthmus_agent.bpf.driver import PIN_DIR, BpfDatapath, Capacity, Counters
from isthmus_agent.bpf.errors import BpfError
from isthmus_agent.desired.datapath import (
    Address,
    Backend,
    Datapath,
    Frontend,
    KeepSource,
    Network,
    Route,
    Service,
    WireGuard,
)
from isthmus_agent.desired.drain import endpoint

if TYPE_CHECKING:
    from isthmus_agent.netlink.routes import Way
    from isthmus_agent.netlink.wireguard import PeerState


def bundled_libbpf() -> Path | None:
    """The library that came with this environment (`/opt/isthmus/<version>/lib`); None: the system's."""
    path = Path(sys.prefix, "lib", "libbpf.so.1")
    return path if path.exists() else None


@dataclass(frozen=True, slots=True)
class Applied:
    """What a call changed, in words; empty when everything was as wanted.

    `problems`: what of the network the kernel refused, such as a route whose prefix another daemon's route has, and
    addresses that a map has no room for. All the rest was done.
    """

    changes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A WireGuard device at one moment; `peers` by public key."""

    implementation: str
    peers: Mapping[str, PeerState]


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters and fill levels at one moment; `tunnels` are the WireGuard devices that are there, by name."""

    counters: Counters
    capacity: dict[str, Capacity] = field(default_factory=dict)
    tunnels: Mapping[str, Tunnel] = field(default_factory=dict)


class Kernel(Protocol):
    """What the loop asks of the kernel."""

    def is_fresh(self) -> bool:
        """Nothing of an earlier agent is pinned on this host."""

    def held(self) -> dict[Frontend, Service]:
        """The services that an earlier agent left in the maps."""

    def underlay_mtu(self, address: Address) -> int:
        """MTU in bytes of the device that carries `address`."""

    def public_key(self, path: str) -> str:
        """WireGuard's public key, base64, of the private key in a file. NetworkError when there is none."""

    def tunnel_routes(self) -> frozenset[Network]:
        """What strongSwan leads into its tunnels. NetworkError when the kernel does not say."""

    def routed_over(self, table: int) -> dict[Network, Address]:
        """Over whom an agent has led packets by its routes in a table. NetworkError when the kernel does not say."""

    def network_changed(self) -> None:
        """Somebody changed devices or rules: the next apply() reads what is there."""

    def start(self, datapath: Datapath) -> Applied:
        """Load, fill, attach: also over what an earlier agent left. Also repairs drift."""

    def apply(self, datapath: Datapath) -> Applied:
        """Make maps, addresses, routes and rules what is wanted."""

    def audit(self, datapath: Datapath) -> list[str]:
        """What differs from what is wanted, in words."""

    def read(self) -> Reading:
        """Counters and fill levels."""

    def tunnels(self) -> dict[str, Tunnel]:
        """The WireGuard devices that are there, by name."""

    def reopen(self, wanted: WireGuard, publics: Collection[str]) -> None:
        """Begin sessions anew with peers of a device, by their public keys. NetworkError."""

    def destroy(self, backends: Collection[Backend]) -> int:
        """End the sockets that the connect hook gave to these backends; how many."""

    def namespaces(self, addresses: Collection[Address]) -> dict[Address, int]:
        """Cookies of the pods' network namespaces that have `addresses`, of those that are found. NetworkError."""

    def mend_filters(self, settled: bool = True) -> tuple[tuple[str, ...], int]:
        """Put back what other programs took of our part of netfilter: (what differed, in words; packets between pods
        and the mesh that other filters dropped). NetworkError when that cannot be done. Not `settled`: others are
        changing netfilter right now."""

    def guard_drops(self) -> int:
        """Packets that the rules of gateways of this host dropped. NetworkError."""

    def steps(self) -> int:
        """A number that grows while a call gets on. The only method that may be called from another thread."""

    def close(self) -> None:
        """Give back handles; the datapath stays."""


class HostKernel:
    """This host's kernel."""

    def __init__(self, pin_dir: Path = PIN_DIR, cgroup_root: Path | None = None) -> None:
        self._pin_dir = pin_dir
        self._bpf = BpfDatapath(pin_dir=pin_dir, cgroup_root=cgroup_root, libbpf=bundled_libbpf())
        self._ifindex = 0
        self._overlay = (0, 0)
        self._network_steps = 0
        self._keep_source: KeepSource | None = None
        self._made: Datapath | None = None  # what the network was made, when nothing was refused
        self._wireguard: dict[str, int] | None = None  # indexes of the devices that the programs know, None: not known
        self._fresh_wireguard: set[str] = set()  # those without sessions yet
        self._ways: dict[Address, Way] = {}  # of the underlay, to where routes lead natively
        self._underlay: frozenset[int] | None = None  # devices with programs for that; None: not known

    @property
    def cgroup_root(self) -> Path:
        """Where the cgroup2 hierarchy is mounted. BpfError when it is not."""
        return self._bpf.cgroup_root

    def conflicts(self, port: int) -> list[str]:
        """What others have here that the mesh needs, in words; `port` is the overlay's. BpfError."""
        from isthmus_agent import netlink

        programs, devices = self._bpf.strangers(), netlink.overlays_of_others(port)
        found = [strangers.hook_words(programs, str(self.cgroup_root))] if programs else []
        return found + ([strangers.port_words(port, strangers.device_words(devices))] if devices else [])

    def is_fresh(self) -> bool:
        return not (self._pin_dir / "svc").exists()

    def held(self) -> dict[Frontend, Service]:
        self._bpf.open_pinned()
        try:
            return self._bpf.services()
        finally:
            self._bpf.close()

    def underlay_mtu(self, address: Address) -> int:
        from isthmus_agent import netlink

        return netlink.underlay_mtu(address)

    def public_key(self, path: str) -> str:
        from isthmus_agent.netlink import wireguard

        return wireguard.public_key(path)

    def tunnel_routes(self) -> frozenset[Network]:
        from isthmus_agent import netlink

        return netlink.tunnel_routes(DEVICE)

    def routed_over(self, table: int) -> dict[Network, Address]:
        from isthmus_agent import netlink

        return netlink.routed_over(table)

    def network_changed(self) -> None:
        self._made = None

    def start(self, datapath: Datapath) -> Applied:
        from isthmus_agent import netlink

        if not self._ifindex or self._bpf.unpinned():
            self._ifindex = 0  # until all of this was done
            self._bpf.open(datapath.cluster_id, datapath.identity_shift)
        # Maps before hooks, checks before packets: at no moment does a program decide on an empty map.
        maps = self._bpf.apply(datapath)
        self._ifindex = netlink.ensure_overlay(port=datapath.overlay_port, mtu=datapath.overlay_mtu)
        self._overlay = (datapath.overlay_port, datapath.overlay_mtu)
        self._bpf.attach_overlay(self._ifindex)
        self._made = self._wireguard = self._underlay = None
        network = self._apply_network(datapath)
        self._bpf.attach_cgroup()
        return Applied((*(f"map {name}" for name in maps.maps), *network.changes), (*maps.problems, *network.problems))

    def apply(self, datapath: Datapath) -> Applied:
        if self._overlay != (datapath.overlay_port, datapath.overlay_mtu):
            return self.start(datapath)  # the device itself changes
        is_known = self._made is not None
        new = self._add_ways(datapath)
        maps = self._bpf.apply(datapath, read=False)
        network = self._apply_network(datapath)
        if not is_known:
            self._bpf.attach_overlay(self._ifindex)
        changes = (*new, *(f"map {name}" for name in maps.maps), *network.changes)
        return Applied(changes, (*maps.problems, *network.problems))

    def _add_ways(self, datapath: Datapath) -> tuple[str, ...]:
        """Routes to what is new, before a service can give it to a connect(), which would be refused for want of a
        route; before those over WireGuard its peers. What goes stays until no service gives it; what cannot be made is
        told with all the rest."""
        from isthmus_agent import netlink

        if self._made is None:
            return ()
        tunnel = Applied()
        if datapath.wireguard:
            before = {each.device: each.peers for each in self._made.wireguard}
            wanted = (replace(each, peers={**before.get(each.device, {}), **each.peers}) for each in datapath.wireguard)
            with_more = replace(datapath, wireguard=tuple(wanted))
            tunnel = self._apply_wireguard(with_more)
            if self._made is None:
                return tunnel.changes
            self._made = replace(self._made, wireguard=with_more.wireguard)
        known = {(each.prefix, each.table, each.metric): each for each in self._made.routes}
        # The kernel takes a source only of an address that is there.
        sources = {None, *self._made.addresses, *(each.underlay for each in datapath.wireguard)}
        new = {
            key: each
            for each in datapath.routes
            if known.get(key := (each.prefix, each.table, each.metric)) != each
            and each.has_device
            and not each.sunk
            and each.source in sources
        }
        self._find_ways(new.values())
        new = {key: each for key, each in new.items() if each.toward is None or each.toward in self._ways}
        if not new:
            return tunnel.changes
        # Of a new member netfilter is to know before routes lead there: what pods have with it already goes on.
        more = replace(self._made, routes=frozenset({**known, **new}.values()), keep_source=datapath.keep_source)
        made, self._made = self._made, None
        try:
            result = netlink.apply_network(
                more, step=self._network_step, made=made, wireguard=self._wireguard, ways=self._ways
            )
        except netlink.NetworkError as error:
            return (*tunnel.changes, *error.changes)
        self._made = more
        return (*tunnel.changes, *result.changes)

    def _find_ways(self, routes: Iterable[Route]) -> None:
        """Ways of the underlay to nodes that are new, by devices that have the programs already."""
        from isthmus_agent import netlink

        if unknown := [each for each in routes if each.toward is not None and each.toward not in self._ways]:
            found, _ = netlink.underlay_ways(unknown, self._network_step)
            self._ways = {**self._ways, **{to: way for to, way in found.items() if way.oif in (self._underlay or ())}}

    def _apply_network(self, datapath: Datapath) -> Applied:
        """One refused route must not keep the hooks, and with them every service, from this host."""
        from isthmus_agent import netlink

        self._keep_source = datapath.keep_source
        tunnel = self._apply_wireguard(datapath)
        native = self._apply_native(datapath)
        made, self._made = self._made, None
        before = (*tunnel.problems, *native)
        try:
            result = netlink.apply_network(
                datapath, step=self._network_step, made=made, wireguard=self._wireguard, ways=self._ways
            )
        except netlink.OverlayMissing:
            raise  # start() makes it anew
        except netlink.NetworkError as error:
            self._greet(datapath)
            return Applied((*tunnel.changes, *error.changes), (*before, *error.problems))
        self._greet(datapath)
        self._leave_underlay(datapath)
        if not before:
            self._made = datapath
        return Applied((*tunnel.changes, *result.changes), before)

    def _apply_native(self, datapath: Datapath) -> tuple[str, ...]:
        """The ways of the underlay, and programs on the devices that native packets will go by, or WireGuard's with
        native ones inside, before the routes that lead there; answers problems. By a device that cannot have them
        nothing goes natively."""
        from isthmus_agent import netlink

        wanted, made = datapath.native, self._made
        if made is not None and made.native == wanted and made.routes is datapath.routes:
            return ()
        ways, problems = netlink.underlay_ways(datapath.routes, self._network_step, wanted.inside if wanted else ())
        if wanted is None:
            self._use_ways(ways)
            return tuple(problems)
        try:
            # Without it the programs cannot ask which way leads to a node.
            netlink.settings.set_ipv4(self._ifindex, netlink.settings.FORWARDING)
            if wanted.changing:
                # Its program has checked the sources; what comes by the underlay has a mark that tells the way back.
                netlink.settings.set_ipv4(self._ifindex, netlink.settings.RP_FILTER, netlink.settings.LOOSE)
        except netlink.NetworkError as error:
            problems += error.problems
        self._bpf.use_underlay(self._ifindex, wanted.underlay)
        for index in sorted({way.oif for way in ways.values()}):
            try:
                if wanted.changing and netlink.settings.is_strict(index):
                    netlink.settings.set_ipv4(index, netlink.settings.SRC_VALID_MARK)
                self._bpf.attach_underlay(index)
            except (netlink.NetworkError, BpfError) as error:
                problems.append(str(error))
                ways = {target: way for target, way in ways.items() if way.oif != index}
        self._use_ways(ways)
        return tuple(problems)

    def _use_ways(self, ways: dict[Address, Way]) -> None:
        if ways != self._ways:
            self._made = None  # the kernel has the routes as they were
            self._ways = ways

    def _leave_underlay(self, datapath: Datapath) -> None:
        """After the routes: programs, also an earlier agent's, go from devices by which nothing goes natively now."""
        from isthmus_agent import netlink

        if datapath.native is None and self._underlay == frozenset():
            return
        wanted = frozenset(way.oif for way in self._ways.values()) if datapath.native is not None else frozenset()
        if datapath.native is None:
            self._bpf.forget_underlay()
        elsewhere = netlink.other_devices() if self._underlay is None else self._underlay
        self._bpf.detach_underlay(sorted(set(elsewhere) - wanted))
        self._underlay = wanted

    def _greet(self, datapath: Datapath) -> None:
        """Tell peers that WireGuard is new here, when the way to them is there."""
        from isthmus_agent.netlink import wireguard

        for wanted in datapath.wireguard:
            if wanted.device in self._fresh_wireguard:
                endpoints = [peer.endpoint for peer in wanted.peers.values() if not peer.dials_in]
                wireguard.greet(wanted.underlay, endpoints, datapath.overlay_port, wanted.device)
        self._fresh_wireguard.clear()

    def _apply_wireguard(self, datapath: Datapath) -> Applied:
        """Devices, program and peers; the routes come after. Until all is there what is to be encrypted is dropped."""
        from isthmus_agent.netlink import NetworkError, settings, wireguard

        if self._made is not None and self._made.wireguard == datapath.wireguard:
            return Applied()
        changes: list[str] = []
        problems: list[str] = []
        wanted = {each.device: each for each in datapath.wireguard}
        there: dict[str, int] = {}
        starts = self._wireguard is None
        for name, each in wanted.items():
            try:
                # Without it the programs cannot ask which way a packet will take.
                settings.set_ipv4(self._ifindex, settings.FORWARDING)
                there[name] = wireguard.ensure_device(each.mtu, name).index
            except NetworkError as error:
                problems += error.problems
                index = wireguard.find_index(name)
                if index is not None and (self._wireguard or {}).get(name) == index:
                    there[name] = index
        self._attach_wireguard(datapath, there)
        for name in there:
            try:
                configured = wireguard.configure(wanted[name], name)
            except NetworkError as error:
                changes += error.changes
                problems += error.problems
            else:
                changes += configured.changes
                if configured.fresh:
                    self._fresh_wireguard.add(name)
        if starts:
            # Later, one that is not wanted is made for the agent that comes after this one.
            for name in wireguard.DEVICES:
                if name not in wanted:
                    changes += wireguard.remove_device(name)
        if problems:
            self._made = None
        return Applied(tuple(changes), tuple(problems))

    def _attach_wireguard(self, datapath: Datapath, there: dict[str, int]) -> None:
        """Tell the programs which devices there are."""
        from isthmus_agent.netlink import wireguard

        if there == self._wireguard and self._made is not None:
            return
        self._made = None
        if there:
            devices = [there.get(name, 0) for name in wireguard.DEVICES]
            self._bpf.attach_wireguard(devices, datapath.overlay_port, datapath.wireguard[0])
        else:
            self._bpf.forget_wireguard()
        self._wireguard = there

    def audit(self, datapath: Datapath) -> list[str]:
        from isthmus_agent import netlink

        indexes = {each.device: netlink.wireguard.find_index(each.device) for each in datapath.wireguard}
        there = {name: index for name, index in indexes.items() if index is not None}
        found = self._bpf.audit(datapath)
        inside = datapath.native.inside if datapath.native is not None else ()
        ways, problems = netlink.underlay_ways(datapath.routes, self._network_step, inside)
        found += netlink.audit_network(datapath, step=self._network_step, wireguard=there, ways=ways)
        for each in datapath.wireguard:
            found += netlink.wireguard.audit(each, each.device)
        if there:
            devices = [there.get(name, 0) for name in netlink.wireguard.DEVICES]
            found += self._bpf.audit_wireguard(devices, datapath.overlay_port, datapath.wireguard[0])
        index = netlink.overlay_index()
        if index is not None:
            found += self._bpf.audit_attachments(index)
            found += problems
            if datapath.native is not None:
                by = sorted({way.oif for way in ways.values()})
                found += self._bpf.audit_underlay(by, index, datapath.native.underlay)
        return found

    def read(self) -> Reading:
        return Reading(self._bpf.counters(), self._bpf.capacity(), self.tunnels())

    def tunnels(self) -> dict[str, Tunnel]:
        return {name: tunnel for name in self._wireguard or () if (tunnel := self._read_tunnel(name)) is not None}

    def reopen(self, wanted: WireGuard, publics: Collection[str]) -> None:
        """With those that are peers still; what came in between may have taken some away."""
        from isthmus_agent.netlink import wireguard

        made = self._made.wireguard if self._made is not None else ()
        there = {public for each in made if each.device == wanted.device for public in each.peers}
        if still := [public for public in publics if public in there]:
            wireguard.reopen(wanted, still)

    def _read_tunnel(self, name: str) -> Tunnel | None:
        from isthmus_agent.netlink import NetworkError, wireguard

        try:
            device = wireguard.find_device(name)
            return Tunnel(device.implementation, wireguard.peer_states(name)) if device is not None else None
        except NetworkError:
            return None  # apply() tells why

    def destroy(self, backends: Collection[Backend]) -> int:
        from isthmus_agent import netlink

        cookies = self._bpf.left_sockets_of(backends)
        destinations = {endpoint(backend) for backend in backends}
        ended = netlink.destroy_sockets(destinations, cookies)
        if self._keep_source is not None and self._keep_source.pods:
            ended |= netlink.destroy_pods_sockets(destinations, cookies - ended, step=self._network_step)
        return len(ended)

    def namespaces(self, addresses: Collection[Address]) -> dict[Address, int]:
        from isthmus_agent import netlink

        return netlink.namespaces.cookies(addresses, step=self._network_step)

    def mend_filters(self, settled: bool = True) -> tuple[tuple[str, ...], int]:
        from isthmus_agent import netlink

        if self._keep_source is None:
            return (), 0
        return netlink.mend_keep_source(self._keep_source, netlink.OVERLAY, settled)

    def guard_drops(self) -> int:
        from isthmus_agent import netlink

        return netlink.guard_drops()

    def _network_step(self) -> None:
        self._network_steps += 1

    def steps(self) -> int:
        return self._network_steps + self._bpf.lib.calls

    def close(self) -> None:
        self._bpf.close()
