# SPDX-License-Identifier: GPL-3.0-or-later
"""Parts of a control plane that are lost: each is named with the way back, which is then gone. What etcd itself says of
damaged files and lost quorum, and preflight and verify of a clock that is off, is in tests/integration."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from estate_tools import ONPREM, PKI, Estate
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

PYTHON = "/opt/isthmus/current/bin/python"
DATA = "/var/lib/isthmus/etcd"


def signed_at(when: str) -> str:
    """A program for cloud-1: its certificates are what its authority would have signed for its keys at `when`, an
    expression of Python."""
    return f"""
import datetime, json, pathlib
from datetime import timedelta
from isthmus_agent import pki
where = pathlib.Path("{PKI}")
now = datetime.datetime.now(datetime.timezone.utc)
then = {when}
key = (where / "ca.key").read_bytes()
_key, certificate = pki.new_authority("cloud", then, key)
authority = pki.Authority("cloud", key, certificate, "here", then)
for entry in json.load(open("/etc/isthmus/node.json"))["pki"]["certificates"]:
    if entry["ca_cluster"] == "cloud":
        spec = pki.CertificateSpec.from_dict(entry)
        request = pki.new_request((where / (spec.name + ".key")).read_bytes(), spec.cn, "here")
        (where / (spec.name + ".crt")).write_text(authority.sign(spec, request, then))
