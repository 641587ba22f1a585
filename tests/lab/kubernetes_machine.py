# SPDX-License-Identifier: GPL-3.0-or-later
"""What is on a machine of the lab's Kubernetes clusters, as text: units and configuration, nothing of Isthmus.

A cluster as an operator may have set it up by hand: etcd and the control plane as systemd units, containerd and
runc, the standard bridge CNI with `ipMasq`, static routes between the nodes' pod ranges, kube-proxy.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

from lab_inventory import Host, KubernetesCluster

PROGRAMS = "/opt/kubernetes"  # where machines have what `kubernetes_parts` builds
IMAGES = "/opt/images"  # and the container images
API_PORT = 6443
STORE = "http://127.0.0.1:22379"  # Kubernetes' own etcd; 2379 and 2380 are the mesh's
STORE_PEER = "http://127.0.0.1:22380"
PROXY_MODES = ("nftables", "iptables")
PAUSE_IMAGE = "lab.test/pause:1"
TOOLS_IMAGE = "lab.test/tools:1"
COREDNS_IMAGE = "lab.test/coredns:1"
ALL_IMAGES = (PAUSE_IMAGE, TOOLS_IMAGE, COREDNS_IMAGE)
DIRECTORY = "etc/kubernetes"

Files = dict[str, tuple[str, int]]

# A machine that is a container lacks what a server has. The kubelet insists on some values of the kernel's that a
# container cannot write: it sees its own.
PREPARE = """\
#!/bin/sh
set -eu
mount --make-rshared /
while read -r _ where kind _; do
    if [ "$kind" = cgroup ]; then mount -o remount,rw,bind "$where"; fi
done < /proc/self/mounts
mkdir -p /run/lab-sysctl
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1; do
    file=/run/lab-sysctl/$(basename "${setting%=*}")
    echo "${setting#*=}" > "$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done
echo 1 > /proc/sys/net/ipv4/ip_forward
"""

CONTAINERD = f"""\
version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
  # Nobody in a container may raise what its parent set.
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = "/usr/sbin/runc"
      SystemdCgroup = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "/etc/cni/net.d"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
"""

# RBAC that kubeadm gives a cluster too: the API server reads logs and executes as this user.
BINDINGS = """\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: lab-kubelet-client}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:kubelet-api-admin"}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: kube-apiserver-kubelet-client}]
"""

VOLUMES = "var/lib/lab-volumes"  # a directory for each volume of a node
STORAGE_CLASS = "lab"

COREDNS = """\
apiVersion: v1
kind: ServiceAccount
metadata: {{name: coredns, namespace: kube-system}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: "system:coredns"}}
rules:
  - {{apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}}
  - {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: "system:coredns"}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:coredns"}}
