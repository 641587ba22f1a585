#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kubernetes_access
short_description: Let a cluster's registrars into its Kubernetes API
version_added: 1.0.0
description:
  - Runs where the API is reached from (C(delegate_to)). Applies the ClusterRole and the ClusterRoleBinding
    C(isthmus-registrar), and has the requests of the registrars signed by Kubernetes' own authority, through
    CertificateSigningRequests that it makes, approves and deletes.
  - The role lets the registrars C(get), C(list) and C(watch) nodes, namespaces, pods, services and endpointslices, and
    C(create), C(patch) and C(delete) services and endpointslices, of which they touch their own only. Nothing else; no
    secret and no ConfigMap.
  - Every registrar has a user name of its own that goes with its key. The names of hosts that are no members of the
    cluster's etcd any more leave the binding, which ends what their certificates were good for.
  - Everything has the label C(app.kubernetes.io/managed-by=isthmus). An object of that name without it, or of another
    cluster or estate, is refused. What others added to our objects in fields of their own stays.
  - An API that does not answer, or does not let the operator, is no failure but RV(pending), unless a registrar has no
    certificate at all.
  - With O(state=absent) everything of this cluster that is ours is deleted, the Services and EndpointSlices of its
    registrars too.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.kubernetes
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  state:
    description: Whether the registrars are let in.
    type: str
    choices: [present, absent]
    default: present
  estate:
    description: Name of the estate.
    type: str
    required: true
  cluster:
    description: Name of the cluster in the estate.
    type: str
    required: true
  record:
    description: The cluster's document of the estate record, from M(isthmus.mesh.plan); needed with O(state=present).
    type: dict
  registrars:
    description:
      - What M(isthmus.mesh.kubernetes_credential) returned on etcd hosts of the cluster. Names of members that are not
        among them keep their rights.
    type: list
    elements: dict
    default: []
    suboptions:
      host:
        description: Inventory name of the host.
        type: str
        required: true
      csr:
        description: Signing request in PEM. May be missing in check mode only.
        type: str
      reason:
        description: Why a certificate must be signed; nothing is signed without.
        type: str
      ca:
        description: The authorities (PEM) by which the host verifies the API server now. With others it is signed anew.
        type: str
      usable:
        description: Whether the host has a certificate that is good until it is renewed.
        type: bool
        default: false
  timeout:
    description: Seconds to wait for Kubernetes to sign.
    type: int
    default: 30
seealso:
  - module: isthmus.mesh.kubernetes_credential
  - module: isthmus.mesh.kubernetes_probe
"""

EXAMPLES = r"""
- name: The registrars may use Kubernetes
  isthmus.mesh.kubernetes_access:
    estate: lab
    cluster: kube
    record: "{{ isthmus_record['clusters/kube'] }}"
    registrars: "{{ credentials }}"
    kubeconfig: ~/.kube/kube
  delegate_to: localhost

- name: Nothing of ours is in Kubernetes
  isthmus.mesh.kubernetes_access:
    state: absent
    estate: lab
    cluster: kube
  delegate_to: localhost
"""

RETURN = r"""
pending:
  description: Why nothing was done; empty when the API answered.
  returned: success
  type: str
  sample: ""
ca:
  description: The authorities (PEM) by which the registrars verify the API server.
  returned: success, when the API answered, with O(state=present)
  type: str
certificates:
  description: What was signed, by host, in PEM; V(none) in check mode.
  returned: success, with O(state=present)
  type: dict
removed:
  description: What was deleted.
  returned: success, with O(state=absent)
  type: list
  elements: str
  sample: [clusterrolebinding/isthmus-registrar, clusterrole/isthmus-registrar]
"""

import base64
import json
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_access as access
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_api as kubernetes
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.kubernetes_apply import apply

POLL = 0.2  # seconds between looks at a request that is to be signed


def user_of(host, csr):
    """The name that the request is for. ApiError when it asks for anything else than what the host may have."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    where = f"The signing request of {host}"
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        proven = request.is_signature_valid
        public = request.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    except ValueError as exc:
        raise kubernetes.ApiError(f"{where} is not readable: {exc}. Next: run again") from exc
    user = access.registrar_user(host, public)
    wanted = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, user)])
    # Kubernetes believes the request: what a host writes into it becomes its name and its groups.
    if not proven or request.subject != wanted or len(request.extensions) > 0:
        raise kubernetes.ApiError(
            f"{where} is for {request.subject.rfc4514_string()!r}, and that host may have {user!r} and no extensions. "
            "Nothing was signed. Next: look at what happened on that host"
        )
    return user


def sign(api, own, host, csr, seconds):
    """The certificate that Kubernetes' authority gives for a request; the request's object is gone afterwards."""
    wanted = access.signing_request(own, host, base64.b64encode(csr.encode()).decode())
    path = f"{access.REQUESTS}/{wanted['metadata']['name']}"
    left = api.get(path)  # of a run that was interrupted
    if left is not None:
        whose = access.stranger(left, own)
        if whose:
            raise kubernetes.ApiError(
                f"{api.server} has a CertificateSigningRequest {wanted['metadata']['name']} that is {whose}. Next: "
                "delete it there if nothing needs it"
            )
        api.delete(path)
    made = api.create(access.REQUESTS, wanted)
    try:
        condition = {"type": "Approved", "status": "True", "reason": "IsthmusSite"}
        condition["message"] = f"isthmus.mesh lets the registrar on {host} in"
        status = {**(made.get("status") or {}), "conditions": [condition]}
        api.replace(f"{path}/approval", {**made, "status": status})
        return wait(api, path, host, seconds)
    finally:
        api.delete(path)


