# SPDX-License-Identifier: GPL-3.0-or-later
"""AWS on the loopback: moto's server, and in front of it a proxy that plays what AWS does and moto does not.

moto carries out calls with DryRun on routes, has no quota, takes any destination to an interface, never shows a
blackhole, answers in one page, and throttles nobody; a peering of it is to be accepted and active at once, and listed
whatever is asked for.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import IPv4Network
from typing import Any

import boto3
from moto.backends import get_backend
from moto.server import ThreadedMotoServer
from vpc_modules import serving

REGION = "eu-central-1"
ACCOUNT = "123456789012"
# Filters of peerings, as moto's answer says what they are about.
PEERINGS = {
    "vpc-peering-connection-id": "<vpcPeeringConnectionId>(.*?)<",
    "requester-vpc-info.vpc-id": "<requesterVpcInfo>.*?<vpcId>(.*?)<",
    "accepter-vpc-info.vpc-id": "<accepterVpcInfo>.*?<vpcId>(.*?)<",
    "status-code": "<code>(.*?)<",
}
PAGED = {"DescribeRouteTables": "routeTableSet", "DescribeNetworkInterfaces": "networkInterfaceSet"}


class Aws:
    """What the proxy plays, and the calls that it saw. `signed` is by which key, in which region and with which session
    token."""

    def __init__(self, moto_port: int) -> None:
        self.moto_port = moto_port
        self.reset()

    def reset(self) -> None:
        self.calls: list[str] = []
        self.signed: set[tuple[str, str, str]] = set()
        self.denied: set[str] = set()
        self.throttled: dict[str, int] = {}
        self.quota = 50
        self.rules = 60
        self.quota_denied = False
        self.page = 2
        self.ahead: dict[str, list[str]] = {}  # states that a peering shows first, "" while it is not to be seen
        connection = http.client.HTTPConnection("127.0.0.1", self.moto_port)
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()
        connection.close()

    def backend(self) -> Any:
        return get_backend("ec2")[ACCOUNT][REGION]

    def refusal(self, action: str, query: dict[str, str]) -> tuple[int, str, str] | None:
        """Status, code and message of what AWS would refuse and moto would not."""
        if self.throttled.get(action, 0) > 0:
            self.throttled[action] -= 1
            return 503, "RequestLimitExceeded", "Request limit exceeded."
        if action in self.denied:
            return 403, "UnauthorizedOperation", "You are not authorized to perform this operation."
        if query.get("DryRun") == "true":
            return 412, "DryRunOperation", "Request would have succeeded, but DryRun flag is set."
        if action == "CreateRoute":
            return self.refused_route(query)
        if action == "AcceptVpcPeeringConnection" and self.ahead.get(query["VpcPeeringConnectionId"]):
            return 400, "InvalidStateTransition", "Invalid state transition, attempted to transition to provisioning"
        return None

    def refused_route(self, query: dict[str, str]) -> tuple[int, str, str] | None:
        destination = query["DestinationCidrBlock"]
        table = self.backend().route_tables[query["RouteTableId"]]
        routes = [one.destination_cidr_block for one in table.routes]
        try:
            IPv4Network(destination)
        except ValueError:
            return 400, "InvalidParameterValue", f"Value ({destination}) for parameter destinationCidrBlock is invalid."
        if destination in routes:
            return 400, "RouteAlreadyExists", f"The route identified by {destination} already exists."
        if len(routes) - 1 >= self.quota:
            return 400, "RouteLimitExceeded", f"The maximum number of routes ({self.quota}) has been reached."
        interface = self.backend().enis.get(query.get("NetworkInterfaceId"))
        if interface is not None and interface.vpc_id != table.vpc_id:
            return 400, "InvalidParameterValue", "route table and network interface belong to different networks"
        return None

    def altered(self, action: str, query: dict[str, str], body: str) -> str:
        """moto's answer with blackholes and states of peerings, and in pages."""
        if action == "DescribeRouteTables":
            for interface in set(re.findall(r"<networkInterfaceId>(eni-\w+)</networkInterfaceId>", body)):
                if interface not in self.backend().enis:
                    body = re.sub(
                        rf"<item>(?:(?!</?item>).)*?<networkInterfaceId>{interface}<.*?</item>",
                        lambda match: match[0].replace("<state>active</state>", "<state>blackhole</state>"),
                        body,
                        flags=re.DOTALL,
                    )
        if action.endswith("VpcPeeringConnection"):
            states = {"Create": ["", "initiating-request"], "Accept": ["provisioning"]}.get(action[:6], [])
            match = re.search(PEERINGS["vpc-peering-connection-id"], body)
            if match is not None:
                self.ahead[match[1]] = states
        if action == "DescribeVpcPeeringConnections":
            body = self.peerings(body, query)
        if action in PAGED:
            body = self.paged(body, PAGED[action], int(query.get("NextToken", "0")))
        return body

    def peerings(self, body: str, query: dict[str, str]) -> str:
        """Those that are asked for; the accepter's ranges are not told before a peering is active."""
        match = re.search("<vpcPeeringConnectionSet>(.*)</vpcPeeringConnectionSet>", body, re.DOTALL)
        if match is None:
            return body
        asked: dict[str, set[str]] = {}
        for key, name in query.items():
            if key.endswith(".Name"):
                values = f"{key.removesuffix('Name')}Value."
                asked[name] = {value for other, value in query.items() if other.startswith(values)}
        found = ""
        for one in self.items(match[1]):
            values = {name: "".join(re.findall(pattern, one)[:1]) for name, pattern in PEERINGS.items()}
            if all(values[name] in asked[name] for name in asked if name != "status-code"):
                ahead = self.ahead.get(values["vpc-peering-connection-id"])
                code = ahead.pop(0) if ahead else values["status-code"]
                if code and code in asked.get("status-code", {code}):
                    if code != "active":
                        one = re.sub("<accepterVpcInfo><cidrBlock>.*?</cidrBlock>", "<accepterVpcInfo>", one)
                    found += one.replace(f"<code>{values['status-code']}<", f"<code>{code}<")
        return body.replace(match[0], f"<vpcPeeringConnectionSet>{found}</vpcPeeringConnectionSet>")

    def items(self, text: str) -> list[str]:
        items, depth, begin = [], 0, 0
        for tag in re.finditer(r"<(/?)item>", text):
            if not tag[1]:
                begin = tag.start() if depth == 0 else begin
                depth += 1
            else:
                depth -= 1
                if depth == 0:
                    items.append(text[begin : tag.end()])
        return items

    def paged(self, body: str, name: str, start: int) -> str:
        match = re.search(rf"<{name}>(.*)</{name}>", body, re.DOTALL)
        if match is None:
            return body
        items = self.items(match[1])
        more = start + self.page < len(items)
        token = f"<nextToken>{start + self.page}</nextToken>" if more else ""
        page = "".join(items[start : start + self.page])
        return body.replace(match[0], f"<{name}>{page}</{name}>{token}")


