# SPDX-License-Identifier: GPL-3.0-or-later
"""What peers have mirrored of this cluster, read back when nothing here knows it any more.

After a total loss (an etcd without our output, and no `memory`) the mirrors of the peers are the last witnesses of
which identity number and which service address belong to whom. Of a mirror only that is taken, and only what lies in
this cluster's own ranges: a peer cannot give us anything of another cluster, and what it invents cannot use up a range.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any

from isthmus_mesh import keys
from isthmus_mesh.identity import identity_range, workload_labels
from isthmus_mesh.spec import PeerSpec
from isthmus_mesh.wire import (
    ClusterService,
    WireError,
    labels_from_string,
    labels_to_string,
    validate_identity,
    validate_service,
)

from isthmus_agent.agent.log import fields
from isthmus_agent.kvstore import EtcdClient, EtcdError, EtcdPermissionDenied, EtcdTooLarge, KeyValue
from isthmus_agent.kvstore.tasks import end, within

from .publish import Own

logger = logging.getLogger(__name__)

WAIT = 10.0
"""Seconds that peers have to answer. Who has not by then is not waited for: the cluster has to work again."""
ATTEMPT = 3.0
RETRY = 0.5
AT_ONCE = 4
MAX_KEYS = 65_536
MAX_BYTES = 8 * 1024 * 1024
"""Of keys and values of one kind of one peer; one that has more is not used."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What one peer says: number -> labels, and service ("<ns>/<name>") -> address. `refused`: what was not taken."""

    identities: Mapping[int, str] = field(default_factory=dict)
    vips: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)


def claims_of(own: Own, entries: Iterable[KeyValue]) -> Claims:
    """What is of this cluster among a mirror's identities and services."""
    identities: dict[int, str] = {}
    vips: dict[str, int] = {}
    refused: Counter[str] = Counter()
    for kv in entries:
        try:
            number = keys.parse_identity_key(kv.key)
            if number is not None and number[0] == own.name:
                identities[number[1]] = _labels(own, number[1], kv.value)
                continue
            service = keys.parse_service_key(kv.key)
            if service is None or service[0] != own.name:
                raise WireError("key is not of this cluster's mirror")
            vips["/".join(service[1:])] = _address(own, *service, kv.value)
        except (ValueError, RecursionError) as error:  # WireError is a ValueError
            refused[str(error)[:200]] += 1
    return Claims(identities, vips, refused)


def _labels(own: Own, number: int, value: bytes) -> str:
    labels = labels_from_string(value.decode())
    validate_identity(number, labels, own.name, own.id, own.max_clusters)
    if number == identity_range(own.id, own.max_clusters)[0]:
        raise WireError("the first number of a range is never dealt")
    return labels_to_string(labels)


def _address(own: Own, cluster: str, namespace: str, name: str, value: bytes) -> int:
    service = ClusterService.from_json(value)
    validate_service(service, cluster, namespace, name, own.id)
    if len(service.frontends) != 1:
        raise WireError("service has not one address")
    address, network = IPv4Address(next(iter(service.frontends))), own.service_range4
    if address not in network or address in (network.network_address, network.broadcast_address):
        raise WireError("address is not in this cluster's service range")
    return int(address)


def label_sets(own: Own, record: Mapping[str, Any]) -> frozenset[str]:
    """The labels of every workload of this cluster in its record, as they get a number."""
    found = set()
    for host in record.get("hosts", {}).values():
        for full, entry in host.get("workloads", {}).items():
            account = entry.get("service_account") or "default"
            labels = workload_labels(full.partition("/")[0], account, own.name, entry.get("labels", {}))
            try:
                found.add(labels_to_string(labels))
            except WireError:
                continue  # it gets none
    return frozenset(found)


