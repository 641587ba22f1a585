# SPDX-License-Identifier: BSD-2-Clause
"""The agent bundle: which one fits a host, and what of it is installed there."""

from __future__ import annotations

import json
import os
import subprocess

from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import versions

ROOT = "/opt/isthmus"
CURRENT = ROOT + "/current"
ETCD = ROOT + "/etcd"  # of releases that etcd_member unpacked
COMMAND = "/usr/local/bin/isthmus"

# Newest first: the venv is made with the newest that the bundle supports.
_CANDIDATES = (
    "/usr/bin/python3.13",
    "/usr/bin/python3.12",
    "/usr/bin/python3.11",
    "/usr/bin/python3.10",
    "/usr/bin/python3",
    "/usr/local/bin/python3",
    "/usr/libexec/platform-python",
)


def interpreters(declared: str | None = None) -> dict[str, str]:
    """Path of an interpreter by version ("3.11"); only the declared one when there is one."""
    found: dict[str, str] = {}
    for path in [declared] if declared else _CANDIDATES:
        if not os.access(path, os.X_OK):
            continue
        done = subprocess.run(
            [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        version = done.stdout.strip()
        if done.returncode == 0 and version:
            found.setdefault(version, path)
    return found


def choose(arch: str, present: dict[str, str], platforms: list[dict[str, str]]) -> tuple[str, str] | None:
    """Version and path of the interpreter to use: the newest that is here and in the bundle for this architecture."""
    offered = {item["python"] for item in platforms if item["arch"] == arch}
    fitting = [version for version in present if version in offered]
    if not fitting:
        return None
    best = max(fitting, key=lambda version: tuple(int(part) for part in version.split(".")))
    return best, present[best]


def missing_words(host: str, arch: str, present: dict[str, str], platforms: list[dict[str, str]]) -> str:
    """Why no bundle fits this host, and the command that makes one."""
    usable = sorted((v for v in present if int(v.split(".")[1]) >= 10), key=lambda v: int(v.split(".")[1]))
    have = ", ".join(f"{item['arch']} with Python {item['python']}" for item in platforms) or "none"
    if not usable:
        return (
            f"{host} has no Python >= 3.10 for the agent (found: {', '.join(sorted(present)) or 'none'}). "
            "Install one (python3.11 on RHEL 9) or name it in isthmus_bundle_python."
        )
    return (
        f"There is no agent bundle for {arch} with Python {' or '.join(usable)} ({host}); there are some for: {have}. "
        f"Make it on a machine with the collection's sources: make bundle ARCH={arch} PYTHON={usable[-1]}"
    )


def downgrade_words(host: str, offered: str) -> str:
    """Why the bundle of version `offered` must not replace what this host runs; empty when it may."""
    running = installed().get("version")
    if not versions.valid(running) or versions.order(str(running)) <= versions.order(offered):
        return ""
    return (
        f"{host} runs isthmus.mesh {running} ({CURRENT}), which is newer than {offered}, the version of this "
        "collection: an upgrade has reached the host. A downgrade is never made. "
        f"Next: {versions.install(str(running))} on the controller, and run again with isthmus_version={running}."
    )


def installed() -> dict[str, str]:
    """The manifest of what `/opt/isthmus/current` is; empty when nothing (or half of something) is installed."""
    try:
        with open(CURRENT + "/bundle.json", encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}
