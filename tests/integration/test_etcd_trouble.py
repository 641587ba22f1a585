# SPDX-License-Identifier: GPL-3.0-or-later
"""What etcd itself says when its disk, data, quota or certificates fail: named, with a way back that works."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_trouble, etcd_unit
from integration.etcd_fixture import EtcdServer, require_etcd
from isthmus_agent import etcd_admin
from isthmus_agent.kvstore import EtcdError, EtcdNoSpace
from playbook import documented


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "etcd", arguments=("--quota-backend-bytes=1000000", "--logger=zap")) as running:
        monkeypatch.setattr(etcd_unit, "DATA", str(running.data))
        yield running


def journal(server: EtcdServer) -> str:
    lines = (server.directory / "etcd.log").read_text(errors="replace").splitlines()
    return "\n".join(lines[-etcd_trouble.JOURNAL_LINES :])


def fails_to_start(server: EtcdServer) -> None:
    (server.directory / "etcd.log").unlink()
    server.start(wait=False)
    assert server.process is not None
    assert server.process.wait(timeout=20) != 0


def damage(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(os.urandom(8192))


@pytest.mark.parametrize("what", ["pages", "log"])
def test_damaged_data_is_told_from_what_etcd_says_of_it(server: EtcdServer, what: str) -> None:
    with server.sync_client() as client:
        for number in range(20):
            client.put(f"k{number}", "x" * 10_000)
    assert etcd_trouble.of_host("cloud", True, journal(server)) == ""
    server.stop(signal.SIGKILL)
    database, (log,) = server.data / "member" / "snap" / "db", (server.data / "member" / "wal").glob("*.wal")
    if what == "pages":
        damage(database, 0)
    else:
        damage(log, 8192)
    fails_to_start(server)
    alone = etcd_trouble.of_host("cloud", True, journal(server))
    assert alone.startswith("Its data is damaged (its journal says: ")
    assert alone.endswith("on this host; run isthmus.mesh.restore -e isthmus_restore=cloud")
    assert "run isthmus.mesh.site, and it joins them anew" in etcd_trouble.of_host("cloud", False, journal(server))


@pytest.mark.root
def test_a_full_disk_is_told_and_etcd_goes_on_when_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_etcd()
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "none", str(disk)], check=True)
    try:
        server = EtcdServer(disk / "etcd", arguments=("--logger=zap",))
        monkeypatch.setattr(etcd_unit, "DATA", str(server.data))
        with server:
            with server.sync_client() as client:
                client.put("k", "before")
            assert etcd_trouble.of_host("cloud", True, journal(server)) == ""
            server.stop()
            filler = disk / "filler"
            with pytest.raises(OSError, match="No space left"):
                filler.write_bytes(bytes(200 << 20))
            words = etcd_trouble.of_host("cloud", True, "")
            assert words.startswith(f"The file system of {server.data} is full: 0 MiB are free, ")
            assert "then `systemctl restart isthmus-etcd`" in words
            filler.unlink()
            server.start()
            assert server.dump() == {"k": "before"}
            said = '{"level":"fatal","error":"write wal: no space left on device"}'
            assert "its disk was full, and" in etcd_trouble.of_host("cloud", True, said)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_database_at_its_quota_is_told_and_freed_by_the_commands_of_the_docs(server: EtcdServer) -> None:
    with server.sync_client() as client:
        etcd_admin.ensure_access(client, etcd_admin.wanted_access("cloud", [], []), apply=True, enable=True)
        while not client.alarms():
            with contextlib.suppress(EtcdNoSpace):
                client.put("k", "x" * 100_000)
        alarms = [alarm for _member, alarm in client.alarms()]
        words = etcd_trouble.of_alarms(alarms)
        assert words.startswith("NOSPACE: its database has reached etcd.quota_bytes, and every write is refused; ")

        with pytest.raises(etcd_admin.AdminError, match="Next: compact"), etcd_admin._maintenance(client, "a", 60):
            pytest.fail("no member has its turn while nothing can be written")

        for suffix, path in zip(("crt", "key"), server.ca.issue("root"), strict=True):
            assert path == server.ca.directory / f"root.{suffix}"
        settings = server.directory / "etcd.env"
        settings.write_text(f"ETCD_ADVERTISE_CLIENT_URLS={server.endpoint}\nETCD_TRUSTED_CA_FILE={server.ca.crt}\n")
        script = documented("operating.md", "cd /etc/isthmus/pki")
        for there, here in (("/etc/isthmus/pki", str(server.ca.directory)), ("/etc/isthmus/etcd.env", str(settings))):
            assert there in script
            script = script.replace(there, here)
        subprocess.run(["sh", "-e", "-c", script], check=True, capture_output=True)
        client.put("k", "after")
        assert client.alarms() == ()
        assert client.get("k").text == "after"  # type: ignore[union-attr]


def test_certificates_that_ended_are_renewed_under_a_running_etcd(tmp_path: Path) -> None:
    """As `site` does it: files are replaced, etcd is not restarted. Both ends name what is wrong meanwhile."""
    with EtcdServer(tmp_path / "etcd") as server:
        process = server.process
        pairs = [server.ca.issue("etcd-server"), server.ca.issue("root")]
        good = {path: path.read_bytes() for pair in pairs for path in pair}
        for ended, path in ((pairs[0], "etcd-server"), (pairs[1], "root")):
            for file in ended:
                file.unlink()
            server.ca.days = (-3, -1)
            server.ca.issue(path)
            with server.sync_client() as client, pytest.raises(EtcdError, match="a certificate is refused"):
                client.get("k")
            for file in ended:
                file.write_bytes(good[file])
            with server.sync_client() as client:
                client.put("k", path)
        assert server.process is process
        assert server.dump() == {"k": "root"}
