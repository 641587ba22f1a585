# SPDX-License-Identifier: GPL-3.0-or-later
"""Registrars on real etcd servers with TLS and RBAC: publish, mirror, fail over, survive lost and old etcds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.etcd_fixture import EtcdServer, require_etcd
from integration.registrar_cluster import Cluster, running, until
from isthmus_agent.kvstore import canary_cluster_id
from isthmus_agent.registrar import mirror, recall, service
from isthmus_agent.registrar.leader import Election, NotLeader, Writer
from isthmus_agent.registrar.publish import Change, Publication, Publisher
from isthmus_agent.registrar.service import utc_now
from isthmus_mesh import keys
from isthmus_mesh.documents import PeerStatus

ROOT = Path(__file__).parents[2]


@pytest.fixture
def onprem(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, "onprem") as cluster:
        yield cluster


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, "cloud") as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def short_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken out is gone after 4 s instead of 35."""
    monkeypatch.setattr(service, "DRAIN", 4.0)


def kinds(dump: dict[str, str]) -> dict[str, set[str]]:
    return {kind: {key for key in dump if f"/{kind}/v1/" in key} for kind in keys.KINDS}


def published(cluster: Cluster, hosts: int) -> bool:
    dump = cluster.server.dump("cilium/state/")
    web = dump.get(keys.service_key(cluster.name, "shop", "web"), '{"backends":{}}')
    return len(json.loads(web)["backends"]) == hosts and len(kinds(dump)["nodes"]) == hosts


def mirrored(cluster: Cluster, peer: Cluster, hosts: int) -> bool:
    dump = cluster.server.dump("cilium/")
    web = dump.get(keys.service_key(peer.name, "shop", "web", cached=True), '{"backends":{}}')
    canaries = all(keys.canary_key(peer.name, kind, cached=True) in dump for kind in keys.KINDS)
    return canaries and len(json.loads(web)["backends"]) == hosts


def status(cluster: Cluster, peer: str) -> PeerStatus:
    return PeerStatus.from_json(cluster.server.dump(keys.peer_status_key(peer))[keys.peer_status_key(peer)])


def revision(cluster: Cluster) -> int:
    shown = json.loads(cluster.server.etcdctl("endpoint", "status", "-w", "json"))
    return int(shown[0]["Status"]["header"]["revision"])


def test_publishes_and_mirrors_key_by_key(onprem: Cluster, cloud: Cluster) -> None:
    async def run() -> None:
        onprem.put_all()
        cloud.put_all(1)
        async with running(onprem.registrar(cloud), cloud.registrar(onprem)):
            await until(lambda: mirrored(onprem, cloud, 1) and mirrored(cloud, onprem, 2), "both mirrored")
            own, peers = onprem.server.dump("cilium/"), cloud.server.dump("cilium/")
            config = '{"id":1,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255}}'
            assert own[keys.cluster_config_key("onprem")] == config
            cached = '{"id":1,"capabilities":{"syncedCanaries":true,"cached":true,"maxConnectedClusters":255}}'
            assert peers[keys.cluster_config_key("onprem")] == cached
            assert keys.HEARTBEAT in own
            for kind in keys.KINDS:
                mine, theirs = keys.state_prefix(kind, "onprem"), keys.cache_prefix(kind, "onprem")
                state = {key[len(mine) :]: value for key, value in own.items() if key.startswith(mine)}
                cache = {key[len(theirs) :]: value for key, value in peers.items() if key.startswith(theirs)}
                assert state == cache
                assert state
                for key, dump in (
                    (keys.canary_key("onprem", kind), own),
                    (keys.canary_key("onprem", kind, cached=True), peers),
                ):
                    cluster_id = canary_cluster_id(dump[key].encode())
                    server = onprem.server if dump is own else cloud.server
                    shown = json.loads(server.etcdctl("endpoint", "status", "-w", "json"))
                    assert cluster_id == shown[0]["Status"]["header"]["cluster_id"]
            found = await until(
                lambda: (s := status(cloud, "onprem")).state == "connected" and s.keys["ip"] == 2 and s, "status"
            )
            assert found.refused == {}
            assert found.endpoint == onprem.server.endpoint
            # nothing has a lease but the leader
            with onprem.server.sync_client() as client:
                leased = [kv.key for kv in client.range("").kvs if kv.lease]
            assert leased == [keys.LEADER]
            # a change goes all the way, a withdrawal too
            onprem.put(onprem.web(1, ready=False))
            await until(lambda: mirrored(cloud, onprem, 1), "not ready one withdrawn")

    asyncio.run(run())


