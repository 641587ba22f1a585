# SPDX-License-Identifier: BSD-2-Clause
"""systemd units of a host: their text, and the step from "files are right" to "the right thing runs"."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.spec import WIREGUARD_DEVICES, WIREGUARD_UNITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ansible.module_utils.basic import AnsibleModule
    from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

UNIT_DIRECTORY = "/etc/systemd/system"
CONFIG_VARIABLE = "ISTHMUS_CONFIG"
WIREGUARD = dict(zip(WIREGUARD_UNITS, WIREGUARD_DEVICES))
"""Units of wireguard-go, with the device that each makes."""
BOOT_ROUTES = "/etc/isthmus/boot-routes"
BOOT_ROUTES_UNIT = "isthmus-boot-routes.service"
NETWORKD = "systemd-networkd.service"
NETWORKD_DROP_IN = "/etc/systemd/networkd.conf.d/isthmus.conf"
ROUTE_PROTOCOL = "73"
"""Of all our routes and rules (rtnetlink(7))."""
_MAIN_TABLE = "254"

# What every unit of ours gives up. Capabilities, paths and address families are named unit by unit.
_SANDBOX = """\
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateDevices=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
UMask=0022
LimitCORE=0
"""

_HEADER = "# Written by isthmus.mesh; changes made here by hand are replaced by the next run of the playbook.\n"


def config_digest(*parts: str) -> str:
    """What a process was started with, short enough for an environment variable: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _daemon(program: str, config: str) -> str:
    """How agent and registrar are run: they say when they are ready and that they live, and are started again for ever,
    except after the status for a configuration that cannot be used.
    """
    return f"""\
Type=notify
NotifyAccess=main
ExecStart=/opt/isthmus/current/bin/{program} --config /etc/isthmus/node.json
Environment={CONFIG_VARIABLE}={config} PYTHONUNBUFFERED=1
Restart=always
RestartSec=1
RestartPreventExitStatus=78
TimeoutStartSec=90
TimeoutStopSec=15
WatchdogSec=30
KillMode=mixed
"""


def agent_unit(config: str, pods: bool = False) -> str:
    """`isthmusd.service`. CAP_BPF and CAP_PERFMON load programs, CAP_NET_ADMIN attaches them and sets up the device,
    routes and rules and ends sockets, CAP_NET_RAW probes.

    The agent leaves its pinned programs, device and routes when it stops: the datapath goes on without it. Its exec
    health checks run inside the same walls, without root's way to the host over /proc/sys; they see all processes (no
    ProtectProc), because looking for one is what such a check may do. ProtectKernelTunables would take the pinned maps
    below /sys away as well, so its paths are named.

    `pods`: the host is a Kubernetes node, whose agent ends sockets in its pods' network namespaces as well. Entering
    one takes CAP_SYS_ADMIN; of namespaces the unit may enter and make those of the network only.
    """
    sandbox = _SANDBOX.replace("RestrictNamespaces=yes", "RestrictNamespaces=net") if pods else _SANDBOX
    return (
        _HEADER
        + f"""\
[Unit]
Description=Isthmus mesh agent
Documentation=https://github.com/isthmus-mesh/isthmus
Wants=network-online.target isthmus-bpffs.service
After=network-online.target isthmus-bpffs.service isthmus-etcd.service
StartLimitIntervalSec=0

[Service]
{_daemon("isthmusd", config)}RuntimeDirectory=isthmus isthmus/dns
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
StateDirectory=isthmus isthmus/agent
StateDirectoryMode=0755
CapabilityBoundingSet=CAP_BPF CAP_PERFMON CAP_NET_ADMIN CAP_NET_RAW{" CAP_SYS_ADMIN" if pods else ""}
{sandbox}ReadWritePaths=/sys/fs/bpf
ReadOnlyPaths=-/proc/sys -/proc/sysrq-trigger -/sys/kernel -/sys/module
ReadOnlyPaths=-/var/lib/isthmus/generations
SystemCallFilter=@system-service bpf
SystemCallErrorNumber=EPERM
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
LimitNOFILE=65536
OOMScoreAdjust=-500
TasksMax=512

[Install]
WantedBy=multi-user.target
"""
    )


