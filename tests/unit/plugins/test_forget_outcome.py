# SPDX-License-Identifier: GPL-3.0-or-later
"""What a run of forget says."""

from __future__ import annotations

import copy
from typing import Any

from ansible_collections.isthmus.mesh.plugins.filter.forget_outcome import forget_outcome
from ansible_collections.isthmus.mesh.plugins.module_utils.etcd_unit import environment
from unit.mesh.estates import model, planned

PLAN: dict[str, Any] = {
    "forgotten": {"o3": {"cluster": "onprem", "at": "2026-01-02T03:04:05Z", "by": "alice"}},
    "revocations": [{"cluster": "onprem", "ca_host": "o1", "hosts": ["o3"], "names": []}],
    "in_cluster": {"calm": {"entry": "calm-api"}},
    "record": {
        "roster": {},
        "clusters/onprem": {"name": "onprem", "state": "present", "etcd": {"members": ["o1", "o2"]}},
        "clusters/gone": {"name": "gone", "state": "absent"},
    },
}
LISTED = {"__pki_requested": {"pending": []}}
ANSWER = {"cluster": "onprem", "crl": "PEM", "revoked": ["root of o3 (CN=root, serial 1f)"]}


def outcome(answer: dict[str, Any] | None, **o2: Any) -> dict[str, list[str]]:
    first = {"inventory_hostname": "o1", **LISTED, **({} if answer is None else {"__forget_revoked": answer})}
    found: dict[str, list[str]] = forget_outcome(
        [first, {"inventory_hostname": "o2", **o2}, {"inventory_hostname": "o3"}], copy.deepcopy(PLAN)
    )
    return found


def test_all_is_done() -> None:
    found = outcome(ANSWER, **LISTED)
    assert found["pending"] == found["problems"] == []
    assert found["done"] == [
        "o3 of cluster onprem is forgotten since 2026-01-02T03:04:05Z, until it is joined anew.",
        "The authority of cluster onprem revoked root of o3 (CN=root, serial 1f).",
    ]


def test_an_incomplete_ledger_is_told() -> None:
    found = outcome({**ANSWER, "revoked": [], "since": "2026-01-01T00:00:00Z"}, **LISTED)
    assert "The authority of cluster onprem had nothing more to revoke." in found["done"]
    assert any(
        line.startswith("NOT REVOKED: what the authority of cluster onprem signed before 2026-01-01T00:00:00Z")
        for line in found["done"]
    )


def test_an_authority_that_is_silent_is_pending_and_one_that_is_sick_a_failure() -> None:
    for answer in (None, {"unreachable": True, "msg": "no route"}):
        found = outcome(answer, **LISTED)
        assert found["problems"] == []
        assert "The authority of cluster onprem on o1 has not revoked what o3 may hold of it" in found["pending"][0]
    found = outcome({"msg": "the private key is missing.", "failed": False}, **LISTED)
    assert found["pending"] == []
    assert "may hold of it: the private key is missing. Users of agents" in found["problems"][0]


def test_an_authority_that_is_inside_its_cluster_has_revoked_or_is_pending() -> None:
    plan = copy.deepcopy(PLAN)
    plan["in_cluster"]["m"] = {"entry": "m-api", "revoked": {"hosts": ["o3"], "names": []}}
    hosts = [{"inventory_hostname": name, **LISTED} for name in ("o1", "o2")]
    hosts[0]["__forget_revoked"] = ANSWER

    def told(**issued: Any) -> dict[str, list[str]]:
        entry = {"inventory_hostname": "m-api", "isthmus_cluster": "m", "__site_issued": issued}
        found: dict[str, list[str]] = forget_outcome([*hosts, entry], plan)
        return found

    certificates = [{"host": "o3", "words": "peer-m of o3 (serial 2a)"}, {"host": "o9", "words": "of long ago"}]
    answer = {"hosts": ["o3"], "names": [], "certificates": certificates, "list": "x"}
    found = told(revoked=answer)
    assert found["pending"] == found["problems"] == []
    assert found["done"][-1] == "The authority of cluster m has revoked peer-m of o3 (serial 2a)."
    assert told(revoked={**answer, "certificates": []})["done"][-1].endswith("cluster m had nothing to revoke.")
    for issued in ({}, {"ca": "CA"}, {"revoked": {**answer, "hosts": []}}):
        (line,) = told(**issued)["pending"]
        assert line.startswith("Pending: the authority of cluster m, which is in it, has not revoked what o3 may hold")


def test_an_etcd_host_without_the_list_is_pending() -> None:
    for o2 in ({}, {"__pki_requested": {"skipped": True}}, {"__pki_requested": {"failed": True, "msg": "no"}}):
        found = outcome(ANSWER, **o2)
        assert found["pending"][0].startswith("Pending: etcd of cluster onprem on o2 did not get the list")


def test_etcd_is_told_of_a_list_only_where_there_is_one() -> None:
    """With the setting and without the file it refuses everybody."""
    spec = planned(model()).specs["o1"]
    setting = "ETCD_CLIENT_CRL_FILE=/etc/isthmus/pki/revoked.crl\nETCD_PEER_CRL_FILE=/etc/isthmus/pki/revoked.crl\n"
    assert setting in environment(spec)
    assert "CRL" not in environment(spec, revocation=False)
