# SPDX-License-Identifier: GPL-3.0-or-later
"""The PKI's pure part: what is signed, what is refused, what is renewed. openssl is the second opinion."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from isthmus_agent import pki

NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


def entry(**changes: Any) -> pki.CertificateSpec:
    data = {
        "name": "etcd-server",
        "ca_cluster": "onprem",
        "ca_host": "onprem-1",
        "cn": "onprem-1",
        "sans_dns": ["onprem-1"],
        "sans_ip": ["127.0.0.1", "198.18.1.11", "fd00::1"],
        "usages": ["server", "client"],
        "owner": "etcd",
    }
    return pki.CertificateSpec.from_dict({**data, **changes})


@pytest.fixture(scope="module")
def authority() -> pki.Authority:
    return pki.Authority("onprem", *pki.new_authority("onprem", NOW), "/pki", NOW)


def signed(authority: pki.Authority, spec: pki.CertificateSpec, when: datetime.datetime = NOW) -> tuple[bytes, bytes]:
    key = pki.new_key()
    return key, authority.sign(spec, pki.new_request(key, "whatever", "key"), when).encode()


def openssl(*arguments: str) -> str:
    return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout


def test_openssl_accepts_the_chain_and_reads_what_the_plan_said(authority: pki.Authority, tmp_path: Path) -> None:
    _, certificate = signed(authority, entry())
    (tmp_path / "ca.crt").write_text(authority.pem)
    (tmp_path / "crt").write_bytes(certificate)
    for purpose in ("sslserver", "sslclient"):
        openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", f"{tmp_path}/ca.crt", f"{tmp_path}/crt")
    text = openssl("x509", "-in", f"{tmp_path}/crt", "-noout", "-text")
    assert "Subject: CN = onprem-1\n" in text
    assert "DNS:onprem-1, IP Address:127.0.0.1, IP Address:198.18.1.11, IP Address:FD00:0:0:0:0:0:0:1" in text
    assert "prime256v1" in text
    authority_text = openssl("x509", "-in", f"{tmp_path}/ca.crt", "-noout", "-text")
    assert "CA:TRUE, pathlen:0" in authority_text
    assert "Certificate Sign, CRL Sign" in authority_text


def test_a_client_certificate_is_no_server(authority: pki.Authority, tmp_path: Path) -> None:
    _, certificate = signed(authority, entry(usages=["client"]))
    (tmp_path / "ca.crt").write_text(authority.pem)
    (tmp_path / "crt").write_bytes(certificate)
    with pytest.raises(subprocess.CalledProcessError):
        openssl("verify", "-purpose", "sslserver", "-CAfile", f"{tmp_path}/ca.crt", f"{tmp_path}/crt")


def test_the_signer_takes_nothing_but_the_public_key_from_the_request(authority: pki.Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("evil")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )
    found = pki.describe(authority.sign(entry(cn="isthmus-agent-a", sans_dns=[]), request, NOW).encode())
    assert found["cn"] == "isthmus-agent-a"
    assert found["sans"] == ["127.0.0.1", "198.18.1.11", "fd00::1"]


def test_a_request_that_another_key_signed_is_refused(authority: pki.Authority) -> None:
    request = pki.new_request(pki.new_key(), "a", "key")
    loaded = x509.load_pem_x509_csr(request.encode())
    raw = bytearray(loaded.public_bytes(serialization.Encoding.DER))
    raw[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(raw)).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(pki.PkiError, match="not signed by the key"):
        authority.sign(entry(), forged, NOW)


@pytest.mark.parametrize("request_text", ["", "garbage", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_a_damaged_request_is_refused_with_the_name(authority: pki.Authority, request_text: str) -> None:
    with pytest.raises(pki.PkiError, match="etcd-server"):
        authority.sign(entry(), request_text, NOW)


def test_a_request_for_another_cluster_is_refused(authority: pki.Authority) -> None:
    with pytest.raises(pki.PkiError, match="cluster cloud, not onprem"):
        authority.sign(entry(ca_cluster="cloud"), pki.new_request(pki.new_key(), "a", "key"), NOW)


def test_a_long_name_is_refused_before_anything_is_made() -> None:
    with pytest.raises(pki.PkiError, match="77 characters"):
        entry(cn="isthmus-agent-" + "n" * 63)


@pytest.mark.parametrize(
    ("age", "reason"),
    [
        (datetime.timedelta(0), None),
        (240 * DAY, None),
        (245 * DAY, "less than a third"),
        (366 * DAY, "expired"),
        (-1 * DAY, "valid from"),
    ],
)
def test_renewal_by_age(authority: pki.Authority, age: datetime.timedelta, reason: str | None) -> None:
    key, certificate = signed(authority, entry())
    found = pki.renewal_reason(entry(), key, certificate, authority.pem, NOW + age)
    assert found is None if reason is None else reason in (found or "")


def test_renewal_when_the_plan_or_a_file_changes(authority: pki.Authority) -> None:
    key, certificate = signed(authority, entry())
    other = pki.Authority("onprem", *pki.new_authority("onprem", NOW), "/pki", NOW)

    def reason(spec: pki.CertificateSpec = entry(), **files: bytes | None) -> str | None:  # noqa: B008
        have: dict[str, bytes | None] = {"key": key, "certificate": certificate, **files}
        return pki.renewal_reason(spec, have["key"], have["certificate"], authority.pem, NOW)

    assert reason() is None
    assert "'b' is wanted" in (reason(entry(cn="b")) or "")
    assert "198.18.1.99" in (reason(entry(sans_ip=["198.18.1.99"])) or "")
    assert "usages" in (reason(entry(usages=["client"])) or "")
    assert "another key" in (reason(key=pki.new_key()) or "")
    assert "none yet" in (reason(certificate=None) or "")
    assert "key is missing" in (reason(key=None) or "")
    assert "no readable" in (reason(certificate=certificate[:100]) or "")
    # The same names signed by an authority of the same name: only the signature tells.
    assert "not signed by the CA of onprem" in (pki.renewal_reason(entry(), key, certificate, other.pem, NOW) or "")


def operator_intermediate() -> tuple[bytes, bytes, str]:
    """An operator's RSA root and an intermediate below it: (key, chain file, intermediate alone)."""
    root_key = rsa.generate_private_key(65537, 2048)
    key = rsa.generate_private_key(65537, 2048)

    def certificate(name: str, public: Any, issuer: str, signer: Any) -> bytes:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - DAY)
            .not_valid_after(NOW + 100 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(signer, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )

    intermediate = certificate("mesh", key.public_key(), "corp", root_key)
    root = certificate("corp", root_key.public_key(), "corp", root_key)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    return pem, root + intermediate, intermediate.decode()


def test_an_operators_intermediate_is_used_as_it_is_and_its_root_is_never_pinned() -> None:
    key, chain, intermediate = operator_intermediate()
    authority = pki.Authority("onprem", key, chain, "/pki", NOW)
    assert authority.pem == intermediate
    leaf_key, leaf = signed(authority, entry())
    assert pki.renewal_reason(entry(), leaf_key, leaf, authority.pem, NOW) is None
    # No certificate outlives its authority.
    assert pki.describe(leaf)["not_after"] == (NOW + 100 * DAY).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_an_authority_that_cannot_sign_is_refused_with_the_file(authority: pki.Authority) -> None:
    key, certificate = pki.new_authority("onprem", NOW)
    with pytest.raises(pki.PkiError, match=r"/pki/ca\.key is not a readable"):
        pki.Authority("onprem", key[:60], certificate, "/pki", NOW)
    with pytest.raises(pki.PkiError, match=r"does not belong to /pki/ca\.key"):
        pki.Authority("onprem", pki.new_key(), certificate, "/pki", NOW)
    with pytest.raises(pki.PkiError, match="clock"):
        pki.Authority("onprem", key, certificate, "/pki", NOW + 11 * 365 * DAY)
    leaf_key, leaf = signed(authority, entry())
    with pytest.raises(pki.PkiError, match="not the certificate of an authority"):
        pki.Authority("onprem", leaf_key, leaf, "/pki", NOW)


def test_an_encrypted_key_is_named_and_not_shown() -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    with pytest.raises(pki.PkiError, match=r"/pki/ca\.key is encrypted") as caught:
        pki.load_key(pem, "/pki/ca.key")
    assert "PRIVATE" not in str(caught.value)


def test_a_pin_is_one_certificate_of_an_authority(authority: pki.Authority) -> None:
    assert pki.check_pin(authority.pem, "x", NOW) == authority.pem
    with pytest.raises(pki.PkiError, match="2 certificates"):
        pki.check_pin(authority.pem * 2, "x", NOW)
    with pytest.raises(pki.PkiError, match="not the certificate of an authority"):
        pki.check_pin(signed(authority, entry())[1].decode(), "x", NOW)


def test_an_authority_that_has_ended_is_known_and_good_for_nothing() -> None:
    key, certificate = pki.new_authority("a", NOW)
    old, later = certificate.decode(), NOW + pki.CA_LIFETIME + DAY
    other = pki.new_authority("a", later)[1].decode()
    assert pki.read_pin(old, "x") == old
    assert pki.read_pin(old + other, "x") == old + other
    for pinned in (old, old + other):
        assert pki.has_ended(pinned, later)
        with pytest.raises(pki.PkiError, match=r"x is valid from .* Next: check the clock .*replace_authority"):
            pki.check_pin(pinned, "x", later)
    assert not pki.has_ended(old + other, NOW)
    assert (pki.trusts(old, old), pki.trusts(old, other)) == (True, False)
    with pytest.raises(pki.PkiError, match=r"/pki/ca\.crt is valid from"):
        pki.establish_authority("a", key, certificate, {"the record": old}, "/pki", later)


def test_of_two_authorities_the_first_signs_unless_it_has_ended(authority: pki.Authority) -> None:
    key, certificate = pki.new_authority("onprem", NOW)
    successor = pki.Authority("onprem", key, certificate, "/pki", NOW)
    _, ended = pki.new_authority("onprem", NOW - pki.CA_LIFETIME - DAY)
    new_key, new = signed(successor, entry())
    reason = pki.renewal_reason(entry(), new_key, new, authority.pem + successor.pem, NOW)
    assert reason is not None
    assert "not signed by the CA" in reason
    for pinned in (successor.pem + authority.pem, ended.decode() + successor.pem):
        assert pki.renewal_reason(entry(), new_key, new, pinned, NOW) is None
    assert pki.renewal_reason(entry(), new_key, new, ended.decode(), NOW) is not None


def test_a_lost_ca_certificate_is_found_by_its_key() -> None:
    key, certificate = pki.new_authority("a", NOW)
    other = pki.new_authority("a", NOW)[1].decode()
    assert pki.certificate_of_key(key, [other, certificate.decode()], "k") == certificate.decode()
    assert pki.certificate_of_key(key, [other], "k") is None
    assert pki.same_authority(certificate.decode(), certificate.decode())
    assert not pki.same_authority(certificate.decode(), other)


def test_an_authority_is_made_once_and_never_again() -> None:
    key, certificate = pki.new_authority("a", NOW)
    pem = certificate.decode()
    other = pki.new_authority("a", NOW)[1].decode()

    made = pki.establish_authority("a", None, None, {}, "/pki", NOW)
    assert made.write_key is not None
    assert made.write_certificate is not None
    kept = pki.establish_authority("a", key, certificate, {"the record": pem}, "/pki", NOW)
    assert (kept.write_key, kept.write_certificate, kept.authority.pem) == (None, None, pem)
    # Interrupted between key and certificate: nobody knows the authority yet, the certificate is made for its key.
    resumed = pki.establish_authority("a", key, None, {}, "/pki", NOW)
    assert resumed.write_key is None
    assert pki.same_authority(resumed.authority.pem, pem)
    # A lost or damaged certificate comes back from a pinned copy.
    for damaged in (None, b"garbage", certificate[:200]):
        repaired = pki.establish_authority("a", key, damaged, {"trust/a.crt": pem}, "/pki", NOW)
        assert repaired.write_certificate == certificate

    for have, evidence in ((certificate, {}), (None, {"the estate record": pem})):
        with pytest.raises(pki.PkiError, match=r"private key .* is missing: /pki/ca\.key .*never made again"):
            pki.establish_authority("a", None, have, evidence, "/pki", NOW)
    # Also what a replacement of the authority leaves that was interrupted before, or after, it made the certificate.
    for have, words in ((None, r"ca\.crt holds no"), (certificate, "not the authority that the estate record")):
        with pytest.raises(pki.PkiError, match=words + r".*run it again with -e isthmus_replace_authority=a; else"):
            pki.establish_authority("a", key, have, {"the estate record": other}, "/pki", NOW)
    with pytest.raises(pki.PkiError, match=r"ca\.key is not a readable"):
        pki.establish_authority("a", b"garbage", certificate, {"trust/a.crt": pem}, "/pki", NOW)
    with pytest.raises(pki.PkiError, match=r"ca\.crt"):
        pki.establish_authority("a", key, b"garbage", {"trust/a.crt": other}, "/pki", NOW)
