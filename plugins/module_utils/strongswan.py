# SPDX-License-Identifier: BSD-2-Clause
"""strongSwan on a gateway: where its files are, what it says of its tunnels, and why one is not there."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ansible.module_utils.basic import AnsibleModule

UNIT = "strongswan.service"
SWANCTL = "/usr/sbin/swanctl"
SETTINGS = "/etc/strongswan.d/zz-isthmus.conf"
"""Read after the packages' own files: the last value of a setting counts."""
DIRECTORY = "/etc/swanctl"
CONNECTIONS = f"{DIRECTORY}/conf.d/isthmus.conf"
SECRETS = f"{DIRECTORY}/conf.d/isthmus-secrets.conf"
TRIAL = "isthmus-trial-"
"""Begins the names of files in `DIRECTORY` that a trial of keys has for a moment."""
SYSCTL = "/etc/sysctl.d/60-isthmus-ipsec.conf"
GUARD = "/etc/isthmus/ipsec.nft"
GUARD_OF_KERNEL = "/etc/isthmus/ipsec-kernel.nft"
"""Added to them where the kernel does ESP."""
GUARD_UNIT = "isthmus-ipsec.service"
KEPT = "/etc/isthmus/ipsec-kept.nft"
"""All of them once more, for the table that a process keeps."""
KEEPER = "/etc/isthmus/ipsec-keeper"
"""The program of `ipsec.keeper_program`."""
KEEPER_UNIT = "isthmus-ipsec-keeper.service"
OPERATORS = "/etc/nftables.conf"
"""What nftables.service of the distributions loads."""
INTERFACES = "/etc/isthmus/ipsec-interfaces"
"""The script of `ipsec.interfaces_script`, where the kernel does ESP."""
BEGIN = "/etc/isthmus/ipsec-begin"
"""The script of `ipsec.begin_script`."""
DROP_IN = f"/etc/systemd/system/{UNIT}.d/isthmus.conf"
ROUTES_UNIT = "isthmus-ipsec-routes.service"
BEFORE = "/var/lib/isthmus/ipsec-before.json"
"""Settings of the kernel as they were before this host was a gateway."""
UNPROVEN = "/run/isthmus-ipsec-unproven"
"""Names of the tunnels that were there when a certificate, or an authority that is trusted, became another one, until
the gateways have been seen to take each other by these. Gone after a boot, as the tunnels are."""
UNREAD = "/run/isthmus-ipsec-unread"
"""There from before strongSwan's files, or what it has beside them, become others until it has read them: a run that
was killed meanwhile leaves it to the next one. Has what `gateways.told` said before. After a boot all is read."""
TUN = "/dev/net/tun"

_PACKAGES = {
    SWANCTL: "strongswan-swanctl",
    "/usr/sbin/charon-systemd": "charon-systemd",
    "/usr/lib/ipsec/plugins/libstrongswan-kernel-libipsec.so": "libcharon-extra-plugins",
    "/usr/lib/ipsec/plugins/libstrongswan-openssl.so": "libstrongswan-standard-plugins",
}
NFT = "/usr/sbin/nft"
_GUARD_PACKAGES = {NFT: "nftables"}

_REASONS = (
    (r"NO_PROPOSAL_CHOSEN|NO_PROP\b|no acceptable proposal|no proposal chosen", "the two sides agree on no proposal"),
    (
        r"AUTHENTICATION_FAILED|AUTH_FAILED|MAC mismatched|no trusted .* public key found|constraint .* failed|"
        r"no shared key found|no matching peer config",
        "authentication failed: the pre-shared keys differ, or one side does not know the other's authority or name",
    ),
    (r"TS_UNACCEPTABLE|TS_UNACCEPT|no acceptable traffic selectors", "the two sides name other networks"),
    (
        r"giving up after \d+ retransmits|establishing IKE_SA failed, peer not responding|retransmit \d+ of request",
        "the other gateway does not answer",
    ),
)


_TRY = """\
ip link add isthmus-try type xfrm dev lo if_id 1 &&
ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x1000 mode tunnel if_id 1 output-mark 1 \
    encap espinudp 4500 4500 0.0.0.0 aead 'rfc4106(gcm(aes))' 0x{key} 128 &&
ip xfrm policy add src 192.0.2.0/24 dst 198.51.100.0/24 dir out if_id 1 tmpl proto esp mode tunnel
"""


def kernel_does_esp(module: AnsibleModule) -> bool:
    """By trying all that the tunnels need, in a network namespace that is gone afterwards."""
    words = _TRY.format(key="00" * 36)  # of AES-256, with its salt
    code, _out, _err = module.run_command(["unshare", "--net", "sh", "-c", words])
    return bool(code == 0)


def packages(gateway: bool) -> list[str]:
    """Debian's names of what is missing on this host."""
    wanted = {**(_PACKAGES if gateway else {}), **_GUARD_PACKAGES}
    return [name for path, name in wanted.items() if not os.path.exists(path)]


