# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules that handle keys and certificates share."""

from __future__ import annotations


class ModuleDocFragment:
    """Where keys and certificates are."""

    DOCUMENTATION = r"""
options:
  directory:
    description: Directory of keys, certificates and authorities.
    type: path
    default: /etc/isthmus/pki
"""
