# SPDX-License-Identifier: BSD-2-Clause
"""What cannot be changed while an estate runs: of the estate, of a cluster, of members of its etcd. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network
from typing import Any

from .endpoints import announced
from .model import Cluster, Model
from .record import cluster_ips
from .schema import Problem


def of_estate(model: Model, roster: Mapping[str, Any]) -> Iterator[Problem]:
    """By the roster of the record."""
    if roster["estate"] != model.name:
        yield Problem(
            "isthmus_estate.name",
            f"{model.name!r}, but the record found on the hosts is of estate {roster['estate']!r}",
            "two estates on the same hosts would undo each other",
            "use the inventory of that estate, or tear it down first",
        )
    if roster.get("max_clusters") not in (None, model.max_clusters):
        yield Problem(
            "isthmus_estate.max_clusters",
            f"{model.max_clusters}, but the estate runs with {roster['max_clusters']}",
            "it sets the layout of every identity",
            f"put {roster['max_clusters']} back",
        )
    if roster.get("domain") not in (None, model.domain):
        yield not_yet(
            "isthmus_estate.domain",
            roster["domain"],
            model.domain,
            "until the last host has the new one, names of services would be found on a part of the hosts only",
            f"put {roster['domain']} back",
        )
    if roster.get("overlay_port") not in (None, model.overlay_port):
        yield not_yet(
            "isthmus_estate.overlay.port",
            roster["overlay_port"],
            model.overlay_port,
            "hosts that have the new one and hosts that do not could not reach each other's workloads",
            f"put {roster['overlay_port']} back",
        )


def of_cluster(cluster: Cluster, doc: Mapping[str, Any]) -> Iterator[Problem]:
    """By the document of the record."""
    where = f"isthmus_estate.clusters.{cluster.name}"
    if cluster.id != doc["id"]:
        yield Problem(
            f"{where}.id",
            f"{cluster.id}, but the cluster runs with {doc['id']}",
            "every identity of its workloads carries the id",
            f"put {doc['id']} back; to renumber, remove the cluster and add it anew",
        )
    old = IPv4Network(doc["service_range"])
    if not old.subnet_of(cluster.service_range):
        yield Problem(
            f"{where}.service_range",
            f"{cluster.service_range} does not hold {old}, the range in use",
            "addresses of services would move",
            f"use {old} or a range around it",
        )
    if cluster.kubernetes is not None:
        for text in cluster_ips(doc):
            if not IPv4Network(text).subnet_of(cluster.kubernetes.service_range):
                yield Problem(
                    f"{where}.kubernetes.service_range",
                    f"{cluster.kubernetes.service_range} does not hold {text}, the range in use",
                    "addresses of services would move",
                    f"use {text} or a range around it; if Kubernetes was made anew with another one, take "
                    f"`kubernetes` out of the inventory with isthmus_prune=kubernetes/{cluster.name} first",
                )
    places = [doc.get("control_plane", "hosts"), "hosts" if cluster.in_cluster is None else "in_cluster"]
    if places[0] != places[1]:
        yield not_yet(
            f"{where}.control_plane",
            places[0],
            places[1],
            "its etcd and its authority's key would have to move",
            f"put {places[0]} back; to move it, remove the cluster and add it anew",
        )
    if cluster.ca_host is not None and cluster.ca_host != doc["ca_host"]:
        yield Problem(
            f"{where}.ca_host",
            f"{cluster.ca_host}, but the CA's key is on {doc['ca_host']}",
            "a private key never leaves its host",
            f"put {doc['ca_host']} back or leave ca_host out",
        )
    if doc.get("ca_certificate") is None:
        return  # its etcd has not run: a first run that failed can be put right
    for key, new, why in (
        ("client_port", cluster.etcd.client_port, "agents and peers would look for its members where none listens"),
        ("peer_port", cluster.etcd.peer_port, "its members know each other by the port that they joined with"),
    ):
        if new != doc["etcd"][key]:
            yield not_yet(f"{where}.etcd.{key}", doc["etcd"][key], new, why, f"put {doc['etcd'][key]} back")


def of_members(
    cluster: Cluster, running: Mapping[str, Any], hosts: Mapping[str, Any], members: list[str]
) -> Iterator[Problem]:
    """Running members stay at the addresses by which the others know them."""
    if running.get("ca_certificate") is None:
        return
    before = announced(running["hosts"], running["etcd"]["members"])
    after = announced(hosts, [member for member in members if member in hosts])
    for member in sorted(set(before) & set(after)):
        for key, variable in (("underlay4", "isthmus_underlay"), ("advertise4", "isthmus_advertise")):
            old, new = running["hosts"][member][key], hosts[member][key]
            if old != new:
                yield not_yet(
                    f"host {member}.{variable}",
                    old,
                    new,
                    f"the host carries a member of cluster {cluster.name}'s etcd, and the others know it by its "
                    "addresses",
                    f"put {old} back; to move the member, take the host out of etcd.hosts (another one in its "
                    f"place) with isthmus_prune=member/{cluster.name}/{member}, and list it again later",
                )
                break
        else:
            # Back to one site is no harm: what was announced can be dialled from there too.
            if before[member] != after[member] and before[member] == running["hosts"][member]["underlay4"]:
                yield not_yet(
                    f"isthmus_estate.clusters.{cluster.name}.etcd.hosts",
                    before[member],
                    f"{after[member]} as the address of member {member}",
                    "members in several sites dial each other at isthmus_advertise, and the others know it by "
                    "isthmus_underlay",
                    "keep the members in one site",
                )


def not_yet(where: str, old: Any, new: Any, why: str, following: str) -> Problem:
    """A change that a later version may make: refused now, as this one would leave it half done."""
    return Problem(where, f"a change from {old} to {new} is not yet supported", why, following)
