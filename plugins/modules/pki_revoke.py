#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
module: pki_revoke
short_description: Make a list of revoked certificates at a cluster's certificate authority
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Runs on the host where a cluster's certificate authority is, and signs a list of all certificates that the authority
    gave to hosts that were forgotten or removed, as its ledger (C(issued.json)) has them.
  - Changes nothing. The list goes into the estate record (M(isthmus.mesh.plan)), and from there to every etcd host of
    the cluster (M(isthmus.mesh.pki_request)).
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.pki
options:
  cluster:
    description: Cluster of the authority.
    type: str
    required: true
  hosts:
    description: Hosts whose certificates are revoked.
    type: list
    elements: str
    default: []
  names:
    description: Common names whose certificates are revoked, whichever host has them.
    type: list
    elements: str
    default: []
  known_ca:
    description: The authority's certificate as the estate record holds it, in PEM.
    type: str
    required: true
  crl:
    description: The list before, as the estate record holds it, in PEM. What is in it stays revoked.
    type: str
seealso:
  - module: isthmus.mesh.pki_sign
  - module: isthmus.mesh.pki_request
"""

EXAMPLES = r"""
- name: The authority revokes what a stolen host has
  isthmus.mesh.pki_revoke:
    cluster: onprem
    hosts: [onprem-3]
    known_ca: "{{ isthmus_record['clusters/onprem'].ca_certificate }}"
    crl: "{{ isthmus_record['clusters/onprem'].crl | default(omit) }}"
"""

RETURN = r"""
cluster:
  description: Cluster of the authority.
  returned: success
  type: str
  sample: onprem
crl:
  description: The list in PEM.
  returned: success
  type: str
revoked:
  description: Certificates that were not in the list before, a line each.
  returned: success
  type: list
  elements: str
  sample: ["root of onprem-3 (CN=root, serial 5f2a)"]
since:
  description:
    - Since when the ledger has all certificates, while older ones may be valid. These cannot be revoked by host.
  returned: when there may be such
  type: str
  sample: "2026-01-02T03:04:05Z"
"""

import datetime
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils.files import read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module


def run(params, pki, revocation):
    """What exit_json is given."""
    directory = params["directory"]
    now = datetime.datetime.now(datetime.timezone.utc)
    key, certificate = (read_bytes(os.path.join(directory, name)) for name in ("ca.key", "ca.crt"))
    evidence = {"the estate record": params["known_ca"]}
    authority = pki.establish_authority(params["cluster"], key, certificate, evidence, directory, now).authority
    path = os.path.join(directory, revocation.LEDGER)
    ledger = revocation.Ledger.read(read_bytes(path), path, now)
    doomed = ledger.of(params["hosts"], params["names"])
    done = revocation.revoke(authority, doomed, params["crl"], params["known_ca"], "the estate record's list", now)
    result = {"cluster": params["cluster"], "crl": done.crl, "revoked": [one.words for one in done.revoked]}
    since = ledger.lacks(now)
    if since is not None:
        result["since"] = since.strftime("%Y-%m-%dT%H:%M:%SZ")
    return result


def main():
    module = AnsibleModule(
        argument_spec={
            "cluster": {"type": "str", "required": True},
            "hosts": {"type": "list", "elements": "str", "default": []},
            "names": {"type": "list", "elements": "str", "default": []},
            "known_ca": {"type": "str", "required": True},
            "crl": {"type": "str"},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        supports_check_mode=True,
    )
    pki = bundle_module(module, "isthmus_agent.pki")
    revocation = bundle_module(module, "isthmus_agent.revocation")
    if pki is None or revocation is None:
        module.fail_json(
            msg="This host has no agent bundle of this version, which is needed to revoke certificates. Next: run "
            "isthmus.mesh.site on it, or bring it back from a backup"
        )
    try:
        result = run(module.params, pki, revocation)
    except pki.PkiError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
