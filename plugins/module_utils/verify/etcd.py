# SPDX-License-Identifier: BSD-2-Clause
"""The etcd member on a host: whether it and its peers serve, what is published, rights and revoked certificates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ansible_collections.isthmus.mesh.plugins.module_utils import estate, etcd_trouble, etcd_unit, units
from ansible_collections.isthmus.mesh.plugins.module_utils.files import read_bytes
from ansible_collections.isthmus.mesh.plugins.module_utils.verify.verifier import SITE, Verifier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def check_etcd(verifier: Verifier) -> None:
    admin = verifier.bundle("isthmus_agent.etcd_admin")
    client_module = verifier.bundle("isthmus_agent.kvstore.client")
    errors = verifier.bundle("isthmus_agent.kvstore.errors")
    spec = verifier.bundle("isthmus_mesh.spec").NodeSpec.from_dict(verifier.spec)
    member = spec.member
    endpoint = admin.local_endpoint(member)
    restart = "see `journalctl -u isthmus-etcd` there"
    try:
        connect = admin.EtcdConnector(verifier.cluster, directory=verifier.PKI)
        with connect([endpoint], timeout=verifier.timeout) as client:
            status = client.status()
            members = client.member_list()
            alarms = client.alarms()
            enabled = client.auth_status()
            _check_published(verifier, client)
            for entry in members:
                for url in entry.client_urls[:1]:
                    with connect([url], timeout=verifier.timeout) as other:
                        _check_answers(verifier, other, entry, errors)
    except (errors.EtcdError, OSError) as exc:
        verifier.check(
            "etcd", False, f"member {member.name} does not serve: {exc}. {_why_not(verifier, admin, errors, member)}"
        )
        return
    words = etcd_trouble.divided(admin, errors, member, connect)
    verifier.check("etcd", not words, words)
    declared = {url.rstrip("/") for url in member.members.values()}
    real = {url.rstrip("/") for entry in members for url in entry.peer_urls}
    verifier.check("etcd", declared == real, f"its members are {sorted(real)}, the plan has {sorted(declared)}; {SITE}")
    learners = [entry.name or entry.peer_urls[0] for entry in members if entry.learner]
    verifier.check("etcd", not learners, f"members do not vote yet: {', '.join(learners)}; {SITE}")
    verifier.check("etcd", not alarms, f"alarm {etcd_trouble.of_alarms(alarm for _member, alarm in alarms)}")
    verifier.check("etcd", not status.errors, f"{member.name} reports {', '.join(status.errors)}; {restart}")
    verifier.check("etcd", enabled, f"access control is off, every certificate may write everything; {SITE}")
    _check_rights(verifier, endpoint, client_module, errors)


def check_own_member(verifier: Verifier) -> None:
    """It serves, has a leader, votes, and is of the others' etcd. How they are is no finding about this host."""
    admin = verifier.bundle("isthmus_agent.etcd_admin")
    errors = verifier.bundle("isthmus_agent.kvstore.errors")
    member = verifier.bundle("isthmus_mesh.spec").NodeSpec.from_dict(verifier.spec).member
    words = "see `journalctl -u isthmus-etcd` there"
    try:
        connect = admin.EtcdConnector(verifier.cluster, directory=verifier.PKI)
        with connect([admin.local_endpoint(member)], timeout=verifier.timeout) as client:
            own = [entry for entry in client.member_list() if entry.name == member.name]
    except (errors.EtcdError, OSError) as exc:
        verifier.check("etcd", False, f"member {member.name} does not serve: {exc}; {words}")
        return
    verifier.check("etcd", own and not own[0].learner, f"member {member.name} does not vote; {words}")
    apart = etcd_trouble.divided(admin, errors, member, connect)
    verifier.check("etcd", not apart, apart)


def check_revoked(verifier: Verifier) -> None:
    """etcd refuses what is in this file, whatever the record says."""
    known = verifier.record.get(f"clusters/{verifier.cluster}", {}).get("crl")
    if known is None:
        return
    path = f"{verifier.PKI}/{etcd_unit.REVOKED}"
    problem = verifier.bundle("isthmus_agent.revocation").outdated(read_bytes(path), known)
    verifier.check("etcd", not problem, f"{path}: {problem}; {SITE}")
    settings = etcd_unit.settings((read_bytes(etcd_unit.ENVIRONMENT) or b"").decode(errors="replace"))
    listed = all(settings.get(name) == path for name in ("ETCD_CLIENT_CRL_FILE", "ETCD_PEER_CRL_FILE"))
    verifier.check("etcd", listed, f"{etcd_unit.ENVIRONMENT} does not tell etcd to read {path}; {SITE}")


