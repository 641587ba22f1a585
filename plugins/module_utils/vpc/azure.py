# SPDX-License-Identifier: BSD-2-Clause
"""Azure: user-defined routes, security rules and IP forwarding of a virtual network, virtual network peering.

What is ours has a name made from the owner (``isthmus-<owner>-10-1-0-0-24``, ``isthmus-<owner>-udp-8472``); a route
table that we made has the tag ``isthmus`` = owner besides, and a network interface whose IP forwarding we turned on the
tag ``isthmus:<owner>:forwards``. Interfaces and subnets can only be written whole: that is done with the ETag of what
was read, of a subnet right before, so that nobody else's change is lost.
"""

from __future__ import annotations

import contextlib
import os
import re
from fnmatch import fnmatch
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.vpc import plan as pure
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc.steps import Plan, ProviderError, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

TAG = "isthmus"
QUOTA = 400  # routes that a table holds unless Microsoft was asked for more
PRIORITIES = range(1000, 4097)
GATEWAY = "VirtualNetworkGateway"
WHERE = " on resource group "
# As AWX's credential type names them.
CLOUDS = {"AzureUSGovernment": "AZURE_US_GOVERNMENT", "AzureChinaCloud": "AZURE_CHINA_CLOUD"}


def parts(identifier: str) -> tuple[str, str]:
    """Resource group and last name of a resource's id."""
    words = identifier.split("/")
    return words[words.index("resourceGroups") + 1], words[-1]


def same(one: str, other: str) -> bool:
    """Whether two ids are of one resource; their case does not count."""
    return one.lower() == other.lower()


def credential(cloud: str) -> Any:
    """What the environment has, else the instance's identity or the user's own login, in azure-identity's order."""
    from azure.identity import AzureAuthorityHosts, ClientSecretCredential, DefaultAzureCredential

    more = {}
    if cloud and not os.environ.get("AZURE_AUTHORITY_HOST"):
        host = {
            "AZURE_US_GOVERNMENT": AzureAuthorityHosts.AZURE_GOVERNMENT,
            "AZURE_CHINA_CLOUD": AzureAuthorityHosts.AZURE_CHINA,
        }
        more = {"authority": host[cloud]}
    # AWX's names of them.
    awx = [os.environ.get(name, "") for name in ("AZURE_TENANT", "AZURE_CLIENT_ID", "AZURE_SECRET")]
    if all(awx):
        return ClientSecretCredential(*awx, **more)
    return DefaultAzureCredential(**more)


class Api:
    """Azure's network API of one subscription. Throttled calls are made again by azure-core, ten times."""

    def __init__(self, subscription: str | None, endpoint: str | None) -> None:
        from azure.core import AzureClouds
        from azure.core.exceptions import AzureError, HttpResponseError
        from azure.mgmt.network import NetworkManagementClient

        self.error, self.http_error = AzureError, HttpResponseError
        self.subscription = subscription or os.environ.get("AZURE_SUBSCRIPTION_ID", "")
        if not self.subscription:
            raise ProviderError("azure.identity", "neither the option subscription nor AZURE_SUBSCRIPTION_ID is set")
        cloud = CLOUDS.get(os.environ.get("AZURE_CLOUD_ENVIRONMENT", ""), "")
        self.client = NetworkManagementClient(
            credential(cloud),
            self.subscription,
            base_url=endpoint,
            cloud_setting=AzureClouds[cloud] if cloud else None,
        )

    def ask(self, call: str, function: Callable[[], Any]) -> Any:
        """`function`'s answer; ProviderError when Azure refuses it."""
        try:
            return function()
        except self.http_error as exc:
            message = " ".join(((exc.error and exc.error.message) or exc.message or "").split())
            code = exc.error.code if exc.error else exc.status_code
            # LinkedAuthorizationFailed names an action that is permitted, too.
            action = re.search(r"not have (?:permission|authorization) to perform action(?:\(s\))? '([^']+)'", message)
            denied = code in ("AuthorizationFailed", "LinkedAuthorizationFailed")
            permission = (action[1] if action else f"for {call}") if denied else ""
            gone = exc.status_code == 404 and call == "virtual_networks.get"
            raise ProviderError(call, f"{code}: {message}", permission, gone) from exc
        except self.error as exc:
            raise ProviderError(call, " ".join(str(exc).split())) from exc

    def get(self, call: str, function: Callable[[], Any]) -> Any:
        """As `ask`, None for what is not there."""
        try:
            return self.ask(call, function)
        except ProviderError as exc:
            if exc.message.split(":")[0] in ("ResourceNotFound", "NotFound", "404"):
                return None
            raise

    def missing(self, permissions: list[str]) -> dict[str, str]:
        """Of these permissions (``<action> on resource group <name>``) those that the credentials lack there."""
        from azure.core.rest import HttpRequest

        lacking = {}
        for group in sorted({one.split(WHERE)[1] for one in permissions}):
            url = (
                f"/subscriptions/{self.subscription}/resourceGroups/{group}/providers/Microsoft.Authorization/"
                "permissions?api-version=2022-04-01"
            )

            def read(url: str = url) -> list[Any]:
                answer = self.client.send_request(HttpRequest("GET", url))
                answer.raise_for_status()
                found: list[Any] = answer.json()["value"]
                return found

            try:
                granted = self.ask("permissions.list", read)
            except ProviderError:
                continue  # a refusal comes on the way then
            for one in permissions:
                action, where = one.split(WHERE)
                if where == group and not any(_matches(action, entry) for entry in granted):
                    lacking[one] = ""
        return lacking


