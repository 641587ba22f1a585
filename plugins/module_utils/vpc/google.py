# SPDX-License-Identifier: BSD-2-Clause
"""Google Cloud: static routes and firewall rules of a VPC network, network peering.

What is ours says so in its description (``isthmus.mesh owner=<owner>``); a peering, which has none, in its name.
Routes cannot be changed, so a new one is made beside the old one, which goes last.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.vpc import plan as pure
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc.steps import Plan, ProviderError, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
RETRIES = 6  # of a throttled call; the last one waits for up to 64 s
PRIORITY = 1000
NEXT_HOPS = {
    "/vpnTunnels/": "nextHopVpnTunnel",
    "/forwardingRules/": "nextHopIlb",
    "/instances/": "nextHopInstance",
    "/gateways/": "nextHopGateway",
}
# AWX's credential type sets these beside GOOGLE_APPLICATION_CREDENTIALS; older tools know only them.
FILES = ("GCP_SERVICE_ACCOUNT_FILE", "GCE_CREDENTIALS_FILE_PATH")
PROJECTS = ("GCP_PROJECT", "GCE_PROJECT")
# Reasons of a 403 that is not for want of a permission, as `errors` and `details` of an answer name them.
NOT_DENIED = {
    *("rateLimitExceeded", "userRateLimitExceeded", "quotaExceeded", "accessNotConfigured"),
    *("RATE_LIMIT_EXCEEDED", "SERVICE_DISABLED"),
}


def path_of(url: str) -> str:
    """A resource's URL without host and version: ``projects/p/global/networks/n``."""
    return url[url.index("projects/") :] if "projects/" in url else url


class Api:
    """Compute Engine of one project."""

    def __init__(self, project: str | None, endpoint: str | None) -> None:
        import google.auth
        from google.auth.exceptions import GoogleAuthError, RefreshError
        from google.oauth2 import service_account
        from googleapiclient import discovery
        from googleapiclient.errors import HttpError

        self.http_error = HttpError
        self.errors = (GoogleAuthError, RefreshError, OSError)
        file = next((os.environ[name] for name in FILES if os.environ.get(name)), None)
        try:
            if file and not os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                credentials = service_account.Credentials.from_service_account_file(file, scopes=[SCOPE])
                found = credentials.project_id
            else:
                credentials, found = google.auth.default(scopes=[SCOPE])
        except (*self.errors, ValueError) as exc:  # ValueError: the file is no service account's key
            raise ProviderError("google.auth", str(exc)) from exc
        self.project = project or next((os.environ[name] for name in PROJECTS if os.environ.get(name)), None) or found
        if not self.project:
            raise ProviderError("google.auth", "neither the option project nor the credentials name a project")

        def build(service: str, version: str, path: str) -> Any:
            options = {"api_endpoint": endpoint.format(service=service).rstrip("/") + path} if endpoint else None
            return discovery.build(
                service,
                version,
                credentials=credentials,
                client_options=options,
                static_discovery=True,
                cache_discovery=False,
            )

        self.compute = build("compute", "v1", "/compute/v1/")
        self.manager = lambda: build("cloudresourcemanager", "v1", "/")

    def path(self, url: str) -> str:
        """As `path_of`; a URL without a project (``regions/r/vpnTunnels/t``) is of this one."""
        return path_of(url) if "projects/" in url else f"projects/{self.project}/{url}"

    def execute(self, request: Any) -> Any:
        """A request's answer; ProviderError when it is refused."""
        call = request.methodId
        try:
            return request.execute(num_retries=RETRIES)
        except self.http_error as exc:
            reasons = {one.get("reason") for one in exc.error_details if isinstance(one, dict)}
            permission = ""
            if exc.resp.status == 403 and not reasons & NOT_DENIED:
                named = re.search(r"'(compute\.[\w.]+)' permission", exc.reason)
                permission = named[1] if named else f"for {call}"
            gone = exc.resp.status == 404 and call == "compute.networks.get"
            raise ProviderError(call, f"{exc.resp.status}: {exc.reason}", permission, gone) from exc
        except self.errors as exc:
            raise ProviderError(call, str(exc)) from exc

    def everything(self, collection: Any, aggregated: str = "") -> list[Any]:
        """All items of a collection of the project, page by page; of all zones or regions with `aggregated`."""
        listing, further = (
            (collection.aggregatedList, collection.aggregatedList_next)
            if aggregated
            else (collection.list, collection.list_next)
        )
        request = listing(project=self.project)
        found: list[Any] = []
        while request is not None:
            answer = self.execute(request)
            if aggregated:
                found += [one for scope in answer.get("items", {}).values() for one in scope.get(aggregated, [])]
            else:
                found += answer.get("items", [])
            request = further(request, answer)
        return found

    def change(self, request: Any) -> None:
        """A request that changes something, until it is done."""
        operation = self.execute(request)
        while operation["status"] != "DONE":
            # Returns when it is done, after two minutes at the latest.
            operation = self.execute(
                self.compute.globalOperations().wait(project=self.project, operation=operation["name"])
            )
        problems = operation.get("error", {}).get("errors", [])
        if problems:
            words = "; ".join(f"{one['code']}: {one.get('message', '')}" for one in problems)
            raise ProviderError(request.methodId, words)

    def missing(self, permissions: list[str]) -> dict[str, str]:
        """Of these permissions those that the credentials lack in the project; none when that cannot be asked."""
        if any(one.startswith(("compute.routes.", "compute.firewalls.")) for one in permissions):
            permissions = [*permissions, "compute.networks.updatePolicy"]
        request = self.manager().projects().testIamPermissions(resource=self.project, body={"permissions": permissions})
        try:
            granted = self.execute(request).get("permissions", [])
        except ProviderError:
            return {}  # the API is off in this project; a refusal comes on the way then
        return {one: f"on project {self.project}" for one in permissions if one not in granted}


