# SPDX-License-Identifier: GPL-3.0-or-later
"""A machine of the lab whose kernel is Debian's own: the lab's root file system and network, in a virtual machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bpf.topology import wait_for
from isthmus_lab import ROUTER, Lab, ssh_answers
from kernel.stock_kernel import VIRTIOFSD, Kernel, guest, make_initramfs, sharing
from lab_inventory import Host
from lab_system import ip

BOOT = 60
"""Seconds, emulated, until sshd answers."""


@contextmanager
def running(lab: Lab, host: Host, kernel: Kernel, place: Path, console: Path) -> Iterator[None]:
    """While the lab's ground is made. It is entered by SSH only: `lab.exec` enters namespaces."""
    lab.furnish(host)
    directory = lab.directory(host)
    tools = directory / "upper" / "usr" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    # The image has none, as the lab's other machines load no modules.
    shutil.copy("/bin/kmod", tools / "kmod")
    (directory / "upper" / "usr" / "sbin").mkdir(exist_ok=True)
    (directory / "upper" / "usr" / "sbin" / "modprobe").symlink_to("../bin/kmod")
    root, modules = directory / "root", directory / "root" / "usr" / "lib" / "modules" / kernel.release
    shares = place / "virtiofs"
    mount = (
        f"mount -t overlay isthmus-lab -o lowerdir={(lab.state / 'rootfs').read_text()},upperdir={directory}/upper,"
        f"workdir={directory}/work {root} && mkdir -p {modules} && mount --bind {kernel.modules} {modules} && "
        'exec "$@"'
    )
    site = lab.sites[host.site]
    settings = {"ADDRESS": f"{host.address}/{site.network.prefixlen}", "GATEWAY": site.gateway}
    init = Path(__file__).with_name("machine.sh")
    initramfs = make_initramfs(kernel, place, init, settings, ("virtio_pci", "virtiofs", "virtio_net"))
    ip("tuntap", "add", host.port, "mode", "tap", namespace=ROUTER)
    ip("link", "set", host.port, "master", site.bridge, "up", namespace=ROUTER)
    devices = (
        *("-netdev", f"tap,id=net,ifname={host.port},script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=net"),
    )
    # In a mount namespace of its own, as the lab's other machines.
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-c", mount, "sh", *sharing(shares, root)]
    ) as server:
        try:
            wait_for(shares.exists, f"{VIRTIOFSD} listens")
            inside = ("nsenter", f"--net=/run/netns/{ROUTER}")
            with subprocess.Popen([*inside, *guest(kernel, shares, console, initramfs, *devices)]) as machine:
                try:
                    wait_for(lambda: machine.poll() is not None or ssh_answers(host), f"sshd; see {console}", 3 * BOOT)
                    assert machine.poll() is None, f"the guest ended; see {console}"
                    yield
                finally:
                    machine.kill()
        finally:
            server.kill()
            ip("link", "delete", host.port, namespace=ROUTER)
