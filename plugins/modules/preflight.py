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
    free ports, clock, addresses, its own overlay device, other programs at the mesh's hooks, name resolution, room and
    speed of the disk for etcd, on a Kubernetes node whether it forwards) and reports all problems in one message.
  - Warns on a host that joins of what may be in the way and was left alone (a firewall, SELinux, another program that
    writes resolv.conf, a disk that is slow for etcd).
  - Returns what a copy of the machine would have too, so that hosts can be compared.
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
  firewall:
    description:
      - With V(managed) M(isthmus.mesh.firewall) will open the ports in C(ufw) and C(firewalld), so that these are not
        warned about.
    type: str
    choices: [unmanaged, managed]
    default: unmanaged
  bgp:
    description:
      - What the plan has of the host in C(bgp.hosts), so that it is known before whether that can be done.
    type: dict
  passwords:
    description: By address of a router, the passwords that M(isthmus.mesh.bgp) will get, which are looked at as well.
    type: dict
    default: {}
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
joins:
  description: Whether the host is new to the mesh, or is to be reached at other addresses or ports than before.
  returned: success
  type: bool
firewalls:
  description:
    - Firewalls that are active on a host that joins and do not name all ports of the mesh, with the commands that open
      them by port, all of that in words, and whether the collection will do so.
  returned: success
  type: list
  elements: dict
  sample:
    - name: ufw
      managed: false
      commands:
        udp/8472: ufw allow 8472/udp
      words: "ufw is active (`ufw status`). It was left alone. Unless it lets in the mesh's hosts already, this opens
        what the mesh needs: `ufw allow 8472/udp`; `ufw allow in on isthmus0`."
ipsec:
  description: Whether the host had a part in tunnels between gateways of sites, or has something left of it.
  returned: success
  type: bool
tunnels:
  description:
    - On a gateway those hosts that are gateways of other sites, with which it is to have tunnels, where it has had no
      part in a tunnel with that site so far, each with the address at which it is reached.
  returned: success
  type: list
  elements: dict
  sample:
    - host: cloud-1
      address: 203.0.113.7
fsync:
  description:
    - How long durable writes take on the file system that will hold etcd's data, in milliseconds. V(none) where no
      member is to be made.
  returned: success
  type: dict
  sample:
    count: 50
    median: 1.2
    slow: 4.8
underlay_mtu:
  description: MTU in bytes of the link that has the host's underlay address. V(none) where nobody tells it.
  returned: success
  type: int
  sample: 1500
kubernetes:
  description:
    - On a host of a Kubernetes cluster its name, its addresses, and whether its registrar was let into Kubernetes
      before (V(none) where there is no registrar). V(none) on other hosts.
  returned: success
  type: dict
  sample:
    host: kube-1
    addresses: [198.18.4.11]
    credential: true
bgp:
  description: Whether FRR on the host is configured by M(isthmus.mesh.bgp).
  returned: success
  type: bool
installed:
  description:
    - Host of this estate whose specification is on the host. Another one's is there on a copy of its machine. V(none)
      where there is none.
  returned: always
  type: str
  sample: db-1
public_keys:
  description:
    - Public keys of the private ones of WireGuard that are on the host and that it would go on with, in base64, by the
      private one's file.
  returned: always
  type: dict
  sample: {"/etc/isthmus/pki/wireguard.key": "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="}
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

