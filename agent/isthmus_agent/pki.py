# SPDX-License-Identifier: GPL-3.0-or-later
"""Keys, signing requests and certificates of one cluster's PKI. Pure: bytes in, bytes out, time is an argument.

Every cluster has its own certificate authority. A key is made on the host that uses it and never leaves it; what
travels is a signing request, of which the signer takes the public key and nothing else: name, alternative names and
usages come from the plan. PEM everywhere, times are aware UTC datetimes.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import (
    CertificateIssuerPrivateKeyTypes,
    CertificateIssuerPublicKeyTypes,
    CertificatePublicKeyTypes,
    PublicKeyTypes,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_LIFETIME = datetime.timedelta(days=3652)
LIFETIME = datetime.timedelta(days=365)
BACKDATE = datetime.timedelta(minutes=5)
"""Certificates are valid from five minutes ago, so that a host whose clock is a little behind can use them at once."""

_USAGES = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
_MAX_CN = 64  # RFC 5280, ub-common-name


class PkiError(Exception):
    """Something of the PKI is missing, damaged or not allowed; the text says what, where and the next step."""


@dataclass(frozen=True, slots=True)
class CertificateSpec:
    """One certificate as the plan wants it (an entry of the node spec's ``pki.certificates``)."""

    name: str
    ca_cluster: str
    ca_host: str
    cn: str
    sans_dns: frozenset[str]
    sans_ip: frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address]
    usages: frozenset[str]
    owner: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CertificateSpec:
        """Read the entry; raises `PkiError` naming the field that cannot be used."""
        try:
            spec = cls(
                name=data["name"],
                ca_cluster=data["ca_cluster"],
                ca_host=data["ca_host"],
                cn=data["cn"],
                sans_dns=frozenset(data["sans_dns"]),
                sans_ip=frozenset(ipaddress.ip_address(ip) for ip in data["sans_ip"]),
                usages=frozenset(data["usages"]),
                owner=data["owner"],
            )
        except KeyError as exc:
            raise PkiError(f"the plan's certificate entry {dict(data)} lacks {exc}") from exc
        except ValueError as exc:
            raise PkiError(f"certificate {data.get('name')}: sans_ip: {exc}") from exc
        if not spec.usages or not spec.usages <= _USAGES.keys():
            raise PkiError(f"certificate {spec.name}: usages {sorted(spec.usages)}; known are client and server")
        if not 1 <= len(spec.cn) <= _MAX_CN:
            raise PkiError(
                f"certificate {spec.name}: its name {spec.cn!r} has {len(spec.cn)} characters, X.509 allows 1 to "
                f"{_MAX_CN}; give the host a shorter inventory name"
            )
        return spec


def new_key() -> bytes:
    """A new ECDSA P-256 private key, PKCS#8 PEM, not encrypted."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(pem: bytes, where: str) -> CertificateIssuerPrivateKeyTypes:
    """Read a private key; `PkiError` names ``where`` and never shows the content."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise PkiError(
            f"{where} is encrypted; store the key without a passphrase (mode 0600, owner root), it is used by programs"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        # The library's own text may quote parts of the key.
        raise PkiError(f"{where} is not a readable PEM private key") from None
    if not isinstance(
        key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)
    ):
        raise PkiError(f"{where} holds a key of a kind that cannot sign certificates; use ECDSA, RSA or Ed25519")
    return key


