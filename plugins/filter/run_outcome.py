# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a run of site leaves: locks to give back, what is pending, and what was done when something failed."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: run_outcome
short_description: What a run of site leaves
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Takes the places where the run holds a lock, what it could not do and what it did out of what the tasks of the run
    registered.
options:
  _input:
    description: Variables of the hosts of the run.
    type: list
    elements: dict
    required: true
  gone:
    description: Hosts that did not take part to the end.
    type: list
    elements: str
    default: []
  failed:
    description: Hosts on which a task failed.
    type: list
    elements: str
    default: []
  clusters:
    description: Clusters whose etcd is to have the record.
    type: list
    elements: str
    default: []
  left:
    description: Clusters whose Kubernetes left the mesh with this run.
    type: list
    elements: str
    default: []
  stopped:
    description: Whether the run did not go on after a failure.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: Show what is pending
  ansible.builtin.debug:
    msg: "{{ (ansible_play_hosts_all | map('extract', hostvars) | isthmus.mesh.run_outcome).pending }}"
"""

RETURN = r"""
_value:
  description:
    - C(locked), dictionaries with C(cluster) and C(host); C(recorded), whether any cluster's etcd took the record;
      C(changed) and C(silent), names of hosts; C(waiting), for each host that waits for others which could not be
      entered, their names; C(refused), for each host that authorities which were asked gave no certificate, or for
      whose cluster with C(control_plane=in_cluster) that is so, what they said; C(unreached), for each host that does
      not reach what exposes the etcd of a cluster with C(control_plane=in_cluster), what that is; C(pending) and
      C(failure), lines of text.
  type: dict
"""

from ansible_collections.isthmus.mesh.plugins.plugin_utils.batches import newest_plan

_READS = ("__plan_first", "__plan_others")
_WRITES = ("__services_result", "__services_others")
# What the steps of a host register, in their order.
_STEPS = (
    "__bundle_result",
    *("__pki_requested", "__pki_installed"),
    *("__etcd_result", "__etcd_former", "__etcd_rights"),
    *("__kubernetes_credential", "__kubernetes_access", "__kubernetes_installed"),
    "__bgp_result",
    "__agent_result",
    *("__ipsec_result", "__ipsec_used", "__ipsec_only"),
)
# Those that run on the host itself.
_OWN_STEPS = tuple(step for step in _STEPS if step != "__kubernetes_access")
_NEXT = (
    "Nothing was withdrawn because of that. Next: run the playbook again when the reason above is gone: it does the "
    "rest."
)
_AFTER_FAILURE = (
    "Every host works on as it is. Next: put right what failed and run the playbook again: it does the rest."
)


def run_outcome(members, gone=(), failed=(), clusters=(), left=(), stopped=True):
    """See above; names in the order of the alphabet."""
    hosts = {str(variables["inventory_hostname"]): variables for variables in members}
    locked, written, unwritten = _locks(hosts.values(), clusters)
    broken = {name for name in hosts if name in failed or _is(hosts[name], "failed", "__preflight_installed")}
    unexposed = {name: why for name in gone if name in hosts and (why := _not_exposed(hosts[name]))}
    silent = {
        name
        for name, variables in hosts.items()
        if name not in broken | set(unexposed)
        and (name in gone or _is(variables, "unreachable", *_OWN_STEPS, "__site_verified"))
    }
    waits = {
        name: found
        for name, variables in hosts.items()
        if name not in broken | silent and (found := _waits(variables)) is not None
    }
    changed = {name for name, variables in hosts.items() if _is(variables, "changed", *_STEPS)}
    pending = []
    if silent:
        pending.append(f"Pending: {len(silent)} of the hosts ({_names(silent)}) could not be entered.")
    for (what, places), names in sorted(_together(waits).items()):
        pending.append(
            f"Pending: {_names(names)} could not be finished without {what}: {', '.join(places)} could not be entered."
        )
    if unwritten:
        pending.append(f"Pending: the etcd of {_names(unwritten)} did not get the estate record of this run.")
    pending += [
        f"Pending: cluster {hosts[name]['isthmus_cluster']} could not be done ({name}): {why}."
        for name, why in sorted(unexposed.items())
    ]
    lacking = {name: _lacking(variables, hosts) for name, variables in hosts.items() if stopped and name not in broken}
    unsigned = {
        name: found
        for name, variables in hosts.items()
        if stopped and name not in broken | silent | set(waits) and (found := _refusals(variables))
    }
    pending += _unsigned(hosts, lacking)
    pending += _ungiven(unsigned)
    pending += _unread(hosts, broken | silent) if stopped else []
    pending += _closed(hosts)
    pending += _owed(hosts)
    pending += _steps(hosts, bool(written)) if stopped and not broken else []
    pending += _kubernetes(hosts.values())
    pending += [] if broken else _left(hosts.values(), left)
    failure = _failures(hosts, broken) if broken else []
    if broken and stopped:
        untouched = {name for name, variables in hosts.items() if not any(step in variables for step in _STEPS)}
        rest = set(hosts) - broken - silent - set(waits) - set(unexposed)
        failure[:0] = ["Stopped at the first failure: no further batch was begun."]
        failure += [
            f"Changed: {_names(rest & changed)}.",
            f"Nothing to change: {_names(rest - changed - untouched)}.",
            f"Not touched: {_names(rest & untouched)}.",
            _AFTER_FAILURE,
        ]
    return {
        "locked": locked,
        "recorded": bool(written),
        "changed": sorted(changed),
        "silent": sorted(silent),
        "waiting": {name: list(places) for name, (_what, places) in sorted(waits.items())},
        "refused": {
            name: "; ".join(f"the authority of cluster {peer} {why}" for peer, why in sorted(refused.items()))
            for name in sorted({*lacking, *unsigned})
            if (
                refused := {
                    **{peer: one["why"] for peer, one in lacking.get(name, {}).items() if one["refused"]},
                    **unsigned.get(name, {}),
                }
            )
        },
        "unreached": {
            name: "; ".join(_dialled(cluster, blocked) for cluster, blocked in sorted(found.items()))
            for name, variables in sorted(hosts.items())
            if (found := _unreached(variables))
        },
        "pending": [*pending, _NEXT] if pending else [],
        "failure": failure,
    }


def _locks(members, clusters):
    """Places of the run's locks; clusters whose etcd took the record, and that did not, when one was to be written."""
    locked, written, wrote = [], set(), False
    for variables in members:
        for name in (*_READS, *_WRITES):
            if name not in variables:
                continue
            wrote = wrote or name in _WRITES
            for result in variables[name].get("results", []):
                place = result.get("plan_place") or result.get("services_place")
                if result.get("locked") and place not in locked:
                    locked.append(place)
                if name in _WRITES and "record" in result:
                    written.add(place["cluster"])
    return locked, written, set(clusters) - written if wrote else set()