subjects: [{{kind: ServiceAccount, name: coredns, namespace: kube-system}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: coredns, namespace: kube-system}}
data:
  Corefile: |
    .:53 {{
        errors
        health
        ready
        kubernetes cluster.local in-addr.arpa ip6.arpa {{
           pods insecure
           fallthrough in-addr.arpa ip6.arpa
           ttl 5
        }}
        forward . /etc/resolv.conf
        cache 5
        reload
    }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: coredns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  selector: {{matchLabels: {{k8s-app: kube-dns}}}}
  template:
    metadata: {{labels: {{k8s-app: kube-dns}}}}
    spec:
      serviceAccountName: coredns
      dnsPolicy: Default
      containers:
        - name: coredns
          image: {image}
          imagePullPolicy: Never
          args: [-conf, /etc/coredns/Corefile]
          ports: [{{name: dns, containerPort: 53, protocol: UDP}}, {{name: dns-tcp, containerPort: 53}}]
          readinessProbe: {{httpGet: {{path: /ready, port: 8181}}, periodSeconds: 1}}
          volumeMounts: [{{name: config, mountPath: /etc/coredns}}]
      volumes: [{{name: config, configMap: {{name: coredns}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  selector: {{k8s-app: kube-dns}}
  clusterIP: {address}
  ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
"""


def coredns(cluster: KubernetesCluster) -> str:
    return COREDNS.format(image=COREDNS_IMAGE, address=cluster.dns)


def nodes(cluster: KubernetesCluster) -> str:
    """The cluster's Node objects: what an operator who deals the pod ranges says of them, for `kubectl apply`."""
    ranges = cluster.pod_ranges()
    items = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name},
            "spec": {"podCIDR": str(ranges[name]), "podCIDRs": [str(ranges[name])]},
        }
        for name in cluster.nodes
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def kubeconfig(cluster: KubernetesCluster, authority: str, certificate: str, key: str) -> str:
    """A kubeconfig with a client certificate (PEM texts)."""

    def inline(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    server = f"https://{cluster.control_plane.address}:{API_PORT}"
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": cluster.name, "cluster": {"server": server, "certificate-authority-data": inline(authority)}}
            ],
            "users": [
                {
                    "name": "user",
                    "user": {"client-certificate-data": inline(certificate), "client-key-data": inline(key)},
                }
            ],
            "contexts": [{"name": cluster.name, "context": {"cluster": cluster.name, "user": "user"}}],
            "current-context": cluster.name,
        },
        indent=2,
    )


def certificates(cluster: KubernetesCluster) -> dict[str, tuple[str, str]]:
    """Every certificate of a cluster: file name -> (subject, its extensions as openssl takes them)."""
    client = "extendedKeyUsage=clientAuth"
    server = cluster.control_plane
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    addresses = [server.address, cluster.service_range[1], "127.0.0.1"]
    alternatives = [*(f"DNS:{name}" for name in (server.name, *names)), *(f"IP:{address}" for address in addresses)]
    return {
        "apiserver": (
            "/CN=kube-apiserver",
            f"extendedKeyUsage=serverAuth\nsubjectAltName={','.join(alternatives)}",
        ),
        "sa": ("/CN=service-accounts", "keyUsage=digitalSignature"),  # tokens are signed with its key
        "kubelet-client": ("/CN=kube-apiserver-kubelet-client", client),
        "admin": ("/O=system:masters/CN=admin", client),
        "controller-manager": ("/CN=system:kube-controller-manager", client),
        "scheduler": ("/CN=system:kube-scheduler", client),
        "proxy": ("/CN=system:kube-proxy", client),
        **{f"node-{name}": (f"/O=system:nodes/CN=system:node:{name}", client) for name in cluster.nodes},
    }


def unit(description: str, command: str, *, after: str = "network.target", kind: str = "simple", more: str = "") -> str:
    return (
        f"[Unit]\nDescription={description}\nAfter={after}\nStartLimitIntervalSec=0\n\n"
        f"[Service]\nType={kind}\nExecStart={command}\nRestart=always\nRestartSec=1\n{more}\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )


def files(cluster: KubernetesCluster, host: Host, pki: Mapping[str, str], proxy_mode: str) -> Files:
    """Everything that the machine has beyond other machines: path -> (text, mode), units enabled.

    `pki`: the certificates and keys of `certificates` and of `ca`, `<name>.crt` and `<name>.key` -> PEM.
    """
    found = routes(cluster, host)
    if host == cluster.control_plane:
        found |= control_plane(cluster, pki)
    for name, node in cluster.nodes.items():
        if node == host:
            found |= worker(cluster, name, pki, proxy_mode)
            if cluster.in_cluster:
                found[f"{VOLUMES}/1/.made"] = ("", 0o644)
    for path in [path for path in found if path.startswith("etc/systemd/system/")]:
        name = path.rsplit("/", 1)[1]
        found[f"etc/systemd/system/multi-user.target.wants/{name}"] = (f"->/etc/systemd/system/{name}", 0)
    found["etc/profile.d/kubernetes.sh"] = (f"export PATH=$PATH:{PROGRAMS}\n", 0o644)
    return found


def volumes(cluster: KubernetesCluster) -> str:
    """A class of storage, and a volume on every node, as JSON: there is no provisioner."""
    storage: list[dict[str, object]] = [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": STORAGE_CLASS},
            "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "WaitForFirstConsumer",
        }
    ]
    for name in cluster.nodes:
        term = {"key": "kubernetes.io/hostname", "operator": "In", "values": [name]}
        storage.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"lab-{name}"},
                "spec": {
                    "capacity": {"storage": "1Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": STORAGE_CLASS,
                    "persistentVolumeReclaimPolicy": "Retain",
                    "local": {"path": f"/{VOLUMES}/1"},
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [term]}]}},
                },
            }
        )
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": storage})


