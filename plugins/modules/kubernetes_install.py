#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The mesh inside a Kubernetes cluster: its objects are as the plan says, rolled out, or gone."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: kubernetes_install
short_description: Run the mesh inside a Kubernetes cluster
version_added: 1.0.0
description:
  - For clusters with C(control_plane=in_cluster). Runs where the API is reached from (C(delegate_to)). Applies the
    namespace C(isthmus-system), accounts, rights, Services, etcd as a StatefulSet, the registrar as a Deployment and
    the agent as a DaemonSet, server-side, waits until they are rolled out, and removes what is ours and not wanted.
  - Everything has the label C(app.kubernetes.io/managed-by=isthmus). An object of one of our names without it, or of
    another cluster or estate, is refused. Fields that others set stay theirs; fields of ours that others changed are
    put right.
  - No Secret is read or written; only whether it is there is looked at. The keys are made inside the cluster.
  - With O(state=absent) the agents' part is taken out of the nodes, then everything of this cluster that is ours is
    deleted, volumes, keys and the namespace too.
extends_documentation_fragment:
  - isthmus.mesh.attributes.supported
  - isthmus.mesh.kubernetes
author:
  - Isthmus contributors (@isthmus-mesh)
options:
  state:
    description: Whether the mesh runs there.
    type: str
    choices: [present, absent]
    default: present
  phase:
    description:
      - V(expose) applies the namespace, accounts, rights and Services, and waits for the address by which peers reach
        etcd. V(pki) has keys and certificates made inside the cluster, as O(wanted) says. V(etcd) adds etcd, which
        needs them. V(run) adds registrars and agents, and prunes.
    type: str
    choices: [expose, pki, etcd, run]
    default: run
  wanted:
    description: Which certificates there are to be, for O(phase=pki).
    type: dict
  install:
    description:
      - What the plan says of the cluster, and C(image). With O(state=absent) C(estate) and C(cluster) will do.
    type: dict
    required: true
  timeout:
    description:
      - Seconds to wait for an address, and for one more pod to become ready. A roll-out that gets on may take longer.
    type: int
    default: 300
  patience:
    description:
      - Seconds after which the module ends with RV(unfinished), to be called again, while a roll-out gets on. With V(0)
        it waits until the end.
    type: int
    default: 0
  waited:
    description: Seconds for which a roll-out has not got on before this call; they count for O(timeout).
    type: int
    default: 0
seealso:
  - module: isthmus.mesh.kubernetes_access
  - module: isthmus.mesh.kubernetes_probe
"""

EXAMPLES = r"""
- name: Etcd has an address that peers reach
  isthmus.mesh.kubernetes_install:
    phase: expose
    install: "{{ isthmus_plan.in_cluster.managed | combine({'image': 'registry.example/isthmus:1.0.0'}) }}"
    kubeconfig: ~/.kube/managed
  delegate_to: localhost
  register: exposed

- name: Cluster managed is out of the mesh
  isthmus.mesh.kubernetes_install:
    state: absent
    install: {estate: mine, cluster: managed}
  delegate_to: localhost
"""

RETURN = r"""
exposed:
  description:
    - Where peers reach etcd, and what its certificates must carry. Empty in check mode while there is no address.
  returned: success, with O(state=present) and another phase than V(pki)
  type: dict
  sample:
    endpoints: ["https://198.18.4.200:2379"]
    addresses: ["198.18.4.200"]
    names: []
    cluster_ip: 10.96.3.4
    nodes: []
issued:
  description:
    - What the cluster's PKI made that is public, its authority, requests for other clusters' authorities, certificates
      for other clusters' registrars. Empty in check mode while it made nothing.
  returned: success, with O(phase=pki)
  type: dict
unfinished:
  description: How far a roll-out is that goes on; empty when everything is rolled out.
  returned: success
  type: str
  sample: "DaemonSet isthmus-system/isthmus-agent: 40 of 200 pods are ready"
unready:
  description:
    - What is there and not ready, a line for each workload, and with O(phase=run) for certificates that nobody renewed
      or signed; nothing is waited for then.
  returned: in check mode
  type: list
  elements: str
  sample: ["DaemonSet isthmus-system/isthmus-agent: 1 of 2 pods are ready"]
removed:
  description: What was deleted.
  returned: success
  type: list
  elements: str
  sample: ["deployment/isthmus-system/isthmus-registrar"]