def _not_exposed(variables):
    """Why a cluster whose control plane is in it got no address for peers; empty when that was not it."""
    for name in ("__site_image", "__in_cluster_result"):
        if _is(variables, "failed", name):
            return _sentence(variables[name])
    return ""


def _lacking(variables, hosts):
    """For a host that stands for a cluster whose control plane is in it: by name, the peers for whose etcd its
    registrars got no certificate that they need. `place` is an authority's host that could not be entered, `why` says
    what else there was, and `refused` whether the authority was asked."""
    issued = variables.get("__site_issued")
    if not issued:
        return {}
    plan, found = variables["__plan_result"], {}
    asked = {one["site_peer"]["key"]: one for one in (variables.get("__site_signed") or {}).get("results") or ()}
    for peer in plan["in_cluster"][variables["isthmus_cluster"]]["document"]["registrar"]["peers"]:
        name = peer["name"]
        request, answer = issued["requests"].get(name), asked.get(name)
        if request is None and name in issued["certificates"]:
            continue
        place, why = "", "is not known yet"
        if answer is not None and answer.get("unreachable"):
            place, why = plan["record"][f"clusters/{name}"]["ca_host"], "could not be entered"
        elif answer is not None and "certificates" in answer:
            why = f"signed one that cannot be installed: {(request or {}).get('reason', 'nobody asks for it')}"
        elif answer is not None:
            why = f"signed nothing ({plan['record'][f'clusters/{name}']['ca_host']}: {_sentence(answer)})"
        elif name in plan["in_cluster"]:
            why = f"signed nothing ({_untouched(plan['in_cluster'][name]['entry'], hosts)})"
        found[name] = {"place": place, "why": why, "refused": answer is not None and not place}
    return found


def _unsigned(hosts, lacking):
    """A line for each authority that gave a cluster whose control plane is in it nothing; who could not be entered is
    waited for."""
    return [
        f"Pending: the registrars in cluster {hosts[name]['isthmus_cluster']} have no new certificate for the etcd of "
        f"cluster {peer}, whose authority {one['why']}."
        for name, found in sorted(lacking.items())
        for peer, one in sorted(found.items())
        if not one["place"]
    ]


def _refusals(variables):
    """By cluster, why its authority, which was asked on its host, signed nothing for this host."""
    return {
        answer["pki_group"]["ca_cluster"]: f"signed nothing ({answer['pki_group']['ca_host']}: {_sentence(answer)})"
        for answer in (variables.get("__pki_signed") or {}).get("results") or ()
        if "pki_group" in answer and "certificates" not in answer and not answer.get("unreachable")
    }


