# SPDX-License-Identifier: GPL-3.0-or-later
"""pki_request -> pki_sign -> pki_install on directories that stand for hosts; openssl gives the second opinion."""

from __future__ import annotations

import concurrent.futures
import datetime
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import previous_release
import pytest
from integration.module_runner import ModuleFailed, run_module
from isthmus_agent import pki as signing


def certificate(name: str, cluster: str, **more: Any) -> dict[str, Any]:
    entry = {"name": name, "ca_cluster": cluster, "ca_host": f"{cluster}-1", "cn": name, "sans_dns": [], "sans_ip": []}
    return {**entry, "usages": ["client"], "owner": "root", **more}


def spec(host: str, cluster: str, peers: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the plan says for an etcd host, as far as the PKI is concerned."""
    sans = {"sans_dns": [host], "sans_ip": ["127.0.0.1", "198.18.1.11"]}
    certificates = [
        certificate("agent", cluster, cn=f"isthmus-agent-{host}"),
        certificate("etcd-server", cluster, cn=host, usages=["server"], **sans),
        certificate("etcd-peer", cluster, cn="isthmus-etcd-peer", usages=["server", "client"], **sans),
        certificate("root", cluster),
        *(certificate(f"peer-{peer}", peer, cn=f"remote-{cluster}") for peer in peers),
    ]
    authority = {"cluster": cluster, "host": f"{cluster}-1", "here": host == f"{cluster}-1"}
    return {"host": host, "pki": {"ca": authority, "certificates": certificates, "trust": [cluster, *peers]}}


class Estate:
    """Hosts as directories; does what roles/pki does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outputs: list[dict[str, Any]] = []
        self.replacing = ""

    def pki(self, host: str) -> Path:
        return self.root / host / "pki"

    def run(self, name: str, arguments: dict[str, Any], host: str, **how: Any) -> dict[str, Any]:
        self.pki(host).parent.mkdir(exist_ok=True)
        result = run_module(name, {**arguments, "directory": str(self.pki(host))}, **how)
        self.outputs.append(result)
        return result

    def role(
        self,
        wanted: dict[str, Any],
        trust: dict[str, str] | None = None,
        down: tuple[str, ...] = (),
        crl: str | None = None,
        **how: Any,
    ) -> dict[str, bool]:
        """Which modules changed something, as the recap would count it."""
        host, certificates = wanted["host"], wanted["pki"]["certificates"]
        asked = {"spec": wanted, "trust": trust or {}, "replacing": self.replacing}
        asked |= {} if crl is None else {"lists": {wanted["pki"]["ca"]["cluster"]: crl}}
        requested = self.run("pki_request", asked, host, **how)
        changed = {"pki_request": requested["changed"]}
        signed = []
        for group in requested["pending"]:
            if group["ca_host"] in down:
                signed.append({"unreachable": True, "msg": "no route", "pki_group": group})
                continue
            arguments = {"cluster": group["ca_cluster"], "certificates": certificates, "requests": group["requests"]}
            arguments["host"] = host
            if trust and group["ca_cluster"] in trust:
                arguments["known_ca"] = trust[group["ca_cluster"]]
            answer = self.run("pki_sign", arguments, group["ca_host"], **how)
            changed["pki_sign " + group["ca_cluster"]] = answer["changed"]
            signed.append({name: answer[name] for name in ("cluster", "ca_certificate", "crl", "certificates")})
        if requested["pending"]:
            installed = self.run("pki_install", {"spec": wanted, "signed": signed}, host, **how)
            changed["pki_install"] = installed["changed"]
        return changed

    def converge(self, wanted: dict[str, Any], **how: Any) -> None:
        """check -> apply -> apply -> check."""
        predicted = self.role(wanted, check=True, **how)
        assert self.role(wanted, **how) == predicted
        assert self.role(wanted, **how) == {"pki_request": False}
        assert self.role(wanted, check=True, **how) == {"pki_request": False}


@pytest.fixture
def estate(tmp_path: Path) -> Estate:
    return Estate(tmp_path)


def openssl(*arguments: object) -> str:
    return subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def secrets_of(root: Path) -> set[str]:
    """The two lines of every key file below ``root`` that hold the private number (the third is the public key)."""
    return {line for key in root.rglob("*.key") for line in key.read_text().splitlines()[1:3]}


def test_three_hosts_of_two_clusters_from_nothing(estate: Estate) -> None:
    wanted = [spec("onprem-1", "onprem", ("cloud",)), spec("onprem-2", "onprem", ("cloud",)), spec("cloud-1", "cloud")]
    for host in wanted:
        estate.converge(host)

    pki = estate.pki("onprem-2")
    for name in ("agent", "etcd-server", "etcd-peer", "root"):
        openssl("verify", "-x509_strict", "-CAfile", pki / "trust/onprem.crt", pki / f"{name}.crt")
        assert openssl("pkey", "-in", pki / f"{name}.key", "-pubout") == openssl(
            "x509", "-in", pki / f"{name}.crt", "-noout", "-pubkey"
        )
    openssl("verify", "-CAfile", pki / "trust/cloud.crt", pki / "peer-cloud.crt")
    assert "CN = remote-onprem\n" in openssl("x509", "-in", pki / "peer-cloud.crt", "-noout", "-subject")
    # Both hosts pin what is at the authority's place; only that place has the key.
    authority = (estate.pki("onprem-1") / "ca.crt").read_bytes()
    assert (pki / "trust/onprem.crt").read_bytes() == (estate.pki("onprem-1") / "trust/onprem.crt").read_bytes()
    assert (pki / "trust/onprem.crt").read_bytes() == authority
    assert not (pki / "ca.key").exists()
    assert not (estate.pki("cloud-1") / "trust/onprem.crt").exists()

    keys = list(estate.root.rglob("*.key"))
    assert len(keys) == 5 + 5 + 4 + 2
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    text = json.dumps(estate.outputs)
    assert not [line for line in secrets_of(estate.root) if line in text]
    assert "PRIVATE KEY" not in text


def test_a_bare_host_is_predicted_without_the_bundle(estate: Estate) -> None:
    wanted = spec("onprem-1", "onprem")
    predicted = estate.role(wanted, check=True, bundle=False)
    assert not estate.pki("onprem-1").exists()
    assert estate.role(wanted) == predicted
    with pytest.raises(ModuleFailed, match=r"isthmus\.mesh\.bundle"):
        estate.role(wanted, bundle=False)


def test_a_host_that_an_upgrade_has_not_reached_is_predicted(estate: Estate) -> None:
    wanted = spec("onprem-1", "onprem")
    estate.role(wanted)
    known = {"onprem": (estate.pki("onprem-1") / "ca.crt").read_text()}
    packages = previous_release.python_path()
    assert estate.role(wanted, known, check=True, packages=packages) == {"pki_request": False}


def test_hosts_that_ask_at_once_get_one_authority(estate: Estate) -> None:
    wanted = [spec(f"onprem-{number}", "onprem") for number in range(2, 6)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(estate.role, wanted))
    assert len({(estate.pki(host["host"]) / "trust/onprem.crt").read_bytes() for host in wanted}) == 1


def test_a_host_cannot_get_another_hosts_name(estate: Estate) -> None:
    wanted = spec("onprem-2", "onprem")
    group = estate.run("pki_request", {"spec": wanted}, "onprem-2")["pending"][0]
    arguments = {"cluster": "onprem", "host": "onprem-2", "certificates": wanted["pki"]["certificates"]}
    asked = [{"name": "isthmus-agent-onprem-1", "csr": group["requests"][0]["csr"]}]
    with pytest.raises(ModuleFailed, match="that the plan does not give to that host"):
        estate.run("pki_sign", {**arguments, "requests": asked}, "onprem-1")


@pytest.mark.parametrize("name", ["agent.key", "agent.crt", "trust/onprem.crt", "ca.crt"])
@pytest.mark.parametrize("damage", ["lost", "damaged"])
def test_a_lost_or_damaged_file_is_repaired(estate: Estate, name: str, damage: str) -> None:
    wanted = spec("onprem-1", "onprem")
    estate.role(wanted)
    authority = (estate.pki("onprem-1") / "ca.crt").read_bytes()
    path = estate.pki("onprem-1") / name
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:90] + b"\xff\x00")
    estate.converge(wanted)
    pki = estate.pki("onprem-1")
    assert (pki / "ca.crt").read_bytes() == authority == (pki / "trust/onprem.crt").read_bytes()
    openssl("verify", "-CAfile", pki / "trust/onprem.crt", pki / "agent.crt")
    assert stat.S_IMODE((pki / "agent.key").stat().st_mode) == 0o600


