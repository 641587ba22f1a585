#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for every module of the collection that works on a host: writes down that it ran, and does what the files in
$FAKE_PLACE say. The host's name is in $FAKE_HOST; what it is called is in NAME."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

NAME = "verify"
PLACE = Path(os.environ["FAKE_PLACE"])
HOST = os.environ["FAKE_HOST"]
OPTIONS = (
    "archive before break_lock bundle_digest cluster confirm controller_time crl estate firewall formed former "
    "hosts install known_ca listed lists lock max_clock_skew names only paths platforms python record replacing run "
    "scope services snapshot spec state timeout token trust version wait"
)


def estate_record(module: AnsibleModule, given: dict[str, Any]) -> dict[str, Any]:
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
        documents[f"clusters/{cluster}"]["ca_certificate"] = "-----BEGIN CERTIFICATE-----"
    changed = not record.exists() or json.loads(record.read_text()) != documents
    if not module.check_mode:
        record.write_text(json.dumps(documents))
    answer = {"cluster": given["cluster"], "documents": documents}
    return {"changed": changed, "locked": True, "record": answer}


def node(module: AnsibleModule, given: dict[str, Any]) -> dict[str, Any]:
    path = PLACE / "hosts" / HOST / "node.json"
    changed = not path.exists() or json.loads(path.read_text()) != given["spec"]
    if changed and not module.check_mode:
        path.write_text(json.dumps(given["spec"]))
    return {"changed": changed, "standing": {"services": ["shop/web"]}}


def main() -> None:
    module = AnsibleModule(argument_spec={name: {"type": "raw"} for name in OPTIONS.split()}, supports_check_mode=True)
    given = module.params
    # "MODULE WHERE WHO": when that module runs there, that host falls silent.
    for line in (PLACE / "silence").read_text().splitlines() if (PLACE / "silence").exists() else []:
        name, where, who = line.split()
        if (name, where) == (NAME, HOST):
            (PLACE / "silent" / who).touch()
    with (PLACE / "calls").open("a") as file:
        told = {name: given[name] for name in ("scope", "before", "wait", "state") if given[name] is not None}
        file.write(json.dumps({"module": NAME, "host": HOST, "check": module.check_mode, **told}) + "\n")
    if (PLACE / "fail" / f"{NAME} {HOST}").exists():
        module.fail_json(msg=f"{NAME} fails on {HOST}\nwith a second line")
    answers: dict[str, Any] = {
        "preflight": {"packages": ["dnsmasq"] if (PLACE / "fail" / f"packages {HOST}").exists() else []},
        "bundle": {"digest": "0"},
        "pki_request": {"pending": [], "former_member": False},
        "etcd_member": {"action": "none"},
        "pki_revoke": {"cluster": given["cluster"], "crl": "LIST", "revoked": []},
    }
    if given["install"]:
        module.fail_json(msg="there is no such package")
    if NAME == "estate_record":
        answers[NAME] = estate_record(module, given)
    elif NAME == "node":
        answers[NAME] = node(module, given)
    module.exit_json(**{"changed": False, **answers.get(NAME, {})})


if __name__ == "__main__":
    main()
