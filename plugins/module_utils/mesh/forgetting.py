# SPDX-License-Identifier: BSD-2-Clause
"""Machines that are lost: they take no part until they are joined anew, and what their keys were good for is revoked.
So are certificates of etcd hosts that were removed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from . import openings
from .model import Cluster, Model
from .record import Record, forgotten_hosts, format_time
from .schema import Problem, nearest


@dataclass(frozen=True)
class Forget:
    """`names` of hosts and clusters that are lost. `clean` are hosts that hold nothing of the mesh: what
    was forgotten of their name before is joined anew. `lists` are the CRLs that were made, by cluster."""

    names: Iterable[str] = ()
    clean: Iterable[str] = ()
    lists: Mapping[str, str] = field(default_factory=dict)


NOBODY = Forget()


class Forgetting:
    """Out of the clusters of the record that are there (`known`) and what an operator says. `lost` are full names of
    what he names; `forgotten` are all hosts that take no part, by name: `cluster`, `at`, `by`; `model` is the
    inventory's as if it lacked them. `problems` and `warnings` are what was found to say."""

    def __init__(
        self,
        forget: Forget,
        model: Model,
        record: Record,
        known: Mapping[str, Mapping[str, Any]],
        now: datetime,
        by: str,
    ) -> None:
        self.record = record
        self.known = known
        self.now = now
        self.by = by
        self.lists = forget.lists
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.forgotten = forgotten_hosts(record.clusters.values())
        self.lost = self.names(forget.names)
        for name in set(forget.clean) & set(self.forgotten) & set(model.hosts):
            if f"host/{name}" not in self.lost and not model.hosts[name].absent:
                del self.forgotten[name]
        self.add()
        self.model = self.without(model)

    def problem(self, where: str, what: str, why: str, following: str) -> None:
        self.problems.append(Problem(where, what, why, following))

    def names(self, given: Iterable[str]) -> set[str]:
        """Full names of what is lost, known or forgotten before. Unlike a name to prune it must be found: somebody
        relies on it."""
        candidates = {f"cluster/{name}" for name in self.record.clusters}
        candidates |= {f"host/{host}" for doc in self.known.values() for host in doc["hosts"]}
        candidates |= {f"host/{host}" for host in self.forgotten}
        found = set()
        for name in filter(None, map(str.strip, given)):
            meant = {name} & candidates or {one for one in candidates if one.partition("/")[2] == name}
            if len(meant) == 1:
                found |= meant
            elif meant:
                self.problem(
                    f"isthmus_forget={name}",
                    "it can mean " + " or ".join(sorted(meant)),
                    "what is forgotten cannot be brought back but by joining it anew",
                    "write the full name",
                )
            else:
                near = nearest(name, candidates)
                self.problem(
                    f"isthmus_forget={name}",
                    "the estate record has neither a host nor a cluster of that name",
                    "a machine under another name would keep its rights",
                    f"write its inventory name{f'; did you mean {near!r}?' if near else ''}",
                )
        return found

    def add(self) -> None:
        """Put what is lost, a cluster with all its hosts, beside what was forgotten before."""
        for name, doc in self.known.items():
            for host in doc["hosts"]:
                if f"host/{host}" in self.lost or f"cluster/{name}" in self.lost:
                    self.forgotten[host] = {"cluster": name, "at": format_time(self.now), "by": self.by}
            if f"cluster/{name}" in self.lost and openings.is_in_cluster(doc):
                self.warnings.append(
                    f"cluster {name}: other clusters' etcd refuses what its registrars hold, as the user remote-{name} "
                    "is deleted there; the certificates are not revoked. Next: give no other cluster that name within "
                    "a year"
                )

    def without(self, model: Model) -> Model:
        """The model as if the inventory lacked what is forgotten, and clusters that cannot begin without it."""

        def cannot_begin(cluster: Cluster) -> bool:
            return f"cluster/{cluster.name}" in self.lost or (
                cluster.name not in self.known
                and cluster.in_cluster is None
                and (cluster.ca_host in self.forgotten or not set(cluster.etcd.hosts) - set(self.forgotten))
            )

        dropped = {cluster.name for cluster in model.clusters.values() if cannot_begin(cluster)}
        for host in sorted(set(model.hosts) & set(self.forgotten)):
            entry = self.forgotten[host]
            if f"host/{host}" not in self.lost and f"cluster/{entry['cluster']}" not in self.lost:
                self.warnings.append(
                    f"host {host} was forgotten at {entry['at']} by {entry['by'] or 'somebody'} and takes no part. "
                    "Next: take the mesh off it with isthmus.mesh.teardown, or give it a new disk; isthmus.mesh.site "
                    "then joins it anew. If it is gone for good, take it out of the inventory"
                )
        clusters = {
            name: replace(
                cluster,
                etcd=replace(
                    cluster.etcd, hosts=tuple(host for host in cluster.etcd.hosts if host not in self.forgotten)
                ),
            )
            for name, cluster in model.clusters.items()
            if name not in dropped
        }
        hosts = {
            name: host
            for name, host in model.hosts.items()
            if name not in self.forgotten and host.cluster not in dropped
        }
        services = {
            key: replace(service, clusters=tuple(name for name in service.clusters if name not in dropped))
            for key, service in model.services.items()
        }
        return replace(
            model, clusters=clusters, hosts=hosts, services=services, ipsec=model.ipsec.without(self.forgotten)
        )

    def of(self, cluster: str) -> dict[str, dict[str, str]]:
        """The entries of the cluster's document."""
        return {
            host: {"at": entry["at"], "by": entry["by"]}
            for host, entry in sorted(self.forgotten.items())
            if entry["cluster"] == cluster
        }

    def departed(self, documents: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
        """By authority, removed etcd hosts whose certificates it has still to revoke: others have some of these names
        too, so that no user can be deleted for them. Not of a cluster that goes as a whole, whose names are its own."""
        present = {name: doc for name, doc in documents.items() if doc["state"] != "absent"}
        hosts = {host for doc in present.values() for host in doc["hosts"]} | set(self.forgotten)
        carried = {host for name in set(present) & set(self.known) for host in self.known[name]["etcd"]["members"]}
        return {
            name: sorted((carried | set(self.known[name].get("departed", ()))) - hosts)
            for name, document in present.items()
            if document["ca_certificate"] is not None and name not in self.lists
        }

    def revocations(
        self, documents: Mapping[str, Mapping[str, Any]], forgotten: Mapping[str, Mapping[str, str]]
    ) -> Iterator[dict[str, Any]]:
        """By authority. All that is forgotten or departed, not only by this run: a run before may have reached a part
        of the authorities only."""
        gone = {entry["cluster"] for entry in forgotten.values()}
        for name, document in documents.items():
            departed = document.get("departed", [])
            if document["state"] == "absent" or document["ca_certificate"] is None or not (forgotten or departed):
                continue
            names = [f"remote-{other}" for other in sorted(gone) if documents[other]["state"] == "absent"]
            if openings.is_in_cluster(document):
                # Who is removed and comes back keeps its keys, and nothing would tell it that they are refused there.
                if departed:
                    self.warnings.append(
                        f"cluster {name}: its authority is in the cluster and revokes what forgotten hosts have, not "
                        f"what removed ones have: certificates of {', '.join(departed)} are good there until they end. "
                        "Next: take the mesh off them with isthmus.mesh.teardown, which deletes the keys"
                    )
                if forgotten:
                    yield {"cluster": name, "ca_host": "", "hosts": sorted(forgotten), "departed": [], "names": names}
                continue
            yield {
                "cluster": name,
                "ca_host": document["ca_host"],
                "hosts": sorted({*forgotten, *departed}),
                "departed": list(departed),
                "names": names,
            }
