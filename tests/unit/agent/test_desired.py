# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import agent_mesh as mesh
import pytest
from isthmus_agent.desired.compute import HostFacts, desired
from isthmus_agent.desired.datapath import Frontend, IpcacheEntry, Peer, Route, Rule
from isthmus_agent.desired.reach import Reachability
from isthmus_mesh import keys, wire

VIP = Frontend(IPv4Address("10.111.0.10"), 80, 6)


def compute(items, reach=None, spec=None, mtu=1500):
    return desired(
        spec or mesh.spec(),
        mesh.state(items),
        reach or Reachability(),
        HostFacts(underlay_mtu=mtu, cgroups={("shop", "web"): (4711,)}),
    )


def net(text: str) -> IPv4Network:
    return IPv4Network(text)


def addr(text: str) -> IPv4Address:
    return IPv4Address(text)


def test_ipcache_of_nodes_ranges_and_workloads():
    found = compute(mesh.documents({})).datapath.ipcache
    cloud = addr("198.18.2.11")
    assert found[net("198.18.2.11/32")] == IpcacheEntry(6, 2, cloud, is_node=True)
    assert found[net("10.102.0.1/32")] == IpcacheEntry(6, 2, cloud, is_fixed=True)
    assert found[net("10.102.0.0/28")] == IpcacheEntry(2, 2, cloud)
    assert found[net("10.102.0.2/32")] == IpcacheEntry((2 << 16) + 1, 2, cloud)
    assert found[net("10.101.0.17/32")] == IpcacheEntry(6, 1, addr("198.18.1.12"), is_fixed=True)


def test_ipcache_of_this_host_has_no_tunnel():
    found = compute(mesh.documents({})).datapath.ipcache
    assert found[net("198.18.1.11/32")] == IpcacheEntry(6, 1, None, is_node=True)
    assert found[net("10.101.0.1/32")] == IpcacheEntry(6, 1, None)
    assert found[net("10.101.0.2/32")] == IpcacheEntry((1 << 16) + 1, 1, None)
    assert net("10.101.0.0/28") not in found


def test_identity_1_of_a_peer_is_remote_node():
    items = mesh.documents({})
    host = wire.IPIdentityPair("10.102.0.2", 1, "198.18.2.11")
    items[keys.ip_key("10.102.0.2", "cloud")] = host.to_json().encode()
    assert compute(items).datapath.ipcache[net("10.102.0.2/32")].identity == 6


def translated(**more):
    """cloud-1, which others dial at an address that it does not have."""
    addresses = (
        wire.NodeAddress("InternalIP", "203.0.113.7"),
        wire.NodeAddress("ExternalIP", "198.18.2.11"),
        wire.NodeAddress("CiliumInternalIP", "10.102.0.1"),
    )
    return mesh.node("cloud", 1, addresses=addresses, **more)


def test_peers_are_all_underlay_addresses_of_other_nodes():
    items = mesh.documents({})
    two = translated()
    items[keys.node_key("cloud", "cloud-1", cached=True)] = two.to_json().encode()
    found = compute(items).datapath
    assert found.peers == {
        addr("203.0.113.7"): Peer(2, addr("203.0.113.7")),
        addr("198.18.2.11"): Peer(2, addr("203.0.113.7")),
        addr("198.18.2.12"): Peer(2, addr("198.18.2.12")),
        addr("198.18.1.12"): Peer(1, addr("198.18.1.12")),
        addr("198.18.1.13"): Peer(1, addr("198.18.1.13")),
        addr("198.18.3.11"): Peer(3, addr("198.18.3.11")),
    }
    # Both lead to the address that others dial.
    assert found.ipcache[net("198.18.2.11/32")].tunnel == addr("203.0.113.7")