def files_of(pki: Path) -> set[str]:
    return {str(path.relative_to(pki)) for path in pki.rglob("*") if path.is_file() and path.name != ".ca.lock"}


def test_what_the_plan_does_not_name_any_more_goes(estate: Estate) -> None:
    """A host that had an etcd member and was a gateway, and one that had a peer; what others put there stays."""
    estate.role(spec("cloud-1", "cloud"))
    for host in ("onprem-1", "onprem-2"):
        former = spec(host, "onprem", ("cloud",))
        former["pki"]["certificates"] += [certificate("ipsec", "onprem")] if host == "onprem-2" else []
        estate.role(former)
    kept = {"company.crt", "company.key", "agent.p12"}
    for name in kept:
        (estate.pki("onprem-2") / name).write_text("x")
    worker = spec("onprem-2", "onprem")
    worker["pki"]["certificates"] = worker["pki"]["certificates"][:1]
    secrets = secrets_of(estate.root)
    estate.converge(worker)
    assert files_of(estate.pki("onprem-2")) == {*kept, "agent.key", "agent.crt", "trust/onprem.crt"}
    estate.converge(spec("onprem-1", "onprem"))
    names = ("agent", "etcd-server", "etcd-peer", "root", "ca")
    pairs = {f"{name}.{suffix}" for name in names for suffix in ("key", "crt")}
    assert files_of(estate.pki("onprem-1")) == {*pairs, "trust/onprem.crt", "issued.json"}
    text = json.dumps(estate.outputs)
    assert not [line for line in secrets if line in text]


