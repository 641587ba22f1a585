# SPDX-License-Identifier: GPL-3.0-or-later
"""The keys and certificates of a cluster whose control plane is in it. Pure, as `pki`: what there is in, what is to be
there out.

Keys are made inside the cluster, by a Job, and stand in Secrets. What leaves it is public: its authority's certificate,
requests of its registrar for peers' authorities, certificates for peers' registrars. What the Job signs for others is a
reader's certificate whose name comes from the cluster that asks, whatever a request says: whoever may write the
ConfigMap of requests cannot have `root` signed by it.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus_mesh import jsontext
from isthmus_mesh.jsontext import UINT16, Fields

from isthmus_agent import pki, revocation
from isthmus_agent.etcd_admin import AGENTS_USER, REMOTE_USER

SCHEMA = 1
CA, ETCD, AGENT, REGISTRAR = "isthmus-ca", "isthmus-etcd-tls", "isthmus-agent-tls", "isthmus-registrar-tls"
SECRETS = (CA, ETCD, AGENT, REGISTRAR)
"""In the order of writing: what was signed is in the authority's ledger before anybody has it."""
CRL = "revoked.crl"
DIRECTORY = f"Secret {CA}"

_OWN = (
    # Secret, name of the files, CN (None: the cluster's), usages
    (ETCD, "etcd-server", None, ("server",)),
    (ETCD, "etcd-peer", "isthmus-etcd-peer", ("server", "client")),
    (ETCD, "root", "root", ("client",)),
    (ETCD, "operator", "isthmus-operator", ("client",)),
    (AGENT, "agent", AGENTS_USER, ("client",)),
    (REGISTRAR, "registrar", "isthmus-registrar", ("client",)),
)


class WantedError(ValueError):
    """What is wanted cannot be read; the text says which field and why."""


