# SPDX-License-Identifier: GPL-3.0-or-later
"""What breaks in an estate, and what must not break with it. Beside the story (test_story.py) of the demo.

During all of it the underlay is watched: a mesh address outside of the tunnel fails the test that it was seen in.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from demo import EDGE, NAME, ONPREM_CLIENT, URL
from estate_tools import COUNT, ONPREM, PKI, Estate, Key, Wire, counters
from isthmus_lab import ROUTER
from playbook import play

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.fixture(scope="module")
def wire(estate: Estate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    made = Wire(estate, tmp_path_factory.mktemp("wire"))
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def watched(estate: Estate, wire: Wire) -> Iterator[None]:
    """Each test begins converged, and in none of them a mesh address leaves the tunnel."""
    estate.converged()
    before = wire.leaks()
    yield
    assert [line for line in wire.leaks() if line not in before] == []


# --- agents


def test_killed_agents_take_nothing_with_them_and_change_nothing_when_they_return(estate: Estate) -> None:
    hosts = list(estate.lab.hosts)
    before = {host: estate.maps(host) for host in hosts}
    try:
        with estate.unnoticed(estate.edge, estate.onprem):
            for host in hosts:
                estate.kill_for_good(host, "isthmusd")
        assert estate.maps_changed(before) == {}
        with estate.unnoticed(estate.edge, estate.onprem):
            for host in hosts:
                estate.lab.exec(host, ["systemctl", "start", "isthmusd.service"])
            estate.converged()
    finally:
        estate.put_right()
    assert estate.maps_changed(before) == {}


def test_a_machine_that_reboots_without_etcd_works_from_last_known_good(estate: Estate) -> None:
    direct = {host: f"http://{estate.address(host, 'web')}:8080/" for host in ("onprem-1", "cloud-1", "cloud-2")}
    with estate.customer("cloud-1") as cloud, estate.undone(lambda: estate.etcd("cloud", "start")):
        estate.etcd("cloud", "stop")
        with (
            estate.unnoticed(estate.edge, estate.onprem, url=direct["cloud-1"]),
            estate.unnoticed(cloud, url=direct["onprem-1"]),
        ):
            estate.lab.reboot("cloud-2", hard=True)
            estate.until("cloud-2's agent works", lambda: estate.used("cloud-2") == estate.backends)
        status = estate.ask("cloud-2", "status")
        assert status["etcd"]["connected"] is False
        assert status["last_known_good"]["loaded"] is not None
        with estate.customer("cloud-2") as rebooted:
            outward = rebooted.requests(URL, COUNT)
        inward = estate.onprem.requests(direct["cloud-2"], COUNT)
        assert (outward["ok"], outward["errors"]) == (COUNT, {})
        assert (inward["ok"], inward["errors"]) == (COUNT, {})
        assert len(outward["answers"]) == len(estate.backends)
        assert estate.unit_state("cloud-1", "isthmus-etcd") == "inactive"
    estate.until("cloud-2 has its etcd again", lambda: estate.ask("cloud-2", "status")["etcd"]["connected"] is True)


# --- etcd


def test_a_cluster_without_etcd_goes_on_and_withdraws_nothing(estate: Estate) -> None:
    own, mirrored = estate.state("onprem-1"), estate.state("cloud-1")
    maps = {host: estate.maps(host) for host in (EDGE, ONPREM_CLIENT)}

    def others_notice() -> bool:
        says = [p["state"] for p in estate.ask(EDGE, "peers")["peers"] if p["name"] == "onprem"]
        return says != ["connected"] and not estate.ask(ONPREM_CLIENT, "status")["etcd"]["connected"]

    with (
        estate.unnoticed(estate.edge, estate.onprem),
        estate.undone(lambda: estate.etcd("onprem", "start")),
    ):
        estate.etcd("onprem", "stop")
        estate.until("the loss is shown", others_notice)
        assert [estate.unit_state(host, "isthmus-registrar") for host in ONPREM] == ["active"] * 3
        assert estate.maps_changed(maps) == {}
        assert estate.withdrawn({"cloud-1": mirrored}) == {}
    estate.converged()
    assert estate.withdrawn({"onprem-1": own}) == {}
    assert estate.withdrawn({"cloud-1": mirrored}) == {}


def snapshot_restored(estate: Estate, snapshot: str) -> None:
    """cloud's etcd begins anew from the snapshot, under a new cluster token, as docs/operating.md says."""
    member = estate.lab.hosts["cloud-1"]
    peer = f"https://{member.address}:2380"
    script = f"""set -e
systemctl stop isthmus-etcd.service
rm -rf /root/restored
etcdctl snapshot restore {snapshot} --name cloud-1 --data-dir /root/restored --initial-cluster cloud-1={peer} \
  --initial-cluster-token restored-$(date +%s) --initial-advertise-peer-urls {peer}
rm -rf /var/lib/isthmus/etcd/member
mv /root/restored/member /var/lib/isthmus/etcd/
rm -rf /root/restored {snapshot}
chown -R isthmus-etcd:isthmus-etcd /var/lib/isthmus/etcd
systemctl start isthmus-etcd.service
"""
    estate.lab.exec("cloud-1", ["sh", "-c", script])


