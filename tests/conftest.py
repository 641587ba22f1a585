# SPDX-License-Identifier: GPL-3.0-or-later
"""What all tests share: the reviewed list of skips, and the lab."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "lab"))

if TYPE_CHECKING:
    from installation import Installation
    from isthmus_lab import Lab
    from kubernetes_lab import Kubernetes

# Reasons for which a test may be skipped, each as a prefix of what the test says. Anything else fails the run:
# a skip that nobody looked at is a test that nobody has.
REVIEWED_SKIPS = tuple(
    line.split("#")[0].strip()
    for line in (ROOT / "tests" / "skips.txt").read_text().splitlines()
    if line.split("#")[0].strip()
)
UNREVIEWED: list[str] = []

BPFFS = "/sys/fs/bpf"

# `ansible_collections.isthmus.mesh` is this checkout, for tests that import its plugins.
_PLACE = tempfile.TemporaryDirectory(prefix="isthmus-collections-")
Path(_PLACE.name, "ansible_collections", "isthmus").mkdir(parents=True)
Path(_PLACE.name, "ansible_collections", "isthmus", "mesh").symlink_to(ROOT)
sys.path.insert(0, _PLACE.name)


# End-to-end tests that begin with bare machines first, those that break an estate last; any order is right, this one
# makes the fewest estates.
E2E_ORDER = (
    *("test_mixed", "test_site", "test_awx", "test_verify", "test_host_security", "test_story", "test_lab"),
    *("test_wireguard", "test_ipsec", "test_native", "test_bgp"),
    *("test_failures", "test_safety", "test_preflight", "test_generations", "test_batches", "test_versions"),
    *("test_members", "test_backup", "test_losses", "test_restore", "test_forget", "test_boundaries", "test_chaos"),
    *("test_hybrid", "test_hybrid_native", "test_hybrid_long", "test_in_cluster", "test_provider", "test_teardown"),
)

# Integration tests that take longest first: workers get them file by file, and the last one runs alone.
LONGEST = (
    *("test_batches_playbook", "test_kubernetes_install", "test_encryption_playbook", "test_in_cluster_playbook"),
    *("test_auto_playbook", "test_pki_job", "test_gateways_playbook", "test_vpc_playbook", "test_forget_playbook"),
    *("test_restore_playbook", "test_backup_playbook", "test_replace_authority_playbook", "test_ipsec"),
    *("test_agent_wireguard", "test_in_cluster", "test_bgp_playbook", "test_kubernetes_playbook", "test_image"),
)


def rank(item: pytest.Item) -> int:
    order = {"e2e": E2E_ORDER, "integration": LONGEST}.get(item.path.parent.name, ())
    name = item.path.stem
    # A new file: of end-to-end tests first, as it may want bare machines; of the others after the long ones.
    unknown = len(order) if order is LONGEST else -1
    return order.index(name) if name in order else unknown


MOUNTED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """A BPF file system where systemd mounts one at every boot: a container, or a build machine without systemd, has
    none, and the agent does not mount one that would go with its own mounts. Workers use their controller's."""
    if os.geteuid() != 0 or hasattr(config, "workerinput") or os.path.ismount(BPFFS):
        return
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", BPFFS], check=True)
    config.stash[MOUNTED] = True


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.stash.get(MOUNTED, False):
        subprocess.run(["umount", BPFFS], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of tests. Tests marked `root` are skipped, in words, for other users."""
    items.sort(key=rank)
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root") or item.get_closest_marker("lab"):
            item.add_marker(pytest.mark.skip(reason="not root: run as root"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not reason.startswith(REVIEWED_SKIPS or ("\0",)):
            UNREVIEWED.append(f"{report.nodeid}: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if UNREVIEWED and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in UNREVIEWED:
        terminalreporter.write_line(f"SKIP NOT ON THE REVIEWED LIST (tests/skips.txt): {line}", red=True)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The lab, up, every machine on and every link restored; it stays up for the next run (`make lab-down` ends it)."""
    from isthmus_lab import Lab

    estate = Lab()
    estate.up()
    put_right(estate)
    yield estate
    put_right(estate)


@pytest.fixture(scope="session")
def kubernetes() -> Iterator[Kubernetes]:
    """The lab's cluster `kube`, up or not, which is taken down in the end: other runs' lab is the machines."""
    from isthmus_lab import Lab
    from kubernetes_lab import HYBRID, Kubernetes

    cluster = Kubernetes(Lab(HYBRID), "kube")
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def kube(lab: Lab, kubernetes: Kubernetes) -> Kubernetes:
    """The lab's cluster `kube`, up, every machine on, beside the lab's machines."""
    kubernetes.up()
    return kubernetes


def put_right(estate: Lab) -> None:
    """Whatever a test did to links and power: back to normal. Nothing when a test took the lab down."""
    from isthmus_lab import DEFAULT_MTU, ROUTER, namespace_exists

    if not namespace_exists(ROUTER):
        return

    for name, site in estate.sites.items():
        estate.restore(name)
        if estate.mtu(site) != DEFAULT_MTU:
            estate.set_mtu(name, DEFAULT_MTU)
    for name in estate.hosts:
        estate.power_on(name)


@pytest.fixture(scope="session")
def installed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The lab's estate made anew from bare machines, and what was seen on the way."""
    from installation import install

    return install(lab, tmp_path_factory.mktemp("installation"))


@pytest.fixture(scope="session")
def mesh(lab: Lab) -> Lab:
    """The lab with the estate of its inventory on it, by the playbook of the installed artifact; Kubernetes clusters
    that the demo or a killed run left go first."""
    from isthmus_lab import Lab
    from kubernetes_lab import EVERY_CLUSTER, TWO_IN_CLUSTER, clusters_there
    from playbook import play

    left = [cluster for inventory in (EVERY_CLUSTER, TWO_IN_CLUSTER) for cluster in clusters_there(Lab(inventory))]
    play("site", *(("-e", f"isthmus_prune={','.join(f'cluster/{each.name}' for each in left)}") if left else ()))
    for cluster in left:
        cluster.down()
    return lab
