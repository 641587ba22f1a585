# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans the mesh's addresses on the controller. See `plugins/modules/address_plan.py` for the documentation.

A thin shell around `module_utils/mesh/address_plan.py`: it collects the inventory and what was read of the record, and
adds the clock and the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.address_plan import (
    address_plan,
    lines,
    read_growth,
    read_new_cluster,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.model import Model, ModelError, read_model
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.record import Record, RecordError, merge
from ansible_collections.isthmus.mesh.plugins.plugin_utils.inventory import InventoryError, collect, plain, refuse_slice


class ActionModule(ActionBase):
    """`isthmus.mesh.address_plan`: computes, changes nothing but the file that it is given."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validated, options = self.validate_argument_spec(
            argument_spec={
                "answers": {"type": "dict", "default": {}},
                "new_cluster": {"type": "str", "default": ""},
                "new_nodes": {"type": "str", "default": ""},
                "growth": {"type": "raw", "default": ""},
                "path": {"type": "path", "default": ""},
            }
        )
        variables = task_vars or {}
        try:
            refuse_slice(variables)
            model, others = _read(variables["hostvars"])
            record, unread = _record(model, plain(options["answers"], "answers"))
            growth = read_growth(plain(options["growth"], "growth"), model.clusters)
            new = read_new_cluster(options["new_cluster"], options["new_nodes"], model, record)
            plan = address_plan(model, record, datetime.now(timezone.utc), growth, new, unread)
        except ModelError as exc:
            words = "\n".join(f"- {problem}" for problem in exc.problems)
            result.update(failed=True, msg=f"The addresses cannot be planned. Nothing was changed.\n{words}")
            return result
        except InventoryError as exc:
            result.update(failed=True, msg=str(exc))
            return result
        plan["problems"] = sorted([*plan["problems"], *others])
        text = lines(plan)
        result.update(changed=False, plan=plan, lines=text)
        if options["path"]:
            path = Path(options["path"])
            content = json.dumps(plan, indent=2) + "\n" if path.suffix == ".json" else "\n".join(text) + "\n"
            try:
                result["changed"] = not path.exists() or path.read_text() != content
                if result["changed"] and not self._task.check_mode:
                    path.write_text(content)
            except (OSError, UnicodeDecodeError) as exc:
                result.update(
                    failed=True,
                    msg=f"{path}: the address plan cannot be written there: {exc}. Why: isthmus_address_file names it. "
                    "Next: name a file that can be written on the controller",
                )
        return result


def _read(hostvars: Any) -> tuple[Model, list[str]]:
    """The model or, of an inventory that is refused, what could be read of it and what is wrong besides overlaps."""
    estate, hosts = collect(hostvars)
    try:
        return read_model(estate, hosts), []
    except ModelError as exc:
        if exc.draft is None:
            raise
        overlaps = {conflict.problem for conflict in exc.conflicts}
        return exc.draft, [str(problem) for problem in exc.problems if problem not in overlaps]


def _record(model: Model, answers: Mapping[str, Any]) -> tuple[Record, dict[str, str]]:
    """What was read, and of each cluster whose own etcd did not give its record, why.

    The words are ours: what a connection plugin says may hold what is nobody's business in a ticket.
    """
    copies, own, without = [], set(), set()
    why: dict[str, list[str]] = {}
    for host, answer in sorted(answers.items()):
        cluster = model.hosts[host].cluster if host in model.hosts else ""
        reasons = why.setdefault(cluster, [])
        copy = answer.get("record")
        if copy:
            copies.append(copy)
        if copy and copy.get("cluster") == cluster:
            own.add(cluster)
        elif copy:
            reasons.append(f"its etcd gave none on {host}, the copy there is used")
        elif answer.get("silent") or answer.get("unreachable"):
            reasons.append(f"{host} cannot be entered")
        elif answer.get("msg"):
            reasons.append(f"{host} cannot be asked (isthmus.mesh.plan says why)")
        else:
            without.add(cluster)
    try:
        record = merge(copies)
    except RecordError:
        words = "what was read does not go together and is not used (isthmus.mesh.plan says why)"
        return Record(), dict.fromkeys(model.clusters, words)
    running = {name for name, document in record.clusters.items() if document["state"] != "absent"}
    unread = {}
    for name in sorted({*model.clusters, *running} - own):
        lacking = "its etcd hosts are not in this run" if name in model.clusters else "the inventory lacks it"
        reasons = why.get(name, [lacking])
        if name in without and name in running:
            reasons = [*reasons, "its etcd has none"]
        if reasons:  # else it is new
            held = "what others hold of it is used" if name in running else "only the inventory is known"
            unread[name] = f"{', '.join(reasons)}; {held}"
    return record, unread
