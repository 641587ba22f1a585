# SPDX-License-Identifier: GPL-3.0-or-later
"""Every decoder of what somebody else wrote: a value or the documented error, never another exception.

Time and memory stay in proportion to what was read.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import agent_mesh as mesh
import pytest
from hypothesis import given
from hypothesis import strategies as st
from isthmus_agent.kvstore.store import canary_cluster_id
from isthmus_agent.registrar.memory import Known, Memory
from isthmus_agent.registrar.publish import Inputs, Own, publish
from isthmus_agent.state.lastgood import LastGood, LastGoodError
from isthmus_agent.state.model import Vip
from isthmus_mesh import documents, jsontext, keys, wire
from isthmus_mesh.documents import DocumentError
from isthmus_mesh.model import ModelError
from isthmus_mesh.planner import plan
from isthmus_mesh.record import Record, RecordError, merge, parse_time
from isthmus_mesh.spec import NodeSpec, SpecError
from isthmus_mesh.wire import WireError
from unit.hostile import hostile
from unit.mesh.estates import NOW, hosts, model, planned, web

MODEL = model(the_hosts={name: {**host, "isthmus_workloads": [web()]} for name, host in hosts().items()})


@dataclass(frozen=True)
class Reader:
    """A decoder, a document that it takes, and what it raises for others."""

    read: Callable[[bytes], Any]
    good: Any
    error: type[Exception]


def of(text: str) -> Any:
    return json.loads(text)


def record_of(raw: bytes) -> Record:
    return merge([jsontext.loads(raw, RecordError)])


def labels_of(raw: bytes) -> dict[str, str]:
    try:
        return wire.labels_from_string(raw.decode())
    except UnicodeDecodeError as error:
        raise WireError("not UTF-8") from error


DEFINITION = mesh.web_definition(health=documents.HealthCheck("http", 8080, "/"))
READERS = {
    "Node": Reader(wire.Node.from_json, of(mesh.node("cloud", 1, ipv4_health_ip="10.102.0.3").to_json()), WireError),
    "IPIdentityPair": Reader(wire.IPIdentityPair.from_json, of(mesh.pair("cloud", 1).to_json()), WireError),
    "ClusterService": Reader(
        wire.ClusterService.from_json,
        {**of(mesh.web_service("cloud", [1, 2]).to_json()), "zones": {"10.102.0.2": {"zone": "a"}}},
        WireError,
    ),
    "ClusterConfig": Reader(wire.ClusterConfig.from_json, of(wire.ClusterConfig(2).to_json()), WireError),
    "labels": Reader(labels_of, mesh.labels("cloud"), WireError),
    "ServiceDefinition": Reader(documents.ServiceDefinition.from_json, of(DEFINITION.to_json()), DocumentError),
    "NodeReport": Reader(
        documents.NodeReport.from_json,
        of(
            documents.NodeReport(
                "a",
                "onprem",
                (("InternalIP", "198.18.1.11"),),
                "10.101.0.0/28",
                None,
                "10.101.0.1",
                None,
                {"a": "b"},
                9,
            ).to_json()
        ),
        DocumentError,
    ),
    "WorkloadReport": Reader(
        documents.WorkloadReport.from_json,
        of(
            documents.WorkloadReport(
                "web", "shop", "a", "default", {"a": "b"}, ("10.101.0.2",), "198.18.1.11", {"shop/web": True}
            ).to_json()
        ),
        DocumentError,
    ),
    "Alive": Reader(documents.Alive.from_json, of(documents.Alive("a", "1", "b", "c").to_json()), DocumentError),
    "PeerStatus": Reader(
        documents.PeerStatus.from_json,
        of(
            documents.PeerStatus(
                "connected", "t", "t", "https://a:1", "00000000000000b2", 7, {"ip": 1}, {"a": 1}, ("k", "r"), 1.5
            ).to_json()
        ),
        DocumentError,
    ),
    "Vip": Reader(Vip.from_json, {"ipv4": "10.111.0.10", "ipv6": "fd00::1", "released": None}, DocumentError),
    "NodeSpec": Reader(NodeSpec.from_json, mesh.spec_document(), SpecError),
    "LastGood": Reader(
        LastGood.from_json, of(LastGood("onprem", "t", {"a": b"b"}, {"a": (1, 2)}).to_json()), LastGoodError
    ),
    "record": Reader(record_of, dict(planned(MODEL).record), RecordError),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_the_good_document_is_taken(reader: Reader) -> None:
    reader.read(reader.good.encode() if isinstance(reader.good, str) else json.dumps(reader.good).encode())


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@given(data=st.data())
def test_anything_is_a_value_or_the_documented_error(reader: Reader, data: st.DataObject) -> None:
    try:
        value = reader.read(data.draw(hostile(reader.good)))
    except reader.error:
        return
    if not hasattr(value, "to_json"):
        return
    try:
        text = value.to_json()
    except (ValueError, RecursionError):
        assert isinstance(value, wire.ClusterService), "only zones are handed on as they are"
        return
    assert type(value).from_json(text.encode()) == value


STRESS = {
    "much text": lambda size: b'{"a":"' + b"\\u0041" * (size // 6) + b'"}',
    "a long number": lambda size: b'{"ID":' + b"9" * size + b"}",
    "deep lists": lambda size: b"[" * size,
    "deep objects": lambda size: b'{"a":' * (size // 5),
    "one name again and again": lambda size: b"{" + b",".join([b'"a":{}'] * (size // 8)) + b"}",
    "many addresses": lambda size: b'{"IPAddresses":[' + b",".join([b'{"Type":"x","IP":"::1"}'] * (size // 24)) + b"]}",
    "many ranges": lambda size: b'{"IPv4SecondaryAllocCIDRs":[' + b",".join([b'"10.0.0.0/8"'] * (size // 13)) + b"]}",
    "many backends": lambda size: (
        b'{"backends":{' + b",".join(b'"10.0.%d.%d":{}' % (i >> 8, i & 255) for i in range(size // 16)) + b"}}"
    ),
    "many labels": lambda size: b"".join(b"k8s:%d=;" % i for i in range(size // 12)),
    "semicolons": lambda size: b";" * size,
}


@pytest.mark.parametrize("make", STRESS.values(), ids=STRESS)
def test_time_and_memory_stay_in_proportion(make: Callable[[int], bytes]) -> None:
    """1 MiB is more than etcd takes as one value by far; the mirror takes 64 KiB of a peer."""
    raw = make(1 << 20)
    for name, reader in READERS.items():
        tracemalloc.start()
        began = time.process_time()
        try:
            reader.read(raw)
        except reader.error:
            pass
        finally:
            spent, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 100 * len(raw), f"{name}: {peak} bytes"
        assert spent < 20, f"{name}: {spent} s"


PARSERS = [value for name, value in vars(keys).items() if name.startswith("parse_")]
PREFIXES = [value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)] + [
    *(keys.state_prefix(kind, "cloud") for kind in keys.KINDS),
    *(keys.cache_prefix(kind, "cloud") for kind in keys.KINDS),
]


@given(st.sampled_from([*PREFIXES, ""]), st.text(max_size=30) | st.text("/.0189:a\udcff", max_size=30))
def test_no_key_can_raise(prefix: str, rest: str) -> None:
    assert len(PARSERS) > 10
    for parse in PARSERS:
        found = parse(prefix + rest)
        assert found is None or all(part == part.strip("/") for part in [found] if isinstance(part, str))


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda raw: b"t cluster_id=" + raw))
def test_no_canary_can_raise_but_its_error(raw: bytes) -> None:
    try:
        found = canary_cluster_id(raw)
    except ValueError:
        return
    assert found is None or 0 <= found < 2**64


@given(
    st.text(max_size=30) | st.from_regex(r"[0-9]{1,5}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", fullmatch=True)
)
def test_no_time_can_raise_but_its_error(text: str) -> None:
    try:
        assert parse_time(text).tzinfo is not None
    except RecordError:
        return


@given(st.data())
def test_a_record_that_is_taken_can_be_planned_on(data: st.DataObject) -> None:
    """The controller reads every cluster's copy: none of them may end in a traceback."""
    good = READERS["record"].good
    name = data.draw(st.sampled_from(sorted(good)))
    try:
        document = jsontext.loads(data.draw(hostile(good[name])), RecordError)
        record = merge([good, {name: document}, {"cluster": "cloud", "documents": {name: document}}])
        plan(MODEL, record, NOW, "1.0.0", by="alice")
    except (RecordError, ModelError):
        return


