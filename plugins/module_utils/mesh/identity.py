# SPDX-License-Identifier: BSD-2-Clause
"""Numeric security identities: ranges, reserved numbers and the labels they stand for.

A global identity is `cluster id << shift | n`, 24 bits, and travels as the VXLAN network identifier
(Cilium pkg/identity/numericidentity.go). Numbers below 256 belong to no cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

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

# Cilium's default filter (pkg/labelsfilter/filter.go), of what a pod or namespace can have: `!` leaves out.
_DEFAULT_PATTERNS = (
    r"io\.kubernetes\.pod\.namespace",
    r"io\.cilium\.k8s\.namespace\.labels",
    r"app\.kubernetes\.io",
    r"!io\.kubernetes",
    r"!kubernetes\.io",
    r"!statefulset\.kubernetes\.io/pod-name",
    r"!apps\.kubernetes\.io/pod-index",
    r"!batch\.kubernetes\.io/job-completion-index",
    r"!batch\.kubernetes\.io/controller-uid",
    r"!.*beta\.kubernetes\.io",
    r"!k8s\.io",
    r"!topology\.kubernetes\.io",
    r"!pod-template-generation",
    r"!pod-template-hash",
    r"!controller-revision-hash",
    r"!controller-uid",
    r"!annotation.*",
    r"!etcd_node",
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


class LabelFilter:
    """Which labels of a pod and its namespace make its identity: Cilium's default, and `patterns` beside it, in the
    form of Cilium's setting `labels` (pkg/labelsfilter/filter.go), one entry each.

    A pattern is a regular expression for the beginning of a label's key, after an optional `k8s:`; one that begins with
    `!` leaves out. As soon as one takes in, labels that no pattern takes in are left out; of two that match, the one
    that matches more of the key counts. ValueError when a pattern is none.
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        given = [pattern[len("k8s:") :] if pattern.startswith("k8s:") else pattern for pattern in patterns]
        self._only = any(not pattern.startswith("!") for pattern in given)
        self._patterns = [_pattern(text) for text in (*_DEFAULT_PATTERNS, *given)]
        # Ten thousand pods have some dozens of different keys.
        self.takes = lru_cache(maxsize=4096)(self._takes)

    def _takes(self, key: str) -> bool:
        taken, left = 0, 0
        for leaves_out, pattern in self._patterns:
            match = pattern.match(key)
            if match is None:
                continue
            if leaves_out:
                left = match.end() if left == 0 else min(left, match.end())
            else:
                taken = max(taken, match.end())
        return (not self._only and left == 0) or taken > left


def _pattern(text: str) -> tuple[bool, re.Pattern[str]]:
    leaves_out = text.startswith("!")
    bare = text[1:] if leaves_out else text
    if not bare:
        raise ValueError("an empty pattern matches nothing")
    try:
        return leaves_out, re.compile(bare)
    except re.error as exc:
        raise ValueError(f"{bare!r} is no regular expression: {exc}") from None


DEFAULT_FILTER = LabelFilter()


def pod_labels(
    labels: Mapping[str, str],
    namespace: str,
    namespace_labels: Mapping[str, str],
    service_account: str,
    cluster: str,
    label_filter: LabelFilter = DEFAULT_FILTER,
) -> dict[str, str]:
    """The labels that make a pod's identity, keyed `source:key`, as Cilium derives them (pkg/k8s `SanitizePodLabels`,
    pkg/labelsfilter): two pods with the same ones are one identity.

    `labels` and `namespace_labels` are the objects' own, without source. Namespace, cluster and service account count
    whatever the filter says.
    """
    found = {
        f"k8s:{key}": value
        for key, value in labels.items()
        if not key.startswith(_OWN_PREFIX) and label_filter.takes(key)
    }
    for key, value in namespace_labels.items():
        name = f"{LABEL_NAMESPACE_PREFIX}{key}"
        if label_filter.takes(name[len("k8s:") :]):
            found[name] = value
    found[LABEL_NAMESPACE_NAME] = namespace
    found[LABEL_NAMESPACE] = namespace
    found[LABEL_CLUSTER] = cluster
    if service_account:
        found[LABEL_SERVICE_ACCOUNT] = service_account
    return found