def _handler(aws: Aws) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet, else the client's delayed acknowledgement costs 40 ms

        def log_message(self, *_arguments: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, kind: str = "text/xml") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            target = self.headers.get("X-Amz-Target", "")
            if target.startswith("ServiceQuotas"):
                self.service_quotas(json.loads(body))
                return
            query = dict(urllib.parse.parse_qsl(body.decode()))
            action = query["Action"]
            # "AWS4-HMAC-SHA256 Credential=<key>/<day>/<region>/ec2/aws4_request, ..."
            key, _day, region, *_rest = self.headers["Authorization"].partition("Credential=")[2].split("/")
            aws.signed.add((key, region, self.headers.get("X-Amz-Security-Token", "")))
            refusal = aws.refusal(action, query)
            aws.calls.append(action + ("?" if query.get("DryRun") == "true" else ""))
            if refusal is not None:
                status, code, message = refusal
                text = f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
                self.answer(status, f"{text}<RequestID>1</RequestID></Response>".encode())
                return
            connection = http.client.HTTPConnection("127.0.0.1", aws.moto_port)
            connection.request("POST", self.path, body, dict(self.headers))
            response = connection.getresponse()
            found = response.read().decode()
            self.answer(response.status, aws.altered(action, query, found).encode())
            connection.close()

        def service_quotas(self, query: dict[str, str]) -> None:
            if aws.quota_denied:
                kind = {"__type": "AccessDeniedException", "Message": "not authorized"}
                self.answer(400, json.dumps(kind).encode(), "application/x-amz-json-1.1")
                return
            assert query["ServiceCode"] == "vpc"
            quota = {"L-93826ACB": aws.quota, "L-0EA8095F": aws.rules}[query["QuotaCode"]]
            self.answer(200, json.dumps({"Quota": {"Value": quota}}).encode(), "application/x-amz-json-1.1")

    return Proxy


