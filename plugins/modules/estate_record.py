#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: estate_record
short_description: Read or write the estate record in a cluster's etcd
version_added: 1.0.0
description:
  - The estate record holds what was dealt and applied, in every cluster's etcd and as a copy on every host
    (C(/etc/isthmus/estate.json)).
  - Reading takes it from the etcd of the host, and from the copy when that does not answer. It never fails for a host
    that has neither; then nothing is returned.
  - Writing compares revisions and content, so that a run never overwrites what another one wrote since the record was
    read; that is a failure. With the record the services that the inventory owns are written, and what agents reported
    of hosts that the record does not have is deleted.
  - Runs on an etcd host of the cluster, with the operator's certificate. On a host that is none yet or has an older
    bundle, and for an etcd that does not take the record, a warning says so and no record is returned.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  state:
    description:
      - V(read) returns the record, V(present) makes it so, V(released) gives the lock back that this run holds.
    type: str
    choices: [read, present, released]
    default: present
  lock:
    description:
      - Whether O(state=read) takes the lock first that keeps other runs of the playbook away; O(state=present) always
        does. It is in the cluster's etcd, or in a file of this host while no etcd can be asked, and is held for two
        minutes after a read and for ten after a write. In check mode no lock is taken.
    type: bool
    default: false
  break_lock:
    description: Name of another run whose lock is taken away, as the message about it gives it.
    type: str
    default: ""
  run:
    description: Who runs this; filled in on the controller. Without it no lock is taken.
    type: dict
    suboptions:
      by:
        description: The operator.
        type: str
        required: true
      where:
        description: The controller or the job.
        type: str
        required: true
      process:
        description: The same for all tasks of this run, and for no other run.
        type: str
        required: true
  version:
    description:
      - Version of this collection; filled in on the controller. A host whose bundle is of an older one takes no record,
        with a warning.
    type: str
  cluster:
    description: Cluster whose etcd is on this host.
    type: str
    required: true
  record:
    description:
      - Documents of the record by name, as M(isthmus.mesh.plan) returns them; needed for O(state=present).
      - The certificate authority of a cluster in O(formed) that the record does not hold yet is added from what is
        pinned on this host.
    type: dict
  formed:
    description:
      - Clusters whose etcd has run. The record holds an authority only of those, and so says where a member without
        data must not begin a new etcd.
    type: list
    elements: str
    default: []
  services:
    description: Services that the inventory owns.
    type: dict
    suboptions:
      present:
        description: Definitions.
        type: list
        elements: dict
        default: []
      absent:
        description: Names, C(namespace/name), of services to remove if the inventory owned them.
        type: list
        elements: str
        default: []
seealso:
  - module: isthmus.mesh.plan
"""

EXAMPLES = r"""
- name: Read the record
  isthmus.mesh.estate_record:
    state: read
    cluster: onprem
  register: isthmus_read

- name: Write the record
  isthmus.mesh.estate_record:
    cluster: onprem
    record: "{{ isthmus_plan.record }}"
    services: "{{ isthmus_plan.services.onprem }}"
"""

RETURN = r"""
locked:
  description: Whether this run holds the lock of the cluster now.
  returned: O(state=read) and O(state=present)
  type: bool
silent:
  description: Why the host could not be entered. That is no failure, since another host may know as much.
  returned: when it could not
  type: str
locked_by:
  description: The run that holds the lock.
  returned: when that is another one, which is a failure
  type: dict
  sample:
    name: 3fa9c1d2
    by: alice
    where: ctl1
    since: "2026-01-02T03:04:05Z"
    until: "2026-01-02T03:06:05Z"
    process: 0b1c2d3e4f5a/4711/123456
record:
  description: The record that was found or written. Missing when there is none.
  returned: when there is a record
  type: dict
  contains:
    cluster:
      description: The cluster whose etcd it was read from; V(none) for a host's copy.
      type: str
      sample: onprem
    documents:
      description: Documents by name.
      type: dict
    own:
      description: The document of C(cluster) alone, by name.
      returned: with O(state=present)
      type: dict
    foreign_services:
      description: Owners of services in this etcd that the inventory does not own, by C(namespace/name).
      returned: when it was read from an etcd
      type: dict
      sample:
        shop/canary: module
    nodes:
      description: Of a cluster with C(control_plane=in_cluster), its nodes with their addresses in the mesh.
      returned: when it was read from an etcd
      type: dict
      sample:
        worker-1: 10.106.0.1
