# SPDX-License-Identifier: GPL-3.0-or-later
"""Small machines with a real FRR: a network namespace and the root file system of the lab's machines, with a layer of
their own. No systemd: `systemctl` is a program that starts and stops FRR by its own script."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import rootfs
from integration.module_runner import ROOT, ModuleFailed

SYSTEMCTL = """\
#!/bin/sh
# Stands for systemd's systemctl, for frr.service only.
verb= now=
for word; do case $word in --now) now=1 ;; -*) ;; *) [ -n "$verb" ] || verb=$word ;; esac; done
pid=$(cat /run/frr/watchfrr.pid 2>/dev/null)
[ -n "$pid" ] && [ -d "/proc/$pid" ] && active=active || active=inactive
case $verb in
    show)
        [ -e /run/enabled ] && enabled=enabled || enabled=disabled
        printf 'Id=frr.service\\nLoadState=loaded\\nActiveState=%s\\nUnitFileState=%s\\n' "$active" "$enabled"
        exit 0 ;;
    reset-failed) exit 0 ;;
    enable) touch /run/enabled ;;
    disable) rm -f /run/enabled ;;
esac
echo "$verb" >> /run/systemctl-calls
if [ "$verb" = restart ]; then
    [ "$active" = inactive ] || /usr/lib/frr/frrinit.sh stop
    /usr/lib/frr/frrinit.sh start
elif [ "$verb" = stop ] || { [ "$verb" = disable ] && [ -n "$now" ]; }; then
    [ "$active" = inactive ] || /usr/lib/frr/frrinit.sh stop
