# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep the process small: glibc keeps freed memory in an arena per thread unless told otherwise (mallopt(3))."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    # musl has neither function.
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None


def few_arenas() -> None:
    """Two arenas for all threads; to be called before threads start."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 2)


def give_back() -> None:
    """Return free memory to the kernel, after something large was read or loaded."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