def load_certificates(pem: bytes, where: str) -> list[x509.Certificate]:
    """All certificates of a PEM file, at least one; `PkiError` names ``where``."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as exc:
        raise PkiError(f"{where} holds no readable PEM certificate: {exc}") from exc


def new_request(key: bytes, cn: str, where: str) -> str:
    """A signing request (PEM) that proves possession of ``key``; the name in it is for readers, no signer uses it."""
    loaded = load_key(key, where)
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)]))
        .sign(loaded, _digest(loaded))
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )


def public_der(key: bytes, where: str) -> bytes:
    """The public half of a private key, as DER of its SubjectPublicKeyInfo (RFC 5280)."""
    return _public_bytes(load_key(key, where).public_key())


def request_public_der(csr: str) -> bytes:
    """The public key of a signing request, as `public_der`. ValueError when it cannot be read."""
    return _public_bytes(x509.load_pem_x509_csr(csr.encode()).public_key())


def new_authority(cluster: str, now: datetime.datetime, key_pem: bytes | None = None) -> tuple[bytes, bytes]:
    """Make a cluster's CA: (private key PEM, certificate PEM). Ten years, may sign end entities only.

    ``key_pem`` is a key already made for it, by a run that was interrupted before the certificate was written.
    """
    key_pem = key_pem or new_key()
    key = load_key(key_pem, "the new CA key")
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Isthmus"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{cluster} CA"[:_MAX_CN]),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, _digest(key))
    )
    return key_pem, _pem(certificate)


class Authority:
    """A cluster's certificate authority with its private key: ours, or an operator's intermediate."""

    def __init__(self, cluster: str, key: bytes, certificate: bytes, where: str, now: datetime.datetime) -> None:
        """Check that key and certificate belong together and may sign now. ``where`` is the directory they are in.

        The file may hold a chain (an operator's intermediate with its parents); only the certificate of the key
        counts and only that one is ever pinned: trusting a parent would let the other authorities below it mint
        this cluster's ``root``.
        """
        self.cluster = cluster
        self._key = load_key(key, f"{where}/ca.key")
        public = _public_bytes(self._key.public_key())
        chain = load_certificates(certificate, f"{where}/ca.crt")
        own = [candidate for candidate in chain if _public_bytes(candidate.public_key()) == public]
        if not own:
            raise PkiError(
                f"{where}/ca.crt does not belong to {where}/ca.key (cluster {cluster}); restore the pair from a backup"
            )
        self.certificate = own[0]
        _check_may_sign(self.certificate, f"{where}/ca.crt")
        _check_valid(self.certificate, f"{where}/ca.crt", now)

    @property
    def pem(self) -> str:
        """The one certificate that others pin."""
        return _pem(self.certificate).decode()

    def sign(self, spec: CertificateSpec, request: str, now: datetime.datetime) -> str:
        """A certificate (PEM) for the public key of ``request``, with name, alternative names and usages of ``spec``.

        It ends after a year or with the CA, whichever is earlier. Raises `PkiError` when the request is damaged, not
        signed by its own key, or for a key too weak to use.
        """
        if spec.ca_cluster != self.cluster:
            raise PkiError(f"certificate {spec.name} is to be signed by cluster {spec.ca_cluster}, not {self.cluster}")
        try:
            csr = x509.load_pem_x509_csr(request.encode())
            proven = csr.is_signature_valid
            public = csr.public_key()
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise PkiError(f"the signing request for {spec.name} ({spec.cn}) is not readable: {exc}") from exc
        if not proven:
            raise PkiError(f"the signing request for {spec.name} ({spec.cn}) is not signed by the key it names")
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise PkiError(f"the signing request for {spec.name} ({spec.cn}) is not for an ECDSA P-256 key")
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, spec.cn)]))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - BACKDATE, self.certificate.not_valid_before_utc))
            .not_valid_after(min(now + LIFETIME, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([_USAGES[usage] for usage in sorted(spec.usages)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(_authority_identifier(self.certificate), critical=False)
        )
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in sorted(spec.sans_dns)]
        names += [x509.IPAddress(ip) for ip in sorted(spec.sans_ip, key=lambda ip: (ip.version, int(ip)))]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return _pem(builder.sign(self._key, _digest(self._key))).decode()

    def sign_list(self, revoked: Mapping[int, datetime.datetime], number: int, now: datetime.datetime) -> str:
        """The authority's list (PEM) of revoked certificates: serial numbers and since when. It ends with the CA."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(_authority_identifier(self.certificate), critical=False)
        )
        for serial, at in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build()
            builder = builder.add_revoked_certificate(entry)
        signed = builder.sign(self._key, _digest(self._key))
        return signed.public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True, slots=True)