def test_the_key_of_an_authority_is_never_removed(estate: Estate) -> None:
    """Not even where it has no business: nobody could make it again."""
    estate.role(spec("onprem-1", "onprem"))
    estate.role(spec("onprem-2", "onprem"))
    pki = estate.pki("onprem-2")
    for name in ("ca.key", "ca.crt"):
        shutil.copy(estate.pki("onprem-1") / name, pki)
    for _ in range(2):
        result = estate.run("pki_request", {"spec": spec("onprem-2", "onprem")}, "onprem-2")
        assert result["changed"] is False
        (warning,) = map(str, result["warnings"])
        assert f"{pki}/ca.key is the key of an authority" in warning
        assert "of cluster onprem belongs to onprem-1. It was left. Next: move it there" in warning
    (pki / "ca.key").unlink()
    estate.converge(spec("onprem-2", "onprem"))
    assert not (pki / "ca.crt").exists()


def test_a_member_keeps_its_keys_until_it_has_left(estate: Estate) -> None:
    """It needs them to leave; etcd_member removes them then."""
    estate.role(spec("onprem-1", "onprem"))
    estate.role(spec("onprem-2", "onprem"))
    worker = spec("onprem-2", "onprem")
    worker["pki"]["certificates"] = worker["pki"]["certificates"][:1]
    data = estate.root / "data"
    data.mkdir()
    before = files_of(estate.pki("onprem-2"))
    for member, expected in ((None, True), ({"name": "onprem-2"}, False)):
        arguments = {"spec": {**worker, "member": member}}
        result = estate.run("pki_request", arguments, "onprem-2", check=True, places={"etcd_unit.DATA": str(data)})
        assert result["former_member"] is expected
        assert result["changed"] is not expected
    estate.run("pki_request", {"spec": worker}, "onprem-2", places={"etcd_unit.DATA": str(data)})
    assert files_of(estate.pki("onprem-2")) == before


def test_a_readable_key_is_closed_again(estate: Estate) -> None:
    wanted = spec("onprem-1", "onprem")
    estate.role(wanted)
    for name in ("agent.key", "ca.key"):
        (estate.pki("onprem-1") / name).chmod(0o644)
    result = estate.run("pki_request", {"spec": wanted}, "onprem-1")
    assert sorted(item["before"] for item in result["diff"]) == ["root:root 0644\n"] * 2
    assert result["pending"] == []
    assert stat.S_IMODE((estate.pki("onprem-1") / "ca.key").stat().st_mode) == 0o600


