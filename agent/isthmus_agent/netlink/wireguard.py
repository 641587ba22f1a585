# SPDX-License-Identifier: GPL-3.0-or-later
"""The WireGuard device: made where the kernel has WireGuard, else taken as `wireguard-go` made it.

Configured and read with `wg` of wireguard-tools, which speaks to both. The private key goes over standard input only.
Peers are changed one by one and never with `wg syncconf`: that sets the port too, for which wireguard-go closes its
socket and loses what arrives meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from isthmus_mesh.spec import WIREGUARD_DEVICES, WIREGUARD_UNITS
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from isthmus_agent.desired.datapath import Address, Network, WireGuard, WireGuardPeer
from isthmus_agent.netlink.errors import NetworkError
from isthmus_agent.netlink.settings import SRC_VALID_MARK, set_ipv4

DEVICES = WIREGUARD_DEVICES
DEVICE = DEVICES[0]
UNITS = dict(zip(DEVICES, WIREGUARD_UNITS))

KERNEL, USER_SPACE = "kernel", "wireguard-go"
_KINDS = {"wireguard": KERNEL, "tun": USER_SPACE}

_IFF_UP = 0x1
KEEPALIVE = 25
"""Seconds after which a peer whose session this host keeps open is sent a packet: less than the 30 s for which an
address translation remembers a flow of UDP that was not answered (nf_conntrack_udp_timeout)."""
_SECONDS = 10.0  # that `wg` may take
_BATCH = 200  # peers in one command line


@dataclass(frozen=True, slots=True)
class Device:
    """`implementation` is KERNEL or USER_SPACE."""

    index: int
    implementation: str


@dataclass(frozen=True, slots=True)
class PeerState:
    """`endpoint` is "address:port" as WireGuard has it now, "" for none; `handshake` is wall clock seconds, 0 for none
    yet; `received` and `sent` are bytes; `addresses` and `ranges` as of `WireGuardPeer`; `keepalive` is seconds, 0 for
    none."""

    endpoint: str
    addresses: frozenset[Address]
    handshake: int
    received: int
    sent: int
    ranges: frozenset[Network] = frozenset()
    keepalive: int = 0

    def is_as(self, wanted: WireGuardPeer) -> bool:
        """Allowed IPs and keepalive are what is wanted; where the peer is, WireGuard knows better, if it knows it."""
        known = bool(self.endpoint) or wanted.dials_in
        allowed = (self.addresses, self.ranges) == (wanted.addresses, wanted.ranges)
        return known and allowed and self.keepalive == _keepalive(wanted)


@dataclass(frozen=True, slots=True)
class Configured:
    """`changes` has a phrase each. `fresh`: the device had another key or none, so no peer has a session with it."""

    changes: tuple[str, ...]
    fresh: bool


@dataclass(frozen=True, slots=True)
class _Shown:
    public_key: str
    port: int
    peers: dict[str, PeerState] = field(default_factory=dict)


def find_device(name: str = DEVICE) -> Device | None:
    """The device, None if there is none. NetworkError when it is of another kind."""
    with IPRoute() as ipr:
        link = _link(ipr, name)
    return _device(link, name) if link is not None else None


def find_index(name: str = DEVICE) -> int | None:
    """Interface index of whatever has the device's name, None if nothing has."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def ensure_device(mtu: int, name: str = DEVICE) -> Device:
    """Makes the device in a kernel that has WireGuard, and sets its MTU in bytes. It is brought up by configure().

    NetworkError when neither the kernel nor wireguard-go gives one."""
    with IPRoute() as ipr:
        link = _link(ipr, name)
        if link is None:
            try:
                ipr.link("add", ifname=name, kind="wireguard", mtu=mtu)
            except NetlinkError as error:
                if error.code != errno.EOPNOTSUPP:
                    raise NetworkError(f"cannot make the WireGuard device {name}: {error}") from error
                raise NetworkError(
                    f"the WireGuard device {name} is missing: this kernel has no WireGuard, and {UNITS.get(name)}, "
                    "which stands in for it, has made none. Traffic to encrypted nodes is dropped. Next: systemctl "
                    f"status {UNITS.get(name)}"
                ) from error
            link = _link(ipr, name)
            if link is None:
                raise NetworkError(f"the WireGuard device {name} went away while it was being set up")
        device = _device(link, name)
        if link.get_attr("IFLA_MTU") != mtu:
            ipr.link("set", index=device.index, mtu=mtu)
    # The kernel's check of a source (rp_filter) then goes by the rule for the mark of what was decrypted.
    set_ipv4(device.index, SRC_VALID_MARK)
    return device


