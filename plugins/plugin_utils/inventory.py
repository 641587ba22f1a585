# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The estate and the mesh's host variables, collected from the whole inventory. Private to this collection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleError
from ansible.vars.plugins import get_vars_from_inventory_sources
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.schema import HOST_VARIABLES

_ESTATE = "isthmus_estate"


class InventoryError(Exception):
    """The inventory's variables cannot be collected; the text is for the operator."""


def refuse_slice(variables: Mapping[str, Any]) -> None:
    """A slice sees a part of the inventory only.

    AWX passes no slice number to the job. What shows is that it starts slices from a workflow job
    that carries the job template's own name (JobTemplate.create_unified_job); a count passed as an
    extra variable is believed too.
    """
    for prefix in ("awx_", "tower_", "ansible_", ""):
        count = str(variables.get(f"{prefix}job_slice_count") or "1")
        workflow = variables.get(f"{prefix}workflow_job_name")
        sliced = workflow is not None and workflow == variables.get(f"{prefix}job_template_name")
        if sliced or (count.isdigit() and int(count) > 1):
            raise InventoryError(
                "This is a slice of an AWX job. Nothing was changed on any host. Why: slicing cuts the inventory, and "
                "the mesh is planned from the whole of it. Next: set job_slice_count of the job template to 1; for "
                "batches use isthmus_serial. (A workflow with the same name as its job template looks like a slice: "
                "rename one.)"
            )


def collect(hostvars: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The estate and the mesh's variables of every inventory host, templated; nothing else is touched.

    The estate is templated once: hosts that get it from the same place share it.
    """
    estate: Any = None
    raw_estate: Any = None
    owner = ""
    hosts: dict[str, dict[str, Any]] = {}
    conflicts = _GroupValues(hostvars)
    for name in sorted(hostvars):
        raw = hostvars.raw_get(name) if hasattr(hostvars, "raw_get") else hostvars[name]
        if _ESTATE in raw and raw[_ESTATE] != raw_estate:
            value = _value(hostvars, name, _ESTATE)
            if owner and value != estate:
                raise InventoryError(
                    f"isthmus_estate: host {name} and host {owner} have different ones. Nothing was changed on any "
                    "host. Why: there is one mesh, and it is planned once. Next: define isthmus_estate in one place, "
                    "such as group_vars/all; to merge files, combine them in a template there"
                )
            estate, raw_estate, owner = value, raw[_ESTATE], owner or name
        # Of anything else only the names are handed on, to find misspelt ones.
        hosts[str(name)] = {str(key): None for key in raw if str(key).startswith("isthmus_")}
        if "isthmus_cluster" in raw:
            hosts[str(name)].update({key: _value(hostvars, name, key) for key in HOST_VARIABLES if key in raw})
            several = conflicts.clusters(name)
            if len(several) > 1:
                hosts[str(name)]["isthmus_cluster"] = several
    return estate, hosts


class _GroupValues:
    """What a host's groups say about `isthmus_cluster`, which Ansible would settle by silent precedence."""

    def __init__(self, hostvars: Any) -> None:
        self.inventory = getattr(hostvars, "_inventory", None)
        self.known: dict[str, Any] = {}

    def own(self, entity: Any) -> Any:
        """The value that a group or host sets itself: in the inventory or in its variable files."""
        key = f"{type(entity).__name__} {entity.name}"
        if key not in self.known:
            sources = self.inventory._sources
            found = get_vars_from_inventory_sources(self.inventory._loader, sources, [entity], "all")
            self.known[key] = found.get("isthmus_cluster", entity.vars.get("isthmus_cluster"))
        return self.known[key]

    def clusters(self, name: str) -> list[str]:
        """Different values from groups none of which is below another; empty when the host says it itself."""
        host = self.inventory.get_host(name) if self.inventory is not None else None
        if host is None or self.own(host) is not None:
            return []
        saying = [group for group in host.get_groups() if isinstance(self.own(group), str)]
        below = {ancestor.name for group in saying for ancestor in group.get_ancestors()}
        return sorted({str(self.own(group)) for group in saying if group.name not in below})


def _value(hostvars: Any, host: str, key: str) -> Any:
    try:
        return plain(hostvars[host][key], f"host {host}: {key}")
    except AnsibleError as exc:
        raise InventoryError(
            f"host {host}: {key}: it cannot be evaluated: {exc}. Nothing was changed on any host. Why: the mesh is "
            "planned from it, for every host of the inventory. Next: define what it refers to, in plain text"
        ) from exc


def plain(value: Any, where: str) -> Any:
    """Plain Python values: no templates, tags or lazy containers reach the pure core or a spec."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry, where) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, where) for entry in value]
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return str(value)
