# SPDX-License-Identifier: GPL-3.0-or-later
"""How a host's own resolution is read, joined and found again."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import resolver


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's /etc and the collection's state directory, both empty."""
    (tmp_path / "state").mkdir()
    monkeypatch.setattr(resolver, "RESOLV_CONF", str(tmp_path / "resolv.conf"))
    monkeypatch.setattr(resolver, "ORIGINAL", str(tmp_path / "state" / "original"))
    monkeypatch.setattr(resolver, "ORIGINAL_LINK", str(tmp_path / "state" / "original-link"))
    return tmp_path


def test_a_plain_file_is_joined_with_its_servers_behind_ours(host: Path) -> None:
    original = "search example.org\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n"
    (host / "resolv.conf").write_text(original)
    found = resolver.probe(resolved_active=True)
    assert (found.method, found.link, found.joined) == ("file", None, False)
    joined = resolver.joined_file(found.original)
    assert resolver.servers(joined) == [resolver.LOCAL_SERVER, "192.0.2.1", "192.0.2.2"]
    assert joined.endswith(original)
    assert resolver.upstream(found) == resolver.ORIGINAL


def test_what_was_joined_is_seen_through(host: Path) -> None:
    (host / "state" / "original").write_text("nameserver 192.0.2.1\n")
    (host / "resolv.conf").write_text(resolver.joined_file("nameserver 192.0.2.1\n"))
    found = resolver.probe(resolved_active=False)
    assert (found.method, found.original, found.joined) == ("file", "nameserver 192.0.2.1\n", True)
    assert resolver.joined_file(found.original) == (host / "resolv.conf").read_text()


def test_the_program_behind_a_link_stays_in_charge(host: Path) -> None:
    (host / "kept.conf").write_text("nameserver 192.0.2.9\n")
    (host / "resolv.conf").symlink_to("kept.conf")
    found = resolver.probe(resolved_active=False)
    assert (found.method, found.link) == ("file", "kept.conf")
    assert resolver.upstream(found) == str(host / "kept.conf")
    # After joining, a change that the program makes is what counts.
    (host / "resolv.conf").unlink()
    (host / "resolv.conf").write_text(resolver.joined_file(found.original))
    (host / "state" / "original-link").write_text("kept.conf")
    (host / "kept.conf").write_text("nameserver 192.0.2.10\n")
    assert resolver.probe(resolved_active=False).original == "nameserver 192.0.2.10\n"


def test_a_stub_of_resolved_means_resolved_only_while_it_runs(host: Path) -> None:
    (host / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    assert resolver.probe(resolved_active=True).method == "resolved"
    assert resolver.probe(resolved_active=False).method == "file"
    assert resolver.upstream(resolver.probe(resolved_active=True)) is None


def test_a_host_without_the_file_is_joined_too(host: Path) -> None:
    found = resolver.probe(resolved_active=False)
    assert found.original is None
    assert resolver.servers(resolver.joined_file(None)) == [resolver.LOCAL_SERVER]


@pytest.mark.parametrize(("upstream", "line"), [(None, "no-resolv"), ("/x", "resolv-file=/x")])
def test_dnsmasq_answers_for_one_domain_only(upstream: str | None, line: str) -> None:
    lines = resolver.dnsmasq_conf("10.0.0.1", "clusterset.local", upstream).splitlines()
    assert {"no-hosts", "local=/clusterset.local/", "cache-size=0", line} <= set(lines)
    assert f"listen-address=10.0.0.1,{resolver.LOCAL_SERVER}" in lines


def test_what_the_operator_edits_behind_our_lines_counts(host: Path) -> None:
    (host / "state" / "original").write_text("nameserver 192.0.2.1\n")
    edited = "nameserver 192.0.2.7\noptions edns0\n"
    (host / "resolv.conf").write_text(resolver.joined_file(edited))
    assert resolver.probe(resolved_active=False).original == edited
    (host / "resolv.conf").write_text("search example.org\n" + resolver.joined_file(edited))
    assert resolver.probe(resolved_active=False).original == "search example.org\n" + edited


def test_a_lost_copy_of_the_original_loses_no_name_server(host: Path) -> None:
    (host / "resolv.conf").write_text(resolver.joined_file("nameserver 192.0.2.1\n"))
    assert resolver.probe(resolved_active=False).original == "nameserver 192.0.2.1\n"
    # Nor does a file of which only our lines are left.
    (host / "state" / "original").write_text("nameserver 192.0.2.2\n")
    (host / "resolv.conf").write_text(resolver.joined_file(None))
    assert resolver.probe(resolved_active=False).original == "nameserver 192.0.2.2\n"
