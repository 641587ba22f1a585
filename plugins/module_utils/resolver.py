# SPDX-License-Identifier: BSD-2-Clause
"""How the mesh's names join a host's own resolution, and how that is undone.

Two ways, found by probing, never by the distribution's name:

- `resolved`: systemd-resolved answers for the host. Only the mesh's domain is routed, by settings of `isthmus0`.
- `file`: `/etc/resolv.conf` names the servers. There is no routing by domain in that file, so the local dnsmasq goes
  in front and forwards every other name to the servers that were there. When the file is a symbolic link that another
  program keeps (NetworkManager, resolvconf), dnsmasq reads the link's target, so that program stays in charge. But
  NetworkManager replaces a resolv.conf that is a file, as ours is, unless it is told not to.

dnsmasq cannot forward for one listener and not for another, so it has one: what forwards listens on a loopback address,
where no other host can ask it; what must be on the mesh address, for systemd-resolved, forwards nothing.
"""

from __future__ import annotations

import configparser
import contextlib
import fcntl
import glob
import os
import re
import socket
import struct
from dataclasses import dataclass

from ansible_collections.isthmus.mesh.plugins.module_utils import ports

RESOLV_CONF = "/etc/resolv.conf"
NSSWITCH = "/etc/nsswitch.conf"
STATE_DIRECTORY = "/var/lib/isthmus/resolver"
ORIGINAL = STATE_DIRECTORY + "/original"
ORIGINAL_LINK = STATE_DIRECTORY + "/original-link"
NAMES = "/run/isthmus/dns/hosts"
MARK = "# isthmus.mesh: the first name server is the host's own dnsmasq (isthmus-dns.service)."
_ROTATED = "# isthmus.mesh: the first name server must be asked first, so this is left out: "

# A loopback address of its own: refused at once when dnsmasq is down (so the next server is asked without a timeout),
# there before the overlay device is, and in nobody else's way on port 53.
LOCAL_SERVER = "127.0.0.73"

# systemd-resolved's own address on the host, and its files: with the stubs programs ask resolved. With the file of
# uplinks they ask the network's servers themselves, so that settings of resolved would not be seen.
_STUB = "127.0.0.53"
_STUB_FILES = ("/run/systemd/resolve/stub-resolv.conf", "/usr/lib/systemd/resolv.conf")
_UPLINKS = "/run/systemd/resolve/resolv.conf"

# Who keeps the file that resolv.conf is a link to, and leaves a file of ours in the link's place.
_KEEPERS = ("/run/systemd/resolve/", "/usr/lib/systemd/", "/run/resolvconf/", "/run/connman/")

# NetworkManager keeps its own file whatever it does with resolv.conf (NetworkManager.conf(5), rc-manager). Later ones
# of its configuration count more.
_NETWORK_MANAGER = "/run/NetworkManager/"
_NETWORK_MANAGER_CONF = (
    "/usr/lib/NetworkManager/conf.d/*.conf",
    "/run/NetworkManager/conf.d/*.conf",
    "/etc/NetworkManager/NetworkManager.conf",
    "/etc/NetworkManager/conf.d/*.conf",
)
_UNMANAGED = (
    "set `rc-manager=unmanaged` under [main] in /etc/NetworkManager/conf.d/ (then `systemctl reload NetworkManager`)"
)

# Who writes a resolv.conf that is a file, by what it says of itself, and what makes it leave our line in place.
_WRITERS = (
    (
        "NetworkManager",
        "NetworkManager",
        f"{_UNMANAGED} and make /etc/resolv.conf a link to {_NETWORK_MANAGER}resolv.conf, or use systemd-resolved",
    ),
    ("resolvconf", "resolvconf", "make /etc/resolv.conf the link to resolvconf's own file, or use systemd-resolved"),
    ("dhcpcd", "dhcpcd", "put `nohook resolv.conf` into /etc/dhcpcd.conf, or use systemd-resolved"),
    ("tailscale", "Tailscale", "run `tailscale set --accept-dns=false`, or use systemd-resolved, which serves both"),
    ("[Cc]onnection [Mm]anager|connman", "ConnMan", "use systemd-resolved"),
    ("WSL", "WSL", "set `generateResolvConf = false` under [network] in /etc/wsl.conf"),
    ("cloud-init", "cloud-init", "set `manage_resolv_conf: false` in its configuration, or use systemd-resolved"),
)

