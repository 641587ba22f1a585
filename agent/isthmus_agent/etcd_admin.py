# SPDX-License-Identifier: GPL-3.0-or-later
"""Members and access rights of a cluster's etcd: what must be so, what is, and the steps between.

Used by the Ansible modules ``etcd_member`` and ``etcd_access`` and by the defragmentation timer. Everything here
speaks to etcd only; files and units are the callers' work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from isthmus_mesh import keys
from isthmus_mesh.spec import MemberSpec, NodeSpec

from .estate_admin import superseded
from .kvstore import (
    Compare,
    EtcdError,
    EtcdExists,
    EtcdNoSpace,
    EtcdNotFound,
    EtcdPrecondition,
    EtcdUnavailable,
    Member,
    Permission,
    Put,
    SyncEtcd,
)

T = TypeVar("T")

PKI_DIRECTORY = "/etc/isthmus/pki"
MAINTENANCE_LOCK = f"{keys.LOCK}/etcd-maintenance"
LOCK_TTL = 120
"""Seconds a member may be away for a restart or a defragmentation before another may take its turn."""
JOINING = f"{keys.LOCK}/etcd-joining/"
JOINING_TTL = 1800
"""Seconds in which the run that adds a member writes the record that lists it."""
SETTLE = 30.0
"""Seconds to wait before a member leaves: the one before may have been the leader."""


class AdminError(Exception):
    """The etcd cluster is not in a state for the step; the text says what, where, why and the next step."""


class EtcdConnector:
    """Opens connections to a cluster's etcd with the certificate of one of its users on this host."""

    def __init__(self, cluster: str, user: str = "root", directory: str = PKI_DIRECTORY) -> None:
        self.files = (
            f"{directory}/trust/{cluster}.crt",
            f"{directory}/{user}.crt",
            f"{directory}/{user}.key",
        )

    def __call__(self, endpoints: Sequence[str], timeout: float = 5.0) -> SyncEtcd:
        return SyncEtcd(endpoints, *self.files, timeout=timeout)


def local_endpoint(member: MemberSpec) -> str:
    """The member's client endpoint as seen from its own host."""
    return f"https://127.0.0.1:{urlsplit(member.client_url).port}"


def other_endpoints(member: MemberSpec) -> dict[str, str]:
    """Client endpoints of the other declared members, by name."""
    return {name: url for name, url in sorted(member.client_urls.items()) if name != member.name}


# --- what the other members are doing


@dataclass(frozen=True, slots=True)
class Survey:
    """The other declared members: ``answering`` (they serve with quorum), ``running`` (a port that accepts, but no
    answer), ``refusing`` (the machine is there and nothing listens) and ``silent`` (no answer from the machine)."""

    answering: tuple[str, ...]
    running: tuple[str, ...]
    refusing: tuple[str, ...]
    silent: tuple[str, ...]

    def describe(self) -> str:
        words = (
            ("answer", self.answering),
            ("run but cannot serve", self.running),
            ("refuse connections", self.refusing),
            ("do not answer at all", self.silent),
        )
        return "; ".join(f"{', '.join(names)} {verb}" for verb, names in words if names) or "there are no others"


def survey(member: MemberSpec, connect: EtcdConnector, timeout: float = 3.0) -> Survey:
    """Ask every other declared member. ``timeout`` seconds each."""
    found: dict[str, list[str]] = {"answering": [], "running": [], "refusing": [], "silent": []}
    for name, url in other_endpoints(member).items():
        found[_state_of(url, connect, timeout)].append(name)
    return Survey(**{state: tuple(names) for state, names in found.items()})


def _state_of(url: str, connect: EtcdConnector, timeout: float) -> str:
    address = urlsplit(url)
    try:
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=timeout):
            pass
    except ConnectionRefusedError:
        return "refusing"
    except OSError:
        return "silent"
    with connect([url], timeout) as client:
        try:
            # A read through raft: etcd 3.4 lists members also without quorum.
            client.get(keys.HEARTBEAT)
        except EtcdError:
            return "running"
    return "answering"


