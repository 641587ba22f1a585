# SPDX-License-Identifier: GPL-3.0-or-later
"""Compute Engine on the loopback, as strict as Google's own description of its API.

Every request is looked up in the discovery document that google-api-python-client carries: its method and path, its
query parameters and its body, field by field; answers are held against it too. Behaviour beyond it is what Google
documents: names are unique, ranges of subnetworks are no destinations, quotas, permissions by name, operations that
take their time.
"""

from __future__ import annotations

import contextlib
import json
import re
import urllib.parse
from collections.abc import Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import googleapiclient
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jsonschema import Draft7Validator
from vpc_modules import serving

PROJECT = "lab-project"
ROOT = "https://www.googleapis.com/compute/v1/"
TOKEN = "token-that-nobody-sees"  # noqa: S105 - of a service that is not there
DOCUMENTS = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
# Marked as required there, but described as what may stand in `networkPeering` instead; Google's own tools do so.
ELSEWHERE = {("compute.networks.addPeering", "name")}
# What Google says in `details` besides, where it does.
DETAILS = {"accessNotConfigured": "SERVICE_DISABLED", "rateLimitExceeded": "RATE_LIMIT_EXCEEDED"}
PERMISSIONS = {
    "compute.routes.insert": {"compute.routes.create", "compute.networks.updatePolicy"},
    "compute.routes.delete": {"compute.routes.delete", "compute.networks.updatePolicy"},
    "compute.firewalls.insert": {"compute.firewalls.create", "compute.networks.updatePolicy"},
    "compute.firewalls.update": {"compute.firewalls.update", "compute.networks.updatePolicy"},
    "compute.firewalls.delete": {"compute.firewalls.delete", "compute.networks.updatePolicy"},
}


@lru_cache
def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCUMENTS / name).read_text())
    return found