@pytest.mark.parametrize(
    ("there", "here", "dialled"),
    [
        ("onprem", "", "198.18.2.11"),  # of one site: the address translation need not lead back in
        ("far", "far", "198.18.2.11"),
        ("onprem", "far", "203.0.113.7"),
        ("cloud", "", "203.0.113.7"),
        (None, "", "203.0.113.7"),  # a Cilium node does not say
    ],
)
def test_a_node_behind_an_address_translation_is_dialled_inside_its_site_at_the_address_that_it_has(
    there, here, dialled
):
    items = mesh.documents({"cloud": [1]})
    said = translated(
        annotations={wire.SITE: there} if there else {},
    )
    items[keys.node_key("cloud", "cloud-1", cached=True)] = said.to_json().encode()
    pair = wire.IPIdentityPair("10.102.0.2", (2 << 16) + 1, "203.0.113.7")
    items[keys.ip_key("10.102.0.2", "cloud")] = pair.to_json().encode()
    found = compute(items, spec=mesh.spec(node={**mesh.spec_document()["node"], "site": here})).datapath
    endpoint = addr(dialled)
    for network in ("10.102.0.1/32", "10.102.0.2/32", "10.102.0.0/28", "203.0.113.7/32", "198.18.2.11/32"):
        assert found.ipcache[net(network)].tunnel == endpoint, network
    # Whichever address it sends from.
    assert found.peers[addr("203.0.113.7")] == found.peers[addr("198.18.2.11")] == Peer(2, endpoint)
    (backend,) = found.services[VIP].backends
    assert backend.node == endpoint


def test_own_addresses_and_identities():
    found = compute(mesh.documents({})).datapath
    assert found.addresses == {addr("10.101.0.1"), addr("10.101.0.2")}
    assert found.local == {
        addr("198.18.1.11"): 6,
        addr("10.101.0.1"): 6,
        addr("10.101.0.2"): (1 << 16) + 1,
    }
    assert found.workloads == {4711: addr("10.101.0.2")}


def test_a_workload_without_published_identity_sends_nothing_rather_than_as_the_host():
    items = mesh.documents({})
    del items[keys.ip_key("10.101.0.2")]
    found = compute(items).datapath
    assert addr("10.101.0.2") not in found.local
    assert found.workloads == {4711: addr("10.101.0.2")}, "its sockets are bound to its own address all the same"


@pytest.mark.parametrize(
    ("own", "other", "configured", "expected"),
    [
        (1500, 1500, None, 1450),
        (1460, 1500, None, 1410),
        (1500, 1460, None, 1410),
        (9000, 1500, None, 1450),
        (1500, None, None, 1450),  # a Cilium node does not say
        (1500, 1500, 1400, 1400),
        (1460, 1500, 1450, 1410),  # a setting cannot make a path wider
    ],
)
def test_route_mtu(own, other, configured, expected):
    items = mesh.documents({})
    items[keys.node_key("cloud", "cloud-1", cached=True)] = mesh.node("cloud", 1, mtu=other).to_json().encode()
    spec = mesh.spec(overlay={"port": 8472, "mtu": configured})
    found = compute(items, spec=spec, mtu=own).datapath.routes
    assert Route(net("10.102.0.0/28"), addr("10.101.0.1"), expected, 254) in found


def test_routes_of_both_tables():
    found = compute(mesh.documents({}, sizes={"onprem": 1, "cloud": 1})).datapath
    source = addr("10.101.0.1")
    assert found.routes == {
        Route(net("10.102.0.0/28"), source, 1450, 254),
        Route(net("10.102.0.0/28"), source, 1450, 730),
        Route(net("198.18.2.11/32"), source, 1450, 730),
        Route(net("10.111.0.0/16"), unreachable=True),
        Route(net("10.112.0.0/16"), unreachable=True),
        Route(net("10.113.0.0/16"), unreachable=True),
        Route(net("10.101.0.0/16"), unreachable=True),
        Route(net("10.102.0.0/16"), unreachable=True),
        Route(net("10.103.0.0/16"), unreachable=True),
        Route(net("0.0.0.0/0"), table=730, unreachable=True),
    }
    assert found.rules == {Rule(net("10.101.0.0/28"), 730, 730)}


@pytest.mark.parametrize(
    "claim",
    [
        {"ipv4_alloc_cidr": IPv4Network("10.101.0.0/24")},
        {"ipv4_alloc_cidr": IPv4Network("198.18.0.0/15")},
        {"ipv4_alloc_cidr": IPv4Network("0.0.0.0/0")},
        {"addresses": (wire.NodeAddress("InternalIP", "198.18.1.11"),)},
        {
            "addresses": (
                wire.NodeAddress("InternalIP", "198.18.2.11"),
                wire.NodeAddress("CiliumInternalIP", "10.101.0.1"),
            )
        },
    ],
)
def test_a_peer_cannot_claim_this_host(claim):
    items = mesh.documents({})
    items[keys.node_key("cloud", "cloud-1", cached=True)] = mesh.node("cloud", 1, **claim).to_json().encode()
    found = compute(items)
    assert len(found.refused) == 1
    assert "cloud/cloud-1" in found.refused[0]
    assert found.datapath.local[addr("198.18.1.11")] == 6
    assert found.datapath.ipcache[net("10.101.0.1/32")].tunnel is None
    assert not any(route.prefix.prefixlen == 0 and not route.unreachable for route in found.datapath.routes)