def decide_formation(member: MemberSpec, found: Survey, formed: bool, former: str) -> str:
    """What a member without data does: ``join``, ``form`` or ``wait`` (another one is about to form the cluster).

    ``formed``: the estate record shows that this etcd existed before. ``former`` is the member that forms the cluster
    in this run when there is none. Raises `AdminError` where any answer could make a second cluster beside a first.
    """
    if found.answering:
        return "join"
    if formed and member.members.keys() != {member.name}:
        raise AdminError(
            f"etcd member {member.name} has no data and no other member of its cluster serves ({found.describe()}), "
            "but the estate record shows that the cluster existed. Start the other members and run again, or restore a "
            "backup (isthmus.mesh.restore); if all data is lost for good, run with -e etcd_formed=false to begin an "
            "empty etcd"
        )
    if formed:
        raise AdminError(
            f"etcd member {member.name} is the only one of its cluster and has no data, but the estate record shows "
            "that it had. Restore a backup (isthmus.mesh.restore); if the data is lost for good, run with -e "
            "etcd_formed=false to begin an empty etcd"
        )
    if former != member.name:
        return "wait"
    if found.running or (found.silent and member.name != member.initial):
        raise AdminError(
            f"etcd member {member.name} has no data and cannot tell whether its cluster exists: {found.describe()}. "
            f"Make them reachable, or run the playbook on {member.initial} first, which may form the cluster"
        )
    return "form"


def wait_for_former(member: MemberSpec, connect: EtcdConnector, former: str, timeout: float) -> Survey:
    """Wait until a member answers, so that this one can join; `AdminError` after ``timeout`` seconds."""

    def answered() -> Survey | None:
        found = survey(member, connect)
        return found if found.answering else None

    found = _until(answered, timeout)
    if found is None:
        raise AdminError(
            f"etcd member {member.name} waited {timeout:.0f} s for {former} to form the cluster, but no member "
            f"answers ({survey(member, connect).describe()}). Look at `journalctl -u isthmus-etcd` on {former}"
        )
    return found


def join(
    member: MemberSpec, connect: EtcdConnector, answering: Iterable[str], revision: int, timeout: float
) -> dict[str, str]:
    """Announce this member as a learner. Returns all members' peer URLs by name, for its first start.

    An announcement of an earlier, interrupted run is used; a member of this name that had data which is now gone is
    removed first (it can never come back with an empty log). etcd admits one learner at a time, so this waits for
    others that join. ``revision`` is that of the record's document that lists the member: until it is written, a run
    with an older one must not take the member for one that left. `AdminError` after ``timeout`` seconds.
    """
    endpoints = [member.client_urls[name] for name in answering]
    with connect(endpoints) as client:
        mark = json.dumps({"peer_url": member.peer_url, "revision": revision})
        client.put(JOINING + member.name, mark, client.lease_grant(JOINING_TTL).id)
        own = _own_entry(member, client.member_list())
        if own is not None and own.name:
            others = {entry.id for entry in client.member_list() if not entry.learner} - {own.id}
            sick = _sick(client, connect, without=own.id)
            if not _quorate(others, sick):
                raise AdminError(
                    f"etcd member {member.name} lost its data, and without it too few members are healthy: "
                    f"{'; '.join(sick.values())}. Repair one of them first"
                )
            client.member_remove(own.id)
            own = None
        if own is None:
            _add_learner(client, member, timeout)
        peers = {}
        for entry in client.member_list():
            name = member.name if member.peer_url in entry.peer_urls else entry.name or _declared_name(member, entry)
            peers[name] = entry.peer_urls[0]
    return peers


def _declared_name(member: MemberSpec, entry: Member) -> str:
    """The name of a member that was announced and has not started: etcd learns it at its first start."""
    for name, url in member.members.items():
        if url in entry.peer_urls:
            return name
    return f"unstarted-{entry.id:x}"


def _own_entry(member: MemberSpec, members: Iterable[Member]) -> Member | None:
    for entry in members:
        if entry.name == member.name or member.peer_url in entry.peer_urls:
            return entry
    return None


def _add_learner(client: SyncEtcd, member: MemberSpec, timeout: float) -> None:
    last = "?"

    def added() -> bool | None:
        nonlocal last
        try:
            client.member_add([member.peer_url], learner=True)
        except EtcdExists:
            return True
        except EtcdError as exc:
            # One learner at a time; etcd refuses changes until all members were seen for some seconds; and a member
            # that has not applied a removal yet does not find the one that went.
            passing = ("too many learner", "unhealthy cluster", "not enough started", "member not found")
            if not isinstance(exc, EtcdUnavailable) and not any(words in exc.reason for words in passing):
                raise
            last = exc.reason
            if _own_entry(member, client.member_list()) is not None:
                return True
            return None
        return True

    if _until(added, timeout) is None:
        learners = [entry.name or entry.peer_urls[0] for entry in client.member_list() if entry.learner]
        blocked = f"; {', '.join(learners)} is still a learner: run the playbook on it" if learners else ""
        raise AdminError(f"etcd member {member.name} was not admitted within {timeout:.0f} s: {last}{blocked}")


