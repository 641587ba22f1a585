# SPDX-License-Identifier: GPL-3.0-or-later
"""Azure's network API on the loopback, over TLS; what is written is held against the models of Azure's own client.

A body may have only fields that its model names, of that field's type. Beyond that it does what Azure documents: a
change takes a moment (Azure-AsyncOperation), lists come in pages, a stale ETag is refused, prefixes, names and
priorities are unique, what is in use cannot be deleted.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import enum
import json
import ssl
import typing
import urllib.parse
from collections.abc import Iterator, MutableMapping
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from azure.mgmt.network import models
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from vpc_modules import serving

SUBSCRIPTION = "00000000-0000-0000-0000-000000000001"
GROUP = "lab-group"
TOKEN = "token-that-nobody-sees"  # noqa: S105 - of a service that is not there
NETWORK = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{GROUP}/providers/Microsoft.Network"
WAIT = "x-ms-retry-after-ms"
# Kind of a resource, the list that holds it in its parent's properties, its model.
KINDS: dict[str, tuple[str, type[Any]]] = {
    "virtualNetworks": ("", models.VirtualNetwork),
    "subnets": ("subnets", models.Subnet),
    "virtualNetworkPeerings": ("virtualNetworkPeerings", models.VirtualNetworkPeering),
    "networkInterfaces": ("", models.NetworkInterface),
    "routeTables": ("", models.RouteTable),
    "routes": ("routes", models.Route),
    "networkSecurityGroups": ("", models.NetworkSecurityGroup),
    "securityRules": ("securityRules", models.SecurityRule),
}


def problems(kind: Any, value: Any, where: str) -> Iterator[str]:
    """What in `value` (JSON) is not of `kind` (a type as the client's models write it)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union:
        if value is None and type(None) in arguments:
            return
        choices = [one for one in arguments if one is not type(None)]
        enums = [one for one in choices if isinstance(one, type) and issubclass(one, enum.Enum)]
        if enums:
            # The client takes any string there; Azure does not.
            if value not in {one.value for one in enums[0]}:
                yield f"{where}: {value!r} is none of {enums[0].__name__}"
            return
        found = [list(problems(one, value, where)) for one in choices]
        if all(found):
            yield from found[0]
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
            return
        for number, one in enumerate(value):
            yield from problems(arguments[0], one, f"{where}[{number}]")
    elif origin is dict:
        for key, one in value.items():
            yield from problems(arguments[1], one, f"{where}.{key}")
    elif isinstance(kind, type) and issubclass(kind, MutableMapping):
        kind()  # fills the table of fields
        hints = typing.get_type_hints(kind, localns={"_models": models})
        fields = {field._rest_name: hints[name] for name, field in kind._attr_to_rest_field.items()}
        for key, one in value.items():
            if key not in fields:
                yield f"{where}.{key} is no field of {kind.__name__}"
            else:
                yield from problems(fields[key], one, f"{where}.{key}")
    elif isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        yield f"{where}: {value!r} is no {kind.__name__}"


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Azure:
    """A resource group; `resources` by lower-case id; `wrong` is what broke the API."""

    def __init__(self) -> None:
        self.root = ""
        self.reset()

    def reset(self) -> None:
        self.resources: dict[str, dict[str, Any]] = {}
        self.wrong: list[str] = []
        self.calls: list[str] = []
        self.granted: list[dict[str, list[str]]] = [{"actions": ["*"], "notActions": []}]
        self.denied: set[str] = set()
        self.forbidden: set[str] = set()  # by a policy
        self.may_ask = True
        self.throttled = 0
        self.limit = 400
        self.version = 0

    # what a test sets up

    def put(self, path: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
        """A resource that was there before, ``routeTables/x`` with its properties."""
        identifier = f"{NETWORK}/{path}"
        made = {
            "id": identifier,
            "name": path.rsplit("/", 1)[1],
            "location": "germanywestcentral",
            "properties": properties,
            **more,
        }
        self.resources[identifier.lower()] = made
        self.stamp(made)
        return made

    def stamp(self, resource: dict[str, Any]) -> None:
        """A new ETag; a virtual network has one with all of its subnets."""
        self.version += 1
        for one in (resource, *resource["properties"].get("subnets", [])):
            one["etag"] = f'W/"{self.version}"'

    def subnet(self, vnet: str, name: str, **properties: Any) -> dict[str, Any]:
        return {
            "id": f"{NETWORK}/virtualNetworks/{vnet}/subnets/{name}",
            "name": name,
            "properties": properties,
        }

    def interface(self, name: str, address: str, subnet: str, **properties: Any) -> dict[str, Any]:
        config = {"name": "one", "properties": {"privateIPAddress": address, "subnet": {"id": f"{NETWORK}/{subnet}"}}}
        return self.put(
            f"networkInterfaces/{name}",
            {"ipConfigurations": [config], "enableIPForwarding": False, **properties},
            tags={"team": "shop"},
        )

    def get(self, path: str) -> dict[str, Any]:
        return self.resources[f"{NETWORK}/{path}".lower()]

    def listed(self, path: str, holder: str) -> dict[str, Any]:
        """The properties of what a resource holds (routes, securityRules), by name."""
        return {one["name"]: one["properties"] for one in self.get(path)["properties"].get(holder, [])}

    def everything(self) -> Any:
        """All of it without ETags, to be compared."""

        def bare(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: bare(one) for key, one in value.items() if key != "etag"}
            return [bare(one) for one in value] if isinstance(value, list) else value

        return bare(copy.deepcopy(self.resources))

    # what the API does

    def answer(self, method: str, url: str, headers: Any, body: Any) -> tuple[int, dict[str, str], Any]:
        split = urllib.parse.urlsplit(url)
        path, query = split.path, dict(urllib.parse.parse_qsl(split.query))
        if self.throttled > 0:
            self.throttled -= 1
            return 429, {WAIT: "1"}, {"error": {"code": "TooManyRequests", "message": "too many"}}
        if path.startswith("/operations/"):
            self.pending -= 1
            return 200, {WAIT: "1"}, {"status": "Succeeded" if self.pending <= 0 else "InProgress"}
        if path.endswith("/providers/Microsoft.Authorization/permissions"):
            if not self.may_ask:
                raise Refused(403, "AuthorizationFailed", "does not have authorization to perform action 'x'")
            return 200, {}, {"value": self.granted}
        if path == f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.Network/networkInterfaces":
            start = int(query.get("page", "0"))
            every = [one for key, one in self.resources.items() if "/networkinterfaces/" in key]
            more = {"nextLink": f"{self.root}{path}?page={start + 2}"} if start + 2 < len(every) else {}
            return 200, {}, {"value": every[start : start + 2], **more}
        words = path.split("/")
        kind = words[-2]
        assert kind in KINDS, f"{method} {path} is not played"
        action = "/".join(words[words.index("Microsoft.Network") + 1 :: 2])
        verb = {"GET": "read", "PUT": "write", "DELETE": "delete"}[method]
        if f"{action}/{verb}" in self.forbidden:
            raise Refused(403, "RequestDisallowedByPolicy", f"Resource '{words[-1]}' was disallowed by policy.")
        linked = body and body.get("properties", {}).get("routeTable")
        if method == "PUT" and linked and "routeTables/join/action" in self.denied:
            text = (
                f"The client 'x' has permission to perform action 'Microsoft.Network/{action}/{verb}' on scope "
                f"'{path}'; however, it does not have permission to perform action(s) "
                "'Microsoft.Network/routeTables/join/action' "
                f"on the linked scope(s) '{linked['id']}' or the linked scope(s) are invalid."
            )
            raise Refused(403, "LinkedAuthorizationFailed", text)
        if f"{action}/{verb}" in self.denied:
            text = f"The client 'x' does not have authorization to perform action 'Microsoft.Network/{action}/{verb}'"
            raise Refused(403, "AuthorizationFailed", text)
        holder, model = KINDS[kind]
        if method == "PUT":
            found = list(problems(model, body, kind))
            if found:
                self.wrong += found
                raise Refused(400, "InvalidRequestFormat", "; ".join(found))
        self.calls.append(f"{verb} {action}")
        place: Any = self.resources
        if holder:
            parent = self.find(path.rsplit("/", 2)[0])
            place = parent["properties"].setdefault(holder, [])
        there = self.find(path, missing=True)
        if "If-Match" in headers and (there is None or there.get("etag") != headers["If-Match"]):
            raise Refused(412, "PreconditionFailed", "Precondition failed.")
        if method == "GET":
            return 200, {}, self.find(path)
        if method == "PUT":
            self.take(kind, path, body, place)
            made = self.store(path, body, place, there)
            if kind == "virtualNetworkPeerings":
                for one, other in ((made, self.half(path, made)), (self.half(path, made), made)):
                    if one:
                        one["properties"]["peeringState"] = "Connected" if other else "Initiated"
            self.stamp(parent if holder else made)
            return 201, self.later(), {**made, "properties": {**made["properties"], "provisioningState": "Updating"}}
        if there is None:
            return 204, {}, None
        if kind == "routeTables" and path.lower() in json.dumps(self.resources).lower().replace(
            f'"id": "{path.lower()}"', "", 1
        ).replace(f'"{path.lower()}"', "", 1):
            raise Refused(400, "InUseRouteTableCannotBeDeleted", f"Route table {words[-1]} is in use")
        if holder:
            place.remove(there)
            if kind == "virtualNetworkPeerings" and (other := self.half(path, there)):
                other["properties"]["peeringState"] = "Disconnected"
            self.stamp(parent)
        else:
            del place[path.lower()]
        return 202, self.later(), None

    def later(self) -> dict[str, str]:
        self.pending = 2
        address = f"{self.root}/operations/1"
        return {"Azure-AsyncOperation": address, WAIT: "1"}

    def find(self, path: str, missing: bool = False) -> Any:
        words = path.split("/")
        holder = KINDS[words[-2]][0]
        if holder:
            items = self.find(path.rsplit("/", 2)[0])["properties"].get(holder, [])
            found = next((one for one in items if one["name"] == words[-1]), None)
        else:
            found = self.resources.get(path.lower())
        if found is None and not missing:
            raise Refused(404, "ResourceNotFound", f"The Resource '{words[-1]}' was not found.")
        return found

    def half(self, path: str, peering: Any) -> Any:
        """The other network's half of a peering."""
        far = self.resources.get(peering["properties"]["remoteVirtualNetwork"]["id"].lower(), {"properties": {}})
        near = path.rsplit("/", 2)[0].lower()
        halves = far["properties"].get("virtualNetworkPeerings", [])
        return next((one for one in halves if one["properties"]["remoteVirtualNetwork"]["id"].lower() == near), None)

    def take(self, kind: str, path: str, body: dict[str, Any], place: Any) -> None:
        """Refuses what Azure would."""
        name, properties = path.rsplit("/", 1)[1], body.get("properties", {})
        others = [one["properties"] for one in place if one["name"] != name] if isinstance(place, list) else []
        if kind == "routes":
            if properties["nextHopType"] == "VirtualAppliance":
                ip_address(properties["nextHopIpAddress"])
            if properties["addressPrefix"] in {one["addressPrefix"] for one in others}:
                raise Refused(400, "AnotherRouteHasSameAddressPrefix", f"{properties['addressPrefix']} is there")
            if len(others) >= self.limit:
                raise Refused(400, "RoutesPerRouteTableLimitReached", f"a table holds {self.limit} routes")
        if kind == "virtualNetworkPeerings":
            other = self.half(path, body)
            if other and other["properties"]["peeringState"] == "Disconnected":
                raise Refused(400, "RemotePeeringIsDisconnected", f"remote peering {other['name']} is Disconnected")
        if kind == "securityRules":
            if not 100 <= properties["priority"] <= 4096:
                raise Refused(400, "SecurityRuleInvalidPriority", "priority")
            if properties["priority"] in {one["priority"] for one in others}:
                raise Refused(400, "SecurityRuleConflict", "priority is taken")

    def store(self, path: str, body: dict[str, Any], place: Any, there: Any) -> dict[str, Any]:
        self.version += 1
        made = {**copy.deepcopy(body), "id": path, "name": path.rsplit("/", 1)[1], "etag": f'W/"{self.version}"'}
        made.setdefault("properties", {})
        if isinstance(place, list):
            if there is None:
                place.append(made)
            else:
                place[place.index(there)] = made
        else:
            place[path.lower()] = made
        return made


def _handler(azure: Azure) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def log_message(self, *_arguments: Any) -> None:
            pass

        def handle_any(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers: dict[str, str] = {}
            found: Any
            if self.path.startswith("/identity"):
                assert self.headers["X-IDENTITY-HEADER"] == "here"
                status, found = 200, {"access_token": TOKEN, "expires_on": "4102444800", "token_type": "Bearer"}
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, found = 401, {"error": {"code": "AuthenticationFailed", "message": "no token"}}
            else:
                try:
                    status, headers, found = azure.answer(
                        self.command, self.path, self.headers, json.loads(text) if text else None
                    )
                except Refused as refusal:
                    status, found = refusal.status, {"error": {"code": refusal.code, "message": str(refusal)}}
            body = b"" if found is None else json.dumps(found).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_DELETE = handle_any

    return Handler


def _certificate(place: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = place / "server.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return file


@contextlib.contextmanager
def azure_on_loopback(place: Path) -> Iterator[tuple[Azure, Path]]:
    """What plays Azure and its identity service, and the file of the certificate to trust."""
    azure = Azure()
    file = _certificate(place)
    with serving(_handler(azure)) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        azure.root = f"https://127.0.0.1:{server.server_address[1]}"
        yield azure, file