def etcd_emptied(estate: Estate) -> None:
    """All data of cloud's etcd is lost. It does not start empty by itself; `site` begins it anew and fills it."""
    script = "systemctl stop isthmus-etcd && rm -rf /var/lib/isthmus/etcd/member && systemctl start isthmus-etcd"
    estate.lab.exec("cloud-1", ["sh", "-c", script])
    assert estate.unit_state("cloud-1", "isthmus-etcd") == "inactive"
    play("site", "--limit", "cloud", "-e", "etcd_formed=false")


def published(keys: dict[str, Key]) -> dict[str, str]:
    """What must be the same after a loss: numbers, addresses and all that is told to others."""
    return {name: key.value for name, key in keys.items() if not name.startswith("isthmus/v1/alloc/peers/")}


@pytest.mark.slow
def test_an_old_snapshot_of_etcd_withdraws_nothing_and_leaves_nobody_stale(estate: Estate) -> None:
    snapshot = "/root/old.db"
    estate.lab.exec("cloud-1", ["rm", "-f", snapshot])
    estate.etcdctl("cloud-1", "snapshot", "save", snapshot)
    with estate.service_of_operators("later", lost_in="cloud-1"):
        estate.until("shop/later is known everywhere", lambda: estate.known_everywhere("later"))
        history_lost(estate, lambda: snapshot_restored(estate, snapshot))
        with estate.service_of_operators("after"):
            estate.until("shop/after is known everywhere", lambda: estate.known_everywhere("after"))
            assert estate.known_everywhere("later"), "what was registered after the snapshot is kept"


@pytest.mark.slow
def test_an_empty_etcd_withdraws_nothing_and_leaves_nobody_stale(estate: Estate) -> None:
    history_lost(estate, lambda: etcd_emptied(estate))
    with estate.service_of_operators("after"):
        estate.until("shop/after is known everywhere", lambda: estate.known_everywhere("after"))
    refused_now = estate.etcdctl("cloud-1", "put", "cilium/.heartbeat", "x", user="agent", check=False)
    assert refused(refused_now), "authentication is on again"


