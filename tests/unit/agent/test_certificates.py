# SPDX-License-Identifier: GPL-3.0-or-later
"""Dates of certificates, against those that the cryptography package makes."""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.agent import certificates

DAY = 86400.0
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def certificate(begin: datetime, end: datetime) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "isthmus-agent-onprem-1")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize("end", [NOW + timedelta(days=90), datetime(2062, 5, 6, 7, 8, 9, tzinfo=timezone.utc)])
def test_dates_are_read_in_both_forms(end: datetime) -> None:
    found = certificates.validity("# of onprem\n" + certificate(NOW, end))
    assert (found.begin, found.end) == (NOW.timestamp(), end.timestamp())


WHOLE = certificate(NOW, NOW + timedelta(days=90))


@given(st.integers(0, len(WHOLE)), st.text("AQz/=", max_size=4))
def test_a_damaged_file_is_a_value_error_or_read(place: int, inserted: str) -> None:
    for text in (WHOLE[:place], WHOLE[:place] + inserted + WHOLE[place + len(inserted) :]):
        with contextlib.suppress(ValueError):
            certificates.validity(text)


@pytest.mark.parametrize(
    ("life", "left", "soon"), [(365, 31, False), (365, 29, True), (30, 11, False), (30, 9, True), (365, -1, True)]
)
def test_the_end_is_soon_30_days_before_or_in_the_last_third(life: int, left: int, soon: bool) -> None:
    found = certificates.Validity((left - life) * DAY, left * DAY)
    assert found.ends_soon(0.0) is soon


def test_all_that_can_be_read_is_and_the_rest_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "trust").mkdir()
    (tmp_path / "agent.crt").write_text(certificate(NOW - timedelta(days=80), NOW + timedelta(days=10)))
    (tmp_path / "trust" / "cloud.crt").write_text(certificate(NOW, NOW + timedelta(days=3650)))
    (tmp_path / "trust" / "edge.crt").write_text("not one")
    found = certificates.read(tmp_path)
    assert set(found) == {"agent", "trust/cloud"}
    assert list(certificates.warnings(found, NOW.timestamp())) == [
        "certificate agent ends at 2026-01-12 03:04 UTC; what uses it fails then. Next: run site to renew it"
    ]
    (words,) = certificates.warnings(found, NOW.timestamp() + 20 * DAY)
    assert words.startswith("certificate agent ended at 2026-01-12")
    for name, replaced in (("trust/cloud", "cloud"), ("ca", "CLUSTER")):
        (words,) = certificates.warnings({name: found["agent"]}, NOW.timestamp())
        assert "run replace_authority -e isthmus_replace_authority=" + replaced in words
    words, *_ended = certificates.warnings({"agent": found["agent"]}, NOW.timestamp() - 81 * DAY)
    assert words.startswith("certificate agent begins at 2025-10-14 03:04 UTC only, by this host's clock; ")
