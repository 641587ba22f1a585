#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for modules that a cluster whose control plane is in it has to do with, as `fake_modules.py` does. Its PKI
answers what it is asked with words instead of certificates."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fake_module import Module

NAME = "kubernetes_install"
PLACE = Path(os.environ["FAKE_PLACE"])
HOST = os.environ["FAKE_HOST"]
OPTIONS = (
    "certificates cluster context directory host install kubeconfig known_ca lists patience phase replacing requests "
    "signed spec state targets timeout trust wait waited wanted"
)
CA = "-----BEGIN CERTIFICATE-----"
"""Of every cluster, as fake_modules.py has it in the record."""
EXPOSED = {
    "endpoints": ["https://192.0.9.200:2379"],
    "addresses": ["192.0.9.200"],
    "names": [],
    "cluster_ip": "10.98.0.7",
    "nodes": [],
}


def pki(module: Module, wanted: dict[str, Any]) -> dict[str, Any]:
    path = PLACE / "issued"
    issued = json.loads(path.read_text()) if path.exists() else {}
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    changed = issued.get("wanted") != digest
    if changed and not module.check_mode:
        due = [peer for peer in wanted["peers"] if peer not in wanted["certificates"]]
        issued = {
            "wanted": digest,
            "ca": CA,
            "requests": {peer: {"csr": f"m asks {peer}", "reason": "there is none yet"} for peer in due},
            "certificates": wanted["certificates"],
            "signed": [{**one, "certificate": f"m signed {one['csr']}"} for one in wanted["requests"]],
        }
        if "revoked" in wanted:
            had = [{"host": host, "words": f"peer-m of {host}"} for host in wanted["revoked"]["hosts"]]
            issued["revoked"] = {**wanted["revoked"], "certificates": had, "list": "of them"}
        path.write_text(json.dumps(issued))
    return {"changed": changed, "issued": issued}


def kubernetes_install(module: Module, given: dict[str, Any]) -> dict[str, Any]:
    if given["state"] == "absent":
        return {"changed": True, "unfinished": "", "removed": ["namespace/isthmus-system"]}
    if given["phase"] == "pki":
        return pki(module, given["wanted"])
    done = PLACE / f"phase-{given['phase']}"
    # What is applied for an address does not depend on what pods read.
    read = {} if given["phase"] == "expose" else {name: given["install"][name] for name in ("document", "trust")}
    wanted = json.dumps({**read, "expose": given["install"]["expose"], "image": given["install"]["image"]})
    changed = not done.exists() or done.read_text() != wanted
    if not module.check_mode:
        done.write_text(wanted)
    there = done.exists()
    unready = (PLACE / "unready").read_text().splitlines() if (PLACE / "unready").exists() else []
    diff = [{"before_header": f"phase {given['phase']}", "before": "", "after": "another"}] if changed else []
    answer = {"changed": changed, "exposed": EXPOSED if there else {}, "unfinished": "", "removed": [], "diff": diff}
    return {**answer, **({"unready": unready} if module.check_mode else {})}


def peer_probe(given: dict[str, Any]) -> dict[str, Any]:
    """`closed` is a file with lines "HOST ADDRESS" of what that host does not reach."""
    closed = (PLACE / "closed").read_text().splitlines() if (PLACE / "closed").exists() else []
    blocked = [
        {**{key: one[key] for key in ("host", "address", "protocol", "port")}, "how": "no answer within 3 s"}
        for one in given["targets"]
        if f"{HOST} {one['address']}" in closed
    ]
    own = given["spec"]["node"]["underlay4"]
    return {"answered": len(given["targets"]) - len(blocked), "blocked": [{**one, "source": own} for one in blocked]}


def pki_request(given: dict[str, Any]) -> dict[str, Any]:
    lacking = [
        {
            "ca_cluster": one["ca_cluster"],
            "ca_host": one["ca_host"],
            "requests": [{"name": one["name"], "csr": f"{HOST} asks"}],
        }
        for one in given["spec"]["pki"]["certificates"]
        if not (PLACE / "hosts" / HOST / one["name"]).exists()
    ]
    return {"pending": lacking, "former_member": False}


def pki_install(given: dict[str, Any]) -> dict[str, Any]:
    for answer in given["signed"]:
        for one in answer.get("certificates", ()):
            (PLACE / "hosts" / HOST / one["name"]).write_text(f"{one['certificate']}, {answer['ca_certificate']}")
    return {"changed": bool(given["signed"]), "still_pending": []}


def main() -> None:
    module = Module(OPTIONS.split())
    given = module.params
    with (PLACE / "calls").open("a") as file:
        told = {
            key: given[key]
            for key in ("phase", "state", "cluster", "wanted", "requests", "signed", "install", "targets")
            if given[key]
        }
        file.write(json.dumps({"module": NAME, "host": HOST, "check": module.check_mode, **told}) + "\n")
    if (PLACE / "fail" / f"{NAME} {given['phase']}").exists():
        module.fail_json(msg=f"{NAME} {given['phase']} fails")
    if (PLACE / "fail" / f"{NAME} {HOST}").exists():
        module.fail_json(msg=f"{NAME} fails on {HOST}")
    answers: dict[str, Any] = {}
    if NAME == "kubernetes_install":
        answers = kubernetes_install(module, given)
    elif NAME == "peer_probe":
        answers = peer_probe(given)
    elif NAME == "pki_request":
        answers = pki_request(given)
    elif NAME == "pki_install":
        answers = pki_install(given)
    elif NAME == "pki_sign":
        names = [one["name"] for one in given["requests"]]
        answers = {"certificates": [{"name": name, "certificate": f"{HOST} signed"} for name in names]}
        answers |= {"changed": True, "cluster": given["cluster"], "ca_certificate": CA}
    module.exit_json(**{"changed": False, **answers})


if __name__ == "__main__":
    main()
