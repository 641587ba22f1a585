# SPDX-License-Identifier: BSD-2-Clause
"""AWS: routes in the VPC's route tables, a security group for the hosts, source/destination check, VPC peering.

What is ours: a security group and a peering connection with the tag ``isthmus`` = owner; routes, which cannot be
tagged, by tags of their table, ``isthmus:<owner>:0``, ``:1``, ...: destinations with blanks between them; a network
interface whose source/destination check we turned off by its tag ``isthmus:<owner>:forwards``.
A claim is written before the route and taken back after it, so that a run that was cut short knows what it made.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils.vpc import plan as pure
from ansible_collections.isthmus.mesh.plugins.module_utils.vpc.steps import Plan, ProviderError, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

TAG = "isthmus"
TAG_VALUE = 256  # characters that the value of a tag holds
TAGS = 50  # tags that a resource holds
# Service Quotas of `vpc`: routes per route table, inbound or outbound rules per security group and its default.
ROUTES_QUOTA = "L-93826ACB"
RULES_QUOTA = "L-0EA8095F"
RULES = 60
PATIENCE = 120  # seconds for a peering to reach a state
PAUSE = 2  # seconds between two looks at it
GATEWAYS = {
    "vgw-": "GatewayId",
    "igw-": "GatewayId",
    "eni-": "NetworkInterfaceId",
    "tgw-": "TransitGatewayId",
    "pcx-": "VpcPeeringConnectionId",
    "nat-": "NatGatewayId",
    "lgw-": "LocalGatewayId",
}
_TARGETS = (
    *("NetworkInterfaceId", "InstanceId", "VpcPeeringConnectionId", "TransitGatewayId", "NatGatewayId"),
    *("EgressOnlyInternetGatewayId", "LocalGatewayId", "CarrierGatewayId", "CoreNetworkArn", "OdbNetworkArn"),
    "GatewayId",
)


def claims(owner: str, destinations: Iterable[str]) -> dict[str, str]:
    """The tags of a route table that say which destinations are `owner`'s."""
    values = [""]
    for one in sorted(destinations):
        if len(values[-1]) + 1 + len(one) > TAG_VALUE:
            values.append("")
        values[-1] = f"{values[-1]} {one}".strip()
    return {f"{TAG}:{owner}:{number}": value for number, value in enumerate(values) if value}


def claimed(owner: str, tags: Mapping[str, str]) -> set[str]:
    """The destinations that the tags of a route table give to `owner`."""
    prefix = f"{TAG}:{owner}:"
    return {one for key, value in tags.items() if key.startswith(prefix) for one in value.split()}


def tags_of(resource: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in resource.get("Tags") or resource.get("TagSet") or []}


def _tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in sorted(tags.items())]


def _filters(**filters: str) -> list[dict[str, Any]]:
    return [{"Name": name.replace("_", "-"), "Values": [value]} for name, value in filters.items()]