"""

import copy
import json
import os
import platform

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import bundle, estate, etcd_unit, run_lock
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import versions
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import BUNDLE_PYTHON, bundle_module

PREFIX = "isthmus/v1/estate/"
SERVICES = "isthmus/v1/services/"


def read(module):
    """What exit_json is given: the record from etcd, else the copy, else none; and whether the lock is held."""
    cluster = module.params["cluster"]
    wanted = module.params["lock"] and module.params["run"] is not None and not module.check_mode
    locked = False
    documents, services, nodes = {}, {}, {}
    endpoints = endpoints_to_ask(module)
    if endpoints:
        documents, services, nodes, locked = read_etcd(module, endpoints, wanted)
    if wanted and not locked and not estate.in_pod():
        try:
            run_lock.take_file(run_lock.document(module.params["run"], run_lock.LOOKING), module.params["break_lock"])
        except run_lock.HeldError as exc:
            refuse(module, exc.holder)
        locked = True
    found = None
    if documents:
        owners = {
            name: found["owner"] for name, found in services.items() if isinstance(found, dict) and found.get("owner")
        }
        foreign = {name: owner for name, owner in owners.items() if owner != estate.OWNER}
        found = {"cluster": cluster, "documents": documents, "foreign_services": foreign, "nodes": nodes}
    else:
        try:
            documents = estate.read_json(estate.ESTATE)
        except ValueError as exc:
            module.warn(f"{estate.ESTATE} is damaged ({exc}) and not used")
        if documents:
            found = {"cluster": None, "documents": documents}
    return {"changed": False, "locked": locked, **({} if found is None else {"record": found})}


def refuse(module, holder):
    """End: another run has the lock."""
    module.fail_json(msg=run_lock.words(module.params["cluster"], holder), locked_by=dict(holder))


def hold(module, client, seconds):
    """Take the lock in etcd; what is true while this run has it. None for a bundle that is older than the lock."""
    locks = bundle_module(module, "isthmus_agent.run_lock", required=False)
    if locks is None:
        return None
    try:
        wanted = run_lock.document(module.params["run"], seconds)
        return locks.take(client, wanted, seconds, module.params["break_lock"])
    except locks.LockedError as exc:
        return refuse(module, exc.holder)


def release(module):
    """Give back what this run holds. It is no change of the host."""
    cluster = module.params["cluster"]
    name = run_lock.document(module.params["run"], 0)["name"]
    run_lock.release_file(name)
    endpoints = endpoints_to_ask(module)
    locks = bundle_module(module, "isthmus_agent.run_lock", required=False) if endpoints else None
    if locks is not None:  # else the file was all that this run had here
        kvstore = bundle_module(module, "isthmus_agent.kvstore")
        try:
            with kvstore.SyncEtcd(endpoints, *estate.operator_files(cluster), timeout=3.0) as client:
                locks.release(client, name)
        except (kvstore.EtcdError, OSError) as exc:
            module.warn(f"the lock of cluster {cluster} was not given back ({exc}); it ends by itself")


def endpoints_to_ask(module):
    """Of the cluster's etcd, on a host that has what it takes to ask it; else none."""
    endpoints = own_endpoints(module)
    return endpoints if estate.has_operator(module.params["cluster"]) and os.path.exists(BUNDLE_PYTHON) else []


def own_endpoints(module):
    """Of the cluster's etcd as this host knows it; empty on a host of none or of another cluster."""
    cluster = module.params["cluster"]
    try:
        node = estate.read_json(estate.NODE)
    except ValueError as exc:
        module.warn(f"{estate.NODE} is damaged ({exc}) and not used")
        node = None
    if node is not None:
        return node["etcd"]["endpoints"] if node["cluster"]["name"] == cluster else []
    # A run that ended early wrote the record, but not yet the host's specification.
    # In a pod there is no specification.
    settings = estate.etcd_settings()
    return [etcd_unit.local_url(settings)] if etcd_unit.cluster_of(settings) == cluster else []


def read_etcd(module, endpoints, lock):
    """The record's documents, the services' definitions and, in a pod, the cluster's nodes, empty, with a warning, when
    they cannot be read; and whether the lock is held, which is taken before."""
    # The bundle may be of an older version, which this run is about to replace: only the client is used.
    kvstore = bundle_module(module, "isthmus_agent.kvstore", required=False)
    cluster = module.params["cluster"]
    if kvstore is None:
        module.warn("the agent bundle has no etcd client; the copy of the estate record on the host is read")
        return {}, {}, {}, False
    locked = False
    try:
        with kvstore.SyncEtcd(endpoints, *estate.operator_files(cluster), timeout=3.0) as client:
            try:
                locked = lock and hold(module, client, run_lock.LOOKING) is not None
            except kvstore.EtcdNoSpace as exc:
                module.warn(
                    f"the etcd of cluster {cluster} is full and takes no lock and no record: {exc}. Next: "
                    f"{remedy(kvstore, exc)}, then run the playbook again"
                )
            found = [json_documents(module, prefix, client.range(prefix).kvs) for prefix in (PREFIX, SERVICES)]
            nodes = bundle_module(module, "isthmus_agent.estate_admin").dealt_nodes(client) if estate.in_pod() else {}
            return (*found, nodes, locked)
    except (kvstore.EtcdError, OSError) as exc:
        module.warn(f"the etcd of cluster {cluster} does not answer ({exc}); the copy on the host is read")
        return {}, {}, {}, locked


def json_documents(module, prefix, entries):
    """JSON objects by the rest of their keys; others are named in a warning."""
    documents = {}
    for entry in entries:
        try:
            documents[entry.key[len(prefix) :]] = json.loads(entry.value)
        except ValueError as exc:
            where = f"{entry.key} in the etcd of cluster {module.params['cluster']}"
            module.warn(f"{where} is not JSON and not used: {exc}")
    return documents


