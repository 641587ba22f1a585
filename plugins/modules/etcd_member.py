#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: etcd_member
short_description: Run this host's member of its cluster's etcd, or put it away
version_added: 1.0.0
description:
  - Installs etcd (the distribution's package or an archive), writes C(/etc/isthmus/etcd.env) and the unit
    C(isthmus-etcd.service), and brings the member up.
  - A cluster forms as one member; every other one joins as a learner and is promoted when it has caught up. Members may
    be brought up together, one by one or with C(--limit), in any order.
  - A data directory that exists is never overwritten or initialised again. A member without data joins when another one
    serves, forms the cluster when there cannot be one, and is refused when that cannot be told. The data of a member
    that its cluster took out is moved aside; the member joins anew.
  - A running member is restarted only when its configuration or its list of revoked certificates changed, in its turn,
    while all others are healthy, after a snapshot to C(/var/lib/isthmus/snapshots). A cluster of one has a gap then;
    the result says so. A member whose authority has ended, so that it takes nobody's certificate, is restarted at once.
  - With O(snapshot) O(former) begins a new cluster from that file instead, under a new token, when it has no data; the
    others wait for it and join. The file is removed then, and so are the locks of runs that it holds.
  - Fails when a member that runs is not of the same etcd as the others, as after a restore that it was not in.
  - Members that the record does not list any more are taken out of the cluster by O(former), one at a time, after a
    snapshot, while all that stay are healthy; else a warning says why not. They are left when the record in etcd is
    newer than the plan.
  - On a host that the spec gives no member, one that is there leaves its cluster in the same way, if no other did it,
    and is stopped. Its unit, timer, settings and keys are removed, its data is moved aside to
    C(/var/lib/isthmus/etcd.removed-TIME). It goes on running when it may not leave; that is a failure.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  record:
    description: The cluster's document of the estate record, as M(isthmus.mesh.plan) returns it.
    type: dict
    required: true
  formed:
    description:
      - Whether the estate record shows that this cluster's etcd existed before.
      - Then a member without data never forms a new cluster.
    type: bool
    default: false
  former:
    description:
      - The member that acts for all in this run. It forms the cluster when there is none, others wait for it; and it
        takes out members that the record does not list.
      - By default the member that the spec names as the initial one.
    type: str
  listed:
    description:
      - That the host gets its list of revoked certificates in this run. Needed in check mode only, where a host that
        has none yet has none at this step either.
    type: bool
    default: false
  snapshot:
    description: Path on this host of a snapshot of the cluster's etcd; only O(former) needs the file.
    type: path
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
    record: "{{ isthmus_record['clusters/' ~ isthmus_spec.cluster.name] }}"
"""

RETURN = r"""
action:
  description: What was done, V(formed), V(restored), V(joined), V(restarted), V(started), V(left) or V(none).
  returned: success
  type: str
  sample: joined
members:
  description: Names of all members.
  returned: success on a host with a member, not in check mode when it does not run yet
  type: list
  elements: str
  sample: [onprem-1, onprem-2, onprem-3]
leader:
  description: Name of the leader.
  returned: success on a host with a member, not in check mode when it does not run yet
  type: str
version:
  description: Version of the etcd server.
  returned: success on a host with a member, not in check mode when it does not run yet
  type: str
  sample: 3.4.23
notes:
  description: What a person should know, such as a gap by a restart.
  returned: success
  type: list
  elements: str
"""

import base64
import datetime
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
from ansible_collections.isthmus.mesh.plugins.module_utils import bundle, etcd_trouble, etcd_unit, former, packages
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
SNAPSHOTS_KEPT = 5
PACKAGES = {"apt-get": "etcd-server", "dnf": "etcd"}
TOOL_PACKAGES = {"apt-get": "etcd-client", "dnf": "etcd"}


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

    def restorer(self, binary):
        """Path of the program that makes a snapshot into a data directory: from etcd 3.6 on etcdutl alone can."""
        found = self.find_restorer(binary)
        manager = packages.manager(self.module)
        if found is None and self.source["type"] == "package" and manager is not None:
            self.changes.note(f"package {TOOL_PACKAGES[manager]}", "", "installed")
            packages.install(self.module, [TOOL_PACKAGES[manager]], "install etcdutl or etcdctl by hand")
            found = self.find_restorer(binary)
        if found is None:
            self.module.fail_json(
                msg=f"a snapshot cannot be restored on this host: neither etcdutl nor etcdctl is beside {binary} or in "
                "PATH. Nothing was restored. Next: put one of them, of etcd's version, into /usr/local/bin, run again"
            )
        return found

    def find_restorer(self, binary):
        beside = [os.path.dirname(binary)]
        tools = (self.module.get_bin_path(name, opt_dirs=beside) for name in ("etcdutl", "etcdctl"))
        return next((tool for tool in tools if tool), None)

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
            for name in ("etcd", "etcdctl", "etcdutl"):
                entry = next((item for item in tar if item.isfile() and os.path.basename(item.name) == name), None)
                if entry is None:
                    if name == "etcd":
                        self.module.fail_json(msg=f"the etcd archive {place} holds no file named etcd")
                    continue
                with open(os.path.join(directory, name), "wb") as target:
                    shutil.copyfileobj(tar.extractfile(entry), target)
                os.chmod(os.path.join(directory, name), 0o755)  # noqa: S103 - everybody may run etcd's programs


def snapshot(client, reason):
    """A copy of the data before a step that could hurt it; the newest few are kept."""
    os.makedirs(etcd_unit.SNAPSHOTS, mode=0o700, exist_ok=True)
    # First: on a disk that is nearly full the new one has the place of the oldest.
    for old in sorted(glob.glob(etcd_unit.SNAPSHOTS + "/*-before-*.db"))[: 1 - SNAPSHOTS_KEPT]:
        os.unlink(old)
    client.snapshot(
        os.path.join(etcd_unit.SNAPSHOTS, time.strftime(f"%Y%m%dT%H%M%SZ-before-{reason}.db", time.gmtime()))
    )


def take_out(changes, gone):
    """Note each member that went; those before one that could not are noted too."""
    for name in gone:
        changes.note(f"member {name}", "in the cluster", "taken out")


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
        self.install = Install(module, self.changes, self.spec["member"]["source"])
        if admin is not None:
            self.member = node_spec.NodeSpec.from_dict(self.spec).member
            self.connect = admin.EtcdConnector(self.spec["cluster"]["name"], directory=etcd_unit.PKI)

    def run(self):
        binary = self.install.binary()
        self.need_user()
        revoked = self.revoked()
        listed = self.module.params["listed"] or not os.path.exists(etcd_unit.ENVIRONMENT)
        predicted = self.module.check_mode and listed
        text = etcd_unit.environment(self.spec, revocation=predicted or revoked is not None)
        trusted = read_bytes(f"{etcd_unit.PKI}/trust/{self.spec['cluster']['name']}.crt") or b""
        # etcd reads certificates, keys and the list of revoked ones at every handshake, but the trusted authority only
        # when it starts; and a connection that is open when its certificate is revoked ends with the process.
        digest = config_digest(text, binary or "", trusted.decode(errors="replace"), (revoked or b"").hex())
        unit = etcd_unit.service(binary or "(not installed yet)", digest)
        started = self.unit_is("active", etcd_unit.SERVICE)
        if started:
            self.need_one_etcd()
        outdated = started and self.running_config() != digest
        gap = outdated and len(self.spec["member"]["members"]) == 1
        shut = outdated and not self.module.check_mode and self.shut_out()
        if started and not shut and (outdated or self.acts()):
            # Before the restart: one that is gone for good would refuse it.
            self.dismiss()
        if gap:
            self.notes.append(f"etcd of cluster {self.spec['cluster']['name']} has one member, and it restarts now")
        if shut:
            self.notes.append(
                f"etcd member {self.member.name} restarts now, with the others: an authority of cluster "
                f"{self.spec['cluster']['name']} has ended, and a member that began with it takes nobody's certificate"
            )
            self.write(text, unit)
            self.units.systemd.run("restart", "--no-block", etcd_unit.SERVICE)
        elif outdated and not self.module.check_mode:
            # The gate comes before anything is written: a refusal leaves the host as it is.
            with self.admin.turn(self.member, self.connect, self.timeout):
                self.keep()
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
        return self.start(binary)

    def need_one_etcd(self):
        """Else the others that are asked here would speak for an etcd that is not this member's."""
        words = self.admin and etcd_trouble.divided(self.admin, self.kvstore, self.member, self.connect)
        if words:
            self.module.fail_json(msg=f"etcd member {self.member.name} was left as it is. {words}")

    def shut_out(self):
        """Whether the running member cannot be asked because the authority that it began with has ended: then no turn
        and no snapshot can be had, and the other members neither let it in nor wait for it."""
        pki = bundle_module(self.module, "isthmus_agent.pki")
        now = datetime.datetime.now(datetime.timezone.utc)
        trusted = read_bytes(f"{etcd_unit.PKI}/trust/{self.spec['cluster']['name']}.crt") or b""
        try:
            ended = pki.has_ended(trusted.decode(errors="replace"), now)
        except pki.PkiError:
            return False
        if not ended:
            return False
        with self.connect([self.admin.local_endpoint(self.member)]) as client:
            try:
                client.status()
            except self.kvstore.EtcdError:
                return True
        return False

    def keep(self):
        """The snapshot before a restart. Without it the member goes on as it is."""
        with self.connect([self.admin.local_endpoint(self.member)]) as client:
            try:
                snapshot(client, "restart")
            except OSError as exc:
                cluster, alone = self.spec["cluster"]["name"], not self.admin.other_endpoints(self.member)
                why = etcd_trouble.of_host(cluster, alone, "") or f"Next: make space in {etcd_unit.SNAPSHOTS}"
                self.module.fail_json(
                    msg=f"etcd member {self.member.name} is to start anew, as its configuration changed, and was left "
                    f"as it is: the snapshot before that could not be written ({exc}). {why}, and run the playbook "
                    "again"
                )

    def revoked(self):
        """The list of revoked certificates as etcd reads it, None without one. In check mode it is not there yet."""
        listed = self.module.params["record"].get("crl")
        if self.module.check_mode and listed:
            return base64.b64decode("".join(line for line in listed.splitlines() if not line.startswith("-")))
        return read_bytes(f"{etcd_unit.PKI}/{etcd_unit.REVOKED}")

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
        enabled = (etcd_unit.SERVICE, etcd_unit.DEFRAG_TIMER)
        self.units.daemon_reload([*enabled, etcd_unit.DEFRAG_SERVICE], enabled)
        self.units.running(etcd_unit.DEFRAG_TIMER)

    def acts(self):
        """Whether this member does in this run what is done once for all."""
        return (self.module.params["former"] or self.spec["member"]["initial"]) == self.spec["member"]["name"]

    def dismiss(self):
        """Members that the record does not list leave the cluster; a note says why one does not."""
        if self.admin is None:
            return
        gone = self.admin.dismiss(
            self.module.params["record"],
            self.member.name,
            self.connect,
            [self.admin.local_endpoint(self.member), *self.admin.other_endpoints(self.member).values()],
            lambda client: snapshot(client, "removal"),
            apply=not self.module.check_mode,
            timeout=self.timeout,
        )
        try:
            take_out(self.changes, gone)
        except (self.admin.AdminError, self.kvstore.EtcdError, OSError) as exc:
            self.notes.append(str(exc))

    def expelled(self):
        """Whether the data here is that of a member that was taken out; not when that cannot be told."""
        try:
            return self.admin is not None and self.admin.is_expelled(self.member, self.connect)
        except (self.kvstore.EtcdError, OSError):
            return False

    def start(self, binary):
        """Start a member that does not run: with its data, or by forming, restoring or joining the cluster."""
        self.changes.note(f"unit {etcd_unit.SERVICE}", "inactive", "active")
        if os.path.isdir(os.path.join(etcd_unit.DATA, "member")):
            if not self.expelled():
                if not self.module.check_mode:
                    self.units.systemd.run("restart", "--no-block", etcd_unit.SERVICE)
                return self.finish("started")
            if not self.module.check_mode:
                self.units.systemd.run("stop", etcd_unit.SERVICE)
            former.set_aside(self.changes)
        if self.module.check_mode:
            return self.finish("formed or joined")
        acting = self.module.params["former"] or self.member.initial
        found = self.admin.survey(self.member, self.connect)
        if self.module.params["snapshot"] and self.acts():
            self.restore(binary)
            self.units.systemd.run("restart", "--no-block", etcd_unit.SERVICE)
            return self.finish("restored")
        if self.module.params["snapshot"]:
            decision = "join" if found.answering else "wait"
        else:
            decision = self.admin.decide_formation(self.member, found, self.module.params["formed"], acting)
        if decision == "wait":
            found = self.admin.wait_for_former(self.member, self.connect, acting, self.timeout)
        if decision != "form" and self.acts():
            # etcd admits nobody while one that is gone for good counts.
            self.dismiss()
        if decision == "form":
            first = etcd_unit.first_start({self.member.name: self.member.peer_url}, "new", self.member.token)
        else:
            revision = self.module.params["record"]["revision"]
            peers = self.admin.join(self.member, self.connect, found.answering, revision, self.timeout)
            first = etcd_unit.first_start(peers, "existing", self.member.token)
        os.makedirs(os.path.dirname(etcd_unit.FIRST_START), exist_ok=True)
        with open(etcd_unit.FIRST_START, "w", encoding="utf-8") as file:
            file.write(first)
        self.units.systemd.run("daemon-reload")
        self.units.systemd.run("restart", "--no-block", etcd_unit.SERVICE)
        return self.finish("formed" if decision == "form" else "joined")

    def restore(self, binary):
        """The data of a new cluster of this member alone, from the snapshot. It is in its place at once, or not."""
        tool, snapshot = self.install.restorer(binary), self.module.params["snapshot"]
        if not os.path.exists(snapshot):
            self.module.fail_json(
                msg=f"the snapshot {snapshot} is not on this host, which is the first of its cluster here. Nothing was "
                "restored. Next: run the playbook isthmus.mesh.restore again"
            )
        own, work = f"{self.member.name}={self.member.peer_url}", os.path.join(etcd_unit.DATA, "restoring")
        shutil.rmtree(work, ignore_errors=True)  # of a run that was interrupted
        os.makedirs(etcd_unit.DATA, mode=0o700, exist_ok=True)
        # Under the token of before the cluster id would be that of before: agents and peers then could not tell that
        # history went back when the revision of before is reached again.
        token = f"{self.member.token}-restored-{time.time_ns()}"
        command = [tool, "snapshot", "restore", snapshot, "--data-dir", work, "--name", self.member.name]
        command += ["--initial-cluster", own, "--initial-advertise-peer-urls", self.member.peer_url]
        command += ["--initial-cluster-token", token]
        code, out, err = self.module.run_command(command, environ_update={"ETCDCTL_API": "3"})
        if code != 0:
            shutil.rmtree(work, ignore_errors=True)
            reason = ((err or out).strip().splitlines() or [f"it ended with {code}"])[-1]  # before it: its log
            self.module.fail_json(
                msg=f"`{tool} snapshot restore` could not restore {snapshot} on this host: {reason}. "
                "etcd was not started. Next: look at the free space of /var/lib/isthmus, or take another backup with "
                "-e isthmus_restore_from=TIME, and run the playbook isthmus.mesh.restore again"
            )
        owner = pwd.getpwnam(etcd_unit.USER)
        for where, directories, files in os.walk(etcd_unit.DATA):
            for name in (where, *(os.path.join(where, one) for one in (*directories, *files))):
                os.chown(name, owner.pw_uid, owner.pw_gid)
        os.rename(os.path.join(work, "member"), os.path.join(etcd_unit.DATA, "member"))
        os.rmdir(work)

    def forget_runs(self):
        """The snapshot may hold locks of runs, whose leases begin anew: who held them is not at work in this etcd."""
        with self.connect([self.admin.local_endpoint(self.member)]) as client:
            client.delete_prefix(self.admin.keys.LOCK + "/")
        os.unlink(self.module.params["snapshot"])

    def finish(self, action):
        """The member votes and serves; returns what exit_json is given."""
        if self.module.check_mode:
            return self.changes.result(action=action, notes=self.notes)
        try:
            if self.admin.promote(self.member, self.connect, self.timeout):
                self.changes.note(f"member {self.member.name}", "learner", "voting")
            health = self.admin.wait_healthy(self.member, self.connect, self.timeout)
        except self.admin.AdminError as exc:
            cluster, journal = self.spec["cluster"]["name"], self.units.systemd.journal(etcd_unit.SERVICE)
            others = self.admin.other_endpoints(self.member)
            everything = self.units.systemd.journal(etcd_unit.SERVICE, etcd_trouble.JOURNAL_LINES)
            why = etcd_trouble.of_host(cluster, not others, everything)
            if not why and others:
                why = etcd_trouble.of_others(cluster, self.admin.survey(self.member, self.connect).describe())
            self.module.fail_json(msg=f"{exc}. {why}\nLast words of {etcd_unit.SERVICE}:\n{journal}")
        if os.path.exists(etcd_unit.FIRST_START):
            # An earlier run may have been interrupted here; it lives in /run and matters only until the next start.
            os.unlink(etcd_unit.FIRST_START)
            self.units.systemd.run("daemon-reload")
        if action in ("started", "joined") and self.acts():
            self.dismiss()
        if action == "restored":
            self.forget_runs()
        return self.changes.result(
            action=action, members=health.members, leader=health.leader, version=health.version, notes=self.notes
        )


class FormerMember:
    """From a member that the plan does not have any more to a host without one."""

    def __init__(self, module, admin, kvstore):
        self.module = module
        self.admin = admin
        self.kvstore = kvstore
        self.spec = module.params["spec"]
        self.changes = Changes(module)
        self.units = Units(module, self.changes)

    def run(self):
        if os.path.lexists(etcd_unit.DATA):  # else an earlier run was interrupted after this
            self.leave()
        self.units.write(dict.fromkeys(etcd_unit.UNITS))
        self.units.daemon_reload(etcd_unit.UNITS)
        if not self.module.check_mode:
            # etcd ends with an error when it was taken out, and systemd remembers that of a unit that is gone.
            self.module.run_command(["systemctl", "reset-failed", etcd_unit.SERVICE])
        if os.path.lexists(etcd_unit.DATA):
            former.set_aside(self.changes)
        self.changes.absent(etcd_unit.FIRST_START)
        self.changes.absent(etcd_unit.ENVIRONMENT)
        former.remove_unlisted(self.changes, self.spec, etcd_unit.PKI)
        return self.changes.result(action="left", notes=[])

    def leave(self):
        """Out of the cluster before it stops, so that those that stay never wait for it."""
        settings = etcd_unit.settings((read_bytes(etcd_unit.ENVIRONMENT) or b"").decode(errors="replace"))
        cluster = self.spec["cluster"]["name"]
        if self.admin is None or etcd_unit.cluster_of(settings) not in ("", cluster):
            return  # the members of another cluster take it out themselves: this host has no certificate of theirs
        connect = self.admin.EtcdConnector(cluster, directory=etcd_unit.PKI)
        gone = self.admin.dismiss(
            self.module.params["record"],
            self.spec["host"],
            connect,
            self.spec["etcd"]["endpoints"],
            lambda client: snapshot(client, "removal"),
            apply=not self.module.check_mode,
            timeout=self.module.params["timeout"],
            only=settings.get("ETCD_INITIAL_ADVERTISE_PEER_URLS", self.spec["host"]),
        )
        try:
            take_out(self.changes, gone)
        except (self.admin.AdminError, self.kvstore.EtcdError, OSError) as exc:
            if self.was_revoked():
                return  # a host that was removed and is back: those that stay took it out then
            self.module.fail_json(
                msg=f"the etcd member on this host is to leave cluster {cluster} and cannot yet: {exc}. It goes on "
                "running as it was. Run the playbook again when that is solved"
            )

    def was_revoked(self):
        """Whether this host's root certificate is one that its cluster's etcd refuses."""
        revocation = bundle_module(self.module, "isthmus_agent.revocation")
        return revocation.is_listed(read_bytes(f"{etcd_unit.PKI}/root.crt"), self.module.params["record"].get("crl"))


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "record": {"type": "dict", "required": True},
            "formed": {"type": "bool", "default": False},
            "former": {"type": "str"},
            "listed": {"type": "bool", "default": False},
            "snapshot": {"type": "path"},
            "archive": {"type": "path"},
            "timeout": {"type": "int", "default": 180},
        },
        supports_check_mode=True,
    )
    spec = module.params["spec"]
    if spec["member"] is None and not former.member_remains():
        module.exit_json(changed=False, action="none", notes=[])
    admin = bundle_module(module, "isthmus_agent.etcd_admin")
    if module.check_mode and not hasattr(admin, "dismiss"):
        admin = None  # an older version's, which the run would have replaced by now
    kvstore = node_spec = None
    refusals = ()
    if admin is not None:
        kvstore = bundle_module(module, "isthmus_agent.kvstore")
        node_spec = bundle_module(module, "isthmus_mesh.spec")
        refusals = (admin.AdminError, kvstore.EtcdError)
    try:
        if spec["member"] is None:
            result = FormerMember(module, admin, kvstore).run()
        else:
            result = MemberModule(module, admin, kvstore, node_spec).run()
    except refusals as exc:
        module.fail_json(msg=str(exc))
    for note in result["notes"]:
        module.warn(note)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