"""


# etcd's data on a disk of its own, in memory, with little room; and back.
SMALL_DISK = f"""
systemctl stop isthmus-etcd
mount -t tmpfs -o "size=$(( $(du -sm {DATA} | cut -f1) + 150 ))m,mode=0700" none /mnt
cp -a {DATA}/. /mnt/
chown --reference={DATA} /mnt
mount --bind /mnt {DATA}
systemctl start isthmus-etcd
"""
LARGE_DISK = f"""
systemctl stop isthmus-etcd
umount {DATA}
rm -rf {DATA}/member
cp -a /mnt/member {DATA}/
umount /mnt
systemctl start isthmus-etcd
"""


def said(output: str) -> str:
    return re.sub(r"\s+", " ", output)


def test_a_member_that_lost_its_data_is_named_and_joins_anew_by_site(estate: Estate) -> None:
    estate.converged()
    before = {member["Status"]["header"]["cluster_id"] for member in estate.etcd_members("onprem-1")}
    host = ONPREM[2]
    with estate.unnoticed(estate.edge):
        lose = "systemctl stop isthmus-etcd && rm -rf /var/lib/isthmus/etcd/member"
        estate.lab.exec(host, ["sh", "-c", lose])
        told = said(play("verify", "--limit", "onprem", check=False).output)
        assert f"member {host} does not answer: " in told
        assert "isthmus_prune=member/onprem/onprem-3" in told
        play("site", "--limit", "onprem")
    members = estate.etcd_members("onprem-1")
    assert len(members) == 3
    assert {member["Status"]["header"]["cluster_id"] for member in members} == before
    estate.converged()
    play("verify", "--limit", "onprem")


def test_certificates_that_have_ended_are_named_and_renewed_by_site(estate: Estate) -> None:
    """All of cloud-1's own: etcd's, the operator's, the agent's. Its authority is good."""
    estate.converged()
    host = "cloud-1"
    pid = estate.lab.exec(host, ["systemctl", "show", "-P", "MainPID", "isthmus-etcd"]).stdout
    with estate.unnoticed(estate.edge):
        estate.lab.exec(host, [PYTHON, "-"], feed=signed_at("now - pki.LIFETIME - timedelta(days=1)"))
        told = said(play("verify", "--limit", host, check=False).output)
        assert f"{PKI}/etcd-server.crt: it expired at " in told
        assert "run the playbook isthmus.mesh.site" in told
        play("site", "--limit", "cloud")
        estate.converged()
    assert estate.lab.exec(host, ["systemctl", "show", "-P", "MainPID", "isthmus-etcd"]).stdout == pid
    play("verify", "--limit", "cloud")


@pytest.mark.parametrize("back", ["the clock", "site"])
def test_certificates_that_begin_in_a_day_are_named_and_nothing_is_cut_off(estate: Estate, back: str) -> None:
    """What a host sees whose clock is a day behind: the machines of the lab share one clock. When that is set right the
    certificates are valid again, here they are put back; else `site` has others signed."""
    estate.converged()
    host = "cloud-1"
    pid = estate.lab.exec(host, ["systemctl", "show", "-P", "MainPID", "isthmus-etcd"]).stdout
    estate.lab.exec(host, ["tar", "-C", PKI, "-cf", "/root/kept.tar", "."])
    with estate.unnoticed(estate.edge):
        estate.lab.exec(host, [PYTHON, "-"], feed=signed_at("now + pki.BACKDATE + timedelta(days=1)"))
        estate.until(
            "status names the certificate and the clock",
            lambda: any(
                words.startswith("certificate agent begins at ") and "Next: set the clock" in words
                for words in estate.ask(host, "status")["warnings"]
            ),
        )
        verified = play("verify", "--limit", host, check=False)
        assert verified.status == 2
        assert f"{PKI}/etcd-server.crt: it is valid from " in said(verified.output)
        if back == "site":
            play("site", "--limit", "cloud")
        else:
            estate.lab.exec(host, ["tar", "-C", PKI, "-xf", "/root/kept.tar"])
        estate.converged()
    estate.lab.exec(host, ["rm", "/root/kept.tar"])
    assert estate.lab.exec(host, ["systemctl", "show", "-P", "MainPID", "isthmus-etcd"]).stdout == pid
    play("verify", "--limit", "cloud")


def test_a_full_disk_is_named_and_etcd_serves_again_once_there_is_room(estate: Estate) -> None:
    estate.converged()
    host, key = "cloud-1", "full-disk-test"
    mirrors = {other: estate.state(other) for other in ("onprem-1", "edge-1")}

    def connected() -> bool:
        return bool(estate.ask(host, "status")["etcd"]["connected"])

    with estate.unnoticed(estate.edge):
        estate.lab.exec(host, ["sh", "-e", "-c", SMALL_DISK])
        try:
            estate.until("cloud-1's agent is connected", connected)
            estate.lab.exec(host, ["dd", "if=/dev/zero", f"of={DATA}/filler", "bs=1M"], check=False)
            estate.until(
                "etcd cannot write any more",
                lambda: estate.etcdctl(host, "put", key, feed="x" * 1_000_000, check=False).returncode != 0,
                120,
            )
            estate.until("status says that etcd is gone", lambda: not connected())
            full = f"The file system of {DATA} is full: "
            assert full in said(play("verify", "--limit", host, check=False).output)
            # It waits for the member as long as for one that is slow.
            stopped = play("site", "--limit", "cloud", check=False)
            assert stopped.status == 2
            assert full in said(stopped.output)
            assert "then `systemctl restart isthmus-etcd` on this host" in said(stopped.output)
            estate.lab.exec(host, ["rm", f"{DATA}/filler"])
            estate.lab.exec(host, ["systemctl", "restart", "isthmus-etcd"])
            estate.etcdctl(host, "del", key)
            estate.converged()
        finally:
            estate.lab.exec(host, ["rm", "-f", f"{DATA}/filler"])
            estate.lab.exec(host, ["sh", "-e", "-c", LARGE_DISK])
        estate.converged()
    assert estate.withdrawn(mirrors) == {}
    play("verify", "--limit", "cloud")


def test_the_authority_alone_is_put_back(estate: Estate, tmp_path: Path) -> None:
    private, public = tmp_path / "operator.key", tmp_path / "operator.pem"
    for words in (("genrsa", "-out", private, "3072"), ("rsa", "-in", private, "-pubout", "-out", public)):
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    where = {"isthmus_backup_dir": str(tmp_path / "kept")}
    play("backup", "--limit", "cloud", "-e", json.dumps({**where, "isthmus_backup_key": str(public)}))
    host = "cloud-1"
    before = estate.lab.exec(host, ["cat", f"{PKI}/ca.key", f"{PKI}/ca.crt"]).stdout
    estate.lab.exec(host, ["rm", f"{PKI}/ca.key", f"{PKI}/ca.crt"])
    told = said(play("site", "--limit", "cloud", check=False).output)
    assert "the private key of cluster cloud's certificate authority is missing" in told
    assert "isthmus_restore_only=authority" in told
    where |= {"isthmus_restore": "cloud", "isthmus_restore_key": str(private), "isthmus_restore_only": "authority"}
    play("restore", "-e", json.dumps(where))
    assert estate.lab.exec(host, ["cat", f"{PKI}/ca.key", f"{PKI}/ca.crt"]).stdout == before
    assert estate.unit_state(host, "isthmus-etcd") == "active"
    assert play("site", "--limit", "cloud").changed == {}


def test_an_authority_that_is_lost_without_backup_is_replaced(estate: Estate) -> None:
    """cloud's: its etcd has one member, onprem and edge trust it, and traffic goes on."""
    estate.converged()
    host, everywhere = "cloud-1", [*ONPREM, "cloud-1", "cloud-2", "edge-1"]
    before = estate.lab.exec(host, ["cat", f"{PKI}/trust/cloud.crt"]).stdout
    mirrors = {other: estate.state(other) for other in ("onprem-1", "edge-1")}
    with estate.unnoticed(estate.edge, estate.onprem):
        estate.lab.exec(host, ["rm", f"{PKI}/ca.key", f"{PKI}/ca.crt"])
        told = said(play("site", "--limit", "cloud", check=False).output)
        assert "isthmus.mesh.replace_authority -e isthmus_replace_authority=cloud" in told
        play("replace_authority", "-e", "isthmus_replace_authority=cloud")
        estate.converged()
    after = estate.lab.exec(host, ["cat", f"{PKI}/ca.crt"]).stdout
    assert after != before
    for place in everywhere:
        trusted = estate.lab.exec(place, ["sh", "-c", f"cat {PKI}/trust/cloud.crt 2>/dev/null || true"]).stdout
        assert trusted in ("", after)
    assert estate.withdrawn(mirrors) == {}
    assert play("site").changed == {}
    play("verify")