"""

import datetime
import json
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.isthmus.mesh.plugins.module_utils import in_cluster
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_access as access
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_api as kubernetes
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_apply as shell
from ansible_collections.isthmus.mesh.plugins.module_utils.files import Changes
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ownership

SECRETS = shell.listing("v1", "Secret", in_cluster.NAMESPACE)
SERVICES = shell.listing("v1", "Service", in_cluster.NAMESPACE)
VERBS = ("get", "list", "create", "patch", "delete")
ESCALATE = tuple(
    (verb, "rbac.authorization.k8s.io", resource, "", namespace)
    for resource, namespace in (("clusterroles", ""), ("roles", in_cluster.NAMESPACE))
    for verb in ("escalate", "bind")
)


def needed_rights():
    """What the operator must be allowed to do (docs/kubernetes-managed.md): verb, API group, resource, name,
    namespace."""
    found = [("list", "", "nodes", "", "")]
    found += [(verb, "", "namespaces", "", "") for verb in ("get", "create", "patch")]
    for version, kind, namespace in (*in_cluster.KINDS, *in_cluster.JOBS):
        group = version.rpartition("/")[0]
        found += [(verb, group, shell.RESOURCES[kind], "", namespace) for verb in VERBS]
    own = (("list", "pods"), ("create", "pods/exec"))
    return [*found, *((verb, "", resource, "", in_cluster.NAMESPACE) for verb, resource in own)]


def given_rights():
    """What the roles give that the mesh has there. Kubernetes lets nobody give what he has not himself, unless he may
    escalate."""
    own = [(verb, kind) for kind in ("secrets", "configmaps") for verb in ("create", "get", "update")]
    return [
        *((*right, "") for right in access.GIVEN),
        *((verb, "", kind, "", in_cluster.NAMESPACE) for verb, kind in own),
    ]


class Installation:
    """One call of the module. `left`: seconds until it is to end, whatever is unfinished."""

    def __init__(self, module, changes, own):
        self.module, self.changes, self.own = module, changes, own
        self.install, self.stuck = module.params["install"], module.params["timeout"]
        self.api = kubernetes.connect(module)
        patience = module.params["patience"]
        self.until = time.monotonic() + patience if patience else float("inf")
        self.unready = []

    def present(self):
        """What exit_json is given."""
        phase = self.module.params["phase"]
        first = phase == in_cluster.EXPOSE and not self.is_there()
        if first:
            self.refuse_lacking_rights()
        nodes = self.api.items("/api/v1/nodes")
        self.refuse_other_cluster(nodes)
        self.refuse_former()
        if phase == in_cluster.EXPOSE:
            self.look_at_kubelets(nodes, first)
        issued = self.issued()
        self.install = {**self.install, "list": in_cluster.revoked_list(issued)}
        service = self.api.get(f"{SERVICES}/{in_cluster.MESH}")
        chosen = in_cluster.choose_nodes(self.install, nodes, service)
        problems = in_cluster.exposure_problems(self.install, nodes, chosen)
        if problems:
            raise kubernetes.ApiError(". ".join(problems))
        for words in in_cluster.exposure_warnings(self.install):
            self.module.warn(words)
        wanted = in_cluster.objects(self.install, phase, chosen)
        self.refuse_other_size(wanted)
        unfinished = ""
        for one in wanted:
            shell.apply(self.api, self.changes, one, self.own)
            if one["kind"] in shell.WORKLOADS and not unfinished:
                # The next one waits: agents follow an etcd that answers, and a bad image ends it here.
                unfinished = self.rolled_out(one)
                if unfinished:
                    break
        removed = []
        if phase == in_cluster.RUN and not unfinished:
            keep = [shell.path_of(one) for one in wanted]
            removed = shell.prune(self.api, self.changes, in_cluster.KINDS, self.own, in_cluster.PRUNED, keep)
        exposed = self.exposed(nodes, chosen)
        if phase == in_cluster.RUN and self.module.check_mode:
            self.unready += in_cluster.pki_troubles(self.install, issued, now())
        looked = {"unready": self.unready} if self.module.check_mode else {}
        return self.changes.result(exposed=exposed, unfinished=unfinished, removed=removed, **looked)

    def pki(self):
        """What exit_json is given: the PKI's answer to what is wanted of it."""
        wanted = self.module.params["wanted"]
        for one in in_cluster.pki_objects(self.install, wanted):
            shell.apply(self.api, self.changes, one, self.own)
        issued = self.issued()
        why = in_cluster.pki_reason(issued, wanted, self.secrets(), now())
        if why:
            job = in_cluster.pki_job(self.install, wanted)
            self.changes.note(f"{shell.title(job)} of {self.api.server}", "", why)
            if not self.module.check_mode:
                issued = self.run_job(job, in_cluster.pki_digest(wanted), issued)
        return self.changes.result(issued=issued, unfinished="", removed=[])

    def issued(self):
        """The public answer of the PKI; empty when there is none."""
        place = f"{shell.listing('v1', 'ConfigMap', in_cluster.NAMESPACE)}/{in_cluster.PKI_CONFIG}"
        text = ((self.api.get(place) or {}).get("data") or {}).get(in_cluster.PKI_KEY)
        try:
            found = json.loads(text or "{}")
        except ValueError:
            return {}  # the Job makes it anew
        return found if isinstance(found, dict) else {}

    def secrets(self):
        """Names of the Secrets that are there; None where the caller may not know."""
        try:
            found = self.api.items(SECRETS, metadata_only=True)
        except kubernetes.Forbidden:
            return None
        return {one["metadata"]["name"] for one in found}

    def run_job(self, job, due, before):
        """The answer of a Job that is run now; one of that name that ended before is in the way. `before`: the last
        answer, which stays when there was nothing to be made."""
        path = shell.path_of(job)
        if self.api.get(path) is not None:
            self.api.delete(path)
            self.wait(lambda: self.api.get(path) is None, f"{shell.title(job)} of {self.api.server} cannot be deleted")
        self.api.apply(path, job)
        deadline = time.monotonic() + self.stuck
        while True:
            there, issued = self.api.get(path) or {}, self.issued()
            ended = [one for one in (there.get("status") or {}).get("conditions") or () if one["status"] == "True"]
            complete = any(one["type"] == "Complete" for one in ended)
            if issued.get("wanted") == due and (issued != before or complete):
                return issued
            failed = [one for one in ended if one["type"] in ("Failed", "FailureTarget")]
            if failed or time.monotonic() > deadline:
                reason = f"it failed ({failed[0].get('reason')})" if failed else f"it did not end within {self.stuck} s"
                told = shell.troubles(
                    self.api, in_cluster.NAMESPACE, f"batch.kubernetes.io/job-name={path.rsplit('/', maxsplit=1)[-1]}"
                )
                raise kubernetes.ApiError(
                    f"{shell.title(job)} of {self.api.server} made no certificates: {reason}: {told}. Next: put that "
                    "right and run again"
                )
            time.sleep(shell.POLL)

    def is_there(self):
        """Whether the mesh's namespace is known to be there."""
        try:
            return self.api.get(f"{shell.listing('v1', 'Namespace')}/{in_cluster.NAMESPACE}") is not None
        except kubernetes.Forbidden:
            return False

    def look_at_kubelets(self, nodes, first):
        """A cluster that is new is refused; nodes that come later take nothing from the others."""
        old = in_cluster.old_kubelets(nodes)
        if old and first:
            raise kubernetes.ApiError(
                f"{old}. Nothing was changed there. Next: bring these nodes up to a newer Kubernetes, or take them out "
                "of the cluster, and run again"
            )
        if old:
            self.module.warn(f"Kubernetes of cluster {self.install['cluster']}: {old}.")

    def refuse_lacking_rights(self):
        """Before a first run changes anything: all that lacks at once."""
        missing = [right for right in needed_rights() if not self.api.allowed(*right)]
        given = [right for right in given_rights() if not self.api.allowed(*right)]
        if given and not all(self.api.allowed(*right) for right in ESCALATE):
            missing += given
        if not missing:
            return
        verbs = {}
        for verb, group, resource, _name, namespace in missing:
            verbs.setdefault((group, resource, namespace), []).append(verb)
        words = [
            access.right_words((", ".join(dict.fromkeys(some)), group, resource, ""))
            + (f" in {namespace}" if namespace else "")
            for (group, resource, namespace), some in verbs.items()
        ]
        raise kubernetes.ApiError(
            f"the user of that kubeconfig may not do all that runs the mesh in {self.api.server}. Nothing was changed "
            f"there. It lacks: {'; '.join(words)}. Next: use one with these rights (docs/kubernetes-managed.md), or "
            "grant them, and run again"
        )

    def refuse_other_cluster(self, nodes):
        try:
            own = self.api.get("/api/v1/namespaces/default/services/kubernetes")
        except kubernetes.Forbidden:
            own = None  # nothing else needs that right
        address = ((own or {}).get("spec") or {}).get("clusterIP") or ""
        wrong = in_cluster.wrong_cluster(self.install, nodes, address)
        if wrong:
            raise kubernetes.ApiError(
                f"{self.api.server} is another cluster, or its ranges are not the declared ones: {wrong}. Next: set "
                "isthmus_kubeconfig and isthmus_kubeconfig_context to the cluster's own, or correct the ranges"
            )

    def refuse_former(self):
        """The estate record has a mesh in this cluster that is not there: without its authority's key nothing of it can
        go on, and another authority would be refused by everybody who trusts the former."""
        name, key = self.install["cluster"], in_cluster.SECRETS[0]
        if name not in self.install["trust"]:
            return  # it is new
        issued = self.issued()
        if in_cluster.another_authority(self.install, issued):
            raise kubernetes.ApiError(
                f"the mesh in {self.api.server} has another certificate authority than the estate record has for "
                f"cluster {name}, which every host trusts. Nothing was changed there. Next: set isthmus_kubeconfig and "
                f"isthmus_kubeconfig_context to the cluster's own, if this is another one; else {self.anew(name)}"
            )
        if issued:
            return
        if self.api.get(f"{shell.listing('v1', 'Namespace')}/{in_cluster.NAMESPACE}") is not None:
            there = self.secrets()
            if there is None or key in there:
                return  # Secrets were put back, or the Job says that they lack
        raise kubernetes.ApiError(
            f"the estate record says that the mesh runs in cluster {name}, and {self.api.server} has nothing of it: no "
            f"Secret {in_cluster.NAMESPACE}/{key}, the authority that every host trusts for this cluster. Nothing was "
            "changed there. Why: Kubernetes was made anew, or the mesh was taken out of it, while the others went on "
            "knowing it; or this is another cluster. Next: set isthmus_kubeconfig and isthmus_kubeconfig_context to "
            f"the cluster's own, if this is another one; else {self.anew(name)}; with a backup of the Secrets of "
            f"{in_cluster.NAMESPACE} put them back instead, and run again"
        )

    @staticmethod
    def anew(name):
        return (
            f"take the former one out of the mesh: write `state: absent` into isthmus_estate.clusters.{name}, run "
            "`ansible-playbook isthmus.mesh.site`, take that line out, and run it again, which joins this one"
        )

    def refuse_other_size(self, wanted):
        """Members are neither added nor taken out by a number: the ones left behind would still count in raft."""
        for one in wanted:
            found = self.api.get(shell.path_of(one)) if one["kind"] == "StatefulSet" else None
            before = (found or {}).get("spec", {}).get("replicas", 0)
            if before and before != one["spec"]["replicas"]:
                raise kubernetes.ApiError(
                    f"etcd of {self.api.server} has {before} members and is to have {one['spec']['replicas']}. An etcd "
                    "in a cluster keeps its size. Next: set etcd.replicas of the cluster back, or take the cluster out "
                    "of the mesh and join it anew"
                )

    def rolled_out(self, wanted):
        if self.module.check_mode:
            found = self.api.get(shell.path_of(wanted))
            there, all_of_them = shell.rolled_out(found) if found else (0, 0)
            self.unready += [shell.progress(wanted, found)] if there < all_of_them else []
            return ""
        waited = self.module.params["waited"]
        return shell.wait_rolled_out(self.api, wanted, self.until - time.monotonic(), self.stuck, waited)

    def exposed(self, nodes, chosen):
        """Where peers reach etcd; waits for the address."""
        deadline = time.monotonic() + self.stuck
        while True:
            client, mesh = (self.api.get(f"{SERVICES}/{name}") for name in (in_cluster.CLIENT, in_cluster.MESH))
            found = in_cluster.exposed(self.install, client or {}, mesh, nodes, chosen) if mesh else None
            if found is not None or self.module.check_mode:
                return found or {}
            if time.monotonic() > deadline:
                told = shell.events(self.api, in_cluster.NAMESPACE, "Service", in_cluster.MESH)
                said = f"Kubernetes says of it: {'; '.join(told)}" if told else "Kubernetes says nothing of why"
                raise kubernetes.ApiError(
                    f"The Service {in_cluster.NAMESPACE}/{in_cluster.MESH} of {self.api.server} got no address within "
                    f"{self.stuck} s, so that peers cannot reach etcd. {said}. Next: see that something serves "
                    "Services of the type LoadBalancer in this cluster (the provider's controller, MetalLB), or set "
                    "expose.type of the cluster to node_port or host, and run again"
                )
            time.sleep(shell.POLL)

    def absent(self):
        """Nothing of ours is left, in the cluster and on its nodes."""
        unfinished = "" if self.module.check_mode else self.clean_nodes()
        if unfinished:
            return self.changes.result(unfinished=unfinished, removed=[])
        place = f"{shell.listing('v1', 'Namespace')}/{in_cluster.NAMESPACE}"
        namespace = self.api.get(place)
        removed = []
        for kinds, selector in (
            (in_cluster.KINDS, in_cluster.SELECTOR),
            (in_cluster.LEFT, access.SELECTOR),
            # What registrars wrote, when they can write no more.
            ((("v1", "Service", ""), ("discovery.k8s.io/v1", "EndpointSlice", "")), access.SELECTOR),
        ):
            removed += shell.prune(self.api, self.changes, kinds, self.own, selector, ())
        if namespace is not None and not access.stranger(namespace, self.own):
            self.changes.note(f"Namespace {in_cluster.NAMESPACE} of {self.api.server}", "present", "")
            removed.append(f"namespace/{in_cluster.NAMESPACE}")
            if not self.module.check_mode:
                self.api.delete(place)
                self.gone(place)
        return self.changes.result(unfinished="", removed=removed)

    def clean_nodes(self):
        """The agents are gone, and what they left on nodes; else how far that is."""
        daemons = shell.listing("apps/v1", "DaemonSet", in_cluster.NAMESPACE)
        agent, before = (self.api.get(f"{daemons}/{name}") for name in (in_cluster.AGENT, in_cluster.CLEANUP))
        source = next((one for one in (agent, before) if one and not access.stranger(one, self.own)), None)
        if source is None:
            return ""
        clean = in_cluster.cleanup(self.install, source)
        path = shell.path_of(clean)
        if agent is not None:
            # First it is there, on no node: it tells a run after one that was interrupted what to clean with.
            self.api.apply(path, in_cluster.cleanup(self.install, source, suspended=True))
            self.api.delete(f"{daemons}/{in_cluster.AGENT}")
        pods, agents = shell.listing("v1", "Pod", in_cluster.NAMESPACE), f"{ownership.COMPONENT}=agent"
        self.wait(
            lambda: not self.api.items(pods, label_selector=agents),
            f"Agents of {self.api.server} did not end within {self.stuck} s. Next: see `kubectl -n "
            f"{in_cluster.NAMESPACE} get pods -o wide` for nodes that do not answer, delete those nodes or bring them "
            "back, and run again",
        )
        self.changes.changed = True
        self.api.apply(path, clean)
        return self.rolled_out(clean)

    def gone(self, place):
        self.wait(
            lambda: self.api.get(place) is None,
            f"The namespace {in_cluster.NAMESPACE} of {self.api.server} is being deleted for {self.stuck} s. Next: see "
            f"`kubectl get namespace {in_cluster.NAMESPACE} -o yaml` for what keeps it, and run again",
        )

    def wait(self, done, words):
        deadline = time.monotonic() + self.stuck
        while not done():
            if time.monotonic() > deadline:
                raise kubernetes.ApiError(words)
            time.sleep(shell.POLL)


def now():
    return datetime.datetime.now(datetime.timezone.utc)


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "phase": {"type": "str", "choices": list(in_cluster.PHASES), "default": in_cluster.RUN},
            "wanted": {"type": "dict"},
            "install": {"type": "dict", "required": True},
            "timeout": {"type": "int", "default": 300},
            "patience": {"type": "int", "default": 0},
            "waited": {"type": "int", "default": 0},
            **kubernetes.ARGUMENTS,
        },
        required_if=[("phase", in_cluster.WITH_PKI, ["wanted"])],
        supports_check_mode=True,
    )
    install, state = module.params["install"], module.params["state"]
    changes = Changes(module)
    try:
        work = Installation(module, changes, access.labels(install["estate"], install["cluster"]))
        if state == "absent":
            result = work.absent()
        else:
            result = work.pki() if module.params["phase"] == in_cluster.WITH_PKI else work.present()
    except kubernetes.ApiError as exc:
        changed = changes.changed and not module.check_mode
        module.fail_json(msg=f"Kubernetes of cluster {install['cluster']}: {exc}.", changed=changed)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
