# SPDX-License-Identifier: GPL-3.0-or-later
"""An estate on one machine: systemd-nspawn servers in network namespaces, joined by a router.

Every host of the lab's inventory becomes a machine with its own network namespace, its own cgroup in
every hierarchy, its own overlay of a common Debian root (kept over reboots) and an sshd that knows the
lab's key. Every site is a bridge in the router's namespace, with a switch that cuts it off from the
other sites. Machines of Kubernetes clusters come and go on their own (`kubernetes_lab`). Nothing outside
of these names is touched:

    network namespaces   islab-router, islab-m-<host>
    root namespace       link islab0 (198.18.0.1/30) and the route 198.18.0.0/16 over it
    cgroups              isthmus-lab/ in every hierarchy
    files                /var/lib/isthmus-lab (or $ISTHMUS_LAB_STATE), /run/netns/islab-*
    sysctl               fs.inotify.max_user_instances is raised while a Kubernetes cluster is up

`tests/lab/lab` is the command line (`lab_cli`); tests import `Lab`.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from lab_inventory import LAB_NETWORK, Host, Site, read_inventory
from lab_system import (
    CGROUP,
    LabError,
    cgroup_processes,
    enter_cgroups,
    hierarchies,
    in_namespace,
    ip,
    namespace_exists,
    process_start,
    remove_cgroups,
    run,
    wait_for,
)

ROOT = Path(__file__).resolve().parents[2]
MACHINES = ROOT / "inventories" / "lab"
ROUTER = "islab-router"
CONTROLLER_LINK = "islab0"
CONTROLLER_IN_ROUTER = "ctl"
CONTROLLER_ADDRESS = "198.18.0.1"
ROUTER_ADDRESS = "198.18.0.2"
DEFAULT_MTU = 1500
REBOOT = 133  # systemd-nspawn --keep-unit: the machine asked for a reboot
NEEDED_DISK = {"state": 2 << 30, "cache": 1 << 30}
NEEDED_MEMORY = 2 << 30
BOOT_SECONDS = 90
INOTIFY_LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_INSTANCES = 512
NSPAWN_OPTIONS = "nspawn-options"  # a file of a Kubernetes machine: what it needs beyond others, an option a line


def ssh_answers(host: Host) -> bool:
    try:
        with socket.create_connection((str(host.address), 22), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


class Lab:
    """The lab that the inventory describes. One lab per machine."""

    def __init__(self, inventory: Path | None = None, say: Callable[[str], None] | None = None) -> None:
        self.inventory = Path(inventory or os.environ.get("ISTHMUS_LAB_INVENTORY") or MACHINES)
        self.state = Path(os.environ.get("ISTHMUS_LAB_STATE") or "/var/lib/isthmus-lab")
        self.say = say or (lambda text: print(f"lab: {text}", flush=True))
        read = read_inventory(self.inventory)
        self.hosts, self.sites, self.kubernetes = read.hosts, read.sites, read.kubernetes

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
    def kubernetes_directory(self) -> Path:
        """Files of Kubernetes clusters; there when one was made and not taken down."""
        return self.state / "kubernetes"

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
        """Boot every machine that is not running, but those of Kubernetes clusters; says what it does. Idempotent."""
        machines = [host for host in self.hosts.values() if not host.kubernetes]
        self.refuse_if_lacking()
        with self.locked():
            began = time.monotonic()
            self.make_ground(machines)
            wanted = [host for host in machines if not self.running(host)]
            # Those that an `up` has started that was interrupted may still be booting.
            for host in machines:
                if host not in wanted:
                    self.wait_until_up(host)
            if not wanted:
                self.say(f"up: {len(machines)} machines were running already")
                return
            self.boot_all(wanted)
            self.say(f"up: {len(machines)} machines in {time.monotonic() - began:.1f} s")

    def refuse_if_lacking(self) -> None:
        missing = self.lacks()
        if missing:
            raise LabError("this machine cannot carry the lab; nothing was changed:\n  - " + "\n  - ".join(missing))

    def make_ground(self, hosts: Sequence[Host]) -> None:
        """What these machines stand on, as far as it is not there: root file system, keys, router, sites."""
        image = rootfs.build(self.say)
        marker = self.state / "rootfs"
        if marker.exists() and marker.read_text() != str(image):
            raise LabError("the recipe of the root file system changed; `make lab-down`, then `make lab-up`")
        marker.write_text(str(image))
        self.make_keys(hosts)
        self.make_router()
        for name in dict.fromkeys(host.site for host in hosts):
            self.make_site(self.sites[name], hosts)

    def boot_all(self, hosts: Sequence[Host]) -> None:
        self.say(f"booting {len(hosts)} machines: {', '.join(host.name for host in hosts)}")
        with ThreadPoolExecutor(len(hosts)) as pool:
            for host, words in zip(hosts, pool.map(self.boot, hosts), strict=True):
                self.say(f"{host.name:12} {host.address!s:14} {words}")

    def make_keys(self, hosts: Sequence[Host]) -> None:
        directory = self.key.parent
        directory.mkdir(mode=0o700, exist_ok=True)
        if not self.key.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "isthmus-lab", "-f", str(self.key))
        known = self.known_host_lines(without=hosts)
        for host in hosts:
            key = directory / f"host-{host.name}"
            if not key.exists():
                run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host.name, "-f", str(key))
            kind, public = (directory / f"{key.name}.pub").read_text().split()[:2]
            known.append(f"{host.name},{host.address} {kind} {public}\n")
        self.known_hosts.write_text("".join(known))

    def known_host_lines(self, without: Sequence[Host]) -> list[str]:
        """The lines of `known_hosts`, without those of some hosts."""
        if not self.known_hosts.exists():
            return []
        names = {host.name for host in without}
        lines = self.known_hosts.read_text().splitlines(keepends=True)
        return [line for line in lines if line.split(",")[0] not in names]

    def make_router(self) -> None:
        """The router's namespace: the controller's link, the switch, the sites' DNS."""
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
        rules = (
            "table inet isthmus_lab {\n"
            "  set cut { type ifname; }\n"
            "  set cut_controller { type ifname; }\n"
            "  set within { type ifname . ifname; }\n"
            "  chain forward {\n"
            "    type filter hook forward priority 0; policy accept;\n"
            # Within a site is no business of the switch (a kernel with br_netfilter shows it here too).
            "    iifname . oifname @within accept\n"
            "    iifname @cut_controller counter drop\n"
            "    oifname @cut_controller counter drop\n"
            f'    iifname @cut oifname != "{CONTROLLER_IN_ROUTER}" counter drop\n'
            f'    oifname @cut iifname != "{CONTROLLER_IN_ROUTER}" counter drop\n'
            "  }\n"
            "}\n"
        )
        run("nsenter", f"--net=/run/netns/{ROUTER}", "nft", "-f", "-", feed=rules)
        self.dns_records.mkdir(exist_ok=True)
        subprocess.Popen(
            [
                *("nsenter", f"--net=/run/netns/{ROUTER}", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"),
                *("--no-resolv", "--no-hosts", "--user=root", "--pid-file=", "--local=/#/"),
                # Sites and names that come later are answered too.
                *("--bind-dynamic", "--interface=br-*", f"--hostsdir={self.dns_records}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.state / "dns.log").open("w"),
            start_new_session=True,
            preexec_fn=lambda: enter_cgroups("router"),
        )

    @property
    def dns_records(self) -> Path:
        """A file of names for each site, which the sites' DNS reads as it comes."""
        return self.state / "dns"

    def make_site(self, site: Site, hosts: Sequence[Host]) -> None:
        """The site's bridge in the router, and the names of its machines."""
        records = [f"{host.address} {host.name}.lab.test\n" for host in hosts if host.site == site.name]
        part = self.state / "dns.part"
        part.write_text("".join(records))
        part.rename(self.dns_records / site.name)
        if ip("link", "show", site.bridge, namespace=ROUTER, check=False).returncode == 0:
            return
        ip("link", "add", site.bridge, "type", "bridge", namespace=ROUTER)
        ip("address", "add", f"{site.gateway}/{site.network.prefixlen}", "dev", site.bridge, namespace=ROUTER)
        self.switch("add", "within", f'"{site.bridge}" . "{site.bridge}"')
        ip("link", "set", site.bridge, "mtu", str(self.mtu(site)), "up", namespace=ROUTER)

    def remove_site(self, site: Site) -> None:
        """Take away what `make_site` made, if it did; the site's machines are gone already."""
        (self.dns_records / site.name).unlink(missing_ok=True)
        if (
            namespace_exists(ROUTER)
            and ip("link", "delete", site.bridge, namespace=ROUTER, check=False).returncode == 0
        ):
            self.restore(site.name)
            self.switch("delete", "within", f'"{site.bridge}" . "{site.bridge}"')
        (self.state / f"mtu-{site.name}").unlink(missing_ok=True)

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
        self.in_background(self.directory(host) / "console.log", "supervise", host.name)

    def in_background(self, log: Path, *words: str, group: str = "") -> None:
        """`lab` with these words, about this lab, in a session of its own, and in the cgroup `group` from its
        beginning; what it says goes to the end of `log`."""
        output = log.open("ab")
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve().with_name("lab_cli.py")), *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "ISTHMUS_LAB_STATE": str(self.state), "ISTHMUS_LAB_INVENTORY": str(self.inventory)},
            preexec_fn=(lambda: enter_cgroups(group)) if group else None,
        )

    def stop(self, host: Host) -> None:
        """Pull the plug and wait for the supervisor to end, if the machine is on."""
        known = self.supervisor(host)
        if known is None:
            return
        os.kill(known["pid"], signal.SIGTERM)
        wait_for(f"{host.name} is off", 20, lambda: self.supervisor(host) is None)

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
        while not ssh_answers(host):
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

    def furnish(self, host: Host, extra: Mapping[str, tuple[str, int]] | None = None) -> None:
        """Write the machine's own files into its overlay, once: identity, keys, resolver, workloads.

        `extra`: more files, path -> (text, mode); a text that begins with `->` is a symbolic link's target.
        """
        directory = self.directory(host)
        upper = directory / "upper"
        if upper.exists():
            return
        if host.kubernetes and extra is None:
            raise LabError(f"{host.name} is not made; `tests/lab/lab kube up {host.cluster}` makes it")
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
        for path, (text, mode) in (extra or {}).items():
            if text.startswith("->"):
                link(path, text.removeprefix("->"))
            else:
                put(path, text, mode)
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
            *((directory / NSPAWN_OPTIONS).read_text().splitlines() if host.kubernetes else ()),
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
            if ip("link", "show", CONTROLLER_LINK, check=False).returncode == 0:
                ip("link", "delete", CONTROLLER_LINK)
            self.restore_inotify_limit()
            remove_cgroups("")
            with contextlib.suppress(OSError):  # nspawn's directory, unless something else is in it
                Path("/run/systemd/nspawn").rmdir()
            shutil.rmtree(self.state)
        self.say("down: nothing of the lab is left (the image stays in the cache: " + str(rootfs.rootfs_path()) + ")")

    def raise_inotify_limit(self) -> None:
        """One user's inotify instances, of which every machine has about ten, a node twenty: 128 is usual and too few
        for machines and a Kubernetes cluster. Restored by `restore_inotify_limit`."""
        found = int(INOTIFY_LIMIT.read_text())
        if found >= INOTIFY_INSTANCES:
            return
        self.inotify_record.write_text(str(found))
        try:
            INOTIFY_LIMIT.write_text(str(INOTIFY_INSTANCES))
        except OSError as error:
            raise LabError(
                f"{INOTIFY_LIMIT} is {found}, the lab's machines and a Kubernetes cluster need {INOTIFY_INSTANCES}, "
                f"and it cannot be written ({error}); set fs.inotify.max_user_instances={INOTIFY_INSTANCES} with sysctl"
            ) from error
        self.say(f"fs.inotify.max_user_instances: {found} -> {INOTIFY_INSTANCES} as long as the cluster is up")

    def restore_inotify_limit(self) -> None:
        if self.inotify_record.exists():
            INOTIFY_LIMIT.write_text(self.inotify_record.read_text())
            self.inotify_record.unlink()

    @property
    def inotify_record(self) -> Path:
        """The limit as it was before the lab raised it."""
        return self.state / "inotify-limit"

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
        for name_of_set in ("cut", "cut_controller") if controller else ("cut",):
            self.switch("add", name_of_set, f'"{site.bridge}"')

    def restore(self, name: str) -> None:
        site = self.site(name)
        for name_of_set in ("cut", "cut_controller"):
            if site.bridge in self.cut_bridges(name_of_set):
                self.switch("delete", name_of_set, f'"{site.bridge}"')

    def switch(self, action: str, name_of_set: str, element: str) -> None:
        in_namespace(ROUTER, "nft", action, "element", "inet", "isthmus_lab", name_of_set, f"{{ {element} }}")

    def cut_bridges(self, name_of_set: str) -> set[str]:
        done = in_namespace(ROUTER, "nft", "-j", "list", "set", "inet", "isthmus_lab", name_of_set)
        listed = json.loads(done.stdout)["nftables"]
        return {element for item in listed if "set" in item for element in item["set"].get("elem", ())}

    # -- power

    def power_off(self, name: str) -> None:
        """Pull the plug: no shutdown, no goodbye. The disk stays."""
        host = self.host(name)
        with self.locked():
            self.stop(host)

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

    def there(self) -> list[Host]:
        """The machines of the inventory, without those of Kubernetes clusters that were not made."""
        return [host for host in self.hosts.values() if not host.kubernetes or self.directory(host).exists()]

    def status(self) -> list[dict[str, Any]]:
        rows = []
        for host in self.there():
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
        sites = dict.fromkeys(host.site for host in self.there())
        return [
            {
                "site": site.name,
                "network": str(site.network),
                "mtu": self.mtu(site),
                "link": ("cut, controller too" if site.bridge in controller else "cut" if site.bridge in cut else "up"),
            }
            for site in (self.sites[name] for name in sites)
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
