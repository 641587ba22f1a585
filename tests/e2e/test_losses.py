# SPDX-License-Identifier: GPL-3.0-or-later
"""Parts of a control plane that are lost: each is named with the way back, which is then gone. What etcd itself says of
damaged files, a full disk and lost quorum is in tests/integration."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from estate_tools import ONPREM, PKI, Estate
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.slow]

# What the host's authority would have signed a day and a year ago, for the host's own keys.
EXPIRE = f"""
import datetime, json, pathlib, sys
from isthmus_agent import pki
where = pathlib.Path("{PKI}")
then = datetime.datetime.now(datetime.timezone.utc) - pki.LIFETIME - datetime.timedelta(days=1)
key = (where / "ca.key").read_bytes()
_key, certificate = pki.new_authority("cloud", then, key)
authority = pki.Authority("cloud", key, certificate, "here", then)
for entry in json.load(open("/etc/isthmus/node.json"))["pki"]["certificates"]:
    if entry["ca_cluster"] == "cloud":
        spec = pki.CertificateSpec.from_dict(entry)
        request = pki.new_request((where / (spec.name + ".key")).read_bytes(), spec.cn, "here")
        (where / (spec.name + ".crt")).write_text(authority.sign(spec, request, then))
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
        estate.lab.exec(host, ["/opt/isthmus/current/bin/python", "-"], feed=EXPIRE)
        told = said(play("verify", "--limit", host, check=False).output)
        assert f"{PKI}/etcd-server.crt: it expired at " in told
        assert "run the playbook isthmus.mesh.site" in told
        play("site", "--limit", "cloud")
        estate.converged()
    assert estate.lab.exec(host, ["systemctl", "show", "-P", "MainPID", "isthmus-etcd"]).stdout == pid
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