def _why_not(verifier: Verifier, admin: Any, errors: Any, member: Any) -> str:
    """Why the member on this host does not serve, and what to do."""
    others = admin.other_endpoints(member)
    journal = units.Systemd(verifier.module).journal("isthmus-etcd.service", etcd_trouble.JOURNAL_LINES)
    why = etcd_trouble.of_host(verifier.cluster, not others, journal)
    if not why and others:
        connect = admin.EtcdConnector(verifier.cluster, directory=verifier.PKI)
        why = etcd_trouble.divided(admin, errors, member, connect)
    if not why and others:
        why = etcd_trouble.of_others(verifier.cluster, admin.survey(member, connect, verifier.timeout).describe())
    return why or "Next: see `journalctl -u isthmus-etcd` there"


def _check_answers(verifier: Verifier, client: Any, entry: Any, errors: Any) -> None:
    try:
        client.status(timeout=verifier.timeout)
    except errors.EtcdError as exc:
        name = entry.name or entry.peer_urls[0]
        words = f"`systemctl start isthmus-etcd` there; when its data is lost, {SITE}, and it joins anew; when its "
        words += f"host is gone for good, run it with -e isthmus_prune=member/{verifier.cluster}/{name}"
        verifier.check("etcd", False, f"member {name} does not answer: {exc.reason}. Next: {words}")
    else:
        verifier.proofs["etcd"] += 1


def _check_rights(verifier: Verifier, endpoint: str, client_module: Any, errors: Any) -> None:
    """With the agent's certificate a key of another writer cannot be written. The transaction's condition never
    holds, so nothing is written even when access control is broken; etcd checks rights before conditions."""
    sync = verifier.bundle("isthmus_agent.kvstore.sync")
    keys = verifier.bundle("isthmus_mesh.keys")
    etcd = verifier.spec["etcd"]
    foreign = keys.service_definition_key("isthmus-verify", "forbidden")
    never = client_module.Compare(foreign, "version", ">", 2**62)
    try:
        with sync.SyncEtcd([endpoint], etcd["ca"], etcd["cert"], etcd["key"], timeout=verifier.timeout) as client:
            client.txn([never], [client_module.Put(foreign, "")], [])
    except errors.EtcdError as exc:
        verifier.check("etcd", "permission" in str(exc).lower(), f"the agent's certificate is not usable: {exc}")
    except OSError as exc:
        verifier.check("etcd", False, f"the agent's certificate is not usable: {exc}; {SITE}")
    else:
        verifier.check("etcd", False, f"an agent may write {foreign}; its role has too many rights; {SITE}")


def _check_services(
    verifier: Verifier, client: Any, present: Sequence[Mapping[str, Any]], absent: Sequence[str]
) -> None:
    """What `isthmus.mesh.site` would write of these services, which is nothing."""
    admin = verifier.bundle("isthmus_agent.estate_admin")
    try:
        due = admin.write_services(client, present, absent, estate.OWNER, apply=False)
    except admin.EstateError as exc:
        verifier.check("etcd", False, f"{exc}")
        return
    for change in due:
        words = "a service of the inventory, is missing" if not change.before else "a service, is not the inventory's"
        if not change.after:
            words = "a service that the inventory takes away, is still there"
        verifier.check("etcd", False, f"{change.key}, {words}; {SITE}")


def _check_published(verifier: Verifier, client: Any) -> None:
    """What peers and agents read: the record, definitions, nodes, and the mirror of every peer that we reach."""
    keys = verifier.bundle("isthmus_mesh.keys")
    for name, document in verifier.record.items():
        key = keys.ROSTER if name == "roster" else keys.estate_cluster_key(name.split("/", 1)[1])
        found = client.get(key)
        try:
            revision = None if found is None else json.loads(found.value)["revision"]
        except (ValueError, TypeError, KeyError):
            verifier.check("etcd", False, f"{key} is damaged: it is no document with a revision; {SITE}")
            continue
        verifier.check(
            "etcd",
            revision == document["revision"],
            f"{key} has revision {revision}, not {document['revision']}; {SITE}",
        )
    for service in verifier.services:
        _check_services(verifier, client, [service], [])
    _check_services(verifier, client, [], verifier.module.params["absent_services"])
    registrar = "see `journalctl -u isthmus-registrar` on the etcd hosts of "
    for host in verifier.module.params["hosts"]:
        own = host["cluster"] == verifier.cluster
        key = keys.node_key(host["cluster"], host["name"], cached=not own)
        what = f"{host['name']} is not {'published' if own else 'mirrored'}"
        words = f"{key} is missing: {what}; {registrar}{verifier.cluster}"
        verifier.check("etcd", client.get(key) is not None, words)