def history_lost(estate: Estate, lose: Callable[[], None]) -> None:
    """cloud's etcd loses history under running agents of three clusters: nobody notices, everything is filled again
    with the same numbers and addresses, peers see no key go, and no map changes."""
    term = estate.registrar_leader("cloud-1")
    own, mirrors = estate.state("cloud-1"), {host: estate.state(host) for host in ("onprem-1", EDGE)}
    maps = {host: estate.maps(host) for host in estate.lab.hosts}

    def believed() -> bool:
        return all(estate.ask(host, "status")["etcd"]["complete"] for host in ("cloud-1", "cloud-2"))

    with estate.unnoticed(estate.edge, estate.onprem):
        lose()
        estate.until(
            "a registrar leads with the new etcd", lambda: estate.registrar_leader("cloud-1")[1] not in (0, term[1])
        )
        estate.until("cloud's agents believe it", believed)
        estate.converged()
    now = published(estate.state("cloud-1"))
    assert {name: value for name, value in published(own).items() if now.get(name) != value} == {}
    assert estate.withdrawn(mirrors) == {}
    assert estate.maps_changed(maps) == {}


# --- registrars


def test_another_registrar_leads_when_the_leader_dies(estate: Estate) -> None:
    own, mirrored = estate.state("onprem-1"), estate.state("cloud-1")
    leader, term = estate.registrar_leader("onprem-1")
    witness = next(host for host in ONPREM if host != leader)

    def another() -> bool:
        host, revision = estate.registrar_leader(witness)
        return host not in ("", leader) and revision > term

    with estate.undone(lambda: estate.lab.exec(leader, ["systemctl", "start", "isthmus-registrar.service"])):
        began = time.monotonic()
        estate.kill_for_good(leader, "isthmus-registrar")
        estate.timed(f"the registrar on {leader} was killed, another leads", another, 5, began)
    estate.converged()
    assert estate.withdrawn({"onprem-1": own}) == {}
    assert estate.withdrawn({"cloud-1": mirrored}) == {}


def test_another_registrar_leads_when_the_machine_of_both_leaders_is_off(estate: Estate) -> None:
    own, mirrored = estate.state("onprem-1"), estate.state("cloud-1")
    leader, term = estate.registrar_leader("onprem-1")
    estate.give_etcd_leadership(leader)
    witness = next(host for host in ONPREM if host != leader)
    rest = estate.backends - {leader}

    def another() -> bool:
        host, revision = estate.registrar_leader(witness)
        return host not in ("", leader) and revision > term

    with estate.undone(lambda: estate.lab.power_on(leader)):
        began = time.monotonic()
        estate.lab.power_off(leader)
        estate.timed(f"{leader}, which led etcd too, is off, another registrar leads", another, 10, began)
        estate.until("its backends get no new flows", lambda: estate.used(EDGE) == rest)
        result = estate.edge.requests(URL, COUNT)
        assert (result["ok"], result["errors"]) == (COUNT, {})
        assert estate.withdrawn({witness: own}) == {}
        assert estate.withdrawn({"cloud-1": mirrored}) == {}
    estate.converged()
    assert estate.withdrawn({witness: own}) == {}


def test_a_cluster_whose_registrars_stay_stopped_withdraws_nothing(estate: Estate) -> None:
    own, mirrors = estate.state("onprem-1"), {host: estate.state(host) for host in ("cloud-1", EDGE)}
    maps = {host: estate.maps(host) for host in (EDGE, ONPREM_CLIENT)}

    def start() -> None:
        for host in ONPREM:
            estate.lab.exec(host, ["systemctl", "start", "isthmus-registrar.service"])

    with estate.unnoticed(estate.edge, estate.onprem), estate.undone(start):
        for host in ONPREM:
            estate.kill_for_good(host, "isthmus-registrar")
        estate.until("nobody leads", lambda: estate.registrar_leader("onprem-1") == ("", 0))
        estate.hold(11)  # longer than any lease of ours lasts
        assert estate.withdrawn({"onprem-1": own}) == {}
        assert estate.withdrawn(mirrors) == {}
        assert estate.maps_changed(maps) == {}
    estate.converged()
    assert estate.withdrawn({"onprem-1": own}) == {}


# --- identities


