# SPDX-License-Identifier: BSD-2-Clause
"""Private keys and certificates that a host holds, as modules lay them down. ``pki`` is `isthmus_agent.pki`, None in
check mode on a host without a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes, read_bytes

if TYPE_CHECKING:
    from types import ModuleType


def ensure_key(
    changes: Changes, pki: ModuleType | None, path: str, owner: str = "root", discard: str = ""
) -> bytes | None:
    """The private key exists, readable by its owner only. Returns its PEM, None when it is only predicted.

    ``discard`` says why the one that is there is not to be used any more; one that cannot be read is replaced too.
    """
    key = read_bytes(path)
    why = "new key"
    if discard:
        key, why = None, f"new key, because {discard}"
    if key is not None and pki is not None:
        try:
            pki.load_key(key, path)
        except pki.PkiError as exc:
            key, why = None, f"new key, because {exc}"
    if key is not None:
        changes.file(path, key, mode=0o600, owner=owner, secret=True)
        return key
    if pki is None or changes.module.check_mode:
        changes.note(path, "", why)
        return None
    made: bytes = pki.new_key()
    changes.file(path, made, mode=0o600, owner=owner, shown=("", why))
    return made


def write_certificate(changes: Changes, pki: Any, path: str, certificate: str) -> None:
    """The certificate (PEM) is there; the diff has a line about it and about the one before."""
    changes.file(path, certificate, shown=(_words(pki, read_bytes(path)), _words(pki, certificate.encode())))


def _words(pki: Any, certificate: bytes | None) -> str:
    if certificate is None:
        return ""
    try:
        about = pki.describe(certificate)
    except pki.PkiError as exc:
        return str(exc)
    return f"CN={about['cn']} {about['fingerprint']} until {about['not_after']} {' '.join(about['sans'])}".rstrip()
