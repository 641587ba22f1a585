# SPDX-License-Identifier: GPL-3.0-or-later
"""How quickly a Kubernetes cluster of 10,000 pods and 1,000 services is published, and a change of it. Gates nothing.

A real kube-apiserver and a real etcd on this machine, without the lab; a registrar as a process of its own. The
figures of a change are from the moment in which a bare watch of the API has it (the baseline) until etcd has the key.
Run by `make bench-kubernetes`.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "agent")]

from integration.kubernetes_fixture import ApiServer  # noqa: E402
from integration.test_registrar_kubernetes import READ, RESOURCES, USER, Kube  # noqa: E402
from isthmus_agent.kvstore import Put  # noqa: E402
from isthmus_agent.registrar.kubernetes.client import Api  # noqa: E402
from isthmus_agent.registrar.kubernetes.objects import KINDS  # noqa: E402
from isthmus_agent.registrar.leader import MAX_OPERATIONS  # noqa: E402
from isthmus_mesh import keys  # noqa: E402
from isthmus_mesh.spec import KubernetesApiSpec  # noqa: E402
from kubernetes_objects import endpoint, endpoint_slice, namespace, node, pod, service  # noqa: E402

PODS = int(os.environ.get("PODS", "10000"))
SERVICES = PODS // 10
NODES = max(2, PODS // 100)
NAMESPACES = 20
CHANGES = 60
AT_ONCE = 16


def say(text: str) -> None:
    print(f"bench: {text}", flush=True)


class BenchKube(Kube):
    """As the tests' cluster, with as many hosts as the pods need."""

    def host(self, number: int) -> dict[str, Any]:
        high, low = divmod(number, 250)
        return {
            **super().host(1),
            "range4": f"10.104.{number}.0/28",
            "mesh4": f"10.104.{number}.1",
            "underlay4": f"198.18.{4 + high}.{low}",
            "advertise4": f"198.18.{4 + high}.{low}",
            "kubernetes_node": f"node-{number}",
        }


def address(number: int) -> tuple[str, str]:
    """Of a pod: its address and its node."""
    on = number % NODES
    return f"10.244.{on + 1}.{number // NODES + 2}", f"node-{on + 1}"


def space(number: int) -> str:
    """The namespace of a pod and of its service."""
    return f"ns-{number % SERVICES % NAMESPACES}"


async def fill(api: ApiServer) -> None:
    """All objects, as quickly as the API server takes them."""
    connector = aiohttp.TCPConnector(limit=AT_ONCE)
    gate = asyncio.Semaphore(AT_ONCE)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def send(method: str, path: str, body: Any, kind: str) -> None:
            headers = {"Content-Type": kind}
            async with session.request(method, api.url + path, json=body, headers=headers, ssl=api.tls) as answer:
                if answer.status >= 300:
                    raise RuntimeError(f"{method} {path}: {answer.status} {(await answer.text())[:300]}")

        async def make(resource: str, value: dict[str, Any]) -> None:
            async with gate:
                for request in api.requests(resource, value):
                    await send(*request)

        async def all_of(resource: str, values: list[dict[str, Any]]) -> None:
            await asyncio.gather(*(make(resource, value) for value in values))

        await all_of("nodes", [node(f"node-{n}", f"10.244.{n}.0/24", "198.18.4.1") for n in range(1, NODES + 1)])
        await all_of("namespaces", [namespace(f"ns-{n}", team=str(n)) for n in range(NAMESPACES)])
        pods, parts = [], []
        for number in range(PODS):
            at, on = address(number)
            of = number % SERVICES
            pods.append(pod(f"pod-{number}", at, on, space(number), {"app": f"app-{of}"}))
        for of in range(SERVICES):
            ends = [endpoint(*address(number)) for number in range(of, PODS, SERVICES)]
            parts.append(endpoint_slice(f"app-{of}", *ends, namespace=space(of)))
        named = [service(f"app-{of}", f"10.96.{of // 250}.{of % 250 + 2}", space(of)) for of in range(SERVICES)]
        await all_of("services", named)
        await all_of("endpointslices", parts)
        await all_of("pods", pods)


def start(kube: Kube, directory: Path, host: str) -> subprocess.Popen[bytes]:
    spec, log = directory / f"{host}.json", directory / f"{host}.log"
    spec.write_text(json.dumps(kube.spec_document(host)))
    words = ["--config", str(spec), "--estate", str(kube.estate_file), "--state-dir", str(directory / host)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "agent")}
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "isthmus_agent.registrar.main", *words], stderr=out, env=environment
        )


async def until_canary(kube: Kube) -> float:
    began, client = time.monotonic(), kube.server.client()
    try:
        while await client.get(keys.canary_key("kube", "services")) is None:
            await asyncio.sleep(0.05)
    finally:
        await client.close()
    return time.monotonic() - began