def established(text: str) -> dict[str, set[str]]:
    """Of the answer to `swanctl --list-sas`: by connection the names of its children that are installed."""
    found: dict[str, set[str]] = {}
    here = None
    for line in text.splitlines():
        sa = re.match(r"(\S+): #\d+, ([A-Z]+)", line)
        child = re.match(r"\s+(\S+): #\d+, reqid \d+, ([A-Z]+)", line)
        if sa:
            here = found.setdefault(sa[1], set()) if sa[2] == "ESTABLISHED" else None
        elif child and here is not None and child[2] in ("INSTALLED", "REKEYING", "REKEYED"):
            here.add(child[1])
    return found


def _with_child(text: str, name: str) -> list[str]:
    """What is said of each of a connection's IKE SAs that are established and have a child. Those without one are the
    other gateway's trials (`ipsec.trial_conf`)."""
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return [
        one
        for one in blocks
        if re.match(rf"{re.escape(name)}: #\d+, ESTABLISHED", one)
        and re.search(r"^  \S+: #\d+, reqid", one, re.MULTILINE)
    ]


def numbers(text: str, name: str) -> list[str]:
    """Of the answer to `swanctl --list-sas`: those of a connection's IKE SAs that are established and have a child."""
    return [one.partition("#")[2].partition(",")[0] for one in _with_child(text, name)]


def age(text: str, name: str) -> int | None:
    """Of the answer to `swanctl --list-sas`: for how many seconds the youngest IKE SA of a connection is established,
    or has its newest key, None where there is none."""
    told = [re.search(r"^  established (\d+)s ago", one, re.MULTILINE) for one in _with_child(text, name)]
    return min((int(found[1]) for found in told if found), default=None)


def connecting(text: str, name: str) -> list[str]:
    """Of the answer to `swanctl --list-sas`: numbers of a connection's IKE SAs that are not established yet."""
    return re.findall(rf"^{re.escape(name)}: #(\d+), CONNECTING", text, re.MULTILINE)


def loaded(text: str) -> set[str]:
    """Of the answer to `swanctl --list-conns`: names of the connections."""
    return {line.partition(":")[0] for line in text.splitlines() if re.match(r"\S+: IKEv", line)}


def why(journal: str) -> str:
    """What strongSwan said last of a tunnel that is not there, in words; "" when it said nothing that is known."""
    return _known(journal)[0]


def quoted(journal: str) -> str:
    """`why`, and strongSwan's own words of it, without its thread's number and their group."""
    words, line = _known(journal)
    said = re.sub(r"^\d*\[[A-Z]+\] ", "", line)
    return f"{words} (strongSwan: {said})" if words else ""


def _known(journal: str) -> tuple[str, str]:
    for line in reversed(journal.splitlines()):
        for pattern, words in _REASONS:
            if re.search(pattern, line):
                return words, line
    return "", ""


def last_words(module: AnsibleModule, name: str, told: Callable[[str], str] = why) -> str:
    """`why` of a connection, or what `told` has of the journal."""
    for only in ([f"IKE_SA_NAME={name}"], []):
        code, out, _err = module.run_command(["journalctl", "-u", UNIT, "-n", "200", "--no-pager", "-o", "cat", *only])
        if code == 0 and told(out):
            return told(out)
    return ""


def guard_in_kernel(module: AnsibleModule, table: str = ipsec.GUARD) -> list[str]:
    """Rules of the mesh's table that closes other ways than the gateways', in order, or of its other one
    (`ipsec.KEPT`)."""
    if not os.path.exists(NFT):
        return []
    code, out, _err = module.run_command([NFT, "-s", "-n", "list", "table", "ip", table])
    return guard_rules(out) if code == 0 else []


def guard_wanted(text: str) -> list[str]:
    """Rules of the table on this host, by the text of `ipsec.guard`."""
    return ([ipsec.ENCRYPTED] if os.path.exists(GUARD_OF_KERNEL) else []) + guard_rules(text)


def guard_rules(text: str) -> list[str]:
    """Lines of a table that accept or drop, as nft prints them."""
    told = []
    for line in text.splitlines():
        words = line.strip()
        if words.endswith((" accept", " drop")):
            # Of one address nft makes no set. And that a packet is to be encrypted is a number to it, listed by -n.
            told.append(re.sub(r"\{ ([^ ,]+) \}", r"\1", words).replace("rt ipsec 1 ", "rt ipsec exists "))
    return told


def missing(module: AnsibleModule, connections: Iterable[Mapping[str, object]]) -> dict[str, str]:
    """By name of the connection (`ipsec.name_of`), why its tunnel is not there."""
    code, out, err = (
        module.run_command([SWANCTL, "--list-sas"]) if os.path.exists(SWANCTL) else (1, "", f"no {SWANCTL}")
    )
    if code != 0:
        words = (err or out).strip().splitlines()
        reason = f"strongSwan does not answer ({words[-1] if words else code}): `systemctl status {UNIT}`"
        return {ipsec.name_of(one): reason for one in connections}
    there = established(out)
    found = {}
    for one in connections:
        name = ipsec.name_of(one)
        if "net" not in there.get(name, ()):
            found[name] = last_words(module, name) or "strongSwan has not said why"
    return found