def _matches(action: str, entry: Mapping[str, Any]) -> bool:
    def any_of(patterns: Iterable[str]) -> bool:
        return any(fnmatch(action.lower(), pattern.lower()) for pattern in patterns)

    return any_of(entry.get("actions", [])) and not any_of(entry.get("notActions", []))


def _step(
    api: Api, what: str, before: str, after: str, call: str, action: str, group: str, begin: Callable[[], Any]
) -> Step:
    return Step(
        what,
        before,
        after,
        lambda: api.ask(call, lambda: begin().result()),
        f"Microsoft.Network/{action}{WHERE}{group}",
    )


class _Network:
    """What is in the virtual network, read once."""

    def __init__(self, api: Api, group: str, name: str, peers: Iterable[str]) -> None:
        client = api.client
        self.api, self.group, self.name = api, group, name
        self.vnet = api.ask("virtual_networks.get", lambda: client.virtual_networks.get(group, name)).as_dict()
        properties = self.vnet["properties"]
        self.ranges = dict.fromkeys(properties["addressSpace"]["addressPrefixes"], f"a range of {name}")
        self.subnets = {one["id"].lower(): one for one in properties.get("subnets", [])}
        peered = [
            one["properties"]["remoteVirtualNetwork"]["id"].lower() + "/"
            for one in properties.get("virtualNetworkPeerings", [])
        ]
        for peer in peers:
            other, far = peer.split("/")
            peered.append(_id(api, other, "virtualNetworks", far).lower() + "/")
        every = api.ask(
            "network_interfaces.list_all", lambda: [one.as_dict() for one in client.network_interfaces.list_all()]
        )
        self.interfaces: list[Any] = []
        self.by_address: dict[str, Any] = {}
        self.beyond: set[str] = set()  # addresses in peered networks: a next hop may be there
        for one in every:
            for config in one["properties"].get("ipConfigurations", []):
                subnet = config["properties"].get("subnet", {}).get("id", "").lower()
                address = config["properties"].get("privateIPAddress", "")
                if subnet in self.subnets:
                    self.by_address[address] = one
                    if one not in self.interfaces:
                        self.interfaces.append(one)
                elif subnet.startswith(tuple(peered)):
                    self.beyond.add(address)

    def subnets_of(self, addresses: Iterable[str]) -> set[str]:
        return {
            config["properties"]["subnet"]["id"].lower()
            for address in addresses
            if address in self.by_address
            for config in self.by_address[address]["properties"]["ipConfigurations"]
            if config["properties"].get("privateIPAddress") == address
        }

    def referred(self, kind: str, holders: Iterable[Any]) -> dict[str, str]:
        """Ids of resources that subnets or interfaces refer to as `kind`; lower-case id to id."""
        ids = [one["properties"].get(kind, {}).get("id") for one in holders if one["properties"].get(kind)]
        return {one.lower(): one for one in ids if one}


