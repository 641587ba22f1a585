#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: pki_replace
short_description: Replace a cluster's certificate authority, step by step
version_added: 1.0.0
description:
  - Runs at the authority's place. Between the steps every host of the mesh takes the returned document's authorities as
    its trust; so that at no time a certificate is used that somebody does not trust.
  - V(begin) makes a new authority when the record knows one only. What was there, when it was not lost, is kept as
    C(ca.key.replaced) and C(ca.crt.replaced). The record then has both, the old one first, so that nothing is signed
    anew yet.
  - V(sign) puts the new one first, so that every certificate is signed anew, and has it sign the list of revoked
    certificates, which etcd hosts would not take from one that is trusted no more.
  - V(end) takes the old one out.
  - A step that was done returns the same document again.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.pki
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  step:
    description: Which step.
    type: str
    choices: [begin, sign, end]
    required: true
  record:
    description: The cluster's document of the estate record.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Both authorities are to be trusted
  isthmus.mesh.pki_replace:
    step: begin
    record: "{{ isthmus_record['clusters/onprem'] }}"
  delegate_to: "{{ isthmus_record['clusters/onprem'].ca_host }}"
"""

RETURN = r"""
document:
  description: The cluster's document as it is to be written, with a higher revision when it changed.
  returned: success
  type: dict
"""

import datetime
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module


def begin(pki, changes, cluster, known, directory, now):
    """The authorities that are trusted from now on, with the new one made."""
    if len(known) > 1:
        return known
    key_path, certificate_path = os.path.join(directory, "ca.key"), os.path.join(directory, "ca.crt")
    key = read_bytes(key_path)
    if key is not None and pki.certificate_of_key(key, known, key_path) is not None:
        for path in (key_path, certificate_path):
            changes.note(path, "", f"kept as {path}.replaced")
            if not changes.module.check_mode and os.path.exists(path):
                os.replace(path, path + ".replaced")
        key = None
    # A key that the record does not know is that of a run that was interrupted here.
    found = read_bytes(certificate_path)
    if key is not None and found is not None:
        made = pki.certificate_of_key(key, [found.decode(errors="replace")], key_path)
        if made is not None:
            return [*known, made]
    key, certificate = pki.new_authority(cluster, now, key)
    changes.file(key_path, key, mode=0o600, secret=True)
    about = pki.describe(certificate)
    changes.file(certificate_path, certificate, shown=("", f"{about['issuer']} {about['fingerprint']}"))
    return [*known, certificate.decode()]


def signer_first(pki, known, directory):
    """The same authorities, the one at this place first."""
    certificate = (read_bytes(os.path.join(directory, "ca.crt")) or b"").decode(errors="replace")
    own = [one for one in known if certificate and pki.same_authority(certificate, one)]
    if not own:
        raise pki.PkiError(
            f"{directory}/ca.crt is none of the authorities that the estate record holds. Nothing was changed. Next: "
            "run the playbook on the host that the record names as the authority's place"
        )
    return own + [one for one in known if one not in own]


def revoked_list(pki, revocation, document, directory, now):
    """The list of revoked certificates of the cluster's document, by the authority at this place."""
    key, certificate = (read_bytes(os.path.join(directory, name)) for name in ("ca.key", "ca.crt"))
    held = document["ca_certificate"]
    evidence = {"the estate record": held}
    authority = pki.establish_authority(document["name"], key, certificate, evidence, directory, now).authority
    return revocation.taken_over(authority, document.get("crl"), held, "the estate record's list", now)


def run(module, pki, revocation, changes):
    """Do the step; returns what exit_json is given."""
    document, step = module.params["record"], module.params["step"]
    directory = module.params["directory"]
    now = datetime.datetime.now(datetime.timezone.utc)
    cluster, held = document["name"], document.get("ca_certificate")
    if not held:
        raise pki.PkiError(
            f"the estate record holds no authority of cluster {cluster} yet, so there is none to replace. Nothing was "
            "changed. Next: run the playbook isthmus.mesh.site"
        )
    before = pki.each_certificate(held)
    if step == "begin":
        after = begin(pki, changes, cluster, before, directory, now)
    elif len(before) == 1:
        after = before
    else:
        after = signer_first(pki, before, directory)
        after = after[:1] if step == "end" else after
    if after != before:
        changes.note(
            f"authority of cluster {cluster} in the estate record",
            "\n".join(pki.describe(one.encode())["fingerprint"] for one in before),
            "\n".join(pki.describe(one.encode())["fingerprint"] for one in after),
        )
        document = {**document, "ca_certificate": "".join(after)}
    if step != "begin" and len(before) > 1:
        listed = revoked_list(pki, revocation, module.params["record"], directory, now)
        if listed != document.get("crl"):
            changes.note(f"list of revoked certificates of cluster {cluster}", "", "signed by the new authority")
            document = {**document, "crl": listed}
    if document != module.params["record"]:
        document = {**document, "revision": document["revision"] + 1}
    return changes.result(document=document)


def main():
    module = AnsibleModule(
        argument_spec={
            "step": {"type": "str", "choices": ["begin", "sign", "end"], "required": True},
            "record": {"type": "dict", "required": True},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        supports_check_mode=True,
    )
    changes = Changes(module)
    pki = bundle_module(module, "isthmus_agent.pki")
    revocation = bundle_module(module, "isthmus_agent.revocation")
    if pki is None or revocation is None:
        module.exit_json(**changes.result(document=module.params["record"]))
    try:
        result = run(module, pki, revocation, changes)
    except pki.PkiError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