def registrar_unit(config: str) -> str:
    """`isthmus-registrar.service`: talks to etcd servers only, so it has no capability at all."""
    return (
        _HEADER
        + f"""\
[Unit]
Description=Isthmus mesh registrar
Documentation=https://github.com/isthmus-mesh/isthmus
Wants=network-online.target
After=network-online.target isthmus-etcd.service
StartLimitIntervalSec=0

[Service]
{_daemon("isthmus-registrar", config)}StateDirectory=isthmus isthmus/registrar
StateDirectoryMode=0755
ReadOnlyPaths=-/var/lib/isthmus/generations
CapabilityBoundingSet=
ProtectProc=invisible
ProtectKernelTunables=yes
{_SANDBOX}SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LimitNOFILE=65536
TasksMax=512

[Install]
WantedBy=multi-user.target
"""
    )


def dns_unit(config: str) -> str:
    """`isthmus-dns.service`: dnsmasq as a user of its own that may only bind port 53."""
    return (
        _HEADER
        + f"""\
[Unit]
Description=Isthmus mesh names (dnsmasq)
Documentation=https://github.com/isthmus-mesh/isthmus
After=network.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=/usr/sbin/dnsmasq --keep-in-foreground --conf-file=/etc/isthmus/dnsmasq.conf
ExecReload=/bin/kill -HUP $MAINPID
Environment={CONFIG_VARIABLE}={config}
Restart=always
RestartSec=1
DynamicUser=yes
User=isthmus-dns
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
ProtectProc=invisible
ProtectKernelTunables=yes
{_SANDBOX}SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK

[Install]
WantedBy=multi-user.target
"""
    )


def dns_reload_path_unit() -> str:
    """`isthmus-dns-reload.path`: the agent marks a change of the hosts file and needs no right over the name server.

    systemd looks whether a path exists again when the service has ended, but not whether one changed meanwhile.
    """
    return (
        _HEADER
        + """\
[Unit]
Description=Names of the Isthmus mesh changed

[Path]
PathExists=/run/isthmus/dns/changed
Unit=isthmus-dns-reload.service
TriggerLimitIntervalSec=0

[Install]
WantedBy=multi-user.target
"""
    )


def dns_reload_unit() -> str:
    """`isthmus-dns-reload.service`: makes dnsmasq read its hosts file again. The mark goes first: one that is set from
    then on starts the service anew."""
    return (
        _HEADER
        + """\
[Unit]
Description=Reload the names of the Isthmus mesh
StartLimitIntervalSec=0

[Service]
Type=oneshot
ExecStart=/bin/rm -f /run/isthmus/dns/changed
ExecStart=/bin/systemctl --no-block reload isthmus-dns.service
"""
    )


def wireguard_unit(config: str, device: str) -> str:
    """A unit of `WIREGUARD`: WireGuard where the kernel has none. The agent gives its device key and peers, so
    this process is started with nothing; what is to be encrypted is dropped while it is away.

    Its control socket lies where `wg` looks for it, beside those of other devices.
    """
    return (
        _HEADER
        + f"""\
[Unit]
Description=Isthmus mesh WireGuard in user space, {device}
Documentation=https://github.com/isthmus-mesh/isthmus
Wants=network-online.target
After=network-online.target
Before=isthmusd.service
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=/usr/bin/wireguard-go -f {device}
Environment={CONFIG_VARIABLE}={config}
Restart=always
RestartSec=200ms
RuntimeDirectory=wireguard
RuntimeDirectoryPreserve=yes
CapabilityBoundingSet=CAP_NET_ADMIN
ProtectProc=invisible
ProtectKernelTunables=yes
{_SANDBOX}PrivateDevices=no
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
MemoryDenyWriteExecute=yes
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""
    )


def keeper_unit(program: str, rules: str, first: str) -> str:
    """`isthmus-ipsec-keeper.service`: has a table of netfilter's rules, as the unit `first` has the same ones in
    another table. It does not hang on nftables.service, which takes away all tables but this one when it is stopped."""
    return (
        _HEADER
        + f"""\
[Unit]
Description=Isthmus mesh: nothing between sites beside the gateways, whoever flushes rules
Documentation=https://github.com/isthmus-mesh/isthmus
After={first}
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={program} {rules}
Restart=always
RestartSec=1
CapabilityBoundingSet=CAP_NET_ADMIN
ProtectProc=invisible
ProtectKernelTunables=yes
{_SANDBOX}SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
RestrictAddressFamilies=AF_UNIX AF_NETLINK
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""
    )