def with_authorities(record, formed):
    """The record with the certificate of each formed cluster's authority that it lacks and this host has pinned."""
    filled = copy.deepcopy(record)
    for cluster in formed:
        document = filled.get("clusters/" + cluster, {"state": "absent"})
        if document.get("state") != "absent" and not document.get("ca_certificate"):
            pinned = read_bytes(f"{estate.PKI}/trust/{cluster}.crt")
            document["ca_certificate"] = None if pinned is None else pinned.decode()
    return filled


def older_bundle(module):
    """The version of this host's bundle when it is older than the collection: it may lack what is called here."""
    found, own = bundle.installed().get("version"), module.params["version"]
    known = versions.valid(found) and own is not None
    return found if known and versions.order(found) < versions.order(own) else ""


def present(module, changes):
    """Write record and services; returns what exit_json is given."""
    cluster = module.params["cluster"]
    record = with_authorities(module.params["record"], module.params["formed"])
    services = module.params["services"] or {"present": [], "absent": []}
    # Of a cluster that has just formed, only its own hosts have the authority yet.
    own = {"clusters/" + cluster: record["clusters/" + cluster]}
    answer = {"cluster": cluster, "documents": record, "own": own}
    bare = not estate.has_etcd_data() or not estate.has_operator(cluster)
    if bare and not module.check_mode:
        module.warn(
            f"this host carries no etcd of cluster {cluster} yet; the estate record reaches that cluster when "
            "isthmus.mesh.site has run on its hosts"
        )
        return changes.result()
    older = older_bundle(module)
    if older and not module.check_mode:
        # A run with --limit or isthmus_serial that has not come to this host; what it wrote before is still true here.
        module.warn(
            f"{platform.node()} still has isthmus.mesh {older}, and this run is {module.params['version']}: the estate "
            f"record reaches cluster {cluster} when isthmus.mesh.site has run on its etcd hosts"
        )
        return changes.result()
    admin = None if older else bundle_module(module, "isthmus_agent.estate_admin")
    if admin is None or (module.check_mode and bare):
        changes.note(f"estate record of cluster {cluster}", "", "\n".join(sorted(record)))
        return changes.result(record=answer)
    kvstore = bundle_module(module, "isthmus_agent.kvstore")
    endpoints = estate.endpoints_from_record(record, cluster)
    apply = not module.check_mode
    locked = apply and module.params["run"] is not None
    try:
        with kvstore.SyncEtcd(endpoints, *estate.operator_files(cluster)) as client:
            # In check mode the bundle may be older than the fence.
            fence = {"fence": [hold(module, client, run_lock.CHANGING)]} if locked else {}
            estate.show(changes, admin.write_documents(client, record, apply, **fence))
            made = admin.write_services(client, services["present"], services["absent"], estate.OWNER, apply, **fence)
            estate.show(changes, made)
            estate.show(changes, admin.delete_reports(client, record["clusters/" + cluster], apply, **fence))
            if apply:
                admin.confirm(client, **fence)
    except admin.EstateError as exc:
        module.fail_json(msg=str(exc))
    except (kvstore.EtcdError, OSError) as exc:
        # One cluster's sick etcd is no reason to stop the hosts of the others.
        module.warn(
            f"the etcd of cluster {cluster} did not take the estate record: {exc}. Its registrars go on from their "
            f"hosts' copies. Next: {remedy(kvstore, exc)}, then run the playbook again"
        )
        return changes.result()
    return changes.result(record=answer, locked=locked)


def remedy(kvstore, exc):
    """What to do about an etcd that refuses a write."""
    if isinstance(exc, kvstore.EtcdNoSpace):
        return (
            "free space there (`etcdctl compact`, `etcdctl defrag`, `etcdctl alarm disarm`; docs/operating.md has them "
            "in full), raise etcd.quota_bytes of the cluster if it is to hold more"
        )
    if isinstance(exc, kvstore.EtcdPermissionDenied):
        return "run the playbook with --tags etcd on that cluster, which gives the operator's certificate its rights"
    return "look at `journalctl -u isthmus-etcd` on its etcd hosts"


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["read", "present", "released"], "default": "present"},
            "lock": {"type": "bool", "default": False},
            "break_lock": {"type": "str", "default": ""},
            "run": {
                "type": "dict",
                "options": {name: {"type": "str", "required": True} for name in ("by", "where", "process")},
            },
            "version": {"type": "str"},
            "cluster": {"type": "str", "required": True},
            "record": {"type": "dict"},
            "formed": {"type": "list", "elements": "str", "default": []},
            "services": {
                "type": "dict",
                "options": {
                    "present": {"type": "list", "elements": "dict", "default": []},
                    "absent": {"type": "list", "elements": "str", "default": []},
                },
            },
        },
        required_if=[("state", "present", ["record"]), ("state", "released", ["run"])],
        supports_check_mode=True,
    )
    if module.params["state"] == "read":
        module.exit_json(**read(module))
    if module.params["state"] == "released":
        release(module)
        module.exit_json(changed=False)
    module.exit_json(**present(module, Changes(module)))


if __name__ == "__main__":
    main()