def test_a_lost_ca_key_is_refused_and_never_made_again(estate: Estate) -> None:
    wanted = spec("onprem-1", "onprem")
    estate.role(wanted)
    (estate.pki("onprem-1") / "ca.key").unlink()
    for check in (True, False):
        with pytest.raises(ModuleFailed, match=r"ca\.key is not there.*Restore ca\.key.*backup"):
            estate.role(wanted, check=check)
    assert not (estate.pki("onprem-1") / "ca.key").exists()


def test_a_ca_host_that_was_reinstalled_is_refused_by_the_record(estate: Estate) -> None:
    wanted = spec("onprem-2", "onprem")
    estate.role(wanted)
    known = (estate.pki("onprem-2") / "trust/onprem.crt").read_text()
    shutil.rmtree(estate.pki("onprem-1"))
    (estate.pki("onprem-2") / "agent.crt").unlink()
    with pytest.raises(ModuleFailed, match="but the estate record shows that it was"):
        estate.role(wanted, trust={"onprem": known})
    # Without the record the pin on the asking host still holds.
    with pytest.raises(ModuleFailed, match="is not the authority that cluster onprem now signs with"):
        estate.role(wanted)


def test_the_record_gives_trust_and_never_replaces_it(estate: Estate) -> None:
    for cluster in ("cloud", "edge"):
        estate.role(spec(f"{cluster}-1", cluster))
    pems = {cluster: (estate.pki(f"{cluster}-1") / "ca.crt").read_text() for cluster in ("cloud", "edge")}
    wanted = spec("onprem-1", "onprem", ("cloud",))
    estate.converge(wanted, trust={"cloud": pems["cloud"]})
    with pytest.raises(ModuleFailed, match="given a new authority on purpose"):
        estate.role(wanted, trust={"cloud": pems["edge"]})


def test_an_unreachable_peer_leaves_the_rest_working(estate: Estate) -> None:
    wanted = spec("onprem-1", "onprem", ("cloud",))
    estate.role(wanted, down=("cloud-1",))
    installed = estate.outputs[-1]
    assert installed["still_pending"] == ["peer-cloud", "trust/cloud"]
    assert (estate.pki("onprem-1") / "root.crt").exists()
    estate.converge(wanted)
    assert (estate.pki("onprem-1") / "peer-cloud.crt").exists()


def test_a_peers_sick_authority_leaves_the_rest_working(estate: Estate) -> None:
    """As the role hands it on: the signing failed on the peer's host, and that is no failure of this one."""
    onprem = spec("onprem-1", "onprem", ("cloud",))
    estate.role(onprem, down=("cloud-1",))
    estate.converge(spec("cloud-1", "cloud"))
    (estate.pki("cloud-1") / "ca.key").unlink()
    requested = estate.run("pki_request", {"spec": onprem}, "onprem-1")
    (group,) = requested["pending"]
    arguments = {
        "cluster": "cloud",
        "host": "onprem-1",
        "certificates": onprem["pki"]["certificates"],
        "requests": group["requests"],
    }
    with pytest.raises(ModuleFailed) as refused:
        estate.run("pki_sign", arguments, "cloud-1")
    answer = {"failed": False, "msg": refused.value.msg, "pki_group": group}
    installed = estate.run("pki_install", {"spec": onprem, "signed": [answer]}, "onprem-1")
    assert not installed["changed"]
    assert installed["still_pending"] == ["peer-cloud", "trust/cloud"]
    assert "cloud-1: the private key of cluster cloud's certificate authority is missing" in str(installed["warnings"])


def test_a_new_host_is_predicted_while_the_authority_has_the_bundle(estate: Estate) -> None:
    estate.converge(spec("onprem-1", "onprem"))
    new = spec("onprem-2", "onprem")
    known = {"onprem": (estate.pki("onprem-1") / "ca.crt").read_text()}
    bare = {"check": True, "bundle": False}
    requested = estate.run("pki_request", {"spec": new, "trust": known}, "onprem-2", **bare)
    (group,) = requested["pending"]
    arguments = {
        "cluster": "onprem",
        "host": "onprem-2",
        "certificates": new["pki"]["certificates"],
        "requests": group["requests"],
    }
    answer = estate.run("pki_sign", arguments, "onprem-1", check=True)
    installed = estate.run("pki_install", {"spec": new, "signed": [answer]}, "onprem-2", **bare)
    assert installed["changed"]
    assert not (estate.pki("onprem-2") / "agent.crt").exists()


