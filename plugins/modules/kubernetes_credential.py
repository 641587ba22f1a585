#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kubernetes_credential
short_description: The key and certificate by which a registrar reads its cluster's Kubernetes API
version_added: 1.0.0
description:
  - Makes, on an etcd host of a Kubernetes cluster, the registrar's private key where there is none that can be read,
    and returns a signing request for it. The key never leaves the host.
  - With O(signed), what M(isthmus.mesh.kubernetes_access) returned, installs the certificate and the authority by
    which the API server is verified.
  - A certificate is to be signed anew when it is missing or damaged, when its name or key is another one, or when less
    than a third of its lifetime is left.
attributes:
  check_mode:
    support: full
    description: Predicts the same key and request; on a host without the agent bundle by the files' existence only.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.spec
  - isthmus.mesh.pki
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  signed:
    description: Result of M(isthmus.mesh.kubernetes_access), as registered.
    type: dict
seealso:
  - module: isthmus.mesh.kubernetes_access
"""

EXAMPLES = r"""
- name: The registrar has a key
  isthmus.mesh.kubernetes_credential:
    spec: "{{ isthmus_spec }}"
  register: credential

- name: The registrar has a certificate
  isthmus.mesh.kubernetes_credential:
    spec: "{{ isthmus_spec }}"
    signed: "{{ access }}"
"""

RETURN = r"""
credential:
  description: What M(isthmus.mesh.kubernetes_access) wants to know of the host, C(registrars).
  returned: success
  type: dict
  contains:
    host:
      description: Inventory name of the host.
      type: str
    csr:
      description: Signing request in PEM; V(none) in check mode before the key exists.
      type: str
    reason:
      description: Why a certificate must be signed; V(none) when the one that is there is good.
      type: str
    ca:
      description: The authorities (PEM) by which the host verifies the API server now; V(none) when it has none.
      type: str
    usable:
      description: Whether there is a certificate, also one that is to be renewed.
      type: bool
"""

import datetime
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.key_pairs import ensure_key, write_certificate
from ansible_collections.isthmus.mesh.plugins.module_utils.kubernetes_access import registrar_user
from ansible_collections.isthmus.mesh.plugins.module_utils.respawn import bundle_module

NAME = "kubernetes"


class Credential:
    """The files `kubernetes.key`, `kubernetes.crt` and `kubernetes.ca` of this host."""

    def __init__(self, module, changes, pki):
        self.changes, self.pki = changes, pki
        self.host = module.params["spec"]["host"]
        self.directory = module.params["directory"]
        self.now = datetime.datetime.now(datetime.timezone.utc)

    def path(self, end):
        return os.path.join(self.directory, f"{NAME}.{end}")

    def user(self, key):
        return registrar_user(self.host, self.pki.public_der(key, self.path("key")))

    def reason(self, key, certificate):
        """Why it must be signed (again); None when it is good."""
        if self.pki is None or key is None:
            return None if key is not None and certificate is not None else "there is none yet"
        nothing = frozenset()
        wanted = self.pki.CertificateSpec(
            name=NAME,
            ca_cluster="Kubernetes",
            ca_host="Kubernetes",
            cn=self.user(key),
            sans_dns=nothing,
            sans_ip=nothing,
            usages=frozenset(["client"]),
            owner="root",
        )
        # The authority of clients is not that of the API server's own certificate, and is not known here.
        return self.pki.renewal_reason(wanted, key, certificate, None, self.now)

    def request(self):
        """The key, and what is to be told about it."""
        self.changes.directory(self.directory)
        key = ensure_key(self.changes, self.pki, self.path("key"))
        certificate, ca = read_bytes(self.path("crt")), read_bytes(self.path("ca"))
        reason = self.reason(key, certificate)
        csr = None
        if key is not None and self.pki is not None:
            csr = self.pki.new_request(key, self.user(key), self.path("key"))
        return {
            "host": self.host,
            "csr": csr,
            "reason": reason,
            "ca": None if ca is None else ca.decode("ascii", errors="replace"),
            "usable": certificate is not None and key is not None,
        }

    def install(self, signed):
        """What Kubernetes signed, and its authority, are in place."""
        certificates = signed.get("certificates") or {}
        if signed.get("ca"):
            self.changes.file(self.path("ca"), signed["ca"])
        if self.host not in certificates:
            return
        certificate, path = certificates[self.host], self.path("crt")
        if certificate is None:
            self.changes.note(path, "", "signed by Kubernetes")
            return
        key = read_bytes(self.path("key"))
        wrong = self.reason(key, certificate.encode())
        if wrong is not None:
            raise self.pki.PkiError(
                f"the certificate that Kubernetes signed cannot be installed at {path}: {wrong}. Compare the clocks of "
                "this host and of Kubernetes' control plane; kube-controller-manager may sign for too short a time "
                "(--cluster-signing-duration)"
            )
        write_certificate(self.changes, self.pki, path, certificate)


def main():
    module = AnsibleModule(
        argument_spec={
            "spec": {"type": "dict", "required": True},
            "signed": {"type": "dict"},
            "directory": {"type": "path", "default": "/etc/isthmus/pki"},
        },
        supports_check_mode=True,
    )
    changes = Changes(module)
    pki = bundle_module(module, "isthmus_agent.pki")
    credential = Credential(module, changes, pki)
    refusals = () if pki is None else (pki.PkiError,)
    try:
        if module.params["signed"] is not None:
            credential.install(module.params["signed"])
            module.exit_json(**changes.result())
        found = credential.request()
    except refusals as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(**changes.result(credential=found))


if __name__ == "__main__":
    main()
