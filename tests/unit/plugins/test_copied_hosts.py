# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts that are copies of others are told before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.filter.copied_hosts import copied_hosts
from unit.mesh import estates

RECORD = estates.planned(estates.model()).record
KEY = "/etc/isthmus/pki/wireguard.key"
SECOND = "/etc/isthmus/pki/wireguard-1.key"


def host(name: str, installed: str | None = None, **keys: str) -> dict[str, Any]:
    """As `preflight` found it: `first` and `second` are its public keys."""
    found = {path: keys[word] for word, path in (("first", KEY), ("second", SECOND)) if word in keys}
    return {"inventory_hostname": name, "__preflight_result": {"installed": installed, "public_keys": found}}


def laid_down(name: str, key: str) -> dict[str, Any]:
    """The record when it has a public key of a host."""
    document = RECORD["clusters/onprem"]
    entry = {**document["hosts"][name], "public_keys": {"51871": key}}
    return {**RECORD, "clusters/onprem": {**document, "hosts": {**document["hosts"], name: entry}}}


def test_hosts_with_their_own_specifications_and_keys_are_no_copies() -> None:
    hosts = [
        host("o1", "o1", first="A", second="B"),
        host("o2", "o2", first="C"),
        host("o3"),  # new, or made anew under its name
        {"inventory_hostname": "c1"},
        {"inventory_hostname": "c1", "__preflight_result": {"skipped": True}},
    ]
    assert copied_hosts(hosts, RECORD) == []
    assert copied_hosts(hosts, {}) == []
    assert copied_hosts(hosts, laid_down("o3", "D")) == []


def test_a_copy_has_the_specification_of_a_host_that_the_record_knows() -> None:
    """Whether that takes part or not, as in a run for the copy alone; its key is not told again."""
    copy, original = host("c1", "o2", first="A"), host("o2", "o2", first="A")
    for hosts in ([copy], [original, copy]):
        (line,) = copied_hosts(hosts, RECORD)
        assert line.startswith(
            "c1 cannot join the mesh yet; nothing was changed on it. Its /etc/isthmus/node.json is that of o2, a host "
            "of cluster onprem: it is a copy of that machine"
        )
        assert "or ansible_host of c1 leads to o2. Next: correct ansible_host, or take the mesh off the copy" in line
        assert "`isthmus.mesh.teardown --limit c1`" in line


def test_a_machine_whose_host_has_left_is_no_copy_under_its_new_name() -> None:
    assert copied_hosts([host("c1", "former")], RECORD) == []
    gone = {**RECORD, "clusters/onprem": {**RECORD["clusters/onprem"], "state": "absent"}}
    assert copied_hosts([host("c1", "o2")], gone) == []


@pytest.mark.parametrize("word", ["first", "second"])
def test_a_key_that_two_hosts_have_is_told_with_both_and_where_it_is(word: str) -> None:
    hosts = [host("o1", "o1", first="SAME"), host("o2", "o2", first="B"), host("c1", **{word: "SAME"})]
    (line,) = copied_hosts(hosts, RECORD)
    where = {"first": KEY, "second": SECOND}[word]
    assert line.startswith(
        f"c1 ({where}) and o1 ({KEY}) have one private key of WireGuard; nothing was changed on any of them. Its "
        "public key is SAME."
    )
    assert "`isthmus.mesh.teardown --limit HOST`" in line


def test_a_third_host_with_the_key_is_told_beside_a_copy() -> None:
    hosts = [host("o1", "o1", first="A"), host("o2", "o1", first="A"), host("c1", first="A")]
    copy, shared = copied_hosts(hosts, RECORD)
    assert copy.startswith("o2 cannot join")
    assert shared.startswith(f"c1 ({KEY}), o1 ({KEY}) and o2 ({KEY}) have one private key")


def test_of_hosts_that_take_no_part_the_record_counts() -> None:
    record = laid_down("o1", "A")
    (line,) = copied_hosts([host("c1", first="A")], record)
    assert line.startswith(f"c1 ({KEY}) and o1 (by the estate record) have one private key of WireGuard")
    assert copied_hosts([host("c1", first="A"), host("o1", first="B")], record) == [], "the host knows better"
