# SPDX-License-Identifier: GPL-3.0-or-later
"""What is written into Kubernetes: exact objects, nothing of others, and no more than what differs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isthmus_agent.registrar.kubernetes.catalog import Catalog
from isthmus_agent.registrar.kubernetes.objects import KINDS, NAMESPACES, SERVICES, SLICES, facts
from isthmus_agent.registrar.kubernetes.wanted import MAX_ENDPOINTS, Mesh, Plan, Planner
from isthmus_mesh import ownership
from isthmus_mesh.documents import ServiceDefinition, ServicePort
from isthmus_mesh.wire import ClusterService, L4Addr
from kubernetes_objects import endpoint, endpoint_slice, namespace, service

OWN = ownership.labels("lab", "kube")
SHOP_DB = ("shop", "db")
DB = ServiceDefinition(
    "db",
    "shop",
    (ServicePort("sql", 5432, 15432), ServicePort("stats", 80, 8080)),
    {"app": "db"},
    is_global=True,
    affinity="local",
    labels={"tier": "data"},
    kubernetes=True,
)
SQL = {"sql": L4Addr("TCP", 15432)}


class Kubernetes:
    """An API server as far as the planner can tell: it keeps what it is given, and the catalog sees it."""

    def __init__(self) -> None:
        self.catalog = Catalog("kube", "lab")
        self.planner = Planner("lab", "kube")
        self.objects: dict[tuple[str, tuple[str, str]], dict[str, Any]] = {}
        self._version = 0
        self.put(NAMESPACES, namespace("shop"))
        for kind in KINDS:
            self.catalog.retain(kind, [key for there, key in self.objects if there == kind])

    def put(self, kind: str, value: dict[str, Any]) -> None:
        self._version += 1
        value = copy.deepcopy(value)
        value["metadata"]["resourceVersion"] = str(self._version)
        self.objects[kind, (value["metadata"].get("namespace", ""), value["metadata"]["name"])] = value
        self.catalog.put(kind, value)

    def plan(self, mesh: Mesh) -> Plan:
        return self.planner.plan(self.catalog, mesh)

    def settle(self, mesh: Mesh) -> list[tuple[str, str, str]]:
        """Take steps until there is none; what was done, as (verb, kind, name)."""
        done = []
        for _ in range(5):
            steps = self.plan(mesh).steps
            for step in steps:
                there = self.objects.get((step.kind, step.key))
                assert step.version == ("" if there is None else there["metadata"]["resourceVersion"])
                done.append((step.verb, step.kind, step.key[1]))
                if step.verb == "delete":
                    del self.objects[step.kind, step.key]
                    self.catalog.remove(step.kind, step.key)
                else:
                    self.put(step.kind, dict(step.body) if there is None else merged(there, step.body))
            if not steps:
                return done
        raise AssertionError("it never ends")

    def slices(self, of: str = "db") -> list[dict[str, Any]]:
        return [
            value
            for (kind, _), value in sorted(self.objects.items())
            if kind == SLICES and value["metadata"]["labels"]["kubernetes.io/service-name"] == of
        ]

    def addresses(self, of: str = "db") -> list[list[str]]:
        return [[one["addresses"][0] for one in entry["endpoints"]] for entry in self.slices(of)]


def merged(there: dict[str, Any], change: Any) -> dict[str, Any]:
    """RFC 7396."""
    found = dict(there)
    for key, value in change.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict):
            found[key] = merged(found.get(key) or {}, value)
        else:
            found[key] = value
    return found


def remote(*addresses: str, cluster: str = "cloud", **more: Any) -> dict[str, str]:
    given: dict[str, Any] = {"backends": dict.fromkeys(addresses, SQL), **more}
    return {cluster: ClusterService(cluster, "shop", "db", 2, **given).to_json()}


def mesh(
    *definitions: ServiceDefinition,
    machines: tuple[str, ...] = (),
    there: dict[str, str] | None = None,
    unknown: tuple[str, ...] = (),
) -> Mesh:
    return Mesh(
        {(one.namespace, one.name): one for one in definitions},
        {SHOP_DB: dict.fromkeys(machines, SQL)},
        {} if there is None else {SHOP_DB: there},
        frozenset(unknown),
    )


@pytest.fixture
def kube() -> Kubernetes:
    return Kubernetes()


def test_the_meshs_own_control_plane_is_left_alone(kube: Kubernetes) -> None:
    ours = {**OWN, ownership.COMPONENT: "etcd"}
    for name, labels in (("isthmus-etcd", ours), ("old", OWN)):
        made = service(name, "10.96.0.9")
        made["metadata"]["labels"] = labels
        kube.put(SERVICES, made)
    assert kube.settle(mesh()) == [("delete", SERVICES, "old")]


def test_exact_service_and_slices(kube: Kubernetes) -> None:
    done = kube.settle(mesh(DB, machines=("10.104.3.2",), there=remote("10.102.1.2", hostnames={"10.102.1.2": "db-0"})))
    made = kube.objects[SERVICES, SHOP_DB]
    del made["metadata"]["resourceVersion"]
    assert made == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "namespace": "shop",
            "name": "db",
            "labels": {
                "tier": "data",
                "app.kubernetes.io/managed-by": "isthmus",
                "isthmus.io/estate": "lab",
                "isthmus.io/cluster": "kube",
            },
            "annotations": {
                "service.cilium.io/global": "true",
                "service.cilium.io/shared": "true",
                "service.cilium.io/affinity": "local",
                "isthmus.io/labels": "tier",
            },
        },
        "spec": {
            "type": "ClusterIP",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [
                {"name": "sql", "protocol": "TCP", "port": 5432, "targetPort": 15432},
                {"name": "stats", "protocol": "TCP", "port": 80, "targetPort": 8080},
            ],
        },
    }
    cloud, own = kube.slices()
    del cloud["metadata"]["resourceVersion"]
    name = cloud["metadata"]["name"]
    assert cloud == {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "shop",
            "name": name,
            "labels": {
                **OWN,
                "kubernetes.io/service-name": "db",
                "endpointslice.kubernetes.io/managed-by": "isthmus-registrar",
                "multicluster.kubernetes.io/source-cluster": "cloud",
            },
        },
        "addressType": "IPv4",
        "ports": [{"name": "sql", "protocol": "TCP", "port": 15432}],
        "endpoints": [
            {
                "addresses": ["10.102.1.2"],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "hostname": "db-0",
            }
        ],
    }
    assert own["metadata"]["labels"]["multicluster.kubernetes.io/source-cluster"] == "kube"
    assert own["endpoints"][0]["addresses"] == ["10.104.3.2"]
    assert [verb for verb, _, _ in done] == ["create"] * 3
    # Names are the same wherever they are made.
    again = Kubernetes()
    again.settle(mesh(DB, machines=("10.104.3.2",), there=remote("10.102.1.2")))
    assert [one["metadata"]["name"] for one in again.slices()] == [name, own["metadata"]["name"]]


def test_what_was_written_is_no_backend_of_this_cluster(kube: Kubernetes) -> None:
    kube.settle(mesh(DB, machines=("10.104.3.2",), there=remote("10.102.1.2")))
    assert len(kube.slices()) == 2
    assert kube.catalog.backends(SHOP_DB) == ({}, {})
    # Whoever wrote them: another estate's registrar may work on the same cluster.
    foreign = copy.deepcopy(kube.slices()[0])
    foreign["metadata"]["labels"]["isthmus.io/estate"] = "other"
    assert facts(SLICES, foreign) is None


CHANGES = {
    "its ports": {"ports": (ServicePort("sql", 5433, 15432),)},
    "a label": {"labels": {"tier": "data", "team": "a"}},
    "without its label": {"labels": {}},
    "affinity": {"affinity": "none"},
    "not shared": {"shared": False},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_definition_changes_the_service_and_nothing_of_others(
    kube: Kubernetes, change: dict[str, Any]
) -> None:
    kube.settle(mesh(DB))
    theirs = kube.objects[SERVICES, SHOP_DB]
    theirs["metadata"]["labels"]["their"] = "label"
    theirs["metadata"]["annotations"]["their"] = "annotation"
    theirs["spec"] |= {"clusterIP": "10.96.0.7", "type": "NodePort"}
    theirs["spec"]["ports"][0]["nodePort"] = 30001
    kube.put(SERVICES, theirs)
    assert kube.plan(mesh(DB)).steps == []
    changed = ServiceDefinition(**{**{name: getattr(DB, name) for name in DB.__dataclass_fields__}, **change})
    assert kube.settle(mesh(changed)) == [("patch", SERVICES, "db")]
    found = kube.objects[SERVICES, SHOP_DB]
    assert found["metadata"]["labels"] == {**changed.labels, **OWN, "their": "label"}
    assert found["metadata"]["annotations"]["their"] == "annotation"
    assert found["metadata"]["annotations"]["service.cilium.io/affinity"] == changed.affinity
    assert found["metadata"]["annotations"]["service.cilium.io/shared"] == str(changed.shared).lower()
    assert [one["port"] for one in found["spec"]["ports"]] == [port.port for port in changed.ports]
    assert (found["spec"]["clusterIP"], found["spec"]["type"]) == ("10.96.0.7", "NodePort")


def test_what_somebody_changed_of_ours_is_put_right(kube: Kubernetes) -> None:
    wanted = mesh(DB, machines=("10.104.3.2",))
    kube.settle(wanted)
    theirs = kube.objects[SERVICES, SHOP_DB]
    del theirs["metadata"]["annotations"]["service.cilium.io/global"]
    theirs["spec"]["selector"] = {"app": "db"}
    kube.put(SERVICES, theirs)
    (slice_,) = kube.slices()
    slice_["endpoints"][0]["conditions"]["ready"] = False
    kube.put(SLICES, slice_)
    name = slice_["metadata"]["name"]
    assert kube.settle(wanted) == [("patch", SERVICES, "db"), ("patch", SLICES, name)]
    found = kube.objects[SERVICES, SHOP_DB]
    assert found["metadata"]["annotations"]["service.cilium.io/global"] == "true"
    assert "selector" not in found["spec"]
    assert kube.slices()[0]["endpoints"][0]["conditions"]["ready"] is True


def test_what_somebody_deleted_is_made_anew_for_the_same_slices(kube: Kubernetes) -> None:
    wanted = mesh(DB, machines=("10.104.3.2",), there=remote("10.102.1.2"))
    kube.settle(wanted)
    before = kube.slices()
    del kube.objects[SERVICES, SHOP_DB]
    kube.catalog.remove(SERVICES, SHOP_DB)
    assert kube.settle(wanted) == [("create", SERVICES, "db")]
    assert kube.slices() == before
    name = before[0]["metadata"]["name"]
    del kube.objects[SLICES, ("shop", name)]
    kube.catalog.remove(SLICES, ("shop", name))
    assert kube.settle(wanted) == [("create", SLICES, name)]


@pytest.mark.parametrize("how", ["gone", "flag"])
def test_it_goes_with_its_definition_or_flag(kube: Kubernetes, how: str) -> None:
    kube.settle(mesh(DB, machines=("10.104.3.2",)))
    rest = () if how == "gone" else (ServiceDefinition("db", "shop", DB.ports, {"app": "db"}, is_global=True),)
    name = kube.slices()[0]["metadata"]["name"]
    done = kube.settle(mesh(*rest, machines=("10.104.3.2",)))
    assert done == [("delete", SERVICES, "db"), ("delete", SLICES, name)]


def test_while_a_definition_cannot_be_read_nothing_of_it_changes(kube: Kubernetes) -> None:
    wanted = mesh(DB, machines=("10.104.3.2",))
    kube.settle(wanted)
    unread = Mesh({SHOP_DB: None}, wanted.machines, {}, frozenset())
    assert kube.plan(unread).steps == []


STRANGERS = {
    "a user's": {},
    "another cluster's": {**OWN, "isthmus.io/cluster": "other"},
    "another estate's": {**OWN, "isthmus.io/estate": "other"},
    "another tool's": {**OWN, "app.kubernetes.io/managed-by": "Helm"},
}


@pytest.mark.parametrize("labels", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("is_global", ["true", "false"])
def test_a_stranger_of_that_name_is_left_alone_and_named(
    kube: Kubernetes, labels: dict[str, str], is_global: str
) -> None:
    theirs = service("db", "10.96.0.10", **{"global": is_global})
    theirs["metadata"]["labels"] = labels
    kube.put(SERVICES, theirs)
    found = kube.plan(mesh(DB, machines=("10.104.3.2",)))
    assert found.steps == []
    assert "a Service of that name that is not ours; it is left alone" in found.problems[SHOP_DB]
    assert kube.plan(mesh()).steps == []
    kube.catalog.remove(SERVICES, SHOP_DB)
    assert [step.verb for step in kube.plan(mesh(DB)).steps] == ["create"]


def test_a_missing_namespace_is_named_and_not_made(kube: Kubernetes) -> None:
    kube.catalog.remove(NAMESPACES, ("", "shop"))
    found = kube.plan(mesh(DB))
    assert found.steps == []
    assert found.problems == {
        SHOP_DB: "there is no namespace shop, so it cannot be a Service. Next: make the namespace"
    }


SYNCED = {
    "by annotation": (service("db", "10.96.0.10", **{"global-sync-endpoint-slices": "true"}), True),
    "not by default": (service("db", "10.96.0.10"), False),
    "headless": (service("db", None), True),
    "headless, not wanted": (service("db", None, **{"global-sync-endpoint-slices": "false"}), False),
    "not global": (service("db", None, **{"global": "false", "global-sync-endpoint-slices": "true"}), False),
}


@pytest.mark.parametrize(("theirs", "synced"), SYNCED.values(), ids=SYNCED)
def test_which_services_of_users_get_slices(kube: Kubernetes, theirs: dict[str, Any], synced: bool) -> None:
    theirs = copy.deepcopy(theirs)
    theirs["spec"]["ports"][0]["name"] = "sql"
    kube.put(SERVICES, theirs)
    kube.put(SLICES, endpoint_slice("db", endpoint("10.244.1.2"), name="db-theirs"))
    before = {key: value for key, value in kube.objects.items() if key[1][1] != "db" or key[0] == SERVICES}
    done = kube.settle(mesh(machines=("10.104.3.2",), there=remote("10.102.1.2")))
    assert {kind for _, kind, _ in done} == ({SLICES} if synced else set())
    written = [one for one in kube.slices() if one["metadata"]["name"] != "db-theirs"]
    assert [one["endpoints"][0]["addresses"][0] for one in written] == (["10.102.1.2", "10.104.3.2"] if synced else [])
    headless = theirs["spec"]["clusterIP"] == "None"
    assert all(("service.kubernetes.io/headless" in one["metadata"]["labels"]) is headless for one in written)
    assert {key: kube.objects[key] for key in before} == before
    # The annotation goes: the slices go.
    theirs["metadata"]["annotations"]["service.cilium.io/global"] = "false"
    kube.put(SERVICES, theirs)
    kube.settle(mesh(machines=("10.104.3.2",), there=remote("10.102.1.2")))
    assert [one["metadata"]["name"] for one in kube.slices()] == ["db-theirs"]


NOT_WRITTEN = {
    "not shared": {"shared": False},
    "another port": {"backends": {"10.102.1.2": {"other": L4Addr("TCP", 1)}}},
    "another protocol": {"backends": {"10.102.1.2": {"sql": L4Addr("UDP", 1)}}},
    "no port": {"backends": {"10.102.1.2": {"sql": L4Addr("TCP", 0)}}},
    "IPv6": {"backends": {"fd00::1": SQL}},
    "what the API refuses": {"backends": {"127.0.0.1": SQL, "169.254.1.1": SQL, "224.0.0.1": SQL, "0.0.0.0": SQL}},  # noqa: S104 - data
}


@pytest.mark.parametrize("more", NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_of_a_peer_is_not_written(kube: Kubernetes, more: dict[str, Any]) -> None:
    kube.settle(mesh(DB, there=remote("10.102.1.2", **more)))
    assert kube.slices() == []


@pytest.mark.parametrize("hostname", ["-a", "a-", "A", "a.b", "a" * 64, "ä", "a_b"])
def test_a_host_name_that_the_api_refuses_is_left_out(kube: Kubernetes, hostname: str) -> None:
    kube.settle(mesh(DB, there=remote("10.102.1.2", hostnames={"10.102.1.2": hostname})))
    assert "hostname" not in kube.slices()[0]["endpoints"][0]


def test_a_protocol_that_a_peer_leaves_open_is_the_services(kube: Kubernetes) -> None:
    kube.settle(mesh(DB, there=remote("10.102.1.2", backends={"10.102.1.2": {"sql": L4Addr("ANY", 7)}})))
    assert kube.slices()[0]["ports"] == [{"name": "sql", "protocol": "TCP", "port": 7}]


def test_a_headless_service_without_ports_has_addresses(kube: Kubernetes) -> None:
    theirs = service("db", None)
    theirs["spec"]["ports"] = []
    kube.put(SERVICES, theirs)
    kube.settle(mesh(there=remote("10.102.1.2")))
    assert (kube.addresses(), kube.slices()[0]["ports"]) == ([["10.102.1.2"]], [])


def test_what_is_not_known_of_a_peer_stays_until_it_is(kube: Kubernetes) -> None:
    there = remote("10.102.1.2") | remote("10.103.1.2", cluster="edge")
    kube.settle(mesh(DB, there=there))
    before = copy.deepcopy(kube.slices())
    # The mirror of one peer has not been read yet, the other peer has withdrawn its backend.
    assert kube.settle(mesh(DB, unknown=("cloud",))) == [("delete", SLICES, before[1]["metadata"]["name"])]
    assert kube.slices() == before[:1]
    assert kube.plan(mesh(DB, there={"cloud": "no JSON"})).steps == []
    # A service that nobody wants in Kubernetes any more goes all the same.
    kube.settle(mesh(unknown=("cloud",)))
    assert kube.slices() == []


def many(number: int) -> tuple[str, ...]:
    return tuple(f"10.102.{one // 200}.{one % 200 + 1}" for one in range(number))


def test_many_endpoints_are_several_slices_and_a_change_is_one_write(kube: Kubernetes) -> None:
    kube.settle(mesh(DB, there=remote(*many(250))))
    assert sorted(map(len, kube.addresses())) == [50, 100, 100]
    for first in (3, 120):  # one goes: its slice alone is written, and the others stay where they are
        rest = [one for place, one in enumerate(many(250)) if place != first]
        assert [verb for verb, _, _ in kube.settle(mesh(DB, there=remote(*rest)))] == ["patch"]
        assert [verb for verb, _, _ in kube.settle(mesh(DB, there=remote(*many(250))))] == ["patch"]
    assert [verb for verb, _, _ in kube.settle(mesh(DB, there=remote(*many(251))))] == ["patch"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 330), max_size=330), min_size=1, max_size=4))
def test_whatever_comes_and_goes(sets: list[set[int]]) -> None:
    kube, everyone = Kubernetes(), many(331)
    for present in sets:
        before = {value["metadata"]["name"]: value["endpoints"] for value in kube.slices()}
        wanted = {everyone[one] for one in present}
        changed = [name for _, kind, name in kube.settle(mesh(DB, there=remote(*sorted(wanted)))) if kind == SLICES]
        slices = kube.addresses()
        flat = [address for addresses in slices for address in addresses]
        assert sorted(flat) == sorted(wanted)
        assert all(0 < len(addresses) <= MAX_ENDPOINTS for addresses in slices)
        assert len(changed) == len(set(changed))
        for value in kube.slices():  # what is written differs
            name = value["metadata"]["name"]
            assert (before.get(name) != value["endpoints"]) == (name in changed)