def promote(member: MemberSpec, connect: EtcdConnector, timeout: float) -> bool:
    """Make this member vote if it is a learner. Waits for it to catch up; returns whether it had to.

    `AdminError` after ``timeout`` seconds.
    """
    last, learner = "it does not answer", False

    def voting() -> bool | None:
        nonlocal last, learner
        try:
            with connect([*other_endpoints(member).values(), local_endpoint(member)]) as client:
                own = _own_entry(member, client.member_list())
                if own is None:
                    raise AdminError(f"etcd member {member.name} is not in its cluster's member list")
                learner = own.learner
                if not learner:
                    return False
                # A follower of etcd 3.4 hands this on without saying who asks: the leader refuses it once access
                # control is on.
                leader = client.status().leader
                asked = [entry for entry in client.member_list() if entry.id == leader and entry.client_urls]
                with connect(list(asked[0].client_urls)) if asked else contextlib.nullcontext(client) as direct:
                    direct.member_promote(own.id)
                return True
        except (EtcdPrecondition, EtcdUnavailable) as exc:
            last = exc.reason
        return None

    result = _until(voting, timeout)
    if result is None and not learner:
        raise AdminError(f"etcd member {member.name} does not serve after {timeout:.0f} s: {last}")
    if result is None:
        raise AdminError(
            f"etcd member {member.name} stayed a learner for {timeout:.0f} s: {last}. "
            "Look at `journalctl -u isthmus-etcd` on this host, then run again"
        )
    return result


# --- health, and one member at a time


@dataclass(frozen=True, slots=True)
class Health:
    """What a healthy member's host reports: names, who leads, the server version."""

    members: tuple[str, ...]
    learners: tuple[str, ...]
    leader: str
    version: str


def wait_healthy(member: MemberSpec, connect: EtcdConnector, timeout: float) -> Health:
    """Wait until this host's member serves reads with quorum; `AdminError` after ``timeout`` seconds."""
    last = "?"

    def healthy() -> Health | None:
        nonlocal last
        try:
            with connect([local_endpoint(member)]) as client:
                status = client.status()
                entries = client.member_list()
                if not status.learner:  # a learner serves no reads
                    client.get(keys.HEARTBEAT)
        except EtcdError as exc:
            last = exc.reason
            return None
        except OSError as exc:
            raise AdminError(f"the root certificate of this host cannot be read: {exc}. Run the pki role") from exc
        names = {entry.id: entry.name for entry in entries}
        return Health(
            members=tuple(sorted(entry.name or entry.peer_urls[0] for entry in entries)),
            learners=tuple(sorted(entry.name or entry.peer_urls[0] for entry in entries if entry.learner)),
            leader=names.get(status.leader, ""),
            version=status.version,
        )

    result = _until(healthy, timeout)
    if result is None:
        raise AdminError(f"etcd member {member.name} does not serve after {timeout:.0f} s: {last}")
    return result


def _sick(client: SyncEtcd, connect: EtcdConnector, without: int = 0) -> dict[int, str]:
    """Voters that are not healthy, by id: who and why. ``without``: one that is not asked."""
    found = {}
    for entry in client.member_list():
        if entry.learner or entry.id == without:
            continue
        if not entry.client_urls:
            found[entry.id] = f"{entry.name or entry.peer_urls[0]} never started"
            continue
        try:
            with connect(list(entry.client_urls), 3.0) as direct:
                direct.status()
        except EtcdError as exc:
            found[entry.id] = f"{entry.name or entry.peer_urls[0]}: {exc}"
    return found


def _quorate(voters: Collection[int], sick: Collection[int]) -> bool:
    """Whether these voters could decide anything."""
    return len(set(voters) - set(sick)) > len(voters) // 2


