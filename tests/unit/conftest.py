# SPDX-License-Identifier: GPL-3.0-or-later
"""How many examples a property is tried with: `--hypothesis-profile=quick` (`make check`) or all of them."""

from __future__ import annotations

from hypothesis import settings

# No deadline: a machine that is busy is no error.
settings.register_profile("full", max_examples=100, deadline=None, print_blob=True)
settings.register_profile("quick", max_examples=10, deadline=None)
settings.load_profile("full")
