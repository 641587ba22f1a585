# SPDX-License-Identifier: GPL-3.0-or-later
"""The batches of `site`: as a table, and what holds for every estate."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.isthmus.mesh.plugins.plugin_utils.batches import DEFAULT, SerialError, serial_of, split
from hypothesis import given
from hypothesis import strategies as st


def specs_of(**clusters: tuple[list[str], list[str]]) -> dict[str, dict[str, Any]]:
    """Of each cluster the hosts with a member of its etcd, and the others."""
    return {
        host: {"cluster": {"name": name}, "member": {"name": host} if host in members else None}
        for name, (members, others) in clusters.items()
        for host in [*members, *others]
    }


LAB = specs_of(
    onprem=(["onprem-1", "onprem-2", "onprem-3"], []), cloud=(["cloud-1"], ["cloud-2"]), edge=(["edge-1"], [])
)
TEN = specs_of(a=(["m1", "m2", "m3"], ["w1", "w2", "w3", "w4", "w5", "w6", "w7"]))
ONE = specs_of(a=(["m1"], ["w1", "w2", "w3"]))


@pytest.mark.parametrize(
    ("specs", "serial", "wanted"),
    [
        (LAB, None, [["cloud-2", "edge-1", "onprem-1"], ["cloud-1", "onprem-2"], ["onprem-3"]]),
        (LAB, "100%", [["cloud-1", "cloud-2", "edge-1", "onprem-1"], ["onprem-2"], ["onprem-3"]]),
        (TEN, None, [["w1"], ["m1", "w2"], ["m2", "w3", "w4", "w5", "w6", "w7"], ["m3"]]),
        (TEN, 4, [["w1", "w2", "w3", "w4"], ["m1", "w5", "w6", "w7"], ["m2"], ["m3"]]),
        (ONE, None, [["w1"], ["w2"], ["m1", "w3"]]),
        (ONE, 1, [["w1"], ["m1"], ["w2"], ["w3"]]),
        (ONE, "50%", [["w1", "w2"], ["m1", "w3"]]),
    ],
)
def test_batches(specs: dict[str, Any], serial: Any, wanted: list[list[str]]) -> None:
    clusters = {spec["cluster"]["name"] for spec in specs.values()}
    found = split(specs, list(specs), (), clusters, serial_of(serial))
    assert (found.together, found.batches) == ([], wanted)


def test_what_needs_each_other_goes_together_and_first() -> None:
    found = split(LAB, list(LAB), ["edge"], ["onprem"], serial_of(None))
    assert found.together == ["cloud-1", "edge-1"], "a new cluster, and the member of an etcd that does not answer"
    assert found.batches == [["cloud-2", "onprem-1"], ["onprem-2"], ["onprem-3"]]
    assert found.words() == [
        "together, before the others: cloud-1, edge-1",
        "batch 1: cloud-2, onprem-1",
        "batch 2: onprem-2",
        "batch 3: onprem-3",
    ]


def test_gateways_go_before_all_hosts_that_lead_packets_to_them() -> None:
    """Also those of another cluster at their site, and whether or not they carry a member."""
    specs = specs_of(a=(["m1", "m2", "m3"], ["w1", "w2"]), b=(["n1"], ["v1", "v2"]), c=(["o1"], ["u1"]))
    for name in ("m3", "w2", "v2"):
        specs[name]["ipsec"] = {"far": {}, "local": "192.0.2.1"}
    specs["w1"]["ipsec"] = {"far": {}, "via": "192.0.2.1"}
    found = split(specs, list(specs), ["c"], ["a", "b"], serial_of(None))
    assert found.together == ["o1", "u1"]
    assert found.batches == [["w2", "v2"], ["m3"], ["w1", "v1"], ["m1", "n1"], ["m2"]]


def test_many_names_are_cut_in_words() -> None:
    many = specs_of(a=([], [f"w{number:02}" for number in range(25)]))
    assert split(many, list(many), (), ["a"], [25]).words()[0].endswith(", w19 and 5 more")


def test_hosts_that_are_not_in_the_run_or_not_in_the_plan_are_in_no_batch() -> None:
    found = split(LAB, ["onprem-2", "cloud-1", "stranger"], (), ["onprem", "cloud", "edge"], serial_of(None))
    assert found.batches == [["cloud-1", "onprem-2"]]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, list(DEFAULT)),
        ("", list(DEFAULT)),
        (3, [3]),
        ("1", [1]),
        ("20 %", ["20%"]),
        ("1, 20%,100%", [1, "20%", "100%"]),
        ([1, "50%"], [1, "50%"]),
    ],
)
def test_serial(value: Any, wanted: list[int | str]) -> None:
    assert serial_of(value) == wanted


@pytest.mark.parametrize("value", [0, -1, True, "0%", "101%", "half", "1,", [], [1, None], 0.2, {"a": 1}])
def test_a_serial_that_is_none_is_refused_in_words(value: Any) -> None:
    with pytest.raises(SerialError, match=r"^isthmus_serial: .* is no size of a batch\. Nothing was changed"):
        serial_of(value)


SIZES = st.one_of(st.integers(1, 40), st.integers(1, 100).map("{}%".format))
CLUSTERS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 40)), min_size=1, max_size=4)


@given(CLUSTERS, st.one_of(st.none(), st.lists(SIZES, min_size=1, max_size=4)), st.randoms(use_true_random=False))
def test_every_host_once_and_never_two_members_of_a_cluster(sizes: Any, serial: Any, random: Any) -> None:
    wanted = {
        f"c{number}": ([f"c{number}m{one}" for one in range(members)], [f"c{number}w{one}" for one in range(others)])
        for number, (members, others) in enumerate(sizes)
    }
    specs = specs_of(**wanted)
    found = split(specs, list(specs), (), list(wanted), serial_of(serial))
    assert sorted(name for batch in found.batches for name in batch) == sorted(specs)
    assert all(found.batches), "no batch is empty"
    for members, others in wanted.values():
        own = [[name for name in batch if name in {*members, *others}] for batch in found.batches]
        assert all(len(set(batch) & set(members)) <= 1 for batch in own)
        total = len(members) + len(others)
        for batch, size in zip(own, serial_of(serial)[:1], strict=False):
            assert len(batch) <= (size if isinstance(size, int) else max(1, total * int(size[:-1]) // 100))
        if serial is None and total:
            assert len(own[0]) == 1
            assert len(own[1]) <= max(1, total // 5) if len(own) > 1 else total == 1
            assert not (others and set(own[0]) & set(members)), "the first is a host that takes least with it"
    names = list(specs)
    random.shuffle(names)
    assert split({name: specs[name] for name in names}, names, (), list(wanted), serial_of(serial)) == found
