# SPDX-License-Identifier: GPL-3.0-or-later
"""Keys of a cluster whose control plane is in it: made once, renewed by age, never shown; nobody is signed `root`."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from cryptography import x509
from isthmus_agent import in_cluster_pki, pki, revocation
from isthmus_agent.in_cluster_pki import AGENT, CA, ETCD, REGISTRAR, Outcome, Wanted, WantedError, settle
from isthmus_agent.pki import PkiError

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
YEAR = timedelta(days=365)


def wanted(**more: Any) -> Wanted:
    document: dict[str, Any] = {
        "schema": 1,
        "cluster": "managed",
        "dns": ["isthmus-etcd-client.isthmus-system.svc"],
        "ip": ["127.0.0.1", "10.98.0.7"],
        "peers": {},
        "certificates": {},
        "requests": [],
        "known_ca": None,
        "labels": {},
        **more,
    }
    return Wanted.from_json(json.dumps(document))


def first() -> Outcome:
    return settle(wanted(), {}, {}, NOW)


def again(before: Outcome, now: datetime = NOW, **more: Any) -> Outcome:
    return settle(wanted(**more), before.secrets, before.issued, now)


def about(outcome: Outcome, secret: str, name: str) -> dict[str, Any]:
    return pki.describe(outcome.secrets[secret][f"{name}.crt"])


def peer() -> tuple[pki.Authority, str]:
    key, certificate = pki.new_authority("onprem", NOW)
    return pki.Authority("onprem", key, certificate, "there", NOW), certificate.decode()


def test_from_nothing() -> None:
    found = first()
    assert sorted(found.secrets[ETCD]) == [
        "etcd-peer.crt", "etcd-peer.key", "etcd-server.crt", "etcd-server.key", "operator.crt", "operator.key",
        "revoked.crl", "root.crt", "root.key",
    ]  # fmt: skip
    assert sorted(found.secrets[AGENT]) == ["agent.crt", "agent.key"]
    assert sorted(found.secrets[REGISTRAR]) == ["registrar.crt", "registrar.key"]
    assert sorted(found.secrets[CA]) == ["ca.crt", "ca.key", "issued.json", "revoked.crl"]
    server = about(found, ETCD, "etcd-server")
    assert server["sans"] == ["isthmus-etcd-client.isthmus-system.svc", "10.98.0.7", "127.0.0.1"]
    names = {name: about(found, secret, name)["cn"] for secret, name, _cn, _usages in in_cluster_pki._OWN}
    assert names == {
        "etcd-server": "managed",
        "etcd-peer": "isthmus-etcd-peer",
        "root": "root",
        "operator": "isthmus-operator",
        "agent": "isthmus-agents",
        "registrar": "isthmus-registrar",
    }
    assert about(found, AGENT, "agent")["usages"] == ["client"]
    revocation.check_der(found.secrets[ETCD]["revoked.crl"], found.issued["ca"], "it")
    ledger = json.loads(found.secrets[CA]["issued.json"])
    assert ledger["since"] is None
    assert {one["cn"] for one in ledger["certificates"]} == set(names.values())


def test_what_is_good_stays_byte_for_byte() -> None:
    before = first()
    after = again(before, NOW + timedelta(days=10))
    assert after.secrets == before.secrets
    assert after.issued == before.issued
    assert after.told == []


def test_nothing_secret_is_in_what_is_public_or_told() -> None:
    _authority, ca = peer()
    found = again(first(), peers={"onprem": ca})
    public = json.dumps(found.issued) + "".join(found.told)
    assert "PRIVATE" not in public
    for files in found.secrets.values():
        for name, content in files.items():
            if name.endswith(".key"):
                assert content.decode().split("\n")[1] not in public


def test_certificates_are_renewed_by_age_and_when_names_change() -> None:
    before = first()
    late = again(before, NOW + YEAR * 0.7)
    for secret, name, _cn, _usages in in_cluster_pki._OWN:
        assert late.secrets[secret][f"{name}.key"] == before.secrets[secret][f"{name}.key"]
        assert late.secrets[secret][f"{name}.crt"] != before.secrets[secret][f"{name}.crt"]
    assert late.secrets[CA]["ca.key"] == before.secrets[CA]["ca.key"]
    exposed = again(before, ip=["127.0.0.1", "10.98.0.7", "198.18.6.200"])
    assert "198.18.6.200" in about(exposed, ETCD, "etcd-server")["sans"]
    assert exposed.secrets[AGENT] == before.secrets[AGENT]
    assert len(exposed.told) == 2  # etcd-server and etcd-peer


def test_it_says_when_the_first_certificate_is_to_be_renewed() -> None:
    def due(outcome: Outcome) -> datetime:
        return datetime.strptime(outcome.issued["renew"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)

    before = first()
    assert again(before, due(before)).told == [], "until then everything is good"
    late = again(before, due(before) + timedelta(seconds=1))
    assert {line.partition(":")[0] for line in late.told} == {
        f"Secret {secret}, {name}.crt" for secret, name, _cn, _usages in in_cluster_pki._OWN
    }
    assert due(late) > due(before) + YEAR * 0.6

    # One that is to be signed elsewhere counts until that was asked for.
    authority, ca = peer()
    asked = again(before, NOW + timedelta(days=10), peers={"onprem": ca})
    assert due(asked) == due(before)
    spec = in_cluster_pki._reader("peer-onprem", "onprem", "managed")
    given = authority.sign(spec, asked.issued["requests"]["onprem"]["csr"], NOW - YEAR * 0.5)
    done = again(asked, peers={"onprem": ca}, certificates={"onprem": given})
    assert due(done) < due(before)
    anew = again(done, due(done) + timedelta(seconds=1), peers={"onprem": ca})
    assert "less than a third" in anew.issued["requests"]["onprem"]["reason"]
    assert due(anew) == due(before)

    # What was signed for others' registrars counts too.
    requests = [{"cluster": "onprem", "host": "o1", "csr": request_of()}]
    signed = again(before, requests=requests)
    authority_only = {CA: signed.secrets[CA]}
    later = NOW + timedelta(days=100)
    assert due(settle(wanted(), authority_only, {}, later)) == due(before) + timedelta(days=100)
    assert due(settle(wanted(requests=requests), authority_only, signed.issued, later)) == due(before)


def test_keys_whose_secrets_were_deleted_are_made_anew_and_the_authority_stays() -> None:
    before = first()
    found = settle(wanted(known_ca=before.issued["ca"]), {CA: before.secrets[CA]}, before.issued, NOW)
    assert found.issued["ca"] == before.issued["ca"]
    for secret, name, _cn, _usages in in_cluster_pki._OWN:
        assert found.secrets[secret][f"{name}.key"] != before.secrets[secret][f"{name}.key"]
    assert again(found, known_ca=before.issued["ca"]).told == []


def test_a_lost_key_is_made_again_but_never_the_authoritys() -> None:
    before = first()
    damaged = {name: dict(files) for name, files in before.secrets.items()}
    damaged[AGENT]["agent.key"] = b"nonsense"
    del damaged[REGISTRAR]["registrar.key"]
    found = settle(wanted(), damaged, before.issued, NOW)
    assert pki.renewal_reason(
        pki.CertificateSpec.from_dict(
            {
                "name": "agent", "ca_cluster": "managed", "ca_host": "", "cn": "isthmus-agents", "sans_dns": [],
                "sans_ip": [], "usages": ["client"], "owner": "",
            }
        ),
        found.secrets[AGENT]["agent.key"],
        found.secrets[AGENT]["agent.crt"],
        before.issued["ca"],
        NOW,
    ) is None  # fmt: skip
    assert found.secrets[REGISTRAR]["registrar.key"]
    del damaged[CA]["ca.key"]
    with pytest.raises(PkiError, match="private key of cluster managed's certificate authority is missing"):
        settle(wanted(), damaged, before.issued, NOW)
    with pytest.raises(PkiError, match="the estate record shows that there was one"):
        settle(wanted(known_ca=before.issued["ca"]), {}, {}, NOW)


def test_our_registrar_asks_a_peers_authority_once() -> None:
    authority, ca = peer()
    asked = again(first(), peers={"onprem": ca})
    request = asked.issued["requests"]["onprem"]
    assert request["reason"] == "there is none yet"
    assert again(asked, peers={"onprem": ca}).issued["requests"] == asked.issued["requests"]  # the same, unsigned yet
    spec = in_cluster_pki._reader("peer-onprem", "onprem", "managed")
    given = authority.sign(spec, request["csr"], NOW)
    done = again(asked, peers={"onprem": ca}, certificates={"onprem": given})
    assert done.issued["requests"] == {}
    assert done.secrets[REGISTRAR]["peer-onprem.crt"].decode() == given
    assert about(done, REGISTRAR, "peer-onprem")["cn"] == "remote-managed"
    assert again(done, peers={"onprem": ca}).secrets == done.secrets  # also when it is not given again
    late = again(done, NOW + YEAR * 0.7, peers={"onprem": ca})
    assert "less than a third" in late.issued["requests"]["onprem"]["reason"]
    gone = again(done)
    assert sorted(gone.secrets[REGISTRAR]) == ["registrar.crt", "registrar.key"]


def test_a_certificate_that_does_not_fit_is_not_installed() -> None:
    authority, ca = peer()
    asked = again(first(), peers={"onprem": ca})
    csr = asked.issued["requests"]["onprem"]["csr"]
    root = pki.CertificateSpec("root", "onprem", "", "root", frozenset(), frozenset(), frozenset({"client"}), "")
    other, _ca = peer()
    spec = in_cluster_pki._reader("peer-onprem", "onprem", "managed")
    for wrong in (authority.sign(root, csr, NOW), other.sign(spec, csr, NOW), authority.sign(spec, request_of(), NOW)):
        found = again(asked, peers={"onprem": ca}, certificates={"onprem": wrong})
        assert "peer-onprem.crt" not in found.secrets[REGISTRAR]
        assert found.issued["requests"]["onprem"]["csr"] == csr


def request_of(name: str = "root") -> str:
    return pki.new_request(pki.new_key(), name, "it")


def test_peers_registrars_become_readers_whatever_they_ask_to_be_called() -> None:
    csr = request_of("root")
    request = {"cluster": "onprem", "host": "o1", "csr": csr}
    found = again(first(), requests=[request])
    (signed,) = found.issued["signed"]
    told = pki.describe(signed["certificate"].encode())
    assert (told["cn"], told["usages"]) == ("remote-onprem", ["client"])
    assert (signed["host"], signed["cluster"]) == ("o1", "onprem")
    ledger = json.loads(found.secrets[CA]["issued.json"])
    assert [one["cn"] for one in ledger["certificates"] if one["host"] == "o1"] == ["remote-onprem"]
    same = again(found, requests=[request])
    assert same.issued["signed"] == found.issued["signed"]
    assert same.secrets == found.secrets
    late = again(found, NOW + YEAR * 0.7, requests=[request])
    assert late.issued["signed"] != found.issued["signed"]
    # A request of before under another cluster's name is no way to that one's certificate.
    moved = again(found, requests=[{**request, "cluster": "cloud"}])
    assert pki.describe(moved.issued["signed"][0]["certificate"].encode())["cn"] == "remote-cloud"


def listed(outcome: Outcome) -> set[int]:
    """Serial numbers that etcd refuses."""
    return {entry.serial_number for entry in x509.load_der_x509_crl(outcome.secrets[ETCD]["revoked.crl"])}


def serial_of(certificate: str) -> int:
    return x509.load_pem_x509_certificate(certificate.encode()).serial_number


def test_what_lost_hosts_were_given_is_revoked_renewed_or_not_and_stays_so() -> None:
    def asks(*hosts: str) -> list[dict[str, str]]:
        return [{"cluster": "onprem", "host": host, "csr": csrs[host]} for host in hosts]

    csrs = {host: request_of() for host in ("o1", "o2")}
    before = again(first(), requests=asks("o1", "o2"))
    assert "revoked" not in before.issued
    assert listed(before) == set()
    renewed = again(before, NOW + YEAR * 0.7, requests=asks("o1", "o2"))
    of_o2 = {serial_of(one.issued["signed"][1]["certificate"]) for one in (before, renewed)}
    assert len(of_o2) == 2
    lost = {"revoked": {"hosts": ["o2"], "names": []}, "requests": asks("o1")}
    found = again(renewed, NOW + YEAR * 0.7, **lost)
    assert listed(found) == of_o2
    told = found.issued["revoked"]
    assert (told["hosts"], [one["host"] for one in told["certificates"]]) == (["o2"], ["o2", "o2"])
    assert sorted(line.partition(" (")[0] for line in found.told) == ["revoked: peer-managed of o2"] * 2
    same = again(found, NOW + YEAR * 0.7, **lost)
    assert (same.secrets, same.issued, same.told) == (found.secrets, found.issued, [])
    # It is joined anew, with a key of its own: what it has now is good, what it had stays refused.
    csrs["o2"] = request_of()
    back = again(found, NOW + YEAR * 0.7, requests=asks("o1", "o2"))
    assert listed(back) == of_o2
    assert serial_of(back.issued["signed"][1]["certificate"]) not in of_o2
    assert back.issued["revoked"]["list"] == told["list"]
    # The Secret of etcd is made anew with the list of before.
    anew = settle(wanted(known_ca=back.issued["ca"]), {CA: back.secrets[CA]}, back.issued, NOW + YEAR * 0.7)
    assert listed(anew) == of_o2
    # Another host is lost later; a whole cluster goes by its common name; our own certificates are nobody's.
    names = {"revoked": {"hosts": ["isthmus-agent-tls", "isthmus-etcd-tls"], "names": ["remote-onprem"]}}
    all_of_them = again(back, NOW + YEAR * 0.7, **names)
    readers = {int(one["serial"], 16) for one in ledger_of(all_of_them) if one["name"] == "peer-managed"}
    assert listed(all_of_them) == readers > of_o2


def ledger_of(outcome: Outcome) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(outcome.secrets[CA]["issued.json"])["certificates"]
    return found


@pytest.mark.parametrize("csr", ["", "nonsense"])
def test_a_request_that_cannot_be_read_is_refused(csr: str) -> None:
    with pytest.raises(PkiError, match="not readable"):
        again(first(), requests=[{"cluster": "onprem", "host": "o1", "csr": csr}])


def test_no_reader_of_the_own_cluster() -> None:
    with pytest.raises(PkiError, match="its own cluster"):
        again(first(), requests=[{"cluster": "managed", "host": "x", "csr": request_of()}])


@pytest.mark.parametrize("damage", [{"schema": 2}, {"cluster": None}, {"peers": [1]}, {"requests": [{"host": "h"}]}])
def test_what_is_wanted_is_read_strictly(damage: dict[str, Any]) -> None:
    with pytest.raises(WantedError):
        wanted(**damage)