def test_our_own_clusters_address_wins_over_a_peers_claim():
    items = mesh.documents({})
    theft = wire.IPIdentityPair("10.101.0.18", (2 << 16) + 1, "198.18.2.11")
    items[keys.ip_key("10.101.0.18", "cloud")] = theft.to_json().encode()
    assert compute(items).datapath.ipcache[net("10.101.0.18/32")] == IpcacheEntry((1 << 16) + 1, 1, addr("198.18.1.12"))


# --- services

ALL = {"onprem": [1, 2], "cloud": [1]}
LOCAL = {"10.101.0.2", "10.101.0.18"}
REMOTE = {"10.102.0.2"}
ONPREM2 = ("onprem", "onprem-2")
CLOUD1 = ("cloud", "cloud-1")


def used(found):
    return {str(backend.address) for backend in found.datapath.services[VIP].backends}


def draining(found):
    return {str(backend.address) for backend in found.datapath.services[VIP].draining}


@pytest.mark.parametrize(
    ("affinity", "is_global", "backends", "down", "expected"),
    [
        ("none", True, ALL, (), LOCAL | REMOTE),
        ("none", False, ALL, (), LOCAL),
        ("local", True, ALL, (), LOCAL),
        ("remote", True, ALL, (), REMOTE),
        ("local", True, {"cloud": [1]}, (), REMOTE),
        ("remote", True, {"onprem": [1, 2]}, (), LOCAL),
        ("local", True, {"onprem": [2], "cloud": [1]}, (ONPREM2,), REMOTE),
        ("remote", True, ALL, (CLOUD1,), LOCAL),
        ("none", True, ALL, (CLOUD1,), LOCAL),
        ("none", True, ALL, (ONPREM2,), {"10.101.0.2"} | REMOTE),
        # None reachable: the full set stays.
        ("none", True, {"onprem": [2], "cloud": [1]}, (ONPREM2, CLOUD1), {"10.101.0.18"} | REMOTE),
        ("local", True, {"cloud": [1]}, (CLOUD1,), REMOTE),
        ("remote", True, {"onprem": [2], "cloud": [1]}, (ONPREM2, CLOUD1), REMOTE),
        ("none", True, {}, (), set()),
    ],
)
def test_merge_affinity_and_reachability(affinity, is_global, backends, down, expected):
    found = compute(mesh.documents(backends, affinity, is_global), Reachability(down=frozenset(down)))
    assert used(found) == expected
    names = {mesh.workload_ip(cluster, n) for cluster, numbers in backends.items() for n in numbers}
    known = names if is_global else names - REMOTE
    assert draining(found) == known - expected, "what gets no new flows keeps its map entry"


def test_a_service_that_is_not_shared_is_not_used():
    items = mesh.documents(ALL)
    key = keys.service_key("cloud", "shop", "web", cached=True)
    items[key] = mesh.web_service("cloud", [1], shared=False).to_json().encode()
    assert used(compute(items)) == LOCAL


def test_port_names_decide_which_backend_serves():
    items = mesh.documents(ALL)
    key = keys.service_key("cloud", "shop", "web", cached=True)
    other = wire.ClusterService(
        cluster="cloud",
        namespace="shop",
        name="web",
        cluster_id=2,
        backends={
            "10.102.0.2": {"https": wire.L4Addr("TCP", 8443)},
            "10.102.0.18": {"http": wire.L4Addr("UDP", 8080)},
        },
    )
    items[key] = other.to_json().encode()
    assert used(compute(items)) == LOCAL


def test_a_service_that_is_not_global_comes_from_the_registrars_own_list():
    items = mesh.documents({}, is_global=False)
    items[keys.local_service_key("shop", "web")] = mesh.web_service("onprem", [1]).to_json().encode()
    assert used(compute(items)) == {"10.101.0.2"}