_MOUNTS = "/proc/self/mountinfo"
_FS_IOC_GETFLAGS, _FS_IMMUTABLE = 0x80086601, 0x10


@dataclass(frozen=True)
class Found:
    """What a host has: `method` is `resolved` or `file`; `link` the target when resolv.conf is (or was) a link."""

    method: str
    link: str | None
    original: str | None  # what stands behind our lines: the operator's own file, None: there was none
    joined: bool  # our line is in the file now


def probe(resolved_active: bool) -> Found:
    """Read how this host resolves names, looking through what an earlier run of ours changed."""
    link = os.readlink(RESOLV_CONF) if os.path.islink(RESOLV_CONF) else None
    content = _read(RESOLV_CONF)
    joined = content is not None and MARK in content
    if joined:
        was_link = _read(ORIGINAL_LINK)
        # The program behind the link goes on keeping its file, so that is today's original. In a file of the
        # operator's own it is what stands behind our lines: it may have been edited there, or our copy be lost.
        original = _kept(_link_target(was_link)) if was_link else _behind(content or "") or _read(ORIGINAL)
        return Found("file", was_link, original, True)
    asks_resolved = os.path.realpath(RESOLV_CONF) in _STUB_FILES or _STUB in servers(content or "") or _nss_resolve()
    if resolved_active and asks_resolved:
        return Found("resolved", link, content, False)
    return Found("file", link, content if link is None else _kept(_link_target(link)), False)


def obstacles(found: Found) -> tuple[list[str], list[str]]:
    """What keeps names of the mesh from programs of the host, or (before it is joined) our lines out of its
    resolv.conf, and what may take them out again; each in words with what to do."""
    problems, doubts = [], []
    services = _nss_hosts()
    if services is not None and not {"dns", "resolve"} & set(services):
        problems.append(
            f"{NSSWITCH} has `hosts: {' '.join(services)}`, without dns: programs ask no name server, so names of the "
            "mesh would not resolve, and every change would be taken back for that. Add dns to that line."
        )
    if found.method == "resolved" or found.joined:
        return problems, doubts
    remedy = "or let systemd-resolved answer for the host: then the file stays as it is."
    if _immutable(RESOLV_CONF):
        problems.append(
            f"{RESOLV_CONF} is immutable (`lsattr {RESOLV_CONF}`), and the mesh's name server belongs in front there. "
            f"Let it be changed (`chattr -i {RESOLV_CONF}`), {remedy}"
        )
    if any(line.split()[4] == RESOLV_CONF for line in (_read(_MOUNTS) or "").splitlines()):
        problems.append(
            f"{RESOLV_CONF} is a mount of its own (`findmnt {RESOLV_CONF}`; a container's, usually), so it cannot be "
            f"replaced. Unmount it and make it a file, {remedy}"
        )
    elif os.statvfs(os.path.dirname(RESOLV_CONF)).f_flag & os.ST_RDONLY:
        problems.append(
            f"{os.path.dirname(RESOLV_CONF)} is on a read-only file system, so {RESOLV_CONF} cannot be changed. Mount "
            f"it writable, {remedy}"
        )
    doubts += _doubts_about_keeper(found)
    listed = servers(found.original or "")
    silent = [one for one in listed if one.startswith("127.") and not ports.clashes(ports.bound("udp", 53), one)]
    if silent:
        doubts.append(
            f"{RESOLV_CONF} names {silent[0]} as name server, and nobody listens there on UDP port 53. Names that are "
            "not the mesh's do not resolve, as before. Next: start that server, or name another one."
        )
    if not listed and (found.link is None or found.original is not None):
        doubts.append(
            f"{RESOLV_CONF} names no name server. The mesh's names will resolve, and no others, as before. Next: "
            "nothing, when that is meant; otherwise add the servers there."
        )
    return problems, doubts


