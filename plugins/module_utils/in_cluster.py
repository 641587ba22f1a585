# SPDX-License-Identifier: BSD-2-Clause
"""The mesh inside a Kubernetes cluster whose nodes nobody enters: its objects, and how peers reach its etcd. Pure.

An installation (`install`) is what the plan says of the cluster, and the image:

    {"estate", "cluster", "image",
     "etcd": {"replicas", "storage_class": name or null, "storage": quantity, "quota_bytes", "token"},
     "expose": {"type", "provider", "scope", "source_ranges", "annotations", "node_port": number or null, "hosts"},
     "document": what agents and registrars read, "trust": {cluster: PEM},
     "revoked": {"hosts", "names"}: whose certificates are refused, left out where there are none,
     "list": what `revoked_list` says of the list that etcd has}

Shapes: Kubernetes' API reference, apps/v1, core/v1, policy/v1, rbac.authorization.k8s.io/v1. Annotations of load
balancers: the providers' own documentation, named at `INTERNAL`.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime, timedelta
from ipaddress import IPv4Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import etcd_unit
from ansible_collections.isthmus.mesh.plugins.module_utils import kubernetes_access as access
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import jsontext, ownership
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh.record import RecordError, parse_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Object = dict[str, Any]  # of Kubernetes, as JSON

NAMESPACE = "isthmus-system"
ETCD, AGENT, REGISTRAR, PKI = "isthmus-etcd", "isthmus-agent", "isthmus-registrar", "isthmus-pki"
"""Names of the workloads' objects and of their ServiceAccounts."""
CLIENT, MESH = "isthmus-etcd-client", "isthmus-etcd-mesh"
"""Services of etcd: for this cluster's agents and registrars, and for peers."""
SPEC, TRUST = "isthmus-spec", "isthmus-trust"
"""ConfigMaps: what the plan says of the cluster, and every cluster's authority."""
SECRETS = ("isthmus-ca", "isthmus-etcd-tls", "isthmus-agent-tls", "isthmus-registrar-tls")
PKI_CONFIG, PKI_KEY = "isthmus-pki", "issued.json"
"""ConfigMap by which the PKI's Job answers, and the key in it."""
PKI_WANTED = "isthmus-pki-wanted"
"""ConfigMap that says what certificates there are to be."""
NODES = "isthmus.io/nodes"
"""Annotation of the Service `MESH`: nodes whose addresses peers have, so that they stay the same."""
DIGEST = "isthmus.io/digest"
"""Annotation of pods: of what they read at their start only, so that a change of it replaces them."""

CLIENT_PORT, PEER_PORT, METRICS_PORT = 2379, 2380, 9968
USER = 10073
"""uid and gid of etcd and registrars, which need no root; no user of a distribution has it."""
PROGRAMS = "/opt/isthmus/current/bin"
PEER_CN = "isthmus-etcd-peer"
"""Common name of members' certificates for each other, as on machines."""

EXPOSE, WITH_PKI, WITH_ETCD, RUN = "expose", "pki", "etcd", "run"
PHASES = (EXPOSE, WITH_PKI, WITH_ETCD, RUN)

OLDEST_KUBELET = (1, 30)
"""The first that takes `securityContext.appArmorProfile` (Kubernetes' API reference, core/v1)."""

LOAD_BALANCER, NODE_PORT, HOST = "load_balancer", "node_port", "host"

_AWS = "service.beta.kubernetes.io/aws-load-balancer-"
INTERNAL: Mapping[str, Mapping[str, str]] = {
    # AWS: "internal" for the controller that is a part of Kubernetes, "scheme" for AWS Load Balancer Controller.
    "aws": {f"{_AWS}type": "nlb", f"{_AWS}internal": "true", f"{_AWS}scheme": "internal"},
    # Google: without global access only clients of the same region would reach it.
    "google": {
        "networking.gke.io/load-balancer-type": "Internal",
        "networking.gke.io/internal-load-balancer-allow-global-access": "true",
    },
    "azure": {"service.beta.kubernetes.io/azure-load-balancer-internal": "true"},
}
"""Annotations that keep a load balancer out of the internet, by provider. MetalLB and others have only pools of
addresses, which the operator names by annotations of his own."""

EXTERNAL: Mapping[str, Mapping[str, str]] = {"aws": {f"{_AWS}type": "nlb", f"{_AWS}scheme": "internet-facing"}}
"""Annotations that a load balancer in the internet needs; others are there without."""


def server_names(replicas: int) -> list[str]:
    """DNS names of members and of etcd's Services, for its certificates."""
    members = [member_name(number) for number in range(replicas)]
    return [*members, *(f"{name}.{NAMESPACE}.svc" for name in (CLIENT, MESH))]


def member_name(number: int) -> str:
    return f"{ETCD}-{number}.{ETCD}.{NAMESPACE}.svc"


def labels(install: Mapping[str, Any], component: str) -> dict[str, str]:
    """Of an object of the control plane: the component tells it from what registrars write."""
    own = ownership.labels(install["estate"], install["cluster"])
    return {**own, ownership.COMPONENT: component}


