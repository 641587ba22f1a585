# SPDX-License-Identifier: BSD-2-Clause
"""This host's clock beside the controller's."""

from __future__ import annotations

import calendar
import time


def problem(told: str, allowed: int) -> str:
    """How far the clock is from the time that the controller told (UTC, YYYY-MM-DDTHH:MM:SSZ), in words; empty when it
    is less than ``allowed`` seconds."""
    skew = time.time() - calendar.timegm(time.strptime(told, "%Y-%m-%dT%H:%M:%SZ"))
    # Two hosts differ by twice that at most, which is less than the time by which certificates are dated back.
    if abs(skew) <= allowed:
        return ""
    return (
        f"The clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the controller's; certificates would "
        "not be valid yet or no longer, so that etcd and agents refuse each other's TLS. Set it (chrony or "
        "systemd-timesyncd) and run again; when every host says so, it is the controller's clock."
    )
