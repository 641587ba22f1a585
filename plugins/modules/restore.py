#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: restore
short_description: Make ready for a cluster's etcd and certificate authority to come back from a backup
version_added: 1.0.0
description:
  - The steps of the playbook C(isthmus.mesh.restore) before M(isthmus.mesh.etcd_member) begins the cluster from the
    snapshot. None of them withdraws anything from agents or peers.
  - V(backup), on the controller, chooses a backup that M(isthmus.mesh.backup) made and compares every file with the
    digests in its manifest. Refuses one that is damaged, or of another cluster or estate.
  - V(look), on a host of the cluster, refuses while its etcd runs, unless O(replace), and when the private key of the
    certificate authority is lost and O(key) does not open the backup's.
  - V(clear), on an etcd host, stops etcd and moves its data to C(/var/lib/isthmus/etcd.removed-TIME).
  - V(authority), on the host of the certificate authority, puts its private key and certificate back. The key is opened
    on the controller by C(openssl cms), never written to a disk there, and goes to the host on the input of a command
    over the connection, into C(ca.key) alone. The ledger of what the authority signed comes back too, and says that it
    may lack what was signed until now, after the backup. Does nothing where the key is.
author:
  - Isthmus contributors (@isthmus-mesh)
attributes:
  check_mode:
    support: full
    description: Makes all checks, and changes nothing.
  diff_mode:
    support: full
    description: Names what would be moved or put back, never what is in it.
  platform:
    platforms: posix
    support: full
    description: Runs on hosts with systemd.
  action:
    support: full
    description: The controller's side reads the backup.
extends_documentation_fragment:
  - isthmus.mesh.pki
options:
  part:
    description: Which step.
    type: str
    choices: [backup, look, clear, authority]
    required: true
  cluster:
    description: Cluster to restore.
    type: str
    required: true
  estate:
    description: The estate, C(isthmus_estate). Needed for O(part=backup).
    type: dict
  backup_directory:
    description: Directory of the backups on the controller. Needed for O(part=backup).
    type: str
  time:
    description: Name of the backup's directory; the newest complete one by default.
    type: str
  only:
    description: V(authority) when the etcd is left as it is; looked at with O(part=backup).
    type: str
  path:
    description: Directory of the backup that O(part=backup) returned.
    type: str
  key:
    description:
      - File on the controller with the operator's private key in PEM. It stays there. When it has a passphrase, the
        environment variable E(ISTHMUS_RESTORE_PASSPHRASE) of the run holds that.
    type: str
  known_ca:
    description: The authority's certificate in the estate record, in PEM.
    type: str
  authority:
    description: Whether this host is the place of the cluster's certificate authority.
    type: bool
    default: false
  replace:
    description: Whether an etcd that runs may be replaced.
    type: bool
    default: false
  certificate:
    description: The authority's certificate in the backup; filled in on the controller.
    type: str
  ledger:
    description: The authority's ledger in the backup, when there is one; filled in on the controller.
    type: str
seealso:
  - module: isthmus.mesh.backup
  - module: isthmus.mesh.etcd_member
"""

EXAMPLES = r"""
- name: Choose the newest backup that is whole
  isthmus.mesh.restore:
    part: backup
    cluster: onprem
    estate: "{{ isthmus_estate }}"
    backup_directory: /srv/backups
  register: chosen

- name: Stop what is left of the etcd
  isthmus.mesh.restore:
    part: clear
    cluster: onprem
"""

RETURN = r"""
path:
  description: Directory of the backup.
  returned: success with O(part=backup)
  type: str
  sample: /srv/backups/onprem/20260102T030405Z
snapshot:
  description: The snapshot in it.
  returned: success with O(part=backup)
  type: str
  sample: /srv/backups/onprem/20260102T030405Z/snapshot.db
taken:
  description: When it was taken.
  returned: success with O(part=backup)
  type: str
  sample: "2026-01-02T03:04:05Z"
revision:
  description: It holds everything up to this revision of etcd at least.
  returned: success with O(part=backup)
  type: int
  sample: 4711
record:
  description: The estate record in it, as M(isthmus.mesh.plan) takes it.
  returned: success with O(part=backup)
  type: dict
authority_lost:
  description: Whether the private key of the authority is missing or torn on this host, which is its place.
  returned: success with O(part=look)
  type: bool
"""

import json
import os
import re
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit, former
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.units import Systemd


def state(module):
    """What systemd says of the member; empty without a unit."""
    return Systemd(module).show([etcd_unit.SERVICE])[etcd_unit.SERVICE].get("ActiveState", "")


def look(module, changes):
    """What exit_json is given."""
    cluster, key = module.params["cluster"], os.path.join(module.params["directory"], "ca.key")
    if state(module) == "active" and not module.params["replace"]:
        module.fail_json(
            msg=f"The etcd of cluster {cluster} runs on this host. Nothing was changed on any host. Why: what was "
            "written to it since the backup would be lost. Next: when only some of its members are lost, or a run of "
            "restore was interrupted after this one began, run the playbook isthmus.mesh.site, and the others join it; "
            f"to replace it all the same, -e isthmus_confirm_restore={cluster}"
        )
    # One that is torn is none. The host may have no bundle yet, which could read it.
    whole = re.search(rb"-----END [A-Z ]*PRIVATE KEY-----", read_bytes(key) or b"") is not None
    return changes.result(authority_lost=module.params["authority"] and not whole)


def clear(module, changes):
    """What exit_json is given."""
    if state(module) not in ("", "inactive", "failed"):
        changes.note(f"unit {etcd_unit.SERVICE}", "active", "stopped")
        if not module.check_mode:
            module.run_command(["systemctl", "stop", etcd_unit.SERVICE], check_rc=True)
    if os.path.lexists(os.path.join(etcd_unit.DATA, "member")):
        former.set_aside(changes)
    changes.directory(os.path.dirname(etcd_unit.DATA))
    changes.directory(etcd_unit.SNAPSHOTS, mode=0o700)
    return changes.result()


def authority(module, changes):
    """All but the key itself, which no module is given; what exit_json is given."""
    directory = module.params["directory"]
    changes.note(os.path.join(directory, "ca.key"), "", "put back from the backup")
    changes.directory(os.path.dirname(directory))
    changes.directory(directory)
    certificate = os.path.join(directory, "ca.crt")
    if not os.path.exists(certificate):
        changes.file(certificate, module.params["certificate"] or "")
    ledger = os.path.join(directory, "issued.json")
    if module.params["ledger"] and not os.path.exists(ledger):
        # The host may have no bundle yet, whose `revocation` has the format.
        document = {**json.loads(module.params["ledger"]), "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        changes.file(ledger, json.dumps(document, indent=1) + "\n", shown=("", "ledger of what was signed"))
    return changes.result(directory=directory)


def main():
    module = AnsibleModule(
        argument_spec={
            "part": {"type": "str", "choices": ["backup", "look", "clear", "authority"], "required": True},
            "cluster": {"type": "str", "required": True},
            "estate": {"type": "dict"},
            "backup_directory": {"type": "str"},
            "time": {"type": "str"},
            "only": {"type": "str"},
            "path": {"type": "str"},
            "key": {"type": "str", "no_log": False},
            "known_ca": {"type": "str"},
            "authority": {"type": "bool", "default": False},
            "replace": {"type": "bool", "default": False},
            "certificate": {"type": "str"},
            "ledger": {"type": "str"},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        supports_check_mode=True,
    )
    part = {"look": look, "clear": clear, "authority": authority}[module.params["part"]]
    module.exit_json(**part(module, Changes(module)))


if __name__ == "__main__":
    main()