def objects(install: Mapping[str, Any], phase: str, nodes: Iterable[str] = ()) -> list[Object]:
    """The objects that are there after `phase`, in the order in which they are applied.

    `nodes`: those whose addresses peers have (`expose.type` `node_port` and `host`).
    """
    found = [
        _namespace(install),
        _quota(install),
        *(_account(install, name) for name in (ETCD, AGENT, REGISTRAR, PKI)),
        *_registrar_rights(install),
        *_pki_rights(install),
        _members_service(install),
        _client_service(install),
        mesh_service(install, nodes),
    ]
    if phase in (WITH_ETCD, RUN):
        found += [_config(install, TRUST, trust_files(install)), _budget(install, ETCD), _etcd(install, nodes)]
    if phase == RUN:
        spec = {"cluster.json": json.dumps(install["document"], indent=1, sort_keys=True) + "\n"}
        found += [_config(install, SPEC, spec), _budget(install, REGISTRAR), _registrar(install), _agent(install)]
    return found


def trust_files(install: Mapping[str, Any]) -> dict[str, str]:
    return {f"{cluster}.crt": pem for cluster, pem in sorted(install["trust"].items())}


def digest(*parts: Any) -> str:
    """16 hexadecimal digits of what pods read at their start."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _object(install: Mapping[str, Any], kind: str, version: str, name: str, component: str, **rest: Any) -> Object:
    metadata: Object = {"name": name, "labels": labels(install, component)}
    if kind not in ("Namespace", "ClusterRole", "ClusterRoleBinding"):
        metadata["namespace"] = NAMESPACE
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}


# --- the place, accounts and rights


def _namespace(install: Mapping[str, Any]) -> Object:
    made = _object(install, "Namespace", "v1", NAMESPACE, "cluster")
    # Agents are of the host's network and load programs into its kernel.
    made["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "privileged"
    return made


def _quota(install: Mapping[str, Any]) -> Object:
    """Some providers admit pods of the system's priority only where a quota says how many."""
    selector = {
        "matchExpressions": [
            {
                "scopeName": "PriorityClass",
                "operator": "In",
                "values": ["system-cluster-critical", "system-node-critical"],
            }
        ]
    }
    spec = {"hard": {"pods": "15000"}, "scopeSelector": selector}
    return _object(install, "ResourceQuota", "v1", "isthmus", "cluster", spec=spec)


def _account(install: Mapping[str, Any], name: str) -> Object:
    # Who speaks to the API says so in its pod.
    return _object(install, "ServiceAccount", "v1", name, name.partition("-")[2], automountServiceAccountToken=False)


