# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Which certificates a cluster whose control plane is in it is to have, and which it is to sign."""

from __future__ import annotations

DOCUMENTATION = r"""
---
name: in_cluster_wanted
short_description: What is wanted of the PKI of a cluster whose control plane is in it
version_added: 1.0.0
author:
  - Isthmus contributors (@isthmus-mesh)
description:
  - Makes the document of which C(isthmus-pki) makes and signs certificates inside the cluster, for
    M(isthmus.mesh.kubernetes_install).
  - What the cluster has answered before is asked for again, so that a run that has nothing new asks for the same.
options:
  _input:
    description: What the plan says of the cluster.
    type: dict
    required: true
  exposed:
    description: Where peers reach its etcd.
    type: dict
    required: true
  record:
    description:
      - The estate record as it is to be. What was signed for hosts that are no part of it any more is not signed anew.
    type: dict
    required: true
  members:
    description:
      - Variables of all hosts of the inventory, of which those that the role pki registered are looked at, and those in
        which answers of other clusters with C(control_plane=in_cluster) are kept.
    type: list
    elements: dict
    required: true
  issued:
    description: What the cluster's PKI has answered before; empty when it has not.
    type: dict
    default: {}
  signed:
    description:
      - Answers of other clusters' authorities to the requests in O(issued), as M(isthmus.mesh.pki_sign) gives them.
    type: list
    elements: dict
    default: []
"""

EXAMPLES = r"""
- name: Show what is wanted
  ansible.builtin.debug:
    msg: >-
      {{ isthmus_install | isthmus.mesh.in_cluster_wanted(
           exposed=isthmus_exposed, record=isthmus_plan.record, members=groups['all'] | map('extract', hostvars)) }}
"""

RETURN = r"""
_value:
  description: The document. It has nothing secret.
  type: dict
"""

from ansible_collections.isthmus.mesh.plugins.module_utils import in_cluster


def in_cluster_wanted(install, exposed, record, members, issued=None, signed=()):
    """The document; see above."""
    issued = issued or {}
    cluster = install["cluster"]
    others = _others(cluster, members)
    names = [*in_cluster.server_names(install["etcd"]["replicas"]), "localhost", *exposed["names"]]
    addresses = ["127.0.0.1", exposed["cluster_ip"], *exposed["addresses"]]
    certificates = dict(issued.get("certificates", {}))
    for name, (_entry, answer) in others.items():
        for one in answer.get("signed", ()):
            if one["cluster"] == cluster:
                certificates[name] = one["certificate"]
    for answer in signed:
        for one in answer.get("certificates", ()):
            certificates[answer["cluster"]] = one["certificate"]
    authorities = {**_authorities(members, others), **install["trust"]}
    peers = [peer["name"] for peer in install["document"]["registrar"]["peers"]]
    return {
        "schema": 1,
        "cluster": cluster,
        "dns": list(dict.fromkeys(names)),
        "ip": list(dict.fromkeys(addresses)),
        "peers": {name: authorities[name] for name in peers if name in authorities},
        "certificates": {name: pem for name, pem in sorted(certificates.items()) if pem and name in peers},
        "requests": _requests(cluster, record, members, issued, others),
        # The record has it when etcd has run; the cluster's own answer is the same.
        "known_ca": install["trust"].get(cluster) or issued.get("ca"),
        "labels": in_cluster.labels(install, "pki"),
        **({"revoked": install["revoked"]} if "revoked" in install else {}),
    }


def _others(cluster, members):
    """Other clusters of the kind: by name the host that stands for each, and what its PKI has answered in this run."""
    return {
        str(variables["isthmus_cluster"]): (str(variables["inventory_hostname"]), variables["__site_issued"])
        for variables in members
        if variables.get("__site_issued") and str(variables["isthmus_cluster"]) != cluster
    }


def _authorities(members, others):
    """Those that signed in this run, which the record may not have yet."""
    found = {name: answer["ca"] for name, (_entry, answer) in others.items() if "ca" in answer}
    for variables in members:
        for answer in (variables.get("__pki_signed") or {}).get("results") or ():
            if answer.get("cluster") and answer.get("ca_certificate"):
                found[answer["cluster"]] = answer["ca_certificate"]
    return found


def _requests(cluster, record, members, issued, others):
    """Of registrars that want to read this etcd: what they ask for now, else what they were given."""
    found = {
        (one["cluster"], one["host"]): {"cluster": one["cluster"], "host": one["host"], "csr": one["csr"]}
        for one in issued.get("signed", ())
        if _is_there(record.get(f"clusters/{one['cluster']}"), one["host"])
    }
    for variables in members:
        for group in (variables.get("__pki_requested") or {}).get("pending") or ():
            for request in group["requests"] if group["ca_cluster"] == cluster else ():
                if request["csr"]:
                    place = (str(variables["isthmus_cluster"]), str(variables["inventory_hostname"]))
                    found[place] = {"cluster": place[0], "host": place[1], "csr": str(request["csr"])}
    for name, (entry, answer) in others.items():
        if cluster in answer.get("requests", {}):
            csr = answer["requests"][cluster]["csr"]
            found[name, entry] = {"cluster": name, "host": entry, "csr": csr}
    return [found[place] for place in sorted(found)]


def _is_there(document, host):
    """Whether a host is one of a cluster's, or stands for one whose control plane is in it."""
    if document is None or document["state"] == "absent":
        return False
    return host in document["hosts"] or document.get("control_plane") == "in_cluster"


class FilterModule:
    """The filter, by its name."""

    def filters(self):
        return {"in_cluster_wanted": in_cluster_wanted}
