# SPDX-License-Identifier: GPL-3.0-or-later
"""The root file system of the lab's machines: a Debian 12 server, made once by mmdebstrap.

It is kept in the user's cache directory under a name that holds a hash of the recipe, so that another
clone, or another run, uses the same one and a changed recipe makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SUITE = "bookworm"

# What a server of an estate has, and what the demo and the tests look at it with.
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "systemd-resolved",  # enabled on machines that say so (LabHost.resolved)
    "dbus",
    "openssh-server",
    "python3",
    "python3-venv",  # the agent's own venv
    "iproute2",
    "iputils-ping",
    "nftables",
    "ufw",  # installed and off, as an operator may have it
    "etcd-server",  # `etcd.source: package`
    "etcd-client",
    "dnsmasq-base",  # names for machines
    "wireguard-go",
    "wireguard-tools",
    # What a site's gateway has (`encryption: ipsec-gateway`).
    "charon-systemd",
    "strongswan-swanctl",
    "libcharon-extra-plugins",  # ESP in user space
    "libstrongswan-standard-plugins",
    "frr",  # BGP; off until a site has it
    "frr-pythontools",
    "curl",
    "procps",
    "libelf1",  # libbpf needs it
    "zlib1g",
    "tcpdump",
    "openssl",
    "socat",
    "conntrack",
    "libpam-systemd",  # sessions as on a real server
    "ca-certificates",
    "less",
    # What a node of a Kubernetes cluster has.
    "runc",
    "containernetworking-plugins",
    "iptables",  # ipMasq of the bridge plugin; kube-proxy in iptables mode
    "busybox-static",  # container images are made of it
)

# Units of the image that a machine in a lab does not need, or that the operator would not have running.
DISABLED_UNITS = (
    "etcd.service",
    "strongswan.service",
    "frr.service",
    "systemd-resolved.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "systemd-timesyncd.service",
    "systemd-networkd.service",
)

# Runs in the new root before it is kept. No secrets and no identity: those belong to each machine.
CUSTOMIZE = """\
set -eu
root="$1"
for unit in {units}; do
    chroot "$root" systemctl disable "$unit" >/dev/null 2>&1 || true
done
chroot "$root" systemctl disable ssh.socket >/dev/null 2>&1 || true
chroot "$root" systemctl enable ssh.service >/dev/null 2>&1
rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/hostname" "$root/etc/resolv.conf"
: > "$root/etc/machine-id"
rm -rf "$root"/var/lib/etcd/* "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
mkdir -p "$root/var/lib/apt/lists/partial"
"""


class RootfsError(Exception):
    """The image cannot be made; the message says why and what to do."""


def cache_directory() -> Path:
    """Where things live that outlast a clone: `$XDG_CACHE_HOME/isthmus` or `~/.cache/isthmus`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "isthmus"


def customize_script() -> str:
    return CUSTOMIZE.format(units=" ".join(DISABLED_UNITS))


def recipe_hash() -> str:
    recipe = json.dumps([SUITE, PACKAGES, customize_script()])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def rootfs_path() -> Path:
    return cache_directory() / f"rootfs-{SUITE}-{recipe_hash()}"


def rootfs_present() -> bool:
    return (rootfs_path() / "etc" / "debian_version").exists()


def apt_sources() -> list[str]:
    """One-line sources of Debian's own archive as this machine's apt has them, for SUITE.

    Raises RootfsError when apt knows none (no list, or not yet updated).
    """
    fields = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    components: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        origin, uri, release, codename, component = line.split("|")
        if origin == "Debian" and codename.split("-")[0] == SUITE:
            found = components.setdefault((uri, release), [])
            if component not in found:
                found.append(component)
    if not components:
        raise RootfsError(
            f"apt on this machine has no source of Debian {SUITE} (looked at: apt-get indextargets). "
            "Add one under /etc/apt/sources.list.d and run `apt-get update`, then the same command again."
        )
    return [f"deb {uri} {release} {' '.join(names)}" for (uri, release), names in components.items()]


def apt_options() -> list[str]:
    """Proxy and TLS settings of this machine's apt, as options of mmdebstrap."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    keep = ("Acquire::http::", "Acquire::https::", "Acquire::Retries")
    return [f"--aptopt={line}" for line in dump.splitlines() if line.startswith(keep) and not line.endswith('"";')]


def build(say: Callable[[str], None]) -> Path:
    """Make the root file system unless it is there; returns its path.

    Built beside its final place and renamed, so that an interrupted build leaves no half image.
    """
    target = rootfs_path()
    if rootfs_present():
        return target
    if shutil.which("mmdebstrap") is None:
        raise RootfsError("mmdebstrap is not installed; `make setup` installs it")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f"{target.name}.part-{os.getpid()}"
    script = target.parent / f"{target.name}.customize-{os.getpid()}.sh"
    script.write_text(customize_script())
    command = [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        f"--include={','.join(PACKAGES)}",
        # Pages for people are not read on lab machines: 60 MB less.
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        *apt_options(),
        f'--customize-hook=sh {script} "$1"',
        SUITE,
        str(part),
        "-",
    ]
    say(f"root file system: making {target} (once; about 350 MB, 1 to 2 minutes)")
    started = time.monotonic()
    log = target.parent / "rootfs.log"
    try:
        with log.open("w") as out:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, text=True)
            assert process.stdin is not None
            process.stdin.write("\n".join(apt_sources()) + "\n")
            process.stdin.close()
            while True:
                try:
                    process.wait(timeout=15)
                    break
                except subprocess.TimeoutExpired:
                    last = log.read_text(errors="replace").strip().splitlines()
                    word = last[-1][:70] if last else "starting"
                    say(f"root file system: {time.monotonic() - started:.0f} s: {word}")
        if process.returncode != 0:
            tail = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-12:])
            raise RootfsError(f"mmdebstrap failed (exit {process.returncode}); its last lines, all in {log}:\n  {tail}")
        part.rename(target)
    finally:
        script.unlink(missing_ok=True)
        if part.exists():
            shutil.rmtree(part)
    say(f"root file system: made in {time.monotonic() - started:.0f} s")
    return target


if __name__ == "__main__":
    try:
        build(lambda text: print(text, flush=True))
    except RootfsError as error:
        sys.exit(f"lab: {error}")