def _role(install: Mapping[str, Any], name: str, component: str, rules: list[Object], everywhere: bool) -> list[Object]:
    group = "rbac.authorization.k8s.io"
    kind = "ClusterRole" if everywhere else "Role"
    return [
        _object(install, kind, f"{group}/v1", name, component, rules=rules),
        _object(
            install,
            f"{kind}Binding",
            f"{group}/v1",
            name,
            component,
            roleRef={"apiGroup": group, "kind": kind, "name": name},
            subjects=[{"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}],
        ),
    ]


def _registrar_rights(install: Mapping[str, Any]) -> list[Object]:
    return _role(install, REGISTRAR, "registrar", access.rules(), True)


def _pki_rights(install: Mapping[str, Any]) -> list[Object]:
    """Of the Job that makes keys: the Secrets that it writes, by name, and the ConfigMap by which it answers.

    RBAC cannot name what is to be created.
    """
    rules: list[Object] = []
    for resource, names in (("secrets", SECRETS), ("configmaps", (PKI_CONFIG,))):
        rules += [
            {"apiGroups": [""], "resources": [resource], "verbs": ["create"]},
            {"apiGroups": [""], "resources": [resource], "resourceNames": [*names], "verbs": ["get", "update"]},
        ]
    return _role(install, PKI, "pki", rules, False)


# --- Services


def _service(install: Mapping[str, Any], name: str, **spec: Any) -> Object:
    return _object(install, "Service", "v1", name, "etcd", spec={"selector": _selector("etcd"), **spec})


def _port(name: str, port: int, **more: Any) -> Object:
    return {"name": name, "port": port, "targetPort": port, "protocol": "TCP", **more}


def _members_service(install: Mapping[str, Any]) -> Object:
    ports = [_port("client", CLIENT_PORT), _port("peer", PEER_PORT)]
    # Members must find each other before one of them can be ready.
    return _service(install, ETCD, clusterIP="None", publishNotReadyAddresses=True, ports=ports)


def _client_service(install: Mapping[str, Any]) -> Object:
    return _service(install, CLIENT, type="ClusterIP", ports=[_port("client", CLIENT_PORT)])


def mesh_service(install: Mapping[str, Any], nodes: Iterable[str] = ()) -> Object:
    """The Service that peers' registrars reach."""
    expose = install["expose"]
    port = _port("client", CLIENT_PORT)
    annotations = dict(expose["annotations"])
    spec: Object
    if expose["type"] == LOAD_BALANCER:
        given = (INTERNAL if expose["scope"] == "internal" else EXTERNAL).get(expose["provider"], {})
        annotations = {**given, **annotations}
        spec = {"type": "LoadBalancer", "ports": [port]}
        if expose["source_ranges"]:
            spec["loadBalancerSourceRanges"] = list(expose["source_ranges"])
    elif expose["type"] == NODE_PORT:
        spec = {"type": "NodePort", "ports": [port]}
        if expose["node_port"]:
            spec["ports"] = [{**port, "nodePort": expose["node_port"]}]
    else:
        spec = {"type": "ClusterIP", "ports": [port]}  # pods have their hosts' addresses
    if expose["type"] != LOAD_BALANCER and nodes:
        annotations[NODES] = ",".join(sorted(nodes))
    made = _service(install, MESH, **spec)
    if annotations:
        made["metadata"]["annotations"] = annotations
    return made


# --- workloads


def _config(install: Mapping[str, Any], name: str, data: Mapping[str, str]) -> Object:
    return _object(install, "ConfigMap", "v1", name, "cluster", data=dict(data))


def _selector(component: str) -> dict[str, str]:
    return {ownership.COMPONENT: component}


def _budget(install: Mapping[str, Any], name: str) -> Object:
    component = name.partition("-")[2]
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": _selector(component)}}
    return _object(install, "PodDisruptionBudget", "policy/v1", name, component, spec=spec)


def _field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


_ENVIRONMENT = (
    _field("ISTHMUS_NODE", "spec.nodeName"),
    _field("ISTHMUS_POD", "metadata.name"),
    _field("ISTHMUS_HOST_IP", "status.hostIP"),
)


def _secret_volume(name: str, mode: int) -> Object:
    return {"name": "pki", "secret": {"secretName": name, "defaultMode": mode}}


def _config_volume(name: str, config: str) -> Object:
    return {"name": name, "configMap": {"name": config}}


def _host_volume(name: str, path: str, kind: str) -> Object:
    return {"name": name, "hostPath": {"path": path, "type": kind}}


def _mount(name: str, path: str, **more: Any) -> Object:
    return {"name": name, "mountPath": path, **more}


_PKI_MOUNTS = (
    _mount("pki", etcd_unit.PKI, readOnly=True),
    _mount("trust", f"{etcd_unit.PKI}/trust", readOnly=True),
)

_UNPRIVILEGED: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_UNPRIVILEGED_POD: Object = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _template(install: Mapping[str, Any], component: str, account: str, read: str, pod: Object) -> Object:
    return {
        "metadata": {"labels": labels(install, component), "annotations": {DIGEST: read}},
        "spec": {
            "serviceAccountName": account,
            "enableServiceLinks": False,
            "nodeSelector": {"kubernetes.io/os": "linux"},
            **pod,
        },
    }


def _apart(component: str) -> Object:
    """A term of affinity: not beside another pod of this component."""
    return {"labelSelector": {"matchLabels": _selector(component)}, "topologyKey": "kubernetes.io/hostname"}


def etcd_environment(install: Mapping[str, Any]) -> list[Object]:
    """Settings of a member. `$(...)` is put in by the kubelet.

    A member that lost its volume beside others that have theirs is refused by these: its name is a member already.
    """
    etcd = install["etcd"]
    own = f"$(ISTHMUS_POD).{ETCD}.{NAMESPACE}.svc"
    members = ",".join(f"{ETCD}-{n}=https://{member_name(n)}:{PEER_PORT}" for n in range(etcd["replicas"]))
    values = {
        "ETCD_NAME": "$(ISTHMUS_POD)",
        "ETCD_DATA_DIR": f"{etcd_unit.DATA}/data",
        "ETCD_LISTEN_CLIENT_URLS": f"https://0.0.0.0:{CLIENT_PORT}",
        "ETCD_LISTEN_PEER_URLS": f"https://0.0.0.0:{PEER_PORT}",
        "ETCD_ADVERTISE_CLIENT_URLS": f"https://{own}:{CLIENT_PORT}",
        "ETCD_INITIAL_ADVERTISE_PEER_URLS": f"https://{own}:{PEER_PORT}",
        "ETCD_INITIAL_CLUSTER": members,
        "ETCD_INITIAL_CLUSTER_STATE": "new",
        "ETCD_INITIAL_CLUSTER_TOKEN": etcd["token"],
        **etcd_unit.security(install["cluster"], PEER_CN),
        # A CNI may translate the addresses of pods on their way to other nodes. The certificate's name tells a member.
        "ETCD_EXPERIMENTAL_PEER_SKIP_CLIENT_SAN_VERIFICATION": "true",
        "ETCD_ENABLE_GRPC_GATEWAY": "false",
        "ETCD_QUOTA_BACKEND_BYTES": str(etcd["quota_bytes"]),
        **etcd_unit.TUNING,
    }
    return [*_ENVIRONMENT, *({"name": name, "value": value} for name, value in values.items())]


def etcd_health(cluster: str) -> list[str]:
    """The command that asks a member for its health: etcd refuses the peer's certificate the read, which counts as an
    answer."""
    return [
        "/usr/bin/etcdctl",
        f"--endpoints=https://127.0.0.1:{CLIENT_PORT}",
        f"--cacert={etcd_unit.PKI}/trust/{cluster}.crt",
        f"--cert={etcd_unit.PKI}/etcd-peer.crt",
        f"--key={etcd_unit.PKI}/etcd-peer.key",
        "endpoint",
        "health",
    ]


def _etcd(install: Mapping[str, Any], nodes: Iterable[str]) -> Object:
    etcd, on_hosts = install["etcd"], install["expose"]["type"] == HOST
    affinity: Object = {
        "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [_apart("etcd")]},
    }
    if on_hosts:
        # By name: a node's label kubernetes.io/hostname may be another.
        fields = ({"key": "metadata.name", "operator": "In", "values": [name]} for name in sorted(nodes))
        terms = [{"matchFields": [one]} for one in fields]
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    health = {"exec": {"command": etcd_health(install["cluster"])}, "timeoutSeconds": 5}
    container = {
        "name": "etcd",
        "image": install["image"],
        "command": ["/usr/bin/etcd"],
        "env": etcd_environment(install),
        "ports": [
            _container_port(name, port, on_hosts) for name, port in (("client", CLIENT_PORT), ("peer", PEER_PORT))
        ],
        "readinessProbe": {**health, "periodSeconds": 10, "failureThreshold": 3},
        # It says nothing of raft: a member without a leader must not be killed for it.
        "livenessProbe": {"tcpSocket": {"port": CLIENT_PORT}, "periodSeconds": 10, "failureThreshold": 6},
        "startupProbe": {"tcpSocket": {"port": CLIENT_PORT}, "periodSeconds": 2, "failureThreshold": 150},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "securityContext": _UNPRIVILEGED,
        # Ansible's modules write the record in here.
        "volumeMounts": [*_PKI_MOUNTS, _mount("data", etcd_unit.DATA), _mount("tmp", "/tmp")],  # noqa: S108
    }
    pod = {
        "automountServiceAccountToken": False,
        "hostNetwork": on_hosts,
        "dnsPolicy": "ClusterFirstWithHostNet" if on_hosts else "ClusterFirst",
        "priorityClassName": "system-cluster-critical",
        "terminationGracePeriodSeconds": 30,
        "securityContext": _UNPRIVILEGED_POD,
        "affinity": affinity,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": _selector("etcd")},
            }
        ],
        "containers": [container],
        "volumes": [
            _secret_volume("isthmus-etcd-tls", 0o440),
            _config_volume("trust", TRUST),
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    claim: Object = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": etcd["storage"]}},
    }
    if etcd["storage_class"]:
        claim["storageClassName"] = etcd["storage_class"]
    # etcd reads certificates and the list of revoked ones at every handshake, its authority at the start only. Members
    # start anew for another list all the same: that ends the connections of those who are in it.
    more = [install["list"]] if install.get("list") else []
    read = digest(install["trust"].get(install["cluster"]), *more)
    spec = {
        "replicas": etcd["replicas"],
        "serviceName": ETCD,
        "podManagementPolicy": "Parallel",  # none is ready before the majority runs
        "updateStrategy": {"type": "RollingUpdate"},
        "selector": {"matchLabels": _selector("etcd")},
        "template": _template(install, "etcd", ETCD, read, pod),
        "volumeClaimTemplates": [{"metadata": {"name": "data", "labels": labels(install, "etcd")}, "spec": claim}],
    }
    return _object(install, "StatefulSet", "apps/v1", ETCD, "etcd", spec=spec)


def _container_port(name: str, port: int, on_hosts: bool) -> Object:
    # Kubernetes would write a host's port itself, and leave it when the pod is of the host's network no more.
    host = {"hostPort": port} if on_hosts else {}
    return {"name": name, "containerPort": port, "protocol": "TCP", **host}


def _registrar(install: Mapping[str, Any]) -> Object:
    container = {
        "name": "registrar",
        "image": install["image"],
        "command": [f"{PROGRAMS}/isthmus-registrar", "--config", "/etc/isthmus/cluster.json"],
        "env": [*_ENVIRONMENT, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "resources": {"requests": {"cpu": "100m", "memory": "192Mi"}},
        "securityContext": _UNPRIVILEGED,
        "volumeMounts": [
            _mount("spec", "/etc/isthmus", readOnly=True),
            *_PKI_MOUNTS,
            _mount("memory", "/var/lib/isthmus/registrar"),
        ],
    }
    apart = {"weight": 100, "podAffinityTerm": _apart("registrar")}
    pod = {
        "automountServiceAccountToken": True,
        # From a pod's address the way to peers' hosts would lead over the mesh that it makes.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "priorityClassName": "system-cluster-critical",
        "terminationGracePeriodSeconds": 15,
        "securityContext": _UNPRIVILEGED_POD,
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [apart]}},
        "containers": [container],
        "volumes": [
            _config_volume("spec", SPEC),
            _secret_volume("isthmus-registrar-tls", 0o440),
            _config_volume("trust", TRUST),
            {"name": "memory", "emptyDir": {}},
        ],
    }
    spec = {
        "replicas": 2,
        "selector": {"matchLabels": _selector("registrar")},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
        "template": _template(install, "registrar", REGISTRAR, digest(install["document"], install["trust"]), pod),
    }
    return _object(install, "Deployment", "apps/v1", REGISTRAR, "registrar", spec=spec)


