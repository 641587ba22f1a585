# SPDX-License-Identifier: BSD-2-Clause
"""The estate record: what was dealt and applied, kept in every cluster's etcd and on every host.

A record is a set of JSON documents. Their names are keys below `isthmus/v1/estate/`:

`roster`::

    {"schema": 1, "revision": 4, "estate": "lab", "domain": "clusterset.local", "max_clusters": 255,
     "overlay_port": 8472, "version": "1.0.0",
     "clusters": {"onprem": {"id": 1, "state": "present"}},
     "services": {"shop/web": {"state": "present", "clusters": ["cloud", "edge", "onprem"]}},
     "vpcs": {"sites": {"cloud": {"provider": "aws", "network": "vpc-1", "region": "eu-central-1"}}, "peerings": []},
     "bgp": ["cloud"], "bfd": ["cloud"], "closed": ["edge"], "masquerade": ["onprem"],
     "empty": ["branch"],
     "gateways": {"onprem": {"gateways": ["onprem-1 (198.18.1.11)"], "networks": ["198.18.1.0/24"]}},
     "hash": "<sha256 of the model>", "when": "2026-01-02T03:04:05Z", "by": "alice"}

`clusters/<name>`::

    {"schema": 1, "revision": 7, "name": "onprem", "id": 1, "state": "present", "site": "onprem",
     "workload_ranges": ["10.101.0.0/16"], "service_range": "10.111.0.0/16", "node_prefix": 28,
     "ca_host": "onprem-1", "ca_certificate": null,
     "etcd": {"initial": "onprem-1", "token": "isthmus-lab-onprem", "members": ["onprem-1"],
              "client_port": 2379, "peer_port": 2380, "source": {"type": "package"}, "quota_bytes": 2147483648},
     "hosts": {"onprem-1": {"range4": "10.101.0.0/28", "mesh4": "10.101.0.1",
                            "underlay4": "198.18.1.11", "advertise4": "198.18.1.11", "site": "onprem",
                            "labels": {}, "state": "present",
                            "workloads": {"shop/web": {"address4": "10.101.0.2", "service_account": "default",
                                                       "labels": {"app": "web"}, "cgroup": {"unit": "web.service"}}}}},
     "released": [{"address": "10.101.0.32/28", "owner": "onprem-9", "at": "2026-01-02T03:04:05Z"}],
     "forgotten": {"onprem-8": {"at": "2026-01-02T03:04:05Z", "by": "alice"}}, "crl": "<PEM>",
     "departed": ["onprem-9"],
     "kubernetes": {"pod_ranges": ["10.244.0.0/16"], "service_range": "10.96.0.0/16",
                    "api_server": "https://198.18.1.11:6443", "identity_labels": ["!job-name"]},
     "last_applied": {"hash": "<sha256 of the model>", "when": "2026-01-02T03:04:05Z", "by": "alice"}}

`closed` are sites to which nobody outside opens anything, if there are some; a host then may have `"public_keys":
{"51871": "<base64>"}`, of WireGuard by UDP port, for those that need them before any etcd tells them.
`bfd`, `masquerade` and `gateways` are what was applied, so that a plan can tell what a change of them interrupts.
`encryption` and `routing` say the stage of each pair of sites, if any is not in the clear through the tunnel
(encryption.py); `auto` of pairs that choose their way and came back to the tunnel the two hosts between which native
packets did not come through: {"cloud onprem": ["cloud-1", "onprem-2"]}. `empty` are the sites without hosts that hosts
know all the same, if there are some.

A cluster that was removed keeps its document as a tombstone: `"state": "absent"`, no hosts, so that an old
copy on a member that was away cannot bring it back. `released` addresses, also of a cluster that is absent, are
not dealt again for 30 days, but to the hosts of such a cluster if it is put back.
`forgotten` names hosts, also of a cluster that is absent, that were lost and take no part until they are
joined anew; `crl` is the CA's list of revoked certificates (RFC 5280, PEM). `kubernetes` is the Kubernetes
cluster that a cluster is; a host that is a node of it has `"kubernetes_node": "<its name>"`, and where it was
native in clear `"pod_cidrs": ["10.244.1.0/24"]`, which the network has to lead to it. `departed` are
removed hosts, of any cluster, that carried an etcd member and whose certificates this cluster's CA has
still to revoke. A document may lack all four; `identity_labels` lacks where Cilium's default filter alone counts.
A cluster whose control plane is in it has `"control_plane": "in_cluster"`, no hosts (its nodes are dealt with by
its registrar), no members but `"replicas"` under `etcd`,
an empty `ca_host`, and once its etcd was exposed `"exposed": {"endpoints": ["https://198.18.6.200:2379"],
"cluster_ip": "10.98.0.7", "addresses": ["198.18.6.200"], "names": [], "nodes": []}`: where peers and where
its own pods dial it, what else its certificate names, nodes that were chosen for it. `ca_certificate` is a
public PEM, added by `site` once the CA exists, without a new revision; the planner keeps it. While the
authority is being replaced it holds two certificates, the one that signs first, and each change of them is
a new revision. Otherwise `revision` rises by one with each change of a document. The roster's `version` is
that of the isthmus.mesh that was applied last; records of before it lack it.

A cluster's document is authoritative in its own etcd; what others hold is a copy.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from ipaddress import IPv4Network
from typing import Any

from . import jsontext, versions
from .encryption import KEY_STAGES, STAGED, STAGES
from .jsontext import UINT64, Fields
from .wire import public_key_problem

SCHEMA = 1
LARGEST_DOCUMENT = 1280 * 1024
"""Bytes of a document as it is written. etcd takes 1.5 MiB in a request (--max-request-bytes); the rest is for the key
and the CA's certificate, and so that what is close to the limit can still be changed into what is not."""
QUARANTINE = timedelta(days=30)
DEEPEST = 16
"""Objects and lists inside each other in a document; those that the planner writes have 5."""
_PEM = re.compile(r"-----BEGIN.*?-----END", re.DOTALL)
ROSTER = "roster"
CLUSTERS = "clusters/"


