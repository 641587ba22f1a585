#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: pki_install
short_description: Install signed certificates and pin the authorities that signed them
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Writes the certificates that M(isthmus.mesh.pki_sign) returned and pins each authority (C(trust/<cluster>.crt)).
  - On an etcd host that has no list of revoked certificates (C(revoked.crl)) the authority's is written.
  - A certificate is installed only when it belongs to the key on this host, is signed by the pinned authority and is
    what the plan asks for. A pinned authority is never replaced by another one.
  - An authority whose host could not be reached, or that refused to sign, leaves its certificates pending. That is a
    warning, with the reason; the module fails when a certificate of the host's own cluster is not there at all, since
    nothing works without it.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
  - isthmus.mesh.pki
options:
  signed:
    description: Results of M(isthmus.mesh.pki_sign), as registered from the loop.
    type: list
    elements: dict
    required: true
seealso:
  - module: isthmus.mesh.pki_request
  - module: isthmus.mesh.pki_sign
"""

EXAMPLES = r"""
- name: Install certificates and trust
  isthmus.mesh.pki_install:
    spec: "{{ isthmus_spec }}"
    signed: "{{ pki_signed.results }}"
  when: pki_requested.pending | length > 0
"""

RETURN = r"""
installed:
  description: Names of the certificates that were installed.
  returned: success
  type: list
  elements: str
  sample: [agent]
still_pending:
  description: Certificates and pinned authorities that are still missing because an authority signed nothing.
  returned: success
  type: list
  elements: str
  sample: [peer-cloud, trust/cloud]