class _Network:
    """What is in the network, read once."""

    def __init__(self, api: Api, name: str) -> None:
        self.name = name
        self.nobody = f"no instance in {name}"
        self.link = api.execute(api.compute.networks().get(project=api.project, network=name))["selfLink"]
        self.path = path_of(self.link)
        subnets = self._here(api.everything(api.compute.subnetworks(), "subnetworks"))
        self.ranges = {}
        for one in subnets:
            self.ranges[one["ipCidrRange"]] = f"a range of subnetwork {one['name']}"
            for second in one.get("secondaryIpRanges", []):
                self.ranges[second["ipCidrRange"]] = f"a secondary range of subnetwork {one['name']}"
        self.instances = {
            interface["networkIP"]: instance
            for instance in api.everything(api.compute.instances(), "instances")
            for interface in instance["networkInterfaces"]
            if path_of(interface["network"]) == self.path and "networkIP" in interface
        }
        self.by_path = {path_of(one.get("selfLink", "")): address for address, one in self.instances.items()}
        self.routes = self._here(api.everything(api.compute.routes()))
        self.firewalls = self._here(api.everything(api.compute.firewalls()))

    def _here(self, items: list[Any]) -> list[Any]:
        return [one for one in items if path_of(one["network"]) == self.path]


def plan_routes(params: Mapping[str, Any]) -> Plan:
    """Everything that makes the network hold what the module's options ask for."""
    wishes, rules, hosts, problems = pure.read(params)
    plan = Plan(problems=problems)
    if problems:
        return plan
    api = Api(params["project"], params["endpoint"])
    network = _Network(api, params["network"])
    owner, present = params["owner"], params["state"] == "present"
    plan.missing = api.missing
    table = _table(network, owner, _limit(api, params["route_limit"]))
    wanted: list[pure.Route] = []
    lost: set[str] = set()
    if present:
        plan.problems += pure.overlaps(wishes, network.ranges)
        wanted, lost = _wanted(api, network, wishes, table, plan)
        plan.without(hosts, network.instances, network.nobody, wishes)
    change = pure.difference(table, wanted, lost, beside=True)
    plan.problems += change.problems
    plan.warnings += change.warnings
    made, removed = _rule_steps(api, network, owner, rules if present else [], hosts, wishes, plan)
    for found in [*change.remove, *(found for found, _route in change.replace)]:
        (made if found in change.first else removed).append(
            _step(
                api,
                f"route {found.key} of {network.name}",
                f"{found.destination} to {found.target}",
                "",
                lambda key=found.key: api.compute.routes().delete(project=api.project, route=key),
                "compute.routes.delete",
            )
        )
    for route in change.add:
        made.append(_insert(api, network, owner, route, ""))
    for found, route in change.replace:
        made.append(_insert(api, network, owner, route, found.target))
    plan.steps += made + removed
    plan.result = {
        "route_tables": [network.path],
        "blackholes": pure.dead_routes(table),
        "borrowed": [{"table": table.name, "destination": one.destination} for one in change.borrowed],
    }
    return plan


