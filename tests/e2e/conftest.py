# SPDX-License-Identifier: GPL-3.0-or-later
"""The estate for tests that break it: converged before the first and after the last."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from estate_tools import Estate
from hybrid_tools import Hybrid, joined
from isthmus_lab import Lab
from kubernetes_lab import Kubernetes


@pytest.fixture(scope="session")
def estate(mesh: Lab) -> Iterator[Estate]:
    """The lab with the mesh on it, by `site` of the installed artifact; whole again at the end, or an error."""
    made = Estate(mesh)
    made.put_right()
    made.converged()
    yield made
    made.put_right()
    made.converged()


@pytest.fixture(scope="module")
def hybrid(estate: Estate, kubernetes: Kubernetes) -> Iterator[Hybrid]:
    """The lab's Kubernetes cluster in that estate, and out of it again after the file's tests."""
    assert estate.lab.hosts.keys() < kubernetes.lab.hosts.keys()
    with joined(kubernetes) as made:
        yield made