fi > /run/frrinit.log 2>&1
"""

_HOLD = """
mount -t overlay overlay -o lowerdir={lower},upperdir={place}/upper,workdir={place}/work {place}/root
for name in dev sys; do mount --rbind /$name {place}/root/$name; done
mount -t proc proc {place}/root/proc
mount -t tmpfs tmpfs {place}/root/run
mkdir -p {place}/root/mnt/site {place}/root/mnt/collections/ansible_collections/isthmus/mesh
mount --bind {site} {place}/root/mnt/site
mount --bind {repository} {place}/root/mnt/collections/ansible_collections/isthmus/mesh
hostname {name}
# What is left by its parent is buried here: FRR waits for the end of its daemons.
exec chroot {place}/root /bin/sh -c 'touch /run/ready; while :; do sleep 0.1; done'
"""

_MODULE = """
import json, runpy, sys
from ansible.module_utils import basic
basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = sys.stdin.buffer.read(), "legacy"
runpy.run_module("ansible_collections.isthmus.mesh.plugins.modules." + sys.argv[1], run_name="__main__", alter_sys=True)
"""


def why_not() -> str:
    """Why there can be none here; empty when there can."""
    if os.geteuid() != 0:
        return "not root: namespaces and mounts need it"
    if not (rootfs.rootfs_path() / "usr/lib/frr/bgpd").exists():
        return f"no FRR: there is no {rootfs.rootfs_path()}; `make lab-up` makes it"
    return ""


class Machine:
    """`name` is its host name; `place` a directory of its own, not on an overlay. It has a network of its own, or
    `namespace`, a named one."""

    def __init__(self, name: str, place: Path, namespace: str | None = None) -> None:
        self.name, self.place = name, place
        for part in ("upper", "work", "root"):
            (place / part).mkdir(parents=True)
        script = _HOLD.format(
            lower=rootfs.rootfs_path(),
            place=place,
            site=Path(sys.prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages"),
            repository=ROOT,
            name=name,
        )
        enter, net = ([], ["--net"]) if namespace is None else (["nsenter", f"--net=/run/netns/{namespace}"], [])
        spaces = ("--mount", "--uts", "--pid", "--fork", "--kill-child", *net)
        # It ends with the tests, however they end: what it leaves in `namespace` would answer the next one.
        tied = ("setpriv", "--pdeathsig", "KILL", *enter, "unshare", *spaces)
        self.holder = subprocess.Popen([*tied, "sh", "-ec", script], stdin=subprocess.DEVNULL)
        self.pid = 0
        self.until(lambda: self.started(), f"{name} is up", 10)
        self.run("ip", "link", "set", "lo", "up")
        self.write("/usr/local/bin/systemctl", SYSTEMCTL, 0o755)

    def started(self) -> bool:
        if self.holder.poll() is not None:
            raise AssertionError(f"{self.name} did not start")
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        self.pid = int(children[0]) if children else 0
        return bool(self.pid) and Path(f"/proc/{self.pid}/root/run/ready").exists()

    def end(self) -> None:
        self.run("systemctl", "stop", "frr.service", check=False)  # it takes its routes along
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid or self.holder.pid, signal.SIGKILL)
        self.holder.wait(20)
        shutil.rmtree(self.place, ignore_errors=True)

    def enter(self, *words: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *("-m", "-n", "-u", "-p", "-r", "-w"), *words]

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(self.enter(*words), capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0 or not check, f"{self.name}: {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def path(self, name: str) -> Path:
        return Path(f"/proc/{self.pid}/root{name}")

    def write(self, name: str, content: str, mode: int = 0o644) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(content)
        self.path(name).chmod(mode)

    def read(self, name: str) -> str:
        return self.path(name).read_text()

    def calls(self) -> list[str]:
        """What `systemctl` was told to change since the last question."""
        path = self.path("/run/systemctl-calls")
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def until(self, ready: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while not (found := ready()):
            assert time.monotonic() < end, f"{what}: not within {seconds} s"
            time.sleep(0.1)
        return found

    def frr(self, conf: str, *daemons: str) -> None:
        """Run FRR with a configuration, as somebody does by hand."""
        for daemon in daemons:
            self.run("sed", "-i", f"s/^{daemon}=no/{daemon}=yes/", "/etc/frr/daemons")
        self.write("/etc/frr/frr.conf", conf, 0o640)
        self.run("chown", "frr:frr", "/etc/frr/frr.conf")
        self.run("systemctl", "restart", "frr.service")

    def show(self, command: str) -> Any:
        """A `show ... json` of bgpd; {} while it does not answer."""
        try:
            return json.loads(self.run("vtysh", "-d", "bgpd", "-c", f"show {command} json", check=False))
        except ValueError:
            return {}

    def routes(self) -> dict[str, str]:
        """Ways by destination, as the kernel has them."""
        return {one["dst"]: one.get("gateway", "") for one in json.loads(self.run("ip", "-j", "-4", "route"))}

    def module(self, name: str, arguments: Mapping[str, Any], check: bool = False) -> dict[str, Any]:
        """The answer of a module of this checkout, run on the machine. Raises ModuleFailed when it fails."""
        request = {"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check, "_ansible_diff": True}}
        environment = ("env", "PYTHONPATH=/mnt/collections:/mnt/site", "PYTHONDONTWRITEBYTECODE=1")
        done = subprocess.run(
            self.enter(*environment, "python3", "-c", _MODULE, name),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == 1, f"{name} ended with {done.returncode}: {done.stdout}\n{done.stderr}"
        answer: dict[str, Any] = json.loads(lines[0])
        if answer.get("failed"):
            raise ModuleFailed(answer)
        return answer


@contextlib.contextmanager
def linked(place: Path, one: tuple[str, str], other: tuple[str, str]) -> Iterator[tuple[Machine, Machine]]:
    """Two machines with a link, each with a name and an address with its prefix length."""
    machines: list[Machine] = []
    try:
        for name, _address in (one, other):
            machines.append(Machine(name, place / name))
        ends = [word for machine in machines for word in ("netns", str(machine.pid))]
        subprocess.run(
            ["ip", "link", "add", "eth0", *ends[:2], "type", "veth", "peer", "name", "eth0", *ends[2:]], check=True
        )
        for machine, (_name, address) in zip(machines, (one, other), strict=True):
            machine.run("ip", "address", "add", address, "dev", "eth0")
            machine.run("ip", "link", "set", "eth0", "up")
        yield machines[0], machines[1]
    finally:
        for machine in machines:
            machine.end()
