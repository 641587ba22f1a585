#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: backup
short_description: Back up a cluster's etcd and certificate authority to the controller
version_added: 1.0.0
description:
  - Makes a directory on the controller for each backup, named by cluster and time (C(DIRECTORY/CLUSTER/TIME)), complete
    with its C(manifest.json) or not there at all. Directories have mode 0700, files 0600.
  - With O(part=etcd), on an etcd host of the cluster, it makes the directory, with C(snapshot.db), a snapshot of the
    member on this host as C(etcdctl snapshot save) makes it, checked against its digest, and C(estate.json), the
    documents of the estate record. Fails when that member does not serve.
  - With O(part=authority), on the host of the cluster's certificate authority, it adds C(ca.crt), the authority's
    certificate, C(issued.json), its ledger of signed certificates, when there is one, and C(ca.key.cms), its private
    key encrypted to O(key). The private key leaves that host only so.
  - Changes nothing on a host.
author:
  - Isthmus contributors (@isthmus-mesh)
attributes:
  check_mode:
    support: full
    description: Looks whether everything needed is there, and writes nothing.
  diff_mode:
    support: full
    description: Lists the files of the backup, never what is in them.
  platform:
    platforms: posix
    support: full
    description: Runs on hosts with systemd.
  action:
    support: full
    description: The controller's side writes the directory.
extends_documentation_fragment:
  - isthmus.mesh.pki
options:
  cluster:
    description: Cluster to back up.
    type: str
    required: true
  part:
    description: What to back up.
    type: str
    choices: [etcd, authority]
    required: true
  backup_directory:
    description: Directory of the backups on the controller, made when it is missing. Needed for O(part=etcd).
    type: str
  path:
    description: Directory of the backup that O(part=etcd) returned. Needed for O(part=authority).
    type: str
  key:
    description:
      - File on the controller with the public key in PEM, or a certificate of it, that the authority's key is encrypted
        to, as CMS EnvelopedData (RFC 5652). RSA of 2048 bits or more. Without it the authority's key is left out.
      - With O(part=etcd) it is only looked at, so that a wrong file is told before anything is done.
    type: str
  into:
    description: Directory to make on the host for what the controller fetches; filled in on the controller.
    type: path
  recipient:
    description: Content of O(key); filled in on the controller.
    type: str
"""

EXAMPLES = r"""
- name: Back up the etcd of a cluster
  isthmus.mesh.backup:
    part: etcd
    cluster: onprem
    backup_directory: /srv/backups
  delegate_to: onprem-1
  register: taken

- name: Add its authority
  isthmus.mesh.backup:
    part: authority
    cluster: onprem
    path: "{{ taken.path }}"
    key: /srv/backups/operator.pem
  delegate_to: "{{ taken.ca_host }}"
"""

RETURN = r"""
path:
  description: Directory of the backup on the controller; in check mode the one of the cluster.
  returned: success
  type: str
  sample: /srv/backups/onprem/20260102T030405Z
files:
  description: Names of the files that this call added, or would add.
  returned: success
  type: list
  elements: str
  sample: [estate.json, snapshot.db]
ca_host:
  description: Host of the cluster's certificate authority, by the estate record; V(none) when that does not say.
  returned: success with O(part=etcd)
  type: str
  sample: onprem-1
revision:
  description: The snapshot holds everything up to this revision of etcd at least.
  returned: success with O(part=etcd)
  type: int
  sample: 4711
refused:
  description: That the request itself is wrong, its directory or key, so that no other cluster's would do better.
  returned: failure because of O(backup_directory) or O(key)
  type: bool
