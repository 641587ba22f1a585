# SPDX-License-Identifier: BSD-2-Clause
"""How the mesh's names join a host's own resolution, and how that is undone.

Two ways, found by probing, never by the distribution's name:

- `resolved`: systemd-resolved answers for the host. Only the mesh's domain is routed, by settings of `isthmus0`.
- `file`: `/etc/resolv.conf` names the servers. There is no routing by domain in that file, so the local dnsmasq goes
  in front and forwards every other name to the servers that were there. When the file is a symbolic link that another
  program keeps (NetworkManager, resolvconf), dnsmasq reads the link's target, so that program stays in charge.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

RESOLV_CONF = "/etc/resolv.conf"
STATE_DIRECTORY = "/var/lib/isthmus/resolver"
ORIGINAL = STATE_DIRECTORY + "/original"
ORIGINAL_LINK = STATE_DIRECTORY + "/original-link"
MARK = "# isthmus.mesh: the first name server is the host's own dnsmasq (isthmus-dns.service)."

# A loopback address of its own: refused at once when dnsmasq is down (so the next server is asked without a timeout),
# there before the overlay device is, and in nobody else's way on port 53.
LOCAL_SERVER = "127.0.0.73"

_RESOLVED_FILES = (
    "/run/systemd/resolve/stub-resolv.conf",
    "/run/systemd/resolve/resolv.conf",
    "/usr/lib/systemd/resolv.conf",
)


@dataclass(frozen=True)
class Found:
    """What a host has: `method` is `resolved` or `file`; `link` the target when resolv.conf is (or was) a link."""

    method: str
    link: str | None
    original: str | None  # content of the operator's own file, None: there was none
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
        original = _read(_link_target(was_link)) if was_link else _behind(content or "") or _read(ORIGINAL)
        return Found("file", was_link, original, True)
    target = os.path.realpath(RESOLV_CONF) if link else RESOLV_CONF
    if resolved_active and (target in _RESOLVED_FILES or "127.0.0.53" in servers(content or "")):
        return Found("resolved", link, content, False)
    return Found("file", link, content, False)


def servers(content: str) -> list[str]:
    """The name servers of a resolv.conf, in order."""
    return [
        line.split()[1] for line in content.splitlines() if len(line.split()) > 1 and line.split()[0] == "nameserver"
    ]


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


def dnsmasq_conf(mesh_address: str, domain: str, upstream_file: str | None) -> str:
    """dnsmasq as a name server for one domain: no cache of others' answers, no DHCP, nothing from /etc/hosts.

    `local=` makes it the authority: an unknown name is NXDOMAIN, a known one without AAAA answers with no data.
    """
    lines = [
        "# Written by isthmus.mesh; changes made here by hand are replaced by the next run of the playbook.",
        "port=53",
        f"listen-address={mesh_address},{LOCAL_SERVER}",
        "bind-dynamic",
        "no-hosts",
        "addn-hosts=/run/isthmus/dns/hosts",
        f"local=/{domain}/",
        "local-ttl=1",
        "cache-size=0",
        "pid-file=",
    ]
    lines += ["no-resolv"] if upstream_file is None else [f"resolv-file={upstream_file}", "strict-order"]
    return "\n".join(lines) + "\n"


def _link_target(link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(RESOLV_CONF), link))


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