@contextlib.contextmanager
def _maintenance(client: SyncEtcd, holder: str, timeout: float) -> Iterator[Callable[[], object]]:
    """Hold the lock that all maintenance of this etcd takes; what is given renews it for `LOCK_TTL` seconds.

    `AdminError` when others hold it for ``timeout`` seconds, and when etcd takes no write.
    """
    lease = 0
    last = ""

    def locked() -> bool | None:
        nonlocal lease, last
        try:
            if lease:
                client.lease_keepalive(lease)
            else:
                lease = client.lease_grant(LOCK_TTL).id
            mine = json.dumps({"holder": holder, "lease": f"{lease:x}"})
            client.txn([Compare(MAINTENANCE_LOCK, "create", "=", 0)], [Put(MAINTENANCE_LOCK, mine, lease)], [])
            # Asked, not concluded from the transaction: its answer may be lost with the member that gives it.
            held = client.get(MAINTENANCE_LOCK)
        except EtcdNotFound:
            lease = 0  # it ran out meanwhile
            return None
        except EtcdNoSpace as exc:
            raise AdminError(
                f"etcd member {holder} cannot have its turn to be away, which is written down in etcd: {exc}. Next: "
                'compact, defragment and disarm, as docs/operating.md ("etcd\'s database is full") says, then run the '
                "playbook again"
            ) from exc
        except EtcdError as exc:
            last = str(exc)  # the member that was asked may be the one whose turn it is
            return None
        last = f"{held.text if held else 'another member'} holds {MAINTENANCE_LOCK}"
        return True if held is not None and held.text == mine else None

    try:
        if _until(locked, timeout) is None:
            raise AdminError(f"etcd member {holder} waited {timeout:.0f} s for its turn; {last}")
        yield lambda: client.lease_keepalive(lease)
    finally:
        if lease:
            with contextlib.suppress(EtcdUnavailable, EtcdNotFound):  # it ends by itself
                client.lease_revoke(lease)


@contextlib.contextmanager
def turn(member: MemberSpec, connect: EtcdConnector, timeout: float) -> Iterator[None]:
    """Have this member's turn to be away: one at a time, the others healthy, leadership handed over.

    A cluster of one has nobody to ask. Raises `AdminError` when the turn does not come within ``timeout`` seconds or
    another member is not healthy.
    """
    with connect([*other_endpoints(member).values(), local_endpoint(member)]) as client:
        if _is_alone(member, client):
            yield
            return
        with _maintenance(client, member.name, timeout) as renew:
            own = _own_entry(member, client.member_list())
            if own is None:
                raise AdminError(f"etcd member {member.name} is not in its cluster's member list")
            sick = _sick(client, connect, without=own.id)
            if sick:
                raise AdminError(
                    f"etcd member {member.name} is left as it is, because another one is not healthy: "
                    f"{'; '.join(sick.values())}. Repair that one first"
                )
            _hand_over(client, own, local_endpoint(member))
            renew()
            yield


def _is_alone(member: MemberSpec, client: SyncEtcd) -> bool:
    """Whether nobody else votes: also of a member that is too sick to tell, when no other one is declared."""
    if len(member.members) > 1:
        return False
    try:
        return len(client.member_list()) == 1
    except (EtcdError, OSError):
        return True


def _hand_over(client: SyncEtcd, own: Member, endpoint: str, heirs: Collection[int] = ()) -> None:
    """Give leadership to another voter (of ``heirs``, when given), so that the cluster has no gap while ``own``, which
    serves at ``endpoint``, is away."""
    if client.status(endpoint).leader != own.id:
        return
    for entry in client.member_list():
        if entry.id != own.id and not entry.learner and entry.name and (not heirs or entry.id in heirs):
            client.move_leader(endpoint, entry.id)
            return


# --- members that leave


def dismiss(
    document: Mapping[str, Any],
    holder: str,
    connect: EtcdConnector,
    endpoints: Sequence[str],
    snapshot: Callable[[SyncEtcd], object],
    apply: bool,
    timeout: float,
    only: str | None = None,
) -> Iterator[str]:
    """Take members that the record does not list out of the cluster, one at a time; gives the name of each that went.

    ``document`` is the cluster's document of the record as planned, ``holder`` who does this. With ``only`` just the
    member of that name or peer URL goes. ``snapshot`` is called before the first one goes. Without ``apply`` it only
    tells who would.

    Raises `AdminError` when the record in etcd is newer than the plan, when a member that stays is not healthy, or
    when the rest would lose its quorum; after `SETTLE` seconds when a member has just gone.
    """
    with connect(endpoints) as client:
        leaving = _leaving(client, document, only)
        if not leaving:
            return
        key = keys.estate_cluster_key(document["name"])
        newer = superseded(key, client.get(key), document)
        if newer:
            raise AdminError(f"etcd member {_names(leaving)} is not in this run's plan and was left: {newer}")
        _next_to_leave(client, connect, document, leaving)
        if not apply:
            yield from map(_name, leaving)
            return
        with _maintenance(client, holder, timeout) as renew:
            leaving = _leaving(client, document, only)  # again: whoever had the lock may have done it
            if leaving:
                snapshot(client)
            while leaving:
                gone = _take_out_one(client, connect, document, leaving)
                renew()
                yield _name(gone)
                leaving.remove(gone)