def _ungiven(unsigned):
    """A line for each authority that signed nothing for hosts."""
    found = {}
    for name, refused in unsigned.items():
        for cluster, why in refused.items():
            found.setdefault((cluster, why), set()).add(name)
    return [
        f"Pending: {_names(names)} got no new certificate of cluster {cluster}, whose authority {why}."
        for (cluster, why), names in sorted(found.items())
    ]


def _unread(hosts, left_out):
    """A line for each cluster whose authority, which is in it, gave hosts nothing that they asked for."""
    found = {}
    for name in set(hosts) - left_out:
        for group in (hosts[name].get("__pki_requested") or {}).get("pending") or ():
            asked = {request["csr"] for request in group["requests"]} if group.get("ca_host") == "" else set()
            issued = [
                one["__site_issued"]
                for one in hosts.values()
                if one.get("__site_issued") and one["isthmus_cluster"] == group["ca_cluster"]
            ]
            signed = {one["csr"] for answer in issued for one in answer["signed"] if one["host"] == name}
            if asked - signed:
                found.setdefault(group["ca_cluster"], set()).add(name)
    lines = []
    for cluster, names in sorted(found.items()):
        plan = hosts[min(names)]["__plan_result"]
        lines.append(
            f"Pending: the registrars on {_names(names)} have no new certificate for the etcd of cluster {cluster}, "
            f"whose authority signed nothing ({_untouched(plan['in_cluster'][cluster]['entry'], hosts)})."
        )
    return lines


def _unreached(variables):
    """By cluster whose control plane is in it, the addresses of its etcd of which this host reaches none."""
    return {
        answer["site_dialled"]["cluster"]: answer["blocked"]
        for answer in (variables.get("__site_reached") or {}).get("results") or ()
        if answer.get("blocked")
    }


def _dialled(cluster, blocked):
    places = ", ".join(f"TCP {one['port']} of {one['address']} ({one['how']})" for one in blocked)
    return f"the etcd of cluster {cluster}: {places}"


def _closed(hosts):
    """A line for each cluster whose etcd is not reached where it is exposed, with the hosts that dialled."""
    found = {}
    for name, variables in hosts.items():
        for cluster, blocked in _unreached(variables).items():
            asked = found.setdefault((cluster, _dialled(cluster, blocked)), {"names": [], "hows": set()})
            asked["names"].append(f"{name} ({blocked[0]['source']})")
            asked["hows"] |= {" answers there" in one["how"] for one in blocked}
    lines = []
    for (cluster, where), asked in sorted(found.items()):
        expose = f"isthmus_estate.clusters.{cluster}.expose"
        if asked["hows"] == {True}:
            remedy = f"See what has that address, and correct {expose} or what leads there."
        else:
            remedy = (
                "Let these hosts in there: a router or firewall between, a cloud's security group, the nodes' "
                f"firewall, {expose}.source_ranges (docs/ports.md); or expose it otherwise ({expose}.type)."
            )
        lines.append(f"Pending: {', '.join(sorted(asked['names']))} does not reach {where}. {remedy}")
    return lines


def _untouched(entry, hosts):
    """Why the authority in a cluster signed nothing, for which the host `entry` stands."""
    if entry not in hosts:
        return f"it is in the cluster, and {entry} is not in this run"
    return f"it is in the cluster, and the run did not get that far on {entry}"


def _owed(hosts):
    """A line for each authority that has still to revoke what removed etcd hosts hold."""
    for one in (newest_plan(hosts.values()) or {}).get("revocations", []):
        if one["departed"]:
            answer = hosts.get(one["ca_host"], {}).get("__site_revoked", {"msg": "it is not in this run"})
            yield (
                f"Pending: the authority of cluster {one['cluster']} on {one['ca_host']} has not revoked what "
                f"{', '.join(one['departed'])} held as an etcd host: {_sentence(answer)}."
            )


def _steps(hosts, recorded):
    """A line when encryption, its keys or native routing are changed and the run could not take all of the steps."""
    steps = (newest_plan(hosts.values()) or {"steps": []})["steps"]

    def without(names, group):
        return {name for name in names if group not in hosts.get(name, {}).get("group_names", ())}

    for number, step in enumerate(steps, 1):
        lacking = without(step["waits"], f"__site_done_{number - 1}")
        why = f"{_names(lacking)} did not do the one before" if lacking else ""
        if lacking and not recorded and any("__agent_result" in variables for variables in hosts.values()):
            why = "no etcd got the record of the one before"
        if not why and (lacking := without(step["proven"], f"__site_proven_{number}")):
            answers = (hosts[name].get("__site_proof", {}).get("msg") for name in sorted(lacking) if name in hosts)
            told = next((str(answer).strip().rstrip(".") for answer in answers if answer), "no answer")
            why = f"{_names(lacking)} did not prove that they reach the others the new way: {told}"
        if why:
            yield (
                f"Pending: how packets go is changed in {len(steps) + 1} steps, and step {number + 1} was not "
                f"begun: {why}. Packets of these sites go on as after step {number}, and no connection is cut."
            )
            return