@contextlib.contextmanager
def aws_on_loopback() -> Iterator[tuple[Aws, str]]:
    """What plays AWS, and the URL that a client needs."""
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    try:
        _host, port = moto.get_host_and_port()
        aws = Aws(port)
        with serving(_handler(aws)) as server:
            yield aws, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        moto.stop()


class Network:
    """A VPC with two subnets, of which the first has a route table of its own and the second the main one."""

    def __init__(self, aws: Aws, cidr: str = "172.31.0.0/16") -> None:
        self.ec2 = boto3.client(
            "ec2",
            region_name=REGION,
            endpoint_url=f"http://127.0.0.1:{aws.moto_port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106 - moto takes any
        )
        self.vpc = self.ec2.create_vpc(CidrBlock=cidr)["Vpc"]["VpcId"]
        first, second = (str(one) for one in list(IPv4Network(cidr).subnets(new_prefix=24))[:2])
        self.subnets = [
            self.ec2.create_subnet(VpcId=self.vpc, CidrBlock=one)["Subnet"]["SubnetId"] for one in (first, second)
        ]
        self.table = self.ec2.create_route_table(VpcId=self.vpc)["RouteTable"]["RouteTableId"]
        self.ec2.associate_route_table(RouteTableId=self.table, SubnetId=self.subnets[0])
        self.main = next(one["RouteTableId"] for one in self.tables() if one["RouteTableId"] != self.table)

    def tables(self) -> list[Any]:
        found: list[Any] = self.ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [self.vpc]}])[
            "RouteTables"
        ]
        return found

    def interface(self, address: str, subnet: int = 0) -> str:
        made = self.ec2.create_network_interface(SubnetId=self.subnets[subnet], PrivateIpAddress=address)
        return str(made["NetworkInterface"]["NetworkInterfaceId"])

    def look(self, interface: str) -> Any:
        return self.ec2.describe_network_interfaces(NetworkInterfaceIds=[interface])["NetworkInterfaces"][0]

    def routes(self, table: str) -> dict[str, str]:
        """Destination to target of a table, without the VPC's own."""
        entry = next(one for one in self.tables() if one["RouteTableId"] == table)
        return {
            one["DestinationCidrBlock"]: one.get("NetworkInterfaceId")
            or one.get("VpcPeeringConnectionId")
            or one["GatewayId"]
            for one in entry["Routes"]
            if one.get("GatewayId") != "local"
        }

    def tags(self, table: str) -> dict[str, str]:
        entry = next(one for one in self.tables() if one["RouteTableId"] == table)
        return {one["Key"]: one["Value"] for one in entry["Tags"]}

    def everything(self) -> Any:
        """All that the modules can change, to be compared."""
        here = [{"Name": "vpc-id", "Values": [self.vpc]}]
        return (
            self.tables(),
            self.ec2.describe_network_interfaces(Filters=here)["NetworkInterfaces"],
            self.ec2.describe_security_groups(Filters=here)["SecurityGroups"],
        )