def routes(cluster: KubernetesCluster, host: Host) -> Files:
    """A static route to each other node's pod range."""
    lines = [
        f"ExecStart=/sbin/ip route replace {network} via {cluster.nodes[name].address}\n"
        for name, network in cluster.pod_ranges().items()
        if cluster.nodes[name] != host
    ]
    text = (
        "[Unit]\nDescription=Routes to the pods of other nodes\nAfter=network.target\n\n"
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\n{''.join(lines)}\n[Install]\nWantedBy=multi-user.target\n"
    )
    return {"etc/systemd/system/pod-routes.service": (text, 0o644)} if lines else {}


def control_plane(cluster: KubernetesCluster, pki: Mapping[str, str]) -> Files:
    place = f"/{DIRECTORY}"
    store = " ".join(
        (
            "/usr/bin/etcd --name=kubernetes --data-dir=/var/lib/kubernetes-etcd --log-level=warn",
            f"--listen-client-urls={STORE} --advertise-client-urls={STORE} --listen-peer-urls={STORE_PEER}",
            f"--initial-advertise-peer-urls={STORE_PEER} --initial-cluster=kubernetes={STORE_PEER}",
            # A store that no test is about: its disk is the machine's that carries the whole lab.
            "--unsafe-no-fsync",
        )
    )
    api = " ".join(
        (
            f"{PROGRAMS}/kube-apiserver --etcd-servers={STORE} --secure-port={API_PORT}",
            f"--advertise-address={cluster.control_plane.address} --service-cluster-ip-range={cluster.service_range}",
            f"--client-ca-file={place}/ca.crt --authorization-mode=Node,RBAC --allow-privileged=true",
            f"--tls-cert-file={place}/apiserver.crt --tls-private-key-file={place}/apiserver.key",
            f"--kubelet-client-certificate={place}/kubelet-client.crt --kubelet-client-key={place}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP --service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={place}/sa.crt --service-account-signing-key-file={place}/sa.key",
        )
    )
    controllers = " ".join(
        (
            f"{PROGRAMS}/kube-controller-manager --kubeconfig={place}/controller-manager.kubeconfig",
            f"--root-ca-file={place}/ca.crt --service-account-private-key-file={place}/sa.key",
            f"--cluster-signing-cert-file={place}/ca.crt --cluster-signing-key-file={place}/ca.key",
            "--use-service-account-credentials=true --leader-elect=false --bind-address=127.0.0.1",
        )
    )
    scheduler = (
        f"{PROGRAMS}/kube-scheduler --kubeconfig={place}/scheduler.kubeconfig --leader-elect=false "
        "--bind-address=127.0.0.1"
    )
    after = "kube-apiserver.service"
    units = {
        "kubernetes-etcd": unit("Store of Kubernetes", store, kind="notify"),
        "kube-apiserver": unit(
            "Kubernetes API server", api, after="kubernetes-etcd.service", kind="notify", more="TimeoutStartSec=120\n"
        ),
        "kube-controller-manager": unit("Kubernetes controller manager", controllers, after=after),
        "kube-scheduler": unit("Kubernetes scheduler", scheduler, after=after),
    }
    found: Files = {f"etc/systemd/system/{name}.service": (text, 0o644) for name, text in units.items()}
    for name in ("ca.crt", "ca.key", "sa.crt", "sa.key"):
        found[f"{DIRECTORY}/{name}"] = (pki[name], 0o600)
    for name in ("apiserver", "kubelet-client"):
        for kind in ("crt", "key"):
            found[f"{DIRECTORY}/{name}.{kind}"] = (pki[f"{name}.{kind}"], 0o600)
    for name in ("controller-manager", "scheduler"):
        found |= client(cluster, name, name, pki)
    return found