def plan_routes(params: Mapping[str, Any]) -> Plan:
    """Everything that makes the virtual network hold what the module's options ask for."""
    wishes, rules, hosts, problems = pure.read(params)
    plan = Plan(problems=problems)
    plan.problems += [
        f"peers: {peer!r} is not <resource group>/<virtual network>."
        for peer in params["peers"]
        if peer.count("/") != 1
    ]
    if problems:
        return plan
    api = Api(params["subscription"], params["endpoint"])
    network = _Network(api, params["resource_group"], params["network"], params["peers"])
    owner, present = params["owner"], params["state"] == "present"
    plan.missing = api.missing
    if present:
        plan.problems += pure.overlaps(wishes, network.ranges)
        plan.without(hosts, network.by_address, f"no network interface in {network.name}", wishes)
    local = [host for host in hosts if host in network.by_address]
    tables, own, bare = _tables(network, owner, network.subnets_of(local) if present and wishes else set(), plan)
    ours = {
        entry["id"]: [
            _destination(owner, one)
            for one in entry["properties"].get("routes", [])
            if _route_owned(owner, one["name"])
        ]
        for entry, _here in tables
    }
    wanted, lost = _wanted(network, wishes if present else [], set().union(*ours.values()), plan)
    if lost:
        # A host that is away may be the only one of its subnet; it is not taken for one that moved.
        tables = [(entry, here or bool(ours[entry["id"]])) for entry, here in tables]
    made, removed = _forwarding(network, owner, wishes if present else [])
    dead, borrowed = [], []
    for entry, here in tables:
        table = _table(network, entry, owner, params["route_limit"] or QUOTA)
        change = pure.difference(table, wanted if here else [], lost if here else ())
        plan.problems += change.problems
        plan.warnings += change.warnings
        dead += pure.dead_routes(table)
        borrowed += [{"table": table.name, "destination": one.destination} for one in change.borrowed]
        added, gone = _route_steps(api, entry, owner, change)
        made += added
        removed += gone
    used = any(here and own is not None and entry["id"] == own["id"] for entry, here in tables)
    new_table, on_subnets, table_removals = _own_table(network, owner, own, bare, used)
    rule_steps, rule_removals = _rules(network, owner, rules if present else [], hosts, wishes, plan)
    plan.steps += [*new_table, *made, *on_subnets, *rule_steps, *removed, *rule_removals, *table_removals]
    plan.result = {
        "route_tables": [entry["id"] for entry, here in tables if here or not present],
        "blackholes": dead,
        "borrowed": borrowed,
    }
    return plan


def _wanted(
    network: _Network, wishes: list[pure.Wish], known: set[str], plan: Plan
) -> tuple[list[pure.Route], set[str]]:
    """Routes as they should be, and destinations whose host is gone (known ones wait, a new one is a mistake)."""
    wanted, lost = [], set()
    for wish in wishes:
        address = wish.hop.address
        if not address:
            if wish.hop.gateway != GATEWAY:
                plan.problems.append(
                    f"{wish.hop.gateway!r} is no next hop of Azure that is known here; the only gateway is {GATEWAY}."
                )
        elif address not in network.by_address and address not in network.beyond:
            nobody = f"no network interface in {network.name} or a network peered with it"
            plan.lost(wish, nobody, wish.destination in known)
            lost.add(wish.destination)
            continue
        wanted.append(pure.Route(wish.destination, address or GATEWAY))
    return wanted, lost


def _route_owned(owner: str, name: str) -> bool:
    return re.fullmatch(rf"isthmus-{owner}(-\d+){{5}}", name) is not None


def _destination(owner: str, route: Mapping[str, Any]) -> str:
    """Of a route of ours by its name, which is made from it and under which it is written again: somebody may have
    changed the prefix."""
    prefix: str = route["properties"]["addressPrefix"]
    if _route_owned(owner, route["name"]):
        *octets, length = route["name"].split("-")[-5:]
        named = f"{'.'.join(octets)}/{length}"
        with contextlib.suppress(ValueError):
            return str(IPv4Network(named))
    return prefix