"""

import datetime
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.key_pairs import write_certificate
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module


def pin(pki, changes, directory, cluster, authority, now):
    """Pin the authority of a cluster, unless another one is pinned. Returns its certificate."""
    path = os.path.join(directory, "trust", cluster + ".crt")
    authority = pki.check_pin(authority, f"the answer of cluster {cluster}'s authority", now)
    about = pki.describe(authority.encode())
    before = ""
    found = read_bytes(path)
    if found is not None:
        try:
            pinned = pki.read_pin(found.decode(errors="replace"), path)
        except pki.PkiError as exc:
            before = str(exc)
        else:
            before = pki.describe(pinned.encode())["fingerprint"]
            if not pki.trusts(pinned, authority):
                raise pki.PkiError(
                    f"{path} ({before}) is not the authority that cluster {cluster} now signs with "
                    f"({about['fingerprint']}). If that cluster was given a new authority on purpose, remove {path} on "
                    "this host and run again"
                )
            if pinned.count("BEGIN CERTIFICATE") > 1:  # while the authority is being replaced
                changes.file(path, pinned)
                return authority
    changes.file(
        path, authority, shown=(before, f"{about['issuer']} {about['fingerprint']} until {about['not_after']}")
    )
    return authority


def install(pki, changes, directory, spec, certificate, authority, now):
    """Write one certificate after checking that it is what was asked for."""
    path = os.path.join(directory, spec.name + ".crt")
    key = read_bytes(os.path.join(directory, spec.name + ".key"))
    wrong = pki.renewal_reason(spec, key, certificate.encode(), authority, now)
    if wrong is not None:
        raise pki.PkiError(
            f"the certificate {spec.name} that cluster {spec.ca_cluster} signed cannot be installed: {wrong}. "
            "Compare the clocks of this host and of " + spec.ca_host
        )
    write_certificate(changes, pki, path, certificate)


def install_list(revocation, changes, directory, crl, authority):
    """The list of revoked certificates that the authority gave, where there is none."""
    path = os.path.join(directory, etcd_unit.REVOKED)
    if os.path.exists(path):
        return
    if revocation is None or crl is None or authority is None:
        changes.note(path, "", "from the authority")
        return
    wanted = revocation.to_der(crl, authority, "the authority's answer")
    changes.file(path, wanted, shown=("", revocation.describe_list(wanted)))


def run(module, pki, revocation, changes):
    """Install; returns what exit_json is given."""
    directory = module.params["directory"]
    wanted = module.params["spec"]["pki"]
    now = datetime.datetime.now(datetime.timezone.utc)
    specs = {entry["name"]: entry for entry in wanted["certificates"]}
    member = module.params["spec"].get("member") is not None
    listed = not member or os.path.exists(os.path.join(directory, etcd_unit.REVOKED))
    installed = []
    predicted = set()
    for answer in module.params["signed"]:
        if "certificates" not in answer:
            continue  # see `refusals`
        cluster, authority = answer["cluster"], answer["ca_certificate"]
        pinned = None
        if cluster in wanted["trust"] and (authority is None or pki is None):
            predicted.add("trust/" + cluster)
            path = os.path.join(directory, "trust", cluster + ".crt")
            if not os.path.exists(path):
                changes.note(path, "", f"authority of cluster {cluster}")
        elif authority is not None:
            if cluster in wanted["trust"]:
                predicted.add("trust/" + cluster)
                pinned = pin(pki, changes, directory, cluster, authority, now)
            else:
                pinned = authority
        for item in answer["certificates"]:
            installed.append(item["name"])
            if item["certificate"] is None:
                changes.note(os.path.join(directory, item["name"] + ".crt"), "", "signed by " + cluster)
            else:
                spec = pki.CertificateSpec.from_dict(specs[item["name"]])
                install(pki, changes, directory, spec, item["certificate"], pinned, now)
        if member and cluster == wanted["ca"]["cluster"]:
            listed = True
            install_list(revocation, changes, directory, answer.get("crl"), pinned)
    missing = [
        name for name in specs if name not in installed and not os.path.exists(os.path.join(directory, name + ".crt"))
    ]
    missing += [
        "trust/" + cluster
        for cluster in wanted["trust"]
        if "trust/" + cluster not in predicted
        and not os.path.exists(os.path.join(directory, "trust", cluster + ".crt"))
    ]
    if not listed:
        missing.append(etcd_unit.REVOKED)
    return changes.result(installed=installed, still_pending=missing)


def refusals(signed):
    """Why an authority signed nothing, by its cluster."""
    return {
        answer["pki_group"]["ca_cluster"]: f"{answer['pki_group']['ca_host']}: {answer.get('msg', 'no answer')}"
        for answer in signed
        if "certificates" not in answer
    }


def report_pending(module, result):
    """Own cluster's certificates are needed, a peer's may come later."""
    wanted = module.params["spec"]["pki"]
    own = wanted["ca"]["cluster"]
    reasons = refusals(module.params["signed"])
    needed = {entry["name"] for entry in wanted["certificates"] if entry["ca_cluster"] == own} | {"trust/" + own}
    missing = needed.intersection(result["still_pending"])
    if missing:
        module.fail_json(
            msg=f"{', '.join(sorted(missing))} could not be signed: the authority of cluster {own} signed nothing "
            f"({reasons.get(own, wanted['ca']['host'] + ': no answer')}). Repair that and run again",
            **result,
        )
    for cluster, reason in sorted(reasons.items()):
        module.warn(
            f"the authority of cluster {cluster} signed nothing ({reason}). What is there goes on being used, the "
            f"rest works without it; run the playbook again when that is repaired. Still missing here: "
            f"{', '.join(result['still_pending']) or 'nothing'}"
        )


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "signed": {"type": "list", "elements": "dict", "required": True},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        supports_check_mode=True,
    )
    changes = Changes(module)
    pki = bundle_module(module, "isthmus_agent.pki", needs="read_pin")
    revocation = bundle_module(module, "isthmus_agent.revocation")
    errors = () if pki is None else (pki.PkiError,)
    try:
        result = run(module, pki, revocation, changes)
    except errors as exc:
        module.fail_json(msg=str(exc))
    report_pending(module, result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
