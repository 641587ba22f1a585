# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Connection into a pod of the mesh's etcd."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: etcd_pod
short_description: Runs tasks in a pod of the mesh's etcd
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - For the inventory host that stands for the etcd of a cluster with C(control_plane=in_cluster). Modules that read and
    write the estate record, its lock and the rights in etcd run in a pod of etcd as they run on an etcd host, so that
    no key of the cluster leaves it.
  - Takes the first pod of etcd that is ready, by the Kubernetes API (C(pods/exec)).
  - Works as the user of the pod and below C(/tmp), which alone can be written there, whatever the inventory says of
    becoming another user and of remote directories for machines.
requirements:
  - Python package C(kubernetes) on the controller
options:
  kubeconfig:
    description:
      - Kubeconfig on the controller. Without it, the first that is there of C(K8S_AUTH_KUBECONFIG), C(KUBECONFIG) and
        C(~/.kube/config).
    type: path
    vars:
      - name: isthmus_kubeconfig
    env:
      - name: K8S_AUTH_KUBECONFIG
  context:
    description: Context in the kubeconfig; without it its current one.
    type: str
    vars:
      - name: isthmus_kubeconfig_context
    env:
      - name: K8S_AUTH_CONTEXT
  timeout:
    description: Seconds that the API may take to answer.
    type: int
    default: 30
"""

import base64
import os
import shlex

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.connection import ConnectionBase
from ansible.utils.display import Display

NAMESPACE = "isthmus-system"
CONTAINER = "etcd"
SELECTOR = "isthmus.io/component=etcd"
REMOTE_TMP = "/tmp/.ansible"  # noqa: S108 - the pod has one user
CHUNK = 64 * 1024
"""Bytes of one message of the API's stream."""

display = Display()


class Connection(ConnectionBase):
    """One ready pod; it is chosen anew by each connection."""

    transport = "isthmus.mesh.etcd_pod"
    has_pipelining = False  # the stream has no end of what is written to a command
    become_methods = ()

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.api = None
        self.pod = ""
        configure = self._shell.set_options

        def set_options(*given, **named):
            configure(*given, **named)
            self._shell.set_option("remote_tmp", REMOTE_TMP)

        self._shell.set_options = set_options

    def set_become_plugin(self, plugin):
        """There is no other user in a pod."""

    def _connect(self):
        if self.api is None:
            self.api = self._client()
            self.pod = self._ready_pod()
            display.vvv(f"pod {NAMESPACE}/{self.pod}", host=self.get_option("kubeconfig") or "kubernetes")
            self._connected = True
        return self

    def _client(self):
        try:
            from kubernetes import client, config
        except ImportError as exc:
            raise AnsibleError(
                f"the Python package kubernetes is missing on the controller ({exc}). Next: pip install kubernetes"
            ) from exc
        try:
            path = self.get_option("kubeconfig")
            loaded = config.new_client_from_config(
                config_file=None if path is None else os.path.expanduser(path), context=self.get_option("context")
            )
        except (config.ConfigException, OSError) as exc:
            raise AnsibleConnectionFailure(
                f"the kubeconfig cannot be used: {exc}. Next: set isthmus_kubeconfig for this host"
            ) from exc
        return client.CoreV1Api(loaded)

    def _ready_pod(self):
        try:
            found = self.api.list_namespaced_pod(
                NAMESPACE, label_selector=SELECTOR, _request_timeout=self.get_option("timeout")
            )
        except Exception as exc:  # the client has errors of its own and those of urllib3
            raise AnsibleConnectionFailure(f"the Kubernetes API does not answer: {_short(exc)}") from exc
        for pod in sorted(found.items, key=lambda one: one.metadata.name):
            for condition in pod.status.conditions or ():
                if condition.type == "Ready" and condition.status == "True" and not pod.metadata.deletion_timestamp:
                    return pod.metadata.name
        raise AnsibleConnectionFailure(
            f"no pod of etcd is ready in the namespace {NAMESPACE} ({len(found.items)} are there). Next: look at "
            f"`kubectl -n {NAMESPACE} get pods -l {SELECTOR}`; before the first run of site there are none"
        )

    def _run(self, command, given=b""):
        """(exit status, standard output, standard error); `command` reads exactly `given`."""
        from kubernetes.stream import stream

        self._connect()
        try:
            channel = stream(
                self.api.connect_get_namespaced_pod_exec,
                self.pod,
                NAMESPACE,
                container=CONTAINER,
                command=["/bin/sh", "-c", command],
                stdin=bool(given),
                stdout=True,
                stderr=True,
                tty=False,
                binary=True,
                _preload_content=False,
                _request_timeout=self.get_option("timeout"),
            )
            for start in range(0, len(given), CHUNK):
                channel.write_stdin(given[start : start + CHUNK])
            out, err = [], []
            while channel.is_open():
                channel.update(timeout=1)
                out.append(channel.read_stdout(timeout=0) if channel.peek_stdout() else b"")
                err.append(channel.read_stderr(timeout=0) if channel.peek_stderr() else b"")
            out.append(channel.read_all() if channel.peek_stdout() else b"")
            status = channel.returncode
        except Exception as exc:
            raise AnsibleConnectionFailure(f"pod {NAMESPACE}/{self.pod} cannot be entered: {_short(exc)}") from exc
        return 255 if status is None else status, b"".join(map(_bytes, out)), b"".join(map(_bytes, err))

    def exec_command(self, cmd, in_data=None, sudoable=True):
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        if not in_data:
            return self._run(cmd)
        return self._run(f"head -c {len(in_data)} | ( {cmd} )", in_data)

    def put_file(self, in_path, out_path):
        super().put_file(in_path, out_path)
        with open(in_path, "rb") as file:
            content = base64.b64encode(file.read())
        # As text: what is sent may be cut anywhere.
        command = f"head -c {len(content)} | base64 -d > {shlex.quote(out_path)}"
        status, _out, err = self._run(command, content) if content else self._run(f": > {shlex.quote(out_path)}")
        if status != 0:
            raise AnsibleError(f"{out_path} cannot be written in pod {self.pod}: {err.decode(errors='replace')[:300]}")

    def fetch_file(self, in_path, out_path):
        super().fetch_file(in_path, out_path)
        status, out, err = self._run(f"base64 {shlex.quote(in_path)}")
        if status != 0:
            raise AnsibleError(f"{in_path} cannot be read in pod {self.pod}: {err.decode(errors='replace')[:300]}")
        with open(out_path, "wb") as file:
            file.write(base64.b64decode(out))

    def reset(self):
        self.close()
        self._connect()

    def close(self):
        self.api, self.pod = None, ""
        self._connected = False


def _bytes(text):
    return text.encode() if isinstance(text, str) else text


def _short(exc):
    return " ".join(str(exc).split())[:300]
