#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: teardown
short_description: Take a host out of the mesh and leave it as it was
version_added: 1.0.0
description:
  - Stops and removes the mesh's units, restores the host's name resolution, and removes the overlay device, routes,
    routing rules, pinned BPF programs and maps, files and users that the collection made, on etcd hosts also the data
    of etcd.
  - Takes the rules that M(isthmus.mesh.firewall) added out of the host's firewall, and gives FRR back as it was before
    M(isthmus.mesh.bgp); where it came with the mesh it is off.
  - Needs neither the bundle nor a running agent, so it also clears away what an interrupted run left.
  - Distribution packages stay installed. A directory of ours that is a mount point, or a link of the operator's to
    another place, is emptied and stays.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  confirm:
    description:
      - Must be V(yes), as text. The keys and the data of etcd cannot be brought back.
    type: str
    required: true
seealso:
  - module: isthmus.mesh.node
"""

EXAMPLES = r"""
- name: The host is no member of the mesh
  isthmus.mesh.teardown:
    confirm: "yes"
"""

RETURN = r"""
removed:
  description: What was removed or restored.
  returned: always
  type: list
  elements: str
  sample:
    - unit isthmusd.service
    - device isthmus0
notes:
  description: What of the operator's own was emptied and stays.
  returned: always
  type: list
  elements: str
  sample:
    - /var/lib/isthmus/etcd is emptied and stays, because something is mounted there
