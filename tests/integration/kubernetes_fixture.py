# SPDX-License-Identifier: GPL-3.0-or-later
"""A real kube-apiserver on loopback for tests, over Debian's etcd, with RBAC and client certificates.

    with ApiServer(tmp_path / "kubernetes") as api:
        api.create("pods", pod("web-1", "10.244.1.2"))      # as cluster-admin; status as a kubelet would write it
        api.allow("isthmus-registrar", ("get", "list", "watch"), "pods", "nodes")
        crt, key = api.ca.issue("isthmus-registrar")

There is no kubelet and no controller: tests make nodes, pods with their status, and EndpointSlices themselves.
"""

from __future__ import annotations

import http.client
import json
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from integration.etcd_fixture import Ca, EtcdServer, free_port, require_etcd

ROOT = Path(__file__).resolve().parents[2]
START_DEADLINE = 90.0
GROUPS = {"endpointslices": "discovery.k8s.io", "clusterroles": "rbac.authorization.k8s.io"}
GROUPS["clusterrolebindings"] = GROUPS["clusterroles"]
CLUSTER_WIDE = ("nodes", "namespaces", "clusterroles", "clusterrolebindings")
KINDS = {
    "nodes": "Node",
    "namespaces": "Namespace",
    "pods": "Pod",
    "services": "Service",
    "endpointslices": "EndpointSlice",
    "clusterroles": "ClusterRole",
    "clusterrolebindings": "ClusterRoleBinding",
}


def program() -> Path:
    """kube-apiserver; skips the calling test, naming what lacks, where it cannot be built."""
    require_etcd()
    sys.path.insert(0, str(ROOT / "tests" / "lab"))
    try:
        import kubernetes_parts
    finally:
        sys.path.pop(0)
    try:
        return kubernetes_parts.binary("kube-apiserver")
    except kubernetes_parts.PartsError as error:
        pytest.skip(str(error))


class Refused(Exception):
    """The API server's answer to a request of the test; `status` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status


class ApiServer:
    """One API server. A context manager: starts on entry, ends (and forgets its data) on exit."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.store = EtcdServer(directory / "store", name="kubernetes")
        self.ca = Ca(directory / "pki", "kubernetes")
        self.port = free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._program = program()
        admin = self.ca.issue("admin", organization="system:masters")
        self.tls = ssl.create_default_context(cafile=str(self.ca.crt))
        self.tls.load_cert_chain(*admin)
        accounts = ec.generate_private_key(ec.SECP256R1())
        self._accounts = directory / "accounts.key"
        self._accounts.write_bytes(
            accounts.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
            )
        )

    def __enter__(self) -> ApiServer:
        self.store.__enter__()
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(signal.SIGKILL)
        self.store.__exit__(None, None, None)

    # --- process

    def start(self) -> None:
        """Start over the present data; returns when it is ready."""
        crt, key = self.ca.issue("kube-apiserver")
        store_crt, store_key = self.store.ca.issue("root")
        command = [
            str(self._program),
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=192.0.2.1",
            "--endpoint-reconciler-type=none",
            f"--etcd-servers={self.store.endpoint}",
            f"--etcd-cafile={self.store.ca.crt}",
            f"--etcd-certfile={store_crt}",
            f"--etcd-keyfile={store_key}",
            f"--client-ca-file={self.ca.crt}",
            f"--tls-cert-file={crt}",
            f"--tls-private-key-file={key}",
            f"--service-account-key-file={self._accounts}",
            f"--service-account-signing-key-file={self._accounts}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=RBAC",
            # No controller makes the default accounts that pods would wait for.
            "--disable-admission-plugins=ServiceAccount",
            f"--cert-dir={self.directory}",
        ]
        with (self.directory / "apiserver.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_DEADLINE
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.request("GET", "/readyz", parse=False)
                return
            except (OSError, http.client.HTTPException, Refused):
                time.sleep(0.1)
        tail = (self.directory / "apiserver.log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"kube-apiserver did not become ready in {START_DEADLINE:.0f} s:\n{tail}")

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process and wait for it; it may be stopped (SIGSTOP) or gone already."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(timeout=60)
        self.process = None

    def signal(self, how: signal.Signals) -> None:
        """Send a signal (SIGSTOP, SIGCONT) to the process."""
        assert self.process is not None
        self.process.send_signal(how)

    # --- access, as cluster-admin

    def request(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", parse: bool = True
    ) -> Any:
        """What the server answers; Refused when it does not do it."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=self.tls)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": kind})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise Refused(answer.status, content.decode(errors="replace")[:500])
        return json.loads(content) if parse else content

    def path(self, resource: str, namespace: str = "", name: str = "") -> str:
        group = GROUPS.get(resource)
        place = "" if resource in CLUSTER_WIDE or not namespace else f"/namespaces/{namespace}"
        end = f"/{quote(name, safe='')}" if name else ""
        return f"{f'/apis/{group}/v1' if group else '/api/v1'}{place}/{resource}{end}"

    def requests(self, resource: str, value: dict[str, Any]) -> list[tuple[str, str, Any, str]]:
        """Method, path, body and its type of what makes an object and, if it has one, writes its status as a kubelet
        would."""
        metadata, group = value["metadata"], GROUPS.get(resource)
        namespace = metadata.get("namespace", "")
        body = {"apiVersion": f"{group}/v1" if group else "v1", "kind": KINDS[resource], **value}
        found = [("POST", self.path(resource, namespace), body, "application/json")]
        if "status" in value:
            found.append(self._status(resource, namespace, metadata["name"], value["status"]))
        return found

    def _status(self, resource: str, namespace: str, name: str, status: dict[str, Any]) -> tuple[str, str, Any, str]:
        path = self.path(resource, namespace, name) + "/status"
        return "PATCH", path, {"status": status}, "application/merge-patch+json"

    def create(self, resource: str, value: dict[str, Any]) -> None:
        """Make an object, with its status."""
        for request in self.requests(resource, value):
            self.request(*request)

    def status(self, resource: str, namespace: str, name: str, status: dict[str, Any]) -> Any:
        """Write a status as a kubelet would."""
        return self.request(*self._status(resource, namespace, name, status))

    def patch(self, resource: str, namespace: str, name: str, change: dict[str, Any]) -> Any:
        return self.request("PATCH", self.path(resource, namespace, name), change, "application/merge-patch+json")

    def delete(self, resource: str, namespace: str, name: str) -> None:
        """Delete at once: nobody is there to confirm the end of a pod."""
        query = urlencode({"gracePeriodSeconds": 0})
        self.request("DELETE", f"{self.path(resource, namespace, name)}?{query}")

    def allow(self, user: str, verbs: tuple[str, ...], *resources: str) -> None:
        """Give `user` exactly these verbs on these resources, by a ClusterRole of its name."""
        rules = [{"apiGroups": [GROUPS.get(name, "")], "resources": [name], "verbs": list(verbs)} for name in resources]
        try:
            self.create("clusterroles", {"metadata": {"name": user}, "rules": rules})
        except Refused as error:
            if error.status != 409:
                raise
            self.patch("clusterroles", "", user, {"rules": rules})
            return
        subject = {"kind": "User", "name": user, "apiGroup": GROUPS["clusterroles"]}
        role = {"apiGroup": GROUPS["clusterroles"], "kind": "ClusterRole", "name": user}
        self.create("clusterrolebindings", {"metadata": {"name": user}, "roleRef": role, "subjects": [subject]})
