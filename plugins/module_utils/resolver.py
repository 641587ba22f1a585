# SPDX-License-Identifier: BSD-2-Clause
"""How the mesh's names join a host's own resolution, and how that is undone.

Two ways, found by probing, never by the distribution's name:

- `resolved`: systemd-resolved answers for the host. Only the mesh's domain is routed, by settings of `isthmus0`.
- `file`: `/etc/resolv.conf` names the servers. There is no routing by domain in that file, so the local dnsmasq goes
  in front and forwards every other name to the servers that were there. When the file is a symbolic link that another
  program keeps (NetworkManager, resolvconf), dnsmasq reads the link's target, so that program stays in charge.

dnsmasq cannot forward for one listener and not for another, so it has one: what forwards listens on a loopback address,
where no other host can ask it; what must be on the mesh address, for systemd-resolved, forwards nothing.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

RESOLV_CONF = "/etc/resolv.conf"
NSSWITCH = "/etc/nsswitch.conf"
STATE_DIRECTORY = "/var/lib/isthmus/resolver"
ORIGINAL = STATE_DIRECTORY + "/original"
ORIGINAL_LINK = STATE_DIRECTORY + "/original-link"
NAMES = "/run/isthmus/dns/hosts"
MARK = "# isthmus.mesh: the first name server is the host's own dnsmasq (isthmus-dns.service)."

# A loopback address of its own: refused at once when dnsmasq is down (so the next server is asked without a timeout),
# there before the overlay device is, and in nobody else's way on port 53.
LOCAL_SERVER = "127.0.0.73"

# systemd-resolved's own address on the host, and its files: with the stubs programs ask resolved. With the file of
# uplinks they ask the network's servers themselves, so that settings of resolved would not be seen.
_STUB = "127.0.0.53"
_STUB_FILES = ("/run/systemd/resolve/stub-resolv.conf", "/usr/lib/systemd/resolv.conf")
_UPLINKS = "/run/systemd/resolve/resolv.conf"


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


def servers(content: str) -> list[str]:
    """The name servers of a resolv.conf, in order."""
    return [
        line.split()[1] for line in content.splitlines() if len(line.split()) > 1 and line.split()[0] == "nameserver"
    ]


def _nss_resolve() -> bool:
    """Whether programs ask systemd-resolved past resolv.conf (nss-resolve, nsswitch.conf(5))."""
    for line in (_read(NSSWITCH) or "").splitlines():
        database, _colon, services = line.partition("#")[0].partition(":")
        if database.strip() == "hosts":
            return "resolve" in services.split()
    return False


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
    """resolv.conf with the host's own dnsmasq in front; everything else as it was."""
    return f"{MARK}\nnameserver {LOCAL_SERVER}\n" + (original or "")


def _behind(content: str) -> str:
    ours = joined_file(None)
    if content.startswith(ours):
        return content[len(ours) :]
    # Somebody put lines before ours.
    return "".join(line for line in content.splitlines(keepends=True) if line.rstrip("\n") not in ours.splitlines())


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
    except FileNotFoundError:
        return None