def test_a_receiver_tells_two_workloads_of_one_host_apart(estate: Estate) -> None:
    target = estate.address("onprem-1", "web")

    def seen() -> dict[int, int]:
        """Identity -> packets that came to the target."""
        entries = estate.ask("onprem-1", "status")["datapath"]["identities"]
        return {entry["identity"]: entry["packets"] for entry in entries if entry["destination"] == target}

    own = {workload["name"]: workload for workload in estate.ask("cloud-1", "status")["workloads"]}
    before = seen()
    for name in ("web", "batch"):
        script = (
            "mount=$(findmnt --noheadings --types cgroup2 --output TARGET | head -n 1) &&"
            f' echo $$ > "$mount/system.slice/{name}.service/cgroup.procs" && exec curl -sS -m 10 http://{target}:8080/'
        )
        answer = estate.lab.exec("cloud-1", ["sh", "-c", script]).stdout
        assert f'"peer": "{own[name]["address"]}"' in answer
    after = seen()
    identities = {name: own[name]["identity"] for name in ("web", "batch")}
    assert identities["web"] != identities["batch"]
    risen = {identity for identity, packets in after.items() if packets > before.get(identity, 0)}
    assert set(identities.values()) <= risen
    labels = {
        entry["identity"]: entry["labels"]
        for entry in estate.ask("onprem-1", "status")["datapath"]["identities"]
        if entry["destination"] == target
    }
    for name, identity in identities.items():
        words = str(labels[identity])
        assert re.search(rf"app'?: '{name}'", words), words
        assert "cloud" in words


# --- packets


@pytest.mark.parametrize("mtu", [1500, 1460])
def test_a_bulk_transfer_makes_no_outer_fragments(estate: Estate, mtu: int) -> None:
    size = 20_000_000
    there, here = estate.address("onprem-1", "web"), estate.address(EDGE, "client")

    def on_routes() -> bool:
        found = [
            estate.lab.exec(EDGE, ["ip", "route", "get", there]),
            estate.lab.exec("onprem-1", ["ip", "route", "get", here]),
        ]
        return all(f"mtu {mtu - 50} " in done.stdout for done in found)

    def fragments() -> dict[str, int]:
        router = ["nsenter", f"--net=/run/netns/{ROUTER}", "cat", "/proc/net/snmp"]
        tables = {"router": counters(subprocess.run(router, capture_output=True, text=True, check=True).stdout)}
        for host in (EDGE, "onprem-1"):
            tables[host] = counters(estate.lab.exec(host, ["cat", "/proc/net/snmp"]).stdout)
        return {f"{w} {name}": table[name] for w, table in tables.items() for name in ("FragCreates", "ReasmReqds")}

    def transfer(host: str, address: str) -> None:
        words = ["curl", "-sS", "-m", "60", "-o", "/dev/null", "-w", "%{size_download}"]
        assert estate.lab.exec(host, [*words, f"http://{address}:8080/bytes/{size}"]).stdout == str(size)

    def undo() -> None:
        estate.lab.exec(EDGE, ["systemctl", "stop", "web.service"])
        estate.lab.set_mtu("edge", 1500)

    with estate.undone(undo):
        estate.lab.set_mtu("edge", mtu)
        estate.lab.exec(EDGE, ["systemctl", "start", "web.service"])
        estate.until("routes have the path's MTU", on_routes)
        before = fragments()
        transfer(EDGE, there)
        transfer("onprem-1", here)
        assert fragments() == before
        # The counters do count: an underlay packet that is too long is cut.
        estate.lab.exec(EDGE, ["ping", "-c", "1", "-s", "4000", str(estate.lab.hosts["onprem-1"].address)])
        assert fragments()[f"{EDGE} FragCreates"] > before[f"{EDGE} FragCreates"]


