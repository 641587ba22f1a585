# SPDX-License-Identifier: GPL-3.0-or-later
"""What bad input gets: every message, in full."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_mesh.model import ModelError, read_model
from unit.mesh.estates import estate, hosts, model, web

Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def test_a_good_inventory() -> None:
    found = model()
    assert found.domain == "clusterset.local"
    assert found.max_clusters == 255
    assert found.sites == ("cloud", "onprem")
    assert found.clusters["onprem"].workload_ranges == (IPv4Network("10.101.0.0/16"),)
    assert found.clusters["onprem"].site == "onprem"
    assert found.hosts["o1"].underlay == IPv4Address("198.18.1.1")
    assert found.hosts["o1"].advertise == IPv4Address("198.18.1.1")
    (workload,) = found.hosts["c1"].workloads
    assert workload.key == "shop/web"
    assert workload.cgroup == {"unit": "web.service"}
    definition = found.services["shop/web"].definition
    assert definition.health is not None
    assert definition.health.port == 8080
    assert definition.is_global
    assert found.services["shop/web"].clusters == ("cloud", "onprem")
    assert found.warnings == ()


def test_hosts_without_a_cluster_are_ignored_whatever_they_hold() -> None:
    extra = hosts()
    extra["Printer_1"] = {"isthmus_labels": 7, "ansible_host": "10.101.0.1"}
    assert model(the_hosts=extra) == model()


def test_only_the_fixed_list_of_variables_is_looked_at() -> None:
    class Secret:
        def __eq__(self, other: object) -> bool:
            raise AssertionError("somebody looked")

        __hash__ = None  # type: ignore[assignment]

    extra = hosts()
    extra["o1"]["isthmus_secret_of_another_team"] = Secret()
    assert model(the_hosts=extra) == model()


def test_order_does_not_show() -> None:
    turned = estate()
    turned["clusters"] = dict(reversed(turned["clusters"].items()))
    found = model(turned, dict(reversed(hosts().items())))
    assert found == model()
    assert found.digest() == model().digest()


def test_the_digest_follows_the_content() -> None:
    other = estate()
    other["services"][0]["affinity"] = "local"
    assert model(other).digest() != model().digest()


def test_reserved_ranges_may_overlap_each_other_and_hold_hosts() -> None:
    """An estate without any has the digest that it had before there were such."""
    other = estate()
    other["reserved_ranges"] = []
    assert model(other).digest() == model().digest()
    other["reserved_ranges"] = [
        {"name": "VPC", "range": "198.18.0.0/15"},
        {"name": "subnet of onprem", "range": "198.18.1.0/24"},
        {"name": "192.0.2.0/24", "range": "192.0.2.0/24"},
    ]
    found = model(other)
    assert [str(claim.network) for claim in found.reserved] == ["192.0.2.0/24", "198.18.0.0/15", "198.18.1.0/24"]
    assert found.digest() != model().digest()


def test_a_refusal_has_what_could_be_read() -> None:
    the_estate, the_hosts = estate(), hosts()
    the_estate.update(name=7, overlay={"port": "x"}, sites=[], max_clusters=1, reserved_ranges=7)
    the_estate["clusters"]["cloud"].update(workload_ranges=["10.101.128.0/20"])
    the_hosts["o2"]["ansible_host"] = "198.18.1.1"
    with pytest.raises(ModelError) as caught:
        model(the_estate, the_hosts)
    draft, (conflict,) = caught.value.draft, caught.value.conflicts
    assert draft is not None
    assert (sorted(draft.clusters), sorted(draft.hosts)) == (["cloud", "onprem"], ["c1", "o1", "o2", "o3"])
    assert (draft.max_clusters, draft.reserved) == (255, ())
    assert (str(conflict.outer.network), conflict.inner.owner) == ("10.101.0.0/16", "cloud")
    assert conflict.problem in caught.value.problems
    with pytest.raises(ModelError) as caught:
        read_model([], {})
    assert caught.value.draft is None


def _cluster(name: str, **changes: Any) -> Edit:
    return lambda e, h: e["clusters"][name].update(changes)


def _host(name: str, **changes: Any) -> Edit:
    return lambda e, h: h[name].update(changes)


def _workload(**changes: Any) -> Edit:
    return lambda e, h: h["c1"]["isthmus_workloads"][0].update(changes)


def _service(**changes: Any) -> Edit:
    return lambda e, h: e["services"][0].update(changes)


def _estate(**changes: Any) -> Edit:
    return lambda e, h: e.update(changes)


C = "isthmus_estate.clusters"
S = "isthmus_estate.services[0] (shop/web)"

MESSAGES: list[tuple[str, Edit, str]] = [
    # Ranges
    (
        "overlapping ranges of two clusters",
        _cluster("cloud", workload_ranges=["10.101.128.0/20"]),
        f"{C}.cloud.workload_ranges: 10.101.128.0/20 and 10.101.0.0/16 ({C}.onprem.workload_ranges) overlap: they "
        "share 4096 addresses (10.101.128.0/20). Why: an address of the mesh belongs to one place. Next: choose "
        "ranges that are apart.",
    ),
    (
        "a service range inside a workload range",
        _cluster("cloud", service_range="10.102.3.0/24"),
        f"{C}.cloud.service_range: 10.102.3.0/24 and 10.102.0.0/16 ({C}.cloud.workload_ranges) overlap: they share "
        "256 addresses (10.102.3.0/24). Why: an address of the mesh belongs to one place. Next: choose ranges that "
        "are apart.",
    ),
    (
        "a workload range inside a reserved one",
        _estate(
            reserved_ranges=[{"name": "office VPN", "range": "10.96.0.0/12"}, {"name": "all", "range": "11.0.0.0/8"}]
        ),
        f"{C}.onprem.workload_ranges: 10.101.0.0/16 and 10.96.0.0/12 (isthmus_estate.reserved_ranges[0] (office VPN)) "
        "overlap: they share 65536 addresses (10.101.0.0/16). Why: packets to what is there would be sent into the "
        "mesh. Next: choose ranges that are apart.",
    ),
    (
        "a reserved range inside a service range",
        _estate(reserved_ranges=[{"name": "a printer", "range": "10.112.3.7/32"}]),
        f"{C}.cloud.service_range: 10.112.0.0/16 and 10.112.3.7/32 (isthmus_estate.reserved_ranges[0] (a printer)) "
        "overlap: they share 1 address (10.112.3.7/32). Why: packets to what is there would be sent into the mesh. "
        "Next: choose ranges that are apart.",
    ),
    (
        "two reserved ranges of one name",
        _estate(reserved_ranges=[{"name": "x", "range": "10.9.0.0/16"}, {"name": "x", "range": "10.8.0.0/16"}]),
        "isthmus_estate.reserved_ranges[1].name: 'x' is there twice. Why: messages name ranges by it. Next: rename "
        "one.",
    ),
    (
        "a reserved range that is none",
        _estate(reserved_ranges=[{"name": "x", "range": "10.9.0.1/16"}]),
        "isthmus_estate.reserved_ranges[0].range: '10.9.0.1/16' has bits set behind its prefix. Why: no range of the "
        "mesh may overlap it. Next: write 10.9.0.0/16.",
    ),
    (
        "a reserved range whose name would break a line",
        _estate(reserved_ranges=[{"name": "x\ny", "range": "10.9.0.0/16"}]),
        "isthmus_estate.reserved_ranges[0].name: 'x\\ny' is not a name (1 to 63 printable ASCII characters). Why: "
        "messages name it. Next: change it.",
    ),
    (
        "an underlay address inside a range",
        _host("c1", ansible_host="10.101.7.7"),
        f"host c1.isthmus_underlay: 10.101.7.7 lies in 10.101.0.0/16 ({C}.onprem.workload_ranges). Why: packets "
        "between hosts would be sent into the mesh that they carry. Next: choose a range that holds no host's own "
        "address.",
    ),
    (
        "an underlay address inside another cluster's service range",
        _host("c1", ansible_host="10.111.7.7"),
        f"host c1.isthmus_underlay: 10.111.7.7 lies in 10.111.0.0/16 ({C}.onprem.service_range). Why: packets "
        "between hosts would be sent into the mesh that they carry. Next: choose a range that holds no host's own "
        "address.",
    ),
    (
        "an advertised address inside the own range",
        _host("c1", isthmus_advertise="10.102.0.1"),
        f"host c1.isthmus_advertise: 10.102.0.1 lies in 10.102.0.0/16 ({C}.cloud.workload_ranges). Why: packets "
        "between hosts would be sent into the mesh that they carry. Next: choose a range that holds no host's own "
        "address.",
    ),
    (
        "host bits",
        _cluster("cloud", service_range="10.112.0.1/16"),
        f"{C}.cloud.service_range: '10.112.0.1/16' has bits set behind its prefix. Why: addresses are dealt from it. "
        "Next: write 10.112.0.0/16.",
    ),
    (
        "no range",
        _cluster("cloud", service_range="10.112.0.0"),
        f"{C}.cloud.service_range: '10.112.0.0' is not an IP range. Why: addresses are dealt from it. Next: write one "
        "like 10.101.0.0/16.",
    ),
    (
        "no unicast",
        _cluster("cloud", service_range="224.0.0.0/16"),
        f"{C}.cloud.service_range: 224.0.0.0/16 is not usable unicast space. Why: addresses are dealt from it. Next: "
        "use a private range.",
    ),
    (
        "an empty list of ranges",
        _cluster("cloud", workload_ranges=[]),
        f"{C}.cloud.workload_ranges: the list is empty. Why: at least one entry is needed. Next: add an IP range.",
    ),
    (
        "a range smaller than a node's",
        _cluster("cloud", workload_ranges=["10.102.0.0/27"], node_prefix=26),
        f"{C}.cloud.workload_ranges: 10.102.0.0/27 is smaller than a node range (/26). Why: not even one host fits. "
        "Next: use a larger range.",
    ),
    (
        "IPv6",
        _cluster("cloud", workload_ranges=["10.102.0.0/16", "fd00:102::/48"]),
        f"{C}.cloud.workload_ranges[1]: fd00:102::/48 is not yet supported. Why: the datapath carries IPv4 only so "
        "far. Next: use an IPv4 range until a later version does it.",
    ),
    # Ids and names
    (
        "a duplicate id",
        _cluster("cloud", id=1),
        f"{C}.onprem.id: 1 is also the id of cluster cloud. Why: identities of the two could not be told apart. Next: "
        "give each cluster an id of its own.",
    ),
    (
        "an id above 255",
        _cluster("cloud", id=300),
        f"{C}.cloud.id: 300 is out of range 1..255. Why: identities carry the cluster's id in 8 bits. Next: choose "
        "another id, or set max_clusters: 511 before the first run of every member.",
    ),
    (
        "an id of 0",
        _cluster("cloud", id=0),
        f"{C}.cloud.id: 0 is out of range 1..511. Why: identities carry the cluster's id in 8 bits, or 9 with "
        "max_clusters: 511. Next: write number 1..511.",
    ),
    (
        "an id that is no number",
        _cluster("cloud", id="two"),
        f"{C}.cloud.id: 'two' is not a whole number. Why: identities carry the cluster's id in 8 bits, or 9 with "
        "max_clusters: 511. Next: write one of number 1..511.",
    ),
    (
        "max_clusters",
        _estate(max_clusters=256),
        "isthmus_estate.max_clusters: 256 is not one of 255, 511. Why: nothing else is defined. Next: write one of "
        "255, 511.",
    ),
    (
        "a cluster name",
        lambda e, h: e["clusters"].update(Cloud_2=e["clusters"].pop("cloud")),
        f"{C}.Cloud_2: 'Cloud_2' is not a cluster name (an RFC 1123 label of at most 32 characters, not 'default'). "
        "Why: Cilium ClusterMesh accepts no other, and the name becomes part of etcd keys and certificates. Next: "
        "change it.",
    ),
    (
        "the cluster name default",
        lambda e, h: e["clusters"].update(default=e["clusters"].pop("cloud")),
        f"{C}.default: 'default' is not a cluster name (an RFC 1123 label of at most 32 characters, not 'default'). "
        "Why: Cilium ClusterMesh accepts no other, and the name becomes part of etcd keys and certificates. Next: "
        "change it.",
    ),
    (
        "a host name",
        lambda e, h: h.update(My_Host=h.pop("c1")),
        "host My_Host: 'My_Host' is not a host name of RFC 1123 labels (lower-case letters, digits, '-', joined by "
        "'.', at most 50). Why: the name becomes part of etcd keys, and with 'isthmus-agent-' before it the name in a "
        "certificate (64 at most). Next: change it.",
    ),
    (
        "a service name",
        _service(name="web_1"),
        "isthmus_estate.services[0].name: 'web_1' is not an RFC 1123 label (lower-case letters, digits and '-', at "
        "most 63). Why: the name becomes part of DNS names and etcd keys. Next: change it.",
    ),
    (
        "a name that YAML reads as a number",
        _service(name=7),
        "isthmus_estate.services[0].name: 7 is not text. Why: the name becomes part of DNS names and etcd keys. Next: "
        "write an RFC 1123 label (lower-case letters, digits and '-', at most 63); put it in quotes.",
    ),
    # Hosts and addresses
    (
        "a duplicate address",
        _host("c1", ansible_host="198.18.1.1"),
        "host o1.isthmus_underlay: 198.18.1.1 is also an address of host c1. Why: packets of the two could not be told "
        "apart. Next: give each host an address of its own; behind address translation set isthmus_advertise.",
    ),
    (
        "no literal address",
        _host("c1", ansible_host="c1.example.com"),
        "host c1.isthmus_underlay: it is missing, and ansible_host is not a literal address. Why: other hosts send "
        "their packets to it, and gathered facts are absent under --limit. Next: set isthmus_underlay to the host's "
        "address.",
    ),
    (
        "an address that is none",
        _host("c1", isthmus_advertise="198.18.1.300"),
        "host c1.isthmus_advertise: '198.18.1.300' is not an IP address. Why: other hosts send packets to it. Next: "
        "write a literal address such as 192.0.2.7.",
    ),
    (
        "a loopback address",
        _host("c1", isthmus_advertise="127.0.0.1"),
        "host c1.isthmus_advertise: 127.0.0.1 is no unicast address of one host. Why: other hosts send packets to it. "
        "Next: write the host's own.",
    ),
    (
        "an IPv6 underlay",
        _host("c1", ansible_host="2001:db8::1"),
        "host c1.isthmus_underlay: 2001:db8::1 is not yet supported. Why: the datapath carries IPv4 only so far. Next: "
        "use an IPv4 address until a later version does it.",
    ),
    (
        "a host in two clusters, by its groups",
        _host("c1", isthmus_cluster=["cloud", "onprem"]),
        "host c1.isthmus_cluster: the host is in two clusters: cloud, onprem. Why: its address and identity belong to "
        "one. Next: keep one.",
    ),
    (
        "a host in two clusters, by its member",
        lambda e, h: e["clusters"]["cloud"]["etcd"].update(hosts=["c1", "o2", "o3"]),
        f"{C}.cloud.etcd.hosts: host o2 is in two clusters: it carries cloud's etcd or CA, and its isthmus_cluster is "
        "onprem. Why: an etcd trusts only its own cluster's CA. Next: choose a host of this cluster.",
    ),
    (
        "an unknown cluster",
        _host("c1", isthmus_cluster="clod"),
        "host c1.isthmus_cluster: 'clod' is not a cluster of this estate. Why: the host would belong to nothing. Next: "
        "did you mean 'cloud'? Change it.",
    ),
    (
        "a pinned range outside the cluster's",
        _host("c1", isthmus_node_range="10.101.0.0/28"),
        "host c1.isthmus_node_range: 10.101.0.0/28 is not in a workload range of cluster cloud. Why: peers refuse "
        "addresses outside their owner's ranges. Next: choose one inside 10.102.0.0/16.",
    ),
    (
        "two pinned ranges that overlap",
        lambda e, h: (
            h["o1"].update(isthmus_node_range="10.101.0.0/27"),
            h["o2"].update(isthmus_node_range="10.101.0.16/28"),
        ),
        "host o2.isthmus_node_range: 10.101.0.16/28 and 10.101.0.0/27 of host o1 share 16 addresses (10.101.0.16/28). "
        "Why: an address belongs to one host. Next: choose another range.",
    ),
    (
        "two workloads with one pinned address",
        lambda e, h: (
            h["c1"]["isthmus_workloads"][0].update(address="10.102.0.5"),
            h.update(
                c2={
                    "isthmus_cluster": "cloud",
                    "ansible_host": "198.18.2.2",
                    "isthmus_workloads": [{**web(), "address": "10.102.0.5"}],
                }
            ),
        ),
        "host c2.isthmus_workloads (shop/web).address: 10.102.0.5 is also the address of c1/shop/web. Why: an address "
        "belongs to one workload. Next: choose another.",
    ),
    (
        "a pinned address outside the pinned range",
        lambda e, h: (
            h["c1"].update(isthmus_node_range="10.102.0.0/28"),
            h["c1"]["isthmus_workloads"][0].update(address="10.102.0.17"),
        ),
        "host c1.isthmus_workloads (shop/web).address: 10.102.0.17 is not in the node range 10.102.0.0/28. Why: other "
        "hosts find the workload by its host's range. Next: choose an address inside it.",
    ),
    # Control plane
    (
        "no etcd host",
        lambda e, h: e["clusters"]["cloud"].pop("etcd"),
        f"{C}.cloud.etcd.hosts: there is no etcd host. Why: with control_plane: hosts the cluster's state lives in "
        "etcd on its own hosts. Next: name 1, 3 or 5 hosts of this cluster.",
    ),
    (
        "an etcd host that is not there",
        lambda e, h: e["clusters"]["cloud"]["etcd"].update(hosts=["cl"]),
        f"{C}.cloud.etcd.hosts: 'cl' is not a host of the inventory. Why: nobody could carry it. Next: use one of c1, "
        "o1, o2, o3.",
    ),
    (
        "an etcd host without a cluster",
        lambda e, h: h["o3"].pop("isthmus_cluster"),
        f"{C}.onprem.etcd.hosts: host o3 has no isthmus_cluster. Why: a member is a host of its cluster. Next: set "
        "isthmus_cluster: onprem for it.",
    ),
    (
        "a CA host that is not there",
        _cluster("cloud", ca_host="c9"),
        f"{C}.cloud.ca_host: 'c9' is not a host of the inventory. Why: nobody could carry it. Next: use one of c1, o1, "
        "o2, o3.",
    ),
    (
        "a member that is being removed",
        _host("o3", isthmus_state="absent"),
        f"{C}.onprem.etcd.hosts: host o3 is being removed. Why: it would leave with the host. Next: name another host "
        "first.",
    ),
    (
        "ports of etcd",
        lambda e, h: e["clusters"]["cloud"]["etcd"].update(client_port=2380),
        f"{C}.cloud.etcd.peer_port: 2380 is also client_port. Why: two listeners cannot share a port. Next: choose "
        "another.",
    ),
    *(
        (
            f"the overlay at the port of {words}",
            lambda e, h, port=port, more=more: e.update(more, overlay={"port": port}),
            f"isthmus_estate.overlay.port: {port} is also the UDP port of {words}. Why: a host can have one program "
            "there, and the other one would not start. Next: leave it out (8472), or set a port that no program of "
            "the hosts has.",
        )
        for port, more, words in (
            (53, {}, "DNS, at which dnsmasq answers on every host"),
            (51871, {"encryption": "wireguard"}, "WireGuard (encryption: wireguard)"),
            (
                51872,
                {"sites": {"onprem": {"encryption": "wireguard"}, "cloud": {"encryption": "wireguard"}}},
                "WireGuard (encryption: wireguard)",
            ),
        )
    ),
    (
        "an archive without digest",
        lambda e, h: e["clusters"]["cloud"]["etcd"].update(source={"type": "archive", "path": "/srv/etcd.tgz"}),
        f"{C}.cloud.etcd.source: sha256 is missing. Why: what is fetched is checked before it is run. Next: add the "
        "archive's sha256.",
    ),
    (
        "an archive from nowhere",
        lambda e, h: e["clusters"]["cloud"]["etcd"].update(source={"type": "archive", "sha256": "0" * 64}),
        f"{C}.cloud.etcd.source: an archive needs path or url. Why: it must come from one place. Next: give one of "
        "them.",
    ),
    (
        "a package with a digest",
        lambda e, h: e["clusters"]["cloud"]["etcd"].update(source={"type": "package", "sha256": "0" * 64}),
        f"{C}.cloud.etcd.source: sha256 goes with type: archive only. Why: a package comes from the distribution. "
        "Next: remove sha256 or set type: archive.",
    ),
    (
        "inbound: false without WireGuard",
        _estate(sites={"onprem": {}, "cloud": {"inbound": False}}),
        "isthmus_estate.sites.cloud.inbound: false, and traffic with onprem (none) is not encrypted by WireGuard. Why: "
        "only inside sessions of WireGuard, which the site's hosts open, do others reach them. Next: set `encryption: "
        "wireguard` for the pairs of cloud with other sites.",
    ),
    (
        "inbound: false on both sides",
        _estate(encryption="wireguard", sites={"onprem": {"inbound": False}, "cloud": {"inbound": False}}),
        "isthmus_estate.sites.cloud.inbound: false, as of onprem. Why: neither side could open a session to the other, "
        "and no host of a third site relays. Next: take `inbound: false` from one of them: UDP 51871 and 51872, "
        "forwarded to a host's own address by the address translation there, are enough (isthmus_advertise).",
    ),
    (
        "an etcd that is inside and outside of a site with inbound: false",
        lambda e, h: (
            e.update(encryption="wireguard", sites={"onprem": {}, "cloud": {}, "edge": {"inbound": False}}),
            h["o3"].update(isthmus_site="edge"),
        ),
        f"{C}.onprem.etcd.hosts: o3 is at a site with `inbound: false`, and other members are at other sites. Why: "
        "members of one etcd open connections to each other before there is a mesh. Next: list hosts of one site.",
    ),
    # Not yet
    (
        "two sides that differ",
        _estate(sites={"onprem": {"routing": "native"}, "cloud": {}}),
        "isthmus_estate.routing: the sides of cloud and onprem differ: one is `native`, the other `tunnel`. Why: each "
        "would send what the other does not take. Next: say in site_pairs which of the two they use, or set the native "
        "side to `hybrid`, which has the tunnel to other sites.",
    ),
    (
        "partial peers",
        _cluster("cloud", peers=[]),
        f"{C}.cloud.peers: a part of the clusters (without onprem) is not yet supported. Why: every cluster exchanges "
        "state with every other so far. Next: use all until a later version does it.",
    ),
    (
        "partial export",
        _cluster("cloud", export={"namespaces": ["shop"]}),
        f"{C}.cloud.export: a part of the global services is not yet supported. Why: every global service is offered "
        "to every peer so far. Next: use all until a later version does it.",
    ),
    # Sites
    (
        "an unknown site",
        lambda e, h: e.update(sites={"onprem": {}, "clouds": {}}),
        f"{C}.cloud.site: 'cloud' is not a site of this estate. Why: its routing would be unknown. Next: did you mean "
        "'clouds'? Change it.",
    ),
    (
        "a pair of three",
        _estate(site_pairs=[{"sites": ["onprem", "cloud", "onprem"]}]),
        "isthmus_estate.site_pairs[0].sites: onprem, cloud, onprem are not two sites. Why: it is a pair. Next: name "
        "two sites; for the hosts of one among themselves, the same twice.",
    ),
    (
        "encryption of another kind",
        _estate(encryption="wiregard"),
        "isthmus_estate.encryption: 'wiregard' is not one of none, wireguard, ipsec-gateway. Why: nothing else is "
        "defined. Next: did you mean 'wireguard'? Change it.",
    ),
    (
        "a pair twice",
        _estate(site_pairs=[{"sites": ["onprem", "cloud"]}, {"sites": ["cloud", "onprem"]}]),
        "isthmus_estate.site_pairs[1].sites: the pair cloud and onprem is there twice. Why: one would win. Next: "
        "remove one.",
    ),
    # Unknown keys
    (
        "an unknown key of the estate",
        _estate(cluster={}),
        "isthmus_estate.cluster: 'cluster' is not a key of an estate. Why: an unknown key would be ignored in silence. "
        "Next: did you mean 'clusters'? Change it.",
    ),
    (
        "an unknown key of a cluster",
        _cluster("cloud", workload_range="10.9.0.0/16"),
        f"{C}.cloud.workload_range: 'workload_range' is not a key of a cluster. Why: an unknown key would be ignored "
        "in silence. Next: did you mean 'workload_ranges'? Change it.",
    ),
    (
        "an unknown key of a workload",
        _workload(slize="x.slice"),
        "host c1.isthmus_workloads[0].slize: 'slize' is not a key of a workload. Why: an unknown key would be ignored "
        "in silence. Next: did you mean 'slice'? Change it.",
    ),
    (
        "an unknown key of a health check",
        lambda e, h: e["services"][0]["health"].update(retries=3),
        "isthmus_estate.services[0].health.retries: 'retries' is not a key of a health check. Why: an unknown key "
        "would be ignored in silence. Next: use one of command, fall, interval, path, port, rise, timeout, type.",
    ),
    (
        "a variable that is not one of ours",
        _host("c1", isthmus_workload=[]),
        "host c1.isthmus_workload: it is not a variable of Isthmus. Why: an unknown variable would be ignored in "
        "silence. Next: did you mean 'isthmus_workloads'? Change it.",
    ),
    (
        "a missing key",
        lambda e, h: e["clusters"]["cloud"].pop("service_range"),
        f"{C}.cloud.service_range: it is missing. Why: Range that addresses of services are dealt from; it can only "
        "grow. Next: add service_range: IP range.",
    ),
    # Workloads
    (
        "no cgroup",
        lambda e, h: h["c1"]["isthmus_workloads"][0].pop("unit"),
        "host c1.isthmus_workloads[0]: it names no unit, slice or path. Why: exactly one cgroup is the workload. Next: "
        "give one of unit, slice, path.",
    ),
    (
        "two cgroups",
        _workload(slice="web.slice"),
        "host c1.isthmus_workloads[0]: it names unit and slice. Why: exactly one cgroup is the workload. Next: give "
        "one of unit, slice, path.",
    ),
    (
        "a workload twice",
        lambda e, h: h["c1"]["isthmus_workloads"].append(web()),
        "host c1.isthmus_workloads[1]: shop/web is there twice. Why: its name is its key. Next: rename or remove one.",
    ),
    (
        "a unit twice",
        lambda e, h: h["c1"]["isthmus_workloads"].append({**web(), "name": "web2"}),
        "host c1.isthmus_workloads[1]: web.service is also the workload shop/web. Why: a process has one address and "
        "identity. Next: name another cgroup.",
    ),
    (
        "a path twice, with and without '/' in front",
        lambda e, h: h["c1"].update(isthmus_workloads=[{"name": "a", "path": "x/y"}, {"name": "b", "path": "/x/y"}]),
        "host c1.isthmus_workloads[1]: /x/y is also the workload default/a. Why: a process has one address and "
        "identity. Next: name another cgroup.",
    ),
    (
        "a unit that is none",
        _workload(unit="web"),
        "host c1.isthmus_workloads[0].unit: 'web' is not a systemd unit (service or scope). Why: its cgroup is the "
        "workload. Next: change it.",
    ),
    (
        "a path that climbs",
        lambda e, h: h["c1"].update(isthmus_workloads=[{"name": "web", "path": "a/../../b"}]),
        "host c1.isthmus_workloads[0].path: 'a/../../b' is not a path below the cgroup2 root without '..'. Why: it "
        "names the workload's cgroup. Next: change it.",
    ),
    (
        "a label that YAML reads as a number",
        _workload(labels={"app": "web", "tier": 1}),
        "host c1.isthmus_workloads[0].labels.tier: 1 is not text. Why: labels are Kubernetes labels, and policies "
        "select on them. Next: put the value in quotes.",
    ),
    (
        "a label that would break the wire format",
        _workload(labels={"app": "web;k8s:x=y"}),
        "host c1.isthmus_workloads[0].labels.app: 'web;k8s:x=y' is not a Kubernetes label value. Why: labels are "
        "Kubernetes labels, and policies select on them. Next: use up to 63 letters, digits, '-', '_' and '.'.",
    ),
    # Services
    (
        "a port out of range",
        _service(ports=[{"port": 65536}]),
        "isthmus_estate.services[0].ports[0].port: 65536 is out of range 1..65535. Why: TCP and UDP have no other "
        "ports. Next: write number 1..65535.",
    ),
    (
        "a port twice",
        _service(ports=[{"name": "a", "port": 80}, {"name": "b", "port": 80}]),
        f"{S}.ports[1].port: 80/TCP is there twice. Why: one address and port leads to one set of backends. Next: "
        "remove one.",
    ),
    (
        "a port's name twice",
        _service(ports=[{"name": "a", "port": 80}, {"name": "a", "port": 81}]),
        f"{S}.ports[1].name: 'a' is there twice. Why: the name is its key. Next: rename one.",
    ),
    (
        "a port without a name",
        _service(ports=[{"name": "a", "port": 80}, {"port": 81}]),
        f"{S}.ports[1].name: it is missing. Why: with several ports the name says which is which. Next: add a name.",
    ),
    (
        "a protocol",
        _service(ports=[{"port": 80, "protocol": "tcp"}]),
        "isthmus_estate.services[0].ports[0].protocol: 'tcp' is not one of TCP, UDP. Why: nothing else is defined. "
        "Next: write one of TCP, UDP.",
    ),
    (
        "an unknown host",
        _service(backends={"workloads": ["c2/web"]}),
        f"{S}.backends.workloads: 'c2' of 'c2/web' is not a host of the mesh. Why: the backend could not exist. Next: "
        "use one of c1, o1, o2, o3.",
    ),
    (
        "an unknown workload",
        _service(backends={"workloads": ["c1/wep"]}),
        f"{S}.backends.workloads: host c1 has no workload shop/wep. Why: a backend is a workload of the service's "
        "namespace. Next: did you mean 'web'? Change it.",
    ),
    (
        "an unknown cluster",
        _service(clusters=["cloud", "edge"]),
        f"{S}.clusters: 'edge' is not a cluster of this estate. Why: the service could exist nowhere. Next: use one of "
        "cloud, onprem.",
    ),
    (
        "backends of no kind",
        _service(backends={}),
        f"{S}.backends: it needs labels or workloads, and one of them only. Why: backends are chosen one way. Next: "
        "fix it.",
    ),
    (
        "a service twice",
        lambda e, h: e["services"].append(e["services"][0]),
        "isthmus_estate.services[1] (shop/web): shop/web is there twice. Why: its name is its key. Next: rename or "
        "remove one.",
    ),
    (
        "a check that has no port",
        _service(ports=[{"port": 53, "protocol": "UDP"}], health={"type": "tcp"}),
        f"{S}.health.port: it is missing, and the service has no TCP port for a tcp check. Why: the check needs a TCP "
        "port. Next: add port, or use type: exec.",
    ),
    (
        "an exec check without command",
        _service(health={"type": "exec"}),
        f"{S}.health.command: it is missing. Why: an exec check runs it. Next: add the command as a list.",
    ),
    (
        "a path for a tcp check",
        _service(health={"type": "tcp", "path": "/"}),
        f"{S}.health.path: it goes with type: http only. Why: a tcp check has none. Next: remove it.",
    ),
    (
        "an affinity",
        _service(affinity="locl"),
        "isthmus_estate.services[0].affinity: 'locl' is not one of none, local, remote. Why: nothing else is defined. "
        "Next: did you mean 'local'? Change it.",
    ),
    # The whole
    (
        "a newer schema",
        _estate(schema=2),
        "isthmus_estate.schema: 2 is newer than 1, the newest that this collection reads. Why: a newer key could be "
        "misread. Next: `ansible-galaxy collection install isthmus.mesh --upgrade`.",
    ),
    (
        "no clusters",
        lambda e, h: (e.update(clusters={}, services=[]), h.clear()),
        "isthmus_estate.clusters: there is no cluster. Why: a mesh joins clusters. Next: add at least one.",
    ),
    (
        "a list for a mapping",
        _estate(clusters=[]),
        "isthmus_estate.clusters: [] is not a mapping. Why: its keys are cluster names. Next: write a mapping.",
    ),
]


@pytest.mark.parametrize(("edit", "message"), [entry[1:] for entry in MESSAGES], ids=[entry[0] for entry in MESSAGES])
def test_bad_input_gets_this_message(edit: Edit, message: str) -> None:
    the_estate, the_hosts = estate(), hosts()
    edit(the_estate, the_hosts)
    with pytest.raises(ModelError) as caught:
        read_model(the_estate, the_hosts)
    assert message in [str(problem) for problem in caught.value.problems]
    assert message in str(caught.value)


def test_eight_members_are_refused() -> None:
    the_estate, the_hosts = estate(), hosts()
    names = [f"o{number}" for number in range(1, 9)]
    for number, name in enumerate(names, 1):
        the_hosts[name] = {"isthmus_cluster": "onprem", "ansible_host": f"198.18.1.{number}"}
    the_estate["clusters"]["onprem"]["etcd"]["hosts"] = names
    with pytest.raises(ModelError, match=r"etcd.hosts: 8 members are more than 7\. Why: every write waits for a maj"):
        read_model(the_estate, the_hosts)


def test_an_even_number_of_members_is_warned_about() -> None:
    the_estate = estate()
    the_estate["clusters"]["onprem"]["etcd"]["hosts"] = ["o1", "o2"]
    assert model(the_estate).warnings == (
        f"{C}.onprem.etcd.hosts: 2 members tolerate no more failures than 1; use an odd number",
    )


def test_a_variable_that_nobody_reads_is_warned_about() -> None:
    the_hosts = hosts()
    for variables in the_hosts.values():
        variables.update(isthmus_services=[], isthmus_prune="host/o9", isthmus_bundle_python="python3", other=1)
    the_hosts["o1"]["isthmus_data_of_another_team"] = "x"
    the_hosts["o2"]["isthmus_bundels"] = ["x"]
    the_hosts["Printer_1"] = {"isthmus_bundels": []}
    assert model(the_hosts=the_hosts).warnings == (
        "host Printer_1 and 1 more: isthmus_bundels is not a variable of Isthmus, which ignores it; did you mean "
        "'isthmus_bundles'?",
        "host c1 and 3 more: isthmus_services is not a variable of Isthmus, which ignores it; rename it, if it is "
        "your own",
        "host o1: isthmus_data_of_another_team is not a variable of Isthmus, which ignores it; rename it, if it is "
        "your own",
    )


def test_a_service_without_backends_is_warned_about() -> None:
    the_estate = estate()
    the_estate["services"][0]["backends"] = {"labels": {"app": "wep"}}
    assert model(the_estate).warnings == (
        f"{S}.backends.labels: no workload of namespace shop in the inventory has these labels; the service has no "
        "backend until one does",
    )


@pytest.mark.parametrize("first", [True, False])
def test_a_workload_has_the_cgroup_of_one_that_goes(first: bool) -> None:
    the_hosts = hosts()
    (workload,) = the_hosts["c1"]["isthmus_workloads"]
    gone = {**workload, "name": "old", "state": "absent"}
    the_hosts["c1"]["isthmus_workloads"] = [gone, workload] if first else [workload, gone]
    assert len(model(the_hosts=the_hosts).hosts["c1"].workloads) == 2


def test_a_service_that_goes_may_name_what_is_gone() -> None:
    the_estate = estate()
    the_estate["services"][0] |= {"state": "absent", "backends": {"workloads": ["c2/web", "c1/wep"]}}
    assert model(the_estate).warnings == ()


def test_all_problems_come_in_one_message() -> None:
    the_estate, the_hosts = estate(), hosts()
    the_estate["clusters"]["cloud"].update(id=1, workload_ranges=["10.101.0.0/24"])
    the_estate["services"][0]["nmae"] = "x"
    the_hosts["o2"]["ansible_host"] = "198.18.1.1"
    with pytest.raises(ModelError) as caught:
        read_model(the_estate, the_hosts)
    text = str(caught.value)
    assert text.startswith("The mesh cannot be planned: 4 problems. Nothing was changed on any host.\n- ")
    for part in ("is also the id of", "overlap", "did you mean 'name'?", "is also an address of host o1"):
        assert part in text
    assert len(caught.value.problems) == 4


def test_one_mistake_is_one_problem() -> None:
    """What follows from a mistake is not reported again at every place that refers to it."""
    for edit in (
        _host("c1", isthmus_node_range="x"),
        _cluster("cloud", id="x"),
        _workload(unit="x"),
        _host("c1", ansible_host="name"),
    ):
        the_estate, the_hosts = estate(), hosts()
        the_estate["services"][0]["backends"] = {"workloads": ["c1/web"]}
        edit(the_estate, the_hosts)
        with pytest.raises(ModelError) as caught:
            read_model(the_estate, the_hosts)
        assert len(caught.value.problems) == 1, str(caught.value)


def test_no_estate() -> None:
    with pytest.raises(ModelError, match="isthmus_estate: it is not defined for any host"):
        read_model(None, hosts())
    with pytest.raises(ModelError, match="isthmus_estate: 'x' is not a mapping"):
        read_model("x", hosts())


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("10.0.0.0/8"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += _places(entry, (*path, key))
    return found


@given(st.data())
def test_anything_anywhere_gives_a_model_or_words(data: st.DataObject) -> None:
    the_estate, the_hosts = estate(), hosts()
    the_estate.update(sites={"onprem": {}, "cloud": None}, site_pairs=[{"sites": ["onprem", "cloud"]}])
    both = {"estate": the_estate, "hosts": the_hosts}
    path = data.draw(st.sampled_from([place for place in _places(both) if len(place) > 2 or place[0] == "estate"]))
    target: Any = both
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = data.draw(ANYTHING)
    try:
        digest = read_model(both["estate"], both["hosts"]).digest()
    except ModelError:
        return
    assert len(digest) == 64
