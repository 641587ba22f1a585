# SPDX-License-Identifier: GPL-3.0-or-later
"""`isthmus-pki --wanted /etc/isthmus-pki/wanted.json`: a Job inside a cluster that makes its keys and certificates and
writes them straight into Secrets (`in_cluster_pki`). What is public goes into the ConfigMap `isthmus-pki`.

It asks the API server as its service account. Nothing of a Secret is ever in an output or an error.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import datetime
import http.client
import json
import os
import ssl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus_mesh import ownership
from isthmus_mesh.jsontext import canonical

from isthmus_agent import in_cluster_pki as core
from isthmus_agent.pki import PkiError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONFIG_MAP, KEY = "isthmus-pki", "issued.json"
TIMEOUT = 20.0
TRIES = 3
"""Another Job may have written between reading and writing."""


class JobError(Exception):
    """The Job cannot do its work; the text says what, where and the next step."""


class Conflict(JobError):
    """An object is not as it was read."""


class Api:
    """The API server's Secrets and ConfigMaps of one namespace, as a service account sees them.

    `directory` has the files that Kubernetes gives a pod: token, ca.crt, namespace. `server`: host and port."""

    def __init__(self, server: str, directory: Path) -> None:
        self.server = server
        self.namespace = (directory / "namespace").read_text().strip()
        self._token = directory / "token"
        self._context = ssl.create_default_context(cafile=str(directory / "ca.crt"))

    def get(self, resource: str, name: str) -> dict[str, Any] | None:
        status, body = self._ask("GET", resource, name, None)
        if status == 404:
            return None
        self._check(status, body, "get", resource, name)
        found: dict[str, Any] = json.loads(body)
        return found

    def write(self, resource: str, name: str, body: Mapping[str, Any], known: Mapping[str, Any] | None) -> None:
        """Create the object, or replace it in the version `known`. Conflict when somebody else was there first."""
        if known is None:
            status, answer = self._ask("POST", resource, "", body)
            self._check(status, answer, "create", resource, name)
        else:
            metadata = {**body["metadata"], "resourceVersion": known["metadata"]["resourceVersion"]}
            status, answer = self._ask("PUT", resource, name, {**body, "metadata": metadata})
            self._check(status, answer, "update", resource, name)

    def _ask(self, method: str, resource: str, name: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        path = f"/api/v1/namespaces/{self.namespace}/{resource}" + (f"/{name}" if name else "")
        headers = {"Authorization": f"Bearer {self._token.read_text().strip()}", "Content-Type": "application/json"}
        connection = http.client.HTTPSConnection(self.server, timeout=TIMEOUT, context=self._context)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise JobError(f"the Kubernetes API at {self.server} does not answer: {error}") from None
        finally:
            connection.close()

    def _check(self, status: int, body: bytes, verb: str, resource: str, name: str) -> None:
        if status < 300:
            return
        what = f"{verb} {resource} {self.namespace}/{name}"
        if status == 409:
            raise Conflict(f"{what}: it is not as it was read")
        if status == 403:
            raise JobError(
                f"{what}: RBAC does not allow the verb {verb} on {resource}: the Role isthmus-pki lacks it or is not "
                "bound; run the site playbook, which applies it"
            )
        try:  # the reason is one word of the API's; its message could quote what was sent
            reason = str(json.loads(body)["reason"])[:60]
        except (ValueError, KeyError, TypeError):
            reason = ""
        raise JobError(f"{what}: HTTP status {status} {reason}".rstrip())


def work(api: Api, wanted: core.Wanted, now: datetime.datetime) -> list[str]:
    """Make what lacks and write what changed; what was done, a line each. Conflict, JobError, PkiError."""
    secrets = {name: api.get("secrets", name) for name in core.SECRETS}
    public = api.get("configmaps", CONFIG_MAP)
    for kind, name, found in [*(("Secret", *one) for one in secrets.items()), ("ConfigMap", CONFIG_MAP, public)]:
        labels = (found or {"metadata": {}})["metadata"].get("labels") or {}
        if found is not None and (other := ownership.stranger(labels, wanted.labels)):
            raise JobError(
                f"{kind} {api.namespace}/{name} is not ours: {other}. Remove or rename it, and run the site playbook "
                "again"
            )
    content = {name: _content(found, name) for name, found in secrets.items() if found is not None}
    outcome = core.settle(wanted, content, _issued(public), now)
    told = list(outcome.told)
    for name in core.SECRETS:
        if content.get(name) != outcome.secrets[name]:
            data = {key: base64.b64encode(value).decode() for key, value in sorted(outcome.secrets[name].items())}
            body = _object("Secret", name, wanted) | {"type": "Opaque", "data": data}
            api.write("secrets", name, body, secrets[name])
    issued = canonical(outcome.issued)
    if public is None or (public.get("data") or {}).get(KEY) != issued:
        api.write("configmaps", CONFIG_MAP, _object("ConfigMap", CONFIG_MAP, wanted) | {"data": {KEY: issued}}, public)
    return told


def _object(kind: str, name: str, wanted: core.Wanted) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "labels": dict(wanted.labels)}}


def _content(secret: Mapping[str, Any], name: str) -> dict[str, bytes]:
    try:
        return {key: base64.b64decode(value, validate=True) for key, value in (secret.get("data") or {}).items()}
    except (binascii.Error, ValueError, TypeError):
        raise JobError(f"Secret {name} holds what is no base64") from None


def _issued(public: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What was public before, as far as it has the right form: all of it can be made again."""
    try:
        found = json.loads((public or {})["data"][KEY])
        requests = {str(peer): {"csr": str(one["csr"])} for peer, one in found["requests"].items()}
        signed = [{key: str(one[key]) for key in ("csr", "certificate")} for one in found["signed"]]
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {"requests": requests, "signed": signed}


def main(arguments: Sequence[str] | None = None) -> int:
    """0: everything is as wanted. 1, with one line on stderr: it is not."""
    parser = argparse.ArgumentParser(prog="isthmus-pki", description="make this cluster's keys and certificates")
    parser.add_argument("--wanted", type=Path, default=Path("/etc/isthmus-pki/wanted.json"))
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="the service account's files")
    parser.add_argument("--server", help="host:port of the API server; default: as Kubernetes tells pods")
    options = parser.parse_args(arguments)
    try:
        server = options.server or f"{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
        wanted = core.Wanted.from_json(options.wanted.read_bytes())
        api = Api(server, options.account)
        for left in reversed(range(TRIES)):
            try:
                told = work(api, wanted, datetime.datetime.now(datetime.timezone.utc))
                break
            except Conflict:
                if not left:
                    raise
        for line in told or ["everything is as wanted"]:
            print(line)
    except KeyError as error:
        print(f"isthmus-pki: this is no pod: the environment lacks {error}; give --server", file=sys.stderr)
    except (OSError, JobError, PkiError, core.WantedError) as error:
        print(f"isthmus-pki: {error}", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