def bpffs_unit() -> str:
    """`isthmus-bpffs.service`: systemd mounts bpffs itself on a host, but not in a container.

    It cannot be a mount unit: systemd refuses those for places below /sys. `isthmusd.service` wants it.
    """
    return (
        _HEADER
        + """\
[Unit]
Description=BPF file system for the Isthmus agent
DefaultDependencies=no
After=systemd-remount-fs.service
Before=isthmusd.service
ConditionPathIsMountPoint=!/sys/fs/bpf

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/mount -t bpf -o mode=0700 bpf /sys/fs/bpf
"""
    )


def boot_routes(spec: Mapping[str, Any]) -> str:
    """`BOOT_ROUTES`, which `ip -batch` reads: the ranges of a host's specification that are unreachable where nothing
    longer matches, each as the agent has it (`desired.addressing.routes`). The agent finds them as its own.

    It leads some of them over the overlay instead, of clusters whose CNI has pools of its own; what these are it knows
    from etcd, and before it runs there is no overlay. Its own cluster's pods are in none, where they are the CNI's.
    """
    ranges = sorted({*spec["service_ranges4"], *spec["mesh_ranges4"]})
    return _HEADER + "".join(
        f"route add unreachable {each} table {_MAIN_TABLE} protocol {ROUTE_PROTOCOL}\n" for each in ranges
    )


def boot_routes_unit() -> str:
    """`isthmus-boot-routes.service`: nothing that is for the mesh leaves by the default route at a boot, when the
    network is up and the agent is not yet.

    What is there already stays, be it the agent's own or somebody else's, whom the agent names; `ip` does the others
    and ends with an error, which is none. Nothing is taken away when the unit ends: the routes are the agent's.
    """
    return (
        _HEADER
        + f"""\
[Unit]
Description=Isthmus mesh: its addresses are unreachable until the agent runs
Documentation=https://github.com/isthmus-mesh/isthmus
DefaultDependencies=no
After=local-fs.target
Before=network-pre.target isthmusd.service shutdown.target
Wants=network-pre.target
Conflicts=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=-/sbin/ip -force -batch {BOOT_ROUTES}
CapabilityBoundingSet=CAP_NET_ADMIN
NoNewPrivileges=yes

[Install]
WantedBy=sysinit.target
"""
    )


def networkd_drop_in() -> str:
    """`NETWORKD_DROP_IN`: systemd-networkd leaves routes alone that it did not make (networkd.conf(5)). It would remove
    those of `boot_routes` with each link that it sets up, so just before there is a default route."""
    return _HEADER + "[Network]\nManageForeignRoutes=no\n"


def has_networkd(state: Mapping[str, str]) -> bool:
    """Whether systemd-networkd, of which `Systemd.show` says `state`, sets up links of this host at the next boot."""
    return state.get("UnitFileState") in ("enabled", "enabled-runtime") or state.get("ActiveState") == "active"