def test_no_mesh_address_is_seen_outside_the_tunnel(estate: Estate, wire: Wire) -> None:
    """The watch of every test here looks on while clients and addresses are as odd as they can be."""
    began = wire.leaks()
    host = estate.lab.hosts[EDGE]
    cloud = estate.address("cloud-1", "web")

    def curl(*words: str) -> subprocess.CompletedProcess[str]:
        return estate.lab.exec(EDGE, ["curl", "-sS", "-m", "3", *words], check=False)

    estate.edge.start("odd", URL, interval=0.01, timeout=1.0)
    try:
        bound = [curl("--interface", str(host.address), url) for url in (URL, f"http://{cloud}:8080/")]
        assert [done.returncode for done in bound] == [0, 0], [done.stderr for done in bound]
        # Nobody has these: an address of a node's range, one of no node, a service address, a port of a service.
        free = [str(cloud.rsplit(".", 1)[0]) + ".14", "10.102.200.1", "10.113.200.1", f"{NAME}:81"]
        for place in free:
            assert curl(f"http://{place}/").returncode != 0
            assert curl("--interface", str(host.address), f"http://{place}/").returncode != 0
        with estate.undone(lambda: estate.lab.exec("cloud-2", ["systemctl", "start", "web.service"])):
            estate.lab.exec("cloud-2", ["systemctl", "stop", "web.service"])
            curl("--interface", str(host.address), f"http://{estate.address('cloud-2', 'web')}:8080/")
        with estate.undone(lambda: estate.lab.restore("cloud")):
            estate.lab.cut("cloud")
            curl(f"http://{cloud}:8080/")
            curl("--interface", str(host.address), f"http://{cloud}:8080/")
        estate.lab.exec(EDGE, ["systemctl", "kill", "--signal=KILL", "isthmusd.service"])
        estate.lab.exec(EDGE, ["systemctl", "restart", "isthmusd.service"])
    finally:
        result = estate.edge.result("odd", stop=True)
    assert result["ok"] > 0
    estate.converged()
    assert wire.leaks() == began


def test_a_daemon_that_listens_on_the_underlay_only_is_named(estate: Estate) -> None:
    place = estate.lab.hosts["cloud-2"].address

    def listen(text: str) -> None:
        write = ["sh", "-c", "cat > /etc/default/web && systemctl restart web.service"]
        estate.lab.exec("cloud-2", write, feed=text)

    def warned() -> bool:
        words = f"the daemon of shop/web (service shop/web) listens on {place}:8080 only"
        return any(line.startswith(words) for line in estate.ask("cloud-2", "status")["warnings"])

    with estate.undone(lambda: listen("")):
        listen(f"ADDRESS={place}\n")
        estate.until("the daemon is named", warned)
        assert f"listens on {place}:8080 only" in estate.lab.exec("cloud-2", ["isthmus", "status"]).stdout
        estate.until("it gets no requests", lambda: "cloud-2" not in estate.used(EDGE))
    estate.until("nothing is to be said", lambda: not warned())


# --- trust


def test_a_root_certificate_of_another_cluster_is_refused(estate: Estate) -> None:
    """edge's authority signs `CN=root`; edge's own etcd knows it as root, cloud's etcd does not let it in."""
    script = f"""set -e
cd /root/forged
openssl req -new -newkey rsa:2048 -nodes -subj /CN=root -keyout root.key -out root.csr
printf 'extendedKeyUsage=clientAuth\n' > ext
openssl x509 -req -in root.csr -CA {PKI}/ca.crt -CAkey {PKI}/ca.key -set_serial 4711 -days 1 -extfile ext -out root.crt
cp {PKI}/trust/edge.crt edge-ca.crt
"""
    with estate.undone(lambda: estate.lab.exec(EDGE, ["rm", "-rf", "/root/forged"])):
        estate.lab.exec(EDGE, ["mkdir", "-m", "700", "/root/forged"])
        estate.lab.exec(EDGE, ["sh", "-c", script])
        pair = "/root/forged/root"
        at_home = estate.etcdctl(EDGE, "user", "list", certificate=pair)
        assert "root" in at_home.stdout.split()
        there = str(estate.lab.hosts["cloud-1"].address)
        write = ("put", "cilium/.heartbeat", "x")
        abroad = estate.etcdctl(EDGE, *write, cluster="cloud", endpoint=there, certificate=pair, check=False)
        assert abroad.returncode != 0
        chain = ["openssl", "s_client", "-connect", f"{there}:2379", "-cert", f"{pair}.crt", "-key", f"{pair}.key"]
        shaken = estate.lab.exec(EDGE, ["sh", "-c", f"{' '.join(chain)} -quiet < /dev/null"], check=False)
        assert re.search(r"alert (bad certificate|unknown ca)", shaken.stderr), shaken.stderr
        own = estate.etcdctl(EDGE, "get", "cilium/.heartbeat", user="peer-cloud", cluster="cloud", endpoint=there)
        assert own.stdout.startswith("cilium/.heartbeat\n"), "the way there is open for the certificate that is due"