class Api:
    """EC2 of one account and region. Throttled calls are made again by botocore, ever more slowly, ten times."""

    def __init__(self, region: str | None, profile: str | None, endpoint: str | None) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        self.errors = (BotoCoreError, ClientError)
        self.client_error = ClientError
        config = Config(retries={"mode": "standard", "max_attempts": 10}, user_agent_extra="isthmus.mesh")
        try:
            session = boto3.session.Session(region_name=region, profile_name=profile)
            self.region = session.region_name
            self.ec2 = session.client("ec2", config=config, endpoint_url=endpoint)
            self.quotas = session.client("service-quotas", config=config, endpoint_url=endpoint)
        except BotoCoreError as exc:
            raise ProviderError("boto3", str(exc)) from exc

    def call(self, name: str, client: Any = None, **arguments: Any) -> Any:
        """One call, by boto3's name of it; ProviderError when it is refused."""
        client = client or self.ec2
        try:
            return getattr(client, name)(**arguments)
        except self.errors as exc:
            raise self._error(client, name, exc) from exc

    def pages(self, name: str, key: str, **arguments: Any) -> list[Any]:
        """All items of a call that answers page by page."""
        try:
            return [item for page in self.ec2.get_paginator(name).paginate(**arguments) for item in page[key]]
        except self.errors as exc:
            raise self._error(self.ec2, name, exc) from exc

    def wait(self, name: str, **arguments: Any) -> None:
        """Until boto3's waiter of that name is content; ProviderError when it is not."""
        try:
            self.ec2.get_waiter(name).wait(**arguments)
        except self.errors as exc:
            raise ProviderError(name, f"{exc} (region {self.region})") from exc

    def rehearse(self, name: str, **arguments: Any) -> None:
        """Asks whether a call would be permitted and accepted; ProviderError when not."""
        try:
            getattr(self.ec2, name)(DryRun=True, **arguments)
        except self.client_error as exc:
            if exc.response["Error"]["Code"] != "DryRunOperation":
                raise self._error(self.ec2, name, exc) from exc
        except self.errors as exc:
            raise self._error(self.ec2, name, exc) from exc

    def _error(self, client: Any, name: str, exc: Exception) -> ProviderError:
        action = client.meta.method_to_api_mapping[name]
        if not isinstance(exc, self.client_error):
            return ProviderError(action, f"{exc} (region {self.region}, endpoint {client.meta.endpoint_url})")
        code, message = exc.response["Error"]["Code"], exc.response["Error"].get("Message", "")
        denied = code in ("UnauthorizedOperation", "AccessDenied", "AccessDeniedException")
        gone = code == "InvalidVpcID.NotFound"
        return ProviderError(action, f"{code}: {message}", f"ec2:{action}" if denied else "", gone)

    def step(self, what: str, before: str, after: str, name: str, **arguments: Any) -> Step:
        """A step that is one call, which AWS can rehearse."""
        action = self.ec2.meta.method_to_api_mapping[name]
        things = [arguments.get(key) for key in ("RouteTableId", "NetworkInterfaceId", "GroupId", "Resources")]
        return Step(
            what,
            before,
            after,
            lambda: self.call(name, **arguments),
            f"ec2:{action}",
            lambda: self.rehearse(name, **arguments),
            str(next(filter(None, things), "")),
        )


class _Vpc:
    """What is in the VPC, read once."""

    def __init__(self, api: Api, vpc: str) -> None:
        self.name = vpc
        self.nobody = f"no network interface in {vpc}"
        found = api.call("describe_vpcs", VpcIds=[vpc])["Vpcs"][0]
        blocks = [one for one in found["CidrBlockAssociationSet"] if one["CidrBlockState"]["State"] == "associated"]
        self.ranges = {one["CidrBlock"]: f"a range of {vpc}" for one in blocks}
        here = _filters(vpc_id=vpc)
        self.interfaces = api.pages("describe_network_interfaces", "NetworkInterfaces", Filters=here)
        self.by_address = {
            one["PrivateIpAddress"]: interface
            for interface in self.interfaces
            for one in interface["PrivateIpAddresses"]
        }
        self.tables = api.pages("describe_route_tables", "RouteTables", Filters=here)
        self.groups = api.pages("describe_security_groups", "SecurityGroups", Filters=here)

    def tables_of(self, subnets: set[str]) -> list[Any]:
        """The route tables of subnets: their own, else the VPC's main one."""
        found, with_own = [], set()
        for table in self.tables:
            own = {one["SubnetId"] for one in table["Associations"] if "SubnetId" in one}
            with_own |= own
            if own & subnets:
                found.append(table)
        main = [table for table in self.tables if any(one.get("Main") for one in table["Associations"])]
        return found + [one for one in main if one not in found and subnets - with_own]