def resolved_unit(server: str, domain: str) -> str:
    """`isthmus-resolved.service`: only `domain` goes to `server`, by the overlay device's own resolved settings.

    A global drop-in of systemd-resolved would send every name to our server as well. Settings of a link are lost when
    resolved starts anew, so the unit is part of it. Our server speaks no TLS and signs nothing, and the host may want
    both of all servers (`DNSOverTLS`, `DNSSEC`). Some resolved look at that when a link gets its first server.
    """
    return (
        _HEADER
        + f"""\
[Unit]
Description=Names of the Isthmus mesh in systemd-resolved
Requires=systemd-resolved.service
After=systemd-resolved.service isthmusd.service isthmus-dns.service
PartOf=systemd-resolved.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/resolvectl dnsovertls isthmus0 no
ExecStart=/usr/bin/resolvectl dnssec isthmus0 no
ExecStart=/usr/bin/resolvectl dns isthmus0 {server}
ExecStart=/usr/bin/resolvectl domain isthmus0 ~{domain}
ExecStart=/usr/bin/resolvectl default-route isthmus0 no

[Install]
WantedBy=multi-user.target systemd-resolved.service
"""
    )


def resolved_differs(module: AnsibleModule, server: str, domain: str) -> bool:
    """Whether systemd-resolved has other settings for the overlay device than `resolved_unit` makes, or cannot say.

    They belong to the device and the running resolved, not to a file: both may have been made anew since.
    """
    settings = (("dns", server), ("domain", f"~{domain}"), ("dnsovertls", "no"), ("dnssec", "no"))
    for setting, wanted in settings:
        code, out, _err = module.run_command(["resolvectl", setting, "isthmus0"])
        if code != 0 or out.partition("):")[2].split() != [wanted]:  # "Link 3 (isthmus0): 10.1.0.1"
            return True
    return False


