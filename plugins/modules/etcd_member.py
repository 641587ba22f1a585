#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: etcd_member
short_description: Run this host's member of its cluster's etcd
version_added: 1.0.0
description:
  - Installs etcd (the distribution's package or an archive), writes C(/etc/isthmus/etcd.env) and the unit
    C(isthmus-etcd.service), and brings the member up.
  - A cluster forms as one member; every other one joins as a learner and is promoted when it has caught up. Members may
    be brought up together, one by one or with C(--limit), in any order.
  - A data directory that exists is never overwritten or initialised again. A member without data joins when another one
    serves, forms the cluster when there cannot be one, and is refused when that cannot be told.
  - A running member is restarted only when its configuration changed, in its turn, while all others are healthy, after
    a snapshot to C(/var/lib/isthmus/snapshots). A cluster of one has a gap then; the result says so.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  formed:
    description:
      - Whether the estate record shows that this cluster's etcd existed before.
      - Then a member without data never forms a new cluster.
    type: bool
    default: false
  former:
    description:
      - The member that forms the cluster in this run when there is none; others wait for it.
      - By default the member that the spec names as the initial one.
    type: str
  archive:
    description: Path on this host of etcd's release archive, when the spec's source is an archive given by path.
    type: path
  timeout:
    description: Seconds to wait for each step of joining, and for health.
    type: int
    default: 180
seealso:
  - module: isthmus.mesh.etcd_access
"""

EXAMPLES = r"""
- name: Run the member
  isthmus.mesh.etcd_member:
    spec: "{{ isthmus_spec }}"
  when: isthmus_spec.member is not none
"""

RETURN = r"""
action:
  description: What was done, V(formed), V(joined), V(restarted), V(started) or V(none).
  returned: success
  type: str
  sample: joined
members:
  description: Names of all members.
  returned: success, not in check mode when the member does not run yet
  type: list
  elements: str
  sample: [onprem-1, onprem-2, onprem-3]
leader:
  description: Name of the leader.
  returned: success, not in check mode when the member does not run yet
  type: str
version:
  description: Version of the etcd server.
  returned: success, not in check mode when the member does not run yet
  type: str
  sample: 3.4.23
notes:
  description: What a person should know, such as a gap by a restart.
  returned: success
  type: list
  elements: str
"""

import glob
import os
import pwd
import re
import shutil
import tarfile
import tempfile
import time
import zlib

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import fetch_file
from ansible_collections.isthmus.mesh.plugins.module_utils import bundle, etcd_unit, packages
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, atomic_write, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module
from ansible_collections.isthmus.mesh.plugins.module_utils.units import (
    CONFIG_VARIABLE,
    Units,
    config_digest,
    process_environment,
)

VERSION_FLOOR = (3, 4, 0)
ARCHIVES = bundle.ETCD
SNAPSHOTS = "/var/lib/isthmus/snapshots"
SNAPSHOTS_KEPT = 5
PACKAGES = {"apt-get": "etcd-server", "dnf": "etcd"}


class Install:
    """The etcd binary of the declared source."""

    def __init__(self, module, changes, source):
        self.module = module
        self.changes = changes
        self.source = source

    def binary(self):
        """Path of a binary that is new enough; installs it. None when that is only predicted."""
        found = self.from_package() if self.source["type"] == "package" else self.from_archive()
        if found is not None:
            self.version(found)
        return found

    def version(self, binary):
        """The binary's version as text; fails below the floor."""
        code, out, err = self.module.run_command([binary, "--version"])
        match = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", out)
        if code != 0 or match is None:
            self.module.fail_json(msg=f"`{binary} --version` does not tell a version: {(err or out).strip()}")
        if tuple(int(part) for part in match.groups()) < VERSION_FLOOR:
            floor = ".".join(str(part) for part in VERSION_FLOOR)
            self.module.fail_json(
                msg=f"etcd {'.'.join(match.groups())} ({binary}) is too old, {floor} is the oldest that works. "
                "Declare a newer one: etcd.source with type archive, a path or url, and its sha256"
            )
        return ".".join(match.groups())

    def from_package(self):
        """The distribution's etcd; its own unit is kept from starting and holding the ports."""
        binary = "/usr/bin/etcd"
        manager = packages.manager(self.module)
        if not os.path.exists(binary):
            if manager is None:
                self.module.fail_json(
                    msg="this host has neither apt-get nor dnf to install etcd with. Declare etcd.source with type "
                    "archive, a path or url, and its sha256"
                )
            self.changes.note(f"package {PACKAGES[manager]}", "", "installed")
            self.mask("absent")
            if self.module.check_mode:
                return None
            packages.install(self.module, [PACKAGES[manager]], "declare etcd.source with type archive")
        elif self.unit_state() == "enabled":
            self.mask("enabled")
        return binary

    def unit_state(self):
        """`systemctl is-enabled` of the distribution's unit, when it is not running: a running one is somebody's."""
        _code, active, _err = self.module.run_command(["systemctl", "is-active", etcd_unit.DISTRIBUTION])
        _code, enabled, _err = self.module.run_command(["systemctl", "is-enabled", etcd_unit.DISTRIBUTION])
        return "in use" if active.strip() in ("active", "activating") else enabled.strip()

    def mask(self, before):
        path = "/etc/systemd/system/" + etcd_unit.DISTRIBUTION
        if os.path.islink(path) and os.readlink(path) == "/dev/null":
            return
        self.changes.note(etcd_unit.DISTRIBUTION, before, "masked")
        if not self.module.check_mode:
            # First: what the teardown undoes. A mask that somebody else made stays.
            os.makedirs(os.path.dirname(etcd_unit.MASKED), exist_ok=True)
            atomic_write(etcd_unit.MASKED, before.encode(), 0o644, 0, 0)
            self.module.run_command(["systemctl", "mask", etcd_unit.DISTRIBUTION], check_rc=True)

    def from_archive(self):
        """The binary out of the release archive, under /opt/isthmus/etcd/<version>."""
        wanted = self.source["sha256"].lower()
        for marker in glob.glob(ARCHIVES + "/*/sha256"):
            binary = os.path.join(os.path.dirname(marker), "etcd")
            if read_bytes(marker) == wanted.encode() and os.access(binary, os.X_OK):
                return binary
        place = self.source.get("url") or self.source.get("path")
        self.changes.note("etcd archive", "", f"{place} (sha256 {wanted})")
        if self.module.check_mode:
            return None
        archive = self.module.params["archive"]
        if self.source.get("url"):
            archive = fetch_file(self.module, self.source["url"])
        if archive is None:
            self.module.fail_json(msg=f"the etcd archive {place} was not copied to this host; run it by the etcd role")
        digest = self.module.sha256(archive)
        if digest != wanted:
            self.module.fail_json(
                msg=f"the etcd archive {place} has sha256 {digest}, the inventory says {wanted}. Correct one of them"
            )
        return self.unpack(archive, place, wanted)

    def unpack(self, archive, place, digest):
        os.makedirs(ARCHIVES, mode=0o755, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=ARCHIVES, prefix=".new-") as work:
            os.chmod(work, 0o755)  # noqa: S103 - everybody may run etcd's programs
            try:
                self.extract(archive, place, work)
            except (tarfile.TarError, EOFError, zlib.error) as exc:
                self.module.fail_json(
                    msg=f"the etcd archive {place} is no tar archive that can be read ({exc}); take the .tar.gz of a "
                    "release, and its sha256"
                )
            version = self.version(os.path.join(work, "etcd"))
            with open(os.path.join(work, "sha256"), "w", encoding="ascii") as marker:
                marker.write(digest)
            final = os.path.join(ARCHIVES, version)
            if os.path.exists(final) and read_bytes(final + "/sha256") != digest.encode():
                # Another build of the same version.
                final = f"{final}-{digest[:12]}"
            if os.path.exists(final):
                # Damaged, or it would have been used. A running process keeps its open file.
                shutil.rmtree(final)
            os.sync()
            os.rename(work, final)
            os.makedirs(work)  # for the clean-up of the temporary directory
        return os.path.join(final, "etcd")

    def extract(self, archive, place, directory):
        with tarfile.open(archive) as tar:
            for name in ("etcd", "etcdctl"):
                entry = next((item for item in tar if item.isfile() and os.path.basename(item.name) == name), None)
                if entry is None:
                    if name == "etcd":
                        self.module.fail_json(msg=f"the etcd archive {place} holds no file named etcd")
                    continue
                with open(os.path.join(directory, name), "wb") as target:
                    shutil.copyfileobj(tar.extractfile(entry), target)
                os.chmod(os.path.join(directory, name), 0o755)  # noqa: S103 - everybody may run etcd's programs


class MemberModule:
    """From the files to a member that serves."""

    def __init__(self, module, admin, kvstore, node_spec):
        self.module = module
        self.admin = admin
        self.kvstore = kvstore
        self.spec = module.params["spec"]
        self.changes = Changes(module)
        self.units = Units(module, self.changes)
        self.timeout = module.params["timeout"]
        self.notes = []
        if admin is not None:
            self.member = node_spec.NodeSpec.from_dict(self.spec).member
            self.connect = admin.EtcdConnector(self.spec["cluster"]["name"])

    def run(self):
        install = Install(self.module, self.changes, self.spec["member"]["source"])
        binary = install.binary()
        self.need_user()
        text = etcd_unit.environment(self.spec)
        trusted = read_bytes(f"{etcd_unit.PKI}/trust/{self.spec['cluster']['name']}.crt") or b""
        # etcd reads certificates and keys at every handshake, but the trusted authority only when it starts.
        digest = config_digest(text, binary or "", trusted.decode(errors="replace"))
        unit = etcd_unit.service(binary or "(not installed yet)", digest)
        started = self.unit_is("active", etcd_unit.SERVICE)
        outdated = started and self.running_config() != digest
        gap = outdated and len(self.spec["member"]["members"]) == 1
        if gap:
            self.notes.append(f"etcd of cluster {self.spec['cluster']['name']} has one member, and it restarts now")
        if outdated and not self.module.check_mode:
            # The gate comes before anything is written: a refusal leaves the host as it is.
            with self.admin.turn(self.member, self.connect, self.timeout):
                self.snapshot()
                self.write(text, unit)
                self.units.systemd.run("restart", etcd_unit.SERVICE)
                self.admin.wait_healthy(self.member, self.connect, self.timeout)
        else:
            self.write(text, unit)
        if outdated:
            self.changes.note(f"unit {etcd_unit.SERVICE}", "active", "active (started anew: its configuration changed)")
            return self.finish("restarted")
        if started:
            return self.finish("none")
        return self.start()

    def need_user(self):
        try:
            pwd.getpwnam(etcd_unit.USER)
        except KeyError:
            if not self.module.check_mode:
                self.module.fail_json(
                    msg=f"the user {etcd_unit.USER}, who owns etcd's keys, does not exist; run the pki role first"
                )

    def unit_is(self, state, name):
        return self.units.systemd.show([name])[name].get("ActiveState") == state

    def running_config(self):
        pid = self.units.systemd.show([etcd_unit.SERVICE])[etcd_unit.SERVICE].get("MainPID", "0")
        return process_environment(pid).get(CONFIG_VARIABLE)

    def write(self, text, unit):
        self.changes.file(etcd_unit.ENVIRONMENT, text)
        self.units.write(
            {
                etcd_unit.SERVICE: unit,
                etcd_unit.DEFRAG_SERVICE: etcd_unit.defrag_service(),
                etcd_unit.DEFRAG_TIMER: etcd_unit.defrag_timer(),
            }
        )
        self.units.daemon_reload([etcd_unit.SERVICE, etcd_unit.DEFRAG_SERVICE, etcd_unit.DEFRAG_TIMER])
        state = self.units.systemd.show([etcd_unit.SERVICE])[etcd_unit.SERVICE].get("UnitFileState")
        if state != "enabled":
            self.changes.note(f"unit {etcd_unit.SERVICE}", state or "absent", "enabled")
            if not self.module.check_mode:
                self.units.systemd.run("enable", "--quiet", etcd_unit.SERVICE)
        self.units.running(etcd_unit.DEFRAG_TIMER)

    def snapshot(self):
        """A copy of the data before the step that could hurt it; the newest few are kept."""
        os.makedirs(SNAPSHOTS, mode=0o700, exist_ok=True)
        path = os.path.join(SNAPSHOTS, time.strftime("%Y%m%dT%H%M%SZ-before-restart.db", time.gmtime()))
        with self.connect([self.admin.local_endpoint(self.member)]) as client:
            client.snapshot(path)
        for old in sorted(glob.glob(SNAPSHOTS + "/*-before-restart.db"))[:-SNAPSHOTS_KEPT]:
            os.unlink(old)

    def start(self):
        """Start a member that does not run: with its data, or by forming or joining the cluster."""
        self.changes.note(f"unit {etcd_unit.SERVICE}", "inactive", "active")
        if os.path.isdir(os.path.join(etcd_unit.DATA, "member")):
            if not self.module.check_mode:
                self.units.systemd.run("restart", "--no-block", etcd_unit.SERVICE)
            return self.finish("started")
        if self.module.check_mode:
            return self.finish("formed or joined")
        former = self.module.params["former"] or self.member.initial
        found = self.admin.survey(self.member, self.connect)
        decision = self.admin.decide_formation(self.member, found, self.module.params["formed"], former)
        if decision == "wait":
            found = self.admin.wait_for_former(self.member, self.connect, former, self.timeout)
        if decision == "form":
            first = etcd_unit.first_start({self.member.name: self.member.peer_url}, "new", self.member.token)
        else:
            peers = self.admin.join(self.member, self.connect, found.answering, self.timeout)
            first = etcd_unit.first_start(peers, "existing", self.member.token)
        os.makedirs(os.path.dirname(etcd_unit.FIRST_START), exist_ok=True)
        with open(etcd_unit.FIRST_START, "w", encoding="utf-8") as file:
            file.write(first)
        self.units.systemd.run("daemon-reload")
        self.units.systemd.run("restart", "--no-block", etcd_unit.SERVICE)
        return self.finish("formed" if decision == "form" else "joined")

    def finish(self, action):
        """The member votes and serves; returns what exit_json is given."""
        if self.module.check_mode:
            return self.changes.result(action=action, notes=self.notes)
        try:
            if self.admin.promote(self.member, self.connect, self.timeout):
                self.changes.note(f"member {self.member.name}", "learner", "voting")
            health = self.admin.wait_healthy(self.member, self.connect, self.timeout)
        except self.admin.AdminError as exc:
            journal = self.units.systemd.journal(etcd_unit.SERVICE)
            self.module.fail_json(msg=f"{exc}. Last words of {etcd_unit.SERVICE}:\n{journal}")
        if os.path.exists(etcd_unit.FIRST_START):
            # An earlier run may have been interrupted here; it lives in /run and matters only until the next start.
            os.unlink(etcd_unit.FIRST_START)
            self.units.systemd.run("daemon-reload")
        return self.changes.result(
            action=action, members=health.members, leader=health.leader, version=health.version, notes=self.notes
        )


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "formed": {"type": "bool", "default": False},
            "former": {"type": "str"},
            "archive": {"type": "path"},
            "timeout": {"type": "int", "default": 180},
        },
        supports_check_mode=True,
    )
    if module.params["spec"]["member"] is None:
        module.fail_json(msg=f"the plan gives {module.params['spec']['host']} no etcd member")
    admin = bundle_module(module, "isthmus_agent.etcd_admin")
    kvstore = node_spec = None
    refusals = ()
    if admin is not None:
        kvstore = bundle_module(module, "isthmus_agent.kvstore")
        node_spec = bundle_module(module, "isthmus_mesh.spec")
        refusals = (admin.AdminError, kvstore.EtcdError)
    try:
        result = MemberModule(module, admin, kvstore, node_spec).run()
    except refusals as exc:
        module.fail_json(msg=str(exc))
    for note in result["notes"]:
        module.warn(note)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
