# SPDX-License-Identifier: GPL-3.0-or-later
"""The operator's applications in pods: the programs of `demo_workloads`, nothing of Isthmus but one annotation."""

from __future__ import annotations

from collections.abc import Iterable

from kubernetes_machine import TOOLS_IMAGE

NAMESPACE = "shop"
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
        env: [{{name: CLUSTER, value: {cluster}}}, {{name: PORT, value: "8080"}}],
        readinessProbe: {{httpGet: {{path: /healthz, port: 8080}}, periodSeconds: 1, failureThreshold: 1}}"""
WEB = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: web-{node}, namespace: shop, labels: {{app: web}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
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
    return WEB_CONTAINER.format(image=TOOLS_IMAGE, programs=PROGRAMS, cluster=cluster)


def web(cluster: str, nodes: Iterable[str]) -> str:
    """The global Service `shop/web` and a web server on each node, `web-<node>`."""
    container = web_container(cluster)
    return SERVICE + "".join(WEB.format(node=node, container=container) for node in nodes)


def client(name: str, node: str, host_network: bool = False) -> str:
    """A customer in a pod."""
    values = {"name": name, "node": node, "host_network": str(host_network).lower()}
    return CLIENT.format(image=TOOLS_IMAGE, programs=PROGRAMS, **values)