class RecordError(ValueError):
    """A record that must not be built on; the text says what, where and what to do next."""


@dataclass(frozen=True)
class Record:
    """`roster` None: nothing was ever applied. The documents are plain JSON objects and are not changed in place.

    `conflicts` names documents of which two different copies have the highest revision: the next plan gives them a
    higher one, whether they change or not, so that one of them can be written everywhere."""

    roster: Mapping[str, Any] | None = None
    clusters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    conflicts: frozenset[str] = frozenset()

    def to_documents(self) -> dict[str, Any]:
        """Document name -> document, as it is written under `isthmus/v1/estate/` and to `estate.json`."""
        documents: dict[str, Any] = {} if self.roster is None else {ROSTER: copy.deepcopy(dict(self.roster))}
        for name in sorted(self.clusters):
            documents[CLUSTERS + name] = copy.deepcopy(dict(self.clusters[name]))
        return documents


def merge(copies: Iterable[Any]) -> Record:
    """One record from what several members and hosts hold.

    Each copy is `{"cluster": <whose etcd it was read from, or null>, "documents": {name: document}}`
    or the documents alone. Of each document the highest revision counts; of two different ones with
    the same revision that of the cluster's own etcd, and a warning says so. `ca_certificate` is added
    to a document without a new revision: a copy that has it completes one that lacks it, also an older
    copy of the same etcd, because whether a cluster was ever formed is read from it. RecordError for a
    document that is malformed or of a newer schema, and for one that was read from another cluster's etcd
    and moves what the cluster's own etcd knows as dealt: no plan does that, so somebody else wrote it.
    """
    found: dict[str, list[tuple[tuple[int, bool, bool, str], Mapping[str, Any]]]] = {}
    holders: dict[int, str] = {}  # of the documents in `found`, by their id
    for number, given in enumerate(copies):
        where = f"record {number + 1}"
        outer = Fields(given, RecordError, where)
        holder = outer.optional_text("cluster") if "documents" in outer.value else None
        documents = outer.mapping("documents") if "documents" in outer.value else outer.value
        for name, document in documents.items():
            place = f"{where} ({name})"
            words = newer_schema(place, document, documents.get(ROSTER))
            if words:
                raise RecordError(words)
            revision = _check(place, name, document)
            own = holder is not None and name == CLUSTERS + holder
            if holder is not None:
                holders[id(document)] = holder
            signed = document.get("ca_certificate") is not None
            found.setdefault(name, []).append(((revision, own, signed, jsontext.canonical(document)), document))
    chosen: dict[str, Mapping[str, Any]] = {}
    warnings: list[str] = []
    conflicts: set[str] = set()
    for name, ranked in found.items():
        (revision, *_rest), document = max(ranked, key=lambda entry: entry[0])
        latest = [other for rank, other in sorted(ranked, key=lambda entry: entry[0]) if rank[0] == revision]
        vanished: set[str] = set()
        for (_revision, is_own, *_more), copied in ranked:
            moved = _moved(copied, document) if is_own else ""
            if moved:
                raise RecordError(_forged(name, holders.get(id(document), ""), copied, document, moved))
            vanished.update(_vanished(copied, document) if is_own else ())
        if vanished:
            warnings.append(
                f"estate record {name}: the cluster's own etcd has {', '.join(sorted(vanished))}, which the newer copy "
                f"that counts (revision {revision}) has neither as a part of the cluster nor as removed in the last 30 "
                "days. Runs of which one could not ask that etcd and one could not write elsewhere cause this. Next: "
                "put those that are to stay into the inventory, where site deals them other ranges, and take the mesh "
                "off the others with isthmus.mesh.teardown"
            )
        if any(_without_authority(other) != _without_authority(document) for other in latest):
            conflicts.add(name)
            warnings.append(
                f"estate record {name}: two different documents have revision {revision}; the one from the cluster's "
                "own etcd counts, else one chosen by content. Two runs at the same time can cause this: compare "
                "`isthmus/v1/estate/` of the clusters"
            )
        authorities = [other["ca_certificate"] for other in latest if other.get("ca_certificate") is not None]
        if len(set(authorities)) > 1:
            warnings.append(
                f"estate record {name}: copies of revision {revision} hold different CA certificates; compare them "
                "with /etc/isthmus/pki/ca.crt on the cluster's CA host"
            )
        chosen[name] = _with_authority(document, [other for _rank, other in sorted(ranked, key=lambda entry: entry[0])])
    clusters = {
        name[len(CLUSTERS) :]: document for name, document in sorted(chosen.items()) if name.startswith(CLUSTERS)
    }
    roster = chosen.get(ROSTER)
    if roster is not None:
        missing = sorted(set(roster["clusters"]) - set(clusters))
        if missing:
            documents_missing = ", ".join(CLUSTERS + name for name in missing)
            raise RecordError(
                f"estate record: the roster names {', '.join(missing)}, but no copy of {documents_missing} was found. "
                "Without it addresses would be dealt twice. Next: make a member of that cluster, "
                "or a host with /etc/isthmus/estate.json, reachable and run again"
            )
    return Record(roster, clusters, tuple(sorted(warnings)), frozenset(conflicts))


