#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: pki_sign
short_description: Sign certificates at a cluster's certificate authority
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Runs on the host where a cluster's certificate authority is (C(delegate_to)) and signs what
    M(isthmus.mesh.pki_request) left pending on another host.
  - Name, alternative names and usages come from O(certificates), which the plan made; of a signing request only the
    public key is used. So a host can never obtain a certificate for another name.
  - Makes the authority at its first use. An authority that an operator placed there (C(ca.key) and C(ca.crt), for
    example an intermediate) is used as it is. One whose key is lost is refused, never made again.
  - Every certificate is written into the authority's ledger (C(issued.json)), so that M(isthmus.mesh.pki_revoke) can
    tell which ones a lost host has.
  - Signing is serialised by a lock on the authority's host.
attributes:
  check_mode:
    support: full
    description: Predicts; certificates in the result are then V(none).
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.pki
options:
  cluster:
    description: Cluster whose authority signs.
    type: str
    required: true
  host:
    description: The asking host's inventory name, for the ledger.
    type: str
    required: true
  certificates:
    description: The asking host's certificates as its spec has them (C(pki.certificates)).
    type: list
    elements: dict
    required: true
  requests:
    description: Signing requests of M(isthmus.mesh.pki_request). Without any, only the CA certificate is returned.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of one of O(certificates).
        type: str
        required: true
      csr:
        description: Signing request in PEM. May be missing in check mode only.
        type: str
      reason:
        description: Why it must be signed; shown in the diff.
        type: str
        default: ""
  known_ca:
    description: The authority's certificate as the estate record holds it, in PEM, when it does.
    type: str
seealso:
  - module: isthmus.mesh.pki_request
  - module: isthmus.mesh.pki_install
  - module: isthmus.mesh.pki_revoke
"""

EXAMPLES = r"""
- name: Have certificates signed by each cluster's authority
  isthmus.mesh.pki_sign:
    cluster: "{{ pki_group.ca_cluster }}"
    host: "{{ isthmus_spec.host }}"
    certificates: "{{ isthmus_spec.pki.certificates }}"
    requests: "{{ pki_group.requests }}"
  delegate_to: "{{ pki_group.ca_host }}"
  loop: "{{ pki_requested.pending }}"
  loop_control:
    loop_var: pki_group
  register: pki_signed
"""

RETURN = r"""
cluster:
  description: Cluster whose authority signed.
  returned: success
  type: str
  sample: onprem
ca_certificate:
  description: Certificate of the authority in PEM; V(none) when it is only predicted.
  returned: success
  type: str
crl:
  description:
    - A list of revoked certificates in PEM in which there are none yet, for an etcd host that has no list and for which
      the estate record has none; V(none) when the authority is only predicted.
  returned: success
  type: str
certificates:
  description: What was signed.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the certificate.
      type: str
      sample: agent
    certificate:
      description: Certificate in PEM; V(none) in check mode.
      type: str
"""

import datetime
import fcntl
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module


def predict(module, changes):
    """Check mode on a host without the bundle: the authority will be made if it is not there, everything is signed."""
    directory = module.params["directory"]
    if read_bytes(os.path.join(directory, "ca.key")) is None:
        changes.note(os.path.join(directory, "ca.crt"), "", f"new authority of cluster {module.params['cluster']}")
    note_signed(changes, module.params["requests"], {})
    return changes.result(
        cluster=module.params["cluster"],
        ca_certificate=None,
        crl=None,
        certificates=[{"name": request["name"], "certificate": None} for request in module.params["requests"]],
    )


def note_signed(changes, requests, signed):
    """Say in the diff what was (or would be) signed and why."""
    for request in requests:
        changes.note(f"certificate {request['name']}", request["reason"], signed.get(request["name"], "signed"))


def run(module, pki, revocation, changes):
    """Establish the authority and sign; returns what exit_json is given."""
    directory, cluster = module.params["directory"], module.params["cluster"]
    now = datetime.datetime.now(datetime.timezone.utc)
    evidence = {}
    if module.params["known_ca"]:
        evidence["the estate record"] = module.params["known_ca"]
    pinned_path = os.path.join(directory, "trust", cluster + ".crt")
    pinned = read_bytes(pinned_path)
    if pinned is not None:
        try:
            evidence[pinned_path] = pki.read_pin(pinned.decode(errors="replace"), pinned_path)
        except pki.PkiError as exc:
            module.warn(f"{exc}; it is not used here and will be written again")

    key_path, certificate_path = os.path.join(directory, "ca.key"), os.path.join(directory, "ca.crt")
    key = read_bytes(key_path)
    established = pki.establish_authority(cluster, key, read_bytes(certificate_path), evidence, directory, now)
    # The key first: a run that is interrupted here leaves a key nobody knows of, for which the next one makes the
    # certificate. The other way round would look like a lost key.
    changes.file(key_path, established.write_key or key, mode=0o600, secret=True)
    if established.write_certificate is not None:
        about = pki.describe(established.write_certificate)
        after = f"{about['issuer']} {about['fingerprint']} until {about['not_after']}"
        changes.file(certificate_path, established.write_certificate, shown=("", after))

    ledger_path = os.path.join(directory, revocation.LEDGER)
    held = read_bytes(ledger_path)
    ledger = revocation.Ledger.read(held, ledger_path, now, new=not evidence)

    specs = {entry["name"]: entry for entry in module.params["certificates"]}
    signed = []
    shown = {}
    for request in module.params["requests"]:
        name = request["name"]
        if name not in specs:
            raise pki.PkiError(f"a certificate {name!r} is requested that the plan does not give to that host")
        spec = pki.CertificateSpec.from_dict(specs[name])
        if module.check_mode:
            signed.append({"name": name, "certificate": None})
            continue
        certificate = established.authority.sign(spec, request["csr"] or "", now)
        about = pki.describe(certificate.encode())
        shown[name] = f"CN={about['cn']} {about['fingerprint']} until {about['not_after']}"
        signed.append({"name": name, "certificate": certificate})
        ledger = ledger.with_certificate(certificate, module.params["host"], name)
    note_signed(changes, module.params["requests"], shown)
    if shown or held is None:
        # Before anybody gets them: one that is not in it could not be revoked.
        changes.file(ledger_path, ledger.text(now), shown=("", "ledger of what was signed"))
    predicted = module.check_mode and established.write_certificate is not None
    return changes.result(
        cluster=cluster,
        ca_certificate=None if predicted else established.authority.pem,
        crl=None if predicted else established.authority.sign_list({}, 0, now),
        certificates=signed,
    )


def main():
    module = AnsibleModule(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "host": {"type": "str", "required": True},
            "certificates": {"type": "list", "elements": "dict", "required": True},
            "requests": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "csr": {"type": "str"},
                    "reason": {"type": "str", "default": ""},
                },
            },
            "known_ca": {"type": "str"},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        supports_check_mode=True,
    )
    changes = Changes(module)
    pki = bundle_module(module, "isthmus_agent.pki", needs="read_pin")
    revocation = bundle_module(module, "isthmus_agent.revocation")
    if pki is None or revocation is None:
        module.exit_json(**predict(module, changes))
    try:
        if module.check_mode:
            result = run(module, pki, revocation, changes)
        else:
            os.makedirs(module.params["directory"], exist_ok=True)
            # Many hosts ask at once (forks); the first one makes the authority, all others must see it.
            with open(os.path.join(module.params["directory"], ".ca.lock"), "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                result = run(module, pki, revocation, changes)
    except pki.PkiError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