def cpu(process: subprocess.Popen[bytes]) -> float:
    """Seconds of processor time that a process has used; on a busy machine they say more than the clock."""
    words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


async def lists(access: KubernetesApiSpec) -> float:
    """Seconds that reading everything takes that does nothing else."""
    api, began = Api(access), time.monotonic()
    try:
        for kind in KINDS:
            more = ""
            while True:
                page = await api.page(kind, more)
                more = page.more
                if not more:
                    break
    finally:
        await api.close()
    return time.monotonic() - began


async def writes(kube: Kube) -> float:
    """Seconds that writing as many keys of that size takes, as many at once as the registrar writes."""
    state, client, began = list(kube.state().values()), kube.server.client(timeout=30.0), time.monotonic()
    try:
        for first in range(0, len(state), MAX_OPERATIONS):
            part = enumerate(state[first : first + MAX_OPERATIONS], first)
            await client.txn([], [Put(f"bench/{number}", value) for number, value in part])
    finally:
        await client.close()
    return time.monotonic() - began


async def changes(kube: Kube, api: ApiServer, access: KubernetesApiSpec) -> tuple[list[float], list[float]]:
    """Milliseconds: a change's way to a bare watch, and from there to etcd."""
    bare, client = Api(access), kube.server.client()
    first = await bare.page("pods", limit=1)
    seen: dict[str, float] = {}
    written: dict[str, float] = {}
    arrived = asyncio.Event()

    async def watch_api() -> None:
        async with aclosing(bare.watch("pods", first.version)) as events:
            async for event in events:
                if event.type == "MODIFIED":
                    seen[event.object["status"]["podIPs"][0]["ip"]] = time.monotonic()
                    arrived.set()

    async def watch_etcd() -> None:
        async with aclosing(client.watch(keys.state_prefix("ip", "kube"), 0)) as batches:
            async for batch in batches:
                for event in batch.events:
                    written.setdefault(event.kv.key.rsplit("/", 1)[1], time.monotonic())
                arrived.set()

    tasks = [asyncio.create_task(watch_api()), asyncio.create_task(watch_etcd())]
    to_watch, to_etcd = [], []
    try:
        await asyncio.sleep(1)
        for number in range(CHANGES):
            fresh = f"10.244.{number % NODES + 1}.{200 + number // NODES}"
            began = time.monotonic()
            status = {"podIPs": [{"ip": fresh}], "podIP": fresh}
            await asyncio.to_thread(api.status, "pods", space(number), f"pod-{number}", status)
            while fresh not in seen or fresh not in written:
                arrived.clear()
                await asyncio.wait_for(arrived.wait(), 10)
            to_watch.append(1000 * (seen[fresh] - began))
            to_etcd.append(1000 * (written[fresh] - seen[fresh]))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bare.close()
        await client.close()
    return to_watch, to_etcd


def memory(process: subprocess.Popen[bytes]) -> str:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(line.split(":")[1].strip() for line in status.splitlines() if line.startswith("VmHWM"))


async def bench(directory: Path) -> None:
    with ApiServer(directory / "api-server") as api:
        api.allow(USER, READ, *RESOURCES)
        began = time.monotonic()
        await fill(api)
        say(f"{PODS} pods, {SERVICES} services, {NODES} nodes made in {time.monotonic() - began:.0f} s")
        with BenchKube(directory, api) as kube:
            access = KubernetesApiSpec(api.url, *kube.files)
            kube.put(kube.record(NODES))
            for number in range(1, NODES + 1):
                kube.put(kube.node(number))
            plain = await lists(access)
            process = start(kube, directory, "h1")
            try:
                cold, used = await until_canary(kube), cpu(process)
                state = kube.state()
                assert sum("/ip/" in key for key in state) == PODS, "not every pod is published"
                assert sum("/services/" in key for key in state) == SERVICES, "not every service is published"
                write = await writes(kube)
                say(f"cold start until all is published: {cold:.1f} s")
                say(f"baseline: {plain:.1f} s to read all of it and {write:.1f} s to write as many keys")
                say(f"ratio: {cold / (plain + write):.1f} times the baseline")
                say(f"its processor time: {used:.1f} s")
                watched, wrote = await changes(kube, api, access)
                for what, figures in (("API call to a bare watch (baseline)", watched), ("event to etcd's key", wrote)):
                    middle, worst = statistics.median(figures), max(figures)
                    say(f"a pod's new address, {what}: median {middle:.0f} ms, worst of {CHANGES} {worst:.0f} ms")
                say(f"registrar's memory at most: {memory(process)}")
            finally:
                process.terminate()
                process.wait(20)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        asyncio.run(bench(Path(place)))