AGENT_CAPABILITIES: Mapping[str, str] = {
    "BPF": "loads the programs and makes their maps",
    "PERFMON": "programs may read what tracing programs may",
    "NET_ADMIN": "attaches programs; sets up the overlay's device, addresses, routes, rules; ends sockets",
    "NET_RAW": "probes other nodes (ICMP)",
    "SYS_ADMIN": "enters the network namespaces of pods, to end sockets whose backend is gone; reads the names of "
    "others' programs at its hooks",
}
"""What an agent's container may do beyond a user without rights, and why. It is not privileged."""

AGENT_PATHS: tuple[tuple[str, str, str, Mapping[str, Any]], ...] = (
    ("bpf", "/sys/fs/bpf", "Directory", {"mountPropagation": "HostToContainer"}),
    ("cgroup", "/sys/fs/cgroup", "Directory", {"mountPropagation": "HostToContainer", "readOnly": True}),
    ("namespaces", "/run/netns", "DirectoryOrCreate", {"mountPropagation": "HostToContainer", "readOnly": True}),
    ("run", "/run/isthmus", "DirectoryOrCreate", {}),
    ("state", "/var/lib/isthmus/agent", "DirectoryOrCreate", {}),
)
"""Directories of the node in an agent's container: volume, path, type of hostPath, options of the mount. Pinned maps
and programs (they outlive the pod), the cgroups that programs are attached to, pods' network namespaces, the status
socket, the state from which it starts without etcd."""


