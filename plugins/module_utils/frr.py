# SPDX-License-Identifier: BSD-2-Clause
"""FRR on a host, as Debian packages it: its files, what runs, and how that is changed without a session being lost."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import packages, ports, units
from ansible_collections.isthmus.mesh.plugins.module_utils.files import atomic_write, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import bgp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

PACKAGES = ("frr", "frr-pythontools")
"""The second has frr-reload.py."""
UNIT = "frr.service"
DIRECTORY = "/etc/frr"
CONF = f"{DIRECTORY}/frr.conf"
DAEMONS = f"{DIRECTORY}/daemons"
RUNNING = "/run/frr"
PROGRAMS = "/usr/lib/frr"
RELOAD = f"{PROGRAMS}/frr-reload.py"
VTYSH = "/usr/bin/vtysh"
SAVED = "/var/lib/isthmus/frr.json"
"""How FRR was before us: `came_with_us`, `conf`, `daemons` (by name yes or no), `enabled`, `active`."""
OURS = ("bgpd", "bfdd")
PACKAGED_CONF = "# default to using syslog. /etc/rsyslog.d/45-frr.conf places the log in\n# /var/log/frr/frr.log\n"
PACKAGED_CONF += "log syslog informational\n"
_OTHERS = ("zebra", "bgpd", "staticd", "ospfd", "ospf6d", "ripd", "ripngd", "isisd", "pimd", "bfdd")

# What FRR shows of its own accord, or of the kernel: frr-reload.py would undo what is not in the file, and turn on
# forwarding on a host that does not forward. In the file itself, "no ip forwarding" would turn it off at a restart
# where something else needs it since.
_STATE = ("frr version ", "hostname ", "no ip forwarding", "no ipv6 forwarding", "service integrated-vtysh-config")

PAUSE = 0.5  # seconds from one look at the sessions to the next
WITHDRAWN_SECONDS = 10  # at most, until a range that is taken back is sent to nobody any more
NETSTAT = "/proc/net/netstat"


def text_of(path: str) -> str | None:
    found = read_bytes(path)
    return None if found is None else found.decode(errors="replace")


def missing(module: AnsibleModule) -> list[str]:
    """Packages that are to be installed."""
    return [name for name, path in zip(PACKAGES, (f"{PROGRAMS}/bgpd", RELOAD)) if not os.path.exists(path)]


def ours() -> bool:
    """Whether the FRR of this host is configured by us."""
    return bgp.is_ours(text_of(CONF) or "")


def passwords(module: AnsibleModule) -> dict[str, str]:
    """By address of a router, the module's `passwords`."""
    return {str(address): str(password) for address, password in module.params["passwords"].items()}


def problems(module: AnsibleModule, own: Mapping[str, Any]) -> list[str]:
    """Why FRR of this host cannot be made what the plan says; nothing is changed. `own` is the plan's."""
    found = [f"isthmus_bgp_passwords: {words}. Correct it." for words in bgp.bad_passwords(own, passwords(module))]
    if missing(module) and packages.manager(module) != "apt-get":
        found.append(
            f"FRR is not there ({PROGRAMS}), and is installed from Debian's and Ubuntu's packages only. Install it "
            "there by hand, or use static routes on the routers instead of bgp."
        )
    if not ours():
        lines = bgp.foreign_lines(text_of(CONF) or "")
        files = [f"{DIRECTORY}/{name}.conf" for name in _OTHERS]
        files = [path for path in files if bgp.foreign_lines(text_of(path) or "")]
        if lines or files:
            what = f"{CONF} has {lines[0]!r}" if lines else f"there is {files[0]}"
            found.append(
                f"FRR on this host is somebody else's: {what}. It is left as it is. Either announce the host's range "
                "there yourself (`bgp` of the plan has what is needed) and take `bgp` of the host's site out of the "
                "inventory, or take that configuration away."
            )
        for sock in ports.bound("tcp", bgp.PORT):
            process, unit = ports.holder(sock)
            if not process.startswith("bgpd "):
                found.append(
                    f"TCP port {bgp.PORT}, BGP's, is used by {process}{' of ' + unit if unit else ''}: another BGP "
                    "speaker. Two cannot share it: stop that one, or announce the host's range with it."
                )
                break
    for router in own["routers"]:
        if router["as_number"] == own["as_number"]:
            continue  # iBGP may go over several hops
        code, out, err = module.run_command(["ip", "-json", "-4", "route", "get", router["address"]])
        way = json.loads(out)[0] if code == 0 and out.strip() else {}
        if code != 0 or "gateway" in way:
            how = f"the way there is over {way['gateway']}" if way else (err.strip() or "there is no way there")
            found.append(
                f"The router {router['address']} is not on a subnet of this host: {how}. Sessions between two AS are "
                "with neighbours. Name the router of the host's own subnet, for this host in isthmus_bgp.routers."
            )
    return found