def plan_routes(params: Mapping[str, Any]) -> Plan:
    """Everything that makes the VPC hold what the module's options ask for."""
    api = Api(params["region"], params["profile"], params["endpoint"])
    wishes, rules, hosts, problems = pure.read(params)
    plan = Plan(problems=problems)
    if problems:
        return plan
    vpc = _Vpc(api, params["network"])
    owner, present = params["owner"], params["state"] == "present"
    if present:
        plan.problems += pure.overlaps(wishes, vpc.ranges)
        plan.without(hosts, vpc.by_address, vpc.nobody, wishes)
    used = [vpc.by_address[host] for host in hosts if host in vpc.by_address]
    removals: list[Step] = []
    group_steps, group_removals = _group(api, vpc, owner, rules if present else [], used, plan)
    lost = _lost(vpc, owner, wishes, plan) if present else set()
    subnets = {one["SubnetId"] for one in used}
    chosen, others = _tables(vpc, params["route_tables"], subnets, owner, lost, plan)
    if not present:
        chosen, others = [], chosen + others
    elif (wishes or params["peers"]) and not chosen and not plan.problems:
        plan.problems.append(
            f"no host of this run has a network interface in {vpc.name}, so nothing says which route tables are meant. "
            "Next: name them in route_tables, or the hosts in hosts."
        )
    forward_steps, forward_removals = _forwarding(api, vpc, owner, wishes if present else [])
    plan.steps += group_steps + forward_steps
    wanted = (
        []
        if not present
        else [pure.Route(wish.destination, _target(vpc, wish.hop)) for wish in wishes if wish.destination not in lost]
    )
    plan.problems += _peering_limits(api, wanted)
    if present:
        asked = {route.destination for route in wanted} | lost
        wanted += [one for one in _to_peers(api, vpc, params["peers"], plan) if one.destination not in asked]
    limit = params["route_limit"]
    if limit is None and any(pure.difference(_table(entry, owner, None), wanted, lost).add for entry in chosen):
        limit = _limit(api, ROUTES_QUOTA)
        if limit is None:
            plan.warnings.append(
                "how many routes a table holds is not known (permission servicequotas:GetServiceQuota, or the option "
                "route_limit): a table that is full is noticed only on the way."
            )
    dead, borrowed = [], []
    for entry in [*chosen, *others]:
        table = _table(entry, owner, limit)
        change = pure.difference(table, *((wanted, lost) if entry in chosen else ([], ())))
        plan.problems += change.problems
        plan.warnings += change.warnings
        dead += pure.dead_routes(table)
        borrowed += [{"table": table.name, "destination": one.destination} for one in change.borrowed]
        made, gone = _route_steps(api, entry, owner, table, change)
        plan.steps += made
        removals += gone
    plan.steps += removals + forward_removals + group_removals
    plan.result = {
        "route_tables": [one["RouteTableId"] for one in [*chosen, *others]],
        "blackholes": dead,
        "borrowed": borrowed,
    }
    return plan


def _target(vpc: _Vpc, hop: pure.Hop) -> str:
    return vpc.by_address[hop.address]["NetworkInterfaceId"] if hop.address else hop.gateway


def _tables(
    vpc: _Vpc, named: list[str], subnets: set[str], owner: str, lost: set[str], plan: Plan
) -> tuple[list[Any], list[Any]]:
    """The tables that get routes, and others that have some of ours, which go."""
    unknown = set(named) - {one["RouteTableId"] for one in vpc.tables}
    plan.problems += [f"{vpc.name} has no route table {name}." for name in sorted(unknown)]
    chosen = [one for one in vpc.tables if one["RouteTableId"] in named] if named else vpc.tables_of(subnets)
    others = [one for one in vpc.tables if one not in chosen and claimed(owner, tags_of(one))]
    if lost and not named:
        # A host that is away may be the only one of its subnet; it is not taken for one that moved.
        return chosen + others, []
    return chosen, others


def _lost(vpc: _Vpc, owner: str, wishes: list[pure.Wish], plan: Plan) -> set[str]:
    """Destinations whose host has no interface any more. Known ones wait for it; a new one is a mistake."""
    known = set().union(*(claimed(owner, tags_of(one)) for one in vpc.tables))
    lost = set()
    for wish in wishes:
        hop = wish.hop
        if hop.address and hop.address not in vpc.by_address:
            plan.lost(wish, vpc.nobody, wish.destination in known)
            lost.add(wish.destination)
        elif not hop.address and hop.gateway[:4] not in GATEWAYS:
            plan.problems.append(
                f"{hop.gateway!r} is no target of AWS that is known here ({', '.join(sorted(GATEWAYS))}...)."
            )
            lost.add(wish.destination)
    return lost