def _agent(install: Mapping[str, Any]) -> Object:
    # The kubelet asks from the node, whose loopback this is.
    def asks(path: str) -> Object:
        return {"httpGet": {"host": "127.0.0.1", "port": METRICS_PORT, "path": path}, "timeoutSeconds": 10}

    container = {
        "name": "agent",
        "image": install["image"],
        "command": [f"{PROGRAMS}/isthmusd", "--config", "/etc/isthmus/cluster.json"],
        "env": [*_ENVIRONMENT, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "readinessProbe": {**asks("/ready"), "periodSeconds": 5, "failureThreshold": 6},
        "livenessProbe": {**asks("/metrics"), "periodSeconds": 15, "failureThreshold": 4},
        "startupProbe": {**asks("/metrics"), "periodSeconds": 2, "failureThreshold": 150},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}},
        "securityContext": {
            "runAsUser": 0,
            "privileged": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], "add": sorted(AGENT_CAPABILITIES)},
            "seccompProfile": {"type": "RuntimeDefault"},
            # The profiles of container engines deny writing below /sys, where maps are pinned.
            "appArmorProfile": {"type": "Unconfined"},
            "seLinuxOptions": {"type": "spc_t"},
        },
        "volumeMounts": [
            _mount("spec", "/etc/isthmus", readOnly=True),
            *_PKI_MOUNTS,
            *(_mount(name, path, **options) for name, path, _kind, options in AGENT_PATHS),
        ],
    }
    pod = {
        "automountServiceAccountToken": False,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "priorityClassName": "system-node-critical",
        "terminationGracePeriodSeconds": 15,
        "tolerations": [{"operator": "Exists"}],
        "containers": [container],
        "volumes": [
            _config_volume("spec", SPEC),
            _secret_volume("isthmus-agent-tls", 0o400),
            _config_volume("trust", TRUST),
            *(_host_volume(name, path, kind) for name, path, kind, _options in AGENT_PATHS),
        ],
    }
    spec = {
        "selector": {"matchLabels": _selector("agent")},
        # The datapath goes on while its agent is replaced.
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}},
        "template": _template(install, "agent", AGENT, digest(install["document"]), pod),
    }
    return _object(install, "DaemonSet", "apps/v1", AGENT, "agent", spec=spec)


# --- keys and certificates


def pki_digest(wanted: Mapping[str, Any]) -> str:
    """By which the Job's answer says what it is the answer to."""
    return hashlib.sha256(jsontext.canonical(wanted).encode()).hexdigest()


def pki_objects(install: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Object]:
    """What certificates there are to be, and the CronJob that renews them: a cluster that nobody looks after for a year
    goes on."""
    spec = {
        "schedule": "17 3 * * 0",
        "concurrencyPolicy": "Forbid",
        "successfulJobsHistoryLimit": 1,
        "failedJobsHistoryLimit": 1,
        "jobTemplate": {"metadata": {"labels": labels(install, "pki")}, "spec": _pki_job_spec(install)},
    }
    config = _object(install, "ConfigMap", "v1", PKI_WANTED, "pki", data={"wanted.json": jsontext.canonical(wanted)})
    return [config, _object(install, "CronJob", "batch/v1", PKI, "pki", spec=spec)]


def pki_job(install: Mapping[str, Any], wanted: Mapping[str, Any]) -> Object:
    """The Job that makes them now."""
    name = f"{PKI}-{pki_digest(wanted)[:12]}"
    return _object(install, "Job", "batch/v1", name, "pki", spec=_pki_job_spec(install))