def _is_same(own: Mapping[str, Any], newer: Mapping[str, Any]) -> bool:
    """Whether the cluster was not removed or begun anew between the two."""
    return "absent" not in (own["state"], newer["state"]) and own["etcd"]["token"] == newer["etcd"]["token"]


def _vanished(own: Mapping[str, Any], newer: Mapping[str, Any]) -> set[str]:
    """Hosts of `own` that `newer` lacks and of which it does not know that they went."""
    if not _is_same(own, newer):
        return set()
    released = {entry.get("owner") for entry in newer["released"]}
    return set(own["hosts"]).difference(newer["hosts"], released, newer.get("forgotten", ()))


def _moved(own: Mapping[str, Any], newer: Mapping[str, Any]) -> str:
    """What `newer` gives otherwise than `own`, of what never changes once it was dealt; empty: nothing."""
    if not _is_same(own, newer):
        return ""
    if own["id"] != newer["id"]:
        return f"id {own['id']} would be {newer['id']}"
    before, after = (set(_PEM.findall(one.get("ca_certificate") or "")) for one in (own, newer))
    if before and after and before.isdisjoint(after):  # while an authority is replaced both stand there
        return "its CA's certificate would be another"
    for host, entry in own["hosts"].items():
        other = newer["hosts"].get(host)
        if other is None:
            continue
        if not IPv4Network(entry["range4"]).subnet_of(IPv4Network(other["range4"])):
            return f"{entry['range4']}, the range of host {host}, would be {other['range4']}"
        if entry["mesh4"] != other["mesh4"]:
            return f"{entry['mesh4']}, the address of host {host}, would be {other['mesh4']}"
        for key, workload in entry["workloads"].items():
            there = other["workloads"].get(key)
            if there is not None and there["address4"] != workload["address4"]:
                return f"{workload['address4']}, the address of workload {key} on {host}, would be {there['address4']}"
    return ""


def _forged(name: str, holder: str, own: Mapping[str, Any], newer: Mapping[str, Any], moved: str) -> str:
    cluster = name[len(CLUSTERS) :]
    return (
        f"estate record {name}: the copy in the etcd of cluster {holder} (revision {newer['revision']}) contradicts "
        f"that in {cluster}'s own (revision {own['revision']}): {moved}. What was dealt never moves, so no run of site "
        f"wrote both: one of the two was tampered with. Next: compare `isthmus/v1/estate/{name}` in both with "
        f"/etc/isthmus/estate.json on hosts; -e isthmus_distrust={holder} plans without what that etcd says and writes "
        f"nothing there, also for removing that cluster with isthmus_prune. (If {cluster}'s etcd was restored from a "
        "backup of before that host was removed and joined again, delete the key there.)"
    )


