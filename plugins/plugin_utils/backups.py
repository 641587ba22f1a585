# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Directories of backups on the controller, and the public key that backups are encrypted to. Private to this
collection."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile

from ansible.errors import AnsibleActionFail
from ansible_collections.isthmus.mesh.plugins.module_utils.files import atomic_write, fsync_directory

MANIFEST = "manifest.json"
_SMALLEST = 2048  # bits; what NIST SP 800-57 still allows


class RefusedError(Exception):
    """The directory or the key cannot be used; the text says what, where, why and the next step."""


def recipient(path):
    """The public key or certificate in a file, in PEM; `RefusedError` when nothing can be encrypted to it."""
    # ansible-core needs it for its vault, but not everything that loads this plugin (ansible-test) has it.
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    following = (
        "Next: give a certificate or an RSA public key in PEM, as `openssl rsa -in KEY -pubout` or "
        "`openssl req -x509 -newkey rsa:4096 -keyout KEY -out FILE` make them"
    )
    try:
        with open(path, "rb") as file:
            pem = file.read()
    except OSError as exc:
        raise RefusedError(f"isthmus_backup_key: {path} cannot be read: {exc.strerror}. {following}") from exc
    if b"PRIVATE KEY" in pem:
        raise RefusedError(
            f"isthmus_backup_key: {path} holds a private key, which must not be here: who has it opens every backup. "
            "Nothing was sent to any host. Next: give the public key, `openssl pkey -in KEY -pubout`"
        )
    try:
        if b"-----BEGIN CERTIFICATE-----" in pem:
            found = x509.load_pem_x509_certificate(pem)
            public, encoded = found.public_key(), found.public_bytes(serialization.Encoding.PEM)
        else:
            public = serialization.load_pem_public_key(pem)
            encoded = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise RefusedError(
            f"isthmus_backup_key: {path} holds no public key or certificate in PEM. {following}"
        ) from exc
    if not isinstance(public, rsa.RSAPublicKey) or public.key_size < _SMALLEST:
        raise RefusedError(
            f"isthmus_backup_key: the key in {path} is no RSA key of {_SMALLEST} bits or more, and nothing else can be "
            f"encrypted to. {following}"
        )
    return encoded.decode()


def refuse_unwritable(directory):
    """`RefusedError` when a directory could not be made there, as far as can be said without trying."""
    place = directory
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise _unwritable(directory, f"{place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise _unwritable(directory, f"{place} is not yours to write in")


def _unwritable(directory, why):
    return RefusedError(
        f"isthmus_backup_dir: {directory} on the controller cannot be written: {why}. Next: give a directory that you "
        "can write, -e isthmus_backup_dir=DIRECTORY"
    )


@contextlib.contextmanager
def making(directory, name):
    """A place, and the path that it gets, ``directory/name``, when the block has ended well; else it is gone again.

    `RefusedError` when it cannot be written, or when that path is there already.
    """
    final = os.path.join(directory, name)
    place = None
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        place = tempfile.mkdtemp(prefix=".making-", dir=directory)
        yield place, final
        os.rename(place, final)
        fsync_directory(directory)
    except OSError as exc:
        raise _unwritable(final, exc.strerror) from exc
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def take_in(path, expected):
    """A fetched file is for its owner alone, on the disk, and as it was on the host; AnsibleActionFail when not."""
    os.chmod(path, 0o600)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        os.fsync(file.fileno())
    if digest.hexdigest() != expected["sha256"]:
        raise AnsibleActionFail(f"{os.path.basename(path)} did not arrive as it was on the host. Next: run again")


def read_manifest(place):
    """What `write_manifest` wrote; OSError or ValueError when there is none."""
    with open(os.path.join(place, MANIFEST), encoding="utf-8") as file:
        return json.load(file)


def write_manifest(place, manifest):
    """Replace it in one step."""
    content = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    atomic_write(os.path.join(place, MANIFEST), content.encode(), 0o600, os.geteuid(), os.getegid())