class Established:
    """A usable authority and what must be written at its place for that: ``None`` where the file is right."""

    authority: Authority
    write_key: bytes | None
    write_certificate: bytes | None


def establish_authority(
    cluster: str,
    key: bytes | None,
    certificate: bytes | None,
    evidence: Mapping[str, str],
    where: str,
    now: datetime.datetime,
) -> Established:
    """The authority of ``cluster`` from what is found at its place, the directory ``where``; made when never made.

    ``evidence`` are CA certificates of the cluster known from elsewhere (source -> PEM): the estate record, pinned
    copies. They repair a lost or damaged ``ca.crt``, and they show that an authority existed: one whose key is lost is
    refused with `PkiError`, because silently making another would cut off everything that trusts the first.
    """
    step = (
        f"Next: when a run of isthmus.mesh.replace_authority ended early ({where}/ca.key.replaced is there, unless the "
        f"old key was lost), run it again with -e isthmus_replace_authority={cluster}; else restore ca.key and ca.crt "
        "from a backup"
    )
    if key is None:
        witnesses = ([f"{where}/ca.crt"] if certificate is not None else []) + sorted(evidence)
        if witnesses:
            raise PkiError(
                f"the private key of cluster {cluster}'s certificate authority is missing: {where}/ca.key is not "
                f"there, but {', '.join(witnesses)} shows that it was. Restore ca.key (mode 0600, owner root) from a "
                f"backup (isthmus.mesh.restore -e isthmus_restore={cluster} -e isthmus_restore_only=authority), or, "
                f"without one, run isthmus.mesh.replace_authority -e isthmus_replace_authority={cluster}. It is never "
                "made again by itself, since every host of the mesh trusts the lost one"
            )
        new_key_pem, new_certificate = new_authority(cluster, now)
        made = Authority(cluster, new_key_pem, new_certificate, where, now)
        return Established(made, new_key_pem, new_certificate)
    try:
        authority = Authority(cluster, key, certificate or b"", where, now)
        write = None
    except PkiError as exc:
        load_key(key, f"{where}/ca.key")
        found = certificate_of_key(key, evidence.values(), f"{where}/ca.key")
        if found is None and evidence:
            raise PkiError(f"{exc}. {step}") from exc
        if found is None and certificate is not None:
            raise
        write = found.encode() if found is not None else new_authority(cluster, now, key)[1]
        authority = Authority(cluster, key, write, where, now)
    for source, pem in sorted(evidence.items()):
        if not trusts(pem, authority.pem):
            raise PkiError(
                f"{where}/ca.crt ({describe(authority.pem.encode())['fingerprint']}) is not the authority that "
                f"{source} holds for cluster {cluster} ({describe(pem.encode())['fingerprint']}). Hosts and peers "
                f"trust the latter. {step}"
            )
    return Established(authority, None, write)


def same_authority(pem: str, other: str) -> bool:
    """Whether two CA certificates are one authority (same subject and public key; it may have been renewed)."""
    return _is_same(load_certificates(pem.encode(), "the first")[0], load_certificates(other.encode(), "the second")[0])


def each_certificate(pem: str) -> list[str]:
    """Every certificate of a PEM text by itself."""
    return [_pem(one).decode() for one in load_certificates(pem.encode(), "the authority's certificate")]


def trusts(pinned: str, authority: str) -> bool:
    """Whether the authority is one of the pinned ones: two while a cluster's authority is being replaced."""
    return any(same_authority(one, authority) for one in each_certificate(pinned))


def strangers(pinned: str, wanted: str) -> list[str]:
    """Fingerprints of the authorities in ``wanted`` that are not among the pinned ones."""
    return [describe(one.encode())["fingerprint"] for one in each_certificate(wanted) if not trusts(pinned, one)]


