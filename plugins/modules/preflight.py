#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: preflight
short_description: Report everything that keeps a host from joining the mesh
version_added: 1.0.0
description:
  - Probes the host for each thing the mesh needs (kernel features one by one, cgroup2, systemd, Python, architecture,
    free ports, clock, addresses) and reports all problems in one message.
  - Changes nothing, unless O(install=true), and then only when there is no problem.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  platforms:
    description:
      - The platforms for which there is an agent bundle.
    type: list
    elements: dict
    required: true
    suboptions:
      arch:
        description: Machine architecture as the kernel names it, for example V(x86_64).
        type: str
        required: true
      python:
        description: Python version, for example V(3.11).
        type: str
        required: true
      version:
        description: Version of the bundle.
        type: str
        required: true
  python:
    description:
      - Interpreter for the agent, instead of the newest one found that a bundle fits.
    type: path
  controller_time:
    description:
      - The controller's time, in UTC as C(YYYY-MM-DDTHH:MM:SSZ), to compare the host's clock with.
    type: str
  max_clock_skew:
    description:
      - Seconds by which the host's clock may differ from the controller's.
    type: int
    default: 120
  install:
    description:
      - Whether distribution packages that are missing are installed, by C(apt-get) or C(dnf), without recommended ones.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: The host can join the mesh
  isthmus.mesh.preflight:
    spec: "{{ __isthmus_plan.specs[inventory_hostname] }}"
    platforms:
      - arch: x86_64
        python: "3.11"
        version: 1.0.0

- name: It has the packages that the mesh needs
  isthmus.mesh.preflight:
    spec: "{{ __isthmus_plan.specs[inventory_hostname] }}"
    platforms:
      - arch: x86_64
        python: "3.11"
        version: 1.0.0
    install: true
"""

RETURN = r"""
problems:
  description: Every problem found; the module fails when there is one.
  returned: always
  type: list
  elements: str
arch:
  description: Machine architecture.
  returned: success
  type: str
  sample: x86_64
kernel:
  description: Release of the running kernel.
  returned: success
  type: str
  sample: 6.1.0-18-amd64
python:
  description: Version and path of the interpreter that the agent will use.
  returned: success
  type: dict
  sample:
    version: "3.11"
    path: /usr/bin/python3.11
packages:
  description: Distribution packages that are missing, or were missing before they were installed.
  returned: success
  type: list
  elements: str
  sample: [dnsmasq-base]
