# SPDX-License-Identifier: BSD-2-Clause
"""Estates that are not to be worked on although nothing is wrong with the inventory: another version of the collection
runs there, or somebody else owns what it would define. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import versions
from .model import ModelError
from .record import Record
from .schema import Problem


def refuse_other_version(record: Record, installed: str, wanted: str | None = None) -> None:
    """ModelError when the `installed` version of the collection is not the one to work on this estate with.

    `wanted` is what the operator pinned (`isthmus_version`). A record without a version says nothing about it.
    VersionError when `installed` is no version.
    """
    running = None if record.roster is None else record.roster.get("version")
    here = versions.order(installed)
    if wanted is not None and not versions.valid(wanted):
        problem = Problem(
            "isthmus_version",
            f"{wanted!r} is not a version such as 1.2.3",
            "it names the one version that `site` may install",
            f"write {installed}, or the version that is meant",
        )
    elif running is not None and versions.order(wanted or installed) < versions.order(running):
        get = "" if here == versions.order(running) else f"{versions.install(running)}, and run again"
        pin = f"set isthmus_version to {running}, or leave it out" if wanted else ""
        problem = Problem(
            "isthmus_version" if wanted else "isthmus.mesh",
            f"{wanted or installed} is older than {running}, which was applied to this estate last",
            "a downgrade is never made: what a newer version wrote, an older one may misread",
            "; ".join(part for part in (pin, get) if part),
        )
    elif wanted is not None and versions.order(wanted) != here:
        problem = Problem(
            "isthmus_version",
            f"{wanted} is wanted, and the controller has isthmus.mesh {installed}",
            "`site` installs the agent of its own version",
            f"{versions.install(wanted)}, and run again",
        )
    elif wanted is None and running is not None and versions.order(running) < here:
        problem = Problem(
            "isthmus.mesh",
            f"{installed} is newer than {running}, which was applied to this estate last",
            "a running estate is upgraded only when that is asked for",
            f"to upgrade it, `ansible-playbook isthmus.mesh.site -e isthmus_version={installed}`; to stay, "
            f"{versions.install(running)}",
        )
    else:
        return
    raise ModelError([problem])


def refuse_foreign_services(
    services: Mapping[str, Mapping[str, Any]], foreign: Mapping[str, Mapping[str, str]]
) -> None:
    """ModelError for every service that a plan defines where somebody else has defined it.

    `services` as in `Plan`; `foreign` by cluster: owners by `<namespace>/<name>`, of services in that cluster's etcd
    that the inventory does not own.
    """
    places: dict[tuple[str, str], list[str]] = {}
    for cluster, wanted in services.items():
        for service in wanted["present"]:
            name = f"{service['namespace']}/{service['name']}"
            owner = foreign.get(cluster, {}).get(name)
            if owner is not None:
                places.setdefault((name, owner), []).append(cluster)
    if places:
        raise ModelError(
            Problem(
                f"isthmus_estate.services: {name}",
                f"it belongs to {owner} in the etcd of {', '.join(sorted(clusters))}, and the inventory would define "
                "it too",
                "a service has one owner",
                "remove it here, or where it was registered"
                + (" (isthmus.mesh.global_service with state: absent)" if owner == "module" else ""),
            )
            for (name, owner), clusters in places.items()
        )
