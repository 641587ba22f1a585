# SPDX-License-Identifier: GPL-3.0-or-later
"""What own etcd says, decoded. Records are frozen; mappings are never changed after they were handed out.

A section that did not change between two states is the same object, so readers may compare by `is`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from isthmus_mesh import jsontext
from isthmus_mesh.documents import SESSION_AFFINITY_MOST, DocumentError, KubernetesStatus, PeerStatus, ServiceDefinition
from isthmus_mesh.wire import ClusterConfig, ClusterService, IPIdentityPair, Node

NodeKey = tuple[str, str]  # (cluster, node)
ServiceName = tuple[str, str]  # (namespace, name)


@dataclass(frozen=True, slots=True)
class Vip:
    """A service's address in this cluster (`isthmus/v1/alloc/vips/<ns>/<name>`); None: of that family none,
    or released. `by`: `kubernetes` for the address of a Service of this cluster's Kubernetes, whose `affinity` and
    `session_affinity` (seconds, 0: none) count then; `peers` for a service that no definition is here of; else
    empty."""

    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    by: str = ""
    affinity: str = "none"
    session_affinity: int = 0

    @classmethod
    def from_json(cls, text: str | bytes) -> Vip:
        """DocumentError when it is malformed."""
        fields = jsontext.Fields(jsontext.loads(text, DocumentError), DocumentError)
        if fields.optional_text("released") is not None:
            return cls(None, None)
        found4, found6 = fields.optional_text("ipv4"), fields.optional_text("ipv6")
        try:
            return cls(
                IPv4Address(found4) if found4 is not None else None,
                IPv6Address(found6) if found6 is not None else None,
                fields.text("by"),
                fields.text("affinity", "none"),
                fields.integer("session_affinity", SESSION_AFFINITY_MOST),
            )
        except ValueError as exc:
            raise DocumentError("ipv4 or ipv6 is not an address") from exc


@dataclass(frozen=True, slots=True)
class MeshState:
    """Own cluster's published state and the mirror of each peer's, one shape for both."""

    nodes: Mapping[NodeKey, Node] = field(default_factory=dict)
    ips: Mapping[tuple[str, str], IPIdentityPair] = field(default_factory=dict)  # (cluster, address or prefix)
    identities: Mapping[int, Mapping[str, str]] = field(default_factory=dict)  # number -> labels
    services: Mapping[tuple[str, str, str], ClusterService] = field(default_factory=dict)  # (cluster, ns, name)
    configs: Mapping[str, ClusterConfig] = field(default_factory=dict)  # peers, by cluster
    definitions: Mapping[ServiceName, ServiceDefinition] = field(default_factory=dict)
    vips: Mapping[ServiceName, Vip] = field(default_factory=dict)
    local_services: Mapping[ServiceName, ClusterService] = field(default_factory=dict)
    peers: Mapping[str, PeerStatus] = field(default_factory=dict)
    kubernetes: Mapping[str, KubernetesStatus] = field(default_factory=dict)  # by own cluster's name, or nothing
    untranslated: Mapping[str, str] = field(default_factory=dict)  # address -> uid of the pod that has it