def test_a_published_service_without_definition_uses_its_own_frontends():
    items = mesh.documents({"cloud": [1]})
    del items[keys.service_definition_key("shop", "web")]
    del items[keys.vip_key("shop", "web")]
    own = wire.ClusterService(
        cluster="onprem",
        namespace="shop",
        name="web",
        cluster_id=1,
        frontends={"10.111.0.77": {"http": wire.L4Addr("TCP", 80)}},
    )
    items[keys.service_key("onprem", "shop", "web")] = own.to_json().encode()
    found = compute(items)
    assert [str(b.address) for b in found.datapath.services[Frontend(addr("10.111.0.77"), 80, 6)].backends] == [
        "10.102.0.2"
    ]
    assert found.names == {"web.shop.svc.clusterset.local": addr("10.111.0.77")}


def test_service_without_address_is_shown_and_not_programmed():
    items = mesh.documents(ALL)
    del items[keys.vip_key("shop", "web")]
    found = compute(items)
    assert found.datapath.services == {}
    assert found.names == {}
    assert found.views[0].address is None


def test_names_and_probe_targets():
    found = compute(mesh.documents(ALL))
    assert found.names == {"web.shop.svc.clusterset.local": addr("10.111.0.10")}
    assert found.holders == {("onprem", "onprem-1"), ONPREM2, CLOUD1}
    assert found.mesh == {
        ONPREM2: addr("10.101.0.17"),
        ("onprem", "onprem-3"): addr("10.101.0.33"),
        CLOUD1: addr("10.102.0.1"),
        ("cloud", "cloud-2"): addr("10.102.0.17"),
        ("edge", "edge-1"): addr("10.103.0.1"),
    }


@pytest.mark.parametrize(
    ("up", "down", "expected"),
    [
        ((CLOUD1,), (ONPREM2,), {"10.101.0.18"}),  # another cluster answers: the sockets to the dead node end
        ((), (ONPREM2,), set()),  # nobody else has answered: no proof that it is not us
        ((), (ONPREM2, CLOUD1), set()),  # isolated: nothing ends
        ((ONPREM2,), (CLOUD1,), {"10.102.0.2"}),
        ((CLOUD1, ONPREM2), (), set()),
    ],
)
def test_sockets_end_only_when_another_cluster_answers(up, down, expected):
    found = compute(mesh.documents(ALL), Reachability(up=frozenset(up), down=frozenset(down)))
    assert {str(backend.address) for backend in found.dead} == expected


def test_an_own_backend_is_a_proof_only_if_someone_else_answers():
    items = mesh.documents({"onprem": [1], "cloud": [1]})
    alone = compute(items, Reachability(down=frozenset({CLOUD1})))
    assert used(alone) == {"10.101.0.2"}
    assert alone.dead == frozenset(), "this host may be the one that is cut off"
    witnessed = compute(items, Reachability(up=frozenset({("onprem", "onprem-3")}), down=frozenset({CLOUD1})))
    assert {str(backend.address) for backend in witnessed.dead} == {"10.102.0.2"}


def test_a_cluster_whose_probed_nodes_are_all_down_is_down():
    reach = Reachability(down=frozenset({CLOUD1}), down_clusters=frozenset({"cloud"}))
    assert used(compute(mesh.documents({"onprem": [1], "cloud": [1, 2]}), reach)) == {"10.101.0.2"}


def test_a_backend_without_known_node_is_used():
    items = mesh.documents({"onprem": [1], "cloud": [1]})
    del items[keys.node_key("cloud", "cloud-1", cached=True)]
    assert used(compute(items)) == {"10.101.0.2", "10.102.0.2"}


def test_a_backend_of_which_only_the_service_is_known_yet_is_not_used():
    items = mesh.documents({"onprem": [1], "cloud": [1]})
    del items[keys.node_key("cloud", "cloud-1", cached=True)]
    del items[keys.ip_key("10.102.0.2", "cloud")]
    found = compute(items)
    assert used(found) == {"10.101.0.2"}
    # It may have been known before, so its flows are left alone.
    assert found.dead == frozenset()


def test_equal_inputs_give_equal_values():
    assert compute(mesh.documents(ALL)) == compute(mesh.documents(ALL))


def test_no_node_of_a_peer_takes_an_address_of_the_own_cluster():
    items = mesh.documents({})
    thief = mesh.node(
        "cloud",
        1,
        addresses=(wire.NodeAddress("InternalIP", "198.18.2.11"), wire.NodeAddress("ExternalIP", "10.101.0.18")),
    )
    items[keys.node_key("cloud", "cloud-1", cached=True)] = thief.to_json().encode()
    found = compute(items).datapath.ipcache
    assert found[net("10.101.0.18/32")] == IpcacheEntry((1 << 16) + 1, 1, addr("198.18.1.12"))


def offered(cluster: str, backend: str, ports: dict[str, wire.L4Addr], shared: bool = True) -> dict[str, bytes]:
    """A service `shop/api` as a peer has it."""
    service = wire.ClusterService(
        cluster=cluster,
        namespace="shop",
        name="api",
        cluster_id=mesh.CLUSTERS[cluster],
        frontends={"10.96.0.10": ports},
        backends={backend: {name: wire.L4Addr(port.protocol, port.port + 8000) for name, port in ports.items()}},
        shared=shared,
    )
    return {keys.service_key(cluster, "shop", "api", cached=True): service.to_json().encode()}


def test_a_service_that_only_peers_offer_has_their_ports_and_an_address_of_ours():
    http, dns = wire.L4Addr("TCP", 80), wire.L4Addr("UDP", 53)
    items = mesh.documents(ALL)
    items |= offered("cloud", "10.102.0.2", {"http": http, "dns": dns}) | offered("edge", "10.103.0.2", {"web": http})
    alone = compute(items)
    assert "api.shop.svc.clusterset.local" not in alone.names
    items[keys.vip_key("shop", "api")] = b'{"ipv4":"10.111.0.9","ipv6":null,"released":null,"by":"peers"}'
    found = compute(items)
    assert found.names["api.shop.svc.clusterset.local"] == addr("10.111.0.9")
    table = found.datapath.services
    # Of two names for one port the first cluster's counts, and names decide who serves it.
    assert [str(b.address) for b in table[Frontend(addr("10.111.0.9"), 80, 6)].backends] == ["10.102.0.2"]
    assert [b.port for b in table[Frontend(addr("10.111.0.9"), 53, 17)].backends] == [8053]
    for key in [key for key in items if key.endswith("/shop/api") and "cache" in key]:
        del items[key]
    assert "api.shop.svc.clusterset.local" not in compute(items).names


def test_a_service_that_peers_keep_for_themselves_is_none_of_ours():
    items = mesh.documents(ALL) | offered("cloud", "10.102.0.2", {"http": wire.L4Addr("TCP", 80)}, shared=False)
    items[keys.vip_key("shop", "api")] = b'{"ipv4":"10.111.0.9","ipv6":null,"released":null,"by":"peers"}'
    assert "api.shop.svc.clusterset.local" not in compute(items).names


def test_a_service_of_our_kubernetes_has_its_own_address_ports_and_affinity():
    items = mesh.documents(ALL, affinity="remote")
    own = wire.ClusterService(
        cluster="onprem",
        namespace="shop",
        name="web",
        cluster_id=1,
        frontends={"10.96.0.10": {"http": wire.L4Addr("TCP", 8000)}},
        backends={"10.101.0.2": {"http": wire.L4Addr("TCP", 8080)}},
    )
    items[keys.service_key("onprem", "shop", "web")] = own.to_json().encode()
    items[keys.vip_key("shop", "web")] = (
        b'{"ipv4":"10.96.0.10","ipv6":null,"released":null,"by":"kubernetes","affinity":"local","session_affinity":60,'
        b'"kept":"10.111.0.1"}'
    )
    found = compute(items)
    assert list(found.datapath.services) == [Frontend(addr("10.96.0.10"), 8000, 6)]
    assert [(view.affinity, view.session_affinity) for view in found.views] == [("local", 60)]
    assert [service.session_affinity for service in found.datapath.services.values()] == [60]
    assert [str(b.address) for b in found.datapath.services[Frontend(addr("10.96.0.10"), 8000, 6)].backends] == [
        "10.101.0.2"
    ]
    del items[keys.service_definition_key("shop", "web")]
    assert compute(items).datapath.services == found.datapath.services