def test_without_its_own_authority_a_host_fails_with_words(estate: Estate) -> None:
    with pytest.raises(ModuleFailed, match=r"the authority of cluster onprem signed nothing \(onprem-1: no route\)"):
        estate.role(spec("onprem-2", "onprem"), down=("onprem-1",))


def revoked_of(pki: Path) -> str:
    return openssl("crl", "-inform", "DER", "-in", pki / "revoked.crl", "-noout", "-text")


def test_an_etcd_host_has_the_list_of_revoked_certificates(estate: Estate) -> None:
    hosts = [{**spec(f"onprem-{number}", "onprem"), "member": {"name": f"onprem-{number}"}} for number in (1, 2)]
    predicted = estate.role(hosts[0], check=True, bundle=False)
    assert estate.role(hosts[0]) == predicted
    for host in hosts:
        estate.role(host)
        assert "No Revoked Certificates" in revoked_of(estate.pki(host["host"]))
    place, pki = estate.pki("onprem-1"), estate.pki("onprem-2")
    ledger = json.loads((place / "issued.json").read_text())
    assert ledger["since"] is None
    assert {(one["host"], one["name"]) for one in ledger["certificates"]} == {
        (host, name) for host in ("onprem-1", "onprem-2") for name in ("agent", "etcd-server", "etcd-peer", "root")
    }
    serials = {one["serial"] for one in ledger["certificates"] if one["host"] == "onprem-2"}
    assert f"{int(openssl('x509', '-in', pki / 'root.crt', '-noout', '-serial').split('=')[1], 16):x}" in serials

    # Lost, it comes again; the record's is the one that counts.
    (pki / "revoked.crl").unlink()
    estate.converge(hosts[1])
    known = (place / "ca.crt").read_text()
    asked = {"cluster": "onprem", "hosts": ["onprem-2"], "known_ca": known}
    done = estate.run("pki_revoke", asked, "onprem-1")
    assert len(done["revoked"]) == len(serials) == 4
    recorded: dict[str, Any] = {"trust": {"onprem": known}, "crl": done["crl"]}
    assert estate.role(hosts[0], check=True, **recorded) == estate.role(hosts[0], **recorded) == {"pki_request": True}
    # The one whose certificates are in it, a removed host that is back, gets new ones of new keys.
    keys = {path: path.read_bytes() for path in pki.glob("*.key")}
    predicted = estate.role(hosts[1], check=True, **recorded)
    assert estate.role(hosts[1], **recorded) == predicted
    assert predicted == dict.fromkeys(("pki_request", "pki_sign onprem", "pki_install"), True)
    assert len(keys) == 4
    assert all(path.read_bytes() != key for path, key in keys.items())
    for host in hosts:
        assert estate.role(host, **recorded) == {"pki_request": False}
        listed = revoked_of(estate.pki(host["host"]))
        assert listed.count("Serial Number") == 4
        serial = openssl("x509", "-in", pki / "root.crt", "-noout", "-serial").split("=")[1].strip()
        assert serial not in listed

    (pki / "revoked.crl").write_bytes(b"x")
    with pytest.raises(ModuleFailed, match=r"revoked.crl is no readable list .* Remove it and run the playbook again"):
        estate.role(hosts[1])
    assert estate.role(hosts[1], **recorded) == {"pki_request": True}
    estate.role({**hosts[1], "member": None}, **recorded)
    assert not (pki / "revoked.crl").exists()


def test_an_authority_of_before_ledgers_says_since_when_it_has_one(estate: Estate) -> None:
    estate.role(spec("onprem-1", "onprem"))
    place = estate.pki("onprem-1")
    (place / "issued.json").unlink()
    asked = {"cluster": "onprem", "hosts": ["onprem-2"], "known_ca": (place / "ca.crt").read_text()}
    assert "since" in estate.run("pki_revoke", asked, "onprem-1")
    estate.role(spec("onprem-2", "onprem"))
    done = estate.run("pki_revoke", asked, "onprem-1")
    assert (len(done["revoked"]), "since" in done) == (4, True)
    (place / "ca.key").unlink()
    with pytest.raises(ModuleFailed, match="the private key of cluster onprem's certificate authority is missing"):
        estate.run("pki_revoke", asked, "onprem-1")


