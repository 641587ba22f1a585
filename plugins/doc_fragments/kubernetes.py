# SPDX-License-Identifier: GPL-3.0-or-later
"""How the modules that speak to a Kubernetes API reach it."""

from __future__ import annotations


class ModuleDocFragment:
    """`kubeconfig` and `context`."""

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
requirements:
  - The Python package kubernetes, 30 or newer, on the host where the module runs.
"""
