# SPDX-License-Identifier: GPL-3.0-or-later
"""Which certificates an authority has signed, and which of them are refused. Pure, as `pki`.

The ledger (`issued.json` at the authority's place) is what a revocation of a lost host is made from: etcd knows users
by certificate name, and several hosts hold certificates of one name. etcd (3.3 and newer, `--client-crl-file`) reads
its list at every handshake and looks at serial numbers only: neither at the signature nor at the end of the list. Of
the two encodings DER is the one that all of its versions read.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from .pki import LIFETIME, Authority, PkiError, load_certificates, public_key_of

LEDGER = "issued.json"
SCHEMA = 1
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was signed: for which ``host``, and its ``name`` there; ``serial`` in hexadecimal digits."""

    serial: str
    cn: str
    host: str
    name: str
    not_after: str

    @property
    def words(self) -> str:
        return f"{self.name} of {self.host} (CN={self.cn}, serial {self.serial})"


@dataclass(frozen=True, slots=True)
class Ledger:
    """``since``: certificates that were signed before are not in it; None when it began with its authority."""

    since: datetime.datetime | None
    issued: tuple[Issued, ...]

    @classmethod
    def read(cls, content: bytes | None, where: str, now: datetime.datetime, new: bool = False) -> Ledger:
        """The ledger in the file ``where``; one that begins now when there is none. ``new``: so does its authority.

        Raises `PkiError` for a damaged one.
        """
        if content is None:
            return cls(None if new else now, ())
        try:
            document = json.loads(content)
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {document['schema']} is not {SCHEMA}")
            since = None if document["since"] is None else _time(document["since"])
            issued = tuple(
                Issued(**{key: str(value) for key, value in one.items()}) for one in document["certificates"]
            )
            for one in issued:
                _time(one.not_after)
                int(one.serial, 16)
        except (ValueError, KeyError, TypeError) as exc:
            raise PkiError(
                f"{where}, the ledger of signed certificates, is damaged ({exc!r}). Restore it from a backup of this "
                "host, or move it away: a new one then begins, and what was signed before cannot be revoked by host"
            ) from exc
        return cls(since, issued)

    def with_certificate(self, pem: str, host: str, name: str) -> Ledger:
        """The ledger with one more certificate."""
        [found] = load_certificates(pem.encode(), "the new certificate")
        cn = found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value
        entry = Issued(f"{found.serial_number:x}", str(cn), host, name, found.not_valid_after_utc.strftime(_TIME))
        return replace(self, issued=(*self.issued, entry))

    def text(self, now: datetime.datetime) -> str:
        """The file, without certificates that have ended."""
        document = {
            "schema": SCHEMA,
            "since": None if self.since is None else self.since.strftime(_TIME),
            "certificates": [asdict(one) for one in self.issued if _time(one.not_after) > now],
        }
        return json.dumps(document, indent=1) + "\n"

    def of(self, hosts: Collection[str], names: Collection[str]) -> list[Issued]:
        """What was signed for these hosts, or with one of these common names."""
        return [one for one in self.issued if one.host in hosts or one.cn in names]

    def lacks(self, now: datetime.datetime) -> datetime.datetime | None:
        """Since when it is complete, as long as older certificates may be valid; else None."""
        return self.since if self.since is not None and now < self.since + LIFETIME else None


@dataclass(frozen=True, slots=True)
class Revocation:
    """``crl`` as PEM; ``revoked`` are those that were not in the list before."""

    crl: str
    revoked: tuple[Issued, ...]


def revoke(
    authority: Authority, doomed: Iterable[Issued], known: str | None, trusted: str, where: str, now: datetime.datetime
) -> Revocation:
    """The list of ``authority`` with ``doomed``; ``known`` is the one before (PEM, from ``where``, signed by one of the
    authorities ``trusted``), kept as it is when it has them all. What was revoked longer ago than a certificate lives
    is left out of a new one."""
    number, entries = _entries(known, trusted, where)
    new = {int(one.serial, 16): one for one in doomed if int(one.serial, 16) not in entries}
    if known is not None and not new:
        return Revocation(known, ())
    kept = {serial: at for serial, at in entries.items() if now - at < LIFETIME}
    signed = authority.sign_list({**kept, **dict.fromkeys(new, now)}, number + 1 if new else number, now)
    return Revocation(signed, tuple(new.values()))