def _take_out_one(
    client: SyncEtcd, connect: EtcdConnector, document: Mapping[str, Any], leaving: Sequence[Member]
) -> Member:
    """Remove the one of ``leaving`` that may go next. `AdminError` after `SETTLE` seconds."""
    last = ""

    def removed() -> Member | None:
        nonlocal last
        try:
            entries = client.member_list()
            for entry in leaving:
                if entry.id not in {other.id for other in entries}:
                    return entry  # it was done, the answer was lost
            entry = _next_to_leave(client, connect, document, leaving)
            with contextlib.suppress(EtcdError, IndexError):
                _hand_over(client, entry, entry.client_urls[0], _stay(entries, document))
            client.member_remove(entry.id)
        except (AdminError, EtcdPrecondition, EtcdUnavailable, EtcdNotFound) as exc:
            last = str(exc)
            return None
        return entry

    result = _until(removed, SETTLE)
    if result is None:
        raise AdminError(last)
    return result


def _leaving(client: SyncEtcd, document: Mapping[str, Any], only: str | None) -> list[Member]:
    """Members that the record does not list; `AdminError` for those that another run is just adding."""
    found = [
        entry
        for entry in client.member_list()
        if not _listed(entry, document) and (only is None or only in (entry.name, *entry.peer_urls))
    ]
    if not found:
        return []
    marks = [json.loads(kv.value) for kv in client.range(JOINING).kvs]
    new = {mark["peer_url"] for mark in marks if mark["revision"] >= document["revision"]}
    joining = [entry for entry in found if new & set(entry.peer_urls)]
    if joining:
        raise AdminError(
            f"etcd member {_names(joining)} is not in this run's plan (revision {document['revision']}): another run "
            "is just adding it. It was left as it is. Next: run the playbook again when that run has ended"
        )
    return found


def _listed(entry: Member, document: Mapping[str, Any]) -> bool:
    """Whether the record has this member, by its name or by any of its addresses."""
    etcd, hosts = document["etcd"], document["hosts"]
    urls = {
        f"https://{hosts[name][address]}:{etcd['peer_port']}"
        for name in etcd["members"]
        for address in ("underlay4", "advertise4")
    }
    return entry.name in etcd["members"] or bool(urls & set(entry.peer_urls))


def _stay(entries: Iterable[Member], document: Mapping[str, Any]) -> set[int]:
    return {entry.id for entry in entries if not entry.learner and _listed(entry, document)}


def _next_to_leave(
    client: SyncEtcd, connect: EtcdConnector, document: Mapping[str, Any], leaving: Sequence[Member]
) -> Member:
    """Who of ``leaving`` may go now: the sick ones first, the leader last."""
    entries = client.member_list()
    voters = {entry.id for entry in entries if not entry.learner}
    stay = _stay(entries, document)
    sick = _sick(client, connect)
    leader = client.status().leader
    what = f"etcd member {_names(leaving)} is to leave cluster {document['name']}"
    if not stay:
        raise AdminError(
            f"{what}, but none of those that stay ({', '.join(document['etcd']['members'])}) votes in it yet. Next: "
            "run the playbook on them first"
        )
    if stay & sick.keys():
        words = "; ".join(sick[one] for one in sorted(stay & sick.keys()))
        raise AdminError(f"{what}, but one that stays is not healthy: {words}. Next: repair that one, then run again")
    for entry in sorted(leaving, key=lambda one: (one.id not in sick, one.id == leader, one.name)):
        if _quorate(voters - {entry.id}, sick):
            return entry
    raise AdminError(
        f"{what}, but then too few of the rest are healthy: {'; '.join(sick.values())}. Next: run the playbook on the "
        f"members that stay ({', '.join(document['etcd']['members'])}), which takes out the sick ones first"
    )


