# SPDX-License-Identifier: BSD-2-Clause
"""What a host keeps of a part that the plan took from it: an etcd member's files, keys and certificates."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit, units
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import openings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

# Names that the planner gives; whatever else somebody put there is theirs.
_OURS = re.compile(
    r"(agent|ipsec|etcd-server|etcd-peer|root|operator|registrar|kubernetes|wireguard|wireguard-1|peer-.+)\.(key|crt|ca)"
)


def member_remains() -> list[str]:
    """What is left on this host of an etcd member, by path; empty where none was, or all of it is put away."""
    files = [f"{units.UNIT_DIRECTORY}/{name}" for name in etcd_unit.UNITS]
    return [path for path in (*files, etcd_unit.ENVIRONMENT, etcd_unit.DATA) if os.path.lexists(path)]


def set_aside(changes: Changes) -> None:
    """The data of an etcd member that does not run is kept, at a place where no member finds it."""
    place = etcd_unit.DATA + time.strftime(".removed-%Y%m%dT%H%M%SZ", time.gmtime())
    changes.note(etcd_unit.DATA, "the member's data", f"moved to {place}")
    if changes.module.check_mode:
        return
    try:
        os.rename(etcd_unit.DATA, place)
    except OSError as exc:
        changes.module.fail_json(
            msg=f"{etcd_unit.DATA} cannot be moved to {place}: {exc}. Move what is in it to a place of your choice, "
            "remove the directory (a mount point: unmount it), and run again"
        )


def remove_unlisted(changes: Changes, spec: Mapping[str, Any], directory: str) -> None:
    """Keys, certificates and pinned authorities of ours that the spec does not name are gone.

    The key of an authority is never removed: a warning names it where it has no business.
    """
    pki = spec["pki"]
    wanted = {entry["name"] for entry in pki["certificates"]}
    if (spec.get("registrar") or {}).get("kubernetes"):
        wanted.add("kubernetes")
    wanted |= {os.path.splitext(os.path.basename(tunnel["key"]))[0] for tunnel in openings.tunnels(spec)}
    for name in _files(directory):
        match = _OURS.fullmatch(name)
        if match is not None and match.group(1) not in wanted:
            changes.absent(os.path.join(directory, name), secret=match.group(2) == "key")
    if spec.get("member") is None:
        changes.absent(os.path.join(directory, etcd_unit.REVOKED))
    trust = os.path.join(directory, "trust")
    for name in _files(trust):
        if name.endswith(".crt") and name[: -len(".crt")] not in pki["trust"]:
            changes.absent(os.path.join(trust, name))
    if pki["ca"]["here"]:
        return
    key, certificate = os.path.join(directory, "ca.key"), os.path.join(directory, "ca.crt")
    if os.path.exists(key):
        changes.module.warn(
            f"{key} is the key of an authority, and the one of cluster {pki['ca']['cluster']} belongs to "
            f"{pki['ca']['host']}. It was left. Next: move it there if it is that one, or delete it"
        )
    else:
        changes.absent(certificate)


def _files(directory: str) -> list[str]:
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []
