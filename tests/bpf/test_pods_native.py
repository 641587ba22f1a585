# SPDX-License-Identifier: GPL-3.0-or-later
"""Kubernetes nodes that are native, in clear and inside WireGuard: pods' packets go by the underlay or into it as they
are, with their own addresses, and what is the CNI's goes by as before. By the kernel's WireGuard where it has one, else
by wireguard-go."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bpf.pods import (
    CLUSTER_IP,
    HOST_PORT,
    NODE_PORT,
    OUTSIDE,
    REMOTE_NODE_PORT,
    KubernetesNode,
    kubernetes_nodes,
    spec_document,
)
from bpf.reaching import Both, dial, every_way, identities, no_drops, on_one_node, outlives_reloads, serve
from bpf.test_native import RAW
from bpf.topology import InsideError, Node, capture, wait_for
from isthmus_agent import netlink
from isthmus_agent.agent.kernel import HostKernel
from isthmus_agent.netlink import wireguard
from isthmus_mesh import keys, wire
from isthmus_mesh.spec import NodeSpec

CLONE_NEWNS = 0x20000
DEVICE = wireguard.DEVICE
INSIDE, CLEAR = "inside", "clear"
MTU = {INSIDE: 1420, CLEAR: 1500}
ON_THE_WIRE = {INSIDE: "udp port 51871", CLEAR: "net 10.244.0.0/16 or net 10.245.0.0/16"}
SITES = {"onprem": "onprem", "cloud": "cloud"}


def _room_for_sockets() -> None:
    """wireguard-go's control socket is a file, of the same name on each node."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    place = Path("/run/wireguard")
    place.mkdir(mode=0o755, exist_ok=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)


def _kernel_has_wireguard() -> bool:
    made = subprocess.run(["ip", "link", "add", DEVICE, "type", "wireguard"], capture_output=True)
    return made.returncode == 0


def _wireguard_go() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["wireguard-go", "-f", DEVICE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _is_ready() -> bool:
    shown = subprocess.run(["wg", "show", DEVICE], capture_output=True)
    return shown.returncode == 0


def publish_keys(each: KubernetesNode, publics: dict[str, str]) -> None:
    """The nodes' keys in what a node knows."""
    for key, value in each.documents.items():
        if "/nodes/" in key:
            node = wire.Node.from_json(value)
            known = replace(node, wireguard_public_key=publics[node.name], encryption_key=255)
            each.documents[key] = known.to_json().encode()


class Estate:
    """Both nodes, with agents' kernels. `private`: the file of each one's key, none where nothing is encrypted."""

    def __init__(self, both: Both, private: dict[str, Path], stack: contextlib.ExitStack) -> None:
        self.both = both
        self.private = private
        self.how = INSIDE if private else CLEAR
        self.kernels: dict[str, HostKernel] = {}
        for each in both:
            each.node.call(_room_for_sockets)
            if private and not each.node.call(_kernel_has_wireguard):
                process = each.node.call(_wireguard_go)
                stack.callback(process.wait, 10)
                stack.callback(process.kill)
                wait_for(lambda each=each: each.node.call(_is_ready), "wireguard-go is there")  # type: ignore[misc]
            kernel = HostKernel(each.node.pin_dir, each.node.cgroup)
            self.kernels[each.name] = kernel
            stack.callback(each.node.call, kernel.close)

    def spec(self, each: KubernetesNode, stage: str) -> NodeSpec:
        """At a stage of native routing to the other node's site, which may be this one."""
        document = spec_document(each.node, each.range, each.name)
        (other,) = [one.spec.cluster.site for one in self.both if one is not each]
        own = document["cluster"]["site"]
        if self.private:
            document["wireguard"] = {
                "key": str(self.private[each.name]),
                "port": 51871,
                "plain_sites": [own] if own != other else [],
                "sites": SITES,
            }
        if stage != "plain":
            document["native"] = {"sites": SITES, "stages": {other: stage}}
        return NodeSpec.from_dict(document)

    def stage(self, each: KubernetesNode, word: str) -> None:
        """As an agent that starts with another specification does."""
        each.spec = self.spec(each, word)
        self.start(each)

    def start(self, each: KubernetesNode) -> None:
        kernel = self.kernels[each.name]
        each.node.datapath = each.wanted().datapath
        assert each.node.call(kernel.start, each.node.datapath).problems == ()
        each.node.bpf = kernel._bpf

    def apply(self, each: KubernetesNode) -> None:
        """As an agent that runs."""
        each.node.datapath = each.wanted().datapath
        assert each.node.call(self.kernels[each.name].apply, each.node.datapath).problems == ()

    def audit(self) -> list[str]:
        return [
            words for each in self.both for words in each.node.call(self.kernels[each.name].audit, each.node.datapath)
        ]


@contextlib.contextmanager
def estate(tmp_path: Path, one_cluster: bool = False, stage: str = "demands", how: str = INSIDE) -> Iterator[Estate]:
    with contextlib.ExitStack() as stack:
        both = stack.enter_context(kubernetes_nodes(load=False, one_cluster=one_cluster))
        private, publics = {}, {}
        for each in both if how == INSIDE else ():
            private[each.name] = tmp_path / each.name
            key = subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout
            private[each.name].write_text(key)
            publics[each.name] = wireguard.public_key(str(private[each.name]))
        for each in both if how == INSIDE else ():
            publish_keys(each, publics)
        made = Estate(both, private, stack)
        for each in both:
            made.stage(each, stage)
        yield made


@pytest.fixture(scope="module", params=[INSIDE, CLEAR])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Estate]:
    """Two nodes of two clusters, native inside WireGuard or in clear."""
    with estate(tmp_path_factory.mktemp("native"), how=request.param) as found:
        serve(found.both)
        yield found


inside, clear = (pytest.mark.parametrize("made", [how], indirect=True) for how in (INSIDE, CLEAR))


def _check_sources(both: Both, how: str) -> None:
    """Sets `rp_filter` everywhere."""
    for each in both:
        for device in ("all", "default", "eth0", "isthmus0", "cni0", *([DEVICE] if each.spec.wireguard else [])):
            each.node.sysctl(f"net.ipv4.conf.{device}.rp_filter", how)


@pytest.fixture
def both(made: Estate) -> Both:
    return made.both


@pytest.fixture
def drops(both: Both) -> Callable[[], list[dict[str, int]]]:
    """What was dropped since the test began."""
    before = [each.node.drops() for each in both]

    def since() -> list[dict[str, int]]:
        found = []
        for each, was in zip(both, before, strict=True):
            now = each.node.drops()
            found.append({reason: now[reason] - was.get(reason, 0) for reason in now if now[reason] != was.get(reason)})
        return found

    return since


def listed(file: Path, *expression: str) -> list[str]:
    shown = subprocess.run(["tcpdump", "-nr", str(file), *expression], check=True, capture_output=True, text=True)
    return shown.stdout.splitlines()


NOTHING: list[dict[str, int]] = [{}, {}]
MESH = ("net 10.101.0.0/16 or net 10.102.0.0/16 or net 10.244.0.0/16 or net 10.245.0.0/16 or udp port 8472",)


@pytest.mark.parametrize("rp_filter", ["1", "0"])
def test_every_direction_keeps_source_and_identity_and_nothing_goes_another_way(
    made: Estate, drops: Callable[[], list[dict[str, int]]], tmp_path: Path, rp_filter: str
) -> None:
    left, right = made.both
    _check_sources(made.both, rp_filter)
    file = tmp_path / "wire.pcap"
    with capture(left.node, file):
        for near, far in ((left, right), (right, left)):
            every_way(near, far)
            pod = near.pods[0]
            assert dial(near.process(pod), CLUSTER_IP, 80).split()[1] == pod.address
    assert listed(file, *(MESH if made.how == INSIDE else ("udp port 8472 or udp port 51871",))) == []
    assert len(listed(file, ON_THE_WIRE[made.how])) > 50
    assert drops() == NOTHING
    assert made.audit() == []


def test_on_one_node_and_to_outside_everything_is_as_before(
    both: Both, drops: Callable[[], list[dict[str, int]]]
) -> None:
    left, right = both
    right.node.process().do(f"serve_tcp('outside', '{OUTSIDE}', 9000)")
    on_one_node(left)
    assert dial(left.process(left.pods[0]), OUTSIDE, 9000) == f"outside {left.node.underlay}"
    assert drops() == NOTHING


def test_what_the_cni_does_not_masquerade_goes_out_and_comes_in(
    both: Both, drops: Callable[[], list[dict[str, int]]]
) -> None:
    """Where the network outside knows pods, as clouds do."""
    left, right = both
    right.node.process().do(f"serve_tcp('outside', '{OUTSIDE}', 9001)")
    right.node.call(subprocess.run, ["ip", "route", "add", left.pods[0].address, "via", left.node.underlay], check=True)
    try:
        left.nft(
            "add table ip kept\nadd chain ip kept post { type nat hook postrouting priority 50; }\n"
            f"add rule ip kept post ip daddr {OUTSIDE} snat to ip saddr"
        )
        assert dial(left.process(left.pods[0]), OUTSIDE, 9001) == f"outside {left.pods[0].address}"
        assert dial(right.node.process(), left.pods[0].address, 8080, OUTSIDE) == f"a-pod0 {left.gateway}"
        assert drops() == NOTHING
    finally:
        left.nft("delete table ip kept")
        right.node.call(subprocess.run, ["ip", "route", "del", left.pods[0].address, "via", left.node.underlay])


def test_a_node_port_is_masqueraded_as_before_from_the_mesh_and_from_elsewhere(
    both: Both, drops: Callable[[], list[dict[str, int]]], tmp_path: Path
) -> None:
    """Towards the node's underlay address nothing of the mesh is on the way, in no direction."""
    left, right = both
    client = right.node.process()
    assert dial(client, left.node.mesh, NODE_PORT) == f"a-pod0 {left.gateway}"
    seen = identities(right)
    file = tmp_path / "wire.pcap"
    with capture(right.node, file):
        assert dial(client, left.node.underlay, NODE_PORT) == f"a-pod0 {left.gateway}"
    there = f"src host {left.node.underlay} and tcp src port {NODE_PORT}"
    assert len(listed(file, there)) > 1, "also the replies"
    assert identities(right) == seen
    assert drops() == NOTHING


def test_a_node_port_with_a_remote_backend_sends_as_the_node(
    both: Both, drops: Callable[[], list[dict[str, int]]]
) -> None:
    left, right = both
    client = left.process(left.pods[1])
    for address in (left.gateway, left.node.underlay):
        assert dial(client, address, REMOTE_NODE_PORT) == f"b-pod0 {left.node.mesh}"
    assert dial(right.node.process(), left.node.underlay, REMOTE_NODE_PORT) == f"b-pod0 {left.node.mesh}"
    assert dial(right.node.process("web"), left.node.mesh, REMOTE_NODE_PORT) == f"b-pod0 {left.node.mesh}"
    assert (right.pods[0].address, 6) in identities(right)
    assert drops() == NOTHING


@pytest.mark.parametrize("masquerades_all", [True, False], ids=["as flannel", "as bridge"])
def test_a_host_port_is_reached_from_the_mesh_and_from_elsewhere(
    both: Both, masquerades_all: bool, drops: Callable[[], list[dict[str, int]]]
) -> None:
    left, right = both
    left.cni(masquerades_all)
    left.host_port()
    try:
        far, pod = right.node.process(), right.pods[0]
        assert dial(far, left.node.mesh, HOST_PORT) == f"a-pod0 {right.node.mesh}"
        assert dial(right.process(pod), left.node.mesh, HOST_PORT) == f"a-pod0 {pod.address}"
        assert dial(right.process(pod), left.node.underlay, HOST_PORT) == f"a-pod0 {pod.address}"
        seen = left.gateway if masquerades_all else right.node.underlay
        assert dial(far, left.node.underlay, HOST_PORT) == f"a-pod0 {seen}"
        assert drops() == NOTHING
    finally:
        left.nft("delete table ip host-port")
        left.cni()


def test_flows_and_new_connections_survive_reloads_of_the_others(
    both: Both, drops: Callable[[], list[dict[str, int]]]
) -> None:
    left, right = both
    outlives_reloads(left, right)
    assert drops() == NOTHING


def test_a_bulk_transfer_between_pods_finds_the_paths_mtu(
    made: Estate, drops: Callable[[], list[dict[str, int]]]
) -> None:
    left, right = both = made.both
    client = left.process(left.pods[0])
    size = 4 << 20
    total = client.do(
        f"s = socket.create_connection(('{right.pods[0].address}', 8080), 20); line(s)\n"
        f"s.sendall(bytes({size} - 1) + b'?'); result = int(line(s))"
    )
    assert total == size
    assert client.do("result = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)") == MTU[made.how] - 40 - 12
    for each in both:
        assert (each.node.counter("FragCreates"), each.node.counter("ReasmReqds")) == (0, 0)
    assert drops() == NOTHING


@pytest.mark.parametrize("gone", ["routes", "device"])
def test_pods_packets_never_leave_in_clear(tmp_path: Path, gone: str) -> None:
    """Whatever becomes of routes, and whoever leads them elsewhere."""
    with estate(tmp_path) as made:
        left, right = made.both
        serve(made.both)
        client = left.process(left.pods[0])
        assert dial(client, right.pods[0].address, 8080) == f"b-pod0 {left.pods[0].address}"
        file = tmp_path / "wire.pcap"

        def ip(*words: str) -> None:
            left.node.call(subprocess.run, ["ip", *words], check=True)

        with capture(left.node, file):
            if gone == "device":
                ip("link", "delete", DEVICE)
            for table in ("main", "730", "731"):
                ip("route", "flush", "table", table, "proto", "73")
            ip("route", "add", right.range, "via", right.node.underlay)
            with pytest.raises(InsideError, match="timed out"):
                dial(client, right.pods[0].address, 8080)
            assert left.node.drops()["not_encrypted"] > 0
        assert listed(file, f"net {left.range} or net {right.range}") == []


@inside
@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("{right.pods[0].address}", "{left.pods[0].address}", "not_encrypted"),
        ("{right.node.workload}", "{left.pods[0].address}", "not_encrypted"),
        ("{right.node.underlay}", "{left.pods[0].address}", "not_encrypted"),
        ("{right.pods[0].address}", "{left.node.mesh}", "not_encrypted"),
        ("{right.pods[0].address}", "{left.node.underlay}", "not_encrypted"),
        ("192.0.2.1", "{left.node.mesh}", "unknown_peer"),
    ],
)
def test_what_comes_in_clear_with_an_address_of_the_mesh_is_dropped_and_counted(
    both: Both, drops: Callable[[], list[dict[str, int]]], source: str, target: str, reason: str
) -> None:
    """Only somebody on the path can send it."""
    left, right = both
    places = {"left": left, "right": right}
    with sent_raw(left, right, source.format(**places), target.format(**places)):
        wait_for(lambda: drops()[0] == {reason: 1}, f"{reason} is counted")


@clear
@pytest.mark.parametrize(
    ("source", "target", "sender", "reason"),
    [
        ("{right.pods[0].address}", "{left.pods[0].address}", "02:00:00:00:00:66", "bad_source"),
        ("{right.node.workload}", "{left.pods[0].address}", "02:00:00:00:00:66", "bad_source"),
        ("{right.pods[0].address}", "{left.node.underlay}", "02:00:00:00:00:66", "bad_source"),
        ("{left.node.workload}", "{left.pods[0].address}", "", "bad_source"),
        ("{right.pods[0].address}", "{left.prefix}.77", "", "not_local_dest"),
        ("192.0.2.1", "{left.node.mesh}", "", "unknown_peer"),
    ],
)
def test_what_comes_with_another_source_than_the_senders_is_dropped_and_counted(
    both: Both, drops: Callable[[], list[dict[str, int]]], source: str, target: str, sender: str, reason: str
) -> None:
    left, right = both
    places = {"left": left, "right": right}
    with sent_raw(left, right, source.format(**places), target.format(**places), sender):
        wait_for(lambda: drops()[0] == {reason: 1}, f"{reason} is counted")


@contextlib.contextmanager
def sent_raw(left: KubernetesNode, right: KubernetesNode, source: str, target: str, sender: str = "") -> Iterator[None]:
    """A frame that the right node puts on the wire, with its own link-layer address or another."""
    # It goes by the egress program too: from an address of the node's own that would not let it out.
    right.node.bpf.forget_underlay()
    packet = f"datagram({source!r}, {target!r})"
    try:
        right.node.process().do(
            RAW + f"frame({_mac(left.node)!r}, {sender or _mac(right.node)!r}, {packet}); result = 1"
        )
        yield
    finally:
        index = right.node.call(netlink.overlay_index)
        right.node.call(right.node.bpf.use_underlay, index, right.spec.node.underlay4)


def _mac(node: Node) -> str:
    shown = node.call(subprocess.run, ["ip", "-j", "link", "show", "eth0"], capture_output=True, text=True)
    return str(json.loads(shown.stdout)[0]["address"])


def test_a_pod_that_is_not_published_neither_sends_nor_receives(
    made: Estate, drops: Callable[[], list[dict[str, int]]]
) -> None:
    left, right = made.both
    pod = left.pods[1]
    key = keys.ip_key(pod.address)
    published = left.documents.pop(key)
    made.apply(left)
    try:
        send = "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.sendto(b'x', ('{}', 9000))"
        client = left.process(pod)
        client.do(send.format(right.node.mesh))
        wait_for(lambda: drops() == [{"not_local_source": 1}, {}], "its packet is dropped at home")
        assert dial(client, left.pods[0].address, 8080) == f"a-pod0 {pod.address}", "on its node it is reached"
        assert drops() == [{"not_local_source": 1}, {}]
        right.node.process().do(send.format(pod.address))
        wait_for(lambda: drops()[0].get("not_local_dest") == 1, "what comes for it is dropped")
    finally:
        left.documents[key] = published
        made.apply(left)
    assert dial(left.process(pod), right.node.workload, 9000) == f"b-web {pod.address}"


@pytest.mark.parametrize("how", [INSIDE, CLEAR])
def test_pods_from_pools_of_the_cni_are_reached_one_by_one(tmp_path: Path, how: str) -> None:
    """The nodes have no pod CIDRs: WireGuard and the routes know each address."""
    with estate(tmp_path, how=how) as made:
        serve(made.both)
        left, right = made.both
        for each in made.both:
            for key, value in each.documents.items():
                if "/nodes/" in key:
                    node = replace(wire.Node.from_json(value), ipv4_secondary_alloc_cidrs=())
                    each.documents[key] = node.to_json().encode()
            made.apply(each)
        pod = left.pods[0]
        assert dial(left.process(pod), right.pods[0].address, 8080) == f"b-pod0 {pod.address}"
        assert dial(right.node.process("web"), pod.address, 8080) == f"a-pod0 {right.node.workload}"
        if how == INSIDE:
            (allowed,) = left.node.call(wireguard.peer_states, DEVICE).values()
            assert {str(each) for each in allowed.addresses} >= {right.pods[0].address} | {right.node.underlay}
        no_drops(made.both)


@pytest.mark.parametrize("how", [INSIDE, CLEAR])
def test_within_one_cluster_pods_are_the_cnis_and_the_rest_is_native(tmp_path: Path, how: str) -> None:
    with estate(tmp_path, one_cluster=True, how=how) as made:
        left, right = made.both
        serve(made.both)
        for each in made.both:
            each.cni(masquerades_all=False)
        before = [each.node.drops() for each in made.both]
        file = tmp_path / "wire.pcap"
        with capture(left.node, file):
            for near, far in ((left, right), (right, left)):
                pod, name = near.pods[0], far.node.name
                client, host = near.process(pod), near.node
                # pod -> pod and node's pod -> the other node: the CNI's, in clear
                assert dial(client, far.pods[0].address, 8080) == f"{name}-pod0 {pod.address}"
                assert dial(client, far.node.underlay, 9000) == f"{name}-underlay {host.underlay}"
                # node -> pod, by the CNI's way too
                assert dial(host.process(), far.pods[0].address, 8080, host.underlay).startswith(f"{name}-pod0 ")
                assert dial(host.process(), far.pods[0].address, 8080, near.gateway).startswith(f"{name}-pod0 ")
                # what has an address of the mesh
                assert dial(client, far.node.workload, 9000) == f"{name}-web {pod.address}"
                assert dial(client, far.node.mesh, 9000) == f"{name}-mesh {pod.address}"
                assert dial(host.process("web"), far.pods[1].address, 8080) == f"{name}-pod1 {host.workload}"
                assert dial(host.process("web"), far.node.workload, 9000) == f"{name}-web {host.workload}"
        assert listed(file, "udp port 8472") == []
        in_clear = listed(file, "net 10.101.0.0/16 or net 10.102.0.0/16")
        assert (in_clear == []) is (how == INSIDE)
        assert len(listed(file, f"host {left.pods[0].address} and host {right.pods[0].address}")) > 5
        assert [each.node.drops() for each in made.both] == before
        assert made.audit() == []


@pytest.mark.parametrize("how", [INSIDE, CLEAR])
@pytest.mark.parametrize("rp_filter", ["1", "0"])
def test_flows_of_pods_outlive_turning_it_on_and_off(tmp_path: Path, how: str, rp_filter: str) -> None:
    """Node by node, stage by stage, also where the kernel checks sources strictly; in clear also what kube-proxy sends
    to the other cluster as this node, when it began while native packets were taken."""
    with estate(tmp_path, stage="plain", how=how) as made:
        left, right = made.both
        serve(made.both)
        _check_sources(made.both, rp_filter)
        clients = {
            "pod to pod": (left.process(left.pods[0]), right.pods[0].address, 8080),
            "pod to underlay": (left.process(left.pods[0]), right.node.underlay, 9000),
            "workload to pod": (right.node.process("web"), left.pods[1].address, 8080),
            "underlay to pod": (right.node.process(), left.pods[1].address, 8080),
        }
        if rp_filter == "0":  # what comes by another device than the tunnel
            clients["underlay to a node port"] = right.node.process(), left.node.underlay, NODE_PORT
        bound = {"underlay to pod": right.node.underlay}
        node_port = "pod to a node port of its node"

        def begin(what: str) -> None:
            client, address, port = clients[what]
            source = f", ('{bound[what]}', 0)" if what in bound else ""
            client.do(
                f"old = socket.create_connection(('{address}', {port}), 5{source}); old.settimeout(10); "
                "result = line(old)"
            )

        for what in clients:
            begin(what)
        up, down = ["accepts", "sends", "demands"], ["sends", "accepts", "plain"]
        for stages, order in ((up, (left, right)), (down, (right, left))):
            for word in stages:
                for each in order:
                    made.stage(each, word)
                    settled = [one.node.drops() for one in made.both]
                    for what, (client, address, port) in clients.items():
                        assert client.do("old.sendall(b'x' * 5000 + b'?'); result = line(old)"), (what, each.name, word)
                        assert dial(client, address, port, bound.get(what, "")), (what, each.name, word)
                    assert [one.node.drops() for one in made.both] == settled, (each.name, word)
                if how == CLEAR and node_port not in clients:
                    clients[node_port] = left.process(left.pods[1]), left.node.underlay, REMOTE_NODE_PORT
                    begin(node_port)
            way = left.node.call(
                subprocess.run, ["ip", "route", "get", right.pods[0].address], capture_output=True, text=True
            ).stdout
            assert ((DEVICE if how == INSIDE else "via") in way) is (stages is up), way


@pytest.mark.parametrize("rp_filter", ["1", "0"])
def test_what_the_cni_masqueraded_before_the_agent_came_goes_on_natively(tmp_path: Path, rp_filter: str) -> None:
    with contextlib.ExitStack() as stack:
        left, right = both = stack.enter_context(kubernetes_nodes(load=False))
        right.node.process().do(f"serve_tcp('old', '{right.node.underlay}', 9000)")
        client = left.process(left.pods[0])
        words = f"old = socket.create_connection(('{right.node.underlay}', 9000), 5); result = line(old)"
        assert client.do(words) == f"old {left.node.underlay}"
        made = Estate(both, {}, stack)
        for each in both:
            made.stage(each, "demands")
        _check_sources(both, rp_filter)
        assert client.do("old.sendall(b'x' * 5000 + b'?'); result = line(old)")
        assert dial(client, right.node.underlay, 9000) == f"old {left.pods[0].address}", "new ones have the pod's"
        assert client.do("old.sendall(b'x' * 5000 + b'?'); result = line(old)")
        no_drops(both)