def test_nothing_before_the_roster_and_only_differences_after_a_restart(onprem: Cluster) -> None:
    async def run() -> None:
        onprem.put(onprem.service(), onprem.node(1), onprem.web(1))
        async with running(onprem.registrar()):
            await until(lambda: onprem.server.dump(keys.LEADER), "leads")
            await asyncio.sleep(1.5)  # more than a turn of its loop: it must not publish
            assert onprem.server.dump("cilium/") == {}
            assert onprem.server.dump(keys.ALLOC_PREFIX) == {}
            onprem.put(onprem.record(1))
            await until(lambda: len(onprem.server.dump("cilium/synced/")) == 4, "canaries")
            before = onprem.server.dump("cilium/state/")
            allocated = onprem.server.dump(keys.ALLOC_PREFIX)
            assert kinds(before)["services"]
        assert onprem.server.dump(keys.LEADER) == {}, "the leadership is given back at once"
        with onprem.server.sync_client() as client:
            revisions = {kv.key: kv.mod_revision for kv in client.range("cilium/state/").kvs}
        async with running(onprem.registrar(host="h2")):
            canary = keys.canary_key("onprem", "nodes")
            start = time.time()
            await until(lambda: "h2" in "".join(onprem.server.dump(keys.LEADER).values()), "other leads")
            with onprem.server.sync_client() as client:
                highest = max(revisions.values())
                await until(lambda: client.get(canary).mod_revision > highest, "canary anew")  # type: ignore[union-attr]
                assert {kv.key: kv.mod_revision for kv in client.range("cilium/state/").kvs} == revisions
        assert onprem.server.dump("cilium/state/") == before
        assert onprem.server.dump(keys.ALLOC_PREFIX) == allocated
        assert time.time() - start < 20

    asyncio.run(run())


