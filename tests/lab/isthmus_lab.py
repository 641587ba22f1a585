# SPDX-License-Identifier: GPL-3.0-or-later
"""An estate on one machine: systemd-nspawn servers in network namespaces, joined by a router.

Every host of the lab's inventory becomes a machine with its own network namespace, its own cgroup in
every hierarchy, its own overlay of a common Debian root (kept over reboots) and an sshd that knows the
lab's key. Every site is a bridge in the router's namespace, with a switch that cuts it off from the
other sites. Nothing outside of these names is touched:

    network namespaces   islab-router, islab-m-<host>
    root namespace       link islab0 (198.18.0.1/30) and the route 198.18.0.0/16 over it
    cgroups              isthmus-lab/ in every hierarchy
    files                /var/lib/isthmus-lab (or $ISTHMUS_LAB_STATE), /run/netns/islab-*

`tests/lab/lab` is the command line of this module; tests import `Lab`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import ipaddress
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import demo_workloads
import rootfs
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROUTER = "islab-router"
CONTROLLER_LINK = "islab0"
CONTROLLER_IN_ROUTER = "ctl"
CONTROLLER_ADDRESS = "198.18.0.1"
ROUTER_ADDRESS = "198.18.0.2"
LAB_NETWORK = ipaddress.IPv4Network("198.18.0.0/16")  # RFC 2544: never routed in the real world
CGROUP = "isthmus-lab"
DEFAULT_MTU = 1500
# These sites' machines use a plain /etc/resolv.conf, all others systemd-resolved: both are in the field.
PLAIN_RESOLV_CONF_SITES = frozenset({"onprem"})
REBOOT = 133  # systemd-nspawn --keep-unit: the machine asked for a reboot
NEEDED_DISK = {"state": 2 << 30, "cache": 1 << 30}
NEEDED_MEMORY = 2 << 30
BOOT_SECONDS = 90


class LabError(Exception):
    """The lab cannot do what was asked; the message says what, why and what to do next."""


# --- what the lab is made of ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A machine: `address` in its site's network, `units` the demo's workloads that run on it."""

    name: str
    site: str
    cluster: str
    address: ipaddress.IPv4Address
    units: tuple[str, ...]

    @property
    def namespace(self) -> str:
        return f"islab-m-{self.name}"

    @property
    def port(self) -> str:
        """The router's end of the machine's cable (Linux allows 15 characters)."""
        return interface_name("v-", self.name)

    @property
    def resolved(self) -> bool:
        return self.site not in PLAIN_RESOLV_CONF_SITES


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    name: str
    network: ipaddress.IPv4Network

    @property
    def bridge(self) -> str:
        return interface_name("br-", self.name)

    @property
    def gateway(self) -> ipaddress.IPv4Address:
        return self.network[1]