def test_an_operators_intermediate_is_used(estate: Estate, tmp_path: Path) -> None:
    pki = estate.pki("onprem-1")
    pki.mkdir(parents=True)
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "root.key", "-out",
            tmp_path / "root.crt", "-subj", "/CN=Corp", "-days", "30")  # fmt: skip
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", pki / "ca.key", "-out", tmp_path / "ca.csr",
            "-subj", "/CN=Corp mesh")  # fmt: skip
    (tmp_path / "extensions").write_text("basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=keyCertSign\n")

    def sign(days: str) -> None:
        openssl("x509", "-req", "-in", tmp_path / "ca.csr", "-CA", tmp_path / "root.crt", "-CAkey",
                tmp_path / "root.key", "-CAcreateserial", "-extfile", tmp_path / "extensions", "-days", days,
                "-out", pki / "ca.crt")  # fmt: skip

    sign("20")
    given = (pki / "ca.key").read_bytes()
    intermediate = (pki / "ca.crt").read_text()
    (pki / "ca.crt").write_text(intermediate + (tmp_path / "root.crt").read_text())
    estate.converge(spec("onprem-1", "onprem"))
    assert (pki / "ca.key").read_bytes() == given
    # The operator's root is not pinned: it may have signed other clusters' authorities too.
    pinned = openssl("x509", "-in", pki / "trust/onprem.crt", "-noout", "-fingerprint")
    assert (pki / "trust/onprem.crt").read_text().count("BEGIN") == 1
    (tmp_path / "intermediate.crt").write_text(intermediate)
    assert pinned == openssl("x509", "-in", tmp_path / "intermediate.crt", "-noout", "-fingerprint")
    openssl("verify", "-partial_chain", "-CAfile", pki / "trust/onprem.crt", pki / "agent.crt")

    # Renewed, it is pinned where something is signed; the record keeps the first one.
    sign("60")
    known = {"onprem": intermediate}
    (pki / "agent.crt").unlink()
    estate.converge(spec("onprem-1", "onprem"), trust=known)
    assert (pki / "trust/onprem.crt").read_text() == (pki / "ca.crt").read_text() != intermediate
    estate.role(spec("onprem-2", "onprem"), trust=known)
    assert estate.role(spec("onprem-2", "onprem"), trust=known) == {"pki_request": False}


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the owner of files")
def test_etcds_keys_belong_to_their_user(estate: Estate) -> None:
    wanted = spec("onprem-1", "onprem")
    wanted["pki"]["certificates"][1]["owner"] = "nobody"
    with pytest.raises(ModuleFailed, match="nobody:nobody, which does not exist"):
        # Debian's nobody has the group nogroup: the message names owner and group.
        estate.role(wanted)
    wanted["pki"]["certificates"][1]["owner"] = "daemon"
    estate.converge(wanted)
    assert (estate.pki("onprem-1") / "etcd-server.key").owner() == "daemon"


