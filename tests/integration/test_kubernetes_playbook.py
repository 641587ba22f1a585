# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbook `site` with a Kubernetes cluster: who is asked for what, from where, once; what is told when its API is
away. Modules are `fake_modules.py`; what they do with a real API is test_kubernetes_access.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_batches_playbook import Site, fake, said

FAKED = ("kubernetes_access", "kubernetes_credential", "kubernetes_probe", "teardown")


class Hybrid(Site):
    """Cluster `a` is a Kubernetes cluster; its API is reached from b1, so that it shows where modules run."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.kubernetes: dict[str, Any] | None = {
            "api_server": "https://192.0.1.1:6443",
            "pod_ranges": ["10.244.0.0/16"],
            "service_range": "10.96.0.0/16",
        }
        for name in FAKED:
            fake(self.here, name)

    def inventory(self) -> Path:
        path = super().inventory()
        content = json.loads(path.read_text())
        if self.kubernetes:
            content["all"]["vars"]["isthmus_estate"]["clusters"]["a"]["kubernetes"] = self.kubernetes
        content["all"]["children"]["group_a"]["vars"] |= {"isthmus_api_host": "b1", "isthmus_kubeconfig": "/kube/a"}
        path.write_text(json.dumps(content))
        return path


def test_a_kubernetes_cluster_from_nothing_to_out_again(tmp_path: Path) -> None:
    site = Hybrid(tmp_path)
    first = site.run()
    assert first.status == 0, first.output
    (probe,) = site.calls("kubernetes_probe")
    assert (probe["host"], probe["kubeconfig"]) == ("b1", "/kube/a")
    assert {one["host"]: one["credential"] for one in probe["seen"]} == {"a1": False, "a2": False, "a3": False}
    (access,) = site.calls("kubernetes_access")
    assert (access["host"], access["cluster"], access["kubeconfig"]) == ("b1", "a", "/kube/a")
    assert [one["host"] for one in access["registrars"]] == ["a1", "a2", "a3"]
    assert [one["host"] for one in access["seen"]] == ["a1", "a2", "a3"]
    installed = {call["host"] for call in site.calls("kubernetes_credential") if "signed" in call}
    assert installed == {"a1", "a2", "a3"}

    # In batches each asks when it is its turn; nothing is due, so nothing is installed.
    (tmp_path / "away").touch()
    again = site.run()
    assert again.status == 0, again.output
    assert again.changed == {}
    asked = [[one["host"] for one in call["registrars"]] for call in site.calls("kubernetes_access")]
    assert sorted(asked) == [["a1"], ["a2"], ["a3"]]
    assert not [call for call in site.calls("kubernetes_credential") if "signed" in call]
    assert "Pending: Kubernetes of cluster a was not asked" in again.output
    assert "https://api does not answer" in again.output

    site.kubernetes = None
    away = site.run("-e", "isthmus_prune=kubernetes/a")
    assert away.status == 0, away.output
    (removed,) = site.calls("kubernetes_access")
    assert (removed["state"], removed["host"], removed["cluster"]) == ("absent", "b1", "a")
    assert "Pending: Kubernetes of cluster a still lets the registrars in that left" in away.output


@pytest.mark.slow
def test_nodes_that_are_native_in_clear_have_their_pods_ranges_in_the_record(tmp_path: Path) -> None:
    site = Hybrid(tmp_path)
    site.estate = {"routing": "native"}

    def known() -> dict[str, Any]:
        hosts = json.loads((tmp_path / "record").read_text())["clusters/a"]["hosts"]
        return {name: entry["pod_cidrs"] for name, entry in hosts.items() if "pod_cidrs" in entry}

    (tmp_path / "pods").write_text(json.dumps({"a1": ["10.244.1.0/24"], "a2": ["10.244.2.0/24"]}))
    first = site.run()
    assert first.status == 0, first.output
    early, late = site.calls("kubernetes_probe")
    assert (early["host"], early["kubeconfig"], early.get("seen")) == ("b1", "/kube/a", None)
    assert len(late["seen"]) == 3
    assert known() == {"a1": ["10.244.1.0/24"], "a2": ["10.244.2.0/24"]}
    assert "which of 10.244.0.0/16 are pods' ranges on a3 (cluster a) is not known, so" in " ".join(said(first).split())
    # A node has got its range: a plan tells it, a run knows it.
    (tmp_path / "pods").write_text(json.dumps({f"a{number}": [f"10.244.{number}.0/24"] for number in (1, 2, 3)}))
    told = said(site.run(name="plan"))
    assert "10.244.3.0/24 via" in told
    assert len(known()) == 2
    assert site.run().status == 0
    whole = {f"a{number}": [f"10.244.{number}.0/24"] for number in (1, 2, 3)}
    assert known() == whole
    # While the API is away, and in a run for others, what was found counts.
    (tmp_path / "away").touch()
    for more in ((), ("--limit", "b1,b2,b3,c1")):
        again = site.run(*more)
        assert (again.status, again.changed, known()) == (0, {}, whole), again.output
    assert site.calls("kubernetes_probe") == [], "no host of the cluster is in the run"


def test_a_problem_of_kubernetes_stops_before_anything_is_changed(tmp_path: Path) -> None:
    site = Hybrid(tmp_path)
    (tmp_path / "fail" / "kubernetes_probe b1").touch()
    stopped = site.run()
    assert stopped.status != 0
    assert "kubernetes_probe fails on b1" in stopped.output
    assert site.calls("bundle") == []


def test_a_teardown_takes_kubernetes_along_with_the_last_registrar(tmp_path: Path) -> None:
    site = Hybrid(tmp_path)
    confirmed = ("-e", "isthmus_confirm_teardown=e")
    part = site.run(*confirmed, "--limit", "a1,a2", name="teardown")
    assert part.status == 0, part.output
    assert site.calls("kubernetes_access") == []
    (tmp_path / "away").touch()
    away = site.run(*confirmed, "--limit", "a1,a2,a3,c1", name="teardown")
    assert away.status == 0, away.output
    (removed,) = site.calls("kubernetes_access")
    assert (removed["state"], removed["host"], removed["kubeconfig"]) == ("absent", "b1", "/kube/a")
    assert "Kubernetes of cluster a still has what is the mesh's" in away.output
    kinds = "clusterrolebinding,clusterrole,csr,service,endpointslice"
    assert f"kubectl delete {kinds} -A -l app.kubernetes.io/managed-by=isthmus" in away.output
