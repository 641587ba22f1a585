# SPDX-License-Identifier: BSD-2-Clause
"""Names of every etcd key that Isthmus reads or writes, and their parsers.

`cilium/...` is the layout of Cilium ClusterMesh (pkg/kvstore/kvstore.go, pkg/clustermesh/store,
pkg/ipcache/kvstore.go, pkg/identity/cache/allocator.go of Cilium 1.20); the cached layout is that
of its KVStoreMesh. `isthmus/v1/...` is ours (docs/architecture.md).

Prefixes end with `/`. Parsers return None for a key that has not the form they read: whoever reads
another cluster's keys counts and skips those.
"""

from __future__ import annotations

STATE_PREFIX = "cilium/state/"
CACHE_PREFIX = "cilium/cache/"
SYNCED_PREFIX = "cilium/synced/"
CLUSTER_CONFIG_PREFIX = "cilium/cluster-config/"
HEARTBEAT = "cilium/.heartbeat"

ISTHMUS_PREFIX = "isthmus/v1/"
LEADER = "isthmus/v1/leader"
LOCK = "isthmus/v1/lock"
RUN_LOCK = "isthmus/v1/lock/run"
ESTATE_PREFIX = "isthmus/v1/estate/"
ESTATE_CLUSTERS_PREFIX = "isthmus/v1/estate/clusters/"
ROSTER = "isthmus/v1/estate/roster"
SERVICE_DEFINITIONS_PREFIX = "isthmus/v1/services/"
NODE_REPORTS_PREFIX = "isthmus/v1/nodes/"
WORKLOADS_PREFIX = "isthmus/v1/workloads/"
ALIVE_PREFIX = "isthmus/v1/alive/"
ALLOC_PREFIX = "isthmus/v1/alloc/"
ALLOC_IDENTITIES_PREFIX = "isthmus/v1/alloc/identities/"
ALLOC_NODES_PREFIX = "isthmus/v1/alloc/nodes/"
VIPS_PREFIX = "isthmus/v1/alloc/vips/"
LOCAL_SERVICES_PREFIX = "isthmus/v1/alloc/services/"
PEERS_PREFIX = "isthmus/v1/alloc/peers/"
KUBERNETES_STATUS = "isthmus/v1/alloc/kubernetes"
UNTRANSLATED_PREFIX = "isthmus/v1/alloc/kubernetes/untranslated/"  # who watches the status has it as well

KINDS = ("nodes", "ip", "identities", "services")
"""The kinds of state that every peer publishes and waits for; one canary each."""


def state_prefix(kind: str, cluster: str) -> str:
    """Where `cluster` publishes its own state of this kind, in its own etcd."""
    if kind == "ip":
        return "cilium/state/ip/v1/default/"
    if kind == "identities":
        return "cilium/state/identities/v1/id/"
    _known(kind)
    return f"cilium/state/{kind}/v1/{cluster}/"


def cache_prefix(kind: str, cluster: str) -> str:
    """Where another cluster's etcd mirrors the state of `cluster`."""
    if kind == "identities":
        return f"cilium/cache/identities/v1/{cluster}/id/"
    _known(kind)
    return f"cilium/cache/{kind}/v1/{cluster}/"


def canary_key(cluster: str, kind: str, cached: bool = False) -> str:
    """The key that says: this kind of state of `cluster` is complete."""
    _known(kind)
    return f"cilium/synced/{cluster}/cilium/{'cache' if cached else 'state'}/{kind}/v1"


def canary_prefix(cluster: str) -> str:
    return f"{SYNCED_PREFIX}{cluster}/"


def parse_canary_key(key: str) -> tuple[str, str, bool] | None:
    """(cluster, kind, cached)."""
    parts = key.split("/")
    if len(parts) != 7 or parts[:2] != ["cilium", "synced"] or parts[3] != "cilium" or parts[6] != "v1":
        return None
    if parts[4] not in ("state", "cache") or parts[5] not in KINDS or not parts[2]:
        return None
    return parts[2], parts[5], parts[4] == "cache"


def cluster_config_key(cluster: str) -> str:
    return f"{CLUSTER_CONFIG_PREFIX}{cluster}"


def parse_cluster_config_key(key: str) -> str | None:
    found = _rest(key, CLUSTER_CONFIG_PREFIX, 1)
    return found[0] if found else None


def node_key(cluster: str, node: str, cached: bool = False) -> str:
    return (cache_prefix if cached else state_prefix)("nodes", cluster) + node


def parse_node_key(key: str) -> tuple[str, str] | None:
    """(cluster, node), of either layout."""
    found = _rest(key, "cilium/state/nodes/v1/", 2) or _rest(key, "cilium/cache/nodes/v1/", 2)
    return (found[0], found[1]) if found else None


def ip_key(ip: str, cluster: str | None = None) -> str:
    """Key of an address; with `cluster` in the cached layout, else in the state layout, which names no cluster."""
    return (state_prefix("ip", "") if cluster is None else cache_prefix("ip", cluster)) + ip


def parse_ip_key(key: str) -> tuple[str | None, str] | None:
    """(cluster or None for the state layout, address); a prefix keeps its length: `10.0.0.0/24`."""
    state = state_prefix("ip", "")
    if key.startswith(state):
        cluster, address = None, key[len(state) :]
    elif key.startswith("cilium/cache/ip/v1/"):
        cluster, _slash, address = key[len("cilium/cache/ip/v1/") :].partition("/")
        if not cluster:
            return None
    else:
        return None
    if not address or address.count("/") > 1 or address.endswith("/"):
        return None
    return cluster, address