def _tables(
    network: _Network, owner: str, subnets: set[str], plan: Plan
) -> tuple[list[tuple[Any, bool]], Any, list[str]]:
    """Route tables with whether the routes belong there, our own one (None when there is none), and the subnets of
    hosts that have no table and get ours."""
    api, group = network.api, network.group
    name = f"isthmus-{owner}"
    own = api.get("route_tables.get", lambda: api.client.route_tables.get(group, name))
    own = own and own.as_dict()
    bare = sorted(one for one in subnets if not network.subnets[one]["properties"].get("routeTable"))
    if own is not None and own.get("tags", {}).get(TAG) != owner:
        if bare:
            plan.problems.append(
                f"resource group {group} has a route table {name} without the tag {TAG}={owner}, so it is somebody "
                "else's. Next: rename it, or choose another owner."
            )
        own = None
    if own is None and bare:
        planned = {"id": _id(api, group, "routeTables", name), "name": name, "properties": {"routes": []}}
    else:
        planned = own
    here = network.referred("routeTable", [network.subnets[one] for one in subnets])
    every = network.referred("routeTable", network.subnets.values())
    found = []
    for key, identifier in sorted(every.items()):
        if planned is not None and key == planned["id"].lower():
            continue
        where, table = parts(identifier)
        entry = api.ask("route_tables.get", lambda w=where, t=table: api.client.route_tables.get(w, t)).as_dict()
        found.append((entry, key in here))
    if planned is not None:
        found.append((planned, bool(bare) or planned["id"].lower() in here))
    return found, own, bare


def _table(network: _Network, entry: Mapping[str, Any], owner: str, limit: int) -> pure.Table:
    routes = []
    for one in entry["properties"].get("routes", []):
        properties = one["properties"]
        owned = _route_owned(owner, one["name"])
        target = properties.get("nextHopIpAddress") or properties["nextHopType"]
        gone = owned and target[0].isdigit() and target not in network.by_address and target not in network.beyond
        destination, prefix = _destination(owner, one), properties["addressPrefix"]
        routes.append(
            pure.Found(
                destination,
                target if destination == prefix else f"{target} for {prefix}",
                owned,
                one["name"],
                "no network interface has the address" if gone else "",
                f"route {one['name']}",
            )
        )
    return pure.Table(f"route table {entry['name']}", [one for one in routes if one.destination[0].isdigit()], limit)


def _route_steps(
    api: Api, entry: Mapping[str, Any], owner: str, change: pure.Difference
) -> tuple[list[Step], list[Step]]:
    group, table = parts(entry["id"])
    routes = api.client.routes
    made: list[Step] = []
    removed: list[Step] = []
    for found in change.remove:
        (made if found in change.first else removed).append(
            _step(
                api,
                f"route {found.destination} in {table}",
                found.target,
                "",
                "routes.begin_delete",
                "routeTables/routes/delete",
                group,
                lambda name=found.key: routes.begin_delete(group, table, name),
            )
        )
    for before, route in [*(("", one) for one in change.add), *((found.target, one) for found, one in change.replace)]:
        name = f"isthmus-{owner}-{re.sub('[./]', '-', route.destination)}"
        body: dict[str, Any] = {"addressPrefix": route.destination, "nextHopType": GATEWAY}
        if route.target != GATEWAY:
            body.update(nextHopType="VirtualAppliance", nextHopIpAddress=route.target)
        made.append(
            _step(
                api,
                f"route {route.destination} in {table}",
                before,
                route.target,
                "routes.begin_create_or_update",
                "routeTables/routes/write",
                group,
                lambda name=name, body=body: routes.begin_create_or_update(group, table, name, {"properties": body}),
            )
        )
    return made, removed


