# SPDX-License-Identifier: GPL-3.0-or-later
"""The option that hands a module its host's part of the plan."""

from __future__ import annotations


class ModuleDocFragment:
    """`spec`: an element of what the plan returns."""

    DOCUMENTATION = r"""
options:
  spec:
    description: The host's node spec, an element of the C(specs) that M(isthmus.mesh.plan) returns.
    type: dict
    required: true
seealso:
  - module: isthmus.mesh.plan
"""