import contextlib
import glob
import ipaddress
import os
import platform
import re
import socket
import struct
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import (
    bpfprobe,
    bundle,
    clock,
    estate,
    etcd_unit,
    firewall,
    frr,
    gateways,
    links,
    listener,
    packages,
    ports,
    resolver,
    storage,
    strongswan,
    wireguard,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec, openings, strangers
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.spec import (
    IPSEC_OVERHEAD,
    IPSEC_PORTS,
    LEAST_MTU,
    OVERLAY_OVERHEAD,
    WIREGUARD_OVERHEAD,
)

DEVICE = "isthmus0"
PROTOCOL = "73"  # of the routes that the agent makes
DNSMASQ = "/usr/sbin/dnsmasq"
MOVE = "Stop that service or make it listen on other addresses only."
LOOPBACK_ONLY = {
    "dnsmasq": "`listen-address=127.0.0.1` and `bind-interfaces` in its configuration",
    "unbound": "`interface: 127.0.0.1` in its server section",
    "named": "`listen-on { 127.0.0.1; };` in its options",
    "pdns_recursor": "`local-address=127.0.0.1` in its configuration",
}
SELINUX = "/sys/fs/selinux/enforce"
BUNDLE_ROOM = 256 * 1024**2  # an environment unpacked, and the one that it replaces
SYSCTL = "/proc/sys/net/ipv4"


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


def hook_findings():
    """Programs of others that decide, as ours do, where a connection goes."""
    root = bpfprobe.cgroup2_mount()
    found = {} if root is None else bpfprobe.foreign_programs(root)
    return [strangers.hook_words(found, root)] if found else []


def node_findings(spec):
    """(problems, warnings) of a Kubernetes node: how its kernel passes on what is not its own."""
    if spec["node"].get("kubernetes_node") is None:
        return [], []
    problems, doubts = [], []
    if (read_bytes(f"{SYSCTL}/ip_forward") or b"").strip() == b"0":
        problems.append(
            "net.ipv4.ip_forward is 0, so that this node passes nothing on to its pods. Set it to 1 "
            "(`sysctl -w net.ipv4.ip_forward=1`, and in /etc/sysctl.d for the next boot)."
        )
    strict = [
        name for name in ("all", "default") if (read_bytes(f"{SYSCTL}/conf/{name}/rp_filter") or b"").strip() == b"1"
    ]
    if strict:
        doubts.append(
            f"net.ipv4.conf.{strict[0]}.rp_filter is 1 (strict): a packet is dropped when the way back to its source "
            "is another link than the one it came by, which with several links, or a CNI with a way of its own, is no "
            "error. Next: when pods and other clusters do not reach each other, set it to 2 (loose)."
        )
    return problems, doubts


def kubernetes_facts(module, spec):
    """What is compared with the cluster's Kubernetes; None on a host of another cluster."""
    if spec.get("cluster", {}).get("kubernetes") is None:
        return None
    addresses = [
        one["local"]
        for link in links.listed(module, "address")
        for one in link.get("addr_info", [])
        if one.get("family") == "inet" and one.get("scope") == "global"
    ]
    api = (spec.get("registrar") or {}).get("kubernetes")
    credential = None if api is None else os.path.exists(api["cert"])
    return {"host": spec["host"], "addresses": addresses, "credential": credential}


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
    """Sockets that are not held by the unit `own`, nor by what listens for other hosts' probes: (socket, words)."""
    others = []
    for one in found:
        process, unit = ports.holder(one)
        if unit not in (*own, listener.UNIT):
            others.append((one, f"{process}{' of ' + unit if unit else ''} on {one.address}"))
    return others


def device_problems(found, spec):
    """A link of our device's name that we did not make. The agent would replace it."""
    port = spec["overlay"]["port"]
    for link in found:
        if link.get("ifname") != DEVICE:
            continue
        kind, data = (
            link.get("linkinfo", {}).get("info_kind", "physical"),
            link.get("linkinfo", {}).get("info_data", {}),
        )
        if kind != "vxlan" or not data.get("external"):
            what = f"a {kind} link, not the mesh's"
        elif data.get("port") != port:
            what = f"a VXLAN device on UDP port {data.get('port')}, of another mesh or of an earlier one"
        else:
            continue
        return [
            f"The host has a network link {DEVICE} that is {what} (`ip -d link show {DEVICE}`). The mesh's device has "
            f"that name. Find out what made it, rename it (`ip link set {DEVICE} name OTHER`) or delete it."
        ]
    return []


def vxlan_words(found, port):
    """Names of the VXLAN devices on a port, and whose they usually are."""
    names = []
    for link in found:
        info = link.get("linkinfo", {})
        if info.get("info_kind") == "vxlan" and info.get("info_data", {}).get("port") == port:
            names.append(link["ifname"])
    return f": {strangers.device_words(names)}" if names else ""


def etcd_words(one, unit_words):
    """Which etcd has a port of ours: its name, cluster token and data, as it was started with them."""
    if not unit_words.startswith("etcd "):
        return ""
    arguments, environment = ports.started_as(one)
    told = []
    options = (("name", "name"), ("initial-cluster-token", "cluster token"), ("data-dir", "data"))
    for option, what in options:
        value = environment.get("ETCD_" + option.replace("-", "_").upper(), "")
        for place, word in enumerate(arguments):
            name, equals, given = word.lstrip("-").partition("=")
            if word.startswith("-") and name == option:
                value = given if equals else "".join(arguments[place + 1 : place + 2])
        if value:
            told.append(f"{what} {value}")
    return f": the etcd of something else ({', '.join(told) or 'it does not say of what'})"


def port_problems(spec, found, name_server):
    """Ports of ours that others have; `name_server` is the address at which the mesh's will answer."""
    problems = []
    port = spec["overlay"]["port"]
    if not os.path.exists(f"/sys/class/net/{DEVICE}"):
        for one, holder in foreign(ports.bound("udp", port), ()):
            whose = vxlan_words(found, port) if one.inode == 0 else ""
            problems.append(strangers.port_words(port, f"{holder}{whose}"))
    for device, tunnel in zip(openings.devices(spec), openings.tunnels(spec)):
        if os.path.exists(f"/sys/class/net/{device}"):
            continue
        number = tunnel["port"]
        for _one, holder in foreign(ports.bound("udp", number), ()):
            problems.append(
                f"UDP port {number}, WireGuard's, is used by {holder}: by another WireGuard (`wg show`; Cilium has its "
                "own on this port) or another program. Two cannot share it, and it is one for all hosts: free it, or "
                "leave the sites of this host without encryption."
            )
    if (spec.get("ipsec") or {}).get("connections"):
        for number in IPSEC_PORTS:
            for _one, holder in foreign(ports.bound("udp", number), (strongswan.UNIT,)):
                problems.append(
                    f"UDP port {number}, that of IPsec, is used by {holder}: strongSwan of the unit {strongswan.UNIT} "
                    "must have it. Two cannot share it: free it (an older strongSwan is `strongswan-starter.service`), "
                    "or name another host of the site as its gateway."
                )
    wanted = [
        (protocol, 53, name_server, "isthmus-dns.service", "the name server's", MOVE) for protocol in ("udp", "tcp")
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
        for one, holder in foreign(ports.clashes(ports.bound(protocol, number), address), (own,)):
            way = LOOPBACK_ONLY.get(holder.split()[0]) if number == 53 else None
            words = (
                f"{protocol.upper()} port {number}, {whose} port, is used by {holder}"
                f"{etcd_words(one, holder) if protocol == 'tcp' else ''}. {remedy}{f' Here: {way}.' if way else ''}"
            )
            if words not in problems:
                problems.append(words)
    return problems


def is_own_route(module, route):
    """Whether the agent made it."""
    code, out, _err = module.run_command(["ip", "-4", "route", "show", "exact", str(route), "proto", PROTOCOL])
    return code == 0 and bool(out.strip())


def address_problems(module, spec):
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
            if route.subnet_of(network) and not is_own_route(module, route):
                problems.append(
                    f"The host has a route to {route} by {row[0]}, inside the mesh's range {network}. "
                    "Choose another range in isthmus_estate, or remove that route."
                )
    return problems


def underlay_link(found, spec):
    """Of links with their addresses that which has the host's underlay address; none if nobody tells."""
    underlay = spec["node"]["underlay4"]
    return next((link for link in found if any(one.get("local") == underlay for one in link.get("addr_info", []))), {})


def mtu_problems(link, spec):
    """The link below the mesh carries too little for what is around packets of workloads."""
    around = {"VXLAN": OVERLAY_OVERHEAD}
    around |= {"WireGuard": WIREGUARD_OVERHEAD} if spec.get("wireguard") else {}
    around |= {"the tunnel between gateways": IPSEC_OVERHEAD} if spec.get("ipsec") else {}
    least, name = LEAST_MTU + sum(around.values()), link.get("ifname")
    if link.get("mtu", least) >= least:
        return []
    return [
        f"The link {name}, which has the underlay address {spec['node']['underlay4']}, carries {link['mtu']} bytes, "
        f"and at least {least} are needed: {LEAST_MTU} of a workload's packet, which IPv4 asks of every network, "
        f"inside {' and '.join(around)}. Give it a larger MTU (`ip link set {name} mtu ...`, and in its configuration) "
        "on all of the way to the other hosts, or choose another isthmus_underlay."
    ]


def installed_spec():
    """The spec of the mesh that this host is in; None when it is in none, or its spec cannot be read."""
    with contextlib.suppress(ValueError):
        found = estate.read_json(estate.NODE)
        return found if isinstance(found, dict) else None
    return None


def copied(spec, installed):
    """What tells, beside what other hosts have, that the machine is a copy of one of them."""
    own = (installed or {}).get("host") if (installed or {}).get("estate") == spec.get("estate") else None
    keys = {one["key"]: wireguard.public_key(one["key"]) for one in openings.tunnels(spec)} if os.geteuid() == 0 else {}
    return {
        "installed": own if isinstance(own, str) else None,
        "public_keys": {path: key for path, key in keys.items() if key is not None},
    }


def place(spec):
    """Where other hosts reach a host."""
    member = spec.get("member") or {}
    node, overlay = spec.get("node", {}), spec.get("overlay", {})
    addresses = node.get("underlay4"), node.get("advertise4")
    return (*addresses, overlay.get("port"), member.get("client_url"), member.get("peer_url"))


def ways(spec):
    """With which sites packets are encrypted, or that is being changed: which ports others need."""
    section = spec.get("wireguard") or {}
    listening = sorted(tunnel["port"] for tunnel in openings.tunnels(spec))
    return listening, sorted(section.get("plain_sites", ())), sorted(section.get("changing", ()))


def estate_problems(spec, installed):
    if installed is None or installed.get("estate") == spec.get("estate"):
        return []
    return [
        f"The host is in the mesh of the estate {installed.get('estate')} ({estate.NODE}), and this is the estate "
        f"{spec.get('estate')}. A host is in one. Take it out of the other with the inventory of that "
        f"(`isthmus.mesh.teardown --limit {spec['host']}`), or out of this one."
    ]


def disk_findings(spec):
    """(problems, warnings, durable writes) of the disks that get something new; nothing where all is there already."""
    problems, doubts = [], []
    room = storage.free(bundle.ROOT)
    if not os.path.exists(bundle.CURRENT) and room < BUNDLE_ROOM:
        problems.append(
            f"{storage.size(room)} are free for {bundle.ROOT}, and the agent takes {storage.size(BUNDLE_ROOM)}. "
            "Make room."
        )
    member = spec.get("member")
    if member is None or os.path.isdir(f"{etcd_unit.DATA}/member"):
        return problems, doubts, None
    free, quota = storage.free(etcd_unit.DATA), member["quota_bytes"]
    least, most = storage.etcd_room(quota)
    where = f"{storage.existing(etcd_unit.DATA)} (for {etcd_unit.DATA})"
    if free < least:
        problems.append(
            f"{storage.size(free)} are free at {where}, and etcd needs {storage.size(least)} to begin. With a full "
            "disk it stops, and with it every change of the cluster. Make room, or mount a larger disk there."
        )
    elif free < most:
        doubts.append(
            f"{storage.size(free)} are free at {where}; etcd can come to need {storage.size(most)}: its data up to "
            f"etcd.quota_bytes ({storage.size(quota)}), a snapshot of it and its log. Next: make room before it grows "
            "so far, or set a smaller quota_bytes."
        )
    try:
        syncs = storage.measure(etcd_unit.DATA)
    except OSError as exc:
        problems.append(f"Nothing can be written at {where}: {exc.strerror}. Mount it writable, or make room.")
        return problems, doubts, None
    figure = (
        f"The 99th percentile of {syncs.count} durable writes (fdatasync of 2 KiB) at {where} is "
        f"{syncs.slow * 1000:.1f} ms, the median {syncs.median * 1000:.1f} ms"
    )
    if syncs.median > storage.UNUSABLE:
        problems.append(
            f"{figure}. etcd waits for one with every change, and elects a new leader when the old one is silent for "
            "2 s: it would not stay up there. Put its data on a local SSD."
        )
    elif syncs.slow > storage.GUIDANCE:
        doubts.append(
            f"{figure}; etcd wants less than {storage.GUIDANCE * 1000:.0f} ms. It will work, and be slow or change its "
            "leader when the disk is busy. Next: put its data on a local SSD, or off a disk that others write to."
        )
    return (
        problems,
        doubts,
        {
            "count": syncs.count,
            "median": round(syncs.median * 1000, 2),
            "slow": round(syncs.slow * 1000, 2),
        },
    )


def firewalls(module, spec):
    """Those that are active and do not let all in on the host's ports (docs/ports.md)."""
    return firewall.find(module, openings.listens(spec), links.of_address(module, spec["node"]["underlay4"]))


def selinux_doubts():
    if (read_bytes(SELINUX) or b"").strip() != b"1":
        return []
    return [
        "SELinux is enforcing. It was left alone, and the collection brings no policy of its own: etcd and agent run "
        "unconfined where the distribution's policy has services of unknown programs so, dnsmasq in its own domain, "
        "which must be able to read /etc/isthmus/dnsmasq.conf and /run/isthmus/dns/hosts. Next: when a unit of the "
        "mesh does not start, `ausearch -m avc -ts recent` names what was denied, and `audit2allow` makes a rule of it."
    ]


def packages_missing(module, spec):
    """Packages by the distribution's names: the name server, libbpf's libelf, WireGuard."""
    debian = packages.manager(module) == "apt-get"
    missing = []
    # None of them starts a service: Debian's dnsmasq-base has no unit, and Fedora's presets leave dnsmasq's off.
    if not os.access(DNSMASQ, os.X_OK):
        missing.append("dnsmasq-base" if debian else "dnsmasq")
    if not glob.glob("/usr/lib*/libelf.so.1") + glob.glob("/usr/lib/*/libelf.so.1"):
        missing.append("libelf1" if debian else "elfutils-libelf")
    if spec.get("wireguard") is not None:
        if not os.access(wireguard.TOOL, os.X_OK):
            missing.append("wireguard-tools")
        if not os.access(wireguard.USER_SPACE, os.X_OK) and not wireguard.in_kernel(module):
            missing.append("wireguard-go")
    return missing


def install(module, changes, missing, spec):
    """The missing packages are there; in check mode they are named only."""
    for name in missing:
        changes.note(f"package {name}", "", "installed")
    if not missing or module.check_mode:
        return
    packages.install(module, missing, "install the packages by hand")
    lacking = packages_missing(module, spec)
    if lacking:
        module.fail_json(
            msg=f"{' '.join(lacking)} was installed, but what is needed of it is not there ({DNSMASQ}, libelf.so.1, "
            f"{wireguard.TOOL}, {wireguard.USER_SPACE}). Next: install that by hand and run again."
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
            "firewall": {"type": "str", "choices": ["unmanaged", "managed"], "default": "unmanaged"},
            "install": {"type": "bool", "default": False},
            "bgp": {"type": "dict"},
            "passwords": {"type": "dict", "default": {}, "no_log": True},
        },
        supports_check_mode=True,
    )
    spec, platforms = module.params["spec"], module.params["platforms"]
    arch = platform.machine()
    installed = installed_spec()
    moves = installed is None or place(installed) != place(spec)
    begun = ipsec.begun(spec, installed or {})
    joins = moves or ways(installed) != ways(spec) or bool(begun)
    problems, doubts, syncs, walls = system_problems(module), [], None, []
    ours = firewall.MANAGED if module.params["firewall"] == "managed" else ()
    resolved = module.run_command(["systemctl", "is-active", "--quiet", "systemd-resolved.service"])[0] == 0
    names = resolver.probe(resolved)
    if os.geteuid() == 0:
        problems += kernel_problems(arch)
        found = links.listed(module, "link")
        problems += device_problems(found, spec) if installed is None else []
        problems += port_problems(spec, found, resolver.server(names, spec["node"]["mesh4"]))
        disk = disk_findings(spec)
        problems, doubts, syncs = problems + disk[0], doubts + disk[1], disk[2]
        hooks, node = hook_findings(), node_findings(spec)
        # In a mesh that runs it is told: one node must not keep all others from their changes.
        problems, doubts = problems + (hooks + node[0] if moves else []), doubts + ([] if moves else hooks + node[0])
        doubts += node[1] if moves else []
        walls = firewalls(module, spec) if joins else []
        doubts += [firewall.describe(one) for one in walls if one.name not in ours]
    if moves:
        resolution = resolver.obstacles(names)
        problems, doubts = problems + resolution[0], doubts + resolution[1] + selinux_doubts()
    problems += estate_problems(spec, installed)
    problems += address_problems(module, spec)
    link = underlay_link(links.listed(module, "address"), spec)
    problems += mtu_problems(link, spec) if joins else []
    own = module.params["bgp"]
    problems += frr.problems(module, own) if own and not own.get("kept") else []
    problems += clock_problems(module.params["controller_time"], module.params["max_clock_skew"])
    present = bundle.interpreters(module.params["python"])
    chosen = bundle.choose(arch, present, platforms)
    missing = []
    if chosen is None:
        problems.append(bundle.missing_words(spec["host"], arch, present, platforms))
    else:
        missing = packages_missing(module, spec)
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
            **copied(spec, installed),
        )
    changes = Changes(module)
    if module.params["install"]:
        doubts = []  # they were told when the host was probed
        install(module, changes, missing, spec)
    facts = {
        "problems": [],
        "arch": arch,
        "kernel": platform.release(),
        "python": {"version": chosen[0], "path": chosen[1]},
        "packages": missing,
        "joins": joins,
        "firewalls": [
            {
                "name": one.name,
                "commands": one.commands,
                "words": firewall.describe(one),
                "managed": one.name in ours,
            }
            for one in walls
        ],
        "fsync": syncs,
        "underlay_mtu": link.get("mtu"),
        "ipsec": gateways.left(),
        "tunnels": [ipsec.other_end(one) for one in begun if one["ours"]],
        "kubernetes": kubernetes_facts(module, spec),
        "bgp": frr.ours(),
        **copied(spec, installed),
    }
    for words in doubts:
        module.warn(f"{spec['host']}: {words}")
    module.exit_json(**changes.result(**facts))


if __name__ == "__main__":
    main()
