# SPDX-License-Identifier: GPL-3.0-or-later
"""Pure parts of the etcd client: prefixes, endpoints, canaries, deletion rules, errors' words."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.kvstore import (
    EtcdChanged,
    EtcdCompacted,
    EtcdError,
    EtcdExists,
    EtcdNoSpace,
    EtcdNotFound,
    EtcdPermissionDenied,
    EtcdPrecondition,
    EtcdUnavailable,
    KeyValue,
    Listing,
    canary_cluster_id,
    canary_rule,
    canary_value,
    same_history,
    written_since,
)
from isthmus_agent.kvstore.client import decode_key, encode_key, error_of, parse_endpoint, prefix_end
from isthmus_agent.kvstore.proto import message


@given(prefix=st.binary(max_size=6), key=st.binary(max_size=8))
def test_range_end_holds_exactly_the_keys_of_the_prefix(prefix: bytes, key: bytes) -> None:
    end = prefix_end(prefix)
    inside = key >= prefix and (end == b"\0" or key < end)
    assert inside == key.startswith(prefix)


@given(st.binary())
def test_keys_survive_the_text_form(raw: bytes) -> None:
    assert encode_key(decode_key(raw)) == raw


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("https://198.18.1.11:2379", "198.18.1.11:2379"),
        ("https://etcd.example:2379/", "etcd.example:2379"),
        ("https://[fd00::1]:2379", "[fd00::1]:2379"),
    ],
)
def test_endpoint(endpoint: str, target: str) -> None:
    assert parse_endpoint(endpoint) == target


@pytest.mark.parametrize("endpoint", ["http://a:1", "a:2379", "https://a", "https://:2379", "https://a:1/x", ""])
def test_endpoint_is_refused_with_words(endpoint: str) -> None:
    with pytest.raises(ValueError, match="must look like https://HOST:PORT"):
        parse_endpoint(endpoint)


def test_zero_is_sent() -> None:
    """A comparison with create revision 0 means `absent`; without presence the field would not be on the wire."""
    compare = message("Compare")(key=b"k", create_revision=0)
    assert message("Compare").FromString(compare.SerializeToString()).HasField("create_revision")


def kv(value: str, mod_revision: int = 5) -> KeyValue:
    return KeyValue("canary", value.encode(), 1, mod_revision)


OURS = canary_value("2026-01-02T03:04:05Z", 0xA1)
CILIUM = "2026-01-02T03:04:05Z"


@pytest.mark.parametrize(
    ("canary", "changed", "floor", "believed"),
    [
        (None, False, 0, False),
        (kv(OURS), False, 0, True),
        (kv(CILIUM), False, 0, True),
        (kv(canary_value("x", 0xB2)), False, 0, False),
        (kv("x cluster_id=nonsense"), False, 0, False),
        (kv("x cluster_id="), False, 0, False),
        (kv("x cluster_id=A1"), False, 0, False),
        # another cluster id answers: the canary that names it was written there
        (kv(OURS), True, 0, True),
        (kv(canary_value("x", 0xB2)), True, 0, False),
        (kv(CILIUM), True, 0, True),
        # the same cluster id at a lower revision: what was restored with the snapshot proves nothing
        (kv(OURS, 5), True, 5, False),
        (kv(OURS, 6), True, 5, True),
        (kv(CILIUM, 5), True, 5, False),
        (None, True, 5, False),
    ],
)
def test_canary_rule(canary: KeyValue | None, changed: bool, floor: int, believed: bool) -> None:
    assert canary_rule(Listing("p/", 0xA1, 9, changed, floor, canary)) is believed


@pytest.mark.parametrize("changed", [False, True])
def test_same_history_rule(changed: bool) -> None:
    assert same_history(Listing("p/", 0xA1, 9, changed, 0, None)) is not changed


@pytest.mark.parametrize(
    ("canary", "changed", "noticed", "believed"),
    [
        (None, False, 0, True),
        (None, True, 5, False),
        (kv("{}", 5), True, 5, False),
        (kv("{}", 6), True, 5, True),
    ],
)
def test_written_since_rule(canary: KeyValue | None, changed: bool, noticed: int, believed: bool) -> None:
    assert written_since(Listing("p/", 0xA1, 9, changed, 0, canary, noticed)) is believed


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_canary_names_its_etcd(cluster_id: int) -> None:
    assert canary_cluster_id(canary_value("2026-01-02T03:04:05Z", cluster_id).encode()) == cluster_id


def test_canary_of_a_real_cilium_names_none() -> None:
    assert canary_cluster_id(CILIUM.encode()) is None
    assert canary_cluster_id(b"\xff") is None


STATUS = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (STATUS.PERMISSION_DENIED, "etcdserver: permission denied", EtcdPermissionDenied),
        (STATUS.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", EtcdCompacted),
        (STATUS.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision", EtcdChanged),
        (STATUS.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", EtcdNoSpace),
        (STATUS.NOT_FOUND, "etcdserver: requested lease not found", EtcdNotFound),
        (STATUS.FAILED_PRECONDITION, "etcdserver: user name not found", EtcdNotFound),
        (STATUS.FAILED_PRECONDITION, "etcdserver: role name already exists", EtcdExists),
        (STATUS.FAILED_PRECONDITION, "etcdserver: authentication is not enabled", EtcdPrecondition),
        (STATUS.UNAVAILABLE, "etcdserver: no leader", EtcdUnavailable),
        (STATUS.DEADLINE_EXCEEDED, "", EtcdUnavailable),
        (STATUS.INTERNAL, "Stream removed (Data frame with END_STREAM flag received)", EtcdUnavailable),
        (STATUS.INVALID_ARGUMENT, "etcdserver: too many operations in txn request", EtcdError),
        # Seen when etcd 3.4 ended under a call.
        (grpc.StatusCode.UNKNOWN, "Stream removed (Data frame with END_STREAM flag received)", EtcdUnavailable),
        (grpc.StatusCode.UNKNOWN, "No status received", EtcdUnavailable),
        (grpc.StatusCode.INTERNAL, "Internal error from Core", EtcdUnavailable),
        (grpc.StatusCode.UNKNOWN, "etcdserver: server stopped", EtcdUnavailable),
    ],
)
def test_errors_by_kind_name_all(code: grpc.StatusCode, details: str, kind: type[EtcdError]) -> None:
    error = error_of("https://a:1", "get some/key", code, details)
    assert type(error) is kind
    assert str(error).startswith("etcd https://a:1: get some/key: ")
    assert (details or code.name) in str(error)
