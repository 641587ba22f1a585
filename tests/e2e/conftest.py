# SPDX-License-Identifier: GPL-3.0-or-later
"""The estate for tests that break it: converged before the first and after the last."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from estate_tools import Estate
from isthmus_lab import Lab


@pytest.fixture(scope="session")
def estate(mesh: Lab) -> Iterator[Estate]:
    """The lab with the mesh on it, by `site` of the installed artifact; whole again at the end, or an error."""
    made = Estate(mesh)
    made.put_right()
    made.converged()
    yield made
    made.put_right()
    made.converged()