def _doubts_about_keeper(found: Found) -> list[str]:
    """Another program's hand on resolv.conf that we do not know, or that does not leave our line in place."""
    if found.link is not None:
        target = _link_target(found.link)
        real = os.path.realpath(RESOLV_CONF).replace("/var/run/", "/run/")
        if found.original is None:
            return [
                f"{RESOLV_CONF} is a link to {target}, which is not there, so the host has no name server. The mesh's "
                "names will resolve, and no others. Next: start the program that keeps that file, or replace the link."
            ]
        if real.startswith(_NETWORK_MANAGER):
            words = (
                f"{RESOLV_CONF} is a link to {target}, which NetworkManager keeps. The link will be replaced by a file "
                "with the mesh's name server in front, which is gone at NetworkManager's next change: names of the "
                f"mesh no longer resolve then, until the next run. Next: {_UNMANAGED}, or use systemd-resolved."
            )
            return [] if _network_manager_leaves_it() else [words]
        if not real.startswith(_KEEPERS):
            return [
                f"{RESOLV_CONF} is a link to {target}, kept by a program that isthmus.mesh does not know. The link "
                "will be replaced by a file with the mesh's name server in front, which forwards to the servers in "
                f"{target}. Next: see after a while that the line is still there (`isthmus.mesh.verify`); when that "
                "program takes it out, let systemd-resolved answer for the host."
            ]
        return []
    comments = "\n".join(line for line in (found.original or "").splitlines() if line[:1] in ("#", ";"))
    writers = [(name, remedy) for pattern, name, remedy in _WRITERS if re.search(pattern, comments)]
    if not writers and _runs("dhclient"):
        remedy = "install resolvconf or systemd-resolved, or `supersede domain-name-servers` in dhclient.conf"
        writers = [("dhclient", remedy)]
    return [
        f"{RESOLV_CONF} is a file that {name} writes: at its next change the mesh's name server is gone from it and "
        f"names of the mesh no longer resolve, until the next run. Next: {remedy}."
        for name, remedy in writers[:1]
    ]


def _network_manager_leaves_it() -> bool:
    """Whether NetworkManager is told to leave resolv.conf alone; False when its configuration cannot be read."""
    settings = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        settings.read(path for pattern in _NETWORK_MANAGER_CONF for path in sorted(glob.glob(pattern)))
    except configparser.Error:
        return False
    return (
        settings.get("main", "rc-manager", fallback="") == "unmanaged"
        or settings.get("main", "dns", fallback="") == "none"
    )


def _immutable(path: str) -> bool:
    """chattr +i; False where the file system knows no such flag."""
    flags = bytearray(8)
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.ioctl(handle, _FS_IOC_GETFLAGS, flags)
        finally:
            os.close(handle)
    return bool(struct.unpack_from("=I", flags)[0] & _FS_IMMUTABLE)


def _runs(command: str) -> bool:
    return any(
        (_read(f"/proc/{pid}/comm") or "").strip() == command for pid in filter(str.isdigit, os.listdir("/proc"))
    )


def servers(content: str) -> list[str]:
    """The name servers of a resolv.conf, in order."""
    return [
        line.split()[1] for line in content.splitlines() if len(line.split()) > 1 and line.split()[0] == "nameserver"
    ]


def _nss_resolve() -> bool:
    """Whether programs ask systemd-resolved past resolv.conf (nss-resolve, nsswitch.conf(5))."""
    return "resolve" in (_nss_hosts() or [])


def _nss_hosts() -> list[str] | None:
    """The services that names of hosts are looked up in; None where nsswitch.conf does not say."""
    for line in (_read(NSSWITCH) or "").splitlines():
        database, _colon, services = line.partition("#")[0].partition(":")
        if database.strip() == "hosts":
            return services.split()
    return None


def _kept(path: str) -> str | None:
    """What a file that another program keeps gives to stand behind our lines."""
    content = _read(path)
    if content is None or os.path.realpath(path) != _UPLINKS:
        return content
    # resolved reads a resolv.conf that is not its own and writes the servers of it into this file: those of today
    # would stay there for ever. Its stub, which it does not read back, knows those of every day.
    settings = [line for line in content.splitlines() if line.split() and line[0] not in "#;"]
    others = [line for line in settings if line.split()[0] != "nameserver"]
    return "".join(f"{line}\n" for line in [*others, f"nameserver {_STUB}"])


def joined_file(original: str | None) -> str:
    """resolv.conf with the host's own dnsmasq in front; everything else as it was, but that it is asked first."""
    lines = [f"{MARK}\nnameserver {LOCAL_SERVER}\n"]
    for line in (original or "").splitlines(keepends=True):
        ordered = _without_rotate(line)
        lines.append(line if ordered is None else f"{ordered}{_ROTATED}{line}")
    return "".join(lines)


