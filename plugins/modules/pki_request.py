#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: pki_request
short_description: Make a host's private keys and the signing requests they need
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Makes every private key that the host's spec names and that is missing or unreadable, on the host itself, with mode
    0600 and the owner of the program that uses it. A private key never leaves the host and is never part of a result.
  - Pins the certificate authorities that are already known, and returns signing requests for every certificate that is
    missing, damaged, different from the plan, or has less than a third of its lifetime left.
  - Writes, on an etcd host, the list of revoked certificates of the cluster's authority (C(revoked.crl), in DER), which
    etcd reads at every handshake.
  - Removes keys, certificates and pinned authorities of ours that the spec does not name any more. Those of an etcd
    member that the plan took away stay until M(isthmus.mesh.etcd_member) has taken it out of its cluster. The key of an
    authority is never removed.
  - What is pending is signed by M(isthmus.mesh.pki_sign) at each authority's place and installed by
    M(isthmus.mesh.pki_install). On a converged host nothing is pending.
attributes:
  check_mode:
    support: full
    description: Predicts the same keys and requests; on a host without the agent bundle by the files' existence only.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
  - isthmus.mesh.pki
options:
  trust:
    description: Certificate authorities known from the estate record, cluster name to PEM.
    type: dict
    default: {}
  lists:
    description:
      - Lists of revoked certificates from the estate record, cluster name to PEM.
      - Without one of the host's own cluster a list that is there stays; where there is none, the authority is asked
        for an empty one.
      - A certificate of this host that is in one gets a new key, and is signed anew.
    type: dict
    default: {}
  replacing:
    description:
      - Name of the cluster whose authority is being replaced. Of that one a second authority in the record is pinned
        beside the first; of any other it is refused.
    type: str
    default: ""
seealso:
  - module: isthmus.mesh.pki_sign
  - module: isthmus.mesh.pki_install
"""

EXAMPLES = r"""
- name: Make keys and signing requests
  isthmus.mesh.pki_request:
    spec: "{{ isthmus_spec }}"
  register: pki_requested
"""

RETURN = r"""
pending:
  description: What must be signed, grouped by authority. Empty on a converged host.
  returned: success
  type: list
  elements: dict
  contains:
    ca_cluster:
      description: Cluster whose authority signs.
      type: str
      sample: onprem
    ca_host:
      description: Inventory name of the host where that authority is.
      type: str
      sample: onprem-1
    requests:
      description: Signing requests; may be empty when only the authority's own certificate is wanted.
      type: list
      elements: dict
      contains:
        name:
          description: File name of the certificate, without suffix.
          type: str
          sample: agent
        csr:
          description: Signing request in PEM; V(none) when predicted in check mode before the key exists.
          type: str
        reason:
          description: Why it must be signed.
          type: str
          sample: there is none yet
certificates:
  description: Certificates that are good, with name, issuer, fingerprint and dates.
  returned: success
  type: dict
former_member:
  description: Whether an etcd member is on this host that the spec does not have.
  returned: success
  type: bool
