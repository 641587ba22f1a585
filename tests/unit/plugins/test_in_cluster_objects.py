# SPDX-License-Identifier: GPL-3.0-or-later
"""The mesh's objects inside a Kubernetes cluster, and where peers reach its etcd: the pure parts."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.module_utils import in_cluster, kubernetes_apply
from ansible_collections.isthmus.mesh.plugins.module_utils.mesh import ownership
from installations import installation, node

PHASES = ("expose", "etcd", "run")


def found(kind: str, name: str, phase: str = "run", nodes: tuple[str, ...] = (), **expose: Any) -> dict[str, Any]:
    (one,) = (
        one
        for one in in_cluster.objects(installation(**expose), phase, nodes)
        if (one["kind"], one["metadata"]["name"]) == (kind, name)
    )
    return one


def pod(kind: str, name: str, **expose: Any) -> dict[str, Any]:
    spec: dict[str, Any] = found(kind, name, **expose)["spec"]["template"]["spec"]
    return spec


def test_every_object_is_ours_and_says_which_part_it_is() -> None:
    own = ownership.labels("lab", "managed")
    names = set()
    for one in in_cluster.objects(installation(), "run"):
        labels = one["metadata"]["labels"]
        assert not ownership.stranger(labels, own), one
        assert labels[ownership.COMPONENT] in ("cluster", "etcd", "agent", "registrar", "pki"), one
        names.add((one["kind"], one["metadata"]["name"]))
        template = one.get("spec", {}).get("template") if one["kind"] in kubernetes_apply.WORKLOADS else None
        if template:
            selected = one["spec"]["selector"]["matchLabels"]
            assert selected.items() <= template["metadata"]["labels"].items()
    assert len(names) == len(in_cluster.objects(installation(), "run"))


def test_what_is_pruned_is_every_kind_that_is_made() -> None:
    made = {
        (one["apiVersion"], one["kind"], one["metadata"].get("namespace", ""))
        for one in in_cluster.objects(installation(), "run")
        if one["kind"] != "Namespace"
    }
    assert made == set(in_cluster.KINDS)


def test_a_phase_adds_to_the_one_before() -> None:
    sizes = []
    before: list[Any] = []
    for phase in PHASES:
        now = in_cluster.objects(installation(), phase)
        assert now[: len(before)] == before
        sizes.append(len(now))
        before = now
    assert sizes == sorted(set(sizes))
    kinds = {one["kind"] for one in in_cluster.objects(installation(), "expose")}
    assert not kinds & {*kubernetes_apply.WORKLOADS, "ConfigMap"}


def test_no_secret_is_rendered_and_keys_are_mounted_from_secrets_only() -> None:
    text = json.dumps(in_cluster.objects(installation(), "run"))
    assert "PRIVATE KEY" not in text
    assert '"kind": "Secret"' not in text
    for kind, name, secret in (
        ("StatefulSet", "isthmus-etcd", "isthmus-etcd-tls"),
        ("DaemonSet", "isthmus-agent", "isthmus-agent-tls"),
        ("Deployment", "isthmus-registrar", "isthmus-registrar-tls"),
    ):
        (volume,) = (one for one in pod(kind, name)["volumes"] if "secret" in one)
        assert volume["secret"]["secretName"] == secret
        assert volume["secret"]["defaultMode"] & 0o007 == 0
        mounts = {one["name"]: one["mountPath"] for one in pod(kind, name)["containers"][0]["volumeMounts"]}
        assert (mounts["pki"], mounts["trust"]) == ("/etc/isthmus/pki", "/etc/isthmus/pki/trust")


def test_the_pki_renews_by_itself_what_a_job_made() -> None:
    wanted = {"schema": 1, "cluster": "managed", "dns": ["a"]}
    config, cron = in_cluster.pki_objects(installation(), wanted)
    job = in_cluster.pki_job(installation(), wanted)
    assert cron["spec"]["jobTemplate"]["spec"] == job["spec"]
    assert json.loads(config["data"]["wanted.json"]) == wanted
    assert in_cluster.pki_job(installation(), {**wanted, "dns": ["b"]})["metadata"]["name"] != job["metadata"]["name"]
    pods = job["spec"]["template"]["spec"]
    assert pods["serviceAccountName"] == "isthmus-pki"
    assert pods["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    # It is told of in the prune of nobody.
    assert f"{ownership.COMPONENT}!=pki" in in_cluster.PRUNED
    assert config["metadata"]["labels"][ownership.COMPONENT] == "pki"


def test_the_pki_has_work_when_something_lacks_or_is_old() -> None:
    wanted = {"schema": 1, "cluster": "managed", "dns": ["a"]}
    before, after = (datetime(2026, 5, 1, 12, 0, second, tzinfo=timezone.utc) for second in (0, 2))
    issued = {"wanted": in_cluster.pki_digest(wanted), "renew": "2026-05-01T12:00:01Z", "requests": {}}
    whole = set(in_cluster.SECRETS)
    assert in_cluster.pki_reason(issued, wanted, whole, before) == ""
    assert in_cluster.pki_reason(issued, wanted, None, before) == "", "who may not see Secrets"
    assert "as they are wanted" in in_cluster.pki_reason(issued, {**wanted, "dns": ["b"]}, whole, before)
    assert "as they are wanted" in in_cluster.pki_reason({}, wanted, set(), before)
    lost = in_cluster.pki_reason(issued, wanted, whole - {"isthmus-agent-tls"}, before)
    assert lost == "keys and certificates anew: Secret isthmus-agent-tls is not there"
    due = in_cluster.pki_reason(issued, wanted, whole, after)
    assert due == "certificates renewed that are to be since 2026-05-01T12:00:01Z"
    assert in_cluster.pki_reason({**issued, "renew": "soon"}, wanted, whole, after) == ""


def test_certificates_that_nobody_renews_are_told() -> None:
    due = datetime(2026, 5, 1, tzinfo=timezone.utc)
    issued = {"renew": "2026-05-01T00:00:00Z", "requests": {}}
    assert in_cluster.pki_troubles({}, issued, due + timedelta(days=14)) == in_cluster.pki_troubles({}, {}, due) == []
    (words,) = in_cluster.pki_troubles({}, issued, due + timedelta(days=16))
    assert words == "CronJob isthmus-system/isthmus-pki: certificates are to be renewed since 2026-05-01T00:00:00Z"
    (words,) = in_cluster.pki_troubles({}, {**issued, "requests": {"onprem": {}, "cloud": {}}}, due)
    assert words == "certificates of the registrars for cloud, onprem: not signed by the authorities there"


def test_members_start_anew_for_another_list_of_revoked_certificates_and_what_lacks_is_told() -> None:
    def read(**more: Any) -> str:
        (etcd,) = (
            one for one in in_cluster.objects({**installation(), **more}, "etcd") if one["kind"] == "StatefulSet"
        )
        return str(etcd["spec"]["template"]["metadata"]["annotations"][in_cluster.DIGEST])

    assert in_cluster.revoked_list({}) == in_cluster.revoked_list({"revoked": {"list": ""}}) == ""
    assert len({read(), read(list="a"), read(list="b")}) == 3
    assert read(list="") == read()
    doomed, due = {"revoked": {"hosts": ["o2", "o3"], "names": ["remote-gone"]}}, datetime.now(timezone.utc)
    answer = {"revoked": {"hosts": ["o2", "o3"], "names": ["remote-gone"], "certificates": [], "list": "a"}}
    assert in_cluster.pki_troubles(doomed, answer, due) == []
    answer["revoked"]["hosts"] = ["o2"]
    assert in_cluster.pki_troubles(doomed, answer, due) == ["certificates of o3: not revoked, run isthmus.mesh.site"]
    assert in_cluster.not_revoked(doomed["revoked"], {}) == ["o2", "o3", "remote-gone"]


def test_rights_of_the_pki_are_its_own_secrets() -> None:
    rules = found("Role", "isthmus-pki")["rules"]
    for rule in rules:
        assert rule["verbs"] == ["create"] or set(rule["resourceNames"]) <= {*in_cluster.SECRETS, "isthmus-pki"}
        assert not set(rule["verbs"]) & {"list", "watch", "*"}
    assert {one["kind"] for one in in_cluster.objects(installation(), "run") if "secrets" in json.dumps(one)} == {
        "Role"
    }


def test_an_agent_has_the_rights_that_are_explained_and_no_more() -> None:
    spec = pod("DaemonSet", "isthmus-agent")
    (container,) = spec["containers"]
    context = container["securityContext"]
    assert context["privileged"] is False
    assert context["capabilities"] == {"drop": ["ALL"], "add": sorted(in_cluster.AGENT_CAPABILITIES)}
    assert spec["hostNetwork"] is True
    assert "hostPID" not in spec
    assert spec["automountServiceAccountToken"] is False
    assert spec["tolerations"] == [{"operator": "Exists"}]
    paths = {one["hostPath"]["path"] for one in spec["volumes"] if "hostPath" in one}
    assert paths == {path for _name, path, _kind, _options in in_cluster.AGENT_PATHS}


@pytest.mark.parametrize(("kind", "name"), [("StatefulSet", "isthmus-etcd"), ("Deployment", "isthmus-registrar")])
def test_etcd_and_registrars_need_no_root(kind: str, name: str) -> None:
    spec = pod(kind, name)
    assert spec["securityContext"]["runAsNonRoot"] is True
    for container in spec["containers"]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_pods_are_replaced_when_what_they_read_at_their_start_changes() -> None:
    def digests(**change: Any) -> dict[str, str]:
        return {
            one["metadata"]["name"]: one["spec"]["template"]["metadata"]["annotations"][in_cluster.DIGEST]
            for one in in_cluster.objects({**installation(), **change}, "run")
            if one["kind"] in kubernetes_apply.WORKLOADS
        }

    def changed(**change: Any) -> set[str]:
        before, after = digests(), digests(**change)
        return {name for name in before if before[name] != after[name]}

    trust = installation()["trust"]
    assert changed(document={"kind": "cluster"}) == {"isthmus-agent", "isthmus-registrar"}
    assert changed(trust={**trust, "onprem": "another"}) == {"isthmus-registrar"}
    assert changed(trust={**trust, "managed": "another"}) == {"isthmus-registrar", "isthmus-etcd"}


def test_members_know_each_other_by_names_that_their_certificates_have() -> None:
    container = pod("StatefulSet", "isthmus-etcd")["containers"][0]
    values = {one["name"]: one.get("value") for one in container["env"]}
    names = in_cluster.server_names(3)
    peers = dict(one.split("=", 1) for one in values["ETCD_INITIAL_CLUSTER"].split(","))
    assert sorted(peers) == ["isthmus-etcd-0", "isthmus-etcd-1", "isthmus-etcd-2"]
    for member, url in peers.items():
        assert url.removeprefix("https://").removesuffix(":2380") in names
        assert url == values["ETCD_INITIAL_ADVERTISE_PEER_URLS"].replace("$(ISTHMUS_POD)", member)
    assert values["ETCD_CLIENT_CERT_AUTH"] == values["ETCD_PEER_CLIENT_CERT_AUTH"] == "true"
    assert values["ETCD_CLIENT_CRL_FILE"] == "/etc/isthmus/pki/revoked.crl"
    # Of an address that a CNI translated no certificate knows.
    assert values["ETCD_EXPERIMENTAL_PEER_SKIP_CLIENT_SAN_VERIFICATION"] == "true"
    assert values["ETCD_PEER_CERT_ALLOWED_CN"] == "isthmus-etcd-peer"
    # The kubelet puts in what was defined before.
    order = [one["name"] for one in container["env"]]
    assert order.index("ISTHMUS_POD") < order.index("ETCD_NAME")


@pytest.mark.parametrize(
    ("provider", "scope", "annotations"),
    [
        ("aws", "internal", {"service.beta.kubernetes.io/aws-load-balancer-scheme": "internal"}),
        ("aws", "external", {"service.beta.kubernetes.io/aws-load-balancer-scheme": "internet-facing"}),
        ("google", "internal", {"networking.gke.io/load-balancer-type": "Internal"}),
        ("azure", "internal", {"service.beta.kubernetes.io/azure-load-balancer-internal": "true"}),
    ],
)
def test_a_load_balancer_is_as_internal_as_asked_for(provider: str, scope: str, annotations: dict[str, str]) -> None:
    expose = {"provider": provider, "scope": scope, "source_ranges": ["198.18.0.0/16"]}
    service = found("Service", "isthmus-etcd-mesh", **expose)
    assert annotations.items() <= service["metadata"]["annotations"].items()
    assert service["spec"]["loadBalancerSourceRanges"] == ["198.18.0.0/16"]
    (name, _value) = next(iter(annotations.items()))
    service = found("Service", "isthmus-etcd-mesh", **expose, annotations={name: "mine", "pool": "a"})
    assert (service["metadata"]["annotations"][name], service["metadata"]["annotations"]["pool"]) == ("mine", "a")


@pytest.mark.parametrize("provider", ["google", "azure", "metallb", "none"])
def test_a_provider_that_needs_no_annotation_gets_none(provider: str) -> None:
    scope = "internal" if provider in ("metallb", "none") else "external"
    assert "annotations" not in found("Service", "isthmus-etcd-mesh", provider=provider, scope=scope)["metadata"]


def test_an_etcd_in_the_internet_needs_ranges_and_is_warned_of() -> None:
    external = installation(scope="external")
    (problem,) = in_cluster.exposure_problems(external, [], [])
    assert "isthmus_estate.clusters.managed.expose.source_ranges is empty" in problem
    assert len(in_cluster.exposure_warnings(external)) == 1
    limited = installation(scope="external", source_ranges=["203.0.113.0/24"])
    assert in_cluster.exposure_problems(limited, [], []) == []
    assert in_cluster.exposure_problems(installation(), [], []) == in_cluster.exposure_warnings(installation()) == []
    (warning,) = in_cluster.exposure_warnings(installation(type="node_port", source_ranges=["203.0.113.0/24"]))
    assert "load balancers only" in warning


def service(**more: Any) -> dict[str, Any]:
    return {"metadata": {"name": "isthmus-etcd-mesh", "annotations": {}}, "spec": {"clusterIP": "10.96.3.4"}, **more}


def test_another_cluster_is_known_by_its_ranges() -> None:
    nodes = [{**node("n1", "198.18.4.1"), "spec": {"podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]}}]
    assert in_cluster.wrong_cluster(installation(), nodes, "10.96.0.1") == ""
    assert in_cluster.wrong_cluster(installation(), [node("n1", "198.18.4.1")], "") == ""
    assert "its own service has 10.100.0.1" in in_cluster.wrong_cluster(installation(), nodes, "10.100.0.1")
    nodes[0]["spec"]["podCIDRs"] = ["10.10.1.0/24"]
    words = in_cluster.wrong_cluster(installation(), nodes, "10.96.0.1")
    assert words.startswith("pods of node n1 get addresses of 10.10.1.0/24, and isthmus_estate.clusters.managed")


@pytest.mark.parametrize(
    ("versions", "old"),
    [
        (("v1.30.0", "v1.34.1-eks-1a2b3c", "v2.0.0", "", "unknown"), ""),
        (("v1.29.9-gke.100", "v1.31.0", "v1.9.0"), "k0 (v1.29.9-gke.100), k2 (v1.9.0)"),
    ],
)
def test_kubelets_that_do_not_know_what_the_agent_needs_are_named(versions: tuple[str, ...], old: str) -> None:
    nodes = [node(f"k{number}", "198.18.4.11") for number in range(len(versions))]
    for one, version in zip(nodes, versions, strict=True):
        one["status"]["nodeInfo"] = {"kubeletVersion": version}
    told = in_cluster.old_kubelets([*nodes, {"metadata": {"name": "new"}}])
    assert told.startswith(f"the kubelet is older than 1.30 on {old}: ") if old else told == ""


def test_where_peers_reach_a_load_balancer() -> None:
    def exposed(*ingress: dict[str, str]) -> Any:
        there = service(status={"loadBalancer": {"ingress": list(ingress)}})
        return in_cluster.exposed(installation(), service(), there, [], [])

    assert exposed() is None
    assert exposed({"ip": "198.18.4.200"}) == {
        "endpoints": ["https://198.18.4.200:2379"],
        "addresses": ["198.18.4.200"],
        "names": [],
        "cluster_ip": "10.96.3.4",
        "nodes": [],
    }
    named = exposed({"hostname": "internal-x.elb.example"})
    assert (named["endpoints"], named["names"]) == (["https://internal-x.elb.example:2379"], ["internal-x.elb.example"])


def test_nodes_that_peers_know_stay_the_same() -> None:
    nodes = [node(f"n{number}", f"198.18.4.{number}", created=number) for number in (1, 2, 3, 4, 5)]
    install = installation(type="node_port")
    assert in_cluster.choose_nodes(install, nodes, None) == ["n1", "n2", "n3"]
    before = service(metadata={"annotations": {"isthmus.io/nodes": "n2,n4,n9"}})
    assert in_cluster.choose_nodes(install, nodes, before) == ["n1", "n2", "n4"]
    nodes[1]["status"]["conditions"][0]["status"] = "False"
    assert in_cluster.choose_nodes(install, nodes, before) == ["n1", "n2", "n4"]
    nodes[0]["spec"]["taints"] = [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]
    assert in_cluster.choose_nodes(install, nodes, None) == ["n3", "n4", "n5"]
    assert in_cluster.choose_nodes(installation(type="node_port", hosts=["n5"]), nodes, before) == ["n5"]
    assert in_cluster.choose_nodes(installation(), nodes, None) == []


def test_where_peers_reach_ports_of_nodes() -> None:
    nodes = [node("n1", "198.18.4.1", external="203.0.113.1"), node("n2", "198.18.4.2")]
    port = service(spec={"ports": [{"nodePort": 31234}]})
    found = in_cluster.exposed(installation(type="node_port"), service(), port, nodes, ["n1", "n2"])
    assert found is not None
    assert found["endpoints"] == ["https://198.18.4.1:31234", "https://198.18.4.2:31234"]
    outside = installation(type="node_port", scope="external")
    found = in_cluster.exposed(outside, service(), port, nodes, ["n1"])
    assert found is not None
    assert found["endpoints"] == ["https://203.0.113.1:31234"]
    (problem,) = in_cluster.exposure_problems(outside, nodes, ["n1", "n2"])
    assert "The nodes n2 have no IPv4 address of the kind ExternalIP" in problem
    (problem,) = in_cluster.exposure_problems(installation(type="node_port"), nodes, ["n1", "gone"])
    assert "names gone" in problem


def test_etcd_on_hosts_is_where_peers_look_for_it() -> None:
    nodes = ("n1", "n2", "n3")
    there = found("StatefulSet", "isthmus-etcd", nodes=nodes, type="host")["spec"]["template"]["spec"]
    assert there["hostNetwork"] is True
    required = there["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [term["matchFields"][0]["values"] for term in required["nodeSelectorTerms"]] == [["n1"], ["n2"], ["n3"]]
    few = [node("n1", "198.18.4.1")]
    (problem,) = in_cluster.exposure_problems(installation(type="host"), few, ["n1"])
    assert "3 members" in problem
    assert "isthmus_estate.clusters.managed.etcd.replicas" in problem


@pytest.mark.parametrize(
    ("kind", "status", "wanted"),
    [
        ("Deployment", {"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2}, (0, 1)),
        ("Deployment", {"observedGeneration": 2, "replicas": 2, "updatedReplicas": 1, "readyReplicas": 2}, (1, 2)),
        ("Deployment", {"observedGeneration": 2, "replicas": 3, "updatedReplicas": 2, "readyReplicas": 3}, (1, 2)),
        ("Deployment", {"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2}, (2, 2)),
        ("DaemonSet", {"observedGeneration": 2, "desiredNumberScheduled": 4, "numberReady": 4}, (0, 4)),
        ("DaemonSet", {"observedGeneration": 2, "desiredNumberScheduled": 0}, (0, 0)),
    ],
)
def test_how_far_a_roll_out_is(kind: str, status: dict[str, int], wanted: tuple[int, int]) -> None:
    there = {"kind": kind, "metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": status}
    assert kubernetes_apply.rolled_out(there) == wanted


def test_what_keeps_a_pod_from_being_ready_is_told() -> None:
    state = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    (words,) = kubernetes_apply.pod_troubles(
        {
            "metadata": {"name": "p"},
            "status": {"containerStatuses": [{"name": "agent", "ready": False, "state": state}]},
        }
    )
    assert words == "pod p, container agent: ImagePullBackOff, not found"
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}
    (words,) = kubernetes_apply.pod_troubles({"metadata": {"name": "p"}, "status": {"conditions": [condition]}})
    assert words == "pod p: Unschedulable, 0/2 nodes"


def test_nodes_are_cleaned_with_the_image_that_the_agents_have() -> None:
    agent = found("DaemonSet", "isthmus-agent")
    clean = in_cluster.cleanup({"estate": "lab", "cluster": "managed"}, agent)
    pods = clean["spec"]["template"]["spec"]
    assert {one["image"] for one in [*pods["initContainers"], *pods["containers"]]} == {"isthmus:1.0.0"}
    assert pods["initContainers"][0]["command"][1:] == ["datapath", "remove", "--yes"]
    asleep = in_cluster.cleanup({"estate": "lab", "cluster": "managed"}, agent, suspended=True)
    # A run that was interrupted goes on from what is there.
    assert in_cluster.cleanup({"estate": "lab", "cluster": "managed"}, asleep) == clean
    assert asleep != clean