def _with_authority(document: Mapping[str, Any], copies: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The document with the newest CA certificate that a copy of the same etcd (by its token) has."""
    if document.get("ca_certificate") is not None or document.get("state") != "present":
        return document
    known = [
        other["ca_certificate"]
        for other in copies
        if other["state"] == "present"
        and other.get("ca_certificate") is not None
        and other["etcd"]["token"] == document["etcd"]["token"]
    ]
    return {**document, "ca_certificate": known[-1]} if known else document


def _without_authority(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "ca_certificate"}


def forgotten_hosts(documents: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Hosts that clusters' documents call forgotten, by name: `cluster`, `at`, `by`."""
    return {
        host: {"cluster": document["name"], **entry}
        for document in documents
        for host, entry in document.get("forgotten", {}).items()
    }


def pod_ranges(document: Mapping[str, Any]) -> list[str]:
    """Ranges of pods in the document of a cluster; none where it is no Kubernetes cluster."""
    return list(document.get("kubernetes", {"pod_ranges": ()})["pod_ranges"])


def cluster_ips(document: Mapping[str, Any]) -> list[str]:
    """The range of Kubernetes' ClusterIPs in the document of a cluster, if it is a Kubernetes cluster."""
    return [document["kubernetes"]["service_range"]] if "kubernetes" in document else []


def newer_schema(where: str, document: Any, roster: Any = None) -> str:
    """Why a document must be neither built on nor replaced: a newer isthmus.mesh wrote it. Empty when it may be.

    `roster`, when it was read with the document, names the version to use.
    """
    schema = document.get("schema") if isinstance(document, Mapping) else None
    if not isinstance(schema, int) or schema <= SCHEMA:
        return ""
    version = roster.get("version") if isinstance(roster, Mapping) else None
    command = versions.install(str(version)) if versions.valid(version) else versions.LATEST
    return (
        f"{where}: its schema {schema} is newer than {SCHEMA}, the newest that is known here; a newer isthmus.mesh has "
        f"been used on this estate. Next: {command} on the controller, and run the playbook again"
    )


def _check(where: str, name: str, document: Any) -> int:
    """The revision of a document that has everything that the planner and the registrar read by name."""
    fields = Fields(document, RecordError, where)
    _refuse_deep(where, document, DEEPEST)
    schema = fields.integer("schema", UINT64, default=None)
    if schema < 1:
        fields.fail("schema", "is not a known schema")
    revision = fields.integer("revision", UINT64, default=None)
    if name == ROSTER:
        fields.text("estate", None)
        version = fields.optional_text("version")
        if version is not None and not versions.valid(version):
            fields.fail("version", "is not a version such as 1.2.3")
        for _cluster, entry in _entries(fields, "clusters"):
            entry.integer("id", 511, default=None, minimum=1)
            entry.text("state", None)
        for _service, entry in _entries(fields, "services"):
            _there(entry, "clusters")
            entry.texts("clusters")
            entry.text("state", None)
        for key in STAGED:
            if key not in fields.value:
                continue
            stages = fields.object(key)
            _there(stages, "pairs")
            for stage in (stages.text("all", None), *stages.text_mapping("pairs").values()):
                if stage not in STAGES:
                    fields.fail(key, f"has a stage that is not one of {', '.join(STAGES)}")
            if key == "encryption" and "keys" in stages.value:
                keys = stages.object("keys")
                keys.integer("number", 1, default=None)
                if keys.optional_text("stage") not in (None, *KEY_STAGES):
                    keys.fail("stage", f"is not one of {', '.join(KEY_STAGES)}")
        for pair, hosts in fields.mapping("auto").items():
            if len(pair.split(" ")) != 2 or not isinstance(hosts, list) or [type(host) for host in hosts] != [str, str]:
                fields.fail("auto", "is not two hosts for two sites")
        if "vpcs" in fields.value:
            _check_vpcs(fields.object("vpcs"))
        for key in ("bgp", "bfd", "closed", "masquerade", "empty"):
            fields.texts(key)
        for _site, own in _entries(fields, "gateways") if "gateways" in fields.value else ():
            _there(own, "gateways", "networks")
            own.texts("gateways")
            own.texts("networks")
        return revision
    if not name.startswith(CLUSTERS) or fields.text("name", None) != name[len(CLUSTERS) :]:
        raise RecordError(f"{where}: the document is not the one that its name says")
    fields.integer("id", 511, default=None, minimum=1)
    fields.optional_text("ca_certificate")
    fields.optional_text("crl")
    for _host, entry in _entries(fields, "forgotten") if "forgotten" in fields.value else ():
        entry.text("by", None)
        parse_time(entry.text("at", None), entry.path("at"))
    fields.texts("departed")
    for released in fields.objects("released"):
        released.network4("address")
        released.text("owner")
        parse_time(released.text("at", None), released.path("at"))
    state = fields.text("state", None)
    if state == "absent":
        return revision
    if state != "present":
        fields.fail("state", "is not present or absent")
    if "kubernetes" in fields.value:
        outer = fields.object("kubernetes")
        _there(outer, "pod_ranges")
        outer.networks4("pod_ranges")
        outer.network4("service_range")
        outer.text("api_server", None)
        outer.texts("identity_labels")
    _there(fields, "workload_ranges", "released")
    fields.text("site", None)
    fields.networks4("workload_ranges")
    fields.network4("service_range")
    fields.text("ca_host", None)
    hosts = dict(_entries(fields, "hosts"))
    for entry in hosts.values():
        _check_host(entry)
    etcd = fields.object("etcd")
    _there(etcd, "members")
    for text in ("initial", "token"):
        etcd.text(text, None)
    for member in etcd.texts("members"):
        if member not in hosts:
            etcd.fail("members", "names a host that the document lacks")
    for port in ("client_port", "peer_port"):
        etcd.integer(port, 65535, default=None, minimum=1)
    etcd.integer("quota_bytes", UINT64, default=None, minimum=1)
    etcd.object("source").text("type", None)
    etcd.text_mapping("source")
    if fields.value.get("control_plane") == "in_cluster":
        etcd.integer("replicas", 7, default=None, minimum=1)
    if "exposed" in fields.value:
        exposed = fields.object("exposed")
        _there(exposed, "endpoints", "addresses", "names")
        for name in ("endpoints", "addresses", "names"):
            exposed.texts(name)
        exposed.address4("cluster_ip")
    return revision


def _check_vpcs(vpcs: Fields) -> None:
    _there(vpcs, "peerings")
    sites = dict(_entries(vpcs, "sites"))
    for site, place in sites.items():
        vpcs.object("sites").text_mapping(site)
        place.text("provider", None)
        place.text("network", None)
    for name in vpcs.texts("peerings"):
        if len(name.split(" ")) != 2 or not set(name.split(" ")) <= set(sites):
            vpcs.fail("peerings", "names what are not two sites with a VPC")


def _check_host(entry: Fields) -> None:
    _there(entry, "labels")
    entry.network4("range4")
    entry.text("site", None)
    entry.optional_text("kubernetes_node")
    entry.networks4("pod_cidrs")
    entry.text_mapping("labels")
    for address in ("mesh4", "underlay4", "advertise4"):
        entry.address4(address)
    for port, key in entry.text_mapping("public_keys").items():
        problem = public_key_problem(key)
        if problem:
            entry.fail(f"public_keys.{port}", problem)
    for key, workload in _entries(entry, "workloads"):
        if key.count("/") != 1:
            entry.fail(f"workloads.{key}", "is not <namespace>/<name>")
        _there(workload, "labels")
        workload.address4("address4")
        workload.text("service_account", None)
        workload.text_mapping("labels")
        if len(workload.text_mapping("cgroup")) != 1:
            workload.fail("cgroup", "is not one of unit, slice, path")


def _there(fields: Fields, *names: str) -> None:
    for name in names:
        if fields.value.get(name) is None:
            fields.fail(name, "is missing")


def _entries(fields: Fields, name: str) -> list[tuple[str, Fields]]:
    """The objects in an object of objects, by their names; the outer one must be there."""
    _there(fields, name)
    return [
        (key, Fields(value, RecordError, fields.path(f"{name}.{key}"))) for key, value in fields.mapping(name).items()
    ]


def _refuse_deep(where: str, value: Any, left: int) -> None:
    """Deep documents end in a RecursionError in whoever copies, compares or writes them."""
    if isinstance(value, (dict, list)):
        if not left:
            raise RecordError(f"{where}: the document is nested too deeply")
        for inner in value.values() if isinstance(value, dict) else value:
            _refuse_deep(where, inner, left - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where}: the document has a number that JSON cannot say")


def parse_time(text: str, where: str = "time") -> datetime:
    """RFC 3339 in UTC, as `format_time` writes it. RecordError otherwise."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError as exc:
        raise RecordError(f"{where} is not a time like 2026-01-02T03:04:05Z") from exc


def format_time(when: datetime) -> str:
    return when.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
