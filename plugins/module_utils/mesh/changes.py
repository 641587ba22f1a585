# SPDX-License-Identifier: BSD-2-Clause
"""What an estate record has, and what a plan changes in it, in words for people. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from . import encryption, ipsec, openings, routing, vpc
from .encryption import Keys, Stage
from .endpoints import peer_urls
from .record import Record
from .stages import sites_of


def summary(record: Record) -> str:
    return "".join(f"{name}: {words}\n" for name, words in sorted(_lines(record).items()))


def changes(before: Record, after: Record) -> Iterator[str]:
    old, new = _lines(before), _lines(after)
    for name in sorted(set(old) | set(new)):
        if name not in old:
            yield f"{name}: new, {new[name]}"
        elif name not in new:
            yield f"{name}: removed (was {old[name]})"
            if name.startswith("masquerade of"):
                yield f"{name}: connections from workloads' addresses to the outside end"
        elif old[name] != new[name]:
            yield f"{name}: {new[name]} (was {old[name]})"
            members = after.clusters.get(name.rpartition(" ")[2], {}).get("etcd", {}).get("members", ())
            if name.startswith("etcd of") and len(members) == 1:
                yield f"{name}: its only member restarts, so that nothing can be written to it for some seconds"
            site = name.rpartition(" ")[2]
            if name.startswith("BGP of"):
                yield f"{name}: FRR is restarted once on its hosts, {_RESTARTED[new[name].endswith(_BFD)]}"
            if name == f"gateways of site {site}" and _made_anew(before, after, site):
                yield (
                    f"{name}: nothing passes its tunnels from when the first gateway at the ends of each has the "
                    "change until the second one has it"
                )


_BFD = ", with BFD"
_RESTARTED = {
    True: "and routers keep the hosts' ranges meanwhile",
    False: "of which BFD tells routers: they have the hosts' ranges again after some 6 s",
}


def _made_anew(before: Record, after: Record, site: str) -> bool:
    """Whether a site's tunnels are: a second gateway comes and goes without that."""
    old, new = ((record.roster or {})["gateways"][site] for record in (before, after))
    return bool(old["networks"] != new["networks"] or old["gateways"][:1] != new["gateways"][:1])


def _lines(record: Record) -> dict[str, str]:
    """Each thing in the record, by its name, in words."""
    found: dict[str, str] = {}
    for name, doc in sorted(record.clusters.items()):
        for host, entry in sorted(doc.get("forgotten", {}).items()):
            found[f"forgotten host {host}"] = f"of cluster {name}, at {entry['at']} by {entry['by'] or 'somebody'}"
        if doc["state"] == "absent":
            continue
        if "crl" in doc:
            digest = sha256(doc["crl"].encode()).hexdigest()
            found[f"revoked certificates of cluster {name}"] = f"list with sha256 {digest[:12]}"
        etcd = doc["etcd"]
        source = etcd["source"]["type"]
        found[f"cluster {name}"] = (
            f"id {doc['id']}, site {doc['site']}, workloads {', '.join(doc['workload_ranges'])}, "
            f"services {doc['service_range']}, CA " + (f"on {doc['ca_host']}" if doc["ca_host"] else "in the cluster")
        )
        found[f"etcd of cluster {name}"] = (
            f"members {', '.join(etcd['members'])}, ports {etcd['client_port']} and {etcd['peer_port']}, "
            f"from {source}, quota {etcd['quota_bytes']} bytes"
        )
        if openings.is_in_cluster(doc):
            found[f"etcd of cluster {name}"] = (
                f"{etcd['replicas']} members in the cluster, for peers at "
                f"{', '.join(peer_urls(doc)) or 'an address that is not known yet'}, quota {etcd['quota_bytes']} bytes"
            )
        if "kubernetes" in doc:
            outer = doc["kubernetes"]
            found[f"Kubernetes of cluster {name}"] = (
                f"API {outer['api_server']}, pods {', '.join(outer['pod_ranges'])}, ClusterIPs {outer['service_range']}"
            )
        for host, entry in sorted(doc["hosts"].items()):
            labels = "".join(f", {key}={value}" for key, value in sorted(entry["labels"].items()))
            node = f", Kubernetes node {entry['kubernetes_node']}" if "kubernetes_node" in entry else ""
            node += f" with pods in {', '.join(entry['pod_cidrs'])}" if "pod_cidrs" in entry else ""
            advertise = "" if entry["advertise4"] == entry["underlay4"] else f", dialled at {entry['advertise4']}"
            known = "".join(f", {key} on UDP {port}" for port, key in sorted(entry.get("public_keys", {}).items()))
            found[f"host {host}"] = (
                f"cluster {name}, site {entry['site']}, underlay {entry['underlay4']}{advertise}, "
                f"range {entry['range4']}, mesh address {entry['mesh4']}{node}{labels}{known}"
            )
            for key, workload in sorted(entry["workloads"].items()):
                kind, target = next(iter(workload["cgroup"].items()))
                labels = "".join(f", {label}={value}" for label, value in sorted(workload["labels"].items()))
                found[f"workload {key} on {host}"] = (
                    f"{workload['address4']}, {kind} {target}, service account {workload['service_account']}{labels}"
                )
    if record.roster is not None:
        roster = record.roster
        found["estate"] = (
            f"{roster['estate']}, domain {roster.get('domain')}, overlay port {roster.get('overlay_port')}, "
            f"applied by isthmus.mesh {roster.get('version', 'of an unknown version')}"
        )
        for key, entry in sorted(roster["services"].items()):
            if entry["state"] != "absent":
                found[f"service {key}"] = "in " + ", ".join(entry["clusters"])
        sites = sites_of({name: doc for name, doc in record.clusters.items() if "hosts" in doc})
        for key, words in zip(encryption.STAGED, (encryption.WORDS, routing.WORDS, ipsec.WORDS)):
            for (one, other), stage in encryption.from_document(roster.get(key), sites).items():
                if stage is not Stage.PLAIN:
                    found[f"{key} {_where(one, other)}"] = words[stage]
        for name, (host, far) in roster.get("auto", {}).items():
            found[f"native routing {_where(*name.split(' '))}"] = f"not chosen, {host} did not reach {far} so"
        keys = encryption.keys_of(roster.get("encryption"))
        if keys != Keys():
            found["keys of WireGuard"] = encryption.key_words(keys)
        found.update(vpc.recorded(roster.get("vpcs")))
        found.update({f"site {site}": "its hosts open all sessions themselves" for site in roster.get("closed", ())})
        for site in roster.get("bgp", ()):
            with_bfd = _BFD if site in roster.get("bfd", ()) else ""
            found[f"BGP of site {site}"] = f"hosts announce their ranges{with_bfd}"
        for site in roster.get("masquerade", ()):
            found[f"masquerade of site {site}"] = "packets of workloads to the outside get their host's address"
        for site, own in roster.get("gateways", {}).items():
            found[f"gateways of site {site}"] = f"{', '.join(own['gateways'])}, for {', '.join(own['networks'])}"
    return found


def _where(one: str, other: str) -> str:
    return f"within site {one}" if one == other else f"between sites {one} and {other}"
