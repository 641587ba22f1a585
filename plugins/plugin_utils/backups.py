# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Directories of backups on the controller, and the operator's pair of keys: the public one that backups are encrypted
to, the private one that opens them. Private to this collection."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile

from ansible.errors import AnsibleActionFail
from ansible_collections.isthmus.mesh.plugins.module_utils.files import atomic_write, fsync_directory

MANIFEST = "manifest.json"
SNAPSHOT, RECORD, CERTIFICATE, SEALED_KEY = "snapshot.db", "estate.json", "ca.crt", "ca.key.cms"
LEDGER = "issued.json"
PASSPHRASE = "ISTHMUS_RESTORE_PASSPHRASE"  # noqa: S105 - the environment variable's name
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
    with open(path, "rb") as file:
        found = _sha256(file)
        os.fsync(file.fileno())
    if found != expected["sha256"]:
        raise AnsibleActionFail(f"{os.path.basename(path)} did not arrive as it was on the host. Next: run again")


def read_manifest(place):
    """What `write_manifest` wrote; OSError or ValueError when there is none."""
    with open(os.path.join(place, MANIFEST), encoding="utf-8") as file:
        return json.load(file)


def write_manifest(place, manifest):
    """Replace it in one step."""
    content = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    atomic_write(os.path.join(place, MANIFEST), content.encode(), 0o600, os.geteuid(), os.getegid())


# --- restoring


def choose(directory, cluster, wanted):
    """The directory of a cluster's backup: that of the time `wanted`, or the newest. `RefusedError` without one."""
    place = os.path.join(directory, cluster)
    try:
        found = sorted(entry.name for entry in os.scandir(place) if os.path.exists(os.path.join(entry.path, MANIFEST)))
    except OSError as exc:
        raise RefusedError(
            f"isthmus_backup_dir: {place} on the controller, where the backups of cluster {cluster} would be, cannot "
            f"be read: {exc.strerror}. Nothing was changed on any host. Next: give the directory that "
            "isthmus.mesh.backup was given, -e isthmus_backup_dir=DIRECTORY"
        ) from exc
    if wanted and wanted not in found:
        raise RefusedError(
            f"isthmus_restore_from: {place} on the controller has no complete backup {wanted}. Nothing was changed on "
            f"any host. Next: choose one of {', '.join(found) or 'another directory: it has none at all'}"
        )
    if not found:
        raise RefusedError(
            f"isthmus_backup_dir: {place} on the controller has no complete backup: no directory with {MANIFEST}. "
            "Nothing was changed on any host. Next: give the directory that isthmus.mesh.backup was given"
        )
    return os.path.join(place, wanted or found[-1])


