# SPDX-License-Identifier: GPL-3.0-or-later
"""How the modules that speak to a Kubernetes API reach it, and how they know that it is the right one."""

from __future__ import annotations


class ModuleDocFragment:
    """`kubeconfig`, `context` and `seen`."""

    DOCUMENTATION = r"""
options:
  kubeconfig:
    description:
      - Kubeconfig on the host where the module runs.
      - Without it C(K8S_AUTH_KUBECONFIG) counts, then C(K8S_AUTH_HOST) with C(K8S_AUTH_API_KEY) (or
        C(K8S_AUTH_CERT_FILE) and C(K8S_AUTH_KEY_FILE)), C(K8S_AUTH_SSL_CA_CERT) and C(K8S_AUTH_VERIFY_SSL), which AWX's
        credential sets, then C(KUBECONFIG) and C(~/.kube/config).
    type: path
  context:
    description:
      - Context in the kubeconfig. Without it C(K8S_AUTH_CONTEXT) counts, then its current context.
    type: str
  seen:
    description: What M(isthmus.mesh.preflight) found on hosts of the cluster, its return value C(kubernetes).
    type: list
    elements: dict
    default: []
    suboptions:
      host:
        description: Inventory name of the host.
        type: str
        required: true
      addresses:
        description: Its addresses.
        type: list
        elements: str
        default: []
      credential:
        description: Whether its registrar was let into Kubernetes before; V(none) without a registrar.
        type: bool
requirements:
  - The Python package kubernetes, 30 or newer, on the host where the module runs.
"""