# Files


def daemons_text(text: str, wanted: Mapping[str, str]) -> str:
    """/etc/frr/daemons with some daemons `yes` or `no`; everything else is the operator's."""
    for name, word in wanted.items():
        text, count = re.subn(rf"^{name}=.*$", f"{name}={word}", text, flags=re.MULTILINE)
        if not count:
            text += f"{name}={word}\n"
    return text


def enabled_daemons(text: str) -> dict[str, str]:
    """What /etc/frr/daemons says of ours."""
    found = dict.fromkeys(OURS, "no")
    found.update(re.findall(rf"^({'|'.join(OURS)})=(\S*)$", text, re.MULTILINE))
    return found


def masked(conf: str | None) -> str:
    """Without passwords, for the diff."""
    return re.sub(r"( password ).*", r"\1(secret)", conf or "")


def shown(before: str | None, after: str) -> tuple[str, str]:
    """Both sides of the diff."""
    one, other = masked(before), masked(after)
    return one, other if one != other or before == after else other.replace("(secret)", "(another secret)")


def save(state: Mapping[str, Any]) -> None:
    """Keep how FRR was before us, once."""
    os.makedirs(os.path.dirname(SAVED), exist_ok=True)
    if not os.path.exists(SAVED):
        atomic_write(SAVED, json.dumps(state).encode(), 0o600, 0, 0)


def saved() -> dict[str, Any]:
    found = text_of(SAVED)
    if found is None:
        # Of a host whose /var/lib/isthmus was lost.
        return {"came_with_us": True, "conf": PACKAGED_CONF, "daemons": dict.fromkeys(OURS, "no")}
    state: dict[str, Any] = json.loads(found)
    return state


# What runs


def alive(names: Iterable[str]) -> bool:
    """Whether these daemons run."""
    for name in names:
        pid = (text_of(f"{RUNNING}/{name}.pid") or "").strip()
        if not pid or not os.path.exists(f"/proc/{pid}"):
            return False
    return True


def ask(module: AnsibleModule, command: str) -> Any:
    """A `show ... json` of bgpd; None when it does not answer."""
    code, out, _err = module.run_command([VTYSH, "-d", "bgpd", "-c", command])
    try:
        return json.loads(out) if code == 0 else None
    except ValueError:
        return None


def neighbours(module: AnsibleModule) -> dict[str, Any] | None:
    """By address, as FRR shows them; None when bgpd does not answer."""
    found = ask(module, "show bgp neighbors json")
    return found if isinstance(found, dict) else None


def routes(module: AnsibleModule, router: str, kind: str) -> list[str]:
    """Ranges that a router sent and we took (`routes`), or that we send it (`advertised-routes`)."""
    found = ask(module, f"show bgp ipv4 unicast neighbors {router} {kind} json") or {}
    return sorted(found.get("advertisedRoutes" if kind.startswith("advertised") else "routes") or ())


def signatures() -> dict[str, int]:
    """The kernel's counters of TCP MD5 signatures, of all connections of the host."""
    lines = (text_of(NETSTAT) or "").splitlines()
    for names, values in zip(lines[::2], lines[1::2]):
        if names.startswith("TcpExt:"):
            found = dict(zip(names.split(), values.split()))
            return {name: int(value) for name, value in found.items() if name.startswith("TCPMD5")}
    return {}


def await_sessions(module: AnsibleModule, own: Mapping[str, Any], seconds: float) -> dict[str, str]:
    """By router, why the session is not established, when it is not so within some time."""
    end, before = time.monotonic() + seconds, signatures()
    while True:
        found = neighbours(module)
        now = signatures()
        rose = {name: now[name] - before.get(name, 0) for name in now}
        told = {
            router["address"]: "bgpd does not answer"
            if found is None
            else bgp.why_not(router, own, found.get(router["address"]), rose)
            for router in own["routers"]
        }
        lacking = {address: words for address, words in told.items() if words}
        if not lacking or time.monotonic() >= end:
            return lacking
        time.sleep(PAUSE)


