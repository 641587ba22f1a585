# SPDX-License-Identifier: BSD-2-Clause
"""Numeric security identities: ranges, reserved numbers and the labels they stand for.

A global identity is `cluster id << shift | n`, 24 bits, and travels as the VXLAN network identifier
(Cilium pkg/identity/numericidentity.go). Numbers below 256 belong to no cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

UNKNOWN = 0
HOST = 1
WORLD = 2
UNMANAGED = 3
HEALTH = 4
INIT = 5
REMOTE_NODE = 6
KUBE_APISERVER = 7
INGRESS = 8
WORLD_IPV4 = 9
WORLD_IPV6 = 10

FIRST_CLUSTER_IDENTITY = 256

MAX_CLUSTERS_MODES = (255, 511)
"""The two layouts of the number; every member of a mesh uses the same one."""

LABEL_NAMESPACE = "k8s:io.kubernetes.pod.namespace"
LABEL_CLUSTER = "k8s:io.cilium.k8s.policy.cluster"
LABEL_SERVICE_ACCOUNT = "k8s:io.cilium.k8s.policy.serviceaccount"
LABEL_NAMESPACE_PREFIX = "k8s:io.cilium.k8s.namespace.labels."
LABEL_NAMESPACE_NAME = f"{LABEL_NAMESPACE_PREFIX}kubernetes.io/metadata.name"

# What a node sends with a number that is not of its cluster's range: world, health, remote-node,
# kube-apiserver, ingress, the well-known label sets, and the user's fixed mapping.
_FIXED = frozenset({WORLD, HEALTH, REMOTE_NODE, KUBE_APISERVER, INGRESS}) | frozenset(range(100, 115))
_USER_RESERVED = range(128, 256)

# What Cilium leaves out of a pod's identity unless it is told otherwise (pkg/labelsfilter/filter.go): each is matched
# at the beginning of a label's key, and `app.kubernetes.io` goes before them.
_NO_IDENTITY = re.compile(
    r"""io\.kubernetes | kubernetes\.io | .*beta\.kubernetes\.io | k8s\.io | topology\.kubernetes\.io
    | statefulset\.kubernetes\.io/pod-name | apps\.kubernetes\.io/pod-index
    | batch\.kubernetes\.io/(job-completion-index|controller-uid)
    | pod-template-(generation|hash) | controller-revision-hash | controller-uid | annotation | etcd_node""",
    re.VERBOSE,
)
_OWN_PREFIX = "io.cilium.k8s"


def identity_shift(max_clusters: int) -> int:
    """Bits of the cluster-local part: 16 with 255 clusters, 15 with 511. ValueError otherwise."""
    if max_clusters == 255:
        return 16
    if max_clusters == 511:
        return 15
    raise ValueError(f"max_clusters is 255 or 511, not {max_clusters}")


def identity_range(cluster_id: int, max_clusters: int) -> tuple[int, int]:
    """First and last number of a cluster, both included; a dealer starts above the first."""
    shift = identity_shift(max_clusters)
    if not 1 <= cluster_id <= max_clusters:
        raise ValueError(f"cluster id {cluster_id} is not in 1..{max_clusters}")
    return cluster_id << shift, ((cluster_id + 1) << shift) - 1


def cluster_of(number: int, max_clusters: int) -> int:
    """The cluster id in a number; 0 for the numbers that belong to no cluster."""
    return 0 if number < FIRST_CLUSTER_IDENTITY else (number & 0xFFFFFF) >> identity_shift(max_clusters)


def is_fixed_identity(n: int) -> bool:
    """Whether any peer may assert this number: its meaning is qualified by the sending cluster."""
    return n in _FIXED or n in _USER_RESERVED


def workload_labels(namespace: str, service_account: str, cluster: str, labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that make a workload's identity, keyed `source:key`, as Cilium gives them to a pod.

    `labels` are the workload's own, without source. A user's label may not stand in for one that
    says who the workload is, so keys under `io.cilium.k8s` and the namespace label are dropped.
    """
    found = {
        f"k8s:{key}": value
        for key, value in labels.items()
        if not key.startswith("io.cilium.k8s") and key != "io.kubernetes.pod.namespace"
    }
    found[LABEL_NAMESPACE] = namespace
    found[LABEL_NAMESPACE_NAME] = namespace
    found[LABEL_CLUSTER] = cluster
    found[LABEL_SERVICE_ACCOUNT] = service_account
    return found


def pod_labels(
    labels: Mapping[str, str],
    namespace: str,
    namespace_labels: Mapping[str, str],
    service_account: str,
    cluster: str,
) -> dict[str, str]:
    """The labels that make a pod's identity, keyed `source:key`, as Cilium derives them with its default filter
    (pkg/k8s `SanitizePodLabels`, pkg/labelsfilter): two pods with the same ones are one identity.

    `labels` and `namespace_labels` are the objects' own, without source.
    """
    found = {f"k8s:{key}": value for key, value in labels.items() if _makes_identity(key)}
    found[LABEL_NAMESPACE_NAME] = namespace
    for key, value in namespace_labels.items():
        found[f"{LABEL_NAMESPACE_PREFIX}{key}"] = value
    found[LABEL_NAMESPACE] = namespace
    found[LABEL_CLUSTER] = cluster
    if service_account:
        found[LABEL_SERVICE_ACCOUNT] = service_account
    return found


def _makes_identity(key: str) -> bool:
    if key.startswith("app.kubernetes.io"):
        return True
    return not key.startswith(_OWN_PREFIX) and _NO_IDENTITY.match(key) is None
