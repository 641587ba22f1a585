# SPDX-License-Identifier: BSD-2-Clause
"""A cluster's Kubernetes API as the controller's modules use it: the official client, plain objects, errors in words.

Paths and objects are Kubernetes' own (API reference, core/v1, rbac.authorization.k8s.io/v1, certificates.k8s.io/v1).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ansible.module_utils.basic import AnsibleModule

FIELD_MANAGER = "isthmus"
SECONDS = (5, 30)
"""Until a connection must be made, and until an answer must have come."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "kubeconfig": {"type": "path"},
    "context": {"type": "str"},
    "seen": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "host": {"type": "str", "required": True},
            "addresses": {"type": "list", "elements": "str", "default": []},
            "credential": {"type": "bool"},
        },
    },
}
"""Options of every module that calls `connect`; `seen` is what preflight found on hosts, for `wrong_cluster`."""

_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

REMEDY = (
    "set isthmus_kubeconfig (and isthmus_kubeconfig_context) for the cluster's hosts to a file on this host, or give "
    "K8S_AUTH_KUBECONFIG, or K8S_AUTH_HOST with K8S_AUTH_API_KEY, in the environment"
)


class ApiError(Exception):
    """What was asked of the API was refused, or cannot be asked for; the text says what, where and the next step."""


class Silent(ApiError):
    """The API did not answer, or there is no way to ask it from here: nothing is known of the cluster now."""


class Forbidden(ApiError):
    """The API does not let its caller do it."""


class NotThere(ApiError):
    """There is no such object, or what it belongs to."""


def connect(module: AnsibleModule) -> Api:
    """The API that the module's options, else the environment (that of `kubernetes.core` and of AWX), lead to.

    Nothing is asked yet. Raises `Silent` when there is no client or no usable way to an API.
    """
    try:
        from kubernetes import client, config
        from kubernetes.dynamic import DynamicClient
    except ImportError as exc:
        raise Silent(
            f"The Python package `kubernetes` cannot be imported under {sys.executable} ({exc}). Next: install it "
            "there (`python -m pip install kubernetes`), or run in an execution environment that is made from the "
            "collection"
        ) from exc
    environment = os.environ
    kubeconfig = module.params["kubeconfig"] or environment.get("K8S_AUTH_KUBECONFIG")
    context = module.params["context"] or environment.get("K8S_AUTH_CONTEXT")
    configuration = client.Configuration()
    if kubeconfig or not environment.get("K8S_AUTH_HOST"):
        try:
            # It raises what its parsers raise for a damaged file, and what a login plugin's command may.
            config.load_kube_config(
                config_file=kubeconfig, context=context, client_configuration=configuration, persist_config=False
            )
        except Exception as exc:
            where = f"The kubeconfig {kubeconfig}" if kubeconfig else "A kubeconfig (KUBECONFIG, ~/.kube/config)"
            words = f"{where}{f', context {context},' if context else ''} cannot be used: {_one_line(exc)}"
            raise Silent(f"{words}. Next: {REMEDY}") from exc
    else:
        _from_environment(configuration, environment)
    configuration.retries = 0
    return Api(DynamicClient(client.ApiClient(configuration), discoverer=lambda _client, _cache: None), configuration)


def _from_environment(configuration: Any, environment: Mapping[str, str]) -> None:
    """What AWX's credential for Kubernetes sets, and `kubernetes.core` reads."""
    configuration.host = environment["K8S_AUTH_HOST"].rstrip("/")
    if environment.get("K8S_AUTH_API_KEY"):
        configuration.api_key["authorization"] = f"Bearer {environment['K8S_AUTH_API_KEY']}"
    configuration.cert_file = environment.get("K8S_AUTH_CERT_FILE")
    configuration.key_file = environment.get("K8S_AUTH_KEY_FILE")
    configuration.ssl_ca_cert = environment.get("K8S_AUTH_SSL_CA_CERT")
    configuration.verify_ssl = environment.get("K8S_AUTH_VERIFY_SSL", "true").lower() not in ("false", "no", "0", "off")


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:500].rstrip(".")