def client(cluster: KubernetesCluster, name: str, certificate: str, pki: Mapping[str, str]) -> Files:
    text = kubeconfig(cluster, pki["ca.crt"], pki[f"{certificate}.crt"], pki[f"{certificate}.key"])
    return {f"{DIRECTORY}/{name}.kubeconfig": (text, 0o600)}


def worker(cluster: KubernetesCluster, name: str, pki: Mapping[str, str], proxy_mode: str) -> Files:
    host = cluster.nodes[name]
    place = f"/{DIRECTORY}"
    network = {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "ipMasq": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": str(cluster.pod_ranges()[name])}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
    kubelet = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"x509": {"clientCAFile": f"{place}/ca.crt"}, "anonymous": {"enabled": False}},
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "resolvConf": "/run/systemd/resolve/resolv.conf" if host.resolved else "/etc/resolv.conf",
        "clusterDNS": [str(cluster.dns)],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        # The machine's disk and memory are those of the machine that carries the whole lab.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
    }
    start = (
        f"{PROGRAMS}/kubelet --config={place}/kubelet.json --kubeconfig={place}/kubelet.kubeconfig "
        f"--hostname-override={name} --node-ip={host.address}"
    )
    prepare = (
        "[Unit]\nDescription=What a server has and a container lacks\nBefore=containerd.service\n\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/local/sbin/prepare-node\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )
    # Containers outlive both daemons, as they do elsewhere.
    keeps = "KillMode=process\nDelegate=yes\nLimitNOFILE=infinity\nTasksMax=infinity\n"
    keeps += f"Environment=PATH={PROGRAMS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    units = {
        "prepare-node": prepare,
        "containerd": unit(
            *("containerd", f"{PROGRAMS}/containerd"), after="prepare-node.service", kind="notify", more=keeps
        ),
        "kubelet": unit("kubelet", start, after="containerd.service", more=keeps),
        "kube-proxy": unit("kube-proxy", f"{PROGRAMS}/kube-proxy --config={place}/kube-proxy.json"),
    }
    return {
        **{f"etc/systemd/system/{name}.service": (text, 0o644) for name, text in units.items()},
        "usr/local/sbin/prepare-node": (PREPARE, 0o755),
        "usr/local/bin/ctr": (f"->{PROGRAMS}/ctr", 0),  # where a node's package has it
        "etc/containerd/config.toml": (CONTAINERD, 0o644),
        "etc/cni/net.d/10-pods.conflist": (json.dumps(network, indent=2), 0o644),
        f"{DIRECTORY}/ca.crt": (pki["ca.crt"], 0o644),
        f"{DIRECTORY}/kubelet.json": (json.dumps(kubelet, indent=2), 0o644),
        f"{DIRECTORY}/kube-proxy.json": (proxy(cluster, name, proxy_mode), 0o644),
        **client(cluster, "kubelet", f"node-{name}", pki),
        **client(cluster, "proxy", "proxy", pki),
    }


def proxy(cluster: KubernetesCluster, name: str, mode: str) -> str:
    """The configuration of kube-proxy on a node."""
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": mode,
            "hostnameOverride": name,
            "clusterCIDR": str(cluster.pod_range),
            "clientConnection": {"kubeconfig": f"/{DIRECTORY}/proxy.kubeconfig"},
            # The table's size belongs to the kernel, not to a container.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
        },
        indent=2,
    )
