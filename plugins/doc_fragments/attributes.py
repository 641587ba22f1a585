# SPDX-License-Identifier: GPL-3.0-or-later
"""What every module of the collection says about check mode and diff mode."""

from __future__ import annotations


class ModuleDocFragment:
    """Attributes shared by the modules that change or read a host."""

    SUPPORTED = r"""
options: {}
attributes:
  check_mode:
    support: full
    description: Predicts exactly what the run would change.
  diff_mode:
    support: full
    description: Shows before and after of every change, never a secret.
  platform:
    platforms: posix
    support: full
    description: Runs on hosts with systemd.
"""

    INFO = r"""
options: {}
attributes:
  check_mode:
    support: full
    description: Changes nothing in either mode.
  diff_mode:
    support: none
    description: Changes nothing, so there is nothing to show.
  platform:
    platforms: posix
    support: full
    description: Runs on hosts with systemd.
"""