def _to_peers(api: Api, vpc: _Vpc, peers: list[str], plan: Plan) -> list[pure.Route]:
    """Ways to the own ranges of peered VPCs."""
    if not peers:
        return []
    filters = [{"Name": "status-code", "Values": ["active", "provisioning"]}]
    peerings = api.pages("describe_vpc_peering_connections", "VpcPeeringConnections", Filters=filters)
    wanted = []
    for peer in peers:
        sides = [(one, one["RequesterVpcInfo"], one["AccepterVpcInfo"]) for one in peerings]
        sides += [(one, second, first) for one, first, second in sides]
        found = next(((one, b) for one, a, b in sides if (a["VpcId"], b["VpcId"]) == (vpc.name, peer)), None)
        if found is None:
            plan.warnings.append(
                f"{vpc.name} and {peer} are not peered, or not yet: there is no way to the ranges of {peer}."
            )
            continue
        name, code, blocks = found[0]["VpcPeeringConnectionId"], found[0]["Status"]["Code"], _blocks(found[1])
        if code != "active" or not blocks:
            plan.warnings.append(
                f"{name} of {vpc.name} and {peer} is {code} and names {' '.join(blocks) or 'no ranges'} of {peer}: "
                "there is no way to others. Next: run again when it is active."
            )
        wanted += [pure.Route(block, name) for block in blocks]
    return wanted


def _blocks(side: Mapping[str, Any]) -> list[str]:
    """The ranges of one side of a peering."""
    blocks = [one["CidrBlock"] for one in [*side.get("CidrBlockSet", []), side] if one.get("CidrBlock")]
    return list(dict.fromkeys(blocks))


def _peering_limits(api: Api, wanted: list[pure.Route]) -> list[str]:
    """A peering delivers to the peer VPC's own ranges only, though a route over it may say anything."""
    ids = sorted({route.target for route in wanted if route.target.startswith("pcx-")})
    if not ids:
        return []
    from ipaddress import IPv4Network

    peerings = api.pages("describe_vpc_peering_connections", "VpcPeeringConnections", VpcPeeringConnectionIds=ids)
    reach = {
        one["VpcPeeringConnectionId"]: [
            IPv4Network(block) for side in ("RequesterVpcInfo", "AccepterVpcInfo") for block in _blocks(one[side])
        ]
        for one in peerings
    }
    return [
        f"{route.destination} to {route.target}: a VPC peering delivers to the ranges of its two VPCs only "
        f"({', '.join(map(str, reach[route.target])) or 'not known while it is not active'}) and AWS drops everything "
        "else. Next: use a transit gateway, make the range a secondary one of the peer VPC, or the tunnel."
        for route in wanted
        if route.target in reach
        and not any(IPv4Network(route.destination).subnet_of(block) for block in reach[route.target])
    ]


def _limit(api: Api, code: str) -> int | None:
    """A quota; None when it may not be asked for."""
    try:
        return int(api.call("get_service_quota", api.quotas, ServiceCode="vpc", QuotaCode=code)["Quota"]["Value"])
    except ProviderError:
        return None


def _table(entry: Mapping[str, Any], owner: str, limit: int | None) -> pure.Table:
    ours = claimed(owner, tags_of(entry))
    routes = []
    for one in entry["Routes"]:
        destination = one.get("DestinationCidrBlock")
        if destination is None or one.get("GatewayId") == "local":
            continue  # IPv6, prefix lists; the VPC's own ranges are looked at as such
        propagated = one.get("Origin") == "EnableVgwRoutePropagation"
        routes.append(
            pure.Found(
                destination,
                next((one[key] for key in _TARGETS if one.get(key)), "?"),
                destination in ours and not propagated,
                destination,
                "its target is gone or off (blackhole)" if one.get("State") == "blackhole" else "",
                "propagated by a virtual private gateway" if propagated else "",
                not propagated,
            )
        )
    return pure.Table(entry["RouteTableId"], routes, limit)