def pki_reason(
    issued: Mapping[str, Any], wanted: Mapping[str, Any], secrets: Iterable[str] | None, now: datetime
) -> str:
    """Why the Job is to run; empty when nothing is to be made. `issued`: its last answer; `secrets`: the names of those
    that are there, None where that is not known."""
    if issued.get("wanted") != pki_digest(wanted):
        return "keys and certificates as they are wanted"
    lost = [name for name in SECRETS if secrets is not None and name not in secrets]
    if lost:
        return f"keys and certificates anew: Secret {', '.join(lost)} is not there"
    due = _renewal(issued)
    return f"certificates renewed that are to be since {issued['renew']}" if due is not None and due < now else ""


def _renewal(issued: Mapping[str, Any]) -> datetime | None:
    """When the first certificate is to be renewed, as far as the Job's answer says so."""
    try:
        return parse_time(issued["renew"])
    except (KeyError, TypeError, RecordError):
        return None


UNRENEWED = timedelta(days=15)
"""After so long the CronJob, which runs weekly, has missed its turn."""


def revoked_list(issued: Mapping[str, Any]) -> str:
    """Which list of revoked certificates etcd has, by the Job's answer; empty while nothing was revoked."""
    return str((issued.get("revoked") or {}).get("list") or "")


def not_revoked(doomed: Mapping[str, Any], issued: Mapping[str, Any]) -> list[str]:
    """Of the hosts and names in `doomed` (`revoked` of an installation) those that the Job has not answered."""
    known = issued.get("revoked") or {}
    return [one for key in ("hosts", "names") for one in doomed.get(key) or () if one not in (known.get(key) or ())]


def pki_troubles(install: Mapping[str, Any], issued: Mapping[str, Any], now: datetime) -> list[str]:
    """What is wrong with the certificates of a cluster, for who looks at it."""
    found = []
    lacking = not_revoked(install.get("revoked") or {}, issued)
    if lacking:
        found.append(f"certificates of {', '.join(lacking)}: not revoked, run isthmus.mesh.site")
    due = _renewal(issued)
    if due is not None and due + UNRENEWED < now:
        found.append(f"CronJob {NAMESPACE}/{PKI}: certificates are to be renewed since {issued['renew']}")
    if issued.get("requests"):
        peers = ", ".join(sorted(issued["requests"]))
        found.append(f"certificates of the registrars for {peers}: not signed by the authorities there")
    return found


def another_authority(install: Mapping[str, Any], issued: Mapping[str, Any]) -> bool:
    """Whether the Job answered with another authority than the one that the estate record has."""
    known = install["trust"].get(install["cluster"])
    return bool(known and issued.get("ca")) and str(issued["ca"]).strip() not in known


def _pki_job_spec(install: Mapping[str, Any]) -> Object:
    container = {
        "name": "pki",
        "image": install["image"],
        "command": [f"{PROGRAMS}/isthmus-pki", "--wanted", "/etc/isthmus-pki/wanted.json"],
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "resources": {"requests": {"cpu": "50m", "memory": "96Mi"}},
        "securityContext": _UNPRIVILEGED,
        "volumeMounts": [_mount("wanted", "/etc/isthmus-pki", readOnly=True)],
    }
    pod = {
        "automountServiceAccountToken": True,
        "restartPolicy": "Never",  # what a failed one said can be read
        "securityContext": _UNPRIVILEGED_POD,
        "containers": [container],
        "volumes": [_config_volume("wanted", PKI_WANTED)],
    }
    return {
        "backoffLimit": 2,
        "activeDeadlineSeconds": 600,
        "ttlSecondsAfterFinished": 86400,
        "template": _template(install, "pki", PKI, digest(install["image"]), pod),
    }


# --- how peers reach etcd


def node_count(install: Mapping[str, Any]) -> int:
    """How many nodes' addresses peers need: none behind a load balancer."""
    return 0 if install["expose"]["type"] == LOAD_BALANCER else int(install["etcd"]["replicas"])


def choose_nodes(
    install: Mapping[str, Any], nodes: Iterable[Mapping[str, Any]], service: Mapping[str, Any] | None
) -> list[str]:
    """Names of the nodes whose addresses peers have: what the operator names; else those of before (`service`, the
    Service `MESH` as it is) that are still there, and the oldest others that are Ready and take pods."""
    there = {node["metadata"]["name"]: node for node in nodes}
    count, named = node_count(install), install["expose"]["hosts"]
    if not count or named:
        return sorted(named) if count else []
    annotations = ((service or {}).get("metadata") or {}).get("annotations") or {}
    kept = [name for name in annotations.get(NODES, "").split(",") if name in there]
    others = [node for name, node in there.items() if name not in kept and _takes_pods(node)]
    others.sort(key=lambda node: (node["metadata"].get("creationTimestamp") or "", node["metadata"]["name"]))
    return sorted([*kept, *(node["metadata"]["name"] for node in others)][:count])


def _takes_pods(node: Mapping[str, Any]) -> bool:
    spec, status = node.get("spec") or {}, node.get("status") or {}
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions") or ())
    refused = any(one.get("effect") in ("NoSchedule", "NoExecute") for one in spec.get("taints") or ())
    return ready and not refused and not spec.get("unschedulable")