def _name(entry: Member) -> str:
    return entry.name or entry.peer_urls[0]


def _names(entries: Iterable[Member]) -> str:
    return ", ".join(sorted(map(_name, entries)))


def is_expelled(member: MemberSpec, connect: EtcdConnector) -> bool:
    """Whether the other members serve and do not know this one: it was taken out, so its data is of no use."""
    answering = survey(member, connect).answering
    if not answering:
        return False
    with connect([member.client_urls[name] for name in answering]) as client:
        client.get(keys.HEARTBEAT)  # through raft: what it answers next is not older
        return _own_entry(member, client.member_list()) is None


def defragment(spec: NodeSpec, connect: EtcdConnector) -> str:
    """Defragment this host's member in its turn; a line that says what it did. Not worth it below a third free."""
    member = spec.member
    if member is None:
        return "this host has no etcd member"
    local = local_endpoint(member)
    with connect([local]) as client:
        before = client.status(local)
        free = before.db_size - before.db_size_in_use
        if free * 3 < before.db_size:
            return f"nothing to do: {free} of {before.db_size} bytes are free"
        with turn(member, connect, 900.0):
            client.defragment(local)
        return f"{before.db_size} bytes became {client.status(local).db_size}"


def _until(step: Callable[[], T | None], timeout: float) -> T | None:
    """Repeat until the step gives something; pauses grow from 0.2 to 1 s, with jitter. None after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    pause = 0.2
    while True:
        result = step()
        if result is not None or time.monotonic() > deadline:
            return result
        time.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - spreads retries, keeps no secret
        pause = min(pause * 1.5, 1.0)


# --- access rights

AGENT_USER = "isthmus-agent-"
AGENTS_USER = "isthmus-agents"
REMOTE_USER = "remote-"
READER_ROLE = "isthmus-reader"


@dataclass(frozen=True, slots=True)
class Access:
    """Roles with their permissions and users with their roles. A user is a certificate's name; none has a password."""

    roles: Mapping[str, frozenset[Permission]]
    users: Mapping[str, frozenset[str]]


def wanted_access(cluster: str, nodes: Iterable[str], peers: Iterable[str], in_cluster: bool = False) -> Access:
    """Who may do what in the etcd of ``cluster`` (docs/architecture.md, "etcd").

    ``in_cluster``: all agents are one user, which reports for every node. ``remote`` has the permissions of Cilium's
    role of that name (pkg/kvstore/etcdinit/init.go).
    """
    read, write = _all("read"), _all("readwrite")
    agents = wanted_for_nodes(nodes)
    roles = {
        **agents.roles,
        "root": frozenset[Permission](),
        # Everything below isthmus/v1/ but what the registrar alone writes. Hosts' keys too: removing a host is
        # Ansible's work.
        "isthmus-operator": write(
            keys.ESTATE_PREFIX,
            keys.SERVICE_DEFINITIONS_PREFIX,
            keys.NODE_REPORTS_PREFIX,
            keys.WORKLOADS_PREFIX,
            keys.ALIVE_PREFIX,
            f"{keys.ISTHMUS_PREFIX}splits/",
            f"{keys.ISTHMUS_PREFIX}policies/",
            keys.LOCK,
        ),
        "isthmus-registrar": write("cilium/", keys.ALLOC_PREFIX) | {Permission("readwrite", keys.LEADER, False)},
        "remote": read(keys.HEARTBEAT, keys.STATE_PREFIX, keys.canary_prefix(cluster))
        | {Permission("read", keys.cluster_config_key(cluster), False)},
    }
    users = {
        **agents.users,
        "root": frozenset({"root"}),
        "isthmus-operator": frozenset({READER_ROLE, "isthmus-operator"}),
        "isthmus-registrar": frozenset({READER_ROLE, "isthmus-registrar"}),
        "remote": frozenset({"remote"}),
    }
    if in_cluster:
        roles[AGENTS_USER] = write(keys.NODE_REPORTS_PREFIX, keys.ALIVE_PREFIX)
        users[AGENTS_USER] = frozenset({READER_ROLE, AGENTS_USER})
    for peer in peers:
        name = REMOTE_USER + peer
        roles[name] = read(*(keys.cache_prefix(kind, peer) for kind in keys.KINDS))
        users[name] = frozenset({"remote", name})
    return Access(roles, users)