@dataclass(frozen=True, slots=True)
class Request:
    """The registrar on `host` of the cluster `cluster` wants to read this etcd."""

    cluster: str
    host: str
    csr: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the controller asks for. `dns` and `ip` are the names and addresses of the etcd. `peers`: clusters that this
    cluster's registrar reads, with the certificates of their authorities, and in `certificates` what these signed for
    it. `known_ca`: the authority's certificate as the record has it. `labels` are those of our objects. What readers on
    the hosts `revoked_hosts`, or of the common names `revoked_names`, were given is refused."""

    cluster: str
    dns: tuple[str, ...]
    ip: tuple[str, ...]
    peers: Mapping[str, str]
    certificates: Mapping[str, str]
    requests: tuple[Request, ...]
    known_ca: str | None
    labels: Mapping[str, str]
    digest: str
    revoked_hosts: tuple[str, ...] = ()
    revoked_names: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, text: str | bytes) -> Wanted:
        """Strictly. WantedError."""
        document = jsontext.loads(text, WantedError)
        fields = Fields(document, WantedError)
        if (schema := fields.integer("schema", UINT16, default=None)) != SCHEMA:
            raise WantedError(f"schema {schema} is not {SCHEMA}, the one that this version reads")
        revoked = Fields(document.get("revoked") or {}, WantedError, "revoked")
        return cls(
            cluster=fields.text("cluster", None),
            dns=fields.texts("dns"),
            ip=fields.texts("ip"),
            peers=fields.text_mapping("peers"),
            certificates=fields.text_mapping("certificates"),
            requests=tuple(
                Request(one.text("cluster", None), one.text("host", None), one.text("csr", None))
                for one in fields.objects("requests")
            ),
            known_ca=fields.optional_text("known_ca"),
            labels=fields.text_mapping("labels"),
            digest=hashlib.sha256(jsontext.canonical(document).encode()).hexdigest(),
            revoked_hosts=revoked.texts("hosts"),
            revoked_names=revoked.texts("names"),
        )


Files = dict[str, bytes]


@dataclass(slots=True)
class Outcome:
    """`secrets` by name: their whole content. `issued`: the public document. `told`: what was made and why."""

    secrets: dict[str, Files]
    issued: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


def settle(
    wanted: Wanted, found: Mapping[str, Mapping[str, bytes]], issued: Mapping[str, Any], now: datetime.datetime
) -> Outcome:
    """`found`: the content of the Secrets that there are; `issued`: the public document of the last time. What is good
    stays as it is. PkiError when an authority that was once there lacks, or when something must not be signed."""
    outcome = Outcome({name: dict(found.get(name, {})) for name in SECRETS})
    files = outcome.secrets[CA]
    evidence = {} if wanted.known_ca is None else {"the estate record": wanted.known_ca}
    key, certificate = files.get("ca.key"), files.get("ca.crt")
    if key is None and (evidence or certificate is not None):
        raise pki.PkiError(
            f"the private key of cluster {wanted.cluster}'s certificate authority is missing: {DIRECTORY} has no "
            f"ca.key, but {'the estate record' if evidence else 'its ca.crt'} shows that there was one, which the mesh "
            f"trusts. It is never made again by itself. Next: put the Secret {CA} back from a backup of the "
            f"cluster's Secrets; without one, take the cluster out of the mesh (state: absent in the inventory, run "
            "isthmus.mesh.site), and join it anew"
        )
    made = pki.establish_authority(wanted.cluster, key, certificate, evidence, DIRECTORY, now)
    authority = made.authority
    if made.write_certificate is not None:
        files["ca.key"], files["ca.crt"] = made.write_key or files["ca.key"], made.write_certificate
        outcome.told.append(f"authority of cluster {wanted.cluster}: made" if made.write_key else "ca.crt: restored")
    where = f"{DIRECTORY}, {revocation.LEDGER}"
    ledger = revocation.Ledger.read(files.get(revocation.LEDGER), where, now, new=not evidence)
    signer = _Signer(authority, ledger, now)
    for secret, name, cn, usages in _OWN:
        server = "server" in usages
        spec = pki.CertificateSpec.from_dict(
            {
                "name": name,
                "ca_cluster": wanted.cluster,
                "ca_host": "",
                "cn": cn or wanted.cluster,
                "sans_dns": wanted.dns if server else (),
                "sans_ip": wanted.ip if server else (),
                "usages": usages,
                "owner": "",
            }
        )
        _ensure(outcome, secret, spec, signer)
    requests = _peers(outcome, wanted, issued, now)
    signed = _sign_for_peers(outcome, wanted, issued, signer)
    revoked = _revoke(outcome, wanted, signer)
    if signer.ledger is not ledger or revocation.LEDGER not in files:
        files[revocation.LEDGER] = signer.ledger.text(now).encode()
    outcome.issued = {
        "schema": SCHEMA,
        "wanted": wanted.digest,
        "ca": authority.pem,
        "requests": requests,
        "certificates": {
            name[len("peer-") : -len(".crt")]: content.decode()
            for name, content in sorted(outcome.secrets[REGISTRAR].items())
            if name.startswith("peer-") and name.endswith(".crt")
        },
        "signed": signed,
        "renew": _renewal(outcome, requests, signed),
        **({"revoked": revoked} if revoked else {}),
    }
    return outcome


def _renewal(outcome: Outcome, requests: Mapping[str, Any], signed: Iterable[Mapping[str, str]]) -> str:
    """When the first certificate is to be renewed (RFC 3339), of those that nobody else has been asked to sign yet."""
    asked = {f"peer-{peer}.crt" for peer in requests}
    found = [
        content
        for secret in SECRETS[1:]
        for name, content in outcome.secrets[secret].items()
        if name.endswith(".crt") and name not in asked
    ]
    found += [one["certificate"].encode() for one in signed]
    return min(map(pki.renewal_time, found)).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Signer:
    def __init__(self, authority: pki.Authority, ledger: revocation.Ledger, now: datetime.datetime) -> None:
        self.authority = authority
        self.ledger = ledger
        self.now = now

    def sign(self, spec: pki.CertificateSpec, csr: str, host: str) -> str:
        certificate = self.authority.sign(spec, csr, self.now)
        self.ledger = self.ledger.with_certificate(certificate, host, spec.name)
        return certificate


def _ensure(outcome: Outcome, secret: str, spec: pki.CertificateSpec, signer: _Signer) -> None:
    """Key and certificate of our own."""
    files, place = outcome.secrets[secret], f"Secret {secret}, {spec.name}"
    key = _key(files, spec.name, outcome.told, place)
    why = pki.renewal_reason(spec, key, files.get(f"{spec.name}.crt"), signer.authority.pem, signer.now)
    if why is not None:
        csr = pki.new_request(key, spec.cn, place)
        files[f"{spec.name}.crt"] = signer.sign(spec, csr, secret).encode()
        outcome.told.append(f"{place}.crt: signed, because {why}")


def _key(files: Files, name: str, told: list[str], place: str) -> bytes:
    key = files.get(f"{name}.key")
    if key is not None:
        try:
            pki.load_key(key, f"{place}.key")
        except pki.PkiError:
            key = None
    if key is None:
        key = files[f"{name}.key"] = pki.new_key()
        told.append(f"{place}.key: new")
    return key


def _revoke(outcome: Outcome, wanted: Wanted, signer: _Signer) -> dict[str, Any]:
    """The list of revoked certificates, from the first start on: etcd takes one up only when it starts with one. What
    counts stands beside the authority's key; the Secret of etcd may be made anew. Of readers only: a host may be called
    as one of our Secrets. Returns what is public of it; empty while there is nothing to tell."""
    where = f"{DIRECTORY}, {CRL}"
    files, authority = outcome.secrets[CA], signer.authority
    known = files[CRL].decode("ascii", "replace") if CRL in files else None
    doomed = [
        one
        for one in signer.ledger.of(wanted.revoked_hosts, wanted.revoked_names)
        if one.name == f"peer-{wanted.cluster}"
    ]
    done = revocation.revoke(authority, doomed, known, authority.pem, where, signer.now)
    outcome.told += [f"revoked: {one.words}" for one in done.revoked]
    files[CRL] = done.crl.encode()
    outcome.secrets[ETCD][CRL] = revocation.to_der(done.crl, authority.pem, where)
    serials = {f"{entry.serial_number:x}" for entry in revocation.load_list(done.crl, authority.pem, where)}
    if not serials and not wanted.revoked_hosts and not wanted.revoked_names:
        return {}
    return {
        "hosts": sorted(wanted.revoked_hosts),
        "names": sorted(wanted.revoked_names),
        "certificates": [
            {"host": one.host, "words": one.words} for one in signer.ledger.issued if one.serial in serials
        ],
        "list": _digest(" ".join(sorted(serials)))[:16] if serials else "",
    }


def _peers(
    outcome: Outcome, wanted: Wanted, issued: Mapping[str, Any], now: datetime.datetime
) -> dict[str, dict[str, str]]:
    """The registrar's keys and certificates for peers; requests for those that are to be signed, with the reason."""
    files, before = outcome.secrets[REGISTRAR], issued.get("requests", {})
    requests = {}
    for peer, ca in sorted(wanted.peers.items()):
        name, place = f"peer-{peer}", f"Secret {REGISTRAR}, peer-{peer}"
        key = _key(files, name, outcome.told, place)
        spec = _reader(name, peer, wanted.cluster)
        given = wanted.certificates.get(peer)
        if given is not None and given.encode() != files.get(f"{name}.crt"):
            why = pki.renewal_reason(spec, key, given.encode(), ca, now)
            if why is None:
                files[f"{name}.crt"] = given.encode()
                outcome.told.append(f"{place}.crt: installed")
        why = pki.renewal_reason(spec, key, files.get(f"{name}.crt"), ca, now)
        if why is not None:
            known = before.get(peer, {}).get("csr", "")
            csr = known if _is_of(known, key) else pki.new_request(key, spec.cn, place)
            requests[peer] = {"csr": csr, "reason": why}
    for name in [name for name in files if name.startswith("peer-") and name[5:-4] not in wanted.peers]:
        del files[name]
        outcome.told.append(f"Secret {REGISTRAR}, {name}: removed, it is of no peer")
    return requests