def wait(api, path, host, seconds):
    """The certificate, as soon as it is there."""
    deadline = time.monotonic() + seconds
    while True:
        status = (api.get(path) or {}).get("status") or {}
        if status.get("certificate"):
            return base64.b64decode(status["certificate"]).decode("ascii")
        bad = [one for one in status.get("conditions") or () if one.get("type") in ("Denied", "Failed")]
        if bad:
            raise kubernetes.ApiError(
                f"{api.server} did not sign for {host}: {bad[0]['type']}, "
                f"{bad[0].get('message') or bad[0].get('reason')}. Next: put that right and run again"
            )
        if time.monotonic() > deadline:
            raise kubernetes.Silent(
                f"{api.server} did not sign for {host} within {seconds} s. The signer {access.SIGNER} is a part of "
                "kube-controller-manager, which may be down or have no --cluster-signing-cert-file; some managed "
                "clusters have none at all. Next: see `kubectl -n kube-system get pods` for it, and run again"
            )
        time.sleep(POLL)


def present(module, changes, own):
    """Let the registrars in; returns what exit_json is given."""
    record, registrars = module.params["record"], module.params["registrars"]
    known = {one["host"]: user_of(one["host"], one["csr"]) for one in registrars if one["csr"]}
    api = kubernetes.connect(module)
    wrong = kubernetes.wrong_cluster(api.server, api.items("/api/v1/nodes"), record, module.params["seen"])
    ca = api.authority()
    bindings = f"{access.RBAC}/clusterrolebindings"
    binding = api.get(f"{bindings}/{access.NAME}")
    # One of ours says where we are better than addresses do, of which a node may have many.
    if wrong and (binding is None or access.stranger(binding, own)):
        raise kubernetes.ApiError(wrong)
    apply(api, changes, access.cluster_role(own), own)
    users = access.users_after(binding, record["etcd"]["members"], known)
    apply(api, changes, access.cluster_role_binding(own, users), own)
    certificates = {}
    for one in registrars:
        reason = one["reason"]
        if not reason and one["ca"] is not None and one["ca"].split() != ca.split():
            reason = "the API server has another authority"
        if not reason:
            continue
        host = one["host"]
        certificates[host] = None if module.check_mode else sign(api, own, host, one["csr"], module.params["timeout"])
        changes.note(f"certificate of the registrar on {host}", "", f"signed by {api.server}: {reason}")
    return changes.result(pending="", ca=ca, certificates=certificates)


def absent(module, changes, own):
    """Nothing of ours is left; what belongs to another cluster or estate stays."""
    api = kubernetes.connect(module)
    removed = []
    for path, kind in (
        # The binding first: a registrar that still runs would make anew what goes after it.
        (f"{access.RBAC}/clusterrolebindings", "clusterrolebinding"),
        (f"{access.RBAC}/clusterroles", "clusterrole"),
        (access.REQUESTS, "certificatesigningrequest"),
        ("/api/v1/services", "service"),
        ("/apis/discovery.k8s.io/v1/endpointslices", "endpointslice"),
    ):
        for found in api.items(path, label_selector=access.SELECTOR):
            place, name = access.place(path, found)
            whose = access.stranger(found, own)
            if whose:
                module.warn(f"{kind}/{name} of {api.server} is {whose} and was left")
                continue
            before = json.dumps(access.shown(found), indent=1, sort_keys=True)
            changes.note(f"{kind}/{name} of {api.server}", before, "")
            removed.append(f"{kind}/{name}")
            if not module.check_mode:
                api.delete(place)
    return changes.result(pending="", removed=removed)


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "estate": {"type": "str", "required": True},
            "cluster": {"type": "str", "required": True},
            "record": {"type": "dict"},
            "registrars": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "host": {"type": "str", "required": True},
                    "csr": {"type": "str"},
                    "reason": {"type": "str"},
                    "ca": {"type": "str"},
                    "usable": {"type": "bool", "default": False},
                },
            },
            "timeout": {"type": "int", "default": 30},
            **kubernetes.ARGUMENTS,
        },
        required_if=[("state", "present", ["record"])],
        supports_check_mode=True,
    )
    state, cluster = module.params["state"], module.params["cluster"]
    changes = Changes(module)
    own = access.labels(module.params["estate"], cluster)
    try:
        result = (present if state == "present" else absent)(module, changes, own)
    except (kubernetes.Silent, kubernetes.Forbidden) as exc:
        unusable = [one["host"] for one in module.params["registrars"] if not one["usable"]]
        if state == "present" and unusable:
            module.fail_json(
                msg=f"The registrar on {', '.join(unusable)} has no certificate for the Kubernetes API of cluster "
                f"{cluster}. {exc}."
            )
        result = changes.result(pending=str(exc), **({"certificates": {}} if state == "present" else {"removed": []}))
    except kubernetes.ApiError as exc:
        module.fail_json(msg=f"Kubernetes of cluster {cluster}: {exc}.")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