def wanted_for_nodes(nodes: Iterable[str]) -> Access:
    """The part of these nodes' agents alone."""
    roles = {READER_ROLE: _all("read")("cilium/", keys.ISTHMUS_PREFIX)}
    users = {}
    for node in nodes:
        name = AGENT_USER + node
        roles[name] = _all("readwrite")(keys.workloads_prefix(node)) | {
            Permission("readwrite", keys.node_report_key(node), False),
            Permission("readwrite", keys.alive_key(node), False),
        }
        users[name] = frozenset({READER_ROLE, name})
    return Access(roles, users)


def _all(kind: str) -> Callable[..., frozenset[Permission]]:
    def permissions(*prefixes: str) -> frozenset[Permission]:
        return frozenset(Permission(kind, prefix, True) for prefix in prefixes)

    return permissions


@dataclass(frozen=True, slots=True)
class AccessResult:
    """``changes`` as lines for people; ``stale`` are users of peers that nobody knows, left as they are."""

    changes: tuple[str, ...]
    stale: tuple[str, ...]


def ensure_access(
    client: SyncEtcd, wanted: Access, apply: bool, enable: bool, absent: Iterable[str] | None = None
) -> AccessResult:
    """Make roles and users as wanted and, with ``enable``, switch authentication on last.

    ``absent`` are the clusters that the record calls so, when ``wanted`` is all that the record knows: their users go,
    and those of agents whose host is in no record. With None other users are not looked at. Without ``apply`` only
    says what would change.
    """
    changes: list[str] = []

    def step(line: str, call: Callable[..., object], *arguments: object) -> None:
        changes.append(line)
        if apply:
            # An earlier try of this call was done, its answer lost.
            with contextlib.suppress(EtcdExists, EtcdNotFound):
                call(*arguments)

    have_roles, have_users = set(client.role_list()), set(client.user_list())
    for role, permissions in sorted(wanted.roles.items()):
        have: set[Permission] = set()
        if role not in have_roles:
            step(f"role {role}", client.role_add, role)
        elif role != "root":
            have = set(client.role_get(role))
        for permission in sorted(have - permissions, key=_order):
            step(f"role {role}: revoke {_words(permission)}", client.role_revoke_permission, role, permission)
        for permission in sorted(permissions - have, key=_order):
            step(f"role {role}: {_words(permission)}", client.role_grant_permission, role, permission)
    for user, roles in sorted(wanted.users.items()):
        held: set[str] = set()
        if user not in have_users:
            step(f"user {user}", client.user_add, user)
        else:
            held = set(client.user_get(user))
        for role in sorted(held - roles):
            step(f"user {user}: take role {role}", client.user_revoke_role, user, role)
        for role in sorted(roles - held):
            step(f"user {user}: role {role}", client.user_grant_role, user, role)
    stale: list[str] = []
    if absent is not None:
        departed = {REMOTE_USER + cluster for cluster in absent}

        def gone(names: Iterable[str]) -> list[str]:
            return sorted(name for name in names if name.startswith(AGENT_USER) or name in departed)

        for user in gone(have_users - wanted.users.keys()):
            step(f"delete user {user}", client.user_delete, user)
        for role in gone(have_roles - wanted.roles.keys()):
            step(f"delete role {role}", client.role_delete, role)
        unknown = have_users - wanted.users.keys() - departed
        stale = sorted(user for user in unknown if user.startswith(REMOTE_USER))
    if enable and not client.auth_status():
        step("authentication on", client.auth_enable)
    return AccessResult(tuple(changes), tuple(stale))


def _order(permission: Permission) -> tuple[str, bool, str]:
    return permission.key, permission.prefix, permission.kind


def _words(permission: Permission) -> str:
    return f"{permission.kind} {permission.key}{'*' if permission.prefix else ''}"


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m isthmus_agent.etcd_admin defragment``: what the defragmentation timer runs."""
    parser = argparse.ArgumentParser(prog="isthmus_agent.etcd_admin", description="Maintenance of this host's etcd")
    parser.add_argument("action", choices=["defragment"])
    parser.add_argument("--spec", default="/etc/isthmus/node.json", help="the host's node spec")
    options = parser.parse_args(arguments)
    spec = NodeSpec.from_json(Path(options.spec).read_bytes())
    try:
        print(defragment(spec, EtcdConnector(spec.cluster.name)))
    except (AdminError, EtcdError) as exc:
        print(f"defragmentation failed: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