def configure(wanted: WireGuard, name: str = DEVICE) -> Configured:
    """Key, port and peers are what is wanted, and the device is up; answers what was changed.

    The endpoint of a peer is set with its addresses only: WireGuard follows a peer that moves. One that dials in gets
    none. NetworkError with the words of `wg`."""
    key = read_key(wanted.key)
    shown = _show(name)
    changes = []
    own = public_key(wanted.key)
    if (shown.public_key, shown.port) != (own, wanted.port):
        _wg("addconf", name, "/dev/stdin", given=f"[Interface]\nPrivateKey = {key}\nListenPort = {wanted.port}\n")
        changes.append(f"set key and port of {name}")
    words: list[list[str]] = []
    for public in shown.peers.keys() - wanted.peers.keys():
        words.append(["peer", public, "remove"])
        changes.append(f"remove WireGuard peer {public}")
    for public, peer in wanted.peers.items():
        if public not in shown.peers or not shown.peers[public].is_as(peer):
            words.append(_settings(public, peer, wanted.port))
            changes.append(f"set WireGuard peer {public} at {peer.endpoint}")
    for start in range(0, len(words), _BATCH):
        _wg("set", name, *(word for one in words[start : start + _BATCH] for word in one))
    with IPRoute() as ipr:
        link = _link(ipr, name)
        if link is not None and not link["flags"] & _IFF_UP:
            try:
                ipr.link("set", index=link["index"], state="up")
            except NetlinkError as error:
                raise NetworkError(
                    f"cannot bring {name} up: {error}. Next: see whether something else listens on UDP port "
                    f"{wanted.port} (ss -ulnp)",
                    tuple(changes),
                ) from error
            changes.append(f"set {name} up")
    return Configured(tuple(changes), shown.public_key != own)


def reopen(wanted: WireGuard, publics: Iterable[str]) -> None:
    """Begins sessions anew with peers that do not answer in those that there are, which end. NetworkError with the
    words of `wg`."""
    words = [
        word
        for public in publics
        for word in ("peer", public, "remove", *_settings(public, wanted.peers[public], wanted.port))
    ]
    _wg("set", wanted.device, *words)


def _settings(public: str, peer: WireGuardPeer, port: int) -> list[str]:
    """Of a peer, for `wg set`. With a keepalive WireGuard opens a session at once."""
    allowed = ",".join(sorted(map(str, (*map(ip_network, peer.addresses), *peer.ranges))))
    found = ["peer", public]
    if not peer.dials_in:
        found += ["endpoint", f"{peer.endpoint}:{port}"]
    return [*found, "persistent-keepalive", str(_keepalive(peer)), "allowed-ips", allowed]


def _keepalive(peer: WireGuardPeer) -> int:
    return KEEPALIVE if peer.kept is not None else 0