def whole(path, cluster, estate):
    """The manifest of a backup all of whose files are as they were written; `RefusedError` when one is not, or when it
    is of another cluster or estate."""
    following = (
        "Nothing was changed on any host. Next: take this backup from another copy, or an older one with "
        "-e isthmus_restore_from=TIME"
    )
    try:
        manifest = read_manifest(path)
        if manifest["schema"] != 1:
            raise ValueError(f"its schema {manifest['schema']!r} is not known to this version of isthmus.mesh")
        whose = manifest["cluster"], manifest["estate"]
        told = {name: file["sha256"] for name, file in manifest["files"].items()}
        # Read later; here so that a manifest without them is told now.
        manifest["etcd"]["revision"], manifest["time"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise RefusedError(f"The backup {path} on the controller has no usable {MANIFEST}: {exc}. {following}") from exc
    if whose != (cluster, estate):
        raise RefusedError(
            f"The backup {path} on the controller is of cluster {whose[0]} of estate {whose[1]}, not of cluster "
            f"{cluster} of estate {estate}. Nothing was changed on any host. Why: it has other hosts and addresses. "
            "Next: give the directory of this estate's backups, -e isthmus_backup_dir=DIRECTORY"
        )
    for name in sorted({SNAPSHOT, RECORD, *told}):
        if name not in told or os.path.basename(name) != name:
            raise RefusedError(f"The backup {path} on the controller has no {name} in its {MANIFEST}. {following}")
        try:
            with open(os.path.join(path, name), "rb") as file:
                found = _sha256(file)
        except OSError as exc:
            raise RefusedError(f"{name} of the backup {path} cannot be read: {exc.strerror}. {following}") from exc
        if found != told[name]:
            raise RefusedError(
                f"{name} of the backup {path} on the controller is damaged: its SHA-256 is {found}, {MANIFEST} says "
                f"{told[name]}. {following}"
            )
    return manifest


def opened_authority(path, cluster, key, known):
    """The private key of the authority in a backup, opened with the operator's in the file `key`, which stays here.

    `known`: the authority's certificate in the estate record, in PEM, or None. `RefusedError` when the backup has no
    key, `key` does not open it, or it is another authority's.
    """
    place = os.path.join(path, SEALED_KEY)
    changed = "Nothing was changed on any host."
    if not os.path.exists(place):
        raise RefusedError(
            f"The private key of cluster {cluster}'s certificate authority is lost, and the backup {path} does not "
            f"have it. {changed} Why: it was made without isthmus_backup_key, or without the authority's host. Next: "
            "take another backup with -e isthmus_restore_from=TIME, or put ca.key and ca.crt back by hand"
        )
    if not key:
        raise RefusedError(
            f"The private key of cluster {cluster}'s certificate authority is lost, and isthmus_restore_key is not "
            f"given. {changed} Why: no certificate can be made for the cluster without it, and {place} can be opened "
            "by the operator's private key only. Next: run again with -e isthmus_restore_key=FILE, the private key of "
            "isthmus_backup_key; it stays on this controller"
        )
    if not os.access(key, os.R_OK):
        raise RefusedError(
            f"isthmus_restore_key: {key} on the controller cannot be read. {changed} Next: give the file with the "
            "private key of isthmus_backup_key"
        )
    # Not with cryptography: what the controllers of old distributions have cannot open it. Nothing of this is written
    # to a disk.
    command = ("cms", "-decrypt", "-inform", "PEM", "-in", place, "-inkey", key, "-passin", f"env:{PASSPHRASE}")
    secret = _openssl(*command)
    if secret is None or b"PRIVATE KEY" not in secret:
        raise RefusedError(
            f"isthmus_restore_key: {key} does not open {place}. {changed} Next: give the private key whose public key "
            f"was isthmus_backup_key then. If it has a passphrase, export it as {PASSPHRASE} for this run"
        )
    public = _openssl("pkey", "-pubout", feed=secret)
    with open(os.path.join(path, CERTIFICATE), "rb") as file:
        certificates = [file.read()]
    certificates += [] if known is None else [known.encode()]
    for certificate in certificates:
        if public is None or public != _openssl("x509", "-noout", "-pubkey", feed=certificate):
            raise RefusedError(
                f"{place} does not hold the key of the authority that the estate trusts for cluster {cluster}. "
                f"{changed} Why: that authority was made after this backup, or before. Next: take another backup with "
                "-e isthmus_restore_from=TIME"
            )
    return secret


def _openssl(*words, feed=b""):
    """What the command prints, None when it fails. Only words that are no secret are its arguments."""
    environment = {**os.environ, "LC_ALL": "C", PASSPHRASE: os.environ.get(PASSPHRASE, "")}
    try:
        done = subprocess.run(["openssl", *words], input=feed, capture_output=True, check=False, env=environment)
    except OSError as exc:
        raise RefusedError(
            f"openssl cannot be run on the controller: {exc.strerror}. Nothing was changed on any host. Why: it opens "
            "the authority's key. Next: install openssl and run again"
        ) from exc
    return done.stdout if done.returncode == 0 else None


def _sha256(file):
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
