# SPDX-License-Identifier: BSD-2-Clause
"""The spec of one host (spec.py), out of the next record. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import encryption, ipsec, openings, spec
from .cluster_spec import PKI, ClusterSpec, etcd_clients
from .encryption import Pair, Stage
from .endpoints import announced, dialled
from .jsontext import filled
from .model import Model
from .stages import State, sites_of


class HostSpec:
    """The spec of one host, out of the next record: so that it knows orphans too."""

    def __init__(
        self,
        model: Model,
        present: Mapping[str, Any],
        name: str,
        own: Mapping[str, Any],
        state: State,
    ) -> None:
        self.model = model
        self.present = present
        self.name = name
        self.own = own
        self.state = state
        self.shared = ClusterSpec(model, present, own)
        self.host = own["hosts"][name]
        self.member = name in own["etcd"]["members"]
        site = self.host["site"]
        self.ipsec = ipsec.section(model.ipsec, name, site, self.mine(state.gateways), self.sites(), PKI)

    def build(self) -> dict[str, Any]:
        own, shared = self.own, self.shared.build(self.host.get("kubernetes_node") is not None)
        document: dict[str, Any] = {
            "schema": shared["schema"],
            "estate": shared["estate"],
            "host": self.name,
            "cluster": shared["cluster"],
            "node": {
                "name": self.name,
                **{key: self.host[key] for key in ("underlay4", "advertise4", "range4", "mesh4", "labels")},
                **filled(
                    kubernetes_node=self.host.get("kubernetes_node"),
                    masquerade=self.host["site"] in self.model.masquerade,
                    site=self.host["site"] if self.host["site"] != own["site"] else None,
                ),
            },
            "workloads": [self.workload(key, entry) for key, entry in self.host["workloads"].items()],
            **{key: shared[key] for key in ("overlay", "dns", "service_ranges4", "mesh_ranges4")},
            "etcd": etcd_clients(own, self.endpoints()),
            "member": self.etcd_member() if self.member else None,
            "registrar": self.shared.registrar(self.api(), self.host["site"]) if self.member else None,
            "pki": {
                "ca": {"cluster": own["name"], "host": own["ca_host"], "here": own["ca_host"] == self.name},
                "certificates": list(self.certificates()),
                "trust": list(dict.fromkeys(self.trust())),
            },
            **filled(wireguard=self.wireguard(), native=self.native(), ipsec=self.ipsec),
        }
        document["hash"] = spec.spec_hash(document)
        return document

    def trust(self) -> Iterator[str]:
        yield self.own["name"]
        yield from self.shared.peers() if self.member else ()
        yield from ipsec.trusted_by(self.ipsec)

    def wireguard(self) -> dict[str, Any] | None:
        """None where the host has no other to encrypt with."""
        mine = self.mine(self.state.encryption)
        if not any(mine.get(site) for site in sites_of(self.present)):
            return None
        changing = {site: stage.word for site, stage in sorted(mine.items()) if stage.word in encryption.CHANGING}
        return {
            **_tunnel(self.state.keys.sends),
            **filled(second=_tunnel(1 - self.state.keys.sends) if self.state.keys.has_both else None),
            "plain_sites": sorted(site for site, stage in mine.items() if stage is Stage.PLAIN),
            "sites": self.sites(),
            **filled(changing=changing, **self.sessions(mine)),
        }

    def sessions(self, stages: Mapping[str, Stage]) -> dict[str, Any]:
        """With hosts of which sites only one side can open sessions, and what hosts need for the first of them."""
        here, closed = self.host["site"], self.model.closed
        inside = here in closed
        far = sorted(site for site, stage in stages.items() if stage and site != here and (inside or site in closed))
        peers = [
            self.bootstrap_peer(document, name, entry)
            for _cluster, document in sorted(self.present.items())
            for name, entry in sorted(document["hosts"].items())
            if entry["site"] in far and (name in document["etcd"]["members"] if inside else self.member)
        ]
        return {
            "opens": far if inside else [],
            "opened_by": [] if inside else far,
            "bootstrap": [peer for peer in peers if peer["keys"]],
        }

    def bootstrap_peer(self, document: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        ports = {str(port) for port in openings.wireguard_ports([self.state.keys])}
        return {
            "cluster": document["name"],
            "id": document["id"],
            "name": name,
            **{key: entry[key] for key in ("site", "underlay4", "advertise4", "range4", "mesh4")},
            "keys": {port: key for port, key in entry.get("public_keys", {}).items() if port in ports},
        }

    def native(self) -> dict[str, Any] | None:
        """None where the tunnel leads from the host to all others."""
        mine = self.mine(self.state.native)
        if not any(mine.get(site) for site in sites_of(self.present)):
            return None
        return {"sites": self.sites(), "stages": {site: stage.word for site, stage in sorted(mine.items()) if stage}}

    def mine(self, stages: Mapping[Pair, Stage]) -> dict[str, Stage]:
        """Of the host's site with each other, and with itself."""
        here = self.host["site"]
        return {
            other: stage
            for pair, stage in stages.items()
            if here in pair
            for other in (pair[1] if pair[0] == here else pair[0],)
        }

    def sites(self) -> dict[str, str]:
        return {name: doc["site"] for name, doc in sorted(self.present.items())}

    def api(self) -> dict[str, str] | None:
        """How the registrar reaches its Kubernetes."""
        if "kubernetes" not in self.own:
            return None
        files = {key: f"{PKI}/kubernetes.{end}" for key, end in (("ca", "ca"), ("cert", "crt"), ("key", "key"))}
        return {"server": self.own["kubernetes"]["api_server"], **files}

    def workload(self, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        namespace, _slash, name = key.partition("/")
        return {
            "name": name,
            "namespace": namespace,
            "service_account": entry["service_account"],
            "labels": dict(entry["labels"]),
            "address4": entry["address4"],
            "cgroup": dict(entry["cgroup"]),
        }

    def endpoints(self) -> list[str]:
        """Of the own cluster: its own member first, then those of its own site."""
        hosts, port = self.own["hosts"], self.own["etcd"]["client_port"]

        def rank(member: str) -> tuple[bool, bool, str]:
            return member != self.name, hosts[member]["site"] != self.host["site"], member

        found = []
        for member in sorted(self.own["etcd"]["members"], key=rank):
            key = dialled(hosts[member], self.host["site"], self.model.closed)
            found.append(f"https://{hosts[member][key]}:{port}")
        return found

    def member_urls(self, port: int) -> dict[str, str]:
        found = announced(self.own["hosts"], self.own["etcd"]["members"])
        return {member: f"https://{address}:{port}" for member, address in found.items()}

    def etcd_member(self) -> dict[str, Any]:
        etcd = self.own["etcd"]
        members, clients = self.member_urls(etcd["peer_port"]), self.member_urls(etcd["client_port"])
        return {
            "name": self.name,
            "client_url": clients[self.name],
            "peer_url": members[self.name],
            "members": members,
            "client_urls": clients,
            "initial": etcd["initial"],
            "token": etcd["token"],
            "source": dict(etcd["source"]),
            "quota_bytes": etcd["quota_bytes"],
        }

    def certificates(self) -> Iterator[dict[str, Any]]:
        yield self.certificate("agent", f"isthmus-agent-{self.name}")
        identity = ipsec.certificate_of(self.ipsec)
        if identity is not None:
            entry = self.certificate("ipsec", identity)
            yield {**entry, "sans_dns": [identity], "usages": ["server", "client"]}
        if not self.member:
            return
        addresses = list(dict.fromkeys([self.host["underlay4"], self.host["advertise4"], "127.0.0.1"]))
        # Readers at sites from or to which nothing but the mesh leads dial that.
        far = any(dialled(self.host, site, self.model.closed) == "mesh4" for site in sites_of(self.present))
        for name, cn, usages, more in (
            ("etcd-server", self.name, ["server"], [self.host["mesh4"]] if far else []),
            ("etcd-peer", "isthmus-etcd-peer", ["server", "client"], []),
        ):
            yield {
                **self.certificate(name, cn),
                "sans_dns": [self.name, "localhost"],
                "sans_ip": [*addresses, *more],
                "usages": usages,
                "owner": "isthmus-etcd",
            }
        for name, cn in (
            ("root", "root"),
            ("operator", "isthmus-operator"),
            ("registrar", "isthmus-registrar"),
        ):
            yield self.certificate(name, cn)
        for peer in self.shared.peers():
            yield {
                **self.certificate(f"peer-{peer}", f"remote-{self.own['name']}"),
                "ca_cluster": peer,
                "ca_host": self.present[peer]["ca_host"],
            }

    def certificate(self, name: str, cn: str) -> dict[str, Any]:
        return {
            "name": name,
            "ca_cluster": self.own["name"],
            "ca_host": self.own["ca_host"],
            "cn": cn,
            "sans_dns": [],
            "sans_ip": [],
            "usages": ["client"],
            "owner": "root",
        }


def _tunnel(number: int) -> dict[str, Any]:
    return {"key": f"{PKI}/{spec.WIREGUARD_KEYS[number]}", "port": spec.WIREGUARD_PORTS[number]}
