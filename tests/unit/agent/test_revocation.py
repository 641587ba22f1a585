# SPDX-License-Identifier: GPL-3.0-or-later
"""The ledger of signed certificates, and lists of revoked ones."""

from __future__ import annotations

import datetime
import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from isthmus_agent import pki
from isthmus_agent.revocation import Ledger, check_der, describe_list, load_list, revoke, taken_over, to_der

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


def authority(name: str = "onprem", key: bytes | None = None) -> pki.Authority:
    made, certificate = pki.new_authority(name, NOW, key)
    return pki.Authority(name, made, certificate, "/pki", NOW)


@pytest.fixture(scope="module")
def onprem() -> pki.Authority:
    return authority()


def certificate(ca: pki.Authority, cn: str, when: datetime.datetime = NOW) -> str:
    spec = pki.CertificateSpec("x", ca.cluster, "o1", cn, frozenset(), frozenset(), frozenset(["client"]), "root")
    return ca.sign(spec, pki.new_request(pki.new_key(), cn, "key"), when)


def ledger(ca: pki.Authority, *entries: tuple[str, str], when: datetime.datetime = NOW) -> Ledger:
    """Entries are host and common name."""
    found = Ledger.read(None, "issued.json", NOW, new=True)
    for host, cn in entries:
        found = found.with_certificate(certificate(ca, cn, when), host, "x")
    return found


def serials(crl: str, ca: pki.Authority) -> set[str]:
    return {f"{entry.serial_number:x}" for entry in load_list(crl, ca.pem, "list")}


def test_a_ledger_reads_back_and_forgets_what_has_ended(onprem: pki.Authority) -> None:
    written = ledger(onprem, ("o2", "root"), ("o3", "root"))
    assert Ledger.read(written.text(NOW).encode(), "issued.json", NOW) == written
    later = Ledger.read(written.text(NOW + 366 * DAY).encode(), "issued.json", NOW)
    assert later.issued == ()
    assert later.since is None


def test_what_a_host_has_and_what_a_name_has(onprem: pki.Authority) -> None:
    written = ledger(onprem, ("o3", "root"), ("o2", "root"), ("c1", "remote-cloud"), ("c9", "remote-cloud"))
    assert [one.host for one in written.of(["o3"], [])] == ["o3"]
    assert [one.host for one in written.of(["c1"], ["remote-cloud"])] == ["c1", "c9"]


def test_a_ledger_that_began_later_says_so_while_older_certificates_are_valid() -> None:
    assert Ledger.read(None, "issued.json", NOW, new=True).lacks(NOW) is None
    late = Ledger.read(Ledger.read(None, "issued.json", NOW).text(NOW).encode(), "issued.json", NOW + DAY)
    assert late.lacks(NOW + 364 * DAY) == NOW
    assert late.lacks(NOW + 365 * DAY) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"schema": 2, "since": null, "certificates": []}',
        b'{"schema": 1, "since": "yesterday", "certificates": []}',
        b'{"schema": 1, "since": null, "certificates": [{"serial": "1"}]}',
        json.dumps(
            {
                "schema": 1,
                "since": None,
                "certificates": [
                    {"serial": "no", "cn": "a", "host": "b", "name": "c", "not_after": "2026-01-02T03:04:05Z"}
                ],
            }
        ).encode(),
    ],
)
def test_a_damaged_ledger_is_refused_with_the_way_out(content: bytes) -> None:
    with pytest.raises(pki.PkiError, match=r"/pki/issued.json, the ledger .* is damaged .* move it away"):
        Ledger.read(content, "/pki/issued.json", NOW)


def test_a_list_grows_and_is_left_alone_when_nothing_is_new(onprem: pki.Authority) -> None:
    written = ledger(onprem, ("o2", "root"), ("o3", "root"))
    first = revoke(onprem, written.of(["o3"], []), None, onprem.pem, "record", NOW)
    assert serials(first.crl, onprem) == {written.issued[1].serial} == {one.serial for one in first.revoked}
    assert revoke(onprem, written.of(["o3"], []), first.crl, onprem.pem, "record", NOW + DAY) == type(first)(
        first.crl, ()
    )
    second = revoke(onprem, written.of(["o2", "o3"], []), first.crl, onprem.pem, "record", NOW + DAY)
    assert [one.host for one in second.revoked] == ["o2"]
    assert serials(second.crl, onprem) == {one.serial for one in written.issued}
    numbers = [
        load_list(one, onprem.pem, "list").extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        for one in (first.crl, second.crl)
    ]
    assert numbers == [1, 2]


def test_a_serial_leaves_the_list_when_no_such_certificate_can_be_valid(onprem: pki.Authority) -> None:
    old = ledger(onprem, ("o3", "root"))
    new = ledger(onprem, ("o2", "root"))
    first = revoke(onprem, old.issued, None, onprem.pem, "record", NOW).crl
    assert len(serials(revoke(onprem, new.issued, first, onprem.pem, "record", NOW + 364 * DAY).crl, onprem)) == 2
    assert serials(revoke(onprem, new.issued, first, onprem.pem, "record", NOW + 366 * DAY).crl, onprem) == {
        new.issued[0].serial
    }


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
def test_an_operators_authority_signs_lists_too(kind: str) -> None:
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    own = authority("own", pem)
    crl = revoke(own, ledger(own, ("o3", "root")).issued, None, own.pem, "record", NOW).crl
    der = to_der(crl, own.pem, "record")
    check_der(der, own.pem, "file")
    assert describe_list(der).startswith("1 revoked certificates: ")


def test_another_authoritys_list_is_refused(onprem: pki.Authority) -> None:
    """Also one of the same name: the key counts."""
    for other in (authority("cloud"), authority()):
        crl = other.sign_list({}, 0, NOW)
        with pytest.raises(pki.PkiError, match="the record is a list of revoked certificates that another authority"):
            load_list(crl, onprem.pem, "the record")
        with pytest.raises(pki.PkiError, match="another authority"):
            check_der(to_der(crl, other.pem, "x"), onprem.pem, "/pki/revoked.crl")
    for content in (b"", b"x", onprem.pem.encode()):
        with pytest.raises(pki.PkiError, match=r"/pki/revoked.crl is no readable list .* Remove it"):
            check_der(content, onprem.pem, "/pki/revoked.crl")
    with pytest.raises(pki.PkiError, match="the record is no readable list"):
        load_list(onprem.pem, onprem.pem, "the record")


def test_a_new_authority_takes_the_list_of_the_old_one_over(onprem: pki.Authority) -> None:
    """While both are trusted either's list is good; afterwards the old one's is refused."""
    new, written = authority(), ledger(onprem, ("o2", "root"), ("o3", "root"))
    both = onprem.pem + new.pem
    old = revoke(onprem, written.issued, None, onprem.pem, "record", NOW).crl
    check_der(to_der(old, both, "record"), new.pem + onprem.pem, "/pki/revoked.crl")

    taken = taken_over(new, old, both, "record", NOW)
    assert serials(taken, new) == {one.serial for one in written.issued}
    assert taken_over(new, taken, both, "record", NOW + DAY) == taken
    with pytest.raises(pki.PkiError, match="another authority"):
        load_list(taken, onprem.pem, "record")
    assert serials(taken_over(new, None, both, "record", NOW), new) == set()

    more = ledger(new, ("o4", "root"))
    assert serials(revoke(new, more.issued, old, both, "record", NOW).crl, new) == {
        one.serial for one in (*written.issued, *more.issued)
    }
    with pytest.raises(pki.PkiError, match="another authority"):
        taken_over(new, authority().sign_list({}, 0, NOW), both, "record", NOW)