def greet(underlay: Address, peers: Iterable[Address], overlay_port: int, name: str = DEVICE) -> None:
    """Sends each peer, by an address of its, an empty packet of the overlay through WireGuard, from our `underlay`
    address; its VXLAN device discards it. A session comes of it, if there was none.

    When this device is new, others do not know that their sessions have ended, and what they send would be lost until
    they doubt it, 15 s later."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as greeter:
        greeter.setblocking(False)
        # One that cannot be sent to now is no worse off than before.
        with contextlib.suppress(OSError):
            greeter.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
            greeter.bind((str(underlay), 0))
        for peer in peers:
            with contextlib.suppress(OSError):
                greeter.sendto(b"", (str(peer), overlay_port))


def audit(wanted: WireGuard, name: str = DEVICE) -> list[str]:
    """What differs from what is wanted, in words. Changes nothing."""
    try:
        device = find_device(name)
        if device is None:
            return [f"the WireGuard device {name} is missing"]
        shown = _show(name)
        key = public_key(wanted.key)
    except NetworkError as error:
        return list(error.problems)
    problems = []
    with IPRoute() as ipr:
        (link,) = ipr.get_links(device.index)
    if not link["flags"] & _IFF_UP:
        problems.append(f"{name} is down")
    if link.get_attr("IFLA_MTU") != wanted.mtu:
        problems.append(f"{name} has MTU {link.get_attr('IFLA_MTU')}, wanted: {wanted.mtu}")
    if shown.public_key != key:
        problems.append(f"{name} has another key than {wanted.key}")
    if shown.port != wanted.port:
        problems.append(f"{name} listens on UDP port {shown.port}, wanted: {wanted.port}")
    for public, peer in wanted.peers.items():
        if public not in shown.peers:
            problems.append(f"WireGuard peer {public} at {peer.endpoint} is missing")
        elif not shown.peers[public].is_as(peer):
            problems.append(f"WireGuard peer {public} at {peer.endpoint} has other addresses or settings than wanted")
    problems += [f"WireGuard peer {public} is not wanted" for public in shown.peers.keys() - wanted.peers.keys()]
    return problems


def peer_states(name: str = DEVICE) -> dict[str, PeerState]:
    """By public key. NetworkError when the device cannot be read."""
    return _show(name).peers


def remove_device(name: str = DEVICE) -> list[str]:
    """Removes the device with its key and peers; answers what was removed. wireguard-go ends with its device."""
    with IPRoute() as ipr:
        link = _link(ipr, name)
        if link is None:
            return []
        try:
            _device(link, name)
        except NetworkError:
            return []  # not ours
        ipr.link("del", index=link["index"])
    return [f"device {name}"]


def read_key(path: str) -> str:
    """The private key of a file. NetworkError that says what to do."""
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise NetworkError(
            f"the WireGuard key {path} cannot be read: {error}. Next: run the site playbook, which makes it"
        ) from error


def public_key(path: str) -> str:
    """The public key, base64, of the private key in a file. NetworkError when there is none or `wg` refuses it."""
    return _wg("pubkey", given=read_key(path) + "\n").strip()


def _link(ipr: Any, name: str) -> Any:
    found = ipr.link_lookup(ifname=name)
    if not found:
        return None
    try:
        (link,) = ipr.get_links(found[0])
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise
        return None
    return link


def _device(link: Any, name: str) -> Device:
    info = link.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
    if kind not in _KINDS:
        raise NetworkError(
            f"{name} is a device of kind {kind}, not of WireGuard. Next: find out whose it is (ip -d link show {name}) "
            "and remove or rename it"
        )
    return Device(int(link["index"]), _KINDS[kind])


def _show(name: str) -> _Shown:
    """`wg show <name> dump`: tab-separated, the device first, then a line for each peer (wg(8))."""
    head, *lines = _wg("show", name, "dump").splitlines()
    _, public_key, port, _ = head.split("\t")
    peers = {}
    for line in lines:
        public, _, endpoint, allowed, handshake, received, sent, keepalive = line.split("\t")
        networks = [ip_network(each) for each in allowed.split(",") if each != "(none)"]
        peers[public] = PeerState(
            "" if endpoint == "(none)" else endpoint,
            frozenset(each.network_address for each in networks if each.num_addresses == 1),
            int(handshake),
            int(received),
            int(sent),
            frozenset(each for each in networks if each.num_addresses > 1),
            0 if keepalive == "off" else int(keepalive),
        )
    return _Shown(public_key, int(port), peers)


def _wg(*words: str, given: str = "") -> str:
    """Output of `wg`. NetworkError with its words; `given` is its standard input and never shown."""
    try:
        done = subprocess.run(["wg", *words], input=given, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError as error:
        raise NetworkError("the command wg is missing. Next: install the package wireguard-tools") from error
    except subprocess.TimeoutExpired as error:
        raise NetworkError(f"`wg {words[0]}` did not end within {_SECONDS:.0f} s") from error
    if done.returncode:
        raise NetworkError(f"`wg {' '.join(words[:2])}` failed: {done.stderr.strip()}")
    return done.stdout