def _step(api: Api, what: str, before: str, after: str, request: Callable[[], Any], permission: str) -> Step:
    return Step(what, before, after, lambda: api.change(request()), permission)


def _wanted(
    api: Api, network: _Network, wishes: list[pure.Wish], table: pure.Table, plan: Plan
) -> tuple[list[pure.Route], set[str]]:
    """Routes as they should be, and destinations whose host is gone (known ones wait, a new one is a mistake)."""
    known = {one.destination for one in table.routes if one.owned}
    wanted, lost = [], set()
    for wish in wishes:
        address, gateway = wish.hop.address, api.path(wish.hop.gateway)
        hop = _next_hop(wish.hop.gateway)
        if hop == "nextHopInstance":
            # An instance is known by its address, as it is where a route of the network leads to one.
            address = network.by_path.get(gateway, gateway)
        instance = network.instances.get(address)
        if not address:
            if hop == "nextHopIp":
                plan.problems.append(
                    f"{wish.hop.gateway!r} is no next hop of Google that is known here. Next: write a partial URL like "
                    "projects/p/regions/r/vpnTunnels/t."
                )
        elif instance is None:
            plan.lost(wish, network.nobody, wish.destination in known)
            lost.add(wish.destination)
            continue
        elif not instance.get("canIpForward"):
            zone = instance["zone"].rsplit("/", 1)[-1]
            plan.problems.append(
                f"instance {instance['name']} ({address}) may not forward, so {wish.destination} cannot lead to it. "
                "Google lets that be set when an instance is made, and this module restarts or replaces none. Next: "
                f"make it anew with canIpForward (gcloud compute instances create {instance['name']} --zone {zone} "
                "--can-ip-forward ...)."
            )
        wanted.append(pure.Route(wish.destination, address or gateway))
    return wanted, lost


def _next_hop(target: str) -> str:
    return next((name for part, name in NEXT_HOPS.items() if part in target), "nextHopIp")


def _description(owner: str) -> str:
    return f"isthmus.mesh owner={owner}"


def _table(network: _Network, owner: str, quota: tuple[int, int] | None) -> pure.Table:
    routes = []
    for one in network.routes:
        if "nextHopNetwork" in one:
            continue  # a subnetwork's, looked at as a range
        hops = [key for key in sorted(one) if key.startswith("nextHop")]
        target = path_of(str(one[hops[0]])) if hops else "?"
        routes.append(
            pure.Found(
                one["destRange"],
                network.by_path.get(target, target),
                one.get("description") == _description(owner),
                one["name"],
                ", ".join(note["code"] for note in one.get("warnings", []) if note["code"].startswith("NEXT_HOP_")),
                f"route {one['name']}" if "nextHopPeering" not in one else "by a peering",
                "nextHopPeering" not in one,
            )
        )
    limit = None
    if quota is not None:
        # The quota is the project's; what its other networks use is not to be had here.
        limit = quota[0] - max(quota[1] - sum(one.counts for one in routes), 0)
    return pure.Table(f"network {network.name}", routes, limit)


