# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the datapath's tests. They need root and compiled objects (`make -C bpf`)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from bpf.topology import Node, two_nodes

pytest.register_assert_rewrite("bpf.reaching")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.root)


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    """Node a (cluster 1) and node b (cluster 2), joined and loaded."""
    with two_nodes() as both:
        yield both
