#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for every module of the collection that works on a host: writes down that it ran, and does what the files in
$FAKE_PLACE say. The host's name is in $FAKE_HOST; what it is called is in NAME."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from fake_module import Module

NAME = "verify"
PLACE = Path(os.environ["FAKE_PLACE"])
HOST = os.environ["FAKE_HOST"]
OPTIONS = (
    "absent_services archive before before_agent bgp break_lock bundle_digest certificates cluster confirm context "
    "controller_time crl estate firewall formed former host hosts install keys known_ca kubeconfig listed lists lock "
    "max_clock_skew names only own passwords paths platforms python record registrars replacing requests run scope "
    "secrets seen services signed snapshot spec state step timeout token trust version wait"
)


TOLD = (
    *("bundle_digest", "scope", "before", "wait", "state", "step", "cluster", "kubeconfig", "registrars", "seen"),
    *("signed", "secrets", "hosts", "keys", "before_agent"),
)
"""Options that are written down with a call."""


def estate_record(module: Module, given: dict[str, Any]) -> dict[str, Any]:
    """One record for all clusters; a lock for each."""
    record, lock = PLACE / "record", PLACE / "locks" / given["cluster"]
    if given["state"] == "released":
        lock.unlink(missing_ok=True)
        return {}
    if given["state"] == "read":
        lock.touch()
        found = {"cluster": given["cluster"], "documents": json.loads(record.read_text())} if record.exists() else None
        return {"locked": True, **({"record": found} if found else {})}
    if (PLACE / "fail" / "estate_record").exists():
        module.fail_json(msg="somebody else wrote the record")
    documents = given["record"]
    for cluster in given["formed"] or []:
        own = documents[f"clusters/{cluster}"]
        own["ca_certificate"] = own["ca_certificate"] or "-----BEGIN CERTIFICATE-----"
    changed = not record.exists() or json.loads(record.read_text()) != documents
    if not module.check_mode:
        record.write_text(json.dumps(documents))
    own = f"clusters/{given['cluster']}"
    answer = {"cluster": given["cluster"], "documents": documents, "own": {own: documents[own]}}
    return {"changed": changed, "locked": True, "record": answer}


def node(module: Module, given: dict[str, Any]) -> dict[str, Any]:
    path = PLACE / "hosts" / HOST / "node.json"
    for stage in set(given["spec"].get("wireguard", {}).get("changing", {}).values()):
        if (PLACE / "fail" / f"node {HOST} {stage}").exists():
            module.fail_json(msg=f"{HOST} fails at the step {stage}")
    changed = not path.exists() or json.loads(path.read_text()) != given["spec"]
    if changed and not module.check_mode:
        path.write_text(json.dumps(given["spec"]))
    return {"changed": changed, "standing": {"services": ["shop/web"]}}


def wireguard_keys(module: Module, given: dict[str, Any]) -> dict[str, Any]:
    """A host's keys are the lines of a file there; in check mode none is made."""
    path = PLACE / "hosts" / HOST / "keys"
    known = json.loads(path.read_text()) if path.exists() else {}
    first = given["spec"]["wireguard"]
    ports = [str(tunnel["port"]) for tunnel in (first, first.get("second")) if tunnel]
    wanted = {port: base64.b64encode(f"{HOST} {port}".encode().ljust(32, b".")).decode() for port in ports}
    found = {port: known.get(port, key) for port, key in wanted.items()}
    if module.check_mode:
        found = {port: key for port, key in found.items() if port in known}
    else:
        path.write_text(json.dumps(found))
    return {"changed": any(port not in known for port in ports), "public_keys": found}


def installed(spec: dict[str, Any]) -> dict[str, Any]:
    """Whose specification and which public keys are on the host."""
    place = PLACE / "hosts" / HOST
    known = json.loads((place / "keys").read_text()) if (place / "keys").exists() else {}
    first = spec.get("wireguard", {})
    tunnels = [one for one in (first, first.get("second")) if one]
    return {
        "installed": json.loads((place / "node.json").read_text())["host"] if (place / "node.json").exists() else None,
        "public_keys": {one["key"]: known[str(one["port"])] for one in tunnels if str(one["port"]) in known},
    }


