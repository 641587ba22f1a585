# SPDX-License-Identifier: GPL-3.0-or-later
"""The operator's applications in pods: the programs of `demo_workloads`, nothing of Isthmus but one annotation."""

from __future__ import annotations

from collections.abc import Iterable

from kubernetes_machine import TOOLS_IMAGE

NAMESPACE = "shop"
DRAIN, GRACE = 5, 10  # seconds: how long a web server that is to end goes on, and how long it is given
PROGRAMS = "/usr/local/lib/demo"

SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  annotations: {service.cilium.io/global: "true"}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
"""
WEB_CONTAINER = """\
name: web, image: {image}, imagePullPolicy: Never, command: [{programs}/http_server, web],
        env: [{{name: CLUSTER, value: {cluster}}}, {{name: PORT, value: "8080"}}, {{name: DRAIN, value: "{drain}"}}],
        readinessProbe: {{httpGet: {{path: /healthz, port: 8080}}, periodSeconds: 1, failureThreshold: 2}}"""
WEB = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: web-{node}, namespace: shop, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: {grace}
  containers:
    - {{{container}}}
"""
DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: shop}}
spec:
  replicas: 0
  selector: {{matchLabels: {{app: web, set: {name}}}}}
  template:
    metadata: {{labels: {{app: web, set: {name}}}}}
    spec:
      terminationGracePeriodSeconds: {grace}
      containers:
        - {{{container}}}
"""
CLIENT = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  hostNetwork: {host_network}
  dnsPolicy: ClusterFirstWithHostNet
  terminationGracePeriodSeconds: 1
  containers:
    - {{name: client, image: {image}, imagePullPolicy: Never, command: [{programs}/client]}}
"""


def web_container(cluster: str) -> str:
    """The web server's container, as the inside of a mapping of YAML."""
    return WEB_CONTAINER.format(image=TOOLS_IMAGE, programs=PROGRAMS, cluster=cluster, drain=DRAIN)


def web(cluster: str, nodes: Iterable[str]) -> str:
    """The global Service `shop/web` and a web server on each node, `web-<node>`."""
    container = web_container(cluster)
    return SERVICE + "".join(WEB.format(node=node, container=container, grace=GRACE) for node in nodes)


def deployment(name: str, cluster: str) -> str:
    """More web servers behind the same Service: none yet."""
    return DEPLOYMENT.format(name=name, container=web_container(cluster), grace=GRACE)


def client(name: str, node: str, host_network: bool = False) -> str:
    """A customer in a pod."""
    values = {"name": name, "node": node, "host_network": str(host_network).lower()}
    return CLIENT.format(image=TOOLS_IMAGE, programs=PROGRAMS, **values)
