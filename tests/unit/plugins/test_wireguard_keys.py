# SPDX-License-Identifier: GPL-3.0-or-later
"""Public keys of WireGuard are computed without `wg`, which a new host lacks."""

from __future__ import annotations

import base64
from pathlib import Path

from ansible_collections.isthmus.mesh.plugins.module_utils import wireguard
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=30, deadline=None)
@given(raw=st.binary(min_size=32, max_size=32))
def test_the_public_key_is_that_of_x25519(raw: bytes) -> None:
    expected = X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert wireguard._times_base_point(raw) == expected


def test_of_a_file_that_holds_no_key_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "wireguard.key"
    assert wireguard.public_key(str(path)) is None
    path.write_text("nothing\n")
    assert wireguard.public_key(str(path)) is None
    path.write_bytes(base64.b64encode(bytes(range(32))) + b"\n")
    found = wireguard.public_key(str(path))
    assert found is not None
    assert len(base64.b64decode(found)) == 32