def exposed(
    install: Mapping[str, Any],
    client: Mapping[str, Any],
    mesh: Mapping[str, Any],
    nodes: Iterable[Mapping[str, Any]],
    chosen: Iterable[str],
) -> dict[str, Any] | None:
    """Where peers reach etcd, from the Services `CLIENT` and `MESH` as they are; None while there is no address yet.

    `addresses` and `names` belong into the certificates of etcd's servers, and `cluster_ip`.
    """
    expose = install["expose"]
    addresses: list[str] = []
    names: list[str] = []
    port = CLIENT_PORT
    if expose["type"] == LOAD_BALANCER:
        balancer = (mesh.get("status") or {}).get("loadBalancer") or {}
        for entry in balancer.get("ingress") or ():
            addresses += [entry["ip"]] if entry.get("ip") else []
            names += [entry["hostname"]] if entry.get("hostname") and not entry.get("ip") else []
    else:
        wanted = "InternalIP" if expose["scope"] == "internal" else "ExternalIP"
        there = {node["metadata"]["name"]: node for node in nodes}
        addresses = [address for name in chosen for address in _addresses(there.get(name) or {}, wanted)[:1]]
        if expose["type"] == NODE_PORT:
            port = mesh["spec"]["ports"][0].get("nodePort") or 0
    cluster_ip = (client.get("spec") or {}).get("clusterIP") or ""
    if not (addresses or names) or not port or not cluster_ip:
        return None
    return {
        "endpoints": [f"https://{place}:{port}" for place in sorted([*addresses, *names])],
        "addresses": sorted(addresses),
        "names": sorted(names),
        "cluster_ip": cluster_ip,
        "nodes": sorted(chosen),
    }


def _addresses(node: Mapping[str, Any], kind: str) -> list[str]:
    """IPv4 addresses of a node of this kind."""
    found = (node.get("status") or {}).get("addresses") or ()
    return [one["address"] for one in found if one.get("type") == kind and ":" not in one["address"]]


def wrong_cluster(install: Mapping[str, Any], nodes: Iterable[Mapping[str, Any]], address: str) -> str:
    """Why an API with these Nodes, whose own Service has this ClusterIP, is not that of the cluster, as far as ranges
    show it; empty when nothing speaks against it. No node is a host of the inventory, so nothing else would."""
    declared = install["document"]["cluster"]["kubernetes"]
    where = f"isthmus_estate.clusters.{install['cluster']}.kubernetes"
    found = []
    if address and ":" not in address and ip_address(address) not in ip_network(declared["service_range4"]):
        found.append(f"its own service has {address}, and {where}.service_range is {declared['service_range4']}")
    ranges = [network for text in declared["pod_ranges4"] if isinstance(network := ip_network(text), IPv4Network)]
    for node in nodes:
        for text in (node.get("spec") or {}).get("podCIDRs") or ():
            network = ip_network(text)
            if isinstance(network, IPv4Network) and not any(network.subnet_of(one) for one in ranges):
                name, wanted = node["metadata"]["name"], ", ".join(declared["pod_ranges4"])
                found.append(f"pods of node {name} get addresses of {text}, and {where}.pod_ranges is {wanted}")
    return "; ".join(found[:3])


def old_kubelets(nodes: Iterable[Mapping[str, Any]]) -> str:
    """Why agents would not run on some of these Nodes, by the version of their kubelet; empty when they would. A
    version that cannot be read says nothing."""
    found = []
    for node in nodes:
        version = ((node.get("status") or {}).get("nodeInfo") or {}).get("kubeletVersion") or ""
        read = re.match(r"v?(\d+)\.(\d+)", version)
        if read and (int(read[1]), int(read[2])) < OLDEST_KUBELET:
            found.append(f"{node['metadata']['name']} ({version})")
    if not found:
        return ""
    oldest = ".".join(map(str, OLDEST_KUBELET))
    return (
        f"the kubelet is older than {oldest} on {', '.join(sorted(found))}: it does not know the field "
        "appArmorProfile, without which the agent may not write its pinned maps on nodes that have AppArmor"
    )


def exposure_problems(
    install: Mapping[str, Any], nodes: Iterable[Mapping[str, Any]], chosen: Iterable[str]
) -> list[str]:
    """Why peers cannot reach etcd as the inventory asks for it, before anything is made."""
    expose, where = install["expose"], f"isthmus_estate.clusters.{install['cluster']}.expose"
    found = []
    if expose["type"] == LOAD_BALANCER and expose["scope"] == "external" and not expose["source_ranges"]:
        found.append(
            f"{where}.source_ranges is empty, and with scope: external everybody in the internet would reach etcd. "
            "Name the ranges of the peers' etcd hosts"
        )
    if expose["type"] == LOAD_BALANCER:
        return found
    there = {node["metadata"]["name"]: node for node in nodes}
    chosen, count = list(chosen), node_count(install)
    missing = [name for name in chosen if name not in there]
    if missing:
        found.append(f"{where}.hosts names {', '.join(missing)}, and Kubernetes has no such node. Correct the names")
    if expose["type"] == HOST and len(chosen) < count:
        found.append(
            f"etcd is to have {count} members on nodes of their own, and there are {len(chosen)} nodes that are Ready "
            f"and take pods. Add nodes, or lower {where.rpartition('.')[0]}.etcd.replicas"
        )
    elif not chosen:
        found.append(
            f"No node of the cluster is Ready and takes pods, so peers have no address of it. Bring one up, or name "
            f"nodes in {where}.hosts"
        )
    kind = "InternalIP" if expose["scope"] == "internal" else "ExternalIP"
    bare = [name for name in chosen if name in there and not _addresses(there[name], kind)]
    if bare:
        found.append(
            f"The nodes {', '.join(bare)} have no IPv4 address of the kind {kind}, by which peers would reach them. "
            f"Change {where}.scope, name other nodes in {where}.hosts, or use a load balancer"
        )
    return found