def interface_name(prefix: str, name: str) -> str:
    full = prefix + name
    if len(full) <= 15:
        return full
    return prefix + name[: 15 - len(prefix) - 5] + "-" + hashlib.sha256(name.encode()).hexdigest()[:4]


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise LabError(f"the lab's inventory cannot be read: {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LabError(f"the lab's inventory: {path} is not a mapping")
    return content


def vars_of(directory: Path, kind: str, name: str) -> dict[str, Any]:
    """`group_vars` or `host_vars` of one name: a file, or a directory of files, as Ansible reads them."""
    merged: dict[str, Any] = {}
    base = directory / kind / name
    for path in [*(base.with_name(name + suffix) for suffix in (".yml", ".yaml")), *sorted(base.glob("*.y*ml"))]:
        if path.is_file():
            merged.update(read_yaml(path))
    return merged


def demo_units(workload: Mapping[str, Any]) -> list[str]:
    """The demo's unit that plays a workload: the unit that it names, or the one in the slice that it names."""
    group = workload.get("cgroup") or workload
    unit = str(group.get("unit") or "")
    if group.get("slice"):
        unit = str(group["slice"]).removesuffix(".slice") + ".service"
    return [unit] if unit in demo_workloads.UNITS else []


def read_inventory(directory: Path) -> tuple[dict[str, Host], dict[str, Site]]:
    """Hosts and sites of a YAML inventory directory (no templates: the lab's inventory has none here).

    A host needs `isthmus_underlay` (or a literal `ansible_host`) and a site: `isthmus_site`, else that of
    its cluster in `isthmus_estate`, else the cluster's name. A site's network is the /24 of its hosts.
    """
    files = [path for path in sorted(directory.glob("*.y*ml")) if path.is_file()]
    if not files:
        raise LabError(f"no lab inventory: {directory} has no YAML file (set ISTHMUS_LAB_INVENTORY to another one)")
    variables: dict[str, dict[str, Any]] = {}

    def walk(group: str, body: Mapping[str, Any] | None, inherited: Mapping[str, Any]) -> None:
        body = body or {}
        here = {**inherited, **vars_of(directory, "group_vars", group), **(body.get("vars") or {})}
        for name, host_vars in (body.get("hosts") or {}).items():
            known = variables.setdefault(name, {})
            known.update({**here, **vars_of(directory, "host_vars", name), **(host_vars or {})})
        for child, child_body in (body.get("children") or {}).items():
            walk(child, child_body, here)

    everywhere = vars_of(directory, "group_vars", "all")
    for path in files:
        for group, body in read_yaml(path).items():
            walk(group, body, everywhere)

    hosts: dict[str, Host] = {}
    sites: dict[str, Site] = {}
    for name, known in variables.items():
        cluster = str(known.get("isthmus_cluster", ""))
        if not cluster:
            continue  # localhost and the like
        clusters = (known.get("isthmus_estate") or {}).get("clusters") or {}
        declared = clusters.get(cluster, {}).get("site") if isinstance(clusters, dict) else None
        site = str(known.get("isthmus_site") or declared or cluster)
        literal = known.get("isthmus_underlay") or known.get("ansible_host")
        try:
            address = ipaddress.IPv4Address(str(literal))
        except ValueError as error:
            raise LabError(f"{directory}: host {name}: isthmus_underlay {literal!r} is not an IPv4 address") from error
        if address not in LAB_NETWORK:
            raise LabError(f"{directory}: host {name}: {address} is outside {LAB_NETWORK}, the lab's network")
        network = ipaddress.IPv4Network(f"{address}/24", strict=False)
        if sites.setdefault(site, Site(site, network)).network != network:
            raise LabError(f"{directory}: host {name}: {address} is not in {sites[site].network}, its site {site}")
        units = tuple(unit for workload in known.get("isthmus_workloads") or () for unit in demo_units(workload))
        hosts[name] = Host(name, site, cluster, address, units)
    if not hosts:
        raise LabError(f"{directory}: no host with isthmus_cluster")
    return hosts, sites


# --- running things ------------------------------------------------------------------------------


def run(*command: str, check: bool = True, feed: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, input=feed, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise LabError(f"`{shlex.join(command)}` failed ({done.returncode}): {done.stderr.strip()}")
    return done


def ip(*command: str, namespace: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("ip", *(("-n", namespace) if namespace else ()), *command, check=check)


def in_namespace(namespace: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("nsenter", f"--net=/run/netns/{namespace}", *command, check=check)


def namespace_exists(namespace: str) -> bool:
    return Path("/run/netns", namespace).exists()


def wait_for(what: str, seconds: float, ready: Callable[[], bool], step: float = 0.1) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {seconds:.0f} s")
        time.sleep(step)


def process_start(pid: int) -> str:
    """Start time of a process in clock ticks (proc(5), field 22); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


# --- cgroups -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Hierarchy:
    path: Path
    controllers: tuple[str, ...]  # empty: cgroup2

    @property
    def is_v2(self) -> bool:
        return not self.controllers


def hierarchies() -> list[Hierarchy]:
    """Every mounted cgroup hierarchy below /sys/fs/cgroup, cgroup2 last."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if not where.startswith("/sys/fs/cgroup"):
            continue
        if kind == "cgroup2":
            found.append(Hierarchy(Path(where), ()))
        elif kind == "cgroup":
            generic = {"rw", "ro", "relatime", "nosuid", "nodev", "noexec"}
            found.append(Hierarchy(Path(where), tuple(o for o in options.split(",") if o not in generic)))
    return sorted(found, key=lambda hierarchy: hierarchy.is_v2)


def make_cgroup(hierarchy: Hierarchy, name: str) -> Path:
    path = hierarchy.path
    for part in (CGROUP, name):
        parent, path = path, path / part
        path.mkdir(exist_ok=True)
        if "cpuset" in hierarchy.controllers:
            # A v1 cpuset group starts empty and refuses processes.
            for knob in ("cpuset.cpus", "cpuset.mems"):
                (path / knob).write_text((parent / knob).read_text())
            (path / "cgroup.clone_children").write_text("1")
    return path


def enter_cgroups(name: str) -> None:
    """Put the calling process into the lab's group `name` in every hierarchy."""
    for hierarchy in hierarchies():
        (make_cgroup(hierarchy, name) / "cgroup.procs").write_text(str(os.getpid()))


def cgroup_processes(path: Path) -> list[int]:
    pids = []
    for procs in path.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            pids += [int(pid) for pid in procs.read_text().split()]
    return pids


def remove_cgroups(name: str) -> None:
    """Remove the lab's group `name` ("": all of them) with what is below it, deepest first. They must be empty."""
    for hierarchy in hierarchies():
        top = hierarchy.path / CGROUP / name
        if not top.exists():
            continue
        below = sorted((p for p in top.rglob("*") if p.is_dir()), key=lambda p: len(p.parts), reverse=True)
        for path in (*below, top):
            wait_for(f"cgroup {path} is empty", 10, lambda path=path: remove_group(path))


def remove_group(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


# --- the lab -------------------------------------------------------------------------------------


class Lab:
    """The lab that the inventory describes. One lab per machine."""

    def __init__(self, inventory: Path | None = None, say: Callable[[str], None] | None = None) -> None:
        self.inventory = Path(inventory or os.environ.get("ISTHMUS_LAB_INVENTORY") or ROOT / "inventories" / "lab")
        self.state = Path(os.environ.get("ISTHMUS_LAB_STATE") or "/var/lib/isthmus-lab")
        self.say = say or (lambda text: print(f"lab: {text}", flush=True))
        self.hosts, self.sites = read_inventory(self.inventory)

    # -- names and files

    def host(self, name: str) -> Host:
        if name not in self.hosts:
            raise LabError(f"no machine {name!r}; there are: {', '.join(self.hosts)}")
        return self.hosts[name]

    def site(self, name: str) -> Site:
        if name not in self.sites:
            raise LabError(f"no site {name!r}; there are: {', '.join(self.sites)}")
        return self.sites[name]

    def directory(self, host: Host) -> Path:
        return self.state / "machines" / host.name

    @property
    def key(self) -> Path:
        """The controller's private key; every machine lets it in as root."""
        return self.state / "ssh" / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.state / "ssh" / "known_hosts"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time changes the lab."""
        self.state.mkdir(mode=0o755, parents=True, exist_ok=True)
        with (self.state / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say("another command is changing the lab; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # -- is it there

    def supervisor(self, host: Host) -> dict[str, Any] | None:
        """What the machine's supervisor wrote, while that very process lives."""
        try:
            known: dict[str, Any] = json.loads((self.directory(host) / "supervisor.json").read_text())
        except (OSError, ValueError):
            return None
        return known if process_start(known["pid"]) == known["start"] else None

    def leader(self, host: Host) -> int | None:
        """The machine's PID 1 as this namespace numbers it."""
        known = self.supervisor(host)
        if known is None or not known.get("nspawn"):
            return None
        pid = known["nspawn"]
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for child in children:
                status = Path(f"/proc/{child}/status").read_text()
                numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
                if len(numbers) > 2 and numbers[-1] == "1":
                    return int(child)
        except OSError:
            return None
        return None

    def running(self, host: Host) -> bool:
        return self.leader(host) is not None

    # -- before anything is changed

    def lacks(self) -> list[str]:
        """What this machine lacks to carry the lab, each in words. Changes nothing."""
        if os.geteuid() != 0:
            return ["root: namespaces, cgroups and eBPF need it (run it as root)"]
        missing = [
            f"{tool}: not installed (`make setup` installs it)"
            for tool in ("ip", "nft", "nsenter", "unshare", "systemd-nspawn", "ssh-keygen", "dnsmasq")
            if shutil.which(tool) is None
        ]
        if missing:
            return missing  # the rest is asked with these tools
        kinds = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
        for kind in ("overlay", "bpf", "cgroup2"):
            if kind not in kinds and run("modprobe", kind, check=False).returncode != 0:
                missing.append(f"kernel: no file system `{kind}`")
        if not any(hierarchy.is_v2 for hierarchy in hierarchies()):
            missing.append("cgroup2: not mounted below /sys/fs/cgroup (a kernel booted with cgroup_no_v1 or systemd)")
        trials = {
            "bridge": ("ip", "link", "add", "t0", "type", "bridge"),
            "veth pairs": ("ip", "link", "add", "t1", "type", "veth", "peer", "name", "t2"),
            "VXLAN in collect-metadata mode": (
                *("ip", "link", "add", "t3", "type", "vxlan", "external", "dstport", "8472"),
            ),
            "nftables": ("nft", "add table inet trial { chain c { type filter hook forward priority 0; } ; }"),
            "tc clsact": ("sh", "-c", "ip link add t4 type bridge && tc qdisc add dev t4 clsact"),
        }
        for what, command in trials.items():
            done = run("unshare", "--net", *command, check=False)
            if done.returncode != 0:
                missing.append(f"kernel: no {what}: {done.stderr.strip().splitlines()[-1:]}")
        for what, path in (("state", self.state), ("cache", rootfs.cache_directory())):
            there = next(p for p in (path, *path.parents) if p.exists())
            free = shutil.disk_usage(there).free
            if free < NEEDED_DISK[what] and not self.key.exists():
                missing.append(
                    f"disk: {path} needs {NEEDED_DISK[what] >> 20} MiB, {free >> 20} MiB are free on {there}"
                )
        there = next(p for p in (self.state, *self.state.parents) if p.exists())
        kind = run("stat", "--file-system", "--format=%T", str(there)).stdout.strip()
        if kind in ("overlayfs", "tmpfs", "nfs"):
            missing.append(
                f"disk: {there} is on {kind}, an overlay's upper directory cannot be; set ISTHMUS_LAB_STATE to a "
                "directory of a disk (ext4, xfs, btrfs)"
            )
        memory = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
        if int(memory["MemAvailable"]) << 10 < NEEDED_MEMORY:
            missing.append(f"memory: {NEEDED_MEMORY >> 20} MiB needed, {int(memory['MemAvailable']) >> 10} available")
        routes = json.loads(ip("-j", "route", "show", "root", str(LAB_NETWORK)).stdout or "[]")
        for route in routes:
            if route.get("dev") != CONTROLLER_LINK:
                missing.append(
                    f"network: {LAB_NETWORK} is in use here: route {route.get('dst')} dev {route.get('dev')}"
                )
        return missing

    # -- up

    def up(self) -> None:
        """Boot every machine that is not running; says what it does. Idempotent."""
        missing = self.lacks()
        if missing:
            raise LabError("this machine cannot carry the lab; nothing was changed:\n  - " + "\n  - ".join(missing))
        with self.locked():
            began = time.monotonic()
            image = rootfs.build(self.say)
            marker = self.state / "rootfs"
            if marker.exists() and marker.read_text() != str(image):
                raise LabError("the recipe of the root file system changed; `make lab-down`, then `make lab-up`")
            marker.write_text(str(image))
            self.make_keys()
            self.make_router()
            wanted = [host for host in self.hosts.values() if not self.running(host)]
            if not wanted:
                self.say(f"up: {len(self.hosts)} machines were running already")
                return
            self.say(f"booting {len(wanted)} machines: {', '.join(host.name for host in wanted)}")
            with ThreadPoolExecutor(len(wanted)) as pool:
                for host, words in zip(wanted, pool.map(self.boot, wanted), strict=True):
                    self.say(f"{host.name:12} {host.address!s:14} {words}")
            self.say(f"up: {len(self.hosts)} machines in {time.monotonic() - began:.1f} s")

    def make_keys(self) -> None:
        directory = self.key.parent
        directory.mkdir(mode=0o700, exist_ok=True)
        if not self.key.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "isthmus-lab", "-f", str(self.key))
        known = []
        for host in self.hosts.values():
            key = directory / f"host-{host.name}"
            if not key.exists():
                run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host.name, "-f", str(key))
            kind, public = (directory / f"{key.name}.pub").read_text().split()[:2]
            known.append(f"{host.name},{host.address} {kind} {public}\n")
        self.known_hosts.write_text("".join(known))

    def make_router(self) -> None:
        """The router's namespace: a bridge per site, the controller's link, the switch, the sites' DNS."""
        if namespace_exists(ROUTER):
            return
        ip("netns", "add", ROUTER)
        ip("link", "set", "lo", "up", namespace=ROUTER)
        in_namespace(ROUTER, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        ip(*("link", "add", CONTROLLER_LINK, "type", "veth"), *("peer", CONTROLLER_IN_ROUTER, "netns", ROUTER))
        ip("address", "add", f"{CONTROLLER_ADDRESS}/30", "dev", CONTROLLER_LINK)
        ip("link", "set", CONTROLLER_LINK, "up")
        ip("address", "add", f"{ROUTER_ADDRESS}/30", "dev", CONTROLLER_IN_ROUTER, namespace=ROUTER)
        ip("link", "set", CONTROLLER_IN_ROUTER, "up", namespace=ROUTER)
        ip("route", "add", str(LAB_NETWORK), "via", ROUTER_ADDRESS, "dev", CONTROLLER_LINK)
        for site in self.sites.values():
            ip("link", "add", site.bridge, "type", "bridge", namespace=ROUTER)
            prefix = site.network.prefixlen
            ip("address", "add", f"{site.gateway}/{prefix}", "dev", site.bridge, namespace=ROUTER)
            ip("link", "set", site.bridge, "mtu", str(self.mtu(site)), "up", namespace=ROUTER)
        rules = (
            "table inet isthmus_lab {\n"
            "  set cut { type ifname; }\n"
            "  set cut_controller { type ifname; }\n"
            "  chain forward {\n"
            "    type filter hook forward priority 0; policy accept;\n"
            # Within a site is no business of the switch (a kernel with br_netfilter shows it here too).
            + "".join(f'    iifname "{site.bridge}" oifname "{site.bridge}" accept\n' for site in self.sites.values())
            + "    iifname @cut_controller counter drop\n"
            "    oifname @cut_controller counter drop\n"
            f'    iifname @cut oifname != "{CONTROLLER_IN_ROUTER}" counter drop\n'
            f'    oifname @cut iifname != "{CONTROLLER_IN_ROUTER}" counter drop\n'
            "  }\n"
            "}\n"
        )
        run("nsenter", f"--net=/run/netns/{ROUTER}", "nft", "-f", "-", feed=rules)
        records = [f"--host-record={host.name}.lab.test,{host.address}" for host in self.hosts.values()]
        subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/{ROUTER}", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"),
                *("--no-resolv", "--no-hosts", "--bind-interfaces", "--user=root", "--pid-file=", "--local=/#/"),
                *(f"--listen-address={site.gateway}" for site in self.sites.values()),
                *records,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.state / "dns.log").open("w"),
            start_new_session=True,
            preexec_fn=lambda: enter_cgroups("router"),
        )

    def boot(self, host: Host) -> str:
        """Start one machine and wait until it is up; returns words about it."""
        began = time.monotonic()
        self.furnish(host)
        self.start(host)
        self.wait_until_up(host)
        state = self.system_state(host)
        words = f"{state} after {time.monotonic() - began:.1f} s"
        if state != "running":
            failed = self.exec(
                host.name, ["systemctl", "list-units", "--failed", "--plain", "--no-legend"], check=False
            )
            units = [line.split()[0] for line in failed.stdout.splitlines() if line.strip()]
            raise LabError(
                f"{host.name}: {state}: {', '.join(units) or 'no failed unit'}; look with "
                f"`tests/lab/lab exec {host.name} -- journalctl -b -p warning --no-pager`"
            )
        return words

    def start(self, host: Host) -> None:
        """Start the machine's supervisor in the background."""
        log = (self.directory(host) / "console.log").open("ab")
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "supervise", host.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "ISTHMUS_LAB_STATE": str(self.state), "ISTHMUS_LAB_INVENTORY": str(self.inventory)},
        )

    def wait_until_up(self, host: Host, seconds: float = BOOT_SECONDS) -> None:
        """Wait for PID 1, for sshd and for systemd's first transaction to end."""
        end = time.monotonic() + seconds

        def late() -> str | None:
            return None if time.monotonic() < end else f"{host.name} is not up after {seconds:.0f} s"

        def give_up(what: str) -> LabError:
            console = self.directory(host) / "console.log"
            tail = "\n  ".join(console.read_text(errors="replace").splitlines()[-8:]) if console.exists() else ""
            return LabError(f"{host.name}: {what}; the console ({console}) ends with:\n  {tail}")

        while not self.running(host):
            if late():
                raise give_up("no PID 1")
            time.sleep(0.05)
        while True:
            try:
                with socket.create_connection((str(host.address), 22), timeout=1) as connection:
                    if connection.recv(4) == b"SSH-":
                        break
            except OSError:
                pass
            if late() or self.supervisor(host) is None:
                raise give_up("sshd does not answer")
            time.sleep(0.1)
        while self.system_state(host) in ("initializing", "starting", "offline", ""):
            if late():
                raise give_up("systemd has not finished starting")
            time.sleep(0.1)

    def system_state(self, host: Host) -> str:
        done = subprocess.run([*self.enter(host), "systemctl", "is-system-running"], capture_output=True, text=True)
        return done.stdout.strip()

    def furnish(self, host: Host) -> None:
        """Write the machine's own files into its overlay, once: identity, keys, resolver, workloads."""
        directory = self.directory(host)
        upper = directory / "upper"
        if upper.exists():
            return
        part = directory / "upper.part"
        if part.exists():
            shutil.rmtree(part)
        for name in ("work", "root", "bpf"):
            (directory / name).mkdir(parents=True, exist_ok=True)

        def put(path: str, text: str, mode: int = 0o644) -> None:
            target = part / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            target.chmod(mode)

        def link(path: str, to: str) -> None:
            target = part / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(to)

        put("etc/hostname", f"{host.name}\n")
        put("etc/hosts", f"127.0.0.1\tlocalhost\n127.0.1.1\t{host.name}\n::1\tlocalhost ip6-localhost ip6-loopback\n")
        put("etc/machine-id", uuid.uuid4().hex + "\n", 0o444)
        put("etc/ssh/ssh_host_ed25519_key", (self.key.parent / f"host-{host.name}").read_text(), 0o600)
        put("etc/ssh/ssh_host_ed25519_key.pub", (self.key.parent / f"host-{host.name}.pub").read_text())
        # UseDNS is off by default; GSSAPI and motd only slow a session down.
        put(
            "etc/ssh/sshd_config.d/lab.conf",
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nPrintMotd no\nMaxSessions 64\n"
            "MaxStartups 64:30:128\n",
        )
        put("root/.ssh/authorized_keys", (self.key.parent / "id_ed25519.pub").read_text(), 0o600)
        (part / "root").chmod(0o700)
        (part / "root" / ".ssh").chmod(0o700)
        gateway = self.sites[host.site].gateway
        if host.resolved:
            put("etc/systemd/resolved.conf.d/upstream.conf", f"[Resolve]\nDNS={gateway}\nLLMNR=no\nMulticastDNS=no\n")
            unit = "/lib/systemd/system/systemd-resolved.service"
            link("etc/systemd/system/sysinit.target.wants/systemd-resolved.service", unit)
            link("etc/systemd/system/dbus-org.freedesktop.resolve1.service", unit)
            link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
        else:
            put("etc/resolv.conf", f"search lab.test\nnameserver {gateway}\n")
        for path, (text, mode) in demo_workloads.files(host.cluster).items():
            put(path, text, mode)
        for unit in host.units:
            link(f"etc/systemd/system/multi-user.target.wants/{unit}", f"/etc/systemd/system/{unit}")
        part.rename(upper)

    # -- one machine's life, in the background

    def supervise(self, host: Host) -> int:
        """Run the machine until it is powered off, again after each reboot. The body of `lab supervise`."""
        directory = self.directory(host)
        lock = (directory / "supervisor.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0  # an `up` that was interrupted has started it already
        enter_cgroups("supervisors")
        stopping = False
        nspawn: subprocess.Popen[bytes] | None = None

        def stop(*_: object) -> None:
            nonlocal stopping
            stopping = True
            if nspawn is not None and nspawn.poll() is None:
                self.kill_machine(nspawn.pid)

        signal.signal(signal.SIGTERM, stop)
        boots = 0
        while not stopping:
            boots += 1
            (directory / "reset").unlink(missing_ok=True)
            self.remove_network(host)
            remove_cgroups(host.name)
            self.make_network(host)
            nspawn = subprocess.Popen(
                self.nspawn_command(host),
                stdin=subprocess.DEVNULL,
                env={
                    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                    # /proc/sys/net is the machine's own (it has its own network namespace): writable, as on a
                    # real server. Everything else below /proc/sys is the kernel's and stays read-only.
                    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
                },
                preexec_fn=lambda: enter_cgroups(host.name),
            )
            own = os.getpid()
            record = {"pid": own, "start": process_start(own), "nspawn": nspawn.pid, "boots": boots}
            part = directory / "supervisor.json.part"
            part.write_text(json.dumps(record))
            part.rename(directory / "supervisor.json")
            code = nspawn.wait()
            for pid in {pid for h in hierarchies() for pid in cgroup_processes(h.path / CGROUP / host.name)}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.remove_network(host)
            remove_cgroups(host.name)
            if code != REBOOT and not (directory / "reset").exists():
                break
        (directory / "supervisor.json").unlink(missing_ok=True)
        return 0

    def nspawn_command(self, host: Host) -> list[str]:
        directory = self.directory(host)
        image = (self.state / "rootfs").read_text()
        root = directory / "root"
        mount = (
            f"mount -t overlay isthmus-lab -o lowerdir={image},upperdir={directory}/upper,"
            # systemd mounts a bpffs on a real machine, but not in a container: the machine gets one of its own.
            f"workdir={directory}/work {root} && mount -t bpf -o mode=700 bpf {directory}/bpf && "
            # nspawn leaves locks and directories of machines whose plug was pulled.
            'mkdir -p /run/systemd/nspawn && mount -t tmpfs tmpfs /run/systemd/nspawn && exec "$@"'
        )
        return [
            # The overlay is mounted in a mount namespace of its own, so that nothing of it can stay behind.
            *("unshare", "--mount", "--propagation", "slave", "sh", "-c", mount, "sh"),
            *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", f"--directory={root}"),
            *(f"--machine={host.name}", f"--hostname={host.name}", "--private-users=no", "--link-journal=no"),
            *("--resolv-conf=off", "--timezone=off", "--console=read-only", "--capability=all"),
            *("--system-call-filter=bpf", "--system-call-filter=@keyring", "--bind=/dev/net/tun"),
            f"--network-namespace-path=/run/netns/{host.namespace}",
            f"--bind={directory}/bpf:/sys/fs/bpf",
        ]

    def kill_machine(self, nspawn: int) -> None:
        """Pull the plug: SIGKILL the machine's PID 1 (nspawn ends by itself then)."""
        children = Path(f"/proc/{nspawn}/task/{nspawn}/children")
        with contextlib.suppress(OSError):
            for child in children.read_text().split() or [str(nspawn)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)

    def make_network(self, host: Host) -> None:
        site = self.sites[host.site]
        mtu = str(self.mtu(site))
        ip("netns", "add", host.namespace)
        ip(
            *("link", "add", host.port, "mtu", mtu, "type", "veth"),
            *("peer", "eth0", "mtu", mtu, "netns", host.namespace),
            namespace=ROUTER,
        )
        ip("link", "set", host.port, "master", site.bridge, "up", namespace=ROUTER)
        ip("link", "set", "lo", "up", namespace=host.namespace)
        ip("address", "add", f"{host.address}/{site.network.prefixlen}", "dev", "eth0", namespace=host.namespace)
        ip("link", "set", "eth0", "up", namespace=host.namespace)
        ip("route", "add", "default", "via", str(site.gateway), namespace=host.namespace)

    def remove_network(self, host: Host) -> None:
        # The cable first: the namespace itself may live on for as long as somebody looks into it.
        if namespace_exists(ROUTER):
            ip("link", "delete", host.port, namespace=ROUTER, check=False)
        if namespace_exists(host.namespace):
            ip("netns", "delete", host.namespace)

    # -- down

    def down(self) -> None:
        """End everything the lab started and remove everything it made, except the cached image."""
        if os.geteuid() != 0:
            raise LabError("only root can take the lab down")
        if not self.state.exists() and not any((h.path / CGROUP).exists() for h in hierarchies()):
            self.say("down: there is no lab")
            return
        with self.locked():
            # Supervisors first, so that none of them boots its machine again. Whatever runs in a cgroup of
            # the lab was started by the lab, on whatever way it came there.
            for name in ("supervisors", ""):
                self.kill_group(name)
            for name in sorted(path.name for path in Path("/run/netns").glob("islab-*")):
                if name == ROUTER or name.startswith("islab-m-"):
                    ip("netns", "delete", name)
            if Path("/sys/class/net", CONTROLLER_LINK).exists():
                ip("link", "delete", CONTROLLER_LINK)
            remove_cgroups("")
            with contextlib.suppress(OSError):  # nspawn's directory, unless something else is in it
                Path("/run/systemd/nspawn").rmdir()
            shutil.rmtree(self.state)
        self.say("down: nothing of the lab is left (the image stays in the cache: " + str(rootfs.rootfs_path()) + ")")

    def kill_group(self, name: str) -> None:
        end = time.monotonic() + 20
        while True:
            alive = {pid for h in hierarchies() for pid in cgroup_processes(h.path / CGROUP / name)} - {os.getpid()}
            if not alive:
                return
            if time.monotonic() > end:
                raise LabError(f"processes of the lab do not end: {sorted(alive)} (cgroup {CGROUP}/{name})")
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    # -- using it

    def enter(self, host: Host) -> list[str]:
        """The command prefix that enters a machine's namespaces (not its cgroup: see `exec`)."""
        leader = self.leader(host)
        if leader is None:
            raise LabError(f"{host.name} is not running; start it with `tests/lab/lab power {host.name} on`")
        return ["nsenter", "--target", str(leader), *("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--")]

    def command(self, name: str, argv: Sequence[str], unit: str) -> list[str]:
        """The command line that runs `argv` as a unit of the machine, in the machine's own cgroup.

        A process that only enters the namespaces stays in this machine's cgroup, where the eBPF programs of
        the lab machine do not see its sockets.
        """
        # systemd expands `$NAME` in a unit's command line; `$$` is a literal dollar.
        literal = [word.replace("$", "$$") for word in argv]
        return [
            *self.enter(self.host(name)),
            *("systemd-run", "--pipe", "--wait", "--quiet", "--collect", "--service-type=exec", f"--unit={unit}"),
            *("--working-directory=/root", "--setenv=HOME=/root", "--"),
            *literal,
        ]

    def exec(
        self,
        name: str,
        argv: Sequence[str],
        *,
        feed: str | None = None,
        seconds: float | None = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root on a machine; stdout and stderr as text. `check`: a non-zero exit raises."""
        unit = f"lab-exec-{uuid.uuid4().hex[:12]}"
        try:
            done = subprocess.run(
                self.command(name, argv, unit), input=feed, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            subprocess.run([*self.enter(self.host(name)), "systemctl", "kill", "-s", "KILL", unit], capture_output=True)
            raise LabError(f"{name}: `{shlex.join(argv)}` did not end within {seconds} s") from error
        if check and done.returncode != 0:
            raise LabError(f"{name}: `{shlex.join(argv)}` failed ({done.returncode}): {done.stderr or done.stdout}")
        return done

    def popen(self, name: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a machine in the background; `unit` of the result's args stops it (`stop_unit`)."""
        unit = options.pop("unit", None) or f"lab-exec-{uuid.uuid4().hex[:12]}"
        process = subprocess.Popen(self.command(name, argv, unit), **options)
        return process

    def pass_through(self, name: str, argv: Sequence[str]) -> int:
        """`lab exec`: this process's stdin, stdout and stderr, and the command's exit status."""
        unit = f"lab-exec-{uuid.uuid4().hex[:12]}"
        process = subprocess.Popen(self.command(name, argv, unit))

        def forward(number: int, _: object) -> None:
            subprocess.run([*self.enter(self.host(name)), "systemctl", "kill", unit], capture_output=True, check=False)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, forward)
        return process.wait()

    def ssh(self, name: str) -> list[str]:
        """The ssh command line to a machine."""
        host = self.host(name)
        options = (f"UserKnownHostsFile={self.known_hosts}", "StrictHostKeyChecking=yes", "IdentitiesOnly=yes")
        words = [word for option in options for word in ("-o", option)]
        return ["ssh", "-F", "/dev/null", "-i", str(self.key), *words, f"root@{host.address}"]

    # -- the switch

    def mtu(self, site: Site) -> int:
        path = self.state / f"mtu-{site.name}"
        return int(path.read_text()) if path.exists() else DEFAULT_MTU

    def set_mtu(self, name: str, mtu: int) -> None:
        """Underlay MTU of a site: bridge, cables and the machines' eth0; kept over reboots, not over `down`."""
        site = self.site(name)
        (self.state / f"mtu-{site.name}").write_text(str(mtu))
        members = [host for host in self.hosts.values() if host.site == name and namespace_exists(host.namespace)]
        for host in members:
            ip("link", "set", "eth0", "mtu", str(mtu), namespace=host.namespace)
            ip("link", "set", host.port, "mtu", str(mtu), namespace=ROUTER)
        ip("link", "set", site.bridge, "mtu", str(mtu), namespace=ROUTER)

    def cut(self, name: str, controller: bool = False) -> None:
        """Drop everything that is forwarded between the site and other sites (and the controller)."""
        site = self.site(name)
        sets = ("cut", "cut_controller") if controller else ("cut",)
        for switch in sets:
            in_namespace(ROUTER, "nft", "add", "element", "inet", "isthmus_lab", switch, f'{{ "{site.bridge}" }}')

    def restore(self, name: str) -> None:
        site = self.site(name)
        for switch in ("cut", "cut_controller"):
            if site.bridge in self.cut_bridges(switch):
                in_namespace(
                    ROUTER, "nft", "delete", "element", "inet", "isthmus_lab", switch, f'{{ "{site.bridge}" }}'
                )

    def cut_bridges(self, switch: str) -> set[str]:
        done = in_namespace(ROUTER, "nft", "-j", "list", "set", "inet", "isthmus_lab", switch)
        listed = json.loads(done.stdout)["nftables"]
        return {element for item in listed if "set" in item for element in item["set"].get("elem", ())}

    # -- power

    def power_off(self, name: str) -> None:
        """Pull the plug: no shutdown, no goodbye. The disk stays."""
        host = self.host(name)
        with self.locked():
            known = self.supervisor(host)
            if known is None:
                return
            os.kill(known["pid"], signal.SIGTERM)
            wait_for(f"{name} is off", 20, lambda: self.supervisor(host) is None)

    def power_on(self, name: str) -> None:
        host = self.host(name)
        with self.locked():
            if self.running(host):
                return
            self.start(host)
            self.wait_until_up(host)

    def reimage(self, name: str) -> None:
        """A new disk in a machine of the same name, address and host key; returns when it is up."""
        self.power_off(name)
        host = self.host(name)
        with self.locked():
            for part in ("upper", "work"):
                shutil.rmtree(self.directory(host) / part)
            self.boot(host)

    def reboot(self, name: str, hard: bool = False) -> None:
        """Reboot and wait until the machine is up again; `hard`: as by the reset button."""
        host = self.host(name)
        with self.locked():
            known = self.supervisor(host)
            if known is None:
                raise LabError(f"{name} is off; start it with `tests/lab/lab power {name} on`")
            if hard:
                (self.directory(host) / "reset").touch()
                self.kill_machine(known["nspawn"])
            else:
                subprocess.run([*self.enter(host), "systemctl", "reboot"], capture_output=True, check=False)

            def again() -> bool:
                now = self.supervisor(host)
                if now is None:
                    raise LabError(f"{name} did not come back; look at {self.directory(host)}/console.log")
                return bool(now["boots"] > known["boots"])

            wait_for(f"{name} reboots", 60, again)
            self.wait_until_up(host)

    # -- looking at it

    def status(self) -> list[dict[str, Any]]:
        rows = []
        for host in self.hosts.values():
            leader = self.leader(host)
            memory = 0
            if leader is not None:
                for hierarchy in hierarchies():
                    for pid in set(cgroup_processes(hierarchy.path / CGROUP / host.name)) if hierarchy.is_v2 else ():
                        with contextlib.suppress(OSError):
                            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                                if line.startswith("Pss:"):
                                    memory += int(line.split()[1])
            rows.append(
                {
                    "host": host.name,
                    "site": host.site,
                    "address": str(host.address),
                    "state": self.system_state(host) if leader else "off",
                    "pid": leader,
                    "memory_mib": memory >> 10,
                }
            )
        return rows

    def links(self) -> list[dict[str, Any]]:
        if not namespace_exists(ROUTER):
            return []
        cut, controller = self.cut_bridges("cut"), self.cut_bridges("cut_controller")
        return [
            {
                "site": site.name,
                "network": str(site.network),
                "mtu": self.mtu(site),
                "link": ("cut, controller too" if site.bridge in controller else "cut" if site.bridge in cut else "up"),
            }
            for site in self.sites.values()
        ]


class Customer:
    """A machine's `client.service`: requests from a workload of its own, made and counted on the machine."""

    def __init__(self, lab: Lab, host: str) -> None:
        self.lab = lab
        self.host = host

    def ask(self, order: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        feed = json.dumps(order) + "\n"
        talk = ["socat", "-t", str(seconds), "-", "UNIX-CONNECT:/run/client.sock"]
        done = self.lab.exec(self.host, talk, feed=feed, seconds=seconds + 5)
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError as error:
            raise LabError(f"{self.host}: client.service gave no answer to {order}: {done.stdout!r}") from error
        return answer

    def start(self, name: str, url: str, **order: Any) -> None:
        """Requests in the background: `count` (0: until `result(stop=True)`), `interval`, `timeout`, `keep_alive`."""
        self.ask({"run": name, "url": url, **order}, 10)

    def result(self, name: str, *, stop: bool = False, wait: bool = False, seconds: float = 60) -> dict[str, Any]:
        """`ok`, `failed`, `answers` by cluster/host, `peers` (addresses the servers saw), `errors`, `longest_gap`
        (seconds without a good answer), `connections` (how many were opened), `changes` ([seconds, who or error],
        at each change)."""
        return self.ask({"result": name, "stop": stop, "wait": wait}, seconds)

    def requests(self, url: str, count: int, seconds: float = 60, **order: Any) -> dict[str, Any]:
        """Make `count` requests and return what came of them."""
        name = f"once-{uuid.uuid4().hex[:8]}"
        self.start(name, url, count=count, **order)
        return self.result(name, wait=True, seconds=seconds)


# --- the command line ----------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description="An estate of systemd machines on this one.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say what this machine lacks; changes nothing")
    commands.add_parser("up", help="boot every machine")
    commands.add_parser("down", help="end and remove everything of the lab")
    status = commands.add_parser("status", help="machines and links")
    status.add_argument("-o", "--output", choices=("table", "json"), default="table")
    execute = commands.add_parser("exec", help="run a command as root on a machine, in the machine's own cgroup")
    execute.add_argument("host")
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD...")
    link = commands.add_parser("link", help="cut a site off from the other sites, restore it, set its MTU")
    link.add_argument("site")
    link.add_argument("action", choices=("cut", "restore", "mtu"))
    link.add_argument("value", nargs="?", type=int, help="bytes, for mtu")
    link.add_argument("--controller", action="store_true", help="cut: off from the controller as well")
    power = commands.add_parser("power", help="off pulls the plug; reboot is orderly, reset is not")
    power.add_argument("host")
    power.add_argument("action", choices=("off", "on", "reboot", "reset"))
    ssh = commands.add_parser("ssh", help="a shell, or a command, by SSH as Ansible would")
    ssh.add_argument("host")
    ssh.add_argument("argv", nargs=argparse.REMAINDER, metavar="[CMD...]")
    supervise = commands.add_parser("supervise", help="(the lab itself) run one machine")
    supervise.add_argument("host")
    return parser


def do_check(lab: Lab, _: argparse.Namespace) -> int:
    missing = lab.lacks()
    for word in missing:
        print(f"lacks {word}")
    return 1 if missing else 0


def do_up(lab: Lab, _: argparse.Namespace) -> int:
    lab.up()
    return 0


def do_down(lab: Lab, _: argparse.Namespace) -> int:
    lab.down()
    return 0


def do_status(lab: Lab, options: argparse.Namespace) -> int:
    machines, links = lab.status(), lab.links()
    if options.output == "json":
        print(json.dumps({"machines": machines, "links": links}, indent=2))
        return 0
    print(f"{'HOST':14}{'SITE':10}{'ADDRESS':16}{'STATE':10}{'PID':>8}{'MEMORY':>10}")
    for row in machines:
        memory = f"{row['memory_mib']} MiB"
        print(f"{row['host']:14}{row['site']:10}{row['address']:16}{row['state']:10}{row['pid'] or '-':>8}{memory:>10}")
    print(f"\n{'SITE':14}{'NETWORK':18}{'MTU':6}LINK")
    for row in links:
        print(f"{row['site']:14}{row['network']:18}{row['mtu']:<6}{row['link']}")
    return 0


def do_exec(lab: Lab, options: argparse.Namespace) -> int:
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        raise LabError("exec: no command; `tests/lab/lab exec HOST -- CMD...`")
    return lab.pass_through(options.host, argv)


def do_link(lab: Lab, options: argparse.Namespace) -> int:
    if options.action == "cut":
        lab.cut(options.site, options.controller)
    elif options.action == "restore":
        lab.restore(options.site)
    elif options.value is None:
        raise LabError("link SITE mtu: how many bytes?")
    else:
        lab.set_mtu(options.site, options.value)
    return 0


def do_power(lab: Lab, options: argparse.Namespace) -> int:
    if options.action == "off":
        lab.power_off(options.host)
    elif options.action == "on":
        lab.power_on(options.host)
    else:
        lab.reboot(options.host, hard=options.action == "reset")
    return 0


def do_ssh(lab: Lab, options: argparse.Namespace) -> int:
    command = [*lab.ssh(options.host), *options.argv]
    os.execvp(command[0], command)  # noqa: S606


def do_supervise(lab: Lab, options: argparse.Namespace) -> int:
    return lab.supervise(lab.host(options.host))


COMMANDS: dict[str, Callable[[Lab, argparse.Namespace], int]] = {
    "check": do_check,
    "up": do_up,
    "down": do_down,
    "status": do_status,
    "exec": do_exec,
    "link": do_link,
    "power": do_power,
    "ssh": do_ssh,
    "supervise": do_supervise,
}


def main(words: Sequence[str]) -> int:
    options = arguments().parse_args(words)
    lab = Lab()
    status = COMMANDS[options.command](lab, options)
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (LabError, rootfs.RootfsError) as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # Who read our output (`| head`) has gone. Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