def _waits(variables):
    """What the host needs of others and whom it asked, when these could not be entered; else None."""
    cluster = variables.get("isthmus_cluster")
    silent = {name: one["place"] for name, one in _lacking(variables, {}).items() if one["place"]}
    if silent:
        authorities = "authority of cluster" if len(silent) == 1 else "authorities of clusters"
        return f"the {authorities} {', '.join(sorted(silent))}", tuple(silent[name] for name in sorted(silent))
    if "still_pending" in variables.get("__pki_installed", {}) and _is(variables, "failed", "__pki_installed"):
        for answer in variables["__pki_signed"]["results"]:
            if answer.get("unreachable") and answer["pki_group"]["ca_cluster"] == cluster:
                return f"the authority of cluster {cluster}", (answer["pki_group"]["ca_host"],)
    asked = [one for one in variables.get("__etcd_entered", {}).get("results", []) if not one.get("skipped")]
    fell_silent = _is(variables, "unreachable", "__etcd_agent_rights")
    if fell_silent or (asked and not any("ping" in answer for answer in asked)):
        places = tuple(answer["etcd_place"] for answer in asked)
        return f"the etcd of cluster {cluster}, where its agent needs rights", places
    return None


def _together(waits):
    """Names of hosts by what they wait for."""
    found = {}
    for name, reason in waits.items():
        found.setdefault(reason, set()).add(name)
    return found


def _kubernetes(members):
    """A line for each cluster whose Kubernetes could not be asked: the last that was heard of it counts."""
    told = {}
    answers = [(variables, step) for step in ("__preflight_kubernetes", "__kubernetes_access") for variables in members]
    for variables, step in answers:
        result = variables.get(step) or {}
        if result.get("unreachable"):
            told[str(variables["isthmus_cluster"])] = "its isthmus_api_host cannot be entered"
        elif "pending" in result:
            told[str(variables["isthmus_cluster"])] = result["pending"]
    return [
        f"Pending: Kubernetes of cluster {name} was not asked, and what is there stays as it was: {why.rstrip('.')}."
        for name, why in sorted(told.items())
        if why
    ]


def _left(members, clusters):
    """A line for each Kubernetes cluster that left the mesh and still has what is ours."""
    why = dict.fromkeys(clusters, "the inventory has none of its etcd hosts")
    for variables in members:
        for result in (variables.get("__site_left") or {}).get("results") or []:
            name = result["site_place"]["cluster"]
            if "removed" in result and not result["pending"]:
                why.pop(name, None)
            else:
                why[name] = result.get("pending") or result.get("msg") or "no answer"
    return [
        f"Pending: Kubernetes of cluster {name} still lets the registrars in that left ({reason.rstrip('.')}). There: "
        "`kubectl delete clusterrolebinding,clusterrole,csr,service,endpointslice -A "
        "-l app.kubernetes.io/managed-by=isthmus`."
        for name, reason in sorted(why.items())
    ]


def _failures(hosts, broken):
    """A line for each host. Where a task that runs once failed, the other hosts of its batch failed with it."""
    told, with_it = [], []
    for name in sorted(broken):
        variables = hosts[name]
        if "ansible_failed_task" in variables:
            result = variables["ansible_failed_result"]
            items = [one for one in result.get("results", []) if one.get("failed")]
            why = str((items or [result])[0].get("msg") or "no reason was given").strip().splitlines()[0]
            told.append(f"Failed: {name}, in the task '{variables['ansible_failed_task']['name']}': {why}")
        elif _is(variables, "failed", "__preflight_installed"):
            told.append(f"Failed: {name}, in the installation of packages, as is told above.")
        else:
            with_it.append(name)
    return [*told, *([f"Stopped with that: {_names(with_it)}."] if with_it else [])]


def _sentence(answer):
    """What a task said, to be put into a sentence."""
    return str(answer.get("msg") or "no answer").rstrip(". \n")


def _is(variables, word, *names):
    """Whether what a task registered under one of the names is ``word``."""
    return any(name in variables and bool(variables[name].get(word)) for name in names)


def _names(hosts):
    return ", ".join(sorted(hosts)) or "none"


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"run_outcome": run_outcome}