def _own_table(
    network: _Network, owner: str, own: Any, bare: list[str], wanted: bool
) -> tuple[list[Step], list[Step], list[Step]]:
    """Our own route table: steps that make it, that put it on the subnets `bare` once it is full, that remove it."""
    api, group, name = network.api, network.group, f"isthmus-{owner}"
    client = api.client
    made, put, removed = [], [], []
    if own is None and bare:
        body = {"location": network.vnet["location"], "tags": {TAG: owner}}
        made.append(
            _step(
                api,
                f"route table {name}",
                "",
                group,
                "route_tables.begin_create_or_update",
                "routeTables/write",
                group,
                lambda: client.route_tables.begin_create_or_update(group, name, body),
            )
        )
    put = [_on_subnet(network, subnet, name, {"id": _id(api, group, "routeTables", name)}) for subnet in bare]
    if own is not None and not wanted:
        for key, subnet in sorted(network.subnets.items()):
            if same(_table_of(subnet), own["id"]):
                removed.append(_on_subnet(network, key, name, None))
        removed.append(
            _step(
                api,
                f"route table {name}",
                group,
                "",
                "route_tables.begin_delete",
                "routeTables/delete",
                group,
                lambda: client.route_tables.begin_delete(group, name),
            )
        )
    return made, put, removed


def _id(api: Api, group: str, kind: str, name: str) -> str:
    return f"/subscriptions/{api.subscription}/resourceGroups/{group}/providers/Microsoft.Network/{kind}/{name}"


def _on_subnet(network: _Network, key: str, name: str, table: Any) -> Step:
    subnet = network.subnets[key]
    place = (network.group, network.name, subnet["name"])
    client = network.api.client.subnets

    def begin() -> Any:
        # All subnets have the ETag of their network, so one that was read before another was written is stale.
        now = client.get(*place).as_dict()
        before, found = (_table_of(one) for one in (subnet, now))
        if not same(before, found):
            words = f"it had {before or 'none'} when it was looked at and has {found or 'none'} now."
            raise ProviderError("subnets.get", words)
        body = {**now, "properties": {**now["properties"], "routeTable": table}}
        if table is None:
            del body["properties"]["routeTable"]
        return client.begin_create_or_update(*place, body, headers={"If-Match": now["etag"]})

    return _step(
        network.api,
        f"route table of subnet {subnet['name']}",
        "" if table else name,
        name if table else "",
        "subnets.begin_create_or_update",
        "virtualNetworks/subnets/write",
        network.group,
        begin,
    )


def _table_of(subnet: Mapping[str, Any]) -> str:
    """The id of a subnet's route table, empty when it has none."""
    return str((subnet["properties"].get("routeTable") or {}).get("id", ""))


def _forwarding(network: _Network, owner: str, wishes: list[pure.Wish]) -> tuple[list[Step], list[Step]]:
    """IP forwarding on where routes lead to a host of this network; off again where we turned it on."""
    mark = f"{TAG}:{owner}:forwards"
    needed = {wish.hop.address for wish in wishes}
    made, removed = [], []
    for interface in network.interfaces:
        tags = dict(interface.get("tags") or {})
        addresses = {one["properties"].get("privateIPAddress") for one in interface["properties"]["ipConfigurations"]}
        others = [key for key in tags if key.startswith(f"{TAG}:") and key.endswith(":forwards") and key != mark]
        on = bool(interface["properties"].get("enableIPForwarding"))
        if needed & addresses:
            # Who finds it on without our mark does not own it, but two owners both need it.
            if not on or (others and mark not in tags):
                made.append(_interface(network, interface, {**tags, mark: "ip-forwarding"}, True))
        elif mark in tags:
            rest = {key: value for key, value in tags.items() if key != mark}
            removed.append(_interface(network, interface, rest, on and bool(others)))
    return made, removed


def _interface(network: _Network, interface: Mapping[str, Any], tags: dict[str, str], forwards: bool) -> Step:
    group, name = parts(interface["id"])
    properties = {**interface["properties"], "enableIPForwarding": forwards}
    body = {**interface, "tags": tags, "properties": properties}

    def shown(one: Mapping[str, Any]) -> str:
        marks = sorted(key for key in one.get("tags") or {} if key.startswith(f"{TAG}:"))
        return "\n".join(["on" if one["properties"].get("enableIPForwarding") else "off", *marks])

    return _step(
        network.api,
        f"IP forwarding of {name}",
        shown(interface),
        shown(body),
        "network_interfaces.begin_create_or_update",
        "networkInterfaces/write",
        group,
        lambda: network.api.client.network_interfaces.begin_create_or_update(
            group, name, body, headers={"If-Match": interface["etag"]}
        ),
    )