def _route_steps(
    api: Api, entry: Mapping[str, Any], owner: str, table: pure.Table, change: pure.Difference
) -> tuple[list[Step], list[Step]]:
    """Steps that add and change, and steps that remove, with the claims before and after."""
    name, tags = table.name, tags_of(entry)
    before = claimed(owner, tags)
    there = {one.destination for one in table.routes if one.owned}
    gone = {one.destination for one in change.remove}
    after = (there - gone) | {one.destination for one in change.add}
    meanwhile = claims(owner, before | after)
    made: list[Step] = []
    removed: list[Step] = []
    mark = f"{TAG}:{owner}:"
    ours = {key: value for key, value in tags.items() if key.startswith(mark)}
    if len(tags) - len(ours) + len(meanwhile) > TAGS:
        change.problems.append(f"{name} has {len(tags) - len(ours)} tags of others; {len(meanwhile)} more do not fit.")
    new = {key: value for key, value in meanwhile.items() if ours.get(key) != value}
    if change.add and new:
        made.append(
            api.step(
                f"claim in {name}",
                " ".join(sorted(before)),
                " ".join(sorted(before | after)),
                "create_tags",
                Resources=[name],
                Tags=_tag_list(new),
            )
        )
    for found in change.remove:
        (made if found in change.first else removed).append(
            api.step(
                f"route {found.destination} in {name}",
                found.target,
                "",
                "delete_route",
                RouteTableId=name,
                DestinationCidrBlock=found.destination,
            )
        )
    for route in change.add:
        made.append(_put(api, "create_route", name, "", route))
    for found, route in change.replace:
        made.append(_put(api, "replace_route", name, found.target, route))
    current = {**ours, **(new if change.add else {})}
    final = claims(owner, after)
    stale = {key: value for key, value in current.items() if key not in final}
    rewritten = {key: value for key, value in final.items() if current.get(key) != value}
    shown = " ".join(sorted(claimed(owner, current))), " ".join(sorted(after))
    if rewritten:
        removed.append(api.step(f"claim in {name}", *shown, "create_tags", Resources=[name], Tags=_tag_list(rewritten)))
    if stale:
        removed.append(api.step(f"claim in {name}", *shown, "delete_tags", Resources=[name], Tags=_tag_list(stale)))
    return made, removed


def _put(api: Api, call: str, table: str, before: str, route: pure.Route) -> Step:
    arguments = {
        "RouteTableId": table,
        "DestinationCidrBlock": route.destination,
        GATEWAYS[route.target[:4]]: route.target,
    }
    step = api.step(f"route {route.destination} in {table}", before, route.target, call, **arguments)

    def put() -> None:
        try:
            api.call(call, **arguments)
        except ProviderError as exc:
            if "RouteLimitExceeded" not in exc.message:
                raise
            words = f"{exc.message} Raise the quota 'Routes per route table', or set route_limit to be told what fits."
            raise ProviderError(exc.call, words) from exc

    step.do = put
    return step


