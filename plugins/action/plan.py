# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans the mesh on the controller. See `plugins/modules/plan.py` for the documentation.

A thin shell around `module_utils/mesh`: it collects the estate and the mesh's host variables from
the whole inventory, never from the hosts of the play, and adds the clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.vars.plugins import get_vars_from_inventory_sources
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.model import ModelError, read_model
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.planner import (
    Forget,
    plan,
    refuse_foreign_services,
    refuse_other_version,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.record import RecordError, merge
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.schema import HOST_VARIABLES
from ansible_collections.isthmus.mesh.plugins.plugin_utils.batches import SerialError, serial_of, split
from ansible_collections.isthmus.mesh.plugins.plugin_utils.bundles import collection_version
from ansible_collections.isthmus.mesh.plugins.plugin_utils.runs import operator

_ESTATE = "isthmus_estate"


class PlanError(Exception):
    """The inventory's variables cannot be collected; the text is for the operator."""


class ActionModule(ActionBase):
    """`isthmus.mesh.plan`: computes, changes nothing."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validated, options = self.validate_argument_spec(
            argument_spec={
                "records": {"type": "list", "elements": "dict", "default": []},
                "prune": {"type": "list", "elements": "str", "default": []},
                "forget": {"type": "list", "elements": "str", "default": []},
                "clean": {"type": "list", "elements": "str", "default": []},
                "lists": {"type": "dict", "default": {}},
                "version": {"type": "str"},
                "serial": {"type": "raw"},
                "by": {"type": "str"},
            }
        )
        variables = task_vars or {}
        try:
            _refuse_slice(variables)
            serial = serial_of(_plain(options["serial"], "serial"))
            version = collection_version()
            records = _plain(options["records"], "records")
            record = merge(records)
            # Before the inventory is looked at: it may be written for the version that is wanted.
            refuse_other_version(record, version, options["version"] or None)
            estate, hosts = _collect(variables["hostvars"])
            found = plan(
                read_model(estate, hosts),
                record,
                datetime.now(timezone.utc),
                version,
                options["by"] or operator(variables),
                [str(name) for name in options["prune"]],
                Forget(
                    [str(name) for name in options["forget"]],
                    [str(name) for name in options["clean"]],
                    _plain(options["lists"], "lists"),
                ),
            )
            refuse_foreign_services(
                found.services,
                {copy["cluster"]: copy.get("foreign_services", {}) for copy in records if copy.get("cluster")},
            )
        except ModelError as exc:
            result.update(failed=True, msg=str(exc), problems=[str(problem) for problem in exc.problems])
            return result
        except RecordError as exc:
            words = f"The mesh cannot be planned. Nothing was changed on any host. {exc}"
            result.update(failed=True, msg=words, problems=[str(exc)])
            return result
        except (PlanError, SerialError) as exc:
            result.update(failed=True, msg=str(exc), problems=[str(exc)])
            return result
        new = sorted(name for name in found.services if not found.record[f"clusters/{name}"].get("ca_certificate"))
        answering = sorted({str(copy["cluster"]) for copy in records if copy.get("cluster")})
        hosts = variables.get("ansible_play_hosts_all", [])
        result.update(
            changed=False,
            specs=dict(found.specs),
            record=dict(found.record),
            services=dict(found.services),
            changes=list(found.changes),
            orphans=list(found.orphans),
            removed=list(found.removed),
            cuts=list(found.cuts),
            forgotten={name: dict(entry) for name, entry in found.forgotten.items()},
            revocations=[dict(entry) for entry in found.revocations],
            kubernetes_left=list(found.kubernetes_left),
            serial=serial,
            clusters={"new": new, "answering": answering},
            batches=split(found.specs, hosts, new, answering, serial).words(),
            warnings=list(found.warnings),
            diff={
                "before_header": "estate record",
                "after_header": "estate record after the run",
                "before": found.before,
                "after": found.after,
            },
        )
        return result


def _refuse_slice(variables: Mapping[str, Any]) -> None:
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
            raise PlanError(
                "This is a slice of an AWX job. Nothing was changed on any host. Why: slicing cuts the inventory, and "
                "the mesh is planned from the whole of it. Next: set job_slice_count of the job template to 1; for "
                "batches use isthmus_serial. (A workflow with the same name as its job template looks like a slice: "
                "rename one.)"
            )


def _collect(hostvars: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
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
                raise PlanError(
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
        return _plain(hostvars[host][key], f"host {host}: {key}")
    except AnsibleError as exc:
        raise PlanError(
            f"host {host}: {key}: it cannot be evaluated: {exc}. Nothing was changed on any host. Why: the mesh is "
            "planned from it, for every host of the inventory. Next: define what it refers to, in plain text"
        ) from exc


def _plain(value: Any, where: str) -> Any:
    """Plain Python values: no templates, tags or lazy containers reach the pure core or a spec."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, where) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where) for entry in value]
    if isinstance(value, bool) or value is None:
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    return str(value)