def _behind(content: str) -> str:
    """What stands behind our lines, with what `joined_file` left out of it."""
    ours = joined_file(None).splitlines()
    lines: list[str] = []
    for line in content.splitlines(keepends=True):
        if line.rstrip("\n") in ours:
            continue
        left_out = line[len(_ROTATED) :]
        if line.startswith(_ROTATED) and (ordered := _without_rotate(left_out)) is not None:
            if ordered and lines[-1:] != [ordered]:  # edited since, so that is what counts of the other options
                left_out = "options rotate\n"
            elif ordered:
                lines.pop()
            line = left_out
        lines.append(line)
    return "".join(lines)


def _without_rotate(line: str) -> str | None:
    """A line of options without `rotate`, by which the servers have their turns; None when it has none."""
    words = line.split()
    if words[:1] != ["options"] or "rotate" not in words:
        return None
    others = [word for word in words if word != "rotate"]
    return " ".join(others) + "\n" if len(others) > 1 else ""


def upstream(found: Found) -> str | None:
    """The file in which dnsmasq finds the servers for all other names; None: it is asked for the mesh's names only."""
    if found.method == "resolved":
        return None
    if found.link is not None:
        return _link_target(found.link)
    return ORIGINAL


def server(found: Found, mesh_address: str) -> str:
    """The address at which this host's dnsmasq answers."""
    return _listen_address(mesh_address, upstream(found))


def _listen_address(mesh_address: str, upstream_file: str | None) -> str:
    # Versions of systemd-resolved bind questions for a link's server to the link's device, unless the address is on a
    # device of the host: then no answer comes from 127.0.0.73.
    return mesh_address if upstream_file is None else LOCAL_SERVER


def dnsmasq_conf(mesh_address: str, domain: str, upstream_file: str | None) -> str:
    """dnsmasq as a name server for one domain: no cache of others' answers, no DHCP, nothing from /etc/hosts.

    `local=` makes it the authority: an unknown name is NXDOMAIN, a known one without AAAA answers with no data.
    """
    lines = [
        "# Written by isthmus.mesh; changes made here by hand are replaced by the next run of the playbook.",
        "port=53",
        f"listen-address={_listen_address(mesh_address, upstream_file)}",
        # The mesh address comes with the agent, after dnsmasq.
        "bind-dynamic" if upstream_file is None else "bind-interfaces",
        "no-hosts",
        f"addn-hosts={NAMES}",
        f"local=/{domain}/",
        "local-ttl=1",
        "cache-size=0",
        "pid-file=",
    ]
    # Programs that keep a resolv.conf may copy what they find in ours: dnsmasq must not ask itself.
    forward = [f"resolv-file={upstream_file}", "strict-order", "dns-loop-detect"]
    lines += ["no-resolv"] if upstream_file is None else forward
    return "\n".join(lines) + "\n"


def root_answers(port: int = 53) -> bool:
    """Whether the first server of resolv.conf says within 2 s what the root of all names has, or that it has nothing.

    That is the way of every name that is not the mesh's, asked without a name of which we would have to know that it
    is there; a server of a closed network may know no root (NXDOMAIN).
    """
    address = next(iter(servers(_read(RESOLV_CONF) or "")), "")
    number = os.urandom(2)
    # RFC 1035: recursion desired, one question, which is "." (no label), type NS, class IN.
    question = number + struct.pack("!5HBHH", 0x0100, 1, 0, 0, 0, 0, 2, 1)
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as asked:
            asked.settimeout(2)
            asked.connect((address, port))
            asked.send(question)
            answer = asked.recv(4096)
    except OSError:
        return False
    return len(answer) >= 12 and answer[:2] == number and answer[3] & 0x0F in (0, 3)


def problem(domain: str, root_answered: bool) -> str:
    """What the host's resolver does not do any more, in words; empty when nothing was found.

    ``root_answered``: it answered for other names before the change.
    """
    for line in (_read(NAMES) or "").splitlines():
        address, _blank, name = line.partition(" ")
        if not name.endswith("." + domain) or ":" in address:
            continue
        try:
            found = sorted({item[4][0] for item in socket.getaddrinfo(name, None, socket.AF_INET)})
        except OSError as exc:
            return f"the host's resolver does not know {name}, a name of the mesh ({exc.strerror or exc})"
        if address not in found:
            return f"the host's resolver says that {name} is {', '.join(map(str, found))}; in the mesh it is {address}"
        break
    if root_answered and not root_answers():
        return f"the first name server of {RESOLV_CONF} answers no more for names outside of the mesh, as it did before"
    return ""


def _link_target(link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(RESOLV_CONF), link))


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