"""

import contextlib
import os
import pwd
import re
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import (
    bundle,
    etcd_unit,
    firewall,
    frr,
    gateways,
    netfilter,
    resolver,
    strongswan,
    units,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.generations import BOOT
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.generations import UNIT as ROLLBACK
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.spec import WIREGUARD_DEVICES

DEVICES = ("isthmus0", *WIREGUARD_DEVICES)
PROTOCOL = units.ROUTE_PROTOCOL
TABLE = "isthmus"  # of nf_tables, for ip
BPFFS = "/sys/fs/bpf"
PINS = BPFFS + "/isthmus"
BPFFS_UNIT = "isthmus-bpffs.service"
USER = "isthmus-etcd"
PLACES = ("/etc/isthmus", "/var/lib/isthmus", "/run/isthmus", "/opt/isthmus")
MOUNTS = "/proc/self/mountinfo"

# By name: what else is called isthmus-something, such as an operator's timer for backups, is not ours.
UNITS = (
    "isthmus-dns-reload.path",
    "isthmus-dns-reload.service",
    "isthmus-dns.service",
    etcd_unit.DEFRAG_TIMER,
    etcd_unit.DEFRAG_SERVICE,
    "isthmus-registrar.service",
    "isthmus-resolved.service",
    units.BOOT_ROUTES_UNIT,
    *units.WIREGUARD,
    strongswan.KEEPER_UNIT,
    strongswan.GUARD_UNIT,
    strongswan.ROUTES_UNIT,
    os.path.basename(BOOT),
    "isthmusd.service",
    BPFFS_UNIT,
    etcd_unit.SERVICE,
)


def mount_points():
    """Where something is mounted. os.path.ismount does not see a bind mount from the same file system."""
    with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
        fields = [line.split()[4] for line in file]
    # Blanks and backslashes are octal: proc(5).
    return {re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), field) for field in fields}


def removable(path, mounts, stays=False):
    """The largest things that can be removed of `path`: itself, unless it `stays` or something is mounted in it."""
    if not stays and path not in mounts and not any(one.startswith(path + "/") for one in mounts):
        return [path]
    found = []
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else ():
        if path not in mounts or name != "lost+found":  # the file system's own
            found += removable(os.path.join(path, name), mounts)
    return found


class Teardown:
    """One step after the other, each safe to repeat: what serves names and connections goes first, files last."""

    def __init__(self, module):
        self.module = module
        self.changes = Changes(module)
        self.systemd = units.Systemd(module)
        self.removed = []
        self.notes = []

    def gone(self, what):
        self.removed.append(what)
        self.changes.note(what, "present", "")

    def command(self, *words):
        code, out, err = self.module.run_command(list(words))
        if code != 0:
            self.fail(f"`{' '.join(words)}` failed: {(err or out).strip()}")
        return out

    def fail(self, words):
        self.module.fail_json(
            msg=f"{words}. Run the teardown again when that is solved; "
            f"done so far: {', '.join(self.removed) or 'nothing'}.",
            removed=self.removed,
        )

    def run(self):
        self.timer()
        self.resolver()
        self.units()
        self.networkd()
        self.distribution_unit()
        self.gateway()
        self.device()
        self.table()
        self.filters()
        self.removed += [f"rules in {name}" for name in firewall.close(self.module, self.changes)]
        self.removed += frr.absent(self.module, self.changes)
        self.pins()
        if os.path.islink(etcd_unit.DATA):  # with the link alone the data would stay behind
            self.tree(etcd_unit.DATA)
        for path in PLACES:
            self.tree(path)
        if os.path.lexists(bundle.COMMAND):
            self.gone(bundle.COMMAND)
            if not self.module.check_mode:
                os.unlink(bundle.COMMAND)
        self.user()

    def timer(self):
        """Of a change that nobody confirmed: it would bring back what is taken away now."""
        names = [f"{ROLLBACK}.timer", f"{ROLLBACK}.service"]
        for name, state in self.systemd.show(names).items():
            if state.get("ActiveState") in ("active", "activating"):
                self.gone(f"unit {name}")
                if not self.module.check_mode:
                    self.command("systemctl", "stop", name)

    def resolver(self):
        found = resolver.probe(resolved_active=False)
        if not found.joined:
            return
        self.removed.append(resolver.RESOLV_CONF)
        if found.link is not None:
            self.changes.note(resolver.RESOLV_CONF, "", "a link to " + found.link)
            if not self.module.check_mode:
                temporary = resolver.RESOLV_CONF + ".isthmus-teardown"
                if os.path.lexists(temporary):  # of an interrupted run
                    os.unlink(temporary)
                os.symlink(found.link, temporary)
                os.replace(temporary, resolver.RESOLV_CONF)
        elif found.original is not None:
            self.changes.file(resolver.RESOLV_CONF, found.original)
        else:
            self.changes.absent(resolver.RESOLV_CONF)

    def units(self):
        names = [name for name in UNITS if os.path.lexists(os.path.join(units.UNIT_DIRECTORY, name))]
        self.tree(os.path.dirname(etcd_unit.FIRST_START))
        if not names:
            return
        mounted = self.systemd.show([BPFFS_UNIT])[BPFFS_UNIT].get("ActiveState") == "active"
        for name in names:
            self.removed.append(f"unit {name}")
        if not self.module.check_mode:
            self.command("systemctl", "disable", "--now", "--quiet", *names)
        for name in names:
            self.changes.absent(os.path.join(units.UNIT_DIRECTORY, name))
        if not self.module.check_mode:
            self.command("systemctl", "daemon-reload")
            # A unit that failed is remembered until then; one that did not is unknown now, which is no failure.
            self.module.run_command(["systemctl", "reset-failed", *names])
        if mounted:
            self.pins()
            if set(os.listdir(BPFFS)) - {os.path.basename(PINS)}:
                self.module.warn(f"{BPFFS} stays mounted: another program has pinned something there since")
                return
            self.gone(f"mount {BPFFS}")
            if not self.module.check_mode:
                self.command("umount", BPFFS)

    def networkd(self):
        """Its own settings again, from its next start on."""
        if self.changes.absent(units.NETWORKD_DROP_IN):
            self.removed.append(units.NETWORKD_DROP_IN)
            if not self.module.check_mode:
                with contextlib.suppress(OSError):  # others' settings are there
                    os.rmdir(os.path.dirname(units.NETWORKD_DROP_IN))

    def distribution_unit(self):
        """The distribution's own etcd unit as it was before we masked it; off when the package came with us."""
        before, name = read_bytes(etcd_unit.MASKED), etcd_unit.DISTRIBUTION
        if before is None:
            return
        path = os.path.join(units.UNIT_DIRECTORY, name)
        if os.path.islink(path) and os.readlink(path) == "/dev/null":
            self.gone(f"mask of {name}")
            if not self.module.check_mode:
                self.command("systemctl", "unmask", "--quiet", name)
        # Not before: systemd disables no masked unit.
        if not self.module.check_mode and before == b"absent":
            found = self.systemd.show([name])[name]
            if found.get("UnitFileState") == "enabled":
                self.command("systemctl", "disable", "--quiet", name)

    def gateway(self):
        """The tunnels of a site's gateway, and the rules that keep packets from other ways."""
        before = len(self.changes.diff)
        gateways.apply(self.module, self.changes, None, {})
        self.removed += [entry["before_header"] for entry in self.changes.diff[before:]]

    def device(self):
        for device in DEVICES:
            if os.path.exists(f"/sys/class/net/{device}"):
                self.gone(f"device {device}")
                if not self.module.check_mode:
                    self.command("ip", "link", "delete", device)
        # A kernel without IPv6 answers the question with an error.
        for family in ("-4", "-6") if os.path.exists("/proc/net/if_inet6") else ("-4",):
            rules = self.command("ip", family, "rule", "show").splitlines()
            for rule in rules:
                looked_up = re.search(rf"\blookup (\S+)(?: .*)? proto {PROTOCOL}\b", rule)
                if looked_up is None:
                    continue
                ours = ["priority", rule.split(":", 1)[0], "table", looked_up.group(1), "protocol", PROTOCOL]
                self.gone(f"rule {rule.strip()}")
                if not self.module.check_mode:
                    self.command("ip", family, "rule", "delete", *ours)
            routes = self.command("ip", family, "route", "show", "table", "all", "proto", PROTOCOL).splitlines()
            if routes:
                for route in routes:
                    self.gone(f"route {route.strip()}")
                if not self.module.check_mode:
                    self.command("ip", family, "route", "flush", "table", "all", "proto", PROTOCOL)

    def filters(self):
        """Programs on the underlay's devices, where something was routed natively; others went with their device."""
        code, out, _err = self.module.run_command(["tc", "qdisc", "show"])
        for device in re.findall(r"^qdisc clsact \S+ dev (\S+) ", out, re.MULTILINE) if code == 0 else ():
            for side in ("ingress", "egress"):
                shown = self.command("tc", "filter", "show", "dev", device, side, "pref", PROTOCOL)
                name = f"underlay_{side}"
                # The kernel keeps 15 characters of a name; libbpf puts the program's number behind it.
                if re.search(rf"\b{name[:15]}", shown):
                    self.gone(f"program {name} on {device}")
                    if not self.module.check_mode:
                        self.command("tc", "filter", "del", "dev", device, side, "pref", PROTOCOL)

    def table(self):
        """What keeps others from masquerading packets of workloads and pods."""
        if netfilter.has_table(TABLE):
            self.gone(f"nft table ip {TABLE}")
            if not self.module.check_mode:
                try:
                    netfilter.delete_table(TABLE)
                except OSError as error:
                    self.fail(f"cannot remove nft table ip {TABLE}: {error.strerror}")

    def pins(self):
        self.tree(PINS)

    def tree(self, path):
        """Remove a directory with all in it; a mount point in it, or the directory that a link names, is emptied."""
        if not os.path.lexists(path):
            return
        place, linked, mounts = os.path.realpath(path), os.path.islink(path), mount_points()
        doomed = removable(place, mounts, stays=linked)
        if not doomed:
            return
        whole = doomed == [place]
        self.gone(path if whole else f"content of {path}")
        if linked:
            self.notes.append(f"{place} is emptied and stays, because {path} is a link to it")
        for one in sorted(mounts):
            if one.startswith(place + "/") or (one == place and not linked):
                self.notes.append(f"{one} is emptied and stays, because something is mounted there")
        if not self.module.check_mode:
            for one in doomed:
                if os.path.isdir(one) and not os.path.islink(one):
                    shutil.rmtree(one)
                else:
                    os.unlink(one)

    def user(self):
        try:
            pwd.getpwnam(USER)
        except KeyError:
            return
        self.gone(f"user {USER}")
        if not self.module.check_mode:
            self.command("userdel", USER)


def main():
    module = AnsibleModule(
        argument_spec={"confirm": {"type": "str", "required": True}},
        supports_check_mode=True,
    )
    if module.params["confirm"] not in ("yes", "True", "true"):
        module.fail_json(
            msg="The teardown removes keys and the data of etcd for good. Nothing was changed. Confirm it: "
            "confirm: 'yes' of the module, -e isthmus_confirm_teardown=ESTATE of the playbook isthmus.mesh.teardown."
        )
    teardown = Teardown(module)
    teardown.run()
    for note in teardown.notes:
        module.warn(note)
    module.exit_json(**teardown.changes.result(removed=teardown.removed, notes=teardown.notes))


if __name__ == "__main__":
    main()