def _sign_for_peers(
    outcome: Outcome, wanted: Wanted, issued: Mapping[str, Any], signer: _Signer
) -> list[dict[str, str]]:
    """Certificates for readers. One that was signed before for the same request is given again while it is good."""
    before = {_digest(one["csr"]): one for one in issued.get("signed", ())}
    found = []
    for request in wanted.requests:
        if request.cluster == wanted.cluster:
            raise pki.PkiError(f"a request of {request.host} is for a reader of its own cluster {wanted.cluster}")
        spec = _reader(f"peer-{wanted.cluster}", wanted.cluster, request.cluster)
        known = before.get(_digest(request.csr))
        certificate = None if known is None else known["certificate"]
        if certificate is None or pki.resigning_reason(certificate, signer.authority.pem, spec.cn, signer.now):
            certificate = signer.sign(spec, request.csr, request.host)
            outcome.told.append(f"certificate of {request.host} (CN={spec.cn}): signed")
        found.append({"cluster": request.cluster, "host": request.host, "csr": request.csr, "certificate": certificate})
    return found


def _reader(name: str, of: str, reader: str) -> pki.CertificateSpec:
    """The certificate by which the registrar of cluster `reader` reads the etcd of cluster `of`."""
    return pki.CertificateSpec.from_dict(
        {
            "name": name,
            "ca_cluster": of,
            "ca_host": "",
            "cn": f"{REMOTE_USER}{reader}",
            "sans_dns": (),
            "sans_ip": (),
            "usages": ("client",),
            "owner": "",
        }
    )


def _is_of(csr: str, key: bytes) -> bool:
    """Whether a request is for this key."""
    try:
        return pki.request_public_der(csr) == pki.public_der(key, "the key")
    except (pki.PkiError, ValueError):
        return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