def certificate_of_key(key: bytes, candidates: Iterable[str], where: str) -> str | None:
    """Of some CA certificates (PEM) the one that belongs to ``key``: repairs a lost ``ca.crt``."""
    public = _public_bytes(load_key(key, where).public_key())
    for pem in candidates:
        for certificate in load_certificates(pem.encode(), "a pinned CA certificate"):
            if _public_bytes(certificate.public_key()) == public:
                return _pem(certificate).decode()
    return None


def read_pin(pem: str, where: str) -> str:
    """A cluster's CA certificate as it is pinned, normalised. It says who the authority is, also when it has ended.

    While the authority is being replaced there are two, the one that signs first.
    """
    found = load_certificates(pem.encode(), where)
    if len({_public_bytes(one.public_key()) for one in found}) != len(found) or len(found) > 2:
        raise PkiError(
            f"{where} holds {len(found)} certificates; the cluster's CA is pinned alone, or with the one that it "
            "replaces"
        )
    for one in found:
        _check_may_sign(one, where)
    return "".join(_pem(one).decode() for one in found)


def check_pin(pem: str, where: str, now: datetime.datetime) -> str:
    """What `read_pin` gives, valid now."""
    pem = read_pin(pem, where)
    for one in load_certificates(pem.encode(), where):
        _check_valid(one, where, now)
    return pem


def has_ended(pinned: str, now: datetime.datetime) -> bool:
    """Whether one of the pinned authorities has ended: nobody takes what it signed."""
    return any(one.not_valid_after_utc <= now for one in load_certificates(pinned.encode(), "the pinned CA"))


def renewed(known: str, pinned: str) -> str:
    """The authorities ``known``, each with its certificate of ``pinned`` where that ends later."""
    candidates = load_certificates(pinned.encode(), "the pinned CA")
    latest = [
        max(
            [one, *(other for other in candidates if _is_same(other, one))],
            key=lambda certificate: certificate.not_valid_after_utc,
        )
        for one in load_certificates(known.encode(), "the known CA")
    ]
    return "".join(_pem(one).decode() for one in latest)


def renewal_reason(
    spec: CertificateSpec, key: bytes | None, certificate: bytes | None, ca: str | None, now: datetime.datetime
) -> str | None:
    """Why the certificate on this host must be signed (again), ``None`` when it is good.

    ``key`` and ``certificate`` are the files' contents, ``None`` when missing; ``ca`` is the pinned CA if known. Of two
    the first one signs, unless it has ended.
    """
    if certificate is None:
        return "there is none yet"
    if key is None:
        return "its key is missing"
    try:
        found = load_certificates(certificate, "it")[0]
        public = _public_bytes(load_key(key, "its key").public_key())
    except PkiError as exc:
        return str(exc)
    if _public_bytes(found.public_key()) != public:
        return "it belongs to another key"
    if ca is not None:
        pinned = load_certificates(ca.encode(), "the pinned CA")
        if not _issued_by(found, next((one for one in pinned if one.not_valid_after_utc > now), pinned[0])):
            return f"it is not signed by the CA of {spec.ca_cluster}"
    return _differs(spec, found) or _ends(found, now)


def resigning_reason(certificate: str, ca: str, cn: str, now: datetime.datetime) -> str | None:
    """Why a certificate that was signed for somebody else's key is not to be given again; ``None`` when it is good."""
    found = load_certificates(certificate.encode(), "it")[0]
    if not _issued_by(found, load_certificates(ca.encode(), "the CA")[0]):
        return "it is not signed by this CA"
    if _common_name(found.subject) != cn:
        return f"its name is {_common_name(found.subject)!r}, {cn!r} is wanted"
    return _ends(found, now)


def renewal_time(certificate: bytes) -> datetime.datetime:
    """When a certificate (PEM) is to be renewed: from then on less than a third of its lifetime is left."""
    return _renewal_time(load_certificates(certificate, "it")[0])


def describe(pem: bytes) -> dict[str, Any]:
    """What a person wants to see of a certificate: name, issuer, fingerprint, dates (RFC 3339), SANs, usages."""
    found = load_certificates(pem, "it")[0]
    dns, ips = _alternative_names(found)
    return {
        "cn": _common_name(found.subject),
        "issuer": found.issuer.rfc4514_string(),
        "fingerprint": "sha256:" + found.fingerprint(hashes.SHA256()).hex(),
        "not_before": found.not_valid_before_utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "not_after": found.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "sans": sorted(dns) + sorted(str(ip) for ip in ips),
        "usages": sorted(_usages_of(found)),
    }