def _limit(api: Api, declared: int | None) -> tuple[int, int] | None:
    """How many routes the project may have, and has."""
    if declared is not None:
        return declared, 0
    quotas = api.execute(api.compute.projects().get(project=api.project)).get("quotas", [])
    return next(((int(one["limit"]), int(one["usage"])) for one in quotas if one["metric"] == "ROUTES"), None)


def route_name(owner: str, route: pure.Route) -> str:
    """Name of a route; another target is another name, so that two can be there for a moment."""
    digest = hashlib.sha256(route.target.encode()).hexdigest()[:6]
    return f"isthmus-{owner}-{re.sub('[./]', '-', route.destination)}-{digest}"


def _insert(api: Api, network: _Network, owner: str, route: pure.Route, before: str) -> Step:
    name = route_name(owner, route)
    body = {
        "name": name,
        "description": _description(owner),
        "network": network.link,
        "destRange": route.destination,
        "priority": PRIORITY,
        _next_hop(route.target): route.target,
    }
    return _step(
        api,
        f"route {name} of {network.name}",
        f"{route.destination} to {before}" if before else "",
        f"{route.destination} to {route.target}",
        lambda: api.compute.routes().insert(project=api.project, body=body),
        "compute.routes.create",
    )


def _rule_steps(
    api: Api,
    network: _Network,
    owner: str,
    rules: list[pure.Rule],
    hosts: list[str],
    wishes: list[pure.Wish],
    plan: Plan,
) -> tuple[list[Step], list[Step]]:
    """Steps for one firewall rule per port, for exactly the hosts."""
    wanted = {}
    for (protocol, port), sources in pure.by_port(rules).items():
        name = f"isthmus-{owner}-{pure.named(protocol, port, '-')}"
        every = protocol == pure.ALL
        wanted[name] = {
            "name": name,
            "description": _description(owner),
            "network": network.link,
            "direction": "INGRESS",
            "priority": PRIORITY,
            "disabled": False,
            "allowed": [{"IPProtocol": protocol, **({} if every else {"ports": [str(port)]})}],
            "sourceRanges": sources,
            "destinationRanges": pure.destinations(hosts, wishes if every else ()),
        }
    there = {one["name"]: one for one in network.firewalls}
    ours = {name for name, one in there.items() if one.get("description") == _description(owner)}
    made, removed = [], []
    for name, body in wanted.items():
        what = f"firewall rule {name} of {network.name}"
        if name not in there:
            made.append(
                _step(
                    api,
                    what,
                    "",
                    _shown(body),
                    lambda body=body: api.compute.firewalls().insert(project=api.project, body=body),
                    "compute.firewalls.create",
                )
            )
        elif name not in ours:
            plan.problems.append(
                f"{what} is there with another description ({there[name].get('description', '')!r}), so it is somebody "
                "else's. Next: rename it, or choose another owner."
            )
        elif _shown(there[name]) != _shown(body):
            made.append(
                _step(
                    api,
                    what,
                    _shown(there[name]),
                    _shown(body),
                    lambda name=name, body=body: api.compute.firewalls().update(
                        project=api.project, firewall=name, body=body
                    ),
                    "compute.firewalls.update",
                )
            )
    for name in sorted(ours - set(wanted)):
        removed.append(
            _step(
                api,
                f"firewall rule {name} of {network.name}",
                _shown(there[name]),
                "",
                lambda name=name: api.compute.firewalls().delete(project=api.project, firewall=name),
                "compute.firewalls.delete",
            )
        )
    return made, removed