def unreached(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Whom the host is asked for and does not reach natively: "FROM TO" in the file `cut`, "FROM TO unsure" when it
    does not through the tunnel either. Sites are named as clusters."""
    lines = (PLACE / "cut").read_text().splitlines() if (PLACE / "cut").exists() else []
    cut = {to: rest for start, to, *rest in map(str.split, lines) if start == HOST}
    return [
        {"cluster": one["cluster"], "name": one["name"], "site": one["cluster"], "why": "no answer", "sure": not rest}
        for one in given["hosts"] or ()
        if (rest := cut.get(one["name"])) is not None
    ]


def bgp(module: Module, given: dict[str, Any]) -> dict[str, Any]:
    path = PLACE / "hosts" / HOST / "frr"
    before = path.read_text() if path.exists() else None
    after = None if given["state"] == "absent" else json.dumps([given["own"], given["passwords"]])
    if not module.check_mode and after is not None:
        path.write_text(after)
    elif not module.check_mode:
        path.unlink(missing_ok=True)
    return {"changed": before != after}


def to_sign(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Hosts of cluster a, whose authority is at a1, want new certificates when there is a file `signs`."""
    if NAME != "pki_request" or given["spec"]["cluster"]["name"] != "a" or not (PLACE / "signs").exists():
        return []
    return [{"ca_cluster": "a", "ca_host": "a1", "requests": [{"name": "agent", "csr": "CSR"}]}]


def pki_replace(given: dict[str, Any]) -> dict[str, Any]:
    """Authorities are the lines of what stands for their certificates."""
    known, document = given["record"]["ca_certificate"].splitlines(), given["record"]
    trusted = {"begin": [*known, "NEW"], "sign": ["NEW", *known], "end": ["NEW"]}[given["step"]]
    after = known if given["step"] == "begin" and "NEW" in known else list(dict.fromkeys(trusted))
    document |= {"ca_certificate": "\n".join(after), "revision": document["revision"] + (after != known)}
    return {"changed": after != known, "document": document}


def kubernetes(given: dict[str, Any]) -> dict[str, Any]:
    """What the modules of a Kubernetes cluster answer; `away` is a file while its API is, `pods` one with the ranges of
    its nodes."""
    path = PLACE / "hosts" / HOST / "kubernetes.crt"
    if NAME == "preflight":
        here = "kubernetes" in given["spec"]["cluster"]
        return {
            "packages": [],
            "bgp": (PLACE / "hosts" / HOST / "frr").exists(),
            "kubernetes": {"host": HOST, "addresses": [], "credential": path.exists()} if here else None,
            **installed(given["spec"]),
        }
    if NAME == "kubernetes_credential" and given["signed"]:
        path.write_text(given["signed"]["certificates"][HOST])
        return {"changed": True}
    if NAME == "kubernetes_credential":
        reason = None if path.exists() else "there is none yet"
        return {"credential": {"host": HOST, "csr": "CSR", "reason": reason, "ca": None if reason else "CA"}}
    pending = "https://api does not answer" if (PLACE / "away").exists() else ""
    if NAME == "kubernetes_probe":
        dealt = (PLACE / "pods").read_text() if (PLACE / "pods").exists() and not pending else "{}"
        return {"pending": pending, "problems": [], "pods": json.loads(dealt)}
    if given["state"] == "absent":
        return {"pending": pending, "removed": [] if pending else ["clusterrole/isthmus-registrar"]}
    if pending:
        return {"pending": pending, "certificates": {}}
    due = [one["host"] for one in given["registrars"] if one["reason"]]
    return {"changed": bool(due), "pending": "", "ca": "CA", "certificates": dict.fromkeys(due, "CERTIFICATE")}


def main() -> None:
    module = Module(OPTIONS.split())
    given = module.params
    # "MODULE WHERE WHO": when that module runs there, that host falls silent.
    for line in (PLACE / "silence").read_text().splitlines() if (PLACE / "silence").exists() else []:
        name, where, who = line.split()
        if (name, where) == (NAME, HOST):
            (PLACE / "silent" / who).touch()
    with (PLACE / "calls").open("a") as file:
        told = {name: given[name] for name in TOLD if given[name] is not None}
        file.write(json.dumps({"module": NAME, "host": HOST, "check": module.check_mode, **told}) + "\n")
    if (PLACE / "fail" / f"{NAME} {HOST}").exists():
        module.fail_json(msg=f"{NAME} fails on {HOST}\nwith a second line")
    if (PLACE / "fail" / f"{NAME} {HOST} {given['scope']}").exists():
        module.fail_json(msg=f"{HOST} has no way", problems=["no way"])
    answers: dict[str, Any] = {
        "verify": {"problems": []},
        "preflight": {"packages": ["dnsmasq"] if (PLACE / "fail" / f"packages {HOST}").exists() else []},
        "bundle": {"digest": "0"},
        "pki_request": {"pending": to_sign(given), "former_member": False},
        "pki_sign": {"changed": True, "certificates": {"agent": "CERTIFICATE"}},
        "etcd_member": {"action": "none"},
        "ipsec": {"unproven": ["a tunnel"] if (PLACE / "unproven" / HOST).exists() else []},
        "pki_revoke": {"cluster": given["cluster"], "crl": "LIST", "revoked": []},
    }
    if given["install"]:
        module.fail_json(msg="there is no such package")
    if (PLACE / "fail" / f"{NAME} {HOST} {given['keys']}").exists():
        module.fail_json(msg=f"{HOST} has another pre-shared key")
    if NAME == "estate_record":
        answers[NAME] = estate_record(module, given)
    elif NAME.startswith("kubernetes") or (NAME == "preflight" and not answers[NAME]["packages"]):
        answers[NAME] = kubernetes(given)
    elif NAME == "bgp":
        answers[NAME] = bgp(module, given)
    elif NAME == "node":
        answers[NAME] = node(module, given)
    elif NAME == "pki_replace":
        answers[NAME] = pki_replace(given)
    elif NAME == "wireguard_keys":
        answers[NAME] = wireguard_keys(module, given)
    elif NAME == "verify":
        answers[NAME]["unreached"] = unreached(given)
    module.exit_json(**{"changed": False, **answers.get(NAME, {})})


if __name__ == "__main__":
    main()