"""

import datetime
import os
import pwd

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit, former, wireguard
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.key_pairs import ensure_key
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module


def ensure_owner(module, changes, owner):
    """The system user that will own a key exists (etcd's package comes later and accepts the user as it is)."""
    try:
        pwd.getpwnam(owner)
    except KeyError:
        changes.note(f"system user {owner}", "", "present")
        if not module.check_mode:
            # RHEL's useradd has the same options; the path of nologin differs and either is only a text in passwd.
            home = ["--no-create-home", "--home-dir", "/var/lib/" + owner, "--shell", "/usr/sbin/nologin"]
            module.run_command(["useradd", "--system", "--user-group", *home, owner], check_rc=True)


def pin_known(module, changes, pki, directory, cluster, known):
    """trust/<cluster>.crt holds the authority from the record. Returns the pinned PEM, None when still unknown."""
    path = os.path.join(directory, "trust", cluster + ".crt")
    found = read_bytes(path)
    if pki is None:
        if found is None and known is not None:
            changes.file(path, known)
        return known if found is None else found.decode(errors="replace")
    pinned = None
    if found is not None:
        try:
            pinned = pki.read_pin(found.decode(errors="replace"), path)
        except pki.PkiError as exc:
            if known is None:
                # A damaged pin is fetched again from the authority's place, over SSH like the first time.
                module.warn(f"{exc}; it is fetched again from the authority's host")
    if known is None:
        return pinned
    # One that has ended is still the one that is replaced, and no other is taken for it.
    known = pki.read_pin(known, f"the estate record's CA certificate of cluster {cluster}")
    added = [] if pinned is None else pki.strangers(pinned, known)
    if pinned is not None and len(added) == known.count("BEGIN CERTIFICATE"):
        raise pki.PkiError(
            f"{path} ({pki.describe(pinned.encode())['fingerprint']}) is not the authority that the estate record "
            f"holds for cluster {cluster} ({pki.describe(known.encode())['fingerprint']}). If that cluster was given "
            f"a new authority on purpose, remove {path} on this host and run again"
        )
    if added and module.params["replacing"] != cluster:
        raise pki.PkiError(
            f"the estate record has one more authority for cluster {cluster} ({', '.join(added)}) than {path}, and "
            "this host does not begin to trust it by itself. Next: if that cluster's authority is being replaced, run "
            f"the playbook isthmus.mesh.replace_authority with -e isthmus_replace_authority={cluster}"
        )
    if pinned is not None:
        # The record keeps the certificate that it had first; a renewed one comes from the authority's place.
        known = pki.renewed(known, pinned)
    changes.file(path, known, shown=(describe_pin(pki, pinned), describe_pin(pki, known)))
    return known


def describe_pin(pki, pem):
    """One line about each pinned CA certificate for the diff."""
    lines = []
    for one in [] if pem is None else pem.split("-----END CERTIFICATE-----")[:-1]:
        about = pki.describe(f"{one}-----END CERTIFICATE-----".encode())
        lines.append(f"{about['issuer']} {about['fingerprint']} until {about['not_after']}")
    return "\n".join(lines)


def check_authority(changes, pki, directory, cluster, known, now):
    """A lost or foreign CA key is told at every run, not only when something must be signed."""
    key_path = os.path.join(directory, "ca.key")
    key = read_bytes(key_path)
    certificate = read_bytes(os.path.join(directory, "ca.crt"))
    evidence = {} if known is None else {f"trust/{cluster}.crt": known}
    if key is None and certificate is None and not evidence:
        return
    established = pki.establish_authority(cluster, key, certificate, evidence, directory, now)
    changes.file(key_path, key, mode=0o600, secret=True)
    if established.write_certificate is not None:
        changes.file(os.path.join(directory, "ca.crt"), established.write_certificate)


def ensure_list(changes, revocation, directory, cluster, ca, known):
    """The list of revoked certificates is there. Returns whether the authority must be asked for one."""
    path = os.path.join(directory, etcd_unit.REVOKED)
    found = read_bytes(path)
    if revocation is None:
        if found is None and known is not None:
            changes.note(path, "", "from the estate record")
        return found is None and known is None
    if ca is None:
        return True
    if known is not None:
        wanted = revocation.to_der(known, ca, f"the estate record's document of cluster {cluster}")
        changes.file(path, wanted, shown=(describe_list(revocation, found), revocation.describe_list(wanted)))
        return False
    if found is None:
        return True
    revocation.check_der(found, ca, path)
    changes.file(path, found)
    return False


def describe_list(revocation, found):
    """One line about what is there for the diff."""
    try:
        return "" if found is None else revocation.describe_list(found)
    except ValueError:
        return "(damaged)"


def run(module, pki, revocation):
    """Do the module's work; returns what exit_json is given. ``pki`` is None in check mode without a bundle."""
    directory = module.params["directory"]
    spec = module.params["spec"]
    wanted = spec["pki"]
    now = datetime.datetime.now(datetime.timezone.utc)
    changes = Changes(module)
    specs = {}
    if pki is not None:
        specs = {entry["name"]: pki.CertificateSpec.from_dict(entry) for entry in wanted["certificates"]}
    former_member = spec.get("member") is None and bool(former.member_remains())

    for owner in sorted({entry["owner"] for entry in wanted["certificates"]} - {"root"}):
        ensure_owner(module, changes, owner)
    changes.directory(directory)
    changes.directory(os.path.join(directory, "trust"))

    places = {entry["ca_cluster"]: entry["ca_host"] for entry in wanted["certificates"]}
    places[wanted["ca"]["cluster"]] = wanted["ca"]["host"]
    groups = {}

    def group(cluster):
        return groups.setdefault(cluster, {"ca_cluster": cluster, "ca_host": places[cluster], "requests": []})

    pinned = {}
    for cluster in wanted["trust"]:
        pinned[cluster] = pin_known(module, changes, pki, directory, cluster, module.params["trust"].get(cluster))
        if pinned[cluster] is None:
            if cluster not in places:
                module.fail_json(
                    msg=f"the CA certificate of cluster {cluster} is not known: it is not in the estate record, and "
                    "this host asks that cluster for no certificate. Run the playbook on that cluster first"
                )
            group(cluster)
    if wanted["ca"]["here"] and pki is not None:
        own = wanted["ca"]["cluster"]
        check_authority(changes, pki, directory, own, pinned.get(own), now)
    if spec.get("member") is not None:
        own = wanted["ca"]["cluster"]
        if ensure_list(changes, revocation, directory, own, pinned.get(own), module.params["lists"].get(own)):
            group(own)

    for tunnel in openings.tunnels(spec):
        wireguard.ensure_key(changes, os.path.join(directory, os.path.basename(tunnel["key"])))

    good = {}
    for entry in wanted["certificates"]:
        path = os.path.join(directory, entry["name"] + ".crt")
        certificate = read_bytes(path)
        listed = module.params["lists"].get(entry["ca_cluster"])
        revoked = revocation is not None and revocation.is_listed(certificate, listed)
        discard = "its certificate was revoked when this host left" if revoked else ""
        key = ensure_key(changes, pki, os.path.join(directory, entry["name"] + ".key"), entry["owner"], discard)
        if pki is None:
            reason = None if key is not None and certificate is not None else "there is none yet"
        else:
            about = specs[entry["name"]]
            reason = pki.renewal_reason(about, key, certificate, pinned.get(about.ca_cluster), now)
        if reason is None:
            changes.file(path, certificate)
            if pki is not None:
                good[entry["name"]] = pki.describe(certificate)
            continue
        request = None if pki is None or key is None else pki.new_request(key, entry["cn"], path)
        group(entry["ca_cluster"])["requests"].append({"name": entry["name"], "csr": request, "reason": reason})
    if not former_member:
        former.remove_unlisted(changes, spec, directory)
    pending = [groups[cluster] for cluster in sorted(groups)]
    return changes.result(pending=pending, certificates=good, former_member=former_member)


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "trust": {"type": "dict", "default": {}},
            "lists": {"type": "dict", "default": {}},
            "replacing": {"type": "str", "default": ""},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        supports_check_mode=True,
    )
    pki = bundle_module(module, "isthmus_agent.pki", needs="read_pin")
    revocation = bundle_module(module, "isthmus_agent.revocation")
    refusals = () if pki is None else (pki.PkiError,)
    try:
        result = run(module, pki, revocation)
    except refusals as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