# Changes


def refused(module: AnsibleModule, conf: str) -> str:
    """What FRR says of a configuration that it cannot read, without passwords; empty when it can."""
    with tempfile.TemporaryDirectory(prefix="isthmus-frr-") as directory:
        path = os.path.join(directory, "frr.conf")
        _private(path, conf)
        code, out, err = module.run_command([VTYSH, "-C", "-f", path])
    return masked((out + err).strip()) if code != 0 else ""


def reload(module: AnsibleModule, conf: str) -> str:
    """Make what runs like `conf` by the differences only, so that sessions stay; FRR's words when it cannot.

    From a file beside, so that /etc/frr/frr.conf is written only when the sessions are there again."""
    code, out, err = module.run_command([VTYSH, "-c", "show running-config"])
    if code != 0:
        return (err or out).strip()
    state = [line for line in out.splitlines() if line.startswith(_STATE)]
    with tempfile.TemporaryDirectory(prefix="isthmus-frr-") as directory:
        path = os.path.join(directory, "frr.conf")
        _private(path, conf + "\n".join(state) + "\n")
        # Not into its log, which would have the passwords, as its file of lines to add in /run/frr has.
        words = [RELOAD, "--reload", "--stdout", "--confdir", directory, path]
        code, out, err = module.run_command(words, umask=0o077)
    if code != 0:
        return masked((out + err).strip()[-1500:])
    # A changed prefix list does not count for what was received or sent before.
    for way in ("in", "out"):
        module.run_command([VTYSH, "-c", f"clear bgp ipv4 unicast * soft {way}"])
    return ""


def _private(path: str, content: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(content)


def restart(module: AnsibleModule) -> None:
    """FRR stops and starts, or starts."""
    # Its unit may start three times within three minutes, and would stay off then.
    module.run_command(["systemctl", "reset-failed", UNIT])
    units.Systemd(module).run("restart", UNIT)


def withdraw(module: AnsibleModule) -> None:
    """Take the host's range back and end the sessions. Of FRR that only stops routers keep the range for two minutes
    more, as of one that restarts, and some so of one that says that it ends its session."""
    conf = text_of(CONF) or ""
    number = re.search(r"^router bgp (\d+)$", conf, re.MULTILINE)
    if number is None:
        return
    speaker = f"router bgp {number.group(1)}"
    ranges = [f"no network {network}" for network in re.findall(r"^ +network (\S+)$", conf, re.MULTILINE)]
    configure(module, speaker, "address-family ipv4 unicast", *ranges)
    end = time.monotonic() + WITHDRAWN_SECONDS
    while any(routes(module, router, "advertised-routes") for router in neighbours(module) or ()):
        if time.monotonic() >= end:
            break  # of a router that does not take it
        time.sleep(PAUSE)
    configure(module, f"no {speaker}")


def configure(module: AnsibleModule, *lines: str) -> None:
    module.run_command([VTYSH, *(word for line in ("configure terminal", *lines) for word in ("-c", line))])


def absent(module: AnsibleModule, changes: Changes) -> list[str]:
    """FRR is as it was before us; what was changed, in words."""
    if not ours():
        if os.path.exists(SAVED) and not module.check_mode:
            os.unlink(SAVED)
        return []
    before = saved()
    found = ["FRR's configuration of the mesh"]
    if not module.check_mode:
        withdraw(module)
    conf = before["conf"] if before["conf"] is not None else PACKAGED_CONF
    changes.file(CONF, conf, mode=0o640, owner="frr", shown=shown(text_of(CONF), conf))
    changes.file(DAEMONS, daemons_text(text_of(DAEMONS) or "", before["daemons"]), mode=0o640, owner="frr")
    systemd = units.Systemd(module)
    if before["came_with_us"]:
        found.append(f"unit {UNIT}")
        changes.note(f"unit {UNIT}", "enabled, active", "disabled, inactive")
        if not module.check_mode:
            systemd.run("disable", "--now", "--quiet", UNIT)
    elif not module.check_mode:
        if not before["enabled"]:
            systemd.run("disable", "--quiet", UNIT)
        if before["active"]:
            restart(module)
        else:
            systemd.run("stop", UNIT)
    if os.path.exists(SAVED) and not module.check_mode:
        os.unlink(SAVED)
    return found
