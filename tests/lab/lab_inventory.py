# SPDX-License-Identifier: GPL-3.0-or-later
"""What the lab is made of: machines, sites and Kubernetes clusters, read from an Ansible inventory."""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import demo_workloads
import yaml
from lab_system import LabError

LAB_NETWORK = ipaddress.IPv4Network("198.18.0.0/16")  # RFC 2544: never routed in the real world
# These sites' machines use a plain /etc/resolv.conf, all others systemd-resolved: both are in the field.
PLAIN_RESOLV_CONF_SITES = frozenset({"onprem"})


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A machine: `address` in its site's network, `units` the demo's workloads that run on it."""

    name: str
    site: str
    cluster: str
    address: ipaddress.IPv4Address
    units: tuple[str, ...]
    kubernetes: bool = False  # a machine of a Kubernetes cluster: `lab kube up` makes it, `lab up` does not

    @property
    def namespace(self) -> str:
        return f"islab-m-{self.name}"

    @property
    def port(self) -> str:
        """The router's end of the machine's cable (Linux allows 15 characters)."""
        return interface_name("v-", self.name)

    @property
    def resolved(self) -> bool:
        return self.site not in PLAIN_RESOLV_CONF_SITES


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    name: str
    network: ipaddress.IPv4Network

    @property
    def bridge(self) -> str:
        return interface_name("br-", self.name)

    @property
    def gateway(self) -> ipaddress.IPv4Address:
        return self.network[1]


@dataclasses.dataclass(frozen=True, slots=True)
class KubernetesCluster:
    """A Kubernetes cluster of machines; `nodes` are those with a kubelet, by node name, in the inventory's order."""

    name: str
    hosts: tuple[Host, ...]
    control_plane: Host
    nodes: dict[str, Host]
    pod_range: ipaddress.IPv4Network
    service_range: ipaddress.IPv4Network
    in_cluster: bool  # the mesh's control plane runs inside; a cloud's part is played for it

    @property
    def dns(self) -> ipaddress.IPv4Address:
        """The ClusterIP of the cluster's DNS, by convention."""
        return self.service_range[10]

    def pod_ranges(self) -> dict[str, ipaddress.IPv4Network]:
        """The /24 of each node, by node name."""
        _, *ranges = self.pod_range.subnets(new_prefix=24)
        return dict(zip(self.nodes, ranges, strict=False))


@dataclasses.dataclass(frozen=True, slots=True)
class Inventory:
    hosts: dict[str, Host]
    sites: dict[str, Site]
    kubernetes: dict[str, KubernetesCluster]