KNOWN = Known({"isthmus/v1/alloc/vips/shop/web": '{"ipv4":"10.111.0.1"}'}, 0xA1, 7)
STORED = {"schema": 1, "estate": "lab", "cluster": "onprem", "cluster_id": "a1", "revision": 7, "keys": {"a": "b"}}


@given(raw=hostile(STORED))
def test_no_file_keeps_a_registrar_from_starting(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    memory = Memory(tmp_path_factory.getbasetemp(), "lab", "onprem")
    memory.path.write_bytes(raw)
    found = memory.load()
    assert found is None or all(isinstance(value, str) for value in found.keys.values())


RECORD = dict(planned(MODEL).record)["clusters/onprem"]
OWN = Own("onprem", 1, 255, mesh.spec().cluster.service_range4)


def published() -> dict[str, str]:
    """What a cluster has that published everything."""
    hosts = RECORD["hosts"]
    nodes, workloads = {}, {}
    for name, host in hosts.items():
        report = documents.NodeReport(name, "onprem", (), host["range4"], None, host["mesh4"])
        nodes[keys.node_report_key(name)] = report.to_json().encode()
        for full, entry in host["workloads"].items():
            namespace, workload = full.split("/")
            workloads[keys.workload_key(name, namespace, workload)] = (
                documents.WorkloadReport(
                    workload, namespace, name, "default", {}, (entry["address4"],), "198.18.1.1", {"shop/web": True}
                )
                .to_json()
                .encode()
            )
    services = {keys.service_definition_key("shop", "web"): DEFINITION.to_json().encode()}
    INPUTS.update(nodes=nodes, workloads=workloads, services=services)
    return publish(OWN, Inputs(RECORD, nodes, workloads, services, {}, "2026-01-02T03:04:05Z")).keys


INPUTS: dict[str, dict[str, bytes]] = {}
PREVIOUS = published()


def as_json(value: str | bytes) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value if isinstance(value, str) else value.decode()


@given(st.data())
def test_nothing_in_own_etcd_can_keep_a_registrar_from_publishing(data: st.DataObject) -> None:
    """Reports are agents'; everything else there may be damaged. What is published can be written."""
    inputs = {name: dict(values) for name, values in INPUTS.items()}
    previous = dict(PREVIOUS)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            key = data.draw(st.sampled_from(sorted(PREVIOUS)))
            previous[key] = data.draw(hostile(as_json(PREVIOUS[key]))).decode("utf-8", "surrogateescape")
        else:
            name = data.draw(st.sampled_from(sorted(INPUTS)))
            key = data.draw(st.sampled_from(sorted(INPUTS[name])))
            inputs[name][key] = data.draw(hostile(as_json(INPUTS[name][key])))
    found = publish(OWN, Inputs(RECORD, **inputs, previous=previous, now="2026-02-03T04:05:06Z"))  # type: ignore[arg-type]
    for key, value in found.keys.items():
        (key + value).encode("utf-8", "surrogateescape")
    numbers = [keys.parse_identity_key(key) for key in found.keys if key.startswith("cilium/state/identities/")]
    assert all(number is not None and 65536 < number[1] < 131072 for number in numbers)