def agreed(
    own: Own, claims: Mapping[str, Claims], labels: Collection[str], services: Collection[str], now: str
) -> dict[str, str]:
    """Allocation documents, by key, of what the peers say (`claims` by peer).

    Of two claims that exclude each other the one counts that is asked for (`labels`, `services`), then the one of more
    peers, then the lower number, which was dealt first. At most half of a range is taken, so that the rest can be
    dealt whatever a peer says. What nobody asks for now is marked released by `publish`.
    """
    first, last = identity_range(own.id, own.max_clusters)
    numbers = _settle(
        [(number, owner) for one in claims.values() for number, owner in one.identities.items()],
        labels,
        (last - first) // 2,
    )
    addresses = _settle(
        [(address, owner) for one in claims.values() for owner, address in one.vips.items()],
        services,
        own.service_range4.num_addresses // 2,
    )
    found = {}
    for number, owner in numbers.items():
        document = {"labels": owner, "created": now, "released": None}
        found[keys.alloc_identity_key(number)] = json.dumps(document)
    for address, owner in addresses.items():
        namespace, _slash, name = owner.partition("/")
        vip = {"ipv4": str(IPv4Address(address)), "ipv6": None, "released": None}
        found[keys.vip_key(namespace, name)] = json.dumps(vip)
    return found


def _settle(claims: Sequence[tuple[int, str]], wanted: Collection[str], most: int) -> dict[int, str]:
    """Number -> owner, each once."""
    votes = Counter(claims)
    ranked = sorted(votes, key=lambda claim: (claim[1] not in wanted, -votes[claim], claim))
    found: dict[int, str] = {}
    owners: set[str] = set()
    for number, owner in ranked:
        if number in found or owner in owners:
            logger.warning("peers disagree", extra=fields(number=number, owner=owner, votes=votes[number, owner]))
        elif len(found) < most:
            found[number] = owner
            owners.add(owner)
    return found


async def ask(
    own: Own, peers: Sequence[PeerSpec], client_of: Callable[[PeerSpec], EtcdClient], wait: float
) -> dict[str, Claims]:
    """What every peer that answers within `wait` seconds has mirrored of this cluster, by peer."""
    gate = asyncio.Semaphore(AT_ONCE)
    tasks = {asyncio.create_task(_ask_one(own, peer, client_of(peer), gate)): peer.name for peer in peers}
    if not tasks:
        return {}
    done, late = await asyncio.wait(tasks, timeout=wait)
    await end(late)
    if late:
        silent = ", ".join(sorted(tasks[task] for task in late))
        logger.warning("not waiting for what peers know of this cluster", extra=fields(peers=silent, seconds=wait))
    return {tasks[task]: task.result() for task in done}


async def _ask_one(own: Own, peer: PeerSpec, client: EtcdClient, gate: asyncio.Semaphore) -> Claims:
    """Until it answered. One that may not be asked, or gives too much, has said nothing."""
    try:
        while True:
            try:
                async with gate:  # a slow one gives its place to the next after each attempt
                    found = await within(_read(own, client), ATTEMPT)
            except (EtcdPermissionDenied, EtcdTooLarge) as error:
                logger.warning("a peer's mirror is not used", extra=fields(peer=peer.name, error=str(error)))
                return Claims()
            except (EtcdError, OSError, asyncio.TimeoutError):
                await asyncio.sleep(RETRY)
                continue
            if found.refused:
                refused = dict(Counter(found.refused).most_common(5))
                logger.warning("refused of a peer's mirror", extra=fields(peer=peer.name, reasons=refused))
            return found
    finally:
        await client.close()


async def _read(own: Own, client: EtcdClient) -> Claims:
    parts = [
        claims_of(own, (await client.range(prefix, max_keys=MAX_KEYS, max_bytes=MAX_BYTES)).kvs)
        for prefix in (keys.cache_prefix("identities", own.name), keys.cache_prefix("services", own.name))
    ]
    return Claims(parts[0].identities, parts[1].vips, Counter(parts[0].refused) + Counter(parts[1].refused))