def _shown(rule: Mapping[str, Any]) -> str:
    """All of a firewall rule that matters, as lines; equal when two let the same through."""
    allowed = sorted(f"{one['IPProtocol']}/{','.join(one.get('ports', ['*']))}" for one in rule.get("allowed", []))
    lines = [f"{rule.get('direction', 'INGRESS')} {' '.join(allowed)} priority {rule.get('priority', PRIORITY)}"]
    lines += [
        f"{key}: {' '.join(sorted(rule[key]))}"
        for key in ("sourceRanges", "destinationRanges", "sourceTags", "targetTags", "targetServiceAccounts")
        if rule.get(key)
    ]
    return "\n".join(lines + (["disabled"] if rule.get("disabled") else []))


def plan_peering(params: Mapping[str, Any]) -> Plan:
    """The peering of two networks, which each of them must have."""
    sides = params["sides"]
    apis = [Api(side["project"], params["endpoint"]) for side in sides]
    owner = params["owner"]
    plan = Plan(result={"peering": ""})
    plan.missing = lambda permissions: {**apis[0].missing(permissions), **apis[1].missing(permissions)}
    present = params["state"] == "present"
    networks = []
    for api, side in zip(apis, sides):
        name = side["network"]
        try:
            networks.append(api.execute(api.compute.networks().get(project=api.project, network=name)))
        except ProviderError as exc:
            if present or not exc.gone:
                raise
            plan.gone(exc)
            networks.append({"name": name, "selfLink": api.path(f"global/networks/{name}")})
    if present:
        blocks = [
            [
                one["ipCidrRange"]
                for one in api.everything(api.compute.subnetworks(), "subnetworks")
                if path_of(one["network"]) == path_of(network["selfLink"])
            ]
            for api, network in zip(apis, networks)
        ]
        plan.problems += pure.clashes([side["network"] for side in sides], blocks)
    for api, network, other in ((apis[0], *networks), (apis[1], *reversed(networks))):
        _peer(api, network, other, owner, present, plan)
    return plan


def _peer(api: Api, network: Any, other: Any, owner: str, present: bool, plan: Plan) -> None:
    name = network["name"]
    # Names of a network are at most 63 characters long, and so is that of a peering.
    wanted = {
        "name": f"isthmus-{owner}-{other['name']}"[:63].rstrip("-"),
        "network": other["selfLink"],
        "exchangeSubnetRoutes": True,
        "exportCustomRoutes": True,
        "importCustomRoutes": True,
    }
    link = path_of(other["selfLink"])
    found = next((one for one in network.get("peerings", []) if path_of(one["network"]) == link), None)
    what = f"peering of {name} with {other['name']}"
    ours = found is not None and found["name"] == wanted["name"]
    networks = api.compute.networks()
    if found is not None and not ours:
        if present:
            plan.warnings.append(f"{what} is there as {found['name']} and somebody else's; it is left as it is.")
            plan.result["peering"] = found["name"]
        return
    if not present:
        if found is not None:
            plan.steps.append(
                _step(
                    api,
                    what,
                    found["name"],
                    "",
                    lambda: networks.removePeering(project=api.project, network=name, body={"name": found["name"]}),
                    "compute.networks.removePeering",
                )
            )
        return
    plan.result["peering"] = wanted["name"]
    differs = [] if found is None else [key for key in wanted if isinstance(wanted[key], bool) and not found.get(key)]
    if found is None:
        plan.steps.append(
            _step(
                api,
                what,
                "",
                wanted["name"],
                lambda: networks.addPeering(project=api.project, network=name, body={"networkPeering": wanted}),
                "compute.networks.addPeering",
            )
        )
    elif differs:
        plan.steps.append(
            _step(
                api,
                what,
                f"{' '.join(differs)} off",
                f"{' '.join(differs)} on",
                lambda: networks.updatePeering(project=api.project, network=name, body={"networkPeering": wanted}),
                "compute.networks.updatePeering",
            )
        )