class Systemd:
    """The host's service manager, asked in few calls."""

    PROPERTIES = (
        "Id",
        "LoadState",
        "ActiveState",
        "SubState",
        "UnitFileState",
        "MainPID",
        "NeedDaemonReload",
        "ExecMainStartTimestampMonotonic",
        "ExecMainStatus",
        "Result",
        "NRestarts",
        "Job",
    )

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module

    def show(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Properties by unit name. A unit that does not exist has `LoadState` `not-found`."""
        wanted = list(names)
        if not wanted:
            return {}
        code, out, err = self.module.run_command(
            ["systemctl", "show", "--property=" + ",".join(self.PROPERTIES), *wanted]
        )
        if code != 0:
            self.module.fail_json(msg=f"systemd does not answer on this host: {err.strip() or out.strip()}")
        found = {}
        for name, block in zip(wanted, out.strip().split("\n\n")):
            found[name] = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        return found

    def run(self, *arguments: str) -> None:
        """`systemctl <arguments>`; fails the module with systemd's words."""
        code, out, err = self.module.run_command(["systemctl", *arguments])
        if code != 0:
            self.module.fail_json(msg=f"systemctl {' '.join(arguments)} failed: {(err or out).strip()}")

    def journal(self, name: str, lines: int = 15) -> str:
        """The unit's last journal lines, for an error message."""
        code, out, err = self.module.run_command(
            ["journalctl", "-u", name, "-n", str(lines), "--no-pager", "-o", "cat"]
        )
        return out.strip() if code == 0 else f"(no journal: {err.strip()})"


def process_environment(pid: str) -> dict[str, str]:
    """The environment a process was started with; empty when it is gone."""
    try:
        with open(f"/proc/{int(pid)}/environ", "rb") as file:
            content = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(item.decode(errors="replace").split("=", 1) for item in content.split(b"\0") if b"=" in item)


def _started(state: Mapping[str, str]) -> float:
    """When the unit's process was started, in seconds of the wall clock."""
    return time.time() - time.monotonic() + int(state.get("ExecMainStartTimestampMonotonic") or 0) / 1e6


class Units:
    """Brings a set of units to "file right, enabled, running with this configuration"."""

    def __init__(self, module: AnsibleModule, changes: Changes) -> None:
        self.module = module
        self.changes = changes
        self.systemd = Systemd(module)
        self.reload = False
        self.states: dict[str, str] = {}
        self.enabled: set[str] = set()

    def write(self, files: Mapping[str, str | None]) -> None:
        """Write unit files (`None`: must not exist); an unwanted unit is stopped and disabled first."""
        unwanted = [name for name, text in files.items() if text is None and os.path.exists(self.path(name))]
        for name in unwanted:
            if not self.module.check_mode:
                self.systemd.run("disable", "--now", name)
        for name, text in files.items():
            path = self.path(name)
            differs = self.changes.absent(path) if text is None else self.changes.file(path, text)
            self.reload = self.reload or differs

    @staticmethod
    def path(name: str) -> str:
        return f"{UNIT_DIRECTORY}/{name}"

    def daemon_reload(self, names: Iterable[str], enabled: Iterable[str] = ()) -> None:
        """Make systemd read the files when it has not, also when an earlier run was interrupted before this step.

        Those of `names` that are in `enabled` are enabled with it: each `enable` of its own would have it read all
        files once more.
        """
        states = self.systemd.show(names)
        stale = any(unit.get("NeedDaemonReload") == "yes" for unit in states.values())
        stale |= self._enable({name: states[name] for name in enabled}, "--no-reload")
        if (self.reload or stale) and not self.module.check_mode:
            self.systemd.run("daemon-reload")

    def _enable(self, states: Mapping[str, Mapping[str, str]], *options: str) -> bool:
        """Enable the units that are not; whether there were any."""
        off = {name: state.get("UnitFileState") or "absent" for name, state in states.items()}
        off = {name: state for name, state in off.items() if state not in ("enabled", "enabled-runtime", "static")}
        for name, state in off.items():
            self.changes.note(f"unit {name}", state, "enabled")
        self.enabled.update(off)
        if off and not self.module.check_mode:
            self.systemd.run("enable", "--quiet", *options, *off)
        return bool(off)

    def running(self, name: str, config: str | None = None, reads: str = "", wrong: str = "") -> bool:
        """`name` is enabled and active; restarted when its process was started with another configuration than
        `config` (its `ISTHMUS_CONFIG`), after somebody changed the file `reads` by hand, which is put right now, or
        for the reason `wrong` that the caller found. Returns whether something had to change. Does not wait for it.
        """
        state = self.systemd.show([name])[name]
        before = state.get("ActiveState", "inactive")
        self.states[name] = before
        changed = name in self.enabled or self._enable({name: state})
        reason = None
        if before not in ("active", "reloading"):
            reason = f"it is {before}"
        elif config is not None and process_environment(state["MainPID"]).get(CONFIG_VARIABLE) != config:
            reason = "its configuration changed"
        elif reads in self.changes.replaced and _started(state) >= self.changes.replaced[reads]:
            reason = f"it was started with another {reads}"
        elif wrong:
            reason = wrong
        if reason is not None:
            changed = True
            self.changes.note(f"unit {name}", before, f"active (started anew: {reason})")
            if not self.module.check_mode:
                self.systemd.run("restart", "--no-block", name)
        return changed

    def wait(self, names: Iterable[str], timeout: float) -> dict[str, Any]:
        """Wait until every unit is active; returns what is not after `timeout` seconds, by name, with its journal."""
        waiting = list(names)
        deadline = time.monotonic() + timeout
        failed: dict[str, Any] = {}
        while waiting:
            states = self.systemd.show(waiting)
            # A unit whose start waits in the queue still shows its old state for a moment.
            pending = {name for name in waiting if states[name].get("Job", "0") not in ("", "0")}
            still = []
            for name in waiting:
                self.states[name] = states[name].get("ActiveState", "unknown")
                if self.states[name] != "active" or name in pending:
                    still.append(name)
            waiting = still
            given_up = any(self.states[name] == "failed" and name not in pending for name in waiting)
            if waiting and (given_up or time.monotonic() > deadline):
                failed = {
                    name: {
                        "state": f"{states[name].get('ActiveState')}/{states[name].get('SubState')}",
                        "journal": self.systemd.journal(name),
                    }
                    for name in waiting
                }
                break
            if waiting:
                time.sleep(0.3)
        return failed
