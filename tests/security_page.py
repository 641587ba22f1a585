# SPDX-License-Identifier: GPL-3.0-or-later
"""What SECURITY.md states in numbers."""

from __future__ import annotations

import re
from pathlib import Path

_PAGE = Path(__file__).resolve().parents[1] / "SECURITY.md"

STATED = {
    unit: float(score) for unit, score in re.findall(r"^\| `(\S+)` \| ([0-9.]+) \|", _PAGE.read_text(), re.MULTILINE)
}
"""Exposure by unit as `systemd-analyze security` counts it, 0 to 10, lower is better."""

STATED_ON_A_NODE = float(re.findall(r"On a Kubernetes node `isthmusd.service` scores ([0-9.]+)", _PAGE.read_text())[0])