def test_nothing_is_computed_while_nothing_changes(onprem: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 0
    run_all = Publisher.run

    def counting(publisher: Publisher) -> Publication:
        nonlocal computed
        computed += 1
        return run_all(publisher)

    monkeypatch.setattr(Publisher, "run", counting)

    async def run() -> None:
        onprem.put_all(2)
        async with running(onprem.registrar()):
            await until(lambda: published(onprem, 2) and canaries(onprem), "published")
            await asyncio.sleep(2.5)
            before = computed
            await asyncio.sleep(3.5)  # some turns of its loop
            assert computed == before
            onprem.put(onprem.web(1, ready=False))
            await until(lambda: not published(onprem, 2), "a change is seen", 5.0)
            document = json.loads(onprem.record(2, 4)[keys.estate_cluster_key("onprem")])
            before = computed
            onprem.estate_file.write_text(json.dumps({"clusters/onprem": document}))
            await until(lambda: computed > before, "so is the host's copy", 5.0)

    asyncio.run(run())


def test_record_that_is_older_than_the_hosts_copy_withdraws_nothing(onprem: Cluster) -> None:
    async def run() -> None:
        onprem.put_all(2)
        async with running(onprem.registrar()):
            await until(lambda: published(onprem, 2) and len(onprem.server.dump("cilium/synced/")) == 4, "published")
        onprem.server.etcdctl("del", "--prefix", "cilium/synced/")
        document = json.loads(onprem.record(2, 5)[keys.estate_cluster_key("onprem")])
        onprem.estate_file.write_text(json.dumps({"clusters/onprem": document}))
        onprem.put(onprem.record(1, 4))
        async with running(onprem.registrar()):
            before = onprem.server.dump(keys.HEARTBEAT)
            onprem.server.etcdctl("del", keys.HEARTBEAT)
            await until(lambda: onprem.server.dump(keys.HEARTBEAT), "it is at work")
            assert before
            assert published(onprem, 2)
            assert onprem.server.dump("cilium/synced/") == {}
            onprem.put(onprem.record(1, 6))
            await until(lambda: len(onprem.server.dump("cilium/synced/")) == 4, "published again")
            await until(lambda: published(onprem, 1), "withdrawn")

    asyncio.run(run())


def test_hostile_peer_is_refused_counted_and_named(onprem: Cluster, cloud: Cluster) -> None:
    async def run() -> None:
        onprem.put_all(1)
        cloud.put_all(1)
        async with running(onprem.registrar(cloud), cloud.registrar()):
            await until(lambda: mirrored(onprem, cloud, 1), "mirrored")
        good = onprem.server.dump("cilium/cache/")
        ip = keys.ip_key("10.102.1.2")
        pair = json.loads(cloud.server.dump(ip)[ip])
        node_key = keys.node_key("cloud", "h1")
        node = json.loads(cloud.server.dump(node_key)[node_key])
        stolen = json.dumps({**pair, "IP": "10.101.1.2"})
        labels = "k8s:io.cilium.k8s.policy.cluster=onprem;"
        hostile = {
            keys.ip_key("10.101.1.2"): stolen,
            ip: json.dumps({**pair, "ID": 65540}),
            keys.ip_key("10.102.1.9"): json.dumps({**pair, "IP": "10.102.1.9", "HostIP": "198.18.1.11"}),
            keys.identity_key(65540): labels,
            keys.identity_key(131099): labels,
            keys.node_key("onprem", "h1"): json.dumps(node),
            keys.node_key("cloud", "evil"): json.dumps(
                {**node, "Name": "evil", "IPAddresses": [{"Type": "InternalIP", "IP": "198.18.1.11"}]}
            ),
            keys.node_key("cloud", "wide"): json.dumps(
                {**node, "Name": "wide", "IPv4AllocCIDR": {"IP": "10.0.0.0", "Mask": "/wAAAA=="}}
            ),
            keys.service_key("cloud", "shop", "web"): "{",
            keys.service_key("cloud", "shop", "db"): json.dumps(
                {"cluster": "cloud", "namespace": "shop", "name": "db", "clusterID": 1}
            ),
        }
        cloud.put(hostile)
        async with running(onprem.registrar(cloud)):
            found = await until(
                lambda: (s := status(onprem, "cloud")).state == "connected" and sum(s.refused.values()) == 9 and s,
                "all refused",
            )
            assert onprem.server.dump("cilium/cache/") == good
            assert found.refused_last is not None
            assert found.refused == {
                "address is not in the cluster's ranges": 1,
                "identity is not the cluster's": 2,
                "address is another cluster's machine": 2,
                "labels do not name the cluster": 1,
                "range is not the cluster's": 1,
                "not JSON": 1,
                "cluster id is not the cluster's": 1,
            }
            cloud.put({keys.cluster_config_key("cloud"): '{"id":1,"capabilities":{"syncedCanaries":true}}'})
        async with running(onprem.registrar(cloud)):
            await until(lambda: status(onprem, "cloud").state == "refused", "another id is refused as a whole")
            assert onprem.server.dump("cilium/cache/") == good

    asyncio.run(run())


def test_mirror_that_somebody_changed_is_repaired(
    onprem: Cluster, cloud: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "AUDIT_INTERVAL", 2.0)

    async def run() -> None:
        onprem.put_all(1)
        cloud.put_all(2)
        async with running(onprem.registrar(cloud), cloud.registrar()):
            await until(lambda: mirrored(onprem, cloud, 2), "mirrored")
            config = keys.cluster_config_key("cloud")
            good = {**onprem.server.dump("cilium/cache/"), **onprem.server.dump(config)}
            onprem.server.etcdctl("del", keys.node_key("cloud", "h1", cached=True))
            onprem.server.etcdctl("del", config)
            onprem.put({keys.service_key("cloud", "shop", "web", cached=True): "{}"})
            onprem.put({keys.ip_key("10.102.9.9", "cloud"): "{}"})
            await until(
                lambda: {**onprem.server.dump("cilium/cache/"), **onprem.server.dump(config)} == good, "as it was"
            )

    asyncio.run(run())


def test_peer_out_of_reach_keeps_its_state_and_its_age_grows(onprem: Cluster, cloud: Cluster) -> None:
    async def run() -> None:
        onprem.put_all(1)
        cloud.put_all(2)
        async with running(cloud.registrar()):
            await until(lambda: published(cloud, 2) and len(cloud.server.dump("cilium/synced/")) == 4, "published")
        async with running(onprem.registrar(cloud)):
            await until(lambda: mirrored(onprem, cloud, 2), "mirrored")
            good = onprem.server.dump("cilium/cache/")
            cloud.server.stop(signal.SIGKILL)
            found = await until(lambda: (s := status(onprem, "cloud")).state == "unreachable" and s, "noticed")
            assert onprem.server.dump("cilium/cache/") == good
        async with running(onprem.registrar(cloud)):
            await until(lambda: onprem.server.dump(keys.LEADER), "a new process leads")
            await until(lambda: status(onprem, "cloud").state == "unreachable", "still out of reach")
            again = status(onprem, "cloud")
            assert (again.last_proof, again.keys) == (found.last_proof, found.keys)
            assert onprem.server.dump("cilium/cache/") == good
            cloud.server.start()
            cloud.put(cloud.web(1, ready=False))
            cloud.server.etcdctl("del", keys.node_key("cloud", "h2"))
            await until(lambda: status(onprem, "cloud").state == "connected", "connected again")
            await until(
                lambda: keys.node_key("cloud", "h2", cached=True) not in onprem.server.dump("cilium/"), "deleted"
            )

    asyncio.run(run())


@pytest.mark.parametrize("how", ["restored", "wiped"])
def test_lost_history_withdraws_nothing_and_leaves_nobody_stale(
    onprem: Cluster, cloud: Cluster, how: str, tmp_path: Path
) -> None:
    """onprem's etcd goes back to an old snapshot, or starts empty, under running registrars of both clusters."""

    async def run() -> None:
        cloud.put_all(1)
        onprem.put_all(1)
        async with running(onprem.registrar(cloud), cloud.registrar(onprem)):
            await until(lambda: mirrored(onprem, cloud, 1) and mirrored(cloud, onprem, 1), "mirrored")
            with onprem.server.sync_client() as client:
                client.snapshot(tmp_path / "snap.db")
            onprem.put(onprem.node(2), onprem.web(2), onprem.record(2, 2))
            await until(lambda: mirrored(cloud, onprem, 2), "younger ones mirrored")
            good = cloud.server.dump("cilium/cache/")
            state = onprem.server.dump("cilium/state/")
            allocated = {k: v for k, v in onprem.server.dump(keys.ALLOC_PREFIX).items() if "/peers/" not in k}
            cache = onprem.server.dump("cilium/cache/")
            await asyncio.to_thread(onprem.server.stop)
            if how == "restored":
                onprem.server.restore(tmp_path / "snap.db", token="after-restore")  # noqa: S106 - no secret
                await asyncio.to_thread(onprem.server.start)
            else:
                onprem.server.wipe()
                onprem.server.token = "after-wipe"  # noqa: S105 - no secret
                await asyncio.to_thread(onprem.server.start)
                await asyncio.to_thread(onprem.prepare)
                await until(lambda: onprem.server.dump(keys.LEADER), "leads again")
                await asyncio.sleep(1.5)  # more than a turn of its loop: nothing without a roster
                assert onprem.server.dump("cilium/") == {}
                assert cloud.server.dump("cilium/cache/") == good
                onprem.put(onprem.service(), onprem.record(2, 3))  # `site`; agents are still silent
            await until(lambda: onprem.server.dump("cilium/state/") == state, "all published again")
            await until(lambda: len(onprem.server.dump("cilium/synced/onprem/")) == 4, "canaries")
            assert {k: v for k, v in onprem.server.dump(keys.ALLOC_PREFIX).items() if "/peers/" not in k} == allocated
            await until(lambda: onprem.server.dump("cilium/cache/") == cache, "mirror filled again")
            await until(lambda: status(cloud, "onprem").state == "connected", "peer connected again")
            assert cloud.server.dump("cilium/cache/") == good
            # and nobody is stale
            onprem.put(onprem.record(2, 4), onprem.node(1), onprem.web(1), onprem.node(2), onprem.web(2, ready=False))
            await until(lambda: mirrored(cloud, onprem, 1), "a change still arrives")
            onprem.put(onprem.record(1, 5))
            await until(
                lambda: keys.node_key("onprem", "h2", cached=True) not in cloud.server.dump("cilium/"), "removal"
            )

    asyncio.run(run())


def test_inputs_are_believed_again_once_site_has_run(
    onprem: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A definition that is younger than the restored snapshot and that the inventory has no more."""
    monkeypatch.setattr(service, "SITE_SETTLE", 1.5)

    async def run() -> None:
        onprem.put_all(1)
        registrar = onprem.registrar()
        api = keys.service_key("onprem", "shop", "api")
        async with running(registrar):
            await until(lambda: published(onprem, 1) and canaries(onprem), "published")
            with onprem.server.sync_client() as client:
                client.snapshot(tmp_path / "snap.db")
            onprem.put(onprem.service("api"))
            await until(lambda: api in onprem.server.dump("cilium/state/"), "the younger one")
            await asyncio.to_thread(onprem.server.stop)
            onprem.server.restore(tmp_path / "snap.db", token="after-restore")  # noqa: S106 - no secret
            await asyncio.to_thread(onprem.server.start)
            await until(lambda: api in onprem.server.dump("cilium/state/"), "published again")
            await asyncio.sleep(2.5)  # longer than SITE_SETTLE
            assert api in onprem.server.dump("cilium/state/")
            assert not registrar.services.trusted
            onprem.put(onprem.record(1))  # `site`
            await until(lambda: api not in onprem.server.dump("cilium/state/"), "withdrawn")
            assert published(onprem, 1)
            await until(lambda: all(store.trusted for store in registrar.stores), "all believed")

    asyncio.run(run())


def allocated(cluster: Cluster) -> dict[str, str]:
    return {k: v for k, v in cluster.server.dump(keys.ALLOC_PREFIX).items() if not k.startswith(keys.PEERS_PREFIX)}


def canaries(cluster: Cluster) -> set[str]:
    return set(cluster.server.dump(f"cilium/synced/{cluster.name}/cilium/state/"))


@pytest.mark.parametrize("token", ["test", "another"])
def test_lost_disk_and_new_processes_change_no_owner(onprem: Cluster, token: str) -> None:
    """The etcd starts empty while no registrar runs; numbers and addresses are remembered on its disk."""

    async def run() -> None:
        released = {"labels": "k8s:app=old;", "created": "2026-01-01T00:00:00Z", "released": utc_now()}
        onprem.put({keys.alloc_identity_key(65537): json.dumps(released)})
        onprem.put_all(2)
        async with running(onprem.registrar()):
            await until(lambda: published(onprem, 2) and canaries(onprem), "published")
            onprem.put(onprem.service("api"))  # comes later than web, so it has the higher address
            await until(lambda: keys.vip_key("shop", "api") in allocated(onprem), "second service")
            await until(lambda: len(onprem.server.dump("cilium/state/services/")) == 2, "published too")
        dealt, state = allocated(onprem), onprem.server.dump("cilium/state/")
        assert json.loads(dealt[keys.vip_key("shop", "api")])["ipv4"] == "10.111.0.2"
        assert keys.identity_key(65538) in state
        await asyncio.to_thread(onprem.lose_everything, token)
        onprem.put(onprem.service(), onprem.service("api"), onprem.record(2))  # `site`; agents are still silent
        async with running(onprem.registrar()):
            await until(lambda: onprem.server.dump("cilium/state/") == state, "all published again")
            assert allocated(onprem) == dealt
            assert not canaries(onprem)
            onprem.put(onprem.node(1), onprem.web(1), onprem.node(2), onprem.web(2))
            await until(lambda: canaries(onprem), "canaries after the reports")
            assert onprem.server.dump("cilium/state/") == state

    asyncio.run(run())


def test_what_etcd_has_counts_for_more_than_an_old_disk(onprem: Cluster) -> None:
    """A registrar whose disk is of another time comes to an etcd that another registrar has filled since."""

    async def run() -> None:
        onprem.put_all(1)
        async with running(onprem.registrar(host="h2")):
            await until(lambda: published(onprem, 1) and canaries(onprem), "published")
        await asyncio.to_thread(onprem.lose_everything, "another")
        onprem.put(onprem.service("api"))
        onprem.put_all(1)
        async with running(onprem.registrar()):
            await until(lambda: len(onprem.server.dump("cilium/state/services/")) == 2 and canaries(onprem), "filled")
        state, dealt = onprem.server.dump("cilium/state/"), allocated(onprem)
        assert json.loads(dealt[keys.vip_key("shop", "api")])["ipv4"] == "10.111.0.1"
        onprem.server.etcdctl("del", keys.HEARTBEAT)
        async with running(onprem.registrar(host="h2")):
            await until(lambda: onprem.server.dump(keys.HEARTBEAT), "the other leads")
            assert (onprem.server.dump("cilium/state/"), allocated(onprem)) == (state, dealt)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["all report", "one stays silent"])
def test_lost_disk_of_all_is_not_published_as_an_empty_cluster(
    onprem: Cluster, cloud: Cluster, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file, no etcd, no reports yet: a peer keeps what it knows until the agents have reported."""
    if how == "one stays silent":
        monkeypatch.setattr(service, "REPORT_GRACE", 4.0)

    async def run() -> None:
        onprem.put_all(2)
        cloud.put_all(1)
        async with running(cloud.registrar(onprem)):
            async with running(onprem.registrar(host="h1")):
                await until(lambda: mirrored(cloud, onprem, 2), "mirrored")
            good = cloud.server.dump("cilium/cache/")
            await asyncio.to_thread(onprem.lose_everything, "another")
            onprem.put(onprem.service(), onprem.record(2))
            async with running(onprem.registrar(host="h3")):
                await until(lambda: keys.vip_key("shop", "web") in allocated(onprem), "at work")
                onprem.put(onprem.node(1), onprem.web(1))
                await until(lambda: keys.node_key("onprem", "h1") in onprem.server.dump("cilium/"), "first reported")
                await asyncio.sleep(1.5)  # more than a turn of its loop
                assert not canaries(onprem)
                assert not onprem.server.dump("cilium/state/services/")
                assert cloud.server.dump("cilium/cache/") == good
                if how == "all report":
                    onprem.put(onprem.node(2), onprem.web(2))
                await until(lambda: canaries(onprem), "canaries")
                if how == "all report":
                    assert published(onprem, 2)
                    await until(lambda: status(cloud, "onprem").state == "connected", "connected again")
                    assert cloud.server.dump("cilium/cache/") == good

    asyncio.run(run())


def test_after_a_total_loss_the_former_numbers_are_read_back_from_a_peer(onprem: Cluster, cloud: Cluster) -> None:
    """No etcd, no file: the peer's mirror is the last witness. What it has beside that, or invents, is not taken."""

    async def run() -> None:
        released = {"labels": "k8s:app=old;", "created": "2026-01-01T00:00:00Z", "released": utc_now()}
        onprem.put({keys.alloc_identity_key(65537): json.dumps(released)})
        onprem.put_all(2)
        cloud.put_all(1)
        async with running(cloud.registrar(onprem), onprem.registrar()):
            await until(lambda: mirrored(cloud, onprem, 2), "mirrored")
            onprem.put(onprem.service("api"))  # comes later than web, so it has the higher address
            api = keys.service_key("onprem", "shop", "api", cached=True)
            await until(lambda: api in cloud.server.dump(api), "the second service too")
            dealt, state = allocated(onprem), onprem.server.dump("cilium/state/")
        assert keys.identity_key(65538) in state
        forged = json.loads(cloud.server.dump(api)[api])
        forged.update(name="evil", frontends={"10.112.0.9": {}})
        foreign = "k8s:io.cilium.k8s.policy.cluster=cloud;"
        cloud.put(
            {
                keys.service_key("onprem", "shop", "evil", cached=True): json.dumps(forged),
                keys.identity_key(131080, "onprem"): foreign,
                keys.identity_key(65999, "onprem"): foreign,
                keys.identity_key(65998, "onprem"): "no labels",
            }
        )
        await asyncio.to_thread(onprem.lose_everything, "another")
        onprem.put(onprem.service(), onprem.service("api"), onprem.record(2))  # `site`; agents are still silent
        async with running(onprem.registrar(cloud, host="h3")):
            await until(lambda: keys.alloc_identity_key(65538) in allocated(onprem), "read back")
            onprem.put(onprem.node(1), onprem.web(1), onprem.node(2), onprem.web(2))
            await until(lambda: published(onprem, 2) and canaries(onprem), "published again")
            now = allocated(onprem)
        assert {key: json.loads(now[key])["ipv4"] for key in now if key.startswith(keys.VIPS_PREFIX)} == {
            keys.vip_key("shop", "web"): "10.111.0.1",
            keys.vip_key("shop", "api"): "10.111.0.2",
        }
        assert [key for key in now if key.startswith(keys.ALLOC_IDENTITIES_PREFIX)] == [keys.alloc_identity_key(65538)]
        assert onprem.server.dump("cilium/state/") == state
        assert dealt[keys.vip_key("shop", "api")] == now[keys.vip_key("shop", "api")]

    asyncio.run(run())


def test_a_peer_that_is_silent_is_not_waited_for_long(
    onprem: Cluster, cloud: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "WAIT", 3.0)

    async def run() -> None:
        onprem.put_all(1)
        cloud.server.stop(signal.SIGKILL)
        began = time.monotonic()
        async with running(onprem.registrar(cloud)):
            await until(lambda: published(onprem, 1), "published")
        assert time.monotonic() - began > 3.0

    asyncio.run(run())


def test_certificates_that_are_gone_for_a_while_do_not_end_the_registrar(onprem: Cluster) -> None:
    async def run() -> None:
        onprem.put_all(1)
        registrar = onprem.registrar()
        directory = onprem.server.ca.directory
        away = directory.with_name("away")
        await asyncio.to_thread(onprem.server.stop)
        directory.rename(away)
        async with running(registrar):
            await until(lambda: all(store.error for store in registrar.stores), "noticed")
            away.rename(directory)
            await asyncio.to_thread(onprem.server.start)
            await until(lambda: published(onprem, 1), "published")

    asyncio.run(run())


def test_lost_disk_drops_no_peer_that_is_out_of_reach(onprem: Cluster, cloud: Cluster) -> None:
    """Agents drop a peer whose cluster-config is missing from an etcd whose canaries are valid."""

    async def run() -> None:
        onprem.put_all(1)
        cloud.put_all(1)
        async with running(onprem.registrar(cloud), cloud.registrar()):
            await until(lambda: mirrored(onprem, cloud, 1) and canaries(onprem), "mirrored")
        config = onprem.server.dump(keys.cluster_config_key("cloud"))
        cloud.server.stop(signal.SIGKILL)
        await asyncio.to_thread(onprem.lose_everything, "another")
        onprem.put_all(1)
        async with running(onprem.registrar(cloud)):
            await until(lambda: canaries(onprem), "canaries")
            assert onprem.server.dump(keys.cluster_config_key("cloud")) == config
            with onprem.server.sync_client() as client:
                [first] = client.range(keys.cluster_config_key("cloud")).kvs
                created = [kv.create_revision for kv in client.range(keys.canary_prefix("onprem")).kvs]
            assert first.create_revision < min(created)
            await until(lambda: status(onprem, "cloud").state == "unreachable", "noticed")
            assert onprem.server.dump("cilium/synced/cloud/") == {}
            assert onprem.server.dump("cilium/cache/") == {}

    asyncio.run(run())


@contextlib.contextmanager
def process(cluster: Cluster, host: str, endpoints: list[str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    config = cluster.directory / f"{host}.json"
    document = cluster.spec_document(host)
    document["etcd"]["endpoints"] = endpoints or document["etcd"]["endpoints"]
    config.write_text(json.dumps(document))
    command = [sys.executable, "-m", "isthmus_agent.registrar.main", "--config", str(config)]
    log = (cluster.directory / f"{host}.log").open("wb")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "agent")}
    command += ["--estate", str(cluster.estate_file), "--state-dir", str(cluster.state_directory(host))]
    child = subprocess.Popen(command, env=environment, stderr=log)
    try:
        yield child
    finally:
        log.close()
        if child.poll() is None:
            child.kill()
        child.wait(timeout=10)


async def leader(cluster: Cluster, host: str, deadline: float = 20.0) -> float:
    start = time.monotonic()

    def leads() -> bool:
        value = cluster.server.dump(keys.LEADER).get(keys.LEADER)
        return value is not None and json.loads(value)["host"] == host

    await until(leads, f"{host} leads", deadline)
    return time.monotonic() - start


def test_killed_leader_is_followed_within_five_seconds_and_nothing_is_withdrawn(onprem: Cluster) -> None:
    async def run() -> None:
        onprem.put_all(2)
        with process(onprem, "h1") as first:
            await leader(onprem, "h1")
            with process(onprem, "h2") as second:
                await until(lambda: published(onprem, 2), "published")
                state, since = onprem.server.dump("cilium/state/"), revision(onprem)
                first.send_signal(signal.SIGKILL)
                assert await leader(onprem, "h2") < 5.0
                onprem.put(onprem.web(1, ready=False))
                await until(lambda: published(onprem, 2) is False, "the new leader publishes")
                onprem.put(onprem.web(1))
                await until(lambda: onprem.server.dump("cilium/state/") == state, "the same state")
                with onprem.server.sync_client() as client:
                    changed = [kv.key for kv in client.range("cilium/state/").kvs if kv.mod_revision > since]
                assert changed == [keys.service_key("onprem", "shop", "web")]
                second.send_signal(signal.SIGTERM)
                await asyncio.to_thread(second.wait, 10)
                assert second.returncode == 0
                assert onprem.server.dump(keys.LEADER) == {}, "the leadership is given back at once"

    asyncio.run(run())


def test_write_of_a_term_that_is_over_is_refused_whole(onprem: Cluster) -> None:
    """The fence itself: the old term's lease still lives, but the leader's key was made anew."""

    async def run() -> None:
        async with onprem.server.client("isthmus-registrar") as client:
            old = await Election(client, "h1", "h1").campaign(utc_now)
            writer = Writer(client, old)
            await writer.apply([Change("cilium/state/a", "1")])
            assert await client.delete(keys.LEADER)
            new = await Election(client, "h2", "h2").campaign(utc_now)
            assert new.create_revision > old.create_revision
            with pytest.raises(NotLeader, match="another registrar leads"):
                await writer.apply([Change(f"cilium/state/{number}", "2") for number in range(150)])
            await Writer(client, new).apply([Change("cilium/state/b", "1")])
            assert onprem.server.dump("cilium/state/") == {"cilium/state/a": "1", "cilium/state/b": "1"}

    asyncio.run(run())


def test_paused_leader_cannot_write_when_it_wakes(onprem: Cluster) -> None:
    """It wakes with work in its hands; the fence refuses the write, and it follows then."""

    async def run() -> None:
        onprem.put_all(1)
        with process(onprem, "h1") as first:
            await until(lambda: published(onprem, 1), "published")
            first.send_signal(signal.SIGSTOP)
            with process(onprem, "h2") as second:
                await leader(onprem, "h2")
                second.send_signal(signal.SIGSTOP)
                onprem.put(onprem.web(1, ready=False))
                # As if h2 led for long: a leader's key that no process renews.
                onprem.server.etcdctl("put", keys.LEADER, json.dumps({"host": "someone"}))
                since = revision(onprem)
                first.send_signal(signal.SIGCONT)
                log = onprem.directory / "h1.log"
                await until(lambda: "no longer leading" in log.read_text(), "h1 noticed")
                await asyncio.sleep(1.0)  # time in which it could write if it were not fenced
                with onprem.server.sync_client() as client:
                    written = [kv.key for kv in client.range("").kvs if kv.mod_revision > since]
                assert written == []
                assert published(onprem, 1)

    asyncio.run(run())


def test_power_off_of_the_machine_that_leads_both_costs_less_than_ten_seconds(tmp_path: Path) -> None:
    """Three members; the machine with etcd's leader and the leading registrar falls silent without a word."""

    async def run(cluster: Cluster, members: list[EtcdServer]) -> None:
        shown = json.loads(cluster.server.etcdctl("endpoint", "status", "-w", "json"))
        status = shown[0]["Status"]
        assert status["leader"] == status["header"]["member_id"], "the first member leads: it was moved there"
        cluster.put_all(2)
        endpoints = [member.endpoint for member in members]
        with process(cluster, "h1", endpoints) as first:
            await leader(cluster, "h1")
            with process(cluster, "h2", [endpoints[1], endpoints[0], endpoints[2]]):
                await until(lambda: published(cluster, 2), "published")
                state = cluster.server.dump("cilium/state/")
                await until(
                    lambda: "watching isthmus/v1/estate/" in (cluster.directory / "h2.log").read_text(), "h2 runs"
                )
                first.send_signal(signal.SIGSTOP)
                members[0].signal(signal.SIGSTOP)
                cluster.server = members[1]
                assert await leader(cluster, "h2", 10.0) < 10.0
                cluster.put(cluster.web(1, ready=False))
                await until(lambda: not published(cluster, 2), "the new leader publishes", 10.0)
                cluster.put(cluster.web(1))
                await until(lambda: cluster.server.dump("cilium/state/") == state, "the same state")

    cluster = Cluster(tmp_path, "onprem")
    first = cluster.server
    others = [EtcdServer(tmp_path / name, name=name, ca=first.ca) for name in ("onprem-2", "onprem-3")]
    members = [first, *others]
    try:
        require_etcd()
        for member in members:
            member.initial_cluster = {other.name: other.peer_url for other in members}
            member.start(wait=False)
        for member in members:
            member.wait_ready()
        cluster.prepare()
        with first.sync_client() as client:
            status = client.status()
            if status.leader != status.header.member_id:
                leading = next(m for m in others if _member_id(m) == status.leader)
                client.move_leader(leading.endpoint, status.header.member_id)
        asyncio.run(run(cluster, members))
    finally:
        for member in members:
            member.__exit__(None, None, None)


def _member_id(server: EtcdServer) -> int:
    with server.sync_client() as client:
        return client.status().header.member_id


def test_a_host_that_is_taken_out_drains(onprem: Cluster, cloud: Cluster) -> None:
    """No new flows go there, here and at the peer, while both still know the way; then all of it goes."""

    def known(hosts: int) -> bool:
        dump = cloud.server.dump("cilium/cache/")
        return all(len(kinds(dump)[kind]) == hosts for kind in ("nodes", "ip"))

    async def run() -> None:
        onprem.put_all(2)
        cloud.put_all(1)
        async with running(onprem.registrar(cloud), cloud.registrar(onprem)):
            await until(lambda: mirrored(cloud, onprem, 2) and known(2), "mirrored")
            onprem.put(onprem.record(1, revision=2))
            since = time.monotonic()
            await until(lambda: mirrored(cloud, onprem, 1), "no backend any more")
            if time.monotonic() - since < 3.0:  # on a machine that stalled, the end of it may have come already
                assert known(2)
            await until(lambda: known(1), "gone")
            assert time.monotonic() - since >= 4.0
            assert published(onprem, 1)

    asyncio.run(run())


def test_peer_that_the_record_calls_absent_is_forgotten(onprem: Cluster, cloud: Cluster) -> None:
    """Its services first; its nodes and addresses when flows had time to end."""

    async def run() -> None:
        onprem.put_all(1)
        cloud.put_all(1)
        async with running(onprem.registrar(cloud), cloud.registrar()):
            await until(lambda: mirrored(onprem, cloud, 1), "mirrored")
        async with running(onprem.registrar()):
            await until(lambda: "h1" in "".join(onprem.server.dump(keys.LEADER).values()), "leads")
            onprem.put(onprem.web(1, ready=False))
            await until(lambda: not published(onprem, 1), "at work")
            assert mirrored(onprem, cloud, 1), "no longer in the spec is not absent"
            tombstone = {"schema": 1, "revision": 9, "name": "cloud", "id": 2, "state": "absent"}
            onprem.put({keys.estate_cluster_key("cloud"): json.dumps(tombstone)})
            since = time.monotonic()
            await until(lambda: not kinds(onprem.server.dump("cilium/cache/"))["services"], "no services")
            if time.monotonic() - since < 3.0:
                assert kinds(onprem.server.dump("cilium/cache/"))["nodes"]
                assert keys.cluster_config_key("cloud") in onprem.server.dump("cilium/cluster-config/")
            await until(lambda: not onprem.server.dump("cilium/cache/"), "forgotten")
            assert time.monotonic() - since >= 4.0
            assert keys.cluster_config_key("cloud") not in onprem.server.dump("cilium/cluster-config/")
            assert onprem.server.dump("cilium/synced/cloud/") == {}
            assert onprem.server.dump(keys.PEERS_PREFIX) == {}
            assert len(onprem.server.dump("cilium/synced/onprem/")) == 4

    asyncio.run(run())


@pytest.mark.parametrize("program", ["agent", "registrar"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "schema is missing"),
        ('{"schema": 2}', "schema 2 is newer than 1, the one that this version reads: a newer isthmus.mesh wrote it"),
    ],
)
def test_refuses_to_start_with_a_spec_that_it_cannot_read(
    tmp_path: Path, program: str, content: str, words: str
) -> None:
    config = tmp_path / "node.json"
    config.write_text(content)
    command = [sys.executable, "-m", f"isthmus_agent.{program}.main", "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "agent")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 78
    assert str(config) in done.stderr
    assert words in done.stderr
    assert "; next: run the site playbook of the isthmus.mesh that was applied to the estate last" in done.stderr