def _differs(spec: CertificateSpec, found: x509.Certificate) -> str | None:
    if _common_name(found.subject) != spec.cn:
        return f"its name is {_common_name(found.subject)!r}, {spec.cn!r} is wanted"
    dns, ips = _alternative_names(found)
    if dns != spec.sans_dns or ips != spec.sans_ip:
        is_now = sorted(dns) + sorted(str(ip) for ip in ips)
        wanted = sorted(spec.sans_dns) + sorted(str(ip) for ip in spec.sans_ip)
        return f"its alternative names are {is_now}, wanted are {wanted}"
    if _usages_of(found) != spec.usages:
        return f"its usages are {sorted(_usages_of(found))}, wanted are {sorted(spec.usages)}"
    return None


def _ends(found: x509.Certificate, now: datetime.datetime) -> str | None:
    start, end = found.not_valid_before_utc, found.not_valid_after_utc
    if now < start:
        return f"it is valid from {start:%Y-%m-%d %H:%M} UTC only"
    if now >= end:
        return f"it expired at {end:%Y-%m-%d %H:%M} UTC"
    if now > _renewal_time(found):
        return f"it expires at {end:%Y-%m-%d %H:%M} UTC, less than a third of its lifetime is left"
    return None


def _renewal_time(found: x509.Certificate) -> datetime.datetime:
    start, end = found.not_valid_before_utc, found.not_valid_after_utc
    return end - (end - start) / 3


def _is_same(first: x509.Certificate, second: x509.Certificate) -> bool:
    return first.subject == second.subject and _public_bytes(first.public_key()) == _public_bytes(second.public_key())


def _check_may_sign(certificate: x509.Certificate, where: str) -> None:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        constraints = x509.BasicConstraints(ca=False, path_length=None)
    if not constraints.ca:
        raise PkiError(f"{where} is not the certificate of an authority (basic constraints CA:FALSE)")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        usage = None
    if usage is not None and not usage.key_cert_sign:
        raise PkiError(f"{where} may not sign certificates (its key usage lacks keyCertSign)")


def _check_valid(certificate: x509.Certificate, where: str, now: datetime.datetime) -> None:
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise PkiError(
            f"{where} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}, now it is {now:%Y-%m-%d %H:%M} UTC. Next: "
            "check the clock of this host; when that is right, run isthmus.mesh.replace_authority -e "
            "isthmus_replace_authority=CLUSTER for the cluster of this authority"
        )


def _issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _authority_identifier(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key_of(ca))
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def public_key_of(ca: x509.Certificate) -> CertificateIssuerPublicKeyTypes:
    """The public key of an authority."""
    public = ca.public_key()
    assert isinstance(
        public, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey, ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)
    )  # it is the public half of a key that `load_key` admitted
    return public


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _digest(key: CertificateIssuerPrivateKeyTypes) -> hashes.SHA256 | None:
    """The hash to sign with; Ed25519 and Ed448 bring their own."""
    return None if isinstance(key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)) else hashes.SHA256()


def _common_name(name: x509.Name) -> str:
    values = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(values[0].value) if values else ""


def _alternative_names(
    certificate: x509.Certificate,
) -> tuple[frozenset[str], frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset(), frozenset()
    ips = names.get_values_for_type(x509.IPAddress)
    return (
        frozenset(names.get_values_for_type(x509.DNSName)),
        frozenset(ip for ip in ips if isinstance(ip, (ipaddress.IPv4Address, ipaddress.IPv6Address))),
    )


def _usages_of(certificate: x509.Certificate) -> frozenset[str]:
    try:
        found = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(name for name, oid in _USAGES.items() if oid in found)


def _public_bytes(key: PublicKeyTypes | CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
