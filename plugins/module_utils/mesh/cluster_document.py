# SPDX-License-Identifier: BSD-2-Clause
"""A cluster's document in the next record: what was dealt, its etcd, its hosts and their workloads, the Kubernetes
cluster that it is. Pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from . import immutable, openings, orphans
from .forgetting import Forgetting
from .ipam import Ipam
from .jsontext import filled
from .model import Cluster, Host, InCluster, Model, processes
from .record import SCHEMA, Record, format_time, pod_ranges
from .revisions import Revisions
from .schema import Problem


class ClusterDocuments:
    """Out of the inventory without what is forgotten (`model`) and of the record, whose clusters that are there are
    `known`. `prune` are the full names of what is to go, `exposed` and `keys` are those of a plan. `problems` and
    `warnings` are what was found to say; `orphans` and `removed` are names as `prune` has them."""

    def __init__(
        self,
        model: Model,
        record: Record,
        known: Mapping[str, Mapping[str, Any]],
        prune: AbstractSet[str],
        forgetting: Forgetting,
        revisions: Revisions,
        now: datetime,
        exposed: Mapping[str, Mapping[str, Any]],
        keys: Mapping[str, Mapping[str, str]],
        pods: Mapping[str, Sequence[str]],
    ) -> None:
        self.model = model
        self.record = record
        self.known = known
        self.prune = prune
        self.forgetting = forgetting
        self.forgotten = forgetting.forgotten
        self.revisions = revisions
        self.now = now
        self.exposed = exposed
        self.keys = keys
        self.pods = pods
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.orphans: list[str] = []
        self.removed: list[str] = []
        self.ipam = Ipam(model, now, self.problems)

    def problem(self, where: str, what: str, why: str, following: str) -> None:
        self.problems.append(Problem(where, what, why, following))

    def of(self, name: str) -> dict[str, Any] | None:
        """None for a name that the record has not had, and that is not to be there."""
        cluster = self.model.clusters.get(name)
        old = self.record.clusters.get(name)
        running = old if old is not None and old["state"] != "absent" else None
        if f"cluster/{name}" in self.prune or (cluster is not None and cluster.absent):
            if running is not None:
                self.removed.append(f"cluster/{name}")
                if openings.is_in_cluster(running) and cluster is None:
                    self.warnings.append(
                        f"cluster {name}: its control plane is in it, and goes on there although nobody in the mesh "
                        "knows it any more. Next: put it back into the inventory with state: absent and run "
                        "isthmus.mesh.site, which takes everything of the mesh out of it"
                    )
                tombstone = {"schema": SCHEMA, "name": name, "id": running["id"], "state": "absent"}
                ranges = [self.given_up(host, entry) for host, entry in sorted(running["hosts"].items())]
                more = filled(released=[*running["released"], *ranges], forgotten=self.forgetting.of(name))
                return self.revisions.stamped({**tombstone, **more}, old)
            return self.kept(name, old)
        if cluster is None:
            if running is not None:
                self.orphans.append(f"cluster/{name}")
                for host in sorted(set(running["hosts"]) & set(self.forgotten)):
                    self.problem(
                        f"isthmus_forget={host}",
                        f"it is a part of cluster {name}, which the inventory lacks",
                        "what the inventory lacks goes as a whole",
                        f"write cluster/{name}, or put that back into the inventory",
                    )
            return self.kept(name, old)
        if running is not None:
            self.problems += immutable.of_cluster(cluster, running)
        if cluster.in_cluster is not None:
            return self.revisions.stamped(self.in_cluster(cluster, cluster.in_cluster, running, old), old)
        hosts, released = self.hosts(cluster, running, old)
        members = self.members(cluster, running, hosts)
        if running is not None:
            self.problems += immutable.of_members(cluster, running, hosts, members)
        initial = running["etcd"]["initial"] if running is not None else cluster.etcd.hosts[0]
        ca_host = running["ca_host"] if running is not None else cluster.ca_host or cluster.etcd.hosts[0]
        if members and initial not in members:
            initial = members[0]
        if ca_host in self.forgotten:
            self.problem(
                f"isthmus_forget={ca_host}",
                f"it keeps the key of cluster {name}'s certificate authority",
                "with that key anybody can sign any certificate of the cluster, and without it nobody can revoke one",
                f"forget the whole cluster (isthmus_forget=cluster/{name}), take the mesh off the hosts that are left "
                "with isthmus.mesh.teardown, and run isthmus.mesh.site, which joins them anew with a new authority",
            )
        elif ca_host not in hosts:
            self.problem(
                f"cluster {name}",
                f"host {ca_host} is being removed and keeps the cluster's CA",
                "nobody could sign certificates any more",
                "keep the host, or remove the whole cluster",
            )
        document = self.document(cluster, running, old)
        document["ca_host"] = ca_host
        document["etcd"] = {**document["etcd"], "initial": initial, "members": members}
        document["hosts"] = {host: hosts[host] for host in sorted(hosts)}
        document["released"] = released
        return self.revisions.stamped(document, old)

    def kept(self, name: str, old: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The document of a cluster that is not planned: what is forgotten and revoked changes all the same."""
        if old is None:
            return None
        rest = {key: value for key, value in old.items() if key not in ("forgotten", "crl", "departed")}
        lists = self.forgetting.lists.get(name) or old.get("crl")
        return self.revisions.stamped({**rest, **filled(forgotten=self.forgetting.of(name), crl=lists)}, old)

    def document(
        self, cluster: Cluster, running: Mapping[str, Any] | None, old: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """A cluster's document, without what hosts of the inventory make of it."""
        token = f"isthmus-{self.model.name}-{cluster.name}"
        if running is not None:
            token = running["etcd"]["token"]
        elif old is not None:
            token += f"-{old['revision']}"  # a new etcd under an old name must not be taken for the old one
        return {
            "schema": SCHEMA,
            "name": cluster.name,
            "id": cluster.id,
            "state": "present",
            "site": cluster.site,
            "workload_ranges": [str(network) for network in cluster.workload_ranges],
            "service_range": str(cluster.service_range),
            "node_prefix": cluster.node_prefix,
            "ca_host": "",
            "ca_certificate": running.get("ca_certificate") if running is not None else None,
            "etcd": {
                "initial": "",
                "token": token,
                "members": [],
                "client_port": cluster.etcd.client_port,
                "peer_port": cluster.etcd.peer_port,
                "source": dict(cluster.etcd.source),
                "quota_bytes": cluster.etcd.quota_bytes,
            },
            "hosts": {},
            "released": [],
            **filled(
                forgotten=self.forgetting.of(cluster.name),
                crl=self.forgetting.lists.get(cluster.name) or (running.get("crl") if running is not None else None),
                kubernetes=self.kubernetes(cluster, running),
            ),
        }

    def in_cluster(
        self,
        cluster: Cluster,
        wanted: InCluster,
        running: Mapping[str, Any] | None,
        old: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The document of a cluster whose control plane is in it: its nodes are its registrar's to know."""
        where, before = f"isthmus_estate.clusters.{cluster.name}", (running or {}).get("etcd", {}).get("replicas")
        if before not in (None, wanted.replicas):
            self.problems.append(
                immutable.not_yet(
                    f"{where}.etcd.replicas",
                    before,
                    wanted.replicas,
                    "members of a running etcd come and go one by one",
                    f"put {before} back",
                )
            )
        document = self.document(cluster, running, old)
        document["control_plane"] = "in_cluster"
        document["etcd"]["replicas"] = wanted.replicas
        exposed = self.exposed.get(cluster.name) or (running or {}).get("exposed")
        for text in () if exposed is None else exposed["addresses"]:
            for other in self.model.clusters.values():
                for network in other.ranges:
                    if IPv4Address(text) in network:
                        self.problem(
                            f"{where}.expose",
                            f"its etcd got the address {text}, which lies in {network} of cluster {other.name}",
                            "what is known of the cluster makes the mesh, so its etcd must be reached without it",
                            "have it exposed at an address of the underlay",
                        )
        return {**document, **filled(exposed=exposed)}

    def keeps_kubernetes(self, cluster: Cluster) -> bool:
        """Whether the inventory lacks a Kubernetes cluster that the record has, and that is not to go."""
        known = self.known.get(cluster.name, {})
        return cluster.kubernetes is None and "kubernetes" in known and f"kubernetes/{cluster.name}" not in self.prune

    def kubernetes(self, cluster: Cluster, running: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What the record says of the Kubernetes cluster that the cluster is."""
        old = (running or {}).get("kubernetes")
        if cluster.kubernetes is None:
            if old is not None:
                (self.orphans if self.keeps_kubernetes(cluster) else self.removed).append(f"kubernetes/{cluster.name}")
            return dict(old) if old is not None and self.keeps_kubernetes(cluster) else None
        wanted, orphaned = cluster.kubernetes.pod_ranges, orphans.pods(cluster, running or {}, self.prune)
        self.orphans += [f"pods/{cluster.name}/{network}" for network in orphaned]
        kept = [network for network in wanted if not any(network.subnet_of(outer) for outer in orphaned)]
        self.removed += [
            f"pods/{cluster.name}/{text}"
            for text in pod_ranges(running or {})
            if not any(IPv4Network(text).subnet_of(network) for network in (*wanted, *orphaned))
        ]
        return {
            "api_server": cluster.kubernetes.api_server,
            "pod_ranges": [str(network) for network in (*kept, *orphaned)],
            "service_range": str(cluster.kubernetes.service_range),
            **({"identity_labels": list(labels)} if (labels := cluster.kubernetes.identity_labels) else {}),
        }

    def members(self, cluster: Cluster, running: Mapping[str, Any] | None, hosts: Mapping[str, Any]) -> list[str]:
        wanted = set(cluster.etcd.hosts)
        for host in running["etcd"]["members"] if running is not None else ():
            if host in wanted:
                continue
            name = f"member/{cluster.name}/{host}"
            if name in self.prune or host not in hosts:
                self.removed.append(name)
                continue
            wanted.add(host)
            if host in self.model.hosts:
                self.orphans.append(name)
        if not wanted & set(hosts) and running is not None and set(running["etcd"]["members"]) & set(self.forgotten):
            self.problem(
                f"isthmus_forget={','.join(sorted(set(running['etcd']['members']) & set(self.forgotten)))}",
                f"the etcd of cluster {cluster.name} would have no member left",
                "the cluster's state lives in them",
                f"while a member serves, list another host under etcd.hosts of {cluster.name} and run isthmus.mesh.site"
                f"; else forget the whole cluster (isthmus_forget=cluster/{cluster.name})",
            )
        elif not wanted & set(hosts):
            self.problem(
                f"isthmus_estate.clusters.{cluster.name}.etcd.hosts",
                "no member would be left",
                "the cluster's state lives in them",
                "name another host first",
            )
        if len(wanted) > 7:
            self.problem(
                f"isthmus_estate.clusters.{cluster.name}.etcd.hosts",
                f"{len(wanted)} members with those that the record knows are more than 7",
                "absence from the list removes no member",
                f"remove one with isthmus_prune=member/{cluster.name}/HOST",
            )
        return sorted(wanted)

    def hosts(
        self, cluster: Cluster, running: Mapping[str, Any] | None, old_document: Mapping[str, Any] | None
    ) -> tuple[dict[str, dict[str, Any]], list[dict[str, str]]]:
        """Entries of all hosts of the cluster, and what is released."""
        old_hosts: Mapping[str, Any] = running["hosts"] if running is not None else {}
        released = [dict(entry) for entry in (old_document or {}).get("released", ())]
        entries: dict[str, dict[str, Any]] = {}
        for name, entry in old_hosts.items():
            host = self.model.hosts.get(name)
            gone = host is not None and host.absent and host.cluster == cluster.name
            if gone or f"host/{name}" in self.prune:
                self.removed.append(f"host/{name}")
                released.append(self.given_up(name, entry))
                continue
            entries[name] = copy.deepcopy(dict(entry))
            if host is None:
                self.orphans.append(f"host/{name}")
            elif host.cluster != cluster.name:
                self.problem(
                    f"host {name}.isthmus_cluster",
                    f"{host.cluster}, but the host runs in cluster {cluster.name}",
                    "its addresses and certificates are of that cluster",
                    f"put it back, or move it with isthmus_prune=host/{name}",
                )
        wanted = [host for host in self.model.hosts.values() if host.cluster == cluster.name and not host.absent]
        back = self.given_back(cluster, wanted, old_document) if running is None and old_document is not None else {}
        released = [entry for entry in released if entry["address"] not in back.values()]
        held = {**entries, **{name: {"range4": address} for name, address in back.items()}}
        ranges = self.ipam.node_ranges(cluster, wanted, held, released)
        for host in wanted:
            if host.name in ranges:
                old = entries.get(host.name)
                node = host.kubernetes_node
                if self.keeps_kubernetes(cluster) and old is not None:
                    node = old.get("kubernetes_node")
                entry = self.host(host, ranges[host.name], old, released)
                keys = self.keys_of(host.name, old)
                pods = self.pods_of(host.name, old) if node is not None else []
                entries[host.name] = {
                    **entry,
                    **filled(kubernetes_node=node, pod_cidrs=pods, public_keys=keys),
                }
        return entries, released

    def given_up(self, name: str, entry: Mapping[str, Any]) -> dict[str, str]:
        """What is released with a host."""
        return {"address": entry["range4"], "owner": name, "at": format_time(self.now)}

    def given_back(self, cluster: Cluster, wanted: list[Host], removed: Mapping[str, Any]) -> dict[str, str]:
        """By host, the ranges that those `wanted` of a cluster had that was `removed` and begins anew: nobody else can
        have got them yet. None of a host that was lost, and of one whose range the inventory says."""
        names = {host.name for host in wanted if host.node_range is None} - removed.get("forgotten", {}).keys()
        pinned = [host.node_range for host in wanted if host.node_range is not None]
        found: dict[str, str] = {}  # by range, the last who had it
        for entry in reversed(removed.get("released", ())):
            network = IPv4Network(entry["address"])
            if (
                entry.get("owner") in names
                and entry["address"] not in found
                and network.prefixlen == cluster.node_prefix
                and network in self.ipam.quarantined([entry])
                and any(network.subnet_of(outer) for outer in cluster.workload_ranges)
                and not any(network.overlaps(other) for other in pinned)
            ):
                found[entry["address"]] = entry["owner"]
                names.remove(entry["owner"])
        return {owner: address for address, owner in found.items()}

    def host(
        self, host: Host, node_range: IPv4Network, old: Mapping[str, Any] | None, released: list[dict[str, str]]
    ) -> dict[str, Any]:
        mesh = IPv4Address(old["mesh4"]) if old is not None else node_range.network_address + 1
        workloads: dict[str, Any] = dict(old["workloads"]) if old is not None else {}
        declared = {workload.key: workload for workload in host.workloads}
        for key in sorted(workloads):
            name = f"workload/{host.name}/{key}"
            if name in self.prune or (key in declared and declared[key].absent):
                entry = workloads.pop(key)
                self.removed.append(name)
                released.append({"address": f"{entry['address4']}/32", "owner": name, "at": format_time(self.now)})
            elif key not in declared:
                self.orphans.append(name)
        present = [workload for workload in host.workloads if not workload.absent]
        orphaned = {processes(workloads[key]["cgroup"]): key for key in workloads if key not in declared}
        for workload in present:
            orphan = orphaned.get(processes(workload.cgroup))
            if orphan is not None:
                self.problems.append(
                    orphans.problem(
                        f"host {host.name}.isthmus_workloads ({workload.key})",
                        f"{next(iter(workload.cgroup.values()))} is also the workload {orphan}",
                        f"workload/{host.name}/{orphan}",
                    )
                )
        addresses = self.ipam.addresses(host, node_range, mesh, present, workloads, released)
        for workload in present:
            if workload.key in addresses:
                workloads[workload.key] = {
                    "address4": str(addresses[workload.key]),
                    "service_account": workload.service_account,
                    "labels": dict(workload.labels),
                    "cgroup": dict(workload.cgroup),
                }
        return {
            "range4": str(node_range),
            "mesh4": str(mesh),
            "underlay4": str(host.underlay),
            "advertise4": str(host.advertise),
            "site": host.site,
            "labels": dict(host.labels),
            "state": "present",
            "workloads": {key: workloads[key] for key in sorted(workloads)},
        }

    def pods_of(self, host: str, old: Mapping[str, Any] | None) -> list[str]:
        """The host's `pod_cidrs` in the record."""
        found = self.pods[host] if host in self.pods else (old or {}).get("pod_cidrs", ())
        return [str(network) for network in sorted(IPv4Network(text) for text in found)]

    def keys_of(self, host: str, old: Mapping[str, Any] | None) -> dict[str, str]:
        """The host's `public_keys` in the record."""
        if not self.model.closed:
            return {}
        return dict(self.keys.get(host) or (old or {}).get("public_keys", {}))
