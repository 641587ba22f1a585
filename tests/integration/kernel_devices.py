# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel under a test can do that others do in user space."""

from __future__ import annotations

import os
import subprocess

STOCK = "ISTHMUS_STOCK_KERNEL" in os.environ
"""This is Debian's stock kernel, of which all that it has is to be used (tests/kernel)."""


def makes(*kind: str) -> bool:
    """Whether it makes a network device of this kind."""
    words = ["unshare", "--net", "ip", "link", "add", "tried", "type", *kind]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not STOCK, f"the stock kernel makes no device of {kind[0]}: {done.stderr}"
    return done.returncode == 0