def refused(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode != 0 and "permission denied" in done.stderr


def test_an_agents_certificate_writes_its_own_nodes_keys_only(estate: Estate) -> None:
    there = str(estate.lab.hosts["cloud-1"].address)

    def as_agent(*words: str) -> subprocess.CompletedProcess[str]:
        return estate.etcdctl("cloud-2", *words, user="agent", endpoint=there, check=False)

    own = "isthmus/v1/workloads/cloud-2/shop.test-of-rights"
    assert as_agent("put", own, "{}").returncode == 0
    assert as_agent("del", own).returncode == 0
    assert as_agent("get", "cilium/state/", "--prefix", "--keys-only").returncode == 0
    others = [
        "isthmus/v1/nodes/cloud-1",
        "isthmus/v1/nodes/cloud-22",
        "isthmus/v1/workloads/cloud-1/shop.web",
        "isthmus/v1/workloads/cloud-22/shop.web",
        "isthmus/v1/alive/cloud-1",
        "isthmus/v1/services/shop/web",
        "isthmus/v1/estate/roster",
        "isthmus/v1/lock",
        "isthmus/v1/leader",
        "isthmus/v1/alloc/vips/shop/web",
        "cilium/state/nodes/v1/cloud/cloud-2",
        "cilium/cache/services/v1/onprem/shop/web",
        "cilium/.heartbeat",
    ]
    assert [key for key in others if not refused(as_agent("put", key, "{}"))] == []
    assert [key for key in others if not refused(as_agent("del", key))] == []
    assert refused(as_agent("del", "isthmus/v1/", "--prefix"))
    assert refused(as_agent("role", "list"))


def test_a_peers_certificate_reads_its_grants_and_writes_nothing(estate: Estate) -> None:
    there = str(estate.lab.hosts["cloud-1"].address)

    def as_peer(*words: str) -> subprocess.CompletedProcess[str]:
        return estate.etcdctl(EDGE, *words, user="peer-cloud", cluster="cloud", endpoint=there, check=False)

    readable = ["cilium/state/", "cilium/synced/cloud/", "cilium/cache/nodes/v1/edge/", "cilium/cache/ip/v1/edge/"]
    for prefix in readable:
        assert as_peer("get", prefix, "--prefix").returncode == 0, prefix
    for key in ("cilium/.heartbeat", "cilium/cluster-config/cloud"):
        assert as_peer("get", key).stdout.startswith(key), key
    hidden = ["cilium/", "cilium/cache/", "cilium/cache/nodes/v1/onprem/", "cilium/cluster-config/", "isthmus/v1/", ""]
    assert [prefix for prefix in hidden if not refused(as_peer("get", prefix, "--prefix"))] == []
    everything = [
        "cilium/state/nodes/v1/cloud/cloud-2",
        "cilium/cache/nodes/v1/edge/edge-1",
        "cilium/.heartbeat",
        "cilium/cluster-config/edge",
        "isthmus/v1/services/shop/web",
        "isthmus/v1/leader",
    ]
    assert [key for key in everything if not refused(as_peer("put", key, "{}"))] == []
    assert [key for key in everything if not refused(as_peer("del", key))] == []