def interface_name(prefix: str, name: str) -> str:
    full = prefix + name
    if len(full) <= 15:
        return full
    return prefix + name[: 15 - len(prefix) - 5] + "-" + hashlib.sha256(name.encode()).hexdigest()[:4]


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise LabError(f"the lab's inventory cannot be read: {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LabError(f"the lab's inventory: {path} is not a mapping")
    return content


def vars_of(directory: Path, kind: str, name: str) -> dict[str, Any]:
    """`group_vars` or `host_vars` of one name: a file, or a directory of files, as Ansible reads them."""
    merged: dict[str, Any] = {}
    base = directory / kind / name
    for path in [*(base.with_name(name + suffix) for suffix in (".yml", ".yaml")), *sorted(base.glob("*.y*ml"))]:
        if path.is_file():
            merged.update(read_yaml(path))
    return merged


def demo_units(workload: Mapping[str, Any]) -> list[str]:
    """The demo's unit that plays a workload: the unit that it names, or the one in the slice that it names."""
    group = workload.get("cgroup") or workload
    unit = str(group.get("unit") or "")
    if group.get("slice"):
        unit = str(group["slice"]).removesuffix(".slice") + ".service"
    return [unit] if unit in demo_workloads.UNITS else []


def cluster_entry(known: Mapping[str, Any], cluster: str) -> dict[str, Any]:
    """What a host's variables say about its cluster: `lab_cluster_<name>`, else the entry in `isthmus_estate`.

    An `isthmus_estate` that is put together by a template is not looked into: its parts are the first kind.
    """
    estate = known.get("isthmus_estate")
    clusters = estate.get("clusters") if isinstance(estate, dict) else None
    entry = known.get(f"lab_cluster_{cluster}") or (clusters or {}).get(cluster) or {}
    if not isinstance(entry, dict):
        raise LabError(f"the lab's inventory: the entry of cluster {cluster} is not a mapping: {entry!r}")
    return entry


def read_variables(directory: Path) -> dict[str, dict[str, Any]]:
    """Every host's variables, as far as the files of an inventory directory have them literally."""
    files = [path for path in sorted(directory.glob("*.y*ml")) if path.is_file()]
    if not files:
        raise LabError(f"no lab inventory: {directory} has no YAML file (set ISTHMUS_LAB_INVENTORY to another one)")
    variables: dict[str, dict[str, Any]] = {}

    def walk(group: str, body: Mapping[str, Any] | None, inherited: Mapping[str, Any]) -> None:
        body = body or {}
        here = {**inherited, **vars_of(directory, "group_vars", group), **(body.get("vars") or {})}
        for name, host_vars in (body.get("hosts") or {}).items():
            known = variables.setdefault(name, {})
            known.update({**here, **vars_of(directory, "host_vars", name), **(host_vars or {})})
        for child, child_body in (body.get("children") or {}).items():
            walk(child, child_body, here)

    groups = [read_yaml(path) for path in files]
    everywhere: dict[str, Any] = {}
    for content in groups:
        everywhere.update((content.get("all") or {}).get("vars") or {})
    everywhere.update(vars_of(directory, "group_vars", "all"))
    for content in groups:
        for group, body in content.items():
            walk(group, body, everywhere)
    return variables


def read_inventory(directory: Path) -> Inventory:
    """The machines of a YAML inventory directory.

    A host needs `isthmus_underlay` (or a literal `ansible_host`) and a site: `isthmus_site`, else that of
    its cluster, else the cluster's name. A site's network is the /24 of its hosts. Machines of a cluster whose nodes
    are no hosts of the mesh name it by `lab_cluster`; the host that stands for its API there is no machine.
    """
    variables = read_variables(directory)
    hosts: dict[str, Host] = {}
    sites: dict[str, Site] = {}
    for name, known in variables.items():
        cluster = str(known.get("isthmus_cluster") or known.get("lab_cluster") or "")
        if not cluster or "ansible_connection" in known:
            continue  # it stands for something that is no machine
        entry = cluster_entry(known, cluster)
        site = str(known.get("isthmus_site") or entry.get("site") or cluster)
        literal = known.get("isthmus_underlay") or known.get("ansible_host")
        try:
            address = ipaddress.IPv4Address(str(literal))
        except ValueError as error:
            raise LabError(f"{directory}: host {name}: isthmus_underlay {literal!r} is not an IPv4 address") from error
        if address not in LAB_NETWORK:
            raise LabError(f"{directory}: host {name}: {address} is outside {LAB_NETWORK}, the lab's network")
        network = ipaddress.IPv4Network(f"{address}/24", strict=False)
        if sites.setdefault(site, Site(site, network)).network != network:
            raise LabError(f"{directory}: host {name}: {address} is not in {sites[site].network}, its site {site}")
        units = tuple(unit for workload in known.get("isthmus_workloads") or () for unit in demo_units(workload))
        hosts[name] = Host(name, site, cluster, address, units, bool(entry.get("kubernetes")))
    if not hosts:
        raise LabError(f"{directory}: no host with isthmus_cluster")
    clusters = dict.fromkeys(host.cluster for host in hosts.values() if host.kubernetes)
    return Inventory(hosts, sites, {name: kubernetes_cluster(name, hosts, variables) for name in clusters})


def kubernetes_cluster(
    name: str, hosts: Mapping[str, Host], variables: Mapping[str, Mapping[str, Any]]
) -> KubernetesCluster:
    """The control plane is the host at the address of `api_server`; a node is a host unless its variables deny it."""
    members = [host for host in hosts.values() if host.cluster == name]
    entry = cluster_entry(variables[members[0].name], name)
    section = entry["kubernetes"]
    server = urllib.parse.urlsplit(section["api_server"]).hostname
    found = [host for host in members if str(host.address) == server]
    if len(found) != 1:
        raise LabError(f"cluster {name}: no host has the address of its api_server, {section['api_server']}")
    nodes = {}
    for host in members:
        node = variables[host.name].get("isthmus_kubernetes_node", host.name)
        if node is not False:
            nodes[str(node)] = host
    pods, services = (ipaddress.IPv4Network(text) for text in (section["pod_ranges"][0], section["service_range"]))
    inside = entry.get("control_plane") == "in_cluster"
    return KubernetesCluster(name, tuple(members), found[0], nodes, pods, services, inside)
