# SPDX-License-Identifier: BSD-2-Clause
"""Objects of ours in a Kubernetes cluster: as wanted, gone, and rolled out. Changes are told as files' are."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_access as access
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_api as kubernetes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes

POLL = 0.5
"""Seconds between looks at what is waited for."""

RESOURCES = {
    "ConfigMap": "configmaps",
    "Namespace": "namespaces",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Pod": "pods",
    "EndpointSlice": "endpointslices",
    "ResourceQuota": "resourcequotas",
    "Secret": "secrets",
    "Service": "services",
    "ServiceAccount": "serviceaccounts",
    "DaemonSet": "daemonsets",
    "Deployment": "deployments",
    "StatefulSet": "statefulsets",
    "CronJob": "cronjobs",
    "Job": "jobs",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
}

WORKLOADS = ("StatefulSet", "DaemonSet", "Deployment")


def listing(version: str, kind: str, namespace: str = "") -> str:
    """Path of the objects of a kind: those of a namespace, else all."""
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{root}{f'/namespaces/{namespace}' if namespace else ''}/{RESOURCES[kind]}"


def path_of(wanted: Mapping[str, Any]) -> str:
    metadata = wanted["metadata"]
    return f"{listing(wanted['apiVersion'], wanted['kind'], metadata.get('namespace', ''))}/{metadata['name']}"


def title(wanted: Mapping[str, Any]) -> str:
    """An object in a sentence."""
    metadata = wanted["metadata"]
    namespace = metadata.get("namespace")
    return f"{wanted['kind']} {f'{namespace}/' if namespace else ''}{metadata['name']}"


def apply(api: kubernetes.Api, changes: Changes, wanted: Mapping[str, Any], own: Mapping[str, str]) -> bool:
    """One object is as wanted; whether it had to change. Server-side apply says itself what it would change: fields
    that others have stay theirs. ApiError for one of that name that is not ours."""
    path = path_of(wanted)
    found = api.get(path)
    if found is not None and access.shown(found) == access.shown(wanted):
        return False
    if found is not None:
        whose = access.stranger(found, own)
        if whose:
            raise kubernetes.ApiError(
                f"{api.server} has a {title(wanted)} that is {whose}. It was left alone. Next: delete it there if "
                "nothing needs it, or correct isthmus_kubeconfig if this is another cluster"
            )
        after = api.apply(path, wanted, dry_run=True)
        if access.shown(after) == access.shown(found):
            return False
    else:
        after = dict(wanted)
    before, then = (json.dumps(value, indent=1, sort_keys=True) for value in (access.shown(found), access.shown(after)))
    changes.note(f"{title(wanted)} of {api.server}", before if found is not None else "", then)
    if not changes.module.check_mode:
        api.apply(path, wanted)
    return True


def prune(
    api: kubernetes.Api,
    changes: Changes,
    kinds: Iterable[tuple[str, str, str]],
    own: Mapping[str, str],
    selector: str,
    keep: Iterable[str],
) -> list[str]:
    """Of these kinds (API version, kind, namespace or empty) nothing of ours is left but `keep` (paths); what went.

    `selector` must select nothing that somebody else makes. Of Secrets only the names are read.
    """
    kept, removed = set(keep), []
    for version, kind, namespace in kinds:
        collection = listing(version, kind, namespace)
        for found in api.items(collection, metadata_only=kind == "Secret", label_selector=selector):
            path, name = access.place(listing(version, kind), found)
            if path in kept or access.stranger(found, own) or found["metadata"].get("deletionTimestamp"):
                continue
            shown = "" if kind == "Secret" else json.dumps(access.shown(found), indent=1, sort_keys=True)
            changes.note(f"{kind} {name} of {api.server}", shown or "present", "")
            removed.append(f"{kind.lower()}/{name}")
            if not changes.module.check_mode:
                api.delete(path)
    return removed


# --- roll-outs


class Unfinished(kubernetes.ApiError):
    """What is waited for did not come; the text says what is wrong there."""


def rolled_out(found: Mapping[str, Any]) -> tuple[int, int]:
    """(pods that run as a workload says and are ready, pods that it is to have). (0, 1) until its controller looked."""
    status = found.get("status") or {}
    if (status.get("observedGeneration") or 0) < found["metadata"].get("generation", 0):
        return 0, 1
    if found["kind"] == "DaemonSet":
        wanted = status.get("desiredNumberScheduled") or 0
        updated, ready = status.get("updatedNumberScheduled") or 0, status.get("numberReady") or 0
        return min(updated, ready), wanted
    wanted = (found.get("spec") or {}).get("replicas", 1)
    more = max((status.get("replicas") or 0) - wanted, 0)  # old ones that are yet to go
    return min(status.get("updatedReplicas") or 0, status.get("readyReplicas") or 0) - more, wanted


def pod_troubles(pod: Mapping[str, Any]) -> list[str]:
    """What keeps a pod from being ready, in Kubernetes' words: container, state, what it said last."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return [f"pod {name} is ending"]
    found = [
        f"pod {name}: {one.get('reason')}, {one.get('message')}"
        for one in status.get("conditions") or ()
        if one.get("type") == "PodScheduled" and one.get("status") == "False"
    ]
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for one in containers:
        if one.get("ready"):
            continue
        where = f"pod {name}, container {one['name']}"
        waiting = (one.get("state") or {}).get("waiting") or {}
        ended = (one.get("state") or {}).get("terminated") or (one.get("lastState") or {}).get("terminated") or {}
        if ended.get("reason") == "Completed":
            continue
        words = [waiting.get("reason"), waiting.get("message")] if waiting else ["runs and is not ready"]
        if ended:
            words.append(f"ended with {ended.get('exitCode')} ({ended.get('reason')})")
        found.append(f"{where}: {', '.join(word for word in words if word)}")
    return found