def _rules(
    network: _Network, owner: str, rules: list[pure.Rule], hosts: list[str], wishes: list[pure.Wish], plan: Plan
) -> tuple[list[Step], list[Step]]:
    """Security rules, one per port, for exactly the hosts, in every group that their packets pass."""
    api = network.api
    here = [network.by_address[host] for host in hosts if host in network.by_address]
    subnets = [network.subnets[one] for one in network.subnets_of(hosts)]
    wanted = pure.by_port(rules)
    every = network.referred("networkSecurityGroup", [*network.subnets.values(), *network.interfaces])
    chosen = network.referred("networkSecurityGroup", [*here, *subnets]) if wanted else {}
    made: list[Step] = []
    removed: list[Step] = []
    for key, identifier in sorted(every.items()):
        group, name = parts(identifier)
        entry = api.ask(
            "network_security_groups.get", lambda g=group, n=name: api.client.network_security_groups.get(g, n)
        ).as_dict()
        there = {one["name"]: one["properties"] for one in entry["properties"].get("securityRules", [])}
        taken = {one["priority"] for one in there.values() if one["direction"] == "Inbound"}
        bodies = {}
        for (protocol, port), sources in wanted.items() if key in chosen else ():
            rule = f"isthmus-{owner}-{pure.named(protocol, port, '-')}"
            every = protocol == pure.ALL
            priority = there[rule]["priority"] if rule in there else next(one for one in PRIORITIES if one not in taken)
            taken.add(priority)
            bodies[rule] = {
                "description": "isthmus.mesh",
                "protocol": "*" if every else protocol.capitalize(),
                "sourcePortRange": "*",
                "destinationPortRange": "*" if every else str(port),
                "sourceAddressPrefixes": sources,
                "destinationAddressPrefixes": pure.destinations(hosts, wishes if every else ()),
                "access": "Allow",
                "direction": "Inbound",
                "priority": priority,
            }
            plan.warnings += _denied(name, rule, bodies[rule], there)
        for rule, body in bodies.items():
            before = _shown(there[rule]) if rule in there else ""
            if before != _shown(body):
                made.append(
                    _step(
                        api,
                        f"security rule {rule} in {name}",
                        before,
                        _shown(body),
                        "security_rules.begin_create_or_update",
                        "networkSecurityGroups/securityRules/write",
                        group,
                        lambda g=group, n=name, r=rule, b=body: api.client.security_rules.begin_create_or_update(
                            g, n, r, {"properties": b}
                        ),
                    )
                )
        for rule in sorted(there):
            if rule not in bodies and re.fullmatch(rf"isthmus-{owner}-(all|(tcp|udp)-\d+)", rule):
                removed.append(
                    _step(
                        api,
                        f"security rule {rule} in {name}",
                        _shown(there[rule]),
                        "",
                        "security_rules.begin_delete",
                        "networkSecurityGroups/securityRules/delete",
                        group,
                        lambda g=group, n=name, r=rule: api.client.security_rules.begin_delete(g, n, r),
                    )
                )
    return made, removed


def _shown(rule: Mapping[str, Any]) -> str:
    """All of a security rule that matters, as lines; equal when two let the same through."""

    def both(key: str) -> str:
        one = rule.get(key)
        return " ".join(sorted([*([one] if one else []), *(rule.get(f"{key}es") or rule.get(f"{key}s") or [])]))

    return "\n".join(
        [
            f"{rule['direction']} {rule['access']} {rule['protocol']} priority {rule['priority']}",
            *(f"{key}: {both(key)}" for key in ("sourceAddressPrefix", "sourcePortRange")),
            *(f"{key}: {both(key)}" for key in ("destinationAddressPrefix", "destinationPortRange")),
        ]
    )


