# SPDX-License-Identifier: BSD-2-Clause
"""WireGuard on a host: its private key, and whether the kernel has WireGuard or wireguard-go must stand in for it."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING

from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

TOOL = "/usr/bin/wg"
USER_SPACE = "/usr/bin/wireguard-go"
_TRIAL = "isthmus-trial"


def in_kernel(module: AnsibleModule) -> bool:
    """Whether this kernel has WireGuard, its module loaded or not: by trial, which leaves nothing behind."""
    code, _out, _err = module.run_command(["ip", "link", "add", "name", _TRIAL, "type", "wireguard"])
    if code == 0:
        module.run_command(["ip", "link", "delete", _TRIAL], check_rc=True)
    return code == 0


def ensure_key(changes: Changes, path: str) -> None:
    """The private key exists, readable by root only: what `wg genkey` makes. One that is there is never replaced."""
    key = read_bytes(path)
    why = "new key"
    if key is not None and not _is_key(key):
        key, why = None, "new key, because what was there is none"
    if key is not None:
        changes.file(path, key, mode=0o600, secret=True)
    elif changes.module.check_mode:
        changes.note(path, "", why)
    else:
        changes.file(path, base64.b64encode(_clamped(os.urandom(32))) + b"\n", mode=0o600, shown=("", why))


def _is_key(content: bytes) -> bool:
    try:
        return len(base64.b64decode(content.strip(), validate=True)) == 32
    except ValueError:
        return False


def _clamped(raw: bytes) -> bytes:
    """A scalar of Curve25519 (RFC 7748, section 5)."""
    return bytes([raw[0] & 248]) + raw[1:31] + bytes([raw[31] & 127 | 64])
