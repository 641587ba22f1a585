# SPDX-License-Identifier: GPL-3.0-or-later
"""What a backup of a cluster is made of: a snapshot of its etcd, and its authority's key that the operator alone opens.

The encrypted key is CMS EnvelopedData (RFC 5652) in PEM, AES-256-CBC with a key for one RSA recipient:
``openssl cms -decrypt -inform PEM`` opens it.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import NameOID

from . import pki
from .kvstore import SyncEtcd

_DIGEST = hashlib.sha256().digest_size
_CHUNK = 1 << 20


class BackupError(Exception):
    """A part of the backup cannot be made; the text says what, where, why and the next step."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot: it holds everything up to ``revision`` at least; ``cluster_id`` is etcd's, hexadecimal."""

    cluster_id: str
    revision: int
    version: str


def snapshot(client: SyncEtcd, path: Path) -> Snapshot:
    """Write a snapshot of the member that ``client`` speaks to, and check it.

    Raises the errors of `kvstore.errors`; `BackupError` when the file is damaged; OSError when it cannot be written.
    """
    status = client.status()
    client.snapshot(path)
    check_snapshot(path)
    return Snapshot(f"{status.header.cluster_id:x}", status.header.revision, status.version)


def check_snapshot(path: Path) -> None:
    """`BackupError` unless the file ends with the SHA-256 of what is before it, as etcd writes it."""
    left = path.stat().st_size - _DIGEST
    found = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0:
            chunk = file.read(min(_CHUNK, left))
            found.update(chunk)
            left -= len(chunk)
        digest = file.read()
    if left < 0 or digest != found.digest():
        raise BackupError(
            f"the snapshot that etcd gave is damaged: {path.name} does not end with its own SHA-256. Look at "
            "`journalctl -u isthmus-etcd` and at the host's disk, then run again"
        )


def sealed_authority(directory: Path, cluster: str, recipient: bytes | None) -> tuple[str, bytes | None]:
    """The certificate (PEM) of the cluster's authority in ``directory``, and its key encrypted to ``recipient``.

    Without a recipient the key is only compared with the certificate. `BackupError` when one is missing or they do
    not belong together; `pki.PkiError` when one cannot be read.
    """
    key_path, certificate_path = directory / "ca.key", directory / "ca.crt"
    try:
        key, certificate = key_path.read_bytes(), certificate_path.read_text()
    except OSError as exc:
        raise BackupError(
            f"the authority of cluster {cluster} cannot be read on this host: {exc}. Restore it from an older backup"
        ) from exc
    if pki.certificate_of_key(key, [certificate], str(key_path)) is None:
        raise BackupError(f"{certificate_path} does not belong to {key_path}; restore the pair from an older backup")
    return certificate, None if recipient is None else seal(key, recipient)


def seal(secret: bytes, recipient: bytes) -> bytes:
    """``secret`` encrypted to ``recipient``, a certificate or public key in PEM. `BackupError` unless it is RSA."""
    try:
        return (
            pkcs7.PKCS7EnvelopeBuilder()
            .set_data(secret)
            .set_content_encryption_algorithm(algorithms.AES256)
            .add_recipient(_certificate(recipient))
            .encrypt(serialization.Encoding.PEM, [pkcs7.PKCS7Options.Binary])
        )
    except (ValueError, TypeError) as exc:
        raise BackupError(f"the operator's public key cannot be encrypted to: {exc}. Give an RSA key") from exc


def _certificate(recipient: bytes) -> x509.Certificate:
    """A bare public key gets one, since a CMS recipient is named by issuer and serial number; nobody ever checks it."""
    if b"-----BEGIN CERTIFICATE-----" in recipient:
        return x509.load_pem_x509_certificate(recipient)
    public = serialization.load_pem_public_key(recipient)
    if not isinstance(public, rsa.RSAPublicKey):
        raise TypeError("it is no RSA key")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Isthmus backup")])
    now = datetime.datetime.now(datetime.timezone.utc)
    return (x509.CertificateBuilder(name, name, public, x509.random_serial_number(), now, now + pki.LIFETIME)).sign(
        ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()
    )


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