def methods(resources: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for one in resources.values():
        yield from one.get("methods", {}).values()
        yield from methods(one.get("resources", {}))


def strict(schema: Any) -> Any:
    """A schema of the discovery document as JSON Schema that takes no field which it does not name."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("$ref"), str):
        return {"$ref": f"#/schemas/{schema['$ref']}"}
    made = {
        key: {name: strict(one) for name, one in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if key in ("type", "properties", "items", "additionalProperties", "enum", "pattern")
    }
    if "pattern" in made:
        made["pattern"] = f"^(?:{made['pattern']})$"
    if "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


@lru_cache
def validator(name: str) -> Draft7Validator:
    schemas = {key: strict(value) for key, value in document("compute.v1.json")["schemas"].items()}
    return Draft7Validator({"$ref": f"#/schemas/{name}", "schemas": schemas})


@lru_cache
def paths() -> list[tuple[str, re.Pattern[str], dict[str, Any]]]:
    """HTTP method, path and description of every method that Compute Engine has."""
    return [
        (
            one["httpMethod"],
            re.compile("/compute/v1/" + re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(one["path"]))),
            one,
        )
        for one in methods(document("compute.v1.json")["resources"])
    ]


class Refused(Exception):
    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class Google:
    """A project with what a test puts into it; `calls` are the methods that were called, `wrong` what broke the API."""

    def __init__(self) -> None:
        self.root = ""
        self.reset()

    def reset(self) -> None:
        self.calls: list[str] = []
        self.wrong: list[str] = []
        self.denied: set[str] = set()
        self.off = False
        self.throttled: dict[str, int] = {}
        self.failing: dict[str, tuple[str, str]] = {}
        self.quota = 200
        self.may_ask = True
        self.networks: dict[str, dict[str, Any]] = {}
        self.subnetworks: list[dict[str, Any]] = []
        self.instances: dict[str, dict[str, Any]] = {}
        self.routes: dict[str, dict[str, Any]] = {}
        self.firewalls: dict[str, dict[str, Any]] = {}
        self.operations: dict[str, dict[str, Any]] = {}

    def link(self, *parts: str) -> str:
        return "/".join((f"{ROOT}projects", PROJECT, *parts))

    # what a test sets up

    def network(self, name: str, cidr: str, pods: str) -> None:
        link = self.link("global/networks", name)
        self.networks[name] = {"name": name, "selfLink": link}
        self.subnetworks.append(
            {
                "name": f"{name}-a",
                "network": link,
                "ipCidrRange": cidr,
                "secondaryIpRanges": [{"rangeName": "pods", "ipCidrRange": pods}],
            }
        )
        self.routes[f"default-{name}"] = {
            "name": f"default-{name}",
            "network": link,
            "destRange": "0.0.0.0/0",
            "nextHopGateway": self.link("global/gateways/default-internet-gateway"),
            "priority": 1000,
        }
        self.routes[f"subnet-{name}"] = {
            "name": f"subnet-{name}",
            "network": link,
            "destRange": cidr,
            "nextHopNetwork": link,
            "routeType": "SUBNET",
        }

    def instance(self, name: str, address: str, network: str, forwards: bool = True) -> None:
        self.instances[name] = {
            "name": name,
            "zone": self.link("zones/europe-west3-a"),
            "selfLink": self.link("zones/europe-west3-a/instances", name),
            "canIpForward": forwards,
            "networkInterfaces": [{"network": self.link("global/networks", network), "networkIP": address}],
        }

    # what the API does

    def answer(self, method: str, url: str, body: Any) -> dict[str, Any]:
        split = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(split.query))
        if split.path == f"/v1/projects/{PROJECT}:testIamPermissions":
            if not self.may_ask:
                raise Refused(403, "accessNotConfigured", "Cloud Resource Manager API has not been used in project")
            return {"permissions": [one for one in body["permissions"] if one not in self.denied]}
        for verb, path, description in paths():
            match = path.fullmatch(urllib.parse.unquote(split.path))
            if match and verb == method:
                self.calls.append(description["id"])
                self.check(description, query, body)
                found = self.do(description["id"], match.groupdict(), query, body)
                problem = next(iter(validator(description["response"]["$ref"]).iter_errors(found)), None)
                if problem is not None:
                    self.wrong.append(f"the double's answer to {description['id']}: {problem.message}")
                return found
        self.wrong.append(f"{method} {url} is no method of the API")
        raise Refused(404, "notFound", "no such method")

    def check(self, description: dict[str, Any], query: dict[str, str], body: Any) -> None:
        identifier = description["id"]
        known = {*description.get("parameters", {}), *document("compute.v1.json")["parameters"]}
        problems = [f"unknown parameter {name}" for name in query if name not in known]
        if "request" in description:
            name = description["request"]["$ref"]
            problems += [f"{one.json_path}: {one.message}" for one in validator(name).iter_errors(body)]
            for key, field in document("compute.v1.json")["schemas"][name]["properties"].items():
                required = identifier in field.get("annotations", {}).get("required", [])
                if required and key not in body and (identifier, key) not in ELSEWHERE:
                    problems.append(f"{key} is required")
                if field.get("readOnly") and key in body:
                    problems.append(f"{key} is output only")
        elif body is not None:
            problems.append("takes no body")
        if problems:
            self.wrong += [f"{identifier}: {one}" for one in problems]
            raise Refused(400, "invalid", "; ".join(problems))
        if self.throttled.get(identifier, 0) > 0:
            self.throttled[identifier] -= 1
            raise Refused(403, "rateLimitExceeded", "Rate Limit Exceeded")
        if self.off:
            raise Refused(403, "accessNotConfigured", "Compute Engine API has not been used in project")
        for permission in PERMISSIONS.get(identifier, {identifier}):
            if permission in self.denied:
                raise Refused(403, "forbidden", f"Required '{permission}' permission for 'projects/{PROJECT}'")

    def page(self, items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        start = int(query.get("pageToken", "0"))
        found: dict[str, Any] = {"items": items[start : start + 2]}
        return {**found, "nextPageToken": str(start + 2)} if start + 2 < len(items) else found

    def scoped(self, scope: str, key: str, items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        page = self.page(items, query)
        empty = {"regions/other": {"warning": {"code": "NO_RESULTS_ON_PAGE"}}}
        return {**page, "items": {**empty, scope: {key: page["items"]}}}

    def do(self, identifier: str, names: dict[str, str], query: dict[str, str], body: Any) -> dict[str, Any]:
        kind, verb = identifier.removeprefix("compute.").split(".")
        if (kind, verb) == ("projects", "get"):
            usage = sum("nextHopNetwork" not in one for one in self.routes.values())
            return {"quotas": [{"metric": "ROUTES", "limit": self.quota, "usage": usage}]}
        if (kind, verb) == ("networks", "get"):
            if names["network"] not in self.networks:
                raise Refused(404, "notFound", f"The resource '{names['network']}' was not found")
            return self.networks[names["network"]]
        if verb == "aggregatedList":
            if kind == "subnetworks":
                return self.scoped("regions/europe-west3", kind, self.subnetworks, query)
            return self.scoped("zones/europe-west3-a", kind, list(self.instances.values()), query)
        if kind in ("routes", "firewalls"):
            return self.do_item(identifier, getattr(self, kind), names, query, body)
        if kind == "networks":
            network = self.networks[names["network"]]
            one = body if verb == "removePeering" else body["networkPeering"]
            rest = [found for found in network.get("peerings", []) if found["name"] != one["name"]]
            new = rest if verb == "removePeering" else [*rest, one]
            return self.operation(identifier, lambda: network.update(peerings=new))
        if (kind, verb) == ("globalOperations", "wait"):
            operation = self.operations[names["operation"]]
            # Not before it was asked for a second time.
            operation["status"] = {"PENDING": "RUNNING"}.get(operation["status"], "DONE")
            return operation
        raise AssertionError(f"{identifier} is not played")

    def do_item(
        self, identifier: str, items: dict[str, Any], names: dict[str, str], query: dict[str, str], body: Any
    ) -> dict[str, Any]:
        """A method of routes or firewalls."""
        _compute, kind, verb = identifier.split(".")
        if verb == "list":
            return self.page([self.warned(one) for one in items.values()], query)
        name = body["name"] if verb == "insert" else names[kind.removesuffix("s")]
        if verb == "insert":
            if name in items:
                raise Refused(409, "alreadyExists", f"The resource '{name}' already exists")
            if kind == "routes":
                self.take_route(body)
            return self.operation(identifier, lambda: items.update({name: self.made(kind, body)}))
        if name not in items:
            raise Refused(404, "notFound", f"The resource '{name}' was not found")
        if verb == "delete":
            return self.operation(identifier, lambda: items.pop(name))
        return self.operation(identifier, lambda: items.update({name: self.made(kind, body)}))

    def made(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        # Google says every next hop in full, however it was asked for.
        hops = {
            key: f"{ROOT}{value.removeprefix(ROOT)}" if "projects/" in value else self.link(value)
            for key, value in body.items()
            if key.startswith("nextHop") and key != "nextHopIp"
        }
        return {**body, **hops, "selfLink": self.link("global", kind, body["name"])}

    def warned(self, one: dict[str, Any]) -> dict[str, Any]:
        addresses = {found["networkInterfaces"][0]["networkIP"] for found in self.instances.values()}
        if "nextHopIp" in one and one["nextHopIp"] not in addresses:
            return {**one, "warnings": [{"code": "NEXT_HOP_ADDRESS_NOT_ASSIGNED", "message": "no instance has it"}]}
        return one

    def take_route(self, body: dict[str, Any]) -> None:
        wanted = IPv4Network(body["destRange"])
        for one in self.subnetworks:
            for block in (one["ipCidrRange"], *(two["ipCidrRange"] for two in one["secondaryIpRanges"])):
                if one["network"] == body["network"] and wanted.subnet_of(IPv4Network(block)):
                    raise Refused(400, "invalid", f"{wanted} is within the range {block} of a subnetwork")
        if sum("nextHopNetwork" not in one for one in self.routes.values()) >= self.quota:
            raise Refused(403, "quotaExceeded", f"Quota 'ROUTES' exceeded. Limit: {self.quota}.0 globally.")

    def operation(self, identifier: str, do: Any) -> dict[str, Any]:
        name = f"operation-{len(self.operations)}"
        self.operations[name] = {"name": name, "status": "PENDING"}
        if identifier in self.failing:
            code, message = self.failing[identifier]
            self.operations[name]["error"] = {"errors": [{"code": code, "message": message}]}
        else:
            do()
        return dict(self.operations[name])


def _handler(google: Google) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def log_message(self, *_arguments: Any) -> None:
            pass

        def handle_any(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, found = 200, {}
            if self.path == "/token":
                found = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, found = 401, {"error": {"code": 401, "message": "Request had invalid credentials"}}
            else:
                try:
                    found = google.answer(self.command, self.path, json.loads(text) if text else None)
                except Refused as refusal:
                    status, detail = refusal.status, {"reason": refusal.reason, "message": str(refusal)}
                    found = {"error": {"code": status, "message": str(refusal), "errors": [detail]}}
                    if refusal.reason in DETAILS:
                        found["error"]["details"] = [
                            {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": DETAILS[refusal.reason]}
                        ]
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    return Handler


@contextlib.contextmanager
def google_on_loopback(place: Path) -> Iterator[tuple[Google, Path]]:
    """What plays Google, and the file of a service account whose tokens it gives out."""
    google = Google()
    with serving(_handler(google)) as server:
        google.root = f"http://127.0.0.1:{server.server_address[1]}"
        key = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account",
            "project_id": PROJECT,
            "client_email": "isthmus@lab-project.iam.gserviceaccount.com",
            "private_key": key.decode(),
            "token_uri": f"{google.root}/token",
        }
        file = place / "account.json"
        file.write_text(json.dumps(account))
        yield google, file
