# SPDX-License-Identifier: BSD-2-Clause
"""What is ours in a Kubernetes cluster: the registrars' rights, and the names in their certificates. Pure."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ownership

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAME = "isthmus-registrar"
SELECTOR = f"{ownership.MANAGED_BY}={ownership.MANAGER}"
"""Selects everything that is ours."""

SIGNER = "kubernetes.io/kube-apiserver-client"
SIGNED_SECONDS = 365 * 24 * 3600
"""What is asked for; the cluster's controller-manager may sign for a shorter time, never for a longer one."""

RBAC = "/apis/rbac.authorization.k8s.io/v1"
REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

_LONGEST_NAME = 64  # RFC 5280, ub-common-name

READ = ("get", "list", "watch")
WRITE = ("create", "patch", "delete")
RULES = (
    ("", ("namespaces", "nodes", "pods"), READ),
    ("", ("services",), READ + WRITE),
    ("discovery.k8s.io", ("endpointslices",), READ + WRITE),
)
"""API group, resources, verbs. What is written, and why: docs/kubernetes.md."""

labels = ownership.labels


def registrar_user(host: str, public_key: bytes) -> str:
    """The common name of a registrar's certificate, which Kubernetes takes for the user's name.

    `public_key` is the DER of its SubjectPublicKeyInfo. Kubernetes cannot revoke a certificate: as the name goes with
    the key, the rights of a lost key end with its name, also when the host is joined anew.
    """
    prefix = f"isthmus:{host}:"
    return prefix + hashlib.sha256(public_key).hexdigest()[: min(16, _LONGEST_NAME - len(prefix))]


def host_of(user: str) -> str:
    """The host of a name that `registrar_user` made; empty for any other."""
    first, _colon, rest = user.partition(":")
    host, colon, _digest = rest.rpartition(":")
    return host if first == "isthmus" and colon else ""


def rules() -> list[dict[str, Any]]:
    """`RULES` as RBAC has them."""
    return [
        {"apiGroups": [group], "resources": list(resources), "verbs": list(verbs)} for group, resources, verbs in RULES
    ]


def cluster_role(own: Mapping[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": NAME, "labels": dict(own)},
        "rules": rules(),
    }


def cluster_role_binding(own: Mapping[str, str], users: Iterable[str]) -> dict[str, Any]:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": NAME, "labels": dict(own)},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": NAME},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user} for user in sorted(users)],
    }


def users_after(binding: Mapping[str, Any] | None, members: Iterable[str], known: Mapping[str, str]) -> set[str]:
    """Who may read afterwards: `known` by host, of other `members` whoever may now, and nobody else."""
    subjects = (binding or {}).get("subjects") or ()
    now = {str(one.get("name")) for one in subjects if one.get("kind") == "User"}
    others = {user for user in now if host_of(user) in set(members) - set(known)}
    return others | set(known.values())


def signing_request(own: Mapping[str, str], host: str, request: str) -> dict[str, Any]:
    """`request` is base64 of the PEM."""
    return {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": f"{NAME}-{host}", "labels": dict(own)},
        "spec": {
            "request": request,
            "signerName": SIGNER,
            "expirationSeconds": SIGNED_SECONDS,
            "usages": ["digital signature", "client auth"],
        },
    }


def shown(document: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of an object counts: not what the API server writes into it."""
    if document is None:
        return {}
    metadata = {key: document["metadata"].get(key) for key in ("name", "labels", "annotations")}
    rest = {key: value for key, value in document.items() if key not in ("metadata", "status", "apiVersion", "kind")}
    return {**rest, "metadata": {key: value for key, value in metadata.items() if value}}


def place(path: str, found: Mapping[str, Any]) -> tuple[str, str]:
    """Path of an object of the list at `path`, and its name with its namespace, if it has one."""
    name, namespace = found["metadata"]["name"], found["metadata"].get("namespace")
    if not namespace:
        return f"{path}/{name}", name
    group, _slash, resource = path.rpartition("/")
    return f"{group}/namespaces/{namespace}/{resource}/{name}", f"{namespace}/{name}"


def stranger(document: Mapping[str, Any], own: Mapping[str, str]) -> str:
    """Whose an object of our name is, when it is not this cluster's of this estate; else empty."""
    return ownership.stranger(document["metadata"].get("labels") or {}, own)


NEEDED = (
    ("list", "", "nodes", ""),
    *(
        (verb, "rbac.authorization.k8s.io", resource, NAME if verb != "create" else "")
        for resource in ("clusterroles", "clusterrolebindings")
        for verb in ("get", "create", "patch")
    ),
    *((verb, "certificates.k8s.io", "certificatesigningrequests", "") for verb in ("create", "get", "delete")),
    ("update", "certificates.k8s.io", "certificatesigningrequests/approval", ""),
    ("approve", "certificates.k8s.io", "signers", SIGNER),
)
"""What the operator must be allowed to do: verb, API group, resource, name."""

GIVEN = tuple(
    (verb, group, resource, "") for group, resources, verbs in RULES for resource in resources for verb in verbs
)
"""What the registrar's role gives. Kubernetes lets nobody give what he has not himself, unless he may escalate."""

ESCALATE = tuple((verb, "rbac.authorization.k8s.io", "clusterroles", NAME) for verb in ("escalate", "bind"))


def right_words(right: tuple[str, str, str, str]) -> str:
    """A right in the words of `kubectl auth can-i`."""
    verb, group, resource, name = right
    kind, _slash, sub = resource.partition("/")
    return f"{verb} {kind}{'.' + group if group else ''}{'/' + sub if sub else ''}{' ' + name if name else ''}"
