# SPDX-License-Identifier: BSD-2-Clause
"""Versions of isthmus.mesh: their order (Semantic Versioning 2.0.0, section 11), and the commands that get one."""

from __future__ import annotations

import re

_NUMBER = r"(?:0|[1-9][0-9]*)"
_IDENTIFIER = rf"(?:{_NUMBER}|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_VERSION = re.compile(
    rf"({_NUMBER})\.({_NUMBER})\.({_NUMBER})(?:-({_IDENTIFIER}(?:\.{_IDENTIFIER})*))?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
)

LATEST = "`ansible-galaxy collection install isthmus.mesh --upgrade`"

Order = tuple[int, int, int, bool, tuple[tuple[bool, int, str], ...]]


class VersionError(ValueError):
    """A text that is no version."""


def order(version: str) -> Order:
    """What versions are compared by: a pre-release comes before its release, build metadata does not count.

    VersionError for what Semantic Versioning does not allow.
    """
    found = _VERSION.fullmatch(version)
    if found is None:
        raise VersionError(f"{version!r} is not a version such as 1.2.3")
    major, minor, patch, pre = found.groups()
    identifiers = tuple(
        (not one.isdigit(), int(one) if one.isdigit() else 0, one) for one in (pre.split(".") if pre else ())
    )
    return int(major), int(minor), int(patch), pre is None, identifiers


def valid(version: object) -> bool:
    return isinstance(version, str) and _VERSION.fullmatch(version) is not None


def install(version: str) -> str:
    """The command that gives a controller this version."""
    return f"`ansible-galaxy collection install isthmus.mesh:=={version}`"
