# SPDX-License-Identifier: BSD-2-Clause
"""Echoes of full size from an address of a network namespace."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import packets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def unanswered(source: str, targets: Mapping[Any, Iterable[str]], timeout: float) -> dict[Any, str]:
    """What does not answer an echo from an address of this network namespace: target -> how. Of several addresses
    of a target one is enough. `timeout`: seconds for one answer."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=16) as pool:
        asked = {target: pool.submit(echoed, source, addresses, timeout) for target, addresses in targets.items()}
        return {target: future.result() for target, future in asked.items() if future.result()}


def echoed(source: str, addresses: Iterable[str], timeout: float) -> str:
    """Empty when one of the addresses answers packets of full size, else what happened to the last."""
    words = ""
    for address in addresses:
        # A pod learns what the path allows from its first packet that is too large.
        for _attempt in range(2):
            try:
                packets.echo(source, address, packets.path_mtu(source, address), timeout)
                return ""
            except (packets.NoAnswer, OSError) as exc:
                words = f"{exc}"
    return words
