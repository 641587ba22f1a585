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
_PRIME = 2**255 - 19


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


def public_key(path: str) -> str | None:
    """The public key, base64, of the private key in a file; None when there is none. By ourselves, as `wg` is not on a
    host that is new."""
    content = read_bytes(path)
    if content is None or not _is_key(content):
        return None
    return base64.b64encode(_times_base_point(base64.b64decode(content.strip()))).decode()


def _times_base_point(scalar: bytes) -> bytes:
    """X25519 of a private key and the base point, 9: RFC 7748, section 5."""
    number = int.from_bytes(_clamped(scalar), "little")
    one_x, two_x, two_z, three_x, three_z = 9, 1, 0, 9, 1
    swapped = 0
    for position in reversed(range(255)):
        bit = number >> position & 1
        if swapped ^ bit:
            two_x, three_x, two_z, three_z = three_x, two_x, three_z, two_z
        swapped = bit
        a, b = (two_x + two_z) % _PRIME, (two_x - two_z) % _PRIME
        aa, bb = a * a % _PRIME, b * b % _PRIME
        e = (aa - bb) % _PRIME
        da, cb = (three_x - three_z) * a % _PRIME, (three_x + three_z) * b % _PRIME
        three_x, three_z = pow(da + cb, 2, _PRIME), one_x * pow(da - cb, 2, _PRIME) % _PRIME
        two_x, two_z = aa * bb % _PRIME, e * (aa + 121665 * e) % _PRIME
    if swapped:
        two_x, two_z = three_x, three_z
    return (two_x * pow(two_z, _PRIME - 2, _PRIME) % _PRIME).to_bytes(32, "little")


def _is_key(content: bytes) -> bool:
    try:
        return len(base64.b64decode(content.strip(), validate=True)) == 32
    except ValueError:
        return False


def _clamped(raw: bytes) -> bytes:
    """A scalar of Curve25519 (RFC 7748, section 5)."""
    return bytes([raw[0] & 248]) + raw[1:31] + bytes([raw[31] & 127 | 64])