"""

import glob
import ipaddress
import os
import platform
import re
import socket
import struct
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import bpfprobe, bundle, clock, packages, ports, resolver
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

DEVICE = "isthmus0"
DNSMASQ = "/usr/sbin/dnsmasq"
MOVE = "Stop that service or make it listen on other addresses only."


def kernel_problems(arch):
    if arch not in ("x86_64", "aarch64"):
        return [f"The architecture {arch} is not supported; the agent runs on x86_64 and aarch64."]
    problems = [
        f"The kernel {platform.release()} lacks {feature}. Boot a kernel with it (5.15, RHEL 9's 5.14, or newer)."
        for feature in bpfprobe.missing_features()
    ]
    if bpfprobe.cgroup2_mount() is None:
        problems.append(
            "No cgroup2 hierarchy is mounted (/proc/mounts). Boot with systemd.unified_cgroup_hierarchy=1, "
            "or mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`."
        )
    if bpfprobe.bpffs_mount() is None and not bpfprobe.known_filesystem("bpf"):
        problems.append("The kernel lacks the BPF file system (/proc/filesystems has no bpf).")
    return problems


def system_problems(module):
    problems = []
    if os.geteuid() != 0:
        problems.append("The module does not run as root. Set ansible_become: true for this host or use --become.")
    if not os.path.isdir("/run/systemd/system"):
        problems.append("systemd is not the init system of this host; the mesh's services are systemd units.")
        return problems
    out = module.run_command(["systemctl", "--version"])[1]
    version = re.match(r"systemd (\d+)", out)
    if version is None or int(version.group(1)) < 247:
        problems.append(f"systemd is too old ({out.splitlines()[0] if out else 'no answer'}); 247 or newer is needed.")
    return problems


def clock_problems(told, allowed):
    words = clock.problem(told, allowed) if told else ""
    return [words] if words else []


def foreign(found, own):
    """Sockets that are not held by the unit `own`, as words."""
    words = []
    for one in found:
        process, unit = ports.holder(one)
        if unit not in own:
            words.append(f"{process}{' of ' + unit if unit else ''} on {one.address}")
    return words


def port_problems(spec):
    problems = []
    port = spec["overlay"]["port"]
    if not os.path.exists(f"/sys/class/net/{DEVICE}"):
        for holder in foreign(ports.bound("udp", port), ()):
            problems.append(
                f"UDP port {port}, the overlay's, is used by {holder} (another VXLAN device, when it is the kernel: "
                "`ip -d link show type vxlan`). Free it, or set another overlay port for the whole estate."
            )
    # The name server listens on one of the two, by how the host resolves names.
    wanted = [
        (protocol, 53, address, "isthmus-dns.service", "the name server's", MOVE)
        for address in (spec["node"]["mesh4"], resolver.LOCAL_SERVER)
        for protocol in ("udp", "tcp")
    ]
    wanted.append(("tcp", 9968, "127.0.0.1", "isthmusd.service", "the agent's metrics'", MOVE))
    member = spec.get("member")
    for part, url in (("client", member["client_url"]), ("peer", member["peer_url"])) if member else ():
        # etcd listens on all addresses, whatever address others dial.
        remedy = (
            f"The mesh's etcd listens on all addresses: stop that service (and disable it), or set another "
            f"etcd.{part}_port for the whole cluster."
        )
        wanted.append(("tcp", urlsplit(url).port, None, "isthmus-etcd.service", f"etcd's {part}", remedy))
    for protocol, number, address, own, whose, remedy in wanted:
        for holder in foreign(ports.clashes(ports.bound(protocol, number), address), (own,)):
            words = f"{protocol.upper()} port {number}, {whose} port, is used by {holder}. {remedy}"
            if words not in problems:
                problems.append(words)
    return problems


def address_problems(spec):
    problems = []
    underlay = spec["node"]["underlay4"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((underlay, 0))
        except OSError:
            problems.append(
                f"The underlay address {underlay} is not an address of this host. Correct isthmus_underlay (what the "
                "host has; isthmus_advertise is what others dial)."
            )
    ranges = [ipaddress.ip_network(text) for text in (*spec["mesh_ranges4"], *spec["service_ranges4"])]
    with open("/proc/net/route", encoding="ascii") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    for row in rows:
        destination = ipaddress.ip_address(struct.pack("=I", int(row[1], 16)))
        route = ipaddress.ip_network((destination, bin(int(row[7], 16)).count("1")))
        if row[0] in (DEVICE, "*"):
            continue
        for network in ranges:
            if route.subnet_of(network):
                problems.append(
                    f"The host has a route to {route} by {row[0]}, inside the mesh's range {network}. "
                    "Choose another range in isthmus_estate, or remove that route."
                )
    return problems


def packages_missing(module, interpreter):
    """Packages by the distribution's names: the name server, what the venv is made with, and libbpf's libelf."""
    debian = packages.manager(module) == "apt-get"
    missing = []
    # None of them starts a service: Debian's dnsmasq-base has no unit, and Fedora's presets leave dnsmasq's off.
    if not os.access(DNSMASQ, os.X_OK):
        missing.append("dnsmasq-base" if debian else "dnsmasq")
    if not glob.glob("/usr/lib*/libelf.so.1") + glob.glob("/usr/lib/*/libelf.so.1"):
        missing.append("libelf1" if debian else "elfutils-libelf")
    if debian and module.run_command([interpreter, "-c", "import ensurepip"])[0] != 0:
        missing.append("python3-venv")
    return missing


def install(module, changes, missing, interpreter):
    """The missing packages are there; in check mode they are named only."""
    for name in missing:
        changes.note(f"package {name}", "", "installed")
    if not missing or module.check_mode:
        return
    packages.install(module, missing, "install the packages by hand")
    lacking = packages_missing(module, interpreter)
    if lacking:
        module.fail_json(
            msg=f"{' '.join(lacking)} was installed, but what is needed of it is not there ({DNSMASQ}, libelf.so.1, "
            f"ensurepip of {interpreter}). Next: install that by hand and run again."
        )


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "platforms": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {key: {"type": "str", "required": True} for key in ("arch", "python", "version")},
            },
            "python": {"type": "path"},
            "controller_time": {"type": "str"},
            "max_clock_skew": {"type": "int", "default": 120},
            "install": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    spec, platforms = module.params["spec"], module.params["platforms"]
    arch = platform.machine()
    problems = system_problems(module)
    if os.geteuid() == 0:
        problems += kernel_problems(arch)
        problems += port_problems(spec)
    problems += address_problems(spec)
    problems += clock_problems(module.params["controller_time"], module.params["max_clock_skew"])
    present = bundle.interpreters(module.params["python"])
    chosen = bundle.choose(arch, present, platforms)
    missing = []
    if chosen is None:
        problems.append(bundle.missing_words(spec["host"], arch, present, platforms))
    else:
        missing = packages_missing(module, chosen[1])
    problems += sorted({bundle.downgrade_words(spec["host"], item["version"]) for item in platforms} - {""})
    if missing and packages.manager(module) is None:
        problems.append(
            f"The host lacks {', '.join(missing)} (by Fedora's names), and it has neither apt-get nor dnf to install "
            "them with. Install them by hand."
        )
    if problems:
        module.fail_json(
            msg=f"{spec['host']} cannot join the mesh yet; nothing was changed on it. "
            + " ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1)),
            problems=problems,
        )
    changes = Changes(module)
    if module.params["install"]:
        install(module, changes, missing, chosen[1])
    facts = {
        "problems": [],
        "arch": arch,
        "kernel": platform.release(),
        "python": {"version": chosen[0], "path": chosen[1]},
        "packages": missing,
    }
    module.exit_json(**changes.result(**facts))


if __name__ == "__main__":
    main()
