# SPDX-License-Identifier: GPL-3.0-or-later
"""A real systemd-networkd sets up a link in a namespace that has our routes of the boot already."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import units
from bpf.topology import wait_for

pytestmark = pytest.mark.root

NETWORKD = "/lib/systemd/systemd-networkd"
ROUTES = units.boot_routes({"service_ranges4": ["10.111.0.0/16"], "mesh_ranges4": ["10.101.0.0/16"]})
LINK = "[Match]\nName=eth0\n\n[Network]\nAddress=192.0.2.1/24\nGateway=192.0.2.2\nLinkLocalAddressing=no\n"
# What networkd reads and writes is this namespace's own; /sys is read-only, as without udev it would wait for that.
NAMESPACE = """
set -e
mount --make-rprivate /
for one in /run /etc/systemd/network; do mount -t tmpfs tmpfs $one; done
mount -t sysfs -o ro sysfs /sys
mkdir -p /run/systemd/netif
chown systemd-network:systemd-network /run/systemd/netif
cp {place}/eth0.network /etc/systemd/network/
cp -r {place}/networkd.conf.d /run/systemd/
ip link set lo up
ip -batch {place}/boot-routes
exec {networkd}
"""


class Host:
    """The namespace, and networkd in it."""

    def __init__(self, place: Path) -> None:
        self.log = place / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--net", "sh", "-c", NAMESPACE.format(place=place, networkd=NETWORKD)],
                env={"PATH": os.environ["PATH"], "SYSTEMD_LOG_LEVEL": "info"},
                stdout=log,
                stderr=log,
            )

    def ip(self, *words: str) -> str:
        enter = ["nsenter", f"--target={self.process.pid}", "--net", "ip", *words]
        return subprocess.run(enter, capture_output=True, text=True, check=True).stdout

    def unreachable(self) -> set[str]:
        lines = self.ip("route", "show", "proto", units.ROUTE_PROTOCOL).splitlines()
        return {line.split()[1] for line in lines if line.startswith("unreachable ")}


@contextlib.contextmanager
def networkd(place: Path) -> Iterator[Host]:
    """Has begun, and knows what is in the kernel."""
    host = Host(place)
    try:
        wait_for(lambda: "Enumeration completed" in host.log.read_text(), f"networkd is ready ({host.log})", 30)
        yield host
    finally:
        host.process.kill()
        host.process.wait()


@pytest.mark.parametrize("ours", [True, False], ids=["with our drop-in", "as it is by itself"])
def test_networkd_sets_up_a_link_and_the_mesh_stays_unreachable(tmp_path: Path, ours: bool) -> None:
    """By itself it removes them, without which there would be no need of the drop-in."""
    if not os.path.exists(NETWORKD):
        pytest.fail(f"{NETWORKD} is missing; it is part of Debian's systemd package")
    (tmp_path / "boot-routes").write_text(ROUTES)
    (tmp_path / "eth0.network").write_text(LINK)
    (tmp_path / "networkd.conf.d").mkdir()
    if ours:
        (tmp_path / "networkd.conf.d" / "isthmus.conf").write_text(units.networkd_drop_in())
    with networkd(tmp_path) as host:
        assert host.unreachable() == {"10.101.0.0/16", "10.111.0.0/16"}
        host.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        host.ip("link", "set", "eth1", "up")
        wait_for(lambda: host.ip("route", "show", "default"), f"networkd set the default route ({host.log})", 30)
        assert host.unreachable() == ({"10.101.0.0/16", "10.111.0.0/16"} if ours else set())
