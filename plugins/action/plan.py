# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans the mesh on the controller. See `plugins/modules/plan.py` for the documentation.

A thin shell around `module_utils/mesh`: it collects the estate and the mesh's host variables from
the whole inventory, never from the hosts of the play, and adds the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import bgp, ipsec, matrix, vpc
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.address_plan import with_fixes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.auto import Verdict
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.encryption import Pair, pair
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.forgetting import Forget
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.model import Model, ModelError, read_model
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.openings import documents_of
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.planner import Plan, plan
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.record import (
    Record,
    RecordError,
    format_time,
    merge,
    parse_time,
)
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.refusals import (
    refuse_foreign_services,
    refuse_other_version,
)
from ansible_collections.isthmus.mesh.plugins.plugin_utils.batches import SerialError, serial_of, split
from ansible_collections.isthmus.mesh.plugins.plugin_utils.bundles import collection_version
from ansible_collections.isthmus.mesh.plugins.plugin_utils.inventory import InventoryError, collect, plain, refuse_slice
from ansible_collections.isthmus.mesh.plugins.plugin_utils.runs import operator


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
                "rotate": {"type": "bool", "default": False},
                "clean": {"type": "list", "elements": "str", "default": []},
                "lists": {"type": "dict", "default": {}},
                "exposed": {"type": "dict", "default": {}},
                "try_native": {"type": "bool", "default": False},
                "keys": {"type": "dict", "default": {}},
                "pods": {"type": "dict"},
                "basis": {"type": "dict"},
                "proofs": {"type": "list", "elements": "dict", "default": []},
                "version": {"type": "str"},
                "serial": {"type": "raw"},
                "by": {"type": "str"},
            }
        )
        variables = task_vars or {}
        try:
            refuse_slice(variables)
            basis = plain(options["basis"] or _basis(options, variables), "basis")
            options.update(basis)
            serial = serial_of(plain(options["serial"], "serial"))
            version = collection_version()
            records = plain(options["records"], "records")
            record = merge(records)
            # Before the inventory is looked at: it may be written for the version that is wanted.
            refuse_other_version(record, version, options["version"] or None)
            model = _read(variables["hostvars"], record)
            found = plan(
                model,
                record,
                parse_time(basis["now"]),
                version,
                options["by"],
                [str(name) for name in options["prune"]],
                Forget(
                    [str(name) for name in options["forget"]],
                    [str(name) for name in options["clean"]],
                    plain(options["lists"], "lists"),
                ),
                options["rotate"],
                plain(options["exposed"], "exposed"),
                options["try_native"],
                _proofs(plain(options["proofs"], "proofs")),
                plain(options["keys"], "keys"),
                None if options["pods"] is None else plain(options["pods"], "pods"),
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
        except (InventoryError, SerialError) as exc:
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
            sites=[dict(row) for row in found.sites],
            matrix=matrix.lines(found.sites),
            routes=[dict(route) for route in found.routes],
            routers=matrix.route_lines(found.routes),
            host_routes=matrix.host_routes(
                found.sites, documents_of(found.record), model.ipsec, found.ipsec, found.keys[-1]
            ),
            gateways=ipsec.other_sides(model.ipsec),
            turned=matrix.changes(found.sites, found.keys),
            vpc={
                "networks": [dict(call) for call in found.vpcs.calls],
                "peerings": [dict(call) for call in found.vpcs.peerings],
                "lines": vpc.lines(found.vpcs.calls, found.vpcs.peerings),
            },
            bgp={
                "hosts": {name: dict(own) for name, own in found.bgp.hosts.items()},
                "routers": [dict(router) for router in found.bgp.routers],
                "lines": bgp.lines(found.bgp.routers),
            },
            steps=[
                {
                    "specs": dict(step.specs),
                    "record": dict(step.record),
                    "waits": list(step.waits),
                    "proven": list(step.proven),
                }
                for step in found.steps
            ],
            in_cluster={name: dict(entry) for name, entry in found.in_cluster.items()},
            trials=[[dict(trial) for trial in each] for each in found.trials],
            told=list(found.told),
            keyed=list(found.keyed),
            routed=list(found.routed),
            basis=basis,
            proofs=plain(options["proofs"], "proofs"),
            serial=serial,
            clusters={"new": new, "answering": answering},
            batches=split(found.specs, hosts, new, answering, serial).words() + _inside(found, hosts),
            warnings=list(found.warnings),
            diff={
                "before_header": "estate record",
                "after_header": "estate record after the run",
                "before": found.before,
                "after": found.after,
            },
        )
        return result


def _basis(options: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan is made from besides the inventory and proofs."""
    given = {name: value for name, value in options.items() if name not in ("basis", "proofs")}
    return {**given, "by": options["by"] or operator(variables), "now": format_time(datetime.now(timezone.utc))}


def _proofs(given: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[Pair, Verdict]]:
    return [
        {pair(*name.split(" ")): Verdict(one["works"], tuple(one["hosts"]), one["why"]) for name, one in each.items()}
        for each in given
    ]


def _inside(found: Plan, hosts: Sequence[str]) -> list[str]:
    """A line when clusters have their turn whose control plane is in them."""
    clusters = sorted(name for name, entry in found.in_cluster.items() if entry["entry"] in hosts)
    return [f"after the hosts, each in itself: {', '.join(clusters)}"] if clusters else []


def _read(hostvars: Any, record: Record) -> Model:
    """The model; of ranges that overlap the refusal says what would put that right."""
    estate, hosts = collect(hostvars)
    try:
        return read_model(estate, hosts)
    except ModelError as exc:
        raise with_fixes(exc, record) from exc