def taken_over(authority: Authority, known: str | None, trusted: str, where: str, now: datetime.datetime) -> str:
    """The list ``known`` (as for `revoke`) signed by ``authority``, which replaces the one that signed it; an empty one
    when there is none, and the same when it signed it already."""
    if known is not None:
        with contextlib.suppress(PkiError):
            load_list(known, authority.pem, where)
            return known
    number, entries = _entries(known, trusted, where)
    return authority.sign_list(entries, number + 1 if known is not None else number, now)


def _entries(known: str | None, trusted: str, where: str) -> tuple[int, dict[int, datetime.datetime]]:
    """Number of a list, and when each serial number in it was revoked; (0, {}) without a list."""
    if known is None:
        return 0, {}
    found = load_list(known, trusted, where)
    number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    return number, {entry.serial_number: entry.revocation_date_utc for entry in found}


def load_list(pem: str, ca: str, where: str) -> x509.CertificateRevocationList:
    """A list of revoked certificates of one of the authorities in ``ca``: two while one is replaced. `PkiError` names
    ``where`` for any other."""
    try:
        found = x509.load_pem_x509_crl(pem.encode())
        found.extensions.get_extension_for_class(x509.CRLNumber)
    except (ValueError, x509.ExtensionNotFound) as exc:
        raise PkiError(f"{where} is no readable list of revoked certificates (PEM): {exc}") from exc
    return _checked(found, ca, where)


def to_der(pem: str, ca: str, where: str) -> bytes:
    """The list as etcd reads it."""
    return load_list(pem, ca, where).public_bytes(serialization.Encoding.DER)


def check_der(content: bytes, ca: str, where: str) -> None:
    """`PkiError` when the file ``where`` is no list of one of the authorities in ``ca``."""
    try:
        found = x509.load_der_x509_crl(content)
    except ValueError as exc:
        raise PkiError(
            f"{where} is no readable list of revoked certificates (DER): {exc}. Remove it and run the playbook again, "
            "which fetches it"
        ) from exc
    _checked(found, ca, where)


def outdated(der: bytes | None, known: str) -> str:
    """What the file that etcd reads lacks of the list ``known`` (PEM), in words; empty when it refuses all of that."""
    if der is None:
        return "it is missing"
    try:
        found = {entry.serial_number for entry in x509.load_der_x509_crl(der)}
    except ValueError:
        return "it is no readable list of revoked certificates (DER)"
    wanted = {entry.serial_number for entry in x509.load_pem_x509_crl(known.encode())}
    if wanted <= found:
        return ""
    lacking = len(wanted - found)
    return (
        f"it is older than the estate record's list: {lacking} of {len(wanted)} revoked certificates are accepted here"
    )


def is_listed(certificate: bytes | None, known: str | None) -> bool:
    """Whether the certificate (PEM) is in the list ``known`` (PEM); not when it is missing or cannot be read."""
    if certificate is None or known is None:
        return False
    try:
        serial = x509.load_pem_x509_certificate(certificate).serial_number
    except ValueError:
        return False
    listed = x509.load_pem_x509_crl(known.encode()).get_revoked_certificate_by_serial_number(serial)
    return listed is not None


def describe_list(der: bytes) -> str:
    """A line for people."""
    found = x509.load_der_x509_crl(der)
    serials = ", ".join(f"{entry.serial_number:x}" for entry in found)
    return f"{len(found)} revoked certificates{': ' if serials else ''}{serials}"


def _checked(found: x509.CertificateRevocationList, ca: str, where: str) -> x509.CertificateRevocationList:
    if not any(
        found.issuer == authority.subject and found.is_signature_valid(public_key_of(authority))
        for authority in load_certificates(ca.encode(), "the pinned CA")
    ):
        raise PkiError(f"{where} is a list of revoked certificates that another authority signed; compare the two")
    return found


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.timezone.utc)