def _forwarding(api: Api, vpc: _Vpc, owner: str, wishes: list[pure.Wish]) -> tuple[list[Step], list[Step]]:
    """Source/destination check off where routes lead to a host; on again where we turned it off."""
    mark = f"{TAG}:{owner}:forwards"
    needed = {wish.hop.address for wish in wishes} | {wish.hop.gateway for wish in wishes}
    made: list[Step] = []
    removed: list[Step] = []
    for interface in vpc.interfaces:
        name, tags = interface["NetworkInterfaceId"], tags_of(interface)
        addresses = {one["PrivateIpAddress"] for one in interface["PrivateIpAddresses"]}
        what = f"source/destination check of {name}"
        others = [key for key in tags if key.startswith(f"{TAG}:") and key.endswith(":forwards") and key != mark]
        if needed & (addresses | {name}):
            on = interface["SourceDestCheck"]
            # Who finds it off without our mark does not own it, but two owners both need it.
            if mark not in tags and (on or others):
                made.append(
                    api.step(
                        f"claim of {name}",
                        "",
                        mark,
                        "create_tags",
                        Resources=[name],
                        Tags=_tag_list({mark: "source-dest-check"}),
                    )
                )
            if on:
                made.append(
                    api.step(
                        what,
                        "on",
                        "off",
                        "modify_network_interface_attribute",
                        NetworkInterfaceId=name,
                        SourceDestCheck={"Value": False},
                    )
                )
        elif mark in tags:
            if not others and not interface["SourceDestCheck"]:
                removed.append(
                    api.step(
                        what,
                        "off",
                        "on",
                        "modify_network_interface_attribute",
                        NetworkInterfaceId=name,
                        SourceDestCheck={"Value": True},
                    )
                )
            removed.append(
                api.step(
                    f"claim of {name}",
                    mark,
                    "",
                    "delete_tags",
                    Resources=[name],
                    Tags=_tag_list({mark: tags[mark]}),
                )
            )
    return made, removed


def _permission(protocol: str, port: int, sources: Iterable[str]) -> dict[str, Any]:
    what = {"IpProtocol": "-1"} if protocol == pure.ALL else {"IpProtocol": protocol, "FromPort": port, "ToPort": port}
    return {**what, "IpRanges": [{"CidrIp": one, "Description": "isthmus.mesh"} for one in sources]}


def _group(
    api: Api, vpc: _Vpc, owner: str, rules: list[pure.Rule], used: list[Any], plan: Plan
) -> tuple[list[Step], list[Step]]:
    """The security group: exactly `rules`, on exactly the interfaces `used`; none of it without rules."""
    name = f"isthmus-{owner}"
    named = next((one for one in vpc.groups if one["GroupName"] == name), None)
    group = next((one for one in vpc.groups if tags_of(one).get(TAG) == owner), None)
    made: list[Step] = []
    removed: list[Step] = []
    wanted = pure.by_port(rules)
    if wanted and group is None and named is not None:
        plan.problems.append(
            f"{vpc.name} has a security group {name} ({named['GroupId']}) without the tag {TAG}={owner}, so it is "
            "somebody else's. Next: rename it, or choose another owner."
        )
        return [], []
    there = {} if group is None else _rules_of(api, group["GroupId"])
    wanted_keys = {(protocol, port, source) for (protocol, port), found in wanted.items() for source in found}
    # New rules are made before old ones go.
    count = len(wanted_keys | set(there))
    limit = (_limit(api, RULES_QUOTA) or RULES) if count > RULES and wanted_keys - set(there) else count
    if count > limit:
        plan.problems.append(
            f"security group {name} holds {limit} rules, the plan needs {count}: one for each port and each of "
            "sources. Next: raise the quota 'Inbound or outbound rules per security group', or use fewer, larger "
            "sources."
        )
    # The group's id is known only once it is made.
    place = {"id": group["GroupId"] if group else ""}

    if wanted and group is None:
        arguments = {
            "GroupName": name,
            "Description": f"isthmus.mesh, owner {owner}: rules made by hand in here are removed",
            "VpcId": vpc.name,
            "TagSpecifications": [{"ResourceType": "security-group", "Tags": _tag_list({TAG: owner, "Name": name})}],
        }
        step = api.step(f"security group {name}", "", vpc.name, "create_security_group", **arguments)

        def create() -> None:
            place["id"] = api.call("create_security_group", **arguments)["GroupId"]
            api.wait("security_group_exists", GroupIds=[place["id"]])

        step.do = create
        made.append(step)
    missing = [key for key in sorted(wanted_keys) if key not in there]
    for (protocol, port), sources in _grouped(missing).items():
        permissions = [_permission(protocol, port, sources)]
        made.append(
            _in_group(
                api,
                place,
                group,
                f"rule {pure.named(protocol, port, '/')} of {name}",
                "",
                " ".join(sources),
                "authorize_security_group_ingress",
                lambda group_id, p=permissions: {"GroupId": group_id, "IpPermissions": p},
            )
        )
    chosen = {one["NetworkInterfaceId"] for one in used} if wanted else set()
    for interface in vpc.interfaces:
        has = [one["GroupId"] for one in interface["Groups"]]
        identifier = interface["NetworkInterfaceId"]
        if identifier in chosen and (group is None or group["GroupId"] not in has):
            made.append(
                _in_group(
                    api,
                    place,
                    group,
                    f"security groups of {identifier}",
                    " ".join(has),
                    " ".join([*has, name]),
                    "modify_network_interface_attribute",
                    lambda group_id, i=identifier, h=has: {"NetworkInterfaceId": i, "Groups": [*h, group_id]},
                )
            )
        elif group is not None and group["GroupId"] in has and identifier not in chosen:
            rest = [one for one in has if one != group["GroupId"]]
            if not rest:
                plan.problems.append(
                    f"{identifier} has no security group but {group['GroupId']}, and an interface needs one. Next: "
                    "give it another, and run again."
                )
            removed.append(
                api.step(
                    f"security groups of {identifier}",
                    " ".join(has),
                    " ".join(rest),
                    "modify_network_interface_attribute",
                    NetworkInterfaceId=identifier,
                    Groups=rest,
                )
            )
    if group is not None and wanted:
        # Ports of others may be ranges, which are words.
        for key, rule in sorted(there.items(), key=str):
            if key not in wanted_keys:
                removed.append(
                    api.step(
                        f"rule {pure.named(key[0], key[1], '/')} of {name}",
                        str(key[2]),
                        "",
                        "revoke_security_group_ingress",
                        GroupId=group["GroupId"],
                        SecurityGroupRuleIds=[rule],
                    )
                )
    if group is not None and not wanted:
        removed.append(
            api.step(f"security group {name}", group["GroupId"], "", "delete_security_group", GroupId=group["GroupId"])
        )
    return made, removed