def fingerprints(path: Path) -> list[str]:
    """Of every certificate in a file."""
    blocks = path.read_text().split("-----END CERTIFICATE-----")[:-1]
    ends = (f"{block}-----END CERTIFICATE-----\n" for block in blocks)
    return [
        subprocess.run(
            ["openssl", "x509", "-noout", "-fingerprint", "-sha256"],
            input=one,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for one in ends
    ]


@pytest.mark.parametrize("revoked", [False, True])
@pytest.mark.parametrize("lost", [False, True])
def test_an_authority_is_replaced_while_everybody_trusts_what_is_in_use(
    estate: Estate, lost: bool, revoked: bool
) -> None:
    """By the steps of the playbook, host after host: at no time one uses a certificate that another does not trust.
    What was revoked stays so."""
    wanted = [{**spec("onprem-1", "onprem"), "member": {"name": "onprem-1"}}, spec("onprem-2", "onprem")]
    wanted.append({**spec("cloud-1", "cloud", ("onprem",)), "member": {"name": "cloud-1"}})
    for host in [*wanted, spec("onprem-9", "onprem")]:
        estate.role(host)
    ca, trusting = estate.pki("onprem-1"), [estate.pki(host["host"]) / "trust" / "onprem.crt" for host in wanted]
    old = (ca / "ca.crt").read_text()
    document: dict[str, Any] = {"name": "onprem", "revision": 7, "ca_certificate": old}
    if revoked:
        asked = {"cluster": "onprem", "hosts": ["onprem-9"], "known_ca": old}
        document["crl"] = estate.run("pki_revoke", asked, "onprem-1")["crl"]
    if lost:
        (ca / "ca.key").unlink()
        (ca / "ca.crt").unlink()
    used = [estate.pki("onprem-1") / "etcd-server.crt", estate.pki("cloud-1") / "peer-onprem.crt"]

    def step(name: str) -> bool:
        nonlocal document
        predicted = estate.run("pki_replace", {"step": name, "record": document}, "onprem-1", check=True)
        done = estate.run("pki_replace", {"step": name, "record": document}, "onprem-1")
        assert predicted["changed"] == done["changed"]
        document = done["document"]
        assert estate.run("pki_replace", {"step": name, "record": document}, "onprem-1")["document"] == document
        return bool(done["changed"])

    def role(replacing: str = "onprem") -> None:
        for host in wanted:
            trust = {"onprem": document["ca_certificate"]}
            estate.replacing = replacing
            estate.role(host, trust, crl=document.get("crl") if host["host"] == "onprem-1" else None)
            for certificate in used:
                for pinned in trusting:
                    openssl("verify", "-CAfile", pinned, certificate)
        assert revoked_of(ca).count("Serial Number") == (4 if revoked else 0)

    assert step("begin")
    assert document["revision"] == 8
    with pytest.raises(ModuleFailed, match=r"one more authority for cluster onprem .*isthmus_replace_authority=onprem"):
        role("")
    issued = [path.read_text() for path in used]
    role()
    assert [path.read_text() for path in used] == issued, "nothing is signed anew before everybody trusts both"
    assert step("sign")
    role()
    assert [path.read_text() for path in used] != issued
    assert step("end")
    role()
    assert document["revision"] == 10
    former = estate.root / "former.crt"
    former.write_text(issued[0])
    for pinned in trusting:
        assert fingerprints(pinned) == fingerprints(ca / "ca.crt")
        with pytest.raises(subprocess.CalledProcessError):
            openssl("verify", "-CAfile", pinned, former)
    assert old != (ca / "ca.crt").read_text()
    assert (ca / "ca.key.replaced").exists() is not lost
    for host in wanted:
        listed = document["crl"] if host["host"] == "onprem-1" else None
        assert estate.role(host, {"onprem": document["ca_certificate"]}, crl=listed) == {"pki_request": False}


def end(estate: Estate, cluster: str, hosts: list[dict[str, Any]]) -> str:
    """The same, some time later: the authority and what it signed have ended. Its certificate as everybody has it."""
    place = estate.pki(f"{cluster}-1")
    now = datetime.datetime.now(datetime.timezone.utc)
    then = now - signing.CA_LIFETIME - datetime.timedelta(days=1)
    key, certificate = signing.new_authority(cluster, then, (place / "ca.key").read_bytes())
    authority = signing.Authority(cluster, key, certificate, str(place), then)
    (place / "ca.crt").write_bytes(certificate)
    for host in hosts:
        directory = estate.pki(host["host"])
        if cluster in host["pki"]["trust"]:
            (directory / "trust" / f"{cluster}.crt").write_text(authority.pem)
        for entry in host["pki"]["certificates"]:
            if entry["ca_cluster"] == cluster:
                wanted = signing.CertificateSpec.from_dict(entry)
                request = signing.new_request((directory / f"{wanted.name}.key").read_bytes(), wanted.cn, wanted.name)
                (directory / f"{wanted.name}.crt").write_text(authority.sign(wanted, request, then))
    return authority.pem


def test_an_authority_that_has_ended_is_replaced_and_no_other_is_taken_for_it(estate: Estate) -> None:
    wanted = [{**spec("onprem-1", "onprem"), "member": {"name": "onprem-1"}}, spec("onprem-2", "onprem")]
    wanted.append({**spec("cloud-1", "cloud", ("onprem",)), "member": {"name": "cloud-1"}})
    for host in wanted:
        estate.role(host)
    old = end(estate, "onprem", wanted)
    document: dict[str, Any] = {"name": "onprem", "revision": 7, "ca_certificate": old}
    words = r"ca\.crt is valid from .*run isthmus\.mesh\.replace_authority"
    with pytest.raises(ModuleFailed, match=words):
        estate.role(wanted[0], {"onprem": old})
    requested = estate.run("pki_request", {"spec": wanted[1], "trust": {"onprem": old}}, "onprem-2")
    asked = {"cluster": "onprem", "host": "onprem-2", "certificates": wanted[1]["pki"]["certificates"]}
    asked |= {"requests": requested["pending"][0]["requests"], "known_ca": old}
    with pytest.raises(ModuleFailed, match=words):
        estate.run("pki_sign", asked, "onprem-1")

    pinned = estate.pki("onprem-2") / "trust/onprem.crt"
    other = signing.new_authority("onprem", datetime.datetime.now(datetime.timezone.utc))[1].decode()
    with pytest.raises(ModuleFailed, match="is not the authority that the estate record holds"):
        estate.role(wanted[1], {"onprem": other})
    with pytest.raises(ModuleFailed, match="one more authority for cluster onprem"):
        estate.role(wanted[1], {"onprem": old + other})
    answer = {"cluster": "onprem", "ca_certificate": other, "certificates": []}
    with pytest.raises(ModuleFailed, match="is not the authority that cluster onprem now signs with"):
        estate.run("pki_install", {"spec": wanted[1], "signed": [answer]}, "onprem-2")
    assert pinned.read_text() == old

    estate.replacing = "onprem"
    for step in ("begin", "sign", "end"):
        document = estate.run("pki_replace", {"step": step, "record": document}, "onprem-1")["document"]
        trust = {"onprem": document["ca_certificate"]}
        for host in wanted:
            done = estate.role(host, trust, crl=document.get("crl") if host["host"] == "onprem-1" else None)
            assert ("pki_sign onprem" in done) is (step == "begin"), "nothing is in use that could go on meanwhile"
            listed = document.get("crl") if host["host"] == "onprem-1" else None
            assert estate.role(host, trust, crl=listed) == {"pki_request": False}
        for used in (estate.pki("onprem-1") / "etcd-server.crt", estate.pki("cloud-1") / "peer-onprem.crt"):
            openssl("verify", "-CAfile", pinned, used)
    assert fingerprints(pinned) == fingerprints(estate.pki("onprem-1") / "ca.crt")
    assert old not in pinned.read_text()


@pytest.mark.parametrize("lost", [False, True])
def test_a_replacement_that_ended_before_the_record_was_written_goes_on(estate: Estate, lost: bool) -> None:
    wanted = spec("onprem-1", "onprem")
    estate.role(wanted)
    ca = estate.pki("onprem-1")
    document = {"name": "onprem", "revision": 7, "ca_certificate": (ca / "ca.crt").read_text()}
    if lost:
        (ca / "ca.key").unlink()
    begun = estate.run("pki_replace", {"step": "begin", "record": document}, "onprem-1")["document"]
    again = r"replace_authority ended early \(.*run it again with -e isthmus_replace_authority=onprem"
    with pytest.raises(ModuleFailed, match=again):
        estate.role(wanted, {"onprem": document["ca_certificate"]})
    assert estate.run("pki_replace", {"step": "begin", "record": document}, "onprem-1")["document"] == begun
    estate.replacing = "onprem"
    assert estate.role(wanted, {"onprem": begun["ca_certificate"]}) == {"pki_request": True}


def test_a_host_that_encrypts_has_a_key_of_wireguard_which_stays_and_goes_with_the_plan(estate: Estate) -> None:
    wanted = {**spec("onprem-1", "onprem"), "wireguard": {"key": "/etc/isthmus/pki/wireguard.key", "port": 51871}}
    path = estate.pki("onprem-1") / "wireguard.key"
    predicted = estate.role(wanted, check=True)
    assert not path.exists()
    assert estate.role(wanted) == predicted
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = path.read_text()
    public = subprocess.run(["wg", "pubkey"], input=key, check=True, capture_output=True, text=True).stdout
    assert len(public) == 45, "wg takes it"
    estate.converge(wanted)
    path.chmod(0o644)
    assert estate.role(wanted)["pki_request"]
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (key, 0o600)
    path.write_text("damaged\n")
    estate.converge(wanted)
    assert path.read_text() != "damaged\n"
    assert key.strip() not in json.dumps(estate.outputs)
    estate.converge(spec("onprem-1", "onprem"))
    assert not path.exists()