def identity_key(number: int, cluster: str | None = None) -> str:
    """Key of an identity; with `cluster` in the cached layout, else in the state layout, which names no cluster."""
    return f"{state_prefix('identities', '') if cluster is None else cache_prefix('identities', cluster)}{number}"


def parse_identity_key(key: str) -> tuple[str | None, int] | None:
    """(cluster or None for the state layout, number)."""
    state = state_prefix("identities", "")
    if key.startswith(state):
        cluster, text = None, key[len(state) :]
    else:
        found = _rest(key, "cilium/cache/identities/v1/", 3)
        if not found or found[1] != "id":
            return None
        cluster, text = found[0], found[2]
    number = _decimal(text)
    return None if number is None else (cluster, number)


def service_key(cluster: str, ns: str, name: str, cached: bool = False) -> str:
    return f"{(cache_prefix if cached else state_prefix)('services', cluster)}{ns}/{name}"


def parse_service_key(key: str) -> tuple[str, str, str] | None:
    """(cluster, namespace, name), of either layout."""
    found = _rest(key, "cilium/state/services/v1/", 3) or _rest(key, "cilium/cache/services/v1/", 3)
    return (found[0], found[1], found[2]) if found else None


def estate_cluster_key(name: str) -> str:
    return f"{ESTATE_CLUSTERS_PREFIX}{name}"


def parse_estate_cluster_key(key: str) -> str | None:
    found = _rest(key, ESTATE_CLUSTERS_PREFIX, 1)
    return found[0] if found else None


def service_definition_key(ns: str, name: str) -> str:
    return f"{SERVICE_DEFINITIONS_PREFIX}{ns}/{name}"


def parse_service_definition_key(key: str) -> tuple[str, str] | None:
    """(namespace, name)."""
    return _pair(key, SERVICE_DEFINITIONS_PREFIX)


def node_report_key(node: str) -> str:
    return f"{NODE_REPORTS_PREFIX}{node}"


def parse_node_report_key(key: str) -> str | None:
    found = _rest(key, NODE_REPORTS_PREFIX, 1)
    return found[0] if found else None


def workload_key(node: str, ns: str, name: str) -> str:
    return f"{WORKLOADS_PREFIX}{node}/{ns}.{name}"


def workloads_prefix(node: str) -> str:
    return f"{WORKLOADS_PREFIX}{node}/"


def parse_workload_key(key: str) -> tuple[str, str, str] | None:
    """(node, namespace, name). A namespace is an RFC 1123 label and has no dot; neither has a name."""
    found = _rest(key, WORKLOADS_PREFIX, 2)
    if not found:
        return None
    ns, dot, name = found[1].partition(".")
    return (found[0], ns, name) if dot and ns and name else None


def alive_key(node: str) -> str:
    return f"{ALIVE_PREFIX}{node}"


def parse_alive_key(key: str) -> str | None:
    found = _rest(key, ALIVE_PREFIX, 1)
    return found[0] if found else None


def alloc_identity_key(n: int) -> str:
    return f"{ALLOC_IDENTITIES_PREFIX}{n}"


def parse_alloc_identity_key(key: str) -> int | None:
    found = _rest(key, ALLOC_IDENTITIES_PREFIX, 1)
    return _decimal(found[0]) if found else None


def alloc_node_key(node: str) -> str:
    return f"{ALLOC_NODES_PREFIX}{node}"


def parse_alloc_node_key(key: str) -> str | None:
    found = _rest(key, ALLOC_NODES_PREFIX, 1)
    return found[0] if found else None


def vip_key(ns: str, name: str) -> str:
    return f"{VIPS_PREFIX}{ns}/{name}"


def parse_vip_key(key: str) -> tuple[str, str] | None:
    """(namespace, name)."""
    return _pair(key, VIPS_PREFIX)


def local_service_key(ns: str, name: str) -> str:
    return f"{LOCAL_SERVICES_PREFIX}{ns}/{name}"


def parse_local_service_key(key: str) -> tuple[str, str] | None:
    """(namespace, name)."""
    return _pair(key, LOCAL_SERVICES_PREFIX)


def peer_status_key(peer: str) -> str:
    return f"{PEERS_PREFIX}{peer}"


def parse_peer_status_key(key: str) -> str | None:
    found = _rest(key, PEERS_PREFIX, 1)
    return found[0] if found else None


def untranslated_key(ip: str) -> str:
    return f"{UNTRANSLATED_PREFIX}{ip}"


def parse_untranslated_key(key: str) -> str | None:
    """The address."""
    found = _rest(key, UNTRANSLATED_PREFIX, 1)
    return found[0] if found else None


def _known(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of state {kind!r}; known are {', '.join(KINDS)}")


def _rest(key: str, prefix: str, count: int) -> list[str] | None:
    if not key.startswith(prefix):
        return None
    parts = key[len(prefix) :].split("/")
    return parts if len(parts) == count and all(parts) else None


def _pair(key: str, prefix: str) -> tuple[str, str] | None:
    found = _rest(key, prefix, 2)
    return (found[0], found[1]) if found else None


def _decimal(text: str) -> int | None:
    """A number as a key spells it: ASCII digits, no leading zero, at most 32 bits."""
    if not text.isascii() or not text.isdigit() or len(text) > 10 or (len(text) > 1 and text[0] == "0"):
        return None
    number = int(text)
    return number if number <= 0xFFFFFFFF else None