"""

import datetime
import json
import os
import pathlib

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import estate, etcd_unit
from ansible_collections.isthmus.mesh.plugins.module_utils.files import read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module

PREFIX = "isthmus/v1/estate/"
LEDGER = "issued.json"


def etcd(module, into):
    """Snapshot and record of the member on this host; what the manifest says of them."""
    cluster = module.params["cluster"]
    settings = estate.etcd_settings()
    if etcd_unit.cluster_of(settings) != cluster:
        module.fail_json(msg=f"this host carries no etcd of cluster {cluster}; run isthmus.mesh.site")
    backup = bundle_module(module, "isthmus_agent.backup")
    kvstore = bundle_module(module, "isthmus_agent.kvstore")
    pki = module.params["directory"]
    # Only root may take a snapshot.
    files = (f"{pki}/trust/{cluster}.crt", f"{pki}/root.crt", f"{pki}/root.key")
    # The record through raft first: the snapshot that the same member gives afterwards is no older.
    try:
        with kvstore.SyncEtcd([etcd_unit.local_url(settings)], *files) as client:
            documents = record(module, client.range(PREFIX).kvs)
            if into is None:
                status = client.status()
                taken = backup.Snapshot(f"{status.header.cluster_id:x}", status.header.revision, status.version)
            else:
                taken = backup.snapshot(client, into / "snapshot.db")
    except (kvstore.EtcdError, OSError) as exc:
        module.fail_json(
            msg=f"the etcd of cluster {cluster} gave no snapshot on this host: {exc}. Look at "
            "`journalctl -u isthmus-etcd` and at the free space there, then run again"
        )
    if into is not None:
        (into / "estate.json").write_text(json.dumps(documents, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {
        "estate": documents.get("roster", {}).get("estate"),
        "etcd": {"cluster_id": taken.cluster_id, "revision": taken.revision, "version": taken.version},
        "ca_host": documents.get(f"clusters/{cluster}", {}).get("ca_host"),
    }


def record(module, entries):
    """The documents by name; one that is damaged is in the snapshot only, as a warning says."""
    documents = {}
    for entry in entries:
        try:
            document = json.loads(entry.value)
        except ValueError:
            document = None
        if isinstance(document, dict):
            documents[entry.key[len(PREFIX) :]] = document
        else:
            module.warn(f"{entry.key} in the etcd of cluster {module.params['cluster']} is damaged; not in estate.json")
    return documents


def authority(module, into):
    """The authority's certificate and encrypted key; what the manifest says of them."""
    backup = bundle_module(module, "isthmus_agent.backup")
    pki = bundle_module(module, "isthmus_agent.pki")
    recipient = module.params["recipient"]
    try:
        certificate, sealed = backup.sealed_authority(
            pathlib.Path(module.params["directory"]),
            module.params["cluster"],
            None if recipient is None else recipient.encode(),
        )
        ledger = ledger_of(module)
    except pki.PkiError as exc:
        module.fail_json(msg=str(exc))
    if into is not None:
        if ledger is not None:
            (into / LEDGER).write_bytes(ledger)
        (into / "ca.crt").write_text(certificate, encoding="utf-8")
        if sealed is not None:
            (into / "ca.key.cms").write_bytes(sealed)
    fingerprint = pki.describe(certificate.encode())["fingerprint"]
    return {"fingerprint": fingerprint, "key": sealed is not None, "ledger": ledger is not None}


def ledger_of(module):
    """The authority's ledger as it is; None where there is none yet. Raises `PkiError` for a damaged one."""
    path = os.path.join(module.params["directory"], LEDGER)
    found = read_bytes(path)
    if found is not None:
        now = datetime.datetime.now(datetime.timezone.utc)
        bundle_module(module, "isthmus_agent.revocation").Ledger.read(found, path, now)
    return found


def main():
    module = AnsibleModule(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "part": {"type": "str", "choices": ["etcd", "authority"], "required": True},
            "backup_directory": {"type": "str"},
            "path": {"type": "str"},
            "key": {"type": "str", "no_log": False},
            "into": {"type": "path"},
            "recipient": {"type": "str"},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        required_if=[("part", "etcd", ["backup_directory"]), ("part", "authority", ["path"])],
        supports_check_mode=True,
    )
    os.umask(0o077)
    into = None if module.check_mode else pathlib.Path(module.params["into"])
    backup = bundle_module(module, "isthmus_agent.backup")
    if backup is None:
        module.fail_json(msg="this host has no agent bundle that can back up; run isthmus.mesh.site first")
    if into is not None:
        into.mkdir()
    try:
        about = etcd(module, into) if module.params["part"] == "etcd" else authority(module, into)
    except backup.BackupError as exc:
        module.fail_json(msg=str(exc))
    digests = {}
    if into is not None:
        owner = into.parent.stat()  # the user that Ansible connects as, who fetches them
        for path in into.iterdir():
            digests[path.name] = {"size": path.stat().st_size, "sha256": backup.sha256(path)}
            os.chown(path, owner.st_uid, owner.st_gid)
        os.chown(into, owner.st_uid, owner.st_gid)
    version = bundle_module(module, "isthmus_agent.agent.main").installed_version()
    module.exit_json(changed=True, about=about, digests=digests, version=version)


if __name__ == "__main__":
    main()