def exposure_warnings(install: Mapping[str, Any]) -> list[str]:
    """What the operator should know of how peers reach etcd."""
    expose, name = install["expose"], install["cluster"]
    found = []
    if expose["scope"] == "external":
        found.append(
            f"etcd of cluster {name} is reachable from outside of its network. Who has no certificate of its authority "
            "is refused, but a load balancer with scope: internal, or peering, shows it to nobody else."
        )
    if expose["type"] != LOAD_BALANCER and expose["source_ranges"]:
        found.append(
            f"isthmus_estate.clusters.{name}.expose.source_ranges is kept by load balancers only: with type: "
            f"{expose['type']} Kubernetes lets everybody in who reaches the nodes. Use the nodes' firewall."
        )
    return found


# --- out again

CLEANUP = "isthmus-cleanup"
"""DaemonSet that takes the datapath out of the nodes' kernels."""

_NODE = (("run", "/run"), ("state", "/var/lib"))


def cleanup(install: Mapping[str, Any], source: Mapping[str, Any], suspended: bool = False) -> Object:
    """A pod on every node that takes out what the agents, who are to be gone before, left there. `source`: their
    DaemonSet, or this one, as it is. `suspended`: on no node yet."""
    spec = source["spec"]["template"]["spec"]
    container = spec["containers"][0]
    common = {"image": container["image"], "securityContext": container["securityContext"]}
    kernel = [_mount(name, path, **options) for name, path, _kind, options in AGENT_PATHS if path.startswith("/sys/")]
    steps = [
        {"name": "datapath", "command": [f"{PROGRAMS}/isthmus", "datapath", "remove", "--yes"], "volumeMounts": kernel},
        {
            "name": "files",
            "command": ["/usr/bin/rm", "-rf", *(f"/node{path}/isthmus" for _name, path in _NODE)],
            "volumeMounts": [_mount(name, f"/node{path}") for name, path in _NODE],
        },
    ]
    pod = {
        "automountServiceAccountToken": False,
        "hostNetwork": True,
        "priorityClassName": "system-node-critical",
        "terminationGracePeriodSeconds": 0,
        "tolerations": [{"operator": "Exists"}],
        "initContainers": [{**step, **common} for step in steps],
        "containers": [{"name": "done", "command": ["/usr/bin/sleep", "infinity"], **common}],
        "volumes": [
            *(_host_volume(name, path, kind) for name, path, kind, _o in AGENT_PATHS if path.startswith("/sys/")),
            *(_host_volume(name, path, "Directory") for name, path in _NODE),
        ],
    }
    if suspended:
        pod["nodeSelector"] = {f"{ownership.COMPONENT}.suspended": "true"}
    made = {
        "selector": {"matchLabels": _selector("cleanup")},
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
        "template": _template(install, "cleanup", AGENT, digest(common["image"]), pod),
    }
    return _object(install, "DaemonSet", "apps/v1", CLEANUP, "cleanup", spec=made)


KINDS = (
    *(("apps/v1", kind, NAMESPACE) for kind in ("DaemonSet", "Deployment", "StatefulSet")),
    ("policy/v1", "PodDisruptionBudget", NAMESPACE),
    *(("v1", kind, NAMESPACE) for kind in ("Service", "ConfigMap", "ServiceAccount", "ResourceQuota")),
    *(("rbac.authorization.k8s.io/v1", kind, NAMESPACE) for kind in ("RoleBinding", "Role")),
    *(("rbac.authorization.k8s.io/v1", kind, "") for kind in ("ClusterRoleBinding", "ClusterRole")),
)
"""Kinds of objects that `objects` makes (but for the namespace), in the order in which they go: API version, kind,
namespace."""

JOBS = (("batch/v1", "CronJob", NAMESPACE), ("batch/v1", "Job", NAMESPACE))
"""Kinds that make keys and certificates."""

LEFT = (
    *JOBS,
    ("v1", "PersistentVolumeClaim", NAMESPACE),
    ("v1", "Secret", NAMESPACE),
)
"""Kinds that others make for the mesh: Kubernetes for its StatefulSet, and the PKI's Jobs."""

SELECTOR = f"{access.SELECTOR},{ownership.COMPONENT}"
"""Selects what the mesh runs in a cluster, and nothing of what its registrars write there."""

PRUNED = f"{SELECTOR},{ownership.COMPONENT}!=pki"
"""The same without what the PKI's Jobs need and answer."""
