# SPDX-License-Identifier: BSD-2-Clause
"""The host by itself: its clock, units, specification and certificates."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import stat

from ansible_collections.isthmus.mesh.plugins.module_utils import clock, strongswan, units
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ipsec
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier


def check_clock(verifier: Verifier) -> None:
    told = verifier.module.params["controller_time"]
    if told:
        problem = clock.problem(told, verifier.module.params["max_clock_skew"])
        verifier.check("clock", not problem, problem)


def check_units(verifier: Verifier) -> None:
    names = ["isthmusd.service", "isthmus-dns.service", "isthmus-dns-reload.path"]
    if verifier.spec.get("registrar"):
        names.append("isthmus-registrar.service")
    if verifier.spec.get("member"):
        names.append("isthmus-etcd.service")
    names += [name for name in (units.BOOT_ROUTES_UNIT, *units.WIREGUARD) if os.path.exists(units.Units.path(name))]
    gateways = verifier.spec.get("ipsec") or {"far": {}}
    if gateways.get("connections"):
        names.append(strongswan.UNIT)
    if ipsec.guard(gateways) is not None:
        names += [strongswan.GUARD_UNIT, strongswan.KEEPER_UNIT]
    for name, found in units.Systemd(verifier.module).show(names).items():
        state = found.get("ActiveState")
        verifier.check(
            "units",
            state == "active",
            f"{name} is {state}; see `journalctl -u {name}` on {verifier.spec['host']}, or {SITE}",
        )
        enabled = found.get("UnitFileState") == "enabled"
        verifier.check("units", enabled, f"{name} would not start at the next boot; {SITE}")


def check_spec(verifier: Verifier) -> None:
    try:
        with open(verifier.NODE, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as exc:
        verifier.check("spec", False, f"{verifier.NODE} cannot be read: {exc}; {SITE}")
        return
    if not isinstance(found, dict):
        verifier.check("spec", False, f"{verifier.NODE} is no specification: it holds a {type(found).__name__}; {SITE}")
        return
    differing = sorted(key for key in {*found, *verifier.spec} if found.get(key) != verifier.spec.get(key))
    verifier.check(
        "spec",
        not differing,
        f"{verifier.NODE} is not what the inventory gives ({', '.join(differing)} differ); {SITE}",
    )


def check_certificates(verifier: Verifier) -> None:
    pki = verifier.bundle("isthmus_agent.pki")
    now = datetime.datetime.now(datetime.timezone.utc)
    for cluster in verifier.spec["pki"]["trust"]:
        path = f"{verifier.PKI}/trust/{cluster}.crt"
        try:
            pki.check_pin(_read(path), path, now)
        except FileNotFoundError:
            verifier.check("certificates", False, f"{path}, the authority of cluster {cluster}, is missing; {SITE}")
        except pki.PkiError as exc:
            verifier.check("certificates", False, f"{exc}")
        else:
            verifier.proofs["certificates"] += 1
    for entry in verifier.spec["pki"]["certificates"]:
        path = f"{verifier.PKI}/{entry['name']}"
        trusted = f"{verifier.PKI}/trust/{entry['ca_cluster']}.crt"
        key, certificate, authority = (_read_or_none(name) for name in (path + ".key", path + ".crt", trusted))
        try:
            reason = pki.renewal_reason(
                pki.CertificateSpec.from_dict(entry),
                None if key is None else key.encode(),
                None if certificate is None else certificate.encode(),
                authority,
                now,
            )
        except pki.PkiError as exc:
            reason = f"it cannot be compared with its authority {trusted}: {exc}"
        verifier.check("certificates", reason is None, f"{path}.crt: {reason}; {SITE}")
        if key is not None:
            mode = stat.S_IMODE(os.stat(path + ".key").st_mode)
            verifier.check("certificates", mode == 0o600, f"{path}.key has mode {mode:04o}, not 0600; {SITE}")


def _read(path: str) -> str:
    # A damaged file is to be named as such, whatever bytes are in it.
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _read_or_none(path: str) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return _read(path)
    return None
