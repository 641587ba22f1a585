# SPDX-License-Identifier: BSD-2-Clause
"""Whose an object in Kubernetes is: the labels of everything that is ours there."""

from __future__ import annotations

from collections.abc import Mapping

MANAGED_BY, ESTATE, CLUSTER = "app.kubernetes.io/managed-by", "isthmus.io/estate", "isthmus.io/cluster"
MANAGER = "isthmus"
"""Value of `MANAGED_BY`, and the field manager of what we write."""
COMPONENT = "isthmus.io/component"
"""Label of what the mesh itself runs in a cluster: `site` makes it, and registrars leave it alone."""


def labels(estate: str, cluster: str) -> dict[str, str]:
    """Of every object of ours."""
    return {MANAGED_BY: MANAGER, ESTATE: estate, CLUSTER: cluster}


def stranger(found: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Whose an object with the labels `found` is, when it is not this cluster's of this estate; else empty."""
    if found.get(MANAGED_BY) != MANAGER:
        return f"somebody else's (it lacks the label {MANAGED_BY}={MANAGER})"
    if any(found.get(key) != own[key] for key in (ESTATE, CLUSTER)):
        return f"that of cluster {found.get(CLUSTER)} of the estate {found.get(ESTATE)}"
    return ""