def _in_group(
    api: Api,
    place: Mapping[str, str],
    group: Mapping[str, Any] | None,
    what: str,
    before: str,
    after: str,
    call: str,
    arguments: Callable[..., dict[str, Any]],
) -> Step:
    """A step with a group that an earlier step may make; it cannot be rehearsed before that."""
    if group is not None:
        return api.step(what, before, after, call, **arguments(group["GroupId"]))
    action = api.ec2.meta.method_to_api_mapping[call]
    return Step(what, before, after, lambda: api.call(call, **arguments(place["id"])), f"ec2:{action}")


def _grouped(keys: Iterable[tuple[str, int, str]]) -> dict[tuple[str, int], list[str]]:
    found: dict[tuple[str, int], list[str]] = {}
    for protocol, port, source in keys:
        found.setdefault((protocol, port), []).append(source)
    return found


def _rules_of(api: Api, group: str) -> dict[tuple[str, Any, str], str]:
    """Ingress rules of a group, (protocol, port, source) -> id; what we would never make has words there."""
    rules = api.pages("describe_security_group_rules", "SecurityGroupRules", Filters=_filters(group_id=group))
    found = {}
    for one in rules:
        if not one["IsEgress"]:
            low, high = one.get("FromPort"), one.get("ToPort")
            group_id = one.get("ReferencedGroupInfo", {}).get("GroupId", "")
            source = next((one[key] for key in ("CidrIpv4", "CidrIpv6", "PrefixListId") if one.get(key)), group_id)
            every = one["IpProtocol"] == "-1"
            what = (pure.ALL, 0) if every else (one["IpProtocol"], low if low == high else f"{low}-{high}")
            found[(*what, source)] = one["SecurityGroupRuleId"]
    return found