def troubles(api: kubernetes.Api, namespace: str, selector: str) -> str:
    """What is wrong with pods that are not ready, for the operator: states, events, last lines of their logs."""
    told = []
    pods = api.items(listing("v1", "Pod", namespace), label_selector=selector)
    bad = [pod for pod in pods if not _ready(pod)]
    for pod in bad[:3]:
        name = pod["metadata"]["name"]
        words = pod_troubles(pod) or [f"pod {name} is {(pod.get('status') or {}).get('phase')}"]
        words += [f"its event: {text}" for text in events(api, namespace, "Pod", name)]
        words += [f"it said: {text}" for text in _last_words(api, namespace, pod)]
        told.append("; ".join(words))
    if len(bad) > 3:
        told.append(f"and {len(bad) - 3} more pods")
    return ". ".join(told) or "no pod was made for it"


def _ready(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def events(api: kubernetes.Api, namespace: str, kind: str, name: str, most: int = 2) -> list[str]:
    """The newest warnings that Kubernetes has of an object."""
    selector = f"involvedObject.kind={kind},involvedObject.name={name},type=Warning"
    try:
        found = api.items(f"/api/v1/namespaces/{namespace}/events", field_selector=selector)
    except kubernetes.Forbidden:
        return []  # nothing else needs that right
    found.sort(key=lambda one: one.get("lastTimestamp") or one["metadata"].get("creationTimestamp") or "")
    return [f"{one.get('reason')}, {' '.join(str(one.get('message')).split())[:300]}" for one in found[-most:]]


def _last_words(api: kubernetes.Api, namespace: str, pod: Mapping[str, Any]) -> list[str]:
    """The last line of the log of each container that is not ready: of an error, if it is among the last."""
    found = []
    for one in (pod.get("status") or {}).get("containerStatuses") or ():
        if one.get("ready") or not one.get("containerID"):
            continue
        # Of a container that ends again and again, what the one before said.
        previous = bool((one.get("state") or {}).get("waiting"))
        path = f"{listing('v1', 'Pod', namespace)}/{pod['metadata']['name']}/log"
        try:
            lines = api.text(path, container=one["name"], previous=str(previous).lower(), tailLines=50).splitlines()
        except kubernetes.ApiError:
            continue  # its node does not answer, or the log is gone
        said = [line.strip()[:500] for line in lines if line.strip()]
        found += ([line for line in said if '"level": "error"' in line] or said)[-1:]
    return found


def selector_of(wanted: Mapping[str, Any]) -> str:
    """Selects the pods of a workload."""
    return ",".join(f"{key}={value}" for key, value in sorted(wanted["spec"]["selector"]["matchLabels"].items()))


def progress(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How far a roll-out is, for the operator."""
    there, all_of_them = rolled_out(found)
    return f"{title(wanted)}: {max(there, 0)} of {all_of_them} pods are ready"


def wait_rolled_out(
    api: kubernetes.Api, wanted: Mapping[str, Any], seconds: float, stuck: float, waited: float = 0
) -> str:
    """Until every pod of a workload runs as it says and is ready, for `seconds` at most; the progress when that is not
    so then, else nothing.

    Unfinished when no further pod became ready for `stuck` seconds, `waited` of them before this call: it says which
    pod and container keeps the others, and what it said last.
    """
    path, name, began = path_of(wanted), title(wanted), time.monotonic()
    best, since = None, began - waited
    while True:
        found = api.get(path)
        if found is None:
            raise Unfinished(f"{name} of {api.server} was deleted while it was waited for. Next: run again")
        there, all_of_them = rolled_out(found)
        if there >= all_of_them:
            return ""
        now = time.monotonic()
        if best is not None and there > best:
            since = now  # a roll-out of many nodes may take its time as long as it gets on
        best = there if best is None else max(best, there)
        if now - since > stuck:
            namespace, selector = wanted["metadata"]["namespace"], selector_of(wanted)
            raise Unfinished(
                f"{progress(wanted, found)} on {api.server}, and for {stuck:.0f} s no more became so: "
                f"{troubles(api, namespace, selector)}. Next: put that right and run again (`kubectl -n {namespace} "
                f"get pods -l {selector}`); what ran before goes on"
            )
        if now - began > seconds:
            return progress(wanted, found)
        time.sleep(POLL)
