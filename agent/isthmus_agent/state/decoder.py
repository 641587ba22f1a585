# SPDX-License-Identifier: GPL-3.0-or-later
"""Documents of own etcd into one `MeshState`. Pure but for the clock: keys and values in, state out.

A value that does not parse or does not belong to its key is refused: it is counted and named, and the
last good value of that key stays. The mirror's values were validated by the registrar already; they
are validated again because an agent must survive whatever its etcd holds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any

from isthmus_mesh import documents, keys, wire

from isthmus_agent.state.model import MeshState, Vip

SECTIONS = tuple(f.name for f in fields(MeshState))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A value that was not taken, and why."""

    key: str
    reason: str


class _IdTaken(wire.WireError):
    """A peer's id is another peer's, as long as that one has it."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a key's value goes: the section, the name in it, and how to decode it.

    `cluster` is the peer whose id the value is checked against; None when none is needed.
    """

    section: str
    name: Any
    decode: Callable[[bytes, int], Any]
    cluster: str | None = None


class Decoder:
    """Holds the last good value of every key and makes states of them."""

    def __init__(
        self, cluster: str, cluster_id: int, max_clusters: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.cluster = cluster
        self.cluster_id = cluster_id
        self.max_clusters = max_clusters
        self.refused: Counter[str] = Counter()  # by reason, since start
        self.bad: dict[str, str] = {}  # keys whose present value was refused -> reason
        # When a peer's status document last changed (by `clock`), and how often it did since it was first seen.
        self.peer_changes: dict[str, tuple[float, int]] = {}
        self._clock = clock
        self._news: list[Refusal] = []
        self._raw: dict[str, bytes] = {}
        self._waiting: dict[str, dict[str, bytes]] = {}  # peers whose config is not known yet
        self._rivals: dict[str, bytes] = {}  # configs that wait for another peer to give up their id
        self._sections: dict[str, dict[Any, Any]] = {name: {} for name in SECTIONS}
        self._dirty: set[str] = set()
        self._state = MeshState()
        self._batches = 0

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Meanwhile `state` stays what it was: nobody sees a half of what belongs together."""
        self._batches += 1
        try:
            yield
        finally:
            self._batches -= 1

    def put(self, key: str, value: bytes) -> bool:
        """Take a value. True when the state changed."""
        place = self._place(key)
        if place is None:
            return False
        self._rivals.pop(key, None)
        if self._raw.get(key) == value:
            self.bad.pop(key, None)
            return False
        try:
            cluster_id = self._id_of(place.cluster)
            if cluster_id is None and place.cluster is not None:
                self._waiting.setdefault(place.cluster, {})[key] = value
                return False
            record = place.decode(value, cluster_id or 0)
        except ValueError as exc:  # WireError and DocumentError are ValueErrors
            if isinstance(exc, _IdTaken):
                self._rivals[key] = value
            self._refuse(key, str(exc))
            return False
        self.bad.pop(key, None)
        if place.section == "peers":
            _, changes = self.peer_changes.get(place.name, (0.0, -1))
            self.peer_changes[place.name] = (self._clock(), changes + 1)
        self._raw[key] = value
        self._sections[place.section][place.name] = record
        self._dirty.add(place.section)
        if place.section == "configs":
            self._config_changed(place.name)
        return True

    def delete(self, key: str) -> bool:
        """Forget a key. True when the state changed."""
        place = self._place(key)
        self.bad.pop(key, None)
        self._rivals.pop(key, None)
        if place is None:
            return False
        if place.cluster is not None:
            self._waiting.get(place.cluster, {}).pop(key, None)
        if self._raw.pop(key, None) is None:
            return False
        del self._sections[place.section][place.name]
        if place.section == "peers":
            del self.peer_changes[place.name]
        self._dirty.add(place.section)
        if place.section == "configs":
            self._config_gone(place.name)
        return True

    def state(self) -> MeshState:
        """The present state, or that before a batch which is not done yet. Sections without a change are the same
        objects as before."""
        if self._dirty and not self._batches:
            changed = {name: MappingProxyType(dict(self._sections[name])) for name in self._dirty}
            self._state = MeshState(**{name: changed.get(name, getattr(self._state, name)) for name in SECTIONS})
            self._dirty.clear()
        return self._state

    def documents(self) -> Mapping[str, bytes]:
        """Every accepted value by key: what last-known-good stores."""
        return self._raw

    def take_refusals(self) -> list[Refusal]:
        """Refusals since the last call, each (key, reason) once."""
        news, self._news = self._news, []
        return news

    def _refuse(self, key: str, reason: str) -> None:
        self.refused[reason] += 1
        if self.bad.get(key) != reason:
            self.bad[key] = reason
            self._news.append(Refusal(key, reason))

    def _id_of(self, cluster: str | None) -> int | None:
        if cluster is None:
            return None
        if cluster == self.cluster:
            return self.cluster_id
        config: wire.ClusterConfig | None = self._sections["configs"].get(cluster)
        return config.id if config is not None else None

    def _config_changed(self, cluster: str) -> None:
        """A peer's id became known or changed: its values are judged again, those of another id go."""
        again = self._waiting.pop(cluster, {})
        for key in self._keys_of(cluster, self._raw):
            value = self._raw[key]
            self.delete(key)
            again.setdefault(key, value)
        for key, value in again.items():
            self.put(key, value)
        self._put_rivals()

    def _config_gone(self, cluster: str) -> None:
        """Everything of a peer goes with its config: another cluster may have its id next."""
        self._waiting.pop(cluster, None)
        for key in {*self._keys_of(cluster, self._raw), *self._keys_of(cluster, self.bad)}:
            self.delete(key)
        self._put_rivals()

    def _put_rivals(self) -> None:
        """Configs whose id may be free now: etcd tells of them once, not again when another one goes."""
        for key, value in list(self._rivals.items()):
            self.put(key, value)

    def _keys_of(self, cluster: str, keys_of_all: Mapping[str, object]) -> list[str]:
        mine = [key for key in keys_of_all if cluster in key]  # few of very many; the exact answer costs more
        return [key for key in mine if (place := self._place(key)) and place.cluster == cluster]

    def _place(self, key: str) -> _Place | None:
        if key.startswith(keys.STATE_PREFIX):
            return self._published(key, own=True)
        if key.startswith(keys.CACHE_PREFIX):
            return self._published(key, own=False)
        if (cluster := keys.parse_cluster_config_key(key)) is not None:
            return None if cluster == self.cluster else _Place("configs", cluster, self._config(cluster))
        if (service := keys.parse_service_definition_key(key)) is not None:
            return _Place("definitions", service, _named(documents.ServiceDefinition.from_json, service))
        if (service := keys.parse_vip_key(key)) is not None:
            return _Place("vips", service, lambda value, _: Vip.from_json(value))
        if (service := keys.parse_local_service_key(key)) is not None:
            return _Place("local_services", service, self._service(self.cluster, *service), self.cluster)
        if (peer := keys.parse_peer_status_key(key)) is not None:
            return _Place("peers", peer, lambda value, _: documents.PeerStatus.from_json(value))
        if key == keys.KUBERNETES_STATUS:
            return _Place("kubernetes", self.cluster, lambda value, _: documents.KubernetesStatus.from_json(value))
        if (address := keys.parse_untranslated_key(key)) is not None:
            return _Place("untranslated", address, _uid_at(address))
        return None

    def _published(self, key: str, own: bool) -> _Place | None:
        """Keys of Cilium's two layouts. Another cluster's name under `cilium/state`, or our own under `cilium/cache`,
        is not ours to read."""
        if (node := keys.parse_node_key(key)) is not None and (node[0] == self.cluster) == own:
            return _Place("nodes", node, self._node(*node), node[0])
        if (ip := keys.parse_ip_key(key)) is not None and (ip[0] is None) == own and ip[0] != self.cluster:
            cluster = ip[0] or self.cluster
            return _Place("ips", (cluster, ip[1]), self._ip(ip[1]), cluster)
        identity = keys.parse_identity_key(key)
        if identity is not None and (identity[0] is None) == own and identity[0] != self.cluster:
            cluster = identity[0] or self.cluster
            return _Place("identities", identity[1], self._identity(identity[1], cluster), cluster)
        if (service := keys.parse_service_key(key)) is not None and (service[0] == self.cluster) == own:
            return _Place("services", service, self._service(*service), service[0])
        return None

    def _node(self, cluster: str, name: str) -> Callable[[bytes, int], wire.Node]:
        def decode(value: bytes, cluster_id: int) -> wire.Node:
            node = wire.Node.from_json(value)
            wire.validate_node(node, cluster, name, cluster_id)
            return node

        return decode

    def _ip(self, address: str) -> Callable[[bytes, int], wire.IPIdentityPair]:
        def decode(value: bytes, cluster_id: int) -> wire.IPIdentityPair:
            pair = wire.IPIdentityPair.from_json(value)
            wire.validate_ip(pair, address, cluster_id, self.max_clusters)
            return pair

        return decode

    def _identity(self, number: int, cluster: str) -> Callable[[bytes, int], Mapping[str, str]]:
        def decode(value: bytes, cluster_id: int) -> Mapping[str, str]:
            try:
                labels = wire.labels_from_string(value.decode())
            except UnicodeDecodeError as exc:
                raise wire.WireError("not UTF-8") from exc
            wire.validate_identity(number, labels, cluster, cluster_id, self.max_clusters)
            return labels

        return decode

    def _service(self, cluster: str, namespace: str, name: str) -> Callable[[bytes, int], wire.ClusterService]:
        def decode(value: bytes, cluster_id: int) -> wire.ClusterService:
            service = wire.ClusterService.from_json(value)
            wire.validate_service(service, cluster, namespace, name, cluster_id)
            return service

        return decode

    def _config(self, cluster: str) -> Callable[[bytes, int], wire.ClusterConfig]:
        def decode(value: bytes, _: int) -> wire.ClusterConfig:
            config = wire.ClusterConfig.from_json(value)
            wire.validate_cluster_config(config, config.id, self.max_clusters)
            if config.id == self.cluster_id:
                raise wire.WireError("cluster id is our own")
            others: Mapping[str, wire.ClusterConfig] = self._sections["configs"]
            if any(other.id == config.id for name, other in others.items() if name != cluster):
                raise _IdTaken("cluster id is another peer's")
            return config

        return decode


def _uid_at(address: str) -> Callable[[bytes, int], str]:
    def checked(value: bytes, _: int) -> str:
        ip_address(address)
        return documents.Untranslated.from_json(value).uid

    return checked


def _named(
    decode: Callable[[bytes], documents.ServiceDefinition], service: tuple[str, str]
) -> Callable[[bytes, int], documents.ServiceDefinition]:
    def checked(value: bytes, _: int) -> documents.ServiceDefinition:
        definition = decode(value)
        if (definition.namespace, definition.name) != service:
            raise ValueError("name differs from key")
        return definition

    return checked