def _denied(group: str, name: str, rule: Mapping[str, Any], there: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences for somebody else's rules that come before ours and drop its packets."""
    port = rule["destinationPortRange"]

    def covers(text: str) -> bool:
        low, _dash, high = text.partition("-")
        return "*" in (text, port) or int(low) <= int(port) <= int(high or low)

    return [
        f"{group}: rule {other}, which is somebody else's and comes before {name}, denies {rule['protocol']} {port} to "
        "some or all."
        for other, one in sorted(there.items())
        if one["direction"] == "Inbound"
        and one["access"] == "Deny"
        and one["priority"] < rule["priority"]
        and (one["protocol"] == rule["protocol"] or "*" in (one["protocol"], rule["protocol"]))
        and any(
            map(covers, [*filter(None, [one.get("destinationPortRange")]), *(one.get("destinationPortRanges") or [])])
        )
    ]


def plan_peering(params: Mapping[str, Any]) -> Plan:
    """The peering of two virtual networks, which each of them must have."""
    sides = params["sides"]
    apis = [Api(side["subscription"], params["endpoint"]) for side in sides]
    plan = Plan(result={"peering": ""})
    plan.missing = lambda permissions: {**apis[0].missing(permissions), **apis[1].missing(permissions)}
    vnets = []
    for api, side in zip(apis, sides):
        group, name = side["resource_group"], side["network"]
        try:
            found = api.ask("virtual_networks.get", lambda a=api, g=group, n=name: a.client.virtual_networks.get(g, n))
            vnets.append(found.as_dict())
        except ProviderError as exc:
            if params["state"] == "present" or not exc.gone:
                raise
            plan.gone(exc)
            vnets.append({"id": _id(api, group, "virtualNetworks", name), "name": name, "properties": {}})
    if params["state"] == "present":
        blocks = [one["properties"]["addressSpace"]["addressPrefixes"] for one in vnets]
        plan.problems += pure.clashes([side["network"] for side in sides], blocks)
    halves = [(apis[0], *vnets), (apis[1], *reversed(vnets))]
    # Azure takes no half while the other one is disconnected.
    for api, vnet, other in sorted(halves, key=lambda half: not _disconnected(_half(*half[1:]))):
        _peer(api, vnet, other, params, plan)
    return plan


def _half(vnet: Any, other: Any) -> Any:
    """What a virtual network has of its peering with another one, None when there is none."""
    halves = vnet["properties"].get("virtualNetworkPeerings", [])
    return next((one for one in halves if same(one["properties"]["remoteVirtualNetwork"]["id"], other["id"])), None)


def _disconnected(half: Any) -> bool:
    """Whether the other half was there and is gone."""
    return half is not None and half["properties"].get("peeringState") == "Disconnected"


def _peer(api: Api, vnet: Any, other: Any, params: Mapping[str, Any], plan: Plan) -> None:
    group, name = parts(vnet["id"])
    wanted = {
        "remoteVirtualNetwork": {"id": other["id"]},
        "allowVirtualNetworkAccess": True,
        "allowForwardedTraffic": True,
    }
    peering = f"isthmus-{params['owner']}-{other['name']}"[:80].rstrip("-._")
    peerings = api.client.virtual_network_peerings
    found = _half(vnet, other)
    what = f"peering of {name} with {other['name']}"
    present = params["state"] == "present"
    if found is not None and found["name"] != peering:
        if present:
            plan.warnings.append(f"{what} is there as {found['name']} and somebody else's; it is left as it is.")
            plan.result["peering"] = found["name"]
        return
    if present:
        plan.result["peering"] = peering
        before = {} if found is None else {key: found["properties"].get(key) for key in wanted}
        off = [key for key in wanted if isinstance(wanted[key], bool) and not before.get(key)]
        shown = ("", peering) if found is None else (f"{' '.join(off)} off", f"{' '.join(off)} on")
        if off or _disconnected(found):
            plan.steps.append(
                _step(
                    api,
                    what,
                    *(shown if off else ("Disconnected", "Connected")),
                    "virtual_network_peerings.begin_create_or_update",
                    "virtualNetworks/virtualNetworkPeerings/write",
                    group,
                    lambda: peerings.begin_create_or_update(group, name, peering, {"properties": wanted}),
                )
            )
    elif found is not None:
        plan.steps.append(
            _step(
                api,
                what,
                peering,
                "",
                "virtual_network_peerings.begin_delete",
                "virtualNetworks/virtualNetworkPeerings/delete",
                group,
                lambda: peerings.begin_delete(group, name, peering),
            )
        )