def plan_peering(params: Mapping[str, Any]) -> Plan:
    """The peering of two VPCs: asked for by the first, accepted by the second."""
    sides = params["sides"]
    apis = [Api(side["region"], side["profile"], params["endpoint"]) for side in sides]
    plan = Plan()
    owner, (first, second) = params["owner"], sides
    pairs = [
        _filters(**{"requester_vpc_info.vpc_id": a["network"], "accepter_vpc_info.vpc_id": b["network"]})
        for a, b in ((first, second), (second, first))
    ]
    found = [
        one
        for pair in pairs
        for one in apis[0].pages("describe_vpc_peering_connections", "VpcPeeringConnections", Filters=pair)
        if one["Status"]["Code"] in ("active", "pending-acceptance", "provisioning", "initiating-request")
    ]
    ours = [one for one in found if tags_of(one).get(TAG) == owner]
    what = f"peering of {first['network']} and {second['network']}"
    place = {"id": found[0]["VpcPeeringConnectionId"] if found else ""}
    if params["state"] == "absent":
        for one in ours:
            identifier = one["VpcPeeringConnectionId"]
            plan.steps.append(
                apis[0].step(what, identifier, "", "delete_vpc_peering_connection", VpcPeeringConnectionId=identifier)
            )
        plan.result = {"peering": ""}
        return plan
    blocks = [_ranges(api, side["network"]) for api, side in zip(apis, sides)]
    plan.problems += pure.clashes([side["network"] for side in sides], blocks)
    plan.result = {"peering": place["id"]}
    accept = not found or found[0]["Status"]["Code"] != "active"
    if not found:
        account = apis[1].call("describe_vpcs", VpcIds=[second["network"]])["Vpcs"][0]["OwnerId"]
        arguments = {
            "VpcId": first["network"],
            "PeerVpcId": second["network"],
            "PeerOwnerId": account,
            "PeerRegion": apis[1].region,
            "TagSpecifications": [{"ResourceType": "vpc-peering-connection", "Tags": _tag_list({TAG: owner})}],
        }
        step = apis[0].step(what, "", "asked for", "create_vpc_peering_connection", **arguments)

        def create() -> None:
            answer = apis[0].call("create_vpc_peering_connection", **arguments)
            place["id"] = answer["VpcPeeringConnection"]["VpcPeeringConnectionId"]
            plan.result["peering"] = place["id"]

        step.do = create
        plan.steps.append(step)
    elif not ours:
        plan.warnings.append(f"{what} is there as {place['id']} and somebody else's; it is used and left as it is.")
        if accept:
            plan.problems.append(f"{place['id']} is not accepted yet ({found[0]['Status']['Code']}). Next: accept it.")
            return plan

    def activate() -> None:
        if _reached(apis[1], place["id"], "pending-acceptance", "provisioning", "active") == "pending-acceptance":
            apis[1].call("accept_vpc_peering_connection", VpcPeeringConnectionId=place["id"])
        # Before that its ranges are not known, to which routes lead.
        for api in apis:
            _reached(api, place["id"], "active")

    if accept:
        plan.steps.append(Step(what, "asked for", "active", activate, "ec2:AcceptVpcPeeringConnection"))
    return plan


def _reached(api: Api, peering: str, *codes: str) -> str:
    """The state of a peering, once it is one of `codes`; ProviderError when that takes more than PATIENCE."""
    end = time.monotonic() + PATIENCE
    while True:
        filters = _filters(vpc_peering_connection_id=peering)
        found = api.pages("describe_vpc_peering_connections", "VpcPeeringConnections", Filters=filters)
        status = found[0]["Status"] if found else {"Code": "not to be seen"}
        code = str(status["Code"])
        if code in codes:
            return code
        if code in ("failed", "rejected", "expired", "deleting", "deleted") or time.monotonic() > end:
            words = f"{peering} is {code} in {api.region}, not {codes[0]}. {status.get('Message', '')}"
            raise ProviderError("DescribeVpcPeeringConnections", words.strip())
        time.sleep(PAUSE)


def _ranges(api: Api, vpc: str) -> list[str]:
    found = api.call("describe_vpcs", VpcIds=[vpc])["Vpcs"][0]
    return [one["CidrBlock"] for one in found["CidrBlockAssociationSet"]]
