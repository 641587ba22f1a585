# SPDX-License-Identifier: GPL-3.0-or-later
"""`lab down` leaves nothing behind, also after a boot that was interrupted and when machines are busy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from isthmus_lab import CGROUP, INOTIFY_LIMIT, Lab, hierarchies
from kubernetes_lab import EVERY_CLUSTER, Kubernetes

pytestmark = [pytest.mark.root, pytest.mark.lab]
TOOL = Path(__file__).with_name("lab")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def processes(lab: Lab) -> set[str]:
    """Processes that belong to the lab: by cgroup, by network namespace, by what they were started as."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            groups = (entry / "cgroup").read_text()
        except OSError:
            continue
        if f"/{CGROUP}/" in groups or "lab_cli.py supervise" in words or f"{lab.state}/" in words:
            found.add(f"{entry.name}: {words}")
    return found


def programs() -> set[str]:
    """BPF programs that a lab machine's systemd or agent loads (ids are the kernel's: other tests have theirs)."""
    shown = json.loads(output("bpftool", "--json", "prog", "show"))
    return {f"{p['id']} {p.get('name')}" for p in shown if str(p.get("name")).startswith(("sd_", "isthmus"))}


def traces(lab: Lab) -> dict[str, object]:
    """Everything on this machine that the lab could leave something in."""
    return {
        "processes": processes(lab),
        "mounts": set(Path("/proc/self/mounts").read_text().splitlines()),
        "namespaces": set(output("ip", "netns", "list").split("\n")),
        "links": {link["ifname"] for link in json.loads(output("ip", "-j", "link"))},
        "routes": set(output("ip", "route", "show", "table", "all").splitlines()),
        "rules": output("ip", "rule"),
        "nft": output("nft", "list", "ruleset"),
        "cgroups": {str(hierarchy.path / CGROUP) for hierarchy in hierarchies() if (hierarchy.path / CGROUP).exists()},
        "pins": {str(path) for path in Path("/sys/fs/bpf").rglob("*")} if Path("/sys/fs/bpf").exists() else set(),
        "programs": programs(),
        "state": lab.state.exists(),
        "inotify": INOTIFY_LIMIT.read_text(),
        "nspawn": {str(path) for path in Path("/run/systemd/nspawn").rglob("*")},
    }


def gone(lab: Lab, before: dict[str, object]) -> None:
    """Nothing new; the kernel frees BPF programs of a removed cgroup a moment later."""
    end = time.monotonic() + 10
    while True:
        after = traces(lab)
        new = {}
        for what, there in after.items():
            known = before[what]
            left = there - known if isinstance(there, set) and isinstance(known, set) else there != known
            if left:
                new[what] = left
        if not new:
            return
        assert time.monotonic() < end, new
        time.sleep(0.2)


@pytest.fixture
def bare() -> Iterator[Lab]:
    """No lab, before and after."""
    lab = Lab()
    lab.down()
    yield lab
    lab.down()


def test_down_leaves_nothing(bare: Lab) -> None:
    before = traces(bare)
    bare.up()
    host = next(iter(bare.hosts))
    # A machine that does something: a pinned map's stand-in, a mount, a process that ignores SIGTERM.
    bare.exec(host, ["mkdir", "/sys/fs/bpf/busy"])
    bare.exec(
        host, ["systemd-run", "--quiet", "sh", "-c", "trap '' TERM; mount -t tmpfs x /mnt; while :; do sleep 1; done"]
    )
    bare.cut(bare.hosts[host].site)
    bare.down()
    gone(bare, before)


def test_a_kubernetes_cluster_comes_and_goes(bare: Lab) -> None:
    """One machine that is control plane and node: taken away alone, and with the lab."""
    before = traces(bare)
    cluster = Kubernetes(Lab(EVERY_CLUSTER), "kube2")
    cluster.up()
    assert cluster.ready_nodes() == {"kube2-1"}
    assert cluster.kubectl("get", "node", "kube2-1", "--output=jsonpath={.spec.podCIDR}").stdout == "10.245.1.0/24"
    cluster.down()
    assert not any(host.site in {site["site"] for site in cluster.lab.links()} for host in cluster.hosts)
    assert not cluster.lab.directory(cluster.hosts[0]).exists()
    cluster.up()
    bare.down()
    gone(bare, before)


def interrupt_up(lab: Lab) -> None:
    """`lab up`, killed when its first machine is starting."""
    up = subprocess.Popen([sys.executable, str(TOOL.with_name("lab_cli.py")), "up"], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not any(lab.supervisor(host) for host in lab.hosts.values()):
        assert time.monotonic() < end, "no machine was started"
        time.sleep(0.02)
    up.kill()
    up.wait()


def test_down_after_an_interrupted_up_leaves_nothing(bare: Lab) -> None:
    before = traces(bare)
    interrupt_up(bare)
    bare.down()
    gone(bare, before)


def test_up_goes_on_after_an_interrupted_up(bare: Lab) -> None:
    interrupt_up(bare)
    bare.up()
    assert {bare.system_state(host) for host in bare.hosts.values()} == {"running"}


def test_what_the_machine_lacks_is_said_before_anything_is_changed(tmp_path: Path, bare: Lab) -> None:
    before = traces(bare)
    # PATH without the tools: as on a machine where `make setup` did not run.
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        ["/usr/bin/python3", str(TOOL.with_name("lab_cli.py")), "up"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert "this machine cannot carry the lab; nothing was changed:" in done.stderr
    assert "systemd-nspawn: not installed (`make setup` installs it)" in done.stderr
    gone(bare, before)


def test_a_reader_that_goes_early_gets_no_traceback(bare: Lab) -> None:
    with subprocess.Popen([TOOL, "status"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as status:
        assert status.stdout is not None
        assert status.stderr is not None
        status.stdout.close()
        assert status.stderr.read() == ""
        assert status.wait(30) == 128 + signal.SIGPIPE