class Api:
    """One API server. Every method raises `Silent`, `Forbidden` or `ApiError`; paths begin with `/`."""

    def __init__(self, client: Any, configuration: Any) -> None:
        self._client = client
        self.server = str(configuration.host)
        self.verified = bool(configuration.verify_ssl)
        self._authority = configuration.ssl_ca_cert

    def get(self, path: str, **query: Any) -> dict[str, Any] | None:
        """The object at `path`; None when there is none."""
        return self._ask("get", path, **query)

    def items(self, path: str, metadata_only: bool = False, **query: Any) -> list[dict[str, Any]]:
        """All objects of a list, read in pages. `metadata_only`: what is in them stays where it is."""
        found: list[dict[str, Any]] = []
        more = ""
        while True:
            headers = {"Accept": _METADATA_ONLY} if metadata_only else None
            page = self._ask("get", path, limit=500, _continue=more or None, header_params=headers, **query) or {}
            found += page.get("items") or []
            more = page.get("metadata", {}).get("continue") or ""
            if not more:
                return found

    def text(self, path: str, **query: str) -> str:
        """What is at `path` and no JSON: a log."""
        return str(self._raw("get", path, query_params=list(query.items())).decode("utf-8", "replace"))

    def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("post", path, body=body, field_manager=FIELD_MANAGER) or {}

    def replace(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._ask("put", path, body=body, field_manager=FIELD_MANAGER) or {}

    def apply(self, path: str, body: Mapping[str, Any], dry_run: bool = False) -> dict[str, Any]:
        """Server-side apply; what somebody else's manager has of our fields becomes ours. The object afterwards."""
        return (
            self._ask(
                "patch",
                path,
                body=body,
                content_type="application/apply-patch+yaml",
                field_manager=FIELD_MANAGER,
                force_conflicts="true",
                dry_run="All" if dry_run else None,
            )
            or {}
        )

    def delete(self, path: str) -> None:
        """There is nothing at `path`, soon: its finalizers come first, and what it owns goes after it."""
        self._ask("delete", path, propagation_policy="Background")

    def allowed(self, verb: str, group: str, resource: str, name: str = "", namespace: str = "") -> bool:
        """Whether the caller may do that; `resource` may have a subresource behind a slash. Without a namespace: in all
        of them."""
        kind, _slash, sub = resource.partition("/")
        attributes = {"verb": verb, "group": group, "resource": kind, "subresource": sub, "name": name}
        attributes |= {"namespace": namespace} if namespace else {}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        asked = {**review, "spec": {"resourceAttributes": attributes}}
        answer = self._ask("post", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=asked) or {}
        return bool(answer.get("status", {}).get("allowed"))

    def authority(self) -> str:
        """The certificates (PEM) by which clients verify the API server: the kubeconfig's, else the cluster's own."""
        if self._authority:
            with open(self._authority, encoding="ascii", errors="replace") as file:
                return file.read().strip() + "\n"
        if not self.verified:
            raise ApiError(
                f"The way to {self.server} verifies no certificate, so that nobody knows by which authority the "
                "registrar may trust that server. Next: put certificate-authority-data into the kubeconfig, or set "
                "K8S_AUTH_SSL_CA_CERT, instead of switching the verification off"
            )
        found = self.get("/api/v1/namespaces/default/configmaps/kube-root-ca.crt") or {}
        pem = (found.get("data") or {}).get("ca.crt", "")
        if "BEGIN CERTIFICATE" not in pem:
            raise ApiError(
                f"Neither the kubeconfig nor the ConfigMap default/kube-root-ca.crt of {self.server} has the authority "
                "of the API server. Next: put certificate-authority-data into the kubeconfig"
            )
        return str(pem).strip() + "\n"

    def _ask(self, method: str, path: str, body: Any = None, **more: Any) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self._raw(method, path, body, **more))
        except NotThere:
            if method not in ("get", "delete"):
                raise
            return None
        return found

    def _raw(self, method: str, path: str, body: Any = None, **more: Any) -> bytes:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        more = {key: value for key, value in more.items() if value is not None}
        try:
            answer = self._client.request(method, path, body=body, serialize=False, _request_timeout=SECONDS, **more)
        except ApiException as exc:
            raise self._refusal(exc) from exc
        except (HTTPError, OSError, ValueError) as exc:
            reason = getattr(exc, "reason", None) or exc
            raise Silent(
                f"{self.server} does not answer: {_one_line(reason)}. Next: make the API server reachable from this "
                f"host, or {REMEDY}"
            ) from exc
        content: bytes = answer.data
        return content

    def _refusal(self, exc: Any) -> ApiError:
        told = _one_line(exc.reason)
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            told = _one_line(json.loads(exc.body)["message"])
        if exc.status == 401:
            return Silent(f"{self.server} does not know who asks (401, {told}). Next: renew the login, or {REMEDY}")
        if exc.status == 403:
            return Forbidden(
                f"{self.server}: {told}. Next: give the user of that kubeconfig the right (docs/kubernetes.md has all "
                "that are needed), or use another user"
            )
        if not exc.status or exc.status >= 500:
            return Silent(f"{self.server} cannot serve now ({exc.status or 'no HTTP'}, {told}). Next: run again later")
        kind = NotThere if exc.status == 404 else ApiError
        return kind(f"{self.server}: {told} ({exc.status}). Next: put that right and run again")


def node_addresses(node: Mapping[str, Any]) -> list[str]:
    """The IP addresses of a Node."""
    addresses: Iterable[Mapping[str, str]] = (node.get("status") or {}).get("addresses") or ()
    return [one["address"] for one in addresses if one.get("type") in ("InternalIP", "ExternalIP")]


def wrong_cluster(
    server: str,
    nodes: Iterable[Mapping[str, Any]],
    record: Mapping[str, Any],
    seen: Iterable[Mapping[str, Any]],
) -> str:
    """Why an API with these Nodes is not that of the cluster with this record; empty when nothing speaks against it.

    `seen` (the option) has the addresses that hosts were found to have. One node with the name and an address of a
    host suffices: nodes come and go, and one may be made anew.
    """
    hosts = {entry["kubernetes_node"]: name for name, entry in record["hosts"].items() if "kubernetes_node" in entry}
    found = {node["metadata"]["name"]: node_addresses(node) for node in nodes}
    addresses = {one["host"]: one["addresses"] for one in seen}
    if not hosts:
        return ""
    known = sorted(set(found) & set(hosts))
    where = f"{server} is not the API of cluster {record['name']}"
    following = "set isthmus_kubeconfig and isthmus_kubeconfig_context of the cluster's hosts to its own, or correct "
    if not known:
        return (
            f"{where}: its nodes are {some(found)}, and the hosts of the inventory are the nodes {some(hosts)}. "
            f"Next: {following}isthmus_kubernetes_node"
        )
    told = []
    for node in known:
        entry = record["hosts"][hosts[node]]
        own = {entry["underlay4"], entry["advertise4"], *addresses.get(hosts[node], ())}
        if own & set(found[node]):
            return ""
        told.append(f"node {node} has {some(found[node])}, host {hosts[node]} {some(own)}")
    return f"{where}: {'; '.join(told[:3])}. Next: {following}isthmus_underlay"


def some(names: Iterable[str], most: int = 8) -> str:
    """Names in a sentence; of many the first ones."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "none") + more
